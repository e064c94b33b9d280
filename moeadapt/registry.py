"""Names to config classes: the one place where a component gets its public name."""

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from moeadapt.errors import ConfigError, did_you_mean


class ComponentConfig(BaseModel):
    """Settings of one router, balance loss or expert type: checked, frozen, and plain data.

    A subclass lists its fields with types and ranges; a wrong type, a value out of range, NaN or an
    unknown field is refused. Nothing here is ever imported or called because a file named it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


C = TypeVar("C", bound=ComponentConfig)


class Registry(Mapping[str, type[C]], Generic[C]):
    """Read-only map from a public name to the config class that builds the component."""

    def __init__(self, kind: str, entries: Mapping[str, type[C]]) -> None:
        """Hold `entries`; `kind` is the word used in error messages."""
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> type[C]:
        """Return the config class.

        Raises:
            ConfigError: `name` is not registered; the message lists what is.
        """
        return self._find(name)

    def _find(self, name: object) -> type[C]:
        if isinstance(name, str) and name in self._entries:
            return self._entries[name]
        raise ConfigError(
            f"unknown {self.kind} {name!r}; one of {sorted(self._entries)}"
            f"{did_you_mean(name, self._entries)}"
        )

    def __iter__(self) -> Iterator[str]:
        """Iterate over the registered names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        """Whether `name` is registered (`Mapping`'s own version expects a KeyError)."""
        return isinstance(name, str) and name in self._entries

    def name_of(self, config: C) -> str:
        """Return the public name of `config`.

        Raises:
            ConfigError: the class of `config` is not registered here.
        """
        for name, cls in self._entries.items():
            if type(config) is cls:
                return name
        raise ConfigError(
            f"a {type(config).__name__} is not a {self.kind}; one of {sorted(self._entries)}"
        )

    def parse(self, spec: object) -> C:
        """Build the config that `spec` names.

        Args:
            spec: a registered name, `{"name": <registered name>, **fields}`, or a finished config.

        Raises:
            ConfigError: the name is unknown, a field does not belong to that config, or its value
                has the wrong type or is out of range.

        Example:
            >>> from moeadapt import ROUTERS
            >>> ROUTERS.parse({"name": "top_k", "k": 1}).k
            1
        """
        if isinstance(spec, ComponentConfig):
            known: Any = spec
            self.name_of(known)
            return known
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping):
            raise ConfigError(
                f"{self.kind} must be a name or a mapping with a 'name', not {type(spec).__name__}"
            )
        fields = dict(spec)
        if "name" not in fields:
            raise ConfigError(
                f"{self.kind} {fields!r} has no 'name'; one of {sorted(self._entries)}"
            )
        name = fields.pop("name")
        cls = self._find(name)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise ConfigError(explain(error, f"{self.kind} {name!r}", cls.model_fields)) from None

    def spec(self, config: C) -> dict[str, Any]:
        """Return `config` as JSON data: its name and every field; the inverse of `parse`."""
        return {"name": self.name_of(config), **config.model_dump(mode="json")}


def explain(error: ValidationError, where: str, known: Mapping[str, Any]) -> str:
    """Put a pydantic error into one line per field: the field, the value, what is allowed."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            line = f"unknown field {field!r}; one of {sorted(known)}{did_you_mean(field, known)}"
        elif item["type"] == "missing":
            line = f"{field} is required"
        else:
            line = f"{field}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"
        lines.append(line)
    return f"{where}: " + "; ".join(lines)
