"""Published config.json files are read as they are meant, and what would change the maths is refused by name."""

import re

import pytest
from transformers import AutoConfig

from pronghorn.errors import InputError
from pronghorn.models import RopeConfig, family_for
from pronghorn.models.families import FAMILIES, WRAPPERS, family_named, listed

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL_7B_V0_1 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_NEMO = MISTRAL_7B_V0_1 | {
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_size": 5120,
    "max_position_embeddings": 131072,
    "num_hidden_layers": 40,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 131072,
}
QWEN_2_5_0_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
PUBLISHED = {
    "Llama-3.1-8B": LLAMA_3_1_8B,
    "Mistral-7B-v0.1": MISTRAL_7B_V0_1,
    "Mistral-Nemo": MISTRAL_NEMO,
    "Qwen2.5-0.5B": QWEN_2_5_0_5B,
    "Qwen3-0.6B": QWEN_3_0_6B,
    "SmolLM2-135M": SMOLLM2_135M,
}


def read(hf):
    return family_for(hf).config_from_hf(hf)


def test_llama_3_1_is_read():
    config = read(LLAMA_3_1_8B)
    assert (config.family, config.num_heads, config.num_kv_heads, config.head_dim) == ("llama", 32, 8, 128)
    assert config.rope == RopeConfig(
        base=500000.0,
        kind="llama3",
        factor=8.0,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    assert set(config.layer_kinds) == {"full"} and not config.qkv_bias and not config.tie_word_embeddings


def test_every_layer_of_mistral_v0_1_slides_and_nemo_has_its_own_head_dim():
    old, nemo = read(MISTRAL_7B_V0_1), read(MISTRAL_NEMO)
    assert old.sliding_window == 4096 and set(old.layer_kinds) == {"sliding"} and old.head_dim == 128
    assert nemo.sliding_window is None and set(nemo.layer_kinds) == {"full"} and nemo.head_dim == 128


def test_qwen_2_5_has_biases_nobody_mentions_and_no_window_unless_it_is_used():
    config = read(QWEN_2_5_0_5B)
    assert config.qkv_bias and not config.output_bias and config.tie_word_embeddings
    assert config.sliding_window is None and set(config.layer_kinds) == {"full"}
    slid = read(QWEN_2_5_0_5B | {"use_sliding_window": True, "max_window_layers": 21})
    assert slid.layer_kinds == ("full",) * 21 + ("sliding",) * 3 and slid.sliding_window == 32768


def test_qwen_3_normalises_heads_and_has_a_head_dim_of_its_own():
    config = read(QWEN_3_0_6B)
    assert config.qk_norm and config.head_dim == 128 and not config.qkv_bias
    without = {key: value for key, value in QWEN_3_0_6B.items() if key != "head_dim"}
    assert read(without).head_dim == 128, "the default of the family, not hidden_size / heads"


def test_smollm_2_is_a_llama():
    config = read(SMOLLM2_135M)
    assert (config.family, config.num_heads, config.num_kv_heads, config.head_dim) == ("llama", 9, 3, 64)
    assert config.rope == RopeConfig(base=100000.0) and config.tie_word_embeddings


def test_absent_key_value_heads_are_as_transformers_takes_them():
    for hf, expected in ((LLAMA_3_1_8B, 32), (MISTRAL_7B_V0_1, 8)):
        absent = {key: value for key, value in hf.items() if key != "num_key_value_heads"}
        assert read(absent).num_kv_heads == expected
        assert AutoConfig.for_model(**absent).num_key_value_heads == expected
        assert read(absent | {"num_key_value_heads": None}).num_kv_heads == 32


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_we_write_is_read_alike_by_us_and_by_transformers(name):
    hf = PUBLISHED[name]
    family = family_for(hf)
    config = family.config_from_hf(hf)
    written = family.config_to_hf(config)
    assert family_for(written).config_from_hf(written) == config
    theirs, ours = AutoConfig.for_model(**hf), AutoConfig.for_model(**written)
    for key in (
        "head_dim",
        "rope_parameters",
        "layer_types",
        "sliding_window",
        "rms_norm_eps",
        "attention_bias",
    ):
        assert getattr(ours, key, None) == getattr(theirs, key, None) or key == "head_dim", key


def test_what_transformers_5_writes_is_read_as_the_published_file():
    for name, hf in PUBLISHED.items():
        rewritten = AutoConfig.for_model(**hf).to_dict()
        assert "rope_parameters" in rewritten and read(rewritten) == read(hf), name


def test_tensor_names_cover_tied_and_untied_biased_and_normalised():
    names = family_for(QWEN_2_5_0_5B).tensor_names(read(QWEN_2_5_0_5B))
    assert "lm_head.weight" not in names and len(names) == 2 + 24 * 12
    assert names["layers.3.self_attn.q_proj.bias"] == "model.layers.3.self_attn.q_proj.bias"
    names = family_for(LLAMA_3_1_8B).tensor_names(read(LLAMA_3_1_8B))
    assert names["lm_head.weight"] == "lm_head.weight" and len(names) == 3 + 32 * 9
    assert "layers.0.self_attn.q_norm.weight" in family_for(QWEN_3_0_6B).tensor_names(read(QWEN_3_0_6B))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (
            {"residual_multiplier": 0.22, "embedding_multiplier": 12.0},
            "embedding_multiplier=12.0, residual_multiplier",
        ),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"hidden_act": "relu2"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "mrope", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_scaling": {"rope_type": "su"}}, "'su'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"auto_map": {"AutoModel": "modeling.X"}}, "auto_map"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 7}, "num_kv_heads"),
        ({"mlp_bias": "yes"}, "mlp_bias"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_refusals_name_the_key(change, named):
    with pytest.raises(InputError, match=named) as refused:
        family_for(LLAMA_3_1_8B | change)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("hf", "named"),
    [
        (
            {
                "model_type": "mamba2",
                "hidden_size": 64,
                "state_size": 128,
                "conv_kernel": 4,
                "use_cache": True,
            },
            r"beyond a plain decoder it sets state_size, conv_kernel\)",
        ),
        (
            {"model_type": "rwkv7"} | {f"key_{i}": i for i in range(9)},
            r"key_0, key_1, key_2, key_3, key_4, key_5 and 3 more keys\)",
        ),
        (
            {"model_type": "x_vl", "text_config": {"model_type": "x_text"}},
            "text tower of model_type 'x_text'",
        ),
        (LLAMA_3_1_8B | {"model_type": "brand_new"}, "no key of it is unusual"),
    ],
)
def test_other_architectures_are_refused_in_one_sentence_with_what_stopped_them_and_what_there_is(hf, named):
    with pytest.raises(InputError, match=named) as refused:
        family_for(hf)
    text = str(refused.value)
    assert "\n" not in text and text.endswith(".")
    supported, towers = text.split("; supported are ")[1][:-1].split(", and text towers in ")
    assert counted(supported, [name for family in FAMILIES for name in family.model_types])
    assert counted(towers, WRAPPERS) and hf["model_type"] in text


