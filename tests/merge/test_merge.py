"""What a merged mixture computes: exact where it can be, measured where it cannot."""

import pytest
import torch

import moeadapt
from moeadapt.errors import ConfigError
from moeadapt.export.merge_methods import MENU
from moeadapt.tuner.plain import adapter_layers
from tests.merge.dense import always, deltas, num_experts, observed
from tests.merge.kit import KINDS, batches, mixture
from tests.tiny import adapted, batch, logits, tiny

CONSTANT = {
    "uniform": {"router": "uniform"},
    "soft of a zero gate": {"router": "soft"},
    "all of k": {"router": {"name": "top_k", "k": 4}},
}


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
