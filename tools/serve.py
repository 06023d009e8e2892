"""Keep a model behind HTTP, in an environment of its own, for trainers of video generators.

    python -m tools.serve --model runs/rl --port 8000

    GET  /health, /rewards
    POST /compute   {"prompt": [TEXT, …], "video": [[PNG in base64, …], …], "fps": 16}
                    → {"rewards": [number, …], "errors": […], "records": […]}
                    or with the frames alone that /health's "sampling" looks at, which comes back:
                    {…, "seconds": [[0.0, …], …], "sampling": {…}}
    POST /score     {"requests": [{"history": [{"text": TEXT, "video_b64": FILE in base64}],
                    "required_rewards": ["descore"]}, …]}
                    → {"results": [{"descore": {"reward": number, …}}, …], "errors": […]}

The first is Flow-Factory's protocol, the second UniRL's; tools/client.py speaks both. A history may
name a file below --videos instead, "video_path". What is asked at the same time is thought about
together, a video of each request in turn; what was asked before is known. A video that cannot be
scored has null, or no entry, and an error; the others are unharmed. Requests that are too many, or
too large together, get 503. What is refused is said on stderr, and counted in /health. On Ctrl-C or
SIGTERM what is under way is finished; on a second one it is not.
"""

import argparse
import asyncio
import base64
import math
import os
import socket
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data import DataError, VideoSettings, checked, error_context
from infer import Scorer, add_thinking, read_thinking
from support.command import (
    READER,
    Count,
    NotNegative,
    Number,
    Positive,
    Whole,
    add_think_at,
    not_empty,
    run_command,
)
from support.digests import of_json
from support.files import MODELS, default_model
from support.tables import as_json, further
from tools.client import LOOKS, as_reward, paired, unusable
from tools.journal import made_by
from tools.memory import LONGEST_ANSWER, Clip, longest_answer
from tools.rounds import Rounds
from tools.think_at import think_at

try:
    from fastapi import Depends, FastAPI, HTTPException, Request, Response
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ValidationError
    from starlette.exceptions import HTTPException as AnyHTTPException
    from starlette.requests import ClientDisconnect

    from tools.gate import Server, check_sender, own_hosts
    from tools.sent import Pngs, Stored, check_length, looked_at
except ImportError as error:
    raise SystemExit(f"error: tools.serve needs {error.name}: pip install -r "
                     "tools/requirements.txt") from error

NAME = "descore"  # of the reward that is served
BODY_SECONDS = 120  # in which the body of a request has to come
ROOM_SECONDS = 10  # of waiting for room; some ask again at once, and give up after three times
BODIES = 4  # so many of the largest size may be held at a time
MESSAGE = 500  # characters of what is said of a request, which may hold anything
VALUES = 100_000  # of a body; small ones take fifty times their bytes when they are parsed
# What tells one request of /score from others; sent back as it came.
IDENTITY = ("request_id", "sample_id", "group_id", "source_rank", "policy_version",
            "scorer_version", "idempotency_key")
IDENTITY_LENGTH = 2000  # characters of all of these


class Compute(BaseModel):
    """The body of /compute."""

    prompt: list[str]
    video: list[list[str]]  # frames, each a PNG file in base64
    fps: Any = None  # one for all videos, or a list
    seconds: list[list[float]] | None = None  # of frames that were chosen
    sampling: Any = None  # by this
    kwargs: dict | None = None  # where Flow-Factory puts what else there is


class Turn(BaseModel):
    """A video and its prompt."""

    text: str
    video_b64: str | None = None  # a file
    video_path: str | None = None


class Wanted(BaseModel, extra="allow"):
    """A video to be scored: that of the last turn."""

    history: list[Turn]
    required_rewards: list[str]


class Score(BaseModel):
    """The body of /score."""

    requests: list[Wanted]
    protocol_version: str = "1"
    grad_mode: bool = False


class Asked(NamedTuple):
    """What a request asks for."""

    videos: list[Clip | DataError]
    prompts: list[str]
    reply: Callable[[list[dict]], dict]  # of a record for each video
    size: int  # bytes that are held for it


