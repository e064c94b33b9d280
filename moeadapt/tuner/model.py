"""`MoeLoraModel`: PEFT's view of the method. Plans an injection, checks it, then applies it."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.tuner.adapter_layer import MERGE_MENU, PREFIX
from moeadapt.tuner.adapter_name import check_adapter_name
from moeadapt.tuner.block import install_blocks, remove_blocks
from moeadapt.tuner.checks import check_layers
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.context import (
    attach_context,
    detach_context,
    find_context,
)
from moeadapt.tuner.expected import check_plausible
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.loading import check_new, check_state_dict, current, naming_settings
from moeadapt.tuner.patterns import check_patterns_end
from moeadapt.tuner.plan import no_target_message, plan_targets
from moeadapt.tuner.sizes import plan_sizes
from moeadapt.tuner.tokens import token_modules


class MoeLoraModel(BaseTuner):
    """Wraps a base model and puts `MoeLoraLinear` around its target linears."""

    prefix = PREFIX
    tuner_layer_cls = MoeLoraLinear
    _ffn_ends: Mapping[str, str] = MappingProxyType({})
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """See `BaseTuner.inject_adapter`; refuses before the model is touched.

        Raises:
            ConfigError: see `check_adapter_name`, `plan_targets` and `plan_sizes`.
        """
        fresh = find_context(model) is None
        try:
            check_adapter_name(adapter_name)
            config: Any = self.peft_config[adapter_name]
            with naming_settings():
                self._plan(model, config, state_dict)
            context = attach_context(model)
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
            )
        except Exception:
            # Injected natively, this mapping is the model's own and outlives the refusal.
            self.peft_config.pop(adapter_name, None)
            if not hasattr(model, "peft_config"):
                # transformers notes its first adapter before it is there.
                vars(model).pop("_hf_peft_config_loaded", None)
            if fresh:
                detach_context(model)
            raise
        install_blocks(model, context)

    def _plan(
        self, model: nn.Module, config: MoeLoraConfig, state_dict: dict[str, Tensor] | None
    ) -> None:
        files = current()
        if files is not None:
            check_plausible(config, files.header, files.path)
        if self.get_model_config(model).get("is_encoder_decoder"):
            raise ConfigError(
                "encoder-decoder models are not supported: encoder and decoder have padding of "
                "their own, and routers would count the one's as the other's. Use a decoder-only "
                "or encoder-only model, or plain LoRA."
            )
        names = [name for name, _ in model.named_modules()]
        check_layers(config, names)
        check_patterns_end(config, names)
        token_modules(model, config)
        try:
            keys = self._target_keys(model, config, state_dict)
        except re.error as error:
            raise ConfigError(
                f"MoeLoraConfig: {error.pattern!r} is not a valid regular expression: {error}. A "
                "string is a pattern for whole module paths; give a list to name modules."
            ) from None
        if not keys and state_dict is None and config.target_modules != DUMMY_TARGET_MODULES:
            raise ConfigError(no_target_message(model, config))
        quantization = get_quantization_kwargs(model)
        self._plans = plan_targets(model, config, keys, quantization)
        self._sizes = plan_sizes(model, config, self._plans, quantization)
        if files is not None:
            check_new(files, model, config, self._plans, self._sizes)
        ends = {p.block.path: k for k, p in self._plans.items() if p.block and p.placement == "glu"}
        self._ffn_ends = {**self._ffn_ends, **ends}

    def _target_keys(
        self, model: nn.Module, config: MoeLoraConfig, state_dict: dict[str, Tensor] | None
    ) -> list[str]:
        """Match targets the way `BaseTuner.inject_adapter` is about to."""
        names = [name for name, _ in model.named_modules() if name]
        inside = tuple(
            name + "." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)
        )
        names = [name for name in names if not name.startswith(inside)]
        if state_dict is not None:
            wanted = {key.rsplit("." + PREFIX, 1)[0] for key in state_dict}
            return [name for name in names if name in wanted]
        # Both helpers write into the config; PEFT calls them again on the real one.
        own = self._prepare_adapter_config(copy.copy(config), self.get_model_config(model))
        own = _maybe_include_all_linear_layers(own, model)
        return [name for name in names if BaseTuner._check_target_module_exists(own, name)]

    def _check_target_module_exists(self, peft_config: MoeLoraConfig, key: str) -> Any:  # type: ignore[override]
        """See `BaseTuner`; of an FFN with experts beside it, only the output projection is one."""
        end = self._ffn_ends.get(key.rpartition(".")[0], key)
        if peft_config.placement == "glu" and key != end:
            return False
        return super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: MoeLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        plan, size = self._plans[current_key], self._sizes[current_key]
        if isinstance(target, MoeLoraLinear):
            target.add_experts(adapter_name, peft_config, size, plan)
            return
        context = attach_context(self.model)
        layer = MoeLoraLinear(target, context, **get_quantization_kwargs(self.model))
        layer._active_adapter = [adapter_name]
        layer.add_experts(adapter_name, peft_config, size, plan)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_state_dict(remapped, model, adapter_name)
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT strips `adapter_names` before the base model sees it, so it would be ignored.
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedError(
                "adapter_names= (a different adapter per row) is not supported by a mixture of "
                "LoRA experts; group the rows by adapter and call set_adapter between the calls"
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise UnsupportedError(f"cannot merge: {MERGE_MENU}")

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        remove_blocks(model)
        detach_context(model)
        return model
