"""A checked recipe -> a trained, saved adapter."""

from typing import Any

from moeadapt.training.base_model import load_base
from moeadapt.training.data import load_data
from moeadapt.training.output_folder import check_output_dir
from moeadapt.training.recipe import Recipe
from moeadapt.training.recipe_copy import write_recipe
from moeadapt.training.rewards import get_reward
from moeadapt.training.stock_moe import fit_to_stock_moe
from moeadapt.version import __version__


def build_trainer(recipe: Recipe) -> Any:
    """Load model and data and build the objective's trainer, ready to `train`.

    Raises:
        AssetError: the model or the data cannot be had.
        ConfigError: the data's columns do not fit, or the targets do not exist in the model.
    """
    goal = recipe.objective
    extra: dict[str, Any] = {}
    if goal.data == "prompt":
        extra["reward_funcs"] = get_reward(recipe.run.reward)
    train, test = load_data(recipe.run, goal.data)
    model, tokenizer = load_base(recipe.run, goal)
    with recipe.naming_targets():
        return goal.trainer_class(is_mixture=recipe.is_mixture)(
            model=model,
            args=recipe.trainer_args,
            train_dataset=train,
            eval_dataset=test if recipe.evaluates else None,
            processing_class=tokenizer,
            peft_config=fit_to_stock_moe(recipe.adapter, model),
            **recipe.router_keywords,
            **extra,
        )


def run(recipe: Recipe) -> dict[str, Any]:
    """Train and save into the recipe's `output_dir`, its settings as `recipe.yaml` beside it.

    Returns:
        `adapter`, the folder; `steps`; `train_loss`, the mean of the loss over all steps;
        `seconds`.

    Raises:
        AssetError: see `build_trainer`.
        ConfigError: see `build_trainer` and `check_output_dir`.
        TrainingError: see `SafeRunMixin`.
        TrainingStopped: after SIGTERM or SIGINT, and a complete checkpoint.
    """
    check_output_dir(recipe.trainer_args.output_dir)
    trainer = build_trainer(recipe)
    done = trainer.train(resume_from_checkpoint=recipe.resume)
    trainer.save_model()
    trainer.save_state()
    if recipe.trainer_args.should_save:
        folder = recipe.trainer_args.output_dir
        write_recipe(recipe.objective.name, recipe.settings, folder, __version__)
    return {
        "adapter": str(recipe.trainer_args.output_dir),
        "steps": done.global_step,
        "train_loss": done.training_loss,
        "seconds": done.metrics.get("train_runtime"),
    }
