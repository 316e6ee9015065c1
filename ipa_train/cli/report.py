"""Draw one page of a run: curves, sample grids, image-use gap, drop rates, bad data, options, and links to exports.

    ipa report outputs/first

The page is one file that needs no account and no network, and may be looked at while the run goes on.
"""

import argparse
import sys
from pathlib import Path

from ipa_train.errors import ConfigError
from ipa_train.runtime.files import atomic_write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("run", type=Path, help="the run's folder, outputs/RUN_NAME")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the run's folder")


def run(args: argparse.Namespace) -> int:
    """Draw, and say where it is."""
    from ipa_train.eval.run_report import draw_run

    path: Path = args.out or args.run / "report.html"
    page = draw_run(args.run, page_folder=path.parent)
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot write there: {error.strerror or error}.") from error
    sys.stdout.write(f"{path}\n")
    return 0
