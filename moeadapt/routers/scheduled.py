"""What a schedule may change in a router, in training and outside it."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSettings:
    """Values of one mode.

    Attributes:
        temperature: what logits are divided by, > 0.
        k: experts per token, null experts included; None for a router without such a number.
        gate_dropout: share of logits hidden in training, never all of a token, in [0, 1).
    """

    temperature: float
    k: int | None
    gate_dropout: float


class Scheduled(nn.Module):
    """A router with values for training and values for everything else.

    The values in use are plain attributes, exchanged when the mode changes: a forward reads them
    without a question, so a compiled graph guards on numbers only.
    """

    num_experts: int
    max_active: int
    temperature: float
    k: int | None
    gate_dropout: float
    _settings: tuple[RouterSettings, RouterSettings] | None = None

    def use(self, *, training: RouterSettings, inference: RouterSettings) -> None:
        """Set the values of both modes."""
        self._settings = (inference, training)
        self._pick()

    def train(self, mode: bool = True) -> "Scheduled":
        """See `nn.Module.train`; the values of that mode are used from now on."""
        super().train(mode)
        self._pick()
        return self

    def set_k(self, k: int) -> None:
        """Use `k` experts per token from now on."""
        self.k, self.max_active = k, min(k, self.num_experts)

    def _pick(self) -> None:
        if self._settings is None:
            return
        settings = self._settings[self.training]
        self.temperature, self.gate_dropout = settings.temperature, settings.gate_dropout
        if settings.k is not None:
            self.set_k(settings.k)
