"""Composing and checking configs: the only place, with its callers in this package, that knows Hydra."""

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ipa_train.errors import ConfigError, UserError, did_you_mean

_PACKAGE = Path(__file__).parents[1]


def config_folder() -> Path:
    """The shipped configs: inside the installed package, or beside it in a checkout."""
    inside = _PACKAGE / "conf"
    return inside if inside.is_dir() else _PACKAGE.parent / "conf"


def load_config(overrides: Sequence[str], *, config_dir: str | None = None) -> DictConfig:
    """Compose ``train.yaml`` with ``key=value`` overrides, and check every option against its class.

    ``config_dir`` adds a folder of the user's own, with ``experiment/*.yaml`` and other groups.

    Raises:
        ConfigError: one line that names the key or option, and the closest one that exists.
    """
    extra = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder.")
        extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"{override!r} is no override: write key=value, e.g. run.name=first.")
    try:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = hydra.compose("train", [*extra, *overrides])
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{missing[0]} is not set: add {missing[0]}=... to the command.")
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, config_dir)) from error
    check_targets(config)
    return config


def check_targets(config: Any) -> None:
    """Bind every ``_target_`` to its signature, so that a misspelt option in a YAML file is found before step 0."""
    for path, node in _targets(config):
        target = locate(node["_target_"], path)
        signature = inspect.signature(target)
        parameters = signature.parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            continue
        for option in map(str, node):
            if not option.startswith("_") and option not in parameters:
                raise ConfigError(
                    f"{path}.{option}: {node['_target_']} has no such option.{did_you_mean(option, parameters)}"
                )
        if not node.get("_partial_"):
            required = [p.name for p in parameters.values() if p.default is p.empty and p.name not in node]
            later = _FILLED_IN.get(path, ())
            if missing := [name for name in required if name not in later]:
                raise ConfigError(f"{path}.{missing[0]}: {node['_target_']} needs it; set {path}.{missing[0]}=...")


# Options that are known only when the models are there.
_FILLED_IN = {"data": ("image_prompt_size",)}


def locate(name: str, path: str) -> Any:
    """Import what a ``_target_`` names: a class, function or class method."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError as error:
            if error.name is not None and not ".".join(parts[:split]).startswith(error.name):
                raise ConfigError(f"{path}._target_={name} needs the package {error.name!r}: install it.") from error
            continue
        for part in parts[split:]:
            if not hasattr(target, part):
                raise ConfigError(f"{path}._target_={name}: no {part!r} there.{did_you_mean(part, dir(target))}")
            target = getattr(target, part)
        return target
    raise ConfigError(f"{path}._target_={name}: there is no module of that name.")


def instantiate(node: Any, **extra: Any) -> Any:
    """Build what a node describes; constructors get plain containers and raise their own ConfigError."""
    try:
        return hydra.utils.instantiate(node, _convert_="all", **extra)
    except HydraException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in map(str, node):
            yield from _targets(node[key], f"{path}.{key}" if path else key)


def _explain(error: Exception, config_dir: str | None) -> str:
    """Turn the composer's own words into one line with the closest name that exists."""
    text = str(error)
    if match := re.search(r"Could not override '([\w./@-]+)'", text):
        key = match[1]
        keys = _all_keys()
        parent = key.rpartition(".")[0]
        known = [k for k in keys if k.rpartition(".")[0] == parent] or list(keys)
        return f"there is no option {key!r}.{did_you_mean(key, known)}"
    if match := re.search(r"Could not find '(?:[\w/]*/)?(\w+)/(\w+)'", text):
        group, choice = match[1], match[2]
        folders = [config_folder(), *([Path(config_dir)] if config_dir else [])]
        known = [p.stem for folder in folders for p in (folder / group).glob("*.yaml")]
        return f"{group}={choice}: there is no {group}/{choice}.yaml.{did_you_mean(choice, known)}"
    if match := re.search(r"Could not find '(\w+)'", text):
        return f"there is no group or option {match[1]!r}.{did_you_mean(match[1], _all_keys())}"
    return f"cannot read the overrides: {' '.join(text.split())}"


def _all_keys() -> list[str]:
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = hydra.compose("train")

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for key in map(str, node):
            yield f"{prefix}{key}"
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                yield from walk(child, f"{prefix}{key}.")

    return list(walk(config, ""))
