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

Shapes: N images, C = 52 coefficients, G groups, R resamplings, K columns, V vertices.
"""
import json
import os
import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

import numpy as np
from numpy import ndarray
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
REGIONS = {}  # the columns of each region
for region in ("brow", "eye", "nose", "cheek", "mouth", "jaw", "tongue"):
    columns = [k for k, name in enumerate(ARKIT_NAMES) if name.startswith(region)]
    REGIONS[region + ("s" if region in ("brow", "eye", "cheek") else "")] = columns
ACTIVE = 0.15  # from here on an action counts as active, as in annotate.py
LEFT = [k for k, name in enumerate(ARKIT_NAMES)
        if name.endswith("Left") and name not in ("jawLeft", "mouthLeft")]  # 18 pairs
RIGHT = [ARKIT_NAMES.index(ARKIT_NAMES[k].replace("Left", "Right")) for k in LEFT]
TINY = 1e-14  # a variance below counts as none
RESAMPLES = 1000  # bootstrap samples
LIP_SHAPES = [ARKIT_NAMES.index(name) for name in
              ("mouthRollUpper", "mouthRollLower", "mouthFunnel", "mouthPucker")]
# What is shown of a comparison: its key, its title, digits behind the point.
COLUMNS = [("mae", "MAE", 4), ("rmse", "RMSE", 4), ("pearson_median", "median r", 3),
           ("pearson_above_0.8", "r > 0.8", 0), ("ccc", "CCC", 3), ("f1", "F1", 3),
           ("asymmetry", "left-right", 4), ("vertex_mm", "vertex mm", 2), ("lip_mm", "lip mm", 2)]
BLUE, GREY, INK = "#0072b2", "#aaaaaa", "#282828"

def parse_args(argv=None) -> Namespace:
    """Reads the command line, or `argv`."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="predictions, one file or several to compare, "
        "then the truth (default: predictions.jsonl data/demo/val.jsonl)")
    add("--train", help="records for the mean baseline (default: train.jsonl beside the truth)")
    add("--by", help="also by the values of this field of the truth, such as identity; None is "
        "the row of records without it")
    add("--rig", help="folder of Neutral.obj and an OBJ file a shape: adds errors in millimetres")
    add("--plot", help="also draw the results into this picture (.png)")
    add("--seed", type=int, default=0, help="of the bootstrap (default %(default)s)")
    add("--out", default="metrics.json", help="file for every number (default %(default)s)")
    return parser.parse_args(argv)

# ---- Metrics -------------------------------------------------------------------------------------
def metrics(predicted: ndarray, true: ndarray) -> dict:
    """Compares two arrays (N, C) of coefficients, 0 to 1. C is 52 or a part of them.

    mae, rmse: mean absolute and root mean squared error
    f1: of "active", which is 0.15 or more. 0 where nothing is, even if that is right
    pearson_median, pearson_mean, pearson_above_0.8 (how many), ccc (the mean): of the coefficients
        whose truth varies, see correlations(). Where none does, these are left out
    constant: how many do not vary
    asymmetry: mean absolute error of left minus right over the 18 pairs, if C is 52
    """
    error = predicted - true  # (N, C)
    is_active = true >= ACTIVE
    is_found = predicted >= ACTIVE
    hits = (is_active & is_found).sum()
    result = {"mae": np.abs(error).mean(),
              "rmse": np.sqrt((error ** 2).mean()),
              "f1": 2 * hits / max(is_active.sum() + is_found.sum(), 1)}

    r, ccc = correlations(predicted, true)  # (C,)
    varies = ~np.isnan(r)
    result["constant"] = (~varies).sum()
    if varies.any():
        result["pearson_median"] = np.median(r[varies])
        result["pearson_mean"] = r[varies].mean()
        result["pearson_above_0.8"] = (r[varies] > 0.8).sum()
        result["ccc"] = ccc[varies].mean()

    if true.shape[1] == len(ARKIT_NAMES):
        result["asymmetry"] = np.abs(error[:, LEFT] - error[:, RIGHT]).mean()
    return {name: value.item() for name, value in result.items()}

