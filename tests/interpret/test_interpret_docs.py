"""docs/interpret.md answers every question and says what it does not say.

Its examples run in tests/test_documents.py.
"""

import re
from pathlib import Path

from moeadapt import interpret

PAGE = (Path(__file__).parents[2] / "docs" / "interpret.md").read_text()


def test_every_question_has_a_section_and_a_limit():
    questions = {name for name in interpret.__all__ if name[0].islower()} - {"read_batches"}
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert {section.split("\n")[0] for section in sections} == questions
    for section in sections:
        assert "```python" in section
        assert "*Not said:*" in section
