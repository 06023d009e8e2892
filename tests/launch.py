"""Start the project's scripts as processes of their own, without importing torch anew for each.

Importing the packages takes longer than most of what is tested. A server process imports them once and forks
for every start (multiprocessing's forkserver); what runs in the fork is the script's file, as `__main__`,
with its own arguments, environment and output. It can be killed like any process.
"""

import atexit
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where the server finds what it preloads.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["infer", "tools.memory", "support.run", "peft.tuners.lora"])


def body(command: list[str], env: dict[str, str], out: str, err: str, largest_file: int | None,
         root: Path) -> None:
    """What a started process does."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(root)
    os.environ.update(env)
    if root != ROOT:
        forget_the_project()
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")


def forget_the_project() -> None:
    """Import nothing from here any more, for it is a copy of the project that is to be run."""
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
    ours = {path.stem for path in ROOT.glob("*.py")} | {"support", "tools"}
    for name in list(sys.modules):
        if name.split(".")[0] in ours:
            del sys.modules[name]


class Started:
    """A process that runs `python command…` in the project's folder, or in that of a copy."""

    def __init__(self, *command, env: dict[str, str] | None = None, largest_file: int | None = None,
                 root: Path = ROOT):
        self.command = list(map(str, command))
        self.files = [tempfile.mkstemp()[1] for _ in range(2)]
        arguments = (self.command, env or {}, *self.files, largest_file, root)
        self.process = SERVER.Process(target=body, args=arguments)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill
        atexit.register(self.end)

    def running(self) -> bool:
        return self.process.is_alive()

    def end(self) -> None:
        """What a test that failed has left running would be waited for when the tests end."""
        if self.running():
            self.kill()

    def wait(self, timeout: float = 900) -> subprocess.CompletedProcess:
        """Wait for the end; returns exit status and output. The timeout is for what hangs: on a busy machine
        a start can take ten times as long as on a quiet one."""
        self.process.join(timeout)
        late = self.running()
        if late:
            self.kill()
            self.process.join()
        out, err = (Path(path).read_text() for path in self.files)
        for path in self.files:
            os.unlink(path)
        if late:
            raise TimeoutError(f"{self.command} ran longer than {timeout} s\n{out[-2000:]}\n{err[-4000:]}")
        return subprocess.CompletedProcess(self.command, self.process.exitcode, out, err)


def run(*command, check=True, env=None, root=ROOT) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user would, to its end."""
    (done,) = checked([Started(*command, env=env, root=root)], check)
    return done


def run_ranks(processes: int, *command, check=True) -> list[subprocess.CompletedProcess]:
    """Run a script in so many processes that form one group, given what torchrun gives them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return checked([Started(*command,
                            env={"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                                 "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
                    for rank in range(processes)], check)


def checked(started: list[Started], check: bool) -> list[subprocess.CompletedProcess]:
    ended = [process.wait() for process in started]
    if check and any(done.returncode for done in ended):
        raise AssertionError("\n".join(
            f"{done.args} exited {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            for done in ended))
    return ended
