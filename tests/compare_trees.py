"""Do two trees of the project do the same? Run every command and flag in both, compare what they leave.

    python tests/compare_trees.py OLD NEW --keep DIR       # a table; exit code 1 if anything differs
    python tests/compare_trees.py OLD NEW --keep DIR --reuse --only 'rl*'    # some cases, and those that they
                                         # build on; OLD is not run again
    python tests/compare_trees.py OLD OLD --keep DIR --effects rl.py  # which flags change nothing there

A case is a list of commands, run in a folder of its own (DIR/old/CASE, DIR/new/CASE) on inputs that OLD
makes (DIR/data; tests/compare_inputs.py). Commands have their old names, which NEW answers through its stubs.
Compared are stdout, stderr, exit codes and all files, floats to the bit; not compared are times, ports, what
a progress bar shows before its end, and digests of code. A flag of OLD that no case gives a value other than
its default is an error. The cases, and what differs on purpose, stand in tests/compare_cases.py.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import compare_inputs
import numpy as np
from compare_cases import CASES, COMMANDS, DELIBERATE, DROPPED, GONE, MOVED

FORK = get_context("fork")
# Imported once, before the forks; nothing of either tree is among them.
PRELOADED = ("torch", "torch.distributed.fsdp", "transformers.models.qwen3_vl.modeling_qwen3_vl", "peft",
             "transformers.models.auto.tokenization_auto", "av", "httpx2", "uvicorn", "fastapi", "PIL.Image")
TIMEOUT = 300  # seconds that a command may take

# ------------------------------
# Running a case


def body(tree: Path, words: list[str], folder: Path, name: str, env: dict, signals: dict[str, int]) -> None:
    """What a started process does: what `python WORDS` would do in the folder."""
    os.chdir(folder)
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{end}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(env, PYTHONPATH=str(tree))
    sys.path[0] = str(tree)

    def watch(event: str, arguments: tuple) -> None:
        if event == "os.rename" and (number := signals.pop(Path(str(arguments[1])).name, None)):
            os.kill(os.getpid(), number)

    if signals:
        sys.addaudithook(watch)
    kind, *rest = words
    if kind == "api":
        getattr(compare_inputs, f"api_{rest[0]}")(*rest[1:])
    elif kind == "endpoint":
        compare_inputs.endpoint(*rest)
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(tree / kind), *rest]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


def run_case(tree: Path, lines: list[str], folder: Path) -> None:
    """Run a case's commands. What the second one says goes into 2.out and 2.err, its exit code into 2.exit.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    running, url = [], "none"
    for number, line in enumerate(lines, 1):
        line = re.sub(r"\bDATA\b", "../../data", line).replace("$URL", url)
        if line.startswith("$"):
            subprocess.run(line[1:], shell=True, cwd=folder, check=False)
            continue
        options, words = split_options(shlex.split(line))
        if words[0] == "like":
            found = compare_folders(folder / words[1], folder / words[2])
            (folder / f"{number}.like").write_text("".join(f"{where}: {what}\n" for where, what in found))
            continue
        stays = words[-1] == "&"
        started = start(tree, words[:-1] if stays else words, folder, str(number), options)
        if not stays:
            wait(folder, started)
            continue
        running += started
        while started[0].is_alive() and "http://" not in (folder / f"{number}.out").read_text():
            time.sleep(0.05)
        url = re.findall(r"http://\S+|$", (folder / f"{number}.out").read_text())[0]
    for process in running:
        process.terminate()
    wait(folder, running)
    (folder / "commands").write_text("\n".join(lines))  # last, so that it says that all is there


def split_options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """What stands before a command as NAME=VALUE, and the command."""
    options = {}
    while match := re.fullmatch(r"(\w+)=(\S+)", words[0]):
        options[match[1]] = match[2]
        words = words[1:]
    return options, words


def start(tree: Path, words: list[str], folder: Path, name: str, options: dict[str, str]) -> list:
    """The processes of a command."""
    env = {key: value for key, value in options.items() if key.isupper()}
    signals = {options[key]: number for key, number in (("die", signal.SIGKILL), ("stop", signal.SIGTERM))
               if key in options}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(int(options.get("ranks", 1))):
        own = f"{name}-rank{rank}" if rank else name
        if "ranks" in options:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": options["ranks"],
                    "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        arguments = (tree, words, folder, own, dict(env), {} if rank else signals)
        for end in ("out", "err"):
            (folder / f"{own}.{end}").touch()
        started.append(FORK.Process(target=body, args=arguments, name=own))
        started[-1].start()
    return started


