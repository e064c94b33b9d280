"""What a mixture does with its experts, and whether routing is worth it; called, it is `report`.

The function and this package have one name, `moeadapt.report`, so the package answers to a call.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This package, callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Measure a mixture and write its report: see `moeadapt.report.report.report`."""
        from moeadapt.report.report import report

        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
