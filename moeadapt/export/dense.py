"""Where a dense checkpoint keeps its FFNs, and what its fused tensors are made of.

Letters: D hidden width, I FFN width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig

T = TypeVar("T")

COMMON = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "rope_parameters",
    "initializer_range",
    "attention_dropout",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Fields that a dense configuration shares with its mixture."""


@dataclass(frozen=True)
class Glu(Generic[T]):
    """One thing per matrix of a gated FFN: `down(act(gate x) * up x)`."""

    gate: T
    up: T
    down: T

    def __iter__(self) -> Iterator[T]:
        """Iterate over gate, up and down."""
        return iter((self.gate, self.up, self.down))


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor in the dense checkpoint; all of them if `rows` is None."""

    name: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Copy:
    """A tensor of the new checkpoint that is `rows` of one of the dense checkpoint."""

    name: str
    rows: tuple[int, int] | None = None


FUSED = frozenset({"phi3"})
"""Model types whose q/k/v and gate/up are one tensor each."""

FEED_FORWARD = frozenset({"lfm2"})
"""Model types whose FFN is `feed_forward.w1/w3/w2`."""


def prefix(layer: int) -> str:
    """Return the start of every tensor name of a layer."""
    return f"model.layers.{layer}."


def ffn_width(config: PretrainedConfig) -> int:
    """Return I; Lfm2 may derive it from the configured one."""
    fields: Any = config
    width = fields.intermediate_size
    if fields.model_type in FEED_FORWARD and fields.block_auto_adjust_ff_dim:
        width = int(fields.block_ffn_dim_multiplier * int(2 * width / 3))
        multiple = fields.block_multiple_of
        width = multiple * -(-width // multiple)
    return width


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of one attention head."""
    fields: Any = config
    return getattr(fields, "head_dim", None) or fields.hidden_size // fields.num_attention_heads


def ffn_pieces(config: PretrainedConfig, layer: int) -> Glu[Piece]:
    """Return where the three matrices of a layer's FFN are."""
    start = prefix(layer)
    if config.model_type in FUSED:
        width, name = ffn_width(config), f"{start}mlp.gate_up_proj.weight"
        halves = Piece(name, (0, width)), Piece(name, (width, 2 * width))
        return Glu(*halves, Piece(f"{start}mlp.down_proj.weight"))
    if config.model_type in FEED_FORWARD:
        return Glu(*(Piece(f"{start}feed_forward.w{n}.weight") for n in (1, 3, 2)))
    return Glu(*(Piece(f"{start}mlp.{n}_proj.weight") for n in ("gate", "up", "down")))


def is_ffn(name: str) -> bool:
    """Whether a tensor of the dense checkpoint belongs to an FFN."""
    return name.startswith("model.layers.") and name.split(".")[3] in ("mlp", "feed_forward")


def ffn_layer(name: str) -> int:
    """Return the layer of a tensor for which `is_ffn` holds."""
    return int(name.split(".")[2])


def copies(config: PretrainedConfig, name: str) -> tuple[Copy, ...]:
    """Return what becomes of a tensor outside the FFNs: itself, or the parts of a fused one."""
    if config.model_type in FUSED and ".self_attn.qkv_proj." in name:
        fields: Any = config
        q = fields.num_attention_heads * head_dim(config)
        kv = fields.num_key_value_heads * head_dim(config)
        ends = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
        return tuple(Copy(name.replace("qkv_proj", f"{n}_proj"), r) for n, r in ends.items())
    return (Copy(name),)


STRIDE = 8
"""Widths of experts are multiples: grouped kernels want 16 bytes, which is 8 bfloat16."""


def whole_strides(width: int) -> int:
    """Return the smallest width of an expert that holds `width` hidden units."""
    return -(-width // STRIDE) * STRIDE


def filled(ffn: Glu[Tensor], width: int) -> Glu[Tensor]:
    """Return the same FFN with hidden units that do nothing, `width` in all."""
    more = width - ffn.gate.shape[0]
    if not more:
        return ffn
    return Glu(
        F.pad(ffn.gate, (0, 0, 0, more)), F.pad(ffn.up, (0, 0, 0, more)), F.pad(ffn.down, (0, more))
    )
