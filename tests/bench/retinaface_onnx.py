#!/usr/bin/env python3
"""Writes the published RetinaFace (MobileNet-V1 x0.25) as ONNX, batch normalisation folded.

    python3 tests/bench/retinaface_onnx.py WEIGHTS.safetensors OUT.onnx [WIDTH HEIGHT]

Needs numpy, onnx and safetensors. The file is for timing other runtimes on the same network; do not
ship it. Outputs, per level: class (4), box (8), landmark (20), as `farface` orders them.
"""
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file


class Net:
    def __init__(self, weights, width, height):
        self.w, self.nodes, self.init = weights, [], []
        self.size = {"input": (height, width)}
        self.count = 0

    def name(self):
        self.count += 1
        return f"t{self.count}"

    def node(self, op, inputs, size, **attributes):
        out = self.name()
        self.nodes.append(helper.make_node(op, inputs, [out], **attributes))
        self.size[out] = size
        return out

    def const(self, value):
        name = self.name()
        self.init.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def conv(self, x, weight, bias, stride=1, groups=1):
        k = weight.shape[2]
        h, w = ((s + 2 * (k // 2) - k) // stride + 1 for s in self.size[x])
        return self.node(
            "Conv", [x, self.const(weight), self.const(bias)], (h, w), kernel_shape=[k, k],
            strides=[stride] * 2, pads=[k // 2] * 4, group=groups)

    def conv_bn(self, x, conv, bn, stride=1, slope=0.1):
        w = self.w[f"{conv}.weight"]
        scale = self.w[f"{bn}.weight"] / np.sqrt(self.w[f"{bn}.running_var"] + 1e-5)
        bias = self.w[f"{bn}.bias"] - self.w[f"{bn}.running_mean"] * scale
        groups = w.shape[0] if w.shape[1] == 1 and w.shape[0] > 1 and w.shape[2] == 3 else 1
        y = self.conv(x, w * scale[:, None, None, None], bias, stride, groups)
        return y if slope is None else self.node("LeakyRelu", [y], self.size[y], alpha=slope)

    def block(self, x, name, stride):
        x = self.conv_bn(x, f"{name}.0", f"{name}.1", stride)
        return self.conv_bn(x, f"{name}.3", f"{name}.4")


def build(weights, width, height):
    g = Net(weights, width, height)
    x = g.conv_bn("input", "body.stage1.0.0", "body.stage1.0.1", 2)
    for i, s in enumerate((1, 2, 1, 2, 1), 1):
        x = g.block(x, f"body.stage1.{i}", s)
    features = [x]
    for i in range(6):
        x = g.block(x, f"body.stage2.{i}", 2 if i == 0 else 1)
    features.append(x)
    for i in range(2):
        x = g.block(x, f"body.stage3.{i}", 2 if i == 0 else 1)
    features.append(x)
    lateral = [g.conv_bn(f, f"fpn.output{i + 1}.0", f"fpn.output{i + 1}.1") for i, f in enumerate(features)]

    def top_down(coarse, fine, name):
        (h, w), (ch, cw) = g.size[fine], g.size[coarse]
        scales = g.const(np.array([1, 1, h / ch, w / cw], np.float32))
        up = g.node("Resize", [coarse, "", scales], (h, w), mode="nearest",
                    coordinate_transformation_mode="asymmetric", nearest_mode="floor")
        return g.conv_bn(g.node("Add", [fine, up], (h, w)), f"fpn.{name}.0", f"fpn.{name}.1")

    p5 = lateral[2]
    p4 = top_down(p5, lateral[1], "merge2")
    p3 = top_down(p4, lateral[0], "merge1")
    outputs = []
    for i, p in enumerate((p3, p4, p5)):
        s = f"ssh{i + 1}"
        c3 = g.conv_bn(p, f"{s}.conv3X3.0", f"{s}.conv3X3.1", slope=None)
        shared = g.conv_bn(p, f"{s}.conv5X5_1.0", f"{s}.conv5X5_1.1")
        c5 = g.conv_bn(shared, f"{s}.conv5X5_2.0", f"{s}.conv5X5_2.1", slope=None)
        c7 = g.conv_bn(shared, f"{s}.conv7X7_2.0", f"{s}.conv7X7_2.1")
        c7 = g.conv_bn(c7, f"{s}.conv7x7_3.0", f"{s}.conv7x7_3.1", slope=None)
        head = g.node("Relu", [g.node("Concat", [c3, c5, c7], g.size[p], axis=1)], g.size[p])
        for kind in ("ClassHead", "BboxHead", "LandmarkHead"):
            n = f"{kind}.{i}.conv1x1"
            outputs.append(g.conv(head, weights[f"{n}.weight"], weights[f"{n}.bias"]))
    value = lambda n, c, s: helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, *s])
    graph = helper.make_graph(
        g.nodes, "retinaface", [value("input", 3, (height, width))],
        [value(o, c, g.size[o]) for o, c in zip(outputs, (4, 8, 20) * 3)], g.init)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


if __name__ == "__main__":
    if len(sys.argv) not in (3, 5):
        sys.exit(__doc__)
    width, height = map(int, sys.argv[3:5] or (640, 480))
    onnx.save(build(load_file(sys.argv[1]), width, height), sys.argv[2])
