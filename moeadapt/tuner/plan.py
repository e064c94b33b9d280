"""What an injection will do, decided and checked before the model is touched."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moeadapt.errors import ConfigError, did_you_mean
from moeadapt.experts import EXPERTS, ExpertConfig
from moeadapt.tuner.config import MoeLoraConfig

Placement = Literal["linear", "ffn", "glu", "unrouted"]


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """One block that shares a routing; adapters of either placement agree on it.

    Attributes:
        path: the module that contains its linears.
        entry: the module whose input is routed: the block itself, or its first linear where the
            linears sit directly in a decoder layer (OPT).
        dim: width of the routed input.
        first: the linear that reads the routed input first, targeted or not.
    """

    path: str
    entry: str
    dim: int
    first: str


@dataclass(frozen=True, kw_only=True)
class TargetPlan:
    """One target linear: how its experts are placed, and the block that routes it, if any.

    Attributes:
        key: path of the linear.
        placement: `glu`: it is the output projection of an FFN and owns what stands beside that.
        block: what routes it.
        reads_input: whether it reads what the block was called with, by its place in the block.
        activation: of the base FFN; None: nobody needs it.
    """

    key: str
    placement: Placement
    block: BlockPlan | None
    reads_input: bool = False
    activation: Callable[[Tensor], Tensor] | None = None


def plan_targets(
    model: nn.Module, config: MoeLoraConfig, keys: Iterable[str], quantization: Mapping[str, Any]
) -> dict[str, TargetPlan]:
    """Decide what becomes of each target linear.

    With placement `glu` the input projections of an FFN are left out: nothing happens to them.

    Args:
        model: the base model, possibly with other adapters.
        config: the adapter to inject.
        keys: paths of the target modules.
        quantization: what `peft.utils.get_quantization_kwargs(model)` returned.

    Raises:
        ConfigError: a target is not a linear layer, an FFN is only partly targeted, or it cannot
            be told what its parts are.
    """
    keys = list(keys)
    for key in keys:
        _check_linear(key, model.get_submodule(key), quantization)
    plans: dict[str, TargetPlan] = {}
    for path in dict.fromkeys(_parent(key) for key in keys):
        own = [key for key in keys if _parent(key) == path]
        plans.update((p.key, p) for p in _plan_parent(model, config, path, own))
    if config.placement != "linear" and plans and not any(p.block for p in plans.values()):
        raise ConfigError(
            f"placement={config.placement!r} found no FFN among the targets {_some(keys)}; target "
            "the FFN's linears, for example target_modules='all-linear'"
        )
    return {key: plans[key] for key in keys if key in plans}


def experts_of(config: MoeLoraConfig, plan: TargetPlan) -> ExpertConfig:
    """Return the expert type of one target; beside small FFNs the others have a plain LoRA."""
    if config.placement == "glu" and plan.placement == "unrouted":
        return EXPERTS.parse("lora")
    return config.expert_config


def no_target_message(model: nn.Module, config: MoeLoraConfig) -> str:
    """Say that the targeting fields match nothing, and what there is to target."""
    names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if is_linear(m)})
    asked = config.target_modules
    wanted = [asked] if isinstance(asked, str) else sorted(asked or [])
    near = "".join(did_you_mean(word, names) for word in wanted[:1])
    narrowed = {
        field: getattr(config, field)
        for field in ("exclude_modules", "layers_to_transform", "layers_pattern")
        if getattr(config, field) is not None
    }
    also = f" with {narrowed}" if narrowed else ""
    regex = " A string is a pattern for whole module paths; give a list to name modules."
    return (
        f"MoeLoraConfig: target_modules={asked!r}{also} matches no module{near}. Linear layers of "
        f"this model: {_some(names)}.{regex if isinstance(asked, str) else ''}"
    )


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer or a tuner layer around one."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, (nn.Linear, Conv1D)) or _is_quantised(base, {})


def _plan_parent(
    model: nn.Module, config: MoeLoraConfig, path: str, keys: list[str]
) -> list[TargetPlan]:
    parent = model.get_submodule(path)
    linears = [_join(path, name) for name, child in parent.named_children() if is_linear(child)]
    is_ffn = _in_layer(path) and not _is_attention(path)
    if config.placement == "linear" and config.router_scope == "layer":
        return [TargetPlan(key=key, placement="linear", block=None) for key in keys]
    if config.placement != "linear" and not is_ffn:
        return [TargetPlan(key=key, placement="unrouted", block=None) for key in keys]
    if config.placement != "linear":
        _check_ffn(config.placement, path, linears)
    if config.placement == "ffn":
        _check_whole(path, linears, keys)
    block = BlockPlan(
        path=path,
        entry=path if _holds_only(parent) else linears[0],
        dim=in_out_features(model.get_submodule(linears[0]))[0],
        first=linears[0],
    )
    if config.placement == "glu":
        output = _output_projection(model, path, linears, block.dim, keys)
        return [
            TargetPlan(
                key=output, placement="glu", block=block, activation=_activation(path, parent)
            )
        ]
    reading = _reading(model, linears, block.dim)
    return [
        TargetPlan(key=key, placement=config.placement, block=block, reads_input=key in reading)
        for key in keys
    ]


def _reading(model: nn.Module, linears: list[str], dim: int) -> list[str]:
    """Return the linears that read the block's input: of its width, and not the one that ends it.

    A guess that only saves time: a linear shares the work of others where it is really called with
    the block's input.
    """
    last = linears[-1].rpartition(".")[2]
    inputs = linears if _PROJECTS_INPUT.match(last) else linears[:-1]
    return [key for key in inputs if in_out_features(model.get_submodule(key))[0] == dim]


_PROJECTS_INPUT = re.compile(r"(q|k|v|qkv|query|key|value)(_|$)")


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """Return the widths of a linear layer, quantised or wrapped."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, Conv1D):
        return tuple(base.weight.shape)  # type: ignore[return-value]
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        if all(hasattr(base, name) for name in names):
            return getattr(base, names[0]), getattr(base, names[1])
    raise ConfigError(f"cannot tell the widths of a {type(base).__name__}")


