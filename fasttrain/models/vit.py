"""Vision transformers: width is the embedding, depth the number of blocks (Dosovitskiy et al. 2021).

Square patches, a linear embedding, learned positions, pre-norm blocks of self-attention and a perceptron of four times
the width with the variant's activation, a last layer norm, the mean over the patches instead of a class token (Beyer et
al. 2022), and a linear head.
"""

import torch

from fasttrain.models.mlp import activation
from fasttrain.spec import Variant

_RATIO = 4  # units of a block's perceptron, by the width
_ALONG = 4  # patches along a side, at least, where the spec leaves their size open


def patch_side(variant: Variant, in_shape: tuple[int, ...]) -> int:
    """Side of a patch in pixels: the spec's, or the largest that cuts each side of the image into at least 4."""
    if variant.patch:
        return variant.patch
    _, height, width = in_shape
    sides = [side for side in range(1, min(height, width) + 1) if height % side == width % side == 0]
    return max((side for side in sides if min(height, width) // side >= _ALONG), default=1)


def tokens(variant: Variant, in_shape: tuple[int, ...]) -> int:
    """T, patches of an image."""
    side = patch_side(variant, in_shape)
    return (in_shape[1] // side) * (in_shape[2] // side)


def parameter_count(variant: Variant, in_shape: tuple[int, ...]) -> int:
    """Trained parameters: embedding, positions, blocks, norms and head, biases included."""
    w = variant.width
    inputs = in_shape[0] * patch_side(variant, in_shape) ** 2
    block = 4 * (w + 1) * w + (w + 1) * _RATIO * w + (_RATIO * w + 1) * w + 4 * w
    around = (inputs + 1) * w + tokens(variant, in_shape) * w + 2 * w + (w + 1) * variant.classes
    return around + variant.depth * block


def sample_elements(variant: Variant, in_shape: tuple[int, ...]) -> int:
    """Numbers that a pass over one sample keeps for the way back."""
    count, w = tokens(variant, in_shape), variant.width
    return count * (2 * w + variant.depth * ((8 + 3 * _RATIO) * w + 3 * variant.heads * count))


def elementwise_sizes(variant: Variant, in_shape: tuple[int, ...]) -> list[int]:
    """Numbers a sample that the activation is applied to."""
    return [tokens(variant, in_shape) * _RATIO * variant.width]


class _Block(torch.nn.Module):
    def __init__(self, variant: Variant) -> None:
        super().__init__()
        w = variant.width
        self._heads = variant.heads
        self.norm1 = torch.nn.LayerNorm(w)
        self.qkv = torch.nn.utils.skip_init(torch.nn.Linear, w, 3 * w)
        self.out = torch.nn.utils.skip_init(torch.nn.Linear, w, w)
        self.norm2 = torch.nn.LayerNorm(w)
        self.up = torch.nn.utils.skip_init(torch.nn.Linear, w, _RATIO * w)
        self.act = activation(variant.activation)
        self.down = torch.nn.utils.skip_init(torch.nn.Linear, _RATIO * w, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, width] to the same."""
        # [B, T, 3 w] to three of [B, heads, T, w / heads].
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self._heads, -1)).movedim(-3, 0).transpose(-3, -2)
        share = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        x = x + self.out((share @ v).transpose(-3, -2).flatten(-2))
        return x + self.down(self.act(self.up(self.norm2(x))))


class ViT(torch.nn.Module):
    """Images [B, C, H, W] to logits [B, classes]; the weights are not drawn."""

    def __init__(self, variant: Variant, in_shape: tuple[int, ...]) -> None:
        super().__init__()
        self._side = patch_side(variant, in_shape)
        inputs = in_shape[0] * self._side**2
        self.embedding = torch.nn.utils.skip_init(torch.nn.Linear, inputs, variant.width)
        self.positions = torch.nn.Parameter(torch.empty(tokens(variant, in_shape), variant.width))
        self.blocks = torch.nn.ModuleList(_Block(variant) for _ in range(variant.depth))
        self.norm = torch.nn.LayerNorm(variant.width)
        self.head = torch.nn.utils.skip_init(torch.nn.Linear, variant.width, variant.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images."""
        side = self._side
        # [B, C, H, W] to [B, T, C side side].
        x = (
            x.unflatten(-2, (-1, side))
            .unflatten(-1, (-1, side))
            .movedim((-4, -2), (-5, -4))
            .flatten(-3)
            .flatten(-3, -2)
        )
        x = self.embedding(x) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(-2))
