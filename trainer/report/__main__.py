"""``python -m trainer.report RUN_DIR``: build the report and print its summary."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer.report.build import build_report
from trainer.report.run_data import read_run
from trainer.report.summary import summarize


def main() -> int:
    """Exit code: 0 built, 1 no such run."""
    parser = argparse.ArgumentParser(description="Build plots and report of a run.")
    parser.add_argument("run_dir", type=Path, help="such as runs/demo")
    run_dir: Path = parser.parse_args().run_dir
    try:
        report_path = build_report(run_dir)
    except FileNotFoundError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    table = Table(title=f"run {run_dir.name}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, value in summarize(read_run(run_dir)).rows():
        table.add_row(label, value)
    console = Console()
    console.print(table)
    console.print(f"report: {report_path}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
