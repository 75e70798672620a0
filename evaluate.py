# SPDX-License-Identifier: MIT
"""Evaluation for SemanticFace (arXiv 2603.14827, Sec. 4): predictions + truth -> metrics with intervals.

Compares predicted with true coefficients, over all images, by face region, by coefficient and by any record
field, and sets beside them the predictors that never look: all zeros, and the mean and median of the training
set. Labels are sparse, so a small MAE alone means little: RMSE and correlation show whether anything was
seen. Several prediction files are compared in pairs: "A beats B" is a difference with an interval.

Reads:  prediction records (.jsonl) of infer.py, label or annotated records (.jsonl) with the truth,
        the training records for the baselines, with --rig a folder of OBJ files for errors in millimetres
Writes: a table, every number of it in a .json file, with --plot one picture
    {"images": 1000, "errors": 0, "model": {"mae": 0.04, "rmse": 0.1, "pearson_median": 0.93, ...},
     "intervals": {"mae": [0.038, 0.042], ...}, "constants": {...}, "by_region": {...}, ...}

    python evaluate.py predictions.jsonl data/demo/val.jsonl --train data/demo/train.jsonl --plot metrics.png

Shapes: N images, C = 52 coefficients, G groups of images, R resamplings, V vertices.
"""
import argparse
import json
import math
import operator
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# ---------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------

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
NAME_SET, PICK = set(ARKIT_NAMES), operator.itemgetter(*ARKIT_NAMES)
REGIONS = {"brows": "brow", "eyes": "eye", "nose": "nose", "cheeks": "cheek", "mouth": "mouth",
           "jaw": "jaw", "tongue": "tongue"}  # how the names of a region start
FIELDS = ["expression_category", "symmetry"]  # compared word for word
ACTIVE = 0.15  # from here on an action counts as seen, as in annotate.py
PAIRS = [(ARKIT_NAMES.index(name), ARKIT_NAMES.index(name.replace("Left", "Right"))) for name in ARKIT_NAMES
         if name.endswith("Left") and name not in ("jawLeft", "mouthLeft")]
RESAMPLES = 1000  # of the bootstrap
MAX_GROUPS = 1000  # more groups than this are merged at random before resampling
UNITS = {"mm": 1.0, "cm": 10.0, "m": 1000.0}  # millimetres
LIP_SHAPES = ["mouthRollUpper", "mouthRollLower", "mouthFunnel", "mouthPucker"]
COLUMNS = {"mae": ("MAE", 8, 4), "rmse": ("RMSE", 8, 4), "pearson_median": ("med. r", 8, 3),
           "pearson_above_0.8": ("r>0.8", 7, 0), "ccc": ("CCC", 7, 3), "icc": ("ICC", 7, 3),
           "f1": ("F1", 7, 3), "asymmetry": ("L-R", 7, 4), "vertex_mm": ("mm", 7, 2),
           "lip_mm": ("lip", 6, 2)}  # of the table: title, width, digits
BLUE, GREY, INK, GRID = (0, 114, 178), (170, 170, 170), (40, 40, 40), (225, 225, 225)


