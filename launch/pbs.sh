#!/usr/bin/env bash
#PBS -N harness
#PBS -l select=1
#PBS -j oe
#PBS -r y
#
# Trains on the nodes of a PBS job. Options of qsub on the command line win over those above, and Hydra overrides are in
# the variable ARGS. Submit it from the folder that has launch/, on a file system that all nodes see:
#
#   ARGS='experiment=alloy trainer=multinode' qsub -V -l select=2:ncpus=32:ngpus=4 -l walltime=24:00:00 launch/pbs.sh
#
# By default mpiexec starts one torchrun on each node, which starts a rank for each of its GPUs. With LAUNCH=mpiexec there
# is no torchrun, and mpiexec starts RANKS_PER_NODE ranks on each node. mpiexec may be that of Open MPI, MPICH, Intel or
# PALS (Cray).
#
# Time limit: 120 s before it the ranks are told to leave; they save within their step, and the script asks PBS to put the
# job back into the queue (qrerun). Where users may not do that, it says so: submit the same command again. Pre-emption and
# `qdel`: PBS sends SIGTERM and kills what is left after kill_delay, 10 s on many sites; the ranks save if that is long
# enough. Each start goes on where the same command was interrupted (resume=auto): PBS does not say that it is not the first.
#
# ARGS            Hydra overrides, in quotes as a shell takes them
# LAUNCH          torchrun (if not given) or mpiexec
# RANKS_PER_NODE  with torchrun: a number, or "gpu" or "auto" (its GPUs, or one; if not given); with mpiexec: a number
# MAX_RESTARTS    with torchrun: how often all ranks are started again after one has failed; 0 if not given
# SAVE_BEFORE     seconds before the time limit; 120 if not given. WALLTIME: seconds; asked of qstat if not given
# HEAD            address of the first node, if its name is not that of the network that ranks are to use
# PORT            of the first node; made of the name of the job if not given
# MPIEXEC         command; mpiexec if not given. MPIEXEC_OPTIONS: further ones, such as "--cpu-bind none" for PALS
# LAUNCH_DIR      folder of the scripts; launch/ in the folder that the job was submitted from if not given
# TORCHRUN        command of torchrun; PYTHON: of Python, with LAUNCH=mpiexec; MODULE: what they run (harness.train)
#
# The environment, such as `source .venv/bin/activate`, is that of the shell that calls qsub, by its option -V.
set -euo pipefail

export LAUNCH=${LAUNCH:-torchrun}
cd "${PBS_O_WORKDIR:?run this script by qsub}"
export LAUNCH_DIR=${LAUNCH_DIR:-$PBS_O_WORKDIR/launch}
if [[ ! -x "$LAUNCH_DIR/mpi_task.sh" ]]; then
  echo "$LAUNCH_DIR has no mpi_task.sh: submit from the folder that has launch/, or set LAUNCH_DIR" >&2
  exit 2
fi
# quotes as in a shell, and nothing else of one
mapfile -t words < <(xargs -r -n 1 printf '%s\n' <<< "${ARGS:-}")
set -- resume=auto ${words[@]+"${words[@]}"} "$@"

HOSTS=$(awk '!seen[$1]++ { print $1 }' "$PBS_NODEFILE")
NODES=$(wc -l <<< "$HOSTS")
HEAD=${HEAD:-$(head -n 1 <<< "$HOSTS")}
number=$(cksum <<< "$PBS_JOBID" | cut -d ' ' -f 1) # jobs of an array differ by their index alone
export HOSTS HEAD NODES PORT=${PORT:-$((10000 + number % 20000))}
case "$LAUNCH" in
  torchrun)
    tasks_per_node=1
    # one second less than what is left until PBS kills the ranks; torchrun would do so after 30
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-119}
    ;;
  mpiexec)
    if [[ ! "${RANKS_PER_NODE:-}" =~ ^[1-9][0-9]*$ ]]; then
      echo "LAUNCH=mpiexec needs RANKS_PER_NODE, a number, found '${RANKS_PER_NODE:-}'" >&2
      exit 2
    fi
    export RANKS_PER_NODE
    tasks_per_node=$RANKS_PER_NODE
    ;;
  *)
    echo "LAUNCH is torchrun or mpiexec, found '$LAUNCH'" >&2
    exit 2
    ;;
esac
MPIEXEC=${MPIEXEC:-mpiexec}
layout=(-n $((NODES * tasks_per_node)))
if "$MPIEXEC" --version 2>&1 | grep -Eq "Open MPI|OpenRTE|open-mpi.org"; then
  layout+=(--map-by "ppr:$tasks_per_node:node" --bind-to none)
else
  layout+=(-ppn "$tasks_per_node")
fi
read -r -a further <<< "${MPIEXEC_OPTIONS:-}"

export STATE=$PBS_O_WORKDIR/.harness-job-${PBS_JOBID//[^0-9A-Za-z]/-}
rm -rf "$STATE"
mkdir "$STATE"
if [[ "${layout[*]}" == *ppr:* ]]; then # other nodes get only those variables from Open MPI that are named
  while read -r name; do
    layout+=(-x "$name")
  done < <(compgen -e | grep -Ev '^(OMPI_|PMIX_|PRTE_|BASH_FUNC|HOSTNAME$|_$)')
fi

step="" timer="" told=0 ended=0 again=1
trap 'told=1 again=1; touch "$STATE/stop"' USR1
trap 'ended=1 again=1; touch "$STATE/stop"' TERM
WALLTIME=${WALLTIME:-$(qstat -f "$PBS_JOBID" 2> /dev/null |
  awk '/Resource_List.walltime/ { n = split($3, part, ":"); for (i = 1; i <= n; i++) s = 60 * s + part[i]; print s }')}
if [[ -n "$WALLTIME" ]]; then
  rest=$((WALLTIME - ${SAVE_BEFORE:-120}))
  (
    trap 'kill "$waiting" 2> /dev/null; exit 0' TERM
    sleep "$((rest > 0 ? rest : 0))" &
    waiting=$!
    wait "$waiting"
    kill -USR1 $$
  ) > /dev/null 2>&1 &
  timer=$!
fi

(
  trap '' USR1 # to the script and its tasks; mpiexec itself has nothing to do
  exec "$MPIEXEC" "${layout[@]}" ${further[@]+"${further[@]}"} "$LAUNCH_DIR/mpi_task.sh" "$@"
) &
step=$!
code=0
while ((again)); do # a signal ends `wait` before the step has ended
  again=0 code=0
  wait "$step" || code=$?
done
if [[ -n "$timer" ]]; then
  kill "$timer" 2> /dev/null || true
fi
# of the tasks, each in a file of its own
missing=$((NODES * tasks_per_node))
for file in "$STATE"/code.*; do
  [[ -e "$file" ]] || continue
  missing=$((missing - 1))
  of_task=$(< "$file")
  if ((of_task != 0 && (code == 0 || of_task != 75))); then # an error counts for more than a preemption
    code=$of_task
  fi
done
if ((code == 0 && missing > 0)); then
  echo "$missing task(s) have ended without a word" >&2
  code=1
fi
rm -rf "$STATE"

if ((code != 0 && !ended && (told || code == 75))); then
  echo "preempted: back into the queue"
  if ! qrerun "$PBS_JOBID"; then
    echo "PBS does not let this user put a job back: submit the same command again, it goes on from its checkpoint" >&2
  fi
  code=75
fi
exit "$code"
