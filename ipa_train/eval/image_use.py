"""Whether an adapter uses its image prompts: paired losses on samples whose noise and timesteps never change.

The training loss hardly tells (tencent-ailab/IP-Adapter#253): the base predicts most of the target without any image,
and timesteps and noise differ from step to step. So the same noisy latents are denoised three times, under the sample's
own image prompt, under another sample's, and under none. How much the loss rises without the right one is what the
image is worth; all else cancels within each pair.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

from ipa_train.adapter import IPAdapter
from ipa_train.adapter.lora import LowRankSite
from ipa_train.adapter.sites import AttentionSite
from ipa_train.bases import Base, LatentPosterior, MicroConditioning
from ipa_train.diffusion import Objective
from ipa_train.runtime.seeding import Draws

MIN_SAMPLES = 8
"""Two for each quarter of the timesteps: below, a quarter has no interval."""
_SEED = 20230813
_GOLDEN = 0.618


@dataclass(frozen=True)
class Probe:
    """A few samples of a validation set, noised once and for all; at least two, of one size."""

    numbers: Int64[Tensor, "b"]
    """Places of the samples in the set; always on the host."""
    noisy_latents: Float[Tensor, "b c h w"]
    target: Float[Tensor, "b c h w"]
    timesteps: Num[Tensor, "b"]
    captions: list[str]
    image_features: tuple[Float[Tensor, "b *_"], ...]
    micro: MicroConditioning


def make_probe(
    posterior: LatentPosterior,
    image_features: Sequence[Float[Tensor, "b *_"]],
    captions: Sequence[str],
    micro: MicroConditioning,
    objective: Objective,
    *,
    numbers: Int64[Tensor, "b"],
    num_samples: int,
) -> Probe:
    """Noise samples ``numbers`` of a set of ``num_samples``: always alike, whatever is probed together and when.

    Timesteps are stratified: each of ``num_samples`` equal parts of the schedule falls to one sample of the set, and
    samples that are neighbours in the set lie far apart in the schedule.
    """
    device = posterior.mean.device
    draws = Draws(_SEED, numbers, device)
    coprime = (k for k in range(1, num_samples) if math.gcd(k, num_samples) == 1)
    step = min(coprime, key=lambda k: abs(k - _GOLDEN * num_samples))
    u = (numbers * step % num_samples + draws.uniform("timestep")) / num_samples
    timesteps = objective.schedule.timesteps(u.to(device))
    posterior_noise, noise = objective.draw_noise(draws, tuple(posterior.mean.shape[1:]))
    latents = posterior.sample(posterior_noise)
    return Probe(
        numbers=numbers,
        noisy_latents=objective.add_noise(latents, noise, timesteps),
        target=objective.target(latents, noise, timesteps),
        timesteps=timesteps,
        captions=list(captions),
        image_features=tuple(image_features),
        micro=micro,
    )


@torch.no_grad()
def probe_losses(
    base: Base,
    adapter: IPAdapter,
    objective: Objective,
    probe: Probe,
    null_features: Sequence[Float[Tensor, "1 *_"]],
) -> Float[Tensor, "3 b"]:
    """Losses under each sample's own image prompt, under that of the sample before it, and under none.

    Captions stay, so this is what the image adds to the text. ``adapter`` is attached to ``base``.
    """
    text = base.encode_text(probe.captions)
    own = probe.image_features
    other = tuple(features.roll(1, dims=0) for features in own)
    none = tuple(null.expand_as(features) for null, features in zip(null_features, own, strict=True))
    losses = []
    for features in (own, other, none):
        tokens = adapter(*features, timesteps=probe.timesteps)
        prediction = base.predict(probe.noisy_latents, probe.timesteps, text, tokens, probe.micro)
        losses.append(objective.losses(prediction, probe.target, probe.timesteps))
    return torch.stack(losses)


def summarise(losses: Float[Tensor, "3 n"], quarters: Int64[Tensor, "n"]) -> dict[str, float]:
    """The numbers of a whole set, by name.

    ``loss``: mean under the right image. ``gap_other``, ``gap_none``: by how much it is higher under another sample's
    image, and under none; ``_ci`` is half the width of the gap's 95 % interval. Each also by quarter of the timesteps,
    ``_t0`` (least noise) to ``_t3``, wherever a quarter has two samples.
    """
    own, other, none = losses.double()
    groups = {"": torch.ones_like(quarters, dtype=torch.bool)} | {f"_t{i}": quarters == i for i in range(4)}
    numbers = {f"loss{suffix}": own[group].mean().item() for suffix, group in groups.items() if group.sum() > 1}
    for name, without in (("gap_other", other), ("gap_none", none)):
        for suffix, group in groups.items():
            if group.sum() > 1:
                gap = paired_interval((without - own)[group])
                numbers |= {f"{name}{suffix}": gap.mean, f"{name}{suffix}_ci": gap.half_width}
    return numbers


@dataclass(frozen=True)
class Interval:
    """A mean, and half the width of its 95 % confidence interval."""

    mean: float
    half_width: float


def paired_interval(differences: Float[Tensor, "n"]) -> Interval:
    """Student's t interval of the mean of paired differences; n of at least 2.

    Stratified timesteps make the mean surer than the interval says, as it takes their spread for chance.
    """
    n = len(differences)
    error = differences.double().std().item() / math.sqrt(n)
    return Interval(differences.double().mean().item(), _t_quantile(n - 1) * error)


def _t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t: exact for 1 and 2, else within 0.8 % (Abramowitz and Stegun, 26.7.5)."""
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 / math.sqrt(2 * 0.975 * 0.025)
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**i for i, term in enumerate(terms))


