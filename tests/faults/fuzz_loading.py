"""Loads the fuzzers' files on one shared base, and checks what must hold whatever they are."""

import contextlib
import gc
import json
import resource
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from moeadapt.adapter_format.manifest import write_manifest
from moeadapt.errors import MoeAdaptError
from moeadapt.tuner.checked import load_adapter_checked
from moeadapt.tuner.locate import read_config
from tests.faults.fuzz_files import MANIFEST, SETTINGS, WEIGHTS, Files, valid
from tests.tiny import batch, logits, tiny

SECONDS = 1.0
"""Most process time of one input."""


class Loader:
    """One base, and one folder whose files change.

    Attributes:
        outcomes: how many inputs loaded, and how many each error refused.
        slowest: process time of the slowest input, in seconds.
    """

    def __init__(self, folder: Path) -> None:
        """Build the base; `folder` is where the files go."""
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.warm: set[str] = set()
        self.base = tiny("llama")
        self.before = {name: t.clone() for name, t in self.base.state_dict().items()}
        self.inputs = batch(1, 4)
        self.fingerprint = json.loads(valid().manifest or b"")["base"]
        self.outcomes: Counter[str] = Counter()
        self.slowest = 0.0

    def check(self, files: Files, way: str = "checked") -> None:
        """Load `files`: a typed refusal or finite outputs, in time, and the base as it was."""
        self.write(files)
        if way != "checked" and self.is_foreign():
            self.outcomes["foreign"] += 1
            self.refuse_foreign(way)
            return
        modules = set(sys.modules)
        refusal = None
        start = time.process_time()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                outputs = self.load(way)
            except MoeAdaptError as error:
                self.outcomes[type(error).__name__] += 1
                refusal = str(error)
            else:
                self.outcomes["loaded"] += 1
                assert outputs.isfinite().all() or any("overflow" in str(w.message) for w in said)
        assert refusal is None or str(self.folder) in refusal, refusal
        took = time.process_time() - start
        self.slowest = max(self.slowest, took)
        assert took < SECONDS, f"{took:.2f} s"
        assert way not in self.warm or set(sys.modules) == modules, "loading imports nothing"
        self.warm.add(way)
        self.assert_base_untouched()

    def write(self, files: Files) -> None:
        """Put the files into the folder."""
        (self.folder / SETTINGS).write_bytes(files.settings)
        (self.folder / WEIGHTS).write_bytes(files.weights)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        if files.sealed:
            write_manifest(self.folder, self.fingerprint)
        elif files.manifest is not None:
            (self.folder / MANIFEST).write_bytes(files.manifest)

    def is_foreign(self) -> bool:
        """Whether nothing in the folder says that the adapter is ours: PEFT has to deal with it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(MoeAdaptError):
                return read_config(self.folder) is None
        return False

    def refuse_foreign(self, way: str) -> None:
        """Let PEFT refuse, in whatever words, what no strict reading takes for ours."""
        with pytest.raises(Exception):  # noqa: B017, PT011
            self.load(way)
        self.assert_base_untouched()

    def load(self, way: str) -> torch.Tensor:
        """Load the adapter, run it once, and take it off again."""
        if way != "native":
            load = load_adapter_checked if way == "checked" else PeftModel.from_pretrained
            model = load(self.base, str(self.folder))
            outputs = logits(model, self.inputs)
            model.unload()
            return outputs
        self.base.load_adapter(str(self.folder), "native")
        outputs = logits(self.base, self.inputs)
        self.assert_base_untouched(".base_layer")
        self.base = tiny("llama")  # transformers does not take the layers off again
        return outputs

    def assert_base_untouched(self, layer: str = "") -> None:
        """Assert that names and bits of the base are those it started with.

        Args:
            layer: what an adapter that stands around a linear puts into its name.
        """
        state = self.base.state_dict().items()
        now = {n.replace(layer, ""): t for n, t in state if not (layer and "moeadapt_" in n)}
        assert now.keys() == self.before.keys()
        changed = [n for n, t in now.items() if not torch.equal(t, self.before[n])]
        assert not changed


def memory() -> int:
    """Return the bytes of this process in memory, or the most it ever had where that is unknown."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return pages * resource.getpagesize()
