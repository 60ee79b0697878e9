"""From rows to batches: sources, formats, chat templates, masks, packing, the loader, the preview."""

from pronghorn.data.chat_template import ChatTemplate
from pronghorn.data.config import DataConfig, MixtureSource
from pronghorn.data.dataset import Dataset, MixedDataset, TokenizationStats, TokenizedDataset
from pronghorn.data.formats import DetectedFormat, Example, detect_format, read_row
from pronghorn.data.loader import Batch, Loader
from pronghorn.data.preview import preview_html, preview_rows
from pronghorn.data.reading import read_sets
from pronghorn.data.sources import Row, hold_out, load_rows
from pronghorn.data.tokenization import tokenize_rows

__all__ = [
    "Batch",
    "ChatTemplate",
    "DataConfig",
    "Dataset",
    "DetectedFormat",
    "Example",
    "Loader",
    "MixedDataset",
    "MixtureSource",
    "Row",
    "TokenizationStats",
    "TokenizedDataset",
    "detect_format",
    "hold_out",
    "load_rows",
    "preview_html",
    "preview_rows",
    "read_row",
    "read_sets",
    "tokenize_rows",
]
