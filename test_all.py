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

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import annotate
import distill
import evaluate
import infer

ROOT = Path(__file__).parent
SCRIPTS = {"annotate": 600, "distill": 700, "infer": 560, "evaluate": 430}  # lines at most
NAMES = annotate.ARKIT_NAMES
ZEROS = dict.fromkeys(NAMES, 0.0)

def run_main(module, *args):
    """Runs a stage as its command line would."""
    module.main(module.parse_args([str(arg) for arg in args]))

def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

def read_jsonl(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]

def as_array(records: list) -> np.ndarray:
    return np.array([[record["coefficients"][name] for name in NAMES] for record in records])

@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A demo of 240 faces."""
    folder = tmp_path_factory.mktemp("demo")
    run_main(annotate, "--demo", 240, "--out", folder)
    return folder

@pytest.fixture(scope="session")
def trained(demo, tmp_path_factory) -> Path:
    """The tiny model, overfitted to eight faces."""
    folder = tmp_path_factory.mktemp("run") / "out"
    run_main(distill, "--data", demo / "train.jsonl", "--limit", 8, "--batch-size", 4, "--steps", 300,
             "--no-grounding", "--out", folder)
    return folder

# ---- The house: copies, budgets, README ------------------------------------------------------------
def test_copied_pieces_are_identical():
    assert len(set(NAMES)) == 52
    sources = [(ROOT / f"{name}.py").read_text() for name in SCRIPTS]
    assert len({re.search(r"# The 52 names.*?\n\]", source, re.S).group() for source in sources}) == 1
    for name in ("open_image", "prompt_text", "answer_skeleton"):
        assert inspect.getsource(getattr(distill, name)) == inspect.getsource(getattr(infer, name))
    assert inspect.getsource(distill.check_coefficients) == inspect.getsource(evaluate.check_coefficients)
    assert (distill.FIELDS, distill.VALUES, distill.PARTS) == (infer.FIELDS, infer.VALUES, infer.PARTS)
    assert annotate.FIELDS == infer.FIELDS and annotate.ACTIVE == evaluate.ACTIVE

@pytest.mark.parametrize("name", SCRIPTS)
def test_script_stands_alone_within_its_budget(name, tmp_path):
    source = (ROOT / f"{name}.py").read_text()
    assert len(source.splitlines()) <= SCRIPTS[name] and max(map(len, source.splitlines())) <= 100
    (tmp_path / f"{name}.py").write_text(source)
    answer = subprocess.check_output([sys.executable, f"{name}.py", "--help"], cwd=tmp_path, text=True)
    assert "--out" in answer

def test_readme_commands_parse_and_its_code_map_is_true():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 190
    blocks = re.findall(r"```bash\n(.*?)```", readme, re.S)
    commands = re.findall(r"^ *(?:python|torchrun[-a-z0-9 ]*) (\w+)\.py(.*)$", "\n".join(blocks), re.M)
    assert {name for name, _ in commands} == set(SCRIPTS)
    for name, rest in commands:
        globals()[name].parse_args(shlex.split(rest.split("&&")[0].replace("$seed", "0").replace("$words", "numeric"), comments=True))
    pieces = re.findall(r"`(annotate|distill|infer|evaluate)\.(?!py`)(\w+)`", readme)
    assert len(pieces) >= 12 and all(hasattr(globals()[script], piece) for script, piece in pieces)

# ---- annotate.py -----------------------------------------------------------------------------------
def read_input(path, *flags) -> tuple[list, Counter]:
    counts = Counter()
    return list(annotate.read_records(Path(path), annotate.parse_args([*map(str, flags)]), counts)), +counts

def invert_movements(text: str) -> dict:
    """Reads a description back: {ARKit name: adverb of its intensity}, by the tables alone."""
    found = {}
    for region, actions in annotate.MOVEMENTS.items():
        match = re.search(rf"{region}: (.*?)\.", text)
        for phrase in match.group(1).split(", ") if match else []:
            for key, template in actions.items():
                names, (noun, verb) = annotate.sides(key), template.split(" * ")
                pair = {f"left {noun}": names[:1], f"right {noun}": names[1:], f"both {noun}s": names}
                for subject, subject_names in (pair if len(names) > 1 else {noun: names}).items():
                    for _, adverb in annotate.BANDS:
                        if phrase == f"{subject} {adverb} {verb}":
                            found |= dict.fromkeys(subject_names, adverb)
    return found

def test_words_give_back_every_active_coefficient():
    for index in range(300):
        coefficients = annotate.sample_expression(np.random.default_rng(index))
        active = {name: value for name, value in coefficients.items() if value >= annotate.ACTIVE}
        expected = {name: annotate.intensity(value) for name, value in active.items()}
        assert invert_movements(annotate.describe(coefficients)["muscle_movements"]) == expected

def test_description_of_known_faces():
    words = ["neutral", "No visible movement.", "not clearly observable", "symmetric"]
    assert annotate.describe(ZEROS) == dict(zip(infer.FIELDS, words))
    face = {"mouthSmileLeft": 0.9, "mouthSmileRight": 0.3, "cheekSquintLeft": 0.5, "cheekSquintRight": 0.5}
    smile = annotate.describe({**ZEROS, **face})
    assert "happiness" in smile["expression_category"] and smile["symmetry"] == "stronger on the left mouth"
    assert "left lip corner strongly raised, right lip corner slightly raised" in smile["muscle_movements"]
    for emotion, pattern in annotate.PROTOTYPES:
        assert emotion in annotate.describe({**ZEROS, **pattern})["expression_category"]

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
    people = [{record["identity"] for record in part} for part in (train, val)]
    assert people[0] and people[1] and not people[0] & people[1]
    run_main(annotate, "--demo", 240, "--out", tmp_path / "other", "--seed", 1)
    others = {record["identity"] for record in read_jsonl(tmp_path / "other" / "train.jsonl")}
    assert not others & (people[0] | people[1])
    assert [{**record, "image": ""} for record in val] == [{**record, "image": ""} for record in shift]
    pictures = [np.array(Image.open(demo / records[0]["image"]), dtype=float) for records in (val, shift)]
    assert np.abs(pictures[0] - pictures[1]).mean() > 20

def test_livelink_round_trip_and_dialects(demo, tmp_path):
    records = [{**record, "error": None} for record in read_jsonl(demo / "val.jsonl")]
    infer.write_livelink(tmp_path / "take.csv", records, fps=60)
    back, _ = read_input(tmp_path / "take.csv")
    expected = [pytest.approx(record["coefficients"], abs=1e-6) for record in records]
    assert [record["coefficients"] for record in back] == expected
    lines = [line.split(",") for line in (tmp_path / "take.csv").read_text().splitlines()]
    assert len(lines[0]) == 63 and lines[-1][0] == "00:00:00:19.000"
    shuffled = [line[::-1] + ["extra"] for line in lines]  # other column order, extra column, BOM and CRLF
    (tmp_path / "dialect.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(",".join, shuffled)).encode())
    assert read_input(tmp_path / "dialect.csv")[0] == [{**record, "identity": "dialect"} for record in back]

def test_other_forms_of_coefficients(tmp_path):
    values = {name: round(k / 100, 2) for k, name in enumerate(NAMES)}
    categories = [{"index": k, "score": value, "categoryName": name}
                  for k, (name, value) in enumerate({"_neutral": 0.9, **values}.items()) if name != "tongueOut"]
    face = {"faceBlendshapes": [{"categories": categories}]}
    short = {re.sub("(?<!jaw)(?<!mouth)(Left|Right)$", lambda side: "_" + side[0][0], name): value
             for name, value in values.items()}
    capital = {name[0].upper() + name[1:]: value for name, value in values.items()}
    forms = {"one.json": (face, 1), "bare.json": ([categories, categories], 2), "many.json": ([face] * 3, 3),
             "short.jsonl": ({"coefficients": short}, 1), "capital.jsonl": ({"coefficients": capital}, 1)}
    for name, (value, count) in forms.items():
        (tmp_path / name).write_text(json.dumps(value))
        records, counts = read_input(tmp_path / name)
        is_mediapipe = name.endswith(".json")
        assert counts == ({"records without tongueOut, set to 0": count} if is_mediapipe else {})
        expected = {**values, "tongueOut": 0.0 if is_mediapipe else values["tongueOut"]}
        assert [record["coefficients"] for record in records] == [expected] * count, name
    refused = {"divide percentages": {**values, "jawOpen": 73}, "unknown": {**values, "jawDrop": 0.5},
               "Error": [0.5]}
    for message, value in refused.items():
        path = write_jsonl(tmp_path / "refused.jsonl", [{"coefficients": value}])
        with pytest.raises(SystemExit, match=message):
            read_input(path)

def test_images_without_a_face_keep_their_place(tmp_path):
    face = {"faceBlendshapes": [{"categories": [{"categoryName": name, "score": 0.5} for name in NAMES]}]}
    (tmp_path / "faces.json").write_text(json.dumps([face, {"faceBlendshapes": []}, face]))
    (tmp_path / "frames").mkdir()
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / "frames" / f"{name}.png")
    records, counts = read_input(tmp_path / "faces.json", "--frames", tmp_path / "frames")
    assert [Path(record["image"]).name for record in records] == ["a.png", "c.png"]
    assert counts == {"without a face or a prediction left out": 1}

def test_lines_end_at_newlines_and_images_are_relative_to_the_records(demo, tmp_path):
    record = read_jsonl(demo / "train.jsonl")[0]
    record |= {"image": str(demo / record["image"]), "identity": "a\u2028b\x85c"}  # which str.splitlines cuts
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    run_main(annotate, path, "--out", tmp_path / "sub" / "o.jsonl")
    written = json.loads((tmp_path / "sub" / "o.jsonl").read_text())
    assert not os.path.isabs(written["image"]) and (tmp_path / "sub" / written["image"]).is_file()
    assert written["identity"] == record["identity"]
    for name in ("labels.jsonl", "sub/o.jsonl"):
        assert len(distill.read_records(tmp_path / name, "numeric", None)) == 1
        assert len(infer.list_images([str(tmp_path / name)])) == 1
        assert len(evaluate.read_records(tmp_path / name)) == 1

def test_every_nth_row_keeps_its_picture(demo, tmp_path):
    rows = [{"coefficients": {**ZEROS, "jawOpen": k / 10}, "error": None} for k in range(7)]
    infer.write_livelink(tmp_path / "take.csv", rows, fps=30)
    (tmp_path / "frames").mkdir()
    for k in range(7):
        Image.new("RGB", (8, 8)).save(tmp_path / "frames" / f"{k:03d}.png")
    run_main(annotate, tmp_path / "take.csv", "--frames", tmp_path / "frames", "--every", 3, "--out", tmp_path / "o")
    records = read_jsonl(tmp_path / "o")
    assert [record["image"] for record in records] == ["frames/000.png", "frames/003.png", "frames/006.png"]
    assert [record["coefficients"]["jawOpen"] for record in records] == pytest.approx([0.0, 0.3, 0.6])

def make_llm(folder: Path, steps: int) -> Path:
    """A tiny chat model: trained for some steps to give one good answer, or babbling."""
    pieces = ["{", *(f'"{field}": "a calm face", ' for field in annotate.FIELDS)]
    prompts = []
    for k in range(40):
        face = annotate.sample_expression(np.random.default_rng(k))
        active = [f"{name} {value:.2f}" for name, value in face.items() if value >= annotate.ACTIVE]
        prompts.append(f"{annotate.LLM_PROMPT}{', '.join(active)}\nAnswer:")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([*prompts, *pieces], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}\nAnswer:"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        prompt_ids = tokenizer.encode(prompts[step % 40])
        ids = torch.tensor([prompt_ids + tokenizer.encode("".join(pieces))])
        labels = ids.clone()
        labels[:, :len(prompt_ids)] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

def test_frozen_llm_describes_and_rules_stand_in(demo, tmp_path, monkeypatch):
    good, bad = make_llm(tmp_path / "good", 220), make_llm(tmp_path / "bad", 0)
    monkeypatch.setattr(annotate, "LLM_TOKENS", 20)
    truth = read_jsonl(demo / "val.jsonl")[:7]
    flags = [demo / "val.jsonl", "--limit", 7, "--batch-size", 3]
    run_main(annotate, *flags, "--llm", good, "--out", tmp_path / "good.jsonl")
    records = read_jsonl(tmp_path / "good.jsonl")
    assert [record["description"] for record in records] == [dict.fromkeys(annotate.FIELDS, "a calm face")] * 7
    assert {record["annotator"] for record in records} == {str(good)}
    assert [record["coefficients"] for record in records] == [record["coefficients"] for record in truth]
    run_main(annotate, *flags, "--llm", bad, "--out", tmp_path / "bad.jsonl")
    records = read_jsonl(tmp_path / "bad.jsonl")
    assert [record["description"] for record in records] == [record["description"] for record in truth]
    assert all(record["annotator"].startswith("rules, since") for record in records)

    genuine, calls = annotate.ask_llm, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(*args, **options)
    monkeypatch.setattr(annotate, "ask_llm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_main(annotate, *flags, "--llm", good, "--out", tmp_path / "parts.jsonl")
    run_main(annotate, *flags, "--out", tmp_path / "parts.jsonl")  # the rules leave the model's answers alone
    with (tmp_path / "parts.jsonl.unfinished").open("ab") as file:
        file.write('{"image": "torn é'.encode()[:-1])  # within a character
    run_main(annotate, *flags, "--llm", good, "--out", tmp_path / "parts.jsonl")
    assert len(calls) == 4 and (tmp_path / "parts.jsonl").read_text() == (tmp_path / "good.jsonl").read_text()

def test_a_text_that_loops_is_malformed():
    assert annotate.LOOP.search("both eyes, eye-eye-eye-eye") and annotate.LOOP.search("up, up, up, up, up, ")
    for index in range(100):
        words = annotate.describe(annotate.sample_expression(np.random.default_rng(index)))
        assert not any(map(annotate.LOOP.search, words.values()))

def test_fuzzed_input_never_gives_a_traceback(demo, tmp_path):
    rng = np.random.default_rng(0)
    infer.write_livelink(tmp_path / "take.csv", [{"coefficients": ZEROS, "error": None}] * 2, fps=30)
    good = {".jsonl": (demo / "val.jsonl").read_bytes().split(b"\n")[0], ".csv": (tmp_path / "take.csv").read_bytes(),
            ".json": json.dumps([[{"categoryName": name, "score": 0.1} for name in NAMES]]).encode()}
    pieces = [b"null", b"[]", b"{}", b"\x00", b"\xff", b'"', b",", b"1e999", b"NaN", b"[" * 2000, b"9" * 5000,
              b"\\ud800", b"\n", b"true", b"-1"]
    for case in range(300):
        suffix = list(good)[case % 3]
        data = bytearray(good[suffix])
        for _ in range(rng.integers(1, 4)):
            place, length = rng.integers(0, len(data)), rng.integers(0, 12)
            data[place:place + length] = pieces[rng.integers(len(pieces))] if rng.random() < 0.7 else rng.bytes(3)
        (tmp_path / f"fuzzed{suffix}").write_bytes(data)
        try:
            run_main(annotate, tmp_path / f"fuzzed{suffix}", "--out", tmp_path / "out.jsonl")
        except SystemExit as error:
            assert "fuzzed" in str(error) and len(str(error)) < 600, error
        else:
            for record in read_jsonl(tmp_path / "out.jsonl"):
                assert record["description"] == annotate.describe(record["coefficients"])

def test_real_takes_overshoot_and_are_clipped():
    counts = Counter()
    clipped = annotate.check_coefficients({**ZEROS, "eyeLookInLeft": 1.053}, counts)
    assert clipped["eyeLookInLeft"] == 1.0 and counts["clipped values"] == 1

def test_render_draws_predictions(demo, tmp_path):
    run_main(annotate, demo / "val.jsonl", "--render", "--out", tmp_path / "avatars", "--limit", 3)
    records = read_jsonl(tmp_path / "avatars" / "records.jsonl")
    assert len(records) == 3
    drawn = np.asarray(Image.open(tmp_path / "avatars" / records[0]["image"]))
    assert (drawn == np.asarray(annotate.draw_face(records[0]["coefficients"], records[0]["identity"]))).all()

# ---- distill.py ------------------------------------------------------------------------------------
def make_dataset(demo: Path, supervision: str, count: int = 8):
    records = distill.read_records(demo / "train.jsonl", supervision, count)
    torch.manual_seed(0)
    model, tokenizer, image_processor = distill.build_tiny(records, 64 * 64)
    return model, distill.FaceDataset(records, tokenizer, image_processor, supervision, 64 * 64)

@pytest.mark.parametrize("supervision", ["semantic", "numeric", "numbers-first"])
def test_exactly_the_answer_and_its_end_are_supervised(demo, supervision):
    _, dataset = make_dataset(demo, supervision)
    batch = dataset.collate([dataset[index] for index in range(3)])
    for row, record in enumerate(dataset.records[:3]):
        labels = batch["labels"][row]
        text = dataset.tokenizer.decode(labels[labels != distill.IGNORE_INDEX])
        rounded = {name: float(f"{value:.1f}") for name, value in record["coefficients"].items()}
        whole = {"analysis": record["description"], "arkit": rounded}
        expected = {part: whole[part] for part in distill.PARTS[supervision]}
        assert text.endswith("<|im_end|>") and json.loads(text.removesuffix("<|im_end|>")) == expected
        kept = labels != distill.IGNORE_INDEX
        assert (labels[kept] == batch["input_ids"][row][kept]).all()
        prompt = dataset.tokenizer.decode(batch["input_ids"][row][: kept.nonzero()[0]])
        assert prompt == distill.prompt_text(distill.PROMPT, 16)
        padding = batch["input_ids"][row][kept.nonzero()[-1] + 1:]
        assert (padding == dataset.tokenizer.pad_token_id).all()
        numbers = batch["input_ids"][row][batch["token_types"][row] == distill.NUMBER]
        assert dataset.tokenizer.decode(numbers) == "".join(f"{x:.1f}" for x in record["coefficients"].values())
        words = dataset.tokenizer.decode(batch["input_ids"][row][batch["token_types"][row] == distill.TEXT])
        assert words == ("" if supervision == "numeric" else "".join(record["description"].values()))

def test_pictures_are_never_blown_up(demo, tmp_path):
    folder = make_qwen(tmp_path / "hub", "qwen3_vl")
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    tokenizer = infer.AutoTokenizer.from_pretrained(folder)
    records = distill.read_records(demo / "train.jsonl", "numeric", 1)
    for max_pixels, patches in ((512 * 512, 16), (32 * 32, 4)):  # 64 x 64 pixels are 4 x 4 patches of 16
        dataset = distill.FaceDataset(records, tokenizer, processor, "numeric", max_pixels)
        assert len(dataset[0]["pixel_values"]) == patches

def test_loss_equals_the_library_s(demo, monkeypatch):
    model, dataset = make_dataset(demo, "semantic")
    batch = dataset.collate([dataset[index] for index in range(4)])
    option_ids = [dataset.encode(value)[-1] for value in distill.VALUES]
    nats, squared = distill.answer_loss(model, batch, option_ids)
    names = ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw", "labels")
    inputs = {name: batch[name] for name in names}
    real = torch.tensor([len(dataset[index]["input_ids"]) for index in range(4)])
    inputs["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < real[:, None]).long()
    output = model(**inputs)
    count = (batch["labels"] != distill.IGNORE_INDEX).sum()
    assert (nats / count).item() == pytest.approx(output.loss.item(), abs=1e-5)
    # The expected value of each number, written out one by one.
    expected = 0.0
    for row, record in enumerate(dataset.records[:4]):
        places = (batch["token_types"][row] == distill.NUMBER).nonzero()[:, 0]
        for place, true in zip(places, record["coefficients"].values()):
            shares = output.logits[row, place - 1, option_ids].softmax(dim=0).tolist()
            expected += (sum(share * k / 10 for k, share in enumerate(shares)) - true) ** 2
    assert squared.item() == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(distill, "LOSS_LOGITS", 10 * len(dataset.tokenizer))  # in parts of ten tokens
    parts, _ = distill.answer_loss(model, batch, option_ids)
    assert parts.item() == pytest.approx(nats.item(), rel=1e-5)
    parts.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0

def test_expected_value_of_split_digits(demo, tmp_path):
    folder = make_qwen(tmp_path / "hub", "qwen3_vl")
    model = infer.load(folder, prompt_file=ROOT / "README.md")
    records = distill.read_records(demo / "train.jsonl", "numeric", 2)
    records[0]["coefficients"] |= {"jawOpen": 1.0, "mouthPucker": 0.97}  # left to cross-entropy
    dataset = distill.FaceDataset(records, model.tokenizer, model.image_processor, "numeric", 4096)
    batch = dataset.collate([dataset[0], dataset[1]])
    digits = [dataset.encode(str(k))[0] for k in range(10)]
    hidden = distill.hidden_states(model.network, batch)[:, :-1]
    found = distill.squared_error(model.network, hidden, batch, digits).item()
    logits, expected = model.network.lm_head(hidden), 0.0
    for row, record in enumerate(records):
        places = (batch["token_types"][row] == distill.NUMBER).nonzero()[2::3, 0]  # "0", ".", tenths
        for place, true in zip(places, record["coefficients"].values()):
            shares = logits[row, place - 1, digits].softmax(dim=0).tolist()
            mean = sum(share * k / 10 for k, share in enumerate(shares))
            expected += (mean - true) ** 2 if true < 0.95 else 0.0
    assert found == pytest.approx(expected, rel=1e-4)

def test_words_are_hidden_or_guessed_and_then_only_numbers_trained(demo):
    model, dataset = make_dataset(demo, "semantic")
    batch = dataset.collate([dataset[index] for index in range(8)])
    args, pad_id = distill.parse_args(["--steps", "100"]), dataset.tokenizer.pad_token_id
    args.rank, args.world_size = 0, 1
    types, rows = batch["token_types"], round(8 * distill.GUESSED)
    for forward, share in ((0, 1.0), (99, 0.1)):  # of hidden numbers, at the first and at the last step
        changed = distill.hide_and_guess(model, batch, pad_id, args, forward)
        hidden = changed["input_ids"] == pad_id
        assert hidden[types == distill.NUMBER].float().mean().item() == pytest.approx(share, abs=0.08)
        skeleton = types == distill.SKELETON
        assert torch.equal(changed["input_ids"][skeleton], batch["input_ids"][skeleton])
        labels, numbers = changed["labels"], types == distill.NUMBER
        assert torch.equal(labels[rows:], batch["labels"][rows:])
        assert torch.equal(labels[:rows][numbers[:rows]], batch["labels"][:rows][numbers[:rows]])
        assert (labels[:rows][~numbers[:rows]] == distill.IGNORE_INDEX).all()
        guessed = (changed["input_ids"] != batch["input_ids"])[:rows][types[:rows] == distill.TEXT]
        assert guessed.float().mean() > 0.9  # an untrained model guesses wrong
    args.supervision = "numbers-first"  # numbers cannot lean on words that come after them
    changed = distill.hide_and_guess(model, batch, pad_id, args, 99)
    assert torch.equal(changed["labels"], batch["labels"])

def test_batches_cover_every_record_and_are_shared_out():
    args = distill.parse_args(["--batch-size", "2", "--steps", "10"])
    args.rank, args.world_size = 0, 1
    batches = distill.batch_order(10, args)
    order = sum(batches, [])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    args.batch_size, args.world_size, shares = 1, 2, []
    for args.rank in (0, 1):
        shares.append(distill.batch_order(10, args))
    assert [one + two for one, two in zip(*shares)] == batches

def test_tokenizer_loses_nothing():
    tokenizer = distill.build_tokenizer(["Brows: both brows strongly lowered."] * 20)
    for text in ("Brows: both brows strongly lowered.", "naïve 😀 \"unseen\" 0.35\n", '{"jawOpen": 0.3}'):
        assert tokenizer.decode(tokenizer.encode(text)) == text

def test_tiny_model_learns_faces_by_heart(trained, demo):
    log = read_jsonl(trained / "log.jsonl")
    assert log[-1]["loss"] < 0.15 * np.log(11) and log[-1]["samples/s"] > 0 and log[-1]["tokens/s"] > 0
    predictor = infer.load(trained)
    records = read_jsonl(demo / "train.jsonl")[:8]
    predictions = infer.predict(predictor, [demo / record["image"] for record in records], "mode")
    predicted, true = as_array(predictions), as_array(records)
    assert np.abs(predicted - true).mean() < 0.04 < np.abs(true).mean()
    same = [p["description"] == r["description"] for p, r in zip(predictions, records)]
    assert np.mean(same) > 0.7

def test_limit_alone_is_one_pass(demo, tmp_path):
    run_main(distill, "--data", demo / "train.jsonl", "--limit", 12, "--batch-size", 4, "--out", tmp_path / "run")
    assert read_jsonl(tmp_path / "run" / "log.jsonl")[-1]["step"] == 3

def test_resume_equals_uninterrupted(demo, tmp_path, monkeypatch):
    flags = ["--data", demo / "train.jsonl", "--limit", 12, "--steps", 4, "--batch-size", 2, "--grad-accum", 2,
             "--save-every", 1]
    run_main(distill, *flags, "--out", tmp_path / "whole")
    genuine, calls = distill.answer_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3 and inspect.currentframe().f_back.f_code.co_name == "train":
            os.kill(os.getpid(), signal.SIGINT)
        return genuine(*args)
    monkeypatch.setattr(distill, "answer_loss", interrupted)
    with pytest.raises(SystemExit, match="--resume"):
        run_main(distill, *flags, "--out", tmp_path / "parts", "--save-every", 100)
    monkeypatch.setattr(distill, "answer_loss", genuine)
    with pytest.raises(SystemExit, match="unfinished run"):
        run_main(distill, *flags, "--out", tmp_path / "parts")
    run_main(distill, "--out", tmp_path / "parts", "--resume")  # the settings are in the state
    files = [tmp_path / part / "model.safetensors" for part in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "parts" / "state.pt").exists()

def test_killed_run_resumes_to_the_same_weights(demo, tmp_path):
    flags = ["--data", demo / "train.jsonl", "--limit", 12, "--steps", 6, "--batch-size", 2, "--save-every", 3]
    run_main(distill, *flags, "--out", tmp_path / "whole")
    command = [sys.executable, ROOT / "distill.py", *map(str, flags), "--out", tmp_path / "killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    while process.poll() is None and not (tmp_path / "killed" / "state.pt").is_file():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "killed" / "state.pt").is_file() and not (tmp_path / "killed" / "run.json").exists()
    run_main(distill, "--out", tmp_path / "killed", "--resume")
    whole, killed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed

def test_held_out_records_share_no_identity():
    records = [{"identity": f"id{k // 10}"} for k in range(200)]
    train, val = distill.hold_out(records)
    people = [{record["identity"] for record in part} for part in (train, val)]
    assert len(val) == 10 and not people[0] & people[1] and len(train) + len(val) == 200
    one_take = [{"identity": "take", "frame": k} for k in range(100)]
    assert distill.hold_out(one_take)[1] == one_take[95:]
    assert distill.hold_out(records[:9]) == (records[:9], [])

# ---- infer.py --------------------------------------------------------------------------------------
def is_well_formed(written: str) -> bool:
    """Whether an answer has all fields and names, once and in order, and only the eleven values."""
    try:
        answer = json.loads(written, parse_float=lambda text: f"<{text}>")
    except json.JSONDecodeError:
        return False
    return (answer.keys() == {"analysis", "arkit"} and list(answer["analysis"]) == infer.FIELDS
            and list(answer["arkit"]) == NAMES and written.count('": ') == 58
            and {f"<{value}>" for value in infer.VALUES} >= set(answer["arkit"].values()))

def inputs_of(predictor: infer.Model, images: list) -> dict:
    size = {"shortest_edge": 256, "longest_edge": predictor.max_pixels}
    return infer.prepare(predictor, [predictor.image_processor([image], size=size, return_tensors="pt")
                                     for image in images])

@pytest.mark.parametrize("batch_size", [1, 8])
def test_forced_decoding_writes_what_generate_writes(trained, demo, batch_size):
    predictor = infer.load(trained)
    seen = [infer.open_image(demo / record["image"]) for record in read_jsonl(demo / "train.jsonl")[:8]]
    # The same pictures darker and darker, whose answers are doubtful but mostly whole.
    images = [image.point(lambda value: value * share) for share in (1.0, 0.9, 0.8, 0.7) for image in seen]
    well_formed, lengths = 0, set()
    for start in range(0, 32, batch_size):
        inputs = inputs_of(predictor, images[start:start + batch_size])
        _, chosen, texts = infer.decode_forced(predictor, inputs, "semantic")
        tokens = predictor.network.generate(**inputs, do_sample=False, max_new_tokens=250)
        answers = predictor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        for written, row, text in zip(answers, chosen.tolist(), texts):
            forced = {"analysis": text, "arkit": {name: k / 10 for name, k in zip(NAMES, row)}}
            forced = json.dumps(forced, ensure_ascii=False)
            if is_well_formed(written):
                assert written == forced
                well_formed += 1
            lengths.add(len(forced))
    assert well_formed >= 12 and len(lengths) >= 4

def test_reader_of_foreign_answers():
    heads = ["Facial Expression Category", "Detailed Muscle Movements", "Emotional Implication", "Symmetry"]
    keys = {name[0].upper() + name[1:]: 0.3 for name in NAMES} | {"HeadYaw": -0.2, "TongueOut": -0.0}
    above = "\n\n".join(f"**{k}. {head}**\n{head} {{text}}: more" for k, head in enumerate(heads, 1))
    beside = "\n".join(f"{k}. **{head}**: {head} {{text}}: more  " for k, head in enumerate(heads, 1))
    plain = "\n".join(f"### {k}) {head}\n{head} {{text}}: more" for k, head in enumerate(heads, 1))
    for sections in (above, beside, plain):
        coefficients, description = infer.read_answer(f"{sections}\n\n{json.dumps(keys)} end")
        assert coefficients == {**dict.fromkeys(NAMES, 0.3), "tongueOut": 0.0} and list(coefficients) == NAMES
        assert description == {field: f"{head} {{text}}: more" for field, head in zip(infer.FIELDS, heads)}
    bullets = beside.replace("Movements {text}: more", "\n   - **Eyes**: wide.\n   - **Jaw**: open.")
    _, description = infer.read_answer(f"{bullets}\n{json.dumps(keys)}")
    assert description["muscle_movements"].endswith("Eyes**: wide. Jaw**: open.")
    assert infer.read_answer(json.dumps(keys))[1] is None
    whole = {"analysis": dict.fromkeys(infer.FIELDS, "x"), "arkit": ZEROS}
    assert infer.read_answer("{} " + json.dumps(whole)) == (ZEROS, whole["analysis"])
    without = {name: value for name, value in ZEROS.items() if name != "jawOpen"}
    for text, message in (("no braces", "lacks 52"), (json.dumps(whole)[:-30], "lacks 52"),
                          (json.dumps(without), "lacks 1 .*jawOpen"), (json.dumps({**ZEROS, "jawOpen": "x"}), "lacks 1"),
                          (json.dumps({**ZEROS, "jawOpen": float("nan")}), "lacks 1")):
        with pytest.raises(ValueError, match=message):
            infer.read_answer(text)

def test_estimates_of_a_known_distribution():
    probabilities = torch.zeros(1, 1, 11)
    probabilities[0, 0, [0, 4, 10]] = torch.tensor([0.3, 0.3, 0.4])
    values = [[tensor.item() for tensor in infer.estimate(probabilities, torch.tensor([[10]]), statistic)]
              for statistic in ("mean", "median", "mode")]
    std = (0.3 * 0.52 ** 2 + 0.3 * 0.12 ** 2 + 0.4 * 0.48 ** 2) ** 0.5
    assert values == [pytest.approx([point, std], abs=1e-6) for point in (0.52, 0.4, 1.0)]

def make_qwen(folder: Path, kind: str, seed: int = 0) -> Path:
    """An untrained Qwen-VL with Qwen's way of splitting text (every digit alone), saved as on the hub."""
    split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
             r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    bpe = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), to_bytes])
    bpe.decoder = decoders.ByteLevel()
    texts = ["".join(text for text, _ in distill.answer_skeleton("semantic")), distill.PROMPT]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=to_bytes.alphabet(), show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=special,
                                        eos_token="<|im_end|>", pad_token="<|endoftext|>")
    pairs = zip(("vision_start", "vision_end", "image", "video"), special[1:])
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in pairs}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "bos_token_id": None,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(seed)
    if kind == "qwen3_vl":
        text["rope_parameters"] = {**rope, "mrope_interleaved": True}
        vision |= {"patch_size": 16, "deepstack_visual_indexes": [0]}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
        model, patch = Qwen3VLForConditionalGeneration(config), 16
    else:
        text["rope_parameters"] = rope
        vision |= {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 56}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        model, patch = Qwen2_5_VLForConditionalGeneration(config), 14
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2).save_pretrained(folder)
    return folder

