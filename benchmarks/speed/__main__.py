"""Speed and memory of every form, in one process: `python -m benchmarks.speed --quick`.

Starts itself again with an allocator that keeps its memory: otherwise a CPU pays for fresh pages at
each large tensor, which a GPU's caching allocator does not.
"""

import os
import sys

KEEPS_MEMORY = {
    "OMP_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": "17179869184",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}

if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in KEEPS_MEMORY.items()):
        command = [sys.executable, "-m", "benchmarks.speed", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **KEEPS_MEMORY})
    from benchmarks.speed.run import main

    sys.exit(main())
