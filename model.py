"""DeScore: a Qwen3-VL that thinks, then scores.

    sequence   I(v, t, c) = [ video tokens, instruction with t, c, [Reward] ]
    score      r = w · h([Reward])

Four things make it fast, and all are in this file:

  encode   the vision tower reads a video once; everything after works on what it made of it
  think    a prompt is prefilled once for all its rollouts; they share its keys and values (`GroupCache`)
  score    [Reward] is one more decode step on the cache that thinking left behind
  group    for the update, the rollouts of a video stand in one row behind one copy of its prompt,
           [ prompt | c_1 [R] | c_2 [R] | … | c_G [R] ], and one forward gives log-probabilities and rewards

[Reward] is a vector appended to the input embeddings, not a word: no text can contain it. A CoT ends with
the token <|im_end|>, which is predicted like any other but never read: [Reward] stands in its place.
"""

import copy
import functools
import json
import logging
import os
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

# When imported, bitsandbytes asks for kernels that are not used here; peft uses what transformers deprecates.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, Qwen3VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from data import INSTRUCTION, MAX_TOKENS, Batch, DataError, Processor, VideoSettings, alike, packed

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# What LoRA adapts: the linear layers of the language model, not lm_head, embeddings, or the vision tower.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
LOGITS_CHUNK = 2048  # CoT tokens whose logits exist at one time; 2048 · 151,936 · 4 bytes = 1.2 GB
FORWARD_TOKENS = 16_384  # of rows that go through the language model together, one row at least


# ------------------------------------------------------------------------------------------------------------
# One prompt for a group of rollouts: its cache and the attention over it


class GroupCache:
    """Keys and values while thinking: a prompt's are stored once, its n rollouts' in buffers sized once.

    It stands in for a transformers cache: each attention layer calls `update`. While prompts are read
    (prefill) it keeps their keys and values; each later call writes one token a rollout and hands both parts
    to `group_attention`."""

    def __init__(self, prompt_mask: torch.Tensor, n: int, max_new: int):
        self.n, self.max_new, self.step = n, max_new, 0
        # Padding of shorter prompts, as a bias on the attention scores: (B, 1, 1, 1, P).
        bias = torch.zeros(prompt_mask.shape, device=prompt_mask.device)
        self.bias = bias.masked_fill(~prompt_mask, float("-inf"))[:, None, None, None]
        self.prompt, self.own = {}, {}  # layer → (keys, values)
        self.prefilled: list[int] | None = None  # the videos whose prompts are being read

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        if self.prefilled is not None:  # (b, kv heads, p, d) of b of the B videos
            _, heads, p, d = keys.shape
            B, P = self.bias.shape[0], self.bias.shape[-1]
            if layer not in self.prompt:
                self.prompt[layer] = tuple(part.new_zeros(B, heads, P, d) for part in (keys, values))
                self.own[layer] = tuple(part.new_empty(B, self.n, heads, self.max_new, d)
                                        for part in (keys, values))
            for buffer, new in zip(self.prompt[layer], (keys, values)):
                buffer[self.prefilled, :, :p] = new
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


class Layout(NamedTuple):
    """Where the parts of packed rows stand (`DeScore.forward_rows`). In slots a row is laid out evenly: P for
    the prompt and C + 1 for each of G CoTs, used or not."""

    place: torch.Tensor  # (B, P + G (C + 1)) slot → place in the row
    order: torch.Tensor  # (B, L) place in the row → slot
    # What a CoT's slots see of its prompt's slots and of its own: (B · G, 1, C + 1, P + C + 1) bool.
    visible: torch.Tensor
    P: int
    G: int


