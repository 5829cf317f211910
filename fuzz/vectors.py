"""The test vectors as seeds."""

import json
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "tests" / "vectors"


def load(name: str) -> Iterator[bytes]:
    """The bytes of each vector of a file."""
    for vector in json.loads((FOLDER / f"{name}.json").read_text()):
        yield b"".join(bytes.fromhex(p) if isinstance(p, str) else bytes.fromhex(p[0]) * p[1] for p in vector["bytes"])
