"""Drawing and scoring the pictures of an evaluation."""

import io
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ipa_train.data.decode import MAX_PIXELS_OF_ONE, decode_image
from ipa_train.errors import ConfigError, DataError
from ipa_train.eval.captions import CaptionedPicture
from ipa_train.eval.distribution import FeatureNetwork
from ipa_train.eval.metrics import SimilarityScores
from ipa_train.eval.parts import Notes, Row
from ipa_train.eval.pipeline import AdapterPipeline, to_pixels
from ipa_train.eval.protocol import Protocol

_THUMBNAIL_SIZE = 256  # pixels of the longer side
_JPEG_QUALITY = 85


class Evaluation:
    """An adapter, what scores it, and how.

    Everything is done picture by picture, the samples of one together, so a number depends on no other picture.
    """

    def __init__(
        self,
        loaded: AdapterPipeline,
        scores: SimilarityScores,
        network: FeatureNetwork | None,
        protocol: Protocol,
        *,
        allow_missing: bool = False,
    ) -> None:
        self.loaded, self.scores, self.network, self.protocol = loaded, scores, network, protocol
        self.allow_missing = allow_missing
        if loaded.image_encoder.embedding_shape is not None:
            raise ConfigError("this adapter reads stored embeddings (of faces, say), which captioned pictures lack.")
        loaded.check(size=protocol.size, num_inference_steps=protocol.num_inference_steps)
        loaded.pipeline.set_progress_bar_config(disable=True)

    def run(self, pictures: Iterable[CaptionedPicture]) -> tuple[list[Row], Notes]:
        """The rows of these pictures.

        Raises:
            DataError: one of them is missing or damaged, and that is not allowed.
        """
        rows: list[Row] = []
        left_out: list[str] = []
        for picture in pictures:
            try:
                image_prompt = decode_image(picture.path.read_bytes(), max_pixels=MAX_PIXELS_OF_ONE)
            except (OSError, DataError) as error:
                reason = f"{picture.path.name}: {getattr(error, 'strerror', None) or error}"
                if not self.allow_missing:
                    raise DataError(f"{reason}; --allow-missing leaves such pictures out.") from error
                left_out.append(reason)
                continue
            rows += self._rows(picture, image_prompt)
        sampler = type(self.loaded.pipeline.scheduler).__name__
        return rows, Notes(left_out=left_out, sampler=sampler)

    def _rows(self, picture: CaptionedPicture, image_prompt: Image.Image) -> Iterator[Row]:
        features = self.loaded.features([image_prompt])
        prompt = to_pixels(image_prompt).to(self.loaded.pipeline.device)
        yield Row(id=picture.id, features=self._features(prompt)[0], thumbnail=_thumbnail(image_prompt))
        for scale in self.protocol.scales:
            yield from self._samples(picture, prompt, features, scale)

    def _samples(
        self,
        picture: CaptionedPicture,
        prompt: UInt8[Tensor, "1 c h w"],
        features: Sequence[Float[Tensor, "1 *_"]],
        scale: float,
    ) -> Iterator[Row]:
        protocol = self.protocol
        seeds = protocol.seeds(picture.id)
        drawn = self.loaded.draw(
            picture.caption if protocol.text == "caption" else "",
            features,
            scale=scale,
            guidance_scale=protocol.guidance_scale,
            num_images_per_prompt=len(seeds),
            height=protocol.size,
            width=protocol.size,
            num_inference_steps=protocol.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        pixels = torch.cat([to_pixels(image) for image in drawn]).to(prompt.device)
        scores = self.scores(pixels, prompt.expand(len(drawn), -1, -1, -1), [picture.caption] * len(drawn))
        found = {name: values.double().tolist() for name, values in scores.items()}
        network_features = self._features(pixels)
        for i, (seed, image) in enumerate(zip(seeds, drawn, strict=True)):
            yield Row(
                id=picture.id,
                scale=scale,
                sample=i,
                seed=seed,
                **{name: values[i] for name, values in found.items()},
                features=network_features[i],
                thumbnail=_thumbnail(image),
            )

    def _features(self, pixels: UInt8[Tensor, "b c h w"]) -> Sequence[Sequence[float] | None]:
        return [None] * len(pixels) if self.network is None else self.network(pixels).cpu().tolist()


def _thumbnail(image: Image.Image) -> bytes:
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE))
    small.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
