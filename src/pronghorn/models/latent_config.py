"""`LatentConfig`: multi-head latent attention in place of grouped heads."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Queries, keys and values are expanded from vectors of low rank, and positions are told apart from contents
    (DeepSeek-V2, arXiv:2405.04434, 2.1). With n the layer's normalised input:

        c_q = norm(W_qa n)            [q_content, q_position] of every head = W_qb c_q   (or W_q n, without a rank)
        [c, k_position] = W_kva n     [k_content, v] of every head = W_kvb norm(c)
        q = [rope(q_position), q_content]       k = [rope(k_position), k_content]        one k_position for all heads

    A head of queries and keys has `position_dim + content_dim` dims, which is `DecoderConfig.head_dim`; the order of
    the two parts is the checkpoint's business alone, q kᵀ being the same for either.

    Attributes:
      query_rank: size of c_q; 0 for queries that are projected at once.
      rank: size of c.
      content_dim, position_dim: dims of a head without a position (`qk_nope_head_dim`), and of those that are rotated
        (`qk_rope_head_dim`).
      value_dim: dims of a head of values.
      norm_eps: of the norms of both latent vectors, whatever that of the stream is.
    """

    rank: int
    content_dim: int
    position_dim: int
    value_dim: int
    query_rank: int = 0
    norm_eps: float = 1e-6
