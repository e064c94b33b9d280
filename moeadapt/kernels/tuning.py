"""Chooses the block sizes of a kernel: by timing on a GPU, fixed in the interpreter.

Source: https://triton-lang.org/main/python-api/generated/triton.autotune.html
"""

from collections.abc import Callable
from typing import Any

import triton
from triton import knobs


def tuned(
    configs: list[triton.Config], interpreted: dict[str, int], key: list[str]
) -> Callable[[Any], Any]:
    """Decorate a kernel so that it runs with the fastest of `configs`.

    Args:
        configs: candidates. They must not change the order in which numbers are added, so that two
            runs agree whatever was fastest in each.
        interpreted: block sizes where nothing can be timed.
        key: arguments that, when they change, make the choice be made again.
    """
    if knobs.runtime.interpret:
        configs = [triton.Config(interpreted)]
    return triton.autotune(configs=configs, key=key)


def tiles(total: int, block: int) -> int:
    """Return how many blocks cover `total`."""
    return -(-total // block)


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below `number`, which is 1 or more."""
    return 1 << (number - 1).bit_length()


def rank_block(rank: int) -> int:
    """Return how many rank columns one matrix product takes: a power of two from 16 to 64.

    With 128 the kernels run out of registers.
    """
    return min(64, power_of_two(max(16, rank)))
