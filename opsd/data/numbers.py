"""Numbers as people write them: with separators, units, currencies and percent signs."""

from __future__ import annotations

import re
from contextlib import suppress
from fractions import Fraction

CURRENCIES = "$€£¥₹₩₽₺₪₫฿"
SIGNS = rf"(?:[{CURRENCIES[1:]}]|\\(?:euro|pounds|yen)(?![a-zA-Z]))"  # but the dollar's, which LaTeX writes formulas in
NAMES = r"(?:dollars?|cents?|euros?|pounds?|rupees?|yen|USD|EUR|GBP|INR|JPY)"
THIN_SPACES = r"(?:\\[,;:!]|[\u00a0\u2009\u202f])"

_NUMBER = re.compile(
    rf"""[{CURRENCIES}]?\s*(?P<sign>[+-]?)\s*[{CURRENCIES}]?\s*
    (?P<value>\d{{1,3}}(?:,\d{{3}})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)
    (?:\s*/\s*(?P<below>\d+))?
    (?P<unit>\s*[^\s\d=+*<>()\[\]{{}}^,;:_|!?/-][^\d=+*<>()\[\]{{}};:|]*)?""",
    re.VERBOSE,
)


def number(text: str) -> Fraction | None:
    """The number that `text` is, with a currency or a unit beside it or without; None: it is something else.

    A percent sign is a unit as any other: 50% is 50. Of a fraction only whole numbers are read, of a number without
    digits before its point ".5" too; an exponent, a second number or a sign of calculation makes it something else.
    """
    plain = text.strip().strip("*$ ").replace("\N{MINUS SIGN}", "-").replace("\\$", "$")
    found = _NUMBER.fullmatch(plain.rstrip(".* "))
    if found is None:
        return None
    with suppress(ValueError, ZeroDivisionError):  # more digits than Python reads
        value = Fraction(found["value"].replace(",", "").rstrip("."))
        value /= int(found["below"] or 1)
        return -value if found["sign"] == "-" else value
    return None


def in_plain_notation(text: str) -> str:
    """`text` with its numbers as math-verify reads them.

    A currency's sign or name beside a number goes ("€18", "18 dollars"; math-verify itself takes "$" and \\text units
    away), so do thin spaces between digits by three ("1\\,800", which it reads as 801), and a percent sign in words or
    in \\text is \\%. What a percentage equals is math-verify's rule: 50\\% is 0.5, and also 50, as answers leave the
    sign out where the question has it; 12.5\\% is 0.125 alone.
    """
    text = re.sub(rf"{SIGNS}\s*(?=[-+]?\.?\d)", "", text)
    text = re.sub(rf"(?<=\d)\s*(?:{SIGNS}|\s{NAMES}\b)", "", text)
    text = re.sub(
        rf"(?<![\d.])\d{{1,3}}(?:{THIN_SPACES}\d{{3}})+(?!\d)",
        lambda found: re.sub(THIN_SPACES, "", found[0]),
        text,
    )
    return re.sub(r"\\(?:text|mathrm|mbox)\s*\{\s*(?:\\?%|per\s?cent|percentage)\s*\}", r"\\%", text)
