"""The built-in base model and tasks, so that a first run needs no hub account and no data set.

    from moeadapt.embedded import load_task, resolve_model

    path = resolve_model("embedded:smollm2-135m")          # an ordinary `from_pretrained` folder
    data = load_task("pronounce", train=512, test=64)      # rows: prompt, completion, domain

Nothing here imports torch, transformers or gguf until a model is really converted.
"""

from moeadapt.embedded.model import MODELS, cache_folder, find_model, name_of, resolve_model
from moeadapt.embedded.tasks import TASKS, TaskData, load_task, mix

__all__ = [
    "MODELS",
    "TASKS",
    "TaskData",
    "cache_folder",
    "find_model",
    "load_task",
    "mix",
    "name_of",
    "resolve_model",
]
