"""A teacher that reads along while the student samples, and ends the responses in which too many events have happened.

Axes: R rows of a wave, r rows that the teacher still follows, n tokens since its last look, T tokens of one response,
t tokens of all rows since the last look, H columns that the teacher's head reads, k size of the top lists.

Every `every` tokens the teacher reads the new ones after its own cache, so it reads no token twice, and the rule's event
is counted on them. A row that has had enough ends there: not cut back to the event, since it is known only now. The
states are kept for every token, those of rows that ended by themselves included: scoring the view needs no second pass.
Left out: cutting back; responses with tools (`rollouts.segments`), whose context is read again at every turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opdkit.models import LanguageModel
from opdkit.rollouts.decoder import Decoder
from opdkit.rollouts.draw import Draw
from opdkit.rollouts.recorder import Recorder
from opdkit.sources import EarlyStop
from opdkit.step import Layout, Scores, Step
from opdkit.support import Sampled
from opdkit.views.local import score_batch

Drawn = tuple[Tensor, Draw]  # rows of a wave, ever fewer of them, and what was drawn for them at one place


@dataclass(frozen=True)
class Watch:
    """Who reads along: the model of the view that the rule's event reads, and the prompts as it reads them."""

    lm: LanguageModel
    prompts: Sequence[Sequence[int]]
    rule: EarlyStop
    top_k: int  # ids of its own top list that the event may compare

    def begin(self, chosen: Sequence[int], owner: Int[Tensor, " R"], new_tokens: int) -> "Reader":
        """Read the prompts of one wave; row i goes on from prompt chosen[owner[i]]."""
        asked, owner = [self.prompts[i] for i in chosen], owner.to(self.lm.device)
        return Reader(self, Decoder(self.lm, asked, owner, new_tokens), owner.shape[0])


class Reader:
    """The teacher's side of one wave. `stopped` are the rows that it ended."""

    def __init__(self, watch: Watch, decoder: Decoder, rows: int) -> None:
        self.watch, self.decoder = watch, decoder
        self.every, self.device = watch.rule.every, watch.lm.device
        self.total = rows
        self.rows = torch.arange(rows, device=self.device)  # those that it follows, in its order
        self.counts = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.next = decoder.hidden  # the states that predict the next token of each
        self.record = Recorder()  # of the states
        self.stopped: set[int] = set()

    def look(self, new: Sequence[Drawn], live: Int[Tensor, " l"], done: Bool[Tensor, " l"]) -> Bool[Tensor, " l"]:
        """Read what was drawn since the last look; which of the live rows have had their events and are not done?"""
        place = torch.empty(self.total, dtype=torch.long, device=self.device)
        place[self.rows] = torch.arange(self.rows.shape[0], device=self.device)
        at = torch.cat([place[rows] for rows, _ in new])
        time = torch.cat([torch.full_like(rows, j) for j, (rows, _) in enumerate(new)])
        drawn = Draw(*(torch.cat(column) for column in zip(*(d for _, d in new), strict=True)))
        tokens = at.new_zeros(self.rows.shape[0], len(new))  # a row that has ended is fed zeros, behind all its tokens
        tokens[at, time] = drawn.tokens
        after = self.decoder.read(tokens)
        states = torch.cat([self.next[:, None], after[:, :-1]], 1)[at, time]
        self.record.add(self.rows[at], states)
        self.counts[self.rows] += self._events(at, drawn, states)
        over = (self.counts[live] >= self.watch.rule.events) & ~done
        self.stopped.update(live[over].tolist())
        stays = place[live[~done & ~over]]
        if stays.numel():
            self.decoder.keep(stays)
        self.rows, self.next = self.rows[stays], after[stays, -1]
        return over

    def states(self) -> list[Float[Tensor, "T H"]]:
        """The states that predict each row's tokens. To be called outside inference mode: they are new tensors."""
        return [states for (states,) in self.record.per_row(self.total)]

    def _events(self, at: Int[Tensor, " t"], drawn: Draw, states: Float[Tensor, "t H"]) -> Int[Tensor, " r"]:
        """Events per followed row. Where the teacher gives no number there is none: scoring will say what is wrong."""
        order = torch.argsort(at, stable=True)
        seq, d = at[order], Draw(*(column[order] for column in drawn))
        layout = Layout(seq, seq, torch.arange(self.rows.shape[0], device=self.device))
        student = Scores(d.logp, d.entropy, d.top_ids, d.top)
        step = Step(layout, d.tokens, {"student": student})
        theirs = score_batch(self.watch.lm.head(), states[order], step, Sampled(), self.watch.top_k)
        views = {"student": student, self.watch.rule.view: theirs}
        events = self.watch.rule.event(Step(layout, d.tokens, views)).double()
        return layout.seq_sum(events.masked_fill(~torch.isfinite(theirs.sampled), 0.0)).round().long()
