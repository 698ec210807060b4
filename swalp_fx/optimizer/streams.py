"""The random streams of a step: a number of the role in the upper half, the parameter's index in the lower."""

__all__ = ["MOMENTUM", "STREAMS", "stream"]

# Momentum is last: an optimizer's second state tensor of a parameter takes the next number up, and so on. The average's
# is 0.
STREAMS = {"gradient": 1, "master": 2, "weight": 3, "momentum": 4}
MOMENTUM = STREAMS["momentum"]


def stream(role: int, index: int) -> int:
    return role << 32 | index
