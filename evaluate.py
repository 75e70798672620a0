# SPDX-License-Identifier: MIT
"""Evaluation for SemanticFace (arXiv 2603.14827, Sec. 4): predictions + truth -> metrics.

Compares predicted with true coefficients, over all images, by face region and by coefficient, and sets
beside them the predictors that never look at the picture: all zeros, and the mean and median of the
training set. Labels are sparse, so a small MAE alone means little; RMSE and correlation show whether
anything was seen.

Reads:  prediction records (.jsonl) of infer.py; label or annotated records (.jsonl) with the truth;
        the training records for the baselines
Writes: a table, and every number of it in a .json file
    {"images": 1000, "errors": 0, "model": {"mae": 0.04, "rmse": 0.1, "pearson_median": 0.93, ...},
     "constants": {"zeros": {...}, ...}, "by_region": {...}, "by_coefficient": {...}}

    python evaluate.py predictions.jsonl data/demo/val.jsonl --train data/demo/train.jsonl

Shapes: N images, C = 52 coefficients.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

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
REGIONS = {"brows": "brow", "eyes": "eye", "nose": "nose", "cheeks": "cheek", "mouth": "mouth",
           "jaw": "jaw", "tongue": "tongue"}  # how the names of a region start
FIELDS = ["expression_category", "symmetry"]  # compared word for word


def parse_args(argv=None) -> argparse.Namespace:
    """Reads the command line, or `argv`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("predictions", nargs="?", default="predictions.jsonl",
        help="prediction records of infer.py (default %(default)s)")
    add("truth", nargs="?", default="data/demo/val.jsonl",
        help="label or annotated records (default %(default)s)")
    add("--train",
        help="records for the mean and median predictors (default: train.jsonl beside TRUTH, if any)")
    add("--out", default="metrics.json", help="file for every number (default %(default)s)")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------

def read_records(path: Path, allow_errors: bool = False) -> dict[str, dict]:
    """Reads records by the absolute path of their picture. SystemExit names an unusable or repeated line.

    A record with "error" set passes if `allow_errors`; others must hold the 52 coefficients, 0 to 1 each.
    """
    if not path.is_file() or path.stat().st_size == 0:
        state = "is empty" if path.is_file() else "does not exist"
        fix = "python infer.py writes predictions, python annotate.py the demo's truth"
        raise SystemExit(f"{path} {state}; expected records, one JSON object a line ({fix})")
    records = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
            image = str((path.parent / record["image"]).absolute().resolve())
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            fix = "expected one JSON object a line; if cut off, repeat the command that wrote the file"
            raise SystemExit(f"{where}: no record with an \"image\" ({error}); {fix}")
        if image in records:
            raise SystemExit(f"{where}: a second record of {record['image']}; expected one a picture")
        if not (allow_errors and record.get("error")):
            check_coefficients(record.get("coefficients"), where)
        records[image] = record
    return records


def check_coefficients(coefficients, where: str) -> None:
    """Raises SystemExit unless `coefficients` holds exactly the 52 names, each a number from 0 to 1."""
    is_dict = isinstance(coefficients, dict)
    if not is_dict or set(coefficients) != set(ARKIT_NAMES):
        given = sorted(set(coefficients) ^ set(ARKIT_NAMES))[:5] if is_dict else coefficients
        raise SystemExit(f"{where}: missing or unknown coefficients {given}; expected the 52 ARKit names")
    for name, value in coefficients.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise SystemExit(f"{where}: {name} is {value!r}; expected a number from 0 to 1")


def match(predictions: dict, truth: dict) -> list[str]:
    """The pictures of both files, in the truth's order. SystemExit if one lacks a picture of the other."""
    missing = [image for image in truth if image not in predictions]
    extra = [image for image in predictions if image not in truth]
    if missing or extra:
        raise SystemExit(f"the files differ: {len(missing)} pictures have no prediction {missing[:3]}, "
                         f"{len(extra)} predictions have no truth {extra[:3]}; expected the same pictures; "
                         "run infer.py on the truth file")
    return list(truth)


def as_array(records: list[dict]) -> np.ndarray:
    """Coefficients of records as an array (N, C)."""
    rows = [[record["coefficients"][name] for name in ARKIT_NAMES] for record in records]
    return np.array(rows, dtype=np.float64)


# ---------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------

