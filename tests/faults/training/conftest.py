"""Other libraries may warn while they train; an unexpected warning of ours fails a test."""

import pytest

from tests.training.conftest import FOREIGN


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let other libraries warn."""
    for item in items:
        if "tests/faults/training" in item.path.as_posix():
            for rule in FOREIGN:
                item.add_marker(pytest.mark.filterwarnings(rule), append=False)
