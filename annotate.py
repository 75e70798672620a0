# SPDX-License-Identifier: MIT
"""Stage I of SemanticFace (arXiv 2603.14827), semantic supervision: coefficients -> words.

Describes a face in four text fields, given its 52 ARKit coefficients, by rules or with a frozen
language model. Without arguments it draws the demo, 16,000 cartoon faces with exact coefficients,
in about a minute. Left and right are the subject's.

Reads:  label or prediction records (.jsonl), a Live Link Face take (.csv) or MediaPipe results
        (.json). Names may be eyeBlinkLeft, EyeBlinkLeft or eyeBlink_L. The demo needs no input
Writes: annotated records, one JSON object per line, with image paths relative to the file
    {"image": "images/000001.png", "identity": "id017", "coefficients": {"eyeBlinkLeft": 0.12, ...},
     "description": {"expression_category": "slight happiness", ...}, "annotator": "rules"}

    python annotate.py take.csv --frames frames/ --out train.jsonl
"""
import argparse
import csv
import json
import math
import os
import re
import sys
import zlib
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageOps
from tqdm import tqdm

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
FIELDS = ["expression_category", "muscle_movements", "emotional_implication", "symmetry"]
# Pillow cannot open .heic. It is listed so that the frame count is right and infer.py reports it.
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}
IMAGE_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]  # all that Pillow may try
EXPECTED = ("give a Live Link Face take (.csv), MediaPipe results (.json) or a .jsonl with one "
            'line of {"image": "a.png", "coefficients": {"jawOpen": 0.1, ... all 52}} per face')
CELL = 160  # side of a picture on the contact sheet, pixels
# Each coefficient has one of four levels: at rest below 0.15, then slight, from 0.4 moderate and
# from 0.7 strong. All wording depends only on the levels.
BANDS = [0.15, 0.4, 0.7]
ADVERBS = ["", "slightly", "moderately", "strongly"]
DEGREES = ["", "slight ", "", "strong "]  # prefixes of an emotion, by its strongest action's level
# What to say about each action, with an adverb in place of *. Here and in EMOTIONS and GESTURES, a
# key means all names that begin with it ("browDown": left and right). "a/b" names one per eye.
MOVEMENTS = {
    "Brows": {"browInnerUp": "inner brows * raised", "browOuterUp": "outer brow * raised",
              "browDown": "brow * lowered"},
    "Eyes": {"eyeBlink": "eye * closed", "eyeWide": "eye * widened", "eyeSquint": "eye * squinted",
             "eyeLookUp": "eye * looking up", "eyeLookDown": "eye * looking down",
             "eyeLookOutLeft/eyeLookInRight": "eye * looking left",
             "eyeLookInLeft/eyeLookOutRight": "eye * looking right"},
    "Nose": {"noseSneer": "nostril * pulled up"},
    "Cheeks": {"cheekPuff": "cheeks * puffed", "cheekSquint": "cheek * raised"},
    "Mouth": {"mouthSmile": "lip corner * raised", "mouthFrown": "lip corner * lowered",
              "mouthDimple": "lip corner * tucked in", "mouthStretch": "lip corner * stretched",
              "mouthPress": "lip side * pressed", "mouthUpperUp": "upper lip side * raised",
              "mouthLowerDown": "lower lip side * lowered", "mouthFunnel": "lips * funneled",
              "mouthPucker": "lips * puckered", "mouthRollUpper": "upper lip * rolled in",
              "mouthRollLower": "lower lip * rolled in", "mouthShrugUpper": "upper lip * pushed up",
              "mouthShrugLower": "lower lip * pushed up",
              "mouthClose": "lips * closed over the jaw", "mouthLeft": "mouth * shifted left",
              "mouthRight": "mouth * shifted right"},
    "Jaw": {"jawOpen": "jaw * opened", "jawForward": "jaw * pushed forward",
            "jawLeft": "jaw * shifted left", "jawRight": "jaw * shifted right"},
    "Tongue": {"tongueOut": "tongue * put out"}}
# EMFACS action units of each emotion (Friesen & Ekman 1983) as ARKit actions: 1 browInnerUp, 2
# browOuterUp, 4 browDown, 5 eyeWide, 6 cheekSquint, 7 eyeSquint, 9 noseSneer, 10 mouthUpperUp, 12
# mouthSmile, 14 mouthDimple, 15 mouthFrown, 20 mouthStretch, 23 mouthPress, 26 jawOpen. Each value
# is the weight of an action in classify() and its strength when the demo draws the emotion.
EMOTIONS = {
    "happiness": {"cheekSquint": 0.6, "mouthSmile": 1.0},
    "sadness": {"browInnerUp": 1.0, "browDown": 0.3, "mouthFrown": 0.9},
    "surprise": {"browInnerUp": 0.9, "browOuterUp": 0.9, "eyeWide": 0.8, "jawOpen": 0.8},
    "fear": {"browInnerUp": 0.8, "browOuterUp": 0.5, "browDown": 0.3, "eyeWide": 0.9,
             "eyeSquint": 0.2, "mouthStretch": 0.8, "jawOpen": 0.3},
    "anger": {"browDown": 1.0, "eyeWide": 0.2, "eyeSquint": 0.5, "mouthPress": 0.7},
    "disgust": {"noseSneer": 1.0, "mouthUpperUp": 0.6, "mouthFrown": 0.4}}
