"""What a stock mixture class of transformers is to us: its configuration and its names on disk.

A target holds two configurations and no weights; everything it says can be checked, planned and
summed up before the first byte is read.

Letters: D hidden width, I FFN width, M width of one expert, S of the shared one, E experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import transformers
from transformers import PretrainedConfig

from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.export.dense import (
    COMMON,
    Copy,
    Glu,
    copies,
    ffn_layer,
    ffn_width,
    head_dim,
    is_ffn,
    prefix,
)


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """Sizes and settings of the mixture in every layer.

    Attributes:
        num_experts: experts per layer, at least 2; granular ones are counted one by one.
        top_k: experts per token, in [1, num_experts].
        expert_width: FFN width of one expert, at least 1.
        shared_width: FFN width of the always-on expert; 0 for none.
        norm_topk: whether the weights of a token's experts sum to 1.
        untie: write the output head as its own tensor where the base shares it.
        dense_layers: layers that keep the FFN of the base.
    """

    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int = 0
    norm_topk: bool = True
    untie: bool = False
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_experts < 2:  # noqa: PLR2004
            raise ConfigError(f"num_experts={self.num_experts}: at least 2 make a mixture")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k={self.top_k}: in [1, num_experts={self.num_experts}]")
        if self.expert_width < 1 or self.shared_width < 0:
            raise ConfigError(
                f"expert_width={self.expert_width}, shared_width={self.shared_width}: at least 1 "
                "and 0"
            )


@dataclass(frozen=True)
class Place:
    """Where one matrix lies on disk.

    Attributes:
        name: of the tensor that holds it.
        shape: of that whole tensor.
        matrix: rows and columns of this matrix.
        start: elements of the tensor before the matrix.
    """

    name: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    start: int = 0


@dataclass(frozen=True)
class Fill:
    """A tensor that holds one value; in float32 whatever the checkpoint's dtype if `exact`."""

    name: str
    shape: tuple[int, ...]
    value: float
    exact: bool = False


