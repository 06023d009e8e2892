"""Both pages in a real browser, where one is installed: what is seen, and nothing that goes wrong."""

import pytest
from browser import CHROMIUM, Browser
from pages import GOLDEN, HOSTILE, a_model, a_pair_file, a_run, judged_of

from support import report
from support.run import quantiles

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser():
    with Browser() as one:
        yield one


def look(browser, path, width):
    seen = browser.look(path, width)
    assert seen.ready and seen.errors == [] and seen.requests == []
    assert seen.scroll_width <= seen.inner_width == width
    return seen


def texts(browser, selector):
    return browser.evaluate(f"[...document.querySelectorAll({selector!r})].map(one => one.textContent)")


def click(browser, selector):
    browser.evaluate(f"document.querySelector({selector!r}).click()")


@pytest.fixture(scope="module")
def pairs_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "pairs.html"
    pairs, judged = a_pair_file()
    figures = {"pairs": 40, "accuracy": 0.5, "intervals": {"accuracy": (0.4, float("nan"))},
               "generators": {"a / b<i>": {"pairs": 3, "accuracy": float("nan")}}}
    report.write_page(path, a_model(), judged, pairs, figures)
    return path, pairs, judged


@pytest.mark.parametrize("width", WIDTHS)
def test_pairs_are_seen_the_most_wrong_first(browser, pairs_page, width):
    path, pairs, judged = pairs_page
    look(browser, path, width)
    shown = browser.evaluate("[...document.querySelectorAll('.score')].map(one => Number(one.dataset.score))")
    scores = {record["score"] for record in judged.values() if "score" in record}
    assert 40 <= len(shown) and set(shown) <= scores
    human = {pair.prompt: (pair.human, [judged[key].get("score") for key in pair.videos()]) for pair in pairs}
    prompts = texts(browser, ".pair h2")
    badges = texts(browser, ".pair .badge")
    found = []
    for prompt, badge in zip(prompts, badges):
        label, (a, b) = human[prompt.replace("\ufffd", "\ud800")]
        if badge == "✗ wrong":
            found.append(label * (a - b))
            assert label * (a - b) <= 0
    assert found == sorted(found) and len(found) > 3
    assert browser.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    assert texts(browser, ".tile b")[:2] == ["40", "0.500"]


def test_pairs_can_be_chosen(browser, pairs_page):
    path, pairs, _ = pairs_page
    look(browser, path, 1280)
    for verdict in ("right", "wrong", "tie", "unreadable"):
        click(browser, f"button[value={verdict}]")
        marks = "[...document.querySelectorAll('.pair')].map(one => one.dataset.verdict)"
        assert set(browser.evaluate(marks)) == {verdict}
    assert "it is cut short" in " ".join(texts(browser, ".error")) or texts(browser, ".error") == []
    click(browser, "button[value=all]")
    browser.evaluate("""(() => { const one = document.querySelector('select[aria-label=generator]');
        one.value = "ci\\"n'der<b>"; one.dispatchEvent(new Event('change')); })()""")
    count = sum("ci\"n'der<b>" in (pair.model_a, pair.model_b) for pair in pairs)
    assert texts(browser, "[role=status]") == [f"{count} of 40 pairs"]
    browser.evaluate("""(() => { const one = document.querySelector('input[type=search]');
        one.value = "ONERROR"; one.dispatchEvent(new Event('input')); })()""")
    assert len(texts(browser, ".pair")) <= 1
    assert browser.errors() == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [1, 3])
def test_videos_are_seen_the_best_first(browser, tmp_path, width, count):
    videos = [str(GOLDEN / f"{name}.mp4") for name in ("two", "portrait")][: max(1, count - 1)]
    judged = {}
    for score, video in enumerate(videos):
        judged |= judged_of([video], HOSTILE, HOSTILE if score else None, float(score))
    if count > 1:
        record = {"video": "gone.mp4", "prompt": HOSTILE, "error": "gone.mp4: no such file"}
        judged["gone.mp4", HOSTILE] = record
    scale = {"score_quantiles": quantiles([-1.0, 0.0, 2.0])}
    model = a_model(info={"score_mean": 0.0, "score_std": 1.0, **scale})
    report.write_page(tmp_path / "page.html", model, judged)
    look(browser, tmp_path / "page.html", width)
    scores = [f"+{float(score):.3f}" for score in range(len(videos))][::-1]
    assert texts(browser, ".score") == scores and len(texts(browser, ".here")) == len(videos)
    assert texts(browser, ".error") == ["gone.mp4: no such file"] * (count > 1)
    assert texts(browser, ".subscores .cell")[:5] == ["1"] * 5


@pytest.mark.parametrize("width", WIDTHS)
def test_a_run_is_seen(browser, tmp_path, width):
    folder = a_run(tmp_path / "run")
    report.write(folder / "report.html", *report.run_page(report.RunFolder(folder)))
    look(browser, folder / "report.html", width)
    last = browser.evaluate("Object.fromEntries([...document.querySelectorAll('[data-name]')]"
                            ".map(one => [one.dataset.name, one.textContent.trim()]))")
    assert last["reward"] == "0.620" and last["test_id/quality"] == "0.820"
    assert last["figure_of_my_own"] == "6.00"
    assert "NaN" not in browser.evaluate("document.querySelector('main').outerHTML")
    over, step = (f"section:nth-of-type({number})" for number in (2, 3))
    assert texts(browser, f"{over} tr.top td") == ["reference", "0", "3", "6"]
    scores = texts(browser, f"{over} [data-figure=score]")
    assert scores == ["0.00", "0.75", "1.50"]
    first, last = texts(browser, f"{over} .cot")
    assert "at step 0" in first and "at step 6" in last
    assert texts(browser, f"{step} [data-figure=advantage]") == ["1.50", "0.50", "−0.50", "−1.50"]
    assert texts(browser, f"{step} .error") == ["gone.mp4: no such file"]
    browser.evaluate("""(() => { const one = document.querySelector('input[type=range]');
        one.value = 0; one.dispatchEvent(new Event('input')); })()""")
    assert "rolled 1" in texts(browser, f"{step} h2")
    click(browser, f"{step} tr.top td:nth-of-type(3)")
    assert browser.errors() == []


def test_a_run_that_has_just_begun_is_seen(browser, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    report.write(tmp_path / "report.html", *report.run_page(report.RunFolder(tmp_path)))
    look(browser, tmp_path / "report.html", 390)
    assert "Nothing is logged yet." in texts(browser, "main p")
