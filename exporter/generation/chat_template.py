"""Renders conversations with a checkpoint's chat template, in a child process that a hostile template may crash."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from nemotrt.exporter.errors import BundleError, ExportError, UsageError
from nemotrt.exporter.generation.template_program import Failure, RenderRequest, RenderResult

PROGRAM = (sys.executable, "-P", "-m", "nemotrt.exporter.generation.template_program")

CPU_SECONDS = 5
"""How long a template may compute; published ones take 0.01 s."""

Conversation = Sequence[Mapping[str, str]]
"""Messages {role, content}."""


def render(
    template: str, conversations: Sequence[Conversation], named_tokens: Mapping[str, str]
) -> list[str]:
    """Each conversation as the template formats it for the model to answer.

    `named_tokens` are the special tokens that the template may refer to by name. Raises UsageError if the template
    refuses the messages, BundleError if it is broken or unsafe, or needs too much time or memory, and ExportError if
    the program that renders does not run.
    """
    request = RenderRequest(template, conversations, named_tokens, CPU_SECONDS)
    done = subprocess.run(
        PROGRAM,
        input=json.dumps(asdict(request)).encode(),
        capture_output=True,
        check=False,
        start_new_session=True,  # this process handles Ctrl-C, and ends the other one
    )
    if done.returncode:
        raise _crash(done.returncode, done.stderr.decode(errors="replace"))
    result = RenderResult(**json.loads(done.stdout))
    if result.failure:
        raise _error(result.failure, result.message)
    return list(result.texts)


def _error(failure: str, message: str) -> ExportError:
    """The error for a template that failed."""
    if failure == Failure.REFUSED:
        return UsageError(f"the chat template refuses the messages: {message}")
    if failure == Failure.UNSAFE:
        return BundleError(f"the chat template uses something that a template may not: {message}")
    return BundleError(f"the chat template is broken: {message}")


def _crash(code: int, log: str) -> ExportError:
    """The error for a program that ended with this exit code before it answered."""
    if code > 0:
        (*_, reason) = log.splitlines() or [f"exit code {code}"]
        return ExportError(f"the program that renders chat templates does not run: {reason}")
    name = signal.Signals(-code).name
    is_timeout = code == -signal.SIGXCPU
    return _error(
        Failure.BROKEN,
        f"it computes for more than {CPU_SECONDS} s" if is_timeout else f"rendering it ended with {name}",
    )
