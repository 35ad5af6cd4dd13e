"""How much memory each phase of a step holds at its peak, per GPU or in this machine's process, as named parts.

Prompts are taken to be as long as the task's longest, responses as the plan assumes (counts.lengths). Left out:
kernels' own workspaces and the allocator's fragments, for which `hardware` keeps a margin.

Units: bytes. Axes: N trained tokens of a step.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch

from opdkit.lora import EMA
from opdkit.method import Method
from opdkit.plan.architectures import linear_layers
from opdkit.plan.counts import samples
from opdkit.plan.drawing import decoding, row_count, total
from opdkit.plan.memory import (
    LOSS_BLOCKS,
    SCORE_BLOCKS,
    Job,
    Model,
    Part,
    Phase,
    chunk_bytes,
    record_bytes,
    signal_bytes,
)  # fmt: skip
from opdkit.plan.meter import left
from opdkit.plan.passes import passes
from opdkit.plan.reading import OWN
from opdkit.rollouts.rollout import Rollout
from opdkit.sources import OnPolicy, TeacherSamples
from opdkit.support import Full, TopK
from opdkit.train.keep import to_keep
from opdkit.view import TrustRegion

GRADIENTS = "gradients"


def phases(job: Job) -> tuple[Phase, ...]:
    """The phases of a step that a recipe has, in their order, and the evaluation."""
    own = {
        "sample": _sample(job), "score": _score(job), "update": _update(job), "hooks": _hooks(job), "evaluate": _evaluate(job),
    }  # fmt: skip
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
        parts.append(Part("gaps between blocks", left()))
        parts += [Part(f"{name}'s copy of weights", work.kept) for name, work in job.works.items()]
    parts += [Part(f"{name} weights", t.bytes) for name, t in job.teachers.items() if not t.shared]
    return (*parts, *(Part(f"{name}'s average", average_bytes(job, name)) for name in job.paths(EMA)))


def average_bytes(job: Job, name: str) -> int:
    """What `student:ema` keeps beside a copy of the weights: a float32 average where the copy is less exact; with adapters
    the average of them, of which there is no copy (self_teacher.Averages)."""
    student, teacher = job.student, job.teachers[name]
    if teacher.shared:
        return student.trained_bytes + (4 * student.trained if student.trained_bytes < 4 * student.trained else 0)
    return 4 * student.trained if getattr(torch, teacher.architecture.settings.dtype).itemsize < 4 else 0


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
        followers = [(model, rule.every) for name in job.method.rollouts
                     if (rule := job.along(name)) and (model := job.follower(name))]  # fmt: skip
        parts = decoding(job, models, rows, s.group, lengths, record, followers)
        parts = (*_whole_student(job), *parts, _autocast_copies(job), *_ahead(job))
    for source in job.method.rollouts.values():
        if isinstance(source, TeacherSamples):
            teacher = job.teachers[source.teacher]
            count = ceil(job.counts.prompts / job.gpus)
            answers = decoding(job, [teacher], count, 1, lengths, record_bytes(1, 0))
            parts = max(parts, answers, key=total)
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Scoring and update


def _score(job: Job) -> tuple[Part, ...]:
    asked = [
        (job.teachers[m], isinstance(v.support, Full), name) for name, v in job.method.views.items() for m in v.models
    ]
    if job.recipe.sampling.rescore or any(
        job.method.reads_student(name) and not isinstance(source, OnPolicy)
        for name, source in job.method.rollouts.items()
    ):
        asked.append((job.student, to_keep(job.recipe, job.method, job.student.architecture.vocab).hidden, "student"))
    if not asked:
        return ()
    peaks: list[tuple[Part, ...]] = []
    for source in job.method.rollouts:
        if not (texts := job.texts(source, longest=True)):
            continue
        rule = job.along(source)
        for model, full, view in asked:
            if rule is not None and rule.view == view:
                peaks.append(_states_that_are_there(job, model, sum(len(t.response_ids) for t in texts)))
                continue
            peaks += _pass(job, model, job.read_by(view, model.architecture.name, texts, longest=True), full)
    if any(need.endswith((".full", ".distribution")) for _, need in _needs(job.method)):
        rows = int(job.rows() * job.counts.lengths.response)
        size = signal_bytes(job.student.architecture.vocab, rows, job.blocks)
        peaks.append((Part("divergences inside signals", size),))
    return (*_whole_student(job), *_kept(job), *_ahead(job)[:1], *max(peaks, key=total))


def _ahead(job: Job) -> tuple[Part, ...]:
    """With `train.score_ahead`: the views' hidden states of the whole step, and the largest pass that forms them."""
    if not job.recipe.train.score_ahead:
        return ()
    n, views = int(job.rows() * job.counts.lengths.response), job.method.views.values()
    readers = [[job.teachers[name] for name in view.models] for view in views]
    states = n * sum(max(job.rehearsal(model).hidden_size() for model in of) for of in readers)
    every = [texts for name in job.method.rollouts if (texts := job.texts(name, longest=True))]
    reading = [_pass(job, model, texts, False)[0][0] for of in readers for model in of for texts in every]
    held = Part("hidden states that are read ahead", states, "train.prompts_per_step")
    return (held, max(reading, key=lambda part: part.bytes))


