"""The PEFT seam: config, layer, model and registration. The only package that imports peft."""

from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.model import MoeLoraModel
from moeadapt.tuner.register import register

register()

__all__ = ["MoeLoraConfig", "MoeLoraLinear", "MoeLoraModel"]
