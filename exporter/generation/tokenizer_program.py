"""The program that tries a tokenizer: `python -m nemotrt.exporter.generation.tokenizer_program FOLDER TEXT`.

On some files the tokenizers library panics, which writes to stderr and may end the process, or does not return.
"""

import resource
import sys
from pathlib import Path

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.generation import child
from nemotrt.exporter.generation.tokenizer import TOKENIZER, Tokenizer

PROGRAM = "nemotrt.exporter.generation.tokenizer_program"

CPU_SECONDS = 60
"""How long a tokenizer may compute; published ones, of 17 MB, take 1 s."""


def try_tokenizer(folder: Path, text: str) -> None:
    """Raise BundleError if the folder's tokenizer cannot be read, or cannot encode and decode the text.

    Raises ExportError if the program that tries it does not run.
    """
    try:
        fault = child.run(PROGRAM, "tries tokenizers", str(folder), text)
    except child.CrashedError as error:
        raise BundleError(f"{folder / TOKENIZER} is not a tokenizer: reading it {error}") from error
    if fault:
        raise BundleError(fault.decode(errors="replace"))


def main() -> None:
    """Encode and decode the text; if that fails, stdout says why."""
    child.limit(resource.RLIMIT_CORE, 0)
    child.limit(resource.RLIMIT_CPU, CPU_SECONDS)
    try:
        tokenizer = Tokenizer(Path(sys.argv[1]))
        tokenizer.decode(tokenizer.encode(sys.argv[2]))
    except BundleError as error:
        sys.stdout.buffer.write(str(error).encode(errors="backslashreplace"))


if __name__ == "__main__":
    main()
