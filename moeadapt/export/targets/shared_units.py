"""The shared place of classes that count it in experts: its width is a multiple of theirs."""

from moeadapt.export.targets.base import MoeShape


def units_refusal(shape: MoeShape) -> str | None:
    """Return why the shared width does not fit, or None."""
    s, m = shape.shared_width, shape.expert_width
    if s % m == 0:
        return None
    fitting = [width for width in range(1, min(4 * m, s) + 1) if s % width == 0]
    nearest = sorted(fitting, key=lambda width: abs(width - m))[:2]
    return (
        f"expert_width={m} does not divide the shared width {s}, which this class counts in "
        f"experts; the nearest that do: {sorted(nearest)}"
    )