def correlations(predicted: ndarray, true: ndarray) -> tuple:
    """Pearson's r and the concordance correlation (CCC), each (C,), of the columns of two arrays
    (N, C). NaN where the truth does not vary.

    r = s_xy / (s_x s_y), CCC = 2 s_xy / (s_x^2 + s_y^2 + (m_x - m_y)^2) (Lin 1989), where x is
    predicted, y is true, s_xy their covariance, s a deviation and m a mean.
    """
    mean_x, mean_y = predicted.mean(axis=0), true.mean(axis=0)  # (C,)
    x = predicted - mean_x  # (N, C)
    y = true - mean_y
    covariance = (x * y).mean(axis=0)  # (C,)
    var_x = (x * x).mean(axis=0)
    var_y = (y * y).mean(axis=0)
    gap = mean_x - mean_y
    with np.errstate(divide="ignore", invalid="ignore"):
        r = covariance / np.sqrt(var_x * var_y)
        ccc = 2 * covariance / (var_x + var_y + gap ** 2)

    # A prediction that never varies has seen nothing. Where the truth never does, there is no r.
    r[var_x <= TINY] = 0
    r[var_y <= TINY] = np.nan
    ccc[var_y <= TINY] = np.nan
    return r, ccc

def uncertainty(std: ndarray, predicted: ndarray, true: ndarray) -> dict:
    """How deviations (N, C) tell the absolute errors, where the truth is active.

    Their Spearman correlation, and the share of errors within one and two deviations, which is 68%
    and 95% for a normal distribution. Empty if nothing is active.
    """
    is_active = true >= ACTIVE
    if not is_active.any():
        return {}
    std = std[is_active]  # (active,)
    error = np.abs(predicted - true)[is_active]
    return {"spearman": spearman(std, error),
            "within_1_std": (error <= std).mean().item(),
            "within_2_std": (error <= 2 * std).mean().item()}

