# SPDX-License-Identifier: MIT
"""Stage I of SemanticFace, semantic supervision (arXiv 2603.14827, Sec. 3.1): coefficients -> words.

Turns the 52 ARKit blendshape coefficients of a face into a description with four fields, by rules that
anyone can check or by a frozen language model. Also draws the demo: cartoon faces whose coefficients are
known, for training, validation and, in a second drawing style, a test of domain shift. Left and right are
the subject's: the left eye is on the picture's right.

Reads:  label or prediction records (.jsonl), Live Link Face takes (.csv), MediaPipe blendshapes (.json),
        told apart by their content, names as eyeBlinkLeft, EyeBlinkLeft or eyeBlink_L (the demo: nothing)
Writes: annotated records, one JSON object a line, image paths relative to the file
    {"image": "images/000001.png", "identity": "id017", "coefficients": {"eyeBlinkLeft": 0.123, ...},
     "description": {"expression_category": "slight happiness", "muscle_movements": "Mouth: both ...",
                     "emotional_implication": "joy or amusement", "symmetry": "symmetric"},
     "annotator": "rules"}

    python annotate.py                                               # the demo, data/demo
    python annotate.py take.csv --frames frames/ --out train.jsonl   # your own recording
    python annotate.py labels.jsonl --llm Qwen/Qwen3-4B-Instruct-2507 --out train.jsonl   # as the paper does
"""
import argparse
import csv
import gc
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

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

FIELDS = ["expression_category", "muscle_movements", "emotional_implication", "symmetry"]  # Sec. 3.1
FORMS = ("label records (.jsonl), a Live Link Face take (.csv with its header) or MediaPipe blendshapes "
         "(.json), with the ARKit names")
LLM_PROMPT = """You are an expert in facial anatomy. ARKit blendshape coefficients (0 to 1) of a face: {}.
Left and right are the subject's. Describe the face in one JSON object with four strings and nothing else:
{{"expression_category": "...", "muscle_movements": "by region, with side and intensity", \
"emotional_implication": "... or not clearly observable", "symmetry": "..."}}"""
LLM_TRIES, LLM_TOKENS = 3, 400  # attempts for a valid answer, and tokens of one

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

# What an emotion implies, and its EMFACS action units (Friesen & Ekman 1983) as the ARKit actions they move:
# 1 browInnerUp, 2 browOuterUp, 4 browDown, 5 eyeWide, 6 cheekSquint, 7 eyeSquint, 9 noseSneer,
# 10 mouthUpperUp, 12 mouthSmile, 14 mouthDimple, 15 mouthFrown, 20 mouthStretch, 23 mouthPress, 26 jawOpen.
EMOTIONS = {
    "happiness": ("joy or amusement", {"cheekSquint_": 0.6, "mouthSmile_": 1.0}),
    "sadness": ("sorrow or disappointment", {"browInnerUp": 1.0, "browDown_": 0.3, "mouthFrown_": 0.9}),
    "surprise": ("astonishment", {"browInnerUp": 0.9, "browOuterUp_": 0.9, "eyeWide_": 0.8, "jawOpen": 0.8}),
    "fear": ("alarm or anxiety", {"browInnerUp": 0.8, "browOuterUp_": 0.5, "browDown_": 0.3, "eyeWide_": 0.9,
                                  "eyeSquint_": 0.2, "mouthStretch_": 0.8, "jawOpen": 0.3}),
    "anger": ("irritation or determination",
              {"browDown_": 1.0, "eyeWide_": 0.2, "eyeSquint_": 0.5, "mouthPress_": 0.7}),
    "disgust": ("aversion", {"noseSneer_": 1.0, "mouthUpperUp_": 0.6, "mouthFrown_": 0.4}),
    "contempt": ("disdain or smugness", {"mouthSmileLeft": 0.7, "mouthDimpleLeft": 0.8}),
}
IMPLICATIONS = {emotion: implication for emotion, (implication, _) in EMOTIONS.items()}

# Movements of the demo that are no emotion, as a blink, a wink, speech or chewing, in the same notation.
GESTURES = [
    {}, {"eyeBlink_": 1.0}, {"eyeBlinkLeft": 1.0, "cheekSquintLeft": 0.5, "mouthSmileLeft": 0.4},
    {"mouthPucker": 0.9}, {"mouthFunnel": 0.9, "jawOpen": 0.3}, {"jawOpen": 0.8, "mouthLowerDown_": 0.3},
    {"mouthStretch_": 0.5, "mouthLowerDown_": 0.6, "mouthUpperUp_": 0.4},
    {"mouthRollLower": 0.7, "mouthRollUpper": 0.7}, {"cheekPuff": 0.9, "mouthPress_": 0.4},
    {"jawOpen": 0.6, "mouthClose": 0.5, "jawLeft": 0.6, "mouthLeft": 0.5},
    {"mouthShrugLower": 0.8, "mouthShrugUpper": 0.6, "mouthFrown_": 0.4}, {"tongueOut": 0.9, "jawOpen": 0.4},
    {"jawForward": 0.9, "mouthRollUpper": 0.3}, {"mouthDimple_": 0.8, "mouthPress_": 0.5},
]


def parse_args(argv=None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="records, takes or blendshapes; without any, the demo")
    add("--demo", type=int, default=16_000, help="faces of the demo (default %(default)s)")
    add("--frames", help="folder of the take's pictures, one for each row in sorted order")
    add("--every", type=int, default=1, help="keep every Nth record of each input (default %(default)s)")
    add("--out", help="file, or folder for --render and the demo (default beside INPUT, data/demo)")
    add("--render", action=argparse.BooleanOptionalAction, default=False, help="draw every record's face")
    add("--llm", help="let this chat model (hub id or folder) write the descriptions instead of the rules")
    add("--batch-size", type=int, default=16, help="records at a time for --llm (default %(default)s)")
    add("--device", default="auto", help="for --llm: cpu, cuda, or auto (default %(default)s)")
    add("--limit", type=int, help="use the first LIMIT records only")
    add("--seed", type=int, default=0, help="of the demo; another draws other people (default %(default)s)")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------
# Records: reading and writing
# ---------------------------------------------------------------------------------------------------

