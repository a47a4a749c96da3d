"""Fused operators for end-to-end sparse dictionary learning, imported as ``e2e_fast.kernels``.

Read :mod:`e2e_fast.kernels.reference` first: it states every operator in plain torch under the same name and with the
same arguments.

>>> import torch
>>> from e2e_fast import kernels
>>> x, W_enc, W_dec = torch.randn(4, 8), torch.randn(32, 8), torch.randn(32, 8)
>>> code = kernels.encode_topk(x, W_enc, torch.zeros(32), k=3)
>>> kernels.decode(code, W_dec).shape
torch.Size([4, 8])
"""

# With the repository root on sys.path this folder is also importable as `kernels`, the name of a Hugging Face package
# that transformers 5 probes for by importing it. So it must import under that name too and have no `__version__`: the
# probe then finds no usable version and leaves it alone. An exception here would break `import transformers`.

from e2e_fast.kernels import reference
from e2e_fast.kernels._buffers import release_buffers
from e2e_fast.kernels.adam import adam_step, clip_coefficient
from e2e_fast.kernels.attention import attention
from e2e_fast.kernels.autoencode import autoencode
from e2e_fast.kernels.branch import branch
from e2e_fast.kernels.decode import decode
from e2e_fast.kernels.density import DensityController
from e2e_fast.kernels.encode import encode_batch_topk, encode_jump_relu, encode_relu, encode_topk
from e2e_fast.kernels.gelu import gelu
from e2e_fast.kernels.linear_kl import linear_kl, linear_kl_shared
from e2e_fast.kernels.sparse_code import JumpCode, SparseCode

__all__ = [
    "DensityController",
    "JumpCode",
    "SparseCode",
    "adam_step",
    "attention",
    "autoencode",
    "branch",
    "clip_coefficient",
    "decode",
    "encode_batch_topk",
    "encode_jump_relu",
    "encode_relu",
    "encode_topk",
    "gelu",
    "linear_kl",
    "linear_kl_shared",
    "reference",
    "release_buffers",
]
