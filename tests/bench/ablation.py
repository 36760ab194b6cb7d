#!/usr/bin/env python3
"""The direction of three claims of the papers, on a small detector trained for minutes, from several seeds.

    python3 tests/bench/ablation.py --out DIR [--farface PROGRAM] [--pictures DIR] [--seeds 1 2 3] [--threads 2]

  a. Group sampling helps the smallest scale (Group Sampling, table 3): arm `grouped` against `ungrouped`, which draws as
     many anchors a picture, over all anchors at once. AP of faces 8 to 16 px high.
  b. Online high-quality anchor mining helps Hard (HAMBox, tables 2 and 4): arm `mined` against `unmined`. AP of WIDER
     FACE's Hard.
  c. Pictures interpolated to twice their size help faces under 20 px (Finding Tiny Faces, figures 7 and 8): every
     model of a and b on scales 1 and 2 together against scale 1. AP of faces under 20 px high.

Trains every arm of `ARMS` from every seed by `recipes/ablation.toml` with the arm's changes, evaluates the weights of the last
step on the dev list, and prints tables in Markdown. What is finished in the folder of `--out` is not done again, and what
was stopped goes on.

AP by height is written out below (`average_precision`): the area under the curve of precision over recall, whose points are
all the scores of all pictures together, at IoU 0.5, precision made falling (PASCAL VOC since 2010). Faces outside the range
and those marked invalid are neither wanted nor wrong (COCO's area ranges): a detection takes the wanted face that it
overlaps most and that no better one has, else a face that is not wanted, and counts for nothing then; a detection that
finds none is wrong where its own height is in the range, else it counts for nothing. Easy, Medium, Hard and All are
`farface eval wider`'s.
"""
import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tomllib

HERE = os.path.dirname(os.path.abspath(__file__))
BASE = os.path.join(HERE, "../../recipes/ablation.toml")
# HAMBox's loss over all anchors. Its one anchor a cell matches few anchors a face; of farface-nano's dense ones it takes
# RetinaNet's threshold to leave about one a face, so that faces lack anchors and mining has something to add.
HAMBOX = {"matching": {"positive": 0.5}, "sampler": None, "loss": {"classification": {"kind": "focal"}}}
# What an arm changes in the recipe, table by table; None takes a table out.
ARMS = {
    "grouped": {},
    # As many anchors an example as the groups have together, those with fewer than their share counted.
    "ungrouped": {"sampler": {"grouped": False, "samples": 4 * 32 + 2 * 32 + 2 * 16 + 4 * 4}},
    "unmined": HAMBOX,
    "mined": HAMBOX | {"mining": {"anchors": 3, "overlap": 0.7}},
}
# Name and `--pyramid` of what is searched: scale 1; scales 1 and 2.
SCALES = {"1": "1", "1 and 2": "0:1:1"}
SUBSETS = ("easy", "medium", "hard", "all")
# Heights in pixels, from and below.
RANGES = {"8 to 16 px": (8, 16), "under 20 px": (0, 20), "16 to 32 px": (16, 32), "32 to 64 px": (32, 64),
          "from 64 px": (64, float("inf"))}
# Claim, measure, what it is without and with the idea: arm and scales.
CLAIMS = [
    ("a. group sampling", "8 to 16 px", ("ungrouped", "1"), ("grouped", "1")),
    ("b. anchor mining", "hard", ("unmined", "1"), ("mined", "1")),
    *((f"c. interpolation, {arm}", "under 20 px", (arm, "1"), (arm, "1 and 2")) for arm in ARMS),
]
WANTED = {side for claim in CLAIMS for side in claim[2:]}
# Lowest score of a detection: low, since a network trained so shortly is seldom sure.
THRESHOLD = 0.01
OVERLAP = 0.5


