# SPDX-License-Identifier: MIT
"""Evaluation for SemanticFace (arXiv 2603.14827): predictions + truth -> metrics with intervals.

Most coefficients are near zero, so a small MAE means little. RMSE and correlation, next to those of
baselines that see no image, show whether a model uses the image at all.

Reads:  prediction records (.jsonl) from infer.py, in one or more files, and records with the truth
Writes: a table, a .json file with all its numbers and, with --plot, a picture
    {"models": {"predictions.jsonl": {"mae": 0.03, "rmse": 0.08, ...}}, "baselines": {...},
     "intervals": {"predictions.jsonl": {"rmse": [0.078, 0.082]}}, "images": 1320, ...}

    python evaluate.py predictions.jsonl data/demo/val.jsonl --plot metrics.png

Shapes: N images, C = 52 coefficients, G people, R resamplings, V vertices.
"""
import argparse
import json
import os
import re
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont

# The 52 ARKit names in the column order of Live Link Face. Every script repeats this block.
ARKIT_NAMES = """
    eyeBlinkLeft eyeLookDownLeft eyeLookInLeft eyeLookOutLeft eyeLookUpLeft eyeSquintLeft
    eyeWideLeft eyeBlinkRight eyeLookDownRight eyeLookInRight eyeLookOutRight eyeLookUpRight
    eyeSquintRight eyeWideRight jawForward jawRight jawLeft jawOpen mouthClose mouthFunnel
    mouthPucker mouthRight mouthLeft mouthSmileLeft mouthSmileRight mouthFrownLeft mouthFrownRight
    mouthDimpleLeft mouthDimpleRight mouthStretchLeft mouthStretchRight mouthRollLower
    mouthRollUpper mouthShrugLower mouthShrugUpper mouthPressLeft mouthPressRight
    mouthLowerDownLeft mouthLowerDownRight mouthUpperUpLeft mouthUpperUpRight browDownLeft
    browDownRight browInnerUp browOuterUpLeft browOuterUpRight cheekPuff cheekSquintLeft
    cheekSquintRight noseSneerLeft noseSneerRight tongueOut""".split()
# Which part of an array (N, C) belongs to each coefficient and to each region.
COEFFICIENTS = {name: np.s_[:, k:k + 1] for k, name in enumerate(ARKIT_NAMES)}
REGIONS = {"brows": np.s_[:, 41:46], "eyes": np.s_[:, :14], "nose": np.s_[:, 49:51],
           "cheeks": np.s_[:, 46:49], "mouth": np.s_[:, 18:41], "jaw": np.s_[:, 14:18],
           "tongue": np.s_[:, 51:]}
ACTIVE = 0.15  # an action at or above this counts as active, as in annotate.py
VARIANCE_FLOOR = 1e-14  # variances up to this count as zero
RESAMPLES = 1000  # bootstrap samples
DEMO_FILES = ["predictions.jsonl", "data/demo/val.jsonl"]
COLUMNS = {"mae": "MAE", "rmse": "RMSE", "pearson_median": "median r",  # metric: title
           "pearson_above_0.8": "r > 0.8", "ccc": "CCC", "f1": "F1", "vertex": "rig error"}

