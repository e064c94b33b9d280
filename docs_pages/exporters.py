"""The page of the exporters: which stock class holds which mixture of which base."""

import inspect
import sys
from collections.abc import Iterator

from docs_pages.markdown import note
from moeadapt.export.engines import ENGINES, EXACT, MEASURED, RULES
from moeadapt.export.targets import EXPORTERS, Target

INTRO = """\
An export target is a mixture class of transformers that computes what the adapter computes.
`moeadapt export` and `moeadapt upcycle` take the first that fits (`--target auto`). How to train
so that one fits, and what each engine does with it, is said in [Export and serve](../serve.md).

```python
from moeadapt.export.targets import EXPORTERS

print(list(EXPORTERS))
```"""

SLIDING = {
    "none": "no",
    "uniform": "one window for all layers",
    "layers": "a list of layer types",
}


def page() -> str:
    """Return docs/families/exporters.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield from ["# Exporters", "", note("moeadapt/export/targets"), "", INTRO, ""]
    for name, target in EXPORTERS.items():
        yield from _entry(name, target)


def _entry(name: str, target: type[Target]) -> Iterator[str]:
    module = inspect.cleandoc(sys.modules[target.__module__].__doc__ or "")
    first, *more = inspect.cleandoc(target.__doc__ or "").split("\n\n")
    yield from [f"## `{name}`", "", first, ""]
    for paragraph in [*more, module]:
        yield from [paragraph, ""]
    yield from ["| | |", "| --- | --- |"]
    for what, value in _facts(target):
        yield f"| {what} | {value} |"
    yield from ["", f"**Code.** `{target.__module__.replace('.', '/')}.py`", ""]


def _facts(target: type[Target]) -> Iterator[tuple[str, str]]:
    yield "class of transformers", f"`{target.architecture}`"
    yield "bases, `placement: ffn`", _names(target.bases)
    yield "bases, `placement: glu`", _names(target.additive_bases)
    yield "weights are the", target.scoring
    yield "weights sum to 1", "always" if target.norm_choices == (True,) else "as you choose"
    yield "some layers without a mixture", "yes" if target.partial_layers else "no"
    yield "biases in attention", "yes" if target.attention_biases else "no"
    yield "sliding window", SLIDING[target.sliding]
    measured = [engine for engine in ENGINES if target.name in MEASURED.get(engine, ())]
    yield f"measured: {EXACT}", ", ".join(measured) or "-"
    yield "where an engine is wrong", "<br>".join(_refused(target)) or "-"


def _refused(target: type[Target]) -> Iterator[str]:
    for rule in RULES:
        if target.name in rule.targets:
            reason = rule.reason.replace("|", "\\|")
            yield f"{', '.join(e for e in ENGINES if e in rule.engines)}: {reason}"


def _names(bases: frozenset[str]) -> str:
    return ", ".join(f"`{base}`" for base in sorted(bases)) or "-"
