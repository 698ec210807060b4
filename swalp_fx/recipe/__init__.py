"""A recipe: a format for each role of Algorithm 2, its rounding, the places that are rounded, and exceptions.

roles        the letters of the paper's Algorithm 2
rounding     the roundings by name
quantizer    a format and a rounding: the value of a role
patterns     how a rule, an include or an exclude names parts of a model
rule         an exception
recipe       all of them, as one frozen value
text         its text
document     and its JSON
"""

from .errors import RecipeError
from .patterns import Subject, matches, shortened
from .quantizer import MARK, Quantizer, split
from .recipe import PLACEMENTS, Recipe
from .roles import LETTERS, OF_PARAMETERS, ROLES
from .rounding import RANDOM_BITS, ROUNDINGS, parse_rounding
from .rule import Rule

__all__ = [
    "LETTERS",
    "MARK",
    "OF_PARAMETERS",
    "PLACEMENTS",
    "RANDOM_BITS",
    "ROLES",
    "ROUNDINGS",
    "Quantizer",
    "Recipe",
    "RecipeError",
    "Rule",
    "Subject",
    "matches",
    "parse_rounding",
    "shortened",
    "split",
]
