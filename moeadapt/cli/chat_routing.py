"""Shows the routing of an answer: its tokens by main expert, and what each layer did."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeadapt.chat.conversation import Answer
from moeadapt.chat.routing import AnswerRouting
from moeadapt.cli.console import result_console
from moeadapt.errors import ConfigError

MOST_LAYERS = 12
"""Layers of the table unless all are asked for: those with the least even load."""

COLORS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442")
"""Of the experts, in turn: Okabe and Ito, Color Universal Design, 2008, without its black."""

BARS = " ▁▂▃▄▅▆▇█"
DIGITS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def print_routing(answer: Answer, asked: str) -> None:
    """Print the routing of an answer.

    Args:
        answer: the answer.
        asked: number of the layer whose tokens are shown; empty: the one in the middle; `all`:
            every layer in the table.

    Raises:
        ConfigError: the model does not route, or has no such layer.
    """
    routing = answer.routing
    if routing is None:
        raise ConfigError("this model has no routers of moeadapt, so there is no routing to show")
    if not answer.tokens:
        raise ConfigError("the answer has no tokens")
    layer = _layer(routing, asked)
    console = result_console()
    _print_tokens(console, answer.tokens, routing, layer)
    _print_experts(console, answer.tokens, routing, layer)
    _print_layers(console, routing, every=asked == "all")


def routing_json(answer: Answer) -> dict[str, Any]:
    """Return the use of every layer, and the tokens by main expert of the layer in the middle."""
    routing = answer.routing
    assert routing is not None
    layer = len(routing.names) // 2
    experts, shares = routing.main(layer)
    tokens = [
        {"token": token, "expert": expert if share else None, "weight": round(share, 4)}
        for token, expert, share in zip(
            answer.tokens, experts.tolist(), shares.tolist(), strict=True
        )
    ]
    return {"layers": routing.to_dict(), "layer": routing.names[layer], "tokens": tokens}


def _layer(routing: AnswerRouting, asked: str) -> int:
    if asked in ("", "all"):
        return len(routing.names) // 2
    if not asked.isascii() or not asked.isdigit() or int(asked) >= len(routing.names):
        raise ConfigError(
            f"/routing {asked}: a number of a layer from 0 to {len(routing.names) - 1}, or all"
        )
    return int(asked)


def _print_tokens(console: Console, tokens: list[str], routing: AnswerRouting, layer: int) -> None:
    """Print the answer, each token with number and colour of its main expert; `-`: it used none."""
    from moeadapt.cli.chat_loop import printable

    experts, shares = routing.main(layer)
    line = Text()
    for token, expert, share in zip(tokens, experts.tolist(), shares.tolist(), strict=True):
        bold = "bold " if share > 1 / 2 else ""
        color = f"{bold}{COLORS[expert % len(COLORS)]}" if share else ""
        number = str(expert).translate(DIGITS) if share else "-"
        line.append(printable(token) + number, color)
        if not token.endswith((" ", "\n")):
            line.append(" ")
    console.print(f"layer {layer}, {routing.names[layer]}: each token and its main expert")
    console.print(line)


def _print_experts(console: Console, tokens: list[str], routing: AnswerRouting, layer: int) -> None:
    from moeadapt.cli.chat_loop import printable

    experts, shares = routing.main(layer)
    load = routing.use(layer).load
    table = Table("expert", "load", "main of", "weight there", "tokens", title=f"layer {layer}")
    for expert, share in enumerate(load):
        own = ((experts == expert) & (shares > 0)).nonzero().flatten().tolist()
        words = list(dict.fromkeys(printable(tokens[i]).strip() or repr(tokens[i]) for i in own))
        weight = f"{float(shares[own].mean()):.2f}" if own else "-"
        cells = (f"{share:.0%}", f"{len(own)}", weight, " ".join(words))
        name = Text(str(expert), COLORS[expert % len(COLORS)])
        table.add_row(name, *cells)
    console.print(table)


def _print_layers(console: Console, routing: AnswerRouting, *, every: bool) -> None:
    uses = [routing.use(i) for i in range(len(routing.names))]
    shown = sorted(range(len(uses)), key=lambda i: uses[i].effective_experts / len(uses[i].load))
    if not every:
        shown = shown[:MOST_LAYERS]
    table = Table("#", "layer", "load, expert 0 first", "effective experts", "per token")
    left = len(uses) - len(shown)
    table.title = "load of the layers" if not left else f"the {len(shown)} least even layers"
    for i in sorted(shown):
        use = uses[i]
        most = max(*use.load, 1e-9)  # tokens may use no expert at all
        bars = "".join(BARS[round(x / most * (len(BARS) - 1))] for x in use.load)
        effective = f"{use.effective_experts:.2f} of {len(use.load)}"
        table.add_row(str(i), routing.names[i], f"|{bars}|", effective, f"{use.active:.2f}")
    console.print(table)
    if left:
        console.print(f"{left} more: /routing all; tokens of another layer: /routing NUMBER")
