"""Makes detectors.safetensors: what PyTorch computes for the detectors, narrow, from drawn weights.

    python tests/golden/detectors.py        (needs torch, torchvision, numpy, safetensors)
    python tests/golden/detectors.py --full FILE        as wide as the papers have them, for the test that is ignored

The networks are written out here on the ResNet of resnet.py (which is held to torchvision's). Weights and pictures are
drawn as there, bit for bit as the tests draw them. Tensors are named `case/output`; `case/faces` are some of the
`case/count` boxes that the outputs mean, those numbered `case/rows`, the offsets of each output times its `case/scale`. Of a
detector of two stages `case/refined` are some of the `case/refined_count` faces in the end, the second stage's offsets times
`case/second_scale`. tests/detector_goldens.rs holds the same cases by name.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from resnet import ResNet, draw, normal
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import roi_align

R18, R50 = ((2, 2, 2, 2), False), ((3, 4, 6, 3), True)
WIDTH, CHANNELS, SECOND_WIDTH = 8, 16, 24


class GroupSampling(ResNet):
    """Ming et al. 2019, Fig. 1 and, with dilations, Fig. 5: `fpn.lateral*`, `head.*` behind the backbone's own names."""

    def __init__(self, blocks, bottleneck, tiling, dilations=(), second=False):
        super().__init__(blocks, bottleneck, WIDTH)
        # How far proposals reach from their cells: 1.25 of the largest anchor.
        self.reach = 1.25 * 128 if second else None
        if second:
            self.second = nn.ModuleDict({"fc1": nn.Conv2d(CHANNELS, SECOND_WIDTH, 7),
                                         "fc2": nn.Conv2d(SECOND_WIDTH, SECOND_WIDTH, 1),
                                         "class": nn.Conv2d(SECOND_WIDTH, 2, 1), "box": nn.Conv2d(SECOND_WIDTH, 4, 1)})
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
        if self.reach:
            outputs["features"] = maps[0]
        return outputs

    def look_again(self, rois):
        """The second stage, fully connected: R x C x 7 x 7 to two logits and four offsets."""
        connected = lambda name, x: F.linear(x, self.second[name].weight.flatten(1), self.second[name].bias)
        y = connected("fc2", connected("fc1", rois.flatten(1)).relu()).relu()
        return connected("class", y), connected("box", y)

    def faces(self, outputs):
        scales = [16.0, 32.0, 64.0, 128.0]
        alone = len(outputs) == 8
        for i in range(len(outputs) // 2):
            several = self.tiling in ("fpn", "fpn-finest-stride")
            level = {"rpn": 4, "fpn-p3": 3, "fpn-p4": 4}.get(self.tiling, 2) + (i if several else 0)
            yield i, level, [(s, s) for s in (scales[i : i + 1] if alone else scales)], None


def conv_bn(i, o, k=3, stride=1, groups=1):
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o))


def leaky(*args):
    return conv_bn(*args).append(nn.LeakyReLU(0.1))


