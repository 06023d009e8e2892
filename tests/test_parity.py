"""Inputs equal those of the authors' pipeline: qwen-vl-utils 0.0.14, transformers 4.57's Qwen3VLProcessor.

tests/golden/make.py made the golden files with those packages; the last test runs them again where they can
be imported.
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import PreTrainedTokenizerFast

from data import Processor, VideoSettings, read_video
from model import DeScore

sys.path.insert(0, str(ROOT / "tests/golden"))
from make import AFTER, BEFORE, MAX_PIXELS, PROMPT, sample_of

GOLDEN = ROOT / "tests/golden"
CLIPS = json.loads((GOLDEN / "clips.json").read_text())


def find(name: str) -> Path:
    for folder in (GOLDEN, ROOT.parent / "shared/videos"):
        path = folder / f"{name}.mp4"
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == CLIPS[name]:
            return path
    pytest.skip(f"{name}.mp4 is not here")


@pytest.fixture(scope="module")
def encoder():
    """What adds the positions. They depend on the spatial merge size alone, which is everywhere the same."""
    return DeScore.load(ROOT / "toy/backbone", device="cpu")


@pytest.mark.parametrize("name", CLIPS)
def test_inputs_are_those_of_qwen3_vl(name, encoder):
    golden = np.load(GOLDEN / "golden.npz")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(GOLDEN / "tokenizer.json"))
    instruction = BEFORE + "<video>" + AFTER + "<prompt>"
    processor = Processor(tokenizer, VideoSettings(max_pixels=MAX_PIXELS), instruction)
    sample = processor(find(name), PROMPT)
    assert list(sample.grid) == golden[f"{name}/grid"].tolist()
    assert sample.input_ids.tolist() == golden[f"{name}/input_ids"].tolist()
    encoder.processor, features = processor, (torch.empty(0), [])  # its tower has nothing to do here
    batch = encoder.encode(replace(processor.collate([sample]), features=features))
    assert batch.position_ids[:, 0].tolist() == golden[f"{name}/position_ids"].tolist()
    pixels = sample.patches.float() / 127.5 - 1
    # Both resize with the same kernel and round to the same grey levels, but for a value halfway between two,
    # which a processor may round either way: seen once in 4,000. A bilinear kernel is off in 1,100 of them.
    levels = abs(sample_of(pixels) - golden[f"{name}/pixels"]) * 255 / 2
    assert (levels < 1.001).all() and (levels > 0.001).mean() < 0.005
    assert abs(pixels.double().mean().item() - golden[f"{name}/mean"]) < 1e-6


def test_timestamps_follow_the_true_frame_rate():
    _, seconds = read_video(find("ntsc"))
    assert np.allclose(seconds, np.linspace(0, 39, 4).round() / (24000 / 1001))
    _, seconds = read_video(find("fast"))
    assert np.allclose(seconds, np.linspace(0, 89, 4).round() / 60)


@pytest.mark.skipif("GOLDEN_PYTHON" not in os.environ,
                    reason="GOLDEN_PYTHON names no python with the reference packages (tests/golden/make.py)")
def test_the_golden_files_are_what_the_reference_packages_make():
    code = ("import sys, numpy as np; sys.path.insert(0, sys.argv[1]); from make import *\n"
            "golden = np.load(HERE / 'golden.npz')\n"
            "for path in sorted(HERE.glob('*.mp4')):\n"
            "    found = reference(path, MAX_PIXELS, HERE / 'tokenizer.json')\n"
            "    assert (found['input_ids'].numpy() == golden[path.stem + '/input_ids']).all(), path\n"
            "    assert (found['position_ids'].numpy() == golden[path.stem + '/position_ids']).all(), path\n"
            "    assert (sample_of(found['pixels']) == golden[path.stem + '/pixels']).all(), path\n")
    subprocess.run([os.environ["GOLDEN_PYTHON"], "-c", code, str(GOLDEN)], check=True,
                   env=os.environ | {"FORCE_QWENVL_VIDEO_READER": "decord"})
