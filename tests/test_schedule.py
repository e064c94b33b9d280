"""Schedules are pure functions of the optimizer step, checked when the config is made."""

import copy
import json
import math
import warnings
from typing import Any

import pytest
import torch

import moeadapt
from moeadapt import ROUTERS, MoeLoraConfig
from moeadapt.errors import ConfigError, TrainingError
from moeadapt.routers import route
from moeadapt.routers.linear import LinearRouterConfig
from moeadapt.routers.scheduled import RouterSettings
from moeadapt.routing import TokenContext
from moeadapt.schedule import parse_schedule
from moeadapt.tuner.inspect import heads_of
from tests.tiny import adapted, batch, gradients, logits, moe_config

TOP_2 = ROUTERS.parse({"name": "top_k", "k": 2})


def temperatures(shape: str, steps: range) -> list[float]:
    """Return the temperatures of a ramp from 8 to 2 in 4 steps."""
    spec = {"temperature": {"start": 8.0, "end": 2.0, "steps": 4, "shape": shape}}
    schedule = parse_schedule(spec)
    return [schedule.at(step, TOP_2).temperature for step in steps]


def test_a_linear_ramp_moves_by_equal_differences() -> None:
    assert temperatures("linear", range(6)) == pytest.approx([8.0, 6.5, 5.0, 3.5, 2.0, 2.0])


def test_an_exponential_ramp_moves_by_equal_factors() -> None:
    half = math.sqrt(2)
    assert temperatures("exponential", range(6)) == pytest.approx(
        [8.0, 8.0 / half, 4.0, 4.0 / half, 2.0, 2.0]
    )


def test_a_cosine_ramp_is_half_a_wave() -> None:
    side = 3 / math.sqrt(2)
    assert temperatures("cosine", range(6)) == pytest.approx(
        [8.0, 5 + side, 5.0, 5 - side, 2.0, 2.0]
    )


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential"])
def test_a_ramp_starts_and_ends_exactly_and_stays_finite(shape: str) -> None:
    ramp = {"start": 1e300, "end": 1e-300, "steps": 3, "shape": shape}
    schedule = parse_schedule({"temperature": ramp})
    found = [schedule.at(step, TOP_2).temperature for step in range(5)]
    assert found[0] == pytest.approx(1e300)
    assert found[3:] == [1e-300, 1e-300]
    assert all(math.isfinite(value) and value > 0 for value in found)


@pytest.mark.parametrize(
    ("start", "end", "steps", "expected"),
    [
        (4, 1, 6, [4, 4, 3, 3, 2, 2, 1, 1]),
        (1, 4, 6, [1, 1, 2, 2, 3, 3, 4, 4]),
        (4, 2, 3, [4, 4, 3, 2, 2]),
        (3, 3, 2, [3, 3, 3]),
    ],
)
def test_k_goes_through_every_number_in_order(
    start: int, end: int, steps: int, expected: list[int]
) -> None:
    schedule = parse_schedule({"k": {"start": start, "end": end, "steps": steps}})
    assert [schedule.at(step, TOP_2).k for step in range(len(expected))] == expected


def test_without_an_end_a_ramp_ends_in_the_routers_own_value() -> None:
    router = ROUTERS.parse({"name": "top_k", "k": 3, "temperature": 0.5})
    spec = {"k": {"start": 4, "steps": 2}, "temperature": {"start": 2.0, "steps": 2}}
    schedule = parse_schedule(spec)
    assert (schedule.at(0, router).k, schedule.at(2, router).k) == (4, 3)
    assert schedule.at(1, router).temperature == pytest.approx(1.25)
    assert schedule.inference(router).temperature == 0.5
    assert schedule.inference(router).k is None


