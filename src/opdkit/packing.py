"""Several responses in one forward pass without padding, each prompt once: attention over a packed row of tokens.

Axes: T packed tokens, H query heads, G key-value heads, d width of a head, n trained tokens.

All prompts and responses of a micro-batch stand in one row. A response attends to its own tokens before it and to the
tokens of its prompt, which stand there once for the whole group; nothing attends to anything else. So every matrix
product of the model runs on real tokens only, and a group of 8 reads its prompt once instead of 8 times, in the
backward pass too. Attention over several stretches of keys is put together from their log-sum-exps; its backward runs
each stretch with the joint output and log-sum-exp, which gives the exact gradient (the rule of ring attention,
arXiv:2310.01889). It is installed as transformers' attention function NAME for models on the CPU whose layers are all
plain causal attention (`enable` tries it out); other models read padded rows. Left out: other devices, dropout,
sliding windows, soft-capped attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "opdkit"  # of the attention function
CALL = 32  # tokens: what one more call of the attention kernel costs, as much as this many tokens of a small model

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@runtime_checkable
class Text(Protocol):
    """What `pack` reads of a rollout."""

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def response_ids(self) -> tuple[int, ...]: ...
    @property
    def trained_index(self) -> list[int]: ...


class _Trial(NamedTuple):
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def trained_index(self) -> list[int]:
        return list(range(len(self.response_ids)))


TRIAL = (
    _Trial((1, 2, 3), (4, 5, 6)), _Trial((1, 2, 3), (5, 2)), _Trial((6, 7), (1, 3)), _Trial((6, 7), (7, 7, 2, 4)),
)  # fmt: skip


class Stretch(NamedTuple):
    """Queries [start, stop) attend to keys [first, last): to all of them, or `causal` where these are the same tokens.

    `more`: the queries have attended to an earlier stretch already.
    """

    start: int
    stop: int
    first: int
    last: int
    causal: bool
    more: bool = False


@dataclass(frozen=True)
class Pack:
    """Rollouts in one row of tokens. `rows` is where the hidden state that predicts each trained token stands.

    In the last layer only the tokens `ends` have a state that is read: of each text the last token of its prompt and what
    comes after it. `end_stretches` are their queries, numbered among themselves, against the keys of all tokens.
    """

    ids: Int[Tensor, "1 T"]
    positions: Int[Tensor, "1 T"]
    rows: Int[Tensor, " n"]
    stretches: tuple[Stretch, ...]
    ends: Int[Tensor, " E"]
    end_stretches: tuple[Stretch, ...]


def pack(rollouts: Sequence[Text]) -> Pack:
    """Put rollouts into one row; neighbours with the same prompt share it. The last token of each predicts nothing."""
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    ends: list[int] = []
    everywhere: list[Stretch] = []
    at_ends: list[Stretch] = []
    for prompt, group in groupby(rollouts, key=lambda r: r.prompt_ids):
        members, begin, length = list(group), len(ids), len(prompt)
        behind = begin + length - 1 - len(ends)  # a token's place less its number among the ends
        ids += prompt
        positions += range(length)
        replies: list[Stretch] = []
        for r in members:
            start = len(ids)
            ids += r.response_ids[:-1]
            positions += range(length, length + len(r.response_ids) - 1)
            rows += [start + i - 1 if i else begin + length - 1 for i in r.trained_index]
            if len(ids) > start:
                replies.append(Stretch(start, len(ids), start, len(ids), True, True))
        stop, first = len(ids), begin + length
        if len(members) == 1:
            everywhere.append(Stretch(begin, stop, begin, stop, True))
        else:
            everywhere.append(Stretch(begin, first, begin, first, True))
            everywhere += [Stretch(first, stop, begin, first, False), *replies] if replies else []
        ends += range(first - 1, stop)
        at_ends.append(Stretch(first - 1 - behind, stop - behind, begin, first, False))
        at_ends += [s._replace(start=s.start - behind, stop=s.stop - behind) for s in replies]
    return Pack(
        torch.tensor([ids]), torch.tensor([positions]), torch.tensor(rows), tuple(everywhere), torch.tensor(ends),
        tuple(at_ends),
    )  # fmt: skip


class _Attention(torch.autograd.Function):
    """softmax(scale q k^T) v over stretches of a pack: queries [1, H, E, d], keys and values [1, H, T, d]."""

    @staticmethod
    def forward(ctx, q, k, v, stretches, scale):  # type: ignore[no-untyped-def]
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for s in stretches:
            queries, keys = slice(s.start, s.stop), slice(s.first, s.last)
            found, norm = _forward(q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, s.causal, scale=scale)
            if s.more:
                before, theirs = lse[:, :, queries], norm
                norm = torch.logaddexp(before, theirs)
                found = found * (theirs - norm).exp()[..., None]
                found += out[:, :, queries] * (before - norm).exp()[..., None]
            out[:, :, queries], lse[:, :, queries] = found, norm
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.stretches, ctx.scale = stretches, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        sums = [torch.zeros_like(t) for t in (q, k, v)]
        for s in ctx.stretches:
            queries, keys = slice(s.start, s.stop), slice(s.first, s.last)
            found = _backward(
                grad[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys], out[:, :, queries],
                lse[:, :, queries], 0.0, s.causal, scale=ctx.scale,
            )  # fmt: skip
            for total, part, where in zip(sums, found, (queries, keys, keys), strict=True):
                total[:, :, where] += part
        return *sums, None, None


def packed_attention(
    module: Any, query: Float[Tensor, "B H T d"], key: Float[Tensor, "B G S d"], value: Float[Tensor, "B G S d"],
    attention_mask: Tensor | None, *, packing: tuple[Stretch, ...] | None = None, **given: Any,
) -> tuple[Float[Tensor, "B T H d"], None]:  # fmt: skip
    """transformers' attention function: over a pack where `packing` is given, else PyTorch's."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    if torch.is_autocast_enabled(query.device.type):  # the kernel is called below the dispatcher's casts
        query, key, value = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (query, key, value))
    return attend(query, key, value, packing, given.get("scaling")).transpose(1, 2), None