CONTEMPT = [{"mouthSmileLeft": 0.7, "mouthDimpleLeft": 0.8},  # one-sided, so it has two patterns
            {"mouthSmileRight": 0.7, "mouthDimpleRight": 0.8}]
IMPLICATIONS = {"happiness": "joy or amusement", "sadness": "sorrow or disappointment",
                "surprise": "astonishment", "fear": "alarm or anxiety", "disgust": "aversion",
                "anger": "irritation or determination", "contempt": "disdain or smugness"}

def parse_args(argv=None) -> argparse.Namespace:
    """Parses `argv`, by default the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", nargs="?", metavar="INPUT", help="records, take or results (none: draw the demo)")
    add("--demo", type=int, default=16_000, help="faces in the demo (default %(default)s)")
    add("--frames", help="folder with one picture per row of INPUT, in natural order")
    add("--identity", help="the person shown (default: the file name of a take or of results)")
    add("--every", type=int, default=1, help="keep every Nth row (default %(default)s)")
    add("--out", help="file, or folder for the demo (default: beside INPUT, or data/demo)")
    add("--sheet", help="draw 24 records into this picture; without --out, nothing else is written")
    add("--llm", help="describe with this chat model (hub id or folder) instead of the rules")
    add("--resume", action="store_true", help="continue an interrupted --llm run")
    add("--batch-size", type=int, default=16, help="faces per --llm batch (default %(default)s)")
    add("--device", help="cpu or cuda, for --llm (default: a GPU if there is one)")
    add("--seed", type=int, default=0, help="seed of the demo's faces (default %(default)s)")
    return parser.parse_args(argv)

# ---- Describing by rules -------------------------------------------------------------------------
@cache  # called for every face
def sides(key: str) -> tuple:
    """Returns the ARKit names of a table key: left and right, or the same name twice."""
    names = [name for name in ARKIT_NAMES if name.startswith(tuple(key.split("/")))]
    return names[0], names[-1]

def expand(pattern: dict) -> dict:
    """Replaces each table key of a pattern by all its ARKit names, with the same value."""
    expanded = {}
    for key, value in pattern.items():
        expanded |= dict.fromkeys(sides(key), value)
    return expanded

# Gaze and blinks say nothing about emotion.
EXPRESSIVE = [name for name in ARKIT_NAMES if not name.startswith(("eyeLook", "eyeBlink"))]
# Each emotion with the weights of its actions, and with the actions that must be at rest. Contempt
# has an entry per side. Each requires the other side to be at rest, so they exclude each other.
PROTOTYPES = [(emotion, expand(pattern), {}) for emotion, pattern in EMOTIONS.items()]
PROTOTYPES += [("contempt", CONTEMPT[0], CONTEMPT[1]), ("contempt", CONTEMPT[1], CONTEMPT[0])]

def movements(levels: dict) -> str:
    """Says which actions move and how strongly, in one sentence per region."""
    sentences = []
    for region, actions in MOVEMENTS.items():
        phrases = []
        for key, phrase in actions.items():
            left, right = sides(key)
            if left == right:  # an action without sides
                subjects = {"": levels[left]}
            elif levels[left] != levels[right]:
                subjects = {"left ": levels[left], "right ": levels[right]}
            else:
                subjects = {"both ": levels[left]}
                phrase = phrase.replace(" *", "s *")  # the plural: both eyes, both lip corners
            phrases += [subject + phrase.replace("*", ADVERBS[level])
                        for subject, level in subjects.items() if level]
        if phrases:
            sentences.append(f"{region}: {', '.join(phrases)}.")
    return " ".join(sentences) or "No visible movement."

def symmetry(levels: dict) -> str:
    """Says which side of each region is stronger, if one is. Only left-right pairs are compared: a
    shifted jaw or mouth, or a sideways gaze, still counts as symmetric."""
    uneven, mixed = [], []
    for region, actions in MOVEMENTS.items():
        names = [sides(key) for key in actions if not key.startswith("eyeLook")]
        # An action without sides has the same name twice, so its difference is 0.
        differences = [levels[left] - levels[right] for left, right in names]
        if min(differences) < 0 < max(differences):  # pairs that are stronger on different sides
            mixed.append(region.lower())
        elif any(differences):
            side = "left" if max(differences) > 0 else "right"
            uneven.append(f"the {side} side of the {region.lower()}")
    found = ("stronger on ", uneven), ("mixed in the ", mixed)
    return "; ".join(how + ", ".join(where) for how, where in found if where) or "symmetric"

def classify(levels: dict) -> tuple:
    """Returns the expression category and what it implies. Compares the levels of the EXPRESSIVE
    actions with the prototype of each emotion, by cosine similarity."""
    length = math.hypot(*[levels[name] for name in EXPRESSIVE])
    if length == 0:
        return "neutral", "not clearly observable"
    scores = []
    for emotion, pattern, at_rest in PROTOTYPES:
        if not any(levels[name] for name in at_rest):
            product = sum(levels[name] * weight for name, weight in pattern.items())
            cosine = product / (length * math.hypot(*pattern.values()))
            scores.append((cosine, emotion, max(levels[name] for name in pattern)))
    # Keep the best emotion. If the second is nearly as good, name both, without a degree.
    (best, first, level), (next_best, second, _) = sorted(scores, reverse=True)[:2]
    if best < 0.5:
        return "movement without a clear emotion", "not clearly observable"
    if next_best > 0.9 * best:
        return f"{first} mixed with {second}", f"{IMPLICATIONS[first]}, with {IMPLICATIONS[second]}"
    return DEGREES[level] + first, IMPLICATIONS[first]

def describe(coefficients: dict) -> dict:
    """Describes a face in four fields, given its 52 coefficients (name -> 0..1). All fields come
    from the same levels, so they agree with each other and with the coefficients."""
    levels = {name: bisect(BANDS, value) for name, value in coefficients.items()}
    category, implication = classify(levels)
    return dict(zip(FIELDS, [category, movements(levels), implication, symmetry(levels)]))

# ---- Describing by a frozen LLM ------------------------------------------------------------------
LLM_PROMPT = """You are an expert in facial anatomy. Describe a face, given its active ARKit
blendshape coefficients (0 to 1). Left and right are the subject's. Answer with one JSON object of
four short texts: "expression_category" (the expression and its degree), "muscle_movements" (by
region, with their intensity), "emotional_implication" (the emotion that they suggest) and
"symmetry" (whether both sides of the face move alike). Active coefficients ({} means none): """

def make_chat(face: dict) -> list[dict]:
    """Returns the chat that asks for the description of a face (name -> 0..1)."""
    active = {name: round(value, 2) for name, value in face.items() if value >= BANDS[0]}
    return [{"role": "user", "content": f"{LLM_PROMPT}{active}"}]

def read_answer(text: str) -> dict | None:
    """Returns the four fields of a chat model's answer, or None if one is missing."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not valid
        words = json.loads(re.search(r"(?s)\{.*\}", text)[0])
        words = {field: " ".join(words[field].split()) for field in FIELDS}
        if all(words.values()):
            return words

