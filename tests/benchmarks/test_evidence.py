"""Evidence on a real model: equal data for every arm, correct scores, a page that tells losses."""

import json

import pytest
import torch
from torch.testing import assert_close

import moeadapt
from benchmarks.common import append_csv
from benchmarks.evidence import arms, compare, cost, domains, page, rows, runs, smollm2, two_worlds
from benchmarks.evidence.arms import ARMS, Sizes
from tests.tiny import tiny

SIZES = Sizes(experts=4, rank=4, k=2)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_its_adapter_and_nothing_else(arm):
    model = arms.attach(arm, tiny("llama"), SIZES, seed=0).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1.0)
    ids = torch.randint(3, 100, (2, 7))
    for _ in range(2):  # B starts at zero, so A moves in the second step
        with arms.routed(arm, model, [0, 1], 7, SIZES):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora" in name or "router" in name for name in changed)


def test_the_oracle_gives_each_row_the_expert_of_its_domain():
    model = arms.attach("oracle_routing", tiny("llama"), SIZES, seed=0).eval()
    ids = torch.randint(3, 100, (3, 5))
    around = arms.routed("oracle_routing", model, [2, 0, 5], 5, SIZES)
    with torch.no_grad(), moeadapt.collect_routing(model) as routings, around:
        model(input_ids=ids)
    for routing in (found[0] for found in routings.values()):
        assert routing.weights.argmax(-1).view(3, 5).tolist() == [[2] * 5, [0] * 5, [1] * 5]
        assert_close(routing.weights.sum(-1), torch.ones(15))


def test_arms_of_equal_total_rank_have_as_many_parameters_but_for_the_routers():
    def parameters(arm: str) -> tuple[int, int]:
        model = arms.attach(arm, tiny("llama"), SIZES, seed=0)
        own = [(n, p.numel()) for n, p in model.named_parameters() if p.requires_grad]
        return sum(n for name, n in own if "router" not in name), sum(n for _, n in own)

    assert parameters("mixture_block")[0] == parameters("lora_total")[1]


def test_answer_losses_count_answers_only():
    model = tiny("llama").double()
    ids = torch.randint(3, 100, (2, 5))
    labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, -100, 2, 7, -100]])
    total, count = runs.answer_losses(model, {"input_ids": ids, "labels": labels})
    assert count.tolist() == [3, 2]
    logits = model(input_ids=ids).logits.float()
    for row in range(2):
        slow = sum(
            -logits[row, t].log_softmax(-1)[labels[row, t + 1]]
            for t in range(4)
            if labels[row, t + 1] != -100
        )
        assert_close(total[row], slow, check_dtype=False)


def test_batches_use_every_row_before_one_comes_again():
    rows = [{"prompt": str(n)} for n in range(5)]
    seen = [row["prompt"] for batch in runs.batches(rows, 2, 5, seed=0) for row in batch]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [str(n) for n in range(5)]
    again = [row["prompt"] for batch in runs.batches(rows, 2, 5, seed=0) for row in batch]
    assert seen == again


def test_rows_of_a_package_are_held_out_by_their_prompt(tmp_path, monkeypatch):
    folder = tmp_path / "licenses"
    folder.mkdir()
    for n in range(40):
        text = "\n\n".join(" ".join(f"w{n}.{p}.{w}" for w in range(50)) for p in range(3))
        (folder / f"{n}.json").write_text(json.dumps({"licenseText": text}))
    monkeypatch.setitem(domains.FILES, "license", folder)
    found = [
        domains.load(["license"], train=20, validation=4, test=5, longest=10_000, seed=seed)
        for seed in (0, 1)
    ]
    prompts = [[{row["prompt"] for row in part} for part in parts] for parts in found]
    assert prompts[0][0] != prompts[1][0]
    assert prompts[0][1:] == prompts[1][1:]
    for parts in prompts:
        assert [len(part) for part in parts] == [20, 4, 5]
    assert not (prompts[0][0] | prompts[1][0]) & (prompts[0][1] | prompts[0][2])
    assert not prompts[0][1] & prompts[0][2]


def test_too_few_rows_end_with_the_numbers():
    with pytest.raises(SystemExit, match="pronounce has .* were asked for"):
        domains.load(["pronounce"], train=10, validation=1, test=1, longest=3, seed=0)


