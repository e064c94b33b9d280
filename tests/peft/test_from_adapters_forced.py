"""A mixture made of LoRA adapters, forced to one expert, is that adapter's model, exactly.

In float64, where only a wrong scale, rank or order could differ: values, logits and gradients.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import moeadapt
from moeadapt import MoeLoraConfig
from tests.tiny import adapt, batch, labels_of, tiny

TARGETS = ["q_proj", "o_proj", "gate_proj", "down_proj"]
LORAS = [
    {"r": 4, "lora_alpha": 7},
    {"r": 2, "lora_alpha": 9, "use_rslora": True},
    {"r": 3, "lora_alpha": 5, "rank_pattern": {"down_proj": 1}, "alpha_pattern": {"q_proj": 2}},
]
ROUTERS = {"soft": "layer", "top_k": "block", "relu": "layer"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save three LoRA adapters of different ranks and scales, with random factors."""
    found = []
    for seed, fields in enumerate(LORAS):
        config = LoraConfig(
            target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **fields
        )
        folder = tmp_path_factory.mktemp("lora")
        adapt(tiny("llama"), config, seed=seed).save_pretrained(folder)
        found.append(folder)
    return found


def exact(model):
    return model.double().eval()


def run(model, inputs):
    """Return logits, and the gradient of the loss with respect to the input embeddings."""
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    mask = inputs["attention_mask"]
    out = model(inputs_embeds=embeds, attention_mask=mask, labels=labels_of(inputs))
    return out.logits.detach(), torch.autograd.grad(out.loss, embeds)[0]


def only(expert):
    """Return an edit that gives all of every token's weight to `expert`."""

    def edit(layer, routing):
        weights = torch.zeros_like(routing.expert_weights)
        weights[:, expert] = 1
        return weights

    return edit


@pytest.mark.parametrize(("router", "scope"), ROUTERS.items())
def test_forced_to_one_expert_it_is_that_adapter(router, scope, folders):
    config = MoeLoraConfig(
        r=4,
        lora_alpha=3,
        num_experts=len(folders),
        router=router,
        router_scope=scope,
        balance=None,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    mixture = exact(get_peft_model(tiny("llama"), config))
    moeadapt.init_from_adapters(mixture, folders)
    for expert, folder in enumerate(folders):
        lora = exact(PeftModel.from_pretrained(tiny("llama"), folder))
        with moeadapt.override_routing(mixture, edit=only(expert)):
            found, grad = run(mixture, batch())
        expected, expected_grad = run(lora, batch())
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)
        others = [other for other in range(len(folders)) if other != expert]
        with moeadapt.override_routing(mixture, force=others[0]):
            assert (run(mixture, batch())[0] - expected).abs().max() > 1e-3
