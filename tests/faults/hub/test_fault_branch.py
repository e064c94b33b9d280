"""Case 105, branches: one that is made holds what main holds, and is guarded as main is."""

import pytest

from moeadapt.errors import AdapterFileError, ConfigError, HubError
from moeadapt.hub.client import Remote
from tests.hub.kit import CARD, MANIFEST, REPO, connected, copied, files_of, json_of, pushed, shelf
from tests.hub.loopback import TOKEN
from tests.hub.repositories import Repository


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "home", token=TOKEN) as hub:
        yield hub


def add(hub, **files):
    """Commit to main by hand; `__` in a name is a dot."""
    changes = {name.replace("__", "."): content for name, content in files.items()}
    hub.repositories.setdefault(REPO, Repository()).add("main", "by hand", changes)


def test_fault_105_a_new_branch_keeps_the_owners_text_and_drops_what_is_stale(hub, tmp_path):
    folder = copied(tmp_path)
    (folder / "recipe.yaml").write_text("dataset_name: ann/sums\n")
    pushed(folder)
    add(hub, README__md=files_of(hub)[CARD] + b"\n## Mine\n", notes__txt=b"mine")
    (folder / "recipe.yaml").unlink()
    result = pushed(folder, revision="v2")
    there = files_of(hub, "v2")
    assert b"## Mine" in there[CARD]
    assert there["notes.txt"] == b"mine"
    assert result.deleted == ("recipe.yaml",)
    assert "recipe.yaml" not in {*there, *json_of(there[MANIFEST])["files"]}
    assert "recipe.yaml" in files_of(hub)
    repository = hub.repositories[REPO]
    assert repository.at("v2").parent == repository.branches["main"]


def test_fault_105_the_guards_hold_for_a_new_branch(hub):
    add(hub, adapter_config__json=b"{}")
    with pytest.raises(ConfigError, match="which moeadapt did not write"):
        pushed(shelf() / "adapter", revision="v2")
    assert not hub.calls("branch", "commit")


@pytest.mark.parametrize("at", ["main", "v2"])
def test_fault_105_a_change_in_between_is_not_overwritten(hub, monkeypatch, at):
    pushed(shelf() / "adapter")
    state = Remote.state

    def late(self, revision):
        found, repository = state(self, revision), hub.repositories[REPO]
        repository.branches[at] = repository.branches["main"]
        repository.add(at, "by hand", {CARD: b"# meanwhile\n"})
        return found

    monkeypatch.setattr(Remote, "state", late)
    if at == "v2":
        with pytest.raises(HubError, match="409: somebody else changed"):
            pushed(shelf() / "adapter", revision="v2")
        assert files_of(hub, "v2")[CARD] == b"# meanwhile\n"
    else:  # the branch starts where it was looked at
        pushed(shelf() / "adapter", revision="v2")
        assert b"meanwhile" not in files_of(hub, "v2")[CARD]
        assert files_of(hub)[CARD] == b"# meanwhile\n"


@pytest.mark.parametrize("new", [True, False])
def test_fault_100_a_branch_that_was_made_is_said(hub, new):
    if not new:
        pushed(shelf() / "adapter")
    hub.fail("commit", status=500)
    with pytest.raises(HubError, match="the branch v2 was made and holds what main") as caught:
        pushed(shelf() / "adapter", revision="v2")
    assert ("the repository was made and is empty" in str(caught.value)) == new
    assert "nothing in the repository" not in str(caught.value)
    assert "v2" in hub.repositories[REPO].branches


# --- what moeadapt did not write


OWN = {
    "recipe.yaml": ("seed: 1\n", b"# mine\n"),
    "tokenizer_config.json": ("{}", b'{"mine": 1}'),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("before", [True, False])
def test_fault_102_a_file_of_the_owner_is_replaced_with_overwrite_alone(
    hub, tmp_path, name, before
):
    content, mine = OWN[name]
    if before:
        pushed(shelf() / "adapter")
    add(hub, **{name.replace(".", "__"): mine})
    folder = copied(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=f"holds {name}, which moeadapt did not write"):
        pushed(folder)
    assert files_of(hub)[name] == mine
    pushed(folder, overwrite=True)
    assert files_of(hub)[name] == content.encode()
    (folder / name).write_text(content + " ")  # ours now
    pushed(folder)


def test_fault_102_equal_files_are_no_problem(hub, tmp_path):
    folder, base = copied(tmp_path), str(shelf() / "base")
    recipe = f"model_name_or_path: {base}\n"
    for name, content in (("tokenizer_config.json", "{}"), ("recipe.yaml", recipe)):
        (folder / name).write_text(content)
        add(hub, **{name.replace(".", "__"): content.encode()})
    pushed(folder)  # the recipe is the folder's, and gets the base's id
    assert base.encode() not in files_of(hub)["recipe.yaml"]


# --- what is no broken connection


def test_fault_102_a_card_that_is_no_utf_8_is_refused_as_such(hub):
    add(hub, README__md=b"# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"README.md of ann/math: is not UTF-8 at byte 5"):
        pushed(shelf() / "adapter")
    assert files_of(hub)[CARD] == b"# caf\xe9\n"


@pytest.mark.parametrize("fault", [{"status": 500}, {"cut": True}])
def test_fault_102_a_card_that_cannot_be_read_is_not_taken_for_none(hub, fault):
    add(hub, README__md=b"# mine\n")
    hub.fail("resolve", **fault)
    with pytest.raises(HubError, match="cannot read README.md of ann/math"):
        pushed(shelf() / "adapter")
    assert files_of(hub)[CARD] == b"# mine\n"


def test_fault_100_a_file_that_vanishes_here_is_no_fault_of_the_hub(hub, tmp_path, monkeypatch):
    folder = copied(tmp_path)
    weights = folder / "adapter_model.safetensors"
    make = Remote._make

    def late(self, *arguments):
        done = make(self, *arguments)
        weights.unlink()
        return done

    monkeypatch.setattr(Remote, "_make", late)
    with pytest.raises(AdapterFileError, match=r"safetensors: No such file.*cannot push to ann"):
        pushed(folder)
    with pytest.raises(AdapterFileError, match="is not a file.*Nothing was sent"):
        remote = Remote(REPO)
        remote.commit(
            {"x": weights},
            (),
            remote.state(None),
            message="x",
            revision=None,
            create_pr=False,
            private=None,
        )
