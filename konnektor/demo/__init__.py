"""The demonstration: both endpoints as real processes, real servers behind the worker, and what a tunnel is for."""

from konnektor.demo.tour import run_demo

__all__ = ["run_demo"]
