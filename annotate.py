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
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import chain, islice, repeat
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

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

# Endings of pictures; .heic, which Pillow cannot open, is named in an error, not left out.
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}
FORMS = ("expected a Live Link Face take (.csv), MediaPipe's results (.json) or, in a .jsonl, one "
         'line of {"image": "a.png", "coefficients": {"jawOpen": 0.1, ... all 52}} a face')

# A coefficient has one of four levels, and everything that is said follows from the levels alone:
# below 0.15 it is at rest, from there on it moves slightly, then moderately, then strongly.
BANDS = [0.15, 0.4, 0.7]
ACTIVE = BANDS[0]
ADVERBS = ["", "slightly", "moderately", "strongly"]
# Of an emotion, by the level of its strongest action. The moderate one is named alone.
DEGREES = ["", "slight ", "", "strong "]
# What is said of each action, with an adverb for *. "name_" is the pair nameLeft and nameRight, of
# which symmetry tells. "a/b" is one direction of gaze, by the left and by the right eye's action,
# which symmetry leaves out.
MOVEMENTS = {
    "Brows": {"browInnerUp": "inner brows * raised", "browOuterUp_": "outer brow * raised",
              "browDown_": "brow * lowered"},
    "Eyes": {"eyeBlink_": "eye * closed", "eyeWide_": "eye * widened",
             "eyeSquint_": "eye * squinted", "eyeLookUpLeft/eyeLookUpRight": "eye * looking up",
             "eyeLookDownLeft/eyeLookDownRight": "eye * looking down",
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
# mouthSmile, 14 mouthDimple, 15 mouthFrown, 20 mouthStretch, 23 mouthPress, 26 jawOpen. The numbers
# weigh each action in classify(), and are its strength where the demo draws the emotion.
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
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("inputs", nargs="*", metavar="INPUT", help="records, takes, blendshapes; without, the demo")
    add("--demo", type=int, default=16_000, help="faces of the demo (default %(default)s)")
    add("--frames", help="folder with one picture for each row of INPUT, in the order of counting")
    add("--identity", help="who is seen, in all INPUTs (default: the name of a take's file)")
    add("--every", type=int, default=1, help="keep every Nth record (default %(default)s)")
    add("--out", help="file, or folder for --render and the demo (default beside INPUT, data/demo)")
    add("--render", action=switch, default=False, help="draw the faces")
    add("--llm", help="let this chat model (hub id or folder) describe instead of the rules")
    add("--resume", action=switch, default=False, help="go on with an interrupted --llm run")
    add("--batch-size", type=int, default=16, help="faces at a time, --llm (default %(default)s)")
    add("--device", default="auto", help="for --llm: cpu, cuda, or auto (default %(default)s)")
    add("--limit", type=int, default=10**9, help="first records only (the demo is drawn whole)")
    add("--seed", type=int, default=0, help="of the demo's people and faces (default %(default)s)")
    return parser.parse_args(argv)

# ---- Describing by rules -------------------------------------------------------------------------
@cache
def sides(key: str) -> list[str]:
    """The ARKit names of a table key: aLeft and aRight for "a_", a and b for "a/b", else a."""
    if key.endswith("_"):
        return [key[:-1] + "Left", key[:-1] + "Right"]
    return key.split("/")

def expand(pattern: dict) -> dict:
    """Gives the value of each key in `pattern` to all the names that the key stands for."""
    whole = {}
    for key, value in pattern.items():
        whole |= dict.fromkeys(sides(key), value)
    return whole

def mirror(pattern: dict) -> dict:
    """Swaps left and right: the same values, each by the name of its other side."""
    swap = {"Left": "Right", "Right": "Left"}
    return {re.sub("Left$|Right$", lambda match: swap[match[0]], name): value
            for name, value in pattern.items()}

# Gaze and blinks tell of no emotion.
EXPRESSIVE = [name for name in ARKIT_NAMES if not name.startswith(("eyeLook", "eyeBlink"))]
# Each emotion, its prototype, and a pattern whose names have to be at rest. Contempt, the last of
# them, is one-sided, and replaced by two: one for the left, one for the right.
LEFT_CONTEMPT = EMOTIONS["contempt"][1]
RIGHT_CONTEMPT = mirror(LEFT_CONTEMPT)
PROTOTYPES = [(emotion, expand(pattern), {}) for emotion, (_, pattern) in EMOTIONS.items()]
PROTOTYPES[-1] = ("contempt", LEFT_CONTEMPT, RIGHT_CONTEMPT)
PROTOTYPES.append(("contempt", RIGHT_CONTEMPT, LEFT_CONTEMPT))

def classify(coefficients: dict) -> tuple[str, str]:
    """Expression category and emotional implication of 52 coefficients (0..1 by name).

    By the cosine between the levels of the EXPRESSIVE actions and the prototype of each emotion.
    """
    levels = {name: bisect(BANDS, coefficients[name]) for name in EXPRESSIVE}
    if not any(levels.values()):
        return "neutral", "not clearly observable"
    length = math.hypot(*levels.values())
    cosines = []
    for emotion, pattern, at_rest in PROTOTYPES:
        if not any(levels[name] for name in at_rest):
            product = sum(levels[name] * weight for name, weight in pattern.items())
            cosine = product / (length * math.hypot(*pattern.values()))
            cosines.append((cosine, emotion, pattern))

    # The best one or, when the next is nearly as good, both.
    cosines.sort(key=itemgetter(0), reverse=True)
    (cosine, emotion, pattern), (next_cosine, next_emotion, _) = cosines[:2]
    if cosine < 0.5:
        return "movement without a clear emotion", "not clearly observable"
    implication, other = EMOTIONS[emotion][0], EMOTIONS[next_emotion][0]
    if next_cosine > 0.9 * cosine:
        return f"{emotion} mixed with {next_emotion}", f"{implication}, with {other}"
    strongest = max(levels[name] for name in pattern)
    return DEGREES[strongest] + emotion, implication

def describe(coefficients: dict) -> dict:
    """Describes a face in four fields, from its 52 coefficients (0..1 by name). All fields follow
    from the same levels, so none of them contradicts another or the numbers. The symmetry is that
    of pairs: a jaw or mouth that is shifted to a side, or a gaze, leaves a face symmetric."""
    levels = {name: bisect(BANDS, value) for name, value in coefficients.items()}
    sentences, uneven, mixed = [], [], []
    for region, actions in MOVEMENTS.items():
        phrases, stronger = [], set()
        for key, phrase in actions.items():
            names = sides(key)
            left, right = levels[names[0]], levels[names[-1]]  # one name, if it has no sides
            if left == right == 0:
                continue
            # Movements: one phrase for an action without sides or a pair that moves alike.
            if left != right:
                subjects = {"left ": left, "right ": right}
            elif len(names) == 1:
                subjects = {"": left}
            else:
                subjects = {"both ": left}
                phrase = phrase.replace(" *", "s *")  # the plural: both eyes, both lip corners
            phrases += [subject + phrase.replace("*", ADVERBS[level])
                        for subject, level in subjects.items() if level]
            # Symmetry: on which side a pair is stronger.
            if left != right and key.endswith("_"):
                stronger.add("left" if left > right else "right")

        if phrases:
            sentences.append(f"{region}: {', '.join(phrases)}.")
        if len(stronger) == 1:
            uneven.append(f"{stronger.pop()} {region.lower()}")
        elif stronger:  # one pair is stronger on the left, another on the right
            mixed.append(region.lower())

    asymmetries = [f"stronger on the {', '.join(uneven)}"] if uneven else []
    asymmetries += [f"mixed in the {', '.join(mixed)}"] if mixed else []
    category, implication = classify(coefficients)
    return {"expression_category": category,
            "muscle_movements": " ".join(sentences) or "No visible movement.",
            "emotional_implication": implication,
            "symmetry": "; ".join(asymmetries) or "symmetric"}

# ---- Describing by a frozen language model -------------------------------------------------------
def active_text(coefficients: dict) -> str:
    """The active coefficients as the prompt names them."""
    active = [f"{name} {value:.2f}" for name, value in coefficients.items() if value >= ACTIVE]
    return ", ".join(active) or "none, the face is at rest"

EXAMPLE = {**dict.fromkeys(ARKIT_NAMES, 0.0),
           "mouthSmileLeft": 0.62, "mouthSmileRight": 0.58, "cheekSquintRight": 0.21}
EXAMPLE_WORDS = describe(EXAMPLE)
LLM_PROMPT = f"""You are an expert in facial anatomy. Describe a face in JSON with four short texts,
from its active ARKit blendshape coefficients (0 to 1). Left and right are the subject's.
Coefficients: {active_text(EXAMPLE)}
{json.dumps(EXAMPLE_WORDS)}
Coefficients: """
LLM_TOKENS = 120  # of one field at most
# A text that says 3 to 40 characters three times in a row: "eye-eye-eye-".
LOOP = re.compile(r"(.{3,40}?)\1\1")
CLOSED = re.compile(r'(?:[^"\\]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"')  # up to the closing quote

def is_valid(words: dict, coefficients: dict) -> bool:
    """Whether every field has a text that is no loop, and the movements not just the example's."""
    texts = [words.get(field) for field in FIELDS]
    movements = words.get("muscle_movements")
    if not all(texts) or any(map(LOOP.search, texts)):
        return False
    is_copy = movements == EXAMPLE_WORDS["muscle_movements"]
    return not is_copy or movements == describe(coefficients)["muscle_movements"]

def ask_llm(model, tokenizer, faces: list[dict]) -> list[dict]:
    """Lets a chat model fill in the fields for each face: JSON's braces and names are fed, the
    model writes up to the quote that closes a field. A field without an end is left out."""
    import torch
    texts, answers = [], [{} for _ in faces]
    for face in faces:
        text = LLM_PROMPT + active_text(face) + "\n"
        if tokenizer.chat_template:
            # Unless told not to, hybrid models would think within the first field.
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True,
                enable_thinking=False)
        texts.append(text + "{")

    for field in FIELDS:
        texts = [f'{text}"{field}": "' for text in texts]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False,
                           return_token_type_ids=False).to(model.device)
        start = inputs["input_ids"].shape[1]

        def is_closed(ids, scores, **_) -> torch.Tensor:  # (B,)
            written = tokenizer.batch_decode(ids[:, start:])
            return torch.tensor([bool(CLOSED.match(text)) for text in written], device=ids.device)

        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=LLM_TOKENS,
                                stopping_criteria=[is_closed], pad_token_id=tokenizer.pad_token_id)
        for k, text in enumerate(tokenizer.batch_decode(tokens[:, start:])):
            # A text without its quote goes on only to keep the batch whole: is_valid refuses it.
            closed = CLOSED.match(text)
            if closed:
                words = json.loads('"' + closed[0], strict=False)
                answers[k][field] = " ".join(words.split())
                texts[k] += closed[0] + ", "
    return answers

