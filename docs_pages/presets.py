"""The page of the presets: what each sets, and what of its paper it leaves out."""

from collections.abc import Iterator
from pathlib import Path

from docs_pages.markdown import linked, note
from moeadapt import PRESETS, catalogue
from moeadapt.presets import Preset

CONFIGS = Path(__file__).parents[1] / "configs"

INTRO = """\
A preset is a published method as one line: data, not code. Every field can be overridden.

```python
from moeadapt import MoeLoraConfig

MoeLoraConfig.preset("mixlora", num_experts=4, router={"k": 1})
```

In a recipe it is `moe: {preset: mixlora}`. Where a paper leaves a number open, the one of the
authors' code is taken. Coefficients are for our normalisation of the
[balance losses](balance.md)."""


def page() -> str:
    """Return docs/families/presets.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield from ["# Presets", "", note("moeadapt/presets.py"), "", INTRO, ""]
    for name, preset in sorted(PRESETS.items()):
        yield from _entry(name, preset)


def _entry(name: str, preset: Preset) -> Iterator[str]:
    method = catalogue.describe("preset", name, preset)
    yield from [f"## `{name}`", "", method.line, "", "| field | value |", "| --- | --- |"]
    for field, value in preset.fields.items():
        yield f"| `{field}` | `{value!r}` |"
    differs = preset.differs or "Nothing that we know of."
    yield from ["", f"**Where it differs from the paper.** {differs}", ""]
    yield from [f"**Source.** {linked(method.source)}.", ""]
    recipes = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob(f"*/*_{name}.yaml"))
    if recipes:
        listed = ", ".join(f"`configs/{recipe}`" for recipe in recipes)
        yield from [f"**Recipes.** {listed}", ""]
