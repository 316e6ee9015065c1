"""Say in which folder a run lies: scripts need it, whose run.name or run.path may come from a config file.

    ipa where experiment=sd15_linear run.name=first data.shards=/data/laion
    tail -f "$(ipa where run.name=first)"/metrics.csv

Takes what `ipa train` takes, looks at nothing else of it, and needs a second.
"""

import argparse
import sys

from ipa_train.cli.config import run_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for ipa train")
    parser.add_argument("--config-dir", help="folder with experiment/*.yaml files of your own")


def run(args: argparse.Namespace) -> int:
    """Print the folder, relative to the working directory unless ``run.path`` says otherwise."""
    sys.stdout.write(f"{run_path(args.overrides, config_dir=args.config_dir)}\n")
    return 0
