# SPDX-License-Identifier: MIT
"""Stage I of SemanticFace, semantic supervision (arXiv 2603.14827, Sec. 3.1): coefficients -> words.

Turns the 52 ARKit blendshape coefficients of a face into a description with four fields, by rules
that anyone can check. It also draws the demo: cartoon faces whose coefficients are known exactly,
so that the other stages run with nothing downloaded.

Reads:  label records (.jsonl), Live Link Face takes (.csv), predictions (.jsonl); none for the demo
Writes: annotated records, one JSON object a line; image paths are relative to the file
    {"image": "images/000001.png", "identity": "id017", "coefficients": {"eyeBlinkLeft": 0.123, ...},
     "description": {"expression_category": "slight happiness",
                     "muscle_movements": "Mouth: both lip corners slightly raised.",
                     "emotional_implication": "joy or amusement", "symmetry": "symmetric"},
     "annotator": "rules"}

    python annotate.py                                               # the demo: data/demo
    python annotate.py take.csv --frames frames/ --out train.jsonl   # your own recording

Left and right are the subject's: the left eye is on the right of the picture.
"""
import argparse
import csv
import json
import math
import os
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------
# Constants: names, words, prototypes
# ---------------------------------------------------------------------------------------------------

# The 52 names in Live Link Face column order; the same block stands in every script.
ARKIT_NAMES = [
    "eyeBlinkLeft", "eyeLookDownLeft", "eyeLookInLeft", "eyeLookOutLeft", "eyeLookUpLeft", "eyeSquintLeft", "eyeWideLeft",
    "eyeBlinkRight", "eyeLookDownRight", "eyeLookInRight", "eyeLookOutRight", "eyeLookUpRight", "eyeSquintRight", "eyeWideRight",
    "jawForward", "jawRight", "jawLeft", "jawOpen", "mouthClose", "mouthFunnel", "mouthPucker", "mouthRight", "mouthLeft",
    "mouthSmileLeft", "mouthSmileRight", "mouthFrownLeft", "mouthFrownRight", "mouthDimpleLeft", "mouthDimpleRight",
    "mouthStretchLeft", "mouthStretchRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper",
    "mouthPressLeft", "mouthPressRight", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthUpperUpLeft", "mouthUpperUpRight",
    "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight",
    "cheekPuff", "cheekSquintLeft", "cheekSquintRight", "noseSneerLeft", "noseSneerRight", "tongueOut",
]

# A movement is named from ACTIVE on, with the adverb of the first band whose upper end lies above it.
ACTIVE = 0.15
BANDS = [(0.4, "slightly"), (0.7, "moderately"), (float("inf"), "strongly")]

# What is said of each action, by region. "name_" stands for nameLeft and nameRight, one noun for either.
# Gaze pairs the actions that turn both eyes the same way: the left eye outward, the right eye inward.
MOVEMENTS = {
    "Brows": {"browInnerUp": ("inner brows", "raised"), "browOuterUp_": ("outer brow", "raised"),
              "browDown_": ("brow", "lowered")},
    "Eyes": {"eyeBlink_": ("eye", "closed"), "eyeWide_": ("eye", "widened"),
             "eyeSquint_": ("eye", "squinted"), "eyeLookUp_": ("eye", "looking up"),
             "eyeLookDown_": ("eye", "looking down"),
             "eyeLookOutLeft/eyeLookInRight": ("eye", "looking left"),
             "eyeLookInLeft/eyeLookOutRight": ("eye", "looking right")},
    "Nose": {"noseSneer_": ("nostril", "pulled up")},
    "Cheeks": {"cheekPuff": ("cheeks", "puffed"), "cheekSquint_": ("cheek", "raised")},
    "Mouth": {"mouthSmile_": ("lip corner", "raised"), "mouthFrown_": ("lip corner", "lowered"),
              "mouthDimple_": ("lip corner", "tucked in"), "mouthStretch_": ("lip corner", "stretched"),
              "mouthPress_": ("lip side", "pressed"), "mouthUpperUp_": ("upper lip side", "raised"),
              "mouthLowerDown_": ("lower lip side", "lowered"), "mouthFunnel": ("lips", "funneled"),
              "mouthPucker": ("lips", "puckered"), "mouthRollUpper": ("upper lip", "rolled in"),
              "mouthRollLower": ("lower lip", "rolled in"), "mouthShrugUpper": ("upper lip", "pushed up"),
              "mouthShrugLower": ("lower lip", "pushed up"), "mouthClose": ("lips", "closed over the jaw"),
              "mouthLeft": ("mouth", "shifted left"), "mouthRight": ("mouth", "shifted right")},
    "Jaw": {"jawOpen": ("jaw", "opened"), "jawForward": ("jaw", "pushed forward"),
            "jawLeft": ("jaw", "shifted left"), "jawRight": ("jaw", "shifted right")},
    "Tongue": {"tongueOut": ("tongue", "put out")},
}

