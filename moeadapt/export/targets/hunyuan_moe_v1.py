"""HunYuanMoEV1: softmax weights that sum to 1, and a shared expert as wide as the others."""

from typing import Any, ClassVar

from moeadapt.export.dense import Glu
from moeadapt.export.targets.base import Fill, Target


class HunYuanMoEV1(Target):
    """HunYuanDenseV1 as a mixture of whole FFNs; the shared expert that it must have is silent."""

    name = "hunyuan_moe_v1"
    architecture = "HunYuanMoEV1ForCausalLM"
    bases = frozenset({"hunyuan_v1_dense"})
    attention_biases = True
    router_name = "gate.wg.weight"
    shared_names: ClassVar[Glu[str] | None] = Glu(
        *(f"shared_mlp.{n}_proj.weight" for n in ("gate", "up", "down"))
    )

    def fields(self) -> dict[str, Any]:
        """See `Target.fields`."""
        return {
            "attention_bias": self.dense.attention_bias,
            "head_dim": self.head_dim,
            "intermediate_size": self.shape.expert_width,
            "num_experts": self.shape.num_experts,
            "moe_topk": self.shape.top_k,
        }

    def fills(self, layer: int) -> tuple[Fill, ...]:
        """See `Target.fills`."""
        silent = self._shared(layer, self.shape.expert_width)
        return tuple(Fill(place.name, place.shape, 0.0) for place in silent)
