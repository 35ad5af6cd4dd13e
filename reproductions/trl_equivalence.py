"""TRL's own divergence functions against ours on the same logits: values and gradients, printed as differences.

Run by hand where TRL is installed: `python reproductions/trl_equivalence.py`. TRL's GKDTrainer and DistillationTrainer
divide the sum over trained tokens by their number (`num_items_in_batch`); ours is the reduction token_mean.
Left out: sampling, optimisers and everything else of a training step.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (0.7, 1.0, 1.3)
N, V = 24, 60


def ours(p: Tensor, q: Tensor, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    """(loss, gradient with respect to the student's logits) of the translated recipe's method."""
    from synthetic import logit_gradient, make_step

    from opdkit.aliases import translate
    from opdkit.catalogue import build_method
    from opdkit.config import parse_recipe

    names = {"peer": "trl-distillation", "model_name_or_path": "s", "teacher_model_name_or_path": "t",
             "dataset_name": "testbed:sums", "beta": beta, "temperature": temperature}  # fmt: skip
    recipe = parse_recipe(translate(names).data)
    method = build_method(recipe.method.name, recipe.method.arguments)
    scaled = p / recipe.sampling.temperature
    step = make_step(method, scaled, q / recipe.teachers["teacher"].temperature, torch.arange(N))
    loss, gradient = logit_gradient(method, scaled, step)
    return loss, gradient / recipe.sampling.temperature


def gkd(p: Tensor, q: Tensor, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    from trl.experimental.gkd import GKDTrainer

    leaf = p.clone().requires_grad_(True)
    labels = torch.zeros(1, N, dtype=torch.long)
    loss = GKDTrainer.generalized_jsd_loss(leaf[None], q[None], labels=labels, beta=beta, temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def stable(p: Tensor, q: Tensor, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    """DistillationTrainer's chunked function; with the identity as the head, hidden states are logits."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    leaf = p.clone().requires_grad_(True)
    head = torch.eye(V, dtype=p.dtype)
    loss, _, _ = _chunked_divergence_loss(
        leaf[None], q[None], head, head, torch.ones(1, N), beta, num_items_in_batch=N, temperature=temperature
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def main() -> int:
    try:
        import trl
    except ImportError:
        print("TRL is not installed; pip install trl")
        return 1
    generator = torch.Generator().manual_seed(0)
    p, q = (1.5 * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    print(f"TRL {trl.__version__}, float64, {N} tokens, vocabulary {V}; largest absolute difference to opdkit")
    print("function                 beta  temperature        loss  |d loss|  |d gradient|")
    for name, theirs in (("GKDTrainer", gkd), ("DistillationTrainer", stable)):
        for beta in BETAS:
            for temperature in TEMPERATURES:
                loss, gradient = theirs(p, q, beta, temperature)
                value, wanted = ours(p, q, beta, temperature)
                print(f"{name:24} {beta:4}  {temperature:11}  {loss.item():10.6f}  {abs(loss - value).item():8.1e}"
                      f"  {(gradient - wanted).abs().max().item():12.1e}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
