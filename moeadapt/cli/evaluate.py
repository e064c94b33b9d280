"""`moeadapt eval ADAPTER --data rows.jsonl`: held-out losses, comparisons, forgetting, tasks."""

import gc
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moeadapt.cli.adapters import BASE_HELP, DEVICE_HELP, DTYPE_HELP, load_adapter, to_device
from moeadapt.cli.console import working
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors
from moeadapt.errors import ConfigError
from moeadapt.rows import Row, read_rows

PEFT_TYPES = ("MOEADAPT", "LORA")
"""A mixture, and the plain LoRA it has to beat."""

BASE_ARM = "base"
"""What --against calls the base model alone."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is measured on each arm."""

    data: list[Row] | None
    forgetting: list[Row] | None
    tasks: list[str]
    limit: int | None
    num_fewshot: int | None
    include_path: str | None
    generate: bool
    max_new_tokens: int | None
    batch_size: int
    max_length: int | None
    seed: int


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "eval",
        epilog=examples(
            "moeadapt eval outputs/smollm2_mixlora --data held-out.jsonl",
            "# is it better than the base, and than a plain LoRA?",
            "moeadapt eval outputs/smollm2_mixlora --data held-out.jsonl --against base",
            "moeadapt eval outputs/mixture --data held-out.jsonl --against outputs/plain-lora",
            "moeadapt eval outputs/smollm2_mixlora --tasks hellaswag --limit 100 --json",
        ),
    )(evaluate)


