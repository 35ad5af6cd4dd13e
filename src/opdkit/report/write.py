"""Writes report.html: one file that holds its styles, scripts, data and plotly, and that asks the network for nothing.

Plotly and the data are stored compressed (gzip in base64), which keeps a report at about 2 MB and means that no text of
a run, hostile or not, ever stands in the page as markup.
"""

import base64
import gzip
import json
import os
import re
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from opdkit.report.charts import build_charts
from opdkit.report.read import RunData, RunInfo, read_run
from opdkit.report.results import results
from opdkit.report.text import count, duration, moment, number, percent, teacher_name, whole
from opdkit.report.tokens import pack_tokens

ASSETS = ("report.css", "charts.js", "viewer.js")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5}(v\d+)?)", re.IGNORECASE)


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path.

    Raises RunError when the folder is not a run folder or when one of its files is broken.
    """
    page = render(read_run(run))
    path = run / "report.html"
    partial = run / f"report.html.tmp-{os.getpid()}"
    try:
        partial.write_text(page, encoding="utf-8", errors="replace")  # a lone surrogate must not cost the report
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def render(run: RunData) -> str:
    """The whole page as text."""
    import jinja2
    from plotly.offline import get_plotlyjs_version

    folder = resources.files("opdkit.report")
    source = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in (*ASSETS, "template.html")}
    notes = list(run.notes)
    tokens = pack_tokens(run.kept, notes)
    charts = build_charts(run)
    flat = [asdict(chart) for members in charts.values() for chart in members]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = (percent, number, whole, duration, count, moment, teacher_name)
    environment.filters.update({function.__name__: function for function in shown})
    return environment.from_string(source["template.html"]).render(
        run=run,
        info=run.info,
        results=results(run),
        method_name=_at(run.recipe, "method.name") or "The method",
        settings=settings(run.recipe),
        progress=progress(run),
        about=about(run.info),
        paper_link=paper_link(run.info.paper),
        charts=charts,
        has_tokens=bool(tokens["steps"]),
        notes=notes,
        assets={name: source[name] for name in ASSETS},
        data=pack(json.dumps({"charts": flat, "tokens": tokens}, separators=(",", ":"))),
        plotly=packed_plotly(),
        plotly_version=get_plotlyjs_version(),
    )


def pack(text: str) -> str:
    """gzip in base64, the same bytes for the same text."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0)).decode("ascii")


@cache
def packed_plotly() -> str:
    from plotly.offline import get_plotlyjs

    return pack(get_plotlyjs())


def about(info: RunInfo) -> tuple[str, str, str]:
    """The method's sentence around the name of its paper: (before, paper, after), so that the paper is said once."""
    doc, paper = info.method_doc or "", info.paper or ""
    if paper and paper in doc:
        return doc.partition(paper)
    return f"{doc} " if doc else "", paper, ""


def paper_link(paper: str | None) -> str | None:
    """The address of an arXiv id; nothing else becomes a link."""
    found = ARXIV.search(paper or "")
    return f"https://arxiv.org/abs/{found[1]}" if found else None


def progress(run: RunData) -> dict[str, Any]:
    """How far the run came: step of the last metrics, planned steps, mean tokens per second."""
    speeds = [float(row["tokens_per_second"] or 0) for row in run.metrics if row.get("tokens_per_second")]
    return {
        "step": int(run.metrics[-1]["step"] or 0) if run.metrics else 0,
        "steps": _at(run.recipe, "train.steps"),
        "tokens_per_second": sum(speeds) / len(speeds) if speeds else None,
        "seconds": run.info.seconds,
    }


def settings(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings that a reader asks for first, as (name, value); those that the recipe lacks are absent."""
    rows = (
        ("Task", ("task.kind", "task.name", "task.path")),
        ("Optimiser steps", ("train.steps",)),
        ("Prompts in a step", ("train.prompts_per_step",)),
        ("Responses per prompt", ("sampling.group",)),
        ("New tokens at most", ("sampling.max_new_tokens",)),
        ("Sampling temperature", ("sampling.temperature",)),
        ("Nucleus (top-p)", ("sampling.top_p",)),
        ("Learning rate", ("optim.lr", "optim.schedule")),
        ("Gradient clipping", ("optim.grad_clip",)),
        ("Student precision", ("student.dtype",)),
        ("Held-out problems", ("task.eval_size",)),
        ("Seed", ("seed",)),
    )
    shown = [(name, [_at(recipe, key) for key in keys]) for name, keys in rows]
    return [
        (name, ", ".join(str(v) for v in values if v is not None)) for name, values in shown if values[0] is not None
    ]


def _at(recipe: dict[str, Any], key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
