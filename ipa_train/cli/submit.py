"""Train on a Slurm cluster: hand slurm/train.sbatch to sbatch, once it is known that the options fit.

    ipa submit experiment=sdxl_plus run.name=big data.shards='/data/laion/{00000..41000}.tar' --nodes 8

Takes what `ipa train` takes. The script is that of slurm/ in the working directory, where a site has its own, else the
one that comes with the package; what is not asked for here is as the script has it. The same command again goes on.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ipa_train.cli.config import load_config, shipped
from ipa_train.errors import ConfigError

_RESOURCES = ("nodes", "gpus_per_node", "time", "partition", "account")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for ipa train")
    parser.add_argument("--config-dir", help="folder with experiment/*.yaml files of your own")
    parser.add_argument("--nodes", type=int, help="how many")
    parser.add_argument("--gpus-per-node", type=int, help="processes per node, one for each")
    parser.add_argument("--time", help="limit, e.g. 12:00:00; a run that reaches it saves and goes back to the queue")
    parser.add_argument("--partition", help="of the cluster")
    parser.add_argument("--account", help="that pays")
    parser.add_argument("--dry-run", action="store_true", help="print the command and the script instead")


def run(args: argparse.Namespace) -> int:
    """Submit, and print the job's number."""
    config = load_config(args.overrides, config_dir=args.config_dir)
    script = _script()
    command = ["sbatch", "--parsable", f"--job-name={re.sub(r'[^A-Za-z0-9_.-]', '-', config.run.name)}"]
    for name in _RESOURCES:
        if (value := getattr(args, name)) is not None:
            command.append(f"--{name.replace('_', '-')}={value}")
    command.append(str(script))
    if args.config_dir is not None:
        command.append(f"--config-dir={args.config_dir}")
    command += args.overrides
    if args.dry_run:
        sys.stdout.write(f"IPA_SLURM={shlex.quote(str(script.parent))} {shlex.join(command)}\n\n{script.read_text()}")
        return 0
    job = _submit(command, script.parent)
    sys.stdout.write(f"job {job} is in the queue (squeue --job {job}); the run lies in {config.run.path}\n")
    return 0


def _script() -> Path:
    own = Path("slurm/train.sbatch")
    return own.resolve() if own.is_file() else shipped("slurm") / own.name


def _submit(command: list[str], folder: Path) -> str:
    if shutil.which(command[0]) is None:
        raise ConfigError("there is no sbatch here: submit from a node of the cluster, or look at it with --dry-run.")
    environment = {**os.environ, "IPA_SLURM": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # the name of the cluster may follow
