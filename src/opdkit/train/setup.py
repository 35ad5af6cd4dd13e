"""Everything a run needs, loaded and checked before the run folder is touched. The optimiser is `train.optimise`'s."""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from opdkit.catalogue import build_method
from opdkit.config import Recipe
from opdkit.contexts import Material
from opdkit.errors import RecipeError
from opdkit.kernels import check_kernel
from opdkit.lora import EMA, LIVE, SELF
from opdkit.method import Method, View
from opdkit.models import LanguageModel, check_same_vocabulary, checkpoint_activations, load_models
from opdkit.rewards.verify import verify_rollouts
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.sampler import Keep, Sampling
from opdkit.rollouts.sources import from_dataset
from opdkit.rollouts.tools import ToolUse, equipped, make_tools
from opdkit.self_teacher import Averages
from opdkit.sources import Dataset, Source, context_of
from opdkit.tasks.contexts import check_context, check_told, describe_difference, read_by_student, reread
from opdkit.tasks.difficulty import upsampled
from opdkit.tasks.load import load_task
from opdkit.tasks.problem import PROBE, Problem, Task, listed
from opdkit.tasks.prompts import EncodedProblems, encode_problems
from opdkit.tasks.rows import prompt_key
from opdkit.train.ahead import Reading, check_ahead, obstacles
from opdkit.train.checks import check_moving_heads, check_processes, check_recipe, check_supports, split_prompts
from opdkit.train.keep import to_keep
from opdkit.train.processes import Processes
from opdkit.views.interpolated import check_interpolated, model_of
from opdkit.views.route import assign, check_routes


@dataclass
class Setup:
    """A recipe with its method, models, task and processes."""

    recipe: Recipe
    method: Method
    student: LanguageModel
    teachers: dict[str, LanguageModel]
    task: Task
    train: EncodedProblems
    eval: EncodedProblems
    processes: Processes
    pool: Sequence[int] = ()  # the training prompts of an epoch, repeated ones included; empty = all once
    tools: ToolUse | None = None
    averages: Averages = field(init=False)  # its `student:ema` teachers
    domains: tuple[str, ...] = field(init=False)  # those of the problems that are known at the start

    def __post_init__(self) -> None:
        self.domains = tuple(dict.fromkeys(problem.domain for problem in listed(self.task)[0]))
        self.averages = Averages(self.student, self.teachers, self.recipe.teachers)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.recipe.train.precision]
        return nullcontext() if dtype is None else torch.autocast(self.processes.device.type, dtype)

    def as_read_by(
        self, lm: LanguageModel, rollouts: list[Rollout], told: list[Problem | None] | None = None
    ) -> list[Rollout]:
        """The rollouts with the prompts that a teacher reads: the student's, those of its own template, or of a context."""
        config = self.recipe.teachers[lm.name]
        return reread(
            lm, config.template, config.template_args, rollouts, self.recipe.task, told, self.student.tokenizer
        )

    def told(self, view: View, rollouts: list[Rollout]) -> list[Problem | None] | None:
        """The problems as a view's context rewrites them; None for a view that reads the rollouts' own prompts."""
        return None if view.context == "own" else view.context.rewrite(rollouts, self.material)

    def readers(
        self, name: str, view: View, rollouts: list[Rollout], told: list[Problem | None] | None
    ) -> list[Reading]:
        """Who scores a view: each model, the numbers of its rollouts, and these as it reads them (`told`: see there)."""
        found = []
        for teacher, at in assign(view.routes, rollouts, name).items():
            lm = self.teachers[teacher]
            own = None if told is None else [told[s] for s in at]
            seen = self.as_read_by(lm, [rollouts[s] for s in at], own)
            found.append((model_of(view, lm, self.teachers), at, seen))
        return found

    @property
    def read_ahead(self) -> dict[str, View]:
        """The views whose models can read responses while others are sampled (`train.ahead`)."""
        kept = obstacles(self.recipe, self.method, self.student, self.teachers)
        return {name: view for name, view in self.method.views.items() if name not in kept}

    def shown(self, source: Source, rollouts: list[Rollout]) -> list[Rollout]:
        """A source's rollouts as the student reads them: with its context, and verified where that tells the verdict."""
        context = context_of(source)
        if context == "own":
            return rollouts
        judged = verify_rollouts(self.task, rollouts) if "rollouts.correct" in context.needs() else rollouts
        return read_by_student(self.student, context, judged, self.recipe.task, self.material)

    @property
    def evaluated(self) -> list[LanguageModel]:
        """The teachers that are evaluated once, at the start: not those that are the student itself then."""
        once = [lm for lm in self.teachers.values() if lm.path not in (LIVE, EMA)]
        return once if self.recipe.eval.teacher else []

    @property
    def material(self) -> Material:
        """What contexts may read beside the rollouts."""
        return Material(self.student.tokenizer, self.recipe.task.template == "plain", self.task.target)

    @property
    def sampling(self) -> Sampling:
        """How the student samples while it trains."""
        s = self.recipe.sampling
        eos = self.student.eos_ids if s.eos_ids is None else tuple(s.eos_ids)
        return Sampling(s.group, s.max_new_tokens, s.temperature, s.top_p, s.top_k, tuple(s.stop), eos, s.max_rows)

    @property
    def keep(self) -> Keep:
        """What the sampler must record so that no view needs the student again."""
        return to_keep(self.recipe, self.method, self.student.head().size)


