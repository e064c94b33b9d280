"""The examples of docs/interpret.md run, from top to bottom, on a saved adapter."""

import re
from pathlib import Path

from moeadapt import interpret
from tests.tiny import adapt, moe_config, saved_base
from tests.toy import toy_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "interpret.md").read_text()


def test_every_question_has_a_section_and_a_limit():
    questions = {name for name in interpret.__all__ if name[0].islower()} - {"read_batches"}
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert {section.split("\n")[0] for section in sections} == questions
    for section in sections:
        assert "```python" in section
        assert "*Not said:*" in section


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    import transformers

    base = saved_base("llama", tmp_path)
    toy_tokenizer().save_pretrained(tmp_path / "my-adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapt(model, moe_config("ffn")).save_pretrained(tmp_path / "my-adapter")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/interpret.md", "exec"), names)
    assert "expert_3" in capsys.readouterr().out
