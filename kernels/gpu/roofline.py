"""What steps and kernels would take if nothing but memory and matrix units counted."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.gpu.catalogue import Dimensions


@dataclass(frozen=True)
class Card:
    """A GPU's ceilings: bytes a second of its memory, bf16 operations a second."""

    name: str
    bandwidth: float
    operations: float


H100 = Card("H100", 3.35e12, 989e12)
H200 = Card("H200", 4.8e12, 989e12)
CARDS = (H100, H200)
BITS = {"bfloat16": 16.0, "int8": 8.0, "int4": 4.25, "group4": 5.0}


def card_of(name: str) -> Card | None:
    """The card that a device's name says it is."""
    return next((card for card in CARDS if card.name in name), None)


def weight_elements(model: Dimensions) -> int:
    """Elements of every matrix that a step reads; the embedding only where it is the head."""
    heads = model.heads
    layer = model.hidden * (heads.qkv_width + heads.query * heads.dim)
    layer += 3 * model.hidden * model.intermediate
    return model.layers * layer + model.vocab * model.hidden


def kv_bytes(model: Dimensions, element: float = 2.0) -> float:
    """Bytes of one token's keys and values."""
    return 2 * model.layers * model.heads.kv * model.heads.dim * element


def step_seconds(
    model: Dimensions,
    card: Card,
    rows: int,
    context: int,
    weights: str = "bfloat16",
    sequences: int = 0,
) -> float:
    """A step of `rows` tokens of so many sequences (as many if 0), each token behind `context`
    others: the longer of moving and computing. A sequence's tokens read its pages once."""
    elements = weight_elements(model)
    moved = elements * BITS[weights] / 8 + (sequences or rows) * context * kv_bytes(model)
    attention = 4 * model.layers * model.heads.query * model.heads.dim * context
    return max(moved / card.bandwidth, rows * (2 * elements + attention) / card.operations)


def attention_seconds(model: Dimensions, card: Card, rows: int, context: int) -> float:
    """Decode attention of one layer."""
    return rows * context * kv_bytes(model) / model.layers / card.bandwidth


def matmul_seconds(card: Card, rows: int, outputs: int, inputs: int, weights: str) -> float:
    """A matmul: its weight and activations moved, or its products computed."""
    moved = outputs * inputs * BITS[weights] / 8 + 2 * rows * (inputs + outputs)
    return max(moved / card.bandwidth, 2 * rows * outputs * inputs / card.operations)
