"""Tests of the four stages: CPU, no network. Run with: pytest test_all.py"""
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: a GPU computes other last digits

import inspect
import json
import math
import re
import runpy
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
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
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
    with pytest.raises(SystemExit, match=message) as error:
        run_main(module, *args)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600

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

@pytest.fixture
def record(demo) -> dict:
    """A record of the demo that can stand in any file."""
    return {**read_jsonl(demo / "train.jsonl")[0], "image": str(demo / "images" / "000000.png")}

def learn_by_heart(demo: Path, out: Path, supervision: str) -> Path:
    """Overfits the tiny model to eight faces."""
    run_main(distill, "--data", demo / "train.jsonl", "--limit", 8, "--batch-size", 4, "--steps", 150,
             "--supervision", supervision, "--no-corrupt", "--out", out)
    return out

@pytest.fixture(scope="session")
def trained(demo, tmp_path_factory) -> Path:
    return learn_by_heart(demo, tmp_path_factory.mktemp("run") / "out", "semantic")

# ---- The house: copies, README ---------------------------------------------------------------------------------------
def test_copied_pieces_are_identical():
    sources = [(ROOT / f"{name}.py").read_text() for name in SCRIPTS]
    assert len({re.search(r"# The 52 names.*?\n\]", source, re.S).group() for source in sources}) == 1
    for one, other, name in ((distill, infer, "open_image"), (distill, infer, "prompt_text"), (annotate, infer, "list_pictures"),
                             (annotate, infer, "whole_lines"), (distill, evaluate, "check_coefficients")):
        assert inspect.getsource(getattr(one, name)) == inspect.getsource(getattr(other, name))
    for name in ("FIELDS", "VALUES", "PARTS", "IMAGE_FORMATS"):
        assert getattr(distill, name) == getattr(infer, name)
    for supervision in distill.PARTS:
        assert distill.answer_skeleton(supervision) == infer.answer_skeleton(supervision)
    assert annotate.FIELDS == infer.FIELDS and annotate.PICTURES == infer.PICTURES
    assert annotate.ACTIVE == evaluate.ACTIVE == 0.15 and len(set(NAMES)) == 52

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

# ---- annotate.py: the words ------------------------------------------------------------------------------------------
# What the words mean, spelled here once more: subject and verb, and whose muscle it is.
SINGLE = {
    "inner brows raised": "browInnerUp", "cheeks puffed": "cheekPuff", "lips funneled": "mouthFunnel",
    "lips puckered": "mouthPucker", "lips closed over the jaw": "mouthClose", "upper lip rolled in": "mouthRollUpper",
    "lower lip rolled in": "mouthRollLower", "upper lip pushed up": "mouthShrugUpper",
    "lower lip pushed up": "mouthShrugLower", "mouth shifted left": "mouthLeft", "mouth shifted right": "mouthRight",
    "jaw opened": "jawOpen", "jaw pushed forward": "jawForward", "jaw shifted left": "jawLeft",
    "jaw shifted right": "jawRight", "tongue put out": "tongueOut"}
SIDED = {
    "outer brow raised": "browOuterUp", "brow lowered": "browDown", "eye closed": "eyeBlink", "eye widened": "eyeWide",
    "eye squinted": "eyeSquint", "eye looking up": "eyeLookUp", "eye looking down": "eyeLookDown",
    "nostril pulled up": "noseSneer", "cheek raised": "cheekSquint", "lip corner raised": "mouthSmile",
    "lip corner lowered": "mouthFrown", "lip corner tucked in": "mouthDimple", "lip corner stretched": "mouthStretch",
    "lip side pressed": "mouthPress", "upper lip side raised": "mouthUpperUp", "lower lip side lowered": "mouthLowerDown"}
PAIRED = {words: (stem + "Left", stem + "Right") for words, stem in SIDED.items()}
# The left eye looks to the left by turning out, away from the nose, the right eye by turning in.
PAIRED |= {"eye looking left": ("eyeLookOutLeft", "eyeLookInRight"),
           "eye looking right": ("eyeLookInLeft", "eyeLookOutRight")}
SIGNS = {  # at least one of these moves where an emotion is named
    "happiness": ("mouthSmile", "cheekSquint"), "sadness": ("browInnerUp", "browDown", "mouthFrown"),
    "surprise": ("browInnerUp", "browOuterUp", "eyeWide", "jawOpen"),
    "fear": ("browInnerUp", "browOuterUp", "browDown", "eyeWide", "eyeSquint", "mouthStretch", "jawOpen"),
    "anger": ("browDown", "eyeWide", "eyeSquint", "mouthPress"),
    "disgust": ("noseSneer", "mouthUpperUp", "mouthFrown"), "contempt": ("mouthSmile", "mouthDimple")}
STRENGTHS = ["at rest", "slightly", "moderately", "strongly"]

def strength(value: float) -> int:
    return 0 if value < 0.15 else 1 if value < 0.4 else 2 if value < 0.7 else 3

def read_movements(text: str) -> dict:
    """{ARKit name: strength} of what a description says."""
    said = {}
    for sentence in re.findall(r"[A-Z][a-z]+: (.+?)\.(?: |$)", text):
        for phrase in sentence.split(", "):
            pattern = r"(?:(left|right|both) )?(.+) (slightly|moderately|strongly) (.+)"
            side, subject, adverb, verb = re.fullmatch(pattern, phrase).groups()
            if side == "both":
                names = PAIRED[f"{subject[:-1]} {verb}"]
            else:
                names = [SINGLE[f"{subject} {verb}"] if side is None else PAIRED[f"{subject} {verb}"][side == "right"]]
            assert not said.keys() & set(names), f"{phrase} is said twice"
            said |= dict.fromkeys(names, STRENGTHS.index(adverb))
    return said

def assert_words_fit(face: dict, words: dict) -> None:
    """Every field of a description against the numbers, with no table of annotate.py."""
    true = {name: strength(value) for name, value in face.items()}
    moving = {name: level for name, level in true.items() if level}
    assert read_movements(words["muscle_movements"]) == moving
    assert moving or words["muscle_movements"] == "No visible movement."

    emotional = {name: level for name, level in moving.items() if not name.startswith(("eyeLook", "eyeBlink"))}
    degree, category = re.fullmatch("(slight |strong |)(.+)", words["expression_category"]).groups()
    assert (category == "neutral") == (not emotional)
    emotions = category.split(" mixed with ")
    if category in ("neutral", "movement without a clear emotion"):
        assert words["emotional_implication"] == "not clearly observable"
    else:
        levels = [level for name, level in emotional.items() if name.startswith(SIGNS[emotions[0]])]
        assert all(any(name.startswith(SIGNS[emotion]) for name in emotional) for emotion in emotions)
        assert len(emotions) == 2 or degree == ["", "slight ", "", "strong "][max(levels)]
        corners = [side for side in ("Left", "Right") if true["mouthSmile" + side] or true["mouthDimple" + side]]
        assert "contempt" not in emotions or len(corners) == 1

    sides, said = {}, {}  # of each region: on which side some pair is stronger
    for left, right in PAIRED.values():
        if true[left] != true[right] and not left.startswith("eyeLook"):
            region = {"br": "brows", "ey": "eyes", "no": "nose", "ch": "cheeks", "mo": "mouth"}[left[:2]]
            sides.setdefault(region, set()).add("left" if true[left] > true[right] else "right")
    for part in re.split(", |; ", words["symmetry"]) if words["symmetry"] != "symmetric" else []:
        match = re.fullmatch(r"(?:stronger on the )?(left|right) (\w+)|(?:mixed in the )?(\w+)", part)
        said[match[2] or match[3]] = {match[1]} if match[1] else {"left", "right"}
    assert said == sides

