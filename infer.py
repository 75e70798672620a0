# SPDX-License-Identifier: MIT
"""Inference for SemanticFace (arXiv 2603.14827): images -> description and 52 ARKit coefficients.

The answer's braces, names and quotes are known in advance, so they are fed, not sampled: every
answer is complete and valid. The model decides the words and, for each coefficient, a distribution
over 0.0, 0.1, ... 1.0, whose mean is the estimate (RAIL, arXiv 2403.04182).

Reads:  pictures, folders of pictures, .jsonl records with an "image", a folder of distill.py or,
        with --prompt, any Qwen-VL or PEFT adapter for one, as the authors' own
Writes: prediction records, one JSON object a line, with --csv a Live Link Face take, with --plot
        charts. A picture that cannot be used gets its "error" and null coefficients
    {"image": "images/000001.png", "coefficients": {"jawOpen": 0.12, ...}, "std": {"jawOpen": 0.05,
     ...}, "description": {"expression_category": "slight happiness", ...}, "error": null}

    python infer.py photo.jpg folder/ --model runs/demo --out predictions.jsonl --csv take.csv

Shapes: B images, T tokens so far, n new tokens, D width, C = 52 coefficients, L tokens a number.
"""
import csv
import json
import math
import os
import re
import textwrap
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from argparse import RawDescriptionHelpFormatter
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, takewhile
from operator import itemgetter
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
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
LIVELINK_NAMES = [name[0].upper() + name[1:] for name in ARKIT_NAMES]  # EyeBlinkLeft, ...
FIELDS = ["expression_category", "muscle_movements", "emotional_implication", "symmetry"]
VALUES = [f"{k / 10:.1f}" for k in range(11)]  # a coefficient is written with one decimal
# What an answer holds, in its order. The paper's is "semantic".
PARTS = {"semantic": ("analysis", "arkit"), "numeric": ("arkit",),
         "numbers-first": ("arkit", "analysis")}
IMAGE_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]  # that Pillow may open
# Endings of pictures; .heic, which Pillow cannot open, is named in an error, not left out.
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}
ANGLES = ["HeadYaw", "HeadPitch", "HeadRoll", "LeftEyeYaw", "LeftEyePitch", "LeftEyeRoll",
          "RightEyeYaw", "RightEyePitch", "RightEyeRoll"]  # the last columns of a Live Link take
MAX_TOKENS = {"text": 600, **dict.fromkeys(FIELDS, 150)}  # of each slot of words
MAX_NEW_TOKENS = 2048  # of a free answer
AUTHORS_PIXELS = 1024 * 32 * 32  # at most, for a checkpoint trained elsewhere: 1024 image tokens
BAR, INK = "#0072b2", "#282828"

