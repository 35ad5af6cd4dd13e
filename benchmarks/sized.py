"""One training step of a chosen size, phase by phase, with random Qwen3 models: seconds, peak memory, and the bound.

The phases are the training loop's own pieces (`Rolling.step`, `make_step`, `streams`, `update`, `measure`), so whatever
the engine does is inside. Lengths are fixed: the id that ends a response has an embedding of 0, which makes it the choice of
about one token in a million. Left out: evaluation, checkpoints and trackers, which are not part of a step.
"""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import measure
import torch
from bound import Model, Part, Rates, Texts, sampling, scoring, updating
from settings import PAD, decoder, words
from transformers.utils.logging import disable_progress_bar

from opdkit.config import Recipe, parse_recipe
from opdkit.rollouts.rollout import Rollout

T = TypeVar("T")
PHASES = ("sample", "score", "update", "step")
STUDENT, TEACHER = (192, 4), (256, 6)  # (hidden, layers)
UPDATE_TOKENS, SCORE_TOKENS = 1024, 2048  # of one forward pass: small, so that several are needed at most sizes


@dataclass(frozen=True)
class Size:
    """Prompts of `prompt` tokens, `group` responses of `new` tokens to each; top-k support, or the whole vocabulary."""

    prompts: int = 8
    prompt: int = 64
    group: int = 4
    new: int = 64
    vocab: int = 8192
    k: int | None = None

    @property
    def tokens(self) -> int:
        """N."""
        return self.prompts * self.group * self.new

    @property
    def read(self) -> int:
        """Tokens that an update reads, every prompt once."""
        return self.prompts * (self.prompt + self.group * self.new)

    def about(self, grows: str = "") -> str:
        """In words, without the variable that grows."""
        support = "" if grows == "k" else ", the whole vocabulary compared" if self.k is None else f", top {self.k}"
        many = "" if grows == "prompts" else f"{self.prompts} "
        parts = {
            "prompt": f"{many}prompts of {self.prompt} tokens",
            "group": f"groups of {self.group}",
            "new": f"responses of {self.new} tokens",
            "vocab": f"V = {self.vocab:,}",
        }
        return ", ".join(text for name, text in parts.items() if name != grows) + support

    def recipe(self, folder: Path, sharding: str = "none") -> Recipe:
        """Make models and prompts in a folder, and the recipe that uses them."""
        disable_progress_bar()
        for name, (hidden, layers) in (("student", STUDENT), ("teacher", TEACHER)):
            decoder(self.vocab, hidden, layers, 0.2, context=2048).save_pretrained(folder / name)
            words(self.vocab).save_pretrained(folder / name)
        ids = torch.randint(2, 10, (self.prompts + 1, self.prompt), generator=torch.Generator().manual_seed(1))
        rows = [json.dumps({"prompt": " ".join(f"t{i}" for i in row)}) for row in ids.tolist()]
        (folder / "prompts.jsonl").write_text("\n".join(rows))
        method = {"name": "full_opd"} if self.k is None else {"name": "topk_opd", "k": self.k}
        return parse_recipe({
            "method": method,
            "student": {"path": str(folder / "student")},
            "teachers": {"teacher": {"path": str(folder / "teacher")}},
            "task": {"kind": "file", "path": str(folder / "prompts.jsonl"), "template": "plain", "verifier": "none",
                     "eval_size": 1, "max_prompt_tokens": self.prompt},
            "sampling": {"group": self.group, "max_new_tokens": self.new, "eos_ids": [PAD]},
            "train": {"prompts_per_step": self.prompts, "microbatch_tokens": UPDATE_TOKENS,
                      "score_tokens": SCORE_TOKENS, "sharding": sharding},
            "log": {"trackers": [], "top_k": 4},
        })  # fmt: skip


