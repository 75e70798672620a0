# SPDX-License-Identifier: MIT
"""Stage I of SemanticFace (arXiv 2603.14827), semantic supervision signals: coefficients -> words.

Describes a face in four fields, from its 52 ARKit blendshape coefficients, by rules or by a frozen
language model. Also draws the demo: cartoon faces with known coefficients. Left is the subject's.

Reads:  label or prediction records (.jsonl), Live Link Face takes (.csv), MediaPipe (.json),
        with names as eyeBlinkLeft, EyeBlinkLeft or eyeBlink_L, for the demo nothing
Writes: annotated records, one JSON object a line, image paths relative to the file
    {"image": "images/000001.png", "identity": "id017", "coefficients": {"eyeBlinkLeft": 0.12, ...},
     "description": {"expression_category": "slight happiness", ...}, "annotator": "rules"}

    python annotate.py take.csv --frames frames/ --out train.jsonl   # without arguments: the demo
"""
import argparse
import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw
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
FIELDS = ["expression_category", "muscle_movements", "emotional_implication", "symmetry"]
LLM_PROMPT = """You are an expert in facial anatomy. Describe a face in JSON with four short texts,
from its active ARKit blendshape coefficients (0 to 1). Left and right are the subject's.
Coefficients: mouthSmileLeft 0.62, mouthSmileRight 0.58, cheekSquintRight 0.21
{"expression_category": "happiness", "muscle_movements": "Mouth: both lip corners moderately \
raised. Cheeks: right cheek slightly raised.", "emotional_implication": "joy or amusement", \
"symmetry": "stronger on the right cheeks"}
Coefficients: """
LLM_TRIES, LLM_TOKENS = 3, 120  # attempts at a description, tokens of one field at most
LOOP = re.compile(r"(.{3,40}?)\1\1")  # a text that says the same three times: "eye-eye-eye-"
# A movement is named from ACTIVE on, with the adverb of the first band that ends above its value.
ACTIVE = 0.15
BANDS = [(0.4, "slightly"), (0.7, "moderately"), (math.inf, "strongly")]
# What is said of each action, with an adverb for *. "name_" is nameLeft and nameRight.
MOVEMENTS = {
    "Brows": {"browInnerUp": "inner brows * raised", "browOuterUp_": "outer brow * raised",
              "browDown_": "brow * lowered"},
    "Eyes": {"eyeBlink_": "eye * closed", "eyeWide_": "eye * widened",
             "eyeSquint_": "eye * squinted", "eyeLookUp_": "eye * looking up",
             "eyeLookDown_": "eye * looking down",
             "eyeLookOutLeft/eyeLookInRight": "eye * looking left",
             "eyeLookInLeft/eyeLookOutRight": "eye * looking right"},
    "Nose": {"noseSneer_": "nostril * pulled up"},
    "Cheeks": {"cheekPuff": "cheeks * puffed", "cheekSquint_": "cheek * raised"},
    "Mouth": {"mouthSmile_": "lip corner * raised", "mouthFrown_": "lip corner * lowered",
              "mouthDimple_": "lip corner * tucked in", "mouthStretch_": "lip corner * stretched",
              "mouthPress_": "lip side * pressed", "mouthUpperUp_": "upper lip side * raised",
              "mouthLowerDown_": "lower lip side * lowered", "mouthFunnel": "lips * funneled",
              "mouthPucker": "lips * puckered", "mouthRollUpper": "upper lip * rolled in",
              "mouthRollLower": "lower lip * rolled in", "mouthShrugUpper": "upper lip * pushed up",
              "mouthShrugLower": "lower lip * pushed up",
              "mouthClose": "lips * closed over the jaw", "mouthLeft": "mouth * shifted left",
              "mouthRight": "mouth * shifted right"},
    "Jaw": {"jawOpen": "jaw * opened", "jawForward": "jaw * pushed forward",
            "jawLeft": "jaw * shifted left", "jawRight": "jaw * shifted right"},
    "Tongue": {"tongueOut": "tongue * put out"},
}
# What emotions imply, and their EMFACS action units (Friesen & Ekman 1983) in ARKit: 1 browInnerUp,
# 2 browOuterUp, 4 browDown, 5 eyeWide, 6 cheekSquint, 7 eyeSquint, 9 noseSneer, 10 mouthUpperUp, 12
# mouthSmile, 14 mouthDimple, 15 mouthFrown, 20 mouthStretch, 23 mouthPress, 26 jawOpen.
EMOTIONS = {
    "happiness": ("joy or amusement", {"cheekSquint_": 0.6, "mouthSmile_": 1.0}),
    "sadness": ("sorrow or disappointment",
                {"browInnerUp": 1.0, "browDown_": 0.3, "mouthFrown_": 0.9}),
    "surprise": ("astonishment",
                 {"browInnerUp": 0.9, "browOuterUp_": 0.9, "eyeWide_": 0.8, "jawOpen": 0.8}),
    "fear": ("alarm or anxiety",
             {"browInnerUp": 0.8, "browOuterUp_": 0.5, "browDown_": 0.3, "eyeWide_": 0.9,
              "eyeSquint_": 0.2, "mouthStretch_": 0.8, "jawOpen": 0.3}),
    "anger": ("irritation or determination",
              {"browDown_": 1.0, "eyeWide_": 0.2, "eyeSquint_": 0.5, "mouthPress_": 0.7}),
    "disgust": ("aversion", {"noseSneer_": 1.0, "mouthUpperUp_": 0.6, "mouthFrown_": 0.4}),
    "contempt": ("disdain or smugness", {"mouthSmileLeft": 0.7, "mouthDimpleLeft": 0.8}),
}

