"""Make the golden files: what qwen-vl-utils 0.0.14, the Qwen3VLProcessor of transformers 4.57 and its
get_rope_index make of a set of clips. Run in an environment of its own, with torchvision's Python half beside
a CPU-only torch:

    pip install torch==2.13.0 "transformers==4.57.*" decord av requests pillow
    pip install --no-deps torchvision==0.28.0 qwen-vl-utils==0.0.14
    python tests/golden/make.py [REAL_CLIP.mp4 ...]

Writes the synthetic clips (*.mp4) and golden.npz beside itself. For each clip it holds the grid, the token
ids under the tokenizer beside this file, the 3-D positions, and a fixed sample of the pixel values.
"""

import hashlib
import json
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROMPT = "A red circle moves left, the camera zooms in."
BEFORE, AFTER = "", " Judge the video above. Prompt: "
MAX_PIXELS = 448 * 448
# name: frames, height, width, frames a second
CLIPS = {"portrait": (12, 320, 192, 8), "odd": (9, 157, 211, 10), "two": (2, 160, 160, 8),
         "three": (3, 160, 160, 8),
         "four": (4, 160, 160, 8), "five": (5, 160, 160, 8), "fast": (90, 128, 128, 60),
         "wide": (8, 64, 768, 8), "ntsc": (40, 128, 192, Fraction(24000, 1001))}


def sample_of(pixels: torch.Tensor) -> np.ndarray:
    """The same 4,000 elements of the pixel values of any size, spread over all of them."""
    index = torch.linspace(0, pixels.numel() - 1, 4000, dtype=torch.double).round().long()
    return pixels.flatten()[index].numpy()


def write_clip(path: Path, frames: int, height: int, width: int, fps) -> None:
    """A moving pattern with fine detail, as H.264."""
    import av
    y, x = np.mgrid[0:height, 0:width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        # yuv444p: yuv420p has no odd sizes
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p"
        stream.options = {"crf": "26", "preset": "slow", "threads": "1"}
        for t in range(frames):
            image = np.stack([128 + 100 * np.sin(x / 7 + t / 3), 128 + 90 * np.cos(y / 5 - t / 4),
                              128 + 80 * np.sin((x + y) / 11 + t)], -1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8))))
        container.mux(stream.encode())


def import_reference():
    """torchvision's compiled ops are absent beside a CPU-only torch; their registrations are skipped."""
    register = torch.library.register_fake
    torch.library.register_fake = lambda op, *a, **k: (
        (lambda f: f) if isinstance(op, str) and op.startswith("torchvision::") else register(op, *a, **k))
    import torchvision  # noqa: F401
    torch.library.register_fake = register
    from qwen_vl_utils import process_vision_info
    from transformers import Qwen2TokenizerFast
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    return (process_vision_info, Qwen2TokenizerFast, Qwen2VLImageProcessor, Qwen3VLModel, Qwen3VLProcessor,
            Qwen3VLVideoProcessor)


def reference(path: Path, max_pixels: int, tokenizer_file: Path) -> dict:
    """Grid, token ids, positions and pixel values of a clip with the fixed prompt, by the reference
    packages."""
    info, Tokenizer, ImageProcessor, Model, Processor, VideoProcessor = import_reference()
    tokenizer = Tokenizer(tokenizer_file=str(tokenizer_file), eos_token="<|im_end|>",
                          pad_token="<|endoftext|>")
    image = ImageProcessor(patch_size=16, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = Processor(image, tokenizer, VideoProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3))
    messages = [{"role": "user",
                 "content": [{"type": "video", "video": str(path), "max_pixels": max_pixels}]}]
    _, videos, kwargs = info(messages, return_video_kwargs=True, return_video_metadata=True,
                             image_patch_size=16)
    videos, metadata = zip(*videos)
    # What Qwen3-VL's chat template makes of one user turn with a video and a text.
    text = ("<|im_start|>user\n" + BEFORE + "<|vision_start|><|video_pad|><|vision_end|>" + AFTER + PROMPT
            + "<|im_end|>\n<|im_start|>assistant\n")
    inputs = processor(text=[text], videos=list(videos), video_metadata=list(metadata), do_resize=False,
                       return_tensors="pt", **kwargs)
    token = tokenizer.convert_tokens_to_ids
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2),
                             image_token_id=token("<|image_pad|>"),
                             video_token_id=token("<|video_pad|>"),
                             vision_start_token_id=token("<|vision_start|>"))
    positions, _ = Model.get_rope_index(SimpleNamespace(config=config), inputs["input_ids"],
                                        video_grid_thw=inputs["video_grid_thw"],
                                        attention_mask=inputs["attention_mask"])
    return {"grid": inputs["video_grid_thw"][0], "input_ids": inputs["input_ids"][0],
            "position_ids": positions[:, 0], "pixels": inputs["pixel_values_videos"]}


def main() -> None:
    paths = [HERE / f"{name}.mp4" for name in CLIPS]
    for path, (name, shape) in zip(paths, CLIPS.items()):
        if not path.is_file():
            write_clip(path, *shape)
    golden, names = {}, {}
    for path in [*paths, *map(Path, sys.argv[1:])]:
        found = reference(path, MAX_PIXELS, HERE / "tokenizer.json")
        name = path.stem
        names[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        golden |= {f"{name}/grid": found["grid"].numpy(),
                   f"{name}/input_ids": found["input_ids"].short().numpy(),
                   f"{name}/position_ids": found["position_ids"].short().numpy(),
                   f"{name}/pixels": sample_of(found["pixels"]).astype(np.float32),
                   f"{name}/mean": np.array(found["pixels"].double().mean().item())}
        print(name, found["grid"].tolist(), len(found["input_ids"]))
    np.savez_compressed(HERE / "golden.npz", **golden)
    (HERE / "clips.json").write_text(json.dumps(names, indent=1) + "\n")


if __name__ == "__main__":
    main()
