"""Optional: loads what libFuzzer makes of an adapter's files, guided by the lines that it reaches.

    pip install atheris
    PYTHONPATH=. python tests/fuzz/atheris_adapter.py CORPUS -max_total_time=600

An empty or missing folder CORPUS is filled with the files of a valid adapter first.
"""

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["moeadapt"]):
    from tests.faults.fuzz_files import Files, valid
    from tests.faults.fuzz_loading import Loader

FIELDS = ("weights", "settings", "manifest")


def files_of(data: bytes) -> Files:
    """Return a valid adapter with one file replaced: the last byte says which."""
    field = FIELDS[data[-1] % len(FIELDS)] if data else "weights"
    return replace(valid(), **{field: data[:-1], "sealed": field != "manifest"})


def main() -> None:
    """Fill the corpus and fuzz until libFuzzer ends."""
    for folder in (Path(word) for word in sys.argv[1:2] if not word.startswith("-")):
        folder.mkdir(parents=True, exist_ok=True)
        for number, field in enumerate(FIELDS):
            (folder / field).write_bytes(getattr(valid(), field) + bytes([number]))
    with TemporaryDirectory() as folder:
        loader = Loader(Path(folder) / "adapter")
        loader.check(valid())
        atheris.Setup(sys.argv, lambda data: loader.check(files_of(data)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
