# SPDX-License-Identifier: MIT
"""Evaluation for SemanticFace (arXiv 2603.14827): predictions + truth -> metrics with intervals.

Compares predicted with true coefficients, next to baselines that see no image. Most coefficients
are near zero, so a small MAE means little. RMSE and correlation show whether the model uses the
image at all.

Reads:  prediction records (.jsonl) from infer.py, in one or more files, and records with the truth
Writes: a table, a .json file with all its numbers and, with --plot, a picture
    {"models": {"predictions.jsonl": {"mae": 0.03, "rmse": 0.08, ...}}, "baselines": {...},
     "intervals": {"predictions.jsonl": {"rmse": [0.078, 0.082]}}, "images": 1320, ...}

    python evaluate.py predictions.jsonl data/demo/val.jsonl --plot metrics.png

Shapes: N images, C = 52 coefficients, G people, R resamplings, K prediction files, V vertices.
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
NO_STD = np.full(len(ARKIT_NAMES), np.nan)  # for a record without standard deviations
VARIANCE_FLOOR = 1e-14  # variances up to this count as zero
RESAMPLES = 1000  # bootstrap samples
DEMO_FILES = ["predictions.jsonl", "data/demo/val.jsonl"]
# The title and a row of the table.
TITLE = "    MAE    RMSE  baseline  median r  r > 0.8    CCC     F1  images"
ROW = ("%(mae)7.4f%(rmse)8.4f%(baseline)10.4f%(pearson_median)10.3f%(pearson_above_0.8)9.0f"
       "%(ccc)7.3f%(f1)7.3f%(images)8d")
# What the table shows if no coefficient varies.
UNDEFINED = {"pearson_median": np.nan, "pearson_above_0.8": np.nan, "ccc": np.nan}
BLUE, GREY, INK = "#0072b2", "#aaaaaa", "#282828"

def parse_args(argv=None) -> Namespace:
    """Parses `argv`, by default the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="one or more files of predictions, then the "
        f"truth, which may be left out after a single file (default: {' '.join(DEMO_FILES)})")
    add("--train", help="records for the mean baseline (default: train.jsonl next to the truth)")
    add("--by", help="also report by the values of this field of the truth, such as identity. "
        "Records without it are grouped under None")
    add("--rig", help="folder with Neutral.obj and one OBJ file per coefficient, such as "
        "jawOpen.obj: adds the mean vertex error, in the unit of these files")
    add("--plot", help="also plot the results to this file (.png)")
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

def correlations(predicted: ndarray, true: ndarray) -> tuple[ndarray, ndarray]:
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
    """Returns the share of errors within one and two predicted standard deviations (N, C), over the
    active coefficients: 68% and 95% for a normal distribution. Empty if there are none."""
    counted = (true >= ACTIVE) & (std >= 0)  # std is NaN if a record has none
    if not counted.any():
        return {}
    error, std = abs(predicted - true)[counted], std[counted]
    return {f"within_{k}_std": (error <= k * std).mean().item() for k in (1, 2)}

# ---- Intervals -----------------------------------------------------------------------------------
def intervals(predicted: dict, true: ndarray, people: list, seed: int) -> dict:
    """Returns 95% intervals of each file's RMSE, and of its paired difference from the first file.

    `predicted` holds an array (N, C) per file. `people` names the person in each of the N images.
    People are resampled with all their images, because images of one person are alike (percentile
    intervals, Efron & Tibshirani 1993, Ch. 8 and 13).
    """
    names, groups = np.unique(people, return_inverse=True)  # (G,), (N,)
    resampled = f"{len(names)} identities (a picture without one counts as a person)"
    if len(names) < 5:
        groups = np.arange(len(people))  # every picture is a group of its own
        resampled = f"{len(people)} pictures, since there are fewer than five identities"

    # A sample draws as many groups as there are, with replacement.
    sizes = np.bincount(groups)  # (G,)
    squares = [((array - true) ** 2).mean(axis=1) for array in predicted.values()]  # (N,) each
    squares = np.stack([np.bincount(groups, square) for square in squares])  # (K, G)
    rng, samples = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(sizes), size=len(sizes))  # (G,)
        means = squares[:, drawn].sum(axis=1) / sizes[drawn].sum()  # (K,)
        samples.append(np.sqrt(means))

    # Each file is compared with the first in the same samples.
    base, *others = predicted
    rmse = dict(zip(predicted, np.transpose(samples)))  # (R,) per file
    differences = {f"{file} minus {base}": rmse[file] - rmse[base] for file in others}
    return {"resampled": resampled, "intervals": limits(rmse), "differences": limits(differences)}

