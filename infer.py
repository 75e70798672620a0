# SPDX-License-Identifier: MIT
"""Inference for SemanticFace (arXiv 2603.14827, Sec. 3.2): images -> description and 52 ARKit coefficients.

The answer's braces, names and quotes are known in advance, so they are fed to the model, not sampled: every
answer is valid and complete by construction. The model decides the words of the description and, for each
coefficient, a distribution over the eleven values 0.0, 0.1, ... 1.0, whose mean is the estimate (RAIL,
arXiv 2403.04182) and whose standard deviation is reported.

Reads:  pictures, folders of pictures, .jsonl records with an "image", a checkpoint folder of distill.py,
        or, with --prompt FILE, a Qwen-VL or PEFT adapter trained elsewhere (see also --decode generate)
Writes: prediction records, one JSON object a line, image paths relative to the file. An unreadable picture
        becomes an error record. With --csv a Live Link Face take, with --plot a chart of each picture
    {"image": "images/000001.png", "coefficients": {"jawOpen": 0.12, ...}, "std": {"jawOpen": 0.05, ...},
     "description": {"expression_category": "slight happiness", ...}, "error": null}

    python infer.py photo.jpg folder/ --model runs/demo --out predictions.jsonl --csv take.csv --plot charts/

Shapes: B images in a batch, T tokens so far, n new tokens, V vocabulary, C = 52 coefficients.
"""
import argparse
import csv
import json
import math
import os
import re
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging

# ---------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------

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
FIELDS = ["expression_category", "muscle_movements", "emotional_implication", "symmetry"]  # Sec. 3.1
VALUES = [f"{k / 10:.1f}" for k in range(11)]  # one decimal, Sec. 3.2
# What an answer holds, in its order; the paper's is "semantic".
PARTS = {"semantic": ("analysis", "arkit"), "numeric": ("arkit",), "numbers-first": ("arkit", "analysis")}
ANGLES = ["HeadYaw", "HeadPitch", "HeadRoll", "LeftEyeYaw", "LeftEyePitch", "LeftEyeRoll",
          "RightEyeYaw", "RightEyePitch", "RightEyeRoll"]
MAX_TEXT_TOKENS = 400  # of one description field
MAX_NEW_TOKENS = 2048  # of an answer with --decode generate
FOREIGN_PIXELS = 1024 * 32 * 32  # of a picture for a checkpoint trained elsewhere: 1024 image tokens
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2"}
WINDOW = 52  # undecided tokens of the numbers that one pass feeds
GUESSES = 3  # tokens of a text that are guessed ahead
READERS = 4  # threads that open pictures ahead of the model
COLORS = {"subject's left": (0, 114, 178), "subject's right": (230, 159, 0), "unpaired": (120, 120, 120)}
INK, GRID = (40, 40, 40), (225, 225, 225)
MAX_ASPECT = 200  # the image processor refuses a picture that is longer than this


def parse_args(argv=None) -> argparse.Namespace:
    """Reads the command line, or `argv`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", default=["data/demo/val.jsonl"],
        help="pictures, folders of pictures, .jsonl records (default: the demo's held-out faces)")
    add("--model", default="runs/demo", help="checkpoint folder of distill.py (default %(default)s)")
    add("--out", default="predictions.jsonl", help="prediction records (default %(default)s)")
    add("--csv", help="also write a Live Link Face take, one row for each picture in order")
    add("--plot", help="also draw a chart of each picture into this folder")
    add("--fps", type=int, default=60, help="frames per second of the take (default %(default)s)")
    add("--decode", choices=["forced", "generate"], default="forced",
        help="feed the skeleton, or let the model write it all and read what it wrote (default %(default)s)")
    add("--prompt", help="text file with the prompt of a checkpoint trained elsewhere; what stands before a "
        "line --- is its system prompt")
    add("--estimate", choices=["mean", "median", "mode"], default="mean",
        help="of each distribution; mode is what greedy decoding writes (default %(default)s)")
    add("--numeric", action=argparse.BooleanOptionalAction, default=False, help="numbers, no description")
    add("--batch-size", type=int, default=32, help="pictures decoded together (default %(default)s)")
    add("--limit", type=int, help="use the first LIMIT pictures only")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the weights; auto is bfloat16 on a GPU, else float32 (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------

def list_images(inputs: list[str]) -> list[Path]:
    """Paths of the pictures in files, folders (sorted) and .jsonl records. SystemExit if there is none."""
    images = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise SystemExit(f"{path} holds no pictures; expected files such as .png, .jpg or .webp")
            images += found
        elif path.suffix == ".jsonl" and path.is_file():
            images += images_of_records(path)
        elif path.is_file():
            images.append(path)
        else:
            raise SystemExit(f"{path} does not exist; expected pictures, folders of them or .jsonl records")
    if not images:
        raise SystemExit(f"{', '.join(inputs)}: no picture; expected pictures, folders of them or .jsonl")
    return list(dict.fromkeys(images))


def images_of_records(path: Path) -> list[Path]:
    """The pictures that a .jsonl file names, relative to it. SystemExit names the line that has none."""
    images = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n"), 1):
        try:
            images.append(path.parent / json.loads(line)["image"])
        except (json.JSONDecodeError, KeyError, TypeError):
            example = '{"image": "images/000001.png", ...}'
            raise SystemExit(f"{path}, line {number}: no \"image\"; expected JSON lines such as {example}")
    return images


def open_image(path: str) -> Image.Image:
    """Opens a picture upright and in RGB: 16-bit grey is scaled down, what is transparent becomes white."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def try_image(source) -> tuple:
    """Returns (picture, None), or (None, why) where `source`, a path or an open picture, cannot be used."""
    try:
        picture = source.convert("RGB") if isinstance(source, Image.Image) else open_image(source)
    except Exception as error:  # Pillow's readers raise a dozen types on damaged files
        return None, f"{type(error).__name__}: {error}"
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        size = f"{picture.width} x {picture.height} pixels"
        return None, f"{size}: one side is over {MAX_ASPECT} times the other; crop the picture to the face"
    return picture, None


