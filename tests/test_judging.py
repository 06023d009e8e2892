"""What judges videos: files of judgements that go on, videos that cannot be read, scores that are none."""

import importlib
import json
import os
import resource
import shutil
from argparse import ArgumentParser
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, in_layout
from launch import Started, run, run_ranks
from safetensors.torch import load_file, save_file

import infer
from data import DIMENSIONS, TEXT_LIMIT, DataError, Pair, Processor, read_pairs
from infer import Thinking, by_key, evaluate, judge, report, reward
from model import DeScore
from support import tables
from support.command import run_command
from support.formats import read_pairs as read_any
from support.frames import Video
from support.ranks import ALONE
from tools import annotate as annotating
from tools import pairs as pairs_command
from tools.formats import write_pairs
from tools.journal import Journal, fingerprint, made_by

# What Unicode, or Python's splitlines, calls the end of a line, and what JSON must not pass on as it is.
ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\r\ng\x1ch"
MADE = {"seed": 0, "cot": None}


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def absolute(world_dir, name="test_id"):
    pairs = [json.loads(line) for line in (world_dir / f"{name}.jsonl").read_text().splitlines()]
    return [pair | {key: str(world_dir / pair[key]) for key in ("video_a", "video_b")} for pair in pairs]


def write(path, pairs):
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture
def broken(world_dir, tmp_path):
    """Four pairs, the second with a video that is none, and that video."""
    video = tmp_path / "broken.mp4"
    video.write_bytes(b"not a video" * 100)
    pairs = absolute(world_dir)
    pairs[1] |= {"video_b": str(video)}
    return write(tmp_path / "pairs.jsonl", pairs), video


# ------------------------------------------------------------------------------------------------------------
# One record of how a model thinks


def test_judge_takes_the_record_or_its_fields_by_name(model, keys):
    thinking = Thinking(6, 3.0, samples=2, seed=3, think_tokens=900)
    expected = list(judge(model, keys, thinking))
    assert all(record["score_std"] > 0 for record in expected)
    by_name = {"max_new_tokens": 6, "temperature": 3.0, "samples": 2, "seed": 3, "think_tokens": 900}
    for options in ({"thinking": thinking}, by_name):
        assert list(judge(model, keys, **options)) == expected
    assert list(judge(model, keys, **by_name | {"seed": 4})) != expected
    with pytest.raises(TypeError, match="max_token"):
        judge(model, keys, max_token=6)
    for call in (partial(judge, model, keys, 6), partial(judge, model, keys, thinking, seed=4),
                 partial(reward, model, keys[0][0], "p", thinking=thinking, temperature=None)):
        with pytest.raises(TypeError, match="give one Thinking, or its fields by name"):
            call()


@pytest.mark.parametrize(("module", "words", "default"), [
    ("infer", ["--pairs", "p"], Thinking()), ("tools.pairs", ["v", "p"], Thinking()),
    ("tools.probe", ["p"], Thinking(samples=4)), ("tools.serve", [], Thinking(max_new_tokens=None)),
    ("tools.annotate", ["p", "o"], Thinking(temperature=1.0))])
def test_a_command_thinks_as_its_flags_say(module, words, default, monkeypatch):
    parsers = []

    def keep(parser):
        parsers.append(parser)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", keep)
        with pytest.raises(SystemExit):
            importlib.import_module(module).main()
    (parser,) = parsers
    assert infer.read_thinking(parser.parse_args(words)) == default
    flags = ["--max-new-tokens", "7", "--temperature", "0.5", "--seed", "3", "--think-tokens", "99"]
    asked = replace(default, max_new_tokens=7, temperature=0.5, seed=3, think_tokens=99)
    assert infer.read_thinking(parser.parse_args([*words, *flags])) == asked
    if module != "tools.annotate":
        flags += ["--samples", "2"]
        assert infer.read_thinking(parser.parse_args([*words, *flags])) == replace(asked, samples=2)
        warm = infer.read_thinking(parser.parse_args([*words, "--samples", "2"]))
        assert warm.temperature == (0.0 if module == "tools.probe" else 1.0)  # whose samples are a spread


