"""Sums and truncations of low-rank products B A, never through the full matrix.

Letters: D in, O out, R rank.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.tuner.plain import Pair


def stack(pairs: Sequence[Pair], weights: Sequence[float] | None = None) -> Pair:
    """Return the sum of `pairs`, each times its weight, at the sum of their ranks."""
    weights = [1.0] * len(pairs) if weights is None else weights
    return Pair(
        a=torch.cat([pair.a for pair in pairs]),
        b=torch.cat([w * pair.b for w, pair in zip(weights, pairs, strict=True)], 1),
    )


def inner(p: Pair, q: Pair) -> float:
    """Return the Frobenius inner product of two products: sum((B_p^T B_q) * (A_p A_q^T))."""
    return float(((p.b.T @ q.b) * (p.a @ q.a.T)).sum())


def singular(pair: Pair) -> tuple[Float[Tensor, "O r"], Float[Tensor, " r"], Float[Tensor, "r D"]]:
    """Return the singular value decomposition of `b @ a`, by two QRs and one of [R, R]."""
    left, down = torch.linalg.qr(pair.b)
    right, up = torch.linalg.qr(pair.a.T)
    u, s, vh = torch.linalg.svd(down @ up.T, full_matrices=False)
    return left @ u, s, vh @ right.T


def truncate(pair: Pair, rank: int) -> Pair:
    """Return the nearest pair of at most `rank`, in the Frobenius norm."""
    if pair.rank <= rank:
        return pair
    u, s, vh = singular(pair)
    root = s[:rank].sqrt()
    return Pair(a=root.unsqueeze(-1) * vh[:rank], b=u[:, :rank] * root)


def shrink(pair: Pair) -> Pair:
    """Return the same product without ranks that add nothing to working precision."""
    _, s, _ = singular(pair)
    kept = int((s > s.max() * pair.rank * torch.finfo(s.dtype).eps).sum())
    return truncate(pair, max(kept, 1))
