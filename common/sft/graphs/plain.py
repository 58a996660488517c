"""Torch's own transformers by the book, for tracing: their forward methods decide by shapes and values of tensors.

`is_causal` is but a hint about a mask that is given, too, and is left out.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional

from torch import Tensor, nn


def _encoder_layer(
    layer: Any,
    src: Tensor,
    src_mask: Optional[Tensor] = None,
    src_key_padding_mask: Optional[Tensor] = None,
    is_causal: bool = False,
) -> Tensor:
    """`nn.TransformerEncoderLayer` by the book."""
    x = src
    if layer.norm_first:
        x = x + layer._sa_block(layer.norm1(x), src_mask, src_key_padding_mask, is_causal=False)
        return x + layer._ff_block(layer.norm2(x))  # type: ignore[no-any-return]
    x = layer.norm1(x + layer._sa_block(x, src_mask, src_key_padding_mask, is_causal=False))
    return layer.norm2(x + layer._ff_block(x))  # type: ignore[no-any-return]


def _encoder(
    encoder: Any,
    src: Tensor,
    mask: Optional[Tensor] = None,
    src_key_padding_mask: Optional[Tensor] = None,
    is_causal: Optional[bool] = None,
) -> Tensor:
    """`nn.TransformerEncoder` by the book."""
    x = src
    for layer in encoder.layers:
        x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
    return x if encoder.norm is None else encoder.norm(x)


def _decoder(
    decoder: Any,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Optional[Tensor] = None,
    memory_mask: Optional[Tensor] = None,
    tgt_key_padding_mask: Optional[Tensor] = None,
    memory_key_padding_mask: Optional[Tensor] = None,
    tgt_is_causal: Optional[bool] = None,
    memory_is_causal: bool = False,
) -> Tensor:
    """`nn.TransformerDecoder` by the book; its layers can be traced as they are."""
    x = tgt
    for layer in decoder.layers:
        x = layer(x, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
    return x if decoder.norm is None else decoder.norm(x)


def _transformer(
    transformer: Any,
    src: Tensor,
    tgt: Tensor,
    src_mask: Optional[Tensor] = None,
    tgt_mask: Optional[Tensor] = None,
    memory_mask: Optional[Tensor] = None,
    src_key_padding_mask: Optional[Tensor] = None,
    tgt_key_padding_mask: Optional[Tensor] = None,
    memory_key_padding_mask: Optional[Tensor] = None,
    src_is_causal: Optional[bool] = None,
    tgt_is_causal: Optional[bool] = None,
    memory_is_causal: bool = False,
) -> Tensor:
    """`nn.Transformer` by the book."""
    memory = transformer.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask)
    masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
    return transformer.decoder(tgt, memory, *masks)  # type: ignore[no-any-return]


PLAIN: Dict[type, Callable[..., Any]] = {
    nn.Transformer: _transformer,
    nn.TransformerDecoder: _decoder,
    nn.TransformerEncoder: _encoder,
    nn.TransformerEncoderLayer: _encoder_layer,
}
"""What is traced in the place of a class's forward method."""
