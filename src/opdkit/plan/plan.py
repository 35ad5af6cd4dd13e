"""The plan of a recipe: everything that can be known about a run without weights, network or GPU."""

import time
from dataclasses import dataclass, replace

import torch

from opdkit.catalogue import build_method
from opdkit.config import ModelConfig, Recipe
from opdkit.errors import RecipeError
from opdkit.lora import EMA, LIVE, SELF, attach, check_lora
from opdkit.method import Method
from opdkit.models import LanguageModel, check_same_vocabulary
from opdkit.plan.architectures import Architecture, find_architecture, meta_model, parameter_bytes
from opdkit.plan.counts import Counts, count
from opdkit.plan.datasheet import Datasheet
from opdkit.plan.hardware import Gpu, Host, find_gpu, this_machine
from opdkit.plan.memory import Job, Model, Phase
from opdkit.plan.phases import phases
from opdkit.plan.pilot import pilot, tried
from opdkit.plan.reading import find_readings
from opdkit.plan.stopwatch import Stopwatch
from opdkit.plan.timing import Timing, timings
from opdkit.sources import context_of
from opdkit.tasks.contexts import check_context, describe_difference
from opdkit.train.checks import check_processes, check_recipe, check_supports
from opdkit.train.processes import Processes

STEP = ("sample", "score", "update", "other")  # phases of a step; the others are outside of it
NODE = 8  # GPUs that a recipe with sharding is planned for when none are given


@dataclass(frozen=True)
class Plan:
    """A resolved recipe with its counts, and the memory and time of every phase on one of `gpus` GPUs, or on the machine
    that plans. `times` is empty where they were not asked for, or could not be measured."""

    job: Job
    place: Gpu | Host
    phases: tuple[Phase, ...]
    times: tuple[Timing, ...]
    notes: tuple[str, ...]
    response: float | None = None  # mean length of responses that was asked for

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe

    @property
    def method(self) -> Method:
        return self.job.method

    @property
    def counts(self) -> Counts:
        return self.job.counts

    @property
    def gpus(self) -> int:
        return self.job.gpus

    @property
    def models(self) -> dict[str, Model]:
        """Student and teachers by name."""
        return self.job.models

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum((t.total for t in self.times), 0.0)

    @property
    def step_seconds(self) -> float:
        return sum((t.seconds for t in self.times if t.phase in STEP), 0.0)

    @property
    def too_large(self) -> tuple[Phase, ...]:
        """The phases that do not fit."""
        return tuple(phase for phase in self.phases if phase.bytes > self.place.usable)


def plan(
    recipe: Recipe, gpu: str | None = "H100-80GB", gpus: int | None = None, response: float | None = None,
    timed: bool = True,
) -> Plan:  # fmt: skip
    """Resolve and check a recipe, build its models on the meta device and plan its memory and time.

    `gpu` None is the machine that plans, with its processors: its times are measured, in seconds. `gpus` is the number of
    processes; None = 8 where the recipe shares the student among GPUs, else 1. `response` is the mean length of
    responses that is assumed (tokens); None = all are at their limit. Raises OpdkitError for whatever a run would
    refuse as well, as far as it can be seen without weights; a recipe that does not fit is a plan that says so.
    """
    began = time.perf_counter()
    place = this_machine() if gpu is None else find_gpu(gpu)
    gpus = _processes(recipe, gpu, gpus)
    method = build_method(recipe.method.name, recipe.method.arguments)
    check_recipe(recipe, method)
    check_lora(recipe)
    check_processes(recipe, method, Processes(0, gpus, torch.device("cpu")))
    student = _model(recipe.student, "student", recipe)
    teachers = {name: _teacher(config, name, student, recipe) for name, config in recipe.teachers.items()}
    seen = {m.architecture.name: _language_model(m) for m in (student, *teachers.values())}
    _check_together(recipe, method, seen)
    context = min(m.architecture.context for m in (student, *teachers.values()))
    counts = count(recipe, method, student.architecture, context, response)
    if isinstance(place, Host) and recipe.train.packing:
        student = _packed(student, place)
        teachers = {name: _packed(teacher, place) for name, teacher in teachers.items()}
    readings, read = find_readings(recipe, method, seen, counts)
    job = Job(recipe, method, counts, student, teachers, gpus, isinstance(place, Gpu), readings)
    resolved = time.perf_counter() - began
    found = phases(job)
    times, missing = _times(job, place, resolved) if timed else ((), [])
    notes = (*read, *_notes(job, context), *_prompts(recipe, counts, seen), *missing)
    return Plan(job, place, found, times, notes, response)


