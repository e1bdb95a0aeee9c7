"""Parses the PTX of one kernel into instructions whose operands are values, registers, vectors and addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from nemotrt.plugins.emulator.errors import NotEmulated

GUARD = re.compile(r"@(!?)\s*(%\w+)\s+(.*)", re.DOTALL)
LABEL = re.compile(r"(\$?\w+):\s*(.*)", re.DOTALL)
ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)\s*([^{]*)\{", re.DOTALL)
ADDRESS = re.compile(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)


@dataclass(frozen=True)
class Register:
    """A register; special ones such as `%tid.x` too."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant, as the bits that were written; a negative integer stays negative."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or a variable in shared memory."""

    name: str


@dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: Register | Symbol
    offset: int


@dataclass(frozen=True)
class Vector:
    """`{a, b, …}`."""

    elements: tuple[Register | Immediate | Symbol, ...]


Operand = Register | Immediate | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """One instruction, its opcode split at the points."""

    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    line: int
    text: str
    source: str = ""
    names: frozenset[str] = field(default=frozenset())
    """Every register that it reads or writes."""

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.parts[0]

    @property
    def type(self) -> str:
        """The last part of the opcode, which is most instructions' type."""
        return self.parts[-1]


@dataclass(frozen=True)
class Program:
    """A kernel: its parameters in order, its code, and the type of each register."""

    name: str
    parameters: dict[str, str]
    num_threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """The index of the instruction that each label precedes."""
    registers: dict[str, str]
    """The type of each register: `b32`, `pred`."""
    shared: str
    """The variable at the start of shared memory; empty if there is none."""


def parse(text: str) -> Program:
    """The one kernel in a PTX file; raises NotEmulated if there are several, or functions."""
    text = _without_comments(text)
    entries = list(ENTRY.finditer(text))
    if len(entries) != 1 or ".func" in text:
        raise NotEmulated(f"PTX with {len(entries)} kernels, or with functions")
    (entry,) = entries
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    if threads is None:
        raise NotEmulated(f"{entry[1]} without .reqntid, the number of threads")
    body = _Body(text[: entry.end()].count("\n") + 1, _files(text))
    body.read(text[entry.end() : _closing_brace(text, entry.end())])
    return Program(
        name=entry[1],
        parameters=dict(_parameter(line) for line in entry[2].split(",") if line.strip()),
        num_threads=int(threads[1]),
        instructions=tuple(body.instructions),
        labels=body.labels,
        registers=body.registers,
        shared=_shared_variable(text),
    )


def _closing_brace(text: str, start: int) -> int:
    """The position of the brace that closes the one before `start`."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    raise NotEmulated("a kernel without an end")


def _shared_variable(text: str) -> str:
    names = re.findall(r"\.shared\s[^;]*?(\w+)\[\d*\];", text)
    if len(names) > 1:
        raise NotEmulated(f"several variables in shared memory: {', '.join(names)}")
    return names[0] if names else ""


def _without_comments(text: str) -> str:
    """The text, its lines kept."""
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//.*", "", text)


def _files(text: str) -> dict[str, str]:
    return {match[1]: match[2] for match in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"', text)}


def _parameter(declaration: str) -> tuple[str, str]:
    """Name and type of `.param .u64 .ptr .global .align 1 name`."""
    words = declaration.split()
    return words[-1], words[1].removeprefix(".")


class _Body:
    """Collects a kernel's instructions, labels and registers."""

    def __init__(self, first_line: int, files: dict[str, str]) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.registers: dict[str, str] = {}
        self._line = first_line
        self._files = files
        self._source = ""

    def read(self, text: str) -> None:
        for statement, line in self._statements(text):
            self._add(statement, line)

    def _statements(self, text: str) -> Iterator[tuple[str, int]]:
        """Each statement with its line; a `.loc` ends with its line."""
        pending, start = "", self._line
        for number, line in enumerate(text.splitlines(), self._line):
            if line.strip().startswith(".loc"):
                yield line.strip(), number
                continue
            for piece in re.split(r"(;)", line):
                if piece == ";":
                    yield pending.strip(), start
                    pending = ""
                elif piece.strip():
                    start = start if pending else number
                    pending += piece + " "
                    if pending.strip() in "{}" or (LABEL.fullmatch(pending.strip()) and "@" not in pending):
                        pending = self._scopes_and_labels(pending)

    def _scopes_and_labels(self, text: str) -> str:
        """The text without braces that open or close a scope and without leading labels, which are kept."""
        text = text.strip()
        if text in ("{", "}"):
            return ""
        while match := LABEL.fullmatch(text):
            self.labels[match[1]] = len(self.instructions)
            text = match[2].strip()
        return text and text + " "

    def _add(self, statement: str, line: int) -> None:
        statement = (
            statement.strip().removeprefix("{").strip() if statement.startswith(("{ ", "{\t")) else statement
        )
        statement = self._scopes_and_labels(statement)
        if match := REGISTERS.match(statement):
            self._declare(match[1], match[2])
        elif statement.startswith(".loc"):
            _, file, row, *_ = statement.split()
            self._source = f"{self._files.get(file, file)}:{row}" if row != "0" else ""
        elif statement and not statement.startswith((".", "}")):
            self.instructions.append(self._instruction(statement.strip(), line))

    def _declare(self, kind: str, names: str) -> None:
        for name in names.split(","):
            name = name.strip()
            if match := re.fullmatch(r"(%\w+)<(\d+)>", name):
                self.registers |= {f"{match[1]}{i}": kind for i in range(int(match[2]))}
            else:
                self.registers[name] = kind

    def _instruction(self, statement: str, line: int) -> Instruction:
        guard, negated, rest = None, False, statement
        if match := GUARD.fullmatch(statement):
            guard, negated, rest = Register(match[2]), match[1] == "!", match[3]
        opcode, _, arguments = rest.replace("\t", " ").partition(" ")
        operands = tuple(self._operand(piece) for piece in _split(arguments))
        names = frozenset(name for operand in operands for name in registers_of(operand))
        parts = tuple(opcode.replace("::", ".").split("."))
        text = re.sub(r"\s+", " ", statement)
        return Instruction(parts, operands, guard, negated, line, text, self._source, names)

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            elements = tuple(self._operand(piece) for piece in _split(text.strip("{} ")))
            assert not any(isinstance(element, Address | Vector) for element in elements)
            return Vector(elements)  # type: ignore[arg-type]
        if text.startswith("["):
            if (match := ADDRESS.fullmatch(text)) is None:
                raise NotEmulated(f"the address {text}")
            base = self._operand(match[1])
            assert isinstance(base, Register | Symbol)
            return Address(base, int(match[2] or "0", 0))
        if text.startswith("%") or text.partition("|")[0] in self.registers:
            return Register(text.partition("|")[0].strip())
        if re.fullmatch(r"-?\d\w*", text):
            return Immediate(_number(text))
        return Symbol(text)


def _number(text: str) -> int:
    if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
        return int(match[1], 16)
    return int(text.rstrip("U"), 0)


def _split(text: str) -> list[str]:
    """The operands, split at commas outside braces and brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces if piece.strip()]


def registers_of(operand: Operand) -> tuple[str, ...]:
    """The names of the registers in an operand."""
    if isinstance(operand, Register):
        return (operand.name,)
    if isinstance(operand, Address):
        return registers_of(operand.base)
    if isinstance(operand, Vector):
        return tuple(name for element in operand.elements for name in registers_of(element))
    return ()