class Context(nn.Module):
    """SSH's (Najibi et al. 2017), as the published RetinaFace has it: windows of 3, 5 and 7."""

    def __init__(self, c, slope=0.0):
        super().__init__()
        self.slope = slope
        self.conv3X3 = conv_bn(c, c // 2)
        self.conv5X5_1, self.conv5X5_2 = conv_bn(c, c // 4), conv_bn(c // 4, c // 4)
        self.conv7X7_2, self.conv7x7_3 = conv_bn(c // 4, c // 4), conv_bn(c // 4, c // 4)

    def forward(self, x):
        act = lambda y: F.leaky_relu(y, self.slope)
        shared = act(self.conv5X5_1(x))
        seven = self.conv7x7_3(act(self.conv7X7_2(shared)))
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

    def faces(self, outputs):
        for level in range(2, 8):
            side = 4 * 2**level * (0.68 if self.deep else 1)
            yield level, level, [(side, side)], None


class Enhancement(nn.Module):
    """RefineFace's RFE, Fig. 7: convolutions by name, from `C` channels."""

    def __init__(self, c):
        super().__init__()
        for kh, kw in ((1, 5), (5, 1), (1, 3), (3, 1)):
            setattr(self, f"{kh}x{kw}", nn.ModuleDict({
                "reduce": nn.Conv2d(c, c // 4, 1), "window": nn.Conv2d(c // 4, c // 4, (kh, kw), 1, (kh // 2, kw // 2)),
                "expand": nn.Conv2d(c // 4, c // 4, 1)}))
        self.merge = nn.Conv2d(c, c, 1)

    def forward(self, x):
        branches = []
        for kernel in ("1x5", "5x1", "1x3", "3x1"):
            y = x
            for conv in getattr(self, kernel).values():
                y = conv(y).relu()
            branches.append(y)
        return x + self.merge(torch.cat(branches, 1)).relu()


class RefineFace(ResNet):
    """Zhang et al. 2019, Fig. 3: `first.*`, `fpn.*` and the subnets `class.*` and `box.*` behind the backbone's own names."""

    def __init__(self, blocks, bottleneck, regression, classification, rfe, crowd=False):
        super().__init__(blocks, bottleneck, WIDTH)
        self.crowd = crowd
        if crowd:
            for level in range(2, 8):
                setattr(self, f"context{level}", Context(CHANNELS))
        c, wide = CHANNELS, (16 if bottleneck else 8) * WIDTH
        inputs = [(4 if bottleneck else 1) * WIDTH << i for i in range(4)] + [wide, c]
        self.regression, self.classification = regression, classification
        first = {f"lateral{level}": nn.Conv2d(inputs[level - 2], c, 1) for level in self.asked()}
        if regression:
            first |= {"down6": nn.Conv2d(inputs[3], wide, 3, 2, 1), "down7": nn.Conv2d(wide, c, 3, 2, 1)}
        if first:
            self.first = nn.ModuleDict(first)
        self.fpn = nn.ModuleDict({"down6": nn.Conv2d(c, c, 3, 2, 1), "down7": nn.Conv2d(c, c, 3, 2, 1)})
        for level in range(2, 6):
            self.fpn[f"lateral{level}"] = nn.Conv2d(inputs[level - 2], c, 1)
            self.fpn[f"output{level}"] = nn.Conv2d(c, c, 3, 1, 1)
        for name, values in (("class", 1), ("box", 4)):
            values *= 1 if crowd else 2
            convs = {"conv0": nn.Conv2d(c, c, 3, 1, 1)}
            if rfe:
                convs["rfe"] = Enhancement(c)
            else:
                convs |= {"conv1": nn.Conv2d(c, c, 3, 1, 1), "conv2": nn.Conv2d(c, c, 3, 1, 1)}
            convs |= {"conv3": nn.Conv2d(c, c, 3, 1, 1), "predict": nn.Conv2d(c, values, 1)}
            setattr(self, name, nn.ModuleDict(convs))

    def asked(self):
        return [level for level in range(2, 8) if (self.classification if level < 5 else self.regression)]

    def subnet(self, name, x):
        for part, conv in getattr(self, name).items():
            x = conv(x) if part in ("rfe", "predict") else conv(x).relu()
        return x

    def forward(self, x):
        c, outputs = list(super().forward(x)), {}
        if self.regression:
            c.append(self.first["down6"](c[3]).relu())
            c.append(self.first["down7"](c[4]).relu())
        for level in self.asked():
            name = "class" if level < 5 else "box"
            outputs[f"{name}{level}.1"] = self.subnet(name, self.first[f"lateral{level}"](c[level - 2]))
        sums = [self.fpn[f"lateral{level}"](c[level - 2]) for level in range(2, 6)]
        for i in reversed(range(3)):
            sums[i] = sums[i] + F.interpolate(sums[i + 1], sums[i].shape[2:], mode="bilinear")
        p = [self.fpn[f"output{level}"](s) for level, s in zip(range(2, 6), sums)]
        p.append(self.fpn["down6"](sums[3]))
        p.append(self.fpn["down7"](p[4]))
        for level, m in zip(range(2, 8), p):
            m = getattr(self, f"context{level}")(m) if self.crowd else m
            for name in ("class", "box"):
                outputs[f"{name}{level}"] = self.subnet(name, m)
        return outputs

    def faces(self, outputs):
        for level in range(2, 8):
            before = outputs.get(f"{'class' if level < 5 else 'box'}{level}.1")
            if self.crowd:
                yield level, level, [(4 * 0.68 * 2**level,) * 2], before
                continue
            sides = [2 * 2**level, 8**0.5 * 2**level]
            yield level, level, [(s / 1.25**0.5, s * 1.25**0.5) for s in sides], before


class RetinaFace(nn.Module):
    """Deng et al. 2019 as published for ResNet-50: `body.*`, `fpn.*`, `ssh{1..3}.*`, three heads a level."""

    def __init__(self, blocks, bottleneck):
        super().__init__()
        c, e = CHANNELS, 4 if bottleneck else 1
        self.body = ResNet(blocks, bottleneck, WIDTH)
        one = lambda i: conv_bn(i, c, 1)
        self.fpn = nn.ModuleDict({f"output{i}": one(e * WIDTH << i) for i in (1, 2, 3)}
                                 | {f"merge{i}": conv_bn(c, c) for i in (1, 2)})
        self.slope = 0.1 if c <= 64 else 0.0
        for i in (1, 2, 3):
            setattr(self, f"ssh{i}", Context(c, self.slope))
        for name, values in (("Class", 2), ("Bbox", 4), ("Landmark", 10)):
            heads = [nn.ModuleDict({"conv1x1": nn.Conv2d(c, 2 * values, 1)}) for _ in range(3)]
            setattr(self, f"{name}Head", nn.ModuleList(heads))

    def forward(self, x):
        c = self.body(x)
        act = lambda y: F.leaky_relu(y, self.slope)
        p = [act(self.fpn[f"output{i}"](c[i])) for i in (1, 2, 3)]
        for i in (1, 0):
            up = F.interpolate(p[i + 1], p[i].shape[2:], mode="nearest")
            p[i] = act(self.fpn[f"merge{i + 1}"](p[i] + up))
        outputs = {}
        for i, m in enumerate(p):
            m = getattr(self, f"ssh{i + 1}")(m)
            for name, output in (("Class", "class"), ("Bbox", "box"), ("Landmark", "landmark")):
                outputs[f"{output}{i}"] = getattr(self, f"{name}Head")[i]["conv1x1"](m)
        return outputs

    def apart(self, outputs):
        """With the box code's variances."""
        variances = torch.tensor([0.1, 0.1, 0.2, 0.2]).repeat(2)[None, :, None, None]
        return {k: y * variances if k.startswith("box") else y for k, y in outputs.items()}

    def faces(self, outputs):
        for i in range(3):
            yield i, 3 + i, [(s, s) for s in (16.0 * 4**i, 32.0 * 4**i)], None


def separable(i, o, stride=1):
    """A block of MobileNet-V1 (Howard et al. 2017)."""
    return nn.Sequential(*leaky(i, i, 3, stride, i), *leaky(i, o, 1))


class Pyramid(nn.Module):
    """farface-nano and, with `plain` blocks behind the pyramid, farface-small: `body.*`, `fpn.*`, and `smooth*`, `head*`,
    `predict*` of the levels of stride 8 to 64. `blocks`: channels of the backbone's blocks at strides 2 to 32."""

    ANCHORS = {3: (8.0, 11.3, 16.0, 22.6), 4: (32.0, 45.3), 5: (64.0, 90.5), 6: (128.0, 181.0, 256.0, 362.0)}

    def __init__(self, plain, first, blocks):
        super().__init__()
        stages = [[leaky(3, first, 3, 2)], [], []]
        i = first
        for stride, channels in enumerate(blocks, 1):
            for k, o in enumerate(channels):
                stages[max(stride - 3, 0)].append(separable(i, o, 2 if stride > 1 and k == 0 else 1))
                i = o
        self.body = nn.ModuleDict({f"stage{k}": nn.Sequential(*stage) for k, stage in enumerate(stages, 1)})
        c, (n3, n4, n5) = CHANNELS, (b[-1] for b in blocks[2:])
        lateral = lambda i: leaky(i, c, 1)
        self.fpn = nn.ModuleDict({"lateral3": lateral(n3), "lateral4": lateral(n4), "lateral5": lateral(n5),
                                  "down6": separable(n5, c, 2)})
        block = lambda: (leaky if plain else separable)(c, c)
        for level, anchors in self.ANCHORS.items():
            setattr(self, f"smooth{level}", block())
            setattr(self, f"head{level}", nn.Sequential(block()))
            setattr(self, f"predict{level}", nn.Conv2d(c, 5 * len(anchors), 1))

    def forward(self, x):
        c3 = self.body["stage1"](x)
        c4 = self.body["stage2"](c3)
        c5 = self.body["stage3"](c4)
        p = {6: self.fpn["down6"](c5)}
        for level, c in ((5, c5), (4, c4), (3, c3)):
            fine = self.fpn[f"lateral{level}"](c)
            p[level] = fine + F.interpolate(p[level + 1], fine.shape[2:], mode="nearest")
        through = lambda level: getattr(self, f"head{level}")(getattr(self, f"smooth{level}")(p[level]))
        return {f"predict{level}": getattr(self, f"predict{level}")(through(level)) for level in self.ANCHORS}

    def apart(self, outputs):
        """Logits and, with the box code's variances, offsets."""
        maps = {}
        for level, anchors in self.ANCHORS.items():
            y, a = outputs[f"predict{level}"], len(anchors)
            variances = torch.tensor([0.1, 0.1, 0.2, 0.2]).repeat(a)[None, :, None, None]
            maps |= {f"class{level}": y[:, :a], f"box{level}": y[:, a:] * variances}
        return maps

    def faces(self, outputs):
        for level, anchors in self.ANCHORS.items():
            yield level, level, [(s / 1.25**0.5, s * 1.25**0.5) for s in anchors], None


class Vgg(nn.Module):
    """torchvision's VGG16 with WIDTH for 64 channels, halving rounded up: conv3_3, conv4_3, conv5_3."""

    def __init__(self):
        super().__init__()
        layers, i = [], 3
        for stage, (convs, c) in enumerate(((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))):
            layers += [nn.MaxPool2d(2, 2, ceil_mode=True)] if stage else []
            for _ in range(convs):
                layers += [nn.Conv2d(i, c * WIDTH, 3, 1, 1), nn.ReLU()]
                i = c * WIDTH
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        maps = {}
        for i, layer in enumerate(self.features):
            x = layer(x)
            maps[i] = x
        return [maps[15], maps[22], maps[29]]


def hr(backbone, inputs, layers):
    """Hu and Ramanan 2017, section 3: `score_res{2..5}.*` and `score{4,5}_upsample.weight` behind the backbone's own names."""

    class Hr(backbone):
        def __init__(self, *args):
            super().__init__(*args)
            for layer in layers:
                setattr(self, f"score_res{layer}", nn.Conv2d(inputs[layer - 2], 125, 1, 2 if layer == 2 else 1))
            for layer in range(4, max(layers) + 1):
                setattr(self, f"score{layer}_upsample", nn.ConvTranspose2d(125, 125, 4, 2, 1, groups=125, bias=False))

        def forward(self, x):
            c, y = super().forward(x), 0
            size = lambda layer: c[layer - 2].shape[2:]
            for layer in range(max(layers), 1, -1):
                if layer in layers:
                    scores = getattr(self, f"score_res{layer}")(c[layer - 2])
                    y = y + (scores[:, :, : size(3)[0], : size(3)[1]] if layer == 2 else scores)
                if layer > 3:
                    h, w = size(layer - 1)
                    y = getattr(self, f"score{layer}_upsample")(y)[:, :, :h, :w]
            return {"scores": y}

        def apart(self, outputs):
            """What a level of scale 1 asks: rows 5 to 12 of the published templates."""
            y = outputs["scores"]
            logits, offsets = y[:, :25], y[:, 25:].unflatten(1, (4, 25))
            return {"class0": logits[:, 4:12], "box0": offsets[:, :, 4:12].transpose(1, 2).flatten(1, 2)}

        def faces(self, outputs):
            halves = [(40.5, 54.5), (34.5, 43.5), (28.5, 38.0), (25.6589, 31.3221), (21.6137, 27.5977), (20.0, 22.5),
                      (17.5, 25.5), (16.328, 20.8856)]
            yield 0, 3, [(2 * w, 2 * h) for w, h in halves], None

    return Hr


def code(anchor, t):
    """Boxes of offsets `t` [..., 4] on anchors cx, cy, w, h."""
    center, size = anchor[..., :2] + t[..., :2] * anchor[..., 2:], anchor[..., 2:] * t[..., 2:].exp()
    return torch.cat([center, size], -1)


def decoded(net, outputs, threshold, first):
    """Faces x1 y1 x2 y2 score above the threshold of each level or branch, in the order row, column, anchor."""
    levels = []
    for i, level, sizes, before in net.faces(outputs):
        cells = lambda y, values: y[0].permute(1, 2, 0).unflatten(-1, (len(sizes), values))  # H W A values
        logits = outputs[f"class{i}"]
        logits = cells(logits, logits.shape[1] // len(sizes))
        logit = logits[..., 1] - logits[..., 0] if logits.shape[-1] == 2 else logits[..., 0]
        h, w = logit.shape[:2]
        y, x = torch.meshgrid((torch.arange(h) + 0.5) * 2**level, (torch.arange(w) + 0.5) * 2**level, indexing="ij")
        anchor = torch.stack([x, y], -1)[:, :, None].expand(h, w, len(sizes), 2)
        anchor = torch.cat([anchor, torch.tensor(sizes).expand(h, w, len(sizes), 2)], -1)
        kept = logit.sigmoid() > threshold
        if before is not None and before.shape[1] == len(sizes):
            kept &= cells(before, 1)[..., 0].sigmoid() > first
        elif before is not None:
            anchor = code(anchor, cells(before, 4))
        box = code(anchor, cells(outputs[f"box{i}"], 4))
        corners = torch.cat([box[..., :2] - box[..., 2:] / 2, box[..., :2] + box[..., 2:] / 2], -1)
        reach = getattr(net, "reach", None)
        if reach:
            center = anchor[..., :2]
            corners = torch.cat([torch.maximum(corners[..., :2], center - reach),
                                 torch.minimum(corners[..., 2:], center + reach)], -1)
        levels.append(torch.cat([corners, logit.sigmoid()[..., None]], -1)[kept])
    return levels


THRESHOLD, FIRST, STORED = 0.3, 0.5, 8
golden = {}


def case(name, net, size, every=True):
    """`every`: each level has to find something."""
    modules, state = dict(net.named_modules()), net.state_dict()
    for k, p in state.items():
        if p.dtype == torch.float32:
            p.copy_(draw(k, p, isinstance(modules[k.rpartition(".")[0]], nn.BatchNorm2d)))
    with torch.no_grad():
        outputs = net.eval()(normal(f"{name}.image", 1, 3, *size))
        golden.update({f"{name}/{output}": y for output, y in outputs.items()})
        outputs = net.apart(outputs) if hasattr(net, "apart") else outputs
        # Drawn weights make offsets of any size, of which exp would make nothing: to decode, the largest of a map is 1.
        boxes = [k for k in outputs if k.startswith("box")]
        scale = torch.stack([1 / outputs[k].abs().max() for k in boxes])
        outputs |= {k: outputs[k] * s for k, s in zip(boxes, scale)}
        levels = decoded(net, outputs, THRESHOLD, FIRST)
        if every and any(len(level) == 0 for level in levels):
            raise SystemExit(f"{name}: a level without faces, {[len(level) for level in levels]}")
        found = torch.cat(levels)
        # Of every level the last ones.
        ends = torch.tensor([len(level) for level in levels]).cumsum(0)
        rows = sorted({int(end) - 1 - i for end, level in zip(ends, levels) for i in range(min(STORED, len(level)))})
        golden[f"{name}/rows"] = torch.tensor(rows, dtype=torch.float32)
        golden[f"{name}/faces"] = found[rows]
        golden[f"{name}/scale"] = scale
        golden[f"{name}/size"] = torch.tensor([float(v) for v in size])
        golden[f"{name}/count"] = torch.tensor([float(len(found))])
        if getattr(net, "reach", None):
            refined(name, net, outputs)


def refined(name, net, outputs):
    """Both stages: proposals above 0.05, the mean of the scores, boxes moved with variances 0.1 and 0.2."""
    proposals = torch.cat(decoded(net, outputs, 0.05, FIRST))
    boxes, first = proposals[:, :4], proposals[:, 4]
    boxes, first = [v[(boxes[:, 2:] > boxes[:, :2]).all(1)] for v in (boxes, first)]
    rois = roi_align(outputs["features"], [boxes], 7, spatial_scale=0.25, sampling_ratio=2, aligned=True)
    logits, offsets = net.look_again(rois)
    for key, value in (("rois", rois), ("second.class", logits), ("second.box", offsets)):
        golden[f"{name}/{key}"] = value[:40].reshape(len(value[:40]), value.shape[1], *(value.shape[2:] or (1, 1)))
    scale = 1 / offsets.abs().max()
    anchor = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], -1)
    box = code(anchor, offsets * scale * torch.tensor([0.1, 0.1, 0.2, 0.2]))
    score = (first + logits.softmax(1)[:, 1]) / 2
    if ((score - THRESHOLD).abs() < 1e-5).any():
        raise SystemExit(f"{name}: a score at the threshold")
    found = torch.cat([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2, score[:, None]], -1)[score > THRESHOLD]
    found = found[found[:, 4].argsort(descending=True)]
    golden[f"{name}/refined"] = found[:: max(1, len(found) // 24)]
    golden[f"{name}/refined_count"] = torch.tensor([float(len(found)), float(len(proposals))])
    golden[f"{name}/second_scale"] = scale[None]


def narrow():
    for tiling in ("rpn", "fpn", "fpn-finest", "fpn-finest-stride", "fpn-p3", "fpn-p4"):
        case(f"{tiling}-r18", GroupSampling(*R18, tiling), (54, 70))
    case("fpn-finest-dc-r50", GroupSampling(*R50, "fpn-finest", (1, 2, 4, 8)), (48, 64))
    case("fpn-finest-rcnn-r18", GroupSampling(*R18, "fpn-finest", second=True), (64, 96))
    case("hambox-baseline-r18", HamBox(*R18, False, False, 5), (101, 131))
    case("hambox-fpn-r18", HamBox(*R18, True, True, 7), (101, 131))
    case("hambox-r50", HamBox(*R50, True, True, 5), (128, 160))
    case("refineface-baseline-r18", RefineFace(*R18, False, False, False), (101, 131))
    case("refineface-str-r18", RefineFace(*R18, True, False, False), (101, 131))
    case("refineface-stc-r18", RefineFace(*R18, False, True, False), (101, 131))
    case("refineface-r18", RefineFace(*R18, True, True, True), (101, 131))
    case("refineface-r50", RefineFace(*R50, True, True, True), (128, 160))
    case("hr-r18", hr(ResNet, [8, 16, 32, 64], [3, 4])(*R18, WIDTH), (101, 77))
    case("hr-res2-res3-res4-res5-r50", hr(ResNet, [32, 64, 128, 256], [2, 3, 4, 5])(*R50, WIDTH), (70, 83))
    case("hr-full-vgg16", hr(Vgg, [32, 64, 64], [3, 4])(), (53, 85))
    case("hr-res2-res4-vgg16", hr(Vgg, [32, 64, 64], [2, 4])(), (53, 75))
    case("retinaface-r50", RetinaFace(*R50), (70, 99))
    case("farface-crowd-r50", RefineFace(*R50, True, True, True, True), (128, 160))
    case("farface-nano", Pyramid(False, 6, [[], [12, 20], [20, 24], [28, 28, 32], [40]]), (101, 131))
    case("farface-small", Pyramid(True, 6, [[], [12, 20], [20, 24], [28, 28, 32], [40]]), (101, 131))


def full():
    global WIDTH, CHANNELS
    WIDTH = 64
    depths = {"18": R18, "50": R50, "101": ((3, 4, 23, 3), True), "152": ((3, 8, 36, 3), True)}
    for depth, blocks in depths.items():
        CHANNELS = 128 if depth == "18" else 256
        case(f"fpn-finest-dc-r{depth}", GroupSampling(*blocks, "fpn-finest", (1, 2, 4, 8)), (96, 128), False)
        CHANNELS = 256
        case(f"refineface-r{depth}", RefineFace(*blocks, True, True, True), (128, 160), False)
        inputs = [WIDTH * (4 if blocks[1] else 1) << i for i in range(4)]
        if depth in ("50", "101"):
            case(f"hr-r{depth}", hr(ResNet, inputs, [3, 4])(*blocks, WIDTH), (101, 77), False)
        if depth == "50":
            case(f"hr-res2-res3-res4-res5-r{depth}", hr(ResNet, inputs, [2, 3, 4, 5])(*blocks, WIDTH), (101, 77), False)
            case(f"hambox-r{depth}", HamBox(*blocks, True, True, 5), (128, 160), False)
            case(f"farface-crowd-r{depth}", RefineFace(*blocks, True, True, True, True), (128, 160), False)
            case(f"retinaface-r{depth}", RetinaFace(*blocks), (101, 131), False)
    case("hr-vgg16", hr(Vgg, [256, 512, 512], [3, 4])(), (53, 85), False)


if __name__ == "__main__":
    path = Path(__file__).with_name("detectors.safetensors")
    if sys.argv[1:2] == ["--full"]:
        path = Path(sys.argv[2])
        full()
    else:
        narrow()
    save_file({k: v.contiguous() for k, v in golden.items()}, path)
    print(f"{path}: {len(golden)} tensors, {path.stat().st_size} bytes")
