"""ONNX Runtime: predictions of torch's model as torch exports it; on one thread."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from benchmarks.architecture import Array
from benchmarks.systems import Built
from benchmarks.workloads import Workload

PACKAGES = ("onnxruntime", "onnx")
PRECISION = "float32"


def variants(workload: Workload, task: str) -> Sequence[str]:
    """Return the one way."""
    return ("session",)


def build(workload: Workload, variant: str) -> Built:
    """Return the exported model, which only predicts; its batches have the workload's size."""
    import torch

    from benchmarks.systems.torch import module

    model = module(workload).eval()
    inputs, _ = workload.batch()
    example = torch.from_numpy(_given(inputs))
    session = _session(torch.onnx.export(model, (example,), dynamo=True, verbose=False).model_proto)
    name, size = session.get_inputs()[0].name, len(inputs)

    def predict(x: Array) -> Array:
        parts = (x[at : at + size] for at in range(0, len(x), size))
        return np.concatenate([session.run(None, {name: _given(part)})[0] for part in parts])

    return Built(parameters=sum(p.numel() for p in model.parameters()), predict=predict)


def product(a: Array, b: Array) -> Array:
    """Return ``a @ b``."""
    a_info, b_info, y_info = (helper.make_tensor_value_info(n, TensorProto.FLOAT, (None, None)) for n in "aby")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["y"])], "product", [a_info, b_info], [y_info])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    result: Array = _session(model).run(None, {"a": a, "b": b})[0]
    return result


def _given(x: Array) -> Array:
    """Return images channels first."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x


def _session(model: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
