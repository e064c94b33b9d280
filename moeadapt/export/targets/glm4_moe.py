"""Glm4Moe: sigmoid weights, normalised or not, scaled, and a shared expert without a gate."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

from moeadapt.export.dense import Glu
from moeadapt.export.targets.base import Fill, MoeShape, Target
from moeadapt.export.targets.shared_units import units_refusal


class Glm4Moe(Target):
    """Llama, Mistral, Phi3, Qwen2 and Qwen3: small experts beside the base's FFN."""

    name = "glm4_moe"
    architecture = "Glm4MoeForCausalLM"
    additive_bases = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3"})
    scoring = "sigmoid"
    norm_choices = (True, False)
    partial_rotary = True
    shared_names: ClassVar[Glu[str] | None] = Glu(
        *(f"shared_experts.{n}_proj.weight" for n in ("gate", "up", "down"))
    )

    @classmethod
    def _shape_refusal(cls, dense: PretrainedConfig, shape: MoeShape) -> str | None:
        return super()._shape_refusal(dense, shape) or units_refusal(shape)

    def fields(self) -> dict[str, Any]:
        """See `Target.fields`; the class's own defaults rotate half a head and add a layer."""
        rope = dict(self.dense.rope_parameters or {})
        rope.setdefault("partial_rotary_factor", 1.0)
        return {
            "attention_bias": self.dense.model_type == "qwen2",
            "first_k_dense_replace": 0,
            "head_dim": self.head_dim,
            "intermediate_size": self.full_width,
            "moe_intermediate_size": self.shape.expert_width,
            "n_group": 1,
            "n_routed_experts": self.shape.num_experts,
            "n_shared_experts": self.shape.shared_width // self.shape.expert_width,
            "norm_topk_prob": self.shape.norm_topk,
            "num_experts_per_tok": self.shape.top_k,
            "num_mtp_layers": 0,
            "partial_rotary_factor": rope["partial_rotary_factor"],
            "rope_parameters": rope,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "use_qk_norm": self.dense.model_type == "qwen3",
        }

    def fills(self, layer: int) -> tuple[Fill, ...]:
        """See `Target.fills`."""
        name = f"{self._start(layer)}gate.e_score_correction_bias"
        return (Fill(name, (self.shape.num_experts,), 0.0, exact=True),)
