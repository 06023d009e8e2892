"""Real shapes on a CPU: each command on a Qwen3-VL of 2B to 8B with random weights, its memory and time.

    python bench/real_size.py 2b                # or several of 2b, 2b-4 (four layers of it), 4b, 8b
    python bench/real_size.py 2b --only 4bit    # the cells that have this word in them
    python bench/real_size.py toy               # tiny widths, to try the script

Configuration, vocabulary and code are real; the weights are one block of random numbers, shifted for each
tensor. Each command is a process of its own, which sees one pair of clips. Two figures are its peak: what is
resident (VmHWM of its processes, mapped files with it) and, sampled twenty times a second, what is not a
mapped file (RssAnon and RssShmem), which alone is compared with what was computed
(`memory.cpu_memory`) and with what is available. Rows go to OUT/rows.jsonl and are printed. What is not
measured says why: not run, does not fit, refused for now, failed.

glibc keeps what is freed in blocks below a threshold that it raises as it goes; here it stays at 1 MB
(MALLOC_MMAP_THRESHOLD_), which spares gigabytes.

No flag of a command chooses bfloat16 on a CPU, and none of annotate, infer.py and serve 4 bits. Such
cells run the command in this script with another default of `DeScore.load` (`run_inside`).
"""

import argparse
import base64
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "toy")]
import numpy as np
import torch
import world
from memory import GB, SHAPES, Shape, cpu_memory, peak
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from data import DIMENSIONS, DataError, Processor, VideoSettings
from model import DeScore
from support.command import run_command
from support.files import lock
from tools.client import Client

HOURS = 6  # for all
BOUND = 90 * 60  # seconds for a command
WAIT = 15 * 60  # seconds to wait for memory
SPARE = 2.0  # GB that stay free
ATTEMPTS = 3  # of a command that was killed, as where others take the memory
SHAPES = {"toy": Shape(64, 2, 4, 2, 16, 128, 538, True, 4, 64, 4, 128, (1, 2, 3), 710_336, 330_624), **SHAPES}
PIXELS = {"toy": 4096, "2b": 100_352, "2b-4": 100_352, "4b": 50_176, "8b": 50_176}  # a frame
SIZES_OF_CLIPS = ((752, 1360, 126, 24), (384, 672, 144, 24))  # height, width, frames, frames a second
PROMPT = "At night, a striped white cross stands still."
COT = ("<think>\nThe subject is there in part, and moves as asked; the picture is steady.\n</think>\n<answer>"
       + json.dumps({"dimensional_scores": dict.fromkeys(DIMENSIONS, 1)}) + "</answer>")
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
KILLED = "it was killed, as where memory runs short"
GROUP, ROLLOUT, WRITTEN = 2, 24, 32  # of stage 2: CoTs a video and their tokens; tokens of other CoTs
COT_TOKENS = 63  # of COT, in the real vocabulary
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
           "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
           "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")


@dataclass(frozen=True)
class Cell:
    """Commands on one model."""

    size: str
    kind: str  # of the frozen weights: float32, bfloat16, 4bit
    trains: str  # lora, whole, or shards over two ranks
    commands: tuple[str, ...] = ()  # none: it is computed alone

    def __str__(self) -> str:
        return f"{self.size} {self.kind} {self.trains}"


# What is measured, in this order; behind it what is computed alone.
ALL = ("load", "annotate", "coldstart", "resume", "rl", "infer", "serve")
SOME = ("load", "annotate", "coldstart", "rl", "infer")
STAGES = ("load", "coldstart", "rl", "infer")
CELLS = [
    Cell("toy", "float32", "lora", ALL), Cell("toy", "float32", "shards", ("coldstart", "rl")),
    Cell("toy", "4bit", "lora", STAGES),
    Cell("toy", "bfloat16", "whole", ("coldstart",)),
    Cell("2b", "float32", "lora", ALL),
    Cell("2b-4", "float32", "whole", STAGES), Cell("2b-4", "float32", "shards", ("coldstart", "rl")),
    Cell("2b", "4bit", "lora", SOME), Cell("2b", "bfloat16", "lora", SOME),
    Cell("4b", "4bit", "lora", STAGES), Cell("8b", "4bit", "lora", STAGES),
    Cell("2b", "float32", "whole"), Cell("4b", "bfloat16", "lora"), Cell("4b", "float32", "lora"),
    Cell("4b", "float32", "whole"), Cell("8b", "bfloat16", "lora"), Cell("8b", "float32", "lora"),
    Cell("8b", "float32", "whole"),
]


# ------------------------------
# A checkpoint


