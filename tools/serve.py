"""Keep a model behind HTTP, in an environment of its own, for trainers of video generators.

    python -m tools.serve --model runs/rl --port 8000

    GET  /health, /rewards
    POST /compute   {"prompt": [TEXT, …], "video": [[PNG in base64, …], …], "fps": 16}
                    → {"rewards": [number, …], "errors": […], "records": […]}
    POST /score     {"requests": [{"history": [{"text": TEXT, "video_b64": FILE in base64}],
                    "required_rewards": ["descore"]}, …]}
                    → {"results": [{"descore": {"reward": number, …}}, …], "errors": […]}

The first is Flow-Factory's protocol, the second UniRL's; tools/client.py speaks both. A history may
name a file below --videos instead, "video_path". What is asked at the same time is thought about
together. A video that cannot be scored has null, or no entry, and an error; the others are
unharmed. Requests that are too many, or too large together, get 503. On Ctrl-C or SIGTERM what is
under way is finished.
"""

import argparse
import asyncio
import base64
import hashlib
import io
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError, error_context, open_file
from infer import Scorer, add_thinking, read_thinking
from support.command import READER, Count, NotNegative, Number, Positive, Whole, run_command
from support.files import MODELS, default_model
from support.frames import ERRORS, opened
from support.tables import as_json, further
from tools.client import as_reward, from_picture, grey_levels, paired, unusable
from tools.memory import LONGEST_ANSWER, Clip, longest_answer

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from PIL import Image
    from pydantic import BaseModel, ValidationError
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise SystemExit(f"error: tools.serve needs {error.name}: pip install -r "
                     "tools/requirements.txt") from error

NAME = "descore"  # of the reward that is served
BODY_SECONDS = 120  # in which the body of a request has to come
BODIES = 4  # so many of the largest size may be held at a time
VALUES = 100_000  # of a body; small ones take fifty times their bytes when they are parsed
# What tells one request of /score from others; sent back as it came.
IDENTITY = ("request_id", "sample_id", "group_id", "source_rank", "policy_version",
            "scorer_version", "idempotency_key")


class Compute(BaseModel):
    """The body of /compute."""

    prompt: list[str]
    video: list[list[str]]  # frames, each a PNG file in base64
    fps: Any = None  # one for all videos, or a list
    kwargs: dict | None = None  # where Flow-Factory puts what else there is


class Turn(BaseModel):
    """A video and its prompt."""

    text: str
    video_b64: str | None = None  # a file
    video_path: str | None = None


class Asked(BaseModel, extra="allow"):
    """A video to be scored: that of the last turn."""

    history: list[Turn]
    required_rewards: list[str]


class Score(BaseModel):
    """The body of /score."""

    requests: list[Asked]
    protocol_version: str = "1"
    grad_mode: bool = False


class Pngs(Clip):
    """A clip of PNG files in base64; a frame is decoded when it is read."""

    def __init__(self, texts: list[str], fps: float, max_pixels: int):
        self.texts, self.max_pixels = texts, max_pixels
        super().__init__(len(texts), fps, (f"{len(text)} {text}".encode() for text in texts))

    def picture(self, index: int) -> np.ndarray:
        # Whatever a hostile file makes the decoder raise.
        with error_context(f"frame {index} is no PNG that can be read", Exception):
            file = io.BytesIO(base64.b64decode(self.texts[index], validate=True))
            with Image.open(file, formats=("PNG",)) as image:
                check_pixels(*image.size, self.max_pixels)
                return grey_levels(from_picture(image))


def check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise ValueError(f"{width} x {height} pixels a frame, more than {most:,}")


def check_file(path: Path, args: argparse.Namespace) -> None:
    """Raises DataError for a file that is no video, or a larger one than is served."""
    with error_context(f"{path}: not a video that can be read", OSError, *ERRORS):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        with opened(path) as (container, stream):
            check_pixels(stream.codec_context.width, stream.codec_context.height, args.max_pixels)
            # Some files tell their length only when they are decoded; a frame has two packets at most.
            packets = sum(packet.size > 0 for packet in container.demux(stream))
        if packets > 2 * args.max_frames:
            raise DataError(f"{packets:,} packets, more than {args.max_frames:,} frames have")
        check_length(open_file(path).total, args)


def check_length(frames: int, args: argparse.Namespace) -> None:
    if frames > args.max_frames:
        raise DataError(f"{frames:,} frames, more than {args.max_frames:,}")


