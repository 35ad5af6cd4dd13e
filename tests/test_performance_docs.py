"""What the performance page is made of: fitted exponents, the bound's FLOPs, and a page that says what the files say."""

import json
import math
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import early_stop  # noqa: E402
import measure  # noqa: E402
import performance  # noqa: E402
from bound import Model, Part, Rates, Texts, sampling, scoring, updating  # noqa: E402
from measure import Chart, Table, Target  # noqa: E402
from plots import svg, ticks  # noqa: E402
from scaling import STEP_SWEEPS, exponent  # noqa: E402
from settings import decoder  # noqa: E402
from sized import Size  # noqa: E402

from opdkit.rollouts.rollout import Rollout  # noqa: E402
from opdkit.tasks.problem import Problem  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Exponents


def test_exponent_of_a_power_is_exact():
    sizes = [2, 4, 8, 16, 32, 64]
    slope, error, points = exponent(sizes, [7 * s**1.5 for s in sizes])
    assert slope == pytest.approx(1.5) and error == pytest.approx(0, abs=1e-7) and points == 4


def test_exponent_leaves_the_constant_part_out():
    assert exponent([1, 2, 4, 8, 16, 32], [9, 9, 4, 8, 16, 32])[0] == pytest.approx(1.0)
    assert exponent([1, 2, 4], [1, 2, 4]) == (pytest.approx(1.0), pytest.approx(0, abs=1e-9), 3)  # of three, none


def test_standard_error_of_a_slope_by_hand():
    """x = 0, 1, 2 and y = 0, 1, 1: slope 1/2, residuals -1/6, 1/3, -1/6, so se = sqrt((1/6) / 1 / 2)."""
    slope, error, _ = exponent([1, math.e, math.e**2], [1, math.e, math.e])
    assert slope == pytest.approx(0.5) and error == pytest.approx(math.sqrt(1 / 12))


def test_too_few_points_and_values_that_have_no_logarithm():
    with pytest.raises(ValueError, match="2 sizes leave 2 points"):
        exponent([1, 2], [1, 2])
    with pytest.raises(ValueError):
        exponent([1, 2, 4], [0, 1, 2])


def test_a_size_in_words_leaves_out_what_grows():
    assert Size(k=4).about("vocab") == "8 prompts of 64 tokens, groups of 4, responses of 64 tokens, top 4"
    assert Size().about("prompts").startswith("prompts of 64 tokens, ")
    assert all(len(sizes) == 6 for _, sizes in STEP_SWEEPS.values())


# ---------------------------------------------------------------------------------------------------------------------
# The bound


def rollout(prompt: int, new: int, first: int = 1) -> Rollout:
    return Rollout(Problem("", ""), (first,) * prompt, (2,) * new, "", 0, "stop")


def test_lengths_and_pairs_by_enumeration():
    rollouts = [rollout(3, 4), rollout(3, 1), rollout(2, 5, first=7)]
    texts = Texts.of(rollouts)
    assert texts == Texts(((3, (4, 1)), (2, (5,)))) and (texts.trained, texts.responses) == (10, 3)
    assert texts.read == (5, 3 + 2 + 1 + 2 + 1)
    pairs = 0
    for prompt, new in ((3, 4), (3, 1), (2, 5)):  # the last token is never read
        pairs += sum(a >= b for a, b in product(range(prompt, prompt + new - 1), range(prompt + new - 1)))
    assert texts.written == (3 + 0 + 4, pairs)


def test_flops_are_those_that_torch_counts():
    """Of the linear layers and the head, forward and backward; attention is counted by hand."""
    model = decoder(vocab=40, hidden=64, layers=2, std=0.1)
    bound = Model.of(model, 40)
    assert bound.pair == 2 * 4 * 64 and bound.head == (40, 64)
    ids = torch.arange(12).reshape(2, 6)
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=ids).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    mm = torch.ops.aten.mm
    found = [counter.get_flop_counts()["Global"].get(mm, 0) for counter in (forward, backward)]
    once = bound.body(12, 0, 12).flops + bound.scores(12, 12).flops
    assert found == [once, 2 * once]
    assert bound.body(12, 5, 12, backward=True).flops == 3 * (bound.body(12, 0, 12).flops + 5 * bound.pair)


def test_what_each_phase_needs_by_hand():
    model = Model((((3, 2), 1),), pair=100, head=(5, 2))  # 12 FLOPs a token, 20 a row of logits
    texts = Texts(((3, (4, 1)), (2, (5,))))  # prompts: 5 tokens, 9 pairs; responses: 7 tokens, 15 + 18 pairs
    read, written, drawn = sampling(model, texts)
    assert (read.flops, written.flops, drawn.flops) == (5 * 12 + 900, 7 * 12 + 3300, (2 + 7) * 20)
    assert (read.rows, written.rows, drawn.rows) == (5, 3, 3)
    body, logits = scoring(model, texts, budget=8, chunk=6)
    assert (body.flops, body.rows, logits.flops, logits.rows) == (12 * 12 + 4200, 8, 10 * 20, 6)
    assert [p.flops for p in updating(model, texts, 8, 6)] == [3 * (12 * 12 + 4200), 3 * 200]


