"""Which frames come, and when: told by the number that each frame of tests/golden/frames carries in its
pixels, and by times that are so by construction (tests/golden/make_frames.py)."""

import shutil
import sys

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from data import DataError, Processor, VideoSettings, read_video
from support import frames
from support.frames import Video, timing

sys.path.insert(0, str(ROOT / "tests/golden"))
import make_frames

FOLDER = ROOT / "tests/golden/frames"
SETTINGS = VideoSettings(fps=4.0, min_pixels=4096)
GAPS = [0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14, 20, 21, 22, 23]
# name: the numbers of the frames that are shown, and their seconds
CLIPS = {path.name: (list(range(24)), [n / 12 for n in range(24)]) for path in sorted(FOLDER.iterdir())}
CLIPS |= {"edit.mp4": (list(range(6, 24)), [n / 12 for n in range(18)]),
          "gaps.avi": (list(range(16)), [n / 12 for n in GAPS]),
          "variable.mp4": (list(range(24)), [n * n / 100 for n in range(24)]),
          "pictures.gif": (list(range(24)), [int(n * 100 / 12 + 0.5) / 100 for n in range(24)])}
UNSTEADY = ("gaps.avi", "variable.mp4", "pictures.gif")


def number(picture) -> int:
    """What a frame (H, W, 3) says: six bits, then their inverses, in 3 x 4 blocks."""
    h, w = picture.shape[:2]
    y, x = (np.arange(3) * 2 + 1) * h // 6, (np.arange(4) * 2 + 1) * w // 8
    grey = np.asarray(picture, dtype=float).mean(2)
    bits = np.array([[grey[i - 2 : i + 3, j - 2 : j + 3].mean() > 128 for j in x] for i in y]).reshape(2, 6)
    assert (bits[0] != bits[1]).all(), "not one of the frames that were drawn"
    return int((bits[0] << np.arange(6)).sum())


def sampled(video) -> tuple[list[int], list[float]]:
    """The numbers of the frames that a model sees, and their seconds."""
    pictures, seconds = read_video(video, SETTINGS)
    return [number(picture) for picture in pictures.permute(0, 2, 3, 1)], seconds


