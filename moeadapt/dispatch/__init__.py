"""Sends tokens through their experts: fast forms, and beside each its slow definition.

The routing weights multiply the rank axis of the experts (the hidden axis of those that are small
FFNs), never their outputs: no tensor has both an expert and an output axis.
"""

from moeadapt.dispatch.activation import (
    Contraction,
    Expansion,
    mix_activation,
    mix_activation_reference,
)
from moeadapt.dispatch.choice import Impl, choose
from moeadapt.dispatch.ffn import (
    Slots,
    combine,
    contract,
    expand,
    ffn_reference,
)
from moeadapt.dispatch.linear import dispatch, dispatch_reference
from moeadapt.dispatch.slot_rows import Columns

__all__ = [
    # one linear
    "dispatch",
    "dispatch_reference",
    "Impl",
    "choose",
    # a whole FFN
    "Slots",
    "expand",
    "combine",
    "contract",
    "ffn_reference",
    "Expansion",
    "Contraction",
    "Columns",
    "mix_activation",
    "mix_activation_reference",
]
