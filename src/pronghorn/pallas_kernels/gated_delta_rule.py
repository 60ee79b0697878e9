"""The gated delta rule: linear attention whose state forgets, and overwrites what a key had stored.

A head's state S `[dk, dv]` is zero where a segment starts, and for every token, with α = exp(g) and β in [0, 1],

    S ← α S,    S ← S + k (β (v − Sᵀk))ᵀ,    o = scale Sᵀq

In chunks of C tokens, with c the running sum of g inside a chunk, D_ij = exp(c_i − c_j) for i >= j, e_i = exp(c_i),
w_i = exp(c_last − c_i), γ = exp(c_last), and S the state in front of the chunk:

    A = strictly lower part of (β_i k_i·k_j D_ij),    T = (I + A)⁻¹,    [U, W] = T [β v, β e k]
    V = U − W S                                        what every token writes
    O = scale ((e q) S + ((q kᵀ) D) V),    S ← γ S + (w k)ᵀ V

Segments cut all of it: D is zero between two segments, e and γ where the state belongs to an earlier one, w where a
later one has started. Backward, from dO and the gradient R of the state behind the chunk, with P = scale (q kᵀ) D:

    dV = Pᵀ dO + (w k) R,    gradient of S: γ R + scale (e q)ᵀ dO − Wᵀ dV           (from the last chunk to the first)
    [Xv, Xk] = Tᵀ [dV, −dV Sᵀ],    dA = −(Xv Uᵀ + Xk Wᵀ), strictly lower
    d(β v) = Xv,    d(β e k) = Xk,    d(e q) = scale dO Sᵀ,    d(w k) = V Rᵀ,    dP = dO Vᵀ

and by the product rule to q, k, v, β and c; dg is the sum of dc over what follows in the chunk.

Saved: q, k, v, g, β; by 16-bit kernels T as well, as they round it (2 C bytes a token and value head, named
`INVERSE_NAME` for `jax.checkpoint` policies): it is most of the work in front of the walks. U, W and the chunks' states
are computed again in the backward pass.

XLA computes all of it in fp32. With kernels, 16-bit arguments stay as they are: `gated_delta_chunks` has what is inside
of a chunk, `gated_delta_scan` the walks from one to the next; for fp32 arguments the walks alone are kernels.

Sources: Yang, Kautz and Hatamizadeh, Gated Delta Networks, 2024, arXiv:2412.06464, section 3; the chunks are those of
Yang et al., Parallelizing Linear Transformers with the Delta Rule, 2024, arXiv:2406.06484, section 3.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import gated_delta_chunks, launch
from pronghorn.pallas_kernels.gated_delta_chunks import Rows
from pronghorn.pallas_kernels.gated_delta_scan import chunk_state_gradients, chunk_states
from pronghorn.pallas_kernels.token_chunks import (
    chunk_decays,
    cut,
    decay_gradient,
    group_sum,
    joined,
    pair_decays,
    product,
    segment_runs,
    segment_starts,
)

CHUNK = 64
INVERSE_NAME = "gated_delta_inverse"
_SMALLEST = 16  # of a side of a product on tensor cores


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """Read a state that every token decays and corrects.

    Args:
      q, k: [batch, seq, heads, dk]; bf16, fp16 or fp32. Keys of length one keep the state bounded. Each serves
        value_heads / heads value heads that follow one another.
      v: [batch, seq, value_heads, dv], the dtype of q.
      g: [batch, seq, value_heads], log of the decay, at most 0; computed with in fp32.
      beta: [batch, seq, value_heads], how much of what the key had stored is replaced; computed with in fp32.
      segment_ids: int [batch, seq]; the state starts anew wherever the id changes. None: each row is one segment.
      scale: factor of the output; default 1 / sqrt(dk).
      implementation: "pallas" or "xla", see above. None takes the kernels on a GPU.

    Returns:
      [batch, seq, value_heads, dv] in the dtype of v.

    Raises:
      InputError: when the shapes do not fit each other.
    """
    _check_shapes(q, k, v, g, beta, segment_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with_kernel = launch.resolve(implementation) == "pallas"
    if v.size == 0:
        return jnp.zeros_like(v)
    g, beta = g.astype(jnp.float32), beta.astype(jnp.float32)
    return _gated_delta_rule(scale, with_kernel, q, k, v, g, beta, segment_runs(segment_ids, q.shape[:2]))


def continue_gated_delta_rule(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(output, state) of tokens that follow those already in the state; not to be differentiated.

    Arguments as in `gated_delta_rule`, with state fp32 [batch, value_heads, dk, dv]. A token with g = 0 and beta = 0
    leaves the state as it is.
    """
    _check_shapes(q, k, v, g, beta, None)
    size = min(CHUNK, launch.next_power_of_2(q.shape[1]))
    runs = segment_runs(None, q.shape[:2])
    c = _chunks(q, k, v, g.astype(jnp.float32), beta.astype(jnp.float32), runs, size, carried=True)
    out, after = _forward(c, q.shape[-1] ** -0.5, state, with_kernel=False)
    assert after is not None
    return joined(out, q.shape[1]).astype(v.dtype), after


