"""The card: its owner's text and fields stay, ours is replaced, templates go."""

import pytest
import yaml
from transformers.modelcard import TrainingSummary
from trl.trainer.utils import generate_model_card

from moeadapt.errors import ConfigError
from moeadapt.model_card.first_lines import with_first_lines
from moeadapt.model_card.merge import BEGIN, END, make_card, own_text
from moeadapt.model_card.templates import is_template

FIELDS = {
    "library_name": "peft",
    "base_model": "ann/base",
    "license": None,
    "tags": ["moeadapt", "base_model:adapter:ann/base"],
}

OLD = """---
language: de
license: mit
library_name: transformers
base_model: ''
tags:
- sums
- base_model:adapter:/home/ann/base
model-index:
- name: x
  results:
  - task: {type: text-generation}
    dataset: {type: d, name: d}
    metrics: [{type: loss, value: 1.5}]
---

# My sums

They add up.
"""


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_new_card_is_front_matter_and_our_part():
    text = make_card(FIELDS, "# x\n\nour words", None, "here")
    assert text.startswith("---\nlibrary_name: peft\n") or text.startswith("---\nbase_model")
    assert text.endswith(f"{BEGIN}\n# x\n\nour words\n{END}\n")
    assert front(text) == {k: v for k, v in FIELDS.items() if v is not None}


def test_the_owners_text_and_fields_stay_and_ours_comes_first():
    text = make_card(FIELDS, "our words", OLD, "here")
    found = front(text)
    assert found["language"] == "de"
    assert found["license"] == "mit"
    assert found["library_name"] == "peft"
    assert found["base_model"] == "ann/base"
    assert found["tags"] == ["sums", "moeadapt", "base_model:adapter:ann/base"]
    assert found["model-index"][0]["results"][0]["metrics"][0]["value"] == 1.5
    body = text.split("---\n", 2)[2]
    assert body.index("our words") < body.index("# My sums\n\nThey add up.\n")


def test_pushing_again_replaces_our_part_alone():
    once = make_card(FIELDS, "old words", OLD, "here")
    written = once.replace(BEGIN, f"above\n{BEGIN}") + "\nbelow\n"
    again = make_card(FIELDS, "new words", written, "here")
    assert again == written.replace("old words", "new words")
    assert make_card(FIELDS, "new words", again, "here") == again


def test_windows_line_ends_and_a_byte_order_mark_are_read():
    text = make_card(FIELDS, "our words", "\ufeff" + OLD.replace("\n", "\r\n"), "here")
    assert front(text)["language"] == "de"
    assert "They add up." in text


@pytest.mark.parametrize(
    "old",
    [f"{BEGIN}\nx", f"x\n{END}", f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"],
)
def test_broken_marks_are_refused(old):
    with pytest.raises(ConfigError, match="here: holds . marks"):
        make_card(FIELDS, "our words", old, "here")


@pytest.mark.parametrize(
    "old", ["---\n- a list\n---\n", "---\na: [\n---\n", "---\na: !!x y\n---\n"]
)
def test_front_matter_that_a_hub_does_not_read_is_refused(old):
    with pytest.raises(ConfigError, match="here: its front matter"):
        make_card(FIELDS, "our words", old, "here")


def test_an_untouched_template_goes_and_one_with_a_word_of_its_own_stays():
    from huggingface_hub import ModelCard, ModelCardData

    empty = str(ModelCard.from_template(ModelCardData(base_model="ann/base", license="mit")))
    body = empty.split("---\n", 2)[2] + "\n### Framework versions\n\n- PEFT 0.21.2"
    assert is_template(body)
    assert own_text(empty) == ""
    assert "Direct Use" not in make_card(FIELDS, "our words", empty, "here")
    touched = body.replace("### Direct Use", "### Direct Use\n\nFor sums.")
    assert not is_template(touched)
    assert "For sums." in make_card(FIELDS, "our words", touched, "here")


def test_a_value_cannot_leave_its_cell_or_become_html():
    from moeadapt.model_card.markdown import table

    assert table(["a"], [["x|y\n<script>"]]).splitlines()[2] == "| x\\|y \\<script\\> |"


@pytest.mark.parametrize("template", ["lm_model_card.md", "rm_model_card.md"])
@pytest.mark.parametrize("paper", [None, "2305.18290"])
def test_a_draft_of_trl_goes_and_one_with_a_word_of_its_own_stays(template, paper):
    draft = generate_model_card(
        base_model="ann/base",
        model_name="sums",
        hub_model_id="ann/sums",
        dataset_name="ann/rows",
        tags=["trl"],
        wandb_url="https://wandb.ai/run",
        trackio_url=None,
        comet_url=None,
        trainer_name="DPO",
        template_file=template,
        trainer_citation="@article{a,\n  title = {A}\n}" if paper else None,
        paper_title="A paper" if paper else None,
        paper_id=paper,
    ).content
    assert own_text(draft) == ""
    told = with_first_lines(draft, "README.md")
    assert "trained using [TRL]" in told
    again = make_card(FIELDS, "ours", told, "README.md")
    assert "TRL" not in again
    for mine in (draft + "\nIt adds.\n", draft.replace("## Quick start", "## How I use it")):
        assert is_template(own_text(mine)) is False
        assert "TRL" in make_card(FIELDS, "ours", mine, "README.md")


def test_a_draft_of_transformers_goes_and_one_with_a_word_of_its_own_stays():
    draft = TrainingSummary(
        model_name="sums",
        finetuned_from="ann/base",
        tags=["generated_from_trainer"],
        dataset="rows",
        eval_results={"Loss": 1.2345, "Epoch": 2.0},
        eval_lines=[{"Training Loss": 1.0, "Epoch": 1.0, "Step": 3, "Validation Loss": 1.2}],
        hyperparameters={"learning_rate": 1e-3, "lr_scheduler_type": "linear"},
    ).to_model_card()
    assert own_text(draft) == ""
    mine = draft.replace("More information needed", "It adds.", 1)
    assert "It adds." in own_text(mine)
