"""The program that renders conversations: `python -m nemotrt.exporter.generation.template_program`.

stdin has a `RenderRequest` as JSON, and stdout gets a `RenderResult`, even if the template fails. A template is
untrusted code: it runs in Jinja's sandbox, with limits on memory and time.
"""

import datetime
import json
import resource
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, NoReturn

from nemotrt.exporter.generation.child import limit

MAX_MEMORY = 2 << 30
MAX_CHARACTERS = 64 << 20
"""Of all texts. A context of a million tokens has 5 M."""

TEMPLATE_NAMES = ("<template>", "<unknown>")
"""What Jinja calls a template without a file in tracebacks; the second in those of a syntax error."""


@dataclass(frozen=True)
class RenderRequest:
    """What to render, and how long that may take; `named_tokens` are variables of the template."""

    template: str
    conversations: Sequence[Sequence[Mapping[str, str]]]
    named_tokens: Mapping[str, str]
    cpu_seconds: int


class Failure(StrEnum):
    """How a template failed: it is broken, refuses the messages, or does something that the sandbox forbids."""

    BROKEN = "broken"
    REFUSED = "refused"
    UNSAFE = "unsafe"


@dataclass(frozen=True)
class RenderResult:
    """Each conversation's text, or how the template failed."""

    texts: Sequence[str] = ()
    failure: Failure | None = None
    message: str = ""


class _RefusedError(Exception):
    """A template called raise_exception."""


def main() -> None:
    """Render what stdin requests."""
    from jinja2.exceptions import SecurityError

    request = RenderRequest(**json.load(sys.stdin.buffer))
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, MAX_MEMORY)
    limit(resource.RLIMIT_CPU, request.cpu_seconds)
    try:
        answer = json.dumps(asdict(RenderResult(_render(request))))
    except _RefusedError as error:
        answer = _failed(Failure.REFUSED, str(error))
    except SecurityError as error:
        answer = _failed(Failure.UNSAFE, str(error))
    except MemoryError:
        answer = _failed(Failure.BROKEN, f"it needs more than {MAX_MEMORY >> 30} GiB of memory")
    except Exception as error:  # noqa: BLE001  a template can raise anything
        answer = _failed(Failure.BROKEN, (str(error) or type(error).__name__) + _line(error))
    sys.stdout.buffer.write(answer.encode())


def _failed(failure: Failure, message: str) -> str:
    return json.dumps(asdict(RenderResult(failure=failure, message=message)))


def _line(error: Exception) -> str:
    """Where in the template the error was raised, as ` (line 3)`; empty if no line is known."""
    lines = traceback.walk_tb(error.__traceback__)
    numbers = [number for frame, number in lines if frame.f_code.co_filename in TEMPLATE_NAMES]
    return f" (line {numbers[-1]})" if numbers else ""


def _render(request: RenderRequest) -> list[str]:
    template = _environment().from_string(request.template)
    texts: list[str] = []
    room = MAX_CHARACTERS
    for messages in request.conversations:
        # Templates test `tools is none`, so these are None, not undefined.
        variables = {"tools": None, "documents": None, "add_generation_prompt": True, "messages": messages}
        pieces = []
        for piece in template.generate({**request.named_tokens, **variables}):
            piece.encode()  # raises ValueError on half of a surrogate pair, which no tokenizer takes
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                raise ValueError(f"its text has more than {MAX_CHARACTERS} characters")
        texts.append("".join(pieces))
    return texts


def _environment() -> Any:
    """The sandbox in which a template runs."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what a model writes, for training; here it only is a scope of its own."""

        tags = {"generation"}  # noqa: RUF012  the base class declares it as an instance variable

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    now = datetime.datetime.now().astimezone()
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": now.strftime}
    return environment


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


if __name__ == "__main__":
    main()
