"""Tests of the four stages: CPU, no network. Run with: pytest test_all.py"""
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: a GPU rounds differently

import inspect
import itertools
import json
import math
import multiprocessing
import re
import runpy
import shlex
import socket
import sys
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import DEFAULT, Mock, call

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
NAMES = annotate.ARKIT_NAMES
FIELDS = ["expression_category", "muscle_movements", "emotional_implication", "symmetry"]
ZEROS = dict.fromkeys(NAMES, 0.0)

def run_main(module, *args):
    module.main(module.parse_args([str(arg) for arg in args]))

def run_rank(rank: int, port: int, name: str, args: list) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    run_main(SCRIPTS[name], *args)

def run_in_two_processes(name: str, *args) -> None:
    """Runs a stage with the variables that torchrun sets. The processes are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_all"])
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    with ProcessPoolExecutor(2, context) as pool:
        list(pool.map(run_rank, range(2), 2 * [port], 2 * [name], 2 * [args], timeout=300))

def run_script(monkeypatch, path: Path, *argv) -> str:
    """Runs a file as a program that ends early. Returns its last message."""
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    return end.value.code

def assert_refused(message: str, refusing, *args):
    """Expects a ValueError or OSError of a stage or a function. The user reads the first 400 characters of its first line."""
    with pytest.raises((ValueError, OSError)) as error:
        run_main(refusing, *args) if inspect.ismodule(refusing) else refusing(*args)
    assert re.search(message, str(error.value).partition("\n")[0][:400]), error.value

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

def first_records(demo: Path, folder: Path, count: int) -> Path:
    records = [{**record, "image": str(demo / record["image"])} for record in read_jsonl(demo / "train.jsonl")[:count]]
    return write_jsonl(folder / f"first{count}.jsonl", records)

@pytest.fixture
def record(demo) -> dict:
    return {**read_jsonl(demo / "train.jsonl")[0], "image": str(demo / "images" / "000000.png")}

@pytest.fixture(scope="session")
def trained(demo, tmp_path_factory) -> Path:
    """The tiny model, overfitted to eight faces."""
    folder = tmp_path_factory.mktemp("trained")
    run_main(distill, "--data", first_records(demo, folder, 8), "--batch-size", 4, "--steps", 150, "--no-replace-words",
             "--out", folder / "run")
    return folder / "run"

# ---- All scripts: copies, errors, README -----------------------------------------------------------------------------
def test_copied_pieces_are_identical():
    sources = [(ROOT / f"{name}.py").read_text() for name in SCRIPTS]
    assert len({re.search(r"# The 52 ARKit names.*?split\(\)", source, re.S).group() for source in sources}) == 1
    for one, names in ((distill, ["open_image", "prompt_text", "answer_skeleton", "load_base"]),
                       (annotate, ["list_pictures", "complete_lines"])):
        for name in names:
            assert inspect.getsource(getattr(one, name)) == inspect.getsource(getattr(infer, name))
    assert all(getattr(distill, name) == getattr(infer, name) for name in ("FIELDS", "VALUES", "ANSWERS", "IMAGE_FORMATS"))
    assert all(getattr(annotate, name) == getattr(infer, name) for name in ("FIELDS", "PICTURES", "IMAGE_FORMATS"))
    assert annotate.BANDS[0] == evaluate.ACTIVE == 0.15 and len(set(NAMES)) == 52 and infer.FIELDS == FIELDS

@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_runs_without_the_others(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "copy.py").write_text((ROOT / f"{name}.py").read_text())
    for script in SCRIPTS:
        monkeypatch.setitem(sys.modules, script, None)  # importing it fails
    run_script(monkeypatch, tmp_path / "copy.py", "--help")
    assert "--out" in capsys.readouterr().out

@pytest.mark.parametrize("name, flags", [("annotate", []), ("distill", ["--data"]), ("infer", []), ("evaluate", [])])
def test_errors_end_in_one_line_of_at_most_400_characters(name, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = run_script(monkeypatch, ROOT / f"{name}.py", *flags, "missing/" * 60 + "labels.jsonl")
    assert "missing/missing" in message and "\n" not in message and len(message) == 400

def test_readme_commands_parse_and_its_code_map_is_true():
    readme = (ROOT / "README.md").read_text()
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", readme, re.S)).replace("$seed", "0").replace(" $@", "")
    commands = re.findall(r"^ *(?:python|torchrun[-a-z0-9 ]*) (\w+)\.py(.*)$", commands, re.M)
    assert {name for name, _ in commands} == set(SCRIPTS)
    for name, rest in commands:
        SCRIPTS[name].parse_args(shlex.split(rest.split("&&")[0], comments=True))
    pieces = re.findall(r"`(annotate|distill|infer|evaluate)\.(?!py`)(\w+)`", readme)
    assert len(pieces) >= 12 and all(hasattr(SCRIPTS[script], piece) for script, piece in pieces)

# ---- annotate.py: the words ------------------------------------------------------------------------------------------
# What the words mean, written independently of annotate.py: subject and verb, and the actions they describe.
SINGLE = {"inner brows raised": "browInnerUp", "cheeks puffed": "cheekPuff", "lips funneled": "mouthFunnel",
    "jaw opened": "jawOpen", "lips puckered": "mouthPucker", "lips closed over the jaw": "mouthClose",
    "upper lip rolled in": "mouthRollUpper", "lower lip rolled in": "mouthRollLower", "upper lip pushed up": "mouthShrugUpper",
    "lower lip pushed up": "mouthShrugLower", "mouth shifted left": "mouthLeft", "mouth shifted right": "mouthRight",
    "jaw pushed forward": "jawForward", "jaw shifted left": "jawLeft", "jaw shifted right": "jawRight",
    "tongue put out": "tongueOut"}
SIDED = {"outer brow raised": "browOuterUp", "brow lowered": "browDown", "eye closed": "eyeBlink", "eye widened": "eyeWide",
    "eye squinted": "eyeSquint", "eye looking up": "eyeLookUp", "eye looking down": "eyeLookDown", "cheek raised": "cheekSquint",
    "nostril pulled up": "noseSneer", "lip corner raised": "mouthSmile", "lip corner lowered": "mouthFrown",
    "lip corner tucked in": "mouthDimple", "lip corner stretched": "mouthStretch", "lip side pressed": "mouthPress",
    "upper lip side raised": "mouthUpperUp", "lower lip side lowered": "mouthLowerDown"}
PAIRED = {words: (stem + "Left", stem + "Right") for words, stem in SIDED.items()}
# The left eye looks to the left by turning out, away from the nose, the right eye by turning in.
PAIRED |= {"eye looking left": ("eyeLookOutLeft", "eyeLookInRight"), "eye looking right": ("eyeLookInLeft", "eyeLookOutRight")}
SIGNS = {  # at least one of these moves where an emotion is named
    "happiness": ("mouthSmile", "cheekSquint"), "sadness": ("browInnerUp", "browDown", "mouthFrown"),
    "surprise": ("browInnerUp", "browOuterUp", "eyeWide", "jawOpen"), "anger": ("browDown", "eyeWide", "eyeSquint", "mouthPress"),
    "fear": ("browInnerUp", "browOuterUp", "browDown", "eyeWide", "eyeSquint", "mouthStretch", "jawOpen"),
    "disgust": ("noseSneer", "mouthUpperUp", "mouthFrown"), "contempt": ("mouthSmile", "mouthDimple")}
STRENGTHS = ["at rest", "slightly", "moderately", "strongly"]

def read_movements(text: str) -> dict:
    """{ARKit name: strength} of what a description says."""
    said = {}
    for phrase in re.sub(r"[A-Z]\w+: |\.", "", text.replace(". ", ", ")).split(", ") if ":" in text else []:
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
    """Compares every field of a description with the numbers, without a table of annotate.py."""
    true = {name: sum(value >= limit for limit in (0.15, 0.4, 0.7)) for name, value in face.items()}
    moving = {name: level for name, level in true.items() if level}
    assert read_movements(words["muscle_movements"]) == moving
    assert moving or words["muscle_movements"] == "No visible movement."
    emotional = {name: level for name, level in moving.items() if not name.startswith(("eyeLook", "eyeBlink"))}
    degree, category = re.fullmatch("(slight |strong |)(.+)", words["expression_category"]).groups()
    assert (category == "neutral") == (not emotional)
    if category in ("neutral", "movement without a clear emotion"):
        assert words["emotional_implication"] == "not clearly observable"
    else:
        first, *second = emotions = category.split(" mixed with ")
        assert all(any(name.startswith(SIGNS[emotion]) for name in emotional) for emotion in emotions)
        level = max(level for name, level in emotional.items() if name.startswith(SIGNS[first]))
        assert second or degree == ["", "slight ", "", "strong "][level]
        corners = [side for side in ("Left", "Right") if true["mouthSmile" + side] or true["mouthDimple" + side]]
        assert "contempt" not in emotions or len(corners) == 1
    sides, said = {}, {}  # the sides of each region on which some pair is stronger
    for left, right in PAIRED.values():
        if true[left] != true[right] and not left.startswith("eyeLook"):
            region = {"br": "brows", "ey": "eyes", "no": "nose", "ch": "cheeks", "mo": "mouth"}[left[:2]]
            sides.setdefault(region, set()).add("left" if true[left] > true[right] else "right")
    phrase = r"(?:stronger on ((?:(?:, )?the (?:left|right) side of the \w+)+))?(?:; )?(?:mixed in the (.+))?"
    uneven, mixed = re.fullmatch(phrase, words["symmetry"].replace("symmetric", "")).groups()
    for side, region in re.findall(r"the (left|right) side of the (\w+)", uneven or ""):
        said[region] = {side}
    said |= {region: {"left", "right"} for region in (mixed.split(", ") if mixed else [])}
    assert said == sides and (said or words["symmetry"] == "symmetric")

def random_faces(count: int, seed: int = 0):
    """Sparse and dense faces, many values at or next to the limits 0.15, 0.4 and 0.7, pairs that move nearly alike."""
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
    for face in [*random_faces(2000), *drawn]:
        assert_words_fit(face, annotate.describe(face))

@pytest.mark.parametrize("face, expected", [
    ({"mouthSmileLeft": 0.14, "mouthSmileRight": 0.16}, [
        "contempt mixed with happiness", "Mouth: right lip corner slightly raised.",
        "disdain or smugness, with joy or amusement", "stronger on the right side of the mouth"]),
    ({"mouthPressLeft": 0.9, "mouthDimpleRight": 0.2, "browDownLeft": 0.8}, [
        "strong anger", "Brows: left brow strongly lowered. Mouth: right lip corner slightly tucked in, left lip side "
        "strongly pressed.", "irritation or determination", "stronger on the left side of the brows; mixed in the mouth"])])
def test_description_of_known_faces(face, expected):
    assert list(annotate.describe({**ZEROS, **face}).values()) == expected

# ---- annotate.py: drawings and files ---------------------------------------------------------------------------------
LEFT_OUT = "records skipped (no face, no values or no prediction)"

def read_input(path, *flags) -> tuple[list, Counter]:
    args, counts = annotate.parse_args([str(path), *map(str, flags)]), Counter()
    return list(annotate.read_records(Path(path), args, counts).values()), counts

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

def test_demo_is_reproducible(demo, tmp_path):
    run_main(annotate, "--demo", 240, "--out", tmp_path)
    for file in sorted(demo.rglob("*.*")):
        assert file.read_bytes() == (tmp_path / file.relative_to(demo)).read_bytes()

def test_pictures_are_found_through_a_link(record, tmp_path, monkeypatch):
    for folder in ("work", "disk/large/data"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    Path("data").symlink_to(tmp_path / "disk" / "large" / "data")  # from there, .. does not lead back
    labels = write_jsonl(Path("a.jsonl"), [{**record, "image": os.path.relpath(record["image"])}])
    run_main(annotate, labels, "--out", "data/again.jsonl")
    image, = infer.list_images(["data/again.jsonl"])
    assert image.resolve() == Path(record["image"])

def test_demo_splits_by_identity(demo, tmp_path, capsys):
    other = tmp_path / "new" / "demo"
    run_main(annotate, "--demo", 250, "--out", other, "--seed", 1)  # 10 faces more, half a person's
    assert f"next: python distill.py --data {other}/train.jsonl" in capsys.readouterr().out
    parts = [read_jsonl(folder / f"{name}.jsonl") for folder in (demo, other) for name in ("train", "val")]
    people = [{record["identity"] for record in part} for part in parts]
    assert list(map(len, parts)) == [220, 20, 220, 30]
    assert all(people) and len(set.union(*people)) == sum(map(len, people)) == 12 + 13

def test_takes_are_read_by_column_name(tmp_path):
    face = {name: round(k / 100, 2) for k, name in enumerate(NAMES)}
    columns = ["Extra", *[name[0].upper() + name[1:] for name in reversed(NAMES)], "Timecode"]
    rows = [columns, ["x", *[str(face[name]) for name in reversed(NAMES)], "00:00:00:00.000"], []]
    text = "\r\n".join(map(",".join, rows))
    (tmp_path / "take.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())  # byte order mark, CRLF, a blank line
    assert read_input(tmp_path / "take.csv") == ([{"image": None, "coefficients": face, "identity": "take"}], {})

def test_rows_without_values_are_left_out_and_counted_and_the_others_keep_their_frames(tmp_path):
    take = make_take(tmp_path, 4)
    lines = take.read_text().splitlines()
    lines[2] = "00:00:00:01.000,0" + "," * 61
    take.write_text("\n".join(lines + ["00:00:00:04.000,0"]))
    records, counts = read_input(take, "--frames", make_frames(tmp_path, "frame{}.png", range(1, 6)))
    assert [Path(record["image"]).name for record in records] == ["frame1.png", "frame3.png", "frame4.png"]
    assert [record["coefficients"]["jawOpen"] for record in records] == pytest.approx([0.0, 0.2, 0.3])
    assert counts == {LEFT_OUT: 2}

@pytest.mark.parametrize("every", [1, 3])
def test_frames_are_paired_in_natural_order_before_every_nth_is_kept(every, tmp_path):
    frames = make_frames(tmp_path, "Frame{}.png", [11, 10, 9, 8, 6, 5, 4, 3, 2, 1])
    Image.new("RGB", (8, 8)).save(frames / "frame7.JPG")
    for name in ("._Frame1.png", ".DS_Store", "notes.txt"):
        (frames / name).write_bytes(b"not a picture")
    records, _ = read_input(make_take(tmp_path, 11), "--frames", frames, "--every", every)
    assert [int(re.search(r"\d+", Path(record["image"]).name)[0]) for record in records] == list(range(1, 12, every))
    assert [record["coefficients"]["jawOpen"] for record in records] == pytest.approx([k / 10 for k in range(0, 11, every)])
    assert_refused("holds 11 pictures for the 3 rows", annotate, make_take(tmp_path, 3), "--frames", frames)

@pytest.mark.parametrize("form, count", [("javascript", {}), ("python", {}), ("bare", {LEFT_OUT: 1}), ("many", {LEFT_OUT: 1}),
    ("several", {"results with several faces, the first was taken": 1})])
def test_mediapipe_s_results_are_read(form, count, tmp_path):
    values = {name: round(k / 100, 2) for k, name in enumerate(NAMES) if name != "tongueOut"}
    keys = ("category_name", "score") if form == "python" else ("categoryName", "score")
    face = [dict(zip(keys, item)) for item in {"_neutral": 0.9, **values}.items()]
    results = {"javascript": {"faceBlendshapes": [{"categories": face}]}, "python": {"face_blendshapes": [face]},
               "bare": [face, []], "many": [{"faceBlendshapes": [{"categories": face}]}, {"faceBlendshapes": []}],
               "several": {"faceBlendshapes": [face, [{**one, "score": 0.5} for one in face]]}}
    (tmp_path / "anna.json").write_text("\ufeff" + json.dumps(results[form]), encoding="utf-8")
    records, counts = read_input(tmp_path / "anna.json")
    assert records == [{"image": None, "coefficients": {**values, "tongueOut": 0.0}, "identity": "anna"}]
    assert counts == {"records without tongueOut, set to 0": 1, **count}

@pytest.mark.parametrize("spell", [lambda name: re.sub("(?<!jaw)(?<!mouth)(Left|Right)$", lambda side: "_" + side[0][0], name),
    lambda name: name[0].upper() + name[1:]])
def test_records_with_other_spellings_are_read_and_keep_their_other_fields(spell, tmp_path):
    values = {name: round(k / 100, 2) for k, name in enumerate(NAMES)}
    path = write_jsonl(tmp_path / "a.jsonl", [{"coefficients": {spell(name): x for name, x in values.items()}, "age": 7}])
    assert read_input(path)[0] == [{"image": None, "coefficients": values, "age": 7}]

def test_values_a_little_beyond_0_and_1_are_clipped(tmp_path):
    face = {**ZEROS, "eyeLookInLeft": 1.053, "jawOpen": 1.1, "mouthLeft": -0.1, "mouthRight": 0.5}
    records, counts = read_input(write_jsonl(tmp_path / "a.jsonl", [{"coefficients": face}]))
    assert records[0]["coefficients"] == {**ZEROS, "eyeLookInLeft": 1, "jawOpen": 1, "mouthRight": 0.5} and not counts

def test_identity_is_the_flag_or_the_file_s_name_or_the_record_s(demo, tmp_path):
    take = make_take(tmp_path, 2)
    for path, flags, expected in ((take, [], "take"), (take, ["--identity", "anna"], "anna"),
                                  (demo / "val.jsonl", [], "id011"), (demo / "val.jsonl", ["--identity", "anna"], "anna")):
        assert {record["identity"] for record in read_input(path, *flags)[0]} == {expected}

def test_a_byte_order_mark_blank_lines_and_line_separators_do_no_harm(record, tmp_path):
    path, out = tmp_path / "labels.jsonl", tmp_path / "sub" / "new" / "o.jsonl"
    record["identity"] = "a\u2028b\x85c"  # str.splitlines would cut here
    path.write_text(f"\ufeff{json.dumps(record, ensure_ascii=False)}\n\n  \n", encoding="utf-8")
    run_main(annotate, path, "--out", out)
    for file in (path, out):
        assert [one["identity"] for one in distill.read_records(file)] == [record["identity"]]
        assert [image.resolve() for image in infer.list_images([str(file)])] == [Path(record["image"])]
        assert evaluate.read_records(str(file)).keys() == {record["image"]}

@pytest.mark.parametrize("module, argv", [*((annotate, ["a.jsonl", "--out", out]) for out in ("sub/../a.jsonl", "link.jsonl")),
    (annotate, ["a.jsonl", "--sheet", "a.jsonl"]),
    *((infer, ["a.jsonl", "--out", out]) for out in ("sub/../a.jsonl", "link.jsonl", "sub")),
    *((evaluate, ["a.jsonl", "b.jsonl", "--out", out]) for out in ("link.jsonl", "train.jsonl"))])
def test_nothing_that_was_read_is_overwritten(module, argv, record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sub", "images"):
        Path(name).mkdir()
    Path("images/000000.png").write_bytes(Path(record["image"]).read_bytes())
    for name in ("a.jsonl", "b.jsonl", "train.jsonl"):
        write_jsonl(Path(name), [{**record, "image": "images/000000.png"}])
    Path("link.jsonl").symlink_to("a.jsonl")
    before = {file: file.read_bytes() for file in Path().rglob("*.*")}
    assert_refused("would be overwritten", module, *argv)
    assert {file: file.read_bytes() for file in Path().rglob("*.*")} == before

def read_sheet(path: Path, place: int) -> tuple:
    """The picture and the cartoon face at one of the sheet's 24 places, as arrays."""
    left, top = place % 4 * 330, place // 4 * 190
    boxes = (left, top, left + 160, top + 160), (left + 160, top, left + 320, top + 160)
    return tuple(np.asarray(Image.open(path).crop(box)).astype(int) for box in boxes)

