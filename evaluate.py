# SPDX-License-Identifier: MIT
"""Evaluation for SemanticFace (arXiv 2603.14827): predictions + truth -> metrics with intervals.

Compares predicted with true coefficients over all images, by face region, by coefficient and by any
record field, beside baselines that see no image: zeros and the training set's mean. Labels are
sparse, so a small MAE alone means little, RMSE and correlation show whether anything was seen.

Reads:  prediction records (.jsonl) of infer.py, one file or several to compare, and label or
        annotated records with the truth, with --rig a folder of OBJ files
Writes: a table, every number of it in a .json file, with --plot one picture
    {"images": 1320, "models": {"predictions.jsonl": {"mae": 0.03, "rmse": 0.08, ...}},
     "intervals": {"predictions.jsonl": {"rmse": [0.078, 0.082], ...}}, "baselines": {...}, ...}

    python evaluate.py predictions.jsonl data/demo/val.jsonl --plot metrics.png

Shapes: N images, C = 52 coefficients, G people, R resamplings, V vertices.
"""
import argparse
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# The 52 names in Live Link Face column order; the same block stands in every script.
ARKIT_NAMES = [
    "eyeBlinkLeft", "eyeLookDownLeft", "eyeLookInLeft", "eyeLookOutLeft", "eyeLookUpLeft",
    "eyeSquintLeft", "eyeWideLeft", "eyeBlinkRight", "eyeLookDownRight", "eyeLookInRight",
    "eyeLookOutRight", "eyeLookUpRight", "eyeSquintRight", "eyeWideRight", "jawForward", "jawRight",
    "jawLeft", "jawOpen", "mouthClose", "mouthFunnel", "mouthPucker", "mouthRight", "mouthLeft",
    "mouthSmileLeft", "mouthSmileRight", "mouthFrownLeft", "mouthFrownRight", "mouthDimpleLeft",
    "mouthDimpleRight", "mouthStretchLeft", "mouthStretchRight", "mouthRollLower", "mouthRollUpper",
    "mouthShrugLower", "mouthShrugUpper", "mouthPressLeft", "mouthPressRight", "mouthLowerDownLeft",
    "mouthLowerDownRight", "mouthUpperUpLeft", "mouthUpperUpRight", "browDownLeft", "browDownRight",
    "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "cheekPuff", "cheekSquintLeft",
    "cheekSquintRight", "noseSneerLeft", "noseSneerRight", "tongueOut",
]
REGIONS = {part + ("s" if part in ("brow", "eye", "cheek") else ""):
           [k for k, name in enumerate(ARKIT_NAMES) if name.startswith(part)]
           for part in ("brow", "eye", "nose", "cheek", "mouth", "jaw", "tongue")}
ACTIVE = 0.15  # from here on an action counts as active, as in annotate.py
LEFT = [k for k, name in enumerate(ARKIT_NAMES)
        if name.endswith("Left") and name not in ("jawLeft", "mouthLeft")]  # 18 pairs
RIGHT = [ARKIT_NAMES.index(ARKIT_NAMES[k].replace("Left", "Right")) for k in LEFT]
RESAMPLES = 1000  # bootstrap samples
UNITS = {"mm": 1.0, "cm": 10.0, "m": 1000.0}  # millimetres
LIP_SHAPES = [ARKIT_NAMES.index(name) for name in
              ("mouthRollUpper", "mouthRollLower", "mouthFunnel", "mouthPucker")]
COLUMNS = {"mae": ("MAE", 4), "rmse": ("RMSE", 4), "pearson_median": ("median r", 3),
           "pearson_above_0.8": ("r > 0.8", 0), "ccc": ("CCC", 3), "f1": ("F1", 3),
           "asymmetry": ("left-right", 4), "vertex_mm": ("vertex mm", 2), "lip_mm": ("lip mm", 2)}
BLUE, GREY, INK, GRID = "#0072b2", "#aaaaaa", "#282828", "#e1e1e1"

