"""A model on the disk: all of it is read, or none; the authors' own directories; hub ids."""

import io
import json
import math
import random
import shutil
import sys

import pytest
import torch
from conftest import ROOT
from damage import FATAL, damage
from launch import run
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from data import DataError, VideoSettings, patchify, read_video
from infer import judge
from model import DeScore
from tools.release import Release

BACKBONE = ROOT / "toy/backbone"
COTS = ["<think>\nsubject: a red circle", None]


def load(source, **options) -> DeScore:
    return DeScore.load(source, device="cpu", **options)


def scores_of(model, keys):
    return model.score(model.processor.collate([model.processor(*key) for key in keys[:2]]), COTS).tolist()


def disturb(model):
    """Let nothing that trains be as it was made."""
    torch.manual_seed(3)
    for parameter in model.trainable().values():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model that is an `adapter` and one that is `full`, without the sums of their files,
    so that what is in them must be looked at."""
    folder = tmp_path_factory.mktemp("saved")
    for name, rank in (("adapter", 2), ("full", 0)):
        model = load(BACKBONE)
        model.set_trainable(rank)
        disturb(model)
        model.save(folder / name)
        path = folder / name / "descore.json"
        info = json.loads(path.read_text())
        assert set(info["files"]) == {file.name for file in path.parent.iterdir()} - {path.name}
        path.write_text(json.dumps(info | {"files": {}}))
    return folder


@pytest.fixture(params=["adapter", "full"])
def copied(request, saved, tmp_path):
    """A copy of either, to be damaged."""
    for beside in ("adapter", "full"):  # an adapter finds its backbone by a relative path
        shutil.copytree(saved / beside, tmp_path / beside)
    if request.param == "adapter":
        change_json(tmp_path / "adapter/descore.json", backbone=str(BACKBONE))
    return tmp_path / request.param


def change_json(path, **changes):
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value != "gone"}))


def change_tensors(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------
# Whole or not at all


def test_a_backbone_thinks_but_does_not_score(keys, tmp_path):
    model = load(BACKBONE)
    batch = model.processor.collate([model.processor(*key) for key in keys[:2]])
    thoughts = model.think(batch, 2, 5, seeds=[1, 2], without_cot=True)
    assert thoughts.scores.isnan().all() and thoughts.scores_no_cot.isnan().all()
    with pytest.raises(DataError, match=r"toy/backbone: has no trained \[Reward\] and head"):
        model.score(batch, COTS)
    with pytest.raises(DataError, match="has no trained"):
        model.group(batch, thoughts.tokens, thoughts.mask)
    model.save(tmp_path / "copy")  # does not make a head of what is none
    assert not load(tmp_path / "copy").has_head
    model.set_trainable(2)
    assert model.score(batch, COTS).isfinite().all()


FILES = {"adapter": ["adapter_model.safetensors", "descore.safetensors"],
         "full": ["model.safetensors", "descore.safetensors"]}


@pytest.mark.parametrize("kind", ["one lost", "half lost", "header padded", "one more", "nan", "infinite",
                                  "integers"])
def test_what_weights_are_not_whole_is_named(copied, kind):
    for name in FILES[copied.name]:
        path = copied / name
        whole = path.read_bytes()

        def change(weights):
            first = min(weights)
            if kind == "one lost":
                del weights[first]
            elif kind == "half lost":
                for lost in sorted(weights)[::2]:
                    del weights[lost]
            elif kind == "one more":
                weights["more"] = torch.zeros(1)
            elif kind == "integers":
                weights[first] = weights[first].int()
            else:
                weights[first].view(-1)[-1] = {"nan": math.nan, "infinite": -math.inf}[kind]

        if kind == "header padded":
            path.write_bytes((len(whole) - 8).to_bytes(8, "little") + b"{}".ljust(len(whole) - 8))
        else:
            change_tensors(path, change)
        with pytest.raises(DataError, match=str(copied if name == "model.safetensors" else path)):
            load(copied)
        path.write_bytes(whole)
    load(copied)


@pytest.mark.parametrize("rank", [2, 0])
def test_a_file_that_is_not_as_it_was_saved_is_named(tmp_path, rank):
    model = load(BACKBONE)
    model.set_trainable(rank)
    model.save(tmp_path / "model")
    for path in sorted((tmp_path / "model").iterdir()):
        if path.name != "descore.json":
            content = path.read_bytes()
            path.write_bytes(content[:-2] + b" " + content[-1:])
            with pytest.raises(DataError, match=f"{path}: not as it was saved"):
                load(tmp_path / "model")
            path.unlink()
            with pytest.raises(DataError, match=f"{path}: no such file"):
                load(tmp_path / "model")
            path.write_bytes(content)
    load(tmp_path / "model")


@pytest.mark.parametrize(("change", "message"), [
    ({"score_mean": 1.0}, "not two numbers"), ({"score_mean": 0.0, "score_std": -1.0}, "score_std is -1"),
    ({"score_mean": "x", "score_std": 1.0}, "not two numbers"), ({"scoring_layout": "Release"}, "'Release'"),
    ({"args": "x"}, "'args' is 'x'"), ({"args": {"max_new_tokens": "x"}}, "max_new_tokens is 'x'"),
    ({"args": {"max_new_tokens": 0}}, "max_new_tokens is 0"),
    ({"instruction": "<video> Judge it."}, "<prompt>"), ({"video": {"max_frames": 1}}, "max_frames"),
    ({"video": {"max_pixels": 4096}}, "full: video settings .*max_pixels is 4096, below min_pixels, 131072"),
    ({"scoring_video": {"max_frames": 2}}, "full: video settings .*max_frames is 2, below min_frames, 4")])
def test_settings_that_make_no_sense_are_refused(saved, tmp_path, change, message):
    shutil.copytree(saved / "full", tmp_path / "full")
    change_json(tmp_path / "full/descore.json", **change)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "full")


@pytest.mark.parametrize("gone", ["descore.safetensors", "descore.json", "adapter_config.json",
                                  "adapter_model.safetensors", "model.safetensors", "config.json"])
def test_a_file_that_is_missing_is_named(copied, gone):
    if (copied / gone).is_file():
        (copied / gone).unlink()
        if (copied.name, gone) == ("full", "descore.safetensors"):  # what is left is a backbone
            assert not load(copied).has_head
            return
        with pytest.raises(DataError, match=str(copied)):
            load(copied)


def test_a_shard_that_is_missing_or_not_listed_is_an_error(copied):
    if copied.name == "adapter":
        return
    model = load(copied)
    (copied / "model.safetensors").unlink()
    model.qwen.save_pretrained(copied, max_shard_size="2MB")
    shards = sorted(copied.glob("model-*.safetensors"))
    assert len(shards) > 2
    load(copied)
    content = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(DataError, match=f"{copied}.*no Qwen3-VL can be loaded.*{shards[1].name}"):
        load(copied)
    shards[1].write_bytes(content)
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shards[1].name}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=f"{copied}: lacks "):
        load(copied)


@pytest.mark.parametrize("key", ["backbone", "video", "instruction", "dimensions"])
def test_settings_that_are_missing_are_not_made_up(copied, key):
    if key == "backbone" and copied.name == "full":
        return
    change_json(copied / "descore.json", **{key: "gone"})
    with pytest.raises(DataError, match=str(copied)):
        load(copied)


def test_a_backbone_of_another_size_is_an_error(copied):
    """Fewer layers than there are weights for would make another model of it."""
    if copied.name == "full":
        config = json.loads((copied / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] -= 1
        (copied / "config.json").write_text(json.dumps(config))
    else:
        change_json(copied / "adapter_config.json", target_modules=["q_proj"])
    with pytest.raises(DataError, match=r"has no place for .* and \d+ more$"):
        load(copied)


def test_another_rank_blames_the_adapter(copied):
    if copied.name == "adapter":
        with pytest.raises(DataError, match=f"{copied}: its adapter has rank 2, not 8; pass --lora-rank 2"):
            load(copied).set_trainable(8)


def test_any_damage_is_refused_in_one_line(saved, tmp_path):
    refused = 0
    for seed in range(25):
        rng = random.Random(seed)
        what = damage(saved / rng.choice(["adapter", "full"]), tmp_path / "bad", rng)
        if (tmp_path / "bad/adapter_config.json").is_file() and "descore.json" not in what:
            change_json(tmp_path / "bad/descore.json", backbone=str(BACKBONE))
        try:
            load(tmp_path / "bad")
            assert not any(f": {kind} (" in what for kind in FATAL), what
        except DataError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error), what
            refused += 1
    assert 8 < refused < 23


def test_code_that_comes_with_a_model_is_not_run(saved, tmp_path, monkeypatch):
    shutil.copytree(saved / "full", tmp_path / "evil")
    for name in ("config", "tokenizer_config", "processor_config"):
        path = tmp_path / f"evil/{name}.json"
        record = json.loads(path.read_text()) if path.is_file() else {}
        kinds = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor")
        record["auto_map"] = dict.fromkeys(kinds, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        path.write_text(json.dumps(record))
    (tmp_path / "evil/evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Evil: pass\n")
    for changes in ({}, {"model_type": "evil"}, {"model_type": "gone"}):
        change_json(tmp_path / "evil/config.json", **changes)
        change_json(tmp_path / "evil/tokenizer_config.json", tokenizer_class="Evil" if changes else "gone")
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
        try:
            load(tmp_path / "evil")
        except DataError as error:
            assert changes, error
        assert sys.stdin.tell() == 0 and not (tmp_path / "owned").exists()


def test_loading_prints_nothing(saved, capfd):
    load(saved / "full")
    model = load(saved / "adapter")
    assert capfd.readouterr() == ("", "") and model.has_head


# ------------------------------------------------------------------------------------------------------------
# Hub ids


def test_what_an_earlier_stage_trained_is_saved_though_it_trains_no_longer(keys, tmp_path):
    """Stage 1 trains the mergers, and stage 2 keeps them as they are."""
    first = load(BACKBONE)
    first.set_trainable(2, train_merger=True)
    disturb(first)
    first.save(tmp_path / "first")
    second = load(tmp_path / "first")
    second.set_trainable(2)
    second.save(tmp_path / "second")
    plain = load(BACKBONE)
    plain.set_trainable(2)
    expected = scores_of(first, keys)
    assert scores_of(load(tmp_path / "second"), keys) == expected != scores_of(plain, keys)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a directory into a cache of the hub's, laid out by hand, offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(directory, name):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("1234abcd")
        shutil.copytree(directory, folder / "snapshots/1234abcd")
        return name

    return put


def test_a_hub_id_gives_the_scores_of_the_directory(saved, keys, hub):
    expected = scores_of(load(saved / "full"), keys)
    assert scores_of(load(hub(saved / "full", "org/full")), keys) == expected
    with pytest.raises(DataError, match="org/none: no such directory, and no hub id"):
        load("org/none")


def test_an_adapter_on_a_hub_id(keys, hub, tmp_path):
    model = load(hub(BACKBONE, "org/backbone"))
    model.set_trainable(2)
    disturb(model)
    model.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/descore.json").read_text())["backbone"] == "org/backbone"
    expected = scores_of(model.eval(), keys)
    assert scores_of(load(tmp_path / "adapter"), keys) == expected
    assert scores_of(load(hub(tmp_path / "adapter", "org/adapter")), keys) == expected


# ------------------------------------------------------------------------------------------------------------
# The authors' directories, by the names that their code uses

THINKING = {"min_pixels": 16_384, "max_pixels": 16_384}
INSTRUCTION = "Judge this video:\n<video>\nPrompt: <prompt>\nThink first."


def make_release(folder, stage):
    """What their code leaves behind, tiny. Returns what to load, and the model as plain parts: backbone, head
    and tokenizer."""
    torch.manual_seed(5)
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<Reward>"]})
    qwen = Qwen3VLForConditionalGeneration.from_pretrained(BACKBONE, dtype=torch.float32)
    qwen.resize_token_embeddings(len(tokenizer))
    qwen.get_input_embeddings().weight.data[-1].normal_(std=0.05)
    head = torch.randn(1, 192)
    weights = folder / ("actor/huggingface" if stage == 2 else "checkpoint-10")
    weights.mkdir(parents=True)
    tokenizer.save_pretrained(weights)
    if stage == 1:
        qwen.save_pretrained(weights)  # without what LoRA adds, which stands beside it
        names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        config = LoraConfig(r=4, lora_alpha=128, target_modules=names).to_dict()
        config |= {"peft_type": "LORA", "task_type": None, "target_modules": names}
        (weights / "lora_adapter").mkdir()
        (weights / "lora_adapter/adapter_config.json").write_text(json.dumps(config))
        lora = {}
        for name, module in qwen.model.language_model.named_modules():
            if name.split(".")[-1] in names:
                a, b = torch.randn(4, module.in_features) * 0.02, torch.randn(module.out_features, 4) * 0.02
                full = f"base_model.model.model.language_model.{name}"
                lora |= {f"{full}.lora_A.weight": a, f"{full}.lora_B.weight": b}
                module.weight.data += 128 / 4 * b @ a
        save_file(lora, weights / "lora_adapter/adapter_model.safetensors")
        torch.save({"base_model.model.rm_head.weight": head}, weights / "rm_head.pth")
        torch.save({"base_model.model.rm_head.weight": head}, weights / "non_lora_state_dict.pth")
        change_json(weights / "config.json", architectures=["Qwen3VLRewardModelBT"])
    else:
        qwen.save_pretrained(weights)  # as their script merges the shards
        torch.save({"model": {"rm_head.weight": head}}, weights.parent / "rm_head.pth")
    return weights, qwen, head, tokenizer


def their_score(qwen, head, tokenizer, key, cot):
    """Their inference.py with transformers alone: everything in the user's turn, <Reward> at its end."""
    settings = VideoSettings(min_pixels=3136, max_pixels=200_704, patch_size=8)
    frames, seconds = read_video(key[0], settings)
    patches, grid = patchify(frames, settings)
    shown = ""
    for first in range(0, len(seconds), 2):
        pads = "<|video_pad|>" * (grid[1] * grid[2] // 4)
        shown += f"<{sum(seconds[first:first + 2]) / 2:.1f} seconds><|vision_start|>{pads}<|vision_end|>"
    text = INSTRUCTION.replace("<prompt>", key[1]).replace("<video>", shown)
    ids = tokenizer(f"<|im_start|>user\n{text}{cot}<Reward><|im_end|>\n", return_tensors="pt",
                    add_special_tokens=False).input_ids
    is_video = ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    out = qwen.model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=is_video.int() * 2,
                     pixel_values_videos=patches.float() / 127.5 - 1, video_grid_thw=torch.tensor([grid]))
    here = ids[0] == tokenizer.convert_tokens_to_ids("<Reward>")
    assert here.sum() == 1
    return (out.last_hidden_state[0, here] @ head.T).item()


