"""The runs of a study or a search on a Ray cluster, with `--ray ADDRESS`.

All machines see the same directory of the study and the same data under the same paths, and have
the same Python environment, as on a cluster with a shared file system. A run whose machine is lost
is given to another, where it goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from medseg_reg.errors import EXIT_INTERRUPTED, MedsegError
from medseg_reg.study import worker
from medseg_reg.study.pool import ATTEMPT, Job
from medseg_reg.study.spec import ManyRuns

# How often a run whose machine was lost is given to another one.
RETRIES = 20
STOP = worker.STOP
_POLL_SECONDS = 0.5


class RayPool:
    """A Ray cluster; as many runs at a time as it has room for.

    Args:
        address: of the cluster, such as `auto` or `ray://host:10001`.
        runs: a study or a search; says how many threads, or which share of a GPU, a run needs.

    Raises:
        MedsegError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str, runs: ManyRuns) -> None:
        try:
            import ray
        except ImportError:
            raise MedsegError(
                "--ray: Ray is not installed. Install it with `pip install 'medseg-reg[ray]'`."
            ) from None
        self.ray, self.threads = ray, runs.threads
        own = worker.environment(runs.threads, None, os.environ)
        names = ("PYTHONPATH", "PYTHONUNBUFFERED", *worker.THREADS)
        self._variables = {name: own[name] for name in names}
        self.gpu_share = 1 / runs.runs_per_gpu if runs.gpus else 0.0
        try:
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            first = str(error).strip().split("\n")[0]
            raise MedsegError(f"--ray {address}: no cluster can be reached ({first}).") from None
        # Sent as it is, so that Ray's own processes need not find this package.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self._task = ray.remote(
            num_cpus=runs.threads, num_gpus=self.gpu_share, max_retries=RETRIES
        )(run_command)
        # Seen by all machines, where a signal is not.
        self._stop_file = runs.directory.resolve() / f".stop-{uuid.uuid4().hex}"
        self._running: dict[Any, Job] = {}

    @property
    def size(self) -> int:
        """How many runs the cluster has room for now; it may grow and shrink."""
        resources = self.ray.cluster_resources()
        room = resources.get("CPU", 0) // self.threads
        if self.gpu_share:
            room = min(room, resources.get("GPU", 0) // self.gpu_share)
        return max(1, int(room))

    def start(self, job: Job) -> None:
        """Hand a job to the cluster."""
        reference = self._task.remote(
            list(job.command),
            str(job.log.resolve()),
            str(Path.cwd()),
            self._variables,
            str(self._stop_file),
        )
        self._running[reference] = job

    def ended(self) -> list[tuple[Job, int]]:
        """Return the jobs that have ended since, with their exit codes; waits a moment."""
        done, _ = self.ray.wait(list(self._running), num_returns=1, timeout=_POLL_SECONDS)
        found = []
        for reference in done:
            job = self._running.pop(reference)
            try:
                code = int(self.ray.get(reference))
            except self.ray.exceptions.RayError as error:
                first = str(error).strip().split("\n")[0]
                job.log.parent.mkdir(parents=True, exist_ok=True)
                with job.log.open("a", encoding="utf-8") as log:
                    log.write(f"\nerror: Ray could not finish this run: {first}\n")
                code = 1
            found.append((job, code))
        if not self._running:
            self._stop_file.unlink(missing_ok=True)
        return found

    def stop(self) -> None:
        """Ask all jobs to stop after a checkpoint."""
        self._stop_file.touch()

    def kill(self) -> None:
        """End all jobs at once."""
        for reference in self._running:
            with suppress(Exception):
                self.ray.cancel(reference, force=True)
        self._running.clear()
        self._stop_file.unlink(missing_ok=True)


def run_command(
    command: list[str], log: str, folder: str, variables: dict[str, str], stop_file: str
) -> int:
    """Run a worker on a machine of the cluster and return its exit code.

    The worker is on a leash: it ends with this process, whatever ends that.
    """
    stop = Path(stop_file)
    if stop.exists():
        return EXIT_INTERRUPTED
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("ab") as output:
        output.write(ATTEMPT.encode())
        output.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            # Ray has chosen the GPUs, by CUDA_VISIBLE_DEVICES.
            env={**os.environ, **variables},
        )
    asked = False
    while process.poll() is None:
        if stop.exists() and not asked:
            asked = True
            assert process.stdin is not None  # noqa: S101 - a pipe, see above
            with suppress(OSError):
                process.stdin.write(STOP)
                process.stdin.flush()
        time.sleep(_POLL_SECONDS)
    # Stopped before it could save, a run ends by the signal.
    return EXIT_INTERRUPTED if asked and process.returncode < 0 else process.returncode
