"""`moeadapt upcycle BASE --out DIR`: a dense checkpoint as a stock mixture of experts."""

import json
from typing import Annotated, Any

import typer

from moeadapt.cli.adapters import check_dtype
from moeadapt.cli.console import libraries_quiet, print_receipt
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors
from moeadapt.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "upcycle",
        epilog=examples(
            "moeadapt upcycle embedded:smollm2-135m --out outputs/moe --num-experts 4",
            "# one expert from each fine-tuned copy or LoRA adapter of the base",
            "moeadapt upcycle embedded:smollm2-135m --out outputs/moe --source outputs/math "
            "--source outputs/code",
        ),
    )(upcycle)


@reports_errors
def upcycle(
    base: str = typer.Argument(
        help="Folder of a dense model (safetensors), or embedded:smollm2-135m."
    ),
    out: str = typer.Option(..., help="Folder to write, new or empty."),
    num_experts: int | None = typer.Option(
        None, help="Experts to make of each FFN; default: as many as there are --source."
    ),
    top_k: int = typer.Option(2, help="Experts that a token uses."),
    target: str = typer.Option(
        "auto", help="A stock MoE class of transformers: mixtral, qwen3_moe ...; auto: what fits."
    ),
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="A fine-tuned copy or LoRA adapter of the base, one expert each; repeat."
        ),
    ] = None,
    noise: float = typer.Option(
        0.0, help="Noise added to every expert, as a share of each matrix's standard deviation."
    ),
    drop: float = typer.Option(
        0.0, help="Share of the hidden units that is drawn anew in every expert."
    ),
    granularity: int = typer.Option(1, help="Smaller experts that each copy is cut into."),
    gate_init: str = typer.Option(
        "random",
        help="How the new routers begin: random, or hidden or kmeans, which need --gate-texts.",
    ),
    gate_texts: str | None = typer.Option(
        None,
        help="JSON file: for kmeans a list of texts, for hidden one such list per copy; a text is "
        "a string or a list of token ids.",
    ),
    gate_std: float | None = typer.Option(
        None, help="Standard deviation of random routers; default: 0.02."
    ),
    norm_topk: bool = typer.Option(True, help="Whether a token's weights sum to 1."),
    engines: Annotated[
        list[str] | None,
        typer.Option(
            help="What must be able to run it: transformers, vllm, sglang, llama.cpp; repeat."
        ),
    ] = None,
    untie: bool = typer.Option(False, help="Write a shared output head as its own tensor."),
    dtype: str | None = typer.Option(
        None, help="On disk: float32, bfloat16 or float16; default: that of the base."
    ),
    seed: int = typer.Option(0, help="Of everything random."),
    verify: bool = typer.Option(True, help="Load the result and compare it with the base."),
    tolerance: float | None = typer.Option(
        None, help="Largest logit difference of copies; default: 1e-4 (1e-5 of logits above 10)."
    ),
    max_shard_mb: int = typer.Option(5000, help="Largest file, in 10^6 bytes."),
    as_json: bool = typer.Option(False, "--json", help="Print the receipt as JSON."),
) -> None:
    """Write a dense checkpoint as a mixture of its FFNs that transformers loads as it is."""
    if num_experts is None and not source:
        raise ConfigError(
            "give --num-experts, how many experts to make of each FFN, or one --source per expert"
        )
    import torch

    from moeadapt.export.upcycle import upcycle as write

    check_dtype(dtype)
    with libraries_quiet():
        receipt = write(
            base,
            out,
            num_experts,
            top_k,
            target,
            sources=source or (),
            noise=noise,
            drop=drop,
            granularity=granularity,
            gate_init=gate_init,
            gate_texts=_texts(gate_texts),
            gate_std=gate_std,
            norm_topk=norm_topk,
            engines=engines or (),
            untie=untie,
            dtype=None if dtype is None else getattr(torch, dtype),
            seed=seed,
            verify=verify,
            tolerance=tolerance,
            max_shard_bytes=max_shard_mb * 10**6,
        )
    print_receipt(receipt, out, as_json)


def _texts(path: str | None) -> list[Any] | None:
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            texts = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--gate-texts {path}: {error}") from error
    if not isinstance(texts, list):
        raise ConfigError(f"--gate-texts {path} holds no list; write one in [ ]")
    return texts
