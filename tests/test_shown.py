"""A frame is what a player shows: turned and mirrored by the display matrix, of square pixels, cropped. The
pictures are drawn here, what files say is written into their bytes, and the right views are worked out."""

import argparse
import json
import struct
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_frames import FOLDER
from transformers import AutoTokenizer

from data import DataError, Processor, VideoSettings, read_video, smart_resize
from model import DeScore
from support.frames import READERS, Video
from tools import annotate, check, sent
from tools.decord_reader import DecordVideo
from tools.memory import Frames

SETTINGS = VideoSettings(min_pixels=4096)


def draw(height, width):
    """A picture (H, W, 3) of smooth colours, which is like none of its views."""
    y = np.linspace(0, 1, height)[:, None]
    x = np.linspace(0, 1, width)[None]
    colours = (220 * x * np.ones_like(y), 220 * y * np.ones_like(x), 110 * np.sin(3 * x) * (1 + y))
    return np.stack(colours, 2).astype(np.uint8)


def write(path, picture, encoder="libx264", pix_fmt="yuv444p", aspect=None, **options):
    """A clip of four frames of a picture, whose pixels have this width : height."""
    options = {"qp": "0"} | options if encoder == "libx264" else options
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=4, options=options)
        stream.height, stream.width, _ = picture.shape
        stream.pix_fmt = pix_fmt
        if encoder in ("mpeg2video", "mpeg4"):
            stream.bit_rate = 20_000_000
        if aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def change(path, name, offset, content):
    """Write bytes into the box of an MP4 file that has this name."""
    whole = bytearray(path.read_bytes())
    start = whole.index(name, whole.index(b"moov")) + 4 + offset
    whole[start : start + len(content)] = content
    path.write_bytes(whole)


def set_matrix(path, a, b, c, d):
    """A pixel at (x, y) is to be shown at (a x + c y, b x + d y)."""
    numbers = [round(part * 65536) for part in (a, b, 0, c, d, 0, 0, 0)]
    change(path, b"tkhd", 40, struct.pack(">9i", *numbers, 1 << 30))


def set_aspect(path, width, height):
    change(path, b"pasp", 0, struct.pack(">2I", width, height))


def shown(path, reader="av"):
    """The last frame of a clip."""
    video = {"av": Video, "decord": DecordVideo}[reader](path)
    (picture,) = video.frames([video.total - 1])
    return picture


def same(picture, expected, tolerance=4):
    """Whether pictures are of one size and look alike."""
    assert picture.shape == expected.shape
    return abs(picture.astype(int) - expected).mean() < tolerance


# ------------------------------------------------------------------------------------------------------------
# The display matrix

VIEWS = {
    (1, 0, 0, 1): lambda p: p,
    (-1, 0, 0, 1): lambda p: p[:, ::-1],  # right becomes left
    (1, 0, 0, -1): lambda p: p[::-1],
    (-1, 0, 0, -1): lambda p: p[::-1, ::-1],
    (0, 1, -1, 0): lambda p: p[::-1].swapaxes(0, 1),  # clockwise: what was below is at the left
    (0, -1, 1, 0): lambda p: p.swapaxes(0, 1)[::-1],
    (0, 1, 1, 0): lambda p: p.swapaxes(0, 1),
    (0, -1, -1, 0): lambda p: p.swapaxes(0, 1)[::-1, ::-1]}


@pytest.mark.parametrize("name", ["v.mp4", "v.mov"])
@pytest.mark.parametrize("size", [(95, 127), (96, 128)])
def test_all_eight_orientations_are_shown_upright_by_both_readers(tmp_path, name, size):
    picture = draw(*size)
    write(tmp_path / name, picture, g="100")
    for matrix, view in VIEWS.items():
        set_matrix(tmp_path / name, *matrix)
        for reader in READERS:
            assert same(shown(tmp_path / name, reader), view(picture)), (matrix, reader)
        frames, _ = read_video(tmp_path / name, SETTINGS)
        assert frames.shape[2:] == smart_resize(*view(picture).shape[:2], 2, SETTINGS)


