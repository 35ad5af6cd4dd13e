"""A run's setup with random weights: the real architectures, method and settings, so that phases can be timed before
anything is loaded.

Weights are drawn so that the distributions over the vocabulary are peaked as a trained model's are, and no response
ends by itself. A model that is large is built with fewer of its layers. Left out: quantised weights (their dtype's stand
in), prepare steps, and what verifying and tracking take.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from opdkit.config import LoraConfig
from opdkit.lora import BASE, EMA, attach
from opdkit.method import Method, View
from opdkit.models import LanguageModel, checkpoint_activations
from opdkit.packing import enable
from opdkit.plan.architectures import Architecture, build, linear_layers, shallow
from opdkit.plan.counts import samples
from opdkit.plan.memory import Job, Model
from opdkit.plan.reading import OWN, Readings
from opdkit.plan.texts import PROBLEM
from opdkit.products import install
from opdkit.reading import agrees
from opdkit.rollouts.rollout import Capture, Rollout
from opdkit.self_teacher import averaged
from opdkit.tasks.problem import Problem, Task
from opdkit.tasks.prompts import EncodedProblems
from opdkit.train.optimise import Optimiser
from opdkit.train.processes import Processes
from opdkit.train.setup import Setup

LARGEST = 2**30  # bytes of one model's layers; of a larger model fewer layers are built
SHARE = 8  # of the memory that is free: no model takes more than this part of it
DRAWN = 2**20  # random numbers that are drawn once and repeated
STD, PEAKED = 0.02, 4.0  # of weights; of logits
_TRIED: dict[tuple[str, ...], tuple[bool, bool]] = {}  # advice asks again
END = 0  # the id that ends a response; its row of the head is 0, which is hardly ever drawn


@dataclass(frozen=True)
class Pilot:
    """A setup with random weights, its optimiser, and the part of each model's layers that was built."""

    setup: Setup
    optimiser: Optimiser
    depths: dict[str, float]

    def rollouts(self, texts: Sequence[Rollout], source: str, job: Job) -> list[Rollout]:
        """Texts as rollouts of a source, with made-up records where the student samples them."""
        found = []
        for i, text in enumerate(texts):
            reward = float(i % 2) if job.method.needs_reward else None
            own = self.seen(text, hidden=self.setup.keep.hidden) if samples(job.method, source) else self._worded(text)
            correct = None if reward is None else bool(reward)
            states = self._states(text, source, job)
            found.append(replace(own, source=source, reward=reward, correct=correct, states=states))
        return found

    def _states(self, text: Rollout, source: str, job: Job) -> dict[str, Any]:
        """What a teacher that reads along would have kept of a text."""
        rule, follower = job.along(source), job.follower(source)
        if rule is None or follower is None:
            return {}
        return {rule.view: self._hidden(len(text.response_ids), self.setup.teachers[follower.architecture.name])}

    def seen(self, text: Rollout, *, hidden: bool = True) -> Rollout:
        """A text with the record that the sampler would have kept of it."""
        n, k, device = len(text.response_ids), self.setup.keep.top_k, self.setup.student.device
        logp = torch.full((n,), -1.0, device=device)
        ids, top = torch.arange(k, device=device).repeat(n, 1), torch.full((n, k), -3.0, device=device)
        return replace(
            self._worded(text),
            capture=Capture(logp, logp, -logp, ids, top, self._hidden(n, self.setup.student) if hidden else None),
        )

    def _worded(self, text: Rollout) -> Rollout:
        """A text whose response is not one id again and again."""
        ids = self.setup.student.vocab - 1
        return replace(text, response_ids=tuple(1 + 7 * j % ids for j in range(len(text.response_ids))))

    def _hidden(self, n: int, lm: LanguageModel) -> Any:
        """Hidden states as the sampler keeps them: [n, H]."""
        with torch.no_grad(), self.setup.autocast():
            one = lm.hidden(torch.zeros(1, 1, dtype=torch.long, device=lm.device))
        return one[0].expand(n, -1).contiguous()


def pilot(job: Job, free: int) -> Pilot | None:
    """The pilot of a job on this machine's processors, or None where even few layers do not fit into `free` bytes."""
    own = {"student": job.student} | {name: t for name, t in job.teachers.items() if not t.shared}
    depths = {name: _depth(model, free) for name, model in own.items()}
    depths |= {name: depths["student"] for name in job.paths(EMA) if name in own}  # averages of the student's weights
    if not all(depths.values()):
        return None
    loras = {"student": job.recipe.lora}
    lms = {name: untrained(own[name].architecture, depth, loras.get(name)) for name, depth in depths.items()}
    for name, lm in lms.items():
        lm.packs = own[name].packs
    student, recipe = lms["student"], job.recipe
    student.temperature = recipe.sampling.temperature
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(student.model)
    teachers = {}
    for name, config in recipe.teachers.items():
        if name in lms:
            teachers[name] = lms[name]
            teachers[name].temperature = config.temperature
            teachers[name].model.requires_grad_(False)
        else:
            teachers[name] = replace(student, name=name)
            if config.path == BASE:
                assert student.adapters is not None
                teachers[name].adapters = replace(student.adapters, on=False)
            if config.path == EMA:
                teachers[name].adapters = averaged(student)
            teachers[name]._vocab = student.vocab  # else read from a tokenizer that may not be here
        if config.path == EMA:
            teachers[name].path = EMA  # the setup keeps its average
    depths |= {name: depths["student"] for name in teachers if name not in depths}
    parts = {name: depth / job.models[name].architecture.layers for name, depth in depths.items()}
    setup = _setup(job, student, teachers)
    return Pilot(setup, Optimiser(recipe, student, setup.processes), parts)


