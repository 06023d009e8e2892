"""Make the clips of frames/: one of each kind of file, every frame of which carries its own number.

    python tests/golden/make_frames.py      # av 18.1.0

A frame is 64 x 48 pixels, twelve blocks, black or white: the six bits of its number, then their inverses, so
that what is no frame at all is not taken for one. Encoders are not the same everywhere: other bytes may come
out, the numbers and seconds that tests/test_frames.py expects may not change.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HERE = Path(__file__).resolve().parent / "frames"
COUNT, FPS = 24, 12
X264 = {"crf": "30", "preset": "slow", "threads": "1"}
GOP = "keyint=8:min-keyint=8:scenecut=0:bframes=3:b-adapt=0:b-pyramid=none"
GAPS = [*range(4), *range(7, 15), *range(20, 24)]  # ticks at which gaps.avi has frames
# name: encoder, its options
KINDS = {
    "closed.mp4": ("libx264", X264 | {"x264-params": GOP}),
    "closed.mov": ("libx264", X264 | {"x264-params": GOP}),
    "closed.mkv": ("libx264", X264 | {"x264-params": GOP}),
    "closed.flv": ("libx264", X264 | {"x264-params": GOP}),
    "open-h264.mp4": ("libx264", X264 | {"x264-params": GOP + ":open-gop=1"}),
    "open-hevc.mp4": ("libx265", {"x265-params": GOP.replace("b-pyramid=none", "b-pyramid=0")
                                  + ":open-gop=1:log-level=none:pools=none:info=0"}),
    "refresh.mp4": ("libx264", X264 | {"x264-params": "intra-refresh=1:keyint=8:bframes=0"}),
    "mbaff.mp4": ("libx264", X264 | {"x264-params": GOP + ":interlaced=1"}),
    "bframes.avi": ("mpeg4", {"bf": "2", "g": "8", "qscale": "5"}),
    "gaps.avi": ("mpeg4", {"bf": "2", "g": "8", "qscale": "5"}),
    "h264.avi": ("libx264", X264 | {"x264-params": GOP}),
    "h264.ts": ("libx264", X264 | {"x264-params": GOP}),
    "mpeg2.ts": ("mpeg2video", {"bf": "2", "g": "8", "qscale": "5"}),
    "mpeg2.mpg": ("mpeg2video", {"bf": "2", "g": "8", "qscale": "5"}),
    "av1.mp4": ("libsvtav1", {"preset": "8", "crf": "45", "svtav1-params": "lp=1"}),
    "vp9.webm": ("libvpx-vp9", {"crf": "40", "b:v": "0", "auto-alt-ref": "1", "lag-in-frames": "12"}),
    "pictures.gif": ("gif", {}),
}


def draw(number: int) -> np.ndarray:
    """The frame (48, 64, 3) uint8 with this number."""
    bits = [number >> place & 1 for place in range(6)]
    blocks = np.array(bits + [1 - bit for bit in bits]).reshape(3, 4)
    return np.kron(blocks, np.ones((16, 16)))[..., None].repeat(3, 2).astype(np.uint8) * 255


def write(path: Path, encoder: str, options: dict, times=range(COUNT), tick=Fraction(1, FPS)) -> None:
    """A clip of a frame for each of `times`, which are in ticks."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=FPS, options=options)
        stream.height, stream.width = 48, 64
        stream.pix_fmt = "rgb8" if encoder == "gif" else "yuv420p"
        stream.codec_context.time_base = tick
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(draw(number))
            frame.pts, frame.time_base = time, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def remux(source: Path, path: Path, change) -> None:
    """The packets of a clip, changed, in another file."""
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in change([packet for packet in old.demux() if packet.size]):
            packet.stream = stream
            new.mux(packet)


def skip(packets: list[av.Packet]) -> list[av.Packet]:
    """Begin six frames late: what is before zero is in the file and is not shown."""
    for packet in packets:
        offset = packet.time_base.denominator * 6 // FPS
        packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
    return packets


def pack(packets: list[av.Packet]) -> list[av.Packet]:
    """Each B-frame in the packet of the frame before it, as DivX does; an empty one takes its place."""
    vop, found = b"\0\0\1\xb6", []
    for packet, following in zip(packets, [*packets[1:], None]):
        data, b_follows = bytes(packet), following and bytes(following).partition(vop)[2][0] >> 6 == 2
        if data.partition(vop)[2][0] >> 6 == 2:
            data = vop + b"\x60\x20\x7f"
        elif b_follows:
            data += bytes(following)
        if not found:
            head, _, body = data.partition(vop)
            data = head + b"\0\0\1\xb2DivX503b1393p" + vop + body
        found.append(av.Packet(data))
        found[-1].dts = found[-1].pts = len(found) - 1
        found[-1].time_base, found[-1].is_keyframe = Fraction(1, FPS), packet.is_keyframe
    return found


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for name, (encoder, options) in KINDS.items():
        write(HERE / name, encoder, options, *[GAPS] * (name == "gaps.avi"))
    write(HERE / "variable.mp4", *KINDS["closed.mp4"], [n * n * 10 for n in range(COUNT)], Fraction(1, 1000))
    remux(HERE / "closed.mp4", HERE / "edit.mp4", skip)
    write(HERE / "loose.avi", "mpeg4", {"bf": "1", "g": "24", "qscale": "5"})
    remux(HERE / "loose.avi", HERE / "packed.avi", pack)
    (HERE / "loose.avi").unlink()


if __name__ == "__main__":
    main()
