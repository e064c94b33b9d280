"""`run_tasks`: public benchmarks through lm-evaluation-harness (`pip install 'moeadapt[eval]'`).

Source: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness.
"""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from moeadapt.errors import AssetError, ConfigError, UnsupportedError, did_you_mean
from moeadapt.tuner.probe import evaluating

BOOTSTRAP = 1000
"""Samples for the standard error of metrics that have no closed form."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One task, or one group of tasks.

    Attributes:
        values: metric and filter, as `acc,none` -> its value, in the task's own unit.
        errors: the same -> its standard error; None: the task gives none.
        rows: rows that were answered.
        version: of the task; values of different versions are not comparable.
    """

    values: dict[str, float]
    errors: dict[str, float | None]
    rows: int
    version: str


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """What lm-eval found.

    Attributes:
        tasks: name -> its score.
        limit: rows of each task; None: all.
        num_fewshot: examples before each question; None: each task's own.
        harness: version of lm-eval.
        seed: of the choice of examples.
    """

    tasks: dict[str, TaskScore]
    limit: int | None
    num_fewshot: int | None
    harness: str
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts."""
        return asdict(self)


def require_harness() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        UnsupportedError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedError(
            "tasks are run by lm-eval, which is not installed: pip install 'moeadapt[eval]'"
        )


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 0,
) -> TaskResults:
    """Run tasks of lm-eval on a model, with or without an adapter.

    Args:
        model: the model, in any wrapper; its mode is left as it is.
        tokenizer: its tokenizer.
        tasks: names, groups, or patterns as `mmlu_*`.
        limit: rows of each task, >= 1; None: all.
        num_fewshot: examples before each question, >= 0; None: the task's own number.
        include_path: folder with YAML tasks of your own.
        batch_size: rows computed together.
        max_length: tokens of a row, cut on the left; None: what the model can take.
        apply_chat_template: whether questions are put into the tokenizer's chat template.
        seed: of the choice of examples. lm-eval also seeds the global generators with it.

    Raises:
        UnsupportedError: lm-eval is not installed.
        ConfigError: there is no such task, or a number is out of range.
        AssetError: the data of a task cannot be had.

    Example:
        >>> run_tasks(model, tokenizer, ["hellaswag"], limit=100).tasks["hellaswag"].values
        {'acc,none': 0.36, 'acc_norm,none': 0.43}
    """
    require_harness()
    _check(tasks, limit, num_fewshot, batch_size)
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    huggingface: Any = importlib.import_module("lm_eval.models.huggingface")
    manager = _task_manager(include_path)
    known = _find(tasks, manager)
    settings = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        "random_seed": seed,
        "numpy_random_seed": seed,
        "torch_random_seed": seed,
        "fewshot_random_seed": seed,
    }
    with evaluating(model):
        wrapped = huggingface.HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
        )
        try:
            found = evaluator.simple_evaluate(
                model=wrapped,
                tasks=known,
                task_manager=manager,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                **settings,
            )
        except OSError as error:  # the hub's errors, and those of files
            raise AssetError(f"cannot have the data of {', '.join(tasks)}: {error}") from error
    assert found is not None  # only other processes than the first get nothing
    return _read(found, limit, num_fewshot, seed)


def _find(tasks: Sequence[str], manager: Any) -> list[str]:
    """Return the names of the tasks that the names and patterns mean."""
    for name in tasks:
        if not manager.match_tasks([name]):
            raise ConfigError(
                f"lm-eval has no task {name!r}{did_you_mean(name, manager.all_tasks)}; "
                "include_path names a folder with others"
            )
    return manager.match_tasks(list(tasks))


@lru_cache(maxsize=2)
def _task_manager(include_path: str | None) -> Any:
    """Index the tasks: seconds, so once for all arms of a process."""
    return importlib.import_module("lm_eval.tasks").TaskManager(include_path=include_path)


def _check(
    tasks: Sequence[str], limit: int | None, num_fewshot: int | None, batch_size: int
) -> None:
    if isinstance(tasks, str) or not tasks:
        raise ConfigError(f"tasks={tasks!r}: give a list of one task name or more")
    for name, value, least in (
        ("limit", limit, 1),
        ("num_fewshot", num_fewshot, 0),
        ("batch_size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}={value} must be at least {least}")


def _read(
    found: Mapping[str, Any], limit: int | None, num_fewshot: int | None, seed: int
) -> TaskResults:
    from importlib.metadata import version

    counts, versions = found.get("n-samples", {}), found.get("versions", {})
    tasks = {}
    for name, metrics in found["results"].items():
        values = {
            key: float(value)
            for key, value in metrics.items()
            if "," in key and "_stderr," not in key
        }
        errors = {key: _number(metrics.get(key.replace(",", "_stderr,"))) for key in values}
        tasks[name] = TaskScore(
            values=values,
            errors=errors,
            rows=int(counts.get(name, {}).get("effective", 0)),
            version=str(versions.get(name, "")),
        )
    return TaskResults(
        tasks=tasks, limit=limit, num_fewshot=num_fewshot, harness=version("lm_eval"), seed=seed
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
