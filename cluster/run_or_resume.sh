#!/bin/bash
# Starts a run, or goes on with it where its folder holds one: the entrypoint that may be repeated.
#
#   run_or_resume PIPELINE.yaml RUN_DIR [key=value ...]
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "run_or_resume: got $# arguments, wanted PIPELINE.yaml RUN_DIR [key=value ...]" >&2
    exit 2
fi
pipeline=$1
run_dir=$2
shift 2

# The process keeps its number through exec, so stop_driver finds the driver itself.
echo $$ > "${RLHF_RAY_PID_FILE:-/tmp/rlhf-ray.pid}"
if [ -f "$run_dir/config.yaml" ]; then
    exec rlhf-ray resume "$run_dir"
fi
exec rlhf-ray run "$pipeline" "run_dir=$run_dir" "$@"
