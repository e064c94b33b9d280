"""A saved adapter to damage, every way to load it, and the proof that a refusal touched no base."""

import atexit
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from moeadapt.adapter_format.manifest import write_manifest
from moeadapt.errors import AdapterFileError, ConfigError
from tests.tiny import adapt, batch, logits, moe_config, tiny
from tests.toy import toy_tokenizer

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MANIFEST = "moeadapt_manifest.json"
PREFIX = "base_model.model.model.layers.0."
A = PREFIX + "self_attn.q_proj.moeadapt_lora_A.weight"
ROUTER = PREFIX + "self_attn.q_proj.moeadapt_router.weight"


@cache
def shelf() -> Path:
    """Return a folder with `base` and `adapter`, made once."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny("llama").save_pretrained(folder / "base")
    toy_tokenizer().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapt(base, moe_config("block"), seed=1).save_pretrained(folder / "adapter")
    return folder


def base_model() -> PreTrainedModel:
    """Build the base that the adapter was trained on."""
    return tiny("llama")


@cache
def expected_logits() -> Tensor:
    """What the base computes with the saved adapter, over `batch()`."""
    return logits(adapt(base_model(), moe_config("block"), seed=1), batch())


def fresh(tmp_path: Path) -> Path:
    """Return a copy of the saved adapter that may be damaged."""
    folder = tmp_path / "adapter"
    shutil.copytree(shelf() / "adapter", folder)
    return folder


# --- damage


def reseal(folder: Path) -> None:
    """Make the manifest fit the files again, so that it is not what refuses them."""
    base = json.loads((folder / MANIFEST).read_text())["base"]
    write_manifest(folder, base)


def edit_settings(folder: Path, **fields: Any) -> Path:
    """Set fields of adapter_config.json; the manifest fits."""
    path = folder / SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}, indent=2))
    reseal(folder)
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Change the dictionary of tensors, in place or by returning another; the manifest fits."""
    tensors = load_file(folder / WEIGHTS)
    changed = change(tensors)
    tensors = tensors if changed is None else changed
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    reseal(folder)
    return folder


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the header as JSON, or give its text; the manifest fits."""
    raw = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    text = change(header) or header
    new = text if isinstance(text, bytes) else json.dumps(text).encode()
    (folder / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])
    reseal(folder)
    return folder


# --- ways to load


def by_from_pretrained(base: PreTrainedModel, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, str(folder))


def by_load_adapter(base: PreTrainedModel, folder: Path) -> nn.Module:
    """Load it beside an adapter that is there already."""
    model = PeftModel.from_pretrained(base, str(shelf() / "adapter"), "first")
    model.load_adapter(str(folder), "second")
    model.set_adapter("second")
    return model


def by_replacing(base: PreTrainedModel, folder: Path) -> nn.Module:
    """Load it into an adapter of the same name, as a resumed training does."""
    model = PeftModel.from_pretrained(base, str(shelf() / "adapter"))
    model.load_adapter(str(folder), "default")
    return model


def natively(base: PreTrainedModel, folder: Path) -> nn.Module:
    base.load_adapter(str(folder))
    return base


def by_auto_model(base: PreTrainedModel, folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(str(folder))


def by_given_settings(base: PreTrainedModel, folder: Path) -> nn.Module:
    """Load it with settings from the caller, not the folder."""
    return PeftModel.from_pretrained(base, str(folder), config=moe_config("block"))


WAYS = (by_from_pretrained, by_load_adapter, natively, by_auto_model)
"""Ways that read the settings of the folder."""


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copy every tensor."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(base: PreTrainedModel, before: dict[str, Tensor]) -> None:
    """Assert that the base's own weights are bitwise those before, whatever stands around them."""
    plain = {n.replace(".base_layer.", "."): t for n, t in base.state_dict().items()}
    changed = [n for n, t in before.items() if not torch.equal(plain[n], t)]
    assert not changed


@contextmanager
def refusal(match: str, error: type[Exception] = AdapterFileError) -> Iterator[None]:
    with pytest.raises(error, match=f"(?s){match}"):
        yield


def assert_refused(
    folder: Path, match: str, error: type[Exception] = ConfigError, cli: bool = True
) -> None:
    """Assert that every way to load refuses with words that match, and leaves the base alone."""
    for way in WAYS:
        base = base_model()
        before = state(base)
        with refusal(match, error):
            way(base, folder)
        assert_untouched(base, before)
        if way is not by_load_adapter:
            assert not any("moeadapt" in name for name, _ in base.named_modules())
    if cli:
        code, words = by_cli(folder)
        assert code == 2, words
        with refusal(match, error):
            raise error(words)


def by_cli(folder: Path) -> tuple[int, str]:
    """Run a verb that loads an adapter; return its exit code and what it said."""
    from moeadapt.cli import split

    app = typer.Typer()
    split.add_to(app)
    out = folder.parent / "experts"
    command = [str(folder), "--base", str(shelf() / "base"), "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 or not out.exists()
    shutil.rmtree(out, ignore_errors=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stderr


def assert_loads(folder: Path, expected: Tensor | None = None) -> None:
    """Assert that every way to load gives a model with these outputs, bitwise."""
    expected = expected_logits() if expected is None else expected
    for way in WAYS:
        assert torch.equal(logits(way(base_model(), folder).eval(), batch()), expected), way


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