def _processes(recipe: Recipe, gpu: str | None, gpus: int | None) -> int:
    """The number of processes. Raises RecipeError for one that is impossible, or not this machine's."""
    if gpus is not None and gpus < 1:
        raise RecipeError(f"--gpus {gpus}: expected 1 or more")
    shared = recipe.train.sharding != "none"
    if gpu is not None:
        return gpus if gpus is not None else (NODE if shared else 1)
    if gpus is not None:
        raise RecipeError(f"--gpus {gpus} has no effect without --gpu: name the GPUs, such as --gpu H100-80GB")
    if shared:
        raise RecipeError(f"train.sharding = {recipe.train.sharding} shares the student among processes, and this machine "
                          "is planned with one: name the GPUs, such as --gpu H100-80GB")  # fmt: skip
    return 1


def _packed(model: Model, place: Host) -> Model:
    packs, reads = tried(model, place.usable)
    return replace(model, packs=packs, reads=reads)


def _times(job: Job, place: Gpu | Host, resolved: float) -> tuple[tuple[Timing, ...], list[str]]:
    """The phases' times, or a note that says why there are none."""
    if isinstance(place, Gpu):
        return timings(job, Datasheet(job, place)), []
    began = time.perf_counter()
    made = pilot(job, place.usable)
    if made is None:
        return (), ["times were not measured: not even one layer of each model fits into an eighth of the free memory"]
    built = (time.perf_counter() - began) / min(made.depths.values())
    return timings(job, Stopwatch(job, made, resolved + built)), []


def _model(settings: ModelConfig, name: str, recipe: Recipe | None) -> Model:
    """A model on the meta device; with the recipe it is the student, which is trained."""
    architecture = find_architecture(settings, name)
    meta = meta_model(architecture).requires_grad_(recipe is not None)
    size, count = parameter_bytes(meta, settings.quantize), sum(p.numel() for p in meta.parameters())
    if recipe is not None and recipe.lora is not None:
        attach(meta, recipe.lora, settings.path, name=name, seed=0)
        adapters = [p for p in meta.parameters() if p.requires_grad]
        numbers = sum(p.numel() for p in adapters)
        own = sum(p.numel() * p.element_size() for p in adapters)
        return Model(architecture, meta, count + numbers, size + own, numbers, own)
    trained = recipe is not None
    return Model(architecture, meta, count, size, count if trained else 0, size if trained else 0)


def _teacher(settings: ModelConfig, name: str, student: Model, recipe: Recipe) -> Model:
    """A teacher of its own, or one that is the student: its modules with or without the adapters, or a second copy."""
    if settings.path not in SELF:
        return _model(settings, name, None)
    own = student.architecture
    base = Architecture(name, own.settings, own.source, own.config, own.tokenizer)
    if settings.path == LIVE or (settings.path == EMA and recipe.lora is not None):
        now = replace(base, settings=own.settings.model_copy(update={"path": settings.path}))
        return Model(now, student.meta, student.parameters, 0, 0, 0, shared=True)
    given = {key: getattr(settings, key) for key in ("dtype", "attn", "quantize")}
    other = {key: value for key, value in given.items() if value != ModelConfig.model_fields[key].default}
    if recipe.lora is None and other:  # a second copy of its own kind (self_teacher.base_of)
        return _model(own.settings.model_copy(update=other), name, None)
    if recipe.lora is None:
        return Model(base, student.meta, student.parameters, student.bytes, 0, 0)
    return Model(base, student.meta, student.parameters - student.trained, 0, 0, 0, shared=True)


