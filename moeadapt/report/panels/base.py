"""A panel of the report: a heading, a sentence on how to read it, pictures, and more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeadapt.report.picture import Picture


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One section of the page.

    Attributes:
        key: its anchor.
        title: its heading.
        lead: how to read it, a sentence or two.
        template: file in `templates` that draws it from `values`, after the pictures.
        values: what the template needs.
        pictures: in order.
        notes: sentences below: what is left out, what could not be measured.
    """

    key: str
    title: str
    lead: str = ""
    template: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
