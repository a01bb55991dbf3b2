"""Numbers as readers see them: few digits, true minus signs, powers of ten."""

import math

from droplens.estimates import Estimate, rounded
from droplens.report._document import Cell

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def format_number(value: float, digits: int = 4) -> str:
    """A number to `digits` significant digits.

    >>> format_number(-0.00001234), format_number(1234567), format_number(0.5)
    ('−1.234 × 10⁻⁵', '1,234,567', '0.5')
    """
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{int(value):,}".replace("-", "−")
    return _typeset(f"{value:.{digits}g}")


def format_cell(cell: Cell) -> str:
    """A table's cell as text.

    >>> format_cell(Estimate(-0.279, 0.0016, 300)), format_cell(None), format_cell(True)
    ('−0.2790 ± 0.0016', '–', 'yes')
    >>> format_cell(Estimate(0.2339, float("nan"), 64))
    '0.2339 ± ?'
    """
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, Estimate):
        return _format_estimate(cell)
    if isinstance(cell, int | float):
        return format_number(cell)
    return cell


def format_parts(estimate: Estimate) -> tuple[str, str]:
    """Value and standard error apart, rounded alike: two digits of the error.

    >>> format_parts(Estimate(-0.2791, 0.0016, 300)), format_parts(Estimate(-1.8e-5, 5.7e-5, 3))
    (('−0.2791', '0.0016'), ('−1.8 × 10⁻⁵', '5.7 × 10⁻⁵'))
    """
    value, error, power = _rounded(estimate)
    return value + power, error + power


def _format_estimate(estimate: Estimate) -> str:
    value, error, power = _rounded(estimate)
    if error == "undefined" and estimate.n > 1 and math.isfinite(estimate.value):
        return f"{value} ± ?"  # sampled, by too few draws to tell how well
    if error in {"0", "undefined"}:
        return value + power
    return f"({value} ± {error}){power}" if power else f"{value} ± {error}"


def _rounded(estimate: Estimate) -> tuple[str, str, str]:
    """Value, error, and the power of ten that both are to be multiplied by, typeset."""
    known = math.isfinite(estimate.value) and math.isfinite(estimate.standard_error)
    if not known or estimate.standard_error <= 1e-9 * abs(estimate.value):
        return format_number(estimate.value), format_number(estimate.standard_error, 2), ""
    value, error, power = rounded(estimate)
    return value.replace("-", "−"), error.replace("-", "−"), power


def _typeset(text: str) -> str:
    mantissa, _, exponent = text.replace("nan", "undefined").partition("e")
    if not exponent or not exponent.lstrip("+-").isdigit():
        return text.replace("-", "−")
    power = str(int(exponent)).translate(_SUPERSCRIPTS)
    return f"{mantissa.replace('-', '−')} × 10{power}"
