"""Which rows of which embeddings `trainable_token_indices` trains, checked beforehand."""

from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from moeadapt.errors import ConfigError
from moeadapt.tuner.config import MoeLoraConfig

FIELD = "trainable_token_indices"


def token_modules(model: Any, config: MoeLoraConfig) -> dict[str, list[int]]:
    """Return the path of each embedding of which tokens are trained -> their ids.

    Args:
        model: the base model.
        config: of the adapter.

    Raises:
        ConfigError: a name matches no embedding or is one of `modules_to_save`, or an id has no row
            in it.
    """
    tokens = config.trainable_token_indices
    if tokens is None:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(tokens, dict):
        asked = {name: [key for key in modules if key.endswith(name)] for name in tokens}
        asked = {name: [key for key in keys if _rows(modules[key])] for name, keys in asked.items()}
    else:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        asked = {"": [key for key, module in modules.items() if module is embedding]}
    found: dict[str, list[int]] = {}
    for name, keys in asked.items():
        ids = tokens[name] if isinstance(tokens, dict) else tokens
        if not keys or name in (config.modules_to_save or ()):
            raise ConfigError(
                f"MoeLoraConfig: {FIELD} names {name!r}, which is in modules_to_save or no "
                "embedding of this model; name each embedding once"
            )
        for key in keys:
            _check_ids(ids, key, _rows(modules[key]))
            found[key] = ids
    if not found:
        raise ConfigError(f"MoeLoraConfig: {FIELD}={tokens!r} names nothing; leave it out")
    return found


def _rows(module: nn.Module) -> int:
    inner: Any = module
    while isinstance(inner, AuxiliaryTrainingWrapper):
        inner = inner.original_module
    weight = inner._parameters.get("weight")
    return len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else 0  # noqa: PLR2004


def _check_ids(ids: list[int], key: str, rows: int) -> None:
    wrong = [i for i in ids if not 0 <= i < rows]
    if wrong or not ids:
        what = f"holds {wrong[0]}" if wrong else "is empty"
        raise ConfigError(
            f"MoeLoraConfig: {FIELD} of {key!r} {what}; it must hold ids from 0 to {rows - 1}, the "
            "rows of the embedding, or be left out"
        )
