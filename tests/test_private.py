"""Beside a trainer's own `data`, the project is the package `descore` (tools/private.py)."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from launch import run
from test_memory import save_scorer

from infer import reward
from model import DeScore

PAGE = (ROOT / "docs/in-a-trainer.md").read_text()
FOREIGN = """
import os, sys
FIRST, START = sys.argv[2:4]
if FIRST == "foreign":
    import data
path = [*sys.path]
# What docs/in-a-trainer.md says
runpy.run_path(os.environ["PRIVATE"])
from descore.infer import judge

if __name__ == "__main__":
    import json, pickle
    import torch
    import data
    import descore.support.client
    from descore import rl
    from descore.data import DataError, Processor
    from descore.tools import adapters, annotate, client, memory
    assert data.MINE and sys.path == path and sys.modules["data"] is data
    assert not {"model", "infer", "support", "tools", "rl"} & set(sys.modules)
    torch.multiprocessing.set_start_method(START, force=True)
    scorer = Scorer(sys.argv[1], "cpu")
    frames = torch.load("frames.pt")
    few = {"max_new_tokens": 4, "think_tokens": 1}
    scores = [record["score"] for record in scorer(frames, "p", fps=4, accept_any=True, max_new_tokens=4)]
    keys = memory.clip_keys(frames, "p", 4)
    with_workers = list(judge(scorer.model, keys, workers=1, **few))
    processor = pickle.loads(pickle.dumps(scorer.model.processor))
    assert type(processor) is Processor and Processor.__module__ == "descore.data"
    assert adapters.Client is client.Client and descore.support.client is client
    assert annotate.infer.judge is judge
    try:
        scorer("frames.pt", "p", fps="often")
    except DataError as error:
        assert "fps" in str(error)
    print(json.dumps([scores, [record["score"] for record in with_workers]]))
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A folder with a foreign `data` and two clips, a saved model, and the scores of the clips."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "data.py").write_text("MINE = True\n")
    (said,) = re.findall(r"```python\n(import runpy\n.*?)```", PAGE, re.DOTALL)
    said = said.replace("/where/this/project/is", str(ROOT))
    (folder / "main.py").write_text(FOREIGN.replace("# What docs/in-a-trainer.md says\n", said))
    frames = torch.rand(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.save(frames, folder / "frames.pt")
    saved = save_scorer(tmp_path_factory.mktemp("scorer") / "model")
    found = reward(DeScore.load(saved, device="cpu"), frames, "p", fps=4, max_new_tokens=4, accept_any=True)
    return folder, saved, [record["score"] for record in found]


@pytest.mark.parametrize(("first", "start"), [
    ("foreign", "fork"), ("ours", "fork"),
    pytest.param("foreign", "spawn", marks=pytest.mark.slow),
    pytest.param("ours", "forkserver", marks=pytest.mark.slow)])
def test_it_scores_the_same_beside_a_module_that_is_called_data(asked, first, start):
    folder, saved, expected = asked
    words = ["main.py", str(saved), first, start]
    env = {"PRIVATE": str(ROOT / "tools/private.py")}
    if start == "fork":
        said = run(*words, root=folder, env=env).stdout
    else:  # what `run` starts has a way of its own to start processes
        env |= {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        said = subprocess.check_output([sys.executable, *words], cwd=folder, env=env, text=True, timeout=200)
    for scores in json.loads(said):
        assert scores == pytest.approx(expected, abs=1e-4)
