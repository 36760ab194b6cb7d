#!/usr/bin/env python3
"""Training steps of our networks against PyTorch's: same weights, same pictures, interleaved in one run.

    pip install numpy torch safetensors
    python3 tests/bench/train_compare.py [--networks nano resnet18-fpn] [--precisions f32 bf16] [--threads 1 2]
                                         [--side 320] [--batch NETWORK=N ...] [--rounds 5] [--ours WORKER]

A step is forward with the batch's statistics, the gradient of the sum over the outputs of half their mean square, and
backward; data and update are left out. Networks: farface-nano, and ResNet-18 with the feature pyramid of Lin et al. on
P2..P5 of 128 channels; PyTorch's are written out below (channels last; bf16 is autocast with weights and normalisation
in f32). A third process multiplies square matrices (`torch.mm`, 2048, same precision and threads): the rate that a
library reaches on this machine. Every engine runs in a process of its own with its threads capped; rounds go engine by
engine, so that all see the same noise. At one thread the processor time counts, at more the wall clock. Printed are
medians, their ratio to ours, and the rate of multiply-adds (a step counted as three forwards, two operations each) as a
share of the matrix product's. The run fails where outputs or gradients differ by more than 1e-3 (f32) or 5e-2 (bf16)
relative in the mean.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ENGINES = ("farface", "torch", "matrix product")
BATCH = {"nano": 16, "resnet18-fpn": 8}
MATRIX = 2048


def networks():
    """Our networks in PyTorch, with our parameters' names."""
    import torch.nn.functional as F
    from torch import nn

    def conv(i, o, k, s=1, groups=1, bias=False):
        return nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=bias)

    def conv_bn(i, o, k, s=1):
        return nn.Sequential(conv(i, o, k, s), nn.BatchNorm2d(o), nn.LeakyReLU(0.1, inplace=True))

    def conv_dw(i, o, s=1):
        return nn.Sequential(conv(i, i, 3, s, groups=i), nn.BatchNorm2d(i), nn.LeakyReLU(0.1, inplace=True),
                             conv(i, o, 1), nn.BatchNorm2d(o), nn.LeakyReLU(0.1, inplace=True))

    def down(coarse, fine):
        return fine + F.interpolate(coarse, fine.shape[2:], mode="nearest")

    class Nano(nn.Module):
        def __init__(self, c=64, heads=1, anchors=(4, 2, 2, 4)):
            super().__init__()
            self.body = nn.ModuleDict({
                "stage1": nn.Sequential(conv_bn(3, 16, 3, 2), conv_dw(16, 16), conv_dw(16, 64, 2), conv_dw(64, 64),
                                        conv_dw(64, 64, 2), conv_dw(64, 64)),
                "stage2": nn.Sequential(conv_dw(64, 128, 2), *(conv_dw(128, 128) for _ in range(5))),
                "stage3": nn.Sequential(conv_dw(128, 256, 2), conv_dw(256, 256))})
            self.fpn = nn.ModuleDict({
                "lateral3": conv_bn(64, c, 1), "lateral4": conv_bn(128, c, 1), "lateral5": conv_bn(256, c, 1),
                "down6": conv_dw(256, c, 2)})
            for level, a in enumerate(anchors, 3):
                setattr(self, f"smooth{level}", conv_dw(c, c))
                setattr(self, f"head{level}", nn.Sequential(*(conv_dw(c, c) for _ in range(heads))))
                setattr(self, f"predict{level}", conv(c, a * 5, 1, bias=True))

        def forward(self, x):
            c3 = self.body["stage1"](x)
            c4 = self.body["stage2"](c3)
            c5 = self.body["stage3"](c4)
            p6 = self.fpn["down6"](c5)
            p5 = down(p6, self.fpn["lateral5"](c5))
            p4 = down(p5, self.fpn["lateral4"](c4))
            p3 = down(p4, self.fpn["lateral3"](c3))
            part = lambda name, level: getattr(self, f"{name}{level}")
            return [part("predict", level)(part("head", level)(part("smooth", level)(p)))
                    for level, p in enumerate((p3, p4, p5, p6), 3)]

    class Block(nn.Module):
        def __init__(self, i, o, s):
            super().__init__()
            self.conv1, self.bn1 = conv(i, o, 3, s), nn.BatchNorm2d(o)
            self.conv2, self.bn2 = conv(o, o, 3), nn.BatchNorm2d(o)
            self.downsample = nn.Sequential(conv(i, o, 1, s), nn.BatchNorm2d(o)) if s > 1 else nn.Identity()

        def forward(self, x):
            y = F.relu(self.bn1(self.conv1(x)), inplace=True)
            return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)

    class ResNetPyramid(nn.Module):
        def __init__(self, channels=128):
            super().__init__()
            self.body = nn.ModuleDict({"conv1": conv(3, 64, 7, 2), "bn1": nn.BatchNorm2d(64)})
            self.fpn = nn.ModuleDict()
            i = 64
            for level in range(2, 6):
                o = 16 << level
                self.body[f"layer{level - 1}"] = nn.Sequential(Block(i, o, 1 if level == 2 else 2), Block(o, o, 1))
                self.fpn[f"lateral{level}"] = conv(o, channels, 1, bias=True)
                self.fpn[f"output{level}"] = conv(channels, channels, 3, bias=True)
                i = o

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.body["bn1"](self.body["conv1"](x)), inplace=True), 3, 2, 1)
            maps = []
            for level in range(2, 6):
                x = self.body[f"layer{level - 1}"](x)
                maps.append(self.fpn[f"lateral{level}"](x))
            for i in (2, 1, 0):
                maps[i] = down(maps[i + 1], maps[i])
            return [self.fpn[f"output{level}"](m) for level, m in enumerate(maps, 2)]

    return {"nano": Nano, "resnet18-fpn": ResNetPyramid}