@torch.no_grad()
def branch_ratios(
    base: Base, adapter: IPAdapter, sites: Sequence[AttentionSite], probe: Probe
) -> dict[str, Float[Tensor, ""]]:
    """For each site, by name: the norm of what the image prompt adds to the attention's output, over the rest's norm.

    One more forward, in which every site runs by its own processor with and without the image; training runs by the
    code that it always runs by.
    """
    text = base.encode_text(probe.captions)
    tokens = adapter(*probe.image_features, timesteps=probe.timesteps)
    # Compiled blocks would have to be compiled anew for the processors that stand in.
    with torch.compiler.set_stance("force_eager"), _measured(sites) as processors:
        base.predict(probe.noisy_latents, probe.timesteps, text, tokens, probe.micro)
    return {name: processor.ratio for name, processor in processors.items() if processor.ratio is not None}


class _MeasuredAttention:
    """Runs the processor that it takes the place of, with and without the image."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.ratio: Tensor | None = None

    def run(self, *args: Any, ip_hidden_states: Tensor | None = None, **options: Any) -> Any:
        out = self.processor(*args, ip_hidden_states=ip_hidden_states, **options)
        if ip_hidden_states is not None:
            rest = _latents(self.processor(*args, ip_hidden_states=None, **options))
            # Flux's blocks add the image's part themselves, and get it as a third result.
            added = out[2] if isinstance(out, tuple) and len(out) == 3 else _latents(out) - rest
            self.ratio = added.float().norm() / rest.float().norm()
        return out


def _stand_in(processor: Any) -> _MeasuredAttention:
    """Models look for arguments by name and hand over those they find: it has the names that ``processor`` has."""

    class Measured(_MeasuredAttention):
        @wraps(type(processor).__call__)
        def __call__(self, *args: Any, **options: Any) -> Any:
            return self.run(*args, **options)

    return Measured(processor)


def _latents(out: Any) -> Tensor:
    """What an attention of latents and text gives the latents."""
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


@contextmanager
def _measured(sites: Sequence[AttentionSite]) -> Iterator[dict[str, _MeasuredAttention]]:
    own = [site for site in sites if not isinstance(site, LowRankSite)]
    processors = {site.name: _stand_in(site.module.processor) for site in own}
    try:
        for site in own:
            site.module.set_processor(processors[site.name])
        yield processors
    finally:
        for site in own:
            site.module.set_processor(processors[site.name].processor)
