# SPDX-License-Identifier: MIT
"""Inference for SemanticFace (arXiv 2603.14827): images -> description and 52 ARKit coefficients.

The answer's braces, names and quotes are known in advance, so they are fed, not sampled: every
answer is complete and valid. The model decides the words and, for each coefficient, a distribution
over 0.0, 0.1, ... 1.0, whose mean is the estimate (RAIL, arXiv 2403.04182).

Reads:  pictures, folders of pictures, .jsonl records with an "image", a folder of distill.py or,
        with --prompt, any Qwen-VL or PEFT adapter for one
Writes: prediction records, one JSON object a line, with --csv a Live Link Face take, with --plot
        charts. A picture that cannot be used gets its "error" and null coefficients
    {"image": "images/000001.png", "coefficients": {"jawOpen": 0.12, ...}, "std": {"jawOpen": 0.05,
     ...}, "description": {"expression_category": "slight happiness", ...}, "error": null}

    python infer.py photo.jpg folder/ --model runs/demo --out predictions.jsonl --csv take.csv

Shapes: B images, T tokens so far, n new tokens, D width, C = 52 coefficients, L tokens a number.
"""
import argparse
import csv
import json
import math
import os
import re
import textwrap
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoTokenizer, DynamicCache
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging

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
VALUES = [f"{k / 10:.1f}" for k in range(11)]  # a coefficient is written with one decimal
# What an answer holds, in its order; the paper's is "semantic".
PARTS = {"semantic": ("analysis", "arkit"), "numeric": ("arkit",),
         "numbers-first": ("arkit", "analysis")}
# A numbered heading of an answer in Markdown: "**1. Category**" or "4. **Symmetry**: symmetric".
HEADING = re.compile(
    r"(?im)^\W*\d[.)]\W*[^\n:*]*(?:category|movement|implication|symmetry)[^\n:*]*[*:]*")
ANGLES = ["HeadYaw", "HeadPitch", "HeadRoll", "LeftEyeYaw", "LeftEyePitch", "LeftEyeRoll",
          "RightEyeYaw", "RightEyePitch", "RightEyeRoll"]  # the last columns of a Live Link take
MAX_TEXT_TOKENS, MAX_NEW_TOKENS = 400, 2048  # of a description field, of a free answer
FOREIGN_PIXELS = 1024 * 32 * 32  # at most, for a checkpoint trained elsewhere: 1024 image tokens
INK, GRID = "#282828", "#e1e1e1"
COLORS = {"subject's left": "#0072b2", "subject's right": "#e69f00", "unpaired": "#787878"}

