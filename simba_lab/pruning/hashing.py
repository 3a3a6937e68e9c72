"""Scattered bits of tokens and places: randomness that needs no generator and is the same in any batch."""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_MIX = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def mix(value: Tensor) -> Tensor:
    """A bijection of int64 that scatters bits (the finaliser of SplitMix64, Steele et al. 2014); wraps around."""
    value = (value ^ _shift(value, 30)) * _MIX[0]
    value = (value ^ _shift(value, 27)) * _MIX[1]
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of a signed integer."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix_int(value: int) -> int:
    """:func:`mix` of one number, without a tensor: reading one back would make a CUDA device wait."""
    value %= 1 << 64
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        value = (value ^ (value >> shift)) * factor % (1 << 64)
    return _signed(value ^ (value >> 31))


def sequence_key(tokens: Tensor) -> Tensor:
    """Hash (B,) of token ids (B, T): depends on every token and its place, not on the batch."""
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device) << 32
    return mix(mix(tokens + place).sum(1))