def spearman(a: ndarray, b: ndarray) -> float:
    """Spearman's rank correlation of two arrays (N,), ties at their mean rank; 0 if constant."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        # Of equal values cumsum is the last rank, from which it is half way back to the mean.
        mean_ranks = counts.cumsum() - (counts - 1) / 2  # of each distinct value
        ranks.append(mean_ranks[inverse])
    if min(map(np.ptp, ranks)) == 0:
        return 0.0
    return np.corrcoef(*ranks)[0, 1].item()

# ---- Intervals -----------------------------------------------------------------------------------
def bootstrap(columns: dict, groups: ndarray, seed: int) -> dict:
    """Means of each column (N,) in R bootstrap samples, (R,) each.

    Whole groups are drawn, as images of one person are alike (Efron & Tibshirani 1993, Ch. 8).
    `groups` (N,) holds the number of the group that an image belongs to.
    """
    rng = np.random.default_rng(abs(seed))  # numpy takes no negative ones
    sums = np.stack([np.bincount(groups, column) for column in columns.values()])  # (K, G)
    sizes = np.bincount(groups)  # (G,)
    means = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(sizes), size=len(sizes))
        times = np.bincount(drawn, minlength=len(sizes))  # (G,)
        means.append(sums @ times / (sizes @ times))
    return dict(zip(columns, np.transpose(means)))

def interval(samples: ndarray) -> list:
    """The 95% percentile interval of R samples (Efron & Tibshirani 1993, Ch. 13)."""
    return np.percentile(samples, (2.5, 97.5)).tolist()

def intervals(errors: dict, people: list, seed: int) -> dict:
    """95% intervals of each file's MAE and RMSE, and of its paired differences from the first file.

    `errors` are arrays (N, C) by file, `people` says whose image each of the N is. With fewer than
    five people, images are resampled instead.
    """
    names, groups = np.unique(people, return_inverse=True)  # (G,), (N,)
    resampled = f"{len(names)} identities: people or, where nobody was named, takes and pictures"
    if len(names) < 5:
        groups = np.arange(len(people))
        resampled = f"{len(people)} pictures, since there are fewer than five identities"

    # What is averaged over the images of a sample.
    columns = {}
    for file, error in errors.items():
        columns[file, "mae"] = np.abs(error).mean(axis=1)  # (N,)
        columns[file, "mse"] = (error ** 2).mean(axis=1)
    means = bootstrap(columns, groups, seed)

    result = {"resampled": resampled, "intervals": {}, "differences": {}}
    base = next(iter(errors))
    for file in errors:
        mae, rmse = means[file, "mae"], np.sqrt(means[file, "mse"])  # (R,)
        result["intervals"][file] = {"mae": interval(mae), "rmse": interval(rmse)}
        if file != base:
            result["differences"][f"{file} minus {base}"] = {
                "mae": interval(mae - means[base, "mae"]),
                "rmse": interval(rmse - np.sqrt(means[base, "mse"]))}
    return result

# ---- Descriptions --------------------------------------------------------------------------------
def count_words(description: dict) -> Counter:
    """How often each word occurs in the movements of a description."""
    return Counter(re.findall(r"\w+", str(description.get("muscle_movements")).lower()))

def agreement(predictions: list, truth: list) -> dict:
    """Compares N descriptions. Empty if there are none.

    expression_category, symmetry: shares that agree word for word
    precision, recall, f1: of the words of the movements, counted over all descriptions
    """
    pairs = [(p["description"], t["description"]) for p, t in zip(predictions, truth)
             if type(p.get("description")) is type(t.get("description")) is dict]
    if not pairs:
        return {}
    same, predicted, true, common = Counter(), 0, 0, 0
    for p, t in pairs:
        same.update(field for field in t if p.get(field) == t[field])
        p_words, t_words = count_words(p), count_words(t)
        predicted += p_words.total()
        true += t_words.total()
        common += (p_words & t_words).total()
    return {"expression_category": same["expression_category"] / len(pairs),
            "symmetry": same["symmetry"] / len(pairs),
            "precision": common / max(predicted, 1),
            "recall": common / max(true, 1),
            "f1": 2 * common / max(predicted + true, 1)}

# ---- Perceptual error: the face that the coefficients drive --------------------------------------
def read_vertices(path: Path) -> ndarray:
    """The vertices (V, 3) of an OBJ file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return np.array([line.split()[1:4] for line in lines if line.startswith("v ")], dtype=float)

def read_rig(folder: Path) -> tuple:
    """Reads Neutral.obj and an OBJ file for each shape. SystemExit if one is missing or different.

    Returns displacements (C, V, 3) in mm and which vertices are lips (V,).
    """
    files = {}
    for path in folder.glob("*.obj"):
        name = re.sub("_L$", "Left", re.sub("_R$", "Right", path.stem))
        files[name[:1].lower() + name[1:]] = path
    try:
        neutral = read_vertices(files["neutral"])  # (V, 3)
        files.setdefault("tongueOut", files["neutral"])  # many rigs have no tongue
        shapes = [read_vertices(files[name]) for name in ARKIT_NAMES]
        deltas = np.stack(shapes) - neutral  # (C, V, 3)
    except (KeyError, ValueError) as error:
        raise SystemExit(f"--rig {folder}: {error}; expected Neutral.obj and an .obj a shape, with "
                         'equal numbers of vertices "v x y z"')

    # OBJ knows no units, but a face is 10 to 60 cm high.
    height = np.ptp(neutral[:, 1])
    for size in (1.0, 10.0, 1000.0):  # millimetres: if the unit is mm, cm or m
        if 100 <= height * size <= 600:
            deltas = deltas * size
            break
    else:
        raise SystemExit(f"--rig {folder}: Neutral.obj is {height:.3g} high; expected a face, y "
                         "up, in mm, cm or m")

    # Lips are what a lip shape moves by more than half of its largest displacement.
    moved = np.linalg.norm(deltas[LIP_SHAPES], axis=2)  # (4, V)
    farthest = moved.max(axis=1, keepdims=True)  # (4, 1)
    is_lip = (moved > farthest / 2).any(axis=0)  # (V,)
    return deltas, is_lip

