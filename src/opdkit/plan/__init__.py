"""Planning a run without running it: what a recipe resolves to, what it counts, and what memory each phase needs."""

from opdkit.plan.plan import Plan, plan
from opdkit.plan.show import dry_run

__all__ = ["Plan", "dry_run", "plan"]
