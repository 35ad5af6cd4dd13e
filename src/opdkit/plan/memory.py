"""What fills a GPU: a recipe's models, and the sizes of what the engine allocates beside its forward and backward passes.

Each number names the code that allocates it. Left out: the passes themselves (`rehearse`), and putting the numbers
together phase by phase (`phases`).

Units: bytes. Axes: R rows that decode together, C rows of a head's chunk, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from opdkit.config import Recipe
from opdkit.hooks import Work
from opdkit.layers import KNOWN
from opdkit.lm_head import BLOCK_ENTRIES, CHUNK_ENTRIES, DEVICE_BLOCK_ENTRIES
from opdkit.lora import EMA, LIVE
from opdkit.method import Method
from opdkit.plan.architectures import Architecture
from opdkit.plan.counts import Counts, samples
from opdkit.plan.reading import Reading, Readings
from opdkit.plan.rehearse import Rehearsal
from opdkit.plan.texts import Lengths
from opdkit.rollouts.cache import ROOM, SHARED, BufferLayer, make_cache
from opdkit.rollouts.rollout import Rollout
from opdkit.sources import EarlyStop, OnPolicy

DRAW = 16  # bytes for each logit while a token is drawn: logits, probabilities and their temporaries (draw.py)
DRAW_BLOCKS = 4  # on a CPU only the logits are whole; the rest is formed in blocks
SCORE_BLOCKS = 2  # temporaries beside a chunk's logits (row_scores)
LOSS_BLOCKS = {False: 1, True: 3}  # the same for losses: on a few ids, over the whole vocabulary (head.objective)
SIGNAL_BLOCKS = 5  # two models' log-probs and temporaries, of up to eight elementwise blocks (signals.full_divergence)


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
    shared: bool = False  # the student itself, as it is or with its adapters off
    packs: bool = False  # whether it reads packed rows where the run takes place
    reads: bool = False  # whether its last layer runs only where it is read there (opdkit.reading)

    @property
    def written_out(self) -> bool:
        """Whether tokens are decoded by the engine's own layers (rollouts.body)."""
        layers = make_cache(self.architecture.config).layers
        return type(self.meta.base_model).__name__ in KNOWN and all(type(layer) is BufferLayer for layer in layers)


