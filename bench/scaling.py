"""How an update's time and memory grow with the group's size and with the prompt, beside the plain way.

    python bench/scaling.py             # a 20M-parameter Qwen3-VL on a CPU, some minutes; writes scaling.png
    python bench/scaling.py --prompts 512,1024 --groups 1,2,4

Every cell is a process of its own: one video, its G rollouts, both losses and the backward, once to warm up
and then the median of `--repeats`. Memory is the process's peak above what it held before the first update
(on a GPU: torch's peak). The plain way is one row a rollout, the video encoded in each, logits everywhere,
one pass for both losses or two.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("ours", "one pass", "two passes")


def measure(way: str, args) -> dict[str, float]:
    """Seconds of one update, and its peak memory in GB."""
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    import plain
    import speed
    import torch

    G, C = args.group_size, args.cot_tokens
    model = speed.make(args.size, args.device)
    batch = speed.make_batch(model, 1, args.video_tokens)
    model.set_trainable(16)
    tokens = torch.randint(0, 300, (1, G, C), device=args.device)
    tokens[tokens == model.processor.eos_id] = 0
    mask, advantages = torch.ones_like(tokens, dtype=torch.bool), torch.randn(1, G, device=args.device)
    old = torch.full(tokens.shape, -9.0, device=args.device)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(args.repeats + 1):
        started = time.perf_counter()
        if way == "ours":
            speed.update(model, batch, tokens, mask, old, advantages)
        else:
            plain.update(model, batch, tokens, old, advantages, 2 if way == "two passes" else 1)
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        model.zero_grad()
    peak = (torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda"
            else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)
    return {"prompt": batch.input_ids.shape[1], "seconds": statistics.median(seconds[1:]), "gigabytes": peak}


def picture(rows: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 3), constrained_layout=True)
    for axis, (name, key) in zip(axes, ((n, k) for n in rows for k in ("seconds", "gigabytes"))):
        for way, colour in zip(WAYS, ("tab:blue", "tab:orange", "tab:red")):
            points = [(row[name], row[way][key]) for row in rows[name] if row[way]]
            axis.plot(*zip(*points), "o-", label=way, color=colour, markersize=4)
        axis.set_title(f"update: {key}", fontsize=10)
        axis.set_xlabel({"group": "rollouts in the group", "prompt": "tokens of the prompt"}[name],
                        fontsize=9)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="20m", help="a key of speed.SIZES")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--groups", default="1,2,4,8,16")
    parser.add_argument("--prompts", default="512,1024,2048,4096", help="video tokens, about")
    parser.add_argument("--group-size", type=int, default=8, help="where the prompt varies")
    parser.add_argument("--video-tokens", type=int, default=1200, help="where the group varies")
    parser.add_argument("--cot-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/scaling.png", help="the picture")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    rows = {"group": [], "prompt": []}
    for name, values in (("group", args.groups), ("prompt", args.prompts)):
        print(f"\n| {name} | "
              + " | ".join(f"{way}, s | {way}, GB" for way in WAYS) + " | × time | × memory |\n"
              + "| ---: |" + " ---: |" * (2 * len(WAYS) + 2), flush=True)
        for value in map(int, values.split(",")):
            G, tokens = (value, args.video_tokens) if name == "group" else (args.group_size, value)
            row = {}
            for way in WAYS:
                done = subprocess.run(
                    [sys.executable, __file__, "--one", way, "--group-size", str(G), "--video-tokens",
                     str(tokens),
                     "--cot-tokens", str(args.cot_tokens), "--size", args.size, "--device", args.device,
                     "--repeats", str(args.repeats)], check=False, capture_output=True, text=True)
                fits = done.returncode == 0
                row[way] = json.loads(done.stdout.splitlines()[-1]) if fits else None
            row[name] = value if name == "group" else row["ours"]["prompt"]
            rows[name].append(row)
            cells = [f"{row[way]['seconds']:.2f} | {row[way]['gigabytes']:.2f}" if row[way] else "– | –"
                     for way in WAYS]
            worst = row["two passes"]
            ratio = [f"{worst[key] / row['ours'][key]:.1f}" if worst else "–"
                     for key in ("seconds", "gigabytes")]
            print(f"| {row[name]} | " + " | ".join(cells) + " | " + " | ".join(ratio) + " |", flush=True)
    picture(rows, args.out)


if __name__ == "__main__":
    main()