def parse_args(argv=None) -> argparse.Namespace:
    """Reads the command line, or `argv`."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", default=["data/demo/val.jsonl"],
        help="pictures, folders of them, .jsonl records (default: the demo's held-out faces)")
    add("--model", default="runs/demo", help="checkpoint folder (default %(default)s)")
    add("--prompt", help="file for a checkpoint trained elsewhere: [system prompt, ---,] prompt")
    add("--out", default="predictions.jsonl", help="prediction records (default %(default)s)")
    add("--csv", help="also write a Live Link Face take, one row for each picture in order")
    add("--fps", type=int, default=60, help="frames per second of the take (default %(default)s)")
    add("--plot", help="also draw a chart of each picture into this folder")
    add("--decode", choices=["forced", "generate"], default="forced",
        help="feed the skeleton, or read what the model writes freely (default %(default)s)")
    add("--estimate", choices=["mean", "median", "mode"], default="mean",
        help="of each distribution; mode is the greedy answer (default %(default)s)")
    add("--numeric", action=argparse.BooleanOptionalAction, default=False, help="numbers only")
    add("--batch-size", type=int, default=32, help="pictures at a time (default %(default)s)")
    add("--limit", type=int, help="use the first LIMIT pictures only")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the weights; auto is bfloat16 on a GPU (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser.parse_args(argv)

# ---- Forced decoding: feed the skeleton, decide the slots ----------------------------------------
# One answer, shortened. The model decides what stands in [ ]; the rest is the skeleton, and fed:
#   {"analysis": {"expression_category": "[slight happiness]", ..., "symmetry": "[symmetric]"},
#    "arkit": {"eyeBlinkLeft": [0.1], "eyeLookDownLeft": [0.0], ..., "tongueOut": [0.0]}}

def answer_skeleton(supervision: str) -> list[tuple]:
    """The answer as (fixed text, slot) pairs; a slot is a field, a coefficient or, last, None."""
    # An answer with 999 in every slot, cut there.
    blanks = {"analysis": dict.fromkeys(FIELDS, "999"), "arkit": dict.fromkeys(ARKIT_NAMES, 999)}
    answer = {part: blanks[part] for part in PARTS[supervision]}
    slots = [slot for part in answer.values() for slot in part]
    return list(zip(json.dumps(answer).split("999"), [*slots, None]))

class Answers:
    """B answers in the making: the key-value cache and attention mask (B, T) of their tokens."""

    def __init__(self, network, inputs: dict):
        self.network, self.cache, self.mask = network, DynamicCache(), inputs["attention_mask"]
        network.model(**inputs, past_key_values=self.cache, use_cache=True)
        self.offset = network.model.rope_deltas  # (B, 1), of that call: images take fewer positions

    def feed(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Appends tokens (B, n), padding where the mask is 0. Returns hidden states (B, n, D)."""
        self.mask = torch.cat([self.mask, mask], dim=1)  # (B, T)
        positions = (self.mask.cumsum(dim=1) - 1)[:, -ids.shape[1]:] + self.offset  # (B, n)
        # Text has the same position in time, height and width.
        return self.network.model(
            input_ids=ids, attention_mask=self.mask, position_ids=positions.expand(3, -1, -1),
            past_key_values=self.cache, use_cache=True).last_hidden_state

    def drop(self, count: int) -> None:
        """Takes back the last tokens."""
        self.cache.crop(-count)
        self.mask = self.mask[:, :-count]

def decode_text(answers: Answers, skeleton_ids: list[int], closing_id: int) -> list[list[int]]:
    """Feeds a piece of skeleton, then decodes greedily until every answer chose the closing token,
    with which the next piece begins. Returns the token ids of each text, in the cache padded."""
    ids = torch.tensor(skeleton_ids, device=answers.mask.device).repeat(len(answers.mask), 1)
    is_open = torch.ones_like(ids[:, :1])  # (B, 1), 0 where the text has ended
    texts = [[] for _ in ids]
    for _ in range(MAX_TEXT_TOKENS):
        hidden = answers.feed(ids, is_open.expand_as(ids))[:, -1:]  # (B, 1, D)
        ids = answers.network.lm_head(hidden).argmax(dim=-1)  # (B, 1)
        is_open = is_open & (ids != closing_id)
        if not is_open.any():
            return texts
        for text, token, goes_on in zip(texts, ids[:, 0].tolist(), is_open[:, 0].tolist()):
            if goes_on:
                text.append(token)
    answers.feed(ids, is_open)  # a text that is cut off: its last token has not been fed
    return texts

def decode_numbers(answers: Answers, pieces: list[tuple], value_ids: torch.Tensor) -> tuple:
    """Decides the coefficients by fixed-point passes (Jacobi decoding, arXiv 2402.02057).

    All numbers are guessed, fed at once, and replaced by what the model chooses in their places.
    The first wrong token, and all before it, are now greedy, what follows is guessed better in the
    next pass, which starts there. When nothing changes, the numbers are the greedy answer. `pieces`
    are (token ids, slot) of the skeleton. Returns distributions (B, C, 11) and choices (B, C).
    """
    block, columns = [], []
    for skeleton_ids, slot in pieces:
        if slot in ARKIT_NAMES:
            block += skeleton_ids
            columns.append(list(range(len(block), len(block) + value_ids.shape[1])))
            block += value_ids[0].tolist()  # 0.0 is the first guess
    columns = torch.tensor(columns, device=value_ids.device)  # (C, L): where the numbers stand
    tokens = torch.tensor(block, device=value_ids.device).repeat(len(answers.mask), 1)  # (B, n)
    guess = torch.zeros(len(tokens), len(columns), dtype=torch.long, device=value_ids.device)
    hidden = answers.feed(tokens, torch.ones_like(tokens))  # (B, n, D)
    while True:
        probabilities, choice = read_numbers(
            answers.network.lm_head.weight, hidden[:, columns - 1], value_ids)
        changed = (choice != guess).any(dim=0).nonzero()[:, 0]  # slots
        if not len(changed):
            return probabilities, choice
        guess = choice
        tokens[:, columns] = value_ids[choice]  # (B, C, L)
        start = int(columns[changed[0], 0])
        answers.drop(len(block) - start)
        hidden[:, start:] = answers.feed(tokens[:, start:], torch.ones_like(tokens[:, start:]))

