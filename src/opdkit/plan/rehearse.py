"""Memory of a forward or backward pass, measured by running the engine's own code on tensors without memory.

The model is built with fake tensors (shapes and dtypes, no data) at its real width and a few of its layers; every
storage that an operation makes is counted until it is freed. Layers are alike, so the rest is linear in their number.
Attention counts as the fused kernels do it: nothing of size length x length. Left out: memory inside kernels, and
quantised layers, which count as their dtype's.

Axes: B sequences, T tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opdkit.config import LoraConfig
from opdkit.head import RowTerm, objective
from opdkit.losses import CrossEntropy
from opdkit.models import LanguageModel, checkpoint_activations
from opdkit.packing import NAME as PACKED
from opdkit.packing import packed_attention
from opdkit.plan.architectures import Architecture, build, planning_attention, shallow
from opdkit.plan.meter import HEAP, Meter, churned
from opdkit.reading import readable
from opdkit.rollouts.rollout import Rollout
from opdkit.step import Layout, Step
from opdkit.views.batches import Batch

FUSED = "opdkit_fused"  # sdpa as it runs without a mask
_MEASURED: dict[tuple[Any, ...], Any] = {}  # advice asks the same questions again
ROWS = 4  # rows whose logits the rehearsed loss forms; `memory` adds the chunk's logits


@dataclass(frozen=True)
class Rehearsal:
    """One model and the arithmetic it runs in: `precision` as in the recipe."""

    architecture: Architecture
    precision: str = "fp32"
    lora: LoraConfig | None = None
    cuda: bool = True  # else the CPU's way, where the engine has two
    reads: bool = False  # whether texts go through the layers written out, where the model is built like them

    def read(self, rows: int, tokens: int) -> int:
        """Peak bytes of a pass without gradient over [B, T] tokens, as prompts are read."""

        def measure(layers: int) -> list[int]:
            with self._model(layers, FUSED, train=False) as lm, self._meter(lm) as meter, torch.no_grad():
                kept = lm.hidden(torch.zeros(rows, tokens, dtype=torch.long))
                del kept
            return meter.peaks

        return self._peak(("read", rows, tokens), measure, grows=False)

    def forward(self, texts: Sequence[Rollout], packed: bool) -> int:
        """Peak bytes of a pass without gradient over some texts, as views are scored."""

        def measure(layers: int) -> list[int]:
            opened = self._model(layers, _attention(packed), train=False)
            with opened as lm, self._meter(lm) as meter, torch.no_grad():
                kept = Batch(tuple(range(len(texts))), packed).states(lm, texts)
                del kept
            return meter.peaks

        return self._peak(("forward", packed, *_sizes(texts)), measure, grows=False)

    def decode(self, rows: int, tokens: int, new: int = 1) -> int:
        """Peak bytes of reading `new` tokens beside the cache: B rows that have read T tokens, prompts of unlike length."""

        def measure(layers: int) -> list[int]:
            from opdkit.rollouts.cache import CACHE

            attention = planning_attention(self.architecture.settings.attn)
            with self._model(layers, attention, train=False) as lm, torch.no_grad():
                with self._autocast():
                    cache, mask = _read_prompts(lm, rows, tokens, new)
                with self._meter(lm, (t for layer in cache.layers for t in (layer.keys, layer.values))) as meter:
                    ids = torch.zeros(rows, new, dtype=torch.long)
                    position = (tokens + torch.arange(new)).repeat(rows, 1)
                    lm.run(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True, **{CACHE: cache})
            return meter.peaks

        return self._peak(("decode", rows, tokens, new), measure, grows=False)

    def cache(self) -> tuple[int, int]:
        """Bytes of one number in the keys and in the values of the cache."""

        def look() -> tuple[int, int]:
            with self._model(self._few, "sdpa", train=False) as lm, torch.no_grad(), self._autocast():
                layer = _read_prompts(lm, 1, 4)[0].layers[0]
                return layer.keys.element_size(), layer.values.element_size()

        found: tuple[int, int] = self._once(("cache",), look)
        return found

    def hidden_size(self) -> int:
        """Bytes of one last hidden state."""

        def look() -> int:
            with self._model(self._few, FUSED, train=False) as lm, torch.no_grad(), self._autocast():
                hidden = lm.hidden(torch.zeros(1, 2, dtype=torch.long))
                return int(hidden.shape[-1] * hidden.element_size())

        found: int = self._once(("hidden",), look)
        return found

    def update(
        self, texts: Sequence[Rollout], packed: bool, logits: int, checkpointing: bool, *, only: bool = False
    ) -> int:
        """Peak bytes of one micro-batch's forward, loss and backward over some texts, with a loss that holds `logits`
        bytes while it is computed.

        Gradients of parameters exist before it and do not count; with `only`, the update's only micro-batch, they are
        made in its backward pass and count.
        """
        trained = sum(len(t.response_ids) for t in texts)

        def measure(layers: int) -> list[int]:
            opened = self._model(
                layers, _attention(packed), train=True, checkpointing=checkpointing, gradients=not only
            )
            with opened as lm, self._meter(lm) as meter:
                _mark_half_way_back(lm, layers, meter)
                hidden = Batch(tuple(range(len(texts))), packed).states(lm, texts)
                meter.mark()
                loss, _ = objective(hidden[:ROWS], lm.head(), [_row_term(min(ROWS, trained))])
                meter.peaks[-1] += logits
                meter.mark()
                del hidden
                loss.backward()
            return meter.peaks

        return self._peak(("update", packed, *_sizes(texts), logits, checkpointing, only), measure)

    def _peak(self, what: tuple[Any, ...], measure: Callable[[int], list[int]], *, grows: bool = True) -> int:
        """The peak at full depth; a pass that keeps nothing of its layers does not grow with their number."""
        found: int = self._once(what, lambda: _by_depth(self.architecture, measure, grows, 2 + self.reads))
        return found

    def _once(self, what: tuple[Any, ...], look: Callable[[], Any]) -> Any:
        """The answer to a question, looked up once."""
        a = self.architecture
        model = (a.config.to_json_string(use_diff=False), a.settings.dtype, a.settings.attn, a.vocab)
        key = (repr((model, self.precision, self.lora, self.cuda, self.reads)), *what)
        if key not in _MEASURED:
            _MEASURED[key] = look()
        return _MEASURED[key]

    @property
    def _few(self) -> int:
        return min(2, self.architecture.layers)

    @property
    def _fused(self) -> bool:
        return planning_attention(self.architecture.settings.attn) == "sdpa"

    @contextmanager
    def _model(
        self, layers: int, attention: str, *, train: bool, checkpointing: bool = False, gradients: bool = True
    ) -> Iterator[LanguageModel]:
        """The model with fewer layers, made of fake tensors."""
        _register()
        shape = shallow(self.architecture, layers)
        with torch.device("meta"):
            model = build(shape, attention if self._fused else planning_attention(self.architecture.settings.attn))
            lm = LanguageModel("student", "", model.train(train).requires_grad_(train), None)
            lm._vocab = self.architecture.vocab
            if self.lora is not None:
                from opdkit.lora import attach

                lm.adapters = attach(model, self.lora, "", name="student", seed=0)
            lm.reads = self.reads and readable(lm, (FUSED, "sdpa", PACKED))
        if checkpointing:
            checkpoint_activations(model)
        with FakeTensorMode():
            _to_fake(model)
            for p in model.parameters():
                if train and gradients and p.requires_grad:
                    p.grad = torch.zeros_like(p)
            yield lm

    @contextmanager
    def _meter(self, lm: LanguageModel, cache: Iterable[Any] = ()) -> Iterator[Meter]:
        parameters = list(lm.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        # The loss asks whether it is scaled, on the CPU only, where it then saves a copy: there it is not, so 1.
        kept = HEAP if lm.model.training else churned()
        number, heap = (0.5, 1.0) if self.cuda else (1.0, kept)
        with Meter([*parameters, *gradients, *lm.model.buffers()], cache, number, heap) as meter, self._autocast():
            yield meter

    def _autocast(self) -> torch.autocast:
        dtype = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast("cpu", dtype, enabled=self.precision != "fp32")


def _by_depth(architecture: Architecture, measure: Callable[[int], list[int]], grows: bool, least: int) -> int:
    """The peak at the full depth, from two small depths: each segment's peak is linear in the number of layers, from
    `least` on. (A last layer that is cheaper than the others must not be the middle one.)"""
    types = getattr(architecture.text, "layer_types", None) or [""]
    period = next(p for p in range(1, len(types) + 1) if all(t == types[i % p] for i, t in enumerate(types)))
    layers, few = architecture.layers, max(least, period)
    if not grows or layers <= few + period:
        return max(measure(layers if grows else min(few, layers)))
    low, high = measure(few), measure(few + period)
    slopes = [(b - a) / period for a, b in zip(low, high, strict=True)]
    return int(max(a + slope * (layers - few) for a, slope in zip(low, slopes, strict=True)))


def _mark_half_way_back(lm: LanguageModel, layers: int, meter: Meter) -> None:
    """Start a segment when the backward pass has reached the middle layer.

    Before it the peak grows with all that the forward pass saved, after it with what is never freed.
    """
    blocks = next(m for m in lm.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layers)
    once = iter([meter.mark])  # a checkpointed layer runs twice

    def watch(module: Any, args: Any) -> None:
        if args[0].requires_grad:
            args[0].register_hook(lambda _: next(once, lambda: None)())

    middle: Any = blocks[layers // 2]
    (middle.mlp if lm.reads else middle).register_forward_pre_hook(watch)  # layers written out call no more of a layer


def _to_fake(model: Any) -> None:
    """Replace the model's meta tensors by fake ones that stand on the CPU, so that autocast sees them."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                new = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                module._parameters[name] = made.setdefault(id(p), new)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _read_prompts(lm: LanguageModel, rows: int, tokens: int, new: int = 1) -> tuple[Any, Any]:
    """The cache of `rows` rows that have read `tokens` tokens, and the mask of the next `new` ones."""
    from opdkit.rollouts.cache import CACHE, make_cache

    cache = make_cache(lm.model.config)
    mask = torch.ones(rows, tokens + new, dtype=torch.long)
    ids, positions = torch.zeros(rows, tokens, dtype=torch.long), torch.arange(tokens)[None]
    lm.run(input_ids=ids, attention_mask=mask[:, :tokens], position_ids=positions, use_cache=True, **{CACHE: cache})
    cache.reorder_cache(torch.arange(rows))
    return cache, mask


def _attention(packed: bool) -> str:
    return PACKED if packed else FUSED


def _sizes(texts: Sequence[Rollout]) -> tuple[tuple[int, int, int], ...]:
    """What a pass over texts depends on: which share a prompt, and all lengths."""
    return tuple((t.prompt_ids[0], len(t.prompt_ids), len(t.response_ids)) for t in texts)


def _row_term(rows: int) -> RowTerm:
    index = torch.zeros(rows, dtype=torch.long)
    step = Step(Layout(index, index, torch.zeros(1, dtype=torch.long)), index, {})
    return RowTerm(CrossEntropy(), step, None, torch.ones(rows))


def _register() -> None:
    """Make FUSED an attention of transformers: sdpa's function without sdpa's mask; and that of packed rows."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(FUSED, sdpa_attention_forward)
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
