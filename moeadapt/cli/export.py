"""`moeadapt export ADAPTER --out DIR`: a trained mixture as a stock checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from moeadapt.cli.adapters import ADAPTER_HELP, BASE_HELP, check_dtype, load_adapter, read_config
from moeadapt.cli.console import libraries_quiet, print_receipt, working
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "export",
        epilog=examples(
            "moeadapt export outputs/smollm2_mixlora --out outputs/stock",
            "moeadapt export outputs/smollm2_mixlora --out outputs/served --engines vllm "
            "--engines llama.cpp --dtype bfloat16",
        ),
    )(export)


@reports_errors
def export(
    adapter: str = typer.Argument(help=ADAPTER_HELP),
    out: str = typer.Option(..., help="Folder to write, new or empty."),
    target: str = typer.Option(
        "auto", help="A stock MoE class of transformers: mixtral, glm4_moe ...; auto: what fits."
    ),
    engines: Annotated[
        list[str] | None,
        typer.Option(
            help="What must be able to run it: transformers, vllm, sglang, llama.cpp; repeat."
        ),
    ] = None,
    dtype: str | None = typer.Option(
        None, help="On disk: float32, bfloat16 or float16; default: that of the base."
    ),
    tolerance: float | None = typer.Option(
        None,
        help="Largest logit difference; default: 1e-4 in float32 (1e-5 of logits above 10).",
    ),
    probe: str | None = typer.Option(
        None, help="A text file, each line a text to compare on; default: random tokens."
    ),
    untie: bool = typer.Option(False, help="Write a shared output head as its own tensor."),
    verify: bool = typer.Option(True, help="Load the result and compare it with the adapter."),
    base: str | None = typer.Option(None, help=BASE_HELP),
    max_shard_mb: int = typer.Option(5000, help="Largest file, in 10^6 bytes."),
    as_json: bool = typer.Option(False, "--json", help="Print the receipt as JSON."),
) -> None:
    """Write a mixture and its base as one checkpoint that loads without moeadapt, and check it."""
    from moeadapt.export.refusals import check_settings
    from moeadapt.hidden_folder import check_folder

    check_dtype(dtype)
    lines = None if probe is None else _lines(probe)
    check_folder(out)
    check_settings(read_config(adapter))
    # In float32 also the base runs so: a base in less could not show a difference of 1e-4.
    with working(f"loading {adapter}"):
        model, tokenizer = load_adapter(adapter, base, "float32" if dtype == "float32" else "auto")

    import torch

    from moeadapt.export.export import export as write

    with libraries_quiet():
        receipt = write(
            model,
            out,
            target,
            engines or ("transformers",),
            None if dtype is None else getattr(torch, dtype),
            None if lines is None else [tokenizer(line)["input_ids"] for line in lines],
            tolerance,
            untie=untie,
            verify=verify,
            tokenizer=tokenizer,
            max_shard_bytes=max_shard_mb * 10**6,
        )
    print_receipt(receipt, out, as_json)


def _lines(path: str) -> list[str]:
    from moeadapt.errors import ConfigError

    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ConfigError(f"{path} has no text")
    return lines