# What each emotion implies, and its EMFACS action units (Friesen & Ekman 1983) as ARKit actions:
# 1 browInnerUp, 2 browOuterUp, 4 browDown, 5 eyeWide, 6 cheekSquint, 7 eyeSquint, 9 noseSneer,
# 10 mouthUpperUp, 12 mouthSmile, 14 mouthDimple, 15 mouthFrown, 20 mouthStretch, 23 mouthPress, 26 jawOpen.
EMOTIONS = {
    "happiness": ("joy or amusement", {"cheekSquint_": 0.6, "mouthSmile_": 1.0}),
    "sadness": ("sorrow or disappointment", {"browInnerUp": 1.0, "browDown_": 0.3, "mouthFrown_": 0.9}),
    "surprise": ("astonishment", {"browInnerUp": 0.9, "browOuterUp_": 0.9, "eyeWide_": 0.8, "jawOpen": 0.8}),
    "fear": ("alarm or anxiety", {"browInnerUp": 0.8, "browOuterUp_": 0.5, "browDown_": 0.3, "eyeWide_": 0.9,
                                  "eyeSquint_": 0.2, "mouthStretch_": 0.8, "jawOpen": 0.3}),
    "anger": ("irritation or determination", {"browDown_": 1.0, "eyeWide_": 0.2, "eyeSquint_": 0.5,
                                              "mouthPress_": 0.7}),
    "disgust": ("aversion", {"noseSneer_": 1.0, "mouthUpperUp_": 0.6, "mouthFrown_": 0.4}),
    "contempt": ("disdain or smugness", {"mouthSmileLeft": 0.7, "mouthDimpleLeft": 0.8}),
}
IMPLICATIONS = {emotion: implication for emotion, (implication, _) in EMOTIONS.items()}

# Movements of the demo that are no emotion, in the same notation.
GESTURES = {
    "neutral": {},
    "blink": {"eyeBlink_": 1.0},
    "wink": {"eyeBlinkLeft": 1.0, "cheekSquintLeft": 0.5, "mouthSmileLeft": 0.4},
    "kiss": {"mouthPucker": 0.9},
    "oh": {"mouthFunnel": 0.9, "jawOpen": 0.3},
    "ah": {"jawOpen": 0.8, "mouthLowerDown_": 0.3},
    "ee": {"mouthStretch_": 0.5, "mouthLowerDown_": 0.6, "mouthUpperUp_": 0.4},
    "em": {"mouthRollLower": 0.7, "mouthRollUpper": 0.7},
    "puff": {"cheekPuff": 0.9, "mouthPress_": 0.4},
    "chew": {"jawOpen": 0.6, "mouthClose": 0.5, "jawLeft": 0.6, "mouthLeft": 0.5},
    "doubt": {"mouthShrugLower": 0.8, "mouthShrugUpper": 0.6, "mouthFrown_": 0.4},
    "tongue": {"tongueOut": 0.9, "jawOpen": 0.4},
    "jut": {"jawForward": 0.9, "mouthRollUpper": 0.3},
    "tuck": {"mouthDimple_": 0.8, "mouthPress_": 0.5},
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="records (.jsonl) or takes (.csv); none: the demo")
    add("--demo", type=int, default=16_000, help="faces to draw when there is no INPUT (default %(default)s)")
    add("--frames", help="folder of the take's pictures, one for each CSV row in sorted order")
    add("--out", help="file to write, or folder with --render or for the demo "
                      "(default INPUT.annotated.jsonl, INPUT.avatars, data/demo)")
    add("--render", action=argparse.BooleanOptionalAction, default=False,
        help="draw the face of every record: a prediction becomes an avatar")
    add("--limit", type=int, help="use the first LIMIT records only")
    add("--seed", type=int, default=0, help="of the demo; another draws other people (default %(default)s)")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------
# Reading and writing records
# ---------------------------------------------------------------------------------------------------

def check_coefficients(coefficients: dict, where: str, counts: Counter) -> dict:
    """Returns the 52 in order, clipped to 0..1 and the clipped ones counted: real takes overshoot to 1.053.

    Raises SystemExit, naming the key and `where`, unless they are the 52 names with numbers in -0.1..1.1.
    """
    if not isinstance(coefficients, dict):
        raise SystemExit(f"{where}: coefficients is {type(coefficients).__name__}, expected an object")
    missing = [name for name in ARKIT_NAMES if name not in coefficients]
    unknown = [name for name in coefficients if name not in ARKIT_NAMES]
    if missing or unknown:
        raise SystemExit(f"{where}: missing coefficients {missing[:5]}, unknown {unknown[:5]}; "
                         "expected exactly the 52 ARKit names, eyeBlinkLeft ... tongueOut")
    checked = {}
    for name in ARKIT_NAMES:
        value = coefficients[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and -0.1 <= value <= 1.1):  # also refuses NaN
            raise SystemExit(f"{where}: {name} is {value!r}, expected a number from 0 to 1 (percent: divide by 100)")
        checked[name] = min(max(0.0, value), 1.0)
        counts["clipped values"] += checked[name] != value
    return checked


