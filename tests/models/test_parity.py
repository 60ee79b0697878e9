"""Logits and every gradient equal those of transformers in fp32, family by family and rope by rope."""

import numpy as np
import pytest

from pronghorn.models import family_for
from tests.models.reference import (
    decoder_results,
    gradient_error,
    random_ids,
    tiny_torch_model,
    to_decoder,
    torch_results,
)
from tests.tolerances import MODEL_GRADIENT, MODEL_LOGITS

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
    "original_max_position_embeddings": 400,
}

# name -> (model_type, layout, tokens, overrides)
CASES = {
    "llama": ("llama", "unrolled", 500, {}),
    "llama_tied_with_every_bias": (
        "llama",
        "scanned",
        500,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    # The window cuts at 37 of 500 tokens; head_dim is not hidden / heads.
    "mistral_window": (
        "mistral",
        "scanned",
        500,
        {"sliding_window": 37, "head_dim": 10, "num_hidden_layers": 4},
    ),
    "mistral_no_window_tied": (
        "mistral",
        "unrolled",
        500,
        {"sliding_window": None, "head_dim": 10, "tie_word_embeddings": True},
    ),
    "qwen2_tied": ("qwen2", "unrolled", 500, {"tie_word_embeddings": True}),
    "qwen2_max_window_layers": (
        "qwen2",
        "unrolled",
        500,
        {"use_sliding_window": True, "sliding_window": 37, "max_window_layers": 2, "num_hidden_layers": 5},
    ),
    "qwen2_layer_types": (
        "qwen2",
        "scanned",
        500,
        {
            "use_sliding_window": True,
            "sliding_window": 41,
            "num_hidden_layers": 7,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2
            + ["sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", "unrolled", 500, {"head_dim": 12}),
    "qwen3_bias_window_tied": (
        "qwen3",
        "unrolled",
        500,
        {
            "head_dim": 12,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 37,
            "max_window_layers": 1,
        },
    ),
    "rope_linear": ("llama", "unrolled", 500, {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    "rope_dynamic_beyond_its_context": (
        "llama",
        "unrolled",
        500,
        {"max_position_embeddings": 200, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "rope_llama3": ("llama", "unrolled", 500, {"head_dim": 16, "rope_parameters": LLAMA3}),
    "rope_yarn": (
        "llama",
        "unrolled",
        500,
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        },
    ),
    "rope_longrope_short": ("llama", "unrolled", 400, {"head_dim": 16, "rope_parameters": LONGROPE}),
    "rope_longrope_long": ("llama", "unrolled", 500, {"head_dim": 16, "rope_parameters": LONGROPE}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name):
    model_type, layers, tokens, overrides = CASES[name]
    torch_model = tiny_torch_model(model_type, **overrides)
    ids = random_ids(tokens)
    expected_logits, expected_gradients = torch_results(torch_model, ids)
    model = to_decoder(torch_model, layers=layers)
    logits, gradients = decoder_results(model, ids)

    assert np.std(expected_logits) > 0.3, "the comparison is of something"
    assert np.max(np.abs(logits - expected_logits)) <= MODEL_LOGITS
    names = family_for(torch_model.config.to_dict()).tensor_names(model.config)
    assert sorted(names) == sorted(gradients)
    errors = {
        ours: gradient_error(gradients[ours], expected_gradients[theirs]) for ours, theirs in names.items()
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= MODEL_GRADIENT, f"{worst}: {errors[worst]:.2e}"
