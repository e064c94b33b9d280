"""What is counted here is what a GPU would be asked for."""

import pytest

from moeadapt.dispatch.slot_rows import MaskedRows


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("moeadapt.dispatch.activation.rows_for", lambda _: MaskedRows)
    monkeypatch.setattr("moeadapt.routing._FEWEST_PASSES", 0)