@lru_cache(1000)
def canonical(name: str) -> str:
    """The ARKit name for EyeBlinkLeft (Live Link), eyeBlink_L (ARFaceAnchor dumps) or eyeBlinkLeft."""
    name = name.strip()
    name = name[:1].lower() + name[1:]
    return {"_L": name[:-2] + "Left", "_R": name[:-2] + "Right"}.get(name[-2:], name)


def check_coefficients(coefficients, where: str, counts: Counter) -> dict:
    """Returns the 52 in order, clipped to 0..1 since real takes reach 1.053; refuses anything else."""
    given = coefficients if isinstance(coefficients, dict) else {}
    missing = [name for name in ARKIT_NAMES if name not in given]
    if missing == ["tongueOut"]:  # MediaPipe and BEAT cannot see it
        given, missing = {**given, "tongueOut": 0.0}, []
        counts["records without tongueOut, set to 0"] += 1
    if missing or len(given) > len(ARKIT_NAMES):
        unknown = [name[:40] for name in given if name not in ARKIT_NAMES][:5]
        raise SystemExit(f"{where}: missing {missing[:5]}, unknown {unknown}; expected the 52 ARKit names")
    checked = {}
    for name in ARKIT_NAMES:
        value = given[name]
        if type(value) not in (int, float) or not -0.1 <= value <= 1.1:  # also refuses True and NaN
            raise SystemExit(f"{where}: {name} is {value!r:.40}, expected 0 to 1 (divide percentages by 100)")
        if not 0 <= value <= 1:
            value = min(max(0.0, value), 1.0)
            counts["clipped values"] += 1
        checked[name] = value
    return checked


def read_input(path: Path, pictures: list[str] | None, every: int, counts: Counter) -> Iterator[dict]:
    """Yields every `every`-th record of a file in any known form; `pictures`, if given, go with its rows."""
    rows = read_rows(path)
    if pictures is not None:
        rows = list(rows)
        if len(pictures) != len(rows):
            raise SystemExit(f"--frames holds {len(pictures)} pictures, {path} {len(rows)} rows; expected "
                             "one picture for each row, in sorted order")
    folder = str(path.parent.absolute())
    for index, (where, row) in enumerate(islice(rows, 0, None, every)):
        if row.pop("error", None):
            counts["without a face or a prediction left out"] += 1
            continue
        if pictures is not None:
            row["image"] = pictures[index * every]
        elif row.get("image"):
            row["image"] = os.path.join(folder, row["image"])
        if not isinstance(row["coefficients"], Numbers):
            row["coefficients"] = check_coefficients(row["coefficients"], where, counts)
        yield row


def read_rows(path: Path) -> Iterable[tuple]:
    """(where, record) of each record of a file, whose form its beginning tells."""
    if not path.is_file():
        raise SystemExit(f"{path} is no file; expected {FORMS}")
    with open_text(path) as file:
        first = next((line for line in file if not line.isspace()), None)
    if first is None:
        raise SystemExit(f"{path} is empty; expected {FORMS}")
    value = parse_json(first)
    if isinstance(value, dict) and "coefficients" in value:
        return rows_of_jsonl(path)
    value = parse_json(path.read_text("utf-8-sig", "replace"))
    if isinstance(value, list | dict):
        return rows_of_json(path, value, f"{path}, line 1")
    if "," in first and first.lstrip()[0] not in "{[":
        return rows_of_csv(path)
    return rows_of_jsonl(path)


def open_text(path: Path) -> TextIO:
    """Opens a file of any bytes for reading lines, which end at a newline only."""
    return path.open(encoding="utf-8-sig", errors="replace", newline="\n")


def parse_json(text: str):
    """The value of a JSON text, None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class Numbers(Mapping):
    """Coefficients by name, known to be right, with the JSON text they came in, to be copied as it is.

    A list holds them, which is made sooner than a dict.
    """

    __slots__ = ["numbers", "text"]

    def __init__(self, numbers: list[float], text: str):
        self.numbers, self.text = numbers, text

    def __getitem__(self, name: str) -> float:
        return self.numbers[ARKIT_NAMES.index(name)]

    def __iter__(self):
        return iter(ARKIT_NAMES)

    def __len__(self):
        return len(ARKIT_NAMES)

    def values(self):
        return self.numbers


# A record as these scripts write it, the names in order, numbers from 0 to 1. One match reads and checks it.
TEXT = r'"([^"\\\x00-\x1f]*)"'
NUMBER = r"(0\.[0-9]++|1\.0|0|1|[1-9](?:\.[0-9]+)?e-0*[1-9][0-9]*)"
PLAIN = re.compile(rf'{{(?:"image": (?:null|{TEXT}), )?(?:"identity": {TEXT}, )?"coefficients": ({{'
                   + ", ".join(f'"{name}": {NUMBER}' for name in ARKIT_NAMES) + r'})(?:, (".*))?}\s*')


class Decimals(dict):
    """The values of numbers in JSON: those of few decimals at hand, of others calculated."""

    def __missing__(self, text: str) -> float:
        return float(text)


DECIMALS = Decimals({str(k / 10_000): k / 10_000 for k in range(10_001)})


def read_plain(line: str) -> dict | None:
    """The record in a line that matches PLAIN, its coefficients as Numbers. None for other lines."""
    found = PLAIN.fullmatch(line)
    if not found:
        return None
    image, identity, text, *numbers, rest = found.groups()
    others = parse_json(f"{{{rest}}}") if rest else {}
    if others is None or "coefficients" in others:
        return None
    first = {"image": image} if identity is None else {"image": image, "identity": identity}
    return {**first, **others, "coefficients": Numbers(list(map(DECIMALS.__getitem__, numbers)), text)}


def rows_of_jsonl(path: Path) -> Iterator[tuple]:
    """Yields (where, record) of label or prediction records."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                value = read_plain(line) or json.loads(line)
            except (ValueError, RecursionError) as error:
                fix = "expected one object a line, delete a torn one"
                raise SystemExit(f"{where}: not JSON ({error}); {fix}")
            yield from rows_of_json(path, value, where)


