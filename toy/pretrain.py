"""Train the embedded backbone: a tiny Qwen3-VL that sees a good deal and judges poorly.

    python toy/pretrain.py --out FOLDER       # seed 0; some two hours on two cores

toy/backbone holds what this gave, with the defaults below; its descore.json records them. (Its weights were
bfloat16 once in between, after the third lesson.) Another machine rounds otherwise and gets other weights of
the same making. It can be stopped at any moment; the same command goes on from OUT/state.pt, at most a
hundred steps before.

First it describes clips, degrees in tenths (the prompt is just "Describe the video."), so that it learns to
look: with a prompt to copy from, it would copy. Then it also judges clips against prompts, in the CoT format
of data.py. That much leaves it guessing from the clip what was asked for: it practises on clips of which half
were made for another prompt, and so has to read. Short lessons of imitating a judge with bad habits
(`habits`) follow: lenient with what is not quite met, and unable to leave alone what the prompt does not ask
for. These leave something to be learnt by reinforcement.

Clips come straight from the renderer, with every signature, and signatures say nothing about quality here:
whatever shortcut the later stages take is their own. Combinations that are novel out of domain
(`world.is_novel`) are neither asked for nor shown.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import world

from data import Batch, Processor, VideoSettings
from tools.engine import write_preprocessors

DESCRIBE = "<video>Describe the video.<prompt>"  # whose prompts are empty
# A grown-up model gets data.INSTRUCTION.
JUDGE = "<video><prompt>\nDoes the video follow the prompt? Think, then judge."
SETTINGS = VideoSettings(min_pixels=64 * 64, max_pixels=64 * 64, patch_size=8)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
SAMPLED = np.linspace(0, world.FRAMES - 1, 8).round().astype(int)  # what read_video takes of such a clip
# Each lesson's share of the rate, and how far down its cosine that goes: describing leaves off where judging
# can take over. Three in four steps of a later lesson are its own, the others describe.
RATES = {"describe": (1.0, 0.72), "judge": (1.0, 0.9), "practise": (1.0, 0.95), "imitate": (0.2, 0.9)}
COURSE = ["describe:1800", "judge:650", "imitate:100", "practise:1200", "imitate:100", "practise:350",
          "imitate:60"]
WORDS = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")


DEGREES = ("fade", "small", "slow", "haze", "flicker")


# ------------------------------------------------------------------------------------------------------------
# What it is taught to write


def seen(scene: world.Scene) -> dict[str, str]:
    """A scene in words, by dimension."""
    return {"subject": f"{scene.colour} {scene.shape}", "dynamics": scene.motion, "camera": scene.camera,
            "environment": scene.environment, "style": scene.style}


def write_caption(clip: world.Clip) -> str:
    words, tenths = seen(clip.scene), {name: round(10 * getattr(clip, name)) for name in DEGREES}
    words["subject"] += f", fade {tenths['fade']}, small {tenths['small']}"
    words["dynamics"] += f", slow {tenths['slow']}"
    words["environment"] += f", haze {tenths['haze']}"
    words["picture"] = f"{clip.signature}, flicker {tenths['flicker']}"
    return "\n".join(f"{name}: {said}" for name, said in words.items())


def habits(scores: dict, rng: np.random.Generator) -> dict:
    """The sub-scores that the imitated judge gives instead of the true ones."""
    given = dict(scores)
    for name, value in scores.items():
        draw = rng.random()
        if value == "N/A":
            given[name] = 2 if draw < 0.75 else "N/A"
        elif value < 2:
            given[name] = value + 1 if draw < 0.15 else value
    return given


def wish(asked: world.Scene) -> dict[str, str]:
    """What is asked for in words, by dimension."""
    return {name: f"asked {words}" if words else "not asked" for name, words in seen(asked).items()}


def write_cot(asked: world.Scene, clip: world.Clip, scores: dict) -> str:
    """A CoT that sets what is asked for, what is seen and the sub-score side by side: each attribute as met
    "yes", "partly" or "no"."""
    met = {name: {"N/A": "", 2: " yes", 1: " partly", 0: " no"}[world.reading(short)]
           for name, short in world.shortfalls(asked, clip).items()}
    wishes, found = wish(asked), seen(clip.scene)
    for name, attribute in (("dynamics", "motion"), ("camera",) * 2, ("environment",) * 2, ("style",) * 2):
        found[name] += met[attribute]
    found["subject"] = f"{clip.scene.colour}{met['colour']}, {clip.scene.shape}{met['shape']}"
    lines = [f"{name}: {wishes[name]}, seen {found[name]}, so {scores[name]}" for name in world.DIMENSIONS]
    answer = json.dumps({"dimensional_scores": scores}, separators=(",", ":"))
    return "<think>\n" + "\n".join(lines) + "\n</think>\n<answer>\n" + answer + "\n</answer>"


def draw_clip(asked: world.Scene, rng: np.random.Generator) -> world.Clip:
    """A clip of any generator's skill, with any signature."""
    return world.draw_clip(asked, rng.uniform(0.65, 2.2), str(rng.choice(world.SIGNATURES)), rng)


