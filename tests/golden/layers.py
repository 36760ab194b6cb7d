"""Makes layers.safetensors: what PyTorch and torchvision compute for each layer, forward and backward.

    python tests/golden/layers.py        (needs torch, torchvision, numpy, safetensors)

Tensors are named `layer/case/value`, as PyTorch stores them (N, C, H, W): `x` and the other inputs,
`w`, `b`, the output `y`, its gradient `dy`, and the gradients `dx`, `dw`, `db`.
tests/layer_goldens.rs holds the same cases by name.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.ops import roi_align

torch.manual_seed(20240607)
torch.set_num_threads(1)
golden = {}


def rand(*shape):
    return torch.rand(*shape) * 2 - 1


def case(name, forward, inputs, grad=None, **more):
    """Runs `forward` on the inputs and keeps inputs, output and the gradients of the inputs in `grad` (all)."""
    grad = list(inputs) if grad is None else grad
    leaves = {k: v.clone().requires_grad_(k in grad) for k, v in inputs.items()}
    y = forward(*leaves.values())
    dy = rand(*y.shape)
    y.backward(dy)
    values = {**inputs, "y": y.detach(), "dy": dy, **{f"d{k}": leaves[k].grad for k in grad}, **more}
    for k, v in values.items():
        golden[f"{name}/{k}"] = v.contiguous().clone()


def pad(x, padding, value=0.0):
    """Top, left, bottom, right."""
    t, l, b, r = padding
    return F.pad(x, (l, r, t, b), value=value)


def conv2d(name, x, o, k, stride=(1, 1), dilation=(1, 1), padding=(0, 0, 0, 0), groups=1, bias=False):
    inputs = {"x": rand(*x), "w": rand(o, x[1] // groups, *k)}
    if bias:
        inputs["b"] = rand(o)
    case(
        f"conv2d/{name}",
        lambda x, w, b=None: F.conv2d(pad(x, padding), w, b, stride, 0, dilation, groups),
        inputs,
    )


conv2d("1x1", (2, 3, 4, 5), 4, (1, 1))
conv2d("3x3_bias", (2, 3, 6, 5), 4, (3, 3), padding=(1, 1, 1, 1), bias=True)
conv2d("7x7_stride2", (1, 3, 13, 12), 4, (7, 7), stride=(2, 2), padding=(3, 3, 3, 3))
conv2d("dilation", (1, 2, 9, 8), 3, (3, 3), dilation=(2, 3), padding=(2, 3, 2, 3), bias=True)
conv2d("groups", (2, 4, 5, 5), 6, (3, 3), padding=(1, 1, 1, 1), groups=2, bias=True)
conv2d("depthwise_stride2", (1, 4, 7, 6), 4, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1), groups=4)
conv2d("1x5", (1, 3, 5, 6), 2, (1, 5), padding=(0, 2, 0, 2), bias=True)
conv2d("5x1", (1, 3, 6, 5), 2, (5, 1), padding=(2, 0, 2, 0))
conv2d("asymmetric", (1, 2, 6, 7), 3, (3, 2), stride=(2, 3), padding=(0, 1, 1, 2), bias=True)


def conv_transpose2d(name, x, o, k, stride, padding, groups=1, bias=False):
    def forward(x, w, b=None):
        t, l, bottom, r = padding
        y = F.conv_transpose2d(x, w, b, stride, 0, 0, groups)
        return y[:, :, t : y.shape[2] - bottom, l : y.shape[3] - r]

    inputs = {"x": rand(*x), "w": rand(x[1], o // groups, *k)}
    if bias:
        inputs["b"] = rand(o)
    case(f"conv_transpose2d/{name}", forward, inputs)


conv_transpose2d("4x4_stride2", (2, 3, 3, 4), 4, (4, 4), (2, 2), (1, 1, 1, 1), bias=True)
conv_transpose2d("depthwise", (1, 3, 4, 3), 3, (4, 4), (2, 2), (1, 1, 1, 1), groups=3)
conv_transpose2d("groups", (1, 4, 3, 3), 6, (3, 3), (1, 2), (0, 0, 0, 0), groups=2, bias=True)
conv_transpose2d("asymmetric", (1, 2, 3, 4), 2, (3, 5), (2, 3), (1, 2, 0, 1))


def batchnorm(name, x, training, eps=1e-5, momentum=0.1):
    c = x[1]
    mean, var = rand(c), torch.rand(c) + 0.2
    after = {"mean_after": mean.clone(), "var_after": var.clone()}
    case(
        f"batchnorm/{name}",
        lambda x, w, b: F.batch_norm(
            x, after["mean_after"], after["var_after"], w, b, training, momentum, eps
        ),
        {"x": rand(*x) * 2 + 0.5, "w": rand(c), "b": rand(c)},
        mean=mean,
        var=var,
        **after,
    )


batchnorm("frozen", (2, 3, 4, 5), False)
batchnorm("frozen_eps", (1, 4, 3, 3), False, eps=1e-2)
batchnorm("train", (2, 3, 4, 5), True)
batchnorm("train_eps_momentum", (3, 4, 2, 2), True, eps=1e-3, momentum=0.3)


def activation(name, c, forward):
    x = rand(2, c, 3, 4) * 4
    x[0, 0, 0, 0] = 0.0
    case(f"activation/{name}", forward, {"x": x})


def softmax(x, k):
    n, c, h, w = x.shape
    return x.view(n, c // k, k, h, w).softmax(2).view(n, c, h, w)


activation("relu", 3, F.relu)
activation("leaky_relu", 3, lambda x: F.leaky_relu(x, 0.1))
activation("sigmoid", 3, torch.sigmoid)
activation("softmax2", 6, lambda x: softmax(x, 2))
activation("softmax3", 3, lambda x: softmax(x, 3))


def max_pool(name, x, k, stride, padding):
    # Small whole numbers: many ties.
    x = torch.randint(-3, 4, x).float()
    case(
        f"max_pool/{name}",
        lambda x: F.max_pool2d(pad(x, padding, float("-inf")), k, stride),
        {"x": x},
    )


max_pool("2x2", (2, 3, 6, 4), (2, 2), (2, 2), (0, 0, 0, 0))
max_pool("3x3_stride2", (1, 3, 9, 8), (3, 3), (2, 2), (1, 1, 1, 1))
max_pool("asymmetric", (1, 2, 7, 6), (3, 2), (2, 1), (0, 1, 2, 0))
max_pool("3x3_stride1", (1, 2, 5, 6), (3, 3), (1, 1), (1, 1, 1, 1))

case("global_avg_pool/plain", lambda x: F.adaptive_avg_pool2d(x, 1), {"x": rand(2, 3, 5, 7)})


def upsample(name, mode, x, **to):
    align = {"align_corners": False} if mode == "bilinear" else {}
    case(f"upsample/{name}", lambda x: F.interpolate(x, mode=mode, **to, **align), {"x": rand(*x)})


upsample("nearest_x2", "nearest", (2, 3, 3, 4), scale_factor=(2, 2))
upsample("nearest_x3x1", "nearest", (1, 2, 4, 3), scale_factor=(3, 1))
upsample("nearest_7x9", "nearest", (1, 3, 4, 5), size=(7, 9))
# Rounding of the scale to f32 decides here: floor(dst * in / out) in exact numbers differs.
upsample("nearest_44x46", "nearest", (1, 1, 26, 28), size=(44, 46))
upsample("nearest_smaller", "nearest", (1, 2, 7, 9), size=(3, 4))
upsample("bilinear_x2", "bilinear", (2, 3, 3, 4), scale_factor=(2, 2))
upsample("bilinear_x4x3", "bilinear", (1, 2, 3, 2), scale_factor=(4, 3))
upsample("bilinear_7x9", "bilinear", (1, 3, 4, 5), size=(7, 9))
upsample("bilinear_smaller", "bilinear", (1, 2, 7, 9), size=(3, 4))

case("add/plain", lambda a, b: a + b, {"a": rand(2, 3, 4, 5), "b": rand(2, 3, 4, 5)})
case(
    "concat/three",
    lambda a, b, c: torch.cat([a, b, c], 1),
    {"a": rand(2, 1, 3, 4), "b": rand(2, 3, 3, 4), "c": rand(2, 2, 3, 4)},
)
case("crop/plain", lambda x: x[:, :, 1:5, 2:5], {"x": rand(2, 3, 6, 7)})

ROIS = torch.tensor(
    [
        [0, 4.0, 6.0, 30.0, 25.0],
        [1, 0.0, 0.0, 43.0, 35.0],
        [1, -9.0, -7.0, 13.0, 11.0],  # across the border
        [0, 30.0, 28.0, 60.0, 55.0],  # across the far border
        [0, 200.0, 200.0, 240.0, 240.0],  # outside
        [1, 10.0, 10.0, 11.0, 11.0],  # smaller than a cell
        [0, 20.0, 20.0, 12.0, 14.0],  # inside out
    ]
)


def rois(name, output, scale, ratio, aligned):
    case(
        f"roi_align/{name}",
        lambda x, rois: roi_align(x, rois, output, scale, ratio if ratio else -1, aligned),
        {"x": rand(2, 3, 9, 11), "rois": ROIS},
        grad=["x"],
    )


rois("adaptive", (3, 3), 0.25, 0, False)
rois("adaptive_aligned", (3, 2), 0.25, 0, True)
rois("ratio2", (2, 3), 0.25, 2, False)
rois("ratio2_aligned", (2, 2), 0.125, 2, True)

for name, bias in [("bias", True), ("plain", False)]:
    inputs = {"x": rand(3, 2, 3, 4), "w": rand(5, 24)}
    if bias:
        inputs["b"] = rand(5)
    case(f"linear/{name}", lambda x, w, b=None: F.linear(x.flatten(1), w, b)[:, :, None, None], inputs)

out = Path(__file__).with_suffix(".safetensors")
save_file(golden, out, {"torch": torch.__version__})
print(out, out.stat().st_size, "bytes,", len(golden), "tensors")