def random_faces(count: int, seed: int = 0):
    """Sparse and dense faces, many values at or beside the borders 0.15, 0.4 and 0.7, pairs that move nearly alike."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        values = rng.uniform(0, 1, 52) * (rng.random(52) < (0.1, 0.3, 1.0)[index % 3])
        border = rng.choice([0.15, 0.4, 0.7], 52) + rng.choice([-0.01, -1e-9, 0, 0.01], 52)
        face = dict(zip(NAMES, np.where(rng.random(52) < (0.0, 0.1, 0.5)[index % 3], border, values).tolist()))
        for left, right in PAIRED.values() if index % 2 else []:
            face[right] = min(max(0.0, face[left] + rng.choice([0, 0.02, -0.02])), 1.0)
        yield face

def test_words_never_contradict_the_numbers():
    drawn = [annotate.sample_expression(np.random.default_rng(index)) for index in range(500)]
    for face in [*random_faces(3000), *drawn]:
        words = annotate.describe(face)
        assert_words_fit(face, words)
        assert not any(map(annotate.LOOP.search, words.values()))

def test_words_follow_from_the_bands_alone():
    for face in random_faces(300, seed=1):
        same_bands = {name: [0.07, 0.3, 0.5, 0.9][strength(value)] for name, value in face.items()}
        assert annotate.describe(face) == annotate.describe(same_bands)

@pytest.mark.parametrize("emotion", SIGNS)
def test_emotions_are_named_for_their_signs(emotion):
    sides = ("Left",) if emotion == "contempt" else ("Left", "Right", "")
    face = ZEROS | {stem + side: 0.9 for stem in SIGNS[emotion] for side in sides if stem + side in NAMES}
    assert emotion in annotate.describe(face)["expression_category"]

@pytest.mark.parametrize("face, expected", [
    ({}, ["neutral", "No visible movement.", "not clearly observable", "symmetric"]),
    ({"mouthSmileLeft": 0.14, "mouthSmileRight": 0.16}, [
        "contempt mixed with happiness", "Mouth: right lip corner slightly raised.",
        "disdain or smugness, with joy or amusement", "stronger on the right mouth"]),
    ({"mouthSmileLeft": 0.14, "mouthSmileRight": 0.14, "cheekSquintLeft": 0.14, "cheekSquintRight": 0.14, "tongueOut": 0.15},
     ["movement without a clear emotion", "Tongue: tongue slightly put out.", "not clearly observable", "symmetric"]),
    ({"mouthSmileLeft": 0.39, "mouthSmileRight": 0.41, "cheekSquintLeft": 0.5, "cheekSquintRight": 0.5}, [
        "happiness", "Cheeks: both cheeks moderately raised. Mouth: left lip corner slightly raised, right lip corner "
        "moderately raised.", "joy or amusement", "stronger on the right mouth"]),
    ({"eyeLookOutLeft": 0.5, "eyeLookInRight": 0.5}, [
        "neutral", "Eyes: both eyes moderately looking left.", "not clearly observable", "symmetric"]),
    ({"mouthPressLeft": 0.9, "mouthDimpleRight": 0.2, "browDownLeft": 0.8}, [
        "strong anger", "Brows: left brow strongly lowered. Mouth: right lip corner slightly tucked in, left lip side "
        "strongly pressed.", "irritation or determination", "stronger on the left brows; mixed in the mouth"])])
def test_description_of_known_faces(face, expected):
    assert list(annotate.describe({**ZEROS, **face}).values()) == expected

@pytest.mark.parametrize("both", [{"mouthDimple": 0.8}, {"mouthSmile": 0.7, "mouthDimple": 0.7}])
def test_contempt_is_one_sided(both):
    left, right = ({stem + side: value for stem, value in both.items()} for side in ("Left", "Right"))
    assert "contempt" not in annotate.describe({**ZEROS, **left, **right})["expression_category"]
    for side in (left, right):
        assert annotate.describe({**ZEROS, **side})["expression_category"] == "strong contempt"

# ---- annotate.py: drawings and files ---------------------------------------------------------------------------------
def read_input(path, *flags) -> tuple[list, Counter]:
    counts = Counter()
    return list(annotate.read_records(Path(path), annotate.parse_args([*map(str, flags)]), counts)), +counts

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

def test_demo_is_reproducible_and_rendered_alike(demo, tmp_path):
    run_main(annotate, "--demo", 240, "--out", tmp_path)
    for file in sorted(demo.rglob("*.*")):
        assert file.read_bytes() == (tmp_path / file.relative_to(demo)).read_bytes()
    run_main(annotate, demo / "val.jsonl", "--render", "--out", tmp_path / "again")
    for again, record in zip(read_jsonl(tmp_path / "again" / "records.jsonl"), read_jsonl(demo / "val.jsonl"), strict=True):
        assert (tmp_path / "again" / again["image"]).read_bytes() == (demo / record["image"]).read_bytes()

def test_every_stage_finds_pictures_behind_a_link(trained, tmp_path, monkeypatch):
    """The folder of the demo lies on another disk, from where ".." does not lead back."""
    for folder in ("work", "disk/large/data"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    Path("data").symlink_to(tmp_path / "disk" / "large" / "data")
    run_main(annotate, "--demo", 240, "--out", "data/demo")
    run_main(annotate, "data/demo/val.jsonl", "--out", "data/again.jsonl")
    run_main(infer, "data/again.jsonl", "--limit", 2, "--model", trained, "--out", "p.jsonl")
    assert [record["error"] for record in read_jsonl(Path("p.jsonl"))] == [None, None]
    for path in map(Path, ("data/demo/val.jsonl", "data/demo/shift.jsonl", "data/again.jsonl")):
        assert all(record["image"].startswith(("images", "demo/images")) for record in read_jsonl(path))

def test_demo_splits_by_identity_and_shifts_in_style_only(demo, tmp_path):
    run_main(annotate, "--demo", 250, "--limit", 4, "--out", tmp_path, "--seed", 1)  # half a person more, --limit or not
    train, val, shift, *others = (read_jsonl(folder / f"{name}.jsonl") for folder, name in (
        (demo, "train"), (demo, "val"), (demo, "shift"), (tmp_path, "train"), (tmp_path, "val")))
    assert list(map(len, (train, val, *others))) == [220, 20, 220, 30]
    people = [{record["identity"] for record in part} for part in (train, val, *others)]
    assert all(people) and len(set.union(*people)) == sum(map(len, people)) == 12 + 13
    assert [{**record, "image": ""} for record in val] == [{**record, "image": ""} for record in shift]
    pictures = [np.array(Image.open(demo / records[0]["image"]), dtype=float) for records in (val, shift)]
    assert np.abs(pictures[0] - pictures[1]).mean() > 20

def test_livelink_take_gives_back_what_was_written(demo, tmp_path):
    records = [{**record, "error": None} for record in read_jsonl(demo / "val.jsonl")]
    infer.write_livelink(tmp_path / "take.csv", records, fps=60)
    expected = [pytest.approx(record["coefficients"], abs=1e-6) for record in records]
    assert [record["coefficients"] for record in read_input(tmp_path / "take.csv")[0]] == expected

def test_takes_are_read_by_column_name(tmp_path):
    face = {name: round(k / 100, 2) for k, name in enumerate(NAMES)}
    columns = ["Extra", *[name[0].upper() + name[1:] for name in reversed(NAMES)], "Timecode"]
    rows = [columns, ["x", *[str(face[name]) for name in reversed(NAMES)], "00:00:00:00.000"], []]
    text = "\r\n".join(map(",".join, rows))
    (tmp_path / "take.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())  # byte order mark, CRLF, a blank line
    assert read_input(tmp_path / "take.csv") == ([{"image": None, "coefficients": face, "identity": "take"}], {})

def test_rows_without_values_are_left_out_and_counted_and_keep_their_frame(tmp_path, capsys):
    take = make_take(tmp_path, 4)
    lines = take.read_text().splitlines()
    lines[2] = "00:00:00:01.000,0" + "," * 61
    take.write_text("\n".join(lines + ["00:00:00:04.000,0"]))
    records, counts = read_input(take, "--frames", make_frames(tmp_path, "frame{}.png", range(1, 6)))
    assert [Path(record["image"]).name for record in records] == ["frame1.png", "frame3.png", "frame4.png"]
    assert [record["coefficients"]["jawOpen"] for record in records] == pytest.approx([0.0, 0.2, 0.3])
    assert counts == {"without a face, values or a prediction, left out": 2}
    run_main(annotate, take)
    assert "2 without a face, values or a prediction, left out" in capsys.readouterr().out

def test_frames_are_paired_in_the_order_a_person_counts(tmp_path):
    frames = make_frames(tmp_path, "Frame{}.png", [12, 11, 10, 9, 8, 6, 5, 4, 3, 2, 1])
    Image.new("RGB", (8, 8)).save(frames / "frame7.JPG")
    for name in ("._Frame1.png", ".DS_Store", "notes.txt"):
        (frames / name).write_bytes(b"no picture")
    take = tmp_path / "take.csv"
    rows = [{"coefficients": {**ZEROS, "jawOpen": k / 12}, "error": None} for k in range(12)]
    infer.write_livelink(take, rows, fps=30)
    records, _ = read_input(take, "--frames", frames)
    assert [int(re.search(r"\d+", Path(record["image"]).name)[0]) for record in records] == list(range(1, 13))
    assert [record["coefficients"]["jawOpen"] for record in records] == pytest.approx([k / 12 for k in range(12)])

def test_every_nth_row_keeps_its_frame(tmp_path):
    records, _ = read_input(make_take(tmp_path, 7), "--frames", make_frames(tmp_path, "{}.png", range(7)), "--every", 3)
    assert [Path(record["image"]).stem for record in records] == ["0", "3", "6"]
    assert [record["coefficients"]["jawOpen"] for record in records] == pytest.approx([0.0, 0.3, 0.6])

@pytest.mark.parametrize("form", ["javascript", "python", "bare", "many"])
def test_mediapipe_s_results_are_read(form, tmp_path):
    values = {name: round(k / 100, 2) for k, name in enumerate(NAMES) if name != "tongueOut"}
    keys = ("category_name", "score") if form == "python" else ("categoryName", "score")
    face = [dict(zip(keys, item)) for item in {"_neutral": 0.9, **values}.items()]
    results = {"javascript": {"faceBlendshapes": [{"categories": face}]}, "python": {"face_blendshapes": [face]},
               "bare": [face, []], "many": [{"faceBlendshapes": [{"categories": face}]}, {"faceBlendshapes": []}]}
    (tmp_path / "anna.json").write_text("\ufeff" + json.dumps(results[form]), encoding="utf-8")
    records, counts = read_input(tmp_path / "anna.json")
    assert records == [{"image": None, "coefficients": {**values, "tongueOut": 0.0}, "identity": "anna"}]
    assert counts["records without tongueOut, set to 0"] == 1
    assert counts["without a face, values or a prediction, left out"] == (form in ("bare", "many"))

@pytest.mark.parametrize("spell", [
    lambda name: re.sub("(?<!jaw)(?<!mouth)(Left|Right)$", lambda side: "_" + side[0][0], name),
    lambda name: name[0].upper() + name[1:]])
def test_records_with_other_spellings_are_read_and_keep_their_other_fields(spell, tmp_path):
    values = {name: round(k / 100, 2) for k, name in enumerate(NAMES)}
    path = write_jsonl(tmp_path / "a.jsonl", [{"coefficients": {spell(name): x for name, x in values.items()}, "age": 7}])
    assert read_input(path)[0] == [{"image": None, "coefficients": values, "age": 7}]

def test_clipping_is_reported_from_a_hundredth_on():
    counts = Counter()
    given = {**ZEROS, "eyeLookInLeft": 1.053, "jawOpen": 1.0005, "mouthLeft": -0.009, "mouthRight": -0.02}
    values = annotate.standardize(given, counts)
    assert (values["eyeLookInLeft"], values["jawOpen"], values["mouthLeft"], values["mouthRight"]) == (1, 1, 0, 0)
    assert counts == {"values clipped by 0.01 or more": 2}

def test_records_stand_beside_their_input(tmp_path):
    (tmp_path / "sub").mkdir()
    run_main(annotate, make_take(tmp_path, 2), make_take(tmp_path / "sub", 1))
    assert len(read_jsonl(tmp_path / "take.annotated.jsonl")) == 3

def test_identity_is_who_is_seen_in_all_inputs(demo, tmp_path):
    for flags, expected in ((["--identity", "anna"], {"anna"}), ([], {"take", "id011"})):
        run_main(annotate, make_take(tmp_path, 2), demo / "val.jsonl", *flags, "--out", tmp_path / "o.jsonl")
        assert {record["identity"] for record in read_jsonl(tmp_path / "o.jsonl")} == expected

def test_lines_end_at_newlines_and_images_are_relative_to_the_records(demo, tmp_path):
    record = read_jsonl(demo / "train.jsonl")[0]
    record |= {"image": str(demo / record["image"]), "identity": "a\u2028b\x85c"}  # which str.splitlines cuts
    path, out = tmp_path / "labels.jsonl", tmp_path / "sub" / "o.jsonl"
    path.write_text(f"\ufeff{json.dumps(record, ensure_ascii=False)}\n\n  \n", encoding="utf-8")  # a mark, blank lines
    run_main(annotate, path, "--out", out)
    written = json.loads(out.read_text())
    assert written["identity"] == record["identity"] and not os.path.isabs(written["image"])
    assert len(distill.read_records(out, "numeric", None)) == len(evaluate.read_records(out)) == 1
    assert infer.list_images([str(out)])[0].is_file()

@pytest.mark.parametrize("flags", [["--out", "sub/../a.jsonl"], ["--out", "link.jsonl"], ["--out", "sub"], ["--render", "--out", "."]])
def test_nothing_that_was_read_is_overwritten(flags, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sub", "images"):
        (tmp_path / name).mkdir()
    record = read_jsonl(demo / "val.jsonl")[0]
    (tmp_path / "images" / "000000.png").write_bytes((demo / record["image"]).read_bytes())
    path = write_jsonl(tmp_path / "a.jsonl", [{**record, "image": "images/000000.png"}])
    (tmp_path / "link.jsonl").symlink_to(path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    assert_refused("would be overwritten", annotate, "a.jsonl", *flags)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before

# ---- annotate.py: the frozen language model --------------------------------------------------------------------------
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
    tokenizer.chat_template = "{{ messages[0]['content'] }}Answer:"
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

def test_the_prompt_s_example_is_valid_for_its_own_face_only():
    assert annotate.is_valid(annotate.EXAMPLE_WORDS, annotate.EXAMPLE)
    assert not annotate.is_valid(annotate.EXAMPLE_WORDS, ZEROS)
    assert "mouthSmileLeft 0.62, mouthSmileRight 0.58, cheekSquintRight 0.21" in annotate.LLM_PROMPT

def test_the_model_is_told_not_to_think():
    model, tokenizer = Mock(device="cpu"), byte_tokenizer()
    tokenizer.chat_template = "{% if enable_thinking | default(true) %}think {% endif %}{{ messages[0]['content'] }}"
    model.generate.side_effect = lambda input_ids, **_: input_ids
    annotate.ask_llm(model, tokenizer, [ZEROS])
    text = tokenizer.decode(model.generate.call_args_list[0].kwargs["input_ids"][0])
    assert text.startswith("You are an expert") and text.endswith('none, the face is at rest\n{"expression_category": "')

def test_an_llm_that_does_not_fit_is_named(demo, tmp_path, monkeypatch):
    argv = ["annotate.py", demo / "val.jsonl", "--limit", 2, "--llm", make_llm(tmp_path / "llm"), "--out", tmp_path / "o.jsonl"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    monkeypatch.setattr(LlamaForCausalLM, "generate", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried")))
    with pytest.raises(SystemExit, match="lower --batch-size, then --resume"):
        runpy.run_path(str(ROOT / "annotate.py"), run_name="__main__")
    monkeypatch.setattr(LlamaForCausalLM, "to", Mock(side_effect=AssertionError("Torch not compiled with CUDA enabled")))
    assert_refused("cannot be loaded: Torch not compiled", annotate, *argv[1:])

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

# ---- distill.py ------------------------------------------------------------------------------------------------------
def make_qwen(folder: Path, kind: str = "qwen3_vl", seed: int = 0) -> Path:
    """An untrained Qwen-VL saved as on the hub. Its tokenizer splits numbers into digits."""
    tokenizer, patch = byte_tokenizer(), 16 if kind == "qwen3_vl" else 14
    ids = {f"{name.removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
    text = {**sizes, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}
    vision = {**sizes, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "patch_size": patch, "window_size": 56,
              "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1]}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **ids)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2).save_pretrained(folder)
    (folder / "prompt.txt").write_text("You read faces.\n---\nRead.\n")
    return folder

def load_qwen(folder: Path) -> infer.Predictor:
    return infer.load(folder, prompt_file=folder / "prompt.txt")

def make_dataset(demo: Path, supervision: str, folder: Path = None):
    """The tiny model, or that of a folder, and the first eight records."""
    records = distill.read_records(demo / "train.jsonl", supervision, 8)
    torch.manual_seed(0)
    parts = distill.build_tiny(records)
    if folder:
        predictor = load_qwen(folder)
        parts = predictor.model, predictor.tokenizer, predictor.image_processor
    return parts[0], distill.FaceDataset(records, *parts[1:], supervision, 64 * 64)

@pytest.mark.parametrize("supervision", ["semantic", "numeric", "numbers-first"])
def test_exactly_the_answer_and_its_end_are_supervised(demo, supervision):
    _, dataset = make_dataset(demo, supervision)
    batch, decode = dataset.batch(range(3)), dataset.tokenizer.decode
    for row, record in enumerate(dataset.records[:3]):
        ids, labels, types = (batch[name][row] for name in ("input_ids", "labels", "slot_types"))
        rounded = {name: float(f"{value:.1f}") for name, value in record["coefficients"].items()}
        whole = {"analysis": record["description"], "arkit": rounded}
        answer = json.dumps({part: whole[part] for part in distill.PARTS[supervision]}) + "<|im_end|>"
        kept = labels != -100
        assert decode(labels[kept]) == answer and (labels[kept] == ids[kept]).all()
        assert decode(ids).replace("<|endoftext|>", "") == distill.prompt_text(distill.PROMPT, 16) + answer
        assert decode(ids[types == distill.NUMBER]) == "".join(map(str, rounded.values()))
        words = "" if supervision == "numeric" else "".join(record["description"].values())
        assert decode(ids[types == distill.TEXT]) == words
        assert batch["coefficients"][row].tolist() == pytest.approx(list(record["coefficients"].values()))

def test_any_text_encodes_and_minus_zero_is_zero(demo):
    _, dataset = make_dataset(demo, "numeric")
    unseen = "naïve 😀 \"unseen\" 0.35\n{"
    assert dataset.tokenizer.decode(dataset.encode(unseen)) == unseen
    dataset.records[0]["coefficients"] |= {"jawOpen": -0.0, "mouthLeft": 0.04, "mouthRight": 0.951}
    text = dataset.tokenizer.decode(dataset[0]["input_ids"])
    assert '"jawOpen": 0.0,' in text and '"mouthLeft": 0.0,' in text and '"mouthRight": 1.0,' in text

def library_inputs(model, batch):
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "image_grid_thw")}
    return {**inputs, "mm_token_type_ids": (batch["input_ids"] == model.config.image_token_id).long()}

@pytest.mark.parametrize("digits_are_split", [False, True])
def test_loss_equals_the_library_s(digits_are_split, demo, tmp_path, monkeypatch):
    model, dataset = make_dataset(demo, "semantic", make_qwen(tmp_path / "hub") if digits_are_split else None)
    dataset.records[0]["coefficients"] |= {"jawOpen": 1.0, "mouthPucker": 0.97}
    batch = dataset.batch(range(4))
    nats, squared = distill.answer_loss(model, batch, torch.tensor(dataset.value_ids))
    inputs = {**library_inputs(model, batch), "labels": batch["labels"]}
    real = torch.tensor([len(dataset[index]["input_ids"]) for index in range(4)])
    inputs["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < real[:, None]).long()
    output = model(**inputs)
    assert (nats / (batch["labels"] != -100).sum()).item() == pytest.approx(output.loss.item(), abs=1e-5)
    expected = 0.0  # the expected value of each number, written out one by one
    options = [dataset.encode(f"{k / 10:.1f}")[-1] for k in range(11)][:10 if digits_are_split else 11]
    for row, record in enumerate(dataset.records[:4]):
        positions = (batch["slot_types"][row] == distill.NUMBER).nonzero().view(52, -1)[:, -1]
        for position, true in zip(positions, record["coefficients"].values()):
            shares = output.logits[row, position - 1, options].softmax(dim=0).tolist()
            mean = sum(share * k / 10 for k, share in enumerate(shares))
            if not digits_are_split or true < 0.95:  # "1.0" is left to cross-entropy
                expected += (mean - true) ** 2
    assert squared.item() == pytest.approx(expected, rel=1e-4)
    assert distill.answer_loss(model, batch)[1] == 0.0  # not computed at weight 0
    monkeypatch.setattr(distill, "LOSS_LOGITS", 10 * len(dataset.tokenizer))  # in parts of ten tokens
    parts, _ = distill.answer_loss(model, batch)
    assert parts.item() == pytest.approx(nats.item(), rel=1e-5)
    parts.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0

def corrupted(demo, monkeypatch, index: int, hidden: list) -> tuple:
    """A batch, the same corrupted by the likeliest words, in a run of 2000 batches, and the model."""
    model, dataset = make_dataset(demo, "semantic")
    batch, args = dataset.batch(range(8)), distill.parse_args(["--steps", "1000", "--grad-accum", "2"])
    vars(args).update(rank=0, world_size=1, device="cpu")
    monkeypatch.setattr(distill, "HIDDEN", torch.tensor(hidden))
    monkeypatch.setattr(distill, "TEMPERATURE", 1e-4)
    return batch, distill.corrupt(model, batch, index, dataset.tokenizer.pad_token_id, args), model

@pytest.mark.parametrize("index, expected", [(0, [0.3, 0.8]), (1000, [0.2, 0.5]), (1998, [0.1, 0.2])])
def test_tokens_are_hidden_by_their_type_ever_less(index, expected, demo, monkeypatch):
    ends = [[0.0, 0.0, 0.3, 0.8], [0.0, 0.0, 0.1, 0.2]]
    batch, changed, _ = corrupted(demo, monkeypatch, index, ends)
    is_hidden = changed["input_ids"] != batch["input_ids"]
    shares = [is_hidden[batch["slot_types"] == kind].float().mean().item() for kind in range(4)]
    assert shares[:2] == [0.0, 0.0] and shares[2:] == pytest.approx(expected, abs=0.06)
    assert len(changed["input_ids"][is_hidden].unique()) == 1 and changed["labels"] is batch["labels"]
    again, other = (corrupted(demo, monkeypatch, k, ends)[1] for k in (index, index + 2))
    assert again["input_ids"].equal(changed["input_ids"]) and not other["input_ids"].equal(changed["input_ids"])
    assert other["labels"].equal(batch["labels"])

def test_every_other_batch_learns_its_numbers_behind_words_that_the_model_says(demo, monkeypatch):
    batch, changed, model = corrupted(demo, monkeypatch, 1, [[0.0] * 4] * 2)
    types = batch["slot_types"]
    with torch.no_grad():
        logits = model(**library_inputs(model, batch)).logits
    logits[:, :, [model.config.image_token_id, model.config.video_token_id]] = -math.inf
    said, is_word = logits[:, :-1].argmax(dim=-1), (types == distill.TEXT)[:, 1:]  # behind the true words
    assert changed["input_ids"][:, 1:][is_word].equal(said[is_word])
    assert changed["input_ids"][types != distill.TEXT].equal(batch["input_ids"][types != distill.TEXT])
    is_before = (types == distill.NUMBER).cumsum(dim=1) == 0
    assert (changed["labels"][is_before] == -100).all()
    assert changed["labels"][~is_before].equal(batch["labels"][~is_before])

def test_updates_become_orthogonal_whatever_their_size():
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, 8, 24), full_matrices=False)
    singular = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005])
    x = u * singular @ v * torch.tensor([1e-6, 1.0, 1e4])[:, None, None]
    values = torch.linalg.svdvals(distill.orthogonalize(x))
    assert values.min() > 0.65 and values.max() < 1.25  # as loose as the method is
    assert (u.mT @ distill.orthogonalize(x) @ v.mT - torch.eye(8)).abs().max() < 0.35
    assert distill.orthogonalize(torch.zeros(1, 8, 24)).abs().max() == 0

@pytest.mark.parametrize("width", [(16,), (4, 2, 5)])
def test_muon_equals_the_library_s_block_by_block(width, monkeypatch):
    monkeypatch.setattr(distill, "BLOCK_ROWS", 8)
    torch.manual_seed(0)
    ours = [torch.full((rows, *width), 0.5).requires_grad_() for rows in (24, 8, 16)]
    optimizer = distill.Muon(ours, {"lr": 0.02})
    theirs = [part.flatten(1).clone().requires_grad_() for p in ours for part in p.detach().split(8)]
    library = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for q in theirs:
            q.grad = torch.randn(q.shape) * 1e-4  # whose size does not matter
        grads = torch.cat([q.grad for q in theirs])
        for p, grad in zip(ours, grads.split([24, 8, 16])):
            p.grad = grad.view_as(p)
        optimizer.step()
        library.step()
    for p, q in zip([part for p in ours for part in p.detach().split(8)], theirs):
        step, expected = (value.detach().flatten() - 0.5 for value in (p, q))  # bfloat16 in theirs
        assert torch.cosine_similarity(step, expected, dim=0) > 0.999
        assert step.norm().item() == pytest.approx(expected.norm().item(), rel=0.02)

def test_matrices_go_to_muon_and_the_rest_to_adamw(demo):
    model, _ = make_dataset(demo, "semantic")
    names = {p: name for name, p in model.named_parameters()}
    adamw, *muons = distill.tiny_optimizers(model)
    assert type(adamw) is torch.optim.AdamW and {type(muon) for muon in muons} == {distill.Muon}
    params = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in (adamw, *muons)]
    assert sorted(names[p] for p in sum(params, [])) == sorted(names.values())  # each once
    tables = {"model.language_model.embed_tokens.weight", "model.visual.pos_embed.weight"}
    assert {names[p] for p in params[0]} == tables | {name for p, name in names.items() if p.dim() == 1}
    for alike in params[1:]:
        assert len({p.flatten(1).shape[1] for p in alike}) == 1
        assert all(len(p) % distill.BLOCK_ROWS == 0 for p in alike)

def test_batches_are_shared_out_and_cover_every_epoch():
    args, orders = distill.parse_args(["--steps", "10"]), []
    for args.rank, args.world_size, args.batch_size in ((0, 1, 2), (0, 2, 1), (1, 2, 1)):
        orders.append(distill.batch_order(10, args))
    whole = sum(orders[0], [])
    assert sorted(whole[:10]) == sorted(whole[10:]) == list(range(10)) and whole[:10] != whole[10:]
    assert [one + two for one, two in zip(*orders[1:])] == orders[0]

def test_batches_arrive_in_order_and_errors_as_they_were_raised():
    dataset = Mock()
    dataset.batch = lambda indices: time.sleep(0.02 * (indices[0] % 3)) or 1 / (indices[0] - 7)
    batches = distill.load_batches(dataset, [[k] for k in range(20)])
    assert [next(batches) for _ in range(7)] == [1 / (k - 7) for k in range(7)]
    with pytest.raises(ZeroDivisionError):
        next(batches)

def test_learning_rate_warms_up_and_falls_to_three_hundredths():
    scales = [distill.lr_scale(step, 1000) for step in (0, 29, 500, 999)]
    assert scales == pytest.approx([1 / 30, 0.998, 0.515, 0.03], abs=2e-3)

def test_tiny_model_learns_faces_by_heart_and_its_words_fit_its_numbers(trained, demo, tmp_path, capsys):
    log = read_jsonl(trained / "log.jsonl")
    assert log[-1]["loss"] < 0.15 * math.log(11) and log[-1]["samples/s"] > 0 and log[-1]["tokens/s"] > 0
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

KILLED = """
import os, sys, distill
save = distill.save_state
def save_and_die(model, optimizers, step, args):
    save(model, optimizers, step, args)
    step == 10 and os.kill(os.getpid(), 9)