def test_the_sheet_shows_each_picture_next_to_its_own_face(demo, tmp_path):
    run_main(annotate, demo / "val.jsonl", "--sheet", tmp_path / "s.png")
    cells = [read_sheet(tmp_path / "s.png", place) for place in range(20)]
    distances = np.array([[np.abs(picture - face).mean() for _, face in cells] for picture, _ in cells])
    assert (distances.argmin(axis=1) == np.arange(20)).all() and distances.diagonal().max() < 12
    assert not (demo / "val.annotated.jsonl").exists()  # without --out, no records are written

def test_the_sheet_shows_24_records_evenly_spread(tmp_path, capsys):
    faces = [{"identity": f"p{k}", "coefficients": {**ZEROS, "jawOpen": 0.5}} for k in range(70)]
    path, sheet = write_jsonl(tmp_path / "a.jsonl", [*faces, {"coefficients": None}]), tmp_path / "s.png"
    run_main(annotate, path, "--sheet", sheet)
    for place, face in enumerate(faces[::3]):
        assert np.array_equal(read_sheet(sheet, place)[1], annotate.draw_face(face["coefficients"], face["identity"], 160))
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (6 * 190, 4 * 330, 3) and (pixels[1115:1140, 990:1100] == 0).any()  # the last index is readable
    assert re.search(f"1 {re.escape(LEFT_OUT)}\nwrote {sheet}: 24 of 70", capsys.readouterr().out)

# ---- annotate.py: the frozen language model --------------------------------------------------------------------------
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, with Qwen-VL's special tokens. As in Qwen's own, each digit is a token."""
    ids = {byte: k for k, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab=ids, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=special,
                                   eos_token="<|im_end|>", pad_token="<|endoftext|>")

def make_answer(**change) -> str:
    return json.dumps({**dict.fromkeys(annotate.FIELDS, "quite calm"), **change})

def make_llm(folder: Path, answer: str) -> Path:
    """A chat model that writes `answer`, one token, and ends."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([answer])
    tokenizer.chat_template = "{{ messages[0]['content'] }}Answer:{{ '?' if enable_thinking else '' }}"
    size, (colon, token) = 300, tokenizer.encode(":" + answer)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    with torch.no_grad():
        for weight in [*model.model.layers.parameters(), model.lm_head.weight]:
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight[token, colon] = model.lm_head.weight[tokenizer.eos_token_id, token] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

