"""Fine-tuned copies are experts of one mixture only if they compute alike."""

import pytest
from transformers import AutoConfig

from moeadapt.errors import ConfigError
from moeadapt.export.adapted_source import open_variant
from moeadapt.export.source import open_source
from moeadapt.export.upcycle import upcycle
from tests.export.bases import base

OTHER = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 1e-2,
    "hidden_act": "gelu",
    "sliding_window": 5,
}


@pytest.mark.parametrize("setting", OTHER)
def test_a_copy_that_computes_otherwise_is_refused(setting, tmp_path):
    name = "mistral, window" if setting == "sliding_window" else "llama"
    base(name).save_pretrained(tmp_path / "base")
    base(name, **{setting: OTHER[setting]}).save_pretrained(tmp_path / "copy")
    with pytest.raises(ConfigError, match=f"computes otherwise than the base: {setting}="):
        upcycle(tmp_path / "base", tmp_path / "moe", sources=[tmp_path / "copy"] * 2)
    assert not (tmp_path / "moe").exists()


def test_bookkeeping_may_differ(tmp_path):
    base("llama").save_pretrained(tmp_path / "base")
    copy = base("llama", seed=1, max_position_embeddings=512, attention_dropout=0.1)
    copy.config.eos_token_id = 7
    copy.bfloat16().save_pretrained(tmp_path / "copy")
    assert AutoConfig.from_pretrained(tmp_path / "copy").eos_token_id == 7
    open_variant(open_source(tmp_path / "base"), tmp_path / "copy")
