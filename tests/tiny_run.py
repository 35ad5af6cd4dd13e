"""Shared by the tests of checkpoints: a tiny model, its tokenizer, a recipe, and exact comparisons."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opdkit.config import parse_recipe
from opdkit.train.checkpoint import load_tensors, pack, save_checkpoint, unpack
from opdkit.train.run import Run

SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=64
)
RECIPE = parse_recipe(
    {"method": {"name": "opd"}, "student": {"path": "x"}, "task": {"kind": "testbed", "name": "sums"}, "seed": 1}
)


def tiny(seed: int, tied: bool = False) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_hidden_layers=2, tie_word_embeddings=tied))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(63)} | {"<eos>": 63}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def save(run: Run, step: int, model: Qwen3ForCausalLM, *, keep: int = 2) -> Path:
    return save_checkpoint(run, step, model, tiny_tokenizer(), {"step": step, "noise": torch.arange(9000.0)}, keep=keep)


def identical(a: object, b: object) -> bool:
    """Equality of type, value, order of keys, dtype and shape; nan equals nan, and -0.0 is not 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return identical(list(a), list(b)) and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, float):
        return repr(a) == repr(b)
    return a == b


def through_disk(state: object, tmp_path: Path) -> object:
    obj, tensors = pack(state)
    save_file(tensors, tmp_path / "t.safetensors")
    text = json.dumps(obj, allow_nan=False)
    return unpack(json.loads(text), load_tensors(tmp_path / "t.safetensors"))
