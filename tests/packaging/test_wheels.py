"""What a wheel has in it: compiled modules if they can be compiled, and else the source alone. With a small package in place of ours."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.tools import lacking

ROOT = Path(__file__).parents[2]
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "small"
version = "1"
requires-python = ">=3.11"
dependencies = ["h11"]
[tool.hatch.build.targets.wheel]
packages = ["konnektor"]
[tool.hatch.build.targets.wheel.hooks.custom]
needs = ["mypy"]
modules = ["mux.py"]
"""


@pytest.fixture
def project(tmp_path):
    found = tmp_path / "project"
    (found / "konnektor").mkdir(parents=True)
    (found / "pyproject.toml").write_text(PROJECT)
    (found / "konnektor" / "__init__.py").write_text("")
    (found / "konnektor" / "mux.py").write_text("def double(number: int) -> int:\n    return 2 * number\n")
    (tmp_path / "temporary").mkdir()
    shutil.copy(ROOT / "hatch_build.py", found)
    return found


@pytest.fixture
def compiler():
    """What it takes to compile is here."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    if (what := hook.missing()) is not None:
        lacking(what)


def build(project, how=None, **env):
    """Builds a wheel: how that went, and the wheel if there is one."""
    env = {**os.environ, "TMPDIR": str(project.parent / "temporary"), "PYTHONWARNINGS": "", **env}
    env.pop("KONNEKTOR_COMPILE", None)
    if how is not None:
        env["KONNEKTOR_COMPILE"] = how
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(project.parent / "wheels")]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=55)
    assert not list((project.parent / "temporary").iterdir()), "something temporary was left behind"
    assert sorted(each.name for each in project.iterdir() if each.name != "__pycache__") == [
        "hatch_build.py",
        "konnektor",
        "pyproject.toml",
    ]
    assert not list(project.glob("**/*.so"))
    return done, next((project.parent / "wheels").glob("*.whl"), None)


def where_mux_is(wheel):
    """The file that Python takes for the module once the wheel is installed."""
    into = wheel.parent / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    code = "import konnektor.mux as mux; assert mux.double(21) == 42; print(mux.__file__)"
    found = subprocess.check_output(
        [sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONPATH": str(into)}, text=True
    )
    return Path(found.strip()).relative_to(into)


@pytest.mark.usefixtures("compiler")
def test_modules_are_compiled_beside_their_source(project):
    done, wheel = build(project, "always")
    assert done.returncode == 0, done.stderr
    assert "none-any" not in wheel.name
    mux = where_mux_is(wheel)
    assert mux.suffix == ".so" and mux.parent == Path("konnektor")
    assert (wheel.parent / "installed" / "konnektor" / "mux.py").is_file()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"CC": "no-such-compiler -O2"}, "there is no C compiler (no-such-compiler); Debian's package is gcc"),
        ({"CC": "false"}, "mypyc or the C compiler failed:"),
    ],
)
def test_what_cannot_be_compiled_is_said_and_left_as_it_is(project, env, why):
    done, wheel = build(project, **env)
    assert done.returncode == 0, done.stderr
    assert f"konnektor is not compiled, and takes more CPU time therefore: {why}" in done.stdout + done.stderr
    assert wheel.name == "small-1-py3-none-any.whl"
    assert where_mux_is(wheel) == Path("konnektor/mux.py")


def test_what_must_be_compiled_and_cannot_be_is_an_error(project):
    done, wheel = build(project, "always", CC="no-such-compiler")
    assert done.returncode == 1 and wheel is None
    assert done.stderr.splitlines()[-1].endswith(
        "CannotCompile: there is no C compiler (no-such-compiler); Debian's package is gcc"
    )


@pytest.mark.usefixtures("compiler")
def test_nothing_is_left_of_a_build_that_is_interrupted(project):
    env = {**os.environ, "TMPDIR": str(project.parent / "temporary"), "KONNEKTOR_COMPILE": "auto"}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(project.parent / "wheels")]
    with subprocess.Popen(command, cwd=project, env=env, stderr=subprocess.PIPE, start_new_session=True) as building:
        while not list((project.parent / "temporary").glob("*/setup.py")) and building.poll() is None:
            time.sleep(0.01)
        os.killpg(building.pid, signal.SIGINT)
        building.communicate(timeout=50)
    assert building.returncode != 0
    assert not list((project.parent / "temporary").glob("konnektor-build-*"))


def test_it_can_be_left_as_it_is(project):
    done, wheel = build(project, "never")
    assert done.returncode == 0 and "compiled" not in done.stdout + done.stderr
    assert wheel.name == "small-1-py3-none-any.whl"


def test_a_wrong_word_is_refused(project):
    done, wheel = build(project, "sometimes")
    assert done.returncode == 1 and wheel is None
    assert "KONNEKTOR_COMPILE is 'sometimes', but must be auto, always or never" in done.stderr


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("how", "needs"), [(None, ["mypy", "h11"]), ("never", [])])
def test_a_compiler_for_python_is_fetched_only_to_compile(project, how, needs):
    env = {key: value for key, value in os.environ.items() if key != "KONNEKTOR_COMPILE"}
    if how is not None:
        env["KONNEKTOR_COMPILE"] = how
    code = "from hatchling.build import get_requires_for_build_wheel as needs; print(needs())"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=project, env=env, text=True).strip() == str(needs)
    env["CC"] = "no-such-compiler"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=project, env=env, text=True).strip() == "[]"


def test_every_module_that_is_to_be_compiled_is_there():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert (ROOT / "hatch_build.py").is_file() and settings["hooks"]["custom"]["modules"]
    for module in settings["hooks"]["custom"]["modules"]:
        assert (ROOT / "konnektor" / module).is_file()
