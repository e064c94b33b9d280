"""Writes the pages of docs/ that the code knows: `python -m docs_pages`, part of `make docs`."""
