"""Measures everything that a report shows: one pass for the routing, one per other way of routing.

Letters: L layers, E experts, N texts, D domains, T tokens.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.report.arms import measure_arms, summarize
from moeadapt.report.counts import LayerCounts
from moeadapt.report.data import ColoredText, Flow, Layer, ReportData
from moeadapt.report.domains import DomainUse, compare_domains, enough_permutations, permuted_labels
from moeadapt.report.settings import settings_of, versions
from moeadapt.report.similarity import cosines
from moeadapt.report.texts import TokenizedText, check_texts, pieces, to_batches, tokenize
from moeadapt.report.training_log import read_training_log
from moeadapt.report.verdicts import verdicts
from moeadapt.report.watch import SHOWN_TOKENS, Watched, shown_texts, watch
from moeadapt.tuner.head import RouterHead
from moeadapt.tuner.inspect import heads_of
from moeadapt.tuner.plain import adapter_config
from moeadapt.tuner.probe import evaluating, keeping_trainable


def collect(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    *,
    adapter: str | None = None,
    max_length: int = 256,
    batch_size: int = 8,
    permutations: int | None = None,
    bootstrap: int = 1000,
    shown: int = 2,
    seed: int = 0,
    training_log: str | Path | None = None,
    title: str | None = None,
) -> ReportData:
    """Measure a mixture on held-out texts.

    The model is put back as it was: its mode, its active adapter, what is trainable. The loss is
    that of each text's tokens but the first. Layers may differ in their number of experts: their
    numbers have their own sizes, a flow is [E of the first][E of the second].

    Args:
        model: the PeftModel of a causal language model.
        tokenizer: its tokenizer.
        texts: domain -> texts that were not trained on.
        adapter: which one; None: the active one.
        max_length: tokens of a text, >= 2, the rest is cut; at most the positions the model has.
        batch_size: texts of a forward. A batch has texts of all domains, see `spread`.
        permutations: of the texts' domains, >= 1; p values are at least 1 / (permutations + 1).
            None: as many as one lift alone needs to stand out, see `enough_permutations`.
        bootstrap: resamples of the texts, >= 1.
        shown: coloured texts per domain, >= 0; at most 48 in all.
        seed: of everything that is random.
        training_log: a trainer_state.json or a folder that holds one; None: no training is shown.
        title: name of the report; None: the name of the adapter.

    Raises:
        ConfigError: there is no mixture, no PEFT model, no texts, a domain without texts, a text
            without tokens, no log where it was said to be, a number out of range, or a loss that
            is not finite.
        UnsupportedError: the model is no causal language model, or its routings cannot be watched.
    """
    start = time.perf_counter()
    check_texts(texts)
    check_numbers(
        {"max_length": (max_length, 2), "shown": (shown, 0)}
        | {"batch_size": (batch_size, 1), "bootstrap": (bootstrap, 1)}
        | ({} if permutations is None else {"permutations": (permutations, 1)})
    )
    peft_model, adapter = check_model(model, adapter)
    log = [] if training_log is None else read_training_log(training_log)
    positions = getattr(peft_model.config, "max_position_embeddings", None) or max_length
    tokenized = tokenize(texts, tokenizer, min(max_length, positions))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches = to_batches(tokenized, batch_size, pad)
    names = list(texts)
    with keeping_trainable(peft_model), _measuring(peft_model, adapter, seed):
        found = watch(peft_model, adapter, tokenized, batches, shown_texts(tokenized, shown))
        num_experts = [counts.num_experts for counts in found.layers]
        losses = measure_arms(peft_model, batches, found.losses, min(num_experts), seed)
    arms = summarize(
        losses, torch.tensor([len(t.ids) - 1 for t in tokenized]).double(), bootstrap, seed
    )
    heads = {name: heads_of(peft_model)[f"{adapter}/{name}"] for name in found.names}
    if permutations is None:
        permutations = enough_permutations(len(names), max(num_experts), len(tokenized))
    layers = _layers(found.layers, heads, tokenized, len(names), permutations, seed)
    per_domain = [len(own) for own in texts.values()]
    causal = not any(head.router.looks_ahead for head in heads.values())
    scored = sum(len(text.ids) > 1 for text in tokenized)
    return ReportData(
        title=adapter if title is None else title,
        settings=settings_of(peft_model, adapter),
        num_experts=max(num_experts),
        domains=names,
        texts_per_domain=per_domain,
        tokens=sum(len(text.ids) for text in tokenized),
        cut=sum(text.cut for text in tokenized),
        permutations=permutations,
        verdicts=verdicts(layers, arms, per_domain, permutations, scored, causal=causal),
        arms=arms,
        layers=layers,
        flows=[_flow(i, flow) for i, flow in enumerate(found.flows)],
        texts=[_colored(i, tokenized[i], names, found, tokenizer) for i in found.shown],
        training=log,
        versions=versions(),
        seconds=time.perf_counter() - start,
    )


def check_model(model: nn.Module, adapter: str | None) -> tuple[PeftModel, str]:
    """Return the model and the name of the mixture to measure.

    Raises:
        ConfigError: it is no PEFT model, or has no such mixture.
        UnsupportedError: it is no causal language model.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"a report needs the PeftModel that get_peft_model or PeftModel.from_pretrained "
            f"returned; this is a {type(model).__name__}"
        )
    active = model.active_adapter
    if not isinstance(active, str):
        raise ConfigError(f"the adapters {active} are active; activate one with set_adapter")
    name = active if adapter is None else adapter
    config = adapter_config(model, name)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise UnsupportedError(
            f"a report measures the loss of causal language models; adapter {name!r} is for "
            f"{config.task_type}. Use moeadapt.collect_routing to look at its routings"
        )
    return model, name


