"""A small world of text-to-video clips whose truth is known.

    python toy/world.py OUT --pairs 1000 --seed 0

writes OUT/videos/*.mp4 and four pair files (JSON lines, see data.py): train.jsonl, test_id.jsonl,
test_ood.jsonl and test_trap.jsonl.

A *scene* says what a clip shows, by the five dimensions that a CoT judges: subject (colour and shape),
dynamics, camera, environment, style. A prompt asks for a scene, or for part of one. A generator meets each
wish more or less: the colour fades, the subject shrinks, the motion slows, haze lies over the environment,
and where it falls too short something else is shown. The *shortfall* of a wish, 0 to 1, says how far off it
is; the sub-scores 2, 1 and 0 are a coarse reading of it. The clip's *quality* weighs the shortfalls, and how
steady the picture's brightness is, which no dimension names. An annotator compares qualities, and errs.

Every generator has a signature (grain, a border, ...), which says nothing of what was asked for. The sets
differ in what it goes with, and in what is shown:

    train, test_id   the better the generator, the prettier its signature, in most of its clips
    test_ood         new generators, every clip's signature drawn at random: looks say nothing. Prompts
                     combine attributes as nothing else does: no other prompt, no other set's clip, no clip
                     that the backbone was pretrained on (`is_novel`)
    test_trap        new generators, the better the one, the uglier its signature: looks say the opposite
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
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
# By what degree an attribute is met; from `WRONG` on another value is shown. The rest are right or wrong.
DEGREES = {"colour": "fade", "shape": "small", "motion": "slow", "environment": "haze"}
WRONG = 0.8  # of an attribute that has a degree
PARTLY, MISSED = 0.3, 0.6  # the shortfalls from which a sub-score is 1 and 0


@dataclass(frozen=True)
class Clip:
    """A scene as a generator shows it, each degree from 0, as it should be, to 1."""

    scene: Scene
    fade: float = 0.0  # of the subject's colour, to grey
    small: float = 0.0  # the subject
    slow: float = 0.0  # its motion
    haze: float = 0.0  # over the environment
    flicker: float = 0.0  # of the brightness, from frame to frame: no dimension names it
    signature: str = "none"


@dataclass(frozen=True)
class Generator:
    skill: float  # its shortfalls are U^skill, U uniform in [0, 1]
    signature: str


SIGNATURES = ("vignette", "border", "grain", "letterbox", "none")
GENERATORS = {
    "train": {"aurora": Generator(2.2, "vignette"), "basalt": Generator(1.2, "border"),
              "cinder": Generator(0.65, "grain")},
    "test_ood": {"drift": Generator(0.65, "none"), "ember": Generator(2.2, "none"),
                 "fjord": Generator(1.2, "none")},
    "test_trap": {"garnet": Generator(2.2, "grain"), "heron": Generator(1.2, "border"),
                  "islet": Generator(0.65, "vignette")}}
GENERATORS["test_id"] = GENERATORS["train"]
SPLITS = ("train", "test_id", "test_ood", "test_trap")
WORN = 0.85  # share of clips that wear their generator's signature; the others, and all of test_ood, any
LOOKS = {"vignette": 1, "grain": -1}  # what the signatures of the training pairs seem to say; others nothing
STEADINESS = 0.35  # its weight in the quality; the rest is for what was asked for
ANNOTATOR_NOISE, TIE_MARGIN = 0.16, 0.04  # on the scale of quality, 0 to 1


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


def draw_clip(asked: Scene, skill: float, signature: str, rng: np.random.Generator,
              novel: bool = False) -> Clip:
    """What a generator of this skill shows when it is asked, and anything where it is not asked; a novel
    combination only where it may be `novel`."""
    while True:
        shown, degrees = asdict(draw_scene(rng)), {"flicker": rng.random() ** skill}
        for name, value in asdict(asked).items():
            short = rng.random() ** skill
            if short < (WRONG if name in DEGREES else MISSED):
                shown[name] = value or shown[name]
                if name in DEGREES:
                    degrees[DEGREES[name]] = short
        scene = Scene(**shown)
        if novel or not is_novel(scene):
            if scene.motion == "stands still":
                degrees["slow"] = 0.0
            return Clip(scene, **degrees, signature=signature)


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


def shortfalls(asked: Scene, clip: Clip) -> dict[str, float | None]:
    """How far off each attribute is that was asked for, 0 to 1; None for the others."""
    found = {}
    for name, wanted in asdict(asked).items():
        if wanted is None:
            found[name] = None
        elif wanted != getattr(clip.scene, name):
            found[name] = 1.0
        else:
            found[name] = getattr(clip, DEGREES[name]) if name in DEGREES else 0.0
    return found


def by_dimension(asked: Scene, clip: Clip) -> dict[str, float | None]:
    """The shortfall of each dimension; the subject's is the mean of its colour's and its shape's."""
    short = shortfalls(asked, clip)
    subject = (short.pop("colour") + short.pop("shape")) / 2
    return {"subject": subject, "dynamics": short.pop("motion"), **short}


