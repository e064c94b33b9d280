"""Every example runs on a tiny model, and what it prints is true; one runs as a user would run it.

The others run in this process: importing torch, peft and trl takes longer than any of them.
"""

import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.hub.kit import connected
from tests.hub.loopback import TOKEN
from tests.tiny import tiny
from tests.toy import toy_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    # bitsandbytes packs its 4-bit weights for CPU in blocks of 64.
    tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Run example 01 as a user does, in a process of its own; later examples use what it saved."""
    out = tmp_path_factory.mktemp("adapter")
    script = EXAMPLES / "01_first_adapter.py"
    done = subprocess.run(
        [sys.executable, str(script), "--model", str(base), "--steps", "2", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=EXAMPLES.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


@pytest.fixture
def run(capsys, monkeypatch):
    """Return a function that runs an example in this process and returns what it printed."""

    def run_example(name, *switches, **options):
        flags = [part for flag, value in options.items() for part in (f"--{flag}", str(value))]
        monkeypatch.setattr(sys, "argv", [name, *flags, *switches])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a user sees those of other packages, once
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def numbers(text, after):
    """Return the numbers of the line that starts with `after`."""
    (line,) = [line for line in text.splitlines() if line.startswith(after)]
    return [float(found) for found in re.findall(r"\d+\.\d+(?:e-\d+)?", line[len(after) :])]


def test_a_first_adapter_is_trained_saved_and_generates(adapter):
    out, printed = adapter
    assert f"saved {out}" in printed
    assert printed.count("'moe/active_experts': '2'") == 2
    assert "with experts:" in printed
    assert "base model:" in printed
    assert (out / "adapter_model.safetensors").is_file()


def test_routing_can_be_looked_at(adapter, run):
    printed = run("02_look_at_routing.py", adapter=adapter[0])
    assert printed.count("experts per token 2.00") == 2
    assert re.search(r"^'<unk>' +\d x 0\.\d\d, \d x 0\.\d\d$", printed, re.MULTILINE)
    assert numbers(printed, "routed as learned") != numbers(printed, "uniform")


@pytest.mark.parametrize("name", ["02_look_at_routing.py", "08_export_and_serve.py", "09_push.py"])
def test_an_example_says_which_one_to_run_before_it(name, run, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(name, adapter=tmp_path / "none")
    assert "run examples/01_first_adapter.py first" in capsys.readouterr().err


def test_a_router_of_your_own_trains_and_works_again_when_loaded(base, run, tmp_path):
    printed = run("03_your_own_router.py", model=base, steps=2, out=tmp_path / "out")
    active = [float(found) for found in re.findall(r"experts per token (\S+)", printed)]
    assert len(active) == 2
    assert all(1 <= mean < 4 for mean in active)
    assert numbers(printed, "loaded, with the rule:") == [0.0]
    assert numbers(printed, "loaded, without it:") > [1e-3]


def test_presets_are_compared_with_plain_lora_from_the_same_start(base, run):
    printed = run("04_presets_compared.py", model=base, steps=2)
    rows = [numbers(printed, name) for name in ("plain LoRA, r=32", "mixlora  ", "molora  ")]
    assert len({before for *_, before, _ in rows}) == 1
    assert all(after < before for *_, before, after in rows)


def test_dpo_trains_from_no_preference(base, run, tmp_path):
    printed = run("05_dpo.py", model=base, steps=2, out=tmp_path / "out")
    margins = numbers(printed, "rewards/margins ")
    assert len(margins) == 2
    assert margins[0] == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_4bit_base_is_smaller_and_its_adapter_fits_the_full_one(base, run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, on import
        pytest.importorskip("bitsandbytes")
    printed = run("06_4bit_base.py", model=base, steps=2, out=tmp_path / "out")
    small, full = numbers(printed, "base: ")
    assert small < full / 2
    assert "router   torch.float32" in printed
    assert "the same next token at" in printed


def test_an_upcycled_model_is_stock_and_trains(base, run, tmp_path):
    out = tmp_path / "moe"
    printed = run("07_upcycle_and_fine_tune.py", model=base, steps=2, out=out)
    assert "upcycle of llama to mixtral" in printed
    assert "mlp.experts.gate_up_proj" in printed
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "MixtralForCausalLM"
    trained = load_file(f"{out}-lora/adapter_model.safetensors")
    for part in (".q_proj.", ".experts.", ".gate."):
        assert any(part in name and "lora_B" in name and t.any() for name, t in trained.items())


def test_an_exported_mixture_gives_the_adapters_answer(adapter, run, tmp_path):
    printed = run("08_export_and_serve.py", adapter=adapter[0], out=tmp_path / "stock")
    answers = dict(re.findall(r"^(adapter|MixtralForCausalLM) +'(.*)'$", printed, re.MULTILINE))
    assert answers["adapter"] == answers["MixtralForCausalLM"] != ""
    assert f"vllm serve {tmp_path / 'stock'}" in printed


def test_a_push_is_shown_before_it_is_sent(adapter, run, tmp_path):
    with connected(tmp_path / "home", token=TOKEN) as hub:
        shown = run("09_push.py", adapter=adapter[0], repo="ann/first", base="ann/tiny-llama")
        assert "nothing was sent" in shown
        assert not hub.repositories
        sent = run(
            "09_push.py", "--send", adapter=adapter[0], repo="ann/first", base="ann/tiny-llama"
        )
        assert hub.repositories["ann/first"].branches["main"] in sent
        files = hub.repositories["ann/first"].at("main").files
    card = files["README.md"].decode()
    assert card in sent
    assert "base_model: ann/tiny-llama" in card
    assert {"adapter_model.safetensors", "static-lora/adapter_model.safetensors"} <= set(files)


def test_a_mixture_of_loras_is_each_of_them_and_loads_as_it_was(base, run, tmp_path):
    printed = run("10_compose_from_loras.py", model=base, steps=2, out=tmp_path / "out")
    for expert, task in enumerate(("pronounce", "math_word")):
        alone = numbers(printed, f"mixture, only expert {expert}")
        assert alone == numbers(printed, f"LoRA for {task}")
        assert alone != numbers(printed, "base model")
    routed = numbers(printed, "mixture, trained router")
    assert routed != numbers(printed, "mixture, untrained router")
    assert numbers(printed, "the same, loaded") == routed


def test_a_loop_of_your_own_trains(base, run):
    printed = run("11_your_own_loop.py", model=base)
    assert printed.count("step ") == 4


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_what_it_shows_and_how_to_run_it(name):
    source = (EXAMPLES / name).read_text()
    assert len(source.splitlines()) < 80
    first = source.splitlines()[0]
    assert first.startswith('"""')
    assert first.endswith(".")
    assert f"\npython examples/{name} " in source


def test_every_example_is_run_here_and_listed():
    source = Path(__file__).read_text()
    listed = re.findall(
        r"^\| \[(\S+)\]\(\1\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE
    )
    assert listed == NAMES
    assert all(name in source for name in NAMES)
