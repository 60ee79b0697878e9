import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pronghorn.lora import split
from pronghorn.training import TrainConfig, make_optimizer
from pronghorn.training.optimizers import decay_mask
from tests.tolerances import assert_close
from tests.training.small import small_model


def test_twenty_updates_are_those_of_torch_adamw():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    start = random.standard_normal((7, 5)).astype(np.float32)
    gradients = random.standard_normal((20, 7, 5)).astype(np.float32)
    config = TrainConfig(
        learning_rate=3e-2, weight_decay=0.1, beta1=0.85, beta2=0.98, eps=1e-6, schedule="constant"
    )

    optimizer = make_optimizer(config, 20)
    ours = {"weight": jnp.asarray(start)}
    state = optimizer.init(ours)
    update = jax.jit(optimizer.update)
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([theirs], lr=3e-2, betas=(0.85, 0.98), eps=1e-6, weight_decay=0.1)
    for gradient in gradients:
        updates, state = update({"weight": jnp.asarray(gradient)}, state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs.grad = torch.tensor(gradient)
        reference.step()
        assert_close(ours["weight"], theirs.detach().numpy())


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_norms_and_biases_are_not_decayed_and_matrices_are(layers):
    _, trainable, _ = split(small_model(rank=None, layers=layers, qkv_bias=True, qk_norm=True))
    mask = decay_mask(trainable)
    assert jax.tree.structure(mask) == jax.tree.structure(trainable)
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="."): value
        for path, value in jax.tree_util.tree_flatten_with_path(mask)[0]
    }
    for name, value in decayed.items():
        assert value == ("norm" not in name and "bias" not in name), name
    assert any(decayed.values()) and not all(decayed.values())


def test_adapters_are_decayed():
    _, trainable, _ = split(small_model(layers="scanned"))
    assert all(jax.tree.leaves(decay_mask(trainable)))
