"""FlexOlmo: softmax weights, normalised or not, norms after attention and FFN, none shared."""

from typing import Any

from moeadapt.export.targets.base import Target


class FlexOlmo(Target):
    """Olmo2 as a mixture of whole FFNs."""

    name = "flex_olmo"
    architecture = "FlexOlmoForCausalLM"
    bases = frozenset({"olmo2"})
    norm_choices = (True, False)
    attention_biases = True

    def fields(self) -> dict[str, Any]:
        """See `Target.fields`."""
        return {
            "intermediate_size": self.shape.expert_width,
            "num_experts": self.shape.num_experts,
            "num_experts_per_tok": self.shape.top_k,
            "norm_topk_prob": self.shape.norm_topk,
            "attention_bias": self.dense.attention_bias,
        }