def open_ahead(images: list, batch_size: int):
    """Yields (sources, their pictures) batch by batch; threads open the next batch while one is decoded."""
    waiting = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(images), batch_size):
            sources = images[start:start + batch_size]
            waiting.append((sources, pool.map(try_image, sources)))
            if len(waiting) > 1:
                sources, opened = waiting.popleft()
                yield sources, list(opened)
        for sources, opened in waiting:
            yield sources, list(opened)


# ---------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------

def load(model_dir: str, device: str = "cpu", dtype: str = "auto", prompt_file: str | None = None):
    """Loads a checkpoint or adapter folder of distill.py for `predict`. SystemExit if it is not finished.

    With `prompt_file`, any Qwen-VL (folder or hub id) and any PEFT adapter for one (folder).
    """
    folder, run = Path(model_dir), {"prompt": "", "supervision": "semantic", "max_pixels": None}
    adapter_file = folder / "adapter_config.json"
    weights_file = adapter_file if adapter_file.is_file() else folder / "config.json"
    finished = weights_file.is_file() and (folder / "run.json").is_file()
    if not finished and not prompt_file:
        fix = "make one with: python distill.py; one trained elsewhere needs --prompt FILE"
        if (folder / "state.pt").is_file():
            fix = f"finish the run with: python distill.py --out {folder} --resume"
        raise SystemExit(f"--model {folder} holds no finished checkpoint (config.json and run.json); {fix}")
    system, prompt = read_prompt(Path(prompt_file)) if prompt_file else ("", None)
    try:
        if finished:
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        prompt, pixels, supervision = prompt or run["prompt"], run["max_pixels"], run["supervision"]
        adapter = json.loads(adapter_file.read_text(encoding="utf-8")) if adapter_file.is_file() else None
        base = adapter["base_model_name_or_path"] if adapter else model_dir
        auto = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        weights_dtype = auto if dtype == "auto" else getattr(torch, dtype)
        network = AutoModelForImageTextToText.from_pretrained(base, dtype=weights_dtype)
        tokenizer = AutoTokenizer.from_pretrained(base)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(base)
        updates = load_file(folder / "adapter_model.safetensors") if adapter else {}
        head = load_file(folder / "regression.safetensors", device) if run.get("steps") == 0 else None
    except Exception as error:  # a damaged file surfaces as one of a dozen types, all with the same cure
        first = str(error).partition("\n")[0]
        why = f"{type(error).__name__}: {first}"
        raise SystemExit(f"--model {model_dir} cannot be read ({why}); copy it again or repeat distill.py")
    if adapter:
        merge_adapter(network, adapter, updates)
    # A checkpoint of distill.py gets pictures scaled as in its training, any other within its own bounds.
    size = {"shortest_edge": pixels or FOREIGN_PIXELS // 16, "longest_edge": pixels or FOREIGN_PIXELS}
    return SimpleNamespace(network=network.to(device).eval(), tokenizer=tokenizer, system=system,
                           prompt=prompt, image_processor=image_processor, size=size, head=head,
                           supervision=supervision, device=torch.device(device), blocks={}, memory={})


@torch.no_grad()
def merge_adapter(network, config: dict, updates: dict) -> None:
    """Adds alpha / r B A of a PEFT adapter to the weights (LoRA, arXiv 2106.09685, Eq. 3), in float32.

    Every tensor must find its weight: an adapter that matches nothing would silently do nothing. Raises
    SystemExit, naming the first that does not (DoRA's magnitudes and trained biases among them).
    """
    def module_of(key: str) -> str:
        return key.removeprefix("base_model.model.").split(".lora_")[0]

    weights = dict(network.named_parameters())
    pairs = {key.replace(".lora_A.", ".lora_B."): key for key in updates if ".lora_A." in key}
    for key in {*updates, *pairs}:
        is_matrix = key in pairs or key in pairs.values()
        if not is_matrix or key not in updates or f"{module_of(key)}.weight" not in weights:
            raise SystemExit(f"the adapter's {key} matches no weight of {config['base_model_name_or_path']}; "
                             "expected pairs of LoRA matrices for the model that the adapter was trained on")
    for key_b, key_a in pairs.items():
        name = module_of(key_b)
        low, high = updates[key_a].float(), updates[key_b].float()  # (r, in), (out, r)
        alpha = config["lora_alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            alpha = value if re.fullmatch(rf"(.*\.)?{pattern}", name) else alpha
        scale = alpha / (math.sqrt(len(low)) if config.get("use_rslora") else len(low))
        weight = weights[f"{name}.weight"]
        weight.copy_((weight.float() + scale * high @ low).to(weight.dtype))


def read_prompt(path: Path) -> tuple[str, str]:
    """Reads (system turn of the chat, prompt) from a text file, parted by a line --- if there are both."""
    if not path.is_file() or not path.read_text(encoding="utf-8").strip():
        state = "is empty" if path.is_file() else "does not exist"
        raise SystemExit(f"--prompt {path} {state}; expected a text file with the prompt")
    *system, prompt = re.split(r"^---$", path.read_text(encoding="utf-8"), maxsplit=1, flags=re.M)
    return "".join(f"<|im_start|>system\n{text.strip()}<|im_end|>\n" for text in system), prompt.strip()


def prompt_text(prompt: str, image_tokens: int) -> str:
    """The Qwen-VL chat up to the answer, with the image's place holders written by hand."""
    image = "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
    return f"<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n"


def answer_skeleton(supervision: str) -> list[tuple]:
    """The answer as (fixed text, slot) pairs; a slot is a field, a coefficient or, at the end, None."""
    pieces, text = [], "{"
    for part in PARTS[supervision]:
        quote = '"' if part == "analysis" else ""
        text += f'"{part}": {{'
        for slot in FIELDS if part == "analysis" else ARKIT_NAMES:
            pieces.append((f'{text}"{slot}": {quote}', slot))
            text = f"{quote}, "
        text = f"{quote}}}, "
    return pieces + [(f"{quote}}}}}", None)]


def prepare(model: SimpleNamespace, images: list[Image.Image]) -> dict:
    """Pictures -> model inputs: prompts (B, T) padded on the left, so that answers start in one column."""
    pixels = model.image_processor(images, size=model.size, return_tensors="pt")
    counts = pixels["image_grid_thw"].prod(dim=1) // model.image_processor.merge_size ** 2  # (B,)
    texts = [model.system + prompt_text(model.prompt, count) for count in counts.tolist()]
    prompts = [model.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[model.tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in prompts])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        # Without these types generate() would quietly fall back to text positions for the image.
        "mm_token_type_ids": (input_ids == model.tokenizer.convert_tokens_to_ids("<|image_pad|>")).long(),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


# ---------------------------------------------------------------------------------------------------
# Forced decoding: feed the skeleton, decide the slots
# ---------------------------------------------------------------------------------------------------

class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, in buffers with room for more: torch.cat would copy all at each step."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple:
        """Appends (B, heads, n, D) tensors and returns views of all keys and values so far."""
        length = self.get_seq_length()
        stop = length + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        if stop > self.buffers[0].shape[2]:
            kept = self.keys, self.values
            self.buffers = [states.new_empty(*states.shape[:2], 2 * stop, states.shape[3])
                            for states in (key_states, value_states)]
            if length:
                for buffer, states in zip(self.buffers, kept):
                    buffer[:, :, :length] = states
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, length:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self.buffers)
        return self.keys, self.values


class Answers:
    """B answers in the making: their key-value cache and the mask of its tokens (B, T)."""

    def __init__(self, network, inputs: dict):
        self.body, self.head, self.mask = network.model, network.lm_head, inputs["attention_mask"]
        self.padded = not bool(self.mask.all())
        self.cache = DynamicCache()
        self.cache.layers = [RoomyLayer() for _ in range(network.config.text_config.num_hidden_layers)]
        self.body(**inputs, past_key_values=self.cache, use_cache=True)
        self.offset = self.body.rope_deltas  # (B, 1): an image takes fewer positions than tokens

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """Appends tokens (B, n); returns the hidden states (B, n, D) behind each of them."""
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)  # (B, T + n)
        positions = (self.mask.cumsum(dim=1) - 1)[:, -ids.shape[1]:] + self.offset  # (B, n)
        mask = self.mask if self.padded else None  # without one, attention is faster
        return self.body(input_ids=ids, attention_mask=mask, past_key_values=self.cache,
                         position_ids=positions.expand(3, -1, -1), use_cache=True).last_hidden_state

    def take_back(self, count: int) -> None:
        """Removes the last `count` tokens."""
        if count:
            self.cache.crop(-count)
            self.mask = self.mask[:, :-count]

    def keep(self, counts: list[int], fed: int) -> None:
        """Of the last `fed` tokens keeps the first `counts` of each answer; others become masked padding."""
        width = max(counts)
        self.take_back(fed - width)
        if min(counts) < width:
            kept = torch.arange(width) < torch.tensor(counts)[:, None]  # (B, width)
            self.mask[:, -width:] *= kept.to(self.mask)
            self.padded = True


