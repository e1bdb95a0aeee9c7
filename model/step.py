"""What a step tells every layer about its sequences."""

from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """The sequences of one step over packed tokens; B of them, with M pages each. All int32.

    Slot 0 and page 0 are scratch. An empty sequence (two equal starts) leaves its state as it is.
    """

    query_start: Tensor
    """[B+1]: sequence b owns tokens query_start[b] : query_start[b+1]; past query_start[B] is padding."""
    context_len: Tensor
    """[B]: tokens already in its state; 0 = fresh, what its slot held is ignored."""
    slot: Tensor
    """[B]: its row in the recurrent pools."""
    page_table: Tensor
    """[B, M]: its pages in the KV pools, unused entries 0."""
