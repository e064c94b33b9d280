"""A report that was never measured: plausible numbers from a fixed seed, and texts that attack."""

import math
import random
from collections.abc import Sequence

from moeadapt.report.data import (
    Arm,
    ColoredText,
    Flow,
    Layer,
    Matrix,
    ReportData,
    TrainingPoint,
    Verdict,
)

HOSTILE = "</script><img src=x onerror=alert(1)>"
STYLE_ESCAPE = "</style><script>alert(2)</script>"
DOMAINS = ["python", "pronounce", "math word"]
WORDS = [
    " the", " train", " leaves", " at", " seven", ",", " so", " she", " has", " def", " return",
    "(", ")", ":", "\n", "    ", " K", "AE1", " T", " 12", " +", " 30", " =", " 42", ".", " apples",
]  # fmt: skip
NASTY = [HOSTILE, STYLE_ESCAPE, "🦊", "\n\n", "x" * 400, "\x00\x1b", "\ud83d", "&amp;", "", "שלום"]


def normalized(values: list[float]) -> list[float]:
    return [value / sum(values) for value in values]


def make_layer(
    rng: random.Random, name: str, experts: int, domains: int, depth: float, similar: bool
) -> Layer:
    load = normalized([rng.gammavariate(6 - 4 * depth, 1) for _ in range(experts)])
    times = [share * experts for share in load]
    lift = [[2 ** rng.gauss(0, 0.25 + depth) for _ in range(experts)] for _ in range(domains)]
    information = 0.02 + 0.3 * depth
    return Layer(
        name=name,
        load=load,
        importance=normalized([share + 0.02 for share in load]),
        max_over_mean=max(times),
        cv=math.sqrt(sum((t - 1) ** 2 for t in times) / experts),
        effective_experts=math.exp(-sum(share * math.log(share) for share in load)),
        active=min(2.0, float(experts)),
        entropy=(0.9 - 0.5 * depth) * math.log2(experts),
        lift=lift,
        p_value=[[0.01 if abs(math.log2(x)) > 0.6 else 0.4 for x in row] for row in lift],
        mutual_information=information,
        mutual_information_null=0.035,
        mutual_information_high=0.06,
        mutual_information_p=0.005 if information > 0.06 else 0.3,
        similarity=symmetric(rng, experts, 1.0, lambda: rng.gauss(0.05, 0.12)) if similar else None,
        coactivation=symmetric(rng, experts, 0.3, lambda: rng.random() * 2 / experts**1.5),
    )


def symmetric(rng: random.Random, size: int, diagonal: float, draw) -> Matrix:
    matrix = [[diagonal] * size for _ in range(size)]
    for i in range(size):
        for j in range(i):
            matrix[i][j] = matrix[j][i] = draw()
    return matrix


def make_flow(rng: random.Random, layer: int, load: list[float], size: int) -> Flow:
    mixed = [[rng.gammavariate(0.35, 1) + 1e-3 for _ in range(size)] for _ in load]
    rows = [[share * x for x in normalized(row)] for share, row in zip(load, mixed, strict=True)]
    return Flow(layer=layer, shares=rows)


def make_text(
    rng: random.Random, domain: str, tokens: list[str], sizes: Sequence[int]
) -> ColoredText:
    slots = min(2, *sizes)
    chosen = [[rng.sample(range(size), slots) for _ in tokens] for size in sizes]
    weights = []
    for _ in sizes:
        first = [rng.uniform(0.5, 1.0) for _ in tokens]
        weights.append([[w, 1 - w][:slots] if slots > 1 else [1.0] for w in first])
    return ColoredText(domain=domain, tokens=tokens, experts=chosen, weights=weights)


