"""Rows for a trainer, and the refusals of data that does not fit."""

import json

import pytest
from datasets import Dataset

from moeadapt.errors import AssetError, ConfigError
from moeadapt.training import data
from moeadapt.training.data import load_data
from moeadapt.training.recipe import RunArguments
from moeadapt.training.rewards import exact_match, get_reward, prefix_overlap


def run(name: str, **fields) -> RunArguments:
    return RunArguments(model_name_or_path="base", dataset_name=name, **fields)


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("completion", {"prompt", "completion"}),
        ("preference", {"prompt", "chosen", "rejected"}),
        ("labelled", {"prompt", "completion", "label"}),
        ("prompt", {"prompt", "answer"}),
    ],
)
def test_embedded_tasks_have_the_columns_of_every_objective(kind, columns):
    train, test = load_data(run("embedded:pronounce", dataset_size=6), kind)
    assert set(train.column_names) == set(test.column_names) == columns
    assert len(train) == 6


def test_the_bad_answer_is_that_of_another_row():
    train, _ = load_data(run("embedded:pronounce", dataset_size=6), "preference")
    assert all(row["chosen"] != row["rejected"] for row in train)


def test_a_file_of_rows_is_read_and_cut_to_size(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    train, test = load_data(run(str(path), dataset_size=3), "completion")
    assert train.to_list() == rows[:3]
    assert test is None


def test_columns_that_do_not_fit_are_refused_with_what_is_needed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "a", "reply": "b"}))
    with pytest.raises(ConfigError, match=r"\['question', 'reply'\].*chosen\+rejected"):
        load_data(run(str(path)), "preference")
    path.write_text(json.dumps({"prompt": "a"}))
    with pytest.raises(ConfigError, match="also needs 'answer'"):
        load_data(run(str(path)), "prompt")


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("x")
    with pytest.raises(ConfigError, match=r"cannot read '\.txt' files"):
        load_data(run(str(path)), "completion")


def test_a_broken_file_names_the_dataset(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"\n{{{')
    with pytest.raises(AssetError, match="rows.jsonl"):
        load_data(run(str(path)), "completion")


def test_a_hub_id_may_have_a_dot(monkeypatch):
    asked = []

    def fake(name, config):
        asked.append(name)
        return {"train": Dataset.from_list([{"text": "a"}])}

    monkeypatch.setattr(data, "load_dataset", fake)
    train, test = load_data(run("someone/Set-2.5"), "completion")
    assert asked == ["someone/Set-2.5"]
    assert train["text"][:] == ["a"]
    assert test is None


def test_a_missing_split_lists_the_splits(monkeypatch):
    rows = {"training": Dataset.from_list([{"text": "a"}])}
    monkeypatch.setattr(data, "load_dataset", lambda *_: rows)
    with pytest.raises(ConfigError, match=r"no split 'train'; one of \['training'\]"):
        load_data(run("someone/set"), "completion")


def test_rewards_score_what_they_say():
    said = ["a b c", [{"role": "assistant", "content": "a x"}], ""]
    wanted = ["a b c", "a b", "a"]
    assert exact_match(completions=said, answer=wanted) == [1.0, 0.0, 0.0]
    assert prefix_overlap(completions=said, answer=wanted) == [1.0, 0.5, 0.0]


def test_an_unknown_reward_is_refused():
    with pytest.raises(ConfigError, match="unknown reward 'exact'.*did you mean 'exact_match'"):
        get_reward("exact")
