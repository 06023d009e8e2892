"""The five decisions that make the code small and fast change no number."""

import bitsandbytes
import pytest
import torch
from conftest import ROOT

from data import DataError
from model import DeScore

EXACT = {"rtol": 0, "atol": 1e-5}  # float64 but for RMSNorm, which transformers computes in float32


def make_batch(model, keys):
    return model.processor.collate([model.processor(*key) for key in keys])


def random_rollouts(model, B, G, C, seed=0):
    """CoTs of all kinds: with and without an end, of every length, the empty one, and one that holds a video
    token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 500, (B, G, C), generator=generator)
    length = torch.randint(1, C + 1, (B, G), generator=generator)
    length[0, 0], length[0, 1] = 1, C
    mask = torch.arange(C) < length[..., None]
    ended = torch.rand(B, G, generator=generator) < 0.7
    ended[0, 0], ended[0, 1] = True, False  # an empty CoT, and a truncated one
    tokens[0, 1, 1] = model.processor.special["<|video_pad|>"]
    last = (torch.arange(C) == length[..., None] - 1) & ended[..., None]
    return torch.where(last, model.processor.eos_id, tokens), mask


def plain(model, sample, ids):
    """One CoT the plain way: the whole sequence through transformers' own forward, no cache, no packing.
    Returns the log-probabilities of ids and the reward behind them."""
    qwen, eos = model.qwen, model.processor.eos_id
    read = [token for token in ids if token != eos]
    tower = qwen.model.visual((sample.patches / 127.5 - 1).double(), grid_thw=torch.tensor([sample.grid]))
    embed = qwen.get_input_embeddings()
    prompt = embed(sample.input_ids)
    is_video = sample.input_ids == model.processor.special["<|video_pad|>"]
    prompt = prompt.masked_scatter(is_video[:, None], tower.pooler_output)
    rows = torch.cat([prompt, embed(torch.tensor(read, dtype=torch.long)), model.query[None]])[None]
    after = sample.position_ids.max() + 1 + torch.arange(len(read) + 1)
    positions = torch.cat([sample.position_ids, after.expand(3, -1)], 1)[:, None]
    visual = torch.zeros(1, rows.shape[1], dtype=torch.bool)
    visual[0, :len(is_video)] = is_video
    hidden = qwen.model.language_model(inputs_embeds=rows, position_ids=positions, visual_pos_masks=visual,
                                       deepstack_visual_embeds=tower.deepstack_features).last_hidden_state[0]
    P = len(sample.input_ids)
    logits = qwen.lm_head(hidden[P - 1:P - 1 + len(ids)])
    logps = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids, dtype=torch.long)]
    return logps, hidden[-1] @ model.head.weight[0]


@pytest.fixture(params=["whole", "lora"])
def trained(request, model):
    """The model with everything training, and with a LoRA adapter that is not zero."""
    torch.manual_seed(1)
    model.set_trainable(0 if request.param == "whole" else 4)
    for name, parameter in model.trainable().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.double()


@pytest.mark.parametrize("forward_tokens", [1, 16_384])  # a row at a time, and all rows together
def test_group_forward_equals_separate_forwards_in_values_and_gradients(trained, keys, forward_tokens,
                                                                        monkeypatch):
    monkeypatch.setattr("model.FORWARD_TOKENS", forward_tokens)
    model, (B, G, C) = trained, (2, 3, 6)
    tokens, mask = random_rollouts(model, B, G, C)
    samples = [model.processor(*key) for key in keys[:B]]
    weight_l, weight_r = torch.randn(B, G, C).double(), torch.randn(B, G).double()
    logps, rewards = model.group(model.processor.collate(samples), tokens, mask)
    ((logps * weight_l)[mask].sum() + (rewards * weight_r).sum()).backward()
    together = {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}
    model.zero_grad()
    for b in range(B):
        for g in range(G):
            n = int(mask[b, g].sum())
            own_logps, own_reward = plain(model, samples[b], tokens[b, g, :n].tolist())
            torch.testing.assert_close(logps[b, g, :n].double(), own_logps, **EXACT)
            torch.testing.assert_close(rewards[b, g].double(), own_reward, **EXACT)
            ((own_logps * weight_l[b, g, :n]).sum() + own_reward * weight_r[b, g]).backward()
    assert not logps[~mask].any()
    apart = {name: p.grad for name, p in model.trainable().items() if p.grad is not None}
    assert together.keys() == apart.keys() and "query" in apart and len(apart) > 40
    for name, gradient in apart.items():
        assert (together[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_rows_share_a_forward_up_to_a_bound(model, keys, monkeypatch):
    batch = model.encode(make_batch(model, [keys[0], keys[0], keys[0]]))
    tokens = torch.zeros(3, 2, 4, dtype=torch.long)
    row = int(batch.mask[0].sum()) + 2 * (4 + 1)  # the prompt, and two CoTs with their [Reward]
    for bound, counts in ((3 * row, [3]), (3 * row - 1, [2, 1]), (1, [1, 1, 1])):
        monkeypatch.setattr("model.FORWARD_TOKENS", bound)
        assert [len(rows) for rows, *_ in model.runs(batch, tokens, torch.ones_like(tokens).bool())] == counts


def test_what_the_tower_made_moves_with_its_batch(model, keys):
    batch = model.encode(make_batch(model, keys))
    features, deepstack = batch.to("meta").features
    assert {part.device.type for part in (features, *deepstack)} == {"meta"} and len(deepstack) > 1
    assert len(batch.patches) == 0  # they have served


def test_what_sampling_records_is_what_the_group_forward_computes(model, keys):
    thoughts = model.think(make_batch(model, keys), n=3, max_new_tokens=12, temperature=1.0, seeds=[1, 2, 3])
    logps, rewards = model.group(make_batch(model, keys), thoughts.tokens, thoughts.mask)
    torch.testing.assert_close(logps, thoughts.logps.to(logps.dtype), **EXACT)
    torch.testing.assert_close(rewards, thoughts.rewards.to(rewards.dtype), **EXACT)
    assert model.truncated(thoughts).all()


def test_the_score_on_the_cache_is_the_score_of_one_full_forward(model, keys):
    thoughts = model.think(make_batch(model, keys), n=2, max_new_tokens=160, temperature=1.0, seeds=[1, 2, 3])
    assert not model.truncated(thoughts).any()  # the embedded backbone ends its CoTs
    for b, key in enumerate(keys):
        for g in range(2):
            ids = thoughts.tokens[b, g][thoughts.mask[b, g]].tolist()
            assert ids.index(model.processor.eos_id) == len(ids) - 1
            logps, reward = plain(model, model.processor(*key), ids)
            torch.testing.assert_close(thoughts.rewards[b, g].double(), reward, **EXACT)
            torch.testing.assert_close(thoughts.logps[b, g, :len(ids)].double(), logps, **EXACT)


def test_score_of_a_text_is_the_score_of_its_tokens(model, keys):
    text = "<think>\nsubject: a red circle\n</think>"
    rewards = model.score(make_batch(model, keys), [text] * 3)
    for key, reward in zip(keys, rewards):
        _, expected = plain(model, model.processor(*key), model.processor.encode(text))
        torch.testing.assert_close(reward.double(), expected, **EXACT)


def test_a_masked_cot_is_no_cot(model, keys):
    masked = model.score(make_batch(model, keys), [None, "a red circle", None])
    alone = model.score(make_batch(model, keys), [None] * 3)
    torch.testing.assert_close(masked[[0, 2]], alone[[0, 2]], **EXACT)
    for key, reward in zip(keys, alone):
        torch.testing.assert_close(reward.double(), plain(model, model.processor(*key), [])[1], **EXACT)
    assert (masked[1] - alone[1]).abs() > 1e-3


def test_a_video_thinks_the_same_in_any_company(model, keys):
    together = model.think(make_batch(model, keys), n=2, max_new_tokens=10, seeds=[5, 6, 7])
    alone = model.think(make_batch(model, keys[1:2]), n=2, max_new_tokens=10, seeds=[6])
    assert torch.equal(together.tokens[1], alone.tokens[0])
    torch.testing.assert_close(together.rewards[1], alone.rewards[0], **EXACT)


def test_greedy_thinking_is_transformers_own_generate(model, keys):
    sample = model.processor(*keys[0])
    ids = sample.input_ids[None]
    types = (ids == model.processor.special["<|video_pad|>"]).int() * 2
    grid = torch.tensor([sample.grid])
    expected = model.qwen.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, video_grid_thw=grid,
        pixel_values_videos=(sample.patches / 127.5 - 1).double(), max_new_tokens=40, do_sample=False,
        eos_token_id=model.processor.eos_id, pad_token_id=model.processor.eos_id)[0, ids.shape[1]:]
    thoughts = model.think(make_batch(model, keys[:1]), max_new_tokens=40, temperature=0)
    assert thoughts.tokens[0, 0].tolist() == expected.tolist()


def test_the_video_is_encoded_once(model, keys, monkeypatch):
    calls = []
    forward = model.qwen.model.visual.forward
    monkeypatch.setattr(model.qwen.model.visual, "forward",
                        lambda *a, **k: calls.append(1) or forward(*a, **k))
    batch = model.encode(make_batch(model, keys))
    thoughts = model.think(batch, n=2, max_new_tokens=4)
    model.group(batch, thoughts.tokens, thoughts.mask)
    model.score(batch, [None] * 3)
    assert len(calls) == 1


def test_chunks_of_logits_change_nothing(model, keys, monkeypatch):
    tokens, mask = random_rollouts(model, 1, 2, 6)
    model.set_trainable(4)
    found = []
    for size in (1000, 3):
        monkeypatch.setattr("model.LOGITS_CHUNK", size)
        logps, _ = model.group(make_batch(model, keys[:1]), tokens, mask)
        model.zero_grad()
        logps.sum().backward()
        found.append((logps.detach(),
                      [p.grad.clone() for p in model.trainable().values() if p.grad is not None]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-12)
    for one, two in zip(found[0][1], found[1][1]):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rank", [0, 4])
def test_saved_and_loaded_scores_are_bit_equal(rank, keys, tmp_path):
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(rank, train_merger=True)
    for parameter in model.trainable().values():
        parameter.data.add_(torch.randn_like(parameter) * 0.01)
    model.save(tmp_path / "saved", score_mean=1.5)
    again = DeScore.load(tmp_path / "saved", device="cpu")
    cots = ["<think>\nsubject: a red circle", None, ""]
    model.eval()
    assert torch.equal(model.score(make_batch(model, keys), cots), again.score(make_batch(again, keys), cots))
    assert again.info["score_mean"] == 1.5 and again.processor.settings == model.processor.settings
    suffixes = {path.suffix for path in (tmp_path / "saved").iterdir()}
    assert suffixes <= {".json", ".safetensors", ".jinja"}


def test_the_reference_is_the_policy_as_it_was(model, keys):
    tokens, mask = random_rollouts(model, 2, 2, 5)
    model.set_trainable(4)
    for name, parameter in model.trainable().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    before, _ = model.group(make_batch(model, keys[:2]), tokens, mask)
    model.keep_reference()
    trains = set(model.trainable())
    for name, parameter in model.trainable().items():
        if "lora" in name:
            parameter.data.add_(0.01)
    reference = model.reference_logps(make_batch(model, keys[:2]), tokens, mask)
    after, _ = model.group(make_batch(model, keys[:2]), tokens, mask)
    torch.testing.assert_close(reference, before.detach(), rtol=0, atol=5e-6)  # float32 of about 10
    assert (after - before).abs().max() > 1e-3
    assert set(model.trainable()) == trains and not any("reference" in name for name in trains)


def test_the_reference_of_a_whole_model_is_a_copy(model, keys):
    tokens, mask = random_rollouts(model, 1, 2, 5)
    model.set_trainable(0)
    before, _ = model.group(make_batch(model, keys[:1]), tokens, mask)
    model.keep_reference()
    model.qwen.lm_head.weight.data.mul_(1.1)
    reference = model.reference_logps(make_batch(model, keys[:1]), tokens, mask)
    torch.testing.assert_close(reference, before.detach(), rtol=0, atol=2e-5)  # float64 against float32
    assert (model.group(make_batch(model, keys[:1]), tokens, mask)[0] - before).abs().max() > 1e-3


@pytest.mark.parametrize("rank", [0, 4])
def test_bfloat16_trains_in_float32(rank, keys):
    model = DeScore.load(ROOT / "toy/backbone", dtype=torch.bfloat16, device="cpu")
    model.set_trainable(rank, train_merger=True)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    model.score(make_batch(model, keys), ["a red circle", None, ""]).sum().backward()
    assert all(p.grad is not None for name, p in model.trainable().items()
               if "merger" in name or name == "query")
    thoughts = model.think(make_batch(model, keys), n=2, max_new_tokens=5, seeds=[1, 2, 3])
    logps, rewards = model.group(make_batch(model, keys), thoughts.tokens, thoughts.mask)
    torch.testing.assert_close(logps, thoughts.logps, rtol=0.1, atol=0.3)  # 8 bits of mantissa, two orders
    torch.testing.assert_close(rewards, thoughts.rewards, rtol=0.1, atol=0.1)


def test_only_what_is_asked_for_trains(model):
    model.set_trainable(4, train_merger=True)
    names = set(model.trainable())
    assert {"query", "head.weight"} < names
    rest = names - {"query", "head.weight"}
    assert all("language_model" in name and ".lora_" in name or "merger" in name for name in rest)
    assert any("deepstack_merger_list" in name for name in rest)
    assert not any("embed_tokens" in name or "lm_head" in name for name in rest)


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match=r"neither descore\.json .* nor config\.json"):
        DeScore.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match="no Qwen3-VL can be loaded.*it is a llama"):
        DeScore.load(tmp_path)
    (tmp_path / "descore.json").write_text("{")
    with pytest.raises(DataError, match=r"descore\.json: not JSON"):
        DeScore.load(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints of the authors' release


@pytest.fixture
def release(model, tmp_path):
    """A checkpoint in the release's layout: a <Reward> row in the embedding, rm_head.pth beside the
    weights."""
    model.processor.tokenizer.add_tokens(["<Reward>"], special_tokens=True)
    model.qwen.resize_token_embeddings(len(model.processor.tokenizer))
    model.qwen.get_input_embeddings().weight.data[-1] = torch.randn_like(model.query)
    model.qwen.save_pretrained(tmp_path)
    model.processor.tokenizer.save_pretrained(tmp_path)
    video_settings = (ROOT / "toy/backbone/descore.json").read_text()
    (tmp_path / "descore.json").write_text(video_settings)
    return tmp_path


@pytest.mark.parametrize("key", ["rm_head.weight", "weight"])
def test_a_release_is_read_and_scores_in_its_own_layout(release, keys, key):
    head = torch.randn(1, 192, dtype=torch.float64)
    torch.save({key: head}, release / "rm_head.pth")
    model = DeScore.load(release, dtype=torch.float64, device="cpu").double()
    torch.testing.assert_close(model.head.weight.double(), head, rtol=1e-6, atol=0)  # made in float32
    torch.testing.assert_close(model.query.double(), model.qwen.get_input_embeddings().weight[-1], rtol=1e-6,
                               atol=0)
    (record,) = model.judge(keys[:1], max_new_tokens=5)
    sample = model.processor(*keys[0], record["cot"])
    text = model.processor.tokenizer.decode(sample.input_ids)
    assert text.endswith(model.processor.instruction.split("<prompt>")[1] + record["cot"])
    assert text.count("<|im_start|>") == 1
    assert abs(record["reward"] - plain(model, sample, [])[1].item()) < 1e-5
    ours = DeScore.load(release, dtype=torch.float64, device="cpu").double()
    ours.info["scoring_layout"] = "ours"
    assert abs(next(ours.judge(keys[:1], max_new_tokens=5))["reward"] - record["reward"]) > 1e-3


class Hostile:
    def __reduce__(self):
        return (open, ("owned", "w"))


@pytest.mark.parametrize("content",
                         [{"weight": Hostile()}, {"other": torch.ones(1, 192)}, {"weight": torch.ones(7)}])
def test_a_hostile_or_wrong_head_is_refused(release, content, monkeypatch):
    monkeypatch.chdir(release)
    torch.save(content, release / "rm_head.pth")
    with pytest.raises(DataError, match=r"rm_head\.pth: holds no head"):
        DeScore.load(release)
    assert not (release / "owned").exists()


def test_flex_attention_gives_the_numbers_of_sdpa(model, keys):
    """Forward only: flex attention has no backward on a CPU."""
    model = model.float()
    tokens, mask = random_rollouts(model, 3, 4, 9)
    found = {}
    with torch.no_grad():
        for model.attention in ("sdpa", "flex"):
            found[model.attention] = model.group(make_batch(model, keys), tokens, mask)
    for one, other in zip(found["sdpa"], found["flex"]):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_4_bit_weights_give_the_gradients_of_what_they_stand_for(keys):
    """Also after thinking, which leaves and enters training mode."""
    small = DeScore.load(ROOT / "toy/backbone", device="cpu", quant="4bit")
    whole = DeScore.load(ROOT / "toy/backbone", device="cpu")
    changed = 0
    for name, module in small.qwen.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            whole.qwen.get_submodule(name).weight.data.copy_(weight)
            changed += 1
    assert changed == 7 * whole.qwen.config.text_config.num_hidden_layers
    gradients = []
    for model in (small, whole):
        torch.manual_seed(0)
        model.query.data.normal_()
        model.head.weight.data.normal_()
        model.set_trainable(4)
        for name, p in model.trainable().items():
            if ".lora_B" in name:
                p.data.normal_(std=0.1)
        model.train()
        tokens, mask = random_rollouts(model, 3, 2, 5)
        model.think(make_batch(model, keys), 2, 3, seeds=[0, 1, 2])
        logps, rewards = model.group(make_batch(model, keys), tokens, mask)
        (logps.sum() + rewards.sum()).backward()
        gradients.append({name: p.grad for name, p in model.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3,
                                   atol=1e-3 * gradient.abs().max().item())


def test_the_score_without_a_cot_rides_on_the_same_prefill(model, keys):
    batch = make_batch(model, keys)
    plainly = model.think(batch, n=2, max_new_tokens=10, seeds=[1, 2, 3])
    thoughts = model.think(batch, n=2, max_new_tokens=10, seeds=[1, 2, 3], without_cot=True)
    assert plainly.rewards_no_cot is None
    assert all(torch.equal(one, other) for one, other in zip(plainly[:4], thoughts[:4]))
    torch.testing.assert_close(thoughts.rewards_no_cot, model.score(batch, [None] * 3), rtol=1e-6, atol=1e-6)
