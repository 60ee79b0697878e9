"""Write a Hugging Face folder with random weights of a true shape, for the peers, which load folders.

python benchmarks/random_llama.py --model llama-3.1-8b FOLDER
"""

import argparse

import shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--model", choices=sorted(shapes.MODELS), default="llama-3.1-8b")
    options = parser.parse_args()
    import torch
    import transformers

    config = shapes.MODELS[options.model]
    rope = config.rope
    parameters = {"rope_type": rope.kind, "rope_theta": rope.base}
    if rope.kind == "llama3":
        parameters |= {
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    kind = {"llama": "Llama", "qwen3": "Qwen3"}[config.family]
    hf_config = getattr(transformers, f"{kind}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=parameters,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = getattr(transformers, f"{kind}ForCausalLM")(hf_config)
    model.save_pretrained(options.folder, max_shard_size="5GB")
    _write_tokenizer(options.folder)


def _write_tokenizer(folder: str) -> None:
    """A minimal tokenizer: some peers insist on loading one, and none is used on random ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *map(chr, range(97, 123))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
