"""The exceptions that rlhf_ray raises.

    RlhfRayError
    ├── UserError            the user's input is wrong: exit code 2, no traceback
    │   ├── ConfigError      a pipeline file or an override
    │   ├── DataError        a data file, or a row of it
    │   └── InstallError     a library is missing, or older than its floor
    ├── PlacementError       the cluster has not what the roles ask for
    ├── WorkerError          a worker died, raised, or missed its deadline
    ├── WeightSyncError      a generator does not hold the learner's weights
    ├── CheckpointError      a checkpoint is missing, incomplete or of another run
    └── Interrupted          Ctrl-C or SIGTERM: saved where possible, exit code 130 or 143, resumable

Every message says where, what was got, what is wanted, and what to do.
"""


class RlhfRayError(Exception):
    """The root of every exception that this package raises on purpose."""


class UserError(RlhfRayError):
    """A mistake in the user's input; the command line prints it without a traceback and exits 2."""


class ConfigError(UserError):
    """A pipeline file or an override is wrong."""


class DataError(UserError):
    """A data file, or a row of it, is wrong; the message names file and row."""


class InstallError(UserError):
    """A library is missing or too old; the message gives the line that installs it."""


class PlacementError(RlhfRayError):
    """The cluster does not have the CPUs or GPUs that the roles ask for."""


class WorkerError(RlhfRayError):
    """A worker died, raised or missed its deadline; names role, rank and method."""


class WeightSyncError(RlhfRayError):
    """A generator does not hold the learner's weights; names the worst tensor or token."""


class CheckpointError(RlhfRayError):
    """A checkpoint cannot be read, is incomplete, or belongs to another run."""


class Interrupted(RlhfRayError):  # noqa: N818
    """The run was asked to stop and can be resumed: exit code 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
