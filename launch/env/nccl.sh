# shellcheck shell=bash
# Environment of NCCL, the collectives of GPU ranks. The scripts in launch/ read this file after gloo.sh; it does nothing
# on CPUs. What is set already stays as it is.

# The interface for NCCL's own rendezvous, and for data where there is no InfiniBand. The same as gloo's.
if [[ -z "${NCCL_SOCKET_IFNAME:-}" && -n "${GLOO_SOCKET_IFNAME:-}" ]]; then
  export NCCL_SOCKET_IFNAME="$GLOO_SOCKET_IFNAME"
fi

# After trainer.timeout the process ends, instead of waiting in a kernel for a rank that is gone. 3, the default of torch,
# ends the process without cleaning up the communicators, which can hang itself.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}

# What the last collectives were is written to a file when one times out, to find the rank that was late.
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}

# Warnings of NCCL, such as of a cable that is down; INFO also says which interfaces and rings it takes.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
