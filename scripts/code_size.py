"""Counts what the product's Python amounts to: `python scripts/code_size.py [CHECKOUT] [--by-folder]`.

A code line holds something else than a comment or a docstring; lines of the kernels (`kernels.py`) are not counted.
Dataclasses are counted per 1,000 non-blank lines. Compare two commits by naming two checkouts, one after the other.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import defaultdict
from pathlib import Path

FOLDERS = ("exporter", "model", "plugins")
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
}


def docstring_lines(tree: ast.AST) -> set[int]:
    """Lines of every string that is a statement of its own: docstrings, and texts below a constant."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def code_lines(text: str) -> int:
    """Lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(text)))


def num_dataclasses(text: str) -> int:
    """Classes that a `dataclass` decorator makes."""
    return sum(
        any("dataclass" in ast.dump(decorator) for decorator in node.decorator_list)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
    )


def measure(root: Path) -> dict[str, list[int]]:
    """For each folder: files, code lines, non-blank lines, dataclasses, characters of non-blank lines."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            if path.name == "kernels.py":
                continue
            text = path.read_text(encoding="utf-8")
            filled = [line for line in text.splitlines() if line.strip()]
            sizes = (1, code_lines(text), len(filled), num_dataclasses(text), sum(map(len, filled)))
            row = counts[path.parent.relative_to(root).as_posix()]
            for index, size in enumerate(sizes):
                row[index] += size
    return counts


def main() -> None:
    """Print the counts of one checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--by-folder", action="store_true")
    options = parser.parse_args()
    counts = measure(options.checkout)
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    print(f"{'folder':<34}{'files':>6}{'code':>8}{'filled':>8}{'dataclasses':>13}{'characters a line':>19}")
    for name, row in [*(sorted(counts.items()) if options.by_folder else ()), ("all", total)]:
        print(f"{name:<34}{row[0]:>6}{row[1]:>8}{row[2]:>8}{row[3]:>13}{row[4] / row[2]:>19.1f}")
    print(f"{1000 * total[3] / total[2]:.1f} dataclasses per 1,000 non-blank lines")


if __name__ == "__main__":
    main()
