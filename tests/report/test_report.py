"""`moeadapt.report` checks first, measures, and hands the numbers to what draws them."""

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

import moeadapt
from moeadapt.cli.adapters import to_device
from moeadapt.cli.report import texts_by_domain
from moeadapt.errors import ConfigError
from tests.report.mixtures import FEW, TOKENIZER, mixture, two_domains
from tests.report.test_training_log import write
from tests.tiny import adapt, moe_config, saved_base
from tests.toy import sentences, toy_tokenizer


@pytest.fixture
def drawn(monkeypatch):
    """Put a stand-in in the place of what draws; return what it was called with."""
    calls = []

    def render(data, out):
        calls.append((data, out))
        out.write_text("page")
        return [out]

    module = ModuleType("moeadapt.report.render")
    module.render = render
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.fixture(scope="module")
def model():
    return mixture()


def test_a_report_is_measured_and_drawn(model, drawn, tmp_path):
    out = tmp_path / "deep" / "page.html"
    log = write(tmp_path)
    found = moeadapt.report(
        model, TOKENIZER, two_domains(3), out, training_log=log, title="mine", **FEW
    )
    assert found.files == (out,)
    assert drawn == [(found.data, out)]
    assert found.data.title == "mine"
    assert [point.step for point in found.data.training] == [5, 10, 20]
    assert len(found.data.arms) == 6


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("page.txt", "must end in .html"),
        ("folder.html", "is a folder"),
        ("file/page.html", "which is a file"),
        ("mine.html", "is no report of moeadapt"),
    ],
)
def test_a_wrong_place_is_refused_before_anything_is_measured(model, drawn, tmp_path, out, message):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "mine.html").write_text("my own page")
    with pytest.raises(ConfigError, match=message):
        moeadapt.report(model, TOKENIZER, two_domains(3), tmp_path / out)
    assert not drawn


def test_wrong_texts_and_models_are_refused(model, drawn, tmp_path):
    out = tmp_path / "page.html"
    with pytest.raises(ConfigError, match="empty"):
        moeadapt.report(model, TOKENIZER, {}, out)
    with pytest.raises(ConfigError, match="needs the PeftModel"):
        moeadapt.report(model.get_base_model(), TOKENIZER, {"a": ["w1 w2"]}, out)
    with pytest.raises(ConfigError, match="no moeadapt adapter 'b'"):
        moeadapt.report(model, TOKENIZER, {"a": ["w1 w2"]}, out, adapter="b")
    assert not out.exists()


def test_a_missing_library_is_named(model, monkeypatch, tmp_path):
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "moeadapt.report.render":
                raise ModuleNotFoundError("No module named 'altair'", name="altair")

    monkeypatch.delitem(sys.modules, "moeadapt.report.render", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ConfigError, match=r"needs altair; install it with pip install 'moeadapt"):
        moeadapt.report(model, TOKENIZER, {"a": ["w1 w2"]}, tmp_path / "page.html")


# --- the verb


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("cli")
    base = saved_base("llama", folder)
    toy_tokenizer().save_pretrained(base)
    model = adapt(AutoModelForCausalLM.from_pretrained(base), moe_config("block"))
    model.save_pretrained(str(folder / "adapter"))
    rows = [{"text": text, "domain": "ab"[i % 2]} for i, text in enumerate(sentences(8))]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


CASES = {
    "words": "{adapter} --data {rows} --out {out} --log {folder}",
    "json": "{adapter} --data {rows} --out {out} --max-texts 2 --max-length 3 --json",
    "no file": "none --data nowhere.jsonl",
    "no page": "none --data {rows} --out page.pdf",
    "no log": "none --data {rows} --log nowhere",
    "no device": "{adapter} --data {rows} --out {out} --device tpu9",
    "no texts": "none --data {rows} --max-texts 0",
}

