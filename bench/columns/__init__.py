"""What is measured, in the order of the tables."""

from __future__ import annotations

from bench.columns import beside, bulk, first_byte, long_path, memory, requests, streams, workers
from bench.columns.column import Column, Figure, Figures

__all__ = ["COLUMNS", "Column", "Figure", "Figures"]

COLUMNS: dict[str, Column] = {
    column.name: column
    for module in (bulk, requests, beside, first_byte, long_path, memory, streams, workers)
    for column in module.COLUMNS
}
