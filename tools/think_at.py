"""An endpoint thinks in place of `DeScore.think`; the scores stay the model's own.

    python infer.py --think-at http://HOST:8000/v1 --think-at-model NAME video.mp4 "a red circle moves left"

An OpenAI-compatible endpoint, such as a vLLM server with the model's backbone and adapter (docs/scale.md),
writes the CoTs. Each goes through one forward of the model here (`DeScore.score`). The endpoint is shown
clips, so that its prompt has our token ids; one that says its prompt ids is held to them, by a question
before all others too. An endpoint that takes no clips gets pictures, which is said. A video that has no
answer is an error, and has no score.
"""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import torch

from data import Batch, DataError, checked
from model import DeScore, Thoughts, check_sampling
from support.batches import draw_seed
from tools.annotate import Api
from tools.asking import FEW, ask_all
from tools.endpoint import key_in
from tools.engine import how_apart, side_by_side
from tools.memory import Frames

# Of questions under way at a time, seconds that each may take, and attempts after the first.
PARALLEL = 64
TIMEOUT = 600.0
RETRIES = 5


def think_at(model: DeScore, args: Namespace, few: float = FEW) -> None:
    """Let the endpoint that the flags of a command name think for a model from now on. few: see
    `Thinker`."""
    if not (args.think_at and args.think_at_model):
        raise DataError("--think-at URL and --think-at-model NAME go together")
    if args.cot == "off":
        raise DataError("--think-at: with --cot off nothing is thought")
    thinker = Thinker(model, args.think_at, args.think_at_model, key_in(args.api_key_env), few=few)
    args.api_clips = thinker.clips  # which decides what is thought (tools/journal.py)
    model.think = thinker.think