def read_numbers(weight: torch.Tensor, hidden: torch.Tensor, value_ids: torch.Tensor) -> tuple:
    """Distributions (B, C, 11) and greedy choice (B, C) from lm_head's matrix and the hidden states
    (B, C, L, D) that predict a number's tokens, of which `value_ids` (11, L) are possible."""
    last = hidden[:, :, -1]  # (B, C, D)
    if value_ids.shape[1] == 1:  # a number is one token: eleven options
        scores = (last @ weight[value_ids[:, 0]].T).float()  # (B, C, 11)
        return scores.softmax(dim=-1), scores.argmax(dim=-1)
    # Digits are split: "0" or "1", then "." and the tenths, of which "1." allows only "0".
    whole = (hidden[:, :, 0] @ weight[value_ids[[0, 10], 0]].T).float()  # (B, C, 2)
    tenths = (last @ weight[value_ids[:10, -1]].T).float()  # (B, C, 10)
    is_one = whole.argmax(dim=-1) == 1  # (B, C)
    choice = torch.where(is_one, 10, tenths.argmax(dim=-1))
    # Where 1.0 is chosen, the tenths behind "0." are not known: its share counts as 0.9.
    nine = torch.eye(10, device=tenths.device)[9]
    tenths = torch.where(is_one[:, :, None], nine, tenths.softmax(dim=-1))
    whole = whole.softmax(dim=-1)
    return torch.cat([whole[:, :, :1] * tenths, whole[:, :, 1:]], dim=-1), choice

@torch.inference_mode()
def decode_forced(model: "Model", inputs: dict, supervision: str) -> tuple:
    """Distributions (B, C, 11), greedy choice among VALUES (B, C) and descriptions of a batch."""
    def encode(text: str) -> list[int]:
        return model.tokenizer.encode(text, add_special_tokens=False)

    pieces = [(encode(text), slot) for text, slot in answer_skeleton(supervision)]
    value_ids = torch.tensor([encode(value) for value in VALUES], device=model.network.device)
    answers = Answers(model.network, inputs)
    descriptions = [{} for _ in inputs["input_ids"]]
    for (skeleton_ids, slot), (next_ids, _) in zip(pieces, pieces[1:]):
        if slot in FIELDS:
            texts = decode_text(answers, skeleton_ids, closing_id=next_ids[0])
            for description, ids in zip(descriptions, texts):
                description[slot] = model.tokenizer.decode(ids).replace('\\"', '"')
        elif slot == ARKIT_NAMES[0]:  # all 52 numbers at once
            probabilities, choice = decode_numbers(answers, pieces, value_ids)
    return probabilities, choice, descriptions

def estimate(probabilities: torch.Tensor, choice: torch.Tensor, statistic: str) -> tuple:
    """Mean, median or mode and standard deviation, each (B, C), of distributions (B, C, 11)."""
    values = torch.arange(len(VALUES), device=probabilities.device) / 10
    mean = (probabilities @ values).clamp(0, 1)
    std = (probabilities @ values ** 2 - mean ** 2).clamp(min=0).sqrt()
    if statistic == "mean":
        return mean, std
    if statistic == "median":
        return values[(probabilities.cumsum(dim=-1) >= 0.5).float().argmax(dim=-1)], std
    return values[choice], std

