"""`MoeLoraConfig`: goes wherever PEFT's `LoraConfig` goes."""

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, no_type_check

from peft import PeftConfig
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from moeadapt.balance import BalanceConfig, parse_balance
from moeadapt.errors import ConfigError
from moeadapt.experts import EXPERTS, ExpertConfig
from moeadapt.routers import ROUTERS, RouterConfig
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
        r: rank of ONE expert, >= 1.
        lora_alpha: deltas are scaled by lora_alpha / r, > 0.
        num_experts: routed experts per router, >= 1.
        router: a name of `moeadapt.ROUTERS`, or `{"name": ..., **options}`.
        balance: `{name: coefficient}` or `{name: {"coef": ..., **options}}` over
            `moeadapt.BALANCE`; averaged over routers and added to the task loss's gradient.
        experts: a name of `moeadapt.EXPERTS`, or `{"name": ..., **options}`.
        placement: `linear`: every target linear mixes its own deltas; `ffn`: experts span the
            whole FFN, attention targets get an unrouted LoRA beside them.
        router_scope: for `linear`: `layer`, a router per target linear, or `block`, one routing
            from the block's input for all target linears of an attention or FFN block.
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
            B; False: nothing is zero (for tests).
        bias: only "none".
        target_parameters: only None; fused expert parameters are not supported yet.
        format_version: version of the saved adapter format.
        moeadapt_version: version that wrote the adapter, filled in.

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
    router: str | dict[str, Any] = "top_k"
    balance: dict[str, Any] | None = field(default_factory=lambda: {"switch": 0.01})
    experts: str | dict[str, Any] = "lora"
    placement: Literal["linear", "ffn"] = "linear"
    router_scope: Literal["layer", "block"] = "layer"
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
    init_lora_weights: bool | Literal["gaussian"] = True
    bias: Literal["none"] = "none"
    target_parameters: list[str] | None = None
    format_version: Positive = FORMAT_VERSION
    moeadapt_version: str | None = None

    def __post_init__(self) -> None:
        """Check every field, then put router, balance and experts into their full form."""
        super().__post_init__()
        self.peft_type = extend_peft_type()
        if isinstance(self.format_version, int) and self.format_version > FORMAT_VERSION:
            raise ConfigError(
                f"format_version={self.format_version}: this adapter was written by moeadapt "
                f"{self.moeadapt_version}; moeadapt {__version__} reads formats up to "
                f"{FORMAT_VERSION}. Upgrade with `pip install -U moeadapt`."
            )
        self._check_fields()
        self.moeadapt_version = self.moeadapt_version or __version__
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        self._check_components()

    @property
    def router_config(self) -> RouterConfig:
        """The router's settings as a checked object."""
        return ROUTERS.parse(self.router)

    @property
    def balance_configs(self) -> dict[str, BalanceConfig]:
        """The balance losses as checked objects, by name."""
        return parse_balance(self.balance)

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
        router = self.router_config
        router.check(self.num_experts)
        self.router = ROUTERS.spec(router)
        self.experts = EXPERTS.spec(self.expert_config)
        self.balance = {
            name: loss.model_dump(mode="json") for name, loss in self.balance_configs.items()
        }
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


@cache
def _field_types() -> dict[str, Any]:  # beartype does not know TypeAdapter
    strict = ConfigDict(allow_inf_nan=False)
    inherited = {f.name for f in fields(PeftConfig)}
    types: dict[str, Any] = {f.name: f.type for f in fields(MoeLoraConfig)}
    return {k: TypeAdapter(t, config=strict) for k, t in types.items() if k not in inherited}


def _as_set(names: Names | None) -> set[str] | str | None:
    return set(names) if isinstance(names, (list, set)) else names
