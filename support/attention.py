"""Attention over a prompt that a group of CoTs shares: while they are written (`GroupCache`),
and when they stand in one row behind it (`row_attention`).

Importing this registers the attention "descore_group" with transformers; a model that does
not ask for it by that name never meets it."""

from typing import NamedTuple

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class GroupCache:
    """Keys and values while thinking: a prompt's are stored once, its n CoTs' in buffers
    sized once.

    It stands in for a transformers cache: each attention layer calls `update`. During
    prefill it keeps the prompts' keys and values; each later call writes one token a CoT and
    hands both parts to `group_attention`."""

    def __init__(self, prompt_mask: torch.Tensor, n: int, max_new: int):
        self.n = n
        self.max_new = max_new
        self.step = 0
        # Padding of shorter prompts, as a bias on the attention scores: (B, 1, 1, 1, P).
        bias = torch.zeros(prompt_mask.shape, device=prompt_mask.device)
        self.bias = bias.masked_fill(~prompt_mask, float("-inf"))[:, None, None, None]
        self.prompt = {}  # layer → (keys, values)
        self.own = {}
        self.prefilled: list[int] | None = None  # the videos whose prompts are in prefill

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        if self.prefilled is not None:  # (b, kv heads, p, d) of b of the B videos
            if layer not in self.prompt:
                self.allocate(layer, keys, values)
            p = keys.shape[2]
            for buffer, new in zip(self.prompt[layer], (keys, values)):
                buffer[self.prefilled, :, :p] = new
            return keys, values
        for buffer, new in zip(self.own[layer], (keys, values)):  # (B · n, kv heads, 1, d)
            buffer[:, :, :, self.step] = new.view(*buffer.shape[:3], -1)
        own_k, own_v = (buffer[:, :, :, : self.step + 1] for buffer in self.own[layer])
        prompt_k, prompt_v = self.prompt[layer]
        return (prompt_k, own_k, self.bias), (prompt_v, own_v)

    def allocate(self, layer: int, *parts: torch.Tensor) -> None:
        _, heads, _, d = parts[0].shape
        B, *_, P = self.bias.shape
        self.prompt[layer] = tuple(part.new_zeros(B, heads, P, d) for part in parts)
        own = (B, self.n, heads, self.max_new, d)
        self.own[layer] = tuple(part.new_empty(own) for part in parts)

    def keep(self, videos: torch.Tensor, columns: torch.Tensor) -> None:
        """Go on with some videos (b,) and for each with some of its CoTs (b, n')."""
        self.n = columns.shape[1]
        self.bias = self.bias[videos]
        for layer in self.prompt:
            self.prompt[layer] = tuple(part[videos] for part in self.prompt[layer])
            own = self.own[layer]
            self.own[layer] = tuple(buffer[videos[:, None], columns] for buffer in own)


class RowLayout(NamedTuple):
    """Where the parts of packed rows stand. In slots a row is laid out evenly: P for the
    prompt and C + 1 for each of G CoTs, used or not."""

    place: torch.Tensor  # (B, P + G (C + 1)) slot → place in the row
    order: torch.Tensor  # (B, L) place in the row → slot
    # What a CoT's slots see of its prompt's slots and of its own:
    visible: torch.Tensor  # (B · G, 1, C + 1, P + C + 1) bool
    P: int
    G: int


class Rows(NamedTuple):
    """Rows [ prompt | c_1 [R] | … | c_G [R] ] as the language model reads them, without gaps."""

    ids: torch.Tensor  # (B, L)
    positions: torch.Tensor  # (3, B, L)
    in_prompt: torch.Tensor  # (B, L) bool
    is_reward: torch.Tensor  # (B, L) bool
    at_source: torch.Tensor  # (B, G, C) where in L each CoT token is predicted from
    at_reward: torch.Tensor  # (B, G) where in L each [Reward] stands
    layout: RowLayout | None  # None: plainly causal


def pack_rows(prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, prompt_positions: torch.Tensor,
              tokens: torch.Tensor, inputs: torch.Tensor) -> Rows:
    """Put the G CoTs of each of B videos behind one copy of its prompt. prompt_ids and prompt_mask
    (B, P), prompt_positions (3, B, P); tokens (B, G, C), of which `inputs` (bool) are read."""
    B, G, C = tokens.shape
    P = prompt_ids.shape[1]
    device = tokens.device
    length = inputs.sum(-1, keepdim=True)  # (B, G, 1)
    # Lay the row out in slots, P for the prompt, C + 1 for each CoT with its [Reward].
    slot = torch.arange(C + 1, device=device)
    ids = torch.cat([tokens, tokens.new_zeros(B, G, 1)], -1)
    ids = torch.cat([prompt_ids, ids.flatten(1)], 1)
    used = torch.cat([prompt_mask, (slot <= length).flatten(1)], 1)
    is_reward = torch.cat([torch.zeros_like(prompt_mask), (slot == length).flatten(1)], 1)
    in_prompt = torch.arange(P + G * (C + 1), device=device).expand(B, -1) < P
    # A prompt ends with text, so its largest position is its last.
    start = prompt_positions.amax((0, 2))[:, None, None] + 1
    positions = (start + slot).expand(B, G, -1).flatten(1).expand(3, -1, -1)
    positions = torch.cat([prompt_positions, positions], 2)
    # Close the gaps: only slots in use are computed.
    place = used.long().cumsum(1) - 1  # slot → place in the packed row
    L = int(used.sum(1).max())
    order = (~used).long().argsort(dim=1, stable=True)[:, :L]  # place → slot
    layout = None  # a single CoT behind its prompt is plainly causal, and so is padding
    if G > 1:
        causal = torch.ones(C + 1, C + 1, dtype=torch.bool, device=device).tril()
        prompt = prompt_mask[:, None, None].expand(B, G, C + 1, P)
        visible = torch.cat([prompt, causal.expand(B, G, -1, -1)], 3).flatten(0, 1)[:, None]
        layout = RowLayout(place.clamp(min=0, max=L - 1), order, visible, P, G)
    cot_place = place[:, P:].view(B, G, C + 1)
    prompt_last = (prompt_mask.sum(1) - 1)[:, None, None].expand(B, G, 1)
    at_source = torch.cat([prompt_last, cot_place[..., : max(C - 1, 0)]], -1)[..., :C]
    return Rows(ids.gather(1, order), positions.gather(2, order.expand(3, -1, -1)),
                (in_prompt & used).gather(1, order), (is_reward & used).gather(1, order),
                at_source, cot_place.gather(-1, length)[..., 0], layout)


