"""A reward model with a mixture of LoRA experts.

    python trainers/reward.py --config configs/reward/smollm2_molora.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml trainers/reward.py \
        --config configs/reward/smollm2_molora.yaml --learning_rate 5e-5

Every field of the recipe is a flag. Data: prompt, chosen, rejected. The score
head is trained in full beside the adapter.
"""

import sys

from moeadapt.training import MoERewardTrainer
from moeadapt.training.base_model import load_base
from moeadapt.training.data import load_data
from moeadapt.training.recipe import parse_script


def main(argv: list[str]) -> None:
    """Train and save."""
    recipe = parse_script("reward", argv)

    train_dataset, eval_dataset = load_data(recipe.run, recipe.objective.data)
    model, tokenizer = load_base(recipe.run, recipe.objective)

    trainer = MoERewardTrainer(
        model=model,
        args=recipe.trainer_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if recipe.evaluates else None,
        processing_class=tokenizer,
        peft_config=recipe.adapter,
        **recipe.router_keywords,
    )
    trainer.train(resume_from_checkpoint=recipe.resume)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main(sys.argv[1:])
