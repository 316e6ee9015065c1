"""The forward of a UNet as training runs it: what ``UNet2DConditionModel.forward`` computes, with less work around it.

The weights stay where diffusers has them, so its pipelines run on the same model; this is their second reader. What it
saves, for a frozen UNet under a trained adapter:

- queries, keys and values of a self-attention are one product; so are all residual blocks' time embeddings, and the
  text's and the image's keys and values of many cross-attentions, whose inputs are the same for every layer;
- 1 x 1 convolutions are matrix products on tokens, which in channels_last are a view of the picture;
- the biases of convolutions before a time embedding are added with it; nothing is divided by 1.0.

Blocks are plain functions of all that they read, so that they can be checkpointed and compiled one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from jaxtyping import Float, Num
from torch import Tensor, nn

from ipa_train.adapter.attention import DecoupledCrossAttention
from ipa_train.adapter.decoupled import decoupled_attention
from ipa_train.adapter.grouped import grouped_keys_and_values
from ipa_train.adapter.heads import merge_heads, split_heads
from ipa_train.bases.joined_weights import JoinedWeights


@dataclass(frozen=True)
class KeysValues:
    """What our cross-attention attends to."""

    text_key: Float[Tensor, "b l d"]
    text_value: Float[Tensor, "b l d"]
    image_key: Float[Tensor, "b n d"] | None = None
    image_value: Float[Tensor, "b n d"] | None = None


@dataclass(frozen=True)
class ProcessorInputs:
    """What a cross-attention is called with that runs by a processor not known here."""

    context: Float[Tensor, "b l c"]
    arguments: dict[str, Any]


def resnet_block(
    block: ResnetBlock2D, x: Float[Tensor, "b c h w"], shift: Float[Tensor, "b d"]
) -> Float[Tensor, "b d h w"]:
    """A residual block; ``shift`` is its time embedding and the bias of its first convolution."""
    h = F.silu(block.norm1(x))
    h = F.conv2d(h, block.conv1.weight, padding=block.conv1.padding) + shift[:, :, None, None]
    h = block.conv2(F.silu(block.norm2(h)))
    return cast(Tensor, (x if block.conv_shortcut is None else block.conv_shortcut(x)) + h)


def transformer_block(
    block: BasicTransformerBlock,
    x: Float[Tensor, "b s d"],
    qkv_weight: Float[Tensor, "e d"] | None,
    attended: KeysValues | ProcessorInputs,
) -> Float[Tensor, "b s d"]:
    """Self-attention, cross-attention and feed-forward layer, each added to the stream.

    Without ``qkv_weight`` the self-attention, and by :class:`ProcessorInputs` the cross-attention, run by whatever
    processor they have.
    """
    normed = block.norm1(x)
    if qkv_weight is None:
        arguments = attended.arguments if isinstance(attended, ProcessorInputs) else {}
        x = x + block.attn1(normed, **arguments)
    else:
        x = x + self_attention(block.attn1, normed, qkv_weight)
    normed = block.norm2(x)
    if isinstance(attended, ProcessorInputs):
        x = x + block.attn2(normed, attended.context, **attended.arguments)
    else:
        x = x + cross_attention(block.attn2, normed, attended)
    gated, out = cast(Any, block.ff.net[0]).proj, block.ff.net[2]
    value, gate = gated(block.norm3(x)).chunk(2, dim=-1)
    return cast(Tensor, x + out(value * F.gelu(gate)))


def self_attention(attn: Any, x: Float[Tensor, "b s d"], qkv_weight: Float[Tensor, "e d"]) -> Float[Tensor, "b s d"]:
    """Attention of tokens to each other, from one product for queries, keys and values."""
    query, key, value = F.linear(x, qkv_weight).view(*x.shape[:2], 3, attn.heads, -1).unbind(2)
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return cast(Tensor, attn.to_out[0](merge_heads(mixed)))


def cross_attention(attn: Any, x: Float[Tensor, "b s d"], attended: KeysValues) -> Float[Tensor, "b s d"]:
    """Attention to the text and, weighted by the scale of the site, to the image."""
    query = split_heads(attn.to_q(x), attn.heads)
    text_key, text_value = split_heads(attended.text_key, attn.heads), split_heads(attended.text_value, attn.heads)
    if attended.image_key is None or attended.image_value is None:
        mixed = F.scaled_dot_product_attention(query, text_key, text_value)
    else:
        image_key = split_heads(attended.image_key, attn.heads)
        image_value = split_heads(attended.image_value, attn.heads)
        scale = attn.processor.scale
        mixed = decoupled_attention(query, (text_key, text_value), (image_key, image_value), scale)
    return cast(Tensor, attn.to_out[0](merge_heads(mixed)))


class UNetForward:
    """Runs a UNet of Stable Diffusion 1, 2 or XL.

    ``resnet_block`` and ``transformer_block`` may be replaced by what wraps them.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        self.resnet_block, self.transformer_block = resnet_block, transformer_block
        # As they run: the middle stands last in the module's own order.
        parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        self._resnets = [m for part in parts for m in part.modules() if isinstance(m, ResnetBlock2D)]
        self._blocks = [m for part in parts for m in part.modules() if isinstance(m, BasicTransformerBlock)]
        self._joined: JoinedWeights | None = None

    @staticmethod
    def fits(unet: UNet2DConditionModel) -> bool:
        """Whether this computes what the model's own forward does; other architectures run by that."""
        config = unet.config
        return (
            {*config.down_block_types, *config.up_block_types, config.mid_block_type} <= _BLOCK_TYPES
            and config.addition_embed_type in (None, "text_time")
            and (config.class_embed_type, config.encoder_hid_dim_type, config.timestep_post_act) == (None, None, None)
            and (config.num_class_embeds, config.time_cond_proj_dim, config.center_input_sample) == (None, None, False)
            and all(_plain_resnet(m) for m in unet.modules() if isinstance(m, ResnetBlock2D))
            and all(_plain_transformer(m) for m in unet.modules() if isinstance(m, BasicTransformerBlock))
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the joined weights, which a copy makes of its own."""
        return {**vars(self), "_joined": None}

    def __call__(
        self,
        noisy_latents: Float[Tensor, "b c h w"],
        timesteps: Num[Tensor, "b"],
        context: Float[Tensor, "b l d"],
        added_conditions: dict[str, Tensor] | None,
        image_tokens: Float[Tensor, "b n d"] | None,
    ) -> Float[Tensor, "b c h w"]:
        """The prediction, in the precision of the weights; all inputs but ``timesteps`` are in that."""
        unet = self.unet
        if self._joined is None or not self._joined.are_current():
            self._joined = JoinedWeights(self._resnets, self._blocks)
        joined = self._joined
        embedding = unet.time_embedding(unet.get_time_embed(sample=noisy_latents, timestep=timesteps))
        if added_conditions is not None:
            embedding = embedding + unet.get_aug_embed(
                emb=embedding, encoder_hidden_states=context, added_cond_kwargs=added_conditions
            )
        resnets = zip(self._resnets, joined.shifts(embedding), strict=True)
        blocks = zip(self._blocks, self._attended(joined, context, image_tokens), strict=True)

        def run_resnet(x: Tensor) -> Tensor:
            block, shift = next(resnets)
            return self.resnet_block(block, x, shift)

        def run_transformer(model: Transformer2DModel, x: Tensor) -> Tensor:
            tokens = _to_tokens(model, x)
            for _ in model.transformer_blocks:
                block, inputs = next(blocks)
                tokens = self.transformer_block(block, tokens, *inputs)
            return _to_picture(model, tokens, x)

        x = unet.conv_in(noisy_latents)
        skips = [x]
        for down in unet.down_blocks:
            for i in range(len(down.resnets)):
                x = run_resnet(x)
                if getattr(down, "has_cross_attention", False):
                    x = run_transformer(down.attentions[i], x)
                skips.append(x)
            for downsampler in down.downsamplers or ():
                x = downsampler(x)
                skips.append(x)
        x = run_resnet(x)
        for attention in unet.mid_block.attentions:
            x = run_resnet(run_transformer(attention, x))
        for up in unet.up_blocks:
            for i in range(len(up.resnets)):
                x = run_resnet(torch.cat([x, skips.pop()], dim=1))
                if getattr(up, "has_cross_attention", False):
                    x = run_transformer(up.attentions[i], x)
            for upsampler in up.upsamplers or ():
                # Sizes that are no multiple of all the halving were rounded up on the way down.
                size = skips[-1].shape[2:]
                x = upsampler(x, None if size == (2 * x.shape[2], 2 * x.shape[3]) else size)
        return cast(Tensor, unet.conv_out(F.silu(unet.conv_norm_out(x))))

    def _attended(
        self, joined: JoinedWeights, context: Tensor, image_tokens: Tensor | None
    ) -> Iterator[tuple[Tensor | None, KeysValues | ProcessorInputs]]:
        """For each transformer block what it takes beside the stream.

        Made group by group, as the blocks come to it: autograd runs last what was made first, and so finishes one
        group's gradients, to be summed over the ranks, while it still works on the blocks before.
        """
        arguments = {} if image_tokens is None else {"ip_hidden_states": image_tokens}
        qkv_weights = iter(joined.qkv_weights)
        for i, group in enumerate(joined.groups):
            texts = joined.text_keys_and_values(context, i)
            images = iter(self._image_keys_and_values(group, image_tokens))
            for block, text, qkv_weight in zip(group, texts, qkv_weights, strict=False):
                if not _is_plain(block.attn1.processor):
                    qkv_weight = None
                processor = block.attn2.processor
                if image_tokens is not None and _shows_image(processor):
                    yield qkv_weight, KeysValues(*text, *next(images))
                elif isinstance(processor, DecoupledCrossAttention) or _is_plain(processor):
                    yield qkv_weight, KeysValues(*text)
                else:
                    yield qkv_weight, ProcessorInputs(context, arguments)

    @staticmethod
    def _image_keys_and_values(
        group: Sequence[BasicTransformerBlock], image_tokens: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Of those sites of a group that show the image."""
        processors = [block.attn2.processor for block in group if _shows_image(block.attn2.processor)]
        if image_tokens is None or not processors:
            return []
        return grouped_keys_and_values(image_tokens, [processor.image_attention for processor in processors])


def _is_plain(processor: Any) -> bool:
    return isinstance(processor, AttnProcessor2_0)


def _shows_image(processor: Any) -> bool:
    return isinstance(processor, DecoupledCrossAttention) and processor.scale != 0.0


def _to_tokens(model: Transformer2DModel, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b s d"]:
    """Normalise and project."""
    return _project(model.proj_in, model.norm(x).permute(0, 2, 3, 1).flatten(1, 2))


def _to_picture(
    model: Transformer2DModel, tokens: Float[Tensor, "b s d"], x: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """Project back and add to what came in."""
    batch_size, _, height, width = x.shape
    return x + _project(model.proj_out, tokens).view(batch_size, height, width, -1).permute(0, 3, 1, 2)


def _project(layer: nn.Module, tokens: Float[Tensor, "b s d"]) -> Float[Tensor, "b s e"]:
    """A linear layer, or a 1 x 1 convolution in place of one."""
    if isinstance(layer, nn.Conv2d):
        return F.linear(tokens, layer.weight.flatten(1), layer.bias)
    return cast(Tensor, layer(tokens))


_BLOCK_TYPES = {"CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D", "UpBlock2D"}


def _plain_resnet(block: ResnetBlock2D) -> bool:
    return (
        block.time_embedding_norm == "default"
        and isinstance(block.time_emb_proj, nn.Linear)
        and isinstance(block.nonlinearity, nn.SiLU)
        and (block.upsample, block.downsample, block.output_scale_factor, block.skip_time_act)
        == (None, None, 1.0, False)
    )


def _plain_transformer(block: BasicTransformerBlock) -> bool:
    return (
        block.norm_type == "layer_norm"
        and not block.only_cross_attention
        and block.pos_embed is None
        and isinstance(block.ff.net[0], GEGLU)
        and all(_plain_attention(attn) for attn in (block.attn1, block.attn2))
    )


def _plain_attention(attn: Any) -> bool:
    extras = (attn.norm_q, attn.norm_k, attn.norm_cross, attn.group_norm, attn.spatial_norm, attn.to_q.bias)
    return all(part is None for part in extras) and not attn.residual_connection and attn.rescale_output_factor == 1.0
