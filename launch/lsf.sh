#!/usr/bin/env bash
#BSUB -J harness
#BSUB -o lsf-%J.out
#BSUB -wa USR1
#BSUB -wt 2
#BSUB -r
#BSUB -Q 75
#
# Trains on the nodes of an LSF job. Options of bsub on the command line win over those above, and Hydra overrides are in
# the variable ARGS. Submit it from the folder that has launch/, on a file system that all nodes see:
#
#   ARGS='experiment=alloy trainer=multinode' bsub -nnodes 2 -W 24:00 < launch/lsf.sh                        # jsrun
#   ARGS='experiment=alloy' bsub -n 2 -R 'span[ptile=1]' -gpu num=4 -x -W 24:00 < launch/lsf.sh              # blaunch
#
# By default jsrun, or blaunch where there is none, starts one torchrun on each node, which starts a rank for each of its
# GPUs. With LAUNCH=jsrun there is no torchrun, and jsrun starts RANKS_PER_NODE ranks on each node.
#
# Time limit: two minutes before it (-wt 2, in minutes) LSF sends SIGUSR1; the ranks save within their step, the job ends
# with 75, and LSF puts a job with that code back into the queue (-Q 75). `bkill` ends it for good, with a checkpoint if
# JOB_TERMINATE_INTERVAL, 10 s on many sites, is long enough. A job whose host fails starts again (-r). Each start goes on
# where the same command was interrupted (resume=auto): LSF does not say that it is not the first.
#
# ARGS            Hydra overrides, in quotes as a shell takes them
# LAUNCH          torchrun (if not given) or jsrun
# RANKS_PER_NODE  with torchrun: a number, or "gpu" or "auto" (its GPUs, or one; if not given); with jsrun: a number
# MAX_RESTARTS    with torchrun: how often all ranks are started again after one has failed; 0 if not given
# HOSTS           of the ranks, the head first; those of the job if not given, without launch nodes where there is jsrun
# HEAD            address of the first of them, if its name is not that of the network that ranks are to use
# PORT            of the first node; made of the number of the job if not given
# LAUNCH_DIR      folder of the scripts; launch/ in the folder that the job was submitted from if not given
# TORCHRUN        command of torchrun; PYTHON: of Python, with LAUNCH=jsrun; MODULE: what they run (harness.train)
#
# The environment, such as `source .venv/bin/activate`, is that of the shell that calls bsub.
set -euo pipefail

export LAUNCH=${LAUNCH:-torchrun}
cd "${LS_SUBCWD:?run this script by bsub}"
export LAUNCH_DIR=${LAUNCH_DIR:-$LS_SUBCWD/launch}
if [[ ! -x "$LAUNCH_DIR/mpi_task.sh" ]]; then
  echo "$LAUNCH_DIR has no mpi_task.sh: submit from the folder that has launch/, or set LAUNCH_DIR" >&2
  exit 2
fi
# quotes as in a shell, and nothing else of one
mapfile -t words < <(xargs -r -n 1 printf '%s\n' <<< "${ARGS:-}")
set -- resume=auto ${words[@]+"${words[@]}"} "$@"

has_jsrun=0
if command -v jsrun > /dev/null; then
  has_jsrun=1
fi
if [[ -z "${HOSTS:-}" ]]; then
  HOSTS=$(awk '!seen[$1]++ { print $1 }' "$LSB_DJOB_HOSTFILE")
  if ((has_jsrun)); then # which does not start tasks where this script runs
    HOSTS=$(grep -Ev '^(batch|login|launch)' <<< "$HOSTS")
  fi
fi
read -r -a hosts <<< "${HOSTS//$'\n'/ }"
HOSTS="${hosts[*]}" HEAD=${HEAD:-${hosts[0]}} NODES=${#hosts[@]}
export HOSTS HEAD NODES PORT=${PORT:-$((10000 + (LSB_JOBID + ${LSB_JOBINDEX:-0}) % 20000))}
case "$LAUNCH" in
  torchrun)
    tasks_per_node=1
    # one second less than what is left until LSF kills the ranks; torchrun would do so after 30
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-119}
    ;;
  jsrun)
    if ((!has_jsrun)); then
      echo "LAUNCH=jsrun, but there is no jsrun on PATH: leave LAUNCH away" >&2
      exit 2
    fi
    if [[ ! "${RANKS_PER_NODE:-}" =~ ^[1-9][0-9]*$ ]]; then
      echo "LAUNCH=jsrun needs RANKS_PER_NODE, a number, found '${RANKS_PER_NODE:-}'" >&2
      exit 2
    fi
    export RANKS_PER_NODE
    tasks_per_node=$RANKS_PER_NODE
    ;;
  *)
    echo "LAUNCH is torchrun or jsrun, found '$LAUNCH'" >&2
    exit 2
    ;;
esac
if ((has_jsrun)); then
  # one set of resources on each host, with all that it has: each rank sees all GPUs and takes that of its number
  start=(jsrun --nrs "$NODES" --rs_per_host 1 --tasks_per_rs "$tasks_per_node" --cpu_per_rs ALL_CPUS
    --gpu_per_rs ALL_GPUS --bind none)
else
  start=(blaunch -z "$HOSTS")
fi
export STATE=$LS_SUBCWD/.harness-job-$LSB_JOBID-${LSB_JOBINDEX:-0}
rm -rf "$STATE"
mkdir "$STATE"

step="" told=0 ended=0 again=1
trap 'told=1 again=1; touch "$STATE/stop"' USR1
trap 'ended=1 again=1; touch "$STATE/stop"' INT TERM
(
  trap '' USR1 INT # LSF sends them to every process of the job; the tasks are told by a file
  exec "${start[@]}" "$LAUNCH_DIR/mpi_task.sh" "$@"
) &
step=$!
code=0
while ((again)); do # a signal ends `wait` before the step has ended
  again=0 code=0
  wait "$step" || code=$?
done
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

if ((code != 0 && !ended && told)); then
  code=75
fi
if ((ended && code == 75)); then # by bkill: 75 would put it back into the queue
  code=143
fi
if ((code == 75)); then
  echo "preempted: back into the queue"
fi
exit "$code"
