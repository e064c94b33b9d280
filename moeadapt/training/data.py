"""Rows for a trainer: from the hub, from a file, or from the embedded tasks."""

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from moeadapt.embedded import load_task, mix
from moeadapt.errors import AssetError, ConfigError
from moeadapt.training.objectives import DataKind
from moeadapt.training.recipe import RunArguments

EMBEDDED = "embedded:"

COLUMNS: dict[DataKind, tuple[tuple[str, ...], ...]] = {
    "completion": (("prompt", "completion"), ("messages",), ("text",)),
    "preference": (("chosen", "rejected"),),
    "labelled": (("prompt", "completion", "label"),),
    "prompt": (("prompt",),),
}
"""What TRL's trainers read: any one of the alternatives."""

_FILE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

_DEFAULT_ROWS_PER_TASK, _TEST_ROWS_PER_TASK = 1000, 64


def load_data(run: RunArguments, kind: DataKind) -> tuple[Dataset, Dataset | None]:
    """Return training rows, and held-out rows where there are any.

    Args:
        run: names the data.
        kind: the columns that the objective reads.

    Raises:
        ConfigError: the columns do not fit the objective, or a file has an unknown ending.
        AssetError: the data cannot be read.
    """
    if run.dataset_name.startswith(EMBEDDED):
        train, test = _embedded(run, kind)
    else:
        train, test = _loaded(run)
    if kind == "prompt" and "answer" not in train.column_names:
        raise ConfigError(
            f"dataset {run.dataset_name!r} has the columns {sorted(train.column_names)}; "
            f"the reward {run.reward!r} also needs 'answer'"
        )
    alternatives = COLUMNS[kind]
    if not any(set(names) <= set(train.column_names) for names in alternatives):
        wanted = " or ".join("+".join(names) for names in alternatives)
        raise ConfigError(
            f"dataset {run.dataset_name!r} has the columns {sorted(train.column_names)}; this "
            f"objective needs {wanted}"
        )
    return train, test


def _loaded(run: RunArguments) -> tuple[Dataset, Dataset | None]:
    path = Path(run.dataset_name)
    try:
        if path.suffix not in _FILE_READERS and path.is_file():
            raise ConfigError(
                f"dataset {run.dataset_name!r}: cannot read {path.suffix!r} files; use one of "
                f"{sorted(_FILE_READERS)} or a hub id"
            )
        if path.suffix in _FILE_READERS:
            splits = load_dataset(_FILE_READERS[path.suffix], data_files=str(path))
            names = ("train", "")
        else:
            splits = load_dataset(run.dataset_name, run.dataset_config)
            names = (run.dataset_train_split, run.dataset_test_split)
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, ConfigError):
            raise
        raise AssetError(f"cannot load the dataset {run.dataset_name!r}: {error}") from error
    if names[0] not in splits:
        raise ConfigError(
            f"dataset {run.dataset_name!r} has no split {names[0]!r}; one of {sorted(splits)}"
        )
    train = splits[names[0]]
    if run.dataset_size:
        train = train.select(range(min(run.dataset_size, len(train))))
    return train, splits.get(names[1])


def _embedded(run: RunArguments, kind: DataKind) -> tuple[Dataset, Dataset]:
    tasks = run.dataset_name.removeprefix(EMBEDDED).split("+")
    rows = run.dataset_size // len(tasks) if run.dataset_size else _DEFAULT_ROWS_PER_TASK
    train = mix(tasks, train=rows)
    held_out = [load_task(name, train=0, test=_TEST_ROWS_PER_TASK).test for name in tasks]
    test = [row for rows_of_task in held_out for row in rows_of_task]
    return (
        Dataset.from_list(_shape(train, kind)),
        Dataset.from_list(_shape(test, kind)),
    )


def _shape(rows: list[dict[str, str]], kind: DataKind) -> list[dict[str, Any]]:
    """Give embedded rows the columns of `kind`, as conversations."""
    user = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    said = [[{"role": "assistant", "content": row["completion"]}] for row in rows]
    # The answer to another question of the same kind is the natural bad answer.
    other = [said[_next_of_domain(rows, i)] for i in range(len(rows))]
    columns: list[dict[str, Any]]
    if kind == "completion":
        columns = [{"prompt": p, "completion": c} for p, c in zip(user, said, strict=True)]
    elif kind == "preference":
        columns = [
            {"prompt": p, "chosen": c, "rejected": o}
            for p, c, o in zip(user, said, other, strict=True)
        ]
    elif kind == "labelled":
        columns = [
            {"prompt": p, "completion": c if i % 2 == 0 else o, "label": i % 2 == 0}
            for i, (p, c, o) in enumerate(zip(user, said, other, strict=True))
        ]
    else:
        columns = [
            {"prompt": p, "answer": r["completion"]} for p, r in zip(user, rows, strict=True)
        ]
    return columns


def _next_of_domain(rows: list[dict[str, str]], index: int) -> int:
    domain = rows[index]["domain"]
    turn = [*range(index + 1, len(rows)), *range(index)]
    return next((i for i in turn if rows[i]["domain"] == domain), index)
