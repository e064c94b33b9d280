"""The card of an adapter: how to load it first, then what it is, its data and its worth."""

from collections.abc import Iterator, Mapping
from typing import Any

from moeadapt.experts import EXPERTS
from moeadapt.hub.parcel import Parcel
from moeadapt.hub.results import arms_table, evaluation_tables
from moeadapt.model_card.first_lines import first_lines
from moeadapt.model_card.markdown import code, table, text
from moeadapt.routers import ROUTERS

PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}

BASES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", ""),
    "SEQ_CLS": ("AutoModelForSequenceClassification", ", num_labels=1"),
}
"""Task -> what loads the base, and what it is told."""

LOADERS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
}


def front_matter(parcel: Parcel, datasets: list[str]) -> dict[str, Any]:
    """Return what the hub reads; the licence is added by the caller."""
    base = parcel.base_model
    return {
        "library_name": "peft",
        "base_model": base,
        "base_model_relation": "adapter",
        "pipeline_tag": PIPELINES.get(str(parcel.facts.get("task_type"))),
        "tags": ["moeadapt", "mixture-of-experts", f"base_model:adapter:{base}"],
        "datasets": datasets or None,
    }


def our_part(parcel: Parcel, repo_id: str, revision: str | None) -> str:
    """Return our part of the card, Markdown."""
    return "\n\n".join(_sections(parcel, repo_id, revision))


def _sections(parcel: Parcel, repo_id: str, revision: str | None) -> Iterator[str]:
    facts = parcel.facts
    yield f"# {text(repo_id.partition('/')[2])}"
    yield from first_lines(*_load(parcel, repo_id, revision))
    yield "## What it is"
    yield (
        f"A mixture of LoRA experts on `{parcel.base_model}`, trained with moeadapt "
        f"{text(facts.get('moeadapt_version'))}."
    )
    yield table(("setting", "value"), _settings(facts))
    if facts.get("static_lora"):
        yield "## Without moeadapt"
        yield _static(parcel, repo_id, revision)
    yield "## Data"
    yield _data(facts)
    yield "## Evaluation"
    yield from _evaluation(facts)
    yield "## Files"
    yield table(("file", "what"), _files(parcel))


def _load(parcel: Parcel, repo_id: str, revision: str | None) -> Iterator[str]:
    pin = f', revision="{revision}"' if revision else ""
    kind = LOADERS.get(str(parcel.facts.get("task_type")))
    if (parcel.place or "").startswith("embedded:"):
        yield "from moeadapt.embedded import resolve_model"
        yield "from peft import PeftModel"
        yield "from transformers import AutoModelForCausalLM"
        yield ""
        yield f'base = AutoModelForCausalLM.from_pretrained(resolve_model("{parcel.place}"))'
        yield f'model = PeftModel.from_pretrained(base, "{repo_id}"{pin})'
        return
    yield f"from peft import {kind or 'AutoPeftModel'}"
    yield ""
    yield f'model = {kind or "AutoPeftModel"}.from_pretrained("{repo_id}"{pin})'


def _settings(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "parameters of the adapter", f"{facts['parameters']:,}"
    yield "router", _component(facts.get("router", "top_k"), ROUTERS)
    yield "experts", f"{facts.get('num_experts')} x {_component(facts.get('experts'), EXPERTS)}"
    if facts.get("n_shared"):
        yield "shared experts", str(facts["n_shared"])
    yield "rank of an expert", str(facts.get("r"))
    yield "alpha", str(facts.get("lora_alpha"))
    yield "placement", str(facts.get("placement"))
    yield "routing per", str(facts.get("router_scope"))
    losses = facts.get("balance") or {}
    yield "balance losses", ", ".join(f"{n} {_coef(one)}" for n, one in losses.items()) or "none"
    yield "targets", _targets(facts.get("target_modules"))


def _component(given: Any, registry: Mapping[str, Any]) -> str:
    """Return a name, with k and what is not as it is by default."""
    if not isinstance(given, dict) or given.get("name") not in registry:
        return str(given)
    known = registry[given["name"]].model_fields
    options = [
        f"{name} {value}"
        for name, value in given.items()
        if name in known and (name == "k" or value != known[name].default)
    ]
    return f"{given['name']} ({', '.join(options)})" if options else str(given["name"])


def _coef(one: Any) -> str:
    return str(one.get("coef", one) if isinstance(one, dict) else one)


def _targets(targets: Any) -> str:
    if not isinstance(targets, list):
        return str(targets)
    short = sorted({str(target).rpartition(".")[2] for target in targets})
    return ", ".join(short) + (f" ({len(targets)} modules)" if len(targets) > len(short) else "")


def _static(parcel: Parcel, repo_id: str, revision: str | None) -> str:
    made, pin = parcel.facts["static_lora"], f', revision="{revision}"' if revision else ""
    loader, more = BASES.get(str(parcel.facts.get("task_type")), BASES["CAUSAL_LM"])
    residual = made["mean_residual"]
    kept = (
        "How much of the mixture it keeps was not measured."
        if residual is None
        else f"Mean residual: {residual:.3f} (0: exact, 1: as good as no adapter)."
    )
    return "\n\n".join(
        [
            "`static-lora` holds an ordinary LoRA that every engine with LoRA loads. It is an "
            f"approximation (method `{made['method']}`): its weights do not depend on the input. "
            + kept,
            code(
                "python",
                "from peft import PeftModel",
                f"from transformers import {loader}",
                "",
                f'base = {loader}.from_pretrained("{parcel.base_model}"{more})',
                "model = PeftModel.from_pretrained(",
                f'    base, "{repo_id}", subfolder="static-lora"{pin}',
                ")",
            ),
        ]
    )


def _data(facts: dict[str, Any]) -> str:
    recipe = facts.get("recipe") or {}
    named = facts.get("datasets") or ([recipe["dataset_name"]] if "dataset_name" in recipe else [])
    told = f"Trained on {', '.join(text(name) for name in named)}." if named else ""
    more = "The settings of the run are in `recipe.yaml`." if recipe else ""
    return " ".join(filter(None, [told, more])) or "The training data was not named."


def _evaluation(facts: dict[str, Any]) -> Iterator[str]:
    found, report = facts.get("evaluation"), facts.get("report")
    if found:
        yield from evaluation_tables(found)
    if report:
        yield "Loss on held-out texts under other ways of routing, same weights:"
        yield arms_table(report)
        if facts.get("picture"):
            yield f"![Routing of the experts on held-out texts]({facts['picture']})"
        yield "The whole report is `report.html`, which opens without a network."
    if not found and not report:
        yield "Nothing was measured."


WHAT = {
    "adapter_model.safetensors": "the weights",
    "adapter_config.json": "the settings, with the version of moeadapt and of the format",
    "moeadapt_manifest.json": "a sha256 of every file, and the fingerprint of the base",
    "recipe.yaml": "the run",
    "report.html": "the routing report",
    "report.json": "its numbers",
    "static-lora": "an ordinary LoRA made of the mixture",
}


def _files(parcel: Parcel) -> Iterator[tuple[str, str]]:
    present = {*parcel.files, "moeadapt_manifest.json"}
    for name, what in WHAT.items():
        if name in present or any(file.startswith(f"{name}/") for file in present):
            yield name, what
