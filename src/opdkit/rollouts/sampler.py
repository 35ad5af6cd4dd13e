"""Sampling responses in process with transformers, recording what the training step needs.

Axes: R rows (sequences that decode together), r of them still live, T sampled tokens, D hidden.

A prompt is prefilled once for its whole group; prompt positions never reach the vocabulary head; finished rows leave
the batch. The log-prob, entropy and top-k of every sampled position are kept, so the student is not scored again. The
uniform number that draws token t of response j to a prompt depends on (seed, prompt, j, t) only, so results do not
depend on which rows share a batch. With a `Mixture`, a second model decodes the same rows in lock-step, each with its
own cache, and tokens are drawn from both. Left out: samplers in other processes, beams.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.errors import DataError, ModelError, NonFiniteError, RecipeError
from opdkit.head import Head
from opdkit.models import LanguageModel
from opdkit.rollouts.body import Body, make_body
from opdkit.rollouts.decoder import Decoder, compaction
from opdkit.rollouts.draw import Cut, Other, draw
from opdkit.rollouts.early import Reader, Watch
from opdkit.rollouts.recorder import Recorder
from opdkit.rollouts.rollout import Capture
from opdkit.rollouts.stopping import StopStrings


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy: captured log-probs then belong to temperature 1."""

    group: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] = ()
    max_rows: int = 256


@dataclass(frozen=True)
class Keep:
    """What is recorded at every sampled position besides its log-prob and entropy."""

    top_k: int = 1
    hidden: bool = False


@dataclass(frozen=True)
class Mixture:
    """Tokens come from share x teacher + (1 - share) x the sampling model (2306.08543, teacher-mixed sampling).

    The teacher's probabilities are those at its own scoring temperature. `prompts` are the same prompts as the teacher
    reads them; None = as the sampling model does. The record's `logp`, entropy and top-k stay the sampling model's own;
    `behaviour` is the mixture's.
    """

    teacher: LanguageModel
    share: float
    prompts: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.share < 1.0:
            raise RecipeError(f"the teacher's share of a mixture is {self.share}; expected 0 to below 1")


@dataclass(frozen=True)
class Place:
    """Where sampling goes on in a response that is partly there (`rollouts.segments`)."""

    response: int = 0  # which of its prompt's responses
    start: int = 0  # response tokens that the prompt given here ends with
    limit: int = 0  # tokens to add at most
    turn: tuple[int, ...] = ()  # the newest of these tokens, in which a stop string may have begun


@dataclass(frozen=True)
class Sample:
    """One sampled response."""

    ids: tuple[int, ...]
    finish: str  # "stop", "stop_string", "length" or "drift"
    text: str
    capture: Capture
    states: Float[Tensor, "T H"] | None = None  # those of the model that read along