def read_jsonl(path: Path, counts: Counter) -> list[dict]:
    """Reads label or prediction records; image paths become absolute, failed predictions are counted and left out."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{where}: not JSON ({error}); expected one object a line, so delete a torn last line")
        if not isinstance(record, dict) or "coefficients" not in record:
            raise SystemExit(f"{where}: expected an object with the field \"coefficients\"")
        if record.get("error"):
            counts["failed predictions left out"] += 1
            continue
        image = record.get("image")
        if image is not None and not isinstance(image, str):
            raise SystemExit(f"{where}: image is {image!r}, expected a path relative to the file")
        kept = {"image": image and str((path.parent / image).absolute())}
        if "identity" in record:
            kept["identity"] = record["identity"]
        kept["coefficients"] = check_coefficients(record["coefficients"], where, counts)
        records.append(kept)
    return records


def read_livelink(path: Path, frames: str | None, counts: Counter) -> list[dict]:
    """Reads a Live Link Face take (.csv) by column name, in any order; the nine angles of head and eyes are ignored.

    Raises SystemExit on a missing column, a cell that is no number, and unless `frames` has a picture a row.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        reader.fieldnames = [name[:1].lower() + name[1:] for name in reader.fieldnames or []]
        rows = list(reader)
    missing = [name for name in ARKIT_NAMES if not rows or name not in rows[0]]
    if missing:
        raise SystemExit(f"{path}: no column for {missing[:5]} ({len(missing)} in all); "
                         "expected the header of a Live Link Face take: Timecode, ..., EyeBlinkLeft, ...")
    pictures = [None] * len(rows)
    if frames:
        endings = Image.registered_extensions()
        pictures = sorted(str(file.absolute()) for file in Path(frames).iterdir() if file.suffix.lower() in endings)
    if len(pictures) != len(rows):
        raise SystemExit(f"--frames {frames} holds {len(pictures)} pictures, {path} has {len(rows)} rows; "
                         "expected one picture for each row, in sorted order")
    records = []
    for number, (row, picture) in enumerate(zip(rows, pictures), 2):
        where = f"{path}, line {number}"
        coefficients = {}
        for name in ARKIT_NAMES:
            try:
                coefficients[name] = float(row[name])
            except (TypeError, ValueError):
                raise SystemExit(f"{where}: {name} is {row[name]!r}, expected a number from 0 to 1")
        coefficients = check_coefficients(coefficients, where, counts)
        records.append({"image": picture, "identity": path.stem, "coefficients": coefficients})
    return records


def read_inputs(args: argparse.Namespace, counts: Counter) -> list[dict]:
    """Reads every INPUT by its ending, up to --limit records."""
    expected = "expected label records (.jsonl) or a Live Link Face take (.csv)"
    records = []
    for path in map(Path, args.inputs):
        if not path.is_file() or path.stat().st_size == 0:
            raise SystemExit(f"{path} {'is empty' if path.is_file() else 'is no file'}; {expected}")
        if path.suffix not in (".csv", ".jsonl"):
            raise SystemExit(f"{path} ends in {path.suffix!r}; {expected}")
        records += read_livelink(path, args.frames, counts) if path.suffix == ".csv" else read_jsonl(path, counts)
    if not records:
        raise SystemExit(f"{', '.join(args.inputs)}: no usable record ({dict(counts)})")
    return records[:args.limit]


