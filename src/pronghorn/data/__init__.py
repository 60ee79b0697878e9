"""From rows to batches: sources, formats, chat templates, masks, packing, the loader, the preview."""

from pronghorn.data.chat_template import ChatTemplate
from pronghorn.data.config import DataConfig
from pronghorn.data.formats import DetectedFormat, Example, detect_format, read_row
from pronghorn.data.loader import Batch, Loader
from pronghorn.data.preview import preview_html, preview_rows
from pronghorn.data.sources import Row, hold_out, load_rows
from pronghorn.data.tokenization import TokenizationStats, TokenizedDataset, tokenize_rows

__all__ = [
    "Batch",
    "ChatTemplate",
    "DataConfig",
    "DetectedFormat",
    "Example",
    "Loader",
    "Row",
    "TokenizationStats",
    "TokenizedDataset",
    "detect_format",
    "hold_out",
    "load_rows",
    "preview_html",
    "preview_rows",
    "read_row",
    "tokenize_rows",
]