# ---- Free decoding: let the model write, read what it wrote --------------------------------------
def read_answer(text: str) -> tuple[dict, dict | None]:
    """(52 coefficients, description or None) of a free answer, by ARKit's or Live Link's names.

    The last JSON object counts, values are clipped to 0..1. Raises ValueError if one is missing.
    """
    answer, start = {}, text.find("{")
    while start >= 0:
        try:
            answer, stop = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError:
            stop = start + 1
        start = text.find("{", stop)
    given = answer["arkit"] if isinstance(answer.get("arkit"), dict) else answer
    numbers = {name[:1].lower() + name[1:]: value for name, value in given.items()
               if type(value) in (int, float) and math.isfinite(value)}
    missing = [name for name in ARKIT_NAMES if name not in numbers]
    if missing:
        raise ValueError(f"the answer lacks {len(missing)} coefficients: {', '.join(missing[:3])}")
    description = answer.get("analysis")
    sections = HEADING.split(text[:text.rfind("{")])[1:]
    if not isinstance(description, dict) and len(sections) == len(FIELDS):
        lines = [[line.strip(" \t*-:") for line in section.splitlines()] for section in sections]
        description = {field: " ".join(part).strip() for field, part in zip(FIELDS, lines)}
    return {name: min(max(0.0, numbers[name]), 1.0) for name in ARKIT_NAMES}, description

# ---- Loading a checkpoint ------------------------------------------------------------------------
@dataclass
class Model:
    """What `load` returns and `predict` takes."""
    network: torch.nn.Module  # a Qwen-VL, its adapter merged
    tokenizer: object
    image_processor: object
    system: str  # the chat's system turn, mostly empty
    prompt: str  # what the user says beside the picture
    supervision: str  # what an answer holds, a key of PARTS
    max_pixels: int  # larger pictures are scaled down to this

def load(model_dir: str, device: str = "cpu", dtype: str = "auto",
         prompt_file: str | None = None) -> Model:
    """Loads a folder of distill.py or, with `prompt_file`, any Qwen-VL or PEFT adapter for one.
    Raises SystemExit if it is unfinished, damaged, or an adapter of another model."""
    run_file, adapter_file = (Path(model_dir, f) for f in ("run.json", "adapter_config.json"))
    if not run_file.is_file() and not prompt_file:
        raise SystemExit(f"--model {model_dir} holds no finished checkpoint (run.json); make one: "
                         f"python distill.py, finish it (--out {model_dir} --resume), or give the "
                         "--prompt FILE of one that was trained elsewhere")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    run = {"supervision": "semantic", "max_pixels": FOREIGN_PIXELS}
    system, base, adapter = [], model_dir, {}
    try:
        if run_file.is_file():
            run = json.loads(run_file.read_text(encoding="utf-8"))
        if prompt_file:
            *system, run["prompt"] = Path(prompt_file).read_text(encoding="utf-8").split("\n---\n")
        if adapter_file.is_file():
            adapter = json.loads(adapter_file.read_text(encoding="utf-8"))
            updates = load_file(Path(model_dir, "adapter_model.safetensors"))
            base = adapter["base_model_name_or_path"]
        network = AutoModelForImageTextToText.from_pretrained(base, dtype=getattr(torch, dtype))
        # AutoProcessor would need torchvision for its video half; these two do all that is needed.
        model = Model(network.eval(), AutoTokenizer.from_pretrained(base),
                      Qwen2VLImageProcessorPil.from_pretrained(base), "".join(system).strip(),
                      run["prompt"].strip(), run["supervision"], run["max_pixels"])
    except Exception as error:  # a damaged file surfaces as one of a dozen types
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise SystemExit(f"--model {model_dir} or its --prompt cannot be read ({reason:.300})")
    if adapter:
        merge_adapter(network, adapter, updates)
    network.to(device)
    return model

