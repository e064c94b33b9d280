"""Cohere2Moe: softmax over the chosen experts, attention and FFN in parallel, optional shared."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

from moeadapt.export.dense import Glu
from moeadapt.export.targets.base import MoeShape, Target
from moeadapt.export.targets.shared_units import units_refusal


class Cohere2Moe(Target):
    """Cohere2, whole FFNs or small experts beside the base's."""

    name = "cohere2_moe"
    architecture = "Cohere2MoeForCausalLM"
    bases = frozenset({"cohere2"})
    additive_bases = frozenset({"cohere2"})
    attention_biases = True
    sliding = "layers"
    shared_names: ClassVar[Glu[str] | None] = Glu(
        *(f"shared_experts.{n}_proj.weight" for n in ("gate", "up", "down"))
    )

    @classmethod
    def _shape_refusal(cls, dense: PretrainedConfig, shape: MoeShape) -> str | None:
        return super()._shape_refusal(dense, shape) or units_refusal(shape)

    def fields(self) -> dict[str, Any]:
        """See `Target.fields`."""
        dense = self.dense
        return {
            "attention_bias": dense.attention_bias,
            "head_dim": self.head_dim,
            "intermediate_size": self.shape.expert_width,
            "layer_norm_eps": dense.layer_norm_eps,
            "layer_types": list(dense.layer_types),
            "logit_scale": dense.logit_scale,
            "mlp_layer_types": ["sparse"] * dense.num_hidden_layers,
            "num_experts": self.shape.num_experts,
            "num_experts_per_tok": self.shape.top_k,
            "num_shared_experts": self.shape.shared_width // self.shape.expert_width,
            "shared_expert_combination_strategy": "sum",
            "sliding_window": dense.sliding_window,
        }
