"""Make foreign text safe to print: escape what a terminal would execute or cannot display."""

from __future__ import annotations

import unicodedata

# Control and format characters, line and paragraph separators, and non-UTF-8 bytes of file names.
_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Scripts and emoji need the joiners for their spelling.
_KEPT = frozenset("\n\t\u200c\u200d")


def printable(text: object, *, one_line: bool = False) -> str:
    r"""Return the text with every control character escaped, e.g. `\x1b` or `\u202e`.

    Line feeds and tabs stay, unless `one_line`. A byte that Python smuggled into a file name (a lone surrogate)
    is shown as that byte.
    """
    shown = str(text)
    if shown.isascii() and shown.isprintable():
        return shown
    kept = frozenset("\u200c\u200d") if one_line else _KEPT
    return "".join(
        char if char in kept or unicodedata.category(char) not in _ESCAPED else _escape(char)
        for char in shown
    )


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char)
    if known:
        return known
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
