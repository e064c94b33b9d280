"""Questions and answers with one model: chat template, sampling, streaming, routing."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer

from moeadapt.chat.routing import AnswerRouting, RoutingTrace
from moeadapt.errors import ConfigError
from moeadapt.evaluation.generate import answer_ends
from moeadapt.tuner.context import find_context
from moeadapt.tuner.inspect import collect_routing

Ended = Literal["end", "length", "context", "stopped"]
"""The model ended the answer; `max_new_tokens`; the longest context; somebody stopped it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: among the 50 likeliest, unless `temperature` is 0.

    Attributes:
        max_new_tokens: tokens of an answer at most, >= 1.
        temperature: of the sampling, >= 0; 0: always the likeliest token.
        seed: the same seed, messages and machine give the same answers.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no answer can be made with.

        Raises:
            ConfigError: a value is out of range.
        """
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature={self.temperature} must be 0 (the likeliest token) or more"
            )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said.

    Attributes:
        text: without special tokens.
        tokens: the text of every generated token, special ones included.
        ended: why it ended.
        seconds: how long it took.
        routing: which experts computed it; None: the model has no routers of moeadapt.
    """

    text: str
    tokens: list[str]
    ended: Ended
    seconds: float
    routing: AnswerRouting | None


class Conversation:
    """A conversation with a model, which remembers what was said.

    Attributes:
        messages: everything said so far, as the chat template takes it; always empty with `raw`:
            each message is then a text that the model continues.
        system: the first message, from nobody.

    Example:
        >>> talk = Conversation(model, tokenizer, sampling=Sampling(temperature=0.0))
        >>> talk.ask("What is a router?").text
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        raw: bool = False,
        sampling: Sampling | None = None,
    ) -> None:
        """Begin.

        Args:
            model: a causal language model, in any wrapper that can `generate`, in eval mode.
            tokenizer: its tokenizer.
            system: what the template puts before the conversation.
            raw: continue each message as plain text, without the chat template and without memory.
            sampling: how tokens are chosen.

        Raises:
            ConfigError: the tokenizer has no chat template, or `system` is of no use.
        """
        if not raw and not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer of this model has no chat template, so it was not trained to chat; "
                "with --raw (raw=True) each message is continued as plain text"
            )
        if raw and system is not None:
            raise ConfigError("a system message belongs to the chat template; leave --raw out")
        self._model, self._tokenizer = model, tokenizer
        self.system, self._raw = system, raw
        self._sampling = sampling or Sampling()
        self._ends = answer_ends(model, tokenizer)
        self._rows: list[dict[str, Any]] = []
        self._asked = 0
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self._rows, self._asked = [], 0
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def rows(self) -> list[dict[str, Any]]:
        """Return what was said as rows that training, evaluation and reports read."""
        if self._raw:
            return list(self._rows)
        said = any(message["role"] == "assistant" for message in self.messages)
        return [{"messages": list(self.messages)}] if said else []

    def ask(
        self,
        message: str,
        on_text: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answer a message.

        Args:
            message: what is asked.
            on_text: called with each piece of the answer as soon as it is there.
            stop: asked after each token; True ends the answer, and what was said is remembered.

        Raises:
            ConfigError: nothing was asked, the template refuses it, or it is longer than the
                model's context; the conversation is as it was before.
            UnsupportedError: the router cannot generate.
        """
        asked = [*self.messages, {"role": "user", "content": message}]
        prompt = self._encode(message, asked)
        room = self._room(len(prompt))
        begin = time.monotonic()
        ids, routing, stopped = self._generate(prompt, room, on_text, stop)
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        self._asked += 1
        if self._raw:
            self._rows.append({"prompt": message, "completion": text})
        else:
            self.messages = [*asked, {"role": "assistant", "content": text}]
        return Answer(
            text=text,
            tokens=[self._tokenizer.decode([token]) for token in ids],
            ended=self._ended(ids, room, stopped),
            seconds=time.monotonic() - begin,
            routing=routing,
        )

    def _encode(self, message: str, asked: list[dict[str, str]]) -> list[int]:
        if self._raw:
            ids = self._tokenizer(message)["input_ids"]
        else:
            try:
                ids = self._tokenizer.apply_chat_template(
                    asked, add_generation_prompt=True, return_dict=False
                )
            except TemplateError as error:
                raise ConfigError(f"the chat template refuses this: {error}") from None
        if not ids:
            raise ConfigError("an empty message has no tokens to go on from; write something")
        return list(ids)

    def _room(self, length: int) -> int:
        """Return how many tokens the model's context has left after a prompt."""
        config = self._model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None:
            return self._sampling.max_new_tokens
        if length >= limit:
            raise ConfigError(
                f"the conversation has {length} tokens and the model reads at most {limit}; "
                "/reset begins anew"
            )
        return min(self._sampling.max_new_tokens, limit - length)

    def _generate(
        self,
        prompt: list[int],
        room: int,
        on_text: Callable[[str], None] | None,
        stop: Callable[[], bool] | None,
    ) -> tuple[list[int], AnswerRouting | None, bool]:
        device = next(self._model.parameters()).device
        ids = torch.tensor([prompt], device=device)
        routed = find_context(self._model) is not None
        streamer = None if on_text is None else _Pieces(self._tokenizer, on_text)
        halt = _Halt(stop)
        # The same answer whatever was drawn before, and nothing that others draw is changed.
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            collect_routing(self._model) if routed else nullcontext({}) as routings,
        ):
            torch.manual_seed(self._sampling.seed + self._asked)
            trace = RoutingTrace(routings)
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._settings(room),
                stopping_criteria=StoppingCriteriaList([trace, halt]),
                streamer=streamer,
            )
        return out[0, len(prompt) :].tolist(), trace.result(), halt.stopped

    def _settings(self, room: int) -> GenerationConfig:
        """Return settings that leave nothing to the model's own, but for what ends an answer."""
        temperature = self._sampling.temperature
        return GenerationConfig(
            do_sample=temperature > 0,
            num_beams=1,
            temperature=temperature or 1.0,
            top_k=50,
            top_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_length=0,
            max_new_tokens=room,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self._ends,
        )

    def _ended(self, ids: list[int], room: int, stopped: bool) -> Ended:
        if ids and ids[-1] in self._ends:
            return "end"
        if stopped:
            return "stopped"
        return "length" if room == self._sampling.max_new_tokens else "context"


class _Pieces(TextStreamer):
    """Hands on every piece of text that later tokens cannot change."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See `transformers.TextStreamer`, which prints instead."""
        if text:
            self._on_text(text)


class _Halt(StoppingCriteria):
    """Ends an answer after the token during which somebody asked for it."""

    def __init__(self, stop: Callable[[], bool] | None) -> None:
        self._stop = stop
        self.stopped = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """See `transformers.StoppingCriteria`."""
        self.stopped = self._stop is not None and self._stop()
        return torch.full(
            (len(input_ids),), self.stopped, dtype=torch.bool, device=input_ids.device
        )
