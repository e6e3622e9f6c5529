"""The fuzzers of tests/fuzz for a few seconds, always with the same inputs; `sh .ci/fuzz SECONDS` runs them for longer, with others."""

import numpy as np
import pytest

from fuzz import api, headers
from mrgptq.checkpoint import safetensors as ours


def test_mutated_headers_are_refused_or_read_as_the_library_reads_them():
    done, accepted = headers.run(0, inputs=20_000)
    assert done == 20_000 and 0.2 < accepted / done < 0.8


@pytest.mark.parametrize("prop", api.PROPERTIES, ids=lambda prop: prop.__name__)
def test_any_arguments_are_refused_in_a_sentence_or_answered_as_promised(prop):
    for seed in range(1000):
        api.check(prop, seed)


def test_the_fuzzers_see_what_is_wrong(monkeypatch):
    monkeypatch.setattr(ours, "_is_sizes", lambda value: isinstance(value, list))
    with pytest.raises(AssertionError, match="headers, seed 1, input [0-9]+: .*the file is [0-9a-f]+"):
        headers.run(1, inputs=20_000)
    monkeypatch.setattr(api.reference, "encode_e2m1", lambda x: np.zeros(np.shape(x), np.uint8))
    with pytest.raises(AssertionError, match="api, quantize, seed [0-9]+: AssertionError: other codes"):
        for seed in range(400):
            api.check(api.quantize, seed)
