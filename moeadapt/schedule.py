"""What changes in a router while it is trained: pure functions of the optimizer step.

Nothing here is saved with a checkpoint: resuming at a step gives that step's values. Step 0 is the
first optimizer step.

Source: dense to sparse by temperature and k: Nie et al. 2021 (EvoMoE),
https://arxiv.org/abs/2112.14397, section 3.3; two stages, the second with a frozen router: Dai et
al. 2022 (StableMoE), https://arxiv.org/abs/2204.08396, section 3.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from moeadapt.errors import ConfigError
from moeadapt.registry import ComponentConfig, explain
from moeadapt.routers import ROUTERS, RouterConfig
from moeadapt.routers.linear import LinearRouterConfig
from moeadapt.routers.scheduled import RouterSettings
from moeadapt.routers.top_k import TopKConfig

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Steps = Annotated[int, Field(ge=1)]


class TemperatureRamp(ComponentConfig):
    """A temperature that moves from one value to another.

    Attributes:
        start: what logits are divided by at step 0, > 0.
        end: the same from step `steps` on and at inference, > 0; None: the router's own.
        steps: optimizer steps from start to end, >= 1.
        shape: `linear`; `cosine`, half a wave, slow at both ends; `exponential`, by an equal factor
            each step.
    """

    start: Annotated[float, Field(gt=0.0)]
    end: Annotated[float, Field(gt=0.0)] | None = None
    steps: Steps
    shape: Literal["linear", "cosine", "exponential"] = "linear"

    def at(self, step: int, end: float) -> float:
        """Return the temperature of `step`, for a ramp that ends in `end`."""
        done = min(step / self.steps, 1.0)
        if done == 1.0:
            return end
        if self.shape == "exponential":
            return math.exp((1 - done) * math.log(self.start) + done * math.log(end))
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start * (1 - done) + end * done


class KRamp(ComponentConfig):
    """Experts per token that move from one number to another, each number for equally long.

    Attributes:
        start: experts per token at step 0, 1 to the number of experts.
        end: the same from step `steps` on, 1 to the number of experts; None: the router's own.
        steps: optimizer steps from start to end, >= 1.
    """

    start: Annotated[int, Field(ge=1)]
    end: Annotated[int, Field(ge=1)] | None = None
    steps: Steps

    def at(self, step: int, end: int) -> int:
        """Return the experts per token at `step`, for a ramp that ends in `end`."""
        moved = abs(end - self.start) * min(step, self.steps) // self.steps
        return self.start + (moved if end > self.start else -moved)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleValues:
    """The values of one step.

    Attributes:
        temperature: what logits are divided by; None: the router's own.
        k: experts per token; None: the router's own.
        gate_dropout: share of logits hidden, in [0, 1).
        expert_dropout: share of weights set to zero, in [0, 1).
        frozen: whether this step leaves the routers as they are.
        rate: what the routers' learning rate is multiplied by, in (0, 1].
    """

    temperature: float | None = None
    k: int | None = None
    gate_dropout: float = 0.0
    expert_dropout: float = 0.0
    frozen: bool = False
    rate: float = 1.0

    def settings(self, config: RouterConfig) -> RouterSettings:
        """Return them as a router takes them, its own values filled in."""
        own_k = getattr(config, "k", None) if config.k_can_change else None
        return RouterSettings(
            temperature=self.temperature or getattr(config, "temperature", 1.0),
            k=self.k or own_k,
            gate_dropout=self.gate_dropout,
        )


class ScheduleConfig(ComponentConfig):
    """What changes in training; outside it the last values hold, without any dropout.

    Evaluation during training already uses the values of inference: what is measured is the model
    as it would be used, not as it is trained at the moment.

    Attributes:
        temperature: `{start, end, steps, shape}`, see `TemperatureRamp`; for routers with a gate.
        k: `{start, end, steps}`, see `KRamp`; for routers with a number of experts per token.
        k_inference: experts per token outside training, 1 to the number of experts; None: as at
            the end of training.
        freeze_router_steps: the first so many optimizer steps do not train the routers, >= 0.
        freeze_router_after: from this optimizer step on the routers are not trained, >= 1; None:
            never.
        router_warmup_steps: optimizer steps, >= 0, from the first that trains the routers, over
            which their learning rate grows linearly to what it is without: 1/n, 2/n, ... 1.
        expert_dropout: training only: share of a token's weights set to zero, the others divided
            by what is left, in [0, 1).
        gate_dropout: training only: share of logits hidden, so that other experts are tried, in
            [0, 1); for routers with a gate.
    """

    temperature: TemperatureRamp | None = None
    k: KRamp | None = None
    k_inference: Annotated[int, Field(ge=1)] | None = None
    freeze_router_steps: Annotated[int, Field(ge=0)] = 0
    freeze_router_after: Steps | None = None
    router_warmup_steps: Annotated[int, Field(ge=0)] = 0
    expert_dropout: Share = 0.0
    gate_dropout: Share = 0.0

    @model_validator(mode="after")
    def _trains_sometime(self) -> "ScheduleConfig":
        after = self.freeze_router_after
        if after is not None and after <= self.freeze_router_steps:
            raise ValueError(
                f"freeze_router_after={after} is not behind "
                f"freeze_router_steps={self.freeze_router_steps}, so the routers would never be "
                "trained; use the router's own option freeze=True for that"
            )
        return self

    @property
    def acts_on_optimizer(self) -> bool:
        """Whether an optimizer step has to know of it."""
        return bool(
            self.freeze_router_steps or self.freeze_router_after or self.router_warmup_steps
        )

    def at(self, step: int, router: RouterConfig) -> ScheduleValues:
        """Return the training values of optimizer step `step`, counted from 0."""
        end = self.inference(router)
        last = self.freeze_router_after
        thawed = step - self.freeze_router_steps + 1
        warmup = max(self.router_warmup_steps, 1)
        k = self.k
        return ScheduleValues(
            temperature=self.temperature.at(step, end.temperature or 1.0)
            if self.temperature
            else None,
            k=k.at(step, k.end or own_k(router)) if k else None,
            gate_dropout=self.gate_dropout,
            expert_dropout=self.expert_dropout,
            frozen=thawed <= 0 or (last is not None and step >= last),
            rate=min(max(thawed, 1), warmup) / warmup,
        )

    def inference(self, router: RouterConfig) -> ScheduleValues:
        """Return the values outside training."""
        ramp = self.temperature
        return ScheduleValues(
            temperature=(ramp.end or getattr(router, "temperature", 1.0)) if ramp else None,
            k=self.k_inference or (self.k.end if self.k else None),
        )

    def fit(self, router: RouterConfig, num_experts: int) -> RouterConfig:
        """Refuse a router that this schedule does not fit; return it, ready for every k.

        `top_k` decides by its `k` whether weights are renormalised. Here the smallest k of the
        training decides, once for all, so that the size of the weights does not jump.

        Args:
            router: the router's settings.
            num_experts: experts of the router.

        Raises:
            ConfigError: the router has nothing that this schedule could change, or a k is out of
                range.
        """
        for name, value in (("temperature", self.temperature), ("gate_dropout", self.gate_dropout)):
            if value and not isinstance(router, LinearRouterConfig):
                able = [n for n, cls in ROUTERS.items() if issubclass(cls, LinearRouterConfig)]
                raise _unfit(name, router, able)
        if self.acts_on_optimizer and getattr(router, "freeze", False):
            raise ConfigError(
                "schedule: freeze_router_steps, freeze_router_after and router_warmup_steps have "
                "no effect on a router with freeze=True; leave one of them out"
            )
        return self._fit_k(router, num_experts)

    def _fit_k(self, router: RouterConfig, num_experts: int) -> RouterConfig:
        if self.k is None and self.k_inference is None:
            return router
        if not router.k_can_change:
            able = [name for name, cls in ROUTERS.items() if cls.k_can_change]
            raise _unfit("k" if self.k else "k_inference", router, able)
        own = own_k(router)
        limit = num_experts + getattr(router, "null_experts", 0)
        trained = [self.k.start, self.k.end or own] if self.k else [own]
        for name, value in (
            ("k.start", trained[0]),
            ("k.end", trained[-1]),
            ("k_inference", self.k_inference or 1),
        ):
            if value > limit:
                raise ConfigError(
                    f"schedule: {name}={value} is larger than num_experts={num_experts}; choose "
                    f"{name} in 1..{limit}"
                )
        least = min(trained)
        if isinstance(router, TopKConfig) and router.normalize is None:
            fixed = {"normalize": "none" if least == 1 else "renorm"}
            return ROUTERS.parse({**ROUTERS.spec(router), **fixed})
        if self.k and least == 1 and _constant_at_one(router):
            warnings.warn(
                f"schedule: k reaches 1 and router {ROUTERS.name_of(router)!r} divides the weights "
                "by their sum, so each is 1 there and the task loss no longer trains the router; "
                "stop at k=2, or choose weights that are not renormalised",
                stacklevel=2,
            )
        return router


def parse_schedule(spec: object) -> ScheduleConfig | None:
    """Build a schedule from plain data; None: none.

    Raises:
        ConfigError: an unknown field, or a value of the wrong type or out of range.

    Example:
        >>> parse_schedule({"k": {"start": 4, "end": 1, "steps": 300}}).k.at(100, 1)
        3
    """
    if spec is None or isinstance(spec, ScheduleConfig):
        return spec
    if not isinstance(spec, Mapping):
        raise ConfigError(
            "schedule must be a mapping like {'k': {'start': 4, 'end': 2, 'steps': 100}}, not "
            f"{type(spec).__name__}"
        )
    fields: dict[str, Any] = dict(spec)
    ramps: dict[str, type[ComponentConfig]] = {"temperature": TemperatureRamp, "k": KRamp}
    for name, cls in ramps.items():
        if isinstance(fields.get(name), Mapping):
            fields[name] = _validated(cls, fields[name], f"schedule.{name}")
    return _validated(ScheduleConfig, fields, "schedule")


def own_k(router: RouterConfig) -> int:
    """Return the experts per token of a router that has such a number."""
    assert router.k_can_change
    return getattr(router, "k")  # noqa: B009


def _validated(cls: type[Any], fields: Any, where: str) -> Any:
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(explain(error, where, cls.model_fields)) from None


def _unfit(field: str, router: RouterConfig, able: list[str]) -> ConfigError:
    return ConfigError(
        f"schedule: router {ROUTERS.name_of(router)!r} has nothing that {field} could change; "
        f"routers that have: {sorted(able)}"
    )


def _constant_at_one(router: RouterConfig) -> bool:
    if getattr(router, "freeze", False):
        return False
    if isinstance(router, TopKConfig):
        return router.resolved_normalize() != "none"
    return bool(getattr(router, "renorm", True))
