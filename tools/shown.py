"""How an endpoint is shown a video: as a clip, of which a Qwen3-VL reads what ours does, or as pictures.

A clip is vLLM's "video/jpeg": frames behind one another in one URL, here PNG files, which lose nothing, and
beside it the time of each. So the endpoint's prompt has the tokens and the time stamps of ours, at whatever
seconds the frames stand. Pictures, each behind its second, are for all others: other tokens.
"""

import base64
import io
from collections.abc import Iterable

import torch
from torch import Tensor

from data import DataError
from tools.completion import Refused
from tools.endpoint import Endpoint, Failed

try:
    from PIL import Image
except ImportError:  # only an endpoint needs it
    Image = None

FPS = 10  # frames are told by tenths of a second, which is what a prompt says of them


def png(frame: Tensor) -> str:
    """A frame (3, H, W) uint8 as a PNG file, which loses nothing, in base64."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def data_url(frame: Tensor) -> str:
    return "data:image/png;base64," + png(frame)


def pictures(frames: Tensor, seconds: list[float]) -> list[dict]:
    """Frames (T, 3, H, W) uint8 as parts of a message, each behind its second."""
    parts = []
    for frame, second in zip(frames, seconds):
        parts.append({"type": "text", "text": f"<{second:.1f} seconds>"})
        parts.append({"type": "image_url", "image_url": {"url": data_url(frame)}})
    return parts


def clip(frames: Tensor, seconds: list[float], together: int = 2) -> tuple[list[dict], dict]:
    """Frames (T, 3, H, W) uint8 as a part of a message, and what goes beside the messages. `together`
    frames become one temporal patch, and their mean time is what a prompt says (`Processor.video_parts`)."""
    stamps = []
    for first in range(0, len(seconds), together):
        stamps.append(f"{(seconds[first] + seconds[first + together - 1]) / 2:.1f}")
    url = "data:video/jpeg;base64," + ",".join(map(png, frames))
    beside = {"media_io_kwargs": {"video": {"num_frames": -1} | timing(stamps, together)},
              "mm_processor_kwargs": {"do_resize": False, "do_sample_frames": False}}
    return [{"type": "video_url", "video_url": {"url": url}}], beside


def timing(stamps: Iterable[str], together: int) -> dict:
    """What vLLM is told of frames that were chosen already: `together` of them at each of these seconds."""
    indices = []
    for stamp in stamps:
        indices += [round(float(stamp) * FPS)] * together
    total = max(indices[-1] + 1, len(indices))  # no fewer than there are
    return {"fps": float(FPS), "frames_indices": indices, "total_num_frames": total,
            "duration": total / FPS, "do_sample_frames": False}


def why_no_clips(endpoint: Endpoint) -> str | None:
    """Why an endpoint cannot be shown clips, or None: it is asked about two that differ in their times
    alone, and the later one's stamp has more digits. Raises DataError if it does not answer at all."""
    counts = []
    for second in (0.0, 1000.0):
        parts, beside = clip(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [second] * 2)
        try:
            answer = endpoint.ask(parts, beside | {"max_tokens": 1, "ignore_eos": True})
        except Failed as error:
            raise DataError(f"{endpoint.shown}: {endpoint.clean(str(error))}") from error
        except Refused as error:
            return endpoint.clean(str(error))
        if "prompt_tokens" not in answer:
            return "it does not say how many tokens its prompt has"
        counts.append(answer["prompt_tokens"])
    return None if counts[1] > counts[0] else "the times of a clip's frames are not in its prompt"