@pytest.mark.parametrize("stage", [1, 2])
def test_what_the_authors_code_writes_scores_as_their_code_does(stage, keys, tmp_path):
    weights, *parts = make_release(tmp_path, stage)
    found = []
    for source in (weights, weights.parent)[:stage]:  # after stage 2 they call it actor
        model = load(source, video=THINKING)
        model.processor.instruction = INSTRUCTION
        found.append(list(judge(model, keys[:2], max_new_tokens=5)))
    assert len(found) == stage and all(records == found[0] for records in found)
    for record in found[0]:
        expected = their_score(*parts, (record["video"], record["prompt"]), record["cot"])
        assert record["score"] == pytest.approx(expected, abs=1e-4) and abs(expected) > 0.1
    seen = model.processor(*keys[0])
    assert math.prod(seen.grid[1:]) == 16_384 / 64  # thinking sees more
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert list(judge(again, keys[:2], max_new_tokens=5)) == found[0]
    change_json(tmp_path / "saved/descore.json", scoring_video={"max_pixels": "many"})
    with pytest.raises(DataError, match="saved: video settings that make no sense"):
        load(tmp_path / "saved")


@pytest.mark.slow
def test_a_model_scores_in_the_layout_that_it_is_loaded_in(keys, tmp_path):
    weights, *_ = make_release(tmp_path, 2)
    own, ours = load(weights), load(weights, layout="ours")
    assert type(own) is Release and type(ours) is DeScore
    assert own.info["scoring_layout"] == "release" and "scoring_layout" not in ours.info
    assert own.info["scoring_video"] == ours.info["scoring_video"]
    assert torch.equal(own.head.weight, ours.head.weight) and torch.equal(own.query, ours.query)
    for model in (own, ours):
        model.save(tmp_path / type(model).__name__)
    again = tmp_path / "Release"
    for source, layout, kind in (
            (again, None, Release), (again, "ours", DeScore), (again, "release", Release),
            (tmp_path / "DeScore", None, DeScore), (BACKBONE, "release", Release)):
        assert type(load(source, layout=layout)) is kind
    shutil.copy(weights.parent / "rm_head.pth", tmp_path / "DeScore")  # beside a head of ours it is not read
    assert type(load(tmp_path / "DeScore")) is DeScore
    found = {name: scores_of(load(again, layout=name), keys) for name in ("ours", "release")}
    assert found["ours"] == scores_of(ours, keys) != found["release"] == scores_of(own, keys)
    with pytest.raises(DataError, match="there is no scoring layout 'theirs', but ours and release"):
        load(BACKBONE, layout="theirs")

    class Mine(DeScore):
        def overall(self, parts):
            return -parts[..., 0]

    mine = Mine.load(again, device="cpu")
    assert isinstance(mine, Release) and isinstance(mine, Mine)
    assert scores_of(mine, keys) == [-score for score in found["release"]]


