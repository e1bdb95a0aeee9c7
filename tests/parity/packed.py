"""Runs our model on packed sequences, and manages the pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotrt.model.hybrid import NemotronH
from nemotrt.model.step import Step, empty_pools, pool_specs
from nemotrt.plugins.contract import DType

PAGE_SIZE = 16
"""Small, so that short sequences have several pages."""


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ in FP64; infinite if only `theirs` is zero."""
    assert ours.shape == theirs.shape, f"{list(ours.shape)} against {list(theirs.shape)}"
    error, size = (ours.double() - theirs.double()).norm(), theirs.double().norm()
    return 0.0 if error == 0 else (error / size).item()


@dataclass
class Place:
    """The slot and pages of one sequence, and the number of tokens in its state."""

    slot: int
    pages: tuple[int, ...]
    length: int = 0


class Packed:
    """A model and its pools; each step runs tokens of any number of sequences, and updates the pools."""

    def __init__(self, model: NemotronH, *, num_slots: int = 6, num_pages: int = 24) -> None:
        self.model = model
        self.specs = pool_specs(
            model.config, page_size=PAGE_SIZE, dtype=DType.FLOAT32, kv_dtype=DType.FLOAT32
        )
        self.pools = empty_pools(self.specs, num_slots, num_pages)
        for pool in self.pools:
            pool.normal_(generator=torch.Generator().manual_seed(7))  # a new sequence must not read these

    def step(self, batch: Sequence[tuple[Place, Tensor]], *, padding: int = 0) -> list[Tensor]:
        """Logits [n, V] of each sequence's n tokens, which are followed by `padding` tokens."""
        lengths = [len(tokens) for _, tokens in batch]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        width = max(len(place.pages) for place, _ in batch)
        pages = [[*place.pages, *[0] * (width - len(place.pages))] for place, _ in batch]
        step = Step(
            query_start=starts.int(),
            context_len=torch.tensor([place.length for place, _ in batch], dtype=torch.int32),
            slot=torch.tensor([place.slot for place, _ in batch], dtype=torch.int32),
            page_table=torch.tensor(pages, dtype=torch.int32),
        )
        tokens = torch.cat([*(tokens for _, tokens in batch), torch.full((padding,), 5)])
        rows = torch.arange(int(starts[-1]), dtype=torch.int32)
        logits, self.pools = self.model(tokens, step, rows, self.pools)
        for place, tokens in batch:
            place.length += len(tokens)
        return list(logits.split(lengths))

    def states(self, place: Place) -> dict[str, Tensor]:
        """The state of one sequence: its rows of the pools, and its keys and values [2, heads, tokens, head dim]."""
        states = {}
        for spec, pool in zip(self.specs, self.pools, strict=True):
            if spec.is_paged:
                pages = pool[list(place.pages)]
                states[spec.name] = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : place.length]
            else:
                states[spec.name] = pool[place.slot]
        return states
