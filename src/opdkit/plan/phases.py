"""How much memory each phase of a step holds at its peak, per GPU or in this machine's process, as named parts.

Prompts are taken to be as long as the task's longest, responses as the plan assumes (counts.lengths). Left out:
kernels' own workspaces and the allocator's fragments, for which `hardware` keeps a margin.

Units: bytes. Axes: N trained tokens of a step.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

from opdkit.method import Method
from opdkit.plan.architectures import linear_layers
from opdkit.plan.counts import samples
from opdkit.plan.memory import (
    LOSS_BLOCKS,
    SCORE_BLOCKS,
    Job,
    Model,
    Part,
    Phase,
    cache_bytes,
    chunk_bytes,
    draw_bytes,
    record_bytes,
    signal_bytes,
    token_bytes,
)  # fmt: skip
from opdkit.plan.meter import LEFT
from opdkit.plan.passes import passes
from opdkit.plan.texts import Lengths
from opdkit.rollouts.rollout import Rollout
from opdkit.sources import OnPolicy, TeacherSamples
from opdkit.support import Full, TopK
from opdkit.train.keep import to_keep
from opdkit.view import TrustRegion

GRADIENTS = "gradients"


def phases(job: Job) -> tuple[Phase, ...]:
    """The phases of a step that a recipe has, in their order, and the evaluation."""
    own = {"sample": _sample(job), "score": _score(job), "update": _update(job), "evaluate": _evaluate(job)}
    always = tuple(part for part in _resident(job) if part.bytes)
    learning = tuple(part for part in always if not (part.what == GRADIENTS and made_there(job)))
    return tuple(
        Phase(name, learning if name == "update" else always, tuple(p for p in parts if p.bytes))
        for name, parts in own.items()
        if parts
    )


def made_there(job: Job) -> bool:
    """Whether gradients are made in the update's pass: there is one micro-batch, before which the last update's are freed."""
    cut = [passes(job.student, texts, job.recipe.train.microbatch_tokens) for texts in job.update_texts(longest=True)]
    return job.shards == 1 and sum(map(len, cut)) == 1


def _resident(job: Job) -> tuple[Part, ...]:
    """What is always there: gradients stay until the next update begins (train.optimise)."""
    student, n = job.student, job.shards
    of = f" / {n}" if n > 1 else ""
    parts = [
        Part(f"student weights{of}", student.bytes // n),
        Part(f"{GRADIENTS}{of}", student.trained_bytes // n),
        Part(f"AdamW moments{of}", 2 * student.trained_bytes // n),
    ]
    if not job.cuda:
        parts.append(Part("gaps between blocks", LEFT))
    return (*parts, *(Part(f"{name} weights", t.bytes) for name, t in job.teachers.items() if not t.shared))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def _sample(job: Job) -> tuple[Part, ...]:
    s, rows = job.recipe.sampling, sum(job.rows(name) for name in job.counts.rollouts if samples(job.method, name))
    parts: tuple[Part, ...] = ()
    lengths = job.counts.lengths
    if rows:
        keep = to_keep(job.recipe, job.method, job.student.architecture.vocab)
        record = record_bytes(keep.top_k, job.rehearsal(job.student).hidden_size() if keep.hidden else 0)
        mixed = [src.mixed_with for src in job.method.rollouts.values() if isinstance(src, OnPolicy) and src.mixed_with]
        models = [job.student, *(job.teachers[name] for name in mixed)]
        parts = _decoding(job, models, rows, s.group, lengths, record)
        parts = (*_whole_student(job), *parts, _autocast_copies(job))
    for source in job.method.rollouts.values():
        if isinstance(source, TeacherSamples):
            teacher = job.teachers[source.teacher]
            count = ceil(job.counts.prompts / job.gpus)
            answers = _decoding(job, [teacher], count, 1, lengths, record_bytes(1, 0))
            parts = max(parts, answers, key=_total)
    return parts


def _decoding(job: Job, models: list[Model], rows: int, group: int, lengths: Lengths, record: int) -> tuple[Part, ...]:
    """Sampling `rows` responses with one model, or with several in lock-step: the larger of prompts and tokens."""
    most, prompt, tokens = job.recipe.sampling.max_rows, lengths.longest, lengths.longest + lengths.limit
    wave = min(rows, max(most // group * group, min(most, group)))
    prompts = ceil(wave / group)
    records = Part("records of the step's samples", int(rows * lengths.response * record), "train.prompts_per_step")
    reading, writing = [], []
    for model in models:
        rehearsal, name = job.rehearsal(model), model.architecture.name
        sizes = rehearsal.cache()
        cache = Part(f"{name} key-value cache of {_rows(wave)}", cache_bytes(model, prompts, wave, lengths, sizes),
                     "sampling.max_rows")  # fmt: skip
        # a wave's records exist three times while they are put in order (sampler._Recorder), when no token is drawn
        step = max(
            rehearsal.decode(wave, tokens - 1) + draw_bytes(model.architecture.vocab, wave, job.cuda),
            int(2 * wave * lengths.response * record),
        )
        writing += [cache, Part(f"{name} decoding step", step, "sampling.max_rows")]
        read = prompts * prompt * model.architecture.layers * token_bytes(model.architecture, sizes)
        first = rehearsal.read(prompts, prompt) + read
        reading.append(Part(f"{name} reading {prompts} prompt{'s' * (prompts > 1)}", first, "sampling.max_rows"))
    return (*max(reading, writing, key=_total), records)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring and update


def _score(job: Job) -> tuple[Part, ...]:
    asked = [(job.teachers[m], isinstance(v.support, Full)) for v in job.method.views.values() for m in v.models]
    if job.recipe.sampling.rescore or any(
        job.method.reads_student(name) and not isinstance(source, OnPolicy)
        for name, source in job.method.rollouts.items()
    ):
        asked.append((job.student, to_keep(job.recipe, job.method, job.student.architecture.vocab).hidden))
    if not asked:
        return ()
    every = [job.texts(name, longest=True) for name in job.method.rollouts]
    peaks = [peak for model, full in asked for texts in every if texts for peak in _pass(job, model, texts, full)]
    if any(need.endswith((".full", ".distribution")) for _, need in _needs(job.method)):
        rows = int(job.rows() * job.counts.lengths.response)
        size = signal_bytes(job.student.architecture.vocab, rows, job.blocks)
        peaks.append((Part("divergences inside signals", size),))
    return (*_whole_student(job), *_kept(job), *max(peaks, key=_total))


def _pass(job: Job, model: Model, texts: Sequence[Rollout], full: bool) -> list[tuple[Part, ...]]:
    """What scoring some texts with one model holds: in its largest forward pass, while logits are formed, and, where the
    hidden states are kept, while they exist in parts, joined, and in order (views.local._join)."""
    cut = passes(model, texts, job.recipe.train.score_tokens)
    largest = max(cut, key=lambda p: p.tokens)
    rehearsal, name = job.rehearsal(model), model.architecture.name
    copies = _autocast_copies(job) if model is job.student else Part("", 0)
    hidden = rehearsal.hidden_size()
    logits = chunk_bytes(model.architecture.vocab, largest.trained, None, 1, SCORE_BLOCKS, job.blocks)
    states = (largest.tokens + largest.trained) * hidden
    before = full * (sum(p.trained for p in cut) - cut[-1].trained) * hidden
    joined = full * (1 + (len(cut) > 1)) * sum(p.trained for p in cut) * hidden
    held = Part(f"{name} hidden states of earlier passes", before, "train.prompts_per_step")
    return [
        (Part(f"{name} forward pass of {_rows(len(largest.texts))}", rehearsal.forward(largest.texts, largest.packed),
              "train.score_tokens"), held, copies),
        (Part(f"{name} hidden states of {_rows(len(largest.texts))}", states, "train.score_tokens"),
         Part("logits of a chunk", logits), held, copies),
        (Part(f"{name} hidden states being joined", joined, "train.prompts_per_step"), copies),
    ]  # fmt: skip


def _needs(method: Method) -> list[tuple[Any, str]]:
    pieces = [p for term in method.terms for p in (term.signal, term.weight) if p is not None]
    return [need for p in pieces for need in p.needs]


def _kept(job: Job) -> tuple[Part, ...]:
    """What a scored step holds: the samples' records, the student's view made of them, and the teachers' views."""
    n = int(job.rows() * job.counts.lengths.response)
    keep = to_keep(job.recipe, job.method, job.student.architecture.vocab)
    record = record_bytes(keep.top_k, job.rehearsal(job.student).hidden_size() if keep.hidden else 0)
    sampled = any(samples(job.method, name) for name in job.method.rollouts)
    views = 0
    for view in job.method.views.values():
        views += 8 + 12 * job.recipe.log.top_k  # sampled, entropy, own top-k list
        if isinstance(view.support, TopK):
            k = view.support.k * (2 if view.support.of in ("union", "difference") else 1)
            views += 17 * k + 8  # ids, which of them count, both sides' log-probs, tails
        elif isinstance(view.support, Full):
            sizes = [job.rehearsal(job.teachers[model]).hidden_size() for model in view.models]
            views += sum(sizes) if isinstance(view.model, TrustRegion) else max(sizes)
    return (
        Part("records and the student's view", 2 * n * record if sampled else 0, "train.prompts_per_step"),
        Part("the teachers' views", n * views, "train.prompts_per_step"),
    )