def parse_args(argv=None) -> argparse.Namespace:
    """Reads the command line, or `argv`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="prediction records of infer.py, one file or several to "
        "compare, then the truth; a folder of files stands for a method trained with several seeds "
        "(default: predictions.jsonl data/demo/val.jsonl)")
    add("--train",
        help="records for the mean and median predictors (default: train.jsonl beside TRUTH, if any)")
    add("--by", help="also by the values of this field of the truth, such as identity")
    add("--rig", help="folder of OBJ files, Neutral.obj and one for each shape: adds errors in millimetres")
    add("--plot", help="also draw the results into this picture (.png)")
    add("--seed", type=int, default=0, help="of the bootstrap (default %(default)s)")
    add("--out", default="metrics.json", help="file for every number (default %(default)s)")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------

def read_records(path: Path, allow_errors: bool = False) -> dict[str, dict]:
    """Reads records by the absolute path of their picture. SystemExit names an unusable or repeated line.

    "coefficients" and "std" become arrays (C,), which take a tenth of the memory. A record with "error" set
    passes if `allow_errors`. Others must hold the 52 coefficients, 0 to 1 each.
    """
    if not path.is_file() or path.stat().st_size == 0:
        state = "is empty" if path.is_file() else "does not exist"
        fix = "python infer.py writes predictions, python annotate.py the demo's truth"
        raise SystemExit(f"{path} {state}; expected records, one JSON object a line ({fix})")
    records, folder = {}, str(path.parent.resolve())
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
                image = os.path.normpath(os.path.join(folder, record["image"]))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                fix = "expected one JSON object a line; if cut off, repeat the command that wrote the file"
                raise SystemExit(f"{where}: no record with an \"image\" ({error}); {fix}")
            if image in records:
                raise SystemExit(f"{where}: a second record of {record['image']}; expected one a picture")
            row = row_of(record.get("coefficients"))
            if row is None and not (allow_errors and record.get("error")):
                complain(record.get("coefficients"), where)
            records[image] = {**record, "coefficients": row, "std": row_of(record.get("std"))}
    return records


def row_of(numbers) -> np.ndarray | None:
    """The values of {name: number} in the order of ARKIT_NAMES (C,); None unless all are from 0 to 1."""
    if not isinstance(numbers, dict) or numbers.keys() != NAME_SET:
        return None
    values = PICK(numbers)
    if not set(map(type, values)) <= {int, float} or math.isnan(sum(values)):
        return None
    return np.array(values, dtype=np.float64) if 0 <= min(values) and max(values) <= 1 else None


def complain(coefficients, where: str) -> None:
    """Raises SystemExit, saying what is wrong with coefficients of which `row_of` made nothing."""
    if not isinstance(coefficients, dict) or coefficients.keys() != NAME_SET:
        given = sorted(coefficients.keys() ^ NAME_SET)[:5] if isinstance(coefficients, dict) else coefficients
        raise SystemExit(f"{where}: missing or unknown coefficients {given}; expected the 52 ARKit names")
    for name, value in coefficients.items():
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise SystemExit(f"{where}: {name} is {value!r}; expected a number from 0 to 1")


def files_of(name: str) -> list[Path]:
    """The prediction files that a FILE stands for: itself, or those of the folder, one a training seed."""
    files = sorted(Path(name).glob("*.jsonl")) if Path(name).is_dir() else [Path(name)]
    if not files:
        raise SystemExit(f"{name} holds no .jsonl; expected one prediction file for each training seed")
    return files


def match(predictions: dict, truth: dict) -> None:
    """SystemExit, naming pictures, unless both files have the same ones."""
    missing = [image for image in truth if image not in predictions]
    extra = [image for image in predictions if image not in truth]
    if missing or extra:
        raise SystemExit(f"the files differ: {len(missing)} pictures have no prediction {missing[:3]}, "
                         f"{len(extra)} predictions have no truth {extra[:3]}; expected the same pictures; "
                         "run infer.py on the truth file")


def stack(records: list[dict], field: str = "coefficients") -> np.ndarray:
    """The arrays of records as one (N, C)."""
    return np.stack([record[field] for record in records])


# ---------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------

def group_sums(predicted: np.ndarray, true: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """All that the metrics need, summed over the images of each group: two (N, C) and (N,) -> (G, 12, C).

    Without groups all images are one. Values are taken relative to the truth's mean, which no metric sees but
    which keeps the sums exact.
    """
    groups = np.zeros(len(true), dtype=int) if groups is None else groups
    x, y = predicted - true.mean(axis=0), true - true.mean(axis=0)
    seen, active = predicted >= ACTIVE, true >= ACTIVE
    tilt = np.zeros_like(x)
    left, right = np.array(PAIRS).T if x.shape[1] == len(ARKIT_NAMES) else np.zeros((2, 0), dtype=int)
    tilt[:, left] = np.abs((predicted - true)[:, left] - (predicted - true)[:, right])
    columns = [np.ones_like(x), x, y, x * x, y * y, x * y, np.abs(x - y), (x - y) ** 2,
               seen & active, seen & ~active, ~seen & active, tilt]
    sums = np.zeros((groups.max() + 1, len(columns), x.shape[1]))
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(len(sums)))
    for k, column in enumerate(columns):
        sums[:, k] = np.add.reduceat(column[order].astype(np.float64), starts, axis=0)
    return sums


def per_coefficient(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of each coefficient (..., C) from sums (..., 12, C), NaN where the truth never varies.

    pearson: Pearson's r, 0 where only the prediction is constant.
    ccc: concordance, 2 s_xy / (s_x^2 + s_y^2 + (m_x - m_y)^2) (Lin 1989).
    icc: ICC(3,1) = (MSB - MSE) / (MSB + MSE), prediction and truth as two raters (Shrout & Fleiss 1979).
    """
    n, x, y, xx, yy, xy, absolute, squared = np.moveaxis(sums, -2, 0)[:8]
    var_x, var_y = np.maximum(xx / n - (x / n) ** 2, 0), np.maximum(yy / n - (y / n) ** 2, 0)
    covariance, gap = xy / n - x * y / n ** 2, (x - y) / n
    varies, moves = var_y > 1e-14, var_x > 1e-14
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.where(moves, covariance / np.sqrt(var_x * var_y), 0.0)
        ccc = 2 * covariance / (var_x + var_y + gap ** 2)
        # With two raters, MSB is the variance of their sum over 2, MSE that of their difference over 2.
        icc = 2 * covariance / (var_x + var_y)
    return {"mae": absolute / n, "rmse": np.sqrt(squared / n), "pearson": np.where(varies, r, np.nan),
            "ccc": np.where(varies, ccc, np.nan), "icc": np.where(varies, icc, np.nan)}


