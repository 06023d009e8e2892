"""The decisions that make the code small and fast change no number."""

import subprocess
import sys
from dataclasses import replace

import bitsandbytes
import paradigms
import pytest
import torch
from conftest import ROOT, in_layout, plain_head
from transformers import RepetitionPenaltyLogitsProcessor

import model as descore
from data import DIMENSIONS, DataError, read_video
from infer import by_key, judge
from model import DeScore, penalised, tokens_held

# float64 but for RMSNorm, which transformers computes in float32, as log-probabilities down to −21 are kept:
# 3e-6 at most were seen. What is wrong is off by 1e-3 and more, as some tests show.
EXACT = {"rtol": 0, "atol": 3e-5}


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


def plain(model, sample, ids, temperature=1.0):
    """One CoT the plain way: the whole sequence through transformers' own forward, no cache, no packing.
    Returns the log-probabilities of ids and the score behind them."""
    qwen, eos = model.qwen, model.processor.eos_id
    read = [token for token in ids if token != eos]
    tower = qwen.model.visual((sample.patches / 127.5 - 1).double(), grid_thw=torch.tensor([sample.grid]))
    embed = qwen.get_input_embeddings()
    prompt = embed(sample.input_ids)
    is_video = sample.input_ids == model.processor.special["<|video_pad|>"]
    prompt = prompt.masked_scatter(is_video[:, None], tower.pooler_output)
    rows = torch.cat([prompt, embed(torch.tensor(read, dtype=torch.long)), model.query[None]])[None]
    of_prompt, _ = qwen.model.get_rope_index(sample.input_ids[None], 2 * is_video[None].int(),
                                             video_grid_thw=torch.tensor([sample.grid]))
    after = of_prompt.max() + 1 + torch.arange(len(read) + 1)
    positions = torch.cat([of_prompt, after.expand(3, 1, -1)], 2)
    visual = torch.zeros(1, rows.shape[1], dtype=torch.bool)
    visual[0, :len(is_video)] = is_video
    hidden = qwen.model.language_model(inputs_embeds=rows, position_ids=positions, visual_pos_masks=visual,
                                       deepstack_visual_embeds=tower.deepstack_features).last_hidden_state[0]
    P = len(sample.input_ids)
    logits = qwen.lm_head(hidden[P - 1:P - 1 + len(ids)]) / temperature
    logps = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids, dtype=torch.long)]
    return logps, plain_head(hidden[-1], dict(model.named_parameters()))


def as_transformers_asks(model, key, chosen=()):
    """A video, its prompt and the tokens behind it as the arguments of Qwen3VLForConditionalGeneration
    itself."""
    sample = model.processor(*key)
    ids = torch.cat([sample.input_ids, torch.tensor(chosen, dtype=torch.long)])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == model.processor.special["<|video_pad|>"]).int() * 2,
            "pixel_values_videos": (sample.patches / 127.5 - 1).double(),
            "video_grid_thw": torch.tensor([sample.grid])}


@pytest.fixture(params=["whole", "lora"])
def trained(request, model):
    """The model with everything training, and with a LoRA adapter that is not zero."""
    torch.manual_seed(1)
    model.set_trainable(0 if request.param == "whole" else 4)
    for name, parameter in model.trainable().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.double()


