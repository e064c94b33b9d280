"""Recipe, report and evaluation: they are sent, shown in the card, and refused if they are none."""

import json

import pytest

from moeadapt.errors import ConfigError
from moeadapt.report.output import pictures_folder
from tests.hub.kit import BASE, CARD, MANIFEST, connected, copied, files_of, json_of, pushed, shelf
from tests.hub.loopback import TOKEN

PAGE = '<!doctype html><html><head><meta name="generator" content="moeadapt 0.1.0"></head></html>\n'
ARMS = [
    {"name": "learned", "nll": 1.0, "nll_low": 0.9, "nll_high": 1.1},
    {"name": "adapter off", "nll": 2.0, "nll_low": 1.9, "nll_high": 2.1},
]


def add_report(folder, page="report.html", **numbers):
    out = folder / page
    out.write_text(PAGE)
    out.with_suffix(".json").write_text(json.dumps({"arms": ARMS, **numbers}))
    pictures_folder(out).mkdir()
    (pictures_folder(out) / "load.png").write_bytes(b"\x89PNG picture")
    (pictures_folder(out) / "load.svg").write_text("<svg/>")
    return out


SCORE = {
    "rows": 9,
    "nll": 1.25,
    "nll_interval": {"low": 1.0, "high": 1.5},
}
RESULTS = {
    "adapter": "/home/ann/adapter",
    "against": "base",
    "data": {"overall": SCORE, "by_domain": {"sums": SCORE}},
    "other": {"data": {"overall": {**SCORE, "nll": 3.5}, "by_domain": {}}},
    "tasks": {"tasks": {"hellaswag": {"rows": 5, "values": {"acc": 0.5}}}},
}


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "home", token=TOKEN) as hub:
        yield hub


def test_recipe_report_and_evaluation_are_sent_and_shown(hub, tmp_path):
    folder, other = copied(tmp_path), tmp_path / "other"
    other.mkdir()
    recipe = other / "math.yaml"
    recipe.write_text(f"model_name_or_path: {shelf() / 'base'}  # mine\ndataset_name: ann/sums\n")
    (other / "results.json").write_text(json.dumps(RESULTS))
    page = add_report(other, "page.html", title=str(shelf() / "base"))
    pushed(folder, recipe=recipe, report=page, evaluation=other / "results.json")
    files = files_of(hub)
    assert files["recipe.yaml"].decode() == (
        f"model_name_or_path: {BASE}  # mine\ndataset_name: ann/sums\n"
    )
    assert files["report.html"].decode() == PAGE
    assert json_of(files["report.json"])["title"] == BASE
    assert files["report_files/load.png"] == b"\x89PNG picture"
    assert not [name for name in files if "svg" in name or "results" in name]
    assert {"recipe.yaml", "report.html", "report_files/load.png"} <= set(
        json_of(files[MANIFEST])["files"]
    )
    text = files[CARD].decode()
    assert "Trained on ann/sums." in text
    assert "![Routing of the experts on held-out texts](report_files/load.png)" in text
    assert "| all | 9 | 1.2500 | 1.0000 to 1.5000 | 3.5000 |" in text
    assert "| hellaswag | acc | 5 | 0.5000 |" in text
    assert "| adapter off | 2.0000 | 1.9000 to 2.1000 |" in text
    assert "Nothing was measured" not in text


def test_those_in_the_folder_are_found(hub, tmp_path):
    folder = copied(tmp_path)
    (folder / "recipe.yaml").write_text("dataset_name: ann/sums\n")
    add_report(folder)
    result = pushed(folder)
    assert {"recipe.yaml", "report.html", "report.json", "report_files/load.png"} <= set(
        result.files
    )
    assert result.left_out == {}


KINDS, CONTENTS = ("recipe", "report", "evaluation"), (None, "", "[1, 2", "{}", "[]")
# An empty mapping is a recipe.
NONE = [(k, c) for k in KINDS for c in CONTENTS if (k, c) != ("recipe", "{}")]


@pytest.mark.parametrize(("what", "content"), NONE)
def test_a_file_that_is_none_is_refused_before_anything_is_sent(hub, tmp_path, what, content):
    path = tmp_path / {"recipe": "r.yaml", "report": "r.html", "evaluation": "r.json"}[what]
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError):
        pushed(shelf() / "adapter", **{what: path})
    assert hub.log == []


def test_data_named_by_a_path_is_refused(hub, tmp_path):
    with pytest.raises(ConfigError, match="must be the id of a data set on the hub"):
        pushed(shelf() / "adapter", datasets=[str(tmp_path)])
    folder = copied(tmp_path)
    (folder / "recipe.yaml").write_text("seed: 1\ndata_files: /home/ann/rows.jsonl\n")
    with pytest.raises(ConfigError, match="recipe.yaml:2: holds the path '/home/ann/rows.jsonl'"):
        pushed(folder)
    assert hub.log == []