def toml(value):
    """A value of a recipe as TOML; tables inline."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def base(pictures):
    """The recipe that the arms change, its paths made whole."""
    with open(BASE, "rb") as f:
        recipe = tomllib.load(f)
    data = recipe["data"]
    for table in (recipe["model"], data["dev"], *data["train"]):
        for key in {"start", "list", "images", "ground-truth"} & table.keys():
            table[key] = os.path.abspath(os.path.join(os.path.dirname(BASE), table[key]))
    for table in (data["dev"], *data["train"]):
        table["images"] = os.path.abspath(pictures) if pictures else table["images"]
    return recipe


def variant(recipe, changes, seed):
    """The recipe of an arm, as text."""
    changes = changes | {"run": {"seed": seed}}
    recipe = recipe | {name: change and recipe.get(name, {}) | change for name, change in changes.items()}
    # The script evaluates.
    recipe["data"] = {key: value for key, value in recipe["data"].items() if key != "dev"}
    return "".join(f"{name} = {toml(table)}\n" for name, table in recipe.items() if table is not None)


def train(args, arm, seed):
    """The model of an arm, trained where it is not yet."""
    run = os.path.join(args.out, f"{arm}-{seed}")
    model, recipe = os.path.join(run, "final.safetensors"), f"{run}.toml"
    text = variant(base(args.pictures), ARMS[arm], seed)
    if os.path.exists(recipe):
        with open(recipe) as f:
            if f.read() != text:
                sys.exit(f"error: {recipe} is of other settings; remove it and {run}, or take another --out")
    else:
        with open(recipe, "w") as f:
            f.write(text)
    if not os.path.exists(model):
        subprocess.run([args.farface, "train", recipe, "--out", run, "--threads", str(args.threads)], check=True)
    return model


def evaluate(args, arm, seed, scales):
    """Measures of a trained arm, by name; kept in a file beside the run."""
    name = os.path.join(args.out, f"{arm}-{seed}.scales-{SCALES[scales].replace(':', '_')}")
    dev = base(args.pictures)["data"]["dev"]
    kept, scored, found = f"{name}.measures.json", f"{name}.json", f"{name}.results"
    if not os.path.exists(kept):
        if not os.path.exists(scored):
            model = os.path.join(args.out, f"{arm}-{seed}", "final.safetensors")
            command = [args.farface, "eval", "wider", "--gt", dev["ground-truth"], "--list", dev["list"], "--images",
                       dev["images"], "--model", model, "--pyramid", SCALES[scales], "--threshold", str(THRESHOLD),
                       "--threads", str(args.threads), "--save-results", found, "--json"]
            write(scored, subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        subsets = {s["subset"].lower(): s["ap"] for s in load(scored)["subsets"]}
        pictures = [(wanted, reaching(detections(found, path), wanted)) for path, wanted in annotations(dev["list"])]
        ranges = {name: average_precision(pictures, *heights) for name, heights in RANGES.items()}
        write(kept, json.dumps(subsets | ranges))
    return load(kept)


def load(path):
    with open(path) as f:
        return json.load(f)


def write(path, text):
    """Writes a file whole or not at all."""
    with open(path + ".part", "w") as f:
        f.write(text)
    os.replace(path + ".part", path)


def annotations(path):
    """Picture and faces (x1 y1 x2 y2, whether it is valid) of a WIDER FACE list."""
    with open(path) as f:
        lines = f.read().splitlines()
    pictures, i = [], 0
    while i < len(lines):
        count = int(lines[i + 1])
        rows = [[float(v) for v in line.split()] for line in lines[i + 2:i + 2 + count]]
        pictures.append((lines[i], [((x, y, x + w, y + h), not invalid) for x, y, w, h, _, _, _, invalid, *_ in rows]))
        # A picture without faces has a line of zeros.
        i += 2 + max(count, 1)
    return pictures


def detections(folder, picture):
    """Score and box of a result file, best first."""
    with open(os.path.join(folder, os.path.splitext(picture)[0] + ".txt")) as f:
        rows = [[float(v) for v in line.split()] for line in f.read().splitlines()[2:]]
    return sorted(((score, (x, y, x + w, y + h)) for x, y, w, h, score in rows), reverse=True)


def iou(a, b):
    """Of boxes that meet."""
    meet = (min(a[2], b[2]) - max(a[0], b[0])) * (min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda r: (r[2] - r[0]) * (r[3] - r[1])
    return meet / (area(a) + area(b) - meet)


def reaching(found, faces):
    """Score, box, and overlap with each face that it finds, of every detection."""
    meet = lambda a, b: a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    overlaps = lambda box: [(iou(box, face), i) for i, (face, _) in enumerate(faces) if meet(box, face)]
    return [(score, box, [o for o in overlaps(box) if o[0] >= OVERLAP]) for score, box in found]


def average_precision(pictures, least, below):
    """AP over faces whose height is from `least` to `below`; `pictures`: annotated faces, what `reaching` tells."""
    inside = lambda box: least <= box[3] - box[1] < below
    wanted, judged = 0, []
    for faces, found in pictures:
        faces = [(box, valid and inside(box)) for box, valid in faces]
        wanted += sum(counts for _, counts in faces)
        free = set(range(len(faces)))
        for score, box, overlaps in found:
            # Wanted faces first, then by overlap.
            reached = [(faces[i][1], overlap, i) for overlap, i in overlaps if i in free]
            if reached:
                counts, _, i = max(reached)
                free.remove(i)
                if counts:
                    judged.append((score, True))
            elif inside(box):
                judged.append((score, False))
    judged.sort(key=lambda j: -j[0])
    curve, right = [], 0
    for rank, (score, correct) in enumerate(judged, 1):
        right += correct
        # Equal scores are one point.
        if rank == len(judged) or judged[rank][0] < score:
            curve.append((right / wanted, right / rank))
    area, best = 0.0, 0.0
    for k in range(len(curve) - 1, -1, -1):
        best = max(best, curve[k][1])
        area += best * (curve[k][0] - (curve[k - 1][0] if k else 0.0))
    return area


def anchors(args, arm, seed):
    """Of a training's steps: faces, anchors matched and mined, in the mean; anchors mined in the last ones."""
    with open(os.path.join(args.out, f"{arm}-{seed}", "log.jsonl")) as f:
        steps = [line for line in map(json.loads, f) if line["kind"] == "step"]
    return [statistics.mean(s[key] for s in steps) for key in ("faces", "matched", "mined")] + [steps[-1]["mined"]]


