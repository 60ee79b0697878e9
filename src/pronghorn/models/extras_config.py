"""What layers may have beyond attention and a feed-forward network: Gemma 3n and 4 (`models/extras.py`)."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class AltUpConfig:
    """Alternating updates (Baykal et al. 2023, arXiv:2301.13310) and LAuReL (Menghani et al. 2024, arXiv:2411.07501).

    Attributes:
      streams: residual streams side by side, of which a layer computes one.
      active: which one.
      scale_corrected: what the layer's own input is gated by is scaled, one weight a dim.
      laurel_rank: of the low-rank product that is added beside attention.
    """

    streams: int
    active: int
    scale_corrected: bool
    laurel_rank: int


@dataclasses.dataclass(frozen=True)
class ExtrasConfig:
    """Neutral as it is. A tuple has an entry a layer, and is empty where all layers are alike.

    Attributes:
      sliding_head_dim, sliding_kv_heads: of sliding layers, where they are not those of the model; 0 where they are.
      value_norm: every head of the values is divided by its rms.
      keys_as_values: layers that see all have no v_proj: values are what k_proj gives, in front of its norm and rope.
      shared_kv_layers: so many layers at the end have no keys and values of their own: they read those of the last
        layer of their kind in front of them.
      layer_widths: of the feed-forward networks.
      gate_sparsity: share of the gate of a feed-forward network that is cut off, 0 for none (`models/altup.py`).
      input_width: dims of an input that each layer has of its own for every token; 0 for none.
      input_vocab: rows of the table that these are looked up in.
      layer_scalar: what a layer gives is multiplied by a number of the checkpoint.
      altup: several streams, or None for one.
      key_values: where the keys and values of a layer come from, in what `DecoderConfig.of_layer` returns: they are its
        own, its own and read by others, or another's.
    """

    sliding_head_dim: int = 0
    sliding_kv_heads: int = 0
    value_norm: bool = False
    keys_as_values: bool = False
    shared_kv_layers: int = 0
    layer_widths: tuple[int, ...] = ()
    gate_sparsity: tuple[float, ...] = ()
    input_width: int = 0
    input_vocab: int = 0
    layer_scalar: bool = False
    altup: AltUpConfig | None = None
    key_values: Literal["own", "stored", "read"] = "own"

    def check(self, layer_kinds: tuple[str, ...]) -> None:
        """ValueError where it does not go with these layers."""
        count, own = len(layer_kinds), len(layer_kinds) - self.shared_kv_layers
        if set(layer_kinds) - {"full", "sliding"}:
            raise ValueError(f"layers of kinds {', '.join(sorted(set(layer_kinds)))} take no extras")
        for name in ("layer_widths", "gate_sparsity"):
            if len(getattr(self, name)) not in (0, 1, count):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {count} layers")
        if any(not 0 <= share < 1 for share in self.gate_sparsity):
            raise ValueError("gate_sparsity has a share outside of 0 to 1")
        if not 0 <= self.shared_kv_layers <= count or set(layer_kinds[own:]) - set(layer_kinds[:own]):
            raise ValueError(
                f"the last {self.shared_kv_layers} layers read keys and values of kinds that no layer before has"
            )
        if self.altup is not None and not 0 <= self.altup.active < self.altup.streams:
            raise ValueError(f"stream {self.altup.active} of {self.altup.streams} is the active one")

    def of_layer(self, index: int, layer_kinds: tuple[str, ...]) -> "ExtrasConfig":
        """What one layer has, with no entry for the others: layers that are alike are equal."""
        kind, own = layer_kinds[index], len(layer_kinds) - self.shared_kv_layers
        last_of_kind = kind not in layer_kinds[index + 1 : own]
        stored = bool(self.shared_kv_layers) and last_of_kind
        return dataclasses.replace(
            self,
            sliding_head_dim=0,
            sliding_kv_heads=0,
            keys_as_values=self.keys_as_values and kind == "full",
            shared_kv_layers=0,
            layer_widths=(),
            gate_sparsity=self.gate_sparsity[index : index + 1],
            key_values="read" if index >= own else "stored" if stored else "own",
        )
