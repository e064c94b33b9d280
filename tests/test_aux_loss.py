"""The injected gradient of the auxiliary losses is the one of `task loss + auxiliary losses`.

The reference collects the auxiliary losses with their graph and adds them to the task loss, without
checkpointing. Comparisons are bit for bit: both ways run the same operations in the same order, and
the scales used are powers of two.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close

import moeadapt
from moeadapt import aux_loss
from moeadapt.errors import ConfigError, TrainingError
from moeadapt.tuner.inspect import pop_router_stats
from tests.samples import mixture_of
from tests.tiny import KINDS, VOCAB, adapted, batch, labels_of

BALANCE = {"switch": 0.5, "z_loss": 0.25}
CHECKPOINTING = {"off": None, "non_reentrant": False, "reentrant": True}
NOISE = {
    "quiet": {},
    "gaussian": {"noise": "gaussian"},
    "softplus": {"noise": "softplus"},
    "jitter": {"jitter": 0.1},
}

# torch's reentrant checkpoint says so in every pass without grad.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

kinds = pytest.mark.parametrize("kind", KINDS)
checkpointings = pytest.mark.parametrize("checkpointing", CHECKPOINTING)
Gradients = dict[str, Tensor]


# --- the node by itself


def leaf(*shape: int) -> Tensor:
    """Return a random float64 leaf."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def attach(weights: Tensor, loss: Tensor, scale: float = 1.0, count: int = 3):
    """Attach with fresh counters; return the output, the scale and the sink."""
    factor = torch.tensor(scale, dtype=torch.float64)
    sink = torch.zeros(count, requires_grad=True)
    stats = torch.arange(1.0, count + 1)
    return aux_loss.attach(weights, loss, scale=factor, stats=stats, sink=sink), factor, sink


def test_the_weights_pass_unchanged():
    weights = leaf(7, 4)
    out, _, _ = attach(weights, weights.square().sum())
    assert torch.equal(out, weights)


@pytest.mark.parametrize("scale", [1.0, 0.3, 512.0])
def test_backward_also_propagates_scale_times_the_loss(scale):
    weights, readout = leaf(7, 4), leaf(7, 4).detach()
    out, _, _ = attach(weights, weights.square().sum(), scale)
    (found,) = torch.autograd.grad((out * readout).sum(), weights)
    assert_close(found, readout + scale * 2 * weights)


def test_the_scale_is_read_in_backward():
    weights = leaf(7, 4)
    out, factor, _ = attach(weights, weights.square().sum())
    factor.fill_(0.25)
    out.sum().backward()
    assert_close(weights.grad, 1 + 0.25 * 2 * weights)


def test_it_counts_once_per_backward_and_not_per_forward():
    weights = leaf(7, 4)
    sink = torch.zeros(2, requires_grad=True)
    one, stats = torch.ones((), dtype=torch.float64), torch.tensor([1.0, 5.0])
    for _ in range(3):
        aux_loss.attach(weights, weights.sum(), scale=one, stats=stats, sink=sink)
    assert sink.grad is None
    for _ in range(2):
        out = aux_loss.attach(weights, weights.sum(), scale=one, stats=stats, sink=sink)
        out.sum().backward()
    assert sink.grad.tolist() == [2.0, 10.0]


def test_a_loss_without_a_graph_only_counts():
    weights = leaf(7, 4)
    out, _, sink = attach(weights, torch.ones((), dtype=torch.float64))
    out.sum().backward()
    assert_close(weights.grad, torch.ones_like(weights))
    assert sink.grad.tolist() == [1.0, 2.0, 3.0]


def test_weights_that_need_no_gradient_still_count():
    weights = leaf(7, 4).detach()
    out, _, sink = attach(weights, weights.sum())
    out.sum().backward()
    assert sink.grad.tolist() == [1.0, 2.0, 3.0]


# --- whole models


@contextmanager
def as_part_of_the_loss() -> Iterator[list[Tensor]]:
    """Collect the auxiliary losses with their graph instead of attaching them."""
    collected: list[Tensor] = []

    def collect(weights: Tensor, loss: Tensor, **_: Any) -> Tensor:
        collected.append(loss)
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aux_loss, "attach", collect)
        yield collected


