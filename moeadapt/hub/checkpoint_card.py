"""The card of a stock checkpoint: how to serve it first, then what it was made of and checked."""

from collections.abc import Iterator
from typing import Any

from moeadapt.export.receipt import Receipt
from moeadapt.hub.parcel import Parcel
from moeadapt.model_card.markdown import code, table, text

WAYS = {"export": "a trained mixture of LoRA experts", "upcycle": "copies of a dense model's FFNs"}

COMMANDS = {
    "transformers": (
        'python -c "from transformers import pipeline; '
        "print(pipeline('text-generation', '{repo}'{option})('Once', max_new_tokens=20))\""
    ),
    "vllm": "vllm serve {repo}{flag}",
    "sglang": "python -m sglang.launch_server --model-path {repo}{flag}",
    "llama.cpp": (
        "hf download {repo}{flag} --local-dir model && python convert_hf_to_gguf.py model "
        "--outfile model.gguf --outtype f32 && llama-server -m model.gguf"
    ),
}
"""Engine of a receipt -> what to type; {option} and {flag} pin a branch."""


def front_matter(parcel: Parcel, datasets: list[str]) -> dict[str, Any]:
    """Return what the hub reads; the licence is added by the caller."""
    receipt: Receipt = parcel.facts["receipt"]
    made_of_several = receipt.kind == "upcycle" and len(receipt.source_sha256) > 1
    return {
        "library_name": "transformers",
        "base_model": parcel.base_model,
        "base_model_relation": "merge" if made_of_several else "finetune",
        "pipeline_tag": "text-generation",
        "tags": ["moeadapt", "mixture-of-experts", str(receipt.target)],
        "datasets": datasets or None,
    }


def our_part(parcel: Parcel, repo_id: str, revision: str | None) -> str:
    """Return our part of the card, Markdown."""
    return "\n\n".join(_sections(parcel, repo_id, revision))


def _sections(parcel: Parcel, repo_id: str, revision: str | None) -> Iterator[str]:
    receipt: Receipt = parcel.facts["receipt"]
    pin = f', revision="{revision}"' if revision else ""
    yield f"# {text(repo_id.partition('/')[2])}"
    yield code(
        "python",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}"{pin})',
    )
    yield (
        f"A stock `{text(receipt.target)}` checkpoint made of `{parcel.base_model}` and "
        f"{WAYS.get(receipt.kind, text(receipt.kind))}. It is an ordinary mixture-of-experts "
        "model: loading and serving it needs no moeadapt."
    )
    yield "## Serve it"
    yield table(
        ("engine", "status", "why"), ((v.engine, v.status, v.reason) for v in receipt.engines)
    )
    for verdict in receipt.engines:
        command = COMMANDS.get(_key(verdict.engine))
        if command is not None and verdict.status != "wrong":
            yield f"{text(verdict.engine)}:\n\n" + code("bash", _pinned(command, repo_id, revision))
    yield "## How it was made"
    yield f"By `moeadapt {text(receipt.kind)}`; the receipt is `export_receipt.json`."
    yield code("text", *_safe(receipt.text()))


def _pinned(command: str, repo_id: str, revision: str | None) -> str:
    return command.format(
        repo=repo_id,
        option=f", revision='{revision}'" if revision else "",
        flag=f" --revision {revision}" if revision else "",
    )


def _key(engine: str) -> str:
    return engine.lower().replace("_", ".") if "llama" in engine.lower() else engine.lower()


def _safe(lines: str) -> list[str]:
    # No line of a receipt may end the block that it is shown in.
    return [line.replace("```", "'''") for line in lines.splitlines()]
