"""A process that calls the command line as often as it is asked: imports cost once.

Run as `python -m tests.faults.cli_process`; reads a JSON list of arguments per line, answers with a
JSON line. Not inside pytest, whose run-time type checks do not know typer's `Context`.
"""

import json
import sys

from typer.testing import CliRunner


def main() -> None:
    """Answer until the input ends."""
    from moeadapt.cli import app

    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        done = CliRunner().invoke(app, json.loads(line))
        known = done.exception is None or isinstance(done.exception, SystemExit)
        answer = {
            "code": done.exit_code,
            "out": done.stdout,
            "err": done.stderr if known else repr(done.exception),
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