def gated_delta_rule_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """The oracle of `gated_delta_rule`: one token after the other, in fp32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = v.shape[2] // k.shape[2]
    q32, k32 = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (q, k))
    runs = segment_runs(segment_ids, q.shape[:2])
    starts = segment_starts(runs)

    def one_token(state, token):
        q, k, v, g, beta, start = token
        state = jnp.where(start[:, None, None, None], 0.0, state * jnp.exp(g)[..., None, None])
        stored = product("bhkv,bhk->bhv", state, k)
        state = state + k[..., None] * (beta[..., None] * (v - stored))[..., None, :]
        return state, scale * product("bhkv,bhk->bhv", state, q)

    tokens = (q32, k32, v.astype(jnp.float32), g.astype(jnp.float32), beta.astype(jnp.float32), starts)
    zero = jnp.zeros((q.shape[0], v.shape[2], q.shape[3], v.shape[3]), jnp.float32)
    _, out = jax.lax.scan(one_token, zero, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(out, 0, 1).astype(v.dtype)


def _check_shapes(q, k, v, g, beta, segment_ids):
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:2] != q.shape[:2]:
        raise InputError(
            f"gated_delta_rule: q {q.shape}, k {k.shape} and v {v.shape} "
            "must be [batch, seq, heads, dim], q and k alike."
        )
    if v.shape[2] % q.shape[2]:
        raise InputError(
            f"gated_delta_rule: {v.shape[2]} value heads are no multiple of {q.shape[2]} query and key heads."
        )
    if g.shape != v.shape[:3] or beta.shape != v.shape[:3]:
        raise InputError(
            f"gated_delta_rule: g {g.shape} and beta {beta.shape} must be [batch, seq, value heads] = {v.shape[:3]}."
        )
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise InputError(
            f"gated_delta_rule: segment_ids {segment_ids.shape} must be [batch, seq] = {q.shape[:2]}."
        )


class _Chunks(NamedTuple):
    """Everything by chunk, fp32: q, k, v [chunks, batch, value_heads, C, dim]; the others as in the file's formulas,
    [.., C], `pairs` (D) [.., C, C] and `through` (γ) [chunks, batch, value_heads]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    pairs: jax.Array
    into: jax.Array
    out_of: jax.Array
    through: jax.Array


def _rows(g: jax.Array, beta: jax.Array, runs: jax.Array, size: int, *, carried: bool = False) -> Rows:
    """`carried` as in `chunk_decays`."""
    return Rows(cut(beta, size), *chunk_decays(g, runs, size, carried=carried))


def _chunks(q, k, v, g, beta, runs, size: int, *, carried: bool = False) -> _Chunks:
    """`carried` as in `chunk_decays`."""
    group = v.shape[2] // k.shape[2]
    rows = _rows(g, beta, runs, size, carried=carried)
    q, k = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (q, k))
    q, k, v = (cut(x, size) for x in (q, k, v.astype(jnp.float32)))
    pairs = pair_decays(rows.decay, rows.runs)
    return _Chunks(q, k, v, rows.beta, pairs, rows.into, rows.out_of, rows.through)


