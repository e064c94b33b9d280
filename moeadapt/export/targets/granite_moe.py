"""GraniteMoe: softmax over the chosen experts; all experts of a layer in two tensors on disk."""

from typing import Any

from moeadapt.export.dense import Glu
from moeadapt.export.targets.base import Place, Target

MULTIPLIERS = (
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
    "attention_multiplier",
)


class GraniteMoe(Target):
    """Granite, and Llama whose attention has biases, as a mixture of whole FFNs."""

    name = "granite_moe"
    architecture = "GraniteMoeForCausalLM"
    bases = frozenset({"granite", "llama"})
    attention_biases = True
    moe = "block_sparse_moe"
    router_name = "router.layer.weight"

    def fields(self) -> dict[str, Any]:
        """See `Target.fields`."""
        if self.dense.model_type == "granite":
            multipliers: dict[str, Any] = {name: getattr(self.dense, name) for name in MULTIPLIERS}
        else:
            multipliers = dict.fromkeys(MULTIPLIERS, 1.0)
            multipliers["attention_multiplier"] = self.head_dim**-0.5
        if self.head_dim * self.dense.num_attention_heads != self.dense.hidden_size:
            multipliers["head_dim"] = self.head_dim
        return {
            **multipliers,
            "intermediate_size": self.shape.expert_width,
            "num_local_experts": self.shape.num_experts,
            "num_experts_per_tok": self.shape.top_k,
            "attention_bias": getattr(self.dense, "attention_bias", False),
        }

    def json_fields(self) -> dict[str, Any]:
        """See `Target.json_fields`; TRL reads the name that other classes use."""
        return {"num_experts": self.shape.num_experts}

    def expert(self, layer: int, expert: int) -> Glu[Place]:
        """See `Target.expert`; gate and up of all experts lie in one tensor, down in another."""
        experts, m, d = self.shape.num_experts, self.shape.expert_width, self.dense.hidden_size
        start = self._start(layer)
        name, whole = f"{start}input_linear.weight", (experts, 2 * m, d)
        first = expert * 2 * m * d
        return Glu(
            Place(name, whole, (m, d), first),
            Place(name, whole, (m, d), first + m * d),
            Place(f"{start}output_linear.weight", (experts, d, m), (d, m), expert * d * m),
        )
