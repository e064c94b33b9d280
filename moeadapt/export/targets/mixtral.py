"""Mixtral: softmax weights that sum to 1 over the chosen experts, no shared expert."""

from typing import Any, ClassVar

from moeadapt.export.dense import Glu
from moeadapt.export.targets.base import Target


class Mixtral(Target):
    """Llama, Mistral and Phi3 (all of each head rotated) as a mixture of whole FFNs."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    bases = frozenset({"llama", "mistral", "phi3"})
    sliding = "uniform"
    moe = "block_sparse_moe"
    expert_names: ClassVar[Glu[str]] = Glu(*(f"experts.{{expert}}.w{n}.weight" for n in (1, 3, 2)))

    def fields(self) -> dict[str, Any]:
        """See `Target.fields`."""
        return {
            "intermediate_size": self.shape.expert_width,
            "num_local_experts": self.shape.num_experts,
            "num_experts_per_tok": self.shape.top_k,
            "head_dim": self.head_dim,
            "sliding_window": getattr(self.dense, "sliding_window", None),
        }