def guess(memory: dict, context: list[int], field: int, openings: list, closings: list[int]) -> list[int]:
    """GUESSES tokens, or a few more: what last followed the same two tokens, and the skeleton in between."""
    guesses = []
    while len(guesses) < GUESSES and field < len(closings):
        token = memory.get(tuple((context + guesses)[-2:]))
        if token is None:
            break
        closes = token == closings[field]
        field += closes
        guesses += openings[field] if closes else [token]
    return guesses


def decode_texts(answers: Answers, unfed: torch.Tensor, openings: list, closings: list[int], pad_id: int,
                 memory: dict) -> list[list[list[int]]]:
    """Greedy decoding of the description's fields, each until the token that closes it.

    `unfed` (B, n) stands in the answers but not in the cache. `openings` are the token ids of the skeleton
    before each field and, empty, behind the last, `closings` the first token behind each. Guesses from
    earlier texts, which `memory` holds, are fed along and kept as far as the model agrees: the same words in
    fewer passes (prompt lookup, as in arXiv 2304.04487). Returns the token ids of each answer's fields.
    """
    contexts = [row + openings[0] for row in unfed.tolist()]  # what stands in each answer from here on
    fed = [0] * len(contexts)  # how many tokens of it are in the cache
    texts = [[[]] for _ in contexts]  # the fields of each answer, the last of them unfinished
    while any(len(fields) <= len(FIELDS) for fields in texts):
        rows = []
        for context, done, fields in zip(contexts, fed, texts):
            guesses = guess(memory, context, len(fields) - 1, openings, closings)
            rows.append(context[done:] + guesses if len(fields) <= len(FIELDS) else [])
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=unfed.device)
        chosen = answers.head(answers.feed(ids)).argmax(dim=-1).tolist()  # (B, width)
        kept = [0] * len(rows)
        for k, (row, fields) in enumerate(zip(rows, texts)):
            certain = contexts[k][fed[k]:]
            # While all certain tokens were fed, what the model chose behind them is certain too.
            while len(fields) <= len(FIELDS) and row[:len(certain)] == certain:
                kept[k] = len(certain)
                token = chosen[k][len(certain) - 1]
                if token == closings[len(fields) - 1] or len(fields[-1]) == MAX_TEXT_TOKENS:
                    certain += openings[len(fields)]
                    fields.append([])
                else:
                    certain.append(token)
                    fields[-1].append(token)
            contexts[k][fed[k]:] = certain
            fed[k] += kept[k]
        answers.keep(kept, width)
    for context in contexts:
        tokens = context + closings[-1:]
        memory.update({(one, two): three for one, two, three in zip(tokens, tokens[1:], tokens[2:])})
    return [fields[:len(FIELDS)] for fields in texts]