@pytest.mark.parametrize("kind, rank", [("qwen3_vl", 4), ("qwen2_5_vl", 4), ("qwen3_vl", 0)])
def test_real_architectures_from_a_folder(kind, rank, demo, tmp_path):
    folder = make_qwen(tmp_path / "hub", kind)
    run_main(distill, "--model", folder, "--data", demo / "train.jsonl", "--limit", 4, "--steps", 2,
             "--batch-size", 2, "--max-pixels", 8192, "--lora-rank", rank, "--expectation-weight", 1,
             "--out", tmp_path / "run")
    name = "adapter_model.safetensors" if rank else "model.safetensors"
    assert {"run.json", "log.jsonl", name} < {path.name for path in (tmp_path / "run").iterdir()}
    predictor = infer.load(tmp_path / "run")
    before = infer.load(folder, prompt_file=ROOT / "README.md").network.state_dict()
    changed = {key for key, weight in predictor.network.state_dict().items()
               if not torch.equal(weight, before[key])}
    layers = {key for key in changed if "language_model.layers" in key}
    assert layers and not any("visual" in key for key in changed)
    if rank:  # all seven linears of both layers, nothing else
        assert len(layers) == len(changed) == 14 and all("norm" not in key for key in layers)
    sizes = [(64, 64), (300, 80), (50, 200)]
    noise = [np.random.default_rng(0).integers(0, 255, (h, w, 3), dtype=np.uint8) for w, h in sizes]
    pictures = [Image.fromarray(pixels) for pixels in noise]
    together = infer.predict(predictor, pictures, numeric=True)
    for picture, prediction in zip(pictures, together):  # alone or beside pictures of other shapes
        alone = infer.predict(predictor, [picture], numeric=True)[0]
        assert prediction["coefficients"] == pytest.approx(alone["coefficients"], abs=2e-4)
        assert list(prediction["coefficients"]) == NAMES
        assert all(0 <= value <= 1 for value in prediction["coefficients"].values())

