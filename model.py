"""DeScore: a Qwen3-VL that thinks, then scores.

    sequence   I(v, t, c) = [ video tokens, instruction with t, c, [Reward] ]
    score      r = w · h([Reward])

Four things make it fast, and all are in this file:

  encode   the vision tower sees a video once; everything after works on what it made of it
  think    a prompt is prefilled once for all its rollouts; they share its keys and values
  score    [Reward] is one more decode step on the cache that thinking left behind
  group    for the update, the rollouts of a video stand in one row behind one copy of its
           prompt, [ prompt | c_1 [R] | c_2 [R] | … | c_G [R] ], and one forward gives
           log-probabilities and scores

[Reward] is a vector appended to the input embeddings, not a word: no text can contain it. A
CoT ends with the token <|im_end|>, which is predicted like any other but never an input:
[Reward] stands in its place.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3VLForConditionalGeneration

from data import Batch, DataError, Processor, VideoSettings, checked
from support import saved
from support.attention import GroupCache, pack_rows
from support.batches import group_by_length, pack_by_budget
from support.command import (
    LEAST_PENALTY,
    LEAST_TEMPERATURE,
    LEAST_TOP_P,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from support.shard import is_sharded

# What LoRA adapts: the language model's linear layers, not lm_head, embeddings, vision tower. A
# mixture's experts and router are no linear layers: there it is attention (and what is dense).
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
# CoT tokens whose logits exist at one time: 2048 · 151,936 · 4 bytes = 1.2 GB.
LOGITS_CHUNK = 2048
OWN = ("query", "head.")  # the names of what is not the backbone


class Thoughts(NamedTuple):
    """What thinking gives: n CoTs for each of B videos, and the score that follows each.
    Whatever returns this can stand for `DeScore.think`."""

    tokens: Tensor  # (B, n, C) the end token included where there is one
    mask: Tensor  # (B, n, C) bool
    logps: Tensor  # (B, n, C) log π(token | before) at the temperature; 0 off the mask
    scores: Tensor  # (B, n)
    scores_no_cot: Tensor | None = None  # (B,) right behind the prompt, if asked for
    parts: Tensor | None = None  # (B, n, K) what the head gives, of which the scores are made
    sampler_gap: Tensor | None = None  # (B, n) how far at most from logps those of another sampler are
    errors: list[str | None] | None = None  # (B) why there are none, of another thinker


class DeScore(nn.Module):
    """A Qwen3-VL backbone, the learnable query [Reward], and a linear head without bias."""

    def __init__(self, backbone: Qwen3VLForConditionalGeneration, processor: Processor,
                 source: str):
        super().__init__()
        self.backbone = backbone
        self.processor = processor
        self.source = source  # of the backbone
        self.name = source  # for messages: where the whole was loaded from
        self.eos = processor.eos_id
        self.info: dict = {}  # what else descore.json says: training, score_mean, score_std
        self.dtype = backbone.dtype  # of frozen weights; what trains is float32
        self.quant: str | None = None  # "4bit": of the frozen linear layers
        self.changed: set[str] = set()  # weights beside the adapter that training has changed
        self.backbone_sha256: str | None = None  # what was at `source` (support/digests.py)
        self.has_head = False  # whether query and head are trained, or going to be
        self.max_tokens = 16_384  # of rows that go through `group` together; one row at least
        self._reference: list[DeScore] = []  # in a list: not a part of this model
        # [Reward] and the head, drawn at random until they are trained or loaded.
        text = self.qwen.config.text_config
        text._attn_implementation = "descore_group"
        self.query = nn.Parameter(torch.empty(text.hidden_size))
        self.query.data.normal_(std=text.initializer_range)
        self.head = nn.Linear(text.hidden_size, 1, bias=False)
        nn.init.normal_(self.head.weight, std=text.hidden_size**-0.5)

    @property
    def qwen(self) -> Qwen3VLForConditionalGeneration:
        """The backbone itself, whether or not LoRA is wrapped around it."""
        adapted = isinstance(self.backbone, PeftModel)
        return self.backbone.get_base_model() if adapted else self.backbone

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def tower_trains(self) -> bool:
        tower = self.qwen.model.visual
        return any(p.requires_grad for p in tower.parameters())

    def autocast(self):
        """Lets float32 weights that train work among frozen ones in bfloat16."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        dtype = self.dtype if half else None
        return torch.autocast(self.device.type, dtype, enabled=half)

    # -- from a video to hidden states, log-probabilities and a score

    def encode(self, batch: Batch) -> Batch:
        """Move a batch to the device, add positions, and run the vision tower on its videos,
        if not yet done. With the tower frozen the features may be kept."""
        if batch.position_ids is None:
            is_video = batch.input_ids == self.processor.video_id
            kinds = 2 * is_video.int()  # 0 text, 2 video
            positions, _ = self.qwen.model.get_rope_index(
                batch.input_ids, kinds, video_grid_thw=batch.grid, attention_mask=batch.mask)
            batch = replace(batch, position_ids=positions)
        batch = batch.to(self.device)
        if batch.features is not None:
            return batch
        # A frozen tower keeps no activations, though the rest may train.
        trains = self.tower_trains and torch.is_grad_enabled()
        with torch.set_grad_enabled(trains), self.autocast():
            pixels = batch.patches.float() / 127.5 - 1  # mean = std = 0.5
            pixels = pixels.to(self.dtype)
            out = self.qwen.model.visual(pixels, grid_thw=batch.grid)
        features = (out.pooler_output, out.deepstack_features)
        return replace(batch, patches=batch.patches[:0], features=features)

    def embed(self, ids: Tensor, is_reward: Tensor) -> Tensor:
        """The input embeddings of tokens, and the query where [Reward] stands: ids and is_reward
        (B, L) → (B, L, H)."""
        embeds = self.qwen.get_input_embeddings()(ids)
        query = self.query.to(embeds.dtype)
        return torch.where(is_reward[..., None], query, embeds)

    def hidden_states(self, batch: Batch, ids, positions, in_prompt, is_reward, **kwargs):
        """Run the language model over rows that hold the batch's videos: ids (B, L), positions
        (3, B, L). in_prompt (B, L) marks where alone video tokens are videos, is_reward (B, L)
        [Reward]. Returns the last hidden states (B, L, H)."""
        features, deepstack = batch.features
        embeds = self.embed(ids, is_reward)  # (B, L, H)
        # A CoT may hold a video token too, which is text there.
        is_video = in_prompt & (ids == self.processor.video_id)
        embeds = embeds.masked_scatter(is_video[..., None], features.to(embeds.dtype))
        with self.autocast():
            out = self.qwen.model.language_model(
                inputs_embeds=embeds, position_ids=positions, visual_pos_masks=is_video,
                deepstack_visual_embeds=deepstack, use_cache=False, **kwargs)
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits in float32: (..., H) → (..., V)."""
        with self.autocast():
            return self.qwen.lm_head(hidden).float()

    def read_parts(self, hidden: Tensor, at_reward: Tensor | None = None) -> Tensor:
        """What the head says, in float32. This is where the states that it reads are picked.

        Of whole rows, hidden (B, L, H) with the places at_reward (B, G) of each [Reward] in L:
        (B, G, K). Of the states at [Reward] alone, hidden (..., H), which is all that a decode step
        has: (..., K). NaN where the head is not trained."""
        if at_reward is not None:
            row = torch.arange(len(hidden), device=hidden.device)
            hidden = hidden[row[:, None], at_reward]
        hidden = hidden.to(self.query.dtype)
        parts = self.head(hidden).float()
        return parts if self.has_head else torch.full_like(parts, torch.nan)

    def overall(self, parts: Tensor) -> Tensor:
        """The score of what the head says: (..., K) → (...). Here K = 1 and r = w · h([Reward])."""
        return parts[..., 0].clone()  # FSDP wants no view of what a forward returns

    def check_head(self) -> None:
        """DataError unless there is a head whose scores mean something."""
        if not self.has_head:
            raise DataError(f"{self.name}: has no trained [Reward] and head: it can think, "
                            "but a score would be made up; see coldstart.py")

    # -- think, then score

    def own_penalty(self, temperature: float) -> float:
        """The repetition penalty with which it thinks unless told otherwise: 1, none."""
        return 1.0

    @torch.no_grad()
    def think(
            self, batch: Batch, n: int = 1, max_new_tokens: int = 4096,
            temperature: float = 1.0, top_p: float = 1.0,
            seeds: list[int] | None = None, without_cot: bool = False,
            repetition_penalty: float | None = None) -> Thoughts:
        """Write n CoTs for each of the batch's B videos and score each where it ends (Section
        "Inference"); one that reaches max_new_tokens is scored as it stands.

        `seeds`, one a video, by default from torch's own generator, decide what is drawn for it
        in any company. `without_cot` also scores the videos themselves, on the same prefill.
        `repetition_penalty`, above 1, makes what the prompt or the CoT holds less likely to be
        chosen at temperature 0 (`penalised`), by default `own_penalty`; logps stay those of the
        policy, without it."""
        if repetition_penalty is None:
            repetition_penalty = self.own_penalty(temperature)
        check_sampling(temperature, top_p, repetition_penalty)
        most = self.qwen.config.text_config.max_position_embeddings
        if max_new_tokens > most:
            raise DataError(f"{max_new_tokens:,} new tokens: {self.name} knows {most:,} positions")
        was_training = self.training
        self.eval()
        batch = self.encode(batch)
        if seeds is None:
            drawn = torch.randint(2**62, (len(batch),))
            seeds = drawn.tolist()
        uniform = uniform_numbers(seeds, n, max_new_tokens).to(self.device)
        cache, hidden = self.prefill(batch, n, max_new_tokens)
        # The first token behind a prompt follows the largest position in it: (B, n).
        last = batch.position_ids.amax((0, 2))  # (B,)
        next_place = last + 1
        position = next_place[:, None].expand(-1, n)
        scores_no_cot = None
        if without_cot:
            everywhere = torch.ones_like(position, dtype=torch.bool)
            behind = self.decode_step(cache, position * 0, everywhere, position)
            parts = self.read_parts(behind[:, 0])  # (B, K), the same for all n
            scores_no_cot = self.overall(parts)
            cache.step = 0  # the first token of the CoTs takes its place
        held = None
        if repetition_penalty != 1:
            held = tokens_held(batch, n, self.qwen.config.text_config.vocab_size)
        thoughts = self.sample(cache, hidden, position, uniform, temperature, top_p, held,
                               repetition_penalty)
        self.train(was_training)
        return thoughts._replace(scores_no_cot=scores_no_cot)

    def prefill(self, batch: Batch, n: int, max_new_tokens: int) -> tuple:
        """Run the prompts of an encoded batch, those of like length together. Returns the cache
        for n rollouts a video, and the hidden states at the prompts' ends (B, n, H)."""
        cache = GroupCache(batch.mask, n, max_new_tokens + 1)
        shape = (len(batch), len(self.query))
        ends = torch.empty(shape, dtype=self.dtype, device=self.device)  # (B, H)
        lengths = batch.mask.sum(1)
        for rows in group_by_length(lengths.tolist()):
            cache.prefilled = rows
            alike = batch.select(rows)
            no_reward = torch.zeros_like(alike.mask)
            hidden = self.hidden_states(alike, alike.input_ids, alike.position_ids, alike.mask,
                                        no_reward, past_key_values=cache)
            row = torch.arange(len(rows))
            last = hidden[row, lengths[rows] - 1]
            ends[rows] = last.to(ends.dtype)
        cache.prefilled = None
        # A copy: in bfloat16 oneDNN is very slow with rows of stride 0, and copies lm_head for them.
        hidden = ends[:, None].repeat(1, n, 1)
        return cache, hidden

    def sample(
            self, cache: GroupCache, hidden: Tensor, position: Tensor, uniform: Tensor,
            temperature: float, top_p: float,
            held: Tensor | None = None, repetition_penalty: float = 1.0) -> Thoughts:
        """The sampling loop. hidden (B, n, H), position (B, n) of the first token to come,
        uniform (B, n, C) numbers in [0, 1) that decide what is drawn. held (B · n, V) bool: which
        tokens the prompt holds, where there is a repetition penalty; those chosen are added."""
        B, n, C = uniform.shape
        count = B * n
        device = self.device
        # What is written: a row per rollout.
        tokens = torch.full((count, C), self.eos, device=device)
        logps = torch.zeros(count, C, device=device)
        parts = torch.zeros_like(self.read_parts(hidden)).flatten(0, 1)  # (B · n, K)
        done = torch.zeros(count, dtype=torch.bool, device=device)
        # Which of these rows are still computed; hidden, over, token and so on are of them.
        rows = torch.arange(count, device=device).view(B, n)
        position = position.flatten()
        uniform = uniform.flatten(0, 1)
        for step in range(C):
            over = done[rows]
            logits = self.logits(hidden) / (temperature or 1.0)
            if temperature:
                token = draw(logits, uniform[rows, step], top_p)
            elif held is None:
                token = logits.argmax(-1)
            else:
                token = penalised(logits, held[rows], repetition_penalty).argmax(-1)
                held[rows, token] = True
            token = token.masked_fill(over, self.eos)
            logp = log_probability(logits, token)
            tokens[rows, step] = token
            logps[rows, step] = logp.masked_fill(over, 0)
            # The next input is the token; where a CoT ends now it is [Reward], and the head reads.
            ends = ~over & (token == self.eos)
            place = position[rows] + step
            hidden = self.decode_step(cache, token, ends, place)
            said = self.read_parts(hidden)
            parts[rows] = torch.where(ends[..., None], said, parts[rows])
            done[rows] = over | ends
            if step % 16 == 15:  # asking costs a wait for the device, so not every step
                rows, hidden = drop_finished(cache, rows, hidden, ~done[rows])
                if not rows.numel():
                    break
        unended = ~done[rows]
        if unended.any():  # [Reward] after what never ended
            last = tokens[rows, -1]
            place = position[rows] + C
            hidden = self.decode_step(cache, last, unended, place)
            said = self.read_parts(hidden)
            parts[rows] = torch.where(unended[..., None], said, parts[rows])
        is_end = (tokens == self.eos).long()
        ended_before = is_end.cumsum(-1) - is_end
        mask = ended_before == 0  # up to the first end token
        longest = int(mask.any(0).sum())
        tokens = tokens[:, :longest].view(B, n, -1)
        mask = mask[:, :longest].view(B, n, -1)
        logps = logps[:, :longest].view(B, n, -1)
        parts = parts.view(B, n, -1)
        return Thoughts(tokens, mask, logps, self.overall(parts), parts=parts)

    def decode_step(self, cache: GroupCache, token, is_reward, position) -> Tensor:
        """One more input a rollout: a token, or [Reward] in its place, and its position, all
        (B, n). Returns the last hidden states (B, n, H)."""
        embeds = self.embed(token, is_reward).flatten(0, 1)  # (B · n, H)
        # Of text, time, row and column are the same position.
        positions = position.reshape(1, -1, 1).expand(3, -1, -1)
        with self.autocast():
            out = self.qwen.model.language_model(
                inputs_embeds=embeds[:, None], position_ids=positions, past_key_values=cache,
                use_cache=False)
        cache.step += 1
        return out.last_hidden_state.view(*token.shape, -1)

    def truncated(self, thoughts: Thoughts) -> Tensor:
        """(B, n) bool: which CoTs ran into the token limit."""
        is_end = thoughts.tokens == self.eos
        ended = (is_end & thoughts.mask).any(-1)
        return ~ended

    # -- CoTs that are there already: their scores and log-probabilities

    @property
    def scoring_settings(self) -> VideoSettings:
        """How it sees a video that it scores; for thinking the processor's settings hold."""
        return self.processor.settings

    def watch(self, batch: Batch) -> Batch:
        """Encode a batch as its videos are seen for scoring: here no otherwise than for thinking.
        What it returns can be scored behind many CoTs."""
        return self.encode(batch)

    def score(self, batch: Batch, cots: list[str | None]) -> Tensor:
        """Score each of B videos after the given CoT, or after none where it is None: scores (B,).
        One forward over [ prompt | CoT [R] ], no logits; differentiable."""
        return self.overall(self.score_parts(batch, cots))

    def score_parts(self, batch: Batch, cots: list[str | None]) -> Tensor:
        """What the head says where `score` scores: (B, K)."""
        rows = []
        for cot in cots:
            text = checked(cot or "", "a CoT")
            ids = self.processor.encode_cot(text)
            rows.append(torch.tensor(ids, dtype=torch.long))
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, C)
        lengths = torch.tensor([len(row) for row in rows])
        places = torch.arange(tokens.shape[1])
        mask = places < lengths[:, None]  # (B, C)
        _, parts = self.group_parts(batch, tokens[:, None], mask[:, None], temperature=None)
        return parts[:, 0]

    def group(
            self, batch: Batch, tokens: Tensor, mask: Tensor,
            temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities and scores of the G CoTs of each of B videos, in one forward;
        differentiable. tokens and mask (B, G, C) as `think` returns them. Returns logps (B, G, C)
        of what is sampled from at this temperature, 0 off the mask, and scores (B, G)."""
        logps, parts = self.group_parts(batch, tokens, mask, temperature)
        return logps, self.overall(parts)

    def group_parts(
            self, batch: Batch, tokens: Tensor, mask: Tensor,
            temperature: float | None = 1.0) -> tuple[Tensor, Tensor]:
        """`group`, with what the head says, (B, G, K), in place of the scores. Temperature None
        makes no logits, and logps are 0."""
        tokens = tokens.to(self.device)
        mask = mask.to(self.device)
        logps = torch.zeros(mask.shape, device=self.device)
        parts = []
        order = []
        for rows, hidden, at_source, at_reward in self.forwards(batch, tokens, mask):
            parts.append(self.read_parts(hidden, at_reward))
            order += rows
            if temperature is None:
                continue
            # Logits are large: there are none off the mask. N tokens are on it.
            here = mask[rows]  # (b, G, C)
            row = torch.arange(len(rows), device=self.device)
            sources = hidden[row[:, None, None], at_source]
            targets = tokens[rows]
            of_tokens = self.token_logps(sources[here], targets[here], temperature)  # (N,)
            logps[rows] = logps[rows].masked_scatter(here, of_tokens)
        places = torch.tensor(order).argsort()
        return logps, torch.cat(parts)[places]

    def forwards(self, batch: Batch, tokens: Tensor, mask: Tensor) -> Iterator:
        """`forward_rows` for rows of like length together, so that little is padding, and at most
        `max_tokens`: row numbers and what it returns for them. A sharded model takes all rows at
        once, for its ranks have to run in step."""
        self.check_head()
        batch = self.encode(batch)
        inputs = mask & (tokens != self.eos)
        with_reward = inputs.sum(-1) + 1  # (B, G)
        lengths = batch.mask.sum(1) + with_reward.sum(-1)
        lengths = lengths.tolist()
        lists = [list(range(len(batch)))]
        if not is_sharded(self):
            lists = []
            for alike in group_by_length(lengths):
                sizes = [lengths[row] for row in alike]
                lists += pack_by_budget(alike, sizes, self.max_tokens)
        for rows in lists:
            of_rows = batch.select(rows)
            states = self.forward_rows(of_rows, tokens[rows], mask[rows])
            yield rows, *states

    def forward_rows(self, batch: Batch, tokens: Tensor, mask: Tensor):
        """The language model over one row a video, [ prompt | c_1 [R] | … | c_G [R] ]: a group's
        one prefix. Each CoT sees the prompt and itself, and its positions go on where the prompt's
        end; an end token is predicted, but no input.

        Returns the hidden states (B, L, H), and where in L each CoT token is predicted from
        (B, G, C) and each [Reward] stands (B, G)."""
        inputs = mask & (tokens != self.eos)
        rows = pack_rows(batch.input_ids, batch.mask, batch.position_ids, tokens, inputs)
        hidden = self.hidden_states(batch, rows.ids, rows.positions, rows.in_prompt,
                                    rows.is_reward, layout=rows.layout)
        return hidden, rows.at_source, rows.at_reward

    def token_logps(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """log softmax(lm_head(hidden) / temperature)[targets]: (N, H), (N,) → (N,) float32.
        Logits exist for one chunk at a time, in the backward too: it computes them again."""

        def logps(h, target):
            logits = self.logits(h) / (temperature or 1.0)
            return log_probability(logits, target)

        chunks = []
        for h, target in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK)):
            chunks.append(checkpoint(logps, h, target, use_reentrant=False))
        return torch.cat(chunks)

    # -- what trains

    def set_trainable(
            self, lora_rank: int = 64, train_merger: bool = False,
            train_vision: bool = False) -> None:
        """Choose what trains: [Reward] and the head always; the language model through LoRA of a
        rank (alpha = 2 · rank) or, at rank 0, all of it; tower and mergers where asked."""
        self.has_head = True
        # The adapter: one that is there is trained on, or merged into the weights.
        adapted = isinstance(self.backbone, PeftModel)
        if adapted and lora_rank:
            rank = self.backbone.peft_config["default"].r
            if rank != lora_rank:
                raise DataError(f"{self.name}: its adapter has rank {rank}, not {lora_rank}; "
                                f"pass --lora-rank {rank}, or 0 to merge it")
        elif adapted:
            self.backbone = self.backbone.merge_and_unload()
        elif lora_rank:
            alpha = 2 * lora_rank
            config = LoraConfig(r=lora_rank, lora_alpha=alpha, target_modules=LORA_TARGETS)
            self.backbone = get_peft_model(self.backbone, config)
        # Which parameters train. These are float32, whatever the frozen ones are.
        for name, parameter in self.named_parameters():
            if name.startswith(OWN):
                parameter.requires_grad_(True)
        for name, parameter in self.backbone.named_parameters():
            if ".visual." in name:
                wanted = train_merger if "merger" in name else train_vision
            else:
                wanted = not lora_rank or ".default." in name
            if wanted and not parameter.is_floating_point():
                raise DataError(f"{name} is quantised and cannot be trained itself: --lora-rank above "
                                "0, --train-merger false and --train-vision false leave it as it is")
            parameter.requires_grad_(wanted)
            if wanted and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def reference(self) -> "DeScore | None":
        """The frozen copy that is π_ref where the whole model trains (`keep_reference`)."""
        return self._reference[0] if self._reference else None

    def keep_reference(self) -> None:
        """Remember the policy as it is now as π_ref: with LoRA as a second, frozen adapter, else
        as a frozen copy of what trains. Comes after `set_trainable`: what is frozen is shared."""
        if not isinstance(self.backbone, PeftModel):
            shared = {id(p): p for p in self.parameters()
                      if not p.requires_grad and p.dtype == self.dtype}
            frozen = copy.deepcopy(self, shared).requires_grad_(False)
            self._reference = [frozen.to(self.dtype)]
            return
        trains = self.trainable().values()
        self.backbone.add_adapter("reference", self.backbone.peft_config["default"])
        weights = dict(self.backbone.named_parameters())
        for name, parameter in weights.items():
            if ".reference." in name:
                own = weights[name.replace(".reference.", ".default.")]
                parameter.data.copy_(own.data)
                parameter.requires_grad_(False)
        self.backbone.base_model.set_adapter("default")
        for parameter in trains:  # some versions of peft have frozen what is no adapter
            parameter.requires_grad_(True)

    @torch.no_grad()
    def reference_logps(
            self, batch: Batch, tokens: Tensor, mask: Tensor,
            temperature: float = 1.0) -> Tensor:
        """The log-probabilities (B, G, C) of CoTs under the reference policy; see `group`."""
        if self.reference:
            logps, _ = self.reference.group(batch, tokens, mask, temperature)
            return logps
        trains = self.trainable().values()
        self.backbone.base_model.set_adapter("reference", inference_mode=True)
        try:
            logps, _ = self.group(batch, tokens, mask, temperature)
            return logps
        finally:  # peft has frozen what trains
            self.backbone.base_model.set_adapter("default")
            for parameter in trains:
                parameter.requires_grad_(True)

    # -- from and to disk

    @classmethod
    def load(
            cls, source: str | Path, dtype: torch.dtype | None = None,
            device: torch.device | str | None = None,
            video: dict | None = None, quant: str | None = None,
            reader: str = "av", layout: str | None = None) -> "DeScore":
        """Load a saved DeScore, or a bare Qwen3-VL, which can think, and score once trained.

        source: a directory, a run's folder or a hub id; dtype: of frozen weights [bfloat16 on a
        GPU, else float32]; video: other `VideoSettings` than those saved; quant: "4bit" for the
        frozen linear layers; reader: of video files (`data.read_video`); layout: in which it
        scores, "ours" or the authors' "release" [the model's own; see tools/release.py]. Raises
        DataError, naming the file, where a weight is missing, damaged or left over, and where an
        adapter was trained on another backbone."""
        return saved.load(cls, source, dtype, device, video, quant, reader, layout)

    def save(self, directory: str | Path, write: bool = True, **info) -> None:
        """Write the model to a directory, with `info` in its descore.json (`saved.save`)."""
        self.info |= info
        saved.save(self, Path(directory), write)


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[tokens]: (..., V), (...) → (...)."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def uniform_numbers(seeds: list[int], n: int, count: int) -> Tensor:
    """Numbers in [0, 1) that decide what is drawn: (B, n, count), those of a video by its seed."""
    numbers = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        numbers.append(torch.rand(count, n, generator=generator).T)
    return torch.stack(numbers)


def check_sampling(temperature: float, top_p: float, repetition_penalty: float) -> None:
    """DataError for numbers by which nothing can be drawn, or not from the policy. Divided by a
    temperature near 0, logits run over; a set of mass near 0 holds no token."""
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < torch.inf:
        raise DataError(f"a temperature of {temperature} is neither 0 nor at least "
                        f"{LEAST_TEMPERATURE}")
    if not LEAST_TOP_P <= top_p <= 1:
        raise DataError(f"a top_p of {top_p} is not from {LEAST_TOP_P} to 1")
    if not LEAST_PENALTY <= repetition_penalty < torch.inf:
        raise DataError(f"a repetition penalty of {repetition_penalty} is not at least "
                        f"{LEAST_PENALTY}")
    if repetition_penalty != 1 and temperature:
        raise DataError(f"a repetition penalty of {repetition_penalty} is for temperature 0, not "
                        f"{temperature}: what is sampled would not be the policy's")


def tokens_held(batch: Batch, n: int, vocabulary: int) -> Tensor:
    """Which tokens each prompt holds, those of its video too, for n CoTs each: (B · n, V) bool."""
    ids = batch.input_ids
    shape = (len(batch), vocabulary)
    held = torch.zeros(shape, dtype=torch.bool, device=ids.device)
    row, place = batch.mask.nonzero(as_tuple=True)  # no padding
    held[row, ids[row, place]] = True
    return held.repeat_interleave(n, 0)


def penalised(logits: Tensor, held: Tensor, penalty: float) -> Tensor:
    """Logits (..., V) with those of the tokens that are `held` (..., V) divided by the penalty
    where they are above 0, else multiplied by it; each once, however often a token stands there
    (the definition of vLLM)."""
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(held, lowered, logits)


def draw(logits: Tensor, uniform: Tensor, top_p: float = 1.0) -> Tensor:
    """Sample a token for each of (..., V) logits: the inverse of the cumulative distribution at
    one number in [0, 1) each (...)."""
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered[before >= top_p] = 0  # what is left is the smallest set of mass top_p
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    mass = probs.double().cumsum(-1)
    total = mass[..., -1:]
    wanted = uniform[..., None].double() * total
    token = torch.searchsorted(mass, wanted, right=True).squeeze(-1)
    last = logits.shape[-1] - 1
    return token.clamp(max=last)


def drop_finished(cache: GroupCache, rows: Tensor, hidden: Tensor, live: Tensor) -> tuple:
    """Let finished rollouts leave the batch once they are an eighth of it. rows, live (b, n) and
    hidden (b, n, H) are of those still computed; returns what is left of rows and hidden."""
    videos = live.any(1).nonzero()[:, 0]  # those of which any rollout is not over
    width = int(live.sum(1).max())  # the most such rollouts of a video
    if len(videos) * width > 7 / 8 * rows.numel():
        return rows, hidden
    # Of each video the live ones come first; shorter rows are filled up with finished ones.
    live_first = live[videos].long().argsort(dim=1, descending=True, stable=True)
    columns = live_first[:, :width]
    cache.keep(videos, columns)
    here = (videos[:, None], columns)
    return rows[here], hidden[here]
