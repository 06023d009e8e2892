"""A vLLM engine that thinks in place of `DeScore.think`; log π and the scores stay the trainer's own.

    python rl.py --rollouts tools/engine.py:think

The engine gets the token ids of our prompts, with one <|video_pad|> where a video stands, and the
frames as the model sees them. The prompt ids that it makes of these must be ours. What it writes goes
through one forward of the trainer (`DeScore.group`), which gives log π_old and the scores. vLLM is
installed beside the project: docs/scale.md.
"""

import json
import multiprocessing
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import Batch, DataError, Grid, Processor, VideoSettings
from model import OWN, DeScore, Thoughts, check_sampling
from support.batches import draw_seed
from support.command import PeftModel
from support.files import local_folder
from support.saved import adapter_weights
from tools.shown import timing

# How the engine is started, in vLLM's words: for rows as long as its memory allows, on a GPU beside the
# trainer, and at once (compiled it starts later and writes faster).
OPTIONS = {"max_model_len": -1, "gpu_memory_utilization": 0.4, "enforce_eager": True}
# Of a process of its own, for the trainer's threads would not survive a fork.
ENVIRONMENT = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_LOGGING_LEVEL": "ERROR"}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # for which the engine has room for an adapter


def think(
        model: DeScore, batch: Batch, n: int = 1, max_new_tokens: int = 4096,
        temperature: float = 1.0, top_p: float = 1.0, seeds: list[int] | None = None) -> Thoughts:
    """Let the engine write n CoTs for each of the batch's B videos, as `DeScore.think` would, and score
    each where it ends. The batch has its patches, encoded or not.

    `seeds`, one a video, decide what is drawn, by the engine's own generator: other CoTs than those of
    `DeScore.think`. logps are the trainer's; `sampler_gap` says how far the engine's are from them, which
    of a top_p below 1 know what was left out. Raises DataError where the engine's prompt is not ours,
    where it cannot have the weights that train, and where there is no vLLM."""
    check_sampling(temperature, top_p, 1.0)
    check_engine(model, batch)
    if seeds is None:
        seeds = torch.randint(2**62, (len(batch),)).tolist()
    engine = engine_of(model)
    prompts = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.mask)]
    asked = []
    sampling = []
    for prompt, frames, seed in zip(prompts, frames_of(batch, model.processor.settings), seeds):
        asked += [engine_prompt(model.processor, prompt, frames)] * n
        for place in range(n):
            sampling.append({
                "temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens,
                "seed": draw_seed(seed, place), "stop_token_ids": [model.eos], "ignore_eos": True,
                "logprobs": 0, "detokenize": False})
    answers = engine.generate(model, asked, sampling)
    for b, prompt in enumerate(prompts):
        for answer in answers[b * n : (b + 1) * n]:
            check_answer(model, batch, b, prompt, answer, max_new_tokens)

    tokens, mask = side_by_side(model, [written for _, written, _ in answers], n)
    theirs = pad_sequence([torch.tensor(logps) for *_, logps in answers], batch_first=True)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logps, parts = model.group_parts(batch, tokens, mask, temperature)
    model.train(was_training)
    gap = (logps - theirs.view_as(logps).to(logps)).abs().amax(-1)
    return Thoughts(tokens, mask, logps, model.overall(parts), parts=parts, sampler_gap=gap)


def check_engine(model: DeScore, batch: Batch) -> None:
    """DataError where an engine would not think as the model does, or could not see the videos."""
    if not len(batch.patches):
        raise DataError("an engine sees the videos themselves: the batch has no patches any more")
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise DataError(f"tools/engine.py works with one process, not with {dist.get_world_size()}")
    if model.quant:
        raise DataError(f"--quant {model.quant}: an engine's weights are whole, and not the policy's")
    for name in model.trainable():
        if not name.startswith(OWN) and ".lora_" not in name:
            raise DataError(f"{name} trains, and an engine gets nothing but the LoRA adapter while it runs: "
                            "it goes with --lora-rank above 0, and without --train-merger")


def check_answer(model: DeScore, batch: Batch, b: int, prompt: list[int], answer: tuple,
                 max_new_tokens: int) -> None:
    """DataError unless an answer is to our prompt, and went on to its end or to the limit."""
    theirs, tokens, _ = answer
    name = batch.sources[b][0] if batch.sources else f"video {b + 1}"
    if theirs != prompt:
        apart = how_apart(model.processor, theirs, prompt)
        raise DataError(f"{name}: the engine's prompt is not ours: {len(theirs)} tokens, not {len(prompt)}, "
                        f"{apart}")
    if tokens[-1:] != [model.eos] and len(tokens) < max_new_tokens:
        raise DataError(f"{name}: the engine stopped after {len(tokens)} tokens, and may write "
                        f"{max_new_tokens}: it has memory for no longer row")