@torch.no_grad()
def merge_adapter(network, config: dict, updates: dict) -> None:
    """Adds alpha / r B A of a PEFT adapter to the weights (LoRA, arXiv 2106.09685, Eq. 3).

    Raises SystemExit at a tensor that is no half of a pair of matrices for a weight, as DoRA's
    magnitudes: an adapter that matches nothing would silently do nothing.
    """
    weights = dict(network.named_parameters())
    for key in sorted(updates):
        name = key.removeprefix("base_model.model.").partition(".lora_")[0]
        key_a, key_b = (f"base_model.model.{name}.lora_{matrix}.weight" for matrix in "AB")
        is_paired = key in (key_a, key_b) and {key_a, key_b} <= updates.keys()
        if not is_paired or f"{name}.weight" not in weights:
            raise SystemExit(f"the adapter's {key} matches no weight of its base model; expected "
                             "pairs of LoRA matrices for the model that it was trained on")
        if key == key_a:
            low, high = updates[key_a].float(), updates[key_b].float()  # (r, in), (out, r)
            alpha = config["lora_alpha"]
            for pattern, value in (config.get("alpha_pattern") or {}).items():
                if re.fullmatch(rf"(.*\.)?{pattern}", name):
                    alpha = value
            scale = alpha / (math.sqrt(len(low)) if config.get("use_rslora") else len(low))
            weight = weights[f"{name}.weight"]
            weight.copy_((weight.float() + scale * high @ low).to(weight.dtype))

# ---- Pictures -> predictions ---------------------------------------------------------------------
# open_image, prompt_text and answer_skeleton stand word for word in distill.py.
def open_image(path: str) -> Image.Image:
    """Opens a picture upright and in RGB: 16-bit grey is scaled, transparency becomes white."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def prompt_text(prompt: str, image_tokens: int) -> str:
    """The Qwen-VL chat up to the answer, with the image's placeholder tokens written by hand."""
    image = "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
    return f"<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n"

def prepare(model: Model, pixels: list[dict]) -> dict:
    """Model inputs of B pictures: prompts (B, T) are padded on the left, answers start together."""
    grid = torch.cat([one["image_grid_thw"] for one in pixels])  # (B, 3)
    counts = grid.prod(dim=1) // model.image_processor.merge_size ** 2  # (B,) image tokens
    system = f"<|im_start|>system\n{model.system}<|im_end|>\n" if model.system else ""
    texts = [system + prompt_text(model.prompt, count) for count in counts.tolist()]
    batch = model.tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False,
                            return_tensors="pt")
    image_pad_id = model.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        # Without these types generate() would quietly fall back to text positions for the image.
        "mm_token_type_ids": (batch["input_ids"] == image_pad_id).long(),
        "pixel_values": torch.cat([one["pixel_values"] for one in pixels]),  # (patches, .)
        "image_grid_thw": grid,
    }
    return {name: tensor.to(model.network.device) for name, tensor in inputs.items()}

def predict(model: Model, images: list, statistic: str = "mean", numeric: bool = False,
            decoding: str = "forced") -> list[dict]:
    """The prediction records of one batch of images, given as paths or open pictures, in order.

    A picture that cannot be used gets a record with "error" set and null coefficients.
    """
    token_side = model.image_processor.patch_size * model.image_processor.merge_size  # pixels
    size = {"shortest_edge": token_side ** 2, "longest_edge": model.max_pixels}  # pixel counts
    records, readable, pixels = [], [], []
    for source in images:
        is_open = isinstance(source, Image.Image)
        records.append({"image": None if is_open else str(source), "coefficients": None,
                        "std": None, "description": None, "error": None})
        try:
            picture = source.convert("RGB") if is_open else open_image(source)
            pixels.append(model.image_processor([picture], size=size, return_tensors="pt"))
            readable.append(records[-1])
        except Exception as error:  # Pillow's readers raise a dozen types on damaged files
            records[-1]["error"] = f"{type(error).__name__}: {error}"
    if not readable:
        return records
    inputs = prepare(model, pixels)
    if decoding == "generate":
        tokens = model.network.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        tokens = tokens[:, inputs["input_ids"].shape[1]:]  # (B, n)
        texts = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for record, text in zip(readable, texts):
            try:
                record["coefficients"], record["description"] = read_answer(text)
            except ValueError as error:
                record |= {"error": str(error), "answer": text}
        return records
    supervision = "numeric" if numeric else model.supervision
    *distributions, descriptions = decode_forced(model, inputs, supervision)
    values, stds = estimate(*distributions, statistic)
    for record, row, std, words in zip(readable, values.tolist(), stds.tolist(), descriptions):
        record["coefficients"] = {name: round(x, 4) for name, x in zip(ARKIT_NAMES, row)}
        record["std"] = {name: round(x, 4) for name, x in zip(ARKIT_NAMES, std)}
        record["description"] = words or None
    return records

