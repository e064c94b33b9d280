"""The command line starts fast and answers mistakes in one line."""

import json
import os
import subprocess
import sys
import time

from moeadapt.version import __version__
from tests.cli.calls import call

CLI = [sys.executable, "-c", "from moeadapt.cli import main; main()"]


def run_cli(*args, timeout=120):
    # Without COLUMNS, which the library readline adds to what children inherit, and Python not to.
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run([*CLI, *args], capture_output=True, text=True, timeout=timeout, env=env)


def test_help_answers_in_under_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run_cli("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert "train" in done.stdout
    assert min(seconds) < 1.0


def test_help_imports_neither_torch_nor_peft():
    probe = (
        "import sys, moeadapt\n"
        "from moeadapt.cli import main\n"
        "sys.argv = ['moeadapt', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'peft', 'transformers', 'trl', 'datasets'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("HEAVY []")


def test_version_is_printed():
    assert run_cli("--version").stdout.strip() == __version__


def test_an_unknown_verb_exits_with_2():
    assert run_cli("trian").returncode == 2


def test_an_unknown_recipe_key_exits_with_2_and_names_line_and_nearest(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: x\nlearning_rat: 1.0e-4\n")
    done = call("train", "sft", "--config", str(recipe))
    assert done.exit_code == 2
    assert f"{recipe}:2: unknown setting 'learning_rat'; did you mean 'learning_rate'?" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr


def test_plan_prints_json_for_a_local_model(tmp_path):
    from tests.tiny import saved_base

    base = saved_base("llama", tmp_path)
    flags = ["--model_name_or_path", str(base), "--output_dir", str(tmp_path), "--use_cpu"]
    moe = ["--moe.target_modules", "all-linear", "--moe.r", "2", "--moe.num_experts", "4"]
    done = call("plan", "sft", "--json", *flags, *moe)
    assert done.exit_code == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["targets"] == 14
    assert numbers["routers"] == 14
    assert numbers["active"] < numbers["trainable"]
