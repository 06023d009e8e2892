"""An endpoint that makes of a question the prompt that a vLLM server with a Qwen3-VL makes: it renders our
chat template, and puts a clip's marks and tokens where its <|video_pad|> stands. What it answers is what it
was told to (`Seeing.tell`)."""

import base64
import http.server
import io
import json
import threading
from types import SimpleNamespace

import fake_vllm
import numpy as np
from conftest import ROOT
from PIL import Image
from transformers import AutoTokenizer

from data import read_video

TEMPLATE = (ROOT / "tools/chat_template.jinja").read_text()
UNKNOWN = ("<think>?", "length")


class Seeing(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/backbone")
        plain = SimpleNamespace(config=model.qwen.config)
        self.engine = SimpleNamespace(tokenizer=self.tokenizer, plain=plain)
        self.template = TEMPLATE
        self.cots = {}  # lists of (text, finish reason) by prompt ids and frames
        self.seen = []  # bodies
        self.beside = {}  # what a message has beside its content
        self.keys = None  # the header of the last
        self.takes_clips = True
        self.says_ids = True
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def tell(self, ids, frames, *answers):
        """What to answer where these are the prompt's ids and the frames (T, 3, H, W) of the clip."""
        self.cots[tuple(ids.tolist()), frames.permute(0, 2, 3, 1).numpy().tobytes()] = answers

    def learn(self, model, batch, longest, n=1, temperature=0.0, seeds=None, without_cot=False):
        """Answer about a batch what a model thinks itself; returns its thoughts."""
        thoughts = model.think(batch, n, longest, temperature, seeds=seeds, without_cot=without_cot)
        for b, prompt in enumerate(batch.input_ids):
            found = []
            for tokens, mask in zip(thoughts.tokens[b], thoughts.mask[b]):
                finish = "stop" if model.eos in tokens[mask].tolist() else "length"
                found.append((model.processor.decode(tokens[mask]), finish))
            frames, _ = read_video(batch.sources[b][0], model.processor.settings)
            self.tell(prompt[batch.mask[b]], frames, *found)
        return thoughts

    def answer(self, body):
        content = body["messages"][0]["content"]
        if not self.takes_clips and any(part["type"] == "video_url" for part in content):
            return 400, {"error": {"message": "no video_url here", "code": 400}}
        parts = [part | {"type": part["type"].removesuffix("_url")} for part in content]
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], chat_template=self.template, tokenize=True,
            add_generation_prompt=True, return_dict=False, **body.get("chat_template_kwargs", {}))
        videos = [part["video_url"]["url"] for part in content if part["type"] == "video_url"]
        if videos:
            (url,) = videos
            header, *pictures = url.split(",")
            assert header == "data:video/jpeg;base64"
            assert body["mm_processor_kwargs"] == {"do_resize": False, "do_sample_frames": False}
            about = body["media_io_kwargs"]["video"]
            assert len(about["frames_indices"]) == len(pictures) and about["num_frames"] == -1
            assert not about["do_sample_frames"] and about["total_num_frames"] > max(about["frames_indices"])
            if about["total_num_frames"] < len(pictures):
                return 400, {"error": {"message": "total_num_frames must be >= number of frames sent"}}
            files = [Image.open(io.BytesIO(base64.b64decode(text))) for text in pictures]
            frames = np.stack([np.asarray(file.convert("RGB")) for file in files])
            ids = fake_vllm.LLM.expanded(self.engine, ids, frames, about)
        self.seen.append(body)
        answers = self.cots.get((tuple(ids), frames.tobytes() if videos else None), [UNKNOWN])
        text, finish = answers[body.get("seed", 0) % len(answers)]
        choice = {"finish_reason": finish, "message": {"content": text} | self.beside}
        answer = {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}
        if body.get("return_token_ids") and self.says_ids:
            answer["prompt_token_ids"] = ids
        return 200, answer


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys = self.headers.get("Authorization")
        status, answer = self.server.answer(body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass
