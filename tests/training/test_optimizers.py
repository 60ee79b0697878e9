import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pronghorn.errors import InputError
from pronghorn.lora import split
from pronghorn.training import TrainConfig, make_optimizer
from pronghorn.training.learning_rates import learning_rate_ratios
from pronghorn.training.optimizers import decay_mask, init_optimizer
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


def test_lion_is_the_lion_of_optax():
    start = {"weight": jnp.linspace(-1, 1, 35).reshape(7, 5)}
    config = TrainConfig(
        optimizer="lion", learning_rate=1e-2, beta2=0.99, weight_decay=0.1, schedule="constant"
    )
    optimizers = (make_optimizer(config, 20), optax.lion(1e-2, 0.9, 0.99, weight_decay=0.1))
    outcomes = []
    for optimizer in optimizers:
        weights, state = start, optimizer.init(start)
        update = jax.jit(optimizer.update)
        for number in range(5):
            gradient = jax.tree.map(lambda x, number=number: jnp.cos(9 * x + number), weights)
            updates, state = update(gradient, state, weights)
            weights = optax.apply_updates(weights, updates)
        outcomes.append(weights["weight"])
    assert_close(*outcomes)


def test_muon_makes_updates_of_hidden_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    _, trainable, _ = split(small_model(rank=None, layers="scanned", qkv_bias=True, num_layers=2))
    config = TrainConfig(optimizer="muon", learning_rate=1.0, schedule="constant")
    optimizer = make_optimizer(config, 20)
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), trainable)
    updates, _ = jax.jit(optimizer.update)(gradient, init_optimizer(optimizer, trainable), trainable)
    pairs = zip(jax.tree_util.tree_flatten_with_path(updates)[0], jax.tree.leaves(gradient), strict=True)
    for (path, update), g in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        matrix = "layers" in name and ".weight" in name and "norm" not in name
        if not matrix:
            assert_close(update, -np.sign(g), tolerance=1e-3, what=name)
            continue
        for one in np.asarray(update).reshape(-1, *update.shape[-2:]):
            values = np.linalg.svd(one, compute_uv=False) / (0.2 * np.sqrt(max(one.shape)))
            assert np.all((values > 0.5) & (values < 1.3)), (name, values)


def test_muon_refuses_adapters():
    _, trainable, _ = split(small_model())
    with pytest.raises(InputError, match=r"muon is for full fine-tuning.*lora_A"):
        init_optimizer(make_optimizer(TrainConfig(optimizer="muon"), 20), trainable)


def ratios_of(config, trainable):
    tree = learning_rate_ratios(config, trainable)
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(p, simple=True, separator=".").removesuffix(".value"): np.ravel(v)
        for p, v in flat
    }


def test_lora_plus_and_the_embedding_have_learning_rates_of_their_own():
    _, trainable, _ = split(small_model(targets=("q_proj", "embed_tokens")))
    config = TrainConfig(learning_rate=1e-3, embedding_learning_rate=2e-4, lora_plus_ratio=16.0)
    found = ratios_of(config, trainable)
    attention = "segments.0.layers.0.self_attn.q_proj."
    assert found[f"{attention}lora_A"] == 1 and found[f"{attention}lora_B"] == 16
    assert found["embed_tokens.lora_embedding_A"] == pytest.approx(0.2)
    assert found["embed_tokens.lora_embedding_B"] == pytest.approx(3.2)


def test_layers_and_patterns_have_ratios_stacked_or_not():
    config = TrainConfig(layer_decay=0.5, learning_rate_ratios=(("layers.1.mlp.*", 3.0),))
    _, trainable, _ = split(small_model(rank=None, num_layers=3))
    found = ratios_of(config, trainable)
    assert [float(found[f"segments.0.layers.{i}.mlp.up_proj.weight"][0]) for i in range(3)] == [
        0.25,
        1.5,
        1.0,
    ]
    assert found["segments.0.layers.1.self_attn.q_proj.weight"] == 0.5
    assert found["embed_tokens.weight"] == 0.125 and found["norm.weight"] == 1
    _, stacked, _ = split(small_model(rank=None, num_layers=3, layers="scanned"))
    found = ratios_of(config, stacked)
    assert found["segments.0.layers.0.mlp.up_proj.weight"].tolist() == [0.25, 1.5, 1.0]


def test_a_ratio_scales_the_whole_update():
    _, trainable, _ = split(small_model())
    gradient = jax.tree.map(jnp.ones_like, trainable)
    updates = []
    for name in ("adamw", "adamw_8bit"):
        config = TrainConfig(optimizer=name, lora_plus_ratio=4.0, weight_decay=0.1, schedule="constant")
        optimizer = make_optimizer(config, 20)
        found, _ = jax.jit(optimizer.update)(gradient, init_optimizer(optimizer, trainable), trainable)
        updates.append(found)
    layer = updates[0]["segments"][0]["layers"][0]["mlp"]["down_proj"]
    assert_close(layer["lora_B"][...], np.full(layer["lora_B"].shape, -4 * 2e-4))  # B starts at zero
    for one, other in zip(*map(jax.tree.leaves, updates), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate_ratios": (("*.nothing", 2.0),)}, "no trained parameter matches '.*nothing'"),
        ({"embedding_learning_rate": 1e-4}, "neither embedding nor head is trained"),
    ],
)
def test_ratios_that_meet_nothing_are_refused(settings, message):
    _, trainable, _ = split(small_model())
    with pytest.raises(InputError, match=message):
        learning_rate_ratios(TrainConfig(**settings), trainable)
    _, trainable, _ = split(small_model(rank=None))
    with pytest.raises(InputError, match="no adapter is trained"):
        learning_rate_ratios(TrainConfig(lora_plus_ratio=16.0), trainable)