def vertex_errors(predicted: ndarray, true: ndarray, rig: tuple) -> dict:
    """Errors in mm between the faces that two arrays (N, C) drive.

    vertex_mm: L2 distance, mean over vertices and images
    lip_mm: the largest distance of an image's lips, mean over images (CodeTalker, arXiv 2301.02379,
        whose code squares it)
    """
    deltas, is_lip = rig
    means, lips = [], []
    for error in predicted - true:  # (C,)
        displacement = np.tensordot(error, deltas, axes=1)  # (V, 3)
        distance = np.linalg.norm(displacement, axis=1)  # (V,)
        means.append(distance.mean())
        lips.append(distance[is_lip].max())
    return {"vertex_mm": np.mean(means).item(), "lip_mm": np.mean(lips).item()}

# ---- Reading and matching ------------------------------------------------------------------------
# check_coefficients stands word for word in distill.py: scripts share no code.
def check_coefficients(coefficients: dict) -> None:
    """Raises ValueError or KeyError unless the 52 ARKit names have a number from 0 to 1 each."""
    if len(coefficients) != len(ARKIT_NAMES):
        raise ValueError(f"{len(coefficients)} coefficients; expected the 52 ARKit names")
    for name in ARKIT_NAMES:
        value = coefficients[name]
        if type(value) not in (int, float) or not 0 <= value <= 1:  # True and NaN are neither
            raise ValueError(f"{name} is {value!r:.40}; expected a number from 0 to 1")

def to_array(coefficients: dict) -> ndarray:
    """The coefficients as (C,), in the order of ARKIT_NAMES, after a check."""
    check_coefficients(coefficients)
    return np.array([coefficients[name] for name in ARKIT_NAMES])

def read_records(path: Path) -> list[dict]:
    """Records with the real path of their image and, without "error", arrays (C,) of coefficients
    and, if there is one, std. SystemExit names a line that cannot be used."""
    records, number = [], 0
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                record["image"] = os.path.realpath(path.parent / record["image"])
                if not record.get("error"):
                    record["coefficients"] = to_array(record["coefficients"])
                    record["std"] = to_array(record["std"]) if record.get("std") else None
                records.append(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}, line {number}: {error!s:.400}; expected a record with image and "
                         "coefficients")
    if not records:
        raise SystemExit(f"{path} is empty; expected prediction or label records")
    return records

def by_image(file: str) -> dict:
    """The records of a file by the real path of their image. SystemExit if one comes twice."""
    found = {}
    for record in read_records(Path(file)):
        image = record["image"]
        if image in found:
            raise SystemExit(f"{file}: a second record of {image:.300}")
        found[image] = record
    return found

def match(runs: dict, truth: dict) -> list:
    """The images that all runs have predicted. SystemExit if a run lacks some of the truth's or
    has others. A picture that failed needs no truth."""
    images = [image for image in truth if not truth[image].get("error")]
    for file, run in runs.items():
        failed = {image for image in run if run[image].get("error")}
        missing = truth.keys() - run.keys()
        extra = run.keys() - truth.keys() - failed
        if missing or extra:
            raise SystemExit(f"{file}: {len(missing)} pictures have no prediction, {len(extra)} "
                             f"predictions have no truth, as {min(missing | extra):.200}; run "
                             "infer.py on the truth file, without --limit")
        images = [image for image in images if image not in failed]
    if not images:
        raise SystemExit(f"none of the {len(truth)} pictures has a prediction in every file")
    return images

