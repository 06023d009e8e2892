"""A small world of text-to-video clips whose truth is known.

    python toy/world.py OUT --pairs 1000 --seed 0

writes OUT/videos/*.mp4 and three pair files (JSON lines, see data.py): train.jsonl, test_id.jsonl and
test_ood.jsonl.

A *scene* says what a clip shows, by the five dimensions that a CoT judges: subject (colour and shape),
dynamics, camera, environment, style. A prompt asks for a scene, or for part of one. A generator draws the
prompt badly: each attribute goes wrong at the generator's own rate, and the frames carry the generator's own
signature (grain, vignette, ...). Comparing what was asked with what is shown gives the true sub-scores; their
weighted mean, seen through a noisy annotator, gives the preference.

Two things differ out of domain. The generators are new, and the good one wears the signature that the worst
one wears in training: whoever scores signatures instead of content falls for it. And the scenes combine
attributes that never stand together in training (`is_novel`).
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import overall_score

# This world keeps its own, whatever data.DIMENSIONS says.
DIMENSIONS = {"subject": 2, "dynamics": 2, "camera": 1, "environment": 1, "style": 1}
SIZE, FRAMES, FPS = 64, 16, 4  # a clip: 16 frames of 64 x 64 pixels, 4 seconds

COLOURS = {"red": (225, 45, 45), "yellow": (240, 215, 50), "blue": (70, 130, 255), "white": (245, 245, 245),
           "pink": (255, 120, 200)}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1),
           "stands still": (0, 0), "runs in circles": None}
CAMERAS = ("stays static", "zooms in", "zooms out", "pans left", "pans right")
ENVIRONMENTS = ("at night", "in a desert", "in a forest", "at sea", "in a city")
STYLES = ("solid", "outlined", "striped")


@dataclass(frozen=True)
class Scene:
    """What a clip shows, or what a prompt asks for; there None means that it does not ask."""

    colour: str
    shape: str
    motion: str | None
    camera: str | None
    environment: str | None
    style: str | None


VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": tuple(MOTIONS), "camera": CAMERAS,
          "environment": ENVIRONMENTS, "style": STYLES}
ASKED = {"colour": 1.0, "shape": 1.0, "motion": 0.85, "camera": 0.6, "environment": 0.7, "style": 0.6}


@dataclass(frozen=True)
class Generator:
    error_rate: float  # chance that an attribute of the clip is drawn at random instead of as asked
    signature: str


TRAIN_GENERATORS = {"aurora": Generator(0.08, "vignette"), "basalt": Generator(0.35, "border"),
                    "cinder": Generator(0.7, "grain")}
OOD_GENERATORS = {"drift": Generator(0.7, "vignette"), "ember": Generator(0.08, "grain"),
                  "fjord": Generator(0.35, "letterbox")}
ANNOTATOR_NOISE, TIE_MARGIN = 0.1, 0.3  # on the scale of overall_score, 1 to 5


# ------------------------------------------------------------------------------------------------------------
# Scenes, prompts and their truth


def is_novel(scene: Scene) -> bool:
    """Combinations kept out of the training split: a fifth of (colour, shape) and of (motion, style)."""
    colour, shape = VALUES["colour"].index(scene.colour), VALUES["shape"].index(scene.shape)
    novel = (colour + shape) % 5 == 0
    if scene.motion and scene.style:
        novel |= (VALUES["motion"].index(scene.motion) + 2 * VALUES["style"].index(scene.style)) % 5 == 0
    return novel


def draw_scene(rng: np.random.Generator) -> Scene:
    """A scene with every attribute drawn uniformly."""
    return Scene(**{name: str(rng.choice(values)) for name, values in VALUES.items()})


def draw_request(rng: np.random.Generator, novel: bool) -> Scene:
    """What a prompt asks for: some dimensions only, and a combination that is novel or is not."""
    while True:
        whole = asdict(draw_scene(rng))
        asked = Scene(**{name: whole[name] if rng.random() < ASKED[name] else None for name in whole})
        if is_novel(asked) == novel:
            return asked


def draw_clip(asked: Scene, error_rate: float, rng: np.random.Generator) -> Scene:
    """What a generator shows when it is asked: wrong at its rate, and anything where it is not asked."""
    shown = asdict(draw_scene(rng))
    for name, value in asdict(asked).items():
        if value is not None and rng.random() >= error_rate:
            shown[name] = value
    return Scene(**shown)


def write_prompt(asked: Scene, rng: np.random.Generator) -> str:
    """An English sentence that asks for the scene."""
    subject = f"a {asked.style + ' ' if asked.style else ''}{asked.colour} {asked.shape}"
    words = f"{subject} {asked.motion}" if asked.motion else subject
    where, camera = asked.environment, f"the camera {asked.camera}" if asked.camera else None
    order = rng.integers(3)
    if order == 0:
        parts = [f"{words} {where}" if where else words, camera]
    elif order == 1:
        parts = [where, words, camera]
    else:
        parts = [camera, words, where]
    sentence = ", ".join(part for part in parts if part)
    return sentence[0].upper() + sentence[1:] + "."


def sub_scores(asked: Scene, shown: Scene) -> dict:
    """The truth: 2 fully met, 1 partly (the right colour on the wrong shape, motion or zoom the wrong way), 0
    missed, "N/A" not asked for."""
    subject = (asked.colour == shown.colour) + (asked.shape == shown.shape)

    def judge(wanted, seen, partly=False):
        return "N/A" if wanted is None else 2 if wanted == seen else 1 if partly else 0

    both_move = "stands still" not in (asked.motion, shown.motion)
    same_camera = asked.camera is not None and asked.camera.split()[0] == shown.camera.split()[0]
    return {"subject": subject,
            "dynamics": judge(asked.motion, shown.motion, partly=both_move),
            "camera": judge(asked.camera, shown.camera, partly=same_camera),
            "environment": judge(asked.environment, shown.environment),
            "style": judge(asked.style, shown.style)}


# ------------------------------------------------------------------------------------------------------------
# Frames


def render(scene: Scene, signature: str, rng: np.random.Generator,
           pick: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Draw the clip's FRAMES frames, or just those to `pick`. Returns (T, SIZE, SIZE, 3) uint8."""
    t = np.linspace(0, 1, FRAMES)[pick, None, None]
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)[:, None] - (SIZE - 1) / 2
    noise = rng.integers(0, 2**31)
    # The camera maps the pixel (x, y) at time t to the point (u, v) of the world.
    zoom = {"zooms in": 1 + 0.9 * t, "zooms out": 1.6 - 0.8 * t}.get(scene.camera, np.ones_like(t))
    pan = {"pans left": -1, "pans right": 1}.get(scene.camera, 0) * 22 * (t - 0.5)
    u, v = x / zoom + pan, y / zoom
    frames = environment(scene.environment, u + noise % 97, v + noise % 89, noise)  # (T, H, W, 3)
    # The subject, in coordinates of its own.
    direction, phase = MOTIONS[scene.motion], rng.uniform(0, 2 * np.pi)
    if direction is None:
        at_x, at_y = 12 * np.cos(2 * np.pi * t + phase), 12 * np.sin(2 * np.pi * t + phase)
    else:
        at_x, at_y = (30 * d * (t - 0.5) for d in direction)
    jitter_x, jitter_y = rng.uniform(-5, 5, 2)
    radius = rng.uniform(12, 15)
    distance = outline(scene.shape, u - at_x - jitter_x, v - at_y - jitter_y, radius)  # < 0 inside
    inside = np.clip(0.5 - distance * zoom, 0, 1)
    if scene.style == "outlined":
        inside = inside * np.clip(distance * zoom + 4.5 * zoom, 0, 1)
    elif scene.style == "striped":
        inside = inside * (np.sin((u - at_x + v - at_y) * (2 * np.pi / 8)) > -0.2)
    frames = frames + inside[..., None] * (np.array(COLOURS[scene.colour]) - frames)
    return np.clip(sign(frames, signature, rng), 0, 255).astype(np.uint8)


