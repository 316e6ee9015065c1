"""The command itself: verbs, exit statuses, and how an error shows."""

import subprocess
import sys

import pytest

from ipa_train.cli import main as command
from ipa_train.cli.main import VERBS, load_verb, main
from ipa_train.errors import ConfigError


@pytest.fixture
def failing_verb(monkeypatch):
    """A function that makes `ipa import` raise an error."""

    def fail_with(error):
        module, parser = load_verb("import")

        def run(args):
            raise error

        monkeypatch.setattr(module, "run", run)
        monkeypatch.setattr(command, "load_verb", lambda verb: (module, parser))

    return fail_with


def test_help_and_version_need_no_torch():
    code = (
        "import sys; from ipa_train.cli.main import main\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0 and main(['trian']) == 2\n"
        "assert not {'torch', 'lightning', 'hydra'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(verb in done.stdout for verb in VERBS)
    assert done.stderr == "ipa: there is no verb 'trian'. Did you mean 'train'?\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capfd):
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0
    assert f"usage: ipa {verb}" in capfd.readouterr().out


def test_a_users_mistake_is_one_line(failing_verb, capfd, monkeypatch):
    failing_verb(ConfigError("too\n  much"))
    assert main(["import", "x"]) == 2
    assert capfd.readouterr().err == "ipa import: too much\n"
    monkeypatch.setenv("IPA_DEBUG", "1")
    with pytest.raises(ConfigError):
        main(["import", "x"])


def test_one_node_alone_can_say_what_it_lacks(failing_verb, capfd, monkeypatch):
    failing_verb(ConfigError("no such folder"))
    monkeypatch.setenv("SLURM_PROCID", "7")
    assert main(["import", "x"]) == 2
    assert capfd.readouterr().err == "ipa import (rank 7): no such folder\n"


def test_an_interrupt_is_no_traceback_and_a_fault_of_ours_is(failing_verb):
    failing_verb(KeyboardInterrupt())
    assert main(["import", "x"]) == 130
    lightnings = SystemExit(1)
    lightnings.__context__ = KeyboardInterrupt()
    failing_verb(lightnings)
    assert main(["import", "x"]) == 130
    failing_verb(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["import", "x"])