def describe_by_llm(faces: list[dict], args: argparse.Namespace) -> Iterator[dict | None]:
    """Yields the model's description of each face, or None where its answer is not valid."""
    from transformers import pipeline  # only needed here
    chat_model = pipeline("text-generation", args.llm, device=args.device)
    tokenizer = chat_model.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # Given a generator, the pipeline yields each batch of answers before it starts the next.
    for answer in chat_model((make_chat(face) for face in faces), batch_size=args.batch_size,
                             tokenizer_encode_kwargs={"enable_thinking": False},
                             return_full_text=False, do_sample=False, max_new_tokens=400):
        yield read_answer(answer[0]["generated_text"])

# ---- Files (infer.py has copies of list_pictures and complete_lines) -----------------------------
def list_pictures(folder: Path) -> list[Path]:
    """Lists a folder's pictures in natural order (frame2 before frame10), without hidden files."""
    pictures = [path for path in sorted(folder.glob("[!.]*")) if path.suffix.lower() in PICTURES]
    return sorted(pictures, key=lambda path: re.sub(
        r"\d+", lambda digits: digits[0].zfill(20), path.name.lower()))

def complete_lines(path: Path) -> list[bytes]:
    """Creates a file if it is missing, cuts off an incomplete last line, and returns the others."""
    path.touch()
    text = path.read_bytes()
    complete = text[:text.rfind(b"\n") + 1]
    os.truncate(path, len(complete))
    return complete.splitlines()

def canonical(name: str) -> str:
    """Returns ARKit's eyeBlinkLeft for EyeBlinkLeft (Live Link) and eyeBlink_L (other apps)."""
    name = name.strip().replace("_L", "Left").replace("_R", "Right")
    return name[:1].lower() + name[1:]

def standardize(pairs: list[tuple], counts: Counter) -> dict:
    """Returns the 52 coefficients, given (name, value) pairs, clipped to 0..1 (real takes reach
    1.053). Raises ValueError if one is missing, unknown, given twice or out of range."""
    values = {}
    for name, value in pairs:
        is_number = type(value) in (int, float)  # not isinstance, since True is an int
        if not (is_number and -0.1 <= value <= 1.1):  # NaN is out of range, too
            advice = " (divide percentages by 100)" if is_number and value > 1.5 else ""
            raise ValueError(f"{name:.40} is {value!r:.40}, expected 0 to 1{advice}")
        name = canonical(name)
        if name in values:
            raise ValueError(f"{name} appears twice, perhaps in two spellings; expected once")
        values[name] = min(max(0.0, value), 1.0)
    if "tongueOut" not in values:  # MediaPipe and others do not track it
        values["tongueOut"] = 0.0
        counts["records without tongueOut, set to 0"] += 1
    different = ", ".join(sorted(values.keys() ^ ARKIT_NAMES))
    if different:
        raise ValueError(f"{different:.60} missing or unknown; expected the 52 ARKit names")
    return {name: values[name] for name in ARKIT_NAMES}

