"""The two endpoints of the demonstration as processes of their own, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Final

__all__ = ["DemoError", "Endpoint"]

READY_WITHIN: Final = 20.0
STOP_WITHIN: Final = 10.0
TAIL: Final = 12
"""Lines of a log that are shown when something failed."""


class DemoError(Exception):
    """A step did not do what it should; the text says what was seen."""


class Endpoint:
    """``python -m konnektor`` with the arguments given; its log goes to a file.

    In a session of its own, so that Ctrl-C reaches the demonstration alone, which ends its processes itself.

    Attributes:
        name: what to call it.
        ready: the words of its ready line, after it has started: ``{"tunnel": "127.0.0.1:4711", ...}``.
        forwards: the addresses its forwards listen on, in the order they were given.
    """

    def __init__(self, name: str, arguments: list[str], log: Path) -> None:
        self.name = name
        self.ready: dict[str, str] = {}
        self.forwards: list[str] = []
        self._arguments = arguments
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts it and waits for its ready line.

        Raises:
            DemoError: it ended, or took too long.
        """
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "konnektor", *self._arguments,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(READY_WITHIN):
                line = (await self._process.stdout.readline()).decode()
        except TimeoutError:
            raise DemoError(f"the {self.name} was not ready within {READY_WITHIN:.0f} s") from None
        if not line.startswith("ready "):
            status = await self._process.wait()
            raise DemoError(f"the {self.name} ended with status {status} before it was ready")
        for word in line.split()[1:]:
            key, _, value = word.partition("=")
            self.ready[key] = value
            if key == "forward":
                self.forwards.append(value.partition("->")[0])

    def terminate(self) -> None:
        """SIGTERM: it drains, and then ends."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()

    async def wait(self) -> int:
        """Its exit status.

        Raises:
            DemoError: it goes on for too long.
        """
        assert self._process is not None
        try:
            async with asyncio.timeout(STOP_WITHIN):
                return await self._process.wait()
        except TimeoutError:
            raise DemoError(f"the {self.name} did not end within {STOP_WITHIN:.0f} s of SIGTERM") from None

    async def stop(self) -> None:
        """Ends it, whatever it takes."""
        if self._process is None:
            return
        self.terminate()
        with contextlib.suppress(DemoError):
            await self.wait()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def log_lines(self) -> list[str]:
        """What it has logged so far."""
        try:
            return self._log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []

    async def logged(self, words: str, within: float = 5.0) -> str:
        """The first line of the log with these words, as soon as there is one.

        Raises:
            DemoError: there is none in time.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while True:
                    line = next((line for line in self.log_lines() if words in line), None)
                    if line is not None:
                        return line
                    await asyncio.sleep(0.02)
        raise DemoError(f"the log of the {self.name} has no line with {words!r}")

    def tail(self) -> str:
        """The end of its log, for a failure."""
        lines = self.log_lines()[-TAIL:] or ["(empty)"]
        return "\n".join([f"the log of the {self.name} ends:", *(f"  {line}" for line in lines)])
