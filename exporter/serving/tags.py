"""Find tags in text that arrives in pieces of any size."""


def partial_tag(text: str, tag: str) -> int:
    """How many characters at the end of the text may be the beginning of the tag; the whole tag does not count."""
    return next(
        (count for count in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-count:])), 0
    )