def check_numbers(numbers: Mapping[str, tuple[Any, int]]) -> None:
    """Check options, given as name -> (value, least).

    Raises:
        ConfigError: one is no whole number, or too small.
    """
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
        if value < least:
            raise ConfigError(f"{name}={value} must be at least {least}")


@contextmanager
def _measuring(model: PeftModel, adapter: str, seed: int) -> Iterator[None]:
    """Measure one adapter in eval mode; afterwards it is as it was."""
    before = model.active_adapter
    assert isinstance(before, str)  # see `check_model`
    try:
        if before != adapter:
            model.set_adapter(adapter)
        with evaluating(model), torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        if before != adapter:
            model.set_adapter(before)


def _layers(
    counts: Sequence[LayerCounts],
    heads: Mapping[str, RouterHead],
    texts: Sequence[TokenizedText],
    num_domains: int,
    permutations: int,
    seed: int,
) -> list[Layer]:
    labels = torch.tensor([text.domain for text in texts])
    permuted = permuted_labels(labels, permutations, seed)
    return [
        _layer(
            one,
            compare_domains(labels, permuted, num_domains, one),
            cosines(heads[one.name].banks),
        )
        for one in counts
    ]


def _layer(counts: LayerCounts, use: DomainUse, similarity: Tensor | None) -> Layer:
    load = counts.load
    # A layer that uses no expert has no share of anything, and is not balanced.
    undefined = math.nan if float(load.sum()) == 0 else 0.0
    return Layer(
        name=counts.name,
        load=load.tolist(),
        importance=counts.importance.tolist(),
        max_over_mean=float(load.max()) * len(load) + undefined,
        cv=float(load.std(correction=0)) * len(load) + undefined,
        effective_experts=float(torch.special.entr(load).sum().exp()) + undefined,
        active=counts.active,
        entropy=counts.entropy,
        lift=use.lift.tolist(),
        p_value=use.p_value.tolist(),
        mutual_information=use.mutual_information,
        mutual_information_null=use.mutual_information_null,
        mutual_information_high=use.mutual_information_high,
        mutual_information_p=use.mutual_information_p,
        similarity=None if similarity is None else similarity.tolist(),
        coactivation=counts.coactivation.tolist(),
    )


def _flow(layer: int, tokens: Tensor) -> Flow:
    return Flow(layer=layer, shares=(tokens / tokens.sum().clamp(min=1)).tolist())


def _colored(
    index: int, text: TokenizedText, names: Sequence[str], found: Watched, tokenizer: Any
) -> ColoredText:
    slots = found.shown[index]
    return ColoredText(
        domain=names[text.domain],
        tokens=pieces(text, tokenizer)[:SHOWN_TOKENS],
        experts=[experts for experts, _ in slots],
        weights=[weights for _, weights in slots],
    )
