#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: builds, tests the compiled kernels, measures, writes records and a table.
#
#     benchmarks/gpu_report.sh OUT_DIR [PYTHON]
#
# Takes under 9 minutes on one GPU, with whatever torch ≥ 2.6 and Triton ≥ 3.6 PYTHON (python3) has. Every step runs
# even when one before it failed; the exit status is that of the worst. OUT_DIR gets:
#   machine.txt     GPU, driver, versions, commit          tests.txt       the GPU tests
#   kernels.jsonl   one record an operator and provider    kernels.md      the same as a table
#   sweep.jsonl     other block sizes                      compile.md      registers, spills, shared memory
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu_report.sh OUT_DIR [PYTHON]}" && cd "$1" && pwd)
python=${2:-python3}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
unset TRITON_INTERPRET
worst=0

step() {  # step NAME SECONDS FILE COMMAND...
    local name=$1 limit=$2 file=$3 start=$SECONDS status=0
    shift 3
    timeout "$limit" "$@" > "$out/$file" 2>&1 || status=$?
    echo "$name: exit $status after $((SECONDS - start)) s ($file)"
    ((status > worst)) && worst=$status
    return 0
}

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
    git rev-parse HEAD
    "$python" -c 'import torch, triton, numpy; print("torch", torch.__version__, "triton", triton.__version__, "numpy",
numpy.__version__, "cuda", torch.version.cuda); assert torch.cuda.is_available(), "torch sees no GPU"'
}

step "machine" 60 machine.txt bash -c "$(declare -f machine); python=$python; machine"
if ((worst)); then
    cat "$out/machine.txt"
    echo "no usable GPU, torch or Triton: nothing was measured" >&2
    exit "$worst"
fi
# The C++ core serves the CPU alone; the kernels are measured with or without it.
step "build" 60 build.txt "$python" setup.py build_ext --inplace
step "benchmark" 180 benchmark.txt "$python" benchmarks/bench_kernels_gpu.py --out "$out"
step "tests" 150 tests.txt "$python" -m pytest -q --maxfail=20 tests/kernels_triton
step "sweep" 75 sweep.txt "$python" benchmarks/bench_kernels_gpu.py --sweep --rep-ms 50 --out "$out"
step "compile table" 60 compile.md "$python" tests/kernels_triton/compile_table.py --markdown
test -f "$out/kernels.md" && cat "$out/kernels.md"
tail -n 25 "$out/tests.txt"
exit "$worst"
