"""Makes PEFT know the method; importing moeadapt calls it."""

import enum

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import register_peft_method

METHOD = "MOEADAPT"
"""The `peft_type` in saved adapters: a word that a stranger can search for and install."""


def extend_peft_type() -> PeftType:
    """Add the member `MOEADAPT` to PEFT's enum, once.

    PEFT has no public way to do it, and it looks methods up by member. The result is verified, so
    that a change of Python's enum internals fails here and not in a saved file.

    Raises:
        RuntimeError: the enum could not be extended.
    """
    if METHOD in PeftType.__members__:
        return PeftType[METHOD]
    member = str.__new__(PeftType, METHOD)
    member._name_ = METHOD
    member._value_ = METHOD
    vars(member).update(__objclass__=PeftType, _sort_order_=len(PeftType))
    PeftType._member_names_.append(METHOD)
    PeftType._member_map_[METHOD] = member
    PeftType._value2member_map_[METHOD] = member
    type.__setattr__(PeftType, METHOD, member)
    found = (PeftType[METHOD], PeftType(METHOD), list(PeftType)[-1], getattr(PeftType, METHOD))
    if not all(other is member for other in found) or not isinstance(member, enum.Enum):
        raise RuntimeError("could not extend peft.PeftType; please report your Python version")
    return member


def register() -> None:
    """Register the method with PEFT; calling it again does nothing.

    Raises:
        RuntimeError: this PEFT already knows another method of that name.
    """
    from moeadapt.tuner.config import MoeLoraConfig
    from moeadapt.tuner.entry_points import install
    from moeadapt.tuner.model import MoeLoraModel
    from moeadapt.tuner.whole_save import save_whole

    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(METHOD)  # type: ignore[call-overload]
    if known is MoeLoraConfig:
        return
    if known is not None:
        raise RuntimeError(f"PEFT already has a method {METHOD}: {known}; moeadapt cannot add its")
    extend_peft_type()
    register_peft_method(name=METHOD.lower(), config_cls=MoeLoraConfig, model_cls=MoeLoraModel)
    install()
    save_whole()  # around the manifest that `install` has written, so that it is part of the whole
