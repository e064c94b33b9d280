"""Which trained mixtures no stock class can compute, why, and the nearest thing that works."""

import re
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import nn

from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.experts import EXPERTS
from moeadapt.export.bank_layout import EXPERT_AXES
from moeadapt.routers import ROUTERS
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.layer import MoeLoraLinear

ELSEWHERE = (
    "Otherwise keep the adapter and serve it in transformers with moeadapt, or make an ordinary "
    "LoRA of it with moeadapt.merge."
)

NEAREST = (
    "What can be exported: a linear gate per token with a fixed number of experts, such as "
    "router={'name': 'top_k', 'k': 2}"
)

ROUTER_REASONS: Mapping[str, str] = {
    "cosine": "compares directions, and stock gates are one matrix",
    "dynamic": "uses as many experts as pass their thresholds, and a stock class uses a fixed k",
    "expert_choice": "lets experts choose tokens, and a stock class lets tokens choose experts",
    "hash": "routes by token ids, and stock gates see hidden states only",
    "hierarchical": "chooses groups first, by a second gate that no stock class has",
    "rank_wise": "weights the ranks inside an expert, and a stock class weights whole experts",
    "relu": "uses as many experts as score above 0, and a stock class uses a fixed k",
    "sparsegen": "uses as many experts as its projection leaves, and a stock class a fixed k",
    "sparsemax": "uses as many experts as its projection leaves, and a stock class a fixed k",
    "threshold": "uses as many experts as pass it, and a stock class uses a fixed k",
    "top_p": "uses as many experts as it takes to reach p, and a stock class uses a fixed k; a "
    "fixed k in its place was measured to change logits by 0.78",
}
"""Router -> why no stock class computes it."""

FITTING = ("gumbel", "random", "sigmoid", "soft", "switch", "top_k", "uniform")
"""Routers that some stock class computes."""


def active_adapter(model: Any) -> str:
    """Return the one active adapter of `model`.

    Raises:
        ConfigError: it is no PEFT model.
        UnsupportedError: several adapters are active, or none.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"export takes the PeftModel that get_peft_model or PeftModel.from_pretrained "
            f"returned, not a {type(model).__name__}"
        )
    active = model.active_adapters
    layers = [m for m in model.modules() if isinstance(m, MoeLoraLinear)]
    if len(active) != 1 or (layers and layers[0].disable_adapters):
        state = "disabled" if len(active) == 1 else f"{len(active)} active: {list(active)}"
        raise UnsupportedError(
            f"one adapter is exported at a time, and it must be active ({state}); choose it with "
            "model.set_adapter(name)"
        )
    return active[0]


def check_settings(config: MoeLoraConfig) -> None:
    """Refuse settings of the adapter that no stock class has.

    Raises:
        UnsupportedError: says which, why, and what works instead.
    """
    if config.placement == "linear":
        raise UnsupportedError(
            "placement='linear' mixes inside each linear (attention included, where targeted), "
            "and stock classes mix whole FFNs; measured, the two differ by 2.8 in logits. Train "
            f"with placement='ffn' or placement='glu'. {ELSEWHERE}"
        )
    if config.trainable_token_indices:
        raise UnsupportedError(
            "trainable_token_indices replaces single rows of the embedding, which export does not "
            "carry; train the embedding with modules_to_save=['embed_tokens'] on a base whose "
            f"output head is its own. {ELSEWHERE}"
        )
    _check_router(config)


def _check_router(config: MoeLoraConfig) -> None:
    router: Any = config.router_config
    name = ROUTERS.name_of(router)
    reason = None
    if name not in FITTING:
        reason = ROUTER_REASONS.get(name, "is unknown to every stock class")
    elif getattr(router, "per", "token") != "token":
        reason = "decides once per sequence (per='sequence'), and a stock class once per token"
    elif getattr(router, "bias", False):
        reason = "has a learned bias (bias=True), and stock gates have none"
    elif getattr(router, "norm", "none") != "none":
        reason = f"normalises what its gate reads (norm={router.norm!r}), and a stock gate does not"
    elif getattr(router, "cost_aware", 0.0):
        reason = "lowers logits by the experts' costs (cost_aware), and stock gates have no bias"
    if reason is not None:
        raise UnsupportedError(f"router {name!r} {reason}. {NEAREST}. {ELSEWHERE}")


def check_model(model: PeftModel, adapter: str, layers: Mapping[str, MoeLoraLinear]) -> None:
    """Refuse a base or experts that cannot be written as floating point matrices.

    Raises:
        UnsupportedError: says what, why, and what works instead.
    """
    base = model.get_base_model()
    if not type(base).__name__.endswith("ForCausalLM"):
        raise UnsupportedError(
            f"the base is a {type(base).__name__}, and no stock mixture class is made of such; "
            f"those of Llama, Qwen, Mistral and others (docs/serve.md) are. {ELSEWHERE}"
        )
    for key, layer in layers.items():
        inner = layer.get_base_layer()
        if layer.quantization_backend is not None or not isinstance(inner, nn.Linear):
            raise UnsupportedError(
                f"{key} of the base is a {type(inner).__name__}, maybe quantised; load the base in "
                "bfloat16 or float32, and the adapter on it with PeftModel.from_pretrained"
            )
        bank = layer.moe_banks[adapter]
        if layer.moe_plans[adapter].placement != "glu" and type(bank) not in EXPERT_AXES:
            name = next(n for n, cls in EXPERTS.items() if cls is type(bank.config))
            raise UnsupportedError(
                f"experts {name!r} of {key} are no matrices that could be added to the base's; "
                f"train with experts='lora'. {ELSEWHERE}"
            )
    if any(tensor.is_meta for tensor in base.state_dict().values()):
        raise UnsupportedError("some weights are offloaded; load the whole model first")
    if getattr(base, "is_quantized", False):
        raise UnsupportedError("the base is quantised; load it in bfloat16 or float32")


FFN = re.compile(r"model\.layers\.(\d+)\.(mlp|feed_forward)")


def layer_of(path: str) -> int:
    """Return the layer of the FFN at `path`.

    Raises:
        UnsupportedError: it is not the FFN of a decoder layer.
    """
    found = FFN.fullmatch(path)
    if found is None:
        raise UnsupportedError(
            f"{path} has experts and is not the FFN of a decoder layer, where stock classes have "
            f"theirs; leave it out with exclude_modules. {ELSEWHERE}"
        )
    return int(found[1])