def wait(folder: Path, started: list) -> None:
    """Wait for processes to end; where one of several dies, the others are killed, as torchrun does."""
    end = time.time() + TIMEOUT
    while any(process.is_alive() for process in started):
        died = len(started) > 1 and any((process.exitcode or 0) < 0 for process in started)
        if died or time.time() > end:
            for process in started:
                process.kill()
        time.sleep(0.02)
    died = len(started) > 1 and any(process.exitcode < 0 for process in started)
    for process in started:
        (folder / f"{process.name}.exit").write_text(f"{process.exitcode}{' late' * (time.time() > end)}\n")
        if died:  # who was first, and what each had said, is a matter of time
            for kind in ("out", "err", "exit"):
                (folder / f"{process.name}.{kind}").write_text("killed\n")


def run_both(trees: dict[str, Path], case: str, work: Path, reuse: bool = False) -> None:
    """Run a case in both trees, side by side; `reuse` what OLD has left of the same commands."""
    started = []
    for name, tree in trees.items():
        done = work / name / case / "commands"
        if not (reuse and name == "old" and done.is_file() and done.read_text() == "\n".join(CASES[case])):
            started.append(FORK.Process(target=run_case, args=(tree, CASES[case], work / name / case)))
            started[-1].start()
    for process in started:
        process.join()


# ------------------------------
# Comparing what it left

BAR = re.compile(r"([\w -]*): +\d+%\|[^|]*\| *(\d+)/(\d+) \[[^,\]]*,?[^,\]]*([^\]]*)\]")  # tqdm's


def finished(bar: re.Match) -> str:
    """What a progress bar says in the end. What it says earlier, and whether one that vanishes is seen at
    all, depends on the time."""
    what, done, total, figures = bar.groups()
    return "" if done != total or what.startswith("evaluate") else f"{what}: {done}/{total}{figures}"


def normalise(text: str) -> str:
    """A text without what two equal runs say differently: folders, ports, addresses, times."""
    text = re.sub(r"/\S*?/(old|new)/tree\b", "TREE", text)
    text = re.sub(r"/\S*?/(old|new)/(?=[\w-]+/)", "WORK/", text)
    text = re.sub(r"(127\.0\.0\.1|localhost):\d+|0x[0-9a-f]{8,}", r"\1:PORT", text)
    text = re.sub(MOVED, "ROOM", text)
    text = re.sub(rf"(?m)^({DROPPED})\n", "", text)
    text = re.sub(r"(?s)^usage: .*?(?=^\S+: error:|\Z)", "usage\n", text, flags=re.MULTILINE)
    if "\r" not in text:
        return text
    lines = BAR.sub(finished, text.replace("\x1b[A", "").replace("\r", "\n")).split("\n")
    lines = [line.rstrip() for line in lines if line.strip()]
    return "\n".join(line for number, line in enumerate(lines) if line not in lines[number - 1 : number])


def plain(value, place: str = "", without: tuple[str, ...] = ()):
    """What a JSON file holds, without times and digests of code, nor what else is to be left out."""
    if isinstance(value, dict):
        kept = {}
        for key, part in value.items():
            is_time = key.startswith("seconds") and isinstance(part, (int, float))
            is_code = place == "digests" and re.fullmatch(r"\S+\.py", key)
            is_gone = place in ("args", "settings") and key in GONE
            if not (is_time or is_code or is_gone or key in ("metrics_bytes", "written", "made", *without)):
                kept[normalise(key)] = plain(part, key, without)
        return kept
    if isinstance(value, list):  # a page has curves of times
        return [plain(part, place, without) for part in value
                if not (isinstance(part, dict) and "points" in part and part["name"].startswith("seconds"))]
    return normalise(value) if isinstance(value, str) else value


def read(path: Path, without: tuple[str, ...] = ()):
    """A file as something that `difference` compares."""
    content, end = path.read_bytes(), path.suffix
    if end == ".png" or "tfevents" in path.name:
        return len(content) > 100
    if end == ".safetensors":
        start_of_data = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start_of_data])
        found = {"metadata": header.pop("__metadata__", None)}
        for name, about in sorted(header.items()):
            first, last = (start_of_data + offset for offset in about["data_offsets"])
            kind = {"F32": np.float32, "F64": np.float64}.get(about["dtype"], np.uint8)
            found[name] = [about["dtype"], about["shape"], np.frombuffer(content[first:last], kind)]
        return found
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return hashlib.sha256(content).hexdigest()
    if path.name == "SHA256SUMS":
        return [line for line in text.splitlines() if "state.json" not in line]
    if end == ".html":
        script = r'(<script type="application/json"[^>]*>)(.*?)(?=</script>)'
        pages = [plain(json.loads(page), "", without) for _, page in re.findall(script, text)]
        return [normalise(re.sub(script, r"\1", text)).split("\n"), *pages]
    if end in (".json", ".jsonl", ".cots", ".judged"):
        try:
            parts = [text] if end == ".json" else text.splitlines()
            return [plain(json.loads(part), "", without) for part in parts]
        except ValueError:
            pass  # half a line
    return normalise(text).split("\n")