class Thinker(Api):
    """Asks an endpoint about the videos of a batch, which has to say its sources. Raises DataError where
    no question has an answer (tools/endpoint.py), as where the endpoint is gone: batches in a row, of
    which no video is answered however often it was asked, had a `few` videos together."""

    def __init__(self, model: DeScore, url: str, name: str, key: str | None = None, retries: int = RETRIES,
                 clips: bool = True, few: float = FEW):
        """name: the model's at the endpoint; key: sent as a bearer token."""
        self.scorer = model
        self.few = few
        self.row = 0  # videos without an answer, since there was one
        processor = model.processor
        super().__init__(url, name, processor.settings, key, parallel=PARALLEL, timeout=TIMEOUT,
                         retries=retries, reader=processor.reader, clips=clips)
        self.endpoint.as_written = True
        if self.clips:
            self.try_out()

    def try_out(self) -> None:
        """DataError unless a first question, about a black clip, comes to our prompt there."""
        processor = self.scorer.processor
        black = Frames(np.zeros((2, 64, 64, 3), np.uint8), processor.settings.fps)
        prompt = "A ball."
        one_token = {"max_tokens": 1, "ignore_eos": True, "temperature": 0.0}
        question = self.with_beside(self.question({"<video>": black}, prompt), one_token)
        answer = self.answer_to(question, "a first question")
        if "error" in answer:
            raise DataError(answer["error"])
        try:
            self.check_prompt(answer, processor(black, prompt).input_ids.tolist())
        except DataError as error:
            raise DataError(f"{self.endpoint.shown}: {error}") from None

    def texts(self, prompt: str) -> list[str]:
        before, after = self.scorer.processor.around_video(prompt)
        return [before, "<video>", after]

    @torch.no_grad()
    def think(
            self, batch: Batch, n: int = 1, max_new_tokens: int = 4096,
            temperature: float = 1.0, top_p: float = 1.0,
            seeds: list[int] | None = None, without_cot: bool = False,
            repetition_penalty: float | None = None) -> Thoughts:
        """As `DeScore.think`, with `errors` for videos that have no answer. Log-probabilities are not
        known, and 0. `seeds` decide what is drawn, by the endpoint's own generator."""
        model = self.scorer
        if repetition_penalty is None:  # who takes no clips may not know it
            repetition_penalty = model.own_penalty(temperature) if self.clips else 1.0
        check_sampling(temperature, top_p, repetition_penalty)
        if batch.sources is None:
            raise DataError("an endpoint is shown the videos: the batch does not say which they are")
        if seeds is None:
            seeds = torch.randint(2**62, (len(batch),)).tolist()
        self.endpoint.limit(max_new_tokens, temperature)
        how = {"top_p": top_p, "top_k": -1, "repetition_penalty": repetition_penalty}
        answers = self.answers(batch, n, how, seeds if temperature else [None] * len(batch))
        self.end_if_gone(answers)

        errors = []
        rows = []
        for of_video in answers:
            errors.append(next((answer["error"] for answer in of_video if "error" in answer), None))
            for answer in of_video:
                end = [] if answer.get("truncated") else [model.eos]
                ids = model.processor.encode_cot(answer.get("cot"))
                rows.append(ids + end)
        tokens, mask = side_by_side(model, rows, n)

        was_training = model.training
        model.eval()
        watched = model.watch(batch)
        parts = []
        for nth in range(n):
            cots = [of_video[nth].get("cot") for of_video in answers]
            parts.append(model.score_parts(watched, cots))
        parts = torch.stack(parts, 1)  # (B, n, K)
        scores_no_cot = model.score(watched, [None] * len(batch)) if without_cot else None
        model.train(was_training)
        logps = torch.zeros(mask.shape, device=model.device)
        return Thoughts(tokens, mask, logps, model.overall(parts), scores_no_cot, parts, errors=errors)

    def answers(self, batch: Batch, n: int, how: dict,
                seeds: list[int | None]) -> list[list[dict]]:
        """The n answers about each of a batch's videos: cot and truncated, or error."""
        asked = []
        found = []
        for b, (video, prompt) in enumerate(batch.sources):
            found.append([{}] * n)
            try:
                question = self.question({"<video>": video}, prompt)
            except DataError as error:  # it could be read a moment ago
                found[b] = [{"error": str(error)}] * n
                continue
            for place in range(n):
                drawn = {} if seeds[b] is None else {"seed": draw_seed(seeds[b], place) % 2**31}
                asked.append((b, place, self.with_beside(question, how | drawn)))

        def ask(b: int, place: int, question: tuple) -> dict:
            video, _ = batch.sources[b]
            answer = self.answer_to(question, video)
            try:
                checked(answer.get("cot", ""), "its CoT")
                self.check_prompt(answer, batch.input_ids[b][batch.mask[b]].tolist())
            except DataError as error:
                answer = {"error": str(DataError(f"{video}: {self.endpoint.shown}: {error}"))}
            return answer | {"b": b, "place": place}

        no_bound = SimpleNamespace(past=lambda answer: None)
        for answer in ask_all(ask, asked, self.parallel, self.endpoint.stop, no_bound, self.timeout):
            found[answer["b"]][answer["place"]] = answer
        return found

    def end_if_gone(self, answers: list[list[dict]]) -> None:
        """DataError if there has been no answer for too long."""
        failed = [any(answer.get("failed") for answer in of_video) for of_video in answers]
        self.row = self.row + len(failed) if all(failed) else 0
        if self.row >= self.few:
            last = next(answer["error"] for answer in answers[-1] if answer.get("failed"))
            raise DataError(f"{self.endpoint.shown}: {self.row} videos in a row without an answer; the "
                            f"last: {last}")

    def with_beside(self, question: tuple[list[dict], dict], how: dict) -> tuple[list[dict], dict]:
        """A question with all that decides the answer. Who takes no clips may know few settings, and is
        told those that are not as usual."""
        parts, beside = question
        if not self.clips:
            usual = {"repetition_penalty": 1.0, "top_p": 1.0, "top_k": -1}
            return parts, {name: how[name] for name in how if how[name] != usual.get(name)}
        opening = self.scorer.processor.opening
        return parts, beside | how | {"return_token_ids": True, "chat_template_kwargs": {"opening": opening}}

    def check_prompt(self, answer: dict, ours: list[int]) -> None:
        """DataError unless an answer is to our prompt, as far as the endpoint says which it was."""
        count = answer.get("prompt_tokens", len(ours))
        theirs = answer.get("prompt_ids")
        if not self.clips or theirs == ours or (theirs is None and count == len(ours)):
            return
        place = "" if theirs is None else f", {how_apart(self.scorer.processor, theirs, ours)}"
        raise DataError(f"its prompt is not ours: {count} tokens, not {len(ours)}{place}; it is to be served "
                        "with --chat-template tools/chat_template.jinja, see docs/scale.md")
