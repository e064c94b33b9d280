"""Balance losses: a `Routing` in, a scalar out. One file per loss, one line here."""

from collections.abc import Mapping

from moeadapt.balance.base import BalanceConfig, Mixture
from moeadapt.balance.contrastive import ContrastiveConfig
from moeadapt.balance.entropy import EntropyConfig
from moeadapt.balance.importance_cv2 import ImportanceCv2Config
from moeadapt.balance.l1_sparsity import L1SparsityConfig
from moeadapt.balance.loss_free import LossFreeConfig
from moeadapt.balance.mutual_information import MutualInformationConfig
from moeadapt.balance.null_rate import NullRateConfig
from moeadapt.balance.orthogonal import OrthogonalConfig
from moeadapt.balance.simbal import SimbalConfig
from moeadapt.balance.switch import SwitchConfig
from moeadapt.balance.variance import VarianceConfig
from moeadapt.balance.z_loss import ZLossConfig
from moeadapt.errors import ConfigError
from moeadapt.registry import Registry

BALANCE: Registry[BalanceConfig] = Registry(
    "balance loss",
    {
        "contrastive": ContrastiveConfig,
        "entropy": EntropyConfig,
        "importance_cv2": ImportanceCv2Config,
        "l1_sparsity": L1SparsityConfig,
        "loss_free": LossFreeConfig,
        "mutual_information": MutualInformationConfig,
        "null_rate": NullRateConfig,
        "orthogonal": OrthogonalConfig,
        "simbal": SimbalConfig,
        "switch": SwitchConfig,
        "variance": VarianceConfig,
        "z_loss": ZLossConfig,
    },
)


def parse_balance(spec: object) -> dict[str, BalanceConfig]:
    """Build the losses that `spec` names.

    Args:
        spec: `{name: coefficient}` or `{name: {"coef": ..., **fields}}`; for a loss without a
            coefficient a number alone means its `shorthand` field; None or empty: none.

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
        fields = dict(value) if isinstance(value, Mapping) else {BALANCE[name].shorthand: value}
        if fields.get("name", name) != name:
            raise ConfigError(
                f"balance {name!r}: name={fields['name']!r} contradicts its key; leave it out"
            )
        losses[name] = BALANCE.parse({**fields, "name": name})
    return losses


__all__ = ["BALANCE", "BalanceConfig", "Mixture", "parse_balance"]
