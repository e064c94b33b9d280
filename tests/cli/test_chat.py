"""`moeadapt chat`: in a pipe, as JSON, with commands, and with somebody at the keyboard."""

import json
import os
import signal

import pytest
import torch

from moeadapt.chat import Conversation, Sampling
from moeadapt.chat.conversation import Answer
from moeadapt.chat.routing import AnswerRouting
from moeadapt.cli.chat_loop import Loop, printable
from moeadapt.cli.chat_routing import print_routing, routing_json
from moeadapt.errors import ConfigError
from moeadapt.rows import read_rows
from tests.cli.calls import call
from tests.cli.world import ADAPTER, BASE, make_world
from tests.tiny import adapt, moe_config
from tests.toy import toy_tokenizer

SHORT = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = make_world(tmp_path_factory.mktemp("world"))
    before = os.getcwd()
    os.chdir(folder)
    model = adapt(AutoModelForCausalLM.from_pretrained(BASE), moe_config("block"))
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(ADAPTER)
    yield model
    os.chdir(before)


def chat(*args, said=""):
    return call("chat", ADAPTER, *SHORT, *args, input=said)


def test_each_line_of_a_pipe_is_answered_in_one_line(model):
    done = chat(said="w1 w2 w3\n\nw4\n")
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 2
    assert chat(said="w1 w2 w3\n\nw4").stdout == done.stdout
    assert chat("--seed", "1", said="w1 w2 w3\nw4\n").stdout != done.stdout


def test_json_is_one_object_per_answer(model):
    done = chat("--json", said="w1 w2 w3\nw4\n")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["message"] == "w1 w2 w3"
    assert first["answer"] == chat(said="w1 w2 w3\n").stdout.rstrip("\n")
    assert len(first["routing"]["tokens"]) == first["tokens"] == 6
    assert first["ended"] == "length"
    assert set(second["routing"]["layers"]) == {
        f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")
    }


def test_routing_shows_tokens_experts_and_layers(model):
    said = chat(said="w1 w2 w3\n/routing\n/routing 0\n/routing all\n").stdout
    assert "layer 2, model.layers.1.self_attn: each token and its main expert" in said
    assert "layer 0, model.layers.0.self_attn: each token and its main expert" in said
    assert said.count("effective experts") == 3
    assert said.count("of 4") == 12


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("/routing\n", "there is no answer yet"),
        ("w1\n/routing 9\n", "a number of a layer from 0 to 3, or all"),
        ("/rooting\n", "did you mean '/routing'?"),
        ("/save\n", "/save needs the name of a new file"),
        ("/save c.jsonl\n", "nothing to save"),
        (f"w1\n/save {BASE}\n", "exists"),
    ],
)
def test_a_wrong_command_in_a_pipe_ends_with_2(said, message, model):
    done = chat(said=said)
    assert done.exit_code == 2
    assert message in done.stderr


def test_what_was_said_is_saved_as_rows_that_can_be_read(model, tmp_path):
    path = tmp_path / "chat.jsonl"
    done = chat("--system", "w9", said=f"w1\nw2\n/save {path}\n/reset\nw3\n/quit\nw4\n")
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 3
    (row,) = read_rows(str(path))
    first, second, _ = done.stdout.splitlines()
    assert [one["content"] for one in row["messages"]] == ["w9", "w1", first, "w2", second]


def test_a_message_that_begins_with_a_slash_is_written_with_two(model):
    done = chat("--json", said="//w1\n")
    assert json.loads(done.stdout)["message"] == "/w1"


