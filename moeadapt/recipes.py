"""The recipes that come with moeadapt: the files of `configs/`, found, listed and copied."""

import os
from dataclasses import dataclass
from pathlib import Path

from moeadapt.errors import AssetError, ConfigError, did_you_mean

_SUFFIX = ".yaml"


@dataclass(frozen=True, kw_only=True)
class ShippedRecipe:
    """One file of `configs/`.

    Attributes:
        name: folder and file without its ending, for example `sft/smollm2_mixlora`.
        path: where it is.
    """

    name: str
    path: Path

    @property
    def objective(self) -> str:
        """What it is for: an objective of `moeadapt train`, or `accelerate`."""
        return self.name.partition("/")[0]

    @property
    def line(self) -> str:
        """What it says of itself in its first line."""
        with self.path.open(encoding="utf-8") as file:
            first = file.readline()
        return first.removeprefix("#").strip() if first.startswith("#") else ""


def shipped_recipes() -> dict[str, ShippedRecipe]:
    """Return every recipe by name, in the order of names.

    Raises:
        AssetError: this installation has none.

    Example:
        >>> shipped_recipes()["sft/smollm2_mixlora"].objective
        'sft'
    """
    folder = _folder()
    paths = sorted(folder.glob(f"*/*{_SUFFIX}"))
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    return {
        name: ShippedRecipe(name=name, path=path) for name, path in zip(names, paths, strict=True)
    }


def copy_recipe(name: str, dest: str, *, force: bool = False) -> Path:
    """Copy a recipe to a place of yours.

    Args:
        name: of `shipped_recipes`; with or without `.yaml`.
        dest: a new file, or a folder that exists.
        force: whether a file at that place may be replaced.

    Returns:
        The file that was written.

    Raises:
        ConfigError: there is no such recipe, the place is taken, or no folder.
        AssetError: the disk does not take it.
    """
    known = shipped_recipes()
    name = name.removesuffix(_SUFFIX).removeprefix("configs/")
    if name not in known:
        raise ConfigError(
            f"unknown recipe {name!r}{did_you_mean(name, known)}; `moeadapt recipes ls` lists them"
        )
    target = Path(dest)
    if target.is_dir():
        target = target / known[name].path.name
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}; make it first")
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name a file")
    data = known[name].path.read_bytes()
    try:
        if force:
            _replace(target, data)
        else:
            with target.open("xb") as file:
                file.write(data)
    except FileExistsError:
        raise ConfigError(
            f"{target} exists; name another file, or replace it with --force (force=True)"
        ) from None
    except OSError as error:
        raise AssetError(f"cannot write {target}: {error.strerror}") from error
    return target


def _replace(target: Path, data: bytes) -> None:
    """Put a whole file in the place of another one: what was there is there until then."""
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        new.write_bytes(data)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)


def _folder() -> Path:
    """Return the folder of recipes: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    installed, checkout = package / "configs", package.parent / "configs"
    if installed.is_dir():
        return installed
    # Only a checkout has this file: site-packages may hold a `configs` of somebody else.
    if checkout.is_dir() and (package.parent / "pyproject.toml").is_file():
        return checkout
    raise AssetError(
        f"the recipes are neither in {installed} nor beside the package; install moeadapt again"
    )
