"""A small byte-level BPE tokenizer with the special tokens and the chat template of a test template."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .templates import TEMPLATES

_CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? The capital of France is Paris.",
    "user assistant system question answer hello there, how are you today? I am well, thank you.\n\n",
    "def add(a, b):\n    return a + b\n\nclass Stack:\n    pass\n",
    "élève naïve 東京 Привет мир 🙂 {'a': 1, \"b\": [2, 3]}",
]


@functools.cache
def tiny_tokenizer(name: str = "chatml") -> PreTrainedTokenizerFast:
    """One of tests/data/templates.py. BOS, where the model has one, is added to plain text as the original does."""
    template = TEMPLATES[name]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(template.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 3, trainer)
    trim = processors.ByteLevel(trim_offsets=True)  # as GPT-2's: offsets leave out leading spaces
    if template.bos:
        bos = (template.bos, backend.token_to_id(template.bos))
        with_bos = processors.TemplateProcessing(single=f"{template.bos} $A", special_tokens=[bos])
        backend.post_processor = processors.Sequence([trim, with_bos])
    else:
        backend.post_processor = trim
    named = {template.bos, template.eos}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=template.bos,
        eos_token=template.eos,
        pad_token=template.eos,
        extra_special_tokens=[token for token in template.special if token not in named],
        chat_template=template.source,
    )
