"""Numbers as readers see them: few digits, true minus signs, powers of ten."""

import math

from droplens.estimates import Estimate
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
    ('−0.279 ± 0.0016', '–', 'yes')
    """
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, Estimate):
        if not math.isfinite(cell.standard_error):
            return format_number(cell.value)
        if cell.standard_error == 0:
            return format_number(cell.value)
        return " ± ".join(_typeset(part) for part in str(cell).split(" ± "))
    if isinstance(cell, int | float):
        return format_number(cell)
    return cell


def _typeset(text: str) -> str:
    mantissa, _, exponent = text.replace("nan", "undefined").partition("e")
    if not exponent or not exponent.lstrip("+-").isdigit():
        return text.replace("-", "−")
    power = str(int(exponent)).translate(_SUPERSCRIPTS)
    return f"{mantissa.replace('-', '−')} × 10{power}"
