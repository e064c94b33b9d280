"""Tasks of lm-eval on an adapter: a task of our own, since the hubs are not asked."""

import importlib.util
import json
import warnings

import pytest
import torch

from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.evaluation import run_tasks
from tests.evaluation.kit import TOKENIZER, words

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)

TASK = """
task: toy_count
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.5
"""

QUESTIONS = [
    {"question": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{3 * i + 7}"], "answer": i % 2}
    for i in range(10)
]


@pytest.fixture(autouse=True)
def _others_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "toy.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    return folder


@torch.no_grad()
def right(model, row):
    """Whether the model prefers the right choice, which is one token."""
    logits = model(input_ids=torch.tensor([words(row["question"])])).logits[0, -1]
    one, other = (logits[words(choice)[0]] for choice in row["choices"])
    return int(other > one) == row["answer"]


@needs_harness
def test_a_task_of_our_own_gives_the_share_of_right_answers(model, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    options = {"include_path": str(folder), "max_length": 32, "batch_size": 4}
    found = run_tasks(model, TOKENIZER, ["toy_count"], **options)
    answers = [right(model, row) for row in QUESTIONS]
    assert 0 < sum(answers) < 10
    task = found.tasks["toy_count"]
    assert task.values == {"acc,none": pytest.approx(sum(answers) / 10)}
    assert 0 < task.errors["acc,none"] < 0.5
    assert (task.rows, task.version) == (10, "1.5")
    with model.disable_adapter():
        base = [right(model, row) for row in QUESTIONS]
        plain = run_tasks(model, TOKENIZER, ["toy_count"], limit=6, **options)
    assert plain.tasks["toy_count"].values == {"acc,none": pytest.approx(sum(base[:6]) / 6)}
    assert (plain.tasks["toy_count"].rows, plain.limit) == (6, 6)
    assert json.loads(json.dumps(plain.to_json()))["harness"]
    with pytest.raises(ConfigError, match="no task 'toy_cuont'; did you mean 'toy_count'?"):
        run_tasks(model, TOKENIZER, ["toy_cuont"], **options)


REFUSED = {
    "none": ([], {}, "give a list of one task name"),
    "a word": ("hellaswag", {}, "give a list of one task name"),
    "limit": (["hellaswag"], {"limit": 0}, "limit=0 must be at least 1"),
    "shots": (["hellaswag"], {"num_fewshot": -1}, "num_fewshot=-1 must be at least 0"),
}


@needs_harness
@pytest.mark.parametrize(("tasks", "options", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_wrong_arguments_are_refused_before_anything_is_loaded(tasks, options, message):
    with pytest.raises(ConfigError, match=message):
        run_tasks(None, None, tasks, **options)


def test_without_lm_eval_the_way_to_get_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'moeadapt\[eval\]'"):
        run_tasks(None, None, ["hellaswag"])
