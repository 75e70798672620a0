"""Tests of the four stages: CPU, no network. Run with: pytest test_all.py"""
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import annotate
import distill
import evaluate
import infer

ROOT = Path(__file__).parent
SCRIPTS = {"annotate": annotate, "distill": distill, "infer": infer, "evaluate": evaluate}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NAMES = annotate.ARKIT_NAMES
ZEROS = dict.fromkeys(NAMES, 0.0)

def run_main(module, *args):
    """Runs a stage as its command line would."""
    module.main(module.parse_args([str(arg) for arg in args]))

def assert_refused(message: str, module, *args):
    with pytest.raises(SystemExit, match=message):
        run_main(module, *args)

def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

def read_jsonl(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]

def as_array(records: list) -> np.ndarray:
    return np.array([[record["coefficients"][name] for name in NAMES] for record in records])

@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    run_main(annotate, "--demo", 240, "--out", folder)
    return folder

def learn_by_heart(demo: Path, out: Path, supervision: str) -> Path:
    """Overfits the tiny model to eight faces."""
    run_main(distill, "--data", demo / "train.jsonl", "--limit", 8, "--batch-size", 4, "--steps", 300,
             "--supervision", supervision, "--no-grounding", "--out", out)
    return out

@pytest.fixture(scope="session")
def trained(demo, tmp_path_factory) -> Path:
    return learn_by_heart(demo, tmp_path_factory.mktemp("run") / "out", "semantic")

# ---- The house: copies, budgets, README ------------------------------------------------------------
def test_copied_pieces_are_identical():
    sources = [(ROOT / f"{name}.py").read_text() for name in SCRIPTS]
    assert len({re.search(r"# The 52 names.*?\n\]", source, re.S).group() for source in sources}) == 1
    for name in ("open_image", "prompt_text", "answer_skeleton"):
        assert inspect.getsource(getattr(distill, name)) == inspect.getsource(getattr(infer, name))
    assert inspect.getsource(distill.check_coefficients) == inspect.getsource(evaluate.check_coefficients)
    assert (distill.FIELDS, distill.VALUES, distill.PARTS) == (infer.FIELDS, infer.VALUES, infer.PARTS)
    assert annotate.FIELDS == infer.FIELDS and annotate.ACTIVE == evaluate.ACTIVE and len(set(NAMES)) == 52

