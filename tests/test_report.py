"""The report: its numbers by hand, its errors, and the page itself in a real headless Chromium."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Browser, Page, sync_playwright

from opdkit.errors import RunError
from opdkit.report import write_report
from opdkit.report.charts import build_charts, rolling_mean, thin
from opdkit.report.read import Evaluation, KeptRollout, KeptStep, RunInfo, Token, read_run
from opdkit.report.results import gap_recovered, results
from opdkit.report.text import count, duration, moment, number, percent
from opdkit.report.tokens import MAX_ROLLOUT_TOKENS, MAX_TOKENS, colour_limit, pack_tokens, sampled_reverse_kl
from opdkit.report.write import about, paper_link

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def token(text: str, student: float, teacher: float, student_top: list[Any], teacher_top: list[Any]) -> dict[str, Any]:
    gap = math.log(teacher) - math.log(student)
    scores = {"student": math.log(student), "teacher": math.log(teacher), "signal": gap, "entropy": 0.5}
    return {"id": 7, "text": text, **scores, "student_top": student_top, "teacher_top": teacher_top}


def rollout(prompt: str, tokens: list[dict[str, Any]], correct: bool = True) -> dict[str, Any]:
    text = "".join(t["text"] for t in tokens)
    verdict = {"reward": float(correct), "correct": correct, "finish": "stop" if correct else "length"}
    return {"prompt": prompt, "text": text, **verdict, "source": "policy", "domain": "sums", "tokens": tokens}


def evaluation(step: int, who: str, accuracy: float, se: float, reverse_kl: float | None = None) -> dict[str, Any]:
    kl = {"reverse_kl": reverse_kl, "reverse_kl_se": None if reverse_kl is None else 0.01}
    extra = {"problems": 200, "samples": 1, "response_length": 22.0, "clipped_share": 0.0}
    return {"step": step, "who": who, "accuracy": accuracy, "accuracy_se": se, **kl, **extra}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(folder: Path, teacher: str = "teacher", teacher_accuracy: float = 0.9) -> Path:
    """A run of 60 steps with two kept steps, two rollouts each, hostile texts everywhere a text can stand."""
    (folder / "rollouts").mkdir(parents=True)
    info = {
        "opdkit": "0.1.0",
        "method": f"Method(\n  note={HOSTILE!r},\n)",
        "method_doc": "Follow the teacher & stay <calm>.",
        "paper": "arXiv:2604.13016",
        "created": "2026-11-22T18:57:12+00:00",
        "finished": "2026-11-22T19:00:36+00:00",
        "seconds": 204.3,
        "student": {"path": "testbed:small", "parameters": 217344, "vocab": 260},
        "teachers": {teacher: {"path": HOSTILE, "parameters": 588928, "vocab": 260}},
        "device": "cpu",
        "threads": 2,
    }
    (folder / "run.json").write_text(json.dumps(info))
    recipe = {"method": {"name": "opd"}, "task": {"kind": "testbed", "name": HOSTILE}, "train": {"steps": 60}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    metrics = [{"step": s, "loss": 1 / s, "reverse_kl": 0.6 / s, "tokens_per_second": 9000.0} for s in range(1, 61)]
    (folder / "metrics.jsonl").write_text(lines(metrics))
    evals = [
        evaluation(0, "student", 0.2, 0.04, 0.5),
        evaluation(0, teacher, teacher_accuracy, 0.02),
        evaluation(60, "student", 0.7, 0.03, 0.05),
    ]
    (folder / "evals.jsonl").write_text(lines(evals))
    for step in (25, 50):
        first = [
            token(" sum", 0.8, 0.2, [[" sum", 0.8], [" is", 0.15]], [[" the", 0.55], [" sum", 0.2]]),
            token(HOSTILE, 0.5, 0.6, [[HOSTILE, 0.5], ["<b>", 0.3]], [[HOSTILE, 0.6], ["\n", 0.1]]),
            token("\n", 0.25, 0.5, [["\n", 0.25]], [["\n", 0.5]]),
        ]
        second = [token(f"second{step}", 0.5, 0.5, [], [])]
        kept = [rollout(f"prompt of step {step} {HOSTILE}", first), rollout("other prompt", second, correct=False)]
        (folder / f"rollouts/step-{step:06d}.json").write_text(json.dumps({"step": step, "rollouts": kept}))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.fail(
            "the report's test needs Chromium: run `make test`, which installs it, or `apt-get install chromium`"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The report of make_run with a hostile teacher name, loaded from disk; complaints are collected on the way."""
    path = write_report(
        make_run(tmp_path_factory.mktemp("runs") / "demo", teacher="big<img src=x onerror=window.hacked=1>")
    )
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    complaints: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: None if request.url == path.as_uri() else complaints.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    yield page
    context.close()
    assert complaints == []  # after everything that the tests did to the page


