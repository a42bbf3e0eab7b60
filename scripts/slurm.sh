#!/usr/bin/env bash
#SBATCH --job-name=grpo-noise
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=slurm-%j.out
#
# A sweep on all nodes of a SLURM allocation. From the project's root, after `make setup` (GPU=1 where there are GPUs):
#
#   sbatch scripts/slurm.sh flip --profile smol --gpus-per-run 0.25
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 scripts/slurm.sh channels --profile qwen2.5-math-1.5b
#
# Arguments are those of `python -m runner`; options of sbatch override the lines above. The job starts Ray on every
# node, waits for all of them, runs the sweep and takes Ray down. Two minutes before the time limit the sweep is told to
# stop; submit the same line again and it goes on from the last checkpoints.
set -euo pipefail
if [ $# -eq 0 ]; then
  sed -n '/^# A sweep/,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"  # only when it is not a copy in SLURM's spool
  exit 2
fi
: "${SLURM_JOB_ID:?submit this with sbatch, or run it inside salloc}"
cd "${SLURM_SUBMIT_DIR:-$PWD}"
BIN=${VENV:-.venv}/bin
[ -x "$BIN/ray" ] || { echo "there is no $BIN/ray: submit from the project's root after make setup, or set VENV" >&2; exit 2; }

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
free_port() { "$BIN/python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
# The port is free on this node, the first of the allocation. Sockets need a short path that jobs do not share.
port=$(free_port)
tmp=/tmp/ray-$SLURM_JOB_ID
# Only who knows this job's token can talk to its Ray.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0 RAY_agent_register_timeout_ms=120000
RAY_AUTH_TOKEN=$("$BIN/python" -c 'import secrets; print(secrets.token_hex(32))')

cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
gpus=${SLURM_GPUS_ON_NODE:-0}
on_node() {  # one step of the job on one node, in the background
  local node=$1
  shift
  # Tried again where the head is not up yet, or where a busy node exceeds the half minute that Ray gives itself.
  srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" --cpus-per-task="$cpus" \
    bash -c 'trap "kill \$ray; wait \$ray; exit 143" TERM
      for try in 1 2 3 4 5; do "$@" & ray=$!; wait "$ray" && exit; sleep 3; done; exit 1' _ "$BIN/ray" start --block --num-cpus "$cpus" --num-gpus "$gpus" "$@" > "slurm-$SLURM_JOB_ID-$node.log" 2>&1 &
  steps+=($!)
}

steps=()
sweep=
finish() {
  trap - EXIT TERM INT
  for step in "${steps[@]}"; do kill "$step" 2>/dev/null || true; done
  wait "${steps[@]}" 2>/dev/null || true
  rm -rf "$tmp"
}
trap finish EXIT
stop() { if [ -n "$sweep" ]; then kill -TERM "$sweep" 2>/dev/null || true; else exit 143; fi; }
trap stop TERM INT

# This script runs on the first node. RAY_HEAD_IP names its address where Ray would choose the wrong network.
head=${RAY_HEAD_IP:-$("$BIN/python" -c 'import ray; print(ray.util.get_node_ip_address())')}
on_node "${nodes[0]}" --head --node-ip-address "$head" --port "$port" --temp-dir "$tmp"
for node in "${nodes[@]:1}"; do on_node "$node" --address "$head:$port"; done

"$BIN/python" - "$head:$port" "${#nodes[@]}" "${RAY_JOIN_SECONDS:-600}" <<'PYTHON' || exit 1
import sys
import time

import ray

address, nodes, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
end, there = time.time() + seconds, 0
while there < nodes and time.time() < end:
    try:
        if not ray.is_initialized():
            ray.init(address=address, logging_level="error", log_to_driver=False)
        there = sum(node["Alive"] for node in ray.nodes())
    except Exception as e:  # the head is not up yet
        print(f"waiting for {address}: {str(e).splitlines()[0]}", file=sys.stderr)
    time.sleep(1)
print(f"{there} of {nodes} nodes have joined Ray at {address}")
sys.exit(there < nodes)
PYTHON

"$BIN/python" -m runner "$@" --runs-only --address "$head:$port" &
sweep=$!
status=0
wait "$sweep" || status=$?
if [ $status -gt 128 ] && kill -0 "$sweep" 2>/dev/null; then  # `wait` was cut short by the signal: let the sweep stop
  wait "$sweep" && status=0 || status=$?
fi
exit $status
