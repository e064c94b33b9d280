"""What holds for every question: it leaves the model alone and refuses what makes no sense."""

import pytest
import torch
import transformers

from moeadapt import interpret
from moeadapt.errors import ConfigError
from moeadapt.interpret import read_batches
from tests.interpret.kit import items, model_of
from tests.tiny import adapt, batch, logits, moe_config, tiny
from tests.toy import toy_tokenizer

TEXTS = ["w1 w2 w3 w4", "w7 w8 w9"]


def ask_contributions(model, data, **fields):
    item = data[0] if data else {"input_ids": torch.zeros(0, 0).long()}
    return interpret.contributions(model, item["input_ids"], item["attention_mask"], **fields)


def ask_prototypes(model, data, **fields):
    return interpret.prototypes(model, toy_tokenizer(), TEXTS if data else [], **fields)


QUESTIONS = {
    "contributions": ask_contributions,
    "ablation": lambda model, data, **fields: interpret.ablation(
        model, data, removals=["ban"], **fields
    ),
    "counterfactual": lambda model, data: interpret.counterfactual(model, data, k=1),
    "shapley": lambda model, data, layers=None: interpret.shapley(
        model, data, layer=layers and layers[0], exact=False, samples=2
    ),
    "fidelity": interpret.fidelity,
    "gate_sensitivity": interpret.gate_sensitivity,
    "tag_information": lambda model, data, **fields: interpret.tag_information(
        model, data, permutations=5, **fields
    ),
    "context_independence": lambda model, data, **fields: interpret.context_independence(
        model, data, min_count=2, permutations=5, **fields
    ),
    "probe_experts": interpret.probe_experts,
    "prototypes": ask_prototypes,
}
OF_LAYERS = sorted(set(QUESTIONS) - {"counterfactual", "fidelity", "probe_experts"})
OF_EXPERTS = ["ablation", "contributions", "probe_experts", "prototypes"]
OF_BATCHES = sorted(set(QUESTIONS) - {"contributions", "prototypes"})
questions = pytest.mark.parametrize("name", sorted(QUESTIONS))


@pytest.fixture(scope="module")
def model():
    return model_of("ffn")


@pytest.fixture(scope="module")
def base():
    return tiny("llama")


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@questions
def test_a_question_leaves_the_model_as_it_was(name, model):
    model.train()
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    out, before = logits(model.eval(), batch()), hooks(model)
    model.train()
    QUESTIONS[name](model, items(1))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(logits(model.eval(), batch()), out)
    assert hooks(model) == before


@questions
def test_a_model_without_a_mixture_is_refused(name, base):
    with pytest.raises(ConfigError, match="no mixture"):
        QUESTIONS[name](base, items(1))


@questions
def test_a_mixture_that_is_off_is_refused(name, model):
    with model.disable_adapter(), pytest.raises(ConfigError, match="switched off"):
        QUESTIONS[name](model, items(1))


@pytest.mark.parametrize("name", OF_LAYERS)
def test_an_unknown_layer_is_refused(name, model):
    with pytest.raises(ConfigError, match="no router at 'model.layers.1.mpl'; did you mean"):
        QUESTIONS[name](model, items(1), layers=["model.layers.1.mpl"])


@pytest.mark.parametrize("name", sorted(set(OF_LAYERS) - {"shapley"}))
def test_no_layer_is_refused(name, model):
    for none in ([], "model.layers.1.mlp"):
        with pytest.raises(ConfigError, match="non-empty list of names"):
            QUESTIONS[name](model, items(1), layers=none)


@pytest.mark.parametrize("name", OF_EXPERTS)
@pytest.mark.parametrize("wrong", [[4], [-1], [], [1, 1]])
def test_wrong_experts_are_refused(name, wrong, model):
    with pytest.raises(ConfigError, match="experts 0 to 3|non-empty list without repetition"):
        QUESTIONS[name](model, items(1), experts=wrong)


@pytest.mark.parametrize("name", OF_BATCHES)
def test_no_data_is_refused(name, model):
    with pytest.raises(ConfigError, match="data is empty"):
        QUESTIONS[name](model, [])
    with pytest.raises(ConfigError, match="these are texts"):
        QUESTIONS[name](model, TEXTS)


@pytest.mark.parametrize(
    "name", sorted(set(OF_BATCHES) - {"tag_information", "context_independence"})
)
def test_data_without_labels_is_refused(name, model):
    (item,) = items(1)
    with pytest.raises(ConfigError, match="no token of the data has a label"):
        QUESTIONS[name](model, [{**item, "labels": torch.full_like(item["input_ids"], -100)}])


@pytest.mark.parametrize("name", OF_BATCHES)
def test_batches_answer_as_what_they_were_read_from(name, model):
    assert QUESTIONS[name](model, read_batches(items(1))) == QUESTIONS[name](model, items(1))


def test_two_active_adapters_are_refused():
    model = model_of("layer", r=2)
    model.add_adapter("other", moe_config("layer"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="active together"):
        interpret.ablation(model, items(1))
    model.set_adapter("other")
    interpret.shapley(model, items(1))


def test_a_classifier_has_no_loss_per_token():
    base = tiny("llama", auto=transformers.AutoModelForSequenceClassification)
    model = adapt(base, moe_config("block", task_type="SEQ_CLS"))
    with pytest.raises(ConfigError, match="language model's loss"):
        interpret.ablation(model, items(1))
    assert interpret.tag_information(model, items(1)).permuted == "texts"
