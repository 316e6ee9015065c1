"""The attention over text and image keys together is the sum of two attentions, in numbers and gradients."""

import pytest
import torch
import torch.nn.functional as F

from ipa_train.adapter.decoupled import JoinedKeysAttention, decoupled_attention


@pytest.fixture
def inputs():
    """Queries, text keys and values, image keys and values, of three heads."""
    generator = torch.Generator().manual_seed(0)
    lengths = {7: True, 6: False, 4: True}

    def draw(length):
        shape = (2, 3, length, 5)
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=lengths[length])

    return [draw(length) for length in (7, 6, 6, 4, 4)]


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_it_is_the_sum_of_two_attentions(inputs, scale):
    query, text_key, text_value, image_key, image_value = inputs
    expected = F.scaled_dot_product_attention(query, text_key, text_value)
    expected = expected + scale * F.scaled_dot_product_attention(query, image_key, image_value)
    mixed = decoupled_attention(query, (text_key, text_value), (image_key, image_value), scale)
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_gradients(inputs, scale):
    query, text_key, text_value, image_key, image_value = inputs
    assert torch.autograd.gradcheck(
        lambda q, k, v: JoinedKeysAttention.apply(q, text_key, text_value, k, v, scale), (query, image_key, image_value)
    )
