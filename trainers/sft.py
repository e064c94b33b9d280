"""Supervised fine-tuning of a mixture of LoRA experts.

    python trainers/sft.py --config configs/sft/smollm2_mixlora.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml trainers/sft.py \
        --config configs/sft/smollm2_mixlora.yaml --learning_rate 5e-4

Every field of the recipe is a flag. Data: prompt + completion, messages, or text.
"""

import sys

from moeadapt.training import MoESFTTrainer
from moeadapt.training.base_model import load_base
from moeadapt.training.data import load_data
from moeadapt.training.recipe import parse_script


def main(argv: list[str]) -> None:
    """Train and save."""
    recipe = parse_script("sft", argv)

    train_dataset, eval_dataset = load_data(recipe.run, recipe.objective.data)
    model, tokenizer = load_base(recipe.run, recipe.objective)

    trainer = MoESFTTrainer(
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
