"""Text for the terminal."""


def printable(text: str) -> str:
    """Escape control characters: names in a file must not steer the terminal."""
    if text.isprintable():
        return text
    return "".join(map(_printable_char, text))


def _printable_char(char: str) -> str:
    if char.isprintable() or char in "\n\t":
        return char
    return char.encode("unicode_escape").decode()