def row(arm: str, *errors: float) -> dict[str, str]:
    own = {name: str(value) for name, value in rows.of_seeds("error", errors).items()}
    return {"world": "conflict", "arm": arm, **own, "seeds": str(len(errors)), "steps": "1"}


def test_the_page_says_who_loses():
    base = row("lora_kr", 1.0, 2.0, 3.0)
    assert compare.compared(base, base, "error") == "the baseline"
    # The seeds differ much, the two arms by nearly the same with each: error 0.0577.
    for sign, word in ((1, "loses"), (-1, "wins")):
        other = row("mixture_k2", 1.0 + 0.4 * sign, 2.0 + 0.5 * sign, 3.0 + 0.6 * sign)
        told = f"{word} ({0.5 * sign:+.3f} ± 0.058)"
        assert compare.compared(other, base, "error") == told
    # Student's t of two degrees of freedom is 4.303: more than four standard errors are not enough.
    close = row("mixture_k2", 1.148, 2.248, 3.348)
    assert compare.compared(close, base, "error") == "within noise (+0.248 ± 0.058)"
    assert compare.compared(row("mixture_k2", 1.0, 2.0, 3.0), base, "error") == (
        "within noise (+0.000 ± 0.000)"
    )


def test_quantiles_are_those_of_student():
    for freedom, value in enumerate(compare.STUDENT, 1):
        assert compare.student(freedom) == value
        # Half of what its density leaves inside, without the factor that makes the whole 1.
        at = torch.linspace(0, value, 200_001, dtype=torch.float64)
        inside = torch.trapezoid((1 + at**2 / freedom) ** (-(freedom + 1) / 2), at)
        n = torch.tensor(float(freedom), dtype=torch.float64)
        factor = torch.exp(torch.lgamma((n + 1) / 2) - torch.lgamma(n / 2)) / (n * torch.pi) ** 0.5
        assert_close(float(factor * inside), 0.475, atol=2e-5, rtol=0)
    assert compare.student(100) == compare.STUDENT[-1]


@pytest.mark.parametrize("seeds", [3, 5])
def test_differences_are_rarely_called_real_where_there_is_none(seeds):
    generator, wrong, turns = torch.Generator().manual_seed(0), 0, 2000
    for _ in range(turns):
        draws = torch.randn(2, seeds, generator=generator) + torch.arange(seeds)
        arms_ = [row(name, *own.tolist()) for name, own in zip("ab", draws, strict=True)]
        wrong += "noise" not in compare.compared(arms_[0], arms_[1], "error")
    assert 0.035 < wrong / turns < 0.065


def test_a_number_that_an_arm_does_not_have_is_empty():
    assert set(rows.of_forgetting([None, None]).values()) == {""}
    assert rows.of_forgetting([1.0, 2.0])["forgetting"] == 1.5
    assert compare.measured({"forgetting": "", "forgetting_se": ""}, "forgetting") == ""


def test_an_arm_that_diverged_with_a_seed_is_told_so():
    base, other = row("lora_kr", 1.0, 2.0), row("mixture_k2", 1.0, float("nan"))
    assert compare.compared(other, base, "error") == "diverged with some seed"
    assert compare.measured(other, "error") == "nan ± nan"


def test_rates_are_told_in_rising_order():
    assert rows.of_rates({0.01: [2.0, 3.0], 0.001: [4.0]}) == "0.001:4.0000@1 0.01:2.5000@2"


def test_a_file_of_another_kind_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "smollm2.csv").write_text("task_name,old\n")
    with pytest.raises(ValueError, match="has the columns .*'old'.*move the file away"):
        smollm2.main(["--results", str(tmp_path)])


def test_the_columns_are_known_before_and_are_those_of_the_committed_file():
    names = ["pronounce", "math_word", "python", "wordnet", "license"]
    every = smollm2.columns(names, smollm2.place_of("cpu"))
    for file, columns in every.items():
        assert (page.RESULTS / file).read_text().partition("\n")[0].split(",") == columns
    found = every["smollm2.csv"]
    # Those of PEFT's method comparison that a loss without an accelerator has.
    assert set(found) >= {
        "experiment_name", "model_id", "peft_type", "total_time", "train_time", "train_loss",
        "accelerator_memory_max", "file_size", "num_trainable_params", "forgetting", "task_name",
        "peft_version", "transformers_version", "torch_version", "created_at",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["steps", "seeds", "device", "batch", "test_rows"])
