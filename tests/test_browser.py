"""Both pages in a real browser, where one is installed: what is seen, and nothing that goes wrong."""

import json
import math
from functools import cache

import pytest
from browser import CHROMIUM, Browser
from pages import (
    DIMENSIONS,
    GENERATORS,
    GOLDEN,
    HOSTILE,
    a_cot,
    a_model,
    a_pair_file,
    a_run,
    judged_of,
    write_lines,
)

from data import parse_cot, read_video
from support.run import quantiles
from tools import report

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


# What stands on each card, from top to bottom.
CARDS = """[...document.querySelectorAll('.pair')].map(card => ({
    prompt: card.querySelector('h2').textContent, badge: card.querySelector('.badge').textContent,
    sides: [...card.querySelectorAll('.side')].map(side => {
        const all = (where, what) => [...where.querySelectorAll(what)].map(one => one.textContent);
        return {
            score: Number(side.querySelector('.score')?.dataset.score),
            preferred: side.querySelector('.mark') !== null, seconds: all(side, 'figcaption'),
            here: Number(side.querySelector('.here')?.getAttribute('x1')),
            cells: [...side.querySelectorAll('.subscores tr:not(.top)')]
                .map(row => all(row, '.cell, .misses'))};
    })}))"""


@pytest.mark.parametrize("width", WIDTHS)
def test_pairs_are_seen_the_most_wrong_first(browser, pairs_page, width):
    path, pairs, judged = pairs_page
    look(browser, path, width)
    cards = browser.evaluate(CARDS)
    assert len(cards) >= 20  # more as they come into sight
    by_prompt = {pair.prompt: pair for pair in pairs}
    scores = [record["score"] for record in judged.values() if "score" in record]
    losses = []
    for card in cards:
        pair = by_prompt[card["prompt"].replace("\ufffd", "\ud800")]
        records = [judged[key] for key in pair.videos()]
        if any("error" in record for record in records):
            losses.append(-1)
            continue
        a, b = (record["score"] for record in records)
        chosen = {"A": [b - a], "B": [a - b], "tie": [b - a, a - b]}[pair.preference]
        losses.append(sum(math.log(1 + math.exp(x)) for x in chosen) / len(chosen))
        met = "≈ tie" if pair.preference == "tie" else "✗ wrong" if chosen[0] >= 0 else "✓ right"
        assert card["badge"] == met
        for name, side, record in zip("ab", card["sides"], records):
            assert side["score"] == record["score"] and side["preferred"] == (pair.preference == name.upper())
            # Its place in the histogram, which is 320 wide.
            place = (record["score"] - min(scores)) / (max(scores) - min(scores)) * 320
            assert side["here"] == pytest.approx(place, abs=1e-6)
            assert side["cells"] == cells(record["cot"], getattr(pair, f"scores_{name}"))
            shown = [float(text.removesuffix(" s")) for text in side["seconds"]]
            assert shown == pytest.approx(seconds(record["video"]), abs=0.06)
    assert losses == sorted(losses, reverse=True)
    assert browser.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    assert texts(browser, ".tile b")[:2] == ["40", "0.500"]


@cache
def seconds(video):
    """Of the frames that the model sees, which are few enough to be shown all."""
    return read_video(video, a_model().processor.settings)[1]


def cells(cot, reference):
    """What a CoT says of each dimension, and beside it the reference where there is one."""
    said = parse_cot(cot)["dimensional_scores"]
    if reference is None:
        return [[str(said[name])] for name in DIMENSIONS]
    return [[str(said[name]), str(reference[name]), *["≠"] * (said[name] != reference[name])]
            for name in DIMENSIONS]


def test_a_thousand_pairs_stay_usable(browser, tmp_path):
    pairs, judged = a_pair_file(1000)
    report.write_page(tmp_path / "page.html", a_model(), judged, pairs, {"pairs": len(pairs)})
    look(browser, tmp_path / "page.html", 1280)
    assert texts(browser, "[role=status]") == ["1000 of 1000 pairs"]
    assert len(texts(browser, ".pair")) < 200  # the others are drawn when they come into sight
    click(browser, "button[value=wrong]")
    count = sum("error" not in judged[a] and "error" not in judged[b] and pair.human != 0
                and pair.human * (judged[a]["score"] - judged[b]["score"]) <= 0
                for pair in pairs for a, b in [pair.videos()])
    assert texts(browser, "[role=status]") == [f"{count} of 1000 pairs"]
    browser.evaluate("scrollTo(0, document.body.scrollHeight)")
    browser.evaluate("new Promise(go => setTimeout(go, 300))")
    assert len(texts(browser, ".pair")) > 20 and browser.errors() == []


