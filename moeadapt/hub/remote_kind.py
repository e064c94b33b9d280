"""What is on the hub already: whether it may be written over, and what of it goes away."""

import re

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
        strange = there & {SETTINGS, WEIGHTS} if MANIFEST not in there else set()
    else:
        other = {SETTINGS, WEIGHTS} & there
        strange = {n for n in there if _SHARDS.fullmatch(n)} if RECEIPT not in there else set()
    if other:
        what = "a whole model" if parcel.kind == "adapter" else "an adapter"
        raise ConfigError(
            f"{repo_id} holds {what} ({', '.join(sorted(other))}), and a repository is one or the "
            "other; push to another name"
        )
    if strange and not overwrite:
        raise ConfigError(
            f"{repo_id} holds {', '.join(sorted(strange))}, which moeadapt did not write; push to "
            "another name, or say --overwrite (overwrite=True)"
        )


def stale_files(parcel: Parcel, state: RemoteState) -> tuple[str, ...]:
    """Return what an earlier push wrote and this one does not."""
    ours = set(state.sealed) if parcel.kind == "adapter" else set()
    if parcel.kind == "checkpoint":
        ours = {name for name in state.files if _SHARDS.fullmatch(name)}
    return tuple(sorted((ours & set(state.files)) - set(parcel.files) - {CARD, MANIFEST}))
