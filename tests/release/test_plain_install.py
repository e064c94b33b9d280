"""What `pip install moeadapt` brings is enough to train, save and load; the rest says what lacks.

The wheel is unpacked, and every package that a plain install would not bring is hidden.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moeadapt.errors import ConfigError, MissingPackageError
from moeadapt.extras import EXTRA_OF, needs_extra
from tests.release.wheel import ROOT, build_wheel, hide_the_rest, plain_install, project, unpack

SCRIPT = Path(__file__).with_name("plain_install.py")
RECIPE = ROOT / "configs" / "sft" / "smollm2_mixlora.yaml"
MAIN = "from moeadapt.cli import main; main()"


CODE = f"""
import runpy, sys
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
import moeadapt
from moeadapt.errors import MissingPackageError
for name in moeadapt.__all__:
    try:
        getattr(moeadapt, name)
    except MissingPackageError as error:
        print("LACKS", name, error)
for line in ("import trl", "from moeadapt.training import MoESFTTrainer"):
    try:
        exec(line)
    except ImportError as error:
        print("SAID", type(error).__name__, error)
sys.argv = ["moeadapt", "plan", "sft", "--config", {str(RECIPE)!r}]
from moeadapt.cli import main
main()
"""
"""One process for everything that imports torch."""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Return a function that runs code where only a plain install can be imported."""
    folder = tmp_path_factory.mktemp("plain")
    site = unpack(build_wheel(folder), folder / "site")
    hidden = hide_the_rest()

    def run(code):
        return subprocess.run(
            [sys.executable, "-c", hidden + code],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"},
        )

    return run, site


@pytest.fixture(scope="module")
def done(python):
    return python[0](CODE)


def test_a_plain_install_trains_saves_and_loads(done, python):
    assert "loaded with equal logits" in done.stdout, done.stderr[-3000:]
    assert f"from {python[1]}" in done.stdout
    assert "optional []" in done.stdout


def test_every_public_name_but_distill_needs_no_extra(done):
    lacks = re.findall(r"^LACKS (\w+) (.*)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in lacks] == ["distill"]


def test_a_trainer_without_trl_is_an_import_error_that_says_what_to_install(done):
    said = re.findall(r"^SAID (\w+) (.*)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in said] == ["ModuleNotFoundError", "MissingPackageError"]
    assert said[1][1].endswith("'trl', which is not installed: pip install 'moeadapt[train]'")


def test_a_verb_that_needs_an_extra_names_it_without_a_traceback(done, python):
    demo = python[0]("import sys; sys.argv = ['moeadapt', 'demo']\n" + MAIN)
    for ended, extra in ((done, "train"), (demo, "demo")):
        assert ended.returncode == 2
        assert f"pip install 'moeadapt[{extra}]'" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_plain_install_has_none_of_the_trainers_packages():
    assert not {"trl", "datasets", "altair", "gguf", "bitsandbytes"} & plain_install()
    assert {"torch", "peft", "transformers", "jinja2"} <= plain_install()  # jinja2: of torch


def test_every_optional_package_is_known_by_its_extra():
    extras = project()["optional-dependencies"]
    names = {"vl_convert": "vl-convert-python"}
    for module, extra in EXTRA_OF.items():
        package = names.get(module, module.replace("_", "-"))
        assert any(re.match(rf"{package}\b", line) for line in extras[extra]), module
    users = {"train", "demo", "kernels", "report", "eval", "quant"}
    lines = [line for extra in users for line in extras[extra]]
    packages = {re.split(r"[>=\[; ]", line)[0] for line in lines} - {"moeadapt", "pip"}
    assert packages == {names.get(m, m.replace("_", "-")) for m in EXTRA_OF}


def test_a_missing_package_of_nobody_stays_what_it_is():
    with pytest.raises(ModuleNotFoundError, match="nobody") as caught, needs_extra():
        import nobody_has_this  # pyright: ignore[reportMissingImports] # noqa: F401
    assert not isinstance(caught.value, MissingPackageError)


def test_a_missing_package_is_a_config_error_and_an_import_error():
    assert issubclass(MissingPackageError, ConfigError)
    assert issubclass(MissingPackageError, ImportError)
