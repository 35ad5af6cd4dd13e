"""Planning a run without running it: what a recipe resolves to, what it counts, and the memory and time of each phase."""

from opdkit.plan.plan import Plan, plan
from opdkit.plan.show import as_json, as_text, dry_run

__all__ = ["Plan", "as_json", "as_text", "dry_run", "plan"]
