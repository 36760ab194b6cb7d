#!/usr/bin/env python3
"""Our network against ONNX Runtime and OpenVINO: same weights, same picture, interleaved in one run.

    pip install numpy onnx onnxruntime openvino safetensors
    python3 tests/bench/compare.py WEIGHTS.safetensors [--size 640x480] [--threads 1 2] [--rounds 12] [--inner 5] [--ours WORKER]

WEIGHTS are the published RetinaFace (MobileNet-V1 x0.25). Every engine runs in a process of its own
with its threads capped; rounds go engine by engine, so that all see the same noise. At one thread the processor
time counts, at more the wall clock; medians are printed with their ratio to the first engine (ours).
The run fails where outputs differ by more than 1e-3 relative in the mean.
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
ENGINES = ("farface", "onnxruntime", "openvino-f32")


def peer(engine, model, threads):
    """Worker for a Python runtime; speaks the lines that worker.rs documents."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import numpy as np
    start = time.perf_counter()
    if engine == "onnxruntime":
        import onnxruntime as ort
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        shape = session.get_inputs()[0].shape
        x = picture(np, shape)
        run = lambda: session.run(None, {"input": x})
    else:
        import openvino as ov
        core = ov.Core()
        # OpenVINO computes in bf16 unless told otherwise.
        compiled = core.compile_model(core.read_model(model), "CPU", {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": "f32"})
        request = compiled.create_infer_request()
        x = picture(np, list(compiled.input(0).shape))

        def run():
            request.infer({0: x})
            return [request.get_output_tensor(i).data for i in range(len(compiled.outputs))]
    means = [float(np.abs(o, dtype=np.float64).mean()) for o in run()]
    print(f"ready {time.perf_counter() - start:.2f} {json.dumps(means)}", flush=True)
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


def run(engines, commands, rounds, inner):
    workers, times, means = {}, {e: [] for e in engines}, {}
    for e in engines:
        w = subprocess.Popen(commands[e], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True, bufsize=1)
        for line in w.stdout:
            if line.startswith("ready"):
                means[e] = json.loads(line.split(None, 2)[2])
                break
        else:
            sys.exit(f"error: {e} did not start: {' '.join(commands[e])}")
        workers[e] = w
    ours = means[engines[0]]
    for e in engines[1:]:
        for i, (a, b) in enumerate(zip(ours, means[e], strict=True)):
            if not abs(a - b) <= 1e-3 * max(abs(b), 1e-3):
                sys.exit(f"error: output {i} differs: {engines[0]} {a}, {e} {b}")
    for _ in range(rounds):
        for e, w in workers.items():
            w.stdin.write(f"{inner}\n")
            w.stdin.flush()
            times[e] += [tuple(map(float, p.split(","))) for p in w.stdout.readline().split()]
    memory = {}
    for e, w in workers.items():
        w.stdin.write("q\n")
        w.stdin.flush()
        memory[e] = w.stdout.readline().split()[1]
        w.wait()
    return times, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--inner", type=int, default=5)
    parser.add_argument("--ours", metavar="PATH", help="a bench_worker built elsewhere, instead of building it")
    args = parser.parse_args()
    width, height = args.size.split("x")
    root = os.path.dirname(os.path.dirname(HERE))
    worker = args.ours
    if not worker:
        subprocess.run(["cargo", "build", "--release", "--quiet", "--example", "bench_worker"], cwd=root, check=True)
        worker = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(root, "target")),
                              "release/examples/bench_worker")
    with tempfile.TemporaryDirectory() as folder:
        onnx = os.path.join(folder, "network.onnx")
        subprocess.run([sys.executable, os.path.join(HERE, "retinaface_onnx.py"), args.weights, onnx, width, height],
                       check=True)
        print(f"RetinaFace MobileNet-V1 x0.25, {args.size}, f32\n")
        print("| threads | engine | median ms | fastest ms | ratio to farface | peak memory MB |")
        print("|---|---|---|---|---|---|")
        for threads in args.threads:
            commands = {e: [sys.executable, __file__, "--worker", e, onnx, str(threads)] for e in ENGINES}
            commands["farface"] = [worker, args.weights, width, height, str(threads)]
            times, memory = run(ENGINES, commands, args.rounds, args.inner)
            column = 1 if threads == 1 else 0
            median = {e: statistics.median(t[column] for t in times[e]) * 1e3 for e in ENGINES}
            for e in ENGINES:
                fastest = min(t[column] for t in times[e]) * 1e3
                print(f"| {threads} | {e} | {median[e]:.2f} | {fastest:.2f} | {median[e] / median['farface']:.2f} "
                      f"| {memory[e]} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        peer(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
