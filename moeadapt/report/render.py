"""A report as files: a page that works offline, its numbers as JSON, its pictures beside it."""

import importlib.util
import json
from pathlib import Path

from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.report.data import ReportData
from moeadapt.report.output import check_out, write_files
from moeadapt.report.wording import rounded

NEEDS = ("altair", "jinja2", "vl_convert")
ENDINGS = (".svg", ".png")


def check_render(out: Path) -> None:
    """Check what `render` needs; call it before minutes go into measuring.

    Args:
        out: the page.

    Raises:
        ConfigError: see `output.check_out`.
        UnsupportedError: a package of the extra `report` is not installed.
    """
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"a report needs {', '.join(missing)}, not installed here; install it with "
            "`pip install 'moeadapt[report]'`"
        )
    check_out(Path(out))


def render(data: ReportData, out: Path) -> list[Path]:
    """Write a report.

    Args:
        data: what was measured.
        out: the page, `<stem>.html`; `<stem>.json` and the folder `<stem>_files` go beside it. An
            older report of that name is replaced.

    Returns:
        The files, the page first, then the numbers, then the pictures.

    Raises:
        ConfigError: see `output.check_out`, or `data` has no layer; nothing is written.
        ExportError: the disk does not take it.
        UnsupportedError: see `check_render`.

    Example:
        >>> render(data, Path("report.html"))[:2]  # doctest: +SKIP
        [PosixPath('report.html'), PosixPath('report.json')]
    """
    out = Path(out)
    check_render(out)
    if not data.layers:
        raise ConfigError("the report has no layer: the model routed nothing while it was measured")
    # Here, since these import the packages of the extra.
    from moeadapt.report.page import page
    from moeadapt.report.panels import PANELS, PICTURE_NAMES

    panels = [make(data) for make in PANELS]
    pictures: dict[str, bytes] = {}
    for panel in panels:
        for picture in panel.pictures:
            pictures[f"{picture.name}.svg"] = picture.standalone.encode()
            pictures[f"{picture.name}.png"] = picture.png()
    known = [f"{name}{ending}" for name in PICTURE_NAMES for ending in ENDINGS]
    return write_files(out, page(data, panels), numbers(data), pictures, known)


def numbers(data: ReportData) -> str:
    """Return the JSON file: every number with six digits, null for what is none."""
    return json.dumps(rounded(data.to_json()), allow_nan=False, separators=(",", ":")) + "\n"
