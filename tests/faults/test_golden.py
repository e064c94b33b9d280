"""Adapters of every format that was ever released: case 37."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import PreTrainedModel

from moeadapt.version import FORMAT_VERSION
from tests.faults.golden.make import base

GOLDEN = Path(__file__).parent / "golden"
ADAPTERS = sorted(path.parent for path in GOLDEN.glob("*/*/adapter_config.json"))


def old_base(folder: Path) -> PreTrainedModel:
    model = base()
    model.load_state_dict(load_file(folder.parent / "base.safetensors"))
    return model


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda path: f"{path.parent.name}-{path.name}")
@pytest.mark.parametrize("natively", [False, True])
def test_fault_037_an_adapter_of_an_older_release_computes_what_it_did(folder, natively):
    stored = load_file(folder.parent / "expected.safetensors")
    model = old_base(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        if natively:
            model.load_adapter(str(folder))
        else:
            model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        logits = model.eval()(input_ids=stored["input_ids"]).logits
        plain = old_base(folder)(input_ids=stored["input_ids"]).logits
    # Other processors and releases of torch add up in another order.
    assert_close(logits, stored[folder.name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, stored[folder.name], atol=1e-1)


def test_fault_037_every_format_has_its_golden_adapters_and_they_are_small():
    names = {path.parent.name for path in ADAPTERS}
    assert names == {f"format_{i}" for i in range(1, FORMAT_VERSION + 1)}
    sizes = [path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(sizes) < 100_000 * FORMAT_VERSION