class Steps:
    """A set-up run, of which single steps are taken and every phase is watched."""

    def __init__(self, recipe: Recipe) -> None:
        from opdkit.train.optimise import Optimiser
        from opdkit.train.rolling import Rolling
        from opdkit.train.setup import set_up
        from opdkit.train.sharding import shard

        self.setup = set_up(recipe)
        if recipe.train.sharding == "fsdp2":
            shard(self.setup.student, self.setup.processes)
        self.optimiser = Optimiser(recipe, self.setup.student, self.setup.processes)
        self.rolling, self.taken = Rolling(self.setup), 0

    def take(self, watch: Callable[[str, Callable[[], Any]], Any]) -> list[Rollout]:
        """The loop's step, its phases called through `watch(name, call)`."""
        from opdkit.train import loop
        from opdkit.train.sharding import whole
        from opdkit.train.update import streams

        self.taken += 1
        setup, number = self.setup, self.taken
        with ExitStack() as gathered:
            watch("other", lambda: gathered.enter_context(whole(setup.student)))
            rollouts = watch("sample", lambda: self.rolling.step(number))

            def score() -> tuple[Any, Any]:
                steps = {name: loop.make_step(setup, name, rollouts[name], number, {}) for name in rollouts}
                return steps, streams(setup.method, steps)

            steps, found = watch("score", score)
        watch("update", lambda: loop.update(setup, self.optimiser, rollouts, steps, found, number))
        watch("other", lambda: loop.measure(setup, rollouts, steps, {}))
        drawn: list[Rollout] = rollouts["policy"]
        return drawn

    def seconds(self) -> dict[str, float]:
        """Of every phase of the next step, and of the step."""
        found: dict[str, float] = {}

        def watch(name: str, call: Callable[[], T]) -> T:
            start = measure.clock()
            result = call()
            found[name] = found.get(name, 0.0) + measure.clock() - start
            return result

        self.take(watch)
        return found | {"step": sum(found.values())}

    def peaks(self) -> tuple[dict[str, int], Texts]:
        """Most resident bytes in every phase of the next step beyond those at its start, and the step's lengths."""
        found: dict[str, int] = {}
        first: list[int] = []
        top: list[int] = []

        def watch(name: str, call: Callable[[], T]) -> T:
            before = measure.reset_peak()
            first.append(before)
            result = call()
            top.append(measure.peak())
            found[name] = max(found.get(name, 0), top[-1] - before)
            return result

        rollouts = self.take(watch)
        return found | {"step": max(top) - first[0]}, Texts.of(rollouts)


def measured(size: Size, rounds: int) -> dict[str, Any]:
    """In a child: tokens, and for each phase seconds (fastest round), peak bytes, FLOPs, and the bound's seconds."""
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(size.recipe(Path(folder)))
    steps.take(lambda _, call: call())  # code, buffers and the optimiser's moments
    peaks, texts = steps.peaks()
    times = [steps.seconds() for _ in range(rounds)]
    parts = needed(steps, texts, size.k is None)
    rates = Rates()
    return {
        "tokens": texts.trained,
        "seconds": {phase: min(t[phase] for t in times) for phase in PHASES},
        "bytes": {phase: peaks[phase] for phase in PHASES},
        "flops": {phase: sum(part.flops for part in parts[phase]) for phase in PHASES},
        "bound": {phase: rates.seconds(parts[phase]) for phase in PHASES},
    }


def needed(steps: Steps, texts: Texts, full: bool) -> dict[str, list[Part]]:
    """The products that each phase needs. The step counts the teacher's logits once, though two phases form them."""
    lms = (steps.setup.student, steps.setup.teachers["teacher"])
    student, teacher = (Model.of(lm.model, lm.head().size) for lm in lms)
    chunk = lms[0].head().chunk()
    drawn = sampling(student, texts)
    scored = scoring(teacher, texts, SCORE_TOKENS, chunk)
    learned = updating(student, texts, UPDATE_TOKENS, chunk)
    again = scored[1:] if full else []
    return {"sample": drawn, "score": scored, "update": learned + again, "step": drawn + scored + learned}


def worker(folder: Path, rounds: int) -> None:
    """One of a run's processes: writes the step's tokens, its seconds, and memory at rest and at the peak."""
    import torch.distributed.fsdp  # its memory is a library's, as everything's imported above

    recipe = parse_recipe(json.loads((folder / "recipe.json").read_text()))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    empty = measure.reset_peak()
    steps = Steps(recipe)
    everyone = steps.setup.processes
    steps.take(lambda _, call: call())
    rest = measure.reset_peak()
    drawn = steps.take(lambda _, call: call())
    highest = measure.peak()
    seconds = []
    for _ in range(rounds):
        everyone.wait()
        start = measure.clock()
        steps.take(lambda _, call: call())
        everyone.wait()
        seconds.append(measure.clock() - start)
    (tokens,) = everyone.total([float(sum(len(r.response_ids) for r in drawn))])
    found = {"tokens": tokens, "seconds": seconds, "rest": rest - empty, "peak": highest - empty}
    (folder / f"result-{everyone.rank}.json").write_text(json.dumps(found))