def test_pairs_can_be_chosen(browser, pairs_page):
    path, pairs, _ = pairs_page
    look(browser, path, 1280)
    for verdict in ("right", "wrong", "tie", "unreadable"):
        click(browser, f"button[value={verdict}]")
        marks = "[...document.querySelectorAll('.pair')].map(one => one.dataset.verdict)"
        assert set(browser.evaluate(marks)) == {verdict}
    assert "it is cut short" in " ".join(texts(browser, ".error")) or texts(browser, ".error") == []
    click(browser, "button[value=all]")
    browser.evaluate(f"""(() => {{ const one = document.querySelector('select[aria-label=generator]');
        one.value = {json.dumps(GENERATORS[2])}; one.dispatchEvent(new Event('change')); }})()""")
    count = sum(GENERATORS[2] in (pair.model_a, pair.model_b) for pair in pairs)
    assert texts(browser, "[role=status]") == [f"{count} of 40 pairs"]
    browser.evaluate("""(() => { const one = document.querySelector('input[type=search]');
        one.value = "ONERROR"; one.dispatchEvent(new Event('input')); })()""")
    assert len(texts(browser, ".pair")) <= 1
    assert browser.errors() == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [1, 3])
def test_videos_are_seen_the_best_first(browser, tmp_path, width, count):
    videos = [str(GOLDEN / f"{name}.mp4") for name in ("two", "portrait")][: max(1, count - 1)]
    judged, dimensions = {}, DIMENSIONS | {"w" * 60: 1}
    for score, video in enumerate(videos):
        cot = HOSTILE if score else a_cot(dict.fromkeys(dimensions, 1))
        judged |= judged_of([video], HOSTILE, cot, float(score))
    if count > 1:
        record = {"video": "gone.mp4", "prompt": HOSTILE, "error": "gone.mp4: no such file"}
        judged["gone.mp4", HOSTILE] = record
    scale = {"score_quantiles": quantiles([-1.0, 0.0, 2.0])}
    model = a_model(info={"score_mean": 0.0, "score_std": 1.0, **scale}, dimensions=dimensions)
    report.write_page(tmp_path / "page.html", model, judged)
    look(browser, tmp_path / "page.html", width)
    scores = [f"+{float(score):.3f}" for score in range(len(videos))][::-1]
    assert texts(browser, ".score") == scores and len(texts(browser, ".here")) == len(videos)
    assert texts(browser, ".error") == ["gone.mp4: no such file"] * (count > 1)
    assert texts(browser, ".subscores .cell") == ["1"] * len(dimensions)


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


def test_a_ratio_of_nearly_1_can_be_read_off_its_axis(browser, tmp_path):
    records = [{"step": step, "ratio_max": 1 + step * 1e-6} for step in range(1, 6)]
    write_lines(tmp_path / "metrics.jsonl", records)
    report.write(tmp_path / "report.html", *report.run_page(report.RunFolder(tmp_path)))
    look(browser, tmp_path / "report.html", 390)
    levels = texts(browser, "svg text[text-anchor=end]")
    assert levels == [f"{1 + step * 1e-6:.6f}" for step in range(1, 6)]


def test_a_prompt_runs_in_the_direction_of_its_script(browser, tmp_path):
    judged = judged_of([str(GOLDEN / "two.mp4")], "שועל רץ.")
    report.write_page(tmp_path / "page.html", a_model(), judged)
    look(browser, tmp_path / "page.html", 390)
    at = """(() => { const text = document.querySelector('h2').firstChild, range = document.createRange();
        return [0, text.length - 1].map(place => {
            range.setStart(text, place); range.setEnd(text, place + 1);
            return range.getBoundingClientRect().left; }); })()"""
    first, stop = browser.evaluate(at)
    assert stop < first  # the full stop ends the line on the left


def test_a_run_of_stage_1_is_seen(browser, tmp_path):
    folder = a_run(tmp_path / "run")
    for name in ("rollouts.jsonl", "settings.json"):
        (folder / name).unlink()
    report.write(folder / "report.html", *report.run_page(report.RunFolder(folder)))
    look(browser, folder / "report.html", 390)
    assert texts(browser, "section > h2") == ["Curves", "One video over the steps"]
    assert texts(browser, ".tile b") == ["6"]  # of how many is not known


def test_a_run_that_has_just_begun_is_seen(browser, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    report.write(tmp_path / "report.html", *report.run_page(report.RunFolder(tmp_path)))
    look(browser, tmp_path / "report.html", 390)
    assert "Nothing is logged yet." in texts(browser, "main p")
