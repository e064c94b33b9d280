"""A mixture of copies is its base: in every pair of classes, after save and load."""

import json
import re

import pytest
import torch
from torch.testing import assert_close

from moeadapt.errors import ConfigError, ExportError, UnsupportedError
from moeadapt.export import upcycle_job
from moeadapt.export.dense import Glu
from moeadapt.export.receipt import RECEIPT, Receipt
from moeadapt.export.upcycle import upcycle
from moeadapt.export.verify import load_strictly
from tests.export.bases import BASES, base, saved, token_ids

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def logits(model, implementation=None):
    if implementation is not None:
        model.set_experts_implementation(implementation)
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


@pytest.mark.parametrize("name", BASES)
def test_copies_are_the_base_eager_and_grouped_after_save_and_load(name, bases, tmp_path):
    out = tmp_path / "moe"
    receipt = upcycle(saved(name, bases), out, num_experts=3, top_k=2, gate_std=0.5)
    assert receipt.target == BASES[name][2]
    expected, model = logits(base(name)), load_strictly(out)
    assert expected.abs().max() > 0.5
    for implementation in ("eager", "grouped_mm"):
        assert_close(logits(model, implementation), expected, **TOLERANCE)
    assert Receipt.load(out) == receipt
    assert receipt.measured is not None
    assert receipt.measured.max_logit_difference <= 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen2", "granite", "lfm2"])
def test_granular_copies_are_the_base(name, bases, tmp_path):
    out = tmp_path / "moe"
    receipt = upcycle(saved(name, bases), out, num_experts=3, top_k=2, granularity=4, gate_std=0.5)
    assert (receipt.num_experts, receipt.top_k) == (12, 8)
    assert_close(logits(load_strictly(out)), logits(base(name)), **TOLERANCE)


@pytest.mark.parametrize("gate_init", ["hidden", "kmeans"])
def test_gates_made_from_data_leave_the_copies_the_base(gate_init, bases, tmp_path):
    ids = [list(token_ids(seed=s)) for s in range(3)]
    texts = ids if gate_init == "hidden" else ids[0]
    out = tmp_path / "moe"
    upcycle(saved("qwen3", bases), out, 3, 2, gate_init=gate_init, gate_texts=texts)
    model = load_strictly(out)
    rows = model.model.layers[0].mlp.gate.weight
    assert_close(rows.norm(dim=-1), torch.ones(3))
    assert_close(logits(model), logits(base("qwen3")), **TOLERANCE)


def test_hidden_gates_point_at_what_the_ffn_reads(bases, tmp_path):
    prompts = [list(token_ids(seed=s)) for s in range(2)]
    upcycle(saved("llama", bases), tmp_path / "moe", 2, 1, gate_init="hidden", gate_texts=prompts)
    model, seen = base("llama"), []
    model.model.layers[1].post_attention_layernorm.register_forward_hook(
        lambda module, args, out: seen.append(out.flatten(0, 1))
    )
    expected = []
    for texts in prompts:
        seen.clear()
        with torch.no_grad():
            for text in texts:
                model(input_ids=text[None])
        expected.append(torch.nn.functional.normalize(torch.cat(seen).mean(0), dim=0))
    gate = load_strictly(tmp_path / "moe").model.layers[1].mlp.gate.weight
    assert_close(gate, torch.stack(expected))


def test_a_model_in_memory_gives_the_same_files_as_its_folder(bases, tmp_path):
    upcycle(saved("phi3", bases), tmp_path / "a", 2, 1)
    upcycle(base("phi3"), tmp_path / "b", 2, 1)
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shards_are_small_and_the_model_is_the_same(bases, tmp_path):
    folder = saved("qwen3", bases)
    receipt = upcycle(folder, tmp_path / "moe", 3, 2, max_shard_bytes=100_000)
    files = sorted((tmp_path / "moe").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size <= 110_000 for file in files)
    assert sum(file.stat().st_size for file in files) == receipt.bytes_on_disk
    assert_close(logits(load_strictly(tmp_path / "moe")), logits(base("qwen3")), **TOLERANCE)


def test_bfloat16_is_written_when_asked_for_and_the_receipt_says_so(bases, tmp_path):
    receipt = upcycle(
        saved("llama", bases), tmp_path / "moe", 2, 1, dtype=torch.bfloat16, tolerance=10.0
    )
    assert set(receipt.dtype) == {"BF16"}
    assert json.loads((tmp_path / "moe/config.json").read_text())["dtype"] == "bfloat16"
    assert receipt.measured.max_logit_difference > 1e-3
    assert receipt.measured.kl > 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_result_that_is_not_the_base_fails_and_leaves_nothing(
    dtype, bases, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        upcycle_job, "filled", lambda ffn, width: Glu(ffn.gate, ffn.up, 2 * ffn.down)
    )
    with pytest.raises(ExportError, match="the copies are not the base"):
        upcycle(saved("llama", bases), tmp_path / "moe", 2, 1, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"noise": 0.1}, {"drop": 0.5}])
def test_changed_experts_differ_from_the_base_and_from_each_other(change, bases, tmp_path):
    receipt = upcycle(saved("llama", bases), tmp_path / "moe", 3, 2, **change)
    assert receipt.tolerance is None
    assert receipt.measured.max_logit_difference > 1e-2
    experts = load_strictly(tmp_path / "moe").model.layers[0].mlp.experts.down_proj
    assert not torch.equal(experts[0], experts[1])


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(bases, tmp_path):
    data = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(saved("llama", bases), tmp_path / out, 2, 1, noise=0.1, seed=seed, verify=False)
        data.append((tmp_path / out / "model.safetensors").read_bytes())
    assert data[0] == data[1] != data[2]