@pytest.mark.parametrize("answer, symmetry", [
    (make_answer(), "quite calm"), (f"Sure! ```json\n{make_answer()}\n``` Done.", "quite calm"),
    (make_answer(symmetry=" a\n \"wide\"  grin, \\o/ ", note=5), 'a "wide" grin, \\o/'), *((answer, None) for answer in (
        "calm", "{}", make_answer()[:-1], make_answer(symmetry=" "), make_answer(symmetry=None), make_answer(symmetry=["a"]),
        2 * make_answer(), "}{", '{"a": ' * 2000 + "}"))])
def test_a_frozen_llm_writes_the_fields_and_rules_step_in_if_its_answer_is_not_valid(answer, symmetry, demo, tmp_path, capsys):
    llm, true = make_llm(tmp_path / "llm", answer), read_jsonl(demo / "val.jsonl")[:3]
    path = write_jsonl(tmp_path / "three.jsonl", [{**record, "image": None} for record in true])
    run_main(annotate, path, "--batch-size", 2, "--llm", llm, "--device", "cpu", "--out", tmp_path / "o.jsonl")
    annotator = str(llm) if symmetry else "rules"
    assert re.search(f"{re.escape(repr({annotator: 3}))}\nnext: python distill.py --data .*o.jsonl", capsys.readouterr().out)
    for record, by_rules in zip(read_jsonl(tmp_path / "o.jsonl"), true, strict=True):
        words = {**dict.fromkeys(FIELDS, "quite calm"), "symmetry": symmetry} if symmetry else by_rules["description"]
        assert record == {**by_rules, "image": None, "description": words, "annotator": annotator}

def test_the_model_is_told_the_active_coefficients():
    chat, = annotate.make_chat({**ZEROS, "jawOpen": 0.15, "jawLeft": 0.149, "cheekPuff": 0.456})
    assert chat["role"] == "user" and chat["content"].endswith(": {'jawOpen': 0.15, 'cheekPuff': 0.46}")

def test_an_interrupted_annotation_continues_with_resume_only(demo, tmp_path, monkeypatch):
    labels, others = (write_jsonl(tmp_path / name, [{**record, "image": None} for record in read_jsonl(demo / name)[:7]])
                      for name in ("val.jsonl", "train.jsonl"))
    complete, out = tmp_path / "complete.jsonl", tmp_path / "parts.jsonl"
    run_main(annotate, labels, "--out", complete)
    describe = Mock(wraps=annotate.describe, side_effect=[*[DEFAULT] * 4, KeyboardInterrupt, *[DEFAULT] * 17])
    monkeypatch.setattr(annotate, "describe", describe)
    with pytest.raises(KeyboardInterrupt):
        run_main(annotate, labels, "--out", out)
    left, = tmp_path.glob("parts.jsonl.*")
    kept = left.read_bytes()
    left.write_bytes(kept + '{"image": "torn é'.encode()[:-1])  # cut in the middle of a character
    run_main(annotate, others, "--out", tmp_path / "parts.jsonl", "--resume")  # other faces
    assert describe.call_count == 5 + 7 and left.exists()
    run_main(annotate, labels, "--out", out, "--resume")
    assert describe.call_count == 12 + 3 and out.read_text() == complete.read_text() and not left.exists()
    left.write_bytes(kept)
    run_main(annotate, labels, "--out", out)  # starts over
    assert describe.call_count == 15 + 7 and out.read_text() == complete.read_text()

HEADER, ROW = ",".join(infer.COLUMNS[:54]), "00:00:00:00.000,52" + ",0.0" * 52

@pytest.mark.parametrize("name, content, message", [
    *(("a.jsonl", text, "line 1.*one line of") for text in ('{"image": ', "[1]", "null", "[" * 5000, "{}")),
    ("a.jsonl", "", "no usable record"), ("a.json", "{torn", ", the file: "),
    *(("a.jsonl", json.dumps({"coefficients": values}), message) for values, message in (
        ({"jawOpen": 0.5}, "52 ARKit"), ([0.5], "0.5"), ({**ZEROS, "jawDrop" * 999: 0.5}, "missing or unknown; .*52 ARKit"),
        ({**ZEROS, "EyeBlinkLeft": 0.5}, "eyeBlinkLeft appears twice"), ({**ZEROS, "jaw_L": 0.5}, "jawLeft appears twice"),
        *(({**ZEROS, "jawOpen": value}, "line 1: jawOpen is ") for value in (math.nan, "0.5", True, None, 1.2, -0.11, math.inf)))),
    *(("a.json", json.dumps(value), f"result 1{message}") for value, message in (
        ({"facsNames": [], "weightMat": []}, ".*facsNames"), ([1, 2], ""), ("text", ""), ([[0.1] * 52], ""),
        ({"faceBlendshapes": [[{"score": 1}]]}, ".*categoryName"),
        ({"faceBlendshapes": [[{"categoryName": "jawOpen", "score": 0.5}] * 2]}, ".*jawOpen appears twice"))),
    *(("a.csv", "\n".join(lines), message) for *lines, message in (
        (HEADER.replace(",", ";"), ROW, "no column.*Timecode;"), (ROW, ROW, "no column.*00:00"), (HEADER, "no usable record"),
        (HEADER, ROW, ROW[:80], "line 3: Jaw\\w+ is ''"), (f"{HEADER},eyeBlinkLeft", f"{ROW},0.1", "appears twice"),
        *((HEADER, ROW.replace(",0.0", f",{cell}", 1), f"line 2: {message}") for cell, message in (
            ("", "EyeBlinkLeft is ''"), ("x", "EyeBlinkLeft is 'x"), ("1.27", "EyeBlinkLeft is 1.27, expected 0 to 1,"),
            ("2.0", "EyeBlinkLeft is 2.0, expected 0 to 1 .divide percentages"))),
        (HEADER.replace("JawOpen", "Jaw"), ROW, "jawOpen missing or unknown")))])
def test_bad_labels_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    assert_refused(f"{name}.*{message}", annotate, tmp_path / name)
    assert os.listdir(tmp_path) == [name]

# ---- distill.py: the answer and the loss -----------------------------------------------------------------------------
def make_qwen(folder: Path, kind: str = "qwen3_vl", seed: int = 0) -> Path:
    """An untrained Qwen-VL in the files of the hub. Its tokenizer splits numbers into digits."""
    tokenizer, patch = byte_tokenizer(), 16 if kind == "qwen3_vl" else 14
    ids = {f"{name.removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
    text = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope, "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "patch_size": patch,
              "window_size": 56, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1]}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **ids)
    processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2)
    for part in (AutoModelForImageTextToText.from_config(config), tokenizer, processor):
        part.save_pretrained(folder)
    (folder / "prompt.txt").write_text("You read faces.\n---\nRead.\n")
    return folder

@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> Path:
    return make_qwen(tmp_path_factory.mktemp("qwen") / "hub")

def load_qwen(folder: Path):
    return infer.load(folder, prompt_file=folder / "prompt.txt")

def make_dataset(demo: Path, supervision: str, folder: Path = None):
    """The tiny model, or that of a folder, and the first eight records."""
    args, records = distill.parse_args(["--supervision", supervision]), distill.read_records(demo / "train.jsonl")[:8]
    torch.manual_seed(0)
    model, *processors = distill.load_base(folder, torch.float32) if folder else distill.build_tiny(records)
    return model, distill.FaceDataset(records, *processors, args)

def run_args(*flags):
    args = distill.parse_args(list(map(str, flags)))
    args.rank, args.world_size = 0, 1
    return args

HEADS = ["Facial Expression Category", "Muscle Movements", "Emotional Implication", "Symmetry"]

def write_answer(description: dict, coefficients: dict, supervision: str) -> str:
    """The answer form, written independently of the scripts."""
    words = "\n".join(f"{k}. **{head}**: {description[field]}" for k, (head, field) in enumerate(zip(HEADS, FIELDS), 1))
    numbers = json.dumps({name[0].upper() + name[1:]: float(f"{value:.1f}") + 0.0 for name, value in coefficients.items()})
    return "\n\n".join({"semantic": [words, numbers], "numbers-first": [numbers, words], "numeric": [numbers]}[supervision])

@pytest.mark.parametrize("supervision", ["semantic", "numeric", "numbers-first"])
def test_exactly_the_answer_and_its_end_are_supervised(demo, supervision):
    _, dataset = make_dataset(demo, supervision)
    dataset.records[0]["coefficients"]["jawOpen"] = -0.0  # which is written 0.0
    batch, decode = dataset.batch(range(3)), dataset.tokenizer.decode
    for row, record in enumerate(dataset.records[:3]):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        tokens, roles = dataset.encode(record, 16).unbind(-1)
        answer = write_answer(record["description"], record["coefficients"], supervision) + "<|im_end|>"
        assert decode(labels[labels != -100]) == answer and (labels[labels != -100] == ids[labels != -100]).all()
        assert decode(ids).rstrip(decode([0])) == distill.prompt_text(distill.PROMPT, 16) + answer
        words = "".join(f" {text}" for text in record["description"].values()) if supervision != "numeric" else ""
        assert tokens.equal(ids[:len(tokens)]) and decode(tokens[roles == distill.WORD_TOKEN]) == words

