"""Panel 9: a table with a row per layer that can be sorted; per expert too where that is small."""

import math
from collections.abc import Sequence

from moeadapt.report.data import Layer, ReportData
from moeadapt.report.panels.base import Panel
from moeadapt.report.wording import Number, number

FEW_ROWS = 64
"""Rows that the table of experts may have."""

COLUMNS = {
    "max_over_mean": ("max / mean", 2),
    "cv": ("CV", 2),
    "effective_experts": ("effective experts", 2),
    "active": ("active per token", 2),
    "entropy": ("entropy (bits)", 2),
    "mutual_information": ("information (bits)", 3),
    "mutual_information_null": ("by chance (bits)", 3),
    "mutual_information_p": ("p", 3),
}

Cell = tuple[str, Number]


def layers_panel(data: ReportData) -> Panel:
    """Make the panel."""
    tables = [
        {
            "name": "Layers",
            "heads": ["layer", *(head for head, _ in COLUMNS.values())],
            "rows": [_layer(index, layer) for index, layer in enumerate(data.layers)],
        }
    ]
    if sum(len(layer.load) for layer in data.layers) <= FEW_ROWS:
        tables.append(
            {
                "name": "Experts of each layer",
                "heads": [
                    "layer",
                    "expert",
                    "load",
                    "load \N{MULTIPLICATION SIGN} E",
                    "importance",
                ],
                "rows": [
                    _expert(index, layer, expert)
                    for index, layer in enumerate(data.layers)
                    for expert in range(len(layer.load))
                ],
            }
        )
    return Panel(
        key="layers",
        title="Every layer",
        lead="A click on a heading sorts; a second one turns the order.",
        template="layers.html.j2",
        values={"tables": tables},
    )


def _layer(index: int, layer: Layer) -> Sequence[Cell]:
    return [
        (layer.name, index),
        *(
            (number(getattr(layer, key), digits), _sortable(getattr(layer, key)))
            for key, (_, digits) in COLUMNS.items()
        ),
    ]


def _expert(index: int, layer: Layer, expert: int) -> Sequence[Cell]:
    load, importance = layer.load[expert], layer.importance[expert]
    return [
        (layer.name, index),
        (str(expert), expert),
        (number(load, 3), _sortable(load)),
        (number(load * len(layer.load)), _sortable(load * len(layer.load))),
        (number(importance, 3), _sortable(importance)),
    ]


def _sortable(value: Number) -> Number:
    """Return a number that compares: what is none comes first."""
    return value if math.isfinite(value) else -1e308
