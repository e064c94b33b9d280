"""Puts the recipes of `configs/` into the wheel; everything else is in pyproject.toml.

They stay at the top level of the repository, where people look for them. An editable install reads
them there; a wheel holds a copy as `moeadapt/configs`.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies the recipes beside the modules."""

    def run(self) -> None:
        """See `setuptools.command.build_py.build_py`."""
        super().run()
        if not self.editable_mode:
            for source, target in self._recipes():
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """See `setuptools.command.build_py.build_py`."""
        recipes = [] if self.editable_mode else [str(target) for _, target in self._recipes()]
        return [*super().get_outputs(include_bytecode), *recipes]

    def _recipes(self) -> list[tuple[Path, Path]]:
        """Return each recipe and where the build puts it."""
        files = sorted(Path("configs").glob("*/*.yaml"))
        return [(file, Path(self.build_lib, "moeadapt", file)) for file in files]


setup(cmdclass={"build_py": BuildWithRecipes})
