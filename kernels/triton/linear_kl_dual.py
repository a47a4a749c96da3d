"""linear_kl for narrow models by products of its own, which write no float32 logit: a variant of `linear_kl`.

    kl_dual        z_s and z_t of a tile of rows × words, in one product → E = exp(z - m) in float16, m the row's
                   maximum in that tile; and five numbers a row and tile: m_s, m_t, Σ E_s, Σ E_t, Σ E_t (z_t - z_s)
    kl_weights     the numbers of a row's tiles → its loss, and for every tile u = exp(m - M) / Σ_v exp(z - M), M the
                   row's maximum, so that p = u · E
    kl_combine     (p_s - p_t) W, with p_s - p_t = u_s E_s - u_t E_t formed in registers for a product of its own
    kl_difference  or p_s - p_t written over E_s, for cuBLAS's product

`linear_kl`'s first way writes 8 bytes a pair of logits, reads them once or twice and moves 4 more for the difference;
here 4 are written, and read once by `kl_difference` (2 + 2 more for the difference) or, by `kl_combine`, once for each
BLOCK_D columns of the gradient. That pays only if these products keep up with cuBLAS's: `_launch.VARIANTS` decides.

**What may be 16 bits.** Rounding z errs in the exponent, the more so the larger |z|: 40 % of the gradient at a KL of
0.01. Rounding E errs by a constant share of a probability. bfloat16's 2⁻⁹ still shows where p_s ≈ p_t (0.37 % of the
gradient at a KL of 0.01); float16 costs as many bytes and errs by 2⁻¹², below the rounding of the difference. It loses
what lies under 3·10⁻⁸ of its tile's maximum, which that maximum dwarfs.

**Exactly 0 for equal inputs.** A student's row and its teacher's lie in the same tile of one product and pass through
the same instructions, and no multiply-add is fused, so u_s E_s - u_t E_t cancels to the bit.

**Race-free by construction.** The first product is one plain `tl.dot` with both operands loaded. In the second the
computed operand is the right one: the compiler then passes it through shared memory and waits for each product. As the
left one it would stay in registers, which Hopper's asynchronous products may still be reading when they are
overwritten (triton issue 9433, open for Triton ≤ 3.6).

No soft cap: the gradient's factor 1 - (z_s/c)² needs z_s, and log E_s + m_s is too rough for it in float16 (nothing
remains 17 below the tile's maximum). No model this narrow caps its logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2e_fast.kernels.triton._launch import (
    INTERPRETED,
    blocks,
    launch,
    mm_accumulated,
    round_to,
    row_chunks,
    store_rounded,
)

CHUNK_BYTES = 2 << 30
"""Scratch for one chunk of rows: both E, and the numbers of their tiles."""

WIDEST = 1024
"""Largest D: beyond it the products take so long that cuBLAS's are worth more than the bytes."""

_INTERPRETED = tl.constexpr(INTERPRETED)


def serves(dtype: torch.dtype, width: int, softcap: float | None) -> bool:
    """Whether this variant computes such a problem: products in 16 bits, D ≤ `WIDEST`, no soft cap."""
    return dtype in (torch.bfloat16, torch.float16) and width <= WIDEST and softcap is None


