"""Architectures: one decoder, configured; one small file a family."""

from pronghorn.models.config import DecoderConfig, RopeConfig
from pronghorn.models.decoder import MEMORY_POLICIES, Decoder, Segment, Source
from pronghorn.models.families import FAMILIES, Family, family_for
from pronghorn.models.layers import DecoderLayer, Embedding, Linear, LoRAParam, RMSNorm
from pronghorn.models.parameters import Parameter, assign, flat_arrays, named_parameters

__all__ = [
    "FAMILIES",
    "MEMORY_POLICIES",
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "Embedding",
    "Family",
    "Linear",
    "LoRAParam",
    "Parameter",
    "RMSNorm",
    "RopeConfig",
    "Segment",
    "Source",
    "assign",
    "family_for",
    "flat_arrays",
    "named_parameters",
]
