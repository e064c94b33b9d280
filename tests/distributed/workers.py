"""What each of two processes does: train one step in every way, and compare with one process."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import moeadapt
from moeadapt.tuner.inspect import pop_router_stats
from tests.tiny import KINDS, adapted, batch, labels_of

CHECKPOINTING = {"off": None, "non_reentrant": False, "reentrant": True}
DATA_PARALLEL = [("ddp", kind, mode) for kind in KINDS for mode in CHECKPOINTING]
SHARDED = [("fsdp", kind, mode) for kind in KINDS for mode in ("off", "non_reentrant")]
CASES = [*DATA_PARALLEL, *SHARDED]
"""Wrapper, kind of adapter, gradient checkpointing."""

WORLD = 2
EXPERTS = 8
MICRO_BATCHES = 2

Gradients = dict[str, Tensor]


def build(kind: str, checkpointing: str = "off") -> PeftModel:
    """Return a model with so many experts that a process leaves some unused."""
    model = adapted(
        "llama",
        kind,
        num_experts=EXPERTS,
        router={"name": "top_k", "k": 1, "init_std": 0.5},
        balance={"switch": 0.5, "z_loss": 0.25},
    ).double()
    if CHECKPOINTING[checkpointing] is not None:
        reentrant = {"use_reentrant": CHECKPOINTING[checkpointing]}
        model.base_model.model.activation_checkpointing_enable(reentrant)
        model.enable_input_require_grads()
    return model.train()


def data_of(rank: int) -> dict[str, Tensor]:
    """Return the micro-batches of one process: few tokens, some of them padding."""
    return batch(rows=2, length=5, seed=10 + rank)


def step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Back-propagate once."""
    moeadapt.set_aux_loss_scale(model, 1.0)
    model(**inputs, labels=labels_of(inputs)).loss.backward()


def accumulate(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Back-propagate one row at a time."""
    moeadapt.set_aux_loss_scale(model, 1 / MICRO_BATCHES)
    for row in range(MICRO_BATCHES):
        part = {name: value[row : row + 1] for name, value in inputs.items()}
        (model(**part, labels=labels_of(part)).loss / MICRO_BATCHES).backward()


def whole(tensor: Any) -> Tensor:
    """Gather a sharded tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients_of(model: nn.Module) -> Gradients:
    """Return every gradient, whole, by the name it has without wrappers."""
    return {
        name.removeprefix("module."): whole(p.grad).clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def mean_of_single_processes(kind: str, train: Any) -> Gradients:
    """Define the expected gradient: the mean over the processes' data, one process each."""
    singles = []
    for rank in range(WORLD):
        model = build(kind)
        train(model, data_of(rank))
        singles.append(gradients_of(model))
    return {name: sum(g[name] for g in singles) / WORLD for name in singles[0]}


def unused_experts(kind: str, rank: int) -> int:
    """Count the experts that no real token of `rank` uses, over all routers."""
    model = build(kind)
    with torch.no_grad(), moeadapt.collect_routing(model) as routings:
        model(**data_of(rank))
    used = [(r.weights[r.token_mask] != 0).any(0) for (r,) in routings.values()]
    return int(torch.stack(used).logical_not().sum())


def wrap(wrapper: str, model: PeftModel) -> nn.Module:
    """Spread `model` over the processes, without a search for unused parameters."""
    if wrapper == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=False)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def run(rank: int, folder: str) -> None:
    """Run every case in process `rank` and save what it found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    found: dict[Any, Any] = {"unused": {kind: unused_experts(kind, rank) for kind in KINDS}}
    found["real"] = int(data_of(rank)["attention_mask"].sum())
    for wrapper, kind, mode in CASES:
        model = wrap(wrapper, build(kind, mode))
        step(model, data_of(rank))
        counted = {name: s.tokens for name, s in pop_router_stats(model).items()}
        found[wrapper, kind, mode] = {"gradients": gradients_of(model), "counted": counted}
    for wrapper in ("ddp", "fsdp"):
        model = wrap(wrapper, build("block"))
        accumulate(model, data_of(rank))
        found["accumulated", wrapper] = gradients_of(model)
    if rank == 0:
        found["expected"] = {kind: mean_of_single_processes(kind, step) for kind in KINDS}
        found["expected accumulated"] = mean_of_single_processes("block", accumulate)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
