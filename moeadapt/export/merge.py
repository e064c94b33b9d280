"""One ordinary LoRA in place of a routed mixture, and how much of the mixture it keeps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.export.bank_layout import check_linear, is_unrouted, zero_pair
from moeadapt.export.low_rank import stack
from moeadapt.export.merge_methods import DENSIFY, MENU, MERGES, Linear, MergeConfig, SingleConfig
from moeadapt.export.residual import Moments, constants, measure
from moeadapt.hidden_folder import check_folder
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.plain import Pair, adapter_config, adapter_layers, plain_lora, save_plain
from moeadapt.tuner.probe import Batch, Loss, measure_loss, read_batches

Residuals = dict[str, float]
"""Path of a target linear -> E|d - merged x|^2 / E|d|^2: 0 is exact, 1 as good as no adapter."""


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """A plain LoRA made of a mixture, and what was measured.

    Attributes:
        method: the merge method and its settings.
        model: the LoRA as a PEFT model, over the same base tensors as the mixture.
        ranks: rank of each target linear.
        residuals: of the method on `data`; None: there was no data.
        menu: the same of every method of the menu.
        mixture: held-out loss of the mixture; None: there was no data, or it has no such loss.
        merged: held-out loss of the LoRA.
        base: held-out loss without an adapter.
        held_out: whether the losses are of other data than the residuals.
        out_dir: the folder it was written to; None: none.
    """

    method: dict[str, Any]
    model: PeftModel
    ranks: dict[str, int]
    residuals: Residuals | None = None
    menu: dict[str, Residuals] = field(default_factory=dict)
    mixture: Loss | None = None
    merged: Loss | None = None
    base: Loss | None = None
    held_out: bool = False
    out_dir: Path | None = None

    @property
    def mean_residual(self) -> float | None:
        """Mean of the residuals over the target linears."""
        return None if self.residuals is None else _mean(self.residuals)

    def losses(self) -> dict[str, Loss]:
        """Return what was measured: `mixture`, `merged` and `base`."""
        named = {"mixture": self.mixture, "merged": self.merged, "base": self.base}
        return {name: loss for name, loss in named.items() if loss is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {
            "method": self.method,
            "out_dir": None if self.out_dir is None else str(self.out_dir),
            "ranks": self.ranks,
            "residuals": self.residuals,
            "mean_residual": self.mean_residual,
            "menu": {name: _mean(found) for name, found in self.menu.items()},
            "losses": {name: loss.to_dict() for name, loss in self.losses().items()},
            "held_out": self.held_out,
        }


def _mean(residuals: Residuals) -> float:
    return sum(residuals.values()) / len(residuals)


def merge(
    model: nn.Module,
    out_dir: str | Path | None = None,
    method: str | Mapping[str, Any] = "least_squares",
    *,
    expert: int | None = None,
    rank: int | None = None,
    data: Iterable[Any] | None = None,
    held_out: Iterable[Any] | None = None,
    tokenizer: Any = None,
    domains: Sequence[str] | None = None,
    held_out_domains: Sequence[str] | None = None,
    adapter: str = "default",
    memory: float = 4e9,
) -> MergeResult:
    """Make one ordinary PEFT LoRA adapter of a mixture, and measure what it keeps.

    It is exact only where the routing does not depend on the input (and, with placement `ffn`,
    where each token has one expert). What is always on comes along exactly: shared experts, the
    unrouted LoRA of attention, modules trained in full.

    Args:
        model: the PEFT model with the mixture; it stays as it is.
        out_dir: folder to write, new or empty; None: write nothing.
        method: a name of the menu, or `{"name": ..., **settings}`: `least_squares`, `usage`,
            `uniform`, `single`; also those of `densify`.
        expert: for `single`.
        rank: largest rank of what stands for the routed experts of a linear, >= 1; None: that of
            all experts together.
        data: what the residuals are measured on, and what `least_squares` and `usage` look at:
            batches (mappings with `input_ids`, maybe `attention_mask`, `labels`, `domain`), or
            texts with `tokenizer`.
        held_out: the same, for the losses; None: they are measured on `data`.
        tokenizer: for texts.
        domains: name of each row of `data`, for losses per domain.
        held_out_domains: the same for `held_out`.
        adapter: which adapter.
        memory: bytes that second moments may take at once; less: more runs over `data`.

    Raises:
        ConfigError: a setting is wrong, data is missing or has no labels, or `out_dir` is occupied
            or its disk too full.
        UnsupportedError: the experts are no matrices (`ia3`, `random_a`, `glu`).
        ExportError: `out_dir` was taken while it was written.

    Example:
        >>> result = moeadapt.merge(model, "merged", data=texts, tokenizer=tokenizer)
        >>> result.mean_residual, result.mixture.mean, result.merged.mean, result.base.mean
    """
    chosen = _method(method, expert)
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank} must be at least 1")
    adapter_config(model, adapter)
    layers = adapter_layers(model, adapter)
    check_linear(layers, adapter)
    _check_active(model, adapter)
    if out_dir is not None:
        check_folder(out_dir)
    if chosen.needs_data and data is None:
        raise ConfigError(
            f"method {MERGES.name_of(chosen)!r} looks at what the mixture does: give data= (about "
            "a hundred texts of what it will be used for)"
        )
    batches = None if data is None else read_batches(data, tokenizer=tokenizer, domains=domains)
    others = batches
    if held_out is not None:
        others = read_batches(held_out, tokenizer=tokenizer, domains=held_out_domains)
    pairs, residuals, menu = _pairs(model, layers, chosen, rank, batches, adapter, memory)
    lora = plain_lora(model, pairs, adapter=adapter)  # type: ignore[arg-type]
    mixture, merged, base = (None, None, None) if others is None else _losses(model, lora, others)
    if out_dir is not None:
        save_plain(lora, Path(out_dir))
    return MergeResult(
        method=MERGES.spec(chosen),
        model=lora,
        ranks={key: pair.rank for key, pair in pairs.items()},
        residuals=residuals if batches is not None else None,
        menu=menu,
        mixture=mixture,
        merged=merged,
        base=base,
        held_out=held_out is not None,
        out_dir=None if out_dir is None else Path(out_dir),
    )


def densify(
    model: nn.Module,
    out_dir: str | Path | None = None,
    method: str | Mapping[str, Any] = "svd",
    **options: Any,
) -> MergeResult:
    """Gather the experts into one LoRA without data, as a start for `distill`.

    Args:
        model: see `merge`.
        out_dir: see `merge`.
        method: `sum`, `mean`, `top_k` or `svd`; the last two have the rank of one expert.
        options: see `merge`.

    Raises:
        ConfigError: another method, or see `merge`.
    """
    name = method if isinstance(method, str) else method.get("name")
    if name not in DENSIFY:
        raise ConfigError(f"densify gathers by one of {sorted(DENSIFY)}, not {name!r}; see merge")
    return merge(model, out_dir, method, **options)


def _method(method: str | Mapping[str, Any], expert: int | None) -> MergeConfig:
    spec: dict[str, Any] = {"name": method} if isinstance(method, str) else dict(method)
    if expert is not None:
        if spec.get("name") != "single":
            raise ConfigError(f"expert={expert} belongs to method='single', not {method!r}")
        spec["expert"] = expert
    return MERGES.parse(spec)


def _check_active(model: Any, adapter: str) -> None:
    active = list(model.active_adapters)
    if active != [adapter]:
        raise ConfigError(
            f"the active adapters are {active}, and {adapter!r} alone is to be measured; call "
            f"model.set_adapter({adapter!r}) first"
        )


def _pairs(
    model: nn.Module,
    layers: Mapping[str, MoeLoraLinear],
    method: MergeConfig,
    rank: int | None,
    batches: list[Batch] | None,
    adapter: str,
    memory: float,
) -> tuple[dict[str, Pair], Residuals, dict[str, Residuals]]:
    """Return what replaces each layer, and the residuals of this method and of the menu."""
    constant = constants(layers, adapter)
    pairs: dict[str, Pair] = {}
    residuals: Residuals = {}
    menu: dict[str, Residuals] = {}
    for key, layer in layers.items():
        if is_unrouted(layer, adapter):
            pairs[key] = constant[key] or zero_pair(layer)
        elif batches is None:
            linear = Linear(key=key, bank=layer.moe_banks[adapter], rank=rank)
            pairs[key] = _with(method.routed(linear), constant[key])
    if batches is not None:
        for key, moments in measure(model, layers, batches, adapter=adapter, memory=memory):
            bank = layers[key].moe_banks[adapter]
            linear = Linear(key=key, bank=bank, moments=moments, rank=rank)
            pairs[key] = _with(method.routed(linear), constant[key])
            residuals[key] = moments.residual(pairs[key], constant[key])
            _compare(linear, moments, constant[key], menu)
    return {key: pairs[key] for key in layers}, residuals, menu


def _compare(
    linear: Linear, moments: Moments, constant: Pair | None, menu: dict[str, Residuals]
) -> None:
    for name in MENU:
        config = SingleConfig() if name == "single" else MERGES.parse(name)
        found = _with(config.routed(linear), constant)
        menu.setdefault(name, {})[linear.key] = moments.residual(found, constant)


def _with(routed: Pair, constant: Pair | None) -> Pair:
    return routed if constant is None else stack([routed, constant])


def _losses(
    model: nn.Module, lora: PeftModel, batches: list[Batch]
) -> tuple[Loss | None, Loss | None, Loss | None]:
    with lora.disable_adapter():
        base = measure_loss(lora, batches)
    return measure_loss(model, batches), measure_loss(lora, batches), base
