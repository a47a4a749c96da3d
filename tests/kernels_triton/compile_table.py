"""Every kernel × configuration compiled ahead of time for sm_80 and sm_90, no GPU needed: registers, spills, memory.

    python tests/kernels_triton/compile_table.py [--markdown]

prints one JSON object a line (or the table of docs/triton.md). Must run in a process without TRITON_INTERPRET.
"""

import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CAPABILITIES = {"sm_80": 80, "sm_90": 90}


@dataclass(frozen=True)
class Case:
    """One kernel with the argument types of one use; block sizes come from ``_launch.BLOCKS``."""

    module: str
    kernel: str
    use: str
    """What it is compiled for, in words."""
    arguments: dict[str, Any]
    """Name → Triton type (``*bf16``, ``i32``; ``i32:16``, a multiple of 16) or a constant (an argument 1 is one)."""
    dtype: str = "any"
    size: str = "any"
    matrix_units: bool = False
    may_spill: bool = False
    """float64 alone: only gradient checks use it, with block sizes chosen for float32."""

    @property
    def id(self) -> str:
        return f"{self.kernel}-{self.use}"


def _kl(**changes: Any) -> dict[str, Any]:
    arguments = {"student_ptr": "*fp32", "teacher_ptr": "*fp32", "bias_ptr": None, "loss_ptr": "*fp32"}
    arguments |= {"tile_ptr": "*bf16", "vocab": "i32", "stride": "i32:16", "softcap": None, "scale": "fp32"}
    return arguments | {"ACC": "fp32"} | changes


def _gather(weight: str, **changes: Any) -> dict[str, Any]:
    arguments = {"coefficients_ptr": "*fp32", "indices_ptr": "*i32", "weight_ptr": weight, "bias_ptr": "*fp32"}
    arguments |= {"scale_ptr": "*fp32", "out_ptr": weight, "K": "i32:16", "D": "i32:16", "POSITIVE": True}
    return arguments | {"ACC": "fp32"} | changes


SPANS = {"offsets_ptr": "*i64", "by_count_ptr": "*i64", "ranks_ptr": "*i64", "ends_ptr": "*i64"}
SPANS |= {"segment": "i32", "extra": "i32", "scale_ptr": "*fp32", "F": "i32:16", "D": "i32:16", "largest_scale": "fp32"}
SPANS |= dict.fromkeys(("dW_dec_ptr", "dW_enc_ptr", "db_enc_ptr"), "*fp32")
SPANS |= dict.fromkeys(("partial_a_ptr", "partial_e_ptr", "partial_db_ptr"), "*fp32")


def _backward(storage: str, D: int, **changes: Any) -> dict[str, Any]:
    arguments = {"order_ptr": "*i32", "values_ptr": "*fp32", "dvalues_ptr": "*fp32", "g_ptr": storage}
    arguments |= SPANS | {"W_dec_ptr": storage, "x_ptr": storage, "out_ptr": "*fp32", "K": "i32:16"}
    return arguments | {"ACC": "fp32", "BLOCK_D": D} | changes


def _segments(storage: str, D: int) -> dict[str, Any]:
    return SPANS | {"W_dec_ptr": storage, "ACC": "fp32", "BLOCK_D": D}


# Of a JumpReLU code's silent slots only their gradients are wanted.
DVALUES = dict.fromkeys(("x_ptr", "dW_dec_ptr", "dW_enc_ptr", "db_enc_ptr"))


SCORES: dict[str, Any] = {"z_ptr": "*fp32", "bias_ptr": "*fp32", "numbers_ptr": None, "listed_ptr": None}
SCORES |= {"F": "i32:16", "segments": 1, "slots": 1, "GROUP": 1}
"""Whole rows of scores."""
LISTED = {"bias_ptr": None, "numbers_ptr": "*i32", "listed_ptr": "*i32", "segments": "i32", "slots": "i32", "GROUP": 8}
"""Listed groups, as filter_gemm writes them."""


