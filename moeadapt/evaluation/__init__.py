"""Held-out evaluation of adapters: domains, paired comparisons, forgetting, public benchmarks."""

from moeadapt.evaluation.compare import compare as compare
from moeadapt.evaluation.forgetting import forgetting as forgetting
from moeadapt.evaluation.harness import run_tasks as run_tasks
from moeadapt.evaluation.results import Comparison as Comparison
from moeadapt.evaluation.results import Difference as Difference
from moeadapt.evaluation.results import Evaluation as Evaluation
from moeadapt.evaluation.results import Forgetting as Forgetting
from moeadapt.evaluation.results import Interval as Interval
from moeadapt.evaluation.results import RowScore as RowScore
from moeadapt.evaluation.results import Score as Score
from moeadapt.evaluation.run import evaluate as evaluate

__all__ = [
    "Comparison",
    "Difference",
    "Evaluation",
    "Forgetting",
    "Interval",
    "RowScore",
    "Score",
    "compare",
    "evaluate",
    "forgetting",
    "run_tasks",
]