def parse_args(argv=None) -> Namespace:
    """Reads the command line, or `argv`."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", default=["data/demo/val.jsonl"],
        help="pictures, folders of them, .jsonl records (default: the demo's held-out faces)")
    add("--model", default="runs/demo", help="checkpoint, adapter or hub id (default %(default)s)")
    add("--base", default="", help="base model of an adapter, if its own note of it is wrong here")
    add("--prompt", default="", help="for a checkpoint trained elsewhere: a text file, [system "
        "prompt, ---,] prompt, or a .jsonl with messages")
    add("--out", default="predictions.jsonl", help="prediction records (default %(default)s)")
    add("--csv", help="also write a Live Link Face take, a row for each picture that can be used")
    add("--fps", type=int, default=60, help="frames per second of the take (default %(default)s)")
    add("--plot", help="also draw a chart of each picture into this folder")
    add("--decode", choices=["forced", "generate"], default="forced",
        help="feed the skeleton, or read what the model writes freely (default %(default)s)")
    add("--estimate", choices=["mean", "median", "mode"], default="mean",
        help="of each distribution, mode is the greedy answer (default %(default)s)")
    add("--numeric", action=BooleanOptionalAction, default=False, help="leave out words at the end")
    add("--resume", action=BooleanOptionalAction, default=False, help="go on with the same command")
    add("--batch-size", type=int, default=32, help="pictures at a time (default %(default)s)")
    add("--limit", type=int, default=10**9, help="use the first LIMIT pictures only")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the weights, auto is bfloat16 on a GPU (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser.parse_args(argv)

# ---- Forced decoding: feed the skeleton, decide the slots ----------------------------------------
# One answer, shortened. The model decides what stands in [ ]. The rest is the skeleton, and fed:
#   {"analysis": {"expression_category": "[slight happiness]", ..., "symmetry": "[symmetric]"},
#    "arkit": {"eyeBlinkLeft": [0.1], "eyeLookDownLeft": [0.0], ..., "tongueOut": [0.0]}}
# The answer of the authors' checkpoint, and of any other that distill.py has not trained:
#   [1. **Facial Expression Category**: ... 4. **Symmetry**: ...]
#   {"EyeBlinkLeft": [0.1], "EyeLookDownLeft": [0.0], ..., "TongueOut": [0.0]}

def answer_skeleton(supervision: str) -> list:
    """The answer as (fixed text, slot) pairs: ('{"arkit": {"eyeBlinkLeft": ', "eyeBlinkLeft"), ...

    A slot is a field, "text", a coefficient or, last, None. "authors" stands for their answer, the
    others for the forms that distill.py trains.
    """
    # An answer with 999 in every slot, cut there.
    if supervision == "authors":
        text = "999" + json.dumps(dict.fromkeys(LIVELINK_NAMES, 999))
        slots = ["text", *ARKIT_NAMES]
    else:
        blanks = {"analysis": dict.fromkeys(FIELDS, "999"),
                  "arkit": dict.fromkeys(ARKIT_NAMES, 999)}
        answer = {part: blanks[part] for part in PARTS[supervision]}
        text, slots = json.dumps(answer), chain(*answer.values())
    return list(zip(text.split("999"), [*slots, None]))

@dataclass
class State:
    """B answers in the making."""
    model: nn.Module
    cache: DynamicCache  # keys and values of all tokens so far
    mask: Tensor  # (B, T), 0 where a token is padding
    offset: Tensor  # (B, 1), added to positions: an image takes up fewer of them than tokens
    last: Tensor  # (B, 1, D), the last hidden states

    def feed(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Appends tokens (B, n), padding where a mask is 0. Returns hidden states (B, n, D)."""
        if mask is None:
            mask = torch.ones_like(ids)
        self.mask = torch.cat([self.mask, mask], dim=1)  # (B, T)
        positions = self.mask.cumsum(dim=1) - 1 + self.offset  # (B, T)
        positions = positions[:, -ids.shape[1]:]  # (B, n)
        hidden = self.model.model(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True,
            position_ids=positions.expand(3, -1, -1),  # of text alike in time, height and width
        ).last_hidden_state
        self.last = hidden[:, -1:]
        return hidden

    def drop(self, count: int) -> None:
        """Takes back the last tokens."""
        self.cache.crop(-count)
        self.mask = self.mask[:, :-count]

def prefill(model: nn.Module, inputs: dict) -> State:
    """Feeds the prompts (B, T) with their images. The answers come behind them."""
    cache = DynamicCache()
    output = model.model(**inputs, past_key_values=cache, use_cache=True)
    offset = model.model.rope_deltas  # which this call has left in the model
    return State(model, cache, inputs["attention_mask"], offset, output.last_hidden_state[:, -1:])