@pytest.mark.parametrize("digits_are_split", [False, True])
def test_loss_equals_the_library_s(digits_are_split, demo, qwen, monkeypatch):
    model, dataset = make_dataset(demo, "semantic", qwen if digits_are_split else None)
    batch = dataset.batch(range(4))
    nats = distill.answer_loss(model, batch)
    nats.backward()
    grad, lengths = model.lm_head.weight.grad.clone(), [len(dataset.example(index)[2]) for index in range(4)]
    output = model(**{name: batch[name] for name in ("input_ids", "pixel_values", "image_grid_thw", "labels")},
        mm_token_type_ids=(batch["input_ids"] == model.config.image_token_id).long(),
        attention_mask=(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long())
    assert (nats / (batch["labels"] != -100).sum()).item() == pytest.approx(output.loss.item(), abs=1e-5)
    model.zero_grad()
    monkeypatch.setattr(distill, "LOSS_LOGITS", 10 * len(dataset.tokenizer))  # in parts of ten tokens
    parts = distill.answer_loss(model, batch)
    parts.backward()
    assert parts.item() == pytest.approx(nats.item(), rel=1e-5) and torch.allclose(model.lm_head.weight.grad, grad, atol=1e-2)

def replaced(seed: int, rows: int = 400) -> tuple:
    """Words 100 ... 139 in columns 2 to 11 of each row, replaced."""
    ids = torch.arange(rows * 16).view(rows, 16) % 40 + 100
    ids[:, :2] = ids[:, 12:] = 7  # these are not words
    is_word = ids >= 100
    return ids, is_word, distill.replace_words(ids, is_word, torch.Generator().manual_seed(seed))

def test_words_are_replaced_by_words_of_the_batch_at_a_rate_drawn_per_face():
    ids, is_word, changed = replaced(0)
    assert changed[~is_word].equal(ids[~is_word]) and set(changed[is_word].tolist()) <= set(ids[is_word].tolist())
    rates = (changed != ids)[:, 2:12].float().mean(dim=1)  # U(0, 1) with a mean of 1/2, a variance of 1/12, and noise
    assert rates.mean().item() == pytest.approx(0.5, abs=0.05)
    assert rates.std().item() == pytest.approx((1 / 12 + 1 / 60) ** 0.5, abs=0.04)
    assert replaced(0)[2].equal(changed) and not replaced(1)[2].equal(changed)
    for rows in (1, 2):  # a single face keeps its words
        ids, _, changed = replaced(0, rows)
        assert changed.equal(ids) == (rows == 1)

def test_the_words_of_training_batches_are_replaced_in_the_same_way_after_a_resume(demo):
    _, dataset = make_dataset(demo, "semantic")
    args = run_args("--steps", 6, "--batch-size", 4)
    batches, order = list(distill.load_batches(dataset, args, 0)), distill.batch_order(8, args)
    for batch, indices in zip(batches, order, strict=True):
        plain, roles = dataset.batch(indices), [dataset.encode(dataset.records[index], 16)[:, 1] for index in indices]
        is_word = torch.nn.utils.rnn.pad_sequence(roles, batch_first=True) == distill.WORD_TOKEN
        assert batch["labels"].equal(plain["labels"]) and not batch["input_ids"].equal(plain["input_ids"])
        assert batch["input_ids"][~is_word].equal(plain["input_ids"][~is_word])
    resumed = list(distill.load_batches(dataset, args, 4))
    assert [batch["input_ids"].tolist() for batch in resumed] == [batch["input_ids"].tolist() for batch in batches[4:]]

# ---- distill.py: training --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [(16,), (4, 2, 5)])
def test_muon_equals_the_library_s_block_by_block(width, monkeypatch):
    monkeypatch.setattr(distill, "MUON_ROWS", 8)
    torch.manual_seed(0)
    ours = [torch.full((rows, *width), 0.5).requires_grad_() for rows in (24, 8, 16)]
    optimizer = distill.Muon(ours, {"lr": 0.02})
    theirs = [part.flatten(1).clone().requires_grad_() for p in ours for part in p.detach().split(8)]
    library = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for q in theirs:
            q.grad = torch.randn(q.shape) * 1e-4  # the size does not matter
        for p, grad in zip(ours, torch.cat([q.grad for q in theirs]).split([24, 8, 16])):
            p.grad = grad.view_as(p)
        optimizer.step()
        library.step()
    for p, q in zip([part for p in ours for part in p.detach().split(8)], theirs):
        step, expected = (value.detach().flatten() - 0.5 for value in (p, q))  # theirs computes in bfloat16
        assert torch.cosine_similarity(step, expected, dim=0) > 0.999
        assert step.norm().item() == pytest.approx(expected.norm().item(), rel=0.02)

def test_batches_are_shared_out_and_cover_every_epoch():
    args, orders = distill.parse_args(["--steps", "10"]), []
    for args.rank, args.world_size, args.batch_size in ((0, 1, 2), (0, 2, 1), (1, 2, 1)):
        orders.append(distill.batch_order(10, args))
    complete = sum(orders[0], [])
    assert sorted(complete[:10]) == sorted(complete[10:]) == list(range(10)) and complete[:10] != complete[10:]
    assert [one + two for one, two in zip(*orders[1:])] == orders[0]

def test_gradients_are_clipped_and_the_learning_rate_warms_up_and_falls(demo, tmp_path, monkeypatch):
    scales = [distill.lr_scale(step, 1000) for step in (0, 29, 500, 999)]
    assert scales == pytest.approx([1 / 30, 0.998, 0.515, 0.03], abs=2e-3)
    monkeypatch.setattr(distill, "save_state", Mock())
    model, dataset = make_dataset(demo, "numeric")
    args, sizes, rates, optimizer = run_args("--steps", 2, "--lr", 0.3, "--out", tmp_path), [], [], Mock(param_groups=[{}])
    args.done, args.samples_per_step = 0, 8
    optimizer.step = lambda: (sizes.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()),
                              rates.append(optimizer.param_groups[0]["lr"]))
    distill.train(model, [optimizer], dataset, Mock(records=[]), args)
    assert sizes == pytest.approx([1.0, 1.0], rel=1e-3) and rates == pytest.approx([0.3 / 30, 0.3 / 15 * 0.515], rel=1e-3)

def test_tiny_model_learns_faces_by_heart_and_its_words_fit_its_numbers(trained, demo, tmp_path):
    assert read_jsonl(trained / "log.jsonl")[-1]["loss"] < 0.15 * math.log(11)
    seen, path, own = first_records(demo, tmp_path, 8), tmp_path / "p.jsonl", tmp_path / "own.jsonl"
    run_main(infer, seen, "--model", trained, "--estimate", "mode", "--out", path)
    run_main(annotate, path, "--out", own)
    for truth, worst in ((seen, 0.04), (own, 0.0)):
        results = evaluated(tmp_path, path, truth)
        assert results["models"][str(path)]["mae"] <= worst < as_array(read_jsonl(seen)).mean()
        assert results["description"]["f1"] > 0.7

def test_the_log_has_the_mean_loss_of_all_tokens(demo, tmp_path, monkeypatch, capsys):
    """The first two steps, before any real update. Each step has two passes of two faces."""
    monkeypatch.setattr(distill, "SAVE_STEPS", 2)
    monkeypatch.setattr(distill, "time", Mock(time=Mock(side_effect=itertools.count())))  # each look at the clock takes a second
    flags = ["--data", first_records(demo, tmp_path, 8), "--val", demo / "val.jsonl", "--batch-size", 2, "--grad-accum", 2,
             "--steps", 3, "--lr", 1e-9, "--no-replace-words", "--out", tmp_path / "new" / "run"]
    run_main(distill, *flags)
    line, out = read_jsonl(tmp_path / "new" / "run" / "log.jsonl")[0], capsys.readouterr().out
    assert line["samples/s"] == 8 and "step 2, loss " in out  # two steps of four faces in one second
    assert out.startswith("settings: {") and f"next: python infer.py --model {flags[-1]}" in out
    model, data = make_dataset(demo, "semantic")
    args, losses = run_args(*flags), []
    order, val_records = distill.batch_order(8, args), distill.read_records(demo / "val.jsonl")
    val_set = distill.FaceDataset(val_records, data.tokenizer, data.image_processor, args)
    for batch in (data.batch(order[0] + order[1]), data.batch(order[2] + order[3]), val_set.batch(range(20))):
        losses.append((distill.answer_loss(model, batch) / (batch["labels"] != -100).sum()).item())
    assert (line["loss"], line["val_loss"]) == pytest.approx((sum(losses[:2]) / 2, losses[2]), abs=1e-4) and line["step"] == 2

def unfinished_run(demo: Path, folder: Path, monkeypatch, *flags) -> tuple[Path, Path]:
    monkeypatch.setattr(distill, "SAVE_STEPS", 2)
    data, run = first_records(demo, folder, 8), folder / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill, "validate", Mock(side_effect=KeyboardInterrupt))  # it is called after a save
        run_main(distill, "--data", data, "--val", data, "--batch-size", 2, "--out", run, *flags)
    return data, run

@pytest.mark.parametrize("kind", ["tiny", "lora"])
def test_an_interrupted_run_resumes_to_the_same_weights(kind, demo, qwen, tmp_path, monkeypatch):
    flags = ["--steps", 4, "--grad-accum", 2]
    if kind == "lora":
        flags += ["--model", qwen, "--lora-rank", 2, "--lr", 0.02]
    data, run = unfinished_run(demo, tmp_path, monkeypatch, *flags)
    assert torch.load(run / "state.pt")["args"]["done"] == 2 and not (run / "run.json").exists()
    flags += ["--data", data, "--val", data, "--batch-size", 2, "--out"]
    run_main(distill, *flags, tmp_path / "complete")
    assert_refused("holds a run", distill, *flags, run)
    run_main(distill, "--out", run, "--resume")  # the settings are in the state
    name = "model.safetensors" if kind == "tiny" else "adapter_model.safetensors"
    assert (tmp_path / "complete" / name).read_bytes() == (run / name).read_bytes()
    assert not (run / "state.pt").exists() and read_jsonl(run / "log.jsonl")[-1]["step"] == 4

def test_runs_with_other_records_or_of_the_first_edition_are_refused(demo, trained, tmp_path, monkeypatch):
    data, run = unfinished_run(demo, tmp_path, monkeypatch, "--steps", 4)
    data.write_text(data.read_text().replace("rules", "other", 1))
    assert_refused(f"{re.escape(str(data))} has changed", distill, "--out", run, "--resume")
    state, settings = torch.load(run / "state.pt"), json.loads((trained / "run.json").read_text())
    del state["args"]["answer"], settings["answer"]
    torch.save(state, run / "state.pt")
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert_refused("another answer form; train again", distill, "--out", run, "--resume")
    assert_refused("another answer form; train again", infer.load, tmp_path)

@pytest.mark.parametrize("failing, error", [("torch.save", RuntimeError("enforce fail at inline_container.cc")),
                                            ("distill.save_file", distill.SafetensorError("I/O error"))])
def test_a_full_disk_is_reported_and_the_last_save_is_kept(failing, error, demo, qwen, tmp_path, monkeypatch):
    _, run = unfinished_run(demo, tmp_path, monkeypatch, "--steps", 4, "--model", qwen)
    with monkeypatch.context() as patch:
        patch.setattr(failing, Mock(side_effect=error))
        assert_refused("could not be written .*disk full", distill, "--out", run, "--resume")
    run_main(distill, "--out", run, "--resume")  # nothing is lost

