"""`moeadapt chat MODEL`: talk to an adapter or a base model in the terminal."""

import sys
from pathlib import Path
from typing import Any

import typer

from moeadapt.cli.adapters import (
    DEVICE_HELP,
    DTYPE_HELP,
    check_dtype,
    load_adapter,
    to_device,
)
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors
from moeadapt.errors import ConfigError, did_you_mean

PEFT_TYPES = ("MOEADAPT", "LORA")
SETTINGS = "adapter_config.json"


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "chat",
        epilog=examples(
            "moeadapt chat outputs/smollm2_mixlora",
            "moeadapt chat embedded:smollm2-135m --temperature 0",
            "# from a file, one message per line, one JSON object per answer",
            "moeadapt chat outputs/smollm2_mixlora --json < questions.txt > answers.jsonl",
        ),
    )(chat)


@reports_errors
def chat(
    model: str = typer.Argument(
        help="Folder of a saved moeadapt or plain LoRA adapter; or a base model: a folder, a name "
        "on the hub, or embedded:smollm2-135m."
    ),
    base: str | None = typer.Option(
        None, help="Base model of the adapter; default: the one it names."
    ),
    system: str | None = typer.Option(None, help="System message: who the model is to be."),
    raw: bool = typer.Option(
        False,
        "--raw",
        help="Continue each message as plain text: no chat template, no memory. For models that "
        "were not trained to chat.",
    ),
    max_new_tokens: int = typer.Option(256, min=1, help="Tokens of an answer at most."),
    temperature: float = typer.Option(
        0.7, min=0.0, help="How freely tokens are drawn; 0: always the likeliest."
    ),
    seed: int = typer.Option(
        0, help="Of the drawing: the same seed and messages give the same answers."
    ),
    dtype: str = typer.Option("auto", help=DTYPE_HELP),
    device: str = typer.Option("auto", help=DEVICE_HELP),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object per answer."),
) -> None:
    """Talk to an adapter or a base model, and see which experts answered.

    Type a message, or /help for the commands; /routing shows the routing of the last answer.
    Ctrl-C stops an answer, Ctrl-D ends. Without a terminal each line of stdin is a message.
    """
    if dtype != "auto":
        check_dtype(dtype)
    is_adapter = _is_adapter(model, base)
    if raw and system is not None:
        raise ConfigError("--system belongs to the chat template; leave it or --raw out")
    # Before the first import of torch, so that a mistake is told at once.
    from moeadapt.chat.conversation import Conversation, Sampling
    from moeadapt.cli.chat_loop import Loop
    from moeadapt.cli.console import working

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    with working(f"loading {model}"):
        loaded, tokenizer = (
            load_adapter(model, base, dtype, PEFT_TYPES) if is_adapter else _load_base(model, dtype)
        )
        loaded = to_device(loaded, device)
    talk = Conversation(loaded, tokenizer, system=system, raw=raw, sampling=sampling)
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    Loop(talk, as_json=as_json, interactive=interactive).run()


def _is_adapter(model: str, base: str | None) -> bool:
    """Say what `model` names, and refuse what it cannot be."""
    folder = Path(model)
    if (folder / SETTINGS).is_file():
        return True
    if base is not None:
        raise ConfigError(f"--base belongs to an adapter, and {folder / SETTINGS} does not exist")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} has neither {SETTINGS} (an adapter) nor config.json (a model); a training "
            "run saves them into its output_dir"
        )
    if not folder.exists() and model.startswith((".", "/", "~")):
        raise ConfigError(f"there is no folder {model}")
    if not folder.exists() and "/" not in model and ":" not in model:
        near = did_you_mean(model, (path.name for path in Path().iterdir() if path.is_dir()))
        typer.echo(f"no folder {model} here{near}; asking the hub for that name", err=True)
    return False


def _load_base(name: str, dtype: str) -> tuple[Any, Any]:
    from moeadapt.training.base_model import load_base
    from moeadapt.training.objectives import OBJECTIVES
    from moeadapt.training.recipe import RunArguments

    run = RunArguments(model_name_or_path=name, dtype=dtype)  # type: ignore[arg-type]
    model, tokenizer = load_base(run, OBJECTIVES["sft"])
    return model.eval(), tokenizer
