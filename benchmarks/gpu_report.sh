#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: tests the compiled kernels, measures, writes records and tables.
#
#     benchmarks/gpu_report.sh OUT_DIR [PYTHON] [WHEELS]
#
# Its steps' time limits add up to less than 9 minutes. PYTHON (python3) has torch >= 2.6 and Triton >= 3.6; it is never
# changed. The kernels' steps import torch, triton and numpy alone, the tests pytest beside them, the training step
# transformers, pydantic, PyYAML and safetensors. What PYTHON lacks comes from WHEELS, a folder made beforehand, where
# there is a network, by
#
#     pip download -d WHEELS --only-binary=:all: --python-version 3.12 pytest pydantic pyyaml safetensors transformers
#
# which is installed offline beside PYTHON's packages, in an environment of its own under OUT_DIR; liger-kernel or fla in
# it are measured as peers. A step whose packages are missing fails, says so in its file, and the others go on; the exit
# status is that of the worst. OUT_DIR gets
#   machine.txt     GPU, driver, versions, commit, packages     tests.txt      the kernels' tests, compiled
#   kernels.jsonl   one record an operator and provider         kernels.md     the same as a table, with % of the floor
#   training.jsonl  one record a way of training                training.md    the same as a table
#   overhead.json   local, e2e, e2e+downstream, by phase        sweep.jsonl    other block sizes
#   graphs.txt      the tests of whole steps as CUDA graphs
#   sanitizer.txt   compute-sanitizer on little tensors, where there is one
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu_report.sh OUT_DIR [PYTHON] [WHEELS]}" && cd "$1" && pwd)
python=${2:-python3}
wheels=${3:+$(cd "$3" && pwd)}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
worst=0

step() {  # step NAME SECONDS FILE COMMAND...
    local name=$1 limit=$2 file=$3 start=$SECONDS status=0
    shift 3
    timeout -k 5 "$limit" "$@" > "$out/$file" 2>&1 || status=$?
    echo "$name: exit $status after $((SECONDS - start)) s ($file)"
    ((status > worst)) && worst=$status
    return 0
}

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
    git rev-parse HEAD
    "$python" - <<'EOF'
import importlib.util, sys
import torch, triton, numpy
print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__,
      "cuda", torch.version.cuda)
for name in ("pytest", "transformers", "pydantic", "yaml", "safetensors", "liger_kernel", "fla"):
    print(name, "there" if importlib.util.find_spec(name) else "missing")
assert torch.cuda.is_available(), "torch sees no GPU"
EOF
}

packages() {
    "$python" -m venv --system-site-packages "$out/environment" &&
        "$out/environment/bin/python" -m pip install -q --no-index --no-deps "$wheels"/*.whl
}

if [ -n "$wheels" ]; then
    step "packages" 40 packages.txt bash -c "$(declare -f packages); python=$python out=$out wheels=$wheels; packages"
    [ -x "$out/environment/bin/python" ] && python=$out/environment/bin/python
fi
step "machine" 25 machine.txt bash -c "$(declare -f machine); python=$python; machine"
if ! grep -q "^safetensors" "$out/machine.txt" || grep -q "torch sees no GPU" "$out/machine.txt"; then
    cat "$out/machine.txt"
    echo "no usable GPU, torch or Triton: nothing was measured" >&2
    exit 1
fi
# The C++ core serves the CPU alone: the GPU's numbers do not depend on it, and it is not built here.
step "kernels" 140 kernels.txt "$python" benchmarks/bench_kernels_gpu.py --out "$out"
step "training" 95 training.txt "$python" benchmarks/bench_training_gpu.py --out "$out"
step "tests" 130 tests.txt "$python" -m pytest -q --maxfail=20 -p no:cacheprovider tests/kernels_triton
step "graphs" 35 graphs.txt "$python" -m pytest -q -p no:cacheprovider tests/test_cuda_graphs.py -m gpu
step "sweep" 35 sweep.txt "$python" benchmarks/bench_kernels_gpu.py --sweep --rep-ms 40 --out "$out"
if command -v compute-sanitizer > /dev/null; then
    step "sanitizer" 30 sanitizer.txt compute-sanitizer --tool memcheck --error-exitcode 99 \
        "$python" benchmarks/bench_kernels_gpu.py --tiny --rep-ms 1 --only code --out "$out/sanitizer"
fi
for table in kernels.md training.md; do
    test -f "$out/$table" && cat "$out/$table"
done
tail -n 25 "$out/tests.txt"
exit "$worst"