def read_items(path: Path) -> list[tuple]:
    """Lists (place, content) for each row of a file. The content is the text of a record, one
    MediaPipe result, or a take's row as (column, cell) pairs."""
    text = path.read_text("utf-8-sig", "replace")
    lines = text.split("\n")
    if path.suffix.lower() == ".csv":
        rows = csv.reader(lines)
        header = next(rows)
        blanks = [""] * len(header)  # a truncated row must not lose its last columns
        return [(f"line {rows.line_num}", list(zip(header, row + blanks))) for row in rows if row]
    if path.suffix.lower() == ".json":
        text = text.replace('"face_blendshapes"', '"faceBlendshapes"')  # MediaPipe's Python names
        results = json.loads(text.replace('"category_name"', '"categoryName"'))
        results = results if isinstance(results, list) else [results]
        return [(f"result {number}", result) for number, result in enumerate(results, 1)]
    return [(f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]

def read_row(cells: list[tuple]) -> list[tuple]:
    """Returns the (name, value) pairs of a take's row, or none if all its cells are empty."""
    pairs = []
    for name, cell in cells:
        if canonical(name) in ARKIT_NAMES:
            with suppress(ValueError):  # standardize() refuses a cell that is not a number
                cell = float(cell)
            pairs.append((name, cell))
    if not pairs:
        raise ValueError("no column such as EyeBlinkLeft found")
    return pairs if any(value != "" for _, value in pairs) else []

def read_result(result: dict | list, counts: Counter) -> list[tuple]:
    """Returns the (name, score) pairs of the first face in a MediaPipe result, which is
    {"faceBlendshapes": [{"categories": [...]}]} or the list of one face's categories."""
    faces = result["faceBlendshapes"] if isinstance(result, dict) else [result]
    if len(faces) > 1:
        counts["results with several faces, the first was taken"] += 1
    face = faces[0] if faces else []
    categories = face["categories"] if isinstance(face, dict) else face
    return [(category["categoryName"], category["score"]) for category in categories
            if category["categoryName"] != "_neutral"]

def read_records(path: Path, args: argparse.Namespace, counts: Counter) -> dict:
    """Returns every Nth record of INPUT by its row number, with the real path of its image. Counts
    what is left out. Raises ValueError for a record or file that cannot be used."""
    records = {}
    place, item = "the file", ""  # where we are, for the error message
    try:
        items = read_items(path)
        for index, (place, item) in list(enumerate(items))[::args.every]:
            record = {"image": None, "identity": path.stem}
            if isinstance(item, str):
                record = {"image": None, **json.loads(item)}
                pairs = (record["coefficients"] or {}).items()
            elif path.suffix.lower() == ".csv":
                pairs = read_row(item)
            else:
                pairs = read_result(item, counts)
            if not pairs:
                counts["records skipped (no face, no values or no prediction)"] += 1
                continue
            record["coefficients"] = standardize(pairs, counts)
            if args.identity:
                record["identity"] = args.identity
            if record["image"]:
                # write_records() makes it relative, which is only right without symlinks.
                record["image"] = os.path.realpath(path.parent / record["image"])
            records[index] = record
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}, {place}: {error!s:.120}, in {item!s:.60}; {EXPECTED}")

    # Pair each row with its frame. They are matched by order alone, so there must be equally many.
    if args.frames:
        frames = list_pictures(Path(args.frames))
        if len(frames) != len(items):
            raise ValueError(f"--frames holds {len(frames)} pictures for the {len(items)} rows")
        for index, record in records.items():
            record["image"] = os.path.realpath(frames[index])
    return records

def write_records(path: Path, records: list[dict], args: argparse.Namespace) -> None:
    """Describes records and writes each as soon as it is ready."""
    folder = path.parent.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # While incomplete, the file has a checksum of faces and model in its name, so that --resume
    # never picks up a different run.
    checksum = zlib.crc32(json.dumps([args.llm, records]).encode())
    unfinished = Path(f"{path}.{checksum}")
    done = len(complete_lines(unfinished)) if args.resume else 0
    records = records[done:]
    faces = [record["coefficients"] for record in records]
    answers = describe_by_llm(faces, args) if args.llm else [None] * len(faces)
    annotators = Counter(["an earlier run"] * done)
    with unfinished.open("a" if done else "w", buffering=1) as file:
        for record, words in tqdm(zip(records, answers), path.name, len(faces), disable=None):
            annotator = args.llm if words else "rules"
            annotators[annotator] += 1
            words = words or describe(record["coefficients"])
            record = {**record, "description": words, "annotator": annotator}
            if record["image"]:
                record["image"] = Path(os.path.relpath(record["image"], folder)).as_posix()
            file.write(json.dumps(record) + "\n")
    unfinished.replace(path)
    print(f"wrote {path}, records by annotator: {dict(annotators)}")