def logits_behind(predictor, inputs: dict, row: int, answer: list[int]) -> torch.Tensor:
    """Logits (T, V) of one forward pass over a prompt and an answer."""
    one = {name: tensor.chunk(len(inputs["input_ids"]))[row] for name, tensor in inputs.items()}
    new = torch.tensor([answer])
    ids = torch.cat([one["input_ids"], new], dim=1)
    types = torch.cat([one["mm_token_type_ids"], torch.zeros_like(new)], dim=1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    with torch.no_grad():
        return predictor.network(**{**one, **more}).logits[0]

def test_split_digits_are_decided_as_one_by_one(tmp_path):
    folder = make_qwen(tmp_path / "hub", "qwen3_vl", seed=7)  # its choices vary, 1.0 among them
    predictor = infer.load(folder, prompt_file=ROOT / "README.md")
    predictor.prompt = "Read."
    with torch.no_grad():  # untrained models are nearly indifferent: sharpen attention and choices
        for layer in predictor.network.model.language_model.layers:
            layer.self_attn.v_proj.weight.mul_(20)
            layer.mlp.down_proj.weight.mul_(20)
        predictor.network.lm_head.weight.mul_(10)
    noise = np.random.default_rng(1).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    inputs = inputs_of(predictor, [Image.fromarray(pixels) for pixels in noise])
    probabilities, chosen, _ = infer.decode_forced(predictor, inputs, "numeric")
    assert probabilities.sum(dim=-1).numpy() == pytest.approx(1.0, abs=1e-5) and len(chosen.unique()) >= 4
    encode, pieces = predictor.tokenizer.encode, infer.answer_skeleton("numeric")
    digits = [encode(str(k))[0] for k in range(10)]
    for row in range(4):
        written = []
        for k, (text, _) in zip(chosen[row].tolist(), pieces):
            written += encode(text)
            value = []
            for options in (digits[:2], encode("."), digits):
                logits = logits_behind(predictor, inputs, row, written + value)[-1, options]
                after_one = len(options) == 10 and value[0] == digits[1]  # "1." allows only "0"
                value.append(options[0 if after_one else int(logits.argmax())])
            assert predictor.tokenizer.decode(value) == infer.VALUES[k]
            written += value

def test_numbers_first_answers_are_written_greedily(demo, tmp_path, monkeypatch):
    """All tokens of the answer, words behind the numbers included, are what one forward pass would choose."""
    monkeypatch.setattr(infer, "MAX_TEXT_TOKENS", 20)
    run_main(distill, "--data", demo / "train.jsonl", "--limit", 8, "--batch-size", 4, "--steps", 60,
             "--supervision", "numbers-first", "--no-grounding", "--out", tmp_path / "run")
    predictor = infer.load(tmp_path / "run")
    images = [infer.open_image(demo / record["image"]) for record in read_jsonl(demo / "train.jsonl")[:3]]
    inputs = inputs_of(predictor, images)
    written = []  # of each field the token ids of all texts: encoded anew, they may differ
    decode_text = infer.decode_text
    monkeypatch.setattr(infer, "decode_text", lambda *args, **more: written.append(decode_text(*args, **more)) or written[-1])
    _, chosen, _ = infer.decode_forced(predictor, inputs, "numbers-first")
    _, numeric, _ = infer.decode_forced(predictor, inputs, "numeric")
    assert torch.equal(chosen, numeric)  # the words come later and change no number
    encode, pieces = predictor.tokenizer.encode, infer.answer_skeleton("numbers-first")
    values = [encode(value)[0] for value in infer.VALUES]
    for row, numbers in enumerate(chosen.tolist()):
        answer, expected = [], []
        for k, (text, slot) in enumerate(pieces):
            answer += encode(text)
            start = inputs["input_ids"].shape[1] + len(answer)
            if slot in NAMES:
                answer.append(values[numbers[k]])
                expected.append((start, answer[-1], values))
            elif slot:
                words = written[infer.FIELDS.index(slot)][row]
                answer += words
                if len(words) < 20:  # not cut off: the token that closes it was chosen too
                    words = words + [encode(pieces[k + 1][0])[0]]
                expected += [(start + n, word, range(len(predictor.tokenizer))) for n, word in enumerate(words)]
        logits = logits_behind(predictor, inputs, row, answer)
        for place, token, options in expected:
            assert token == options[int(logits[place - 1, list(options)].argmax())]

def test_adapter_equals_the_trained_model_and_refuses_strangers(demo, tmp_path):
    folder = make_qwen(tmp_path / "hub", "qwen3_vl")
    args = distill.parse_args(["--model", str(folder), "--lora-rank", "3", "--out", str(tmp_path / "run")])
    distill.complete(args)
    model, tokenizer, image_processor = distill.load_pretrained(args)
    distill.add_lora(model, 3, 32.0, checkpointing=False)
    assert all("lora_" in name for name in distill.trained_weights(model))
    for weight in distill.trained_weights(model).values():
        weight.copy_(torch.randn(weight.shape))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").touch()
    distill.save_checkpoint(model.eval(), tokenizer, image_processor, args)
    predictor = infer.load(tmp_path / "run")
    inputs = inputs_of(predictor, [Image.new("RGB", (64, 64), "red")])
    with torch.no_grad():
        ours, merged = model(**inputs).logits, predictor.network(**inputs).logits
    assert ours.std() > 0.01 and (ours - merged).abs().max() < 1e-4 * ours.abs().max()

    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    stem = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    assert weights[f"{stem}.lora_A.weight"].shape == (3, 32) and len(weights) == 2 * 14
    assert all(re.fullmatch(config["target_modules"], key.split(".", 2)[2].rsplit(".lora_", 1)[0]) for key in weights)
    fresh = infer.load(folder, prompt_file=ROOT / "README.md").network
    projection = fresh.model.language_model.layers[0].self_attn.q_proj
    expected = projection.weight.detach().clone()
    expected += 8 / 3 ** 0.5 * weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
    infer.merge_adapter(fresh, {**config, "use_rslora": True, "alpha_pattern": {"q_proj": 8}}, weights)
    assert torch.allclose(projection.weight, expected, atol=1e-4)
    for strange in ("base_model.model.elsewhere.lora_A.weight", f"{stem}.lora_magnitude_vector"):
        with pytest.raises(SystemExit, match="matches no weight"):
            infer.merge_adapter(fresh, config, {**weights, strange: torch.zeros(3, 32)})

def test_two_processes_train_as_one(demo, tmp_path):
    folder = make_qwen(tmp_path / "hub", "qwen3_vl")
    flags = ["--model", folder, "--data", demo / "train.jsonl", "--limit", 6, "--steps", 3, "--lr", 0.03,
             "--expectation-weight", 5, "--save-every", 1]
    run_main(distill, *flags, "--batch-size", 2, "--out", tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*map(str, flags), "--batch-size", "1", "--out", str(tmp_path / "two")]
    subprocess.run([*torchrun, ROOT / "distill.py", *flags], check=True, capture_output=True)
    one, two = (read_jsonl(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3]
    for name in ("loss", "val_loss"):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in two], abs=1e-4)
    assert one[0]["loss"] - one[2]["loss"] > 0.01