def decode_text(state: State, skeleton_ids: list, closing_ids: list, limit: int) -> list:
    """Feeds a piece of skeleton, then decodes greedily until every answer has chosen a token that
    closes its text, or has `limit` tokens. The closing token is not fed: the next piece of skeleton
    stands in its place.

    Returns the token ids of each text. The shorter ones stand in the cache with padding behind.
    """
    closing = state.mask.new_tensor(closing_ids)
    is_open = torch.ones_like(state.mask[:, :1])  # (B, 1), 0 where the text has ended
    if skeleton_ids:
        ids = is_open.new_tensor(skeleton_ids).repeat(len(is_open), 1)  # (B, n)
        state.feed(ids)

    columns = [is_open[:, :0]]  # (B, 0), for texts may be empty
    for _ in range(limit):
        ids = state.model.lm_head(state.last).argmax(dim=-1)  # (B, 1)
        is_open = is_open & ~torch.isin(ids, closing)
        if not is_open.any():
            break
        columns.append(ids)
        state.feed(ids, is_open)  # behind an ended text this is padding
    rows = torch.cat(columns, dim=1).tolist()  # B lists, each up to its closing token
    return [list(takewhile(lambda token: token not in closing_ids, row)) for row in rows]

def decode_numbers(state: State, pieces: list, value_ids: Tensor) -> tuple:
    """Decides the coefficients by fixed-point passes (Jacobi decoding, arXiv 2402.02057).

    All numbers are guessed, fed at once, and replaced by what the model chooses in their places.
    After that the first wrong token, and all before it, are greedy. What follows is guessed better
    in the next pass, which starts there. When nothing changes, the numbers are the greedy answer.
    `pieces` are (token ids, slot) of the skeleton, `value_ids` (11, L) the tokens of 0.0, 0.1, ...

    Returns distributions (B, C, 11) and choices (B, C).
    """
    # The block of tokens, with 0.0 as the first guess of each number.
    block, starts = [], []
    for skeleton_ids, slot in pieces:
        if slot in ARKIT_NAMES:
            block += skeleton_ids
            starts.append(len(block))
            block += value_ids[0].tolist()
    places = torch.tensor(starts)[:, None] + torch.arange(value_ids.shape[1])  # (C, L)
    tokens = value_ids.new_tensor(block).repeat(len(state.mask), 1)  # (B, n)
    guess = torch.zeros_like(tokens[:, starts])  # (B, C)

    hidden = state.feed(tokens)  # (B, n, D)
    while True:
        before = hidden[:, places - 1]  # (B, C, L, D): position t - 1 predicts token t
        probabilities, choice = read_numbers(state.model.lm_head.weight, before, value_ids)
        changed = (choice != guess).any(dim=0).nonzero()  # (slots, 1), in any answer
        if not len(changed):
            return probabilities, choice

        # Feed anew from the first number that has changed.
        guess = choice
        tokens[:, places] = value_ids[choice]  # (B, C, L)
        start = starts[changed[0]]
        state.drop(len(block) - start)
        hidden[:, start:] = state.feed(tokens[:, start:])

def read_numbers(weight: Tensor, hidden: Tensor, value_ids: Tensor) -> tuple:
    """Distributions (B, C, 11) and greedy choice (B, C) from lm_head's matrix and the hidden states
    (B, C, L, D) that predict a number's tokens, of which `value_ids` (11, L) are possible."""
    last = hidden[:, :, -1]  # (B, C, D): predicts the last token
    digits_are_split = value_ids.shape[1] > 1
    if not digits_are_split:
        scores = (last @ weight[value_ids[:, 0]].T).float()  # (B, C, 11)
        return scores.softmax(dim=-1), scores.argmax(dim=-1)

    # First "0" or "1", then ".", then the tenths, of which "1." allows only "0".
    first = hidden[:, :, 0]  # (B, C, D)
    whole = (first @ weight[value_ids[[0, 10], 0]].T).float()  # (B, C, 2)
    tenths = (last @ weight[value_ids[:10, -1]].T).float()  # (B, C, 10)
    is_one = whole.argmax(dim=-1) == 1  # (B, C)
    choice = torch.where(is_one, 10, tenths.argmax(dim=-1))

    # Where "1" is chosen, the model has not been asked for the tenths behind "0.". All that "0" has
    # then counts as 0.9, its value next to 1.0.
    tenths, whole = tenths.softmax(dim=-1), whole.softmax(dim=-1)
    tenths[is_one] = torch.eye(10, device=tenths.device)[9]  # all on 0.9
    return torch.cat([whole[:, :, :1] * tenths, whole[:, :, 1:]], dim=-1), choice

