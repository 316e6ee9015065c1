"""An exponential moving average of the adapter's weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ipa_train.errors import CheckpointError, ConfigError

NamedParameters = Iterable[tuple[str, nn.Parameter]]


class AdapterEMA:
    """Average of the trainable weights: ``average += (1 - decay) * (weights - average)`` after every step.

    ``decay`` in [0, 1). With ``warmup``, the n-th update (from 0) uses ``min(decay, (1 + n) / (10 + n))``, so that the
    average of a short run is not its initial weights. The average lives in the parameters' dtype and on their device
    and starts at their first seen values.
    """

    def __init__(self, *, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"ema.decay is {decay}: it must be at least 0 and below 1, for example ema.decay=0.9999")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {}

    def start(self, named_parameters: NamedParameters) -> None:
        """Take the parameters as the average, unless there is one already."""
        self._matching(dict(named_parameters))

    @torch.no_grad()
    def update(self, named_parameters: NamedParameters) -> None:
        """Move the average towards the parameters; call once after every optimizer step."""
        parameters = dict(named_parameters)
        averages = self._matching(parameters)
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        torch._foreach_lerp_(averages, [p.detach() for p in parameters.values()], 1.0 - decay)
        self.num_updates += 1

    @contextmanager
    def applied(self, named_parameters: NamedParameters) -> Iterator[None]:
        """Within the block the parameters hold the average; afterwards they are bit-exactly what they were."""
        parameters = dict(named_parameters)
        values = [p.detach() for p in parameters.values()]
        kept = [v.clone() for v in values]
        torch._foreach_copy_(values, self._matching(parameters))
        try:
            yield
        finally:
            torch._foreach_copy_(values, kept)

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"num_updates": int, "weights": {name: tensor}}``."""
        return {"num_updates": self.num_updates, "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.num_updates = state["num_updates"]
        self.weights = {name: tensor.clone() for name, tensor in state["weights"].items()}

    def _matching(self, parameters: dict[str, nn.Parameter]) -> list[Tensor]:
        """Return the averages in the order of the parameters, on their devices."""
        if not self.weights:
            self.weights = {name: p.detach().clone() for name, p in parameters.items()}
        if self.weights.keys() != parameters.keys():
            odd = sorted(self.weights.keys() ^ parameters.keys())[0]
            raise CheckpointError(f"the EMA and the adapter do not hold the same parameters: {odd!r} is in one of them")
        # A restored average is on the CPU until the first use.
        self.weights = {name: self.weights[name].to(p.device) for name, p in parameters.items()}
        return list(self.weights.values())