def _states_that_are_there(job: Job, model: Model, rows: int) -> tuple[Part, ...]:
    """What scoring holds where the model read along: one copy of the states, and a chunk of logits (views.local)."""
    name = model.architecture.name
    states = Part(f"{name} hidden states", rows * job.rehearsal(model).hidden_size(), "train.prompts_per_step")
    return states, Part(
        "logits of a chunk", chunk_bytes(model.architecture.vocab, rows, None, 1, SCORE_BLOCKS, job.blocks)
    )


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
        (Part(f"{name} forward pass of {row_count(len(largest.texts))}", rehearsal.forward(largest.texts, largest.packed),
              "train.score_tokens"), held, copies),
        (Part(f"{name} hidden states of {row_count(len(largest.texts))}", states, "train.score_tokens"),
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
    for name in job.method.rollouts:
        if (follower := job.follower(name)) is not None:  # Rollout.states
            views += job.rehearsal(follower).hidden_size()
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
    parts = [Part(f"forward, loss and backward of {row_count(len(largest.texts))}", size, "train.microbatch_tokens")]
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
# Hooks and evaluation


def _hooks(job: Job) -> tuple[Part, ...]:
    """The hook that needs most: its copies of weights, which are in main memory, while it samples and at its end."""
    found: list[tuple[Part, ...]] = [()]
    for name, work in job.works.items():
        rows = ceil(work.problems / job.gpus)
        copies = [Part(f"{name}'s copies of weights", 0 if job.cuda else n) for n in (work.asking, work.ending)]
        if rows and work.accuracies:
            sampling = decoding(job, [job.student], rows, 1, job.counts.lengths, record_bytes(1, 0))
            found.append((copies[0], *sampling, _autocast_copies(job)))
        found.append((copies[1],))
    return max(found, key=total)


def _evaluate(job: Job) -> tuple[Part, ...]:
    """Sampling to the held-out problems, by the student or by the teacher that needs most, or the exact reverse KL."""
    e = job.recipe.eval
    found: list[tuple[Part, ...]] = [()]
    if job.recipe.task.verifier != "none":
        lengths = job.counts.lengths.up_to(e.max_new_tokens or job.recipe.sampling.max_new_tokens)
        rows = ceil(job.counts.held_out / job.gpus) * e.samples
        models = [job.student, *(t for t in job.evaluated.values() if not t.shared)]
        found += [decoding(job, [model], rows, e.samples, lengths, record_bytes(1, 0)) for model in models]
    if e.kl_prompts and job.teachers:
        found += _exact_kl(job, ceil(min(e.kl_prompts, job.counts.held_out) / job.gpus))
    most = max(found, key=total)
    return (*_whole_student(job), *most) if most else ()


def _exact_kl(job: Job, rows: int) -> list[tuple[Part, ...]]:
    """train.evaluate.held_out_kl: the student's samples, and every teacher's hidden states on them."""
    lengths = job.counts.lengths
    record = record_bytes(1, job.rehearsal(job.student).hidden_size())
    kept = Part("records and the student's view", int(2 * rows * lengths.response * record), "eval.kl_prompts")
    found = [decoding(job, [job.student], rows, 1, lengths, record)]
    texts = lengths.texts(rows, 1, longest=True)
    for name, teacher in job.compared.items():
        size = int(rows * lengths.response * job.rehearsal(teacher).hidden_size())
        hidden = Part(f"{teacher.architecture.name} hidden states", size, "eval.kl_prompts")
        read = job.read_by(OWN, name, texts, longest=True)
        found += [(kept, *parts) for parts in _pass(job, teacher, read, full=True)]
        size = signal_bytes(teacher.architecture.vocab, int(rows * lengths.response), job.blocks)
        found.append((kept, hidden, Part("divergences in blocks", size)))
    return found
