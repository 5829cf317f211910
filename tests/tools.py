"""Executables that some tests need: found, or the test is skipped, or under CI=true failed."""

import os
import shutil
from typing import NoReturn

import pytest


def needs(tool: str) -> str:
    """The path of an executable that the calling test or fixture needs.

    A missing one skips the test with a reason; under CI=true it fails, so that no test stays unrun unseen.
    Server programs live in sbin, which is not on everybody's PATH.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    found = shutil.which(tool, path=path)
    if found is None:
        lacking(f"{tool} is not installed")
    return found


def lacking(reason: str) -> NoReturn:
    """Skips the calling test or fixture, or under CI=true fails it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI=true allows no skips", pytrace=False)
    pytest.skip(reason)
