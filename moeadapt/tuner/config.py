"""`MoeLoraConfig`: goes wherever PEFT's `LoraConfig` goes."""

import re
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, no_type_check

from peft import PeftConfig
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from moeadapt.balance import BalanceConfig, parse_balance
from moeadapt.errors import ConfigError, did_you_mean
from moeadapt.experts import EXPERTS, ExpertConfig
from moeadapt.routers import ROUTERS, RouterConfig
from moeadapt.schedule import ScheduleConfig, parse_schedule
from moeadapt.tuner.preset import preset_fields
from moeadapt.tuner.register import extend_peft_type
from moeadapt.version import FORMAT_VERSION, __version__

Positive = Annotated[int, Field(ge=1)]
Names = list[str] | set[str] | str


# It checks its own fields, with better words than the run-time type checks of the tests.
@no_type_check
@dataclass
class MoeLoraConfig(PeftConfig):
    """Settings of a mixture of LoRA experts.

    Attributes:
        r: rank of ONE expert, >= 1; with `glu` that of the unrouted LoRA only.
        lora_alpha: deltas are scaled by lora_alpha / r, > 0; see `r`.
        num_experts: routed experts per router, >= 1.
        experts_pattern: numbers of experts that differ, overriding `num_experts`: module name or
            regex -> number, or a list, for as many equal groups of layers from the first to the
            last (MoLA, https://arxiv.org/abs/2402.08562). The targets of one block must agree.
        granularity: G >= 1: each expert is cut into G of rank r / G, and the router's `k` is
            multiplied by G; the scale stays lora_alpha / r (DeepSeekMoE,
            https://arxiv.org/abs/2401.06066).
        router: a name of `moeadapt.ROUTERS`, or `{"name": ..., **options}`.
        balance: `{name: coefficient}` or `{name: {"coef": ..., **options}}` over
            `moeadapt.BALANCE`; averaged over routers and added to the task loss's gradient.
        schedule: what changes in training, fields of `moeadapt.schedule.ScheduleConfig`, for
            example `{"k": {"start": 4, "end": 2, "steps": 100}}`.
        experts: a name of `moeadapt.EXPERTS`, or `{"name": ..., **options}`.
        placement: `linear`: every target linear mixes its own deltas; `ffn`: experts span the
            whole FFN, attention targets get an unrouted LoRA beside them; `glu`: small gated FFNs
            beside the frozen FFN, `FFN(x) + scale * sum_e w_e down_e(act(gate_e x) * up_e x)`, with
            `experts={"name": "glu", "dim": width}`, attention targets as with `ffn`.
        router_scope: for `linear`: `layer`, a router per target linear, or `block`, one routing
            from the block's input for all target linears of an attention or FFN block. `ffn` and
            `glu` have a router per FFN.
        impl: how a linear's experts are computed: `auto` chooses by sizes and device, `concat` is
            two matrix products over all experts, `grouped` one per chosen expert after sorting,
            `gather` copies the chosen experts of each token, for decoding. All give the same
            result. `grouped` and `gather` are for `placement="linear"` and experts `lora` or
            `rank1`.
        n_shared: always-on experts beside the routed ones, >= 0.
        target_modules: as in `LoraConfig`: names, a regex, or "all-linear".
        exclude_modules: as in `LoraConfig`: names or a regex to leave out.
        layers_to_transform: as in `LoraConfig`: indices of the layers to adapt.
        layers_pattern: as in `LoraConfig`: name of the layer list, e.g. "layers".
        rank_pattern: module name or regex -> rank, overriding `r`.
        alpha_pattern: module name or regex -> alpha, overriding `lora_alpha`.
        modules_to_save: modules trained and saved in full beside the adapter.
        trainable_token_indices: token ids whose embeddings are trained.
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        lora_dropout: dropout on the experts' input, in [0, 1).
        init_lora_weights: True: zero B, the base output is unchanged; "gaussian": normal A, zero
            B; "orthogonal": zero B, rows of A orthogonal across experts, as many as
            fit into the input's width; "svd_segments": experts
            start from segments of the base weight (GOAT), with a scale of its own instead of
            lora_alpha / r; False: nothing is zero (for tests).
        bias: only "none".
        target_parameters: only None; fused expert parameters are not supported yet.
        format_version: version of the saved adapter format.
        moeadapt_version: version that wrote the adapter, filled in.
        base_fingerprint: what identifies the base, filled in when the adapter is published.

    Raises:
        ConfigError: a field has the wrong type, is out of range, or contradicts another.

    Example:
        >>> from moeadapt import MoeLoraConfig
        >>> config = MoeLoraConfig(r=4, num_experts=8, router={"name": "top_k", "k": 2})
        >>> config.router["k"]
        2
    """

    r: Positive = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16
    num_experts: Positive = 8
    experts_pattern: dict[str, Positive] | list[Positive] | None = None
    granularity: Positive = 1
    router: str | dict[str, Any] = "top_k"
    balance: dict[str, Any] | None = field(default_factory=lambda: {"switch": 0.01})
    schedule: dict[str, Any] | None = None
    experts: str | dict[str, Any] = "lora"
    placement: Literal["linear", "ffn", "glu"] = "linear"
    router_scope: Literal["layer", "block"] = "layer"
    impl: Literal["auto", "concat", "grouped", "gather"] = "auto"
    n_shared: Annotated[int, Field(ge=0)] = 0
    target_modules: Names | None = None
    exclude_modules: Names | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Positive] = field(default_factory=dict)
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_rslora: bool = False
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "svd_segments"] = True
    bias: Literal["none"] = "none"
    target_parameters: list[str] | None = None
    format_version: Positive = FORMAT_VERSION
    moeadapt_version: str | None = None
    base_fingerprint: dict[str, int | str] | None = None

    def __post_init__(self) -> None:
        """Check every field, then put router, balance and experts into their full form."""
        for name, kinds in _INHERITED.items():
            if not isinstance(getattr(self, name), kinds):
                raise ConfigError(
                    f"MoeLoraConfig: {name}={getattr(self, name)!r} must be one of "
                    f"{[kind.__name__ for kind in kinds]}"
                )
        words = self.auto_mapping or {}
        if not all(isinstance(x, str | None) for pair in words.items() for x in pair):
            raise ConfigError(
                f"MoeLoraConfig: auto_mapping={words!r} must map names to names; leave it out, "
                "PEFT writes it"
            )
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(f"MoeLoraConfig: {error}") from None
        self.peft_type = extend_peft_type()
        if isinstance(self.format_version, int) and self.format_version > FORMAT_VERSION:
            raise ConfigError(
                f"format_version={self.format_version} needs moeadapt >= {self.moeadapt_version}, "
                f"which wrote this adapter; moeadapt {__version__} reads formats up to "
                f"{FORMAT_VERSION}. Upgrade with `pip install -U moeadapt`."
            )
        self._check_fields()
        self.moeadapt_version = self.moeadapt_version or __version__
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        self._check_components()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "MoeLoraConfig":
        """Make the config of a published method.

        Args:
            name: a name of `moeadapt.PRESETS`.
            overrides: fields that differ from it; how nested ones merge is said in
                `moeadapt.tuner.preset.preset_fields`.

        Raises:
            ConfigError: no such preset, or see the class.

        Example:
            >>> MoeLoraConfig.preset("mixlora", num_experts=4, router={"k": 1}).router["k"]
            1
        """
        known = {f.name for f in fields(cls) if f.init}
        for field_name in overrides:
            if field_name not in known:
                raise ConfigError(
                    f"preset {name!r}: MoeLoraConfig has no field {field_name!r}"
                    f"{did_you_mean(field_name, known)}"
                )
        return cls(**preset_fields(name, overrides))

    @property
    def router_config(self) -> RouterConfig:
        """The router's settings as a checked object."""
        return ROUTERS.parse(self.router)

    @property
    def balance_configs(self) -> dict[str, BalanceConfig]:
        """The balance losses as checked objects, by name."""
        return parse_balance(self.balance)

    @property
    def schedule_config(self) -> ScheduleConfig | None:
        """The schedule as a checked object; None: nothing changes."""
        return parse_schedule(self.schedule)

    @property
    def expert_config(self) -> ExpertConfig:
        """The expert type as a checked object."""
        return EXPERTS.parse(self.experts)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data; sets become sorted lists, so equal configs give equal files."""
        plain = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()}

    def _check_fields(self) -> None:
        for name, expected in _field_types().items():
            value = getattr(self, name)
            try:
                expected.validate_python(value, strict=True)
            except ValidationError as error:
                reasons = dict.fromkeys(item["msg"].lower() for item in error.errors())
                raise ConfigError(
                    f"MoeLoraConfig: {name}={value!r}: {', or '.join(reasons)}"
                ) from None

    def _check_components(self) -> None:
        # At the top these would import each other.
        from moeadapt.tuner.sizes import check_settings

        router, least = self.router_config, check_settings(self)
        schedule = self.schedule_config
        if schedule is not None:
            router = schedule.fit(router, least)
            self.schedule = schedule.model_dump(mode="json")
        self.router = ROUTERS.spec(router)
        self.experts = EXPERTS.spec(self.expert_config)
        self.balance = {
            name: loss.model_dump(mode="json") for name, loss in self.balance_configs.items()
        }
        for name in ("rank_pattern", "alpha_pattern", "experts_pattern"):
            check_patterns(name, getattr(self, name))
        if self.target_parameters:
            raise ConfigError(
                f"MoeLoraConfig: target_parameters={self.target_parameters!r} is not supported; "
                "target the linear layers of a dense base with target_modules"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(
                f"MoeLoraConfig: layers_to_transform={self.layers_to_transform!r} would be ignored "
                f"with target_modules={self.target_modules!r}; give target_modules as a list of "
                "names, or name the layers in a regex"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("MoeLoraConfig: layers_pattern needs layers_to_transform")


MOST_PATTERNS = 2048
"""Keys of one field of patterns: each is matched against every target."""


def check_patterns(name: str, patterns: Any, owner: str = "MoeLoraConfig") -> None:
    """Refuse a table with too many patterns, or with one that is none.

    Args:
        name: of the table.
        patterns: pattern -> value; anything else is not looked at.
        owner: whose table it is, named first in the message.

    Raises:
        ConfigError: names the table and the pattern.
    """
    if not isinstance(patterns, dict):
        return
    if len(patterns) > MOST_PATTERNS:
        raise ConfigError(
            f"{owner}: {name} has {len(patterns)} patterns; at most {MOST_PATTERNS} are matched. "
            "Put modules together by a regular expression"
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{owner}: {name}: {pattern!r} is not a valid regular expression: {error}"
            ) from None


_INHERITED: dict[str, tuple[type, ...]] = {
    "task_type": (str, type(None)),
    "base_model_name_or_path": (str, type(None)),
    "revision": (str, type(None)),
    "peft_version": (str, type(None)),
    "auto_mapping": (dict, type(None)),
    "inference_mode": (bool,),
}
"""Fields of PEFT's own, which it does not check."""


@cache
def _field_types() -> dict[str, Any]:  # beartype does not know TypeAdapter
    strict = ConfigDict(allow_inf_nan=False)
    inherited = {f.name for f in fields(PeftConfig)}
    types: dict[str, Any] = {f.name: f.type for f in fields(MoeLoraConfig)}
    return {k: TypeAdapter(t, config=strict) for k, t in types.items() if k not in inherited}


def _as_set(names: Names | None) -> set[str] | str | None:
    return set(names) if isinstance(names, (list, set)) else names