# ---- Comparing -----------------------------------------------------------------------------------
def stack(records: list, field: str = "coefficients") -> ndarray:
    """The arrays (C,) of N records as one (N, C)."""
    return np.stack([record[field] for record in records])

def compare(runs: dict, truth: list, baselines: dict, rig: tuple | None, args: Namespace) -> dict:
    """All results.

    `runs` are N records a file, of which the first file is looked at in detail. `truth` is N
    records, `baselines` are arrays (N, C) by name.
    """
    true = stack(truth)  # (N, C)
    predicted = {file: stack(records) for file, records in runs.items()}
    results = {"models": {}, "baselines": {}}
    for part, arrays in (("models", predicted), ("baselines", baselines)):
        for name, array in arrays.items():
            results[part][name] = metrics(array, true)
            if rig:
                results[part][name] |= vertex_errors(array, true, rig)
    people = [str(record.get("identity", record["image"])) for record in truth]
    errors = {file: array - true for file, array in predicted.items()}  # (N, C) each
    results |= intervals(errors, people, args.seed)

    # What follows is of the first file alone, beside the last baseline, the training mean if known.
    records, *_ = runs.values()
    first, *_ = predicted.values()
    *_, baseline = baselines.values()
    results["description"] = agreement(records, truth)
    results["uncertainty"] = {}
    if all(record["std"] is not None for record in records):
        results["uncertainty"] = uncertainty(stack(records, "std"), first, true)

    results["by_region"] = {}
    for region, columns in REGIONS.items():
        results["by_region"][region] = metrics(first[:, columns], true[:, columns])

    # Correlations are None where the truth does not vary.
    results["by_coefficient"] = {}
    for k, name in enumerate(ARKIT_NAMES):
        values = metrics(first[:, [k]], true[:, [k]])
        before = metrics(baseline[:, [k]], true[:, [k]])
        results["by_coefficient"][name] = {"pearson": values.get("pearson_median"), "ccc": None,
                                           "baseline": before["rmse"], **values}

    results["by"] = {}
    if args.by:
        if not any(args.by in record for record in truth):
            raise SystemExit(f"--by {args.by}: no record of the truth has that field")
        values = np.array([str(record.get(args.by)) for record in truth])
        for value in np.unique(values).tolist():
            chosen = values == value
            results["by"][value] = metrics(first[chosen], true[chosen]) | {
                "images": int(chosen.sum())}
    return results

# ---- Table and plot ------------------------------------------------------------------------------
def print_report(results: dict) -> None:
    """Prints what `results` holds."""
    # A row for each file, baseline, region and value of --by, with the columns that the first has.
    rows = results["models"] | results["baselines"]
    for part in (results["by_region"], results["by"]):
        rows |= {f"  {name}": values for name, values in part.items()}
    first, *_ = rows.values()
    columns = [column for column in COLUMNS if column[0] in first]

    print(f"{results['images']} pictures, {results['errors']} without prediction and left out; "
          "what is indented, and below the intervals, is of the first file")
    titles = [f"{title:>11s}" for _, title, _ in columns]
    print(" " * 24 + "".join(titles))
    for label, values in rows.items():
        cells = []
        for key, _, digits in columns:
            cells.append(f"{values[key]:z11.{digits}f}" if key in values else " " * 11)
        print(f"{label[-24:]:24s}" + "".join(cells))

    # Below it the rest.
    print(f"95% intervals, resampling {results['resampled']}")
    for name, both in (results["intervals"] | results["differences"]).items():
        for metric, (low, high) in both.items():
            print(f"    {metric.upper():5s}{low:.4f} to {high:.4f}  {name}")

    for part in ("description", "uncertainty"):
        shown = [f"{name} {value:.2f}" for name, value in results[part].items()]
        print(f"{part}: {', '.join(shown) or 'none'}")

