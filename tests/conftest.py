"""What holds for every test: one thread, so that tests beside each other do not fight for cores."""

import os

for library in ("OMP", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
