"""Ask a served DeScore (`python -m tools.serve`) for the rewards of videos.

    score = Client("http://127.0.0.1:8000")
    records = score(frames, prompts, fps=16)    # as infer.Scorer answers: a dict a video

Of frames those alone are sent that the model looks at, which the server's /health says.

This file needs Python 3.8 or later and numpy alone, so that it can be copied into a trainer.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import math
import os
import random
import socket
import ssl
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from numbers import Real
from urllib.parse import urlsplit

import numpy as np

# ------------------------------
# What callers hold: paths, frames in arrays or tensors, pictures of PIL

# Where the axes of frames stand in one video; in a batch B stands before them.
LAYOUTS = {"TCHW": (0, 2, 3, 1), "CTHW": (1, 2, 3, 0), "THWC": (0, 1, 2, 3)}
# What PIL turns into red, green and blue without loss or guess.
MODES = ("RGB", "RGBA", "L", "LA", "P", "1")


def split(videos, layout: str | None = None) -> list:
    """The videos one by one: paths as they are, and the frames of others as a sequence of (H, W, 3)
    arrays, uint8, or float of values that should be in [0, 1] (`problem`).

    videos: a path; an array or tensor, one video of four axes or a batch of five; a list of PIL
    images, one video; or a list of any of these. The axis of size 3 is the colour's; where it
    could be another too, `layout` must say: TCHW, CTHW or THWC. Raises ValueError or TypeError for
    anything else."""
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, none of {', '.join(LAYOUTS)}")
    if isinstance(videos, (list, tuple)):
        if any(is_picture(part) for part in videos):
            return [[from_picture(part) for part in videos]]
        found = []
        for part in videos:
            # An empty list among others is a video without frames.
            empty = isinstance(part, (list, tuple)) and not part
            found += [[]] if empty else split(part, layout)
        return found
    if isinstance(videos, (str, os.PathLike)) or is_opened(videos):
        return [videos]
    array = as_array(videos)
    if array.ndim not in (4, 5):
        raise ValueError(f"frames of shape {array.shape}: not four axes, or five of a batch")
    axes = LAYOUTS[layout or layout_of(array)]
    if array.ndim == 4:
        array = array[None]
    if array.shape[1 + axes[-1]] != 3:
        raise ValueError(f"frames of shape {array.shape[-4:]}: in {layout} the colour's axis is not 3")
    return list(array.transpose(0, *[1 + axis for axis in axes]))


def is_opened(video) -> bool:
    """Whether this is a video already, with frames by their number."""
    return all(hasattr(video, name) for name in ("total", "fps", "frames"))


def is_picture(value) -> bool:
    """Whether this is an image of PIL."""
    return hasattr(value, "convert") and hasattr(value, "mode")


def from_picture(image) -> np.ndarray:
    """An image of PIL as (H, W, 3) uint8. Raises ValueError if it is not of 8 bits a colour."""
    if not is_picture(image) or image.mode not in MODES:
        what = getattr(image, "mode", type(image).__name__)
        raise ValueError(f"a frame is of {what}, not an image in RGB")
    return np.asarray(image.convert("RGB"))


def as_array(values) -> np.ndarray:
    """A tensor or an array as an array of uint8 or floats; TypeError or ValueError for others."""
    if hasattr(values, "detach"):  # of torch, which need not be here
        # numpy has no bfloat16.
        small = values.is_floating_point() and values.element_size() < 4
        values = (values.detach().float() if small else values.detach()).cpu().numpy()
    if not isinstance(values, np.ndarray):
        raise TypeError(f"a {type(values).__name__} is no path, array, tensor or list of images")
    if values.dtype != np.uint8 and values.dtype.kind != "f":
        raise ValueError(f"frames of {values.dtype}: not uint8, nor float from 0 to 1")
    return values


def layout_of(array: np.ndarray) -> str:
    """The only layout in which the colour's axis has size 3. Raises ValueError if there is none, or
    more than one."""
    shape = array.shape[-4:]
    fits = [name for name, axes in LAYOUTS.items() if shape[axes[-1]] == 3]
    if len(fits) != 1:
        found = f"it may be {' or '.join(fits)}: say layout=…" if fits else "no axis of size 3 for colour"
        raise ValueError(f"frames of shape {shape}: {found}")
    return fits[0]


def problem(frames) -> str | None:
    """What is wrong with frames that `split` has found, if anything."""
    if not len(frames):
        return "it has no frames"
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        return f"its frames are of {len(sizes)} sizes"
    if not math.prod(*sizes):
        return f"its frames are of shape {sizes.pop()}"
    if frames[0].dtype != np.uint8:
        low = np.min([frame.min() for frame in frames])
        high = np.max([frame.max() for frame in frames])
        if not (low >= 0 and high <= 1):  # which NaN is not
            return f"its values go from {low:g} to {high:g}, not from 0 to 1"
    return None


def grey_levels(frame: np.ndarray) -> np.ndarray:
    """A frame in grey levels, (H, W, 3) uint8; a float in [0, 1] is rounded to the nearest."""
    if frame.dtype != np.uint8:
        frame = np.rint(frame.astype(np.promote_types(frame.dtype, np.float32)) * 255)
    return np.array(frame, np.uint8, order="C")


def paired(videos: list, prompts, fps) -> tuple[list[str], list[float | None]]:
    """A prompt and the frames a second of each video: one given for all, or one each; None of paths,
    whose files say it. Raises ValueError or TypeError where they do not go together."""
    prompts = [prompts] * len(videos) if isinstance(prompts, str) else list(prompts)
    rates = [*fps] if isinstance(fps, (list, tuple)) else [fps] * len(videos)
    for given, name in ((prompts, "prompts"), (rates, "fps")):
        if len(given) != len(videos):
            raise ValueError(f"{len(videos)} videos, but {len(given)} {name}")
    for video, prompt, rate in zip(videos, prompts, rates):
        if not isinstance(prompt, str):
            raise TypeError(f"a prompt is a {type(prompt).__name__}, not a text")
        in_memory = not isinstance(video, (str, os.PathLike)) and not is_opened(video)
        if rate is None and in_memory:
            raise ValueError("frames have no rate of their own, and the model reads the second of "
                             "each: say how many there are a second, fps=…")
        is_rate = isinstance(rate, Real) and not isinstance(rate, bool) and 0.01 <= rate <= 1000
        if rate is not None and not is_rate:
            raise ValueError(f"fps is {rate!r}, not a number from 0.01 to 1000")
    return prompts, [None if rate is None else float(rate) for rate in rates]


# ------------------------------
# The server


LOOKS = ("fps", "min_frames", "max_frames")  # what decides which frames a model looks at
CONNECT_SECONDS = 10.0
LARGEST = 1 << 26  # bytes of an answer
# A server cannot be reached, went away, or speaks no HTTP.
BROKEN = (OSError, http.client.HTTPException, ValueError)


class Busy(Exception):
    """A server has no room now, but may have in so many seconds."""

    def __init__(self, reason: str, seconds: float):
        super().__init__(reason)
        self.seconds = seconds


class Client:
    """A served model, called as `infer.Scorer` is, from any thread.

    url: where it is served, or several such addresses, which share the videos and stand in for each
    other; timeout: seconds that a video's answer may take in all, from a busy server too; of
    several servers each has its share of what is left. These have to be equal: RuntimeError where one has
    other weights, or another setting that decides records. parallel: videos of a call under way at a
    time, which the server thinks about together; attempts: how often it is asked where it cannot
    be reached, with a pause of about 0.25, 0.5, … 8 seconds between."""

    def __init__(self, url="http://127.0.0.1:8000", *, timeout: float = 600.0, parallel: int = 8,
                 attempts: int = 10):
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise ValueError("an empty list is no address")
        if not timeout > 0:
            raise ValueError(f"a time-out of {timeout} seconds")
        for one in urls:
            check_address(one)
        self.urls = [one.rstrip("/") for one in urls]
        self.url, self.timeout, self.attempts = self.urls[0], timeout, attempts
        self.parallel = parallel
        self.turns = itertools.count()  # who is asked first
        # A trainer's own stay as they are, and processes that were forked do not draw alike.
        self.dice = random.SystemRandom()
        self.sampling = ()  # unknown; None: the server takes all frames
        self.served: dict[str, str] = {}  # what makes the records of each server, as it says

    def __reduce__(self):
        """Copied, or sent to another process, it begins anew."""
        how = {"timeout": self.timeout, "parallel": self.parallel, "attempts": self.attempts}
        return partial(type(self), self.urls, **how), ()

    def __call__(self, videos, prompts, *, fps=None, layout: str | None = None) -> list[dict]:
        """A record a video, in their order: score, standardised, cot, sub_scores and error, of a
        video that cannot be scored why not, with the score NaN.

        videos, layout: see `split`; a path is a file here, and is sent. prompts, fps: one for all
        videos or a list. Raises ValueError or TypeError where these make no sense, RuntimeError, with
        its address, where a server does not answer."""
        videos = split(videos, layout)
        pool = ThreadPoolExecutor(self.parallel)  # one that is kept has no threads after a fork
        try:
            return list(pool.map(self.ask, videos, *paired(videos, prompts, fps)))
        finally:
            pool.shutdown(wait=False)

    def ask(self, video, prompt: str, fps: float | None) -> dict:
        """The record of one video."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which no server takes
            return unusable(f"the prompt is no Unicode text ({error})")
        if isinstance(video, (str, os.PathLike)):
            if not os.path.isfile(video):  # nor is a pipe, or a device, which may never end
                return unusable(f"{video}: no such file")
            try:
                with open(video, "rb") as file:
                    content = base64.b64encode(file.read()).decode()
            except OSError as error:
                return unusable(f"{video}: {error.strerror or error}")
            turn = {"text": prompt, "video_b64": content}
            asked = [{"history": [turn], "required_rewards": ["descore"]}]
            return self.fetch("/score", {"requests": asked}, the_record)
        reason = problem(video)
        if reason:
            return unusable(f"a clip of {len(video)} frames: not a video that can be read ({reason})")
        if self.sampling == ():
            self.sampling = self.fetch("/health", None, the_sampling)
        body = {"prompt": [prompt], "fps": fps}
        places = self.sampling and looked_at(len(video), fps, *self.sampling)
        if places:
            video = [video[place] for place in places]
            body["seconds"] = [[place / fps for place in places]]
            body["sampling"] = dict(zip(LOOKS, self.sampling))
        body["video"] = [[base64.b64encode(png(grey_levels(frame))).decode() for frame in video]]
        try:
            return self.fetch("/compute", body, the_record)
        except RuntimeError:
            self.sampling = ()  # another model may be served there by now
            raise

    def fetch(self, path: str, body: dict | None, read):
        """What `read` finds in the answer of the first server that gives one. Raises RuntimeError if
        none does, or one refuses."""
        data = None if body is None else json.dumps(body).encode()
        end = time.monotonic() + self.timeout
        first = next(self.turns)
        failures = 0
        for turn in itertools.count():
            url = self.urls[(first + turn) % len(self.urls)] + path
            if turn % len(self.urls) == 0:
                pause = min(2.0 ** min(turn // len(self.urls), 9) / 4, 8.0)
                is_busy = False
            left = end - time.monotonic()
            try:
                return self.exchange(url, data, left / (len(self.urls) - turn % len(self.urls)), read)
            except Busy as error:
                is_busy = True
                reason = str(error)
                pause = max(pause, error.seconds)
            except ssl.SSLCertVerificationError as error:
                raise RuntimeError(f"{url}: {error.verify_message}{trusted()}") from None
            except BROKEN as error:
                reason = str(error) or type(error).__name__
            if (turn + 1) % len(self.urls):
                continue  # another may have room
            failures += not is_busy
            left = max(end - time.monotonic(), 0.0)
            if failures < self.attempts:
                # Those who were sent away together are not to come back together.
                time.sleep(min(pause * self.dice.uniform(1.0, 1.5), left))
            if failures >= self.attempts or time.monotonic() >= end:
                raise RuntimeError(f"{url}: {reason}")

    def exchange(self, url: str, data: bytes | None, seconds: float, read):
        """What `read` finds in one server's answer, which has to be there whole in so many seconds."""
        end = time.monotonic() + seconds
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        # What is set for the internet's sake, such as HTTP_PROXY, is not for a neighbour.
        link = kind(parts.hostname, parts.port, timeout=min(max(seconds, 0.001), CONNECT_SECONDS))
        link.connect()
        link.sock.settimeout(None)
        is_late = threading.Event()
        # However slowly an answer trickles in, at the end it is cut off.
        left = min(end - time.monotonic(), threading.TIMEOUT_MAX)
        guard = threading.Timer(left, cut_off, (link.sock, is_late))
        guard.daemon = True
        guard.start()
        try:
            headers = {"Content-Type": "application/json", "Connection": "close"}
            link.request("GET" if data is None else "POST", parts.path, data, headers)
            answer = link.getresponse()
            text = answer.read(LARGEST)
            if answer.length:
                raise http.client.IncompleteRead(text, answer.length)
        except BROKEN:
            if not is_late.is_set():
                raise
        finally:
            guard.cancel()
            link.close()
        if is_late.is_set():
            raise OSError(f"no answer within {round(seconds, 1):g} seconds")
        said = text[:1000].decode(errors="replace")
        if answer.status == 503:
            after = answer.getheader("Retry-After", "")
            raise Busy(f"HTTP 503: {said}", float(after) if after.isdecimal() else 0.0)
        if answer.status != 200:
            raise RuntimeError(f"{url}: HTTP {answer.status}: {said}")
        self.check_equal(url, answer.getheader("DeScore-Made-By"))
        try:
            return read(json.loads(text))
        except (ValueError, TypeError, LookupError, RecursionError):
            raise RuntimeError(f"{url}: not an answer of tools.serve: {said[:200]}") from None

    def check_equal(self, url: str, made_by: str | None) -> None:
        """RuntimeError if servers that stand in for each other are not equal: in their weights, or in what
        else decides their records."""
        if made_by is None:  # an earlier server
            return
        self.served[urlsplit(url).netloc] = made_by
        for other, known in list(self.served.items()):  # which other threads change
            if known != made_by:
                self.served.clear()  # that one may have been started anew, with this one's
                raise RuntimeError(f"{url}: has another model than {other}, or judges otherwise")

def check_address(url: str) -> None:
    """ValueError if this is no server's address. One with a name, password or key in it is not repeated:
    that would stand in every error."""
    if "@" in url or "?" in url:
        raise ValueError("an address with a name, a password or a ?, which tools.serve does not know: "
                         "say http://HOST:PORT")
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname.encode("idna") and parts.port != 0
    except (ValueError, AttributeError):  # no port, no name, no host at all
        fits = False
    if not fits:
        raise ValueError(f"{url!r} is no address such as http://127.0.0.1:8000")


def trusted() -> str:
    """What the environment says of the certificates that are trusted."""
    names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
    return f" (by the certificates of {' and '.join(names)})" if names else ""


def cut_off(connection: socket.socket, is_late: threading.Event) -> None:
    is_late.set()
    with suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)


def the_record(answer: dict) -> dict:
    """The one record of an answer. Raises an error of some kind if it is none."""
    (record,) = answer["records"]
    record = {**{name: record[name] for name in unusable(None)}, **record}
    is_scored = is_finite(record["score"])
    why_not = record["error"]
    if not (why_not is None if is_scored else isinstance(why_not, str)):
        raise ValueError("neither a score nor an error")
    if record["standardised"] is not None and not is_finite(record["standardised"]):
        raise ValueError("standardised is no number")
    return record if is_scored else {**record, "score": math.nan}


def is_finite(value) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def the_sampling(health: dict) -> list[float] | None:
    """What decides which frames the model looks at (`LOOKS`), as /health says it."""
    sampling = health["sampling"]
    if sampling is None:
        return None
    numbers = [sampling[name] for name in LOOKS]
    if not all(isinstance(number, Real) and 0 < number < 2**63 for number in numbers):
        raise ValueError("not above 0, or without bounds")
    return numbers


def looked_at(total: int, video_fps: float, fps: float, min_frames: int,
              max_frames: int) -> list[int] | None:
    """Which of `total` frames a model looks at, as data.open_video chooses them; None of so many that
    its rounding, in float32, decides."""
    if total < 2:
        return list(range(total))
    lowest = math.ceil(min_frames / 2) * 2
    wanted = max(total / video_fps * fps, lowest)
    count = math.floor(min(wanted, max_frames, total) / 2) * 2
    if total * count > 1 << 21:
        return None
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def as_reward(record: dict) -> float:
    """What a record says in one number: the standardised score, or where the model has no scale the
    score itself; NaN of a video that could not be scored."""
    return record["score"] if record["standardised"] is None else record["standardised"]


def unusable(reason: str | None) -> dict:
    """The record of a video that cannot be scored."""
    return {"score": math.nan, "standardised": None, "cot": None, "sub_scores": None,
            "truncated": None, "format_ok": None, "error": reason}


def png(picture: np.ndarray) -> bytes:
    """A PNG file of a picture (H, W, 3) uint8, which loses nothing."""
    height, width, _ = picture.shape
    rows = picture.reshape(height, -1)
    # A row begins with its filter's number; 2: what differs from the row above.
    filtered = np.full((height, 1 + 3 * width), 2, np.uint8)
    filtered[0, 1:] = rows[0]
    filtered[1:, 1:] = rows[1:] - rows[:-1]
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),  # 8 bits, RGB
             (b"IDAT", zlib.compress(filtered.tobytes(), 1)), (b"IEND", b""))
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in parts:
        file += struct.pack(">I", len(content)) + name + content
        file += struct.pack(">I", zlib.crc32(name + content))
    return file
