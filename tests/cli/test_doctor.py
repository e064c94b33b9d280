"""`moeadapt doctor` prints a table or JSON, and its exit code says whether there are errors."""

import json
import subprocess
import sys
from pathlib import Path

from tests.faults.cli import call
from tests.faults.loading_kit import MANIFEST, WEIGHTS, fresh


def test_a_whole_adapter_has_no_errors(tmp_path: Path) -> None:
    answer = call("doctor", str(fresh(tmp_path)))
    assert answer.code == 0, answer.err
    assert "0 errors" in answer.out
    assert "the files are those that the manifest names" in answer.out


def test_warnings_alone_exit_with_0(tmp_path: Path) -> None:
    folder = fresh(tmp_path)
    (folder / MANIFEST).unlink()
    answer = call("doctor", str(folder), "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["warnings"] >= 1


def test_errors_exit_with_2_and_each_says_what_and_why(tmp_path: Path) -> None:
    folder = fresh(tmp_path)
    (folder / WEIGHTS).write_bytes(b"")
    answer = call("doctor", str(folder), "--json")
    assert answer.code == 2
    found = json.loads(answer.out)
    wrong = [f for f in found["findings"] if f["level"] == "error"]
    assert found["errors"] == len(wrong) > 0
    assert all(f["what"] and f["why"] for f in wrong)
    assert call("doctor", str(folder)).code == 2


def test_the_environment_alone_can_be_checked() -> None:
    answer = call("doctor", "--json")
    assert answer.code == 0
    checks = {f["check"] for f in json.loads(answer.out)["findings"]}
    assert checks == {"python", "packages", "extras", "gpu", "method"}


def test_what_is_no_folder_exits_with_2(tmp_path: Path) -> None:
    answer = call("doctor", str(tmp_path / "nothing"))
    assert answer.code == 2
    assert "is no folder" in answer.err


def test_help_imports_no_torch() -> None:
    probe = (
        "import sys\nfrom moeadapt.cli import main\nsys.argv = ['moeadapt', 'doctor', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("HEAVY []")
