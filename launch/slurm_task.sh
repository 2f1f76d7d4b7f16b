#!/usr/bin/env bash
# One task of launch/slurm.sbatch, which has srun start it on each node or for each rank; not to be run by hand.
# It hands SIGUSR1 and SIGTERM on as SIGTERM, which torchrun hands on to its ranks and which ranks leave at.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export NODE_RANK=$SLURM_NODEID
if [[ "$LAUNCH" == torchrun ]]; then
  command=("$here/torchrun_multinode.sh")
else
  # shellcheck source=launch/env/gloo.sh
  source "$here/env/gloo.sh"
  # shellcheck source=launch/env/nccl.sh
  source "$here/env/nccl.sh"
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$RANKS_PER_NODE
  export MASTER_ADDR=$HEAD MASTER_PORT=$PORT
  export SLURM_NTASKS_PER_NODE=$RANKS_PER_NODE # Lightning wants to see it
  command=("${PYTHON:-python}" -m "${MODULE:-harness.train}")
fi

child="" again=1
trap 'again=1; kill -TERM "$child" 2> /dev/null || true' USR1 TERM
# Some SLURMs send a signal to every process below a task. SIGUSR1 would kill a torchrun, and a rank that has not come to
# its training yet; ignored, it stays so until a rank listens to it.
(
  trap '' USR1
  trap - TERM
  exec "${command[@]}" "$@"
) &
child=$!
code=0
while ((again)); do # a signal ends `wait` before the child has ended
  again=0 code=0
  wait "$child" || code=$?
done
if ((code < 0)); then # bash 5.2 loses the code of a child that ends while a signal comes: it was preempted
  code=75
fi
exit "$code"
