"""Whether the place in the stream that a checkpoint holds is a place in the stream of this run."""

from collections.abc import Mapping, Sequence
from typing import Any

from ipa_train.data.scan import EXTRAS
from ipa_train.errors import DataError


def require_same_order(saved: Mapping[str, Any], order: Mapping[str, Any], *, allow_index_change: bool) -> None:
    """Compare what the order of samples depended on at the checkpoint with what it depends on now.

    Raises:
        DataError: it is another order; other shards, parts of samples or buckets only unless ``allow_index_change``.
    """
    if saved["seed"] != order["seed"]:
        raise DataError(
            f"this run has seed {order['seed']}, its checkpoint {saved['seed']}: use the old seed, or another run.name."
        )
    for name in ("num_lanes", "window_size", "weights"):
        if saved[name] != order[name]:
            raise DataError(
                f"data.{name}={order[name]}, but {saved[name]} in the checkpoint: samples would be "
                "repeated and left out; use the old value, or another run.name."
            )
    if allow_index_change:
        return
    extras = saved.get("extras", [])  # older checkpoints needed none
    if extras != order["extras"]:
        raise DataError(
            f"this run needs {_parts(order['extras'])} of each sample, its checkpoint {_parts(extras)}: use the old "
            "data.image_prompt, data.reference_mask and image_encoder, or set data.allow_index_change=true to go on "
            f"at sample {sum(saved['positions'])} of those that hold what is needed now."
        )
    if saved["index_id"] != order["index_id"]:
        raise DataError(
            f"data.shards are not the ones of the checkpoint (index {order['index_id']}, then {saved['index_id']}): "
            "give the same shards, or set data.allow_index_change=true to go on at "
            f"sample {sum(saved['positions'])} of the new ones."
        )
    if not are_same_buckets(saved, order):
        raise DataError(
            f"the aspect buckets are not those of the checkpoint ({len(order['buckets'])}, then "
            f"{len(saved['buckets'])}): use the old data.resolution, data.bucket_step, data.max_aspect_ratio and "
            "data.min_bucket_rate, or set data.allow_index_change=true."
        )


def are_same_buckets(saved: Mapping[str, Any], order: Mapping[str, Any]) -> bool:
    """Whether positions of the one are positions of the other.

    Of a single bucket the size may change: the order of its samples does not depend on it.
    """
    return saved["buckets"] == order["buckets"] or len(saved["buckets"]) == len(order["buckets"]) == 1


def _parts(extras: Sequence[str]) -> str:
    return " and ".join(f"KEY.{EXTRAS[extra]}" for extra in EXTRAS if extra in extras) or "nothing but its picture"
