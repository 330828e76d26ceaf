"""Text that others wrote, such as names in files, made safe to show on a terminal and in Markdown."""

import re

# control characters, which can move the cursor; marks that reverse the order of text; halves of characters
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with escapes such as ``\\x1b`` in place of unsafe characters. Tabs and line breaks stay."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def single_line(value: object) -> str:
    """The value as printable text without line breaks."""
    return " ".join(printable(str(value)).split())


def inline(value: object) -> str:
    """The value as a part of a line of Markdown, in which it makes no HTML, link or image."""
    return single_line(value).replace("<", "&lt;").replace("](", "] (")
