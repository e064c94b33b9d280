"""What is on the hub already: whether it may be written over, and what of it goes away."""

import re

from moeadapt.adapter_format.files import exists
from moeadapt.adapter_format.settings import MANIFEST, SETTINGS, WEIGHTS
from moeadapt.errors import ConfigError
from moeadapt.export.receipt import RECEIPT
from moeadapt.hub.client import RemoteState
from moeadapt.hub.parcel import CARD, Parcel

_SHARDS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


def check_kind(
    parcel: Parcel, state: RemoteState, repo_id: str, *, private: bool | None, overwrite: bool
) -> None:
    """Refuse to write over what moeadapt did not write, or into a repository of another kind.

    Of an adapter the manifest there says what moeadapt wrote, of a checkpoint its receipt. A file
    with the same content, or with that of the folder, is not written over.

    Raises:
        ConfigError: says what is there.
    """
    there = set(state.files)
    if private is not None and state.private is not None and private != state.private:
        now = "private" if state.private else "public"
        raise ConfigError(
            f"{repo_id} exists and is {now}; change that in its settings on the hub, or push to "
            "another name"
        )
    if parcel.kind == "adapter":
        other = {"config.json", "model.safetensors"} & there
        ours = {*state.sealed, CARD, MANIFEST}
    else:
        other = {SETTINGS, WEIGHTS} & there
        ours = there if RECEIPT in there else {CARD}
    if other:
        what = "a whole model" if parcel.kind == "adapter" else "an adapter"
        raise ConfigError(
            f"{repo_id} holds {what} ({', '.join(sorted(other))}), and a repository is one or the "
            "other; push to another name"
        )
    goes = set(parcel.files) | set(stale_files(parcel, state))
    strange = {n for n in (there & goes) - ours if not _is_same(parcel, state, n)}
    if strange and not overwrite:
        raise ConfigError(
            f"{repo_id} holds {', '.join(sorted(strange))}, which moeadapt did not write; push to "
            "another name, or say --overwrite (overwrite=True)"
        )


def _is_same(parcel: Parcel, state: RemoteState, name: str) -> bool:
    if name not in parcel.files:
        return False
    if state.holds(name, parcel.files[name]):
        return True
    # A trainer pushes files as they are; a parcel has the base's id in them.
    return exists(parcel.folder, name) and state.holds(name, parcel.folder / name)


def stale_files(parcel: Parcel, state: RemoteState) -> tuple[str, ...]:
    """Return what an earlier push wrote and this one does not."""
    ours = set(state.sealed) if parcel.kind == "adapter" else set()
    if parcel.kind == "checkpoint":
        ours = {name for name in state.files if _SHARDS.fullmatch(name)}
    return tuple(sorted((ours & set(state.files)) - set(parcel.files) - {CARD, MANIFEST}))