def limits(samples: dict) -> dict:
    """Returns the limits of the middle 95% of R samples, by name."""
    return {name: {"rmse": np.percentile(rmse, (2.5, 97.5)).tolist()}
            for name, rmse in samples.items()}

# ---- Descriptions --------------------------------------------------------------------------------
def agreement(predictions: list, truth: list) -> dict:
    """Compares the descriptions of N records with the true ones. Empty if no pair has both.

    expression_category, symmetry: share of exact matches
    f1: over the words of the muscle movements, pooled over all descriptions
    """
    pairs = [(p.get("description"), t.get("description")) for p, t in zip(predictions, truth)]
    pairs = [(p, t) for p, t in pairs if p and t]
    if not pairs:
        return {}
    result = {}
    for field in ("expression_category", "symmetry"):
        result[field] = sum(p[field] == t[field] for p, t in pairs) / len(pairs)

    # A word that occurs twice in both descriptions is two hits.
    hits = total = 0
    for p, t in pairs:
        words, true_words = count_words(p), count_words(t)
        hits += (words & true_words).total()
        total += (words + true_words).total()
    result["f1"] = 2 * hits / max(total, 1)
    return result

def count_words(description: dict) -> Counter:
    """Counts the words in a description's muscle movements."""
    return Counter(re.findall(r"\w+", description["muscle_movements"].lower()))

# ---- Rig: the error of the face that the coefficients drive --------------------------------------
def read_rig(folder: Path) -> ndarray:
    """Returns how far each coefficient moves each vertex, (C, V, 3). A missing tongueOut.obj moves
    nothing. Raises ValueError for another missing file or another number of vertices."""
    shapes = {}
    for path in folder.glob("*.obj"):
        lines = path.read_text("utf-8", "replace").splitlines()
        vertices = [line.split()[1:4] for line in lines if line.startswith("v ")]
        name = path.stem.replace("_L", "Left").replace("_R", "Right")  # eyeBlink_L
        shapes[name.lower()] = np.array(vertices, dtype=float)  # (V, 3)

    neutral = shapes.get("neutral", np.empty(0))
    shapes.setdefault("tongueout", neutral)
    for name in ("Neutral", *ARKIT_NAMES):
        if name.lower() not in shapes or shapes[name.lower()].shape != neutral.shape:
            raise ValueError(f"{folder}/{name}.obj is missing or does not fit Neutral.obj")
    return np.stack([shapes[name.lower()] for name in ARKIT_NAMES]) - neutral

def vertex_error(predicted: ndarray, true: ndarray, deltas: ndarray) -> float:
    """Returns the distance between the faces that two arrays (N, C) drive, in the unit of the rig:
    the mean over vertices and images."""
    means = []
    for error in predicted - true:  # (C,)
        displacement = np.tensordot(error, deltas, axes=1)  # (V, 3)
        means.append(np.linalg.norm(displacement, axis=1).mean())
    return np.mean(means).item()

# ---- Reading and matching ------------------------------------------------------------------------
def to_array(values: dict) -> ndarray:
    """Returns the 52 values as (C,). Raises ValueError unless each is a number from 0 to 1."""
    for name in ARKIT_NAMES:
        value = values[name]
        if type(value) not in (int, float) or not 0 <= value <= 1:  # also rejects True and NaN
            raise ValueError(f"{name} is {value!r:.40}")
    return np.array([values[name] for name in ARKIT_NAMES])

