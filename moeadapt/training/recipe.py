"""A recipe: one YAML file (or flags) -> checked settings of a run. Unknown keys are refused.

Layout: the fields of `RunArguments`, the fields of the objective's TRL config (the names TRL users
know), and under `moe` the fields of `MoeLoraConfig`. A flag wins over the file; nested fields take
a dot: `--moe.router.k 1`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser

from moeadapt.balance import BALANCE
from moeadapt.errors import ConfigError, did_you_mean
from moeadapt.training.objectives import OBJECTIVES, Objective
from moeadapt.training.param_groups import RouterOptions
from moeadapt.training.rewards import get_reward
from moeadapt.tuner.config import MoeLoraConfig


@dataclass
class RunArguments:
    """What a run needs beside TRL's own arguments.

    Attributes:
        model_name_or_path: a hub id, a folder, or `embedded:smollm2-135m`.
        model_revision: commit, tag or branch on the hub.
        dtype: type the base model is loaded in.
        attn_implementation: attention kernel of the base model, for example `sdpa`.
        load_in_4bit: quantise the base to 4-bit NF4 with bitsandbytes.
        load_in_8bit: quantise the base to 8 bit with bitsandbytes.
        dataset_name: a hub id, a .jsonl/.json/.parquet file, or `embedded:task[+task...]`.
        dataset_config: configuration of a hub dataset.
        dataset_train_split: split to train on.
        dataset_test_split: split to evaluate on, when `eval_strategy` asks for it.
        dataset_size: at most so many training rows; 0: all (embedded tasks: 1000 per task).
        reward: for grpo and rloo, a name of `moeadapt.training.rewards.REWARDS`.
        router_learning_rate: peak learning rate of the routers, > 0; none: `learning_rate`.
        router_weight_decay: weight decay of the routers, >= 0; none: `weight_decay`.
        router_max_grad_norm: largest norm of the gradients of all routers together, > 0, after
            `max_grad_norm` has been applied to all gradients; none: not clipped on their own.
    """

    model_name_or_path: str = field(metadata={"help": "Base model."})
    model_revision: str = "main"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    dataset_name: str = field(default="embedded:pronounce", metadata={"help": "Training data."})
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    dataset_size: int = 0
    reward: str = "exact_match"
    router_learning_rate: float | None = None
    router_weight_decay: float | None = None
    router_max_grad_norm: float | None = None

    @property
    def router_options(self) -> RouterOptions:
        """What is different for routers, checked."""
        return RouterOptions(
            learning_rate=self.router_learning_rate,
            weight_decay=self.router_weight_decay,
            max_grad_norm=self.router_max_grad_norm,
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked run.

    Attributes:
        objective: which trainer.
        run: model and data.
        trainer_args: TRL's config of the objective.
        moe: the adapter.
        source: the file it came from, for messages.
    """

    objective: Objective
    run: RunArguments
    trainer_args: Any
    moe: MoeLoraConfig
    source: str

    @property
    def evaluates(self) -> bool:
        """Whether the run asks for evaluation."""
        return self.trainer_args.eval_strategy != "no"

    @property
    def resume(self) -> str | bool | None:
        """What `Trainer.train` takes: a checkpoint folder, or True for the last one."""
        asked = self.trainer_args.resume_from_checkpoint
        return {"last": True, "true": True, "false": None}.get(str(asked).lower(), asked)


