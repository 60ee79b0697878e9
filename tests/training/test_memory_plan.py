import dataclasses

import jax
import numpy as np
import pytest

from pronghorn.data import DataConfig
from pronghorn.lora import LoRAConfig, split
from pronghorn.models import MEMORY_POLICIES, Decoder
from pronghorn.training import TrainConfig, Trainer, plan_memory, plan_policies
from pronghorn.training.flat_tree import FlatLayout
from pronghorn.training.memory_plan import show_bytes
from tests.training.small import random_documents, small_config, small_model, tokenized

CONFIG = TrainConfig(max_steps=3, batch_size=2, gradient_accumulation=2, save_every=None)
LORA = LoRAConfig(rank=3, alpha=6, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def plan():
    with jax.default_matmul_precision("highest"):
        return plan_memory(small_config(), LORA, CONFIG, np.float32, max_length=16, evaluate=True)


def test_the_plan_from_shapes_is_the_plan_of_the_run(plan, tmp_path):
    config = dataclasses.replace(CONFIG, output_dir=str(tmp_path))
    documents, held_out = (tokenized(random_documents(count)) for count in (8, 3))
    trainer = Trainer(
        small_model(),
        None,
        documents,
        config,
        data=DataConfig(max_length=16),
        eval_dataset=held_out,
    )
    assert trainer.train().planned_device_bytes == plan.peak_device_bytes


def test_arguments_are_the_weights_the_state_and_the_batch(plan):
    _, trainable, frozen = split(small_model())
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (frozen, trainable)]
    batch = 4 * 2 * 2 * 16 * 4
    # The adapter as one vector and AdamW's two moments; a dozen scalars and XLA's rounding of buffers come on top.
    layout = FlatLayout.of(trainable)
    vector = 4 * sum(layout.padded(index) for index in range(len(layout.shapes)))
    assert sizes[1] <= vector
    expected = sizes[0] + 3 * vector + batch
    assert expected <= plan.arguments <= expected + 64 * 80
    assert plan.checkpoint == 3 * vector + 3 * 4 + 2 * 4 + 4
    assert plan.trained_parameters * 4 == sizes[1] and plan.frozen_parameters * 4 == sizes[0]


def test_the_peak_is_the_sum_of_its_terms(plan):
    terms = plan.arguments + plan.outputs - plan.aliased + plan.temporaries + plan.program
    assert plan.peak_device_bytes == max(terms, plan.arguments + plan.evaluation_temporaries) > plan.arguments
    assert plan.aliased > 0  # the state is donated
    assert plan.peak_host_bytes > plan.peak_device_bytes


def test_nothing_is_allocated():
    model = Decoder.abstract(small_config())
    before = {id(array) for array in jax.live_arrays()}
    plan_memory(small_config(), LORA, CONFIG, max_length=16)
    made = [array for array in jax.live_arrays() if id(array) not in before]
    largest = max((array.nbytes for array in made), default=0)
    smallest_weight = min(np.prod(leaf.shape) * 2 for leaf in jax.tree.leaves(split(model)[1]))
    assert largest <= smallest_weight


def test_every_memory_policy_is_priced_and_computing_layers_again_takes_less():
    config = small_config(num_layers=3, hidden_size=48, intermediate_size=512)
    train = TrainConfig(max_steps=3, batch_size=4)
    plans = plan_policies(config, LORA, train, np.float32, max_length=64, layers="scanned")
    assert set(plans) == set(MEMORY_POLICIES)
    assert all(plan.memory_policy == policy for policy, plan in plans.items())
    assert plans["layer_inputs"].peak_device_bytes < 0.8 * plans["keep"].peak_device_bytes


def test_full_fine_tuning_plans_masters_moments_and_the_cast(plan):
    full = plan_memory(small_config(), None, CONFIG, max_length=16, evaluate=True)
    assert full.frozen_parameters == 0
    parameters = full.trained_parameters
    assert full.checkpoint >= 12 * parameters
    assert full.evaluation_temporaries >= 2 * parameters
    assert full.arguments >= 12 * parameters


def test_bytes_are_shown_in_a_unit_that_fits():
    assert show_bytes(3 << 29) == "1.50 GiB"
    assert show_bytes(5 << 19) == "2.5 MiB"
