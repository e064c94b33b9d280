"""GraniteMoeShared: softmax over the chosen experts, and an always-on expert without a gate."""

from typing import Any

from moeadapt.export.dense import Glu, prefix
from moeadapt.export.targets.base import Place
from moeadapt.export.targets.granite_moe import GraniteMoe


class GraniteMoeShared(GraniteMoe):
    """Granite, Llama and Phi3: small experts beside the base's FFN."""

    name = "granite_moe_shared"
    architecture = "GraniteMoeSharedForCausalLM"
    bases = frozenset()
    additive_bases = frozenset({"granite", "llama", "mistral", "phi3"})

    def fields(self) -> dict[str, Any]:
        """See `Target.fields`."""
        return {**super().fields(), "shared_intermediate_size": self.shape.shared_width}

    def shared(self, layer: int) -> Glu[Place]:
        """See `Target.shared`; gate and up lie in one tensor."""
        s, d = self.shape.shared_width, self.dense.hidden_size
        name, whole = f"{prefix(layer)}shared_mlp.input_linear.weight", (2 * s, d)
        down = f"{prefix(layer)}shared_mlp.output_linear.weight"
        return Glu(
            Place(name, whole, (s, d)),
            Place(name, whole, (s, d), s * d),
            Place(down, (d, s), (d, s)),
        )
