"""Codes: the integers and scales that hardware would store for a tensor, and checkpoints made of them.

codecs   a number <-> its code, for each kind of element; packing
tiles    a tensor's blocks
stored   a block's scale <-> its stored form
compiled the codes and scales from the compiled op, on the CPU
codes    encode and decode
packed   state_dicts in codes
"""

from .codes import Codes, decode, encode
from .packed import packed_state, unpacked_state

__all__ = ["Codes", "decode", "encode", "packed_state", "unpacked_state"]
