"""The forward passes that a step's texts are cut into, by the engine itself, and the products that they need.

Counted are the linear layers, attention and the vocabulary head; a padded row counts as far as it reaches. Left out:
elementwise work, experts and windows (they count as plain layers do), and what is only copied.

FLOPs are 2 for each multiplication with its addition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil

from opdkit.models import LanguageModel
from opdkit.plan.architectures import linear_layers
from opdkit.plan.counts import samples
from opdkit.plan.memory import Job, Model
from opdkit.plan.reading import OWN
from opdkit.rollouts.rollout import Rollout
from opdkit.sources import OnPolicy, TeacherSamples
from opdkit.support import Full
from opdkit.views.batches import batches


@dataclass(frozen=True)
class Pass:
    """Some texts that go through a model together."""

    texts: tuple[Rollout, ...]
    packed: bool

    @property
    def trained(self) -> int:
        return sum(len(t.response_ids) for t in self.texts)

    @property
    def longest(self) -> int:
        """Tokens of a row but for the last, which predicts nothing."""
        return max(len(t.prompt_ids) + len(t.response_ids) for t in self.texts) - 1

    @property
    def tokens(self) -> int:
        return self._tokens_and_pairs[0]

    @property
    def ends(self) -> int:
        """Tokens at which the last layer is read: from the last one of a prompt on; of padded rows the trained ones."""
        if not self.packed:
            return self.trained
        groups = groupby(self.texts, key=lambda t: t.prompt_ids)
        return sum(1 + sum(len(m.response_ids) - 1 for m in members) for _, members in groups)

    @property
    def pairs(self) -> int:
        """Pairs of tokens that attend, causally; padded rows in full."""
        return self._tokens_and_pairs[1]

    @property
    def _tokens_and_pairs(self) -> tuple[int, int]:
        if not self.packed:
            rows, length = len(self.texts), self.longest
            return rows * length, rows * length * (length + 1) // 2
        tokens = pairs = 0
        for prompt, members in groupby(self.texts, key=lambda t: t.prompt_ids):
            lengths, p = [len(m.response_ids) - 1 for m in members], len(prompt)
            tokens += p + sum(lengths)
            pairs += p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in lengths)
        return tokens, pairs


def passes(model: Model, texts: Sequence[Rollout], budget: int) -> list[Pass]:
    """The forward passes of a model over some texts, under a budget of tokens."""
    reader = LanguageModel("", "", None, None, packs=model.packs)
    return [Pass(tuple(texts[i] for i in b.index), b.packed) for b in batches(reader, texts, budget)]


@dataclass(frozen=True)
class Products:
    """FLOPs of a model: its layers for each token, attention for each pair of tokens, and one row of logits.

    `ends` are those of a token in the last layer that are saved where its state is not read; attention there counts whole.
    """

    token: int
    pair: int
    logits: int
    frozen: bool  # whether its weights take no gradient
    ends: int = 0

    @staticmethod
    def of(model: Model) -> "Products":
        text = model.architecture.text
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        weights = sum(layer.weight.numel() for layer in linear_layers(model.meta).values())
        last = f"layers.{model.architecture.layers - 1}."
        spared = sum(layer.weight.numel() for name, layer in linear_layers(model.meta).items()
                     if last in name and not name.endswith(("k_proj", "v_proj")))  # fmt: skip
        pair = 4 * text.num_attention_heads * width * model.architecture.layers
        return Products(
            2 * weights,
            pair,
            2 * model.architecture.vocab * text.hidden_size,
            model.trained < model.parameters,
            2 * spared * model.reads,
        )

    def at(self, depth: float) -> "Products":
        """Of the model with this part of its layers."""
        return replace(self, token=round(self.token * depth), pair=round(self.pair * depth))

    def forward(self, over: Sequence[Pass]) -> float:
        return float(sum(self.token * p.tokens - self.ends * (p.tokens - p.ends) + self.pair * p.pairs for p in over))

    def learning(self, over: Sequence[Pass], checkpointing: bool) -> float:
        """Forward and backward with the head: two products for each one of the forward pass, one where weights are
        frozen, and the forward pass of the layers again where activations are not kept."""
        times = 2 if self.frozen else 3
        head = times * self.logits * sum(p.trained for p in over)
        return (times + checkpointing) * self.forward(over) + head


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs of phases, of models with part of their layers where `depths` says so


Depths = Mapping[str, float]  # model -> part of its layers
WHOLE: Depths = {}


def products(model: Model, depths: Depths) -> Products:
    return Products.of(model).at(depths.get(model.architecture.name, 1.0))


def samplers(job: Job) -> dict[str, list[Model]]:
    """The models that sample each source's responses, in lock-step where there are two; not who reads along."""
    found = {}
    for name, source in job.method.rollouts.items():
        if isinstance(source, TeacherSamples):
            found[name] = [job.teachers[source.teacher]]
        elif isinstance(source, OnPolicy) and source.mixed_with is not None:
            found[name] = [job.student, job.teachers[source.mixed_with]]
        elif samples(job.method, name):
            found[name] = [job.student]
    return found


