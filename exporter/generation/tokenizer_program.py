"""The program that tries a tokenizer: `python -m nemotrt.exporter.generation.tokenizer_program FOLDER TEXT`.

On some files the tokenizers library panics, which writes to stderr and may end the process, or does not return.
"""

import resource
import signal
import subprocess
import sys
from pathlib import Path

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.generation.tokenizer import TOKENIZER, Tokenizer

CPU_SECONDS = 60
"""How long a tokenizer may compute; published ones, of 17 MB, take 1 s."""


def try_tokenizer(folder: Path, text: str) -> None:
    """Raise BundleError if the folder's tokenizer cannot be read, or cannot encode and decode the text."""
    done = subprocess.run(
        (sys.executable, "-P", "-m", "nemotrt.exporter.generation.tokenizer_program", folder, text),
        capture_output=True,
        check=False,
        start_new_session=True,  # this process handles Ctrl-C, and ends the other one
    )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise BundleError(f"{folder / TOKENIZER} is not a tokenizer: reading it ended with {name}")
    if done.returncode:
        raise BundleError(done.stdout.decode(errors="replace") or f"{folder / TOKENIZER} is not a tokenizer")


def main() -> None:
    """Encode and decode the text; if that fails, stdout says why."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limits = (limit for limit in (CPU_SECONDS, *resource.getrlimit(resource.RLIMIT_CPU)) if limit >= 0)
    resource.setrlimit(resource.RLIMIT_CPU, (min(limits), resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        tokenizer = Tokenizer(Path(sys.argv[1]))
        tokenizer.decode(tokenizer.encode(sys.argv[2]))
    except BundleError as error:
        sys.stdout.buffer.write(str(error).encode(errors="backslashreplace"))
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
