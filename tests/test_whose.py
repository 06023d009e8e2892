"""Whose it is: what is written for A and for B, for a video of several, a test set of several, or a
generator, is that one's. No two of the inputs here are alike, so that what is exchanged is seen.

What says it of                                     where it is pinned
- a pair's side and a row, in each file format      test_a_format_…, here (tools.convert and tools.filter too)
- a pair's side, turned: winner_first               test_data (video, CoT, scores, generator), test_formats
- a pair's videos, and what it says of them         test_data
- annotation, by --model and by --api               test_annotation_…, here; --together in test_formats
- the judgements of --out, the table by generators,
  a page's scores, CoTs, references, pictures       test_judgements_…, here; a page's cards in test_browser
- a ranking, as text and as JSON                    test_a_ranking_…, here
- r_A − r_B                                         test_judging; what reading alone says, there too
- pairs that are made: chosen and rejected          test_a_made_pair_…, here; from judgements on in test_pairs
- the probe's rows                                  test_probe; its spread in test_the_spread_…, here
- reward, Scorer, served batches, the client        test_several; many threads in test_memory
- adapters                                          test_adapters
- several test sets; held_out, rollouts; the scale  test_several
- CoTs and references that a stage trains on        test_steps
- the toy world's sides, labels, ways and pans      test_sides
"""

import csv
import json
import statistics
from dataclasses import asdict

import pytest
import torch
from pages import a_cot
from seer import MEAN, STD, Seer, ran, scores_of
from test_formats import Endpoint, endpoint  # noqa: F401 (a fixture)
from test_report import content, decoded

import infer
from data import Pair, read_video
from infer import Thinking, by_key
from support import tables
from support.formats import read_pairs
from tools import annotate, convert, pairs, probe
from tools import filter as filtering
from tools.shown import data_url

PROMPTS = ["A red circle.", "A blue cross at sea.", "A fox runs."]
GENERATORS = ["aurora", "basalt", "cinder"]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ------------------------------------------------------------------------------------------------------------
# Files of pairs


RISING = {"w": 0, "x": 1, "y": 4, "z": 8}  # numbers whose scores are the better the larger they are


def a_pair(a, b, label, prompt):
    """A pair of the videos of two letters, of which all that can be said differs."""
    sides = {}
    for side, letter in (("a", a), ("b", b)):
        scores = scores_of(RISING[letter])
        sides |= {f"video_{side}": f"{letter}.mp4", f"cot_{side}": a_cot(scores, letter),
                  f"scores_{side}": scores, f"model_{side}": f"generator {letter}",
                  f"overall_{side}": 1.5 + RISING[letter] / 4}
    return Pair(prompt, preference=label, **sides)


# Both labels are consistent, so that the filter keeps them.
TWO = [a_pair("w", "x", "B", "one"), a_pair("z", "y", "A", "two")]


def answer_of(pair):
    return "<answer>" + json.dumps({"video_1_scores": pair.scores_a, "video_2_scores": pair.scores_b,
                                    "gsb_result": pair.preference}) + "</answer>"


