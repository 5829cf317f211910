"""Fuzzing of the pure core with atheris, coverage-guided: ``make fuzz``.

Each target is a module with ``one(data)``, which raises if something is wrong, ``seeds()``, inputs to begin with, and
``MAX_INPUT``, bytes of the longest. None of it needs atheris, so what was found is replayed and kept as a test without it.
"""
