"""Panel 4: held-out texts, each token in the colour of its main expert, layer by layer.

Letters: L layers, T tokens.
"""

from typing import Any

from moeadapt.report.data import ColoredText, ReportData
from moeadapt.report.palette import ShownExperts, short_names, shown_experts, spread
from moeadapt.report.panels.base import Panel
from moeadapt.report.wording import number

MOST_LAYERS, MOST_SLOTS, MOST_ENTRIES = 48, 8, 80_000
"""What a page holds; an entry takes about 8 bytes."""

STEPS = 10
"""Opacities, from a weight of 0 to one of 1."""

Slots = list[tuple[int, int]]


def texts_panel(data: ReportData) -> Panel:
    """Make the panel."""
    title, key = "Texts, token by token", "texts"
    texts = [text for text in data.texts if text.tokens]
    if not texts:
        return Panel(key=key, title=title, notes=("No text was kept to be shown.",))
    experts = shown_experts(data)
    layers = spread(len(data.layers), MOST_LAYERS)
    length = _length(texts, len(layers))
    labels = short_names([layer.name for layer in data.layers])
    notes = []
    if len(layers) < len(data.layers):
        notes.append(f"The slider has {len(layers)} of {len(data.layers)} layers.")
    if any(len(text.tokens) > length for text in texts):
        notes.append(f"Each text is shown up to its token {length}.")
    if experts.has_other:
        notes.append(f"{experts.note} Tokens of the others are grey; their tip names them.")
    # The data itself holds no more of them, so a token that has as many may use others.
    full = any(len(own) >= MOST_SLOTS for text in texts for layer in text.experts for own in layer)
    if full and data.num_experts > MOST_SLOTS:
        notes.append(f"A tip names at most {MOST_SLOTS} experts, those of the largest weights.")
    start = len(layers) // 2
    return Panel(
        key=key,
        title=title,
        lead="The colour of a token is its main expert, the strength of the colour its weight. "
        "Point at a token, or move to it with the arrow keys, to see its experts.",
        template="texts.html.j2",
        values={
            "legend": list(zip(experts.labels, _classes(experts), strict=True)),
            "start": start,
            "names": [labels[index] for index in layers],
            "texts": [_shown(text, layers[start], length, experts) for text in texts],
            "payload": {
                "layers": [labels[index] for index in layers],
                "colors": [_class(experts, expert) for expert in range(data.num_experts)],
                "steps": STEPS,
                "texts": [_payload(text, layers, length) for text in texts],
            },
        },
        notes=notes,
    )


def _length(texts: list[ColoredText], num_layers: int) -> int:
    """Return how many tokens of each text fit."""
    slots = max(
        (len(slots) for text in texts for layer in text.experts for slots in layer), default=1
    )
    each = max(1, min(slots, MOST_SLOTS)) * num_layers * len(texts)
    return min(max(len(text.tokens) for text in texts), max(1, MOST_ENTRIES // each))


def _class(experts: ShownExperts, expert: int) -> str:
    position = experts.position(expert)
    return f"c{position}" if position < len(experts.indices) else "co"


def _classes(experts: ShownExperts) -> list[str]:
    return [f"c{position}" for position in range(len(experts.indices))] + ["co"] * experts.has_other


def _slots(text: ColoredText, layer: int, token: int) -> Slots:
    """Return the experts that a token uses and their weights in percent."""
    both = zip(text.experts[layer][token], text.weights[layer][token], strict=True)
    return [(expert, round(100 * weight)) for expert, weight in both if weight != 0][:MOST_SLOTS]


def _payload(text: ColoredText, layers: list[int], length: int) -> list[list[list[int]]]:
    """Return [L][T] lists: expert, percent, expert, percent, ..."""
    return [
        [
            [value for slot in _slots(text, layer, token) for value in slot]
            for token in range(min(length, len(text.tokens)))
        ]
        for layer in layers
    ]


def _shown(text: ColoredText, layer: int, length: int, experts: ShownExperts) -> dict[str, Any]:
    """Return a text as the page has it before its script runs."""
    tokens = []
    for index, token in enumerate(text.tokens[:length]):
        slots = _slots(text, layer, index)
        color = "none"
        if slots:
            # the script rounds the same way
            step = (min(max(slots[0][1], 0), 100) * STEPS + 50) // 100
            color = f"{_class(experts, slots[0][0])} w{step}"
        # a token without a mark of its own still has to be seen
        extra = " empty" if not token else " line" if "\n" in token else ""
        tokens.append({"text": token, "color": color, "extra": extra})
    return {"domain": text.domain, "tokens": tokens, "count": number(len(text.tokens), 0)}
