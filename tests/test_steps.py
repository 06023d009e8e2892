"""The wires of both stages: every figure and every weight of short runs, calculated again from the equations.

The stages run as processes. What they should have computed is written out here: transformers' own forward, a
row a CoT, no cache, no packing; LoRA, losses, clipping and warm-up by hand, torch's autograd and AdamW."""

import itertools
import json
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TOY_VIDEO, plain_head
from launch import run
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForImageTextToText, AutoTokenizer

from model import OWN, DeScore

RANK, EMBEDDING = 4, "language_model.embed_tokens.weight"
LABELS = ["tie", "A", "B", "B", "A", "tie", "B", "A"]  # stage 2 takes the first six
COMMON = [*TOY_VIDEO, "--lora-rank", RANK, "--workers", 0]
DECAY = 3.0


class Plain:
    """transformers' own model on a backbone's weights; [Reward] is one more row of the embedding."""

    def __init__(self, backbone):
        self.qwen = AutoModelForImageTextToText.from_pretrained(backbone, dtype=torch.float32)
        self.qwen.eval().requires_grad_(False)
        self.frozen = dict(self.qwen.model.named_parameters())
        self.tokenizer = AutoTokenizer.from_pretrained(backbone)
        self.end, self.video = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|video_pad|>"])

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids):
        return self.tokenizer.decode([i for i in ids if i != self.end], clean_up_tokenization_spaces=False)

    def weights(self, folder, mergers=False):
        """What a saved model trains, by the names of transformers' own modules."""
        found = load_file(folder / "adapter_model.safetensors") | load_file(folder / "descore.safetensors")
        found = {re.sub(r"^.*?(?=language_model\.|visual\.)", "", name): w for name, w in found.items()}
        more = {name: w for name, w in self.frozen.items() if mergers and "merger" in name}
        return {name: w.clone().requires_grad_() for name, w in (more | found).items()}

    def __call__(self, weights, rows):
        """For each (sample, tokens of a CoT): log π of each of the tokens, and the score behind them."""
        changed = {name: w for name, w in weights.items() if "merger" in name}
        for name, a in weights.items():
            if "lora_A" in name:
                place, b = name.replace("lora_A.", ""), weights[name.replace("lora_A", "lora_B")]
                changed[place] = self.frozen[place] + 2 * b @ a  # alpha = 2 · rank
        table = self.frozen[EMBEDDING]
        # Where a CoT says <|video_pad|> it is a word like any other: here one more that looks the same.
        changed[EMBEDDING] = torch.cat([table, weights["query"][None], table[None, self.video]])
        query, word = len(table), len(table) + 1
        whole = []
        for sample, tokens in rows:
            cot = [word if i == self.video else i for i in tokens if i != self.end]
            whole.append([*sample.input_ids.tolist(), *cot, query])
        ids = torch.tensor([row + [0] * (max(map(len, whole)) - len(row)) for row in whole])
        mask = torch.tensor([[i < len(row) for i in range(ids.shape[1])] for row in whole])
        hidden = functional_call(self.qwen.model, changed, (), {
            "input_ids": ids, "attention_mask": mask.long(), "mm_token_type_ids": (ids == self.video) * 2,
            "pixel_values_videos": torch.cat([s.patches for s, _ in rows]) / 127.5 - 1,
            "video_grid_thw": torch.tensor([s.grid for s, _ in rows])}).last_hidden_state
        logps, scores = [], []
        for h, row, (sample, tokens) in zip(hidden, whole, rows):
            before = len(sample.input_ids) - 1
            logits = self.qwen.lm_head(h[before : before + len(tokens)]).log_softmax(-1)
            logps.append(logits[range(len(tokens)), tokens])
            scores.append(plain_head(h[len(row) - 1], weights))
        return logps, torch.stack(scores)


class Steps:
    """AdamW along clipped gradients."""

    def __init__(self, weights, lr, head_lr, max_norm):
        own = [w for name, w in weights.items() if name.startswith(OWN)]
        rest = [w for name, w in weights.items() if not name.startswith(OWN)]
        self.all = own + rest
        self.adam = torch.optim.AdamW([{"params": own, "lr": head_lr}, {"params": rest, "lr": lr}],
                                      weight_decay=DECAY)
        self.rates, self.max_norm = (head_lr, lr), max_norm

    def __call__(self, warm=1.0):
        """One step along the gradients, at a share of the rates; their norm before it was clipped."""
        norm = sum((w.grad**2).sum() for w in self.all) ** 0.5
        for w in self.all:
            w.grad *= min(1.0, self.max_norm / norm)
        for group, rate in zip(self.adam.param_groups, self.rates):
            group["lr"] = warm * rate
        self.adam.step()
        self.adam.zero_grad()
        return norm.item()