def test_gap_recovered_by_hand() -> None:
    before, after, teacher = (
        Evaluation(step=s, who=w, accuracy=a, accuracy_se=e)
        for s, w, a, e in ((0, "student", 0.2, 0.04), (60, "student", 0.7, 0.03), (0, "t", 0.9, 0.02))
    )
    gap = gap_recovered(before, after, teacher)
    assert gap is not None and gap.se is not None
    assert gap.recovered == pytest.approx(5 / 7)
    # slopes 2/7, 1, 5/7 on the three errors, over the room of 0.7
    assert gap.se == pytest.approx(math.sqrt((0.08 / 7) ** 2 + 0.03**2 + (0.1 / 7) ** 2) / 0.7)
    assert gap_recovered(before, after, teacher.model_copy(update={"accuracy": 0.2})) is None


def test_page_says_what_was_recovered_or_why_not(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "ahead")).read_text()
    assert "(70.0% − 20.0%) / (90.0% − 20.0%) = 71.4%" in page
    assert '<p class="big" id="gap-recovered">71.4%<small>± 5.0%</small></p>' in page
    behind = write_report(make_run(tmp_path / "behind", teacher_accuracy=0.1)).read_text()
    assert "the teacher was not ahead of the student before training" in behind
    assert "gap-recovered" not in behind


def test_after_is_the_last_evaluation_and_the_best_teacher_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rows = [evaluation(s, "student", a, 0.0) for s, a in ((0, 0.0), (30, 0.3), (60, 0.6))]
    rows += [evaluation(0, "weak", 0.5, 0.0), evaluation(0, "strong", 0.8, 0.0)]
    (run / "evals.jsonl").write_text(lines(rows))
    found = results(read_run(run))
    assert found.after is not None and found.after.step == 60
    assert found.gap is not None and (found.gap.teacher, found.gap.recovered) == ("strong", pytest.approx(0.75))
    weak = found.gap_to("weak")
    assert weak is not None and weak.recovered == pytest.approx(1.2)


def test_file_is_small_stable_and_holds_no_hostile_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = write_report(run).read_bytes()
    assert len(page) < 6_000_000
    assert write_report(run).read_bytes() == page
    assert HOSTILE.encode() not in page and b"<img" not in page
    assert page.count(b"</script>") == 3  # plotly, data, our code
    assert [p.name for p in run.glob("report*")] == ["report.html"]


