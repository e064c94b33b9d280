"""What is counted, against Python loops over each text alone; and verdicts that must come out."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import moeadapt
from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.report import watch
from moeadapt.report.collect import check_numbers, collect
from moeadapt.report.counts import main_experts
from tests.report.mixtures import FEW, TOKENIZER, mixture, sayings, two_domains, words_of
from tests.tiny import adapt, moe_config, tiny
from tests.toy import WORDS

TEXTS = two_domains(4)
E = 4


def routings_alone(model, text):
    """Return each layer's routing of one text without padding."""
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    with torch.no_grad(), moeadapt.collect_routing(model) as routings:
        model(input_ids=ids)
    return {name: found[0] for name, found in routings.items()}


def slow(model, texts):
    """Count with loops: layer -> what the report says of it."""
    found = {}
    for number, own in enumerate(texts.values()):
        for text in own:
            for name, routing in routings_alone(model, text).items():
                sums = found.setdefault(name, new_sums(routing.num_experts, len(texts)))
                count(sums, routing, number)
    return found


def new_sums(num_experts, num_domains):
    square = [[0.0] * num_experts for _ in range(num_experts)]
    return {
        "tokens": 0,
        "bits": 0.0,
        "probs": [0.0] * num_experts,
        "used": [[0.0] * num_experts for _ in range(num_domains)],
        "together": square,
        "main": [],
    }


def count(sums, routing, domain):
    num_experts = routing.num_experts
    for weights, probs in zip(routing.weights.tolist(), routing.probs.tolist(), strict=True):
        own = weights[:num_experts]
        used = [e for e in range(num_experts) if own[e] != 0]
        sums["tokens"] += 1
        sums["bits"] -= sum(p * math.log2(p) for p in probs if p > 0)
        for e in range(num_experts):
            sums["probs"][e] += probs[e]
        for e in used:
            sums["used"][domain][e] += 1
            for other in used:
                sums["together"][e][other] += 1
        sums["main"].append(own.index(max(own)) if used else None)


MIXTURES = {
    "layer": {"target_modules": ["q_proj", "down_proj"]},
    "block": {},
    "ffn": {},
    "glu": {},
    "null experts": {"router": {"name": "top_k", "k": 1, "null_experts": 2, "init_std": 0.5}},
    "adaptive": {"router": {"name": "threshold", "init_std": 0.5}},
    "soft": {"router": {"name": "soft", "init_std": 0.5}},
    "hash": {"router": {"name": "hash", "k": 2}},
}


@pytest.mark.parametrize("case", MIXTURES)
def test_counts_are_those_of_each_text_alone(case):
    kind = case if case in ("layer", "block", "ffn", "glu") else "block"
    model = mixture(kind, **MIXTURES[case])
    data = collect(model, TOKENIZER, TEXTS, **FEW)
    expected = slow(model, TEXTS)
    assert [layer.name for layer in data.layers] == list(expected)
    for layer in data.layers:
        check_layer(layer, expected[layer.name])
    names = list(expected)
    for flow in data.flows:
        first, second = (expected[names[flow.layer + i]]["main"] for i in (0, 1))
        pairs = [p for p in zip(first, second, strict=True) if None not in p]
        shares = torch.zeros(E, E).double()
        for a, b in pairs:
            shares[a, b] += 1 / len(pairs)
        assert_close(torch.tensor(flow.shares).double(), shares)
    assert [flow.layer for flow in data.flows] == list(range(len(names) - 1))


def check_layer(layer, sums):
    slots = sum(map(sum, sums["used"]))
    uses = [sum(row[e] for row in sums["used"]) for e in range(E)]
    load = [n / slots for n in uses]
    assert layer.load == pytest.approx(load)
    assert layer.importance == pytest.approx([p / sums["tokens"] for p in sums["probs"]], rel=1e-6)
    assert layer.active == pytest.approx(slots / sums["tokens"])
    assert layer.entropy == pytest.approx(sums["bits"] / sums["tokens"], rel=1e-6)
    assert layer.max_over_mean == pytest.approx(max(load) * E)
    spread = math.sqrt(sum((share - 1 / E) ** 2 for share in load) / E)
    assert layer.cv == pytest.approx(spread * E, abs=1e-12)
    nats = -sum(share * math.log(share) for share in load if share)
    assert layer.effective_experts == pytest.approx(math.exp(nats))
    for row, together in zip(layer.coactivation, sums["together"], strict=True):
        assert row == pytest.approx([n / sums["tokens"] for n in together])
    for d, row in enumerate(sums["used"]):
        lift = [row[e] / sum(row) / load[e] if load[e] else 1.0 for e in range(E)]
        assert layer.lift[d] == pytest.approx(lift)


@pytest.fixture(scope="module")
def model():
    return mixture()


@pytest.fixture(scope="module")
def data(model):
    return collect(model, TOKENIZER, TEXTS, **FEW)