def test_rows_of_different_runs_are_not_mixed(tmp_path, name):
    path = tmp_path / "two_worlds.csv"
    first = {**row("lora_kr", 1.0, 1.1), "device": "one", "batch": "4", "test_rows": "6"}
    append_csv(path, [first])
    append_csv(path, [{**first, "arm": "mixture_k2"}])
    assert len(compare.read(path, ("world", "arm"))) == 2
    append_csv(path, [{**first, "arm": "mixture_k1", name: "9"}])
    with pytest.raises(SystemExit, match=f"mixes runs of different {name}"):
        compare.read(path, ("world", "arm"))


def test_a_page_without_its_baseline_says_so(tmp_path):
    place = ("device", "threads", "torch", "transformers", "peft", "commit")
    one = {**row("mixture_k2", 1.0, 1.1), "static_bound": "1", **dict.fromkeys(place, "x")}
    append_csv(tmp_path / "two_worlds.csv", [one])
    with pytest.raises(SystemExit, match="no row of lora_kr"):
        page.page(tmp_path)


def test_the_committed_two_worlds_are_what_theory_says():
    worlds = compare.read(page.RESULTS / "two_worlds.csv", ("world", "arm"))
    assert len(worlds) == 2 * len(two_worlds.ARMS)
    best = {
        kind: next(r for r in worlds if r["world"] == kind) for kind in ("conflict", "separable")
    }
    for one in worlds:
        found = compare.compared(one, best[one["world"]], "error")
        if one["world"] == "separable":
            assert "wins" not in found, "a mixture must not win where one linear map is exact"
        elif one["arm"] in two_worlds.PLAIN or one["arm"] == "uniform_router":
            bound, error = float(one["static_bound"]), float(one["error"])
            assert error >= bound - 0.005, "no static adapter gets below the bound"
        else:
            assert "wins" in found


def test_rates_were_compared_over_as_many_seeds_as_the_losing_ones_have():
    one = {
        "learning_rate": "0.002",
        "seeds": "5",
        "rates_tried": "0.001:3.5@2 0.002:3.2@5 0.005:4@3",
    }
    assert page._searched([one]) == 3
    assert page._searched([{**one, "rates_tried": "0.002:3.2@5"}]) == 5


def test_every_arm_was_measured():
    measured = compare.read(page.RESULTS / "smollm2.csv", ("experiment_name",))
    assert {one["experiment_name"] for one in measured} == set(ARMS)
    assert set(page.NAMES) == set(ARMS) | set(two_worlds.ARMS)
    after = compare.read(page.RESULTS / "smollm2_sequential.csv", ("experiment_name",))
    assert {one["experiment_name"] for one in after} == set(smollm2.SEQUENTIAL)


def test_the_committed_page_is_that_of_the_committed_results():
    assert page.PAGE.read_text() == page.page(page.RESULTS)


def test_parameters_of_experts_are_told_from_shared_ones():
    def sizes_of(arm: str) -> tuple[int, int]:
        model = arms.attach(arm, tiny("llama"), SIZES, seed=0)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return cost.of_experts(model, SIZES), sum(p.numel() for n, p in named if "router" not in n)

    own, trained = sizes_of("mixture_block")
    assert own == trained
    own, trained = sizes_of("mixture_shared_a")
    assert 0 < own < trained


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_use():
    numbers = dict.fromkeys(
        (
            "file_size", "step_seconds", "step_ratio", "step_ratio_low", "step_ratio_high",
            "peak_memory", "generated", "decode_ratio",
        ),
        0,
    )  # fmt: skip
    one = cost.Cost(parameters=110, of_experts=80, num_experts=4, **numbers)
    assert one.active_parameters(2.0) == 70
    assert one.active_parameters(4.0) == 110
    lora = cost.Cost(parameters=110, of_experts=0, num_experts=1, **numbers)
    assert lora.active_parameters(0.0) == 110


def test_experts_in_use_are_counted_over_real_tokens():
    model = arms.attach("mixture_block", tiny("llama"), SIZES, seed=0).eval()
    ids = torch.randint(3, 100, (2, 5))
    with torch.no_grad(), moeadapt.collect_routing(model) as routings:
        model(input_ids=ids)
    assert runs.experts_in_use(one for each in routings.values() for one in each) == SIZES.k
    assert runs.experts_in_use([]) == 0