@pytest.mark.parametrize("kind, rank", [("qwen3_vl", 4), ("qwen2_5_vl", 4), ("qwen3_vl", 0)])
def test_real_architectures_from_a_folder(kind, rank, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(make_qwen(tmp_path / "hub", kind).parent)
    data, run = first_records(demo, tmp_path, 4), tmp_path / "run"
    flags = ["--model", "hub", "--data", data, "--val", data, "--epochs", 0.7, "--lr", 0.02, "--batch-size", 2,
             "--max-pixels", 8192, "--lora-rank", rank, "--out", run]
    monkeypatch.setattr(distill, "train", train := Mock(wraps=distill.train))
    run_main(distill, *flags)
    assert train.call_args.args[0].training  # a loaded model is not
    monkeypatch.chdir(ROOT)  # an adapter finds its base from any folder
    predictor, before = infer.load(run), load_qwen(tmp_path / "hub").model.state_dict()
    assert predictor.steps == 2 == read_jsonl(run / "log.jsonl")[-1]["step"]  # 0.7 x 4 faces / 2, rounded up
    after = predictor.model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and not any("visual" in name for name in changed)
    if rank:  # PEFT's format: all seven linear layers of both blocks, W + alpha / r B A
        weights = load_file(run / "adapter_model.safetensors")
        config = json.loads((run / "adapter_config.json").read_text())
        assert len(changed) == 14 and len(weights) == 28 and (config["r"], config["lora_alpha"]) == (rank, 2 * rank)
        assert predictor.trained_parameters == sum(weight.numel() for weight in weights.values())
        for stem in (name.removesuffix(".weight") for name in changed):
            low, high = (weights[f"base_model.model.{stem}.lora_{matrix}.weight"] for matrix in "AB")
            assert torch.allclose(after[f"{stem}.weight"], before[f"{stem}.weight"] + 2 * high @ low, atol=1e-6)
            assert re.fullmatch(config["target_modules"], stem)
    # The validation loss of what was written is that of what was trained.
    args, records = run_args(*flags), distill.read_records(data)
    val_set = distill.FaceDataset(records, predictor.tokenizer, predictor.image_processor, args)
    assert distill.validate(predictor.model, val_set, args) == pytest.approx(read_jsonl(run / "log.jsonl")[-1]["val_loss"], abs=1e-4)

@pytest.mark.parametrize("form", ["processes", "passes"])
def test_a_split_step_equals_a_single_one(form, demo, qwen, tmp_path):
    data = first_records(demo, tmp_path, 6)
    flags = ["--model", qwen, "--data", data, "--val", data, "--steps", 3, "--lr", 0.03]
    run_main(distill, *flags, "--batch-size", 2, "--out", tmp_path / "one")
    flags += ["--batch-size", 1, "--out", tmp_path / "two"]
    if form == "passes":
        run_main(distill, *flags, "--grad-accum", 2)
    else:
        run_in_two_processes("distill", *flags)
    (one,), (two,) = (read_jsonl(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert (one["step"], one["loss"], one["val_loss"]) == pytest.approx((3, two["loss"], two["val_loss"]), abs=1e-4)
    assert [infer.load(tmp_path / name).samples_per_step for name in ("one", "two")] == [2, 2]
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)

def make_unusable(folder: Path) -> dict:
    """Writes pictures that cannot be used. Returns {name: a word of the reason}."""
    folder.mkdir(exist_ok=True)
    make_noise((60, 40))[0].save(folder / "torn.jpg", quality=95)
    (folder / "torn.jpg").write_bytes((folder / "torn.jpg").read_bytes()[:1500])
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")  # Ghostscript would run it
    Image.new("RGB", (1, 300)).save(folder / "line.png")
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"  # 60,000 x 60,000 pixels
    chunk = b"\x00\x00\x00\x0d" + header + zlib.crc32(header).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x00IEND\xaeB`\x82")
    return {"torn.jpg": "truncated", "script.png": "identify", "line.png": "aspect ratio", "bomb.png": "decompression bomb"}

def test_unusable_pictures_are_left_out_and_named(record, tmp_path, capsys):
    unusable = make_unusable(tmp_path / "bad")
    records = [{**record, "image": f"bad/{name}"} for name in unusable] + [record]
    data, _ = (write_jsonl(tmp_path / name, records) for name in ("data.jsonl", "val.jsonl"))  # which is the default
    run_main(distill, "--data", data, "--steps", 3, "--batch-size", 6, "--out", tmp_path / "run")
    out, log = capsys.readouterr().out, read_jsonl(tmp_path / "run" / "log.jsonl")
    assert all(re.search(rf"left out: .*bad/{name} \(.*{reason}", out) for name, reason in unusable.items())
    assert log[-1]["step"] == 3 and math.isfinite(log[-1]["val_loss"])
    write_jsonl(data, records[:-1])
    assert_refused("none of the pictures can be used", distill, "--data", data, "--steps", 1, "--out", tmp_path / "other")

def test_a_field_of_the_description_becomes_one_line(record, tmp_path):
    record["description"] = {**record["description"], "symmetry": " left \n\n right "}
    records = distill.read_records(write_jsonl(tmp_path / "a.jsonl", [record]))
    assert records[0]["description"]["symmetry"] == "left right"

@pytest.mark.parametrize("change, message", [
    ({"image": None}, "line 2"), ({"image": "gone.png"}, "line 2: there is no picture .*gone.png"), ({"description": None}, "line 2"),
    *(({"description": {**dict.fromkeys(FIELDS, "a"), "symmetry": text}}, "line 2: symmetry")
      for text in ("<|im_end|>", "so <|image_pad|>", " \n")),
    *(({"coefficients": {**ZEROS, "jawOpen": value}}, "line 2: jawOpen is ") for value in (1.2, -0.1, math.nan))])
def test_unusable_records_are_named_with_their_line(change, message, record, tmp_path):
    path = write_jsonl(tmp_path / "changed.jsonl", [record, {**record, **change}])
    assert_refused(message, distill, "--data", path, "--steps", 1, "--out", tmp_path / "new")

def without(name: str, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if name not in key}, folder / "model.safetensors", {"format": "pt"})

@pytest.mark.parametrize("damage, message", [
    (lambda hub: (hub / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), "cannot be used"),
    (lambda hub: (hub / "model.safetensors").write_bytes((hub / "model.safetensors").read_bytes()[:50_000]), "cannot be used"),
    (lambda hub: without("mlp.gate_proj", hub), "lacks weights such as .*mlp.gate_proj"),
    (lambda hub: without("embed_tokens", hub), "lacks weights such as .*embed_tokens"),
    (lambda hub: (hub / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}'), "is bert"),
    (lambda hub: (hub / "config.json").write_text('{"model_type": "qwen3_5"}'), "is qwen3_5; expected .*qwen3_vl"),
    (lambda hub: (hub / "tokenizer.json").write_text("{"), "cannot be used")])
def test_base_models_that_are_damaged_or_of_another_kind_are_refused(damage, message, demo, tmp_path):
    damage(hub := make_qwen(tmp_path / "hub"))
    assert_refused(message, distill, "--data", demo / "train.jsonl", "--model", hub, "--out", tmp_path / "run")
    assert_refused(message, infer, demo / "val.jsonl", "--model", hub, "--prompt", hub / "prompt.txt", "--out", tmp_path / "p")

def test_pictures_are_shrunk_but_not_enlarged(demo, tmp_path):
    _, one = make_dataset(demo, "numeric")  # of 64 x 64 pixels, in patches of 8
    small = {**one.records[0], "image": tmp_path / "small.png"}
    make_noise((9, 9))[0].save(small["image"])  # this one is enlarged to one token
    for record, size, patches in ((one.records[0], 10 ** 6, 64), (one.records[0], 32 * 32, 16), (small, 10 ** 6, 4)):
        other = distill.FaceDataset([record], one.tokenizer, one.image_processor, run_args("--max-pixels", size))
        assert len(other.example(0)[0]) == patches

@pytest.mark.parametrize("device, checkpointing, rank, dtype", [("cpu", True, 9, torch.bfloat16), ("cuda", False, 0, torch.float32)])
def test_a_pretrained_model_is_prepared_as_the_flags_say(device, checkpointing, rank, dtype, qwen, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", compiled := Mock())
    flags = ["--dtype", "bfloat16", "--checkpointing" if checkpointing else "--no-checkpointing", "--lora-rank", rank]
    model, *_ = distill.load_pretrained(run_args("--model", qwen, "--device", device, *flags))
    layer = model.model.language_model.layers[0]
    assert layer.gradient_checkpointing == checkpointing and layer.input_layernorm.weight.dtype == dtype
    assert compiled.mock_calls == (2 * [call(dynamic=True)] if device == "cuda" else [])  # both layers
    assert device == "cpu" or torch._dynamo.config.suppress_errors  # there may be no C compiler
    embedded = model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long))
    assert embedded.requires_grad == (rank == 0) and not any(p.requires_grad for p in model.model.visual.parameters())
    if rank:  # PEFT draws A from U(-b, b), where b is 1 / sqrt(32) here, and sets B to 0
        assert 0.95 < layer.mlp.up_proj.lora_A.abs().max() * 32 ** 0.5 <= 1 and not layer.mlp.up_proj.lora_B.any()

def test_the_demo_is_drawn_if_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill.subprocess, "run", draw := Mock())
    assert_refused("gone.jsonl", distill, "--data", "gone.jsonl", "--out", "other")
    assert not draw.called
    assert_refused("data/demo/train.jsonl", distill)
    assert draw.call_args.args[0][1] == ROOT / "annotate.py"

# ---- infer.py: decoding ----------------------------------------------------------------------------------------------
def make_noise(*sizes: tuple) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]

def inputs_of(predictor, images: list) -> dict:
    size = {"shortest_edge": 256, "longest_edge": predictor.max_pixels}
    return infer.prepare(predictor, [predictor.image_processor([image], size=size, return_tensors="pt") for image in images])

@pytest.mark.parametrize("batch_size", [1, 8])
def test_forced_decoding_writes_what_generate_writes(batch_size, trained, demo):
    predictor = infer.load(trained)
    # Eight faces that were learnt, darker, and eight that were not: uncertain answers, but mostly complete.
    images = [infer.open_image(demo / record["image"]) for record in read_jsonl(demo / "train.jsonl")[:16]]
    images[:8], pairs = [image.point(lambda value: value * 0.9) for image in images[:8]], []
    # An answer counts if it has all headings and names, once and in order, and only the eleven values.
    slots = {**dict.fromkeys(NAMES, r"(0\.\d|1\.0)"), **dict.fromkeys(FIELDS, "[^\n]*"), None: ""}
    complete = "".join(re.escape(text) + slots[slot] for text, slot in infer.answer_skeleton("semantic"))
    for start in range(0, 16, batch_size):
        inputs = inputs_of(predictor, images[start:start + batch_size])
        shares, chosen, texts = infer.decode_answers(predictor, inputs)
        assert shares.argmax(dim=-1).equal(chosen) and shares.sum(dim=-1).sub(1).abs().max() < 1e-5
        tokens = predictor.model.generate(**inputs, do_sample=False, max_new_tokens=250)
        answers = predictor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        for written, row, words in zip(answers, chosen.tolist(), texts):
            pairs.append((written, write_answer(words, {name: k / 10 for name, k in zip(NAMES, row)}, "semantic")))
    pairs = [(written, forced) for written, forced in pairs if re.fullmatch(complete, written)]
    assert all(written == forced for written, forced in pairs)
    assert len(pairs) >= 10 and len({len(forced) for _, forced in pairs}) >= 4

def sharpened(folder: Path):
    """An untrained model has almost equal probabilities. This one has sharper attention and choices."""
    predictor = load_qwen(make_qwen(folder, seed=7))
    for name, weight in predictor.model.named_parameters():
        if re.search(r"language_model.*(q_norm|v_proj|down_proj)|lm_head", name):
            weight.data.mul_(10)
    return predictor

def greedy_answer(predictor, picture: Image.Image, limit: int) -> tuple[list, list]:
    """The texts and the numbers in tenths, by one forward pass over everything per token. Numbers have three tokens here."""
    inputs, tokenizer, answer, texts, numbers = inputs_of(predictor, [picture]), predictor.tokenizer, [], [], []
    def choose(options: list) -> int:
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], dim=1)
        kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(answer)))
        rows = {**inputs, "input_ids": ids, "mm_token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            return options[predictor.model(**rows).logits[0, -1][options].argmax()]
    def write_text(stop: str) -> None:
        start = len(answer)
        while len(answer) < start + limit:
            token = choose(list(range(len(tokenizer))))
            if token == tokenizer.eos_token_id or stop in tokenizer.decode([token]):
                break
            answer.append(token)
        texts.append(tokenizer.decode(answer[start:]).strip())
    digits, point = ([tokenizer.encode(text)[0] for text in group] for group in ("0123456789", "."))
    if predictor.supervision is None:
        write_text("{")
    for text, slot in infer.answer_skeleton(predictor.supervision or "numeric")[:-1]:
        answer += tokenizer.encode(text) if text else []
        if slot in FIELDS:
            write_text("\n")
        else:
            units = choose(digits[:2])
            answer += [units, *point]
            answer.append(choose(digits[:1] if units == digits[1] else digits))  # after "1." only "0" is allowed
            numbers.append(10 * digits.index(units) + digits.index(answer[-1]))
    return texts, numbers

@pytest.mark.parametrize("supervision", ["semantic", "numbers-first", None])
def test_every_token_is_greedy(supervision, tmp_path, monkeypatch):
    predictor, written, decode_text = sharpened(tmp_path / "hub"), [], infer.decode_text
    predictor.supervision = supervision
    decode = Mock(side_effect=lambda *args: written.append(decode_text(*args[:3], 6)) or written[-1])
    monkeypatch.setattr(infer, "decode_text", decode)
    pictures = make_noise((64, 64), (96, 64))
    shares, chosen, _ = infer.decode_answers(predictor, inputs_of(predictor, pictures))
    assert {call.args[2] for call in decode.mock_calls} == {"\n" if supervision else "{"}  # what ends a text
    assert shares.sum(dim=-1).numpy() == pytest.approx(1.0, abs=1e-5) and len(chosen.unique()) >= 8
    for row, picture in enumerate(pictures):
        assert ([texts[row] for texts in written], chosen[row].tolist()) == greedy_answer(predictor, picture, 6)

@pytest.mark.parametrize("stop, rows, texts", [
    ("\n", [["calm", "wide.\n2.", "calm"], ["calm", "<|im_end|>", "calm"], 3 * ["calm"]], ["calmwide.", "calm", 3 * "calm"]),
    ('{"', [["calm", "wide.\n2.", '{"Eye'], ["calm", '{"Eye', "calm"]], ["calmwide.\n2.", "calm"])])
def test_a_text_is_over_at_its_stop_at_the_end_token_and_at_its_limit(stop, rows, texts):
    tokenizer, state = byte_tokenizer(), Mock(mask=torch.ones(len(rows), 1, dtype=torch.long))
    tokenizer.add_tokens(["calm", "wide.\n2.", '{"Eye'])
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(row) for row in rows])
    steps = iter(torch.nn.functional.one_hot(ids[:, k:k + 1]).float() for k in range(3))
    state.model.lm_head = lambda last: next(steps)
    assert infer.decode_text(state, tokenizer, stop, 3) == texts

@pytest.mark.parametrize("zero, mean, choice", [(0.6, 0.6 * (0.7 * 0.2 + 0.3 * 0.4) + 0.4 * 1.0, 2), (0.3, 0.3 * 0.9 + 0.7, 10)])
def test_mean_of_split_digits(zero, mean, choice):
    """States are one-hot, so the rows of the matrix are scores: first 0 or 1, then tenths of 0.7 for 2 and 0.3 for 4."""
    value_ids = torch.tensor([[0, 10, k] for k in range(10)] + [[1, 10, 0]])  # tokens of "0.3": 0, point, 3
    weight = torch.full((11, 2), -30.0)
    weight[[0, 1], 0], weight[[2, 4], 1] = torch.tensor([zero, 1 - zero]).log(), torch.tensor([0.7, 0.3]).log()
    shares, chosen = infer.read_numbers(weight, torch.eye(2)[[0, 0, 1]].view(1, 1, 3, 2), value_ids)
    assert (shares @ (torch.arange(11) / 10)).item() == pytest.approx(mean, abs=1e-5) and chosen.item() == choice

@pytest.mark.parametrize("estimate, value", [("mean", 0.52), ("mode", 1.0)])
def test_estimates_of_a_known_distribution(estimate, value, trained, monkeypatch):
    shares = torch.tensor([0.3, 0, 0, 0, 0.3, 0, 0, 0, 0, 0, 0.4]).expand(1, 52, 11)
    monkeypatch.setattr(infer, "decode_answers", decode := Mock(return_value=(shares, torch.full((1, 52), 10), [{}])))
    record, = infer.predict(infer.load(trained), make_noise((9, 9)), estimate)
    assert len(decode.call_args.args[1]["pixel_values"]) == 4  # the picture has been enlarged to one token
    std = (0.3 * 0.52 ** 2 + 0.3 * 0.12 ** 2 + 0.4 * 0.48 ** 2) ** 0.5
    assert (record["coefficients"]["jawOpen"], record["std"]["jawOpen"]) == (value, round(std, 4))

@pytest.mark.parametrize("form", ["**{k}. {head}**\n{text}\n\n", "{k}. **{head}**: {text}  \n", "### {k}) {head}\n{text}\n",
                                  "{k}. **{head}**:\n   {text}\n"])
def test_headings_of_the_authors_answers_give_the_description(form):
    texts = [f"{head} {{text}}: more" for head in HEADS[:3]] + ["- **Eyes**: wide.\n   - **Jaw**: open."]
    sections = "".join(form.format(k=k, head=head, text=text) for k, (head, text) in enumerate(zip(HEADS, texts), 1))
    assert infer.read_headings(sections) == dict(zip(FIELDS, texts[:3] + ["- Eyes: wide. - Jaw: open."]))
    assert infer.read_headings("A calm face.") is None

# ---- infer.py: checkpoints -------------------------------------------------------------------------------------------
STEM = "base_model.model.model.language_model.layers.0.self_attn.q_proj"

def make_adapter(folder: Path, base: Path, change: dict = {}, **settings) -> Path:
    """An adapter as ms-swift writes it, of one module, with a prompt."""
    torch.manual_seed(0)
    weights = {f"{STEM}.lora_A.weight": torch.randn(3, 32), f"{STEM}.lora_B.weight": torch.randn(32, 3), **change}
    folder.mkdir(exist_ok=True)
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 3, "lora_alpha": 6, "bias": "none",
              "use_dora": False, "modules_to_save": [], "rank_pattern": {}, "init_lora_weights": True, "corda_config": None}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    (folder / "prompt.txt").write_text("Read.")
    return folder

def test_photos_with_a_foreign_adapter_end_in_numbers_a_take_and_charts(qwen, tmp_path):
    photos, adapter = tmp_path / "photos", make_adapter(tmp_path / "adapter", "/gone/hub/Qwen")
    photos.mkdir()
    for k, picture in enumerate(make_noise((80, 60), (60, 80), (64, 64)), 9):
        picture.save(photos / f"img{k}.jpg")
    out, take, charts = tmp_path / "a" / "b" / "p.jsonl", tmp_path / "c" / "d" / "take.csv", tmp_path / "e" / "charts"
    flags = [photos, "--model", adapter, "--prompt", adapter / "prompt.txt", "--out", out, "--csv", take, "--plot", charts]
    assert_refused("any other model needs --prompt", infer, *flags[:3])
    assert_refused("--base .*/gone/hub/Qwen", infer, *flags)
    run_main(infer, *flags, "--base", qwen)
    for k, record in zip((9, 10, 11), read_jsonl(out), strict=True):
        assert record["image"] == f"../../photos/img{k}.jpg" and record["error"] is None
        assert record["description"] is None  # it babbles, without headings
        assert list(record["coefficients"]) == list(record["std"]) == NAMES and max(record["std"].values()) > 0.1
    assert len(take.read_text().splitlines()) == 4
    assert {path.name for path in charts.iterdir()} == {f"00000{k}_img{k + 9}.png" for k in range(3)}

def test_the_prompt_has_the_system_text_the_picture_and_the_users_text(qwen, tmp_path):
    turns = [{"role": "system", "content": "You read faces."}, {"role": "user", "content": "<image>Read {this}."}]
    prompt = write_jsonl(tmp_path / "example.jsonl", [{"messages": turns, "images": ["a.jpg"]}])
    predictor = infer.load(qwen, prompt_file=prompt)
    text = predictor.tokenizer.decode(inputs_of(predictor, make_noise((64, 64)))["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou read faces.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>")
    assert text.endswith("<|vision_end|>Read {this}.<|im_end|>\n<|im_start|>assistant\n")

@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "eva"}, {"use_dora": None, "alora_invocation_tokens": None}])
def test_plain_lora_is_added_as_peft_scales_it(settings, qwen, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", qwen, **settings)
    updates = load_file(adapter / "adapter_model.safetensors")
    before, after = (load_qwen(folder).model.model.language_model.layers[0].self_attn.q_proj.weight for folder in (qwen, adapter))
    expected = before + 6 / 3 * updates[f"{STEM}.lora_B.weight"] @ updates[f"{STEM}.lora_A.weight"]
    assert torch.allclose(after, expected, atol=1e-5)
    infer.load(adapter, prompt_file=adapter / "prompt.txt", dtype="bfloat16")  # two bytes are fine

@pytest.mark.parametrize("setting, value", [
    ("bias", "all"), ("use_dora", True), ("use_rslora", True), ("use_qalora", True), ("alpha_pattern", {"q_proj": 9}),
    ("rank_pattern", {"q_proj": 9}), ("lora_bias", True), ("modules_to_save", ["lm_head"]), ("alora_invocation_tokens", [1]),
    ("trainable_token_indices", [1]), ("target_parameters", ["w"]), ("layer_replication", [[0, 1]]), ("fan_in_fan_out", True),
    ("peft_type", "LOHA"), *(("init_lora_weights", kind) for kind in ("pissa", "pissa_niter_4", "olora", "corda", "loftq"))])
def test_adapters_of_another_kind_are_refused_by_their_setting(setting, value, qwen, tmp_path):
    adapter = make_adapter(tmp_path, qwen, **{setting: value})
    assert_refused(f"{setting} = .*merge it with peft .*--model", load_qwen, adapter)

@pytest.mark.parametrize("stem, low, high, named", [
    (STEM, None, None, "holds no tensor"), (STEM, (3, 32), None, STEM), (STEM, (3, 31), (32, 3), STEM), (STEM, (3,), (3,), STEM),
    (STEM, (3, 1), (1, 3), STEM), (STEM, (0,), (0,), STEM), (STEM, (0, 32), (32, 0), STEM),
    *((f"base_model.model.{name}", (3, 32), (height, 3), name) for name, height in (
        ("gone", 32), ("lm_head", 263), ("model.language_model.embed_tokens", 263)))])
def test_adapters_whose_tensors_do_not_fit_are_refused(stem, low, high, named, qwen, tmp_path):
    assert load_qwen(qwen).model.lm_head.weight.shape == (263, 32)
    change = {f"{stem}.lora_{matrix}.weight": size and torch.ones(size) for matrix, size in (("A", low), ("B", high))}
    assert_refused(named, load_qwen, make_adapter(tmp_path, qwen, change))

def test_weights_of_one_byte_are_neither_trained_nor_updated(qwen, tmp_path, monkeypatch):
    model, *processors = infer.load_base(qwen, torch.float32)
    projection = model.model.language_model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.float8_e4m3fn))
    for module in (distill, infer):
        monkeypatch.setattr(module, "load_base", lambda *_: (model, *processors))
    assert_refused("one byte", distill.load_pretrained, run_args("--model", "x/y-FP8"))
    assert_refused(STEM, load_qwen, make_adapter(tmp_path, qwen))

USER = '{"role": "user", "content": "<image>\\nRead."}'

@pytest.mark.parametrize("text, prompt", [
    ("Read.\n", "Read."), ("A\n---\n\n Read.", "Read."), ('{"messages": [%s]}\n{}' % USER, "\nRead.")])
def test_prompts_are_read(text, prompt, tmp_path):
    (tmp_path / "prompt").write_text("\ufeff" + text, encoding="utf-8")
    assert infer.read_prompt(tmp_path / "prompt")[1] == prompt

@pytest.mark.parametrize("text", [
    "", " \n", "A\n---\n ", "Look <image> here.", '[{"messages": [%s]}]' % USER, '{"prompt": "Read."}', "{torn",
    *('{"messages": [{"role": "user", "content": %s}]}' % content for content in ('"Read <image>."', '[{"type": "text"}]'))])
def test_files_without_a_prompt_are_refused(text, tmp_path):
    (tmp_path / "prompt").write_text(text)
    assert_refused("--prompt .*prompt: .*expected a text file.*messages", infer.read_prompt, tmp_path / "prompt")

# ---- infer.py: pictures and files ------------------------------------------------------------------------------------
def test_any_picture_is_answered_or_reported(trained, tmp_path):
    folder, out, take = tmp_path / "bilder ü", tmp_path / "p.jsonl", tmp_path / "p.csv"
    reasons, photo = make_unusable(folder), make_noise((60, 40))[0]
    modes = {"gray.png": "L", "c.jpg": "CMYK", "p.gif": "P", "la.png": "LA", "b.png": "1", "B.WEBP": "RGB", "ünï 名.png": "RGBA"}
    for name, mode in modes.items():
        photo.convert(mode).save(folder / name)
    (folder / "notes.txt").touch()
    run_main(infer, folder, "--model", trained, "--out", out, "--csv", take)
    records = {Path(record["image"]).name: record for record in read_jsonl(out)}
    assert records.keys() == reasons.keys() | modes.keys()
    assert all(reason in records[name]["error"] for name, reason in reasons.items())
    for record in map(records.get, modes):
        assert record["error"] is None and list(record["description"]) == FIELDS
        assert list(record["coefficients"]) == NAMES and all(0 <= value <= 1 for value in record["coefficients"].values())
    assert len(take.read_text().splitlines()) == 1 + len(modes)

def test_pictures_are_turned_upright(tmp_path):
    picture, exif = Image.new("L", (60, 40)), Image.Exif()
    picture.paste(255, (0, 0, 30, 40))  # The left half is white. Upright, it is the upper half.
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    records = write_jsonl(tmp_path / "a.jsonl", [{"image": "a.jpg", "coefficients": ZEROS}])
    run_main(annotate, records, "--sheet", tmp_path / "s.png")
    upright, cell = np.asarray(infer.open_image(tmp_path / "a.jpg")), read_sheet(tmp_path / "s.png", 0)[0]
    assert upright.shape == (60, 40, 3)
    assert min(upright[10, 20].min(), cell[20, 80].min()) > 240 and max(upright[50, 20].max(), cell[140, 80].max()) < 15

def test_16_bits_are_scaled_and_transparency_becomes_white(tmp_path):
    gray = np.asarray(make_noise((60, 40))[0].convert("L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "gray16.png")
    assert np.abs(np.asarray(infer.open_image(tmp_path / "gray16.png")).astype(int) - gray[:, :, None]).max() <= 1
    for picture in (Image.new("RGBA", (2, 2), (0, 0, 0, 0)), Image.new("RGBA", (2, 2), (9, 9, 9, 0)).quantize(4)):
        picture.save(tmp_path / "glass.png")
        assert infer.open_image(tmp_path / "glass.png").getpixel((0, 0)) == (255, 255, 255)

def test_a_picture_given_twice_has_one_record(trained, demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("photos").symlink_to(demo / "images")
    names = ["photos/000000.png", "there/../photos/000000.png", "photos/000001.png", "photos/000000.png"]
    shots = write_jsonl(Path("shots.jsonl"), [{"image": name} for name in names])
    run_main(infer, shots, "--model", trained, "--out", "p.jsonl")
    assert [Path(record["image"]).name for record in read_jsonl(Path("p.jsonl"))] == ["000000.png", "000001.png"]
    assert re.search("wrote p.jsonl with 2 records, 0 .*\nnext.* python evaluate.py p.jsonl", capsys.readouterr().out)

@pytest.mark.parametrize("fps", [20, 24, 25, 30, 50, 60])
def test_a_take_plays_in_time_where_the_last_field_counts_sixtieths(fps, tmp_path):
    infer.write_livelink(tmp_path / "take.csv", 70 * [{"coefficients": ZEROS, "error": None}], fps)
    for k, row in enumerate((tmp_path / "take.csv").read_text().splitlines()[1:]):
        hours, minutes, seconds, sixtieths, thousandths = map(int, re.split("[:.]", row.split(",")[0]))
        time = 3600 * hours + 60 * minutes + seconds + (sixtieths + thousandths / 1000) / 60
        assert time == pytest.approx(k / fps, abs=0.002) and sixtieths < 60

def test_a_take_has_61_columns_and_gaps_where_a_picture_failed(tmp_path):
    good = {"coefficients": {**ZEROS, "eyeBlinkLeft": 0.25, "tongueOut": 1.0}, "error": None}
    infer.write_livelink(tmp_path / "take.csv", [good, {"error": "torn"}, good], fps=60)
    header, first, last = (line.split(",") for line in (tmp_path / "take.csv").read_text().splitlines())
    assert header[:4] == ["Timecode", "BlendshapeCount", "EyeBlinkLeft", "EyeLookDownLeft"] and len(header) == len(last) == 63
    assert header[53:55] == ["TongueOut", "HeadYaw"] and header[-1] == "RightEyeRoll"
    assert first[:3] == ["00:00:00:00.000", "61", "0.2500000000"] and first[53:55] == ["1.0000000000", "0.0000000000"]
    assert last[0] == "00:00:00:02.000"

def test_two_processes_infer_as_one(trained, demo, tmp_path):
    flags = [first_records(demo, tmp_path, 7), "--model", trained, "--batch-size", 2, "--out"]
    run_main(infer, *flags, tmp_path / "one.jsonl")
    run_in_two_processes("infer", *flags, tmp_path / "two.jsonl")
    for one, other in zip(read_jsonl(tmp_path / "one.jsonl"), read_jsonl(tmp_path / "two.jsonl"), strict=True):
        assert one["image"] == other["image"] and one["coefficients"] == pytest.approx(other["coefficients"], abs=2e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"first7.jsonl", "one.jsonl", "two.jsonl"}

def test_interrupted_inference_continues_with_resume_only(trained, demo, tmp_path, monkeypatch):
    flags = [first_records(demo, tmp_path, 7), "--model", trained, "--batch-size", 2, "--out"]
    complete, out = tmp_path / "complete.jsonl", tmp_path / "parts.jsonl"
    run_main(infer, *flags, complete)
    predict = Mock(wraps=infer.predict, side_effect=[DEFAULT] * 3 + [KeyboardInterrupt] + [DEFAULT] * 5)
    monkeypatch.setattr(infer, "predict", predict)
    with pytest.raises(KeyboardInterrupt):
        run_main(infer, *flags, out)
    part, = tmp_path.glob("parts.jsonl.*")
    kept = part.read_bytes()
    part.write_bytes(kept + '{"image": "torn é'.encode()[:-1])  # cut in the middle of a character
    run_main(infer, *flags, out, "--resume")
    assert predict.call_count == 5 and out.read_text() == complete.read_text()  # only the last batch was decoded again
    part.write_bytes(kept)
    run_main(infer, *flags, out)  # starts over
    assert predict.call_count == 9 and out.read_text() == complete.read_text()

@pytest.mark.parametrize("count, flags", [(5, ["--estimate", "mode"]), (6, [])])
def test_other_settings_or_pictures_do_not_continue_a_run(count, flags, trained, demo, tmp_path, monkeypatch):
    out = ["--model", trained, "--batch-size", 2, "--out", tmp_path / "p.jsonl"]
    predict = Mock(wraps=infer.predict, side_effect=[DEFAULT, KeyboardInterrupt, *[DEFAULT] * 3])
    monkeypatch.setattr(infer, "predict", predict)
    with pytest.raises(KeyboardInterrupt):
        run_main(infer, first_records(demo, tmp_path, 5), *out)
    run_main(infer, first_records(demo, tmp_path, count), *out, "--resume", *flags)
    assert predict.call_count == 2 + 3  # all three batches

@pytest.mark.parametrize("argument, message", [
    (".", "no pictures in"), ("missing.png", "missing.png"), ("missing.jsonl", "missing.jsonl"), ("a.jsonl", "line 2")])
def test_inputs_without_pictures_are_named(argument, message, record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("a.jsonl"), [record, {"picture": "a.png"}])
    assert_refused(message, infer, argument)

# ---- evaluate.py: metrics --------------------------------------------------------------------------------------------
def test_metrics_equal_those_of_scipy_and_scikit_learn():
    """The expected values are what scipy 1.17.1, scikit-learn 1.9.1 and, for CCC, numpy give for these arrays."""
    k = np.arange(40)
    true = np.stack([np.clip(np.sin(k * (c + 3)), 0, 1) for c in range(52)], axis=1)
    predicted = np.clip(0.8 * true + 0.1 * np.cos(k[:, None] * 7 + np.arange(52)) ** 2, 0, 1)
    expected = {"mae": 0.06865854089342599, "rmse": 0.08537527081535595, "f1": 0.979858464888405,
                "pearson_median": 0.9935772653815745, "pearson_above_0.8": 52, "ccc": 0.9673205851508341}
    found = evaluate.metrics(predicted, true)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert evaluate.metrics(*np.full((2, 1, 52), 0.15))["f1"] == 1  # 0.15 is active

def test_correlation_is_undefined_for_constant_truth_and_zero_for_a_constant_prediction():
    x = np.array([[0.1, 0.2, 0.3, 0.6]]).T
    r, ccc = evaluate.correlations(np.hstack([x, 0 * x]), np.hstack([0 * x, x]))
    assert np.isnan(r[0]) and np.isnan(ccc[0]) and r[1] == 0.0 and ccc[1] == 0.0

def test_coverage_counts_active_coefficients():
    rng, true = np.random.default_rng(0), np.zeros((1000, 52))
    true[:, :10] = 0.15  # just active; the others are not counted
    std = rng.uniform(0.01, 0.1, true.shape)
    found = evaluate.uncertainty(std, true + std * rng.normal(size=true.shape), true)  # errors as large as predicted
    assert found == {"within_1_std": pytest.approx(0.68, abs=0.02), "within_2_std": pytest.approx(0.95, abs=0.02)}

def test_agreement_of_words():
    words = {"expression_category": "joy", "symmetry": "symmetric", "muscle_movements": "Jaw: jaw slightly opened."}
    other = {"expression_category": "joy", "symmetry": "mixed", "muscle_movements": "jaw OPENED wide, left brow raised, jaw"}
    pairs = [{"description": words}, {"description": None}], [{"description": other}, {"description": other}]
    expected = {"expression_category": 1.0, "symmetry": 0.0, "f1": 6 / 11}  # of 4 and 7 words, they share jaw, jaw, opened
    assert list(evaluate.agreement(*pairs).items()) == list(expected.items())
    assert evaluate.agreement([{}], [{}]) == {}

def test_intervals_cover_the_truth_and_resample_people():
    rng, covered, widths = np.random.default_rng(0), 0, np.zeros(2)  # widths of intervals over people and over images
    for trial in range(40):
        error = rng.normal(0, 0.1, (60, 1)).repeat(5, axis=0) * np.ones((1, 52))  # a person's errors are alike
        for k, group in enumerate((np.arange(300) // 5, np.arange(300))):
            result = evaluate.intervals({"a": error}, 0 * error, group.tolist(), trial)
            low, high = result["intervals"]["a"]["rmse"]
            widths[k] += high - low
            covered += k == 0 and low <= 0.1 <= high
    assert covered >= 34 and widths[0] > 1.5 * widths[1]

def test_differences_are_paired():
    rng, true = np.random.default_rng(0), np.zeros((60, 52))
    predicted = rng.uniform(0, 1, (60, 1)) * np.ones((1, 52))
    result = evaluate.intervals({"a": predicted, "b": predicted + 0.01}, true, list(range(60)), 0)
    low, high = result["intervals"]["a"]["rmse"]
    least, most = result["differences"]["b minus a"]["rmse"]
    assert 0 < least <= most < 0.02 < high - low  # the difference is certain though the errors are not

@pytest.mark.parametrize("people, widths_are_equal", [("abcdefghi", True), ("aaaabbbcd", True), ("aaaabbcde", False)])
def test_pictures_are_resampled_if_there_are_few_people(people, widths_are_equal):
    error = np.random.default_rng(0).uniform(0, 1, (9, 1)) * np.ones((1, 52))
    by_people, by_pictures = [evaluate.intervals({"a": error}, 0 * error, list(names), 0) for names in (people, "abcdefghi")]
    assert (by_people == by_pictures) == widths_are_equal

# ---- evaluate.py: files ----------------------------------------------------------------------------------------------
def noisy(demo: Path, folder: Path, name: str, noise: float) -> Path:
    """Predictions for val.jsonl that are off by `noise`."""
    records, rng = read_jsonl(demo / "val.jsonl"), np.random.default_rng(0)
    values = np.clip(as_array(records) + noise * rng.normal(size=(len(records), 52)), 0, 1)
    return write_jsonl(folder / name, [{**record, "image": os.path.relpath(demo / record["image"], folder), "error": None,
         "coefficients": dict(zip(NAMES, row))} for record, row in zip(records, values.tolist())])

def evaluated(folder: Path, *args) -> dict:
    run_main(evaluate, *args, "--out", folder / "m.json")
    return json.loads((folder / "m.json").read_text())

def test_two_files_are_compared(demo, tmp_path):
    files = [noisy(demo, tmp_path, "good.jsonl", 0.02), noisy(demo, tmp_path, "bad.jsonl", 0.2)]
    results = evaluated(tmp_path, *files, demo / "val.jsonl", "--plot", tmp_path / "plot.png")
    low, high = results["differences"][f"{files[1]} minus {files[0]}"]["rmse"]
    assert 0.05 < low < high < 0.25 and list(results["models"]) == [str(file) for file in files]
    assert list(results["baselines"]) == ["zeros", "training mean"]  # the mean of train.jsonl next to the truth
    assert results["by_region"]["jaw"]["rmse"] == pytest.approx(0.02, rel=0.6)  # of the first file
    assert (np.asarray(Image.open(tmp_path / "plot.png")) == 0).sum() > 500  # dots and names

def test_values_of_a_field_have_their_own_rows(demo, tmp_path):
    records, path = read_jsonl(demo / "val.jsonl"), noisy(demo, tmp_path, "p.jsonl", 0.1)
    truth = [{**record, "image": str(demo / record["image"]), "light": k < 5} for k, record in enumerate(records)]
    del truth[19]["light"]
    rows = evaluated(tmp_path, path, write_jsonl(tmp_path / "t.jsonl", truth), "--by", "light")["by"]
    error = np.abs(as_array(read_jsonl(path)) - as_array(records))
    parts = {"True": error[:5], "False": error[5:19], "None": error[19:]}
    assert {name: row["mae"] for name, row in rows.items()} == pytest.approx({name: part.mean() for name, part in parts.items()})

def make_rig(folder: Path, unit: float) -> Path:
    """52 points with colors. Coefficient k moves the k-th by `unit`, along x or z. There is no tongue."""
    folder.mkdir()
    for k, name in enumerate(["Neutral", *NAMES[:-1]]):
        points = [(unit * (j == k - 1) * (k % 2), j * unit, unit * (j == k - 1) * (1 - k % 2)) for j in range(52)]
        (folder / f"{name}.obj").write_text("# face\n" + "".join(f"v {x} {y} {z} 0.5 0.5 0.5\n" for x, y, z in points) + "f 1 2 3\n")
    return folder

def test_vertex_error_is_in_the_unit_of_the_rig(demo, tmp_path):
    path, unit = noisy(demo, tmp_path, "p.jsonl", 0.05), 100.0
    results = evaluated(tmp_path, path, demo / "val.jsonl", "--rig", make_rig(tmp_path / "rig", unit))
    true, predicted = (as_array(read_jsonl(file)) for file in (demo / "val.jsonl", path))
    assert results["models"][str(path)]["vertex"] == pytest.approx(unit * np.abs(predicted - true)[:, :51].sum(axis=1).mean() / 52)
    assert results["baselines"]["zeros"]["vertex"] == pytest.approx(unit * true[:, :51].sum(axis=1).mean() / 52)

@pytest.mark.parametrize("damage", [lambda file: file.write_text(file.read_text() + "v 0 0 0\n"), Path.unlink])
def test_an_incomplete_rig_is_refused(damage, demo, tmp_path):
    damage(make_rig(tmp_path / "rig", 1.0) / "Neutral.obj")
    assert_refused(r"rig/\w+.obj", evaluate, *2 * [demo / "val.jsonl"], "--rig", tmp_path / "rig", "--out", tmp_path / "m.json")

@pytest.mark.filterwarnings("error")
def test_baselines_and_perfect_predictions(demo, tmp_path):
    records, path = read_jsonl(demo / "val.jsonl"), tmp_path / "p.jsonl"
    (tmp_path / "linked").symlink_to(demo)
    perfect = [{**record, "image": f"linked/{record['image']}", "error": None} for record in records]
    perfect[0] |= {"error": "unreadable", "coefficients": None}
    write_jsonl(path, [*perfect, {**perfect[0], "image": "unknown.png"}])  # a failed picture needs no truth
    results = evaluated(tmp_path, path, demo / "val.jsonl", "--train", demo / "train.jsonl")
    assert results["models"][str(path)]["rmse"] == 0 and (results["images"], results["errors"]) == (20, 1)
    assert results["description"] == {"expression_category": 1.0, "symmetry": 1.0, "f1": 1.0} and results["uncertainty"] == {}
    errors = as_array(records[1:]) - as_array(read_jsonl(demo / "train.jsonl")).mean(axis=0)
    assert results["baselines"]["training mean"]["rmse"] == pytest.approx((errors ** 2).mean() ** 0.5)
    assert results["baselines"]["zeros"]["mae"] == pytest.approx(as_array(records[1:]).mean())

def test_people_who_are_also_in_the_training_records_are_counted(demo, tmp_path, capsys):
    path = noisy(demo, tmp_path, "p.jsonl", 0.1)
    evaluated(tmp_path, path, demo / "val.jsonl")
    out = capsys.readouterr().out
    assert "across identities" not in out  # the demo separates them
    assert re.search(f"^20 pictures, 0 (?s:.*){path}(?s:.*)m.json \nnext: python annotate.py {path} --sheet", out)
    truth = [{**record, "identity": f"id{k % 7}"} for k, record in enumerate(read_jsonl(path))]
    train = [{**record, "image": f"{k}.png"} for k, record in enumerate(truth[:3])]
    evaluated(tmp_path, path, write_jsonl(tmp_path / "truth.jsonl", truth), "--train", write_jsonl(tmp_path / "t.jsonl", train))
    assert "3 of 7 people are also in the training records" in capsys.readouterr().out

@pytest.mark.parametrize("change, message", [
    (lambda records: records[1:], "different pictures: .*png"), (lambda records: records + records[:1], "line 21: .*second record"),
    (lambda records: records + [{**records[1], "image": "x.png"}], "different pictures: .*x.png")])
def test_mismatches_are_refused(change, message, demo, tmp_path):
    records = [{**record, "image": str(demo / record["image"]), "error": None} for record in read_jsonl(demo / "val.jsonl")]
    assert_refused(message, evaluate, write_jsonl(tmp_path / "p.jsonl", change(records)), demo / "val.jsonl")

@pytest.mark.parametrize("change, message", [
    *((line, "") for line in ('{"image": ', "[1]", "null")), ({"jawOpen": 0.5}, "52 ARKit"), ([0.5], "52"), (None, "52"),
    *(({**ZEROS, "jawOpen": value}, "between 0 and 1") for value in (float("nan"), 1.2, -0.1))])
def test_bad_predictions_are_named(change, message, tmp_path):
    path, record = tmp_path / "bad.jsonl", {"image": "x.png", "coefficients": change, "error": None}
    path.write_text("\n" + (change if isinstance(change, str) else json.dumps(record)))
    assert_refused(rf"{re.escape(str(path))}, line 2.*{message}", evaluate, path, path)
