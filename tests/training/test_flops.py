import jax
import numpy as np
import pytest

from pronghorn.lora import LoRAConfig, add_lora, split
from pronghorn.models import Decoder
from pronghorn.models.state_space_config import StateSpaceConfig
from pronghorn.training.flops import count_flops, device_peak_flops
from tests.training.small import small_config, small_model

# One layer of `small_config`: q and o 24x24, k and v 12x24, three of 40x24; a head of 61x24.
LAYER, HEAD = 2 * 24 * 24 + 2 * 12 * 24 + 3 * 40 * 24, 61 * 24


def flops_of(lora=None, **changes):
    model = Decoder.abstract(small_config(**changes))
    _, trainable, frozen = split(add_lora(model, lora) if lora else model)
    return count_flops(model.config, trainable, frozen)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_full_fine_tuning_multiplies_every_matrix_three_times(tied, layers):
    model = Decoder.abstract(
        small_config(num_layers=3, tie_word_embeddings=tied, qkv_bias=True), layers=layers
    )
    _, trainable, frozen = split(model)
    assert count_flops(model.config, trainable, frozen).per_token == 6 * (3 * LAYER + HEAD)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_multiplies_the_base_twice_and_itself_three_times(tied):
    count = flops_of(LoRAConfig(rank=5, targets=("q_proj", "lm_head")), tie_word_embeddings=tied)
    assert count.per_token == 4 * (LAYER + HEAD) + 6 * 5 * (24 + 24 + 24 + 61)


def test_attention_counts_the_pairs_of_each_document():
    count = flops_of(num_layers=3, sliding_window=2, layer_kinds=("full", "sliding", "sliding"))
    positions, real = np.array([0, 1, 2, 0, 1, 0]), np.array([True, True, True, True, True, False])
    pairs, window_pairs = (1 + 2 + 3) + (1 + 2), (1 + 2 + 2) + (1 + 2)
    attention = 12 * 4 * 6 * (pairs + 2 * window_pairs)
    assert count.of_batch(positions, real) == 5 * count.per_token + attention


def test_a_state_space_mixer_writes_and_reads_its_state_and_beside_attention_counts_pairs_too():
    mixer = StateSpaceConfig(heads=4, head_dim=12, groups=2, state_dim=7, conv_width=3)
    kinds = ("mamba", "hybrid", "full")
    count = flops_of(num_layers=3, layer_kinds=kinds, state_space=mixer)
    # A row of in_proj is z, x, b, c or a step; of the convolution's features x, b and c.
    module = (2 * 48 + 2 * 14 + 4) * 24 + 3 * (48 + 2 * 14) + 48 * 24
    attention, network = 2 * 24 * 24 + 2 * 12 * 24, 3 * 40 * 24
    products = 2 * module + 2 * attention + 3 * network + HEAD
    assert count.per_token == 6 * products + 2 * 3 * (2 + 2) * 48 * 7
    assert count.per_pair == 2 * 12 * 4 * 6


def test_forward_products_are_those_of_the_compiled_program():
    model = small_model(
        rank=None, hidden_size=64, intermediate_size=256, num_heads=4, head_dim=16, vocab_size=1024
    )
    graph, trainable, frozen = split(model)
    count = count_flops(model.config, trainable, frozen)
    tokens = 128

    def forward(trainable, frozen, ids):
        from pronghorn.lora import merge

        return merge(graph, trainable, frozen)(ids)

    shape = jax.ShapeDtypeStruct((1, tokens), np.int32)
    cost = jax.jit(forward).lower(trainable, frozen, shape).cost_analysis()
    # A third of training is the forward pass; XLA multiplies the masked half of attention as well.
    products = count.per_token * tokens / 3 + count.per_pair * tokens**2 / 3
    assert products < cost["flops"] < 1.1 * products


def test_the_peak_of_a_device_is_that_of_its_longest_known_name():
    assert device_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert device_peak_flops("NVIDIA H100 PCIe") == 756e12
    assert device_peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert device_peak_flops("NVIDIA L40S") == 362e12
    assert device_peak_flops("cpu") is None
