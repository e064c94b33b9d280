"""REINFORCE leave-one-out with a mixture of LoRA experts.

    python trainers/rloo.py --config configs/rloo/smollm2_mixlora.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml trainers/rloo.py \
        --config configs/rloo/smollm2_mixlora.yaml --num_generations 8

Every field of the recipe is a flag. Data: prompt, and what the reward reads (here
`answer`). `reward` names one of `moeadapt.training.rewards.REWARDS`; to use your own, copy this
file and pass it below.
"""

import sys

from moeadapt.training import MoERLOOTrainer
from moeadapt.training.base_model import load_base
from moeadapt.training.data import load_data
from moeadapt.training.recipe import parse_script
from moeadapt.training.rewards import get_reward


def main(argv: list[str]) -> None:
    """Train and save."""
    recipe = parse_script("rloo", argv)
    reward = get_reward(recipe.run.reward)

    train_dataset, eval_dataset = load_data(recipe.run, recipe.objective.data)
    model, tokenizer = load_base(recipe.run, recipe.objective)

    trainer = MoERLOOTrainer(
        model=model,
        reward_funcs=reward,
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
