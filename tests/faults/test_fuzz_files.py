"""Whatever the files of an adapter hold, loading refuses with a typed error or gives numbers."""

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import jaxtyping
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies._internal.utils import clear_strategy_cache

from moeadapt.errors import AdapterFileError
from tests.faults.fuzz_files import Files, damaged, join, split, to_bytes, valid
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
    # The run-time checks of shapes take most of the time, and no user has them.
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    with TemporaryDirectory(dir=MEMORY_DISK if MEMORY_DISK.is_dir() else None) as folder:
        yield warmed_up(Path(folder) / "adapter")
    jaxtyping.config.update("jaxtyping_disable", before)


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
        clear_strategy_cache()  # hypothesis keeps one for each range of numbers it has met
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


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ([], "is empty"),
        ([2**64], "ids from 0 to 127"),
        ([128], "ids from 0 to 127"),
        ([-1], "ids from 0 to 127"),
        ({"nothing": [1]}, "names 'nothing'"),
        ({"norm": [1]}, "names 'norm'"),
        ([1, 2], "lacks 1 tensor .*embed_tokens"),
    ],
)
def test_token_ids_that_the_base_or_the_file_does_not_have_are_refused(loader, tokens, match):
    """Found by fuzzing: PEFT raised a KeyError, and left its wrapper around the embedding."""
    settings = {**json.loads(valid().settings), "trainable_token_indices": tokens}
    loader.write(replace(valid(), settings=json.dumps(settings).encode(), sealed=True))
    with pytest.raises(AdapterFileError, match=f"(?s)adapter_.*{match}"):
        loader.load("from_pretrained")
    loader.assert_base_untouched()


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"q_proj": 2**63}},
        {"rank_pattern": {"v_proj": 1}, "r": 2**63},
        {"experts_pattern": {"q_proj": 2**40}},
        {"n_shared": 2**63},
        {"n_shared": 10**9},
        {"granularity": 2**63, "r": 2**63},
        {"experts_pattern": {"v_proj": 2}, "num_experts": 2**40},
    ],
)
def test_absurd_sizes_beside_patterns_are_refused(loader, fields):
    """Found by fuzzing: not every size was looked at, and none where there was a pattern."""
    settings = {**json.loads(valid().settings), **fields}
    loader.write(replace(valid(), settings=json.dumps(settings).encode(), sealed=True))
    with pytest.raises(AdapterFileError, match="its largest tensor holds 128 numbers"):
        loader.load("from_pretrained")


def test_numbers_whose_products_overflow_are_told(loader):
    """Found by fuzzing: outputs were not finite, and nothing was said of numbers below 1e38."""
    header, data = split(valid().weights)
    large = struct.pack("<f", 1e20) * (len(data) // 4)
    loader.write(replace(valid(), weights=join(to_bytes(header), large), sealed=True))
    with pytest.warns(UserWarning, match="products of such numbers overflow"):
        loader.load("from_pretrained")


@pytest.mark.slow
def test_twenty_thousand_damaged_adapters_are_refused_or_give_numbers(loader):
    fuzz(loader, 20_000)
