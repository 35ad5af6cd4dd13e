"""`opd demo` with tiny models in place of the testbed's: closing lines, a second call, a stopped run."""

import json

import pytest

from opdkit import demo as module
from opdkit.config import parse_recipe


@pytest.fixture
def tiny_demo(monkeypatch, recipe_data, tmp_path):
    output = tmp_path / "demo"

    def load(name, overrides):
        assert name == "cpu/demo"
        return parse_recipe(recipe_data | {"output": str(output), "train": recipe_data["train"] | {"steps": 2}})

    monkeypatch.setattr(module, "load_recipe", load)
    return output


def test_the_demo_ends_with_plain_lines_and_can_be_called_again(tiny_demo):
    lines = module.demo(str(tiny_demo)).splitlines()
    assert [line[:16].strip() for line in lines] == [
        "teacher accuracy",
        "student accuracy",
        "reverse KL",
        "time",
        "report",
    ]
    assert (tiny_demo / "report.html").is_file() and lines[-1].endswith("report.html")
    metrics = (tiny_demo / "metrics.jsonl").read_text()
    again = module.demo(str(tiny_demo)).splitlines()
    assert again[:3] == lines[:3] and (tiny_demo / "metrics.jsonl").read_text() == metrics


def test_the_share_of_the_gap_by_hand(tmp_path):
    rows = [(0, "student", 0.1, 0.8), (0, "teacher", 0.9, None), (5, "student", 0.7, 0.2)]
    records = [{"step": s, "who": w, "accuracy": a, "reverse_kl": k, "problems": 100} for s, w, a, k in rows]
    (tmp_path / "evals.jsonl").write_text("\n".join(map(json.dumps, records)))
    text = module.closing_lines(tmp_path, tmp_path / "report.html", 12.3)
    assert "10.0%  before, 70.0% after: 75% of the gap" in text and "0.8000 before, 0.2000 after" in text
    assert "90.0%  on 100 held-out problems" in text and "12 s, 5 steps" in text
