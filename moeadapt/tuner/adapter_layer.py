"""What PEFT asks of a layer with experts: to switch, freeze and delete adapters, and to merge."""

from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moeadapt.errors import UnsupportedError
from moeadapt.tuner.segments import START_NAMES

if TYPE_CHECKING:
    from moeadapt.experts import ExpertBank
    from moeadapt.tuner.block import Block
    from moeadapt.tuner.context import RoutingContext
    from moeadapt.tuner.decode_step import LinearStep

PREFIX = "moeadapt_"
"""Starts the name of every adapter tensor; the lower-cased `peft_type` and an underscore."""

MERGE_MENU = (
    "the mixture depends on the input, so no single weight equals it. Instead: keep the adapter "
    "and load it with PeftModel.from_pretrained; switch it off with model.disable_adapter(); get "
    "the base model back with model.unload(); or, where one merged weight is needed, make a plain "
    "LoRA with moeadapt.merge (least_squares, usage, uniform or single), which measures what it "
    "keeps, with moeadapt.distill, or one LoRA per expert with moeadapt.split"
)


class AdapterLayer(BaseTunerLayer):
    """The half of a layer that PEFT calls; the other half computes."""

    moe_banks: "dict[str, ExpertBank]"
    moe_blocks: "dict[str, Block]"
    decode_step: "LinearStep | None"
    _context: "RoutingContext"

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """See `BaseTunerLayer.set_adapter`; what is frozen stays frozen."""
        super().set_adapter(adapter_names, inference_mode)
        self._refreeze()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """See `BaseTunerLayer.set_requires_grad`; what is frozen stays frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._refreeze()

    def _refreeze(self) -> None:
        for router in self._routers().values():
            if router.frozen:
                router.requires_grad_(False)
        for name in START_NAMES:
            getattr(self, PREFIX + name).requires_grad_(False)
        for bank in self.moe_banks.values():
            for name in bank.frozen:
                bank.factor(name).requires_grad_(False)

    def _routers(self) -> nn.ModuleDict:
        return getattr(self, PREFIX + "router")

    def delete_adapter(self, adapter_name: str) -> None:
        """See `BaseTunerLayer.delete_adapter`; the block and the context forget it too."""
        block = self.moe_blocks.get(adapter_name)
        if block is not None:
            block.forget(adapter_name)
        self._context.heads.pop(adapter_name, None)
        self.decode_step = None
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            UnsupportedError: always, with what to do instead.
        """
        raise UnsupportedError(f"cannot merge: {MERGE_MENU}")

    def unmerge(self) -> None:
        """Do nothing: a mixture is never merged."""
