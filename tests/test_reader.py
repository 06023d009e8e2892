"""The other reader of video files, decord: it shows what PyAV shows, and is left out where it would not."""

import json
import shutil
import sys

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import run
from test_frames import CLIPS, FOLDER, SETTINGS, make_frames, number, write
from test_memory import save_scorer
from transformers import AutoTokenizer

from data import DataError, Processor, VideoSettings, read_video
from infer import Scorer
from model import DeScore
from support import frames
from support.frames import Video
from tools.annotate import Api
from tools.decord_reader import DecordVideo
from tools.report import film

REAL = ROOT.parent / "shared/videos"
ONE_KEYFRAME = ("av1.mp4", "vp9.webm")
# What decord shows otherwise, or not at all: name, encoder, kind of pixels, size, whether it is mirrored
OTHERWISE = [("h264-10.mp4", "libx264", "yuv420p10le", (48, 64), False),
             ("hevc-10.mkv", "libx265", "yuv420p10le", (48, 64), False),
             ("odd.webm", "libvpx-vp9", "yuv420p", (47, 63), False),
             ("narrow.mp4", "libx264", "yuv420p", (64, 48), False),
             ("mirrored.mp4", "libx264", "yuv420p", (128, 128), True)]


def same_by_both(path):
    """Check that both readers show and sample the same of a file; returns it as each has opened it."""
    ours, theirs = Video(path), DecordVideo(path)
    assert (ours.total, ours.fps, ours.seconds) == (theirs.total, theirs.fps, theirs.seconds)
    last = ours.total - 1
    for indices in (range(ours.total), [last, last], sorted({0, last // 3, last // 2, last})):
        for a, b in zip(ours.frames(indices), theirs.frames(indices), strict=True):
            assert np.array_equal(a, b), path
    (a, seconds), (b, their_seconds) = (read_video(path, SETTINGS, reader) for reader in frames.READERS)
    assert torch.equal(a, b) and seconds == their_seconds
    return ours, theirs


@pytest.mark.slow
def test_both_readers_show_the_same_of_all_clips():
    golden, real = sorted(FOLDER.parent.glob("*.mp4")), sorted(REAL.glob("*.mp4"))
    assert len(golden) == 9 and len(real) in (0, 3)
    by_decord = set()
    for path in [FOLDER / name for name in CLIPS] + golden + real:
        ours, theirs = same_by_both(path)
        if theirs.by_decord:
            indices = range(ours.total)
            pictures = zip(ours.frames(indices), theirs.decord_frames(indices), strict=True)
            assert all(np.array_equal(a, b) for a, b in pictures)
            by_decord.add(path.name)
    even = {path.name for path in golden} - {"odd.mp4"}
    assert by_decord == {*ONE_KEYFRAME, *even, *(path.name for path in real)}


@pytest.mark.parametrize(("name", "encoder", "options"), [
    ("v.mp4", "libx264", {"bf": "3"}), ("v.mov", "libx264", {"bf": "0"}), ("v.mkv", "libx264", {}),
    ("v.mp4", "libx265", {"x265-params": "log-level=none:pools=none:info=0"})])
def test_what_generators_write_is_decoded_by_decord(tmp_path, name, encoder, options):
    make_frames.write(tmp_path / name, encoder, {"g": "1000"} | options)
    pictures = list(DecordVideo(tmp_path / name).decord_frames([0, 1, 9, 22, 23]))
    assert [number(picture) for picture in pictures] == [0, 1, 9, 22, 23]
    assert same_by_both(tmp_path / name)[1].by_decord


@pytest.mark.parametrize(("name", "encoder", "pix_fmt", "size", "mirrored"), OTHERWISE)
def test_what_decord_would_show_otherwise_is_read_by_av(tmp_path, name, encoder, pix_fmt, size, mirrored):
    write(tmp_path / name, encoder, pix_fmt, None, size, mirrored)
    same_by_both(tmp_path / name)


def test_what_an_edit_list_hides_is_left_to_av(tmp_path):
    """decord would show it, here the first six frames."""
    make_frames.write(tmp_path / "whole.mp4", "libx264", {"g": "1000"})
    make_frames.remux(tmp_path / "whole.mp4", tmp_path / "edit.mp4", make_frames.skip)
    _, theirs = same_by_both(tmp_path / "edit.mp4")
    assert (theirs.total, theirs.by_decord) == (18, False)


def test_where_decord_gives_up_av_goes_on(monkeypatch):
    import decord
    count, read = [], decord.VideoReader.next

    def failing(self):
        count.append(self)
        if len(count) == 3:
            raise decord.DECORDError("a frame that it cannot decode")
        return read(self)

    monkeypatch.setattr(decord.VideoReader, "next", failing)
    pictures = DecordVideo(FOLDER / "vp9.webm").frames([0, 0, 5, 7, 9, 23])
    assert [number(picture) for picture in pictures] == [0, 0, 5, 7, 9, 23] and len(count) == 3


@pytest.mark.parametrize("name", ["av1.mp4", "vp9.webm", "closed.mp4", "pictures.gif"])
def test_both_readers_say_the_same_of_a_file_that_is_cut_short(tmp_path, name):
    whole = (FOLDER / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 9 // 10])
    said = []
    for reader in frames.READERS:
        with pytest.raises(DataError, match=name) as error:
            read_video(tmp_path / name, reader=reader)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_decord_is_imported_where_it_is_chosen(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "decord", None)  # as if it were not installed
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/backbone")
    clip = FOLDER / "vp9.webm"
    assert len(read_video(clip)[1]) == 4 and Processor(tokenizer).reader == "av"
    settings, chosen = VideoSettings(), {"reader": "decord"}
    for choose in (lambda: read_video(clip, **chosen), lambda: Processor(tokenizer, **chosen),
                   lambda: DeScore.load(tmp_path, **chosen),
                   lambda: Api("http://127.0.0.1/v1", "x", settings, **chosen)):
        with pytest.raises(DataError, match="the reader decord needs: pip install decord2"):
            choose()
    with pytest.raises(DataError, match="there is no reader 'opencv', but av and decord"):
        read_video(clip, settings, "opencv")


# ------------------------------------------------------------------------------------------------------------
# The commands. Who has read a file can be told by a damaged frame, which decord does not notice.


MODEL = ["--model", "HERE/model"]
SHORT = ["--max-new-tokens", 2]
STEP = ["--batch-size", 1, "--lora-rank", 4, "--workers", 0, *TOY_VIDEO]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A folder with a pair whose second clip has a damaged frame, and a model."""
    folder = tmp_path_factory.mktemp("damaged")
    clip = folder / "damaged.mp4"
    write(folder / "whole.mp4", size=(64, 64))
    whole = (folder / "whole.mp4").read_bytes()
    with av.open(str(folder / "whole.mp4")) as container:
        last = [packet for packet in container.demux() if packet.size][-1]
    for place in range(last.pos + last.size - 1, last.pos, -1):
        clip.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            read_video(clip)
        except DataError:
            if len(list(DecordVideo(clip).decord_frames([0, 1, 2, 3]))) == 4:
                break
    scores = {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 2, "style": 0}
    pair = {"prompt": "A circle.", "video_a": "whole.mp4", "video_b": "damaged.mp4", "preference": "A",
            "cot_a": "seen", "cot_b": "not seen", "scores_a": scores, "scores_b": scores}
    group = {"prompt": "A circle.", "videos": ["whole.mp4", "damaged.mp4"]}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    (folder / "groups.jsonl").write_text(json.dumps(group) + "\n")
    save_scorer(folder / "model")
    return folder


COMMANDS = [
    ["-m", "tools.check", "HERE/pairs.jsonl", *TOY_VIDEO],
    ["infer.py", "--pairs", "HERE/pairs.jsonl", "--cot", "off", "--out", "HERE/judged.jsonl", *MODEL]]
SLOW = [
    ["infer.py", "HERE/damaged.mp4", "A circle.", "--cot", "off", *MODEL],
    ["-m", "tools.annotate", "HERE/pairs.jsonl", "HERE/out.jsonl", *MODEL, *SHORT],
    ["-m", "tools.pairs", "HERE/groups.jsonl", "HERE/chosen.jsonl", *MODEL, *SHORT],
    ["-m", "tools.probe", "HERE/pairs.jsonl", *MODEL, *SHORT, "--samples", 1],
    ["coldstart.py", "--train", "HERE/pairs.jsonl", "--out", "HERE/run", *MODEL, *STEP],
    ["rl.py", "--train", "HERE/pairs.jsonl", "--out", "HERE/run", *MODEL, *STEP, *SHORT, "--steps", 1,
     "--updates", 1]]


def its_name(command):
    return command[1] if command[0] == "-m" else " ".join(command[:2])


@pytest.mark.parametrize(
    "command", [*COMMANDS, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)], ids=its_name)
def test_a_command_reads_by_decord_where_it_is_told_to(damaged, tmp_path, command):
    """What PyAV says is damaged decord reads; and what has been judged by the one counts for the other."""
    shutil.copytree(damaged, tmp_path, dirs_exist_ok=True)
    command = [str(part).replace("HERE", str(tmp_path)) for part in command]
    one = run(*command, check=False)
    assert one.returncode == 1 and "damaged.mp4" in one.stdout + one.stderr, one.stderr
    two = run(*command, "--reader", "decord")
    if (tmp_path / "judged.jsonl").is_file():
        assert "going on after 1 of 2 videos" in two.stderr
        made_by, *records = (tmp_path / "judged.jsonl").read_text().splitlines()
        assert len(records) == 2 and "decord" not in made_by


def test_a_scorer_and_a_page_read_by_it(damaged):
    clip = str(damaged / "damaged.mp4")
    for reader in frames.READERS:
        scorer = Scorer(damaged / "model", "cpu", reader=reader)
        (found,) = scorer([clip], "A circle.", think=False)
        (strip,) = film([{"video": clip}], SETTINGS, reader=reader)
        assert (found["error"] is None) == ("error" not in strip) == (reader == "decord")