def _check_together(recipe: Recipe, method: Method, models: dict[str, LanguageModel]) -> None:
    """Raise ModelError for a support larger than the vocabulary, and for unlike tokenizers where both are here."""
    student = models["student"]
    check_supports(method, student)
    for name in recipe.teachers:
        if student.tokenizer is not None and models[name].tokenizer is not None:
            check_same_vocabulary(student, models[name])


def _language_model(model: Model) -> LanguageModel:
    """A model as the engine's checks read it, without weights."""
    a = model.architecture
    lm = LanguageModel(a.name, a.settings.path, model.meta, a.tokenizer)
    lm._vocab = a.vocab
    return lm


def _prompts(recipe: Recipe, counts: Counts, models: dict[str, LanguageModel]) -> list[str]:
    """Notes on teachers that read another prompt, where data and tokenizers are here. Raises as a run would."""
    problem, config = counts.data.first, recipe.teachers
    readers = {n: lm for n, lm in models.items() if n in config and lm.tokenizer and config[n].template == "own"}
    if problem is None or not readers or models["student"].tokenizer is None:
        return []
    for name, lm in readers.items():
        check_context(lm, config[name], [problem], recipe.task)
    ends = recipe.sampling.eos_ids
    return describe_difference(models["student"], readers, config, problem, recipe.task, ends).splitlines()


def _assumptions(job: Job) -> list[str]:
    """What nobody knows before the run, and what is assumed of it."""
    tools, notes = job.recipe.tools, []
    if tools is not None:
        notes.append(f"every response is planned with {tools.turns} turns, each of which reads all before it again, and as if "
                     "the student wrote all its tokens; the time that calls take is not counted")  # fmt: skip
    if any(job.along(name) for name in job.method.rollouts):
        notes.append("a teacher reads along while the student samples; no response is planned to be stopped")
    for hook in job.method.after_update:
        if (work := job.works.get(hook.name)) is None:
            notes.append(f"what hook '{hook.name}' does is not counted")
        elif work.accuracies:
            notes.append(f"hook '{hook.name}' acts {work.times} times, each with at most {work.accuracies} x {work.problems} "
                         "responses to training problems")  # fmt: skip
    return notes


def _notes(job: Job, context: int) -> list[str]:
    r, text, data = job.recipe, job.student.architecture.text, job.counts.data
    notes = _assumptions(job)
    notes += [f"source '{name}' is planned with the task's prompts: what its context adds is not counted"
              for name, source in job.method.rollouts.items() if context_of(source) != "own"]  # fmt: skip
    new = r.sampling.max_new_tokens
    if r.task.max_prompt_tokens + new > context and not data.encoded:
        notes.append(f"prompts over {context - new} tokens will be refused: with max_new_tokens = {new} they do not fit the "
                     f"context of {context:,}")  # fmt: skip
    for name, teacher in job.teachers.items():
        rows = int(teacher.architecture.text.vocab_size)
        if teacher.architecture.tokenizer is None and rows != int(text.vocab_size):
            notes.append(f"the heads of student and {name} have {int(text.vocab_size):,} and {rows:,} rows; the run itself "
                         "checks that the tokenizers are equal")  # fmt: skip
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    if job.cuda and r.train.precision == "fp32" and r.student.dtype == "float32" and heads != text.num_attention_heads:
        notes.append("in fp32 a GPU has no fused attention for grouped heads: PyTorch may then hold length x length numbers "
                     "for each head, which are not counted here; set train.precision: bf16")  # fmt: skip
    if data.train is None:
        notes.append(f"data set '{data.name}' is not here: epochs and prompts over the limit are unknown")
    return notes
