"""Writes every generated page into docs/, each at once or not at all."""

import sys
from pathlib import Path

from docs_pages import exporters, families, papers, presets

DOCS = Path(__file__).parents[1] / "docs"


def pages() -> dict[str, str]:
    """Return the text of every generated page by its path below docs/."""
    return {
        **{f"families/{family.page}": families.page(family) for family in families.FAMILIES},
        "families/presets.md": presets.page(),
        "families/exporters.md": exporters.page(),
        "papers.md": papers.page(),
    }


def main() -> int:
    """Write the pages."""
    for name, text in pages().items():
        path = DOCS / name
        path.parent.mkdir(exist_ok=True)
        new = path.with_suffix(".md.new")
        new.write_text(text)
        new.replace(path)
        print(f"docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
