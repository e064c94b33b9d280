"""Whatever the files of an adapter hold, loading refuses with a typed error or gives numbers."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.faults.fuzz_files import Files, damaged, valid
from tests.faults.fuzz_loading import Loader, memory

BATCH = 500

QUICK = settings(
    max_examples=BATCH,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

GROWTH = 32 << 20
"""Bytes that memory may grow by, over any number of inputs."""


MEMORY_DISK = Path("/dev/shm")
"""Files are written twice per input, which takes longer on a disk than loading them."""


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with TemporaryDirectory(dir=MEMORY_DISK if MEMORY_DISK.is_dir() else None) as folder:
        yield warmed_up(Path(folder) / "adapter")


def warmed_up(folder: Path) -> Loader:
    loader = Loader(folder)
    for way in ("checked", "from_pretrained", "native"):
        loader.check(valid(), way)
        loader.check(valid(), way)
    return loader


def run(loader: Loader, number: int, way: str = "checked", inputs: int = BATCH) -> None:
    """Load one batch; one of few inputs, so that hypothesis' own tree of them stays small."""

    @seed(number)
    @settings(QUICK, max_examples=inputs)
    @given(damaged())
    def fuzz(files: Files) -> None:
        loader.check(files, way)

    fuzz()


def fuzz(loader: Loader, inputs: int) -> None:
    loader.outcomes.clear()
    start = 0
    for number in range(inputs // BATCH):
        run(loader, number)
        start = start or memory()  # the first batch warms up
    grown = memory() - start
    print(f"{dict(loader.outcomes)}, slowest {loader.slowest:.3f} s, {grown / 2**20:.1f} MiB more")
    assert grown < GROWTH
    assert sum(loader.outcomes.values()) >= inputs * 0.95
    # Else the inputs would show only one side.
    assert loader.outcomes["loaded"] > inputs / 20
    assert loader.outcomes["AdapterFileError"] > inputs / 2


def test_a_thousand_damaged_adapters_are_refused_or_give_numbers(loader):
    fuzz(loader, 1000)


@pytest.mark.parametrize("way", ["from_pretrained", "native"])
def test_other_ways_to_load_do_the_same(loader, way):
    loader.outcomes.clear()
    run(loader, 1, way, 100)
    assert loader.outcomes["foreign"] < 40
    assert loader.outcomes["loaded"] > 5


@pytest.mark.slow
def test_twenty_thousand_damaged_adapters_are_refused_or_give_numbers(loader):
    fuzz(loader, 20_000)