# In a process of its own, as the command line is not made for the run-time type checks; one for
# all cases, since most of its time is spent on imports.
SCRIPT = """
import json, sys
from types import ModuleType
from typer.testing import CliRunner
from moeadapt.cli import app

drawn = []
def render(data, out):
    drawn.append([data.title, data.domains, data.texts_per_domain, len(data.training)])
    return [out]

module = ModuleType("moeadapt.report.render")
module.render = render
sys.modules[module.__name__] = module
found = {}
for name, args in json.loads(sys.argv[1]).items():
    done = CliRunner().invoke(app, ["report", *args.split()])
    found[name] = [done.exit_code, done.stdout, done.stderr]
print("FOUND" + json.dumps([found, drawn]))
"""


@pytest.fixture(scope="module")
def verb(folder):
    write(folder)
    places = {"adapter": folder / "adapter", "rows": folder / "rows.jsonl", "folder": folder}
    cases = {name: args.format(out=folder / "p.html", **places) for name, args in CASES.items()}
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("FOUND")[2])


def test_the_verb_prints_verdicts_and_files(verb, folder):
    code, stdout, stderr = verb[0]["words"]
    assert code == 0, stderr
    for words in ("balanced: ", "specialised: ", "used: ", "worth it: ", "wrote "):
        assert words in stdout
    assert str(folder / "p.html") in stdout
    assert verb[1][0] == ["adapter", ["a", "b"], [4, 4], 3]


def test_the_verb_prints_json(verb, folder):
    code, stdout, stderr = verb[0]["json"]
    assert code == 0, stderr
    found = json.loads(stdout[stdout.index("{") :])
    assert found["verdicts"][0]["name"] == "balanced"
    assert found["files"] == [str(folder / "p.html")]
    assert found["tokens"] == 4 * 3
    assert verb[1][1][2] == [2, 2]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no file", "cannot read nowhere.jsonl"),
        ("no page", "must end in .html"),
        ("no log", "nowhere does not exist"),
        ("no texts", "--max-texts 0"),
    ],
)
def test_wrong_input_exits_with_2_before_the_model_is_loaded(verb, case, message):
    code, _, stderr = verb[0][case]
    assert code == 2
    assert message in stderr


def test_a_device_that_is_not_there_is_refused(verb):
    code, _, stderr = verb[0]["no device"]
    assert code == 2
    assert "--device tpu9" in stderr


@pytest.mark.parametrize(("gpu", "place"), [(True, "cuda"), (False, "cpu")])
def test_the_model_goes_to_a_gpu_if_there_is_one(monkeypatch, gpu, place):
    went = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    to_device(SimpleNamespace(to=went.append), "auto")
    assert went == [place]


def test_rows_become_texts_by_domain():
    rows = [
        {"text": "w1 w2", "domain": "b"},
        {"prompt": "w3 ", "completion": "w4"},
        {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]},
        {"text": "w7", "domain": "b"},
    ]
    found = texts_by_domain(rows, TOKENIZER)
    assert found == {"b": ["w1 w2", "w7"], "other": ["w3 w4", "w5 w6 </s> "]}
    assert texts_by_domain(rows, TOKENIZER, 1) == {"b": ["w1 w2"], "other": ["w3 w4"]}
    assert texts_by_domain(rows[1:2], TOKENIZER) == {"all": ["w3 w4"]}


def test_a_first_token_of_the_template_is_not_doubled():
    class Tokenizer:
        chat_template, bos_token, bos_token_id = "yes", "<s>", 1

        def __init__(self, adds):
            self.adds = adds

        def __call__(self, text):
            return {"input_ids": [1] * self.adds}

        def apply_chat_template(self, messages, tokenize):
            return "<s>" + messages[0]["content"]

    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    assert texts_by_domain(rows, Tokenizer(1)) == {"all": ["hello"]}
    assert texts_by_domain(rows, Tokenizer(0)) == {"all": ["<s>hello"]}


def test_messages_need_a_template():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        texts_by_domain([{"messages": [{"role": "user", "content": "w1"}]}], tokenizer)