def parse_args(argv=None) -> argparse.Namespace:
    """Reads the command line, or `argv`."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="predictions, one file or several to compare, "
        "then the truth (default: predictions.jsonl data/demo/val.jsonl)")
    add("--train", help="records for the mean baseline (default: train.jsonl beside the truth)")
    add("--by", help="also by the values of this field of the truth, such as identity")
    add("--rig", help="folder of Neutral.obj and an OBJ file a shape: adds errors in millimetres")
    add("--plot", help="also draw the results into this picture (.png)")
    add("--seed", type=int, default=0, help="of the bootstrap (default %(default)s)")
    add("--out", default="metrics.json", help="file for every number (default %(default)s)")
    return parser.parse_args(argv)

# ---- Metrics -------------------------------------------------------------------------------------
def metrics(predicted: np.ndarray, true: np.ndarray) -> dict:
    """Compares two arrays (N, C) of coefficients, 0 to 1.

    Pearson's r and the concordance (CCC, Lin 1989) are of each coefficient whose truth varies;
    "constant" counts the others. F1 is of "active", 0.15 or more. "asymmetry" is the mean absolute
    error of left minus right, over the 18 pairs.
    """
    error = predicted - true  # (N, C)
    r, ccc = (values[~np.isnan(values)] for values in correlations(predicted, true))
    seen, active = predicted >= ACTIVE, true >= ACTIVE
    result = {"mae": np.abs(error).mean(),
              "rmse": np.sqrt((error ** 2).mean()),
              "f1": 2 * (seen & active).sum() / max(seen.sum() + active.sum(), 1),
              "constant": true.shape[1] - len(r)}
    if len(r):
        result |= {"pearson_median": np.median(r),
                   "pearson_mean": r.mean(),
                   "pearson_above_0.8": (r > 0.8).sum(),
                   "ccc": ccc.mean()}
    if true.shape[1] == len(ARKIT_NAMES):
        result["asymmetry"] = np.abs(error[:, LEFT] - error[:, RIGHT]).mean()
    return {name: np.asarray(value).item() for name, value in result.items()}

def correlations(predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's r and CCC (C,) of the columns of (N, C), NaN where the truth does not vary."""
    x, y = predicted - predicted.mean(axis=0), true - true.mean(axis=0)  # (N, C)
    covariance, var_x, var_y = (x * y).mean(axis=0), (x * x).mean(axis=0), (y * y).mean(axis=0)
    gap = predicted.mean(axis=0) - true.mean(axis=0)
    varies = var_y > 1e-14
    # A prediction that does not vary has r = 0.
    scale = np.sqrt(np.where(varies & (var_x > 1e-14), var_x * var_y, np.inf))
    r = np.where(varies, covariance / scale, np.nan)
    ccc = np.where(varies, 2 * covariance / np.where(varies, var_x + var_y + gap ** 2, 1), np.nan)
    return r, ccc

