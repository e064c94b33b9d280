"""What is about to be sent: names in the repository and their content, and what stays here."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moeadapt.adapter_format.files import exists, open_file, read_small
from moeadapt.hub.private import check_private, with_base
from moeadapt.tokenizer_files import TOKENIZER_FILES

CARD = "README.md"
MAX_TEXT_BYTES = 100_000_000
"""Of a text file; the largest is a tokenizer's, some tens of MB."""

BINARY = (".safetensors", ".png", ".model")


@dataclass(kw_only=True)
class Parcel:
    """What would be sent.

    Attributes:
        kind: an adapter, or a whole stock checkpoint.
        folder: where it comes from.
        base_model: id of the base on the hub.
        place: what the files call the base, if it is a folder of this machine; None: an id.
        files: name in the repository -> content, or the file that holds it.
        left_out: what lies in the folder and stays here -> why.
        facts: what the card says, by name.
    """

    kind: Literal["adapter", "checkpoint"]
    folder: Path
    base_model: str
    place: str | None = None
    files: dict[str, bytes | Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add_text(self, name: str, folder: Path, source: str | None = None) -> None:
        """Add a text file, with the base's id where it names the base's place.

        Args:
            name: in the repository.
            folder: it lies in.
            source: its name there; None: the same.

        Raises:
            AdapterFileError: it is no regular file of the folder, or empty.
        """
        content = read_small(folder, source or name, MAX_TEXT_BYTES)
        self.files[name] = self.with_id(content)

    def add_binary(self, name: str, folder: Path, source: str | None = None) -> None:
        """Add a file that is sent as it is.

        Raises:
            AdapterFileError: it is no regular file of the folder.
        """
        open_file(folder, source or name).close()
        self.files[name] = folder / (source or name)

    def with_id(self, content: bytes) -> bytes:
        """Return text with the base's id where it names the base's place."""
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            return content
        return with_base(text, self.place, self.base_model).encode()

    def add_companions(self, *more: str) -> None:
        """Add the files of a tokenizer, and `more`, as far as they are there."""
        for name in (*TOKENIZER_FILES, *more):
            if not exists(self.folder, name):
                continue
            (self.add_binary if name.endswith(BINARY) else self.add_text)(name, self.folder)

    def note_left_out(self) -> None:
        """Write down what of the folder is not sent."""
        for path in sorted(self.folder.iterdir()):
            if path.name in self.files or path.name.startswith("."):
                continue
            if path.is_dir() and any(name.startswith(f"{path.name}/") for name in self.files):
                continue
            if path.name != CARD:
                self.left_out[path.name] = _why(path)

    def check_private(self, token: str | None) -> None:
        """Refuse a token or a path of this machine in any text; see `private.check_private`.

        Raises:
            ConfigError: see there.
        """
        for name, content in self.files.items():
            if isinstance(content, bytes) and name != CARD and not name.endswith(BINARY):
                check_private(name, content, token)
            elif name.endswith(".safetensors"):
                check_private(f"{name} (header)", header_of(content), token)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.files.items())
        }


def header_of(content: bytes | Path) -> bytes:
    """Return what a safetensors file says of itself."""
    if isinstance(content, bytes):
        return content[8 : 8 + int.from_bytes(content[:8], "little")]
    with content.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def sha256_of(content: bytes | Path) -> str:
    """Return the sha256 of a file that is sent, in hex."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
        return "a pickled file, which can run code where it is opened"
    return "not part of what is published"