def test_freezing_and_warm_up_follow_each_other() -> None:
    schedule = parse_schedule(
        {"freeze_router_steps": 2, "router_warmup_steps": 4, "freeze_router_after": 7}
    )
    values = [schedule.at(step, TOP_2) for step in range(9)]
    assert [v.frozen for v in values] == [True, True, *[False] * 5, True, True]
    assert [v.rate for v in values[2:7]] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_outside_training_there_is_no_dropout_and_the_last_values_hold() -> None:
    schedule = parse_schedule(
        {
            "k": {"start": 4, "end": 2, "steps": 9},
            "k_inference": 3,
            "temperature": {"start": 4.0, "end": 0.5, "steps": 9},
            "expert_dropout": 0.5,
            "gate_dropout": 0.25,
        }
    )
    end = schedule.inference(TOP_2)
    assert (end.k, end.temperature, end.expert_dropout, end.gate_dropout) == (3, 0.5, 0.0, 0.0)
    start = schedule.at(0, TOP_2)
    assert (start.k, start.expert_dropout, start.gate_dropout) == (4, 0.5, 0.25)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"temperture": {"start": 1.0, "steps": 2}}, "did you mean 'temperature'"),
        ({"temperature": {"strat": 1.0, "steps": 2}}, r"schedule.temperature: .*'start'"),
        ({"temperature": {"start": 0.0, "steps": 2}}, "start=0.0"),
        ({"temperature": {"start": 1.0, "steps": 0}}, "steps=0"),
        ({"k": {"start": 5, "end": 2, "steps": 2}}, "k.start=5 is larger than num_experts=4"),
        ({"k": {"start": 2, "end": 5, "steps": 2}}, "k.end=5 .* choose k.end in 1..4"),
        ({"k": {"start": 2.5, "steps": 2}}, "start=2.5"),
        ({"k_inference": 5}, "k_inference=5"),
        ({"expert_dropout": 1.0}, "expert_dropout=1.0"),
        ({"gate_dropout": -0.1}, "gate_dropout=-0.1"),
        ({"freeze_router_steps": -1}, "freeze_router_steps=-1"),
        ({"freeze_router_steps": 3, "freeze_router_after": 3}, "never be trained"),
        ([1], "schedule=.1.: .*dictionary"),
    ],
)
def test_a_wrong_schedule_is_refused_when_the_config_is_made(schedule: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moe_config("layer", schedule=schedule)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_exactly_the_routers_that_can_change_k_accept_a_k(name: str) -> None:
    config = ROUTERS.parse(name)
    built = config.build(8, 8)
    has_k = getattr(built, "k", None) is not None
    # Switch is by definition top-1.
    assert config.k_can_change == has_k or config == ROUTERS.parse("switch")
    has_k = config.k_can_change
    schedule = parse_schedule({"k_inference": 1})
    if has_k:
        schedule.fit(config, 8)
    else:
        with pytest.raises(ConfigError, match=f"router '{name}' .*'top_k'"):
            schedule.fit(config, 8)


@pytest.mark.parametrize("field", ["temperature", "gate_dropout"])
def test_a_router_without_a_gate_refuses_temperature_and_gate_dropout(field: str) -> None:
    value = {"start": 2.0, "steps": 2} if field == "temperature" else 0.5
    with pytest.raises(ConfigError, match=f"'uniform' has nothing that {field}"):
        moe_config("layer", router="uniform", schedule={field: value})


def test_a_router_that_is_never_trained_refuses_freezing() -> None:
    router = {"name": "top_k", "freeze": True}
    with pytest.raises(ConfigError, match="freeze=True"):
        moe_config("layer", router=router, schedule={"router_warmup_steps": 2})


def test_null_experts_count_for_the_largest_k() -> None:
    router = {"name": "top_k", "k": 2, "null_experts": 2}
    config = moe_config("layer", router=router, schedule={"k": {"start": 6, "steps": 3}})
    assert config.schedule["k"]["start"] == 6
    with pytest.raises(ConfigError, match="1..6"):
        moe_config("layer", router=router, schedule={"k_inference": 7})


@pytest.mark.parametrize(
    ("k", "schedule", "normalize"),
    [
        (1, {"k": {"start": 4, "steps": 3}}, "none"),
        (2, {"k": {"start": 4, "end": 1, "steps": 3}}, "none"),
        (1, {"k": {"start": 4, "end": 2, "steps": 3}}, "renorm"),
        (2, {"k_inference": 1}, "renorm"),
        (1, {"k_inference": 4}, "none"),
    ],
)
def test_the_smallest_k_of_the_training_decides_the_normalisation(
    k: int, schedule: dict[str, Any], normalize: str
) -> None:
    config = moe_config("layer", router={"name": "top_k", "k": k}, schedule=schedule)
    assert config.router["normalize"] == normalize


def test_renormalised_weights_at_k_one_are_warned_about() -> None:
    schedule = {"k": {"start": 4, "end": 1, "steps": 3}}
    with pytest.warns(UserWarning, match="task loss no longer trains"):
        moe_config("layer", router="sigmoid", schedule=schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe_config("layer", router={"name": "sigmoid", "renorm": False}, schedule=schedule)


def test_a_schedule_survives_json_in_its_full_form(tmp_path: Any) -> None:
    config = moe_config("layer", schedule={"k": {"start": 4, "steps": 3}})
    assert config.schedule["k"] == {"start": 4, "end": None, "steps": 3}
    assert config.schedule["expert_dropout"] == 0.0
    config.save_pretrained(tmp_path)
    assert MoeLoraConfig.from_pretrained(str(tmp_path)).schedule == config.schedule
    json.dumps(config.to_dict())


# --- in a router


@pytest.mark.parametrize(
    "name", [n for n in sorted(ROUTERS) if issubclass(ROUTERS[n], LinearRouterConfig)]
)
def test_the_temperature_reaches_every_router_with_a_gate(name: str) -> None:
    torch.manual_seed(0)
    router = ROUTERS.parse(name).build(8, 8).double().eval()
    hidden = torch.randn(7, 8, dtype=torch.float64)
    tokens = TokenContext(sequences=torch.zeros(7, dtype=torch.long))
    before = route(router, hidden, tokens).logits
    own = router.k
    used = RouterSettings(temperature=4.0, k=own, gate_dropout=0.0)
    router.use(training=used, inference=used)
    after = route(router, hidden, tokens).logits
    if name == "hierarchical":  # its logits are logarithms of probabilities
        assert not torch.equal(before, after)
    else:
        torch.testing.assert_close(after, before / 4)


@pytest.mark.parametrize("name", [n for n in sorted(ROUTERS) if ROUTERS[n].k_can_change])
def test_every_k_gives_that_many_experts_and_bounds_the_slots(name: str) -> None:
    torch.manual_seed(0)
    router = ROUTERS.parse(name).build(8, 5 if name != "rank_wise" else 8)
    hidden = torch.randn(7, 8)
    for training, inference in ((4, 1), (1, 3), (2, 5)):
        settings = [
            RouterSettings(temperature=1.0, k=k, gate_dropout=0.0) for k in (training, inference)
        ]
        router.use(training=settings[0], inference=settings[1])
        for mode, k in ((True, training), (False, inference)):
            router.train(mode)
            routing = router(hidden, TokenContext())
            assert ((routing.weights != 0).sum(-1) == k).all()
            assert routing.max_active == router.max_active == k
            experts, weights = routing.slots()
            dense = torch.zeros_like(routing.weights).scatter(-1, experts, weights)
            torch.testing.assert_close(dense, routing.weights)


# --- in a model


def routers(model: torch.nn.Module) -> list[Any]:
    """Return the routers of `model`."""
    return [head.router for head in heads_of(model).values()]


RAMPS = {
    "k": {"start": 4, "end": 2, "steps": 4},
    "k_inference": 1,
    "temperature": {"start": 4.0, "end": 0.5, "steps": 4},
}


@pytest.mark.parametrize("kind", ["layer", "block", "ffn"])
def test_a_fresh_model_uses_the_values_of_inference(kind: str) -> None:
    model = adapted("llama", kind, schedule=RAMPS)
    end = {"name": "top_k", "k": 1, "init_std": 0.5, "temperature": 0.5, "normalize": "renorm"}
    with pytest.warns(UserWarning, match="k=1"):
        plain = adapted("llama", kind, router=end)
    inputs = batch()
    torch.testing.assert_close(logits(model, inputs), logits(plain, inputs))
    assert all((r.k, r.max_active, r.temperature) == (1, 1, 0.5) for r in routers(model.train()))


@pytest.mark.parametrize("kind", ["layer", "block", "ffn"])
def test_a_step_sets_training_mode_and_leaves_evaluation(kind: str) -> None:
    model = adapted("llama", kind, schedule=RAMPS)
    inputs = batch()
    expected = logits(model, inputs)
    moeadapt.step_schedule(model, 1)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    seen = {(r.k, r.max_active, r.temperature) for r in routers(model.train())}
    assert seen == {(4, 4, 4.0 - 3.5 / 4)}
    with moeadapt.collect_routing(model) as found:
        model(**inputs)
    for routing in (r for routings in found.values() for r in routings):
        assert ((routing.weights != 0).sum(-1) == 4).all()
    moeadapt.step_schedule(model, 2)
    assert {r.k for r in routers(model)} == {3}
    assert {r.k for r in routers(model.eval())} == {1}
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    moeadapt.step_schedule(model, None)
    assert {r.k for r in routers(model.train())} == {1}


def test_a_training_step_equals_that_of_a_router_with_those_values() -> None:
    model = adapted("llama", "layer", schedule=RAMPS)
    there = {"name": "top_k", "k": 3, "init_std": 0.5, "temperature": 2.25, "normalize": "renorm"}
    plain = adapted("llama", "layer", router=there)
    moeadapt.step_schedule(model, 2)
    inputs = batch()
    found = {}
    for name, one in (("scheduled", model), ("plain", plain)):
        one.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        found[name] = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    assert found["scheduled"].keys() == found["plain"].keys()
    for name, grad in found["plain"].items():
        torch.testing.assert_close(found["scheduled"][name], grad)


def test_expert_dropout_keeps_the_mean_and_drops_that_share() -> None:
    model = adapted("llama", "layer", schedule={"expert_dropout": 0.25}).train()
    moeadapt.step_schedule(model, 0)
    head = next(iter(heads_of(model).values()))
    hidden = torch.randn(4000, head.router.weight.shape[1])
    torch.manual_seed(0)
    weights = head(hidden)
    model.eval()
    full = head(hidden)
    chosen = full != 0
    assert not (weights[~chosen] != 0).any()
    kept = weights[chosen] != 0
    assert kept.float().mean() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(weights[chosen][kept], full[chosen][kept] / 0.75)


def test_gate_dropout_lets_experts_be_tried_that_are_never_first() -> None:
    model = adapted("llama", "layer", schedule={"gate_dropout": 0.5}).train()
    moeadapt.step_schedule(model, 0)
    head = next(iter(heads_of(model).values()))
    with torch.no_grad():
        head.router.weight.zero_()
        head.router.weight[:, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    hidden = torch.zeros(4000, head.router.weight.shape[1])
    hidden[:, 0] = 1.0
    torch.manual_seed(0)
    tried = (head(hidden) != 0).float().mean(0)
    # All ways to hide four logits, each as likely: the two best that are shown are used, and
    # where everything would be hidden nothing is.
    shown = torch.cartesian_prod(*[torch.tensor([0, 1])] * 4).bool()
    nothing = ~shown.any(-1, keepdim=True)
    shown = shown | (nothing & torch.tensor([True, True, False, False]))
    expected = (shown & (shown.cumsum(-1) <= 2)).float().mean(0)
    torch.testing.assert_close(tried, expected, rtol=0, atol=0.03)
    model.eval()
    assert ((head(hidden) != 0).float().mean(0) == torch.tensor([1.0, 1.0, 0.0, 0.0])).all()


@pytest.mark.parametrize("kind", ["layer", "block", "ffn"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_dropouts(kind: str, reentrant: bool) -> None:
    schedule = {"expert_dropout": 0.5, "gate_dropout": 0.25, "k": {"start": 3, "steps": 9}}
    model = adapted("llama", kind, schedule=schedule).train()
    moeadapt.step_schedule(model, 0)
    inputs = batch()
    torch.manual_seed(0)
    expected = gradients(model, inputs)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    found = gradients(model, inputs)
    torch.manual_seed(1)
    different = gradients(model, inputs)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert any(not torch.allclose(different[n], g) for n, g in expected.items())


def test_a_loop_that_does_not_tell_its_step_is_warned_once() -> None:
    model = adapted("llama", "layer", schedule=RAMPS).train()
    with pytest.warns(UserWarning, match="moeadapt.step_schedule"):
        model(**batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch())


def test_freezing_without_an_attached_optimizer_is_refused() -> None:
    model = adapted("llama", "layer", schedule={"freeze_router_steps": 2})
    with pytest.raises(TrainingError, match="attach_optimizer"):
        moeadapt.step_schedule(model, 0)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="step=-1"):
        moeadapt.step_schedule(adapted("llama", "layer"), -1)


def test_a_copy_keeps_the_values_and_changes_alone() -> None:
    model = adapted("llama", "block", schedule=RAMPS).train()
    moeadapt.step_schedule(model, 0)
    twin = copy.deepcopy(model)
    assert {r.k for r in routers(twin)} == {4}
    moeadapt.step_schedule(twin, None)
    assert {r.k for r in routers(twin)} == {1}
    assert {r.k for r in routers(model)} == {4}


def test_only_adapters_that_are_trained_follow_the_step() -> None:
    model = adapted("llama", "layer", schedule=RAMPS)
    model.add_adapter("other", moe_config("layer", schedule=RAMPS))
    moeadapt.step_schedule(model.train(), 0)
    found = {name.split("/")[0]: head.router.k for name, head in heads_of(model).items()}
    assert found == {"default": 4, "other": 1}


def test_a_loaded_adapter_uses_the_values_of_inference(tmp_path: Any) -> None:
    from peft import PeftModel

    from tests.tiny import tiny

    model = adapted("llama", "layer", schedule=RAMPS)
    moeadapt.step_schedule(model.train(), 0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path))
    assert {(r.k, r.temperature) for r in routers(loaded)} == {(1, 0.5)}
    inputs = batch()
    torch.testing.assert_close(logits(loaded, inputs), logits(model.eval(), inputs))
