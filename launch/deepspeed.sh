#!/usr/bin/env bash
# Trains with DeepSpeed's ZeRO on the GPUs of one node, or of several. Arguments are Hydra overrides.
#
#   launch/deepspeed.sh experiment=alloy                                             # ZeRO 2 on the GPUs of this node
#   STAGE=3 launch/deepspeed.sh experiment=alloy
#   HEAD=10.0.0.1 NODES=2 NODE_RANK=0 launch/deepspeed.sh experiment=alloy           # on each node, with its rank
#
# It needs CUDA and the extra potential-harness[deepspeed]. torchrun starts the ranks, not the program `deepspeed`: that
# adds an argument --local_rank which is no Hydra override, reaches other nodes by ssh, and neither restarts ranks nor keeps
# the store by which ranks agree and report faults. DeepSpeed itself does not mind who has started it.
#
# STAGE           what is split over the ranks: 1 optimizer states, 2 gradients too (if not given), 3 parameters too
# HEAD            set for several nodes; this and all other variables are those of torchrun.sh or torchrun_multinode.sh
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGE=${STAGE:-2}
if [[ ! "$STAGE" =~ ^[123]$ ]]; then
  echo "STAGE is 1, 2 or 3, found '$STAGE'" >&2
  exit 2
fi
for tool in g++ ninja; do # DeepSpeed compiles a small operation on its first use
  if ! command -v "$tool" > /dev/null; then
    echo "DeepSpeed needs $tool on PATH: g++ of the system; ninja comes with deepspeed, in bin/ of its environment" >&2
    exit 2
  fi
done

script=torchrun.sh
if [[ -n "${HEAD:-}" ]]; then
  script=torchrun_multinode.sh
fi
exec "$here/$script" "strategy=deepspeed_zero$STAGE" "$@"
