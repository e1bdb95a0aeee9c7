"""Splits a model's answer into its reasoning, `<think>…</think>`, and the content that follows.

Nemotron's chat templates open the reasoning in the prompt, or close it there if `enable_thinking` is false.
"""

from dataclasses import dataclass
from enum import Enum, auto

from nemotrt.exporter.serving.tags import partial_tag

OPEN, CLOSE = "<think>", "</think>"


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends inside the reasoning, which the answer then continues."""
    return prompt.rstrip().endswith(OPEN)


@dataclass(frozen=True)
class SplitText:
    """A piece of an answer."""

    reasoning: str = ""
    content: str = ""


class _Part(Enum):
    START = auto()
    REASONING = auto()
    CONTENT = auto()


class ReasoningStream:
    """The two parts of one answer as its text arrives; how the text is cut into pieces makes no difference.

    The reasoning begins with a tag at the start of the answer, or in the prompt (`is_open`), and ends with the first
    closing tag. Without one, the whole answer is reasoning. Whitespace next to the tags belongs to neither part.
    """

    def __init__(self, *, is_open: bool) -> None:
        """`is_open` is `opens_reasoning(prompt)`."""
        self._is_open = is_open
        self._part = _Part.START
        self._held = ""
        """Text that may be part of a tag, or whitespace before one."""
        self._at_start = True
        """Whether the current part has no text yet, so that whitespace is dropped."""

    def push(self, text: str) -> SplitText:
        """What can be split now, possibly nothing."""
        self._held += text
        reasoning = ""
        if self._part is _Part.START:
            self._start()
        if self._part is _Part.REASONING:
            reasoning = self._reasoning()
        return SplitText(reasoning, self._content() if self._part is _Part.CONTENT else "")

    def end(self) -> SplitText:
        """The rest of the answer."""
        held, self._held = self._held, ""
        if self._part is _Part.CONTENT:
            return SplitText()
        if self._part is _Part.REASONING or self._is_open:
            return SplitText(reasoning=(held.lstrip() if self._at_start else held).rstrip())
        return SplitText(content=held)

    def _start(self) -> None:
        """Decide the first part once the text shows whether it begins with the opening tag."""
        begin = self._held.lstrip()
        if begin.startswith(OPEN):
            self._held = begin.removeprefix(OPEN)
            self._part = _Part.REASONING
        elif not OPEN.startswith(begin):
            self._part = _Part.REASONING if self._is_open else _Part.CONTENT
            self._at_start = self._is_open

    def _reasoning(self) -> str:
        text, tag, rest = self._held.partition(CLOSE)
        if tag:
            self._part, self._held = _Part.CONTENT, rest
        else:
            ready = text[: len(text) - partial_tag(text, CLOSE)]
            self._held = text[len(ready.rstrip()) :]
        ready = text.rstrip() if tag else ready.rstrip()
        if self._at_start:
            ready = ready.lstrip()
        self._at_start = bool(tag) or (self._at_start and not ready)
        return ready

    def _content(self) -> str:
        ready, self._held = self._held.lstrip() if self._at_start else self._held, ""
        self._at_start = self._at_start and not ready
        return ready
