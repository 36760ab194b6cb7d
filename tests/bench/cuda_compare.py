#!/usr/bin/env python3
"""Our networks on a CUDA device against PyTorch: same weights, same input, interleaved in one run, medians by the device's clock.

    python3 tests/bench/cuda_compare.py --ours cuda_worker FOLDER [--batches 1 8] [--seconds 3] [--compile]
    python3 tests/bench/cuda_compare.py --ours cuda_worker --train FOLDER [--batches 8] [--seconds 3] [--compile]
    python3 tests/bench/cuda_compare.py --check FOLDER          # no device: PyTorch on the CPU computes what the worker has printed

FOLDER has, for every network, `NAME@WxH.json` and `.safetensors` as `cuda_worker --describe` writes them. PyTorch runs in f16,
channels_last, with cudnn.benchmark, batch normalisation folded into the convolutions before it; once replayed as a CUDA graph, and
with --compile once by torch.compile (max-autotune). Ratios are ours / the faster of both: below 1 ours is faster.

Floor: multiply-adds of all convolutions over the rate of torch.mm of 8192x8192 in f16, or the bytes of their inputs, outputs and
weights, each moved once, over the rate of a copy within the device's memory, whichever takes longer; both measured in the same run. What
is fused otherwise (sums with enlarged maps, pooling) is not counted. "Share" is the floor over the median.

--train times steps of a training in bf16, by the wall clock: forward with the batch's statistics, backward of half the outputs' mean
squares, SGD with momentum, the gradients' norm clipped and read. PyTorch: autocast, channels_last, cudnn.benchmark, once as it is
and with --compile once compiled; its pictures lie on the device, ours come up with every step. --check takes NAME@WxH.train-prints too,
of steps in f32.
"""
import argparse
import functools
import json
import pathlib
import statistics
import struct
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

# Largest difference of an output's prints, relative to its mean.
TOLERANCE = 3e-2


