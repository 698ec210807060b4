"""Proof that a rewritten graph is right, by rules and tables of its own, not those of the passes.

It reads only the keys of ``node.meta`` that the capture and the analysis write.
"""

from .rules import RULES, VerifyError
from .verifier import verify

__all__ = ["RULES", "VerifyError", "verify"]
