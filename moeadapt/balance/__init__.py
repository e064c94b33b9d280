"""Balance losses: a `Routing` in, a scalar out. One file per loss, one line here."""

from collections.abc import Mapping

from moeadapt.balance.base import BalanceConfig, Mixture
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


def parse_balance(spec: object) -> dict[str, BalanceConfig]:
    """Build the losses that `spec` names.

    Args:
        spec: `{name: coefficient}` or `{name: {"coef": ..., **fields}}`; None or empty: none.

    Raises:
        ConfigError: see `Registry.parse`; `spec` is not a mapping; or a name inside contradicts
            its key.

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
        if fields.get("name", name) != name:
            raise ConfigError(
                f"balance {name!r}: name={fields['name']!r} contradicts its key; leave it out"
            )
        losses[name] = BALANCE.parse({**fields, "name": name})
    return losses


__all__ = ["BALANCE", "BalanceConfig", "Mixture", "parse_balance"]
