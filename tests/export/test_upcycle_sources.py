"""Several checkpoints or adapters of one base become the experts of one mixture."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from moeadapt.embedded import MODELS
from moeadapt.errors import ConfigError
from moeadapt.export.upcycle import upcycle
from moeadapt.export.verify import load_strictly
from tests.export.bases import base, saved, token_ids
from tests.toy import sentences, toy_tokenizer

LINEARS = {
    "llama": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "lfm2": ["q_proj", "w1", "w2", "w3"],
}
NAMES = sorted(LINEARS)


def adapter(name: str, folder, seed: int) -> torch.nn.Module:
    """Save a random LoRA adapter and return its merged model."""
    torch.manual_seed(seed)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=LINEARS[name], init_lora_weights=False)
    model = get_peft_model(base(name), config)
    model.save_pretrained(folder)
    return model.merge_and_unload()


def ffn(model, layer=0):
    """Return gate, up and down of a dense model."""
    block = model.model.layers[layer]
    mlp = getattr(block, "mlp", None) or block.feed_forward
    if hasattr(mlp, "gate_up_proj"):
        return *mlp.gate_up_proj.weight.chunk(2), mlp.down_proj.weight
    names = ("w1", "w3", "w2") if hasattr(mlp, "w1") else ("gate_proj", "up_proj", "down_proj")
    return tuple(getattr(mlp, n).weight for n in names)


def experts(model, layer=0):
    """Return gate, up and down of each expert of a mixture."""
    block = model.model.layers[layer]
    bank = (getattr(block, "mlp", None) or block.feed_forward).experts
    halves = [g.chunk(2) for g in bank.gate_up_proj]
    return [(*half, down) for half, down in zip(halves, bank.down_proj, strict=True)]


def require_experts(out, models):
    found = load_strictly(out)
    for layer in range(2):
        for own, model in zip(experts(found, layer), models, strict=True):
            for a, b in zip(own, ffn(model, layer), strict=True):
                assert_close(a, b)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_each_fine_tuned_copy_is_an_expert_and_the_rest_is_their_mean(name, tmp_path):
    models = [base(name, seed) for seed in range(3)]
    folders = [saved(name, tmp_path / "in", seed) for seed in range(3)]
    receipt = upcycle(folders[0], tmp_path / "moe", sources=folders, top_k=2)
    assert receipt.num_experts == 3
    assert len(set(receipt.source_sha256.values())) == 3
    found = require_experts(tmp_path / "moe", models)
    mean = sum(m.model.embed_tokens.weight for m in models) / 3
    assert_close(found.model.embed_tokens.weight, mean)


@pytest.mark.parametrize("name", NAMES)
def test_each_adapter_merged_is_an_expert(name, tmp_path):
    folders = [tmp_path / f"adapter-{i}" for i in range(2)]
    models = [adapter(name, folder, i) for i, folder in enumerate(folders)]
    upcycle(saved(name, tmp_path / "in"), tmp_path / "moe", sources=folders, top_k=1)
    found = require_experts(tmp_path / "moe", models)
    if name == "llama":
        own = [m.model.layers[0].self_attn.q_proj.weight for m in models]
        assert_close(found.model.layers[0].self_attn.q_proj.weight, (own[0] + own[1]) / 2)


def test_an_adapter_and_an_unchanged_base_can_stand_side_by_side(tmp_path):
    merged = adapter("llama", tmp_path / "adapter", 0)
    folder = saved("llama", tmp_path / "in")
    upcycle(folder, tmp_path / "moe", sources=[folder, tmp_path / "adapter"], top_k=1)
    require_experts(tmp_path / "moe", [base("llama"), merged])


def test_equal_copies_of_the_base_are_the_base(tmp_path):
    folder = saved("llama", tmp_path / "in")
    receipt = upcycle(folder, tmp_path / "moe", sources=[folder, folder], top_k=2)
    assert receipt.measured.max_logit_difference <= 1e-4


def test_the_number_of_experts_is_that_of_the_sources(tmp_path):
    folder = saved("llama", tmp_path / "in")
    with pytest.raises(ConfigError, match="num_experts=3 for 2 sources"):
        upcycle(folder, tmp_path / "moe", 3, sources=[folder, folder])


def test_a_copy_of_another_base_is_refused(tmp_path):
    folder = saved("llama", tmp_path / "in")
    with pytest.raises(ConfigError, match="not a fine-tuned copy of the base"):
        upcycle(folder, tmp_path / "moe", sources=[folder, saved("qwen3", tmp_path / "in")])


def test_an_adapter_of_another_base_is_refused(tmp_path):
    adapter("lfm2", tmp_path / "adapter", 0)
    folder = saved("llama", tmp_path / "in")
    with pytest.raises(ConfigError, match="trained on another base"):
        upcycle(folder, tmp_path / "moe", sources=[folder, tmp_path / "adapter"])


def test_a_pickled_adapter_is_not_opened(tmp_path):
    adapter("llama", tmp_path / "adapter", 0)
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapter_model.bin")
    folder = saved("llama", tmp_path / "in")
    with pytest.raises(ConfigError, match="pickled"):
        upcycle(folder, tmp_path / "moe", sources=[folder, tmp_path / "adapter"])


def trained(out, **config):
    """Train two steps of plain LoRA on the upcycled model; return each factor's change."""
    model = AutoModelForCausalLM.from_pretrained(out)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **config))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        ids = token_ids()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    return {n: float((after[n].detach() - value).abs().max()) for n, value in before.items()}


def test_plain_peft_trains_attention_and_fused_experts_of_an_upcycled_model(tmp_path):
    folders = [saved("qwen3", tmp_path / "in", seed) for seed in range(2)]
    upcycle(folders[0], tmp_path / "moe", sources=folders, top_k=2, gate_std=0.5)
    change = trained(
        tmp_path / "moe",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    )
    for part in ("q_proj", "mlp.experts", "mlp.gate"):
        moved = [value for name, value in change.items() if part in name and "lora_B" in name]
        assert moved
        assert min(moved) > 0, part


@pytest.mark.parametrize("gate_init", ["random", "kmeans"])
def test_an_embedded_name_is_a_base_and_a_source(gate_init, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEADAPT_CACHE", str(tmp_path / "cache"))
    name = "embedded:smollm2-135m"
    folder = tmp_path / "cache" / MODELS[name].folder
    base("llama").save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    texts = sentences(4) if gate_init == "kmeans" else None
    receipt = upcycle(name, tmp_path / "a", 2, 1, gate_init=gate_init, gate_texts=texts)
    assert receipt.measured.max_logit_difference <= 1e-4
    upcycle(name, tmp_path / "b", sources=[name, folder], gate_init=gate_init, gate_texts=texts)
    require_experts(tmp_path / "b", [base("llama")] * 2)