def side_by_side(model: DeScore, written: list[list[int]], n: int) -> tuple[Tensor, Tensor]:
    """The tokens of CoTs, n a video and one video's behind the other's, as `Thoughts` has them: tokens
    and mask (B, n, C)."""
    rows = [torch.tensor(tokens, dtype=torch.long) for tokens in written]
    ones = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    tokens = pad_sequence(rows, batch_first=True, padding_value=model.eos).to(model.device)
    mask = pad_sequence(ones, batch_first=True).to(model.device)
    return tokens.unflatten(0, (-1, n)), mask.unflatten(0, (-1, n))


def how_apart(processor: Processor, theirs: list[int], ours: list[int]) -> str:
    """Where two prompts begin to differ, and with what."""
    same = [a == b for a, b in zip(theirs, ours)]
    place = same.index(False) if False in same else len(same)
    texts = [processor.tokenizer.decode(ids[place : place + 5]) for ids in (theirs, ours)]
    return f"and from token {place} on {texts[0]!r}, not {texts[1]!r}"


# ------------------------------
# What the engine is asked


def unpatchify(patches: Tensor, grid: Grid, settings: VideoSettings) -> Tensor:
    """The frames (T, 3, H, W) of which `data.patchify` made these patches."""
    t = settings.temporal_patch_size
    p = settings.patch_size
    m = settings.merge_size
    grid_t, grid_h, grid_w = grid
    x = patches.reshape(grid_t, grid_h // m, grid_w // m, m, m, 3, t, p, p)
    x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)  # grid_t, t, channel, h/m, m, p, w/m, m, p
    return x.reshape(grid_t * t, 3, grid_h * p, grid_w * p)


def frames_of(batch: Batch, settings: VideoSettings) -> list[Tensor]:
    """The frames (T, 3, H, W) uint8 of each of a batch's videos, on the CPU."""
    counts = batch.grid.prod(1).tolist()
    videos = batch.patches.cpu().split(counts)
    return [unpatchify(patches, grid, settings) for patches, grid in zip(videos, batch.grid.tolist())]


