"""``ipa VERB ...``: one verb per job; each lives in the module of this package that has its name.

What the exit status says, for schedulers and scripts:

    0         done. A run that had finished before is done too where Slurm starts it once more
    2         a mistake of the user's: another start ends in the same way
    70        `ipa train` ended itself as no step did (callbacks.watchdog): start again
    75        `ipa train` stopped when told, with a checkpoint: start again
    76        `ipa train` was taken over by a newer start of the same job: leave it
    130       Ctrl-C
    138, 143  SIGUSR1 or SIGTERM, before `ipa train` could listen, or to another verb
    others    a crash
"""

import argparse
import importlib
import keyword
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TextIO

from ipa_train.errors import TakenOverError, UserError, did_you_mean
from ipa_train.runtime import preemption
from ipa_train.runtime.launch import launched_rank
from ipa_train.version import __version__

VERBS = {
    "train": "train an adapter; the same command again resumes",
    "check": "try everything a training run needs, before it waits in a queue",
    "submit": "train on a Slurm cluster",
    "where": "say in which folder a run lies",
    "export": "write a checkpoint's adapter for diffusers, ComfyUI and Tencent's code",
    "report": "draw one page of a run: curves, samples, data errors, options",
    "workspace": "lay out a Weights & Biases project",
    "push": "upload an export with its model card to the Hugging Face hub",
    "import": "say what an adapter file is, and who can load it",
    "sample": "generate pictures with an adapter file",
    "play": "try an adapter in a web page",
    "eval": "score an adapter file by the paper's protocol, with a report",
    "data": "tools over shards: index, pack, validate and more",
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status.

    Without ``argv`` it is the command of this process, which answers signals then; else they are left to the caller.
    """
    if argv is None and sys.argv[1:2] == ["train"]:
        preemption.listen()  # first: a signal that comes earlier ends the process
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        _write(sys.stdout, _help())
        return 0 if argv else EXIT_USER_ERROR
    if argv[0] == "--version":
        _write(sys.stdout, __version__)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        _write(sys.stderr, f"ipa: there is no verb {verb!r}.{did_you_mean(verb, VERBS)}")
        return EXIT_USER_ERROR
    _silence_imports()
    try:
        module, parser = load_verb(verb)
        return int(module.run(parse(parser, rest)))
    except UserError as error:
        if os.environ.get("IPA_DEBUG"):
            raise
        # Marked and not muted: a path may be missing on one node alone.
        who = f" (rank {launched_rank()})" if launched_rank() else ""
        _write(sys.stderr, f"ipa {verb}{who}: {' '.join(str(error).split())}")
        return preemption.EXIT_TAKEN_OVER if isinstance(error, TakenOverError) else EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes exit(1) of it
            return EXIT_INTERRUPTED
        raise


def load_verb(verb: str) -> tuple[ModuleType, argparse.ArgumentParser]:
    """Import a verb's module, with all that it needs, and make its parser."""
    module = importlib.import_module(f"ipa_train.cli.{verb}{'_' if keyword.iskeyword(verb) else ''}")
    parser = argparse.ArgumentParser(prog=f"ipa {verb}", description=module.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)
    return module, parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """As ``parse_args``, but overrides may also stand behind options, where argparse would not look for them."""
    parsed, rest = parser.parse_known_args(arguments)
    if "overrides" in parsed and not any(argument.startswith("-") for argument in rest):
        parsed.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return parsed


def _silence_imports() -> None:
    """Mute, before they are imported, what libraries say that no user of ours can do anything about."""
    if launched_rank() or not sys.stderr.isatty():
        # The libraries draw a bar for every folder they load, on every rank and into log files too.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # transformers offers torchvision for image processors; ours are those of PIL, as the released adapters' were.
    logging.getLogger("transformers.utils.import_utils").addFilter(
        lambda record: "requires torchvision" not in record.getMessage()
    )
    # It lists the other half of a CLIP, where one half is wanted; what is missing, the loaders say themselves.
    logging.getLogger("transformers.modeling_utils").addFilter(
        lambda record: "LOAD REPORT" not in record.getMessage() or "MISSING" in record.getMessage()
    )
    # Where it is installed, transformers imports it; and it says on stdout, among results, that there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def _help() -> str:
    lines = ["Usage: ipa VERB ...   (ipa VERB --help says more)", ""]
    return "\n".join([*lines, *(f"  {verb:<10}{what}" for verb, what in VERBS.items())])


def _write(stream: TextIO, text: str) -> None:
    stream.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
