"""A merged mixture: exact where it can be, measured where it cannot, an ordinary LoRA always."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel

import moeadapt
from moeadapt.errors import ConfigError, ExportError, UnsupportedError
from moeadapt.export.merge_methods import MENU
from moeadapt.tuner.plain import adapter_layers
from tests.merge.dense import SEEDS, always, deltas, num_experts, observed
from tests.tiny import adapted, batch, logits, saved_base, tiny

KINDS = ("layer", "block", "ffn")
CONSTANT = {
    "uniform": {"router": "uniform"},
    "soft of a zero gate": {"router": "soft"},
    "all of k": {"router": {"name": "top_k", "k": 4}},
}


def mixture(kind="layer", **overrides):
    return adapted("llama", kind, **{"n_shared": 1, **overrides}).double()


def batches():
    return [batch(seed=seed) for seed in SEEDS]


def dense_of(result):
    found = {}
    for key in result.ranks:
        layer = result.model.get_base_model().get_submodule(key)
        assert layer.scaling["default"] == 1
        found[key] = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    return found


def silence(model):
    for name, parameter in model.named_parameters():
        if "moeadapt_router" in name:
            parameter.data.zero_()


@pytest.mark.parametrize(
    ("kind", "router", "method"),
    [
        ("layer", "uniform", "uniform"),
        ("block", "uniform", "usage"),
        ("layer", "soft of a zero gate", "usage"),
        ("block", "all of k", "uniform"),
    ],
)
def test_averages_of_a_constant_routing_are_exact(kind, method, router):
    model = mixture(kind, **CONSTANT[router])
    silence(model)
    result = moeadapt.merge(model, method=method, data=batches())
    assert max(result.residuals.values()) < 1e-12
    # transformers' norms compute in single precision
    assert torch.allclose(logits(result.model, batch()), logits(model, batch()), atol=1e-4)
    assert result.merged.mean == pytest.approx(result.mixture.mean, abs=1e-5)
    base = logits(tiny("llama").double(), batch())
    assert not torch.allclose(logits(model, batch()), base, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_of_one_expert_is_that_expert(kind):
    router = {"name": "top_k", "k": 1, "normalize": "renorm", "freeze": True}
    model = mixture(kind, num_experts=1, router=router)
    result = moeadapt.merge(model, method="single", expert=0, data=batches())
    assert max(result.residuals.values()) < 1e-12
    assert torch.allclose(logits(result.model, batch()), logits(model, batch()), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_are_those_of_full_matrices(kind):
    model = mixture(kind)
    seen = observed(model, batches())
    for method in (*MENU, "svd"):
        result = moeadapt.merge(model, method=method, data=batches())
        merged = dense_of(result)
        assert result.residuals.keys() == seen.keys()
        for key, (x, d, _) in seen.items():
            expected = (d - x @ merged[key].T).square().sum() / d.square().sum()
            assert result.residuals[key] == pytest.approx(float(expected), rel=1e-4), (method, key)


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_is_the_ridge_regression_of_the_mixture(kind):
    model = mixture(kind)
    layers = adapter_layers(model)
    merged = dense_of(
        moeadapt.merge(model, method={"name": "least_squares", "ridge": 1e-2}, data=batches())
    )
    for key, (x, d, _) in observed(model, batches()).items():
        routed = d - x @ always(layers[key]).T
        moment = x.T @ x / len(x)
        moment = moment + 1e-2 * moment.diagonal().mean() * torch.eye(len(moment)).double()
        expected = torch.linalg.solve(moment, x.T @ routed / len(x)).T + always(layers[key])
        torch.testing.assert_close(merged[key], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_is_never_behind_on_its_own_data(kind):
    result = moeadapt.merge(
        mixture(kind), data=batches(), method={"name": "least_squares", "ridge": 1e-8}
    )
    for key, found in result.residuals.items():
        for name in ("usage", "uniform", "single"):
            assert found <= result.menu[name][key] + 1e-9
    assert result.mean_residual < 0.9 * min(
        sum(result.menu[name].values()) / len(result.residuals) for name in ("usage", "uniform")
    )


def test_a_smaller_rank_is_the_best_of_that_rank_on_the_data():
    model = mixture(n_shared=0)
    whole = moeadapt.merge(model, data=batches(), method={"name": "least_squares", "ridge": 1e-8})
    small = moeadapt.merge(
        model, data=batches(), method={"name": "least_squares", "ridge": 1e-8}, rank=3
    )
    assert set(small.ranks.values()) == {3}
    for key, (x, d, _) in observed(model, batches()).items():
        full = dense_of(whole)[key]
        u, _, _ = torch.linalg.svd(full @ x.T, full_matrices=False)
        best = u[:, :3] @ u[:, :3].T @ full
        expected = (d - x @ best.T).square().sum() / d.square().sum()
        assert small.residuals[key] == pytest.approx(float(expected), rel=1e-4)
        assert small.residuals[key] > whole.residuals[key]


@pytest.mark.parametrize("experts", ["lora", "shared_a", "shared_b", "rank1", "heterogeneous"])
def test_averages_of_every_linear_expert_type_are_those_of_its_matrices(experts):
    spec = (
        {"name": "heterogeneous", "ranks": [1, 4, 2, 3]} if experts == "heterogeneous" else experts
    )
    router = {"name": "top_k", "k": 2, "init_std": 0.5}
    model = mixture("layer", experts=spec, router=router)
    layers = adapter_layers(model)
    usage = {key: weights.mean(0) for key, (_, _, weights) in observed(model, batches()).items()}
    for method in ("usage", "uniform", "sum", "single"):
        expert = {"expert": 1} if method == "single" else {}
        merged = dense_of(moeadapt.merge(model, method=method, data=batches(), **expert))
        for key, layer in layers.items():
            own, count = deltas(layer), num_experts(layer)
            weights = {
                "usage": usage[key],
                "uniform": torch.full((count,), 1 / count),
                "sum": torch.ones(count),
                "single": torch.eye(count)[1],
            }[method]
            expected = sum(float(w) * delta for w, delta in zip(weights, own, strict=False))
            torch.testing.assert_close(merged[key], expected + always(layer), rtol=1e-4, atol=1e-5)


def test_shared_matrices_make_the_merged_rank_small():
    shared = moeadapt.merge(mixture(experts="shared_a", n_shared=0), method="uniform")
    assert set(shared.ranks.values()) == {4}
    own = moeadapt.merge(mixture(n_shared=0), method="uniform")
    assert set(own.ranks.values()) == {16}


def test_losses_are_reported_per_domain():
    data = batches()
    names = [("even", "odd")[i % 2] for i in range(3 * len(data))]
    result = moeadapt.merge(
        mixture(), data=data, domains=names, held_out=data[:2], held_out_domains=names[:6]
    )
    assert result.held_out
    table = result.to_dict()["losses"]
    assert set(table) == {"mixture", "merged", "base"}
    for name, model in (
        ("mixture", mixture()),
        ("merged", result.model),
        ("base", tiny("llama").double()),
    ):
        rows = {"even": [], "odd": []}
        for inputs in data[:2]:
            logp = logits(model, inputs).log_softmax(-1)
            for row in range(3):
                ids, mask = inputs["input_ids"][row], inputs["attention_mask"][row]
                told = [-logp[row, t, ids[t + 1]].item() for t in range(8) if mask[t + 1]]
                rows[
                    ("even", "odd")[row % 2] if inputs is data[0] else ("odd", "even")[row % 2]
                ] += told
        every = rows["even"] + rows["odd"]
        assert table[name]["mean"] == pytest.approx(sum(every) / len(every), rel=1e-5)
        for domain, told in rows.items():
            found = table[name]["by_domain"][domain]
            assert found == pytest.approx(sum(told) / len(told), rel=1e-5)


def test_merging_leaves_the_mixture_alone():
    model = mixture("ffn").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    result = moeadapt.merge(model, data=batches())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    mine = {p.data_ptr() for p in model.parameters()}
    copied = [n for n, p in result.model.named_parameters() if p.data_ptr() not in mine]
    assert copied
    assert all("lora_" in name for name in copied)


def test_a_group_of_layers_at_a_time_measures_the_same():
    whole = moeadapt.merge(mixture(), data=batches())
    parts = moeadapt.merge(mixture(), data=batches(), memory=1.0)
    assert whole.residuals == parts.residuals


PLAIN = """
import sys
sys.modules["moeadapt"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, inputs, out = sys.argv[1:]
base = AutoModelForCausalLM.from_pretrained(base).double()
model = PeftModel.from_pretrained(base, adapter).eval()
assert type(model.peft_config["default"]).__name__ == "LoraConfig"
with torch.no_grad():
    torch.save(model(**torch.load(inputs)).logits, out)
print(sorted(name for name in sys.modules if name.startswith("moeadapt")))
"""


@pytest.mark.parametrize("kind", ["layer", "ffn"])
def test_the_adapter_loads_where_moeadapt_is_not_installed(tmp_path, kind):
    base = saved_base("llama", tmp_path)
    model = mixture(kind, modules_to_save=["lm_head"], rank_pattern={"q_proj": 2})
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(0.5)
    moeadapt.merge(model, tmp_path / "merged", method="uniform")
    expected = tiny("llama").double()
    with torch.no_grad():
        expected.lm_head.weight.mul_(0.5)
        for key, layer in adapter_layers(model).items():
            own, count = deltas(layer), num_experts(layer)
            routed = layer.moe_plans["default"].placement != "unrouted"
            mean = sum(own[:count]) / count if routed else 0
            expected.get_submodule(key).weight.add_(mean + always(layer))
    torch.save(batch(), tmp_path / "inputs.pt")
    args = [base, tmp_path / "merged", tmp_path / "inputs.pt", tmp_path / "logits.pt"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, *map(str, args)],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().endswith("['moeadapt']"), done.stderr[-2000:]
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt"), logits(expected, batch()), rtol=1e-4, atol=1e-4
    )
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["modules_to_save"] == ["lm_head"]
    assert set(config["target_modules"]) <= {
        f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")
    }


def test_a_written_adapter_answers_as_the_result_does(tmp_path):
    model = adapted("gpt2", "ffn", n_shared=1)
    result = moeadapt.merge(model, tmp_path / "merged", data=batches())
    loaded = PeftModel.from_pretrained(tiny("gpt2"), str(tmp_path / "merged")).eval()
    assert torch.equal(logits(loaded, batch()), logits(result.model, batch()))


@pytest.mark.parametrize("experts", ["ia3", "random_a"])
def test_experts_that_are_no_matrices_are_refused(tmp_path, experts):
    model = adapted("llama", "layer", experts=experts, init_lora_weights=True)
    with pytest.raises(UnsupportedError, match=f"'{experts}'.*moeadapt.distill"):
        moeadapt.merge(model, tmp_path / "out", method="uniform")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "least_squares"}, "give data="),
        ({"method": "ties"}, "unknown merge method 'ties'"),
        ({"method": "single", "expert": 4}, "has the experts 0..3"),
        ({"method": "single"}, "needs expert="),
        ({"method": "usage", "expert": 1}, "belongs to method='single'"),
        ({"method": "uniform", "rank": 0}, "at least 1"),
        ({"method": "uniform", "adapter": "other"}, "no moeadapt adapter 'other'"),
        ({"method": "uniform", "data": []}, "empty"),
        ({"method": "uniform", "data": ["a text"]}, "tokenizer="),
        ({"method": "svd", "rank": 2}, "less than the 4 experts"),
    ],
)
def test_a_wrong_request_writes_nothing(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        moeadapt.merge(mixture(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="not an empty folder"):
        moeadapt.merge(mixture(), tmp_path / "out", method="uniform")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def broken(self, folder, **options):
        (__import__("pathlib").Path(folder) / "adapter_config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(PeftModel, "save_pretrained", broken)
    with pytest.raises(OSError, match="disk full"):
        moeadapt.merge(mixture(), tmp_path / "out", method="uniform")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["top_k", "svd"])
def test_gathering_has_the_rank_of_one_expert(method):
    model = mixture(n_shared=0, r=8)
    result = moeadapt.densify(model, method=method)
    assert set(result.ranks.values()) == {8}
    for key, merged in dense_of(result).items():
        layer = adapter_layers(model)[key]
        bank = layer.moe_banks["default"]
        expected = 0
        for e, delta in enumerate(deltas(layer)):
            if method == "svd":
                u, s, vh = torch.linalg.svd(delta)
                expected = expected + (u[:, :2] * s[:2]) @ vh[:2]
                continue
            a = bank.factor("lora_A").weight[8 * e : 8 * e + 8].detach().double()
            b = bank.factor("lora_B").weight[:, 8 * e : 8 * e + 8].detach().double()
            terms = [bank.size.scale * torch.outer(b[:, i], a[i]) for i in range(8)]
            expected = expected + sum(sorted(terms, key=lambda term: -float(term.norm()))[:2])
        torch.testing.assert_close(merged, expected.detach(), rtol=1e-4, atol=1e-5)


def test_densify_names_its_methods():
    with pytest.raises(ConfigError, match="one of .*'svd'"):
        moeadapt.densify(mixture(), method="usage")


def test_the_base_less_its_segments_is_merged_exactly():
    model = adapted("llama", "layer", router="uniform", init_lora_weights="svd_segments").double()
    result = moeadapt.merge(model, method="uniform", data=batches())
    assert torch.allclose(logits(result.model, batch()), logits(model, batch()), atol=1e-4)
