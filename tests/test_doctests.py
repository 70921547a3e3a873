"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import orthoact

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(orthoact.__path__, "orthoact.")
    if m.name.split(".")[1] in ("interp", "convert")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    count = sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES)
    assert count >= 20, count