def _solved(c: _Chunks) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(A, T, U, W)."""
    coupling = c.beta[..., None] * product("nbhik,nbhjk->nbhij", c.k, c.k) * c.pairs
    coupling = jnp.tril(coupling, -1)
    right = jnp.concatenate([c.beta[..., None] * c.v, (c.beta * c.into)[..., None] * c.k], axis=-1)
    inverse = unit_lower_inverse(coupling)
    both = product("nbhij,nbhjd->nbhid", inverse, right)
    return coupling, inverse, both[..., : c.v.shape[-1]], both[..., c.v.shape[-1] :]


def unit_lower_inverse(strict: jax.Array) -> jax.Array:
    """(I + A)⁻¹ of strictly lower A [.., C, C], C a power of two, fp32.

    From blocks on the diagonal to blocks of twice the size, log2 C times, in products alone:

        [[L, 0], [A, M]]⁻¹ = [[L⁻¹, 0], [−M⁻¹ A L⁻¹, M⁻¹]]

    As stable as substitution in blocks. LAPACK's triangular solve, which XLA takes on a CPU, waits inside a thread of
    XLA's pool for other threads of the pool: two at a time stand still forever on two cores (jaxlib 0.10 and 0.11).
    """
    size, width = strict.shape[-1], 1
    inverse = jnp.ones((*strict.shape[:-1], 1, 1), strict.dtype)
    while width < size:
        pairs = size // (2 * width)
        blocks = strict.reshape(*strict.shape[:-2], pairs, 2 * width, pairs, 2 * width)
        on_diagonal = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        below = -product("...ij,...jk,...kl->...il", second, on_diagonal[..., width:, :width], first)
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([above, jnp.concatenate([below, second], axis=-1)], axis=-2)
        width *= 2
    return inverse[..., 0, :, :]


def _states(c: _Chunks, u: jax.Array, w: jax.Array, state: jax.Array):
    """(state behind the last chunk, (states in front of every chunk, V of every chunk))."""

    def one_chunk(state, chunk):
        u, w, leaving, through = chunk
        written = u - product("bhik,bhkv->bhiv", w, state)
        after = through[..., None, None] * state + product("bhik,bhiv->bhkv", leaving, written)
        return after, (state, written)

    return jax.lax.scan(one_chunk, state, (u, w, c.out_of[..., None] * c.k, c.through))


def _state_gradients(w, arriving, leaving, through, dout, local, state):
    """(R behind every chunk, dV of every chunk), from the last to the first; `local` is Pᵀ dO, state zeros."""

    def one_chunk(after, chunk):
        w, arriving, leaving, through, dout, local = chunk
        d_written = local + product("bhik,bhkv->bhiv", leaving, after)
        before = through[..., None, None] * after + product("bhik,bhiv->bhkv", arriving, dout)
        return before - product("bhik,bhiv->bhkv", w, d_written), (after, d_written)

    chunks = (w, arriving, leaving, through, dout, local)
    return jax.lax.scan(one_chunk, state, chunks, reverse=True)[1]


def _forward(
    c: _Chunks, scale: float, state: jax.Array, *, with_kernel: bool
) -> tuple[jax.Array, jax.Array | None]:
    """(O by chunk, the state at the end); the kernel starts from zeros and gives no state."""
    _, _, u, w = _solved(c)
    after = None
    if with_kernel:
        states, written = _walked(chunk_states, (u, w, c.k), (c.out_of, c.through), ())
    else:
        after, (states, written) = _states(c, u, w, state)
    inside = product("nbhik,nbhjk->nbhij", c.q, c.k) * c.pairs
    out = product("nbhik,nbhkv->nbhiv", c.into[..., None] * c.q, states)
    return scale * (out + product("nbhij,nbhjv->nbhiv", inside, written)), after


def _walked(kernel, before, numbers, behind) -> tuple[jax.Array, jax.Array]:
    """A walk of `gated_delta_scan` on arrays by chunk: its arguments in three parts, of tokens, numbers, and tokens."""
    key_dim = before[-1].shape[-1]
    value_dim = (behind or before)[0].shape[-1]
    size = before[0].shape[-2]
    in_rows = [[_padded(joined(x, x.shape[0] * size)) for x in part] for part in (before, behind)]
    states, tokens = kernel(*in_rows[0], *numbers, *in_rows[1])
    return states[..., :key_dim, :value_dim], cut(tokens, size)[..., :value_dim]


def _padded(x: jax.Array) -> jax.Array:
    """Zeros behind the last axis up to a size that a kernel's tile may have, which add nothing to a product."""
    wanted = max(_SMALLEST, launch.next_power_of_2(x.shape[-1]))
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, wanted - x.shape[-1])))


