"""How far the planned memory of a step is from what PyTorch's allocator hands out: `python benchmarks/plan.py`.

Small models on the CPU with every response at its length limit, so that the plan's upper bound is what should happen.
The plan is told the CPU's elementwise blocks (1 MiB) in place of a GPU's (64 MiB); all else is as for a GPU.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from opdkit.config import parse_recipe
from opdkit.lm_head import BLOCK_ENTRIES
from opdkit.plan import memory, plan
from opdkit.train.loop import make_step, update
from opdkit.train.optimise import Optimiser
from opdkit.train.rolling import Rolling
from opdkit.train.setup import set_up
from opdkit.train.update import streams

VOCAB, PROMPT, RESPONSE = 2048, 66, 190
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=192, intermediate_size=512, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
    max_position_embeddings=1024, eos_token_id=VOCAB - 1, pad_token_id=0, bos_token_id=None, tie_word_embeddings=True,
)  # fmt: skip
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen3", {"name": "full_opd"}, {}),
    ("qwen3", {"name": "full_opd"}, {"train.precision": "bf16"}),
    ("qwen3", {"name": "topk_opd"}, {"train.gradient_checkpointing": True}),
    ("qwen3", {"name": "opd"}, {"lora": {}, "train.precision": "bf16"}),
    ("llama", {"name": "vopd"}, {}),
    ("gemma2", {"name": "full_opd"}, {}),
]


def main() -> None:
    warnings.simplefilter("ignore")
    memory.DEVICE_BLOCK_ENTRIES = BLOCK_ENTRIES
    memory.SIGNAL_ENTRIES = 8 * BLOCK_ENTRIES
    print("| model | method | settings | sample | score | update |\n| --- | --- | --- | --- | --- | --- |")
    for kind, method, settings in CASES:
        cells = [
            f"{planned / real - 1:+.0%} of {real / 2**20:.0f} MiB" for planned, real in compare(kind, method, settings)
        ]
        shown = ", ".join(f"{k} {v}" for k, v in settings.items()) or "-"
        print(f"| {kind} | {method['name']} | {shown} | {' | '.join(cells)} |", flush=True)


def compare(kind: str, method: dict[str, Any], settings: dict[str, Any]) -> list[tuple[int, int]]:
    """(planned, measured) bytes of sampling, scoring and update of a run's second step, without what stood before."""
    recipe = parse_recipe(_recipe(Path(tempfile.mkdtemp()), kind, method, settings))
    phases = {phase.name: phase for phase in plan(recipe).phases}
    setup = set_up(recipe)
    optimiser, rolling = Optimiser(recipe, setup.student, setup.processes), Rolling(setup)
    measured: list[int] = []
    for step in (1, 2):
        sampled, rollouts = allocated(lambda step=step: rolling.step(step))

        def score(rollouts=rollouts, step=step):
            steps = {name: make_step(setup, name, rollouts[name], step, {}) for name in rollouts}
            return steps, streams(setup.method, steps)

        scored, (steps, found) = allocated(score)
        updated, _ = allocated(lambda r=rollouts, s=steps, f=found, step=step: update(setup, optimiser, r, s, f, step))
        measured = [sampled, scored, updated]
    planned = []
    for name in ("sample", "score", "update"):
        parts = {part.what: part.bytes for part in phases[name].parts}
        records, views = parts.pop("records and the student's view", 0), parts.pop("the teachers' views", 0)
        planned.append(sum(parts.values()) + (records // 2 + views if name == "score" else 0))
    return list(zip(planned, measured, strict=True))


def allocated(function: Any) -> tuple[int, Any]:
    """Peak bytes that PyTorch's allocator handed out inside a call, and the call's result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = function()
    live = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, result


def _recipe(folder: Path, kind: str, method: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    attn = "eager" if kind == "gemma2" else "sdpa"
    rows = [" ".join(f"w{(7 * i + j) % 1000}" for j in range(PROMPT - 1 - i % 20)) + f" w{i + 1000}" for i in range(64)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"prompt": r, "answer": "w1"}) for r in rows))
    data: dict[str, Any] = {
        "method": method,
        "student": {"path": _model(folder / "student", kind, 6), "attn": attn},
        "teachers": {"teacher": {"path": _model(folder / "teacher", kind, 8), "attn": attn}},
        "task": {"kind": "file", "path": str(folder / "data.jsonl"), "eval_size": 8, "template": "plain",
                 "verifier": "exact", "max_prompt_tokens": PROMPT},
        "sampling": {"group": 2, "max_new_tokens": RESPONSE, "max_rows": 16},
        "train": {"steps": 2, "prompts_per_step": 8, "microbatch_tokens": 1024, "score_tokens": 1024},
        "log": {"top_k": 8, "trackers": []},
        "output": str(folder / "run"),
    }  # fmt: skip
    for key, value in settings.items():
        section, dot, name = key.partition(".")
        data[section] = data[section] | {name: value} if dot else value
    return data


def _model(folder: Path, kind: str, layers: int) -> str:
    more = {"sliding_window": 64, "query_pre_attn_scalar": 32} if kind == "gemma2" else {}
    torch.manual_seed(layers)
    config = AutoConfig.for_model(kind, **SHAPE, num_hidden_layers=layers, **more)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB - 1)} | {"<eos>": VOCAB - 1}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
