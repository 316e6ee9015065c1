"""The model card of an adapter: what it is, how it was made, what it scores, how it is loaded and under which licence.

Written in Markdown with the front matter that the Hugging Face hub reads (its page "Model cards").
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from ipa_train.errors import ConfigError
from ipa_train.export.description import AdapterDescription
from ipa_train.export.loadability import loadability
from ipa_train.export.usage import hub_id, pipeline_lines
from ipa_train.export.warm_start import image_encoder_of

CARD, PICTURE = "README.md", "samples.png"
_NOT_STATED = "not stated"


@dataclass(frozen=True)
class Scores:
    """What an evaluation found, and how."""

    protocol: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Card:
    """All that a card says.

    ``metadata`` is that of the adapter's file (values as JSON), ``recipe`` further options of the run by name,
    ``has_picture`` whether :data:`PICTURE` lies beside the card, ``licence`` an identifier of the hub's.
    """

    title: str
    adapter: AdapterDescription
    metadata: Mapping[str, Any]
    dtype: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    scores: Scores | None = None
    has_picture: bool = False
    licence: str | None = None

    def __str__(self) -> str:
        """The file's text."""
        parts = [self._front_matter(), f"# {self.title}\n", self._summary()]
        if self.has_picture:
            parts.append(
                f"![Sample grid]({PICTURE})\n\n*From training: pictures and image prompts, then what the adapter made "
                "of the image prompts.*\n"
            )
        parts += ["## How to load it\n", self._usage(), "## What it is\n", _table(("", ""), self._facts())]
        parts += ["## How it was trained\n", self._training(), "## What it scores\n", self._scores()]
        parts += ["## Licence\n", self._licence()]
        return "\n".join(parts)

    @property
    def _base(self) -> dict[str, Any]:
        return _decoded(self.metadata, "base") or {}

    def _front_matter(self) -> str:
        entries: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
        entries["tags"] = ["ip-adapter", "image-prompt", "text-to-image"]
        if base := hub_id(self._base.get("name")):
            entries |= {"base_model": base, "base_model_relation": "adapter"}
        if self.licence is not None:
            entries["license"] = self.licence
        return f"---\n{yaml.safe_dump(entries, sort_keys=False)}---\n"

    def _summary(self) -> str:
        tokens, base = self.adapter.num_tokens, self._base.get("name", "a base that is not stated")
        return (
            f"An [IP-Adapter](https://arxiv.org/abs/2308.06721) for {base}: "
            f"with it an image is a part of the prompt. {self.adapter.num_parameters:,} parameters; the image becomes "
            f"{f'{tokens} tokens' if tokens else 'one token for each hidden state of its encoder'}.\n"
        )

    def _usage(self) -> str:
        identity = image_encoder_of(self.metadata)
        verdicts = [
            (verdict.loader, "yes" + f", {verdict.note}" * bool(verdict.note) if verdict.ok else f"no: {verdict}")
            for verdict in loadability(self.adapter, identity)
        ]
        text = _table(("loader", "takes it"), verdicts)
        if identity:
            shortcut = self.metadata.get("shortcut") == "true"
            lines = pipeline_lines(self._base.get("name"), identity, self.adapter, shortcut=shortcut)
            text = f"In diffusers, where `ip_adapter.safetensors` lies:\n\n```python\n{lines}```\n\n{text}"
        if any(verdict.loader.startswith("ComfyUI") and verdict.ok for verdict in loadability(self.adapter, identity)):
            text += (
                "\nIn ComfyUI: put `ip_adapter.safetensors` into `models/ipadapter` and the image encoder into "
                "`models/clip_vision`, and load them with the nodes *IPAdapter Model Loader* and *Load CLIP Vision*.\n"
            )
        return text

    def _facts(self) -> Iterator[tuple[str, str]]:
        adapter, identity = self.adapter, image_encoder_of(self.metadata)
        yield "base", str(self._base.get("name", _NOT_STATED))
        if prediction := self._base.get("prediction_type"):
            yield "prediction", str(prediction)
        name = "/".join(filter(None, (identity.get("name"), identity.get("subfolder"))))
        yield "image encoder", name or _NOT_STATED
        if sha256 := identity.get("weights_sha256"):
            yield "its weights' SHA-256", str(sha256)
        yield "image features", " and ".join(adapter.feature_kinds)
        yield "variant", adapter.variant
        yield "image tokens", "one for each hidden state" if adapter.num_tokens is None else str(adapter.num_tokens)
        yield "attention sites", str(len(adapter.site_dims))
        yield "precision of the file", self.dtype

    def _training(self) -> str:
        rows = list(self.recipe.items())
        rows += [
            (title, _in_words(value))
            for key, title in _RECIPE.items()
            if (value := _decoded(self.metadata, key)) is not None
        ]
        return _table(("", ""), rows) if rows else "The file does not say.\n"

    def _scores(self) -> str:
        if self.scores is None:
            return "Not evaluated.\n"
        return f"{_table(self.scores.columns, self.scores.rows)}\n{self.scores.protocol}\n"

    def _licence(self) -> str:
        stated = "Not stated." if self.licence is None else f"These weights: {self.licence}."
        return f"{stated} The base model and the image encoder have licences of their own, which hold as well.\n"


_RECIPE = {
    "step": "optimizer steps",
    "ema": "averaged weights",
    "dropout": "drop rates",
    "objective": "objective",
    "timesteps": "timesteps",
    "optimizer": "optimizer",
    "lr_schedule": "learning rate schedule",
    "seed": "seed",
    "ipa_train_version": "ipa-train",
}


def _decoded(metadata: Mapping[str, Any], key: str) -> Any:
    value = metadata.get(key)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:  # a plain text, as the version is
        return value


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(entry)}" for name, entry in value.items() if entry is not None)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _table(header: Sequence[str], rows: Iterator[tuple[str, str]] | Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def require_licence(licence: str | None) -> None:
    """Refuse what cannot be an identifier of a licence.

    Raises:
        ConfigError: it holds anything else than lower-case letters, digits, dots and hyphens.
    """
    if licence is not None and not (licence and set(licence) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")):
        raise ConfigError(f"--license {licence}: give an identifier of the hub's, such as apache-2.0 or openrail.")
