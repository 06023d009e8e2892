"""Two hosts on one machine: network namespaces with a wire between them, torchrun's rendezvous across it.

    sudo python bench/nodes.py       # needs root, for `ip netns`

Trains stage 1 for a few steps on one process and on two hosts of one process each; prints both losses.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOSTS = {"descore-a": "10.77.0.1", "descore-b": "10.77.0.2"}


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=not check)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        subprocess.run([sys.executable, "toy/world.py", data, "--pairs", "14", "--test-pairs", "1"], cwd=ROOT,
                       check=True)
        cot = "<think>seen</think><answer>{}</answer>"
        (data / "cots.jsonl").write_text("".join(
            json.dumps(json.loads(line) | {"cot_a": cot, "cot_b": cot}) + "\n"
            for line in (data / "train.jsonl").read_text().splitlines()))

        def stage(out: str) -> list[str]:
            return ["coldstart.py", "--model", "toy/backbone", "--train", str(data / "cots.jsonl"), "--out",
                    str(data / out),
                    "--lora-rank", "8", "--epochs", "2", "--batch-size", "5", "--min-pixels", "4096",
                    "--max-pixels", "4096", "--lr", "1e-3", "--workers", "0"]

        quiet = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL}
        subprocess.run([sys.executable, *stage("one")], check=True, **quiet)
        try:
            ip("link", "add", "descore-va", "type", "veth", "peer", "name", "descore-vb")
            for (name, address), wire in zip(HOSTS.items(), ("descore-va", "descore-vb")):
                ip("netns", "add", name)
                ip("link", "set", wire, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", wire)
                ip("-n", name, "link", "set", wire, "up")
                ip("-n", name, "link", "set", "lo", "up")
            hosts = [subprocess.Popen(
                ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={wire}", sys.executable, "-m",
                 "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d",
                 "--rdzv_endpoint", f"{HOSTS['descore-a']}:29511", "--rdzv_conf",
                 f"is_host={name == 'descore-a'}", "--local_addr", address, *stage("two")], **quiet)
                for (name, address), wire in zip(HOSTS.items(), ("descore-va", "descore-vb"))]
            codes = [host.wait(600) for host in hosts]
        finally:
            for name in HOSTS:
                ip("netns", "del", name, check=False)
            ip("link", "del", "descore-va", check=False)
        assert codes == [0, 0], codes
        one, two = ([json.loads(line) for line in (data / out / "metrics.jsonl").read_text().splitlines()]
                    for out in ("one", "two"))
        print("| step | loss, one process | loss, two hosts | difference |\n| ---: | ---: | ---: | ---: |")
        for a, b in zip(one, two):
            if "loss" in a:
                difference = abs(a["loss"] - b["loss"])
                print(f"| {a['step']} | {a['loss']:.6f} | {b['loss']:.6f} | {difference:.1e} |")


if __name__ == "__main__":
    main()
