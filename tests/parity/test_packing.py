"""A sequence's logits and states do not depend on how it is split into steps, or on the other sequences in a step."""

from __future__ import annotations

import pytest
import torch
from checkpoints import load_into
from packed import Packed, Place, relative_l2
from torch import Tensor
from transformers_model import build, raw_config, stored

from nemotrt.model.config import ModelConfig
from nemotrt.model.hybrid import NemotronH

TOLERANCE = 1e-5
CASES = (
    "latent, top 6 of 8, 8 groups, layer list",
    "tied embeddings, eps 1e-3",
    "biases everywhere, latent, 2 taps",
)
TOKENS = torch.randint(96, (41,), generator=torch.Generator().manual_seed(0))
OTHERS = torch.randint(96, (41,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest) -> NemotronH:
    reference = build(request.param)
    model = NemotronH(ModelConfig.from_dict(raw_config(request.param)))
    load_into(model, stored(reference))
    return model


def at_once(model: NemotronH, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    packed = Packed(model)
    place = Place(slot=1, pages=(1, 2, 3))
    (logits,) = packed.step([(place, tokens)])
    return logits, packed.states(place)


def agree(rows: list[Tensor], states: dict[str, Tensor], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert relative_l2(torch.cat(rows), expected[0]) <= TOLERANCE
    for name, state in expected[1].items():
        assert relative_l2(states[name], state) <= TOLERANCE, name


@pytest.mark.parametrize("cuts", [(1,) * 41, (7, 1, 2, 30, 1), (16, 16, 9), (2, 39)], ids=str)
def test_chunked_prefill_equals_one_prefill(model: NemotronH, cuts: tuple[int, ...]) -> None:
    packed = Packed(model)
    place = Place(slot=4, pages=(9, 3, 6))
    rows = [packed.step([(place, part)])[0] for part in torch.split(TOKENS, list(cuts))]
    agree(rows, packed.states(place), at_once(model, TOKENS))


def test_a_mixed_batch_equals_each_sequence_alone(model: NemotronH) -> None:
    """Prefill and decode share steps with an empty sequence, a padded one and padding tokens."""
    packed = Packed(model)
    first, second = Place(slot=5, pages=(8, 2, 11)), Place(slot=2, pages=(4, 10, 7))
    idle, padded, nothing = Place(slot=3, pages=(12, 13), length=20), Place(slot=0, pages=(0,)), TOKENS[:0]
    idle_state = packed.states(idle)

    rows: dict[int, list[Tensor]] = {first.slot: [], second.slot: []}
    one, other = torch.split(TOKENS, [10, 25, 1, 5]), torch.split(OTHERS, [3, 1, 30, 7])
    for i, (piece, another) in enumerate(zip(one, other, strict=True)):
        live = [(first, piece), (second, another)]
        batch = [live[i % 2], (idle, nothing), live[1 - i % 2], (padded, nothing)]
        logits = packed.step(batch, padding=i)
        for (place, _), mine in zip(batch, logits, strict=True):
            rows.get(place.slot, []).append(mine)

    agree(rows[first.slot], packed.states(first), at_once(model, TOKENS))
    agree(rows[second.slot], packed.states(second), at_once(model, OTHERS))
    assert all(torch.equal(state, idle_state[name]) for name, state in packed.states(idle).items())


def test_a_step_writes_only_to_its_own_slots_and_pages_and_to_scratch(model: NemotronH) -> None:
    packed = Packed(model)
    before = packed.pools
    packed.step([(Place(slot=2, pages=(5,)), TOKENS[:9]), (Place(slot=4, pages=(3,)), OTHERS[:1])], padding=2)
    for spec, old, new in zip(packed.specs, before, packed.pools, strict=True):
        written = {0, 5, 3} if spec.is_paged else {0, 2, 4}
        untouched = [row for row in range(len(old)) if row not in written]
        assert torch.equal(old[untouched], new[untouched]), spec.name
        for row in written - {0}:
            assert not torch.equal(old[row], new[row]), spec.name
