"""The README.md of an exported model: what was trained, how and on what, its numbers, and how to load it.

Everything is read from the run folder; nothing is claimed that the run did not measure. Left out: a licence, which the
base model and the owner of the run decide, and free text.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from opdkit.config import Recipe, TaskConfig
from opdkit.report.read import Evaluation, RunData

PAPER = re.compile(r"\b\d{4}\.\d{4,5}\b")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(run: RunData, recipe: Recipe, step: int, folder: str, *, adapter: bool) -> str:
    """The card of the checkpoint after `step` steps, exported to `folder` as an adapter or as a whole model."""
    parts = [_front_matter(recipe, adapter), f"# {run.folder.resolve().name}", _summary(run, recipe, step)]
    parts += ["## How it was made", _facts(run, recipe, step, adapter)]
    parts += ["## Numbers", _numbers(run.evals, recipe, step), "## Use", _usage(recipe, folder, adapter)]
    return "\n\n".join(parts) + "\n"


def _front_matter(recipe: Recipe, adapter: bool) -> str:
    """The metadata that the Hugging Face Hub reads; only names of models and data sets that a Hub could know."""
    meta: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "on-policy-distillation",
            "opdkit",
            recipe.method.name,
            *(["lora"] if recipe.lora is not None else []),
        ],
    }
    if _on_hub(recipe.student.path):
        meta |= {"base_model": recipe.student.path, "base_model_relation": "adapter" if adapter else "finetune"}
    if recipe.task.kind == "dataset" and _on_hub(str(recipe.task.path)):
        meta["datasets"] = [recipe.task.path]
    return f"---\n{yaml.safe_dump(meta, sort_keys=False)}---"


def _on_hub(path: str) -> bool:
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def _summary(run: RunData, recipe: Recipe, step: int) -> str:
    made = "LoRA adapters on" if recipe.lora is not None else "A student made from"
    return (
        f"{made} `{recipe.student.path}`, trained with `{recipe.method.name}` for {_steps(step)} by opdkit "
        f"{run.info.opdkit}, the engine for on-policy distillation."
    )


def _facts(run: RunData, recipe: Recipe, step: int, adapter: bool) -> str:
    s, o, t = recipe.sampling, recipe.optim, recipe.train
    idea, _, _ = (run.info.method_doc or "").rstrip(".").rpartition(" (arXiv:")
    papers = [f"[arXiv:{p}](https://arxiv.org/abs/{p})" for p in PAPER.findall(run.info.paper or "")]
    given = ", ".join(f"{k} = {v}" for k, v in recipe.method.arguments.items())
    method = f"`{recipe.method.name}`" + (f" ({given})" if given else "") + (f": {idea}" if idea else "")
    teachers = ", ".join(f"`{name}`: `{config.path}`" for name, config in recipe.teachers.items())
    cuts = [f"top-p {s.top_p:g}"] * (s.top_p < 1) + [f"top-k {s.top_k}"] * (s.top_k > 0)
    facts = {
        "method": "; ".join([method, *papers]),
        "base model": f"`{recipe.student.path}` in {recipe.student.dtype}"
        + (f", {recipe.student.quantize} weights" if recipe.student.quantize != "none" else ""),
        "teachers": teachers or "none",
        "trained": _trained(recipe, adapter),
        "data": _data(recipe.task),
        "rollouts": f"{_steps(step)} of {t.prompts_per_step} prompts, {s.group} response{'s' * (s.group > 1)} each",
        "sampling": ", ".join([f"temperature {s.temperature:g}", *cuts, f"up to {s.max_new_tokens} new tokens"]),
        "optimiser": f"AdamW, learning rate {o.lr:g} ({o.schedule}, {_steps(o.warmup_steps)} of warm-up), seed {recipe.seed}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in facts.items())])


def _trained(recipe: Recipe, adapter: bool) -> str:
    if recipe.lora is None:
        return "all weights"
    lora = recipe.lora
    targets = "all linear layers" if isinstance(lora.targets, str) else ", ".join(lora.targets)
    merged = "" if adapter else "; merged into the weights of this folder"
    return f"LoRA adapters of rank {lora.rank}, alpha {lora.alpha:g}, on {targets}{merged}"


def _data(task: TaskConfig) -> str:
    if task.kind in ("testbed", "reasoning_gym"):
        return f"generated problems of the {task.kind} task `{task.name}`"
    if task.kind == "file":
        return f"prompts of the file `{Path(str(task.path)).name}`"
    return f"`{task.path}`" + (f", configuration `{task.name}`" if task.name else "") + f", split `{task.split}`"


def _numbers(evals: Sequence[Evaluation], recipe: Recipe, step: int) -> str:
    """A table of the evaluations before training, at this step and of the teachers, with their standard errors."""
    student = {e.step: e for e in evals if e.who == "student" and e.step <= step}
    columns = {"before": student.get(0), f"after {_steps(step)}": student.get(step) if step else None}
    columns |= {e.who: e for e in evals if e.who != "student"}
    shown = {title: e for title, e in columns.items() if e is not None}
    if not shown:
        return "The run was not evaluated."
    rows = []
    for key, title, form in _measures(list(shown.values())):
        cells = [_value(e, key, form) for e in shown.values()]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    first = next(iter(shown.values()))
    about = f"On {first.problems} held-out problems" + (
        f", {first.samples} samples each" if (first.samples or 1) > 1 else ""
    )
    if step and step not in student:
        about += f"; there was no evaluation after step {step}"
    greedy = "greedily" if recipe.eval.temperature == 0 else f"at temperature {recipe.eval.temperature:g}"
    note = (
        f"{about}. Answers are sampled {greedy}; the reverse KL is exact over the vocabulary, per token of the student's "
        "own samples. Numbers after ± are standard errors."
    )
    return "\n".join([note, "", f"| | {' | '.join(shown)} |", "|---|" + "---|" * len(shown), *rows])


def _measures(evals: Sequence[Evaluation]) -> list[tuple[str, str, str]]:
    """(key, title, number format) of what some evaluation holds; one reverse KL for each teacher."""
    keys = dict.fromkeys(k for e in evals for k, v in _all(e).items() if v is not None)
    found = [("accuracy", "accuracy", "{:.1%}")] * ("accuracy" in keys)
    for key in keys:
        name, _, teacher = key.partition("/")
        if name == "reverse_kl":
            found.append((key, f"reverse KL{f' to {teacher}' if teacher else ''}, nats per token", "{:.4f}"))
    return found + [("response_length", "response length, tokens", "{:.1f}")] * ("response_length" in keys)


def _value(e: Evaluation, key: str, form: str) -> str:
    name, slash, teacher = key.partition("/")
    value, error = _all(e).get(key), _all(e).get(f"{name}_se{slash}{teacher}")
    return "" if value is None else form.format(value) + ("" if error is None else f" ± {form.format(error)}")


def _all(e: Evaluation) -> dict[str, Any]:
    return e.model_dump()


def _usage(recipe: Recipe, folder: str, adapter: bool) -> str:
    package, auto = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    lines = [
        f"from {package} import {auto}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{folder}", dtype="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
    ]
    if recipe.task.template == "chat":
        ask = 'tokenizer.apply_chat_template([{"role": "user", "content": "..."}], add_generation_prompt=True, '
        lines.append(f'inputs = {ask}return_dict=True, return_tensors="pt")')
    else:
        lines.append('inputs = tokenizer("...", return_tensors="pt")')
    lines += [
        f"output = model.generate(**inputs, max_new_tokens={recipe.sampling.max_new_tokens})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    code = "\n".join(["```python", *lines, "```"])
    text = f"{code}\n\nThe generation config holds the sampling settings of the training run."
    if recipe.sampling.stop:
        text += f" Training ended responses at {', '.join(map(repr, recipe.sampling.stop))} as well."
    return text


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
