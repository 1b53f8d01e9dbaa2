"""Make a run's report again: `python -m ddil_dist.report runs/demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ddil_dist.errors import DdilError
from ddil_dist.runs import add_run, settle_run


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and print its path; exit code 2 if the directory cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m ddil_dist.report", description="Write report.html from the files of a run's directory."
    )
    add_run(parser)
    options = parser.parse_args(argv)

    from ddil_dist.report import write_report

    try:
        path = write_report(settle_run(options))
    except DdilError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
