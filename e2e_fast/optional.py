"""Packages that only some features need, imported when one of them is used.

>>> require("json", "reading settings", extra="data").dumps([1])
'[1]'
>>> require("no_such_package.part", "flying", extra="wings")
Traceback (most recent call last):
e2e_fast.optional.MissingPackage: flying needs the package no-such-package: pip install 'e2e-fast[wings]'
"""

from importlib import import_module
from typing import Any


class MissingPackage(ImportError):
    """A feature needs a package that is not installed; the message says how to install it."""


def require(module: str, purpose: str, *, extra: str | None = None) -> Any:
    """The module; raises MissingPackage where its package is not installed.

    ``purpose`` begins the message; ``extra`` is the extra of e2e-fast that brings the package.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name not in (module, top):  # it is there, and lacks something itself
            raise
        package = top.replace("_", "-")
        remedy = f"'e2e-fast[{extra}]'" if extra else package
        raise MissingPackage(f"{purpose} needs the package {package}: pip install {remedy}") from error