@torch.inference_mode()
def decode_forced(predictor: "Predictor", inputs: dict, supervision: str) -> tuple:
    """Distributions (B, C, 11), greedy choice among VALUES (B, C) and descriptions, None or empty
    where there are no words, of a batch."""
    tokenizer = predictor.tokenizer

    def encode(text: str) -> list:
        return tokenizer.encode(text, add_special_tokens=False)

    pieces = [(encode(text), slot) for text, slot in answer_skeleton(supervision)]
    value_ids = inputs["input_ids"].new_tensor([encode(value) for value in VALUES])  # (11, L)
    # A text within JSON ends at a quote, be it the next piece's or, in error, another one's. Only
    # the skeleton's tokens are meant: an escaped quote is part of the text.
    quotes = [token for ids, _ in pieces for token in ids if '"' in tokenizer.decode(token)]
    state = prefill(predictor.model, inputs)
    written = [{} for _ in inputs["input_ids"]]  # {slot: text} of each answer
    for (skeleton_ids, slot), (next_ids, _) in zip(pieces, pieces[1:]):
        if slot in MAX_TOKENS:
            closing_ids = quotes if slot in FIELDS else next_ids[:1]
            texts = decode_text(state, skeleton_ids, closing_ids, MAX_TOKENS[slot])
            for answer, ids in zip(written, texts):
                # Markdown, as the authors' text is, has no such escapes and stays as it is.
                answer[slot] = unescape(tokenizer.decode(ids))
        elif slot == ARKIT_NAMES[0]:  # here all 52 numbers, so the other 51 slots have no turn
            probabilities, choice = decode_numbers(state, pieces, value_ids)

    if supervision == "authors":
        written = [read_headings(answer["text"]) for answer in written]
    return probabilities, choice, written

def unescape(text: str) -> str:
    """What a text within JSON stands for: \\" is a quote. As it is, if it is no JSON."""
    try:
        return json.loads(f'"{text}"', strict=False)
    except ValueError:
        return text

def summarize(probabilities: Tensor, choice: Tensor, estimate: str) -> tuple:
    """Mean, median or mode and standard deviation, each (B, C), of distributions (B, C, 11)."""
    values = torch.arange(len(VALUES), device=probabilities.device) / 10
    mean = probabilities @ values
    std = (probabilities @ values ** 2 - mean ** 2).clamp(min=0).sqrt()
    if estimate == "mean":
        return mean, std
    if estimate == "median":
        choice = (probabilities.cumsum(dim=-1) < 0.5).sum(dim=-1)  # the median's index
    return values[choice], std

# ---- Free decoding: let the model write, read what it wrote --------------------------------------
def read_headings(text: str) -> dict | None:
    """The four fields from text with four numbered headings, as in "1. **Category**: joy" or in
    "**1. Category**" with the text below. None without them."""
    sections = re.split(r"(?m)^\W*[1-4][.)]", re.sub(r"\*\*|```\w*", "", text))[1:]
    if len(sections) != len(FIELDS):
        return None
    bodies = [re.split("[:\n]", section, maxsplit=1)[-1].split() for section in sections]
    return {field: " ".join(words) for field, words in zip(FIELDS, bodies)}

def read_answer(text: str) -> tuple:
    """(52 coefficients, description or None) of a free answer, by ARKit's or Live Link's names.

    Values are clipped to 0..1. Raises ValueError if one is missing.
    """
    answer, start = {}, re.search(r'\{\s*"', text)
    if start:
        with suppress(ValueError):  # torn, or a number of thousands of digits
            answer, _ = json.JSONDecoder().raw_decode(text, start.start())
    given = answer["arkit"] if isinstance(answer.get("arkit"), dict) else answer

    numbers = {}
    for name, value in given.items():
        if type(value) in (int, float) and abs(value) < math.inf:  # NaN is not
            numbers[name[:1].lower() + name[1:]] = min(max(0.0, value), 1.0)
    missing = [name for name in ARKIT_NAMES if name not in numbers]
    if missing:
        raise ValueError(f"the answer lacks {len(missing)} coefficients: {', '.join(missing[:3])}")
    description = answer.get("analysis")
    if not isinstance(description, dict):
        description = read_headings(text[:start.start()])
    return {name: numbers[name] for name in ARKIT_NAMES}, description

