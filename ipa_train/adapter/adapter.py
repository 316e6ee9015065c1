"""The IP-Adapter: a projector and one image branch for each site of a frozen denoiser."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxtyping import Float, Num
from torch import Tensor, nn

from ipa_train.adapter.lora import LowRankSite
from ipa_train.adapter.projector import Projector
from ipa_train.adapter.sites import AttentionSite, ImageBranch, Processor
from ipa_train.adapter.time_resampler import TimeResampler
from ipa_train.adapter.tokens import ImageTokens
from ipa_train.errors import ConfigError, did_you_mean


def branch_key(site: AttentionSite) -> str:
    """Name of a site's branch in the adapter's state (module names cannot hold dots)."""
    return site.name.replace(".", "_")


class IPAdapter(nn.Module):
    """All that is trained. It knows no trainer, owns its weights alone, and leaves no trace when detached.

    Weights are fp32 masters whatever the precision of the base. ``attach`` and ``detach`` are exact inverses.

    Args:
        projector: makes the image tokens.
        sites: what is extended. Where several share an attention, each extends what those before it made of it.
        denoiser: the denoiser itself where that is trained as well (full fine-tuning, a baseline of the paper): its
            weights then thaw, and are part of this module's state.

    Raises:
        ConfigError: a projector whose tokens the sites cannot read.
    """

    def __init__(
        self, *, projector: Projector, sites: Sequence[AttentionSite], denoiser: nn.Module | None = None
    ) -> None:
        super().__init__()
        if isinstance(projector, TimeResampler) and not all(site.branch.takes_time for site in sites):
            raise ConfigError(
                "adapter: a TimeResampler makes tokens for SD 3's attention alone: choose another adapter for this "
                "base, such as adapter=linear."
            )
        self.projector = projector
        self.branches = nn.ModuleDict({branch_key(site): site.branch.for_site(site, projector) for site in sites})
        self.denoiser = None if denoiser is None else denoiser.requires_grad_(True)
        self._attached: list[tuple[AttentionSite, Any, Processor]] = []

    def forward(self, *image_features: Float[Tensor, "b *_"], timesteps: Num[Tensor, "b"] | None = None) -> ImageTokens:
        """Return the fp32 image tokens, the argument of ``Base.predict``.

        One tensor for each of ``projector.feature_kinds``; ``timesteps`` are needed where the projector knows them.
        """
        return self.projector.tokens(*image_features, timesteps=timesteps)

    def branch(self, site: AttentionSite) -> ImageBranch:
        """The image half of one site."""
        return cast(ImageBranch, self.branches[branch_key(site)])

    def attach(self, sites: Sequence[AttentionSite]) -> "IPAdapter":
        """Extend every site; until then, and after :meth:`detach`, the base takes no notice of image tokens."""
        if self._attached:
            raise RuntimeError("This adapter is attached already: detach it first.")
        for site in sites:
            processor = self.branch(site).processor(site)
            self._attached.append((site, site.module.processor, processor))
            site.module.set_processor(processor)
        return self

    def detach(self) -> "IPAdapter":
        """Put every site's own attention back."""
        for site, original, _ in reversed(self._attached):
            site.module.set_processor(original)
        self._attached.clear()
        return self

    @property
    def unexportable(self) -> str | None:
        """Why no loader takes this adapter as a file; None where they do."""
        if self.denoiser is not None:
            return (
                "all of the denoiser is trained (adapter.train_denoiser, a baseline), and adapter files hold none of it"
            )
        reasons = (cast(ImageBranch, branch).unexportable for branch in self.branches.values())
        return next((reason for reason in reasons if reason is not None), None)

    @property
    def scale(self) -> float:
        """Weight of the image half (lambda), one for all sites; 0 gives the base model bit for bit.

        Read, it is the largest of all sites.
        """
        return max(self.scales.values())

    @scale.setter
    def scale(self, value: float) -> None:
        for _, _, processor in self._attached:
            processor.scale = value

    @property
    def scales(self) -> dict[str, float]:
        """Weight of the image half at each site, by the site's name; ``blocks.py`` has some to choose from.

        Raises:
            ConfigError: set for a site that is not there.
        """
        return {
            site.name: processor.scale for site, _, processor in self._attached if not isinstance(site, LowRankSite)
        }

    @scales.setter
    def scales(self, values: Mapping[str, float]) -> None:
        """Sites that are not named get 0; a LoRA acts in full unless all do."""
        known = self.scales
        for name in values:
            if name not in known:
                raise ConfigError(f"scales: there is no site {name!r}.{did_you_mean(name, known)}")
        for site, _, processor in self._attached:
            low_rank = isinstance(site, LowRankSite)
            processor.scale = float(any(values.values())) if low_rank else values.get(site.name, 0.0)