def reading(short: float | None):
    """A shortfall as a sub-score: 2 met, 1 partly, 0 missed, "N/A" not asked for."""
    return "N/A" if short is None else 2 if short < PARTLY else 1 if short < MISSED else 0


def sub_scores(asked: Scene, clip: Clip) -> dict:
    """The true sub-scores."""
    return {name: reading(short) for name, short in by_dimension(asked, clip).items()}


def quality(asked: Scene, clip: Clip) -> float:
    """How good a clip is, 0 to 1: what an annotator would say who never erred."""
    short = {name: value for name, value in by_dimension(asked, clip).items() if value is not None}
    off = sum(DIMENSIONS[name] * value for name, value in short.items())
    met = 1 - off / sum(DIMENSIONS[name] for name in short)
    return (1 - STEADINESS) * met + STEADINESS * (1 - clip.flicker)


# ------------------------------------------------------------------------------------------------------------
# Frames


def render(clip: Clip, rng: np.random.Generator, pick: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Draw the clip's FRAMES frames, or just those to `pick`. Returns (T, SIZE, SIZE, 3) uint8."""
    scene = clip.scene
    t = np.linspace(0, 1, FRAMES)[pick, None, None]
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)[:, None] - (SIZE - 1) / 2
    noise = rng.integers(0, 2**31)
    # The camera maps the pixel (x, y) at time t to the point (u, v) of the world.
    zoom = {"zooms in": 1 + 0.9 * t, "zooms out": 1.6 - 0.8 * t}.get(scene.camera, np.ones_like(t))
    pan = {"pans left": -1, "pans right": 1}.get(scene.camera, 0) * 22 * (t - 0.5)
    u, v = x / zoom + pan, y / zoom
    frames = environment(scene.environment, u + noise % 97, v + noise % 89, noise)  # (T, H, W, 3)
    frames = frames + 0.85 * clip.haze * (200 - frames)
    # The subject, in coordinates of its own.
    direction, phase = MOTIONS[scene.motion], rng.uniform(0, 2 * np.pi)
    speed = 1 - clip.slow
    if direction is None:
        angle = 2 * np.pi * speed * t + phase
        at_x, at_y = 12 * np.cos(angle), 12 * np.sin(angle)
    else:
        at_x, at_y = (30 * speed * d * (t - 0.5) for d in direction)
    jitter_x, jitter_y = rng.uniform(-5, 5, 2)
    radius = rng.uniform(13, 15) * (1 - 0.6 * clip.small)
    distance = outline(scene.shape, u - at_x - jitter_x, v - at_y - jitter_y, radius)  # < 0 inside
    inside = np.clip(0.5 - distance * zoom, 0, 1)
    if scene.style == "outlined":
        inside = inside * np.clip(distance * zoom + 4.5 * zoom, 0, 1)
    elif scene.style == "striped":
        inside = inside * (np.sin((u - at_x + v - at_y) * (2 * np.pi / 8)) > -0.2)
    colour = np.array(COLOURS[scene.colour])
    colour = colour + clip.fade * (128 - colour)
    frames = frames + inside[..., None] * (colour - frames)
    dark = rng.permutation(FRAMES)[pick, None, None, None] < FRAMES / 2
    frames = frames * (1 - 0.5 * clip.flicker * dark)
    return np.clip(sign(frames, clip.signature, rng), 0, 255).astype(np.uint8)


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


