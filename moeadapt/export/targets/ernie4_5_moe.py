"""Ernie4.5-MoE: softmax weights that sum to 1, a selection bias, optional shared experts."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

from moeadapt.export.dense import Glu
from moeadapt.export.targets.base import Fill, MoeShape, Target
from moeadapt.export.targets.shared_units import units_refusal


class Ernie45Moe(Target):
    """Ernie4.5, whole FFNs or small experts beside the base's."""

    name = "ernie4_5_moe"
    architecture = "Ernie4_5_MoeForCausalLM"
    bases = frozenset({"ernie4_5"})
    additive_bases = frozenset({"ernie4_5"})
    shared_names: ClassVar[Glu[str] | None] = Glu(
        *(f"shared_experts.{n}_proj.weight" for n in ("gate", "up", "down"))
    )

    @classmethod
    def _shape_refusal(cls, dense: PretrainedConfig, shape: MoeShape) -> str | None:
        return super()._shape_refusal(dense, shape) or units_refusal(shape)

    def fields(self) -> dict[str, Any]:
        """See `Target.fields`."""
        usual = self.head_dim * self.dense.num_attention_heads == self.dense.hidden_size
        return {
            **({} if usual else {"head_dim": self.head_dim}),
            "intermediate_size": self.full_width,
            "moe_intermediate_size": self.shape.expert_width,
            "moe_num_experts": self.shape.num_experts,
            "moe_k": self.shape.top_k,
            "moe_num_shared_experts": self.shape.shared_width // self.shape.expert_width,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": self.dense.num_hidden_layers - 1,
            "moe_layer_interval": 1,
            "use_bias": False,
        }

    def fills(self, layer: int) -> tuple[Fill, ...]:
        """See `Target.fills`."""
        name = f"{self._start(layer)}moe_statics.e_score_correction_bias"
        return (Fill(name, (1, self.shape.num_experts), 0.0, exact=True),)