def parse_args(argv=None) -> argparse.Namespace:
    """Reads the command line, or `argv`."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="records, takes, blendshapes; without, the demo")
    add("--demo", type=int, default=16_000, help="faces of the demo (default %(default)s)")
    add("--frames", help="folder with one picture for each row of INPUT, in sorted order")
    add("--every", type=int, default=1, help="keep every Nth record (default %(default)s)")
    add("--out", help="file, or folder for --render and the demo (default beside INPUT, data/demo)")
    add("--render", action=argparse.BooleanOptionalAction, default=False, help="draw the faces")
    add("--llm", help="let this chat model (hub id or folder) describe instead of the rules")
    add("--batch-size", type=int, default=16, help="faces at a time, --llm (default %(default)s)")
    add("--device", default="auto", help="for --llm: cpu, cuda, or auto (default %(default)s)")
    add("--limit", type=int, help="use the first LIMIT records only (demo: at least 240)")
    add("--seed", type=int, default=0, help="of the demo's people, of --llm (default %(default)s)")
    return parser.parse_args(argv)

# ---- Describing by rules -------------------------------------------------------------------------
def sides(key: str) -> list[str]:
    """The ARKit names of a table key: aLeft and aRight for "a_", a and b for "a/b", else a."""
    return [key[:-1] + "Left", key[:-1] + "Right"] if key.endswith("_") else key.split("/")

def expand(pattern: dict, mirrored: bool = False) -> dict:
    """Writes out the keys that stand for two names; `mirrored`, Left and Right are swapped."""
    whole = {name: value for key, value in pattern.items() for name in sides(key)}
    swap = {"Left": "Right", "Right": "Left"} if mirrored else {"Left": "Left", "Right": "Right"}
    return {re.sub("Left|Right", lambda side: swap[side[0]], name): x for name, x in whole.items()}

PROTOTYPES = [(emotion, expand(pattern)) for emotion, (_, pattern) in EMOTIONS.items()]
PROTOTYPES.append(("contempt", expand(EMOTIONS["contempt"][1], mirrored=True)))  # on either side

def intensity(value: float) -> str:
    """The adverb of the band that `value` (0..1) lies in."""
    return next(adverb for end, adverb in BANDS if value < end)

def classify(coefficients: dict) -> tuple[str, str]:
    """Expression category and emotional implication, by the cosine to the emotions' prototypes."""
    face = {name: value for name, value in coefficients.items()
            if not name.startswith(("eyeLook", "eyeBlink"))}  # which no emotion has
    if max(face.values()) < ACTIVE:
        return "neutral", "not clearly observable"
    cosines = []
    for emotion, pattern in PROTOTYPES:
        product = sum(face[name] * value for name, value in pattern.items())
        cosine = product / (math.hypot(*face.values()) * math.hypot(*pattern.values()))
        cosines.append((cosine, emotion, pattern))
    ranked = sorted(cosines, key=lambda entry: -entry[0])
    (cosine, emotion, pattern), (next_cosine, other, _) = ranked[:2]
    if cosine < 0.5:
        return "movement without a clear emotion", "not clearly observable"
    implication = EMOTIONS[emotion][0]
    if next_cosine > 0.9 * cosine and other != emotion:
        return f"{emotion} mixed with {other}", f"{implication}, with {EMOTIONS[other][0]}"
    degree = {"slightly": "slight ", "moderately": "", "strongly": "strong "}
    return degree[intensity(max(face[name] for name in pattern))] + emotion, implication