def engine_prompt(processor: Processor, prompt: list[int], frames: Tensor) -> dict:
    """What `LLM.generate` is asked: the prompt with one token for the whole video, and its frames. Their
    times are those that the prompt prints: two frames of one temporal patch get the same."""
    t = processor.settings.temporal_patch_size
    start = prompt.index(processor.special["<|vision_start|>"])
    behind = len(prompt) - prompt[::-1].index(processor.special["<|vision_end|>"])
    text = processor.tokenizer.decode(prompt[:behind], skip_special_tokens=False)
    stamps = re.findall(r"<(\d+\.\d) seconds><\|vision_start\|>", text)
    stamps = stamps[-(len(frames) // t) :]  # what else reads so stands before the video, and is text
    first = len(processor.encode(f"<{stamps[0]} seconds>"))
    ids = [*prompt[: start - first], processor.video_id, *prompt[behind:]]
    about = timing(stamps, t) | {"video_backend": "none", "height": frames.shape[2], "width": frames.shape[3]}
    pictures = frames.permute(0, 2, 3, 1).numpy()
    return {"prompt_token_ids": ids, "multi_modal_data": {"video": [(pictures, about)]},
            "mm_processor_kwargs": {"do_resize": False, "do_sample_frames": False}}


# ------------------------------
# The engine


@lru_cache(maxsize=1)
def engine_of(model: DeScore) -> "Engine":
    """The engine that thinks for a model: started once, for its backbone stays as it is."""
    return Engine(model)


class Engine:
    """A vLLM engine in a process of its own, with a model's backbone and the adapter of the moment."""

    def __init__(self, model: DeScore):
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise DataError(f"tools/engine.py needs vLLM, see docs/scale.md ({error})") from error
        self.SamplingParams = vllm.SamplingParams
        self.LoRARequest = LoRARequest
        self.folder = TemporaryDirectory(prefix="descore-engine-")  # removed with this object
        self.weights: dict[str, Tensor] = {}  # of the adapter that it has
        self.adapters = 0  # how many it has had
        options = dict(OPTIONS)
        if model.device.type == "cpu":  # where a seed fails for a prompt that is read in pieces (vLLM 0.32.0)
            options["enable_chunked_prefill"] = False
        if isinstance(model.backbone, PeftModel):
            rank = model.backbone.peft_config["default"].r
            room = min(size for size in RANKS if size >= rank)
            options |= {"enable_lora": True, "max_lora_rank": room}
        backbone = Path(self.folder.name, "backbone")
        write_backbone(model, backbone)
        others = multiprocessing.active_children()
        with signals_are_ours():
            self.llm = vllm.LLM(
                str(backbone), dtype=str(model.dtype).removeprefix("torch."),
                limit_mm_per_prompt={"video": 1, "image": 0}, skip_mm_profiling=True,
                logprobs_mode="processed_logprobs", generation_config="vllm", **options)
        started = [child.pid for child in multiprocessing.active_children() if child not in others]
        self.watch = end_with_us(started)

    def generate(self, model: DeScore, asked: list[dict], sampling: list[dict]) -> list[tuple]:
        """For each question the prompt ids that it became, the tokens written, and their logps."""
        adapter = self.adapter_of(model)
        sampling = [self.SamplingParams(**one) for one in sampling]
        outputs = self.llm.generate(asked, sampling, use_tqdm=False, lora_request=adapter)
        answers = []
        for output in outputs:
            (written,) = output.outputs
            tokens = list(written.token_ids)
            logps = [of_step[token].logprob for token, of_step in zip(tokens, written.logprobs)]
            answers.append((list(output.prompt_token_ids), tokens, logps))
        return answers

    def adapter_of(self, model: DeScore):
        """The model's adapter as it is now, written and asked for by a number of its own where it is not
        the one that the engine has; None for a model without."""
        if not isinstance(model.backbone, PeftModel):
            return None
        folder = Path(self.folder.name, "adapter")
        weights = adapter_weights(model)
        known = self.weights.keys() == weights.keys()
        if not known or not all(torch.equal(weights[name], self.weights[name]) for name in weights):
            self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
            self.adapters += 1
            model.save(folder)
        # The engine keeps what it has computed under an adapter's name.
        return self.LoRARequest(f"adapter {self.adapters}", self.adapters, str(folder))


@contextmanager
def signals_are_ours() -> Iterator[None]:
    """Processes that are started within hear neither Ctrl-C, which goes to all in a terminal, nor
    SIGTERM: a run that is told to stop finishes its step first, and that with them."""
    resource_tracker.ensure_running()  # started within, it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_us(pids: list[int]) -> subprocess.Popen:
    """Let processes end when this one does, however it ends: a run that is killed leaves no engine."""
    words = ["sh", "-c", 'cat; for pid; do kill -s KILL "$pid"; done', "sh", *map(str, pids)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


def write_backbone(model: DeScore, folder: Path) -> None:
    """Make the folder that an engine loads: links to the backbone's files, and the two that say how
    frames become patches. Where an earlier stage trained more than LoRA, such as mergers, the weights
    are written anew with what it left."""
    folder.mkdir()
    anew = any(not name.startswith(OWN) for name in model.changed)
    if anew:
        weights = {}
        for name, tensor in model.qwen.state_dict().items():
            if ".lora_" not in name:
                weights[name.replace(".base_layer.", ".")] = tensor
        model.qwen.save_pretrained(folder, state_dict=weights)
    for path in local_folder(model.source).iterdir():
        is_weights = path.name.startswith("model")
        link = folder / path.name
        if path.is_file() and not link.exists() and not (anew and is_weights):
            link.symlink_to(path.resolve())
    if not (folder / "video_preprocessor_config.json").exists():
        write_preprocessors(folder, model.qwen.config.vision_config)


def write_preprocessors(folder: Path, vision) -> None:
    """Write the two files, beside a backbone, by which vLLM and transformers make patches of frames;
    vision: its vision_config."""
    common = {
        "patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"shortest_edge": 4096, "longest_edge": 25_165_824}}  # pixels of a whole video
    kinds = {"preprocessor_config": {"image_processor_type": "Qwen2VLImageProcessorFast"},
             "video_preprocessor_config": {"video_processor_type": "Qwen3VLVideoProcessor"}}
    for name, kind in kinds.items():
        text = json.dumps(kind | common, indent=1) + "\n"
        (folder / f"{name}.json").write_text(text)
