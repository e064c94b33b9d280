"""The forms of one linear: all compute the same, and `auto` takes the fastest as measured."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from moeadapt import MoeLoraConfig
from moeadapt.dispatch import choose, dispatch, dispatch_reference
from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.experts import EXPERTS, BankSize, ExpertBank
from tests.contracts.kit import ROUTER_SPECS, label
from tests.samples import ALL_REAL, OUT, D, E, T, factors_of, hidden, make_bank, make_router
from tests.tiny import adapted, batch, labels_of

SPARSE = ("grouped", "gather")
WIDE = 16  # a multiple of what the kernels ask for
forms = pytest.mark.parametrize("form", ["concat", *SPARSE])
bounded = pytest.mark.parametrize(
    "spec", [s for s in ROUTER_SPECS if make_router(s).max_active < E], ids=label
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def bank_of(
    num_experts: int, rank: int, *, impl: str = "auto", dtype: torch.dtype = torch.float32
) -> ExpertBank:
    """Return LoRA experts that are not zero."""
    size = BankSize(in_features=D, out_features=WIDE, num_experts=num_experts, rank=rank, scale=1.5)
    bank = EXPERTS.parse("lora").build(size, init="random")
    bank.impl = impl
    for factor in factors_of(bank):
        factor.data = factor.data.to(dtype)
    return bank


# --- the same result


@forms
@bounded
@pytest.mark.parametrize(("expert", "num_shared"), [("lora", 0), ("lora", 2), ("rank1", 1)])
def test_every_form_is_its_definition_in_value_and_every_gradient(form, spec, expert, num_shared):
    router = make_router(spec)
    bank = make_bank(expert, num_shared=num_shared)
    bank.impl = form
    x, onto = hidden().requires_grad_(), hidden(T, OUT).requires_grad_()
    leaves = [x, onto, *factors_of(bank), *router.parameters()]
    upstream, results = hidden(T, OUT), []
    for run in (dispatch, dispatch_reference):
        torch.manual_seed(1)
        routing = router(x, ALL_REAL)
        limit = {"max_active": routing.max_active} if run is dispatch else {}
        y = run(x, routing.expert_weights, bank, onto, **limit)
        grads = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
        results.append([y, *(torch.zeros(()) if g is None else g for g in grads)])
    for quick, definition in zip(*results, strict=True):
        assert_close(quick, definition)


@pytest.mark.parametrize("form", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_form_in_low_precision_is_as_near_to_the_truth_as_concat(form, dtype):
    """Also with a gradient of stride zero, which the kernel refuses."""
    bank = bank_of(8, 8, dtype=dtype)
    router = make_router({"name": "top_k", "k": 2}, num_experts=8)
    x64 = torch.randn(T, D, dtype=torch.float64)
    weights = router(x64, ALL_REAL).weights.detach()
    truth = dispatch(
        x64.to(dtype).double(), weights, _double(bank), torch.zeros(T, WIDE, dtype=torch.float64)
    )
    errors = {}
    for name in ("concat", form):
        bank.impl = name
        x = x64.to(dtype).requires_grad_()
        y = dispatch(x, weights.float(), bank, torch.zeros(T, WIDE, dtype=dtype), max_active=2)
        y.sum().backward()
        assert torch.isfinite(x.grad).all()
        errors[name] = float((y.detach().double() - truth).detach().abs().max())
    assert errors[form] <= 4 * errors["concat"] + 1e-12


def _double(bank: ExpertBank) -> ExpertBank:
    copy = bank_of(bank.size.num_experts, bank.size.rank, impl="concat", dtype=torch.float64)
    for own, other in zip(factors_of(copy), factors_of(bank), strict=True):
        own.data = other.data.double()
    return copy


@pytest.mark.parametrize("form", SPARSE)
@pytest.mark.parametrize("scope", ["layer", "block"])
def test_a_model_computes_the_same_in_every_form(form, scope):
    losses = {}
    for impl in ("concat", form):
        model = adapted("llama", scope, impl=impl, n_shared=1).train()
        inputs = batch()
        loss = model(**inputs, labels=labels_of(inputs)).loss
        loss.backward()
        losses[impl] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        losses[impl]["loss"] = loss.detach()
    assert losses[form].keys() == losses["concat"].keys()
    for name, value in losses["concat"].items():
        assert_close(losses[form][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", SPARSE)
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_and_none_are_batches_too(form, tokens):
    bank = make_bank("lora")
    bank.impl = form
    weights = make_router("top_k")(hidden(tokens), ALL_REAL).weights
    onto = hidden(tokens, OUT)
    x = hidden(tokens)
    y = dispatch(x, weights, bank, onto, max_active=2)
    assert y.shape == (tokens, OUT)
    if tokens:
        assert_close(y, dispatch_reference(x, weights, bank, onto))


@pytest.mark.parametrize("form", SPARSE)
def test_an_expert_that_no_token_uses_gets_a_zero_gradient(form):
    """DDP waits for the gradient of every parameter."""
    bank = make_bank("lora")
    bank.impl = form
    weights = torch.zeros(T, E, dtype=torch.float64)
    weights[:, 0] = 1.0
    dispatch(hidden(), weights, bank, hidden(T, OUT), max_active=1).sum().backward()
    unused = bank.factor("lora_A").weight.grad[bank.size.rank :]
    assert unused.shape[0] > 0
    assert not unused.any()


# --- which one


def form_of(bank, tokens, k, dtype=torch.float32, *, grad=True):
    with torch.set_grad_enabled(grad):
        return choose(bank, torch.zeros(tokens, D, dtype=dtype), k)


@pytest.mark.parametrize(
    ("num_experts", "rank", "k", "dtype", "tokens", "form"),
    [
        (8, 8, 2, torch.float32, 1024, "concat"),
        (8, 16, 2, torch.float32, 1024, "grouped"),
        (8, 16, 2, torch.bfloat16, 1024, "concat"),
        (64, 8, 2, torch.float32, 1024, "grouped"),
        (64, 8, 2, torch.bfloat16, 1024, "grouped"),
        (64, 8, 2, torch.float32, 63, "concat"),  # too few tokens to sort
        (64, 8, 64, torch.float32, 1024, "concat"),  # every expert is used
        (64, 8, None, torch.float32, 1024, "concat"),
        (64, 8, 2, torch.float64, 1024, "concat"),  # no kernel
        (64, 4, 2, torch.bfloat16, 1024, "concat"),  # not aligned
        (256, 2, 2, torch.float32, 1024, "concat"),
    ],
)
def test_auto_takes_what_was_measured_to_be_faster(num_experts, rank, k, dtype, tokens, form):
    assert form_of(bank_of(num_experts, rank), tokens, k, dtype) == form


def test_auto_gathers_only_to_decode_few_tokens_with_many_experts():
    many = bank_of(64, 16)
    assert form_of(many, 1, 2, grad=False) == "gather"
    assert form_of(many, 8, 2, grad=False) == "gather"
    assert form_of(many, 16, 2, grad=False) == "concat"
    assert form_of(many, 1, 2, grad=True) == "concat"
    assert form_of(bank_of(8, 64), 1, 2, grad=False) == "concat"


@pytest.mark.parametrize("expert", sorted(set(EXPERTS) - {"lora", "rank1", "glu", "heterogeneous"}))
def test_auto_computes_other_experts_together(expert):
    bank = make_bank(expert)
    assert choose(bank, torch.zeros(1024, D), 1) == "concat"


def test_a_form_that_is_named_is_taken_or_refused():
    for form in ("concat", *SPARSE):
        bank = bank_of(8, 8, impl=form)
        assert form_of(bank, 3, 2) == form
    odd = bank_of(8, 3, impl="grouped")
    with pytest.raises(
        UnsupportedError, match="multiples of 4 in torch.float32, not \\(3, 8, 16\\)"
    ):
        form_of(odd, 3, 2)
    sharded = bank_of(8, 8, impl="gather")
    sharded.factor("lora_A").register_forward_pre_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="sharded or wrapped"):
        form_of(sharded, 3, 2)
    sharded.impl = "auto"
    assert form_of(sharded, 1024, 1) == "concat"


@pytest.mark.parametrize("impl", SPARSE)
@pytest.mark.parametrize(
    "fields",
    [
        {"experts": "shared_a"},
        {"experts": {"name": "lora", "orthogonalize": True}},
        {"placement": "ffn"},
    ],
)
def test_a_form_that_the_experts_do_not_have_is_refused_in_the_config(impl, fields):
    with pytest.raises(ConfigError, match="use impl='auto'"):
        MoeLoraConfig(impl=impl, **fields)


def test_an_unknown_form_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'auto', 'concat', 'grouped' or 'gather'"):
        MoeLoraConfig(impl="fast")


def test_a_matrix_is_whole_unless_something_stands_around_it():
    factor = make_bank("lora").factor("lora_A")
    assert factor.is_whole
    handle = factor.register_forward_pre_hook(lambda *_: None)
    assert not factor.is_whole
    handle.remove()
    factor.weight.ds_id = 3
    assert not factor.is_whole
    del factor.weight.ds_id
    factor.weight = nn.Parameter(torch.zeros(0))
    assert not factor.is_whole
