#!/usr/bin/env python3
"""Detectors that a user would pick instead, end to end: from a decoded 640x480 frame in memory to face boxes, and their AP.

    pip install numpy onnx onnxruntime opencv-python-headless
    cargo build --release
    farface quantize models/farface-nano.safetensors --data ../shared/data/wider/images --output nano-int8.safetensors
    python3 tests/bench/end_to_end.py --int8 nano-int8.safetensors

MediaPipe's last package that holds its face models is 0.10.21, which wants an older numpy than the others, so another
environment's Python may be named for it:

    python3 -m venv mp && mp/bin/pip install mediapipe==0.10.21
    python3 tests/bench/end_to_end.py --int8 nano-int8.safetensors --mediapipe mp/bin/python

What is missing is skipped with a line. The frames are the listed pictures, shrunk to fit in 640x480 and padded with grey to
exactly that, so that time and AP are of the same input; a second table has AP on the pictures as they are.

`nano` and `small` are farface's models; `x1.5` searches the frame enlarged by that, `x0.5 x1.5` (with --int8) at both
scales; those in int8 with box voting. Times: theirs are those of `farface bench` (whole detections); the others' of the calls their users write, each given the
order of colours that it wants. Every engine runs in a process of its own that may use as many processors as it has threads
(MediaPipe knows no other cap); rounds go engine by engine, each after one run that does not count. Confidence thresholds are
those of normal use: farface's default, YuNet 0.6, Ultra-Light 0.7, MediaPipe 0.5. `yunet-ort` is the same network under ONNX
Runtime, with OpenCV's arithmetic before and after it written in numpy. The ratio is theirs / ours (above 1: ours is faster).

AP: everything scored above 0.02, NMS 0.45 (MediaPipe: its own), by `farface eval wider`; farface's evaluation settings.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WIDTH, HEIGHT = 640, 480
# File in --peers, and the lowest score and NMS of normal use.
PEERS = {"yunet": ("yunet_n_dynamic.onnx", 0.6, 0.3), "yunet-ort": ("yunet_n_dynamic.onnx", 0.6, 0.3),
         "ultra-light": ("ultralight-rfb-640.onnx", 0.7, 0.3),
         "mediapipe-short": (None, 0.5, None), "mediapipe-full": (None, 0.5, None)}
AP_SCORE, AP_NMS = 0.02, 0.45
SUBSETS = ("easy", "medium", "hard", "all")
PARTS = ("input", "network", "decode", "merge")


def suppress(np, boxes, scores, nms):
    """Greedy NMS of the best 5000, as many as OpenCV looks at; boxes as corners. Rows x y w h score, best first."""
    order = np.argsort(-scores, kind="stable")[:5000]
    boxes, scores = boxes[order], scores[order]
    left, top, right, bottom = np.ascontiguousarray(boxes.T)
    area, kept, rest = (right - left) * (bottom - top), [], np.arange(len(boxes))
    while rest.size:
        best, rest = rest[0], rest[1:]
        kept.append(best)
        width = np.minimum(right[best], right[rest]) - np.maximum(left[best], left[rest])
        height = np.minimum(bottom[best], bottom[rest]) - np.maximum(top[best], top[rest])
        inner = np.maximum(width, 0) * np.maximum(height, 0)
        rest = rest[inner <= nms * (area[best] + area[rest] - inner)]
    boxes = boxes[kept]
    return np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores[kept, None]])


def session(file, threads, dimensions=()):
    import onnx
    import onnxruntime as ort
    model = onnx.load(file)
    weights = {w.name for w in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in weights]
    # Weights among the inputs could be fed anew, so that nothing is folded into them.
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    for name, size in dimensions:
        options.add_free_dimension_override_by_name(name, size)
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return made, inputs[0].name, f"ONNX Runtime {ort.__version__}"


def yunet(file, threads, score, nms, any_size):
    import cv2
    cv2.setNumThreads(threads)
    detector, size = cv2.FaceDetectorYN.create(file, "", (WIDTH, HEIGHT), score, nms), [WIDTH, HEIGHT]

    def run(frame):
        if size != [frame.shape[1], frame.shape[0]]:
            size[:] = frame.shape[1], frame.shape[0]
            detector.setInputSize(size)
        faces = detector.detect(frame)[1]
        return [] if faces is None else faces[:, [0, 1, 2, 3, 14]]
    return run, "bgr", f"OpenCV {cv2.__version__}"


def yunet_ort(file, threads, score, nms, any_size):
    import numpy as np
    fixed = () if any_size else (("batch", 1), ("height", HEIGHT), ("width", WIDTH))
    run_network, name, version = session(file, threads, fixed)
    outputs = [f"{kind}_{stride}" for stride in (8, 16, 32) for kind in ("cls", "obj", "bbox")]

    def run(frame):
        bottom, right = -frame.shape[0] % 32, -frame.shape[1] % 32
        if bottom or right:
            frame = np.pad(frame, ((0, bottom), (0, right), (0, 0)))
        x = np.ascontiguousarray(frame.transpose(2, 0, 1)[None], dtype=np.float32)
        out, boxes, scores = run_network.run(outputs, {name: x}), [], []
        for i, stride in enumerate((8, 16, 32)):
            face, there, box = (o[0] for o in out[3 * i:3 * i + 3])
            s = np.sqrt(np.clip(face[:, 0], 0, 1) * np.clip(there[:, 0], 0, 1))
            at = np.nonzero(s >= score)[0]
            row, column = np.divmod(at, frame.shape[1] // stride)
            centre = (box[at, :2] + np.stack([column, row], 1)) * stride
            half = np.exp(box[at, 2:]) * (stride / 2)
            boxes.append(np.hstack([centre - half, centre + half]))
            scores.append(s[at])
        return suppress(np, np.concatenate(boxes), np.concatenate(scores), nms)
    return run, "bgr", version


def ultra_light(file, threads, score, nms, any_size):
    import cv2
    import numpy as np
    cv2.setNumThreads(threads)
    run_network, name, version = session(file, threads)

    def run(frame):
        height, width = frame.shape[:2]
        x = frame if (width, height) == (WIDTH, HEIGHT) else cv2.resize(frame, (WIDTH, HEIGHT))
        x = np.ascontiguousarray(((x.astype(np.float32) - 127) / 128).transpose(2, 0, 1)[None])
        scores, boxes = run_network.run(["scores", "boxes"], {name: x})
        at = np.nonzero(scores[0, :, 1] > score)[0]
        return suppress(np, boxes[0, at] * np.float32([width, height] * 2), scores[0, at, 1], nms)
    return run, "rgb", version


def mediapipe(full, score):
    import mediapipe as mp
    detector = mp.solutions.face_detection.FaceDetection(model_selection=int(full), min_detection_confidence=score)

    def run(frame):
        height, width = frame.shape[:2]
        boxes = []
        for face in detector.process(frame).detections or []:
            b = face.location_data.relative_bounding_box
            boxes.append([b.xmin * width, b.ymin * height, b.width * width, b.height * height, face.score[0]])
        return boxes
    return run, "rgb", f"MediaPipe {mp.__version__}"


def peer(engine, file, threads, scored):
    """Worker: a picture and a number of runs in, seconds of the runs and boxes out."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    _, score, nms = PEERS[engine]
    if scored:
        score, nms = AP_SCORE, AP_NMS
    if engine.startswith("mediapipe"):
        run, colours, version = mediapipe(engine.endswith("full"), score)
    else:
        make = {"yunet": yunet, "yunet-ort": yunet_ort, "ultra-light": ultra_light}[engine]
        run, colours, version = make(file, threads, score, nms, scored)
    import cv2
    print("ready", version, flush=True)
    for line in sys.stdin:
        path, runs = json.loads(line)
        frame = cv2.imread(path, cv2.IMREAD_COLOR)
        if colours == "rgb":
            frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        boxes, seconds = run(frame), []
        for _ in range(runs):
            start = time.perf_counter()
            run(frame)
            seconds.append(time.perf_counter() - start)
        print(json.dumps([seconds, [[float(v) for v in b] for b in boxes]]), flush=True)


