"""What `recipe.yaml` beside an adapter says: the settings of its run, ready to run again."""

from pathlib import Path

import pytest
import yaml

from moeadapt.errors import ExportError
from moeadapt.training.recipe import parse_recipe
from moeadapt.training.recipe_copy import RECIPE, write_recipe

FILE = """\
model_name_or_path: some/base
dataset_name: rows.jsonl
output_dir: {out}
use_cpu: true
moe: {{num_experts: 4, r: 2, target_modules: all-linear}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE.format(out=tmp_path / "out"))
    return path


def test_file_and_flags_together_make_the_same_run_again(tmp_path: Path, config: Path) -> None:
    flags = ["--moe.num_experts", "8", "--max_steps", "7", "--resume_from_checkpoint", "last"]
    recipe = parse_recipe("sft", str(config), flags)
    (tmp_path / "out").mkdir()
    path = write_recipe("sft", recipe.settings, tmp_path / "out", "9.9")
    assert path.read_text().startswith("# moeadapt 9.9: moeadapt train sft --config recipe.yaml\n")
    values = yaml.safe_load(path.read_text())
    assert values["moe"] == {"num_experts": 8, "r": 2, "target_modules": "all-linear"}
    assert values["output_dir"] == "out"
    assert "resume_from_checkpoint" not in values
    assert str(tmp_path) not in path.read_text()
    again = parse_recipe("sft", str(path))
    assert again.adapter.to_dict() == recipe.adapter.to_dict()
    assert again.trainer_args.max_steps == 7


def test_a_folder_that_takes_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / RECIPE).mkdir()
    with pytest.raises(ExportError, match=RECIPE):
        write_recipe("sft", {}, tmp_path, "9.9")
