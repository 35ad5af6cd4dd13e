"""One run of one contender of the step benchmark, in a process of its own: ours, and TRL's DistillationTrainer.

Each gives seconds per phase and step, tokens per step and peak bytes, and leaves its student in OUT/student.
"""

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import measure
import torch
from settings import Setting, paths

from opdkit.config import Recipe
from opdkit.train.data import PromptOrder

Json = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Ours, in a child


def run_ours(setting: Setting, recipe: Recipe, out: Path) -> Json:
    """Train and return seconds per phase and step, tokens per step, and peak bytes."""
    from opdkit.train import loop, rolling

    watch, start, measured = _Watch(), rolling.Rolling.step, loop.measure
    if measure.DEVICE == "cpu":
        watch.wrap()
    base: list[int] = []
    peak: list[int] = []
    marks: list[tuple[float, float]] = []  # at the start of every step and the end of the last: CPU, inside

    def first(self: Any, *arguments: Any) -> Any:
        if not base:
            _touch(self.setup.student.model, *(t.model for t in self.setup.teachers.values()))
            base.append(measure.reset_peak())
        marks.append((time.process_time(), watch.seconds))
        return start(self, *arguments)

    def last(*arguments: Any) -> Any:
        peak.append(measure.peak() - base[0])
        if len(peak) == recipe.train.steps:  # saving and evaluation do not count; TRL's are off
            marks.append((time.process_time(), watch.seconds))
        return measured(*arguments)

    rolling.Rolling.step = first  # type: ignore[method-assign]
    loop.measure = last  # type: ignore[assignment]
    folder = loop.train(recipe)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.copytree(next(folder.glob("checkpoints/*/")), out / "student", dirs_exist_ok=True)
    phases = {name: [b[i] - a[i] for a, b in pairwise(marks)] for i, name in enumerate(("cpu", "inside"))}
    if measure.DEVICE != "cpu":
        del phases["inside"]
    phases |= {k: [line[f"seconds/{k}"] for line in lines] for k in ("sample", "score", "update", "other", "step")}
    return {"seconds": phases, "tokens": [line["tokens"] for line in lines], "peak": peak[-1]}


class _Watch:
    """Seconds inside the forwards and backwards of scoring and update."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self) -> None:
        from opdkit.train import update
        from opdkit.views import local
        from opdkit.views.batches import Batch

        inside = ((Batch, "states"), (local, "score_batch"), (update, "objective"), (torch.Tensor, "backward"))
        for owner, name in inside:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def _touch(*models: Any) -> None:
    """Read every weight, so that files mapped into memory count as loaded."""
    for model in models:
        for parameter in model.parameters():
            parameter.sum()


# ---------------------------------------------------------------------------------------------------------------------
# TRL, in a child


def run_trl(setting: Setting, recipe: Recipe, out: Path) -> Json:
    """The same run by trl.DistillationTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    student, teacher = paths(recipe)
    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    rows = prompt_texts(recipe, tokenizer)
    tokenizer.chat_template = None
    if not setting.ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(recipe.sampling.eos_ids[0])  # type: ignore[index]
    seconds: dict[str, list[float]] = defaultdict(list)
    state: Json = {"tokens": []}

    class Timed(DistillationTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start = measure.clock()
            found = super()._generate_and_score_completions(inputs)
            seconds["sample"].append(measure.clock() - start)
            state["tokens"].append(int(found["completion_mask"].sum()))
            return found

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            _touch(model, trainer.teacher_model)
            state["base"] = measure.reset_peak()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            state["cpu"] = time.process_time()
            state["start"] = measure.clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds["cpu"].append(time.process_time() - state["cpu"])
            seconds["step"].append(measure.clock() - state["start"])

    batch = recipe.train.prompts_per_step * recipe.sampling.group
    args = DistillationConfig(
        output_dir=str(out / "trl"), per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        max_steps=recipe.train.steps, max_completion_length=recipe.sampling.max_new_tokens, temperature=1.0, beta=1.0,
        learning_rate=recipe.optim.lr, lr_scheduler_type="constant", report_to="none", logging_steps=10_000,
        use_cpu=measure.DEVICE == "cpu", bf16=False, gradient_checkpointing=recipe.train.gradient_checkpointing,
        save_strategy="no", disable_tqdm=True,
        shuffle_dataset=False, seed=recipe.seed, max_grad_norm=recipe.optim.grad_clip, top_k=0,
        weight_decay=recipe.optim.weight_decay, adam_beta1=recipe.optim.betas[0], adam_beta2=recipe.optim.betas[1],
    )  # fmt: skip
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (student, teacher)]
    if not setting.ends:
        models[0].generation_config.eos_token_id = recipe.sampling.eos_ids[0]  # type: ignore[index]
    trainer = Timed(
        model=models[0], teacher_model=models[1], args=args, train_dataset=Dataset.from_dict({"prompt": rows}),
        processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    peak = measure.peak() - state["base"]
    trainer.model.save_pretrained(out / "student")
    AutoTokenizer.from_pretrained(student).save_pretrained(out / "student")
    seconds["score and update"] = [
        whole - drawn for whole, drawn in zip(seconds["step"], seconds["sample"], strict=True)
    ]
    return {"seconds": dict(seconds), "tokens": state["tokens"], "peak": peak}


def prompt_texts(recipe: Recipe, tokenizer: Any) -> list[str]:
    """The prompts of every step as text, in our order, one row for each response. SystemExit where text changes ids."""
    from opdkit.tasks.load import load_task
    from opdkit.tasks.prompts import encode_problems

    problems = encode_problems(
        load_task(recipe.task).train, tokenizer, recipe.task, 10**9, recipe.sampling.max_new_tokens
    )
    order = PromptOrder(len(problems), recipe.seed)
    rows = []
    for index in order.take(recipe.train.steps * recipe.train.prompts_per_step):
        ids = list(problems[index][1])
        text = tokenizer.decode(ids)
        if tokenizer(text)["input_ids"] != ids:
            raise SystemExit(f"prompt {index} does not survive decoding and encoding: {text!r}")
        rows += [text] * recipe.sampling.group
    return rows
