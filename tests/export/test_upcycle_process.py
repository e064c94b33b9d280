"""What holds for the whole process: memory, kills, the command line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from moeadapt.export.receipt import Receipt
from moeadapt.export.upcycle import upcycle
from moeadapt.export.verify import load_strictly
from tests.export.bases import saved

# One arena: how many the allocator makes depends on chance.
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
CLI = [sys.executable, "-c", "from moeadapt.cli import main; main()"]

LIMITED = """
import resource, sys
from moeadapt.export.upcycle import upcycle
base, warm, out, room = sys.argv[1:]
upcycle(warm, out + "-warm", 2, 1, verify=False)
(used,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData:"))
limit = int(used) * 1024 + int(room)
# Memory that is written to; address space that the allocator only reserves does not count.
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
upcycle(base, out, 2, 1, verify=False)
"""

KILLED = """
import os, signal, sys
from moeadapt.export import writer
from moeadapt.export.upcycle import upcycle
write, seen = writer.CheckpointWriter.write_matrix, []
def dies(self, *args):
    seen.append(1)
    if len(seen) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, *args)
writer.CheckpointWriter.write_matrix = dies
if int(sys.argv[3]) == 0:
    writer.CheckpointWriter.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)
upcycle(sys.argv[1], sys.argv[2], 2, 1, verify=False)
"""


def run(*args, cwd=None):
    return subprocess.run(
        list(map(str, args)), capture_output=True, text=True, env=ENV, cwd=cwd, timeout=300
    )


def large(folder: Path) -> tuple[Path, int, int, int]:
    """Save a model in shards; return it, its bytes, the largest shard and one layer's bytes."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=2048, num_hidden_layers=10,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="24MB")
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    return folder, sum(sizes), max(sizes), layer


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_one_and_a_half_shards_and_a_layer(tmp_path):
    folder, total, shard, layer = large(tmp_path / "base")
    room = int(1.5 * shard) + layer
    assert total > 2 * room
    small = saved("llama", tmp_path / "in")
    done = run(sys.executable, "-c", LIMITED, folder, small, tmp_path / "moe", room)
    assert done.returncode == 0, done.stderr
    assert Receipt.load(tmp_path / "moe").bytes_on_disk > 1.5 * total
    starved = run(sys.executable, "-c", LIMITED, folder, small, tmp_path / "no", 1 << 20)
    assert starved.returncode != 0
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("at", [20, 0])
def test_a_killed_run_leaves_nothing_that_looks_complete(at, tmp_path):
    folder, out = saved("llama", tmp_path / "in"), tmp_path / "work" / "moe"
    killed = run(sys.executable, "-c", KILLED, folder, out, at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert all(path.name.startswith(".") for path in out.parent.iterdir())
    upcycle(folder, out, 2, 1)
    load_strictly(out)
    assert [path.name for path in out.parent.iterdir()] == ["moe"]


def test_the_folder_has_the_permissions_of_the_user(tmp_path):
    folder = saved("llama", tmp_path / "in")
    old = os.umask(0o027)
    try:
        upcycle(folder, tmp_path / "moe", 2, 1, verify=False)
    finally:
        os.umask(old)
    assert (tmp_path / "moe").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "moe").iterdir()} == {0o640}


def test_the_command_prints_the_receipt_that_it_wrote(tmp_path):
    folder, out = saved("qwen3", tmp_path / "in"), tmp_path / "moe"
    done = run(*CLI, "upcycle", folder, "--out", out, "--num-experts", 2, "--top-k", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert Receipt.from_dict(json.loads(done.stdout)) == Receipt.load(out)


def test_every_setting_has_its_option(tmp_path):
    texts, settings = tmp_path / "ids.json", []
    texts.write_text("[[3, 4, 5], [6, 7]]")
    folder = saved("qwen3", tmp_path / "in")
    for out, extra in (
        ("a", ["--gate-std", 0.5, "--tolerance", 0.5, "--engines", "transformers"]),
        ("b", ["--no-norm-topk", "--no-verify"]),
        ("c", ["--gate-init", "kmeans", "--gate-texts", texts, "--no-verify"]),
    ):
        done = run(*CLI, "upcycle", folder, "--out", tmp_path / out, "--num-experts", 2, *extra)
        assert done.returncode == 0, done.stderr
        settings.append(Receipt.load(tmp_path / out))
    assert settings[0].settings["gate_std"] == settings[0].tolerance == 0.5
    refused = run(
        *CLI, "upcycle", folder, "--out", tmp_path / "d", "--num-experts", 2, "--engines", "vlm"
    )
    assert "did you mean 'vllm'" in refused.stderr
    assert [receipt.settings["norm_topk"] for receipt in settings] == [True, False, True]
    assert settings[2].settings["gate_init"] == "kmeans"


MISTAKES = """
import contextlib, io, json, sys
from moeadapt.cli import app
for extra in json.loads(sys.argv[3]):
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        try:
            app(["upcycle", sys.argv[1], "--out", sys.argv[2], *extra])
        except SystemExit as done:
            print(json.dumps([done.code, text.getvalue()]))
"""


def test_the_command_answers_mistakes_with_a_message_and_2(tmp_path):
    folder, out = saved("qwen3", tmp_path / "in"), tmp_path / "moe"
    null = tmp_path / "null.json"
    null.write_text("null")
    mistakes = {
        "at least 2": ["--num-experts", "1"],
        "did you mean 'qwen3_moe'": ["--num-experts", "2", "--target", "qwen3moe"],
        "dtype 'int8'": ["--num-experts", "2", "--dtype", "int8"],
        "none.json": ["--num-experts", "2", "--gate-texts", "none.json"],
        "holds no list": ["--num-experts", "2", "--gate-texts", str(null)],
        "gate_std=-1.0": ["--num-experts", "2", "--gate-std", "-1"],
        "tolerance=-1.0": ["--num-experts", "2", "--tolerance", "-1"],
    }
    given = json.dumps(list(mistakes.values()))
    done = run(sys.executable, "-c", MISTAKES, folder, out, given)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for code, _ in answers] == [2] * len(mistakes), done.stderr
    for message, (_, text) in zip(mistakes, answers, strict=True):
        assert message in text
        assert "Traceback" not in text
    assert not out.exists()
