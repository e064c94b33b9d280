"""Settings of routers that a wrapper which splits parameters, or steps by itself, cannot do."""

from collections.abc import Mapping

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from moeadapt.errors import TrainingError
from moeadapt.tuner.head import RouterHead

SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
"""Here parameters are not whole tensors, and the wrapper keeps its own float32 copy of them."""

OWN_STEP = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Here the optimizer is not torch's, and steps in its own way."""


def check_sharding(acts_on_optimizer: bool, clips: bool) -> None:
    """Refuse options of routers that need whole gradients or torch's own step.

    Raises:
        TrainingError: they are asked for.
    """
    kind = AcceleratorState().distributed_type
    if kind in OWN_STEP and (acts_on_optimizer or clips):
        raise TrainingError(
            f"under {kind.value} the optimizer steps in its own way, so routers cannot be frozen "
            "or warmed up by the schedule, and MoeAdaptCallback has no learning rate, weight decay "
            "or gradient norm for them; use DDP or FSDP. A trainer of moeadapt.training has "
            "router_learning_rate and router_weight_decay also here"
        )
    if kind in SHARDED and clips:
        raise TrainingError(
            f"under {kind.value} each process sees a part of the routers' gradients, whose norm "
            "is not theirs; leave router_max_grad_norm out, or use DDP"
        )


def check_edits(heads: Mapping[str, RouterHead]) -> None:
    """Refuse routers that add and remove experts where no process holds a whole gate.

    Raises:
        TrainingError: they are asked for.
    """
    kind = AcceleratorState().distributed_type
    editing = [name for name, head in heads.items() if head.router.acts_after_step]
    if kind in SHARDED and editing:
        raise TrainingError(
            f"router {editing[0]!r} adds and removes experts while it trains, and under "
            f"{kind.value} no process holds its whole gate; use DDP, or a router option every=0"
        )
