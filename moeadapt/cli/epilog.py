"""What stands below the options of a verb's help: examples."""


def examples(*commands: str) -> str:
    """Return commands as the section `Examples`, for `typer.Typer.command(epilog=...)`.

    Args:
        commands: each a line that works as it stands once its files are there; a line that starts
            with `#` explains the next one.
    """
    # What rich reads as a style begins like this; its own `escape` costs an import of rich.
    escaped = (line.replace("[", r"\[") for line in commands)
    lines = (f"[dim]{line}[/dim]" if line.startswith("#") else f"$ {line}" for line in escaped)
    # Typer makes one line of what is not divided by an empty one.
    return "\n\n".join(["[bold]Examples[/bold]", *lines])
