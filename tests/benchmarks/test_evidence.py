"""Evidence on a real model: equal data for every arm, correct scores, a page that tells losses."""

import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import moeadapt
from benchmarks.common import append_csv
from benchmarks.evidence import arms, cost, domains, page, runs, smollm2
from benchmarks.evidence.arms import ARMS, Sizes
from benchmarks.evidence.sweep import choose_rate, climb
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
        domains.load(["license"], train=20, test=5, longest=10_000, seed=seed) for seed in (0, 1)
    ]
    prompts = [[{row["prompt"] for row in part} for part in parts] for parts in found]
    assert prompts[0][0] != prompts[1][0]
    assert prompts[0][1:] == prompts[1][1:]
    for parts in prompts:
        assert [len(part) for part in parts] == [20, 5, 5]
    assert not (prompts[0][0] | prompts[1][0]) & (prompts[0][1] | prompts[0][2])
    assert not prompts[0][1] & prompts[0][2]


def test_too_few_rows_end_with_the_numbers():
    with pytest.raises(SystemExit, match="pronounce has .* were asked for"):
        domains.load(["pronounce"], train=10, test=1, longest=3, seed=0)


def row(arm: str, value: float, error: float) -> dict[str, str]:
    own = {"error": str(value), "error_se": str(error), "seeds": "3", "steps": "1"}
    return {"world": "conflict", "arm": arm, **own}


def test_the_page_says_who_loses():
    base = row("lora_kr", 1.0, 0.1)
    assert page.compared(base, base, "error") == "the baseline"
    assert page.compared(row("mixture_k2", 1.5, 0.1), base, "error") == "loses (+0.500)"
    assert page.compared(row("mixture_k2", 0.5, 0.1), base, "error") == "wins (-0.500)"
    assert page.compared(row("mixture_k2", 1.2, 0.1), base, "error").startswith("within noise")
    # More than two standard errors, but of three seeds each.
    assert page.compared(row("mixture_k2", 1.35, 0.1), base, "error").startswith("within noise")


def test_differences_in_pairs_are_judged_by_their_own_error():
    base = {**row("lora_total", 1.0, 0.3), "gap": "0.0", "gap_se": "0.0"}
    worse = {**base, "gap": "0.5", "gap_se": "0.1"}
    assert page.paired(base, base) == "the baseline"
    # Student's t of two degrees of freedom is 4.303.
    assert page.paired(worse, base) == "loses (+0.500 ± 0.100)"
    assert page.paired({**worse, "gap": "-0.5"}, base) == "wins (-0.500 ± 0.100)"
    assert page.paired({**worse, "gap": "0.42"}, base) == "within noise (+0.420 ± 0.100)"


def test_differences_of_three_seeds_are_rarely_called_real_where_there_is_none():
    generator, wrong, turns = torch.Generator().manual_seed(0), 0, 2000
    for _ in range(turns):
        draws = torch.randn(2, 3, generator=generator)
        rows = [
            row(n, d.mean().item(), d.std().item() / 3**0.5)
            for n, d in zip("ab", draws, strict=True)
        ]
        wrong += "noise" not in page.compared(rows[0], rows[1], "error")
    assert wrong / turns < 0.05


def test_a_file_of_another_kind_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "smollm2.csv").write_text("task_name,old\n")
    with pytest.raises(ValueError, match="has the columns .*'old'.*move the file away"):
        smollm2.main(["--results", str(tmp_path)])


def test_the_columns_are_known_before(tmp_path):
    run = smollm2.runs.Run(
        arm="mixture_block", rate=0.1, seed=0, validation=1.0, curve=[], model=None,
        losses={"python": 2.0},
    )  # fmt: skip
    numbers = dict.fromkeys((field.name for field in fields(cost.Cost)), 1)
    row = smollm2.row_of([run, run], [run, run], {0.1: [1.0]}, smollm2.SMALL, cost.Cost(**numbers))
    assert [*row, "device"] == smollm2.columns(["python"], {"device": "cpu"})


def test_rows_of_different_runs_are_not_mixed(tmp_path):
    path = tmp_path / "two_worlds.csv"
    append_csv(path, [row("lora_kr", 1.0, 0.1)])
    append_csv(path, [{**row("mixture_k2", 1.0, 0.1), "steps": "2"}])
    with pytest.raises(SystemExit, match="different steps and seeds"):
        page.read(path, ("world", "arm"))


def test_a_page_without_its_baseline_says_so(tmp_path):
    append_csv(
        tmp_path / "two_worlds.csv",
        [
            {
                **row("mixture_k2", 1.0, 0.1),
                "static_bound": "1",
                **dict.fromkeys(
                    ("device", "threads", "torch", "transformers", "peft", "commit"), "x"
                ),
            }
        ],
    )
    with pytest.raises(SystemExit, match="no row of lora_kr"):
        page.page(tmp_path)


def test_the_committed_page_is_that_of_the_committed_results():
    assert page.PAGE.read_text() == page.page(page.RESULTS)


@pytest.mark.parametrize("best", [0, 1, 2, 3, 4, 5])
def test_the_rate_is_searched_until_both_sides_are_worse(best):
    tried = []

    def run(rate: float) -> SimpleNamespace:
        tried.append(rate)
        # The largest rate diverges.
        return SimpleNamespace(
            rate=rate, validation=abs(rate - best) if rate < 5 or best == 5 else torch.nan
        )

    found = climb(run, range(6))
    lowest = min((one for one in found.values()), key=lambda one: (one.validation, one.rate))
    assert lowest.rate == best
    assert set(found) == set(tried)
    assert len(tried) == len(set(tried))
    assert {max(best - 1, 0), min(best + 1, 5)} <= set(tried)


def test_a_rate_that_one_seed_alone_likes_is_not_chosen():
    def run(rate: float, seed: int) -> SimpleNamespace:
        # The larger rate is the better one for the first seed; another one diverges.
        losses = {1.0: (2.0, 2.0, 2.0), 2.0: (1.9, 9.0, 2.0), 3.0: (2.5, 2.5, 2.5)}
        return SimpleNamespace(rate=rate, seed=seed, validation=losses[rate][seed])

    found, tried = choose_rate(run, (1.0, 2.0, 3.0), 3)
    assert [(one.rate, one.seed) for one in found] == [(1.0, 0), (1.0, 1), (1.0, 2)]
    assert tried == {1.0: [2.0] * 3, 2.0: [1.9, 9.0, 2.0], 3.0: [2.5]}


def test_a_run_that_diverges_never_wins():
    def run(rate: float, seed: int) -> SimpleNamespace:
        return SimpleNamespace(validation=torch.nan if rate > 1 or seed == 2 else 5.0, rate=rate)

    found, _ = choose_rate(run, (1.0, 2.0), 2)
    assert [one.rate for one in found] == [1.0, 1.0]


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
        ("file_size", "step_seconds", "step_ratio", "peak_memory", "generated", "decode_ratio"), 0
    )
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