def trained(
    kind: str, checkpointing: str = "off", dtype: torch.dtype = torch.float32, **overrides: Any
) -> PeftModel:
    """Return a small Llama with an adapter, in training mode."""
    overrides = {"balance": BALANCE, **overrides}
    model = adapted("llama", kind, **overrides).to(dtype).train()
    if CHECKPOINTING[checkpointing] is not None:
        reentrant = {"use_reentrant": CHECKPOINTING[checkpointing]}
        model.base_model.model.activation_checkpointing_enable(reentrant)
        model.enable_input_require_grads()
    return model


def task_loss(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """Run a forward and return the language-model loss."""
    return model(**inputs, labels=labels_of(inputs)).loss


def gradients_of(model: PeftModel) -> Gradients:
    """Return every gradient by parameter name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def explicit(model: PeftModel, inputs: dict[str, Tensor], micro_batches: int = 1) -> Gradients:
    """Return the gradient of the mean over micro-batches of task loss + auxiliary losses."""
    torch.manual_seed(0)
    moeadapt.set_aux_loss_scale(model, 1.0)
    for part in split(inputs, micro_batches):
        with as_part_of_the_loss() as collected:
            loss = task_loss(model, part)
            assert len(collected) == len(model.base_model.model._moeadapt_context.heads["default"])
            assert all(aux.requires_grad for aux in collected)
            ((loss + sum(collected)) / micro_batches).backward()
    return gradients_of(model)


def injected(
    model: PeftModel,
    inputs: dict[str, Tensor],
    micro_batches: int = 1,
    between: Callable[[PeftModel], None] = lambda model: None,
) -> Gradients:
    """Return the gradient that plain training gives; `between` runs before each backward."""
    torch.manual_seed(0)
    moeadapt.set_aux_loss_scale(model, 1 / micro_batches)
    for part in split(inputs, micro_batches):
        loss = task_loss(model, part) / micro_batches
        between(model)
        loss.backward()
    return gradients_of(model)


def split(inputs: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Cut a batch into equal micro-batches."""
    chunks = {name: value.chunk(parts) for name, value in inputs.items()}
    return [{name: value[i] for name, value in chunks.items()} for i in range(parts)]


def assert_same_bits(found: Gradients, expected: Gradients) -> None:
    """Compare every gradient bit for bit."""
    assert found.keys() == expected.keys()
    differing = {
        name: float((found[name] - value).abs().max())
        for name, value in expected.items()
        if not torch.equal(found[name], value)
    }
    assert not differing


@kinds
@checkpointings
@pytest.mark.parametrize("noise", NOISE)
def test_the_injected_gradient_is_exact(kind, checkpointing, noise):
    router = {"name": "top_k", "k": 2, "init_std": 0.5, **NOISE[noise]}
    inputs = batch(rows=4)
    expected = explicit(trained(kind, router=router), inputs)
    assert_same_bits(injected(trained(kind, checkpointing, router=router), inputs), expected)
    without = injected(trained(kind, router=router, balance=None), inputs)
    routers = [name for name in expected if "moeadapt_router" in name]
    assert routers
    for name in routers:  # the auxiliary part is no rounding error
        assert (expected[name] - without[name]).abs().max() > 1e-3


@kinds
@checkpointings
def test_the_injected_gradient_is_exact_over_four_micro_batches(kind, checkpointing):
    inputs = batch(rows=4, length=11)
    expected = explicit(trained(kind), inputs, micro_batches=4)
    assert_same_bits(injected(trained(kind, checkpointing), inputs, 4), expected)


@kinds
def test_a_scale_that_is_no_power_of_two_is_exact_in_double_precision(kind):
    inputs, parts = batch(rows=3), 3
    scale = float(torch.tensor(1 / parts))  # the scale itself is a float32 number
    reference = trained(kind, dtype=torch.float64)
    moeadapt.set_aux_loss_scale(reference, 1.0)
    for part in split(inputs, parts):
        with as_part_of_the_loss() as collected:
            (task_loss(reference, part) / parts + scale * sum(collected)).backward()
    found = injected(trained(kind, dtype=torch.float64), inputs, parts)
    for name, value in gradients_of(reference).items():
        assert_close(found[name], value, rtol=1e-12, atol=1e-13)


def reference_passes(model: PeftModel) -> None:
    """Run what preference trainers run between forward and backward, with other masks."""
    state = torch.get_rng_state()
    other = batch(rows=2, length=5, seed=1)
    with torch.no_grad():
        model(**other)
        model(input_ids=other["input_ids"])
        with model.disable_adapter():
            model(**other)
    torch.set_rng_state(state)


@kinds
@checkpointings
@pytest.mark.parametrize("noise", ["quiet", "gaussian"])
def test_passes_without_grad_between_forward_and_backward_change_nothing(
    kind, checkpointing, noise
):
    router = {"name": "top_k", "k": 2, "init_std": 0.5, **NOISE[noise]}
    inputs = batch(rows=4)
    expected = explicit(trained(kind, router=router), inputs)
    model = trained(kind, checkpointing, router=router)
    assert_same_bits(injected(model, inputs, between=reference_passes), expected)


@kinds
@checkpointings
def test_evaluation_leaves_no_trace(kind, checkpointing):
    inputs = batch(rows=4)
    expected = injected(trained(kind, checkpointing), inputs)
    model = trained(kind, checkpointing)
    model.eval()
    with torch.no_grad():
        task_loss(model, batch(rows=2, seed=3))
    task_loss(model, batch(rows=2, seed=3)).backward()  # analysis with gradients, in eval mode
    model.zero_grad()
    assert pop_router_stats(model) == {}
    model.train()
    assert_same_bits(injected(model, inputs), expected)


@kinds
@checkpointings
def test_padding_does_not_reach_the_auxiliary_losses(kind, checkpointing):
    """With the task loss scaled away, what padding holds changes no gradient of a router."""
    inputs = batch(rows=3)
    padded = inputs["attention_mask"] == 0
    assert padded.any()
    results = []
    for token in (0, 7):
        filled = {**inputs, "input_ids": inputs["input_ids"].masked_fill(padded, token)}
        filled["position_ids"] = torch.arange(filled["input_ids"].shape[1]).expand_as(padded)
        model = trained(kind, checkpointing)
        moeadapt.set_aux_loss_scale(model, 1.0)
        (0 * model(**filled).logits.sum()).backward()
        grads = gradients_of(model)
        results.append({n: g for n, g in grads.items() if "moeadapt_router" in n})
    assert any(g.any() for g in results[0].values())
    for name, value in results[0].items():
        assert_close(results[1][name], value)


@kinds
@checkpointings
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_every_real_token_is_counted_once(kind, checkpointing, micro_batches):
    inputs = batch(rows=4, length=11)
    model = trained(kind, checkpointing)
    injected(model, inputs, micro_batches, between=reference_passes)
    real = int(inputs["attention_mask"].sum())
    assert real < inputs["attention_mask"].numel()
    counted = pop_router_stats(model)
    assert counted.keys() == {
        f"default/{name}" for name in model.base_model.model._moeadapt_context.heads["default"]
    }
    for found in counted.values():
        assert found.tokens == real
        assert found.active == 2
        assert_close(float(found.load.sum()), 1.0)
        assert len(found.losses) == len(BALANCE)
    assert pop_router_stats(model) == {}


@kinds
@checkpointings
def test_counted_losses_are_those_of_the_forward(kind, checkpointing):
    inputs = batch(rows=4)
    model = trained(kind, checkpointing)
    with moeadapt.collect_routing(model) as routings:
        injected(model, inputs)
    losses = moeadapt.BALANCE.parse({"name": "switch"}), moeadapt.BALANCE.parse("z_loss")
    for name, found in pop_router_stats(model).items():
        routing = routings[name.removeprefix("default/")][0]
        assert_close(found.losses, tuple(float(c.loss(routing, mixture_of())) for c in losses))


@kinds
def test_the_mean_over_routers_is_added(kind):
    """The coefficient does not grow with the number of layers."""
    model = trained(kind)
    with as_part_of_the_loss() as collected, moeadapt.collect_routing(model) as routings:
        task_loss(model, batch())
    switch, z_loss = moeadapt.BALANCE.parse("switch"), moeadapt.BALANCE.parse("z_loss")
    total = sum(
        BALANCE["switch"] * switch.loss(r, mixture_of())
        + BALANCE["z_loss"] * z_loss.loss(r, mixture_of())
        for (r,) in routings.values()
    )
    assert_close(sum(collected), total / len(routings))


# --- the scale


@kinds
@checkpointings
def test_the_scale_may_be_set_between_forward_and_backward(kind, checkpointing):
    inputs = batch()
    expected = trained(kind, balance={n: c / 8 for n, c in BALANCE.items()})
    moeadapt.set_aux_loss_scale(expected, 1.0)
    task_loss(expected, inputs).backward()
    model = trained(kind, checkpointing)
    loss = task_loss(model, inputs)
    moeadapt.set_aux_loss_scale(model, 1 / 8)
    loss.backward()
    assert_same_bits(gradients_of(model), gradients_of(expected))


@kinds
def test_accumulation_without_a_scale_warns_once(kind):
    model, inputs = trained(kind), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task_loss(model, inputs).backward()
    with pytest.warns(UserWarning, match="gradients are being accumulated"):
        loss = task_loss(model, inputs)
    loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task_loss(model, inputs).backward()


@kinds
@checkpointings
@pytest.mark.parametrize("set_to_none", [True, False])
def test_training_without_accumulation_does_not_warn(kind, checkpointing, set_to_none):
    model = trained(kind, checkpointing)
    for _ in range(3):
        task_loss(model, batch()).backward()
        model.zero_grad(set_to_none=set_to_none)


@kinds
def test_accumulation_with_a_scale_or_without_losses_does_not_warn(kind):
    for balance, scale in ((BALANCE, 0.5), (None, None)):
        model = trained(kind, balance=balance)
        if scale is not None:
            moeadapt.set_aux_loss_scale(model, scale)
        for _ in range(3):
            task_loss(model, batch()).backward()


@kinds
def test_float16_without_a_scale_is_refused(kind):
    model, inputs = trained(kind), batch()
    half = torch.autocast("cpu", torch.float16)
    with half, pytest.raises(TrainingError, match="GradScaler"):
        task_loss(model, inputs)
    with half, torch.no_grad():
        task_loss(model, inputs)
    moeadapt.set_aux_loss_scale(model, 1024.0)
    with half:
        loss = task_loss(model, inputs)
    (1024 * loss).backward()
    assert all(torch.isfinite(g).all() for g in gradients_of(model).values())


@kinds
def test_bfloat16_needs_no_scale(kind):
    model = trained(kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss = task_loss(model, batch())
    loss.backward()
    assert any("moeadapt_router" in name for name in gradients_of(model))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ConfigError, match="must be positive"):
        moeadapt.set_aux_loss_scale(trained("layer"), scale)


def test_a_loss_that_a_trainer_makes_itself_is_regularised_too():
    """Preference and RL trainers never look at `outputs.loss`."""
    model = trained("block")
    moeadapt.set_aux_loss_scale(model, 1.0)
    inputs = batch()
    logits = model(**inputs).logits
    torch.nn.functional.log_softmax(logits, -1)[..., VOCAB // 2].mean().backward()
    plain = trained("block", balance=None)
    logits = plain(**inputs).logits
    torch.nn.functional.log_softmax(logits, -1)[..., VOCAB // 2].mean().backward()
    found, bare = gradients_of(model), gradients_of(plain)
    routers = [name for name in found if "moeadapt_router" in name]
    assert all((found[name] - bare[name]).abs().max() > 1e-3 for name in routers)


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
def test_two_forwards_of_other_masks_before_one_backward_are_refused_under_checkpointing(
    checkpointing: str,
) -> None:
    model = trained("block", checkpointing)
    moeadapt.set_aux_loss_scale(model, 1.0)
    one = batch()
    other = {**one, "attention_mask": torch.ones_like(one["input_ids"])}
    assert not torch.equal(one["attention_mask"], other["attention_mask"])
    together = task_loss(model, one) + task_loss(model, other)
    with pytest.raises(TrainingError, match="wait for one backward"):
        together.backward()
    for inputs in (one, other):  # one after the other is what the message asks for
        task_loss(model, inputs).backward()


@checkpointings
def test_two_forwards_of_other_lengths_before_one_backward_are_told_apart(checkpointing: str):
    long = batch()
    short = {name: tensor[:, 2:] for name, tensor in long.items()}
    gradients = []
    for mode in ("off", checkpointing):
        model = trained("block", mode)
        moeadapt.set_aux_loss_scale(model, 1.0)
        (task_loss(model, long) + task_loss(model, short)).backward()
        gradients.append(gradients_of(model))
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected)
