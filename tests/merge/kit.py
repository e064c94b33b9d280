"""Mixtures, data and batches of them, shared by the tests of this folder."""

import torch
from peft import PeftModel

from moeadapt.tuner.inspect import heads_of
from tests.merge.dense import SEEDS
from tests.tiny import adapted, batch, tiny

KINDS = ("layer", "block", "ffn")
ROUTERS = {
    "top_k": {"name": "top_k", "k": 2, "init_std": 0.5, "bias": True, "null_experts": 2},
    "noisy": {"name": "top_k", "k": 2, "init_std": 0.5, "noise": "softplus"},
    "cosine": {"name": "cosine", "k": 2},
    "dynamic": {"name": "dynamic"},
    "threshold": {"name": "threshold", "learned": True},
    "sparsegen": {"name": "sparsegen"},
    "uniform": {"name": "uniform"},
    "soft": {"name": "soft", "init_std": 0.5},
}
BIASED = {"router": ROUTERS["noisy"], "balance": {"loss_free": 0.1}}


def mixture(kind="layer", **overrides):
    return adapted("llama", kind, **{"n_shared": 1, **overrides}).double()


def batches():
    return [batch(seed=seed) for seed in SEEDS]


def reloaded(model, folder):
    model.save_pretrained(str(folder))
    return PeftModel.from_pretrained(tiny("llama").double(), str(folder)).eval()


def randomise(model):
    """Give every row of every router its own numbers, buffers included."""
    generator = torch.Generator().manual_seed(3)
    for head in heads_of(model).values():
        tensors = dict(head.router.named_parameters()) | dict(head.router.named_buffers())
        for tensor in tensors.values():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.data.add_(0.05 * noise.to(tensor))
