"""What the tests of pushing share: a client that talks to the loopback hub, things to push."""

import atexit
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import transformers.utils.hub
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http

from moeadapt.hub.push import PushResult, push
from tests.hub.loopback import Loopback
from tests.tiny import adapt, moe_config, tiny
from tests.toy import toy_tokenizer

BASE = "ann/tiny-llama"
REPO = "ann/math"
LICENSE = "apache-2.0"
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MANIFEST, CARD = "moeadapt_manifest.json", "README.md"


@contextmanager
def connected(home: Path, token: str | None = None) -> Iterator[Loopback]:
    """Yield a hub that the libraries of this process talk to, with a cache of its own.

    Args:
        home: folder of the cache and of nothing else.
        token: in HF_TOKEN; None: nobody is logged in.
    """
    with Loopback() as hub, mock.patch.dict("os.environ"):
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        names: dict[str, Any] = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            os.environ.pop(name, None)
        if token:
            os.environ["HF_TOKEN"] = token
        with (
            mock.patch.multiple(constants, **names),
            mock.patch.object(hf_api.api, "endpoint", hub.url),
            mock.patch.object(transformers.utils.hub, "_hf_api", None),
            mock.patch.object(_http, "time", mock.Mock(wraps=time, sleep=mock.Mock())),
        ):
            yield hub


@cache
def shelf() -> Path:
    """Return a folder with `base` and `adapter`, which names that base by its folder."""
    folder = Path(tempfile.mkdtemp(prefix="moeadapt-hub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny("llama").save_pretrained(folder / "base")
    toy_tokenizer().save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    adapt(base, moe_config("block"), seed=1).save_pretrained(folder / "adapter")
    return folder


def copied(tmp_path: Path, name: str = "adapter") -> Path:
    """Return a copy of something of the shelf."""
    folder = tmp_path / name
    shutil.copytree(shelf() / name, folder)
    return folder


def add_base(hub: Loopback) -> None:
    """Put the base model on the hub."""
    from tests.hub.repositories import Repository

    repository = hub.repositories.setdefault(BASE, Repository())
    files = {path.name: path.read_bytes() for path in (shelf() / "base").iterdir()}
    repository.add("main", "base", dict(files))


def pushed(folder: Any, **options: Any) -> PushResult:
    """Push with what is always needed."""
    return push(folder, REPO, **{"base_model": BASE, "license": LICENSE, **options})


def files_of(hub: Loopback, revision: str = "main", repo: str = REPO) -> dict[str, bytes]:
    """Return what a repository holds."""
    return hub.repositories[repo].at(revision).files


def json_of(content: bytes) -> Any:
    """Return what a file of a repository holds."""
    return json.loads(content)
