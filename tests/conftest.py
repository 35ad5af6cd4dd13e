"""Tiny models and data that every end-to-end test shares."""

import json
import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # a wrong path must not be looked up on a network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its own functions are made for one or the other

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-=.?"


def make_tokenizer(letters: str = LETTERS, template: bool = True):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    if template:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def make_model(folder: Path, seed: int, *, tokenizer=None, rows: int = 48, layers: int = 2, scale: float = 6.0) -> str:
    """Save a random Qwen3 whose head has more rows than the tokenizer has ids. `scale` sharpens its distributions."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(scale)
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def student_path(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("student"), seed=1)


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("teacher"), seed=2, layers=3)


@pytest.fixture(scope="module")
def lm(student_path):
    """The tiny student, loaded anew for every file of tests."""
    from opdkit.config import ModelConfig
    from opdkit.models import load_model

    return load_model(ModelConfig(path=student_path), "student")


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"id": f"{a}+{b}", "prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(a, 8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def recipe_data(student_path, teacher_path, sums_file, tmp_path) -> dict:
    """A complete small recipe as a mapping; tests change what they need."""
    return {
        "method": {"name": "opd"},
        "student": {"path": student_path},
        "teachers": {"teacher": {"path": teacher_path}},
        "task": {"kind": "file", "path": sums_file, "eval_size": 8, "verifier": "exact"},
        "sampling": {"group": 2, "max_new_tokens": 8},
        "optim": {"lr": 1e-3},
        "train": {"steps": 4, "prompts_per_step": 4, "microbatch_tokens": 64},
        "eval": {"kl_prompts": 4},
        "log": {"top_k": 4, "trackers": []},
        "output": str(tmp_path / "run"),
    }
