"""Holds exported networks to ONNX's checker and ONNX Runtime.

    python tests/golden/onnx_check.py FOLDER        (needs numpy, onnx, onnxruntime, safetensors)

FOLDER holds CASE.onnx files and, for each, one or more CASE.*.safetensors with the tensor `input` and
the outputs that farface computes. tests/onnx.rs makes them and runs this. Exit code 77 means that a
package is missing.
"""

import sys
from pathlib import Path

try:
    import numpy as np
    import onnx
    import onnxruntime
    from safetensors.numpy import load_file
except ImportError as e:
    print(e)
    sys.exit(77)

TOLERANCE = 1e-4  # of the output's largest magnitude

wrong = 0
files = sorted(Path(sys.argv[1]).glob("*.onnx"))
for file in files:
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    cases = sorted(file.parent.glob(f"{file.stem}.*.safetensors"))
    assert cases, f"{file.stem}: nothing to compare with"
    for case in cases:
        expected = load_file(case)
        image = expected.pop("input")
        assert sorted(expected) == sorted(names), (names, list(expected))
        got = dict(zip(names, session.run(names, {session.get_inputs()[0].name: image})))
        for name, values in expected.items():
            if got[name].shape != values.shape:
                error = np.inf
            else:
                error = np.abs(got[name] - values).max() / np.abs(values).max()
            ok = error <= TOLERANCE
            wrong += not ok
            print(f"{case.stem} {name} {values.shape}: off by {error:.1e}{'' if ok else '  WRONG'}")
print(f"{len(files)} networks, {wrong} outputs wrong")
sys.exit(1 if wrong or not files else 0)