def _update(job: Job) -> tuple[Part, ...]:
    t, student, cut = job.recipe.train, job.student, job.update_texts(longest=True)
    read = {term.loss.teacher for term in job.method.terms}
    compared = [v for name, v in job.method.views.items() if isinstance(v.support, Full) and name in read]
    tables = 1 + len(compared) + sum(isinstance(v.model, TrustRegion) for v in compared)
    found = [p for texts in cut for p in passes(student, texts, t.microbatch_tokens)]
    largest = max(found, key=lambda p: p.tokens)
    logits = chunk_bytes(
        student.architecture.vocab, largest.trained, t.head_chunk, tables, LOSS_BLOCKS[tables > 1], job.blocks
    )
    only = made_there(job)
    size = job.rehearsal(student).update(largest.texts, largest.packed, logits, t.gradient_checkpointing, only=only)
    parts = [Part(f"forward, loss and backward of {_rows(len(largest.texts))}", size, "train.microbatch_tokens")]
    if job.shards > 1:
        parts += _gathered_parts(job, several=len(found) > 1)
    return (*_kept(job), *parts)


def _whole_student(job: Job) -> tuple[Part, ...]:
    """Sampling and scoring gather the whole student (train.sharding.whole)."""
    n = job.shards
    return (Part("the rest of the student's weights, gathered", job.student.bytes - job.student.bytes // n),)


def _gathered_parts(job: Job, several: bool) -> list[Part]:
    """The update gathers two layers at a time and keeps what is not a layer; gradients are divided at its end."""
    layers = job.student.architecture.layers
    inside = sum(
        layer.weight.numel() * layer.weight.element_size() for layer in linear_layers(job.student.meta).values()
    )
    parts = [Part("layers and the head, gathered", job.student.bytes - inside + 2 * inside // layers)]
    whole = job.student.trained_bytes - job.student.trained_bytes // job.shards
    return [*parts, Part("gradients, not yet divided", whole if several else 2 * inside // layers)]


def _autocast_copies(job: Job) -> Part:
    """Autocast keeps a copy of every float32 weight that is trained while its block lasts; sampling casts them once, too."""
    weights = [layer.weight for layer in linear_layers(job.student.meta).values() if layer.weight.requires_grad]
    copies = sum(2 * w.numel() for w in weights if w.element_size() == 4)
    precision = job.recipe.train.precision
    return Part(f"{precision} copies of the student's weights", 0 if precision == "fp32" else copies)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def _evaluate(job: Job) -> tuple[Part, ...]:
    """Sampling to the held-out problems, by the student or by the teacher that needs most, or the exact reverse KL."""
    e = job.recipe.eval
    found: list[tuple[Part, ...]] = [()]
    if job.recipe.task.verifier != "none":
        lengths = job.counts.lengths.up_to(e.max_new_tokens or job.recipe.sampling.max_new_tokens)
        rows = ceil(job.counts.held_out / job.gpus) * e.samples
        models = [job.student, *(t for t in job.teachers.values() if e.teacher and not t.shared)]
        found += [_decoding(job, [model], rows, e.samples, lengths, record_bytes(1, 0)) for model in models]
    if e.kl_prompts and job.teachers:
        found += _exact_kl(job, ceil(min(e.kl_prompts, job.counts.held_out) / job.gpus))
    most = max(found, key=_total)
    return (*_whole_student(job), *most) if most else ()


def _exact_kl(job: Job, rows: int) -> list[tuple[Part, ...]]:
    """train.evaluate.held_out_kl: the student's samples, and every teacher's hidden states on them."""
    lengths = job.counts.lengths
    record = record_bytes(1, job.rehearsal(job.student).hidden_size())
    kept = Part("records and the student's view", int(2 * rows * lengths.response * record), "eval.kl_prompts")
    found = [_decoding(job, [job.student], rows, 1, lengths, record)]
    texts = lengths.texts(rows, 1, longest=True)
    for teacher in job.teachers.values():
        size = int(rows * lengths.response * job.rehearsal(teacher).hidden_size())
        hidden = Part(f"{teacher.architecture.name} hidden states", size, "eval.kl_prompts")
        found += [(kept, *parts) for parts in _pass(job, teacher, texts, full=True)]
        size = signal_bytes(teacher.architecture.vocab, int(rows * lengths.response), job.blocks)
        found.append((kept, hidden, Part("divergences in blocks", size)))
    return found


def _total(parts: Sequence[Part]) -> int:
    return sum(part.bytes for part in parts)


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count > 1)}"
