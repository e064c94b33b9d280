"""Every rank is an expert: num_experts * r routed experts of rank 1.

Source: Zhao et al. 2025 (SMoRA), https://arxiv.org/abs/2501.15103, section 3 (a LoRA whose ranks
are routed); Zadouri et al. 2023 for the mixture itself, see `moeadapt.experts.lora`. The scale
stays alpha / r of the adapter, so all ranks with weight 1 are the LoRA of rank num_experts * r.
"""

from typing import ClassVar

from moeadapt.experts.base import BankSize, ExpertConfig
from moeadapt.experts.lora import LoraBank


class Rank1Config(ExpertConfig):
    """LoRA experts cut into single ranks; goes with router `rank_wise`."""

    bank: ClassVar = LoraBank

    def sized(self, size: BankSize) -> BankSize:
        """See `ExpertConfig.sized`."""
        return size.split(size.rank)
