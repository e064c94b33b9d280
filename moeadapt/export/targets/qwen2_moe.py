"""Qwen2Moe: softmax weights, normalised or not, and a shared expert behind a sigmoid gate."""

from typing import Any, ClassVar

from moeadapt.export.dense import Glu
from moeadapt.export.targets.base import Fill, Place, Target

FILLER_WIDTH = 256
"""Width of the silent shared expert: a multiple of every engine's block size."""

GATE_ENTRY = 1e-8
"""An entry of the shared gate: half open for every token; llama.cpp makes NaN of zeros."""


class Qwen2Moe(Target):
    """Qwen2 and Qwen2.5, whole FFNs or small experts beside the base's.

    The class always has a shared expert. A mixture without one gets a silent one; the base's FFN in
    that place counts half, so that its down_proj is doubled.
    """

    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    bases = frozenset({"qwen2"})
    additive_bases = frozenset({"qwen2"})
    norm_choices = (True, False)
    partial_layers = True
    sliding = "layers"
    shared_names: ClassVar[Glu[str] | None] = Glu(
        *(f"shared_expert.{n}_proj.weight" for n in ("gate", "up", "down"))
    )

    def fields(self) -> dict[str, Any]:
        """See `Target.fields`."""
        dense = self.dense
        return {
            "intermediate_size": self.full_width,
            "moe_intermediate_size": self.shape.expert_width,
            "shared_expert_intermediate_size": self._slot_width,
            "num_experts": self.shape.num_experts,
            "num_experts_per_tok": self.shape.top_k,
            "norm_topk_prob": self.shape.norm_topk,
            "mlp_only_layers": list(self.shape.dense_layers),
            "qkv_bias": True,
            "use_sliding_window": dense.use_sliding_window,
            "sliding_window": dense.sliding_window,
            "max_window_layers": dense.max_window_layers,
            "layer_types": list(dense.layer_types),
        }

    @property
    def _slot_width(self) -> int:
        return self.shape.shared_width or min(FILLER_WIDTH, self.full_width)

    @property
    def shared_down_scale(self) -> float:
        """See `Target.shared_down_scale`."""
        return 2.0

    def fills(self, layer: int) -> tuple[Fill, ...]:
        """See `Target.fills`."""
        name = f"{self._start(layer)}shared_expert_gate.weight"
        gate = Fill(name, (1, self.dense.hidden_size), GATE_ENTRY)
        silent: tuple[Place, ...] = ()
        if self.shape.shared_width == 0:
            silent = tuple(self._shared(layer, self._slot_width))
        return (gate, *(Fill(place.name, place.shape, 0.0) for place in silent))