def linear_kl_dual(
    student: Tensor,
    teacher: Tensor,
    padded: Tensor,
    vocab: int,
    bias: Tensor | None,
    need_grad: bool,
    combine: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of every token (N,), float32, and the gradient (N, D) of their sum: shape (0,) without ``need_grad``.

    student, teacher (N, D) and padded (≥ vocab, D), contiguous, of one 16-bit dtype; bias (vocab,). The gradient comes
    from `kl_combine_kernel` if ``combine``, else from `kl_difference_kernel` and cuBLAS.
    """
    N, D = student.shape
    options = blocks("kl_dual", student)
    tile = options["BLOCK_V"]
    tiles = triton.cdiv(vocab, tile)
    loss = student.new_empty(N, dtype=torch.float32)
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if need_grad else student.new_empty(0)
    for start, stop in row_chunks(N, tiles * (4 * tile + 28), CHUNK_BYTES):
        C = stop - start
        pair = torch.stack((student[start:stop], teacher[start:stop]))
        stats = loss.new_empty(5, tiles, C)
        e = pair.new_empty(2, C, tiles * tile, dtype=torch.float16) if need_grad else None
        u = loss.new_empty(2, tiles, C) if need_grad else None
        grid = (triton.cdiv(C, options["BLOCK_R"]) * tiles,)
        launch(kl_dual_kernel, grid, pair, pair, padded, bias, e, stats, C, D, vocab, tiles, **options)
        weights = blocks("kl_weights", pair)
        grid = (triton.cdiv(C, weights["BLOCK_R"]),)
        launch(kl_weights_kernel, grid, pair, stats, u, loss[start:stop], C, tiles, **weights)
        if e is not None and u is not None:
            gradient[start:stop] = _combine(e, u, padded, vocab, tile) if combine else _difference(e, u, padded, tile)
    return loss, gradient


def _combine(e: Tensor, u: Tensor, padded: Tensor, vocab: int, tile: int) -> Tensor:
    """(p_s - p_t) W (C, D), float32. The vocabulary is cut in SPLITS parts: C × D alone has too few tiles for a GPU."""
    _, tiles, C = u.shape
    D = padded.shape[1]
    options = blocks("kl_combine", padded)
    splits = options.pop("SPLITS")
    parts = u.new_empty(splits, C, D)
    grid = (triton.cdiv(C, options["BLOCK_R"]) * triton.cdiv(D, options["BLOCK_D"]), splits)
    launch(
        kl_combine_kernel, grid, padded,
        e, u, padded, parts, C, D, vocab, tiles, _scale(padded), TILE=tile, **options,
    )  # fmt: skip
    return parts.sum(0)


def _difference(e: Tensor, u: Tensor, padded: Tensor, tile: int) -> Tensor:
    """The same, the difference written over E_s and multiplied by cuBLAS."""
    _, tiles, C = u.shape
    difference = e[0].view(padded.dtype)
    options = blocks("kl_difference", padded)
    grid = (triton.cdiv(C, options["BLOCK_R"]), tiles)
    launch(kl_difference_kernel, grid, padded, e, u, difference, C, tiles, _scale(padded), TILE=tile, **options)
    words = min(len(padded), tiles * tile)  # both a multiple of 16 and no less than V; beyond V there are zeros
    return mm_accumulated(difference[:, :words], padded[:words]) / _scale(padded)


def _scale(like: Tensor) -> float:
    """float16 holds nothing below 6e-8: differences are scaled into its range, and back after the product."""
    return 1024.0 if like.dtype == torch.float16 else 1.0


@triton.jit
def kl_dual_kernel(
    pair_ptr,  # (2, C, D): student, teacher
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,) or None
    e_ptr,  # (2, C, tiles · BLOCK_V) float16 out, 0 beyond the vocabulary; or None
    stats_ptr,  # (5, tiles, C) out: m_s, m_t, Σ e_s, Σ e_t, Σ e_t (z_t - z_s)
    rows,
    width,
    vocab,
    tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile a program: BLOCK_R rows of both models against BLOCK_V words, as one product of 2 · BLOCK_R rows.

    Programs of the same words follow each other: W comes from memory once, the hidden states stay in L2.
    """
    row_tiles = tl.cdiv(rows, BLOCK_R)
    tile = tl.program_id(0) // row_tiles
    first = tl.program_id(0) % row_tiles * BLOCK_R
    # Eight rows of the student, the same eight of the teacher, and so on: a thread that holds a logit of one in its
    # part of a 16 × 8 matrix fragment then holds the other's too, and taking the two apart moves nothing.
    m = tl.arange(0, 2 * BLOCK_R)
    row = first + m // 16 * 8 + m % 8
    inside = row < rows
    word = tl.arange(0, BLOCK_V)
    start = tile * BLOCK_V
    h_rows = pair_ptr + (m // 8 % 2 * rows + row).to(tl.int64)[:, None] * width
    w_rows = weight_ptr + start.to(tl.int64) * width + word[:, None] * width
    z = tl.zeros((2 * BLOCK_R, BLOCK_V), tl.float32)
    for k in range(0, width, BLOCK_D):
        d = k + tl.arange(0, BLOCK_D)
        h = tl.load(h_rows + d, mask=inside[:, None] & (d < width), other=0.0)
        w = tl.load(w_rows + d, mask=(start + word < vocab)[:, None] & (d < width), other=0.0)
        z = _dot(h, tl.trans(w), z)
    z_s, z_t = tl.split(tl.permute(tl.reshape(z, (BLOCK_R // 8, 2, 8, BLOCK_V)), (0, 2, 3, 1)))
    z_s = tl.reshape(z_s, (BLOCK_R, BLOCK_V))
    z_t = tl.reshape(z_t, (BLOCK_R, BLOCK_V))
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + start + word, mask=start + word < vocab, other=0.0).to(tl.float32)
        z_s += bias
        z_t += bias
    exists = (start + word < vocab)[None, :]
    z_s = tl.where(exists, z_s, float("-inf"))
    z_t = tl.where(exists, z_t, float("-inf"))
    m_s = tl.max(z_s, 1)
    m_t = tl.max(z_t, 1)
    e_s = tl.exp(z_s - _finite(m_s)[:, None])
    e_t = tl.exp(z_t - _finite(m_t)[:, None])
    # Where e_t is 0 the term is 0, also when a logit is -inf; forming 0 · inf would give NaN.
    cross = tl.where(e_t == 0, 0.0, e_t * (z_t - z_s))
    row = first + tl.arange(0, BLOCK_R)
    inside = row < rows
    size = tl.cast(tiles, tl.int64) * rows
    stats_ptr += tile.to(tl.int64) * rows + row
    tl.store(stats_ptr, m_s, mask=inside)
    tl.store(stats_ptr + size, m_t, mask=inside)
    tl.store(stats_ptr + 2 * size, tl.sum(e_s, 1), mask=inside)
    tl.store(stats_ptr + 3 * size, tl.sum(e_t, 1), mask=inside)
    tl.store(stats_ptr + 4 * size, tl.sum(cross, 1), mask=inside)
    if e_ptr is not None:
        stride = tiles * BLOCK_V
        e_at = e_ptr + row.to(tl.int64)[:, None] * stride + start + word
        tl.store(e_at, e_s.to(tl.float16), mask=inside[:, None])
        tl.store(e_at + tl.cast(rows, tl.int64) * stride, e_t.to(tl.float16), mask=inside[:, None])


@triton.jit
def kl_weights_kernel(
    stats_ptr,  # (5, tiles, C)
    u_ptr,  # (2, tiles, C) out: p_s / e_s, p_t / e_t; or None
    loss_ptr,  # (C,) out
    rows,
    tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """BLOCK_R rows a program: the softmax over a row's tiles, as `kl_rows_kernel` forms it over its words."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    size = tl.cast(tiles, tl.int64) * rows
    max_s = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    max_t = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    sum_s = tl.zeros((BLOCK_R,), tl.float32)
    sum_t = tl.zeros((BLOCK_R,), tl.float32)
    cross = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        inside = (tile < tiles)[:, None] & (row < rows)
        at = stats_ptr + tile.to(tl.int64)[:, None] * rows + row
        m_s = tl.load(at, mask=inside, other=float("-inf"))
        m_t = tl.load(at + size, mask=inside, other=float("-inf"))
        new_s = tl.maximum(max_s, tl.max(m_s, 0))
        new_t = tl.maximum(max_t, tl.max(m_t, 0))
        part_s = tl.exp(m_s - _finite(new_s))
        part_t = tl.exp(m_t - _finite(new_t))
        old_s = tl.exp(max_s - _finite(new_s))
        old_t = tl.exp(max_t - _finite(new_t))
        sum_s = sum_s * old_s + tl.sum(part_s * tl.load(at + 2 * size, mask=inside, other=0.0), 0)
        sum_t = sum_t * old_t + tl.sum(part_t * tl.load(at + 3 * size, mask=inside, other=0.0), 0)
        terms = tl.load(at + 4 * size, mask=inside, other=0.0)
        cross = cross * old_t + tl.sum(tl.where(part_t == 0, 0.0, part_t * terms), 0)
        max_s = new_s
        max_t = new_t
    log_s = tl.log(sum_s)
    log_t = tl.log(sum_t)
    tl.store(loss_ptr + row, cross / sum_t + (max_s - max_t) + (log_s - log_t), mask=row < rows)
    if u_ptr is not None:
        for start in range(0, tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            inside = (tile < tiles)[:, None] & (row < rows)
            offset = tile.to(tl.int64)[:, None] * rows + row
            m_s = tl.load(stats_ptr + offset, mask=inside, other=0.0)
            m_t = tl.load(stats_ptr + offset + size, mask=inside, other=0.0)
            tl.store(u_ptr + offset, tl.exp(m_s - max_s - log_s), mask=inside)
            tl.store(u_ptr + offset + size, tl.exp(m_t - max_t - log_t), mask=inside)


@triton.jit
def kl_combine_kernel(
    e_ptr,  # (2, C, tiles · TILE) float16
    u_ptr,  # (2, tiles, C)
    weight_ptr,  # (V, D)
    parts_ptr,  # (splits, C, D) out
    rows,
    width,
    vocab,
    tiles,
    scale,  # of the differences
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,  # divides TILE
):
    """BLOCK_R rows × BLOCK_D columns of one part of the vocabulary a program; those of the same rows follow each other.

    A part is a run of whole tiles. E is read once for each BLOCK_D columns: the programs that need it run together.
    """
    across = tl.cdiv(width, BLOCK_D)
    row = tl.program_id(0) // across * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(0) % across * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = row < rows
    run = tl.cdiv(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * run
    end = tl.minimum(begin + run, tiles)
    stride = tiles * TILE
    u_size = tl.cast(tiles, tl.int64) * rows
    e_size = tl.cast(rows, tl.int64) * stride
    e_rows = e_ptr + row.to(tl.int64)[:, None] * stride
    out = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for start in range(begin * TILE, end * TILE, BLOCK_V):
        word = start + tl.arange(0, BLOCK_V)
        u_at = u_ptr + (start // TILE) * tl.cast(rows, tl.int64) + row
        u_s = tl.load(u_at, mask=inside, other=0.0) * scale
        u_t = tl.load(u_at + u_size, mask=inside, other=0.0) * scale
        e_s = tl.load(e_rows + word, mask=inside[:, None], other=0.0).to(tl.float32)
        e_t = tl.load(e_rows + e_size + word, mask=inside[:, None], other=0.0).to(tl.float32)
        w_at = weight_ptr + word.to(tl.int64)[:, None] * width + d
        w = tl.load(w_at, mask=(word < vocab)[:, None] & (d < width), other=0.0)
        difference = round_to(u_s[:, None] * e_s - u_t[:, None] * e_t, weight_ptr.dtype.element_ty)
        out = _dot(tl.trans(w), tl.trans(difference), out)  # Wᵀ (p_s - p_t)ᵀ: the computed operand on the right
    parts_ptr += tl.program_id(1).to(tl.int64) * rows * width
    at = parts_ptr + row.to(tl.int64)[:, None] * width + d
    tl.store(at, tl.trans(out) / scale, mask=inside[:, None] & (d < width))


@triton.jit
def kl_difference_kernel(
    e_ptr,  # (2, C, tiles · TILE) float16
    u_ptr,  # (2, tiles, C)
    difference_ptr,  # (C, tiles · TILE) out, 16 bits: over E_s, each element by the thread that read it
    rows,
    tiles,
    scale,  # of the differences
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """p_s - p_t of BLOCK_R rows × one tile a program."""
    tile = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    u_at = u_ptr + tile.to(tl.int64) * rows + row
    u_s = tl.load(u_at, mask=inside, other=0.0) * scale
    u_t = tl.load(u_at + tl.cast(tiles, tl.int64) * rows, mask=inside, other=0.0) * scale
    stride = tiles * TILE
    at = row.to(tl.int64)[:, None] * stride + tile * TILE + tl.arange(0, TILE)
    e_s = tl.load(e_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    e_t = tl.load(e_ptr + tl.cast(rows, tl.int64) * stride + at, mask=inside[:, None], other=0.0).to(tl.float32)
    store_rounded(difference_ptr + at, u_s[:, None] * e_s - u_t[:, None] * e_t, inside[:, None])


@triton.jit
def _dot(a, b, sums):
    """sums + a @ b, 16-bit operands, float32 sums."""
    if _INTERPRETED:  # its products of bfloat16 (Triton ≤ 3.9) are products of the bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums)


@triton.jit
def _finite(shift):
    """The shift of an exponential; 0 where everything seen is -inf, since -inf - (-inf) is NaN."""
    return tl.where(shift == float("-inf"), 0.0, shift)