def make_training(rng: random.Random) -> list[TrainingPoint]:
    points = []
    for step in range(10, 510, 10):
        decay = math.exp(-step / 150)
        values = {
            "loss": 1.4 + 2 * decay + rng.gauss(0, 0.03),
            "moe/entropy": 0.55 + 0.42 * decay + rng.gauss(0, 0.008),
            "moe/load_max": 1.35 + 0.9 * decay + rng.gauss(0, 0.04),
            "moe/aux_loss": 0.0102 + 0.004 * decay + rng.gauss(0, 0.0001),
        }
        points.append(TrainingPoint(step=step, values=values))
    return points


def make_arms() -> list[Arm]:
    gaps = {
        "learned": (0.0, 0.0),
        "uniform": (0.121, 0.03),
        "random": (0.214, 0.04),
        "shuffled": (0.178, 0.036),
        "best single expert": (0.009, 0.021),
        "adapter off": (1.066, 0.11),
    }
    return [
        Arm(
            name=name,
            nll=1.482 + gap,
            nll_low=1.482 + gap - 0.09,
            nll_high=1.482 + gap + 0.09,
            difference=gap,
            difference_low=gap - half,
            difference_high=gap + half,
        )
        for name, (gap, half) in gaps.items()
    ]


VERDICTS = [
    Verdict(
        name="balanced",
        answer="yes",
        value=1.83,
        unit="times the mean load",
        reason="The busiest expert of the median layer takes less than 2 times the balanced load.",
    ),
    Verdict(
        name="specialised",
        answer="yes",
        value=0.187,
        unit="bits on the domain",
        reason="The main expert tells more of the domain than chance in 5 of 6 layers (p < 0.05).",
    ),
    Verdict(
        name="used",
        answer="unclear",
        value=6.4,
        unit="effective experts of 8",
        reason="At least 80 % of the experts would be a yes, less than 50 % a no.",
    ),
    Verdict(
        name="worth it",
        answer="no",
        value=0.009,
        unit="nats per token",
        reason="The best single expert is as good: the interval of the difference holds 0.",
    ),
]


def sample(
    *,
    layers: int = 6,
    experts: int | Sequence[int] = 8,
    domains: list[str] | None = None,
    training: bool = True,
    similar: bool = True,
    texts: bool = True,
    hostile: bool = False,
    tokens: int = 120,
) -> ReportData:
    rng = random.Random(0)
    # A number for all layers, or one per layer.
    sizes = [experts] * layers if isinstance(experts, int) else list(experts)
    domains = DOMAINS if domains is None else domains
    names = [f"base_model.model.model.layers.{index}.mlp" for index in range(len(sizes))]
    title = "Made-up sample"
    settings = {"base": "none, the numbers are made up", "placement": "ffn", "router": "top_k, k 2",
                "experts": f"{max(sizes)} x lora, r 8", "balance": "switch 0.01"}  # fmt: skip
    if hostile:
        domains = [f"{HOSTILE} \x1b\ud83d {name}" for name in domains]
        names = [f"{name}.{HOSTILE}" for name in names]
        title = STYLE_ESCAPE + "\ud83d"
        settings = {HOSTILE: STYLE_ESCAPE}
    each = [
        make_layer(rng, name, sizes[index], len(domains), (index + 1) / len(sizes), similar)
        for index, name in enumerate(names)
    ]
    return ReportData(
        title=title,
        settings=settings,
        num_experts=max(sizes),
        domains=domains,
        texts_per_domain=[max(40 - 3 * index, 1) for index in range(len(domains))],
        tokens=18_432,
        verdicts=VERDICTS,
        arms=make_arms(),
        layers=each,
        flows=[make_flow(rng, i, each[i].load, sizes[i + 1]) for i in range(len(sizes) - 1)],
        texts=[
            make_text(
                rng,
                domain,
                (NASTY if hostile else []) + [rng.choice(WORDS) for _ in range(tokens)],
                sizes,
            )
            for domain in domains
        ]
        if texts
        else [],
        training=make_training(rng) if training else [],
        versions={"moeadapt": "0.1.0", "torch": "2.13.0", "transformers": "5.23", "peft": "0.21"},
        seconds=41.7,
    )