# ------------------------------------------------------------------------------------------------------------
# Files of judgements


def test_any_text_goes_through_a_journal_and_on(tmp_path):
    path, keys = tmp_path / "j.jsonl", [(f"{ODD}.mp4", ODD), ("b.mp4", ODD), ("\ud800", "c")]
    records = [{"video": video, "prompt": prompt, "cot": ODD * 2} for video, prompt in keys]
    Journal(path, MADE, keys).add(records[0])
    Journal(path, MADE, keys).add(records[1])
    whole = path.read_bytes()
    for cut in (0, 1, 30):  # killed amid the third
        path.write_bytes(whole + (json.dumps(records[2]).encode()[:cut]))
        journal = None  # which lets go of the file
        journal = Journal(path, MADE, keys)
        assert list(journal.records.values()) == records[:2] and path.read_bytes() == whole
    journal.add(records[2])
    assert lines_of(path) == [{"made_by": MADE}, *records] and path.read_bytes().startswith(whole)


@pytest.mark.parametrize("line", [
    "", "{", "[]", "7", "null", "{}", '{"video": ["a"], "prompt": "p", "cot": "c"}', "\xff", "[" * 100_000,
    '{"video": "a", "prompt": null, "cot": "c"}', '{"video": "a", "prompt": "p", "cot": null}',
    '{"video": "a", "prompt": "p", "cot": "c"} x', '{"made_by": {"seed": 0, "cot": null}}'])
def test_a_damaged_line_is_named_by_its_row(tmp_path, line):
    path = tmp_path / "j.jsonl"
    Journal(path, MADE, [("a", "p")]).add({"video": "a", "prompt": "p", "cot": "c"})
    content = path.read_bytes() + line.encode("latin-1") + b"\n"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"j\.jsonl, row 3: not of this command") as caught:
        Journal(path, MADE, [("a", "p")])
    assert "\n" not in str(caught.value) and path.read_bytes() == content


@pytest.mark.parametrize("value", ["null", "true", '"1"', "NaN", "1e999", "-Infinity", "[1.0]"])
@pytest.mark.parametrize(("mode", "field"), [("on", "score"), ("on", "score_no_cot"),
                                              ("off", "score_no_cot")])
def test_a_score_in_a_journal_is_a_number(tmp_path, mode, field, value):
    path, made = tmp_path / "j.jsonl", {"cot": mode}
    good = {"video": "a", "prompt": "p", "cot": "c", "truncated": False, "score": 1.0, "score_no_cot": 2.0}
    Journal(path, made, [("a", "p")]).add(good)
    assert Journal(path, made, [("a", "p")]).records == {("a", "p"): good}
    text = json.dumps(good).replace(f'"{field}": {good[field]}', f'"{field}": {value}')
    path.write_text(json.dumps({"made_by": made}) + "\n" + text + "\n")
    with pytest.raises(DataError, match=r"row 2: not of this command.*" + field):
        Journal(path, made, [("a", "p")])


def test_a_journal_goes_on_only_for_what_made_it(tmp_path):
    path, keys = tmp_path / "j.jsonl", [("a", "p")]
    Journal(path, {"seed": 0, "video": {"fps": 2.0}}, keys)
    Journal(path, {"seed": 0, "video": {"fps": 2.0}}, keys)
    for other, named in (({"seed": 1, "video": {"fps": 2.0}}, "seed"), ({"seed": 0}, "video"),
                         ({"seed": 0, "video": {"fps": 1.0}, "api": "u"}, "video, api")):
        with pytest.raises(DataError, match=f"j.jsonl: made otherwise .*, by {named};"):
            Journal(path, other, keys)
    whole = path.read_bytes()
    for cut in range(len(whole)):  # killed amid the first line
        path.write_bytes(whole[:cut])
        Journal(path, {"seed": 0, "video": {"fps": 2.0}}, keys)
        assert path.read_bytes() == whole