def pictures(np, batch, side):
    """The values of train_worker.rs: SplitMix64, twelve uniform ones summed, on a grid of eighths."""
    with np.errstate(over="ignore"):
        count = batch * side * side * 3
        sums = np.zeros(count, np.float32)
        for i in range(12):
            z = np.uint64(1) + (np.arange(count, dtype=np.uint64) * np.uint64(12) + np.uint64(i + 1)) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            sums += ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    eighths = (sums - np.float32(6)) * np.float32(8)
    # Halves away from zero, as Rust rounds.
    return (np.sign(eighths) * np.floor(np.abs(eighths) + np.float32(0.5)) / 8).reshape(batch, side, side, 3)


def peer(engine, name, precision, side, batch, threads, weights):
    """Worker for PyTorch; speaks the lines that train_worker.rs documents."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import numpy as np
    import torch
    torch.set_num_threads(threads)
    bf16 = precision == "bf16"
    if engine == "matrix product":
        a, b = (torch.rand(MATRIX, MATRIX, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
        step = lambda: torch.mm(a, b)
        step()
        means = []
    else:
        from safetensors.torch import load_file
        net = networks()[name]()
        missing = net.load_state_dict(load_file(weights), strict=False)
        absent = [k for k in missing.missing_keys if not k.endswith("num_batches_tracked")]
        if absent or missing.unexpected_keys:
            sys.exit(f"error: the networks' parameters differ: {absent} {missing.unexpected_keys}")
        net = net.to(memory_format=torch.channels_last).train()
        x = torch.from_numpy(pictures(np, batch, side)).permute(0, 3, 1, 2)  # channels last in memory

        def step():
            net.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = net(x)
            sum(0.5 * y.float().square().mean() for y in outputs).backward()
            return outputs
        means = [y.detach().float().abs().mean(dtype=torch.float64).item() for y in step()]
        means.append(torch.cat([p.grad.flatten() for p in net.parameters()]).abs().mean(dtype=torch.float64).item())
    print(f"ready 0 {json.dumps(means)}", flush=True)
    for line in sys.stdin:
        if line.strip() == "q":
            break
        pairs = []
        for _ in range(int(line)):
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            pairs.append(f"{time.perf_counter() - wall:.6f},{time.process_time() - cpu:.6f}")
        print(" ".join(pairs), flush=True)
    hwm = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    print(f"hwm {int(hwm.split()[1]) / 1024:.0f}", flush=True)


def run(commands, rounds, tolerance):
    """Times of every engine, their peak memory, and the multiply-adds of a picture."""
    workers, times, means, macs = {}, {e: [] for e in ENGINES}, {}, 0
    for e in ENGINES:
        workers[e] = subprocess.Popen(commands[e], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        for line in workers[e].stdout:
            if line.startswith("ready"):
                _, count, values = line.split(None, 2)
                macs, means[e] = max(macs, int(count)), json.loads(values)
                break
        else:
            sys.exit(f"error: {e} did not start: {' '.join(commands[e])}")
    for i, (a, b) in enumerate(zip(means["farface"], means["torch"], strict=True)):
        if not abs(a - b) <= tolerance * abs(b):
            what = "gradient" if i + 1 == len(means["torch"]) else f"output {i}"
            sys.exit(f"error: {what} differs: farface {a}, torch {b}")
    for _ in range(rounds):
        for e, w in workers.items():
            w.stdin.write("1\n")
            w.stdin.flush()
            times[e] += [tuple(map(float, p.split(","))) for p in w.stdout.readline().split()]
    memory = {}
    for e, w in workers.items():
        w.stdin.write("q\n")
        w.stdin.flush()
        memory[e] = w.stdout.readline().split()[1]
        w.wait()
    return times, memory, macs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(BATCH), choices=list(BATCH))
    parser.add_argument("--precisions", nargs="+", default=["f32", "bf16"], choices=["f32", "bf16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--batch", nargs="+", default=[], metavar="NETWORK=N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ours", metavar="PATH", help="a train_worker built elsewhere, instead of building it")
    args = parser.parse_args()
    batches = BATCH | {name: int(n) for name, n in (b.split("=") for b in args.batch)}
    worker = args.ours
    if not worker:
        root = os.path.dirname(os.path.dirname(HERE))
        subprocess.run(["cargo", "build", "--release", "--quiet", "--features", "train", "--example", "train_worker"],
                       cwd=root, check=True)
        worker = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(root, "target")),
                              "release/examples/train_worker")
    print("| network | precision | threads | engine | median ms a picture | fastest | ratio to farface | GFLOP/s "
          "| of matrix product | peak memory MB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.safetensors")
        for name in args.networks:
            for precision in args.precisions:
                for threads in args.threads:
                    settings = [name, precision, str(args.side), str(batches[name]), str(threads), weights]
                    commands = {e: [sys.executable, __file__, "--worker", e, *settings] for e in ENGINES}
                    commands["farface"] = [worker, *settings]
                    times, memory, macs = run(commands, args.rounds, 1e-3 if precision == "f32" else 5e-2)
                    column = 1 if threads == 1 else 0
                    median = {e: statistics.median(t[column] for t in times[e]) for e in ENGINES}
                    product = 2 * MATRIX**3 / median["matrix product"]
                    for e in ENGINES[:2]:
                        ms = 1e3 / batches[name]
                        fastest = min(t[column] for t in times[e]) * ms
                        rate = 3 * 2 * macs * batches[name] / median[e]
                        print(f"| {name} | {precision} | {threads} | {e} | {median[e] * ms:.1f} | {fastest:.1f} "
                              f"| {median[e] / median['farface']:.2f} | {rate / 1e9:.0f} | {100 * rate / product:.0f} % "
                              f"| {memory[e]} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _, _, engine, name, precision, side, batch, threads, weights = sys.argv
        peer(engine, name, precision, int(side), int(batch), int(threads), weights)
    else:
        main()