def describe(coefficients: dict) -> dict:
    """Describes a face in four fields, never at odds with its 52 coefficients (0..1 by name)."""
    sentences, stronger = [], []
    for region, actions in MOVEMENTS.items():
        phrases, widest = [], 0.0
        for key, phrase in actions.items():
            values = [coefficients[name] for name in sides(key)]
            adverbs = [intensity(value) if value >= ACTIVE else None for value in values]
            # Movements: one phrase for an action or a pair that moves alike, or one for each side.
            subjects = [""] if len(values) == 1 else ["left ", "right "]
            if len(values) == 2 and adverbs[0] == adverbs[1]:
                subjects, phrase = ["both "], phrase.replace(" *", "s *")
            phrases += [subject + phrase.replace("*", adverb)
                        for subject, adverb in zip(subjects, adverbs) if adverb]
            # Symmetry: the largest difference of a pair. Not gaze, since the eyes look one way.
            if key.endswith("_") and not key.startswith("eyeLook"):
                widest = max(widest, values[0] - values[1], key=abs)
        if phrases:
            sentences.append(f"{region}: {', '.join(phrases)}.")
        if abs(widest) >= ACTIVE:
            stronger.append(f"{'left' if widest > 0 else 'right'} {region.lower()}")
    category, implication = classify(coefficients)
    return {"expression_category": category,
            "muscle_movements": " ".join(sentences) or "No visible movement.",
            "emotional_implication": implication,
            "symmetry": f"stronger on the {', '.join(stronger)}" if stronger else "symmetric"}

# ---- Describing by a frozen language model -------------------------------------------------------
def ask_llm(model, tokenizer, faces: list[dict], sample: bool) -> list[dict | None]:
    """Lets a chat model fill in the fields for each face: JSON's braces and names are fed, a field
    ends at its quote. None stands for a face of which one is empty, endless or a loop."""
    texts, found = [], [{} for _ in faces]
    for face in faces:
        active = [f"{name} {value:.2f}" for name, value in face.items() if value >= ACTIVE]
        prompt = LLM_PROMPT + (", ".join(active) or "none, the face is at rest")
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}],
                                                   tokenize=False, add_generation_prompt=True)
        texts.append(prompt + "{")
    for field in FIELDS:
        texts = [f'{text}"{field}": "' for text in texts]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        tokens = model.generate(
            **inputs, do_sample=sample, max_new_tokens=LLM_TOKENS, stop_strings=['"'],
            tokenizer=tokenizer, pad_token_id=tokenizer.pad_token_id)
        tokens = tokens[:, inputs["input_ids"].shape[1]:]  # the new ones
        for k, answer in enumerate(tokenizer.batch_decode(tokens, skip_special_tokens=True)):
            words, quote, _ = answer.partition('"')
            if not quote or not words.strip() or LOOP.search(words):
                found[k] = None
            elif found[k] is not None:
                found[k][field] = " ".join(words.split())
            texts[k] += words + '", '
    return found

