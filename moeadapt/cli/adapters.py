"""What verbs on a trained adapter share: the options, the model behind a folder, rows of a file."""

from collections.abc import Sequence
from typing import Any

from moeadapt.adapter_folder import read_settings
from moeadapt.errors import AssetError, ConfigError
from moeadapt.rows import read_rows as read_rows
from moeadapt.rows import to_batches as to_batches

ADAPTER_HELP = "Folder of a saved moeadapt adapter."
BASE_HELP = "Base model; default: the one the adapter names."
DTYPE_HELP = "Type the base is loaded in: auto, float32, bfloat16 or float16."


DEVICE_HELP = "auto (a GPU if there is one), cpu, cuda, cuda:1 ..."

DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(name: str | None) -> None:
    """Refuse what is no type to load or write weights in; None is whatever they have.

    Raises:
        ConfigError: see above.
    """
    if name is not None and name not in DTYPES:
        raise ConfigError(f"--dtype {name!r}: one of {list(DTYPES)}")


def load_adapter(
    folder: str, base: str | None, dtype: str, peft_types: Sequence[str] = ("MOEADAPT",)
) -> tuple[Any, Any]:
    """Load an adapter on its base, in eval mode, and the tokenizer of the base.

    Args:
        folder: the adapter.
        base: its base model; None: the one it names.
        dtype: type of the base, `auto` or one of `DTYPES`.
        peft_types: what the adapter may be: MOEADAPT, a mixture; LORA, a plain LoRA.

    Raises:
        ConfigError: `folder` holds no such adapter.
        AdapterFileError: a file of the adapter is damaged or does not fit the base.
        AssetError: the base model cannot be read.
    """
    settings = read_settings(folder, *peft_types)
    name = base or settings.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{folder} does not say what its base model is; give --base")
    if dtype != "auto":
        check_dtype(dtype)
    from peft import PeftModel
    from safetensors import SafetensorError

    from moeadapt.adapter_format.adapter import AdapterFiles
    from moeadapt.training.base_model import load_base
    from moeadapt.training.objectives import OBJECTIVES
    from moeadapt.training.recipe import RunArguments

    if settings["peft_type"] == "MOEADAPT":
        # A damaged file is found before the base is loaded.
        read_config(folder)
        AdapterFiles(folder).close()
    run = RunArguments(model_name_or_path=name, dtype=dtype)  # type: ignore[arg-type]
    model, tokenizer = load_base(run, OBJECTIVES["sft"])
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (OSError, SafetensorError) as error:
        raise AssetError(f"cannot read the adapter {folder}: {error}") from error
    adapted.peft_config["default"].base_model_name_or_path = name
    return adapted.eval(), tokenizer


def to_device(model: Any, device: str) -> Any:
    """Move a model to where it is measured.

    Args:
        model: the model.
        device: a name of torch, or `auto`: a GPU if there is one.

    Raises:
        ConfigError: there is no such device, or the model does not fit.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {str(error).partition(chr(10))[0]}") from None


def read_config(folder: str) -> Any:
    """Read the `MoeLoraConfig` of a saved mixture, without its weights and its base.

    Raises:
        ConfigError: `folder` holds no moeadapt adapter, or its settings are wrong.
    """
    read_settings(folder, "MOEADAPT")
    from moeadapt.tuner.config import MoeLoraConfig

    return MoeLoraConfig.from_pretrained(folder)
