"""Presets."""
import dataclasses

from lmjax.models.decoder import DecoderConfig

PRESETS = {"tiny-1m": DecoderConfig(num_layers=4, d_model=128, num_heads=4)}


def preset(name: str, **changes) -> DecoderConfig:
    return dataclasses.replace(PRESETS[name], **changes)
