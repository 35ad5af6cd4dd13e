"""Sampling: tokens per second of `opdkit.rollouts.sampler.sample` against transformers' `generate`.

    python benchmarks/sample.py [--quick] [--threads 1]

Random Qwen3 models (4 layers, d = 128, head_dim 32, float32) in one process; the three contenders alternate and the
median ratio of neighbouring runs is printed, in CPU time, which other processes on the machine disturb less than the
clock. Contenders: `sample`, which also records log-prob, entropy and top-16 of every token; `generate` alone, which
records nothing; and `generate` followed by the forward pass that gets these numbers afterwards. A token counts up to
and including the EOS. Left out: GPUs, other processes' samplers.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opdkit.head import score_rows
from opdkit.models import LanguageModel
from opdkit.rollouts.sampler import Keep, Sampling, sample

EOS = 1


@dataclass(frozen=True)
class Work:
    """One workload: prompts of `shortest` to `longest` tokens; EOS comes after `mean` tokens on average, or never."""

    name: str
    prompts: int
    shortest: int
    longest: int
    group: int
    new: int
    mean: int | None = None
    vocab: int = 100
    repeats: int = 9


WORKS = (
    Work("64 rows x 24 tokens, prompts of 12", 64, 12, 12, 1, 24),
    Work("64 rows x 24 tokens, prompts of 6 to 18", 64, 6, 18, 1, 24),
    Work("8 prompts of 100 x group 8, long tail up to 256", 8, 100, 100, 8, 256, mean=64, repeats=5),
    Work("8 prompts of 60 to 100 x group 8, long tail up to 256", 8, 60, 100, 8, 256, mean=64, repeats=5),
    Work("8 prompts of 100 x group 8, all 256 tokens", 8, 100, 100, 8, 256, repeats=3),
    Work("16 rows x 16 tokens, vocabulary 151,936", 16, 12, 12, 1, 16, vocab=151_936, repeats=5),
)


def build(work: Work) -> LanguageModel:
    """A random model whose head has a bias that gives EOS the probability 1 / mean, or none."""
    config = Qwen3Config(
        vocab_size=work.vocab, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=False,
        eos_token_id=EOS, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval()
    bias = torch.zeros(work.vocab)
    bias[EOS] = -30.0 if work.mean is None else math.log((work.vocab - 1) / (work.mean - 1))
    model.lm_head.bias = torch.nn.Parameter(bias)
    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(work.vocab)}, unk_token="t0"))
    return LanguageModel("student", "random", model, PreTrainedTokenizerFast(tokenizer_object=core, eos_token="t1"))


def make_prompts(work: Work) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(work.shortest, work.longest + 1, (work.prompts,), generator=generator).tolist()
    return [torch.randint(2, work.vocab, (n,), generator=generator).tolist() for n in lengths]


def ours(lm: LanguageModel, work: Work, prompts: Sequence[Sequence[int]], seed: int) -> int:
    """Sample and record; returns the number of tokens."""
    groups = sample(lm, prompts, Sampling(work.group, work.new), seed, Keep(top_k=16))
    return sum(len(s.ids) for group in groups for s in group)


@torch.no_grad()
def theirs(lm: LanguageModel, work: Work, prompts: Sequence[Sequence[int]], seed: int, rescore: bool) -> int:
    """Generate, and on request score the tokens in one more forward pass; returns the number of tokens."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(seed)
    out = lm.model.generate(
        ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=work.new,
        num_return_sequences=work.group, pad_token_id=0,
    )  # fmt: skip
    ended = (out[:, width:] == EOS).long().cumsum(1) - (out[:, width:] == EOS).long()
    real = ended == 0
    if rescore:
        mask = torch.cat([mask.repeat_interleave(work.group, 0), real.long()], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        states = lm.model.base_model(out, attention_mask=mask, position_ids=positions, use_cache=False)
        hidden = states.last_hidden_state[:, width - 1 : -1][real]
        score_rows(lm.head(), hidden, out[:, width:][real], top_k=16)
    return int(real.sum())


def timed(run: Callable[[int], int], seed: int) -> float:
    """CPU seconds per token."""
    start = time.process_time()
    tokens = run(seed)
    return (time.process_time() - start) / tokens


def measure(work: Work, repeats: int) -> str:
    lm, prompts = build(work), make_prompts(work)
    contenders: list[Callable[[int], int]] = [
        lambda seed: ours(lm, work, prompts, seed),
        lambda seed: theirs(lm, work, prompts, seed, rescore=False),
        lambda seed: theirs(lm, work, prompts, seed, rescore=True),
    ]
    for run in contenders:
        run(0)
    rounds = [[timed(run, seed) for run in contenders] for seed in range(1, repeats + 1)]
    rates = [1 / statistics.median(column) for column in zip(*rounds, strict=True)]
    plain, scored = (statistics.median([r[i] / r[0] for r in rounds]) for i in (1, 2))
    return f"| {work.name} | {rates[0]:,.0f} | {rates[1]:,.0f} | {plain:.2f} | {rates[2]:,.0f} | {scored:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and only the first and third workload")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| workload | sample tok/s | generate tok/s | ratio | generate + scoring tok/s | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for work in (WORKS[0], WORKS[2]) if options.quick else WORKS:
        print(measure(work, min(work.repeats, 3) if options.quick else work.repeats), flush=True)


if __name__ == "__main__":
    main()
