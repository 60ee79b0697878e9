"""Proofs against other frameworks: transformers and PEFT in fp32, layer by layer."""

from pronghorn.verification.compare import VerifyReport, verify_model

__all__ = ["VerifyReport", "verify_model"]
