"""Which threads the compiled core's loops run on: torch's, or its own where those are missing or dead."""

import subprocess
import sys

import pytest
import torch

from e2e_fast import kernels
from e2e_fast.kernels._native import native

PRELUDE = """
import os, sys
import torch
from e2e_fast import kernels
from e2e_fast.kernels._native import native
core = native()
torch.manual_seed(0)
torch.set_num_threads(3)
x, W_enc, W_dec = torch.randn(700, 64), torch.randn(512, 64), torch.randn(512, 64)
W_enc.requires_grad_(), W_dec.requires_grad_()

def step():
    x_hat, code = kernels.autoencode(x, W_enc, None, W_dec, None, k=8)
    return code.values, *torch.autograd.grad((x_hat - x).square().sum(), (W_enc, W_dec))

def threads():
    return len(os.listdir("/proc/self/task"))
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is looked up in ELF libraries, threads in /proc")


def run(script: str) -> str:
    command = [sys.executable, "-c", PRELUDE + script]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


@linux
def test_loops_run_on_torchs_threads():
    output = run("""
torch.randn(1 << 20).exp_()
before = threads()
step()
after = threads()
core.force_own_threads(True)
step()
print(core.runtime(), after - before, threads() - before)
""")
    assert output == "std::thread 0 2"


@linux
def test_a_forked_child_runs_on_threads_of_its_own():
    output = run("""
expected = step()
assert core.runtime() == "OpenMP"
child = os.fork()
if not child:
    torch.set_num_threads(1)  # torch's own loops would wait for threads that are gone …
    torch.get_num_threads = lambda: 3  # … but ours may take as many as they like
    same = all(torch.equal(a, b) for a, b in zip(expected, step()))
    os._exit(0 if same and core.runtime() == "std::thread" else 1)
print(os.waitpid(child, 0)[1])
""")
    assert output == "0"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_have_the_same_bits_whatever_runs_the_loops(threads):
    core = native()
    assert core is not None
    torch.manual_seed(0)
    x, W, bias = torch.randn(300, 64), torch.randn(1000, 64), torch.full((1000,), -12.0)
    W_enc, W_dec = W.clone(), W.clone()
    parameters = [p.requires_grad_() for p in (x, W_enc, bias, W_dec)]
    kept, found = torch.get_num_threads(), []
    try:
        for own, count in ((False, 1), (False, threads), (True, threads)):
            core.force_own_threads(own)
            torch.set_num_threads(count)
            x_hat, code = kernels.autoencode(x, W_enc, bias, W_dec, None, capacity=200)
            found.append((x_hat, *code, *torch.autograd.grad(x_hat.square().sum() + code.values.sum(), parameters)))
    finally:
        core.force_own_threads(False)
        torch.set_num_threads(kept)
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert torch.equal(a, b)
