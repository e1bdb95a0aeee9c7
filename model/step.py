"""The step inputs that every layer reads: which tokens, slots and pages belong to which sequence."""

from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """The B sequences of one step over packed tokens, with up to M pages each; all tensors are int32.

    vLLM calls a page table a block table. Slot 0 and page 0 are scratch. An empty sequence (two equal starts)
    leaves its state unchanged.
    """

    query_start: Tensor
    """[B+1]: sequence b owns tokens query_start[b] : query_start[b+1]; tokens from query_start[B] on are padding."""
    context_len: Tensor
    """[B]: tokens already in the sequence's state; 0 means a new sequence, whose slot's old contents are ignored."""
    slot: Tensor
    """[B]: the sequence's row in the recurrent pools."""
    page_table: Tensor
    """[B, M]: the sequence's pages in the KV pools; unused entries are 0."""
