"""Which routers, expert types and placements go together, and why the others do not.

Nothing is listed here: every combination is asked of the checks that users meet.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moeadapt.balance import BALANCE
from moeadapt.errors import ConfigError
from moeadapt.experts import EXPERTS, BankSize
from moeadapt.routers import ROUTERS
from moeadapt.tuner.config import MoeLoraConfig

PLACEMENTS = {
    "linear, layer": {"placement": "linear", "router_scope": "layer"},
    "linear, block": {"placement": "linear", "router_scope": "block"},
    "ffn": {"placement": "ffn"},
    "glu": {"placement": "glu"},
}
"""Name -> the fields of `MoeLoraConfig` that choose it."""

NUM_EXPERTS, RANK = 8, 8


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One router with one expert type in one placement, each with its defaults.

    Attributes:
        router: name of the router.
        experts: name of the expert type.
        placement: one of `PLACEMENTS`.
        refusal: why it is refused; None: it works.
    """

    router: str
    experts: str
    placement: str
    refusal: str | None


def expert_spec(name: str, num_experts: int = NUM_EXPERTS, rank: int = RANK) -> dict[str, object]:
    """Return an expert type with the settings that it cannot be without, and small."""
    if name == "heterogeneous":
        return {"name": name, "ranks": [rank // 2, rank] * (num_experts // 2)}
    if name == "glu":
        return {"name": name, "dim": rank}
    return {"name": name}


def combinations() -> Iterator[Combination]:
    """Try every combination, without a model."""
    for router in sorted(ROUTERS):
        for experts in sorted(EXPERTS):
            for placement, fields in PLACEMENTS.items():
                refusal = None
                try:
                    MoeLoraConfig(
                        r=RANK,
                        num_experts=NUM_EXPERTS,
                        router=router,
                        balance=None,
                        experts=expert_spec(experts),
                        target_modules="all-linear",
                        **fields,  # type: ignore[arg-type]
                    )
                except ConfigError as error:
                    refusal = str(error)
                yield Combination(
                    router=router, experts=experts, placement=placement, refusal=refusal
                )


def balance_refusals() -> Iterator[tuple[str, str, str]]:
    """Try every balance loss with every router and expert type; yield why it is refused."""
    for loss_name in sorted(BALANCE):
        for name in sorted(ROUTERS):
            fields = ROUTERS[name].model_fields
            options = {"null_experts": 2} if "null_experts" in fields else {}
            router = ROUTERS.parse({"name": name, **options}).build(RANK, NUM_EXPERTS)
            try:
                BALANCE.parse(loss_name).check(router)
            except ConfigError as error:
                kind = type(router).__name__
                yield loss_name, f"router `{name}`", str(error).replace(kind, "router of this kind")
        for name in sorted(EXPERTS):
            spec = EXPERTS.parse(expert_spec(name))
            size = BankSize(in_features=RANK, out_features=RANK, num_experts=NUM_EXPERTS, rank=RANK)
            bank = spec.build(spec.sized(size))
            try:
                BALANCE.parse(loss_name).check_experts(bank)
            except ConfigError as error:
                yield loss_name, f"experts `{name}`", str(error)


def markdown() -> str:
    """Return docs/combinations.md."""
    found = list(combinations())
    refused = [one for one in found if one.refusal is not None]
    lines = [
        "# Combinations",
        "",
        "<!-- Written by `make docs` from the checks of the code. -->",
        "",
        f"Every router with every expert type in every placement: {len(found)} combinations, "
        f"{len(found) - len(refused)} work, {len(refused)} are refused. A test trains, saves, "
        "loads and generates with each one that works.",
        "",
        "| refused | reason |",
        "| --- | --- |",
    ]
    reasons: dict[str, list[Combination]] = {}
    for one in refused:
        assert one.refusal is not None
        reasons.setdefault(one.refusal, []).append(one)
    for reason, group in reasons.items():
        lines.append(f"| {_summary(group)} | {_cell(reason)} |")
    lines += [
        "",
        "Routers that look ahead (`expert_choice`) train and evaluate, and refuse to generate.",
        "",
        "## Balance losses",
        "",
        "| loss | refused with | reason |",
        "| --- | --- | --- |",
    ]
    reasons_of: dict[tuple[str, str], list[str]] = {}
    for loss, name, reason in balance_refusals():
        reasons_of.setdefault((loss, reason), []).append(name)
    for (loss, reason), names in reasons_of.items():
        lines.append(f"| `{loss}` | {', '.join(names)} | {_cell(reason)} |")
    return "\n".join(lines) + "\n"


def _summary(group: list[Combination]) -> str:
    routers = sorted({one.router for one in group})
    experts = sorted({one.experts for one in group})
    places = [name for name in PLACEMENTS if any(one.placement == name for one in group)]
    return "; ".join(
        (
            "any router" if len(routers) == len(ROUTERS) else "router " + _names(routers),
            "any experts" if len(experts) == len(EXPERTS) else "experts " + _names(experts),
            "any placement" if len(places) == len(PLACEMENTS) else "placement " + _names(places),
        )
    )


def _names(values: list[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
