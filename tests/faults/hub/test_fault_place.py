"""Case 105: a pinned revision, a subfolder and a private repository, for settings and weights."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from moeadapt.errors import ConfigError, HubError
from tests.faults.loading_kit import edit_tensors
from tests.hub.kit import (
    BASE,
    CARD,
    MANIFEST,
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
from tests.hub.repositories import Repository
from tests.tiny import adapt, batch, logits, moe_config, tiny


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "home", token=TOKEN) as hub:
        add_base(hub)
        yield hub


def doubled(tmp_path, **options):
    """Return the adapter with other weights."""
    folder = copied(tmp_path)
    return edit_tensors(folder, lambda t: {k: 2 * v for k, v in t.items()})


def answers(**where):
    return logits(AutoPeftModelForCausalLM.from_pretrained(REPO, **where).eval(), batch())


def expected():
    return logits(adapt(tiny("llama"), moe_config("block"), seed=1), batch())


def test_fault_105_a_pinned_revision_is_that_of_settings_and_weights(hub, tmp_path):
    first = pushed(shelf() / "adapter").commit
    second = pushed(doubled(tmp_path)).commit
    assert first != second
    assert torch.equal(answers(revision=first), expected())
    assert not torch.equal(answers(), expected())
    assert torch.equal(answers(), answers(revision=second))
    base = AutoModelForCausalLM.from_pretrained(BASE)
    assert torch.equal(
        logits(PeftModel.from_pretrained(base, REPO, revision=first).eval(), batch()), expected()
    )


def test_fault_105_a_branch_is_made_and_the_card_pins_it(hub, tmp_path):
    pushed(shelf() / "adapter")
    pushed(doubled(tmp_path), revision="v2")
    assert files_of(hub)[WEIGHTS] != files_of(hub, "v2")[WEIGHTS]
    assert 'revision="v2"' in files_of(hub, "v2")[CARD].decode()
    assert not torch.equal(answers(revision="v2"), answers())
    pushed(doubled(tmp_path / "again"), revision="v2", datasets=["ann/sums"])
    assert files_of(hub, "v2")[CARD].count(b"moeadapt:begin") == 1


def test_fault_105_a_pull_request_leaves_the_branch_as_it_is(hub, tmp_path):
    pushed(shelf() / "adapter")
    before = files_of(hub)
    result = pushed(doubled(tmp_path), create_pr=True)
    assert result.pull_request.endswith("/discussions/1")
    assert files_of(hub) == before
    assert files_of(hub, "refs/pr/1")[WEIGHTS] != before[WEIGHTS]
    with pytest.raises(ConfigError, match="opens a pull request against main"):
        pushed(shelf() / "adapter", create_pr=True, revision="v2")


@pytest.mark.parametrize("revision", ["", "..", "a b", "-x", "a/../b", "x" * 300])
def test_fault_105_what_is_no_branch_is_refused(hub, revision):
    hub.heal()
    with pytest.raises(ConfigError, match="must be the name of a branch"):
        pushed(shelf() / "adapter", revision=revision)
    assert hub.log == []


def test_fault_105_a_subfolder_holds_its_own_settings_and_weights(hub, tmp_path):
    pushed(doubled(tmp_path))
    inside = {f"sums/{n}": (shelf() / "adapter" / n).read_bytes() for n in (SETTINGS, WEIGHTS)}
    inside[f"sums/{MANIFEST}"] = (shelf() / "adapter" / MANIFEST).read_bytes()
    hub.repositories[REPO].add("main", "one more", inside)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = PeftModel.from_pretrained(base, REPO, subfolder="sums").eval()
    assert torch.equal(logits(model, batch()), expected())
    # Damage in the subfolder is seen there, although the adapter above it is whole.
    damage = {f"sums/{WEIGHTS}": files_of(hub)[WEIGHTS]}
    hub.repositories[REPO].add("main", "damage", damage)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    with pytest.raises(ConfigError, match="is not as it was saved"):
        PeftModel.from_pretrained(base, REPO, subfolder="sums")


def test_fault_105_a_private_repository_loads_with_its_token_alone(tmp_path):
    with connected(tmp_path / "home") as hub:
        add_base(hub)
        pushed(shelf() / "adapter", private=True, token=TOKEN)
        assert hub.repositories[REPO].private
        base = AutoModelForCausalLM.from_pretrained(BASE)
        model = PeftModel.from_pretrained(base, REPO, token=TOKEN).eval()
        assert torch.equal(logits(model, batch()), expected())
    with connected(tmp_path / "other") as other:
        other.repositories = hub.repositories
        base = AutoModelForCausalLM.from_pretrained(BASE)
        with pytest.raises((OSError, ValueError), match=REPO):
            PeftModel.from_pretrained(base, REPO)
        with pytest.raises(HubError, match="401: the hub does not accept the token"):
            pushed(shelf() / "adapter", token="hf_wrong")


def test_fault_105_private_files_do_not_go_into_a_public_repository(hub):
    hub.repositories[REPO] = Repository(private=False)
    with pytest.raises(ConfigError, match="exists and is public"):
        pushed(shelf() / "adapter", private=True)
    assert hub.calls("commit") == []