class Service:
    """What is behind the addresses: a model that is asked by `score`, as `infer.Scorer` is."""

    def __init__(self, score, args: argparse.Namespace):
        self.score, self.args = score, args
        # Requests that are being read, wait or are thought about, and the bytes of their bodies.
        self.held = self.bytes = 0
        self.pool = ThreadPoolExecutor(args.queue)

    async def answer(self, request: Request, work) -> Response:
        """What `work` makes of a request's body."""
        if self.held >= self.args.queue:
            raise busy(f"{self.held} requests are under way")
        self.held += 1
        body = bytearray()
        try:
            await self.read(request, body)
            found = asyncio.get_running_loop().run_in_executor(self.pool, self.work, work, body)
            return Response(await found, media_type="application/json")
        finally:
            self.held -= 1
            self.bytes -= len(body)

    async def read(self, request: Request, body: bytearray) -> None:
        """Fill in the body of a request, within bounds."""
        most, taken, kept = self.args.max_body, 0, True
        length = request.headers.get("content-length", "0")
        too_long = HTTPException(413, f"a body of more than {most:,} bytes")
        # Most who send too much will read why only when they are through.
        if not length.isdecimal() or int(length) > 4 * most:
            raise too_long
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    taken += len(chunk)
                    if taken > 4 * most:
                        break
                    room = BODIES * most - self.bytes
                    kept = kept and taken <= most and len(chunk) <= room
                    if kept:
                        self.bytes += len(chunk)
                        body += chunk
                    else:  # what will not be used makes room for others
                        self.bytes -= len(body)
                        body.clear()
        except TimeoutError:
            raise HTTPException(408, f"no body within {BODY_SECONDS} seconds") from None
        except ClientDisconnect:
            raise HTTPException(400, "the body was cut off") from None
        if taken > most:
            raise too_long
        if not kept:
            raise busy(f"requests of {self.bytes:,} bytes are under way")

    def work(self, work, body: bytearray) -> str:
        """The answer as JSON. Whatever is wrong with a request is said in one line."""
        try:
            if sum(map(body.count, (b",", b"[", b"{"))) > VALUES:
                raise HTTPException(413, f"a body of more than {VALUES:,} values")
            return as_json(work(body))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the body"
            raise HTTPException(422, f"{place}: {first['msg']}") from None
        except DataError as error:
            raise HTTPException(422, str(error)) from None
        except HTTPException:
            raise
        except Exception as error:  # noqa: BLE001 (the server goes on, whatever it is)
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            raise HTTPException(500, "the model failed; the server's output says why") from None

    def records(self, videos: list, prompts: list[str]) -> list[dict]:
        """A record for each video, or for the DataError that stands in its place."""
        good = [i for i, video in enumerate(videos) if not isinstance(video, DataError)]
        found = iter(self.score([videos[i] for i in good], [prompts[i] for i in good]))
        return [unusable(str(video)) if isinstance(video, DataError) else next(found)
                for video in videos]

    def compute(self, body: bytearray) -> dict:
        """POST /compute: frames."""
        asked = Compute.model_validate_json(body)
        rates = (asked.fps, (asked.kwargs or {}).get("fps"), self.args.fps)
        fps, videos = next((rate for rate in rates if rate is not None), None), []
        try:
            _, rates = paired(asked.video, asked.prompt, fps)
        except (ValueError, TypeError) as error:
            raise DataError(str(error)) from error
        for texts, rate in zip(asked.video, rates):
            try:
                check_length(len(texts), self.args)
                videos.append(Pngs(texts, rate, self.args.max_pixels))
            except DataError as error:
                videos.append(error)
        records = self.records(videos, asked.prompt)
        rewards = [as_reward(r) if r["error"] is None else self.args.unusable for r in records]
        return {"rewards": rewards, "errors": [r["error"] for r in records], "records": records}

    def score_files(self, body: bytearray) -> dict:
        """POST /score: files."""
        asked = Score.model_validate_json(body)
        check_score(asked)
        turns = [request.history[-1] for request in asked.requests]
        with tempfile.TemporaryDirectory(prefix="descore-") as folder:
            paths, videos = [], []
            for turn in turns:
                paths.append(None)
                try:
                    paths[-1] = self.find(turn, Path(folder))
                    check_file(paths[-1], self.args)
                    videos.append(str(paths[-1]))
                except DataError as error:
                    videos.append(error)
            records = self.records(videos, [turn.text for turn in turns])
        for turn, path, record in zip(turns, paths, records):
            if path and record["error"]:
                # Where a file lies is nobody's affair, nor what is left of a path that was cut.
                name = "video_b64" if turn.video_path is None else turn.video_path
                said = record["error"].replace(str(path), name)
                record["error"] = said.replace(f"{folder}/", "").replace(f"{self.args.videos}/", "")
        results = [{NAME: metrics(r)} if r["error"] is None else {} for r in records]
        errors = [{} if r["error"] is None else {NAME: r["error"]} for r in records]
        ids = [{key: getattr(request, key, None) for key in IDENTITY} for request in asked.requests]
        return {"results": results, "errors": errors, "identities": ids, "records": records,
                "protocol_version": "1"}

    def find(self, turn: Turn, folder: Path) -> Path:
        """The file of a turn, written into the folder if it was sent. Raises DataError if there is
        none to be had."""
        if turn.video_b64 is not None and turn.video_path is not None:
            raise DataError("video_b64 and video_path are both given")
        if turn.video_b64 is not None:
            with error_context("video_b64 is not base64", ValueError):
                content = base64.b64decode(turn.video_b64, validate=True)
            path = folder / hashlib.sha256(content).hexdigest()
            path.write_bytes(content)
            return path
        if turn.video_path is None:
            raise DataError("neither video_b64 nor video_path is given")
        root = self.args.videos
        if root is None:
            raise DataError("files are not served by their path: start with --videos DIR")
        try:
            path = (root / turn.video_path).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL
            raise DataError(f"{turn.video_path}: not a path that leads to a file") from error
        if not path.is_relative_to(root):
            raise DataError(f"{turn.video_path}: not below the folder that is served")
        return path


