"""The loop of `moeadapt chat`: reads messages and commands, prints answers."""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from moeadapt.chat.conversation import Answer, Conversation
from moeadapt.cli.chat_routing import print_routing, routing_json
from moeadapt.errors import ConfigError, MoeAdaptError, did_you_mean

PROMPT = "> "

COMMANDS = {
    "/routing": "which experts gave the last answer; /routing 3: the tokens of layer 3, "
    "/routing all: every layer",
    "/reset": "forget what was said",
    "/save": "write what was said to a new .jsonl file that training and reports read: /save FILE",
    "/help": "these commands; a message that begins with / is written with //",
    "/quit": "end; Ctrl-D too",
}

ENDINGS = {
    "length": "[cut: --max-new-tokens]",
    "context": "[cut: the context of the model is full; /reset begins anew]",
    "stopped": "[stopped]",
}


class Loop:
    """Reads until the end of the input or /quit.

    Attributes:
        last: the last answer; None: there is none yet.
    """

    def __init__(self, talk: Conversation, *, as_json: bool, interactive: bool) -> None:
        """Prepare.

        Args:
            talk: the conversation.
            as_json: print one JSON object per answer instead of text as it comes.
            interactive: somebody is there: show a prompt, go on after a mistake, and let Ctrl-C
                stop an answer. Otherwise the first mistake ends the loop.
        """
        self._talk, self._as_json, self._interactive = talk, as_json, interactive
        self.last: Answer | None = None

    def run(self) -> None:
        """Answer every message.

        Raises:
            MoeAdaptError: see `Conversation.ask`, unless somebody is there to be told.
        """
        if self._interactive:
            _note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
        for line in self._lines():
            try:
                if not self._handle(line):
                    return
            except MoeAdaptError as error:
                if not self._interactive:
                    raise
                _note(f"error: {error}")

    def _lines(self) -> Iterator[str]:
        """Yield what is typed, without empty lines."""
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                _note("\nCtrl-D or /quit ends")
                continue
            if line is None:
                return
            if line.strip():
                yield line.strip()

    def _read(self) -> str | None:
        if not self._interactive:
            return sys.stdin.readline() or None
        try:
            return input(PROMPT)
        except EOFError:
            typer.echo()
            return None

    def _handle(self, line: str) -> bool:
        """Do what a line says; False: it says that this is the end."""
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line.removeprefix("/") if line.startswith("//") else line)
            return True
        command, _, argument = line.partition(" ")
        if command not in COMMANDS:
            raise ConfigError(
                f"unknown command {command!r}{did_you_mean(command, COMMANDS)}; one of "
                f"{', '.join(COMMANDS)}. A message that begins with / is written with //"
            )
        if command == "/quit":
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/routing": self._routing,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: _note("\n".join(f"{k:9} {v}" for k, v in COMMANDS.items())),
        }
        actions[command](argument.strip())
        return True

    def _answer(self, message: str) -> None:
        on_text = None if self._as_json else _print_piece
        with _ctrl_c_stops(self._interactive) as stop:
            self.last = answer = self._talk.ask(message, on_text, stop)
        if self._as_json:
            typer.echo(json.dumps(_to_dict(message, answer), ensure_ascii=False))
            return
        typer.echo()
        if answer.ended in ENDINGS:
            _note(ENDINGS[answer.ended])

    def _routing(self, argument: str) -> None:
        if self._as_json:
            raise ConfigError("with --json each answer holds its routing; leave /routing out")
        if self.last is None:
            raise ConfigError("there is no answer yet whose routing could be shown")
        print_routing(self.last, argument)

    def _reset(self, argument: str) -> None:
        self._talk.reset()
        self.last = None
        _note("forgotten; a new conversation")

    def _save(self, argument: str) -> None:
        if not argument:
            raise ConfigError("/save needs the name of a new file: /save chat.jsonl")
        rows = self._talk.rows()
        if not rows:
            raise ConfigError("there is nothing to save yet")
        try:
            with Path(argument).open("x", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except FileExistsError:
            raise ConfigError(f"{argument} exists; name a new file") from None
        except OSError as error:
            raise ConfigError(f"cannot write {argument}: {error.strerror}") from None
        _note(f"wrote {argument}")


def printable(text: str) -> str:
    """Return text that cannot command a terminal: a model may say escape sequences."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < ord(" ") and c not in "\n\t"
        else "\N{REPLACEMENT CHARACTER}" if 0x7F <= ord(c) < 0xA0  # noqa: PLR2004 - DEL and C1
        else c
        for c in text
    )  # fmt: skip


def _print_piece(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _note(text: str) -> None:
    """Say what is not part of an answer."""
    typer.echo(text, err=True)


def _to_dict(message: str, answer: Answer) -> dict[str, Any]:
    return {
        "message": message,
        "answer": answer.text,
        "ended": answer.ended,
        "tokens": len(answer.tokens),
        "seconds": round(answer.seconds, 3),
        "routing": None if answer.routing is None else routing_json(answer),
    }


@contextmanager
def _ctrl_c_stops(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Yield whether Ctrl-C was pressed; a second one interrupts wherever the answer is."""
    pressed: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
