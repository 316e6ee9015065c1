"""What the model card of `ipa export --card` takes from a run and from `ipa eval`, beside the adapter's file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ipa_train.errors import CheckpointError
from ipa_train.eval.summary import SCORES, Summary
from ipa_train.export.card import Scores

_PROTOCOL = (
    "By `ipa eval`: {data_set}; {num_pictures:,} image prompts, {num_samples} samples each, {text}; {sampler}, "
    "{num_inference_steps} steps, guidance {guidance_scale:g}, seed {seed}; by CLIP {clip}, DINO {dino}, for FID "
    "{fid_network}. Intervals are of 95 %, over image prompts."
)


def run_of(source: Path) -> Path | None:
    """The folder of the run that a run's folder or one of its checkpoints belongs to, None for anything else."""
    candidates = (source, *source.absolute().parents[:2])
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def read_recipe(run: Path) -> dict[str, str]:
    """What the run's config says of its training and the adapter's file does not.

    Raises:
        CheckpointError: the config cannot be read.
    """
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        data = config["data"]
        recipe = {
            "data": ", ".join(_sources(data["shards"], data.get("weights") or {})),
            "resolution": str(data["resolution"]) + (", in aspect buckets" if data.get("bucket_step") else ""),
            "samples in a step": f"{data['global_batch_size']:,}",
            "precision of the base": str(config["base"].get("dtype", "bfloat16")),
        }
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{run / 'config.yaml'}: not the config of a run: {error}.") from error
    return recipe


def newest_grid(run: Path, *, step: int | None) -> Path | None:
    """The run's latest sample grid, of ``step`` or before."""
    grids = [(int(path.stem.removeprefix("step-")), path) for path in (run / "samples").glob("step-*.png")]
    return max((grid for grid in grids if step is None or grid[0] <= step), default=(0, None))[1]


def read_scores(folder: Path) -> Scores:
    """The table of an evaluation's results.

    Raises:
        ConfigError: there are no finished ones.
    """
    summary = Summary.read(folder)
    names = [name for name in SCORES if name in summary.by_scale[0].scores]
    distances = summary.by_scale[0].distances is not None
    rows = []
    for found in summary.by_scale:
        row = [f"{found.scale:g}"]
        for name in names:
            mean = found.scores[name]
            row.append(f"{mean.mean:.3f}" + (f" ± {mean.ci95:.3f}" if mean.ci95 is not None else ""))
        rows.append(row + ([f"{found.distances.fid:.2f}"] if found.distances is not None else []))
    facts = summary.facts | {"num_pictures": summary.num_pictures, "sampler": summary.sampler}
    text = "image prompt and caption" if facts["text"] == "caption" else "image prompt alone"
    columns = ["scale", *(SCORES[name] for name in names), *(["FID"] if distances else [])]
    return Scores(_PROTOCOL.format_map(facts | {"text": text}), columns, rows)


def _sources(shards: str | list[str] | Mapping[str, Any], weights: Mapping[str, float]) -> Iterator[str]:
    """Shards by the last two parts of their names, or sources by theirs; where they lie is nobody's business."""
    if isinstance(shards, str):
        yield "/".join(Path(shards).parts[-2:])
    elif isinstance(shards, Mapping):
        yield from (f"{name} (weight {weights[name]:g})" if name in weights else name for name in shards)
    else:
        for source in shards:
            yield from _sources(source, weights)
