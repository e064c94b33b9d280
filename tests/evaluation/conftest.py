"""One model for the whole folder, and no network."""

import os
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def model() -> Any:
    """Return the model of `kit`; tests leave it as they find it."""
    from tests.evaluation import kit

    return kit.model()
