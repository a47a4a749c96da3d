"""Speed of exact matching: time, CPU seconds, memory, and how far from the floor of one sweep.

    python benchmarks/bench_matching.py                                   # 10,000: int8, bfloat16, float32, and SciPy
    python benchmarks/bench_matching.py --sizes 40960 131072 --families planted --precisions int8 --no-scipy
    python benchmarks/bench_matching.py --plot docs/matching_scaling.png  # from the records, measures nothing

Each run is a process of its own, checked to be certified (and equal to SciPy's total where that runs), then appended
to ``benchmarks/results/matching.jsonl``. The floor is the time of one multiplication of all pairs at the throughput
that the same sweep kernel reaches on a cache-sized problem in the same process; ``cpu_floor`` is the same in CPU
seconds, which a busy machine distorts less.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "matching.jsonl"


def dictionaries(family: str, n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 dictionaries (n, d): random directions, half planted twins, or clusters with surplus and twins."""
    generator = torch.Generator().manual_seed(seed)

    def directions(rows: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, d, generator=generator), dim=1)

    if family == "clustered":
        k = max(2, n // 40)
        spectrum = 1 / torch.sqrt(1 + 8 * torch.arange(d) / d)
        weight = torch.arange(1, k + 1) ** -0.8
        centres = torch.nn.functional.normalize(directions(k) * spectrum, dim=1)

        def side() -> torch.Tensor:
            order = torch.randperm(k, generator=generator)
            label = order[torch.multinomial(weight, n, replacement=True, generator=generator)]
            noise = torch.nn.functional.normalize(directions(n) * spectrum, dim=1)
            return torch.nn.functional.normalize(0.65 * centres[label] + 0.76 * noise, dim=1)

        A, B = side(), side()
    else:
        A, B = directions(n), directions(n)
    if family != "random":
        half = n // 2
        cosine = torch.rand(half, 1, generator=generator) * 0.39 + 0.6
        twins = cosine * A[torch.randperm(n, generator=generator)[:half]] + (1 - cosine**2).sqrt() * directions(half)
        B[torch.randperm(n, generator=generator)[:half]] = torch.nn.functional.normalize(twins, dim=1)
    return A, B


def floor_rate(precision: str, d: int) -> tuple[float, float]:
    """FLOP a second of the sweep's own kernel, by the wall clock and by CPU time, on a problem that fits the caches."""
    from e2e_fast.kernels import neighbours as nb

    x = torch.randn(2048, d)
    q = nb.quantize(x, precision)
    level = torch.full((2048,), 2.0)
    best_wall = best_cpu = 0.0
    for _ in range(7):
        wall, cpu = time.perf_counter(), time.process_time()
        nb.sweep(q, q, level, row_cap=1)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        best_wall, best_cpu = max(best_wall, 2 * 2048**2 * d / wall), max(best_cpu, 2 * 2048**2 * d / cpu)
    return best_wall, best_cpu


def measure(family: str, n: int, d: int, precision: str, threads: int, scipy: bool) -> dict[str, Any]:
    """One certified matching, measured in this process."""
    from e2e_fast.compare import match_dictionaries

    torch.set_num_threads(threads)
    A, B = dictionaries(family, n, d)
    warm = dictionaries("random", 300, d)
    match_dictionaries(*warm, precision=precision)
    rate, cpu_rate = floor_rate(precision, d)
    base = _peak_gb(reset=True)
    wall, cpu = time.perf_counter(), time.process_time()
    m = match_dictionaries(A, B, precision=precision)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = _peak_gb()
    assert m.certified, f"not certified: gap {m.gap}"
    flop = 2 * n * n * d
    record: dict[str, Any] = {
        "family": family, "n": n, "d": d, "precision": precision, "threads": threads,
        "seconds": wall, "cpu_seconds": cpu, "floor_seconds": flop / rate, "cpu_floor": flop / cpu_rate,
        "of_floor": flop / rate / wall, "of_cpu_floor": flop / cpu_rate / cpu,
        "gb_over_inputs": peak - base, "mean": m.mean, "total": m.total, "gap": m.gap, "stats": m.stats,
    }  # fmt: skip
    if scipy:
        from scipy.optimize import linear_sum_assignment

        wall, cpu = time.perf_counter(), time.process_time()
        a, b = (torch.nn.functional.normalize(x.double(), dim=1).numpy() for x in (A, B))
        S = a @ b.T
        product = time.perf_counter() - wall
        rows, cols = linear_sum_assignment(S, maximize=True)
        record["scipy_seconds"], record["scipy_cpu_seconds"] = time.perf_counter() - wall, time.process_time() - cpu
        record["scipy_product_seconds"] = product
        record["speedup"] = record["scipy_seconds"] / record["seconds"]
        record["cpu_speedup"] = record["scipy_cpu_seconds"] / record["cpu_seconds"]
        assert abs(S[rows, cols].sum() - m.total) <= 1e-9 * max(1.0, n / 1000), "total differs from SciPy's"
    try:
        from lap import lapjvs  # pyright: ignore[reportMissingImports]  # the package is called lapx
    except ImportError:
        record["lapx"] = "not installed"
    else:
        if scipy:
            wall = time.perf_counter()
            lapjvs(-(A @ B.T).numpy())
            record["lapx_seconds"] = time.perf_counter() - wall
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000])
    parser.add_argument("--families", nargs="+", default=["planted"], choices=["random", "planted", "clustered"])
    parser.add_argument("--precisions", nargs="+", default=["int8", "bfloat16", "float32"])
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--scipy-up-to", type=int, default=10_000, help="largest n that SciPy is run at")
    parser.add_argument("--no-scipy", action="store_true")
    parser.add_argument("--plot", type=Path, help="draw the records' scaling to this file and stop")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(**json.loads(arguments.worker))))
        return
    if arguments.plot:
        plot(arguments.plot)
        return
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    for n in arguments.sizes:
        for family in arguments.families:
            for index, precision in enumerate(arguments.precisions):
                scipy = index == 0 and n <= arguments.scipy_up_to and not arguments.no_scipy
                task = {
                    "family": family, "n": n, "d": arguments.d, "precision": precision,
                    "threads": arguments.threads, "scipy": scipy,
                }  # fmt: skip
                for _ in range(arguments.repeats):
                    _run(task)


