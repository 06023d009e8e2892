"""DeScore: a Qwen3-VL that thinks, then scores.

    sequence   I(v, t, c) = [ video tokens, instruction with t, c, [Reward] ]
    score      r = w · h([Reward])

Four things make it fast, and all are in this file:

  encode   the vision tower reads a video once; everything after works on what it made of it
  think    a prompt is prefilled once for all its rollouts; they share its keys and values (`GroupCache`)
  score    [Reward] is one more decode step on the cache that thinking left behind
  group    for the update, the rollouts of a video stand in one row behind one copy of its prompt,
           [ prompt | c_1 [R] | c_2 [R] | … | c_G [R] ], and one forward gives log-probabilities and rewards

[Reward] is a vector appended to the input embeddings, not a word: no text can contain it. A CoT ends with the token
<|im_end|>, which is predicted like any other but never read: [Reward] stands in its place, in the same turn.
"""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when imported, it asks for kernels that are not used here
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft's, not ours

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, Qwen3VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from data import INSTRUCTION, Batch, DataError, Processor, VideoSettings

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# The linear layers of the language model: what LoRA adapts (not lm_head, not the embeddings, not the vision tower).
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
LOGITS_CHUNK = 2048  # CoT tokens whose logits exist at one time; 2048 · 151,936 · 4 bytes = 1.2 GB


# ---------------------------------------------------------------------------------------------------------------------
# One prompt for a group of rollouts: its cache and the attention over it


class GroupCache:
    """Keys and values while thinking. A prompt's are stored once; those of its n rollouts, in buffers sized once.

    It stands in for a transformers cache: each attention layer calls `update`. The first call (prefill) keeps the
    prompt's keys and values; each later one writes one token a rollout and hands both parts to `group_attention`."""

    def __init__(self, prompt_mask: torch.Tensor, n: int, max_new: int):
        self.n, self.max_new, self.step = n, max_new, 0
        # Padding of shorter prompts, as a bias on the attention scores: (B, 1, 1, 1, P).
        self.bias = torch.zeros(prompt_mask.shape, device=prompt_mask.device).masked_fill(~prompt_mask, float("-inf"))
        self.bias = self.bias[:, None, None, None]
        self.prompt, self.own = {}, {}  # layer → (keys, values)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        if layer not in self.prompt:  # prefill: (B, kv heads, P, d)
            self.prompt[layer] = (keys.contiguous(), values.contiguous())
            B, heads, _, d = keys.shape
            self.own[layer] = (keys.new_empty(B, self.n, heads, self.max_new, d),
                               values.new_empty(B, self.n, heads, self.max_new, d))
            return keys, values
        for buffer, new in zip(self.own[layer], (keys, values)):  # decode: (B · n, kv heads, 1, d)
            buffer[:, :, :, self.step] = new.view(*buffer.shape[:3], -1)
        own_keys, own_values = (buffer[:, :, :, : self.step + 1] for buffer in self.own[layer])
        return (self.prompt[layer][0], own_keys, self.bias), (self.prompt[layer][1], own_values)

    def keep(self, videos: torch.Tensor, columns: torch.Tensor) -> None:
        """Go on with some videos (b,) and for each with some of its rollouts (b, n')."""
        self.n, self.bias = columns.shape[1], self.bias[videos]
        for layer in self.prompt:
            self.prompt[layer] = tuple(part[videos] for part in self.prompt[layer])
            self.own[layer] = tuple(buffer[videos[:, None], columns] for buffer in self.own[layer])


