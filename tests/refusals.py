"""How tests look at what is refused."""

import pytest


def refusal(build, error=ValueError):
    """The sentence with which that is refused."""
    with pytest.raises(error) as refused:
        build()
    return str(refused.value)