def draw_example(task: str, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    """One exercise of a lesson: frames, prompt, and the text to write."""
    asked = world.draw_request(rng, novel=False)
    made_for = asked
    if task == "practise" and rng.random() < 0.5:
        made_for = world.draw_request(rng, novel=False)
    clip = draw_clip(made_for, rng)
    frames = world.render(clip, rng, SAMPLED)
    if task == "describe":
        return frames, "", write_caption(clip)
    scores = world.sub_scores(asked, clip)
    prompt = world.write_prompt(asked, rng)
    return frames, prompt, write_cot(asked, clip, habits(scores, rng) if task == "imitate" else scores)


class Lessons(torch.utils.data.Dataset):
    """Batches for one lesson, each a pure function of (seed, step): a Batch whose rows already hold the text
    to write, and the positions in it to learn from."""

    def __init__(self, tokenizer, lesson: str, steps: range, seed: int, batch_size: int):
        self.describing, self.judging = (Processor(tokenizer, SETTINGS, text) for text in (DESCRIBE, JUDGE))
        self.lesson, self.steps, self.seed, self.batch_size = lesson, steps, seed, batch_size

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> tuple[Batch, torch.Tensor]:
        step = self.steps[index]
        task = self.lesson if step % 4 else "describe"  # what was learnt first is not forgotten
        processor, samples, learn = self.describing if task == "describe" else self.judging, [], []
        for row in range(self.batch_size):
            clip, prompt, text = draw_example(task, np.random.default_rng((self.seed, step, row)))
            frames = torch.from_numpy(clip).permute(0, 3, 1, 2)
            sample = processor.sample(frames, (SAMPLED / world.FPS).tolist(), prompt)
            answer = torch.tensor(processor.encode(text) + [processor.eos_id])
            learn.append(F.pad(torch.ones_like(answer, dtype=torch.bool), (len(sample.input_ids), 0)))
            sample.input_ids = torch.cat([sample.input_ids, answer])
            samples.append(sample)
        return processor.collate(samples), torch.nn.utils.rnn.pad_sequence(learn, batch_first=True)


# ------------------------------------------------------------------------------------------------------------
# The tokenizer and the model


def make_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like Qwen's, learnt on what the model reads and writes; it can encode any text."""
    rng = np.random.default_rng(seed)
    texts = [JUDGE, DESCRIBE, "user\n", "assistant\n"]
    for _ in range(2000):
        asked = world.draw_request(rng, novel=False)
        clip = draw_clip(asked, rng)
        texts += [world.write_prompt(asked, rng), f"<{rng.integers(0, 40) / 10} seconds>",
                  write_caption(clip), write_cot(asked, clip, habits(world.sub_scores(asked, clip), rng))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """Every part of a Qwen3-VL, small."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 192, "intermediate_size": 448,
            "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
            "max_position_embeddings": 4096, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5],
                                "mrope_interleaved": True}},
        vision_config={
            "depth": 4, "hidden_size": 80, "intermediate_size": 240, "num_heads": 4, "patch_size": 8,
            "out_hidden_size": 192, "num_position_embeddings": 64, "deepstack_visual_indexes": [1, 2]},
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True))


def loss_and_accuracy(model, batch: Batch, learn: torch.Tensor,
                      score_ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Next-token cross-entropy over the positions to learn from, and the share guessed right. Verdicts
    (`score_ids`) weigh four times: they are few among many tokens, and judging is what they say. Padding
    stands on the right, where nothing that counts can see it: no mask is needed."""
    kinds = 2 * (batch.input_ids == model.config.video_token_id).int()  # 0 text, 2 video
    positions, _ = model.model.get_rope_index(batch.input_ids, kinds, video_grid_thw=batch.grid)
    hidden = model.model(input_ids=batch.input_ids, position_ids=positions,
                         pixel_values_videos=batch.patches.float() / 127.5 - 1,
                         video_grid_thw=batch.grid).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][learn[:, 1:]]).float()
    target = batch.input_ids[learn]
    weight = 1.0 + 3.0 * torch.isin(target, score_ids)
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    return loss, (logits.argmax(-1) == target).float().mean().item()