def describe_by_llm(records: list[dict], kept: list[str], args) -> Iterator[tuple]:
    """Yields (description, annotator) of each record, first those of the lines `kept`. A malformed
    answer is asked for again, LLM_TRIES times in all. Then the rules stand in."""
    done = 0
    for old, record in zip(map(json.loads, kept), records):
        if old["coefficients"] != record["coefficients"] or args.llm not in old["annotator"]:
            break
        done += 1
        yield old["description"], old["annotator"]
    import torch  # the rules and the drawings do without
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    torch.manual_seed(args.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.llm, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(args.llm, dtype=dtype).to(args.device).eval()
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"--llm {args.llm} cannot be loaded: {str(error):.300}".partition("\n")[0])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rules = f"rules, since {args.llm} gave no valid answer"
    for start in range(done, len(records), args.batch_size):
        faces = [record["coefficients"] for record in records[start:start + args.batch_size]]
        found = [None] * len(faces)
        for attempt in range(LLM_TRIES):
            missing = [k for k, description in enumerate(found) if not description]
            answers = ask_llm(model, tokenizer, [faces[k] for k in missing], attempt > 0)
            for k, answer in zip(missing, answers):
                found[k] = answer
            if all(found):
                break
        for face, answer in zip(faces, found):
            yield (answer, args.llm) if answer else (describe(face), rules)

# ---- Files ---------------------------------------------------------------------------------------
def canonical(name: str) -> str:
    """The ARKit name for EyeBlinkLeft (Live Link), eyeBlink_L (other apps) or eyeBlinkLeft."""
    name = re.sub("_R$", "Right", re.sub("_L$", "Left", name.strip()))
    return name[:1].lower() + name[1:]

def check_coefficients(given: dict, counts: Counter) -> dict:
    """The 52 in order, clipped to 0..1 (real takes reach 1.053). Raises ValueError on others."""
    if list(given) != ARKIT_NAMES:
        given = {canonical(name): value for name, value in given.items()}
    if "tongueOut" not in given:  # MediaPipe and others cannot see it
        given["tongueOut"] = 0.0
        counts["records without tongueOut, set to 0"] += 1
    different = sorted(set(given) ^ set(ARKIT_NAMES))
    if different:
        raise ValueError(f"{str(different[:3]):.150} missing or unknown")
    for name, value in given.items():
        if type(value) not in (int, float) or not -0.1 <= value <= 1.1:  # True and NaN are neither
            raise ValueError(f"{name} is {value!r:.40}, not 0 to 1 (divide percentages by 100)")
    counts["clipped values"] += len([x for x in given.values() if not 0 <= x <= 1])
    return {name: min(max(0.0, given[name]), 1.0) for name in ARKIT_NAMES}

def rows_of_jsonl(path: Path) -> Iterator[dict]:
    """Image, identity, coefficients and error of each label or prediction record."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            record = json.loads(line)
            row = {key: record[key] for key in ("image", "identity", "error") if key in record}
            yield {**row, "coefficients": record["coefficients"]}

def rows_of_csv(path: Path) -> Iterator[dict]:
    """The rows of a Live Link Face take, by column name; other columns are ignored."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            numbers = {canonical(name): value for name, value in row.items() if name}
            numbers = {name: float(numbers[name]) for name in ARKIT_NAMES if name in numbers}
            yield {"image": None, "identity": path.stem, "coefficients": numbers}

def rows_of_json(path: Path) -> Iterator[dict]:
    """MediaPipe's results, one an image (of several faces the first) or one alone: either
    {"faceBlendshapes": [{"categories": [...]}]} or one face's list of categories."""
    results = json.loads(path.read_text("utf-8-sig", "replace"))
    for result in results if isinstance(results, list) else [results]:
        faces = result["faceBlendshapes"] if isinstance(result, dict) else [result]
        if not faces:
            yield {"error": "no face was found"}
            continue
        categories = faces[0]["categories"] if isinstance(faces[0], dict) else faces[0]
        scores = {category["categoryName"]: category["score"] for category in categories}
        scores.pop("_neutral", None)
        yield {"coefficients": scores}

