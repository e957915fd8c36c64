"""One product in ONNX Runtime: float32 weights beside codes of 8 and 4 bits in several forms.

    python benchmarks/onnx_codes.py

For each form: the operators that ONNX Runtime makes of it, the bytes of the graph, the least time of
some calls with 1 and with 128 tokens on one thread, and the largest error relative to the largest
output. The forms are measured in turns. `integer` has 8-bit activations made in the graph
(DynamicQuantizeLinear, MatMulInteger), which `export_onnx(quantize="dynamic")` writes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1536, help="inputs and outputs (default 1536)")
    parser.add_argument("--repeats", type=int, default=12, help="calls of each (default 12)")
    options = parser.parse_args()

import numpy as np

try:
    import ml_dtypes
    import onnx
    import onnx_ir as ir
    import onnxruntime as ort
except ImportError as error:
    sys.exit(f"{error}: pip install 'hf_sparse[onnx]'")
from real_models import machine

from hf_sparse.counts import format_table

BLOCK = 32
_LEVEL = "session.qdq_matmulnbits_accuracy_level"
FORMS: dict[str, dict[str, str]] = {
    "float32": {},
    "int4": {},
    "int4, level 1": {_LEVEL: "1"},
    "int8": {},
    "int8, level 1": {_LEVEL: "1"},
    "int8, no fusion": {"session.disable_quant_qdq": "1"},
    "integer": {},
}


def main() -> None:
    """Print the table."""
    print(
        f"{machine()}, onnxruntime {ort.__version__}; {options.size} x {options.size}, 1 thread\n"
    )
    size, random = options.size, np.random.default_rng(0)
    codes = random.integers(-8, 8, (size, size)).astype(np.int8)
    scales = random.random((size // BLOCK, size)).astype(np.float32) / 100
    weight = (codes.reshape(-1, BLOCK, size) * scales[:, None]).reshape(size, size)
    inputs = {count: random.standard_normal((count, size)).astype(np.float32) for count in (1, 128)}
    made = {form: session(form, codes, scales, weight) for form in FORMS}
    best: dict[tuple[str, int], float] = {}
    errors = {}
    for _ in range(options.repeats):
        for form, (run, _, _) in made.items():
            for count, x in inputs.items():
                start = time.perf_counter()
                found = run.run(None, {"x": x})[0]
                took = time.perf_counter() - start
                best[form, count] = min(best.get((form, count), took), took)
                wanted = x @ weight
                errors[form] = np.abs(found - wanted).max() / np.abs(wanted).max()
    rows = [
        (
            form,
            ", ".join(operators),
            f"{nbytes / 1e6:.2f}",
            *(f"{best[form, count] * 1e3:.3f}" for count in inputs),
            f"{errors[form]:.1e}",
        )
        for form, (_, operators, nbytes) in made.items()
    ]
    print(format_table(("form", "runs as", "MB", "1 token, ms", "128, ms", "error"), rows))


def session(form: str, codes: Any, scales: Any, weight: Any) -> tuple[Any, list[str], int]:
    """A session, the operators that it runs, and the bytes of the graph."""
    data = ir.serde.serialize_model(graph(form.partition(",")[0], codes, scales, weight))
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    for name, value in FORMS[form].items():
        settings.add_session_config_entry(name, value)
    with tempfile.TemporaryDirectory() as folder:
        settings.optimized_model_filepath = str(Path(folder) / "made.onnx")
        run = ort.InferenceSession(data.SerializeToString(), settings)
        nodes = onnx.load(settings.optimized_model_filepath).graph.node
    return run, [node.op_type for node in nodes], len(data.SerializeToString())


def graph(kind: str, codes: Any, scales: Any, weight: Any) -> ir.Model:
    """The graph of `y = x W`, `W (in_features, out_features)`."""
    size = len(codes)
    x = ir.val("x", ir.DataType.FLOAT, ("tokens", size))
    constants: list[ir.Value] = []

    def constant(name: str, array: Any) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        constants.append(value)
        return value

    if kind == "float32":
        nodes = [ir.node("MatMul", [x, constant("w", weight)])]
    elif kind == "integer":
        column = np.abs(weight).max(0) / 127
        rounded = constant("q", np.round(weight / column).astype(np.int8))
        quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
        values, scale, point = quantize.outputs
        product = ir.node("MatMulInteger", [values, rounded, point])
        cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT})
        both = ir.node("Mul", [scale, constant("s", column.astype(np.float32))])
        last = ir.node("Mul", [cast.outputs[0], both.outputs[0]])
        nodes = [quantize, product, cast, both, last]
    else:
        stored = codes.astype(ml_dtypes.int4) if kind == "int4" else codes
        blocks = {"axis": 0, "block_size": BLOCK}
        factors = [constant("codes", stored), constant("scales", scales)]
        restored = ir.node("DequantizeLinear", factors, blocks)
        nodes = [restored, ir.node("MatMul", [x, restored.outputs[0]])]
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(("tokens", size))
    made = ir.Graph([x], [y], nodes=nodes, initializers=constants, opset_imports={"": 21}, name="g")
    return ir.Model(made, ir_version=10)


if __name__ == "__main__":
    main()
