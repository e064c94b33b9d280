"""The first rows of upcycled routers: what they are made from, and what is refused."""

import gc

import pytest
import torch
from torch.testing import assert_close

from moeadapt.errors import ConfigError
from moeadapt.export import gates
from moeadapt.export.gate_settings import read_gate_settings
from moeadapt.export.source import open_source
from moeadapt.export.upcycle import upcycle
from moeadapt.export.verify import load_strictly
from tests.export.bases import HIDDEN, base, saved, token_ids
from tests.tiny import VOCAB

IDS = [[3, 4, 5, 6], [7, 8]]


def read(init, texts, std=None, copies=2):
    return read_gate_settings(open_source(base("llama")), copies, init, texts, std)


def plain(settings):
    return [[text.tolist() for text in group] for group in settings.ids]


@pytest.mark.parametrize(
    "texts",
    [
        IDS,
        [torch.tensor(text) for text in IDS],
        [torch.tensor(IDS[0], dtype=torch.int32)[None], IDS[1]],
        tuple(map(tuple, IDS)),
        (text for text in IDS),
    ],
    ids=["lists", "tensors", "a tensor of one row", "tuples", "a generator"],
)
def test_token_ids_may_come_in_any_ordered_form(texts):
    assert plain(read("kmeans", texts)) == [IDS]


def test_rows_of_a_tensor_are_texts():
    ids = token_ids()
    assert plain(read("kmeans", ids)) == [ids.tolist()]
    assert plain(read("hidden", [ids, IDS])) == [ids.tolist(), IDS]


