"""What is checked of a recipe and its method before anything is loaded, and of the student's vocabulary after.

Left out: what the sections of a recipe check by themselves (`config`), and what a method checks when it is built.
"""

from opdkit.config import Recipe, nearest
from opdkit.errors import ModelError, RecipeError
from opdkit.lora import EMA, LIVE
from opdkit.losses import PolicyGradient
from opdkit.method import Method
from opdkit.models import LanguageModel
from opdkit.sources import OnPolicy, Replay, TeacherSamples
from opdkit.support import Full, TopK
from opdkit.train.optimise import updates_per_step
from opdkit.train.processes import Processes


def check_processes(recipe: Recipe, method: Method, processes: Processes) -> None:
    """Raise RecipeError when the processes cannot share the recipe's work."""
    t = recipe.train
    if t.sharding != "none":
        if processes.count == 1:
            raise RecipeError(f"train.sharding = {t.sharding} has no effect with one process; start several, as in "
                              "`torchrun --nproc_per_node 2 -m opdkit train ...`, or remove it")  # fmt: skip
        if recipe.student.quantize != "none" or t.precision == "fp16":
            raise RecipeError("train.sharding = fsdp2 works with neither a quantised student nor precision fp16; use "
                              "student.dtype / train.precision bf16 or fp32")  # fmt: skip
        if method.after_update:
            raise RecipeError(f"train.sharding = {t.sharding} divides the student, and {method.after_update[0]} moves its "
                              "weights whole; set train.sharding: none")  # fmt: skip
    for name, count in split_prompts(method, t.prompts_per_step).items():
        if 0 < count < processes.count:
            raise RecipeError(f"train.prompts_per_step = {t.prompts_per_step} gives source '{name}' {count} prompts a step "
                              f"for {processes.count} processes; raise it so that each process has at least one")  # fmt: skip
    if t.minibatches > t.prompts_per_step:
        raise RecipeError(f"train.minibatches = {t.minibatches} exceeds train.prompts_per_step = {t.prompts_per_step}; the "
                          "responses to one prompt stay together")  # fmt: skip


def check_recipe(recipe: Recipe, method: Method) -> None:
    """Raise RecipeError for settings that contradict the method or would have no effect."""
    window = recipe.sampling.max_new_tokens
    for controller in method.controllers:
        controller.check(window)
    for prepare in method.prepare:
        prepare.check(min([window, *(controller.shortest(window) for controller in method.controllers)]))
    for who, teacher in method.asks:
        if teacher not in recipe.teachers:
            hint = nearest(teacher, list(recipe.teachers)) if recipe.teachers else "; the recipe has no teachers"
            raise RecipeError(f"method {method.name}: {who} asks for teacher '{teacher}'{hint}; add "
                              f"teachers: {{{teacher}: {{path: ...}}}}")  # fmt: skip
    if unused := [name for name in recipe.teachers if name not in method.models]:
        raise RecipeError(
            f"teacher '{unused[0]}' is not used by method {method.name}; remove it or name it in the method"
        )
    if recipe.student.temperature != 1.0:
        raise RecipeError("student.temperature has no effect: the student is scored at sampling.temperature; set that")
    if recipe.student.template != "student" or recipe.student.template_args:
        raise RecipeError("student.template and student.template_args have no effect: the student reads the task's prompts; "
                          "set task.template_args")  # fmt: skip
    if recipe.eval.temperature == 0 and recipe.eval.top_p < 1:
        raise RecipeError(
            f"eval.top_p = {recipe.eval.top_p} has no effect on greedy evaluation (eval.temperature = 0); remove it"
        )
    for name, source in method.rollouts.items():
        early = source.stop_early if isinstance(source, OnPolicy) else None
        if early is not None and early.every >= recipe.sampling.max_new_tokens:
            raise RecipeError(f"rollout source '{name}' of method {method.name} looks for a reason to stop after every "
                              f"{early.every} tokens, and sampling.max_new_tokens is {recipe.sampling.max_new_tokens}, so it "
                              "would never look; lower the first, or leave out the early stop")  # fmt: skip
    for name, source in method.rollouts.items() if recipe.tools is not None else ():
        if isinstance(source, TeacherSamples) or (isinstance(source, OnPolicy) and source.stop_early is not None):
            what = "comes from a teacher" if isinstance(source, TeacherSamples) else "stops early"
            raise RecipeError(f"the recipe has tools, and rollout source '{name}' of method {method.name} {what}, which works "
                              "without tools only; remove the section `tools` or take another method")  # fmt: skip
    on_policy = any(isinstance(source, OnPolicy | Replay) for source in method.rollouts.values())
    if updates_per_step(recipe) > 1 and any(isinstance(term.loss, PolicyGradient) for term in method.terms):
        raise RecipeError(f"train.minibatches x train.epochs = {updates_per_step(recipe)} updates a rollout batch, but "
                          f"method {method.name} has a policy gradient without a ratio, which is wrong from the second "
                          "update on; give the method (of compose, its base) low and high, as in method.low=0.2 "
                          "method.high=0.2, or write ClippedPolicyGradient(0.2, 0.2) in its terms")  # fmt: skip
    if method.needs_group and recipe.sampling.group < 2:
        raise RecipeError(f"method {method.name} compares the responses of a prompt's group or shows one to another, and a "
                          f"group of {recipe.sampling.group} has none; set sampling.group to 2 or more")  # fmt: skip
    if not on_policy and recipe.sampling.group != 1:
        raise RecipeError(
            f"sampling.group = {recipe.sampling.group} has no effect: method {method.name} does not sample"
        )
    shares = split_prompts(method, recipe.train.prompts_per_step)
    if empty := [name for name, count in shares.items() if count == 0]:
        raise RecipeError(f"train.prompts_per_step = {recipe.train.prompts_per_step} leaves no prompt for rollout source "
                          f"'{empty[0]}' with share {method.rollouts[empty[0]].share}; raise one of them")  # fmt: skip


def check_moving_heads(recipe: Recipe, method: Method) -> None:
    """Raise RecipeError where a later update of a rollout batch would read the rows of a teacher that moved."""
    moving = [name for name, config in recipe.teachers.items() if config.path in (LIVE, EMA)]
    for name, view in method.views.items():
        reading = [reader for reader in view.models if reader in moving]
        if updates_per_step(recipe) > 1 and reading and isinstance(view.support, Full):
            raise RecipeError(f"view '{name}' has support Full(), whose rows are formed during the updates, and teacher "
                              f"'{reading[0]}' moves with the student; use one update a rollout batch (train.minibatches and "
                              "train.epochs 1), a top-k support, or the teacher student:base")  # fmt: skip


def check_supports(method: Method, student: LanguageModel) -> None:
    """Raise ModelError when a top-k support is larger than the vocabulary."""
    size = student.head().size
    if method.top_list > size:
        raise ModelError(f"method {method.name} compares the {method.top_list} most probable ids of student and teacher, but "
                         f"the vocabulary has {size}; lower k")  # fmt: skip
    for name, view in method.views.items():
        if isinstance(view.support, TopK) and view.support.k > size:
            raise ModelError(f"view '{name}' asks for the top {view.support.k} of a vocabulary of {size} ids; lower k, "
                             "or use full_opd for the whole vocabulary")  # fmt: skip


def split_prompts(method: Method, prompts: int) -> dict[str, int]:
    """How many of a step's prompts each rollout source gets: shares rounded so that they add up."""
    counts, done, share = {}, 0, 0.0
    for name, source in method.rollouts.items():
        share += source.share
        upto = round(share * prompts)
        counts[name], done = upto - done, upto
    return counts