def number_block(encode, supervision: str) -> tuple[list, list, list, list]:
    """The token ids of all names and values "0.0", and what is undecided among them.

    Returns ids, the columns of undecided tokens, the options, and how many of these each column has: eleven
    in the tiny model, where a number is one token. Where digits are split, two before the point, ten behind.
    """
    values = [encode(value) for value in VALUES]
    assert len({len(value_ids) for value_ids in values}) == 1, f"values differ in length: {values}"
    choices = [list(dict.fromkeys(place)) for place in zip(*values)]
    options = max(choices, key=len)
    ids, columns, counts = [], [], []
    for text, slot in answer_skeleton(supervision):
        if slot not in ARKIT_NAMES:
            continue
        ids += encode(text)
        for chosen in choices:
            if len(chosen) > 1:
                assert chosen == options[:len(chosen)], f"values share no digits: {values}"
                columns.append(len(ids))
                counts.append(len(chosen))
            ids.append(chosen[0])
    return ids, columns, options, counts


def decode_numbers(answers: Answers, block: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decides the S undecided tokens by fixed-point passes (Jacobi decoding, arXiv 2402.02057).

    A guess for many tokens is fed at once. The first wrong one, and all before it, are then decided exactly
    as by feeding one at a time. Those after it have a better guess for the next pass. Returns the logits of
    the O options (B, S, O), -inf where there is none, the greedy choice among them (B, S), and the tokens
    that are decided and not yet fed (B, n).
    """
    ids, columns, options, counts = block
    device, batch_size = answers.mask.device, len(answers.mask)
    option_ids = torch.tensor(options, device=device)  # (O,)
    head = answers.head.weight[option_ids]  # (O, D): no other token can stand here
    order = torch.arange(len(options), device=device)
    missing = order >= torch.tensor(counts, device=device)[:, None]  # (S, O)
    tokens = torch.tensor(ids, device=device).repeat(batch_size, 1)  # (B, T)
    scores = torch.zeros(batch_size, len(columns), len(options), device=device)
    choice = torch.zeros(batch_size, len(columns), dtype=torch.long, device=device)
    fed, done = 0, 0  # tokens in the cache, decided tokens
    while done < len(columns):
        window = slice(done, done + WINDOW)
        places = torch.tensor(columns[window], device=device)  # (n,)
        stop = columns[window][-1]
        hidden = answers.feed(tokens[:, fed:stop])[:, places - 1 - fed]  # (B, n, D)
        scores[:, window] = (hidden @ head.T).float().masked_fill(missing[window], -torch.inf)  # (B, n, O)
        before = choice.clone()
        choice[:, window] = scores[:, window].argmax(dim=-1)
        if len(columns) == 2 * len(ARKIT_NAMES):  # where digits are split, only "0" can follow "1."
            choice[:, 1::2].masked_fill_(choice[:, 0::2] == 1, 0)
        wrong = (choice != before)[:, window].any(dim=0).tolist()
        tokens[:, places] = option_ids[choice[:, window]]
        done += wrong.index(True) + 1 if True in wrong else len(wrong)
        fed = columns[done - 1]  # what was fed behind it may have followed a wrong guess
        answers.take_back(stop - fed)
    return scores, choice, tokens[:, fed:]


@torch.inference_mode()
def decode_forced(model: SimpleNamespace, inputs: dict, supervision: str) -> tuple:
    """Forced-skeleton decoding of a batch.

    Returns probabilities (B, C, 11), the greedy choice as numbers (B, C) and the descriptions.
    """
    def encode(text: str) -> list[int]:
        return model.tokenizer.encode(text, add_special_tokens=False)

    if supervision not in model.blocks:
        model.blocks[supervision] = number_block(encode, supervision)
    pieces = answer_skeleton(supervision)
    answers = Answers(model.network, inputs)
    descriptions = [{} for _ in inputs["input_ids"]]
    unfed = inputs["input_ids"][:, :0]  # what stands in the answers and has not been fed (B, n)
    for part in PARTS[supervision]:
        if part == "arkit":
            scores, choice, unfed = decode_numbers(answers, model.blocks[supervision])
        else:
            openings = [encode(text) for text, slot in pieces if slot in FIELDS] + [[]]
            closings = [encode(text)[0] for (_, slot), (text, _) in zip(pieces, pieces[1:]) if slot in FIELDS]
            written = decode_texts(answers, unfed, openings, closings, model.tokenizer.pad_token_id,
                                   model.memory)
            descriptions = [{field: unescape(model.tokenizer.decode(ids))
                             for field, ids in zip(FIELDS, texts)} for texts in written]
            unfed = unfed[:, :0]
    if scores.shape[1] == len(ARKIT_NAMES):
        return scores.softmax(dim=-1), choice, descriptions
    # Digits are split: "0" or "1", then the tenths, of which "1." allows only "0".
    whole = scores[:, 0::2, :2].softmax(dim=-1)  # (B, C, 2)
    tenths = scores[:, 1::2].softmax(dim=-1)  # (B, C, 10)
    is_one = choice[:, 0::2] == 1  # (B, C)
    # What was given to "0." where "1." is the choice counts as its neighbour 0.9.
    tenths = torch.where(is_one[:, :, None], torch.eye(10, device=tenths.device)[9], tenths)
    probabilities = torch.cat([whole[:, :, :1] * tenths, whole[:, :, 1:]], dim=-1)  # (B, C, 11)
    return probabilities, torch.where(is_one, 10, choice[:, 1::2]), descriptions


def unescape(text: str) -> str:
    """Undoes JSON's escapes (\\" and the like). A text that is no valid JSON string is returned as is."""
    try:
        return json.loads(f'"{text}"')
    except json.JSONDecodeError:
        return text


def estimate(probabilities: torch.Tensor, chosen: torch.Tensor, kind: str) -> tuple:
    """Point estimate and standard deviation, (B, C) each, of the coefficients' distributions (B, C, 11).

    The mean minimises expected squared error, the median absolute. The mode is the greedy `chosen` (B, C).
    """
    values = torch.arange(len(VALUES), device=probabilities.device) / 10
    mean = probabilities @ values
    std = (probabilities @ values ** 2 - mean ** 2).clamp(min=0).sqrt()
    if kind == "mean":
        return mean, std
    if kind == "median":
        return values[(probabilities.cumsum(dim=-1) >= 0.5).float().argmax(dim=-1)], std
    return values[chosen], std


# ---------------------------------------------------------------------------------------------------
# Free decoding: let the model write, read what it wrote
# ---------------------------------------------------------------------------------------------------

@torch.inference_mode()
def decode_generate(model: SimpleNamespace, inputs: dict) -> list[str]:
    """Greedy answers of transformers' own generate(), the reference for forced decoding."""
    tokens = model.network.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)  # (B, T + n)
    new_tokens = tokens[:, inputs["input_ids"].shape[1]:]
    return model.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)