WRONG = {
    "one text": ("kmeans", "a b c", "needs gate_texts: a list of texts"),
    "one text as tensor": ("kmeans", torch.tensor([3, 4]), "needs gate_texts: a list of texts"),
    "a number": ("kmeans", 5, "needs gate_texts: a list of texts"),
    "nothing": ("kmeans", [], "needs gate_texts: a list of texts"),
    "texts per expert for kmeans": ("kmeans", [["a"], ["b"]], r"gate_texts\[0\] is a list and no"),
    "one text of ids": ("kmeans", [3, 4, 5], r"gate_texts\[0\] is a int and no text"),
    "an empty text": ("kmeans", [IDS[0], " "], r"gate_texts\[1\] has no tokens"),
    "no ids": ("kmeans", [IDS[0], []], r"gate_texts\[1\] has no tokens"),
    "None": ("kmeans", [IDS[0], None], r"gate_texts\[1\] is a NoneType and no text"),
    "ragged ids": ("kmeans", [IDS], r"gate_texts\[0\] is a list and no text"),
    "fractions": ("kmeans", [[3.5, 4.0]], r"gate_texts\[0\] has the shape \(2,\) and torch.float"),
    "truths": ("kmeans", [[True, False]], r"torch.bool; a text is a string, or token ids"),
    "a batch in place of a text": ("kmeans", [token_ids()], r"has the shape \(2, 24\)"),
    "ids below the vocabulary": ("kmeans", [[3, -1]], rf"in \[-1, 3\]; .* in \[0, {VOCAB}\)"),
    "ids above the vocabulary": ("hidden", [IDS, [[3, VOCAB]]], rf"gate_texts\[1\]\[0\] .*{VOCAB}"),
    "too few tokens": ("kmeans", [[3]], "1 tokens for 2 experts"),
    "texts of a model in memory": ("kmeans", ["a b"], "must be token ids"),
    "a string per expert": ("hidden", ["a", "b"], r"2 lists of prompts, .*; \[0, 1\] are no such"),
    "an expert without prompts": ("hidden", [IDS, []], r"\[1\] are no such lists or empty"),
    "too many experts": ("hidden", [IDS] * 3, "of 2 lists of prompts"),
    "one string for all": ("hidden", "a b", "of 2 lists of prompts"),
    "ids in place of prompts": ("hidden", IDS, r"gate_texts\[0\]\[0\] is a int and no text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_texts_that_are_none_are_refused(case):
    init, texts, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        read(init, texts)


@pytest.mark.parametrize("std", [0.02, 0.5, 0.0])
@pytest.mark.parametrize("init", ["hidden", "kmeans"])
def test_a_deviation_is_refused_where_it_has_no_effect(init, std):
    with pytest.raises(ConfigError, match="has no effect with gate_init"):
        read(init, [IDS, IDS] if init == "hidden" else IDS, std)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_a_deviation_out_of_range_is_refused(std):
    with pytest.raises(ConfigError, match="gate_std="):
        read("random", None, std)


@pytest.mark.parametrize("init", ["hidden", "kmeans"])
def test_token_ids_as_lists_give_the_gates_of_tensors(init, tmp_path):
    rows = []
    for out, kind in (("a", list), ("b", torch.tensor)):
        group = [kind(text) for text in IDS]
        texts = [group, group[:1]] if init == "hidden" else group
        upcycle(
            saved("llama", tmp_path / "in"), tmp_path / out, 2, 1,
            gate_init=init, gate_texts=texts, verify=False,
        )  # fmt: skip
        rows.append(load_strictly(tmp_path / out).model.layers[0].mlp.gate.weight)
    assert_close(*rows, rtol=0.0, atol=0.0)


def make(init, model, texts):
    if init == "hidden":
        return gates.hidden_gates(model, [texts, texts[:1]])
    return gates.kmeans_gates(model, texts, 2, seed=0)


@pytest.mark.parametrize("init", ["hidden", "kmeans"])
def test_no_input_is_kept_after_its_text(init, monkeypatch):
    monkeypatch.setattr(gates, "MAX_INPUTS", 6)
    model, alive = base("llama"), []

    def count(*_):
        gc.collect()
        found = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (24, HIDDEN)]
        alive.append(len(found))

    model.register_forward_pre_hook(count)
    make(init, model, list(token_ids(4)))
    assert max(alive) == alive[0]


def test_the_inputs_of_kmeans_are_spread_over_all_texts():
    model, texts = base("llama"), [*token_ids(2), token_ids(1, 5, seed=3)[0]]
    everything = gates._spread_inputs(model, texts, 53)
    some = gates._spread_inputs(model, texts, 7)
    for layer in (0, 1):
        places = [53 * i // 7 for i in range(7)]
        assert_close(torch.cat(some[layer]), torch.cat(everything[layer])[places])


def test_a_late_text_counts_where_there_are_more_tokens_than_are_kept(monkeypatch):
    monkeypatch.setattr(gates, "MAX_INPUTS", 24)
    model, first = base("llama"), token_ids(1)[0]
    a, b, again = (
        gates.kmeans_gates(model, [first, token_ids(1, seed=s)[0]], 2, seed=0) for s in (5, 6, 5)
    )
    assert_close(a, again, rtol=0.0, atol=0.0)
    assert (a[1] - b[1]).abs().max() > 1e-3


@pytest.mark.parametrize("init", ["hidden", "kmeans"])
def test_a_model_in_memory_is_read_without_dropout_and_stays_as_it_was(init, tmp_path):
    texts = list(token_ids())
    given = [texts, texts[:1]] if init == "hidden" else texts
    model = base("llama", attention_dropout=0.5)
    expected = make(init, model, texts)[1]
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    upcycle(model, tmp_path / "moe", 2, 1, gate_init=init, gate_texts=given)
    assert [module.training for module in model.modules()] == before
    found = load_strictly(tmp_path / "moe").model.layers[1].mlp.gate.weight
    assert_close(found, expected)


def test_a_model_that_fails_while_it_is_read_stays_as_it_was(tmp_path):
    model = base("llama").train()

    def fails(*_):
        raise RuntimeError("no")

    handle = model.lm_head.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="no"):
        upcycle(model, tmp_path / "moe", 2, 1)
    handle.remove()
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("init", ["random", "hidden", "kmeans"])
def test_ids_go_to_the_device_of_the_model(init, tmp_path, monkeypatch):
    model, seen = base("llama"), []
    monkeypatch.setattr(type(model), "device", torch.device("meta"))

    def note(module, args, kwargs):
        seen.append(kwargs["input_ids"].device.type)
        raise RuntimeError("seen")

    model.register_forward_pre_hook(note, with_kwargs=True)
    texts = {"random": None, "hidden": [IDS, IDS], "kmeans": IDS}[init]
    with pytest.raises(RuntimeError, match="seen"):
        upcycle(model, tmp_path / "moe", 2, 1, gate_init=init, gate_texts=texts)
    assert seen == ["meta"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("init", ["random", "hidden", "kmeans"])
def test_a_model_on_a_gpu_becomes_a_mixture(init, tmp_path):
    texts = {"random": None, "hidden": [IDS, IDS[:1]], "kmeans": IDS}[init]
    model = base("llama").to("cuda")
    receipt = upcycle(model, tmp_path / "moe", 2, 1, gate_init=init, gate_texts=texts)
    assert receipt.measured.max_logit_difference <= 1e-4
