"""metrics.csv in the run folder: one row for each logged step, kept across resumes."""

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class CSVLogger(Logger):
    """Appends to `FOLDER/metrics.csv`; columns are `step`, then the metrics in order of appearance.

    Lightning's own logger deletes what it finds in the folder. This one keeps the rows of the run
    that it continues, and drops those past the step from which it continues (`forget_after`).

    Args:
        folder: run folder.
    """

    def __init__(self, folder: str):
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        self.columns: list[str] = ["step"]
        self.num_written = 0
        self.columns_written = 0
        self.loaded = False

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: config.yaml has them."""

    def load(self) -> None:
        """Read the rows of the run that this one continues."""
        self.loaded = True
        if not self.path.is_file():
            return
        with self.path.open(newline="") as stream:
            for row in csv.DictReader(stream):
                try:
                    step = int(row["step"])
                except (KeyError, TypeError, ValueError):
                    continue  # the last line of a killed run may be cut off
                values = {key: value for key, value in row.items() if key and value}
                self.rows.append({**values, "step": step})
                self.columns += [key for key in values if key not in self.columns]

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drop the rows past a step: the run goes on from there and writes them anew."""
        if not self.loaded:
            self.load()
        self.rows = [row for row in self.rows if row["step"] <= step]
        self.num_written = 0

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of a step; rows of earlier steps are then complete and written."""
        if not self.loaded:
            self.load()
        step = 0 if step is None else step
        values = {key: float(value) for key, value in metrics.items() if key != "epoch"}
        self.columns += [key for key in values if key not in self.columns]
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(values)
            if self.num_written == len(self.rows):
                self.num_written = 0  # that row is in the file already: write the file anew
        else:
            self.write(len(self.rows))
            self.rows.append({"step": step, **values})

    def write(self, stop: int) -> None:
        """Append rows up to `stop`; write the whole file anew when a column or a resume asks."""
        whole = self.num_written == 0 or self.columns_written != len(self.columns)
        if stop <= self.num_written and not whole:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.path.with_name(f".metrics.csv.{os.getpid()}") if whole else self.path
        with target.open("w" if whole else "a", newline="") as stream:
            writer = csv.DictWriter(stream, self.columns, restval="")
            if whole:
                writer.writeheader()
            writer.writerows(self.rows[0 if whole else self.num_written : stop])
        if whole:
            os.replace(target, self.path)
        self.num_written = stop
        self.columns_written = len(self.columns)

    @rank_zero_only
    def save(self) -> None:
        """Write every row."""
        if self.rows:
            self.write(len(self.rows))

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """A run that goes on from the checkpoint must find the rows of the steps before it."""
        self.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
