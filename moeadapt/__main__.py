"""`python -m moeadapt` is the command `moeadapt`."""

from moeadapt.cli import main

if __name__ == "__main__":
    main()