def draw_plot(results: dict, predicted: ndarray, true: ndarray) -> Image.Image:
    """One picture: error and r by coefficient, predicted against true of the most active."""
    chart = Image.new("RGB", (1780, 1180), "white")
    draw = ImageDraw.Draw(chart)
    small, large = ImageFont.load_default(15), ImageFont.load_default(24)
    draw.text((30, 20), "RMSE by coefficient (line: baseline), Pearson r (0: none)", INK, large)
    draw.text((800, 20), "Predicted against true, the nine most active", INK, large)

    # A row for each coefficient: a bar up to its error, a line at the baseline's, and its r.
    each = results["by_coefficient"]
    # In pixels. The longest bar has 420.
    scale = 420 / max(max(values["rmse"], values["baseline"], 0.01) for values in each.values())
    for row, (name, values) in enumerate(each.items()):
        y = 84 + 20.6 * row
        baseline = 195 + scale * values["baseline"]
        draw.text((185, y), name, INK, small, anchor="rm")
        draw.rectangle([195, y - 6, 195 + scale * values["rmse"], y + 6], BLUE)
        draw.line([baseline, y - 9, baseline, y + 9], INK, 2)
        draw.text((690, y), f"{values['pearson'] or 0:.2f}", INK, small, anchor="rm")

    # A panel for each of the most active: a dot a picture, on the diagonal if it is right.
    thinned = slice(None, None, len(true) // 600 + 1)  # to 600 dots a panel at most
    most_active = np.argsort(-true.mean(axis=0))[:9]
    for panel, k in enumerate(most_active):
        left = 800 + 330 * (panel % 3)
        top = 84 + 365 * (panel // 3)
        right, bottom = left + 300, top + 300
        draw.rectangle([left, top, right, bottom], outline=GREY)
        draw.line([left, bottom, right, top], GREY)
        draw.text((left + 150, bottom + 18), ARKIT_NAMES[k], INK, small, anchor="mm")

        x = left + 300 * true[thinned, k]  # (dots,)
        y = bottom - 300 * predicted[thinned, k]
        for box in np.stack([x - 2, y - 2, x + 2, y + 2], axis=1).tolist():
            draw.ellipse(box, BLUE)
    return chart

# ---- The stage itself ----------------------------------------------------------------------------
def main(args: Namespace) -> None:
    """Runs the stage: reads, matches, compares, reports, writes."""
    # What is not named is the demo's: with one FILE, the truth.
    args.files += ["predictions.jsonl", "data/demo/val.jsonl"][len(args.files):]
    *files, truth_file = args.files
    for path in filter(None, (args.out, args.plot)):
        if os.path.realpath(path) in map(os.path.realpath, args.files):
            raise SystemExit(f"{path} is read and would be overwritten; name another file")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    rig = read_rig(Path(args.rig)) if args.rig else None
    runs = {file: by_image(file) for file in files}
    truth = by_image(truth_file)

    images = match(runs, truth)
    runs = {file: [run[image] for image in images] for file, run in runs.items()}
    true_records = [truth[image] for image in images]
    true = stack(true_records)  # (N, C)

    # Predictions that see no picture.
    zeros = np.zeros_like(true)
    baselines = {"zeros": zeros}
    train_file = Path(args.train or Path(truth_file).with_name("train.jsonl"))
    if args.train or train_file.is_file():
        baselines["training mean"] = zeros + stack(read_records(train_file)).mean(axis=0)

    results = compare(runs, true_records, baselines, rig, args)
    results |= {"predictions": files, "truth": truth_file,
                "images": len(truth), "errors": len(truth) - len(images)}
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    print_report(results)
    print(f"every number is in {args.out}")
    if args.plot:
        chart = draw_plot(results, stack(runs[files[0]]), true)
        chart.save(args.plot, "PNG")
    print(f"next: python annotate.py {files[0]} --render --out avatars")

if __name__ == "__main__":
    try:
        main(parse_args())
    except OSError as error:  # a folder in place of a file, no right to write, a full disk
        raise SystemExit(f"{error}; name another file or folder")
