"""Responses that are sampled piece by piece: a few tokens, a look at them, and on.

A `Draft` is a response in the making. `extend` samples more tokens of every open draft; between two pieces the caller may
look at them, append text that the model reads but did not write (`Draft.heard`), or end them. What a piece costs beside
its tokens: the context is read again. The uniform number of a token depends on (seed, prompt, response, place in the
response) only, so a response that was cut into pieces is the one sampled in one go, up to floating-point rounding.
Left out: caches that are kept between pieces.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from opdkit.models import LanguageModel
from opdkit.rollouts.rollout import Capture, Rollout
from opdkit.rollouts.sampler import Keep, Mixture, Place, Sampling, sample
from opdkit.tasks.problem import Problem

OPEN = ""  # the finish of a draft that goes on


@dataclass(frozen=True)
class Draft:
    """A response in the making. Drafts are in the order of `begin`: the group of one prompt side by side."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    group: int
    response: int  # its number among the responses to its prompt
    key: str  # of its prompt's random numbers
    limit: int  # tokens of the response, those of tools included
    ids: tuple[int, ...] = ()
    trained: tuple[bool, ...] = ()
    turns: tuple[int, ...] = ()
    captures: tuple[Capture, ...] = ()
    turn: int = 0
    since: int = 0  # where the text begins in which a stop string may stand: behind the last one
    cut: str | None = None  # that text up to a stop string that ended it
    finish: str = OPEN  # why it ended: see Rollout.finish

    @property
    def context(self) -> tuple[int, ...]:
        """What the model reads before the next token."""
        return (*self.prompt_ids, *self.ids)

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self.limit - len(self.ids)

    def heard(self, ids: Sequence[int]) -> "Draft":
        """The draft after text that is read and not trained on; it is open again, in its next turn."""
        n = len(ids)
        trained, turns = (*self.trained, *[False] * n), (*self.turns, *[self.turn] * n)
        new = (*self.ids, *ids)
        return replace(
            self, ids=new, trained=trained, turns=turns, turn=self.turn + 1, since=len(new), cut=None, finish=OPEN
        )

    def reopened(self) -> "Draft":
        """The draft open again in the same turn, behind the stop string that ended it."""
        return replace(self, since=len(self.ids), cut=None, finish=OPEN)

    def written(self, tokenizer: Any) -> str:
        """The text since the last stop string, or since the turn began, up to the one that ended it."""
        return self.newest(tokenizer) if self.cut is None else self.cut

    def newest(self, tokenizer: Any) -> str:
        """All text since the last stop string, what stands behind the one that ended it included."""
        return str(tokenizer.decode(self.ids[self.since :], skip_special_tokens=True))

    def last_turn(self, tokenizer: Any) -> str:
        """The text that the model wrote in its newest turn."""
        start = next(
            i for i, (t, own) in enumerate(zip(self.turns, self.trained, strict=True)) if own and t == self.turn
        )
        return self._text(tokenizer, start)

    def _text(self, tokenizer: Any, start: int) -> str:
        if self.cut is None:
            return str(tokenizer.decode(self.ids[start:], skip_special_tokens=True))
        return str(tokenizer.decode(self.ids[start : self.since], skip_special_tokens=True)) + self.cut

    def rollout(self, tokenizer: Any, version: int = 0) -> Rollout:
        """The response as it is now, finished or not."""
        return Rollout(
            self.problem, self.prompt_ids, self.ids, self._text(tokenizer, 0), self.group, self.finish, version=version,
            trained=None if all(self.trained) else self.trained, turns=self.turns if any(self.turns) else None,
            capture=joined(self.captures),
        )  # fmt: skip


def begin(prompts: Sequence[tuple[Problem, tuple[int, ...]]], how: Sampling, keys: Sequence[str]) -> list[Draft]:
    """`how.group` empty drafts for every prompt; `keys` as `sampler.prompt_keys` makes them."""
    return [
        Draft(problem, ids, group, j, key, how.max_new_tokens)
        for group, ((problem, ids), key) in enumerate(zip(prompts, keys, strict=True))
        for j in range(how.group)
    ]


def extend(
    lm: LanguageModel, drafts: Sequence[Draft], how: Sampling, tokens: int | None = None, keep: Keep | None = None,
    mixture: Mixture | None = None,
) -> list[Draft]:  # fmt: skip
    """Sample at most `tokens` more (None: as many as there is room for) for every open draft; the others stay as they are.

    A draft that meets EOS, a stop string or its limit is finished with "stop", "stop_string" or "length". A mixture's
    prompts are those of the groups, as its teacher reads them. Raises what `sampler.sample` raises.
    """
    going = [i for i, draft in enumerate(drafts) if draft.finish == OPEN]
    if not going:
        return list(drafts)
    live = [drafts[i] for i in going]
    places = [
        Place(d.response, len(d.ids), d.room if tokens is None else min(tokens, d.room), d.ids[d.since :]) for d in live
    ]
    if mixture is not None and mixture.prompts is not None:
        mixture = replace(mixture, prompts=[(*mixture.prompts[d.group], *d.ids) for d in live])
    once = replace(how, group=1, max_new_tokens=max(place.limit for place in places))
    keys = [draft.key for draft in live]
    found = sample(lm, [draft.context for draft in live], once, 0, keep, keys, mixture, places)
    new = list(drafts)
    for i, draft, [one] in zip(going, live, found, strict=True):
        n, over = len(one.ids), len(one.ids) == draft.room and one.finish == "length"
        new[i] = replace(
            draft,
            ids=(*draft.ids, *one.ids),
            trained=(*draft.trained, *[True] * n),
            turns=(*draft.turns, *[draft.turn] * n),
            captures=(*draft.captures, one.capture),
            cut=one.text if one.finish == "stop_string" else None,
            finish=one.finish if over or one.finish != "length" else OPEN,
        )
    return new


def grow(
    lm: LanguageModel, drafts: Sequence[Draft], how: Sampling, look: Callable[[list[Draft]], list[Draft]],
    tokens: int | None = None, keep: Keep | None = None, mixture: Mixture | None = None,
) -> list[Draft]:  # fmt: skip
    """Extend all drafts until they are finished; after every piece `look` gets those that it extended and returns them,
    changed or not: it may end one (`finish`), let it hear something, or open it again."""
    done = list(drafts)
    while going := [i for i, draft in enumerate(done) if draft.finish == OPEN]:
        seen = look(extend(lm, [done[i] for i in going], how, tokens, keep, mixture))
        for i, draft in zip(going, seen, strict=True):
            done[i] = draft
    return done


def joined(captures: Sequence[Capture]) -> Capture | None:
    """The records of a response's pieces as one; None where there are none."""
    if len(captures) < 2:
        return captures[0] if captures else None
    columns: dict[str, Any] = {f.name: [getattr(c, f.name) for c in captures] for f in fields(Capture)}
    whole: dict[str, Any] = {name: None if c[0] is None else torch.cat(c) for name, c in columns.items()}
    return Capture(**whole)