def copy(name, path, first=0, **options):
    """The packets of a clip, from the first of them on, in another file."""
    with av.open(str(FOLDER / name)) as old, av.open(str(path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in [packet for packet in old.demux() if packet.size][first:]:
            packet.stream = stream
            new.mux(packet)


def test_there_are_clips():
    assert len(CLIPS) >= 20


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_asked_for(name):
    numbers, seconds = CLIPS[name]
    video = Video(FOLDER / name)
    assert [number(picture) for picture in video.frames(range(video.total))] == numbers
    if name in UNSTEADY:
        assert np.allclose(video.seconds, seconds, atol=1e-9)
        assert video.fps == pytest.approx((len(seconds) - 1) / seconds[-1])
    else:
        assert (video.fps, video.seconds) == (12, seconds)  # to the last bit
    for some in ([3], [2, 2, 11], [0, len(numbers) - 1]):
        assert [number(picture) for picture in video.frames(some)] == [numbers[index] for index in some]


@pytest.mark.parametrize("name", CLIPS)
def test_a_model_sees_frames_from_the_first_to_the_last(name):
    numbers, seconds = CLIPS[name]
    found, when = sampled(FOLDER / name)
    places = np.linspace(0, len(numbers) - 1, len(found)).round().astype(int)
    assert len(found) >= 4 and found == [numbers[place] for place in places]
    assert np.allclose(when, [seconds[place] for place in places], atol=1e-9)


@pytest.mark.parametrize("name", CLIPS)
def test_an_outline_is_that_of_the_sample(name, processor):
    whole, outline = (make(FOLDER / name, "A circle.") for make in (processor, processor.outline))
    assert outline.grid == whole.grid and outline.input_ids.tolist() == whole.input_ids.tolist()


@pytest.fixture
def processor():
    return Processor(AutoTokenizer.from_pretrained(ROOT / "toy/backbone"), SETTINGS)


@pytest.fixture
def decoded(monkeypatch):
    """How many frames were decoded."""
    count, decode = [], Video.decode

    def counted(self):
        for frame in decode(self):
            count.append(frame)
            yield frame

    monkeypatch.setattr(Video, "decode", counted)
    return count


@pytest.mark.parametrize("name", ["closed.mp4", "open-h264.mp4", "edit.mp4", "vp9.webm", "av1.mp4"])
def test_what_generators_write_is_decoded_once_and_outlined_by_one_frame(name, processor, decoded):
    processor.outline(FOLDER / name, "A circle.")
    assert len(decoded) == 1
    read_video(FOLDER / name)
    assert len(decoded) == 1 + len(CLIPS[name][0])


@pytest.mark.parametrize("name", ["open-h264.mp4", "open-hevc.mp4"])
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_clip_that_begins_within_a_group_of_pictures_is_counted_by_decoding(tmp_path, name, container):
    """Cut out of an open group: its first frames in time refer to one that is not there."""
    copy(name, tmp_path / f"v.{container}", first=5)
    video = Video(tmp_path / f"v.{container}")
    assert [number(picture) for picture in video.frames(range(video.total))] == list(range(8, 24))
    assert np.allclose(video.seconds, [n / 12 for n in range(16)], atol=0.001)


@pytest.mark.parametrize(("name", "encoder"), [
    ("v.webm", "libvpx"), ("v.wmv", "wmv2"), ("v.ogv", "libtheora"), ("v.mkv", "ffv1"), ("v.mov", "mpeg4"),
    ("v.mkv", "mpeg4")])
def test_other_kinds_of_files(tmp_path, name, encoder):
    if encoder not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {encoder}")
    make_frames.write(tmp_path / name, encoder, {"bf": "2"} if encoder == "mpeg4" else {})
    video = Video(tmp_path / name)
    assert [number(picture) for picture in video.frames(range(24))] == list(range(24))
    assert (video.fps, video.seconds) == (12, [n / 12 for n in range(24)])


@pytest.mark.parametrize(("stamps", "tick", "rate", "fps", "seconds"), [
    ([5, 6, 7], 1 / 12, 12.0, 12.0, [0, 1 / 12, 2 / 12]),
    ([5, 6, 8], 1 / 12, 12.0, 8.0, [0, 1 / 12, 3 / 12]),  # one is missing
    ([7, 5, 6], 1 / 12, 12.0, 12.0, [0, 1 / 12, 2 / 12]),
    ([0, 42, 83], 0.001, 24.0, 24.0, [0, 1 / 24, 2 / 24]),  # rounded
    ([0, 42, 90], 0.001, 24.0, 2 / 0.09, [0, 0.042, 0.09]),
    ([0, 50, 100], 0.01, 0.0, 2.0, [0, 0.5, 1]),  # no rate is given
    ([None, 0, 1], 0.5, 4.0, 4.0, [0, 0.25, 0.5]), ([3, 3, 4], 0.5, 4.0, 4.0, [0, 0, 0.5])])
def test_seconds_follow_the_rate_or_else_the_timestamps(stamps, tick, rate, fps, seconds):
    found, when = timing(stamps, tick, rate)
    assert found == pytest.approx(fps) and when == pytest.approx(seconds, abs=1e-12)


@pytest.mark.parametrize(("stamps", "message"), [([], "no frames"), ([None, 1], "no frame rate")])
def test_no_seconds_are_made_up(stamps, message):
    with pytest.raises(ValueError, match=message):
        timing(stamps, 0.1, 0.0)


# ------------------------------------------------------------------------------------------------------------
# How a frame looks


def write(path, encoder="libx264", pix_fmt="yuv420p", turn=None, size=(48, 64), mirrored=False):
    picture = np.zeros((*size, 3), np.uint8)
    picture[: size[0] // 3, : size[1] // 4] = (255, 0, 0)  # red at the upper left
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=4)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        if turn is not None or mirrored:
            stream.set_display_rotation(turn or 0, hflip=mirrored)
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


@pytest.mark.parametrize(("turn", "size", "corner"), [(None, (48, 64), (5, 5)), (90, (64, 48), (-6, 5)),
                                                      (180, (48, 64), (-6, -6)), (270, (64, 48), (5, -6))])
def test_a_turned_video_is_upright(tmp_path, turn, size, corner):
    write(tmp_path / "v.mp4", turn=turn)
    (picture,) = Video(tmp_path / "v.mp4").frames([1])
    assert picture.shape == (*size, 3)
    red, green, _ = picture[corner].astype(int)
    assert red > 200 and green < 60 and picture.astype(int).sum(2).mean() < 60


@pytest.mark.parametrize(("name", "encoder", "pix_fmt", "size"), [
    ("v.mp4", "libx264", "yuv444p", (47, 63)), ("v.mp4", "libx264", "yuv420p10le", (48, 64)),
    ("v.mp4", "libx264", "yuvj420p", (48, 64)), ("v.mov", "qtrle", "argb", (48, 64)),
    ("v.mkv", "ffv1", "bgr0", (47, 63)), ("v.avi", "mjpeg", "yuvj422p", (48, 64))])
def test_kinds_of_pixels(tmp_path, name, encoder, pix_fmt, size):
    write(tmp_path / name, encoder, pix_fmt, size=size)
    pictures = list(Video(tmp_path / name).frames([0, 3]))
    for picture in pictures:
        assert picture.shape == (*size, 3) and picture.dtype == np.uint8
        assert (abs(picture[5, 5].astype(int) - (255, 0, 0)) < 12).all() and picture[-5, -5].max() < 12


def test_a_video_whose_frames_change_their_size_is_shown_at_the_first(tmp_path):
    for size in ((48, 64), (96, 128)):
        write(tmp_path / f"{size[0]}.mpg", "mpeg2video", size=size)
    both = (tmp_path / "48.mpg").read_bytes() + (tmp_path / "96.mpg").read_bytes()
    (tmp_path / "v.mpg").write_bytes(both)
    video = Video(tmp_path / "v.mpg")
    assert {picture.shape for picture in video.frames(range(video.total))} == {(48, 64, 3)}
    assert video.total > 4


# ------------------------------------------------------------------------------------------------------------
# What is refused

PLAYLISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.0,\nh264.ts\n#EXT-X-ENDLIST\n",
    "concat.mp4": "ffconcat version 1.0\nfile 'closed.mp4'\n",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 32\n",
    "drawing.svg": '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="64" height="48"/>',
    "words.srt": "1\n00:00:00,000 --> 00:00:02,000\nwords\n"}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_playlists_open_nothing(tmp_path, name):
    for clip in ("h264.ts", "closed.mp4"):
        shutil.copy(FOLDER / clip, tmp_path)
    (tmp_path / name).write_text(PLAYLISTS[name])
    if name in ("list.m3u8", "concat.mp4"):
        with av.open(str(tmp_path / name)) as container:  # FFmpeg follows them
            assert len(list(container.decode(video=0))) == 24
    with pytest.raises(DataError, match=rf"{name}: not a video .*\(it is none of"):
        read_video(tmp_path / name)


@pytest.mark.parametrize("name", ["concat:closed.mp4", "file:closed.mp4", "a%03d.mp4"])
def test_a_name_is_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copy(FOLDER / "closed.mp4", tmp_path / name)
    assert Video(name).total == 24
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match="no such file"):
        read_video(name)