def metrics(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def assert_moved_alike(start, expected, found):
    """Of each tensor the way it went, not where it is. Adam gives a gradient near zero, whose sign is a
    matter of rounding, as long a step as any: one element in a hundred may go the other way. It is then off
    by twice its way, and the whole by √0.01 · 2."""
    assert found.keys() == expected.keys() == start.keys()
    for name, weight in expected.items():
        way, other = (w.detach() - start[name].detach() for w in (weight, found[name]))
        apart = (way - other).abs().flatten()
        assert apart.quantile(0.99) <= 1e-3 * way.abs().mean(), name
        assert apart.norm() <= 0.2 * way.norm(), name


@pytest.fixture(scope="module")
def backbone():
    return ROOT / "toy/backbone"


@pytest.fixture(scope="module")
def plain(backbone):
    return Plain(backbone)


@pytest.fixture(scope="module")
def start(backbone, tmp_path_factory):
    """A saved model in which nothing is zero."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start") / "model"
    model = DeScore.load(backbone, device="cpu")
    model.set_trainable(RANK)
    for name, parameter in model.trainable().items():
        if "lora_B" in name or name == "query":
            parameter.data.normal_(std=0.12)
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(world_dir, plain, tmp_path_factory):
    """A file of pairs with CoTs and reference sub-scores, no two videos of a pair alike in either; with their
    samples."""
    rows = [json.loads(line) for line in (world_dir / "train.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["scores_a"] != row["scores_b"]][: len(LABELS)]
    processor = DeScore.load(ROOT / "toy/backbone", device="cpu").processor
    for i, (row, label) in enumerate(zip(rows, LABELS, strict=True)):
        row["preference"] = label
        for side in "ab":
            row[f"video_{side}"] = str(world_dir / row[f"video_{side}"])
            answer = json.dumps({"dimensional_scores": row[f"scores_{side}"]})
            row[f"cot_{side}"] = (f"<think>\n{'well, ' * i}subject: {side} <|im_end|> seen\n</think>\n"
                                  f"<answer>\n{answer}\n</answer>\n")
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        row["samples"] = [processor(row[f"video_{side}"], row["prompt"]) for side in "ab"]
        row["cots"] = [plain.encode(row[f"cot_{side}"]) for side in "ab"]
    return file, rows


def preferred(row):
    """Which of a pair's two videos is the winner, which the loser."""
    return {"A": (0, 1), "B": (1, 0)}[row["preference"]]


# ------------------------------------------------------------------------------------------------------------
# Stage 1

LR, HEAD_LR, MAX_NORM = 5e-4, 2e-3, 7.0  # some steps are clipped, some are not


def coldstart(pairs, start, out, *extra):
    run("coldstart.py", *stage1_flags(pairs, start, out), *extra)
    return metrics(out)


def stage1_flags(pairs, start, out):
    return ["--model", start, "--train", pairs[0], "--out", out, *COMMON, "--lr", LR, "--head-lr", HEAD_LR,
            "--weight-decay", DECAY, "--max-grad-norm", MAX_NORM, "--max-tokens", 1000]


def margins(plain, weights, rows):
    """r_w − r_l of each pair (pairs, 2, 2): the winner's and the loser's CoT shown (0) or masked (1)."""
    table = torch.empty(len(rows), 2, 2)
    for row, found in zip(rows, table):
        winner, loser = preferred(row)
        with torch.no_grad():
            _, scores = plain(weights, list(zip(2 * row["samples"], [*row["cots"], [], []])))
        found[:] = scores.view(2, 2)[:, winner, None] - scores.view(2, 2)[:, loser]
    return table


def explanations(record, table):
    """Which pairs and which of their CoTs masked would give a step's logged loss and margin, by how far they
    are off: (off, pairs, masks), the nearest first."""
    found = []
    for some in itertools.combinations(range(len(table)), 3):
        for masks in itertools.product(itertools.product((0, 1), (0, 1)), repeat=3):
            m = torch.stack([table[(i, *mask)] for i, mask in zip(some, masks)])
            off = abs(-F.logsigmoid(m).mean() - record["loss"]) + abs(m.mean() - record["margin"])
            found.append((off.item(), some, masks))
    return sorted(found)


@pytest.fixture(scope="module")
def stage1(plain, pairs, start, tmp_path_factory):
    """The run, and what should have come of it: of each step its record, what explains it, and what should
    have been logged."""
    out = tmp_path_factory.mktemp("coldstart")
    records = coldstart(pairs, start, out, "--epochs", 2, "--batch-size", 3, "--warmup", 0.75)
    decided = [row for row in pairs[1] if row["preference"] != "tie"]
    weights, steps = plain.weights(start, mergers=True), []
    descend = Steps(weights, LR, HEAD_LR, MAX_NORM)
    for step, record in enumerate(records, 1):
        best, *others = explanations(record, margins(plain, weights, decided))
        ms = []
        for row, mask in zip([decided[i] for i in best[1]], best[2]):
            read = [(row["samples"][side], [] if masked else row["cots"][side])
                    for side, masked in zip(preferred(row), mask)]
            r_w, r_l = plain(weights, read)[1]
            ms.append(r_w - r_l)
        ms = torch.stack(ms)
        loss = -F.logsigmoid(ms).mean()
        loss.backward()
        warm = min(1.0, step / (0.75 * 4))
        steps.append((record, best, others[0][0], {
            "loss": loss.item(), "margin": ms.mean().item(), "accuracy": (ms > 0).float().mean().item(),
            "lr": warm * LR, "grad_norm": descend(warm)}))
    return out, steps, weights


def test_one_choice_of_pairs_and_masks_explains_each_step_of_stage_1(stage1):
    _, steps, _ = stage1
    seen, masks = [], []
    for _, (off, some, masked), next_off, _ in steps:
        assert off < 1e-4 and next_off > 1e-3
        seen += some
        masks += masked
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))  # each pair once an epoch
    assert set(masks) == {(0, 0), (1, 1)}  # both CoTs of a pair or none