# ---- Loading a checkpoint ------------------------------------------------------------------------
@dataclass
class Predictor:
    """What `load` returns and `predict` takes."""
    model: nn.Module  # a Qwen-VL, its adapter merged
    tokenizer: object
    image_processor: object
    system: str  # the chat's system turn, mostly empty
    prompt: str  # what the user says beside the picture
    supervision: str  # what an answer holds, a key of PARTS or "authors"
    max_pixels: int  # larger pictures are scaled down to this

def read_prompt(path: Path) -> dict:
    """{"system", "prompt"} of a text file, or of the first record's messages in a .jsonl."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix != ".jsonl":
        *system, prompt = text.split("\n---\n")
        return {"system": "".join(system).strip(), "prompt": prompt.strip()}
    record = json.loads(text.strip().split("\n")[0])
    turns = {message["role"]: message["content"] for message in record["messages"]}
    return {"system": turns.get("system", ""), "prompt": turns["user"].removeprefix("<image>")}

def load(model_dir: str, device: str = "cpu", dtype: str = "auto", prompt_file: str = "",
         base: str = "") -> Predictor:
    """Loads a folder of distill.py or, with `prompt_file`, any Qwen-VL or PEFT adapter for one.

    `base` is the base model of an adapter whose own note of it does not hold here. Raises
    SystemExit if something is unfinished, damaged, or an adapter of another model.
    """
    folder = Path(model_dir)
    run_file, adapter_file = folder / "run.json", folder / "adapter_config.json"
    if not run_file.is_file() and not prompt_file:
        raise SystemExit(f"--model {model_dir} holds no finished checkpoint (run.json); make one: "
                         "python distill.py, finish it with --resume, or give the --prompt FILE of "
                         "one that was trained elsewhere")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    run = {"supervision": "authors", "max_pixels": AUTHORS_PIXELS, "system": ""}
    source = model_dir
    try:
        if run_file.is_file():
            run |= json.loads(run_file.read_text(encoding="utf-8"))
        if prompt_file:
            run |= read_prompt(Path(prompt_file))
        if adapter_file.is_file():
            adapter = json.loads(adapter_file.read_text(encoding="utf-8"))
            updates = load_file(folder / "adapter_model.safetensors")
            source = base or adapter["base_model_name_or_path"]
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
        # AutoProcessor would need torchvision for its video half. These two do all that is needed.
        predictor = Predictor(model.eval(), AutoTokenizer.from_pretrained(source),
                              Qwen2VLImageProcessorPil.from_pretrained(source), run["system"],
                              run["prompt"], run["supervision"], run["max_pixels"])
    except Exception as error:  # a damaged file surfaces as one of a dozen types
        raise SystemExit(f"--model {model_dir} or its --prompt cannot be read ({error!r:.250}); "
                         f"its weights were looked for in {source}, --base names another "
                         "place for the base of an adapter (a folder with adapter_config.json)")
    if adapter_file.is_file():
        merge_adapter(model, adapter, updates)
    model.to(device)
    return predictor

@torch.no_grad()
def merge_adapter(model: nn.Module, config: dict, updates: dict) -> None:
    """Adds alpha / r B A of a PEFT adapter to the weights (LoRA, arXiv 2106.09685, Eq. 3).

    Raises SystemExit unless the tensors are pairs of matrices that fit a weight each: an adapter
    that matches nothing would silently do nothing.
    """
    weights = dict(model.named_parameters())
    stems = sorted({key.partition(".lora_")[0] for key in updates})
    if not stems or len(updates) != 2 * len(stems):
        raise SystemExit("the adapter holds nothing, or other tensors than pairs of LoRA matrices")
    for stem in stems:
        name = stem.removeprefix("base_model.model.")
        alpha = config["lora_alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):  # as in peft, the first that matches counts
                alpha = value
                break
        try:
            low = updates[f"{stem}.lora_A.weight"].float()  # (r, in)
            high = updates[f"{stem}.lora_B.weight"].float()  # (out, r)
            weight, product = weights[f"{name}.weight"], high @ low
            if product.shape != weight.shape:
                raise ValueError("its shape is another")
        except (KeyError, RuntimeError, ValueError) as error:
            raise SystemExit(f"the adapter's {name} does not fit its base model ({error}); --base "
                             "names another one")
        scale = alpha / (math.sqrt(len(low)) if config.get("use_rslora") else len(low))
        weight.copy_(weight.float() + scale * product)  # in the weight's own dtype

# ---- Pictures -> predictions ---------------------------------------------------------------------
# open_image and prompt_text stand word for word in distill.py, list_pictures and whole_lines in
# annotate.py.
def open_image(path: str) -> Image.Image:
    """Opens a picture upright and in RGB: 16-bit grey is scaled, transparency becomes white."""
    image = ImageOps.exif_transpose(Image.open(path, formats=IMAGE_FORMATS))
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

def prepare(predictor: Predictor, pixels: list) -> dict:
    """Model inputs of B pictures: prompts (B, T) are padded on the left, answers start together."""
    grid = torch.cat([one["image_grid_thw"] for one in pixels])  # (B, 3)
    counts = grid.prod(dim=1) // predictor.image_processor.merge_size ** 2  # (B,) image tokens
    system = ""
    if predictor.system:
        system = f"<|im_start|>system\n{predictor.system}<|im_end|>\n"
    texts = [system + prompt_text(predictor.prompt, count) for count in counts.tolist()]
    inputs = predictor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt",
                                 add_special_tokens=False, return_token_type_ids=False)
    # Without mm_token_type_ids generate() would quietly use text positions for the image.
    is_image = inputs["input_ids"] == predictor.model.config.image_token_id
    inputs["mm_token_type_ids"] = is_image.long()
    inputs["pixel_values"] = torch.cat([one["pixel_values"] for one in pixels])  # (patches, .)
    inputs["image_grid_thw"] = grid
    return dict(inputs.to(predictor.model.device))

def predict(predictor: Predictor, images: list, estimate: str = "mean", numeric: bool = False,
            decoding: str = "forced") -> list[dict]:
    """The prediction records of one batch of images, in order. They are given as paths or as open
    pictures, which have to stand upright.

    A picture that cannot be used gets a record with "error" set and null coefficients.
    """
    processor = predictor.image_processor
    token_side = processor.patch_size * processor.merge_size  # pixels
    size = {"shortest_edge": token_side ** 2, "longest_edge": predictor.max_pixels}  # pixel counts
    records, readable, pixels = [], [], []
    for source in images:
        record = dict.fromkeys(("image", "coefficients", "std", "description", "error"))
        records.append(record)
        try:
            if isinstance(source, Image.Image):
                picture = source.convert("RGB")
            else:
                record["image"] = str(source)
                picture = open_image(source)
            pixels.append(processor([picture], size=size, return_tensors="pt"))
            readable.append(record)
        except Exception as error:  # Pillow's readers raise a dozen types on damaged files
            record["error"] = f"{type(error).__name__}: {error}"
    if not readable:
        return records

    inputs = prepare(predictor, pixels)
    if decoding == "generate":
        for record, text in zip(readable, generate(predictor, inputs)):
            try:
                record["coefficients"], record["description"] = read_answer(text)
            except ValueError as error:
                record |= {"error": str(error), "answer": text}
        return records

    supervision = "numeric" if numeric else predictor.supervision
    probabilities, choice, descriptions = decode_forced(predictor, inputs, supervision)
    values, stds = summarize(probabilities, choice, estimate)
    for record, row, std, words in zip(readable, values.tolist(), stds.tolist(), descriptions):
        record["coefficients"] = {name: round(x, 4) for name, x in zip(ARKIT_NAMES, row)}
        record["std"] = {name: round(x, 4) for name, x in zip(ARKIT_NAMES, std)}
        record["description"] = words or None
    return records

def generate(predictor: Predictor, inputs: dict) -> list:
    """What the model writes freely and greedily, a text for each picture."""
    tokens = predictor.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    tokens = tokens[:, inputs["input_ids"].shape[1]:]  # (B, n), the new ones
    return predictor.tokenizer.batch_decode(tokens, skip_special_tokens=True)

# ---- Files and charts ----------------------------------------------------------------------------
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

def list_images(inputs: list) -> list:
    """Paths of the pictures in files, folders and .jsonl records. SystemExit if there are none."""
    images = []
    for path in map(Path, inputs):
        if path.is_dir():
            images += list_pictures(path)
        elif path.suffix != ".jsonl":
            images.append(path)
        else:
            try:
                with path.open(encoding="utf-8-sig", errors="replace") as file:
                    for line in filter(str.strip, file):
                        images.append(path.parent / json.loads(line)["image"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SystemExit(f'{path}: {error}; expected lines of {{"image": "a.png", ...}}')
    if not any(map(Path.is_file, images)):
        raise SystemExit(f"{', '.join(inputs):.200}: no picture exists there; expected pictures "
                         "(.png, .jpg, .webp, ...), folders of them or .jsonl records")
    return images

def predict_all(predictor: Predictor, names: list, args: Namespace) -> dict:
    """The records of all pictures by their name, a path relative to the folder of --out.

    Under torchrun each process takes a share and appends its records to a file of its own. With
    --resume, what stands there is not decoded again. The first process joins the files.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = [out.with_name(f"{out.name}.{k}of{world_size}") for k in range(world_size)]
    if not args.resume:
        parts[rank].unlink(missing_ok=True)
    finished = {json.loads(line)["image"] for line in whole_lines(parts[rank])}
    if finished.difference(names):
        raise SystemExit(f"--resume: the interrupted run of {out} had other pictures, too; give "
                         "the same command, or start anew without --resume")
    todo = [name for name in names[rank::world_size] if name not in finished]

    starts = range(0, len(todo), args.batch_size)
    with parts[rank].open("a") as file:  # which JSON keeps to ASCII
        for start in tqdm(starts, unit=" batches", disable=True if rank else None):
            batch = todo[start:start + args.batch_size]
            records = predict(predictor, [out.parent / name for name in batch], args.estimate,
                              args.numeric, args.decode)
            for name, record in zip(batch, records):
                file.write(json.dumps({**record, "image": name}) + "\n")
            file.flush()

    if world_size > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        torch.distributed.barrier()
    if rank:
        return {}
    records = {}
    for line in chain(*map(whole_lines, parts)):
        record = json.loads(line)
        records[record["image"]] = record
    records = {name: records[name] for name in names}
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records.values()]
    out.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    for part in parts:
        part.unlink()
    return records