def _scan(capacity: int, **changes: Any) -> dict[str, Any]:
    arguments = SCORES | {"keys_ptr": "*i32", "columns_ptr": "*i32", "found_ptr": "*i32"}
    arguments |= dict.fromkeys(("row_errors_ptr", "row_norms_ptr", "norms_ptr", "errors_ptr"))
    return arguments | {"k": "i32", "BITS": 31, "ONLY_OVERFLOWED": False, "CAPACITY": capacity} | changes


SPREADS = dict.fromkeys(("row_errors_ptr", "row_norms_ptr", "norms_ptr", "errors_ptr"), "*fp32")
RESCORE = SCORES | dict.fromkeys(("x_ptr", "weight_ptr", "full_bias_ptr"), "*fp32")
RESCORE |= dict.fromkeys(("keys_ptr", "columns_ptr", "found_ptr"), "*i32") | {"D": "i32:16", "CAPACITY": 256}
ROUND = dict.fromkeys(("matrix_ptr", "norms_ptr", "errors_ptr"), "*fp32") | {"rounded_ptr": "*bf16"}


def _rank(capacity: int) -> dict[str, Any]:
    arguments = {"keys_ptr": "*i32", "columns_ptr": "*i32", "found_ptr": "*i32", "values_ptr": "*bf16"}
    arguments |= {"indices_ptr": "*i32", "count_ptr": "*i32", "k": "i32"}
    return arguments | {"VALUE": "fp32", "CAPACITY": capacity}


def _filter(threshold: str | None, one: bool = False) -> dict[str, Any]:
    arguments = SCORES | {"threshold_ptr": threshold, "values_ptr": "*bf16"}
    arguments |= {"indices_ptr": "*i32", "count_ptr": "*i32", "capacity": "i32"}
    return arguments | {"ONE_THRESHOLD": one}


