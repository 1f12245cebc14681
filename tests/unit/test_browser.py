"""Reports in a real browser, opened from disk."""

import os
import shutil
from pathlib import Path

import pytest
from runs_on_disk import page_of, sample, write_run

from listopd_ray.report.page import write_page

sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = os.environ.get("CHROME") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium here, and CHROME names none")
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg/onload=window.hacked=1>",
    "\"><iframe srcdoc='<script>top.hacked=1</script>'>",
    "javascript:window.hacked=1",
    "{{ 7 * 7 }} ${window.hacked = 1} <!-- ]]> \u2028",
    "<a href='javascript:window.hacked=1'>click</a>",
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def look(browser):
    """Open a page and draw all of it; what went wrong comes with it."""

    def look(file: Path, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        page, wrong = context.new_page(), []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: r.url == file.as_uri() or wrong.append(r.url))
        page.goto(file.as_uri())
        page.evaluate("plots.forEach(draw)")
        page.wait_for_function("[...document.querySelectorAll('.plot')].every(p => p._fullLayout)")
        return page, wrong

    return look


def study(root):
    for seed in (0, 1):
        for lam in (1.0, 1.5, 2.0):
            rows = [sample(), sample(id="q2")]
            write_run(root, f"lam{lam}-s{seed}", lam=lam, seed=seed, samples=rows)
    return write_page(sorted(root.iterdir()), root.parent / "page.html")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_comparison_draws_without_an_error_a_request_or_a_sideways_scroll(
    tmp_path, look, width, scheme
):
    page, wrong = look(study(tmp_path / "runs"), width, color_scheme=scheme)
    assert wrong == []
    assert page.locator(".js-plotly-plot").count() == page.locator(".plot").count() > 8
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ink = page.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill")
    assert (ink == "rgb(230, 235, 240)") == (scheme == "dark")


def test_hostile_texts_are_shown_and_not_run(tmp_path, look):
    rows = [sample(id=text, prompt=text, completion=text, reason=text) for text in HOSTILE]
    taught = [row | {"tokens": [row["prompt"]], "advantages": [1.0]} for row in rows]
    updates = [{"train/step": 4, "histograms": {}, "rollouts": taught}]
    for number, text in enumerate(HOSTILE):
        text = text.replace("${", "{")  # no configuration can hold this
        name = f"{number}{text}".replace("/", "∕").replace("\u2028", "")
        write_run(tmp_path / "runs", name, samples=rows, updates=updates, data__path=text)
    runs = sorted((tmp_path / "runs").iterdir())
    for file in (page_of(runs[0]), write_page(runs, tmp_path / "page.html", ["name"])):
        page, wrong = look(file)
        for button in page.locator(".legend button").all()[-3:]:
            button.click()
        assert wrong == []
        assert page.evaluate("window.hacked") is None
        assert (
            page.locator("iframe, img, .answer script, .legend script, a[href^=java]").count() == 0
        )
        shown = page.locator("body").inner_text()
        assert all(text.strip().split("\u2028")[0].strip() in shown for text in HOSTILE[:6])


def test_groups_can_be_hidden_and_curves_held_against_tokens(tmp_path, look):
    page, _ = look(study(tmp_path / "runs"))
    lines = "document.querySelector('#curves .plot').data.filter(t => t.meta.metric)"
    button = page.locator("button.group").first
    assert page.evaluate(f"{lines}.map(t => t.visible)") == [True, True, True]
    button.click()
    assert page.evaluate(f"{lines}.map(t => t.visible)") == [False, True, True]
    button.click()
    button.dblclick()
    assert page.evaluate(f"{lines}.map(t => t.visible)") == [True, False, False]
    assert page.evaluate(f"{lines}[0].x") == [1, 2, 3, 4]
    button.click(modifiers=["Shift"])
    assert page.evaluate(f"{lines}.map(t => t.visible)") == [True, True, True]
    plot = "document.querySelector('#curves .plot')"
    page.evaluate(f"Plotly.relayout({plot}, {{'xaxis.range': [1, 2]}})")  # as zooming does
    page.locator("button[data-axis=tokens]").click()
    assert page.evaluate(f"{plot}.layout.xaxis.range[1]") > 300
    assert page.evaluate(f"{lines}[0].x") == [100, 200, 300, 400]
    title = "document.querySelector('#curves .plot').layout.xaxis.title.text"
    assert page.evaluate(title) == "generated tokens"


def test_a_family_can_be_hidden_and_follows_its_groups(tmp_path, look):
    for form in ("plain", "bounded"):
        for lam in (1.5, 2.0):
            write_run(tmp_path / "runs", f"{form}{lam}", lam=lam, extrapolation=form)
    page, wrong = look(write_page(sorted((tmp_path / "runs").iterdir()), tmp_path / "page.html"))
    families, groups = page.locator("button.family"), page.locator("button.group")
    assert families.all_inner_texts() == ["plain", "bounded"]
    families.first.click()
    pressed = [button.get_attribute("aria-pressed") for button in groups.all()]
    assert pressed == ["false", "false", "true", "true"]  # the legend goes family by family
    groups.last.dblclick()
    families.first.click()
    assert families.first.get_attribute("aria-pressed") == "true"
    groups.first.click()
    assert wrong == []