class Service:
    """What is behind the addresses: a model that is asked by `score`, as `infer.Scorer` is, and looks
    at videos by `settings`; None where it looks at them in more ways than one."""

    def __init__(self, score, args: argparse.Namespace, settings: VideoSettings | None,
                 folder: Path, makes: str | None = None):
        """makes: a digest of what makes the records, by which equal servers are known."""
        self.args, self.settings, self.folder = args, settings, folder
        self.makes = makes
        self.rounds = Rounds(score, args.round, args.kept, args.window)
        self.sampling = settings and {name: getattr(settings, name) for name in LOOKS}
        # Requests whose bodies come, and those that wait or are thought about; bytes held for them.
        self.coming = self.held = self.bytes = 0
        self.counts = Counter(dict.fromkeys(("asked", "scored", "cut_off", "no_format", "errors"), 0))
        self.refusals = Counter()
        self.said = Counter()  # when a refusal of a kind was last printed
        self.pool = ThreadPoolExecutor()

    def health(self) -> dict:
        args = self.args
        bounds = {"bytes": args.max_body, "videos": args.max_videos, "frames": args.max_frames,
                  "pixels": args.max_pixels, "pixels_together": args.max_work}
        return {"under_way": self.held, "coming": self.coming, "sampling": self.sampling,
                "bounds": bounds, "videos": self.counts, "refused": self.refusals}

    async def answer(self, request: Request, read: Callable[[bytearray], Asked]) -> Response:
        """What is found about the videos that `read` finds in a request's body."""
        body = bytearray()
        size = 0
        try:
            self.coming += 1
            try:
                await self.receive(request, body)
            finally:
                self.coming -= 1
            if self.held >= self.args.queue:
                raise busy(f"{self.held} requests are under way")
            self.held += 1
            request.state.waits = True
            try:
                loop = asyncio.get_running_loop()
                asked = await loop.run_in_executor(self.pool, self.read, read, body)
                size = asked.size
                self.bytes += size - len(body)
                body.clear()
                records = await self.judged(request, asked)
            finally:
                self.held -= 1
                request.state.waits = False
        finally:
            self.bytes -= len(body) + size
        told = {"DeScore-Made-By": self.makes} if self.makes else None
        return Response(as_json(asked.reply(records)), headers=told, media_type="application/json")

    async def receive(self, request: Request, body: bytearray) -> None:
        """Fill in the body of a request, within bounds."""
        most = self.args.max_body
        taken = 0
        is_kept = True
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, "the content type is not application/json")
        length = request.headers.get("content-length", "0")
        too_long = self.too_much(f"a body of more than {most:,} bytes")
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
                    is_kept = is_kept and taken <= most and len(chunk) <= room
                    if is_kept:
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
        if not is_kept:
            refusal = busy(f"requests of {self.bytes:,} bytes are under way")
            with suppress(TimeoutError):
                async with asyncio.timeout(ROOM_SECONDS):
                    while taken > BODIES * most - self.bytes:
                        await asyncio.sleep(0.1)
            raise refusal

    def too_much(self, what: str) -> HTTPException:
        args = self.args
        return HTTPException(413, f"{what}; a request has at most {args.max_body:,} bytes, "
                             f"{args.max_videos:,} videos of {args.max_frames:,} frames of "
                             f"{args.max_pixels:,} pixels, {args.max_work:,} pixels together")

    def read(self, read: Callable[[bytearray], Asked], body: bytearray) -> Asked:
        """What a body asks for. Whatever is wrong with it is said in one line."""
        try:
            if sum(map(body.count, (b",", b"[", b"{"))) > VALUES:
                raise self.too_much(f"a body of more than {VALUES:,} values")
            asked = read(body)
            for place, prompt in enumerate(asked.prompts):
                try:
                    checked(prompt, "the prompt")
                except DataError as error:
                    asked.videos[place] = error
                    asked.prompts[place] = ""  # however long, it is held no longer
            return asked
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
            raise HTTPException(500, "the server failed; its output says why") from None

    def check_work(self, videos: list[Clip | DataError]) -> None:
        pixels = sum(video.pixels() for video in videos if isinstance(video, Clip))
        if pixels > self.args.max_work:
            raise self.too_much(f"{pixels:,} pixels")

    def check_count(self, videos: list) -> None:
        if len(videos) > self.args.max_videos:
            raise self.too_much(f"{len(videos):,} videos")

    async def judged(self, request: Request, asked: Asked) -> list[dict]:
        """A record for each video, or for the DataError that stands in its place. HTTPException as
        soon as whoever asked has hung up."""
        records = [unusable(str(video)) for video in asked.videos]
        places = [i for i, video in enumerate(asked.videos) if isinstance(video, Clip)]
        jobs = self.rounds.ask([(asked.videos[i], asked.prompts[i]) for i in places])
        done = asyncio.ensure_future(results(jobs))
        gone = asyncio.ensure_future(hung_up(request))
        try:
            await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise HTTPException(499, "whoever asked has hung up")
        finally:
            done.cancel()
            gone.cancel()
            self.rounds.leave(jobs)
        for i, record in zip(places, done.result()):
            records[i] = record
        for record in records:
            self.counts["asked"] += 1
            self.counts["scored"] += record["error"] is None
            self.counts["cut_off"] += record["truncated"] is True
            self.counts["no_format"] += record["format_ok"] is False
            self.counts["errors"] += record["error"] is not None
        return records

    def refuse(self, status: int, why: str) -> None:
        """Count a refusal, and say it; of one kind once a second, for some ask very often."""
        self.refusals[status] += 1
        if time.monotonic() - self.said[status] >= 1:
            self.said[status] = time.monotonic()
            print(f"refused: {status}, {self.refusals[status]} so far: {why}", file=sys.stderr,
                  flush=True)

    def compute(self, body: bytearray) -> Asked:
        """POST /compute: frames."""
        asked = Compute.model_validate_json(body)
        self.check_count(asked.video)
        settings = self.settings
        seconds = asked.seconds or [None] * len(asked.video)
        if asked.sampling is not None and asked.sampling != self.sampling:
            raise DataError(f"frames were chosen by {str(asked.sampling)[:200]}, not {self.sampling}")
        if asked.seconds is not None and (asked.sampling is None or len(seconds) != len(asked.video)):
            raise DataError("seconds of each video need the sampling that chose the frames")
        rates = (asked.fps, (asked.kwargs or {}).get("fps"), self.args.fps)
        fps = next((rate for rate in rates if rate is not None), None)
        try:
            _, rates = paired(asked.video, asked.prompt, fps)
        except (ValueError, TypeError) as error:
            raise DataError(str(error)) from error
        videos = []
        for texts, rate, shown in zip(asked.video, rates, seconds):
            try:
                check_length(len(texts), self.args)
                if settings and shown is None:
                    texts, shown = looked_at(texts, rate, settings)
                video = Pngs(texts, rate, self.args.max_pixels, shown)
                if settings:
                    video.check_seconds(settings)
                videos.append(video)
            except DataError as error:
                videos.append(error)
        self.check_work(videos)
        size = sum(sum(map(len, video.texts)) for video in videos if isinstance(video, Pngs))

        def reply(records: list[dict]) -> dict:
            rewards = [as_reward(r) if r["error"] is None else self.args.unusable for r in records]
            return {"rewards": rewards, "errors": [r["error"] for r in records], "records": records}

        return Asked(videos, asked.prompt, reply, size)

    def score_files(self, body: bytearray) -> Asked:
        """POST /score: files."""
        asked = Score.model_validate_json(body)
        check_score(asked)
        self.check_count(asked.requests)
        turns = [request.history[-1] for request in asked.requests]
        videos = []
        size = 0
        for turn in turns:
            try:
                videos.append(self.find(turn))
                size += len(turn.video_b64 or "") * 3 // 4
            except DataError as error:
                videos.append(error)
        self.check_work(videos)
        ids = [{key: getattr(request, key, None) for key in IDENTITY} for request in asked.requests]
        if any(len(as_json(one)) > IDENTITY_LENGTH for one in ids):
            raise DataError(f"what tells a request from others has more than {IDENTITY_LENGTH:,} characters")

        def reply(records: list[dict]) -> dict:
            results = [{NAME: metrics(r)} if r["error"] is None else {} for r in records]
            errors = [{} if r["error"] is None else {NAME: r["error"]} for r in records]
            return {"results": results, "errors": errors, "identities": ids, "records": records,
                    "protocol_version": "1"}

        return Asked(videos, [turn.text for turn in turns], reply, size)

    def find(self, turn: Turn) -> Stored:
        """The file of a turn, written into a folder if it was sent. Raises DataError if there is none
        to be had."""
        if turn.video_b64 is not None and turn.video_path is not None:
            raise DataError("video_b64 and video_path are both given")
        if turn.video_b64 is not None:
            with error_context("video_b64 is not base64", ValueError):
                content = base64.b64decode(turn.video_b64, validate=True)
            number, path = tempfile.mkstemp(dir=self.folder)
            with open(number, "wb") as file:
                file.write(content)
            try:
                video = Stored(Path(path), "video_b64", self.folder, self.args)
            except DataError:
                os.unlink(path)
                raise
            weakref.finalize(video, os.unlink, path)
            return video
        if turn.video_path is None:
            raise DataError("neither video_b64 nor video_path is given")
        root = self.args.videos
        name = turn.video_path[:MESSAGE]
        if root is None:
            raise DataError("files are not served by their path: start with --videos DIR")
        try:
            path = (root / turn.video_path).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL
            raise DataError(f"{name}: not a path that leads to a file") from error
        if not path.is_relative_to(root):
            raise DataError(f"{name}: not below the folder that is served")
        return Stored(path, name, root, self.args)


