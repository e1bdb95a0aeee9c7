"""Find weights that are zero where trained weights are not: what a stopped download or a lost shard leaves behind.

A preallocated file has its full size from the start, so its header does not show that its bytes never arrived.
Every row of every matrix is read; one expert is a matrix, and so are all taps of a convolution. A run of zero rows is
refused if it is an eighth of its matrix or 8 MiB long, and so is the zero row of a token that the tokenizer has. Other
zero rows are noted. Rows beyond the tokenizer's vocabulary are padding, and the padding token has no use for its row,
which PyTorch's embeddings keep at zero (`padding_idx`).
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.artifacts import ZeroWeights
from nemotrt.exporter.checkpoint.loaded_model import IN_ORDER, WeightSource
from nemotrt.exporter.checkpoint.parallel import in_order
from nemotrt.exporter.checkpoint.safetensors_reader import PIECE_BYTES, StoredTensor, read_into
from nemotrt.exporter.environment import memory_bytes, num_cores
from nemotrt.exporter.generation.tokenizer import TOKENIZER, Tokenizer
from nemotrt.exporter.progress import SILENT, Advance, Progress
from nemotrt.exporter.runtime import files
from nemotrt.model.checkpoint import HEAD, Transform

REFUSED_FRACTION, REFUSED_BYTES = 1 / 8, 8 << 20
"""A run of zero rows of this fraction of a matrix, or of so many bytes, is refused."""

KEPT_FRACTION = 0.5
"""A checkpoint of at most this fraction of the memory stays in the page cache: the build reads it next."""

PROBED_VALUES = 16
"""Values of a row that are looked at first: one that is not zero settles the row."""

VOCABULARIES = ("backbone.embeddings.weight", HEAD)
"""Parameters whose rows belong to tokens."""

MAX_LISTED = 3


class _Matrix(NamedTuple):
    """A stored matrix, and whether its rows belong to tokens."""

    tensor: StoredTensor
    is_vocabulary: bool

    @property
    def num_rows(self) -> int:
        return self.tensor.shape[0]

    @property
    def row_bytes(self) -> int:
        return self.tensor.length // self.num_rows


@dataclass(frozen=True)
class _ZeroRows:
    """The zero rows of a matrix as runs."""

    matrix: _Matrix
    runs: tuple[range, ...]
    token: str | None = None
    """The token of the longest run's first row, if all rows belong to tokens of the tokenizer."""

    @property
    def is_refused(self) -> bool:
        """Whether trained weights are never zero in this way."""
        length, matrix = len(self.longest), self.matrix
        is_long = length >= REFUSED_FRACTION * matrix.num_rows or length * matrix.row_bytes >= REFUSED_BYTES
        return self.token is not None or is_long

    @property
    def longest(self) -> range:
        return max(self.runs, key=len)

    def __str__(self) -> str:
        run, total = self.longest, sum(map(len, self.runs))
        rows = f"rows {run.start} to {run[-1]}" if len(run) > 1 else f"row {run.start}"
        if total == self.matrix.num_rows:
            rows = f"all {total} rows"
        elif len(self.runs) == 1:
            rows = f"{rows} of {self.matrix.num_rows}"
        else:
            rows = f"{total} of {self.matrix.num_rows} rows, such as {rows}"
        which = "first" if total > 1 else "row"
        token = f', the {which} of token "{self.token}"' if self.token is not None else ""
        return f"{self.matrix.tensor.name} is zero in {rows}{token} ({self.matrix.tensor.path.name})"


def find(sources: Mapping[str, WeightSource], folder: Path, progress: Progress = SILENT) -> ZeroWeights:
    """The zero rows of a checkpoint's matrices, in words; `folder` may have a tokenizer.

    Raises CheckpointError if a file ends early.
    """
    matrices = tuple(_matrices(sources))
    total = sum(matrix.tensor.length for matrix in matrices)
    with progress.stage("zeros", f"rows of {len(matrices)} matrices", total=total, is_bytes=True) as advance:
        keep = total <= KEPT_FRACTION * memory_bytes()
        found = [_in_vocabulary(rows, folder) for rows in _zero_rows(matrices, advance, keep=keep)]
    refused = [rows for rows in found if rows.runs and rows.is_refused]
    noted = [rows for rows in found if rows.runs and not rows.is_refused]
    return ZeroWeights(_listed(refused), _files(refused), _listed(noted))


def accept(zeros: ZeroWeights, note: Callable[[str], None], *, allow: bool) -> str:
    """Note what was found; returns what is refused unless `allow`, and raises it as a CheckpointError if not."""
    if zeros.noted:
        note(zeros.noted)
    if zeros.problem and not allow:
        raise zeros.problem
    if zeros.refused:
        note(f"{zeros.refused}: accepted as requested")
    return zeros.refused


