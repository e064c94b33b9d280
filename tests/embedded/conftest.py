"""Tiny files that stand in for the real model, and a cache of each test's own."""

from dataclasses import replace
from pathlib import Path

import pytest

from moeadapt.embedded import model as model_module
from tests.embedded.tiny_gguf import TinyFile, write_gguf

NAME = "embedded:smollm2-135m"


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def either_file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TinyFile:
    """A file whose output head is, or is not, the embedding."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tied=request.param)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> TinyFile:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tied=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no GGUF supplied by whoever runs the tests."""
    monkeypatch.setenv("MOEADAPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MOEADAPT_SMOLLM2_GGUF", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def supplied(tiny_file: TinyFile, cache: Path, monkeypatch: pytest.MonkeyPatch) -> TinyFile:
    """The tiny file stands in for the real one, supplied by hand, with a matching checksum."""
    monkeypatch.setenv("MOEADAPT_SMOLLM2_GGUF", str(tiny_file.path))
    stand_in = replace(model_module.MODELS[NAME], sha256=tiny_file.sha256)
    monkeypatch.setitem(model_module.MODELS, NAME, stand_in)
    return tiny_file
