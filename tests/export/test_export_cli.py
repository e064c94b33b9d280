"""`moeadapt export` writes what loads without moeadapt."""

import json
import subprocess
import sys

import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from moeadapt.export.receipt import RECEIPT
from tests.cli.test_cli_start import run_cli
from tests.export.bases import base, token_ids
from tests.tiny import adapt, logits, moe_config


def test_the_verb_writes_what_loads_without_moeadapt(tmp_path):
    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    base("llama").save_pretrained(folder)
    tokenizer(folder)
    model = adapt(AutoModelForCausalLM.from_pretrained(folder), moe_config("ffn"))
    model.save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder)
    probe = tmp_path / "probe.txt"
    probe.write_text("a b c\n\nd e\n")
    out = tmp_path / "moe"
    done = run_cli("export", adapter, "--out", out, "--probe", probe, "--json")
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)
    assert receipt["target"] == "mixtral"
    assert receipt["measured"]["max_logit_difference"] <= 1e-4
    assert (out / "tokenizer.json").is_file()
    assert (out / RECEIPT).is_file()
    code = (
        "import sys, torch, transformers; "
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}); "
        "torch.save(m(torch.load(sys.argv[1])).logits, sys.argv[2]); "
        "assert 'moeadapt' not in sys.modules"
    )
    torch.save(token_ids(), tmp_path / "ids.pt")
    subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path / "ids.pt"), str(tmp_path / "out.pt")],
        check=True,
        capture_output=True,
    )
    assert_close(
        torch.load(tmp_path / "out.pt"),
        logits(model.eval(), {"input_ids": token_ids()}),
        rtol=0.0,
        atol=1e-4,
    )
    again = run_cli("export", adapter, "--out", out)
    assert again.returncode == 2
    assert "name a new one" in again.stderr


def tokenizer(folder):
    """Save a tokenizer whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({c: i for i, c in enumerate("_^$abcde")}, unk_token="_"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="_", bos_token="^", eos_token="$", pad_token="_"
    )
    fast.save_pretrained(folder)