def row_attention(query, key, value, layout: RowLayout, scaling: float) -> torch.Tensor:
    """Attention over packed rows, of which only what is seen is computed: a prompt on itself,
    a CoT on both. A mask over whole rows would compute each CoT on all others, to throw it
    away. query (B, heads, L, d) → (B, L, heads, d)."""
    P = layout.P
    G = layout.G
    sdpa = nn.functional.scaled_dot_product_attention

    def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def of_cots(x: torch.Tensor) -> torch.Tensor:  # (B, G, heads, C + 1, d)
        return x[:, :, P:].unflatten(2, (G, -1)).transpose(1, 2)

    def with_prompt(x: torch.Tensor) -> torch.Tensor:  # (B · G, kv heads, P + C + 1, d)
        prompt = x[:, None, :, :P].expand(-1, G, -1, -1, -1)
        return torch.cat([prompt, of_cots(x)], 3).flatten(0, 1)

    q, k, v = (take(x, layout.place) for x in (query, key, value))
    prompts = sdpa(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True, scale=scaling,
                   enable_gqa=True)
    # No fused kernel has both a mask and fewer kv heads, and keys are not copied for each head:
    # the heads of a kv head stand one behind the other, as if their CoT were so much longer.
    kv = key.shape[1]
    heads = query.shape[1] // kv
    folded = of_cots(q).unflatten(2, (kv, heads)).flatten(3, 4).flatten(0, 1)
    cots = sdpa(folded, with_prompt(k), with_prompt(v), layout.visible.repeat(1, 1, heads, 1),
                scale=scaling)
    cots = cots.unflatten(2, (heads, -1)).flatten(1, 2)  # (B · G, heads, C + 1, d)
    cots = cots.unflatten(0, (-1, G)).transpose(1, 2).flatten(2, 3)
    return take(torch.cat([prompts, cots], 2), layout.order).transpose(1, 2)


def group_attention(module, query, key, value, attention_mask, scaling,
                    layout: RowLayout | None = None, **kwargs):
    """What the language model calls: rows with a layout go to `row_attention`, one new token
    a CoT with the keys of a `GroupCache` to `decode_attention`, anything else to SDPA."""
    if layout:
        return row_attention(query, key, value, layout, scaling), None
    if isinstance(key, tuple):
        return decode_attention(query, key, value, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask,
                                  scaling=scaling, **kwargs)


def decode_attention(query, key: tuple, value: tuple, scaling: float) -> torch.Tensor:
    """Attention of one new token a CoT over its prompt and its own tokens. The queries of a
    group meet the prompt's keys in one matrix product: the prompt is read once a group, not
    once a CoT.

    query (B · n, heads, 1, d); key and value as `GroupCache.update` hands them on."""
    prompt_k, own_k, bias = key
    prompt_v, own_v = value
    B, n, kv, T, d = own_k.shape
    P = prompt_k.shape[2]
    q = query.reshape(B, n, kv, -1, d) * scaling  # (B, n, kv, heads a kv head, d)
    folded = q.transpose(1, 2).flatten(2, 3)  # (B, kv, n · heads a kv head, d)
    on_prompt = folded @ prompt_k.transpose(-1, -2)
    on_prompt = on_prompt.unflatten(2, (n, -1)).transpose(1, 2)  # (B, n, kv, ·, P)
    on_own = q @ own_k.transpose(-1, -2)  # (B, n, kv, ·, T)
    weights = torch.cat([on_prompt.float() + bias, on_own.float()], dim=-1).softmax(-1)
    on_prompt, on_own = weights.to(query.dtype).split([P, T], dim=-1)
    out = on_prompt.transpose(1, 2).flatten(2, 3) @ prompt_v
    out = out.unflatten(2, (n, -1)).transpose(1, 2) + on_own @ own_v
    return out.reshape(B * n, 1, -1, d)


ALL_ATTENTION_FUNCTIONS.register("descore_group", group_attention)
