"""Models that also see images: their text tower is read, trained and written as the text model that it is."""

import copy
import functools

import numpy as np
import pytest

from pronghorn.converters.huggingface import load_model, read_config, save_model
from pronghorn.converters.peft import load_adapter, save_adapter
from pronghorn.converters.safetensors_files import TensorSpec, open_weights, write_weights
from pronghorn.converters.text_towers import tower_tensors
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig, add_lora, merge_lora
from pronghorn.models import family_for, flat_arrays
from pronghorn.models.families import family_named
from pronghorn.verification import verify_model
from tests.converters.test_peft import randomised
from tests.models.family_cases import CASES
from tests.models.reference import SIZES, forward, random_ids, tiny_torch_model

pytestmark = pytest.mark.filterwarnings("ignore")
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP, SIGLIP = {"model_type": "clip_vision_model"}, {"model_type": "siglip_vision_model"}
QWEN_TOKENS = {
    "image_token_id": 130,
    "video_token_id": 129,
    "vision_start_token_id": 1,
    "vision_end_token_id": 2,
}
SPECIAL = {
    "gemma3": (
        {"model_type": "gemma3_text", "head_dim": 12, "sliding_window": 7, "num_hidden_layers": 2},
        SIGLIP,
        {"mm_tokens_per_image": 4, "image_token_index": 130, "boi_token_index": 1, "eoi_token_index": 2},
    ),
    "gemma4": (
        {
            "model_type": "gemma4_text",
            "pad_token_id": 0,
            "head_dim": 6,
            "global_head_dim": 8,
            "rms_norm_eps": 1e-3,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 7,
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 131,
        },
        {
            "model_type": "gemma4_vision",
            "head_dim": 8,
            "num_key_value_heads": 2,
            "position_embedding_size": 16,
        },
        {
            "audio_config": None,
            "image_token_id": 130,
            "video_token_id": 129,
            "audio_token_id": 128,
            "boi_token_id": 1,
            "eoi_token_id": 2,
        },
    ),
    "mistral3": (
        {"model_type": "mistral", "head_dim": 10, "num_hidden_layers": 2},
        {"model_type": "pixtral", "head_dim": 8},
        {"image_token_index": 130, "tie_word_embeddings": False},
    ),
    "qwen2_5_vl": (
        {
            "model_type": "qwen2_5_vl_text",
            "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        {"model_type": "qwen2_5_vl_vision", "depth": 1, "num_heads": 2, "out_hidden_size": 48},
        QWEN_TOKENS,
    ),
    "exaone4_5": (
        {"model_type": "exaone4", "num_hidden_layers": 2, "sliding_window": 7, "sliding_window_pattern": 2},
        {
            "model_type": "exaone4_5_vision",
            "depth": 1,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "out_hidden_size": 48,
        },
        {"image_token_id": 130, "video_token_id": 129},
    ),
    "qwen3_vl": (
        {
            "model_type": "qwen3_vl_text",
            "head_dim": 12,
            "num_hidden_layers": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 2, 2],
                "mrope_interleaved": True,
            },
        },
        {
            "model_type": "qwen3_vl_vision",
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        QWEN_TOKENS,
    ),
    "qwen3_5": (
        {
            "model_type": "qwen3_5_text",
            "head_dim": 16,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
        },
        {"model_type": "qwen3_5_vision", "out_hidden_size": 48, "num_position_embeddings": 16},
        QWEN_TOKENS,
    ),
    "qwen3_5_moe": (
        {
            "model_type": "qwen3_5_moe_text",
            "head_dim": 16,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 32,
        },
        {"model_type": "qwen3_5_moe_vision", "out_hidden_size": 48, "num_position_embeddings": 16},
        {"image_token_id": 130, "video_token_id": 129, "vision_start_token_id": 1, "vision_end_token_id": 2},
    ),
    "llava": (
        {"model_type": "llama", "num_hidden_layers": 2},
        CLIP,
        {"image_token_index": 130, "vision_feature_layer": -1},
    ),
    "llava_next": (
        {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": None},
        CLIP,
        {"image_token_index": 130},
    ),
    "llava_onevision": (
        {"model_type": "qwen2", "num_hidden_layers": 2},
        SIGLIP,
        {"image_token_index": 130, "video_token_index": 129},
    ),
    "vipllava": (
        {"model_type": "llama", "num_hidden_layers": 2},
        CLIP,
        {"image_token_index": 130, "vision_feature_layers": [-1]},
    ),
    "internvl": (
        {"model_type": "qwen2", "num_hidden_layers": 2},
        {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]},
        {"image_token_id": 130, "tie_word_embeddings": False},
    ),
    "llama4": (
        {
            "model_type": "llama4_text",
            "head_dim": 12,
            "num_hidden_layers": 3,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 17,
            "intermediate_size": 24,
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
        },
        {
            "model_type": "llama4_vision_model",
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        {"image_token_index": 130, "boi_token_index": 1, "eoi_token_index": 2},
    ),
    "lfm2_vl": (
        {"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
        {"model_type": "siglip2_vision_model", "num_patches": 4},
        {"image_token_id": 130},
    ),
}


@functools.cache
def wrapper(kind):
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, vision, own = SPECIAL[kind]
    config = AutoConfig.for_model(
        kind, text_config=SIZES | {"pad_token_id": None} | text, vision_config=VISION | vision, **own
    )
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.1 * noise)
    return model


@pytest.fixture(scope="module", params=sorted(SPECIAL))
def pair(request, tmp_path_factory):
    """(kind, folder, our text model)."""
    folder = tmp_path_factory.mktemp(request.param)
    wrapper(request.param).save_pretrained(folder)
    return request.param, folder, load_model(folder)


def logits_of(model, ids):
    import torch

    # On text alone transformers 5.17's wrapper of Llama 4 asks for outputs of images; its text model does not.
    model = model.language_model if type(model).__name__ == "Llama4ForConditionalGeneration" else model
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids).long()).logits.numpy()