# ---- Files and charts ----------------------------------------------------------------------------
def list_images(inputs: list[str]) -> list[Path]:
    """Paths of the pictures in files, folders (sorted) and .jsonl records. SystemExit if none."""
    images = []
    for path in map(Path, inputs):
        if path.is_dir():
            suffixes = Image.registered_extensions()
            images += sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
        elif path.suffix != ".jsonl":
            images.append(path)
        else:
            try:
                with path.open(encoding="utf-8", errors="replace") as file:
                    images += [path.parent / json.loads(line)["image"] for line in file]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SystemExit(f'{path}: {error}; expected lines of {{"image": "a.png", ...}}')
    if not any(image.is_file() for image in images):
        raise SystemExit(f"{', '.join(inputs):.200}: no picture exists there; expected pictures "
                         "(.png, .jpg, .webp, ...), folders of them or .jsonl records")
    return list(dict.fromkeys(images))

def read_finished(part: Path, settings: dict) -> dict[str, dict]:
    """Starts `part` anew with the settings (line 1) and the whole records that a run with the same
    settings left there. Returns these by image."""
    text = part.read_text(encoding="utf-8", errors="replace") if part.is_file() else ""
    first, *lines = text.split("\n")
    whole = lines[:-1] if first == json.dumps(settings) else []  # the last line may be torn
    part.write_text("\n".join([json.dumps(settings), *whole, ""]), encoding="utf-8")
    return {record["image"]: record for record in map(json.loads, whole)}

def write_livelink(path: Path, records: list[dict], fps: int) -> None:
    """Writes a Live Link Face take: 61 columns, timecode HH:MM:SS:FF.mmm, gaps where one failed."""
    columns = [name[0].upper() + name[1:] for name in ARKIT_NAMES] + ANGLES
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Timecode", "BlendshapeCount", *columns])
        for frame, record in enumerate(records):
            if not record["error"]:
                clock = f"{timedelta(seconds=frame // fps)!s:0>8}:{frame % fps:02d}.000"
                values = [f"{record['coefficients'][name]:.10f}" for name in ARKIT_NAMES]
                writer.writerow([clock, 61, *values, *["0.0000000000"] * len(ANGLES)])

