"""The examples in the public modules' docstrings run."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIP = ("kernels.triton", "_C", "__main__")  # Triton's modules need TRITON_INTERPRET: their own tests run them


def modules() -> list[str]:
    files = sorted((ROOT / "e2e_fast").rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))
    names = []
    for file in files:
        parts = list(file.relative_to(ROOT).with_suffix("").parts)
        parts = ["e2e_fast", *parts] if parts[0] == "kernels" else parts
        name = ".".join(parts).removesuffix(".__init__")
        if not any(part in name for part in SKIP):
            names.append(name)
    return sorted(set(names))


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_module_give_what_they_print(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
    private = any(part.startswith("_") for part in name.split("."))
    source = inspect.getsource(module)
    assert private or ">>> " in source or "\ne2e-fast " in source, f"{name} shows no example of use"