def sample(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], how: Sampling, seed: int, keep: Keep | None = None,
    keys: Sequence[str] | None = None, mixture: Mixture | None = None, places: Sequence[Place] | None = None,
    watch: Watch | None = None, finished: Callable[[dict[tuple[int, int], Sample]], None] | None = None,
) -> list[list[Sample]]:  # fmt: skip
    """Sample `how.group` responses to every prompt. Returns one list of samples per prompt, in the order given.

    `keys` are the prompts' random-number keys where they are part of a longer list (`prompt_keys`). With `places`, every
    prompt ends with the beginning of one response (a group of 1), which goes on from there. A `watch`
    may end responses. `finished` is given a wave's samples by (prompt, response) as soon as it is done.
    Deterministic in (weights, prompts, how, seed or keys); torch's global random state is neither
    read nor changed. Raises
    RecipeError for settings that cannot work with this model, ModelError for a mixture of two vocabularies, DataError
    for a prompt that is empty or leaves no room for `max_new_tokens`, and NonFiniteError when a model returns NaN.
    """
    keep = keep or Keep()
    going_on = places or [Place(limit=how.max_new_tokens)] * len(prompts)
    limits = [place.limit for place in going_on]
    _check(lm, prompts, limits, how, keep)
    readers = [(lm, prompts)]
    if mixture is not None:
        readers.append((mixture.teacher, prompts if mixture.prompts is None else mixture.prompts))
        _check_mixture(lm, mixture, readers[1][1], limits)
    if watch is not None:
        _check_room(watch.lm, watch.prompts, limits)
    given_prompts = [theirs for _, theirs in readers] + ([] if watch is None else [watch.prompts])
    keys = keys or prompt_keys(prompts, seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths: little padding
    rows = [(i, j) for i in order for j in range(how.group)]
    size = wave_rows(how.max_rows, how.group)
    bodies = [make_body(model, max(map(len, theirs), default=0) + how.max_new_tokens) for model, theirs in readers]
    found: dict[tuple[int, int], Sample] = {}
    for start in range(0, len(rows), size):
        wave = rows[start : start + size]
        first: dict[tuple[tuple[int, ...], ...], int] = {}  # equal prompts are read once
        alike = [first.setdefault(tuple(tuple(theirs[i]) for theirs in given_prompts), i) for i, _ in wave]
        chosen = list(dict.fromkeys(alike))
        owner = [chosen.index(i) for i in alike]
        uniform = torch.stack([_numbers(keys[i], j, going_on[i], how.max_new_tokens) for i, j in wave])
        share, its = 0.0 if mixture is None else mixture.share, [going_on[i] for i, _ in wave]
        work = _Wave(owner, uniform, its, how, keep, share)
        given = zip(readers, bodies, strict=True)
        follow = None if watch is None else partial(watch.begin, chosen, torch.tensor(owner), how.max_new_tokens)
        samples = work.run([(model, [theirs[i] for i in chosen], body) for (model, theirs), body in given], follow)
        done = dict(zip(wave, samples, strict=True))
        found |= done
        if finished is not None:
            finished(done)
    torch.clear_autocast_cache()  # weights that were cast without autograd must not serve a forward pass with it
    return [[found[i, j] for j in range(how.group)] for i in range(len(prompts))]


def wave_rows(max_rows: int, group: int) -> int:
    """Rows that start together: whole groups where they fit."""
    return max(max_rows // group * group, min(max_rows, group))


def _check(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], limits: Sequence[int], how: Sampling, keep: Keep
) -> None:
    vocab = lm.head().size
    if (most := max(keep.top_k, how.top_k)) > vocab:
        raise RecipeError(f"top-k of {most} exceeds the vocabulary of {vocab} ids; ask for at most that many")
    if not all(how.stop):
        raise RecipeError("an empty stop string would end every response at once; remove it from sampling.stop")
    eos = how.eos_ids or lm.eos_ids
    if not any(0 <= i < vocab for i in eos):
        raise RecipeError(
            f"none of the EOS ids {list(eos)} is among the {vocab} ids of the vocabulary, so no response could end; "
            "set sampling.eos_ids"
        )
    _check_room(lm, prompts, limits)


def _check_room(lm: LanguageModel, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    context = lm.context_length
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        room = context - limit
        if not 0 < len(prompt) <= room:
            raise DataError(
                f"prompt {i} has {len(prompt)} tokens as {lm.name} reads it; expected 1 to {room}, the context of "
                f"{context} less max_new_tokens = {limit}"
            )


def _check_mixture(
    lm: LanguageModel, mixture: Mixture, prompts: Sequence[Sequence[int]], limits: Sequence[int]
) -> None:
    ours, theirs = lm.head().size, mixture.teacher.head().size
    if ours != theirs:
        raise ModelError(
            f"{lm.name} has {ours} token ids and {mixture.teacher.name} {theirs}: their distributions cannot be mixed; "
            "use a teacher with the student's vocabulary, or sample without one"
        )
    _check_room(mixture.teacher, prompts, limits)


def prompt_keys(prompts: Sequence[Sequence[int]], seed: int) -> list[str]:
    """One random-number key per prompt: of its tokens, and of how many equal prompts come before it."""
    before: Counter[tuple[int, ...]] = Counter()
    keys = []
    for prompt in map(tuple, prompts):
        keys.append(f"{seed}/{before[prompt]}/{prompt}")
        before[prompt] += 1
    return keys


def noise(key: str, response: int, length: int) -> Float[Tensor, " T"]:
    """Uniform numbers in [0, 1): float64, so that inverse-CDF sampling resolves rare tokens."""
    digest = hashlib.blake2b(f"{key}/{response}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.rand(length, generator=generator, dtype=torch.float64)


def _numbers(key: str, response: int, place: Place, length: int) -> Float[Tensor, " T"]:
    """The uniform numbers with which a response goes on: what comes later does not depend on where it was cut."""
    return noise(key, response + place.response, place.start + length)[place.start :]


@dataclass(frozen=True)
class _Wave:
    """Rows that start together; row i answers prompt owner[i]."""

    owner: Sequence[int]
    uniform: Float[Tensor, "R T"]
    places: Sequence[Place]
    how: Sampling
    keep: Keep
    share: float  # of the second reader, where there is one

    def run(
        self, readers: Sequence[tuple[LanguageModel, Sequence[Sequence[int]], Body | None]],
        follow: Callable[[], Reader] | None = None,
    ) -> list[Sample]:  # fmt: skip
        """Sample with the first model, mixed with the second if there is one; each has its prompts and its body."""
        lm, how = readers[0][0], self.how
        record, stopping = Recorder(), StopStrings(lm.tokenizer, how.stop, [place.turn for place in self.places])
        # Without autograd's bookkeeping: 5 to 10 % of a small model's time. The record is put together outside of it,
        # because tensors of inference mode may not take part in a backward pass. Under autocast it would cost more than
        # it saves: there it makes autocast forget the cast weights, so that every token casts all of them anew.
        half = torch.is_autocast_enabled(lm.device.type)
        with torch.no_grad() if half else torch.inference_mode():
            decoders = [
                Decoder(model, prompts, torch.tensor(self.owner, device=model.device), how.max_new_tokens, body)
                for model, prompts, body in readers
            ]
            reader = follow() if follow is not None else None
            ended = self._decode(decoders, stopping, record, reader)
        samples, states = [], reader.states() if reader is not None else [None] * len(self.owner)
        drifted = reader.stopped if reader is not None else set()
        for i, (tokens, *recorded) in enumerate(record.per_row(len(self.owner))):
            ids = tokens.tolist()
            text = stopping.texts.get(i)
            finish = "stop" if i in ended else "drift" if i in drifted else "length" if text is None else "stop_string"
            text = lm.tokenizer.decode(ids, skip_special_tokens=True) if text is None else text
            samples.append(Sample(tuple(ids), finish, text, Capture(*recorded), states[i]))
        for at, (model, *_) in enumerate(readers):  # a mixture is not finite when either model is not
            recorded = [s.capture.behaviour if at else s.capture.logp for s in samples]
            if not bool(torch.isfinite(torch.cat(recorded)).all()):
                raise NonFiniteError(
                    f"model '{model.name}' ({model.path}) returned NaN or infinite log-probs while sampling; check its "
                    "weights and dtype"
                )
        return samples

    def _decode(
        self, decoders: Sequence[Decoder], stopping: StopStrings, record: Recorder, reader: Reader | None
    ) -> set[int]:
        """Draw token after token until every row is done. Returns the rows that an EOS token ended."""
        how, first, lm = self.how, decoders[0], decoders[0].lm
        head = cast(lm.head()).at(how.temperature or 1.0)
        heads = [cast(decoder.lm.head()) for decoder in decoders[1:]]
        uniform = self.uniform.to(lm.device)
        live = torch.arange(uniform.shape[0], device=lm.device)
        is_eos = torch.zeros(head.size, dtype=torch.bool, device=lm.device)
        is_eos[[i for i in how.eos_ids or lm.eos_ids if i < head.size]] = True
        ended: set[int] = set()
        limits = torch.tensor([place.limit for place in self.places], device=lm.device)
        uneven = bool((limits != limits[0]).any())
        cut = Cut(how.top_p, how.top_k, how.temperature == 0, self.keep.top_k)
        for t in range(how.max_new_tokens):
            others = [Other(h, d.hidden, self.share) for h, d in zip(heads, decoders[1:], strict=True)]
            drawn = draw(head, first.hidden, uniform[live, t], cut, *others)
            record.add(live, *drawn, *([first.hidden] if self.keep.hidden else []))
            tokens = drawn.tokens
            done = is_eos[tokens]
            if bool(done.any()):
                ended.update(live[done].tolist())
            if how.stop:
                done |= stopping.completed(live, tokens, done)
            if uneven:
                done |= limits[live] <= t + 1
            count = int(done.sum())
            last = t + 1 == how.max_new_tokens or count == len(live)
            if reader is not None and (last or (t + 1) % reader.every == 0):
                done |= reader.look(record.newest(t % reader.every + 1), live, done | last)
                count = int(done.sum())
            if last or count == len(live):
                break
            order = compaction(done) if count else None
            if order is not None:
                live, tokens = live[order], tokens[order]
            for decoder in decoders:
                if order is not None:
                    decoder.keep(order)
                decoder.advance(tokens)
        return ended


def cast(head: Head) -> Head:
    """The head as autocast's products read it, converted once instead of at every token."""
    kind = head.weight.device.type
    if not torch.is_autocast_enabled(kind) or head.weight.dtype == torch.float64:
        return head
    dtype = torch.get_autocast_dtype(kind)
    low = head.low_rank
    return replace(head, weight=head.weight.to(dtype), low_rank=None if low is None else low.to(dtype))
