"""ggml's products with packed weights through ctypes, for bench_matmul.py: its own rounding of the weight, its own of the tokens to eight bits, its own threads.

A weight lies in the buffer type that ggml's processor backend prefers for its format: "repacked", rows interleaved when they are set, where it has that, else as they are. As llama.cpp runs them.
"""

import ctypes
from itertools import cycle
from pathlib import Path

import numpy as np

TYPES = {"ggml F16": (1, False), "ggml Q4_0 repacked": (2, True), "ggml MXFP4 repacked": (39, True), "ggml NVFP4": (40, False)}  # enum ggml_type, ggml.h
FLOAT32, FLOAT16 = 0, 1

_POINTERS = (
    "ggml_init ggml_new_tensor_2d ggml_mul_mat ggml_new_graph ggml_backend_cpu_init ggml_backend_cpu_reg ggml_backend_reg_dev_get ggml_backend_reg_get_proc_address ggml_backend_cpu_buffer_type "
    "ggml_backend_alloc_ctx_tensors_from_buft"
).split()


class _InitParameters(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """The libraries in a folder such as llama_cpp/lib; OSError where they are not there."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._libraries = [ctypes.CDLL(str(Path(folder) / f"libggml-{part}.so"), mode=ctypes.RTLD_GLOBAL) for part in ("base", "cpu")]
        for name in _POINTERS:
            self._function(name).restype = ctypes.c_void_p
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)  # it tells of every tensor that it repacks
        self._call("ggml_log_set", self._quiet, None)
        self._call("ggml_cpu_init")
        self._backend = self._call("ggml_backend_cpu_init")
        self._call("ggml_backend_cpu_set_n_threads", self._backend, ctypes.c_int(threads))

    def _function(self, name):
        return next(getattr(library, name) for library in self._libraries if hasattr(library, name))

    def _call(self, name, *arguments):
        """A call whose integers are pointers or sizes; other widths are given as ctypes."""
        return self._function(name)(*(ctypes.c_void_p(argument) if isinstance(argument, int) else argument for argument in arguments))

    def _context(self):
        init = self._function("ggml_init")
        init.argtypes = [_InitParameters]
        return init(_InitParameters(1 << 26, None, True))  # for what describes tensors and graphs

    def _buffer_type(self, repacked):
        """ggml's name for where a weight lies; None where it does not repack on this processor."""
        if not repacked:
            return self._call("ggml_backend_cpu_buffer_type")
        register = self._call("ggml_backend_cpu_reg")
        found = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(self._call("ggml_backend_reg_get_proc_address", register, ctypes.c_char_p(b"ggml_backend_dev_get_extra_bufts")))
        names = self._function("ggml_backend_buft_name")
        names.restype = ctypes.c_char_p
        for kind in found(self._call("ggml_backend_reg_dev_get", register, ctypes.c_size_t(0))):
            if kind is None:
                return None
            if names(ctypes.c_void_p(kind)) == b"CPU_REPACK":
                return kind
        return None

    def weights(self, name: str, weight: np.ndarray, copies: int):
        """As many copies of a (rows, cols) float32 weight in one of TYPES, as ggml rounds it; None where this ggml or this processor has no such."""
        kind, repacked = TYPES[name]
        rows, cols = weight.shape
        place = self._buffer_type(repacked)
        if place is None:
            return None
        context = self._context()
        tensors = [self._call("ggml_new_tensor_2d", context, ctypes.c_int(kind), ctypes.c_int64(cols), ctypes.c_int64(rows)) for _ in range(copies)]
        if self._call("ggml_backend_alloc_ctx_tensors_from_buft", context, place) is None:
            return None
        size = self._function("ggml_nbytes")
        size.restype = ctypes.c_size_t
        data = np.empty(size(ctypes.c_void_p(tensors[0])), np.uint8)
        if kind == FLOAT16:
            data[:] = weight.astype(np.float16).reshape(-1).view(np.uint8)
        else:
            self._call("ggml_quantize_chunk", ctypes.c_int(kind), weight.ctypes.data, data.ctypes.data, ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(cols), None)
        for tensor in tensors:
            self._call("ggml_backend_tensor_set", tensor, data.ctypes.data, ctypes.c_size_t(0), ctypes.c_size_t(len(data)))
        return tensors

    def product(self, tensors: list, x: np.ndarray, rows: int):
        """A function that multiplies (tokens, cols) float32 tokens by the next copy, and one that gives the last answer, (tokens, rows)."""
        tokens, cols = x.shape
        context = self._context()
        inputs = self._call("ggml_new_tensor_2d", context, ctypes.c_int(FLOAT32), ctypes.c_int64(cols), ctypes.c_int64(tokens))
        outputs = [self._call("ggml_mul_mat", context, tensor, inputs) for tensor in tensors]
        graphs = []
        for output in outputs:
            graph = self._call("ggml_new_graph", context)
            self._call("ggml_build_forward_expand", graph, output)
            graphs.append(graph)
        self._call("ggml_backend_alloc_ctx_tensors_from_buft", context, self._call("ggml_backend_cpu_buffer_type"))
        self._call("ggml_backend_tensor_set", inputs, x.ctypes.data, ctypes.c_size_t(0), ctypes.c_size_t(x.nbytes))
        turn = cycle(graphs)

        def answer():
            out = np.empty((tokens, rows), np.float32)
            self._call("ggml_backend_tensor_get", outputs[0], out.ctypes.data, ctypes.c_size_t(0), ctypes.c_size_t(out.nbytes))
            return out

        return lambda: self._call("ggml_backend_graph_compute", self._backend, next(turn)), answer
