"""What sampling holds at its peak: caches, the pass that reads prompts or draws tokens, and the records of the samples.

Units: bytes.
"""

from collections.abc import Sequence
from math import ceil

from opdkit.plan.memory import SCORE_BLOCKS, Job, Model, Part, cache_bytes, chunk_bytes, draw_bytes, token_bytes
from opdkit.plan.texts import Lengths
from opdkit.rollouts.sampler import wave_rows


def decoding(
    job: Job, models: list[Model], rows: int, group: int, lengths: Lengths, record: int,
    followers: Sequence[tuple[Model, int]] = (),
) -> tuple[Part, ...]:  # fmt: skip
    """Sampling `rows` responses: in one go, or in as many pieces as they have turns, the last of which has the longest
    contexts, a row's own each. `followers` are teachers that read along, with the tokens they read at once."""
    record_parts = (
        Part("records of the step's samples", int(rows * lengths.response * record), "train.prompts_per_step"),
    )
    kept = [Part(f"{model.architecture.name} hidden states of the step's samples",
                 int(rows * lengths.response * job.rehearsal(model).hidden_size()), "train.prompts_per_step")
            for model, _ in followers]  # fmt: skip
    first, *later = lengths.cut(job.turns, longest=True)
    found = [_piece(job, models, rows, group, first, record, followers)]
    found += [_piece(job, models, rows, 1, piece, record, followers) for piece in later[-1:]]
    return (*max(found, key=total), *record_parts, *kept)


def _piece(
    job: Job, models: list[Model], rows: int, group: int, lengths: Lengths, record: int,
    followers: Sequence[tuple[Model, int]],
) -> tuple[Part, ...]:  # fmt: skip
    """One wave, with one model or several in lock-step: the larger of reading prompts and drawing tokens."""
    most, prompt, tokens = job.recipe.sampling.max_rows, lengths.longest, lengths.longest + lengths.limit
    wave = min(rows, wave_rows(most, group))
    prompts = ceil(wave / group)
    reading, writing = [], []
    for model in models:
        rehearsal, name = job.rehearsal(model), model.architecture.name
        sizes = rehearsal.cache()
        cache = Part(f"{name} key-value cache of {row_count(wave)}", cache_bytes(model, prompts, wave, lengths, sizes),
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
    for model, every in followers:
        rehearsal, name, new = job.rehearsal(model), model.architecture.name, min(every, lengths.limit)
        sizes = rehearsal.cache()
        cache = Part(f"{name} key-value cache of {row_count(wave)}",
                     cache_bytes(model, prompts, wave, lengths, sizes, alone=True), "sampling.max_rows")  # fmt: skip
        logits = chunk_bytes(model.architecture.vocab, wave * new, None, 1, SCORE_BLOCKS, job.blocks)
        step = max(rehearsal.decode(wave, tokens - new, new), wave * new * rehearsal.hidden_size() + logits)
        writing += [cache, Part(f"{name} reading {new} tokens along", step, "sampling.max_rows")]
        read = prompts * prompt * model.architecture.layers * token_bytes(model.architecture, sizes)
        first = rehearsal.read(prompts, prompt) + read
        reading.append(Part(f"{name} reading {prompts} prompt{'s' * (prompts > 1)}", first, "sampling.max_rows"))
    return max(tuple(reading), tuple(writing), key=total)


def total(parts: Sequence[Part]) -> int:
    return sum(part.bytes for part in parts)


def row_count(count: int) -> str:
    return f"{count} row{'s' * (count > 1)}"
