"""What goes along with an adapter: its recipe, and its report with numbers and pictures."""

import json
from pathlib import Path
from typing import Any

from moeadapt.adapter_format.files import exists
from moeadapt.errors import ConfigError
from moeadapt.hub.parcel import Parcel
from moeadapt.hub.results import arms_table

RECIPE, PAGE, NUMBERS, PICTURES = "recipe.yaml", "report.html", "report.json", "report_files"

SHOWN = ("load", "lift", "worth")
"""Pictures of a report that a card may show, the best first."""


def add_recipe(parcel: Parcel, recipe: str | Path | None) -> None:
    """Add a recipe: the one named, or `recipe.yaml` of the folder.

    Raises:
        ConfigError: it is no recipe.
    """
    from moeadapt.training.recipe_file import read_recipe

    path = Path(recipe) if recipe is not None else parcel.folder / RECIPE
    if recipe is None and not exists(parcel.folder, RECIPE):
        return
    values, _ = read_recipe(str(path))
    parcel.add_text(RECIPE, path.parent, path.name)
    parcel.facts["recipe"] = values


def add_report(parcel: Parcel, report: str | Path | None) -> None:
    """Add a report: the one named, or `report.html` of the folder if moeadapt wrote it.

    Raises:
        ConfigError: it is no report, or its numbers are missing.
    """
    from moeadapt.report.output import is_report, json_path, pictures_folder

    page = Path(report) if report is not None else parcel.folder / PAGE
    if report is None and not (page.is_file() and is_report(page)):
        return
    if not page.is_file() or not is_report(page):
        raise ConfigError(f"{page} is no report of moeadapt; give the .html that it wrote")
    numbers = json_path(page)
    if not numbers.is_file():
        raise ConfigError(f"{page}: its numbers {numbers} are missing; write the report again")
    parcel.add_text(PAGE, page.parent, page.name)
    parcel.add_text(NUMBERS, numbers.parent, numbers.name)
    parcel.facts["report"] = _numbers(numbers)
    arms_table(parcel.facts["report"])
    folder = pictures_folder(page)
    for picture in sorted(folder.glob("*.png")) if folder.is_dir() else []:
        parcel.add_binary(f"{PICTURES}/{picture.name}", folder, picture.name)
    shown = [f"{PICTURES}/{name}.png" for name in SHOWN]
    parcel.facts["picture"] = next((name for name in shown if name in parcel.files), None)


def _numbers(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; write the report again") from None