@pytest.mark.slow
def test_in_the_releases_layout_each_thought_has_a_score_of_its_own(keys, tmp_path):
    model = load(make_release(tmp_path, 2)[0])
    batch = model.processor.collate([model.processor(*key) for key in keys[:2]])
    thoughts = model.think(batch, 3, 6, temperature=2.0, seeds=[1, 2])
    for nth in range(3):
        cots = [model.processor.decode(thoughts.tokens[i, nth][thoughts.mask[i, nth]]) for i in range(2)]
        assert thoughts.scores[:, nth].tolist() == pytest.approx(model.score(batch, cots).tolist(), abs=1e-5)
    assert thoughts.scores.std(1).min() > 1e-3


def test_the_release_is_read_as_its_own_source_says(keys, tmp_path):
    model = load(make_release(tmp_path, 2)[0])
    frames, seconds = read_video(keys[0][0], model.processor.settings)
    unnamed = model.processor.collate([model.processor.sample(frames, seconds, "p")])
    with pytest.raises(DataError, match="the batch does not say which"):
        model.score(unnamed, [None])


def test_without_tools_a_release_is_one_clear_line_and_ours_judges(saved, keys, tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "support", tmp_path / "support")
    weights, *_ = make_release(tmp_path, 2)
    (video, prompt), short = keys[0], ["--max-new-tokens", 3, "--json"]
    shutil.copytree(saved / "full", tmp_path / "ours")
    done = run("infer.py", video, prompt, "--model", tmp_path / "ours", *short, root=tmp_path)
    assert math.isfinite(json.loads(done.stdout)["score"])
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": prompt, "video_a": video, "video_b": video, "preference": "tie"}))
    for what, *command in (
            ("in_its_layout is in tools/release.py", video, prompt, "--model", weights),
            ("in_its_layout is in tools/release.py", video, prompt, "--model", tmp_path / "ours",
             "--scoring-layout", "release"),
            ("open_journal is in tools/journal.py", "--pairs", pairs, "--model", tmp_path / "ours",
             "--out", "o")):
        done = run("infer.py", *command, *short, root=tmp_path, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"error: {what}, and this copy of the project has no such file" in done.stderr


def test_shards_that_were_not_merged_are_an_error(tmp_path):
    weights, *_ = make_release(tmp_path, 2)
    (weights / "model.safetensors").unlink()
    torch.save({}, weights.parent / "model_world_size_8_rank_0.pt")
    with pytest.raises(DataError, match=r"actor/huggingface: no Qwen3-VL can be loaded .*model\.safetensors"):
        load(weights.parent)


def test_a_head_of_theirs_that_is_not_finite_is_an_error(tmp_path):
    weights, *_ = make_release(tmp_path, 1)
    torch.save({"base_model.model.rm_head.weight": torch.full((1, 192), math.nan)}, weights / "rm_head.pth")
    with pytest.raises(DataError, match=r"rm_head\.pth: holds no head .*not finite"):
        load(weights)