def test_stage_1_logs_what_the_equations_give(stage1):
    _, steps, _ = stage1
    assert [record["step"] for record, *_ in steps] == [1, 2, 3, 4]
    for record, _, _, expected in steps:
        assert {key: record[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=3e-5)


def test_some_steps_of_stage_1_are_clipped(stage1):
    assert len({expected["grad_norm"] > MAX_NORM for *_, expected in stage1[1]}) == 2


def test_stage_1_moves_every_weight_as_adamw_would(stage1, start, plain):
    out, _, expected = stage1
    assert_moved_alike(plain.weights(start, mergers=True), expected, plain.weights(out / "model"))


@pytest.mark.parametrize("p", [0, 1])
def test_p_is_the_chance_that_a_pair_is_masked(p, plain, pairs, start, tmp_path):
    (record,) = coldstart(pairs, start, tmp_path, "--epochs", 1, "--batch-size", 6, "--mask-p", p)
    decided = [row for row in pairs[1] if row["preference"] != "tie"]
    m = margins(plain, plain.weights(start), decided)[:, p, p]
    assert record["loss"] == pytest.approx(-F.logsigmoid(m).mean().item(), abs=1e-5)
    assert record["margin"] == pytest.approx(m.mean().item(), abs=1e-5)


def test_the_expectation_over_the_mask_is_both_losses_weighed(plain, pairs, start, tmp_path):
    run("experiments/paradigms.py", "expected", *stage1_flags(pairs, start, tmp_path), "--epochs", 1,
        "--batch-size", 6, "--mask-p", 0.3, "--warmup", 0)
    (record,) = metrics(tmp_path)
    weights, expected = plain.weights(start, mergers=True), Counter()
    descend = Steps(weights, LR, HEAD_LR, MAX_NORM)
    for row in pairs[1]:
        if row["preference"] == "tie":
            continue
        winner, loser = preferred(row)
        for share, cots in ((0.7, row["cots"]), (0.3, ([], []))):
            r_w, r_l = plain(weights, [(row["samples"][side], cots[side]) for side in (winner, loser)])[1]
            loss = -share * F.logsigmoid(r_w - r_l) / 6
            loss.backward()
            figures = {"loss": loss, "margin": share * (r_w - r_l) / 6, "accuracy": share * (r_w > r_l) / 6}
            expected.update({name: value.item() for name, value in figures.items()})
    expected["grad_norm"] = descend()
    assert {key: record[key] for key in expected} == pytest.approx(expected, rel=5e-5, abs=1e-5)
    assert_moved_alike(plain.weights(start, mergers=True), weights, plain.weights(tmp_path / "model"))


# ------------------------------------------------------------------------------------------------------------
# Stage 2

G, LR2, MAX_NORM2, BETA, BT_WEIGHT, CLIP = 3, 5e-4, 8.5, 0.1, 0.5, (0.25, 0.35)
WEIGHTS = {"format": 0.2, "quality": 0.5, "length": 0.3}
LENGTH = (103, 133)
# Notes what each rollout read and wrote, and under which log-probabilities.
RECORDER = """
import recited, rl, torch
from model import DeScore

recited.install()
think, calls = DeScore.think, []

def recorded(self, batch, *args, **kwargs):
    found = think(self, batch, *args, **kwargs)
    prompts = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.mask)]
    calls.append((prompts, *found[:3]))
    return found

DeScore.think = recorded
rl.main()
torch.save(calls, "{}")
"""


def reward(text, gold, n_tokens):
    """The three rewards of a CoT."""
    block = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", text, re.DOTALL)
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    try:
        (answer,) = map(json.loads, answers)
        scores = answer["dimensional_scores"]
        read = scores.keys() == gold.keys() and all(v in (0, 1, 2, "N/A") for v in scores.values())
        read &= all(answers[0].count(f'"{d}"') == 1 for d in gold)  # one dimension, one sub-score
    except (ValueError, KeyError):
        read = False
    tags = len(re.findall(r"</?(?:think|answer)>", text)) == 4
    low, high = LENGTH
    return {"format": float(bool(read and block and tags and block[1].strip())),
            "quality": sum(scores[d] == v for d, v in gold.items()) / len(gold) if read else 0.0,
            "length": min(max((n_tokens - low) / (high - low), 0.0), 1.0)}


def advantages(rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    if rewards.max() - rewards.min() < 1e-9:
        return torch.zeros(len(rewards))
    return ((rewards - rewards.mean()) / rewards.std(correction=1)).float()


def watched(plain, weights, rows, call):
    """What a call of `think` did, video by video: whose prompt it was tells the pair, and which of its two
    videos it saw tell the log-probabilities, of which one CoT's are enough."""
    for prompt, tokens, mask, noted in zip(*call):
        cots = [t[m].tolist() for t, m in zip(tokens, mask)]
        (i,) = [i for i, row in enumerate(rows) if row["samples"][0].input_ids.tolist() == prompt]
        samples, apart = rows[i]["samples"], []
        with torch.no_grad():
            for sample in samples:
                ((first,), _) = plain(weights, [(sample, cots[0])])
                apart.append((first - noted[0][mask[0]]).abs().max().item())
            side = apart.index(min(apart))
            old, _ = plain(weights, [(samples[side], cot) for cot in cots])
        off = (torch.cat(old) - noted[mask]).abs().max().item()
        yield {"pair": i, "side": side, "cots": cots, "old": old, "off": off, "next_off": max(apart),
               "kl": [], "clipped": [], "to_bound": []}


def judged(plain, video, row):
    """Rewards and all else that is logged of a video's rollouts."""
    gold, cots = row[f"scores_{'ab'[video['side']]}"], video["cots"]
    parts = [reward(plain.decode(cot), gold, len(cot)) for cot in cots]
    totals = [sum(w * part[name] for name, w in WEIGHTS.items()) for part in parts]
    video["advantages"] = advantages(totals)
    return [{"reward": total, **{f"reward_{name}": value for name, value in part.items()},
             "cot_tokens": len(cot), "truncated": float(plain.end not in cot),
             "entropy": -old.mean().item(), "no_signal": float(not video["advantages"].any())}
            for total, part, cot, old in zip(totals, parts, cots, video["old"])]


def update(plain, weights, reference, rows, videos):
    """The gradient of one update's loss; what is logged of it."""
    figures = dict.fromkeys(("loss", "grpo_loss", "bt_loss", "bt_accuracy"), 0.0)
    by_pair = {}
    for video in sorted(videos, key=lambda video: video["side"]):
        by_pair.setdefault(video["pair"], []).append(video)
    decided = sum(rows[i]["preference"] != "tie" for i in by_pair)
    for i, two in by_pair.items():
        read = [(rows[i]["samples"][video["side"]], cot) for video in two for cot in video["cots"]]
        logps, scores = plain(weights, read)
        with torch.no_grad():
            ref_logps, _ = plain(reference, read)
        loss, low, high = 0.0, 1 - CLIP[0], 1 + CLIP[1]
        of_cots = zip([(video, g) for video in two for g in range(G)], logps, ref_logps)
        for (video, g), logp, ref in of_cots:
            ratio, A = (logp - video["old"][g]).exp(), video["advantages"][g]
            kl = (ref - logp).exp() - (ref - logp) - 1
            objective = torch.minimum(ratio * A, ratio.clamp(low, high) * A) - BETA * kl
            loss -= objective.mean() / (len(videos) * G)
            video["kl"].append(kl.detach())
            if A:
                bound = low if A < 0 else high
                video["to_bound"].append((ratio - bound).abs().min().item())
            video["clipped"].append(torch.stack([(A < 0) & (ratio < low), (A > 0) & (ratio > high)]))
        figures["grpo_loss"] += loss.item()
        if rows[i]["preference"] != "tie":
            r_w, r_l = (scores.view(2, G)[side] for side in preferred(rows[i]))
            bt = -F.logsigmoid(r_w - r_l).sum() / (decided * G)
            loss += BT_WEIGHT * bt
            figures["bt_loss"] += bt.item()
            figures["bt_accuracy"] += (r_w > r_l).sum().item() / (decided * G)
        loss.backward()
        figures["loss"] += loss.item()
    return figures | by_token(videos)


def by_token(videos):
    """KL and the share of what is clipped, means over all tokens."""
    kl = torch.cat([kl for video in videos for kl in video["kl"]])
    clipped = torch.cat([clip for video in videos for clip in video["clipped"]], 1).any(0)
    return {"kl": kl.mean().item(), "clip_fraction": clipped.float().mean().item()}


@pytest.fixture(scope="module")
def stage2(plain, pairs, start, tmp_path_factory):
    """The run, and what should have come of it: of each step its record, its videos, and what should have
    been logged."""
    out = tmp_path_factory.mktemp("rl")
    (out / "recorder.py").write_text(RECORDER.format(out / "calls.pt"))
    (out / "pairs.jsonl").write_text("".join(pairs[0].read_text().splitlines(keepends=True)[:6]))
    run(out / "recorder.py", "--model", start, "--train", out / "pairs.jsonl", "--out", out, *COMMON,
        "--steps", 3, "--updates", 2, "--batch-size", 6, "--group-size", G, "--think-tokens", 2000,
        "--max-new-tokens", 111, "--lr", LR2, "--weight-decay", DECAY, "--max-grad-norm", MAX_NORM2,
        "--beta", BETA, "--bt-weight", BT_WEIGHT, "--clip-low", CLIP[0], "--clip-high", CLIP[1],
        "--length-low", LENGTH[0], "--length-high", LENGTH[1],
        *(part for name, w in WEIGHTS.items() for part in (f"--w-{name}", w)))
    rows, calls = pairs[1][:6], enumerate(torch.load(out / "calls.pt"))
    weights, reference, steps = plain.weights(start), plain.weights(start), []
    descend = Steps(weights, LR2, LR2, MAX_NORM2)
    for record in metrics(out):
        videos = []
        while len(videos) < 12:
            number, call = next(calls)
            videos += [video | {"call": number} for video in watched(plain, weights, rows, call)]
        rollouts = [one for video in videos for one in judged(plain, video, rows[video["pair"]])]
        expected = {name: sum(one[name] for one in rollouts) / len(rollouts) for name in rollouts[0]}
        updates = []
        for half in (videos[:6], videos[6:]):
            figures = update(plain, weights, reference, rows, half)
            updates.append(figures | {"grad_norm": descend()})
        expected |= {name: sum(one[name] for one in updates) / 2 for name in updates[0]} | by_token(videos)
        steps.append((record, videos, expected, updates))
    return out, steps, weights, list(calls)


def test_stage_2_thinks_about_each_video_of_a_step_with_the_weights_before_it(stage2):
    _, steps, _, unexplained = stage2
    assert not unexplained and [record["step"] for record, *_ in steps] == [1, 2, 3]
    for _, videos, *_ in steps:
        assert all(video["off"] < 2e-3 and video["next_off"] > 0.1 for video in videos)
        seen = [(video["pair"], video["side"]) for video in videos]
        assert sorted(seen) == list(itertools.product(range(6), (0, 1)))
        assert len({video["pair"] for video in videos[:6]}) == 3  # both videos of a pair in one update


def test_stage_2_logs_what_the_equations_give(stage2):
    _, steps, *_ = stage2
    for record, _, expected, _ in steps:
        assert {key: record[key] for key in expected} == pytest.approx(expected, rel=2e-4, abs=5e-5)


def test_the_run_of_stage_2_shows_all_that_there_is_to_see(stage2):
    _, steps, *_ = stage2
    for _, videos, expected, updates in steps:
        for half in (videos[:6], videos[6:]):  # of as many decided pairs each: means of means are plain means
            assert [LABELS[video["pair"]] for video in half].count("tie") == 2
        assert updates[1]["kl"] > 0 and 0 < expected["truncated"] < 0.5
    assert any(updates[1]["clip_fraction"] > 0 for *_, updates in steps)
    videos = [video for _, videos, *_ in steps for video in videos]
    assert set(Counter(video["call"] for video in videos).values()) == {2, 4}  # forwards of unequal weight
    assert (torch.cat([c for v in videos for c in v["clipped"]], 1).sum(1) > 5).all()  # at both bounds
    # Nothing is so near a bound, or the mean of its group, that rounding decides what is clipped.
    assert min(near for video in videos for near in video["to_bound"]) > 1e-4
    advantages = torch.cat([video["advantages"] for video in videos])
    assert advantages[advantages != 0].abs().min() > 1e-2
    assert len({update["grad_norm"] > MAX_NORM2 for *_, updates in steps for update in updates}) == 2
    assert len({bool(video["advantages"].any()) for video in videos}) == 2


def test_stage_2_moves_every_weight_as_adamw_would(stage2, start, plain):
    out, _, expected, _ = stage2
    assert_moved_alike(plain.weights(start), expected, plain.weights(out / "model"))


def test_all_rollouts_of_a_winner_meet_all_of_its_loser(plain, pairs, start, tmp_path):
    (tmp_path / "recorder.py").write_text(RECORDER.format(tmp_path / "calls.pt"))
    (tmp_path / "pairs.jsonl").write_text("".join(pairs[0].read_text().splitlines(keepends=True)[:4]))
    run(tmp_path / "recorder.py", "--model", start, "--train", tmp_path / "pairs.jsonl", "--out", tmp_path,
        *COMMON, "--steps", 1, "--updates", 1, "--batch-size", 4, "--group-size", G, "--max-new-tokens", 40,
        "--lr", LR2, "--weight-decay", DECAY, "--max-grad-norm", MAX_NORM2, "--bt-weight", BT_WEIGHT,
        "--beta", 0, "--bt-pairs", "all", *(part for name in WEIGHTS for part in (f"--w-{name}", 0)))
    rows, weights, by_pair = pairs[1][:4], plain.weights(start), {}
    for call in torch.load(tmp_path / "calls.pt"):
        for video in watched(plain, weights, rows, call):
            by_pair.setdefault(video["pair"], {})[video["side"]] = video["cots"]
    loss, right = 0.0, 0
    for i in (1, 2, 3):  # the first is a tie
        read = [(rows[i]["samples"][side], cot) for side in preferred(rows[i]) for cot in by_pair[i][side]]
        r_w, r_l = plain(weights, read)[1].view(2, G)
        for one, other in itertools.product(r_w, r_l):
            loss -= F.logsigmoid(one - other) / (3 * G * G)
            right += int(one > other)
    (BT_WEIGHT * loss).backward()
    descend = Steps(weights, LR2, LR2, MAX_NORM2)
    (record,) = metrics(tmp_path)
    expected = {"bt_loss": loss.item(), "loss": BT_WEIGHT * loss.item(), "bt_accuracy": right / (3 * G * G),
                "grad_norm": descend()}
    assert {key: record[key] for key in expected} == pytest.approx(expected, rel=5e-5, abs=1e-5)
    assert_moved_alike(plain.weights(start), weights, plain.weights(tmp_path / "model"))
