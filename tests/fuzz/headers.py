"""Mutated safetensors files through SafetensorsFile, with the safetensors library as the judge of what is well-formed.

    python tests/fuzz/headers.py SECONDS [SEED]

Each input is either refused in a ValueError that names the file, or every tensor lies inside the file and has the library's dtype, shape and bytes.
"""

import json
import os
import random
import sys
import tempfile
import time

import numpy as np
import safetensors

from mrgptq.checkpoint.safetensors import SafetensorsFile
from mrgptq.checkpoint.stored_tensor import BITS_DTYPE

# What the library allows and we do not, by the words of the refusal.
STRICTER = (
    "occurs twice",  # it takes the last of two keys
    "F4 keeps two codes in a byte",  # it lets a pair span two rows
    "at most 32 integers",  # NumPy's limit of axes
    "overflows 63 bits",  # it counts elements, and has no array to make
    "digits",  # Python's limit for numbers as text
)
STRANGE = ["NaN", "-1", "1e3", "1.0", "true", "null", '"1"', "[]", "{}", "18446744073709551615", "18446744073709551616", "9223372036854775807", "4611686018427387904", "9" * 5000, "[" * 500, '"\\ud800"', '"\\u0000"', "-0", "01", "1e999"]
TOKENS = ['"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', *(f'"{dtype}"' for dtype in BITS_DTYPE), '"F6_E2M3"', '"f32"', ",", ":", "[", "]", "{", "}", "0", "1", "2", "-", " ", "\n", "\\", "\ufeff"]


def a_file(rng: random.Random) -> bytes:
    """A well-formed file of up to five tensors."""
    header: dict[str, object] = {}
    if rng.random() < 0.3:
        header["__metadata__"] = {rng.choice(["format", "é", ""]): rng.choice(["pt", "", "\u2028"]) for _ in range(rng.randrange(3))}
    begin = 0
    for i in range(rng.randrange(6)):
        dtype = rng.choice(list(BITS_DTYPE))
        shape = [rng.choice([0, 1, 1, 2, 2, 3, 4]) for _ in range(rng.randrange(4))]
        if dtype == "F4":
            shape = [*shape, 2]
        end = begin + int(np.prod(shape)) * BITS_DTYPE[dtype].itemsize // (2 if dtype == "F4" else 1)
        header[rng.choice([f"t{i}", f"layers.{i}.weight", f"ü{i}", f"../{i}"])] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    return whole(json.dumps(header, ensure_ascii=rng.random() < 0.5, separators=rng.choice([(",", ":"), (", ", ": ")])).encode(), rng.randbytes(begin))


def whole(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def parts(file: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(file[:8], "little")
    return file[8 : 8 + size], file[8 + size :]


def replaced_number(rng: random.Random, header: bytes) -> bytes:
    """One of the header's numbers, a little or quite another."""
    places = [i for i, byte in enumerate(header) if 48 <= byte <= 57]
    if not places:
        return header
    at = rng.choice(places)
    end = at + 1
    while end < len(header) and 48 <= header[end] <= 57:
        end += 1
    value = rng.choice([str(int(header[at:end][:50]) + rng.choice([-1, 1, 1, 2, 8])), rng.choice(STRANGE)])
    return header[:at] + value.encode("utf-8", "surrogatepass") + header[end:]


def mutated(rng: random.Random, file: bytes) -> bytes:
    """One change of a file: of its numbers, its words, its entries, its bytes or its length."""
    header, data = parts(file)
    kind = rng.randrange(9)
    if kind == 0:
        return whole(replaced_number(rng, header), data)
    if kind == 1:  # a word more, or in place of what was there
        at = rng.randrange(len(header) + 1)
        return whole(header[:at] + rng.choice(TOKENS).encode() + header[at + rng.choice([0, 0, 1, 4]) :], data)
    if kind == 2:  # an entry's fields, whatever they are
        try:
            table = json.loads(header)
            name = rng.choice(list(table))
            table[name][rng.choice(["dtype", "shape", "data_offsets", "more"])] = rng.choice([None, [], [0], [0, 0], [1, 2, 3], "U8", "BOOL", {}, 7, [True], [2**62, 2, 0], [0, 2**64]])
            return whole(json.dumps(table).encode(), data)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return file
    if kind == 3:  # a byte of the header
        if not header:
            return file
        at = rng.randrange(len(header))
        return whole(header[:at] + bytes([header[at] ^ 1 << rng.randrange(8)]) + header[at + 1 :], data)
    if kind == 4:  # the data a little longer or shorter
        return whole(header, data[: max(0, len(data) - rng.randrange(3))] + rng.randbytes(rng.randrange(3)))
    if kind == 5:  # a header that is announced wrongly
        return (max(0, len(header) + rng.choice([-1, 1, 8, -len(header), 2**20, 2**63]))).to_bytes(8, "little") + header + data
    if kind == 6:  # cut anywhere
        return file[: rng.randrange(len(file) + 1)]
    if kind == 7:  # a piece of the header again
        begin = rng.randrange(len(header) + 1)
        end = rng.randrange(begin, len(header) + 1)
        at = rng.randrange(len(header) + 1)
        return whole(header[:at] + header[begin:end] + header[at:], data)
    at = rng.randrange(len(file) + 1)  # any byte
    return file[:at] + rng.randbytes(1) + file[at + 1 :]


def judge(file: bytes, path: str) -> bool:
    """Check one input, which is written to ``path``; whether it was accepted. AssertionError where the invariant is broken."""
    with open(path, "wb") as out:
        out.write(file)
    try:
        theirs = {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in safetensors.deserialize(file)}
    except safetensors.SafetensorError:
        theirs = None
    try:
        opened = SafetensorsFile(path)
        ours = {name: (opened.dtype(name), opened.shape(name), np.ascontiguousarray(opened.tensor(name).bits).tobytes()) for name in opened.names}
    except ValueError as refused:
        message = str(refused)
        assert path in message and len(message) < 2000, message
        assert theirs is None or any(words in message for words in STRICTER), f"refused, but the library reads it: {message}"
        return False
    if theirs is None:
        assert b"-0" in file, "read, but the library refuses it"  # to which -0 is no whole number
    else:
        assert ours == theirs, "read otherwise than the library does"
    data_bytes = len(file) - 8 - int.from_bytes(file[:8], "little")
    assert sum(len(bits) for _, _, bits in ours.values()) == data_bytes, "more or less data than the file has"
    return True


def run(seed: int, *, seconds: float | None = None, inputs: int | None = None) -> tuple[int, int]:
    """Judge inputs until the time or their number is up: (inputs, accepted). An input that breaks the invariant is named in the error, in hexadecimal."""
    rng = random.Random(seed)
    end = None if seconds is None else time.monotonic() + seconds
    done = accepted = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = os.path.join(folder, "f")
        while done != inputs and (end is None or time.monotonic() < end):
            file = a_file(rng)
            for _ in range(rng.randrange(4)):
                file = mutated(rng, file)
            try:
                accepted += judge(file, path)
            except Exception as error:
                raise AssertionError(f"headers, seed {seed}, input {done}: {type(error).__name__}: {error}; the file is {file.hex()}") from error
            done += 1
    return done, accepted


if __name__ == "__main__":
    done, accepted = run(int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32), seconds=float(sys.argv[1]))
    print(f"headers: {done} inputs, {accepted} accepted, 0 broken")
