"""The lines without which nobody can load one of our adapters; first in every card."""

from moeadapt.model_card.markdown import code
from moeadapt.model_card.merge import MARK, make_card

WHY = (
    "`import moeadapt` makes PEFT and transformers know the method; without it every loader stops "
    "with `KeyError: 'MOEADAPT'`."
)


def first_lines(*load: str) -> list[str]:
    """Return how to install, how to load, and why; parts of Markdown.

    Args:
        load: lines of Python that load the adapter, after `import moeadapt`.
    """
    return [
        code("bash", "pip install moeadapt"),
        code("python", "import moeadapt", *load),
        WHY,
    ]


def with_first_lines(card: str, where: str) -> str:
    """Return a card that a library drafted, with our lines first; one that has them is unchanged.

    Args:
        card: its text.
        where: it is, named in messages.

    Raises:
        ConfigError: its front matter is broken.
    """
    if has_our_part(card):
        return card
    fields = {"library_name": "peft", "tags": ["moeadapt", "mixture-of-experts"]}
    return make_card(fields, "\n\n".join(first_lines()), card, where, keep_draft=True)


def has_our_part(card: str) -> bool:
    """Whether a card was written by `moeadapt push`, or has our lines."""
    return MARK in card