def test_seconds_are_flops_over_the_measured_rate():
    shape = (((3, 2), 1),)
    rates = Rates({(shape, 4, False): 10.0, (shape, 4, True): 5.0})
    assert rates.seconds([Part(100, shape, 4), Part(50, shape, 4, backward=True)]) == 20.0
    assert Rates().rate(Part(1, shape, 4)) > 0


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A page in a folder of its own, with results for sampling only."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    for name, value in {
        "RESULTS": tmp_path / "results",
        "PAGE": tmp_path / "performance.md",
        "NOTES": tmp_path / "no",
    }.items():
        monkeypatch.setattr(performance, name, value)
    table = Table(
        "Rates", ["work", "ours tok/s", "ours / generate"], [["short", 1234.5, 2.5], ["long", None, 0.5]], "A note."
    )
    targets = [Target("ratio of short", ">= 2", "2.5", True), Target("ratio of long", ">= 2", "0.5", False)]
    path = measure.write("sample", "python benchmarks/sample.py --threads 2", [table], targets, {})
    monkeypatch.setattr(performance, "REFERENCE", path.parent.name)
    return tmp_path


def test_the_page_says_what_the_files_say(site):
    assert performance.main(check=False) == 0
    page = (site / "performance.md").read_text()
    assert f"* {performance.REFERENCE}, whose tables follow where it has any: 1 of 2 targets are met." in page
    assert "| [sample](#sampling) | ratio of long | >= 2 | **0.5, missed** |" in page
    assert "| short | 1,234 | 2.5 |\n| long | - | 0.5 |\n\nA note." in page
    assert "**Rerun.** `python benchmarks/sample.py --threads 2`. Measured on " in page
    assert "**Left.** Missed targets:\n\n* ratio of long: 0.5, target >= 2" in page
    assert "![Rates](performance/sample-rates.svg)" in page and (site / "performance" / "sample-rates.svg").is_file()
    assert "No results yet: `python benchmarks/head.py` writes `benchmarks/results/MACHINE/head.json`" in page
    assert performance.main(check=True) == 0


def test_a_benchmark_without_targets_says_in_its_own_words_what_is_left(site):
    """The table of benchmarks/early_stop.py from made-up seconds: ratios to the same teacher's step, and their bars."""
    args = SimpleNamespace(prompts=8, threads=1)
    steps = {None: {"sample": 0.2, "score": 0.1, "update": 0.2, "step": 0.5},
             8: {"sample": 0.1, "score": 0.0, "update": 0.1, "step": 0.2}}  # fmt: skip
    numbers = {"drift": 1.0, "tokens": 100.0, "stopped": 32.0}
    table = early_stop.table_of({("base", 0.1, every): s | numbers for every, s in steps.items()}, args)
    assert table.rows == [["never saw lists", 10, None, 1.0, 100.0, None, 0.2, 0.1, 0.2, 0.5, 1.0],
                          ["never saw lists", 10, 8, 1.0, 100.0, 32.0, 0.1, 0.0, 0.1, 0.2, 0.4]]  # fmt: skip
    measure.write("early_stop", "python benchmarks/early_stop.py --threads 1", [table], [], {})
    bars = performance.ratio_bars(table)
    assert bars is not None and bars.lines == {
        "step / step without": [["never saw lists, 10, None", 1.0], ["never saw lists, 10, 8", 0.4]]
    }
    performance.main(check=False)
    page = (site / "performance.md").read_text()
    section = page.split("## Stopping responses early")[1].split("\n## ")[0]
    assert "| never saw lists | 10 | 8 | 1 | 100 | 32 | 0.1 | 0 | 0.1 | 0.2 | 0.4 |" in section
    assert "**Bound.** A token that is not drawn" in section and "**Left.** A larger `stop_every` reads" in section
    assert "Not measured: stopping responses early" not in page


def test_check_fails_when_a_file_is_not_what_the_results_give(site, capsys):
    assert performance.main(check=True) == 1
    performance.main(check=False)
    (site / "performance" / "sample-rates.svg").write_text("<svg/>")
    assert performance.main(check=True) == 1
    assert "sample-rates.svg out of date: run make docs" in capsys.readouterr().err
    performance.main(check=False)
    (site / "performance" / "old.svg").write_text("<svg/>")
    assert performance.main(check=True) == 1
    performance.main(check=False)
    assert performance.main(check=True) == 0 and not (site / "performance" / "old.svg").exists()


def test_results_of_another_format_are_not_shown(site):
    machine = performance.REFERENCE
    (site / "results" / machine / "head.json").write_text(json.dumps({"machine": {}, "rows": [[1]]}))
    assert performance.load(machine, "head") is None and performance.load(machine, "step") is None