def test_unfinished_run_without_metrics_or_evaluations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    info = json.loads((run / "run.json").read_text()) | {"finished": None, "seconds": None}
    (run / "run.json").write_text(json.dumps(info))
    (run / "metrics.jsonl").unlink()
    (run / "evals.jsonl").unlink()
    shutil.rmtree(run / "rollouts")
    page = write_report(run).read_text()
    assert "unfinished" in page and "of 60" in page
    for section in ("results", "curves", "tokens"):
        assert f'<section id="{section}">' not in page


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no folder '.*nowhere'"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"is not a run folder: it has no run\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', r"metrics\.jsonl:2 is not valid JSON"),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}\n', r"metrics\.jsonl:1: 'loss' is 'low', expected a number"),
        ("metrics.jsonl", '{"loss": 1.0}\n', r"metrics\.jsonl:1: 'step' is None"),
        ("metrics.jsonl", "[1]\n", r"metrics\.jsonl:1 holds list, expected an object"),
        ("evals.jsonl", '{"step": 0, "who": "student", "accuracy": "high"}\n', r"evals\.jsonl:1: 'accuracy'"),
        ("rollouts/step-000025.json", '{"step": 25, "roll', r"step-000025\.json is not valid JSON"),
        ("rollouts/step-000025.json", '{"step": 25, "rollouts": [{}]}', r"step-000025\.json: 'rollouts\.0\.prompt'"),
        ("recipe.yaml", "a: [", r"recipe\.yaml is not valid YAML"),
        ("run.json", "{}", r"run\.json: 'opdkit'"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text(text)
    with pytest.raises(RunError, match=message):
        write_report(run)


def test_broken_last_line_is_dropped_with_a_note(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 61, "loss": 0.0, "na\xc3')
    data = read_run(run)
    assert [row["step"] for row in data.metrics] == list(range(1, 61))
    assert data.notes == ["The last line of metrics.jsonl (line 61) was cut off, as after a crash; it is left out."]
    assert data.notes[0] in write_report(run).read_text()


def test_repeated_steps_and_nan(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 1}\n{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3}\n')
    assert read_run(run).metrics == [{"step": 1, "loss": None}, {"step": 2, "loss": 3}]


def test_charts_of_what_the_run_has(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    row = {"reverse_kl/a": 0.5, "reverse_kl/b": 0.7, "overlap_chance": 0.1, "seconds/sample": 1.0, "seconds/judge": 2.0}
    (run / "metrics.jsonl").write_text(lines([{"step": 1, "custom": 4.0, "seconds/step": 3.0, **row}]))
    (run / "evals.jsonl").unlink()
    charts = {c.title: c for members in build_charts(read_run(run)).values() for c in members}
    assert set(charts) == {"Reverse KL on the rollouts", "Time of a step", "custom"}  # chance alone is no chart
    assert [(s.name, s.colour, s.y) for s in charts["Reverse KL on the rollouts"].series] == [
        ("a", "student", (0.5,)),
        ("b", "third", (0.7,)),
    ]
    assert [(s.name, s.y) for s in charts["Time of a step"].series] == [("sample", (1.0,)), ("judge", (2.0,))]


def test_thinning_and_smoothing() -> None:
    assert thin([1.0, 3.0, 5.0, 7.0, 10.0], 3) == [2.0, 6.0, 10.0]
    assert thin([1.0, 2.0], 2) == [1.0, 2.0]
    slope = [float(i) for i in range(100)]
    mean = rolling_mean(slope)  # windows of 11, at the ends of 3 on one side
    assert mean[2:-2] == pytest.approx(slope[2:-2])
    assert (mean[0], mean[-1]) == (1.0, 98.0)


def test_token_packing_by_hand() -> None:
    tokens = [
        Token(id=i, text=text, student=student, teacher=teacher, signal=signal, student_top=[(text, 0.123456)])
        for i, text, student, teacher, signal in ((5, "a", -1.0, -2.5, -1.5), (6, "b", -0.5, -0.25, 0.25))
    ]
    one = KeptRollout(prompt="p", tokens=tokens)
    assert sampled_reverse_kl(one) == pytest.approx((1.5 - 0.25) / 2)
    packed = pack_tokens([KeptStep(step=1, rollouts=[one])], [])
    assert packed["texts"] == ["a", "b"]
    assert packed["steps"][0]["rollouts"][0]["tokens"][1] == [6, 1, -0.5, -0.25, 0.25, None, [1, 0.1235], []]
    assert colour_limit([0.01 * i for i in range(100)] + [-50.0]) == pytest.approx(0.95)
    assert colour_limit([]) == 1.0


def test_token_viewer_is_bounded() -> None:
    long = KeptRollout(prompt="p", tokens=[Token(id=0, text="x")] * (MAX_ROLLOUT_TOKENS + 1))
    notes: list[str] = []
    packed = pack_tokens([KeptStep(step=s, rollouts=[long] * 4) for s in range(1, 9)], notes)
    rollouts = [r for k in packed["steps"] for r in k["rollouts"]]
    assert packed["steps"][0]["step"] == 1 and packed["steps"][-1]["step"] == 8
    assert sum(len(r["tokens"]) for r in rollouts) <= MAX_TOKENS
    assert {r["length"] for r in rollouts} == {MAX_ROLLOUT_TOKENS + 1}
    assert notes[0].startswith(f"The token viewer holds {len(rollouts)} of the 32 kept rollouts")


def test_words_for_numbers() -> None:
    assert [number(x) for x in (0.03124, 9310.4, -1.5, 0.0, 1.5e-5, -1.5e-5, None)] == [
        *("0.0312", "9,310", "−1.50", "0", "1.50e-05", "−1.50e-05", "–"),
    ]
    assert [percent(x) for x in (0.864, -0.1, None)] == ["86.4%", "−10.0%", "–"]
    assert [duration(x) for x in (12.34, 204.3, 59.97, 7500.0)] == ["12.3 s", "3 min 24 s", "1 min 0 s", "2 h 5 min"]
    assert [count(x) for x in (217_344, 588_928, 1_700_000_000, 12)] == ["217 k", "0.589 M", "1.7 B", "12"]
    assert moment("2026-11-22T18:57:12+00:00") == "2026-11-22 18:57 UTC"
    assert paper_link("arXiv:2604.13016") == "https://arxiv.org/abs/2604.13016"
    assert paper_link("javascript:alert(1)") is None


def test_the_paper_is_said_once() -> None:
    info = RunInfo(opdkit="0", method="m", method_doc="Match the teacher (arXiv:2604.13016).", paper="arXiv:2604.13016")
    assert about(info) == ("Match the teacher (", "arXiv:2604.13016", ").")
    assert about(info.model_copy(update={"method_doc": "Match."})) == ("Match. ", "arXiv:2604.13016", "")
    assert about(info.model_copy(update={"method_doc": None, "paper": None})) == ("", "", "")


def test_browser_draws_every_chart(page: Page) -> None:
    titles = page.locator(".chart h4").all_inner_texts()
    assert titles == ["Held-out accuracy", "Loss", "Held-out reverse KL", "Reverse KL on the rollouts", "Throughput"]
    assert page.locator(".chart .js-plotly-plot .scatterlayer .trace .js-line").count() >= len(titles)
    assert page.locator("#failure").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def top_list(page: Page, column: int) -> list[tuple[str, str]]:
    rows = page.locator(f"#inspector .tops > div:nth-child({column}) .top-row").all()
    return [(row.locator("span").nth(0).inner_text(), row.locator("span").nth(1).inner_text()) for row in rows]


def test_browser_hover_shows_both_top_lists(page: Page) -> None:
    page.select_option("#step", label="step 25")
    page.select_option("#rollout", index=0)
    page.locator(".tok").nth(0).hover()
    assert page.locator("#inspector .name").inner_text() == "␣sum"
    assert top_list(page, 1) == [("␣sum", "80.0%"), ("␣is", "15.0%")]
    assert top_list(page, 2) == [("␣the", "55.0%"), ("␣sum", "20.0%")]
    panel = page.locator("#inspector").inner_text()
    assert "80.0%\t20.0%" in panel and "−0.223\t−1.609" in panel  # probabilities; ln 0.8 and ln 0.2
    assert "−1.386 nats" in panel and "teacher disfavours" in panel  # ln(0.2 / 0.8)
    assert "id 7, token 1 of 3" in panel
    student_bar = page.locator("#inspector .tops > div:nth-child(1) .meter i")
    widths = [bar.evaluate("bar => bar.style.width") for bar in student_bar.all()]
    assert widths == ["80%", "15%"]
    assert [bar.get_attribute("class") for bar in student_bar.all()] == [None, "alone"]  # " is" is in one list only


def test_browser_keyboard_moves_and_click_holds(page: Page) -> None:
    page.select_option("#step", label="step 25")
    page.select_option("#rollout", index=0)
    page.locator(".tok").nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#inspector .name").inner_text() == HOSTILE
    assert top_list(page, 2) == [(HOSTILE, "60.0%"), ("↵", "10.0%")]
    page.keyboard.press("End")
    assert page.locator("#inspector .name").inner_text() == "↵"
    page.locator(".tok").nth(0).click()
    page.locator(".tok").nth(2).hover()
    assert page.locator("#inspector .name").inner_text() == "␣sum"
    page.keyboard.press("Escape")
    page.locator(".tok").nth(1).hover()
    assert page.locator("#inspector .name").inner_text() == HOSTILE


def test_browser_step_and_rollout_change_what_is_shown(page: Page) -> None:
    page.select_option("#step", label="step 25")
    page.select_option("#rollout", index=0)
    assert page.locator("#prompt").inner_text() == f"prompt of step 25 {HOSTILE}"
    facts = page.locator("#facts").inner_text()
    # mean of ln(0.8/0.2), ln(0.5/0.6), ln(0.25/0.5) = 0.1703
    assert "correct" in facts and "mean reverse KL 0.170 nats/token" in facts and "ended by itself" in facts
    page.click("#step-on")
    assert page.locator("#prompt").inner_text() == f"prompt of step 50 {HOSTILE}"
    assert page.locator("#step-on").is_disabled()
    page.click("#rollout-on")
    assert page.locator("#response").inner_text() == "second50"
    facts = page.locator("#facts").inner_text()
    assert "wrong" in facts and "cut off by the length limit" in facts and "domain sums" in facts
    page.select_option("#step", label="step 25")
    assert page.locator("#response").inner_text() == "second25"


def test_browser_colours_follow_the_signal_and_the_scale(page: Page) -> None:
    page.select_option("#step", label="step 25")
    page.select_option("#rollout", index=0)
    tokens = page.locator(".tok")
    read = "t => [t.style.getPropertyValue('--c'), Number(t.style.getPropertyValue('--s'))]"
    page.select_option("#scale", "rollout")
    assert page.locator(".bounds").inner_text().split() == ["−1.39", "0", "+1.39", "nats"]
    colours = [tokens.nth(i).evaluate(read) for i in range(3)]
    assert [c for c, _ in colours] == ["var(--disfavour)", "var(--favour)", "var(--favour)"]
    assert [s for _, s in colours] == pytest.approx([1.0, 0.132, 0.5], abs=1e-3)  # ln 1.2 / ln 4, ln 2 / ln 4
    page.select_option("#scale", "run")
    assert page.locator("#legend-max").inner_text().startswith("≥ +")


def test_browser_theme_and_hostile_text(page: Page) -> None:
    shade = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(shade)
    page.click("#theme")
    assert page.evaluate(shade) != light
    page.click("#theme")
    assert page.evaluate(shade) == light
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert HOSTILE in page.locator("#setup").inner_text()


def test_several_teachers_have_a_reverse_kl_each(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rows = [evaluation(step, "student", 0.5, 0.03) | {"reverse_kl/tutor": 0.4 / (step + 1), "reverse_kl_se/tutor": 0.05,
            "reverse_kl/reference": 0.1 * step} for step in (0, 3)]  # fmt: skip
    (run / "evals.jsonl").write_text(lines(rows))
    page = write_report(run).read_text()
    for tutor, reference in ((r"0\.40*", "0"), (r"0\.10*", r"0\.30*")):
        cell = rf"<small>tutor</small> {tutor}<span class=\"error\"> ± 0\.050?</span><br><small>reference</small> {reference}"
        assert re.search(cell, page)
    found = {s.name: (s.x, s.y, s.error) for part in build_charts(read_run(run)).values()
             for c in part if c.title == "Held-out reverse KL" for s in c.series}  # fmt: skip
    assert found["to tutor"] == ((0.0, 3.0), (0.4, 0.1), (0.05, 0.05))
    assert found["to reference"] == ((0.0, 3.0), (0.0, pytest.approx(0.3)), (0.0, 0.0))
