"""What sampling must record so that no view needs the student again. It follows from the method and the recipe alone."""

from opdkit.config import Recipe
from opdkit.method import Method
from opdkit.rollouts.sampler import Keep
from opdkit.support import Full, TopK


def needs_student_head(method: Method) -> bool:
    """Whether a signal or a candidate set asks for student log-probs that the sampler's top-k list lacks."""
    views = method.views
    chosen = any(
        isinstance(v.support, TopK) and v.support.of not in ("student", "intersection") for v in views.values()
    )
    pieces = [p for term in method.terms for p in (term.signal, term.weight) if p is not None]
    needs = [need for p in (*pieces, *method.watch.values()) for _, need in p.needs]
    needs += [need for controller in method.controllers for need in controller.needs()]
    read = {need.split(".")[0] for need in needs if need.endswith((".distribution", ".full"))}
    return chosen or any(isinstance(views[name].support, Full) for name in read)


def to_keep(recipe: Recipe, method: Method, vocab: int) -> Keep:
    """What the sampler records, for a vocabulary of `vocab` ids."""
    supports = [view.support for view in method.views.values()]
    ks = [s.k for s in supports if isinstance(s, TopK) and s.of != "teacher"]
    return Keep(min(vocab, max([recipe.log.top_k, method.top_list, *ks])), needs_student_head(method))
