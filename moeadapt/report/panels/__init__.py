"""The panels of the report, in order. A new one is a file with a function, and a line here."""

from collections.abc import Callable

from moeadapt.report.data import ReportData
from moeadapt.report.panels.base import Panel
from moeadapt.report.panels.domains import domains_panel
from moeadapt.report.panels.experts import experts_panel
from moeadapt.report.panels.flow import flow_panel
from moeadapt.report.panels.layers import layers_panel
from moeadapt.report.panels.load import load_panel
from moeadapt.report.panels.texts import texts_panel
from moeadapt.report.panels.training import training_panel
from moeadapt.report.panels.verdict import verdict_panel
from moeadapt.report.panels.worth import worth_panel

PANELS: tuple[Callable[[ReportData], Panel], ...] = (
    verdict_panel,
    worth_panel,
    load_panel,
    texts_panel,
    training_panel,
    domains_panel,
    experts_panel,
    flow_panel,
    layers_panel,
)

PICTURE_NAMES = (
    "worth",
    "load",
    "training",
    "lift",
    "mutual_information",
    "similarity",
    "coactivation",
    "flow",
)
"""Files that a report may have in its folder; those it no longer has are removed."""

__all__ = ["PANELS", "PICTURE_NAMES", "Panel"]