def describe_by_llm(records: list[dict], args: argparse.Namespace) -> Iterator[tuple]:
    """Yields description and annotator of each record. Where the answer of the model is no valid
    description, the rules stand in, and the annotator says so."""
    import torch  # the rules and the drawings do without
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.llm, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(args.llm, dtype=dtype).to(args.device).eval()
    except Exception as error:  # what is damaged surfaces as one of a dozen types
        raise SystemExit(f"--llm {args.llm} cannot be loaded: {str(error):.300}".partition("\n")[0])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for start in range(0, len(records), args.batch_size):
        faces = [record["coefficients"] for record in records[start:start + args.batch_size]]
        for face, words in zip(faces, ask_llm(model, tokenizer, faces)):
            if is_valid(words, face):
                yield words, args.llm
            else:
                yield describe(face), f"rules, since {args.llm} gave no valid answer"

# ---- Files ---------------------------------------------------------------------------------------
# list_pictures and whole_lines stand word for word in infer.py: scripts share no code.
def list_pictures(folder: Path) -> list[Path]:
    """A folder's pictures in the order a person counts, frame2 before frame10; no hidden files."""
    def counted(path: Path) -> tuple:
        parts = re.split(r"(\d+)", path.name.lower())  # text, number, text, number, ...
        return [int(part) if part.isdecimal() else part for part in parts], path.name

    pictures = [path for path in folder.iterdir()
                if path.suffix.lower() in PICTURES and not path.name.startswith(".")]
    return sorted(pictures, key=counted)

