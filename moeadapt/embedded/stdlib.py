"""Short documented functions of this interpreter's standard library."""

import ast
import functools
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "encodings",
    "pydoc_data",
}
# Characters; about four to a token, and a CPU trains 70 tokens per second.
_MAX_SIGNATURE = 120
_DOCSTRING = range(16, 201)
_BODY = range(10, 301)


@functools.cache
def function_rows() -> tuple[tuple[str, str], ...]:
    """Return (signature and docstring, body) of every short documented function, in file order.

    A prompt occurs once. The body is not indented; comments in it are kept.
    """
    bodies: dict[str, str] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            for prompt, body in _rows_of_file(path):
                bodies.setdefault(prompt, body)
    return tuple(bodies.items())


def _rows_of_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = _parse(source)
    # Templates and deliberately broken files are among them.
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    lines = source.splitlines()
    for function in _functions(tree.body):
        if prompt := _prompt(function):
            body = _body(function, lines)
            if len(body) in _BODY and _is_function(prompt, body):
                yield prompt, body


def _functions(statements: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Yield functions of a module and of its classes; walking every node takes twice as long."""
    for node in statements:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body)


def _prompt(function: ast.FunctionDef) -> str:
    """Return the signature with the docstring's first paragraph, or nothing if it is unfit."""
    summary = (ast.get_docstring(function) or "").split("\n\n")[0].strip()
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    signature = f"def {function.name}({ast.unparse(function.args)}){returns}:"
    # A docstring that opens with a doctest says nothing in words.
    unfit = len(summary) not in _DOCSTRING or summary.startswith(">>>")
    if unfit or len(signature) > _MAX_SIGNATURE:
        return ""
    indented = textwrap.indent(f'"""{summary}"""', "    ")
    return f"{signature}\n{indented}"


def _body(function: ast.FunctionDef, lines: list[str]) -> str:
    """Return the lines after the docstring, which keeps decorators and comments, dedented."""
    rest = lines[function.body[0].end_lineno : function.end_lineno]
    return textwrap.dedent("\n".join(rest)).strip("\n").rstrip()


def _is_function(prompt: str, body: str) -> bool:
    """Tell whether the two join into code with at least one statement after the docstring.

    They do not where a string at column 0 defeats the dedent, or where the docstring has quotes
    or escapes that its source spelt in another way.
    """
    try:
        (function,) = _parse(f"{prompt}\n{textwrap.indent(body, '    ')}").body
    except (SyntaxError, ValueError):
        return False
    return isinstance(function, ast.FunctionDef) and len(function.body) > 1


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        # Invalid escapes in old files are no concern of the caller.
        warnings.simplefilter("ignore")
        return ast.parse(source)
