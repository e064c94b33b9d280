"""The transcript of pushing in the docs is what the commands say today."""

import re

import pytest

from tests.hub.transcript import OUT, transcript


@pytest.mark.slow
def test_the_transcript_in_the_docs_is_what_the_commands_say():
    assert _masked(OUT.read_text(encoding="utf-8")) == _masked(transcript())


def _masked(text: str) -> str:
    """Return it without ids of commits and numbers of bytes, and the widths that these give."""
    text = re.sub(r"commit/[0-9a-f]{40}", "commit/ID", text)
    text = re.sub(r"[\d,]+ +│$", "N │", text, flags=re.MULTILINE)
    text = re.sub(r"[━ ]+(?=[┓┩┫])", "", text)
    return re.sub(r"│ bytes +|┃ bytes +┃", "┃ bytes ┃", text)