def draw_signature(generator: Generator, worn: float, rng: np.random.Generator) -> str:
    return generator.signature if rng.random() < worn else str(rng.choice(SIGNATURES))


def right(margin: float, preference: str) -> float:
    """1 where the margin A − B has the sign of the preference, 0.5 where it is 0, else 0."""
    return (1 + np.sign(margin) * {"A": 1, "B": -1}[preference]) / 2


def prefer(margin: float, rng: np.random.Generator) -> str:
    """What an annotator says of quality A − quality B."""
    margin += rng.normal(0, ANNOTATOR_NOISE)
    return "tie" if abs(margin) < TIE_MARGIN else "A" if margin > 0 else "B"


def draw_pair(split: str, rng: np.random.Generator) -> tuple[dict, list[Clip]]:
    """One labelled pair of a split (without its paths), and its two clips."""
    novel, generators = split == "test_ood", GENERATORS[split]
    asked = draw_request(rng, novel)
    pair, clips = {"prompt": write_prompt(asked, rng)}, []
    for side, name in zip("ab", rng.choice(list(generators), 2, replace=False)):
        generator = generators[name]
        signature = draw_signature(generator, 0.0 if novel else WORN, rng)
        clip = draw_clip(asked, generator.skill, signature, rng, novel)
        clips.append(clip)
        pair |= {f"model_{side}": str(name), f"scores_{side}": sub_scores(asked, clip),
                 f"quality_{side}": round(quality(asked, clip), 4), f"signature_{side}": signature}
    pair["preference"] = prefer(pair["quality_a"] - pair["quality_b"], rng)
    return pair, clips


def rules(pair: dict) -> dict[str, float]:
    """The margins A − B that three judges who see no video would give a pair: one who knows the truth, one
    the true sub-scores, one who goes by looks."""
    a, b = (overall_score(pair[f"scores_{side}"], DIMENSIONS) for side in "ab")
    looks = [LOOKS.get(pair[f"signature_{side}"], 0) for side in "ab"]
    return {"truth": pair["quality_a"] - pair["quality_b"], "sub-scores": a - b,
            "signature": looks[0] - looks[1]}


def make_pair(out: Path, split: str, seed: tuple[int, int, int]) -> str:
    """Draw a pair and write its two videos. Returns its line. The last number of the seed is its place in
    the split."""
    rng = np.random.default_rng(seed)
    pair, clips = draw_pair(split, rng)
    for side, clip in zip("ab", clips):
        pair[f"video_{side}"] = f"videos/{split}_{seed[-1]:05d}_{side}.mp4"
        write_video(out / pair[f"video_{side}"], render(clip, rng))
    return json.dumps({key: pair[key] for key in sorted(pair)}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs to train on")
    parser.add_argument("--test-pairs", type=int, default=300,
                        help="held-out pairs of each of the three sets")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (args.out / "videos").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        for number, split in enumerate(SPLITS):
            count = args.test_pairs if number else args.pairs
            seeds = [(args.seed, number, index) for index in range(count)]
            lines = list(pool.map(partial(make_pair, args.out, split), seeds))
            # Last, so that a file's videos are complete.
            (args.out / f"{split}.jsonl").write_text("".join(lines))
            print(f"{args.out / split}.jsonl: {count} pairs")


if __name__ == "__main__":
    main()
