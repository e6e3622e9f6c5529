"""A weight and the inputs of its layer, as numpy arrays, to four bits three ways: what each costs in the layer's output."""

import numpy as np

import mrgptq as mg

rng = np.random.default_rng(0)
weight = rng.standard_normal((512, 256)) * rng.lognormal(0, 0.5, (512, 1))  # (rows = out_features, cols = in_features)
inputs = rng.standard_normal((4096, 256)) @ rng.standard_normal((256, 256)) / 16  # correlated, as activations are

hessian = mg.Hessian(256)
hessian.update(inputs)

for name in ("rtn", "gptq", "mr-gptq"):
    for format in ("nvfp4", "mxfp4"):
        q = mg.quantize_layer(weight, hessian, name, format=format)
        error = inputs @ (weight - q.dequantize(unrotate=True)).T
        measured = (error**2).sum() / ((inputs @ weight.T) ** 2).sum()
        print(f"{name:8} {format}  reported {q.report.relative_error:.4e}  measured {measured:.4e}")

print()
print(q)
