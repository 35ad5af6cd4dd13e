"""`opd demo`: from nothing to a distilled student and a report, on a CPU, within minutes."""

import json
import time
from pathlib import Path

from opdkit.config import load_recipe


def demo(output: str = "runs/demo", seed: int = 0, overrides: list[str] | None = None) -> str:
    """Run the demo recipe and return its closing lines. A demo that was stopped goes on; a finished one is reported again.

    Raises OpdkitError as training does.
    """
    from opdkit.report import write_report
    from opdkit.train.loop import train

    begin = time.perf_counter()
    recipe = load_recipe("cpu/demo", [f"output={json.dumps(output)}", f"seed={seed}", *(overrides or [])])
    run = train(recipe, resume=(Path(output) / "recipe.yaml").is_file())
    report = write_report(run)
    return closing_lines(run, report, time.perf_counter() - begin)


def closing_lines(run: Path, report: Path, seconds: float) -> str:
    """The few numbers that matter, in plain text."""
    records = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    student = [r for r in records if r["who"] == "student"]
    before, after = student[0], student[-1]
    teacher = next(r for r in records if r["who"] != "student")
    gap = teacher["accuracy"] - before["accuracy"]
    recovered = f"{(after['accuracy'] - before['accuracy']) / gap:.0%} of the gap" if gap > 0 else "no gap to recover"
    return "\n".join([
        f"teacher accuracy   {teacher['accuracy']:6.1%}  on {teacher['problems']} held-out problems",
        f"student accuracy   {before['accuracy']:6.1%}  before, {after['accuracy']:.1%} after: {recovered}",
        f"reverse KL         {before['reverse_kl']:.4f} before, {after['reverse_kl']:.4f} after (nats per token, exact)",
        f"time               {seconds:.0f} s, {after['step']} steps",
        f"report             {report}",
    ])  # fmt: skip
