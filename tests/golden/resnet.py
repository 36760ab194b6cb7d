"""Makes resnet.safetensors: what PyTorch computes for narrow ResNets with feature pyramids, forward and backward.

    python tests/golden/resnet.py        (needs torch, torchvision, numpy, safetensors)

The networks are written out here, apart from torchvision's, and held to torchvision's names and outputs at full
width. Weights and pictures are not in the file: both sides draw them, bit for bit the same, from
SplitMix64 by the parameter's name (`Weights::random` in src/graph/init.rs). Tensors are named `network.mode/value`:
`eval/p2`..`p5` of one picture with running statistics; `train/p3`..`p5` of two with the batch's (p2, by far the
largest, is left out); after a backward pass from drawn gradients of p2..p5, `gradient/NAME`: norm of a parameter's
gradient, its product with values drawn for `NAME.probe`, the parameter's size. tests/resnet_goldens.rs holds the same
cases by name.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

torch.set_num_threads(1)
SEED = 7


def rng(name):
    """The generator of a name, as FNV-1a of it tells."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return SEED ^ h


def uniform(state, count):
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def normal(name, *shape):
    u = uniform(rng(name), 12 * int(np.prod(shape))).reshape(-1, 12)
    total = np.zeros(len(u), np.float32)
    for i in range(12):
        total += u[:, i]
    return torch.from_numpy((total - np.float32(6)).reshape(shape))


def draw(name, p, norm):
    if norm and name.endswith((".weight", ".running_var")):
        return torch.from_numpy(np.float32(0.5) + uniform(rng(name), p.numel())).reshape(p.shape)
    scale = 0.1 if p.dim() == 1 else np.sqrt(np.float32(2) / np.float32(p[0].numel()))
    return normal(name, *p.shape) * float(np.float32(scale))


class Block(nn.Module):
    def __init__(self, i, w, stride, bottleneck):
        super().__init__()
        o = 4 * w if bottleneck else w
        sizes = [(i, w, 1, 1), (w, w, 3, stride), (w, o, 1, 1)] if bottleneck else [(i, w, 3, stride), (w, w, 3, 1)]
        self.depth = len(sizes)
        for n, (a, b, k, s) in enumerate(sizes, 1):
            setattr(self, f"conv{n}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
            setattr(self, f"bn{n}", nn.BatchNorm2d(b))
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        y = x
        for n in range(1, self.depth + 1):
            y = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(y))
            y = y.relu() if n < self.depth else y
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class ResNet(nn.Module):
    def __init__(self, blocks, bottleneck, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        i = width
        for stage, count in enumerate(blocks):
            w, layer = width << stage, []
            for n in range(count):
                layer.append(Block(i, w, 2 if n == 0 and stage else 1, bottleneck))
                i = 4 * w if bottleneck else w
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        maps = []
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
            maps.append(x)
        return maps


class Pyramid(nn.Module):
    """`body.*`, then `fpn.lateral*` and `fpn.output*`."""

    def __init__(self, blocks, bottleneck, width, channels, mode):
        super().__init__()
        self.body, self.mode = ResNet(blocks, bottleneck, width), mode
        inputs = [(4 if bottleneck else 1) * width << i for i in range(4)]
        self.fpn = nn.ModuleDict()
        for level, i in enumerate(inputs, 2):
            self.fpn[f"lateral{level}"] = nn.Conv2d(i, channels, 1)
            self.fpn[f"output{level}"] = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        maps = [self.fpn[f"lateral{level}"](c) for level, c in enumerate(self.body(x), 2)]
        for i in (2, 1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:], mode=self.mode)
        return [self.fpn[f"output{level}"](m) for level, m in enumerate(maps, 2)]


def held_to_torchvision(name, blocks, bottleneck):
    theirs, ours = getattr(torchvision.models, name)().eval(), ResNet(blocks, bottleneck, 64).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state)  # strict: the same names
    features = {}
    theirs.layer4.register_forward_hook(lambda _, __, y: features.update(y=y))
    x = normal("torchvision", 1, 3, 64, 96)
    with torch.no_grad():
        theirs(x)
        assert torch.allclose(ours(x)[3], features["y"], rtol=1e-5, atol=1e-5), name


golden = {}


def case(name, blocks, bottleneck, mode, size):
    net = Pyramid(blocks, bottleneck, 8, 16, mode)
    modules = dict(net.named_modules())
    state = net.state_dict()
    for k, p in state.items():
        if p.dtype == torch.float32:
            p.copy_(draw(k, p, isinstance(modules[k.rpartition(".")[0]], nn.BatchNorm2d)))
    x = normal(f"{name}.image", 2, 3, *size)
    with torch.no_grad():
        for level, p in enumerate(net.eval()(x[:1]), 2):
            golden[f"{name}.eval/p{level}"] = p
    # In f64: with the batch's statistics of a few values a channel, f32 rounding alone shows in the fifth digit.
    net, x = net.double(), x.double()
    maps = net.train()(x)
    for level, p in enumerate(maps, 2):
        if level > 2:
            golden[f"{name}.train/p{level}"] = p.detach().float()
    torch.autograd.backward(maps, [normal(f"{name}.d{i}", *p.shape).double() for i, p in enumerate(maps, 2)])
    for k, p in net.named_parameters():
        probe = normal(f"{k}.probe", *p.shape).double()
        values = [p.grad.norm().item(), (p.grad * probe).sum().item(), *p.shape]
        golden[f"{name}.gradient/{k}"] = torch.tensor(values)


if __name__ == "__main__":
    held_to_torchvision("resnet18", (2, 2, 2, 2), False)
    held_to_torchvision("resnet50", (3, 4, 6, 3), True)
    case("resnet18", (2, 2, 2, 2), False, "nearest", (64, 96))
    case("resnet50", (3, 4, 6, 3), True, "bilinear", (70, 90))  # sides that no stride divides
    path = Path(__file__).with_name("resnet.safetensors")
    save_file({k: v.contiguous() for k, v in golden.items()}, path)
    print(f"{path}: {len(golden)} tensors, {path.stat().st_size} bytes")
