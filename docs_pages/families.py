"""One page per family of components: routers, balance losses, experts."""

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from docs_pages import options, router_costs
from docs_pages.markdown import linked, note
from moeadapt import BALANCE, EXPERTS, ROUTERS, catalogue
from moeadapt.balance.base import BalanceConfig
from moeadapt.registry import ComponentConfig
from moeadapt.routers.linear import LinearRouterConfig
from moeadapt.tuner.combinations import expert_spec


@dataclass(frozen=True, kw_only=True)
class Family:
    """One registry and its page.

    Attributes:
        page: file name below docs/families.
        kind: key of `catalogue.KINDS`.
        registry: its entries.
        intro: what a reader must know first, Markdown.
        field: the field of `MoeLoraConfig` that takes a name of it.
        common: a base class whose options are said once, at the end.
        common_title: the heading over them.
    """

    page: str
    kind: str
    registry: Mapping[str, Any]
    intro: str
    field: str
    common: type[ComponentConfig] | None = None
    common_title: str = ""


FAMILIES = (
    Family(
        page="routers.md",
        kind="router",
        registry=ROUTERS,
        field="router",
        common=LinearRouterConfig,
        common_title="Options of every router with a gate",
        intro=(
            "A router maps the hidden state of a token to one weight per expert; 0 means that the "
            "expert is not used. Which one to take is said in [Choosing a router](../choosing.md), "
            "what goes together in [Combinations](../combinations.md)."
        ),
    ),
    Family(
        page="balance.md",
        kind="balance",
        registry=BALANCE,
        field="balance",
        common=BalanceConfig,
        common_title="Options of every balance loss",
        intro=(
            "A balance loss is a function of a router's routing. It keeps experts in use or apart. "
            "Losses are averaged over routers and count real tokens only. A coefficient of a paper "
            "means something else if its loss is normalised otherwise: compare the values at "
            "balance first."
        ),
    ),
    Family(
        page="experts.md",
        kind="experts",
        registry=EXPERTS,
        field="experts",
        intro=(
            "What one expert is. All experts of a layer are one bank around a rank axis that is "
            "weighted per token, so no expert is computed in a loop."
        ),
    ),
)


def page(family: Family) -> str:
    """Return the page of one family."""
    return "\n".join(_lines(family)) + "\n"


def _lines(family: Family) -> Iterator[str]:
    title = catalogue.KINDS[family.kind][0]
    yield from [f"# {title}", "", note("the docstrings"), "", family.intro, ""]
    yield from [_example(family), ""]
    for name, cls in sorted(family.registry.items()):
        yield from [*_entry(family, name, cls), ""]
    if family.common is not None:
        yield from [f"## {family.common_title}", ""]
        yield from options.table(family.common, options.own_options(family.common))
    if family.kind == "router":
        yield from ["", *router_costs.section()]


def _example(family: Family) -> str:
    value = {
        "router": '{"name": "top_k", "k": 2}',
        "balance": '{"switch": 0.01, "z_loss": {"coef": 0.001}}',
        "experts": '"shared_a"',
    }[family.field]
    code = ["from moeadapt import MoeLoraConfig", ""]
    return "\n".join(["```python", *code, f"MoeLoraConfig({family.field}={value})", "```"])


def _entry(family: Family, name: str, cls: type[ComponentConfig]) -> Iterator[str]:
    method = catalogue.describe(family.kind, name, cls)
    module = sys.modules[cls.__module__]
    yield from [f"## `{name}`", "", method.line, "", f"`{_use(family.field, name)}`", ""]
    for paragraph in [*options.prose_of(cls.__dict__["__doc__"]), *_details(module.__doc__)]:
        yield from [linked(paragraph), ""]
    inherits = family.common is not None and issubclass(cls, family.common)
    own = own_names(family, cls)
    if own:
        yield from [*options.table(cls, own), ""]
    if inherits and family.kind == "router":
        yield from [f"And the [{family.common_title.lower()}](#{_slug(family.common_title)}).", ""]
    elif not own and not inherits:
        yield from ["No options.", ""]
    yield f"**Source.** {_sentence(linked(method.source))}"
    yield ""
    yield f"**Code.** `{cls.__module__.replace('.', '/')}.py`"


def own_names(family: Family, cls: type[ComponentConfig]) -> list[str]:
    """Name the options of `cls` that are not those which the family says once."""
    if family.common is None or not issubclass(cls, family.common):
        return list(cls.model_fields)
    common = options.own_options(family.common)
    own = options.own_options(cls)
    return [name for name in cls.model_fields if name not in common or name in own]


def _use(field: str, name: str) -> str:
    if field == "balance":
        return f'balance={{"{name}": 0.01}}' if name != "loss_free" else 'balance={"loss_free": {}}'
    spec = expert_spec(name) if field == "experts" else {"name": name}
    return f"{field}={spec!r}" if len(spec) > 1 else f'{field}="{name}"'


def _details(doc: str | None) -> list[str]:
    """Return what a module's docstring says beside its first line, its letters and its source."""
    paragraphs = inspect.cleandoc(doc or "").split("\n\n")[1:]
    return [text for text in paragraphs if not text.startswith(("Letters:", "Source:"))]


def _sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")
