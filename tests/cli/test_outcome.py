"""Exit codes, and what is shown where: results on stdout, progress where somebody watches."""

import io
import sys

import pytest
import typer
from rich.table import Table

from moeadapt.cli.console import result_console, working
from moeadapt.cli.outcome import reports_errors
from moeadapt.errors import (
    AssetError,
    ConfigError,
    ExportError,
    TrainingError,
    TrainingStopped,
    UnsupportedError,
)
from moeadapt.progress import alone, silence, spinner, watched


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (ConfigError("x"), 2),
        (UnsupportedError("x"), 2),
        (AssetError("x"), 1),
        (ExportError("x"), 1),
        (TrainingError("x"), 1),
        (TrainingStopped("x", 143), 143),
        (TrainingStopped("x", 130), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code(raised, code, capsys):
    @reports_errors
    def verb() -> None:
        raise raised

    with pytest.raises(typer.Exit) as stopped:
        verb()
    assert stopped.value.exit_code == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch):
    """Make stderr a terminal; in the test itself, since pytest sets it anew for each phase."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return stream


def test_a_terminal_sees_what_goes_on_and_stdout_stays_clean(monkeypatch, capsys):
    terminal = open_terminal(monkeypatch)
    with working("loading it"):
        pass
    assert "loading it" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_a_pipe_sees_no_progress(capsys):
    with working("loading it"):
        pass
    assert capsys.readouterr().err == ""


def test_json_shows_no_progress_on_a_terminal(monkeypatch):
    terminal = open_terminal(monkeypatch)

    @reports_errors
    def verb(*, as_json: bool) -> None:
        assert watched() is not as_json
        with working("loading it"):
            pass

    verb(as_json=True)
    assert terminal.getvalue() == ""
    verb(as_json=False)
    assert "loading it" in terminal.getvalue()


def test_a_bar_hides_the_spinner_around_it(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with spinner("around"):
        terminal.truncate(0)
        with alone():
            terminal.truncate(0)
            assert terminal.getvalue() == ""
        assert "around" in terminal.getvalue()
    with silence(), spinner("silent"), alone():
        assert "silent" not in terminal.getvalue()


def test_libraries_show_their_bars_again_afterwards():
    from transformers.utils import logging

    logging.enable_progress_bar()
    with working("loading it"):
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_tables_have_no_colours_with_no_color(no_color, coloured, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", no_color)
    table = Table("name")
    table.add_row("x", style="red")
    result_console().print(table)
    assert ("\x1b[31m" in capsys.readouterr().out) is coloured


def test_a_table_in_a_pipe_has_no_escape_codes(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    table = Table("name")
    table.add_row("x", style="red")
    result_console().print(table)
    assert "\x1b" not in capsys.readouterr().out