def whole_lines(path: Path) -> list[bytes]:
    """The lines that an interrupted run left in a file. Cuts off the last one if it is torn."""
    path.touch()
    text = path.read_bytes()
    whole = text[:text.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    return whole.splitlines()

@cache
def canonical(name: str) -> str:
    """The ARKit name for EyeBlinkLeft (Live Link), eyeBlink_L (other apps) or eyeBlinkLeft."""
    name = re.sub("_R$", "Right", re.sub("_L$", "Left", name.strip()))
    return name[:1].lower() + name[1:]

def standardize(given: dict, counts: Counter) -> dict:
    """The 52 coefficients in order, by ARKit's names, clipped to 0..1 (real takes reach 1.053).
    Raises ValueError if one is missing, unknown or no such number. Counts clips of 0.01 or more and
    missing tongues."""
    values = {canonical(name): value for name, value in given.items()}
    if "tongueOut" not in values:  # MediaPipe and others cannot see it
        values["tongueOut"] = 0.0
        counts["records without tongueOut, set to 0"] += 1
    different = sorted(set(values) ^ set(ARKIT_NAMES))
    if different:
        raise ValueError(f"{', '.join(different[:3]):.150} missing or unknown; 52 ARKit names are "
                         "expected")
    for name, value in values.items():
        if type(value) not in (int, float) or not -0.1 <= value <= 1.1:  # True and NaN are neither
            raise ValueError(f"{name} is {value!r:.40}, not 0 to 1 (divide percentages by 100)")
        if not -0.01 < value < 1.01:
            counts["values clipped by 0.01 or more"] += 1
    return {name: min(max(0.0, values[name]), 1.0) for name in ARKIT_NAMES}

def items_of(path: Path) -> Iterator[tuple]:
    """Yields where in a file each face stands, and what stands there: the text of a record, the
    cells of a take's row by column, or a result of MediaPipe."""
    if path.suffix.lower() == ".json":
        text = path.read_text("utf-8-sig", "replace")
        text = text.replace('"face_blendshapes"', '"faceBlendshapes"')  # as saved from Python
        results = json.loads(text.replace('"category_name"', '"categoryName"'))
        for number, result in enumerate(results if isinstance(results, list) else [results], 1):
            yield f"result {number}", result
        return
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        if path.suffix.lower() == ".csv":
            rows = csv.DictReader(file)
            yield from ((f"line {rows.line_num}", row) for row in rows)
        else:
            lines = enumerate(file, 1)
            yield from ((f"line {number}", line) for number, line in lines if line.strip())

def face_of_take(row: dict) -> dict:
    """A row of a Live Link Face take. It has no values where the app saw no face."""
    cells = {name: cell for name, cell in row.items() if canonical(name or "") in ARKIT_NAMES}
    if len(cells) < 51:
        raise ValueError(f"the header that was found, {list(row)!s:.150}, lacks columns; a take "
                         "has 52 such as EyeBlinkLeft, separated by commas")
    if not any((cell or "").strip() for cell in cells.values()):
        return {"coefficients": None}
    for name, cell in cells.items():
        try:
            cells[name] = float(cell)
        except (TypeError, ValueError):
            raise ValueError(f"column {name} holds {cell or ''!r:.40}, which is no number")
    return {"coefficients": cells}

def face_of_mediapipe(result: dict | list) -> dict:
    """The first face of one result of MediaPipe's Face Landmarker, which is {"faceBlendshapes":
    [{"categories": [...]}]} or one face's list of categories. It may have found no face."""
    faces = [result] if result else []  # a list is the categories of one face
    if isinstance(result, dict):
        if "faceBlendshapes" not in result:
            raise ValueError(f"no faceBlendshapes among {', '.join(result):.150}")
        faces = result["faceBlendshapes"]
    if not faces:
        return {"coefficients": None}
    face = faces[0]
    categories = face["categories"] if isinstance(face, dict) else face
    scores = {category["categoryName"]: category["score"] for category in categories}
    return {"coefficients": {name: scores[name] for name in scores if name != "_neutral"}}

FACE_OF = {".csv": face_of_take, ".json": face_of_mediapipe}  # any other file holds records

def read_records(path: Path, args: argparse.Namespace, counts: Counter) -> Iterator[dict]:
    """Yields every Nth record, its image as a path from the working folder. SystemExit on a bad
    one."""
    suffix = path.suffix.lower()
    where = "as a whole"
    try:
        # Each row gets its frame first. Then --every and empty rows leave out both.
        items = list(items_of(path))
        frames = [None] * len(items)
        if args.frames:
            frames = list_pictures(Path(args.frames).absolute())
        if len(frames) != len(items):
            raise SystemExit(f"--frames {args.frames} holds {len(frames)} pictures for the "
                             f"{len(items)} rows of {path}; expected one a row, named in order")
        for (where, item), frame in list(zip(items, frames))[::args.every]:
            face = FACE_OF[suffix](item) if suffix in FACE_OF else json.loads(item)
            record = {"image": None, **face}
            if record["coefficients"] is None:
                counts["without a face, values or a prediction, left out"] += 1
                continue
            record["coefficients"] = standardize(record["coefficients"], counts)
            if args.identity or suffix in FACE_OF:
                record["identity"] = args.identity or path.stem
            image = frame or record["image"]
            # An absolute path, as a frame's, stays as it is.
            record["image"] = image and os.path.join(path.parent, image)
            yield record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
            csv.Error) as error:
        raise SystemExit(f"{path}, {where}: {error!s:.350}; {FORMS}")

