"""Cases 103 and 104: no path, no name of a user and no token in anything that leaves or is said."""

import io
import json
import logging
import traceback
from pathlib import Path
from tempfile import gettempdir

import pytest
from safetensors.torch import load_file, save_file

from moeadapt.errors import ConfigError, HubError
from moeadapt.hub.private import check_private, with_base
from tests.faults.loading_kit import edit_settings, reseal
from tests.hub.kit import BASE, CARD, REPO, WEIGHTS, connected, copied, files_of, pushed, shelf
from tests.hub.loopback import TOKEN


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "home", token=TOKEN) as hub:
        yield hub


def assert_nothing_of(word, hub):
    for name, content in {**files_of(hub), **hub.uploaded}.items():
        assert word.encode() not in content, name


@pytest.mark.parametrize("named", [None, "", "./base", "../x", "C:\\models\\base", "a/b/c", "a b"])
def test_fault_103_a_base_without_an_id_is_asked_for(hub, tmp_path, named):
    folder = edit_settings(copied(tmp_path), base_model_name_or_path=named)
    with pytest.raises(ConfigError, match="--base-model owner/name"):
        pushed(folder, base_model=None)
    assert hub.log == []


def test_fault_103_the_path_of_a_base_is_in_no_file(hub):
    place = str(shelf())
    settings = json.loads((shelf() / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == f"{place}/base"
    with pytest.raises(ConfigError, match="is no id of a hub"):
        pushed(shelf() / "adapter", base_model=None)
    pushed(shelf() / "adapter")
    assert_nothing_of(place, hub)
    assert_nothing_of(gettempdir(), hub)


def test_fault_103_a_folder_here_that_looks_like_an_id_is_asked_for(hub, tmp_path, monkeypatch):
    folder = edit_settings(copied(tmp_path), base_model_name_or_path="ann/base")
    monkeypatch.chdir(tmp_path)
    Path("ann/base").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder here"):
        pushed(folder, base_model=None)


def test_fault_103_a_built_in_base_is_asked_for_and_named_in_the_card(hub, tmp_path):
    name = "embedded:smollm2-135m"
    folder = edit_settings(copied(tmp_path), base_model_name_or_path=name)
    with pytest.raises(ConfigError, match="is built into moeadapt"):
        pushed(folder, base_model=None)
    pushed(folder)
    text = files_of(hub)[CARD].decode()
    assert f'resolve_model("{name}")' in text
    assert f"base_model: {BASE}" in text


BAD = {
    "recipe.yaml": "seed: 1\nlogging_dir: /home/ann/logs\n",
    "chat_template.jinja": "{# from /Users/ann/x #}",
    "tokenizer_config.json": '{"name_or_path": "/data/ann/base"}',
    "special_tokens_map.json": '{"a": "C:\\\\Users\\\\ann"}',
    CARD: "# mine\n\nrun it in /scratch/ann/run\n",
}


@pytest.mark.parametrize("name", BAD)
def test_fault_103_a_path_in_any_file_is_refused_with_its_line(hub, tmp_path, name):
    folder = copied(tmp_path)
    (folder / name).write_text(BAD[name])
    with pytest.raises(ConfigError, match=f"{name}.*of this machine"):
        pushed(folder)
    assert REPO not in hub.repositories


def test_fault_103_a_path_in_the_header_of_the_weights_is_refused(hub, tmp_path):
    folder = copied(tmp_path)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"from": "/home/ann/x"})
    reseal(folder)
    with pytest.raises(
        ConfigError, match=r"adapter_model.safetensors \(header\):1: holds the path"
    ):
        pushed(folder)


@pytest.mark.parametrize("value", ["[/storage/me/x]", "{a: /storage/me/x}", "[a,/storage/me/x]"])
def test_fault_103_any_absolute_path_in_a_list_is_refused(value):
    with pytest.raises(ConfigError, match="r.yaml:2: holds the path '/storage/me/x'"):
        check_private("r.yaml", f"seed: 1\nx: {value}\n".encode())


@pytest.mark.parametrize(
    "text",
    [
        "see https://example.org/home/ann and /no/such/top",
        "a/home/ann, ~/home/x, and /home alone",
        "ratio 3/4, /think and </data/>",
        "http://127.0.0.1:80/a and https://ann:${TOKEN}@example.org",
    ],
)
def test_fault_103_addresses_and_words_are_no_paths(text):
    check_private("notes.md", text.encode())


