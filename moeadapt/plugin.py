"""Registers the method with PEFT as soon as PEFT is imported, without importing it.

PEFT and torch take seconds to import and the command line needs neither for `--help`. So
`import moeadapt` only watches for PEFT: if it is there already the method is registered at once,
otherwise right after PEFT's own import has finished.
"""

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WATCHED = "peft"
TUNER = "moeadapt.tuner"
"""Registers the method at the end of its own import."""


class _ThenRegister(Loader):
    """Runs PEFT's own loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Watcher)]
        # PEFT's files are found through its spec from here on, as if nobody had watched.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        register_now()


class _Watcher(MetaPathFinder):
    """Finds nothing itself; wraps the loader of PEFT until PEFT is really imported.

    Asking whether PEFT is installed, as transformers does, finds a spec and imports nothing.
    """

    def __init__(self) -> None:
        self._looking = False

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register_now() -> None:
    """Register the method with PEFT."""
    if TUNER not in sys.modules:  # else it is what imports PEFT, and registers when it is ready
        importlib.import_module(TUNER)


def watch_peft() -> None:
    """Register now if PEFT is imported, else when it is."""
    if WATCHED in sys.modules:
        register_now()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
