"""A model whose thoughts are known. It tells a video by what it is shown of it, not by its name or its place,
and a prompt by what it is asked: what it says of one can be told from what it says of any other."""

import io
import os
import re
import sys
import threading
import time
from contextlib import contextmanager, redirect_stdout
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT
from pages import a_cot

from data import DIMENSIONS
from model import DeScore, Thoughts

MEAN = 0.5  # the scale of its scores
STD = 0.25
# By how much the thoughts about one video differ at temperature 1, in their order.
OFFSETS = (0.5, -1.25, 0.25, 3.0)


def scores_of(number):
    """Sub-scores of a video, by its number; no other of 36 has them."""
    values = [number % 3, number // 3 % 3, "N/A" if number // 9 % 2 else 1, number // 18, 2]
    return dict(zip(DIMENSIONS, values, strict=True))


class Seer:
    """Stands for DeScore.think and DeScore.score. `calls` are the options of each call of `think`."""

    def __init__(self, videos, prompts):
        self.model = DeScore.load(ROOT / "toy/backbone", device="cpu")
        self.model.has_head = True
        self.model.info |= {"score_mean": MEAN, "score_std": STD}
        self.videos = [os.path.realpath(video) for video in videos]
        self.prompts = [*prompts, ""]  # a probe empties them
        self.calls = []
        self.has_parts = False  # whether its head says two things
        self.looks = torch.stack([self.look(video) for video in self.videos])

    def look(self, video):
        sample = self.model.processor(video, self.prompts[0])
        with torch.no_grad():
            batch = self.model.encode(self.model.processor.collate([sample]))
        return self.opening(batch.features[0], batch.grid[0])

    @staticmethod
    def opening(features, grid):
        """What the tower makes of a video's first frames, which are the same at any rate."""
        return features[: len(features) // int(grid[0])].flatten()

    def install(self, monkeypatch):
        """Let every command and function of this process ask it."""
        monkeypatch.setattr(DeScore, "load", lambda *args, **options: self.model)
        monkeypatch.setattr(DeScore, "think", self.think)
        monkeypatch.setattr(DeScore, "score", self.score)
        self.calls.clear()
        return self

    # -- what it says

    def number(self, key):
        return self.videos.index(os.path.realpath(key[0]))

    def cot(self, key, k=0):
        number = self.number(key)
        return a_cot(scores_of(number), f"{number} {k} {key[1]}")

    def score_of(self, key, k=0, temperature=0.0):
        number = self.number(key)
        own = number * 5 % 7 - self.prompts.index(key[1]) / 8
        return own + temperature * OFFSETS[k] * (1 + number / 4)

    def score_no_cot(self, key):
        number = self.number(key)
        return number * 3 % 7 + 20 + self.prompts.index(key[1]) / 8

    def is_cut_off(self, key, k=0):
        """Whether a thought has no end: of two thoughts about a video, one in two."""
        return (self.number(key) + k) % 2 == 0

    # -- in the model's place

    def seen(self, batch):
        """The (video, prompt) key of each row of an encoded batch, from what stands in it."""
        tokens = (batch.input_ids == self.model.processor.video_id).sum(1).tolist()
        keys = []
        rows = zip(batch.input_ids, batch.mask, batch.grid, batch.features[0].split(tokens))
        for ids, mask, grid, features in rows:
            distances = (self.looks - self.opening(features, grid)).norm(dim=1)
            text = self.model.processor.tokenizer.decode(ids[mask])
            prompt = next(prompt for prompt in self.prompts if prompt in text)
            keys.append((self.videos[distances.argmin()], prompt))
        return keys

    def stamps(self, batch):
        """The last second that each row of a batch is told of its video."""
        found = []
        for ids in batch.input_ids:
            text = self.model.processor.tokenizer.decode(ids)
            found.append(float(re.findall(r"<(\d+\.\d) seconds>", text)[-1]))
        return found

    def think(self, batch, n=1, max_new_tokens=4096, temperature=1.0, top_p=1.0, seeds=None,
              without_cot=False, repetition_penalty=None):
        keys = self.seen(self.model.encode(batch))
        self.calls.append({"samples": n, "temperature": temperature, "keys": keys,
                           "stamps": self.stamps(batch)})
        eos = self.model.eos
        rows = []
        for key in keys:
            for k in range(n):
                ids = self.model.processor.encode(self.cot(key, k))
                rows.append(torch.tensor(ids if self.is_cut_off(key, k) else [*ids, eos]))
        lengths = torch.tensor([len(row) for row in rows]).view(len(keys), n)
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=eos)
        tokens = tokens.view(len(keys), n, -1)
        mask = torch.arange(tokens.shape[-1]) < lengths[..., None]
        scores = torch.tensor([[self.score_of(key, k, temperature) for k in range(n)] for key in keys])
        parts = torch.stack([scores, 2 * scores + 1], -1) if self.has_parts else None
        no_cot = torch.tensor([self.score_no_cot(key) for key in keys]) if without_cot else None
        return Thoughts(tokens, mask, tokens * 0.0, scores, no_cot, parts)

    def score(self, batch, cots):
        keys = self.seen(self.model.encode(batch))
        scores = [self.score_no_cot(key) if cot is None else self.score_of(key)
                  for key, cot in zip(keys, cots, strict=True)]
        return torch.tensor(scores)


def ran(main, *words):
    """Run a command's main in this process; returns its exit code and what it printed."""
    out = io.StringIO()
    code = 0
    with patch.object(sys, "argv", ["command", *map(str, words)]), redirect_stdout(out):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    return code, out.getvalue()


@contextmanager
def served(*flags):
    """The address at which tools.serve answers, started with these flags in a thread of this process."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    from tools import serve
    servers = []

    class Kept(serve.Server):
        def __init__(self, app, folder):
            super().__init__(app, folder)
            servers.append(self)

        def leave(self, status):
            """The process goes on."""

    out = io.StringIO()
    words = ["serve", "--model", "seer", "--port", "0", "--accept-any", *map(str, flags)]
    thread = threading.Thread(target=serve.main, daemon=True)
    with patch.object(serve, "Server", Kept), patch.object(sys, "argv", words), redirect_stdout(out):
        thread.start()
        while not (servers and servers[0].started):
            assert thread.is_alive()
            time.sleep(0.01)
    try:
        yield re.search(r"http://\S+", out.getvalue())[0]
    finally:
        servers[0].should_exit = True
        thread.join(10)