def read_answer(text: str) -> tuple[dict, dict | None]:
    """Reads (52 coefficients, description or None) from what a model wrote, as leniently as is safe.

    The coefficients are the last JSON object, or its "arkit", named as in ARKit or in Live Link Face. Other
    keys are ignored and values clipped to 0..1. Raises ValueError where one is missing or no number.
    """
    decoder, answer, start = json.JSONDecoder(), None, text.find("{")
    while start >= 0:
        try:
            answer, stop = decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            stop = start + 1
        start = text.find("{", stop)
    if answer is None:
        raise ValueError("the answer holds no whole JSON object")
    given = answer["arkit"] if isinstance(answer.get("arkit"), dict) else answer
    values = {name[:1].lower() + name[1:]: value for name, value in given.items()}
    numbers = {name: value for name, value in values.items() if type(value) in (int, float)}
    missing = [name for name in ARKIT_NAMES if not numbers.get(name, math.nan) > -math.inf]
    if missing:
        raise ValueError(f"the answer lacks {len(missing)} coefficients: {', '.join(missing[:3])}, ...")
    description = answer.get("analysis")
    sections = re.split(r"^\W*\d\.[^\n]*\n", text[:text.rfind("{")], flags=re.M)[1:]  # under bold headings
    if not isinstance(description, dict) and len(sections) == len(FIELDS):
        description = dict(zip(FIELDS, map(str.strip, sections)))
    return {name: min(max(0.0, numbers[name]), 1.0) for name in ARKIT_NAMES}, description