@reports_errors
def evaluate(
    adapter: str = typer.Argument(help="Folder of a saved moeadapt or plain LoRA adapter."),
    data: str | None = typer.Option(
        None,
        help="A .jsonl file; each row has prompt and completion, or messages, or text, and may "
        "have a domain.",
    ),
    against: str | None = typer.Option(
        None, help="Another adapter folder, or base: the arm to compare with, on the same rows."
    ),
    forgetting: str | None = typer.Option(
        None, help="A .jsonl file of text the base was trained on: how much is forgotten."
    ),
    generate: bool = typer.Option(
        False, "--generate", help="Also the share of exact greedy answers; slow."
    ),
    max_new_tokens: int | None = typer.Option(
        None, min=1, help="For --generate; default: each answer's tokens and a few more."
    ),
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of lm-eval, for example hellaswag; repeat it, or use commas."),
    ] = None,
    limit: int | None = typer.Option(None, min=1, help="Rows of each task; default: all."),
    num_fewshot: int | None = typer.Option(
        None, min=0, help="Examples before each question of a task; default: the task's own."
    ),
    include_path: str | None = typer.Option(None, help="Folder with tasks of your own."),
    base: str | None = typer.Option(None, help=BASE_HELP),
    dtype: str = typer.Option("auto", help=DTYPE_HELP),
    device: str = typer.Option("auto", help=DEVICE_HELP),
    batch_size: int = typer.Option(8, min=1, help="Rows computed together."),
    max_length: int | None = typer.Option(
        None, min=2, help="Tokens of a row, the rest is cut; default: 1024, for --tasks all."
    ),
    seed: int = typer.Option(0, help="Of the resampling behind the intervals."),
    as_json: bool = typer.Option(False, "--json", help="Print machine-readable results."),
    out: str | None = typer.Option(None, help="File to write the results to, new."),
) -> None:
    """Measure an adapter on held-out rows, on the base's own text, and on public benchmarks.

    Losses are in nats per token with 95 % intervals. With --against both arms are compared row by
    row, so that a difference is told from noise.
    """
    names = [name for given in tasks or () for name in given.split(",") if name]
    _check(
        data,
        forgetting,
        names,
        out,
        against,
        {
            "--generate": (generate or None, "--data", data),
            "--max-new-tokens": (max_new_tokens, "--generate", generate or None),
            "--limit": (limit, "--tasks", names),
            "--num-fewshot": (num_fewshot, "--tasks", names),
            "--include-path": (include_path, "--tasks", names),
        },
    )
    job = _Job(
        data=None if data is None else read_rows(data),
        forgetting=None if forgetting is None else read_rows(forgetting),
        tasks=names,
        limit=limit,
        num_fewshot=num_fewshot,
        include_path=include_path,
        generate=generate,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    # What other libraries print is progress, and stdout is for the result.
    with redirect_stdout(sys.stderr), working(f"evaluating {adapter}"):
        found = _run(job, adapter, against, (base, dtype, device))
    text = json.dumps(found, indent=2)
    if out is not None:
        _write(out, text)
    if as_json:
        typer.echo(text)
        return
    from moeadapt.cli.evaluate_tables import print_tables

    print_tables(found)
    if out is not None:
        typer.echo(f"wrote {out}")


def _check(
    data: str | None,
    forgetting: str | None,
    tasks: Sequence[str],
    out: str | None,
    against: str | None,
    owners: dict[str, tuple[Any, str, Any]],
) -> None:
    """Refuse a call that measures nothing, options nobody looks at, and a place that is taken."""
    if not (data or forgetting or tasks):
        raise ConfigError("nothing to measure; give --data, --forgetting or --tasks")
    if against == BASE_ARM and not (data or tasks):
        raise ConfigError("--forgetting is measured against the base anyway; leave --against out")
    for option, (value, owner, given) in owners.items():
        if value is not None and not given:
            raise ConfigError(f"{option} belongs to {owner}, which is not given; leave it out")
    if out is not None and Path(out).exists():
        raise ConfigError(f"{out} exists; give a new file")
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {Path(out).absolute().parent}")
    if tasks:
        from moeadapt.evaluation.harness import require_harness

        require_harness()


def _run(
    job: _Job, adapter: str, against: str | None, place: tuple[str | None, str, str]
) -> dict[str, Any]:
    """Measure the adapter, and the arm it is compared with if there is one."""
    from moeadapt.evaluation import compare

    if against is not None and against != BASE_ARM:
        _known(against)
    model, tokenizer = _load(adapter, *place)
    found, own = _measure(job, model, tokenizer)
    results: dict[str, Any] = {"adapter": adapter, "against": against, **found}
    if against is None:
        return results
    if against == BASE_ARM:
        other, theirs = _measure(job, model, tokenizer, off=True)
    else:
        # Before the other is loaded, since two bases may not fit.
        del model
        _free()
        other, theirs = _measure(job, *_load(against, *place))
    results["other"] = other
    if own is not None:
        results["comparison"] = compare(theirs, own, seed=job.seed).to_json()
    return results


def _measure(
    job: _Job, model: Any, tokenizer: Any, *, off: bool = False
) -> tuple[dict[str, Any], Any]:
    """Return the results of one arm, and the `Evaluation` to compare by."""
    from moeadapt.evaluation import evaluate as run
    from moeadapt.evaluation import forgetting, run_tasks

    found: dict[str, Any] = {}
    evaluation = None
    shared: Any = {"batch_size": job.batch_size, "seed": job.seed}
    if job.max_length is not None:
        # Not a default of its own: the prompts of tasks are longer than rows, and would be cut.
        shared["max_length"] = job.max_length
    with model.disable_adapter() if off else nullcontext():
        if job.data is not None:
            options: Any = {"generate": job.generate, "max_new_tokens": job.max_new_tokens}
            evaluation = run(model, tokenizer, job.data, **shared, **options)
            found["data"] = evaluation.to_json()
        if job.tasks:
            found["tasks"] = run_tasks(
                model,
                tokenizer,
                job.tasks,
                limit=job.limit,
                num_fewshot=job.num_fewshot,
                include_path=job.include_path,
                **shared,
            ).to_json()
    if job.forgetting is not None and not off:
        found["forgetting"] = forgetting(model, tokenizer, job.forgetting, **shared).to_json()
    return found, evaluation


def _known(folder: str) -> None:
    """Refuse the other arm before the first one is measured."""
    from moeadapt.adapter_folder import read_settings

    read_settings(folder, *PEFT_TYPES)


def _load(folder: str, base: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    model, tokenizer = load_adapter(folder, base, dtype, PEFT_TYPES)
    return to_device(model, device), tokenizer


def _free() -> None:
    """Give the memory of a model that nothing names any more back."""
    import torch

    gc.collect()  # modules and hooks name each other, and such a ring is not freed at once
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write(out: str, text: str) -> None:
    try:
        Path(out).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None
