#!/usr/bin/env bash
# Trains across several nodes. Run it on each of them, with the same arguments, which are Hydra overrides:
#
#   HEAD=10.0.0.1 NODES=2 NODE_RANK=0 launch/torchrun_multinode.sh experiment=alloy      # on the node 10.0.0.1
#   HEAD=10.0.0.1 NODES=2 NODE_RANK=1 launch/torchrun_multinode.sh experiment=alloy      # on the other
#
# With a fixed number of nodes they meet by a static rendezvous, which ends by itself on every node when a host or link
# goes down. With NODES=MIN:MAX they meet by torchrun's c10d rendezvous: nodes may come and go, and the ranks are started
# again from the last checkpoint that the configuration names; but an agent whose link goes down for good may then wait
# until it is killed, so leave that to a scheduler's time limit.
#
# HEAD            address or name of the node that all others can reach: that of node rank 0
# NODES           number of nodes, or MIN:MAX
# NODE_RANK       0 on HEAD, 1, 2 ... on the others; not needed with MIN:MAX
# PORT            of the head node, the same on all; 29500 if not given
# JOB             name of the job, the same on all nodes, needed with MIN:MAX; "harness" if not given
# ADDRESS         address of this node that the others can reach; found by the route to HEAD if not given (MIN:MAX)
# RANKS_PER_NODE  ranks on this node: a number, or "gpu" or "auto"; one for each GPU, or one, if not given
# MAX_RESTARTS    how often the ranks are started again after one has failed; 0, and 3 with MIN:MAX, if not given
# TORCHRUN        command of torchrun; MODULE: what it runs (harness.train)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
HEAD=${HEAD:?set HEAD to the address of the first node, the same on all nodes}
NODES=${NODES:?set NODES to the number of nodes, or MIN:MAX}
PORT=${PORT:-29500}
RANKS_PER_NODE=${RANKS_PER_NODE:-auto}
# shellcheck source=launch/env/gloo.sh
source "$here/env/gloo.sh"
# shellcheck source=launch/env/nccl.sh
source "$here/env/nccl.sh"

if [[ "$NODES" =~ ^[0-9]+$ ]]; then
  NODE_RANK=${NODE_RANK:?set NODE_RANK to 0 on HEAD and to 1, 2 ... on the other nodes}
  meeting=(--nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$HEAD" --master-port "$PORT"
    --max-restarts "${MAX_RESTARTS:-0}")
elif [[ "$NODES" =~ ^[0-9]+:[0-9]+$ ]]; then
  # torchrun finds out by host names whether it is the head, and what address to give to the others; neither is sure
  address=${ADDRESS:-$(ip -o route get "$(getent ahostsv4 "$HEAD" | awk 'NR == 1 { print $1 }')" |
    sed -n 's/.* src \([^ ]*\).*/\1/p')}
  is_head=0
  if ip -o -4 address show to "$(getent ahostsv4 "$HEAD" | awk 'NR == 1 { print $1 }')" | grep -q .; then
    is_head=1
  fi
  meeting=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "${JOB:-harness}"
    --rdzv-conf "is_host=$is_head" --local-addr "$address" --max-restarts "${MAX_RESTARTS:-3}")
else
  echo "NODES is a number of nodes or MIN:MAX, found '$NODES'" >&2
  exit 2
fi

exec "${TORCHRUN:-torchrun}" "${meeting[@]}" --nproc-per-node "$RANKS_PER_NODE" -m "${MODULE:-harness.train}" "$@"