def draw_sheet(path: str, records: dict) -> None:
    """Draws a contact sheet of 24 records, spread evenly. Each picture is next to a face drawn from
    its coefficients, with its index and, if any, its expression category below."""
    positions = np.linspace(0, len(records) - 1, min(24, len(records))).round().astype(int)
    chosen = np.array(list(records))[positions].tolist()
    sheet = Image.new("RGB", (4 * 330, math.ceil(len(chosen) / 4) * 190), "white")
    for place, index in enumerate(chosen):
        record, left, top = records[index], 330 * (place % 4), 190 * (place // 4)
        face = draw_face(record["coefficients"], record.get("identity", "id000"), CELL)
        sheet.paste(face, (left + CELL, top))
        with suppress(Exception):  # many types: a missing or damaged picture leaves its cell empty
            picture = Image.open(record["image"], formats=IMAGE_FORMATS)
            picture = ImageOps.exif_transpose(picture).convert("RGB")
            sheet.paste(ImageOps.pad(picture, (CELL, CELL), color="white"), (left, top))
        text = f" {index}  "
        with suppress(KeyError, TypeError):  # a record without a description
            text += record["description"]["expression_category"]
        ImageDraw.Draw(sheet).text((left, top + CELL + 3), text[:46], "black", font_size=13)
    sheet.save(path)
    print(f"wrote {path}: {len(chosen)} of {len(records)} records")

# ---- Drawing the demo's faces (skip) -------------------------------------------------------------
DARK, WHITE, RED = (40, 25, 25), (250, 250, 245), (205, 80, 80)
CAVITY, TONGUE, GROOVE = (70, 15, 20), (225, 105, 120), (151, 73, 82)
SUPERSAMPLE = 4  # drawn at 4 times the size, then averaged
# One style for training, one only for testing. `line` scales line widths; proportions are ranges.
STYLES = {
    "cartoon": {"line": 1.0, "outline": 0.0, "irises": ["#50321a", "#32643c", "#3c6eaa", "#64646e"],
                "skins": ["#fadcc4", "#f0c8aa", "#deb08c", "#be8c68", "#96684a", "#704c36"],
                "hairs": ["#1e1816", "#462e1e", "#78502c", "#c49650", "#963c1e", "#969696"],
                "proportions": {"fringe": (-0.75, -0.6), "width": (0.68, 0.80),
                                "height": (0.76, 0.84), "eye": (0.9, 1.15), "gap": (0.31, 0.37),
                                "brow": (0.05, 0.09), "nose": (0.85, 1.2), "mouth": (0.24, 0.31)}},
    "comic": {"line": 1.5, "outline": 0.04, "irises": ["#961e28", "#783c96", "#147878", "#c8961e"],
              "skins": ["#f4e878", "#c8e696", "#96d2d2", "#96aae6", "#c896dc", "#f0aabe"],
              "hairs": ["#143c78", "#aa285a", "#1e6e46", "#6e2882", "#e67814", "#f5f5f5"],
              "proportions": {"fringe": (-0.62, -0.5), "width": (0.80, 0.90),
                              "height": (0.70, 0.76), "eye": (1.15, 1.3), "gap": (0.36, 0.41),
                              "brow": (0.03, 0.05), "nose": (0.6, 0.85), "mouth": (0.31, 0.36)}}}
# Skin creases, darker for stronger actions: (x1, x2), (y1, y2) on the left, mirrored on the right.
CREASES = [
    ("browDown", (0.05, 0.05), (-0.42, -0.26)), ("mouthUpperUp", (0.16, 0.26), (0.22, 0.34)),
    ("noseSneer", (0.03, 0.16), (-0.12, -0.07)), ("noseSneer", (0.03, 0.16), (-0.04, 0.01)),
    ("eyeSquint", (0.54, 0.65), (-0.19, -0.22)), ("eyeSquint", (0.54, 0.65), (-0.15, -0.12)),
    ("mouthPress", (0.19, 0.32), (0.38, 0.42)), ("mouthPress", (0.19, 0.32), (0.62, 0.58)),
    ("mouthDimple", (0.39, 0.39), (0.44, 0.56)), ("mouthShrugUpper", (0.035, 0.035), (0.27, 0.36)),
    ("mouthRollUpper", (0.0, 0.16), (0.37, 0.38)), ("mouthRollLower", (0.0, 0.16), (0.64, 0.63)),
    ("mouthShrugLower", (0.03, 0.06), (0.68, 0.74))]
# Points of the outline, a closed circle whose last point is the first: their angles and positions.
TURN = 2 * np.pi * (np.arange(49) % 48) / 48
CIRCLE_X, CIRCLE_Y = np.cos(TURN), np.sin(TURN)
LOWER_FACE = np.maximum(CIRCLE_Y, 0) ** 2  # 0 from the eyes up, 1 at the chin
CHEEKS = np.exp(-((CIRCLE_Y - 0.5) / 0.25) ** 2)  # 1 at the height of the cheeks
# Points from the right corner of the lips to the left, (15,), and how much each side moves them.
LIPS = np.arange(-7, 8) / 7
LIPS_ARCH = 1 - LIPS ** 2  # 0 at the corners, 1 in the middle
LIPS_LEFT = np.clip(3 * LIPS, 0, 1)
LIPS_RIGHT = LIPS_LEFT[::-1]
LID = np.arange(-6, 7) / 6  # points from one corner of an eye to the other, (13,)
LID_ARCH = 1 - LID ** 2
# The brow's inner end, middle and outer end, and how browDown, browInnerUp, browOuterUp move them.
BROW_X, BROW_Y = np.array([-0.19, -0.02, 0.2]), np.array([-0.43, -0.46, -0.41])
BROW_MOVES = np.array([[0.13, 0.06, 0.02], [-0.17, -0.05, 0], [0, -0.08, -0.19]])

class Pen:
    """Draws in face coordinates, -1 to 1: x points to the subject's left, y points down."""
    def __init__(self, size: int, background: tuple, thickness: float):
        side = size * SUPERSAMPLE
        self.half = side / 2
        self.thickness = thickness
        self.canvas = Image.new("RGB", (side, side), background)
        self.draw = ImageDraw.Draw(self.canvas)
    def scale(self, x: list, y: list) -> list:
        return (self.half * (1 + np.column_stack([x, y]))).ravel().tolist()
    def polygon(self, x: list, y: list, color: tuple) -> None:
        self.draw.polygon(self.scale(x, y), fill=color)
    def band(self, x: list, upper: list, lower: list, color: tuple) -> None:
        self.polygon(np.append(x, x[::-1]), np.append(upper, lower[::-1]), color)
    def line(self, x: list, y: list, color: tuple, width: float) -> None:
        pixels = max(1, round(width * self.thickness * self.half))
        self.draw.line(self.scale(x, y), fill=color, width=pixels, joint="curve")
    def ellipse(self, x: float, y: float, rx: float, ry: float, color: tuple) -> None:
        self.draw.ellipse(self.scale([x - rx, x + rx], [y - ry, y + ry]), fill=color)

def mix(color: tuple, other: tuple, amount: float) -> tuple:
    """Returns the color that is `amount` (0..1) of the way from `color` to `other`."""
    return tuple(round(a + (b - a) * amount) for a, b in zip(color, other))

def draw_head(pen: Pen, f: SimpleNamespace) -> None:
    """Draws hair, outline, chin and puffed cheeks."""
    slide = 0.14 * (f.jawLeft - f.jawRight)
    drop = 0.14 * f.jawOpen

    # The outline: an ellipse whose cheeks widen and whose lower part follows the jaw.
    widening = 0.16 * f.cheekPuff * CHEEKS - 0.12 * LOWER_FACE
    x = f.width * CIRCLE_X * (1 + widening) + slide * LOWER_FACE
    y = f.height * CIRCLE_Y + drop * LOWER_FACE

    # The hair at the back, the face, and the fringe in front of it.
    pen.ellipse(0, -0.12, f.width * 1.1, f.height * 1.03, f.hair)
    pen.polygon(x, y, f.skin)
    is_fringe = y < f.fringe
    pen.polygon(x[is_fringe], y[is_fringe], f.hair)
    if f.outline:
        pen.line(x, y, DARK, f.outline)
    # A chin that is pushed forward gets larger and brighter. Puffed cheeks get brighter.
    chin_y = f.height - 0.1 + drop
    color = mix(f.skin, WHITE, 0.6 * f.jawForward)
    pen.ellipse(slide, chin_y, 0.14 + 0.14 * f.jawForward, 0.05 + 0.07 * f.jawForward, color)
    for cheek_x in (-0.5, 0.5):
        pen.ellipse(cheek_x, 0.36, 0.13, 0.13, mix(f.skin, WHITE, 0.55 * f.cheekPuff))

def draw_mouth(pen: Pen, f: SimpleNamespace) -> None:
    """Draws lips, teeth and tongue."""
    # The strength of each left-right action at each of the 15 points of the lips, (15,).
    smile, frown, stretch, press, raised, lowered = [
        LIPS_LEFT * getattr(f, f"mouth{stem}Left") + LIPS_RIGHT * getattr(f, f"mouth{stem}Right")
        for stem in ("Smile", "Frown", "Stretch", "Press", "UpperUp", "LowerDown")]

    # The line where the lips meet.
    shift = 0.13 * (f.mouthLeft - f.mouthRight) + 0.07 * (f.jawLeft - f.jawRight)
    width = f.mouth * (1 - 0.5 * f.mouthPucker - 0.3 * f.mouthFunnel)
    x = shift + LIPS * (width + 0.06 * smile + 0.16 * stretch)
    y = 0.50 + LIPS * LIPS * 0.17 * (frown - smile) + 0.03 * smile * LIPS_ARCH

    # The inner edges and thickness of the lips. If mouthClose exceeds jawOpen, the lower lip rises.
    opening = np.sqrt(LIPS_ARCH)
    gap = 0.30 * (f.jawOpen - f.mouthClose) + 0.12 * f.mouthFunnel
    upper = y - opening * (0.13 * raised + 0.3 * max(gap, 0)) - 0.09 * f.mouthShrugUpper * LIPS_ARCH
    lower = y + opening * (0.13 * lowered + 0.7 * gap) - 0.07 * f.mouthShrugLower * LIPS_ARCH
    thick = opening * (1 - 0.6 * press) * (1 + 0.9 * f.mouthPucker + 0.5 * f.mouthFunnel)

    # The cavity with the teeth in it, which stop short of the corners.
    pen.band(x, upper, lower, CAVITY)
    teeth = np.clip(lower - upper, 0, 0.06)
    for edge, end in ((upper, upper + teeth), (lower, lower - teeth)):
        pen.band(x[2:-2], edge[2:-2], end[2:-2], WHITE)
    # The lips, thinner when rolled in, and the tongue over the middle of the lower lip.
    pen.band(x, upper - 0.065 * thick * (1 - 0.95 * f.mouthRollUpper), upper, f.lips)
    pen.band(x, lower, lower + 0.085 * thick * (1 - 0.95 * f.mouthRollLower), f.lips)
    for edge in (upper, lower):
        pen.line(x, edge, mix(f.lips, DARK, 0.6), 0.02)
    if f.tongueOut > 0:
        root, length = lower[7], f.tongueOut  # 7 is the middle of the lips
        pen.ellipse(x[7], root + 0.08 * length, 0.06 + 0.06 * length, 0.17 * length, TONGUE)
        pen.line([x[7], x[7]], [root, root + 0.15 * length], GROOVE, 0.02)

def draw_side(pen: Pen, f: SimpleNamespace, suffix: str, side: int) -> None:
    """Draws eye, cheek, brow, nostril and creases of the side "Left" (1) or "Right" (-1)."""
    # From here on f.eyeBlink is eyeBlinkLeft or eyeBlinkRight, and so on.
    f = SimpleNamespace(**{name.removesuffix(suffix): value for name, value in vars(f).items()})
    shade = partial(mix, f.skin, DARK)  # takes an amount from 0 to 1

    # The eyeball and iris between the edges of the lids, which cover part of the iris. The upper
    # edge is 1 to 1.75 heights above the middle when open and 0.7 below it when closed.
    eye_x, height, socket = side * f.gap, 0.105 * f.eye * LID_ARCH, 0.2 * np.sqrt(LID_ARCH)
    x = eye_x + 0.2 * f.eye * LID
    upper = height * (0.7 * f.eyeBlink - (1 + 0.75 * f.eyeWide) * (1 - f.eyeBlink)) - 0.17
    lower = height * 0.75 * (1 - f.eyeSquint * (1 - f.eyeBlink)) - 0.17
    pen.ellipse(eye_x, -0.19, 0.2 * f.eye, 0.2, shade(0.12))
    pen.band(x, upper, lower, WHITE)
    pupil_x = eye_x + 0.1 * side * (f.eyeLookOut - f.eyeLookIn)
    pupil_y = 0.085 * (f.eyeLookDown - f.eyeLookUp) - 0.18
    pen.ellipse(pupil_x, pupil_y, 0.08, 0.08, f.iris)
    pen.ellipse(pupil_x, pupil_y, 0.04, 0.04, DARK)
    pen.band(x, upper, -0.19 - socket, shade(0.12))
    pen.band(x, lower, socket - 0.19, f.skin)
    pen.line(x, upper, DARK, 0.035)
    pen.line(x, lower, shade(0.35 + 0.5 * f.eyeSquint), 0.02 + 0.02 * f.eyeSquint)

    # The cheek: a blush and the fold above it.
    x = eye_x + side * 0.05
    pen.ellipse(x, 0.2 - 0.07 * f.cheekSquint, 0.13, 0.07, mix(f.skin, RED, 0.75 * f.cheekSquint))
    y = 0.12 - 0.08 * f.cheekSquint + 0.06 * LID * LID
    pen.line(x + 0.15 * LID, y, shade(0.7 * f.cheekSquint), 0.03)

    # The brow, a line through three points.
    x = side * (f.gap + BROW_X - 0.02 * f.browDown)
    y = BROW_Y + [f.browDown, f.browInnerUp, f.browOuterUp] @ BROW_MOVES
    pen.line(x, y, f.hair, f.brow)

    # The nostril and its wing, which a sneer pulls up, and the creases.
    x, y = side * 0.09 * f.nose, 0.2 - 0.07 * f.noseSneer
    pen.line([side * 0.05, x], [-0.15, y - 0.03], shade(0.2), 0.025)
    pen.ellipse(x, y, 0.05 + 0.02 * f.noseSneer, 0.035, shade(0.45))
    for action, x, y in CREASES:
        strength = getattr(f, action)
        if strength > 0:
            pen.line(side * np.array(x), y, shade(0.85 * strength), 0.03)

def draw_face(coefficients: dict, identity: str = "id000", size: int = 64,
              style: str = "cartoon") -> Image.Image:
    """Draws a face of `size` x `size` pixels, given its 52 coefficients (name -> 0..1). Each of
    them changes the picture. The person's looks depend on identity and style alone."""
    rng = np.random.default_rng(list(str(identity).encode()))
    f = SimpleNamespace(**coefficients, **STYLES[style])  # f.jawOpen, ..., f.line, ...
    # The order of these lines decides which random number each feature gets.
    skins = list(map(ImageColor.getrgb, f.skins))
    tone = rng.uniform(0, len(skins) - 1.001)  # so that skins[int(tone) + 1] exists
    f.skin = mix(skins[int(tone)], skins[int(tone) + 1], tone % 1)
    f.lips = mix(f.skin, RED, rng.uniform(0.5, 0.9))
    f.hair = f.hairs[rng.integers(6)]
    f.iris = f.irises[rng.integers(4)]
    pen = Pen(size, tuple(rng.integers(60, 230, 3).tolist()), f.line)
    for part, ends in f.proportions.items():
        setattr(f, part, rng.uniform(*ends))

    draw_head(pen, f)
    draw_mouth(pen, f)
    draw_side(pen, f, "Left", 1)
    draw_side(pen, f, "Right", -1)
    return pen.canvas.reduce(SUPERSAMPLE)

# Movements of the demo without an emotion: none at all, a blink, a wink, speech or chewing.
GESTURES = [
    {}, {"eyeBlink": 1.0}, {"eyeBlinkLeft": 1.0, "cheekSquintLeft": 0.5, "mouthSmileLeft": 0.4},
    {"mouthPucker": 0.9}, {"mouthFunnel": 0.9, "jawOpen": 0.3},
    {"jawOpen": 0.8, "mouthLowerDown": 0.3},
    {"mouthStretch": 0.5, "mouthLowerDown": 0.6, "mouthUpperUp": 0.4},
    {"mouthRollLower": 0.7, "mouthRollUpper": 0.7}, {"cheekPuff": 0.9, "mouthPress": 0.4},
    {"jawOpen": 0.6, "mouthClose": 0.5, "jawLeft": 0.6, "mouthLeft": 0.5},
    {"mouthShrugLower": 0.8, "mouthShrugUpper": 0.6, "mouthFrown": 0.4},
    {"tongueOut": 0.9, "jawOpen": 0.4}, {"jawForward": 0.9, "mouthRollUpper": 0.3},
    {"mouthDimple": 0.8, "mouthPress": 0.5}]
# Each emotion is twice as likely as each gesture.
EXPRESSIONS = [expand(pattern) for pattern in 2 * [*EMOTIONS.values(), CONTEMPT[0]] + GESTURES]
SIDE = {name: name.endswith("Left") - name.endswith("Right") for name in ARKIT_NAMES}  # 1, -1, 0
MIRRORED = {name: name.replace("Left", "Right") for name in ARKIT_NAMES if name.endswith("Left")}
MIRRORED |= {right: left for left, right in MIRRORED.items()}
# The actions of both eyes that look to the subject's left, right, up and down.
GAZE = ["eyeLookOutLeft", "eyeLookInRight", "eyeLookInLeft", "eyeLookOutRight",
        "eyeLookUpLeft", "eyeLookUpRight", "eyeLookDownLeft", "eyeLookDownRight"]
OPPOSITES = [("jawLeft", "jawRight"), ("mouthLeft", "mouthRight"),
             ("mouthSmileLeft", "mouthFrownLeft"), ("mouthSmileRight", "mouthFrownRight")]
DEMO_PARTS = [("train", "cartoon", "images"), ("val", "cartoon", "images"),
              ("shift", "comic", "images_comic")]

def sample_expression(rng: np.random.Generator) -> dict:
    """Samples 52 plausible coefficients: one or two patterns, stray actions, asymmetry and gaze."""
    c = dict.fromkeys(ARKIT_NAMES, 0.0)
    # Two faces in five have a second pattern. For the others its strength is 0.
    for strength in (rng.uniform(0.3, 1.1), rng.uniform(0.2, 0.8) * (rng.random() < 0.4)):
        pattern, is_mirrored = rng.choice(EXPRESSIONS), rng.random() < 0.5
        for name, value in pattern.items():
            name = MIRRORED.get(name, name) if is_mirrored else name
            c[name] = max(c[name], value * strength * rng.uniform(0.8, 1.2))
    for name in rng.choice(ARKIT_NAMES, rng.integers(1, 6), replace=False):
        c[name] = max(c[name], rng.uniform(0.2, 1.0))
    # One side of the face is stronger than the other, and every action varies a little.
    tilt = rng.normal(0, 0.15)
    for name, side in SIDE.items():
        c[name] *= 1 + tilt * side + rng.normal(0, 0.08)

    # The two eyes turn together. Closed eyes show no gaze, no widening and no squint.
    x, y = (rng.random() < 0.6) * rng.uniform(-1, 1, 2)  # three faces in five look away
    gaze = np.repeat([x, -x, y, -y], 2).clip(0) * rng.uniform(0.9, 1.1, 8)
    c |= zip(GAZE, gaze.tolist())
    for name in ARKIT_NAMES:
        if name.startswith(("eyeLook", "eyeWide", "eyeSquint")):
            c[name] *= 1 - c["eyeBlinkLeft" if name.endswith("Left") else "eyeBlinkRight"]

    # Opposite actions cancel out, in a drawing as in a face, so the weaker one is set to 0.
    for pair in OPPOSITES:
        c[min(pair, key=c.get)] = 0.0
    c["mouthClose"] = min(c["mouthClose"], c["jawOpen"])  # ARKit: closes the lips over an open jaw
    return {name: round(min(max(0.0, value), 1.0), 3) for name, value in c.items()}

def make_demo(folder: Path, args: argparse.Namespace) -> None:
    """Draws the demo, 20 faces per person: train.jsonl, val.jsonl with one twelfth of the people,
    none of them in train.jsonl, and shift.jsonl, the faces of val.jsonl in another style."""
    people = args.demo // 20
    first = 20 * (people - people // 12)  # index of the first held-out face
    for part, style, images in DEMO_PARTS:
        (folder / images).mkdir(parents=True, exist_ok=True)
        faces = range(first) if part == "train" else range(first, args.demo)
        records = []
        for index in tqdm(faces, f"drawing {part}", disable=None):
            identity = f"id{args.seed * 10_000 + index // 20:03d}"  # each seed has its own people
            coefficients = sample_expression(np.random.default_rng([args.seed, index]))
            image = f"{folder.resolve()}/{images}/{index:06d}.png"
            draw_face(coefficients, identity, style=style).save(image)
            records.append({"identity": identity, "coefficients": coefficients, "image": image})
        write_records(folder / f"{part}.jsonl", records, args)
    print(f"next: python distill.py --data {folder / 'train.jsonl'}")

# ---- Main ----------------------------------------------------------------------------------------
def main(args: argparse.Namespace) -> None:
    """Draws the demo, or reads INPUT, draws its contact sheet and writes its annotated records."""
    if not args.input:
        return make_demo(Path(args.out or "data/demo"), args)
    path, counts = Path(args.input), Counter()
    records = read_records(path, args, counts)
    for what, count in counts.items():
        print(count, what)
    if not records:
        raise ValueError(f"{path}: no usable record")
    out = args.out or ("" if args.sheet else path.with_suffix(".annotated.jsonl"))
    if os.path.realpath(path) in [os.path.realpath(file) for file in (out, args.sheet) if file]:
        raise ValueError(f"{path} is INPUT and would be overwritten")
    if args.sheet:
        draw_sheet(args.sheet, records)
    if out:
        write_records(Path(out), list(records.values()), args)
        print(f"next: python distill.py --data {out}")

if __name__ == "__main__":
    try:
        main(parse_args())
    except (OSError, ValueError) as error:
        sys.exit(str(error).partition("\n")[0][:400])
    except KeyboardInterrupt:
        sys.exit("interrupted; add --resume to continue an --llm run, otherwise run it again")
