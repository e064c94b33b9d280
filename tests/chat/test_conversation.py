"""A conversation: the same answers again, streamed, stopped, remembered, and its routing."""

import pytest
import torch

import moeadapt
from moeadapt.chat import Conversation, Sampling
from moeadapt.errors import ConfigError, UnsupportedError
from tests.tiny import adapt, moe_config, tiny
from tests.toy import WORDS, toy_tokenizer

CONTEXT = 256
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


def base_model(**fields):
    return tiny("llama", vocab_size=len(WORDS) + 4, max_position_embeddings=CONTEXT, **fields)


@pytest.fixture(scope="module")
def model():
    return adapt(base_model(), moe_config("block"))


def talk(model, sampling=GREEDY, **options):
    return Conversation(model, toy_tokenizer(), sampling=sampling, **options)


def test_the_same_seed_gives_the_same_answers_and_another_one_others(model):
    def answers(seed):
        chat = talk(model, Sampling(max_new_tokens=12, temperature=1.0, seed=seed))
        return [chat.ask("w1 w2 w3").text for _ in range(2)]

    torch.manual_seed(1)
    first = answers(0)
    torch.manual_seed(2)
    assert answers(0) == first
    assert answers(1) != first
    assert first[0] != first[1]


def test_an_answer_draws_nothing_from_the_global_generator(model):
    torch.manual_seed(0)
    talk(model, Sampling(max_new_tokens=3, temperature=1.0)).ask("w1")
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_the_pieces_are_the_answer(model):
    pieces = []
    answer = talk(model).ask("w1 w2 w3", pieces.append)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 1
    assert len(answer.tokens) == 12
    assert answer.ended == "length"


def test_the_routing_is_that_of_the_forwards_that_gave_each_token(model):
    chat, tokenizer = talk(model), toy_tokenizer()
    answer = chat.ask("w1 w2 w3")
    ids = tokenizer.apply_chat_template(
        chat.messages[:1], add_generation_prompt=True, return_dict=False
    )
    said = tokenizer.convert_tokens_to_ids(answer.tokens)
    with moeadapt.collect_routing(model) as routings, torch.no_grad():
        model(input_ids=torch.tensor([[*ids, *said]]))
    assert answer.routing is not None
    assert answer.routing.names == tuple(routings)
    for name, weights in zip(answer.routing.names, answer.routing.weights, strict=True):
        expected = routings[name][0].weights[len(ids) - 1 : -1]
        torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-4)


def test_the_use_of_a_layer_counts_slots(model):
    routing = talk(model).ask("w1 w2 w3").routing
    use = routing.use(0)
    assert sum(use.load) == pytest.approx(1.0)
    assert use.active == 2.0
    assert 1.0 <= use.effective_experts <= 4.0
    experts, shares = routing.main(0)
    assert torch.equal(experts, routing.weights[0].argmax(-1))
    assert bool((shares > 1 / 2 - 1e-6).all())


def test_layers_may_have_different_numbers_of_experts():
    model = adapt(base_model(), moe_config("layer", experts_pattern=[2, 4]))
    routing = talk(model).ask("w1 w2").routing
    assert {weights.shape[-1] for weights in routing.weights} == {2, 4}


def test_a_base_model_has_no_routing():
    assert talk(base_model()).ask("w1").routing is None


def test_it_remembers_and_forgets(model):
    chat = talk(model, system="w9")
    first = chat.ask("w1 w2 w3").text
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system", "user", "assistant"]
    assert chat.rows() == [{"messages": chat.messages}]
    chat.ask("w1 w2 w3")
    chat.reset()
    assert [message["role"] for message in chat.messages] == ["system"]
    assert chat.rows() == []
    assert chat.ask("w1 w2 w3").text == first


def test_a_stopped_answer_is_kept_as_far_as_it_went(model):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 3

    chat = talk(model)
    answer = chat.ask("w1 w2 w3", stop=stop)
    assert answer.ended == "stopped"
    assert len(answer.tokens) == 3
    assert chat.messages[-1]["content"] == answer.text


def test_raw_text_is_continued_without_memory(model):
    chat = talk(model, raw=True)
    first = chat.ask("w1 w2 w3").text
    assert chat.ask("w1 w2 w3").text == first
    assert chat.rows() == [{"prompt": "w1 w2 w3", "completion": first}] * 2
    assert chat.messages == []


def test_a_full_context_cuts_the_answer_and_then_refuses(model):
    chat = talk(model, Sampling(max_new_tokens=100, temperature=0.0))
    answer = chat.ask(" ".join(WORDS[:99] * 2 + WORDS[:50]))
    assert answer.ended in ("context", "end")
    before = list(chat.messages)
    with pytest.raises(ConfigError, match=f"reads at most {CONTEXT}; /reset"):
        chat.ask("w1 " * 20)
    assert chat.messages == before


def test_a_router_that_looks_ahead_is_refused_and_nothing_is_remembered():
    model = adapt(base_model(), moe_config("block", router="expert_choice"))
    chat = talk(model)
    with pytest.raises(UnsupportedError):
        chat.ask("w1")
    assert chat.messages == []


def test_what_no_answer_can_be_made_with_is_refused(model):
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template.*--raw"):
        Conversation(model, tokenizer)
    with pytest.raises(ConfigError, match="system message"):
        talk(model, raw=True, system="w1")
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(ConfigError):
            Sampling(**wrong)


def test_what_the_template_refuses_is_told(model):
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="roles must alternate"):
        Conversation(model, tokenizer).ask("w1")