def parse_recipe(objective: str, config: str | None = None, flags: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and flags.

    Args:
        objective: a name of `OBJECTIVES`.
        config: path of a YAML file, or None.
        flags: `["--learning_rate", "1e-4", "--moe.r", "4", ...]`, or with `=`.

    Raises:
        ConfigError: an unknown objective, key or flag (with the nearest valid one and the line in
            the file), or a value of the wrong type or out of range.
    """
    goal = OBJECTIVES[objective]
    values, places = _read_yaml(config) if config else ({}, {})
    for key, value in _read_flags(flags).items():
        _set_nested(values, key, value)
        places.pop(key.partition(".")[0], None)
    moe_values = values.pop("moe", None) or {}
    if not isinstance(moe_values, Mapping):
        raise ConfigError(f"{config}: 'moe' must be a mapping of MoeLoraConfig fields")
    config_class = goal.config_class()
    known = {f.name for cls in (RunArguments, config_class) for f in fields(cls) if f.init}
    _refuse_unknown(values, known | {"moe"}, lambda key: places.get(key, "flags"))
    _refuse_unknown(moe_values, _MOE_FIELDS, lambda key: f"{places.get('moe', 'flags')}: moe")
    if moe_values.get("task_type", goal.task_type) != goal.task_type:
        raise ConfigError(
            f"{places.get('moe', 'flags')}: moe.task_type={moe_values['task_type']!r}, but "
            f"{objective} trains {goal.task_type}; leave it out"
        )
    moe = _adapter({**moe_values, "task_type": goal.task_type})
    source = " and ".join(filter(None, [config, "flags" if flags else None])) or "defaults"
    run, trainer_args = _parse_flat(config_class, values, source)
    if run.load_in_4bit and run.load_in_8bit:
        raise ConfigError(f"{source}: load_in_4bit and load_in_8bit exclude each other")
    try:
        _ = run.router_options
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if goal.data == "prompt":
        get_reward(run.reward)
    return Recipe(
        objective=goal,
        run=run,
        trainer_args=trainer_args,
        moe=moe,
        source=source,
    )


def parse_script(objective: str, argv: Sequence[str]) -> Recipe:
    """Parse a script's own arguments; a mistake ends the process with status 2 and one line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, flags = parser.parse_known_args(list(argv))
    try:
        return parse_recipe(objective, known.config, flags)
    except ConfigError as error:
        raise SystemExit(_say(error)) from None


def _say(error: ConfigError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


_MOE_FIELDS = {"preset", *(f.name for f in fields(MoeLoraConfig))} - {"peft_type", "auto_mapping"}


def _adapter(values: dict[str, Any]) -> MoeLoraConfig:
    preset = values.pop("preset", None)
    return MoeLoraConfig(**values) if preset is None else MoeLoraConfig.preset(preset, **values)


class _Loader(yaml.SafeLoader):
    """Safe YAML without two surprises of YAML 1.1: 1e-3 is a number, and `no` is a word."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the mapping in the file, and `file:line` of each top-level key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: a recipe is a mapping of settings, found {type(values)}")
    places = {key.value: f"{path}:{key.start_mark.line + 1}" for key, _ in node.value}
    return values, places


def _read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Turn `--a.b value` and `--a.b=value` into `{"a.b": value}`; a bare `--flag` is true."""
    values: dict[str, Any] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument {flag!r}; settings are given as --name value")
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            values[name] = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError:
            values[name] = value
    return values


def _set_nested(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        below = place.get(parent)
        if isinstance(below, str):
            below = {"name": below}  # `router: top_k` in the file, `--moe.router.k 1` as a flag
        elif isinstance(below, (int, float)) and parents[:2] == ["moe", "balance"]:
            # `switch: 0.01` in the file, `--moe.balance.switch.coef 0.1` as a flag
            below = {BALANCE[parent].shorthand: below}
        elif below is not None and not isinstance(below, Mapping):
            raise ConfigError(f"flags: --{key}: {parent!r} is {below!r}, which has no settings")
        place[parent] = dict(below or {})
        place = place[parent]
    place[last] = value


def _refuse_unknown(
    values: Mapping[str, Any], known: set[str], place: Callable[[str], str]
) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{place(key)}: unknown setting {key!r}{did_you_mean(key, known)}")


class _Parser(HfArgumentParser):
    """argparse with our errors: no usage of two hundred lines, no abbreviations."""

    where = "flags"

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.where}: {message}")


def _parse_flat(
    config_class: type, values: Mapping[str, Any], where: str
) -> tuple[RunArguments, Any]:
    """Let argparse convert and check every value as if it had been typed as a flag."""
    dataclass_types: Any = [RunArguments, config_class]
    parser = _Parser(dataclass_types, allow_abbrev=False)
    parser.where = where
    # A null in the file means "no value", which no flag can say.
    parser.set_defaults(**{key: None for key, value in values.items() if value is None})
    argv = []
    for key, value in values.items():
        if value is None:
            continue
        words = value if isinstance(value, list) else [value]
        argv += [f"--{key}", *(_word(word) for word in words)]
    try:
        run, trainer_args = parser.parse_args_into_dataclasses(args=argv)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: {error}") from None
    return run, trainer_args


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)
