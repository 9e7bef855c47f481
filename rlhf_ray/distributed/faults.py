"""Faults that tests inject: one environment variable names the place and what goes wrong there.

    RLHF_RAY_FAULT=phase:role:rank:iteration:action

`*` stands for any role, rank or iteration. The actions `kill`, `raise` and `sleep:SECONDS` are done here; any other
(drop_tensor, swap_tensors, stale_version, skip_cache_reset, corrupt, ...) is given to the code at that place.
"""

from __future__ import annotations

import os
import signal
import time

from rlhf_ray.errors import ConfigError

VARIABLE = "RLHF_RAY_FAULT"


def fault(point: str, *, role: str, rank: int, iteration: int) -> str | None:
    """The action that the caller has to carry out here; None almost always.

    Raises:
        RuntimeError: the action is `raise`.
        ConfigError: the variable does not have five parts.
    """
    specification = os.environ.get(VARIABLE)
    if not specification:
        return None
    parts = specification.split(":", 4)
    if len(parts) != 5:
        raise ConfigError(f"{VARIABLE}: got {specification!r}, wanted phase:role:rank:iteration:action")
    *wanted, action = parts
    here = (point, role, str(rank), str(iteration))
    if any(want not in ("*", value) for want, value in zip(wanted, here, strict=True)):
        return None
    return _carry_out(action, f"{point}, {role} rank {rank}, iteration {iteration}")


def _carry_out(action: str, where: str) -> str | None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        raise RuntimeError(f"injected fault: {where}")
    name, _, argument = action.partition(":")
    if name == "sleep":
        time.sleep(float(argument))
        return None
    return action
