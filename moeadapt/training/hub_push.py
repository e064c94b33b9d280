"""What a trainer that pushes by itself must not do: lose a card, mix files, send a token."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moeadapt.adapter_format.settings import MANIFEST
from moeadapt.errors import ConfigError
from moeadapt.model_card.first_lines import has_our_part, with_first_lines
from moeadapt.model_card.merge import own_text
from moeadapt.training.checkpoint_files import checkpoint_folder

CARD = "README.md"

GUIDE = (
    "the trainer is about to push: it sends training_args.bin, a pickled file, and the paths in "
    "its settings as they are; {card}. `moeadapt push {folder} owner/name` sends neither, checks "
    "every file, and writes the whole card"
)


def refuse_token(args: Any) -> None:
    """Refuse a token in the arguments: the trainer sends them to the hub in training_args.bin.

    Raises:
        ConfigError: says where to put it.
    """
    if getattr(args, "hub_token", None):
        raise ConfigError(
            "hub_token: a trainer that pushes sends its arguments along, in training_args.bin, and "
            "your token in them; leave it out, and set HF_TOKEN or run `hf auth login`"
        )


def before_push(args: Any, state: Any, *, keeps_card: bool) -> None:
    """Follow `on_push_begin`: the manifest goes with its weights; say what will be sent.

    A push of a checkpoint copies the weights into `output_dir`, and not the manifest.

    Args:
        args: the trainer's.
        state: the trainer's.
        keeps_card: whether the trainer keeps a card that is there.

    Raises:
        ConfigError: see `refuse_token`.
    """
    refuse_token(args)
    manifest = checkpoint_folder(args, state) / MANIFEST
    if args.should_save and manifest.is_file():
        shutil.copyfile(manifest, Path(args.output_dir) / MANIFEST)
    kept = "a card that is there is kept" if keeps_card else "and its draft replaces your card"
    message = GUIDE.format(card=kept, folder=args.output_dir)
    warnings.warn(message, stacklevel=2)


@contextmanager
def kept_card(args: Any, repo_id: str | None) -> Iterator[None]:
    """Let a trainer write its draft of a card, and put the card back that was there.

    A card that `moeadapt push` wrote, or one of the hub that is no draft, stays as it is; a new
    draft gets the lines that say how to load the adapter.

    Args:
        args: the trainer's.
        repo_id: what it pushes to; None: nothing.
    """
    path = Path(args.output_dir) / CARD
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    unknown = False
    if repo_id is not None and args.should_save:
        try:
            before = _of_hub(repo_id, args.hub_revision) or before
        except (OSError, ValueError) as error:
            unknown = True
            warnings.warn(
                f"the card of {repo_id} could not be read ({error}); no new one is drafted, since "
                "a push would put it in the place of yours",
                stacklevel=3,
            )
    try:
        yield
    finally:
        if args.should_save and path.is_file():
            _choose(path, before, unknown)


def _choose(path: Path, before: str | None, unknown: bool) -> None:
    """Leave the card that was there, or the draft that stands there now with our lines."""
    if before is None and unknown:
        path.unlink()
        return
    if before is None or (is_draft(before) and not has_our_part(before)):
        before = with_first_lines(path.read_text(encoding="utf-8"), str(path))
    path.write_text(before, encoding="utf-8")


def _of_hub(repo_id: str, revision: str | None) -> str | None:
    """Return the card of the hub; None if it has none.

    Raises:
        OSError: the hub cannot be asked.
        ValueError: the card is no text.
    """
    try:
        path = hf_hub_download(repo_id, CARD, revision=revision)
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")


def is_draft(card: str) -> bool:
    """Whether nobody wrote a word of it: TRL, PEFT or transformers drafted it."""
    return not own_text(card).strip()