def config_of(shape: Shape) -> Qwen3VLConfig:
    """A Qwen3-VL's configuration, all of whose numbers are real but those of the toy."""
    half = shape.head_size // 2
    side = half * 20 // 64  # of rotary dimensions, for height and for width
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True,
            "mrope_section": [half - 2 * side, side, side]}
    text = {"vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_size,
            "max_position_embeddings": 262_144, "rope_parameters": rope, "tie_word_embeddings": shape.tied}
    vision = {"depth": shape.depth, "hidden_size": shape.vision_hidden, "num_heads": shape.vision_heads,
              "intermediate_size": shape.vision_mlp, "out_hidden_size": shape.hidden,
              "deepstack_visual_indexes": list(shape.deepstack), "num_position_embeddings": 2304}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied)


def make_tokenizer(ranks: bytes) -> PreTrainedTokenizerFast:
    """Qwen's tokenizer from its byte-pair ranks, a token in base64 a line, and the special tokens of
    Qwen3-VL behind them."""
    tokens = [base64.b64decode(line.split()[0]) for line in ranks.splitlines() if line]
    rank = {token: number for number, token in enumerate(tokens)}
    letters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in tokens:
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:  # the merges of lower rank leave the two that make the token
            joined = [rank.get(a + b, len(rank)) for a, b in pairwise(parts)]
            best = joined.index(min(joined))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges.append((text(parts[0]), text(parts[1])))
    tokenizer = Tokenizer(models.BPE({text(token): number for token, number in rank.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    letters_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters_of])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>")


def tokenizer_of(size: str, folder: Path) -> PreTrainedTokenizerFast:
    """The toy's own, or the real one, whose vocabulary the PyPI package dashscope has."""
    if size == "toy":
        return AutoTokenizer.from_pretrained(ROOT / "toy/backbone")
    wheels = folder / "wheels"
    if not list(wheels.glob("dashscope*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels),
                        "dashscope"], check=True)
    with zipfile.ZipFile(next(wheels.glob("dashscope*.whl"))) as wheel:
        return make_tokenizer(wheel.read("dashscope/resources/qwen.tiktoken"))


def write_checkpoint(shape: Shape, tokenizer, folder: Path) -> None:
    """Write a Qwen3-VL in bfloat16 with random weights, in files of some 2 GB."""
    config = config_of(shape)
    for name in ("video_pad", "image_pad", "vision_start", "vision_end"):
        kind = name.replace("_pad", "")
        setattr(config, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    config.dtype = torch.bfloat16
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    block = torch.randn(2**22 + 1, generator=torch.Generator().manual_seed(0))
    block = (0.02 * block).to(torch.bfloat16)
    folder.mkdir(parents=True)
    files: list[dict] = [{}]
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.ndim == 1:  # scales of norms, and biases
            tensor = torch.full(parameter.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
        else:
            count = -(-parameter.numel() // len(block))
            numbers = block.roll(7919 * number).repeat(count)
            tensor = numbers[: parameter.numel()].view(parameter.shape).clone()
        if files[-1] and sum(t.nbytes for t in files[-1].values()) + tensor.nbytes > 2 * GB:
            write_part(folder, files)
            files.append({})
        files[-1][name] = tensor
    write_part(folder, files)
    places = {name: f"model-{number:05}.safetensors" for number, file in enumerate(files, 1) for name in file}
    index = {"metadata": {"total_size": 2 * sum(p.numel() for p in model.parameters())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_part(folder: Path, files: list[dict]) -> None:
    """Write the last of some files, and forget its tensors."""
    save_file(files[-1], folder / f"model-{len(files):05}.safetensors", {"format": "pt"})
    files[-1] = dict.fromkeys(files[-1])


# ------------------------------
# Clips and pairs


def make_clips(folder: Path, small: bool) -> list[Path]:
    """Two clips of the embedded world, as large and long as those of text-to-video models are."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = []
    for number, (height, width, count, fps) in enumerate(SIZES_OF_CLIPS):
        if small:
            height, width, count, fps = 64, 64, 16, 4
        frames = world.render(world.Clip(world.draw_scene(rng)), rng)
        at = np.arange(count) * len(frames) // count
        rows = np.arange(height) * frames.shape[1] // height
        columns = np.arange(width) * frames.shape[2] // width
        large = (frames[index][rows][:, columns] for index in at)
        paths.append(folder / f"clip_{number}.mp4")
        world.write_video(paths[-1], np.stack(list(large)), fps)
    return paths


def write_pairs(folder: Path, clips: list[Path]) -> None:
    """one.jsonl, a pair, and two.jsonl, which has it the other way round as well."""
    scores = dict.fromkeys(DIMENSIONS, 1)
    pair = {"prompt": PROMPT, "video_a": str(clips[0].resolve()), "video_b": str(clips[1].resolve()),
            "preference": "A", "cot_a": COT, "cot_b": COT, "scores_a": scores, "scores_b": scores}
    other = pair | {"video_a": pair["video_b"], "video_b": pair["video_a"], "preference": "B"}
    lines = [json.dumps(record) + "\n" for record in (pair, other)]
    (folder / "one.jsonl").write_text(lines[0])
    (folder / "two.jsonl").write_text("".join(lines))


# ------------------------------
# A process and what it takes


def status_of(pid: int) -> dict[str, float]:
    """GB of a process by the names of /proc; none of one that is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {name: int(size) * 1024 / GB for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)}


def family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from family(int(child))


def run(words: list[str], log: Path, bound: float, done: Callable[[], bool] | None = None) -> dict:
    """Run a command of Python. Returns its seconds, its peaks in GB, `resident` and `anonymous`, and
    `failed`: why, or None. done: asked now and then; once it says so the command is asked to stop."""
    started = time.time()
    peaks = {"resident": 0.0, "anonymous": 0.0}
    failed = None
    asked = False
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=file,
                                   env=os.environ | GIVES_BACK)
    try:
        while process.poll() is None:
            states = [status_of(pid) for pid in family(process.pid)]
            resident = sum(state.get("VmHWM", 0) for state in states)
            anonymous = sum(state.get("RssAnon", 0) + state.get("RssShmem", 0) for state in states)
            peaks["resident"] = max(peaks["resident"], resident)
            peaks["anonymous"] = max(peaks["anonymous"], anonymous)
            if time.time() - started > bound:
                failed = f"not done within {bound:.0f} s"
                break
            if done and not asked and done():
                process.send_signal(signal.SIGTERM)
                asked = True
            time.sleep(0.05)
    finally:
        for pid in [] if process.poll() is not None else list(family(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    if process.returncode == -signal.SIGKILL and not failed:
        failed = KILLED
    elif process.returncode and not failed and not (asked and process.returncode in (-signal.SIGTERM, 143)):
        lines = log.read_text(errors="replace").splitlines() or [""]
        failed = f"ended with {process.returncode}: {lines[-1][:200]}"
    return {"seconds": time.time() - started, **peaks, "failed": failed}


def available() -> float:
    """GB that a new process may take without mapped files, of which nobody has to be killed."""
    text = Path("/proc/meminfo").read_text()
    return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024 / GB


def whole_memory() -> float:
    text = Path("/proc/meminfo").read_text()
    return int(re.search(r"MemTotal:\s+(\d+)", text)[1]) * 1024 / GB


# ------------------------------
# The commands


def run_inside(kind: str, words: list[str]) -> None:
    """Run a command in this process, in which models are loaded with weights of a kind."""
    more = {"bfloat16": {"dtype": torch.bfloat16}, "4bit": {"quant": "4bit"}}
    DeScore.load = partial(DeScore.load, **more[kind])
    sys.argv = words[words[0] == "-m":]
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def load(kind: str, source: str) -> None:
    """Load a model, and print how long it took, what was there before, and what its weights take."""
    more = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}, "4bit": {"quant": "4bit"}}
    before = status_of(os.getpid())["RssAnon"]
    started = time.time()
    model = DeScore.load(source, device="cpu", **more[kind])
    seconds = time.time() - started
    kept = {t.data_ptr(): t.nbytes for t in model.state_dict().values() if isinstance(t, torch.Tensor)}
    after = status_of(os.getpid())["RssAnon"]
    print(json.dumps({"imports": before, "weights": sum(kept.values()) / GB, "kept": after - before,
                      "load_seconds": seconds}))


class Bench:
    """The commands of a cell, one after another, in a folder."""

    def __init__(self, cell: Cell, folder: Path, data: Path, backbone: Path, clip: Path, log: Path):
        self.cell, self.folder, self.data, self.backbone = cell, folder, data, backbone
        self.clip, self.log = clip, log
        self.pixels = PIXELS[cell.size]

    def words(self, command: str) -> list[str]:
        """What stands behind `python` for a command."""
        cell, folder = self.cell, self.folder
        bounds = ["--min-pixels", str(self.pixels // 2), "--max-pixels", str(self.pixels)]
        brief = ["--max-new-tokens", str(WRITTEN)]
        pairs = "two" if "resume" in cell.commands else "one"
        stage = ["--train", f"{self.data}/{pairs}.jsonl", "--batch-size", "1", "--workers", "0",
                 "--keep", "1", "--eval-before", "false", *bounds]
        if cell.kind == "4bit":
            stage += ["--quant", "4bit"]
        if cell.trains != "lora":
            stage += ["--lora-rank", "0"]
        if cell.trains == "shards":
            stage += ["--shard", "full"]
        cold = ["coldstart.py", "--model", str(self.backbone), "--out", f"{folder}/coldstart",
                "--epochs", "1", "--mask-p", "0", *stage]
        model = ["--model", f"{folder}/rl"]
        words = {
            "load": [__file__, "--load", cell.kind, str(self.backbone)],
            "annotate": ["-m", "tools.annotate", f"{self.data}/one.jsonl", f"{folder}/annotated.jsonl",
                         "--model", str(self.backbone), *brief, *bounds],
            "coldstart": cold,
            "resume": cold,
            "rl": ["rl.py", "--model", f"{folder}/coldstart", "--out", f"{folder}/rl", "--steps", "1",
                   "--updates", "1", "--group-size", str(GROUP), "--max-new-tokens", str(ROLLOUT), *stage],
            "infer": ["infer.py", str(self.clip), PROMPT, *model, *brief],
            "serve": ["-m", "tools.serve", *model, "--port", "0", "--accept-any", *brief],
        }[command]
        own_flag = command == "load" or (cell.kind == "4bit" and command in ("coldstart", "rl"))
        if cell.kind != "float32" and not own_flag:
            words = [__file__, "--inside", cell.kind, *words]
        if cell.trains == "shards" and command in ("coldstart", "rl"):
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
        return words

    def computed(self, command: str) -> float:
        settings = VideoSettings(min_pixels=self.pixels // 2, max_pixels=self.pixels)
        tokenizer = AutoTokenizer.from_pretrained(self.backbone)
        processor = Processor(tokenizer, settings)
        prompt = len(processor.outline(str(self.clip), PROMPT).input_ids)
        cot = {"rl": ROLLOUT, "coldstart": COT_TOKENS, "resume": COT_TOKENS}.get(command, WRITTEN)
        return computed(self.cell, command, prompt, cot)

    def measure(self, command: str, bound: float) -> dict:
        """Run a command; what `run` says, and what the command itself tells."""
        log = self.log.with_name(f"{self.log.name}-{command}.log")
        if command == "serve":
            return self.serve(log, bound)
        settings = self.folder / "coldstart/settings.json"
        stops = command == "coldstart" and "resume" in self.cell.commands
        figures = run(self.words(command), log, bound, settings.is_file if stops else None)
        stage = "coldstart" if command == "resume" else command
        metrics = self.folder / stage / "metrics.jsonl"
        if figures["failed"]:
            return figures
        if command == "load":
            return figures | json.loads(log.read_text().splitlines()[-1])
        if metrics.is_file():
            steps = [json.loads(line) for line in metrics.read_text().splitlines()]
            last = [step for step in steps if "seconds" in step][-1]
            figures["step_seconds"] = last["seconds"]
            figures |= {name: last[name] for name in ("logp_gap", "loss") if name in last}
        return figures

    def serve(self, log: Path, bound: float) -> dict:
        """Serve a model, ask about a clip, and stop it."""
        answers = []
        with ThreadPoolExecutor(1) as pool:

            def done() -> bool:
                address = re.search(r"http://\S+", log.read_text(errors="replace"))
                if address and not answers:
                    ask = Client(address[0], timeout=bound, attempts=1)
                    answers.append((time.time(), pool.submit(ask, str(self.clip), PROMPT)))
                return bool(answers) and answers[0][1].done()

            figures = run(self.words("serve"), log, bound, done)
            if not answers:
                return figures | {"failed": figures["failed"] or "it was never served"}
            asked, future = answers[0]
            (record,) = future.result()
        figures["step_seconds"] = time.time() - asked
        return figures | {"failed": figures["failed"] or record["error"]}


def computed(cell: Cell, command: str, prompt: int, cot: int) -> float:
    """GB of a command without mapped files."""
    return peak(cpu_memory(SHAPES[cell.size], cell.kind, cell.trains, command, prompt, cot, GROUP))


# ------------------------------
# Rows


class Rows:
    """The table, a line at a time: JSON in a file, Markdown on the screen."""

    def __init__(self, path: Path):
        self.path = path
        print("| model | weights | trains | command | computed | without files | resident | s | of which the "
              "step | |\n| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |", flush=True)

    def add(self, cell: Cell, command: str, state: str, need: float, figures: dict | None = None) -> None:
        row = {"size": cell.size, "kind": cell.kind, "trains": cell.trains, "command": command,
               "state": state, "computed": round(need, 3)} | (figures or {})
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(as_line(row), flush=True)


def as_line(row: dict) -> str:
    """A row of the table."""
    def number(name: str, digits: int) -> str:
        return f"{row[name]:.{digits}f}" if name in row else "–"

    what = row["state"] if row["state"] != "measured" else ""
    if row["command"] == "load" and "weights" in row:
        share = (row["anonymous"] - row["imports"]) / row["weights"]
        what = f"peak {share:.2f} × the weights, {row['weights']:.2f} GB"
    if "logp_gap" in row:
        what = f"logp_gap {row['logp_gap']:.1e}"
    if row.get("failed"):
        what += f": {row['failed']}"
    return (f"| {row['size']} | {row['kind']} | {row['trains']} | {row['command']} | {row['computed']:.1f} | "
            f"{number('anonymous', 1)} | {number('resident', 1)} | {number('seconds', 0)} | "
            f"{number('step_seconds', 0)} | {what} |")


def wait_for(need: float) -> bool:
    """Whether so many GB, and `SPARE`, are available, within `WAIT` seconds."""
    until = time.time() + WAIT
    while need + SPARE > available():
        if time.time() > until:
            return False
        time.sleep(5)
    return True


def measure_cell(cell: Cell, rows: Rows, args, until: float) -> None:
    """Write a checkpoint, run a cell's commands on it, and delete both."""
    small = cell.size == "toy"
    clips = sorted(args.clips.glob("*.mp4"))[:2] if args.clips else make_clips(args.out / "clips", small)
    if len(clips) < 2:
        raise DataError(f"{args.clips}: has no two clips (*.mp4)")
    write_pairs(args.out, clips)
    folder = args.out / "real_size_cell"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        backbone = folder / "backbone"
        started = time.time()
        # In a process of its own, whose memory is free again.
        subprocess.run([sys.executable, __file__, "--write", cell.size, str(args.out), str(backbone)],
                       check=True)
        print(f"{cell}: its checkpoint was written in {time.time() - started:.0f} s", file=sys.stderr)
        bench = Bench(cell, folder, args.out, backbone, clips[0], args.out / str(cell).replace(" ", "-"))
        for command in cell.commands:
            need = bench.computed(command)
            if need + SPARE > whole_memory():
                rows.add(cell, command, "does not fit", need)
            elif time.time() > until:
                rows.add(cell, command, "not run", need)
            else:
                rows.add(cell, command, *measure(bench, command, need, until))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(bench: Bench, command: str, need: float, until: float) -> tuple[str, float, dict]:
    """The state of a command's row, what it was computed to need, and what was measured."""
    figures: dict = {}
    for _ in range(ATTEMPTS):
        if not wait_for(need):
            return "refused", need, {"failed": f"{available():.1f} GB are available"}
        figures = bench.measure(command, min(BOUND, until - time.time()))
        if figures["failed"] != KILLED:
            break
    return ("failed" if figures["failed"] else "measured"), need, figures


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        return run_inside(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["--load"]:
        return load(*sys.argv[2:])
    if sys.argv[1:2] == ["--write"]:
        size, out, backbone = sys.argv[2:]
        return write_checkpoint(SHAPES[size], tokenizer_of(size, Path(out)), Path(backbone))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sizes", nargs="+", choices=SHAPES, metavar="SIZE", help=", ".join(SHAPES))
    parser.add_argument("--only", default="", help="cells that have this word in them, such as 4bit")
    parser.add_argument("--clips", type=Path, help="a folder of videos [two are rendered]")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/real_size", help="rows, logs, checkpoints")
    args = parser.parse_args()
    cells = [cell for cell in CELLS if cell.size in args.sizes and args.only in str(cell)]
    if not cells:
        raise DataError(f"--only {args.only}: no cell of {', '.join(args.sizes)} has this in its name")
    Path("/proc/self/oom_score_adj").write_text("1000")  # who runs short of memory is to stop this first
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    taken = (args.out / "real_size.lock").open("w")
    lock(taken, f"{args.out}: another run of this script works there")
    until = time.time() + HOURS * 3600
    rows = Rows(args.out / "rows.jsonl")
    for cell in cells:
        if cell.commands:
            measure_cell(cell, rows, args, until)
            continue
        for command in ("coldstart", "rl"):
            need = computed(cell, command, 1000, ROLLOUT)
            fits = need + SPARE <= whole_memory()
            rows.add(cell, command, "not run" if fits else "does not fit", need)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs below it is stopped then
    run_command(main)
