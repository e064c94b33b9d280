"""Small experts beside the base's FFN, written by hand through a target, compute their formula."""

import pytest
import torch
from torch.nn.functional import silu
from torch.testing import assert_close

from moeadapt.export.dense import ffn_pieces
from moeadapt.export.receipt import compare
from moeadapt.export.shards import plan
from moeadapt.export.source import ModelSource
from moeadapt.export.targets import EXPORTERS, MoeShape
from moeadapt.export.verify import load_strictly
from moeadapt.export.writer import CheckpointWriter
from tests.export.bases import ADDITIVE, FFN, HIDDEN, base, token_ids

E, K, M = 4, 2, 16
CASES = [(name, target) for name, targets in ADDITIVE.items() for target in targets]


def weights_of(seed):
    """Return a random gate and E random experts per layer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    return [
        (draw(E, HIDDEN), [(draw(M, HIDDEN), draw(M, HIDDEN), draw(HIDDEN, M)) for _ in range(E)])
        for _ in range(2)
    ]


def with_experts(model, layers, scoring):
    """Add K of E experts to each FFN's output, from the formula."""
    for layer, (gate, experts) in zip(model.model.layers, layers, strict=True):

        def add(module, args, out, gate=gate, experts=experts):
            x = args[0]
            scores = getattr(torch, scoring)(x @ gate.T, *([-1] if scoring == "softmax" else []))
            kept = scores * (scores >= scores.topk(K, dim=-1).values[..., -1:])
            kept = kept / kept.sum(-1, keepdim=True)
            for e, (g, u, d) in enumerate(experts):
                out = out + kept[..., e, None] * ((silu(x @ g.T) * (x @ u.T)) @ d.T)
            return out

        layer.mlp.register_forward_hook(add)
    return model


@pytest.mark.parametrize(("name", "target_name"), CASES)
def test_base_ffn_in_the_shared_slot_plus_small_experts_is_the_formula(name, target_name, tmp_path):
    model, layers = base(name), weights_of(3)
    shape = MoeShape(num_experts=E, top_k=K, expert_width=M, shared_width=FFN)
    target, source = EXPORTERS[target_name](model.config, shape), ModelSource(model)
    with CheckpointWriter(tmp_path / "moe", plan(target, source.tensors())) as writer:
        for tensor in source.tensors():
            for copy in target.copies(tensor):
                writer.write(copy.name, source.read(tensor, copy.rows))
        for layer, (gate, experts) in enumerate(layers):
            writer.write_matrix(target.router(layer), gate)
            for fill in target.fills(layer):
                writer.write(fill.name, torch.full(fill.shape, fill.value))
            for e, matrices in enumerate(experts):
                for place, matrix in zip(target.expert(layer, e), matrices, strict=True):
                    writer.write_matrix(place, matrix)
            pieces = ffn_pieces(model.config, layer)
            own = [source.read(piece.name, piece.rows) for piece in pieces]
            own[2] *= target.shared_down_scale
            for place, matrix in zip(target.shared(layer), own, strict=True):
                writer.write_matrix(place, matrix)
        writer.write_json("config.json", {**target.config().to_dict(), **target.json_fields()})
        writer.finish()
    with torch.no_grad():
        plain = model(token_ids(), use_cache=False).logits
        expected = with_experts(model, layers, target.scoring)(token_ids(), use_cache=False).logits
        found = load_strictly(tmp_path / "moe")
        for implementation in ("eager", "grouped_mm"):
            found.set_experts_implementation(implementation)
            got = found(token_ids(), use_cache=False).logits
            assert_close(got, expected, rtol=0.0, atol=1e-4)
    assert compare([plain], [expected], torch.float32).max_logit_difference > 0.1
