"""Results as rows, tables, plots and one static page, made from run folders only."""

from speechssm.report.rows import (
    Comparison,
    Row,
    config_hash,
    hardware,
    read_results,
    read_rows,
    versions,
    write_rows,
)

__all__ = [
    "Comparison",
    "Row",
    "config_hash",
    "hardware",
    "read_results",
    "read_rows",
    "versions",
    "write_rows",
]
