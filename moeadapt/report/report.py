"""`moeadapt.report`: measure a mixture on held-out texts and write what it does."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.report.collect import check_model, collect
from moeadapt.report.data import ReportData
from moeadapt.report.output import check_out as check_free
from moeadapt.report.texts import check_texts


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `report` measured and wrote.

    Attributes:
        data: every number.
        files: the page, the numbers as JSON, the pictures.
    """

    data: ReportData
    files: tuple[Path, ...]


def report(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    out: str | Path = "report.html",
    *,
    adapter: str | None = None,
    max_length: int = 256,
    batch_size: int = 8,
    permutations: int | None = None,
    bootstrap: int = 1000,
    shown: int = 2,
    seed: int = 0,
    training_log: str | Path | None = None,
    title: str | None = None,
) -> Report:
    """Measure a mixture on held-out texts and write a report that opens without a network.

    Says how balanced the routers are, which domain uses which expert, how alike the experts are,
    and whether learned routing beats uniform, random and shuffled routing and the best expert
    alone. A report of the same name is replaced.

    Args:
        model: the PeftModel of a causal language model.
        tokenizer: its tokenizer.
        texts: domain -> texts that were not trained on; a dozen or more each.
        out: the page to write, `.html`; `<name>.json` and pictures go beside it.
        adapter: which mixture; None: the active one.
        max_length: tokens of a text, >= 2, the rest is cut.
        batch_size: texts of a forward.
        permutations: of the texts' domains, >= 1; None: see `collect`.
        bootstrap: resamples of the texts, >= 1.
        shown: coloured texts per domain, >= 0.
        seed: of everything that is random.
        training_log: a trainer_state.json, or a folder that holds one; None: no training is shown.
        title: name of the report; None: the name of the adapter.

    Raises:
        ConfigError: see `collect`; `out` is no `.html` file, is a folder, or lies in a file; what
            draws the report is not installed.
        UnsupportedError: see `collect`.

    Example:
        >>> found = moeadapt.report(model, tokenizer, {"code": code, "prose": prose})
        >>> [(tile.name, tile.answer) for tile in found.data.verdicts]
        [('balanced', 'yes'), ('specialised', 'yes'), ('used', 'yes'), ('worth it', 'unclear')]
    """
    out = check_out(out)
    check_texts(texts)
    check_model(model, adapter)
    render = load_render()
    data = collect(
        model,
        tokenizer,
        texts,
        adapter=adapter,
        max_length=max_length,
        batch_size=batch_size,
        permutations=permutations,
        bootstrap=bootstrap,
        shown=shown,
        seed=seed,
        training_log=training_log,
        title=title,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    return Report(data=data, files=tuple(render(data, out)))


def load_render() -> Callable[[ReportData, Path], Iterable[Path]]:
    """Return what draws a report.

    Raises:
        ConfigError: a package that it needs is not installed.
    """
    try:
        from moeadapt.report.render import render
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("moeadapt"):
            raise
        raise ConfigError(
            f"a report needs {error.name}; install it with pip install 'moeadapt[report]'"
        ) from error
    return render


def check_out(out: str | Path) -> Path:
    """Return the absolute path of the page to write.

    Raises:
        ConfigError: it is no `.html` file, is a folder, lies in a file, cannot be written, or
            something else than a report is there, see `output.check_out`.
    """
    path = Path(os.path.abspath(out))
    if path.suffix != ".html":
        raise ConfigError(f"{out} must end in .html; the numbers go beside it as .json")
    above = next(parent for parent in path.parents if parent.exists())
    if path.is_dir():
        raise ConfigError(f"{out} is a folder; name a file in it, such as {path / 'report.html'}")
    if not above.is_dir():
        raise ConfigError(f"{out} lies in {above}, which is a file; name a place in a folder")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"{above} cannot be written; name another folder")
    check_free(path)
    return path
