"""Small mixtures and texts for the tests of the report."""

import random

import torch

from moeadapt.routers.hash import HashConfig
from moeadapt.routing import TokenContext
from tests.tiny import adapt, moe_config, tiny
from tests.toy import WORDS, toy_tokenizer

TOKENIZER = toy_tokenizer()
FEW = {"permutations": 99, "bootstrap": 99, "batch_size": 16}


def mixture(kind: str = "block", **fields):
    """Return a mixture in double precision; with few targets where any will do."""
    if kind == "block":
        fields = {"target_modules": ["q_proj", "up_proj", "down_proj"], **fields}
    return adapt(tiny("llama"), moe_config(kind, **fields)).double().eval()


def sayings(words: list[str], count: int, seed: int, least: int = 4, most: int = 12) -> list[str]:
    """Return texts of words drawn at random."""
    generator = random.Random(seed)
    return [
        " ".join(generator.choices(words, k=generator.randint(least, most))) for _ in range(count)
    ]


def words_of(experts: set[int], num_experts: int = 4) -> list[str]:
    """Return the words that router `hash` gives to `experts`."""
    router = HashConfig().build(8, num_experts)
    ids = torch.tensor(TOKENIZER.convert_tokens_to_ids(WORDS))
    weights = router(torch.zeros(len(ids), 8), TokenContext(token_ids=ids)).weights
    return [w for w, e in zip(WORDS, weights.argmax(-1).tolist(), strict=True) if e in experts]


def two_domains(count: int = 9) -> dict[str, list[str]]:
    """Return texts of two domains with the same words."""
    return {"a": sayings(WORDS, count, 1), "b": sayings(WORDS, count + 2, 2)}