def summary(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics over all coefficients, from sums (..., 12, C); see `metrics`."""
    each = per_coefficient(sums)
    images = sums[..., 0, 0]
    hits, false, missed = sums[..., 8:11, :].sum(axis=-1).transpose((-1, *range(sums.ndim - 2)))
    result = {"mae": each["mae"].mean(axis=-1), "rmse": np.sqrt((each["rmse"] ** 2).mean(axis=-1))}
    varying = ~np.isnan(each["pearson"]).all(axis=tuple(range(sums.ndim - 2)))  # (C,)
    if varying.any():
        r = np.where(np.isnan(each["pearson"]), 0.0, each["pearson"])[..., varying]
        result |= {"pearson_median": np.median(r, axis=-1), "pearson_mean": r.mean(axis=-1),
                   "pearson_min": r.min(axis=-1), "pearson_above_0.8": (r > 0.8).sum(axis=-1)}
        for name in ("ccc", "icc"):
            result[name] = np.nan_to_num(each[name][..., varying]).mean(axis=-1)
    result["constant"] = np.full(images.shape, (~varying).sum())
    result["f1"] = 2 * hits / np.maximum(2 * hits + false + missed, 1)
    if sums.shape[-1] == len(ARKIT_NAMES):
        result["asymmetry"] = sums[..., 11, :].sum(axis=-1) / images / len(PAIRS)
    return result


def metrics(predicted: np.ndarray, true: np.ndarray) -> dict:
    """Compares two arrays (N, C), in units of the coefficients.

    mae, rmse: mean absolute and root mean squared error over all images and coefficients.
    pearson_*, ccc, icc: of each coefficient, then median, mean, ... over those whose truth varies; "constant"
    counts the others. f1: of "active" (0.15 or more) over all. asymmetry: mean absolute error of left minus
    right over the pairs.
    """
    return as_numbers(summary(group_sums(predicted, true)[0]))


def as_numbers(values: dict) -> dict:
    """NumPy scalars as plain numbers."""
    counts = ("constant", "pearson_above_0.8")
    return {name: int(value) if name in counts else float(value) + 0.0 for name, value in values.items()}


def by_coefficient(sums: np.ndarray) -> dict[str, dict]:
    """mae, rmse, pearson, ccc and icc (None where the truth never varies) of each, from sums (12, C)."""
    plain = {metric: [None if np.isnan(value) else float(value) for value in values]
             for metric, values in per_coefficient(sums).items()}
    return {name: {metric: values[k] for metric, values in plain.items()}
            for k, name in enumerate(ARKIT_NAMES)}


def numbered(values: list) -> tuple[np.ndarray, list]:
    """The place (N,) of each value among the distinct ones, and these."""
    distinct = list(dict.fromkeys(values))
    places = {value: place for place, value in enumerate(distinct)}
    return np.array([places[value] for value in values]), distinct


def resampled(groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each of G groups occurs in R bootstrap samples (R, G); many groups (N,) are merged."""
    rng = np.random.default_rng(seed)
    if groups.max() >= MAX_GROUPS:
        groups = (rng.permutation(groups.max() + 1) % MAX_GROUPS)[groups]
    count = groups.max() + 1
    return rng.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(float), groups


def bootstrap(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sums (R, 12, C) of bootstrap samples that hold each group with its sums (G, 12, C) as often as
    `weights` (R, G) says."""
    return np.tensordot(weights, sums, axes=1)


def mean_of_seeds(samples: list[dict], seed: int) -> dict:
    """Each metric in R bootstrap samples (R,): the mean over S training seeds, resampled like the people."""
    rng = np.random.default_rng(seed)
    count = len(samples)
    weights = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count  # (R, S)
    stacked = {name: np.stack([one[name] for one in samples], axis=1) for name in samples[0]}  # (R, S)
    return {name: (weights * values).sum(axis=1) for name, values in stacked.items()}


def interval(samples: np.ndarray) -> list[float]:
    """The 95% percentile interval (Efron & Tibshirani 1993, Ch. 13)."""
    return [float(end) for end in np.percentile(samples, (2.5, 97.5))]


def mean_of_dicts(parts: list[dict]) -> dict[str, float]:
    """The mean of each number."""
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def compare(sums: dict[str, list], weights: np.ndarray, seed: int) -> dict:
    """Metrics of each file, with intervals, and paired differences from the first.

    `sums` holds (G, 12, C) for each training seed of each file.
    """
    samples = {file: mean_of_seeds([summary(bootstrap(one, weights)) for one in each], seed)
               for file, each in sums.items()}
    seeds = {file: [as_numbers(summary(one.sum(axis=0))) for one in each] for file, each in sums.items()}
    base, *others = samples
    shown = [name for name in ("mae", "rmse", "pearson_median") if name in samples[base]]
    return {
        "seeds": seeds,
        "models": {file: mean_of_dicts(each) for file, each in seeds.items()},
        "all_intervals": {file: {name: interval(values[name]) for name in shown}
                          for file, values in samples.items()},
        "differences": {f"{file} minus {base}":
                        {name: interval(samples[file][name] - samples[base][name]) for name in shown}
                        for file in others},
    }


def by_part(sums: np.ndarray, blind: np.ndarray, weights: np.ndarray) -> dict:
    """Metrics by coefficient and by region, from sums (G, 12, C), beside those of `blind` sums (12, C)."""
    total, samples, regions = sums.sum(axis=0), bootstrap(sums, weights), {}
    for region, start in REGIONS.items():
        columns = [k for k, name in enumerate(ARKIT_NAMES) if name.startswith(start)]
        regions[region] = {"coefficients": len(columns), **as_numbers(summary(total[:, columns])),
                           "interval": interval(summary(samples[..., columns])["rmse"]),
                           "baseline": float(summary(blind[:, columns])["rmse"])}
    baseline = per_coefficient(blind)["rmse"].tolist()
    return {"by_coefficient": by_coefficient(total), "by_region": regions,
            "baseline_rmse": dict(zip(ARKIT_NAMES, baseline))}


def constants(truth: np.ndarray, train: np.ndarray | None) -> dict[str, np.ndarray]:
    """The predictions (N, C) of those who never look: zeros, and the training mean and median if given."""
    predictors = {"zeros": np.zeros_like(truth)}
    if train is not None:
        predictors["train mean"] = np.broadcast_to(train.mean(axis=0), truth.shape)
        predictors["train median"] = np.broadcast_to(np.median(train, axis=0), truth.shape)
    return predictors


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two arrays (N,), ties at their mean rank."""
    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[inverse]
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def words(record: dict) -> Counter:
    """The words of a description's movements, with their number."""
    return Counter(re.findall(r"\w+", str(record["description"].get("muscle_movements")).lower()))


def agreement(predictions: list[dict], truth: list[dict]) -> dict[str, float]:
    """Share of pictures whose category and symmetry are word for word the truth's, and precision, recall and
    F1 of the words of the movements over all pictures. Nothing where either has no descriptions."""
    pairs = [(p, t) for p, t in zip(predictions, truth)
             if isinstance(p.get("description"), dict) and isinstance(t.get("description"), dict)]
    if not pairs:
        return {}
    result = {}
    for field in FIELDS:
        same = sum(p["description"].get(field) == t["description"].get(field) for p, t in pairs)
        result[field] = same / len(pairs)
    written, right, common = 0, 0, 0
    for p, t in pairs:
        p_words, t_words = words(p), words(t)
        written, right = written + p_words.total(), right + t_words.total()
        common += (p_words & t_words).total()
    return {**result, "movement_precision": common / max(written, 1),
            "movement_recall": common / max(right, 1), "movement_f1": 2 * common / max(written + right, 1)}


# ---------------------------------------------------------------------------------------------------
# Perceptual error: the face that the coefficients drive
# ---------------------------------------------------------------------------------------------------

def read_obj(path: Path) -> np.ndarray:
    """The vertices (V, 3) of an OBJ file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        return np.array([line.split()[1:4] for line in lines if line.startswith("v ")], dtype=float)
    except ValueError:
        raise SystemExit(f"--rig: {path} has a vertex that is not three numbers; expected as v 1.0 0.5 2")


def read_rig(folder: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Displacements (C, V, 3) in mm, which vertices are lips (V,), and the unit the files seem to be in."""
    files = {path.stem[:1].lower() + path.stem[1:]: path for path in sorted(folder.glob("*.obj"))}
    files = {re.sub("_L$", "Left", re.sub("_R$", "Right", name)): path for name, path in files.items()}
    missing = [name for name in ["neutral", *ARKIT_NAMES] if name not in files and name != "tongueOut"]
    if missing:
        raise SystemExit(f"--rig {folder} lacks {missing[:4]}; expected Neutral.obj and one .obj a shape")
    neutral = read_obj(files["neutral"])
    shapes = [read_obj(files[name]) if name in files else neutral for name in ARKIT_NAMES]
    odd = [name for name, shape in zip(ARKIT_NAMES, shapes) if shape.shape != neutral.shape]
    if odd or not len(neutral):
        raise SystemExit(f"--rig {folder}: {odd[:4]} differ from Neutral.obj in the number of vertices")
    height = np.ptp(neutral[:, 1])  # OBJ knows no units, but a face is 10 to 60 cm high
    unit = next((unit for unit, size in UNITS.items() if 100 <= height * size <= 600), "mm")
    deltas = (np.stack(shapes) - neutral) * UNITS[unit]
    moved = np.linalg.norm(deltas[[ARKIT_NAMES.index(name) for name in LIP_SHAPES]], axis=2)  # (4, V)
    lips = (moved >= moved.max(axis=1, keepdims=True) / 2).any(axis=0)
    return deltas, lips, unit


def vertex_errors(predicted: np.ndarray, true: np.ndarray, deltas: np.ndarray, lips: np.ndarray) -> dict:
    """Mean vertex error and lip vertex error in mm between the faces that two (N, C) drive.

    vertex_mm: L2 distance, mean over vertices and images. lip_mm: per image the largest over the lips, not
    squared (as CodeTalker, arXiv 2301.02379, but in mm), then the mean. Lips are the vertices that a shape of
    LIP_SHAPES moves by half of its largest displacement or more.
    """
    mean, lip = [], []
    for start in range(0, len(true), 256):
        difference = (predicted - true)[start:start + 256]
        distance = np.linalg.norm(np.tensordot(difference, deltas, axes=1), axis=2)  # (256, V)
        mean.append(distance.mean(axis=1))
        lip.append(distance[:, lips].max(axis=1))
    return {"vertex_mm": float(np.concatenate(mean).mean()), "lip_mm": float(np.concatenate(lip).mean())}


# ---------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------

def print_report(results: dict) -> None:
    """Prints the table that `results` holds."""
    def row(label: str, values: dict) -> None:
        cells = [f"{round(values[name], digits) + 0.0:{width}.{digits}f}" if name in values else " " * width
                 for name, (_, width, digits) in COLUMNS.items()]
        print(f"{label[-24:]:24s}{''.join(cells)}".rstrip())

    print(f"{results['images']} pictures, {results['errors']} without prediction and left out")
    titles = [f"{title:>{width}s}" for name, (title, width, _) in COLUMNS.items() if name in results["model"]]
    print(" " * 24 + "".join(titles))
    for name, values in results["models"].items():
        row(name if len(results["models"]) > 1 else "model", values)
        ends = [f"{metric} {low:.4f} to {high:.4f}"
                for metric, (low, high) in results["all_intervals"][name].items()]
        print(f"    95%: {', '.join(ends)}")
        if len(results["seeds"][name]) > 1:
            each = ", ".join(f"{values['rmse']:.4f}" for values in results["seeds"][name])
            print(f"    means of {len(results['seeds'][name])} seeds; their rmse: {each}")
    for name, values in results["constants"].items():
        row(name, values)
    for region, values in results["by_region"].items():
        row(f"  {region} ({values['coefficients']})", values)
    if results["by"]:
        ranked = sorted(results["by"].items(), key=lambda item: item[1]["rmse"])
        for name, values in ranked if len(ranked) <= 8 else ranked[:4] + ranked[-4:]:
            row(f"  {name} ({values['images']})", values)
    r = {name: values["pearson"] for name, values in results["by_coefficient"].items()}
    ranked = sorted((name for name in ARKIT_NAMES if r[name] is not None), key=r.get)
    for label, names in (("worst r", ranked[:4]), ("best r", ranked[-4:])):
        print(f"{label}: " + ", ".join(f"{name} {r[name]:.2f}" for name in names))
    if "train mean" in results["constants"]:
        ratio = results["model"]["rmse"] / results["constants"]["train mean"]["rmse"]
        print(f"RMSE is {ratio:.2f} of the training mean's (1.00: nothing was learnt from the pictures)")
    if results["description"]:
        d = results["description"]
        print(f"description: category agrees in {100 * d['expression_category']:.0f}%, symmetry in "
              f"{100 * d['symmetry']:.0f}%; words of the movements: precision {d['movement_precision']:.2f}, "
              f"recall {d['movement_recall']:.2f}, F1 {d['movement_f1']:.2f}")
    if "std_spearman" in results:
        rank = results["std_spearman"]
        print(f"standard deviations rank the errors with Spearman's correlation {rank:.2f}")
    for name, difference in results["differences"].items():
        for metric, (low, high) in difference.items():
            verdict = "no clear difference" if low <= 0 <= high else "lower" if high < 0 else "higher"
            print(f"{name}: {metric} {low:+.4f} to {high:+.4f}, {verdict}")


def draw_plot(results: dict, predicted: np.ndarray, true: np.ndarray) -> Image.Image:
    """One picture: error and correlation by coefficient, predicted against true, and intervals by region."""
    chart = Image.new("RGB", (1800, 1180), "white")
    draw = ImageDraw.Draw(chart)
    small, large = ImageFont.load_default(15), ImageFont.load_default(24)
    baseline = results["baseline_rmse"]
    draw.text((30, 20), "RMSE by coefficient", INK, large)
    draw.text((30, 50), "blue: this model, dark line: never looking", INK, small)
    draw.text((520, 20), "Pearson r", INK, large)
    each = results["by_coefficient"]
    top, step, longest = 84, 20.6, max(*baseline.values(), *(values["rmse"] for values in each.values()))
    for row, (name, values) in enumerate(each.items()):
        y = top + step * row
        draw.text((185, y), name, INK, small, anchor="rm")
        draw.rectangle([195, y - 6, 195 + 270 * values["rmse"] / longest, y + 6], BLUE)
        x = 195 + 270 * baseline[name] / longest
        draw.line([x, y - 9, x, y + 9], INK, 2)
        draw.line([520, y, 720, y], GRID, 1)
        if values["pearson"] is not None:
            x = 520 + 200 * max(values["pearson"], 0)
            draw.ellipse([x - 5, y - 5, x + 5, y + 5], BLUE)
    for r in (0, 0.5, 1):
        draw.text((520 + 200 * r, top + step * 52), f"{r:.1f}", INK, small, anchor="mm")

    draw.text((790, 20), "Predicted against true, the six most active", INK, large)
    for place, k in enumerate(np.argsort(-true.mean(axis=0))[:6]):
        x0, y0 = 800 + 330 * (place % 3), 90 + 330 * (place // 3)
        draw.rectangle([x0, y0, x0 + 270, y0 + 270], outline=GREY)
        draw.line([x0, y0 + 270, x0 + 270, y0], GREY, 1)
        draw.text((x0 + 135, y0 + 285), ARKIT_NAMES[k], INK, small, anchor="mm")
        chosen = np.linspace(0, len(true) - 1, min(len(true), 600)).astype(int)
        for t, p in zip(true[chosen, k], predicted[chosen, k]):
            x, y = x0 + 270 * t, y0 + 270 * (1 - p)
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], BLUE)

    draw.text((790, 770), "RMSE by region, 95% intervals", INK, large)
    draw.text((790, 800), "blue: this model, grey: never looking", INK, small)
    longest = max(max(values["interval"][1], values["baseline"]) for values in results["by_region"].values())
    for row, (region, values) in enumerate(results["by_region"].items()):
        y = 845 + 44 * row
        draw.text((890, y), region, INK, small, anchor="rm")
        draw.rectangle([905, y + 5, 905 + 800 * values["baseline"] / longest, y + 15], GREY)
        draw.rectangle([905, y - 11, 905 + 800 * values["rmse"] / longest, y + 3], BLUE)
        low, high = (905 + 800 * end / longest for end in values["interval"])
        draw.line([low, y - 4, high, y - 4], INK, 3)
        draw.text((high + 10, y - 4), f"{values['rmse']:.3f}", INK, small, anchor="lm")
    return chart


# ---------------------------------------------------------------------------------------------------
# The stage itself
# ---------------------------------------------------------------------------------------------------

def main(args: argparse.Namespace) -> None:
    """Runs the stage."""
    defaults = ["predictions.jsonl", "data/demo/val.jsonl"]
    *files, truth_file = args.files + defaults[len(args.files):]
    files = list(dict.fromkeys(files))
    if args.plot and Path(args.plot).suffix.lower() != ".png":
        raise SystemExit(f"--plot {args.plot}: expected a file that ends in .png")
    rig = read_rig(Path(args.rig)) if args.rig else None
    methods = {file: [read_records(path, allow_errors=True) for path in files_of(file)] for file in files}
    truth = read_records(Path(truth_file))
    runs = [run for method in methods.values() for run in method]
    for run in runs:
        match(run, truth)
    readable = [image for image in truth if not any(run[image].get("error") for run in runs)]
    if not readable:
        raise SystemExit(f"{files[0]}: none of {len(truth)} pictures has a prediction; nothing to compare")
    true_records = [truth[image] for image in readable]
    true = stack(true_records)
    predicted = {file: [stack([run[image] for image in readable]) for run in method]
                 for file, method in methods.items()}
    train_path = Path(args.train) if args.train else Path(truth_file).with_name("train.jsonl")
    train = stack(list(read_records(train_path).values())) if args.train or train_path.is_file() else None
    if args.by and args.by not in true_records[0]:
        raise SystemExit(f"--by {args.by}: the records of {truth_file} have no such field; they have "
                         f"{', '.join(true_records[0])}")

    # Images of one person are alike, so that whole persons are resampled where records name them.
    names = [str(truth[image].get("identity", image)) for image in readable]
    groups, people = numbered(names)
    if len(people) < 5:  # too few to resample
        groups = np.arange(len(readable))
    weights, groups = resampled(groups, args.seed)
    results = {"predictions": files, "truth": truth_file, "images": len(truth),
               "errors": len(truth) - len(readable)}
    sums = {file: [group_sums(values, true, groups) for values in arrays]
            for file, arrays in predicted.items()}
    results |= compare(sums, weights, args.seed)
    # What follows is of the first file alone.
    first, first_records = predicted[files[0]][0], [methods[files[0]][0][image] for image in readable]
    results["description"] = agreement(first_records, true_records)
    if all(record["std"] is not None for record in first_records):
        spread = stack(first_records, "std")
        if spread.std() > 0:
            results["std_spearman"] = spearman(spread.ravel(), np.abs(first - true).ravel())
    unseeing = constants(true, train)
    constant_sums = {name: group_sums(constant, true)[0] for name, constant in unseeing.items()}
    results["constants"] = {name: as_numbers(summary(one)) for name, one in constant_sums.items()}
    blind = constant_sums["zeros" if train is None else "train mean"]
    results |= by_part(sums[files[0]][0], blind, weights)
    results["by"] = {}
    if args.by:
        places, values = numbered([str(record.get(args.by)) for record in true_records])
        for place, value in enumerate(values):
            chosen = places == place
            results["by"][value] = {"images": int(chosen.sum()), **metrics(first[chosen], true[chosen])}
    if rig:
        deltas, lips, results["rig_unit"] = rig
        for file, arrays in predicted.items():
            errors = [vertex_errors(values, true, deltas, lips) for values in arrays]
            results["models"][file] |= mean_of_dicts(errors)
        for name, constant in unseeing.items():
            results["constants"][name] |= vertex_errors(constant, true, deltas, lips)
    results["model"], results["intervals"] = results["models"][files[0]], results["all_intervals"][files[0]]
    print_report(results)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")
    if args.plot:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        draw_plot(results, first, true).save(args.plot)
        print(f"wrote {args.plot}")
    if files == ["predictions.jsonl"]:
        print("next: python annotate.py predictions.jsonl --render --out avatars   # draws the predictions")


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written, run the same command again")
