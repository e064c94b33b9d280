"""`PeftModel.save_pretrained` of an adapter of ours: the folder is the old one or the new one."""

import functools
import os
from pathlib import Path
from typing import Any

from peft import PeftModel

from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.savable import check_savable
from moeadapt.whole_folder import whole_folder

_MARK = "_moeadapt_saves_whole"


def save_whole() -> None:
    """Let PEFT write our adapters into a hidden folder first; calling it again does nothing.

    PEFT calls nothing of a tuner between the weights and the settings, so its method is wrapped.
    Adapters of other types are saved as ever.
    """
    original = PeftModel.save_pretrained
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def save_pretrained(
        self: PeftModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> None:
        ours = any(isinstance(config, MoeLoraConfig) for config in self.peft_config.values())
        if not ours or not kwargs.get("is_main_process", True):
            return original(self, str(save_directory), *args, **kwargs)
        chosen = kwargs.get("selected_adapters") or list(self.peft_config)
        safe = args[0] if args else kwargs.get("safe_serialization", True)
        check_savable(self, save_directory, chosen, safe)
        with whole_folder(Path(save_directory)) as folder:
            return original(self, str(folder), *args, **kwargs)

    setattr(save_pretrained, _MARK, True)
    PeftModel.save_pretrained = save_pretrained  # type: ignore[method-assign]
