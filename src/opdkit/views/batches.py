"""How rollouts go through a model: packed into rows without padding where the model can, else padded, under a budget.

Axes: B rows, T positions, n trained tokens of one forward, H columns that the vocabulary head reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opdkit.models import LanguageModel
from opdkit.rollouts.rollout import Rollout
from opdkit.step import Step


@dataclass(frozen=True)
class Batch:
    """Some of a step's rollouts, by number, that go through a model together."""

    index: tuple[int, ...]
    packed: bool

    def states(self, lm: LanguageModel, rollouts: Sequence[Rollout]) -> Float[Tensor, "n H"]:
        """Last hidden states that predict the trained tokens, in the order of the batch; `rollouts` are the step's."""
        from opdkit.reading import fits, rows_of
        from opdkit.reading import states as read
        from opdkit.views.interpolated import Interpolated

        if isinstance(lm, Interpolated):
            return torch.cat([self.states(part, rollouts) for part in lm.parts], -1)
        chosen = [rollouts[i] for i in self.index]
        if fits(lm):
            return read(lm, rows_of(chosen, self.packed, lm.device))
        if self.packed:
            from opdkit.packing import inputs, pack

            found = pack(chosen)
            hidden = lm.run(use_cache=False, **inputs(found, lm.device)).last_hidden_state[0]
            return lm.extend(hidden[found.rows.to(lm.device)])
        rows, positions = (index.to(lm.device) for index in trained_rows(chosen))
        return lm.hidden(pad(chosen, lm.device))[rows, positions]


def batches(lm: LanguageModel, rollouts: Sequence[Rollout], budget: int) -> list[Batch]:
    """All rollouts in batches of at most `budget` tokens (a longer rollout stands alone): the cheaper of two ways."""
    lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
    padded = micro_batches(lengths, budget)
    if lm.packs:
        packs, cost = pack_batches(rollouts, budget)
        if cost < sum(len(batch) * max(lengths[i] for i in batch) for batch in padded):
            return [Batch(tuple(index), True) for index in packs]
    return [Batch(tuple(index), False) for index in padded]


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group sequences of similar length so that rows x longest <= budget; a longer one stands alone."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if found and lengths[found[-1][0]] * (len(found[-1]) + 1) <= budget:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def pack_batches(rollouts: Sequence[Rollout], budget: int) -> tuple[list[list[int]], int]:
    """Fill packs of at most `budget` tokens with rollouts in their order, groups together while they fit; and the cost.

    The cost is in tokens, with what the calls of the attention kernel cost (packing.CALL each).
    """
    from opdkit.packing import CALL

    found: list[list[int]] = []
    cost, room = 0, 0
    whole = group_tokens(rollouts)
    for i, r in enumerate(rollouts):
        first = i == 0 or r.prompt_ids != rollouts[i - 1].prompt_ids
        size = len(r.response_ids) + (len(r.prompt_ids) if first else 0)
        if (whole[i] if first and whole[i] <= budget else size) > room or not found:
            found.append([])
            room, size = budget, len(r.prompt_ids) + len(r.response_ids)
        found[-1].append(i)
        room -= size
        cost += size + CALL
    return found, cost


def group_tokens(rollouts: Sequence[Rollout]) -> list[int]:
    """For every rollout, the tokens of its run of neighbours with the same prompt, that prompt counted once."""
    sizes: list[int] = []
    for prompt, group in groupby(rollouts, key=lambda r: r.prompt_ids):
        lengths = [len(r.response_ids) for r in group]
        sizes += [len(prompt) + sum(lengths)] * len(lengths)
    return sizes


def pad(rollouts: Sequence[Rollout], device: torch.device) -> Int[Tensor, "B T"]:
    """Prompt and response of each rollout but for the last token, which predicts nothing; right padding with id 0."""
    rows = [torch.tensor((r.prompt_ids + r.response_ids)[:-1]) for r in rollouts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


def trained_rows(rollouts: Sequence[Rollout]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """(row, position) of the hidden state that predicts each trained token."""
    rows = [(b, len(r.prompt_ids) + i - 1) for b, r in enumerate(rollouts) for i in r.trained_index]
    index = torch.tensor(rows, dtype=torch.long).reshape(-1, 2)
    return index[:, 0], index[:, 1]


def flat_index(step: Step, batch: Sequence[int]) -> Int[Tensor, " n"]:
    """Where the trained tokens of some sequences sit on the flat axis, in the order of the batch."""
    length = step.layout.seq_len()
    chosen = torch.tensor(list(batch), dtype=torch.long, device=length.device)
    count, start = length[chosen], (torch.cumsum(length, 0) - length)[chosen]
    shift = start - (torch.cumsum(count, 0) - count)
    return torch.arange(int(count.sum()), device=length.device) + torch.repeat_interleave(shift, count)