def test_the_size_of_a_batch_changes_no_count(model, data):
    other = collect(model, TOKENIZER, TEXTS, **{**FEW, "batch_size": 3})
    for one, two in zip(data.layers, other.layers, strict=True):
        assert one.load == two.load
        assert one.coactivation == two.coactivation
        assert (one.lift, one.p_value) == (two.lift, two.p_value)
    assert data.arms[0].nll == pytest.approx(other.arms[0].nll)


def test_the_same_seed_measures_the_same(model, data):
    again = collect(model, TOKENIZER, TEXTS, **FEW)
    assert replace(again, seconds=0.0) == replace(data, seconds=0.0)


def test_the_data_is_json_and_says_what_was_measured(data):
    back = json.loads(json.dumps(data.to_json(), allow_nan=False))
    assert back["domains"] == ["a", "b"]
    assert back["texts_per_domain"] == [4, 6]
    assert back["num_experts"] == E
    lengths = [len(text.split()) for own in TEXTS.values() for text in own]
    assert back["tokens"] == sum(lengths)
    assert back["title"] == "default"
    assert back["settings"]["router"] == "top_k (init_std 0.5, k 2)"
    assert back["settings"]["targets"].startswith("down_proj, q_proj")
    assert set(back["versions"]) == {"moeadapt", "torch", "transformers", "peft", "python"}
    assert back["arms"][0]["name"] == "learned"
    assert back["seconds"] > 0


def test_coloured_texts_are_what_the_router_did(model, data):
    shown = [(d, text) for d, own in TEXTS.items() for text in own[:2]]
    assert [(text.domain, "".join(text.tokens)) for text in data.texts] == shown
    for text, (_, words) in zip(data.texts, shown, strict=True):
        for layer, routing in enumerate(routings_alone(model, words).values()):
            for token, weights in enumerate(routing.weights.tolist()):
                order = sorted(range(E), key=lambda e, w=weights: -w[e])
                order = [e for e in order if weights[e] != 0]
                assert text.experts[layer][token] == order
                expected = [weights[e] for e in order]
                assert text.weights[layer][token] == pytest.approx(expected, abs=1e-4)


def test_long_texts_are_cut_and_only_their_start_is_shown(model, monkeypatch):
    monkeypatch.setattr(watch, "SHOWN_TOKENS", 3)
    monkeypatch.setattr("moeadapt.report.collect.SHOWN_TOKENS", 3)
    found = collect(model, TOKENIZER, {"a": [" ".join(WORDS)]}, max_length=9, shown=1, **FEW)
    assert (found.tokens, found.cut) == (9, 1)
    assert found.texts[0].tokens == ["w0", " w1", " w2"]
    assert {len(layer) for layer in found.texts[0].experts} == {3}
    # The model has 64 positions.
    found = collect(model, TOKENIZER, {"a": [" ".join(WORDS)]}, shown=0, **FEW)
    assert found.tokens == 64
    assert found.texts == []
    exact = collect(model, TOKENIZER, {"a": ["w1 w2 w3"]}, max_length=3, shown=0, **FEW)
    assert (exact.tokens, exact.cut) == (3, 0)


def test_one_domain_and_one_text_are_enough(model):
    found = collect(model, TOKENIZER, {"a": ["w1 w2 w3"]}, **FEW)
    assert found.layers[0].lift == [[1.0] * E]
    assert found.layers[0].mutual_information == 0
    answers = {tile.name: tile.answer for tile in found.verdicts}
    assert answers["specialised"] == answers["worth it"] == "unclear"


def test_layers_of_different_sizes_keep_their_own():
    model = mixture(experts_pattern=[3, 5])
    found = collect(model, TOKENIZER, TEXTS, **FEW)
    sizes = [3, 3, 5, 5]
    assert found.num_experts == 5
    assert [len(layer.load) for layer in found.layers] == sizes
    assert [len(layer.lift[0]) for layer in found.layers] == sizes
    shapes = [(len(flow.shares), len(flow.shares[0])) for flow in found.flows]
    assert shapes == [(3, 3), (3, 5), (5, 5)]
    for flow in found.flows:
        assert sum(map(sum, flow.shares)) == pytest.approx(1)


def test_the_main_expert_is_the_first_of_equal_ones():
    weights = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 0.0], [0.1, 0.2, 0.7]])
    expected = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert torch.equal(main_experts(weights), expected)


