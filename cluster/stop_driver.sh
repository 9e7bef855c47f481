#!/bin/bash
# Asks the driver that run_or_resume started here to save and to end, and waits for it at most SECONDS (100).
#
#   stop_driver [SECONDS]
set -euo pipefail

pid_file=${RLHF_RAY_PID_FILE:-/tmp/rlhf-ray.pid}
seconds=${1:-100}
if [ ! -f "$pid_file" ]; then
    exit 0
fi
pid=$(cat "$pid_file")
kill -TERM "$pid" 2>/dev/null || exit 0
for _ in $(seq $((5 * seconds))); do
    sleep 0.2
    if ! kill -0 "$pid" 2>/dev/null; then
        exit 0
    fi
done
echo "stop_driver: process $pid is still there after $seconds s" >&2
exit 1
