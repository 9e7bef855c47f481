"""A Slurm batch script of a pipeline: one run on whole nodes, those of its plan."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rlhf_ray.submission.nodes import Nodes, nodes_for
from rlhf_ray.submission.order import Order, run_name

_MARGIN_S = 60
_SCRIPT = """\
#!/bin/bash
# A run of @WHAT@; requeued and resumed when it is preempted or at its time limit.
# For @NODES@. Written by `rlhf-ray submit --slurm`, rlhf_ray @VERSION@.
#
#   sbatch [--partition=... --time=...] FILE
#
# To be called in the folder that it was written in, which all nodes share, as they share the run's folder and the
# environment (RLHF_RAY_ENV: another virtual environment with rlhf_ray in it).
@OPTIONS@
set -uo pipefail

# SIGTERM comes ahead of the limit, to this shell alone: only the driver may stop by it, Ray has to live until it saved.
# Where there is no driver yet, nothing has to be saved, and the step may end.
pid_file="${TMPDIR:-/tmp}/rlhf-ray-$SLURM_JOB_ID.pid"
rm -f "$pid_file"
stopped=''
early=''
step=''
stop() {
    stopped=1
    if [ -s "$pid_file" ]; then
        kill -TERM "$(cat "$pid_file")"
    else
        early=1
        [ -z "$step" ] || kill -TERM "$step"
    fi
}
trap stop TERM

cd "$SLURM_SUBMIT_DIR" || exit 1
run_dir=@RUN_DIR@
port=${RLHF_RAY_PORT:-6379}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
environment=${RLHF_RAY_ENV:-@ENVIRONMENT@}
PATH="$(realpath "$environment")/bin:$PATH"
export PATH
@SECRETS@
# A token for this job alone, which only its owner can read, on the file system that all nodes share.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$HOME/.rlhf-ray-token-$SLURM_JOB_ID"
(umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH") || exit 1
clean() {
    rm -f "$RAY_AUTH_TOKEN_PATH" "$pid_file"
}
trap clean EXIT

if [ -f "$run_dir/config.yaml" ]; then
    run=(rlhf-ray resume "$run_dir")
else
    run=(@RUN@)
fi
# The nodes may take their time to come up; symmetric-run itself waits for 30 s only.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
# The driver keeps the number of the shell that notes it.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \\
    --disable-usage-stats --metrics-export-port=8080 -- \\
    env "RAY_ADDRESS=$head:$port" bash -c 'echo $$ > "$0"; exec "$@"' "$pid_file" "${run[@]}" &
step=$!
[ -z "$early" ] || kill -TERM "$step"
wait "$step"
code=$?
if [ -n "$stopped" ]; then
    # The first wait ended with the signal; this one ends with the step.
    wait "$step"
    code=$?
fi

# 241 is -15: the driver had not yet learned to take the signal.
if [ -n "$early" ] || [ "$stopped$code" = 1241 ]; then
    code=143
fi
if [ "$code" = 143 ]; then
    echo "run.sbatch: $run_dir was stopped; back into the queue"
    clean
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def render_script(order: Order, *, cluster: str | None) -> str:
    """The script of a pipeline; what it asks for is said on standard error.

    Args:
        order: what is submitted.
        cluster: the nodes, as `nodes_for` takes them.

    Raises:
        ConfigError: the nodes are too small, or the pipeline is wrong.
    """
    config = order.load(elsewhere=())
    nodes = nodes_for(config, cluster)
    print(f"asks for {nodes.in_words()}", file=sys.stderr, flush=True)
    prefix = Path(sys.prefix)
    return batch_script(
        f"rlhf-ray-{run_name(config.run_dir)}",
        nodes,
        pipeline=str(order.pipeline),
        overrides=[override for override in order.overrides if not override.startswith("run_dir=")],
        run_dir=str(Path(config.run_dir).expanduser()),
        environment=str(prefix.relative_to(Path.cwd()) if prefix.is_relative_to(Path.cwd()) else prefix),
        version=version("rlhf_ray"),
        save_s=order.save_s,
        secrets=order.secrets,
    )


def batch_script(
    name: str,
    nodes: Nodes,
    *,
    pipeline: str,
    overrides: Sequence[str],
    run_dir: str,
    environment: str,
    version: str,
    save_s: int,
    secrets: Sequence[str],
) -> str:
    """The script, to be given to sbatch in the folder that the paths are relative to.

    Args:
        name: of the job.
        nodes: what it asks for.
        pipeline: the pipeline's file.
        overrides: `key=value` settings besides run_dir.
        run_dir: the run's folder.
        environment: virtual environment with rlhf_ray in it.
        version: of rlhf_ray.
        save_s: seconds to save a checkpoint when the run is stopped.
        secrets: variables without which it does not start.
    """
    options = {
        "job-name": name,
        "nodes": nodes.count,
        "ntasks-per-node": 1,
        **({"gpus-per-node": nodes.gpus} if nodes.gpus else {}),
        "cpus-per-task": nodes.cpus,
        "mem": 0,
        "exclusive": None,
        "time": "24:00:00",
        "requeue": None,
        "open-mode": "append",
        "output": "rlhf-ray-%j.log",
        "signal": f"B:TERM@{save_s + _MARGIN_S}",
    }
    lines = [f"#SBATCH --{key}" + ("" if value is None else f"={value}") for key, value in options.items()]
    checks = [f': "${{{secret}:?run.sbatch: not set where sbatch is called}}"\n' for secret in secrets]
    run = [shlex.join(["rlhf-ray", "run", pipeline]), '"run_dir=$run_dir"', *map(shlex.quote, overrides)]
    places = {
        "WHAT": pipeline,
        "NODES": nodes.in_words(),
        "VERSION": version,
        "OPTIONS": "\n".join(lines),
        "RUN_DIR": shlex.quote(run_dir),
        "ENVIRONMENT": shlex.quote(environment),
        "SECRETS": "".join(checks),
        "RUN": " ".join(run),
    }
    text = _SCRIPT
    for place, value in places.items():
        text = text.replace(f"@{place}@", value)
    return text