# ---------------------------------------------------------------------------------------------------
# Predicting
# ---------------------------------------------------------------------------------------------------

@torch.inference_mode()
def regress(model: SimpleNamespace, inputs: dict) -> torch.Tensor:
    """Coefficients (B, C) of a checkpoint of distill.py --steps 0, as its RegressionHead gives them."""
    tower, head = model.network.model.visual, model.head
    tokens = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output.float()  # (., D)
    counts = inputs["image_grid_thw"].prod(dim=1) // tower.spatial_merge_size ** 2  # (B,)
    names = model.network.get_input_embeddings().weight[head["name_ids"]].float()  # (C, D)
    queries, rows = names @ head["look"], []
    for part in F.layer_norm(tokens, tokens.shape[-1:]).split(counts.tolist()):  # (n, D)
        attention = (queries @ part.T).softmax(dim=1)  # (C, n)
        rows.append((attention * (names @ part.T)).sum(dim=1))
    return head["scale"] * torch.stack(rows) + head["bias"]


def rounded(row: list[float]) -> dict[str, float]:
    """52 numbers by name."""
    return {name: round(value, 4) for name, value in zip(ARKIT_NAMES, row)}


def answer(model: SimpleNamespace, pictures: list, kind: str, numeric: bool, decoding: str) -> list[dict]:
    """The fields that a batch of pictures adds to their records."""
    inputs = prepare(model, pictures)
    if model.head:
        rows = regress(model, inputs).clamp(0, 1).tolist()
        return [{"coefficients": rounded(row)} for row in rows]
    if decoding == "forced":
        supervision = "numeric" if numeric else model.supervision
        probabilities, chosen, texts = decode_forced(model, inputs, supervision)
        values, stds = estimate(probabilities, chosen, kind)
        rows = zip(values.clamp(0, 1).tolist(), stds.tolist(), texts)
        return [{"coefficients": rounded(row), "std": rounded(spread), "description": text or None}
                for row, spread, text in rows]
    answers = []
    for text in decode_generate(model, inputs):
        try:
            coefficients, description = read_answer(text)
            answers.append({"coefficients": coefficients, "description": description})
        except ValueError as error:
            answers.append({"error": str(error), "answer": text})
    return answers