# Of each format: its columns as they are made of a pair, and what it says beside videos, prompt and label.
FORMATS = {
    "VideoAlign": (lambda p: {
        "path_A": p.video_a, "path_B": p.video_b, "A_model": p.model_a, "B_model": p.model_b,
        "prompt": p.prompt, "TA": p.preference}, ["model"]),
    "VideoGen-RewardBench": (lambda p: {
        "path_B": p.video_b, "B_model": p.model_b, "prompt": p.prompt, "path_A": p.video_a,
        "A_model": p.model_a, "Overall": p.preference}, ["model"]),
    "GenAI-Bench": (lambda p: {
        "prompt": p.prompt, "left_model": p.model_a, "right_model": p.model_b,
        "vote_type": {"A": "leftvote", "B": "rightvote"}[p.preference], "left_video": p.video_a,
        "right_video": p.video_b}, ["model"]),
    "stage 1 of the release": (lambda p: {
        "videos": repr([p.video_a, p.video_b]), "prompt": p.prompt, "GSB": p.preference, "CoT_A": p.cot_a,
        "CoT_B": p.cot_b}, ["cot"]),
    "stage 2 of the release": (lambda p: {
        "videos": json.dumps([p.video_a, p.video_b]), "prompt": p.prompt, "answer": answer_of(p)},
        ["scores"]),
    "evaluation of the release": (lambda p: {
        "video_A": p.video_a, "video_B": p.video_b, "prompt": p.prompt, "answer": answer_of(p)},
        ["scores"]),
    "ours": (asdict, ["cot", "scores", "model", "overall"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_says_of_each_side_what_is_said_of_it(name, tmp_path):
    columns, fields = FORMATS[name]
    path = tmp_path / "pairs.file"
    rows = [columns(pair) for pair in TWO]
    if name == "ours":
        write_lines(path, rows)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    for letter in "wxyz":
        (tmp_path / f"{letter}.mp4").touch()
    expected = []
    for pair in TWO:
        known = {"prompt": pair.prompt, "preference": pair.preference}
        for side in "ab":
            known[f"video_{side}"] = str(tmp_path / getattr(pair, f"video_{side}"))
            known |= {f"{field}_{side}": getattr(pair, f"{field}_{side}") for field in fields}
        expected.append(Pair(**known))
    assert read_pairs(path) == expected
    ran(convert.main, path, tmp_path / "ours.jsonl")
    assert read_pairs(tmp_path / "ours.jsonl") == expected
    if fields != ["model"]:  # of which a filter could go by nothing
        ran(filtering.main, path, tmp_path / "kept.jsonl")
        assert read_pairs(tmp_path / "kept.jsonl") == expected


# ------------------------------------------------------------------------------------------------------------
# A model whose thoughts are known


@pytest.fixture(scope="module")
def clips(world_dir):
    return sorted((world_dir / "videos").glob("train_*.mp4"))[:6]


@pytest.fixture(scope="module")
def loaded(clips):
    return Seer(clips, PROMPTS)


@pytest.fixture
def seer(loaded, monkeypatch):
    return loaded.install(monkeypatch)


# Videos by number, the prompt's, the label, the generators'; a video stands in pairs of two prompts, two
# generators on either side, and None is a video that cannot be read.
ROWS = [(0, 1, 0, "A", 0, 1), (2, 0, 1, "B", 1, 2), (3, None, 0, "A", 2, 0), (4, 5, 1, "A", 2, 0),
        (5, 3, 2, "tie", 1, 0), (1, 2, 2, "B", 1, 0), (4, 1, 0, "B", 1, 0)]


@pytest.fixture
def pair_file(clips, tmp_path):
    """A file of ROWS, and those of its pairs of which both videos can be read."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video" * 100)
    records = []
    for place, (a, b, prompt, label, model_a, model_b) in enumerate(ROWS):
        records.append({
            "prompt": PROMPTS[prompt], "preference": label, "video_a": str(clips[a]),
            "video_b": str(broken if b is None else clips[b]), "model_a": GENERATORS[model_a],
            "model_b": GENERATORS[model_b], "scores_a": scores_of(2 * place + 6),
            "scores_b": scores_of(2 * place + 7)})
    path = write_lines(tmp_path / "pairs.jsonl", records)
    return path, [pair for pair in read_pairs(path) if pair.video_b != str(broken)]


def accuracies(labels, margins):
    """Without ties, and with them at the best threshold, tried one by one."""
    signs = {"A": 1, "B": -1, "tie": 0}
    decided = [label != "tie" for label in labels]
    right = [margin * signs[label] > 0 for label, margin in zip(labels, margins)]
    best = 0
    for threshold in (-1, *map(abs, margins)):
        said = [0 if abs(margin) <= threshold else 1 if margin > 0 else -1 for margin in margins]
        best = max(best, sum(one == signs[label] for one, label in zip(said, labels)))
    return sum(right) / sum(decided) if any(decided) else None, best / len(labels)


def test_judgements_are_their_videos_and_figures_their_generators(seer, pair_file, tmp_path):
    path, readable = pair_file
    out = tmp_path / "out.jsonl"
    page = tmp_path / "page.html"
    code, said = ran(infer.main, "--pairs", path, "--out", out, "--json", "--report", page,
                     "--model", "seer")
    assert code == 1  # a video cannot be read
    assert max(len(call["keys"]) for call in seer.calls) > 2  # the broken one had company
    # What is kept.
    judged = {(record["video"], record["prompt"]): record for record in lines_of(out)[1:]}
    keys = {key for pair in read_pairs(path) for key in pair.videos()}
    assert set(judged) == {key for key in keys if "broken" not in key[0]}
    for key, record in judged.items():
        assert record["cot"] == seer.cot(key) and record["truncated"] == seer.is_cut_off(key)
        assert record["score"] == pytest.approx(seer.score_of(key))
        assert record["score_no_cot"] == pytest.approx(seer.score_no_cot(key))
    # The table by generators, whichever of two stands first.
    by_names = {}
    for pair in readable:
        by_names.setdefault(" / ".join(sorted([pair.model_a, pair.model_b])), []).append(pair)
    table = json.loads(said)["generators"]
    assert set(table) == set(by_names) and len({json.dumps(row) for row in table.values()}) == 3
    for names, some in by_names.items():
        expected = {"pairs": len(some)}
        for suffix, score in (("", seer.score_of), ("_no_cot", seer.score_no_cot)):
            margins = [score(a) - score(b) for a, b in (pair.videos() for pair in some)]
            plain, ties = accuracies([pair.preference for pair in some], margins)
            expected |= {f"accuracy{suffix}": plain, f"accuracy_ties{suffix}": ties}
        assert table[names] == pytest.approx(expected)
        line = f"{names}: {len(some)} pairs, accuracy {expected['accuracy']:.4f}, "
        assert line in tables.show_report(json.loads(said))
    # The page.
    shown, strips = content(page)
    for video in shown["videos"]:
        if "error" in video:
            assert video["video"].endswith("broken.mp4") and "error" in strips[video["strip"]]
            continue
        key = (video["video"], video["prompt"])
        assert video["cot"] == seer.cot(key) and video["score"] == pytest.approx(seer.score_of(key))
        assert video["sub_scores"] == scores_of(seer.number(key))
        assert video["standardised"] == pytest.approx((seer.score_of(key) - MEAN) / STD)
        first = decoded(tmp_path, strips[video["strip"]]["frames"][0]).float()
        away = []
        for other in seer.videos:
            frame = read_video(other, seer.model.processor.settings)[0][:1].float()
            small = torch.nn.functional.interpolate(frame, first.shape[1:], mode="area")[0]
            away.append((small - first).abs().mean())
        assert away.index(min(away)) == seer.number(key)
    for pair, card in zip(read_pairs(path), shown["pairs"], strict=True):
        sides = []
        for key, generator, scores in zip(pair.videos(), pair.said("model"), pair.said("scores")):
            number = [(v["video"], v["prompt"]) for v in shown["videos"]].index(key)
            sides.append({"video": number, "generator": generator, "reference": scores})
        assert card["sides"] == sides
        if pair in readable:
            a, b = pair.videos()
            assert card["margin"] == pytest.approx(seer.score_of(a) - seer.score_of(b))


def test_a_ranking_has_each_video_with_what_is_its_own(seer, clips, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video" * 100)
    words = [clips[3], clips[0], broken, clips[5], clips[1], PROMPTS[1]]
    code, said = ran(infer.main, *words, "--model", "seer", "--json")
    keys = [(str(clips[number]), PROMPTS[1]) for number in (3, 0, 5, 1)]
    keys.sort(key=lambda key: -seer.score_of(key))
    found = json.loads(said)
    assert code == 1 and [(record["video"], record["prompt"]) for record in found] == keys
    for key, record in zip(keys, found):
        assert record["cot"] == seer.cot(key) and record["score"] == pytest.approx(seer.score_of(key))
        assert record["standardised"] == pytest.approx((seer.score_of(key) - MEAN) / STD)
        assert record["sub_scores"] == scores_of(seer.number(key))
    _, said = ran(infer.main, *words, "--model", "seer")
    for place, (key, line) in enumerate(zip(keys, said.splitlines(), strict=True), 1):
        assert line.startswith(f"{place}. {seer.score_of(key):+.4f} ") and line.endswith(f"  {key[0]}")
    # Without a CoT.
    _, said = ran(infer.main, *words, "--model", "seer", "--json", "--cot", "off")
    found = {record["video"]: record["score"] for record in json.loads(said)}
    assert found == pytest.approx({key[0]: seer.score_no_cot(key) for key in keys})


def test_a_made_pair_says_who_is_chosen_and_who_rejected(seer, clips, tmp_path):
    groups = [([3, 0, 5], [0, 1, 2], 0), ([1, 2, 0], [2, 0, 1], 1)]
    lines = []
    generators = {}
    for numbers, models, prompt in groups:
        names = [GENERATORS[model] for model in models]
        lines.append({"prompt": PROMPTS[prompt], "videos": [str(clips[number]) for number in numbers],
                      "models": names})
        generators |= {(number, PROMPTS[prompt]): name for number, name in zip(numbers, names)}
    videos = write_lines(tmp_path / "videos.jsonl", lines)
    out = tmp_path / "out.jsonl"
    code, _ = ran(pairs.main, videos, out, "--take", "all", "--scores", "--model", "seer")
    assert code == 0
    found = read_pairs(out)
    assert len(found) == 6
    for pair, record in zip(found, lines_of(out)):
        assert pair.preference == "A" and record["score_a"] > record["score_b"]
        for side, key in zip("ab", pair.videos()):
            assert record[f"score_{side}"] == pytest.approx(seer.score_of(key))
            assert getattr(pair, f"cot_{side}") == seer.cot(key)
            assert getattr(pair, f"scores_{side}") == scores_of(seer.number(key))
            assert getattr(pair, f"model_{side}") == generators[seer.number(key), pair.prompt]


def test_the_spread_of_the_probe_is_each_videos_own(seer, clips, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    keys = [(str(clip), PROMPTS[place % 3]) for place, clip in enumerate(clips)]
    keys.insert(2, (str(tmp_path / "broken.mp4"), PROMPTS[0]))
    records = by_key(probe.shown(seer.model, keys, {}, Thinking(50, samples=3, think_tokens=30_000)))
    assert "error" in records.pop(keys.pop(2)) and set(records) == set(keys)
    for key, record in records.items():
        scores = [seer.score_of(key, k, 1.0) for k in range(3)]
        assert record["cot"] == seer.cot(key) and record["own"] == pytest.approx(seer.score_of(key))
        assert record["again"] == pytest.approx(scores[0])
        assert record["variance"] == pytest.approx(statistics.variance(scores))


# ------------------------------------------------------------------------------------------------------------
# Annotation


def annotated_as(seer, path, out):
    """Whether each pair of a file has been given what is said of its videos."""
    before = [pair for pair in read_pairs(path) if "broken" not in pair.video_b]
    for pair, old in zip(read_pairs(out), before, strict=True):
        assert [seer.number(key) for key in pair.videos()] == [seer.number(key) for key in old.videos()]
        assert pair.prompt == old.prompt and pair.said("model") == old.said("model")
        assert pair.said("cot") == [seer.cot(key) for key in pair.videos()]
        assert pair.said("scores") == [scores_of(seer.number(key)) for key in pair.videos()]
    return True


def test_annotation_by_a_model_is_each_videos_own(seer, pair_file, tmp_path):
    path, _ = pair_file
    code, _ = ran(annotate.main, path, tmp_path / "out.jsonl", "--model", "seer", "--scores")
    assert code == 1 and annotated_as(seer, path, tmp_path / "out.jsonl")


def test_annotation_by_an_endpoint_is_each_videos_own(seer, pair_file, endpoint, tmp_path):  # noqa: F811
    """Of several requests under way the later are answered first."""
    path, _ = pair_file
    pictures = {}
    for video in seer.videos:
        frames, _ = read_video(video, seer.model.processor.settings)
        pictures[tuple(data_url(frame) for frame in frames)] = video

    def reply(parts):
        seen = tuple(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
        prompt = Endpoint.reply(parts).split("<think>")[1].split("</think>")[0]
        return seer.cot((pictures[seen], prompt))

    endpoint.reply = staticmethod(reply)
    endpoint.plan[:] = ["ok", "429", "ok", "500"]
    settings = seer.model.processor.settings
    code, _ = ran(annotate.main, path, tmp_path / "out.jsonl", "--scores", "--api", endpoint.url,
                  "--api-model", "judge-1", "--parallel", 4, "--fps", settings.fps, "--min-pixels",
                  settings.min_pixels, "--max-pixels", settings.max_pixels)
    assert code == 1 and annotated_as(seer, path, tmp_path / "out.jsonl") and endpoint.most > 1
