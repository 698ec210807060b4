"""Proof that a rewritten graph is right, by rules and tables that the passes which made it do not share.

Of ``node.meta`` it reads what the capture and the analysis have written, and nothing that a pass writes.
"""

from .rules import RULES, VerifyError
from .verifier import verify

__all__ = ["RULES", "VerifyError", "verify"]