def predictions(model: SimpleNamespace, images: list, batch_size: int = 32, kind: str = "mean",
                numeric: bool = False, decoding: str = "forced"):
    """Yields the prediction record of each image (path or picture), in order and as they come.

    An unreadable picture gives a record with "error" set and null coefficients. A batch of them is free.
    """
    for sources, opened in open_ahead(images, batch_size):
        pictures = [picture for picture, _ in opened if picture]
        answers = iter(answer(model, pictures, kind, numeric, decoding) if pictures else [])
        for source, (picture, why) in zip(sources, opened):
            path = None if isinstance(source, Image.Image) else str(source)
            record = {"image": path, "coefficients": None, "std": None, "description": None, "error": why}
            yield {**record, **next(answers)} if picture else record


def predict(model: SimpleNamespace, images: list, batch_size: int = 32, kind: str = "mean",
            numeric: bool = False, decoding: str = "forced") -> list[dict]:
    """The prediction records of `images` (paths or pictures) in order; see `predictions`."""
    return list(predictions(model, images, batch_size, kind, numeric, decoding))


# ---------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------

def json_line(record: dict) -> str:
    """A record as a line of a .jsonl file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def resume(out: Path, settings: dict) -> list[dict]:
    """Prepares the prediction file and returns an interrupted run's records if its settings were the same.

    While a run is unfinished, its settings stand in a file beside `out`. A torn last line is dropped.
    """
    marker = out.with_name(out.name + ".unfinished")
    out.parent.mkdir(parents=True, exist_ok=True)
    records = []
    if out.is_file() and marker.is_file() and marker.read_text(encoding="utf-8") == json.dumps(settings):
        for line in out.read_text(encoding="utf-8", errors="replace").rstrip().split("\n"):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    marker.write_text(json.dumps(settings), encoding="utf-8")
    out.write_text("".join(map(json_line, records)), encoding="utf-8")
    return records


def write_livelink(path: Path, records: list[dict], fps: int) -> None:
    """Writes a Live Link Face take: 61 columns, timecode HH:MM:SS:FF.mmm with gaps at failed pictures."""
    columns = [name[0].upper() + name[1:] for name in ARKIT_NAMES]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Timecode", "BlendshapeCount"] + columns + ANGLES)
        for frame, record in enumerate(records):
            if record["error"]:
                continue
            minutes, seconds = divmod(frame // fps, 60)
            timecode = f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}:{frame % fps:02d}.000"
            values = [f"{record['coefficients'][name]:.10f}" for name in ARKIT_NAMES]
            writer.writerow([timecode, 61] + values + ["0.0000000000"] * len(ANGLES))


# ---------------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------------

def wrap(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def strongest(coefficients: dict, count: int) -> list[tuple]:
    """The `count` strongest actions as (title, names), Left and Right of an action together."""
    groups = {}
    for name in ARKIT_NAMES:
        paired = name.replace("Left", "Right") in ARKIT_NAMES and name.replace("Right", "Left") in ARKIT_NAMES
        title = re.sub("(Left|Right)$", "", name) if paired and len(name) > len("mouthRight") else name
        groups.setdefault(title, []).append(name)
    ranked = sorted(groups.items(), key=lambda group: -max(coefficients[name] for name in group[1]))
    return ranked[:count]


def draw_chart(picture: Image.Image, record: dict) -> Image.Image:
    """Draws the photo, the description and bars of the strongest actions, with one standard deviation."""
    chart = Image.new("RGB", (1200, 675), "white")
    draw = ImageDraw.Draw(chart)
    small, large = ImageFont.load_default(17), ImageFont.load_default(26)
    photo = ImageOps.contain(picture, (440, 360), Image.Resampling.LANCZOS)
    chart.paste(photo, (40 + (440 - photo.width) // 2, 40))
    description = record["description"] or {}
    y = 40 + photo.height + 20
    for index, text in enumerate(description.get(field, "") for field in FIELDS):
        font = large if index == 0 else small
        for line in wrap(draw, text, font, 440):
            draw.text((40, y), line, INK, font)
            y += font.size + 6
        y += 4

    left, right, top, rows = 760, 1150, 70, 12
    for tick in range(6):
        x = left + (right - left) * tick / 5
        draw.line([x, top, x, 630], GRID, 1)
        draw.text((x, 652), f"{tick / 5:.1f}", INK, small, anchor="mm")
    for index, (label, color) in enumerate(COLORS.items()):
        draw.rectangle([left + 150 * index, 36, left + 150 * index + 14, 50], color)
        draw.text((left + 150 * index + 22, 43), label, INK, small, anchor="lm")
    step = (630 - top) / rows
    for row, (title, names) in enumerate(strongest(record["coefficients"], rows)):
        middle = top + step * (row + 0.5)
        draw.text((left - 12, middle), title, INK, small, anchor="rm")
        for place, name in enumerate(names):
            side = "subject's left" if name.endswith("Left") else "subject's right"
            side = side if len(names) == 2 else "unpaired"
            y = middle + (place - (len(names) - 1) / 2) * 16
            value, spread = record["coefficients"][name], (record["std"] or {}).get(name, 0.0)
            x, low, high = (left + (right - left) * min(max(end, 0.0), 1.0)
                            for end in (value, value - spread, value + spread))
            draw.rectangle([left, y - 6, x, y + 6], COLORS[side])
            draw.line([low, y, high, y], INK, 2)
    return chart


def write_charts(folder: Path, records: list[dict], base: Path) -> None:
    """Draws a chart for each prediction, named after its place and its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, record in enumerate(tqdm(records, "drawing charts", unit=" charts", disable=None)):
        if not record["error"]:
            name = f"{index:06d}_{Path(record['image']).stem}.png"
            draw_chart(open_image(base / record["image"]), record).save(folder / name)


