"""Tools over shards, one file each in data_tools/; `ipa data TOOL --help` says more.

ipa data index '/data/laion/{00000..41000}.tar'
"""

import argparse
import importlib

TOOLS = {
    "filter": "choose rows of metadata, or exclude samples of shards by theirs",
    "download": "download the pictures of url lists into shards, with img2dataset",
    "pack": "pictures and captions of a folder, JSON list or table into shards",
    "index": "find every sample, and every fault of the files",
    "validate": "read and decode every sample; notice bytes that changed",
    "stats": "sizes, captions and scores of a data set on one page",
    "dedup": "find pictures that come twice, and exclude all but the largest",
    "reshard": "rewrite shards for cheaper training: resized, shuffled, by aspect bucket",
    "encode": "run the frozen encoders once, and train on what they gave",
}
_WITH_A_CONFIG = ("encode",)  # composed as for training, and only the command line knows how


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every tool's arguments."""
    tools = parser.add_subparsers(required=True, metavar="TOOL", dest="tool")
    for name, summary in TOOLS.items():
        package = "ipa_train.cli" if name in _WITH_A_CONFIG else "data_tools"
        module = importlib.import_module(f"{package}.{name}")
        tool = tools.add_parser(name, help=summary, description=module.__doc__)
        tool.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(tool)
        tool.set_defaults(tool_module=module)


def run(args: argparse.Namespace) -> int:
    """Run the tool."""
    return int(args.tool_module.run(args))
