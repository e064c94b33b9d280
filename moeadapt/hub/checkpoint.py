"""A written stock checkpoint as a parcel: the one that its receipt describes."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moeadapt.adapter_format.adapter import check_values
from moeadapt.adapter_format.files import exists, open_file, read_small
from moeadapt.errors import AdapterFileError, ConfigError
from moeadapt.export.receipt import RECEIPT, Receipt
from moeadapt.export.writer import INDEX
from moeadapt.hub.names import check_base_model, is_path
from moeadapt.hub.parcel import Parcel

CONFIG = "config.json"
MAX_JSON_BYTES = 64 << 20


def checkpoint_parcel(folder: Path, base_model: str | None = None) -> Parcel:
    """Check a checkpoint that `moeadapt export` or `moeadapt upcycle` wrote, and collect its files.

    Args:
        folder: holds config.json, the weights and the receipt.
        base_model: id of the dense base; None: what the receipt says.

    Raises:
        AdapterFileError: a file is missing or damaged, or a tensor holds NaN or infinity.
        ConfigError: there is no receipt, it describes other weights, or the base has no id.
    """
    receipt = Receipt.load(folder)
    config = _json(folder, CONFIG)
    weights = _weights(folder)
    size = sum((folder / name).stat().st_size for name in weights)
    if size != receipt.bytes_on_disk:
        raise ConfigError(
            f"{folder}: its weights have {size} bytes, and {RECEIPT} describes "
            f"{receipt.bytes_on_disk}; push the folder as it was written, or export it again"
        )
    if config.get("auto_map"):
        raise ConfigError(f"{folder / CONFIG}: field auto_map: a stock checkpoint runs no own code")
    named = receipt.settings.get("base")
    base = check_base_model(named, str(folder / RECEIPT), base_model)
    parcel = Parcel(
        kind="checkpoint",
        folder=folder,
        base_model=base,
        place=named if is_path(named) else None,
    )
    for name in weights:
        parcel.add_binary(name, folder)
    for name in (CONFIG, RECEIPT, *([INDEX] if exists(folder, INDEX) else [])):
        parcel.add_text(name, folder)
    parcel.files[RECEIPT] = _receipt(parcel.files[RECEIPT])
    parcel.add_companions("generation_config.json")
    parcel.facts = {"receipt": receipt, "model_type": config.get("model_type")}
    return parcel


def _receipt(content: bytes | Path) -> bytes:
    """Return the receipt with the names of local sources in place of their paths."""
    assert isinstance(content, bytes)
    receipt = json.loads(content)
    settings = receipt["settings"]
    if isinstance(settings.get("sources"), list):
        settings["sources"] = [
            Path(source).name if is_path(source) else source for source in settings["sources"]
        ]
    return (json.dumps(receipt, indent=2, sort_keys=True) + "\n").encode()


def _json(folder: Path, name: str) -> dict[str, Any]:
    if not exists(folder, name):
        raise AdapterFileError(f"{folder} has no {name}; export the adapter again")
    try:
        found = json.loads(read_small(folder, name, MAX_JSON_BYTES))
    except ValueError as error:
        raise AdapterFileError(f"{folder / name}: is damaged: {error}; export it again") from None
    if not isinstance(found, dict):
        raise AdapterFileError(f"{folder / name}: is no object of fields; export it again")
    return found


def _weights(folder: Path) -> list[str]:
    """Return the files of the weights; each holds the tensors that the index says, all finite."""
    names = sorted(path.name for path in folder.glob("model*.safetensors"))
    home = _index(folder) if exists(folder, INDEX) else {}
    if not names or (home and set(names) != set(home.values())):
        raise AdapterFileError(
            f"{folder}: its weights are {names}, and {INDEX} names "
            f"{sorted(set(home.values()))}; copy it again from where it was written"
        )
    for name in names:
        open_file(folder, name).close()
        try:
            with safe_open(folder / name, framework="pt") as file:
                found = set(file.keys())
                for tensor in sorted(found):
                    check_values({tensor: file.get_tensor(tensor)}, folder / name)
        except SafetensorError as error:
            raise AdapterFileError(
                f"{folder / name}: is damaged: {error}; copy it again from where it was written"
            ) from None
        wanted = {tensor for tensor, file in home.items() if file == name}
        if home and found != wanted:
            raise AdapterFileError(f"{folder / name}: holds other tensors than {INDEX} says")
    return names


def _index(folder: Path) -> dict[str, str]:
    """Return tensor -> file of the weights."""
    found = _json(folder, INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise AdapterFileError(
            f"{folder / INDEX}: field weight_map must name one file for each tensor; copy it again "
            "from where it was written"
        )
    return found