def rows_of_json(path: Path, value, where: str) -> list[tuple]:
    """(where, record) of a JSON value: a record, MediaPipe's result for one or many images, or just names."""
    if isinstance(value, list) and not is_categories(value):
        try:
            parts = [rows_of_json(path, part, f"{where}, entry {k}") for k, part in enumerate(value, 1)]
        except RecursionError:
            raise SystemExit(f"{path}: hundreds of lists within lists; expected {FORMS}")
        return [row for part in parts for row in part]
    if isinstance(value, dict) and "coefficients" in value:
        record = {key: value[key] for key in ("image", "identity", "coefficients", "error") if key in value}
        if not isinstance(record.get("image"), str | None):
            given = f"image is {value['image']!r:.60}"
            raise SystemExit(f"{where}: {given}, expected a path relative to the file")
        if not isinstance(record.get("identity"), str | int | None):
            raise SystemExit(f"{where}: identity is {value['identity']!r:.60}, expected a name")
        if isinstance(value["coefficients"], dict):
            record["coefficients"] = {canonical(name): v for name, v in value["coefficients"].items()}
        return [(where, record)]
    if isinstance(value, dict) and "faceBlendshapes" in value:
        faces = value["faceBlendshapes"]
        return rows_of_json(path, faces, where) if faces != [] else [(where, {"error": "no face was found"})]
    if isinstance(value, dict) and is_categories(value.get("categories")):
        value = value["categories"]
    if is_categories(value):
        value = {category["categoryName"]: category.get("score") for category in value}
        value.pop("_neutral", None)
    if not isinstance(value, dict) or not {canonical(name) for name in value} & set(ARKIT_NAMES):
        raise SystemExit(f"{where}: expected an object with the field \"coefficients\", or {FORMS}")
    return [(where, {"coefficients": {canonical(name): number for name, number in value.items()}})]


