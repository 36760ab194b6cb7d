"""Makes detectors.safetensors: what PyTorch computes for the papers' detectors, narrow, from drawn weights.

    python tests/golden/detectors.py        (needs torch, torchvision, numpy, safetensors)

The networks are written out here on the ResNet of resnet.py (which is held to torchvision's). Weights and pictures are
drawn as there, bit for bit as the tests draw them. Tensors are named `case/output`; tests/detector_goldens.rs holds the
same cases by name.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from resnet import ResNet, draw, normal
from safetensors.torch import save_file
from torch import nn

R18, R50 = ((2, 2, 2, 2), False), ((3, 4, 6, 3), True)
WIDTH, CHANNELS = 8, 16


class GroupSampling(ResNet):
    """Ming et al. 2019, Fig. 1 and, with dilations, Fig. 5: `fpn.lateral*`, `head.*` behind the backbone's own names."""

    def __init__(self, blocks, bottleneck, tiling, dilations=()):
        super().__init__(blocks, bottleneck, WIDTH)
        inputs = [(4 if bottleneck else 1) * WIDTH << i for i in range(4)]
        self.tiling = tiling
        self.finest = {"rpn": None, "fpn-p3": 3, "fpn-p4": 4}.get(tiling, 2)
        head_in = inputs[2] if tiling == "rpn" else CHANNELS
        if self.finest:
            self.fpn = nn.ModuleDict(
                {f"lateral{level}": nn.Conv2d(inputs[level - 2], CHANNELS, 1) for level in range(self.finest, 6)})
        anchors = 1 if tiling in ("fpn", "fpn-finest-stride") else 4
        if dilations:
            self.head = nn.ModuleDict({f"branch{i}": self.branch(head_in, 1, d) for i, d in enumerate(dilations)})
        else:
            self.head = self.branch(head_in, anchors, 1)

    @staticmethod
    def branch(i, anchors, d):
        return nn.ModuleDict({"conv": nn.Conv2d(i, CHANNELS, 3, 1, d, d),
                              "class": nn.Conv2d(CHANNELS, 2 * anchors, 1),
                              "box": nn.Conv2d(CHANNELS, 4 * anchors, 1)})

    def forward(self, x):
        c = super().forward(x)
        if self.tiling == "rpn":
            maps = [c[2]]
        else:
            maps = [self.fpn[f"lateral{level}"](c[level - 2]) for level in range(self.finest, 6)]
            for i in reversed(range(len(maps) - 1)):
                maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:], mode="bilinear")
            if self.tiling == "fpn-finest-stride":
                maps = [maps[0][:, :, :: 1 << i, :: 1 << i] for i in range(4)]
            elif self.tiling != "fpn":
                maps = maps[:1]
        branches = "conv" not in self.head
        pairs = [(maps[0], self.head[f"branch{i}"]) for i in range(4)] if branches else [(m, self.head) for m in maps]
        outputs = {}
        for i, (m, head) in enumerate(pairs):
            y = head["conv"](m).relu()
            outputs[f"class{i}"], outputs[f"box{i}"] = head["class"](y), head["box"](y)
        return outputs


def conv_bn(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o))


class Context(nn.Module):
    """SSH's (Najibi et al. 2017), as the published RetinaFace has it: windows of 3, 5 and 7."""

    def __init__(self, c):
        super().__init__()
        self.conv3X3 = conv_bn(c, c // 2)
        self.conv5X5_1, self.conv5X5_2 = conv_bn(c, c // 4), conv_bn(c // 4, c // 4)
        self.conv7X7_2, self.conv7x7_3 = conv_bn(c // 4, c // 4), conv_bn(c // 4, c // 4)

    def forward(self, x):
        leaky = lambda y: F.leaky_relu(y, 0.1)
        shared = leaky(self.conv5X5_1(x))
        seven = self.conv7x7_3(leaky(self.conv7X7_2(shared)))
        return torch.cat([self.conv3X3(x), self.conv5X5_2(shared), seven], 1).relu()


class HamBox(ResNet):
    """Liu et al. 2020: `fpn.*`, `context{2..7}.*`, and the heads `class.*` and `box.*` behind the backbone's own names."""

    def __init__(self, blocks, bottleneck, context, deep, top):
        super().__init__(blocks, bottleneck, WIDTH)
        c = CHANNELS
        inputs = [(4 if bottleneck else 1) * WIDTH << i for i in range(4)] + [c, c]
        self.fpn = nn.ModuleDict({"down6": nn.Conv2d(inputs[3], c, 3, 2, 1), "down7": nn.Conv2d(c, c, 3, 2, 1)})
        for level in range(2, 8):
            self.fpn[f"lateral{level}"] = nn.Conv2d(inputs[level - 2], c, 1)
            self.fpn[f"output{level}"] = nn.Conv2d(c, c, 3, 1, 1)
            if context:
                setattr(self, f"context{level}", Context(c))
        for name, values in (("class", 1), ("box", 4)):
            convs = {f"conv{i}": nn.Conv2d(c, c, 3, 1, 1) for i in range(4 * deep)}
            setattr(self, name, nn.ModuleDict({**convs, "predict": nn.Conv2d(c, values, 3, 1, 1)}))
        self.context, self.deep, self.top = context, deep, top

    def forward(self, x):
        c = list(super().forward(x))
        c.append(self.fpn["down6"](c[3]).relu())
        c.append(self.fpn["down7"](c[4]).relu())
        sums = [self.fpn[f"lateral{level}"](c[level - 2]) for level in range(2, 8)]
        for i in reversed(range(self.top - 2)):
            sums[i] = sums[i] + F.interpolate(sums[i + 1], sums[i].shape[2:], mode="bilinear")
        outputs = {}
        for level, s in zip(range(2, 8), sums):
            p = self.fpn[f"output{level}"](s)
            if self.context:
                p = getattr(self, f"context{level}")(p)
            for name in ("class", "box"):
                head, y = getattr(self, name), p
                for i in range(4 * self.deep):
                    y = head[f"conv{i}"](y).relu()
                outputs[f"{name}{level}"] = head["predict"](y)
        return outputs


golden = {}


def case(name, net, size):
    modules, state = dict(net.named_modules()), net.state_dict()
    for k, p in state.items():
        if p.dtype == torch.float32:
            p.copy_(draw(k, p, isinstance(modules[k.rpartition(".")[0]], nn.BatchNorm2d)))
    with torch.no_grad():
        for output, y in net.eval()(normal(f"{name}.image", 1, 3, *size)).items():
            golden[f"{name}/{output}"] = y


if __name__ == "__main__":
    for tiling in ("rpn", "fpn", "fpn-finest", "fpn-finest-stride", "fpn-p3", "fpn-p4"):
        case(f"{tiling}-r18", GroupSampling(*R18, tiling), (54, 70))
    case("fpn-finest-dc-r50", GroupSampling(*R50, "fpn-finest", (1, 2, 4, 8)), (48, 64))
    case("hambox-baseline-r18", HamBox(*R18, False, False, 5), (101, 131))
    case("hambox-fpn-r18", HamBox(*R18, True, True, 7), (101, 131))
    case("hambox-r50", HamBox(*R50, True, True, 5), (128, 160))
    path = Path(__file__).with_name("detectors.safetensors")
    save_file({k: v.contiguous() for k, v in golden.items()}, path)
    print(f"{path}: {len(golden)} tensors, {path.stat().st_size} bytes")
