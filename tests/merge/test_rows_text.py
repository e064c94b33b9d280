"""Strings that are no text are refused where they stand."""

import pytest

from moeadapt.errors import ConfigError
from moeadapt.rows import read_rows


def test_half_a_surrogate_pair_is_named_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{"text": "bad \\ud800 cat"}\n')
    with pytest.raises(ConfigError, match=r"rows.jsonl:2: text holds half of a surrogate pair"):
        read_rows(str(path))
