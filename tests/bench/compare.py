#!/usr/bin/env python3
"""Our engine against ONNX Runtime, OpenVINO and ncnn: same networks, same weights, same picture, interleaved in one run.

    pip install numpy onnx onnxruntime openvino ncnn pnnx
    python3 tests/bench/compare.py [NETWORK[@WxH] ..] [--numbers f32 bf16 f16 int8] [--threads 1 2] [--seconds 6] [--engines ..]

A NETWORK is a detector's name, one of tests/bench/networks.rs, or a model file; without any, those of `NETWORKS`. ONNX files for the
others are written by our worker (`bench_worker`, built where `--ours` names none); for int8 ONNX Runtime quantizes them. Every engine runs in a process of its
own with its threads capped; rounds go engine by engine, so that all see the same noise. At one thread the processor time
counts, at more the wall clock. Medians are printed with their ratio ours / theirs (below 1: ours is faster). Outputs that differ by
more than 1e-3 of their mean (bf16: 5e-2; f16: 2e-2; int8, where every engine rounds in other places: 0.3) are told, and the run fails
at its end. (On CPUs without VNNI the others' int8 sums saturate at 16 bits, and their outputs are other ones.)
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
# Ours first.
ENGINES = {"f32": ("farface", "onnxruntime", "openvino-f32", "ncnn"), "bf16": ("farface-bf16", "openvino-bf16"),
           "f16": ("farface-f16", "openvino-f16"), "int8": ("farface-int8", "openvino-int8", "onnxruntime-int8")}
# Largest difference of an output's prints, relative to its mean.
TOLERANCE = {"f32": 1e-3, "bf16": 5e-2, "f16": 2e-2, "int8": 0.3}
NETWORKS = ("fpn-finest-r50@800x800", "fpn-finest-r18@800x800", "retinanet-r18@640x480", "yunet-like@640x480",
            "ultra-light-like@640x480", "farface-nano@640x480", "farface-small@640x480", "retinaface-mobile025@640x480")


def peer(engine, model, threads):
    """Worker for another runtime; speaks the lines that worker.rs documents."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import numpy as np
    start = time.perf_counter()
    names = json.load(open(os.path.splitext(model)[0] + ".json"))
    height, width = names["size"]
    x = picture(np, [1, 3, height, width])
    if engine.startswith("onnxruntime"):
        import onnxruntime as ort
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x}
        run = lambda: session.run(None, feed)
    elif engine.startswith("openvino"):
        import openvino as ov
        core = ov.Core()
        # OpenVINO computes in bf16 unless told otherwise; of a quantized network what is not in int8.
        hint = {} if engine.endswith("int8") else {"INFERENCE_PRECISION_HINT": engine.removeprefix("openvino-")}
        compiled = core.compile_model(core.read_model(model), "CPU", {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1", **hint})
        request = compiled.create_infer_request()

        def run():
            request.infer({0: x})
            return [request.get_output_tensor(i).data for i in range(len(compiled.outputs))]
    else:
        import ncnn
        net = ncnn.Net()
        net.opt.num_threads, net.opt.use_vulkan_compute = threads, False
        for half in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
            setattr(net.opt, f"use_{half}", False)
        stem = os.path.splitext(model)[0]
        net.load_param(f"{stem}.ncnn.param")
        net.load_model(f"{stem}.ncnn.bin")
        inputs, outputs = net.input_names(), net.output_names()
        mat = ncnn.Mat(x[0])

        def run():
            extractor = net.create_extractor()
            extractor.input(inputs[0], mat)
            return [np.array(extractor.extract(o)[1])[None] for o in outputs]
    prints = []
    for o in run():
        o = np.asarray(o, dtype=np.float64)
        prints += [np.abs(o).mean(), (o.ravel() * np.cos(np.arange(o.size) * 0.37)).mean()]
    print(f"ready {time.perf_counter() - start:.2f} {json.dumps(prints)}", flush=True)
    for line in sys.stdin:
        if line.strip() == "q":
            break
        pairs = []
        for _ in range(int(line)):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            pairs.append(f"{time.perf_counter() - wall:.6f},{time.process_time() - cpu:.6f}")
        print(" ".join(pairs), flush=True)
    hwm = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    print(f"hwm {int(hwm.split()[1]) / 1024:.0f}", flush=True)


def picture(np, shape):
    _, c, h, w = shape
    values = (np.arange(h * w * c, dtype=np.int64) * 7919 % 255).astype(np.float32) - 100
    return np.ascontiguousarray(values.reshape(1, h, w, c).transpose(0, 3, 1, 2))


def start(engine, command):
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    for line in worker.stdout:
        if line.startswith("ready"):
            return worker, json.loads(line.split(None, 2)[2])
    sys.exit(f"error: {engine} did not start: {' '.join(command)}")


def ask(worker, runs):
    worker.stdin.write(f"{runs}\n")
    worker.stdin.flush()
    return [tuple(map(float, p.split(","))) for p in worker.stdout.readline().split()]


def quantize(onnx, quantized, shape):
    """Static quantization as ONNX Runtime does it, with ranges from the picture: u8 tensors, i8 weights by channel."""
    import logging
    import numpy as np
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    import onnx as onnx_format
    name = onnx_format.load(onnx).graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.inputs = iter([{name: picture(np, shape)}])

        def get_next(self):
            return next(self.inputs, None)

    logging.disable(logging.WARNING)
    quantize_static(onnx, quantized, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                    weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8)
    logging.disable(logging.NOTSET)


def differences(engines, prints, tolerance):
    """What is too far apart of each output's mean of |x| and wave sum, against the first engine's: the first of each engine."""
    ours, told = prints[engines[0]], {}
    for e in engines[1:]:
        # ncnn numbers its outputs anew; the order is the same.
        for i, (a, b) in enumerate(zip(ours, prints[e], strict=True)):
            if not abs(a - b) <= tolerance * max(abs(ours[i // 2 * 2]), 1e-6):
                told.setdefault(e, f"output {i // 2} differs: {engines[0]} {a:.6g}, {e} {b:.6g}")
    return list(told.values())


def compare(engines, commands, seconds, tolerance):
    workers, prints, times = {}, {}, {e: [] for e in engines}
    for e in engines:
        workers[e], prints[e] = start(e, commands[e])
    told = differences(engines, prints, tolerance)
    # As many runs a round as take a tenth of a second, and so many rounds that every engine has its seconds.
    slowest = max(statistics.median(w for w, _ in ask(workers[e], 3)) for e in engines)
    inner = max(1, min(20, int(0.1 / slowest)))
    for _ in range(max(5, int(seconds / (slowest * inner)))):
        for e, w in workers.items():
            # Threads of the engine before spin on after its run, on a core that this one would miss.
            time.sleep(0.05)
            times[e] += ask(w, inner)
    memory = {}
    for e, w in workers.items():
        w.stdin.write("q\n")
        w.stdin.flush()
        memory[e] = w.stdout.readline().split()[1]
        w.wait()
    return times, memory, told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=6, help="least time for each engine, network and thread count")
    parser.add_argument("--numbers", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--engines", nargs="+", help="these alone, beside ours")
    parser.add_argument("--ours", metavar="PATH", help="a bench_worker built elsewhere, instead of building it")
    args = parser.parse_args()
    root = os.path.dirname(os.path.dirname(HERE))
    worker = args.ours
    if not worker:
        subprocess.run(["cargo", "build", "--release", "--quiet", "--example", "bench_worker"], cwd=root, check=True)
        worker = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(root, "target")),
                              "release/examples/bench_worker")
    print("| network | GMAC | threads | engine | median ms | fastest ms | GFLOP/s | ours / theirs | peak memory MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    apart = []
    with tempfile.TemporaryDirectory() as folder:
        for network in args.networks:
            name, _, size = network.partition("@")
            width, height = (size or "640x480").split("x")
            onnx = os.path.join(folder, "network.onnx")
            told = subprocess.run([worker, "--onnx", onnx, name, width, height], check=True, capture_output=True, text=True)
            macs = int(told.stdout.split()[0])
            json.dump({"size": [int(height), int(width)]}, open(os.path.join(folder, "network.json"), "w"))
            if "f32" in args.numbers and (not args.engines or "ncnn" in args.engines):
                import pnnx
                subprocess.run([pnnx.EXEC_PATH, onnx, f"inputshape=[1,3,{height},{width}]", "fp16=0"], cwd=folder, check=True,
                               capture_output=True)
            if "int8" in args.numbers:
                quantize(onnx, os.path.join(folder, "int8.onnx"), [1, 3, int(height), int(width)])
                json.dump({"size": [int(height), int(width)]}, open(os.path.join(folder, "int8.json"), "w"))
            for numbers, threads in [(n, t) for n in args.numbers for t in args.threads]:
                engines = [e for i, e in enumerate(ENGINES[numbers]) if i == 0 or not args.engines or e in args.engines]
                model = os.path.join(folder, "int8.onnx") if numbers == "int8" else onnx
                commands = {e: [sys.executable, __file__, "--worker", e, model, str(threads)] for e in engines}
                commands[engines[0]] = [worker, name, width, height, str(threads), numbers]
                times, memory, told = compare(engines, commands, args.seconds, TOLERANCE[numbers])
                apart += [f"{name} {numbers}, {threads} threads: {line}" for line in told]
                column = 1 if threads == 1 else 0
                median = {e: statistics.median(t[column] for t in times[e]) * 1e3 for e in engines}
                ours = median[engines[0]]
                for e in engines:
                    fastest = min(t[column] for t in times[e]) * 1e3
                    print(f"| {name} {width}x{height} | {macs / 1e9:.3f} | {threads} | {e} | {median[e]:.2f} | {fastest:.2f} "
                          f"| {macs * 2e-6 / median[e]:.0f} | {ours / median[e]:.2f} | {memory[e]} |", flush=True)
    if apart:
        sys.exit("error: outputs do not agree\n" + "\n".join(apart))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        peer(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