def read_records(path: Path, args: argparse.Namespace, counts: Counter) -> Iterator[dict]:
    """Yields every Nth record of a file, images as absolute paths. SystemExit on a bad one."""
    reader = {".csv": rows_of_csv, ".json": rows_of_json}.get(path.suffix.lower(), rows_of_jsonl)
    rows, number = reader(path), 0
    try:
        if args.frames:
            rows, frames = list(rows), sorted(Path(args.frames).absolute().iterdir())
            frames = [f for f in frames if f.suffix.lower() in Image.registered_extensions()]
            if len(frames) != len(rows):
                raise ValueError(f"--frames holds {len(frames)} pictures for {len(rows)} rows")
            rows = [{**row, "image": str(frame)} for row, frame in zip(rows, frames)]
        for number, row in enumerate(rows, 1):
            if (number - 1) % args.every:
                continue
            if row.pop("error", None):
                counts["without a face or a prediction left out"] += 1
                continue
            row["coefficients"] = check_coefficients(row["coefficients"], counts)
            image = row.pop("image", None)
            yield {"image": image and os.path.abspath(path.parent / image), **row}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError,
            csv.Error) as error:
        raise SystemExit(f"{path}, at or after record {number}: {type(error).__name__} "
                         f"{str(error):.300}; expected 52 ARKit coefficients each, in records "
                         "(.jsonl), a Live Link Face take (.csv) or MediaPipe's results (.json)")

def write_records(path: Path, records: list[dict], args: argparse.Namespace) -> None:
    """Describes records and writes them as they come, under another name until all are done."""
    partial = path.with_name(path.name + (".unfinished" if args.llm else ".partial"))
    path.parent.mkdir(parents=True, exist_ok=True)
    described = ((describe(record["coefficients"]), "rules") for record in records)
    if args.llm:  # what an interrupted run left is kept, without a torn last line
        lines = partial.read_text("utf-8", "replace") if partial.is_file() else ""
        described = describe_by_llm(records, lines.split("\n")[:-1], args)
    annotators, categories, active = Counter(), Counter(), Counter()
    bar = tqdm(zip(records, described), path.name, len(records), unit=" faces", disable=None)
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for record, (description, annotator) in bar:
            image = record.get("image") and os.path.relpath(record["image"], path.parent)
            record = {**record, "image": image, "description": description, "annotator": annotator}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            annotators[annotator] += 1
            categories[description["expression_category"]] += 1
            active.update(name for name, x in record["coefficients"].items() if x >= ACTIVE)
    partial.replace(path)
    print(f"wrote {path}: {len(records)} records, described by {dict(annotators)}; most frequent "
          f"{dict(categories.most_common(4))}, most active {dict(active.most_common(4))}")

