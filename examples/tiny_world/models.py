"""The tiny base's parts, untrained: real diffusers and transformers classes at a size that a CPU trains in minutes."""

import json

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from examples.tiny_world.scenes import IMAGE_SIZE, PATTERNS, SHAPES, Scenes, draw_scenes

MAX_TOKENS = 20
WIDTH = 64
"""Width of the text states and of the joint image-text space."""


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges are learnt from the world's captions."""
    scenes = draw_scenes(4000, seed=123)
    captions = [text for i in range(len(scenes)) for text in (scenes.rich_caption(i), scenes.caption(i))]
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    entries = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(pair) for pair in merges)]
    vocab = {entry: i for i, entry in enumerate(dict.fromkeys([*entries, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids, padded to the full length."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Two layers, 0.11M parameters."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def vision_config() -> CLIPVisionConfig:
    """Three layers on 8 x 8 patches, 0.30M parameters."""
    return CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=4,
        projection_dim=WIDTH,
    )


def make_vae() -> AutoencoderKL:
    """Four latent channels at a quarter of the resolution, 0.68M parameters, started near a linear autoencoder.

    Residual branches begin almost off and resampling as averaging or repeating, which saves most of the training.
    """
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.mul_(0.05)
                module.conv2.bias.zero_()
                if module.conv_shortcut is not None:
                    _near_identity(module.conv_shortcut, slice(0, 1), 0.3, 1.0)
            elif isinstance(module, Downsample2D):
                _near_identity(module.conv, slice(0, 2), 0.5, 0.25)
            elif isinstance(module, Upsample2D):
                _near_identity(module.conv, slice(1, 2), 0.5, 1.0)
        for attention in (vae.encoder.mid_block.attentions[0], vae.decoder.mid_block.attentions[0]):
            attention.to_out[0].weight.mul_(0.05)
        for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
            conv.bias.copy_(torch.linspace(-1, 1, len(conv.bias)))
        vae.quant_conv.weight[4:] *= 0.1  # little posterior noise at first
        vae.quant_conv.bias[4:] = -5
    return vae


def _near_identity(conv: nn.Conv2d, taps: slice, shrink: float, weight: float) -> None:
    """Shrink a convolution's random weights and pass each channel through at the given taps."""
    conv.weight.mul_(shrink)
    channels = torch.arange(min(conv.weight.shape[:2]))
    conv.weight[channels, channels, taps, taps] += weight
    conv.bias.zero_()


def make_unet() -> UNet2DConditionModel:
    """Two cross-attention levels on 8 x 8 latents, 2.4M parameters."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=6,
    )


def make_scheduler() -> DDIMScheduler:
    """The linear DDPM schedule with v-prediction."""
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Judge(nn.Module):
    """Reads a scene's attributes back from its picture; trained on renders alone, so it favours no generator.

    Also the head by which the image encoder is made to keep attributes (on its embedding instead of a picture).
    """

    NUM_OUTPUTS = 8 + len(SHAPES) + len(PATTERNS)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out, stride in ((16, 1), (32, 2), (48, 2), (64, 2)):
            for c_in, s in ((channels, stride), (out, 1)):
                layers += [nn.Conv2d(c_in, out, 3, s, 1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        side = IMAGE_SIZE // 8
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, 96), nn.SiLU())
        self.head = nn.Linear(96, self.NUM_OUTPUTS)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (n, 3, 32, 32) in 0..1 -> raw outputs (n, 18), see :func:`attribute_loss`."""
        return self.head(self.body((images - 0.5) * 3))


def attribute_targets(scenes: Scenes) -> Tensor:
    """The continuous attributes as eight numbers of about unit size; hues as points on the circle."""
    angles = (2 * torch.pi * scenes.shape_hue, 2 * torch.pi * scenes.background_hue)
    circle = [f(a) for a in angles for f in (torch.sin, torch.cos)]
    rest = [(scenes.brightness - 0.65) / 0.3, (scenes.x - 32) / 12, (scenes.y - 32) / 12, (scenes.radius - 18.5) / 4.5]
    return torch.stack([*circle, *rest], dim=1)


def attribute_loss(outputs: Tensor, scenes: Scenes) -> Tensor:
    """Regression of the continuous attributes, classification of shape and pattern."""
    continuous, shape, pattern = outputs.split([8, len(SHAPES), len(PATTERNS)], dim=1)
    cross_entropy = nn.functional.cross_entropy
    return (
        2 * nn.functional.smooth_l1_loss(continuous, attribute_targets(scenes))
        + cross_entropy(shape, scenes.shape)
        + 0.5 * cross_entropy(pattern, scenes.pattern)
    )


def read_attributes(outputs: Tensor) -> dict[str, Tensor]:
    """Turn raw outputs into hues in turns, and indices of shape and pattern."""

    def hue(sine: Tensor, cosine: Tensor) -> Tensor:
        return torch.atan2(sine, cosine) / (2 * torch.pi) % 1.0

    return {
        "shape_hue": hue(outputs[:, 0], outputs[:, 1]),
        "background_hue": hue(outputs[:, 2], outputs[:, 3]),
        "shape": outputs[:, 8 : 8 + len(SHAPES)].argmax(1),
        "pattern": outputs[:, 8 + len(SHAPES) :].argmax(1),
    }
