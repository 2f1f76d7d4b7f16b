#!/usr/bin/env bash
# Everything that only a GPU can show, in one Markdown file; installs nothing. See docs/performance.md.
#
#   benchmarks/gpu.sh [--output FILE] [--device cuda|cpu] [--only SECTION ...]
#   benchmarks/gpu.sh --collect [FOLDER [PYTHON_VERSION]]   # where there is a package index: wheels of what may be missing
#
# Needs torch, lightning, torchmetrics and torch_geometric; e3nn for NequIP. Other packages are taken from FOLDER
# (build/wheels unless WHEELS names another) where the machine has none. PYTHON names the interpreter, python3 if unset.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}

collect() {
  local folder=$1 version=$2 group
  # of the package and the tests; then of NequIP, and of MACE, whose e3nn NequIP does not take
  local -A groups=(
    [common]="ase hydra-core omegaconf vesin filelock hypothesis sortedcontainers pytest pluggy iniconfig pytest-timeout"
    [nequip]="nequip matscipy lmdb e3nn opt-einsum-fx"
    [mace]="mace-torch e3nn==0.4.4 matscipy lmdb opt-einsum-fx torch-ema prettytable wcwidth ConfigArgParse orjson
      GitPython gitdb smmap"
  )
  local platforms=()
  for number in 17 24 27 28 31 34; do platforms+=(--platform "manylinux_2_${number}_x86_64"); done
  for group in "${!groups[@]}"; do
    # shellcheck disable=SC2086 # a list of names
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
      --constraint "$here/../constraints.txt" \
      "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$folder/$group" ${groups[$group]}
  done
  # the two that have no wheel in the index, of pure Python
  "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/common" antlr4-python3-runtime==4.9.3
  "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/mace" python-hostlist
  du -sh "$folder"
}

wheels=${WHEELS:-$here/../build/wheels}
if [[ ${1:-} == --collect ]]; then
  collect "${2:-$wheels}" "${3:-3.12}"
  exit
fi
exec "$python" "$here/gpu/report.py" --wheels "$wheels" "$@"