def _check_linear(key: str, module: nn.Module, quantization: Mapping[str, Any]) -> None:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, (nn.Linear, Conv1D)) or _is_quantised(base, quantization):
        return
    raise ConfigError(
        f"target {key!r} is a {type(base).__name__}, which cannot hold LoRA experts; supported: "
        "torch.nn.Linear, transformers Conv1D, and the quantised linears PEFT knows (bitsandbytes "
        "4 and 8 bit, torchao, GPTQ, AWQ, HQQ, AQLM, EETQ). Adjust target_modules or add the "
        "module to exclude_modules; modules_to_save trains a module in full."
    )


def _is_quantised(base: nn.Module, quantization: Mapping[str, Any]) -> bool:
    # torchao's backend asks for this argument even to be recognised.
    backend = resolve_quantization_backend(
        base, **{"get_apply_tensor_subclass": _unused, **quantization}
    )
    return backend is not None and backend.layer_type == "linear"


def _unused() -> None:
    """Stand in for torchao's re-quantisation, which a mixture never needs: it is not merged."""


def _check_ffn(placement: str, path: str, linears: list[str]) -> None:
    if len(linears) == 1:
        raise ConfigError(
            f"placement={placement!r}: {linears[0]!r} stands alone in {path!r}, which is no FFN "
            "with an input and an output projection. Add it to exclude_modules, or use "
            "placement='linear'."
        )


def _check_whole(path: str, linears: list[str], keys: list[str]) -> None:
    missing = [key for key in linears if key not in keys]
    if missing:
        raise ConfigError(
            f"placement='ffn' needs every linear of the FFN {path!r}, which has {_some(linears)}; "
            f"not targeted: {_some(missing)}. Add them to target_modules, or use "
            "placement='linear'."
        )


def _output_projection(
    model: nn.Module, path: str, linears: list[str], dim: int, keys: list[str]
) -> str:
    """Return the linear that ends the FFN: the only one that does not read the FFN's input."""
    found = [key for key in linears if in_out_features(model.get_submodule(key))[0] != dim]
    if len(found) != 1:
        raise ConfigError(
            f"placement='glu' cannot tell the output projection of {path!r}: of {_some(linears)}, "
            f"{len(found)} do not have its input width {dim}, and one is expected. Add them to "
            "exclude_modules, or use placement='linear'."
        )
    if found[0] not in keys:
        raise ConfigError(
            f"placement='glu' adds its experts to the output of {found[0]!r}, which is not "
            f"targeted, while {_some(keys)} of the same FFN are. Add it to target_modules, or use "
            "placement='linear'."
        )
    return found[0]


def _activation(path: str, parent: nn.Module) -> Callable[[Tensor], Tensor]:
    found = [name for name in ACTIVATION_NAMES if callable(getattr(parent, name, None))]
    if found:
        return getattr(parent, found[0])
    raise ConfigError(
        f"placement='glu' gives the experts the activation of the base FFN, and {path!r} has none "
        f"under the names {list(ACTIVATION_NAMES)}. Add its linears to exclude_modules, or use "
        "placement='ffn' or 'linear'."
    )


ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation", "activation_function")
"""Where the FFNs of transformers keep their activation function."""


def _holds_only(parent: nn.Module) -> bool:
    """Whether no linear hides deeper than the parent's own children."""
    return not any(
        is_linear(module)
        for child in parent.children()
        if not is_linear(child)
        for module in child.modules()
    )


def _is_attention(path: str) -> bool:
    return re.search(r"(^|\.)\w*(attn|attention)\w*(\.|$)", path, re.IGNORECASE) is not None


def _in_layer(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _parent(key: str) -> str:
    return key.rpartition(".")[0]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")  # noqa: PLR2004
