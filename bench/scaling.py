"""How an update's time and memory grow with the group's size and with the prompt, beside the plain way, and
with the CoTs.

    python bench/scaling.py             # a 20M-parameter Qwen3-VL on a CPU, some minutes; writes scaling.png
    python bench/scaling.py --prompts 512,1024 --groups 1,2,4
    python bench/scaling.py --size 2b --ways ours --groups "" --group-size 2 --prompts 1536,3072,6144 \
        --cots 128,256,512 --checkpointing --repeats 0 --out lengths.png

Every cell is a process of its own: one video, its G rollouts, both losses and the backward, once to warm up
and then the median of `--repeats`; with none, that once is what is told. Memory is the process's peak above
what it held before the first update (on a GPU: torch's peak). The plain way is one row a rollout, the video
encoded in each, logits everywhere, one pass for both losses or two.
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
WAYS = {"ours": "tab:blue", "one pass": "tab:orange", "two passes": "tab:red"}
VARIED = {"group": "rollouts in the group", "prompt": "tokens of the prompt", "cot": "tokens of a CoT"}


def measure(way: str, args) -> dict[str, float]:
    """Seconds of one update, and its peak memory in GB."""
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    import plain
    import speed
    import torch

    from support.run import checkpoint_activations

    G, C = args.group_size, args.cot_tokens
    model = speed.make(args.size, args.device)
    batch = speed.make_batch(model, 1, args.video_tokens)
    model.set_trainable(16)
    if args.checkpointing:
        checkpoint_activations(model.qwen)
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
    warm = seconds[1:] or seconds
    return {"prompt": batch.input_ids.shape[1], "seconds": statistics.median(warm), "gigabytes": peak}


def picture(rows: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [(name, key) for name in rows for key in ("seconds", "gigabytes")]
    size = (3.25 * len(cells), 3)
    figure, axes = plt.subplots(1, len(cells), figsize=size, constrained_layout=True)
    for axis, (name, key) in zip(axes, cells):
        for way, colour in WAYS.items():
            points = [(row[name], row[way][key]) for row in rows[name] if row.get(way)]
            if points:
                axis.plot(*zip(*points), "o-", label=way, color=colour, markersize=4)
        axis.set_title(f"update: {key}", fontsize=10)
        axis.set_xlabel(VARIED[name], fontsize=9)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="20m", help="a key of speed.SIZES")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", default=",".join(WAYS), help="of working")
    parser.add_argument("--groups", default="1,2,4,8,16")
    parser.add_argument("--prompts", default="512,1024,2048,4096", help="video tokens, about")
    parser.add_argument("--cots", default="", help="tokens of a CoT")
    parser.add_argument("--group-size", type=int, default=8, help="where something else varies")
    parser.add_argument("--video-tokens", type=int, default=1200, help="where something else varies")
    parser.add_argument("--cot-tokens", type=int, default=128, help="where something else varies")
    parser.add_argument("--checkpointing", action="store_true", help="of activations, as both stages do")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/scaling.png", help="the picture")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    usual = {"group-size": args.group_size, "video-tokens": args.video_tokens, "cot-tokens": args.cot_tokens}
    ways = args.ways.split(",")
    if unknown := {*ways} - {*WAYS}:
        parser.error(f"--ways {', '.join(unknown)}: not of {', '.join(WAYS)}")
    rows = {}
    for name, flag, values in (("group", "group-size", args.groups), ("prompt", "video-tokens", args.prompts),
                               ("cot", "cot-tokens", args.cots)):
        if not values:
            continue
        compared = " × time | × memory |" if ways == [*WAYS] else ""
        print(f"\n| {name} | " + " | ".join(f"{way}, s | {way}, GB" for way in ways) + f" |{compared}\n"
              + "| ---: |" + " ---: |" * (2 * len(ways) + 2 * bool(compared)), flush=True)
        rows[name] = []
        for value in map(int, values.split(",")):
            row = {way: cell(way, usual | {flag: value}, args) for way in ways}
            lengths = [row[way]["prompt"] for way in ways if row[way]]
            row[name] = lengths[0] if name == "prompt" and lengths else value
            rows[name].append(row)
            cells = [f"{row[way]['seconds']:.2f} | {row[way]['gigabytes']:.2f}" if row[way] else "– | –"
                     for way in ways]
            if compared:
                worst = row["two passes"]
                cells += [f"{worst[key] / row['ours'][key]:.1f}" if worst else "–"
                          for key in ("seconds", "gigabytes")]
            print(f"| {row[name]} | " + " | ".join(cells) + " |", flush=True)
    if not any(row[way] for found in rows.values() for row in found for way in ways):
        sys.exit("nothing could be measured, and no picture is drawn")
    picture(rows, args.out)


def cell(way: str, sizes: dict[str, int], args) -> dict[str, float] | None:
    """What a process of its own measures; None where it fails, as where memory does not suffice."""
    words = [f"--{name}={value}" for name, value in sizes.items()]
    words += ["--size", args.size, "--device", args.device, "--repeats", str(args.repeats)]
    words += ["--checkpointing"] * args.checkpointing
    done = subprocess.run([sys.executable, __file__, "--one", way, *words], check=False,
                          capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(f"{way}, {sizes}: ended with {done.returncode}: {done.stderr[-200:].strip()}", file=sys.stderr)
    return None


if __name__ == "__main__":
    main()