class Peer:
    def __init__(self, engine, args, threads, scored):
        file = PEERS[engine][0]
        path = os.path.join(args.peers, file) if file else "-"
        if file and not os.path.exists(path):
            raise LookupError(f"no {path}")
        python = args.mediapipe if engine.startswith("mediapipe") else sys.executable
        self.log = tempfile.TemporaryFile("w+")
        try:
            self.process = subprocess.Popen([python, os.path.abspath(__file__), "--worker", engine, path, str(threads),
                                             str(int(scored))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=self.log, text=True, bufsize=1)
        except OSError as e:
            raise LookupError(f"{python}: {e.strerror}") from e
        for line in self.process.stdout:
            if line.startswith("ready"):
                self.version = line.split(None, 1)[1].strip()
                return
        self.log.seek(0)
        raise LookupError((self.log.read().strip().splitlines() or ["ended without a word"])[-1])

    def ask(self, path, runs):
        self.process.stdin.write(json.dumps([path, runs]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            sys.exit(f"error: a worker ended: {' '.join(self.process.args[2:])}\n{self.log.read()}")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def start(args, threads, scored, say):
    peers = {}
    for engine in PEERS:
        try:
            peers[engine] = Peer(engine, args, threads, scored)
        except LookupError as e:
            if say:
                print(f"skipped: {engine}: {e}", flush=True)
    if say:
        print("Others: " + (", ".join(f"{e} ({p.version})" for e, p in peers.items()) or "none"), end="\n\n", flush=True)
    return peers


def ours(args):
    precisions = {"nano f32": ["--precision", "f32"], "nano bf16": ["--precision", "bf16"]}
    if args.int8:
        precisions["nano int8"] = ["--precision", "int8", "--model", args.int8]
    # The speed spent on small faces: the frame enlarged; and on large ones, too.
    precisions["nano bf16 x1.5"] = [*precisions["nano bf16"], "--pyramid", "1.5"]
    if args.int8:
        for name, scales in (("x1.5", "1.5"), ("x0.5 x1.5", "0.5,1.5")):
            precisions[f"nano int8 {name}"] = [*precisions["nano int8"], "--scales", scales, "--suppression", "voting"]
    for p in ("f32", "bf16"):
        precisions[f"small {p}"] = ["--precision", p, "--model", os.path.join(ROOT, "models", "farface-small.safetensors")]
    return precisions


def farface(args, *arguments):
    told = subprocess.run([args.farface, *arguments, "--json"], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(told.stdout)


def listed(args):
    """Paths of the listed pictures, whatever their format, by folder and name."""
    there = {}
    for folder, _, files in os.walk(args.images):
        for f in files:
            there[os.path.basename(folder), os.path.splitext(f)[0]] = os.path.join(folder, f)
    names = []
    for line in open(args.list):
        event, slash, name = line.strip().partition("/")
        if slash:
            names.append((event, os.path.splitext(name)[0]))
    missing = [n for n in names if n not in there]
    if missing or not names:
        sys.exit(f"error: {args.list}: {len(missing)} of {len(names)} pictures are not in {args.images}")
    return {n: there[n] for n in names}


def frames(pictures, folder):
    """Frames and by how much each was shrunk."""
    import cv2
    made, scales = {}, {}
    for (event, name), path in pictures.items():
        picture = cv2.imread(path, cv2.IMREAD_COLOR)
        height, width = picture.shape[:2]
        scale = min(WIDTH / width, HEIGHT / height)
        w, h = round(width * scale), round(height * scale)
        picture = cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        picture = cv2.copyMakeBorder(picture, 0, HEIGHT - h, 0, WIDTH - w, cv2.BORDER_CONSTANT, value=(127, 127, 127))
        os.makedirs(os.path.join(folder, event), exist_ok=True)
        made[event, name] = os.path.join(folder, event, name + ".png")
        scales[event, name] = (w / width, h / height)
        cv2.imwrite(made[event, name], picture)
    return made, scales


def measure(args, threads, chosen):
    """Milliseconds of each engine's rounds: median and fastest; faces on the chosen frames; the parts of ours."""
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(processors)[:threads])
    peers = start(args, threads, False, False)
    times = {e: [] for e in [*ours(args), *peers]}
    faces = {e: [0] * len(chosen) for e in times}
    parts = {e: {p: [] for p in PARTS} for e in ours(args)}
    for _ in range(args.rounds):
        for i, frame in enumerate(chosen):
            for engine, settings in ours(args).items():
                told = farface(args, "bench", "--image", frame, "--threads", str(threads), "--runs", str(args.runs), *settings)
                told = told["results"][0]
                times[engine].append([told["times"]["detection"][k] for k in ("median_ms", "min_ms")])
                faces[engine][i] = told["faces"]
                for p in PARTS:
                    parts[engine][p].append(told["times"][p]["median_ms"])
            for engine, worker in peers.items():
                seconds, boxes = worker.ask(frame, args.runs)
                times[engine].append([statistics.median(seconds) * 1e3, min(seconds) * 1e3])
                faces[engine][i] = len(boxes)
    for worker in peers.values():
        worker.close()
    os.sched_setaffinity(0, processors)
    return times, faces, parts


def speed(args, pictures):
    # With many faces and with few.
    chosen = [list(pictures.values())[i * (len(pictures) - 1) // max(1, args.frames - 1)] for i in range(args.frames)]
    print(f"## Time of a {WIDTH}x{HEIGHT} frame\n\nFrames: {', '.join(os.path.basename(c) for c in chosen)}\n")
    columns = list(ours(args))
    print(f"| threads | engine | median ms | fastest ms | {' | '.join(f'/ {c}' for c in columns)} | faces found |")
    print("|---|---|---|---|" + "---|" * (len(columns) + 1))
    rows = []
    for threads in args.threads:
        times, faces, parts = measure(args, threads, chosen)
        median = {e: statistics.median(m for m, _ in t) for e, t in times.items()}
        for e, t in times.items():
            ratios = " | ".join(f"{median[e] / median[c]:.2f}" for c in columns)
            print(f"| {threads} | {e} | {median[e]:.2f} | {min(f for _, f in t):.2f} | {ratios} "
                  f"| {', '.join(map(str, faces[e]))} |", flush=True)
        for e, p in parts.items():
            ms = {k: statistics.median(v) for k, v in p.items()}
            rest = sum(ms.values()) - ms["network"]
            rows.append(f"| {threads} | {e} | {' | '.join(f'{ms[k]:.3f}' for k in PARTS)} | {rest / ms['network']:.1%} |")
    print(f"\nParts of ours, median ms:\n\n| threads | engine | {' | '.join(PARTS)} | all but the network / network |")
    print("|---|---|---|---|---|---|---|", *rows, sep="\n", end="\n\n", flush=True)


def write(folder, event, name, boxes, scale):
    os.makedirs(os.path.join(folder, event), exist_ok=True)
    with open(os.path.join(folder, event, name + ".txt"), "w") as f:
        f.write(f"{name}\n{len(boxes)}\n")
        for x, y, w, h, score in boxes:
            f.write(f"{x / scale[0]:.4f} {y / scale[1]:.4f} {w / scale[0]:.4f} {h / scale[1]:.4f} {score:.6f}\n")


def accuracy(args, title, pictures, images, scales, folder):
    print(f"## {title}\n\n| engine | {' | '.join(s.capitalize() for s in SUBSETS)} |\n|---|---|---|---|---|", flush=True)
    truth = ["--gt", args.gt, "--list", args.list]

    def row(engine, results):
        ap = {s["subset"]: s["ap"] for s in farface(args, "eval", "wider", *truth, "--results", results)["subsets"]}
        print(f"| {engine} | {' | '.join(f'{ap[s]:.3f}' if s in ap else '-' for s in SUBSETS)} |", flush=True)

    for engine, settings in ours(args).items():
        raw, results = (os.path.join(folder, f"{engine} {kind}") for kind in ("raw", "results"))
        farface(args, "eval", "wider", *truth, "--images", images, "--save-results", raw, *settings)
        for event, name in pictures:
            lines = open(os.path.join(raw, event, name + ".txt")).read().splitlines()[2:]
            write(results, event, name, [map(float, l.split()) for l in lines], scales[event, name])
        row(engine, results)
    for engine, worker in start(args, max(args.threads), True, False).items():
        results = os.path.join(folder, engine)
        for (event, name), path in pictures.items():
            write(results, event, name, worker.ask(path, 0)[1], scales[event, name])
        worker.close()
        row(engine, results)
    print()


def main():
    shared = os.path.join(os.path.dirname(ROOT), "shared")
    wider = os.path.join(shared, "data", "wider")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--farface", metavar="PATH", default=os.path.join(ROOT, "target", "release", "farface"))
    parser.add_argument("--int8", metavar="FILE", help="farface-nano quantized, to be measured too")
    parser.add_argument("--peers", metavar="DIR", default=os.path.join(shared, "peers"), help="the others' model files")
    parser.add_argument("--mediapipe", metavar="PYTHON", default=sys.executable, help="interpreter that has MediaPipe")
    parser.add_argument("--images", metavar="DIR", default=os.path.join(wider, "images"))
    parser.add_argument("--list", metavar="FILE", default=os.path.join(wider, "wider_dev_bbx_gt.txt"))
    parser.add_argument("--gt", metavar="DIR", default=os.path.join(shared, "fixtures", "wider"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--frames", type=int, default=3, help="frames timed")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", type=int, default=10, help="detections of a frame in each round")
    parser.add_argument("--parts", nargs="+", choices=("time", "frames", "pictures"), default=("time", "frames", "pictures"),
                        help="what to measure: time, AP on the frames, AP on the pictures as they are")
    args = parser.parse_args()
    if not os.path.exists(args.farface):
        sys.exit(f"error: no {args.farface}: `cargo build --release` makes it, --farface names another")
    pictures = listed(args)
    for worker in start(args, 1, False, True).values():
        worker.close()
    with tempfile.TemporaryDirectory() as folder:
        small = os.path.join(folder, "frames")
        framed, scales = frames(pictures, small)
        if "time" in args.parts:
            speed(args, framed)
        if "frames" in args.parts:
            accuracy(args, f"AP on the {WIDTH}x{HEIGHT} frames, {len(pictures)} pictures", framed, small, scales,
                     os.path.join(folder, "on frames"))
        if "pictures" in args.parts:
            accuracy(args, f"AP on the pictures as they are (Ultra-Light: stretched to {WIDTH}x{HEIGHT})", pictures,
                     args.images, dict.fromkeys(pictures, (1, 1)), os.path.join(folder, "on pictures"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        peer(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] == "1")
    else:
        main()