@pytest.mark.parametrize("max_tokens", [1, 16_384])  # a row at a time, and all rows together
def test_group_forward_equals_separate_forwards_in_values_and_gradients(trained, keys, max_tokens):
    model, (B, G, C) = trained, (2, 3, 6)
    model.max_tokens = max_tokens
    tokens, mask = random_rollouts(model, B, G, C)
    samples = [model.processor(*key) for key in keys[:B]]
    weight_l, weight_r = torch.randn(B, G, C).double(), torch.randn(B, G).double()
    logps, scores = model.group(model.processor.collate(samples), tokens, mask)
    ((logps * weight_l)[mask].sum() + (scores * weight_r).sum()).backward()
    together = {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}
    model.zero_grad()
    for b in range(B):
        for g in range(G):
            n = int(mask[b, g].sum())
            own_logps, own_score = plain(model, samples[b], tokens[b, g, :n].tolist())
            torch.testing.assert_close(logps[b, g, :n].double(), own_logps, **EXACT)
            torch.testing.assert_close(scores[b, g].double(), own_score, **EXACT)
            ((own_logps * weight_l[b, g, :n]).sum() + own_score * weight_r[b, g]).backward()
    assert not logps[~mask].any()
    apart = {name: p.grad for name, p in model.trainable().items() if p.grad is not None}
    assert together.keys() == apart.keys() and "query" in apart and len(apart) > 40
    for name, gradient in apart.items():
        assert (together[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_rows_share_a_forward_up_to_a_bound(model, keys):
    batch = model.encode(make_batch(model, [keys[0], keys[0], keys[0]]))
    tokens = torch.zeros(3, 2, 4, dtype=torch.long)
    row = int(batch.mask[0].sum()) + 2 * (4 + 1)  # the prompt, and two CoTs with their [Reward]
    for bound, counts in ((3 * row, [3]), (3 * row - 1, [2, 1]), (1, [1, 1, 1])):
        model.max_tokens = bound
        found = model.forwards(batch, tokens, torch.ones_like(tokens).bool())
        assert [len(rows) for rows, *_ in found] == counts


def test_what_the_tower_made_moves_with_its_batch(model, keys):
    batch = model.encode(make_batch(model, keys))
    features, deepstack = batch.to("meta").features
    assert {part.device.type for part in (features, *deepstack)} == {"meta"} and len(deepstack) > 1
    assert len(batch.patches) == 0  # they have served


def test_what_sampling_records_is_what_the_group_forward_computes(model, keys):
    thoughts = model.think(make_batch(model, keys), n=3, max_new_tokens=12, temperature=1.0, seeds=[1, 2, 3])
    logps, scores = model.group(make_batch(model, keys), thoughts.tokens, thoughts.mask)
    torch.testing.assert_close(logps, thoughts.logps.to(logps.dtype), **EXACT)
    torch.testing.assert_close(scores, thoughts.scores.to(scores.dtype), **EXACT)
    assert model.truncated(thoughts).all()


def test_the_score_on_the_cache_is_the_score_of_one_full_forward(model, keys):
    thoughts = model.think(make_batch(model, keys), n=2, max_new_tokens=160, temperature=1.0, seeds=[1, 2, 3])
    assert not model.truncated(thoughts).any()  # the embedded backbone ends its CoTs
    for b, key in enumerate(keys):
        for g in range(2):
            ids = thoughts.tokens[b, g][thoughts.mask[b, g]].tolist()
            assert ids.index(model.processor.eos_id) == len(ids) - 1
            logps, score = plain(model, model.processor(*key), ids)
            torch.testing.assert_close(thoughts.scores[b, g].double(), score, **EXACT)
            torch.testing.assert_close(thoughts.logps[b, g, :len(ids)].double(), logps, **EXACT)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_log_probabilities_are_those_of_what_is_sampled_from(model, keys, temperature):
    thoughts = model.think(make_batch(model, keys), n=2, max_new_tokens=12, temperature=temperature,
                           seeds=[1, 2, 3])
    logps, scores = model.group(make_batch(model, keys), thoughts.tokens, thoughts.mask, temperature)
    for b, key in enumerate(keys):
        sample = model.processor(*key)
        for g in range(2):
            ids = thoughts.tokens[b, g][thoughts.mask[b, g]].tolist()
            expected, score = plain(model, sample, ids, temperature)
            torch.testing.assert_close(thoughts.logps[b, g, :len(ids)].double(), expected, **EXACT)
            torch.testing.assert_close(logps[b, g, :len(ids)].double(), expected, **EXACT)
            torch.testing.assert_close(scores[b, g].double(), score, **EXACT)
    of_one, _ = model.group(make_batch(model, keys), thoughts.tokens, thoughts.mask)
    assert (logps - of_one).abs().max() > 1e-3


@pytest.mark.parametrize(("temperature", "top_p"), [(3.0, 1.0), (4.0, 1.0), (4.0, 0.6)])
def test_tokens_are_drawn_from_the_tempered_distribution(model, keys, temperature, top_p):
    n = 2500
    logits = model.qwen(**as_transformers_asks(model, keys[0])).logits[0, -1]
    probs = (logits / temperature).softmax(-1).detach()
    if top_p < 1:
        likeliest = probs.argsort(descending=True)
        needed = int((probs[likeliest].cumsum(0) < top_p).sum()) + 1  # the smallest set of mass top_p
        probs[likeliest[needed:]] = 0
        probs = probs / probs.sum()
    thoughts = model.think(make_batch(model, keys[:1]), n, 1, temperature, top_p, seeds=[5])
    share = torch.bincount(thoughts.tokens.flatten(), minlength=len(probs)) / n
    assert ((share - probs).abs() <= 5 * (probs * (1 - probs) / n).sqrt() + 1 / n).all()
    assert 0.05 < probs.max() < 0.9  # there was a choice


def test_the_likeliest_token_has_the_log_probability_of_temperature_1(model, keys):
    thoughts = model.think(make_batch(model, keys), max_new_tokens=12, temperature=0)
    logps, _ = model.group(make_batch(model, keys), thoughts.tokens, thoughts.mask)
    torch.testing.assert_close(logps, thoughts.logps, **EXACT)


def test_score_of_a_text_is_the_score_of_its_tokens(model, keys):
    text = "<think>\nsubject: a red circle\n</think>"
    scores = model.score(make_batch(model, keys), [text] * 3)
    for key, score in zip(keys, scores):
        _, expected = plain(model, model.processor(*key), model.processor.encode(text))
        torch.testing.assert_close(score.double(), expected, **EXACT)


def test_a_masked_cot_is_no_cot(model, keys):
    masked = model.score(make_batch(model, keys), [None, "a red circle", None])
    alone = model.score(make_batch(model, keys), [None] * 3)
    torch.testing.assert_close(masked[[0, 2]], alone[[0, 2]], **EXACT)
    for key, score in zip(keys, alone):
        torch.testing.assert_close(score.double(), plain(model, model.processor(*key), [])[1], **EXACT)
    assert (masked[1] - alone[1]).abs() > 1e-3


def test_scores_with_and_without_a_cot_from_one_forward(model, keys):
    cots = ["a red circle", None, "<think>\nsubject: a blue square, seen, so 2\n</think>"]
    tokens, mask = paradigms.cots_and_none(model, cots)
    _, both = model.group(make_batch(model, keys), tokens, mask)
    for key, cot, found in zip(keys, cots, both):
        ids = model.processor.encode(cot or "")
        expected = [plain(model, model.processor(*key), some)[1] for some in (ids, [])]
        torch.testing.assert_close(found.double(), torch.stack(expected), **EXACT)


def test_cots_of_unequal_length_are_scored_in_one_forward(model, keys):
    cots = ["a red circle", None, "<think>\nsubject: a blue square, seen, so 2\n</think>"]
    scores = model.score(make_batch(model, keys), cots)
    for key, cot, score in zip(keys, cots, scores):
        ids = model.processor.encode(cot or "")
        _, expected = plain(model, model.processor(*key), ids)
        torch.testing.assert_close(score.double(), expected, **EXACT)


def test_a_video_thinks_the_same_in_any_company(model, keys):
    together = model.think(make_batch(model, keys), n=2, max_new_tokens=10, seeds=[5, 6, 7])
    alone = model.think(make_batch(model, keys[1:2]), n=2, max_new_tokens=10, seeds=[6])
    assert torch.equal(together.tokens[1], alone.tokens[0])
    torch.testing.assert_close(together.scores[1], alone.scores[0], **EXACT)


@pytest.fixture
def drawn_by_number(model, monkeypatch):
    """What is drawn depends on the number alone, not on the last digit of a probability: of fifty tokens one
    is the end, the others any."""
    def draw(logits, number, top_p):
        return torch.where(number < 0.02, model.processor.eos_id, (number * 500).long())

    monkeypatch.setattr("model.draw", draw)


def test_letting_finished_rollouts_go_changes_nothing(model, keys, drawn_by_number, monkeypatch):
    sizes, real = [], descore.drop_finished

    def watched(cache, rows, hidden, live):
        rows, hidden = real(cache, rows, hidden, live)
        sizes.append(rows.numel())
        return rows, hidden

    def think(which):
        return model.think(make_batch(model, [keys[b] for b in which]), 8, 130, temperature=2.0,
                           seeds=[5 + b for b in which])

    monkeypatch.setattr("model.drop_finished", watched)
    together = think([0, 1])
    assert sizes[0] == 16 and len(set(sizes)) > 2  # they left by and by
    lengths = together.mask.sum(-1)
    assert lengths.min() < 40 and lengths.max() > 100
    alone = [think([b]) for b in range(2)]
    monkeypatch.setattr("model.drop_finished", lambda cache, rows, hidden, live: (rows, hidden))
    all_stay = think([0, 1])
    for b in range(2):
        for other in (alone[b], type(together)(*(x[b:b + 1] for x in all_stay[:4]))):
            C = int(lengths[b].max())
            assert torch.equal(other.mask[0].sum(-1), lengths[b])
            for g in range(8):
                here = slice(int(lengths[b, g]))
                assert torch.equal(together.tokens[b, g, here], other.tokens[0, g, here])
            torch.testing.assert_close(together.logps[b, :, :C], other.logps[0, :, :C], **EXACT)
            torch.testing.assert_close(together.scores[b], other.scores[0], **EXACT)


def test_some_run_into_the_limit_while_others_have_gone(model, keys, drawn_by_number):
    """[Reward] follows the last token of what never ended, and only there."""
    thoughts = model.think(make_batch(model, keys), 12, 110, temperature=2.0, seeds=[5, 6, 7])
    truncated = model.truncated(thoughts)
    assert 0.1 < truncated.double().mean() < 0.9 and thoughts.mask[truncated].all()
    logps, scores = model.group(make_batch(model, keys), thoughts.tokens, thoughts.mask, 2.0)
    torch.testing.assert_close(scores, thoughts.scores, **EXACT)
    torch.testing.assert_close(logps, thoughts.logps, **EXACT)


def test_no_product_of_thinking_has_rows_of_stride_0(model, keys):
    """Which oneDNN is slow at in bfloat16, and takes memory for: the CoTs of a video begin alike."""
    strides = set()

    def look(module, inputs):
        (hidden,) = inputs
        strides.update(hidden.stride())

    with torch.no_grad():
        hook = model.qwen.lm_head.register_forward_pre_hook(look)
        model.think(make_batch(model, keys[:2]), n=3, max_new_tokens=2)
        hook.remove()
    assert strides and 0 not in strides


def test_what_is_sampled_for_a_video_goes_by_its_number(model, keys):
    one, two, again = (by_key(judge(model, some, max_new_tokens=30, temperature=1.7))[keys[0]]["cot"]
                       for some in ([keys[0], keys[1]], [keys[1], keys[0]], [keys[2], keys[0]]))
    assert one != two == again


def test_greedy_thinking_is_transformers_own_generate(model, keys):
    asked = as_transformers_asks(model, keys[0])
    expected = model.qwen.generate(
        **asked, max_new_tokens=40, do_sample=False, eos_token_id=model.processor.eos_id,
        pad_token_id=model.processor.eos_id)[0, asked["input_ids"].shape[1]:]
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


def test_keys_are_not_copied_for_each_head(model, keys, monkeypatch):
    """CoTs attend to as many keys as the model has kv heads, which real sizes have a quarter of."""
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query, key, value, *args, **kwargs):
        seen.append(key.shape[1])
        assert key.shape == value.shape
        return attend(query, key, value, *args, **kwargs)

    text = model.qwen.config.text_config
    assert text.num_key_value_heads < text.num_attention_heads
    tokens, mask = random_rollouts(model, 1, 2, 6)
    batch = model.encode(make_batch(model, keys[:1]))
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    model.group(batch, tokens, mask)
    assert seen == 2 * text.num_hidden_layers * [text.num_key_value_heads]  # prompts, and their CoTs


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
    model.save(tmp_path / "saved", score_mean=1.5, score_std=0.5)
    again = DeScore.load(tmp_path / "saved", device="cpu")
    cots = ["<think>\nsubject: a red circle", None, ""]
    model.eval()
    assert torch.equal(model.score(make_batch(model, keys), cots), again.score(make_batch(again, keys), cots))
    assert again.info["score_mean"] == 1.5 and again.processor.settings == model.processor.settings
    suffixes = {path.suffix for path in (tmp_path / "saved").iterdir()}
    assert suffixes <= {".json", ".safetensors", ".jinja"}


def test_what_trained_in_an_earlier_stage_is_saved_by_a_later_one(keys, tmp_path):
    """Stage 1 trains the mergers by default, stage 2 does not."""
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(4, train_merger=True)
    for parameter in model.trainable().values():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save(tmp_path / "one")
    later = DeScore.load(tmp_path / "one", device="cpu")
    later.set_trainable(4)
    later.save(tmp_path / "two")
    again = DeScore.load(tmp_path / "two", device="cpu")
    batch = make_batch(model, keys)
    assert torch.equal(model.eval().score(batch, [None] * 3), again.score(batch, [None] * 3))


def test_the_reference_is_the_policy_as_it_was(model, keys):
    tokens, mask = random_rollouts(model, 2, 2, 5)
    model.set_trainable(4)
    for name, parameter in model.trainable().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    before = {t: model.group(make_batch(model, keys[:2]), tokens, mask, t)[0] for t in (1.0, 0.7)}
    model.keep_reference()
    trains = set(model.trainable())
    for name, parameter in model.trainable().items():
        if "lora" in name:
            parameter.data.add_(0.01)
    after, _ = model.group(make_batch(model, keys[:2]), tokens, mask)
    for temperature, expected in before.items():
        reference = model.reference_logps(make_batch(model, keys[:2]), tokens, mask, temperature)
        torch.testing.assert_close(reference, expected.detach(), rtol=0, atol=5e-5)  # float32 of about 20
    assert (after - before[1.0]).abs().max() > 1e-3
    assert set(model.trainable()) == trains and not any("reference" in name for name in trains)


def test_the_reference_of_a_whole_model_is_a_copy(model, keys):
    tokens, mask = random_rollouts(model, 1, 2, 5)
    model.set_trainable(0)
    assert model.reference is None
    before = {t: model.group(make_batch(model, keys[:1]), tokens, mask, t)[0] for t in (1.0, 0.7)}
    model.keep_reference()
    model.qwen.lm_head.weight.data.mul_(1.1)
    for temperature, expected in before.items():
        reference = model.reference_logps(make_batch(model, keys[:1]), tokens, mask, temperature)
        torch.testing.assert_close(reference, expected.detach(), rtol=0, atol=1e-4)  # float64 against float32
    assert (model.group(make_batch(model, keys[:1]), tokens, mask)[0] - before[1.0]).abs().max() > 1e-3
    assert not any(p.requires_grad for p in model.reference.parameters())
    assert not any(name.startswith("_reference") for name, _ in model.named_parameters())


def test_a_reference_leaves_what_no_longer_trains_as_it_is():
    model = DeScore.load(ROOT / "toy/backbone", dtype=torch.bfloat16, device="cpu")
    model.set_trainable(0, train_merger=True)
    model.set_trainable(0)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.keep_reference()
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == kinds
    assert {parameter.dtype for parameter in model.reference.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("rank", [0, 4])
def test_bfloat16_trains_in_float32(rank, keys):
    model = DeScore.load(ROOT / "toy/backbone", dtype=torch.bfloat16, device="cpu")
    model.set_trainable(rank, train_merger=True)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    model.score(make_batch(model, keys), ["a red circle", None, ""]).sum().backward()
    assert all(p.grad is not None for name, p in model.trainable().items()
               if "merger" in name or name == "query")
    thoughts = model.think(make_batch(model, keys), n=2, max_new_tokens=5, seeds=[1, 2, 3])
    logps, scores = model.group(make_batch(model, keys), thoughts.tokens, thoughts.mask)
    torch.testing.assert_close(logps, thoughts.logps, rtol=0.1, atol=0.3)  # 8 bits of mantissa, two orders
    torch.testing.assert_close(scores, thoughts.scores, rtol=0.1, atol=0.1)


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


EARLIER = ROOT / "tests/golden/earlier_model"
EARLIER_SCORES = (-0.6256675720214844, 1.078215479850769)  # as it gave them, without a CoT and with one


def test_a_model_that_an_earlier_version_saved_scores_the_same():
    model = DeScore.load(EARLIER, device="cpu")
    key = (str(ROOT / "tests/golden/four.mp4"), "A red circle moves left.")
    cots = [None, "<think>\nsubject: a red circle\n</think>"]
    scores = model.score(make_batch(model, [key, key]), cots)
    assert scores.tolist() == pytest.approx(EARLIER_SCORES, abs=5e-5)
    found = [model.info[name] for name in ("stage", "score_mean", "score_std")]
    assert found == ["coldstart", 0.25, 0.5]
    assert model.processor.dimensions == DIMENSIONS


@pytest.mark.slow
def test_importing_the_code_changes_no_global_state():
    code = """
import importlib, logging, pathlib, signal, sys, warnings
import av, bitsandbytes, bitsandbytes.optim, huggingface_hub, httpx2, peft, torch, transformers
import torch.distributed.fsdp
from transformers.utils import logging as transformers_logging

def state():
    loggers = [logging.root, *(logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict))]
    levels = {logger.name: (logger.level, logger.disabled, len(logger.handlers)) for logger in loggers}
    return {"transformers": levels["transformers"], "bitsandbytes": levels["bitsandbytes"],
            "root": levels["root"], "filters": list(warnings.filters),
            "bars": transformers_logging.is_progress_bar_enabled(),
            "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
            "dtype": torch.get_default_dtype(), "seed": torch.initial_seed(), "grad": torch.is_grad_enabled()}

logging.getLogger("bitsandbytes")
before = state()
import model
after = state()
assert before == after, (before, after)
for path in sorted(pathlib.Path("support").glob("[a-z]*.py")):
    importlib.import_module(f"support.{path.stem}")
import coldstart, infer, rl
assert before == state(), (before, state())
print("unchanged", len(before["filters"]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("unchanged"), done.stderr[-3000:]


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
    (record,) = judge(model, keys[:1], max_new_tokens=5)
    sample, (_, seconds) = model.processor(*keys[0]), read_video(keys[0][0], model.processor.settings)
    ids = model.processor.prompt_ids(sample.grid, seconds, keys[0][1], record["cot"])
    sample = replace(sample, input_ids=ids)
    text = model.processor.tokenizer.decode(sample.input_ids)
    assert text.endswith(model.processor.instruction.split("<prompt>")[1] + record["cot"])
    assert text.count("<|im_start|>") == 1
    assert abs(record["score"] - plain(model, sample, [])[1].item()) < 1e-5
    ours = DeScore.load(release, dtype=torch.float64, device="cpu", layout="ours").double()
    assert abs(next(judge(ours, keys[:1], max_new_tokens=5))["score"] - record["score"]) > 1e-3


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
        logps, scores = model.group(make_batch(model, keys), tokens, mask)
        (logps.sum() + scores.sum()).backward()
        gradients.append({name: p.grad for name, p in model.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3,
                                   atol=1e-3 * gradient.abs().max().item())


def test_the_score_without_a_cot_rides_on_the_same_prefill(model, keys):
    batch = make_batch(model, keys)
    plainly = model.think(batch, n=2, max_new_tokens=10, seeds=[1, 2, 3])
    thoughts = model.think(batch, n=2, max_new_tokens=10, seeds=[1, 2, 3], without_cot=True)
    assert plainly.scores_no_cot is None
    assert all(torch.equal(one, other) for one, other in zip(plainly[:4], thoughts[:4]))
    torch.testing.assert_close(thoughts.scores_no_cot, model.score(batch, [None] * 3), rtol=1e-6, atol=1e-6)


def test_the_repetition_penalty_is_that_of_a_plain_greedy_loop(model, keys):
    """Over what the prompt holds, its video's tokens too, and the CoT: transformers' own definition, which
    is vLLM's, on one whole forward a token."""
    eos, penalty, length = model.processor.eos_id, 1.3, 14
    batch = make_batch(model, keys)
    thoughts = model.think(batch, 2, length, temperature=0, repetition_penalty=penalty)
    punish = RepetitionPenaltyLogitsProcessor(penalty)
    for b, key in enumerate(keys):
        chosen = []
        while len(chosen) < length and eos not in chosen:
            asked = as_transformers_asks(model, key, chosen)
            logits = model.qwen(**asked).logits[:, -1]
            chosen.append(punish(asked["input_ids"], logits).argmax(-1).item())
        for g in range(2):
            assert thoughts.tokens[b, g][thoughts.mask[b, g]].tolist() == chosen
        held = tokens_held(batch, 1, model.qwen.config.text_config.vocab_size)[b].nonzero()[:, 0].tolist()
        assert set(held) == set(model.processor(*key).input_ids.tolist()) >= {model.processor.video_id}
    logps, scores = model.group(batch, thoughts.tokens, thoughts.mask)
    torch.testing.assert_close(thoughts.logps, logps, **EXACT)  # the policy's own
    torch.testing.assert_close(thoughts.scores, scores, **EXACT)
    plainly = model.think(batch, 2, length, temperature=0)
    assert not torch.equal(plainly.tokens, thoughts.tokens)


def test_a_penalty_lowers_each_token_that_is_held_once():
    logits = torch.tensor([[2.0, -2.0, 0.0, 4.0, -1.0]])
    held = torch.tensor([[True, True, True, False, False]])
    expected = torch.tensor([[2 / 1.25, -2 * 1.25, 0.0, 4.0, -1.0]])
    torch.testing.assert_close(penalised(logits, held, 1.25), expected, rtol=0, atol=0)


def test_a_model_of_the_release_thinks_with_its_penalty_when_it_thinks_greedily(model, keys, monkeypatch):
    penalties = []

    def watched(logits, held, penalty):
        penalties.append(penalty)
        return penalised(logits, held, penalty)

    monkeypatch.setattr(descore, "penalised", watched)
    for layout, options, expected in (
            ("ours", {}, 1.0), ("release", {}, 1.05), ("release", {"temperature": 1.0}, 1.0),
            ("release", {"repetition_penalty": 1.0}, 1.0), ("ours", {"repetition_penalty": 1.2}, 1.2)):
        penalties.clear()
        list(judge(in_layout(model, layout), keys[:1], max_new_tokens=2, **options))
        assert penalties == ([] if expected == 1 else [expected] * 2)  # of two tokens
    for penalty, temperature, message in (
            (1.1, 0.7, "1.1 is for temperature 0, not 0.7"), (0.0, 0.0, "0.0 is not at least 0.01"),
            (-1.0, 0.0, "-1.0 is not at least"), (1e-45, 0.0, "1e-45 is not at least"),
            (torch.inf, 0.0, "inf is not"), (torch.nan, 0.0, "nan is not")):
        with pytest.raises(DataError, match=f"a repetition penalty of {message}"):
            list(judge(model, keys[:1], max_new_tokens=2, temperature=temperature,
                       repetition_penalty=penalty))
