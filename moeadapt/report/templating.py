"""The Jinja2 environment of the report: everything is escaped unless it is markup of our own."""

from functools import cache

import jinja2


@cache
def environment() -> jinja2.Environment:
    """Return the environment over `moeadapt/report/templates`."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("moeadapt.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def source(name: str) -> str:
    """Return a file of that folder as it is."""
    env = environment()
    assert env.loader is not None
    return env.loader.get_source(env, name)[0]
