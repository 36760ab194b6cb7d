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
    path = Path(__file__).with_name("detectors.safetensors")
    save_file({k: v.contiguous() for k, v in golden.items()}, path)
    print(f"{path}: {len(golden)} tensors, {path.stat().st_size} bytes")
