"""Renders conversations with a checkpoint's chat template, in a child process that a hostile template may crash."""

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from nemotrt.exporter.errors import BundleError, ExportError, UsageError
from nemotrt.exporter.generation import child
from nemotrt.exporter.generation.template_program import Failure, RenderRequest, RenderResult

PROGRAM = "nemotrt.exporter.generation.template_program"

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
    try:
        answer = child.run(PROGRAM, "renders chat templates", request=json.dumps(asdict(request)).encode())
    except child.CrashedError as error:
        is_timeout = error.number == signal.SIGXCPU
        fault = f"it computes for more than {CPU_SECONDS} s" if is_timeout else f"rendering it {error}"
        raise _error(Failure.BROKEN, fault) from error
    result = RenderResult(**json.loads(answer))
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
