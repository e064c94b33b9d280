"""Balance losses: a `Routing` in, a scalar out. One file per loss, one line here."""

from collections.abc import Mapping
from typing import Any

from moeadapt.balance.base import BalanceConfig
from moeadapt.balance.switch import SwitchConfig
from moeadapt.balance.z_loss import ZLossConfig
from moeadapt.errors import ConfigError
from moeadapt.registry import Registry

BALANCE: Registry[BalanceConfig] = Registry(
    "balance loss",
    {
        "switch": SwitchConfig,
        "z_loss": ZLossConfig,
    },
)


def parse_balance(spec: Mapping[str, Any] | None) -> dict[str, BalanceConfig]:
    """Build the losses that `spec` names.

    Args:
        spec: `{name: coefficient}` or `{name: {"coef": ..., **fields}}`; None or empty: none.

    Raises:
        ConfigError: see `Registry.parse`; or `spec` is not a mapping.

    Example:
        >>> parse_balance({"switch": 0.01})["switch"].coef
        0.01
    """
    if spec is None:
        return {}
    if not isinstance(spec, Mapping):
        raise ConfigError(
            f"balance must be a mapping like {{'switch': 0.01}}, not {type(spec).__name__}"
        )
    losses = {}
    for name, value in spec.items():
        fields = dict(value) if isinstance(value, Mapping) else {"coef": value}
        losses[name] = BALANCE.parse({**fields, "name": name})
    return losses


__all__ = ["BALANCE", "BalanceConfig", "parse_balance"]
