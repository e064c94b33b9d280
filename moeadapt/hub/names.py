"""Names that a hub knows: repositories, base models, licences, branches."""

import re
from pathlib import Path

from moeadapt.errors import ConfigError

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,40}")
_DATASET = re.compile(rf"(?:{_PART}/)?{_PART}")
_BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,200}")

WITH_NAME = "other"
"""A licence that the hub shows by the `license_name` beside it."""


def check_repo_id(repo_id: str) -> str:
    """Return the name of a repository.

    Raises:
        ConfigError: it is not of the form `owner/name`.
    """
    if not isinstance(repo_id, str) or not _is_id(repo_id) or "/" not in repo_id:
        raise ConfigError(
            f"repository {repo_id!r} must be 'owner/name' of letters, digits, '-', '_' and '.', "
            "at most 96 each"
        )
    return repo_id


def check_base_model(name: str | None, where: str, given: str | None = None) -> str:
    """Return the id of the base model on the hub.

    Args:
        name: what the files say.
        where: which file says so, named in messages.
        given: what the caller says; stands above `name`.

    Raises:
        ConfigError: it is unknown, a path, a built-in model, or no id.
    """
    found = given or name
    ask = (
        "give its id on the hub: --base-model owner/name (base_model= in Python), so that others "
        "can load it"
    )
    if not found:
        raise ConfigError(f"{where} does not say what the base model is; {ask}")
    source = "base_model" if given else where
    if found.startswith("embedded:"):
        raise ConfigError(
            f"{source}: the base {found!r} is built into moeadapt, and no hub has a model of that "
            f"name; {ask}. Its weights are rounded to 4 bits, so an adapter trained on it is "
            "refused on the original unless allow_other_base is set"
        )
    if not _is_id(found):
        raise ConfigError(f"{source}: the base is {_shown(found)}, which is no id of a hub; {ask}")
    if Path(found).is_dir() and not given:
        raise ConfigError(f"{source}: the base {found!r} is a folder here; {ask}")
    return found


def is_path(name: object) -> bool:
    """Whether what a file calls its base is a place on this machine."""
    return isinstance(name, str) and bool(name) and (not _is_id(name) or Path(name).is_dir())


def check_license(license: str | None, others: dict[str, object]) -> str:
    """Return the licence.

    Args:
        license: an identifier of the hub, such as apache-2.0.
        others: the front matter that the card will have.

    Raises:
        ConfigError: it is missing, no identifier, or `other` without a name.
    """
    if not license:
        raise ConfigError(
            "the licence is unknown: give --license (license= in Python), an identifier such as "
            "apache-2.0, mit or llama3.2; adapters often fall under the licence of their base"
        )
    if not isinstance(license, str) or not _LICENSE.fullmatch(license):
        raise ConfigError(
            f"license {license!r} must be an identifier of the hub in lower case, such as "
            "apache-2.0, or other with license_name in the front matter of README.md"
        )
    if license == WITH_NAME and not others.get("license_name"):
        raise ConfigError(
            "license 'other' needs license_name (and license_link) in the front matter of "
            "README.md; add them there"
        )
    return license


def check_datasets(datasets: list[str]) -> list[str]:
    """Return names of data sets.

    Raises:
        ConfigError: one is no id of a hub, but a path, say.
    """
    for name in datasets:
        if not isinstance(name, str) or not _DATASET.fullmatch(name) or Path(name).exists():
            raise ConfigError(
                f"datasets: {_shown(name)} must be the id of a data set on the hub, owner/name; "
                "leave data out that lies on no hub, and describe it in README.md"
            )
    return datasets


def check_revision(revision: str | None, create_pr: bool) -> str | None:
    """Return the branch to commit to.

    Raises:
        ConfigError: it is no name of a branch, or given together with a pull request.
    """
    if revision is None:
        return None
    if create_pr:
        raise ConfigError(
            "--create-pr opens a pull request against main; leave --revision out, or commit to "
            "that branch without it"
        )
    if not _BRANCH.fullmatch(revision) or ".." in revision:
        raise ConfigError(
            f"revision {revision!r} must be the name of a branch: letters, digits, '.', '_', '-' "
            "and '/'"
        )
    return revision


def _is_id(name: str) -> bool:
    valid = re.fullmatch(rf"(?:{_PART}/)?{_PART}", name) is not None
    return valid and ".." not in name and "--" not in name and not name.endswith(".git")


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) < 200 else text[:200] + "..."  # noqa: PLR2004
