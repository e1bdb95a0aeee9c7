"""Writes the tree of docs/architecture.md from the modules' docstrings: `python scripts/make_architecture_tree.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "```text\n", "```"
COLUMN = 34


def summary(path: Path) -> str:
    """The first sentence of a Python file's docstring; nothing for other files."""
    if path.suffix != ".py" or not path.exists():
        return ""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n\n")[0].replace("\n", " ").rstrip(".")


def tree(folder: Path, depth: int = 0) -> Iterator[str]:
    """One line for the folder and one for everything in it, files first."""
    indent = "  " * depth
    yield f"{indent + folder.name + '/':<{COLUMN}}{summary(folder / '__init__.py')}".rstrip()
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.name in ("__pycache__", "__init__.py"):
            continue
        if path.is_dir():
            yield from tree(path, depth + 1)
        else:
            yield f"{indent + '  ' + path.name:<{COLUMN}}{summary(path)}".rstrip()


def main() -> None:
    """Replace the tree in the page."""
    text = PAGE.read_text(encoding="utf-8")
    begin = text.index(BEGIN) + len(BEGIN)
    end = text.index(END, begin)
    lines = [line for name in ("exporter", "model") for line in tree(ROOT / name)]
    PAGE.write_text(text[:begin] + "\n".join(lines) + "\n" + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