def write_records(path: Path, records: list[dict], args: argparse.Namespace) -> None:
    """Describes records and writes them as they come, under another name until all are done."""
    unfinished = path.with_name(path.name + (".llm" if args.llm else ".partial"))
    path.parent.mkdir(parents=True, exist_ok=True)
    # What an interrupted run has described is kept, if it is of these faces.
    kept = [json.loads(line) for line in whole_lines(unfinished)] if args.resume else []
    faces = [record["coefficients"] for record in records]
    if [record["coefficients"] for record in kept] != faces[:len(kept)]:
        raise SystemExit(f"--resume: {unfinished} describes other faces; start without --resume")
    todo = records[len(kept):]
    descriptions = ((describe(record["coefficients"]), "rules") for record in todo)
    if args.llm:
        descriptions = describe_by_llm(todo, args)

    annotators = Counter(record["annotator"] for record in kept)
    bar = tqdm(zip(todo, descriptions), path.name, len(todo), disable=None)
    with unfinished.open("a" if kept else "w", encoding="utf-8", errors="backslashreplace") as file:
        for record, (description, annotator) in bar:
            record = {**record, "description": description, "annotator": annotator}
            if record["image"]:
                # Links are followed: behind one, ".." would lead elsewhere.
                image = os.path.relpath(os.path.realpath(record["image"]), path.parent.resolve())
                record["image"] = image.replace(os.sep, "/")
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            annotators[annotator] += 1
    unfinished.replace(path)
    print(f"wrote {path}: {len(records)} records, described by {dict(annotators)}")

