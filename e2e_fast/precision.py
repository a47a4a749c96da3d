"""In which arithmetic the matrix products of training run; all else is float32.

    fp32    float32 products
    tf32    float32 tensors, products on an NVIDIA GPU's TF32 units (10 bits of mantissa)
    bf16    products of bfloat16 inputs: the language model's under torch.autocast, the SAEs' and the unembedding's by
            casting their inputs; the residual stream, logits, softmax, losses, weights, gradients and Adam in float32

>>> x = torch.randn(2, 4)
>>> with arithmetic("bf16", "cpu"):
...     (x @ x.T).dtype, lowered(x)[0].dtype
(torch.bfloat16, torch.bfloat16)
>>> lowered(x)[0] is x
True
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "tf32", "bf16"]


def resolve(wanted: Precision | None, device: torch.device | str) -> Precision:
    """``wanted``, or bf16 on CUDA and fp32 elsewhere. Raises ValueError for tf32 where there is none."""
    kind = torch.device(device).type
    if wanted == "tf32" and kind != "cuda":
        raise ValueError(f"precision tf32 needs an NVIDIA GPU, got device {device}: use fp32 or bf16")
    return wanted or ("bf16" if kind == "cuda" else "fp32")


@contextlib.contextmanager
def arithmetic(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """The products of the block run in ``precision``; the process's own settings come back afterwards."""
    put_back = _float32_products()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        put_back()


def _float32_products() -> Callable[[], None]:
    """What brings back how the process multiplies float32 matrices now."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # chosen under torch 2.9's names, after which it refuses to be asked under the older ones
        mkldnn: Any = torch.backends.mkldnn
        backends: list[Any] = [torch.backends.cuda.matmul, mkldnn.matmul]
        chosen = [backend.fp32_precision for backend in backends]

        def put_back() -> None:
            torch.set_float32_matmul_precision("highest")
            for backend, precision in zip(backends, chosen, strict=True):
                backend.fp32_precision = precision

        return put_back
    return lambda: torch.set_float32_matmul_precision(before)


def reduced_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which inputs of products are rounded here; None where they stay as they are."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inputs of an operator of ours, which autocast does not see: cast as it would cast them, or as they are."""
    dtype = reduced_dtype(tensors[0].device)
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def exact(tensor: Tensor) -> Tensor:
    """In float32, for losses of what a model in half precision gives; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Rounded:
    """A frozen tensor as autocast would cast it, kept while it stays as it is: autocast keeps only what is trained.

    A change is seen by torch's version counter, and by another address. Writing through ``tensor.data`` raises no
    counter. Copies and pickles keep nothing: another tensor's counter is another.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, tuple[Any, ...], Tensor] | None = None  # one reference: threads see all of it or none

    def __reduce__(self) -> tuple[type["Rounded"], tuple[()]]:
        return Rounded, ()

    def __call__(self, tensor: Tensor) -> Tensor:
        dtype = reduced_dtype(tensor.device)
        # Inference tensors count no versions, and serve no graph later on.
        if dtype is None or tensor.is_inference() or torch.is_inference_mode_enabled():
            return lowered(tensor)[0]
        key, kept = (tensor._version, tensor.data_ptr(), tensor.device, dtype), self._kept
        if kept is None or kept[0] is not tensor or kept[1] != key:
            self._kept = kept = tensor, key, tensor.detach().to(dtype)
        return kept[2]


def as_given(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """``with as_given(device)``: operators take their inputs' dtypes, whatever is around."""
    # The meta device, which has shapes alone, knows no autocast; and a context that changes nothing takes 20 µs.
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
