"""`benchmarks/speed`: it refuses to time what computes something else, and its peers are right."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import append_csv
from benchmarks.speed import ffn, ffn_forms, forms, model, run
from benchmarks.speed.case import Form, LinearCase, Sizes
from benchmarks.speed.gate import check_linear
from benchmarks.speed.goals import GOALS, Goal, judged
from benchmarks.speed.measure import Measured, in_turns, peak_bytes, saved_bytes
from benchmarks.speed.presets import FULL, QUICK

ROOT = Path(__file__).parents[2]
SHAPES = [(4, 8, 2), (5, 8, 1), (4, 4, 4)]
LINEARS = {**forms.OURS, **forms.PEERS, **forms.PLAIN}


def ffn_cell(k: int) -> tuple[Sizes, int]:
    return Sizes(16, 32, 48, 4, 8, k), 1


@pytest.mark.parametrize("name", LINEARS)
def test_every_form_of_a_linear_equals_the_definition_with_gradients(name):
    assert check_linear({name: LINEARS[name]}, SHAPES) == []


def test_the_definition_is_compared_in_float64_with_every_gradient(monkeypatch):
    compared = []

    def record(where, found, true, dtype):
        compared.append((where.rpartition(" ")[2], sorted(found)))
        return []

    monkeypatch.setattr("benchmarks.speed.gate.differences", record)
    check_linear({"loop_dense": forms.loop_dense}, [(4, 8, 2)])
    assert ("float64", ["A", "B", "output", "slots", "x"]) in compared


@pytest.mark.parametrize("k", [2, 4])
def test_every_form_of_an_ffn_equals_the_definition_with_gradients(k):
    assert ffn.check([ffn_cell(k)]) == []


def test_our_adapters_in_a_model_compute_as_the_loops_do():
    assert model.check({(4, 4, 2)}) == []


def detached(make):
    """Return `make` with a form that gives its last factor half the gradient."""

    def broken(case) -> Form:
        form = make(case)
        right, (b,) = form.run, form.inputs["B"][-1:]

        def run() -> torch.Tensor:
            with torch.no_grad():
                half = torch.zeros_like(b)
            y = right()
            return y + (half * (b - b.detach())).sum() - 0.5 * ((b - b.detach()) * b.detach()).sum()

        return Form(**{**form.__dict__, "run": run})

    return broken


def doubled(make):
    def broken(case) -> Form:
        form = make(case)
        return Form(**{**form.__dict__, "run": lambda: 2 * form.run()})

    return broken


@pytest.mark.parametrize("wrong", [doubled, detached], ids=["values", "gradients"])
def test_a_broken_form_is_named_and_nothing_is_timed(wrong, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(forms.PEERS, "loop_dense", wrong(forms.loop_dense))
    monkeypatch.setattr("benchmarks.speed.linear.in_turns", None)
    file = tmp_path / "rows.csv"
    assert run.main(["--toy", "--only", "linear", "--csv", str(file)]) == 1
    said = capsys.readouterr().out
    assert "loop_dense N=4 r=8 k=2 float64" in said
    assert "xlora" not in said
    assert "lora_Nr" not in said
    assert not file.exists()


def test_a_broken_ffn_form_is_named(monkeypatch):
    monkeypatch.setitem(ffn_forms.FORMS, "published", doubled(ffn_forms.published))
    wrong = ffn.check([ffn_cell(2)])
    assert wrong
    assert all("published" in line for line in wrong)


def test_a_toy_run_prints_the_tables_and_writes_a_row_per_form(tmp_path):
    file = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "benchmarks.speed", "--toy", "--csv", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for part in ("linear, forward", "ffn, forward+backward", "llama, step", "llama, decode"):
        assert part in done.stdout
    with file.open(newline="") as rows:
        table = list(csv.DictReader(rows))
    decoded = {row["form"] for row in table if row["work"] == "decode"}
    assert {"base", "lora_r", "lora_Nr", "ours_layer", "ours_ffn", "loop_layer"} <= decoded
    (total,) = {row["ratio"] for row in table if row["form"] == "lora_Nr"}
    assert float(total) == 1.0
    assert {row["threads"] for row in table} == {"1"}
    assert all(row["commit"] and row["torch"] and row["peft"] for row in table)


def test_rows_of_other_columns_are_refused(tmp_path):
    file = tmp_path / "rows.csv"
    append_csv(file, [{"a": 1, "b": 2}])
    append_csv(file, [{"a": 3, "b": 4}])
    with pytest.raises(ValueError, match="other name|name another"):
        append_csv(file, [{"a": 3, "c": 4}])
    assert file.read_text().split() == ["a,b", "1,2", "3,4"]


def test_turns_alternate_and_ratios_are_taken_within_a_turn():
    order = []
    in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert "".join(order).count("ab") == 3  # one turn is not counted
    seconds = {"slow": [2.0, 40.0, 6.0], "fast": [1.0, 10.0, 2.0]}
    measured = Measured("linear", "step", {}, seconds, baseline="fast")
    assert measured.ratio("slow", "fast") == (3.0, 2.5, 3.5)


def test_memory_is_what_autograd_keeps_and_what_is_alive():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: (x @ w).tanh(), [x, w]) == 8 * 4 * 4
    assert saved_bytes(lambda: (x @ w).tanh(), [x]) == (8 + 4) * 4 * 4
    with torch.no_grad():
        assert peak_bytes(lambda: ((x + 1) + 1) + 1) == 2 * 8 * 4 * 4


def test_a_goal_is_met_on_its_side_of_the_bound():
    seconds = {"ours": [1.0], "loop": [2.4]}
    measured = Measured("linear", "step", {"k": 2}, seconds, baseline="ours", saved={"ours": 2.0})
    assert not Goal("linear", "step", "loop", "ours", ">=", 2.5, {"k": 2}).met(2.4)
    assert Goal("linear", "step", "loop", "ours", ">=", 2.5, {"k": 2}).value(measured) == 2.4
    assert Goal("linear", "step", "ours", "", "<=", 2.1).value(measured) == 2.0
    assert Goal("linear", "step", "ours", "", "<=", 2.1).met(2.0)
    assert not Goal("linear", "step", "loop", "ours", ">=", 2.5, {"k": 4}).fits(measured)
    assert not Goal("linear", "step", "loop", "lora_Nr", ">=", 2.5).fits(measured)


def test_every_goal_is_about_sizes_of_the_full_run():
    cells = [("linear", sizes.named()) for sizes, _ in FULL.linear]
    cells += [("ffn", sizes.named()) for sizes, _ in FULL.ffn]
    cells += [("llama", sizes.named()) for _, sizes, _ in FULL.llama]
    for goal in GOALS:
        fitting = [s for name, s in cells if name == goal.benchmark]
        assert any(goal.sizes.items() <= sizes.items() for sizes in fitting), goal.text
    assert {sizes.dtype for sizes, _ in QUICK.linear} == {torch.bfloat16}
    assert all(measured is None for _, measured, _, _ in judged([]))


def test_a_case_is_the_same_in_every_dtype():
    case = LinearCase.random(Sizes(5, 8, 6, 3, 4, 2, torch.bfloat16))
    wide = case.to(torch.float64)
    assert torch.equal(wide.a.to(torch.bfloat16), case.a)
    assert torch.equal(wide.choice, case.choice)
