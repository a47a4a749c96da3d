"""Dictionaries from wherever they are.

>>> 1
1
"""
from typing import Any
import numpy as np
import torch
from torch import Tensor

def read_dictionary(source: Any, *, which: str = "decoder", encoder_share: float = 0.5) -> Tensor:
    return torch.as_tensor(source)

def check_rows(x, name): pass