def group_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention of one new token a rollout over its prompt and its own tokens; anything else goes to SDPA.

    query (B · n, heads, 1, d); key and value as `GroupCache.update` hands them on. The queries of a group meet the
    prompt's keys in one matrix product, so the prompt is read once a group and not once a rollout."""
    if not isinstance(key, tuple):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (prompt_k, own_k, bias), (prompt_v, own_v) = key, value
    B, n, kv, T, d = own_k.shape
    q = query.reshape(B, n, kv, -1, d) * scaling  # (B, n, kv, heads a kv head, d)
    folded = q.transpose(1, 2).flatten(2, 3)  # (B, kv, n · heads a kv head, d)
    on_prompt = (folded @ prompt_k.transpose(-1, -2)).unflatten(2, (n, -1)).transpose(1, 2)  # (B, n, kv, ·, P)
    on_own = q @ own_k.transpose(-1, -2)  # (B, n, kv, ·, T)
    weights = torch.cat([on_prompt.float() + bias, on_own.float()], dim=-1).softmax(-1).to(query.dtype)
    on_prompt, on_own = weights.split([prompt_k.shape[2], T], dim=-1)
    out = (on_prompt.transpose(1, 2).flatten(2, 3) @ prompt_v).unflatten(2, (n, -1)).transpose(1, 2) + on_own @ own_v
    return out.reshape(B * n, 1, -1, d), None


ALL_ATTENTION_FUNCTIONS.register("descore_group", group_attention)


class Thoughts(NamedTuple):
    """What `DeScore.think` returns: n CoTs for each of B videos, and the score that follows each."""

    tokens: torch.Tensor  # (B, n, C) the end token included where there is one
    mask: torch.Tensor  # (B, n, C) bool
    logps: torch.Tensor  # (B, n, C) log π(token | before), of the model itself whatever the temperature; 0 off the mask
    rewards: torch.Tensor  # (B, n)


