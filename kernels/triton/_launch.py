"""What every launch shares: block sizes, dtypes, matrix products with float32 results, and the current device.

Block sizes are data: ``BLOCKS[kernel][arch, dtype, size]``, where arch is ``sm_80``, ``sm_90`` or ``interpreter``,
dtype is ``16`` or ``32`` (bits of the storage type) and size is ``narrow``, ``middle`` or ``wide`` (of a row of D
numbers); ``any`` matches everything. There is no autotuning: equal shapes give equal launches, and so equal bits.
"""

import contextlib
import functools
import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED: bool = bool(knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

NARROW, MIDDLE = 1024, 4096
"""Largest D of the size classes ``narrow`` and ``middle``."""

_CODE_BACKWARD = {
    ("sm_80", "any", "narrow"): {"BLOCK_T": 4, "SEGMENT": 256, "num_warps": 4},
    ("sm_80", "any", "middle"): {"BLOCK_T": 2, "SEGMENT": 256, "num_warps": 8},
    ("sm_80", "any", "wide"): {"BLOCK_T": 1, "SEGMENT": 256, "num_warps": 16},
    ("sm_90", "any", "narrow"): {"BLOCK_T": 4, "SEGMENT": 256, "num_warps": 4},
    ("sm_90", "any", "middle"): {"BLOCK_T": 2, "SEGMENT": 256, "num_warps": 8},
    ("sm_90", "any", "wide"): {"BLOCK_T": 1, "SEGMENT": 256, "num_warps": 16},
    ("interpreter", "any", "any"): {"BLOCK_T": 2, "SEGMENT": 5},
}

BLOCKS: dict[str, dict[tuple[str, str, str], dict[str, int]]] = {
    "neighbours": {
        ("sm_80", "any", "any"): {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 32, "num_warps": 4},
        ("sm_90", "any", "any"): {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 64, "num_warps": 4},
        ("interpreter", "any", "any"): {"BLOCK_N": 32, "BLOCK_M": 16, "BLOCK_D": 16},
    },
    "kl_rows": {
        # Without fused multiply-adds both softmaxes are rounded alike, and equal inputs cancel to exactly 0.
        ("sm_80", "any", "any"): {"BLOCK": 4096, "num_warps": 8, "enable_fp_fusion": False},
        ("sm_90", "any", "any"): {"BLOCK": 4096, "num_warps": 8, "enable_fp_fusion": False},
        ("interpreter", "any", "any"): {"BLOCK": 32},
    },
    "kl_dual": {
        ("sm_80", "any", "any"): {"BLOCK_R": 64, "BLOCK_V": 128, "BLOCK_D": 32, "num_warps": 4, "num_stages": 4},
        ("sm_90", "any", "any"): {"BLOCK_R": 128, "BLOCK_V": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
        ("interpreter", "any", "any"): {"BLOCK_R": 8, "BLOCK_V": 16, "BLOCK_D": 32},
    },
    "kl_weights": {
        ("sm_80", "any", "any"): {"BLOCK_R": 32, "BLOCK_T": 32, "num_warps": 4},
        ("sm_90", "any", "any"): {"BLOCK_R": 32, "BLOCK_T": 32, "num_warps": 4},
        ("interpreter", "any", "any"): {"BLOCK_R": 4, "BLOCK_T": 2},
    },
    "kl_combine": {
        # No fused multiply-adds: u_s E_s - u_t E_t of equal inputs must cancel to exactly 0.
        ("sm_80", "any", "any"): {
            "BLOCK_R": 128,
            "BLOCK_D": 128,
            "BLOCK_V": 32,
            "SPLITS": 4,
            "num_warps": 8,
            "num_stages": 3,
            "enable_fp_fusion": False,
        },
        ("sm_90", "any", "any"): {
            # Two programs a multiprocessor, at 128 registers: one forms its operand while the other multiplies.
            "BLOCK_R": 64,
            "BLOCK_D": 256,
            "BLOCK_V": 64,
            "SPLITS": 4,
            "num_warps": 8,
            "num_stages": 2,
            "enable_fp_fusion": False,
        },
        ("interpreter", "any", "any"): {"BLOCK_R": 16, "BLOCK_D": 32, "BLOCK_V": 16, "SPLITS": 2},
    },
    "kl_difference": {  # nor here
        ("sm_80", "any", "any"): {"BLOCK_R": 32, "num_warps": 4, "enable_fp_fusion": False},
        ("sm_90", "any", "any"): {"BLOCK_R": 32, "num_warps": 4, "enable_fp_fusion": False},
        ("interpreter", "any", "any"): {"BLOCK_R": 4},
    },
    "gather_rows": {
        ("sm_80", "16", "any"): {"BLOCK_K": 16, "BLOCK_D": 256, "num_warps": 4},
        ("sm_80", "32", "any"): {"BLOCK_K": 16, "BLOCK_D": 128, "num_warps": 4},
        ("sm_90", "16", "any"): {"BLOCK_K": 16, "BLOCK_D": 256, "num_warps": 4},
        ("sm_90", "32", "any"): {"BLOCK_K": 16, "BLOCK_D": 128, "num_warps": 4},
        ("interpreter", "any", "any"): {"BLOCK_K": 4, "BLOCK_D": 16},
    },
    "code_backward": _CODE_BACKWARD,
    "add_segments": {
        ("sm_80", "any", "any"): {"num_warps": 4},
        ("sm_80", "any", "wide"): {"num_warps": 16},
        ("sm_90", "any", "any"): {"num_warps": 4},
        ("sm_90", "any", "wide"): {"num_warps": 16},
        ("interpreter", "any", "any"): {},
    },
    "topk_scan": {
        ("sm_80", "any", "any"): {"BLOCK": 2048, "num_warps": 8},
        ("sm_90", "any", "any"): {"BLOCK": 2048, "num_warps": 8},
        ("interpreter", "any", "any"): {"BLOCK": 32},
    },
    "filter_gemm": {
        # 128 features a tile would multiply faster, but the epilogue's slots then do not fit in registers.
        ("sm_80", "any", "any"): {
            "BLOCK_R": 128,
            "BLOCK_F": 64,
            "BLOCK_D": 32,
            "GROUP": 8,
            "PROGRAMS": 216,
            "num_warps": 8,
            "num_stages": 4,
        },
        ("sm_90", "any", "any"): {
            "BLOCK_R": 128,
            "BLOCK_F": 64,
            "BLOCK_D": 64,
            "GROUP": 8,
            "PROGRAMS": 264,
            "num_warps": 8,
            "num_stages": 4,
        },
        ("interpreter", "any", "any"): {"BLOCK_R": 16, "BLOCK_F": 16, "BLOCK_D": 32, "GROUP": 4, "PROGRAMS": 3},
    },
    "row_bound": {
        ("sm_80", "any", "any"): {"BLOCK": 1024, "num_warps": 4},
        ("sm_90", "any", "any"): {"BLOCK": 1024, "num_warps": 4},
        ("interpreter", "any", "any"): {"BLOCK": 8},
    },
    "topk_rank": {  # the size class is that of 8 × CAPACITY
        ("sm_80", "any", "narrow"): {"BLOCK": 16, "num_warps": 4},
        ("sm_80", "any", "middle"): {"BLOCK": 16, "num_warps": 8},
        ("sm_80", "any", "wide"): {"BLOCK": 4, "num_warps": 16},
        ("sm_90", "any", "narrow"): {"BLOCK": 16, "num_warps": 4},
        ("sm_90", "any", "middle"): {"BLOCK": 16, "num_warps": 8},
        ("sm_90", "any", "wide"): {"BLOCK": 4, "num_warps": 16},
        ("interpreter", "any", "any"): {"BLOCK": 8},
    },
    "round_rows": {
        ("sm_80", "any", "any"): {"BLOCK": 1024, "num_warps": 4},
        ("sm_90", "any", "any"): {"BLOCK": 1024, "num_warps": 4},
        ("interpreter", "any", "any"): {"BLOCK": 16},
    },
    "rescore": {
        ("sm_80", "any", "any"): {"BLOCK_K": 16, "BLOCK_D": 256, "num_warps": 8},
        ("sm_90", "any", "any"): {"BLOCK_K": 16, "BLOCK_D": 256, "num_warps": 8},
        ("interpreter", "any", "any"): {"BLOCK_K": 16, "BLOCK_D": 16},
    },
    "filter": {
        ("sm_80", "any", "any"): {"BLOCK": 2048, "num_warps": 8},
        ("sm_90", "any", "any"): {"BLOCK": 2048, "num_warps": 8},
        ("interpreter", "any", "any"): {"BLOCK": 32},
    },
    "adam": {
        ("sm_80", "any", "any"): {"BLOCK": 1024, "num_warps": 4},
        ("sm_90", "any", "any"): {"BLOCK": 1024, "num_warps": 4},
        ("interpreter", "any", "any"): {"BLOCK": 16},
    },
    "digit_histogram": {
        ("sm_80", "any", "any"): {"BLOCK": 2048, "num_warps": 8},
        ("sm_90", "any", "any"): {"BLOCK": 2048, "num_warps": 8},
        ("interpreter", "any", "any"): {"BLOCK": 32},
    },
}

VARIANTS: dict[str, dict[tuple[str, str, str], str]] = {
    "linear_kl": {  # logits; dual, dual_combine: 16-bit products, narrow, no cap (see linear_kl_dual.py)
        ("any", "any", "any"): "logits",
    },
    # cublas; filter_gemm: 16-bit products (see filter_gemm.py), for TopK also those of screening
    "encode_topk": {("any", "any", "any"): "cublas"},
    "encode_batch_topk": {("any", "any", "any"): "cublas"},
    "encode_filter": {("any", "any", "any"): "cublas"},  # ReLU, JumpReLU
}
"""Which of several ways an operator takes, by the keys of `BLOCKS`. Chosen is what a GPU has shown to be fastest."""


def arch(device: torch.device) -> str:
    """``sm_90`` from compute capability 9.0 on, ``sm_80`` before, ``interpreter`` in Triton's interpreter."""
    if INTERPRETED:
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] >= 9 else "sm_80"


def size_class(width: int) -> str:
    """``narrow``, ``middle`` or ``wide``: how long a row is that one program holds."""
    return "narrow" if width <= NARROW else "middle" if width <= MIDDLE else "wide"


def blocks(kernel: str, like: Tensor, width: int = 1) -> dict[str, Any]:
    """The launch options of a kernel for tensors like this one and rows of ``width`` numbers."""
    return lookup(kernel, arch(like.device), "16" if like.element_size() == 2 else "32", size_class(width))


def lookup(kernel: str, arch: str, dtype: str, size: str) -> dict[str, int]:
    """The most specific entry of ``BLOCKS[kernel]`` for these three keys; multiply-adds are fused unless it says no."""
    return {"enable_fp_fusion": True, **_most_specific(BLOCKS[kernel], kernel, arch, dtype, size)}


def variant(operator: str, like: Tensor, width: int) -> str:
    """The entry of ``VARIANTS[operator]`` for tensors like this one and rows of ``width`` numbers."""
    dtype = "16" if like.element_size() == 2 else "32"
    return _most_specific(VARIANTS[operator], operator, arch(like.device), dtype, size_class(width))


def _most_specific(table: dict[tuple[str, str, str], Any], name: str, arch: str, dtype: str, size: str) -> Any:
    for key in itertools.product((arch, "any"), (dtype, "any"), (size, "any")):
        if key in table:
            return table[key]
    raise KeyError(f"{name!r} has no entry for arch {arch}, dtype {dtype}, size {size}")


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on the GPU of ``like``; Triton alone takes whichever is current."""
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor as kernels read it; None stays None."""
    return None if tensor is None else tensor.contiguous()


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that all these tensors are brought to before a product. Raises ValueError unless it is floating."""
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors if t is not None])
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"expected bfloat16, float16, float32 or float64 tensors, got {dtype}")
    return dtype


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tl_accumulator(dtype: torch.dtype) -> tl.dtype:
    """`accumulator` as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")


def mm_accumulated(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with the accumulator's dtype as result: a 16-bit product is never rounded to 16 bits.

    torch ≥ 2.8 has this on CUDA; elsewhere 16-bit operands are upcast first, which gives the same numbers at the price
    of a float32 product.
    """
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda and _HAS_OUT_DTYPE:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def row_chunks(rows: int, bytes_per_row: int, budget: int) -> list[tuple[int, int]]:
    """Cuts ``range(rows)`` into near-equal spans whose scratch stays within ``budget`` bytes (at least 128 rows each).

    >>> row_chunks(1000, bytes_per_row=4, budget=2048)
    [(0, 512), (512, 1000)]
    """
    most = max(128, budget // max(1, bytes_per_row) // 128 * 128)
    pieces = max(1, triton.cdiv(rows, most))
    step = max(128, triton.cdiv(triton.cdiv(rows, pieces), 128) * 128)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def multiple(n: int, of: int) -> int:
    """The least multiple of ``of`` that is at least n."""
    return -(-n // of) * of


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x rounded to nearest in this dtype.

    The interpreter (Triton ≤ 3.9) truncates float32 → bfloat16, so there the rounding is done on the bits.
    """
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def store_rounded(pointer, x, mask):
    """Stores x rounded to nearest in the pointer's dtype."""
    tl.store(pointer, round_to(x, pointer.dtype.element_ty), mask=mask)