def is_categories(value) -> bool:
    """Whether a JSON value is MediaPipe's list of {"categoryName", "score"}."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(part, dict) and isinstance(part.get("categoryName"), str) for part in value)


def rows_of_csv(path: Path) -> list[tuple]:
    """(where, record) of a Live Link Face take, by column name; other columns are ignored."""
    try:
        with open_text(path) as file:
            header, *lines = csv.reader(file)
    except csv.Error as error:
        raise SystemExit(f"{path}: not readable as CSV ({error}); expected {FORMS}")
    columns = {canonical(name): place for place, name in enumerate(header)}
    missing = [name for name in ARKIT_NAMES if name not in columns and name != "tongueOut"]
    if missing:
        raise SystemExit(f"{path}: no column for {missing[:5]}; expected {FORMS}")
    rows = []
    for number, line in enumerate(lines, 2):
        where, coefficients = f"{path}, line {number}", {}
        for name in ARKIT_NAMES:
            if name in columns:
                word = line[columns[name]] if columns[name] < len(line) else None
                try:
                    coefficients[name] = float(word)
                except (TypeError, ValueError):
                    raise SystemExit(f"{where}: {name} is {word!r:.40}, expected a number from 0 to 1")
        rows.append((where, {"image": None, "identity": path.stem, "coefficients": coefficients}))
    if not rows:
        raise SystemExit(f"{path}: a header without rows; expected {FORMS}")
    return rows


def as_array(records: list[dict]) -> np.ndarray:
    """The coefficients of records as (N, C)."""
    numbers = chain.from_iterable(record["coefficients"].values() for record in records)
    return np.fromiter(numbers, float).reshape(-1, len(ARKIT_NAMES))


@lru_cache
def relative_folder(path: str, folder: str) -> str:
    """The path, with slashes and one at its end, of a folder seen from another one; both are absolute."""
    relative = os.path.relpath(path, folder).replace(os.sep, "/")
    return "" if relative == "." else relative + "/"


def relative_image(image: str | None, folder: str) -> str | None:
    """The path relative to `folder`, with slashes, of an image that is absolute or already relative to it."""
    if not image:
        return None
    path, name = os.path.split(os.path.join(folder, image))
    return relative_folder(path, folder) + name


ENCODE = json.JSONEncoder(ensure_ascii=False).encode


def record_line(record: dict, folder: str, description: dict, annotator: str) -> str:
    """The line of an annotated record, its image relative to `folder`."""
    image = ENCODE(relative_image(record.get("image"), folder))
    identity = f'"identity": {ENCODE(record["identity"])}, ' if "identity" in record else ""
    coefficients = getattr(record["coefficients"], "text", None) or ENCODE(record["coefficients"])
    return (f'{{"image": {image}, {identity}"coefficients": {coefficients}, '
            f'"description": {ENCODE(description)}, "annotator": {ENCODE(annotator)}}}\n')


class Summary:
    """What was written, in counts, so that the records need not be kept."""

    def __init__(self):
        self.records, self.pictures, self.active = 0, 0, np.zeros(len(ARKIT_NAMES))
        self.people, self.categories = set(), Counter()

    def add(self, records: list[dict], values: np.ndarray, descriptions: list[dict]) -> None:
        """Counts records, their coefficients as rows (N, C) and their descriptions."""
        self.records += len(records)
        self.pictures += sum(1 for record in records if record.get("image"))
        self.active += (values >= ACTIVE).sum(axis=0)
        self.people.update(record["identity"] for record in records if "identity" in record)
        self.categories.update(description["expression_category"] for description in descriptions)

    def show(self, counts: Counter) -> None:
        """Prints the summary and, from `counts`, what was clipped or skipped while reading."""
        oddities = "".join(f", {count} {what}" for what, count in counts.items() if count)
        print(f"{self.records} records, {len(self.people)} identities{oddities}")
        common = self.categories.most_common(6)
        shares = [f"{name} {100 * count / self.records:.0f}%" for name, count in common]
        print(f"expressions: {', '.join(shares)}")
        active = Counter(dict(zip(ARKIT_NAMES, self.active.tolist()))).most_common()
        shares = [f"{name} {100 * count / self.records:.0f}%" for name, count in active]
        print(f"most active: {', '.join(shares[:4])}; least: {', '.join(shares[-4:])}")


def write_records(path: Path, records: Iterable[dict]) -> Summary:
    """Describes the records by rules and writes them, whole or not at all."""
    folder, partial = str(path.parent.absolute()), path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    records, summary = iter(records), Summary()
    gc.disable()  # looking for cycles, of which there are none, would take 7% longer
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            bar = tqdm(desc=f"describing {path.name}", unit=" faces", disable=None)
            while part := list(islice(records, 1000)):
                values = as_array(part)
                descriptions = describe_all(values)
                lines = [record_line(record, folder, description, "rules")
                         for record, description in zip(part, descriptions)]
                file.write("".join(lines))
                summary.add(part, values, descriptions)
                bar.update(len(part))
            bar.close()
        partial.replace(path)
    finally:
        gc.enable()
        partial.unlink(missing_ok=True)
    return summary


# ---------------------------------------------------------------------------------------------------
# Describing: coefficients -> four fields (Sec. 3.1)
# ---------------------------------------------------------------------------------------------------

def sides(key: str) -> list[str]:
    """The ARKit names a table key stands for: aLeft and aRight for "a_", a and b for "a/b", else itself."""
    return [key[:-1] + "Left", key[:-1] + "Right"] if key.endswith("_") else key.split("/")


def expand(pattern: dict) -> dict:
    """Writes out the keys of a pattern that stand for two ARKit names."""
    return {name: value for key, value in pattern.items() for name in sides(key)}


def mirror(pattern: dict) -> dict:
    """Swaps Left and Right in the names of a pattern."""
    return {name.replace("Left", "Right") if "Left" in name else name.replace("Right", "Left"): value
            for name, value in pattern.items()}


def intensity(value: float) -> str:
    """The adverb of the band that `value` (0..1) lies in."""
    return next(adverb for end, adverb in BANDS if value < end)


# Emotion prototypes as unit vectors over the 52. Gaze and blinks, which no emotion has, are not compared.
PROTOTYPES = [(emotion, expand(pattern)) for emotion, (_, pattern) in EMOTIONS.items()]
PROTOTYPES.append(("contempt", mirror(EMOTIONS["contempt"][1])))  # one-sided, on either side
VECTORS = np.array([[pattern.get(name, 0.0) for name in ARKIT_NAMES] for _, pattern in PROTOTYPES])
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
EXPRESSIVE = np.array([not name.startswith(("eyeLook", "eyeBlink")) for name in ARKIT_NAMES])


def classify(values: np.ndarray) -> list[tuple[str, str]]:
    """Expression category and emotional implication of rows (N, C), by the cosine to EMFACS prototypes."""
    vectors = values * EXPRESSIVE  # (N, C)
    norms = np.linalg.norm(vectors, axis=1)
    cosines = vectors @ VECTORS.T / np.maximum(norms, 1e-9)[:, None]  # (N, prototypes)
    order = np.argsort(-cosines, axis=1)[:, :2]
    near = np.take_along_axis(cosines, order, axis=1)
    active = vectors.max(axis=1) >= ACTIVE
    peaks = (vectors * (VECTORS > 0)[order[:, 0]]).max(axis=1)
    results = []
    rows = zip(active.tolist(), order.tolist(), near.tolist(), peaks.tolist())
    for moves, (best, second), (cosine, next_cosine), peak in rows:
        emotion, other = PROTOTYPES[best][0], PROTOTYPES[second][0]
        if not moves:
            results.append(("neutral", "not clearly observable"))
        elif cosine < 0.5:
            results.append(("movement without a clear emotion", "not clearly observable"))
        elif next_cosine > 0.9 * cosine and other != emotion:
            mixed = f"{IMPLICATIONS[emotion]}, with {IMPLICATIONS[other]}"
            results.append((f"{emotion} mixed with {other}", mixed))
        else:
            degree = {"slightly": "slight ", "moderately": "", "strongly": "strong "}[intensity(peak)]
            results.append((degree + emotion, IMPLICATIONS[emotion]))
    return results


def phrase_table(noun: str, verb: str, paired: bool) -> list:
    """What to say of an action at bands 0 (inactive) to 3, or of a pair: phrases[left][right]."""
    adverbs = [None] + [adverb for _, adverb in BANDS]
    if not paired:  # both columns are the same one
        return [[adverb and f"{noun} {adverb} {verb}"] * len(adverbs) for adverb in adverbs]
    table = []
    for left in adverbs:
        row = [", ".join(f"{side} {noun} {adverb} {verb}"
                         for side, adverb in (("left", left), ("right", right)) if adverb)
               if left != right else left and f"both {noun}s {left} {verb}" for right in adverbs]
        table.append(row)
    return table


ACTIONS = [(region, [ARKIT_NAMES.index(name) for name in sides(key)], key, *words)
           for region, actions in MOVEMENTS.items() for key, words in actions.items()]
LEFT = np.array([columns[0] for _, columns, *_ in ACTIONS])  # the same where an action has one column
RIGHT = np.array([columns[-1] for _, columns, *_ in ACTIONS])
PHRASES = [(region, phrase_table(noun, verb, len(columns) == 2))
           for region, columns, _, noun, verb in ACTIONS]
# The pairs of each region; not gaze, since the eyes look one way, more or less.
PAIRS = {region.lower(): [columns for other, columns, key, *_ in ACTIONS
                          if other == region and key.endswith("_") and not key.startswith("eyeLook")]
         for region in MOVEMENTS}


def describe_all(values: np.ndarray) -> list[dict]:
    """The descriptions of rows of coefficients (N, C), in the order of ARKIT_NAMES."""
    bands = np.digitize(values, [ACTIVE] + [end for end, _ in BANDS[:-1]])  # (N, C): 0 is inactive
    left, right = bands[:, LEFT], bands[:, RIGHT]  # (N, actions)
    movements = [{} for _ in values]  # phrases of each row by region
    rows, actions = np.nonzero(left + right)
    found = zip(rows.tolist(), actions.tolist(), left[rows, actions].tolist(), right[rows, actions].tolist())
    for row, action, left_band, right_band in found:
        region, phrases = PHRASES[action]
        movements[row].setdefault(region, []).append(phrases[left_band][right_band])
    stronger = [[] for _ in values]  # sides of each row
    for region, pairs in PAIRS.items():
        if pairs:
            first, second = np.array(pairs).T
            difference = values[:, first] - values[:, second]  # (N, pairs)
            widest = np.abs(difference).argmax(axis=1)
            tilts = difference[np.arange(len(values)), widest]  # (N,)
            for row in np.flatnonzero(np.abs(tilts) >= ACTIVE).tolist():
                stronger[row].append(f"{'left' if tilts[row] > 0 else 'right'} {region}")
    descriptions = []
    for (category, implication), regions, tilted in zip(classify(values), movements, stronger):
        sentences = [f"{region}: {', '.join(phrases)}." for region, phrases in regions.items()]
        descriptions.append({
            "expression_category": category,
            "muscle_movements": " ".join(sentences) or "No visible movement.",
            "emotional_implication": implication,
            "symmetry": f"stronger on the {', '.join(tilted)}" if tilted else "symmetric"})
    return descriptions


def describe(coefficients: dict) -> dict:
    """The hierarchical semantic description (Sec. 3.1): four strings, never at odds with the coefficients."""
    return describe_all(np.array([[coefficients[name] for name in ARKIT_NAMES]], dtype=float))[0]


# ---------------------------------------------------------------------------------------------------
# Describing by a frozen language model (Sec. 3.1)
# ---------------------------------------------------------------------------------------------------

def llm_prompt(coefficients: dict) -> str:
    """What the language model is told: the active coefficients, never the picture."""
    active = {name: round(value, 2) for name, value in coefficients.items() if value >= ACTIVE}
    listed = ", ".join(f"{name} {value}" for name, value in active.items()) or "none: the face is at rest"
    return LLM_PROMPT.format(listed)


def read_description(text: str) -> dict | None:
    """The four fields from a language model's answer, or None if they are not all there as texts."""
    start = text.find("{")
    try:
        answer = json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else None
    except (ValueError, RecursionError):
        return None
    fields = [answer.get(field) for field in FIELDS] if isinstance(answer, dict) else [None]
    if not all(isinstance(value, str) and value.strip() for value in fields):
        return None
    return {field: " ".join(value.split()) for field, value in zip(FIELDS, fields)}


