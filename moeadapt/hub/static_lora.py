"""An ordinary LoRA beside the mixture, for engines that do not know moeadapt."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import AutoPeftModelForCausalLM, PeftModel

from moeadapt.adapter_format.settings import SETTINGS, WEIGHTS
from moeadapt.errors import AssetError, ConfigError
from moeadapt.hub.parcel import Parcel

FOLDER = "static-lora"


def load_adapter(folder: Path) -> PeftModel:
    """Load an adapter on the base that it names, through the checks of loading.

    Raises:
        ConfigError: it is no adapter of a causal language model.
        AssetError: the base cannot be had.
    """
    try:
        return AutoPeftModelForCausalLM.from_pretrained(str(folder)).eval()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise AssetError(
            f"--with-static-lora needs the base of {folder}, which cannot be loaded: {error}; give "
            "the model itself to moeadapt.push"
        ) from None


def add_static_lora(
    parcel: Parcel,
    model: PeftModel,
    adapter: str,
    *,
    data: Iterable[Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """Merge the mixture into a LoRA and add it in the folder `static-lora`.

    Args:
        parcel: of the adapter.
        model: with the adapter.
        adapter: its name in `model`.
        data: what the merge looks at, see `moeadapt.merge`: by `least_squares`; None: `uniform`,
            the mean of the experts, and nothing is measured.
        tokenizer: for texts.

    Raises:
        ConfigError, UnsupportedError: see `moeadapt.merge`.
    """
    from moeadapt.export.merge import merge

    method = "uniform" if data is None else "least_squares"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / FOLDER
        result = merge(model, out, method, data=data, tokenizer=tokenizer, adapter=adapter)
        settings = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = parcel.base_model
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        parcel.files[f"{FOLDER}/{SETTINGS}"] = text.encode()
        parcel.files[f"{FOLDER}/{WEIGHTS}"] = (out / WEIGHTS).read_bytes()
    parcel.facts["static_lora"] = {"method": method, "mean_residual": result.mean_residual}