def test_checkpoint_trained_elsewhere(demo, tmp_path):
    folder = make_qwen(tmp_path / "hub", "qwen3_vl")
    (tmp_path / "prompt.txt").write_text("You read faces.\n---\nGive the coefficients.\n")
    flags = [demo / "val.jsonl", "--model", folder, "--limit", 2, "--out", tmp_path / "p.jsonl"]
    with pytest.raises(SystemExit, match="--prompt FILE"):
        run_main(infer, *flags)
    run_main(infer, *flags, "--prompt", tmp_path / "prompt.txt", "--decode", "generate")
    records = read_jsonl(tmp_path / "p.jsonl")  # it babbles, which is reported and kept
    assert all("the answer" in record["error"] and record["answer"] for record in records)
    predictor = infer.load(folder, prompt_file=tmp_path / "prompt.txt")
    text = predictor.tokenizer.decode(inputs_of(predictor, [Image.new("RGB", (64, 64))])["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou read faces.<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert "<|vision_end|>Give the coefficients.<|im_end|>" in text

def make_odd_pictures(folder: Path) -> set:
    """Fills a folder with pictures as people have them; returns the names of the readable ones."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((240, 160))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    photo.rotate(90, expand=True).save(folder / "rotated.jpg", exif=rotated, quality=95)
    for mode, name in (("L", "gray.png"), ("CMYK", "cmyk.jpg"), ("P", "palette.png"), ("LA", "la.png"),
                       ("1", "bit.png"), ("RGB", "UPPER.WEBP"), ("RGBA", "ünï 名.png")):
        photo.convert(mode).save(folder / name)
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(folder / "gray16.png")
    photo.save(folder / "animated.gif", save_all=True, append_images=[photo.rotate(9)])
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    readable = {path.name for path in folder.iterdir()}
    Image.new("RGB", (1, 300)).save(folder / "line.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    (folder / "torn.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:2000])
    bomb = b"\x00\x00\x00\x0dIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    bomb += zlib.crc32(bomb[4:]).to_bytes(4, "big") + b"\x00\x00\x00\x00IEND\xaeB`\x82"
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb)
    (folder / "notes.txt").write_text("not a picture")
    return readable

def test_any_picture_is_answered_or_reported_even_untrained(demo, tmp_path):
    run_main(distill, "--data", demo / "train.jsonl", "--limit", 4, "--steps", 1, "--batch-size", 1,
             "--out", tmp_path / "run")
    pictures = tmp_path / "bilder ü"
    readable = make_odd_pictures(pictures)
    run_main(infer, pictures, "--model", tmp_path / "run", "--out", tmp_path / "p.jsonl", "--csv",
             tmp_path / "p.csv", "--plot", tmp_path / "charts")
    records = {Path(record["image"]).name: record for record in read_jsonl(tmp_path / "p.jsonl")}
    failed = {name: record["error"] for name, record in records.items() if record["error"]}
    assert set(records) - set(failed) == readable
    assert failed.keys() == {"line.png", "broken.png", "torn.jpg", "bomb.png"}
    assert "aspect ratio" in failed["line.png"] and "truncated" in failed["torn.jpg"]
    assert "DecompressionBombError" in failed["bomb.png"]
    for name in readable:
        assert list(records[name]["coefficients"]) == NAMES
        assert all(0 <= value <= 1 for value in records[name]["coefficients"].values())
        assert set(records[name]["description"]) == set(infer.FIELDS)
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 1 + len(readable)
    assert len(list((tmp_path / "charts").iterdir())) == len(readable)

def test_pictures_are_turned_upright_and_16_bits_scaled(tmp_path):
    make_odd_pictures(tmp_path / "odd")
    pixels = {name: np.asarray(infer.open_image(tmp_path / "odd" / name)).astype(int)
              for name in ("gray.png", "gray16.png", "UPPER.WEBP", "rotated.jpg")}
    assert np.abs(pixels["gray16.png"] - pixels["gray.png"]).max() <= 1
    assert pixels["rotated.jpg"].shape == pixels["UPPER.WEBP"].shape == (160, 240, 3)
    assert np.abs(pixels["rotated.jpg"] - pixels["UPPER.WEBP"]).mean() < 20

def test_chart_shows_strength_and_side():
    coefficients = {**ZEROS, "mouthSmileLeft": 0.8, "mouthSmileRight": 0.4, "jawOpen": 0.6}
    record = {"coefficients": coefficients, "std": ZEROS, "description": None}
    chart = np.asarray(infer.draw_chart(Image.new("RGB", (64, 64)), record))[70:]
    colors = [tuple(bytes.fromhex(color[1:])) for color in infer.COLORS.values()]
    widths = [(chart == color).all(axis=2).sum(axis=1).max() for color in colors]
    assert widths == pytest.approx([0.8 * 390, 0.4 * 390, 0.6 * 390], abs=4)

def test_two_processes_write_what_one_writes(trained, demo, tmp_path):
    flags = [demo / "train.jsonl", "--model", trained, "--limit", 7, "--batch-size", 2]
    run_main(infer, *flags, "--out", tmp_path / "one.jsonl")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, ROOT / "infer.py", *map(str, flags), "--out", tmp_path / "two.jsonl"], check=True)
    one, two = (read_jsonl(tmp_path / name) for name in ("one.jsonl", "two.jsonl"))
    assert [record["image"] for record in one] == [record["image"] for record in two]
    for a, b in zip(one, two):
        assert a["coefficients"] == pytest.approx(b["coefficients"], abs=2e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "two.jsonl"]

def test_interrupted_inference_goes_on(trained, demo, tmp_path, monkeypatch):
    flags = [demo / "train.jsonl", "--model", trained, "--limit", 6, "--batch-size", 2]
    run_main(infer, *flags, "--out", tmp_path / "whole.jsonl")
    genuine, calls = infer.predict, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(*args)
    monkeypatch.setattr(infer, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_main(infer, *flags, "--out", tmp_path / "parts.jsonl")
    part = tmp_path / "parts.jsonl.0of1"
    assert len(read_jsonl(part)) == 1 + 4
    with part.open("ab") as file:
        file.write('{"image": "torn é'.encode()[:-1])  # within a character
    run_main(infer, *flags, "--out", tmp_path / "parts.jsonl")
    assert len(calls) == 4  # only the last batch was decoded again
    settings = {"trained": "then"}
    part.write_text(json.dumps(settings) + '\n{"image": "a.png"}\n')
    assert list(infer.read_finished(part, settings)) == ["a.png"]
    assert infer.read_finished(part, {"trained": "now"}) == {}  # of a model that was trained anew
    part.unlink()
    assert (tmp_path / "whole.jsonl").read_text() == (tmp_path / "parts.jsonl").read_text() and not part.exists()

# ---- evaluate.py -----------------------------------------------------------------------------------
def test_metrics_against_numpy():
    rng = np.random.default_rng(0)
    true, predicted = rng.random((50, 52)), rng.random((50, 52))
    true[:, 3] = 0.0  # never varies: no correlation
    predicted[:, 4] = 0.5  # predicted constant: correlation 0
    m = evaluate.metrics(predicted, true)
    r, _ = evaluate.correlations(predicted, true)
    expected = [np.corrcoef(predicted[:, k], true[:, k])[0, 1] for k in range(52) if k not in (3, 4)]
    assert np.isnan(r[3]) and r[4] == 0.0 and m["constant"] == 1
    assert np.delete(r, [3, 4]) == pytest.approx(expected, abs=1e-9)
    assert m["mae"] == pytest.approx(np.mean(np.abs(predicted - true)), abs=1e-12)
    assert m["rmse"] == pytest.approx(np.mean((predicted - true) ** 2) ** 0.5, abs=1e-12)
    assert m["pearson_median"] == pytest.approx(np.median(expected + [0.0]), abs=1e-9)
    assert m["pearson_above_0.8"] == 0
    seen, active = predicted >= 0.15, true >= 0.15
    precision, recall = (seen & active).sum() / seen.sum(), (seen & active).sum() / active.sum()
    assert m["f1"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-12)
    left = [k for k, name in enumerate(NAMES) if name.endswith("Left") and name[:-4] not in ("jaw", "mouth")]
    right = [NAMES.index(NAMES[k].replace("Left", "Right")) for k in left]
    tilts = [values[:, left] - values[:, right] for values in (predicted, true)]
    assert len(left) == 18 and m["asymmetry"] == pytest.approx(np.abs(tilts[0] - tilts[1]).mean(), abs=1e-12)

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
    # Ranks 1, 2.5, 2.5, 4 and 4, 3, 2, 1: covariance -4.5, variances 4.5 and 5 (each times 3).
    tied = evaluate.spearman(np.array([1, 2, 2, 5.0]), np.array([9, 7, 5, 3.0]))
    assert tied == pytest.approx(-4.5 / (4.5 * 5) ** 0.5)

def test_concordance_on_worked_examples():
    # Lin's CCC by hand, n = 4: covariance 0.015, variances 0.035 and 0.01 (each times n), equal means.
    x, y = np.array([[0.1, 0.2, 0.3, 0.6]]).T, np.array([[0.2, 0.2, 0.4, 0.4]]).T
    _, ccc = evaluate.correlations(x, y)
    assert ccc[0] == pytest.approx(2 * 0.015 / (0.035 + 0.01), abs=1e-9)
    _, ccc = evaluate.correlations(x + 0.1, y)
    assert ccc[0] == pytest.approx(0.03 / (0.045 + 0.01), abs=1e-9)

def test_uncertainty_of_known_errors():
    true = np.full((1000, 52), 0.5)
    true[:, 10:] = 0.0  # not active: not counted
    rng = np.random.default_rng(0)
    std = rng.uniform(0.01, 0.1, true.shape)
    found = evaluate.uncertainty(std, true + std * rng.normal(size=true.shape), true)
    assert found["within_1_std"] == pytest.approx(0.68, abs=0.02) and found["spearman"] > 0.4
    assert found["within_2_std"] == pytest.approx(0.95, abs=0.02)

def test_intervals_cover_the_truth_and_resample_people():
    rng = np.random.default_rng(0)
    covered, widths = 0, {"people": [], "images": []}
    for trial in range(40):
        error = rng.normal(0, 0.1, (60, 1)).repeat(5, axis=0) * np.ones((1, 52))  # people err alike
        for name, group in (("people", np.arange(300) // 5), ("images", np.arange(300))):
            found = evaluate.intervals({"a": error, "b": error + 0.01}, group.tolist(), trial)
            low, high = found["intervals"]["a"]["rmse"]
            widths[name].append(high - low)
            covered += name == "people" and low <= 0.1 <= high
    assert covered >= 34 and np.mean(widths["people"]) > 1.5 * np.mean(widths["images"])
    same = evaluate.intervals({"a": np.full((9, 52), 0.3), "b": np.full((9, 52), 0.1)}, list("abcdefghi"), 0)
    assert same["intervals"]["a"]["rmse"] == pytest.approx([0.3, 0.3])
    assert same["differences"]["b minus a"]["mae"] == pytest.approx([-0.2, -0.2])
    assert same["region_intervals"]["jaw"] == pytest.approx([0.3, 0.3])

def test_models_are_compared_in_pairs_by_field_and_on_a_rig(demo, tmp_path, capsys):
    records = read_jsonl(demo / "val.jsonl")
    rng = np.random.default_rng(0)
    for name, noise in (("good", 0.02), ("bad", 0.2)):
        noisy = [{**record, "error": None, "image": os.path.relpath(demo / record["image"], tmp_path),
                  "coefficients": {key: float(np.clip(value + noise * rng.normal(), 0, 1))
                                   for key, value in record["coefficients"].items()}} for record in records]
        write_jsonl(tmp_path / f"{name}.jsonl", noisy)
    (tmp_path / "rig").mkdir()
    for k, name in enumerate(["Neutral", *NAMES[:-1]]):  # a line of points in cm; shape k lifts point k by 1 cm
        points = [(0.0, -12.0 + j / 2, 1.0 * (j == k - 1)) for j in range(52)]
        short = re.sub("Left$", "_L", name) if name not in ("jawLeft", "mouthLeft") else name
        (tmp_path / "rig" / f"{short}.obj").write_text("".join(f"v {x} {y} {z}\n" for x, y, z in points))
    run_main(evaluate, tmp_path / "good.jsonl", tmp_path / "bad.jsonl", demo / "val.jsonl", "--by", "identity",
             "--rig", tmp_path / "rig", "--plot", tmp_path / "m.png", "--out", tmp_path / "m.json")
    results = json.loads((tmp_path / "m.json").read_text())
    low, high = results["differences"][f"{tmp_path}/bad.jsonl minus {tmp_path}/good.jsonl"]["rmse"]
    assert 0.05 < low < high < 0.25 and "higher" in capsys.readouterr().out
    assert sum(values["images"] for values in results["by"].values()) == len(records)
    assert results["rig_unit"] == "cm" and Image.open(tmp_path / "m.png").size == (1800, 1180)
    good = results["models"][f"{tmp_path}/good.jsonl"]
    # Every coefficient but tongueOut moves one of 52 points by 10 mm.
    assert good["vertex_mm"] == pytest.approx(10 * good["mae"], rel=0.05)

@pytest.mark.filterwarnings("error")
def test_evaluate_compares_with_baselines_and_refuses_mismatches(demo, tmp_path, capsys):
    records = read_jsonl(demo / "val.jsonl")
    (tmp_path / "linked").symlink_to(demo)
    perfect = [{**record, "image": f"linked/{record['image']}", "error": None} for record in records]
    perfect[0] |= {"error": "unreadable", "coefficients": None}
    path = write_jsonl(tmp_path / "p.jsonl", perfect)
    run_main(evaluate, path, demo / "val.jsonl", "--out", tmp_path / "m.json", "--plot", tmp_path / "m.png")
    results = json.loads((tmp_path / "m.json").read_text())
    assert results["models"][str(path)]["rmse"] == 0 and results["errors"] == 1
    assert set(results["description"].values()) == {1.0} and len(results["description"]) == 5
    true = as_array(records[1:])
    mean = as_array(read_jsonl(demo / "train.jsonl")).mean(axis=0)
    assert results["baselines"]["training mean"]["rmse"] == pytest.approx(np.sqrt(((true - mean) ** 2).mean()))
    assert "1 without prediction" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="ends in .png"):
        run_main(evaluate, path, demo / "val.jsonl", "--plot", tmp_path / "m.txt")
    run_main(evaluate, path, demo / "val.jsonl", "--out", tmp_path / "new" / "folder" / "m.json")
    cases = ((perfect[1:], "1 pictures have no prediction"), (perfect + perfect[:1], "second record"),
             (perfect + [{**perfect[1], "image": "x.png"}], "1 predictions have no truth"))
    for change, message in cases:
        with pytest.raises(SystemExit, match=message):
            run_main(evaluate, write_jsonl(path, change), demo / "val.jsonl", "--out", tmp_path / "m.json")

def test_words_are_compared_with_the_model_s_own_numbers(trained, demo, tmp_path, capsys):
    run_main(infer, demo / "train.jsonl", "--limit", 4, "--model", trained, "--out", tmp_path / "p.jsonl")
    run_main(annotate, tmp_path / "p.jsonl", "--out", tmp_path / "own.jsonl")
    run_main(evaluate, tmp_path / "p.jsonl", tmp_path / "own.jsonl", "--out", tmp_path / "m.json")
    results = json.loads((tmp_path / "m.json").read_text())
    assert results["models"][str(tmp_path / "p.jsonl")]["mae"] == 0
    assert results["description"]["f1"] > 0.5 and "nan" not in capsys.readouterr().out

# ---- Bad input -------------------------------------------------------------------------------------

WORDS = dict.fromkeys(annotate.FIELDS, "x")
GOOD = {"image": "x.png", "coefficients": ZEROS, "description": WORDS, "error": None}

@pytest.mark.parametrize("line, message", [
    ("", ""), ("{\"image\": ", ""), ("[1]", ""), ("null", ""),
    (json.dumps({**GOOD, "coefficients": {**ZEROS, "jawOpen": float("nan")}}), "jawOpen"),
    (json.dumps({**GOOD, "coefficients": {**ZEROS, "jawOpen": "0.5"}}), "jawOpen"),
    (json.dumps({**GOOD, "coefficients": {**ZEROS, "jawOpen": True}}), "jawOpen"),
    (json.dumps({**GOOD, "coefficients": {**ZEROS, "jawOpen": 7.0}}), "jawOpen"),
    (json.dumps({**GOOD, "coefficients": {**ZEROS, "jawDrop" * 999: 0.5}}), "52 ARKit"),
    (json.dumps({**GOOD, "coefficients": {"jawOpen": 0.5}}), "52 ARKit"),
    (json.dumps({**GOOD, "coefficients": [0.5]}), "52"),
])
def test_bad_records_are_named(line, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    stages = ((annotate, [path, "--out", tmp_path / "o.jsonl"]), (evaluate, [path, path]),
              (distill, ["--data", path, "--out", tmp_path / "run"]))
    for module, flags in stages:
        with pytest.raises(SystemExit, match=re.escape(str(path))) as error:
            run_main(module, *flags)
        assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600
    assert not (tmp_path / "o.jsonl").exists() and not (tmp_path / "run").exists()

@pytest.mark.parametrize("module, flags, message", [
    (annotate, ["missing.jsonl"], "missing.jsonl"), (annotate, ["README.md"], "README.md, record"),
    (annotate, ["--demo", 5], "--demo 5"), 
    (annotate, ["--every", 0], "--every 0"), (distill, ["--lr", 0], "--lr 0"),
    (distill, ["--data", "missing.jsonl", "--out", "new"], "missing.jsonl does not exist"),
    (distill, ["--device", "cuda"], "no GPU"), (infer, ["--device", "cuda"], "no GPU"),
    (distill, ["--batch-size", 0], "--batch-size 0"), (distill, ["--lora-rank", -1], "--lora-rank -1"),
    (distill, ["--resume", "--out", "nowhere"], "--resume"), (infer, [".ci"], "no picture exists"),
    (infer, ["missing.png"], "missing.png"), (infer, ["--batch-size", 0], "--batch-size 0"),
    (infer, ["README.md", "--model", "nowhere"], "python distill.py"),
    (evaluate, ["missing.jsonl"], "missing.jsonl does not exist"),
])
def test_bad_flags_are_explained(module, flags, message, demo, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if module is distill and "--data" not in flags:
        flags = ["--out", demo / "unused", *flags, "--data", demo / "train.jsonl"]
    with pytest.raises(SystemExit) as error:
        run_main(module, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)

def test_bad_takes_are_explained(demo, tmp_path):
    infer.write_livelink(tmp_path / "take.csv", [{"coefficients": ZEROS, "error": None}] * 3, fps=30)
    lines = (tmp_path / "take.csv").read_text().splitlines()
    cases = (("torn", lines[:3] + [lines[3][:80]], "record 2"), ("header", lines[1:], "missing or unknown"),
             ("word", [lines[0], lines[1].replace(",0.0", ",x", 1)], "'x"),
             ("seven", [lines[0], lines[1].replace("0.0000000000", "7.0", 1)], "7.0"), ("empty", lines[:1], "no usable"))
    for name, text, message in cases:
        (tmp_path / f"{name}.csv").write_text("\n".join(text))
        with pytest.raises(SystemExit, match=message):
            run_main(annotate, tmp_path / f"{name}.csv")
    with pytest.raises(SystemExit, match="nowhere"):
        run_main(annotate, tmp_path / "take.csv", "--frames", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="240 pictures.*3 rows"):
        run_main(annotate, tmp_path / "take.csv", "--frames", demo / "images")

def test_training_needs_pictures_and_descriptions(demo, tmp_path):
    record = read_jsonl(demo / "train.jsonl")[0]
    (demo / "broken.png").write_bytes(b"rubbish")
    cases = (({"image": None}, "image"), ({"image": "gone.png"}, "gone.png"), ({"image": "broken.png"}, "broken.png"),
             ({"description": None}, "description"))
    for change, message in cases:
        path = write_jsonl(demo / "changed.jsonl", [{**record, **change}])
        with pytest.raises(SystemExit, match=message):
            run_main(distill, "--data", path, "--out", tmp_path / "run")
        path.unlink()

def test_damaged_and_occupied_run_folders(trained, demo, tmp_path):
    with pytest.raises(SystemExit, match="holds a finished run"):
        run_main(distill, "--data", demo / "train.jsonl", "--out", trained)
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(SystemExit, match="cannot be read"):
        run_main(infer, demo / "val.jsonl", "--model", tmp_path, "--out", tmp_path / "p.jsonl")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(SystemExit, match="cannot be read"):
        run_main(infer, demo / "val.jsonl", "--model", tmp_path, "--out", tmp_path / "p.jsonl")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(SystemExit, match="is a bert"):
        run_main(distill, "--data", demo / "train.jsonl", "--model", tmp_path, "--out", tmp_path / "new")
