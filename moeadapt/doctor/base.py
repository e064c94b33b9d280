"""Checks of an adapter on the base model that it is to be loaded on."""

from collections.abc import Iterator
from typing import Any

from moeadapt.adapter_format.fingerprint import compare, fingerprint
from moeadapt.adapter_format.options import loading_options
from moeadapt.doctor.finding import Finding, Subject


def same_base(subject: Subject) -> Iterator[Finding]:
    """Compare the base with the one that the manifest names."""
    said = (subject.facts.get("manifest") or {}).get("base")
    if not isinstance(said, dict):
        yield Finding(
            check="base",
            level="warning",
            what=f"{subject.place}: says nothing of its base",
            why="an adapter on another base gives wrong answers without an error",
            cure="make sure that it is the right base; saving the adapter again writes it down",
        )
        return
    same, notes = compare(said, fingerprint(_load(subject)), f"{subject.place}: this adapter")
    for note in notes:
        yield Finding(
            check="base",
            level="warning",
            what=note,
            why="an adapter on another base gives wrong answers without an error",
            cure="take the base with that name and revision if the answers matter",
        )
    if same:
        what = f"{subject.base} is the base it was trained on: sampled weights are equal bitwise"
        yield Finding(check="base", level="ok", what=what)


def fits(subject: Subject) -> Iterator[Finding]:
    """Load the adapter as a user would, the comparison of the bases left out."""
    from moeadapt.tuner.checked import load_adapter_checked

    if subject.facts.get("failed"):
        yield Finding(
            check="fits",
            level="skipped",
            what="not loaded on the base, because its files are wrong already",
            why="names and shapes of the tensors were not compared with the base",
            cure="see to the errors above, then run it again",
        )
        return
    with loading_options(allow_other_base=True):
        load_adapter_checked(_load(subject), subject.place)


def _load(subject: Subject) -> Any:
    if "model" not in subject.facts:
        from moeadapt.training.base_model import load_base
        from moeadapt.training.objectives import OBJECTIVES
        from moeadapt.training.recipe import RunArguments

        run = RunArguments(model_name_or_path=subject.base, dtype="auto")  # type: ignore[arg-type]
        settings = subject.facts.get("settings") or {}
        name = "reward" if settings.get("task_type") == "SEQ_CLS" else "sft"
        subject.facts["model"] = load_base(run, OBJECTIVES[name])[0]
    return subject.facts["model"]