def test_the_file_of_somebody_else_is_not_cut(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no line's end")
    with pytest.raises(DataError, match="row 1: not of this command"):
        Journal(path, MADE, [])
    assert path.read_text() == "no line's end"


def test_models_are_told_apart_by_their_weights(model):
    first = fingerprint(model)
    assert fingerprint(model) == first
    for parameter in (model.head.weight, model.query, model.qwen.lm_head.weight,
                      model.qwen.model.visual.pos_embed.weight):
        before = parameter.data.clone()
        parameter.data.view(-1)[0] *= 1 + 1e-6
        assert fingerprint(model) != first
        parameter.data.copy_(before)
    model.head.weight.data = model.head.weight.data.flip(-1)  # the same numbers in another order
    assert fingerprint(model) != first
    model.head.weight.data = model.head.weight.data.flip(-1)
    assert fingerprint(model) == first
    model.set_trainable(2)
    adapted = fingerprint(model)
    model.backbone.peft_config["default"].lora_alpha = 400
    assert fingerprint(model) != adapted


def test_a_file_for_judgements_needs_pairs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["infer.py", "a.mp4", "a cat", "--out", "f.jsonl"])
    with pytest.raises(SystemExit):
        infer.parse_args()
    assert "--out keeps the judgements of --pairs" in capsys.readouterr().err


@pytest.mark.parametrize(("extra", "named"), [
    (["--seed", "1"], {"seed"}), (["--temperature", "0.5"], {"temperature"}), (["--cot", "off"], {"cot"}),
    (["--samples", "2", "--temperature", "0"], {"samples"}), (["--max-new-tokens", "6"], {"max_new_tokens"}),
    (["--repetition-penalty", "1.2"], {"repetition_penalty"}),
    (["--model", "other"], set()), (["--workers", "2", "--think-tokens", "7", "--json"], set())])
def test_what_decides_a_judgement_is_written_down(model, extra, named, monkeypatch):
    made = []
    for more in ([], extra):
        monkeypatch.setattr("sys.argv", ["infer.py", "--pairs", "p", "--model", "m", *more])
        made.append(made_by(model, infer.parse_args()))
    assert {name for name in made[0] | made[1] if made[0].get(name) != made[1].get(name)} == named
    release, asks, small = (made_by(changed, infer.parse_args()) for changed in changes(model))
    assert {name for name in made[1] if made[1][name] != release[name]} == {"layout"}
    assert {name for name in made[1] if made[1][name] != asks[name]} == {"instruction"}
    assert {name for name in made[1] if made[1][name] != small[name]} == {"video"}


def test_files_from_before_there_was_a_penalty_go_on(model, monkeypatch):
    monkeypatch.setattr("sys.argv", ["infer.py", "--pairs", "p", "--repetition-penalty", "1"])
    assert "repetition_penalty" not in made_by(model, infer.parse_args())


@pytest.mark.parametrize("command", [infer, pairs_command])
@pytest.mark.parametrize("extra", [["--temperature", "0.7"], ["--samples", "2"]])
def test_a_penalty_is_for_greedy_thinking(command, extra, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "a.mp4", "p", "--repetition-penalty", "1.1", *extra])
    with pytest.raises(DataError, match=r"a repetition penalty of 1\.1 is for temperature 0, not"):
        command.parse_args()


def changes(model):
    """A model that scores, asks or looks otherwise; undone when the next is asked for."""
    model.info["scoring_layout"] = "release"
    yield model
    model.info.clear()
    processor = model.processor
    for asked, settings in (("<video><prompt>?", processor.settings),
                            (processor.instruction, replace(processor.settings, fps=1.0))):
        model.processor = Processor(processor.tokenizer, settings, asked, processor.dimensions)
        yield model


def save_scorer(folder):
    """An adapter with a head, which a fixed seed has drawn."""
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(4)
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return save_scorer(tmp_path_factory.mktemp("scorer") / "model")