def counted(text, names):
    """Whether a list has these names, each as a shell would write it out, but for those that it says are more."""
    text, _, more = text.removesuffix(" more in docs/models.md").partition(" and ")
    found = []
    for stem, endings, name in re.findall(r"(\w*)\{([\w,]*)\}|(\w+)", text):
        found += [name] if name else [stem + ending for ending in endings.split(",")]
    return (
        found
        and sorted(found) == sorted(set(found) & set(names))
        and len(names) == len(found) + int(more or 0)
    )


def test_a_list_of_what_is_supported_keeps_to_its_room_however_long_it_grows():
    names = [
        f"{chr(97 + i // 26)}{chr(97 + i % 26)}maker{version}"
        for i in range(90)
        for version in ("", 2, "3_moe")
    ]
    sizes = [len(listed(names, room)) for room in range(60, 1700, 20)]
    assert (
        all(size <= room for size, room in zip(sizes, range(60, 1700, 20), strict=True)) and sizes[-1] > 1600
    )
    assert all(counted(listed(names, room), names) for room in (100, 500, 10_000))
    assert "more" not in listed(names, 10_000) and listed(names[:3], 60) == "aamaker{,2,3_moe}"


def test_the_nearest_that_is_supported_comes_first_and_a_hostile_file_makes_no_long_sentence():
    with pytest.raises(InputError, match=r"nearest: qwen3_moe, .*; supported"):
        family_for({"model_type": "qwen3_vl_moe"})
    with pytest.raises(InputError, match=r"more in docs/models\.md") as refused:
        family_for({"model_type": "x" * 900, "auto_map": "y"} | {f"{i}\n" * 900: 1 for i in range(9)})
    assert len(str(refused.value)) < 700 and "\n" not in str(refused.value)


def test_windows_that_contradict_each_other_are_refused():
    with pytest.raises(InputError, match="layer_types"):
        family_for(QWEN_2_5_0_5B | {"layer_types": ["sliding_attention"] * 24})
    with pytest.raises(InputError, match="layer_types has 3 entries for 24"):
        family_for(QWEN_2_5_0_5B | {"layer_types": ["full_attention"] * 3})
    with pytest.raises(InputError, match="linear_attention"):
        family_for(QWEN_3_0_6B | {"layer_types": ["linear_attention"] * 28})
    with pytest.raises(InputError, match="layer_types"):
        family_for(MISTRAL_7B_V0_1 | {"layer_types": ["full_attention"] * 32})


def test_a_null_key_counts_as_absent():
    assert read(LLAMA_3_1_8B | {"final_logit_softcapping": None}) == read(LLAMA_3_1_8B)


def test_families_are_found_by_name():
    assert [family_named(family.name) for family in FAMILIES] == list(FAMILIES)
    with pytest.raises(InputError, match="no family 'opt'"):
        family_named("opt")
