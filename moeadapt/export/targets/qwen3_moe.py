"""Qwen3Moe: softmax weights, normalised or not, norms on queries and keys, no shared expert."""

from typing import Any

from moeadapt.export.targets.base import Target


class Qwen3Moe(Target):
    """Qwen3 as a mixture of whole FFNs."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    bases = frozenset({"qwen3"})
    norm_choices = (True, False)
    partial_layers = True
    attention_biases = True
    sliding = "uniform"

    def fields(self) -> dict[str, Any]:
        """See `Target.fields`."""
        return {
            "head_dim": self.head_dim,
            "intermediate_size": self.full_width,
            "moe_intermediate_size": self.shape.expert_width,
            "num_experts": self.shape.num_experts,
            "num_experts_per_tok": self.shape.top_k,
            "norm_topk_prob": self.shape.norm_topk,
            "mlp_only_layers": list(self.shape.dense_layers),
            "attention_bias": self.dense.attention_bias,
            "use_sliding_window": False,
        }

    def json_fields(self) -> dict[str, Any]:
        """See `Target.json_fields`; converters read the names of older transformers."""
        theta = (self.dense.rope_parameters or {}).get("rope_theta")
        names = {"num_experts": self.shape.num_experts, "num_local_experts": self.shape.num_experts}
        return names if theta is None else {**names, "rope_theta": theta}