def test_every_further_machine_has_a_column_and_a_page(site, monkeypatch):
    real = measure.machine()
    monkeypatch.setattr(measure, "machine", lambda: real | {"processor": "Another (TM) 9", "cores": 64})
    assert measure.known("sample") is None  # another machine's numbers are not taken for this one's
    goals = [Target("ratio of short", ">= 2", "1.5", False), Target("a new one", "< 1", "0.5", True)]
    table = Table("Rates", ["work", "ours tok/s", "ours / generate"], [["short", 9.0, 1.5]])
    path = measure.write("sample", "python benchmarks/sample.py", [table], goals, {})
    name = f"another-tm-9-{real['instructions'].lower()}-64-cores"
    assert path == site / "results" / name / "sample.json"
    performance.main(check=False)
    page = (site / "performance.md").read_text()
    assert f"* [{name}](performance/{name}.md): 1 of 2 targets are met." in page
    assert f"| benchmark | what | target | {performance.REFERENCE} | {name} |" in page
    assert "| ratio of short | >= 2 | 2.5 | **1.5, missed** |" in page and "| a new one | < 1 | - | 0.5 |" in page
    own = (site / "performance" / f"{name}.md").read_text()
    assert "| short | 9 | 1.5 |" in own and "The vocabulary head" not in own
    assert f"![Rates]({name}/sample-rates.svg)" in own
    assert (site / "performance" / name / "sample-rates.svg").is_file() and "| short | 9 | 1.5 |" not in page
    measure.write("head", "python benchmarks/head.py", [Table("Seconds", ["V"], [[7]])], [], {})
    performance.main(check=False)
    assert "**Seconds**\n\n| V |\n|---|\n| 7 |" in (site / "performance.md").read_text()  # the reference has none
    assert performance.main(check=True) == 0


def test_a_chart_of_its_own_takes_the_place_of_ratios(site):
    chart = Chart("Time over V", "V", "seconds", {"a": [[1, 2.0], [4, 8.0]], "a, bound": [[1, 1.0], [4, 4.0]]})
    measure.write("scaling", "python benchmarks/scaling.py", [], [], {}, [chart])
    files = [path.name for path in performance.build()]
    assert files == ["sample-rates.svg", "scaling-time-over-v.svg", "performance.md"]


def test_ratios_are_drawn_where_a_table_has_them():
    assert performance.ratio_bars(Table("t", ["V", "ours s"], [[4, 0.5]])) is None
    assert performance.ratio_bars(Table("t", ["ours / a"], [[0.5]])) is None  # a bar without a label
    long = Table("t", ["V", "ours / a"], [[i, 0.5] for i in range(performance.MOST_BARS + 1)])
    assert performance.ratio_bars(long) is None
    found = performance.ratio_bars(
        Table("t", ["V", "loss", "s", "ours / a"], [[4, "jsd", 1.0, 0.5], [8, "jsd", 1.0, None]])
    )
    assert found == Chart("t", "V, loss", "ratio", {"ours / a": [["4, jsd", 0.5]]})


# ---------------------------------------------------------------------------------------------------------------------
# Plots


def points(drawing: str, kind: str) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}polyline")
    found = [line.get("points", "").split() for line in lines if kind in line.get("class", "")]
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line)] for line in found]


def test_a_power_is_a_straight_line_and_its_bound_is_dashed():
    chart = Chart(
        "a < b & c", "N", "s", {"full": [[1, 1.0], [4, 16.0], [16, 256.0]], "full, bound": [[1, 0.5], [16, 8.0]]}
    )
    drawing = svg(chart)
    assert drawing == svg(chart) and len(points(drawing, "dash")) == 1
    ((a, b, c),) = points(drawing, "line")
    assert b == (pytest.approx((a[0] + c[0]) / 2, abs=0.1), pytest.approx((a[1] + c[1]) / 2, abs=0.1))


def test_lines_that_hardly_rise_look_flat():
    ((a, b),) = points(svg(Chart("t", "K", "s", {"x": [[1, 1.0], [64, 1.02]]})), "line")
    assert b[0] > a[0] and 0 < a[1] - b[1] < 4  # pixels


def test_bars_are_as_long_as_their_values():
    drawing = ElementTree.fromstring(svg(Chart("t", "V", "ratio", {"x": [["a", 1.0], ["b", 4.0]], "y": [["b", 2.0]]})))
    bars = [r for r in drawing.iter("{http://www.w3.org/2000/svg}rect") if r.get("x") == "250"]
    widths = [float(r.get("width", "")) for r in bars]
    assert widths[1] / widths[0] == pytest.approx(4, rel=1e-2) and widths[2] / widths[0] == pytest.approx(2, rel=1e-2)


def test_what_has_no_logarithm_or_no_points_is_refused():
    for lines in ({}, {"a": []}, {"a": [[1, 0.0]]}, {"a": [[0, 1.0]]}):
        with pytest.raises(ValueError, match="'t' needs points, all positive"):
            svg(Chart("t", "x", "y", lines))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.5, 2000, [1, 10, 100, 1000]), (0.2, 4, [0.3, 1, 3]), (90, 240, [90, 100, 150, 200]), (1.0, 1.1, [1])],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high) == expected