# ---- Drawing the demo's faces --------------------------------------------------------------------
DARK, WHITE, RED = (40, 25, 25), (250, 250, 245), (205, 80, 80)
CAVITY, TONGUE = (70, 15, 20), (225, 105, 120)
SUPERSAMPLE = 4  # drawn at 4 times the size, then averaged
# Two drawing styles: what the demo trains on, and one with other colours, proportions (each between
# two ends) and lines (`line` times as wide), on which it is only tested.
STYLES = {
    "cartoon": {
        "skins": list(map(ImageColor.getrgb, [
            "#fadcc4", "#f0c8aa", "#deb08c", "#be8c68", "#96684a", "#704c36"])),
        "hairs": ["#1e1816", "#462e1e", "#78502c", "#c49650", "#963c1e", "#969696"],
        "irises": ["#50321a", "#32643c", "#3c6eaa", "#64646e"], "line": 1.0, "outline": 0.0,
        "proportions": {"fringe": (-0.75, -0.6), "width": (0.68, 0.80), "height": (0.76, 0.84),
                        "eye": (0.9, 1.15), "gap": (0.31, 0.37), "brow": (0.05, 0.09),
                        "nose": (0.85, 1.2), "mouth": (0.24, 0.31)}},
    "comic": {
        "skins": list(map(ImageColor.getrgb, [
            "#f4e878", "#c8e696", "#96d2d2", "#96aae6", "#c896dc", "#f0aabe"])),
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

# Parameters of the curves: around the head, across the lips and across an eye.
TURN = 2 * np.pi * np.arange(48) / 48
ACROSS_LIPS = np.arange(-7, 8) / 7  # from the right corner to the left
ACROSS_EYE = np.arange(-6, 7) / 6
# The brow's inner end, middle and outer end: at rest, and how far each action moves them.
BROW_X, BROW_Y = np.array([-0.19, -0.02, 0.2]), np.array([0, -0.03, 0.02])
BROW_DOWN = np.array([0.13, 0.06, 0.02])
BROW_INNER_UP, BROW_OUTER_UP = np.array([0.17, 0.05, 0]), np.array([0, 0.08, 0.19])

class Pen:
    """Draws in face coordinates, -1 to 1: x to the picture's right (the subject's left), y down."""

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
    """The color `amount` (0..1) of the way from `color` to `other`."""
    return tuple(round(a + (b - a) * amount) for a, b in zip(color, other))

def draw_head(pen: Pen, look: SimpleNamespace, c: SimpleNamespace) -> None:
    """Hair, outline, chin and puffed cheeks (jawOpen, jawLeft, jawRight, jawForward, cheekPuff)."""
    slide = 0.14 * (c.jawLeft - c.jawRight)
    drop = 0.14 * c.jawOpen

    # The outline: an ellipse whose cheeks widen and whose lower part follows the jaw.
    x, y = np.cos(TURN), np.sin(TURN)
    below = np.maximum(y, 0) ** 2  # 0 from the eyes up, 1 at the chin
    puff = 0.16 * c.cheekPuff * np.exp(-((y - 0.5) / 0.25) ** 2)
    x = look.width * x * (1 + puff - 0.12 * below) + slide * below
    y = look.height * y + drop * below

    # The hair behind, the face, the fringe before it.
    pen.ellipse(0, -0.12, look.width * 1.1, look.height * 1.03, look.hair)
    pen.polygon(x, y, look.skin)
    is_fringe = y < look.fringe
    pen.polygon(x[is_fringe], y[is_fringe], look.hair)
    if look.outline:
        pen.line(np.append(x, x[0]), np.append(y, y[0]), DARK, look.outline)

    # A chin that is pushed forward grows and brightens, and so do puffed cheeks.
    y = look.height - 0.1 + drop
    color = mix(look.skin, WHITE, 0.6 * c.jawForward)
    pen.ellipse(slide, y, 0.14 + 0.14 * c.jawForward, 0.05 + 0.07 * c.jawForward, color)
    for x in (-0.5, 0.5):
        pen.ellipse(x, 0.36, 0.13, 0.13, mix(look.skin, WHITE, 0.55 * c.cheekPuff))

def by_side(left: float, right: float) -> np.ndarray:
    """How strongly an action with these values on both sides is felt at each point across the lips,
    (15,): less and less over the middle third."""
    return np.minimum(1, 3 * abs(ACROSS_LIPS)) * np.where(ACROSS_LIPS > 0, left, right)

def draw_mouth(pen: Pen, look: SimpleNamespace, c: SimpleNamespace) -> None:
    """Lips, teeth, tongue (jawOpen, jawLeft, jawRight, tongueOut, mouth... but mouthDimple)."""
    t, arch = ACROSS_LIPS, 1 - ACROSS_LIPS ** 2  # the arch is 0 at the corners, 1 in the middle
    opening = np.sqrt(arch)
    # The line on which the lips meet.
    smile = by_side(c.mouthSmileLeft, c.mouthSmileRight)
    frown = by_side(c.mouthFrownLeft, c.mouthFrownRight)
    stretch = by_side(c.mouthStretchLeft, c.mouthStretchRight)
    shift = 0.13 * (c.mouthLeft - c.mouthRight) + 0.07 * (c.jawLeft - c.jawRight)
    width = look.mouth * (1 - 0.5 * c.mouthPucker - 0.3 * c.mouthFunnel)
    x = shift + t * (width + 0.06 * smile + 0.16 * stretch)
    y = 0.50 + t * t * 0.17 * (frown - smile) + 0.03 * smile * arch

    # The inner edges of both lips, and how thick the lips are.
    # With mouthClose beyond jawOpen the gap is negative, and lifts the lower lip.
    gap = 0.30 * (c.jawOpen - c.mouthClose) + 0.12 * c.mouthFunnel
    rise = 0.13 * by_side(c.mouthUpperUpLeft, c.mouthUpperUpRight) + 0.3 * max(gap, 0)
    fall = 0.13 * by_side(c.mouthLowerDownLeft, c.mouthLowerDownRight) + 0.7 * gap
    upper = y - opening * rise - 0.09 * c.mouthShrugUpper * arch
    lower = y + opening * fall - 0.07 * c.mouthShrugLower * arch
    press = by_side(c.mouthPressLeft, c.mouthPressRight)
    thick = opening * (1 - 0.6 * press) * (1 + 0.9 * c.mouthPucker + 0.5 * c.mouthFunnel)

    # The cavity, and in it the teeth, all but the corners.
    pen.band(x, upper, lower, CAVITY)
    upper_teeth = np.maximum(upper, np.minimum(upper + 0.06, lower))
    lower_teeth = np.minimum(lower, np.maximum(lower - 0.06, upper))
    inner = slice(2, -2)
    pen.band(x[inner], upper[inner], upper_teeth[inner], WHITE)
    pen.band(x[inner], lower[inner], lower_teeth[inner], WHITE)

    # The lips, thin where they are rolled in, and the tongue over the middle of the lower one.
    pen.band(x, upper - 0.065 * thick * (1 - 0.95 * c.mouthRollUpper), upper, look.lips)
    pen.band(x, lower, lower + 0.085 * thick * (1 - 0.95 * c.mouthRollLower), look.lips)
    for edge in (upper, lower):
        pen.line(x, edge, mix(look.lips, DARK, 0.6), 0.02)
    if c.tongueOut > 0:
        root, length = lower[7], c.tongueOut  # 7 is the middle of the lips
        pen.ellipse(x[7], root + 0.08 * length, 0.06 + 0.06 * length, 0.17 * length, TONGUE)
        groove = mix(TONGUE, DARK, 0.4)
        pen.line([x[7], x[7]], [root, root + 0.15 * length], groove, 0.02)

def draw_side(pen: Pen, look: SimpleNamespace, c: SimpleNamespace, side: int) -> None:
    """Eye, cheek, brow, nostril and creases of one side: 1 is the subject's left, -1 the right."""
    # In this function c.eyeBlink is eyeBlinkLeft or eyeBlinkRight, and so on.
    suffix = "Left" if side > 0 else "Right"
    c = SimpleNamespace(**{name.removesuffix(suffix): value for name, value in vars(c).items()})
    shade = partial(mix, look.skin, DARK)  # of an amount from 0 to 1
    t, arch = ACROSS_EYE, 1 - ACROSS_EYE ** 2
    # The eyeball and its iris between the edges of the lids, whose skin hides a part of the iris.
    # Open, the upper edge is 1 to 1.75 heights above the middle, closed it is 0.7 below.
    eye_x, eye_y, height = side * look.gap, -0.17, 0.105 * look.eye
    x = eye_x + 0.2 * look.eye * t
    upper = eye_y + height * (0.7 * c.eyeBlink - (1 + 0.75 * c.eyeWide) * (1 - c.eyeBlink)) * arch
    lower = eye_y + height * (0.75 - 0.75 * c.eyeSquint * (1 - c.eyeBlink)) * arch
    pen.ellipse(eye_x, eye_y - 0.02, 0.2 * look.eye, 0.2, shade(0.12))
    pen.band(x, upper, lower, WHITE)
    pupil_x = eye_x + 0.1 * side * (c.eyeLookOut - c.eyeLookIn)
    pupil_y = eye_y - 0.01 + 0.085 * (c.eyeLookDown - c.eyeLookUp)
    pen.ellipse(pupil_x, pupil_y, 0.08, 0.08, look.iris)
    pen.ellipse(pupil_x, pupil_y, 0.04, 0.04, DARK)
    pen.band(x, upper, eye_y - 0.02 - 0.2 * np.sqrt(arch), shade(0.12))
    pen.band(x, lower, eye_y - 0.02 + 0.2 * np.sqrt(arch), look.skin)
    pen.line(x, upper, DARK, 0.035)
    pen.line(x, lower, shade(0.35 + 0.5 * c.eyeSquint), 0.02 + 0.02 * c.eyeSquint)

    # The cheek: a blush and the fold above it.
    x = eye_x + side * 0.05
    blush = mix(look.skin, RED, 0.75 * c.cheekSquint)
    pen.ellipse(x, 0.2 - 0.07 * c.cheekSquint, 0.13, 0.07, blush)
    y = 0.12 - 0.08 * c.cheekSquint + 0.06 * t * t
    pen.line(x + 0.15 * t, y, shade(0.7 * c.cheekSquint), 0.03)

    # The brow, by three points.
    x = side * (look.gap + BROW_X - 0.02 * c.browDown)
    y = BROW_DOWN * c.browDown - BROW_INNER_UP * c.browInnerUp - BROW_OUTER_UP * c.browOuterUp
    pen.line(x, y + BROW_Y - 0.43, look.hair, look.brow)

    # The nostril and its wing, which a sneer pulls up, and the creases.
    x, y = side * 0.09 * look.nose, 0.2 - 0.07 * c.noseSneer
    pen.line([side * 0.05, x], [-0.15, y - 0.03], shade(0.2), 0.025)
    pen.ellipse(x, y, 0.05 + 0.02 * c.noseSneer, 0.035, shade(0.45))
    for action, x, y in CREASES:
        strength = getattr(c, action)
        if strength > 0:
            pen.line(side * np.array(x), y, shade(0.85 * strength), 0.03)

def draw_face(coefficients: dict, identity: str = "id000", size: int = 64,
              style: str = "cartoon") -> Image.Image:
    """Draws a face of `size` pixels, every action visible; the identity alone fixes the looks."""
    rng = np.random.default_rng(list(str(identity).encode()))
    palette = STYLES[style]
    # The order of these lines decides which random number each part of the looks gets.
    skins = palette["skins"]
    look = SimpleNamespace(outline=palette["outline"])
    tone = rng.uniform(0, len(skins) - 1.001)
    look.skin = mix(skins[int(tone)], skins[int(tone) + 1], tone % 1)
    look.lips = mix(look.skin, RED, rng.uniform(0.5, 0.9))
    look.hair = palette["hairs"][rng.integers(6)]
    look.iris = palette["irises"][rng.integers(4)]
    pen = Pen(size, tuple(rng.integers(60, 230, 3).tolist()), palette["line"])
    for part, ends in palette["proportions"].items():
        setattr(look, part, rng.uniform(*ends))

    c = SimpleNamespace(**coefficients)
    draw_head(pen, look, c)
    draw_mouth(pen, look, c)
    draw_side(pen, look, c, 1)
    draw_side(pen, look, c, -1)
    return pen.canvas.reduce(SUPERSAMPLE)

def draw_all(records: list[dict], images: Path, style: str = "cartoon") -> list[dict]:
    """Draws all faces into a folder, on all cores; returns the records with their images."""
    images.mkdir(parents=True, exist_ok=True)
    faces = [record["coefficients"] for record in records]
    people = [record.get("identity", "id000") for record in records]
    drawn = []
    with ProcessPoolExecutor() as pool:
        pictures = pool.map(draw_face, faces, people, repeat(64), repeat(style), chunksize=64)
        bar = tqdm(zip(records, pictures), "drawing", len(records), disable=None)
        for index, (record, picture) in enumerate(bar):
            path = images / f"{index:06d}.png"
            picture.save(path)
            drawn.append({**record, "image": str(path)})
    return drawn

# Movements of the demo that are no emotion, as none, a blink, a wink, speech or chewing.
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
EXPRESSIONS = 2 * [pattern for _, pattern in EMOTIONS.values()] + GESTURES
EXPRESSIONS = [expand(pattern) for pattern in EXPRESSIONS]
# Which way each of the gaze actions turns its eye: to the subject's left, up.
GAZE = {"eyeLookOutLeft": (1, 0), "eyeLookInRight": (1, 0), "eyeLookInLeft": (-1, 0),
        "eyeLookOutRight": (-1, 0), "eyeLookUpLeft": (0, 1), "eyeLookUpRight": (0, 1),
        "eyeLookDownLeft": (0, -1), "eyeLookDownRight": (0, -1)}
SIDES = {name: 1 if name.endswith("Left") else -1 for name in ARKIT_NAMES
         if name.endswith(("Left", "Right"))}
OPPOSITES = [("jawLeft", "jawRight"), ("mouthLeft", "mouthRight"),
             ("mouthSmileLeft", "mouthFrownLeft"), ("mouthSmileRight", "mouthFrownRight")]

def sample_expression(rng: np.random.Generator) -> dict:
    """Draws 52 plausible coefficients: one or two patterns, stray actions, asymmetry and a gaze."""
    c = dict.fromkeys(ARKIT_NAMES, 0.0)
    # A second pattern comes in two faces of five, else with strength 0.
    for strength in (rng.uniform(0.3, 1.1), rng.uniform(0.2, 0.8) * (rng.random() < 0.4)):
        pattern = EXPRESSIONS[rng.integers(len(EXPRESSIONS))]
        if rng.random() < 0.5:
            pattern = mirror(pattern)
        for name, value in pattern.items():
            c[name] = max(c[name], value * strength * rng.uniform(0.8, 1.2))
    for name in rng.choice(ARKIT_NAMES, rng.integers(1, 6), replace=False):
        c[name] = max(c[name], rng.uniform(0.2, 1.0))

    # One side of the face is stronger than the other, and every action varies a little.
    tilt = rng.normal(0, 0.15)
    for name in ARKIT_NAMES:
        c[name] *= 1 + tilt * SIDES.get(name, 0) + rng.normal(0, 0.08)

    # The two eyes turn together. Closed eyes show no gaze, no widening and no squint.
    x, y = rng.uniform(-1, 1, 2).tolist() if rng.random() < 0.6 else (0.0, 0.0)
    for name, (left, up) in GAZE.items():
        c[name] = max(x * left + y * up, 0.0) * rng.uniform(0.9, 1.1)
    for name in ARKIT_NAMES:
        if name.startswith(("eyeLook", "eyeWide", "eyeSquint")):
            c[name] *= 1 - c["eyeBlinkLeft" if name.endswith("Left") else "eyeBlinkRight"]

    # Opposite actions cancel in a drawing as in a face: the weaker one gives way.
    for pair in OPPOSITES:
        c[min(pair, key=c.get)] = 0.0
    c["mouthClose"] = min(c["mouthClose"], c["jawOpen"])  # ARKit: closes the lips over an open jaw
    return {name: round(min(max(0.0, value), 1.0), 3) for name, value in c.items()}

def make_demo(folder: Path, args: argparse.Namespace) -> None:
    """Draws the demo, 20 faces a person: train.jsonl, val.jsonl of one person in twelve, who is not
    in training, and shift.jsonl with the faces of val.jsonl in another drawing style."""
    records = []
    for index in range(args.demo):
        person = args.seed * 10_000 + index // 20  # each seed has people of its own
        coefficients = sample_expression(np.random.default_rng([args.seed, index]))
        records.append({"identity": f"id{person:03d}", "coefficients": coefficients})
    people = args.demo // 20
    first = 20 * (people - people // 12)  # the first face of the people held out
    drawn = draw_all(records, folder / "images")
    shift = draw_all(records[first:], folder / "images_comic", "comic")
    write_records(folder / "train.jsonl", drawn[:first], args)
    write_records(folder / "val.jsonl", drawn[first:], args)
    write_records(folder / "shift.jsonl", shift, args)
    print(f"next: python distill.py --data {folder / 'train.jsonl'}")

# ---- The stage itself ----------------------------------------------------------------------------
def main(args: argparse.Namespace) -> None:
    """Draws the demo, or describes the records of every INPUT."""
    # 240 faces are of 12 people, one of them for validation.
    for name, least in {"demo": 240, "every": 1, "batch_size": 1, "limit": 1, "seed": 0}.items():
        value = getattr(args, name)
        if value < least:
            raise SystemExit(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if args.frames and len(args.inputs) != 1:
        raise SystemExit(f"--frames {args.frames} belongs to one INPUT; annotate one after another")
    if not args.inputs:
        return make_demo(Path(args.out or "data/demo"), args)

    inputs, counts = [Path(name) for name in args.inputs], Counter()
    parts = (read_records(path, args, counts) for path in inputs)
    records = list(islice(chain.from_iterable(parts), args.limit))
    if not records:
        raise SystemExit(f"{', '.join(args.inputs):.200}: no usable record {dict(counts)}")

    # Whatever is read must not be overwritten, under whatever spelling.
    out = Path(args.out or inputs[0].with_suffix(".avatars" if args.render else ".annotated.jsonl"))
    images = out / "images"
    if args.render:
        out = out / "records.jsonl"
    used = {path.resolve() for path in inputs}
    used |= {Path(record["image"]).resolve().parent for record in records if record["image"]}
    if out.is_dir() or used & {out.resolve(), images.resolve()}:
        raise SystemExit(f"{out} is a folder, an INPUT or holds the pictures of one, which would "
                         "be overwritten; choose another --out")

    if args.render:
        records = draw_all(records, images)
    write_records(out, records, args)
    for what, count in counts.items():
        print(f"{count} {what}")
    if not all(record["image"] for record in records):
        print("to train on these, give their pictures with --frames")
    elif not args.render:
        print(f"next: python distill.py --data {out}")

if __name__ == "__main__":
    try:
        main(parse_args())
    except RuntimeError as error:  # of torch, which is here with --llm only
        if "out of memory" not in str(error):
            raise
        raise SystemExit("out of GPU memory; lower --batch-size, then --resume goes on")
    except OSError as error:  # a folder in place of a file, no right to write, a full disk
        raise SystemExit(f"{error}; name another file or folder")
    except KeyboardInterrupt:
        raise SystemExit("interrupted; with --llm, --resume goes on, else start again")
