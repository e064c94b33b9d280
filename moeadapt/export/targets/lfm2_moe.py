"""Lfm2Moe: sigmoid weights, normalised or not, a selection bias, convolution layers."""

from typing import Any, ClassVar

from moeadapt.export.dense import Glu
from moeadapt.export.targets.base import Fill, Target


class Lfm2Moe(Target):
    """Lfm2 as a mixture of whole FFNs."""

    name = "lfm2_moe"
    architecture = "Lfm2MoeForCausalLM"
    bases = frozenset({"lfm2"})
    scoring = "sigmoid"
    norm_choices = (True, False)
    moe = "feed_forward"
    expert_names: ClassVar[Glu[str]] = Glu(*(f"experts.{{expert}}.w{n}.weight" for n in (1, 3, 2)))

    def fields(self) -> dict[str, Any]:
        """See `Target.fields`."""
        dense = self.dense
        return {
            "conv_bias": dense.conv_bias,
            "conv_L_cache": dense.conv_L_cache,
            "intermediate_size": self.full_width,
            "layer_types": list(dense.layer_types),
            "moe_intermediate_size": self.shape.expert_width,
            "norm_eps": dense.norm_eps,
            "norm_topk_prob": self.shape.norm_topk,
            "num_dense_layers": 0,
            "num_experts": self.shape.num_experts,
            "num_experts_per_tok": self.shape.top_k,
            "routed_scaling_factor": 1.0,
            "use_expert_bias": True,
        }

    def fills(self, layer: int) -> tuple[Fill, ...]:
        """See `Target.fills`."""
        name = f"{self._start(layer)}expert_bias"
        return (Fill(name, (self.shape.num_experts,), 0.0, exact=True),)