def test_an_unverified_result_says_so(bases, tmp_path):
    receipt = upcycle(saved("llama", bases), tmp_path / "moe", 2, 1, verify=False)
    assert receipt.measured is None
    assert re.search(r"checked +no: load it once", receipt.text())


def test_tokenizer_and_generation_settings_go_along_and_nothing_that_runs(bases, tmp_path):
    folder = tmp_path / "base"
    base("llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    upcycle(folder, tmp_path / "moe", 2, 1)
    written = {path.name for path in (tmp_path / "moe").iterdir()}
    assert written == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", RECEIPT,
    }  # fmt: skip


REFUSED = {
    "one expert": ({"num_experts": 1}, ConfigError, "at least 2"),
    "no number": ({"num_experts": None}, ConfigError, "at least 2"),
    "more per token than there are": ({"top_k": 3}, ConfigError, r"in \[1, num_experts=2\]"),
    "parts that do not fit": ({"granularity": 3}, ConfigError, "does not divide"),
    "negative noise": ({"noise": -1.0}, ConfigError, "noise=-1.0"),
    "a drop above one": ({"drop": 1.5}, ConfigError, "drop=1.5"),
    "an unknown gate": ({"gate_init": "randon"}, ConfigError, "did you mean 'random'"),
    "gates without texts": ({"gate_init": "kmeans"}, ConfigError, "needs gate_texts"),
    "texts without use": ({"gate_texts": ["a"]}, ConfigError, "takes no gate_texts"),
    "no texts without use": ({"gate_texts": []}, ConfigError, "have no effect there"),
    "texts without tokenizer": (
        {"gate_init": "kmeans", "gate_texts": ["a"]}, ConfigError, "no tokenizer",
    ),
    "prompts for fewer experts": (
        {"gate_init": "hidden", "gate_texts": [["a"]]}, ConfigError, "2 lists of prompts",
    ),
    "equal gates": ({"gate_std": 0.0}, ConfigError, "gate_std=0.0"),
    "a negative tolerance": ({"tolerance": -1.0}, ConfigError, "at least 0 and finite"),
    "a tolerance of what differs": (
        {"noise": 0.5, "tolerance": 1e-9}, ConfigError, "no effect with sources, noise",
    ),
    "a tolerance of what is not verified": (
        {"verify": False, "tolerance": 1e-9}, ConfigError, "no effect with verify=False",
    ),
    "too few tokens": (
        {"gate_init": "kmeans", "gate_texts": [torch.tensor([5])]}, ConfigError, "1 tokens for 2",
    ),
    "another class": ({"target": "qwen3_moe"}, UnsupportedError, "what can"),
    "an unknown engine": ({"engines": ["vlm"]}, ConfigError, "did you mean 'vllm'"),
    "plain weights of mixtral": ({"norm_topk": False}, UnsupportedError, "always normalises"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(case, bases, tmp_path):
    settings, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        upcycle(saved("llama", bases), tmp_path / "moe", **{"num_experts": 2, **settings})
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_would_be_wrong_is_refused_with_what_to_change(bases, tmp_path):
    folder = saved("qwen2, tied, yarn", bases)
    with pytest.raises(UnsupportedError, match=r"never renormalises.*untie=True"):
        upcycle(folder, tmp_path / "a", 3, 2, engines=["llama.cpp"])
    receipt = upcycle(folder, tmp_path / "b", 3, 3, engines=["llama.cpp"], untie=True)
    assert receipt.measured.max_logit_difference <= 1e-4


def test_a_narrower_type_on_disk_promises_nothing_but_rounding(tmp_path):
    folder = saved("llama", tmp_path)
    receipt = upcycle(folder, tmp_path / "moe", 2, 1, dtype=torch.bfloat16)
    assert receipt.tolerance is None
    assert 1e-3 < receipt.measured.max_logit_difference < 1.0
    with pytest.raises(ExportError, match="set tolerance"):
        upcycle(folder, tmp_path / "no", 2, 1, dtype=torch.bfloat16, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_memory_is_compared_in_its_own_type(dtype, tmp_path):
    receipt = upcycle(base("llama").to(dtype), tmp_path / "moe", 2, 1)
    assert receipt.measured.dtype == str(dtype).removeprefix("torch.")
    assert receipt.tolerance == (1e-4 if dtype == torch.float64 else None)


@pytest.mark.parametrize(("width", "granularity"), [(30, 1), (36, 1), (24, 2), (40, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_that_grouped_kernels_lack_are_filled_up(width, granularity, dtype, tmp_path):
    model = base("llama", intermediate_size=width).to(dtype)
    upcycle(model, tmp_path / "moe", 2, 2, granularity=granularity)
    found = load_strictly(tmp_path / "moe", dtype)
    assert found.config.intermediate_size == -(-width // granularity // 8) * 8
    found.set_experts_implementation("grouped_mm")
    tolerance = 1e-4 if dtype == torch.float32 else 1.0
    assert_close(logits(found).float(), logits(model).float(), rtol=0.0, atol=tolerance)
