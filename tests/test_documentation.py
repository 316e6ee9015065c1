"""What the README and the notes tell a user to type exists, and binds."""

import re
import shlex
from pathlib import Path

import pytest

from ipa_train.cli.config import load_config
from ipa_train.cli.main import load_verb, parse

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "data_tools" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "conf" / "experiment").glob("*.yaml")),
    *sorted((ROOT / "ipa_train" / "cli").glob("*.py")),
    *sorted((ROOT / "data_tools").glob("*.py")),
]
COMMANDS = sorted(
    {
        line.strip().removeprefix("#").strip().removeprefix("Command:").strip()
        for page in PAGES
        for line in re.sub(r"\\\n\s*", "", page.read_text()).splitlines()
        if re.match(r"(#\s*Command:\s*|\s*)ipa (train|check|export|import|sample|play|eval|data) -*[\w./']", line)
    }
)


def test_there_are_commands():
    assert {command.split()[1] for command in COMMANDS} >= {"train", "check", "export", "sample"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_right(command):
    _, verb, *rest = shlex.split(command, comments=True)
    _, parser = load_verb(verb)
    arguments = parse(parser, rest)
    if "overrides" in arguments:
        load_config(["run.name=x", *arguments.overrides])


def test_options_are_right():
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    (table,) = (block for block in blocks if "logger=wandb" in block)
    options = re.findall(r"[\w.]+=\S+", table)
    assert len(options) > 5
    load_config(["run.name=x", "data.shards=y", *(option.rstrip(";,") for option in options)])


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = "".join((ROOT / page).read_text() for page in ("README.md", "CONTRIBUTING.md", ".ci/run"))
    named = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", text, re.MULTILINE))
    assert {a or b for a, b in named} <= set(targets)
    assert {"test", "demo"} <= {a or b for a, b in named}


def test_python_in_the_readme_compiles():
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    compile(snippet, "README.md", "exec")
