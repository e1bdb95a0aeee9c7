"""The files that are written by code and kept in the repository; `make snapshots` writes them anew."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "snapshots")]

import make_cli_docs  # noqa: E402  (the folders above are no packages)
import make_reliability_docs  # noqa: E402
from graph_text import graph_text  # noqa: E402
from schema_text import report_schema_text, schema_text  # noqa: E402


def tiny_graph() -> str:
    """The graph of the example."""
    with tempfile.TemporaryDirectory() as folder:
        return graph_text(ROOT / "examples" / "tiny", Path(folder))


TEXTS: dict[str, Callable[[], str]] = {
    "docs/cli.md": make_cli_docs.page,
    "docs/reliability.md": make_reliability_docs.page,
    "tests/snapshots/manifest-schema.txt": schema_text,
    "tests/snapshots/report-schema.txt": report_schema_text,
    "tests/snapshots/tiny-graph.txt": tiny_graph,
}
"""A file's path → what is to stand in it."""


def main() -> None:
    """Write every file that differs, and say which."""
    for name, text in TEXTS.items():
        path, wanted = ROOT / name, text()
        if not path.exists() or path.read_text(encoding="utf-8") != wanted:
            path.write_text(wanted, encoding="utf-8")
            sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main()
