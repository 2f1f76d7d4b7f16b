#!/usr/bin/env bash
# Trains on the ranks of one node. Arguments are Hydra overrides.
#
#   launch/torchrun.sh experiment=alloy                       # a rank for each GPU, or one on CPUs
#   RANKS_PER_NODE=4 launch/torchrun.sh experiment=alloy
#
# RANKS_PER_NODE  ranks: a number, or "gpu" or "auto" as torchrun takes them; the GPUs of the node if not given
# MAX_RESTARTS    how often all ranks are started again after one has failed; 0 if not given
# TORCHRUN        command of torchrun; MODULE: what it runs (harness.train)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
RANKS_PER_NODE=${RANKS_PER_NODE:-auto}
# shellcheck source=launch/env/gloo.sh
source "$here/env/gloo.sh"
# shellcheck source=launch/env/nccl.sh
source "$here/env/nccl.sh"

exec "${TORCHRUN:-torchrun}" --standalone \
  --nproc-per-node "$RANKS_PER_NODE" --max-restarts "${MAX_RESTARTS:-0}" \
  -m "${MODULE:-harness.train}" "$@"
