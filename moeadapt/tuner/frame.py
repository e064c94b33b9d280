"""One forward of the whole model: what was passed to it that routers may ask for.

Letters: B rows, S tokens of a row, T = B * S tokens.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moeadapt.errors import UnsupportedError
from moeadapt.routing import Routing, TokenContext


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The arguments of one call of the model or its backbone.

    Attributes:
        module_id: identity of the module that was called.
        mask: 2-D padding mask [B, S], or with a KV cache [B, past + S].
        token_ids: [B, S]; None when embeddings were passed instead.
        positions: position ids [B or 1, S]; a position of 0 starts a packed sequence.
        shape: (B, S), where known.
        cache: the KV cache that was passed in.
        has_past: whether that cache held tokens before this call.
        generates: whether tokens are being generated.
        decisions: router -> one routing per row, for routers that decide per sequence.
    """

    module_id: int
    mask: Tensor | None = None
    token_ids: Tensor | None = None
    positions: Tensor | None = None
    shape: tuple[int, int] | None = None
    cache: Any = None
    has_past: bool = False
    generates: bool = False
    decisions: dict[str, Routing] = field(default_factory=dict)

    @staticmethod
    def of(
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        ask_cache: bool = False,
    ) -> "Frame":
        """Read the arguments of a call of `module`.

        Args:
            module: the model or its backbone.
            args: its positional arguments.
            kwargs: its keyword arguments.
            ask_cache: find out whether the cache holds tokens, which may wait for the device.
        """
        given = dict(kwargs)
        if args:
            given.update(zip(inspect.signature(module.forward).parameters, args, strict=False))
        ids, embeds = _two_dims(given.get("input_ids")), given.get("inputs_embeds")
        mask = _two_dims(given.get("attention_mask"))
        sized = next((t for t in (ids, embeds, mask) if isinstance(t, Tensor)), None)
        cache = given.get("past_key_values")
        last_only = not module.training and given.get("logits_to_keep") == 1
        return Frame(
            module_id=id(module),
            mask=mask,
            token_ids=ids,
            positions=_two_dims(given.get("position_ids")),
            shape=None if sized is None else (sized.shape[0], sized.shape[1]),
            cache=cache,
            has_past=ask_cache and _holds_tokens(cache),
            generates=cache is not None or last_only,
        )

    def tokens(self, hidden: Tensor, needs: frozenset[str]) -> TokenContext:
        """Return what is known about the tokens of `hidden` [..., D], flattened.

        Raises:
            UnsupportedError: something needed was not passed to the model.
        """
        return TokenContext(
            mask=_fit(self.mask, hidden),
            sequences=self._sequences(hidden) if "sequences" in needs else None,
            token_ids=self._token_ids(hidden) if "token_ids" in needs else None,
        )

    def fits(self, hidden: Tensor) -> bool:
        """Whether a call with this mask can have produced `hidden`."""
        return self.mask is None or _fit(self.mask, hidden) is not None

    def rows(self, hidden: Tensor) -> tuple[int, int]:
        """Return (B, S) of `hidden`.

        Raises:
            UnsupportedError: nothing says how its tokens are divided into rows.
        """
        if hidden.dim() == 3 and self.shape in (None, tuple(hidden.shape[:2])):  # noqa: PLR2004
            return hidden.shape[0], hidden.shape[1]
        tokens = hidden.reshape(-1, hidden.shape[-1]).shape[0]
        if self.shape is None or self.shape[0] * self.shape[1] != tokens:
            raise UnsupportedError(
                f"this router looks at whole sequences, and the {tokens} tokens of hidden states "
                f"{tuple(hidden.shape)} are not all of the model's tokens {self.shape}: a layer "
                "such as lm_head or a pooler sees a part of them. Add that layer to "
                "exclude_modules, or use a router that decides per token"
            )
        return self.shape

    def _sequences(self, hidden: Tensor) -> Tensor:
        rows, length = self.rows(hidden)
        starts = torch.zeros(rows, length, dtype=torch.int64, device=hidden.device)
        starts[:, 0] = 1
        if self.positions is not None and self.positions.shape[1] == length:
            starts = starts | (self.positions.to(hidden.device) == 0)
        return starts.flatten().cumsum(0) - 1

    def _token_ids(self, hidden: Tensor) -> Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1]).shape[0]
        if self.token_ids is None or self.token_ids.numel() != tokens:
            raise UnsupportedError(
                "this router needs the token ids, and the model was called without input_ids (or "
                "with others than the ones that were routed, as in a pooler: add that layer to "
                "exclude_modules); or use a router that needs none"
            )
        return self.token_ids.reshape(-1).to(hidden.device)


def same(a: TokenContext, b: TokenContext) -> bool:
    """Whether two contexts say the same; looks at the values."""
    pairs = ((a.mask, b.mask), (a.sequences, b.sequences), (a.token_ids, b.token_ids))
    return all(
        x is y or (x is not None and y is not None and x.shape == y.shape and torch.equal(x, y))
        for x, y in pairs
    )


def _holds_tokens(cache: Any) -> bool:
    if torch.compiler.is_compiling() or not hasattr(cache, "get_seq_length"):
        return False
    return int(cache.get_seq_length()) > 0


def _two_dims(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.dim() == 2 else None  # noqa: PLR2004


def _fit(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Flatten the part of a 2-D mask that covers the tokens of `hidden`; None: it does not fit."""
    if mask is None:
        return None
    if hidden.dim() == 3 and hidden.shape[0] == mask.shape[0]:  # noqa: PLR2004
        length = hidden.shape[1]
        if length <= mask.shape[1]:
            # With a KV cache the mask also covers the past: its tail is what runs now.
            return mask[:, mask.shape[1] - length :].reshape(-1).bool()
    if hidden.dim() == 2 and hidden.shape[0] == mask.numel():  # noqa: PLR2004
        return mask.reshape(-1).bool()
    return None
