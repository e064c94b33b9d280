"""A recipe: one YAML file (or flags) -> checked settings of a run. Unknown keys are refused.

Layout: the fields of `RunArguments`, the fields of the objective's TRL config (the names TRL users
know), and under `moe` the fields of `MoeLoraConfig`, or under `lora` those of PEFT's `LoraConfig`
for a plain LoRA: the baseline, and the adapter of an upcycled base. A flag wins over the file;
nested fields take a dot: `--moe.router.k 1`.
"""

import argparse
import copy
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import LoraConfig, PeftConfig

from moeadapt.errors import ConfigError
from moeadapt.training import settings as sections
from moeadapt.training.objectives import OBJECTIVES, Objective
from moeadapt.training.param_groups import RouterOptions
from moeadapt.training.places import Places
from moeadapt.training.recipe_adapter import SECTIONS, read_adapter
from moeadapt.training.recipe_file import read_recipe
from moeadapt.training.recipe_flat import read_flat, refuse_unknown
from moeadapt.training.rewards import get_reward
from moeadapt.training.settings import FAULT_OPTIONS, read_flags, set_nested
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
        compare_uniform: after each evaluation in training, warn if learned routing is no better
            than all experts in equal shares; needs `eval_strategy`.
        on_nonfinite: at NaN or infinity in loss or gradients `stop` the run, or `skip` the step.
        check_routers: for debugging, stop at the first router whose output is not finite.
        allow_partial_resume: resume although state is missing, or data and batches changed.
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
    compare_uniform: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    check_routers: bool = False
    allow_partial_resume: bool = False

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
        adapter: a mixture of LoRA experts, or a plain LoRA.
        source: the file it came from, for messages.
        settings: what file and flags say, nested as in the file.
        places: where each of them was written.
    """

    objective: Objective
    run: RunArguments
    trainer_args: Any
    adapter: PeftConfig
    source: str
    settings: dict[str, Any] = field(default_factory=dict)
    places: Places = field(default_factory=Places)

    @property
    def is_mixture(self) -> bool:
        """Whether the adapter has experts."""
        return isinstance(self.adapter, MoeLoraConfig)

    @property
    def router_keywords(self) -> dict[str, Any]:
        """What our trainers take for the routers; nothing for TRL's own."""
        if not self.is_mixture:
            return {}
        own = {name: getattr(self.run, name) for name in ("compare_uniform", *FAULT_OPTIONS)}
        return {**self.run.router_options.keywords(), **own}

    def rows(self) -> list[tuple[str, str]]:
        """Return label and value of what the run reads and writes, for a table."""
        return [
            ("base model", self.run.model_name_or_path),
            ("data", self.run.dataset_name),
            ("would write to", str(self.trainer_args.output_dir)),
        ]

    @contextmanager
    def naming_targets(self) -> Iterator[None]:
        """Say where the targets were written if the base model turns out not to have them.

        Raises:
            ConfigError: with file and line.
        """
        try:
            yield
        except ValueError as error:
            if not re.search("target.?modules", str(error), re.IGNORECASE):
                raise
            section = "moe" if self.is_mixture else "lora"
            place = self.places.of(section, "target_modules")
            raise ConfigError(f"{place}: {error}") from None

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
    values, places = read_recipe(config) if config else ({}, Places())
    for key, value in read_flags(flags).items():
        set_nested(values, key, value)
        places.set_by_flag(key)
    settings = copy.deepcopy(values)
    _warn_of_trust(values, places)
    classes = (RunArguments, goal.config_class())
    known = {f.name for cls in classes for f in fields(cls) if f.init}
    refuse_unknown(values, known | set(SECTIONS), places)
    adapter = read_adapter(values, places, goal)
    source = " and ".join(filter(None, [config, "flags" if flags else None])) or "defaults"
    run, trainer_args = read_flat(classes, values, places)
    if run.load_in_4bit and run.load_in_8bit:
        place = places.of("load_in_8bit")
        raise ConfigError(f"{place}: load_in_4bit and load_in_8bit exclude each other")
    try:
        options = run.router_options
    except ConfigError as error:
        raise ConfigError(f"{places.mentioned(str(error))}: {error}") from None
    if options != RouterOptions() and isinstance(adapter, LoraConfig):
        raise ConfigError(
            f"{source}: router_* settings, but a plain LoRA has no routers of its own"
        )
    sections.refuse_fault_options(run, adapter, source)
    if run.compare_uniform:
        _check_comparison(goal, adapter, trainer_args, source)
    if goal.data == "prompt":
        get_reward(run.reward)
    return Recipe(
        objective=goal,
        run=run,
        trainer_args=trainer_args,
        adapter=adapter,
        source=source,
        settings=settings,
        places=places,
    )


def _warn_of_trust(values: dict[str, Any], places: Places) -> None:
    """Say that a recipe cannot allow code of a hub to run, wherever it tries."""
    inner = values.get("model_init_kwargs")
    top = values.get("trust_remote_code")
    asked: list[tuple[str, ...]] = [("trust_remote_code",)] if top else []
    if isinstance(inner, dict) and inner.get("trust_remote_code"):
        asked.append(("model_init_kwargs", "trust_remote_code"))
    for path in asked:
        warnings.warn(
            f"{places.of(*path)}: {'.'.join(path)} is ignored: a recipe does not let code of a hub "
            "run; load such a model in Python, and give it to a trainer",
            stacklevel=3,
        )


def _check_comparison(goal: Objective, adapter: PeftConfig, args: Any, source: str) -> None:
    if isinstance(adapter, LoraConfig) or goal.name != "sft":
        raise ConfigError(f"{source}: compare_uniform is for mixtures trained by sft")
    if args.eval_strategy == "no":
        raise ConfigError(f"{source}: compare_uniform acts after evaluations; set eval_strategy")


def parse_script(objective: str, argv: Sequence[str]) -> Recipe:
    """Parse a script's own arguments; a mistake ends the process with status 2 and one line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, flags = parser.parse_known_args(list(argv))
    try:
        recipe = parse_recipe(objective, known.config, flags)
        if not recipe.is_mixture:
            raise ConfigError(
                f"{recipe.source}: this script trains a mixture, and 'lora' asks for a plain LoRA; "
                f"run it with `moeadapt train {objective}`"
            )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return recipe
