from pronghorn.data import DataConfig, tokenize_rows
from pronghorn.training import TrainConfig
from pronghorn.training.report import example_text, settings_lines
from tests.data.tokenizers import tiny_tokenizer

ROW = {"prompt": "Question: \x1b[31m", "completion": "the answer"}


def example(*, colour, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    dataset = tokenize_rows([ROW], tokenizer, DataConfig(max_length=64))
    return example_text(dataset, 0, tokenizer, colour=colour)


def test_what_is_in_the_loss_is_green_and_the_rest_dim():
    text = example(colour=True)
    styled = {str(span.style): text.plain[span.start : span.end] for span in text.spans}
    assert "the answer" in styled["green"] and "Question" in styled["dim"]
    assert "Question" not in styled["green"]


def test_without_colour_brackets_mark_what_is_in_the_loss():
    plain = example(colour=False).plain
    assert "the answer" in plain[plain.rindex("⟦") : plain.rindex("⟧")]


def test_a_row_cannot_steer_the_terminal():
    assert "\x1b" not in example(colour=True).plain


def test_without_a_tokenizer_ids_are_shown():
    tokenizer = tiny_tokenizer()
    dataset = tokenize_rows([ROW], tokenizer, DataConfig(max_length=64))
    assert str(dataset.document(0)[0].tolist()) in example_text(dataset, 0, None, colour=False).plain


def test_settings_that_were_given_are_told_from_defaults():
    given, defaults = settings_lines({"train": TrainConfig(learning_rate=1e-3), "adapter": None})
    assert given.split() == ["given", "train.learning_rate=0.001"]
    assert "train.beta1=0.9" in defaults and "train.learning_rate=" not in defaults
