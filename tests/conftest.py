"""What holds for every test: one thread, and a third of the two large products by default.

`--all-cases` runs every case; without it, a third of two products whose factors hardly interact:
models x kinds of mixture (another third for each test), and routers x experts x placements (every
pair of two of them stays).
"""

import os
import zlib

import pytest

for library in ("OMP", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

SHARE = 3
"""One case in so many runs by default."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--all-cases`."""
    parser.addoption("--all-cases", action="store_true", help="every case of the large products")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave cases out; one that was named on the command line stays."""
    if config.getoption("--all-cases") or any("[" in one for one in config.args):
        return
    kept, left_out = [], []
    for item in items:
        (kept if _runs(item) else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def _runs(item: pytest.Item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    place = _place(item, params)
    return place is None or place % SHARE == 0


def _place(item: pytest.Item, params: dict[str, object]) -> int | None:
    """Return where a case stands in its product; None: it is in none of the two."""
    from tests.tiny import CASES

    if item.get_closest_marker("compile"):
        return None
    case = (params.get("name"), params.get("kind"))
    if case in CASES:
        test = item.nodeid.partition("[")[0]
        return CASES.index(case) + zlib.crc32(test.encode())
    one = params.get("one")
    if hasattr(one, "refusal") and one.refusal is None:
        return _latin(one)
    return None


def _latin(one: object) -> int:
    """Return the sum of the places of a combination's parts: a Latin square of each two."""
    from moeadapt import EXPERTS, ROUTERS
    from moeadapt.tuner.combinations import PLACEMENTS

    parts = (one.router, ROUTERS), (one.experts, EXPERTS), (one.placement, PLACEMENTS)
    return sum(list(registry).index(name) for name, registry in parts)
