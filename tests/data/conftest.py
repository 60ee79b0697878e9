"""Fixtures of the data tests."""

import pytest

from .tokenizers import tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer("chatml")
