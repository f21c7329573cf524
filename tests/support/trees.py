"""Random trees."""

from hypothesis import strategies as st
from paceline.spec.tree import TreeShape


@st.composite
def shapes(draw, most=12):
    size = draw(st.integers(1, most))
    return TreeShape((-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))))