def attend(
    query: Float[Tensor, "1 H E d"], key: Float[Tensor, "1 G T d"], value: Float[Tensor, "1 G T d"],
    stretches: tuple[Stretch, ...], scale: float | None,
) -> Float[Tensor, "1 H E d"]:  # fmt: skip
    """Attention over the stretches of a pack, with gradients."""
    share = query.shape[1] // key.shape[1]
    found: Tensor = _Attention.apply(query, repeat_kv(key, share), repeat_kv(value, share), stretches, scale)  # type: ignore[no-untyped-call]
    return found


def inputs(found: Pack, device: torch.device) -> dict[str, Any]:
    """Arguments of a model's forward pass. The mask is never read: one of four dimensions keeps it from being made."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    ids, positions = found.ids.to(device), found.positions.to(device)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "packing": found.stretches}


def enable(model: Any) -> bool:
    """Install the attention function in a model, if it then reads a pack as it reads single rows; say whether it does.

    The trial is two prompts of two responses against four rows.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = config._attn_implementation == "sdpa" and kinds == {"full_attention"} and model.device.type == "cpu"
    if not plain or float(getattr(config, "attention_dropout", None) or 0.0) or config.vocab_size < 8:
        return False
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME
    if _reads_packs(model):
        return True
    model.config._attn_implementation = "sdpa"
    return False


@torch.no_grad()
def _reads_packs(model: Any) -> bool:
    found = pack(TRIAL)
    body = model.base_model
    try:
        states = body(use_cache=False, **inputs(found, model.device)).last_hidden_state[0, found.rows]
    except TypeError:  # a forward pass that does not hand on its arguments
        return False
    rows = [
        body(input_ids=torch.tensor([[*t.prompt_ids, *t.response_ids[:-1]]]), use_cache=False).last_hidden_state[
            0, len(t.prompt_ids) - 1 :
        ]
        for t in TRIAL
    ]
    expected = torch.cat(rows)
    return bool((states - expected).abs().max() <= 1e-2 * expected.abs().max())