class Target(ABC):
    """One mixture class, for one dense configuration and one `MoeShape`.

    A subclass names its class and fields; the per-expert names below are those of most classes.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    bases: ClassVar[frozenset[str]] = frozenset()
    """Dense model types whose whole FFN can be an expert."""
    additive_bases: ClassVar[frozenset[str]] = frozenset()
    """Dense model types whose FFN can sit in the shared place beside small experts."""
    scoring: ClassVar[str] = "softmax"
    """What turns a router's logits into weights: softmax or sigmoid."""
    norm_choices: ClassVar[tuple[bool, ...]] = (True,)
    partial_layers: ClassVar[bool] = False
    attention_biases: ClassVar[bool] = False
    """Whether q, k, v and o have biases where the configuration asks for them."""
    sliding: ClassVar[str] = "none"
    """none, uniform (one window for all layers) or layers (a list of layer types)."""
    partial_rotary: ClassVar[bool] = False
    moe: ClassVar[str] = "mlp"
    router_name: ClassVar[str] = "gate.weight"
    expert_names: ClassVar[Glu[str]] = Glu(
        *(f"experts.{{expert}}.{n}_proj.weight" for n in ("gate", "up", "down"))
    )
    shared_names: ClassVar[Glu[str] | None] = None

    def __init__(self, dense: PretrainedConfig, shape: MoeShape) -> None:
        """Hold the two configurations.

        Raises:
            UnsupportedError: this class cannot hold such a mixture of this base; says why.
        """
        additive = shape.shared_width > 0
        why = self.refusal(dense, additive=additive) or self._shape_refusal(dense, shape)
        if why is not None:
            raise UnsupportedError(f"{dense.model_type} to {self.name}: {why}")
        self.dense: Any = dense
        self.shape = shape

    @classmethod
    def refusal(cls, dense: PretrainedConfig, *, additive: bool = False) -> str | None:
        """Return why this class cannot hold a mixture of `dense`, or None.

        Args:
            dense: the base's configuration.
            additive: small experts beside the base's FFN, which sits in the shared place.
        """
        fields: Any = dense
        accepted = cls.additive_bases if additive else cls.bases
        if dense.model_type not in accepted:
            return (
                f"{cls.name} holds {'small experts beside' if additive else 'copies of'} the FFN "
                f"of {sorted(accepted) or 'no base'}, not of {dense.model_type!r}"
            )
        if not hasattr(transformers, cls.architecture):
            return f"transformers {transformers.__version__} has no {cls.architecture}"
        if getattr(fields, "mlp_bias", False) or (
            dense.model_type.startswith("ernie4_5") and getattr(fields, "use_bias", False)
        ):
            return "its linears have biases, and the experts of this class have none"
        return cls._attention_refusal(fields)

    @classmethod
    def _attention_refusal(cls, fields: Any) -> str | None:
        biased = getattr(fields, "attention_bias", False)
        if biased and not cls.attention_biases:
            return "its attention has an output bias, and that of this class has none"
        rotary = (fields.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        if rotary != 1.0 and not cls.partial_rotary:
            return f"it rotates a share of {rotary} of each head, and this class rotates all"
        kinds = set(getattr(fields, "layer_types", None) or ())
        if cls.sliding != "layers" and "sliding_attention" in kinds:
            return "some of its layers have a sliding window, and this class has no such list"
        window = getattr(fields, "sliding_window", None)
        if cls.sliding == "none" and window and not kinds:
            return f"it has a sliding window of {window} tokens, and this class has none"
        return None

    @classmethod
    def _shape_refusal(cls, dense: PretrainedConfig, shape: MoeShape) -> str | None:
        if shape.norm_topk not in cls.norm_choices:
            return (
                f"norm_topk={shape.norm_topk}: this class "
                f"{'always' if cls.norm_choices == (True,) else 'never'} normalises the weights"
            )
        if shape.dense_layers and not cls.partial_layers:
            return "dense_layers: this class has a mixture in every layer"
        outside = [i for i in shape.dense_layers if not 0 <= i < dense.num_hidden_layers]
        if outside:
            return f"dense_layers {outside}: the base has {dense.num_hidden_layers} layers"
        return None

    def config(self) -> PretrainedConfig:
        """Return the configuration of the mixture."""
        cls: Any = getattr(transformers, self.architecture).config_class
        fields = {k: getattr(self.dense, k) for k in COMMON if hasattr(self.dense, k)}
        if fields.get("rope_parameters"):
            fields["rope_parameters"] = dict(fields["rope_parameters"])
        if self.shape.untie:
            fields["tie_word_embeddings"] = False
        config = cls(**{**fields, **self.fields()})
        config.architectures = [self.architecture]
        return config

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """Return the fields that only this class has."""

    def json_fields(self) -> dict[str, Any]:
        """Return what goes into config.json besides the configuration, for other engines."""
        return {}

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.dense.tie_word_embeddings) and not self.shape.untie

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return head_dim(self.dense)

    def moe_layers(self) -> list[int]:
        """Return the layers that hold a mixture."""
        layers = range(self.dense.num_hidden_layers)
        return [layer for layer in layers if layer not in self.shape.dense_layers]

    def copies(self, name: str) -> tuple[Copy, ...]:
        """Return what a tensor of the dense checkpoint becomes; nothing if it is not copied."""
        if is_ffn(name):
            return (Copy(name),) if ffn_layer(name) in self.shape.dense_layers else ()
        if name.endswith("rotary_emb.inv_freq"):
            return ()
        if self.dense.tie_word_embeddings:
            if name == "lm_head.weight":
                return ()
            if name == "model.embed_tokens.weight" and self.shape.untie:
                return (Copy(name), Copy("lm_head.weight"))
        return copies(self.dense, name)

    def _start(self, layer: int) -> str:
        return f"{prefix(layer)}{self.moe}."

    def _matrices(self, width: int) -> Glu[tuple[int, int]]:
        rows, columns = (width, self.dense.hidden_size), (self.dense.hidden_size, width)
        return Glu(rows, rows, columns)

    def router(self, layer: int) -> Place:
        """Return where the gate, E x D, of a layer is."""
        matrix = (self.shape.num_experts, self.dense.hidden_size)
        return Place(self._start(layer) + self.router_name, matrix, matrix)

    def expert(self, layer: int, expert: int) -> Glu[Place]:
        """Return where the matrices of one expert are."""
        start = self._start(layer)
        named = zip(self.expert_names, self._matrices(self.shape.expert_width), strict=True)
        return Glu(*(Place(start + n.format(expert=expert), m, m) for n, m in named))

    def shared(self, layer: int) -> Glu[Place] | None:
        """Return where the always-on expert is; None if the mixture has none."""
        if self.shape.shared_width == 0:
            return None
        return self._shared(layer, self.shape.shared_width)

    def _shared(self, layer: int, width: int) -> Glu[Place]:
        assert self.shared_names is not None
        named = zip(self.shared_names, self._matrices(width), strict=True)
        return Glu(*(Place(self._start(layer) + n, m, m) for n, m in named))

    @property
    def shared_down_scale(self) -> float:
        """What the shared expert's down_proj must be multiplied by to count once."""
        return 1.0

    def fills(self, layer: int) -> tuple[Fill, ...]:
        """Return tensors that the class has and a mixture does not need, with their value."""
        return ()

    def places(self, layer: int) -> Iterator[Place]:
        """Iterate over everything of a layer's mixture that comes from weights."""
        yield self.router(layer)
        for expert in range(self.shape.num_experts):
            yield from self.expert(layer, expert)
        yield from self.shared(layer) or ()

    @property
    def full_width(self) -> int:
        """FFN width of the base."""
        return ffn_width(self.dense)