def load(path):
    """Tensors of a safetensors file of f32."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            data = np.frombuffer(raw[8 + size + begin:8 + size + end], dtype=np.float32).reshape(entry["shape"])
            tensors[name] = torch.from_numpy(data.copy())
    return tensors


class Net(torch.nn.Module):
    """A network as described; batch normalisations behind convolutions folded in, or, to be trained, by the batch's statistics."""

    def __init__(self, stem, train=False):
        super().__init__()
        described = json.loads(stem.with_name(stem.name + ".json").read_text())
        weights = load(stem.with_name(stem.name + ".safetensors"))
        self.nodes, self.outputs = described["nodes"], described["outputs"]
        readers = [0] * len(self.nodes)
        for node in self.nodes:
            for i in node["inputs"]:
                readers[i] += 1
        for i in self.outputs:
            readers[i] += 1
        self.folded, self.trains, shared = {}, train, {}
        for i, node in enumerate(self.nodes):
            params = [weights[name] for name in node["params"]]
            if train:
                # Levels may share a parameter.
                own = [shared.setdefault(name, torch.nn.Parameter(p)) for name, p in zip(node["params"], params)]
                for slot, p in zip("wb", own[:2]):
                    setattr(self, f"{slot}{i}", p)
            elif node["kind"] == "batchnorm":
                scale, shift, mean, var = params
                factor = scale / torch.sqrt(var + node["layer"]["eps"])
                shift = shift - mean * factor
                before = node["inputs"][0]
                kind = self.nodes[before]["kind"]
                if kind in ("conv2d", "depthwise") and readers[before] == 1:
                    weight = getattr(self, f"w{before}")
                    bias = getattr(self, f"b{before}", torch.zeros_like(shift))
                    self.put(before, weight * factor.view(-1, 1, 1, 1), bias * factor + shift)
                    self.folded[i] = before
                else:
                    self.put(i, factor.view(1, -1, 1, 1), shift.view(1, -1, 1, 1))
            elif params:
                self.put(i, params[0], params[1] if len(params) > 1 else None)

    def put(self, i, weight, bias):
        self.register_buffer(f"w{i}", weight)
        if bias is not None:
            self.register_buffer(f"b{i}", bias)

    def work(self, image):
        """Operations of the convolutions, and values that they move if each is moved once."""
        total = [0, 0]
        layer = self.layer

        def counted(i, node, x):
            y = layer(i, node, x)
            if "conv" in node["kind"] or node["kind"] == "depthwise":
                weight = getattr(self, f"w{i}")
                outputs = x[0] if node["kind"] == "conv_transpose2d" else y
                total[0] += 2 * outputs.numel() * weight[0].numel()
                total[1] += x[0].numel() + y.numel() + weight.numel()
            return y
        self.layer = counted
        self(image)
        self.layer = layer
        return total

    def forward(self, image):
        values = []
        for i, node in enumerate(self.nodes):
            x = [values[k] for k in node["inputs"]]
            values.append(image if node["kind"] == "input" else self.layer(i, node, x))
        return [values[i] for i in self.outputs]

    def layer(self, i, node, x):
        kind, p = node["kind"], node["layer"]
        weight, bias = getattr(self, f"w{i}", None), getattr(self, f"b{i}", None)
        if kind in ("conv2d", "depthwise"):
            y, (top, left, bottom, right) = x[0], p["padding"]
            if (top, left) == (bottom, right):
                return F.conv2d(y, weight, bias, p["stride"], (top, left), p["dilation"], p["groups"])
            return F.conv2d(F.pad(y, (left, right, top, bottom)), weight, bias, p["stride"], 0, p["dilation"], p["groups"])
        if kind == "conv_transpose2d":
            return F.conv_transpose2d(x[0], weight, bias, p["stride"], p["padding"][:2], groups=p["groups"])
        if kind == "batchnorm" and self.trains:
            return F.batch_norm(x[0], None, None, weight, bias, training=True, eps=p["eps"])
        if kind == "batchnorm":
            return x[0] if i in self.folded else x[0] * weight + bias
        if kind == "activation":
            if "slope" in p:
                return F.relu(x[0]) if p["slope"] == 0 else F.leaky_relu(x[0], p["slope"])
            if "sigmoid" in p:
                return torch.sigmoid(x[0])
            n, c, h, w = x[0].shape
            return F.softmax(x[0].view(n, c // p["softmax"], p["softmax"], h, w), 2).view(n, c, h, w)
        if kind == "max_pool":
            top, left, bottom, right = p["padding"]
            if (top, left) == (bottom, right):
                return F.max_pool2d(x[0], p["kernel"], p["stride"], (top, left))
            return F.max_pool2d(F.pad(x[0], (left, right, top, bottom), value=-65504.0), p["kernel"], p["stride"])
        if kind == "global_avg_pool":
            return x[0].mean((2, 3), keepdim=True)
        if kind == "upsample":
            size = [x[0].shape[2 + a] * p["factor"][a] for a in (0, 1)] if "factor" in p else x[1].shape[2:]
            return F.interpolate(x[0], size=size, mode=p["mode"])
        if kind == "add":
            return x[0] + x[1]
        if kind == "concat":
            return torch.cat(x, 1)
        if kind == "crop":
            h, w = x[1].shape[2:]
            return x[0][:, :, p["top"]:p["top"] + h, p["left"]:p["left"] + w]
        raise ValueError(f"{kind} is not compared")


def pictures(batch, height, width):
    values = (np.arange(batch * height * width * 3, dtype=np.int64) * 7919 % 255).astype(np.float32)
    return torch.from_numpy(((values - 100) / 128).reshape(batch, height, width, 3).transpose(0, 3, 1, 2).copy())


def prints(outputs):
    all_prints = []
    for o in outputs:
        o = o.detach().double().cpu().contiguous().numpy()
        all_prints += [np.abs(o).mean(), (o.ravel() * np.cos(np.arange(o.size) * 0.37)).mean()]
    return all_prints


def agree(name, ours, theirs):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not abs(a - b) <= TOLERANCE * max(abs(theirs[i // 2 * 2]), 1e-3):
            sys.exit(f"error: {name}: output {i // 2} differs: ours {a}, PyTorch {b}")


def agree_of_training(name, ours, outputs, net):
    agree(name, ours[:-1], prints(outputs))
    theirs = gradient(net)
    if not abs(ours[-1] - theirs) <= 5e-2 * theirs:
        sys.exit(f"error: {name}: the mean gradient differs: ours {ours[-1]}, PyTorch {theirs}")


def size_of(stem):
    width, height = stem.name.split("@")[1].split("x")
    return int(width), int(height)


class Worker:
    """Our side: speaks the lines that cuda_worker.rs documents."""

    def __init__(self, path, stem, batch, train=False):
        width, height = size_of(stem)
        name = stem.name.split("@")[0]
        size = [name, str(width), str(height), str(batch)]
        command = [path, "--train", *size, "bf16"] if train else [path, *size, "f16"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        line = self.process.stdout.readline()
        if not line.startswith("ready"):
            sys.exit(f"error: {' '.join(command)} did not start")
        self.prints = json.loads(line.split(None, 2)[2])

    def __call__(self, runs):
        self.process.stdin.write(f"{runs}\n")
        self.process.stdin.flush()
        return [float(t) for t in self.process.stdout.readline().split()]

    def close(self):
        self.process.stdin.write("q\n")
        self.process.stdin.flush()
        self.process.wait()


def replayed(net, x):
    """PyTorch's network as a CUDA graph: (function that times N runs, outputs)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            net(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = net(x)
    return timer(graph.replay), outputs


def timer(run):
    def time_runs(count):
        times = []
        for _ in range(count):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            run()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after))
        return times
    return time_runs


def loss(outputs):
    return sum(0.5 * o.float().square().mean() for o in outputs)


def gradient(net):
    """Mean magnitude."""
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).abs().double().mean().item()


def stepper(net, forward, x):
    """A step of a training as the worker's, and its outputs."""
    rule = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)

    def step():
        rule.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            outputs = forward(x)
        loss(outputs).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0).item()
        rule.step()
        return outputs

    def time_steps(count):
        times = []
        for _ in range(count):
            began = time.perf_counter()
            step()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
        return times
    return time_steps


def compare_training(stem, batch, args):
    torch.set_grad_enabled(True)
    width, height = size_of(stem)
    net = Net(stem, train=True).cuda().to(memory_format=torch.channels_last)
    x = pictures(batch, height, width).cuda().to(memory_format=torch.channels_last)
    ours = Worker(args.ours, stem, batch, train=True)
    with torch.autocast("cuda", torch.bfloat16):
        outputs = net(x)
    loss(outputs).backward()
    agree_of_training(stem.name, ours.prints, outputs, net)
    engines = {"farface": ours, "PyTorch": stepper(net, net, x)}
    if args.compile:
        engines["PyTorch, compiled"] = stepper(net, torch.compile(net), x)
    for run in engines.values():
        run(3)
    report(stem, batch, engines, args.seconds)


@functools.cache
def rates():
    """Operations and bytes a millisecond: of a product of matrices in f16, of a copy, read and written."""
    a, b = (torch.rand(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    large = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(large)
    median = lambda run: statistics.median(timer(run)(20)[5:])
    return 2 * 8192**3 / median(lambda: torch.mm(a, b)), 2 * large.numel() / median(lambda: to.copy_(large))


def compare(stem, batch, args):
    width, height = size_of(stem)
    net = Net(stem).half().cuda().to(memory_format=torch.channels_last)
    x = pictures(batch, height, width).half().cuda().to(memory_format=torch.channels_last)
    ours = Worker(args.ours, stem, batch)
    replay, outputs = replayed(net, x)
    engines = {"farface": ours, "PyTorch, CUDA graph": replay}
    torch.cuda.synchronize()
    replay(1)
    agree(stem.name, ours.prints, prints(outputs))
    if args.compile:
        compiled = torch.compile(net, mode="max-autotune")
        for _ in range(3):
            compiled(x)
        engines["PyTorch, max-autotune"] = timer(lambda: compiled(x))
    (operations, values), (rate, bandwidth) = net.work(x), rates()
    report(stem, batch, engines, args.seconds, max(operations / rate, 2 * values / bandwidth))


def report(stem, batch, engines, seconds, floor=None):
    times = {e: [] for e in engines}
    end = time.time() + seconds * len(engines)
    while time.time() < end or len(times["farface"]) < 50:
        for e, run in engines.items():
            times[e] += run(10)
    engines["farface"].close()
    medians = {e: statistics.median(t) for e, t in times.items()}
    best = min(m for e, m in medians.items() if e != "farface")
    for e, m in medians.items():
        ratio = f"{m / best:.2f}" if e == "farface" else ""
        share = f"{floor:.4f} | {floor / m:.2f}" if floor else " |"
        print(f"| {stem.name} | {batch} | {e} | {m:.4f} | {min(times[e]):.4f} | {ratio} | {share} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--ours", help="the cuda_worker")
    parser.add_argument("--check", action="store_true", help="PyTorch on the CPU against NAME@WxH.prints, where there is one")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--train", action="store_true", help="steps of a training")
    args = parser.parse_args()
    stems = [p.with_suffix("") for p in sorted(args.folder.glob("*.json"))]
    if not stems:
        sys.exit(f"{args.folder}: no networks there")
    torch.set_grad_enabled(False)
    if args.check:
        for stem in stems:
            width, height = size_of(stem)
            theirs = prints(Net(stem)(pictures(1, height, width)))
            if stem.with_name(stem.name + ".prints").exists():
                agree(stem.name, json.loads(stem.with_name(stem.name + ".prints").read_text()), theirs)
                print(f"{stem.name}: {len(theirs) // 2} outputs agree")
            trained = stem.with_name(stem.name + ".train-prints")
            if trained.exists():
                torch.set_grad_enabled(True)
                net = Net(stem, train=True)
                outputs = net(pictures(2, height, width))
                loss(outputs).backward()
                agree_of_training(stem.name, json.loads(trained.read_text()), outputs, net)
                torch.set_grad_enabled(False)
                print(f"{stem.name}: outputs and gradients of a training agree")
        return
    torch.backends.cudnn.benchmark = True
    print("| network | batch | engine | median ms | fastest ms | ours / best | floor ms | share |")
    print("|---|---|---|---|---|---|---|---|")
    for stem in stems:
        for batch in args.batches:
            (compare_training if args.train else compare)(stem, batch, args)


if __name__ == "__main__":
    main()
