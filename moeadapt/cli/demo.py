"""`moeadapt demo`: four arms on a real model, compared on held-out answers."""

import typer

from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors
from moeadapt.extras import needs_extra


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "demo",
        epilog=examples(
            "moeadapt demo",
            "# only to see that everything works, in a few minutes",
            "moeadapt demo --steps 2 --out outputs/quick-demo",
        ),
    )(demo)


@reports_errors
def demo(
    out: str = typer.Option("outputs/demo", help="Folder to write adapters and results to."),
    steps: int = typer.Option(
        0, min=0, help="Optimizer steps of each of the four; 0: what takes about 7 minutes in all."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print machine-readable results."),
) -> None:
    """Fine-tune a real 135M model four ways on the same data and compare held-out answers.

    Plain LoRA with equal active rank, plain LoRA with equal total rank, a mixture per linear layer
    and a mixture of whole FFNs, which is written as a stock Mixtral checkpoint at the end (1.5 GB).
    Downloads the model once (93 MB).
    """
    with needs_extra("demo"):
        from moeadapt.demo.run import run_demo

    run_demo(out, steps=steps, as_json=as_json)
