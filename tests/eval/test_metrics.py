"""Scores of pictures: the same as transformers' own models give, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from ipa_train.errors import ConfigError
from ipa_train.eval.generate import to_pil
from ipa_train.eval.metrics import CLIPTextEncoder, SimilarityScores

CAPTIONS = ["a red square", "a cat"]


def pictures(seed, size=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def scores(tiny_scorers):
    clip, dino = map(str, tiny_scorers)
    return SimilarityScores.from_pretrained(clip=clip, dino=dino)


def test_clip_scores_are_those_of_the_whole_model(scores, tiny_scorers):
    model, tokenizer = (kind.from_pretrained(tiny_scorers[0]) for kind in (CLIPModel, CLIPTokenizer))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    drawn, wanted = pictures(0), pictures(1)
    with torch.no_grad():
        out = model(
            pixel_values=processor(to_pil(drawn), return_tensors="pt").pixel_values,
            **tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt"),
        )
        other = model.vision_model(processor(to_pil(wanted), return_tensors="pt").pixel_values).pooler_output
        other = model.visual_projection(other)
    got = scores(drawn, wanted, CAPTIONS)
    torch.testing.assert_close(got["clip_i"], F.cosine_similarity(out.image_embeds, other), atol=1e-5, rtol=0)
    clip_score = 2.5 * F.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0)
    torch.testing.assert_close(got["clip_t"], clip_score, atol=1e-5, rtol=0)


def test_a_picture_is_nearest_to_itself_whatever_its_size(scores):
    drawn = pictures(0, size=64)
    itself, other = scores(drawn, drawn, CAPTIONS), scores(drawn, pictures(1), CAPTIONS)
    for name in ("clip_i", "dino"):
        torch.testing.assert_close(itself[name], torch.ones(2), atol=1e-5, rtol=0)
        assert (other[name] < itself[name]).all()
    assert scores.names == list(itself) == ["clip_i", "clip_t", "dino"]


def test_scores_need_no_more_models_than_they_are_of(tiny_scorers):
    dino = SimilarityScores.from_pretrained(dino=str(tiny_scorers[1]))
    assert list(dino(pictures(0), pictures(1), CAPTIONS)) == ["dino"] == dino.names


def test_what_cannot_score_is_named(tiny_scorers, tiny_models, tmp_path):
    with pytest.raises(ConfigError, match="nowhere: cannot load"):
        SimilarityScores.from_pretrained(clip=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"image_encoder: .*text half of"):
        SimilarityScores.from_pretrained(clip=str(tiny_models[1]))
    with pytest.raises(ConfigError, match="this is a 'clip' model"):
        SimilarityScores.from_pretrained(dino=str(tiny_scorers[0]))
    with pytest.raises(ConfigError, match="give clip as well"):
        SimilarityScores(clip_text=CLIPTextEncoder.from_pretrained(str(tiny_scorers[0])))
