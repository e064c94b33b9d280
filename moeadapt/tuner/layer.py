"""A target linear with its experts: `base(x) + sum_e w_e(x) * delta_e(x)`."""

from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from moeadapt.dispatch import contract, dispatch, expand
from moeadapt.errors import UnsupportedError
from moeadapt.experts import FACTOR_NAMES, BankSize, ExpertBank
from moeadapt.experts.base import Init
from moeadapt.experts.glu import GluBank
from moeadapt.routers import LinearRouter
from moeadapt.tuner.adapter_layer import PREFIX, AdapterLayer
from moeadapt.tuner.block import Block
from moeadapt.tuner.block_routing import BlockRouting
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.context import RoutingContext
from moeadapt.tuner.decode_step import LinearStep
from moeadapt.tuner.gated_ffn import GatedFfn
from moeadapt.tuner.head import RouterHead
from moeadapt.tuner.plan import TargetPlan, experts_of, in_out_features
from moeadapt.tuner.segments import START_NAMES, make_start, start_from_segments, subtract_start
from moeadapt.tuner.sizes import router_config

INITS: dict[Any, Init] = {
    True: "zero_b",
    False: "random",
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "svd_segments": "zero_b",
}


class MoeLoraLinear(nn.Module, AdapterLayer):
    """One class for every base linear: `nn.Linear`, `Conv1D`, and the quantised ones.

    Adapter tensors are leaves: `moeadapt_<factor>.<adapter>.weight`, and the router's own on
    `moeadapt_router.<adapter>` of the layer that routes.
    """

    adapter_layer_names = tuple(PREFIX + name for name in (*FACTOR_NAMES, *START_NAMES, "router"))
    other_param_names = ("moe_banks", "moe_plans", "moe_heads", "moe_blocks", "moe_dropout")

    def __init__(self, base_layer: nn.Module, context: RoutingContext, **kwargs: Any) -> None:
        """Wrap `base_layer`, without experts yet."""
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.in_features, self.out_features = in_out_features(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.moe_banks: dict[str, ExpertBank] = {}
        self.moe_plans: dict[str, TargetPlan] = {}
        self.moe_heads: dict[str, RouterHead] = {}
        self.moe_blocks: dict[str, Block] = {}
        self.moe_dropout = nn.ModuleDict()
        self._context = context
        self.decode_step: LinearStep | None = None
        self._decoding: tuple[object, torch.Size] | None = None
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def add_experts(
        self, adapter: str, config: MoeLoraConfig, size: BankSize, plan: TargetPlan
    ) -> None:
        """Make the experts of `adapter`, and its router if this layer is the one that routes."""
        experts = experts_of(config, plan)
        init = INITS[config.init_lora_weights]
        for name, factor in experts.bank.make_factors(size, init, experts).items():
            getattr(self, PREFIX + name)[adapter] = factor
        factors = {name: getattr(self, PREFIX + name) for name in experts.bank.factor_names}
        self.moe_banks[adapter] = experts.bank(size, factors, adapter, experts)
        self.moe_plans[adapter] = plan
        if config.init_lora_weights == "svd_segments":
            self._start_from_base(adapter, config, size)
        if config.lora_dropout > 0:
            self.moe_dropout[adapter] = nn.Dropout(config.lora_dropout)
        bank = self.moe_banks[adapter]
        bank.impl, bank.generation = config.impl, self._context.generation
        if isinstance(bank, GluBank) and plan.activation is not None:
            bank.activation = plan.activation
        if plan.block is not None:
            block = self._context.blocks.setdefault(plan.block.path, Block(plan.block))
            self.moe_blocks[adapter] = block
            block.layers.setdefault(adapter, []).append(self)
            if adapter not in block.owners:
                block.owners[adapter] = self
                self._add_router(adapter, config, plan.block.path, plan.block.dim)
            block.owners[adapter].moe_heads[adapter].banks.append(bank)
        elif plan.placement == "linear":
            self._add_router(adapter, config, plan.key, self.in_features)
            self.moe_heads[adapter].banks.append(bank)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _start_from_base(self, adapter: str, config: MoeLoraConfig, size: BankSize) -> None:
        start = make_start(size)
        for name, factor in start.items():
            getattr(self, PREFIX + name)[adapter] = factor
        # An adapter that is being loaded brings its factors along.
        if not config.inference_mode:
            bank = self.moe_banks[adapter]
            start_from_segments(self.get_base_layer(), self.quantization_backend, bank, start)

    def _add_router(self, adapter: str, config: MoeLoraConfig, name: str, dim: int) -> None:
        routers = self._routers()
        router = router_config(config).build(dim, self.moe_banks[adapter].size.num_experts)
        if isinstance(router, LinearRouter):
            router.set_costs(self.moe_banks[adapter].costs())
        for loss in config.balance_configs.values():
            loss.check(router)
            loss.prepare(router)
        self._context.decides_per_sequence |= router.per == "sequence"
        routers[adapter] = router
        head = RouterHead(name, routers, adapter, config.balance_configs, self._context)
        head.follow(config.schedule_config, router_config(config))
        self.moe_heads[adapter] = head
        self._context.heads.setdefault(adapter, {})[name] = head

    # --- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base output plus the active adapters' mixtures."""
        step = self.decode_step
        if step is not None and not args and not kwargs:
            out = step(self, x)
            if out is not None:
                return out
        adapters = self.running_adapters()
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        if any(self.moe_plans[name].placement == "ffn" for name in adapters):
            return self._forward_ffn(x, adapters)
        if len(adapters) == 1 and self._context.generation.decodes:
            self._prepare_decoding(adapters[0], x)
        flat = self._tokens(x, adapters)
        out = self._base(flat, *args, **kwargs)
        for name in adapters:
            out = self._less_start(name, flat, out)
            out = self._dispatch(name, x, flat, out)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _prepare_decoding(self, adapter: str, x: Tensor) -> None:
        """Look for a shorter way, once per answer and shape: the next token may take it."""
        decoding = (self._context.generation.answer, x.shape)
        if decoding != self._decoding:
            self._decoding = decoding
            self.decode_step = LinearStep.of(self, adapter, x)

    def running_adapters(self) -> list[str]:
        """Return the adapters that add to the base output now."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.moe_banks]

    def flat(self, x: Tensor) -> Tensor:
        """Return the tokens of `x`, cast as autocast would."""
        return self._cast(x).reshape(-1, x.shape[-1])

    def _tokens(self, x: Tensor, adapters: list[str]) -> Tensor:
        """Return `_flat(x)`, cast once for all linears of a block that read its input."""
        block = self.moe_blocks.get(adapters[0])
        if block is None or self.quantization_backend is not None:
            return self.flat(x)
        return block.routing(adapters[0]).tokens(x, self.flat)

    def _dispatch(self, name: str, x: Tensor, flat: Tensor, out: Tensor) -> Tensor:
        plan, bank, inplace = self.moe_plans[name], self.moe_banks[name], self._owns(out)
        seen = self._drop(name, self._seen(name, flat))
        if plan.placement == "unrouted":
            return dispatch(seen, None, bank, out, inplace=inplace)
        if plan.block is not None:
            return self.moe_blocks[name].routing(name).dispatch(bank, x, seen, out, inplace)
        head = self.moe_heads[name]
        weights, k = head(x), head.max_active
        return dispatch(seen, weights, bank, out, inplace=inplace, max_active=k)

    def _forward_ffn(self, x: Tensor, adapters: list[str]) -> Tensor:
        if len(adapters) > 1:
            raise UnsupportedError(
                f"{len(adapters)} adapters are active and one has placement='ffn', whose experts "
                "span the nonlinearity and do not add up; activate one with set_adapter"
            )
        (name,) = adapters
        bank, block = self.moe_banks[name], self.moe_blocks[name]
        gated, routing = block.gated, block.routing(name)
        if gated is not None and gated.adapter == name:
            return self._forward_whole(name, gated, routing, x)
        if block.is_input(x):
            flat = self._tokens(x, adapters)
            onto = self._less_start(name, flat, self._base(flat))
            hidden = routing.down(bank, x, self._drop(name, flat))
            out = expand(hidden, routing.slots, bank, onto)
            return out.view(out.shape[0], *x.shape[:-1], out.shape[-1])
        out = contract(
            self._cast(x).reshape(x.shape[0], -1, x.shape[-1]),
            routing.slots,
            bank,
            lambda combined: self._less_start(name, combined, self._base(combined)),
            dropout=lambda activations: self._drop(name, activations),
        )
        return out.view(*x.shape[1:-1], out.shape[-1])

    def _forward_whole(
        self, name: str, gated: GatedFfn, routing: BlockRouting, x: Tensor
    ) -> Tensor:
        """Compute what `GatedFfn` asks of a projection: the base, and the rank axis beside it."""
        bank, flat = self.moe_banks[name], self._tokens(x, [name])
        out = self._less_start(name, flat, self._base(flat))
        hidden = gated.hidden.get(id(self))
        if hidden is None:
            gated.hidden[id(self)] = routing.down(bank, x, flat)
        else:
            out = bank.up(hidden, out, self._owns(out))
        return out.view(*x.shape[:-1], out.shape[-1])

    def runs_whole(self, name: str) -> bool:
        """Whether `GatedFfn` may compute this projection: nothing happens between its parts."""
        bank = self.moe_banks[name]
        return (
            self.moe_plans[name].placement == "ffn"
            and bank.owns_ranks
            and all(bank.factor(factor).is_whole for factor in bank.factor_names)
            and not self.drops(name)
            and not (self._forward_hooks or self._forward_pre_hooks)
        )

    def shares_input(self, name: str) -> ExpertBank | None:
        """Return the experts if they can read the block's input together with others."""
        bank = self.moe_banks[name]
        fits = (
            name in self.running_adapters()
            and bank.reads_with is not None
            and bank.factor(bank.reads_with).is_whole
            and not self.drops(name)
        )
        return bank if fits else None

    def _seen(self, name: str, flat: Tensor) -> Tensor:
        """Return what the experts read: the block's input where they stand beside a whole FFN."""
        if self.moe_plans[name].placement != "glu":
            return flat
        return self.flat(self.moe_blocks[name].routing(name).input)

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            out = self.quantization_backend.maybe_clone_base_result(out)
        return out

    def _less_start(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """Take off the base output what the experts of `svd_segments` started from."""
        if not self.has_start(name):
            return out
        start = {key: getattr(self, PREFIX + key)[name] for key in START_NAMES}
        return subtract_start(out, x, self.moe_banks[name].size, start)

    def has_start(self, name: str) -> bool:
        """Whether the experts of an adapter started from a part of the base weight."""
        return name in getattr(self, PREFIX + START_NAMES[0])

    def _cast(self, x: Tensor) -> Tensor:
        """Cast once for the base and the experts what autocast would cast for each of them."""
        if self.quantization_backend is not None or not torch.is_autocast_enabled(x.device.type):
            return x
        dtype = torch.get_autocast_dtype(x.device.type)
        return x if x.dtype == torch.float64 else x.to(dtype)

    def _owns(self, out: Tensor) -> bool:
        """Whether `out` is a fresh GEMM result that nobody else reads."""
        return (
            not torch.compiler.is_compiling()
            and type(self.base_layer) is nn.Linear
            and not self.base_layer._forward_hooks
            and "forward" not in vars(self.base_layer)
            and not nn.modules.module._global_forward_hooks
            and not out._is_view()
        )

    def _drop(self, name: str, x: Tensor) -> Tensor:
        return self.moe_dropout[name](x) if name in self.moe_dropout else x

    def drops(self, name: str) -> bool:
        """Whether dropout changes what the experts of an adapter read now."""
        return name in self.moe_dropout and self.training

    def __repr__(self) -> str:
        """Mark the class, since PEFT has a Linear of its own for every method."""
        return "moeadapt." + super().__repr__()
