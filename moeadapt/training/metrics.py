"""Router statistics -> the numbers that go to a logger, under `moe/`."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from moeadapt.balance import BalanceConfig
from moeadapt.routers import Router
from moeadapt.stats import RouterStats
from moeadapt.tuner.head import RouterHead


def router_metrics(
    stats: Mapping[str, RouterStats],
    balance: Mapping[str, Mapping[str, BalanceConfig]],
    routers: Mapping[str, Router] | None = None,
) -> dict[str, float]:
    """Summarise the routers of a model over one logging window.

    Args:
        stats: router -> its statistics, from `pop_router_stats`.
        balance: router -> its balance losses by name, in the order of `RouterStats.losses`.
        routers: router -> its module, where coefficients that change are kept; None: those of the
            settings are used.

    Returns:
        Means over routers unless said otherwise; empty without statistics:

        - `moe/aux_loss`: sum of coefficient x balance loss, what is added to the task loss, by
          the coefficients of now;
        - `moe/<name>`: each balance loss before its coefficient (`moe/<name>_loss` if the name is
          one of those below);
        - `moe/load_max`, `moe/load_min`: load of the busiest and the idlest expert as a multiple
          of 1/E: 1 is perfect balance, E (and 0) a collapse;
        - `moe/entropy`: token entropy as a share of its largest, the log of the number of experts
          and null experts (those only if `routers` is given): 1 is undecided, 0 is certain;
        - `moe/active_experts`: experts in use per token;
        - `moe/dead_experts`: experts that no token used, counted over all routers;
        - `moe/null_share`: share of all slots that null experts took, over the routers that have
          null experts; not there if none has.

    Example:
        >>> stats = RouterStats(tokens=8.0, load=torch.tensor([0.75, 0.25]),
        ...     importance=torch.tensor([0.5, 0.5]), entropy=math.log(2), active=1.0, losses=())
        >>> router_metrics({"mlp": stats}, {"mlp": {}})["moe/load_max"]
        1.5
    """
    if not stats:
        return {}
    losses: dict[str, list[float]] = {}
    aux = []
    for name, router in stats.items():
        configs = balance[name]
        module = None if routers is None else routers[name]
        coefs = [
            c.coef if module is None else float(c.coefficient(module)) for c in configs.values()
        ]
        aux.append(sum(c * loss for c, loss in zip(coefs, router.losses, strict=True)))
        for loss_name, loss in zip(configs, router.losses, strict=True):
            losses.setdefault(loss_name, []).append(loss)
    each = list(stats.values())
    metrics = {
        "moe/aux_loss": fmean(aux),
        "moe/load_max": fmean(float(r.load.max()) * len(r.load) for r in each),
        "moe/load_min": fmean(float(r.load.min()) * len(r.load) for r in each),
        "moe/entropy": fmean(
            _entropy_share(r, None if routers is None else routers[name])
            for name, r in stats.items()
        ),
        "moe/active_experts": fmean(r.active for r in each),
        "moe/dead_experts": float(sum(int((r.load == 0).sum()) for r in each)),
    }
    if null_shares := _null_shares(stats, routers):
        metrics["moe/null_share"] = fmean(null_shares)
    for name, values in losses.items():
        key = f"moe/{name}"
        metrics[f"{key}_loss" if key in metrics else key] = fmean(values)
    return metrics


def schedule_metrics(heads: Sequence[RouterHead]) -> dict[str, float]:
    """Return what the schedule makes of the routers now, where it changes it.

    Args:
        heads: the routers that are trained.

    Returns:
        Means over routers, `moe/temperature` and `moe/k`, each if it has a schedule.
    """
    values = [head.values for head in heads if head.schedule is not None]
    temperatures = [v.temperature for v in values if v.temperature is not None]
    ks = [v.k for v in values if v.k is not None]
    found = {"moe/temperature": temperatures, "moe/k": ks}
    return {name: fmean(numbers) for name, numbers in found.items() if numbers}


def _null_shares(
    stats: Mapping[str, RouterStats], routers: Mapping[str, Router] | None
) -> list[float]:
    if routers is None:
        return [router.null_share for router in stats.values() if router.null_share > 0]
    return [router.null_share for name, router in stats.items() if routers[name].null_experts]


def _entropy_share(stats: RouterStats, router: Router | None) -> float:
    width = len(stats.load) if router is None else router.width
    return stats.entropy / math.log(width) if width > 1 else 0.0