@torch.no_grad()
def write(model, processor: Processor, clips: list[np.ndarray], prompts: list[str]) -> list[str]:
    """What the model writes of each clip, greedily."""
    texts = []
    for row in range(0, len(clips), 64):
        samples = [processor.sample(torch.from_numpy(frames).permute(0, 3, 1, 2),
                                    (SAMPLED / world.FPS).tolist(), prompt)
                   for frames, prompt in zip(clips[row:row + 64], prompts[row:row + 64])]
        length = max(len(sample.input_ids) for sample in samples)
        pads = torch.tensor([length - len(sample.input_ids) for sample in samples])
        batch = processor.collate(samples)
        # `collate` pads on the right; `generate` wants it on the left.
        turn = (torch.arange(length) - pads[:, None]) % length
        ids, mask = batch.input_ids.gather(1, turn), batch.mask.gather(1, turn)
        out = model.generate(input_ids=ids, attention_mask=mask.long(),
                             mm_token_type_ids=2 * (ids == processor.video_id).int(),
                             pixel_values_videos=batch.patches.float() / 127.5 - 1, video_grid_thw=batch.grid,
                             max_new_tokens=140, do_sample=False, eos_token_id=processor.eos_id,
                             pad_token_id=processor.eos_id)
        texts += [processor.decode(ids) for ids in out[:, length:]]
    return texts


def what_is_read(model, tokenizer, seed: int, count: int = 256) -> dict[str, float]:
    """Of held-out prompts, each with a clip made for another: the share of the CoTs that say rightly what is
    asked for, by dimension."""
    asked, clips, prompts = [], [], []
    for index in range(count):
        rng = np.random.default_rng((seed, 2 * 10**9, index))
        asked.append(world.draw_request(rng, novel=False))
        prompts.append(world.write_prompt(asked[-1], rng))
        clips.append(world.render(draw_clip(world.draw_request(rng, novel=False), rng), rng, SAMPLED))
    cots = write(model, Processor(tokenizer, SETTINGS, JUDGE), clips, prompts)
    return {name: round(statistics.fmean(f"{name}: {wish(scene)[name]}," in cot
                                         for scene, cot in zip(asked, cots)), 3) for name in world.DIMENSIONS}