distill.save_state = save_and_die
distill.main(distill.parse_args(sys.argv[1:]))
"""

def test_the_log_tells_the_loss_of_all_tokens_and_numbers(demo, tmp_path, monkeypatch, capsys):
    """Of the first step, before any update: 4 passes of 2 faces each in two steps, of which 100 steps make a line."""
    clip, untouched = Mock(wraps=torch.nn.utils.clip_grad_norm_), Mock(side_effect=lambda model, batch, *more: batch)
    monkeypatch.setattr(distill.nn.utils, "clip_grad_norm_", clip)
    monkeypatch.setattr(distill, "corrupt", untouched)
    save = Mock(wraps=distill.save_state)
    monkeypatch.setattr(distill, "save_state", save)
    run_main(distill, "--data", demo / "train.jsonl", "--limit", 8, "--batch-size", 2, "--grad-accum", 2, "--steps", 3,
             "--save-every", 2, "--lr", 1e-9, "--expectation-weight", 3, "--out", tmp_path / "new" / "run")
    assert [call.args[2] for call in untouched.call_args_list] == [0, 1, 2, 3, 4, 5]
    assert {call.args[1] for call in clip.call_args_list} == {1.0}
    assert [call.args[2] for call in save.call_args_list] == [2, 3]
    line = read_jsonl(tmp_path / "new" / "run" / "log.jsonl")[0]
    printed = capsys.readouterr().out
    assert "trained; from step 0 on" in printed and f"step 2, loss {line['loss']:.4g}, lr" in printed

    model, dataset = make_dataset(demo, "semantic")
    args = distill.parse_args(["--steps", "3", "--batch-size", "2", "--grad-accum", "2", "--out", "nowhere"])
    distill.resolve_settings(args)
    order = distill.batch_order(8, args)
    losses, tokens = [], 0
    for first, second in (order[:2], order[2:4]):
        batch = dataset.batch(first + second)
        nats, squared = distill.answer_loss(model, batch, torch.tensor(dataset.value_ids))
        losses.append((nats / (batch["labels"] != -100).sum() + 3 * squared / (4 * 52)).item())
        tokens += sum(len(dataset[index]["input_ids"]) for index in first + second)
    assert line["step"] == 2 and line["loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert line["tokens/s"] / line["samples/s"] == pytest.approx(tokens / 8, rel=1e-6)

    held_out = distill.FaceDataset(distill.read_records(demo / "val.jsonl", "semantic", None), dataset.tokenizer,
                                   dataset.image_processor, "semantic", 64 * 64).batch(range(20))
    nats = distill.answer_loss(model, held_out)[0] / (held_out["labels"] != -100).sum()
    assert line["val_loss"] == pytest.approx(nats.item(), abs=1e-4)

def test_lora_starts_as_nothing_with_kaiming_s_bounds():
    layer = distill.LoraLinear(torch.nn.Linear(64, 50), 8, 32.0)
    x = torch.randn(3, 64)
    assert layer(x).equal(layer.base(x)) and layer.scale == 4.0
    assert 0.9 / 8 < layer.lora_A.abs().max() <= 1 / 8  # 1 / sqrt(in)

def test_adamw_has_the_settings_of_the_docstring():
    defaults = distill.make_adamw([torch.zeros(2, requires_grad=True)]).defaults
    assert (defaults["betas"], defaults["weight_decay"]) == ((0.9, 0.98), 0.05)

@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
def test_no_gradient_is_computed_for_the_frozen_vision_encoder(kind, demo, tmp_path):
    args = distill.parse_args(["--model", str(make_qwen(tmp_path / "hub", kind)), "--lora-rank", "2", "--checkpointing"])
    model, *parts = distill.load_pretrained(args)
    batch = distill.FaceDataset(distill.read_records(demo / "train.jsonl", "semantic", 1), *parts, "semantic", 64 * 64).batch([0])
    needs = []
    for module in (model.model.visual.patch_embed, model.model.language_model.layers[0].mlp):
        module.register_forward_hook(lambda module, args, output: needs.append(output.requires_grad))
    distill.answer_loss(model.train(), batch)
    assert needs[:2] == [False, True]

@pytest.mark.parametrize("flag", [True, False])
def test_layers_are_compiled_and_checkpointed_as_asked(flag, tmp_path):
    args = distill.parse_args(["--model", str(make_qwen(tmp_path / "hub")), "--lora-rank", "2"])
    vars(args).update(checkpointing=flag, compile=flag, dtype="float32")
    model = distill.load_pretrained(args)[0]
    assert model.is_activation_checkpointing == flag
    assert all((layer._compiled_call_impl is not None) == flag for layer in model.model.language_model.layers)

def test_the_demo_is_drawn_once(demo, tmp_path, monkeypatch):
    path = tmp_path / "drawn" / "train.jsonl"
    draw = Mock(side_effect=lambda command: path.parent.symlink_to(demo))
    monkeypatch.setattr(distill, "DEMO", str(path))
    monkeypatch.setattr(distill.subprocess, "run", draw)
    for out in ("one", "two"):
        run_main(distill, "--data", path, "--limit", 2, "--out", tmp_path / out)
    assert [[Path(part).name for part in call.args[0][1:]] for call in draw.call_args_list] == [["annotate.py"]]

@pytest.mark.parametrize("kind", ["tiny", "lora"])
def test_killed_run_resumes_to_the_same_weights(kind, demo, tmp_path):
    flags = ["--data", demo / "train.jsonl", "--limit", 12, "--steps", 14, "--batch-size", 2, "--grad-accum", 2, "--save-every", 5]
    if kind == "lora":
        flags += ["--model", make_qwen(tmp_path / "hub"), "--lora-rank", 2, "--lr", 0.02]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_main(distill, *flags, "--out", whole)
    command = [sys.executable, "-c", KILLED, *map(str, flags), "--out", str(killed)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert torch.load(killed / "state.pt")["step"] == 10 and not (killed / "run.json").exists()
    assert_refused("holds a run", distill, *flags, "--out", killed)
    run_main(distill, "--out", killed, "--resume")  # the settings are in the state
    name = "model.safetensors" if kind == "tiny" else "adapter_model.safetensors"
    assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert not (killed / "state.pt").exists() and read_jsonl(killed / "log.jsonl")[-1]["step"] == 14
    assert_refused("holds no unfinished run", distill, "--out", killed, "--resume")

def test_interrupt_names_the_last_save(demo, tmp_path):
    flags = ["--steps", "100000", "--batch-size", "1", "--limit", "4", "--save-every", "5", "--out", tmp_path / "run"]
    command = [sys.executable, ROOT / "distill.py", "--data", demo / "train.jsonl", *flags]
    heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    while process.poll() is None and not (tmp_path / "run" / "state.pt").is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=100)[1].strip().split("\n")[-1]
    step = torch.load(tmp_path / "run" / "state.pt")["step"]
    assert process.returncode == 1 and f"holds step {step}, --resume goes on" in message

@pytest.mark.parametrize("kind, rank", [("qwen3_vl", 4), ("qwen2_5_vl", 4), ("qwen3_vl", 0)])
def test_real_architectures_from_a_folder(kind, rank, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(make_qwen(tmp_path / "hub", kind).parent)
    run = tmp_path / "run"
    run_main(distill, "--model", "hub", "--data", demo / "train.jsonl", "--limit", 4, "--steps", 2, "--lr", 0.02,
             "--batch-size", 2, "--max-pixels", 8192, "--lora-rank", rank, "--expectation-weight", 1, "--out", run)
    monkeypatch.chdir(ROOT)  # an adapter knows its base wherever it is loaded
    predictor, before = infer.load(run), load_qwen(tmp_path / "hub").model.state_dict()
    after = predictor.model.state_dict()
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
    val_loss = distill.validate(predictor.model, val_set, distill.parse_args(["--device", "cpu"]))
    assert val_loss == pytest.approx(read_jsonl(run / "log.jsonl")[-1]["val_loss"], abs=1e-4)

def test_pictures_are_shrunk_but_never_blown_up(demo):
    _, dataset = make_dataset(demo, "numeric")  # of 64 x 64 pixels, in patches of 8
    for max_pixels, patches in ((10 ** 6, 64), (32 * 32, 16)):
        parts = dataset.records, dataset.tokenizer, dataset.image_processor
        assert len(distill.FaceDataset(*parts, "numeric", max_pixels)[0]["pixel_values"]) == patches

def test_defaults_depend_on_the_model():
    def resolved(*flags):
        args = distill.parse_args([*flags, "--out", "nowhere"])
        distill.resolve_settings(args)
        return args
    tiny, numeric, real = resolved(), resolved("--supervision", "numeric"), resolved("--model", "x/y")
    assert (tiny.steps, tiny.lr, tiny.lora_rank, tiny.checkpointing, tiny.corrupt) == (2500, 2e-3, 0, False, True)
    assert (real.steps, real.lr, real.lora_rank, real.checkpointing, real.corrupt) == (2000, 1e-4, 16, True, False)
    assert not numeric.corrupt and not real.compile and resolved("--limit", "4").epochs == 1.0
    assert resolved("--limit", "4", "--steps", "3").epochs is None

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

def test_resume_with_other_processes_takes_all_steps(demo, tmp_path, monkeypatch):
    flags = ["--data", demo / "train.jsonl", "--limit", 8, "--batch-size", 2, "--epochs", 2, "--save-every", 2]
    with monkeypatch.context() as patch:
        patch.setattr(distill, "validate", Mock(side_effect=KeyboardInterrupt))  # which follows the first save
        with pytest.raises(KeyboardInterrupt):
            run_main(distill, *flags, "--out", tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distill.dist, "init_process_group", Mock())
    run_main(distill, "--out", tmp_path / "run", "--resume")
    assert read_jsonl(tmp_path / "run" / "log.jsonl")[-1]["step"] == 8

def make_unusable(folder: Path) -> dict:
    """Writes pictures that nobody can use; {name: a word of the reason}."""
    folder.mkdir(exist_ok=True)
    make_noise((60, 40))[0].save(folder / "torn.jpg", quality=95)
    (folder / "torn.jpg").write_bytes((folder / "torn.jpg").read_bytes()[:1500])
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")  # which Ghostscript runs
    Image.new("RGB", (1, 300)).save(folder / "line.png")
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"  # of 60,000 x 60,000 pixels
    chunk = b"\x00\x00\x00\x0d" + header + zlib.crc32(header).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x00IEND\xaeB`\x82")
    return {"torn.jpg": "truncated", "broken.png": "identify", "script.png": "identify", "line.png": "aspect ratio",
            "bomb.png": "decompression bomb"}

@pytest.mark.parametrize("model", ["tiny", "pretrained"])
def test_unusable_pictures_are_left_out_and_said(model, record, tmp_path, capsys):
    unusable = make_unusable(tmp_path / "bad")
    records = [{**record, "image": f"bad/{name}"} for name in unusable] + [record]
    data, val = (write_jsonl(tmp_path / name, records) for name in ("data.jsonl", "held_out.jsonl"))
    flags = ["--model", make_qwen(tmp_path / "hub")] if model == "pretrained" else []
    run_main(distill, "--data", data, "--val", val, "--steps", 3, "--batch-size", 6, "--out", tmp_path / "run", *flags)
    out = capsys.readouterr().out
    assert all(re.search(rf"left out: .*bad/{name} \(.*{reason}", out) for name, reason in unusable.items())
    log = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert log[-1]["step"] == 3 and math.isfinite(log[-1]["val_loss"])
    assert_refused("none of the pictures can be used", distill, "--data", write_jsonl(data, records[:-1]), "--steps", 1,
                   "--out", tmp_path / "other")

def test_a_run_says_how_many_people_it_sees_and_that_nothing_validates_it(record, tmp_path, capsys):
    data = write_jsonl(tmp_path / "val.jsonl", [record, record, {**record, "identity": "other"}])  # which is no validation
    run_main(distill, "--data", data, "--steps", 1, "--out", tmp_path / "run")
    assert "3 faces of 2 people" in (out := capsys.readouterr().out) and "name records with --val" in out
    assert "val_loss" not in read_jsonl(tmp_path / "run" / "log.jsonl")[0]

def test_records_are_read_with_a_byte_order_mark_and_blank_lines(record, tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text(f"\ufeff{json.dumps(record)}\n\n{json.dumps(record)}\n  \n", encoding="utf-8")
    assert len(distill.read_records(path, "semantic", None)) == 2 == len(evaluate.read_records(path))
    assert len(distill.read_records(path, "semantic", 1)) == 1 and len(infer.list_images([str(path)])) == 2

@pytest.mark.parametrize("change, message", [
    ({"image": None}, "line 2"), ({"image": "gone.png"}, "line 2: there is no picture .*gone.png"), ({"description": None}, "line 2"),
    *(({"description": {**dict.fromkeys(annotate.FIELDS, "a"), "symmetry": token}}, "line 2: .*special token")
      for token in ("<|im_end|>", "so <|image_pad|>"))])
def test_unusable_records_are_named_with_their_line(change, message, record, tmp_path):
    path = write_jsonl(tmp_path / "changed.jsonl", [record, {**record, **change}])
    assert_refused(message, distill, "--data", path, "--out", tmp_path / "new")

# ---- infer.py: decoding ----------------------------------------------------------------------------------------------
def make_noise(*sizes: tuple) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]

def inputs_of(predictor: infer.Predictor, images: list) -> dict:
    size = {"shortest_edge": 256, "longest_edge": predictor.max_pixels}
    return infer.prepare(predictor, [predictor.image_processor([image], size=size, return_tensors="pt") for image in images])

@pytest.mark.parametrize("supervision, batch_size", [("semantic", 1), ("semantic", 8), ("numbers-first", 8)])
def test_forced_decoding_writes_what_generate_writes(supervision, batch_size, trained, demo, tmp_path):
    folder = trained if supervision == "semantic" else learn_by_heart(demo, tmp_path / "run", supervision)
    predictor = infer.load(folder)
    # Eight faces that were learnt, darker, and eight that were not: doubtful answers, but mostly whole.
    images = [infer.open_image(demo / record["image"]) for record in read_jsonl(demo / "train.jsonl")[:16]]
    images[:8] = [image.point(lambda value: value * 0.9) for image in images[:8]]
    # An answer counts that has all fields and names, once and in order, and only the eleven values.
    slots = {**dict.fromkeys(NAMES, r"(0\.\d|1\.0)"), **dict.fromkeys(infer.FIELDS, '[^"]*'), None: ""}
    whole_answer = "".join(re.escape(text) + slots[slot] for text, slot in infer.answer_skeleton(supervision))
    well_formed, lengths = 0, set()
    for start in range(0, 16, batch_size):
        inputs = inputs_of(predictor, images[start:start + batch_size])
        _, chosen, texts = infer.decode_forced(predictor, inputs, supervision)
        tokens = predictor.model.generate(**inputs, do_sample=False, max_new_tokens=250)
        answers = predictor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        for written, row, text in zip(answers, chosen.tolist(), texts):
            whole = {"analysis": text, "arkit": {name: k / 10 for name, k in zip(NAMES, row)}}
            forced = json.dumps({part: whole[part] for part in infer.PARTS[supervision]}, ensure_ascii=False)
            lengths.add(len(forced))
            if re.fullmatch(whole_answer, written):
                assert written == forced
                well_formed += 1
    assert well_formed >= 10 and len(lengths) >= 4

def greedy_answer(predictor: infer.Predictor, picture: Image.Image, supervision: str) -> tuple[list, list]:
    """Token ids of the texts and the numbers in tenths, one whole forward pass a token. Numbers have three tokens here."""
    inputs, encode = inputs_of(predictor, [picture]), lambda text: predictor.tokenizer.encode(text) if text else []
    prompt, answer, texts, numbers = inputs["input_ids"][0].tolist(), [], [], []

    def choose(options: list) -> int:
        rows = {"input_ids": prompt + answer, "attention_mask": [1] * len(prompt + answer)}
        rows["mm_token_type_ids"] = inputs["mm_token_type_ids"][0].tolist() + [0] * len(answer)
        with torch.no_grad():
            logits = predictor.model(**inputs | {name: torch.tensor([row]) for name, row in rows.items()}).logits[0, -1]
        return options[int(logits[options].argmax())]
    pieces, digits = infer.answer_skeleton(supervision), [encode(str(k))[0] for k in range(10)]
    quotes = [token for text, _ in pieces for token in encode(text) if '"' in predictor.tokenizer.convert_ids_to_tokens(token)]
    for (text, slot), (following, _) in zip(pieces, pieces[1:]):
        answer += encode(text)
        if slot in NAMES:
            whole = choose(digits[:2])
            answer += [whole, *encode(".")]
            answer.append(choose(digits[:1] if whole == digits[1] else digits))  # "1." allows only "0"
            numbers.append(10 * digits.index(whole) + digits.index(answer[-1]))
        else:
            texts.append([])
            while len(texts[-1]) < (9 if slot == "text" else 6):
                token = choose(list(range(len(predictor.tokenizer))))
                if token == encode(following)[0] if slot == "text" else token in quotes:
                    break
                texts[-1].append(token)
                answer.append(token)
    return texts, numbers

@pytest.mark.parametrize("supervision", ["semantic", "numbers-first", "authors"])
def test_every_token_is_greedy(supervision, tmp_path, monkeypatch):
    """Digits are split here, and texts that find no end are cut off."""
    predictor = load_qwen(make_qwen(tmp_path / "hub", seed=7))
    with torch.no_grad():  # untrained models are nearly indifferent: sharpen attention and choices
        for layer in predictor.model.model.language_model.layers:
            for weight in (layer.self_attn.q_norm.weight, layer.self_attn.v_proj.weight, layer.mlp.down_proj.weight):
                weight.mul_(10)
        predictor.model.lm_head.weight.mul_(10)
    decode_text, written = infer.decode_text, []
    monkeypatch.setattr(infer, "MAX_TOKENS", {"text": 9, **dict.fromkeys(infer.FIELDS, 6)})
    monkeypatch.setattr(infer, "decode_text", lambda *args, **more: written.append(decode_text(*args, **more)) or written[-1])
    pictures = make_noise((64, 64), (64, 64), (96, 64))
    shares, chosen, _ = infer.decode_forced(predictor, inputs_of(predictor, pictures), supervision)
    assert shares.sum(dim=-1).numpy() == pytest.approx(1.0, abs=1e-5) and len(chosen.unique()) >= 8
    for row, picture in enumerate(pictures):
        texts = [texts[row] for texts in written]
        assert (texts, chosen[row].tolist()) == greedy_answer(predictor, picture, supervision)

def test_a_text_ends_where_its_json_would(trained, demo):
    """Should the model choose another piece of the skeleton in a text, words and numbers go on as if it were the right one."""
    predictor = infer.load(trained)
    inputs = inputs_of(predictor, [infer.open_image(demo / record["image"]) for record in read_jsonl(demo / "train.jsonl")[:2]])
    _, right, (first, second) = infer.decode_forced(predictor, inputs, "semantic")
    assert all(first.values())
    slip, = predictor.tokenizer.encode(', "eyeLookDownLeft": ')
    closing, = predictor.tokenizer.encode('", "emotional_implication": "')

    def confuse(module, args, logits):  # in the first answer the end of "muscle_movements" is taken for another piece's
        logits[0, :, slip] = logits[0, :, closing] + 1e-3
    predictor.model.lm_head.register_forward_hook(confuse)
    _, chosen, texts = infer.decode_forced(predictor, inputs, "semantic")
    assert texts == [first, second] and chosen.equal(right)

def test_the_authors_answer_has_one_text_and_52_live_link_names():
    (first, text), (second, slot), *_, (end, last) = infer.answer_skeleton("authors")
    assert (first, text, second, slot, end, last) == ("", "text", '{"EyeBlinkLeft": ', "eyeBlinkLeft", "}", None)
    whole = "".join(text for text, _ in infer.answer_skeleton("authors"))
    assert whole.count(": ") == 52 and ', "EyeLookDownLeft": ' in whole and whole.endswith(', "TongueOut": }')

@pytest.mark.parametrize("zero, mean, choice", [(0.6, 0.6 * (0.7 * 0.2 + 0.3 * 0.4) + 0.4 * 1.0, 2), (0.3, 0.3 * 0.9 + 0.7, 10)])
def test_mean_of_split_digits(zero, mean, choice):
    """States are one-hot, so the rows of the matrix are scores: first 0 or 1, then tenths of 0.7 for 2 and 0.3 for 4."""
    value_ids = torch.tensor([[0, 10, k] for k in range(10)] + [[1, 10, 0]])  # "0.3" is 0 . 3, "1.0" is 1 . 0
    weight = torch.full((11, 2), -30.0)
    weight[[0, 1], 0], weight[[2, 4], 1] = torch.tensor([zero, 1 - zero]).log(), torch.tensor([0.7, 0.3]).log()
    shares, chosen = infer.read_numbers(weight, torch.eye(2)[[0, 0, 1]].view(1, 1, 3, 2), value_ids)
    assert infer.summarize(shares, chosen, "mean")[0].item() == pytest.approx(mean, abs=1e-5) and chosen.item() == choice

def test_estimates_of_a_known_distribution():
    probabilities = torch.tensor([0.3, 0, 0, 0, 0.3, 0, 0, 0, 0, 0, 0.4]).view(1, 1, 11)
    std = (0.3 * 0.52 ** 2 + 0.3 * 0.12 ** 2 + 0.4 * 0.48 ** 2) ** 0.5
    for estimate, point in (("mean", 0.52), ("median", 0.4), ("mode", 1.0)):
        values = torch.stack(infer.summarize(probabilities, torch.tensor([[10]]), estimate)).flatten()
        assert values.tolist() == pytest.approx([point, std], abs=1e-6)

@pytest.mark.parametrize("text", ['says "cheese"', "a \\ b", "two\nlines\tand a tab", "plain 😀"])
def test_texts_come_back_as_they_were_trained(text, demo):
    _, dataset = make_dataset(demo, "semantic")
    dataset.records[0]["description"] = dict.fromkeys(infer.FIELDS, text)
    item = dataset[0]
    trained = dataset.tokenizer.decode(item["input_ids"][item["slot_types"] == distill.TEXT])
    assert infer.unescape(trained[:len(trained) // 4]) == text

HEADS = ["Facial Expression Category", "Detailed Muscle Movements", "Emotional Implication", "Symmetry"]

@pytest.mark.parametrize("form", ["**{k}. {head}**\n{text}\n\n", "{k}. **{head}**: {text}  \n", "### {k}) {head}\n{text}\n",
                                  "{k}. **{head}**:\n   {text}\n"])
def test_headings_of_the_authors_answers_give_the_description(form):
    keys = {name[0].upper() + name[1:]: 0.3 for name in NAMES} | {"HeadYaw": -0.2, "TongueOut": -0.0}
    texts = [f"{head} {{text}}: more" for head in HEADS[:3]] + ["- **Eyes**: wide.\n   - **Jaw**: open."]
    sections = "".join(form.format(k=k, head=head, text=text) for k, (head, text) in enumerate(zip(HEADS, texts), 1))
    description = dict(zip(infer.FIELDS, texts[:3] + ["- Eyes: wide. - Jaw: open."]))
    assert infer.read_headings(sections) == description and infer.read_headings("A calm face.") is None
    coefficients, found = infer.read_answer(f"{sections}\n```json\n{json.dumps(keys)}\n```")
    assert coefficients == {**dict.fromkeys(NAMES, 0.3), "tongueOut": 0.0} and list(coefficients) == NAMES
    assert found == description

@pytest.mark.parametrize("text, message", [
    ("no braces", "lacks 52"), (json.dumps({"arkit": ZEROS})[:-30], "lacks 52"), ("[1] and 5", "lacks 52"),
    *((json.dumps({**ZEROS, "jawOpen": value}), "lacks 1 .*jawOpen") for value in (None, "x", float("nan"), float("inf")))])
def test_free_answers_that_lack_something_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        infer.read_answer(text)

def test_free_answers_are_clipped_whatever_their_numbers():
    whole = {"analysis": dict.fromkeys(infer.FIELDS, "x"), "arkit": {**ZEROS, "jawOpen": 10 ** 400, "mouthLeft": -3}}
    assert infer.read_answer("{} " + json.dumps(whole)) == ({**ZEROS, "jawOpen": 1.0}, whole["analysis"])

# ---- infer.py: checkpoints -------------------------------------------------------------------------------------------
STEM = "base_model.model.model.language_model.layers.0.self_attn.q_proj"

def make_adapter(folder: Path, base: str, change: dict = {}) -> Path:
    """An adapter as ms-swift writes it, of one module."""
    torch.manual_seed(0)
    weights = {f"{STEM}.lora_A.weight": torch.randn(3, 32), f"{STEM}.lora_B.weight": torch.randn(32, 3), **change}
    folder.mkdir(exist_ok=True)
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 3, "lora_alpha": 6}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

def test_photos_with_a_foreign_adapter_end_in_numbers_a_take_and_charts(tmp_path):
    hub, photos = make_qwen(tmp_path / "hub"), tmp_path / "photos"
    photos.mkdir()
    for k, picture in enumerate(make_noise((80, 60), (60, 80), (64, 64)), 9):
        picture.save(photos / f"img{k}.jpg")
    (photos / "._img9.jpg").write_bytes(b"no picture")
    turns = [{"role": "system", "content": "You read faces."}, {"role": "user", "content": "<image>Read {this}."}]
    prompt = write_jsonl(tmp_path / "example.jsonl", [{"messages": turns, "images": ["a.jpg"]}])
    adapter = make_adapter(tmp_path / "adapter", "/gone/hub/Qwen")
    out, take, charts = tmp_path / "a" / "b" / "p.jsonl", tmp_path / "c" / "d" / "take.csv", tmp_path / "e" / "charts"
    flags = [photos, "--model", adapter, "--prompt", prompt, "--out", out, "--csv", take, "--plot", charts]
    assert_refused("/gone/hub/Qwen, --base", infer, *flags)
    run_main(infer, *flags, "--base", hub)
    records = read_jsonl(out)
    assert [record["image"] for record in records] == [f"../../photos/img{k}.jpg" for k in (9, 10, 11)]
    for record in records:
        assert record["error"] is None and record["description"] is None  # it babbles, without headings
        assert list(record["coefficients"]) == list(record["std"]) == NAMES and max(record["std"].values()) > 0.1
    assert len(take.read_text().splitlines()) == 4
    assert {path.name for path in charts.iterdir()} == {f"00000{k}_img{k + 9}.png" for k in range(3)}
    predictor = infer.load(adapter, prompt_file=prompt, base=hub)
    text = predictor.tokenizer.decode(inputs_of(predictor, make_noise((64, 64)))["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou read faces.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>")
    assert text.endswith("<|vision_end|>Read {this}.<|im_end|>\n<|im_start|>assistant\n")

@pytest.mark.parametrize("config, scale", [
    ({}, 2.0), ({"use_rslora": True}, 6 / 3 ** 0.5), ({"alpha_pattern": {"layers.0.self_attn.q_proj": 12}}, 4.0),
    ({"alpha_pattern": {"v_proj|q_proj": 9, ".*": 12}}, 3.0),  # the first that matches
    ({"alpha_pattern": {"proj": 9, "layers.1.self_attn.q_proj": 12}}, 2.0)])  # none of them
def test_adapters_are_merged_as_peft_scales_them(config, scale, tmp_path):
    model = load_qwen(make_qwen(tmp_path / "hub")).model
    updates = load_file(make_adapter(tmp_path / "adapter", "x") / "adapter_model.safetensors")
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    expected = weight.detach() + scale * updates[f"{STEM}.lora_B.weight"] @ updates[f"{STEM}.lora_A.weight"]
    infer.merge_adapter(model, {"lora_alpha": 6, **config}, updates)
    assert torch.allclose(weight, expected, atol=1e-4)

@pytest.mark.parametrize("change", [
    {f"{STEM}.lora_A.weight": None, f"{STEM}.lora_B.weight": None}, {f"{STEM}.lora_B.weight": None},
    {f"{STEM}.lora_magnitude_vector": torch.ones(32)}, {f"{STEM}.lora_A.weight": torch.ones(3, 31)},
    {f"{STEM}.lora_A.weight": torch.ones(3), f"{STEM}.lora_B.weight": torch.ones(3)},
    {f"{STEM}.lora_A.weight": torch.ones(3, 1), f"{STEM}.lora_B.weight": torch.ones(1, 3)},
    {"base_model.model.gone.lora_A.weight": torch.ones(3, 32), "base_model.model.gone.lora_B.weight": torch.ones(32, 3)}])
def test_adapters_that_do_not_fit_are_refused(change, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", str(make_qwen(tmp_path / "hub")), change)
    with pytest.raises(SystemExit, match="adapter"):
        infer.load(adapter, prompt_file=tmp_path / "hub" / "prompt.txt")

def test_a_checkpoint_trained_elsewhere_wants_a_prompt_and_may_write_freely(demo, tmp_path, monkeypatch):
    folder = make_qwen(tmp_path / "hub")
    flags = [demo / "val.jsonl", "--model", folder, "--limit", 2, "--out", tmp_path / "p.jsonl"]
    assert_refused("--prompt FILE", infer, *flags)
    monkeypatch.setattr(infer, "MAX_NEW_TOKENS", 40)
    run_main(infer, *flags, "--prompt", folder / "prompt.txt", "--decode", "generate")
    records = read_jsonl(tmp_path / "p.jsonl")  # it babbles, which is reported and kept
    assert all("the answer" in record["error"] and record["answer"] for record in records)

def test_numbers_alone_are_refused_where_they_stand_behind_words(trained, demo, tmp_path):
    flags = ["--model", trained, "--numeric", "--out", tmp_path / "p.jsonl"]
    assert_refused("--numeric: .* description first", infer, demo / "val.jsonl", *flags)

def test_damaged_checkpoints_are_explained(trained, demo, tmp_path):
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:50_000])
    for settings in ((tmp_path / "run.json").read_text(), "{}"):
        (tmp_path / "run.json").write_text(settings)
        assert_refused("cannot be read", infer, demo / "val.jsonl", "--model", tmp_path, "--out", tmp_path / "p.jsonl")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert_refused("is a bert", distill, "--data", demo / "train.jsonl", "--model", tmp_path, "--out", tmp_path / "new")

# ---- infer.py: pictures and files ------------------------------------------------------------------------------------
def test_any_picture_is_answered_or_reported(trained, tmp_path):
    folder, out = tmp_path / "bilder ü", tmp_path / "p.jsonl"
    reasons, photo = make_unusable(folder), make_noise((60, 40))[0]
    for mode, name in (("L", "gray.png"), ("CMYK", "cmyk.jpg"), ("P", "palette.gif"), ("LA", "la.png"), ("1", "bit.png"),
                       ("RGB", "UPPER.WEBP"), ("RGBA", "ünï 名.png")):
        photo.convert(mode).save(folder / name)
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    readable = {path.name for path in folder.iterdir()} - reasons.keys()
    (folder / "notes.txt").touch()
    run_main(infer, folder, "--model", trained, "--out", out, "--csv", tmp_path / "p.csv", "--plot", tmp_path / "charts")
    records = {Path(record["image"]).name: record for record in read_jsonl(out)}
    failed = {name: record["error"] for name, record in records.items() if record["error"]}
    assert set(records) - set(failed) == readable
    assert failed.keys() == reasons.keys() and all(reasons[name] in failed[name] for name in failed)
    for name in readable:
        assert list(records[name]["coefficients"]) == NAMES and list(records[name]["description"]) == infer.FIELDS
        assert all(0 <= value <= 1 for value in records[name]["coefficients"].values())
    rows, charts = (tmp_path / "p.csv").read_text().splitlines()[1:], list((tmp_path / "charts").iterdir())
    assert len(rows) == len(charts) == len(readable)

def test_pictures_are_turned_upright_and_16_bits_scaled(tmp_path):
    photo, exif = make_noise((60, 40))[0].resize((240, 160)), Image.Exif()
    exif[0x0112] = 6
    photo.rotate(90, expand=True).save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    photo.convert("L").save(tmp_path / "gray.png")
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(tmp_path / "gray16.png")
    gray, gray16, rotated = (np.asarray(infer.open_image(tmp_path / name)).astype(int)
                             for name in ("gray.png", "gray16.png", "rotated.jpg"))
    assert np.abs(gray16 - gray).max() <= 1
    assert rotated.shape == (160, 240, 3) and np.abs(rotated - np.asarray(photo).astype(int)).mean() < 20

def test_batches_of_different_shapes_answer_as_alone(tmp_path):
    predictor, pictures = load_qwen(make_qwen(tmp_path / "hub")), make_noise((64, 64), (300, 80), (50, 200))
    for picture, prediction in zip(pictures, infer.predict(predictor, pictures, numeric=True)):
        alone = infer.predict(predictor, [picture], numeric=True)[0]
        assert prediction["coefficients"] == pytest.approx(alone["coefficients"], abs=2e-4)

def test_folders_go_in_the_order_a_person_counts(tmp_path):
    for name in ("frame10.png", "frame2.png", "frame1.png", "b.png", "A.png", "._frame2.png", "frame02.jpg"):
        (tmp_path / name).touch()
    names = [path.name for path in infer.list_images([str(tmp_path)])]
    assert names == ["A.png", "b.png", "frame1.png", "frame02.jpg", "frame2.png", "frame10.png"]

def test_a_picture_that_comes_twice_has_one_record_and_two_frames(trained, demo, tmp_path, monkeypatch):
    (tmp_path / "work" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "photos").symlink_to(demo / "images")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "work" / "runs").symlink_to(tmp_path / "scratch")  # from where ../ does not lead back
    names = ["photos/000000.png", "there/../photos/000000.png", "photos/000001.png", "photos/000000.png"]
    shots = write_jsonl(tmp_path / "work" / "shots.jsonl", [{"image": name} for name in names])
    run_main(infer, shots, "--model", trained, "--out", "runs/p.jsonl", "--csv", "take.csv", "--fps", 2)
    images = [record["image"] for record in read_jsonl(tmp_path / "scratch" / "p.jsonl")]
    assert images == [os.path.relpath(demo.resolve() / "images" / f"00000{k}.png", tmp_path.resolve() / "scratch") for k in (0, 1)]
    rows = [row.split(",") for row in Path("take.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["00:00:00:00.000", "00:00:00:01.000", "00:00:01:00.000", "00:00:01:01.000"]
    assert rows[0][2:] == rows[1][2:] == rows[3][2:] != rows[2][2:]

def test_half_a_character_does_not_end_the_run(demo, tmp_path, monkeypatch):
    predict = Mock(side_effect=lambda _, images, *more: [{"description": infer.unescape(r"so \ud83d"), "error": None}])
    monkeypatch.setattr(infer, "predict", predict)
    monkeypatch.setattr(infer, "load", Mock())
    run_main(infer, demo / "val.jsonl", "--limit", 2, "--batch-size", 1, "--out", tmp_path / "p.jsonl")
    assert [record["description"] for record in read_jsonl(tmp_path / "p.jsonl")] == ["so \ud83d"] * 2

def test_a_take_has_61_columns_and_gaps_where_a_picture_failed(tmp_path):
    good = {"coefficients": {**ZEROS, "eyeBlinkLeft": 0.25, "tongueOut": 1.0}, "error": None}
    infer.write_livelink(tmp_path / "take.csv", [good, {"error": "torn"}, good], fps=60)
    header, first, last = (line.split(",") for line in (tmp_path / "take.csv").read_text().splitlines())
    assert header[:4] == ["Timecode", "BlendshapeCount", "EyeBlinkLeft", "EyeLookDownLeft"] and len(header) == len(last) == 63
    assert header[53:55] == ["TongueOut", "HeadYaw"] and header[-1] == "RightEyeRoll"
    assert first[:3] == ["00:00:00:00.000", "61", "0.2500000000"] and first[53:55] == ["1.0000000000", "0.0000000000"]
    assert last[0] == "00:00:00:02.000"

def test_chart_shows_strength():
    record = {"coefficients": {**ZEROS, "mouthSmileLeft": 0.8, "jawOpen": 0.6}, "std": ZEROS, "description": None}
    chart = np.asarray(infer.draw_chart(Image.new("RGB", (64, 64)), record))
    is_bar = (chart == tuple(bytes.fromhex(infer.BAR[1:]))).all(axis=2)
    lengths = [is_bar[top:top + 20].sum(axis=1).max() for top in (50, 91)]
    assert lengths == pytest.approx([0.8 * 340, 0.6 * 340], abs=3)

def test_chart_holds_an_answer_as_long_as_the_authors():
    """Their longest has 372 tokens. Below the highest photo its last word is still seen, and no word runs into a name."""
    def draw(*words):
        record = {"coefficients": ZEROS, "std": ZEROS, "description": dict(zip(infer.FIELDS, words))}
        return np.asarray(infer.draw_chart(Image.new("RGB", (90, 900), "white"), record).convert("L")).astype(int)
    long = ["slight anger", "the left upper lip " * 60, "irritation " * 14]
    empty, without, whole = draw(), draw(*long, "both sides " * 14), draw(*long, "both sides " * 14 + "alike")
    rows, columns = (whole != without).nonzero()
    assert np.ptp(rows) >= 10 and np.ptp(columns) >= 30 and rows.max() < len(whole) - 20
    assert (whole != empty).nonzero()[1].max() < (empty < 255).nonzero()[1].min()

def test_two_processes_infer_as_one(trained, demo, tmp_path):
    flags = [demo / "train.jsonl", "--model", trained, "--limit", 7, "--batch-size", 2, "--out"]
    run_main(infer, *flags, tmp_path / "one.jsonl")
    subprocess.run([*TORCHRUN, ROOT / "infer.py", *map(str, flags), tmp_path / "two.jsonl"], check=True)
    for one, other in zip(read_jsonl(tmp_path / "one.jsonl"), read_jsonl(tmp_path / "two.jsonl"), strict=True):
        assert one["image"] == other["image"] and one["coefficients"] == pytest.approx(other["coefficients"], abs=2e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"one.jsonl", "two.jsonl"}

def test_interrupted_inference_goes_on_with_resume_only(trained, demo, tmp_path, monkeypatch):
    flags = [demo / "train.jsonl", "--model", trained, "--limit", 7, "--batch-size", 2, "--out"]
    whole, out, part = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "parts.jsonl.0of1"
    run_main(infer, *flags, whole)
    predict = Mock(wraps=infer.predict, side_effect=[DEFAULT] * 3 + [KeyboardInterrupt] + [DEFAULT] * 5)
    monkeypatch.setattr(infer, "predict", predict)
    with pytest.raises(KeyboardInterrupt):
        run_main(infer, *flags, out)
    kept = part.read_bytes()
    assert kept.count(b"\n") == 6
    part.write_bytes(kept + '{"image": "torn é'.encode()[:-1])  # within a character
    assert_refused("had other pictures", infer, *flags[:3], "--limit", 5, "--out", out, "--resume")
    run_main(infer, *flags, out, "--resume")
    assert predict.call_count == 5 and out.read_text() == whole.read_text()  # the last batch was decoded again
    part.write_bytes(kept)
    run_main(infer, *flags, out)  # starts anew
    assert predict.call_count == 9 and {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "parts.jsonl"}

@pytest.mark.parametrize("out", ["sub/../a.jsonl", "link.jsonl"])
def test_infer_does_not_overwrite_an_input(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.jsonl").symlink_to(write_jsonl(tmp_path / "a.jsonl", [{"image": "x.png"}]))
    assert_refused("is a folder or an INPUT", infer, "a.jsonl", "--out", out)

# ---- evaluate.py -----------------------------------------------------------------------------------
def test_metrics_equal_those_of_scipy_and_scikit_learn():
    """The expected values are what scipy 1.17.1 and scikit-learn 1.9.1 give for these arrays."""
    k = np.arange(40)
    true = np.stack([np.clip(np.sin(k * (c + 3)), 0, 1) for c in range(52)], axis=1)
    predicted = np.clip(0.8 * true + 0.1 * np.cos(k[:, None] * 7 + np.arange(52)) ** 2, 0, 1)
    expected = {"mae": 0.06865854089342599, "rmse": 0.08537527081535595, "f1": 0.979858464888405,
                "pearson_median": 0.9935772653815745, "pearson_mean": 0.991913109991661}
    found = evaluate.metrics(predicted, true)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    rank = evaluate.spearman(predicted.ravel(), np.abs(predicted - true).ravel())
    assert rank == pytest.approx(0.7199235313123631, abs=1e-9)

def test_metrics_of_a_worked_example():
    true, predicted = np.zeros((2, 52)), np.zeros((2, 52))
    smile_left, smile_right, jaw = (NAMES.index(name) for name in ("mouthSmileLeft", "mouthSmileRight", "jawOpen"))
    true[:, smile_left], true[:, smile_right], true[:, jaw] = [0.4, 0.8], [0.4, 0.8], [0.1, 0.9]
    predicted[:, smile_left], predicted[:, smile_right], predicted[:, jaw] = [0.5, 0.7], [0.3, 0.7], [0.2, 0.1]
    found = evaluate.metrics(predicted, true)
    assert found["mae"] == pytest.approx((0.1 * 4 + 0.1 + 0.8) / 104)
    assert found["rmse"] == pytest.approx(((0.01 * 4 + 0.01 + 0.64) / 104) ** 0.5)
    assert found["f1"] == pytest.approx(2 * 4 / (5 + 5))  # of 5 found and 5 true actives, 4 are both
    assert found["constant"] == 49 and found["pearson_above_0.8"] == 2 and found["pearson_median"] == pytest.approx(1)
    assert found["pearson_mean"] == pytest.approx(1 / 3)
    assert found["asymmetry"] == pytest.approx(0.2 / 36)  # left minus right is 0.2 off in one of 2 x 18

def test_ccc_of_a_worked_example():
    # Lin's CCC by hand, n = 4: covariance 0.015, variances 0.035 and 0.01 (each times n), equal means.
    x, y = np.array([[0.1, 0.2, 0.3, 0.6]]).T, np.array([[0.2, 0.2, 0.4, 0.4]]).T
    for shift, expected in ((0.0, 0.03 / 0.045), (0.1, 0.03 / 0.055)):
        assert evaluate.correlations(x + shift, y)[1][0] == pytest.approx(expected, abs=1e-9)

def test_what_never_varies_has_no_correlation_and_a_constant_prediction_none_to_show():
    x = np.array([[0.1, 0.2, 0.3, 0.6]]).T
    r, ccc = evaluate.correlations(np.hstack([x, 0 * x]), np.hstack([0 * x, x]))
    assert np.isnan(r[0]) and np.isnan(ccc[0]) and r[1] == 0.0 and ccc[1] == 0.0

def test_spearman_of_a_worked_example():
    # Ranks 1, 2.5, 2.5, 4 and 4, 3, 2, 1: covariance -4.5, variances 4.5 and 5 (each times 3).
    tied = evaluate.spearman(np.array([1, 2, 2, 5.0]), np.array([9, 7, 5, 3.0]))
    assert tied == pytest.approx(-4.5 / (4.5 * 5) ** 0.5)
    assert evaluate.spearman(np.ones(4), np.arange(4.0)) == 0.0

def test_uncertainty_counts_active_coefficients():
    rng, true = np.random.default_rng(0), np.zeros((1000, 52))  # errors as large as stated
    true[:, :10] = 0.5  # the others are not active: not counted
    std = rng.uniform(0.01, 0.1, true.shape)
    found = evaluate.uncertainty(std, true + std * rng.normal(size=true.shape), true)
    assert found["within_1_std"] == pytest.approx(0.68, abs=0.02) and found["spearman"] > 0.4
    assert found["within_2_std"] == pytest.approx(0.95, abs=0.02)
    assert evaluate.uncertainty(std, true, 0 * true) == {}

def test_precision_and_recall_of_words():
    words = {"expression_category": "joy", "symmetry": "symmetric", "muscle_movements": "Jaw: jaw slightly opened."}
    other = {"expression_category": "joy", "symmetry": "mixed", "muscle_movements": "jaw OPENED wide, left brow raised, jaw"}
    pairs = [{"description": words}, {"description": None}], [{"description": other}, {"description": other}]
    # Of 4 words written (jaw twice), jaw, jaw and opened are among the 7 true ones.
    assert evaluate.agreement(*pairs) == pytest.approx({
        "expression_category": 1.0, "symmetry": 0.0, "precision": 3 / 4, "recall": 3 / 7, "f1": 6 / 11})
    assert evaluate.agreement([{}], [{}]) == {}

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

def test_intervals_of_constant_errors_and_what_was_resampled():
    errors = {"a": np.full((9, 52), 0.3), "b": np.full((9, 52), 0.1)}
    same = evaluate.intervals(errors, list("abcdefghi"), 0)
    assert same["intervals"]["a"]["rmse"] == pytest.approx([0.3, 0.3])
    assert same["differences"]["b minus a"]["mae"] == pytest.approx([-0.2, -0.2])
    assert same["resampled"].startswith("9 identities")
    assert evaluate.intervals(errors, list("aaaabbbcd"), 0)["resampled"].startswith("9 pictures")
    assert evaluate.intervals(errors, list("aaaabbcde"), -1)["resampled"].startswith("5 identities")

def noisy(demo: Path, folder: Path, name: str, noise: float) -> Path:
    """Predictions for val.jsonl that are off by `noise`."""
    records, rng = read_jsonl(demo / "val.jsonl"), np.random.default_rng(0)
    values = np.clip(as_array(records) + noise * rng.normal(size=(len(records), 52)), 0, 1)
    return write_jsonl(folder / name, [
        {**record, "image": os.path.relpath(demo / record["image"], folder), "error": None,
         "coefficients": dict(zip(NAMES, row))} for record, row in zip(records, values.tolist())])

def test_models_are_compared_in_pairs_and_by_field(demo, tmp_path, capsys):
    files = [noisy(demo, tmp_path, "good.jsonl", 0.02), noisy(demo, tmp_path, "bad.jsonl", 0.2)]
    assert_refused("no record of the truth has that field", evaluate, *files, demo / "val.jsonl", "--by", "idenity", "--out", tmp_path / "m")
    run_main(evaluate, *files, demo / "val.jsonl", "--by", "identity", "--plot", tmp_path / "m.png", "--out", tmp_path / "m.json")
    results = json.loads((tmp_path / "m.json").read_text())
    low, high = results["differences"][f"{files[1]} minus {files[0]}"]["rmse"]
    assert 0.05 < low < high < 0.25 and f"{low:.4f} to {high:.4f}" in (out := capsys.readouterr().out)
    assert f"every number is in {tmp_path / 'm.json'}" in out and "20 pictures, since" in out
    assert sum(values["images"] for values in results["by"].values()) == 20
    assert {"models", "baselines", "intervals", "differences", "by_region", "by_coefficient", "description",
            "uncertainty"} <= results.keys() and Image.open(tmp_path / "m.png").size == (1780, 1180)
    assert results["by_region"]["jaw"]["rmse"] == pytest.approx(0.02, rel=0.6)
    assert list(results["baselines"]) == ["zeros", "training mean"]  # of train.jsonl beside the truth

@pytest.mark.parametrize("unit", [0.1, 1.0, 100.0])
def test_a_rig_measures_millimetres_in_whatever_unit(unit, demo, tmp_path):
    (tmp_path / "rig").mkdir()
    for k, name in enumerate(["Neutral", *NAMES[:-1]]):  # a line of points 25.5 cm high, shape k lifts point k by 1 cm
        points = [(0.0, (-12.0 + j / 2) / unit, 1.0 * (j == k - 1) / unit) for j in range(52)]
        short = re.sub("Left$", "_L", name) if name not in ("jawLeft", "mouthLeft") else name
        (tmp_path / "rig" / f"{short}.obj").write_text("".join(f"v {x} {y} {z}\n" for x, y, z in points))
    path = noisy(demo, tmp_path, "p.jsonl", 0.02)
    run_main(evaluate, path, demo / "val.jsonl", "--rig", tmp_path / "rig", "--out", tmp_path / "m.json")
    good = json.loads((tmp_path / "m.json").read_text())["models"][str(path)]
    error = np.abs(as_array(read_jsonl(path)) - as_array(read_jsonl(demo / "val.jsonl")))
    lips = [NAMES.index(name) for name in ("mouthRollUpper", "mouthRollLower", "mouthFunnel", "mouthPucker")]
    assert good["lip_mm"] == pytest.approx(10 * error[:, lips].max(axis=1).mean())
    assert good["vertex_mm"] == pytest.approx(10 * good["mae"], rel=0.05)  # all but tongueOut move one of 52 points
    (tmp_path / "rig" / "mouthPucker.obj").write_bytes((tmp_path / "rig" / "Neutral.obj").read_bytes())
    assert evaluate.read_rig(tmp_path / "rig")[1].sum() == 3  # a shape that moves nothing moves no lip
    for file in (tmp_path / "rig").iterdir():
        file.write_text(re.sub(r"v (\S+) (\S+)", lambda row: f"v {row[1]} {float(row[2]) * 0.002 * unit}", file.read_text()))
    assert_refused("is 0.051 high", evaluate, path, demo / "val.jsonl", "--rig", tmp_path / "rig")

@pytest.mark.filterwarnings("error")
def test_evaluate_compares_with_baselines(demo, tmp_path, capsys):
    records, path = read_jsonl(demo / "val.jsonl"), tmp_path / "p.jsonl"
    (tmp_path / "linked").symlink_to(demo)
    perfect = [{**record, "image": f"linked/{record['image']}", "error": None} for record in records]
    perfect[0] |= {"error": "unreadable", "coefficients": None}
    unknown = {**perfect[0], "image": "unknown.png"}  # a failed picture needs no truth
    train = read_jsonl(demo / "train.jsonl")
    twice = write_jsonl(tmp_path / "train.jsonl", [*train, *train[:20]])
    run_main(evaluate, write_jsonl(path, [*perfect, unknown]), demo / "val.jsonl", "--train", twice,
             "--out", tmp_path / "new" / "er" / "m.json")
    results = json.loads((tmp_path / "new" / "er" / "m.json").read_text())
    assert results["models"][str(path)]["rmse"] == 0 and results["errors"] == 1
    assert set(results["description"].values()) == {1.0} and len(results["description"]) == 5
    errors = as_array(records[1:]) - as_array(train + train[:20]).mean(axis=0)
    assert results["baselines"]["training mean"]["rmse"] == pytest.approx((errors ** 2).mean() ** 0.5)
    assert results["baselines"]["zeros"]["mae"] == pytest.approx(as_array(records[1:]).mean())
    assert "1 without prediction" in capsys.readouterr().out

@pytest.mark.filterwarnings("error")
def test_truth_equal_to_the_training_mean_divides_by_nothing(tmp_path):
    records = [{"image": f"{k}.png", "coefficients": {**ZEROS, "jawOpen": 0.5}} for k in range(3)]
    path = write_jsonl(tmp_path / "t.jsonl", records)
    run_main(evaluate, path, path, "--train", path, "--out", tmp_path / "m.json")

def test_truth_that_failed_is_left_out(demo, tmp_path):
    path = noisy(demo, tmp_path, "p.jsonl", 0.02)
    truth = read_jsonl(path)
    truth[3] |= {"error": "torn", "coefficients": None}
    run_main(evaluate, path, write_jsonl(tmp_path / "truth.jsonl", truth), "--out", tmp_path / "m.json")
    results = json.loads((tmp_path / "m.json").read_text())
    assert results["errors"] == 1 and results["models"][str(path)]["rmse"] == 0

def test_mismatches_are_refused(demo, tmp_path):
    records, path = read_jsonl(demo / "val.jsonl"), tmp_path / "p.jsonl"
    whole = [{**record, "image": str(demo / record["image"]), "error": None} for record in records]
    for change, message in ((whole[1:], "1 pictures have no prediction"), (whole + whole[:1], "second record"),
                            (whole + [{**whole[1], "image": "x.png"}], "1 predictions have no truth"),
                            ([{**record, "error": "torn"} for record in whole], "none of the 20 pictures")):
        assert_refused(message, evaluate, write_jsonl(path, change), demo / "val.jsonl")

# ---- Bad input: one sentence, never a traceback ----------------------------------------------------------------------
@pytest.mark.parametrize("change, message", [
    *((line, "") for line in ("", '{"image": ', "[1]", "null")), ({"jawOpen": 0.5}, "52 ARKit"), ([0.5], "52"),
    *(({**ZEROS, "jawOpen": value}, "jawOpen") for value in (float("nan"), "0.5", True, 1.2)),
    ({**ZEROS, "jawDrop" * 999: 0.5}, "52 ARKit")])
def test_bad_records_are_named(change, message, tmp_path):
    path, record = tmp_path / "bad.jsonl", {"image": "x.png", "coefficients": change, "error": None}
    path.write_text(change if isinstance(change, str) else json.dumps(record))
    for module, *flags in ((annotate, path, "--out", tmp_path / "o.jsonl"), (evaluate, path, path),
                           (distill, "--data", path, "--out", tmp_path / "run")):
        assert_refused(rf"{re.escape(str(path))}.*{message}", module, *flags)
    assert not (tmp_path / "o.jsonl").exists() and not (tmp_path / "run").exists()

@pytest.mark.parametrize("module, flags, message", [
    (annotate, ["missing.jsonl"], "missing.jsonl"), (annotate, ["README.md"], "README.md, line 1"),
    (annotate, ["--demo", 5], "--demo 5"), (annotate, ["--every", 0], "--every 0"), (annotate, ["--limit", 0], "--limit"),
    (annotate, ["--seed", -1], "--seed -1"),
    (infer, ["--limit", 0], "--limit"), (distill, ["--limit", 0], "--limit 0"),
    (distill, ["--data", "missing.jsonl", "--out", "new"], "missing.jsonl"), (distill, ["--lr", 0], "--lr 0"),
    (distill, ["--device", "cuda"], "no GPU"), (distill, ["--resume", "--out", "nowhere"], "--resume"),
    (distill, ["--batch-size", 0], "--batch-size 0"), (distill, ["--lora-rank", -1], "--lora-rank -1"),
    (distill, ["--lora-rank", 8], "pretrained"), (distill, ["--val", "missing.jsonl"], "missing.jsonl"),
    (infer, [".ci"], "no picture exists"), (infer, ["missing.png"], "missing.png"), (infer, ["--device", "cuda"], "no GPU"),
    (infer, ["--batch-size", 0], "--batch-size"), (infer, ["README.md", "--model", "nowhere"], "python distill.py"),
    (infer, ["README.md", "missing.jsonl"], "missing.jsonl"), (infer, ["a.jsonl", "--out", "a.jsonl"], "is a folder or an INPUT"),
    (infer, ["README.md", "--out", ".ci"], ".ci is a folder"),
    (infer, ["README.md", "--decode", "generate", "--estimate", "mode"], "--estimate"),
    (evaluate, ["a", "b", "--out", ".ci/../a"], "a is read"), (evaluate, ["a", "b", "--plot", "b"], "b is read"),
    (distill, ["--lr", "nan"], "--lr nan"),
    (evaluate, ["missing.jsonl"], "missing.jsonl"), (evaluate, ["--rig", "nowhere", "a"], "--rig nowhere")])
def test_bad_flags_are_explained(module, flags, message, demo, monkeypatch):
    monkeypatch.chdir(ROOT)
    if module is distill and "--data" not in flags:
        flags = ["--out", demo / "unused", *flags, "--data", demo / "train.jsonl"]
    assert_refused(message, module, *flags)

@pytest.mark.parametrize("script, flags, message", [
    ("evaluate", ["V", "V", "--plot", "folder"], "Is a directory: 'folder'"), ("evaluate", ["V", "V", "--out", "file/m.json"], "file"),
    ("annotate", ["V", "--out", "file/a.jsonl"], "file"), ("distill", ["--data", "V", "--out", "file"], "File exists: 'file'"),
    ("infer", ["V", "--limit", "1", "--model", "M", "--csv", "folder"], "Is a directory: 'folder'")])
def test_outputs_that_cannot_be_written_are_explained(script, flags, message, trained, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    names = {"V": demo / "val.jsonl", "M": trained}
    monkeypatch.setattr(sys, "argv", [script, *(str(names.get(flag, flag)) for flag in flags)])
    with pytest.raises(SystemExit, match=message) as error:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert "\n" not in str(error.value)

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

def test_a_run_that_diverges_says_so(demo, tmp_path):
    flags = ["--data", demo / "train.jsonl", "--limit", 8, "--batch-size", 2, "--steps", 9]
    assert_refused("the loss is no number at step [1-8]; .*lower --lr", distill, *flags, "--lr", 1e9, "--out", tmp_path / "run")

def test_frames_that_do_not_fit_are_counted(demo, tmp_path, capsys):
    take = make_take(tmp_path, 3)
    run_main(annotate, take, "--out", tmp_path / "words.jsonl")
    assert "give their pictures with --frames" in capsys.readouterr().out
    assert_refused("words.jsonl, line 1: there is no picture .*None", distill, "--data", tmp_path / "words.jsonl", "--out", tmp_path / "run")
    assert_refused("nowhere", annotate, take, "--frames", tmp_path / "nowhere")
    assert_refused("holds 240 pictures for the 3 rows", annotate, take, "--frames", demo / "images")
    assert_refused("belongs to one INPUT", annotate, take, take, "--frames", demo / "images")

def test_fuzzed_files_give_no_traceback(demo, tmp_path):
    rng, lines = np.random.default_rng(0), make_take(tmp_path, 3).read_bytes()
    mediapipe = {"faceBlendshapes": [{"categories": [{"categoryName": name, "score": 0.1} for name in NAMES]}]}
    good = {".jsonl": (demo / "val.jsonl").read_bytes().split(b"\n")[0], ".csv": lines, ".json": json.dumps([mediapipe]).encode()}
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
