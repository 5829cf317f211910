"""What the soak takes for wrong."""

from bench.soak import GROWTH, grown


def test_memory_that_grows_is_wrong():
    assert grown([50.0, 50.0], [50.0 + GROWTH, 40.0]) == []
    assert grown([50.0, 50.0], [50.0, 58.5]) == ["the worker grew from 50.0 to 58.5 MB in the second half"]
    assert len(grown([50.0, 50.0], [60.0, 60.0])) == 2
