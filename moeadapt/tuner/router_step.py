"""The gate of a router while tokens are generated: its weights, in few operations.

Letters: T tokens, D width, E experts, R width of the rank axes that are computed with the gate.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks

from moeadapt.routers import Router

if TYPE_CHECKING:
    from moeadapt.tuner.head import RouterHead

GLOBAL_HOOKS = (hooks._global_forward_hooks, hooks._global_forward_pre_hooks)


class Transient:
    """Belongs to a running generation: a copy or a pickle of its owner has None instead."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None


class RouterStep(Transient):
    """The gate of a router, without what only statistics need.

    Attributes:
        weight: of the gate.
    """

    def __init__(self, head: "RouterHead", router: Router, weight: Tensor) -> None:
        """Remember the router of `head`; see `of`."""
        self._head, self._context = head, head.context
        self._router, self.weight = router, weight
        self._hooks = (*hooks_of(router), *GLOBAL_HOOKS)

    @classmethod
    def of(cls, head: "RouterHead") -> "RouterStep | None":
        """Return the short way of a router, or None: it has none, or may not be read from here."""
        router: Any = head.router
        if not isinstance(router, Router) or not router.decodes:
            return None
        weight = router._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.is_meta or not weight.numel():
            return None  # sharded or elsewhere
        # A gate that was cast to half would have to be computed as such, by its wrapper's rules.
        fits = weight.dtype in (torch.float32, torch.float64) and not hasattr(weight, "ds_id")
        return cls(head, router, weight) if fits else None

    def holds(self, x: Tensor) -> bool:
        """Whether the short way may be taken for these tokens."""
        context, router = self._context, self._router
        return (
            context.collected is None
            and context.override is None
            and not router.training
            and not any(self._hooks)
            and self._head.router is router
            and "forward" not in router.__dict__
            and router._parameters.get("weight") is self.weight
            and not self.weight.is_meta
            and router.decodes
            and context.generation.keeps
            and not torch.is_autocast_enabled(x.device.type)
        )

    def __call__(
        self, x: Float[Tensor, "T D"], others: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T R"] | None]:
        """Return the weights, and the tokens times all of `others`, in one product if it can be."""
        router, weight, hidden = self._router, self.weight, None
        pack = self._context.generation.pack
        if others and weight.dtype == x.dtype:
            both = F.linear(x, pack((weight, *others), x.dtype))
            logits, hidden = both[:, : weight.shape[0]], both[:, weight.shape[0] :]
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(wide), weight.to(wide))
            if others:
                hidden = F.linear(x, pack(others, x.dtype))
        bias: Any = router.bias
        return router.decode(logits if bias is None else logits + bias.to(logits.dtype)), hidden


def hooks_of(module: nn.Module) -> tuple[Any, Any]:
    """Return what must stay empty: the hooks that see a module's forward."""
    return module._forward_hooks, module._forward_pre_hooks
