"""Exact arithmetic between decimals: whether a limit is met is no question of rounding. Imports no JAX.

A float stands for the shortest decimal that JSON writes for it (0.1 is one tenth); sums and quotients are fractions.
"""

import decimal
from fractions import Fraction


def exact(value: float) -> Fraction:
  """The shortest decimal that stands for `value`, as a fraction: 0.1 gives 1/10."""
  return Fraction(repr(float(value)))


def rounded(value: Fraction, *, up: bool, digits: int = 15) -> float:
  """The nearest number of `digits` decimal digits that is not below (`up`) or not above `value`; whole ones as int."""
  rounding = decimal.ROUND_CEILING if up else decimal.ROUND_FLOOR
  context = decimal.Context(prec=digits, rounding=rounding)
  number = float(context.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator)))
  return int(number) if number.is_integer() else number
