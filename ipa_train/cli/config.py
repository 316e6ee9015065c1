"""Composing configs, with the composer's complaints in one line each."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ipa_train.cli.binding import check_targets
from ipa_train.errors import ConfigError, did_you_mean

_RANGE = r"\{\d+\.\.\d+\}"
_PART = r"(?:[^,\[\]{}:]|:(?! ))"  # of a path or URL that may stand in a list or behind a name in a dictionary
_PATH_WITH_RANGE = re.compile(rf"(?! )(?:{_PART}*{_RANGE})+{_PART}*")
_PACKAGE = Path(__file__).parents[1]


def shipped(folder: str) -> Path:
    """A folder that comes with the package: inside it where it is installed, beside it in a checkout."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def config_folder() -> Path:
    """The shipped configs."""
    return shipped("conf")


def load_config(overrides: Sequence[str], *, config_dir: str | None = None) -> DictConfig:
    """Compose ``train.yaml`` with ``key=value`` overrides, and check every option against its class.

    ``config_dir`` adds a folder of the user's own, with ``experiment/*.yaml`` and other groups.

    Raises:
        ConfigError: one line that names the key or option, and the closest one that exists.
    """
    with one_line_errors(overrides, config_dir):
        config = _compose(overrides, config_dir)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(_not_set(missing[0]))
        _check_run(config)
        OmegaConf.resolve(config)
    check_targets(config)
    return config


def run_path(overrides: Sequence[str], *, config_dir: str | None = None) -> Path:
    """Where the run of ``ipa train`` with these overrides lies; nothing but its name is looked at.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    with one_line_errors(overrides, config_dir):
        return Path(_compose(overrides, config_dir).run.path)


def _compose(overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides_for_hydra(overrides, config_dir))


def overrides_for_hydra(overrides: Sequence[str], config_dir: str | None) -> list[str]:
    """What the composer understands of the user's words.

    Raises:
        ConfigError: a folder that is not there, or a word that is no override.
    """
    extra = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder.")
        extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"{override!r} is no override: write key=value, e.g. run.name=first.")
    return [*extra, *map(_quote_ranges, overrides)]


@contextmanager
def one_line_errors(overrides: Sequence[str], config_dir: str | None) -> Iterator[None]:
    """Say in one line what the composer complains of, as a ConfigError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides, config_dir)) from error


def _quote_ranges(override: str) -> str:
    """Quote ``{00000..00010}``, which Hydra would take for a dictionary: the user's own quotes went to the shell."""
    key, equals, value = override.partition("=")
    if "'" in value or '"' in value:
        return override
    return key + equals + _PATH_WITH_RANGE.sub(r"'\g<0>'", value)


def _check_run(config: DictConfig) -> None:
    """The few options that no constructor sees before the run directory is made."""
    if type(config.seed) is not int or not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed={config.seed} does not fit: give a whole number from 0 to {2**32 - 1}.")
    config.run.name = str(config.run.name)  # a number is a name too
    if not config.run.name.strip():
        raise ConfigError("run.name is empty: give the run a name, e.g. run.name=first.")


def _not_set(key: str) -> str:
    return f"{key} is not set: add {key}=... to the command."


def _explain(error: Exception, overrides: Sequence[str], config_dir: str | None) -> str:
    """Turn the composer's own words into one line with the closest name that exists."""
    text = str(error)
    if match := re.search(r"Missing mandatory value: ([\w.]+)", text):
        return _not_set(match[1])
    if match := re.search(r"Could not override '([\w./@-]+)'", text):
        key = match[1]
        keys = _known_keys(overrides)
        siblings = [k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
        tops = [k for k in keys if "." not in k]
        known = siblings or difflib.get_close_matches(key, keys) or tops
        return f"there is no option {key!r}.{did_you_mean(key, known)}"
    if match := re.search(r"Could not find '(?:[\w/]*/)?(\w+)/([^'/]*)'", text):
        group, choice = match[1], match[2]
        folders = [config_folder(), *([Path(config_dir)] if config_dir else [])]
        known = [p.stem for folder in folders for p in (folder / group).glob("*.yaml")]
        return f"{group}={choice}: there is no {group}/{choice}.yaml.{did_you_mean(choice, known)}"
    if match := re.search(r"Could not find '(\w+)'", text):
        return f"there is no group or option {match[1]!r}.{did_you_mean(match[1], _known_keys(overrides))}"
    if match := re.search(r"Multiple values for (\w+)", text):
        return f"{match[1]} may be chosen once: write {match[1]}=NAME, without '+'."
    return f"cannot read the overrides: {' '.join(text.split())}"


def _known_keys(overrides: Sequence[str]) -> list[str]:
    """Every key that exists with the groups that the overrides choose, so far as these exist themselves."""
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        choices = [o for o in overrides if (config_folder() / o.replace("=", "/", 1)).with_suffix(".yaml").is_file()]
        config = hydra.compose("train", choices)

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for key in map(str, node):
            yield f"{prefix}{key}"
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                yield from walk(child, f"{prefix}{key}.")

    return list(walk(config, ""))