def test_a_clip_that_the_encoder_mirrors_is_mirrored(tmp_path):
    picture = draw(96, 128)
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=4, width=128, height=96, pix_fmt="yuv444p")
        stream.set_display_rotation(90, hflip=True)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    assert same(shown(tmp_path / "v.mkv"), np.rot90(picture)[:, ::-1])


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (0.99999, 0.008, -0.008, 0.99999)])
def test_a_matrix_that_says_nothing_turns_nothing(tmp_path, matrix):
    write(tmp_path / "v.mp4", draw(96, 128))
    set_matrix(tmp_path / "v.mp4", *matrix)
    assert same(shown(tmp_path / "v.mp4"), draw(96, 128))


@pytest.mark.parametrize("degrees", [3, 30, 45, 120, -45])
def test_other_angles_are_refused(tmp_path, degrees):
    write(tmp_path / "v.mp4", draw(96, 128))
    x, y = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    set_matrix(tmp_path / "v.mp4", x, y, -y, x)
    for reader in READERS:
        with pytest.raises(DataError, match=r"v\.mp4: .*an angle that is no multiple of 90 degrees"):
            read_video(tmp_path / "v.mp4", SETTINGS, reader)


# ------------------------------------------------------------------------------------------------------------
# Pixels that are not square


@pytest.mark.parametrize(("name", "encoder", "pix_fmt", "size", "aspect", "width"), [
    ("dvd.mpg", "mpeg2video", "yuv420p", (576, 720), "64/45", 1024),
    ("dvd.ts", "mpeg2video", "yuv420p", (480, 720), "8/9", 640),
    ("hdv.mp4", "libx264", "yuv420p", (108, 144), "4/3", 192),
    ("phone.mov", "libx264", "yuv420p", (96, 128), "3/2", 192),
    ("v.mkv", "libx264", "yuv420p", (96, 128), "64/45", 182),
    ("v.avi", "mpeg4", "yuv420p", (96, 128), "1/2", 64),
    ("vp9.mp4", "libvpx-vp9", "yuv420p", (96, 128), "2", 256),  # the container alone tells
    ("v.mp4", "libx264", "yuv444p", (95, 127), "5/4", 159),
    ("square.mp4", "libx264", "yuv420p", (96, 128), "1", 128)])