# ---------------------------------------------------------------------------------------------------
# The stage itself
# ---------------------------------------------------------------------------------------------------

def check_args(args: argparse.Namespace) -> None:
    """SystemExit on unusable flags, before anything is loaded."""
    if args.batch_size < 1 or args.fps < 1 or (args.limit is not None and args.limit < 1):
        given = f"--batch-size {args.batch_size}, --fps {args.fps}, --limit {args.limit}"
        raise SystemExit(f"{given}: expected whole numbers of at least 1")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: torch sees no GPU; expected one, or use --device cpu")
    if args.decode == "generate" and (args.numeric or args.estimate != "mean"):
        raise SystemExit("--numeric and --estimate choose within --decode forced; leave them out")
    if Path(args.out).absolute() in [Path(name).absolute() for name in args.inputs]:
        raise SystemExit(f"--out {args.out} is an INPUT and would be overwritten; choose another file")


def main(args: argparse.Namespace) -> None:
    """Runs the stage; under torchrun each process takes a share of the pictures and the first one merges."""
    check_args(args)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ['LOCAL_RANK']}" if world_size > 1 and args.device == "cuda" else args.device
    images = list_images(args.inputs)[:args.limit]
    logging.disable_progress_bar()
    model = load(args.model, device, args.dtype, args.prompt)
    out = Path(args.out)
    base = out.parent.absolute()
    names = [os.path.relpath(image.absolute(), base) for image in images]
    parts = [out.with_name(f"{out.name}.{k}of{world_size}") for k in range(world_size)]
    part = parts[rank] if world_size > 1 else out

    run_file = Path(args.model) / "run.json"
    settings = {name: getattr(args, name) for name in ("estimate", "numeric", "dtype", "decode", "prompt")}
    settings |= {"model": [str(run_file.absolute()), run_file.is_file() and run_file.stat().st_mtime]}
    done = {record["image"]: record for record in resume(part, settings)}
    share = list(zip(names, images))[rank::world_size]
    todo = [(name, image) for name, image in share if name not in done]
    if rank == 0:
        count = f"{len(images)} pictures, {len(share) - len(todo)} done before"
        how = f"{args.estimate} of each distribution" if args.decode == "forced" else "generate"
        how = "regression" if model.head else how
        print(f"{args.model} | {device} | {count} | {how}", flush=True)
    found = predictions(model, [image for _, image in todo], args.batch_size, args.estimate, args.numeric,
                        args.decode)
    bar = tqdm(found, total=len(todo), unit=" images", disable=True if rank else None)
    with part.open("a", encoding="utf-8") as file:
        for record, (name, _) in zip(bar, todo):  # the bar first, so that it sees the end
            done[name] = {**record, "image": name}
            file.write(json_line(done[name]))
            file.flush()

    if world_size > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        torch.distributed.barrier()
        if rank:
            return
        done = {record["image"]: record for path in parts
                for record in map(json.loads, path.open(encoding="utf-8"))}
    records = [done[name] for name in names]
    partial = out.with_name(out.name + ".partial")
    partial.write_text("".join(map(json_line, records)), encoding="utf-8")
    partial.replace(out)
    for path in {part, *parts}:
        path.with_name(path.name + ".unfinished").unlink(missing_ok=True)
        if path != out:
            path.unlink(missing_ok=True)
    failed = [record for record in records if record["error"]]
    for record in failed[:5]:
        print(f"no prediction: {record['image']} ({record['error']})")
    if args.csv:
        write_livelink(Path(args.csv), records, args.fps)
        print(f"wrote {args.csv}")
    if args.plot:
        write_charts(Path(args.plot), records, base)
        print(f"wrote charts to {args.plot}")
    print(f"wrote {out}: {len(records) - len(failed)} predictions, {len(failed)} pictures without")
    print("next: python evaluate.py" + ("" if args.out == "predictions.jsonl" else f" {out}"))


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("interrupted; what is finished is kept, and the same command goes on where it stopped")
