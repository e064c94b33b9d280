"""A plain LoRA trained on the mixture's logits: the loss, the memory, the mixture left alone."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback

import moeadapt
from moeadapt.errors import ConfigError
from moeadapt.training.distill import TRAINING_ROWS, DistillTrainer, divergence, measure_divergence
from moeadapt.tuner.probe import read_batches
from tests.tiny import adapted, batch, logits, tiny
from tests.toy import sentences, toy_chat, toy_text, toy_tokenizer
from tests.training.kit import arguments

OPTIONS = ("out_dir", "student", "rank", "held_out", "temperature", "callbacks")


def run(folder, model, rows=None, **fields):
    options = {k: fields.pop(k) for k in list(fields) if k in OPTIONS}
    return moeadapt.distill(
        model,
        toy_text() if rows is None else rows,
        args=arguments("SFT", folder, **fields),
        tokenizer=toy_tokenizer(),
        **options,
    )


def test_the_divergence_is_that_of_labelled_tokens_alone():
    torch.manual_seed(0)
    mine, wanted = torch.randn(2, 5, 7).double(), torch.randn(2, 5, 7).double()
    labels = torch.tensor([[-100, -100, 3, 4, -100], [1, 2, -100, -100, 6]])
    mine.requires_grad_()
    found = divergence(mine, wanted, labels, 2.0)
    expected = 0.0
    for row, t in ((0, 1), (0, 2), (1, 0), (1, 3)):
        p, q = (wanted[row, t] / 2).softmax(-1), (mine[row, t] / 2).softmax(-1)
        expected = expected + 4 * (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found, mine, retain_graph=True)
    (other,) = torch.autograd.grad(expected, mine)
    torch.testing.assert_close(grad, other)
    assert not grad[0, 0].any()
    assert not grad[:, 4].any()


def test_the_student_answers_more_like_the_mixture(tmp_path):
    model = adapted("llama", "ffn", n_shared=1)
    unseen = dict(toy_tokenizer()(sentences(8, seed=1), return_tensors="pt", padding=True))
    unseen.pop("token_type_ids", None)
    before = logits(model, unseen)
    options = {"out_dir": tmp_path / "out", "held_out": [unseen]}
    result = run(tmp_path / "run", model, max_steps=40, learning_rate=2e-2, **options)
    assert torch.equal(logits(model, unseen), before)
    real = unseen["attention_mask"].bool()

    def gap(other):
        return (logits(other, unseen) - before).square()[real].mean()

    assert gap(result.model) < 0.7 * gap(tiny("llama"))
    assert result.divergence > 0
    assert set(result.to_dict()["losses"]) == {"mixture", "merged", "base"}
    loaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "out")).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert torch.equal(logits(loaded, batch()), logits(result.model, batch()))


def test_the_base_is_in_memory_once(tmp_path):
    model = adapted("llama", "layer", modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    before = {n: p.clone() for n, p in model.named_parameters()}
    result = run(tmp_path, model, max_steps=1, rank=3)
    mine = {p.data_ptr() for p in model.parameters()}
    own = {n: p for n, p in result.model.named_parameters() if p.data_ptr() not in mine}
    assert all("lora_" in name or "lm_head" in name for name in own)
    assert {p.shape[0] for n, p in own.items() if "lora_A" in n} == {3}
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    (kept,) = [p for n, p in own.items() if "lm_head" in n]
    assert torch.equal(kept, head)


def test_accumulated_steps_are_those_of_one_batch(tmp_path):
    found = []
    for size, steps in ((4, 1), (1, 4), (2, 2)):
        torch.manual_seed(0)
        result = run(
            tmp_path / str(steps),
            adapted("llama", "layer"),
            rows=toy_chat(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            optim="sgd",
            learning_rate=0.5,
        )
        found.append(dict(result.model.named_parameters()))
    for other in found[1:]:
        for name, parameter in found[0].items():
            torch.testing.assert_close(other[name], parameter, rtol=1e-3, atol=1e-5)
    assert any(p.abs().max() > 1e-3 for n, p in found[0].items() if "lora_B" in n)


def test_it_trains_under_bf16(tmp_path):
    model = adapted("llama", "ffn")
    result = run(tmp_path, model, bf16=True, max_steps=2, gradient_checkpointing=True)
    own = [p for n, p in result.model.named_parameters() if "lora_B" in n]
    assert all(p.isfinite().all() and p.any() for p in own)


def test_a_merge_is_a_start(tmp_path):
    model = adapted("llama", "layer")
    start = moeadapt.merge(model, data=[batch(seed=s) for s in range(4)])
    before = {n: p.detach().clone() for n, p in start.model.named_parameters()}
    result = run(tmp_path, model, student=start.model, max_steps=1, learning_rate=1e-6)
    for name, parameter in result.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-3, atol=1e-5)


def test_wrong_requests_are_refused_before_training(tmp_path):
    model = adapted("llama", "layer")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ConfigError, match="not an empty folder"):
        run(tmp_path, model, out_dir=tmp_path / "full")
    with pytest.raises(ConfigError, match="at least 1"):
        run(tmp_path, model, rank=0)
    with pytest.raises(ConfigError, match="must be positive"):
        DistillTrainer(teacher=model, temperature=0.0)


def nats_per_token(mixture, student, data):
    """Return the mean KL over labelled tokens, token by token."""
    found = []
    for inputs in data:
        asked = {k: v for k, v in inputs.items() if k != "labels"}
        p, q = logits(mixture, asked).log_softmax(-1), logits(student, asked).log_softmax(-1)
        labels = inputs["labels"]
        for row in range(len(labels)):
            for t in range(labels.shape[1] - 1):
                if labels[row, t + 1] != -100:
                    found.append(float((p[row, t].exp() * (p[row, t] - q[row, t])).sum()))
    return sum(found) / len(found)


def labelled(seed):
    found = batch(seed=seed)
    labels = found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
    labels[seed % 3, :4] = -100
    return {**found, "labels": labels}


def test_the_divergence_is_in_nats_per_held_out_token_at_any_temperature(tmp_path):
    model, held = adapted("llama", "layer"), [labelled(0), labelled(1)]
    for temperature in (1.0, 3.0):
        result = run(
            tmp_path, model, held_out=held, temperature=temperature, max_steps=2, logging_steps=1
        )
        expected = nats_per_token(model, result.model, held)
        assert result.divergence == pytest.approx(expected, rel=1e-4)
    assert measure_divergence(model, model, read_batches(held)) == pytest.approx(0, abs=1e-7)


def test_without_held_out_rows_the_divergence_is_of_the_first_training_rows(tmp_path):
    model, size = adapted("llama", "layer"), TRAINING_ROWS // 8
    texts = sentences(TRAINING_ROWS + 20, seed=2)
    rows = Dataset.from_list([{"text": text} for text in texts])
    result = run(tmp_path, model, rows, max_steps=1, logging_strategy="no", max_length=32)
    tokenizer, data = toy_tokenizer(), []
    for start in range(0, TRAINING_ROWS, size):
        own = [text + tokenizer.eos_token for text in texts[start : start + size]]
        coded = tokenizer(own, return_tensors="pt", padding=True, padding_side="right")
        mask = coded["attention_mask"]
        labels = coded["input_ids"].masked_fill(mask == 0, -100)
        data.append({"input_ids": coded["input_ids"], "attention_mask": mask, "labels": labels})
    expected = nats_per_token(model, result.model, data)
    assert result.divergence == pytest.approx(expected, rel=1e-4)


class Stop(TrainerCallback):
    """Fail in the middle of training."""

    def on_step_end(self, *args, **kwargs):
        raise KeyError("stop")


def test_modes_and_gradients_are_given_back_even_when_training_fails(tmp_path):
    model = adapted("llama", "layer").train()
    model.get_base_model().model.norm.eval()
    model.get_base_model().lm_head.weight.requires_grad_(True)

    def state():
        modes = [(n, m.training) for n, m in model.named_modules()]
        return modes, [(n, p.requires_grad) for n, p in model.named_parameters()]

    before = state()
    with pytest.raises(KeyError, match="stop"):
        run(tmp_path, model, max_steps=2, callbacks=[Stop()])
    assert state() == before
    run(tmp_path, model, max_steps=1)
    assert state() == before


def test_rows_without_labels_are_refused_before_training(tmp_path):
    model = adapted("llama", "layer")
    empty = {**labelled(0), "labels": torch.full((3, 9), -100)}
    with pytest.raises(ConfigError, match="no token of held_out has a label"):
        run(tmp_path, model, held_out=[empty], callbacks=[Stop()])
    rows = Dataset.from_list([{"prompt": "w1 w2 w3 w4 w5", "completion": " w6"}] * 4)
    with pytest.raises(ConfigError, match="no token of the first training rows has a label"):
        run(tmp_path, model, rows, max_length=3, callbacks=[Stop()])