def _matrices(sources: Mapping[str, WeightSource]) -> Iterator[_Matrix]:
    """Every stored matrix once, and each expert of a stack alone: no scales, norms or biases."""
    names = set[str]()  # tied embeddings are the source of two parameters
    for parameter, source in sources.items():
        is_vocabulary = parameter in VOCABULARIES
        for tensor in source.tensors:
            is_matrix = source.transform in IN_ORDER and len(tensor.shape) > 1
            if not is_matrix or tensor.name in names or not tensor.length:
                continue
            names.add(tensor.name)
            if source.transform is Transform.COPY and len(tensor.shape) == 3:
                yield from (_Matrix(tensor.part(i), is_vocabulary) for i in range(tensor.shape[0]))
            else:
                yield _Matrix(tensor, is_vocabulary)


def _zero_rows(matrices: Iterable[_Matrix], advance: Advance, *, keep: bool) -> Iterator[_ZeroRows]:
    """The matrices that have zero rows; with `keep`, what is read stays in the page cache."""
    found: dict[_Matrix, list[range]] = defaultdict(list)
    pool = ThreadPoolExecutor(num_cores())
    try:
        for (matrix, rows), runs in in_order(pool, partial(_zero_runs, keep=keep), _pieces(matrices)):
            advance(len(rows) * matrix.row_bytes)
            if runs:
                found[matrix] += runs
    finally:
        pool.shutdown(cancel_futures=True)
    for matrix, runs in found.items():
        yield _ZeroRows(matrix, _joined(runs))


class _Piece(NamedTuple):
    """Some rows of a matrix."""

    matrix: _Matrix
    rows: range


def _pieces(matrices: Iterable[_Matrix]) -> Iterator[_Piece]:
    for matrix in matrices:
        size = max(1, PIECE_BYTES // matrix.row_bytes)
        for start in range(0, matrix.num_rows, size):
            yield _Piece(matrix, range(start, min(start + size, matrix.num_rows)))


class _Buffer(threading.local):
    """A thread's own memory for a piece; allocating it for each piece would take as long as reading."""

    def __init__(self) -> None:
        self.stored = memoryview(bytearray(PIECE_BYTES))


_buffer = _Buffer()


def _zero_runs(piece: _Piece, *, keep: bool) -> list[range]:
    """The zero rows of a piece."""
    (tensor, _), rows = piece
    row_bytes = piece.matrix.row_bytes
    start, size = rows.start * row_bytes, len(rows) * row_bytes
    with tensor.path.open("rb", buffering=0) as file:
        if files.is_hole(file.fileno(), tensor.offset + start, tensor.offset + start + size):
            return [rows]
        stored = _buffer.stored[:size] if size <= PIECE_BYTES else memoryview(bytearray(size))
        read_into(stored, tensor, file.fileno(), start, keep=keep)
    bits = np.frombuffer(stored, f"u{tensor.dtype.itemsize}").reshape(len(rows), -1)
    return [range(rows.start + run.start, rows.start + run.stop) for run in _runs(_are_zero(bits))]


def _are_zero(bits: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows are zero; −0 has the sign bit set."""
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    are_zero: NDArray[np.bool_] = np.all(bits[:, :PROBED_VALUES] & magnitude == 0, axis=1)
    probed = np.flatnonzero(are_zero)
    are_zero[probed] = np.all(bits[probed] & magnitude == 0, axis=1)
    return are_zero


def _runs(mask: NDArray[np.bool_]) -> list[range]:
    """The runs of True."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    return [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _joined(runs: Iterable[range]) -> tuple[range, ...]:
    """The runs with those that adjoin made one."""
    joined: list[range] = []
    for run in runs:
        if joined and joined[-1].stop == run.start:
            run = range(joined.pop().start, run.stop)
        joined.append(run)
    return tuple(joined)


def _in_vocabulary(zero: _ZeroRows, folder: Path) -> _ZeroRows:
    """Of a vocabulary, only the rows of tokens that the folder's tokenizer has and uses, if there is one."""
    if not zero.matrix.is_vocabulary or not (folder / TOKENIZER).is_file():
        return zero
    tokenizer = Tokenizer(folder)
    unused = (None, tokenizer.named_tokens.get("pad_token"))
    rows = (row for run in zero.runs for row in run if tokenizer.token(row) not in unused)
    runs = _joined(range(row, row + 1) for row in rows)
    token = tokenizer.token(max(runs, key=len).start) if runs else None
    return _ZeroRows(zero.matrix, runs, token)


def _listed(found: Sequence[_ZeroRows]) -> str:
    if not found:
        return ""
    names = [rows.matrix.tensor.name for rows in found[1:]]
    if not names:
        return str(found[0])
    more = f"{len(names)} more tensor{'s have' if len(names) > 1 else ' has'} zero rows"
    return f"{found[0]}; {more}: {', '.join(names[:MAX_LISTED])}" + (" …" if len(names) > MAX_LISTED else "")


def _files(found: Sequence[_ZeroRows]) -> str:
    names = sorted({rows.matrix.tensor.path.name for rows in found})
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more files" if more > 0 else "")
