"""Both endpoints as processes, traffic of all kinds, and a path that breaks at random moments; see bench/faults.py."""

import random

import pytest

from bench.faults import trial


@pytest.mark.timeout(120)
async def test_nothing_is_lost_when_the_connection_breaks_again_and_again(tmp_path):
    seed = random.randrange(10**6)
    outcome = await trial(tmp_path, cuts=20, megabytes=20, seed=seed)
    assert outcome.wrong == [], f"seed {seed}"
    assert outcome.cuts >= 20 and outcome.resumed and outcome.bytes > 20_000_000
