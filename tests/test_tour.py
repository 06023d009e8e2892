"""The notebook: its cells run in order, in a process of their own, and it is committed without outputs."""

import json
import math
import statistics

import pytest
from conftest import ROOT
from launch import run

pytest.importorskip("matplotlib")
TOUR = ROOT / "toy/tour.ipynb"
# What stands around the cells: pictures are not shown, and at the end some of what they found is printed.
AROUND = """
import json
import matplotlib
matplotlib.use("Agg")
cells = {cells!r}
here = {{"__name__": "__main__"}}
for number, cell in enumerate(cells):
    exec(compile(cell, f"cell {{number}}", "exec"), here)
length = here["inputs"].sum(-1)[0].tolist()
numbers = lambda some: [float(one) for one in some]
print(json.dumps({{"sees": here["sees"].int().tolist(), "P": here["layout"].P, "lengths": length,
                  "losses": here["losses"], "margins": here["margins"], "gap": here["gap"],
                  "of_margin": [numbers(here["margin"]), numbers(here["L_BT"])], "A": numbers(here["A"][0]),
                  "log_ratio": numbers(here["log_ratio"]),
                  "grpo": {{A: numbers(here["of_one_token"](x, float(A)) for x in here["log_ratio"])
                           for A in ("1", "-1")}},
                  "kl": numbers(here["of_one_token"](x, 0.0, beta=1.0) for x in here["log_ratio"]),
                  "pictures": len(matplotlib.pyplot.get_fignums())}}))
"""


@pytest.mark.slow
def test_the_tour_can_be_taken(tmp_path):
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert TOUR.stat().st_size < 20_000
    script = tmp_path / "tour.py"
    script.write_text(AROUND.format(cells=["".join(cell["source"]) for cell in cells]), encoding="utf-8")
    done = run(script)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["pictures"] == 5 and found["gap"] < 1e-4
    assert found["losses"][-1] < found["losses"][0]
    for text in ("video tokens]", "<think>", "r of the preferred video"):
        assert text in done.stdout
    # The mask, calculated again: a place sees those before it in the prompt and in its own CoT.
    part = [0] * found["P"]
    for number, length in enumerate(found["lengths"], 1):
        part += [number] * (length + 1)
    expected = [[int(j <= i and part[j] in (0, part[i])) for j in range(len(part))] for i in range(len(part))]
    assert found["sees"] == expected
    # The curves, calculated again.
    for margins, losses in (found["of_margin"], (found["margins"], found["losses"])):
        assert losses == pytest.approx([math.log(1 + math.exp(-margin)) for margin in margins], abs=1e-5)
    std = statistics.stdev([0.9, 0.7, 0.7, 0.1])
    assert found["A"] == pytest.approx([(R - 0.6) / std for R in (0.9, 0.7, 0.7, 0.1)], abs=1e-5)
    ratio = [math.exp(x) for x in found["log_ratio"]]
    assert found["grpo"]["1"] == pytest.approx([-min(rho, 1.2) for rho in ratio], abs=1e-5)
    assert found["grpo"]["-1"] == pytest.approx([max(rho, 0.8) for rho in ratio], abs=1e-5)
    assert found["kl"] == pytest.approx([1 / rho + math.log(rho) - 1 for rho in ratio], abs=1e-5)
