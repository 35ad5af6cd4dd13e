"""Stop strings: which rows have just completed one, and their text up to where it begins.

Axes: r live rows.

A stop string may span several tokens, so text is decoded again, but rarely: only when the new token can have completed
one, and then only the end of the response. Left out: regular expressions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

MARGIN = 8  # tokens: the first ones of a window may decode differently (a half character, a leading space)


class StopStrings:
    """Follows the responses of one batch. `texts` holds the cut text of every row that a stop string has ended."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], begun: Sequence[Sequence[int]] = ()) -> None:
        """`begun`: the tokens of each row's response that are there already."""
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.window = (
            max((len(s.encode()) for s in stop), default=0) + MARGIN
        )  # a token that is not special holds a byte or more
        self.special = set(tokenizer.all_special_ids)
        self.suspects: dict[int, bool] = {}  # token id -> may it complete a stop string?
        self.ids = {row: [i for i in ids if i not in self.special] for row, ids in enumerate(begun) if stop}
        self.texts: dict[int, str] = {}

    def completed(
        self, rows: Int[Tensor, " r"], tokens: Int[Tensor, " r"], ended: Bool[Tensor, " r"]
    ) -> Bool[Tensor, " r"]:
        """Which rows have just completed a stop string. A row in `ended` has its EOS, which wins."""
        hit = torch.zeros_like(ended)
        for n, (row, token, over) in enumerate(zip(rows.tolist(), tokens.tolist(), ended.tolist(), strict=True)):
            if over or token in self.special:  # a special token adds no text
                continue
            ids = self.ids.setdefault(row, [])
            ids.append(token)
            if self._suspect(token) and self._find(self._text(ids[-self.window :])) is not None:
                text = self._text(ids)
                if (start := self._find(text)) is not None:
                    self.texts[row] = text[:start]
                    hit[n] = True
        return hit

    def _suspect(self, token: int) -> bool:
        if token not in self.suspects:
            text = self._text([token])  # empty: a space that stands alone; U+FFFD: part of a character
            self.suspects[token] = not text or "\ufffd" in text or any(s[-1] in text for s in self.stop)
        return self.suspects[token]

    def _find(self, text: str) -> int | None:
        starts = [text.find(s) for s in self.stop if s in text]
        return min(starts) if starts else None

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