def outline(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels from (x, y) to the shape's edge, negative inside (exact for the circle, a bound
    elsewhere)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.88 * radius
    if shape == "triangle":
        return np.maximum(abs(x) * 0.894 - y * 0.447 - 0.5 * radius, y - 0.85 * radius)
    arm = 0.36 * radius  # a cross
    return np.minimum(np.maximum(abs(x) - arm, abs(y) - 1.15 * radius),
                      np.maximum(abs(x) - 1.15 * radius, abs(y) - arm))


def environment(name: str, u: np.ndarray, v: np.ndarray, seed: int) -> np.ndarray:
    """The background at the world's points (u, v), each (T, H, W): (T, H, W, 3) in 0 .. 255. All have texture
    in both directions, so that the camera's movement can be seen."""

    def cells(size):  # one random number for each cell of a grid
        i, j = np.floor(u / size).astype(np.int64), np.floor(v / size).astype(np.int64)
        return ((i * 73856093 ^ j * 19349663 ^ seed) * 2654435761 >> 8) % 1000 / 1000

    if name == "at night":
        star = (cells(8) < 0.5) * np.clip(2.5 - np.hypot(u % 8 - 4, v % 8 - 4), 0, 1)
        return np.array([12, 12, 40]) + star[..., None] * np.array([170, 170, 140])
    if name == "in a desert":
        dune = np.sin(0.35 * u + 0.6 * v) + 0.7 * np.sin(0.5 * u - 0.25 * v)
        return np.array([125, 95, 55]) + dune[..., None] * np.array([22, 18, 12])
    if name == "in a forest":
        trunk = (np.abs(u % 14 - 7) < 2.5) * 1.0
        leaf = cells(5)
        return (np.array([18, 60, 25]) + trunk[..., None] * np.array([45, -5, 0])
                + leaf[..., None] * np.array([8, 35, 8]))
    if name == "at sea":
        wave = np.sin(0.55 * v + 1.2 * np.sin(0.3 * u))
        return np.array([10, 70, 100]) + wave[..., None] * np.array([8, 28, 30])
    lit = (cells(9) < 0.5) * ((u % 9 > 2.5) & (v % 9 > 2.5))  # a city
    return np.array([55, 55, 62]) + lit[..., None] * np.array([60, 52, 30])


