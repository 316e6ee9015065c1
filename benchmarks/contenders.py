"""The two that the step's benchmark sets against each other, on equal models, pictures and random numbers.

Beside UNets there is no tutorial: the reference then is our own step, run in the tutorials' ways (fp32 weights under
autocast, the loss fetched and printed at every step). Loops and data are left out on both sides.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.reference_step import Given, ReferenceBatch, ReferenceStep, tokenise, update
from benchmarks.sizes import build
from ipa_train.acceleration import Acceleration
from ipa_train.adapter import LinearProjector, Projector, Resampler, TimeResampler
from ipa_train.adapter.tokens import ImageTokens
from ipa_train.bases import MicroConditioning, TextConditioning, UNetBase
from ipa_train.conditioning import ConditionDropout
from ipa_train.data.batch import Batch, Features, Pictures
from ipa_train.diffusion import Objective, UniformTimesteps
from ipa_train.runtime.seeding import Draws
from ipa_train.training.module import AdapterTraining
from ipa_train.training.optim import LRSchedule

VARIANTS: Mapping[str, type[Projector]] = {"linear": LinearProjector, "plus": Resampler, "sd3": TimeResampler}
SEED = 0
_SDXL_PLUS = {"dim": 1280, "heads": 20}  # of its released files


@dataclass(frozen=True)
class Setting:
    """What is trained, and where."""

    base: str
    """A name in ``SIZES``."""
    variant: str
    """A name in ``VARIANTS``."""
    resolution: int
    device: str
    dropout: ConditionDropout = field(default_factory=ConditionDropout)

    @property
    def projector(self) -> Callable[..., Projector]:
        options = _SDXL_PLUS if (self.base, self.variant) == ("sdxl", "plus") else {}
        return partial(VARIANTS[self.variant], **options)


class Models(Protocol):
    """Either side."""

    base: Any
    image_encoder: Any


def make_training(setting: Setting, *, dtype: torch.dtype = torch.bfloat16) -> AdapterTraining:
    """Ours, by the defaults of the shipped configuration."""
    base, image_encoder = build(setting.base, dtype=dtype, device=setting.device)
    return AdapterTraining(
        base=base,
        image_encoder=image_encoder,
        projector=setting.projector,
        objective=partial(Objective),
        optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True),
        timesteps=UniformTimesteps(),
        dropout=setting.dropout,
        lr_schedule=LRSchedule(),
        seed=SEED,
    ).to(setting.device)


def make_batch(setting: Setting, models: Models, batch_size: int, *, cached: bool) -> Batch:
    """Random pictures and image prompts, or features as a cache would hold them."""
    generator = torch.Generator().manual_seed(0)
    n, side, encoder, vae = batch_size, setting.resolution, models.image_encoder, models.base.vae
    content: Pictures | Features
    if cached:
        shape = (n, vae.num_channels, side // vae.stride, side // vae.stride)
        content = Features(
            latents_mean=torch.randn(shape, generator=generator).half(),
            latents_std=torch.full(shape, 0.1).half(),
            image_features=tuple(
                torch.randn(n, *encoder.null_features(kind).shape[1:], generator=generator).half()
                for kind in VARIANTS[setting.variant].feature_kinds
            ),
        )
    else:
        content = Pictures(
            pixels=_pictures(n, side, generator).contiguous(memory_format=torch.channels_last),
            separate_prompts=_pictures(n, encoder.image_size, generator),
        )
    sizes = torch.full((n, 2), side)
    batch = Batch(
        content=content,
        captions=[f"picture number {i}" for i in range(n)],
        positions=torch.arange(n),
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
        keys=[f"00000/{i}" for i in range(n)],
    )
    return batch.to(setting.device)


def _pictures(count: int, side: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


class AutocastStep:
    """Our training step in the tutorials' ways, in place of :class:`ReferenceStep` where there is no tutorial."""

    def __init__(self, training: AdapterTraining, precision: torch.dtype) -> None:
        nn.Module.to(training.base.denoiser, torch.float32)
        training.base.dtype = torch.float32
        self.training, self.precision, self.lean = training, precision, False
        self.base, self.image_encoder = training.base, training.image_encoder
        self.trained = list(training.adapter.parameters())
        self.optimizer = torch.optim.AdamW(self.trained, 1e-4, weight_decay=0.01)

    def be_lean(self, lean: bool) -> None:
        """Whether to go without a loss fetched and printed."""
        self.lean = lean

    def loss(self, batch: Batch, given: Given | None = None) -> Tensor:
        """By random numbers of the batch's positions, which are those that :func:`given_draws` gives."""
        full = self.precision == torch.float32
        with nullcontext() if full else torch.autocast(self.training.device.type, self.precision):
            return self.training.training_step(batch, 0)

    def step(self, batch: Batch) -> None:
        """One update."""
        update(self.loss(batch), len(batch), self.optimizer, lean=self.lean)