def test_measuring_leaves_the_model_as_it_was():
    model = mixture()
    model.add_adapter("other", moe_config("block", num_experts=2))
    model.double().train()
    model.base_model.model.model.layers[0].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 == 0)
    before = [(p.requires_grad, p.clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    assert collect(model, TOKENIZER, TEXTS, adapter="other", **FEW).num_experts == 2
    assert collect(model, TOKENIZER, TEXTS, **FEW).num_experts == E
    assert model.active_adapter == "default"
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [module.training for module in model.modules()]
    for parameter, (flag, value) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad == flag
        assert torch.equal(parameter, value)
        assert parameter.grad is None


# --- verdicts that must come out


def answers(model, texts):
    options = {"permutations": 199, "bootstrap": 199, "batch_size": 32}
    tiles = collect(model, TOKENIZER, texts, **options).verdicts
    return {tile.name: tile.answer for tile in tiles}


@pytest.mark.parametrize("k", [1, 2])
def test_a_router_that_sends_all_tokens_to_the_same_experts_is_not_balanced(k):
    model = mixture(router={"name": "top_k", "k": k, "bias": True})
    for name, parameter in model.named_parameters():
        if "moeadapt_router" in name:
            torch.nn.init.zeros_(parameter)
    found = answers(model, TEXTS)
    assert found["balanced"] == found["used"] == found["worth it"] == "no"


DRIVEN = {"router": {"name": "hash", "k": 1}}
APART = {
    "a": sayings(words_of({0, 1}), 10, 1),
    "b": sayings(words_of({2, 3}), 10, 2),
}


def test_a_router_driven_by_the_words_of_the_domains_is_specialised():
    found = answers(mixture(**DRIVEN), APART)
    assert found["specialised"] == found["balanced"] == found["used"] == "yes"


def test_domains_of_the_same_words_are_not_specialised():
    assert answers(mixture(**DRIVEN), two_domains(12))["specialised"] == "no"


def test_routing_between_equal_experts_is_not_worth_it():
    model = mixture()
    for head in moeadapt.tuner.inspect.heads_of(model).values():
        for bank in head.banks:
            with torch.no_grad():
                rank = bank.size.rank
                a, b = bank.factor("lora_A").weight, bank.factor("lora_B").weight
                a.copy_(a[:rank].repeat(E, 1))
                b.copy_(b[:, :rank].repeat(1, E))
    assert answers(model, two_domains(12))["worth it"] == "no"


def test_experts_that_learned_their_own_tokens_are_worth_it():
    """Each expert is trained on the tokens that the hash gives it, so no other one can do it."""
    base = tiny("llama")
    fields = {"r": 8, "lora_alpha": 32, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    model = adapt(base, moe_config("ffn", **DRIVEN, **fields)).double()
    ids = torch.arange(4, 104).view(10, 10)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    texts = {"a": [" ".join(f"w{10 * row + i}" for i in range(10)) for row in range(10)]}
    assert answers(model.eval(), texts)["worth it"] == "yes"


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"permutations": 0}, "permutations=0"),
        ({"bootstrap": 0}, "bootstrap=0"),
        ({"shown": -1}, "shown=-1"),
        ({"adapter": "nobody"}, "no moeadapt adapter 'nobody'"),
        ({"training_log": "/nowhere"}, "does not exist"),
    ],
)
def test_wrong_options_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        collect(model, TOKENIZER, TEXTS, **options)


@pytest.mark.parametrize("value", [2.5, "9", True])
def test_an_option_that_is_no_whole_number_is_refused(value):
    with pytest.raises(ConfigError, match="must be a whole number"):
        check_numbers({"batch_size": (value, 1)})


def test_models_without_a_mixture_are_refused(model):
    from peft import LoraConfig

    with pytest.raises(ConfigError, match="this is a LlamaForCausalLM"):
        collect(tiny("llama"), TOKENIZER, TEXTS)
    lora = adapt(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="no mixture of LoRA experts"):
        collect(lora, TOKENIZER, TEXTS)
    with pytest.raises(ConfigError, match="this is a LlamaForCausalLM"):
        collect(model.get_base_model(), TOKENIZER, TEXTS)


def test_models_that_are_no_language_models_are_refused():
    from transformers import AutoModelForSequenceClassification

    base = tiny("llama", auto=AutoModelForSequenceClassification)
    with pytest.raises(UnsupportedError, match="SEQ_CLS"):
        collect(adapt(base, moe_config("block", task_type="SEQ_CLS")), TOKENIZER, TEXTS)


def test_an_adapter_that_is_off_is_refused():
    model = mixture()
    with model.disable_adapter(), pytest.raises(UnsupportedError, match="turn the adapter on"):
        collect(model, TOKENIZER, TEXTS)


def test_a_decision_per_sequence_looks_at_later_tokens():
    model = mixture(router={"name": "top_k", "k": 1, "per": "sequence"})
    found = collect(model, TOKENIZER, two_domains(9), **FEW)
    (worth,) = (tile for tile in found.verdicts if tile.name == "worth it")
    assert worth.answer == "unclear"
    assert "looks at later tokens" in worth.reason


def test_tokens_on_null_experts_are_counted_as_idle():
    model = mixture(router={"name": "top_k", "k": 1, "null_experts": 3, "init_std": 0.5})
    with moeadapt.override_routing(model, edit=lambda _, r: torch.zeros_like(r.expert_weights)):
        found = collect(model, TOKENIZER, two_domains(9), **FEW)
    for layer in found.layers:
        assert sum(layer.load) == 0
        assert math.isnan(layer.cv)
        assert layer.mutual_information == 0
