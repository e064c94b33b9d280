"""`moeadapt.push`: an adapter, or a stock checkpoint made of one, to a repository in one commit."""

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from moeadapt.adapter_format.files import exists
from moeadapt.adapter_format.settings import SETTINGS
from moeadapt.errors import ConfigError
from moeadapt.export.receipt import RECEIPT
from moeadapt.hub.adapter import adapter_parcel, seal
from moeadapt.hub.attachments import add_recipe, add_report
from moeadapt.hub.card import card_of
from moeadapt.hub.checkpoint import checkpoint_parcel
from moeadapt.hub.client import Remote, RemoteState, find_token
from moeadapt.hub.names import check_datasets, check_repo_id, check_revision
from moeadapt.hub.parcel import CARD, Parcel
from moeadapt.hub.private import check_private
from moeadapt.hub.remote_kind import check_kind, stale_files
from moeadapt.hub.results import read_results
from moeadapt.hub.source import saved_model


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """What was sent, or would be.

    Attributes:
        repo_id: owner/name.
        kind: adapter or checkpoint.
        files: name -> bytes.
        card: the text of README.md.
        deleted: files of an earlier push that are not part of this one.
        left_out: what lies in the folder and was not sent -> why.
        commit: its id; None: nothing was sent.
        url: of the commit.
        pull_request: its address, if one was opened.
    """

    repo_id: str
    kind: str
    files: dict[str, int]
    card: str
    deleted: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    url: str | None = None
    pull_request: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data, without the card."""
        data = {**vars(self), "deleted": list(self.deleted)}
        return {name: value for name, value in data.items() if name != "card"}


def push(
    model_or_dir: nn.Module | str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    recipe: str | Path | None = None,
    report: str | Path | None = None,
    evaluation: str | Path | None = None,
    with_static_lora: bool = False,
    data: Iterable[Any] | None = None,
    tokenizer: Any = None,
    adapter: str = "default",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> PushResult:
    """Publish an adapter, or an exported or upcycled checkpoint, in one commit.

    Everything is checked before the first byte is sent. A README.md that is there keeps its
    owner's text; ours stands between two marks.

    Args:
        model_or_dir: a PeftModel with a mixture, the folder of a saved one, or the folder that
            `moeadapt export` or `moeadapt upcycle` wrote.
        repo_id: owner/name; made if it is not there.
        base_model: id of the base on the hub; None: what the files say.
        license: an identifier of the hub, such as apache-2.0; None: that of the README.md.
        datasets: ids of what it was trained on.
        recipe: the YAML file of the run; None: recipe.yaml of the folder, if there is one.
        report: the page that `moeadapt report` wrote; None: report.html of the folder, if any.
        evaluation: the file that `moeadapt eval --out` wrote.
        with_static_lora: add a merged LoRA, in the folder static-lora.
        data: what that merge looks at: as for `moeadapt.merge`, or rows as a .jsonl file has them;
            None: the mean of the experts.
        tokenizer: for texts and rows; of a folder it is that of the base.
        adapter: which one of a model.
        private: of a new repository; None: what the account says.
        revision: branch to commit to, made if it is not there; None: main.
        create_pr: open a pull request instead of committing.
        message: of the commit.
        token: of the hub; None: HF_TOKEN, or that of `hf auth login`.
        overwrite: write over files that moeadapt did not write.
        dry_run: check all that can be checked without a network, and send nothing.

    Raises:
        ConfigError: a name is wrong, base or licence are unknown, a file holds a token or a path of
            this machine, or there is nothing that could be published.
        AdapterFileError: a file is damaged.
        UnsupportedError: see `moeadapt.merge`.
        AssetError: with_static_lora needs the base, and it cannot be had.
        HubError: the hub refuses, or cannot be reached.

    Example:
        >>> moeadapt.push("outputs/math", "ann/math", license="apache-2.0").url  # doctest: +SKIP
        'https://huggingface.co/ann/math/commit/...'
    """
    check_repo_id(repo_id)
    check_revision(revision, create_pr)
    known = check_datasets([datasets] if isinstance(datasets, str) else list(datasets))
    if data is not None and not with_static_lora:
        raise ConfigError("data is what with_static_lora looks at; give both or neither")
    remote = None if dry_run else Remote(repo_id, token)
    secret = find_token(token)
    check_private("the message of the commit", (message or "").encode(), secret)
    with ExitStack() as stack:
        folder, model = _source(model_or_dir, adapter, stack)
        parcel = _parcel(folder, base_model)
        _attach(parcel, recipe, report, evaluation, known)
        if with_static_lora:
            _add_static(parcel, model, adapter, data, tokenizer, offline=dry_run)
        parcel.check_private(secret)
        state = RemoteState() if remote is None else remote.state(revision)
        check_kind(parcel, state, repo_id, private=private, overwrite=overwrite)
        card = card_of(
            parcel,
            repo_id,
            revision,
            license,
            state.readme,
            from_model=model is not None,
            token=secret,
        )
        parcel.files[CARD] = card.encode()
        if parcel.kind == "adapter":
            seal(parcel)
        if model is None:
            parcel.note_left_out()
        result = PushResult(
            repo_id=repo_id,
            kind=parcel.kind,
            files=parcel.sizes(),
            card=card,
            deleted=stale_files(parcel, state),
            left_out=parcel.left_out,
        )
        if remote is None:
            return result
        sent = remote.commit(
            parcel.files,
            result.deleted,
            state,
            message=message or f"Upload {parcel.kind} with moeadapt",
            revision=revision,
            create_pr=create_pr,
            private=private,
        )
        return replace(result, commit=sent.oid, url=sent.commit_url, pull_request=sent.pr_url)


def _source(
    model_or_dir: nn.Module | str | Path, adapter: str, stack: ExitStack
) -> tuple[Path, Any]:
    """Return the folder to push; a model is saved into one that goes away."""
    if not isinstance(model_or_dir, str | Path):
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return saved_model(model_or_dir, adapter, scratch), model_or_dir
    folder = Path(model_or_dir)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder; give that of a saved adapter, or of a checkpoint that "
            "`moeadapt export` or `moeadapt upcycle` wrote"
        )
    return folder, None


def _parcel(folder: Path, base_model: str | None) -> Parcel:
    adapted, whole = exists(folder, SETTINGS), exists(folder, RECEIPT)
    if adapted == whole:
        what = "both an adapter and a checkpoint" if adapted else "neither an adapter"
        also = "" if adapted else f" ({SETTINGS}) nor a checkpoint with its receipt ({RECEIPT})"
        raise ConfigError(
            f"{folder} holds {what}{also}; `moeadapt push` publishes what `model.save_pretrained`, "
            "`moeadapt export` or `moeadapt upcycle` wrote"
        )
    return (adapter_parcel if adapted else checkpoint_parcel)(folder, base_model)


def _attach(
    parcel: Parcel,
    recipe: str | Path | None,
    report: str | Path | None,
    evaluation: str | Path | None,
    datasets: list[str],
) -> None:
    parcel.facts["datasets"] = datasets
    if parcel.kind == "adapter":
        add_recipe(parcel, recipe)
        add_report(parcel, report)
        if evaluation is not None:
            parcel.facts["evaluation"] = read_results(evaluation)
    elif recipe or report or evaluation:
        raise ConfigError("recipe, report and evaluation belong to an adapter; leave them out")


def _add_static(
    parcel: Parcel, model: Any, adapter: str, data: Any, tokenizer: Any, *, offline: bool
) -> None:
    from moeadapt.hub.static_lora import add_static_lora, load_adapter

    if parcel.kind != "adapter":
        raise ConfigError("with_static_lora merges an adapter; a checkpoint is served as it is")
    name = adapter
    if model is None:
        name = "default"
        model, found = load_adapter(parcel.folder, parcel.facts, parcel.place, offline=offline)
        tokenizer = tokenizer or found
    add_static_lora(parcel, model, name, data=data, tokenizer=tokenizer)