def read_records(file: str) -> dict:
    """Reads records into a dict by the real path of their image. Coefficients and std become arrays
    (C,), unless the record has an "error". Raises ValueError with the line that cannot be used."""
    records = {}
    for number, line in enumerate(Path(file).read_text("utf-8-sig", "replace").split("\n"), 1):
        try:
            if line.strip():
                record = json.loads(line)
                record["image"] = os.path.realpath(Path(file).parent / record["image"])
                if record["image"] in records:
                    raise ValueError(f"this is a second record of {record['image']}")
                if not record.get("error"):
                    record["coefficients"] = to_array(record["coefficients"])
                    record["std"] = to_array(record["std"]) if record.get("std") else NO_STD
                records[record["image"]] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, line {number}: {error!s:.200}; expected an image and the 52 "
                             "ARKit coefficients, each a number from 0 to 1")
    return records

def match(files: list, tables: list) -> list:
    """Returns a list of records per file, all of the same images. The last file is the truth. An
    image with an "error" in any file is left out. Raises ValueError unless every file has exactly
    the images of the truth."""
    images = truth = tables[-1].keys()
    for file, table in zip(files, tables):
        failed = {image for image in table if table[image].get("error")}
        missing, extra = truth - table.keys(), table.keys() - truth - failed
        if missing or extra:
            raise ValueError(f"{file}: {len(missing)} pictures have no prediction, {len(extra)} "
                             f"predictions have no truth, such as {min(missing | extra):.200}")
        images = [image for image in images if image not in failed]
    if not images:
        raise ValueError(f"none of the {len(truth)} pictures has a prediction in every file")
    return [[table[image] for image in images] for table in tables]

def stack(records: list, field: str = "coefficients") -> ndarray:
    """Stacks the arrays (C,) of N records into one (N, C)."""
    return np.stack([record[field] for record in records])

# ---- Table and plot ------------------------------------------------------------------------------
def compare(predicted: dict, baselines: dict, true: ndarray, by: ndarray) -> dict:
    """Returns rows of metrics by section and name. `predicted` and `baselines` hold arrays (N, C).
    The rows of regions, coefficients and values of the field --by (N,) are of the first file."""
    first, *_ = predicted.values()
    rows = [("models", name, array, ...) for name, array in predicted.items()]
    rows += [("baselines", name, array, ...) for name, array in baselines.items()]
    rows += [("by_region", name, first, part) for name, part in REGIONS.items()]
    rows += [("by_coefficient", name, first, part) for name, part in COEFFICIENTS.items()]
    rows += [("by", value, first, by == value) for value in np.unique(by).tolist()]

    # Each row compares one part of an array with the truth (... is all of it). Its baseline is the
    # training mean or, without training records, zeros.
    *_, baseline = baselines.values()
    results = {"models": {}, "baselines": {}, "by_region": {}, "by_coefficient": {}, "by": {}}
    for section, name, array, part in rows:
        row = metrics(array[part], true[part])
        row["baseline"] = np.sqrt(((baseline[part] - true[part]) ** 2).mean()).item()
        row["images"] = len(true[part])
        results[section][name] = row
    return results

def print_report(results: dict) -> None:
    """Prints all results but those of the 52 coefficients, which would swamp the others."""
    print(results["images"], "pictures,", results["errors"], "left out for lack of a prediction")
    print(f"{'':24s}{TITLE}")
    for section in ("models", "baselines", "by_region", "by"):
        for name, row in results[section].items():
            print(f"{name[-24:]:24s}" + ROW % (UNDEFINED | row))
    for name, row in (results["models"] | results["baselines"]).items():
        if "vertex" in row:
            print(f"mean vertex error {row['vertex']:.4g}", name)

    print("95% intervals of RMSE, resampling", results["resampled"])
    for name, row in (results["intervals"] | results["differences"]).items():
        print("    {:.4f} to {:.4f}".format(*row["rmse"]), name)
    print("regions, words and standard deviations are those of", results["predictions"][0])
    for part in ("description", "uncertainty"):
        print(f"{part}:", *(f"{name} {value:.2f}" for name, value in results[part].items()))

