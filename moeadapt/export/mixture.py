"""A trained adapter as plain matrices: gates, experts, and a base with what is always on.

Letters: D hidden width, I FFN width, m width of a small expert, E experts, W with null experts.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from moeadapt.errors import UnsupportedError
from moeadapt.experts.glu import GluBank
from moeadapt.export.bank_layout import constant_pair, expert_pair, is_unrouted
from moeadapt.export.dense import Glu, Piece, ffn_pieces, filled, whole_strides
from moeadapt.export.gate_rule import GateRule, gate_rule
from moeadapt.export.refusals import (
    ELSEWHERE,
    active_adapter,
    check_model,
    check_settings,
    layer_of,
)
from moeadapt.export.source import ModelSource, Source
from moeadapt.routers import Router
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.plain import Pair, adapter_config, adapter_layers, shared_base

TIED = ("lm_head.weight", "model.embed_tokens.weight")


class ChangedSource(Source):
    """A base read with what an adapter adds or replaces whatever the routing."""

    def __init__(
        self, base: Source, pairs: Mapping[str, Pair], replaced: Mapping[str, Tensor]
    ) -> None:
        """Hold `pairs` to add and tensors to read instead, both by name."""
        self.config, self.folder = base.config, base.folder
        self._base, self._pairs, self._replaced = base, dict(pairs), dict(replaced)

    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `Source.tensors`."""
        return self._base.tensors()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See `Source.read`; in double precision where something is added."""
        if name in self._replaced:
            value = self._replaced[name].detach()
            return (value if rows is None else value[rows[0] : rows[1]]).cpu().clone()
        value = self._base.read(name, rows)
        return add_pair(value, self._pairs[name], rows) if name in self._pairs else value

    def fingerprint(self) -> str:
        """See `Source.fingerprint`; that of the base."""
        return self._base.fingerprint()


def add_pair(value: Tensor, pair: Pair, rows: tuple[int, int] | None) -> Tensor:
    """Return `value + b @ a` in double precision, where `value` is `rows` of the whole."""
    b = pair.b if rows is None else pair.b[rows[0] : rows[1]]
    return torch.addmm(value.double(), b.cpu(), pair.a.cpu())


class Mixture:
    """The one active adapter of a model, read for export.

    Attributes:
        config: settings of the adapter.
        additive: whether experts are small FFNs beside the base's, instead of whole FFNs.
        source: the base, with unrouted LoRA, shared experts and modules trained in full merged.
        rule: how the router makes its weights.
        routers: layer -> its router, in eval mode.
        num_experts: experts per layer on disk, null experts that are kept included.
        dense_layers: layers without a mixture.
        expert_width: FFN width of one expert.
        shared_width: FFN width of what every token uses besides; 0: nothing.
    """

    def __init__(self, model: PeftModel, folder: str | Path | None = None) -> None:
        """Check `model`, which must be in eval mode, and look at its tensors; copies nothing.

        Args:
            model: the mixture on its base.
            folder: where the tokenizer of the base is.

        Raises:
            ConfigError: it is no model with an adapter.
            UnsupportedError: no stock class computes such a mixture; says why.
        """
        self.adapter = active_adapter(model)
        self._layers = adapter_layers(model, self.adapter)
        self.config = adapter_config(model, self.adapter)
        check_settings(self.config)
        check_model(model, self.adapter, self._layers)
        self._model = model
        self.additive = self.config.placement == "glu"
        self._find_routers()
        self._base(folder)
        any_router = next(iter(self.routers.values()))
        self.rule: GateRule = gate_rule(
            any_router, self.config.router_config, additive=self.additive
        )
        self.num_experts = any_router.num_experts + self.rule.null_experts
        width = self.source.tensors()[self._pieces(self.moe_layers[0]).down.name][0][1]
        self.expert_width, self.shared_width = whole_strides(width), 0
        if self.additive:
            size = self._glu(self.moe_layers[0]).size
            self.expert_width = whole_strides(size.rank)
            self.shared_width = width + size.num_shared * size.rank

    def _find_routers(self) -> None:
        self.routers: dict[int, Router] = {}
        self._owners: dict[int, MoeLoraLinear] = {}
        for layer in self._layers.values():
            plan = layer.moe_plans[self.adapter]
            if plan.block is not None and self.adapter in layer.moe_heads:
                index = layer_of(plan.block.path)
                self.routers[index] = layer.moe_heads[self.adapter].router
                self._owners[index] = layer
        self.moe_layers = sorted(self.routers)
        counts = {index: router.num_experts for index, router in self.routers.items()}
        if len(set(counts.values())) > 1:
            raise UnsupportedError(
                f"the layers have different numbers of experts ({counts}), and a stock class has "
                f"one for all; train without experts_pattern. {ELSEWHERE}"
            )

    def _base(self, folder: str | Path | None) -> None:
        bare: Any = shared_base(self._model)
        plain: dict[str, Pair] = {}
        for key, layer in self._layers.items():
            if self.additive and not is_unrouted(layer, self.adapter):
                continue
            pair = constant_pair(layer, self.adapter)
            if pair is not None:
                plain[f"{key}.weight"] = pair
        self.merged_linears = sum(is_unrouted(x, self.adapter) for x in self._layers.values())
        source = ModelSource(bare, folder)
        self.source = ChangedSource(source, plain, self._trained_in_full(source))
        layers: int = source.config.num_hidden_layers  # type: ignore[attr-defined]
        self.dense_layers = tuple(i for i in range(layers) if i not in self.routers)

    def _trained_in_full(self, source: Source) -> dict[str, Tensor]:
        """Return the tensors of `modules_to_save` by their name in the base."""
        found: dict[str, Tensor] = {}
        for path, module in self._model.get_base_model().named_modules():
            if not isinstance(module, AuxiliaryTrainingWrapper):
                continue
            saved: Any = getattr(module, "modules_to_save", None)
            if saved is None or self.adapter not in saved:
                continue
            found.update({f"{path}.{n}": t for n, t in saved[self.adapter].state_dict().items()})
        tied: Any = source.config
        shared = [n for n in found if tied.tie_word_embeddings and n in TIED]
        lacking = shared or [name for name in found if name not in source.tensors()]
        if lacking:
            raise UnsupportedError(
                f"modules_to_save trained {lacking[0]}, which "
                + ("the base shares between embedding and output head" if shared else "it lacks")
                + f"; leave it out of modules_to_save. {ELSEWHERE}"
            )
        return found

    def _pieces(self, layer: int) -> Glu[Piece]:
        return ffn_pieces(self.source.config, layer)

    def _glu(self, layer: int) -> GluBank:
        bank = self._owners[layer].moe_banks[self.adapter]
        assert isinstance(bank, GluBank)
        return bank

    def gate(self, layer: int) -> Float[Tensor, "W D"]:
        """Return the gate of a layer, divided by the temperature."""
        router: Any = self.routers[layer]
        if not hasattr(router, "weight"):
            # Equal logits are equal weights.
            width: int = self.source.config.hidden_size  # type: ignore[attr-defined]
            return torch.zeros(self.num_experts, width)
        return router.weight.detach().double()[: self.num_experts].cpu() / router.temperature

    def selection_bias(self, layer: int) -> Float[Tensor, " W"] | None:
        """Return what is added to the scores for the choice only; None: nothing that matters."""
        bias = self.routers[layer].selection_bias
        if bias is None or self.rule.top_k == self.num_experts or not bool(bias.any()):
            return None
        return bias.detach()[: self.num_experts].cpu()

    def base_ffn(self, layer: int) -> Glu[Tensor]:
        """Return the base's FFN, with shared LoRA experts merged."""
        return Glu(*(self.source.read(p.name, p.rows) for p in self._pieces(layer)))

    def expert(self, layer: int, expert: int, base: Glu[Tensor]) -> Glu[Tensor]:
        """Return an expert's matrices; the last ones are null experts.

        Args:
            layer: which layer.
            expert: which expert.
            base: what `base_ffn` returned.
        """
        null = expert >= self.routers[layer].num_experts
        if self.additive:
            if null:
                none = base.gate[:0], base.up[:0], base.down[:, :0]
                return filled(Glu(*none), self.expert_width)
            return filled(self._small(layer, expert), self.expert_width)
        if null:
            return filled(base, self.expert_width)
        changed = []
        for piece, value in zip(self._pieces(layer), base, strict=True):
            bank = self._layers[piece.name.removesuffix(".weight")].moe_banks[self.adapter]
            changed.append(add_pair(value, expert_pair(bank, expert), piece.rows))
        return filled(Glu(*changed), self.expert_width)

    def _small(self, layer: int, expert: int) -> Glu[Tensor]:
        bank = self._glu(layer)
        gate, up, down = (bank.factor(name).weight.detach().cpu() for name in bank.factor_names)
        own = slice(expert * bank.size.rank, (expert + 1) * bank.size.rank)
        # The shared experts are not routed, so the router's scale is not theirs.
        routed = expert < bank.size.num_experts
        scale = bank.size.scale * (self.rule.scale if routed else 1.0)
        return Glu(gate[own].double(), up[own].double(), down[:, own].double() * scale)

    def shared(self, layer: int, base: Glu[Tensor], width: int) -> Glu[Tensor]:
        """Return what every token uses beside small experts: the base's FFN and shared experts.

        Args:
            layer: which layer.
            base: what `base_ffn` returned.
            width: of the result; hidden units that do nothing fill it up.
        """
        size = self._glu(layer).size
        always = range(size.num_experts, size.total_experts)
        parts = [base, *(self._small(layer, expert) for expert in always)]
        whole = Glu(
            torch.cat([part.gate.double() for part in parts]),
            torch.cat([part.up.double() for part in parts]),
            torch.cat([part.down.double() for part in parts], 1),
        )
        return filled(whole, width)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the adapter's tensors, in hexadecimal."""
        digest = hashlib.sha256()
        state = get_peft_model_state_dict(
            self._model, adapter_name=self.adapter, save_embedding_layers=False
        )
        for name in sorted(state):
            digest.update(name.encode())
            value = state[name].detach().cpu().contiguous().reshape(-1)
            raw: Any = value.view(torch.uint8).numpy()
            digest.update(memoryview(raw))
        return digest.hexdigest()