def set_up(recipe: Recipe) -> Setup:
    """Load and check everything. Raises OpdkitError with one clear sentence for whatever does not fit."""
    method = build_method(recipe.method.name, recipe.method.arguments)
    check_recipe(recipe, method)
    check_moving_heads(recipe, method)
    place = start_processes()
    processes = Processes(place.process_index, place.num_processes, place.device)
    check_processes(recipe, method, processes)
    check_ahead(recipe, method, split_prompts(method, recipe.train.prompts_per_step), processes.count)
    tools = make_tools(recipe.tools, recipe.task, recipe.sampling)
    task = equipped(load_task(recipe.task), tools, recipe.tools.show if recipe.tools else "template")
    if method.needs_reward and task.verify is None:
        raise RecipeError(f"method {method.name} learns from rewards, but task '{task.name}' has no verifier; "
                          "give the data an answer column or set task.verifier")  # fmt: skip
    for name, view in method.views.items():
        check_routes(view.routes, name, task)
        check_interpolated(name, view, recipe.teachers)
    with place.main_process_first():  # the first process builds what the cache lacks
        student, teachers = load_models(recipe, processes.device, derive_seed(recipe.seed, "lora"))
    student.temperature = recipe.sampling.temperature
    for teacher in teachers.values():
        check_same_vocabulary(student, teacher)
        check_context(teacher, recipe.teachers[teacher.name], task.train, recipe.task)
    check_supports(method, student)
    check_kernel(recipe, method, student.head().softcap, student.device)
    obstacles(recipe, method, student, teachers)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(student.model)
    context = min(lm.context_length for lm in [student, *teachers.values()])
    new = recipe.sampling.max_new_tokens
    train = encode_problems(task.train, student.tokenizer, recipe.task, context, new)
    held_out = encode_problems(task.eval, student.tokenizer, recipe.task, context, recipe.eval.max_new_tokens or new)
    pool = upsampled(train.problems, recipe.task) if recipe.task.upsample else []
    if processes.count > 1:
        processes.check_same({
            "prompts to repeat": str(pool),
            "recipes": recipe.model_dump_json(exclude={"output"}),
            "training prompts": "\n".join([str(len(train)), *(prompt_key(train.problems[i]) for i in _probe(len(train)))]),
            "held-out prompts": "\n".join(map(prompt_key, held_out.problems)),
        })  # fmt: skip
    setup = Setup(recipe, method, student, teachers, task, train, held_out, processes, pool, tools)
    if tools is not None:
        tools.calls.check(train[0][0], student)
    for view in method.views.values():
        if view.context != "own":
            for lm in (teachers[reader] for reader in view.models):
                check_told(lm, recipe.teachers[lm.name], view.context, task.train, recipe.task, setup.material, new)
    for source in method.rollouts.values():
        if isinstance(source, Dataset):  # a response that cannot be used fails here
            setup.shown(source, from_dataset(student, task, train[:PROBE], setup.sampling))
        if (shown := context_of(source)) != "own":
            check_told(student, recipe.student, shown, task.train, recipe.task, setup.material, new)
    return setup


def _probe(size: int, most: int = 256) -> range:
    """All indices of a small data set, evenly spread ones of a large or generated one."""
    return range(0, size, max(1, size // most))


def start_processes() -> Any:
    """This process's place among those of the launcher, and its device (an accelerate.PartialState)."""
    from accelerate import PartialState

    # without `cpu` it would not join the processes of a launcher on a machine that has no accelerator
    return PartialState(cpu=not torch.accelerator.is_available())


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part: sampling at step 7 needs no state from step 6."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def notes(setup: Setup) -> list[str]:
    """What a person should know before the first step: dropped prompts, and teachers that read something else."""
    found = []
    for what, problems in (("training", setup.train), ("held-out", setup.eval)):
        if problems.dropped:
            found.append(f"{problems.dropped} {what} prompts over task.max_prompt_tokens are dropped")
    if setup.recipe.train.score_ahead:
        late = obstacles(setup.recipe, setup.method, setup.student, setup.teachers)
        found += [f"view '{name}' is scored after sampling: {why}" for name, why in late.items()]
    for name, config in setup.recipe.teachers.items():
        if config.path in SELF and config.temperature != setup.student.temperature:
            found.append(f"teacher '{name}' is the student itself at temperature {config.temperature:g}, and the student is "
                         f"scored at {setup.student.temperature:g}: they differ even where nothing is shown; "
                         f"to compare them set teachers.{name}.temperature={setup.student.temperature:g}")  # fmt: skip
    if setup.teachers:
        problem, _ = setup.train[0]
        recipe = setup.recipe
        text = describe_difference(
            setup.student, setup.teachers, recipe.teachers, problem, recipe.task, recipe.sampling.eos_ids, same=False
        )
        found += text.splitlines()
    return found
