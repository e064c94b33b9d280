"""Direct preference optimisation with a mixture of LoRA experts.

    python trainers/dpo.py --config configs/dpo/smollm2_mixlora.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml trainers/dpo.py \
        --config configs/dpo/smollm2_mixlora.yaml --learning_rate 5e-5

Every field of the recipe is a flag. Data: prompt, chosen, rejected. The reference
policy is the same model with the adapter off.
"""

import sys

from moeadapt.training import MoEDPOTrainer
from moeadapt.training.base_model import load_base
from moeadapt.training.data import load_data
from moeadapt.training.recipe import parse_script


def main(argv: list[str]) -> None:
    """Train and save."""
    recipe = parse_script("dpo", argv)

    train_dataset, eval_dataset = load_data(recipe.run, recipe.objective.data)
    model, tokenizer = load_base(recipe.run, recipe.objective)

    trainer = MoEDPOTrainer(
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