def _has_chunk_kernels(dtype: Any) -> bool:
    """fp32 tiles of whole heads are more than a multiprocessor's shared memory holds."""
    return jnp.dtype(dtype).itemsize == 2


def _for_kernels(*arrays: jax.Array) -> list[jax.Array]:
    """[batch, seq, heads, dim] with zeros up to whole chunks and to sizes of tiles."""
    ends = -arrays[0].shape[1] % CHUNK
    return [_padded(jnp.pad(x, ((0, 0), (0, ends), (0, 0), (0, 0)))) for x in arrays]


def _forward_in_kernels(scale, q, k, v, g, beta, runs) -> tuple[jax.Array, jax.Array]:
    """O of 16-bit arguments, [batch, seq, value_heads, dv], and T, [chunks, batch, value_heads, C, C]."""
    _, seq, _, value_dim = v.shape
    rows = _rows(g, beta, runs, CHUNK)
    q, k, v = _for_kernels(q, k, v)
    inverse, u, w = gated_delta_chunks.prepare(k, v, rows)
    states, written = chunk_states(u, w, k, rows.out_of, rows.through)
    return gated_delta_chunks.output(q, k, written, states, rows, scale)[:, :seq, :, :value_dim], inverse


def _backward_in_kernels(scale, q, k, v, g, beta, runs, inverse, dout) -> dict[str, jax.Array]:
    """Gradients of 16-bit q, k and v, [batch, seq, value_heads, dim]; of beta and decay by chunk."""
    (_, seq, _, key_dim), value_dim = q.shape, v.shape[-1]
    rows = _rows(g, beta, runs, CHUNK)
    q, k, v, dout = _for_kernels(q, k, v, dout)
    u, w = gated_delta_chunks.solve(k, v, inverse, rows)
    states, written = chunk_states(u, w, k, rows.out_of, rows.through)
    local = gated_delta_chunks.local_gradient(q, k, dout, rows, scale)
    after, d_written = chunk_state_gradients(
        w, q, k, scale * rows.into, rows.out_of, rows.through, dout, local
    )
    dq, d_w, dk, d_decay = gated_delta_chunks.read_gradients(
        q, k, written, d_written, dout, states, after, rows, scale
    )
    dv, more_dk, d_beta, more_d_decay = gated_delta_chunks.write_gradients(
        k, v, inverse, u, w, d_written, d_w, rows
    )
    dk = dk.astype(jnp.float32) + more_dk.astype(jnp.float32)
    return {
        "q": dq[:, :seq, :, :key_dim].astype(jnp.float32),
        "k": dk[:, :seq, :, :key_dim],
        "v": dv[:, :seq, :, :value_dim],
        "beta": d_beta,
        "decay": d_decay + more_d_decay,
    }


def _no_state(c: _Chunks) -> jax.Array:
    return jnp.zeros((*c.q.shape[1:3], c.q.shape[-1], c.v.shape[-1]), jnp.float32)


