"""What may happen to a model in the middle of an answer."""

import copy
import dataclasses

from torch import nn


def layer_of(model: nn.Module) -> nn.Module:
    """Return a linear whose experts read what others read too."""
    return model.base_model.model.model.layers[1].self_attn.k_proj


def hook_a_factor(model):
    bank = layer_of(model).moe_banks["default"]
    bank.factor("lora_B").register_forward_hook(lambda module, args, out: out * 0.5)


def hook_the_base(model):
    layer_of(model).base_layer.register_forward_hook(lambda module, args, out: out * 0.5)


def hook_the_router(model):
    for name, module in model.named_modules():
        if name.endswith("moeadapt_router.default"):
            module.register_forward_hook(lambda *_: seen.append(1))


def replace_a_factor(model):
    factors = layer_of(model).moeadapt_lora_A
    factors["default"] = copy.deepcopy(factors["default"]).requires_grad_(False)
    factors["default"].weight.data.mul_(-1)


def replace_a_parameter(model):
    factor = layer_of(model).moeadapt_lora_B["default"]
    factor.weight = nn.Parameter(-factor.weight.data)


def change_in_place(model):
    for name, parameter in model.named_parameters():
        if "moeadapt" in name:
            parameter.mul_(-1)


def replace_the_base(model):
    layer = layer_of(model)
    layer.base_layer = copy.deepcopy(layer.base_layer)
    layer.base_layer.weight.data.mul_(-1)


def patch_the_base(model):
    base = layer_of(model).base_layer
    own = base.forward
    base.forward = lambda x: own(x) * 0.5


def train_with_dropout(model):
    layer_of(model).train()
    layer_of(model).moe_dropout["default"] = nn.Dropout(1.0).train()


def patch_a_factor(model):
    factor = layer_of(model).moeadapt_lora_B["default"]
    factor.forward = lambda x, onto=None, inplace=False: onto * 0.5


def routers_of(model):
    return [m for n, m in model.named_modules() if n.endswith("moeadapt_router.default")]


def patch_the_router(model):
    for router in routers_of(model):
        own = router.forward

        def patched(*args, own=own):
            routing = own(*args)
            return dataclasses.replace(routing, weights=routing.weights.flip(-1))

        router.forward = patched


def add_a_selection_bias(model):
    for router in routers_of(model):
        router.add_selection_bias()
        router.selection_bias[0] = 10.0


def switch_off(model):
    model.base_model.disable_adapter_layers()


def switch_over(model):
    model.set_adapter("other")


def switch_both_on(model):
    model.base_model.set_adapter(["default", "other"])


def use_gather(model):
    for layer in model.modules():
        for bank in getattr(layer, "moe_banks", {}).values():
            bank.impl = "gather"


seen: list[int] = []
CHANGES = [
    hook_a_factor,
    hook_the_base,
    hook_the_router,
    replace_a_factor,
    replace_a_parameter,
    change_in_place,
    replace_the_base,
    patch_the_base,
    train_with_dropout,
    patch_a_factor,
    patch_the_router,
    add_a_selection_bias,
    switch_off,
    switch_over,
    switch_both_on,
    use_gather,
]
