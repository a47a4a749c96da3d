"""Shared fixtures: where ../shared lies, and skipping with a reason where it is missing."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels are tested in Triton's interpreter. The switch counts when triton is first imported,
# which other libraries do too (transformer_lens), so it is set before any test module is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED.is_dir():
        return
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(pytest.mark.skip(reason=f"{SHARED} is missing: this test needs its models and texts"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, texts, dictionaries and golden runs."""
    return SHARED


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs ``e2e-fast ARGUMENT …`` in this process; returns its exit code."""
    from e2e_fast import cli

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["e2e-fast", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return int(exit_.value.code or 0)

    return run
