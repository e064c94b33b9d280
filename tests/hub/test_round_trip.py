"""What was pushed loads by every entry point, from the repository alone, with the same answers."""

import json

import pytest
import torch
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

import moeadapt
from moeadapt.errors import MoeAdaptError
from tests.hub.kit import (
    BASE,
    CARD,
    REPO,
    SETTINGS,
    WEIGHTS,
    add_base,
    connected,
    copied,
    files_of,
    pushed,
    shelf,
)
from tests.hub.loopback import TOKEN
from tests.tiny import adapt, batch, logits, moe_config, tiny


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with connected(tmp_path_factory.mktemp("home"), token=TOKEN) as hub:
        add_base(hub)
        pushed(shelf() / "adapter", with_static_lora=True)
        yield hub


@pytest.fixture(scope="module")
def expected():
    return logits(adapt(tiny("llama"), moe_config("block"), seed=1), batch())


def by_peft():
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), REPO)


def by_checked():
    return moeadapt.load_adapter_checked(AutoModelForCausalLM.from_pretrained(BASE), REPO)


def natively():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.load_adapter(REPO)
    return model


WAYS = {
    "PeftModel": by_peft,
    "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(REPO),
    "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(REPO),
    "load_adapter": natively,
    "checked": by_checked,
    "snapshot": lambda: AutoPeftModelForCausalLM.from_pretrained(snapshot_download(REPO)),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_loads_from_the_hub_with_equal_answers(hub, expected, way):
    assert torch.equal(logits(WAYS[way]().eval(), batch()), expected)


def test_the_static_lora_loads_without_our_method(hub, expected):
    settings = json.loads(files_of(hub)[f"static-lora/{SETTINGS}"])
    assert settings["peft_type"] == "LORA"
    assert settings["base_model_name_or_path"] == BASE
    base = AutoModelForCausalLM.from_pretrained(BASE)
    before = logits(base, batch())
    model = PeftModel.from_pretrained(base, REPO, subfolder="static-lora").eval()
    found = logits(model, batch())
    assert not torch.allclose(found, before)
    assert not torch.allclose(found, expected)
    # The card's block does the same, and needs nothing above it.
    part = files_of(hub)[CARD].decode().partition("## Without moeadapt")[2]
    block = part.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(block, names)
    assert torch.equal(logits(names["model"].eval(), batch()), found)


def test_the_model_in_memory_is_pushed_like_its_folder(hub, expected):
    base = AutoModelForCausalLM.from_pretrained(shelf() / "base")
    model = PeftModel.from_pretrained(base, str(shelf() / "adapter"), adapter_name="sums")
    result = moeadapt.push(
        model, "ann/live", adapter="sums", base_model=BASE, license="mit", with_static_lora=True
    )
    assert f"static-lora/{WEIGHTS}" in result.files
    loaded = AutoPeftModelForCausalLM.from_pretrained("ann/live").eval()
    assert torch.equal(logits(loaded, batch()), expected)
    with pytest.raises(MoeAdaptError, match="no moeadapt adapter 'default'; it has \\['sums'\\]"):
        moeadapt.push(model, "ann/live", base_model=BASE, license="mit")
    with pytest.raises(MoeAdaptError, match="a LlamaForCausalLM cannot be published"):
        moeadapt.push(tiny("llama"), "ann/live", base_model=BASE, license="mit")


def test_a_push_of_less_removes_what_the_earlier_one_wrote(hub, tmp_path):
    folder = copied(tmp_path)
    (folder / "recipe.yaml").write_text("dataset_name: ann/sums\n")
    moeadapt.push(folder, "ann/less", base_model=BASE, license="mit", with_static_lora=True)
    assert "recipe.yaml" in files_of(hub, repo="ann/less")
    (folder / "recipe.yaml").unlink()
    hub.repositories["ann/less"].add("main", "by hand", {"notes.txt": b"mine"})
    result = moeadapt.push(folder, "ann/less", base_model=BASE, license="mit")
    assert result.deleted == ("recipe.yaml", f"static-lora/{SETTINGS}", f"static-lora/{WEIGHTS}")
    left = files_of(hub, repo="ann/less")
    assert left["notes.txt"] == b"mine"
    assert not set(result.deleted) & set(left)


def test_without_its_manifest_the_settings_still_know_the_size_of_the_base(hub, tmp_path):
    for name in (SETTINGS, WEIGHTS):
        (tmp_path / name).write_bytes(files_of(hub)[name])
    with pytest.warns(UserWarning, match="has no moeadapt_manifest.json"):
        PeftModel.from_pretrained(tiny("llama"), str(tmp_path))
    other = tiny("llama", num_hidden_layers=3)
    with pytest.raises(MoeAdaptError, match="made for num_hidden_layers 2, this base has 3"):
        PeftModel.from_pretrained(other, str(tmp_path))


def test_with_rows_the_static_lora_is_fitted_and_the_card_says_what_it_keeps(hub):
    rows = [{"text": f"w{i} w{i + 1} w{i + 2} w{i + 3}"} for i in range(40)]
    result = pushed(shelf() / "adapter", with_static_lora=True, data=rows, dry_run=True)
    assert "method `least_squares`" in result.card
    assert "Mean residual: 0." in result.card
    with pytest.raises(MoeAdaptError, match="give both or neither"):
        pushed(shelf() / "adapter", data=rows, dry_run=True)
