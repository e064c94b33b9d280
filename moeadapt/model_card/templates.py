"""Tells a card that a library generated and nobody touched from one that somebody wrote."""

import re
from functools import cache
from pathlib import Path

_GENERATED = (
    r"# Model Card for Model ID",
    r"- PEFT [\w.]+",
    r"### Framework versions",
    r"## Training procedure",
    r"- \*\*(License|Language\(s\) \(NLP\)|Finetuned from model \[optional\]):\*\* [\w./-]+",
    r"This is the model card of a .{1,3} \w+ model that has been pushed on the Hub\. "
    r"This model card has been automatically generated\.",
)

_TRL = re.compile(r"^It has been trained using \[TRL\]\(.*\)\.$", re.MULTILINE)
_TRL_CITATION = re.compile(r"^Cite .+ as:\s*```bibtex\n.*?^```$", re.MULTILINE | re.DOTALL)
_TRL_LINES = (
    r"# Model Card for .+",
    r"This model is a fine-tuned version of \[.*\]\(https://huggingface\.co/.*\).*\.",
    r"It has been trained using \[TRL\]\(.*\)\.",
    r"## (Quick start|Training procedure|Citations)",
    r"```(python)?",
    r"from transformers import pipeline",
    r'question = "If you had a time machine, .*"',
    r'text = "The capital of France is Paris\."',
    r"(generator|rewarder) = pipeline\(.*\)",
    r"output = (generator|rewarder)\(.*",
    r'print\(output\["(generated_text|score)"\]\)',
    r"(\[<img src=.*\]\(.*\) *)+",
    r"This model was trained with [\w-]+(, a method introduced in \[.*\]\(.*\))?\.",
    r"### Framework versions",
    r"- (PEFT|TRL:|Transformers:|Pytorch:|Datasets:|Tokenizers:) [\w.+-]+",
)
"""The draft of TRL's trainers: its sentences, whatever model, method and versions they name."""

_TRAINER = "<!-- This model card has been generated automatically according to the information"
_TRAINER_LINES = (
    rf"{re.escape(_TRAINER)}.*",
    r"should probably proofread and complete it, then remove this comment\. -->",
    r"# .+",
    r"This model is a fine-tuned version of .*",
    r"It achieves the following results on the evaluation set:",
    r"- [\w ]+: [-\d.e]+",
    r"More information needed",
    r"## (Model description|Intended uses & limitations|Training and evaluation data)",
    r"## Training procedure",
    r"### (Training hyperparameters|Training results|Framework versions)",
    r"The following hyperparameters were used during training:",
    r"- [a-z_0-9]+: .+",
    r"\|.*\|",
    r"- (PEFT|Transformers|Pytorch|Datasets|Tokenizers) [\w.+-]+",
)
"""The draft of transformers' trainers."""


def is_template(text: str) -> bool:
    """Whether every line of a card's text is one of a draft of PEFT, transformers or TRL.

    Example:
        >>> is_template("# Model Card for Model ID"), is_template("# My model")
        (True, False)
    """
    if _TRL.search(text):
        return _consists_of(_TRL_LINES, _TRL_CITATION.sub("", text))
    if _TRAINER in text:
        return _consists_of(_TRAINER_LINES, text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return bool(lines) and all(line in _known() or _is_generated(line) for line in lines)


def _consists_of(patterns: tuple[str, ...], text: str) -> bool:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return all(any(re.fullmatch(one, line) for one in patterns) for line in lines)


def _is_generated(line: str) -> bool:
    return any(re.fullmatch(pattern, line) for pattern in _GENERATED)


@cache
def _known() -> frozenset[str]:
    """Return the lines of the template of huggingface_hub, its blanks filled with its own words."""
    import huggingface_hub

    place = Path(huggingface_hub.__file__).parent / "templates" / "modelcard_template.md"
    text = place.read_text(encoding="utf-8").partition("{{ card_data }}\n---")[2]
    filled = re.sub(r"\{\{[^}]*default\(\s*\"([^\"]*)\"[^}]*\}\}", r"\1", text)
    return frozenset(line.strip() for line in filled.splitlines() if line.strip())
