"""The recipes that come with moeadapt: listed, copied, and in the wheel."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeadapt import recipes
from moeadapt.errors import AssetError, ConfigError
from moeadapt.recipes import copy_recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
NAME = "sft/smollm2_mixlora"


def test_every_file_of_configs_is_listed_and_says_what_it_is():
    files = {path.relative_to(ROOT / "configs") for path in ROOT.glob("configs/*/*.yaml")}
    found = shipped_recipes()
    assert {Path(f"{name}.yaml") for name in found} == files
    assert all(recipe.line for recipe in found.values())


@pytest.mark.parametrize("name", [NAME, f"{NAME}.yaml", f"configs/{NAME}.yaml"])
def test_a_recipe_is_copied_byte_by_byte(name, tmp_path):
    written = copy_recipe(name, str(tmp_path))
    assert written == tmp_path / "smollm2_mixlora.yaml"
    assert written.read_bytes() == (ROOT / f"configs/{NAME}.yaml").read_bytes()


def test_a_file_is_replaced_only_with_force(tmp_path):
    own = tmp_path / "my.yaml"
    own.write_text("mine")
    with pytest.raises(ConfigError, match="exists; name another file, or replace it with --force"):
        copy_recipe(NAME, str(own))
    assert own.read_text() == "mine"
    copy_recipe(NAME, str(own), force=True)
    assert own.read_bytes() == (ROOT / f"configs/{NAME}.yaml").read_bytes()
    assert list(tmp_path.iterdir()) == [own]


def test_a_link_to_nowhere_is_not_written_through(tmp_path):
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "elsewhere.yaml")
    with pytest.raises(ConfigError, match="exists"):
        copy_recipe(NAME, str(link))
    assert not (tmp_path / "elsewhere.yaml").exists()


def test_a_place_in_no_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        copy_recipe(NAME, str(tmp_path / "none" / "my.yaml"))


def test_a_misspelt_name_gets_the_nearest_one(tmp_path):
    with pytest.raises(ConfigError, match=f"did you mean '{NAME}'"):
        copy_recipe("sft/smollm2_mixlorra", str(tmp_path))


def test_a_folder_named_configs_of_somebody_else_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "configs" / "sft").mkdir(parents=True)
    (tmp_path / "configs" / "sft" / "foreign.yaml").write_text("x: 1\n")
    (tmp_path / "moeadapt").mkdir()
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "moeadapt" / "recipes.py"))
    with pytest.raises(AssetError, match="install moeadapt again"):
        shipped_recipes()


def test_a_built_package_holds_the_recipes(tmp_path):
    for name in ("moeadapt", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "lib"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code = "from moeadapt import recipes; print(recipes._folder(), len(recipes.shipped_recipes()))"
    lib = tmp_path / "lib"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=lib,
        env={"PYTHONPATH": str(lib)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == [str(lib / "moeadapt" / "configs"), str(len(shipped_recipes()))]