def difference(old, new, place: str = "") -> str | None:
    """Where two values differ first, with a piece of both."""
    if type(old) is type(new) and isinstance(old, dict):
        for key in {**old, **new}:
            if key not in old or key not in new:
                return f"{place}.{key}: only in {'OLD' if key in old else 'NEW'}"
            if found := difference(old[key], new[key], f"{place}.{key}"):
                return found
        return None if list(old) == list(new) else f"{place}: the order {list(old)} | {list(new)}"[:300]
    if type(old) is type(new) and isinstance(old, list):
        for number, (one, other) in enumerate(zip_longest(old, new, fillvalue="(no more)")):
            if found := difference(one, other, f"{place}[{number}]"):
                return found
        return None
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray) and old.shape == new.shape:
        differ = old.view(np.uint8) != new.view(np.uint8)
        if not differ.any():
            return None
        most = np.abs(old.astype(float) - new.astype(float)).max()
        return f"{place}: {(old != new).sum()} of {old.size} values, by up to {most:.3g}"
    both_nan = isinstance(old, float) and isinstance(new, float) and math.isnan(old) and math.isnan(new)
    if both_nan or (type(old) is type(new) and old == new):
        return None
    first = max(0, len(os.path.commonprefix([str(old), str(new)])) - 30)
    return f"{place}: {str(old)[first : first + 110]!r} | {str(new)[first : first + 110]!r}"


def files(folder: Path) -> dict[str, Path]:
    """The files of a case by names that do not depend on the time, but for copies of inputs."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub("tfevents.*", "tfevents", path.relative_to(folder).as_posix())
        if path.is_file() and name != "commands" and not name.startswith("runs/toy/"):
            found[name] = path
    return found


def compare_folders(old: Path, new: Path, without: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Where two folders differ: the file, and the first difference in it."""
    of_old, of_new = files(old), files(new)
    for name in sorted({**of_old, **of_new}):
        if name not in of_old or name not in of_new:
            yield name, f"only in {'OLD' if name in of_old else 'NEW'}"
            continue
        old_file, new_file = of_old[name], of_new[name]
        if old_file.read_bytes() == new_file.read_bytes():
            continue
        if found := difference(read(old_file, without), read(new_file, without)):
            yield name, found


# ------------------------------
# Flags


def flags_of(folder: Path) -> dict[str, dict[str, str | None]]:
    """The flags of each command, with their defaults where the help says them, from what "help" left."""
    found = {}
    for number, command in enumerate(COMMANDS, 1):
        text = " ".join((folder / f"{number}.out").read_text().split("options:")[1].split())
        found[command] = {}
        for part in re.split(r"(?<!,) (?=--?[a-z])", text):
            default = re.search(r"\(default: (.*?)\)", part)
            for flag in re.findall(r"(?:^|, )(--[a-z][\w-]*)", part):
                found[command][flag.replace("_", "-")] = default and default[1].lower()
    return found


def uses(line: str) -> tuple[str, dict[str, str]]:
    """A command and its flags with their values, of each the last."""
    _, words = split_options([word for word in shlex.split(line) if word != "&"])
    values: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            values[word] = flag_values = []
        elif values:
            flag_values.append(word)
    name = " ".join(words[: 2 if words[0] == "-m" else 1])
    return name, {flag: " ".join(of_flag).lower() for flag, of_flag in values.items()}


def where_used(flags: dict[str, dict[str, str | None]]) -> dict[tuple[str, str], list[tuple[str, int]]]:
    """For each command and flag the cases and lines that give it a value other than the default."""
    found = {(name, flag): [] for name in flags for flag in flags[name] if flag != "--help"}
    for case, lines in CASES.items():
        for number, line in enumerate(lines):
            name, values = uses(line)
            for flag, value in values.items():
                if (name, flag) in found and value != flags[name][flag] and not case.startswith("errors"):
                    found[name, flag].append((case, number))
    return found


