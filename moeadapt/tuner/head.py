"""One router at work in a model: routes, attaches the balance losses, counts.

Letters: T tokens, D width, E experts.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from moeadapt import aux_loss, stats
from moeadapt.balance import BalanceConfig, Mixture
from moeadapt.errors import UnsupportedError
from moeadapt.experts import ExpertBank
from moeadapt.routers import Router, RouterConfig, route
from moeadapt.routers.linear import LinearRouter
from moeadapt.routing import Routing
from moeadapt.schedule import ScheduleConfig, ScheduleValues
from moeadapt.tuner.context import RoutingContext
from moeadapt.tuner.decisions import decide_once


class RouterHead:
    """What a layer calls to have its tokens routed.

    The router itself lives in the layer and is looked up at each use: wrappers may replace it.

    Attributes:
        name: path of the layer or block it routes for.
        context: what all routers of the model share.
        balance: the losses it attaches, by name.
        banks: the experts it routes to, those that see its hidden states first.
        expert_dropout: share of the weights set to zero in training, the others scaled up.
        schedule: what changes in training; None: nothing.
        step: the optimizer step whose training values are in use; None: those of inference are,
            in both modes.
        values: the values in use in training mode.
        optimizer_attached: whether an optimizer knows of the schedule.
        followed_step: the last optimizer step that was followed; None: none, or nobody counts.
    """

    def __init__(
        self,
        name: str,
        routers: nn.ModuleDict,
        adapter: str,
        balance: Mapping[str, BalanceConfig],
        context: RoutingContext,
    ) -> None:
        """Look at `routers[adapter]`."""
        self.name = name
        self.balance = dict(balance)
        self._routers = routers
        self._adapter = adapter
        self.context = context
        self.banks: list[ExpertBank] = []
        self.expert_dropout = 0.0
        self.schedule: ScheduleConfig | None = None
        self.step: int | None = None
        self.values = ScheduleValues()
        self._router_config: RouterConfig | None = None
        self._freezing: list[RemovableHandle] = []
        self._told = False
        self.optimizer_attached = False
        self.followed_step: int | None = None
        self._sink: Tensor | None = None
        self._seen: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Counts belong to this run, not to a copy."""
        fresh = {"_sink": None, "_seen": None, "_freezing": [], "_told": False}
        return {**self.__dict__, **fresh, "optimizer_attached": False, "followed_step": None}

    @property
    def router(self) -> Router:
        """The router module."""
        return self._routers[self._adapter]  # type: ignore[return-value]

    @property
    def sums_to_one(self) -> bool:
        """Whether each token's weights sum to one."""
        overridden = self.context.override is not None
        return self.router.sums_to_one and not self.expert_dropout and not overridden

    @property
    def max_active(self) -> int:
        """Upper bound on the experts of one token."""
        overridden = self.context.override is not None
        return self.router.num_experts if overridden else self.router.max_active

    def __call__(self, hidden: Float[Tensor, "*T D"]) -> Float[Tensor, "T E"]:
        """Return the weights of `hidden`'s tokens, with the balance losses attached.

        Raises:
            UnsupportedError: tokens are generated with a router that looks ahead, or a decision
                per sequence cannot be kept.
            TrainingError: see `RoutingContext.tokens` and `RoutingContext.check_scale`.
        """
        router = self.router
        routing = self._route(router, hidden)
        collected, override = self.context.collected, self.context.override
        if override is not None:
            routing = override(self.name, routing)
        if collected is not None and not torch.compiler.is_compiling():
            collected.setdefault(self.name, []).append(routing.detach())
        weights = routing.expert_weights
        if self.expert_dropout and router.training:
            weights = F.dropout(weights, self.expert_dropout)
        if not (router.training and torch.is_grad_enabled()):
            return weights
        self._check_step()
        return self._attach(weights, routing, hidden)

    def _route(self, router: Router, hidden: Float[Tensor, "*T D"]) -> Routing:
        frame = self.context.frame
        if not router.causal and frame is not None and frame.generates:
            raise UnsupportedError(
                f"{type(router).__name__} cannot generate: it routes a token by the tokens that "
                "follow it, which do not exist yet. Use it for training analyses and encoders; "
                "to generate, train with a router that decides per token, such as top_k."
            )
        flat = hidden.reshape(-1, hidden.shape[-1])
        tokens = self.context.tokens(hidden, router.all_needs())
        per_sequence = router.per == "sequence"
        if per_sequence and frame is not None and (frame.generates or not router.training):
            if not torch.compiler.is_compiling():
                key = f"{self._adapter}/{self.name}"
                return decide_once(frame, key, hidden, lambda: route(router, flat, tokens))
            if frame.generates:
                raise UnsupportedError(
                    "a compiled graph cannot keep the decision that a router makes per sequence; "
                    "generate without torch.compile and without a static cache"
                )
        return route(router, flat, tokens)

    def _attach(
        self, weights: Float[Tensor, "T E"], routing: Routing, hidden: Tensor
    ) -> Float[Tensor, "T E"]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        mixture = Mixture(router=self.router, banks=self.banks, hidden=flat)
        losses = [config.loss(routing, mixture) for config in self.balance.values()]
        total = weights.new_zeros(())
        for config, loss in zip(self.balance.values(), losses, strict=True):
            total = total + config.coefficient(mixture.router) * loss
        if total.requires_grad:
            self.context.check_scale(hidden, self.router)
        sink = self.sink(weights.device)
        if sink is None:
            sink = packed = torch.zeros_like(total)
        else:
            packed = stats.pack(routing, losses)
            if mixture.router.record_size:
                record = mixture.router.record(routing, mixture.hidden)
                packed = torch.cat([packed, record.float()])
        share = len(self.context.heads[self._adapter])
        weights = aux_loss.attach(
            weights,
            total / share,
            scale=self.context.scale(total.device),
            stats=packed,
            sink=sink,
        )
        self.context.watch_backward(weights)
        return weights

    def sink(self, device: torch.device) -> Tensor | None:
        """Return the tensor whose `grad` collects the counts; None where it cannot be made.

        A compiled graph cannot create a leaf: `inspect.prepare_stats` does so beforehand.
        """
        if self._sink is None or self._sink.device != device:
            if torch.compiler.is_compiling():
                return None
            self._sink = torch.zeros(self.packed_size, device=device, requires_grad=True)
        return self._sink

    @property
    def packed_size(self) -> int:
        """Length of the counts: those of `stats.pack`, and the router's own record."""
        return stats.packed_size(self.router.width, len(self.balance)) + self.router.record_size

    def unpack(self, counts: Float[Tensor, " S"]) -> stats.RouterStats:
        """Turn a sum of counts into averages."""
        own = counts[: len(counts) - self.router.record_size]
        return stats.unpack(own, len(self.balance), self.router.null_experts)

    # --- the schedule

    def follow(self, schedule: ScheduleConfig | None, router_config: RouterConfig) -> None:
        """Use the inference values of `schedule` until a step is set."""
        self.schedule, self._router_config = schedule, router_config
        self._use(None)

    def set_step(self, step: int | None) -> None:
        """Use the values of optimizer step `step` in training; None: those of inference."""
        if step != self.step:
            self._use(step)

    def _use(self, step: int | None) -> None:
        self.step = step
        schedule, config, router = self.schedule, self._router_config, self.router
        if schedule is None or config is None:
            return
        inference = schedule.inference(config)
        self.values = inference if step is None else schedule.at(step, config)
        self.expert_dropout = self.values.expert_dropout
        if isinstance(router, LinearRouter):
            router.use(training=self.values.settings(config), inference=inference.settings(config))
        self._freeze(self.values.frozen)

    def _freeze(self, frozen: bool) -> None:
        """Hide the router's gradient, also from a norm that is taken over all gradients.

        It stays trainable: DDP waits for the gradient of each trainable parameter.
        """
        if frozen == bool(self._freezing):
            return
        for handle in self._freezing:
            handle.remove()
        trained = [p for p in self.router.parameters() if p.requires_grad]
        self._freezing = [p.register_hook(torch.zeros_like) for p in trained] if frozen else []

    @property
    def trains(self) -> bool:
        """Whether the experts are trained, not only used."""
        return any(
            parameter.requires_grad
            for bank in self.banks
            for name in bank.factor_names
            for parameter in bank.factor(name).parameters()
        )

    def _check_step(self) -> None:
        """Notice a training loop that does not say at which step it is."""
        is_told = self.step is not None or self._told
        if self.schedule is None or is_told or torch.compiler.is_compiling() or not self.trains:
            return
        self._told = True
        warnings.warn(
            "this adapter has a schedule, but nobody says at which optimizer step the training is, "
            "so the values of inference are used. Use a trainer of moeadapt.training, or add "
            "MoeAdaptCallback() to yours, or call moeadapt.step_schedule(model, step) before each "
            "step",
            stacklevel=2,
        )

    # --- counts

    def pop_counts(self) -> Float[Tensor, " S"] | None:
        """Return the sum of all counts since the last call, still on the device, and reset it."""
        if self._sink is None or self._sink.grad is None:
            return None
        counts, self._sink.grad, self._seen = self._sink.grad, None, None
        return counts

    def counts(self) -> Float[Tensor, " S"] | None:
        """Return a copy of the counts since the last `pop_counts`."""
        found = None if self._sink is None else self._sink.grad
        return None if found is None else found.clone()

    def set_counts(self, counts: Float[Tensor, " S"] | None) -> None:
        """Go back to counts that were returned between two optimizer steps."""
        if self._sink is None:
            return
        self._sink.grad = None if counts is None else counts.to(self._sink, copy=True)
        self._seen = None if counts is None else counts.to(self._sink, copy=True)

    def step_counts(self) -> Float[Tensor, " S"] | None:
        """Return the counts since the last call or `pop_counts`, without resetting them."""
        if self._sink is None or self._sink.grad is None:
            return None
        seen, self._seen = self._seen, self._sink.grad.clone()
        return self._seen if seen is None else self._seen - seen

    @property
    def acts_after_step(self) -> bool:
        """Whether something of this router changes after an optimizer step."""
        if self.router.frozen or not self.trains:
            return False
        return self.router.acts_after_step or any(c.acts_after_step for c in self.balance.values())

    def after_step(self, counts: Float[Tensor, " S"]) -> None:
        """Let losses and router change what gradients do not train; not while it is frozen.

        Args:
            counts: the counts of this optimizer step, over all processes.
        """
        if self.values.frozen:
            return
        own, record = counts.split([len(counts) - self.router.record_size, self.router.record_size])
        tokens, uses = stats.packed_uses(own, len(self.balance))
        for config in self.balance.values():
            config.after_step(self.router, tokens, uses)
        self.router.after_step(tokens, uses, record)
