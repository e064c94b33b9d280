"""The PEFT seam: config, layer, model and registration. Nothing else knows peft's internals."""

from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.model import MoeLoraModel
from moeadapt.tuner.register import register

register()

__all__ = ["MoeLoraConfig", "MoeLoraLinear", "MoeLoraModel"]
