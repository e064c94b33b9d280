"""Writes an upcycled checkpoint: one tensor in memory at a time, one FFN while it is varied."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeadapt.export.dense import Glu, ffn_pieces, filled
from moeadapt.export.source import Source
from moeadapt.export.targets import Target
from moeadapt.export.variants import Variation, part, vary
from moeadapt.export.writer import CheckpointWriter


@dataclass(frozen=True)
class Job:
    """What is written: the base, one source per copy of the FFN, and how the copies differ."""

    dense: Source
    experts: Sequence[Source]
    target: Target
    variation: Variation
    seed: int

    def write(self, writer: CheckpointWriter, gates: dict[int, Tensor]) -> Iterator[int]:
        """Write every tensor; yield the bytes of each."""
        for name in self.dense.tensors():
            for copy in self.target.copies(name):
                yield writer.write(copy.name, self._average(name, copy.rows))
        generator = torch.Generator().manual_seed(self.seed)
        for layer in self.target.moe_layers():
            rows = gates[layer].repeat_interleave(self.variation.granularity, dim=0)
            yield writer.write_matrix(self.target.router(layer), rows)
            for fill in self.target.fills(layer):
                yield writer.write(fill.name, torch.full(fill.shape, fill.value))
            for copy in range(len(self.experts)):
                yield from self._write_copy(writer, layer, copy, generator)

    def _average(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        sources = list(dict.fromkeys(self.experts))
        value = sources[0].read(name, rows)
        if len(sources) == 1:
            return value
        total = value.float()
        for source in sources[1:]:
            total += source.read(name, rows)
        return total / len(sources)

    def _write_copy(
        self, writer: CheckpointWriter, layer: int, copy: int, generator: torch.Generator
    ) -> Iterator[int]:
        parts = self.variation.granularity
        pieces = ffn_pieces(self.target.dense, layer)
        source = self.experts[copy]
        ffn = Glu(*(source.read(piece.name, piece.rows) for piece in pieces))
        ffn = vary(ffn, self.variation, generator)
        for index in range(parts):
            places = self.target.expert(layer, copy * parts + index)
            own = filled(part(ffn, index, parts), self.target.shape.expert_width)
            for place, matrix in zip(places, own, strict=True):
                yield writer.write_matrix(place, matrix)
