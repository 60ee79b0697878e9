"""Prose that no fine-tuning set is about, to see what a model forgets.

Seven famous passages in English, all published before 1870 and in the public domain, about 5,000 characters
(`general_text.txt` beside this file). Every language model has read them many times, so the loss is low; what counts
is the difference between before and after a fine-tuning, not its level.
"""

import dataclasses
from pathlib import Path

from pronghorn.errors import InputError


@dataclasses.dataclass(frozen=True)
class Passage:
    """One passage; paragraphs of `text` are separated by an empty line. `title` names work, author and year."""

    title: str
    text: str


def passages() -> list[Passage]:
    """All passages, always in the same order."""
    content = Path(__file__).with_name("general_text.txt").read_text(encoding="utf-8")
    found = []
    for part in content.split("# ")[1:]:
        title, _, text = part.partition("\n")
        found.append(Passage(title.strip(), text.strip()))
    return found


def general_text() -> str:
    """The passages one after the other, without their titles."""
    return "\n\n".join(passage.text for passage in passages())


def general_text_rows(path: str | Path | None = None) -> list[dict[str, str]]:
    """One row `{"text": ...}` a passage, for `pronghorn.data.load_rows`; train on everything to get its loss.

    Args:
      path: a text file of one's own, whose passages are separated by an empty line, instead of the shipped ones.

    Raises:
      InputError: it cannot be read, or is empty.
    """
    if path is None:
        return [{"text": passage.text} for passage in passages()]
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"train.general_text: {path} cannot be read as UTF-8 text ({error}); give a text file, shipped or null."
        ) from None
    rows = [{"text": part.strip()} for part in content.split("\n\n") if part.strip()]
    if not rows:
        raise InputError(f"train.general_text: {path} is empty; give a text file, shipped or null.")
    return rows
