"""The videos of many callers in turn: what `tools.serve` has between whoever asks and the model."""

import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from threading import Condition, Thread

from data import Key
from tools.client import unusable
from tools.memory import digest_of


class Job(Future):
    """A video and its prompt; its result is a record."""

    def __init__(self, key: Key, digest: str):
        super().__init__()
        self.set_running_or_notify_cancel()  # nobody cancels it for the others
        self.key, self.digest = key, digest
        self.callers = 0
        self.is_taken = False


class Rounds:
    """Asks `score` about videos, as `infer.Scorer` is asked, in rounds of at most `size`.

    In a round each caller has a turn for one video, then each for another. Who asks what is under
    way waits for the same answer, and the last `kept` answers about videos that could be read are
    known by what was asked: digests of the video's content and its prompt. What nobody waits for is
    not begun. Where `score` fails, the videos of the round are asked about one by one, and those at
    which it fails alone have an error."""

    def __init__(self, score: Callable[[list, list[str]], list[dict]], size: int, kept: int,
                 window: float = 0.0):
        """window: seconds to wait for others who ask at the same time."""
        self.score, self.size, self.kept, self.window = score, size, kept, window
        self.changed = Condition()
        self.queues = deque()  # of each caller the jobs that had no turn yet
        self.jobs = {}  # those without an answer, by their digest
        self.found = OrderedDict()  # records by their digest, the last asked last
        Thread(target=self.work, daemon=True).start()

    def ask(self, keys: list[Key]) -> list[Job]:
        """The jobs of a caller, who has to `leave` them."""
        with self.changed:
            jobs = [self.job(key) for key in keys]
            if jobs:
                self.queues.append(deque(jobs))
                self.changed.notify()
        return jobs

    def job(self, key: Key) -> Job:
        digest = digest_of(key)
        job = self.jobs.get(digest)
        if job is None:
            job = Job(key, digest)
            if digest in self.found:
                self.found.move_to_end(digest)
                job.is_taken = True
                job.set_result(self.found[digest])
            else:
                self.jobs[digest] = job
        job.callers += 1
        return job

    def leave(self, jobs: list[Job]) -> None:
        """The caller waits no longer."""
        with self.changed:
            for job in jobs:
                job.callers -= 1
                if not job.callers and not job.is_taken:
                    del self.jobs[job.digest]
                    job.key = None  # until its turn comes, the job stands in a queue without its video

    def work(self) -> None:
        while True:
            self.answer(self.take())

    def take(self) -> list[Job]:
        """The jobs of the next round."""
        with self.changed:
            self.changed.wait_for(lambda: self.queues)
        time.sleep(self.window)
        taken = []
        with self.changed:
            while self.queues and len(taken) < self.size:
                queue = self.queues.popleft()
                job = queue.popleft()
                if queue:
                    self.queues.append(queue)
                if job.callers and not job.is_taken:
                    job.is_taken = True
                    taken.append(job)
        return taken

    def answer(self, jobs: list[Job]) -> None:
        records = []
        failure = None
        try:
            if jobs:
                records = self.score(*map(list, zip(*[job.key for job in jobs])))
        except Exception as error:  # noqa: BLE001 (the server goes on, whatever it is)
            failure = f"{type(error).__name__}: {error}"
        # The error is gone here, and with it what it held in memory.
        if failure and len(jobs) > 1:
            for job in jobs:
                self.answer([job])
            return
        if failure:
            print(f"error: {failure}", file=sys.stderr, flush=True)
            records = [unusable("the model failed; the server's output says why")]
        with self.changed:
            for job, record in zip(jobs, records):
                del self.jobs[job.digest]
                # A file that could not be read, or a model that failed, may do when it is asked again.
                if record["error"] is None or record["cot"] is not None:
                    self.found[job.digest] = record
            while len(self.found) > self.kept:
                self.found.popitem(last=False)
        for job, record in zip(jobs, records):
            job.set_result(record)
