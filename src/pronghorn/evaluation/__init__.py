"""How good a model is, what it forgot, how far two models are apart, and the report of a run."""

from pronghorn.evaluation.losses import KLDivergence, forgetting, heldout_loss, kl_divergence
from pronghorn.evaluation.report import write_html_report

__all__ = ["KLDivergence", "forgetting", "heldout_loss", "kl_divergence", "write_html_report"]