def pearson(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pearson's r by column of (N, C) arrays -> (C,): NaN for a constant truth, 0 if only the other is."""
    x, y = predicted - predicted.mean(axis=0), true - true.mean(axis=0)
    x_norm, y_norm = np.sqrt((x ** 2).sum(axis=0)), np.sqrt((y ** 2).sum(axis=0))
    constant = x_norm < 1e-9
    r = (x * y).sum(axis=0) / np.where(constant, 1.0, x_norm) / np.where(y_norm < 1e-9, np.nan, y_norm)
    return np.where(constant & ~np.isnan(r), 0.0, r)


def metrics(predicted: np.ndarray, true: np.ndarray) -> dict:
    """Errors over all images and coefficients of two arrays (N, C).

    Returns mae (mean absolute error) and rmse (root mean squared error) in units of the coefficients, and
    Pearson's r by coefficient as median, mean, minimum and number above 0.8, over the coefficients whose
    truth varies; "constant" counts the others.
    """
    error = predicted - true
    r = pearson(predicted, true)
    varying = r[~np.isnan(r)]
    summary = {"mae": np.abs(error).mean(), "rmse": math.sqrt((error ** 2).mean())}
    summary["constant"] = int(np.isnan(r).sum())
    if len(varying):
        summary |= {"pearson_median": np.median(varying), "pearson_mean": varying.mean(),
                    "pearson_min": varying.min(), "pearson_above_0.8": int((varying > 0.8).sum())}
    return {name: value if isinstance(value, int) else float(value) for name, value in summary.items()}


def by_coefficient(predicted: np.ndarray, true: np.ndarray) -> dict[str, dict]:
    """mae, rmse and Pearson's r (None where the truth never varies) of each coefficient."""
    error, r = predicted - true, pearson(predicted, true)
    mae, rmse = np.abs(error).mean(axis=0), np.sqrt((error ** 2).mean(axis=0))
    correlations = [None if np.isnan(value) else float(value) for value in r]
    return {name: {"mae": float(mae[k]), "rmse": float(rmse[k]), "pearson": correlations[k]}
            for k, name in enumerate(ARKIT_NAMES)}


def constants(truth: np.ndarray, train: np.ndarray | None) -> dict[str, np.ndarray]:
    """The predictions (N, C) of those who never look: zeros, and the training mean and median if given."""
    predictors = {"zeros": np.zeros_like(truth)}
    if train is not None:
        predictors["train mean"] = np.broadcast_to(train.mean(axis=0), truth.shape)
        predictors["train median"] = np.broadcast_to(np.median(train, axis=0), truth.shape)
    return predictors


def agreement(predictions: list[dict], truth: list[dict]) -> dict[str, float]:
    """Share of pictures whose category and symmetry are word for word the truth's, if both have them."""
    pairs = [(p.get("description"), t.get("description")) for p, t in zip(predictions, truth)]
    pairs = [(p, t) for p, t in pairs if isinstance(p, dict) and isinstance(t, dict)]
    if not pairs:
        return {}
    return {field: sum(p.get(field) == t.get(field) for p, t in pairs) / len(pairs) for field in FIELDS}


# ---------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------

def print_report(results: dict) -> None:
    """Prints the table that `results` holds."""
    def row(label: str, m: dict) -> None:
        correlations = ""
        if "pearson_median" in m:
            correlations = f"{m['pearson_median']:10.3f} {m['pearson_mean']:8.3f}"
            correlations += f" {m['pearson_above_0.8']:7d}"
        print(f"{label:22s} {m['mae']:8.4f} {m['rmse']:8.4f} {correlations}")

    print(f"{results['images']} pictures, {results['errors']} unreadable and left out")
    print(f"{'':22s} {'MAE':>8s} {'RMSE':>8s} {'median r':>10s} {'mean r':>8s} {'r > 0.8':>7s}")
    row("model", results["model"])
    for name, values in results["constants"].items():
        row(name, values)
    for region, values in results["by_region"].items():
        row(f"  {region} ({values['coefficients']})", values)
    r = {name: results["by_coefficient"][name]["pearson"] for name in ARKIT_NAMES}
    ranked = sorted((name for name in ARKIT_NAMES if r[name] is not None), key=r.get)
    for label, names in (("worst r", ranked[:5]), ("best r", ranked[-5:])):
        print(f"{label}: " + ", ".join(f"{name} {r[name]:.2f}" for name in names))
    if "train mean" in results["constants"]:
        ratio = results["model"]["rmse"] / results["constants"]["train mean"]["rmse"]
        print(f"RMSE is {ratio:.2f} of the training mean's (1.00: nothing was learnt from the pictures)")
    if results["description"]:
        shares = results["description"].items()
        print("description: " + ", ".join(f"{name} agrees in {100 * share:.0f}%" for name, share in shares))


def main(args: argparse.Namespace) -> None:
    """Runs the stage."""
    predictions = read_records(Path(args.predictions), allow_errors=True)
    truth = read_records(Path(args.truth))
    images = match(predictions, truth)
    readable = [image for image in images if not predictions[image].get("error")]
    if not readable:
        raise SystemExit(f"{args.predictions}: all {len(images)} pictures unreadable; nothing to compare")
    predicted_records = [predictions[image] for image in readable]
    true_records = [truth[image] for image in readable]
    predicted, true = as_array(predicted_records), as_array(true_records)
    train_path = Path(args.train) if args.train else Path(args.truth).with_name("train.jsonl")
    train = None
    if args.train or train_path.is_file():
        train = as_array(list(read_records(train_path).values()))

    columns = {region: [k for k, name in enumerate(ARKIT_NAMES) if name.startswith(start)]
               for region, start in REGIONS.items()}
    results = {
        "predictions": args.predictions, "truth": args.truth,
        "images": len(images), "errors": len(images) - len(readable),
        "model": metrics(predicted, true),
        "constants": {name: metrics(constant, true) for name, constant in constants(true, train).items()},
        "by_region": {region: {"coefficients": len(k), **metrics(predicted[:, k], true[:, k])}
                      for region, k in columns.items()},
        "by_coefficient": by_coefficient(predicted, true),
        "description": agreement(predicted_records, true_records),
    }
    print_report(results)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")
    if args.predictions == "predictions.jsonl":
        print("next: python annotate.py predictions.jsonl --render --out avatars   # draws the predictions")


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written, run the same command again")
