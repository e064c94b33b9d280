"""Lets the API pages show `Example:` sections as code: griffe knows the word `Examples:` only."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Renames the heading in every docstring that is read for the site."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """See `griffe.Extension.on_object`."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