def parse_args(argv=None) -> Namespace:
    """Parses `argv`, by default the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="one or more files of predictions, then the truth "
        f"(default: {DEMO_FILES}). Regions, words and std are those of the first file")
    add("--train", help="records for the mean baseline (default: train.jsonl next to the truth)")
    add("--by", help="also report by the values of this field of the truth, such as identity")
    add("--rig", help="folder with Neutral.obj and one OBJ file per coefficient, such as "
        "jawOpen.obj: adds the mean vertex error, in the unit of these files")
    add("--plot", help="also plot predicted against true coefficients to this file (.png)")
    add("--out", default="metrics.json", help="file for all numbers (default %(default)s)")
    add("--seed", type=int, default=0, help="seed for the bootstrap (default %(default)s)")
    return parser.parse_args(argv)

# ---- Metrics -------------------------------------------------------------------------------------
def metrics(predicted: ndarray, true: ndarray) -> dict:
    """Returns the errors and correlations of two arrays (N, C), 0 to 1, where C is 52 or fewer.

    mae, rmse: mean absolute error and root mean squared error
    f1: for "active" (0.15 or more) as a binary label, 0 if nothing is active in either array
    pearson_median, pearson_above_0.8 (a count), ccc (a mean): over the coefficients whose truth
        varies, see correlations(). They are missing if none varies.
    """
    error = predicted - true  # (N, C)
    is_active, is_found = true >= ACTIVE, predicted >= ACTIVE
    hits = (is_active & is_found).sum()
    result = {"mae": abs(error).mean(),
              "rmse": np.sqrt((error ** 2).mean()),
              "f1": 2 * hits / max(is_active.sum() + is_found.sum(), 1)}

    r, ccc = correlations(predicted, true)  # (C,)
    varies = ~np.isnan(r)
    if varies.any():
        result["pearson_median"] = np.median(r[varies])
        result["pearson_above_0.8"] = (r[varies] > 0.8).sum()
        result["ccc"] = ccc[varies].mean()
    return {key: value.item() for key, value in result.items()}

def correlations(predicted: ndarray, true: ndarray) -> tuple:
    """Returns Pearson's r and the concordance correlation (CCC), each (C,), of the matching columns
    of two arrays (N, C). Both are NaN where the truth does not vary.

    r = s_xy / (s_x s_y), CCC = 2 s_xy / (s_x^2 + s_y^2 + (m_x - m_y)^2) (Lin 1989), where x is
    predicted, y is true, s_xy their covariance, s a standard deviation and m a mean.
    """
    mean_x, mean_y = predicted.mean(axis=0), true.mean(axis=0)  # (C,)
    var_x, var_y = predicted.var(axis=0), true.var(axis=0)
    covariance = ((predicted - mean_x) * (true - mean_y)).mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = covariance / np.sqrt(var_x * var_y)
        ccc = 2 * covariance / (var_x + var_y + (mean_x - mean_y) ** 2)

    # A constant prediction ignores the image, so r is 0. If the truth is constant, r is undefined.
    r[var_x <= VARIANCE_FLOOR] = 0
    is_undefined = var_y <= VARIANCE_FLOOR
    r[is_undefined] = ccc[is_undefined] = np.nan
    return r, ccc

def uncertainty(std: ndarray, predicted: ndarray, true: ndarray) -> dict:
    """Returns the share of errors within one and two predicted standard deviations (N, C) of the
    active coefficients. For a normal distribution: 68% and 95%. Empty if none is active."""
    counted = (true >= ACTIVE) & (std >= 0)  # std is NaN if a record has none
    if not counted.any():
        return {}
    error = abs(predicted - true)
    return {f"within_{k}_std": (error <= k * std)[counted].mean().item() for k in (1, 2)}

def agreement(predictions: list, truth: list) -> dict:
    """Compares the descriptions of N records with the true ones. Empty if no pair has both.

    expression_category, symmetry: share of exact matches
    f1: over the words of the muscle movements, pooled over all descriptions
    """
    pairs = [(p["description"], t["description"]) for p, t in zip(predictions, truth)
             if p.get("description") and t.get("description")]
    if not pairs:
        return {}
    result = {field: sum(p[field] == t[field] for p, t in pairs) / len(pairs)
              for field in ("expression_category", "symmetry")}

    # A word that occurs twice in both descriptions counts as two hits.
    hits = total = 0
    for pair in pairs:
        words, true_words = [Counter(re.findall(r"\w+", description["muscle_movements"].lower()))
                             for description in pair]
        hits += (words & true_words).total()
        total += (words + true_words).total()
    return {**result, "f1": 2 * hits / max(total, 1)}

# ---- Intervals -----------------------------------------------------------------------------------
def intervals(predicted: dict, true: ndarray, people: list, seed: int) -> dict:
    """Returns 95% intervals of each file's RMSE, and of its paired difference from the first file.

    `predicted` holds an array (N, C) per file. `people` names the person in each of the N images.
    People are resampled with all their images, because images of one person are alike (percentile
    intervals, Efron & Tibshirani 1993, Ch. 8 and 13). With fewer than five people, the images are
    resampled instead.
    """
    names, groups = np.unique(people, return_inverse=True)  # (G,), (N,)
    if len(names) < 5:
        groups = np.arange(len(people))
    sizes = np.bincount(groups)  # (G,)

    # Each sample draws G groups with replacement, the same ones for every file.
    rmse = {}  # samples (R,) per file
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sizes), size=(RESAMPLES, len(sizes)))  # (R, G)
    for name, array in predicted.items():
        squares = np.bincount(groups, ((array - true) ** 2).mean(axis=1))  # (G,)
        rmse[name] = np.sqrt(squares[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))

    first, *others = predicted
    differences = {f"{name} minus {first}": rmse[name] - rmse[first] for name in others}
    return {"intervals": limits(rmse), "differences": limits(differences)}

def limits(samples: dict) -> dict:
    """Returns the bounds of the middle 95% of R samples, by name."""
    return {name: {"rmse": np.percentile(rmse, (2.5, 97.5)).tolist()}
            for name, rmse in samples.items()}

# ---- Rig: the error of the face that the coefficients drive --------------------------------------
def read_rig(folder: Path) -> ndarray:
    """Returns how far each coefficient moves each vertex, (C, V, 3). A missing tongueOut.obj moves
    nothing. Raises ValueError if a file does not fit Neutral.obj."""
    shapes = []
    for name in ["Neutral", *ARKIT_NAMES]:
        path = folder / f"{name}.obj"
        if name == "tongueOut" and not path.is_file():  # many rigs have no tongue
            path = folder / "Neutral.obj"
        lines = path.read_text("utf-8", "replace").splitlines()
        vertices = [line.split()[1:4] for line in lines if line.startswith("v ")]
        shapes.append(np.array(vertices, dtype=float))  # (V, 3)
        if shapes[-1].shape != shapes[0].shape:
            raise ValueError(f"{path} and Neutral.obj differ in their number of vertices")
    return np.stack(shapes[1:]) - shapes[0]

def vertex_error(predicted: ndarray, true: ndarray, deltas: ndarray) -> float:
    """Returns the mean distance of a vertex between the faces that two arrays (N, C) drive."""
    offsets = (np.tensordot(error, deltas, axes=1) for error in predicted - true)  # (V, 3) each
    return np.mean([np.linalg.norm(offset, axis=1).mean() for offset in offsets]).item()

# ---- Reading and matching ------------------------------------------------------------------------
def to_array(values: dict) -> ndarray:
    """Returns the 52 values as (C,). Raises ValueError unless they are from 0 to 1."""
    array = np.array([values[name] for name in ARKIT_NAMES])
    if not (array.min() >= 0 and array.max() <= 1):  # also rejects NaN
        raise ValueError("a value is not between 0 and 1")
    return array

def read_records(file: str) -> dict:
    """Reads records into a dict by the real path of their image. Coefficients and std become arrays
    (C,), unless the record has an "error". Raises ValueError with the line that cannot be used."""
    records = {}
    for number, line in enumerate(Path(file).read_text("utf-8-sig", "replace").split("\n"), 1):
        try:
            if not line.strip():
                continue
            record = json.loads(line)
            image = os.path.realpath(Path(file).parent / record["image"])
            if image in records:
                raise ValueError(f"this is a second record of {image}")
            if not record.get("error"):
                record["coefficients"] = to_array(record["coefficients"])
                std = record.get("std")
                record["std"] = to_array(std) if std else np.full(52, np.nan)
            record["identity"] = str(record.get("identity") or image)
            records[image] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, line {number}: {error!s:.200}; expected an image and the 52 "
                             "ARKit coefficients, each a number from 0 to 1")
    return records

def match(files: list, tables: list) -> list:
    """Returns a list of records per file, all of the same images. An image with an "error" in any
    file is left out. Raises ValueError unless all files cover the images of the last, the truth.
    """
    truth, failed = tables[-1], set()
    for table in tables:
        failed |= {image for image in table if table[image].get("error")}
    for file, table in zip(files, tables):
        different = (table.keys() ^ truth.keys()) - failed
        if different:
            raise ValueError(f"{file} and {files[-1]} have different pictures: {min(different)}")
    images = [image for image in truth if image not in failed]
    return [[table[image] for image in images] for table in tables]

def stack(records: list, field: str = "coefficients") -> ndarray:
    """Stacks the arrays (C,) of N records into one (N, C)."""
    return np.stack([record[field] for record in records])

# ---- Table and plot ------------------------------------------------------------------------------
def by_part(predicted: ndarray, true: ndarray, parts: dict) -> dict:
    """Returns the metrics of each part of two arrays (N, C), by its name."""
    return {name: metrics(predicted[part], true[part]) for name, part in parts.items()}

def print_report(text: str) -> None:
    """Prints the results, given as JSON, but not the many rows of the 52 coefficients."""
    results = json.loads(text, parse_float=lambda number: round(float(number), 4))  # rounds all
    print(results["images"], "pictures,", results["errors"], "of them without a prediction")
    print(" " * 30, *(f"{title:>9}" for title in COLUMNS.values()))
    for section in ("models", "baselines", "by_region", "by"):
        for name, row in results[section].items():
            print(f"{name:30}", *(f"{row.get(key, '-'):>9}" for key in COLUMNS))

    print("RMSE, 95% intervals over people (over pictures if there are fewer than five people)")
    for name, row in (results["intervals"] | results["differences"]).items():
        print("   ", row["rmse"], name)
    print("description:", results["description"])
    print("uncertainty:", results["uncertainty"])

# The plot's panels, 120 pixels wide and high: their lower left corners (C,) and their diagonal.
LEFT, BOTTOM = 15 + 145 * (np.arange(52) % 13), 130 + 170 * (np.arange(52) // 13)
DIAGONAL = np.linspace(0, 1, 121)[:, None]

def draw_plot(rows: dict, predicted: ndarray, true: ndarray) -> Image.Image:
    """Draws a panel per coefficient, given its row of metrics: predicted (N, C) on the y axis, true
    on the x axis. Each dot is a picture, on the diagonal if the prediction is correct."""
    pixels = np.full((680, 1900), 255, np.uint8)
    for x, y, grey in [(DIAGONAL, DIAGONAL, 190), (true, predicted, 0)]:  # broadcast over C panels
        pixels[BOTTOM - (120 * y).astype(int), LEFT + (120 * x).astype(int)] = grey
    chart = Image.fromarray(pixels)
    draw = ImageDraw.Draw(chart)
    for x, y, (name, row) in zip(LEFT, BOTTOM, rows.items()):
        title = f"{name}\nr = {row.get('pearson_median', 0):.2f}"
        draw.text((x, y + 4), title, 0, ImageFont.load_default(12))
    return chart

# ---- Main ----------------------------------------------------------------------------------------
def main(args: Namespace) -> None:
    """Reads, matches, compares, writes, prints."""
    # Without any file, or without the truth, use the demo's.
    files = args.files + DEMO_FILES[len(args.files):]
    train_file = Path(args.train or Path(files[-1]).with_name("train.jsonl"))
    if os.path.realpath(args.out) in map(os.path.realpath, (*files, train_file)):
        raise ValueError(f"--out {args.out} is an input and would be overwritten")

    # Read predictions, truth and, for the mean baseline, the training records.
    tables = [read_records(file) for file in files]
    *runs, truth = match(files, tables)
    true = stack(truth)  # (N, C)
    people = [record["identity"] for record in truth]
    predicted = {file: stack(run) for file, run in zip(files, runs)}
    baselines = {"zeros": 0 * true}
    trained_on = set()
    if args.train or train_file.is_file():
        train = read_records(train_file).values()
        baselines["training mean"] = 0 * true + stack(train).mean(axis=0)
        trained_on = {record["identity"] for record in train} & set(people)

    # Compare. Parts, words and standard deviations are those of the first file.
    first = predicted[files[0]]
    arrays = predicted | baselines
    by = np.array([str(record.get(args.by)) for record in truth if args.by])
    rows = {name: metrics(array, true) for name, array in arrays.items()}
    if args.rig:
        deltas = read_rig(Path(args.rig))
        for name in arrays:
            rows[name]["vertex"] = vertex_error(arrays[name], true, deltas)
    results = {
        "models": {name: rows[name] for name in predicted},
        "baselines": {name: rows[name] for name in baselines},
        "by_region": by_part(first, true, REGIONS),
        "by_coefficient": by_part(first, true, COEFFICIENTS),
        "by": by_part(first, true, {value: by == value for value in np.unique(by).tolist()}),
        **intervals(predicted, true, people, args.seed),
        "description": agreement(runs[0], truth),
        "uncertainty": uncertainty(stack(runs[0], "std"), first, true),
        "images": len(tables[-1]), "errors": len(tables[-1]) - len(truth)}

    # Write the files before printing, which may fail if the output is piped to head.
    text = json.dumps(results, indent=1)
    Path(args.out).write_text(text)
    if args.plot:
        draw_plot(results["by_coefficient"], first, true).save(args.plot, "PNG")
    print_report(text)
    if trained_on:
        print(len(trained_on), "of", len(set(people)), "people are also in the training records: "
              "this is not a result across identities")
    print("numbers are in", args.out, "\nnext: python annotate.py", files[0], "--sheet faces.jpg")

if __name__ == "__main__":
    try:
        main(parse_args())
    except (OSError, ValueError) as error:
        sys.exit(str(error).partition("\n")[0][:400])
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again")
