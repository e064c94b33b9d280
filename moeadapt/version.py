"""Versions of the package and of its saved adapter format."""

__version__ = "0.1.0"

FORMAT_VERSION = 1
"""Integer version of the adapter format: raised only when old code would read new files wrongly."""
