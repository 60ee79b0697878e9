import jax
import numpy as np
import pytest

from pronghorn.errors import RunError
from pronghorn.lora import LoRAConfig, add_lora, split
from pronghorn.models import Decoder, named_parameters
from pronghorn.training.guards import SkippedStreak, check_leaf_gradients, excused_leaves, leaf_names
from tests.training.small import make_step, random_batch, small_config, small_model


def test_leaves_are_named_as_in_hugging_face_in_both_layouts():
    for layers in ("unrolled", "scanned"):
        model = add_lora(Decoder.abstract(small_config(num_layers=3), layers=layers), LoRAConfig(rank=2))
        names = leaf_names(split(model)[1], model)
        assert sorted(names) == sorted(name for name in named_parameters(model) if "lora" in name)


def test_a_leaf_that_gets_no_gradient_is_named():
    model = small_model(num_layers=1)
    graph, trainable, frozen = split(model)
    names = leaf_names(trainable, model)

    def blocked(trainable, frozen, batch, key):
        from pronghorn.training.losses import next_token

        cut = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.lax.stop_gradient(x) if "q_proj" in jax.tree_util.keystr(path) else x,
            trainable,
        )
        return next_token(graph, reduction="sum")(cut, frozen, batch, key)

    step, state = make_step(graph, trainable, loss_fn=blocked)
    excused = excused_leaves(state.trainable, names)
    _, metrics = step(state, frozen, random_batch(1, 2, 9))
    with pytest.raises(RunError, match=r"layers\.0\.self_attn\.q_proj\.lora_B \(1 of 4 trained leaves\)"):
        check_leaf_gradients(names, metrics["leaf_grad_norms"], excused, step=1)


def test_lora_a_is_excused_only_while_its_b_is_zero():
    model = small_model()
    _, trainable, _ = split(model)
    names = leaf_names(trainable, model)
    assert excused_leaves(trainable, names) == {name for name in names if name.endswith("lora_A")}
    assert excused_leaves(jax.tree.map(lambda x: x + 1, trainable), names) == set()


def test_an_embedding_adapter_excuses_its_b():
    model = small_model(targets=("embed_tokens",))
    _, trainable, _ = split(model)
    assert excused_leaves(trainable, leaf_names(trainable, model)) == {"embed_tokens.lora_embedding_B"}


def test_a_gradient_that_is_not_finite_is_named():
    with pytest.raises(RunError, match=r"step 1: the gradient of b \(1 of 2"):
        check_leaf_gradients(["a", "b"], np.array([1.0, np.nan]), {"b"}, step=1)


def test_a_streak_of_skipped_steps_stops_the_run_and_names_its_rows():
    streak = SkippedStreak(3, lambda step: [f"rows.jsonl:{step}"])
    streak.see(1, applied=False, token_count=5)
    streak.see(2, applied=True, token_count=5)
    for step in (3, 4):
        streak.see(step, applied=False, token_count=5)
    with pytest.raises(RunError, match=r"steps 3 to 5 .*not finite.*rows\.jsonl:3"):
        streak.see(5, applied=False, token_count=5)