@dataclass(frozen=True)
class Job:
    """A recipe on a number of GPUs: everything that the phases read."""

    recipe: Recipe
    method: Method
    counts: Counts
    student: Model
    teachers: dict[str, Model]
    gpus: int
    cuda: bool  # whether a GPU does the work
    readings: Readings = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Model]:
        """Student and teachers by name."""
        return {"student": self.student, **self.teachers}

    @property
    def blocks(self) -> int:
        """Numbers of an elementwise block."""
        return DEVICE_BLOCK_ENTRIES if self.cuda else BLOCK_ENTRIES

    @property
    def shards(self) -> int:
        return self.gpus if self.recipe.train.sharding == "fsdp2" else 1

    def rows(self, source: str | None = None) -> int:
        """Rollouts of one GPU in a step."""
        named = self.counts.rollouts.items()
        return sum(ceil(n / self.gpus) for name, n in named if source in (None, name))

    def group(self, source: str) -> int:
        """Responses to each of a source's prompts."""
        return self.recipe.sampling.group if samples(self.method, source) else 1

    @property
    def turns(self) -> int:
        """Pieces in which a response is sampled: its turns, where the recipe has tools."""
        return self.recipe.tools.turns if self.recipe.tools else 1

    def paths(self, *paths: str) -> list[str]:
        """The teachers that the recipe gives one of these paths."""
        return [name for name, config in self.recipe.teachers.items() if config.path in paths]

    @property
    def compared(self) -> dict[str, Model]:
        """The teachers whose exact reverse KL is measured: not the student as it is (train.evaluate)."""
        return {name: t for name, t in self.teachers.items() if name not in self.paths(LIVE)}

    @property
    def evaluated(self) -> dict[str, Model]:
        """The teachers that are evaluated once (train.setup.Setup.evaluated)."""
        moving = self.paths(LIVE, EMA)
        return {name: t for name, t in self.teachers.items() if self.recipe.eval.teacher and name not in moving}

    @property
    def works(self) -> dict[str, Work]:
        """What the hooks do that say so."""
        trained = {name: p for name, p in self.student.meta.named_parameters() if p.requires_grad}
        steps = self.recipe.train.steps
        return {hook.name: hook.work(steps, trained) for hook in self.method.after_update if hasattr(hook, "work")}

    def along(self, source: str) -> EarlyStop | None:
        """The rule by which a teacher reads along and may end this source's responses."""
        found = self.method.rollouts[source]
        return found.stop_early if isinstance(found, OnPolicy) else None

    def follower(self, source: str) -> Model | None:
        """The teacher that reads along."""
        rule = self.along(source)
        return None if rule is None else self.teachers[self.method.views[rule.view].models[0]]

    def read_by(self, view: str, teacher: str, texts: Sequence[Rollout], *, longest: bool = False) -> list[Rollout]:
        """Texts as the teacher of a view reads them."""
        reading: Reading | None = self.readings.get((view, teacher))
        return list(texts) if reading is None else reading.reread(texts, longest=longest)

    def texts(self, source: str, *, longest: bool = False) -> list[Rollout]:
        """Texts as one GPU's of a step's; `longest`: to prompts that are all as long as the longest."""
        group = self.group(source)
        return self.counts.lengths.texts(ceil(self.rows(source) / group), group, longest=longest)

    def update_texts(self, *, longest: bool = False) -> list[list[Rollout]]:
        """The texts of one optimiser update, source by source."""
        t, found = self.recipe.train, []
        for name in self.method.rollouts:
            group = self.group(name)
            prompts = max(1, ceil(self.rows(name) / group) // t.minibatches)
            found.append(self.counts.lengths.texts(prompts, group, longest=longest))
        return found

    def rehearsal(self, model: Model) -> Rehearsal:
        lora = self.recipe.lora if model is self.student else None
        alone = self.gpus == 1 or model is not self.student  # else accelerate's wrapper calls transformers' pass
        return Rehearsal(model.architecture, self.recipe.train.precision, lora, self.cuda, model.reads and alone)


def cache_bytes(
    model: Model, prompts: int, rows: int, lengths: Lengths, sizes: tuple[int, int], *, alone: bool = False
) -> int:
    """The sampler's key-value cache at its largest; `sizes` are bytes of one number of keys and values.

    A full-attention layer's buffer has room to spare, and the last one that grows exists twice (rollouts.cache.Buffer).
    Where a group's rows read one copy of their prompt (rollouts.cache.Part), only what they write is theirs; not for a
    teacher that reads along (`alone`), whose rows have copies.
    """
    prompt = lengths.longest
    shared = not alone and model.written_out and prompt >= SHARED and prompts < rows
    sizes_now = []
    for now, before in capacities(0 if shared else prompt, rows, lengths):
        total = before
        for layer in make_cache(model.architecture.config).layers:
            if isinstance(layer, BufferLayer):
                total += now + (prompts * prompt if shared else 0)
            elif getattr(layer, "is_sliding", False):
                total += rows * min(prompt + lengths.limit, layer.sliding_window)
        sizes_now.append(total)
    return token_bytes(model.architecture, sizes) * max(sizes_now)


def token_bytes(architecture: Architecture, sizes: tuple[int, int]) -> int:
    """Keys and values of one token in one layer."""
    text = architecture.text
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(heads * width * sum(sizes))


def capacities(start: int, rows: int, lengths: Lengths) -> list[tuple[int, int]]:
    """(tokens that a buffer has room for, tokens that it had room for before), of all rows, each time it grows.

    Rows that ended are not copied when it grows.
    """
    room, length = start + max(ROOM, start // 2), start + lengths.limit - 1
    found = [(rows * room, 0)]
    while room < length:
        live = max(1, ceil(rows * lengths.alive(room - start)))
        before, room = found[-1][0], room + 1 + max(ROOM, (room + 1) // 2)
        found.append((live * room, before))
    return found


def record_bytes(top_k: int, hidden: int) -> int:
    """Bytes that are kept of one sampled token: row, id, two log-probs, entropy, the top-k list, hidden states."""
    return 8 + 8 + 3 * 4 + top_k * (8 + 4) + hidden


def chunk_bytes(vocab: int, rows: int, asked: int | None, tables: int, blocks: int, block: int) -> int:
    """Logits of C of some rows, once for each distribution over the vocabulary, and elementwise blocks of at most `block`
    numbers beside them."""
    entries = min(rows, asked or max(16, CHUNK_ENTRIES // vocab)) * vocab
    return 4 * (tables * entries + blocks * min(entries, max(vocab, block)))


def signal_bytes(vocab: int, rows: int, block: int) -> int:
    """Both models' log-probs of some rows, and temporaries, of eight blocks at a time (signals.full_divergence)."""
    return 4 * SIGNAL_BLOCKS * min(rows, max(1, 8 * block // vocab)) * vocab


def draw_bytes(vocab: int, rows: int, cuda: bool) -> int:
    """Logits of some rows and what is formed from them while a token is drawn."""
    blocks = DRAW_BLOCKS * max(vocab, BLOCK_ENTRIES)
    return DRAW * rows * vocab if cuda else 4 * (rows * vocab + min(blocks, DRAW_BLOCKS * rows * vocab))