def sampling_flops(job: Job) -> float:
    total = 0.0
    for name, models in samplers(job).items():
        rows, group = job.rows(name), job.group(name)
        first, *later = job.counts.lengths.cut(job.turns)
        # a prompt is read once for its group; behind it every row has a context of its own
        texts = [first.texts(ceil(rows / group), group), *(piece.texts(rows, 1) for piece in later)]
        drawn = [Pass(tuple(t), packed=True) for t in texts]
        follower = job.follower(name)
        for model in [*models, *([] if follower is None else [follower])]:
            p = Products.of(model)
            total += p.forward(drawn) + p.logits * sum(each.trained for each in drawn)
    return total


def scoring_flops(job: Job, depths: Depths = WHOLE) -> float:
    """Every view reads every source's texts, with as large a part for each of its teachers where it has one a domain; the
    student where a source did not record what it is asked for. Who read along while they were sampled forms logits only."""
    total = 0.0
    for name, source in job.method.rollouts.items():
        texts = job.texts(name)
        student = job.method.reads_student(name) and not isinstance(source, OnPolicy)
        asked = [(job.student, 1.0, texts, True)] if student or job.recipe.sampling.rescore else []
        rule = job.along(name)
        for view, v in job.method.views.items():
            again = rule is None or rule.view != view
            asked += [(job.teachers[m], v.part, job.read_by(view, m, texts), again) for m in v.models]
        for model, share, read, again in asked:
            p, cut = products(model, depths), passes(model, read, job.recipe.train.score_tokens)
            total += share * (again * p.forward(cut) + p.logits * sum(c.trained for c in cut))
    return total


def updating_flops(job: Job, depths: Depths = WHOLE) -> float:
    """All updates of a step; teachers whose whole distribution is compared form their logits again."""
    t, p = job.recipe.train, products(job.student, depths)
    cut = [c for texts in job.update_texts() for c in passes(job.student, texts, t.microbatch_tokens)]
    read = {term.loss.teacher for term in job.method.terms}
    again = [v for n, v in job.method.views.items() if n in read and isinstance(v.support, Full)]
    each = [Products.of(job.teachers[m]).logits * v.part for v in again for m in v.models]
    logits = sum(each) * sum(c.trained for c in cut)
    return t.minibatches * t.epochs * (p.learning(cut, t.gradient_checkpointing) + logits)


def exact_kl_flops(job: Job, texts: Sequence[Rollout], depths: Depths = WHOLE) -> float:
    """Of one evaluation's exact reverse KL: every teacher that is not the student as it is reads the texts, and both sides'
    logits are formed."""
    total = 0.0
    for name, teacher in job.compared.items():
        read = job.read_by(OWN, name, texts)
        p, cut = products(teacher, depths), passes(teacher, read, job.recipe.train.score_tokens)
        own = Products.of(job.student).logits
        total += p.forward(cut) + (2 * p.logits + own) * sum(c.trained for c in cut)
    return total
