"""Benchmarks: they measure and report, and never assert on time."""