def draw_chart(picture: Image.Image, record: dict) -> Image.Image:
    """Draws the photo, the description and bars of the strongest actions with their deviation."""
    chart = Image.new("RGB", (1200, 675), "white")
    draw = ImageDraw.Draw(chart)
    small, large = ImageFont.load_default(17), ImageFont.load_default(26)
    photo = ImageOps.contain(picture, (440, 360), Image.Resampling.LANCZOS)
    chart.paste(photo, (40 + (440 - photo.width) // 2, 40))
    y = 60 + photo.height
    for field, text in (record["description"] or {}).items():
        font, width = (large, 34) if field == FIELDS[0] else (small, 52)
        text = textwrap.fill(str(text), width)
        draw.text((40, y), text, INK, font, spacing=6)
        y = draw.textbbox((40, y), text, font, spacing=6)[3] + 10
    # Left and Right of an action share a row; jawLeft and mouthLeft are no sides. Strongest first.
    rows, coefficients = {}, record["coefficients"]
    for name in ARKIT_NAMES:
        stem = re.sub("(?<!^jaw)(?<!^mouth)(Left|Right)$", "", name)
        rows.setdefault(stem, []).append(name)
    ranked = sorted(rows.items(), key=lambda row: -max(coefficients[name] for name in row[1]))
    left, length, top = 760, 390, 70
    for tick in range(0, 11, 2):
        x = left + length * tick / 10
        draw.line([x, top, x, 630], GRID, 1)
        draw.text((x, 652), f"{tick / 10}", INK, small, anchor="mm")
    for k, (label, color) in enumerate(COLORS.items()):
        draw.rectangle([left + 150 * k, 36, left + 150 * k + 14, 50], color)
        draw.text((left + 150 * k + 22, 43), label, INK, small, anchor="lm")
    for row, (title, names) in enumerate(ranked[:12]):
        y = top + 560 / 12 * (row + 0.5)
        draw.text((left - 12, y), title, INK, small, anchor="rm")
        bars = [(names[0], y, "unpaired")]
        if len(names) == 2:
            bars = [(names[0], y - 8, "subject's left"), (names[1], y + 8, "subject's right")]
        for name, y, label in bars:
            value, std = coefficients[name], (record["std"] or {}).get(name, 0.0)
            draw.rectangle([left, y - 6, left + length * value, y + 6], COLORS[label])
            low, high = max(value - std, 0), min(value + std, 1)
            draw.line([left + length * low, y, left + length * high, y], INK, 2)
    return chart

# ---- The stage itself ----------------------------------------------------------------------------
def write_predictions(args: argparse.Namespace, rank: int, world_size: int) -> list[dict]:
    """Predicts this process's share of the pictures, kept in a file beside --out until all are
    done: the same command goes on from there. Returns all records, in order, on rank 0."""
    images, out = list_images(args.inputs)[:args.limit], Path(args.out)
    model = load(args.model, args.device, args.dtype, args.prompt)
    out.parent.mkdir(parents=True, exist_ok=True)
    names = [os.path.relpath(image, out.parent) for image in images]  # relative to the records
    parts = [out.with_name(f"{out.name}.{k}of{world_size}") for k in range(world_size)]
    settings = {name: str(getattr(args, name))
                for name in ("model", "prompt", "decode", "estimate", "numeric", "dtype")}
    run_file = Path(args.model, "run.json")  # a model that was trained anew is another model
    settings["trained"] = str(run_file.is_file() and run_file.stat().st_mtime)
    finished = read_finished(parts[rank], settings)
    share = list(zip(names, images))[rank::world_size]
    todo = [(name, image) for name, image in share if name not in finished]
    bar = tqdm(total=len(todo), unit=" images", disable=True if rank else None)
    with parts[rank].open("a", encoding="utf-8") as file:
        for start in range(0, len(todo), args.batch_size):
            batch = todo[start:start + args.batch_size]
            records = predict(model, [image for _, image in batch], args.estimate, args.numeric,
                              args.decode)
            for (name, _), record in zip(batch, records):
                file.write(json.dumps({**record, "image": name}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))
    bar.close()
    if world_size > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        torch.distributed.barrier()
    if rank:
        return []
    for part in parts:
        finished |= read_finished(part, settings)
    records = [finished[name] for name in names]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    out.write_text("".join(lines), encoding="utf-8")
    for part in parts:
        part.unlink()
    return records

def main(args: argparse.Namespace) -> None:
    """Runs the stage; under torchrun each process takes a share of the pictures."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: torch sees no GPU; use --device cpu")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if min(args.batch_size, args.fps, args.limit or 1) < 1:
        raise SystemExit(f"--batch-size {args.batch_size}, --fps {args.fps}, --limit {args.limit}: "
                         "expected at least 1")
    if Path(args.out).absolute() in [Path(path).absolute() for path in args.inputs]:
        raise SystemExit(f"--out {args.out} is an INPUT and would be overwritten; choose another")
    if args.decode == "generate" and (args.numeric or args.estimate != "mean"):
        raise SystemExit("--numeric and --estimate choose within --decode forced; leave them out")
    logging.disable_progress_bar()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    records = write_predictions(args, rank, world_size)
    if rank:
        return
    failed = [f"{record['image']} ({record['error']})" for record in records if record["error"]]
    print("".join(f"no prediction: {line}\n" for line in failed[:5]), end="")
    print(f"wrote {args.out}: {len(records) - len(failed)} predictions, {len(failed)} without")
    if args.csv:
        write_livelink(Path(args.csv), records, args.fps)
    for k, record in enumerate(tqdm(records if args.plot else [], "drawing charts", disable=None)):
        if not record["error"]:
            Path(args.plot).mkdir(parents=True, exist_ok=True)
            path = Path(args.plot, f"{k:06d}_{Path(record['image']).stem}.png")
            draw_chart(open_image(Path(args.out).parent / record["image"]), record).save(path)
    print("next: python evaluate.py" + ("" if args.out == "predictions.jsonl" else f" {args.out}"))

if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        raise SystemExit("interrupted; what is finished is kept, the same command goes on")
