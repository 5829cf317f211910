"""Compiles what runs for every frame and every new stream while a wheel is built, if there is a C compiler.

The source is the same, and runs as it is where it is not compiled: in a checkout that is installed with
``--editable``, and where there is no compiler. ``KONNEKTOR_COMPILE=never`` leaves it as it is, ``always`` makes it an error
that it cannot be compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "KONNEKTOR_COMPILE"
SETUP = """\
from mypyc.build import mypycify
from setuptools import setup

setup(name="konnektor", packages=[], ext_modules=mypycify({arguments!r}, opt_level="3", debug_level="0"))
"""


class CannotCompile(Exception):
    """Why not, in a sentence."""


class CompilingHook(BuildHookInterface):  # type: ignore[type-arg]
    """Of pyproject.toml's ``[tool.hatch.build.targets.wheel.hooks.custom]``: ``modules`` are compiled, as one."""

    _remove: Callable[[], object] = staticmethod(lambda: None)

    def dependencies(self) -> list[str]:
        """Of the build, asked for before it begins: what compiles, and for its types all that is imported."""
        if wanted() == "never" or missing() is not None:
            return []
        return [*self.config["needs"], *self.metadata.core.dependencies]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the compiled modules to a wheel; beside their source, which tracebacks and debuggers show."""
        how = wanted()
        if version == "editable" or how == "never":
            return
        # In a copy: a compiled module that stayed beside its source would be what a checkout runs, whatever is edited.
        copy = Path(tempfile.mkdtemp(prefix="konnektor-build-"))
        self._remove = weakref.finalize(self, shutil.rmtree, copy)  # at the latest when the process ends
        try:
            made = self._compile(copy)
        except (CannotCompile, OSError) as error:
            if how == "always":
                raise
            self.app.display_warning(f"konnektor is not compiled, and takes more CPU time therefore: {error}")
            return
        build_data["force_include"].update({str(file): str(file.relative_to(copy)) for file in made})
        build_data["infer_tag"], build_data["pure_python"] = True, False

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes what the wheel has by now."""
        self._remove()

    def _compile(self, copy: Path) -> list[Path]:
        if (what := missing()) is not None:
            raise CannotCompile(what)
        shutil.copytree(
            Path(self.root, "konnektor"), copy / "konnektor", ignore=shutil.ignore_patterns("*.so", "*.pyc")
        )
        modules = [f"konnektor/{module}" for module in self.config["modules"]]
        (copy / "setup.py").write_text(SETUP.format(arguments=["--config-file=", *modules]))
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(
            command,
            cwd=copy,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise CannotCompile(f"mypyc or the C compiler failed:\n{done.stdout.strip()}")
        return [*copy.glob("*.so"), *copy.glob("konnektor/**/*.so")]  # and not those in its build/


def wanted() -> str:
    """``auto``, ``always`` or ``never``."""
    value = os.environ.get(VARIABLE, "auto")
    if value not in {"auto", "always", "never"}:
        raise ValueError(f"{VARIABLE} is {value!r}, but must be auto, always or never")
    return value


def missing() -> str | None:
    """What it would take to compile."""
    compiler = ((os.environ.get("CC") or sysconfig.get_config_var("CC") or "").split() or ["cc"])[0]
    if shutil.which(compiler) is None:
        return f"there is no C compiler ({compiler}); Debian's package is gcc"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "the header files of Python are missing; Debian's package is python3-dev"
    return None
