"""When a fused kernel may take the whole row's loss and gradient off the head's hands (`train.head_kernel`).

Axes: n rows of a chunk, V vocabulary. Nothing here imports triton; the kernel is in `opdkit.kernels_triton`. Left out,
and formed by torch whatever the setting: losses on few ids, several terms on the same rows, the other divergences,
limits (`entry_max`, `row_max`), soft-capped heads, float64, and passes without a gradient.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from opdkit.config import Recipe
from opdkit.errors import RecipeError
from opdkit.losses import Divergence
from opdkit.method import Method
from opdkit.rows import Loss
from opdkit.support import Full

KINDS = ("reverse_kl", "forward_kl")


def fusable(losses: Sequence[Loss], softcap: float | None, dtype: torch.dtype = torch.float32) -> Divergence | None:
    """The one loss of some rows where the kernel offers it; the rows' teacher is compared over the whole vocabulary."""
    if len(losses) != 1 or softcap is not None or dtype != torch.float32:
        return None
    loss = losses[0]
    if not isinstance(loss, Divergence) or loss.kind not in KINDS or (loss.entry_max, loss.row_max) != (None, None):
        return None
    return loss


def check_kernel(recipe: Recipe, method: Method, softcap: float | None, device: torch.device) -> None:
    """Raise RecipeError where `train.head_kernel: triton` cannot run, or the method has no loss for it."""
    if recipe.train.head_kernel == "torch":
        return
    if device.type != "cuda":
        raise RecipeError(
            f"train.head_kernel = triton runs on CUDA devices, and this run is on device {device.type}; remove it"
        )
    if find_spec("triton") is None:
        raise RecipeError("train.head_kernel = triton needs a package: pip install triton, or remove it")
    for name in method.rollouts:
        losses = [term.loss for term in method.terms if term.on == name]
        found = fusable(losses, softcap)
        if found is not None and isinstance(method.views[found.teacher].support, Full):
            return
    raise RecipeError(f"train.head_kernel = triton has no effect: it forms one {' or '.join(KINDS)} over the whole "
                      f"vocabulary without limits or soft-cap, and no rollout source of method {method.name} has that as "
                      "its only term; remove it")  # fmt: skip
