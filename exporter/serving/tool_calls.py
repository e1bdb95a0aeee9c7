"""Finds tool calls in a model's answer, in the markup of Nemotron 3's chat templates (vLLM's parser `qwen3_coder`).

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

The markup has no escapes: a value ends at the first `</parameter>`, and one line break next to each of its tags is not
part of it.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from json import dumps
from typing import Any

from nemotrt.exporter.serving.json_schema import typed_value
from nemotrt.exporter.serving.tags import partial_tag

CALL, CALL_END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool; `arguments` is a JSON object as text, as in OpenAI's API."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolText:
    """A piece of an answer: text outside of calls, and the calls that it completes."""

    content: str = ""
    calls: tuple[ToolCall, ...] = ()


class _BrokenCallError(Exception):
    """The text since the last `<tool_call>` is no call."""


Steps = Generator[None, None, None]


class ToolCallStream:
    """The content and the tool calls of one answer as its text arrives; how it is cut into pieces makes no difference.

    A call is returned whole, with its last tag, because markup that turns out to be broken stays content. Whitespace
    before and after a call belongs to neither.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """`tools` are the request's, `{"type": "function", "function": {name, parameters}}`; they give values types."""
        self._schemas = {
            function["name"]: function.get("parameters") or {}
            for function in (tool["function"] for tool in tools)
        }
        self._text = ""
        """A call so far, or text that may be the beginning of one, with the whitespace before it."""
        self._position = 0
        """How far the text of a call is parsed."""
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._has_ended = False
        self._after_call = False
        self._steps = self._parse()
        next(self._steps)

    def push(self, text: str) -> ToolText:
        """What this text completes, possibly nothing."""
        self._text += text
        next(self._steps)
        return self._taken()

    def end(self) -> ToolText:
        """The rest of the answer: a call that was not completed is content."""
        self._has_ended = True
        next(self._steps, None)
        return self._taken()

    def _taken(self) -> ToolText:
        taken = ToolText("".join(self._content), tuple(self._calls))
        self._content, self._calls = [], []
        return taken

    def _parse(self) -> Steps:
        """Parse until the end; yields whenever it needs more text."""
        while (yield from self._content_before_call()):
            try:
                call = yield from self._call()
            except _BrokenCallError:
                self._content.append(self._text[: self._position])
                self._after_call = False
            else:
                self._calls.append(call)
                self._after_call = True
            self._text, self._position = self._text[self._position :], 0

    def _content_before_call(self) -> Generator[None, None, bool]:
        """Move text to the content up to a call's first tag; False if the text ends before."""
        while True:
            if self._after_call:
                self._text = self._text.lstrip()
            before, tag, _ = self._text.partition(CALL)
            if tag:
                self._add_content(before.rstrip())
                # Whitespace before the tag is content if the call is broken.
                self._text = self._text[len(before.rstrip()) :]
                self._position = self._text.index(tag) + len(tag)
                return True
            if self._has_ended:
                self._add_content(self._text)
                return False
            ready = self._text[: len(self._text) - partial_tag(self._text, CALL)].rstrip()
            self._add_content(ready)
            self._text = self._text[len(ready) :]
            yield

    def _add_content(self, text: str) -> None:
        if text:
            self._content.append(text)
            self._after_call = False

    def _call(self) -> Generator[None, None, ToolCall]:
        """Parse a call; raises _BrokenCallError if the text is none, with the position where that showed."""
        yield from self._expect(FUNCTION)
        name = yield from self._name()
        values: dict[str, str] = {}
        while (yield from self._expect(PARAMETER, FUNCTION_END)) == PARAMETER:
            parameter = yield from self._name()
            if parameter in values:
                raise _BrokenCallError
            values[parameter] = yield from self._until(PARAMETER_END)
        yield from self._expect(CALL_END)
        schema = self._schemas.get(name, {})
        arguments = {
            parameter: typed_value(value.removeprefix("\n").removesuffix("\n"), schema, parameter)
            for parameter, value in values.items()
        }
        return ToolCall(name, dumps(arguments, ensure_ascii=False))

    def _expect(self, *tags: str) -> Generator[None, None, str]:
        """Skip whitespace and one of the tags, which is returned."""
        while True:
            rest = self._text[self._position :].lstrip()
            for tag in tags:
                if rest.startswith(tag):
                    self._position = len(self._text) - len(rest) + len(tag)
                    return tag
            self._position = len(self._text) - len(rest)
            if not any(tag.startswith(rest) for tag in tags):
                raise _BrokenCallError
            yield from self._more()

    def _name(self) -> Generator[None, None, str]:
        """The name up to the next `>`: one line without tags."""
        while True:
            name, end, _ = self._text[self._position :].partition(">")
            if "<" in name or "\n" in name or (end and not name.strip()):
                raise _BrokenCallError
            if end:
                self._position += len(name) + 1
                return name.strip()
            yield from self._more()

    def _until(self, tag: str) -> Generator[None, None, str]:
        """The text up to a tag, which is skipped."""
        begin = scanned = self._position
        while (end := self._text.find(tag, scanned)) < 0:
            scanned = max(begin, len(self._text) - len(tag) + 1)
            yield from self._more()
        self._position = end + len(tag)
        return self._text[begin:end]

    def _more(self) -> Steps:
        """Wait for more text; if there is none, all of it is content."""
        if self._has_ended:
            self._position = len(self._text)
            raise _BrokenCallError
        yield
