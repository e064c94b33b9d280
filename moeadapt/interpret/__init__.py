"""What experts contribute: the numbers behind a routing report.

One file per question. Each is a function of a model and batches, runs in eval mode, leaves the
model as it was, counts no padding and returns plain numbers. Losses are in nats per token.
"""

from moeadapt.interpret.ablation import Ablation, ablation
from moeadapt.interpret.context_independence import (
    ContextIndependence,
    LayerIndependence,
    context_independence,
)
from moeadapt.interpret.contributions import Contributions, LayerContributions, contributions
from moeadapt.interpret.counterfactual import Counterfactual, Difference, counterfactual
from moeadapt.interpret.fidelity import Approximation, Fidelity, fidelity
from moeadapt.interpret.gate_sensitivity import GateSensitivity, gate_sensitivity
from moeadapt.interpret.information import Information
from moeadapt.interpret.probe_experts import ProbedExperts, probe_experts
from moeadapt.interpret.prototypes import Prototype, prototypes
from moeadapt.interpret.shapley import Shapley, shapley
from moeadapt.interpret.tag_information import TagInformation, tag_information
from moeadapt.tuner.probe import Batch, read_batches

__all__ = [
    # what to measure on
    "Batch",
    "read_batches",
    # one expert at a time
    "contributions",
    "Contributions",
    "LayerContributions",
    "ablation",
    "Ablation",
    "shapley",
    "Shapley",
    "probe_experts",
    "ProbedExperts",
    "prototypes",
    "Prototype",
    # the routing as a whole
    "counterfactual",
    "Counterfactual",
    "Difference",
    "fidelity",
    "Fidelity",
    "Approximation",
    "gate_sensitivity",
    "GateSensitivity",
    # what routing depends on
    "tag_information",
    "TagInformation",
    "Information",
    "context_independence",
    "ContextIndependence",
    "LayerIndependence",
]
