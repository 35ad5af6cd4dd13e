"""What a run writes beside metrics and checkpoints: facts about itself, rollouts for the viewer, and bad batches."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

import opdkit
from opdkit.catalogue import method_function, method_table
from opdkit.errors import RunError
from opdkit.models import LanguageModel
from opdkit.rollouts.rollout import Rollout
from opdkit.step import Scores, Step
from opdkit.train.run import write_json, writing
from opdkit.train.setup import Setup
from opdkit.train.update import Stream

SHOWN = 8  # most probable tokens of each side in the viewer


def run_information(setup: Setup) -> dict[str, Any]:
    """The fields of run.json that say what runs."""
    name = setup.method.name
    paper = {n: p for n, _, p in method_table()}.get(name) or None
    doc = inspect.getdoc(inspect.getmodule(method_function(name))) or ""
    return {
        "opdkit": opdkit.__version__,
        "method": str(setup.method),
        "method_value": setup.method.to_dict(),
        "method_doc": doc.splitlines()[0],
        "paper": paper,
        "student": model_information(setup.student),
        "teachers": {n: model_information(t) for n, t in setup.teachers.items()},
        "device": str(setup.student.device),
        "threads": torch.get_num_threads(),
        "task": setup.task.name,
    }


def check_method(setup: Setup, before: Mapping[str, Any]) -> None:
    """Raise RunError when a file that the recipe's method reads has changed since the run with this run.json began."""
    now = json.loads(json.dumps(setup.method.to_dict()))
    if before.get("method_value", now) != now:
        raise RunError(
            f"method {setup.method.name} is not the one that this run was started with, though its arguments are: "
            "a file that it reads has changed; put the old one back, or start a new run with another output=..."
        )


def model_information(lm: LanguageModel) -> dict[str, Any]:
    return {"path": lm.path, "parameters": lm.parameters, "vocab": lm.head().size}


def save_rollouts(
    setup: Setup, run: Path, step: int, rollouts: Mapping[str, Sequence[Rollout]], steps: Mapping[str, Step],
    found: Mapping[str, Sequence[Stream]],
) -> None:  # fmt: skip
    """Write a few rollouts of the step with everything that the token viewer shows."""
    name = "policy" if "policy" in steps else next(iter(steps))
    watched = {label: piece(steps[name]) for label, piece in setup.method.watch.items() if name == "policy"}
    shown = [describe_rollout(setup, r, s, steps[name], found[name]) | {"turns": describe_turns(steps[name], s, watched)}
             for s, r in enumerate(rollouts[name][: setup.recipe.log.rollouts])]  # fmt: skip
    (run / "rollouts").mkdir(exist_ok=True)
    write_json(run / "rollouts" / f"step-{step:06d}.json", {"step": step, "rollouts": shown})


def describe_rollout(setup: Setup, rollout: Rollout, s: int, step: Step, found: Sequence[Stream]) -> dict[str, Any]:
    """One rollout for the viewer. A token's signal is its first term's where that is [N], else log q - log p."""
    at = torch.nonzero(step.layout.seq == s).squeeze(1)
    decode = setup.student.tokenizer.decode
    student = step.views.get("student")
    teacher = next((v for n, v in step.views.items() if n not in ("student", "behaviour")), None)
    signal = next((f.signal for f in found if f.signal is not None and f.signal.ndim == 1), None)
    if signal is None and student is not None and teacher is not None:
        signal = teacher.sampled - student.sampled
    tokens, places = [], iter(at.tolist())
    for i, token in enumerate(rollout.response_ids):
        if rollout.trained is not None and not rollout.trained[i]:  # a tool's text
            tokens.append({"id": token, "text": decode([token])})
            continue
        n = next(places)
        tokens.append({
            "id": token, "text": decode([token]),
            "student": None if student is None else float(student.sampled[n]),
            "teacher": None if teacher is None else float(teacher.sampled[n]),
            "signal": None if signal is None else float(signal[n]),
            "entropy": None if student is None or student.entropy is None else float(student.entropy[n]),
            "student_top": top_tokens(student, n, decode), "teacher_top": top_tokens(teacher, n, decode),
        })  # fmt: skip
    return {
        "prompt": decode(rollout.prompt_ids), "text": rollout.text, "reward": rollout.reward, "correct": rollout.correct,
        "finish": rollout.finish, "source": rollout.source, "domain": rollout.problem.domain, "tokens": tokens,
    }  # fmt: skip


def describe_turns(step: Step, s: int, watched: Mapping[str, Float[Tensor, " N"]]) -> list[dict[str, Any]]:
    """Trained tokens of every turn of a sequence, and the means of watched pieces over them."""
    at = torch.nonzero(step.layout.seq == s).squeeze(1)
    turns = [at[step.layout.turn[at] == turn] for turn in step.layout.turn[at].unique()]
    return [
        {"tokens": len(own), **{name: float(value[own].mean()) for name, value in watched.items()}} for own in turns
    ]


def top_tokens(scores: Scores | None, n: int, decode: Any) -> list[list[Any]]:
    """[text, probability] of a view's most probable tokens at one position."""
    if scores is None or scores.top_ids is None or scores.top is None:
        return []
    ids, probs = scores.top_ids[n, :SHOWN].tolist(), scores.top[n, :SHOWN].exp().tolist()
    return [[decode([i]), p] for i, p in zip(ids, probs, strict=True)]


def save_batch(
    run: Path, step: int, rollouts: Mapping[str, Sequence[Rollout]], steps: Mapping[str, Step] | None
) -> Path:
    """Write rollouts (JSON) and, where they were scored, all their numbers (safetensors) of a step that failed."""
    folder = run / "nonfinite" / f"step-{step:06d}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, group in rollouts.items():
            rows = [{"problem": r.problem.id, "prompt_ids": r.prompt_ids, "response_ids": r.response_ids, "text": r.text,
                     "finish": r.finish, "reward": r.reward} for r in group]  # fmt: skip
            write_json(folder / f"{name}.json", rows)
        for name, flat in (steps or {}).items():
            tensors = {"tokens": flat.tokens, "seq": flat.layout.seq}
            for view, scores in flat.views.items():
                fields = {f: getattr(scores, f) for f in ("sampled", "entropy", "top_ids", "top")}
                tensors |= {f"{view}.{f}": t.contiguous() for f, t in fields.items() if t is not None}
            save_file(tensors, folder / f"{name}.safetensors")
    return folder
