"""The testbed's model sizes: Qwen3 decoders with one tokenizer, small enough to train in a minute on two CPU cores.

Left out: training them (`build`).
"""

from typing import TYPE_CHECKING, Any

from opdkit.config import nearest
from opdkit.errors import ModelError
from opdkit.testbed.tokenizer import EOS_ID, PAD_ID, VOCABULARY

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

HEAD_DIM = 32  # the smallest that every serving engine's attention takes
CONTEXT = 512  # tokens
_INIT = 0.06  # transformers' 0.02 is meant for wide models: with 128 channels it learns several times more slowly
_ROPE = 100.0  # the sequences are tens of tokens long, so the slow rotations of the usual 10,000 would carry nothing


def _shape(hidden: int, layers: int, intermediate: int) -> dict[str, Any]:
    """Arguments of Qwen3Config for `hidden` channels (heads of HEAD_DIM), `layers` and `intermediate` channels."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "initializer_range": _INIT,
        "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE},
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": None,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "xs": _shape(96, 2, 256),  # 0.23M parameters
    "s": _shape(96, 3, 256),  # 0.34M
    "m": _shape(128, 3, 320),  # 0.58M
    "l": _shape(160, 4, 384),  # 1.17M
}


def new_model(shape: str, seed: int) -> "Qwen3ForCausalLM":
    """An untrained model of a shape in float32; a seed always gives the same weights.

    The global random state stays as it was. Raises ModelError for an unknown shape.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if shape not in SHAPES:
        raise ModelError(f"the testbed has no shape '{shape}'{nearest(shape, list(SHAPES))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(Qwen3Config(**SHAPES[shape], dtype="float32"))