def draw(logits: torch.Tensor, temperature: float, top_p: float, noise: torch.Tensor | None) -> torch.Tensor:
    """Sample a token for each of (…, V) logits; temperature 0 takes the likeliest. noise (…, V): exponential(1)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the smallest set whose mass reaches top_p stays
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    return (probs / noise).argmax(-1)  # the first of V exponential clocks to ring is a sample from probs


# ---------------------------------------------------------------------------------------------------------------------
# The model


class DeScore(nn.Module):
    """A Qwen3-VL backbone, the learnable query [Reward], and a linear head without bias."""

    def __init__(self, backbone: Qwen3VLForConditionalGeneration, processor: Processor, source: str):
        super().__init__()
        self.backbone, self.processor, self.source = backbone, processor, source
        self.info: dict = {}  # what descore.json says beyond backbone and video: training, score_mean, score_std
        self.dtype = backbone.dtype  # of the frozen weights; what trains is float32
        text = self.qwen.config.text_config
        text._attn_implementation = "descore_group"
        self.query = nn.Parameter(torch.empty(text.hidden_size).normal_(std=text.initializer_range))
        self.head = nn.Linear(text.hidden_size, 1, bias=False)
        nn.init.normal_(self.head.weight, std=text.hidden_size**-0.5)

    @property
    def qwen(self) -> Qwen3VLForConditionalGeneration:
        """The backbone itself, whether or not LoRA is wrapped around it."""
        return self.backbone.get_base_model() if isinstance(self.backbone, PeftModel) else self.backbone

    @property
    def device(self) -> torch.device:
        return self.query.device

    def autocast(self):
        """Lets float32 weights that train work among frozen ones in bfloat16."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype if half else None, enabled=half)

    # -- reading ------------------------------------------------------------------------------------------------------

    def encode(self, batch: Batch) -> Batch:
        """Move a batch to the device and run the vision tower on its videos, if that has not been done yet. With the
        tower frozen the features may be kept for every later use of the same batch; they carry no gradient."""
        if batch.features is not None:
            return batch
        batch, tower = batch.to(self.device), self.qwen.model.visual
        trains = any(p.requires_grad for p in tower.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()), self.autocast():
            pixels = (batch.patches.float() / 127.5 - 1).to(self.dtype)  # Qwen3-VL's rescaling and mean = std = 0.5
            out = tower(pixels, grid_thw=batch.grid)
        return replace(batch, features=(out.pooler_output, out.deepstack_features))

    def read(self, batch: Batch, ids, positions, in_prompt, is_reward=None, **kwargs) -> torch.Tensor:
        """Run the language model over rows that hold the batch's videos. ids (B, L), positions (3, B, L); in_prompt
        (B, L) marks the prompts, where alone video tokens are videos; is_reward (B, L) marks [Reward]. Returns the last
        hidden states (B, L, H)."""
        features, deepstack = batch.features
        embeds = self.qwen.get_input_embeddings()(ids)
        is_video = in_prompt & (ids == self.processor.special["<|video_pad|>"])
        embeds = embeds.masked_scatter(is_video[..., None], features.to(embeds.dtype))
        if is_reward is not None:
            embeds = torch.where(is_reward[..., None], self.query.to(embeds.dtype), embeds)
        with self.autocast():
            return self.qwen.model.language_model(
                inputs_embeds=embeds, position_ids=positions, visual_pos_masks=is_video,
                deepstack_visual_embeds=deepstack, use_cache=False, **kwargs).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits in float32: (..., H) → (..., V)."""
        with self.autocast():
            return self.qwen.lm_head(hidden).float()

    def reward(self, hidden: torch.Tensor) -> torch.Tensor:
        """r = w · h([Reward]), in float32: (..., H) → (...)."""
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()

    # -- think, then score --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def think(self, batch: Batch, n: int = 1, max_new_tokens: int = 4096, temperature: float = 1.0, top_p: float = 1.0,
              seeds: list[int] | None = None) -> Thoughts:
        """Write n CoTs for each of the batch's B videos and score each where it ends (Section "Inference").

        `seeds`, one a video, make the sampling reproducible; by default they are drawn from torch's own generator. A CoT
        that reaches max_new_tokens without an end is scored as it stands (`truncated` tells)."""
        was_training = self.training
        self.eval()
        batch = self.encode(batch)
        B, eos = len(batch), self.processor.eos_id
        seeds = torch.randint(2**62, (B,)).tolist() if seeds is None else seeds
        # Each video has a generator of its own, so that what is drawn for it does not depend on its company.
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        cache = GroupCache(batch.mask, n, max_new_tokens + 1)
        hidden = self.read(batch, batch.input_ids, batch.position_ids, batch.mask, past_key_values=cache)
        hidden = hidden[torch.arange(B), batch.mask.sum(1) - 1][:, None].expand(-1, n, -1)  # (B, n, H)
        start = batch.position_ids.amax((0, 2)) + 1  # (B,) where the CoTs' positions begin
        tokens = torch.full((B * n, max_new_tokens), eos, device=self.device)
        logps = torch.zeros(B * n, max_new_tokens, device=self.device)
        rewards = torch.zeros(B * n, device=self.device)
        done = torch.zeros(B * n, dtype=torch.bool, device=self.device)
        rows = torch.arange(B * n, device=self.device).view(B, n)  # the rollouts that are still computed
        for step in range(max_new_tokens):
            logits, over = self.logits(hidden), done[rows]
            noise = None
            if temperature:
                noise = torch.stack([torch.empty(n, logits.shape[-1], device=self.device).exponential_(generator=g)
                                     for g in generators])[torch.arange(len(rows))[:, None], rows % n]
            token = draw(logits, temperature, top_p, noise).masked_fill(over, eos)
            logp = logits.gather(-1, token[..., None])[..., 0] - logits.logsumexp(-1)
            tokens[rows, step], logps[rows, step] = token, logp.masked_fill(over, 0)
            ends = ~over & (token == eos)
            hidden = self.decode_step(cache, token, ends, start[:, None] + step)
            rewards[rows] = torch.where(ends, self.reward(hidden), rewards[rows])
            done[rows] = over | ends
            if step % 16 == 15:  # asking costs a wait for the device, so not every step
                live = ~done[rows]
                videos, width = live.any(1).nonzero()[:, 0], int(live.sum(1).max())
                if width == 0:
                    break
                if len(videos) * width <= 7 / 8 * rows.numel():  # finished rollouts leave the batch
                    columns = live[videos].long().argsort(dim=1, descending=True, stable=True)[:, :width]
                    cache.keep(videos, columns)
                    rows, hidden = (x[videos[:, None], columns] for x in (rows, hidden))
                    start, generators = start[videos], [generators[i] for i in videos.tolist()]
        open_ended = ~done[rows]
        if open_ended.any():  # [Reward] after what never ended
            hidden = self.decode_step(cache, tokens[rows, -1], open_ended, start[:, None] + max_new_tokens)
            rewards[rows] = torch.where(open_ended, self.reward(hidden), rewards[rows])
        self.train(was_training)
        ended = tokens == eos
        mask = ended.cumsum(-1) - ended.long() == 0  # up to the first end token
        C = int(mask.any(0).sum())
        return Thoughts(*(x[:, :C].view(B, n, C) for x in (tokens, mask, logps)), rewards.view(B, n))

    def decode_step(self, cache: GroupCache, token, is_reward, position) -> torch.Tensor:
        """Read one token a rollout (B, n), or [Reward] in its place, at a video's position (B, 1). Returns the last
        hidden states (B, n, H)."""
        embeds = self.qwen.get_input_embeddings()(token)
        embeds = torch.where(is_reward[..., None], self.query.to(embeds.dtype), embeds).flatten(0, 1)[:, None]
        positions = position.expand_as(token).reshape(1, -1, 1).expand(3, -1, -1)
        with self.autocast():
            out = self.qwen.model.language_model(inputs_embeds=embeds, position_ids=positions, past_key_values=cache,
                                                 use_cache=False)
        cache.step += 1
        return out.last_hidden_state.view(*token.shape, -1)

    def truncated(self, thoughts: Thoughts) -> torch.Tensor:
        """(B, n) bool: which CoTs ran into the token limit."""
        return ~((thoughts.tokens == self.processor.eos_id) & thoughts.mask).any(-1)

    def score(self, batch: Batch, cots: list[str | None]) -> torch.Tensor:
        """Score each of B videos after the given CoT, or after none where it is None: rewards (B,). One forward over
        [prompt, CoT, [Reward]], no logits; differentiable."""
        ids = [torch.tensor(self.processor.encode(cot or ""), dtype=torch.long) for cot in cots]
        pad = nn.utils.rnn.pad_sequence
        tokens = pad(ids, batch_first=True, padding_value=self.processor.eos_id)[:, None].to(self.device)
        mask = pad([torch.ones_like(i, dtype=torch.bool) for i in ids], batch_first=True)[:, None].to(self.device)
        hidden, _, at_reward = self.forward_rows(self.encode(batch), tokens, mask)
        return self.reward(hidden[torch.arange(len(batch)), at_reward[:, 0]])

    def group(self, batch: Batch, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and rewards of the G CoTs of each of B videos, in one forward; differentiable.

        tokens and mask (B, G, C) as `think` returns them. Returns logps (B, G, C), 0 off the mask, and rewards (B, G)."""
        hidden, at_source, at_reward = self.forward_rows(self.encode(batch), tokens, mask)
        rows = torch.arange(len(batch), device=hidden.device)[:, None]
        rewards = self.reward(hidden[rows, at_reward])
        flat = self.token_logps(hidden[rows[..., None], at_source][mask], tokens[mask])
        return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat), rewards

    def forward_rows(self, batch: Batch, tokens: torch.Tensor, mask: torch.Tensor):
        """The language model over one row a video, [ prompt | c_1 [R] | … | c_G [R] ] (design: one prefix for a group).

        Each CoT sees the prompt and itself, and its positions go on where the prompt's end. Returns the hidden states
        (B, L, H), and where in L each CoT token is predicted from (B, G, C) and each [Reward] is read (B, G)."""
        (B, G, C), P = tokens.shape, batch.input_ids.shape[1]
        device = tokens.device
        # Lay the row out in slots, P for the prompt and C + 1 for each CoT. An end token is predicted but not read.
        read = mask & (tokens != self.processor.eos_id)
        length = read.sum(-1, keepdim=True)  # (B, G, 1)
        slot = torch.arange(C + 1, device=device)
        cot_ids = torch.cat([tokens, tokens.new_zeros(B, G, 1)], -1)
        prompt_end = batch.position_ids.amax((0, 2))  # the prompt's text ends it, so its largest position is its last
        cot_positions = (prompt_end[:, None, None] + 1 + slot).expand(B, G, -1)
        ids = torch.cat([batch.input_ids, cot_ids.flatten(1)], 1)
        positions = torch.cat([batch.position_ids, cot_positions.flatten(1).expand(3, -1, -1)], 2)
        used = torch.cat([batch.mask, (slot <= length).flatten(1)], 1)
        is_reward = torch.cat([torch.zeros_like(batch.mask), (slot == length).flatten(1)], 1)
        segment = torch.cat([torch.zeros(P, dtype=torch.long, device=device),
                             torch.arange(1, G + 1, device=device).repeat_interleave(C + 1)]).expand(B, -1)
        # Close the gaps: only slots in use are computed.
        place = used.long().cumsum(1) - 1  # slot → place in the packed row
        L = int(used.sum(1).max())
        order = (~used).long().argsort(dim=1, stable=True)[:, :L]
        ids, is_reward, used = ids.gather(1, order), is_reward.gather(1, order), used.gather(1, order)
        segment = segment.gather(1, order).masked_fill(~used, -1)
        positions = positions.gather(2, order.expand(3, -1, -1))
        attention = None  # a single CoT behind its prompt is plainly causal, and so is padding on the right
        if G > 1:
            causal = torch.ones(L, L, dtype=torch.bool, device=device).tril()
            same = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])  # (B, query, key)
            attention = (causal & same)[:, None]
        hidden = self.read(batch, ids, positions, segment == 0, is_reward & used, attention_mask=attention)
        cot_place = place[:, P:].view(B, G, C + 1)
        prompt_last = (batch.mask.sum(1) - 1)[:, None, None].expand(B, G, 1)
        at_source = torch.cat([prompt_last, cot_place[..., : max(C - 1, 0)]], -1)[..., :C]
        return hidden, at_source, cot_place.gather(-1, length)[..., 0]

    def token_logps(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log softmax(lm_head(hidden))[targets]: (N, H), (N,) → (N,) float32. Logits exist for one chunk at a time, in
        the backward too: it computes them again."""

        def logps(h, target):
            logits = self.logits(h)
            return logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)

        chunks = zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK))
        return torch.cat([checkpoint(logps, h, target, use_reentrant=False) for h, target in chunks])

    # -- what trains --------------------------------------------------------------------------------------------------

    def set_trainable(self, lora_rank: int = 64, train_merger: bool = False, train_vision: bool = False) -> None:
        """Choose what trains: [Reward] and the head always; the language model through LoRA adapters of the given rank
        (alpha = 2 · rank) or, at rank 0, all of it; the vision tower and its mergers where asked."""
        if lora_rank and not isinstance(self.backbone, PeftModel):
            self.backbone = get_peft_model(self.backbone, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank,
                                                                     target_modules=LORA_TARGETS))
        elif lora_rank and self.backbone.peft_config["default"].r != lora_rank:
            raise DataError(f"{self.source}: its adapter has rank {self.backbone.peft_config['default'].r}, "
                            f"not {lora_rank}; pass --lora-rank {self.backbone.peft_config['default'].r}, or 0 to merge it")
        elif not lora_rank and isinstance(self.backbone, PeftModel):
            self.backbone = self.backbone.merge_and_unload()
        self.query.requires_grad_(True)
        self.head.requires_grad_(True)
        for name, parameter in self.backbone.named_parameters():
            merger, vision = "merger" in name, ".visual." in name
            wanted = (train_merger if merger else train_vision) if vision else not lora_rank or ".default." in name
            parameter.requires_grad_(wanted)
            if wanted and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()  # what trains is kept in float32

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def keep_reference(self) -> None:
        """Remember the policy as it is now as the reference π_ref: with LoRA as a second, frozen adapter, else as a
        frozen copy of the backbone."""
        if not isinstance(self.backbone, PeftModel):
            self.reference = [copy.deepcopy(self.backbone).requires_grad_(False)]  # in a list: not a part of the model
            return
        self.backbone.add_adapter("reference", self.backbone.peft_config["default"])
        weights = dict(self.backbone.named_parameters())
        for name, parameter in weights.items():
            if ".reference." in name:
                parameter.data.copy_(weights[name.replace(".reference.", ".default.")].data)
                parameter.requires_grad_(False)
        self.backbone.base_model.set_adapter("default")

    @contextmanager
    def as_reference(self):
        """Within it the model is the reference policy."""
        if not isinstance(self.backbone, PeftModel):
            self.backbone, policy = self.reference[0], self.backbone
            try:
                yield
            finally:
                self.backbone = policy
            return
        trains = self.trainable().values()
        self.backbone.base_model.set_adapter("reference", inference_mode=True)
        try:
            yield
        finally:
            self.backbone.base_model.set_adapter("default")
            for parameter in trains:
                parameter.requires_grad_(True)

    # -- from and to disk ---------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
             video: dict | None = None) -> "DeScore":
        """Load a saved DeScore, or a bare Qwen3-VL backbone with a fresh query and head.

        source: a directory or a hub id; dtype: of the frozen weights, by default bfloat16 on a GPU and float32 on a CPU;
        video: `VideoSettings` that differ from what was saved. Raises DataError saying what was looked for and where."""
        if (Path(source) / "model" / "descore.json").is_file():
            source = Path(source) / "model"  # a run's folder stands for the model that it ended with
        source, directory = str(source), Path(source)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        saved = read_json(directory / "descore.json") if (directory / "descore.json").is_file() else {}
        backbone = saved.get("backbone", source)  # an adapter names its backbone; full weights are one
        if directory.is_dir() and not saved and not (directory / "config.json").is_file():
            raise DataError(f"{source}: neither descore.json (a saved DeScore) nor config.json (a Qwen3-VL, or with "
                            "rm_head.pth a release of DeScore) is in it")
        if (directory / backbone).is_dir():
            backbone = os.path.normpath(directory / backbone)
        try:
            config = AutoConfig.from_pretrained(backbone)
            wrong = None if config.model_type == "qwen3_vl" else f"it is a {config.model_type}"
            if not wrong:
                qwen = Qwen3VLForConditionalGeneration.from_pretrained(backbone, dtype=dtype, use_safetensors=True)
                tokenizer = AutoTokenizer.from_pretrained(backbone)
        except (OSError, ValueError, SafetensorError) as error:
            wrong = str(error)
        if wrong:
            raise DataError(f"{backbone}: no Qwen3-VL can be loaded from this directory or hub id: {wrong}")
        vision = config.vision_config
        settings = VideoSettings(**saved.get("video", {}) | (video or {}) | {
            key: getattr(vision, key) for key in ("patch_size", "temporal_patch_size")}
            | {"merge_size": vision.spatial_merge_size})
        model = cls(qwen, Processor(tokenizer, settings, saved.get("instruction", INSTRUCTION)), backbone)
        model.info = {key: value for key, value in saved.items() if key not in ("backbone", "video", "instruction")}
        if (directory / "adapter_config.json").is_file():
            if not (directory / "adapter_model.safetensors").is_file():
                raise DataError(f"{source}: adapter_config.json is there but adapter_model.safetensors is missing")
            model.backbone = PeftModel.from_pretrained(qwen, source)
        if (directory / "descore.safetensors").is_file():
            weights = load_file(directory / "descore.safetensors")
            own = model.state_dict()
            for name, tensor in weights.items():
                if name not in own or own[name].shape != tensor.shape:
                    raise DataError(f"{directory / 'descore.safetensors'}: {name} {tuple(tensor.shape)} does not fit {backbone}")
            model.load_state_dict({name: tensor for name, tensor in weights.items()}, strict=False)
        elif "backbone" in saved:
            raise DataError(f"{source}: descore.safetensors (query vector and head) is missing")
        if (directory / "rm_head.pth").is_file():
            model.load_release(directory / "rm_head.pth")
        model.requires_grad_(False)
        return model.to(device).eval()

    def load_release(self, path: Path) -> None:
        """Query and head of a checkpoint in the layout of DeScore's release: the row of the token <Reward> in the
        embedding, and rm_head.pth, of which nothing but tensors is unpickled."""
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            head = weights["rm_head.weight"] if "rm_head.weight" in weights else weights["weight"]
            self.head.weight.data.copy_(head.reshape(self.head.weight.shape))
        except Exception as error:  # whatever a hostile or broken file makes the unpickler raise
            raise DataError(f"{path}: holds no head that can be read safely ({type(error).__name__}: {error})") from error
        tokenizer, embedding = self.processor.tokenizer, self.qwen.get_input_embeddings().weight
        token = tokenizer.convert_tokens_to_ids("<Reward>")
        if token in (None, tokenizer.unk_token_id) or token >= len(embedding):
            raise DataError(f"{path.parent}: rm_head.pth is there, but the tokenizer or the embedding has no <Reward>")
        self.query.data.copy_(embedding[token])
        self.info["scoring_layout"] = "release"

    def save(self, directory: str | Path, **info) -> None:
        """Write the model to a directory (README, "A saved model"), safetensors and JSON only. `info` goes into
        descore.json. The directory is written beside its place and renamed into it: it is complete or absent."""
        directory = Path(directory)
        beside = directory.with_name(directory.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        self.info |= info
        record = self.info | {"video": asdict(self.processor.settings), "instruction": self.processor.instruction}
        weights = {"query": self.query, "head.weight": self.head.weight}
        if isinstance(self.backbone, PeftModel):
            local = os.path.isdir(self.source)
            record["backbone"] = os.path.relpath(self.source, directory.resolve()) if local else self.source
            weights |= {name: p for name, p in self.trainable().items() if ".lora_" not in name}  # mergers, say
            adapter = get_peft_model_state_dict(self.backbone, adapter_name="default", save_embedding_layers=False)
            save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, beside / "adapter_model.safetensors")
            config = self.backbone.peft_config["default"]
            config.base_model_name_or_path = record["backbone"]
            config.save_pretrained(beside)
        else:
            self.qwen.save_pretrained(beside)
        save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, beside / "descore.safetensors")
        self.processor.tokenizer.save_pretrained(beside)
        (beside / "descore.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        beside.rename(directory)

    # -- many videos --------------------------------------------------------------------------------------------------

    def judge(self, keys: list[tuple[str, str]], max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
              batch_size: int = 16, first: int = 0, samples: int = 1, think: bool = True, without_cot: bool = False,
              workers: int = 0) -> Iterator[dict]:
        """Think about and score many (video, prompt) keys, in order, from the `first` on.

        Yields one dict a key: video, prompt, cot, truncated, reward; with more `samples` than one, reward is the mean
        over so many CoTs, reward_std their spread, and cot the first. `without_cot` adds reward_no_cot; without `think`
        that is all there is."""
        starts = range(first, len(keys), batch_size)
        groups = [keys[start : start + batch_size] for start in starts]
        release = self.info.get("scoring_layout") == "release"
        batches = self.processor.batches([[[key] for key in rows] for rows in groups], workers)
        for start, rows, (batch, _, bad) in zip(starts, groups, batches):
            if bad:
                raise DataError(bad[0]["error"])
            out = [{"video": video, "prompt": prompt} for video, prompt in rows]
            with torch.no_grad():
                batch = self.encode(batch)
                if think:
                    seeds = [draw_seed(seed, start + i) for i in range(len(rows))]
                    thoughts = self.think(batch, samples, max_new_tokens, temperature, seeds=seeds)
                    cut = self.truncated(thoughts)
                    cots = [[self.processor.decode(thoughts.tokens[i, g][thoughts.mask[i, g]]) for g in range(samples)]
                            for i in range(len(rows))]
                    rewards = thoughts.rewards
                    if release:
                        rewards = torch.stack([self.score_release(rows, batch, some) for some in zip(*cots)], 1)
                    for i, record in enumerate(out):
                        record |= {"cot": cots[i][0], "truncated": cut[i, 0].item(), "reward": rewards[i].mean().item()}
                        if samples > 1:
                            record["reward_std"] = rewards[i].std().item()
                if without_cot or not think:
                    none = [None] * len(rows)
                    rewards = self.score_release(rows, batch, none) if release else self.score(batch, none)
                    for record, reward in zip(out, rewards):
                        record["reward_no_cot"] = reward.item()
            yield from out

    def score_release(self, keys: list[tuple[str, str]], batch: Batch, cots: list[str | None]) -> torch.Tensor:
        """Score as DeScore's release does: the CoT is read again, inside the user's turn, and [Reward] follows it there.
        For models that were trained so; costs a second pass. `batch` holds the same videos, encoded."""
        samples = [self.processor(video, prompt, cot or "") for (video, prompt), cot in zip(keys, cots)]
        again = replace(self.processor.collate(samples).to(self.device), features=batch.features)
        return self.score(again, [None] * len(keys))


def read_json(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}: not a JSON object")
    return record


def draw_seed(*path: int) -> int:
    """A seed that is a pure function of numbers such as (seed, step, index)."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Many processes


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started (or alone)."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def start() -> "Ranks":
        if "RANK" not in os.environ:
            return Ranks()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return Ranks(dist.get_rank(), dist.get_world_size())

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: list) -> list:
        """This rank's share of a list: every world-th item."""
        return items[self.rank :: self.world]

    def gather(self, mine: list) -> list:
        """The whole list again, in order, from every rank's share."""
        if self.world == 1:
            return mine
        shares = [None] * self.world
        dist.all_gather_object(shares, mine)
        return [shares[i % self.world][i // self.world] for i in range(sum(map(len, shares)))]

    def gather_all(self, mine: list) -> list:
        """The lists of all ranks, one after the other."""
        if self.world == 1:
            return mine
        lists = [None] * self.world
        dist.all_gather_object(lists, mine)
        return [item for some in lists for item in some]

    def sum(self, numbers: list[float]) -> list[float]:
        """Each number added up over all ranks."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.double)
        total = total.cuda() if torch.cuda.is_available() else total
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up the gradients of all ranks, in one message. The losses divide by counts over all ranks, so that the
        sum is the gradient of the global batch."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        dist.all_reduce(flat)
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            parameter.grad.copy_(grad.view_as(parameter))


# ---------------------------------------------------------------------------------------------------------------------
# The command line, and the embedded default


def parse_args(Args: type, preset: str, ranks: Ranks):
    """Read the command line into a stage's Args. With no --train, what is not given comes from the embedded default's
    preset, and its clips are rendered and annotated on first use."""
    parser, root = HfArgumentParser(Args), Path(__file__).resolve().parent
    (args,) = parser.parse_args_into_dataclasses()
    if args.train is None:
        chosen = json.loads((root / preset).read_text())
        for key in ("backbone", "model"):
            if str(chosen.get(key, "")).startswith("toy/"):
                chosen[key] = str(root / chosen[key])
        parser.set_defaults(**chosen)
        (args,) = parser.parse_args_into_dataclasses()
        folder = Path(args.train).parent
        if ranks.first and not Path(args.train).is_file():
            print(f"{folder}: rendering the clips of the embedded default (once)", flush=True)
            subprocess.run([sys.executable, str(root / "toy/prepare.py"), str(folder)], check=True)
        ranks.sum([0.0])  # the others wait
    return args