# ---- Drawing the demo's faces --------------------------------------------------------------------
DARK, WHITE, RED = (40, 25, 25), (250, 250, 245), (205, 80, 80)
CAVITY, TONGUE = (70, 15, 20), (225, 105, 120)
SUPERSAMPLE = 4  # drawn at 4 times the size, then averaged
# Two drawing styles: what the demo trains on, and one with other colours, proportions (each between
# two ends) and lines (`line` times as wide), on which it is only tested.
STYLES = {
    "cartoon": {
        "skins": ["#fadcc4", "#f0c8aa", "#deb08c", "#be8c68", "#96684a", "#704c36"],
        "hairs": ["#1e1816", "#462e1e", "#78502c", "#c49650", "#963c1e", "#969696"],
        "irises": ["#50321a", "#32643c", "#3c6eaa", "#64646e"], "line": 1.0, "outline": 0.0,
        "proportions": {"fringe": (-0.75, -0.6), "width": (0.68, 0.80), "height": (0.76, 0.84),
                        "eye": (0.9, 1.15), "gap": (0.31, 0.37), "brow": (0.05, 0.09),
                        "nose": (0.85, 1.2), "mouth": (0.24, 0.31)}},
    "comic": {
        "skins": ["#f4e878", "#c8e696", "#96d2d2", "#96aae6", "#c896dc", "#f0aabe"],
        "hairs": ["#143c78", "#aa285a", "#1e6e46", "#6e2882", "#e67814", "#f5f5f5"],
        "irises": ["#961e28", "#783c96", "#147878", "#c8961e"], "line": 1.5, "outline": 0.04,
        "proportions": {"fringe": (-0.62, -0.5), "width": (0.80, 0.90), "height": (0.70, 0.76),
                        "eye": (1.15, 1.3), "gap": (0.36, 0.41), "brow": (0.03, 0.05),
                        "nose": (0.6, 0.85), "mouth": (0.31, 0.36)}},
}
# Skin creases, as dark as the action is strong: both x, both y of the left one (mirrored right).
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
    """Draws in face coordinates, -1 to 1: x to the picture's right (the subject's left), y down."""

    def __init__(self, size: int, background: tuple, thickness: float):
        self.half, self.thickness = size * SUPERSAMPLE / 2, thickness
        self.canvas = Image.new("RGB", (size * SUPERSAMPLE, size * SUPERSAMPLE), background)
        self.draw = ImageDraw.Draw(self.canvas)

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
    """Lips, teeth and tongue (the jaw's opening and shift, tongueOut, mouth but the dimples)."""
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
    pen.band(x, upper, y0 - 0.02 - 0.2 * np.sqrt(arch), lid)  # the lids hide the iris
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
    """Draws a face of `size` pixels, every action visible; the identity alone fixes the looks."""
    rng, palette = np.random.default_rng(list(str(identity).encode())), STYLES[style]
    skins = [ImageColor.getrgb(color) for color in palette["skins"]]
    tone = rng.uniform(0, len(skins) - 1.001)
    skin = mix(skins[int(tone)], skins[int(tone) + 1], tone % 1)
    look = {"skin": skin, "lips": mix(skin, RED, rng.uniform(0.5, 0.9)),
            "outline": palette["outline"], "hair": palette["hairs"][rng.integers(6)],
            "iris": palette["irises"][rng.integers(4)]}
    pen = Pen(size, tuple(rng.integers(60, 230, 3).tolist()), palette["line"])
    look |= {part: rng.uniform(*ends) for part, ends in palette["proportions"].items()}
    draw_head(pen, look, coefficients)
    draw_mouth(pen, look, coefficients)
    draw_side(pen, look, coefficients, 1)
    draw_side(pen, look, coefficients, -1)
    return pen.canvas.reduce(SUPERSAMPLE)

def draw_all(records: list[dict], images: Path, style: str = "cartoon") -> list[dict]:
    """Draws all faces into a folder, on all cores; returns the records with their images."""
    images.mkdir(parents=True, exist_ok=True)
    faces, people = zip(*((r["coefficients"], r.get("identity", "id000")) for r in records))
    paths = [str(images.absolute() / f"{k:06d}.png") for k in range(len(records))]
    with ProcessPoolExecutor() as pool:
        pictures = pool.map(draw_face, faces, people, repeat(64), repeat(style), chunksize=64)
        for path, picture in zip(paths, tqdm(pictures, "drawing", len(records), disable=None)):
            picture.save(path)
    return [{**record, "image": path} for record, path in zip(records, paths)]

# Movements of the demo that are no emotion, as a blink, a wink, speech or chewing.
GESTURES = [
    {}, {"eyeBlink_": 1.0}, {"eyeBlinkLeft": 1.0, "cheekSquintLeft": 0.5, "mouthSmileLeft": 0.4},
    {"mouthPucker": 0.9}, {"mouthFunnel": 0.9, "jawOpen": 0.3},
    {"jawOpen": 0.8, "mouthLowerDown_": 0.3},
    {"mouthStretch_": 0.5, "mouthLowerDown_": 0.6, "mouthUpperUp_": 0.4},
    {"mouthRollLower": 0.7, "mouthRollUpper": 0.7}, {"cheekPuff": 0.9, "mouthPress_": 0.4},
    {"jawOpen": 0.6, "mouthClose": 0.5, "jawLeft": 0.6, "mouthLeft": 0.5},
    {"mouthShrugLower": 0.8, "mouthShrugUpper": 0.6, "mouthFrown_": 0.4},
    {"tongueOut": 0.9, "jawOpen": 0.4}, {"jawForward": 0.9, "mouthRollUpper": 0.3},
    {"mouthDimple_": 0.8, "mouthPress_": 0.5}]

