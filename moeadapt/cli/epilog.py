"""What stands below the options of a verb's help: examples."""

from rich.markup import escape


def examples(*commands: str) -> str:
    """Return commands as the section `Examples`, for `typer.Typer.command(epilog=...)`.

    Args:
        commands: each a line that works as it stands once its files are there; a line that starts
            with `#` explains the next one.
    """
    lines = (
        f"[dim]{escape(line)}[/dim]" if line.startswith("#") else f"$ {escape(line)}"
        for line in commands
    )
    # Typer makes one line of what is not divided by an empty one.
    return "\n\n".join(["[bold]Examples[/bold]", *lines])
