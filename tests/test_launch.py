"""Every process of the tests computes under the settings that the environment gives."""

import json
import os

import torch
from launch import run, run_ranks

ASK = """
import json, torch
print(json.dumps([torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]))
"""


def test_threads_and_cpu_capability_are_the_environments_in_every_process(tmp_path):
    """Also of those that are forked from a server, which imported torch before them."""
    (tmp_path / "ask.py").write_text(ASK)
    here = [torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
    assert here[0] == int(os.environ["OMP_NUM_THREADS"])
    wanted = os.environ.get("ATEN_CPU_CAPABILITY", here[1])
    assert here[1].lower() == wanted.lower()
    for done in (run(tmp_path / "ask.py"), *run_ranks(2, tmp_path / "ask.py")):
        assert json.loads(done.stdout) == here