def make_reference(
    setting: Setting, adapter: Mapping[str, Tensor] | None = None, *, precision: torch.dtype = torch.bfloat16
) -> ReferenceStep | AutocastStep:
    """The reference, which starts from the state of our adapter if that is given."""
    training = make_training(setting, dtype=precision)
    if adapter is not None:
        training.adapter.load_state_dict(adapter)
    base, image_encoder = training.base, training.image_encoder
    if not isinstance(base, UNetBase):
        return AutocastStep(training, precision)
    projector: Any = training.adapter.projector
    ours = [weight for branch in training.adapter.branches.values() for weight in branch.parameters()]
    training.adapter.detach()
    with torch.device(setting.device):
        reference = ReferenceStep(
            base=base,
            image_encoder=image_encoder,
            projector=projector,
            num_tokens=projector.num_tokens,
            precision=precision,
        )
    with torch.no_grad():
        for theirs, weight in zip(reference.branches.parameters(), ours, strict=True):
            theirs.copy_(weight)
    return reference


def for_reference(setting: Setting, models: Models, batch: Batch) -> ReferenceBatch | Batch:
    """A batch of ours as the reference takes it, with the same conditions dropped."""
    base, encoder = models.base, models.image_encoder
    if not isinstance(base, UNetBase):
        return batch
    dropped = setting.dropout.draw(Draws(SEED, batch.positions))
    sizes = (batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
    common: dict[str, Any] = {
        "token_ids": tokenise(base, dropped.captions(batch.captions), batch.device),
        "drop_image": dropped.image.tolist(),
        "time_ids": torch.cat(sizes, dim=1).float(),
    }
    content = batch.content
    if isinstance(content, Features):
        (features,) = content.image_features
        return ReferenceBatch(latents=content.latents_mean.float(), image_features=features.float(), **common)
    prompts = (content.image_prompts / 255.0 - encoder.mean) / encoder.std
    return ReferenceBatch(pixels=content.pixels / 127.5 - 1.0, image_prompts=prompts, **common)


def given_draws(training: AdapterTraining, batch: Batch) -> Given:
    """The random numbers that our step draws for a batch."""
    draws, vae = Draws(SEED, batch.positions, batch.device), training.base.vae
    height, width = (int(side) // vae.stride for side in batch.target_sizes[0])
    shape = (vae.num_channels, height, width)
    u = training.timesteps.draw(draws, base_shift=training.base.timestep_shift((height, width)))
    posterior, noise = training.objective.draw_noise(draws, shape)
    return Given(posterior=posterior, noise=noise, timesteps=training.objective.schedule.timesteps(u))


class OurStep:
    """Our step, with what makes it fast taken away and given back."""

    def __init__(self, training: AdapterTraining) -> None:
        self.training = training
        weights = list(training.adapter.parameters())
        self._plain, self._fused = torch.optim.AdamW(weights, lr=1e-4), training.make_optimizer(weights)
        self._optimizer = self._fused

    def run_as(
        self, *, own_forward: bool = True, channels_last: bool = True, fused: bool = True, compiled: str = "none"
    ) -> None:
        """Choose how the next steps run; of UNets also by whose forward, and in which order pixels and channels lie."""
        base = self.training.base
        Acceleration(compile=compiled).apply(base)
        if isinstance(base, UNetBase):
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            nn.Module.to(base.unet, memory_format=memory_format)
            if not own_forward:
                base.predict = partial(_diffusers_forward, base, memory_format)
        self._optimizer = self._fused if fused else self._plain

    def step(self, batch: Batch) -> None:
        """One update."""
        self.training.training_step(batch, 0).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def _diffusers_forward(
    base: UNetBase,
    memory_format: torch.memory_format,
    noisy_latents: Tensor,
    timesteps: Tensor,
    text: TextConditioning,
    image_tokens: ImageTokens,
    micro: MicroConditioning,
) -> Tensor:
    """``base.predict`` by the UNet's own forward."""
    size = (noisy_latents.shape[2] * base.vae.stride, noisy_latents.shape[3] * base.vae.stride)
    prediction = base.unet(
        noisy_latents.to(base.dtype).contiguous(memory_format=memory_format),
        timesteps,
        text.context.to(base.dtype),
        added_cond_kwargs=base.added_conditions(text, micro, size),
        cross_attention_kwargs={"ip_hidden_states": image_tokens.states.to(base.dtype)},
    )
    return prediction.sample.float()
