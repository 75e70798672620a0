"""Tests of the four stages: CPU, no network. Run with: pytest test_all.py"""
import ast
import inspect
import json
import os
import random
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
SCRIPTS = ["annotate", "distill", "infer", "evaluate"]
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
             "--tower-steps", 50, "--no-grounding", "--out", folder)
    return folder


# ---------------------------------------------------------------------------------------------------
# The house: copies, budgets, README
# ---------------------------------------------------------------------------------------------------

def test_shared_blocks_are_identical():
    assert len(set(NAMES)) == 52
    assert all(module.ARKIT_NAMES == NAMES for module in (distill, infer, evaluate))
    sources = [(ROOT / f"{name}.py").read_text() for name in SCRIPTS]
    assert len({re.search(r"# The 52 names.*?\n\]", source, re.S).group() for source in sources}) == 1
    for name in ("open_image", "prompt_text", "answer_skeleton"):
        assert inspect.getsource(getattr(distill, name)) == inspect.getsource(getattr(infer, name))
    assert (distill.FIELDS, distill.VALUES, distill.PARTS) == (infer.FIELDS, infer.VALUES, infer.PARTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_stands_alone(name, tmp_path):
    (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    answer = subprocess.check_output([sys.executable, f"{name}.py", "--help"], cwd=tmp_path, text=True)
    assert "--out" in answer


def test_scripts_import_only_the_five_packages():
    allowed = {"torch", "transformers", "PIL", "numpy", "tqdm", "tokenizers", "safetensors"}
    for name in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {module.split(".")[0] for module in modules} <= allowed | sys.stdlib_module_names


def test_readme_commands_parse():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    commands = re.findall(r"^ *(?:python|torchrun) (\w+)\.py(.*)$", "\n".join(blocks), re.M)
    assert {name for name, _ in commands} == set(SCRIPTS)
    for name, rest in commands:
        globals()[name].parse_args(shlex.split(rest.split("&&")[0].replace("$seed", "0"), comments=True))


# ---------------------------------------------------------------------------------------------------
# annotate.py
# ---------------------------------------------------------------------------------------------------

def invert_movements(text: str) -> dict:
    """Reads a description back: {ARKit name: adverb of its intensity}, by the tables alone."""
    found = {}
    for region, actions in annotate.MOVEMENTS.items():
        match = re.search(rf"{region}: (.*?)\.", text)
        for phrase in match.group(1).split(", ") if match else []:
            for key, (noun, verb) in actions.items():
                names = annotate.sides(key)
                pair = {f"left {noun}": names[:1], f"right {noun}": names[1:], f"both {noun}s": names}
                subjects = pair if len(names) > 1 else {noun: names}
                for subject, subject_names in subjects.items():
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


def test_shifted_faces_differ_in_style_only(demo):
    val, shift = read_jsonl(demo / "val.jsonl"), read_jsonl(demo / "shift.jsonl")
    assert [{**record, "image": ""} for record in val] == [{**record, "image": ""} for record in shift]
    pictures = [np.array(Image.open(demo / records[0]["image"]), dtype=float) for records in (val, shift)]
    assert np.abs(pictures[0] - pictures[1]).mean() > 20


def test_demo_is_reproducible_and_splits_by_identity(demo, tmp_path):
    run_main(annotate, "--demo", 240, "--out", tmp_path)
    for file in sorted(demo.rglob("*.*")):
        assert file.read_bytes() == (tmp_path / file.relative_to(demo)).read_bytes()
    people = [{record["identity"] for record in read_jsonl(demo / name)}
              for name in ("train.jsonl", "val.jsonl")]
    assert people[0] and people[1] and not people[0] & people[1]
    run_main(annotate, "--demo", 240, "--out", tmp_path / "other", "--seed", 1)
    others = {record["identity"] for record in read_jsonl(tmp_path / "other" / "train.jsonl")}
    assert not others & (people[0] | people[1])


def test_livelink_round_trip_and_dialects(demo, tmp_path):
    records = [{**record, "error": None} for record in read_jsonl(demo / "val.jsonl")]
    infer.write_livelink(tmp_path / "take.csv", records, fps=60)
    back = list(annotate.read_input(tmp_path / "take.csv", None, 1, Counter()))
    expected = [pytest.approx(record["coefficients"], abs=1e-6) for record in records]
    assert [record["coefficients"] for record in back] == expected
    lines = [line.split(",") for line in (tmp_path / "take.csv").read_text().splitlines()]
    assert len(lines[0]) == 63 and lines[-1][0] == "00:00:00:19.000"
    shuffled = [line[::-1] + ["extra"] for line in lines]  # other column order, extra column, BOM and CRLF
    (tmp_path / "dialect.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(",".join, shuffled)).encode())
    dialect = list(annotate.read_input(tmp_path / "dialect.csv", None, 1, Counter()))
    assert dialect == [{**record, "identity": "dialect"} for record in back]


def test_other_forms_of_coefficients(tmp_path):
    values = {name: round(k / 100, 2) for k, name in enumerate(NAMES)}
    categories = [{"index": k, "score": value, "categoryName": name}
                  for k, (name, value) in enumerate({"_neutral": 0.9, **values}.items()) if name != "tongueOut"]
    short = {re.sub("(Left|Right)$", lambda side: "_" + side.group()[0], name): values[name] for name in NAMES}
    short |= {name: values[name] for name in ("jawLeft", "jawRight", "mouthLeft", "mouthRight")}
    for name in ("jaw_L", "jaw_R", "mouth_L", "mouth_R"):
        short.pop(name)
    csv_lines = [",".join(short), ",".join(map(str, short.values()))]
    forms = {"one": json.dumps({"faceBlendshapes": [{"categories": categories}]}),
             "bare": json.dumps([categories, categories]), "indented": json.dumps({"coefficients": values}, indent=1),
             "many": json.dumps([{"faceBlendshapes": [
                 {"categories": categories}]}] * 3), "short": json.dumps(short), "csv": "\n".join(csv_lines),
             "lines": "\n".join(json.dumps({"coefficients": short}) for _ in range(4))}
    for (name, text), count in zip(forms.items(), (1, 2, 1, 3, 1, 1, 4)):
        (tmp_path / name).write_text(text)
        counts = Counter()
        records = list(annotate.read_input(tmp_path / name, None, 1, counts))
        without = name in ("one", "bare", "many")
        assert +counts == ({"records without tongueOut, set to 0": count} if without else {})
        expected = {**values, "tongueOut": 0.0 if without else values["tongueOut"]}
        assert [record["coefficients"] for record in records] == [expected] * count, name
    refused = {"divide percentages": {**values, "jawOpen": 73}, "unknown": {"coefficients": {**values, "a": 0.5}},
               "expected": [{"categoryName": [], "score": 0.5}], "lists within lists": "[" * 600 + "]" * 600}
    for message, value in refused.items():
        (tmp_path / "refused").write_text(value if isinstance(value, str) else json.dumps(value))
        with pytest.raises(SystemExit, match=message):
            list(annotate.read_input(tmp_path / "refused", None, 1, Counter()))


def test_numbers_are_copied_as_they_stand(tmp_path):
    numbers = ", ".join(f'"{name}": {"1.0e-3" if name == "jawOpen" else "0.250"}' for name in NAMES)
    lines = [f'{{"image": null, "identity": "\\"coefficients\\": {{", "coefficients": {{{numbers}}}}}',
             f'{{"coefficients": {{{numbers}}}, "other": {{"coefficients": {{"jawOpen": 1.0}}}}}}',
             f'{{"image": null, "coefficients": {{{numbers}}}, "identity": "last"}}',
             f'{{"other": {{"coefficients": {{"jawOpen": 1.0}}}}, "coefficients": {{{numbers}}}}}']
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    run_main(annotate, tmp_path / "labels.jsonl", "--out", tmp_path / "o.jsonl")
    written = (tmp_path / "o.jsonl").read_text().splitlines()
    assert numbers in written[1]
    for line in written:
        assert json.loads(line)["coefficients"] == {**dict.fromkeys(NAMES, 0.25), "jawOpen": 0.001}
    assert json.loads(written[2])["identity"] == "last"


def test_empty_and_failed_entries_of_json_lines(tmp_path):
    good, failed = {"coefficients": ZEROS}, {"coefficients": None, "error": "unreadable"}
    path = write_jsonl(tmp_path / "mixed.jsonl", [[], good, [failed, good, failed]])
    counts = Counter()
    assert [record["coefficients"] for record in annotate.read_input(path, None, 1, counts)] == [ZEROS, ZEROS]
    assert counts["without a face or a prediction left out"] == 2


def test_a_line_ends_at_a_newline_only(demo, tmp_path):
    record = read_jsonl(demo / "train.jsonl")[0]
    record |= {"image": str(demo / record["image"]), "identity": "a\u2028b\x85c"}  # which str.splitlines cuts
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    run_main(annotate, path, "--out", tmp_path / "o.jsonl")
    for name in ("labels.jsonl", "o.jsonl"):
        found = distill.read_records(tmp_path / name, "numeric", None)
        assert [one["identity"] for one in found] == [record["identity"]]
        assert len(infer.images_of_records(tmp_path / name)) == 1
        assert len(evaluate.read_records(tmp_path / name)) == 1


def test_images_without_a_face_keep_their_place(tmp_path):
    face = {"faceBlendshapes": [{"categories": [{"categoryName": name, "score": 0.5} for name in NAMES]}]}
    (tmp_path / "faces.json").write_text(json.dumps([face, {"faceBlendshapes": []}, face]))
    counts = Counter()
    found = list(annotate.read_input(tmp_path / "faces.json", ["a.png", "b.png", "c.png"], 1, counts))
    assert [record["image"] for record in found] == ["a.png", "c.png"]
    assert counts == {"without a face or a prediction left out": 1}


def test_images_are_relative_to_the_records(tmp_path):
    folder = str(tmp_path)
    expected = {"a.png": "a.png", "./a.png": "a.png", "x/../a.png": "a.png", "../b/a.png": "../b/a.png",
                f"{folder}/x/a.png": "x/a.png", f"{tmp_path.parent}/a.png": "../a.png", "": None}
    assert {image: annotate.relative_image(image, folder) for image in expected} == expected


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
    answer = json.dumps(dict.fromkeys(annotate.FIELDS, "a calm face"))
    prompts = [annotate.llm_prompt(annotate.sample_expression(np.random.default_rng(k))) for k in range(40)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(prompts + [answer], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}\nAnswer:"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        prompt_ids = tokenizer.encode(f"{prompts[step % 40]}\nAnswer:")
        ids = torch.tensor([prompt_ids + tokenizer.encode(answer) + [tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, :len(prompt_ids)] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_frozen_llm_describes_and_rules_stand_in(demo, tmp_path, monkeypatch):
    good, bad = make_llm(tmp_path / "good", 120), make_llm(tmp_path / "bad", 0)
    monkeypatch.setattr(annotate, "LLM_TOKENS", 120)
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

    genuine, calls = annotate.Llm.write, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(*args, **options)
    monkeypatch.setattr(annotate.Llm, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_main(annotate, *flags, "--llm", good, "--out", tmp_path / "parts.jsonl")
    run_main(annotate, *flags, "--out", tmp_path / "parts.jsonl")  # the rules leave the model's answers alone
    with (tmp_path / "parts.jsonl.unfinished").open("ab") as file:
        file.write('{"image": "torn é'.encode()[:-1])  # within a character
    run_main(annotate, *flags, "--llm", good, "--out", tmp_path / "parts.jsonl")
    assert len(calls) == 4 and (tmp_path / "parts.jsonl").read_text() == (tmp_path / "good.jsonl").read_text()
    for text in ("", "{", "[]", '{"symmetry": 1}', json.dumps(dict.fromkeys(annotate.FIELDS, " "))):
        assert annotate.read_description(text) is None


def test_fuzzed_input_never_gives_a_traceback(demo, tmp_path):
    rng = np.random.default_rng(0)
    infer.write_livelink(tmp_path / "take.csv", [{"coefficients": ZEROS, "error": None}] * 2, fps=30)
    good = [(demo / "val.jsonl").read_bytes().split(b"\n")[0], (tmp_path / "take.csv").read_bytes(),
            json.dumps([[{"categoryName": name, "score": 0.1} for name in NAMES]]).encode()]
    pieces = [b"null", b"[]", b"{}", b"\x00", b"\xff", b'"', b",", b"1e999", b"NaN", b"[" * 2000, b"9" * 5000,
              b"\\ud800", b"\n", b"true", b"-1"]
    for case in range(300):
        data = bytearray(good[case % 3])
        for _ in range(rng.integers(1, 4)):
            place, length = rng.integers(0, len(data)), rng.integers(0, 12)
            data[place:place + length] = pieces[rng.integers(len(pieces))] if rng.random() < 0.7 else rng.bytes(3)
        (tmp_path / "fuzzed").write_bytes(data)
        try:
            run_main(annotate, tmp_path / "fuzzed", "--out", tmp_path / "out.jsonl")
        except SystemExit as error:
            assert "fuzzed" in str(error) and "expected" in str(error), error


def test_real_takes_overshoot_and_are_clipped():
    counts = Counter()
    clipped = annotate.check_coefficients({**ZEROS, "eyeLookInLeft": 1.053}, "here", counts)
    assert clipped["eyeLookInLeft"] == 1.0 and counts["clipped values"] == 1


def test_render_draws_predictions(demo, tmp_path):
    run_main(annotate, demo / "val.jsonl", "--render", "--out", tmp_path / "avatars", "--limit", 3)
    records = read_jsonl(tmp_path / "avatars" / "records.jsonl")
    assert len(records) == 3
    drawn = np.asarray(Image.open(tmp_path / "avatars" / records[0]["image"]))
    expected = annotate.draw_face(records[0]["coefficients"], records[0]["identity"])
    assert (drawn == np.asarray(expected)).all()


# ---------------------------------------------------------------------------------------------------
# distill.py
# ---------------------------------------------------------------------------------------------------

def make_dataset(demo: Path, supervision: str, count: int = 8):
    flags = ["--data", str(demo / "train.jsonl"), "--supervision", supervision, "--out", "unused"]
    args = distill.parse_args(flags)
    distill.check_args(args)
    records = distill.read_records(demo / "train.jsonl", supervision, count)
    torch.manual_seed(0)
    model, tokenizer, image_processor = distill.load_model(args, records)
    return model, distill.FaceDataset(records, tokenizer, image_processor, args)


@pytest.mark.parametrize("supervision", ["semantic", "numeric", "numbers-first"])
def test_exactly_the_answer_and_its_end_are_supervised(demo, supervision):
    _, dataset = make_dataset(demo, supervision)
    batch = dataset.collate([dataset[index, supervision] for index in range(3)])
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
        slots = dataset.tokenizer.decode(batch["input_ids"][row][batch["kinds"][row] != distill.SKELETON])
        assert "".join(f"{value:.1f}" for value in record["coefficients"].values()) in slots


def test_hidden_words_leave_skeleton_and_labels_alone(demo):
    _, dataset = make_dataset(demo, "semantic")
    batch = dataset.collate([dataset[index, "semantic"] for index in range(8)])
    for progress, shares in ((0.0, (0.3, 1.0)), (1.0, (0.1, 0.1))):
        hidden = distill.hide_words(batch, progress, dataset.tokenizer.pad_token_id, seed=0)
        changed = hidden["input_ids"] != batch["input_ids"]
        assert not changed[batch["kinds"] == distill.SKELETON].any() and hidden["labels"] is batch["labels"]
        for kind, share in zip((distill.TEXT, distill.NUMBER), shares):
            assert changed[batch["kinds"] == kind].float().mean().item() == pytest.approx(share, abs=0.08)


def test_guesses_replace_a_share_of_the_words_and_their_loss(demo):
    model, dataset = make_dataset(demo, "semantic")
    batch = dataset.collate([dataset[index, "semantic"] for index in range(8)])
    doubted = distill.doubt_words(model, batch, dataset.tokenizer.pad_token_id, seed=1, text_share=0.5)
    changed = doubted["input_ids"] != batch["input_ids"]
    text, number = batch["kinds"] == distill.TEXT, batch["kinds"] == distill.NUMBER
    assert not changed[batch["kinds"] == distill.SKELETON].any() and doubted["labels"] is batch["labels"]
    rows = (changed & text).any(dim=1)  # untrained guesses are nearly all wrong
    assert 0 < rows.sum() < 8 and changed[rows][text[rows]].float().mean() > 0.9
    assert (doubted["weights"][rows][text[rows]] == 0).all()
    rest = ~(text & rows[:, None])
    assert torch.equal(doubted["weights"][rest], batch["weights"][rest])
    assert changed[number].float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_descriptions_phase_in():
    args = distill.parse_args(["--steps", "100", "--out", "unused"])
    distill.check_args(args)
    lots = random.Random(0)
    shares = [np.mean([distill.choose_supervision(args, step, lots) == "semantic" for _ in range(400)])
              for step in (0, 40, 80, 99)]
    assert shares == pytest.approx([0.0, 0.5, 1.0, 1.0], abs=0.08)


def test_loss_equals_the_library_s(demo):
    model, dataset = make_dataset(demo, "semantic")
    batch = dataset.collate([dataset[index, "semantic"] for index in range(4)])
    losses, weights, tokens = distill.token_losses(model, batch)
    assert tokens.shape == (4 * 16, 96)
    names = ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw", "labels")
    inputs = {name: batch[name] for name in names}
    real = torch.tensor([len(dataset[index, "semantic"]["input_ids"]) for index in range(4)])
    inputs["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < real[:, None]).long()
    assert losses.mean().item() == pytest.approx(model(**inputs).loss.item(), abs=1e-5)
    assert weights.unique().tolist() == pytest.approx([distill.SKELETON_WEIGHT, 1.0])


def test_batches_cover_every_record_and_can_be_recomputed():
    args = distill.parse_args(["--batch-size", "2", "--tower-steps", "0", "--no-grounding", "--out", "unused"])
    distill.check_args(args)
    records = [{"description": {"symmetry": "x" * k}} for k in range(10)]
    batches = [distill.step_keys(records, args, step) for step in range(10)]
    order = [index for step in batches for batch in step for index, _ in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    # One process with batches of two, or two with two accumulated batches of one: the same records a step.
    args.batch_size, args.grad_accum, args.world_size = 1, 1, 2
    for step in range(10):
        shared = []
        for args.rank in (0, 1):
            shared += distill.step_keys(records, args, step)
        assert sorted(sum(shared, [])) == sorted(batches[step][0])


def test_tokenizer_loses_nothing():
    tokenizer = distill.build_tokenizer(["Brows: both brows strongly lowered."] * 20)
    for text in ("Brows: both brows strongly lowered.", "naïve 😀 \"unseen\" 0.35\n", '{"jawOpen": 0.3}'):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tiny_model_learns_faces_by_heart(trained, demo):
    log = read_jsonl(trained / "log.jsonl")
    chance = np.log(11)
    assert log[-1]["loss"] < 0.15 * chance and log[-1]["samples/s"] > 0
    predictor = infer.load(trained)
    records = read_jsonl(demo / "train.jsonl")[:8]
    predictions = infer.predict(predictor, [demo / record["image"] for record in records], kind="mode")
    predicted, true = as_array(predictions), as_array(records)
    assert np.abs(predicted - true).mean() < 0.04 < np.abs(true).mean()
    same = [p["description"] == r["description"] for p, r in zip(predictions, records)]
    assert np.mean(same) > 0.7


def test_resume_equals_uninterrupted(demo, tmp_path, monkeypatch):
    flags = ["--data", demo / "train.jsonl", "--limit", 12, "--steps", 2, "--tower-steps", 2,
             "--batch-size", 2, "--grad-accum", 2, "--save-every", 1]
    run_main(distill, *flags, "--out", tmp_path / "whole")
    genuine = distill.step_loss
    for stop in (0, 2):  # Ctrl-C once in each phase
        def interrupted(*args):
            if args[3] == stop and inspect.currentframe().f_back.f_code.co_name == "train":
                os.kill(os.getpid(), signal.SIGINT)
            return genuine(*args)
        monkeypatch.setattr(distill, "step_loss", interrupted)
        with pytest.raises(SystemExit, match="--resume"):
            run_main(distill, *flags, "--out", tmp_path / "parts", *(["--resume"] if stop else []))
    monkeypatch.setattr(distill, "step_loss", genuine)
    with pytest.raises(SystemExit, match="not 0.5"):
        run_main(distill, *flags, "--out", tmp_path / "parts", "--resume", "--lr", 0.5)
    run_main(distill, *flags, "--out", tmp_path / "parts", "--resume")
    files = [tmp_path / part / "model.safetensors" for part in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "parts" / "state.pt").exists()


def test_killed_run_resumes_to_the_same_weights(demo, tmp_path):
    flags = ["--data", demo / "train.jsonl", "--limit", 12, "--steps", 6, "--tower-steps", 1, "--batch-size", 2,
             "--save-every", 3]
    run_main(distill, *flags, "--out", tmp_path / "whole")
    command = [sys.executable, ROOT / "distill.py", *map(str, flags), "--out", tmp_path / "killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    log = tmp_path / "killed" / "log.jsonl"
    while process.poll() is None and not (log.is_file() and '"step": 3' in log.read_text()):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "killed" / "state.pt").is_file() and not (tmp_path / "killed" / "run.json").exists()
    run_main(distill, *flags, "--out", tmp_path / "killed", "--resume")
    whole, killed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    steps = [line["step"] for line in read_jsonl(log)]
    assert steps == sorted(set(steps))


# ---------------------------------------------------------------------------------------------------
# infer.py
# ---------------------------------------------------------------------------------------------------

def is_well_formed(written: str) -> bool:
    """Whether an answer has all fields and names, once and in order, and only the eleven values."""
    try:
        answer = json.loads(written, parse_float=lambda text: f"<{text}>")
    except json.JSONDecodeError:
        return False
    return (answer.keys() == {"analysis", "arkit"} and list(answer["analysis"]) == infer.FIELDS
            and list(answer["arkit"]) == NAMES and written.count('": ') == 58
            and {f"<{value}>" for value in infer.VALUES} >= set(answer["arkit"].values()))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_forced_decoding_writes_what_generate_writes(trained, demo, batch_size, monkeypatch):
    monkeypatch.setattr(infer, "MAX_NEW_TOKENS", 250)
    predictor = infer.load(trained)
    seen = [infer.open_image(demo / record["image"]) for record in read_jsonl(demo / "train.jsonl")[:8]]
    # The same pictures darker and darker, whose answers are doubtful but mostly whole.
    images = [image.point(lambda value: value * share) for share in (1.0, 0.9, 0.8, 0.7) for image in seen]
    well_formed, lengths = 0, set()
    for start in range(0, 32, batch_size):
        inputs = infer.prepare(predictor, images[start:start + batch_size])
        _, chosen, texts = infer.decode_forced(predictor, inputs, "semantic")
        for written, row, text in zip(infer.decode_generate(predictor, inputs), chosen.tolist(), texts):
            numbers = {name: k / 10 for name, k in zip(NAMES, row)}
            forced = json.dumps({"analysis": text, "arkit": numbers}, ensure_ascii=False)
            if is_well_formed(written):
                assert written == forced
                well_formed += 1
            lengths.add(len(forced))
    assert well_formed >= 12 and len(lengths) >= 4


def test_reader_of_foreign_answers():
    heads = ["Category", "Muscles", "Emotion", "Symmetry"]
    sections = "\n".join(f"**{k}. {head}**\n{head} {{text}}" for k, head in enumerate(heads, 1))
    keys = {name[0].upper() + name[1:]: 0.3 for name in NAMES} | {"HeadYaw": -0.2, "TongueOut": -0.0}
    coefficients, description = infer.read_answer(f"{sections}\n\n{json.dumps(keys)} end")
    assert coefficients == {**dict.fromkeys(NAMES, 0.3), "tongueOut": 0.0} and list(coefficients) == NAMES
    assert description["symmetry"] == "Symmetry {text}" and list(description) == infer.FIELDS
    whole = {"analysis": dict.fromkeys(infer.FIELDS, "x"), "arkit": ZEROS}
    assert infer.read_answer("{} " + json.dumps(whole)) == (ZEROS, whole["analysis"])
    without = {name: value for name, value in ZEROS.items() if name != "jawOpen"}
    for text, message in (("no braces", "no whole JSON"), (json.dumps(whole)[:-30], "lacks 52"),
                          (json.dumps(without), "lacks 1 .*jawOpen"), (json.dumps({**ZEROS, "jawOpen": "x"}), "lacks 1"),
                          (json.dumps({**ZEROS, "jawOpen": float("nan")}), "lacks 1")):
        with pytest.raises(ValueError, match=message):
            infer.read_answer(text)


def test_estimates_of_a_known_distribution():
    probabilities = torch.zeros(1, 1, 11)
    probabilities[0, 0, [0, 4, 10]] = torch.tensor([0.3, 0.3, 0.4])
    chosen = torch.tensor([[10]])
    kinds = ("mean", "median", "mode")
    values = [[tensor.item() for tensor in infer.estimate(probabilities, chosen, kind)] for kind in kinds]
    spread = (0.3 * 0.52 ** 2 + 0.3 * 0.12 ** 2 + 0.4 * 0.48 ** 2) ** 0.5
    assert values == [pytest.approx([point, spread], abs=1e-6) for point in (0.52, 0.4, 1.0)]


def make_qwen(folder: Path, kind: str) -> Path:
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
    torch.manual_seed(0)
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
             "--batch-size", 2, "--max-pixels", 4096, "--lora-rank", rank, "--out", tmp_path / "run")
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


def test_split_digits_are_decided_as_one_by_one(tmp_path):
    predictor = infer.load(make_qwen(tmp_path / "hub", "qwen3_vl"), prompt_file=ROOT / "README.md")
    predictor.prompt = "Read."
    with torch.no_grad():  # untrained models are nearly indifferent: sharpen attention and choices
        for layer in predictor.network.model.language_model.layers:
            layer.self_attn.v_proj.weight.mul_(20)
            layer.mlp.down_proj.weight.mul_(20)
        predictor.network.lm_head.weight.mul_(10)
    noise = np.random.default_rng(1).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    inputs = infer.prepare(predictor, [Image.fromarray(pixels) for pixels in noise])
    probabilities, chosen, _ = infer.decode_forced(predictor, inputs, "numeric")
    assert probabilities.sum(dim=-1).numpy() == pytest.approx(1.0, abs=1e-5) and len(chosen.unique()) >= 4
    encode, pieces = predictor.tokenizer.encode, infer.answer_skeleton("numeric")
    digits = [encode(str(k))[0] for k in range(10)]
    for row in range(4):
        one = {name: tensor.chunk(4)[row] for name, tensor in inputs.items()}
        written = []
        for k, (text, _) in zip(chosen[row].tolist(), pieces):
            written += encode(text)
            value = []
            for options in (digits[:2], encode("."), digits):
                new = torch.tensor([written + value])
                ids = torch.cat([one["input_ids"], new], dim=1)
                types = torch.cat([one["mm_token_type_ids"], torch.zeros_like(new)], dim=1)
                more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
                with torch.no_grad():
                    logits = predictor.network(**{**one, **more}).logits[0, -1, options]
                after_one = len(options) == 10 and value[0] == digits[1]  # "1." allows only "0"
                value.append(options[0 if after_one else int(logits.argmax())])
            assert predictor.tokenizer.decode(value) == infer.VALUES[k]
            written += value


def test_numbers_first_answers_are_written_greedily(demo, tmp_path, monkeypatch):
    """All tokens of the answer, words behind the numbers included, are what one forward pass would choose."""
    monkeypatch.setattr(infer, "MAX_TEXT_TOKENS", 20)
    run_main(distill, "--data", demo / "train.jsonl", "--limit", 8, "--batch-size", 4, "--steps", 60,
             "--tower-steps", 5, "--supervision", "numbers-first", "--no-grounding", "--out", tmp_path / "run")
    predictor = infer.load(tmp_path / "run")
    images = [infer.open_image(demo / record["image"]) for record in read_jsonl(demo / "train.jsonl")[:3]]
    inputs = infer.prepare(predictor, images)
    written = []  # token ids of the texts: encoded anew, what a half-trained model wrote may differ
    decode_texts = infer.decode_texts
    monkeypatch.setattr(infer, "decode_texts", lambda *args: written.extend(decode_texts(*args)) or written)
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
                words = written[row][infer.FIELDS.index(slot)]
                answer += words
                if len(words) < 20:  # not cut off: the token that closes it was chosen too
                    words = words + [encode(pieces[k + 1][0])[0]]
                expected += [(start + n, word, range(len(predictor.tokenizer))) for n, word in enumerate(words)]
        one = {name: tensor.chunk(3)[row] for name, tensor in inputs.items()}
        new = torch.tensor([answer])
        ids = torch.cat([one["input_ids"], new], dim=1)
        types = torch.cat([one["mm_token_type_ids"], torch.zeros_like(new)], dim=1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
        with torch.no_grad():
            logits = predictor.network(**{**one, **more}).logits[0]
        for place, token, options in expected:
            assert token == options[int(logits[place - 1, list(options)].argmax())]


def test_regression_checkpoint(demo, tmp_path):
    run_main(distill, "--data", demo / "train.jsonl", "--limit", 8, "--batch-size", 4, "--steps", 0,
             "--tower-steps", 150, "--out", tmp_path / "run")
    run_main(infer, demo / "train.jsonl", "--limit", 8, "--model", tmp_path / "run", "--batch-size", 3,
             "--out", tmp_path / "p.jsonl")
    found, truth = read_jsonl(tmp_path / "p.jsonl"), read_jsonl(demo / "train.jsonl")[:8]
    predicted, true = as_array(found), as_array(truth)
    assert np.sqrt(((predicted - true) ** 2).mean()) < 0.5 * true.std(axis=0).mean()
    assert found[0]["std"] is None and found[0]["description"] is None


def test_adapter_equals_the_trained_model_and_refuses_strangers(demo, tmp_path):
    folder = make_qwen(tmp_path / "hub", "qwen3_vl")
    args = distill.parse_args(["--model", str(folder), "--lora-rank", "3", "--out", str(tmp_path / "run")])
    distill.check_args(args)
    model, tokenizer, image_processor = distill.load_model(args, [])
    distill.add_lora(model, args)
    assert all("lora_" in name for name in distill.trained_weights(model))
    for name, weight in distill.trained_weights(model).items():
        weight.copy_(torch.randn(weight.shape))
    run = {**vars(args), "prompt": distill.PROMPT}
    (tmp_path / "run").mkdir()
    distill.save_checkpoint(tmp_path / "run", model.eval(), None, tokenizer, image_processor, run)
    predictor = infer.load(tmp_path / "run")
    inputs = infer.prepare(predictor, [Image.new("RGB", (64, 64), "red")])
    with torch.no_grad():
        ours, merged = model(**inputs).logits, predictor.network(**inputs).logits
    assert ours.std() > 0.01 and (ours - merged).abs().max() < 1e-4 * ours.abs().max()

    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    stem = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    assert weights[f"{stem}.lora_A.weight"].shape == (3, 32) and len(weights) == 2 * 14
    assert all(re.fullmatch(config["target_modules"], key.split(".", 2)[2].rsplit(".lora_", 1)[0]) for key in weights)
    fresh = infer.load(folder, prompt_file=ROOT / "README.md").network
    expected = fresh.model.language_model.layers[0].self_attn.q_proj.weight.detach().clone()
    expected += 32 / 3 ** 0.5 * weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
    infer.merge_adapter(fresh, {**config, "use_rslora": True}, weights)
    assert torch.allclose(fresh.model.language_model.layers[0].self_attn.q_proj.weight, expected, atol=1e-4)
    for strange in ("base_model.model.elsewhere.lora_A.weight", f"{stem}.lora_magnitude_vector"):
        with pytest.raises(SystemExit, match="matches no weight"):
            infer.merge_adapter(fresh, config, {**weights, strange: torch.zeros(3, 32)})


def test_two_processes_train_as_one(demo, tmp_path):
    folder = make_qwen(tmp_path / "hub", "qwen3_vl")
    flags = ["--model", folder, "--data", demo / "train.jsonl", "--limit", 6, "--steps", 3, "--lora-dropout", 0,
             "--max-pixels", 4096, "--lr", 0.01, "--save-every", 1]
    run_main(distill, *flags, "--batch-size", 2, "--out", tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*map(str, flags), "--batch-size", "1", "--out", str(tmp_path / "two")]
    subprocess.run([*torchrun, ROOT / "distill.py", *flags], check=True, capture_output=True)
    one, two = (read_jsonl(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3]
    for name in ("loss", "val_loss"):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in two], abs=1e-4)
    assert one[0]["loss"] - one[2]["loss"] > 0.01


def test_held_out_records_share_no_identity():
    records = [{"identity": f"id{k // 10}"} for k in range(200)]
    train, val = distill.hold_out(records, seed=0)
    people = [{record["identity"] for record in part} for part in (train, val)]
    assert len(val) == 10 and not people[0] & people[1] and len(train) + len(val) == 200
    one_take = [{"identity": "take", "frame": k} for k in range(100)]
    assert distill.hold_out(one_take, seed=0)[1] == one_take[95:]
    assert distill.hold_out(records[:9], seed=0) == (records[:9], [])


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
    text = predictor.tokenizer.decode(infer.prepare(predictor, [Image.new("RGB", (64, 64))])["input_ids"][0])
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
    run_main(distill, "--data", demo / "train.jsonl", "--limit", 4, "--steps", 1, "--tower-steps", 0,
             "--batch-size", 1, "--out", tmp_path / "run")
    pictures = tmp_path / "bilder ü"
    readable = make_odd_pictures(pictures)
    run_main(infer, pictures, "--model", tmp_path / "run", "--out", tmp_path / "p.jsonl", "--csv",
             tmp_path / "p.csv", "--plot", tmp_path / "charts")
    records = {Path(record["image"]).name: record for record in read_jsonl(tmp_path / "p.jsonl")}
    failed = {name: record["error"] for name, record in records.items() if record["error"]}
    assert set(records) - set(failed) == readable
    assert failed.keys() == {"line.png", "broken.png", "torn.jpg", "bomb.png"}
    assert "1 x 300 pixels" in failed["line.png"] and "truncated" in failed["torn.jpg"]
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
    widths = [(chart == color).all(axis=2).sum(axis=1).max() for color in infer.COLORS.values()]
    assert widths == pytest.approx([0.8 * 390, 0.4 * 390, 0.6 * 390], abs=4)
    assert infer.strongest(coefficients, 2) == [("mouthSmile", ["mouthSmileLeft", "mouthSmileRight"]),
                                                ("jawOpen", ["jawOpen"])]


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
    genuine, calls = infer.answer, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(*args)
    monkeypatch.setattr(infer, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_main(infer, *flags, "--out", tmp_path / "parts.jsonl")
    assert len(read_jsonl(tmp_path / "parts.jsonl")) == 4
    with (tmp_path / "parts.jsonl").open("ab") as file:
        file.write('{"image": "torn é'.encode()[:-1])  # within a character
    run_main(infer, *flags, "--out", tmp_path / "parts.jsonl")
    assert len(calls) == 4  # only the last batch was decoded again
    assert (tmp_path / "whole.jsonl").read_text() == (tmp_path / "parts.jsonl").read_text()


# ---------------------------------------------------------------------------------------------------
# evaluate.py
# ---------------------------------------------------------------------------------------------------

def by_coefficient(predicted, true) -> dict:
    return evaluate.by_coefficient(evaluate.group_sums(predicted, true)[0])


def test_metrics_against_numpy():
    rng = np.random.default_rng(0)
    true, predicted = rng.random((50, 52)), rng.random((50, 52))
    true[:, 3] = 0.0  # never varies: no correlation
    predicted[:, 4] = 0.5  # predicted constant: correlation 0
    m = evaluate.metrics(predicted, true)
    r = np.array([values["pearson"] for values in by_coefficient(predicted, true).values()], dtype=float)
    expected = [np.corrcoef(predicted[:, k], true[:, k])[0, 1] for k in range(52) if k not in (3, 4)]
    assert np.isnan(r[3]) and r[4] == 0.0 and m["constant"] == 1
    assert np.delete(r, [3, 4]) == pytest.approx(expected, abs=1e-9)
    assert m["mae"] == pytest.approx(np.mean(np.abs(predicted - true)), abs=1e-12)
    assert m["rmse"] == pytest.approx(np.mean((predicted - true) ** 2) ** 0.5, abs=1e-12)
    assert m["pearson_median"] == pytest.approx(np.median(expected + [0.0]), abs=1e-9)
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


def test_agreement_coefficients_on_worked_examples():
    # Lin's CCC and ICC(3,1) from the two-way table of variance, by hand: two raters, n = 4.
    x, y = np.array([0.1, 0.2, 0.3, 0.6]), np.array([0.2, 0.2, 0.4, 0.4])
    grand, rows = np.mean([x, y]), (x + y) / 2
    between = 2 * ((rows - grand) ** 2).sum() / 3  # MSB
    columns = 4 * sum((rater.mean() - grand) ** 2 for rater in (x, y))
    total = ((x - grand) ** 2).sum() + ((y - grand) ** 2).sum()
    error = (total - 3 * between - columns) / 3  # MSE
    each = by_coefficient(np.tile(x[:, None], 52), np.tile(y[:, None], 52))["jawOpen"]
    assert each["icc"] == pytest.approx((between - error) / (between + error), abs=1e-9)
    assert each["icc"] == pytest.approx(2 / 3, abs=1e-9)  # cov 0.015, variances 0.035 and 0.01
    assert each["ccc"] == pytest.approx(2 * 0.015 / (0.035 + 0.01), abs=1e-9)  # the means are equal
    each = by_coefficient(np.tile(x[:, None] + 0.1, 52), np.tile(y[:, None], 52))["jawOpen"]
    assert each["ccc"] == pytest.approx(0.03 / (0.045 + 0.01), abs=1e-9)
    # Shrout & Fleiss (1979), Table 2, judges 1 and 2, in tenths.
    one, two = np.array([9, 6, 8, 7, 10, 6]) / 10, np.array([2, 1, 4, 1, 5, 2]) / 10
    each = by_coefficient(np.tile(one[:, None], 52), np.tile(two[:, None], 52))["jawOpen"]
    covariance = np.cov(one, two)
    assert each["icc"] == pytest.approx(2 * covariance[0, 1] / (covariance[0, 0] + covariance[1, 1]), abs=1e-9)


def test_rank_correlation():
    assert evaluate.spearman(np.array([1, 2, 3, 4.0]), np.array([1, 8, 27, 64.0])) == pytest.approx(1.0)
    # Ranks 1, 2.5, 2.5, 4 and 4, 3, 2, 1: covariance -4.5, variances 4.5 and 5 (each times 3).
    tied = evaluate.spearman(np.array([1, 2, 2, 5.0]), np.array([9, 7, 5, 3.0]))
    assert tied == pytest.approx(-4.5 / (4.5 * 5) ** 0.5)


def resample(predicted, true, weights, groups) -> dict:
    return evaluate.summary(evaluate.bootstrap(evaluate.group_sums(predicted, true, groups), weights))


def test_intervals_cover_the_truth_and_resample_people():
    rng = np.random.default_rng(0)
    covered, widths = 0, {}
    for trial in range(40):
        error = rng.normal(0, 0.1, (60, 1)).repeat(5, axis=0)  # five images of a person err alike
        true = rng.random((300, 52))
        groups = {"people": np.arange(300) // 5, "images": np.arange(300)}
        for name, group in groups.items():
            weights, group = evaluate.resampled(group, trial)
            low, high = evaluate.interval(resample(true + error, true, weights, group)["rmse"])
            widths.setdefault(name, []).append(high - low)
            covered += name == "people" and low <= 0.1 <= high
    assert covered >= 34 and np.mean(widths["people"]) > 1.5 * np.mean(widths["images"])
    once = resample(true + error, true, np.ones((1, 60)), groups["people"])
    assert once["rmse"][0] == pytest.approx(evaluate.metrics(true + error, true)["rmse"], abs=1e-12)


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
    expected = 10 * results["model"]["mae"]  # every coefficient but tongueOut moves one of 52 points by 10 mm
    assert results["model"]["vertex_mm"] == pytest.approx(expected, rel=0.05)


def test_a_folder_is_a_method_and_its_seeds_are_averaged(demo, tmp_path):
    records = read_jsonl(demo / "val.jsonl")
    rng = np.random.default_rng(0)
    for name, noises in (("sure", (0.05, 0.05, 0.05)), ("unsure", (0.02, 0.08, 0.14))):
        for seed, noise in enumerate(noises):
            moved = [{name: float(np.clip(value + rng.normal(0, noise), 0, 1)) for name, value in
                      record["coefficients"].items()} for record in records]
            (tmp_path / name).mkdir(exist_ok=True)
            write_jsonl(tmp_path / name / f"{seed}.jsonl",
                        [{"image": str(demo / record["image"]), "coefficients": coefficients, "error": None}
                         for record, coefficients in zip(records, moved)])
    run_main(evaluate, tmp_path / "sure", tmp_path / "unsure", demo / "val.jsonl", "--out", tmp_path / "m.json")
    results = json.loads((tmp_path / "m.json").read_text())
    for name in map(str, (tmp_path / "sure", tmp_path / "unsure")):
        rmses = [one["rmse"] for one in results["seeds"][name]]
        assert len(rmses) == 3 and results["models"][name]["rmse"] == pytest.approx(np.mean(rmses))
    widths = [np.ptp(ends["rmse"]) for ends in results["all_intervals"].values()]
    assert widths[1] > 3 * widths[0]  # the seeds differ, which the interval must show
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="holds no .jsonl"):
        run_main(evaluate, tmp_path / "empty", demo / "val.jsonl", "--out", tmp_path / "m.json")


def test_evaluate_compares_with_constants_and_refuses_mismatches(demo, tmp_path, capsys):
    records = read_jsonl(demo / "val.jsonl")
    perfect = [{**record, "image": os.path.relpath(demo / record["image"], tmp_path), "error": None}
               for record in records]
    perfect[0] |= {"error": "unreadable", "coefficients": None}
    path = write_jsonl(tmp_path / "p.jsonl", perfect)
    run_main(evaluate, path, demo / "val.jsonl", "--out", tmp_path / "m.json")
    results = json.loads((tmp_path / "m.json").read_text())
    assert results["model"]["rmse"] == 0 and results["errors"] == 1
    assert set(results["description"].values()) == {1.0} and len(results["description"]) == 5
    true = as_array(records[1:])
    mean = as_array(read_jsonl(demo / "train.jsonl")).mean(axis=0)
    assert results["constants"]["train mean"]["rmse"] == pytest.approx(np.sqrt(((true - mean) ** 2).mean()))
    assert "1 without prediction" in capsys.readouterr().out
    cases = ((perfect[1:], "1 pictures have no prediction"), (perfect + perfect[:1], "second record"),
             (perfect + [{**perfect[1], "image": "x.png"}], "1 predictions have no truth"))
    for change, message in cases:
        with pytest.raises(SystemExit, match=message):
            run_main(evaluate, write_jsonl(path, change), demo / "val.jsonl", "--out", tmp_path / "m.json")


# ---------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------

WORDS = dict.fromkeys(annotate.IMPLICATIONS, "x")
GOOD = {"image": "x.png", "coefficients": ZEROS, "description": WORDS, "error": None}


@pytest.mark.parametrize("line, message", [
    ("", "is empty"), ("{\"image\": ", "line 1"), ("[1]", "line 1"), ("null", "line 1"),
    (json.dumps({**GOOD, "coefficients": {**ZEROS, "jawOpen": float("nan")}}), "jawOpen"),
    (json.dumps({**GOOD, "coefficients": {**ZEROS, "jawOpen": "0.5"}}), "jawOpen"),
    (json.dumps({**GOOD, "coefficients": {**ZEROS, "jawOpen": True}}), "jawOpen"),
    (json.dumps({**GOOD, "coefficients": {**ZEROS, "jawOpen": 7.0}}), "jawOpen"),
    (json.dumps({**GOOD, "coefficients": {**ZEROS, "jawDrop": 0.5}}), "52 ARKit names"),
    (json.dumps({**GOOD, "coefficients": {"jawOpen": 0.5}}), "52 ARKit names"),
    (json.dumps({**GOOD, "coefficients": [0.5]}), "line 1"),
])
def test_bad_records_are_named(line, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    stages = ((annotate, [path, "--out", tmp_path / "o.jsonl"]), (evaluate, [path, path]),
              (distill, ["--data", path, "--out", tmp_path / "run"]))
    for module, flags in stages:
        with pytest.raises(SystemExit, match=re.escape(str(path))) as error:
            run_main(module, *flags)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "o.jsonl").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("module, flags, message", [
    (annotate, ["missing.jsonl"], "missing.jsonl is no file"), (annotate, ["README.md"], "README.md, line 1"),
    (annotate, ["--demo", 5], "--demo 5"), (annotate, ["--frames", "nowhere"], "--frames nowhere"),
    (annotate, ["--limit", 0], "--limit 0"), (distill, ["--lr", 0], "--lr 0"),
    (distill, ["--data", "missing.jsonl", "--out", "new"], "missing.jsonl does not exist"),
    (distill, ["--device", "cuda"], "no GPU"), (infer, ["--device", "cuda"], "no GPU"),
    (distill, ["--batch-size", 0], "--batch-size 0"), (distill, ["--out", "."], "holds other files"),
    (distill, ["--resume", "--out", "nowhere"], "--resume"), (infer, [".ci"], "holds no pictures"),
    (infer, ["missing.png"], "missing.png does not exist"), (infer, ["--batch-size", 0], "--batch-size 0"),
    (infer, ["README.md", "--model", "nowhere"], "python distill.py"),
    (evaluate, ["missing.jsonl"], "missing.jsonl does not exist"),
])
def test_bad_flags_are_explained(module, flags, message, demo, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if module is distill and "--data" not in flags:
        flags = ["--out", demo / "unused", *flags, "--data", demo / "train.jsonl", "--steps", 1]
    with pytest.raises(SystemExit) as error:
        run_main(module, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_takes_are_explained(demo, tmp_path):
    infer.write_livelink(tmp_path / "take.csv", [{"coefficients": ZEROS, "error": None}] * 3, fps=30)
    lines = (tmp_path / "take.csv").read_text().splitlines()
    cases = (("torn", lines[:3] + [lines[3][:80]], "line 4"), ("header", lines[1:], "no column for"),
             ("word", [lines[0], lines[1].replace(",0.0", ",x", 1)], "'x"),
             ("seven", [lines[0], lines[1].replace("0.0000000000", "7.0", 1)], "7.0"))
    for name, text, message in cases:
        (tmp_path / f"{name}.csv").write_text("\n".join(text))
        with pytest.raises(SystemExit, match=message):
            run_main(annotate, tmp_path / f"{name}.csv")
    with pytest.raises(SystemExit, match="240 pictures.*3 rows"):
        run_main(annotate, tmp_path / "take.csv", "--frames", demo / "images")


def test_training_needs_pictures_and_descriptions(demo, tmp_path):
    record = read_jsonl(demo / "train.jsonl")[0]
    cases = (({"image": None}, "needs a picture"), ({"image": "gone.png"}, "needs a picture"),
             ({"description": None}, "no complete description"))
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
    with pytest.raises(SystemExit, match="KeyError: 'prompt'"):
        run_main(infer, demo / "val.jsonl", "--model", tmp_path, "--out", tmp_path / "p.jsonl")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(SystemExit, match="is a bert"):
        run_main(distill, "--data", demo / "train.jsonl", "--model", tmp_path, "--out", tmp_path / "new")