def write_records(path: Path, records: list[dict]) -> None:
    """Describes the records and writes them, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    base = path.parent.absolute()
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for record in tqdm(records, desc=f"describing {path.name}", unit=" faces", disable=None):
            image = record["image"] and Path(os.path.relpath(base / record["image"], base)).as_posix()
            description = describe(record["coefficients"])
            line = {**record, "image": image, "description": description, "annotator": "rules"}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------
# Describing: coefficients -> four fields (Sec. 3.1)
# ---------------------------------------------------------------------------------------------------

def sides(name: str) -> list[str]:
    """The ARKit names of a table key: "mouthSmile_" is its Left and Right, "a/b" is a and b, any other itself."""
    return [name[:-1] + "Left", name[:-1] + "Right"] if name.endswith("_") else name.split("/")


def expand(pattern: dict) -> dict:
    """Writes out the keys of a pattern that stand for two ARKit names."""
    return {name: value for key, value in pattern.items() for name in sides(key)}


def mirror(pattern: dict) -> dict:
    """Swaps Left and Right in the names of a pattern."""
    swap = {"Left": "Right", "Right": "Left"}
    return {re.sub("Left|Right", lambda side: swap[side.group()], name): value for name, value in pattern.items()}


def intensity(value: float) -> str:
    """The adverb of the band that `value` (0..1) lies in."""
    return next(adverb for end, adverb in BANDS if value < end)


def describe_movements(coefficients: dict) -> str:
    """Names every active movement with side and intensity; sides of equal intensity share one phrase."""
    sentences = []
    for region, actions in MOVEMENTS.items():
        phrases = []
        for key, (noun, verb) in actions.items():
            values = [coefficients[name] for name in sides(key)]
            adverbs = [intensity(value) if value >= ACTIVE else None for value in values]
            subjects = [noun] if len(adverbs) == 1 else [f"left {noun}", f"right {noun}"]
            if len(adverbs) == 2 and adverbs[0] == adverbs[1]:
                subjects = [f"both {noun}s"]
            phrases += [f"{subject} {adverb} {verb}" for subject, adverb in zip(subjects, adverbs) if adverb]
        if phrases:
            sentences.append(f"{region}: {', '.join(phrases)}.")
    return " ".join(sentences) or "No visible movement."


# Emotion prototypes as unit vectors over the 52; gaze and blinks take no part in the comparison.
PROTOTYPES = [(emotion, expand(pattern)) for emotion, (_, pattern) in EMOTIONS.items()]
PROTOTYPES.append(("contempt", mirror(EMOTIONS["contempt"][1])))  # it has one side, either of the two
PROTOTYPE_VECTORS = np.array([[pattern.get(name, 0.0) for name in ARKIT_NAMES] for _, pattern in PROTOTYPES])
PROTOTYPE_VECTORS /= np.linalg.norm(PROTOTYPE_VECTORS, axis=1, keepdims=True)
EXPRESSIVE = np.array([not name.startswith(("eyeLook", "eyeBlink")) for name in ARKIT_NAMES])


def classify(coefficients: dict) -> tuple[str, str]:
    """Expression category and emotional implication, by the cosine to the EMFACS prototypes."""
    vector = np.array([coefficients[name] for name in ARKIT_NAMES]) * EXPRESSIVE
    if vector.max() < ACTIVE:
        return "neutral", "not clearly observable"
    cosines = PROTOTYPE_VECTORS @ vector / np.linalg.norm(vector)
    best, second = np.argsort(-cosines)[:2]
    if cosines[best] < 0.5:
        return "movement without a clear emotion", "not clearly observable"
    emotion, other = PROTOTYPES[best][0], PROTOTYPES[second][0]
    if cosines[second] > 0.9 * cosines[best] and other != emotion:
        return f"{emotion} mixed with {other}", f"{IMPLICATIONS[emotion]}, with {IMPLICATIONS[other]}"
    peak = (vector * (PROTOTYPE_VECTORS[best] > 0)).max()
    degree = {"slightly": "slight ", "moderately": "", "strongly": "strong "}[intensity(peak)]
    return degree + emotion, IMPLICATIONS[emotion]


def describe_symmetry(coefficients: dict) -> str:
    """Names the regions whose sides differ by at least ACTIVE, except in gaze: both eyes turn one way."""
    stronger = []
    for region, actions in MOVEMENTS.items():
        pairs = [sides(name) for name in actions if name.endswith("_") and not name.startswith("eyeLook")]
        differences = [coefficients[left] - coefficients[right] for left, right in pairs]
        widest = max(differences, key=abs, default=0.0)
        if abs(widest) >= ACTIVE:
            stronger.append(f"{'left' if widest > 0 else 'right'} {region.lower()}")
    return f"stronger on the {', '.join(stronger)}" if stronger else "symmetric"


def describe(coefficients: dict) -> dict:
    """The hierarchical semantic description (Sec. 3.1) of one face.

    Args: the 52 coefficients by name, each 0..1.
    Returns: the four fields, strings. Deterministic, and never at odds with the numbers.
    """
    category, implication = classify(coefficients)
    return {
        "expression_category": category,
        "muscle_movements": describe_movements(coefficients),
        "emotional_implication": implication,
        "symmetry": describe_symmetry(coefficients),
    }


# ---------------------------------------------------------------------------------------------------
# Drawing: coefficients -> cartoon face
# ---------------------------------------------------------------------------------------------------

DARK, WHITE, RED, CAVITY, TONGUE = (40, 25, 25), (250, 250, 245), (205, 80, 80), (70, 15, 20), (225, 105, 120)
SKINS = [(250, 220, 196), (240, 200, 170), (222, 176, 140), (190, 140, 104), (150, 104, 74), (112, 76, 54)]
HAIRS = [(30, 24, 22), (70, 46, 30), (120, 80, 44), (196, 150, 80), (150, 60, 30), (150, 150, 150)]
IRISES = [(80, 50, 26), (50, 100, 60), (60, 110, 170), (100, 100, 110)]
SUPERSAMPLE = 4  # drawn at 4 times the size, then averaged

# The range that each person's proportions are drawn from; see Pen for the unit.
PROPORTIONS = {"fringe": (-0.75, -0.6), "width": (0.68, 0.80), "height": (0.76, 0.84), "eye": (0.9, 1.15),
               "gap": (0.31, 0.37), "brow": (0.05, 0.09), "nose": (0.85, 1.2), "mouth": (0.24, 0.31)}

# Skin creases, as dark as the action is strong: (action, from, to) on the subject's left, mirrored for the right.
CREASES = [
    ("browDown_", (0.05, -0.42), (0.05, -0.26)), ("mouthUpperUp_", (0.16, 0.22), (0.26, 0.34)),
    ("noseSneer_", (0.03, -0.12), (0.16, -0.07)), ("noseSneer_", (0.03, -0.04), (0.16, 0.01)),
    ("eyeSquint_", (0.54, -0.19), (0.65, -0.22)), ("eyeSquint_", (0.54, -0.15), (0.65, -0.12)),
    ("mouthPress_", (0.19, 0.38), (0.32, 0.42)), ("mouthPress_", (0.19, 0.62), (0.32, 0.58)),
    ("mouthDimple_", (0.39, 0.44), (0.39, 0.56)), ("mouthShrugUpper", (0.035, 0.27), (0.035, 0.36)),
    ("mouthRollUpper", (0.0, 0.37), (0.16, 0.38)), ("mouthRollLower", (0.0, 0.64), (0.16, 0.63)),
    ("mouthShrugLower", (0.03, 0.68), (0.06, 0.74)),
]


class Pen:
    """Draws in face coordinates: x and y from -1 to 1, x to the right (the subject's left), y down."""

    def __init__(self, size: int, background: tuple):
        self.half = size * SUPERSAMPLE / 2
        self.canvas = Image.new("RGB", (size * SUPERSAMPLE, size * SUPERSAMPLE), background)
        self.draw = ImageDraw.Draw(self.canvas)

    def scale(self, points: list) -> list:
        return [(self.half * (1 + x), self.half * (1 + y)) for x, y in points]

    def polygon(self, points: list, color: tuple):
        self.draw.polygon(self.scale(points), fill=color)

    def line(self, points: list, color: tuple, width: float):
        self.draw.line(self.scale(points), fill=color, width=max(1, round(width * self.half)), joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: tuple):
        self.draw.ellipse(self.scale([(x - rx, y - ry), (x + rx, y + ry)]), fill=color)


def mix(color: tuple, other: tuple, amount: float) -> tuple:
    """The color `amount` (0..1) of the way from `color` to `other`."""
    return tuple(round(a + (b - a) * amount) for a, b in zip(color, other))


def appearance(identity: str) -> dict:
    """The looks of a person, drawn from the name alone: colors and proportions."""
    rng = np.random.default_rng(list(str(identity).encode()))
    tone = rng.uniform(0, len(SKINS) - 1.001)
    skin = mix(SKINS[int(tone)], SKINS[int(tone) + 1], tone % 1)
    colors = {
        "skin": skin,
        "lips": mix(skin, RED, rng.uniform(0.5, 0.9)),
        "hair": HAIRS[rng.integers(len(HAIRS))],
        "iris": IRISES[rng.integers(len(IRISES))],
        "background": tuple(int(value) for value in rng.integers(60, 230, 3)),
    }
    return colors | {part: rng.uniform(low, high) for part, (low, high) in PROPORTIONS.items()}


def draw_head(pen: Pen, look: dict, c: dict) -> None:
    """Hair, outline, chin and puffed cheeks (jawOpen, jawLeft, jawRight, jawForward, cheekPuff)."""
    skin, width, height = look["skin"], look["width"], look["height"]
    slide, drop = 0.14 * (c["jawLeft"] - c["jawRight"]), 0.14 * c["jawOpen"]
    pen.ellipse(0, -0.12, width * 1.1, height * 1.03, look["hair"])
    outline = []
    for k in range(48):
        x, y = math.cos(math.tau * k / 48), math.sin(math.tau * k / 48)
        below = max(y, 0) ** 2
        puff = 0.16 * c["cheekPuff"] * math.exp(-((y - 0.5) / 0.25) ** 2)
        outline.append((width * x * (1 + puff - 0.12 * below) + slide * below, height * y + drop * below))
    pen.polygon(outline, skin)
    pen.polygon([(x, y) for x, y in outline if y < look["fringe"]], look["hair"])
    forward, puff = c["jawForward"], c["cheekPuff"]
    chin = (0.14 + 0.14 * forward, 0.05 + 0.07 * forward, mix(skin, WHITE, 0.6 * forward))
    pen.ellipse(slide, height - 0.1 + drop, *chin)
    pen.ellipse(-0.5, 0.36, 0.13, 0.13, mix(skin, WHITE, 0.55 * puff))
    pen.ellipse(0.5, 0.36, 0.13, 0.13, mix(skin, WHITE, 0.55 * puff))


def draw_eye(pen: Pen, look: dict, c: dict, side: int, name: str) -> None:
    """One eye and the cheek below it (eyeBlink, eyeWide, eyeSquint, eyeLook*, cheekSquint)."""
    skin, lid = look["skin"], mix(look["skin"], DARK, 0.12)
    blink, wide, squint, cheek = (c[f"{action}{name}"] for action in ("eyeBlink", "eyeWide", "eyeSquint", "cheekSquint"))
    x0, y0, width, height = side * look["gap"], -0.17, 0.2 * look["eye"], 0.105 * look["eye"]
    curve = [k / 6 for k in range(-6, 7)]
    upper_edge = height * (0.7 * blink - (1 + 0.75 * wide) * (1 - blink))
    lower_edge = height * (0.75 - 0.75 * squint * (1 - blink))
    upper = [(x0 + width * t, y0 + upper_edge * (1 - t * t)) for t in curve]
    lower = [(x0 + width * t, y0 + lower_edge * (1 - t * t)) for t in curve]
    pen.ellipse(x0, y0 - 0.02, width, 0.2, lid)
    pen.polygon(upper + lower[::-1], WHITE)
    pupil_x = x0 + 0.1 * side * (c["eyeLookOut" + name] - c["eyeLookIn" + name])
    pupil_y = y0 - 0.01 + 0.085 * (c["eyeLookDown" + name] - c["eyeLookUp" + name])
    pen.ellipse(pupil_x, pupil_y, 0.08, 0.08, look["iris"])
    pen.ellipse(pupil_x, pupil_y, 0.04, 0.04, DARK)
    # The lids hide what of the iris lies outside the opening.
    for edge, rise, color in ((upper, -0.2, lid), (lower, 0.2, skin)):
        socket = [(x0 + width * t, y0 - 0.02 + rise * math.sqrt(1 - t * t)) for t in curve]
        pen.polygon(edge + socket[::-1], color)
    pen.line(upper, DARK, 0.035)
    pen.line(lower, mix(skin, DARK, 0.35 + 0.5 * squint), 0.02 + 0.02 * squint)
    x0 += side * 0.05
    pen.ellipse(x0, 0.2 - 0.07 * cheek, 0.13, 0.07, mix(skin, RED, 0.75 * cheek))
    fold = [(x0 + 0.15 * t, 0.12 - 0.08 * cheek + 0.06 * t * t) for t in curve]
    pen.line(fold, mix(skin, DARK, 0.7 * cheek), 0.03)


def draw_brow_and_nose(pen: Pen, look: dict, c: dict, side: int, name: str) -> None:
    """One brow and one side of the nose (browInnerUp, browOuterUp, browDown, noseSneer)."""
    down, outer, inner, sneer = c["browDown" + name], c["browOuterUp" + name], c["browInnerUp"], c["noseSneer" + name]
    bend = [(-0.19, 0.13 * down - 0.17 * inner),
            (-0.02, 0.06 * down - 0.05 * inner - 0.08 * outer - 0.03),
            (0.2, 0.02 * down - 0.19 * outer + 0.02)]
    brow = [(side * (look["gap"] + x - 0.02 * down), y - 0.43) for x, y in bend]
    pen.line(brow, look["hair"], look["brow"])
    wing_x, wing_y = side * 0.09 * look["nose"], 0.2 - 0.07 * sneer
    pen.line([(side * 0.05, -0.15), (wing_x, wing_y - 0.03)], mix(look["skin"], DARK, 0.2), 0.025)
    pen.ellipse(wing_x, wing_y, 0.05 + 0.02 * sneer, 0.035, mix(look["skin"], DARK, 0.45))


def mouth_curves(look: dict, c: dict) -> list[list]:
    """Outer and inner edge of the upper lip, inner and outer edge of the lower: 15 points each, left to right."""
    pucker, funnel = c["mouthPucker"], c["mouthFunnel"]
    x0 = 0.13 * (c["mouthLeft"] - c["mouthRight"]) + 0.07 * (c["jawLeft"] - c["jawRight"])
    gap = 0.30 * (c["jawOpen"] - c["mouthClose"]) + 0.12 * funnel
    width = look["mouth"] * (1 - 0.5 * pucker - 0.3 * funnel)
    bulge = 1 + 0.9 * pucker + 0.5 * funnel
    upper_lip = 0.065 * bulge * (1 - 0.95 * c["mouthRollUpper"])
    lower_lip = 0.085 * bulge * (1 - 0.95 * c["mouthRollLower"])
    one_sided = ["mouthSmile", "mouthFrown", "mouthStretch", "mouthPress", "mouthUpperUp", "mouthLowerDown"]
    columns = []
    for k in range(-7, 8):
        t, name = k / 7, "Left" if k > 0 else "Right"
        reach = min(1.0, 3 * abs(t))  # one-sided actions fade towards the middle
        smile, frown, stretch, press, up, low = (reach * c[action + name] for action in one_sided)
        arch = 1 - t * t
        opening, thick = math.sqrt(arch), math.sqrt(arch) * (1 - 0.6 * press)
        x = x0 + t * (width + 0.06 * smile + 0.16 * stretch)
        y = 0.50 + t * t * 0.17 * (frown - smile) + 0.03 * smile * arch
        upper = y - opening * (0.13 * up + 0.3 * max(gap, 0)) - 0.09 * c["mouthShrugUpper"] * arch
        lower = y + opening * (0.13 * low + 0.7 * gap) - 0.07 * c["mouthShrugLower"] * arch
        columns.append([(x, upper - upper_lip * thick), (x, upper), (x, lower), (x, lower + lower_lip * thick)])
    return [list(edge) for edge in zip(*columns)]


def draw_mouth(pen: Pen, look: dict, c: dict) -> None:
    """Lips, teeth and tongue (all mouth actions, tongueOut)."""
    upper_out, upper_in, lower_in, lower_out = mouth_curves(look, c)
    pen.polygon(upper_in + lower_in[::-1], CAVITY)
    upper_teeth = [(x, max(y, min(y + 0.06, other))) for (x, y), (_, other) in zip(upper_in, lower_in)]
    lower_teeth = [(x, min(y, max(y - 0.06, other))) for (x, y), (_, other) in zip(lower_in, upper_in)]
    pen.polygon(upper_in[2:-2] + upper_teeth[2:-2][::-1], WHITE)
    pen.polygon(lower_in[2:-2] + lower_teeth[2:-2][::-1], WHITE)
    pen.polygon(upper_out + upper_in[::-1], look["lips"])
    pen.polygon(lower_in + lower_out[::-1], look["lips"])
    pen.line(upper_in, mix(look["lips"], DARK, 0.6), 0.02)
    pen.line(lower_in, mix(look["lips"], DARK, 0.6), 0.02)
    x, y, tongue = *lower_in[7], c["tongueOut"]
    if tongue > 0:
        pen.ellipse(x, y + 0.08 * tongue, 0.06 + 0.06 * tongue, 0.17 * tongue, TONGUE)
        pen.line([(x, y), (x, y + 0.15 * tongue)], mix(TONGUE, DARK, 0.4), 0.02)


def draw_face(coefficients: dict, identity: str = "id000", size: int = 64) -> Image.Image:
    """Draws a cartoon face on which each of the 52 actions can be seen.

    Args: the 52 coefficients by name, each 0..1; the person, who fixes the looks; the side in pixels.
    Returns: an RGB picture, `size` x `size`. The same arguments give the same pixels.
    """
    look = appearance(identity)
    pen = Pen(size, look["background"])
    draw_head(pen, look, coefficients)
    draw_mouth(pen, look, coefficients)
    for side, name in ((1, "Left"), (-1, "Right")):
        draw_eye(pen, look, coefficients, side, name)
        draw_brow_and_nose(pen, look, coefficients, side, name)
        for action, start, end in CREASES:
            value = coefficients[action.replace("_", name)]
            if value > 0:
                crease = [(side * x, y) for x, y in (start, end)]
                pen.line(crease, mix(look["skin"], DARK, 0.85 * value), 0.03)
    return pen.canvas.reduce(SUPERSAMPLE)


def draw_record(record: dict) -> None:
    """Draws the face of a record to its image path."""
    draw_face(record["coefficients"], record.get("identity", "id000")).save(record["image"])


def draw_all(records: list[dict], folder: Path) -> list[dict]:
    """Draws all faces into folder/images, on all cores. Returns the records with the paths of these images."""
    images = folder.absolute() / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = [{**record, "image": str(images / f"{index:06d}.png")} for index, record in enumerate(records)]
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(draw_record, records, chunksize=64)
        list(tqdm(drawn, total=len(records), desc="drawing", unit=" faces", disable=None))
    return records


# ---------------------------------------------------------------------------------------------------
# The demo, and the stage itself
# ---------------------------------------------------------------------------------------------------

def sample_expression(rng: np.random.Generator) -> dict:
    """Draws the 52 coefficients of a plausible face: one or two patterns, stray actions, asymmetry, a gaze."""
    patterns = 2 * [pattern for _, pattern in EMOTIONS.values()] + list(GESTURES.values())
    c = dict.fromkeys(ARKIT_NAMES, 0.0)
    for strength in (rng.uniform(0.3, 1.1), rng.uniform(0.2, 0.8) * (rng.random() < 0.4)):
        pattern = expand(patterns[rng.integers(len(patterns))])
        pattern = mirror(pattern) if rng.random() < 0.5 else pattern
        for name, value in pattern.items():
            c[name] = max(c[name], value * strength * rng.uniform(0.8, 1.2))
    for name in rng.choice(ARKIT_NAMES, rng.integers(1, 6), replace=False):
        c[name] = max(c[name], rng.uniform(0.2, 1.0))
    tilt = rng.normal(0, 0.15)
    for name in ARKIT_NAMES:
        c[name] *= 1 + tilt * (name.endswith("Left") - name.endswith("Right")) + rng.normal(0, 0.08)
    # The two eyes turn together. x > 0 is the subject's left.
    x, y = (rng.uniform(-1, 1), rng.uniform(-1, 1)) if rng.random() < 0.6 else (0.0, 0.0)
    gaze = {"OutLeft": x, "InRight": x, "InLeft": -x, "OutRight": -x,
            "UpLeft": y, "UpRight": y, "DownLeft": -y, "DownRight": -y}
    for end, value in gaze.items():
        c["eyeLook" + end] = max(value, 0.0) * rng.uniform(0.9, 1.1)
    # What else a closed eye does cannot be seen.
    for action in ("eyeLookOut", "eyeLookIn", "eyeLookUp", "eyeLookDown", "eyeWide", "eyeSquint"):
        for side in ("Left", "Right"):
            c[action + side] *= 1 - c["eyeBlink" + side]
    # Opposite actions cancel in a drawing as in a face: the weaker one gives way.
    for one, other in (("jawLeft", "jawRight"), ("mouthLeft", "mouthRight"),
                       ("mouthSmileLeft", "mouthFrownLeft"), ("mouthSmileRight", "mouthFrownRight")):
        c[min(one, other, key=c.get)] = 0.0
    c["mouthClose"] = min(c["mouthClose"], c["jawOpen"])  # ARKit: closes the lips over an open jaw
    return {name: round(min(max(0.0, value), 1.0), 3) for name, value in c.items()}


def make_demo(folder: Path, count: int, seed: int) -> list[Path]:
    """Draws `count` faces, 20 to a person. Returns the paths of train.jsonl and val.jsonl, which share no person."""
    records = []
    for index in range(count):
        identity = f"id{seed * 10_000 + index // 20:03d}"  # fixes the looks: another seed draws other people
        coefficients = sample_expression(np.random.default_rng([seed, index]))
        records.append({"image": None, "identity": identity, "coefficients": coefficients})
    records = draw_all(records, folder)
    held_out = max(1, count // 20 // 12) * 20  # one person in twelve
    files = {folder / "train.jsonl": records[:-held_out], folder / "val.jsonl": records[-held_out:]}
    for path, part in files.items():
        write_records(path, part)
    return list(files)


def print_summary(records: list[dict], counts: Counter) -> None:
    """Prints what was read: records, people, oddities, commonest expressions, most and least used actions."""
    people = {record["identity"] for record in records if "identity" in record}
    oddities = "".join(f", {count} {what}" for what, count in counts.items() if count)
    print(f"{len(records)} records, {len(people)} identities{oddities}")
    sample = records[:5000]
    common = Counter(describe(record["coefficients"])["expression_category"] for record in sample).most_common(6)
    print("expressions: " + ", ".join(f"{category} {100 * count / len(sample):.0f}%" for category, count in common))
    active = Counter(name for record in records for name in ARKIT_NAMES if record["coefficients"][name] >= ACTIVE)
    ranked = sorted(ARKIT_NAMES, key=lambda name: -active[name])
    shares = [f"{name} {100 * active[name] / len(records):.0f}%" for name in ranked]
    print(f"most active: {', '.join(shares[:4])}; least: {', '.join(shares[-4:])}")


def main(args: argparse.Namespace) -> None:
    if args.limit is not None and args.limit < 1 or args.demo < 240:
        raise SystemExit(f"--limit {args.limit}, --demo {args.demo}: expected --limit of at least 1 "
                         "and --demo of at least 240 (12 people of 20 faces)")
    one_take = len(args.inputs) == 1 and args.inputs[0].endswith(".csv")
    if args.frames and not (one_take and Path(args.frames).is_dir()):
        raise SystemExit(f"--frames {args.frames} with {args.inputs or 'no INPUT'}: "
                         "expected an existing folder and one .csv take")
    if not args.inputs:
        folder = Path(args.out or "data/demo")
        for path in make_demo(folder, args.limit or args.demo, args.seed):
            print(f"wrote {path}")
        flags = f" --data {folder / 'train.jsonl'} --val {folder / 'val.jsonl'}" if args.out else ""
        print(f"next: python distill.py{flags}")
        return
    counts = Counter()
    records = read_inputs(args, counts)
    ending = ".avatars" if args.render else ".annotated.jsonl"
    folder = Path(args.out or Path(args.inputs[0]).with_suffix(ending))
    out = folder / "records.jsonl" if args.render else folder
    if out.absolute() in [Path(name).absolute() for name in args.inputs]:
        raise SystemExit(f"--out {out} is an INPUT and would be overwritten; choose another file")
    if args.render:
        records = draw_all(records, folder)
    write_records(out, records)
    print_summary(records, counts)
    print(f"wrote {out}")
    if all(record["image"] for record in records):
        print(f"next: python distill.py --data {out}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing half-written was kept, run the same command again")
