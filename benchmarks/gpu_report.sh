#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: tests the compiled kernels, measures, writes records and tables.
#
#     [COMMIT=...] [SECONDS_LEFT=525] benchmarks/gpu_report.sh OUT_DIR [PYTHON] [WHEELS]
#
# It ends within 9 minutes: a step has its own limit, and no more than what is left of SECONDS_LEFT. PYTHON (python3)
# has torch >= 2.6 and Triton >= 3.6; it is never changed. The kernels' steps import torch, triton and numpy alone, the
# tests pytest beside them, the training step transformers, pydantic, PyYAML and safetensors. What PYTHON lacks comes
# from WHEELS, a folder made beforehand, where there is a network, by
#
#     pip download -d WHEELS --only-binary=:all: --python-version 3.12 \
#         pytest pytest-xdist pydantic pyyaml safetensors transformers
#
# Of these only what PYTHON lacks is unpacked, without pip, into a folder that ends with the report: nothing of PYTHON's
# is replaced. liger-kernel or fla among them are measured as peers. COMMIT names what is measured where this folder
# is no git repository. A step whose packages are missing fails, says so in the log, and the others go on; the exit
# status is that of the worst. OUT_DIR gets, from each step as soon as it is there,
#   report.md       every step with its exit status, then the tables
#   log.txt         what the steps printed: the machine, the kernels' tests compiled, those of whole steps as CUDA
#                   graphs, compute-sanitizer on little tensors where there is one, and all that failed
#   kernels.jsonl   one record an operator and provider         kernels.md     the same as a table, with % of the floor
#   training.jsonl  one record a way of training                training.md    the same as a table
#   overhead.json   kinds of training by phase; four in one     sweep.jsonl    other block sizes
set -uo pipefail
: "${1:?usage: gpu_report.sh OUT_DIR [PYTHON] [WHEELS]}"
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
python=${2:-python3}
wheels=${3:+$(cd "$3" && pwd)} || exit 2
cd "$(dirname "$0")/.." || exit 2
commit=${COMMIT:-$(git rev-parse HEAD 2> /dev/null || echo unknown)}
left=${SECONDS_LEFT:-525}
work=$(mktemp -d)
packages=$work/site-packages
mkdir "$packages"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD:$packages PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
worst=0
rm -f "$out"/*.md "$out"/*.jsonl "$out/overhead.json" "$out/log.txt"
echo "| step | exit status | seconds |
|---|---|---|" > "$out/report.md"

step() {  # step NAME SECONDS COMMAND...; what it prints is in $work/NAME, and in log.txt
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    ((limit > left - SECONDS)) && limit=$((left - SECONDS))
    if ((limit > 0)); then  # interrupted, pytest still says what it found
        timeout -s INT -k 5 "$limit" "$@" > "$work/$name" 2>&1 || status=$?
    else
        limit=0 status=124
        echo "no time was left" > "$work/$name"
    fi
    printf '===== %s =====\n%s\n' "$name" "$(head -c 2000000 "$work/$name" | tr -d '\0')" >> "$out/log.txt"
    echo "| $name | $status | $((SECONDS - start)) of $limit |" | tee -a "$out/report.md"
    ((status > worst)) && worst=$status
    return 0
}

unpack='
import importlib.metadata, pathlib, re, sys, zipfile
def plain(name): return re.sub(r"[-_.]+", "-", name or "").lower()
there = {plain(d.metadata["Name"]) for d in importlib.metadata.distributions()}
wheels = sorted(pathlib.Path(sys.argv[1]).glob("*.whl"))
for wheel in wheels:
    if plain(wheel.name.split("-")[0]) not in there:
        zipfile.ZipFile(wheel).extractall(sys.argv[2])
        print("unpacked", wheel.name)
'
machine='
import importlib.util, platform, shutil, subprocess, sys
import torch, triton, numpy
print("commit", sys.argv[1])
query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm"
if shutil.which("nvidia-smi"):
    subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], check=False)
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__,
      "numpy", numpy.__version__, "cuda", torch.version.cuda)
for name in ("pytest", "xdist", "transformers", "pydantic", "yaml", "safetensors", "liger_kernel", "fla"):
    print(name, "there" if importlib.util.find_spec(name) else "missing")
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
'

[ -n "$wheels" ] &&
    step "packages" 60 "$python" -c "$unpack" "$wheels" "$packages"
step "machine" 60 "$python" -c "$machine" "$commit"  # the first import from a cold disk may take half of it
if ! grep -q "^fla " "$work/machine" || grep -q "torch sees no GPU" "$work/machine"; then
    cat "$work/machine"
    echo "no usable GPU, torch or Triton: nothing was measured" >&2
    exit 1
fi
# The C++ core serves the CPU alone: the GPU's numbers do not depend on it, and it is not built here.
# What other versions of other packages warn of is no error here, as it is in the project's own tests.
pytest=("$python" -W "ignore:e2e_fast._C is missing:RuntimeWarning" -m pytest -q -p no:cacheprovider
    -W default -W "ignore:e2e_fast._C is missing:RuntimeWarning")
parallel=()
grep -q "^xdist there" "$work/machine" && parallel=(-n 8)
step "kernels" 150 "$python" benchmarks/bench_kernels_gpu.py --commit "$commit" --out "$out"
step "tests" 130 "${pytest[@]}" "${parallel[@]}" --maxfail=40 --durations=10 \
    tests/kernels_triton --ignore-glob="*compile.py" --ignore-glob="*bench_gpu.py"  # which need no GPU
step "training" 150 "$python" benchmarks/bench_training_gpu.py --commit "$commit" --out "$out"
step "graphs" 90 "${pytest[@]}" -vv tests/test_cuda_graphs.py -m gpu
step "sweep" 45 "$python" benchmarks/bench_kernels_gpu.py --sweep --rep-ms 40 --commit "$commit" --out "$out"
if command -v compute-sanitizer > /dev/null; then
    step "sanitizer" 40 compute-sanitizer --tool memcheck --error-exitcode 99 \
        "$python" benchmarks/bench_kernels_gpu.py --tiny --rep-ms 1 --only code --out "$work/sanitized"
fi
for table in kernels.md training.md; do
    [ -f "$out/$table" ] && printf '\n' >> "$out/report.md" && cat "$out/$table" >> "$out/report.md"
done
tail -n 25 "$work/tests"
cat "$out/report.md"
exit "$worst"
