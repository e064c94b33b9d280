"""Router statistics -> the numbers that go to a logger, under `moe/`."""

import math
from collections.abc import Mapping
from statistics import fmean

from moeadapt.balance import BalanceConfig
from moeadapt.stats import RouterStats


def router_metrics(
    stats: Mapping[str, RouterStats], balance: Mapping[str, Mapping[str, BalanceConfig]]
) -> dict[str, float]:
    """Summarise the routers of a model over one logging window.

    Args:
        stats: router -> its statistics, from `pop_router_stats`.
        balance: router -> its balance losses by name, in the order of `RouterStats.losses`.

    Returns:
        Means over routers unless said otherwise; empty without statistics:

        - `moe/aux_loss`: sum of coefficient x balance loss, what is added to the task loss;
        - `moe/<name>`: each balance loss before its coefficient (`moe/<name>_loss` if the name is
          one of those below);
        - `moe/load_max`, `moe/load_min`: load of the busiest and the idlest expert as a multiple
          of 1/E: 1 is perfect balance, E (and 0) a collapse;
        - `moe/entropy`: token entropy as a share of log E: 1 is undecided, 0 is certain;
        - `moe/active_experts`: experts in use per token;
        - `moe/dead_experts`: experts that no token used, counted over all routers.

    Example:
        >>> stats = RouterStats(tokens=8.0, load=torch.tensor([0.75, 0.25]),
        ...     importance=torch.tensor([0.5, 0.5]), entropy=math.log(2), active=1.0, losses=())
        >>> router_metrics({"mlp": stats}, {"mlp": {}})["moe/load_max"]
        1.5
    """
    if not stats:
        return {}
    routers = list(stats.values())
    losses: dict[str, list[float]] = {}
    aux = []
    for name, router in stats.items():
        configs = balance[name]
        aux.append(
            sum(c.coef * loss for c, loss in zip(configs.values(), router.losses, strict=True))
        )
        for loss_name, loss in zip(configs, router.losses, strict=True):
            losses.setdefault(loss_name, []).append(loss)
    metrics = {
        "moe/aux_loss": fmean(aux),
        "moe/load_max": fmean(float(r.load.max()) * len(r.load) for r in routers),
        "moe/load_min": fmean(float(r.load.min()) * len(r.load) for r in routers),
        "moe/entropy": fmean(_entropy_share(r) for r in routers),
        "moe/active_experts": fmean(r.active for r in routers),
        "moe/dead_experts": float(sum(int((r.load == 0).sum()) for r in routers)),
    }
    for name, values in losses.items():
        key = f"moe/{name}"
        metrics[f"{key}_loss" if key in metrics else key] = fmean(values)
    return metrics


def _entropy_share(stats: RouterStats) -> float:
    num_experts = len(stats.load)
    return stats.entropy / math.log(num_experts) if num_experts > 1 else 0.0
