"""Every kernel compiles for sm_80 and sm_90 with no spills: checked in a process without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compile_table
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str, str], dict]:
    """What the compiler made of each (kernel, use, arch)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, compile_table.__file__], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return {(row["kernel"], row["use"], row["arch"]): row for row in rows}


@pytest.mark.parametrize("arch", compile_table.CAPABILITIES)
@pytest.mark.parametrize("case", compile_table.CASES, ids=lambda case: case.id)
def test_kernel_compiles_without_spills(table, case, arch, record_property):
    row = table[case.kernel, case.use, arch]
    for name in ("registers", "shared_bytes", "spill_instructions", "stack_bytes", "wgmma", "mma"):
        record_property(name, row[name])
    assert case.may_spill or (row["stack_bytes"], row["spill_instructions"]) == (0, 0)
    assert row["registers"] <= 255
    assert row["shared_bytes"] <= (227 if arch == "sm_90" else 163) * 1024
    used = {name for name in ("wgmma", "mma") if row[name]}
    assert used == ({"sm_80": {"mma"}, "sm_90": {"wgmma"}}[arch] if case.matrix_units else set())
    # Products that read registers while the next operand is formed there: a race in Triton ≤ 3.6 (its issue 9433).
    assert row["operands_in_registers"] == 0


def test_every_kernel_of_the_package_is_in_the_table():
    sources = (ROOT / "kernels/triton").glob("*.py")
    kernels = {
        line.split("(")[0].removeprefix("def ")
        for file in sources
        for line in file.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert kernels == {case.kernel for case in compile_table.CASES}