def spread(values):
    """Mean, and each seed's."""
    return f"{statistics.mean(values):.3f} ({' '.join(f'{v:.3f}' for v in values)})"


def report(args, seeds, measured):
    columns = [*SUBSETS, *RANGES]
    print("\n| arm | scales | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for arm, scales in itertools.product(ARMS, SCALES):
        if (arm, scales) in WANTED:
            cells = (spread([measured[arm, seed, scales][c] for seed in seeds]) for c in columns)
            print(f"| {arm} | {scales} | " + " | ".join(cells) + " |")
    print("\n| claim | AP of | without | with | difference by seed | seeds that agree |")
    print("|---|---|---|---|---|---|")
    for claim, measure, without, with_it in CLAIMS:
        values = [[measured[arm, seed, scales][measure] for seed in seeds] for arm, scales in (without, with_it)]
        gains = [b - a for a, b in zip(*values)]
        print(f"| {claim} | {measure} | {spread(values[0])} | {spread(values[1])} | "
              f"{' '.join(f'{g:+.3f}' for g in gains)} | {sum(g > 0 for g in gains)} of {len(gains)} |")
    print("\n| arm | faces a step | anchors matched | mined | mined in the last steps |")
    print("|---|---|---|---|---|")
    for arm in ARMS:
        cells = (statistics.mean(v) for v in zip(*(anchors(args, arm, seed) for seed in seeds)))
        print(f"| {arm} | " + " | ".join(f"{v:.1f}" for v in cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs, made where it is missing")
    parser.add_argument("--farface", default="farface", metavar="PROGRAM", help="the program, as released")
    parser.add_argument("--pictures", metavar="DIR", help="folder of the pictures, where not the recipe's: BMP is read faster")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    measured = {}
    # Seed by seed, so that what is there when it is stopped compares; scale 1, which every claim needs, first.
    for scales, seed, arm in itertools.product(SCALES, args.seeds, ARMS):
        if (arm, scales) not in WANTED:
            continue
        train(args, arm, seed)
        measured[arm, seed, scales] = evaluate(args, arm, seed, scales)
        figures = (f"{k} {v:.3f}" for k, v in measured[arm, seed, scales].items())
        print(f"{arm} {seed}, scales {scales}: {', '.join(figures)}", file=sys.stderr, flush=True)
    report(args, args.seeds, measured)


if __name__ == "__main__":
    main()
