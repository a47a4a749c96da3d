"""``pytest --benchmark`` runs benchmarks/ and prints its report; plain ``pytest`` runs tests/ and none of it."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run the speed report in benchmarks/ instead of the tests"
    )

    parser.addoption("--record", metavar="FILE", help="append the report's ratios to this JSON-lines file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark") and config.args == config.getini("testpaths"):
        config.args[:] = ["benchmarks"]
