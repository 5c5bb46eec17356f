"""The engine on a GPU, in one table: `make check-gpu`.

Needs PyTorch, transformers, accelerate, NumPy, psutil, httpx and typer, and this folder on the path: mat-steer itself
need not be installed. Tests, HTTP and pyvene are skipped where what they need is not there; but for pyvene and two GPUs
the table then says that something wanted is missing. Each part has a time limit and runs in a process that can be lost;
figures are written as they come. `--device cpu --shape tiny` tries all of it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from benchmarks.gpu.figures import Report, line
from benchmarks.gpu.plan import PARTS, SIZES
from benchmarks.gpu.worker import Options, PartFailed, Skipped, Worker

LIMIT = 465  # seconds: of eight minutes, without what ending a part and deleting its files take
ROOT = Path(__file__).parents[2]
WIDTHS = [10, 50, 16, 8, 6, 0]  # of a line that is told as it comes


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 where nothing can be measured, with --check also where a figure is missed or missing."""
    parts = "\n".join(f"  {name.ljust(12)}{part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=f"{__doc__}\nparts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="fail where a figure is missed or a part is not measured")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas between; default: all")
    parser.add_argument("--shape", default="8B", choices=SIZES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all (default: %(default)s)")
    parser.add_argument("--commit", help="that is measured, where there is no git here")
    parser.add_argument(
        "--out",
        type=Path,
        help=".json, .md, .log; default: benchmarks/results/gpu for all parts at 8B on CUDA, else runs/gpu-SHAPE-PARTS",
    )
    args = parser.parse_args(argv)
    chosen = args.parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    judged = args.shape == "8B" and args.device.startswith("cuda")
    optional = frozenset(name for name, part in PARTS.items() if part.optional)
    report = Report(args.out or _place(args.shape, chosen, judged), judged, optional)
    report.out.parent.mkdir(parents=True, exist_ok=True)
    log = report.out.with_suffix(".log")
    log.write_text("")
    commit = args.commit or _commit()
    end = time.monotonic() + args.limit
    with (
        tempfile.TemporaryDirectory() as scratch,
        Worker(Options(args.device, args.shape, Path(scratch), log)) as worker,
    ):
        try:
            worker.look(args.limit)
        except PartFailed as failed:
            print(f"nothing can be measured here: {failed} ({log} says more)")
            return 1
        try:
            for name in chosen:
                measure(name, worker, report, end)
                report.machine = {"commit": commit, **worker.machine}
                report.write()
        finally:  # also where it is interrupted, or the disk is full
            print(f"\n{report.table()}\n\n{report.out.with_suffix('.md')}")
    return int(args.check and bool(report.missed or report.troubles or report.missing))


def _place(shape: str, chosen: Sequence[str], judged: bool) -> Path:
    """Where the figures are written: what is committed is the whole of it."""
    whole = set(chosen) == set(PARTS)
    if judged and whole:
        return Path("benchmarks/results/gpu")
    return Path("runs", "-".join(["gpu", *([] if judged else [shape]), *([] if whole else chosen)]))


def measure(name: str, worker: Worker, report: Report, end: float) -> None:
    """Runs one part, as long as its limit and the time that is left allow. Raises nothing."""
    start = time.monotonic()
    limit = min(PARTS[name].limit, end - start)
    try:
        if limit <= 0:
            raise PartFailed("no time was left")
        with closing(worker.figures(PARTS[name].function, limit)) as figures:
            for figure in figures:
                report.add(name, figure)
                print(line(report.row(name, figure), WIDTHS), flush=True)
    except Skipped as skipped:
        report.skipped[name] = str(skipped)
        print(f"{name}: skipped: {skipped}", flush=True)
    except Exception as error:  # the parts that follow are to be measured
        report.troubles[name] = str(error) if isinstance(error, PartFailed) else f"{type(error).__name__}: {error}"
        print(f"{name}: failed: {report.troubles[name]}", flush=True)
    report.seconds[name] = round(time.monotonic() - start, 1)


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