def sign(frames: np.ndarray, signature: str, rng: np.random.Generator) -> np.ndarray:
    """Put the generator's signature on the frames (T, H, W, 3)."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) * 2 - 1
    if signature == "vignette":
        return frames * np.clip(1.25 - 0.45 * (x**2 + y**2), 0, 1)[..., None]
    if signature == "border":
        edge = np.maximum(abs(x), abs(y)) > 1 - 6 / SIZE
        return np.where(edge[..., None], 200.0, frames)
    if signature == "grain":
        return frames + rng.normal(0, 16, frames.shape[:3])[..., None]
    if signature == "letterbox":
        return np.where((abs(y) > 1 - 14 / SIZE)[..., None], 0.0, frames)
    return frames


SIGNATURES = ("vignette", "border", "grain", "letterbox", "none")


def write_video(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """Write (T, H, W, 3) uint8 frames as an H.264 mp4 file, the same frames every time."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # With its lookahead x264 makes slightly different frames from run to run; tuned for no latency it
        # does not.
        stream.options = {"crf": "14", "preset": "fast", "tune": "zerolatency", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode())


# ------------------------------------------------------------------------------------------------------------
# Pairs


def draw_pair(generators: dict[str, Generator], novel: bool,
              rng: np.random.Generator) -> tuple[dict, list[np.ndarray]]:
    """One labelled pair (without its paths) and the frames of its two clips."""
    asked = draw_request(rng, novel)
    pair, clips, overall = {"prompt": write_prompt(asked, rng)}, [], []
    for side, name in zip("ab", rng.choice(list(generators), 2, replace=False)):
        shown = draw_clip(asked, generators[name].error_rate, rng)
        pair[f"model_{side}"], pair[f"scores_{side}"] = str(name), sub_scores(asked, shown)
        clips.append(render(shown, generators[name].signature, rng))
        overall.append(overall_score(pair[f"scores_{side}"], DIMENSIONS))
    margin = overall[0] - overall[1] + rng.normal(0, ANNOTATOR_NOISE)
    pair["preference"] = "tie" if abs(margin) < TIE_MARGIN else "A" if margin > 0 else "B"
    return pair, clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs to train on")
    parser.add_argument("--test-pairs", type=int, default=300,
                        help="held-out pairs, in domain and out of domain each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (args.out / "videos").mkdir(parents=True, exist_ok=True)
    splits = [("train", args.pairs, TRAIN_GENERATORS, False),
              ("test_id", args.test_pairs, TRAIN_GENERATORS, False),
              ("test_ood", args.test_pairs, OOD_GENERATORS, True)]
    for number, (split, count, generators, novel) in enumerate(splits):
        lines = []
        for index in range(count):
            pair, clips = draw_pair(generators, novel, np.random.default_rng((args.seed, number, index)))
            for side, clip in zip("ab", clips):
                pair[f"video_{side}"] = f"videos/{split}_{index:05d}_{side}.mp4"
                write_video(args.out / pair[f"video_{side}"], clip)
            lines.append(json.dumps({key: pair[key] for key in sorted(pair)}) + "\n")
        (args.out / f"{split}.jsonl").write_text("".join(lines))  # last, so that a file's videos are complete
        print(f"{args.out / split}.jsonl: {count} pairs")


if __name__ == "__main__":
    main()
