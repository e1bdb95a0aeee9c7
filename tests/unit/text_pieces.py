"""Text cut into pieces, as a stream of tokens may deliver it."""

from hypothesis import strategies as st


def cut(data: st.DataObject, text: str) -> list[str]:
    """Random pieces of the text, some empty."""
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:stop] for start, stop in zip([0, *places], [*places, len(text)], strict=True)]
