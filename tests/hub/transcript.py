"""Writes docs/transcripts/push.txt: `moeadapt push` and loading, against the loopback hub.

python -m tests.hub.transcript
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.hub.kit import BASE, add_base, copied, shelf
from tests.hub.loopback import TOKEN, Loopback

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "transcripts" / "push.txt"

LOAD = """\
import moeadapt
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("ann/sums")
print(type(model).__name__, model.peft_config["default"].router)
"""

WITHOUT = LOAD.replace("import moeadapt\n", "")


def transcript() -> str:
    """Return what a terminal shows, one command after the other."""
    with tempfile.TemporaryDirectory() as name, Loopback() as hub:
        home = Path(name)
        add_base(hub)
        copied(home, "adapter").rename(home / "sums")
        (home / "sums" / "recipe.yaml").write_text("dataset_name: ann/numbers\nseed: 1\n")
        shown: list[str] = []
        for command in (
            "moeadapt push sums ann/sums",
            f"moeadapt push sums ann/sums --base-model {BASE}",
            f"moeadapt push sums ann/sums --base-model {BASE} --license apache-2.0 --dry-run",
            f"moeadapt push sums ann/sums --base-model {BASE} --license apache-2.0",
        ):
            _run(shown, command, ["-c", _MAIN, *command.split()[1:]], home, hub)
        _run(shown, f"python - <<'EOF'\n{LOAD}EOF", ["-c", LOAD], home, hub)
        _run(shown, f"python - <<'EOF'\n{WITHOUT}EOF", ["-c", WITHOUT], home, hub, lines=1)
        text = "\n".join(shown).replace(hub.url, "http://127.0.0.1:PORT")
        return text.replace(str(shelf()), "/home/ann").replace(str(home), "/home/ann") + "\n"


_MAIN = "from moeadapt.cli import main; main()"


def _run(
    shown: list[str],
    command: str,
    arguments: list[str],
    home: Path,
    hub: Loopback,
    lines: int | None = None,
) -> None:
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(home / "cache"),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=home,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said = [line.rstrip() for line in done.stdout.splitlines() if "Loading weights" not in line]
    shown += [f"$ {command}", *said[-lines if lines else 0 :]]
    if done.returncode:
        shown.append(f"(exit code {done.returncode})")
    shown.append("")


if __name__ == "__main__":
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(transcript(), encoding="utf-8")
    print(f"wrote {OUT.relative_to(ROOT)}")