@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_stand_alone(name, tmp_path):
    (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    assert "--out" in subprocess.check_output([sys.executable, f"{name}.py", "--help"], cwd=tmp_path, text=True)

def test_readme_commands_parse_and_its_code_map_is_true():
    readme = (ROOT / "README.md").read_text()
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", readme, re.S)).replace("$seed", "0").replace("$words", "numeric")
    commands = re.findall(r"^ *(?:python|torchrun[-a-z0-9 ]*) (\w+)\.py(.*)$", commands, re.M)
    assert {name for name, _ in commands} == set(SCRIPTS)
    for name, rest in commands:
        SCRIPTS[name].parse_args(shlex.split(rest.split("&&")[0], comments=True))
    pieces = re.findall(r"`(annotate|distill|infer|evaluate)\.(?!py`)(\w+)`", readme)
    assert len(pieces) >= 12 and all(hasattr(SCRIPTS[script], piece) for script, piece in pieces)

# ---- annotate.py: the words ------------------------------------------------------------------------
# What the words mean, spelled here once more: subject, verb and whose muscle it is.
SINGLE = {
    ("inner brows", "raised"): "browInnerUp", ("cheeks", "puffed"): "cheekPuff",
    ("lips", "funneled"): "mouthFunnel", ("lips", "puckered"): "mouthPucker",
    ("lips", "closed over the jaw"): "mouthClose", ("upper lip", "rolled in"): "mouthRollUpper",
    ("lower lip", "rolled in"): "mouthRollLower", ("upper lip", "pushed up"): "mouthShrugUpper",
    ("lower lip", "pushed up"): "mouthShrugLower", ("mouth", "shifted left"): "mouthLeft",
    ("mouth", "shifted right"): "mouthRight", ("jaw", "opened"): "jawOpen",
    ("jaw", "pushed forward"): "jawForward", ("jaw", "shifted left"): "jawLeft",
    ("jaw", "shifted right"): "jawRight", ("tongue", "put out"): "tongueOut"}
PAIRED = {  # the muscle of the subject's left side, then of the right
    ("outer brow", "raised"): ("browOuterUpLeft", "browOuterUpRight"),
    ("brow", "lowered"): ("browDownLeft", "browDownRight"),
    ("eye", "closed"): ("eyeBlinkLeft", "eyeBlinkRight"),
    ("eye", "widened"): ("eyeWideLeft", "eyeWideRight"),
    ("eye", "squinted"): ("eyeSquintLeft", "eyeSquintRight"),
    ("eye", "looking up"): ("eyeLookUpLeft", "eyeLookUpRight"),
    ("eye", "looking down"): ("eyeLookDownLeft", "eyeLookDownRight"),
    # The left eye looks to the left by turning out, away from the nose, the right eye by turning in.
    ("eye", "looking left"): ("eyeLookOutLeft", "eyeLookInRight"),
    ("eye", "looking right"): ("eyeLookInLeft", "eyeLookOutRight"),
    ("nostril", "pulled up"): ("noseSneerLeft", "noseSneerRight"),
    ("cheek", "raised"): ("cheekSquintLeft", "cheekSquintRight"),
    ("lip corner", "raised"): ("mouthSmileLeft", "mouthSmileRight"),
    ("lip corner", "lowered"): ("mouthFrownLeft", "mouthFrownRight"),
    ("lip corner", "tucked in"): ("mouthDimpleLeft", "mouthDimpleRight"),
    ("lip corner", "stretched"): ("mouthStretchLeft", "mouthStretchRight"),
    ("lip side", "pressed"): ("mouthPressLeft", "mouthPressRight"),
    ("upper lip side", "raised"): ("mouthUpperUpLeft", "mouthUpperUpRight"),
    ("lower lip side", "lowered"): ("mouthLowerDownLeft", "mouthLowerDownRight")}
SIGNS = {  # at least one of these moves where an emotion is named
    "happiness": ("mouthSmile", "cheekSquint"), "sadness": ("browInnerUp", "browDown", "mouthFrown"),
    "surprise": ("browInnerUp", "browOuterUp", "eyeWide", "jawOpen"),
    "fear": ("browInnerUp", "browOuterUp", "browDown", "eyeWide", "eyeSquint", "mouthStretch", "jawOpen"),
    "anger": ("browDown", "eyeWide", "eyeSquint", "mouthPress"),
    "disgust": ("noseSneer", "mouthUpperUp", "mouthFrown"), "contempt": ("mouthSmile", "mouthDimple")}
AT_REST, SLIGHT, MODERATE, STRONG = range(4)

def strength(value: float) -> int:
    return AT_REST if value < 0.15 else SLIGHT if value < 0.4 else MODERATE if value < 0.7 else STRONG

def read_movements(text: str) -> dict:
    """{ARKit name: strength} of what a description says, None for words that mean nothing."""
    said = {}
    for phrase in re.sub(r"\b[A-Z][a-z]+: |\.(?= |$)", "", text.replace(". ", ", ")).split(", "):
        match = re.fullmatch(r"(?:(left|right|both) )?(.+) (slightly|moderately|strongly) (.+)", phrase)
        side, subject, adverb, verb = match.groups()
        level = {"slightly": SLIGHT, "moderately": MODERATE, "strongly": STRONG}[adverb]
        if side is None:
            names = [SINGLE[subject, verb]]
        elif side == "both":
            names = PAIRED[subject.removesuffix("s"), verb]
            assert subject.endswith("s")
        else:
            names = [PAIRED[subject, verb][side == "right"]]
        assert not said.keys() & set(names), f"{phrase} is said twice"
        said |= dict.fromkeys(names, level)
    return said

def assert_words_fit(face: dict, words: dict) -> None:
    """Every field of a description against the numbers, with no table of annotate.py."""
    true = {name: strength(value) for name, value in face.items()}
    moving = {name: level for name, level in true.items() if level}
    text = words["muscle_movements"]
    assert (read_movements(text) if text != "No visible movement." else {}) == moving

    category, emotional = words["expression_category"], {
        name: level for name, level in moving.items() if not name.startswith(("eyeLook", "eyeBlink"))}
    assert (category == "neutral") == (not emotional)
    degree = re.match("slight |strong |", category)[0]
    emotions = category.removeprefix(degree).split(" mixed with ")
    if emotions == ["neutral"] or emotions == ["movement without a clear emotion"]:
        assert words["emotional_implication"] == "not clearly observable"
    else:
        levels = [level for name, level in emotional.items() if name.startswith(SIGNS[emotions[0]])]
        assert all(any(name.startswith(SIGNS[emotion]) for name in emotional) for emotion in emotions)
        assert len(emotions) == 2 or degree == ["", "slight ", "", "strong "][max(levels)]
        corners = [side for side in ("Left", "Right") if true["mouthSmile" + side] or true["mouthDimple" + side]]
        assert "contempt" not in emotions or len(corners) == 1

    sides = {}  # of each region: on which side some pair is stronger
    for left, right in PAIRED.values():
        if true[left] != true[right] and not left.startswith("eyeLook"):
            region = re.match("brow|eye|nose|cheek|mouth", left)[0].replace("brow", "brows").replace(
                "eye", "eyes").replace("cheek", "cheeks")
            sides.setdefault(region, set()).add("left" if true[left] > true[right] else "right")
    said = {}
    for part in re.split(", |; ", words["symmetry"]):
        match = re.fullmatch(r"(?:stronger on the )?(left|right) (\w+)|(?:mixed in the )?(\w+)", part)
        said[match[2] or match[3]] = {match[1]} if match[1] else {"left", "right"}
    assert (said if words["symmetry"] != "symmetric" else {}) == sides

def random_faces(count: int, seed: int = 0):
    """Sparse and dense faces, many values at or beside the borders 0.15, 0.4 and 0.7."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        values = rng.uniform(0, 1, 52) * (rng.random(52) < (0.1, 0.3, 1.0)[index % 3])
        border = rng.choice([0.15, 0.4, 0.7], 52) + rng.choice([-0.01, -1e-9, 0, 0.01], 52)
        values = np.where(rng.random(52) < (0.0, 0.1, 0.5)[index % 3], border, values)
        if index % 2:  # pairs that move nearly alike
            values = dict(zip(NAMES, values.tolist()))
            for left, right in PAIRED.values():
                values[right] = min(max(0.0, values[left] + rng.choice([0, 0.02, -0.02])), 1.0)
            values = np.array(list(values.values()))
        yield dict(zip(NAMES, values.tolist()))

def test_words_never_contradict_the_numbers():
    for face in random_faces(3000):
        words = annotate.describe(face)
        assert_words_fit(face, words)
        assert not any(map(annotate.LOOP.search, words.values()))

def test_words_follow_from_the_bands_alone():
    middles = {AT_REST: 0.07, SLIGHT: 0.3, MODERATE: 0.5, STRONG: 0.9}
    for face in random_faces(300, seed=1):
        same_bands = {name: middles[strength(value)] for name, value in face.items()}
        assert annotate.describe(face) == annotate.describe(same_bands)

def test_words_of_the_demo_s_faces_and_of_prototypes():
    for index in range(500):
        face = annotate.sample_expression(np.random.default_rng(index))
        assert_words_fit(face, annotate.describe(face))
    for emotion, names in SIGNS.items():
        sides = ("Left",) if emotion == "contempt" else ("Left", "Right", "")
        face = ZEROS | {stem + side: 0.9 for stem in names for side in sides if stem + side in NAMES}
        assert emotion in annotate.describe(face)["expression_category"]

@pytest.mark.parametrize("face, expected", [
    ({}, ["neutral", "No visible movement.", "not clearly observable", "symmetric"]),
    ({"mouthSmileLeft": 0.14, "mouthSmileRight": 0.16},
     ["contempt mixed with happiness", "Mouth: right lip corner slightly raised.",
      "disdain or smugness, with joy or amusement", "stronger on the right mouth"]),
    ({"mouthSmileLeft": 0.14, "mouthSmileRight": 0.14, "cheekSquintLeft": 0.14, "cheekSquintRight": 0.14, "tongueOut": 0.15},
     ["movement without a clear emotion", "Tongue: tongue slightly put out.", "not clearly observable", "symmetric"]),
    ({"mouthSmileLeft": 0.39, "mouthSmileRight": 0.41, "cheekSquintLeft": 0.5, "cheekSquintRight": 0.5},
     ["happiness", "Cheeks: both cheeks moderately raised. Mouth: left lip corner slightly raised, right lip corner "
      "moderately raised.", "joy or amusement", "stronger on the right mouth"]),
    ({"eyeLookOutLeft": 0.5, "eyeLookInRight": 0.5}, ["neutral", "Eyes: both eyes moderately looking left.",
                                                     "not clearly observable", "symmetric"]),
    ({"mouthPressLeft": 0.9, "mouthDimpleRight": 0.2, "browDownLeft": 0.8}, ["strong anger",
     "Brows: left brow strongly lowered. Mouth: right lip corner slightly tucked in, left lip side strongly pressed.",
     "irritation or determination", "stronger on the left brows; mixed in the mouth"])])
def test_description_of_known_faces(face, expected):
    assert list(annotate.describe({**ZEROS, **face}).values()) == expected

@pytest.mark.parametrize("both", [{"mouthDimple": 0.8}, {"mouthSmile": 0.7, "mouthDimple": 0.7}])
def test_contempt_is_one_sided(both):
    left, right = ({stem + side: value for stem, value in both.items()} for side in ("Left", "Right"))
    assert "contempt" not in annotate.describe({**ZEROS, **left, **right})["expression_category"]
    for side in (left, right):
        assert annotate.describe({**ZEROS, **side})["expression_category"] == "strong contempt"

# ---- annotate.py: files and drawings ---------------------------------------------------------------
def read_input(path, *flags) -> tuple[list, Counter]:
    counts = Counter()
    return list(annotate.read_records(Path(path), annotate.parse_args([*map(str, flags)]), counts)), +counts

def test_every_action_shows_and_left_is_right_in_the_picture():
    base = {**ZEROS, "jawOpen": 0.5}  # mouthClose works on an open jaw
    neutral = np.asarray(annotate.draw_face(base, "id007")).astype(int)
    for name in NAMES:
        drawn = np.asarray(annotate.draw_face({**base, name: 1.0}, "id007")).astype(int)
        changed = np.abs(drawn - neutral).sum(axis=2) > 30
        assert changed.sum() >= 4, f"{name} cannot be seen"
        if name.endswith(("Left", "Right")) and not name.startswith(("mouthLeft", "mouthRight", "jaw")):
            columns = changed.nonzero()[1]
            assert (columns >= 31).all() if name.endswith("Left") else (columns <= 32).all(), name

def test_demo_is_reproducible_splits_by_identity_and_shifts_in_style_only(demo, tmp_path):
    run_main(annotate, "--demo", 240, "--out", tmp_path)
    for file in sorted(demo.rglob("*.*")):
        assert file.read_bytes() == (tmp_path / file.relative_to(demo)).read_bytes()
    train, val, shift = (read_jsonl(demo / f"{name}.jsonl") for name in ("train", "val", "shift"))
    run_main(annotate, "--demo", 250, "--out", tmp_path / "other", "--seed", 1)  # half a person more
    others = [read_jsonl(tmp_path / "other" / f"{name}.jsonl") for name in ("train", "val")]
    people = [{record["identity"] for record in part} for part in (train, val, *others)]
    assert all(people) and len(set.union(*people)) == sum(map(len, people))
    assert [{**record, "image": ""} for record in val] == [{**record, "image": ""} for record in shift]
    pictures = [np.array(Image.open(demo / records[0]["image"]), dtype=float) for records in (val, shift)]
    assert np.abs(pictures[0] - pictures[1]).mean() > 20
    run_main(annotate, demo / "val.jsonl", "--render", "--out", tmp_path / "again")
    for again, record in zip(read_jsonl(tmp_path / "again" / "records.jsonl"), val, strict=True):
        assert (tmp_path / "again" / again["image"]).read_bytes() == (demo / record["image"]).read_bytes()

def test_livelink_take_gives_back_what_was_written(demo, tmp_path):
    records = [{**record, "error": None} for record in read_jsonl(demo / "val.jsonl")]
    infer.write_livelink(tmp_path / "take.csv", records, fps=60)
    back, _ = read_input(tmp_path / "take.csv")
    expected = [pytest.approx(record["coefficients"], abs=1e-6) for record in records]
    assert [record["coefficients"] for record in back] == expected

def test_takes_are_read_by_column_name(tmp_path):
    face = {name: round(k / 100, 2) for k, name in enumerate(NAMES)}
    columns = ["Extra", *[name[0].upper() + name[1:] for name in reversed(NAMES)], "Timecode"]
    rows = [columns, ["x", *[str(face[name]) for name in reversed(NAMES)], "00:00:00:00.000"], []]
    text = "\r\n".join(map(",".join, rows))
    (tmp_path / "take.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())  # byte order mark, CRLF, a blank line
    records, counts = read_input(tmp_path / "take.csv")
    assert records == [{"image": None, "coefficients": face, "identity": "take"}] and not counts

def test_rows_without_values_are_left_out_and_counted_and_keep_their_frame(tmp_path):
    take = make_take(tmp_path, 4)
    lines = take.read_text().splitlines()
    lines[2] = "00:00:00:01.000,0" + "," * 61
    take.write_text("\n".join(lines + ["00:00:00:04.000,0"]))
    frames = make_frames(tmp_path, "frame{}.png", range(1, 6))
    records, counts = read_input(take, "--frames", frames)
    assert [Path(record["image"]).name for record in records] == ["frame1.png", "frame3.png", "frame4.png"]
    assert [record["coefficients"]["jawOpen"] for record in records] == pytest.approx([0.0, 0.2, 0.3])
    assert counts == {"without a face, values or a prediction, left out": 2}

def make_take(folder: Path, count: int) -> Path:
    """A take whose row k opens the jaw by k / 10."""
    rows = [{"coefficients": {**ZEROS, "jawOpen": k / 10}, "error": None} for k in range(count)]
    infer.write_livelink(folder / "take.csv", rows, fps=30)
    return folder / "take.csv"

def make_frames(folder: Path, pattern: str, numbers) -> Path:
    (folder / "frames").mkdir()
    for k in numbers:
        Image.new("RGB", (8, 8)).save(folder / "frames" / pattern.format(k))
    return folder / "frames"

def test_frames_are_paired_in_the_order_a_person_counts(tmp_path):
    frames = make_frames(tmp_path, "Frame{}.png", range(12, 0, -1))
    (frames / "frame7.png").write_bytes((frames / "Frame7.png").read_bytes())
    (frames / "Frame7.png").unlink()
    for name in ("._Frame1.png", ".DS_Store", "notes.txt"):
        (frames / name).write_bytes(b"no picture")
    take = tmp_path / "take.csv"
    rows = [{"coefficients": {**ZEROS, "jawOpen": k / 12}, "error": None} for k in range(12)]
    infer.write_livelink(take, rows, fps=30)
    records, _ = read_input(take, "--frames", frames)
    numbers = [int(re.search(r"\d+", Path(record["image"]).name)[0]) for record in records]
    assert numbers == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert [record["coefficients"]["jawOpen"] for record in records] == pytest.approx([k / 12 for k in range(12)])

def test_every_nth_row_keeps_its_frame(tmp_path):
    records, _ = read_input(make_take(tmp_path, 7), "--frames", make_frames(tmp_path, "{}.png", range(7)), "--every", 3)
    assert [Path(record["image"]).stem for record in records] == ["0", "3", "6"]
    assert [record["coefficients"]["jawOpen"] for record in records] == pytest.approx([0.0, 0.3, 0.6])

MEDIAPIPE = {name: round(k / 100, 2) for k, name in enumerate(NAMES) if name != "tongueOut"}

@pytest.mark.parametrize("form", ["javascript", "python", "bare", "many"])
def test_mediapipe_s_results_are_read(form, tmp_path):
    keys = ("category_name", "score") if form == "python" else ("categoryName", "score")
    face = [dict(zip(keys, item)) for item in {"_neutral": 0.9, **MEDIAPIPE}.items()]
    results = {"javascript": {"faceBlendshapes": [{"categories": face}]}, "python": {"face_blendshapes": [face]},
               "bare": [face], "many": [{"faceBlendshapes": [{"categories": face}]}, {"faceBlendshapes": []}]}
    (tmp_path / "anna.json").write_text("\ufeff" + json.dumps(results[form]), encoding="utf-8")
    records, counts = read_input(tmp_path / "anna.json")
    assert records == [{"image": None, "coefficients": {**MEDIAPIPE, "tongueOut": 0.0}, "identity": "anna"}]
    assert counts["records without tongueOut, set to 0"] == 1
    assert counts["without a face, values or a prediction, left out"] == (form == "many")

@pytest.mark.parametrize("spell", [
    lambda name: re.sub("(?<!jaw)(?<!mouth)(Left|Right)$", lambda side: "_" + side[0][0], name),
    lambda name: name[0].upper() + name[1:]])
def test_records_with_other_spellings_are_read(spell, tmp_path):
    values = {name: round(k / 100, 2) for k, name in enumerate(NAMES)}
    path = write_jsonl(tmp_path / "a.jsonl", [{"coefficients": {spell(name): x for name, x in values.items()}, "age": 7}])
    assert read_input(path)[0] == [{"image": None, "coefficients": values, "age": 7}]  # other fields stay

def test_clipping_is_reported_from_a_hundredth_on():
    counts = Counter()
    given = {**ZEROS, "eyeLookInLeft": 1.053, "jawOpen": 1.0005, "mouthLeft": -0.009, "mouthRight": -0.02}
    values = annotate.standardize(given, counts)
    assert (values["eyeLookInLeft"], values["jawOpen"], values["mouthLeft"], values["mouthRight"]) == (1, 1, 0, 0)
    assert counts == {"values clipped by 0.01 or more": 2}

def test_identity_is_who_is_seen_in_all_inputs(demo, tmp_path):
    inputs = [make_take(tmp_path, 2), demo / "val.jsonl"]
    run_main(annotate, *inputs, "--identity", "anna", "--out", tmp_path / "o.jsonl")
    assert {record["identity"] for record in read_jsonl(tmp_path / "o.jsonl")} == {"anna"}
    run_main(annotate, *inputs, "--out", tmp_path / "o.jsonl")
    assert {record["identity"] for record in read_jsonl(tmp_path / "o.jsonl")} == {"take", "id011"}

def test_lines_end_at_newlines_and_images_are_relative_to_the_records(demo, tmp_path):
    record = read_jsonl(demo / "train.jsonl")[0]
    record |= {"image": str(demo / record["image"]), "identity": "a\u2028b\x85c"}  # which str.splitlines cuts
    path, out = tmp_path / "labels.jsonl", tmp_path / "sub" / "o.jsonl"
    path.write_text(f"\ufeff{json.dumps(record, ensure_ascii=False)}\n\n  \n", encoding="utf-8")  # a mark, blank lines
    run_main(annotate, path, "--out", out)
    written = json.loads(out.read_text())
    assert written["identity"] == record["identity"] and not os.path.isabs(written["image"])
    for file in (out,):
        assert len(distill.read_records(file, "numeric", None)) == len(evaluate.read_records(file)) == 1
        assert infer.list_images([str(file)])[0].is_file()

@pytest.mark.parametrize("flags", [["--out", "sub/../a.jsonl"], ["--out", "link.jsonl"], ["--render", "--out", "."]])
def test_nothing_that_was_read_is_overwritten(flags, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "images").mkdir()
    record = read_jsonl(demo / "val.jsonl")[0]
    (tmp_path / "images" / "000000.png").write_bytes((demo / record["image"]).read_bytes())
    path = write_jsonl(tmp_path / "a.jsonl", [{**record, "image": "images/000000.png"}])
    (tmp_path / "link.jsonl").symlink_to(path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    assert_refused("would be overwritten", annotate, "a.jsonl", *flags)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before

def test_limit_leaves_the_demo_s_size_alone(tmp_path):
    run_main(annotate, "--demo", 260, "--limit", 4, "--out", tmp_path)
    assert len(read_jsonl(tmp_path / "train.jsonl")) + len(read_jsonl(tmp_path / "val.jsonl")) == 260

# ---- annotate.py: the frozen language model --------------------------------------------------------
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with Qwen-VL's special tokens: as in Qwen's own, every digit stands alone."""
    ids = {byte: k for k, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab=ids, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=special,
                                   eos_token="<|im_end|>", pad_token="<|endoftext|>")

def make_llm(folder: Path, words: str = "calm") -> Path:
    """A chat model that writes `words`, one token, and a closing quote in every field."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([words])
    tokenizer.chat_template = "{% if enable_thinking %}think{% endif %}{{ messages[0]['content'] }}Answer:"
    size, (quote, token) = 300, tokenizer.encode('"' + words)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    with torch.no_grad():
        for weight in [*model.model.layers.parameters(), model.lm_head.weight]:
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight[token, quote] = model.lm_head.weight[quote, token] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

@pytest.mark.parametrize("words, text", [("calm", "calm"), (r'a \"wide\" grin, \\o/', r'a "wide" grin, \o/')])
def test_a_frozen_llm_fills_in_the_fields(words, text, demo, tmp_path):
    llm = make_llm(tmp_path / "llm", words)
    run_main(annotate, demo / "val.jsonl", "--limit", 5, "--batch-size", 3, "--llm", llm, "--out", tmp_path / "o.jsonl")
    for record, true in zip(read_jsonl(tmp_path / "o.jsonl"), read_jsonl(demo / "val.jsonl")[:5], strict=True):
        assert record["description"] == dict.fromkeys(annotate.FIELDS, text) and record["annotator"] == str(llm)
        assert record["coefficients"] == true["coefficients"]

@pytest.mark.parametrize("words", ["ha, ha, ha, ha, ", " ", r"wrong \escape",
                                   "Cheeks: right cheek slightly raised. Mouth: both lip corners moderately raised."])
def test_rules_stand_in_for_a_malformed_answer(words, demo, tmp_path):
    """A loop, nothing, an unknown escape that finds no end, and the prompt's example for every face."""
    llm = make_llm(tmp_path / "llm", words)
    run_main(annotate, demo / "val.jsonl", "--limit", 2, "--llm", llm, "--out", tmp_path / "o.jsonl")
    for record, true in zip(read_jsonl(tmp_path / "o.jsonl"), read_jsonl(demo / "val.jsonl")):
        assert record["description"] == true["description"] and record["annotator"].startswith("rules, since")

def test_the_example_of_the_prompt_is_valid_for_its_own_face():
    assert annotate.is_valid(annotate.EXAMPLE_WORDS, annotate.EXAMPLE)
    assert not annotate.is_valid(annotate.EXAMPLE_WORDS, ZEROS)
    assert "mouthSmileLeft 0.62, mouthSmileRight 0.58, cheekSquintRight 0.21" in annotate.LLM_PROMPT
    assert "both lip corners moderately raised" in annotate.LLM_PROMPT

def test_the_model_is_told_not_to_think(demo, tmp_path, monkeypatch):
    model, tokenizer = Mock(device="cpu"), byte_tokenizer()
    tokenizer.chat_template = "{% if enable_thinking %}think {% endif %}{{ messages[0]['content'] }}"
    model.generate.side_effect = lambda input_ids, **_: torch.cat([input_ids, input_ids[:, :0]], dim=1)
    tokenizer.padding_side = "left"
    annotate.ask_llm(model, tokenizer, [ZEROS])
    text = tokenizer.decode(model.generate.call_args_list[0].kwargs["input_ids"][0])
    assert text.startswith("You are an expert") and text.endswith('none, the face is at rest\n{"expression_category": "')

def test_interrupted_llm_run_goes_on_with_resume(demo, tmp_path, monkeypatch):
    flags = [demo / "val.jsonl", "--limit", 7, "--batch-size", 3, "--llm", make_llm(tmp_path / "llm")]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run_main(annotate, *flags, "--out", whole)
    ask = Mock(wraps=annotate.ask_llm, side_effect=[DEFAULT, DEFAULT, KeyboardInterrupt, DEFAULT])
    monkeypatch.setattr(annotate, "ask_llm", ask)
    with pytest.raises(KeyboardInterrupt):
        run_main(annotate, *flags, "--out", out)
    run_main(annotate, *flags[:-2], "--out", out)  # the rules leave the model's answers alone
    with (tmp_path / "parts.jsonl.llm").open("ab") as file:
        file.write('{"image": "torn é'.encode()[:-1])  # within a character
    assert_refused("describes other faces", annotate, demo / "train.jsonl", *flags[1:], "--out", out, "--resume")
    run_main(annotate, *flags, "--out", out, "--resume")
    assert ask.call_count == 4 and out.read_text() == whole.read_text()  # one batch was asked again
    assert not (tmp_path / "parts.jsonl.llm").exists()

# ---- distill.py ------------------------------------------------------------------------------------
def make_qwen(folder: Path, kind: str = "qwen3_vl", seed: int = 0) -> Path:
    """An untrained Qwen-VL saved as on the hub. Its tokenizer splits numbers into digits."""
    tokenizer, patch = byte_tokenizer(), 16 if kind == "qwen3_vl" else 14
    ids = {f"{name.removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in distill.SPECIAL}
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**sizes, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "rope_parameters": rope, "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {**sizes, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "patch_size": patch, "window_size": 56,
              "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1]}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **ids)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2).save_pretrained(folder)
    (folder / "prompt.txt").write_text("You read faces.\n---\nRead.\n")
    return folder

def load_qwen(folder: Path) -> infer.Model:
    return infer.load(folder, prompt_file=folder / "prompt.txt")

def make_dataset(demo: Path, supervision: str, folder: Path = None):
    """The tiny model, or that of a folder, and the first eight records."""
    records = distill.read_records(demo / "train.jsonl", supervision, 8)
    torch.manual_seed(0)
    model, tokenizer, image_processor = distill.build_tiny(records, 64 * 64)
    if folder:
        loaded = load_qwen(folder)
        model, tokenizer, image_processor = loaded.network, loaded.tokenizer, loaded.image_processor
    return model, distill.FaceDataset(records, tokenizer, image_processor, supervision, 64 * 64)

@pytest.mark.parametrize("supervision", ["semantic", "numeric", "numbers-first"])
def test_exactly_the_answer_and_its_end_are_supervised(demo, supervision):
    _, dataset = make_dataset(demo, supervision)
    batch, decode = dataset.collate([dataset[index] for index in range(3)]), dataset.tokenizer.decode
    for row, record in enumerate(dataset.records[:3]):
        ids, labels, types = (batch[name][row] for name in ("input_ids", "labels", "token_types"))
        rounded = {name: float(f"{value:.1f}") for name, value in record["coefficients"].items()}
        whole = {"analysis": record["description"], "arkit": rounded}
        answer = json.dumps({part: whole[part] for part in distill.PARTS[supervision]}) + "<|im_end|>"
        kept = labels != distill.IGNORE_INDEX
        assert decode(labels[kept]) == answer and (labels[kept] == ids[kept]).all()
        assert decode(ids).replace("<|endoftext|>", "") == distill.prompt_text(distill.PROMPT, 16) + answer
        assert decode(ids[types == distill.NUMBER]) == "".join(map(str, rounded.values()))
        words = "" if supervision == "numeric" else "".join(record["description"].values())
        assert decode(ids[types == distill.TEXT]) == words
    unseen = "naïve 😀 \"unseen\" 0.35\n{"
    assert decode(dataset.encode(unseen)) == unseen

@pytest.mark.parametrize("digits_are_split", [False, True])
def test_loss_equals_the_library_s(digits_are_split, demo, tmp_path, monkeypatch):
    folder = make_qwen(tmp_path / "hub") if digits_are_split else None
    model, dataset = make_dataset(demo, "semantic", folder)
    dataset.records[0]["coefficients"] |= {"jawOpen": 1.0, "mouthPucker": 0.97}
    batch = dataset.collate([dataset[index] for index in range(4)])
    options = [dataset.encode(value)[-1] for value in distill.VALUES][:10 if digits_are_split else 11]
    nats, squared = distill.answer_loss(model, batch, options)
    names = ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw", "labels")
    inputs = {name: batch[name] for name in names}
    real = torch.tensor([len(dataset[index]["input_ids"]) for index in range(4)])
    inputs["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < real[:, None]).long()
    output = model(**inputs)
    count = (batch["labels"] != distill.IGNORE_INDEX).sum()
    assert (nats / count).item() == pytest.approx(output.loss.item(), abs=1e-5)
    expected = 0.0  # the expected value of each number, written out one by one
    for row, record in enumerate(dataset.records[:4]):
        positions = (batch["token_types"][row] == distill.NUMBER).nonzero().view(52, -1)[:, -1]
        for position, true in zip(positions, record["coefficients"].values()):
            shares = output.logits[row, position - 1, options].softmax(dim=0).tolist()
            mean = sum(share * k / 10 for k, share in enumerate(shares))
            if not digits_are_split or true < 0.95:  # "1.0" is left to cross-entropy
                expected += (mean - true) ** 2
    assert squared.item() == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(distill, "LOSS_LOGITS", 10 * len(dataset.tokenizer))  # in parts of ten tokens
    parts, _ = distill.answer_loss(model, batch, options)
    assert parts.item() == pytest.approx(nats.item(), rel=1e-5)
    parts.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0

def test_words_follow_true_words_and_numbers_sampled_ones(demo, monkeypatch):
    model, dataset = make_dataset(demo, "semantic")
    batch = dataset.collate([dataset[index] for index in range(8)])
    args, pad_id, types = distill.parse_args(["--steps", "100"]), dataset.tokenizer.pad_token_id, batch["token_types"]
    options, args.rank, args.world_size = [dataset.encode(value)[0] for value in distill.VALUES], 0, 1
    genuine, is_before = distill.hidden_states, (types == distill.NUMBER).cumsum(dim=1) == 0
    monkeypatch.setattr(distill, "hidden_states", Mock(wraps=genuine))
    for forward, word_share, number_share, weight in ((0, 0.3, 1.0, 2), (99, 0.1, 0.1, 0)):  # first, last pass
        nats, _ = distill.grounded_loss(model, batch, options, pad_id, args, forward)
        passes = [call.args[1]["input_ids"] for call in distill.hidden_states.call_args_list[-2:]]
        is_word, n = types == distill.TEXT, passes[0].shape[1]
        hidden = [(passes[0] == pad_id)[is_word[:, :n]], (passes[1] == pad_id)[types == distill.NUMBER]]
        assert [part.float().mean().item() for part in hidden] == pytest.approx([word_share, number_share], abs=0.08)
        changed = passes[1] != batch["input_ids"]  # an untrained model guesses wrong
        assert changed[is_word].float().mean() > 0.9 and not changed[types == distill.SKELETON].any()
        expected = 0.0
        for ids, is_supervised, scale in zip(passes, (is_before, ~is_before), (weight, 1)):
            image_types = batch["mm_token_type_ids"][:, :ids.shape[1]]
            states = genuine(model, {**batch, "input_ids": ids, "mm_token_type_ids": image_types})[:, :-1]
            labels = batch["labels"].masked_fill(~is_supervised, distill.IGNORE_INDEX)[:, 1:ids.shape[1]]
            expected += scale * torch.nn.functional.cross_entropy(model.lm_head(states).mT, labels, reduction="sum").item()
        assert nats.item() == pytest.approx(expected, rel=1e-5)

def test_records_are_held_out_by_identity_and_shared_out_in_batches():
    records = [{"identity": f"id{k // 10:02d}"} for k in range(200)]
    train, val = distill.hold_out(records[::3] + records[1::3] + records[2::3])
    assert [len({record["identity"] for record in part}) for part in (train, val)] == [19, 1]
    assert len(val) == 10 and len(train) == 190 and distill.hold_out(records[:9]) == (records[:9], [])
    one_take = [{"identity": "take", "frame": k} for k in range(100)]
    assert distill.hold_out(one_take)[1] == one_take[95:]
    args, orders = distill.parse_args(["--steps", "10"]), []
    for args.rank, args.world_size, args.batch_size in ((0, 1, 2), (0, 2, 1), (1, 2, 1)):
        orders.append(distill.batch_order(10, args))
    whole = sum(orders[0], [])
    assert sorted(whole[:10]) == sorted(whole[10:]) == list(range(10)) and whole[:10] != whole[10:]
    assert [one + two for one, two in zip(*orders[1:])] == orders[0]

def test_tiny_model_learns_faces_by_heart_and_its_words_fit_its_numbers(trained, demo, tmp_path, capsys):
    log = read_jsonl(trained / "log.jsonl")
    assert log[-1]["loss"] < 0.15 * np.log(11) and log[-1]["samples/s"] > 0 and log[-1]["tokens/s"] > 0
    records = [{**record, "image": str(demo / record["image"])} for record in read_jsonl(demo / "train.jsonl")[:8]]
    seen, path, own = write_jsonl(tmp_path / "seen.jsonl", records), tmp_path / "p.jsonl", tmp_path / "own.jsonl"
    run_main(infer, seen, "--model", trained, "--estimate", "mode", "--out", path)
    run_main(annotate, path, "--out", own)
    for truth, worst in ((seen, 0.04), (own, 0.0)):
        run_main(evaluate, path, truth, "--out", tmp_path / "m.json")
        results = json.loads((tmp_path / "m.json").read_text())
        assert results["models"][str(path)]["mae"] <= worst < as_array(records).mean()
        assert results["description"]["f1"] > 0.7
    assert "nan" not in capsys.readouterr().out

@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_run_resumes_to_the_same_weights(stop, demo, tmp_path):
    flags = ["--data", demo / "train.jsonl", "--limit", 12, "--steps", 24, "--batch-size", 2, "--grad-accum", 2,
             "--save-every", 5]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_main(distill, *flags, "--out", whole)
    command = [sys.executable, ROOT / "distill.py", *map(str, flags), "--out", stopped]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not (stopped / "state.pt").is_file():
        time.sleep(0.01)
    os.killpg(process.pid, stop)  # as a terminal does: the workers get it too
    message = process.communicate()[1]
    step = torch.load(stopped / "state.pt")["step"]
    assert step < 24 and not (stopped / "run.json").exists()
    if stop == signal.SIGINT:
        assert f"interrupted after step {step}; nothing is lost" in message and "Traceback" not in message
    assert_refused("unfinished run", distill, *flags, "--out", stopped)
    run_main(distill, "--out", stopped, "--resume")  # the settings are in the state
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    assert not (stopped / "state.pt").exists()

@pytest.mark.parametrize("kind, rank", [("qwen3_vl", 4), ("qwen2_5_vl", 4), ("qwen3_vl", 0)])
def test_real_architectures_from_a_folder(kind, rank, demo, tmp_path):
    folder, run = make_qwen(tmp_path / "hub", kind), tmp_path / "run"
    run_main(distill, "--model", folder, "--data", demo / "train.jsonl", "--limit", 4, "--steps", 2, "--lr", 0.02,
             "--batch-size", 2, "--max-pixels", 8192, "--lora-rank", rank, "--expectation-weight", 1, "--out", run)
    predictor, before = infer.load(run), load_qwen(folder).network.state_dict()
    after = predictor.network.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and not any("visual" in name for name in changed)
    if rank:  # PEFT's format: all seven linears of both layers, W + alpha / r B A
        weights = load_file(run / "adapter_model.safetensors")
        targets = json.loads((run / "adapter_config.json").read_text())["target_modules"]
        assert len(changed) == 14 and len(weights) == 28
        for name in changed:
            stem = name.removesuffix(".weight")
            low, high = (weights[f"base_model.model.{stem}.lora_{matrix}.weight"] for matrix in "AB")
            assert torch.allclose(after[name], before[name] + 32 / rank * high @ low, atol=1e-6)
            assert re.fullmatch(targets, stem)
    # What was trained is what was written: the loss on the validation records is the same.
    records = distill.read_records(demo / "val.jsonl", "semantic", distill.VAL_RECORDS)
    val_set = distill.FaceDataset(records, predictor.tokenizer, predictor.image_processor, "semantic", 8192)
    val_loss = distill.validate(predictor.network, val_set, distill.parse_args([]))
    assert val_loss == pytest.approx(read_jsonl(run / "log.jsonl")[-1]["val_loss"], abs=1e-4)
    # Pictures are shrunk to --max-pixels but never blown up: here they have 64 x 64.
    small = distill.FaceDataset(records, predictor.tokenizer, predictor.image_processor, "semantic", 32 * 32)
    assert [len(data[0]["pixel_values"]) for data in (val_set, small)] == [4 * 4, 2 * 2]
    pictures = make_noise((64, 64), (300, 80), (50, 200))
    for picture, prediction in zip(pictures, infer.predict(predictor, pictures, numeric=True)):
        alone = infer.predict(predictor, [picture], numeric=True)[0]  # or beside pictures of other shapes
        assert prediction["coefficients"] == pytest.approx(alone["coefficients"], abs=2e-4)

def test_adapters_of_peft_are_merged_and_strangers_refused(tmp_path):
    network = load_qwen(make_qwen(tmp_path / "hub")).network
    projection = network.model.language_model.layers[0].self_attn.q_proj
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    low, high = torch.randn(3, 32), torch.randn(32, 3)
    weights = {f"{name}.lora_A.weight": low, f"{name}.lora_B.weight": high}
    config = {"lora_alpha": 32, "use_rslora": True, "alpha_pattern": {"q_proj": 8}}
    expected = projection.weight.detach() + 8 / 3 ** 0.5 * high @ low
    infer.merge_adapter(network, config, weights)
    assert torch.allclose(projection.weight, expected, atol=1e-4)
    for strange in ("base_model.model.elsewhere.lora_A.weight", f"{name}.lora_magnitude_vector"):
        with pytest.raises(SystemExit, match="matches no weight"):
            infer.merge_adapter(network, config, {**weights, strange: torch.zeros(3, 32)})

def test_two_processes_train_as_one(demo, tmp_path):
    flags = ["--model", make_qwen(tmp_path / "hub"), "--data", demo / "train.jsonl", "--limit", 6, "--steps", 3,
             "--lr", 0.03, "--expectation-weight", 5, "--save-every", 1]
    run_main(distill, *flags, "--batch-size", 2, "--out", tmp_path / "one")
    flags = [*map(str, flags), "--batch-size", "1", "--out", str(tmp_path / "two")]
    subprocess.run([*TORCHRUN, ROOT / "distill.py", *flags], check=True, capture_output=True)
    one, two = (read_jsonl(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3]
    for name in ("loss", "val_loss"):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in two], abs=1e-4)
    assert one[0]["loss"] - one[2]["loss"] > 0.01

# ---- infer.py --------------------------------------------------------------------------------------
def make_noise(*sizes: tuple) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]

def inputs_of(predictor: infer.Model, images: list) -> dict:
    size = {"shortest_edge": 256, "longest_edge": predictor.max_pixels}
    return infer.prepare(predictor, [predictor.image_processor([image], size=size, return_tensors="pt")
                                     for image in images])

@pytest.mark.parametrize("supervision, batch_size", [("semantic", 1), ("semantic", 8), ("numbers-first", 8)])
def test_forced_decoding_writes_what_generate_writes(supervision, batch_size, trained, demo, tmp_path):
    folder = trained if supervision == "semantic" else learn_by_heart(demo, tmp_path / "run", supervision)
    predictor = infer.load(folder)
    seen = [infer.open_image(demo / record["image"]) for record in read_jsonl(demo / "train.jsonl")[:8]]
    # The same pictures darker and darker, whose answers are doubtful but mostly whole.
    images = [image.point(lambda value: value * share) for share in (1.0, 0.9, 0.8, 0.7) for image in seen]
    # An answer counts that has all fields and names, once and in order, and only the eleven values.
    slots = {**dict.fromkeys(NAMES, r"(0\.\d|1\.0)"), **dict.fromkeys(infer.FIELDS, '[^"]*'), None: ""}
    whole_answer = "".join(re.escape(text) + slots[slot] for text, slot in infer.answer_skeleton(supervision))
    well_formed, lengths = 0, set()
    for start in range(0, 32, batch_size):
        inputs = inputs_of(predictor, images[start:start + batch_size])
        _, chosen, texts = infer.decode_forced(predictor, inputs, supervision)
        tokens = predictor.network.generate(**inputs, do_sample=False, max_new_tokens=250)
        answers = predictor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        for written, row, text in zip(answers, chosen.tolist(), texts):
            whole = {"analysis": text, "arkit": {name: k / 10 for name, k in zip(NAMES, row)}}
            forced = json.dumps({part: whole[part] for part in infer.PARTS[supervision]}, ensure_ascii=False)
            lengths.add(len(forced))
            if re.fullmatch(whole_answer, written):
                assert written == forced
                well_formed += 1
    assert well_formed >= 12 and len(lengths) >= 4

@pytest.mark.parametrize("supervision", ["semantic", "numbers-first"])
def test_every_token_is_what_one_forward_pass_chooses(supervision, tmp_path, monkeypatch):
    """Digits are split here, and texts that find no end are cut off."""
    predictor = load_qwen(make_qwen(tmp_path / "hub", seed=7))
    with torch.no_grad():  # untrained models are nearly indifferent: sharpen attention and choices
        for layer in predictor.network.model.language_model.layers:
            for weight in (layer.self_attn.q_norm.weight, layer.self_attn.v_proj.weight, layer.mlp.down_proj.weight):
                weight.mul_(10)
        predictor.network.lm_head.weight.mul_(10)
    pictures, written, genuine = make_noise(*[(64, 64)] * 4), [], infer.decode_text

    def record(*args, **more):  # the token ids: their text, encoded anew, may differ
        written.append(genuine(*args, **more))
        return written[-1]
    monkeypatch.setattr(infer, "MAX_TEXT_TOKENS", 6)
    monkeypatch.setattr(infer, "decode_text", record)
    probabilities, chosen, _ = infer.decode_forced(predictor, inputs_of(predictor, pictures), supervision)
    assert probabilities.sum(dim=-1).numpy() == pytest.approx(1.0, abs=1e-5) and len(chosen.unique()) >= 8
    encode, every = predictor.tokenizer.encode, list(range(len(predictor.tokenizer)))
    digits, pieces = [encode(str(k))[0] for k in range(10)], infer.answer_skeleton(supervision)
    for row, numbers in enumerate(chosen.tolist()):
        answer, expected = [], []  # token ids, and (index, token, options) of what was decided
        for k, (text, slot) in enumerate(pieces[:-1]):
            answer += encode(text)
            if slot in NAMES:
                tokens = encode(infer.VALUES[numbers[NAMES.index(slot)]])
                tenths = digits[:1] if tokens[0] == digits[1] else digits  # "1." allows only "0"
                options = [digits[:2], tokens[1:2], tenths]
            else:
                tokens = written[infer.FIELDS.index(slot)][row]
                options = [every] * len(tokens)
                if len(tokens) < 6:  # the token that closes it was chosen too
                    expected.append((len(answer) + len(tokens), encode(pieces[k + 1][0])[0], every))
            expected += [(len(answer) + n, token, options[n]) for n, token in enumerate(tokens)]
            answer += tokens
        one = inputs_of(predictor, [pictures[row]])
        more = {"input_ids": answer, "attention_mask": [1] * len(answer), "mm_token_type_ids": [0] * len(answer)}
        one |= {name: torch.cat([one[name], torch.tensor([values])], dim=1) for name, values in more.items()}
        with torch.no_grad():
            logits = predictor.network(**one).logits[0, -len(answer) - 1:]  # [n] predicts answer[n]
        for index, token, options in expected:
            assert token == options[int(logits[index, options].argmax())]

def test_reader_of_foreign_answers():
    heads = ["Facial Expression Category", "Detailed Muscle Movements", "Emotional Implication", "Symmetry"]
    keys = {name[0].upper() + name[1:]: 0.3 for name in NAMES} | {"HeadYaw": -0.2, "TongueOut": -0.0}
    for form in ("**{k}. {head}**\n{text}\n\n", "{k}. **{head}**: {text}  \n", "### {k}) {head}\n{text}\n"):
        sections = "".join(form.format(k=k, head=head, text=f"{head} {{text}}: more") for k, head in enumerate(heads, 1))
        coefficients, description = infer.read_answer(f"{sections}\n\n{json.dumps(keys)} end")
        assert coefficients == {**dict.fromkeys(NAMES, 0.3), "tongueOut": 0.0} and list(coefficients) == NAMES
        assert description == {field: f"{head} {{text}}: more" for field, head in zip(infer.FIELDS, heads)}
    bullets = "\n".join(f"{k}. **{head}**:\n   - **Eyes**: wide.\n   - **Jaw**: open." for k, head in enumerate(heads, 1))
    _, description = infer.read_answer(f"{bullets}\n{json.dumps(keys)}")
    assert description["muscle_movements"].endswith("Eyes**: wide. Jaw**: open.")
    assert infer.read_answer(json.dumps(keys))[1] is None
    whole = {"analysis": dict.fromkeys(infer.FIELDS, "x"), "arkit": ZEROS}
    assert infer.read_answer("{} " + json.dumps(whole)) == (ZEROS, whole["analysis"])
    for text in ("no braces", json.dumps(whole)[:-30]):
        with pytest.raises(ValueError, match="lacks 52"):
            infer.read_answer(text)
    for value in (None, "x", float("nan")):
        with pytest.raises(ValueError, match="lacks 1 .*jawOpen"):
            infer.read_answer(json.dumps({**ZEROS, "jawOpen": value}))

def test_estimates_of_a_known_distribution():
    probabilities = torch.tensor([0.3, 0, 0, 0, 0.3, 0, 0, 0, 0, 0, 0.4]).view(1, 1, 11)
    std = (0.3 * 0.52 ** 2 + 0.3 * 0.12 ** 2 + 0.4 * 0.48 ** 2) ** 0.5
    for statistic, point in (("mean", 0.52), ("median", 0.4), ("mode", 1.0)):
        values = torch.stack(infer.estimate(probabilities, torch.tensor([[10]]), statistic)).flatten()
        assert values.tolist() == pytest.approx([point, std], abs=1e-6)

def test_checkpoint_trained_elsewhere(demo, tmp_path):
    folder = make_qwen(tmp_path / "hub")
    flags = [demo / "val.jsonl", "--model", folder, "--limit", 2, "--out", tmp_path / "p.jsonl"]
    assert_refused("--prompt FILE", infer, *flags)
    run_main(infer, *flags, "--prompt", folder / "prompt.txt", "--decode", "generate")
    records = read_jsonl(tmp_path / "p.jsonl")  # it babbles, which is reported and kept
    assert all("the answer" in record["error"] and record["answer"] for record in records)
    predictor = load_qwen(folder)
    text = predictor.tokenizer.decode(inputs_of(predictor, make_noise((64, 64)))["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou read faces.<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert "<|vision_end|>Read.<|im_end|>" in text

def test_any_picture_is_answered_or_reported_even_untrained(demo, tmp_path):
    folder, run, out = tmp_path / "bilder ü", tmp_path / "run", tmp_path / "p.jsonl"
    folder.mkdir()
    photo = make_noise((60, 40))[0].resize((240, 160))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.rotate(90, expand=True).save(folder / "rotated.jpg", exif=exif, quality=95)
    for mode, name in (("L", "gray.png"), ("CMYK", "cmyk.jpg"), ("P", "palette.gif"), ("LA", "la.png"), ("1", "bit.png"),
                       ("RGB", "UPPER.WEBP"), ("RGBA", "ünï 名.png")):
        photo.convert(mode).save(folder / name)
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(folder / "gray16.png")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    readable = {path.name for path in folder.iterdir()}
    Image.new("RGB", (1, 300)).save(folder / "line.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    (folder / "torn.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:2000])
    bomb = b"\x00\x00\x00\x0dIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    bomb += zlib.crc32(bomb[4:]).to_bytes(4, "big") + b"\x00\x00\x00\x00IEND\xaeB`\x82"
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb)
    (folder / "notes.txt").touch()
    run_main(distill, "--data", demo / "train.jsonl", "--limit", 6, "--batch-size", 2, "--out", run)
    assert read_jsonl(run / "log.jsonl")[-1]["step"] == 3  # --limit alone is one pass
    run_main(infer, folder, "--model", run, "--out", out, "--csv", tmp_path / "p.csv", "--plot", tmp_path / "charts")
    records = {Path(record["image"]).name: record for record in read_jsonl(out)}
    failed = {name: record["error"] for name, record in records.items() if record["error"]}
    assert set(records) - set(failed) == readable
    reasons = {"line.png": "aspect ratio", "torn.jpg": "truncated", "bomb.png": "BombError", "broken.png": "identify"}
    assert failed.keys() == reasons.keys() and all(reasons[name] in failed[name] for name in failed)
    for coefficients, description in ((records[name]["coefficients"], records[name]["description"]) for name in readable):
        assert list(coefficients) == NAMES and list(description) == infer.FIELDS
        assert all(0 <= value <= 1 for value in coefficients.values())
    rows, charts = (tmp_path / "p.csv").read_text().splitlines()[1:], list((tmp_path / "charts").iterdir())
    assert len(rows) == len(charts) == len(readable)
    # They are turned upright, and 16 bits are scaled to 8.
    gray, gray16, photo, rotated = (np.asarray(infer.open_image(folder / name)).astype(int) for name in
                                    ("gray.png", "gray16.png", "UPPER.WEBP", "rotated.jpg"))
    assert np.abs(gray16 - gray).max() <= 1
    assert rotated.shape == photo.shape == (160, 240, 3) and np.abs(rotated - photo).mean() < 20

def test_chart_shows_strength_and_side():
    coefficients = {**ZEROS, "mouthSmileLeft": 0.8, "mouthSmileRight": 0.4, "jawOpen": 0.6}
    record = {"coefficients": coefficients, "std": ZEROS, "description": None}
    chart = np.asarray(infer.draw_chart(Image.new("RGB", (64, 64)), record))[70:]
    colors = [tuple(bytes.fromhex(color[1:])) for color in infer.COLORS.values()]
    widths = [(chart == color).all(axis=2).sum(axis=1).max() for color in colors]
    assert widths == pytest.approx([0.8 * 390, 0.4 * 390, 0.6 * 390], abs=4)

def test_shared_out_or_interrupted_inference_writes_the_same(trained, demo, tmp_path, monkeypatch):
    flags = [demo / "train.jsonl", "--model", trained, "--limit", 7, "--batch-size", 2, "--out"]
    whole, two, parts = (tmp_path / f"{name}.jsonl" for name in ("whole", "two", "parts"))
    run_main(infer, *flags, whole)
    subprocess.run([*TORCHRUN, ROOT / "infer.py", *map(str, flags), two], check=True)
    for one, other in zip(read_jsonl(whole), read_jsonl(two), strict=True):
        assert one["image"] == other["image"] and one["coefficients"] == pytest.approx(other["coefficients"], abs=2e-4)
    interrupted = Mock(wraps=infer.predict, side_effect=[DEFAULT] * 3 + [KeyboardInterrupt, DEFAULT])
    monkeypatch.setattr(infer, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_main(infer, *flags, parts)
    part = tmp_path / "parts.jsonl.0of1"
    settings, *records = read_jsonl(part)
    assert len(records) == 6
    with part.open("ab") as file:
        file.write('{"image": "torn é'.encode()[:-1])  # within a character
    run_main(infer, *flags, parts)
    assert interrupted.call_count == 5 and parts.read_text() == whole.read_text()  # the last batch was decoded again
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "two.jsonl", "parts.jsonl"}
    write_jsonl(part, [settings, *records])
    assert len(infer.read_finished(part, settings)) == 6
    assert infer.read_finished(part, {**settings, "trained": "anew"}) == {}

# ---- evaluate.py -----------------------------------------------------------------------------------
def test_metrics_equal_those_of_scipy_and_scikit_learn():
    """The expected values are what scipy 1.17.1 and scikit-learn 1.9.1 give for these arrays."""
    k = np.arange(40)
    true = np.stack([np.clip(np.sin(k * (c + 3)), 0, 1) for c in range(52)], axis=1)
    predicted = np.clip(0.8 * true + 0.1 * np.cos(k[:, None] * 7 + np.arange(52)) ** 2, 0, 1)
    expected = {"mae": 0.06865854089342599, "rmse": 0.08537527081535595, "f1": 0.979858464888405,
                "pearson_median": 0.9935772653815745, "pearson_mean": 0.991913109991661}
    left = [k for k, name in enumerate(NAMES) if name.endswith("Left") and name[:-4] not in ("jaw", "mouth")]
    right = [NAMES.index(NAMES[k].replace("Left", "Right")) for k in left]
    tilts = [values[:, left] - values[:, right] for values in (predicted, true)]
    expected["asymmetry"] = np.abs(tilts[0] - tilts[1]).mean()
    found = evaluate.metrics(predicted, true)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9) and len(left) == 18
    rank = evaluate.spearman(predicted.ravel(), np.abs(predicted - true).ravel())
    assert rank == pytest.approx(0.7199235313123631, abs=1e-9)
    # Worked examples. Ranks 1, 2.5, 2.5, 4 and 4, 3, 2, 1: covariance -4.5, variances 4.5 and 5 (each times 3).
    tied = evaluate.spearman(np.array([1, 2, 2, 5.0]), np.array([9, 7, 5, 3.0]))
    assert tied == pytest.approx(-4.5 / (4.5 * 5) ** 0.5)
    # Lin's CCC by hand, n = 4: covariance 0.015, variances 0.035 and 0.01 (each times n), equal means.
    x, y = np.array([[0.1, 0.2, 0.3, 0.6]]).T, np.array([[0.2, 0.2, 0.4, 0.4]]).T
    for shift, expected in ((0.0, 0.03 / 0.045), (0.1, 0.03 / 0.055)):
        assert evaluate.correlations(x + shift, y)[1][0] == pytest.approx(expected, abs=1e-9)
    rng, true = np.random.default_rng(0), np.zeros((1000, 52))  # errors as large as stated
    true[:, :10] = 0.5  # the others are not active: not counted
    std = rng.uniform(0.01, 0.1, true.shape)
    found = evaluate.uncertainty(std, true + std * rng.normal(size=true.shape), true)
    assert found["within_1_std"] == pytest.approx(0.68, abs=0.02) and found["spearman"] > 0.4
    assert found["within_2_std"] == pytest.approx(0.95, abs=0.02)
    # What never varies has no correlation, and a constant prediction of what varies has 0.
    r, _ = evaluate.correlations(np.hstack([x, 0 * x]), np.hstack([0 * x, x]))
    assert np.isnan(r[0]) and r[1] == 0.0

def test_intervals_cover_the_truth_and_resample_people():
    rng = np.random.default_rng(0)
    covered, widths = 0, np.zeros(2)  # of intervals over people and over images
    for trial in range(40):
        error = rng.normal(0, 0.1, (60, 1)).repeat(5, axis=0) * np.ones((1, 52))  # people err alike
        for k, group in enumerate((np.arange(300) // 5, np.arange(300))):
            low, high = evaluate.intervals({"a": error}, group.tolist(), trial)["intervals"]["a"]["rmse"]
            widths[k] += high - low
            covered += k == 0 and low <= 0.1 <= high
    assert covered >= 34 and widths[0] > 1.5 * widths[1]
    same = evaluate.intervals({"a": np.full((9, 52), 0.3), "b": np.full((9, 52), 0.1)}, list("abcdefghi"), 0)
    assert [*same["intervals"]["a"]["rmse"], *same["region_intervals"]["jaw"]] == pytest.approx([0.3] * 4)
    assert same["differences"]["b minus a"]["mae"] == pytest.approx([-0.2, -0.2])

def test_models_are_compared_in_pairs_by_field_and_on_a_rig(demo, tmp_path, capsys):
    records, rng = read_jsonl(demo / "val.jsonl"), np.random.default_rng(0)
    files = [tmp_path / "good.jsonl", tmp_path / "bad.jsonl"]
    for file, noise in zip(files, (0.02, 0.2)):
        noisy = np.clip(as_array(records) + noise * rng.normal(size=(len(records), 52)), 0, 1)
        write_jsonl(file, [{**record, "image": os.path.relpath(demo / record["image"], tmp_path), "error": None,
                            "coefficients": dict(zip(NAMES, row))} for record, row in zip(records, noisy.tolist())])
    (tmp_path / "rig").mkdir()
    for k, name in enumerate(["Neutral", *NAMES[:-1]]):  # a line of points in cm, shape k lifts point k by 1 cm
        points = [(0.0, -12.0 + j / 2, 1.0 * (j == k - 1)) for j in range(52)]
        short = re.sub("Left$", "_L", name) if name not in ("jawLeft", "mouthLeft") else name
        (tmp_path / "rig" / f"{short}.obj").write_text("".join(f"v {x} {y} {z}\n" for x, y, z in points))
    run_main(evaluate, *files, demo / "val.jsonl", "--by", "identity", "--rig", tmp_path / "rig",
             "--plot", tmp_path / "m.png", "--out", tmp_path / "m.json")
    results = json.loads((tmp_path / "m.json").read_text())
    low, high = results["differences"][f"{files[1]} minus {files[0]}"]["rmse"]
    assert 0.05 < low < high < 0.25 and "higher" in capsys.readouterr().out
    assert sum(values["images"] for values in results["by"].values()) == len(records)
    assert results["rig_unit"] == "cm" and Image.open(tmp_path / "m.png").size == (1800, 1180)
    good = results["models"][str(files[0])]  # every coefficient but tongueOut moves one of 52 points by 10 mm
    assert good["vertex_mm"] == pytest.approx(10 * good["mae"], rel=0.05)

@pytest.mark.filterwarnings("error")
def test_evaluate_compares_with_baselines_and_refuses_mismatches(demo, tmp_path, capsys):
    records, path = read_jsonl(demo / "val.jsonl"), tmp_path / "p.jsonl"
    (tmp_path / "linked").symlink_to(demo)
    perfect = [{**record, "image": f"linked/{record['image']}", "error": None} for record in records]
    perfect[0] |= {"error": "unreadable", "coefficients": None}
    unknown = {**perfect[0], "image": "unknown.png"}  # a failed picture needs no truth
    run_main(evaluate, write_jsonl(path, [*perfect, unknown]), demo / "val.jsonl", "--out", tmp_path / "new" / "m.json")
    results = json.loads((tmp_path / "new" / "m.json").read_text())
    assert results["models"][str(path)]["rmse"] == 0 and results["errors"] == 1
    assert set(results["description"].values()) == {1.0} and len(results["description"]) == 5
    errors = as_array(records[1:]) - as_array(read_jsonl(demo / "train.jsonl")).mean(axis=0)
    assert results["baselines"]["training mean"]["rmse"] == pytest.approx((errors ** 2).mean() ** 0.5)
    assert "1 without prediction" in capsys.readouterr().out
    assert_refused("ends in .png", evaluate, path, demo / "val.jsonl", "--plot", tmp_path / "m.txt")
    for change, message in ((perfect[1:], "1 pictures have no prediction"), (perfect + perfect[:1], "second record"),
                            (perfect + [{**perfect[1], "image": "x.png"}], "1 predictions have no truth")):
        assert_refused(message, evaluate, write_jsonl(path, change), demo / "val.jsonl")

# ---- Bad input: one sentence, never a traceback ----------------------------------------------------
@pytest.mark.parametrize("change, message", [
    *((line, "") for line in ("", '{"image": ', "[1]", "null")), ({"jawOpen": 0.5}, "52 ARKit"), ([0.5], "52"),
    *(({**ZEROS, "jawOpen": value}, "jawOpen") for value in (float("nan"), "0.5", True, 7.0)),
    ({**ZEROS, "jawDrop" * 999: 0.5}, "52 ARKit")])
def test_bad_records_are_named(change, message, tmp_path):
    path, record = tmp_path / "bad.jsonl", {"image": "x.png", "coefficients": change, "error": None}
    path.write_text(change if isinstance(change, str) else json.dumps(record))
    for module, *flags in ((annotate, path, "--out", tmp_path / "o.jsonl"), (evaluate, path, path),
                           (distill, "--data", path, "--out", tmp_path / "run")):
        with pytest.raises(SystemExit, match=re.escape(str(path))) as error:
            run_main(module, *flags)
        assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600
    assert not (tmp_path / "o.jsonl").exists() and not (tmp_path / "run").exists()

@pytest.mark.parametrize("module, flags, message", [
    (annotate, ["missing.jsonl"], "missing.jsonl"), (annotate, ["README.md"], "README.md, line 1"),
    (annotate, ["--demo", 5], "--demo 5"), (annotate, ["--every", 0], "--every 0"),
    (distill, ["--data", "missing.jsonl", "--out", "new"], "missing.jsonl does not exist"), (distill, ["--lr", 0], "--lr 0"),
    (distill, ["--device", "cuda"], "no GPU"), (distill, ["--resume", "--out", "nowhere"], "--resume"),
    (distill, ["--batch-size", 0], "--batch-size 0"), (distill, ["--lora-rank", -1], "--lora-rank -1"),
    (infer, [".ci"], "no picture exists"), (infer, ["missing.png"], "missing.png"), (infer, ["--device", "cuda"], "no GPU"),
    (infer, ["--batch-size", 0], "--batch-size 0"), (infer, ["README.md", "--model", "nowhere"], "python distill.py"),
    (infer, ["README.md", "missing.jsonl"], "missing.jsonl"), (infer, ["a.jsonl", "--out", "a.jsonl"], "is an INPUT"),
    (distill, ["--lora-rank", 8], "pretrained"), (evaluate, ["missing.jsonl"], "missing.jsonl does not exist")])
def test_bad_flags_are_explained(module, flags, message, demo, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if module is distill and "--data" not in flags:
        flags = ["--out", demo / "unused", *flags, "--data", demo / "train.jsonl"]
    with pytest.raises(SystemExit) as error:
        run_main(module, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)

@pytest.mark.parametrize("change, message", [
    (lambda lines: [line.replace(",", ";") for line in lines], "header that was found, .*Timecode;BlendshapeCount"),
    (lambda lines: lines[1:], "header that was found, .*00:00:00:00.000"),
    (lambda lines: [*lines[:3], lines[3][:80]], "line 4: column EyeSquintLeft holds '', which is no number"),
    (lambda lines: [*lines[:2], lines[2].replace(",0.0000000000", ",", 1)], "line 3: column EyeBlinkLeft holds ''"),
    (lambda lines: [lines[0], lines[1].replace(",0.0", ",x", 1)], "line 2: column EyeBlinkLeft holds 'x"),
    (lambda lines: [lines[0], lines[1].replace(",0.0", ",7.0", 1)], "line 2: EyeBlinkLeft is 7.0|line 2: eyeBlinkLeft is 7.0"),
    (lambda lines: lines[:1], "no usable record"),
    (lambda lines: [lines[0].replace("JawOpen", "Jaw"), *lines[1:]], "jawOpen missing or unknown")])
def test_bad_takes_are_explained(change, message, tmp_path):
    take = make_take(tmp_path, 3)
    take.write_text("\n".join(change(take.read_text().splitlines())))
    assert_refused(message, annotate, take)

@pytest.mark.parametrize("value, message", [
    ({"facsNames": [], "weightMat": []}, 'result 1: .*facsNames, weightMat.*one line of {"image"'),
    ([1, 2], "result 1"), ({"faceBlendshapes": [[{"score": 1}]]}, "categoryName")])
def test_json_of_another_kind_gets_the_way_out(value, message, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps(value))
    assert_refused(message, annotate, tmp_path / "other.json")

def test_frames_that_do_not_fit_are_counted(demo, tmp_path):
    take = make_take(tmp_path, 3)
    assert_refused("nowhere", annotate, take, "--frames", tmp_path / "nowhere")
    assert_refused("holds 240 pictures for the 3 rows", annotate, take, "--frames", demo / "images")
    assert_refused("belongs to one INPUT", annotate, take, take, "--frames", demo / "images")

def test_fuzzed_files_give_no_traceback(demo, tmp_path):
    rng, lines = np.random.default_rng(0), make_take(tmp_path, 3).read_bytes()
    mediapipe = {"faceBlendshapes": [{"categories": [{"categoryName": name, "score": 0.1} for name in NAMES]}]}
    good = {".jsonl": (demo / "val.jsonl").read_bytes().split(b"\n")[0], ".csv": lines,
            ".json": json.dumps([mediapipe]).encode()}
    pieces = b'null [] {} \x00 \xff " , 1e999 NaN \\ud800 \n true -1'.split(b" ") + [b"[" * 2000, b"9" * 5000]
    for case in range(300):
        path = tmp_path / f"fuzzed{list(good)[case % 3]}"
        data = bytearray(good[path.suffix])
        for _ in range(rng.integers(1, 4)):
            start, length = rng.integers(0, len(data)), rng.integers(0, 12)
            data[start:start + length] = pieces[rng.integers(len(pieces))] if rng.random() < 0.7 else rng.bytes(3)
        path.write_bytes(data)
        try:
            run_main(annotate, path, "--out", tmp_path / "out.jsonl")
        except SystemExit as error:
            assert "fuzzed" in str(error) and len(str(error)) < 600, error
        else:
            for record in read_jsonl(tmp_path / "out.jsonl"):
                assert_words_fit(record["coefficients"], record["description"])

def test_unusable_pictures_and_run_folders_are_explained(trained, demo, tmp_path):
    record = {**read_jsonl(demo / "train.jsonl")[0], "image": str(demo / "images" / "000000.png")}
    (tmp_path / "broken.png").write_bytes(b"rubbish")
    for change, message in (({"image": None}, "image"), ({"image": "gone.png"}, "gone.png"),
                            ({"image": "broken.png"}, "broken.png"), ({"description": None}, "description")):
        path = write_jsonl(tmp_path / "changed.jsonl", [{**record, **change}])
        assert_refused(message, distill, "--data", path, "--out", tmp_path / "new")
    assert_refused("holds a finished run", distill, "--data", demo / "train.jsonl", "--out", trained)
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:50_000])
    for settings in ((tmp_path / "run.json").read_text(), "{}"):
        (tmp_path / "run.json").write_text(settings)
        assert_refused("cannot be read", infer, demo / "val.jsonl", "--model", tmp_path, "--out", tmp_path / "p.jsonl")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert_refused("is a bert", distill, "--data", demo / "train.jsonl", "--model", tmp_path, "--out", tmp_path / "new")
