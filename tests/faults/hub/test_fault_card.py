"""Case 102: whoever pushes, a card keeps its PEFT fields and the text that its owner wrote."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moeadapt.errors import ConfigError
from moeadapt.training.callback import MoeAdaptCallback
from moeadapt.training.hub_push import kept_card
from moeadapt.training.trainers import MoESFTTrainer
from tests.hub.kit import BASE, CARD, REPO, add_base, connected, copied, files_of, pushed, shelf
from tests.hub.loopback import TOKEN
from tests.hub.repositories import Repository
from tests.tiny import adapt, batch, logits, moe_config
from tests.toy import toy_text, toy_tokenizer

OWN = "## How I use it\n\nFor sums, on Sundays.\n"


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "home", token=TOKEN) as hub:
        yield hub


def front(hub):
    text = files_of(hub)[CARD].decode()
    return yaml.safe_load(text.split("---\n")[1])


def write_card(hub, text):
    hub.repositories.setdefault(REPO, Repository()).add("main", "card", {CARD: text.encode()})


def assert_whole(hub):
    text, fields = files_of(hub)[CARD].decode(), front(hub)
    assert OWN.strip() in text
    assert "pip install moeadapt" in text
    assert text.count("moeadapt:begin") == 1
    assert fields["library_name"] == "peft"
    assert fields["base_model"] == BASE
    assert fields["pipeline_tag"] == "text-generation"
    assert {"moeadapt", "mixture-of-experts", f"base_model:adapter:{BASE}"} <= set(fields["tags"])


def own_card(hub):
    """Push, then let the owner write below our part."""
    pushed(shelf() / "adapter")
    write_card(hub, files_of(hub)[CARD].decode() + "\n" + OWN)


def test_fault_102_a_first_push_over_the_owners_card(hub):
    write_card(hub, f"---\nlanguage: de\nlicense: mit\ntags: [sums]\n---\n{OWN}")
    pushed(shelf() / "adapter", license=None)
    assert_whole(hub)
    assert front(hub)["language"] == "de"
    assert front(hub)["license"] == "mit"
    assert "sums" in front(hub)["tags"]


def test_fault_102_pushing_again_keeps_what_the_owner_wrote_since(hub):
    own_card(hub)
    pushed(shelf() / "adapter", datasets=["ann/sums"])
    assert_whole(hub)
    assert front(hub)["datasets"] == ["ann/sums"]


def test_fault_102_a_licence_is_neither_guessed_nor_exchanged(hub):
    with pytest.raises(ConfigError, match="the licence is unknown: give --license"):
        pushed(shelf() / "adapter", license=None)
    for wrong in ("Apache 2.0", "other", "MIT"):
        with pytest.raises(ConfigError, match="licen[sc]e"):
            pushed(shelf() / "adapter", license=wrong)
    assert REPO not in hub.repositories
    own_card(hub)
    with pytest.raises(ConfigError, match="says license 'apache-2.0', and you say 'mit'"):
        pushed(shelf() / "adapter", license="mit")


def test_fault_102_the_card_of_a_folder_goes_along_and_a_template_does_not(hub, tmp_path):
    folder = copied(tmp_path)
    assert "Direct Use" in (folder / CARD).read_text()  # PEFT's
    pushed(folder)
    assert "Direct Use" not in files_of(hub)[CARD].decode()
    (folder / CARD).write_text(f"---\nbase_model: {shelf() / 'base'}\nlicense: mit\n---\n{OWN}")
    hub.repositories.clear()
    pushed(folder, license=None)
    assert_whole(hub)
    assert front(hub)["license"] == "mit"


# --- what PEFT pushes


def live():
    base = AutoModelForCausalLM.from_pretrained(shelf() / "base")
    return PeftModel.from_pretrained(base, str(shelf() / "adapter"))


def test_fault_102_peft_push_to_hub_keeps_our_card_and_the_owners_text(hub):
    own_card(hub)
    with pytest.warns(UserWarning, match=r"moeadapt.push\(model, 'ann/math'\) writes the card"):
        live().push_to_hub(REPO)
    assert_whole(hub)


def test_fault_102_after_a_first_push_of_peft_ours_writes_the_card(hub):
    with pytest.warns(UserWarning, match="writes none that says how to load"):
        live().push_to_hub(REPO)
    assert front(hub)["library_name"] == "transformers"
    pushed(shelf() / "adapter")
    assert front(hub)["library_name"] == "peft"
    assert "Direct Use" not in files_of(hub)[CARD].decode()
    write_card(hub, files_of(hub)[CARD].decode() + "\n" + OWN)
    assert_whole(hub)


# --- what trainers push

ARGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "save_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "push_to_hub": True,
    "hub_model_id": REPO,
}


def sft(folder, **options):
    import trl

    base = AutoModelForCausalLM.from_pretrained(shelf() / "base")
    args = trl.SFTConfig(output_dir=str(folder), max_length=16, **{**ARGS, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MoESFTTrainer(
            base,
            args=args,
            train_dataset=toy_text(8),
            processing_class=toy_tokenizer(),
            peft_config=moe_config("block", init_lora_weights=True),
        )


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_fault_102_our_trainer_keeps_the_card_and_its_pushes_load(hub, tmp_path, strategy):
    add_base(hub)
    own_card(hub)
    trainer = sft(tmp_path / "out", hub_strategy=strategy, hub_always_push=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
        trainer._finish_current_push()
        trainer.push_to_hub()
    assert any("`moeadapt push" in str(one.message) for one in said)
    assert_whole(hub)
    commits = [c for c in hub.repositories[REPO].commits.values() if "Training" in c.title]
    assert bool(commits) == (strategy == "every_save")
    base = AutoModelForCausalLM.from_pretrained(BASE)
    loaded = PeftModel.from_pretrained(base, REPO).eval()
    assert torch.equal(logits(loaded, batch()), logits(trainer.model.eval(), batch()))


def test_fault_102_our_trainers_first_card_says_how_to_load(hub, tmp_path):
    trainer = sft(tmp_path / "out", max_steps=1, save_strategy="no")
    with pytest.warns(UserWarning, match="`moeadapt push"):
        trainer.push_to_hub()
    text = files_of(hub)[CARD].decode()
    assert "import moeadapt" in text
    assert "trained using [TRL]" in text
    assert front(hub)["library_name"] == "peft"
    with pytest.warns(UserWarning, match="`moeadapt push"):
        trainer.push_to_hub()
    assert files_of(hub)[CARD].decode() == text


def test_fault_102_a_stock_trainer_is_told_of_and_ours_repairs_its_card(hub, tmp_path):
    own_card(hub)
    base = AutoModelForCausalLM.from_pretrained(shelf() / "base")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 99, (4, 5))]
    trainer = Trainer(
        adapt(base, moe_config("block")).train(),
        TrainingArguments(output_dir=str(tmp_path / "out"), **{**ARGS, "save_strategy": "no"}),
        train_dataset=rows,
        callbacks=[MoeAdaptCallback()],
    )
    with pytest.warns(UserWarning, match="its draft replaces your card"):
        trainer.push_to_hub()
    assert OWN.strip() not in files_of(hub)[CARD].decode()
    assert "training_args.bin" in files_of(hub)
    pushed(tmp_path / "out")
    assert front(hub)["library_name"] == "peft"
    assert "import moeadapt" in files_of(hub)[CARD].decode()


def test_fault_104_a_trainer_with_a_token_in_its_arguments_is_refused(hub, tmp_path):
    with pytest.raises(ConfigError, match="hub_token: .*set HF_TOKEN"):
        sft(tmp_path / "out", hub_token=TOKEN)
    assert hub.calls("commit") == []


def test_fault_102_a_stock_draft_that_its_owner_rewrote_is_kept(hub, tmp_path):
    """The tag `generated_from_trainer` stays in a card whose text is its owner's."""
    write_card(hub, f"---\ntags: [generated_from_trainer]\n---\n{OWN}")
    trainer = sft(tmp_path / "out", max_steps=1, save_strategy="no")
    with pytest.warns(UserWarning, match="`moeadapt push"):
        trainer.push_to_hub()
    assert OWN.strip() in files_of(hub)[CARD].decode()


def test_fault_102_without_an_answer_no_draft_takes_the_place_of_the_card(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr("moeadapt.training.hub_push.hf_hub_download", unreachable)
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True, hub_revision=None)
    card = tmp_path / CARD
    with pytest.warns(UserWarning, match="could not be read"), kept_card(args, REPO):
        card.write_text("# a draft")
    assert not card.exists()
    card.write_text(OWN)

    def broken():
        with kept_card(args, REPO):
            card.write_text("# a draft")
            raise KeyError

    with pytest.warns(UserWarning, match="could not be read"), pytest.raises(KeyError):
        broken()
    assert card.read_text() == OWN
