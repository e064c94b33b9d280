"""`moeadapt doctor [FOLDER]`: what is wrong with an adapter or the environment, and what to do."""

import json

import typer

from moeadapt.cli.console import result_console, working
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import WRONG_INPUT, reports_errors


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "doctor",
        epilog=examples(
            "moeadapt doctor",
            "moeadapt doctor outputs/smollm2_mixlora",
            "moeadapt doctor outputs/smollm2_mixlora --base embedded:smollm2-135m --json",
        ),
    )(doctor)


@reports_errors
def doctor(
    folder: str | None = typer.Argument(
        None, help="An adapter, a checkpoint or a training run's folder; none: the environment."
    ),
    base: str | None = typer.Option(
        None, help="Base model to load and to compare with the one it was trained on."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print machine-readable findings."),
) -> None:
    """Check an adapter's folder and the environment, and explain each finding.

    Changes nothing. Exit code 0: no errors, perhaps warnings; 2: errors.
    """
    from moeadapt.doctor.examine import examine

    with working("looking"):
        found = examine(folder, base)
    errors = sum(finding.level == "error" for finding in found)
    warnings = sum(finding.level == "warning" for finding in found)
    if as_json:
        findings = [finding.to_dict() for finding in found]
        typer.echo(json.dumps({"errors": errors, "warnings": warnings, "findings": findings}))
    else:
        from rich.table import Column, Table

        table = Table("check", "", Column("what was found, why it matters, what to do"))
        for finding in found:
            parts = (finding.what, finding.why, finding.cure)
            table.add_row(finding.check, finding.level, "\n".join(part for part in parts if part))
        result_console().print(table)
        typer.echo(f"{errors} errors, {warnings} warnings")
    if errors:
        raise typer.Exit(WRONG_INPUT)
