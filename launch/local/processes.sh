#!/usr/bin/env bash
# Several processes on this machine, as on a cluster: launch/local/processes.sh N VERB … (on GPUs, one GPU a process).
#   launch/local/processes.sh 2 train --config configs/quickstart.py --workdir runs/two --config.mesh.data=2
# With JAX_PLATFORMS=cpu each process has one CPU device; XLA_FLAGS=--xla_force_host_platform_device_count=K gives it K.
set -u

processes=${1:?usage: processes.sh NUM_PROCESSES VERB [--flag=value ...]}
shift
export JAX_COORDINATOR_ADDRESS="localhost:${PORT:-8476}" JAX_NUM_PROCESSES="$processes"

children=()
trap 'signalled=1; kill -TERM "${children[@]}" 2>/dev/null' INT TERM
for ((process = 0; process < processes; process++)); do
  CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-$process}" JAX_PROCESS_ID="$process" "${JAXLLM:-jaxllm}" "$@" &
  children+=($!)
done
# A trapped signal ends `wait` early, while the processes are still saving: wait again for their own exit codes.
code=0
for child in "${children[@]}"; do
  signalled=1
  while [ "$signalled" -eq 1 ]; do
    signalled=0
    wait "$child"
    status=$?
  done
  [ "$code" -eq 0 ] && code=$status
done
exit "$code"