def uncertainty(std: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> dict:
    """How deviations (N, C) tell the absolute errors, where the truth is active: their Spearman
    correlation, and the share within one and two (68% and 95% of a normal distribution)."""
    active = true >= ACTIVE
    std, error = std[active], np.abs(predicted - true)[active]
    within = [(error <= times * std).mean().item() for times in (1, 2)]
    return {"spearman": spearman(std, error), "within_1_std": within[0], "within_2_std": within[1]}

def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two arrays (N,), ties at their mean rank; 0 if constant."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(*ranks)[0, 1]) if min(map(np.ptp, ranks)) > 0 else 0.0

# ---- Intervals -----------------------------------------------------------------------------------
def resample(sums: np.ndarray, seed: int) -> np.ndarray:
    """Sums of each person (G, K) -> their totals in R bootstrap samples (R, K) of whole people,
    since images of one person are alike (Efron & Tibshirani 1993, Ch. 8)."""
    rng, count = np.random.default_rng(seed), len(sums)
    draws = (rng.integers(count, size=count) for _ in range(RESAMPLES))
    return np.array([np.bincount(people, minlength=count) @ sums for people in draws])

def interval(samples: np.ndarray) -> list[float]:
    """The 95% percentile interval of R samples (Efron & Tibshirani 1993, Ch. 13)."""
    return np.percentile(samples, (2.5, 97.5)).tolist()

def intervals(errors: dict, people: list, seed: int) -> dict:
    """95% intervals of each file's MAE and RMSE, of paired differences from the first, by region.
    `errors` are arrays (N, C) by file, `people` says whose image each of the N is."""
    _, groups = np.unique(people, return_inverse=True)  # (N,)
    if groups.max() < 4:  # too few people to resample: images instead
        groups = np.arange(len(groups))
    first = next(iter(errors.values()))
    columns = [np.ones(len(groups))]  # what is summed over each person's images
    for error in errors.values():
        columns += [np.abs(error).mean(axis=1), (error ** 2).mean(axis=1)]
    columns += [(first[:, region] ** 2).mean(axis=1) for region in REGIONS.values()]
    sums = np.stack([np.bincount(groups, column) for column in columns], axis=1)  # (G, K)
    totals = resample(sums, seed)  # (R, K)
    means = totals[:, 1:] / totals[:, :1]  # (R, K - 1)
    samples = {file: {"mae": means[:, 2 * k], "rmse": np.sqrt(means[:, 2 * k + 1])}
               for k, file in enumerate(errors)}
    base, *others = samples
    by_region = np.sqrt(means[:, 2 * len(errors):]).T  # (regions, R)
    return {"intervals": {file: {metric: interval(values) for metric, values in both.items()}
                          for file, both in samples.items()},
            "differences": {f"{file} minus {base}": {
                metric: interval(values - samples[base][metric])
                for metric, values in samples[file].items()} for file in others},
            "region_intervals": dict(zip(REGIONS, map(interval, by_region)))}

# ---- Descriptions --------------------------------------------------------------------------------
def agreement(predictions: list[dict], truth: list[dict]) -> dict:
    """Shares of descriptions with the same category and symmetry, word for word, and precision,
    recall and F1 of the words of the movements. Empty if there are none."""
    pairs = [(p["description"], t["description"]) for p, t in zip(predictions, truth)
             if isinstance(p.get("description"), dict) and isinstance(t.get("description"), dict)]
    if not pairs:
        return {}
    bags = [[Counter(re.findall(r"\w+", str(d.get("muscle_movements")).lower())) for d in pair]
            for pair in pairs]
    written = sum(p.total() for p, _ in bags)
    right = sum(t.total() for _, t in bags)
    common = sum((p & t).total() for p, t in bags)
    same = {field: sum(p.get(field) == t.get(field) for p, t in pairs) / len(pairs)
            for field in ("expression_category", "symmetry")}
    return {**same, "precision": common / max(written, 1), "recall": common / max(right, 1),
            "f1": 2 * common / max(written + right, 1)}

# ---- Perceptual error: the face that the coefficients drive --------------------------------------
def read_rig(folder: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Displacements (C, V, 3) in mm, which vertices are lips (V,), and the unit of the files."""
    def vertices(path: Path) -> np.ndarray:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return np.array([line.split()[1:4] for line in lines if line.startswith("v ")], dtype=float)

    files = {re.sub("_L$", "Left", re.sub("_R$", "Right", p.stem[:1].lower() + p.stem[1:])): p
             for p in folder.glob("*.obj")}
    missing = [name for name in ["neutral", *ARKIT_NAMES[:-1]] if name not in files]  # no tongueOut
    if missing:
        raise SystemExit(f"--rig {folder} lacks {missing[:4]}; expected an .obj for each shape")
    try:
        neutral = vertices(files["neutral"])
        shapes = [vertices(files.get(name, files["neutral"])) for name in ARKIT_NAMES]
        deltas = np.stack(shapes) - neutral  # (C, V, 3)
        height = np.ptp(neutral[:, 1])
    except (ValueError, IndexError) as error:
        raise SystemExit(f"--rig {folder}: {error}; expected equal numbers of vertices \"v x y z\"")
    # OBJ knows no units, but a face is 10 to 60 cm high. Lips are what a lip shape moves by half of
    # its largest displacement or more.
    unit = next((unit for unit, size in UNITS.items() if 100 <= height * size <= 600), "mm")
    deltas *= UNITS[unit]  # mm
    moved = np.linalg.norm(deltas[LIP_SHAPES], axis=2)  # (4, V)
    lips = (moved >= moved.max(axis=1, keepdims=True) / 2).any(axis=0)
    return deltas, lips, unit

def vertex_errors(predicted: np.ndarray, true: np.ndarray, rig: tuple) -> dict:
    """Errors in mm between the faces that two (N, C) drive: L2 distance, mean over vertices, and
    the largest of an image's lips, then the mean (CodeTalker, arXiv 2301.02379)."""
    deltas, lips, _ = rig
    mean, lip = [], []
    for error in predicted - true:  # (C,)
        distance = np.linalg.norm(np.tensordot(error, deltas, axes=1), axis=1)  # (V,)
        mean.append(distance.mean())
        lip.append(distance[lips].max())
    return {"vertex_mm": np.mean(mean).item(), "lip_mm": np.mean(lip).item()}

# ---- Reading -------------------------------------------------------------------------------------
# check_coefficients stands word for word in distill.py: scripts share no code.
def check_coefficients(coefficients: dict) -> None:
    """Raises ValueError unless there are the 52 ARKit names, each with a number from 0 to 1."""
    different = sorted(set(coefficients) ^ set(ARKIT_NAMES), key=str)
    if different:
        raise ValueError(f"{str(different[:3]):.120} missing or unknown; expected 52 ARKit names")
    for name, value in coefficients.items():
        if type(value) not in (int, float) or not 0 <= value <= 1:  # True and NaN are neither
            raise ValueError(f"{name} is {value!r:.40}; expected a number from 0 to 1")

def read_records(path: Path, allow_errors: bool = False) -> dict[str, dict]:
    """Records by the real path of their image, with arrays (C,) of coefficients and std. SystemExit
    names an unusable or repeated line, a record with "error" passes if `allow_errors`."""
    if not path.is_file() or not path.stat().st_size:
        raise SystemExit(f"{path} does not exist or is empty; expected prediction or label records")
    records = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                image = os.path.realpath(path.parent / record["image"])
                if image in records:
                    raise ValueError(f"a second record of {record['image']:.200}")
                failed = allow_errors and record.get("error")
                for field in ("coefficients", "std") if record.get("std") else ("coefficients",):
                    if not failed:
                        check_coefficients(record[field])
                        record[field] = np.array([record[field][name] for name in ARKIT_NAMES])
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"{path}, line {number}: {type(error).__name__} {str(error):.400};"
                                 " expected a record with image and coefficients")
            records[image] = record
    return records

# ---- Table and plot ------------------------------------------------------------------------------
def print_report(results: dict) -> None:
    """Prints the table that `results` holds."""
    first = results["models"][results["predictions"][0]]
    columns = {name: column for name, column in COLUMNS.items() if name in first}

    def row(label: str, values: dict) -> None:
        cells = [f"{round(values[name], digits) + 0.0:11.{digits}f}" if name in values else " " * 11
                 for name, (_, digits) in columns.items()]  # + 0.0: no -0.000
        print(f"{label[-24:]:24s}{''.join(cells)}")

    print(f"{results['images']} pictures, {results['errors']} without prediction and left out")
    print(" " * 24 + "".join(f"{title:>11s}" for title, _ in columns.values()))
    for name, values in results["models"].items():
        row(name, values)
        (low, high), (low2, high2) = (results["intervals"][name][m] for m in ("mae", "rmse"))
        print(f"    95%: MAE {low:.4f} to {high:.4f}, RMSE {low2:.4f} to {high2:.4f}")
    for name, values in results["baselines"].items():
        row(name, values)
    for region, values in results["by_region"].items():
        row(f"  {region} ({len(REGIONS[region])})", values)
    for value, values in list(results["by"].items())[:20]:
        row(f"  {value} ({values['images']})", values)
    each = results["by_coefficient"]
    ranked = sorted((name for name in each if each[name]["pearson"] is not None),
                    key=lambda name: each[name]["pearson"])
    shown = [f"{name} {each[name]['pearson']:.2f}" for name in ranked]
    print(f"worst r: {', '.join(shown[:4])}; best: {', '.join(shown[-4:])}")
    if "training mean" in results["baselines"]:
        ratio = first["rmse"] / results["baselines"]["training mean"]["rmse"]
        print(f"RMSE is {ratio:.2f} of the training mean's (1.00: nothing was learnt)")
    if results["description"]:
        d = results["description"]
        print(f"description: category agrees in {d['expression_category']:.0%}, symmetry in "
              f"{d['symmetry']:.0%}; words of the movements: precision {d['precision']:.2f}, "
              f"recall {d['recall']:.2f}, F1 {d['f1']:.2f}")
    if results["uncertainty"]:
        u = results["uncertainty"]
        print(f"active coefficients: Spearman's correlation of deviation and error "
              f"{u['spearman']:.2f}; {u['within_1_std']:.0%} of the errors within one deviation, "
              f"{u['within_2_std']:.0%} within two")
    for name, difference in results["differences"].items():
        for metric, (low, high) in difference.items():
            verdict = "no clear difference"
            if low > 0 or high < 0:
                verdict = "higher" if low > 0 else "lower"
            print(f"{name}: {COLUMNS[metric][0]} {low:+.4f} to {high:+.4f}, {verdict}")

def draw_plot(results: dict, predicted: np.ndarray, true: np.ndarray) -> Image.Image:
    """One picture: error and r by coefficient, predicted against true, intervals by region."""
    chart = Image.new("RGB", (1800, 1180), "white")
    draw = ImageDraw.Draw(chart)
    small, large = ImageFont.load_default(15), ImageFont.load_default(24)
    draw.text((30, 20), "RMSE by coefficient (line: baseline)", INK, large)
    draw.text((520, 20), "Pearson r", INK, large)
    each, top, step = results["by_coefficient"], 84, 20.6
    longest = max(max(values["rmse"], values["baseline"]) for values in each.values()) or 1.0
    for row, (name, values) in enumerate(each.items()):
        y = top + step * row
        draw.text((185, y), name, INK, small, anchor="rm")
        draw.rectangle([195, y - 6, 195 + 270 * values["rmse"] / longest, y + 6], BLUE)
        x = 195 + 270 * values["baseline"] / longest
        draw.line([x, y - 9, x, y + 9], INK, 2)
        draw.line([520, y, 720, y], GRID, 1)
        if values["pearson"] is not None:
            x = 520 + 200 * max(values["pearson"], 0)
            draw.ellipse([x - 5, y - 5, x + 5, y + 5], BLUE)
    for r in (0, 0.5, 1):
        draw.text((520 + 200 * r, top + step * 52), f"{r:.1f}", INK, small, anchor="mm")
    draw.text((790, 20), "Predicted against true, the six most active", INK, large)
    chosen = np.linspace(0, len(true) - 1, min(len(true), 600)).astype(int)
    for panel, k in enumerate(np.argsort(-true.mean(axis=0))[:6]):
        x0, y0 = 800 + 330 * (panel % 3), 90 + 330 * (panel // 3)
        draw.rectangle([x0, y0, x0 + 270, y0 + 270], outline=GREY)
        draw.line([x0, y0 + 270, x0 + 270, y0], GREY, 1)
        draw.text((x0 + 135, y0 + 285), ARKIT_NAMES[k], INK, small, anchor="mm")
        for t, p in zip(true[chosen, k], predicted[chosen, k]):
            x, y = x0 + 270 * t, y0 + 270 * (1 - p)
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], BLUE)
    draw.text((790, 780), "RMSE by region, 95% intervals (grey: baseline)", INK, large)
    regions = results["by_region"]
    longest = max(max(v["interval"][1], v["baseline"]) for v in regions.values()) or 1.0
    for row, (region, values) in enumerate(regions.items()):
        y = 845 + 44 * row
        draw.text((890, y), region, INK, small, anchor="rm")
        draw.rectangle([905, y + 5, 905 + 800 * values["baseline"] / longest, y + 15], GREY)
        draw.rectangle([905, y - 11, 905 + 800 * values["rmse"] / longest, y + 3], BLUE)
        low, high = (905 + 800 * end / longest for end in values["interval"])
        draw.line([low, y - 4, high, y - 4], INK, 3)
        draw.text((high + 10, y - 4), f"{values['rmse']:.3f}", INK, small, anchor="lm")
    return chart