def sample_expression(rng: np.random.Generator) -> dict:
    """Draws 52 plausible coefficients: one or two patterns, stray actions, asymmetry and a gaze."""
    patterns = 2 * [pattern for _, pattern in EMOTIONS.values()] + GESTURES
    c = dict.fromkeys(ARKIT_NAMES, 0.0)
    for strength in (rng.uniform(0.3, 1.1), rng.uniform(0.2, 0.8) * (rng.random() < 0.4)):
        pattern = patterns[rng.integers(len(patterns))]
        for name, value in expand(pattern, mirrored=rng.random() < 0.5).items():
            c[name] = max(c[name], value * strength * rng.uniform(0.8, 1.2))
    for name in rng.choice(ARKIT_NAMES, rng.integers(1, 6), replace=False):
        c[name] = max(c[name], rng.uniform(0.2, 1.0))
    tilt = rng.normal(0, 0.15)
    for name in ARKIT_NAMES:
        side = name.endswith("Left") - name.endswith("Right")  # 1, -1 or, in the middle, 0
        c[name] *= 1 + tilt * side + rng.normal(0, 0.08)
    # The two eyes turn together, x > 0 to the subject's left; a closed eye shows none of this.
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

def make_demo(folder: Path, args: argparse.Namespace) -> None:
    """Draws the demo, 20 faces a person: train.jsonl, val.jsonl of one person in twelve, who is not
    in training, and shift.jsonl with the faces of val.jsonl in another drawing style."""
    records = [{"identity": f"id{args.seed * 10_000 + index // 20:03d}",  # fixes the looks
                "coefficients": sample_expression(np.random.default_rng([args.seed, index]))}
               for index in range(args.demo)]
    held_out = max(1, args.demo // 20 // 12) * 20 + args.demo % 20
    drawn = draw_all(records, folder / "images")
    shift = draw_all(records[-held_out:], folder / "images_comic", "comic")
    for name, part in (("train", drawn[:-held_out]), ("val", drawn[-held_out:]), ("shift", shift)):
        write_records(folder / f"{name}.jsonl", part, args)
    print("next: python distill.py" + (f" --data {folder / 'train.jsonl'}" if args.out else ""))

# ---- The stage itself ----------------------------------------------------------------------------
def main(args: argparse.Namespace) -> None:
    """Draws the demo, or describes the records of every INPUT."""
    if min(args.every, args.batch_size, args.limit or 1) < 1 or args.demo < 240:
        raise SystemExit(f"--every {args.every}, --batch-size {args.batch_size}, --limit "
                         f"{args.limit}: at least 1; --demo {args.demo}: at least 240")
    if not args.inputs:
        args.demo = max(240, min(args.demo, args.limit or args.demo))
        return make_demo(Path(args.out or "data/demo"), args)
    counts = Counter()
    parts = (read_records(Path(name), args, counts) for name in args.inputs)
    records = list(islice(chain.from_iterable(parts), args.limit))
    if not records:
        raise SystemExit(f"{', '.join(args.inputs):.200}: no usable record {dict(counts)}")
    ending = ".avatars" if args.render else ".annotated.jsonl"
    out = Path(args.out or Path(args.inputs[0]).with_suffix(ending))
    if out.absolute() in [Path(name).absolute() for name in args.inputs]:
        raise SystemExit(f"--out {out} is an INPUT and would be overwritten; choose another file")
    if args.render:
        records, out = draw_all(records, out / "images"), out / "records.jsonl"
    write_records(out, records, args)
    print("".join(f"{count} {what}\n" for what, count in counts.items() if count), end="")
    if not args.render and all(record.get("image") for record in records):
        print(f"next: python distill.py --data {out}")

if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command starts again, with --llm it goes on")
