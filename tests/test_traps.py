"""Mistakes met in other libraries, each as a test that would catch it here."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch.testing import assert_close

from moeadapt import MoeLoraConfig
from moeadapt.errors import UnsupportedError
from moeadapt.routers import ROUTERS
from moeadapt.tuner.inspect import pop_router_stats
from tests.contracts.kit import experts
from tests.samples import E, T, hidden, make_bank, make_router
from tests.structure.trace import MATRIX_PRODUCTS, recorded
from tests.tiny import KINDS, adapted, batch, gradients, labels_of, logits, moe_config, tiny

kinds = pytest.mark.parametrize("kind", KINDS)
PER_TOKEN = [name for name in sorted(ROUTERS) if name not in ("expert_choice", "uniform")]


@pytest.mark.parametrize("router", PER_TOKEN)
@kinds
def test_a_row_is_routed_alone_as_with_neighbours(kind, router):
    """X-LoRA took the softmax over a flattened batch; Lily averaged it over the batch."""
    spec = {"name": router, "k": 3} if router == "rank_wise" else router
    model, inputs = adapted("llama", kind, router=spec), batch(rows=1)
    alone = logits(model, inputs)
    crowd = batch(rows=3, seed=5)
    crowd["input_ids"][0], crowd["attention_mask"][0] = inputs["input_ids"][0], 1
    assert_close(logits(model, crowd)[0], alone[0])


@kinds
def test_the_aux_loss_is_not_left_over_from_another_forward(kind):
    """AdaMoLE keeps it as module state: None without input gradients, stale after evaluation."""
    model, inputs = adapted("llama", kind, balance={"switch": 0.5}).train(), batch()
    expected = gradients(model, inputs)
    pop_router_stats(model)
    model.eval()
    logits(model, batch(seed=9))
    model.train()
    with torch.no_grad():
        model(**batch(seed=8))
    found = gradients(model, inputs)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient)
    real = int(inputs["attention_mask"].sum())
    assert {stats.tokens for stats in pop_router_stats(model).values()} == {real}


@kinds
@pytest.mark.parametrize("adapter", ["default", "0", "layers", "1"])
def test_the_router_is_saved_whatever_the_adapter_is_called(kind, adapter, tmp_path):
    """X-LoRA loses its router on save, because adapter names look like layer indices."""
    from peft import get_peft_model

    model = get_peft_model(tiny("llama"), moe_config(kind), adapter_name=adapter).eval()
    routers = [n for n, _ in model.named_parameters() if "moeadapt_router" in n]
    saved = get_peft_model_state_dict(model, adapter_name=adapter)
    assert len([n for n in saved if "moeadapt_router" in n]) == len(routers) > 0
    model.save_pretrained(tmp_path)
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    again = PeftModel.from_pretrained(tiny("llama"), folder).eval()
    assert torch.equal(logits(again, batch()), logits(model, batch()))


def test_no_config_field_is_lost_in_a_round_trip(tmp_path):
    """MixLoRA loses four."""
    config = MoeLoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=3,
        num_experts=6,
        experts_pattern={"layers.0.mlp": 5},
        granularity=2,
        router={"name": "top_k", "k": 2, "noise": "gaussian", "null_experts": 1, "norm": "rms"},
        balance={"switch": 0.5, "null_rate": {"coef": 0.1, "target": 0.3}},
        schedule={"temperature": {"start": 2.0, "end": 1.0, "steps": 5}, "gate_dropout": 0.1},
        experts="shared_a",
        placement="linear",
        router_scope="block",
        impl="concat",
        n_shared=1,
        target_modules=["q_proj", "up_proj"],
        exclude_modules=["k_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        rank_pattern={"q_proj": 8},
        alpha_pattern={"q_proj": 9.0},
        modules_to_save=["lm_head"],
        trainable_token_indices=[1, 2],
        use_rslora=True,
        lora_dropout=0.25,
        init_lora_weights="gaussian",
    )
    default = MoeLoraConfig().to_dict()
    written = config.to_dict()
    fixed = {"bias", "target_parameters", "format_version", "moeadapt_version", "placement"}
    fixed |= {"base_fingerprint"}
    own = {key for key in MoeLoraConfig.__annotations__ if key not in fixed}
    assert {key for key in own if written[key] == default[key]} == set()
    config.save_pretrained(tmp_path)
    again = MoeLoraConfig.from_pretrained(tmp_path)
    assert {k: v for k, v in again.to_dict().items() if k != "inference_mode"} == {
        k: v for k, v in written.items() if k != "inference_mode"
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text())["router"]["null_experts"] == 1


@kinds
def test_merging_is_refused_and_changes_nothing(kind):
    """X-LoRA sums all experts with weight 1; AdaMoLE does nothing and says nothing."""
    model, inputs = adapted("llama", kind), batch()
    expected = logits(model, inputs)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UnsupportedError, match="depends on the input"):
            merge()
    assert torch.equal(logits(model, inputs), expected)


def products(run) -> int:
    """Count the matrix products of `run`."""
    with recorded() as kernels:
        run()
    return sum(kernel.name in MATRIX_PRODUCTS for kernel in kernels)


def test_a_shared_a_is_applied_once():
    """HydraLoRA's code applies A once per B: 2.7 times a plain LoRA's time."""
    from moeadapt.dispatch import dispatch

    bank, x, onto = make_bank("shared_a"), hidden(), hidden(T, 5)
    weights = torch.rand(T, E, dtype=torch.float64)
    assert products(lambda: dispatch(x, weights, bank, onto)) == 2


@experts
def test_no_tensor_has_tokens_experts_and_outputs(expert):
    """Arrow and LD-MoLE build [tokens, experts, out]."""
    from moeadapt.dispatch import dispatch

    tokens, out = 211, 397
    bank = make_bank(expert, 8, out)
    x, onto = hidden(tokens).requires_grad_(), hidden(tokens, out)
    weights = torch.rand(tokens, E, dtype=torch.float64, requires_grad=True)
    with recorded() as kernels:
        dispatch(x, weights, bank, onto).sum().backward()
    assert max(kernel.size for kernel in kernels) <= tokens * out


@kinds
def test_a_fresh_adapter_changes_nothing(kind):
    """EulerForge starts with a B that is not zero, so the model changes before training."""
    model = adapted("llama", kind, init_lora_weights=True)
    assert torch.equal(logits(model, batch()), logits(tiny("llama"), batch()))


@pytest.mark.parametrize("name", ["top_k", "soft", "top_p", "cosine", "rank_wise", "random"])
def test_softmax_is_taken_once(name):
    """HMoRA takes a softmax of probabilities, which is flatter than meant."""
    extra = {"k": E} if name in ("top_k", "cosine", "rank_wise", "random") else {}
    router = make_router({"name": name, **extra, **({"p": 1.0} if name == "top_p" else {})})
    from tests.samples import ALL_REAL

    routing = router(hidden(), ALL_REAL)
    shifted = routing.logits - routing.logits.logsumexp(-1, keepdim=True)
    assert_close(routing.weights.log(), shifted)


@kinds
def test_labels_and_padding_do_not_reach_the_balance_loss(kind):
    """Counting padding makes a batch of short rows look balanced."""
    model = adapted("llama", kind, balance={"switch": 1.0}).train()
    inputs = batch()
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    counted = {n: s.losses for n, s in pop_router_stats(model).items()}
    model.zero_grad()
    wide = {k: torch.cat([torch.zeros_like(v[:, :3]), v], -1) for k, v in inputs.items()}
    places = (wide["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model(**wide, position_ids=places, labels=labels_of(wide)).loss.backward()
    for name, stats in pop_router_stats(model).items():
        assert stats.losses == pytest.approx(counted[name], rel=1e-5)
