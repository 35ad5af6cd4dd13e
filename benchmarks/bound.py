"""The least time a phase could take: the FLOPs of the matrix products that it needs, at this machine's own rate.

Counted are the linear layers, attention (causal pairs only) and the vocabulary head, each prompt once for its group, and
two further products of the same size for every product that is differentiated. The rate is the fastest of several
products of the same shapes with the same number of rows, by torch's own products or the engine's (`opdkit.products`),
whichever are faster. Left out: everything elementwise (norms, softmax, drawing,
AdamW), memory traffic beside the products, Python. So a share of 100% cannot be reached.

Shapes are (out, in) of a weight; FLOPs are 2 for each multiplication with its addition.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import measure
import torch

from opdkit.packing import Text
from opdkit.plan.architectures import linear_layers
from opdkit.products import linear, outer, times

Shape = tuple[int, int]
LEAST_SECONDS = 0.1  # for which a product is repeated


@dataclass(frozen=True)
class Part:
    """FLOPs of products of some shapes (with how many of each), `rows` rows at a time, perhaps with their backward."""

    flops: float
    shapes: tuple[tuple[Shape, int], ...]
    rows: int
    backward: bool = False


@dataclass(frozen=True)
class Texts:
    """Lengths in tokens: prompts, and the responses to each."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]

    @staticmethod
    def of(rollouts: Sequence[Text]) -> "Texts":
        """Of rollouts in which the responses to one prompt are neighbours."""
        runs = [(len(p), [len(r.response_ids) for r in g]) for p, g in groupby(rollouts, key=lambda r: r.prompt_ids)]
        return Texts(tuple((prompt, tuple(responses)) for prompt, responses in runs))

    @property
    def responses(self) -> int:
        return sum(len(new) for _, new in self.groups)

    @property
    def trained(self) -> int:
        """N: tokens of all responses."""
        return sum(sum(new) for _, new in self.groups)

    @property
    def read(self) -> tuple[int, int]:
        """(tokens, pairs of tokens that attend) of the prompts."""
        return sum(p for p, _ in self.groups), sum(p * (p + 1) // 2 for p, _ in self.groups)

    @property
    def written(self) -> tuple[int, int]:
        """The same of the responses; the last token of each predicts nothing."""
        found = [(n - 1, (n - 1) * p + n * (n - 1) // 2) for p, new in self.groups for n in new]
        return sum(tokens for tokens, _ in found), sum(pairs for _, pairs in found)


@dataclass(frozen=True)
class Model:
    """What a language model multiplies: its linear layers, attention and head."""

    layers: tuple[tuple[Shape, int], ...]
    pair: int  # FLOPs of one token that attends to another, over all layers
    head: Shape

    @staticmethod
    def of(model: Any, vocab: int) -> "Model":
        """Of a transformers model whose layers are alike; `vocab` ids are real."""
        found = linear_layers(model).values()
        config = model.config.get_text_config()
        width = config.num_attention_heads * config.head_dim
        layers = Counter((layer.out_features, layer.in_features) for layer in found)
        return Model(tuple(layers.items()), 4 * width * config.num_hidden_layers, (vocab, config.hidden_size))

    def body(self, tokens: int, pairs: int, rows: int, backward: bool = False) -> Part:
        times = 3 if backward else 1
        per_token = sum(2 * out * into * count for (out, into), count in self.layers)
        return Part(times * (tokens * per_token + pairs * self.pair), self.layers, max(1, rows), backward)

    def scores(self, n: int, rows: int, backward: bool = False) -> Part:
        """Logits of n tokens."""
        return Part((3 if backward else 1) * 2.0 * n * self.head[0] * self.head[1], ((self.head, 1),), rows, backward)


def sampling(student: Model, texts: Texts) -> list[Part]:
    """A prompt is read once for its group; then one row for each response."""
    (prompt, first), (tokens, pairs) = texts.read, texts.written
    rows = texts.responses
    drawn = len(texts.groups) + tokens  # a group's first token is drawn from one row of logits
    return [student.body(prompt, first, prompt), student.body(tokens, pairs, rows), student.scores(drawn, rows)]


def scoring(teacher: Model, texts: Texts, budget: int, chunk: int) -> list[Part]:
    """One forward pass; the log-probs need all logits of every trained token."""
    tokens, pairs = _whole(texts)
    return [teacher.body(tokens, pairs, min(budget, tokens)), teacher.scores(texts.trained, min(chunk, texts.trained))]


def updating(student: Model, texts: Texts, budget: int, chunk: int) -> list[Part]:
    """Forward and backward of the student."""
    tokens, pairs = _whole(texts)
    body = student.body(tokens, pairs, min(budget, tokens), backward=True)
    return [body, student.scores(texts.trained, min(chunk, texts.trained), backward=True)]


def _whole(texts: Texts) -> tuple[int, int]:
    return texts.read[0] + texts.written[0], texts.read[1] + texts.written[1]


@dataclass
class Rates:
    """FLOPs a second of products of given shapes, measured when first asked for; for one process and its threads."""

    known: dict[tuple[Any, int, bool], float] = field(default_factory=dict)

    def seconds(self, parts: Sequence[Part]) -> float:
        return sum(part.flops / self.rate(part) for part in parts)

    def rate(self, part: Part) -> float:
        key = (part.shapes, part.rows, part.backward)
        if key not in self.known:
            found = [(count, *_product(shape, part.rows, part.backward)) for shape, count in part.shapes]
            self.known[key] = sum(n * flops for n, flops, _ in found) / sum(n * seconds for n, _, seconds in found)
        return self.known[key]


@torch.no_grad()
def _product(shape: Shape, rows: int, backward: bool) -> tuple[float, float]:
    """(FLOPs, seconds) of x W^T, with `backward` also of y W and y^T x; the fastest of at least three of each."""
    out, into = shape
    x, y, weight = (torch.randn(shape, device=measure.DEVICE) for shape in ((rows, into), (rows, out), (out, into)))
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    ways: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (lambda: torch.mm(x, weight.T, out=y), lambda: linear(x, weight)),
        (lambda: torch.mm(y, weight, out=dx), lambda: times(y, weight)),
        (lambda: torch.mm(y.T, x, out=dweight), lambda: outer(y, x)),
    ][: 3 if backward else 1]
    seconds = sum(min(map(_fastest, either)) for either in ways)
    return len(ways) * 2.0 * rows * out * into, seconds


def _fastest(product: Callable[[], Any]) -> float:
    best, spent, n = float("inf"), 0.0, 0
    while spent < LEAST_SECONDS / 2 or n < 3:
        start = measure.clock()
        product()
        seconds = measure.clock() - start
        best, spent, n = min(best, seconds), spent + seconds, n + 1
    return best
