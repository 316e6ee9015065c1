"""Holding a config against the signatures that it names: constructors are the schema."""

import importlib
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ipa_train.errors import ConfigError, UserError, did_you_mean

# Options that are known only when the models are there.
_FILLED_IN = {"data": ("image_prompt_size", "embedding_shape")}
_EXTRAS = {"bitsandbytes": "low-bit"}
"""Packages that shipped configs name and that are installed on demand, and the extra that brings each."""
_SCALARS: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}


def check_targets(config: DictConfig) -> None:
    """Bind every ``_target_`` to its signature, so that a mistake in a YAML file is found before step 0.

    Raises:
        ConfigError: an option that the target lacks, one that it needs, or a value of another type than annotated.
    """
    for path, node in _targets(config):
        target = locate(node["_target_"], path)
        parameters = inspect.signature(target).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        hints = _hints(target)
        for option in map(str, node):
            if option.startswith("_"):
                continue
            if option not in parameters and not takes_any:
                raise ConfigError(
                    f"{path}.{option}: {node['_target_']} has no such option.{did_you_mean(option, parameters)}"
                )
            value = node[option]
            if isinstance(value, DictConfig) and "_target_" in value:
                continue
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            if option in hints and not fits(value, hints[option]):
                shown = "null" if value is None else value
                raise ConfigError(f"{path}.{option}={shown} does not fit: give {_in_words(hints[option])}.")
        if not node.get("_partial_") and not takes_any:
            later = _FILLED_IN.get(path, ())
            required = [p.name for p in parameters.values() if p.default is p.empty and p.name not in node]
            if missing := [name for name in required if name not in later]:
                raise ConfigError(f"{path}.{missing[0]}: {node['_target_']} needs it; set {path}.{missing[0]}=...")


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
    if extra := _EXTRAS.get(parts[0]):
        raise ConfigError(f"{path}._target_={name} needs the package {parts[0]!r}: pip install 'ipa-train[{extra}]'.")
    raise ConfigError(f"{path}._target_={name}: there is no module of that name.")


def instantiate(node: Any, **extra: Any) -> Any:
    """Build what a node describes; constructors get plain containers.

    Raises:
        ConfigError and the other user errors: as the constructor worded them. What a constructor of another library
            refuses is taken for a mistake in the config too; from our own it would be a fault of ours, and stays as is.
    """
    try:
        return hydra.utils.instantiate(node, _convert_="all", **extra)
    except HydraException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        # Imported here, as this module is also there for verbs that need no torch.
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        foreign = not node["_target_"].startswith("ipa_train.")
        if foreign and isinstance(cause, (TypeError, ValueError, ModuleNotFoundError, MisconfigurationException)):
            raise ConfigError(f"{node['_target_']}: {cause}") from error
        raise


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain YAML ``value`` is of the annotated type; what cannot be told counts as fitting."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint in _SCALARS:
        return type(value) in _SCALARS[hint]
    if origin is tuple and Ellipsis not in arguments:
        same_length = isinstance(value, list) and len(value) == len(arguments)
        return same_length and all(fits(v, a) for v, a in zip(value, arguments, strict=True))
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and all(fits(v, arguments[0]) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_in_words, arguments))
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if hint is types.NoneType:
        return "null"
    return hint.__name__ if isinstance(hint, type) and not arguments else str(hint)


def _hints(target: Any) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # annotated with names of packages that are not installed
        return {}


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in map(str, node):
            yield from _targets(node[key], f"{path}.{key}" if path else key)