def _setup(job: Job, student: LanguageModel, teachers: dict[str, LanguageModel]) -> Setup:
    plain = {"template": "student", "template_args": {}}
    read = {name: config.model_copy(update=plain) for name, config in job.recipe.teachers.items()}
    recipe = job.recipe.model_copy(update={"teachers": read})
    none = EncodedProblems((), student.tokenizer, recipe.task, student.context_length, 1)
    task = Task("pilot", (PROBLEM,), (PROBLEM,))
    method, alone = _unrouted(job.method), Processes(0, 1, student.device)
    return Rereading(recipe, method, student, teachers, task, none, none, alone, readings=job.readings)


@dataclass
class Rereading(Setup):
    """A setup whose made-up texts are read by teachers behind prompts of other lengths, where the job says so."""

    readings: Readings = field(default_factory=dict)

    def told(self, view: View, rollouts: list[Rollout]) -> list[Problem | None] | None:
        """A problem that names the view, in place of what its context would show."""
        if view.context == "own":
            return None
        name = next(name for name, own in self.method.views.items() if own is view)
        return [replace(PROBLEM, id=name)] * len(rollouts)

    def as_read_by(
        self, lm: LanguageModel, rollouts: list[Rollout], told: list[Problem | None] | None = None
    ) -> list[Rollout]:
        first = told[0] if told else None
        reading = self.readings.get((OWN if first is None else first.id, lm.name))
        return rollouts if reading is None else reading.reread(rollouts)


def _unrouted(method: Method) -> Method:
    """The method with one teacher, the first, in views that have one for each domain: made-up texts have no domain."""
    return replace(method, views={name: replace(view, model=view.models[0]) if isinstance(view.model, Mapping) else view
                                  for name, view in method.views.items()})  # fmt: skip


def _depth(model: Model, free: int) -> int:
    """Layers that are built: all, or as many as fit; 0 where not one does."""
    layers = model.architecture.layers
    inside = sum(w.weight.numel() * w.weight.element_size() for w in linear_layers(model.meta).values())
    room = min(LARGEST, free // SHARE - (model.bytes - inside))
    return min(layers, int(room / max(1, inside / layers)))


def untrained(architecture: Architecture, layers: int, lora: LoraConfig | None = None) -> LanguageModel:
    """A model of random weights with some of an architecture's layers."""
    from transformers.initialization import no_init_weights

    name, small = architecture.name, shallow(architecture, layers)
    with no_init_weights():
        model = build(small, architecture.settings.attn)
    _fill(model)
    install(model)
    adapters = None if lora is None else attach(model, lora, "", name=name, seed=0)
    lm = LanguageModel(name, "", model.eval(), architecture.tokenizer or no_words(), adapters=adapters)
    lm._vocab, lm.packs = architecture.vocab, enable(lm.model)
    lm.reads = agrees(lm)
    return lm


@torch.no_grad()
def _fill(model: Any) -> None:
    """Draw weights; vectors, which scale, become 1. Few numbers are drawn, then repeated: drawing costs more than a pass."""
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))
    head = model.get_output_embeddings().weight
    for p in model.parameters():
        flat = p.data.view(-1)
        std = PEAKED / p.shape[-1] ** 0.5 if p is head else STD
        for start in range(0, flat.numel(), DRAWN):
            flat[start : start + DRAWN].copy_(std * drawn[: flat.numel() - start]) if p.ndim > 1 else flat.fill_(1.0)
    head[END] = 0.0


def no_words() -> Any:
    """Stands in for a tokenizer that is not on this machine: every text is empty."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({}, unk_token="")))


def tried(model: Model, free: int) -> tuple[bool, bool]:
    """Whether the engine packs this model's rows on a CPU, and whether it writes its layers out (`opdkit.reading`): its own
    trials, on a layer of random weights."""
    a = model.architecture
    key = (a.config.to_json_string(use_diff=False), a.settings.attn, a.settings.dtype)
    if key not in _TRIED:
        one = untrained(a, 1) if _depth(model, free) > 0 else None
        _TRIED[key] = (False, False) if one is None else (one.packs, one.reads)
    return _TRIED[key]