def has_effect(tree: Path, case: str, number: int, flag: str, work: Path) -> bool:
    """Whether a case of OLD leaves anything else, but for the settings, where a line lacks a flag."""
    lines = list(CASES[case])
    values = r"( +(?!--|&)('[^']*'|\S+))*"
    lines[number] = re.sub(rf" {flag}{values}", "", lines[number])
    process = FORK.Process(target=run_case, args=(tree, lines, work / "old" / f"{case}~"))
    process.start()
    process.join()
    echoes = ("args", "settings", "made_by", "files")
    return any(compare_folders(work / "old" / case, work / "old" / f"{case}~", echoes))


# ------------------------------
# The command


def chosen(patterns: list[str]) -> list[str]:
    """The cases of some patterns, and those that they build on, in the order of the table."""
    wanted = [case for case in CASES if any(fnmatchcase(case, pattern) for pattern in patterns)]
    for case in wanted:
        for name in re.findall(r"\.\./([\w-]+)/", " ".join(CASES[case])):
            wanted += [name] * (name not in wanted)
    return sorted(wanted, key=list(CASES).index)


def compare_case(case: str, work: Path, seconds: float) -> int:
    """Print a row of the table, with the seconds of computing, and below it what differs. Returns how much of
    it is not on purpose."""
    found = list(compare_folders(work / "old" / case, work / "new" / case))
    for path in [*(work / "old" / case).glob("*.like"), *(work / "new" / case).glob("*.like")]:
        found += [(path.name, f"within a tree, {line}") for line in path.read_text().splitlines()]
    rows, real = [], 0
    for where, what in found:
        reasons = [reason for cases, names, reason in DELIBERATE
                   if fnmatchcase(case, cases) and fnmatchcase(where, names)]
        real += not reasons
        rows.append(f"    {where}: {what}" + "".join(f" (on purpose: {reason})" for reason in reasons))
    verdict = "differs" if real else "on purpose" if found else "same"
    exits = " ".join(path.read_text().strip() for path in sorted((work / "old" / case).glob("*.exit")))
    print("\n".join([f"{case:26}{verdict:12}{seconds:4.0f} s  exit {exits[:50]}", *rows]), flush=True)
    return real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("old", type=Path)
    add("new", type=Path)
    add("--only", metavar="PATTERN", nargs="+", default=["*"], help="cases by their names")
    add("--list", action="store_true", help="list the cases")
    add("--keep", type=Path, metavar="DIR", help="a folder for inputs and outputs; inputs in it are used")
    add("--reuse", action="store_true", help="take what OLD has left in --keep of the same commands")
    add("--effects", metavar="PATTERN", help="look for flags without an effect in these commands of OLD, "
        "whose cases have been run in --keep")
    args = parser.parse_args()
    cases = chosen(args.only)
    if args.list:
        print("\n".join(f"{case:26}{len(CASES[case])} commands" for case in cases))
        return
    for name in PRELOADED:
        importlib.import_module(name)
    work, started = (args.keep or Path(tempfile.mkdtemp(prefix="compare-"))).resolve(), time.time()
    trees = {name: work / name / "tree" for name in ("old", "new")}
    for name, tree in trees.items():
        shutil.rmtree(tree, ignore_errors=True)
        ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "tests")
        shutil.copytree(getattr(args, name), tree, ignore=ignored)
    if not (work / "data/ready").is_file():
        shutil.rmtree(work / "data", ignore_errors=True)
        for case, lines in compare_inputs.steps(work / "data", trees["old"]):
            run_case(trees["old"], lines, work / "old" / case)
        (work / "data/ready").touch()
    run_both(trees, "help", work)
    used = where_used(flags_of(work / "old/help"))
    if args.effects:
        for (name, flag), places in used.items():
            if fnmatchcase(name, args.effects):
                places.sort(key=lambda place: len(CASES[place[0]]))
                effects = (place for place in places if has_effect(trees["old"], *place, flag, work))
                place = next(effects, None)
                print(f"{name} {flag}: {place or 'no effect is seen'}", flush=True)
        return
    missed = [f"flag without a case: {name} {flag}" for (name, flag), places in used.items() if not places]
    failed = 0
    for case in cases:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        run_both(trees, case, work, args.reuse)
        failed += compare_case(case, work, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    print("\n".join(missed))
    print(f"{len(cases)} cases, {failed} differences not on purpose, {len(missed)} flags without a case, "
          f"{time.time() - started:.0f} s; {f'kept in {work}' if args.keep else 'nothing kept'}")
    if not args.keep:
        shutil.rmtree(work)
    sys.exit(bool(failed or missed))


if __name__ == "__main__":
    main()
