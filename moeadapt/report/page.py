"""The HTML page: one file that loads nothing, under a policy that lets it load nothing.

Style and script are allowed by their hashes, so neither a text of the data nor anything it could
smuggle in runs, even if escaping failed.
"""

import base64
import hashlib
from collections.abc import Sequence

from moeadapt.report.data import ReportData
from moeadapt.report.palette import COLORS, MOST_DOMAINS
from moeadapt.report.panels import Panel
from moeadapt.report.templating import environment, source
from moeadapt.report.wording import number, showable
from moeadapt.version import __version__

GENERATOR = "moeadapt"
"""Start of the generator that marks a file as a report."""


def page(data: ReportData, panels: Sequence[Panel]) -> str:
    """Write the page.

    Args:
        data: whose title, settings and versions it shows.
        panels: the sections, in order.
    """
    style, script = source("style.css"), source("script.js")
    facts = {
        **data.settings,
        "tokens": number(data.tokens, 0),
        "texts": _texts(data),
        "texts cut": str(data.cut) if data.cut else "",
    }
    html = (
        environment()
        .get_template("page.html.j2")
        .render(
            title=data.title,
            generator=f"{GENERATOR} {__version__}",
            policy=_policy(style, script),
            style=style,
            script=script,
            facts={name: value for name, value in facts.items() if value},
            panels=panels,
            versions=data.versions,
            seconds=number(data.seconds, 0),
            num_colors=len(COLORS),
        )
    )
    return showable(html)


def _texts(data: ReportData) -> str:
    """Say how many texts each domain has."""
    each = list(zip(data.domains, data.texts_per_domain, strict=True))
    said = ", ".join(f"{name} {count}" for name, count in each[:MOST_DOMAINS])
    rest = each[MOST_DOMAINS:]
    return said + (f", and {sum(n for _, n in rest)} of {len(rest)} more" if rest else "")


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; style-src {_allowed(style)}; script-src {_allowed(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _allowed(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
