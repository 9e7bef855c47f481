"""The runs that were submitted to a cluster, by the names that a person has for them."""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from rlhf_ray.config.problems import suggestion
from rlhf_ray.errors import ConfigError
from rlhf_ray.submission.upload import PACKAGE, remote_run_dir

if TYPE_CHECKING:
    from rlhf_ray.distributed.jobs import Job, JobServer


def submitted_runs(server: JobServer) -> list[Job]:
    """The cluster's jobs that are runs of this program, newest first."""
    return [job for job in server.jobs() if {PACKAGE, "run_dir"} <= job.metadata.keys()]


def find_run(server: JobServer, run: str) -> Job:
    """The run of that id, or the newest of that run_dir.

    Args:
        server: the cluster.
        run: id or run_dir; a relative run_dir as it was submitted, and one below `~` also as the shell here writes it.

    Raises:
        ConfigError: there is none.
    """
    jobs = submitted_runs(server)
    for name in (run, *_folders(run)):
        for job in jobs:
            if name in (job.id, str(PurePosixPath(job.metadata["run_dir"]))):
                return job
    raise ConfigError(f"{server.address} has no run {run!r}{suggestion(run, [job.id for job in jobs])}")


def _folders(run: str) -> list[str]:
    """The run_dirs that may be meant: as it is written, then with the home folder of this machine as `~`."""
    written = remote_run_dir(str(PurePosixPath(run)))
    home = os.path.expanduser("~")
    if not PurePosixPath(written).is_relative_to(home):
        return [written]
    return [written, str(PurePosixPath("~", PurePosixPath(written).relative_to(home)))]
