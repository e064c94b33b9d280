"""Qwen3.5Moe: softmax weights that sum to 1, linear attention, a shared expert behind a gate."""

from typing import Any

from moeadapt.export.targets.qwen2_moe import Qwen2Moe

LINEAR_ATTENTION = (
    "layer_types",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
)


class Qwen35Moe(Qwen2Moe):
    """The text model of Qwen3.5, whole FFNs or small experts beside the base's."""

    name = "qwen3_5_moe"
    architecture = "Qwen3_5MoeForCausalLM"
    bases = frozenset({"qwen3_5_text"})
    additive_bases = frozenset({"qwen3_5_text"})
    norm_choices = (True,)
    partial_layers = False
    attention_biases = True
    sliding = "none"
    partial_rotary = True

    def fields(self) -> dict[str, Any]:
        """See `Target.fields`."""
        return {
            **{name: getattr(self.dense, name) for name in LINEAR_ATTENTION},
            "attention_bias": self.dense.attention_bias,
            "head_dim": self.head_dim,
            "moe_intermediate_size": self.shape.expert_width,
            "shared_expert_intermediate_size": self._slot_width,
            "num_experts": self.shape.num_experts,
            "num_experts_per_tok": self.shape.top_k,
        }