def _run(task: dict[str, Any]) -> None:
    load = os.getloadavg()[0]
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=_environment()).stdout
    record = json.loads(output) | _circumstances() | {"load_before": load}
    with RECORDS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    scipy = f" · SciPy {record['scipy_seconds']:.1f} s: ×{record['speedup']:.1f}" if "speedup" in record else ""
    print(
        f"{record['n']:>7,} {record['family']:<9} {record['precision']:<8} {record['seconds']:7.2f} s"
        f" (floor {record['floor_seconds']:.2f}) · CPU {record['cpu_seconds']:.2f} s (floor {record['cpu_floor']:.2f},"
        f" {100 * record['of_cpu_floor']:.0f} %) · +{record['gb_over_inputs']:.2f} GB · gap {record['gap']:.0e}{scipy}",
        flush=True,
    )


def plot(path: Path) -> None:
    """CPU seconds against n for the planted family at d = 768, with the floor of one sweep, from the records."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    figure = Figure(figsize=(7.0, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for precision, colour in (("int8", "#3b6ea5"), ("bfloat16", "#d07a1f"), ("float32", "#4f8a4f")):
        chosen = [r for r in records if r["family"] == "planted" and r["d"] == 768 and r["precision"] == precision]
        sizes = sorted({r["n"] for r in chosen})
        if not sizes:
            continue
        at = {n: [r for r in chosen if r["n"] == n] for n in sizes}
        axes.plot(
            sizes, [np.median([r["cpu_seconds"] for r in at[n]]) for n in sizes], "o-", color=colour,
            label=f"matching, {precision} sweeps",
        )  # fmt: skip
        axes.plot(
            sizes, [np.median([r["cpu_floor"] for r in at[n]]) for n in sizes], ":", color=colour, linewidth=1.2,
            label=f"one {precision} product of all pairs",
        )  # fmt: skip
        if precision == "int8":
            solver = [np.median([r["stats"]["cpu_seconds"]["solve"] for r in at[n]]) for n in sizes]
            axes.plot(sizes, solver, "s--", color="0.4", markersize=4, label="of it the sparse solver")
    dense = sorted(
        (r["n"], r["scipy_cpu_seconds"])
        for r in records
        if "scipy_seconds" in r and r["family"] == "planted" and r["d"] == 768
    )
    if dense:
        axes.plot(*zip(*dense, strict=True), "x-", color="0.1", label="SciPy, dense float64")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks := sorted({r["n"] for r in records if r["family"] == "planted"}), [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("features a side (half planted, d = 768)")
    axes.set_ylabel("CPU seconds")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _peak_gb(reset: bool = False) -> float:
    """Peak resident memory since the last reset (Linux), in 1e9 bytes; with `reset`, the current size."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    key = "VmRSS:" if reset else "VmHWM:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e9


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)}


def _circumstances() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return {
        "commit": commit.strip(), "when": datetime.now(UTC).isoformat(timespec="seconds"), "cpu": model,
        "cpus": os.cpu_count(), "torch": torch.__version__, "numpy": np.__version__,
    }  # fmt: skip


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
