"""`moeadapt upcycle BASE --out DIR`: a dense checkpoint as a stock mixture of experts."""

import json
from typing import Annotated, Any

import typer

from moeadapt.cli.adapters import check_dtype
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors


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
    base: str = typer.Argument(help="Folder of the dense checkpoint, or embedded:smollm2-135m."),
    out: str = typer.Option(..., help="Folder to write, new or empty."),
    num_experts: int | None = typer.Option(
        None, help="Copies of each FFN; the number of sources if there are any."
    ),
    top_k: int = typer.Option(2, help="Copies used per token."),
    target: str = typer.Option("auto", help="A stock class, such as mixtral or qwen3_moe."),
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="A fine-tuned copy or LoRA adapter of the base, one expert each; repeat."
        ),
    ] = None,
    noise: float = typer.Option(0.0, help="Noise on every expert, over the matrix's deviation."),
    drop: float = typer.Option(0.0, help="Share of hidden units drawn anew in every expert."),
    granularity: int = typer.Option(1, help="Experts that each copy is cut into."),
    gate_init: str = typer.Option("random", help="random, hidden or kmeans."),
    gate_texts: str | None = typer.Option(
        None,
        help="JSON file: for kmeans a list of texts, for hidden one such list per copy; a text is "
        "a string or a list of token ids.",
    ),
    gate_std: float | None = typer.Option(
        None, help="Deviation of random router rows; default: 0.02."
    ),
    norm_topk: bool = typer.Option(True, help="Whether a token's weights sum to 1."),
    engines: Annotated[
        list[str] | None,
        typer.Option(help="Where it must run: transformers, vllm, sglang, llama.cpp; repeat."),
    ] = None,
    untie: bool = typer.Option(False, help="Write a shared output head as its own tensor."),
    dtype: str | None = typer.Option(None, help="float32, bfloat16 or float16; as the base."),
    seed: int = typer.Option(0, help="Of everything random."),
    verify: bool = typer.Option(True, help="Load the result and compare it with the base."),
    tolerance: float | None = typer.Option(
        None, help="Largest logit difference of copies; default: 1e-4 (1e-5 of logits above 10)."
    ),
    max_shard_mb: int = typer.Option(5000, help="Largest file, in 10^6 bytes."),
    as_json: bool = typer.Option(False, "--json", help="Print the receipt as JSON."),
) -> None:
    """Write a dense checkpoint as a mixture of its FFNs that transformers loads as it is."""
    import torch

    from moeadapt.export.upcycle import upcycle as write

    check_dtype(dtype)
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
    typer.echo(json.dumps(receipt.to_dict(), indent=2) if as_json else receipt.text())


def _texts(path: str | None) -> list[Any] | None:
    from moeadapt.errors import ConfigError

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
