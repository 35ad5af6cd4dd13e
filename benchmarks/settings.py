"""The four settings in which whole training steps are compared: models, prompts and sizes.

(a) the testbed's sums: a 0.58M teacher and a 0.23M student, 64 prompts of one response, 16 tokens; once with lengths
    fixed by an id that never occurs as EOS, once with natural ones.
(b) groups of 8 with prompts of 256 tokens and long-tailed natural lengths of up to 512: a 1.2M teacher and a 0.6M
    student, trained here on a random Markov chain whose texts end with probability 1/96 after every token.
(c) a vocabulary of 151,936 ids over bodies of 3.6M and 1.8M parameters with random weights; the student is the lower
    half of the teacher. Memory is what counts, so both contenders recompute activations (TRL's own default).
(d) SmolLM2-135M-Instruct and a student cut from it to 24 of its 30 layers.

Models are made once, with a fixed seed, in the engine's cache folder. Left out: settings that need a GPU.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opdkit.config import Recipe, load_recipe, parse_recipe
from opdkit.models import cache_folder, resolve_path

EOS, PAD = 1, 0
CHAIN, SUCCESSORS, HAZARD = 96, (0.5, 0.25, 0.15, 0.1), 1 / 96


@dataclass(frozen=True)
class Setting:
    """A comparison: our recipe, and what the peer must be told besides (ids that end a response, batch, lengths)."""

    name: str
    about: str
    recipe: Callable[[], Recipe]
    steps: int  # of a full run
    skip: int = 2  # first steps that do not count: caches are cold
    ends: bool = True  # whether EOS ends a response
    extra: dict[str, Any] = field(default_factory=dict)


def words(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words t2, t3, ... and one for padding and one for the end."""
    named = {"<pad>": PAD, "<end>": EOS} | {f"t{i}": i for i in range(2, vocab)}
    core = Tokenizer(models.WordLevel(named, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>", padding_side="left")


def decoder(vocab: int, hidden: int, layers: int, std: float, context: int = 1024) -> Qwen3ForCausalLM:
    """A random Qwen3 with heads of 32 channels and a tied head."""
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=5 * hidden // 2, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, head_dim=32, max_position_embeddings=context,
        tie_word_embeddings=True, initializer_range=std, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=None,
        dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)


def made(name: str, make: Callable[[], tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]]) -> Path:
    """The folder of a model in the cache; made when it is not there."""
    folder = cache_folder() / "benchmarks" / name
    if not (folder / "done").exists():
        model, tokenizer = make()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "done").touch()
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# (b): a Markov chain


def chain(rows: int, length: int, seed: int, ends: bool) -> Tensor:
    """Texts [rows, length] of the chain; with `ends`, EOS stands where a text would have ended."""
    draw = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(1)
    successors = torch.stack([torch.randperm(CHAIN, generator=fixed)[: len(SUCCESSORS)] for _ in range(CHAIN)])
    state = torch.randint(CHAIN, (rows,), generator=draw)
    texts = []
    for _ in range(length):
        choice = torch.multinomial(torch.tensor(SUCCESSORS), rows, replacement=True, generator=draw)
        state = successors[state, choice]
        over = torch.rand(rows, generator=draw) < HAZARD
        texts.append(torch.where(over & ends, EOS, state + 2))
    return torch.stack(texts, 1)


def trained(hidden: int, layers: int, steps: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A decoder after `steps` steps of next-token prediction on the chain."""
    model = decoder(CHAIN + 2, hidden, layers, 0.06)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(steps):
        ids = chain(8, 768, 100 + step, ends=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval(), words(CHAIN + 2)


def cut(vocab: int, hidden: int, layers: int, keep: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A random decoder with the embeddings and the first `keep` of `layers` layers of one that has them all."""
    whole, part = decoder(vocab, hidden, layers, 0.1), decoder(vocab, hidden, keep, 0.1)
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if k in part.state_dict()})
    return part.eval(), words(vocab)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: what both contenders are given


def recipe(
    student: str, teacher: str, task: dict[str, Any], sampling: dict[str, Any], batch: int, lr: float, **train: Any
) -> Recipe:
    """Exact reverse KL over the full vocabulary, constant learning rate, plain AdamW."""
    return parse_recipe({
        "method": {"name": "full_opd"},
        "student": {"path": student},
        "teachers": {"teacher": {"path": teacher}},
        "task": task,
        "sampling": sampling,
        "optim": {"lr": lr, "schedule": "constant"},
        "train": {"prompts_per_step": batch} | train,
        "eval": {"kl_prompts": 64, "teacher": False},
        "log": {"trackers": [], "rollouts_every": 10_000, "top_k": 4},
    })  # fmt: skip


def prompts(name: str, texts: Tensor) -> dict[str, Any]:
    """A task of prompts without answers, from token ids."""
    path = cache_folder() / "benchmarks" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": " ".join(f"t{i}" for i in row)}) + "\n" for row in texts.tolist()))
    return {"kind": "file", "path": str(path), "template": "plain", "verifier": "none", "eval_size": 32}


def sums(ends: bool) -> Recipe:
    task = {"kind": "testbed", "name": "sums", "settings": {"format": "a"}, "eval_size": 400}
    sampling: dict[str, Any] = {"max_new_tokens": 16} | ({} if ends else {"eos_ids": [PAD]})
    return recipe("testbed:student", "testbed:sft", task, sampling, 64, 1e-3)


def groups() -> Recipe:
    student, teacher = (
        made("chain-student", lambda: trained(128, 3, 80)),
        made("chain-teacher", lambda: trained(160, 4, 240)),
    )
    task = prompts("chain", chain(544, 256, 7, ends=False))
    return recipe(str(student), str(teacher), task, {"group": 8, "max_new_tokens": 512}, 8, 5e-4)


def vocabulary() -> Recipe:
    size, hidden = 151_936, 192
    student, teacher = (
        made("wide-student", lambda: cut(size, hidden, 8, 4)),
        made("wide-teacher", lambda: cut(size, hidden, 8, 8)),
    )
    task = prompts("wide", torch.randint(2, size, (1056, 32), generator=torch.Generator().manual_seed(5)))
    return recipe(str(student), str(teacher), task, {"max_new_tokens": 32}, 32, 1e-4, gradient_checkpointing=True)


def smollm2() -> Recipe:
    base = load_recipe("cpu/smollm2")
    sampling = {"max_new_tokens": 64}
    task = base.task.model_dump(exclude_unset=True) | {"path": base.task.path, "eval_size": 16}
    return recipe("smollm2:cut-24", "smollm2:instruct", task, sampling, 8, 1e-4)


SETTINGS = {
    s.name: s
    for s in (
        Setting(
            "a", "64 prompts of about 12 tokens, 16 new tokens, lengths fixed", lambda: sums(False), 150, 20, ends=False
        ),
        Setting("a-natural", "the same with natural lengths", lambda: sums(True), 150, 20),
        Setting("b", "8 prompts of 256 tokens x group 8, natural lengths with a long tail up to 512", groups, 5, 1),
        Setting("c", "32 prompts of 32 tokens, 32 new tokens, vocabulary 151,936, checkpointing", vocabulary, 3, 1),
        Setting("d", "SmolLM2-135M: 8 chat prompts, up to 64 new tokens", smollm2, 3, 1),
    )
}


def paths(r: Recipe) -> tuple[str, str]:
    """(student, teacher) folders of a recipe."""
    return resolve_path(r.student.path), resolve_path(r.teachers["teacher"].path)