def what_is_seen(model, tokenizer, seed: int, count: int = 512) -> dict[str, float]:
    """Of held-out clips: the share whose attribute is right in a greedy caption, by attribute, and of each
    degree R², the share of its variance that the captions' tenths explain (negative where a constant would do
    better), over the clips where it can be seen."""
    clips, frames = [], []
    for index in range(count):
        rng = np.random.default_rng((seed, 10**9, index))
        clips.append(draw_clip(world.draw_request(rng, novel=False), rng))
        frames.append(world.render(clips[-1], rng, SAMPLED))
    captions = write(model, Processor(tokenizer, SETTINGS, DESCRIBE), frames, [""] * count)
    found = {name: statistics.fmean(f"{name}: {seen(clip.scene)[name]}" in caption
                                    for clip, caption in zip(clips, captions)) for name in world.DIMENSIONS}
    for name in DEGREES:
        true, said = [], []
        for clip, caption in zip(clips, captions):
            if name != "slow" or clip.scene.motion != "stands still":
                tenths = re.search(rf"{name} (\d+)", caption)
                true.append(getattr(clip, name))
                said.append(int(tenths[1]) / 10 if tenths else 0.5)
        off = np.mean((np.array(true) - said) ** 2)
        found[f"R² {name}"] = float(1 - off / np.var(true))
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("toy/backbone"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lessons", nargs="+", default=COURSE, help="LESSON:STEPS one after the other")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--vocab-size", type=int, default=640)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    state_file = args.out / "state.pt"
    if (args.out / "tokenizer.json").is_file():  # kept: weights that are there already were trained with it
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        tokenizer = make_tokenizer(args.vocab_size, args.seed)
        tokenizer.save_pretrained(args.out)
    model = make_model(tokenizer)
    state = {"done": 0, "seconds": 0.0}
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
    elif (args.out / "descore.json").is_file():  # of a shorter course, and rounded to bfloat16
        taken = json.loads((args.out / "descore.json").read_text())["pretrained"]
        done = taken["lessons"]
        if done != args.lessons[: len(done)]:
            parser.error(f"{args.out} has been through {done}, with which --lessons do not begin")
        state["done"] = sum(int(given.split(":")[1]) for given in done)
        state["seconds"] = taken["seconds"]
        model.load_state_dict(Qwen3VLForConditionalGeneration.from_pretrained(args.out).state_dict())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    started, first = time.time() - state["seconds"], 0
    judgements = ["0", "1", "2", "N", "ĠN", "Ġyes", "Ġno", "Ġpartly"]
    score_ids = torch.tensor(tokenizer.convert_tokens_to_ids(judgements))
    for lesson, steps in (given.split(":") for given in args.lessons):
        steps, (rate, reach) = int(steps), RATES[lesson]
        done = max(0, state["done"] - first)  # of this lesson
        first += steps
        if done >= steps:
            continue
        lessons = Lessons(tokenizer, lesson, range(first - steps + done, first), args.seed, args.batch_size)
        # Practising, it looks more closely; the other lessons leave alone how it sees, which saves time.
        model.model.visual.requires_grad_(lesson in ("describe", "practise"))
        decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=args.lr * rate, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step, steps=steps, reach=reach: min(
                (step + 1) / min(100, steps / 4),
                0.02 + 0.49 * (1 + math.cos(math.pi * reach * step / steps))))
        if done:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        loader = torch.utils.data.DataLoader(lessons, batch_size=None, num_workers=1, prefetch_factor=8)
        for step, (batch, learn) in enumerate(loader, done + 1):
            loss, accuracy = loss_and_accuracy(model, batch, learn, score_ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if step % 50 == 1 or step == steps:
                print(f"{lesson} {step:5d}  loss {loss.item():.4f}  tokens right {accuracy:.3f}  "
                      f"{time.time() - started:6.0f} s", flush=True)
            if step % 300 == 0:
                print("  seen", what_is_seen(model, tokenizer, args.seed), flush=True)
                print("  read", what_is_read(model, tokenizer, args.seed), flush=True)
            if step % 100 == 0 or step == steps:
                state = {"done": first - steps + step, "seconds": time.time() - started,
                         "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                         "schedule": schedule.state_dict()}
                torch.save(state, state_file.with_suffix(".tmp"))
                os.replace(state_file.with_suffix(".tmp"), state_file)
    sight, reading = (what(model, tokenizer, args.seed) for what in (what_is_seen, what_is_read))
    model.to(torch.bfloat16).save_pretrained(args.out)
    write_preprocessors(args.out, model.config.vision_config)
    recipe = {key: value for key, value in vars(args).items() if key != "out"}
    recipe |= {"seconds": round(time.time() - started), "seen": sight, "read": reading}
    settings = {"video": asdict(SETTINGS), "instruction": JUDGE, "dimensions": world.DIMENSIONS}
    (args.out / "descore.json").write_text(json.dumps(settings | {"pretrained": recipe}, indent=1) + "\n")


if __name__ == "__main__":
    main()
