"""What tools/engine.py needs of vLLM, done plainly: no engine, but transformers' own forward of the folder
that it is given, with the adapter that it is asked for. What it "writes" stands in `COTS`; NOTES says how it
was asked."""

import sys
from types import ModuleType, SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from data import VideoSettings, patchify

COTS = ["<think>red</think>", "<think>a circle moves left, so 2", ""]
NOTES = {"started": [], "adapters": [], "sampling": []}
EXTRA: list[str] = []  # what the prompt gets behind each video, as a template might add it
SHORT: list[int] = []  # a length at which it stops


class LLM:
    def __init__(self, model, **options):
        NOTES["started"].append(options)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        dtype = getattr(torch, options["dtype"])
        self.plain = Qwen3VLForConditionalGeneration.from_pretrained(model, dtype=dtype)
        self.cache = {}  # by the name of an adapter, as an engine's prefix cache is

    def expanded(self, ids, frames, about):
        """The prompt with a video's marks and tokens: as vLLM's Qwen3-VL does it, from times in frames."""
        token = self.tokenizer.convert_tokens_to_ids
        vision = self.plain.config.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        t = vision.temporal_patch_size
        place = ids.index(token("<|video_pad|>"))
        video = []
        for first in range(0, len(frames), t):
            times = [index / about["fps"] for index in about["frames_indices"][first : first + t]]
            stamp = f"<{sum(times) / len(times):.1f} seconds>"
            video += self.tokenizer.encode(stamp, add_special_tokens=False)
            pads = (frames.shape[1] // side) * (frames.shape[2] // side)
            video += [token("<|vision_start|>"), *[token("<|video_pad|>")] * pads, token("<|vision_end|>")]
        for text in EXTRA:
            video += self.tokenizer.encode(text, add_special_tokens=False)
        return ids[:place] + video + ids[place + 1 :]

    @torch.no_grad()
    def generate(self, asked, sampling, use_tqdm, lora_request):
        assert len(asked) == len(sampling) and not use_tqdm
        NOTES["sampling"] += [vars(one) for one in sampling]
        model = self.plain
        if lora_request:
            name, number, path = lora_request.arguments
            NOTES["adapters"].append([name, number])
            if name not in self.cache:
                wanted = Qwen3VLForConditionalGeneration.from_pretrained(self.plain.name_or_path,
                                                                         dtype=self.plain.dtype)
                self.cache[name] = PeftModel.from_pretrained(wanted, path)
            model = self.cache[name]
        return [self.answer(model.eval(), question, one) for question, one in zip(asked, sampling)]

    def answer(self, model, question, one):
        ((frames, about),) = question["multi_modal_data"]["video"]
        ids = self.expanded(question["prompt_token_ids"], frames, about)
        text = COTS[one.seed % len(COTS)]
        tokens = self.tokenizer.encode(text, add_special_tokens=False) + one.stop_token_ids
        tokens = tokens[: min([one.max_tokens, *SHORT])]
        vision = self.plain.config.vision_config
        settings = VideoSettings(patch_size=vision.patch_size)
        pictures = torch.from_numpy(frames).permute(0, 3, 1, 2)
        patches, grid = patchify(pictures, settings)
        row = torch.tensor([ids + tokens])
        is_video = (row == self.plain.config.video_token_id).int()
        is_video[:, len(ids) :] = 0
        out = model(input_ids=row, mm_token_type_ids=2 * is_video, video_grid_thw=torch.tensor([grid]),
                    pixel_values_videos=(patches.float() / 127.5 - 1).to(self.plain.dtype))
        logits = out.logits[0, len(ids) - 1 : -1].float() / (one.temperature or 1.0)
        logps = logits.log_softmax(-1)
        steps = [{token: SimpleNamespace(logprob=of_step[token].item())}
                 for token, of_step in zip(tokens, logps)]
        written = SimpleNamespace(token_ids=tokens, logprobs=steps)
        return SimpleNamespace(prompt_token_ids=ids, outputs=[written])


def install(set_module=sys.modules.__setitem__):
    """Let `import vllm` find this."""
    vllm = ModuleType("vllm")
    vllm.LLM = LLM
    vllm.SamplingParams = lambda **given: SimpleNamespace(**given)
    lora = ModuleType("vllm.lora")
    request = ModuleType("vllm.lora.request")
    request.LoRARequest = lambda *given: SimpleNamespace(arguments=given)
    for module in (vllm, lora, request):
        set_module(module.__name__, module)