def test_fault_103_the_text_that_is_on_the_hub_already_is_not_judged(hub):
    pushed(shelf() / "adapter")
    text = files_of(hub)[CARD].decode() + "\nmount it at /data/ann/models\n"
    hub.repositories[REPO].add("main", "by hand", {CARD: text.encode()})
    pushed(shelf() / "adapter", datasets=["ann/more"])
    assert "mount it at /data/ann/models" in files_of(hub)[CARD].decode()


# --- the token

SECRETS = [
    TOKEN,
    "hf_" + "a1B2" * 9,
    "ghp_" + "a1B2" * 9,
    "sk-" + "a1B2" * 9,
    "AKIA" + "A1B2" * 4,
    "api_org_" + "a1B2" * 9,
    "https://ann:a1B2@example.org/x",
    "-----BEGIN RSA PRIVATE KEY-----",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("name", ["recipe.yaml", "tokenizer.json", CARD])
def test_fault_104_a_secret_in_a_file_is_refused_and_not_repeated(hub, tmp_path, name, secret):
    folder = copied(tmp_path)
    (folder / name).write_text(f'seed: 1\nhub_token: "{secret}"\n')
    with pytest.raises(ConfigError, match=f"{name}.*nothing was sent") as caught:
        pushed(folder)
    assert secret not in str(caught.value)
    assert REPO not in hub.repositories


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("place", ["card", "message", "file"])
def test_fault_104_a_token_of_no_known_form_is_found_by_what_is_in_use(tmp_path, place, dry_run):
    token, folder = "no-known-form", copied(tmp_path)
    if place != "message":
        (folder / (CARD if place == "card" else "recipe.yaml")).write_text(
            f"logging_dir: {token}\n"
        )
    message = f"with {token}" if place == "message" else None
    with connected(tmp_path / "home", token=token) as hub:
        hub.token = token
        with pytest.raises(ConfigError, match="the token that you push with") as caught:
            pushed(folder, message=message, dry_run=dry_run)
        assert token not in str(caught.value)
        assert REPO not in hub.repositories


@pytest.mark.parametrize("way", ["argument", "environment", "login"])
@pytest.mark.parametrize("fault", [None, {"status": 403}, {"cut": True}])
def test_fault_104_the_token_is_in_no_file_log_or_traceback(tmp_path, capfd, fault, way):
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger().addHandler(handler)
    loggers = [logging.getLogger(name) for name in (None, "huggingface_hub", "moeadapt", "httpx2")]
    levels = [logger.level for logger in loggers]
    home = tmp_path / "home"
    home.mkdir()
    try:
        for logger in loggers:
            logger.setLevel(logging.DEBUG)
        with connected(home, token=TOKEN if way == "environment" else None) as hub:
            if way == "login":
                (home / "token").write_text(TOKEN)
            if fault is not None:
                hub.fail("commit", **fault)
            given = TOKEN if way == "argument" else None
            if fault is None:
                result = pushed(shelf() / "adapter", token=given)
                said = json.dumps(result.to_dict()) + repr(result) + result.card
            else:
                with pytest.raises(HubError) as caught:
                    pushed(shelf() / "adapter", token=given)
                said = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
            assert hub.calls("commit")
            asked = [h for name, *_, h in hub.log if name in ("info", "create", "commit")]
            assert all(h["authorization"] == f"Bearer {TOKEN}" for h in asked)
            assert_nothing_of(TOKEN, hub)
    finally:
        logging.getLogger().removeHandler(handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    out, err = capfd.readouterr()
    for text in (said, heard.getvalue(), out, err):
        assert TOKEN not in text
    for path in tmp_path.rglob("*"):
        if path.is_file() and path != home / "token":
            assert TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("place", "text", "wanted"),
    [
        ("model", '{\n "model": {"type": "BPE"},\n "x": "model"}', None),
        ("model", "{% if role == 'model' %}", None),
        ("model", "This model is good.", None),
        ("model", "base_model: model\ntags: [model]", "base_model: ann/base\ntags: [model]"),
        ("model", "model_name_or_path: model  # mine", "model_name_or_path: ann/base  # mine"),
        ("model", '{"name_or_path": "model", "a": 1}', '{"name_or_path": "ann/base", "a": 1}'),
        ("out/b", "see out/b, not out/bb", "see ann/base, not out/bb"),
        ("/m/b/", "base: '/m/b'", "base: 'ann/base'"),
    ],
)
def test_fault_103_the_name_of_a_folder_is_no_word_of_other_texts(place, text, wanted):
    """A base in a folder called `model` once broke tokenizers and the owner's sentences."""
    assert with_base(text, place, "ann/base") == (wanted or text)
