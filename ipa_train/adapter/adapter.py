"""The IP-Adapter: a projector and one image attention for each site of a frozen denoiser."""

from collections.abc import Sequence
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from ipa_train.adapter.attention import DecoupledCrossAttention, ImageAttention
from ipa_train.adapter.projector import Projector
from ipa_train.adapter.sites import AttentionSite


def branch_key(site: AttentionSite) -> str:
    """Name of a site's branch in the adapter's state (module names cannot hold dots)."""
    return site.name.replace(".", "_")


class IPAdapter(nn.Module):
    """All that is trained. It knows no trainer, owns its weights alone, and leaves no trace when detached.

    Weights are fp32 masters whatever the precision of the base. ``attach`` and ``detach`` are exact inverses.
    """

    def __init__(self, *, projector: Projector, sites: Sequence[AttentionSite]) -> None:
        super().__init__()
        self.projector = projector
        self.branches = nn.ModuleDict()
        for site in sites:
            branch = ImageAttention(hidden_dim=site.hidden_dim, context_dim=site.context_dim)
            branch.copy_text_weights(site.module.to_k, site.module.to_v)
            self.branches[branch_key(site)] = branch
        self._attached: list[tuple[AttentionSite, Any, DecoupledCrossAttention]] = []

    def forward(self, image_features: Float[Tensor, "b *s f"]) -> Float[Tensor, "b n d"]:
        """Return the fp32 image tokens, the argument of ``Base.predict``."""
        return cast(Tensor, self.projector(image_features))

    def branch(self, site: AttentionSite) -> ImageAttention:
        """The image half of one site."""
        return cast(ImageAttention, self.branches[branch_key(site)])

    def attach(self, sites: Sequence[AttentionSite]) -> "IPAdapter":
        """Extend every site; until then, and after :meth:`detach`, the base takes no notice of image tokens."""
        if self._attached:
            raise RuntimeError("This adapter is attached already: detach it first.")
        for site in sites:
            processor = DecoupledCrossAttention(self.branch(site))
            self._attached.append((site, site.module.processor, processor))
            site.module.set_processor(processor)
        return self

    def detach(self) -> "IPAdapter":
        """Put every site's own attention back."""
        for site, original, _ in self._attached:
            site.module.set_processor(original)
        self._attached.clear()
        return self

    @property
    def scale(self) -> float:
        """Weight of the image half at every site (lambda); 0 gives the base model bit for bit."""
        return self._attached[0][2].scale

    @scale.setter
    def scale(self, value: float) -> None:
        for _, _, processor in self._attached:
            processor.scale = value
