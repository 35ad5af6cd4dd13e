"""Rows that decode together: their cache, padding and positions, and the model's forward pass.

Axes: P prompts, R rows at the start, r rows that are still live, T prompt tokens with padding, H columns that
the vocabulary head reads.

Every prompt is read once, whatever the number of its rows. Tokens are decoded by the model's `Body`
where it has one, else by transformers' forward pass. Only hidden states leave this file: the vocabulary head is the
sampler's business. Left out: paged caches and speculative decoding.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opdkit.errors import ModelError
from opdkit.models import LanguageModel
from opdkit.reading import Padded, fits, states
from opdkit.rollouts.body import Body
from opdkit.rollouts.cache import CACHE, SHARED, Part, make_cache, states_of


class Decoder:
    """The model half of sampling. `hidden` [r, H] are the states that predict the next token of each live row."""

    hidden: Float[Tensor, "r H"]

    def __init__(
        self, lm: LanguageModel, prompts: Sequence[Sequence[int]], owner: Int[Tensor, " R"], new_tokens: int,
        body: Body | None = None,
    ) -> None:  # fmt: skip
        """Read the prompts; row i goes on from prompt owner[i], for at most `new_tokens` tokens."""
        self.lm, self.body = lm, body
        self.seen = max(len(p) for p in prompts)
        self.part: Part | None = None
        lengths = torch.tensor([len(p) for p in prompts])
        if body is not None and fits(lm):
            self._read_prompts(prompts, lengths, owner, body)
            return
        ids = torch.zeros(len(prompts), self.seen, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, self.seen - len(prompt) :] = torch.tensor(prompt)
        mask = (torch.arange(self.seen) >= self.seen - lengths[:, None]).long().to(lm.device)
        self.cache = make_cache(lm.model.config)
        self.mask = None
        positions = torch.arange(self.seen, device=lm.device)[None]
        if bool((lengths < self.seen).any()):
            self.mask = torch.cat([mask, mask.new_ones(len(prompts), new_tokens)], 1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self._forward(ids.to(lm.device), positions)
        self.hidden = hidden[owner]
        if body is not None:
            padding = None if self.mask is None else mask == 0
            self._decode_from(states_of(self.cache), padding, lengths, owner, body)
            del self.cache  # a part whose prompts are shared holds the very same tensors
            return
        self.positions = lengths.to(lm.device) if self.mask is not None else lengths[:1].to(lm.device)
        self.cache.reorder_cache(owner)
        if self.mask is not None:
            self.mask, self.positions = self.mask[owner], self.positions[owner]

    def _read_prompts(
        self, prompts: Sequence[Sequence[int]], lengths: Int[Tensor, " P"], owner: Int[Tensor, " R"], body: Body
    ) -> None:
        """Read the prompts with the layers written out: the last one at their last tokens only."""
        rows = Padded.of(prompts, [[len(p) - 1] for p in prompts], self.lm.device)
        found: list[tuple[Tensor, Tensor]] = []
        self.hidden = states(self.lm, rows, found)[owner]
        padding = (torch.arange(self.seen) >= lengths[:, None]).to(self.lm.device)
        grids = [
            (k.unflatten(0, rows.shape).transpose(1, 2), v.unflatten(0, rows.shape).transpose(1, 2)) for k, v in found
        ]
        self._decode_from(grids, padding if bool(padding.any()) else None, lengths, owner, body)

    def _decode_from(
        self, states: Sequence[tuple[Tensor, Tensor]], padding: Tensor | None, lengths: Int[Tensor, " P"],
        owner: Int[Tensor, " R"], body: Body,
    ) -> None:  # fmt: skip
        shared = self.seen >= SHARED and lengths.shape[0] < owner.shape[0]
        self.part = Part(states, owner, padding, body.dtype, shared)
        self.positions = lengths.to(self.lm.device)[owner]

    def keep(self, order: Int[Tensor, " r"]) -> None:
        """Go on with some of the rows: row i becomes what row order[i] was."""
        if self.part is not None:
            self.part.keep(order)
            self.positions = self.positions[order]
            return
        self.cache.reorder_cache(order)
        if self.mask is not None:
            self.mask, self.positions = self.mask[order], self.positions[order]

    def advance(self, tokens: Int[Tensor, " r"]) -> None:
        """Feed one token to every row."""
        self.seen += 1
        if self.part is not None and self.body is not None:
            with self.lm.switched():
                self.hidden = self.lm.extend(self.body(tokens, self.positions, [self.part]))
        else:
            self.hidden = self._forward(tokens[:, None], self.positions[:, None])
        self.positions = self.positions + 1

    def read(self, tokens: Int[Tensor, "r n"]) -> Float[Tensor, "r n H"]:
        """Feed several tokens to every row: the states behind each of them. For a decoder without a body."""
        assert self.body is None
        n = tokens.shape[1]
        self.seen += n
        states = self._states(tokens, self.positions[:, None] + torch.arange(n, device=tokens.device))
        self.positions = self.positions + n
        return self.lm.extend(states)

    def _forward(self, ids: Int[Tensor, "r n"], positions: Int[Tensor, "s n"]) -> Float[Tensor, "r H"]:
        return self.lm.extend(self._states(ids, positions)[:, -1])

    def _states(self, ids: Int[Tensor, "r n"], positions: Int[Tensor, "s n"]) -> Float[Tensor, "r n D"]:
        output = self.lm.run(
            input_ids=ids,
            attention_mask=None if self.mask is None else self.mask[:, : self.seen],
            position_ids=positions,
            use_cache=True,
            **{CACHE: self.cache},
        )
        if output.get(CACHE) is not self.cache:  # it would forget the prompt without a word
            raise ModelError(
                f"{self.lm.name} ({self.lm.path}, {type(self.lm.model).__name__}) does not use the transformers "
                "key-value cache, so responses cannot be sampled from it; use a model with attention layers"
            )
        states: Tensor = output.last_hidden_state
        return states


def compaction(done: Bool[Tensor, " r"]) -> Int[Tensor, " k"]:
    """An order of the rows that are not done in which the fewest rows move: the last live ones fill the gaps."""
    live = torch.nonzero(~done).squeeze(1)
    count = live.shape[0]
    order = torch.arange(count, device=done.device)
    order[done[:count]] = live[live >= count]
    return order