def test_a_base_model_answers_and_has_no_routing(model):
    done = call("chat", BASE, *SHORT, "--json", input="w1\n")
    assert json.loads(done.stdout)["routing"] is None
    done = call("chat", BASE, *SHORT, input="w1\n/routing\n")
    assert done.exit_code == 2
    assert "no routers of moeadapt" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--base", "x"], "--base belongs to an adapter"),
        (["--raw", "--system", "x"], "--system belongs to the chat template"),
        (["--dtype", "int3"], "one of"),
        (["--device", "nonsense"], "--device nonsense"),
    ],
)
def test_options_that_nobody_looks_at_are_refused(args, message, model):
    done = call("chat", BASE, *args, input="w1\n")
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_folder_with_no_model_is_refused(model, tmp_path):
    done = call("chat", tmp_path, input="w1\n")
    assert done.exit_code == 2
    assert "neither adapter_config.json" in done.stderr


class Keyboard:
    """Types lines; an exception is pressed."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


@pytest.fixture
def sit_down(model, monkeypatch):
    def start(*lines, tokens=6):
        sampling = Sampling(max_new_tokens=tokens, temperature=0.0)
        talk = Conversation(model, toy_tokenizer(), sampling=sampling)
        monkeypatch.setattr("builtins.input", Keyboard(*lines))
        loop = Loop(talk, as_json=False, interactive=True)
        loop.run()
        return loop, talk

    return start


def test_mistakes_and_ctrl_c_at_the_prompt_do_not_end_it(sit_down, capsys):
    _, talk = sit_down("/rooting", KeyboardInterrupt(), "w1 w2")
    said = capsys.readouterr()
    assert "did you mean '/routing'?" in said.err
    assert "Ctrl-D or /quit ends" in said.err
    assert said.out.splitlines()[0] == talk.messages[-1]["content"]


def test_ctrl_c_stops_an_answer_and_not_the_program(sit_down, capsys, monkeypatch):
    pressed = []

    def press(text):
        if not pressed:
            pressed.append(os.kill(os.getpid(), signal.SIGINT))

    monkeypatch.setattr("moeadapt.cli.chat_loop._print_piece", press)
    before = signal.getsignal(signal.SIGINT)
    loop, talk = sit_down("w1 w2 w3", "w4 w5 w6", tokens=40)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(talk.messages) == 4
    assert "[stopped]" in capsys.readouterr().err
    assert loop.last.ended != "stopped"
    assert len(talk.messages[1]["content"]) < len(talk.messages[3]["content"])


def test_a_second_ctrl_c_interrupts(sit_down, monkeypatch):
    def press(text):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("moeadapt.cli.chat_loop._print_piece", press)
    with pytest.raises(KeyboardInterrupt):
        sit_down("w1 w2 w3")


def test_quit_ends_and_help_lists_every_command(sit_down, capsys):
    sit_down("/help", "/quit", "w1")
    said = capsys.readouterr()
    assert said.out == ""
    for command in ("/routing", "/reset", "/save", "/help", "/quit"):
        assert command in said.err


def test_an_answer_cannot_command_the_terminal():
    said = printable("a\x1b[2Jb\x07\n\tc\x9b31m")
    assert said == "a\u241b[2Jb\u2407\n\tc\N{REPLACEMENT CHARACTER}31m"


def test_json_of_an_answer_without_routing_is_not_asked_for(model):
    talk = Conversation(model, toy_tokenizer(), sampling=Sampling(max_new_tokens=2))
    answer = talk.ask("w1")
    assert list(routing_json(answer)) == ["layers", "layer", "tokens"]
    with pytest.raises(ConfigError, match="leave /routing out"):
        Loop(talk, as_json=True, interactive=False)._handle("/routing")


def test_an_answer_whose_tokens_used_no_expert_can_be_shown(capsys):
    routing = AnswerRouting(names=("layer",), weights=(torch.zeros(2, 3),))
    tokens = ["w1", "w2"]
    answer = Answer(text="w1 w2", tokens=tokens, ended="length", seconds=0.1, routing=routing)
    print_routing(answer, "")
    text = capsys.readouterr().out
    assert "w1-" in text
    assert "0.00" in text
    assert [one["expert"] for one in routing_json(answer)["tokens"]] == [None, None]
