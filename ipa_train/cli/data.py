"""Tools over shards, one file each in data_tools/; `ipa data TOOL --help` says more.

ipa data index '/data/laion/{00000..41000}.tar'
"""

import argparse
import importlib

TOOLS = {
    "download": "download the pictures of url lists into shards, with img2dataset",
    "filter": "choose rows of metadata, or exclude samples of shards by theirs",
    "dedup": "find pictures that come twice, and exclude all but the largest",
    "index": "find every sample, and every fault of the files",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every tool's arguments."""
    tools = parser.add_subparsers(required=True, metavar="TOOL", dest="tool")
    for name, summary in TOOLS.items():
        module = importlib.import_module(f"data_tools.{name}")
        tool = tools.add_parser(name, help=summary, description=module.__doc__)
        tool.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(tool)
        tool.set_defaults(tool_module=module)


def run(args: argparse.Namespace) -> int:
    """Run the tool."""
    return int(args.tool_module.run(args))
