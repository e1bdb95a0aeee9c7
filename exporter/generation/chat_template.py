"""Renders messages with a checkpoint's chat template, in Jinja as transformers configures it."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from nemotrt.exporter.errors import BundleError, UsageError


def render(template: str, messages: Sequence[Mapping[str, str]], named_tokens: Mapping[str, str]) -> str:
    """The conversation as the template formats it for the model to answer.

    `named_tokens` are the special tokens that the template may refer to by name. Raises UsageError if the template
    refuses the messages, BundleError if it is broken or unsafe.
    """
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError

    # Templates test `tools is none`, so these are None, not undefined.
    variables = {"tools": None, "documents": None, "add_generation_prompt": True, "messages": list(messages)}
    try:
        text = str(_environment().from_string(template).render({**named_tokens, **variables}))
        text.encode()  # raises ValueError on half of a surrogate pair, which no tokenizer takes
        return text
    except _RefusedError as error:
        raise UsageError(f"the chat template refuses the messages: {error}") from error
    except SecurityError as error:
        raise BundleError(f"the chat template uses something that a template may not: {error}") from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise BundleError(f"the chat template is broken: {error}") from error


class _RefusedError(Exception):
    """A template called raise_exception."""


def _environment() -> Any:
    """The sandbox in which a template runs, because it is untrusted code."""
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
