"""Shared by the tests against others' work: our roundings in gfloat's words."""

import gfloat

# gfloat has no rounding of ties up.
GFLOAT_ROUNDINGS = {
    "nearest": gfloat.RoundMode.TiesToEven,
    "toward_zero": gfloat.RoundMode.TowardZero,
    "down": gfloat.RoundMode.TowardNegative,
    "up": gfloat.RoundMode.TowardPositive,
    "nearest_away": gfloat.RoundMode.TiesToAway,
    "stochastic": gfloat.RoundMode.Stochastic,
    "stochastic8": gfloat.RoundMode.Stochastic,
    "stochastic24": gfloat.RoundMode.Stochastic,
}
