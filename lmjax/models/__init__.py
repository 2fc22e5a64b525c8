"""Models: importable on their own, with nothing of the training stack.

    from lmjax.models import Decoder, preset
"""

from lmjax.models.decoder import ComputeConfig, Decoder, DecoderConfig
from lmjax.models.presets import PRESETS, preset
from lmjax.nn.moe import MoEConfig
from lmjax.nn.rope import RopeScaling

__all__ = ["PRESETS", "ComputeConfig", "Decoder", "DecoderConfig", "MoEConfig", "RopeScaling", "preset"]
