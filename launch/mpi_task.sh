#!/usr/bin/env bash
# One task of launch/pbs.sh or launch/lsf.sh, which have it started on each node or for each rank; not to be run by hand.
# It ends with 0, whatever its command ends with: many launchers kill all other tasks at the first that fails, and a rank
# might still be writing a checkpoint. The code goes to a file of the folder $STATE, and the file "stop" in it asks the
# task to leave: not every launcher hands signals on.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# whichever has started it; blaunch has no numbers, and starts one task on each host
number=${PALS_RANKID:-${JSM_NAMESPACE_RANK:-${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-${PMI_RANK:-}}}}}
if [[ -z "$number" ]]; then
  own=$(hostname)
  number=0
  for host in $HOSTS; do
    [[ "${host%%.*}" == "${own%%.*}" ]] && break
    number=$((number + 1))
  done
fi
if [[ "$LAUNCH" == torchrun ]]; then
  export NODE_RANK=$number
  command=("$here/torchrun_multinode.sh")
else
  # shellcheck source=launch/env/gloo.sh
  source "$here/env/gloo.sh"
  # shellcheck source=launch/env/nccl.sh
  source "$here/env/nccl.sh"
  export MASTER_ADDR=$HEAD MASTER_PORT=$PORT # the ranks themselves are known by the variables of the launcher
  command=("${PYTHON:-python}" -m "${MODULE:-harness.train}")
fi

child="" again=1 told=0
tell() {
  again=1 told=1
  kill -TERM "$child" 2> /dev/null || true
}
trap tell USR1 TERM
# a signal to all processes of the job would kill a rank that has not come to its training yet; ignored, it stays so
# until a rank listens to it
(
  trap '' USR1
  trap - TERM
  exec "${command[@]}" "$@"
) &
child=$!
(
  trap '' USR1
  trap 'exit 0' TERM
  while [[ ! -e "$STATE/stop" ]]; do
    kill -0 $$ 2> /dev/null || exit 0 # this task was killed
    sleep 1
  done
  kill -TERM $$ 2> /dev/null || true
) > /dev/null 2>&1 &
watch=$!
code=0
while ((again)); do # a signal ends `wait` before the child has ended
  again=0 code=0
  wait "$child" || code=$?
done
kill "$watch" 2> /dev/null || true
if ((code < 0)); then # bash 5.2 loses the code of a child that ends while a signal comes: it was preempted
  code=75
fi
# torchrun ends with 1 whatever its ranks end with
if ((told && code == 1)); then
  code=75
fi
echo "$code" > "$STATE/code.$number"