def test_a_retrained_model_does_not_go_on_in_the_old_ones_file(world_dir, scorer, tmp_path):
    folder = shutil.copytree(scorer, tmp_path / "model")
    info = json.loads((folder / "descore.json").read_text()) | {"backbone": str(ROOT / "toy/backbone")}
    info["files"] = {}
    (folder / "descore.json").write_text(json.dumps(info))
    out = tmp_path / "out.jsonl"
    command = ["infer.py", "--pairs", world_dir / "test_id.jsonl", "--model", folder, "--cot", "off",
               "--out", out]
    run(*command)
    before = out.read_bytes()
    assert "8 of 8" in run(*command).stderr and out.read_bytes() == before
    weights = load_file(folder / "descore.safetensors")
    save_file(weights | {"head.weight": -weights["head.weight"]}, folder / "descore.safetensors")
    done = run(*command, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and out.read_bytes() == before
    assert "by weights (or the version of transformers); remove the file" in done.stderr


# ------------------------------------------------------------------------------------------------------------
# Videos that cannot be read


def test_an_unreadable_video_costs_its_pair_alone(world_dir, scorer, broken, tmp_path):
    pairs, video = broken
    out, good = tmp_path / "out.jsonl", video.read_bytes()
    command = ["infer.py", "--model", scorer, "--max-new-tokens", 5, "--json", "--pairs"]
    done = run(*command, pairs, "--out", out, check=False)
    assert done.returncode == 1 and f"left out: {video}: not a video" in done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    assert found["pairs"] == 3 and found["unreadable"] == 1
    assert len(lines_of(out)) == 1 + 7 and str(video) not in out.read_text()
    rest = absolute(world_dir)
    whole = json.loads(run(*command, write(tmp_path / "rest.jsonl", [rest[0], *rest[2:]])).stdout)
    for name in ("intervals", "generators"):
        assert found.pop(name) == whole.pop(name)
    assert found == pytest.approx({"unreadable": 1} | whole, rel=1e-5)
    shutil.copy(rest[1]["video_b"], video)  # repaired: it alone is still to do
    done = run(*command, pairs, "--out", out)
    assert "going on after 7 of 8" in done.stderr and len(lines_of(out)) == 1 + 8
    assert "unreadable" not in json.loads(done.stdout)
    video.write_bytes(good)
    one = write(tmp_path / "one.jsonl", [json.loads(pairs.read_text().splitlines()[1])])
    done = run(*command, one, check=False)
    assert done.returncode == 1 and "error: no pair has two videos that can be read" in done.stderr
    assert done.stdout == "" and f"left out: {video}" in done.stderr


def test_the_best_of_those_that_can_be_read(world_dir, scorer, broken):
    pair = read_pairs(world_dir / "test_id.jsonl")[0]
    command = ["infer.py", pair.video_a, broken[1], pair.video_b, pair.prompt, "--model", scorer, "--cot",
               "off"]
    done = run(*command, check=False)
    assert done.returncode == 1 and f"left out: {broken[1]}: not a video" in done.stderr
    assert [line[:2] for line in done.stdout.splitlines()] == ["1.", "2."]
    found = json.loads(run(*command, "--json", check=False).stdout)
    assert {record["video"] for record in found} == {pair.video_a, pair.video_b}
    for videos, error in (([broken[1]], f"error: {broken[1]}: not a video"),
                          ([broken[1], "none.mp4"], "error: no video can be read")):
        done = run("infer.py", *videos, pair.prompt, *command[5:], check=False)
        assert done.returncode == 1 and error in done.stderr and done.stdout == ""


def evaluated(model, pairs):
    return evaluate(model, {"test": pairs}, ALONE, Thinking(max_new_tokens=5, think_tokens=2000))


@pytest.mark.parametrize("layout", ["ours", "release"])
def test_evaluation_leaves_an_unreadable_video_out(model, broken, layout, capsys):
    in_layout(model, layout)
    pairs = read_pairs(broken[0])
    figures = evaluated(model, pairs)
    assert figures.pop("test/unreadable") == 1 and f"left out: {broken[1]}: not" in capsys.readouterr().err
    assert figures == pytest.approx(evaluated(model, [pairs[0], *pairs[2:]]), rel=1e-5)
    assert evaluated(model, pairs[1:2]) == {"test/unreadable": 1}


def test_ranks_share_a_file_of_pairs_and_find_what_one_finds(world_dir, scorer, broken, tmp_path):
    """Sampled, with a broken video, and with another number of ranks after a kill."""
    command = ["infer.py", "--model", scorer, "--max-new-tokens", 20, "--temperature", 1.5, "--json",
               "--pairs"]
    alone, outs = run(*command, broken[0], "--out", tmp_path / "alone", check=False), []
    for cut in (0, 5):  # lines that are there already
        outs.append(tmp_path / f"{cut}.jsonl")
        outs[-1].write_bytes(b"".join((tmp_path / "alone").read_bytes().splitlines(keepends=True)[:cut]))
        first, second = run_ranks(2, *command, broken[0], "--out", outs[-1], check=False)
        assert (first.returncode, second.returncode, second.stdout) == (1, 0, "")
        assert first.stderr.count("left out: ") == 1 and "left out" not in second.stderr
        found, whole = json.loads(first.stdout), json.loads(alone.stdout)
        for name in ("intervals", "generators"):
            assert found.pop(name) == whole.pop(name)
        assert found == pytest.approx(whole, rel=1e-5)
    expected, *found = ({(r["video"], r["prompt"]): r["cot"] for r in lines_of(path)[1:]}
                        for path in (tmp_path / "alone", *outs))
    assert len(expected) == 7 and found == [expected] * 2 and len(set(expected.values())) > 1


def test_annotation_leaves_an_unreadable_video_out_and_asks_for_it_alone(world_dir, broken, tmp_path):
    pairs, video = broken
    out, written = tmp_path / "out.jsonl", tmp_path / "out.jsonl.cots"
    command = ["-m", "tools.annotate", pairs, out, "--model", ROOT / "toy/backbone", "--max-new-tokens", 5]
    done = run(*command, check=False)
    assert done.returncode == 1 and f"left out: {video}: not a video" in done.stderr
    assert "3 pairs, 7 videos annotated; 1 left out, a video cannot be read" in done.stdout
    assert "among the CoTs: 7 cut off" in done.stdout
    before = written.read_bytes()
    assert len(read_pairs(out)) == 3 and before.count(b"\n") == 1 + 7
    shutil.copy(absolute(world_dir)[1]["video_b"], video)
    assert "going on after 7 of 8" in run(*command).stderr
    assert len(read_pairs(out)) == 4 and not written.exists()
    asked = []

    def none_can_be_read(keys, done):
        for v, p in keys:
            asked.append((v, p))
            yield {"video": v, "prompt": p, "error": f"{v}: broken"}

    with pytest.raises(DataError, match="no pair has two videos that can be read"):
        annotating.annotate(pairs, tmp_path / "none.jsonl", none_can_be_read, {})
    assert len(asked) == 8 and not (tmp_path / "none.jsonl").exists()


# ------------------------------------------------------------------------------------------------------------
# Scores that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_an_error(model, keys, broken, value):
    model.head.weight.data[0, 0] = value
    for options in ({}, {"samples": 2}, {"think": False}):
        with pytest.raises(DataError, match=r"mp4: its score\w* is .*(nan|inf); .*backbone has no"):
            list(judge(model, keys[:1], max_new_tokens=5, **options))
    with pytest.raises(DataError, match="its score is"):
        evaluated(model, read_pairs(broken[0])[:1])
    (record,) = judge(model, keys[:1], max_new_tokens=5, finite=False)
    assert record["cot"] and record["video"] == keys[0][0]


def test_reading_alone_goes_by_the_sub_scores_and_halves_where_they_do_not_decide():
    scores = {"clear": (2, 2, 2, 2, 2), "camera": (2, 2, 0, 2, 2), "worse": (1, 2, 2, 2, 2), "none": None}

    def cot(which):
        if scores[which] is None:
            return "no scores"
        found = dict(zip(("subject", "dynamics", "camera", "environment", "style"), scores[which]))
        return f'<answer>{{"dimensional_scores": {json.dumps(found)}}}</answer>'

    pairs, judged, right = [], {}, []
    # Of 14 in all camera costs 2 and subject 2: "camera" and "worse" say the same.
    for a, b, label, wanted in (("clear", "worse", "A", 1), ("camera", "clear", "A", 0),
                                ("worse", "clear", "B", 1), ("camera", "worse", "A", 0.5),
                                ("clear", "none", "B", 0.5), ("clear", "worse", "tie", None)):
        pair = Pair(f"prompt {len(pairs)}", "a.mp4", "b.mp4", label)
        judged |= {(f"{side}.mp4", pair.prompt): {"cot": cot(which)} for side, which in (("a", a), ("b", b))}
        pairs.append(pair)
        right += [] if wanted is None else [wanted]
    assert infer.accuracy_reading(pairs, judged, DIMENSIONS) == pytest.approx(sum(right) / 5)
    overall = cot("worse").replace("}</answer>", ', "overall_score": 4.9}</answer>')
    judged["b.mp4", "prompt 3"] = {"cot": overall}  # 4.9 is more than what "camera" implies
    assert infer.accuracy_reading(pairs, judged, DIMENSIONS) == pytest.approx((sum(right) - 0.5) / 5)


def test_json_has_null_for_what_has_no_base():
    pairs = [Pair("p", "a", "b", "tie", model_a="x", model_b="y")]
    judged = by_key([{"video": "a", "prompt": "p", "score_no_cot": 1.0},
                     {"video": "b", "prompt": "p", "score_no_cot": 2.0}])
    figures = report(pairs, judged, {"subject": 1})

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(tables.as_json(figures), parse_constant=refuse)
    assert found["accuracy_no_cot"] is None and found["accuracy_ties_no_cot"] == 1.0
    assert found["intervals"]["accuracy_no_cot"] == [None, None]
    assert found["generators"]["x / y"]["accuracy_no_cot"] is None
    assert "nan" not in tables.show_report(figures)


# ------------------------------------------------------------------------------------------------------------
# What users get wrong, and disks that are full


@pytest.mark.parametrize(("source", "own"), [("model", (2.0, 4096, 4096)), ("api", (2.0, 131_072, 307_200))])
def test_annotation_looks_as_it_is_told(source, own, monkeypatch):
    """The model's own frames and pixels, or the endpoint's, unless others are given."""
    own_words = ROOT / "presets/detailed.txt"
    commands = {"model": ["--model", str(ROOT / "toy/backbone")],
                "api": ["--api", "http://HOST/v1", "--api-model", "m"]}
    monkeypatch.setattr(annotating, "annotate", lambda *args, **options: seen.append(args) or 0)
    for extra, expected in (([], own), (["--fps", "1"], (1.0, *own[1:])),
                            (["--min-pixels", "1024", "--max-pixels", "2048"], (own[0], 1024, 2048)),
                            (["--instruction", str(own_words)], own)):
        seen = []
        monkeypatch.setattr("sys.argv", ["annotate", "pairs", "out", *commands[source], *extra])
        with pytest.raises(SystemExit):
            annotating.main()
        ((_, _, ask, made, *_),) = seen
        settings = ask.args[0].processor.settings if source == "model" else ask.settings
        assert (settings.fps, settings.min_pixels, settings.max_pixels) == expected
        asked = ask.args[0].processor.instruction if source == "model" else ask.instruction
        assert made["video"] == asdict(settings) and made["instruction"] == asked
        assert (asked == own_words.read_text()) == ("--instruction" in extra)


@contextmanager
def room(size):
    """Within it no file of this process grows beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_half_a_line(tmp_path):
    keys = [(f"{number}.mp4", "p" * 300) for number in range(20)]
    path = tmp_path / "j.jsonl"
    full = "j.jsonl: cannot be written; once it can, the same command goes on (.*)$"
    for size in (1000, 2000, 4000):
        with pytest.raises(DataError, match=full), room(size):
            journal = Journal(path, MADE, keys)
            for video, prompt in keys:
                if (video, prompt) not in journal.records:
                    journal.add({"video": video, "prompt": prompt, "cot": "c"})
        assert path.stat().st_size == size
        journal.lock.close()
        assert len(Journal(path, MADE, keys).records) == max(0, (size - 40) // 350)
    with pytest.raises(DataError, match="/dev/full: cannot be written"):
        Journal(Path("/dev/full"), MADE, keys)


@pytest.mark.parametrize("what", ["full disk", "directory", "folder that is a file", "long name"])
def test_pairs_are_written_whole_or_not_at_all(what, tmp_path):
    out = tmp_path / "out.jsonl"
    pairs = [Pair("p" * 1000, "a", "b", "A")]
    if what == "directory":
        out.mkdir()
    elif what == "folder that is a file":
        (tmp_path / "file").write_text("")
        out = tmp_path / "file/out.jsonl"
    elif what == "long name":
        out = tmp_path / ("x" * 255)
    else:
        out.write_text("before")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=f"{out}: cannot be written"), room(500):
        write_pairs(out, pairs)
    assert sorted(tmp_path.iterdir()) == before and (what != "full disk" or out.read_text() == "before")


def test_a_full_disk_ends_a_command_in_one_line_and_it_goes_on(world_dir, scorer, tmp_path):
    out = tmp_path / "out.jsonl"
    command = ["infer.py", "--pairs", world_dir / "test_id.jsonl", "--model", scorer, "--cot", "off",
               "--out", out]
    done = Started(*command, largest_file=1500).wait()
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {out}: cannot be written; once it can")
    there = len(lines_of(out)) - 1
    assert 0 < there < 8 and f"going on after {there} of 8" in run(*command).stderr


NO_FILE, TOY = "cannot be written ([Errno 21] Is a directory", ["--model", "toy/backbone"]


@pytest.mark.parametrize(("command", "error"), [
    (["infer.py", "--pairs", "{pairs}", *TOY, "--out", "{folder}"], "{folder}: " + NO_FILE),
    (["-m", "tools.annotate", "{pairs}", "{folder}", *TOY], "{folder}: is a directory"),
    (["-m", "tools.convert", "{pairs}", "{folder}"], "{folder}: is a directory"),
    (["-m", "tools.convert", "{folder}", "out.jsonl"], "{folder}: is a directory"),
    (["-m", "tools.annotate", "{pairs}", "{out}", "--model", "toy"], "toy: neither descore.json"),
    (["infer.py", "{pairs}", "{pairs}", *TOY], "{pairs} is a file; the prompt comes last")])
def test_what_users_get_wrong_is_said_in_one_line(command, error, world_dir, tmp_path):
    (tmp_path / "folder").mkdir()
    names = {"pairs": world_dir / "test_id.jsonl", "folder": tmp_path / "folder", "out": tmp_path / "out"}
    done = run(*[word.format(**names) for word in command], check=False)
    assert done.returncode and f"error: {error.format(**names)}" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"] and not any((tmp_path / "folder").iterdir())


@pytest.mark.parametrize(("video", "message"), [("missing.mp4", "no such file"),
                                                ("README.md", "not a video"), ("toy", "no such file")])
def test_a_single_video_that_cannot_be_read_is_one_clear_line(scorer, video, message):
    done = run("infer.py", video, "a cat", "--model", scorer, check=False)
    assert done.returncode == 1 and f"error: {video}: {message}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["convert", "filter", "annotate"])
def test_a_pair_file_is_not_written_over_itself(command, world_dir, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text((world_dir / "train_cots.jsonl").read_text())
    before = pairs.read_bytes()
    more = ["--model", ROOT / "toy/backbone"] if command == "annotate" else []
    (tmp_path / "link.jsonl").symlink_to(pairs)
    os.mkfifo(tmp_path / "pipe")
    for out, why in (("pairs.jsonl", "the pair file itself"), ("link.jsonl", "the pair file itself"),
                     ("pipe", "no plain file"), (".", "a directory")):
        done = run("-m", f"support.{command}", pairs, tmp_path / out, *more, check=False)
        assert done.returncode == 1 and why in done.stderr and len(done.stderr.splitlines()) == 1
    assert pairs.read_bytes() == before


def test_paths_lead_from_a_linked_folder_to_the_videos(world_dir, tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep/er")
    run("-m", "tools.convert", world_dir / "train.jsonl", tmp_path / "link/pairs.jsonl")
    assert len(read_pairs(tmp_path / "link/pairs.jsonl")) == len(read_pairs(world_dir / "train.jsonl"))


def test_two_commands_do_not_write_to_one_file(tmp_path):
    first = Journal(tmp_path / "j.jsonl", MADE, [])
    with pytest.raises(DataError, match="j.jsonl: another command writes to it"):
        Journal(tmp_path / "j.jsonl", MADE, [])
    assert first.records == {}


def test_what_stands_twice_in_a_pair_file_is_an_error(tmp_path):
    (tmp_path / "p.csv").write_text("path_A,path_B,prompt,TA,TA\na,b,x,A,B\n")
    with pytest.raises(DataError, match="a column stands twice: path_A"):
        read_any(tmp_path / "p.csv")
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "preference": "A", "preference": "B"}\n')
    with pytest.raises(DataError, match="row 1: not JSON .a key stands twice"):
        read_pairs(tmp_path / "p.jsonl")


def test_a_cot_that_no_pair_file_may_hold_costs_its_pair(world_dir, tmp_path, capsys):
    def write(keys, done):
        for number, (video, prompt) in enumerate(keys):
            yield {"video": video, "prompt": prompt, "cot": "a" * (TEXT_LIMIT + (number == 0))}

    annotating.annotate(world_dir / "train.jsonl", tmp_path / "out.jsonl", write, MADE | {"cot": None})
    kept = read_pairs(tmp_path / "out.jsonl")  # what is written can be read
    assert len(kept) == len(read_pairs(world_dir / "train.jsonl")) - 1
    assert "1 left out, an answer is of no use\nanswers of no use: 1 too long" in capsys.readouterr().out


def test_a_command_that_is_interrupted_ends_without_a_traceback():
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 130


def test_the_release_reads_a_video_once_for_all_its_scores(model, keys, monkeypatch):
    """However many CoTs are scored, and without one; at a size of its own one reading more."""
    read, encoded, encode = [], [], DeScore.encode
    frames = Video.frames
    monkeypatch.setattr(Video, "frames", lambda self, indices: (
        read.append(len(indices)) or frames(self, indices)))
    monkeypatch.setattr(DeScore, "encode", lambda self, batch: (
        encoded.append(batch.features is None) or encode(self, batch)))
    model.set_trainable(2)
    in_layout(model, "release")
    for size, more in ((None, 0), ({"max_pixels": 4096}, 1)):
        read.clear()
        encoded.clear()
        if size:
            model.info["scoring_video"] = size
        (found,) = judge(model, keys[:1], max_new_tokens=3, temperature=1.0, samples=3, without_cot=True)
        assert {"score", "score_std", "score_no_cot"} <= set(found)
        assert len([count for count in read if count > 1]) == 1 + more and sum(encoded) == 1 + more


def test_a_margin_is_a_less_b():
    pairs = [Pair("p", "a.mp4", "b.mp4", "A"), Pair("p", "b.mp4", "c.mp4", "B")]
    scores = {"a.mp4": 2.5, "b.mp4": 1.0, "c.mp4": -1.0}
    judged = {(video, "p"): {"score": score} for video, score in scores.items()}
    assert infer.margins(pairs, judged, "score").tolist() == [1.5, 2.0]
    assert infer.margins(pairs, judged, "score_no_cot") is None