@pytest.mark.parametrize("name", ["closed.mp4", "closed.mkv", "bframes.avi"])
def test_a_title_may_be_in_any_encoding(tmp_path, name):
    whole = (FOLDER / name).read_bytes()
    assert b"Lavf" in whole
    (tmp_path / name).write_bytes(whole.replace(b"Lavf", b"L\xe4vf"))
    assert Video(tmp_path / name).total == 24


def test_pictures_and_covers_are_no_videos(tmp_path):
    from PIL import Image
    picture = Image.fromarray(np.zeros((48, 64, 3), np.uint8))
    picture.save(tmp_path / "still.png")
    picture.save(tmp_path / "moving.webp", save_all=True, append_images=[picture.rotate(180)] * 3)
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        cover = container.add_stream("mjpeg")
        cover.height, cover.width, cover.pix_fmt = 48, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        sound = container.add_stream("aac", rate=16000)
        container.mux(cover.encode(av.VideoFrame(64, 48, "yuvj420p")))
        for start in range(0, 16384, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, start
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    for name, why in (("still.png", "none of"), ("moving.webp", "none of"), ("song.m4a", "holds no video")):
        with pytest.raises(DataError, match=f"{name}: .*{why}"):
            read_video(tmp_path / name)


@pytest.mark.parametrize("name", [name for name in CLIPS if not name.endswith((".ts", ".mpg", ".flv"))])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_file_cut_short_is_an_error(tmp_path, name, share):
    """But for MPEG's streams, which may end anywhere."""
    whole = (FOLDER / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=name):
        read_video(tmp_path / name)


@pytest.mark.parametrize("name", ["bframes.avi", "h264.avi"])
@pytest.mark.parametrize("size", [0, 2**32 - 1])
def test_an_avi_written_to_a_pipe_has_no_length_and_is_read(tmp_path, name, size):
    whole = (FOLDER / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:4] + size.to_bytes(4, "little") + whole[8:])
    assert sampled(tmp_path / name) == sampled(FOLDER / name)


