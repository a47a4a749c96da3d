"""Large buffers are used again, and never while anything still refers to them."""

import gc
import threading

import numpy as np
import pytest
import torch

from e2e_fast import kernels
from e2e_fast.kernels import _buffers

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_buffers, "_POOL", _buffers._Pool())


def large(megabytes: int = 8) -> torch.Tensor:
    return _buffers.empty(megabytes, MEGABYTE, dtype=torch.uint8)


def test_a_buffer_comes_back_when_its_tensor_is_gone():
    tensor = large()
    address = tensor.data_ptr()
    assert address % _buffers.PAGE_BYTES == 0
    del tensor
    assert large().data_ptr() == address


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: t,
        lambda t: t[3:4, 5:7],
        lambda t: t.detach(),
        lambda t: t.numpy(),
        lambda t: memoryview(t.numpy()),
        lambda t: t.untyped_storage(),
        lambda t: np.from_dlpack(t),
    ],
    ids=["tensor", "view", "detached", "array", "memoryview", "storage", "dlpack"],
)
def test_what_still_refers_to_a_buffer_keeps_it(hold):
    tensor = large()
    address = tensor.data_ptr()
    holder = hold(tensor)
    del tensor
    gc.collect()
    other = large()
    assert other.data_ptr() != address
    del holder
    gc.collect()
    assert large().data_ptr() == address


def test_gradients_keep_theirs_until_they_are_dropped():
    x = torch.randn(64, 256)
    W_enc, W_dec = (torch.randn(16384, 256, requires_grad=True) for _ in range(2))

    def step() -> torch.Tensor:
        x_hat, _ = kernels.autoencode(x, W_enc, None, W_dec, None, k=8)
        (x_hat - x).square().sum().backward()
        assert W_dec.grad is not None
        return W_dec.grad

    first = step()
    expected, address = first.clone(), first.data_ptr()
    step()  # accumulates: the first gradient must survive the second pass
    torch.testing.assert_close(first, 2 * expected)
    del first
    W_enc.grad = W_dec.grad = None
    assert torch.equal(step(), expected)
    used = {buffer.ctypes.data for buffer in _buffers._POOL._buffers}
    assert address in used
    assert W_dec.grad is not None
    assert W_dec.grad.data_ptr() in used


def test_free_buffers_beyond_the_limit_are_given_back(monkeypatch):
    monkeypatch.setattr(_buffers, "KEPT_BYTES", 20 * MEGABYTE)
    held = large(10)
    for megabytes in (8, 9, 11, 12):
        large(megabytes)
    sizes = [buffer.nbytes // MEGABYTE for buffer in _buffers._POOL._buffers]
    assert sizes == [10, 9, 11, 12]
    kernels.release_buffers()
    assert [buffer.nbytes for buffer in _buffers._POOL._buffers] == [held.nbytes]
    held.fill_(1)


def test_threads_never_share_a_buffer():
    wrong = []

    def work(number: int) -> None:
        for _ in range(50):
            mine = large()
            mine.fill_(number)
            if not bool((mine == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_small_tensors_are_torchs_own():
    tensor = _buffers.empty(3, 4)
    assert tensor.shape == (3, 4)
    assert not _buffers._POOL._buffers
    assert _buffers.empty(0, 5).shape == (0, 5)
    assert _buffers.empty_like(tensor.bfloat16()).dtype == torch.bfloat16
