"""From pairs to a served reward, as docs/training.md has it."""

import subprocess
import sys

import pytest
import whole_way
from conftest import ROOT

ORDER = ["tools.check", "tools.annotate", "tools.filter", "coldstart.py", "tools.annotate", "tools.filter",
         "rl.py", "infer.py", "tools.serve"]


def test_the_page_has_the_way_from_pairs_to_a_served_reward():
    commands, code = whole_way.shown()
    for name, words in zip(ORDER, commands, strict=True):
        assert name in words
    assert "Client(" in code
    assert "--scores" in commands[4] and "--scores" not in commands[1]


@pytest.mark.slow
def test_the_way_can_be_gone(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tests/whole_way.py", tmp_path / "way"], check=False,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("\n$ ") + done.stdout.startswith("$ ") == len(ORDER)
