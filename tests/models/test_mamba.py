"""State-space mixers in a decoder: packing leaks nothing, and decoding takes padding, restarts and stacked layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig, merge, split
from pronghorn.lora_sites import select
from pronghorn.models import DecoderConfig
from pronghorn.models.state_space_config import StateSpaceConfig
from tests.models.decoding_checks import check_packed_document, check_pieces_and_restart
from tests.models.reference import random_ids, tiny_decoder
from tests.tolerances import MODEL_LOGITS, assert_close

MIXER = StateSpaceConfig(heads=4, head_dim=6, groups=2, state_dim=8, conv_width=4, step_limits=(0.3, 1.1))
IN_PLACE = DecoderConfig(
    "granite4", 131, 24, 40, 3, 2, 1, 12, 512, layer_kinds=("mamba", "mamba", "full"), state_space=MIXER
)
IDS = random_ids(30, batch=2)
BESIDE = dataclasses.replace(
    IN_PLACE,
    family="falcon_h1",
    layer_kinds=("hybrid",) * 3,
    attention_input_scale=0.8,
    gate_scale=0.7,
    state_space=dataclasses.replace(MIXER, gated_norm="norm_first", input_scale=1.3, output_scale=0.6),
)
ALONE = dataclasses.replace(
    IN_PLACE,
    family="nemotron_h",
    num_layers=4,
    block="single",
    activation="relu2",
    gated_mlp=False,
    layer_kinds=("mamba", "mlp", "mlp", "full"),
    layer_ropes=("none",) * 4,
)
MODELS = {
    "in place": tiny_decoder(IN_PLACE, layers="scanned"),
    "beside": tiny_decoder(BESIDE, layers="scanned"),
    "alone": tiny_decoder(ALONE, layers="scanned"),
}


def close(actual, expected):
    assert np.std(expected) > 0.1
    assert np.max(np.abs(np.asarray(actual) - np.asarray(expected))) <= MODEL_LOGITS


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_packed_document_is_the_document_alone(model):
    check_packed_document(model, IDS, close)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_padded_pieces_single_tokens_and_a_row_that_starts_anew_equal_full_passes(model):
    check_pieces_and_restart(model, IDS, close)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_memory_policies_have_the_same_gradients(model):
    graph, trained, frozen = split(model)

    def gradients(policy):
        def loss(trained):
            model = merge(graph, trained, frozen)
            return jnp.sum(jnp.sin(model.logits(model.hidden_states(IDS, memory_policy=policy))))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(trained))

    expected = gradients("keep")
    assert all(np.any(np.asarray(gradient)) for gradient in expected)
    for policy in ("attention", "offload_projections"):
        for found, kept in zip(gradients(policy), expected, strict=True):
            assert_close(found, kept)


def test_all_linear_of_falcon_h1_leaves_out_what_peft_refuses_and_naming_it_is_refused():
    names = select(MODELS["beside"], LoRAConfig(targets="all-linear"))
    assert "layers.0.mamba.in_proj" in names and "layers.0.self_attn.o_proj" in names
    assert not any("out_proj" in name for name in names)
    assert "layers.0.mamba.out_proj" in select(MODELS["in place"], LoRAConfig(targets="all-linear"))
    with pytest.raises(InputError, match=r"layers\.0\.mamba\.out_proj, which PEFT adapts in no model"):
        select(MODELS["beside"], LoRAConfig(targets=("out_proj",)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"state_space": None}, "state_space is None"),
        ({"layer_kinds": ("mamba", "mlp", "full")}, "one part"),
        ({"block": "sandwich"}, "RMS norm"),
        ({"layer_kinds": ("mamba",) * 3}, "no layer attends"),
    ],
)
def test_what_mixers_do_not_go_with_is_refused(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(IN_PLACE, **change)