def row_attention(query, key, value, layout: Layout, scaling: float) -> torch.Tensor:
    """Attention over packed rows, of which only what is seen is computed: a prompt on itself, a CoT on both.
    A mask over whole rows would compute each CoT on all others, to throw it away.

    query (B, heads, L, d) → (B, L, heads, d)."""

    def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def of_cots(x: torch.Tensor) -> torch.Tensor:  # (B, G, heads, C + 1, d)
        return x[:, :, P:].unflatten(2, (G, -1)).transpose(1, 2)

    def with_prompt(x: torch.Tensor) -> torch.Tensor:  # (B · G, heads, P + C + 1, d)
        both = torch.cat([x[:, None, :, :P].expand(-1, G, -1, -1, -1), of_cots(x)], 3).flatten(0, 1)
        # No fused kernel has both a mask and fewer kv heads.
        return both.repeat_interleave(query.shape[1] // x.shape[1], 1)

    P, G, sdpa = layout.P, layout.G, nn.functional.scaled_dot_product_attention
    q, k, v = (take(x, layout.place) for x in (query, key, value))
    prompts = sdpa(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True, scale=scaling, enable_gqa=True)
    cots = sdpa(of_cots(q).flatten(0, 1), with_prompt(k), with_prompt(v), layout.visible, scale=scaling)
    slots = torch.cat([prompts, cots.unflatten(0, (-1, G)).transpose(1, 2).flatten(2, 3)], 2)
    return take(slots, layout.order).transpose(1, 2)


def group_attention(module, query, key, value, attention_mask, scaling, layout: Layout | None = None,
                    **kwargs):
    """Attention of one new token a rollout over its prompt and its own tokens. A whole row goes to flex
    attention where its mask is in blocks, to `row_attention` where it has a layout, and to SDPA otherwise.

    query (B · n, heads, 1, d); key and value as `GroupCache.update` hands them on. The queries of a group
    meet the prompt's keys in one matrix product: the prompt is read once a group, not once a rollout."""
    if isinstance(attention_mask, BlockMask):
        query, key = query.to(value.dtype), key.to(value.dtype)
        out = fused(flex_attention, key)(query, key, value, block_mask=attention_mask, scale=scaling,
                                         enable_gqa=True)
        return out.transpose(1, 2), None
    if layout:
        return row_attention(query, key, value, layout, scaling), None
    if not isinstance(key, tuple):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (prompt_k, own_k, bias), (prompt_v, own_v) = key, value
    B, n, kv, T, d = own_k.shape
    q = query.reshape(B, n, kv, -1, d) * scaling  # (B, n, kv, heads a kv head, d)
    folded = q.transpose(1, 2).flatten(2, 3)  # (B, kv, n · heads a kv head, d)
    on_prompt = folded @ prompt_k.transpose(-1, -2)
    on_prompt = on_prompt.unflatten(2, (n, -1)).transpose(1, 2)  # (B, n, kv, heads a kv head, P)
    on_own = q @ own_k.transpose(-1, -2)  # (B, n, kv, ·, T)
    weights = torch.cat([on_prompt.float() + bias, on_own.float()], dim=-1).softmax(-1).to(query.dtype)
    on_prompt, on_own = weights.split([prompt_k.shape[2], T], dim=-1)
    out = on_prompt.transpose(1, 2).flatten(2, 3) @ prompt_v
    out = out.unflatten(2, (n, -1)).transpose(1, 2) + on_own @ own_v
    return out.reshape(B * n, 1, -1, d), None


ALL_ATTENTION_FUNCTIONS.register("descore_group", group_attention)


@functools.cache
def compiled(function):
    return torch.compile(function)


def fused(function, tensor: torch.Tensor):
    """flex_attention is a kernel only when compiled; on a CPU, for tests, that is not worth the wait."""
    return compiled(function) if tensor.is_cuda else function


class Thoughts(NamedTuple):
    """What `DeScore.think` returns: n CoTs for each of B videos, and the score that follows each."""

    tokens: torch.Tensor  # (B, n, C) the end token included where there is one
    mask: torch.Tensor  # (B, n, C) bool
    logps: torch.Tensor  # (B, n, C) log π(token | before), at temperature 1 always; 0 off the mask
    rewards: torch.Tensor  # (B, n)
    rewards_no_cot: torch.Tensor | None  # (B,) read right behind the prompt, where asked for


def draw(logits: torch.Tensor, temperature: float, top_p: float, noise: torch.Tensor | None) -> torch.Tensor:
    """Sample a token for each of (…, V) logits, with exponential(1) noise (…, V). At temperature 0 take the
    likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the smallest set whose mass reaches top_p stays
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    return (probs / noise).argmax(-1)  # the first of V exponential clocks to ring is a sample from probs


# ------------------------------------------------------------------------------------------------------------
# The model


class DeScore(nn.Module):
    """A Qwen3-VL backbone, the learnable query [Reward], and a linear head without bias."""

    def __init__(self, backbone: Qwen3VLForConditionalGeneration, processor: Processor, source: str):
        super().__init__()
        self.backbone, self.processor, self.source = backbone, processor, source
        self.info: dict = {}  # what else descore.json says: training, score_mean, score_std
        self.dtype = backbone.dtype  # of the frozen weights and of what is computed; what trains is float32
        self.quant: str | None = None
        self.attention = "sdpa"  # or "flex": how rows of several CoTs are masked, equal in result
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

    @property
    def tower_trains(self) -> bool:
        return any(p.requires_grad for p in self.qwen.model.visual.parameters())

    def autocast(self):
        """Lets float32 weights that train work among frozen ones in bfloat16."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype if half else None, enabled=half)

    # -- reading ---------------------------------------------------------------------------------------------

    def encode(self, batch: Batch) -> Batch:
        """Move a batch to the device and run the vision tower on its videos, if that has not been done yet.
        With the tower frozen the features may be kept for every later use of the same batch; they carry no
        gradient."""
        batch = batch.to(self.device)
        if batch.features is not None:
            return batch
        with torch.set_grad_enabled(self.tower_trains and torch.is_grad_enabled()), self.autocast():
            pixels = (batch.patches.float() / 127.5 - 1).to(self.dtype)  # Qwen3-VL's: mean = std = 0.5
            out = self.qwen.model.visual(pixels, grid_thw=batch.grid)
        return replace(batch, patches=batch.patches[:0], features=(out.pooler_output, out.deepstack_features))

    def read(self, batch: Batch, ids, positions, in_prompt, is_reward=None, **kwargs) -> torch.Tensor:
        """Run the language model over rows that hold the batch's videos. ids (B, L), positions (3, B, L);
        in_prompt (B, L) marks the prompts, where alone video tokens are videos; is_reward (B, L) marks
        [Reward]. Returns the last hidden states (B, L, H)."""
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

    # -- think, then score -----------------------------------------------------------------------------------

    @torch.no_grad()
    def think(self, batch: Batch, n: int = 1, max_new_tokens: int = 4096, temperature: float = 1.0,
              top_p: float = 1.0, seeds: list[int] | None = None, without_cot: bool = False) -> Thoughts:
        """Write n CoTs for each of the batch's B videos and score each where it ends (Section "Inference").

        `seeds`, one a video, make the sampling reproducible; by default they are drawn from torch's own
        generator. A CoT that reaches max_new_tokens without an end is scored as it stands (`truncated`
        tells). `without_cot` also reads the score of the videos themselves, on the same prefill."""
        was_training = self.training
        self.eval()
        batch = self.encode(batch)
        B, eos = len(batch), self.processor.eos_id
        seeds = torch.randint(2**62, (B,)).tolist() if seeds is None else seeds
        # Each video has a generator of its own, so that what is drawn for it does not depend on its company.
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        cache = GroupCache(batch.mask, n, max_new_tokens + 1)
        hidden = torch.empty(B, len(self.query), dtype=self.dtype, device=self.device)  # ends of the prompts
        for cache.prefilled in alike(batch.mask.sum(1).tolist()):
            some = batch.select(cache.prefilled)
            read = self.read(some, some.input_ids, some.position_ids, some.mask, past_key_values=cache)
            hidden[cache.prefilled] = read[torch.arange(len(some)), some.mask.sum(1) - 1].to(hidden.dtype)
        cache.prefilled = None
        hidden = hidden[:, None].expand(-1, n, -1)  # (B, n, H)
        start = batch.position_ids.amax((0, 2)) + 1  # (B,) where the CoTs' positions begin
        rewards_no_cot = None
        if without_cot:
            nothing = torch.full((B, n), eos, device=self.device)
            everywhere = torch.ones_like(nothing, dtype=torch.bool)
            behind = self.decode_step(cache, nothing, everywhere, start[:, None])
            rewards_no_cot = self.reward(behind[:, 0])
            cache.step = 0  # the first token of the CoTs takes its place
        tokens = torch.full((B * n, max_new_tokens), eos, device=self.device)
        logps = torch.zeros(B * n, max_new_tokens, device=self.device)
        rewards = torch.zeros(B * n, device=self.device)
        done = torch.zeros(B * n, dtype=torch.bool, device=self.device)
        rows = torch.arange(B * n, device=self.device).view(B, n)  # the rollouts that are still computed
        for step in range(max_new_tokens):
            logits, over = self.logits(hidden), done[rows]
            noise = None
            if temperature:
                noise = torch.stack([torch.empty(n, logits.shape[-1], device=self.device)
                                     .exponential_(generator=generator) for generator in generators])
                noise = noise[torch.arange(len(rows))[:, None], rows % n]
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
        tokens, mask, logps = (x[:, :C].view(B, n, C) for x in (tokens, mask, logps))
        return Thoughts(tokens, mask, logps, rewards.view(B, n), rewards_no_cot)

    def decode_step(self, cache: GroupCache, token, is_reward, position) -> torch.Tensor:
        """Read one token a rollout (B, n), or [Reward] in its place, at a video's position (B, 1). Returns
        the last hidden states (B, n, H)."""
        embeds = self.qwen.get_input_embeddings()(token)
        embeds = torch.where(is_reward[..., None], self.query.to(embeds.dtype), embeds).flatten(0, 1)[:, None]
        positions = position.expand_as(token).reshape(1, -1, 1).expand(3, -1, -1)
        with self.autocast():
            out = self.qwen.model.language_model(inputs_embeds=embeds, position_ids=positions,
                                                 past_key_values=cache, use_cache=False)
        cache.step += 1
        return out.last_hidden_state.view(*token.shape, -1)

    def truncated(self, thoughts: Thoughts) -> torch.Tensor:
        """(B, n) bool: which CoTs ran into the token limit."""
        return ~((thoughts.tokens == self.processor.eos_id) & thoughts.mask).any(-1)

    def score(self, batch: Batch, cots: list[str | None]) -> torch.Tensor:
        """Score each of B videos after the given CoT, or after none where it is None: rewards (B,). One
        forward over [prompt, CoT, [Reward]], no logits; differentiable."""
        ids = [torch.tensor(self.processor.encode(cot or ""), dtype=torch.long) for cot in cots]
        length = torch.tensor([len(i) for i in ids], device=self.device)[:, None, None]
        pad = nn.utils.rnn.pad_sequence
        tokens = pad(ids, batch_first=True, padding_value=self.processor.eos_id)[:, None].to(self.device)
        mask = torch.arange(tokens.shape[-1], device=self.device) < length
        rewards = torch.zeros(len(batch), device=self.device)
        for rows, hidden, _, at_reward in self.runs(batch, tokens, mask):
            rewards[rows] = self.reward(hidden[torch.arange(len(rows)), at_reward[:, 0]])
        return rewards

    def group(self, batch: Batch, tokens: torch.Tensor,
              mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and rewards of the G CoTs of each of B videos, in one forward; differentiable.

        tokens and mask (B, G, C) as `think` returns them. Returns logps (B, G, C), 0 off the mask, and
        rewards (B, G)."""
        logps = torch.zeros(mask.shape, device=self.device)
        rewards = torch.zeros(mask.shape[:2], device=self.device)
        for rows, hidden, at_source, at_reward in self.runs(batch, tokens, mask):
            row, here = torch.arange(len(rows), device=self.device)[:, None], mask[rows]
            rewards[rows] = self.reward(hidden[row, at_reward])
            flat = self.token_logps(hidden[row[..., None], at_source][here], tokens[rows][here])
            logps[rows] = torch.zeros(here.shape, device=self.device).masked_scatter(here, flat)
        return logps, rewards

    def runs(self, batch: Batch, tokens: torch.Tensor, mask: torch.Tensor) -> Iterator[tuple]:
        """`forward_rows` for rows of like length together, so that little of what is computed is padding, and
        at most FORWARD_TOKENS: row numbers and what it returns for them. A sharded model takes all rows at
        once, for its ranks have to run in step."""
        batch = self.encode(batch)
        read = mask & (tokens != self.processor.eos_id)
        lengths = (batch.mask.sum(1) + (read.sum(-1) + 1).sum(-1)).tolist()
        lists = [rows for like in alike(lengths)
                 for rows in packed(like, [lengths[row] for row in like], FORWARD_TOKENS)]
        for rows in [list(range(len(batch)))] if isinstance(self, FSDPModule) else lists:
            yield rows, *self.forward_rows(batch.select(rows), tokens[rows], mask[rows])

    def forward_rows(self, batch: Batch, tokens: torch.Tensor, mask: torch.Tensor):
        """The language model over one row a video, [ prompt | c_1 [R] | … | c_G [R] ]: a group's one prefix.

        Each CoT sees the prompt and itself, and its positions go on where the prompt's end. Returns the
        hidden states (B, L, H), and where in L each CoT token is predicted from (B, G, C) and each [Reward]
        is read (B, G)."""
        (B, G, C), P = tokens.shape, batch.input_ids.shape[1]
        device = tokens.device
        # Lay the row out in slots, P for the prompt, C + 1 for each CoT. An end token is predicted, not read.
        read = mask & (tokens != self.processor.eos_id)
        length = read.sum(-1, keepdim=True)  # (B, G, 1)
        slot = torch.arange(C + 1, device=device)
        cot_ids = torch.cat([tokens, tokens.new_zeros(B, G, 1)], -1)
        prompt_end = batch.position_ids.amax((0, 2))  # text ends a prompt: its largest position is its last
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
        attention = layout = None  # a single CoT behind its prompt is plainly causal, and so is padding
        if G > 1 and self.attention == "flex":

            def visible(b, head, q, k):
                return (q >= k) & ((segment[b, k] == 0) | (segment[b, k] == segment[b, q]))

            attention = create_block_mask(visible, B, None, L, L, device=device)
        elif G > 1:
            causal = torch.ones(C + 1, C + 1, dtype=torch.bool, device=device).tril()
            prompt = batch.mask[:, None, None].expand(B, G, C + 1, P)
            visible = torch.cat([prompt, causal.expand(B, G, -1, -1)], 3)
            layout = Layout(place.clamp(min=0, max=L - 1), order, visible.flatten(0, 1)[:, None], P, G)
        hidden = self.read(batch, ids, positions, segment == 0, is_reward & used, attention_mask=attention,
                           layout=layout)
        cot_place = place[:, P:].view(B, G, C + 1)
        prompt_last = (batch.mask.sum(1) - 1)[:, None, None].expand(B, G, 1)
        at_source = torch.cat([prompt_last, cot_place[..., : max(C - 1, 0)]], -1)[..., :C]
        return hidden, at_source, cot_place.gather(-1, length)[..., 0]

    def token_logps(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log softmax(lm_head(hidden))[targets]: (N, H), (N,) → (N,) float32. Logits exist for one chunk at a
        time, in the backward too: it computes them again."""

        def logps(h, target):
            logits = self.logits(h)
            return logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)

        chunks = zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK))
        return torch.cat([checkpoint(logps, h, target, use_reentrant=False) for h, target in chunks])

    # -- what trains -----------------------------------------------------------------------------------------

    def set_trainable(self, lora_rank: int = 64, train_merger: bool = False,
                      train_vision: bool = False) -> None:
        """Choose what trains: [Reward] and the head always; the language model through LoRA adapters of the
        given rank (alpha = 2 · rank) or, at rank 0, all of it; the vision tower and its mergers where
        asked."""
        if self.quant and not lora_rank:
            raise DataError("4-bit weights cannot be trained themselves: --quant needs --lora-rank above 0")
        if lora_rank and not isinstance(self.backbone, PeftModel):
            self.backbone = get_peft_model(self.backbone, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank,
                                                                     target_modules=LORA_TARGETS))
        elif lora_rank and self.backbone.peft_config["default"].r != lora_rank:
            raise DataError(f"{self.source}: its adapter has rank {self.backbone.peft_config['default'].r}, "
                            f"not {lora_rank}; pass --lora-rank {self.backbone.peft_config['default'].r}, "
                            "or 0 to merge it")
        elif not lora_rank and isinstance(self.backbone, PeftModel):
            self.backbone = self.backbone.merge_and_unload()
        self.query.requires_grad_(True)
        self.head.requires_grad_(True)
        for name, parameter in self.backbone.named_parameters():
            merger, vision = "merger" in name, ".visual." in name
            if vision:
                wanted = train_merger if merger else train_vision
            else:
                wanted = not lora_rank or ".default." in name
            parameter.requires_grad_(wanted)
            if wanted and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()  # what trains is kept in float32

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def parameter_groups(self) -> tuple[dict, dict]:
        """What trains in two groups for an optimiser: [Reward] and the head, and the rest."""
        own = [self.query, self.head.weight]
        rest = [p for p in self.trainable().values() if not any(p is o for o in own)]
        return {"params": own}, {"params": rest}

    def summary(self) -> str:
        """What trains, with counts, in one line."""
        counts = {}
        for name, parameter in self.trainable().items():
            part = ("[Reward] and head" if name in ("query", "head.weight") else "LoRA" if ".lora_" in name
                    else "mergers" if "merger" in name else "vision tower" if ".visual." in name
                    else "language model")
            counts[part] = counts.get(part, 0) + parameter.numel()
        total = sum(p.numel() for p in self.parameters())
        trains = ", ".join(f"{part} {count:,}" for part, count in counts.items())
        return f"{trains} parameters train, of {total:,}"

    def keep_reference(self) -> None:
        """Remember the policy as it is now as the reference π_ref: with LoRA as a second, frozen adapter,
        else as a frozen copy of the whole."""
        if not isinstance(self.backbone, PeftModel):
            copied = copy.deepcopy(self).requires_grad_(False).to(self.dtype)
            self.reference = [copied]  # in a list: not a part of this model
            return
        self.backbone.add_adapter("reference", self.backbone.peft_config["default"])
        weights = dict(self.backbone.named_parameters())
        for name, parameter in weights.items():
            if ".reference." in name:
                parameter.data.copy_(weights[name.replace(".reference.", ".default.")].data)
                parameter.requires_grad_(False)
        self.backbone.base_model.set_adapter("default")

    @torch.no_grad()
    def reference_logps(self, batch: Batch, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The log-probabilities (B, G, C) of CoTs under the reference policy; see `group`."""
        if not isinstance(self.backbone, PeftModel):
            return self.reference[0].group(batch, tokens, mask)[0]
        trains = self.trainable().values()
        self.backbone.base_model.set_adapter("reference", inference_mode=True)
        try:
            return self.group(batch, tokens, mask)[0]
        finally:
            self.backbone.base_model.set_adapter("default")
            for parameter in trains:
                parameter.requires_grad_(True)

    # -- over many GPUs --------------------------------------------------------------------------------------

    def shard(self) -> None:
        """Split parameters, their gradients and the optimiser's state over all ranks (FSDP2), the reference's
        too. A layer is gathered when it is needed. [Reward] and the head are small and stay whole."""
        half = None if self.dtype == torch.float32 else self.dtype
        policy = MixedPrecisionPolicy(half, reduce_dtype=half and torch.float32, cast_forward_inputs=False)
        blocks = [*self.qwen.model.visual.blocks, *self.qwen.model.language_model.layers]
        for block in blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(self, mp_policy=policy, ignored_params={self.query, self.head.weight})
        # Which block is gathered ahead in the backward. Left to itself FSDP goes by the order of the
        # forwards, those of thinking included, of which ranks make different numbers.
        for block, before in zip(blocks, [self, *blocks]):
            block.set_modules_to_backward_prefetch([before])
        # Each of these is a forward, which gathers what is in no block; `encode` is part of them.
        for method in ("begin", "think", "score", "group"):
            register_fsdp_forward_method(self, method)
        self.begin()
        self.reshard()  # a root stays whole after a forward; what is to be trained are its parts
        for reference in getattr(self, "reference", []):
            reference.shard()

    def begin(self) -> None:
        """The first forward settles which module is the root of a sharded model; it must be the whole."""

    @contextmanager
    def gathered(self):
        """Within it a sharded model is whole on every rank and none waits for another: they may think as long
        as they like. For work without gradients; entered and left by all ranks together. Costs a copy of the
        weights, in the precision of the computation, for as long as it lasts."""
        parts = [part for model in (self, *getattr(self, "reference", [])) for part in model.modules()
                 if isinstance(part, FSDPModule)]
        for part in parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(not isinstance(part, DeScore), recurse=False)

    def idle(self, with_logps: bool) -> None:
        """A forward and a backward that count for nothing: what a rank of a sharded model does that has run
        out of work while others still have some, for layers are gathered by all ranks or by none."""
        side, frames = self.processor.settings.patch_size * self.processor.settings.merge_size, 2
        black = torch.zeros(frames, 3, side, side, dtype=torch.uint8)
        sample = self.processor.sample(black, [0.0] * frames, "")
        batch = self.processor.collate([sample]).to(self.device)
        if with_logps and not self.tower_trains:  # the update works on features that are there already
            count = int((batch.input_ids == self.processor.special["<|video_pad|>"]).sum())
            nothing = torch.zeros(count, len(self.query), dtype=self.dtype, device=self.device)
            levels = len(self.qwen.config.vision_config.deepstack_visual_indexes)
            batch = replace(batch, features=(nothing, [nothing] * levels))
        if with_logps:
            tokens = torch.full((1, 1, 1), self.processor.eos_id, device=self.device)
            out = sum(x.sum() for x in self.group(batch, tokens, torch.ones_like(tokens, dtype=torch.bool)))
        else:
            out = self.score(batch, [None]).sum()
        (0.0 * out).backward()

    # -- from and to disk ------------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | Path, dtype: torch.dtype | None = None,
             device: torch.device | str | None = None, video: dict | None = None,
             quant: str | None = None) -> "DeScore":
        """Load a saved DeScore, or a bare Qwen3-VL backbone with a fresh query and head.

        source: a directory or a hub id; dtype: of the frozen weights, by default bfloat16 on a GPU and
        float32 on a CPU; video: `VideoSettings` that differ from what was saved; quant: "4bit" keeps the
        language model's linear layers in NF4 with double quantisation (QLoRA, arXiv 2305.14314), computing in
        dtype. Raises DataError saying what was looked for and where."""
        if (Path(source) / "model" / "descore.json").is_file():
            source = Path(source) / "model"  # a run's folder stands for the model that it ended with
        source, directory = str(source), Path(source)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        saved = read_json(directory / "descore.json") if (directory / "descore.json").is_file() else {}
        for key, kind in (("backbone", str), ("video", dict), ("instruction", (str, type(None)))):
            if key in saved and not isinstance(saved[key], kind):
                raise DataError(f"{directory / 'descore.json'}: {key!r} is {saved[key]!r}")
        try:
            settings = VideoSettings(**saved.get("video", {}) | (video or {}))
        except TypeError as error:
            raise DataError(f"{directory / 'descore.json'}: video settings that make no sense "
                            f"({error})") from error
        backbone = saved.get("backbone", source)  # an adapter names its backbone; full weights are one
        if directory.is_dir() and not saved and not (directory / "config.json").is_file():
            raise DataError(f"{source}: neither descore.json (a saved DeScore) nor config.json (a Qwen3-VL, "
                            "or with rm_head.pth a release of DeScore) is in it")
        if (directory / backbone).is_dir():
            backbone = os.path.normpath(directory / backbone)
        try:
            config = AutoConfig.from_pretrained(backbone)
            wrong = None if config.model_type == "qwen3_vl" else f"it is a {config.model_type}"
            if not wrong:
                nf4 = BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=[r".*\.visual", "lm_head"])
                smaller = {"quantization_config": nf4, "device_map": {"": device}} if quant else {}
                qwen = Qwen3VLForConditionalGeneration.from_pretrained(
                    backbone, dtype=dtype, use_safetensors=True, **smaller)
                tokenizer = AutoTokenizer.from_pretrained(backbone)
        except (OSError, ValueError, SafetensorError) as error:
            wrong = str(error)
        if wrong:
            raise DataError(f"{backbone}: no Qwen3-VL can be loaded from this directory or hub id: {wrong}")
        vision = config.vision_config
        settings = replace(settings, patch_size=vision.patch_size,
                           temporal_patch_size=vision.temporal_patch_size,
                           merge_size=vision.spatial_merge_size)
        model = cls(qwen, Processor(tokenizer, settings, saved.get("instruction", INSTRUCTION)), backbone)
        model.dtype, model.quant = dtype, quant
        model.info = {key: value for key, value in saved.items()
                      if key not in ("backbone", "video", "instruction")}
        if (directory / "adapter_config.json").is_file():
            if not (directory / "adapter_model.safetensors").is_file():
                raise DataError(f"{source}: it has adapter_config.json but no adapter_model.safetensors")
            try:
                model.backbone = PeftModel.from_pretrained(qwen, source)
            except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
                raise DataError(f"{source}: its adapter cannot be loaded on {backbone} ({error})") from error
        if (directory / "descore.safetensors").is_file():
            try:
                weights = load_file(directory / "descore.safetensors")
            except (OSError, SafetensorError) as error:
                raise DataError(f"{directory / 'descore.safetensors'}: cannot be read ({error})") from error
            own = model.state_dict()
            for name, tensor in weights.items():
                if name not in own or own[name].shape != tensor.shape:
                    raise DataError(f"{directory / 'descore.safetensors'}: {name} {tuple(tensor.shape)} does "
                                    f"not fit {backbone}")
            model.load_state_dict(weights, strict=False)
        elif "backbone" in saved:
            raise DataError(f"{source}: descore.safetensors (query vector and head) is missing")
        if (directory / "rm_head.pth").is_file():
            model.load_release(directory / "rm_head.pth")
        model.requires_grad_(False)
        if quant:  # 4-bit weights are on the device and stay as they are
            for module in model.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):  # packed in eval mode, without gradients
                    module.support_avx512bf16_for_cpu = False
            model.query.data, model.head = model.query.data.to(device), model.head.to(device)
            return model.eval()
        return model.to(device).eval()

    def load_release(self, path: Path) -> None:
        """Query and head of a checkpoint in the layout of DeScore's release: the row of the token <Reward> in
        the embedding, and rm_head.pth, of which nothing but tensors is unpickled."""
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            head = weights["rm_head.weight"] if "rm_head.weight" in weights else weights["weight"]
            self.head.weight.data.copy_(head.reshape(self.head.weight.shape))
        except Exception as error:  # whatever a hostile or broken file makes the unpickler raise
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path}: holds no head that can be read safely ({reason})") from error
        tokenizer, embedding = self.processor.tokenizer, self.qwen.get_input_embeddings().weight
        token = tokenizer.convert_tokens_to_ids("<Reward>")
        if token in (None, tokenizer.unk_token_id) or token >= len(embedding):
            raise DataError(f"{path.parent}: rm_head.pth is there, but the tokenizer or the embedding has no "
                            "<Reward>")
        self.query.data.copy_(embedding[token])
        self.info["scoring_layout"] = "release"

    def save(self, directory: str | Path, write: bool = True, **info) -> None:
        """Write the model to a directory (README, "A saved model"), safetensors and JSON only. `info` goes
        into descore.json. The directory is written beside its place and renamed into it: it is complete or
        absent. Of a sharded model all ranks take part, and one is to `write`."""
        weights = {}
        if not isinstance(self.backbone, PeftModel):
            weights = {name: whole(p) for name, p in self.qwen.state_dict().items()}
        if not write:
            return
        directory = Path(directory)
        beside = directory.with_name(directory.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        self.info |= info
        processor = self.processor
        record = self.info | {"video": asdict(processor.settings), "instruction": processor.instruction}
        own = {"query": self.query, "head.weight": self.head.weight}
        if isinstance(self.backbone, PeftModel):
            local = os.path.isdir(self.source)
            record["backbone"] = os.path.relpath(self.source, directory.resolve()) if local else self.source
            own |= {name: p for name, p in self.trainable().items() if ".lora_" not in name}  # mergers, say
            adapter = get_peft_model_state_dict(self.backbone, adapter_name="default",
                                                save_embedding_layers=False)
            adapter = {name: tensor.contiguous() for name, tensor in adapter.items()}
            save_file(adapter, beside / "adapter_model.safetensors")
            config = self.backbone.peft_config["default"]
            config.base_model_name_or_path = record["backbone"]
            config.save_pretrained(beside)
        else:
            self.qwen.save_pretrained(beside, state_dict=weights)
        own = {name: tensor.detach().contiguous() for name, tensor in own.items()}
        save_file(own, beside / "descore.safetensors")
        processor.tokenizer.save_pretrained(beside)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (beside / "descore.json").write_text(text, encoding="utf-8")
        put_in_place(beside, directory)

    # -- many videos -----------------------------------------------------------------------------------------

    def judge(self, keys: list[tuple[str, str]], max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
              max_tokens: int = MAX_TOKENS, done: Collection[tuple[str, str]] = (), samples: int = 1,
              think: bool = True, without_cot: bool = False, workers: int = 0,
              numbers: list[int] | None = None) -> Iterator[dict]:
        """Think about and score many (video, prompt) keys but those that are `done`. Keys of like length go
        together, the longest first, as many as make max_tokens with the CoTs they may write. `numbers` says
        which keys these are among all, where there are more: what is sampled for a video depends on its
        number alone.

        Yields one dict a key: video, prompt, cot, truncated, reward; with more `samples` than one, reward is
        the mean over so many CoTs, reward_std their spread, and cot the first. `without_cot` adds
        reward_no_cot; without `think` that is all there is."""
        sizes = [length + samples * max_new_tokens * think for length in self.processor.lengths(keys)]
        groups = packed(list(zip(numbers or range(len(keys)), keys)), sizes, max_tokens)
        # What is still to do keeps the company it would have had.
        groups = [group for group in groups if any(key not in done for _, key in group)]
        release = self.info.get("scoring_layout") == "release"
        batches = self.processor.batches([[[key] for _, key in group] for group in groups], workers)
        for group, (batch, _, bad) in zip(groups, batches):
            if bad:
                raise DataError(bad[0]["error"])
            rows = [key for _, key in group]
            out = [{"video": video, "prompt": prompt} for video, prompt in rows]
            with torch.no_grad():
                batch = self.encode(batch)
                if think:
                    seeds = [draw_seed(seed, number) for number, _ in group]
                    thoughts = self.think(batch, samples, max_new_tokens, temperature, seeds=seeds,
                                          without_cot=without_cot and not release)
                    cut = self.truncated(thoughts)
                    cots = [[self.processor.decode(thoughts.tokens[i, g][thoughts.mask[i, g]])
                             for g in range(samples)] for i in range(len(rows))]
                    rewards = thoughts.rewards
                    if release:
                        rewards = [self.score_release(rows, batch, some) for some in zip(*cots)]
                        rewards = torch.stack(rewards, 1)
                    for i, record in enumerate(out):
                        record |= {"cot": cots[i][0], "truncated": cut[i, 0].item(),
                                   "reward": rewards[i].mean().item()}
                        if samples > 1:
                            record["reward_std"] = rewards[i].std().item()
                if without_cot or not think:
                    none = [None] * len(rows)
                    rewards = (self.score_release(rows, batch, none) if release
                               else thoughts.rewards_no_cot if think else self.score(batch, none))
                    for record, reward in zip(out, rewards):
                        record["reward_no_cot"] = reward.item()
            yield from (record for record, key in zip(out, rows) if key not in done)

    def score_release(self, keys: list[tuple[str, str]], batch: Batch,
                      cots: list[str | None]) -> torch.Tensor:
        """Score as DeScore's release does: the CoT is read again, inside the user's turn, and [Reward]
        follows it there. For models that were trained so; costs a second pass. `batch` holds the same videos,
        encoded."""
        samples = [self.processor.outline(video, prompt, cot or "")
                   for (video, prompt), cot in zip(keys, cots)]
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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered from all ranks, on the CPU; any other as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def put_in_place(beside: Path, place: Path) -> None:
    """Rename a directory that was written beside its place into it, its content safe on the disk first."""
    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    for path in [*beside.rglob("*"), beside]:
        sync(path)
    remove(place)
    beside.rename(place)
    sync(place.parent)


def remove(directory: Path) -> None:
    """Delete a directory such that it is never there by half under its own name."""
    if directory.is_dir():
        shutil.rmtree(directory.rename(directory.with_name(directory.name + ".removed")))
