"""The same work done the plain way: one row a rollout, the video encoded in each, logits everywhere.

Written against transformers' own forward and generate. speed.py checks that these give model.py's numbers.
"""

import torch
import torch.nn.functional as F

from coldstart import bt_loss
from data import Batch
from model import DeScore
from rl import grpo_loss


def inputs(model: DeScore, batch: Batch, rows: list[int]) -> dict:
    """What transformers' forward takes for some of the batch's samples, padded on the right."""
    sizes = batch.grid.prod(1).tolist()
    patches = torch.cat([batch.patches.split(sizes)[row] for row in rows]).to(model.device)
    ids = batch.input_ids[rows].to(model.device)
    return {"input_ids": ids, "attention_mask": batch.mask[rows].long().to(model.device),
            "mm_token_type_ids": (ids == model.processor.video_id).int() * 2,
            "pixel_values_videos": (patches.float() / 127.5 - 1).to(model.qwen.dtype),
            "video_grid_thw": batch.grid[rows].to(model.device)}


@torch.no_grad()
def generate(model: DeScore, batch: Batch, rows: list[int], tokens: int, sequences: int = 1) -> torch.Tensor:
    """transformers' generate, sampling exactly `tokens` tokens. Returns them (rows · sequences, tokens)."""
    given = inputs(model, batch, rows)
    out = model.qwen.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True,
                              temperature=1.0,
                              top_p=1.0, top_k=0, num_return_sequences=sequences,
                              pad_token_id=model.processor.eos_id, eos_token_id=model.processor.eos_id)
    return out[:, given["input_ids"].shape[1]:]


def whole_rows(model: DeScore, batch: Batch, tokens: torch.Tensor,
               with_reward: bool) -> tuple[torch.Tensor, ...]:
    """One row a rollout, [prompt, CoT] or [prompt, CoT, [Reward]], the video encoded in each. tokens (B, G,
    C), none of them an end. Returns the last hidden states and where the CoT begins; rows (B · G)."""
    B, G, C = tokens.shape
    rows = torch.arange(B).repeat_interleave(G).tolist()
    given, qwen = inputs(model, batch, rows), model.qwen
    tower = qwen.model.visual(given["pixel_values_videos"], grid_thw=given["video_grid_thw"])
    ids = torch.cat([given["input_ids"], tokens.flatten(0, 1)], 1)
    embeds = qwen.get_input_embeddings()(ids)
    is_video = F.pad(given["input_ids"] == model.processor.video_id, (0, C))
    embeds = embeds.masked_scatter(is_video[..., None], tower.pooler_output)
    before, _ = qwen.model.get_rope_index(ids[:, : -C], given["mm_token_type_ids"],
                                          video_grid_thw=given["video_grid_thw"],
                                          attention_mask=given["attention_mask"])
    start = before.amax((0, 2))[:, None] + 1
    behind = start + torch.arange(C + with_reward, device=model.device)
    positions = torch.cat([before, behind.expand(3, -1, -1)], 2)
    if with_reward:
        embeds = torch.cat([embeds, model.query.expand(len(rows), 1, -1)], 1)
        is_video = F.pad(is_video, (0, 1))
    hidden = qwen.model.language_model(inputs_embeds=embeds, position_ids=positions,
                                       visual_pos_masks=is_video,
                                       deepstack_visual_embeds=tower.deepstack_features, use_cache=False)
    return hidden.last_hidden_state, given["input_ids"].shape[1]


def logps(model: DeScore, hidden: torch.Tensor, prompt: int, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B, G, C) by way of the logits of every position."""
    logits = model.qwen.lm_head(hidden).float()
    C = tokens.shape[2]
    return logits[:, prompt - 1 : prompt - 1 + C].log_softmax(-1).gather(-1, tokens.flatten(0, 1)[..., None])[
        ..., 0].view(tokens.shape)


def bt_of(scores: torch.Tensor) -> torch.Tensor:
    """L_BT of every second video over its neighbour; of a single video's rollouts, of half over half."""
    if len(scores) == 1:
        G = scores.shape[1]
        half = G // 2
        return bt_loss(scores[0, :half], scores[0, G - half:]) if G > 1 else -F.logsigmoid(scores).mean()
    return bt_loss(scores[0::2], scores[1::2])


def update(model: DeScore, batch: Batch, tokens: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor,
           passes: int) -> float:
    """Both losses of a pair's rollouts and their backward, in one pass a row or two (one for the score)."""
    hidden, prompt = whole_rows(model, batch, tokens, with_reward=passes == 1)
    found = logps(model, hidden, prompt, tokens)
    loss, _ = grpo_loss(found, old, None, advantages, torch.ones_like(tokens, dtype=torch.bool), beta=0.0)
    if passes == 2:
        hidden, _ = whole_rows(model, batch, tokens, with_reward=True)
    scores = model.overall(model.read_parts(hidden[:, -1])).view(tokens.shape[:2])
    loss = loss + 0.005 * bt_of(scores)
    loss.backward()
    return loss.item()
