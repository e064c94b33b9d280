"""Checkpoints made of adapters and adapters made of mixtures; called, it is `export` itself.

The function and this package have one name, `moeadapt.export`, so the package answers to a call.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This package, callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write a trained mixture as a stock checkpoint: see `moeadapt.export.export.export`."""
        from moeadapt.export.export import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
