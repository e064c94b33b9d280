"""No network, no telemetry; and other libraries may warn while they are imported or trained."""

import importlib
import os
import warnings

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

LAZY = ("SFT", "DPO", "KTO", "GRPO", "RLOO", "Reward")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in LAZY:
        getattr(importlib.import_module("trl"), f"{name}Trainer")
    importlib.import_module("tensorboard.backend.event_processing.event_accumulator")

FOREIGN = [
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning:(torch|transformers|peft|trl|accelerate|datasets|tensorboard)",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let other libraries warn; our own warnings still fail a test."""
    for item in items:
        if "tests/training" in item.path.as_posix():
            for rule in FOREIGN:
                item.add_marker(pytest.mark.filterwarnings(rule), append=False)
