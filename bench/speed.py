"""How much the structure of model.py saves, as ratios measured in one run.

    python bench/speed.py                          # a random-weight Qwen3-VL of 20M parameters, a few minutes
    python bench/speed.py --size 8b --device cuda

Each line runs the same work two ways, in turn, several times, and prints the ratio of the medians: this
project against plain implementations (bench/plain.py) that are checked here to give the same numbers.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import plain

import infer
from coldstart import bt_loss
from data import Processor, VideoSettings, keys_of, read_pairs
from model import DeScore
from rl import grpo_loss
from support.command import run_command

# hidden, layers, heads, kv heads, head size, MLP, vocabulary; vision: depth, hidden, MLP, heads
SIZES = {"20m": (384, 6, 6, 2, 64, 1024, 16000, 4, 192, 512, 3),
         "2b": (2048, 28, 16, 8, 128, 6144, 151936, 24, 1024, 4096, 16),
         "2b-4": (2048, 4, 16, 8, 128, 6144, 151936, 24, 1024, 4096, 16),
         "8b": (4096, 36, 32, 8, 128, 12288, 151936, 27, 1152, 4304, 16)}


def make(size: str, device: str) -> DeScore:
    """A DeScore of a size, with random weights and the embedded tokenizer."""
    hidden, layers, heads, kv, head, mlp, vocab, depth, vision, vision_mlp, vision_heads = SIZES[size]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/backbone")
    h = w = head // 2 * 20 // 64
    config = Qwen3VLConfig(
        text_config={"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": mlp,
                     "num_hidden_layers": layers,
                     "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True,
                                         "mrope_section": [head // 2 - h - w, h, w]}},
        vision_config={"depth": depth, "hidden_size": vision, "intermediate_size": vision_mlp,
                       "num_heads": vision_heads,
                       "out_hidden_size": hidden,
                       "deepstack_visual_indexes": [depth // 4, depth // 2, 3 * depth // 4]},
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        qwen = Qwen3VLForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    model = DeScore(qwen, Processor(tokenizer, VideoSettings()), "random")
    model.has_head = True
    model.requires_grad_(False)
    return model.to(device)


def make_batch(model: DeScore, videos: int, video_tokens: int, seed: int = 0):
    """Videos of noise with about so many tokens each."""
    rng, samples = np.random.default_rng(seed), []
    frames = 2 * max(2, round(video_tokens / 100))
    for _ in range(videos):
        clip = torch.from_numpy(rng.integers(0, 256, (frames, 3, 320, 320), dtype=np.uint8))
        samples.append(model.processor.sample(clip, [i / 2 for i in range(frames)],
                                              "A red circle moves left."))
    return model.processor.collate(samples)


def never_ends(model: DeScore) -> None:
    """An end token is next to impossible with random weights over a large vocabulary; rule it out."""
    eos = model.processor.eos_id
    model.qwen.lm_head.weight.data[eos] = 0
    model.qwen.lm_head.weight.data[eos, 0] = 0


def update(model: DeScore, batch, tokens: torch.Tensor, mask: torch.Tensor, old: torch.Tensor,
           advantages: torch.Tensor) -> float:
    """Both losses of some videos' rollouts and their backward. With one video alone, the first half of its
    rollouts is scored against the second."""
    found, scores = model.group(batch, tokens, mask)
    loss, _ = grpo_loss(found, old, None, advantages, mask, beta=0.0)
    loss = loss + 0.005 * plain.bt_of(scores)
    loss.backward()
    return loss.item()


def compare(ours, theirs, repeats: int) -> tuple[float, float]:
    """Median seconds of two ways to do the same, run in turn after one warm-up each."""
    seconds = [[], []]
    for turn in range(repeats + 1):
        for way, work in enumerate((ours, theirs)):
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[way].append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="20m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--video-tokens", type=int, default=1200)
    parser.add_argument("--cot-tokens", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="the lines whose work has this text in it")
    args = parser.parse_args()
    G, C, device = args.group_size, args.cot_tokens, args.device
    model = make(args.size, device)
    count = sum(p.numel() for p in model.parameters())
    pair = make_batch(model, 2, args.video_tokens)
    one = make_batch(model, 1, args.video_tokens)
    print(f"{count / 1e6:.0f}M parameters on {device}, {torch.get_num_threads()} threads; "
          f"prompts of {pair.input_ids.shape[1]} tokens, CoTs of {C}, groups of {G}\n", flush=True)
    print("| work | against | ours, s | theirs, s | ratio | to reach |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")

    def row(work: str, against: str, ours, theirs, target: str) -> None:
        if args.only not in work:
            return
        a, b = compare(ours, theirs, args.repeats)
        print(f"| {work} | {against} | {a:.2f} | {b:.2f} | {b / a:.2f} × | {target} |", flush=True)

    never_ends(model)

    def think(n=1, batch=one):
        return model.think(batch, n, C, 1.0, seeds=list(range(len(batch))))

    def think_only():
        step, model.decode_step = model.decode_step, lambda cache, token, is_reward, position: (
            step(cache, token, is_reward, position) if cache.step < C else token.new_zeros(
                *token.shape, model.query.shape[0], dtype=torch.float32))
        think()
        del model.decode_step

    def think_and_score_again():
        think_only()
        hidden, _ = plain.whole_rows(model, one, torch.randint(0, 500, (1, 1, C), device=device),
                                     with_reward=True)
        return model.overall(model.read_parts(hidden[:, -1]))

    with torch.no_grad():
        row("one video: think, then score", "think only", think, think_only, "at least 0.97 ×")
        row("one video: think, then score", "think, then score the whole again", think, think_and_score_again,
            "1.2 ×")
        row(f"rollouts of a group of {G}", f"generate, {G} repeated rows", lambda: think(G),
            lambda: plain.generate(model, one, [0] * G, C), "2.3 ×")
        row(f"rollouts of a group of {G}", f"generate(num_return_sequences={G})", lambda: think(G),
            lambda: plain.generate(model, one, [0], C, G), "1.5 ×")

        def think_then_read():
            thoughts = think(G)
            return model.group(one, thoughts.tokens, thoughts.mask)

        row(f"rollouts of a group of {G} with π_old's log-probabilities", "recorded by a pass of their own",
            lambda: think(G), think_then_read, "no pass")

    model.set_trainable(16)
    parameters = model.trainable().values()
    tokens = torch.randint(0, 500, (1, G, C), device=device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    tokens[tokens == model.processor.eos_id] = 0
    advantages = torch.randn(1, G, device=device)
    with torch.no_grad():
        old, _ = model.group(one, tokens, mask)

    def ours() -> float:
        return update(model, one, tokens, mask, old, advantages)

    def gradients(work) -> torch.Tensor:
        model.zero_grad()
        work()
        return torch.cat([p.grad.flatten() for p in parameters])

    for passes in (2, 1):
        def theirs(passes=passes) -> float:
            return plain.update(model, one, tokens, old, advantages, passes)

        if args.only in (work := f"update of a group of {G}"):
            expected, other = gradients(ours), gradients(theirs)
            difference = ((other - expected).norm() / expected.norm()).item()
            assert difference < (0.05 if device == "cuda" else 1e-3), difference
            row(work,
                f"one row a rollout, {passes} pass{'es' * (passes == 2)} "
                f"(gradients differ by {difference:.0e})",
                ours, theirs, f"{4 * passes} ×")

    cot = "x " * (C // 2)  # two tokens each
    assert len(model.processor.encode_cot(cot)) == C

    def cold(way) -> None:
        for cots in ([cot] * 2, [None] * 2):
            way(cots).backward()

    def cold_plain(cots):
        ids = torch.zeros(2, 1, C, dtype=torch.long, device=device)  # padded to the CoT's length
        hidden, _ = plain.whole_rows(model, pair, ids, with_reward=True)
        logits = model.qwen.lm_head(hidden)  # as a causal language model's forward returns them
        scores = model.overall(model.read_parts(hidden[:, -1]))
        return bt_loss(scores[0], scores[1]) + 0.0 * logits.float().mean()

    def cold_ours(cots):
        scores = model.score(pair, cots)
        return bt_loss(scores[0], scores[1])

    row("cold start step: a pair with CoTs, one without", "full logits, padded", lambda: cold(cold_ours),
        lambda: cold(cold_plain), "1.3 ×")

    with tempfile.TemporaryDirectory() as folder:  # real files, on the embedded backbone
        subprocess.run([sys.executable, ROOT / "toy/world.py", folder, "--pairs", "24", "--test-pairs", "1"],
                       check=True, stdout=subprocess.DEVNULL)
        toy = DeScore.load(ROOT / "toy/backbone", device=device)
        toy.has_head = True  # a fresh one
        keys = keys_of(read_pairs(f"{folder}/train.jsonl"))

        def judge(think_tokens: int, workers: int) -> list[float]:
            judged = infer.by_key(infer.judge(
                toy, keys, max_new_tokens=160, think_tokens=think_tokens, workers=workers))
            return [judged[key]["score"] for key in keys]

        together, alone = torch.tensor(judge(6000, 1)), torch.tensor(judge(1, 0))
        assert (together - alone).abs().median() < 1e-3
        row(f"scoring a file of {len(keys)} videos, embedded backbone", "one video at a time",
            lambda: judge(6000, 1), lambda: judge(1, 0), "1.5 ×")


if __name__ == "__main__":
    run_command(main)
