"""The pages that are looked at, and the figures that are sent elsewhere: what is written, from what."""

import argparse
import html.parser
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import run
from pages import DIMENSIONS, GOLDEN, HOSTILE, a_model, a_pair_file, a_run, judged_of, lines, write_lines

import rl
from data import DataError, Pair, VideoSettings, read_video
from support.files import write_whole
from support.means import Means
from support.ranks import ALONE
from support.run import ROUNDING, Run, quantiles
from support.settings import RunArgs
from tools import report, trackers

QUICK = [*TOY_VIDEO, "--workers", 0, "--max-new-tokens", 40, "--lr", 1e-3, "--lora-rank", 4]


class Scripts(html.parser.HTMLParser):
    """The scripts of a page, by id, and every tag."""

    def __init__(self, path):
        super().__init__()
        self.found, self.tags, self.inside = {}, [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = dict(attrs).get("id", "code") if tag == "script" else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.found[self.inside] = self.found.get(self.inside, "") + data


def content(path):
    """What a page shows, and its strips."""
    found = Scripts(path).found
    strips = sorted((name for name in found if name.startswith("strip-")), key=lambda name: int(name[6:]))
    return json.loads(found["page"]), [json.loads(found[name]) for name in strips]


# ------------------------------------------------------------------------------------------------------------
# Judged videos


def test_a_page_of_pairs_says_who_was_right_and_how_wrong(tmp_path):
    pairs, judged = a_pair_file()
    report.write_page(tmp_path / "page.html", a_model(), judged, pairs, {"pairs": len(pairs)})
    page, strips = content(tmp_path / "page.html")
    assert len(page["videos"]) == len(judged) and len(page["pairs"]) == len(pairs)
    assert len(strips) == len({video for video, _ in judged})  # each file once
    for video in page["videos"]:
        total = len(read_video(video["video"], a_model().processor.settings)[0])
        assert strips[video["strip"]]["total"] == total
    for pair, shown in zip(pairs, page["pairs"]):
        a, b = (judged[key].get("score") for key in pair.videos())
        files = [page["videos"][one["video"]]["video"] for one in shown["sides"]]
        assert files == [pair.video_a, pair.video_b]
        assert [one["reference"] for one in shown["sides"]] == [pair.scores_a, pair.scores_b]
        assert [one["generator"] for one in shown["sides"]] == [pair.model_a, pair.model_b]
        if a is None or b is None:
            assert shown["verdict"] == "unreadable" and shown["wrong"] is None
            continue
        likely = 1 / (1 + math.exp(b - a))  # that A is preferred
        of_label = {"A": -math.log(likely), "B": -math.log(1 - likely),
                    "tie": -math.log(likely) / 2 - math.log(1 - likely) / 2}
        assert shown["wrong"] == pytest.approx(of_label[pair.preference])
        right = {"A": a > b, "B": a < b}.get(pair.preference)
        assert shown["verdict"] == {True: "right", False: "wrong", None: "tie"}[right]
    assert {pair["verdict"] for pair in page["pairs"]} == {"right", "wrong", "tie", "unreadable"}


def test_a_margin_of_zero_is_wrong_and_a_huge_one_is_finite():
    videos = [{"score": 1.0}, {"score": 1.0}, {"score": 1e6}]
    number = {("a", "p"): 0, ("b", "p"): 1, ("c", "p"): 2}
    assert report.compare(Pair("p", "a", "b", "A"), number, videos)["verdict"] == "wrong"
    found = report.compare(Pair("p", "a", "c", "A"), number, videos)
    assert found["verdict"] == "wrong" and found["wrong"] == pytest.approx(1e6 - 1)
    assert report.how_wrong(0, 0.0) == pytest.approx(math.log(2))


def test_text_from_outside_stays_text(tmp_path):
    video = "video.mp4"  # which is not there either
    judged = judged_of([video], HOSTILE, cot=HOSTILE)
    model = a_model(name=HOSTILE)
    report.write_page(tmp_path / "page.html", model, judged)
    scripts = Scripts(tmp_path / "page.html")
    assert scripts.tags.count("script") == 3 and not {"img", "b"} & set(scripts.tags)
    page, _ = content(tmp_path / "page.html")
    assert page["videos"][0]["prompt"] == page["videos"][0]["cot"] == HOSTILE
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    (inside,) = re.findall(r' id="page">(.*?)</script>\n', text)
    assert json.loads(inside) == page and "<" not in inside
    assert "\u2028" not in text and text.count('"kind":"judged"') == 1
    # Whatever might slip through can reach nothing.
    assert "default-src 'none'" in text and "innerHTML" not in text


def test_a_strip_has_frames_that_the_model_saw(tmp_path):
    settings = VideoSettings(fps=4, min_pixels=4096, max_pixels=40_000)
    frames, seconds = read_video(GOLDEN / "wide.mp4", settings)
    found = report.strip(str(GOLDEN / "wide.mp4"), settings, 3, 32)
    assert found["total"] == len(frames) and found["seen"] == [frames.shape[3], frames.shape[2]]
    chosen = [0, round((len(frames) - 1) / 2), len(frames) - 1]
    assert found["seconds"] == [round(seconds[index], 2) for index in chosen]
    assert found["height"] == 32 and len(found["frames"]) == 3
    for index, picture in zip(chosen, found["frames"]):
        shown = decoded(tmp_path, picture)
        small = torch.nn.functional.interpolate(frames[index][None].float(), shown.shape[1:], mode="area")[0]
        assert (shown.float() - small).abs().mean() < 12  # of 255: it is a JPEG
    assert report.strip("gone.mp4", settings, 3, 32) == {"error": "gone.mp4: no such file"}


def decoded(folder, picture):
    """A JPEG (3, H, W)."""
    import base64

    import av
    (folder / "one.jpg").write_bytes(base64.b64decode(picture))
    with av.open(str(folder / "one.jpg")) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    return torch.from_numpy(frame).permute(2, 0, 1)


def test_a_score_lies_among_the_held_out_ones(tmp_path):
    scores = [float(x) for x in range(1001)]
    model = a_model(info={"score_mean": 500.0, "score_std": 289.0, "score_quantiles": quantiles(scores)})
    assert model.info["score_quantiles"] == [10.0 * n for n in range(101)]
    judged = judged_of([str(GOLDEN / "two.mp4")], "p", score=250.0)
    report.write_page(tmp_path / "one.html", model, judged)
    page, _ = content(tmp_path / "one.html")
    assert page["videos"][0]["below"] == pytest.approx(0.25, abs=0.006)
    assert sum(page["scale"]["counts"]) == 100 and max(page["scale"]["counts"]) <= 5
    assert page["videos"][0]["standardised"] == pytest.approx(-250 / 289)
    pairs, judged = a_pair_file()  # of its own scores, where there are enough
    report.write_page(tmp_path / "pairs.html", model, judged, pairs, {})
    page, _ = content(tmp_path / "pairs.html")
    own = sorted(record["score"] for record in judged.values() if "score" in record)
    assert sum(page["scale"]["counts"]) == len(own) and page["scale"]["high"] == own[-1]
    for video in page["videos"]:
        if "score" in video:
            assert video["below"] == pytest.approx(own.index(video["score"]) / len(own))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with a head, untrained."""
    from model import DeScore
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu", video={"min_pixels": 4096, "max_pixels": 4096})
    model.has_head = True
    folder = tmp_path_factory.mktemp("saved")
    model.save(folder, score_mean=0.0, score_std=1.0, score_quantiles=quantiles([-1.0, 0.0, 1.0]))
    return folder


def test_infer_writes_a_page_of_what_it_judges(world_dir, saved, tmp_path):
    video = next((world_dir / "videos").glob("*.mp4"))
    (tmp_path / "broken.mp4").write_bytes(b"none")
    page = tmp_path / "new" / "page.html"
    common = ["--model", saved, "--max-new-tokens", 40, "--report", page, "--json"]
    done = run("infer.py", video, tmp_path / "broken.mp4", "a red <b>circle</b>", *common, check=False)
    assert done.returncode == 1  # a video could not be read
    shown, strips = content(page)
    (said,) = json.loads(done.stdout)
    assert shown["videos"][0]["score"] == said["score"] and "below" in shown["videos"][0]
    assert shown["videos"][0]["cot"] == said["cot"] and len(strips[0]["frames"]) > 1
    assert "not a video" in strips[1]["error"]

    done = run("infer.py", "--pairs", world_dir / "test_id.jsonl", *common)
    shown, _ = content(page)
    assert shown["figures"]["accuracy"] == json.loads(done.stdout)["accuracy"] and len(shown["pairs"]) == 4
    run("infer.py", "--pairs", world_dir / "test_id.jsonl", "--cot", "off", *common)
    shown, _ = content(page)
    assert shown["videos"][0]["cot"] is None and shown["pairs"][0]["margin"] is not None

    for place in (tmp_path, saved / "descore.json", saved / "descore.json/new/page.html"):
        done = run("infer.py", video, "a circle", *common[:4], "--report", place, check=False)
        assert done.returncode == 2 and "--report" in done.stderr and not done.stdout


def test_that_a_page_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch(0o755)
    for place in ("new/deeper/page.html", "page.HTM"):
        assert report.page_path(str(tmp_path / place)) == tmp_path / place
    monkeypatch.chdir(tmp_path)
    assert report.page_path("page.html") == Path("page.html")
    for place in ("file/page.html", "file/new/page.html", "page.txt", "page"):
        with pytest.raises(argparse.ArgumentTypeError, match=place):
            report.page_path(str(tmp_path / place))
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0 or path != tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be written"):
        report.page_path(str(tmp_path / "new/page.html"))
    assert not (tmp_path / "new").exists()  # nothing is made yet


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_whole(path, "old")

    def full(self, text, encoding, errors):
        with self.open("w", encoding=encoding) as file:
            file.write(text[:1])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match="page.html: could not be written .No space"):
        report.write(path, "title", {}, [])
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"


# ------------------------------------------------------------------------------------------------------------
# The page of a run


def test_the_page_of_a_run_has_its_curves(tmp_path):
    folder = a_run(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("metrics", "rollouts", "held_out"):
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 99, "reward')  # a run at work
    done = run("-m", "tools.report", folder)
    assert done.stdout == f"{folder / 'report.html'}\n"
    page, _ = content(folder / "report.html")
    curves = {one["name"]: one["points"] for panel in page["panels"] for one in panel["series"]}
    logged = {}
    for record in lines(folder / "metrics.jsonl.whole"):
        for name, value in record.items():
            if name != "step":
                logged.setdefault(name, []).append([record["step"], value])
    assert curves == logged and page["step"] == 6 and page["steps"] == 65
    assert [6, None] in curves["kl"]  # it was not finite
    reward = next(panel for panel in page["panels"] if panel["title"] == "Reward")
    assert {one["name"] for one in reward["series"]} == {"reward", "reward_quality", "reward_brevity"}
    assert page["panels"][-1]["series"][0]["name"] == "figure_of_my_own"
    for name, content_before in before.items():  # nothing of the run is touched
        assert (folder / name).read_bytes().startswith(content_before)


def test_the_page_of_a_run_has_what_was_thought(tmp_path):
    folder = a_run(tmp_path / "run")
    page, strips = run_content(folder)
    held_out = [one for one in page["thoughts"] if page["videos"][one["video"]]["test"] == "test_id"]
    assert [one["step"] for one in held_out] == [0, 3, 6] and len({one["video"] for one in held_out}) == 1
    rolled = [one for one in page["thoughts"] if page["videos"][one["video"]]["test"] is None]
    written = lines(folder / "rollouts.jsonl")
    assert [one["step"] for one in rolled] == [record["step"] for record in written]
    for one, record in zip(rolled, written):
        assert page["videos"][one["video"]]["reference"] == record["reference"]
        for shown, rollout in zip(one["thoughts"], record["rollouts"]):
            assert shown["cot"] == rollout["cot"]
            assert shown["figures"] == {name: rollout[name] for name in rollout if name != "cot"}
    assert held_out[0]["thoughts"][0]["sub_scores"] == dict.fromkeys(DIMENSIONS, 2)
    assert held_out[1]["thoughts"][0]["sub_scores"] is None  # nothing that can be read
    (gone,) = [video for video in page["videos"] if video["video"] == "gone.mp4"]
    assert strips[gone["strip"]] == {"error": "gone.mp4: no such file"} and "frames" in strips[0]


def run_content(folder):
    found = report.RunFolder(folder)
    report.write(folder / "report.html", *report.run_page(found))
    return content(folder / "report.html")


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    page, strips = run_content(tmp_path)
    assert page["panels"] == page["thoughts"] == strips == [] and page["step"] == 0
    assert run("-m", "tools.report", tmp_path, "--png", tmp_path / "png").stdout.endswith("logged yet\n")


def test_of_a_step_that_was_done_again_the_later_counts():
    again = {"step": 2, "a": 3.0, "b": True, "c": "x"}
    found = report.curves([{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, again])
    assert found == {"a": [[1, 1.0], [2, 3.0]]}


@pytest.mark.parametrize(("name", "line", "message"), [
    (None, None, "not a run's folder"), ("metrics.jsonl", "{", "row 1: not JSON"),
    ("metrics.jsonl", "[1]", "row 1: not a JSON object"),
    ("metrics.jsonl", '{"a": 1}', "row 1: it has no step"), ("settings.json", "{", "settings.json: not JSON"),
    ("rollouts.jsonl", '{"step": 1}', "not as it was written"),
    ("rollouts.jsonl", '{"step": 1, "video": "a", "prompt": "b", "rollouts": [7]}', "not as it was written"),
    ("rollouts.jsonl", '{"step": 1, "video": 5, "prompt": "b", "cot": ""}', "not as it was written"),
    ("metrics.jsonl", '{"step": NaN}', "row 1: it has no step"),
    ("settings.json", '{"settings": {"fps": "x"}}', "settings.json: not as it was written")])
def test_what_is_no_run_is_said_in_one_line(name, line, message, tmp_path):
    if name:
        (tmp_path / "metrics.jsonl").touch()
        (tmp_path / name).write_text(line + "\n")
    done = run("-m", "tools.report", tmp_path, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and message in last
    assert "Traceback" not in done.stderr


def test_curves_as_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    folder = a_run(tmp_path / "run")
    done = run("-m", "tools.report", folder, "--png", tmp_path / "png")
    names = {path.name for path in (tmp_path / "png").iterdir()}
    assert {"reward.png", "kl.png", "test_id-quality.png", "figure_of_my_own.png"} <= names
    assert {line.rpartition("/")[2] for line in done.stdout.splitlines()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "png").iterdir())
    assert not (folder / "report.html").exists()


def test_a_curve_of_one_point_is_seen_in_its_picture(tmp_path):
    matplotlib = pytest.importorskip("matplotlib.image")
    coloured = []  # pixels
    for value in (1.0, None):
        write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "kl": value}])
        (path,) = report.write_pngs(report.RunFolder(tmp_path), tmp_path)
        picture = matplotlib.imread(path)[..., :3]
        coloured.append(int((picture.max(-1) - picture.min(-1) > 0.3).sum()))
    assert coloured[0] > 50 and coloured[1] == 0


def test_pictures_without_matplotlib_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(DataError, match="pip install matplotlib"):
        report.write_pngs(report.RunFolder(a_run(tmp_path / "run")), tmp_path / "png")
    assert not (tmp_path / "png").exists()


# ------------------------------------------------------------------------------------------------------------
# What a run writes down for it


@pytest.fixture(scope="module")
def trained(world_dir, tmp_path_factory):
    """Two steps of stage 2 that are sent to TensorBoard, evaluated before, between and after."""
    pytest.importorskip("tensorboard")
    out = tmp_path_factory.mktemp("runs") / "rl"
    return out, run(*stage2(world_dir, out, "--log", "tensorboard"))


def stage2(world_dir, out, *extra):
    return ["rl.py", "--model", ROOT / "toy/backbone", "--train", world_dir / "train.jsonl", "--out", out,
            "--steps", 2, "--batch-size", 2, "--group-size", 2, "--updates", 2, "--test",
            world_dir / "test_id.jsonl", "--eval-every", 1, "--keep-rollouts", 2, *QUICK, *extra]


def test_a_run_says_what_its_held_out_videos_made_it_think(trained, world_dir):
    out, _ = trained
    records = lines(out / "held_out.jsonl")
    first = json.loads((world_dir / "test_id.jsonl").read_text().splitlines()[0])
    expected = [(step, first["prompt"], first[f"scores_{side}"]) for step in (0, 1, 2) for side in "ab"]
    assert [(one["step"], one["prompt"], one["reference"]) for one in records] == expected
    assert all(isinstance(one["score"], float) and one["cot"] and one["test"] == "test_id" for one in records)
    page, strips = run_content(out)
    assert page["steps"] == 2 and len(page["videos"]) == len(strips)
    assert all("frames" in one for one in strips)
    info = json.loads((out / "model/descore.json").read_text())
    assert len(info["score_quantiles"]) == 101 and info["score_quantiles"] == sorted(info["score_quantiles"])
    assert info["score_quantiles"][0] <= info["score_mean"] <= info["score_quantiles"][-1]


def test_each_figure_of_a_run_has_a_panel(trained):
    found = report.RunFolder(trained[0]).panels()
    shown = [name for panel, of in found for name in of]
    logged = {name for record in lines(trained[0] / "metrics.jsonl") for name in record} - {"step"}
    assert set(shown) == logged and all(panel in report.PANELS for panel, _ in found)
    wanted = {"reward", "reward_format", "reward_quality", "reward_length", "kl", "clip_fraction", "entropy",
              "cot_tokens", "bt_loss", "bt_accuracy", "grad_norm", "ratio_max", "logp_gap",
              "test_id/accuracy", "test_id/quality"}
    assert wanted <= logged


def test_before_the_first_update_the_ratio_is_1(trained):
    out, done = trained
    for record in lines(out / "metrics.jsonl"):
        if "loss" in record:
            assert 0 <= record["logp_gap"] < 1e-4 and 1 - 1e-4 < record["ratio_max"] < 1 + 1e-4
    assert "warning: step" not in done.stderr


def test_a_largest_figure_is_that_of_all_micro_batches_and_ranks():
    one, other = Means(), Means()
    for value in (0.5, 2.0, 1.0):
        one.largest(gap=torch.tensor(value))
    other.largest(gap=torch.tensor(3.0), only=torch.tensor(-1.0))
    both = SimpleNamespace(gather=lambda mine: [*mine, other.maxima if mine[0] is one.maxima else other.sums])
    one.add(kl=1.0)
    assert one.over(both) == {"kl": 1.0, "gap": 3.0, "only": -1.0}
    one.largest(gap=math.nan)
    one.largest(gap=1.0)
    assert math.isnan(one.over(ALONE)["gap"])


def test_a_ratio_that_is_not_1_is_logged_and_warned_of_once(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    old = torch.tensor([[[-1.0, -2.0, -9.0]]])
    new = torch.tensor([[[-1.5, -1.8, -1.0]]], requires_grad=True)
    learnt = torch.tensor([[[True, True, False]]])
    figures = rl.ratio_figures(new, SimpleNamespace(old_logps=old, learnt=learnt))
    assert figures["ratio_max"].item() == pytest.approx(math.exp(0.2))
    assert figures["logp_gap"].item() == pytest.approx(0.5)
    going = Run(RunArgs(out=str(tmp_path), train="x"), "rl", ALONE)
    going.warn_of_ratio(1, {"logp_gap": ROUNDING}, torch.float32)
    assert capsys.readouterr().err == ""
    for step in (2, 3):
        going.warn_of_ratio(step, figures, torch.float32)
    assert re.findall(r"warning: step \d", capsys.readouterr().err) == ["warning: step 2"]
    going = Run(RunArgs(out=str(tmp_path), train="x"), "rl", ALONE)
    going.warn_of_ratio(4, figures, torch.bfloat16)  # which rounds to that
    assert capsys.readouterr().err == ""
    going.warn_of_ratio(5, {"logp_gap": math.nan}, torch.bfloat16)
    assert "warning: step 5" in capsys.readouterr().err


MOVED = """
import rl

roll_out = rl.roll_out


def moved(args, model, rewards, micro, step):
    rollouts = roll_out(args, model, rewards, micro, step)
    if step == 2:
        rollouts.old_logps += 0.5
    return rollouts


rl.roll_out = moved
rl.main()
"""


@pytest.mark.slow
def test_a_run_warns_of_it_and_goes_on(world_dir, tmp_path):
    """Of what only the first update of a step may show: later ones move the policy themselves."""
    (tmp_path / "moved.py").write_text(MOVED)
    _, *flags = stage2(world_dir, tmp_path / "out", "--steps", 3, "--lr", 0.1, "--eval-before", "false")
    done = run(tmp_path / "moved.py", *flags)
    steps = [record for record in lines(tmp_path / "out/metrics.jsonl") if "loss" in record]
    assert [round(record["logp_gap"], 2) for record in steps] == [0, 0.5, 0]
    warnings = [line for line in done.stderr.splitlines() if "warning: step" in line]
    assert len(warnings) == 1 and "step 2: before its first update" in warnings[0] and "0.5" in warnings[0]


# ------------------------------------------------------------------------------------------------------------
# Figures that are sent elsewhere


def sent_to_tensorboard(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        found[name] = [[event.step, event.value] for event in events.Scalars(name)]
    return found


def assert_all_sent(out):
    logged = report.curves(lines(out / "metrics.jsonl"))
    sent = sent_to_tensorboard(out)
    assert sent.keys() == logged.keys()
    for name, points in sent.items():
        assert [step for step, _ in points] == [step for step, _ in logged[name]], name
        assert [value for _, value in points] == pytest.approx([value for _, value in logged[name]], rel=1e-6)


def test_tensorboard_gets_what_is_logged_and_nothing_twice(trained, world_dir):
    out, _ = trained
    assert_all_sent(out)
    assert "bt_loss" in sent_to_tensorboard(out) and "test_id/quality" in sent_to_tensorboard(out)
    before = lines(out / "metrics.jsonl")
    run(*stage2(world_dir, out, "--log", "tensorboard"))  # at its end, it evaluates again
    assert len(lines(out / "metrics.jsonl")) == len(before)
    assert_all_sent(out)


def test_a_run_without_a_log_needs_no_package(trained, world_dir, tmp_path, monkeypatch, capsys):
    assert trackers.tracker(None, tmp_path, {}).send({"step": 1, "a": 1.0}) is None
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DataError, match="--log wandb: needs the package"):
        trackers.tracker("wandb", tmp_path, {})


class StandIn:
    """What wandb keeps of the runs that are sent to it."""

    def __init__(self):
        self.runs, self.failing = {}, False

    def init(self, project, name, id, resume, dir, config):
        assert resume == "allow" and config == {"lr": 1.0}
        self.runs.setdefault(id, [])
        return SimpleNamespace(
            log=lambda figures: self.put(id, figures), finish=lambda: self.runs[id].append("end"),
            define_metric=lambda *name, **options: None)

    def put(self, id, figures):
        if self.failing:
            raise OSError("no way\nthere")
        self.runs[id].append(figures)


def test_wandb_goes_on_in_the_same_run_and_gets_nothing_twice(tmp_path, monkeypatch, capsys):
    wandb, settings = StandIn(), {"lr": 1.0}
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    records = [{"step": 0, "t/accuracy": 0.5}, {"step": 1, "loss": 3.0, "kl": None}, {"step": 2, "loss": 2.0},
               {"step": 2, "t/accuracy": 0.6}, {"step": 3, "loss": 1.0}]
    first = trackers.tracker("wandb", tmp_path, settings)
    first.begin([], anew=True)
    for record in records[:3]:
        first.send(record)
    second = trackers.tracker("wandb", tmp_path, settings)  # killed; steps 0 and 1 are in the checkpoint
    second.begin(records[:2], anew=False)
    for record in records[2:]:
        second.send(record)
    second.end()
    ((_, sent),) = wandb.runs.items()
    assert sent == [{"step": 0, "t/accuracy": 0.5}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0},
                    {"step": 2, "t/accuracy": 0.6}, {"step": 3, "loss": 1.0}, "end"]
    trackers.tracker("wandb", tmp_path, settings).begin([], anew=True)
    assert len(wandb.runs) == 2

    wandb.failing = True  # it never stops a run
    third = trackers.tracker("wandb", tmp_path, settings)
    third.begin([], anew=False)
    third.send({"step": 7, "loss": 1.0})
    third.send({"step": 8, "loss": 1.0})
    third.end()
    assert capsys.readouterr().err.count("warning: --log wandb fails (no way); nothing more is sent") == 1


def test_a_log_that_is_switched_on_late_has_the_whole_curve(tmp_path):
    pytest.importorskip("tensorboard")
    folder = a_run(tmp_path / "run")
    records = lines(folder / "metrics.jsonl.whole")
    records[-2].pop("kl")  # null
    write_lines(folder / "metrics.jsonl", records)
    for _ in range(2):
        sender = trackers.tracker("tensorboard", folder, {"lr": 1.0})
        sender.begin(lines(folder / "metrics.jsonl"), anew=False)
        sender.end()
    assert_all_sent(folder)
