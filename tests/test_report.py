"""The report: numbers by hand, and the page itself driven in a real headless Chromium."""

import json
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from opdkit.errors import RunError
from opdkit.report import write_report

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
HOSTILE = "</script><script>window.hacked = true</script>"


def token(text: str, student: float, teacher: float) -> dict:
    return {"id": 7, "text": text, "student": student, "teacher": teacher, "signal": teacher - student, "entropy": 0.5,
            "student_top": [[text, 0.625], ["x", 0.25]], "teacher_top": [["x", 0.75], [text, 0.125]]}  # fmt: skip


def rollout(prompt: str, *tokens: str) -> dict:
    return {"prompt": prompt, "text": "".join(tokens), "reward": 1.0, "correct": True, "finish": "stop",
            "source": "policy", "domain": "sums", "tokens": [token(t, -0.47, -2.08) for t in tokens]}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run of 20 steps: accuracy 10 % before, 70 % after, teacher 90 %."""
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "recipe.yaml").write_text("method: {name: opd}\nstudent: {path: s}\ntrain: {steps: 20}\n")
    information = {
        "opdkit": "0.1.0", "method": "opd:\n  term 1.0", "method_doc": "Sampled-token OPD", "paper": "arXiv:2604.13016",
        "created": "2026-11-22T10:00:00+00:00", "finished": "2026-11-22T10:01:00+00:00", "seconds": 60.0, "device": "cpu",
        "student": {"path": "s", "parameters": 1000, "vocab": 50}, "threads": 2,
        "teachers": {"teacher": {"path": "t", "parameters": 2000, "vocab": 50}},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(information))
    rows = [{"step": i, "loss": 1 / i, "reverse_kl": 1 / i, "overlap_ratio": 0.5, "overlap_chance": 0.08, "grad_norm": 1.0,
             "seconds/sample": 0.1, "seconds/update": 0.2, "seconds/step": 0.3} for i in range(1, 21)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evals = [{"step": s, "who": w, "accuracy": a, "accuracy_se": 0.02, "problems": 100, "samples": 1, "reverse_kl": k,
              "reverse_kl_se": 0.01, "response_length": 9.0, "clipped_share": 0.0}
             for s, w, a, k in [(0, "student", 0.1, 0.8), (0, "teacher", 0.9, None), (20, "student", 0.7, 0.2)]]  # fmt: skip
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals))
    for step in (10, 20):
        shown = [rollout(f"prompt at {step}", "a", HOSTILE, f"token{step}"), rollout("other", "b")]
        (tmp_path / "rollouts" / f"step-{step:06d}.json").write_text(json.dumps({"step": step, "rollouts": shown}))
    return tmp_path


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "this test drives the report in a real browser: install Chromium (`make test` does it on Debian)"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(browser, run):
    """The opened report; console messages and requests are collected on the page object's lists."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    messages: list[str] = []
    requests: list[str] = []
    opened.on("console", lambda message: messages.append(message.text))
    opened.on("pageerror", lambda error: messages.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(f"file://{write_report(run)}")
    opened.wait_for_selector(".plot .main-svg")
    yield opened, messages, requests
    opened.close()


def test_the_page_is_one_file_without_errors_or_requests(page):
    opened, messages, requests = page
    assert messages == []
    assert len(requests) == 1 and requests[0].startswith("file:")
    assert opened.evaluate("window.hacked") is None


def test_the_gap_recovered_is_computed_by_hand(page):
    opened, *_ = page  # (0.7 - 0.1) / (0.9 - 0.1)
    assert opened.locator("#gap-recovered").inner_text().startswith("75")
    text = opened.locator("#results").inner_text()
    assert "10.0%" in text and "70.0%" in text and "90.0%" in text


def test_every_chart_has_a_curve_and_a_sentence(page):
    opened, *_ = page
    opened.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    plots = opened.locator(".plot")
    count = plots.count()
    assert count >= 6
    for i in range(count):
        plots.nth(i).scroll_into_view_if_needed()
        plots.nth(i).locator(".main-svg").first.wait_for()
    assert opened.locator("#curves p").count() >= count


def test_hovering_a_token_shows_both_sides(page):
    opened, *_ = page
    tokens = opened.locator("#response [role=option]")
    assert tokens.count() == 3
    tokens.nth(0).hover()
    shown = opened.locator("#inspector").inner_text()
    for part in ("62.5%", "12.5%", "75.0%", "25.0%", "1.61"):  # student, teacher, their top lists, the signal
        assert part in shown, shown
    assert "disfavours" in shown


def test_the_step_and_the_rollout_can_be_chosen(page):
    opened, *_ = page
    assert "prompt at 20" in opened.locator("#prompt").inner_text()
    opened.select_option("#step", index=0)
    assert "prompt at 10" in opened.locator("#prompt").inner_text()
    assert "token10" in opened.locator("#response").inner_text()
    opened.click("#rollout-on")
    assert "other" in opened.locator("#prompt").inner_text()


def test_hostile_text_is_text(page):
    opened, *_ = page
    assert HOSTILE in opened.locator("#response").inner_text()


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(RunError, match=r"run\.json"):
        write_report(tmp_path)


def test_a_broken_line_is_named_and_a_broken_last_line_is_dropped(run):
    log = run / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 21, "lo')
    assert write_report(run).stat().st_size < 6e6
    log.write_text("not json\n" + whole)
    with pytest.raises(RunError, match=r"metrics\.jsonl:1"):
        write_report(run)


def test_an_unfinished_run_has_a_report(run):
    (run / "evals.jsonl").unlink()
    shutil.rmtree(run / "rollouts")
    (run / "metrics.jsonl").write_text("")
    assert "opd" in write_report(run).read_text()
