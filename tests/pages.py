"""Judgements and runs to make pages of, without a model that made them."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

from data import DIMENSIONS, TAGS, Pair, Pairs, VideoSettings

GOLDEN = Path(__file__).resolve().parent / "golden"
HOSTILE = ("<img src=x onerror=alert(1)></script><script>alert(1)</script>"
           "<!-- ' \" & \u2028\ud800 {{page}} <b></script <!--<script " + "w" * 400)
GENERATORS = ["aurora", "basalt", "ci\"n'der<b>" + "w" * 90]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def a_model(name="runs/rl", info=None, dimensions=DIMENSIONS):
    settings = VideoSettings(min_pixels=4096, max_pixels=40_000)
    return SimpleNamespace(name=name, info=info or {}, processor=SimpleNamespace(
        dimensions=dimensions, tags=TAGS, settings=settings, reader="av"))


def a_cot(scores, words="asked for, and seen"):
    thought = "\n".join(f"{name}: {words}, so {value}" for name, value in scores.items())
    return f"<think>\n{thought}\n</think>\n<answer>{json.dumps({'dimensional_scores': scores})}</answer>"


def judged_of(videos, prompt, cot=None, score=1.5):
    """What `infer.judge_all` returns of videos that have one prompt."""
    cot = a_cot(dict.fromkeys(DIMENSIONS, 1)) if cot is None else cot
    return {(video, prompt): {"video": video, "prompt": prompt, "cot": cot, "truncated": False,
                              "score": score} for video in videos}


def a_pair_file(count=40, seed=0):
    """Pairs, and the judgements of their videos: right, wrong, ties and one that cannot be read; with
    references that the CoTs meet or miss, and without."""
    drawn = random.Random(seed)
    videos = sorted(str(path) for path in GOLDEN.glob("*.mp4"))
    pairs, judged = Pairs(Path("pairs.jsonl")), {}
    for number in range(count):
        prompt = HOSTILE if number == 2 else f"Prompt {number}: a fox runs through snow."
        sides = drawn.sample(videos, 2)
        scores = [{name: drawn.choice([0, 1, 2, "N/A"]) for name in DIMENSIONS} for _ in range(2)]
        generators = drawn.sample(GENERATORS, 2)
        pairs.append(Pair(prompt, *sides, "ABt"[number % 3].replace("t", "tie"), scores_a=scores[0],
                          scores_b=scores[1] if number % 4 else None, model_a=generators[0],
                          model_b=generators[1]))
        for video, said in zip(sides, scores):
            said = said | {"style": drawn.choice([0, 1, 2])}
            judged |= judged_of([video], prompt, a_cot(said), drawn.gauss(0, 2))
    bad = pairs[5].video_a
    prompt = pairs[5].prompt
    judged[bad, prompt] = {"video": bad, "prompt": prompt, "error": f"{bad}: it is cut short"}
    return pairs, judged


def a_run(folder):
    """A run's folder, such as stage 2 leaves it in step 6 of 65; metrics.jsonl.whole is its log."""
    folder.mkdir()
    records, rollouts, held_out = [], [], []
    reference = dict.fromkeys(DIMENSIONS, 2)
    videos = sorted(str(path) for path in GOLDEN.glob("*.mp4"))
    for step in range(7):
        if step:
            records.append({
                "step": step, "reward": 0.5 + step / 50, "reward_quality": 0.6 + step / 50,
                "reward_brevity": 0.1, "kl": None if step == 6 else 1e-5 * step,
                "clip_fraction": 0.0, "bt_loss": 0.6 - step / 50,
                "ratio_max": 1.00001, "logp_gap": 8e-6, "grad_norm": 1.0, "figure_of_my_own": step})
            some = []
            for g in range(4):
                some.append({"cot": a_cot(reference | {"style": g % 3}), "reward": 0.5, "reward_quality": 0.6,
                             "advantage": g - 1.5, "score": 1.0 + g})
            video = "gone.mp4" if step == 6 else videos[step]
            prompt = HOSTILE if step == 6 else f"rolled {step}"
            rollouts.append({"step": step, "video": video, "prompt": prompt, "reference": reference,
                             "rollouts": some})
        if step % 3 == 0:
            records.append({"step": step, "test_id/accuracy": 0.8, "test_id/quality": 0.7 + step / 50})
            cot = "nothing to be read" if step == 3 else a_cot(reference, f"asked for at step {step}")
            held_out.append({
                "step": step, "test": "test_id", "video": videos[0], "prompt": "A fox.", "cot": cot,
                "truncated": False, "score": step / 4, "score_no_cot": 0.0, "reference": reference})
    about = {"stage": "rl", "steps": 65, "dimensions": DIMENSIONS,
             "settings": {"fps": 2.0, "min_pixels": 4096, "max_pixels": 40_000, "out": "w" * 300}}
    (folder / "settings.json").write_text(json.dumps(about))
    for name, found in (("metrics", records), ("rollouts", rollouts), ("held_out", held_out)):
        write_lines(folder / f"{name}.jsonl", found)
    write_lines(folder / "metrics.jsonl.whole", records)
    return folder