def test_pixels_become_square(tmp_path, name, encoder, pix_fmt, size, aspect, width):
    path = tmp_path / name
    write(path, draw(*size), encoder, pix_fmt, aspect, **({"crf": "5"} if name == "vp9.mp4" else {}))
    expected = draw(size[0], width)
    for reader in READERS:
        assert same(shown(path, reader), expected)
    frames, _ = read_video(path, SETTINGS)
    assert frames.shape[2:] == smart_resize(*expected.shape[:2], len(frames), SETTINGS)
    processor = Processor(AutoTokenizer.from_pretrained(ROOT / "toy/backbone"), SETTINGS)
    assert processor.outline(path, "x").grid == (len(frames) // 2, *(side // 16 for side in frames.shape[2:]))


def test_a_pair_of_two_ratios_is_compared_as_it_is_shown(tmp_path):
    write(tmp_path / "wide.mp4", draw(288, 512))
    write(tmp_path / "narrow.mp4", draw(288, 360), aspect="64/45")
    (a, _), (b, _) = (read_video(tmp_path / name) for name in ("wide.mp4", "narrow.mp4"))
    assert a.shape == b.shape and (a.float() - b.float()).abs().mean() < 2


@pytest.mark.parametrize(("aspect", "matrix"), [("2", (0, 1, -1, 0)), ("1/2", (0, -1, -1, 0))])
def test_a_ratio_is_that_of_the_frame_before_it_is_turned(tmp_path, aspect, matrix):
    write(tmp_path / "v.mp4", draw(96, 128), aspect=aspect)
    set_matrix(tmp_path / "v.mp4", *matrix)
    expected = VIEWS[matrix](draw(96, int(128 * Fraction(aspect))))
    assert same(shown(tmp_path / "v.mp4"), expected)


def test_the_ratio_of_the_container_comes_before_that_of_the_codec(tmp_path):
    write(tmp_path / "v.mp4", draw(96, 128), aspect="3/2")
    for ratio, width in (((3, 2), 192), ((2, 1), 256), ((1, 1), 128), ((0, 1), 192), ((1, 0), 192)):
        set_aspect(tmp_path / "v.mp4", *ratio)  # nought is unknown
        assert shown(tmp_path / "v.mp4").shape == (96, width, 3)


def test_a_hostile_ratio_is_refused_by_its_size(tmp_path):
    write(tmp_path / "v.mp4", draw(288, 128), aspect="3/2")
    for ratio, why in (((1_000_000, 1), "128000000 x 288 pixels a frame"), ((1, 1000), "1 x 288 pixels: one"),
                       ((500, 1), "64000 x 288 pixels: one")):
        set_aspect(tmp_path / "v.mp4", *ratio)
        with pytest.raises(DataError, match=rf"v\.mp4: .*{why}"):
            read_video(tmp_path / "v.mp4")
    args = argparse.Namespace(max_frames=40, max_pixels=200 * 288, reader="av")
    for ratio, fits in (((3, 2), True), ((2, 1), False)):
        set_aspect(tmp_path / "v.mp4", *ratio)
        if fits:
            sent.check_file(tmp_path / "v.mp4", args)
        else:
            with pytest.raises(DataError, match="256 x 288 pixels a frame, more than 57,600"):
                sent.check_file(tmp_path / "v.mp4", args)


def test_frames_that_are_sent_are_those_that_a_file_shows(tmp_path):
    path = tmp_path / "v.mp4"
    write(path, draw(96, 128), aspect="3/2", **{"x264-params": "crop-rect=6,0,2,0"})
    set_matrix(path, 0, 1, 1, 0)
    video = Video(path)
    held = Frames(list(video.frames(range(video.total))), video.fps)
    (ours, seconds), (theirs, their_seconds) = read_video(held), read_video(path)
    assert torch.equal(ours, theirs) and seconds == their_seconds


# ------------------------------------------------------------------------------------------------------------
# What is cut off


@pytest.mark.parametrize("left", [10, 32])
def test_what_a_codec_crops_is_cropped_to_the_pixel(tmp_path, left):
    picture = draw(96, 160)
    write(tmp_path / "v.mp4", picture, **{"x264-params": f"crop-rect={left},4,6,2"})
    for reader in READERS:
        assert same(shown(tmp_path / "v.mp4", reader), picture[4:-2, left:-6], 1.5)


def set_aperture(path, width, height, across, down):
    """Write a clap box, MP4's: so many pixels, their middle so far from that of the frame."""
    numbers = (width, 1, height, 1, across, 1, down, 1)
    whole = bytearray(path.read_bytes())
    start = whole.index(b"moov") - 4
    end = 0
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        start = whole.index(name, start) - 4
        size = int.from_bytes(whole[start : start + 4])
        end = start + size
        whole[start : start + 4] = (size + 40).to_bytes(4)
        start += 4
    whole[end:end] = struct.pack(">I4s8i", 40, b"clap", *numbers)
    path.write_bytes(whole)


def test_what_a_container_crops_is_cropped_and_then_made_square(tmp_path):
    picture = draw(96, 128)
    for aspect, width in ((None, 100), ("3/2", 150)):
        write(tmp_path / "v.mp4", picture, aspect=aspect)
        set_aperture(tmp_path / "v.mp4", 100, 80, -6, 4)  # 8 pixels further left than in the middle, by 6
        with av.open(str(tmp_path / "v.mp4")) as old, av.open(str(tmp_path / "v.mkv"), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux():
                if packet.size:
                    packet.stream = stream
                    new.mux(packet)
        assert b"\x54\xcc" in (tmp_path / "v.mkv").read_bytes()  # PixelCropLeft
        expected = picture[12 : 12 + 80, 8 : 8 + 100]
        expected = expected[:, (np.arange(width) * 100 // width)]
        for name in ("v.mp4", "v.mkv"):
            for reader in READERS:
                assert same(shown(tmp_path / name, reader), expected)
    assert av.logging.get_level() is None


def test_a_crop_that_leaves_nothing_is_an_error(tmp_path):
    write(tmp_path / "v.mp4", draw(96, 128))
    video = Video(tmp_path / "v.mp4")
    for crop in ((0, 130, 0, 0), (64, 64, 0, 0), (0, 0, 96, 0)):  # of a larger frame than the first
        video.crop = crop
        with pytest.raises(ValueError, match="all of a frame is cropped away"):
            next(video.frames([0]))


# ------------------------------------------------------------------------------------------------------------
# What else is shown, and what is said


def test_a_cover_before_the_video_is_not_the_video(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", width=256, height=256, pix_fmt="yuvj420p")
        cover.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream("libx264", rate=4, width=128, height=96, pix_fmt="yuv444p")
        container.mux(cover.encode(av.VideoFrame(256, 256, "yuvj420p")))
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(96, 128))))
        container.mux(stream.encode())
    assert same(shown(tmp_path / "v.mp4"), draw(96, 128), 8)


@pytest.mark.parametrize(("space", "full", "red", "blue"), [
    (1, False, 0.2126, 0.0722), (5, False, 0.299, 0.114), (5, True, 0.299, 0.114),
    (2, False, 0.299, 0.114)])  # unnamed
def test_colours_follow_the_matrix_and_the_range_that_a_file_names(tmp_path, space, full, red, blue):
    """Pure red, as BT.709 or BT.601 writes it."""
    low, high, spread = (0, 255, 127) if full else (16, 219, 112)
    parts = (low + red * high, 128 - red / (1 - blue) * spread, 128 + spread)
    planes = np.stack([np.full((96, 128), round(part), np.uint8) for part in parts])
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4, width=128, height=96, pix_fmt="yuv444p")
        stream.options = {"qp": "0"}
        frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
        for tagged in (stream.codec_context, frame):
            tagged.colorspace, tagged.color_range = space, 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert abs(shown(tmp_path / "v.mp4")[40, 40].astype(int) - (255, 0, 0)).max() < 5


def test_a_check_names_what_is_interlaced(tmp_path, capsys):
    prompts = {"prompt": "A circle.", "preference": "A"}
    pairs = tmp_path / "pairs.jsonl"
    files = [str(FOLDER / name) for name in ("mbaff.mp4", "closed.mp4", "vp9.webm")]
    rows = [prompts | {"video_a": files[0], "video_b": files[1]},
            prompts | {"video_a": files[1], "video_b": files[2]}]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check.check(pairs, SETTINGS)
    said = capsys.readouterr().out
    assert "interlaced, read with both fields of a frame woven together: 1\n" in said
    assert f"\n{files[0]}\n" in said and files[1] not in said
    pairs.write_text(json.dumps(rows[1]) + "\n")
    assert check.check(pairs, SETTINGS) and "interlaced" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Bounds that contradict each other


@pytest.mark.parametrize(("asked", "message"), [
    ({"max_pixels": 131_071}, "max_pixels is 131071, below min_pixels, 131072"),
    ({"min_pixels": 10**6}, "max_pixels is 786432, below min_pixels, 1000000"),
    ({"max_frames": 3}, "max_frames is 3, below min_frames, 4"),
    ({"min_frames": 9, "max_frames": 8}, "max_frames is 8, below min_frames, 9"),
    ({"fps": 0.0}, "fps is 0.0"), ({"fps": -1}, "fps is -1"), ({"fps": float("nan")}, "fps is nan"),
    ({"fps": float("inf")}, "fps is inf"), ({"fps": True}, "fps is True"), ({"fps": "2"}, "fps is '2'"),
    ({"max_pixels": 2e5}, "max_pixels is 200000.0"), ({"min_frames": 0}, "min_frames is 0"),
    ({"total_pixels": -1}, "total_pixels is -1"), ({"max_frames": 1}, "max_frames is 1")])
def test_settings_that_contradict_each_other_are_refused(asked, message):
    with pytest.raises(TypeError, match=rf"^{message}$"):
        VideoSettings(**asked)
    equal = {"min_frames": 6, "max_frames": 6, "min_pixels": 4096, "max_pixels": 4096}
    assert VideoSettings(**equal).max_pixels == 4096


@pytest.mark.parametrize(("command", "flags"), [
    (check, ["pairs.jsonl"]), (annotate, ["pairs.jsonl", "out", "--api", "http://x", "--api-model", "y"])])
def test_flags_that_contradict_each_other_are_refused(monkeypatch, command, flags):
    monkeypatch.setattr(sys, "argv", ["command", *flags, "--max-pixels", "100000"])
    with pytest.raises(DataError, match="max_pixels is 100000, below min_pixels, 131072"):
        command.main()


def test_flags_that_contradict_a_models_own_settings_are_refused():
    with pytest.raises(DataError, match="backbone: video settings .*max_pixels is 4096, below min_pixels"):
        DeScore.load(ROOT / "toy/backbone", device="cpu", video={"min_pixels": 9000})
