# shellcheck shell=bash
# Environment of gloo, the collectives of CPU ranks, which NCCL jobs use for small objects too. The scripts in launch/
# read this file; source it before a launcher of your own. What is set already stays as it is.

# The network interface that ranks listen on. Gloo takes the one that the host's own name resolves to, which is often the
# loopback, and then the other nodes cannot reach it. Here: the interface of the route to the head node.
if [[ -z "${GLOO_SOCKET_IFNAME:-}" && -n "${HEAD:-}" ]] && command -v ip > /dev/null; then
  # the first address of a name; a route to an address of this host itself goes by "lo", so look for the address then
  head_address=$(getent ahostsv4 "$HEAD" | awk 'NR == 1 { print $1 }' || true)
  interface=$(ip -o route get "${head_address:-$HEAD}" 2> /dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' || true)
  if [[ "$interface" == lo ]]; then
    interface=$(ip -o -4 address show to "${head_address:-$HEAD}" 2> /dev/null | awk 'NR == 1 { print $2 }' || true)
  fi
  if [[ -n "$interface" ]]; then
    export GLOO_SOCKET_IFNAME="$interface"
  fi
  unset head_address interface
fi

# Threads of the operators of one rank. Unset, each rank takes all cores of the node and they slow each other down.
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  ranks_here=${RANKS_PER_NODE:-1}
  [[ "$ranks_here" =~ ^[0-9]+$ ]] || ranks_here=1
  threads=$(($(nproc) / ranks_here))
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
  unset ranks_here threads
fi

# Files that a process may have open. The process that keeps the store has a connection to each rank, and a rank of gloo
# to each other rank: with the usual 1024 a job of a thousand ranks cannot start.
open_files=$(ulimit -H -n)
if [[ "$open_files" == unlimited ]] || ((open_files > 65536)); then
  open_files=65536
fi
if [[ "$(ulimit -S -n)" != unlimited ]] && (($(ulimit -S -n) < open_files)); then
  ulimit -S -n "$open_files"
fi
unset open_files

# The launcher kills a rank that is stopped (SIGSTOP, a hung driver) some 15 s after the ranks that wait for it have
# given up: it cannot leave by itself, and would keep its node. See harness.distributed.failures.keep_alive.
export TORCHELASTIC_ENABLE_FILE_TIMER=${TORCHELASTIC_ENABLE_FILE_TIMER:-1}