# ---- The stage itself ----------------------------------------------------------------------------
def main(args: argparse.Namespace) -> None:
    """Runs the stage."""
    *files, truth_file = args.files + ["predictions.jsonl", "data/demo/val.jsonl"][len(args.files):]
    if args.plot and Path(args.plot).suffix.lower() != ".png":
        raise SystemExit(f"--plot {args.plot}: expected a file that ends in .png")
    rig = read_rig(Path(args.rig)) if args.rig else None
    runs = {file: read_records(Path(file), allow_errors=True) for file in files}
    truth = read_records(Path(truth_file))
    for file, run in runs.items():
        usable = {image for image, record in run.items() if not record.get("error")}
        missing, extra = sorted(truth.keys() - run.keys()), sorted(usable - truth.keys())
        if missing or extra:
            raise SystemExit(f"{file}: {len(missing)} pictures have no prediction "
                             f"{str(missing[:2]):.150}, {len(extra)} predictions have no truth "
                             f"{str(extra[:2]):.150}; run infer.py on the truth file")
    images = [image for image in truth if not any(run[image].get("error") for run in runs.values())]
    if not images:
        raise SystemExit(f"{files[0]}: none of {len(truth)} pictures has a prediction")
    true_records = [truth[image] for image in images]
    if args.by and args.by not in true_records[0]:
        raise SystemExit(f"--by {args.by}: no such field among {', '.join(true_records[0]):.300}")
    true = np.stack([record["coefficients"] for record in true_records])  # (N, C)
    predicted = {file: np.stack([run[image]["coefficients"] for image in images])
                 for file, run in runs.items()}
    baselines = {"zeros": np.zeros_like(true)}
    train_file = Path(args.train or Path(truth_file).with_name("train.jsonl"))
    if args.train or train_file.is_file():
        train = np.stack([record["coefficients"] for record in read_records(train_file).values()])
        baselines["training mean"] = np.broadcast_to(train.mean(axis=0), true.shape)
    results = {"predictions": files, "truth": truth_file, "images": len(truth),
               "errors": len(truth) - len(images), "by": {}, "uncertainty": {},
               "models": {file: metrics(values, true) for file, values in predicted.items()},
               "baselines": {name: metrics(values, true) for name, values in baselines.items()}}
    people = [str(record.get("identity", image)) for record, image in zip(true_records, images)]
    errors = {file: values - true for file, values in predicted.items()}
    results |= intervals(errors, people, args.seed)
    if rig:
        for values, arrays in ((results["models"], predicted), (results["baselines"], baselines)):
            for name, array in arrays.items():
                values[name] |= vertex_errors(array, true, rig)
        results["rig_unit"] = rig[2]

    # What follows is of the first file alone.
    first, records = predicted[files[0]], [runs[files[0]][image] for image in images]
    results["description"] = agreement(records, true_records)
    if all(record.get("std") is not None for record in records) and (true >= ACTIVE).any():
        std = np.stack([record["std"] for record in records])
        results["uncertainty"] = uncertainty(std, first, true)
    baseline = list(baselines.values())[-1]
    r, ccc = correlations(first, true)
    each = {"mae": np.abs(first - true).mean(axis=0), "pearson": r, "ccc": ccc,
            "rmse": np.sqrt(((first - true) ** 2).mean(axis=0)),
            "baseline": np.sqrt(((baseline - true) ** 2).mean(axis=0))}  # (C,) each
    each = {metric: [None if np.isnan(value) else float(value) for value in values]
            for metric, values in each.items()}
    results["by_coefficient"] = {name: {metric: values[k] for metric, values in each.items()}
                                 for k, name in enumerate(ARKIT_NAMES)}
    results["by_region"] = {region: {
        **metrics(first[:, columns], true[:, columns]),
        "interval": results["region_intervals"][region],
        "baseline": metrics(baseline[:, columns], true[:, columns])["rmse"]}
        for region, columns in REGIONS.items()}
    if args.by:
        values = np.array([str(record.get(args.by)) for record in true_records])
        results["by"] = {str(value): {"images": int((values == value).sum()),
                                      **metrics(first[values == value], true[values == value])}
                         for value in np.unique(values)}
    print_report(results)
    for path in filter(None, (args.out, args.plot)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw_plot(results, first, true).save(args.plot)
    print(f"wrote {' and '.join(filter(None, (args.out, args.plot)))}")
    print(f"next: python annotate.py {files[0]} --render --out avatars")

if __name__ == "__main__":
    main(parse_args())
