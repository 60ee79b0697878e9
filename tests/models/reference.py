"""Tiny random models, ours and those of transformers with the same weights, and loss and gradients of both."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pronghorn.models import Decoder, DecoderConfig, assign, family_for, flat_arrays, named_parameters

# Odd vocabulary, 6 query heads on 2 key/value heads; small, and still with everything a big one has.
SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}


def tiny_torch_model(model_type: str, *, seed: int = 0, **overrides):
    """A model of transformers with every parameter random (norms and biases too), fp32, eager attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(SIZES | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.1 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("layer_scalar"):
                buffer.copy_(1 + 0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def to_decoder(torch_model, *, layers: str = "unrolled") -> Decoder:
    """The same model in fp32, weights copied in memory through `tensor_names` and `assign`."""
    hf_config = torch_model.config.to_dict()
    family = family_for(hf_config)
    config = family.config_from_hf(hf_config)
    model = Decoder.abstract(config, dtype=jnp.float32, layers=layers)
    state = torch_model.state_dict()
    names = family.tensor_names(config)
    used = set(names.values()) | ({"lm_head.weight"} if config.tie_word_embeddings else set())
    assert set(state) == used, "every tensor of the checkpoint has a place"
    assign(model, {ours: state[theirs].numpy() for ours, theirs in names.items()})
    return model


def tiny_decoder(config: DecoderConfig, *, layers: str = "unrolled", seed: int = 0) -> Decoder:
    """fp32, every parameter random, large enough for attention to choose; the same in both layouts."""
    model = Decoder.abstract(config, dtype=jnp.float32, layers=layers)
    arrays = {}
    for index, (name, parameter) in enumerate(named_parameters(model).items()):
        noise = np.random.default_rng([seed, index]).standard_normal(parameter.shape, np.float32)
        arrays[name] = 1 + 0.2 * noise if "norm" in name else 0.1 * noise
    assign(model, arrays)
    return model


def compiled(function, model: Decoder):
    """`function(model, *arguments)` compiled, as a function of the arguments."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, *arguments: function(nnx.merge(graph, state), *arguments))
    return lambda *arguments: run(state, *arguments)


def forward(model: Decoder, *arguments) -> np.ndarray:
    """Logits, compiled."""
    return np.asarray(compiled(lambda built, *given: built(*given), model)(*arguments))


def random_ids(count: int, *, batch: int = 1, vocab_size: int = 131, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, count), np.int32)


def torch_results(torch_model, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and the gradient of the mean next-token loss of every parameter by its name in transformers."""
    import torch

    tokens = torch.from_numpy(ids).long()
    logits = torch_model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in torch_model.named_parameters()}
    return logits.detach().numpy(), gradients


def next_token_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
    return -jnp.mean(picked)


def decoder_results(model: Decoder, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As `torch_results`, by our names."""
    graph, state = nnx.split(model)

    def loss(state):
        logits = nnx.merge(graph, state)(ids)
        return next_token_loss(logits, jnp.asarray(ids)), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    return np.asarray(logits), flat_arrays(nnx.merge(graph, gradients))


def gradient_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over norm of the reference."""
    difference = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    return float(difference / np.linalg.norm(expected.astype(np.float64)))
