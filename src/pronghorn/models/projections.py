"""Linear layers of a layer, as the ops take them: by themselves, or several that read one normalised input."""

import jax
import jax.numpy as jnp
from flax import nnx

from pronghorn.models.layers import LayerNorm, RMSNorm, value_or_none
from pronghorn.pallas_kernels.norm_linears import Dropout, norm_linears
from pronghorn.pallas_kernels.residual_linear import residual_linear
from pronghorn.pallas_kernels.stacked_linears import LinearWeights

# A dropout mask of its own for every linear of a layer: the layer's key is folded with this number.
_DROPOUT_STREAM = {
    "q_proj": 0, "k_proj": 1, "v_proj": 2, "o_proj": 3, "gate_proj": 4, "up_proj": 5, "down_proj": 6, "in_proj": 7,
    "out_proj": 8, "in_proj_qkv": 9, "in_proj_z": 10, "in_proj_b": 11, "in_proj_a": 12,
    "in_proj_qkvz": 18, "in_proj_ba": 19,
    "shared_expert_gate": 13, "q_a_proj": 14, "q_b_proj": 15, "kv_a_proj_with_mqa": 16, "kv_b_proj": 17,
    "per_layer_input_gate": 18, "per_layer_projection": 19, "per_layer_model_projection": 20, "modality_router": 21,
    "prediction_coefs": 22, "correction_coefs": 23, "linear_left": 24, "linear_right": 25,
}  # fmt: skip


def operands(
    holder: nnx.Module, names: tuple[str, ...], dropout_key: jax.Array | None
) -> tuple[tuple[LinearWeights, ...], tuple[float, ...], Dropout | None]:
    """(arrays, scales, dropout) of some linear layers, as the ops take them."""
    linears = [getattr(holder, name) for name in names]
    arrays = []
    for linear in linears:
        a, b = linear.adapter()
        arrays.append(LinearWeights(linear.weight.get_value(), a, b, value_or_none(linear.bias)))
    dropout = None
    if dropout_key is not None and any(linear.lora_dropout for linear in linears):
        keys = tuple(jax.random.fold_in(dropout_key, _DROPOUT_STREAM[name]) for name in names)
        dropout = Dropout(tuple(linear.lora_dropout for linear in linears), keys)
    return tuple(arrays), tuple(linear.lora_scale for linear in linears), dropout


def row_lengths_trained(holder: nnx.Module, names: tuple[str, ...]) -> bool:
    """Whether one of these linear layers has DoRA, which the ops that join several layers do not know."""
    return any(getattr(holder, name).lora_magnitude_vector is not None for name in names)


def one_linear(holder: nnx.Module, name: str, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
    """One linear layer by itself."""
    if dropout_key is not None:
        dropout_key = jax.random.fold_in(dropout_key, _DROPOUT_STREAM[name])
    return getattr(holder, name)(x, dropout_key)


def added_linear(
    holder: nnx.Module, name: str, x: jax.Array, residual: jax.Array, dropout_key: jax.Array | None
) -> jax.Array:
    """residual `[batch, seq, d]` + one linear layer of x `[batch, seq, ..]`, whose features may have several axes."""
    if row_lengths_trained(holder, (name,)):
        return residual + one_linear(holder, name, x.reshape(*residual.shape[:-1], -1), dropout_key)
    (linear,), (scale,), dropout = operands(holder, (name,), dropout_key)
    return residual_linear(residual, x, linear, scale=scale, dropout=dropout)


def normalized_linears(
    norm: RMSNorm | LayerNorm | None,
    holder: nnx.Module,
    names: tuple[str, ...],
    x: jax.Array,
    dropout_key: jax.Array | None,
    *,
    joined: bool = True,
    input_scale: float = 1.0,
) -> tuple[jax.Array, list[jax.Array]]:
    """(x, y of every linear layer named): of input_scale norm(x), or of x where there is no norm.

    The stream has to be read on from the array that is returned, so that its gradient is added where this op's is
    computed. `joined=False` for a stream that others read as well.
    """
    if isinstance(norm, RMSNorm) and joined and not row_lengths_trained(holder, names):
        linears, scales, dropout = operands(holder, names, dropout_key)
        x, outputs = norm_linears(
            x,
            _scaled(norm.weight.get_value(), input_scale),
            linears,
            scales=scales,
            eps=norm.eps,
            weight_offset=input_scale * norm.weight_offset,
            dropout=dropout,
        )
        return x, list(outputs)

    @jax.checkpoint
    def project(x):
        n = x if norm is None else _scaled(norm(x), input_scale)
        return [one_linear(holder, name, n, dropout_key) for name in names]

    return x, project(x)


def _scaled(values: jax.Array, scale: float) -> jax.Array:
    return values if scale == 1.0 else values * jnp.asarray(scale, values.dtype)