class Llm:
    """A frozen chat model that writes descriptions."""

    def __init__(self, name: str, device: str):
        import torch  # the rules and the drawings do without
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
        self.torch = torch
        logging.disable_progress_bar()
        self.device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
            self.model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(self.device).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise SystemExit(f"--llm {name} cannot be loaded ({reason}); expected a hub id or a folder")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def write(self, prompts: list[str], sample: bool) -> list[str]:
        """Answers to prompts, the likeliest or, for another try, sampled."""
        if self.tokenizer.chat_template:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = [self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
                       for turn in turns]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {name: inputs[name].to(self.device) for name in ("input_ids", "attention_mask")}
        with self.torch.inference_mode():
            tokens = self.model.generate(**inputs, do_sample=sample, max_new_tokens=LLM_TOKENS,
                                         pad_token_id=self.tokenizer.pad_token_id)
        return self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def write_llm_records(path: Path, records: list[dict], args: argparse.Namespace) -> Summary:
    """Lets a language model describe the records and appends them as they come, from where it stopped.

    A malformed answer is asked for again, LLM_TRIES times in all. Then the rules describe the record, and its
    "annotator" says so.
    """
    folder, partial = str(path.parent.absolute()), path.with_name(path.name + ".unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    kept, counts, summary = [], Counter(), Summary()
    lines = partial.read_text("utf-8", "replace").split("\n") if partial.is_file() else []
    for line, record in zip(lines, records):
        done = parse_json(line)
        if not done or done["coefficients"] != record["coefficients"] or args.llm not in done["annotator"]:
            break
        kept.append(line + "\n")
        counts[done["annotator"]] += 1
        summary.add([record], as_array([record]), [done["description"]])
    partial.write_text("".join(kept), "utf-8")
    llm = Llm(args.llm, args.device)
    bar = tqdm(total=len(records), initial=len(kept), desc="describing", unit=" faces", disable=None)
    with partial.open("a", encoding="utf-8", errors="backslashreplace") as file:
        for start in range(len(kept), len(records), args.batch_size):
            batch = records[start:start + args.batch_size]
            found = [None] * len(batch)
            for attempt in range(LLM_TRIES):
                open_ones = [k for k, description in enumerate(found) if not description]
                if open_ones:
                    prompts = [llm_prompt(batch[k]["coefficients"]) for k in open_ones]
                    for k, text in zip(open_ones, llm.write(prompts, sample=attempt > 0)):
                        found[k] = read_description(text)
            for k, record in enumerate(batch):
                annotator = args.llm if found[k] else f"rules, since {args.llm} gave no valid answer"
                found[k] = found[k] or describe(record["coefficients"])
                file.write(record_line(record, folder, found[k], annotator))
                counts[annotator] += 1
            summary.add(batch, as_array(batch), found)
            file.flush()
            bar.update(len(batch))
    bar.close()
    partial.replace(path)
    print("described by " + ", ".join(f"{name}: {count}" for name, count in counts.items()))
    return summary


# ---------------------------------------------------------------------------------------------------
# Drawing: coefficients -> cartoon face
# ---------------------------------------------------------------------------------------------------

DARK, WHITE, RED, CAVITY, TONGUE = (40, 25, 25), (250, 250, 245), (205, 80, 80), (70, 15, 20), (225, 105, 120)
# Two drawing styles: what the demo trains on, and one with other colours, proportions and lines, on which
# it is only tested. A proportion lies between two ends; lines are `line` times as wide, faces outlined.
STYLES = {
    "cartoon": {
        "skins": [(250, 220, 196), (240, 200, 170), (222, 176, 140), (190, 140, 104), (150, 104, 74),
                  (112, 76, 54)],
        "hairs": [(30, 24, 22), (70, 46, 30), (120, 80, 44), (196, 150, 80), (150, 60, 30), (150, 150, 150)],
        "irises": [(80, 50, 26), (50, 100, 60), (60, 110, 170), (100, 100, 110)],
        "proportions": {"fringe": (-0.75, -0.6), "width": (0.68, 0.80), "height": (0.76, 0.84),
                        "eye": (0.9, 1.15), "gap": (0.31, 0.37), "brow": (0.05, 0.09), "nose": (0.85, 1.2),
                        "mouth": (0.24, 0.31)},
        "line": 1.0, "outline": 0.0},
    "comic": {
        "skins": [(244, 232, 120), (200, 230, 150), (150, 210, 210), (150, 170, 230), (200, 150, 220),
                  (240, 170, 190)],
        "hairs": [(20, 60, 120), (170, 40, 90), (30, 110, 70), (110, 40, 130), (230, 120, 20),
                  (245, 245, 245)],
        "irises": [(150, 30, 40), (120, 60, 150), (20, 120, 120), (200, 150, 30)],
        "proportions": {"fringe": (-0.62, -0.5), "width": (0.80, 0.90), "height": (0.70, 0.76),
                        "eye": (1.15, 1.3), "gap": (0.36, 0.41), "brow": (0.03, 0.05), "nose": (0.6, 0.85),
                        "mouth": (0.31, 0.36)},
        "line": 1.5, "outline": 0.04},
}
SUPERSAMPLE = 4  # drawn at 4 times the size, then averaged

# Skin creases, as dark as the action is strong: both x, both y of the left one, mirrored for the right.
CREASES = [
    ("browDown", (0.05, 0.05), (-0.42, -0.26)), ("mouthUpperUp", (0.16, 0.26), (0.22, 0.34)),
    ("noseSneer", (0.03, 0.16), (-0.12, -0.07)), ("noseSneer", (0.03, 0.16), (-0.04, 0.01)),
    ("eyeSquint", (0.54, 0.65), (-0.19, -0.22)), ("eyeSquint", (0.54, 0.65), (-0.15, -0.12)),
    ("mouthPress", (0.19, 0.32), (0.38, 0.42)), ("mouthPress", (0.19, 0.32), (0.62, 0.58)),
    ("mouthDimple", (0.39, 0.39), (0.44, 0.56)), ("mouthShrugUpper", (0.035, 0.035), (0.27, 0.36)),
    ("mouthRollUpper", (0.0, 0.16), (0.37, 0.38)), ("mouthRollLower", (0.0, 0.16), (0.64, 0.63)),
    ("mouthShrugLower", (0.03, 0.06), (0.68, 0.74)),
]


class Pen:
    """Draws in face coordinates, -1 to 1: x to the right of the picture (the subject's left), y down."""

    def __init__(self, size: int, background: tuple, thickness: float):
        self.thickness = thickness
        self.canvas = Image.new("RGB", (size * SUPERSAMPLE, size * SUPERSAMPLE), background)
        self.draw = ImageDraw.Draw(self.canvas)
        self.half = size * SUPERSAMPLE / 2

    def scale(self, x: list, y: list) -> list:
        return (self.half * (1 + np.column_stack([x, y]))).ravel().tolist()

    def polygon(self, x: list, y: list, color: tuple):
        self.draw.polygon(self.scale(x, y), fill=color)

    def band(self, x: list, upper: list, lower: list, color: tuple):
        self.polygon(np.append(x, x[::-1]), np.append(upper, lower[::-1]), color)

    def line(self, x: list, y: list, color: tuple, width: float):
        pixels = max(1, round(width * self.thickness * self.half))
        self.draw.line(self.scale(x, y), fill=color, width=pixels, joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: tuple):
        self.draw.ellipse(self.scale([x - rx, x + rx], [y - ry, y + ry]), fill=color)


def mix(color: tuple, other: tuple, amount: float) -> tuple:
    """The color `amount` (0..1) of the way from `color` to `other`."""
    return tuple(round(a + (b - a) * amount) for a, b in zip(color, other))


def draw_head(pen: Pen, look: dict, c: dict) -> None:
    """Hair, outline, chin and puffed cheeks (jawOpen, jawLeft, jawRight, jawForward, cheekPuff)."""
    skin, width, height, forward = look["skin"], look["width"], look["height"], c["jawForward"]
    slide, drop = 0.14 * (c["jawLeft"] - c["jawRight"]), 0.14 * c["jawOpen"]
    turn = 2 * np.pi * np.arange(48) / 48
    x, y = np.cos(turn), np.sin(turn)
    below = np.maximum(y, 0) ** 2
    puff = 0.16 * c["cheekPuff"] * np.exp(-((y - 0.5) / 0.25) ** 2)
    x, y = width * x * (1 + puff - 0.12 * below) + slide * below, height * y + drop * below
    pen.ellipse(0, -0.12, width * 1.1, height * 1.03, look["hair"])
    pen.polygon(x, y, skin)
    pen.polygon(x[y < look["fringe"]], y[y < look["fringe"]], look["hair"])
    if look["outline"]:
        pen.line(np.append(x, x[0]), np.append(y, y[0]), DARK, look["outline"])
    chin = mix(skin, WHITE, 0.6 * forward)
    pen.ellipse(slide, height - 0.1 + drop, 0.14 + 0.14 * forward, 0.05 + 0.07 * forward, chin)
    for side in (-1, 1):
        pen.ellipse(side * 0.5, 0.36, 0.13, 0.13, mix(skin, WHITE, 0.55 * c["cheekPuff"]))


def draw_mouth(pen: Pen, look: dict, c: dict) -> None:
    """Lips, teeth and tongue (the jaw's opening and shift, tongueOut, mouth actions but the dimples)."""
    pucker, funnel, tongue, lips = c["mouthPucker"], c["mouthFunnel"], c["tongueOut"], look["lips"]
    t = np.arange(-7, 8) / 7  # from the right corner to the left
    arch, opening, reach = 1 - t * t, np.sqrt(1 - t * t), np.minimum(1, 3 * abs(t))
    smile, frown, stretch, press, up, low = (
        reach * np.where(t > 0, c["mouth" + action + "Left"], c["mouth" + action + "Right"])
        for action in ("Smile", "Frown", "Stretch", "Press", "UpperUp", "LowerDown"))
    x = 0.13 * (c["mouthLeft"] - c["mouthRight"]) + 0.07 * (c["jawLeft"] - c["jawRight"])
    x = x + t * (look["mouth"] * (1 - 0.5 * pucker - 0.3 * funnel) + 0.06 * smile + 0.16 * stretch)
    y = 0.50 + t * t * 0.17 * (frown - smile) + 0.03 * smile * arch
    gap = 0.30 * (c["jawOpen"] - c["mouthClose"]) + 0.12 * funnel
    upper = y - opening * (0.13 * up + 0.3 * max(gap, 0)) - 0.09 * c["mouthShrugUpper"] * arch
    lower = y + opening * (0.13 * low + 0.7 * gap) - 0.07 * c["mouthShrugLower"] * arch
    thick = opening * (1 - 0.6 * press) * (1 + 0.9 * pucker + 0.5 * funnel)
    pen.band(x, upper, lower, CAVITY)
    upper_teeth = np.maximum(upper, np.minimum(upper + 0.06, lower))
    lower_teeth = np.minimum(lower, np.maximum(lower - 0.06, upper))
    pen.band(x[2:-2], upper[2:-2], upper_teeth[2:-2], WHITE)
    pen.band(x[2:-2], lower[2:-2], lower_teeth[2:-2], WHITE)
    pen.band(x, upper - 0.065 * thick * (1 - 0.95 * c["mouthRollUpper"]), upper, lips)
    pen.band(x, lower, lower + 0.085 * thick * (1 - 0.95 * c["mouthRollLower"]), lips)
    pen.line(x, upper, mix(lips, DARK, 0.6), 0.02)
    pen.line(x, lower, mix(lips, DARK, 0.6), 0.02)
    if tongue > 0:
        pen.ellipse(x[7], lower[7] + 0.08 * tongue, 0.06 + 0.06 * tongue, 0.17 * tongue, TONGUE)
        pen.line([x[7], x[7]], [lower[7], lower[7] + 0.15 * tongue], mix(TONGUE, DARK, 0.4), 0.02)


def draw_side(pen: Pen, look: dict, c: dict, side: int) -> None:
    """Eye, cheek, brow, nostril and creases of one side: 1 is the subject's left, -1 the right."""
    c = {name.removesuffix("Left" if side > 0 else "Right"): value for name, value in c.items()}
    blink, squint, cheek, sneer = c["eyeBlink"], c["eyeSquint"], c["cheekSquint"], c["noseSneer"]
    skin, lid = look["skin"], mix(look["skin"], DARK, 0.12)
    x0, y0, width, height = side * look["gap"], -0.17, 0.2 * look["eye"], 0.105 * look["eye"]
    t = np.arange(-6, 7) / 6
    x, arch = x0 + width * t, 1 - t * t
    upper = y0 + height * (0.7 * blink - (1 + 0.75 * c["eyeWide"]) * (1 - blink)) * arch
    lower = y0 + height * (0.75 - 0.75 * squint * (1 - blink)) * arch
    pen.ellipse(x0, y0 - 0.02, width, 0.2, lid)
    pen.band(x, upper, lower, WHITE)
    pupil_x = x0 + 0.1 * side * (c["eyeLookOut"] - c["eyeLookIn"])
    pupil_y = y0 - 0.01 + 0.085 * (c["eyeLookDown"] - c["eyeLookUp"])
    pen.ellipse(pupil_x, pupil_y, 0.08, 0.08, look["iris"])
    pen.ellipse(pupil_x, pupil_y, 0.04, 0.04, DARK)
    # The lids hide what of the iris lies outside the opening.
    pen.band(x, upper, y0 - 0.02 - 0.2 * np.sqrt(arch), lid)
    pen.band(x, lower, y0 - 0.02 + 0.2 * np.sqrt(arch), skin)
    pen.line(x, upper, DARK, 0.035)
    pen.line(x, lower, mix(skin, DARK, 0.35 + 0.5 * squint), 0.02 + 0.02 * squint)
    x0 += side * 0.05
    pen.ellipse(x0, 0.2 - 0.07 * cheek, 0.13, 0.07, mix(skin, RED, 0.75 * cheek))
    pen.line(x0 + 0.15 * t, 0.12 - 0.08 * cheek + 0.06 * t * t, mix(skin, DARK, 0.7 * cheek), 0.03)
    down, inner, outer = c["browDown"], c["browInnerUp"], c["browOuterUp"]
    x = side * (look["gap"] + np.array([-0.19, -0.02, 0.2]) - 0.02 * down)
    y = np.array([0.13 * down - 0.17 * inner, 0.06 * down - 0.05 * inner - 0.08 * outer - 0.03,
                  0.02 * down - 0.19 * outer + 0.02]) - 0.43
    pen.line(x, y, look["hair"], look["brow"])
    wing, bottom = side * 0.09 * look["nose"], 0.2 - 0.07 * sneer
    pen.line([side * 0.05, wing], [-0.15, bottom - 0.03], mix(skin, DARK, 0.2), 0.025)
    pen.ellipse(wing, bottom, 0.05 + 0.02 * sneer, 0.035, mix(skin, DARK, 0.45))
    for action, x, y in CREASES:
        if c[action] > 0:
            pen.line(side * np.array(x), y, mix(skin, DARK, 0.85 * c[action]), 0.03)


def draw_face(coefficients: dict, identity: str = "id000", size: int = 64,
              style: str = "cartoon") -> Image.Image:
    """Draws a face of `size` pixels with every action visible; the identity alone fixes the looks."""
    rng = np.random.default_rng(list(str(identity).encode()))
    palette = STYLES[style]
    tone = rng.uniform(0, len(palette["skins"]) - 1.001)
    skin = mix(palette["skins"][int(tone)], palette["skins"][int(tone) + 1], tone % 1)
    look = {"skin": skin, "lips": mix(skin, RED, rng.uniform(0.5, 0.9)), "outline": palette["outline"],
            "hair": palette["hairs"][rng.integers(6)], "iris": palette["irises"][rng.integers(4)]}
    pen = Pen(size, background=tuple(rng.integers(60, 230, 3).tolist()), thickness=palette["line"])
    look |= {part: rng.uniform(low, high) for part, (low, high) in palette["proportions"].items()}
    draw_head(pen, look, coefficients)
    draw_mouth(pen, look, coefficients)
    draw_side(pen, look, coefficients, 1)
    draw_side(pen, look, coefficients, -1)
    return pen.canvas.reduce(SUPERSAMPLE)


def draw_all(records: list[dict], folder: Path, style: str = "cartoon") -> list[dict]:
    """Draws all faces, on all cores; returns the records with their images, relative to `folder`."""
    images = folder / ("images" if style == "cartoon" else f"images_{style}")
    images.mkdir(parents=True, exist_ok=True)
    coefficients = [record["coefficients"] for record in records]
    people = [record.get("identity", "id000") for record in records]
    drawn = []
    with ProcessPoolExecutor() as pool:
        faces = pool.map(draw_face, coefficients, people, repeat(64), repeat(style), chunksize=64)
        bar = tqdm(faces, "drawing", len(records), unit=" faces", disable=None)
        for face, record in zip(bar, records):  # the bar first, so that it sees the end
            path = images / f"{len(drawn):06d}.png"
            face.save(path)
            drawn.append({**record, "image": f"{images.name}/{path.name}"})
    return drawn


# ---------------------------------------------------------------------------------------------------
# The demo, and the stage itself
# ---------------------------------------------------------------------------------------------------

def sample_expression(rng: np.random.Generator) -> dict:
    """Draws 52 plausible coefficients: one or two patterns, stray actions, asymmetry and a gaze."""
    patterns = 2 * [pattern for _, pattern in EMOTIONS.values()] + GESTURES
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
    # The two eyes turn together, x > 0 to the subject's left; on a closed eye none of this can be seen.
    x, y = rng.uniform(-1, 1, 2).tolist() if rng.random() < 0.6 else (0.0, 0.0)
    gaze = {"OutLeft": x, "InRight": x, "InLeft": -x, "OutRight": -x,
            "UpLeft": y, "UpRight": y, "DownLeft": -y, "DownRight": -y}
    for end, value in gaze.items():
        c["eyeLook" + end] = max(value, 0.0) * rng.uniform(0.9, 1.1)
    for name in ARKIT_NAMES:
        if name.startswith(("eyeLook", "eyeWide", "eyeSquint")):
            c[name] *= 1 - c["eyeBlinkLeft" if name.endswith("Left") else "eyeBlinkRight"]
    # Opposite actions cancel in a drawing as in a face: the weaker one gives way.
    for pair in (("jawLeft", "jawRight"), ("mouthLeft", "mouthRight"),
                 ("mouthSmileLeft", "mouthFrownLeft"), ("mouthSmileRight", "mouthFrownRight")):
        c[min(pair, key=c.get)] = 0.0
    c["mouthClose"] = min(c["mouthClose"], c["jawOpen"])  # ARKit: closes the lips over an open jaw
    return {name: round(min(max(0.0, value), 1.0), 3) for name, value in c.items()}


def make_demo(folder: Path, count: int, seed: int) -> list[Path]:
    """Draws `count` faces, 20 to a person. Returns train.jsonl, val.jsonl and shift.jsonl.

    Validation shares no person with training, and shift.jsonl has its faces again, in another drawing style.
    """
    records = []
    for index in range(count):
        identity = f"id{seed * 10_000 + index // 20:03d}"  # fixes the looks: another seed draws other people
        coefficients = sample_expression(np.random.default_rng([seed, index]))
        records.append({"image": None, "identity": identity, "coefficients": coefficients})
    held_out = max(1, count // 20 // 12) * 20  # one person in twelve
    drawn = draw_all(records, folder)
    parts = {"train": drawn[:-held_out], "val": drawn[-held_out:],
             "shift": draw_all(records[-held_out:], folder, "comic")}
    for name, part in parts.items():
        write_records(folder / f"{name}.jsonl", part)
    return [folder / f"{name}.jsonl" for name in parts]


def main(args: argparse.Namespace) -> None:
    """Draws the demo, or describes the records of every INPUT."""
    if args.limit is not None and args.limit < 1 or args.demo < 240:
        raise SystemExit(f"--limit {args.limit}, --demo {args.demo}: expected --limit of at least 1 "
                         "and --demo of at least 240 (12 people of 20 faces)")
    if args.frames and not (len(args.inputs) == 1 and Path(args.frames).is_dir()):
        raise SystemExit(f"--frames {args.frames} with {args.inputs or 'no INPUT'}: "
                         "expected an existing folder and one INPUT")
    if args.every < 1 or args.batch_size < 1:
        raise SystemExit(f"--every {args.every}, --batch-size {args.batch_size}: expected 1 or more")
    if not args.inputs:
        count = max(240, min(args.limit or args.demo, args.demo))
        train, val, shift = make_demo(Path(args.out or "data/demo"), count, args.seed)
        print(f"wrote {train}\nwrote {val}\nwrote {shift}")
        print("next: python distill.py" + (f" --data {train} --val {val}" if args.out else ""))
        return
    counts, pictures = Counter(), None
    if args.frames:
        files = sorted(Path(args.frames).absolute().iterdir())
        pictures = [str(file) for file in files if file.suffix.lower() in Image.registered_extensions()]
    inputs = [read_input(Path(name), pictures, args.every, counts) for name in args.inputs]
    records = islice(chain.from_iterable(inputs), args.limit)  # read while they are described and written
    first = next(records, None)
    if first is None:
        raise SystemExit(f"{', '.join(args.inputs)}: no usable record ({dict(counts)}); expected {FORMS}")
    ending = ".avatars" if args.render else ".annotated.jsonl"
    out = Path(args.out or Path(args.inputs[0]).with_suffix(ending))
    records = chain([first], records)
    if args.render:
        records = draw_all(list(records), out)
        out = out / "records.jsonl"
    if out.absolute() in [Path(name).absolute() for name in args.inputs]:
        raise SystemExit(f"--out {out} is an INPUT and would be overwritten; choose another file")
    if args.llm:
        summary = write_llm_records(out, list(records), args)
    else:
        summary = write_records(out, records)
    summary.show(counts)
    print(f"wrote {out}")
    if summary.pictures == summary.records:
        print(f"next: python distill.py --data {out}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again, with --llm it goes on where it stopped")
