"""What fills a GPU: a recipe's models, and the sizes of what the engine allocates beside its forward and backward passes.

Each number names the code that allocates it. Left out: the passes themselves (`rehearse`), and putting the numbers
together phase by phase (`phases`).

Units: bytes. Axes: R rows that decode together, C rows of a head's chunk, V vocabulary.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

from opdkit.config import Recipe
from opdkit.lm_head import BLOCK_ENTRIES, CHUNK_ENTRIES, DEVICE_BLOCK_ENTRIES
from opdkit.method import Method
from opdkit.plan.architectures import Architecture
from opdkit.plan.counts import Counts
from opdkit.plan.rehearse import Rehearsal
from opdkit.rollouts.cache import ROOM, BufferLayer, make_cache

DRAW = 16  # bytes for each logit while a token is drawn: logits, log-probs, probabilities and their product (draw.py)
SCORE_BLOCKS = 2  # temporaries beside a chunk's logits (lm_head.score_rows)
LOSS_BLOCKS = {False: 1, True: 3}  # the same for losses: on a few ids, over the whole vocabulary (head.objective)
SIGNAL_BLOCKS, SIGNAL_ENTRIES = 5, 8 * BLOCK_ENTRIES  # two models' log-probs and temporaries (signals.full_divergence)


@dataclass(frozen=True)
class Part:
    """Something that fills memory; `setting` is the recipe's setting that it grows with."""

    what: str
    bytes: int
    setting: str | None = None


@dataclass(frozen=True)
class Phase:
    """One phase of a step: its own parts at its peak, beside what is always there."""

    name: str
    resident: tuple[Part, ...]
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in (*self.resident, *self.parts))


@dataclass(frozen=True)
class Model:
    """One model of the recipe: its parameters, and those of them that are trained."""

    architecture: Architecture
    meta: Any  # on the meta device, with its adapters
    parameters: int
    bytes: int
    trained: int
    trained_bytes: int
    shared: bool = False  # the student itself with its adapters off


@dataclass(frozen=True)
class Job:
    """A recipe on a number of GPUs: everything that the phases read."""

    recipe: Recipe
    method: Method
    counts: Counts
    student: Model
    teachers: dict[str, Model]
    gpus: int

    @property
    def shards(self) -> int:
        return self.gpus if self.recipe.train.sharding == "fsdp2" else 1

    def rows(self, source: str | None = None) -> int:
        """Rollouts of one GPU in a step."""
        named = self.counts.rollouts.items()
        return sum(ceil(n / self.gpus) for name, n in named if source in (None, name))

    def rehearsal(self, model: Model) -> Rehearsal:
        lora = self.recipe.lora if model is self.student else None
        return Rehearsal(model.architecture, self.recipe.train.precision, lora)


def cache_bytes(architecture: Architecture, rows: int, prompt: int, new: int, sizes: tuple[int, int]) -> int:
    """The sampler's key-value cache at the end of `new` tokens; `sizes` are bytes of one number of keys and values.

    With `new` = 0 it is the cache of the prompts alone. A full-attention layer's buffer has room to spare, and the last
    one that grows exists twice (rollouts.cache).
    """
    text = architecture.text
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = rows * heads * width * sum(sizes)
    now, before = capacity(prompt, new) if new else (prompt, 0)
    total = 0
    for layer in make_cache(architecture.config).layers:
        if isinstance(layer, BufferLayer):
            total += token * now
        elif getattr(layer, "is_sliding", False):
            total += token * min(prompt + new, layer.sliding_window)
    return total + token * before


def capacity(prompt: int, new: int) -> tuple[int, int]:
    """Tokens that a buffer holds in the end, and held before it grew last (rollouts.cache.BufferLayer)."""
    now, before, length = prompt + max(ROOM, prompt // 2), 0, prompt + new - 1
    while now < length:
        now, before = now + 1 + max(ROOM, (now + 1) // 2), now
    return now, before


def record_bytes(top_k: int, hidden: int) -> int:
    """Bytes that are kept of one sampled token: row, id, two log-probs, entropy, the top-k list, hidden states."""
    return 8 + 8 + 3 * 4 + top_k * (8 + 4) + hidden


def chunk_bytes(vocab: int, rows: int, asked: int | None, tables: int, blocks: int) -> int:
    """Logits of C of some rows, once for each distribution over the vocabulary, and elementwise blocks beside them."""
    entries = min(rows, asked or max(16, CHUNK_ENTRIES // vocab)) * vocab
    return 4 * (tables * entries + blocks * min(entries, DEVICE_BLOCK_ENTRIES))