def write_livelink(path: Path, records: list[dict], fps: int) -> None:
    """Writes a Live Link Face take: 61 values a row, timecode HH:MM:SS:FF.mmm, gaps for pictures
    that could not be used."""
    zeros = ["0.0000000000"] * len(ANGLES)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Timecode", "BlendshapeCount", *LIVELINK_NAMES, *ANGLES])
        for index, record in enumerate(records):
            if record["error"]:
                continue
            seconds, frame = divmod(index, fps)
            clock = f"{timedelta(seconds=seconds)!s:0>8}:{frame:02d}.000"
            values = [f"{record['coefficients'][name]:.10f}" for name in ARKIT_NAMES]
            writer.writerow([clock, 61, *values, *zeros])

def draw_chart(picture: Image.Image, record: dict) -> Image.Image:
    """Draws the photo, the description and bars of the strongest actions with their deviation."""
    chart = Image.new("RGB", (1200, 1080), "white")
    draw = ImageDraw.Draw(chart)
    font = ImageFont.load_default(16)

    # On the left the photo, below it the words.
    photo = ImageOps.contain(picture, (500, 360), Image.Resampling.LANCZOS)
    chart.paste(photo, (40, 40))
    words = (record["description"] or {}).values()
    paragraphs = [textwrap.fill(str(text), 62) for text in words]
    draw.text((40, 60 + photo.height), "\n\n".join(paragraphs), INK, font, spacing=5)

    # On the right a bar for each of the strongest actions, 340 pixels from 0 to 1.
    stds = record["std"] or dict.fromkeys(ARKIT_NAMES, 0.0)
    strongest = sorted(record["coefficients"].items(), key=itemgetter(1), reverse=True)
    for row, (name, value) in enumerate(strongest[:24]):
        y = 60 + 41 * row
        low, high = max(value - stds[name], 0), min(value + stds[name], 1)
        draw.text((748, y), name, INK, font, anchor="rm")
        draw.rectangle([760, y - 8, 760 + 340 * value, y + 8], BAR)
        draw.line([760 + 340 * low, y, 760 + 340 * high, y], INK, 2)
        draw.text((1160, y), f"{value:.2f}", INK, font, anchor="rm")
    return chart