def _adam(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {f"{name}_ptr": "*fp32" for name in ("param", "grad", "exp_avg", "exp_avg_sq", "clip")}
    arguments |= {"step_ptr": "*fp32", "lr_ptr": "*fp32"}
    arguments |= {"inverse_norms_ptr": "*fp32", "shadow_ptr": "*bf16", "D": "i32:16"}
    numbers = ("log_beta1", "log_beta2", "gain1", "beta2", "gain2", "eps", "weight_decay", "norm_eps")
    return arguments | dict.fromkeys(numbers, "fp32") | {"ACC": "fp32"} | changes


def _sweep(matrix: str, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"a_ptr": matrix, "b_ptr": matrix, "pairs_ptr": "*i32", "count_ptr": "*i64"}
    vectors = ("a_scale_ptr", "b_scale_ptr", "row_level_ptr", "col_level_ptr")
    arguments |= dict.fromkeys(vectors, "*fp32") | {"price_ptr": None, "ABSOLUTE": False}
    return arguments | {"rows": "i32", "width": "i32:16", "cols": "i32", "capacity": "i32"} | changes


def _in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    types = {"*fp32": "*fp64", "*bf16": "*fp64"}
    wide = {name: types.get(value, value) if isinstance(value, str) else value for name, value in arguments.items()}
    keys = {"keys_ptr": "*i64", "BITS": 63, "ACC": "fp64", "VALUE": "fp64"}
    return wide | {name: value for name, value in keys.items() if name in wide}


DUAL: dict[str, Any] = {"pair_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": None, "e_ptr": "*fp16"}
DUAL |= {"stats_ptr": "*fp32", "u_ptr": "*fp32", "loss_ptr": "*fp32", "parts_ptr": "*fp32", "difference_ptr": "*bf16"}
DUAL |= {"rows": "i32", "width": "i32:16", "vocab": "i32", "tiles": "i32", "scale": "fp32", "TILE": 128}
DUAL_F16 = DUAL | dict.fromkeys(("pair_ptr", "weight_ptr", "bias_ptr", "difference_ptr"), "*fp16")
"""Arguments of all kernels of linear_kl_dual: each takes those that it names."""

GEMM: dict[str, Any] = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*fp32", "floor_ptr": None}
GEMM |= dict.fromkeys(("row_errors_ptr", "row_norms_ptr", "norms_ptr", "errors_ptr", "maxima_ptr", "bounds_ptr"))
GEMM |= {"z_ptr": "*fp32"} | dict.fromkeys(("numbers_ptr", "found_ptr", "kept_ptr"), "*i32")
GEMM |= {"rows": "i32", "width": "i32:16", "F": "i32:16", "tiles": "i32", "slots": "i32", "ONE_FLOOR": False}
SAMPLE = GEMM | dict.fromkeys(("z_ptr", "numbers_ptr", "found_ptr", "kept_ptr")) | {"maxima_ptr": "*i32"}
BOUND = {"maxima_ptr": "*i32", "bounds_ptr": "*i32", "groups": "i32:16", "k": "i32", "margin": "i32:16"}

HISTOGRAM = SCORES | {"prefix_ptr": "*i64", "histogram_ptr": "*i64", "shift": "i32", "DIGIT_BITS": 8, "BINS": 256}

CASES = [
    Case("neighbours", "neighbours_kernel", "bf16", _sweep("*bf16"), "16", matrix_units=True),
    Case("neighbours", "neighbours_kernel", "int8", _sweep("*i8"), matrix_units=True),
    Case("neighbours", "neighbours_kernel", "f32", _sweep("*fp32"), "32"),
    Case("neighbours", "neighbours_kernel", "bf16 prices", _sweep("*bf16", price_ptr="*fp32"), "16", matrix_units=True),
    Case("linear_kl", "kl_rows_kernel", "bf16", _kl()),
    Case("linear_kl", "kl_rows_kernel", "bf16 bias softcap", _kl(bias_ptr="*bf16", softcap="fp32")),
    Case("linear_kl", "kl_rows_kernel", "f32 loss only", _kl(tile_ptr=None)),
    Case("linear_kl_dual", "kl_dual_kernel", "bf16", DUAL, "16", matrix_units=True),
    Case("linear_kl_dual", "kl_dual_kernel", "f16 bias", DUAL_F16, "16", matrix_units=True),
    Case("linear_kl_dual", "kl_dual_kernel", "bf16 loss only", DUAL | {"e_ptr": None}, "16", matrix_units=True),
    Case("linear_kl_dual", "kl_weights_kernel", "f32", DUAL, "16"),
    Case("linear_kl_dual", "kl_weights_kernel", "f32 loss only", DUAL | {"u_ptr": None}, "16"),
    Case("linear_kl_dual", "kl_combine_kernel", "bf16", DUAL, "16", matrix_units=True),
    Case("linear_kl_dual", "kl_combine_kernel", "f16", DUAL_F16, "16", matrix_units=True),
    Case("linear_kl_dual", "kl_difference_kernel", "bf16", DUAL, "16"),
    Case("linear_kl_dual", "kl_difference_kernel", "f16", DUAL_F16, "16"),
    Case("decode", "gather_rows_kernel", "bf16", _gather("*bf16"), dtype="16"),
    Case("decode", "gather_rows_kernel", "f32", _gather("*fp32"), dtype="32"),
    Case("decode", "gather_rows_kernel", "dx bf16", _gather("*bf16", POSITIVE=False, scale_ptr=None), dtype="16"),
    Case("autoencode", "code_backward_kernel", "bf16 d=768", _backward("*bf16", 1024), "16", "narrow"),
    Case("autoencode", "code_backward_kernel", "f32 d=768", _backward("*fp32", 1024), "32", "narrow"),
    Case(
        "autoencode", "code_backward_kernel", "bf16 d=768 dvalues", _backward("*bf16", 1024, **DVALUES), "16", "narrow"
    ),
    Case(
        "autoencode",
        "code_backward_kernel",
        "bf16 N·K ≥ 2³¹",
        _backward("*bf16", 1024, order_ptr="*i64"),
        "16",
        "narrow",
    ),
    Case("autoencode", "add_segments_kernel", "bf16 d=768", _segments("*bf16", 1024), "16", "narrow"),
    Case("autoencode", "add_segments_kernel", "f32 d=2304", _segments("*fp32", 4096), "32", "middle"),
    Case("autoencode", "add_segments_kernel", "bf16 d=8192", _segments("*bf16", 8192), "16", "wide"),
    Case("autoencode", "add_segments_kernel", "f64", _in_float64(_segments("*fp32", 64)), "32", "narrow"),
    Case("autoencode", "code_backward_kernel", "bf16 d=2304", _backward("*bf16", 4096), "16", "middle"),
    Case("autoencode", "code_backward_kernel", "bf16 d=8192", _backward("*bf16", 8192), "16", "wide"),
    Case("encode", "topk_scan_kernel", "f32 k≤64", _scan(128)),
    Case("encode", "topk_scan_kernel", "f32 no bias k≤1024", _scan(2048, bias_ptr=None)),
    Case("encode", "topk_scan_kernel", "screen k≤64", _scan(256, **SPREADS)),
    Case("encode", "topk_scan_kernel", "f32 overflowed rows k≤64", _scan(256, ONLY_OVERFLOWED=True)),
    Case("encode", "topk_scan_kernel", "lists k≤64", _scan(128, **LISTED)),
    Case("encode", "topk_scan_kernel", "lists screen k≤64", _scan(256, **LISTED, **SPREADS)),
    Case("filter_gemm", "filter_gemm_kernel", "bf16 relu", GEMM, "16", matrix_units=True),
    Case("filter_gemm", "filter_gemm_kernel", "bf16 jump_relu", GEMM | {"floor_ptr": "*fp32"}, "16", matrix_units=True),
    Case(
        "filter_gemm",
        "filter_gemm_kernel",
        "bf16 batch_topk",
        GEMM | {"floor_ptr": "*fp32", "ONE_FLOOR": True},
        "16",
        matrix_units=True,
    ),
    Case("filter_gemm", "filter_gemm_kernel", "bf16 topk", GEMM | {"bounds_ptr": "*i32"}, "16", matrix_units=True),
    Case(
        "filter_gemm",
        "filter_gemm_kernel",
        "bf16 screen",
        GEMM | {"bounds_ptr": "*i32"} | SPREADS,
        "16",
        matrix_units=True,
    ),
    Case("filter_gemm", "filter_gemm_kernel", "bf16 sample", SAMPLE, "16", matrix_units=True),
    Case("filter_gemm", "filter_gemm_kernel", "bf16 screen's sample", SAMPLE | SPREADS, "16", matrix_units=True),
    Case(
        "filter_gemm",
        "filter_gemm_kernel",
        "f16 relu",
        GEMM | {"x_ptr": "*fp16", "weight_ptr": "*fp16", "bias_ptr": None},
        "16",
        matrix_units=True,
    ),
    Case("filter_gemm", "row_bound_kernel", "k≤64", BOUND),
    Case("filter_gemm", "row_bound_kernel", "k=1", BOUND | {"k": 1}),
    Case("encode", "rescore_kernel", "k≤64", RESCORE),
    Case("encode", "rescore_kernel", "lists k≤64", RESCORE | LISTED),
    Case("encode", "round_rows_kernel", "f32", ROUND | {"D": "i32:16", "generous": "fp32"}),
    Case("encode", "topk_rank_kernel", "k≤64", _rank(128), size="narrow"),
    Case("encode", "topk_rank_kernel", "k≤256", _rank(512), size="middle"),
    Case("encode", "topk_rank_kernel", "k≤1024", _rank(2048), size="wide"),
    Case("encode", "filter_kernel", "relu", _filter(None)),
    Case("encode", "filter_kernel", "jump_relu", _filter("*fp32")),
    Case("encode", "filter_kernel", "batch_topk", _filter("*fp32", one=True)),
    Case("encode", "filter_kernel", "lists jump_relu", _filter("*fp32") | LISTED),
    Case("encode", "digit_histogram_kernel", "f32", HISTOGRAM),
    Case("encode", "digit_histogram_kernel", "lists", HISTOGRAM | LISTED),
    Case("adam", "adam_kernel", "f32 norms shadow", _adam()),
    Case("adam", "adam_kernel", "f32 plain", _adam(clip_ptr=None, inverse_norms_ptr=None, shadow_ptr=None)),
    Case("linear_kl", "kl_rows_kernel", "f64", _in_float64(_kl())),
    Case("decode", "gather_rows_kernel", "f64", _in_float64(_gather("*fp32")), "32"),
    Case(
        "autoencode", "code_backward_kernel", "f64", _in_float64(_backward("*fp32", 64)), "32", "narrow", may_spill=True
    ),
    Case("autoencode", "code_backward_kernel", "f32 K=1", _backward("*fp32", 1024, K=1), "32", "narrow"),
    Case("encode", "topk_scan_kernel", "f64", _in_float64(_scan(128))),
    Case("encode", "topk_scan_kernel", "f32 k=1", _scan(32, k=1)),
    Case("encode", "topk_rank_kernel", "f64", _in_float64(_rank(128)), size="narrow"),
    Case("encode", "filter_kernel", "f64", _in_float64(_filter("*fp32"))),
    Case("encode", "digit_histogram_kernel", "f64", _in_float64(HISTOGRAM)),
    Case("adam", "adam_kernel", "f64", _in_float64(_adam())),
]


def compile_case(case: Case, arch: str) -> dict[str, Any]:
    """What the compiler made of a case: registers, stack and spill instructions, shared memory, matrix instructions."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from e2e_fast.kernels.triton import _launch

    kernel = getattr(importlib.import_module(f"e2e_fast.kernels.triton.{case.module}"), case.kernel)
    options = dict(_launch.lookup(case.kernel.removesuffix("_kernel"), arch, case.dtype, case.size))
    launch = {name: options.pop(name) for name in list(options) if name.islower()}
    dtypes = {"fp32": tl.float32, "fp64": tl.float64}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, {**case.arguments, **options}[parameter.name]
        if parameter.is_constexpr or not isinstance(value, str):
            signature[name] = "constexpr"
            constants[name] = dtypes[value] if isinstance(value, str) else value
            continue
        signature[name], _, divisor = value.partition(":")
        if divisor or value.startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", CAPABILITIES[arch], 32), options=launch)
    return {
        "kernel": case.kernel,
        "use": case.use,
        "arch": arch,
        **options,
        "num_warps": launch["num_warps"],
        **_resources(binary.asm["cubin"]),
        "shared_bytes": binary.metadata.shared,
        "operands_in_registers": len(_REGISTER_OPERAND.findall(binary.asm["ptx"])),
    }


_REGISTER_OPERAND = re.compile(r"wgmma\.mma_async\.\S+\s*\{[^}]*\}\s*,\s*\{")
"""A Hopper product whose left operand is a list of registers instead of a descriptor of shared memory."""


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([_cuobjdump(), "-res-usage", str(file)]).stdout
        sass = run([_cuobjdump(), "-sass", str(file)]).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.partition("Function")[2]))
    return {
        "registers": int(found["REG"]),
        "stack_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "spill_instructions": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E(?:\.\w+)*\.128\b", sass)),
        "wgmma": len(re.findall(r"\b[HI]GMMA\b", sass)),
        "mma": len(re.findall(r"\b[HI]MMA\b", sass)),
    }


def _cuobjdump() -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else "cuobjdump"


def main() -> None:
    pairs = [(case, arch) for case in CASES for arch in CAPABILITIES]
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(compile_case, *zip(*pairs, strict=True)))
    if "--markdown" not in sys.argv:
        print(*map(json.dumps, rows), sep="\n")
        return
    print("| kernel | for | arch | blocks | warps | registers | shared B | spills | 16-byte loads | matrix instr. |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        sizes = ", ".join(f"{name} {value}" for name, value in row.items() if name.isupper())
        cells = [f"`{row['kernel']}`", row["use"], row["arch"], sizes, row["num_warps"], row["registers"]]
        cells += [row["shared_bytes"], row["stack_bytes"] + row["spill_instructions"], row["wide_loads"]]
        matrix = [f"{row[name]} {name}" for name in ("wgmma", "mma") if row[name]]
        print("|", " | ".join(map(str, [*cells, ", ".join(matrix)])), "|")


if __name__ == "__main__":
    main()