def test_tower_computes_what_the_wrapper_computes_and_is_saved_as_a_text_model(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    kind, folder, model = pair
    ids = random_ids(40)
    expected = logits_of(wrapper(kind), ids)
    assert np.max(np.abs(forward(model, ids) - expected)) <= 1e-4
    save_model(model, tmp_path / "text")
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager").eval()
    assert not hasattr(reread.config, "vision_config")
    np.testing.assert_allclose(logits_of(reread, ids), expected, atol=1e-6)
    theirs, ours = tower_tensors(open_weights(folder)), open_weights(tmp_path / "text")
    assert all(theirs[name].read().tobytes() == tensor.read().tobytes() for name, tensor in ours.items())


def test_adapter_fits_the_wrapper_in_peft_and_comes_back(pair, tmp_path):
    from peft import PeftModel

    kind, _, model = pair
    down = "mlp.down_proj" if not model.config.is_sparse(0) else "mlp.shared_expert.down_proj"
    adapted = randomised(add_lora(model, LoRAConfig(rank=2, targets=("q_proj", down))))
    save_adapter(adapted, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(copy.deepcopy(wrapper(kind)), str(tmp_path / "adapter"))
    merged = {k: np.asarray(v) for k, v in flat_arrays(merge_lora(adapted)).items()}
    state = theirs.merge_and_unload().state_dict()
    names = family_named(model.config.family).tensor_names(model.config)
    for name in ("layers.1.self_attn.q_proj.weight", f"layers.0.{down}.weight"):
        theirs = names[name].replace("model.", f"{family_named(model.config.family).tower}.", 1)
        np.testing.assert_allclose(state[theirs].numpy(), merged[name], atol=1e-6)
    again = flat_arrays(merge_lora(load_adapter(model, tmp_path / "adapter")))
    assert all(np.array_equal(array, merged[name]) for name, array in again.items())


def test_adapters_of_experts_fit_the_wrapper_in_peft_and_come_back(pair, tmp_path):
    from peft import PeftModel

    kind, _, model = pair
    if model.config.experts is None:
        pytest.skip("no experts")
    adapted = randomised(add_lora(model, LoRAConfig(rank=2, targets=("re:.*experts.*",))))
    save_adapter(adapted, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(copy.deepcopy(wrapper(kind)), str(tmp_path / "adapter"))
    ids = random_ids(40)
    found = forward(adapted, ids)
    assert np.max(np.abs(found - forward(model, ids))) > 1e-2
    assert np.max(np.abs(found - logits_of(theirs.merge_and_unload(), ids))) <= 1e-4
    assert np.array_equal(found, forward(load_adapter(model, tmp_path / "adapter"), ids))


def test_verify_compares_the_tower(pair):
    gradients = pair[0] in ("gemma3", "llama4")  # whose modules lie at different places
    report = verify_model(str(pair[1]), tokens=40, gradients=gradients)
    assert report.passed and bool(report.gradients) == gradients, str(report)


def test_published_text_config_of_gemma_3_4b_is_read_with_its_defaults(tmp_path):
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    import json

    (tmp_path / "config.json").write_text(json.dumps(published))
    hf, _ = read_config(tmp_path)
    config = family_for(hf).config_from_hf(hf)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert (config.sliding_window, config.rope.factor, config.rope.base) == (1024, 8.0, 1e6)
    assert config.tie_word_embeddings and config.layer_kinds[5] == "full" and config.num_layers == 34
    (tmp_path / "config.json").write_text(json.dumps(published | {"text_config": None}))
    with pytest.raises(InputError, match="needs a text_config"):
        read_config(tmp_path)


def test_gemma_3n_whose_vision_tower_needs_timm_is_read_by_the_names_of_its_wrapper(tmp_path):
    """Tensors of the text model under the wrapper's names, and one of its vision tower: the wrapper cannot be built."""
    import json

    case = CASES["gemma3n"]
    reference = tiny_torch_model(case.model_type, pad_token_id=None, **case.overrides)
    reference.save_pretrained(tmp_path / "text")
    text = json.loads((tmp_path / "text/config.json").read_text())
    arrays = {name: tensor.read() for name, tensor in open_weights(tmp_path / "text").items()}
    arrays = {name.replace("model.", "model.language_model.", 1): array for name, array in arrays.items()}
    arrays["model.vision_tower.timm_model.conv_stem.conv.weight"] = np.zeros((2, 3), np.float32)
    (tmp_path / "wrapper").mkdir()
    config = {"model_type": "gemma3n", "text_config": text, "tie_word_embeddings": True}
    (tmp_path / "wrapper/config.json").write_text(json.dumps(config))
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    write_weights(tmp_path / "wrapper", specs, arrays.__getitem__)
    model, ids = load_model(tmp_path / "wrapper"), random_ids(40)
    assert np.max(np.abs(forward(model, ids) - logits_of(reference, ids))) <= 1e-4
    assert model.source.wrapped


def test_qwen_2_vl_as_it_is_published_is_read_without_a_text_config_and_by_a_text_models_names(tmp_path):
    """Its keys stand beside those of the wrapper, and only its vision tower's tensors have a name of their own."""
    import json

    reference = tiny_torch_model("qwen2", pad_token_id=None, num_hidden_layers=2)
    reference.save_pretrained(tmp_path / "text")
    text = json.loads((tmp_path / "text/config.json").read_text())
    sections = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "rope_theta": 10000.0}
    own = QWEN_TOKENS | {"vision_token_id": 3, "vision_config": {"depth": 1}, "model_type": "qwen2_vl"}
    flat = {key: value for key, value in text.items() if key != "rope_parameters"} | sections | own
    arrays = {name: tensor.read() for name, tensor in open_weights(tmp_path / "text").items()}
    arrays["visual.patch_embed.proj.weight"] = np.zeros((2, 3), np.float32)
    (tmp_path / "wrapper").mkdir()
    (tmp_path / "wrapper/config.json").write_text(json.dumps(flat))
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    write_weights(tmp_path / "wrapper", specs, arrays.__getitem__)
    model, ids = load_model(tmp_path / "wrapper"), random_ids(40)
    assert np.max(np.abs(forward(model, ids) - logits_of(reference, ids))) <= 1e-4
    assert model.source.wrapped and json.loads(model.source.hf_config)["model_type"] == "qwen2"