# ---- The stage itself ----------------------------------------------------------------------------
def main(args: Namespace) -> None:
    """Runs the stage. Under torchrun each process takes a share of the pictures."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: torch sees no GPU; use --device cpu")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if min(args.batch_size, args.fps, args.limit) < 1:
        raise SystemExit("--batch-size, --fps and --limit: expected at least 1")
    out = Path(args.out)
    if out.is_dir() or os.path.realpath(out) in map(os.path.realpath, args.inputs):
        raise SystemExit(f"--out {out} is a folder or an INPUT, which would be overwritten; choose "
                         "another")
    if args.decode == "generate" and (args.numeric or args.estimate != "mean"):
        raise SystemExit("--numeric and --estimate choose within --decode forced; leave them out")
    logging.disable_progress_bar()

    # A picture that comes twice, under whatever spelling, has one record, and a frame each time.
    # Links are followed: behind one, ".." would lead elsewhere.
    frames = []
    for image in list_images(args.inputs)[:args.limit]:
        name = os.path.relpath(os.path.realpath(image), out.parent.resolve())
        frames.append(name.replace(os.sep, "/"))
    predictor = load(args.model, args.device, args.dtype, args.prompt, args.base)
    if args.numeric and predictor.supervision not in ("numeric", "numbers-first"):
        raise SystemExit(f"--numeric: {args.model} writes a description first, without which its "
                         "numbers are wrong; leave it out")
    records = predict_all(predictor, [*dict.fromkeys(frames)], args)
    if not records:
        return  # another process reports

    failed = [record for record in records.values() if record["error"]]
    for record in failed[:5]:
        print("no prediction:", record["image"], record["error"])
    print(f"wrote {out}: {len(records) - len(failed)} predictions, {len(failed)} without")
    if args.csv:
        write_livelink(Path(args.csv), [records[name] for name in frames], args.fps)
    if args.plot:
        Path(args.plot).mkdir(parents=True, exist_ok=True)
        for index, (name, record) in enumerate(records.items()):
            if not record["error"]:
                chart = draw_chart(open_image(out.parent / name), record)
                chart.save(Path(args.plot, f"{index:06d}_{Path(name).stem}.png"))
    print(f"next, where the truth is known: python evaluate.py {out} [TRUTH, if not the demo's]")

if __name__ == "__main__":
    try:
        main(parse_args())
    except torch.OutOfMemoryError:
        raise SystemExit("out of GPU memory; lower --batch-size, then --resume goes on")
    except OSError as error:  # a folder in place of a file, no right to write, a full disk
        raise SystemExit(f"{error}; name another file or folder")
    except KeyboardInterrupt:
        raise SystemExit("interrupted; what is finished is kept, add --resume to go on")
