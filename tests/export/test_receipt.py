"""A receipt measures what it says, and survives JSON."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from moeadapt.errors import ConfigError
from moeadapt.export.engines import Verdict
from moeadapt.export.receipt import RECEIPT, Receipt, compare


def logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, 11, generator=generator, dtype=torch.float64) for n in (3, 5)]


def test_the_measures_are_those_of_their_definitions():
    a, b = logits(0), logits(1)
    measured = compare(a, b, torch.float64)
    differences, kl, same = [], 0.0, 0
    for x, y in zip(a, b, strict=True):
        for p, q in zip(x[0].tolist(), y[0].tolist(), strict=True):
            differences += [abs(u - v) for u, v in zip(p, q, strict=True)]
            zp, zq = (math.log(sum(math.exp(v) for v in row)) for row in (p, q))
            kl += sum(math.exp(u - zp) * ((u - zp) - (v - zq)) for u, v in zip(p, q, strict=True))
            same += p.index(max(p)) == q.index(max(q))
    assert measured.tokens == 8
    found = [measured.max_logit_difference, measured.mean_logit_difference, measured.kl]
    expected = [max(differences), sum(differences) / len(differences), kl / 8]
    assert_close(torch.tensor(found), torch.tensor(expected))
    assert measured.argmax_agreement == same / 8
    assert measured.dtype == "float64"


def test_equal_logits_differ_by_nothing():
    measured = compare(logits(0), logits(0), torch.float32)
    assert measured.max_logit_difference == measured.kl == 0.0
    assert measured.argmax_agreement == 1.0


@pytest.mark.parametrize(("scale", "allowed"), [(1.0, 1e-4), (10.0, 1e-4), (40.0, 4e-4)])
def test_the_tolerance_grows_with_logits_above_ten(scale, allowed):
    reference = [torch.tensor([[[-scale, 0.5]]])]
    measured = compare(reference, reference, torch.float32)
    assert measured.largest_logit == scale
    assert measured.float32_tolerance == pytest.approx(allowed)


def receipt(**fields) -> Receipt:
    known = {
        "kind": "export", "target": "mixtral", "base_type": "llama", "num_experts": 4, "top_k": 2,
        "settings": {"seed": 1}, "source_sha256": {"base": "ab"}, "dtype": {"BF16": 2_500_000},
        "bytes_on_disk": 2_500_000, "base_bytes": 900, "tolerance": 1e-4,
        "engines": (Verdict("vllm", "wrong", "because"),),
        "measured": compare(logits(0), logits(1), torch.float32),
    }  # fmt: skip
    return Receipt(**{**known, **fields})


@pytest.mark.parametrize("measured", [None, compare(logits(0), logits(1), torch.float32)])
def test_a_receipt_is_equal_after_json(measured, tmp_path):
    mine = receipt(measured=measured)
    (tmp_path / RECEIPT).write_text(json.dumps(mine.to_dict()))
    assert Receipt.load(tmp_path) == mine


def test_the_text_says_sizes_differences_and_engines():
    text = receipt().text()
    for part in ("export of llama to mixtral", "2.50 MB (base 900 B)", "wrong: because", "1e-04"):
        assert part in text


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"engines": 1, "measured": null}'])
def test_a_damaged_receipt_is_an_error(content, tmp_path):
    with pytest.raises(ConfigError, match="no receipt"):
        Receipt.load(tmp_path)
    (tmp_path / RECEIPT).write_text(content)
    with pytest.raises(ConfigError, match="no receipt"):
        Receipt.load(tmp_path)
