"""Scripts to run, copy and change; never imported. The library is `moeadapt`."""

raise ImportError("trainers/ holds scripts: run them, or import moeadapt.training instead")