def busy(why: str) -> HTTPException:
    return HTTPException(503, why, {"Retry-After": "1"})


def check_score(asked: Score) -> None:
    """Raises HTTPException for what UniRL's protocol knows and is not served here."""
    if asked.protocol_version != "1" or asked.grad_mode:
        raise HTTPException(400, "protocol_version is not 1, or there is a grad_mode: not served")
    for request in asked.requests:
        for name in request.required_rewards:
            if name != NAME:
                raise HTTPException(400, f"no reward {name!r} is served, but {NAME!r}")
        if getattr(request, "scorer_version", None) is not None:
            raise HTTPException(400, "no scorer_version is kept")
        if not request.history:
            raise HTTPException(422, "a history is empty")


def metrics(record: dict) -> dict[str, float]:
    """Numbers alone, the reward first; what a CoT does not judge is not there."""
    numbers = {"reward": as_reward(record), "score": record["score"], **(record["sub_scores"] or {})}
    numbers |= further(record)
    return {name: float(value) for name, value in numbers.items() if value != "N/A"}


def make_app(service: Service, name: str) -> FastAPI:
    """The addresses."""
    app = FastAPI(title="DeScore", openapi_url=None)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "model": name, "under_way": service.held,
                "rewards": {NAME: ["reward", "score"]}}

    @app.get("/rewards")
    async def rewards() -> dict:
        return {"rewards": [NAME]}

    @app.post("/compute")
    async def compute(request: Request) -> Response:
        return await service.answer(request, service.compute)

    @app.post("/score")
    async def score(request: Request) -> Response:
        return await service.answer(request, service.score_files)

    return app


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help=f"a saved model or a run's folder [{MODELS}]")
    add("--device", help="such as cuda:1 [cuda if there is one, else cpu]")
    add("--host", default="127.0.0.1", help="0.0.0.0: whoever reaches this machine may ask")
    add("--port", type=Whole, default=8000, help="0: one that is free")
    add("--fps", type=Positive, help="frames a second of frames that come without")
    add("--videos", type=Path, help="a folder below which files may be named by their path")
    add("--reader", **READER)
    add("--cot", choices=("on", "off"), default="on", help="off: score without thinking")
    add_thinking(parser, repetition_penalty=None, max_new_tokens={
        "default": None, "help": "longest CoT [what the model was trained to write, at most "
        f"{LONGEST_ANSWER:,}]"})
    add("--accept-any", action="store_true", help="score behind CoTs that were cut off or have no "
        "readable answer too")
    add("--unusable", type=Number, help="reward of /compute for a video that cannot be scored [null]")
    add("--window", type=NotNegative, default=0.02, help="seconds to wait for others who ask")
    add("--queue", type=Count, default=32, help="requests under way at a time; others get 503")
    add("--max-body", type=Count, default=1 << 28, help="bytes of a request; four times as many "
        "of all under way, beyond which others get 503")
    add("--max-frames", type=Count, default=2048, help="of a video")
    add("--max-pixels", type=Count, default=3840 * 2160, help="of a frame")
    args = parser.parse_args()
    if args.videos and not args.videos.is_dir():
        raise DataError(f"{args.videos}: no such folder")
    args.videos = args.videos and args.videos.resolve()
    return args


def main() -> None:
    args = parse_args()
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listening = socket.create_server((args.host, args.port), family=family)
    model = args.model or default_model()
    scorer = Scorer(model, args.device, window=args.window, reader=args.reader)
    if args.max_new_tokens is None:
        args.max_new_tokens = longest_answer(scorer.model)
    score = partial(scorer, think=args.cot == "on", thinking=read_thinking(args),
                    accept_any=args.accept_any)
    app = make_app(Service(score, args), model)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{model}: http://{host}:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    run_command(main)