async def results(jobs: list[Future]) -> list[dict]:
    """The record of each. Cancelled, it leaves the jobs as they are, to whoever else waits."""
    return [await asyncio.wrap_future(job) for job in jobs]


async def hung_up(request: Request) -> None:
    """Wait until whoever asked is there no more; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    own = {"reward": as_reward(record), "score": record["score"]}
    # A dimension may have any name, and is not to stand for the reward.
    numbers = own | (record["sub_scores"] or {}) | further(record) | own
    return {name: float(value) for name, value in numbers.items() if value != "N/A"}


def make_app(service: Service, name: str, hosts: set[str]) -> FastAPI:
    """The addresses, for those who call it one of `hosts`, or anything where there are none."""

    async def admitted(request: Request) -> None:
        check_sender(request, hosts)

    app = FastAPI(title="DeScore", openapi_url=None, dependencies=[Depends(admitted)])

    app.state.refuse = service.refuse

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> Response:
        detail = error.detail[:MESSAGE]
        service.refuse(error.status_code, detail)
        return JSONResponse({"detail": detail}, error.status_code, error.headers)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "model": name, "rewards": {NAME: ["reward", "score"]},
                **service.health()}

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
    add("--model", type=not_empty, help=f"a saved model or a run's folder [{MODELS}]")
    add("--device", help="such as cuda:1 [cuda if there is one, else cpu]")
    add("--host", default="127.0.0.1", help="0.0.0.0: whoever reaches this machine may ask")
    add("--port", type=Whole, default=8000, help="0: one that is free")
    add("--fps", type=Positive, help="frames a second of frames that come without")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a name by which it may be "
        "asked; may be repeated [the loopback's own on a loopback address, else any]")
    add("--videos", type=Path, help="a folder below which files may be named by their path")
    add("--reader", **READER)
    add("--cot", choices=("on", "off"), default="on", help="off: score without thinking")
    add_thinking(parser, repetition_penalty=None, max_new_tokens={
        "default": None, "help": "longest CoT [what the model was trained to write, at most "
        f"{LONGEST_ANSWER:,}]"})
    add_think_at(parser)
    add("--accept-any", action="store_true", help="score behind CoTs that were cut off or have no "
        "readable answer too")
    add("--unusable", type=Number, help="reward of /compute for a video that cannot be scored [null]")
    add("--window", type=NotNegative, default=0.02, help="seconds to wait for others who ask")
    add("--queue", type=Count, default=256, help="requests under way at a time; others get 503")
    add("--round", type=Count, default=16, help="videos that are thought about at a time")
    add("--kept", type=Whole, default=1000, help="answers that are known when they are asked again")
    add("--max-body", type=Count, default=1 << 30, help="bytes of a request; four times as many "
        "of all under way, beyond which others get 503")
    add("--max-videos", type=Count, default=256, help="of a request")
    add("--max-frames", type=Count, default=2048, help="of a video")
    add("--max-pixels", type=Count, default=3840 * 2160, help="of a frame")
    add("--max-work", type=Count, default=1 << 34, help="pixels of all frames of a request")
    args = parser.parse_args()
    if args.port > 65535:
        raise DataError(f"--port {args.port} is above 65535")
    if args.videos and not args.videos.is_dir():
        raise DataError(f"{args.videos}: no such folder")
    args.videos = args.videos and args.videos.resolve()
    return args


def main() -> None:
    args = parse_args()
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listening = socket.create_server((args.host, args.port), family=family)
    model = args.model or default_model()
    scorer = Scorer(model, args.device, window=0.0, reader=args.reader)
    if args.max_new_tokens is None:
        args.max_new_tokens = longest_answer(scorer.model)
    if args.think_at or args.think_at_model:
        think_at(scorer.model, args, few=math.inf)  # it goes on
    score = partial(scorer, think=args.cot == "on", thinking=read_thinking(args),
                    accept_any=args.accept_any)
    settings = scorer.model.processor.settings
    scoring = scorer.model.scoring_settings
    alike = all(getattr(settings, name) == getattr(scoring, name) for name in LOOKS)
    folder = Path(tempfile.mkdtemp(prefix="descore-"))
    makes = of_json([made_by(scorer.model, args), args.accept_any])
    service = Service(score, args, settings if alike else None, folder, makes)
    address, port, *_ = listening.getsockname()
    app = make_app(service, model, own_hosts(address, args.allow_host))
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{model}: http://{host}:{port}", flush=True)
    server = Server(app, folder)
    server.run(sockets=[listening])
    server.leave(0)


if __name__ == "__main__":
    run_command(main)