def test_a_file_with_its_index_in_front_is_never_read_in_part(tmp_path):
    copy("closed.mp4", tmp_path / "v.mp4", movflags="faststart")
    assert sampled(tmp_path / "v.mp4") == sampled(FOLDER / "closed.mp4")
    with av.open(str(tmp_path / "v.mp4")) as container:
        ends = [packet.pos for packet in container.demux() if packet.size]
    whole = (tmp_path / "v.mp4").read_bytes()
    assert whole.index(b"moov") < min(ends)
    for end in ends:  # between two frames
        (tmp_path / "cut.mp4").write_bytes(whole[:end])
        with pytest.raises(DataError, match="it is cut short|End of file"):
            read_video(tmp_path / "cut.mp4")


@pytest.mark.parametrize(("name", "place", "bits"), [
    ("closed.mp4", 1140, 255),
    ("open-hevc.mp4", 1273, 4)])  # a player makes something up, and does not say so
def test_a_frame_that_is_damaged_is_an_error(tmp_path, name, place, bits):
    whole = bytearray((FOLDER / name).read_bytes())
    whole[place] ^= bits
    (tmp_path / name).write_bytes(whole)
    with pytest.raises(DataError, match=rf"{name}: not a video that can be read"):
        read_video(tmp_path / name)


def test_more_frames_or_fewer_than_announced_are_an_error():
    video = Video(FOLDER / "closed.mp4")
    for total in (23, 25):
        video.total = total
        with pytest.raises(ValueError, match=f"{total} frames are announced, 24 can be decoded"):
            list(video.frames([0]))


def test_giant_frames_are_refused_before_they_are_decoded(tmp_path, monkeypatch, decoded):
    whole = bytearray((FOLDER / "pictures.gif").read_bytes())
    whole[6:10] = (16384).to_bytes(2, "little") * 2
    (tmp_path / "giant.gif").write_bytes(whole)
    with pytest.raises(DataError, match=r"giant\.gif: not a video that can be read"):
        read_video(tmp_path / "giant.gif")
    monkeypatch.setattr(frames, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(DataError, match="64 x 48 pixels a frame"):
        read_video(FOLDER / "closed.mp4")
    assert not decoded


def test_mutated_files_raise_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    for path in sorted(FOLDER.iterdir()):
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(10):
            broken = whole.copy()
            places = rng.integers(0, len(broken), 1 + rng.integers(20))
            broken[places] = rng.integers(0, 256, len(places))
            (tmp_path / path.name).write_bytes(broken.tobytes())
            try:
                video = Video(tmp_path / path.name)
                assert len(list(video.frames(range(video.total)))) == video.total == len(video.seconds)
            except frames.ERRORS:
                pass


def test_nothing_is_written_to_stderr(tmp_path, capfd):
    broken = bytearray((FOLDER / "h264.ts").read_bytes())
    broken[3000:3100] = bytes(100)
    (tmp_path / "v.ts").write_bytes(broken)
    with pytest.raises(DataError, match=r"v\.ts"):
        read_video(tmp_path / "v.ts")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_read_after_their_parent_has(method, workers):
    paths = [FOLDER / name for name in ("closed.mp4", "av1.mp4", "open-hevc.mp4", "h264.ts")]
    expected = [read_video(path) for path in paths]
    found = DataLoader(paths, batch_size=None, num_workers=workers, collate_fn=read_video,
                       multiprocessing_context=method)
    for (pictures, seconds), (theirs, their_seconds) in zip(found, expected, strict=True):
        assert torch.equal(pictures, theirs) and seconds == their_seconds