def _backward(c: _Chunks, scale: float, dout: jax.Array, *, with_kernel: bool) -> dict[str, jax.Array]:
    """Gradients by chunk of q, k, v, beta and decay (c of the formulas)."""
    coupling, inverse, u, w = _solved(c)
    arriving, leaving = scale * c.into[..., None] * c.q, c.out_of[..., None] * c.k
    scores = product("nbhik,nbhjk->nbhij", c.q, c.k)
    inside = scale * scores * c.pairs
    local = product("nbhij,nbhiv->nbhjv", inside, dout)
    if with_kernel:
        states, written = _walked(chunk_states, (u, w, c.k), (c.out_of, c.through), ())
        numbers = (scale * c.into, c.out_of, c.through)
        after, d_written = _walked(chunk_state_gradients, (w, c.q, c.k), numbers, (dout, local))
    else:
        _, (states, written) = _states(c, u, w, _no_state(c))
        after, d_written = _state_gradients(w, arriving, leaving, c.through, dout, local, _no_state(c))
    d_w = -product("nbhiv,nbhkv->nbhik", d_written, states)
    x = product("nbhji,nbhjd->nbhid", inverse, jnp.concatenate([d_written, d_w], axis=-1))
    x_v, x_k = x[..., : c.v.shape[-1]], x[..., c.v.shape[-1] :]
    d_coupling = -jnp.tril(product("nbhiv,nbhjv->nbhij", x_v, u) + product("nbhik,nbhjk->nbhij", x_k, w), -1)
    d_inside = product("nbhiv,nbhjv->nbhij", dout, written)
    d_arriving = product("nbhiv,nbhkv->nbhik", dout, states)  # of e q, but for the scale
    d_leaving = product("nbhiv,nbhkv->nbhik", written, after)

    d_scores = scale * d_inside * c.pairs
    d_keys = c.beta[..., None] * d_coupling * c.pairs  # of k_i·k_j
    entering = c.beta * c.into
    dq = scale * c.into[..., None] * d_arriving + product("nbhij,nbhjk->nbhik", d_scores, c.k)
    dk = entering[..., None] * x_k + c.out_of[..., None] * d_leaving
    dk = dk + product("nbhij,nbhik->nbhjk", d_scores, c.q)
    dk = dk + product("nbhij,nbhjk->nbhik", d_keys + jnp.swapaxes(d_keys, -1, -2), c.k)
    keys = product("nbhik,nbhjk->nbhij", c.k, c.k)
    d_beta = jnp.sum(x_v * c.v, -1) + c.into * jnp.sum(x_k * c.k, -1)
    d_beta = d_beta + jnp.sum(d_coupling * keys * c.pairs, -1)
    # Of the exponents: e and D's rows add, D's columns and w subtract, the last token gets what w and γ add.
    d_pairs = d_inside * inside + d_coupling * coupling
    d_out_of = jnp.sum(d_leaving * leaving, -1)
    d_decay = jnp.sum(d_pairs, -1) - jnp.sum(d_pairs, -2) - d_out_of
    d_decay = d_decay + jnp.sum(d_arriving * arriving, -1) + entering * jnp.sum(x_k * c.k, -1)
    d_end = jnp.sum(d_out_of, -1) + c.through * jnp.sum(states * after, (-1, -2))
    d_decay = d_decay.at[..., -1].add(d_end)
    return {"q": dq, "k": dk, "v": c.beta[..., None] * x_v, "beta": d_beta, "decay": d_decay}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated_delta_rule(scale, with_kernel, q, k, v, g, beta, runs):
    return _gated_delta_rule_forward(scale, with_kernel, q, k, v, g, beta, runs)[0]


def _gated_delta_rule_forward(scale, with_kernel, q, k, v, g, beta, runs):
    inputs = (q, k, v, g, beta, runs)
    if with_kernel and _has_chunk_kernels(v.dtype):
        out, inverse = _forward_in_kernels(scale, *inputs)
        return out, (*inputs, checkpoint_name(inverse, INVERSE_NAME))
    c = _chunks(q, k, v, g, beta, runs, CHUNK)
    out, _ = _forward(c, scale, _no_state(c), with_kernel=with_kernel)
    return joined(out, q.shape[1]).astype(v.dtype), (*inputs, None)


def _gated_delta_rule_backward(scale, with_kernel, saved, dout):
    q, k, v, g, beta, runs, inverse = saved
    seq = q.shape[1]
    if inverse is not None:
        found = _backward_in_kernels(scale, q, k, v, g, beta, runs, inverse, dout)
    else:
        c = _chunks(q, k, v, g, beta, runs, CHUNK)
        found = _backward(c, scale, cut(dout.astype(jnp.float32), CHUNK), with_kernel=with_kernel)
        found |= {name: joined(found[name], seq) for name in ("q", "k", "v")}
    dg, d_beta = decay_gradient(found["decay"], seq), joined(found["beta"], seq)
    return group_sum(found["q"], q), group_sum(found["k"], k), found["v"].astype(v.dtype), dg, d_beta, None


_gated_delta_rule.defvjp(_gated_delta_rule_forward, _gated_delta_rule_backward)