def draw_plot(results: dict, predicted: ndarray, true: ndarray) -> Image.Image:
    """Draws the error and r of each coefficient and, for the nine most active, predicted against
    true (N, C)."""
    chart = Image.new("RGB", (1780, 1180), "white")
    draw = ImageDraw.Draw(chart)
    draw.font = ImageFont.load_default(15)
    draw.text((30, 20), "Pearson's r and RMSE per coefficient (line: RMSE of the baseline)", INK)
    draw.text((800, 20), "Predicted against true, the nine most active", INK)

    # Left, one row per coefficient: its name and r, a bar for its error, a line for the baseline's.
    rows = results["by_coefficient"]
    scale = 500 / max(max(row["rmse"], row["baseline"], 0.01) for row in rows.values())  # pixels
    for y, (name, row) in zip(range(70, 1180, 21), rows.items()):
        x = 220 + scale * row["baseline"]
        label = f"{name}   {row.get('pearson_median', 0):.2f}"
        draw.text((210, y), label, INK, anchor="rm")
        draw.rectangle([220, y - 6, 220 + scale * row["rmse"], y + 6], BLUE)
        draw.line([x, y - 9, x, y + 9], INK, 2)

    # Right, one panel per coefficient. Each dot is a picture, on the diagonal if it is right.
    for panel, k in enumerate(np.argsort(-true.mean(axis=0))[:9]):
        left, bottom = 800 + 330 * (panel % 3), 370 + 365 * (panel // 3)
        draw.rectangle([left, bottom - 300, left + 300, bottom], outline=GREY)
        draw.line([left, bottom, left + 300, bottom - 300], GREY)
        draw.text((left + 150, bottom + 18), ARKIT_NAMES[k], INK, anchor="mm")
        for x, y in zip(left + 300 * true[:, k], bottom - 300 * predicted[:, k]):
            draw.circle((x, y), 2, BLUE)
    return chart

# ---- Main ----------------------------------------------------------------------------------------
def main(args: Namespace) -> None:
    """Runs the stage: reads, matches, compares, writes, prints."""
    # Missing files default to the demo's. No output may be an input.
    files = args.files + DEMO_FILES[len(args.files):]
    train_file = args.train or str(Path(files[-1]).with_name("train.jsonl"))
    for path in filter(None, (args.out, args.plot)):
        if os.path.realpath(path) in map(os.path.realpath, (*files, train_file)):
            raise ValueError(f"{path} is an input and would be overwritten; name another file")
        Path(path).parent.mkdir(parents=True, exist_ok=True)

    # Read predictions, truth and, for the mean baseline, the training records.
    tables = [read_records(file) for file in files]
    *runs, truth = match(files, tables)
    true = stack(truth)  # (N, C)
    predicted = {file: stack(run) for file, run in zip(files, runs)}
    baselines, train = {"zeros": np.zeros_like(true)}, []
    if args.train or os.path.isfile(train_file):
        train = list(read_records(train_file).values())
        baselines["training mean"] = np.zeros_like(true) + stack(train).mean(axis=0)

    # Compare. Words and standard deviations are those of the first file.
    by = np.array([str(record.get(args.by)) for record in truth if args.by])
    people = [str(record.get("identity", record["image"])) for record in truth]
    results = compare(predicted, baselines, true, by)
    results |= intervals(predicted, true, people, args.seed)
    results["description"] = agreement(runs[0], truth)
    results["uncertainty"] = uncertainty(stack(runs[0], "std"), predicted[files[0]], true)
    if args.rig:
        deltas = read_rig(Path(args.rig))
        for name, row in (results["models"] | results["baselines"]).items():
            row["vertex"] = vertex_error((predicted | baselines)[name], true, deltas)
    results |= {"images": len(tables[-1]), "errors": len(tables[-1]) - len(truth),
                "predictions": files[:-1], "truth": files[-1]}

    # Write the files before printing, which may fail if the output is piped to head.
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw_plot(results, predicted[files[0]], true).save(args.plot, "PNG")
    print_report(results)
    trained_on = set(people) & {str(record.get("identity", "")) for record in train}
    if trained_on:
        print(len(trained_on), "of", len(set(people)), "people are also in the training records: "
              "this is not a result across identities")
    print("every number is in", args.out)
    print("next: python annotate.py", files[0], "--sheet faces.jpg")

if __name__ == "__main__":
    try:
        main(parse_args())
    except (OSError, ValueError) as error:
        sys.exit(str(error).partition("\n")[0][:400])
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again")
