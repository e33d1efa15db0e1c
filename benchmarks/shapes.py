"""The linears that LoRA adapts in three published models, from their configurations.

============  =======================================================================================================
Llama-3-8B    meta-llama/Meta-Llama-3-8B, config.json: hidden_size 4096, intermediate_size 14336, 32 layers, 32 heads,
              8 key-value heads (of 128)
Qwen2.5-0.5B  Qwen/Qwen2.5-0.5B, config.json: hidden_size 896, intermediate_size 4864, 24 layers, 14 heads, 2 key-value
              heads (of 64)
ViT-B         google/vit-base-patch16-224, config.json (arXiv 2010.11929, table 1): hidden_size 768, intermediate_size
              3072, 12 layers, 12 heads
============  =======================================================================================================
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """``blocks`` times the linears ``(d_in, d_out)``."""

    blocks: int
    linears: tuple[tuple[int, int], ...]

    @property
    def pairs(self) -> int:
        """Adapters in all."""
        return self.blocks * len(self.linears)


def gated(blocks: int, hidden: int, inner: int, key_value: int) -> Shape:
    """Return q, k, v, o, gate, up, down of a Llama-like model."""
    h, i, kv = hidden, inner, key_value
    return Shape(blocks, ((h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)))


def plain(blocks: int, hidden: int, inner: int) -> Shape:
    """Return q, k, v, o and the two linears of the feed-forward part."""
    h, i = hidden, inner
    return Shape(blocks, ((h, h), (h, h), (h, h), (h, h), (h, i), (i, h)))


MODELS = {
    "ViT-B": plain(12, 768, 3072),
    "Qwen2.5-0.5B": gated(24, 896, 4864, 128),
    "Llama-3-8B": gated(32, 4096, 14336, 1024),
}


def square(pairs: int, d: int) -> Shape:
    """Return equal square linears, for growth along one axis at a time."""
    return Shape(pairs, ((d, d),))
