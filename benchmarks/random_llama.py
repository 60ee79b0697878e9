"""Write a Hugging Face folder with random weights of a true shape, for the peers, which load folders.

python benchmarks/random_llama.py --model llama-3.1-8b FOLDER
"""

import argparse

import shapes

from pronghorn.models.families import family_named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--model", choices=sorted(shapes.MODELS), default="llama-3.1-8b")
    options = parser.parse_args()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = shapes.MODELS[options.model]
    settings = family_named(config.family).config_to_hf(config)
    settings |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16)
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
