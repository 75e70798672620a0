# SPDX-License-Identifier: MIT
"""Inference for SemanticFace (arXiv 2603.14827): images -> description and 52 ARKit coefficients.

The fixed texts of an answer are fed to the model, so every answer is complete. The model writes the
words, and for each coefficient gives a distribution over 0.0, 0.1, ..., 1.0. We report its mean
(RAIL, arXiv 2403.04182) and its standard deviation.

Reads:  pictures, folders of pictures or .jsonl records with an "image", and a model: a run of
        distill.py or, with --prompt, any Qwen-VL or a PEFT adapter for one, such as the authors'
Writes: prediction records, one JSON object per line. An unusable picture has an "error" instead
    {"image": "images/000001.png", "coefficients": {"jawOpen": 0.12, ...}, "std": {"jawOpen": 0.05,
     ...}, "description": {"expression_category": "slight happiness", ...}, "error": null}

    python infer.py photo.jpg folder/ --model runs/demo --out predictions.jsonl --csv take.csv

Shapes: B images, T tokens so far, n new tokens, D width, C = 52 coefficients, L tokens per number.
"""
import json
import os
import re
import sys
import textwrap
import zlib
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, DynamicCache
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# The 52 ARKit names in the column order of Live Link Face. Every script repeats this block.
ARKIT_NAMES = """
    eyeBlinkLeft eyeLookDownLeft eyeLookInLeft eyeLookOutLeft eyeLookUpLeft eyeSquintLeft
    eyeWideLeft eyeBlinkRight eyeLookDownRight eyeLookInRight eyeLookOutRight eyeLookUpRight
    eyeSquintRight eyeWideRight jawForward jawRight jawLeft jawOpen mouthClose mouthFunnel
    mouthPucker mouthRight mouthLeft mouthSmileLeft mouthSmileRight mouthFrownLeft mouthFrownRight
    mouthDimpleLeft mouthDimpleRight mouthStretchLeft mouthStretchRight mouthRollLower
    mouthRollUpper mouthShrugLower mouthShrugUpper mouthPressLeft mouthPressRight
    mouthLowerDownLeft mouthLowerDownRight mouthUpperUpLeft mouthUpperUpRight browDownLeft
    browDownRight browInnerUp browOuterUpLeft browOuterUpRight cheekPuff cheekSquintLeft
    cheekSquintRight noseSneerLeft noseSneerRight tongueOut""".split()
FIELDS = ["expression_category", "muscle_movements", "emotional_implication", "symmetry"]
VALUES = [f"{k / 10:.1f}" for k in range(11)]  # each coefficient is written with one decimal
KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]  # their cache can be cropped
IMAGE_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]  # all that Pillow may try
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}
# The columns of a Live Link Face take. The last nine, which are angles, are not predicted.
COLUMNS = ["Timecode", "BlendshapeCount", *(name[0].upper() + name[1:] for name in ARKIT_NAMES),
           "HeadYaw", "HeadPitch", "HeadRoll", "LeftEyeYaw", "LeftEyePitch", "LeftEyeRoll",
           "RightEyeYaw", "RightEyePitch", "RightEyeRoll"]
FIELD_TOKENS = 150  # maximum length of a field
WORDS_TOKENS, MAX_PIXELS = 600, 1024 * 32 * 32  # limits for a checkpoint trained elsewhere

def parse_args(argv=None) -> Namespace:
    """Parses `argv`, by default the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", default=["data/demo/val.jsonl"],
        help="pictures, folders of them or .jsonl records (default: the demo's held-out faces)")
    add("--model", default="runs/demo", help="checkpoint, adapter or hub id (default %(default)s)")
    add("--base", help="base model of an adapter, if the one in its config is not on this machine")
    add("--prompt", help="for a model trained elsewhere: a .jsonl with messages, or a text file "
        "(first a system prompt and a line ---, if the model needs one, then the prompt)")
    add("--out", default="predictions.jsonl", help="prediction records (default %(default)s)")
    add("--csv", help="also write a Live Link Face take with a row per usable picture")
    add("--fps", type=int, default=60, help="frames per second of the take (default %(default)s)")
    add("--plot", help="also draw a chart of each picture into this folder")
    add("--estimate", choices=["mean", "mode"], default="mean", help="mode is the greedy choice")
    add("--resume", action="store_true", help="continue an interrupted run of the same command")
    add("--batch-size", type=int, default=32, help="pictures per batch (default %(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], help="(default: bfloat16 on a GPU)")
    gpu = "cuda:" + os.getenv("LOCAL_RANK", "0")  # torchrun sets the variable for each process
    add("--device", default=gpu if torch.cuda.is_available() else "cpu", help="such as cpu or cuda")
    return parser.parse_args(argv)

# ---- Forced decoding -----------------------------------------------------------------------------
# An answer with <slots>. The fixed texts are fed in, and the model fills the slots.
WORDS = """1. **Facial Expression Category**:<expression_category>
2. **Muscle Movements**:<muscle_movements>
3. **Emotional Implication**:<emotional_implication>
4. **Symmetry**:<symmetry>"""
NUMBERS = "{" + ", ".join(f'"{name[0].upper()}{name[1:]}": <{name}>' for name in ARKIT_NAMES) + "}"
ANSWERS = {"semantic": f"{WORDS}\n\n{NUMBERS}",  # the paper's order
           "numbers-first": f"{NUMBERS}\n\n{WORDS}", "numeric": NUMBERS}

def answer_skeleton(supervision: str) -> list[tuple]:
    """Returns the answer as (fixed text, slot that follows it) pairs. The last slot is None."""
    *parts, end = re.split("<(.+?)>", ANSWERS[supervision])  # text, slot, text, slot, ..., text
    return [*zip(parts[::2], parts[1::2]), (end, None)]

class State:
    """B answers that are being decoded: the model, and its cache of all tokens so far."""

    def __init__(self, model: nn.Module, inputs: dict):
        """Feeds the prompts (B, T) with their images."""
        self.model, self.cache = model, DynamicCache()
        self.mask = inputs["attention_mask"]  # (B, T), 0 where a token is padding
        output = model.model(**inputs, past_key_values=self.cache)
        self.last = output.last_hidden_state[:, -1:]  # (B, 1, D)

    def feed(self, ids: Tensor, mask: Tensor | int = 1) -> Tensor:
        """Appends tokens (B, n), padding where `mask` is 0. Returns hidden states (B, n, D)."""
        self.mask = torch.cat([self.mask, mask * torch.ones_like(ids)], dim=1)  # (B, T)
        # Images use fewer positions than tokens. Their prompt has set the difference, rope_deltas.
        positions = self.mask.cumsum(dim=1) - 1 + self.model.model.rope_deltas  # (B, T)
        hidden = self.model.model(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache,
            position_ids=positions[:, -ids.shape[1]:].expand(3, -1, -1)).last_hidden_state
        self.last = hidden[:, -1:]
        return hidden

def decode_text(state: State, tokenizer, stop: str, limit: int) -> list[str]:
    """Decodes one text per answer, greedily, one token per step for all answers. A text ends at the
    end token, at a token that contains `stop`, or after `limit` tokens. The token that ends it is
    not fed back, but the part before `stop` belongs to the text."""
    ending = re.compile("|".join(map(re.escape, [stop, tokenizer.eos_token])))
    is_open, columns = torch.ones_like(state.mask[:, :1]), []  # (B, 1)
    for _ in range(limit):
        ids = state.model.lm_head(state.last).argmax(dim=-1)  # (B, 1)
        columns.append(ids)
        for row, token in enumerate(tokenizer.batch_decode(ids)):
            if ending.search(token):
                is_open[row] = 0
        if not is_open.any():
            break
        state.feed(ids, is_open)  # where a text has ended, this is padding
    texts = tokenizer.batch_decode(torch.cat(columns, dim=1))
    return [ending.split(text)[0].strip() for text in texts]

def decode_numbers(state: State, fixed_texts: list, value_ids: Tensor) -> tuple:
    """Decodes all numbers in a few passes, with the same result as greedy decoding one by one
    (Jacobi decoding, arXiv 2402.02057). For example, with three numbers:

        feed 0.0, 0.0, 0.0 -> the model chooses 0.2, 0.4, 0.0
        feed 0.2, 0.4, 0.0 -> it chooses 0.2, 0.5, 0.0: after 0.2 the second number is 0.5
        feed 0.2, 0.5, 0.0 -> it chooses 0.2, 0.5, 0.1
        feed 0.2, 0.5, 0.1 -> it chooses the same again, so this is the greedy answer

    A choice is final if all tokens before it are. So each pass makes at least one more final, and
    the loop ends. `fixed_texts` are the token ids of the text before each number, `value_ids`
    (11, L) those of VALUES. Returns distributions (B, C, 11) and greedy choices (B, C)."""
    # The tokens of the block, with 0.0 as the first guess of each number.
    block, starts = [], []
    for fixed_ids in fixed_texts:
        starts.append(len(block) + len(fixed_ids))
        block += [*fixed_ids, *value_ids[0].tolist()]
    places = torch.tensor(starts)[:, None] + torch.arange(value_ids.shape[1])  # (C, L)
    tokens = value_ids.new_tensor([block] * len(state.mask))  # (B, n)

    hidden = state.feed(tokens)  # (B, n, D)
    while True:
        predicting = hidden[:, places - 1]  # (B, C, L, D): position t - 1 predicts token t
        probabilities, choice = read_numbers(state.model.lm_head.weight, predicting, value_ids)
        fed = tokens.clone()
        tokens[:, places] = value_ids[choice]  # (B, C, L)
        if torch.equal(tokens, fed):
            return probabilities, choice

        # Remove (crop < 0) all from the first token that changed in any answer, and feed it again.
        start = (tokens != fed).any(dim=0).tolist().index(True)
        state.cache.crop(start - len(block))
        state.mask = state.mask[:, :start - len(block)]
        hidden[:, start:] = state.feed(tokens[:, start:])

def read_numbers(weight: Tensor, hidden: Tensor, value_ids: Tensor) -> tuple:
    """Returns distributions (B, C, 11) and greedy choices (B, C), given lm_head's matrix and the
    hidden states (B, C, L, D) that predict the tokens of each number."""
    last = hidden[:, :, -1]  # (B, C, D), predicts the last token of each number
    if value_ids.shape[1] == 1:  # the tiny model has one token per number
        scores = (last @ weight[value_ids[:, 0]].T).float()  # (B, C, 11)
        return scores.softmax(dim=-1), scores.argmax(dim=-1)

    # Others split digits: "0" or "1", then ".", then the tenths. After "1." only "0" is allowed.
    units = (hidden[:, :, 0] @ weight[value_ids[[0, 10], 0]].T).float()  # (B, C, 2)
    tenths = (last @ weight[value_ids[:10, -1]].T).float()  # (B, C, 10)
    is_one = units.argmax(dim=-1) == 1  # (B, C)
    choice = torch.where(is_one, 10, tenths.argmax(dim=-1))

    # The tenths after "0." are unknown where "1" is chosen, since "1" was fed. For those, the
    # probability of "0" goes to 0.9: if "0" has 0.3 and "1" has 0.7, 0.9 gets 0.3 and 1.0 gets 0.7.
    tenths[is_one, 9] = 1e9  # leaves a probability of 0 to all others
    zero, one = units.softmax(dim=-1).split(1, dim=-1)  # (B, C, 1) each
    return torch.cat([zero * tenths.softmax(dim=-1), one], dim=-1), choice

@torch.inference_mode()
def decode_answers(predictor: Namespace, inputs: dict) -> tuple:
    """Decodes a batch. Returns distributions (B, C, 11), greedy choices (B, C) and descriptions."""
    tokenizer, state = predictor.tokenizer, State(predictor.model, inputs)
    descriptions = [{} for _ in state.mask]
    value_ids = state.mask.new_tensor(tokenizer(VALUES)["input_ids"])  # (11, L)
    # For a checkpoint trained elsewhere, only the form of the numbers is known.
    skeleton = answer_skeleton(predictor.supervision or "numeric")
    before_numbers = [tokenizer.encode(text) for text, slot in skeleton if slot in ARKIT_NAMES]

    # Such a checkpoint writes its words as one text, up to the first token of the JSON object.
    if predictor.supervision is None:
        brace = tokenizer.decode(before_numbers[0][:1])  # {"
        descriptions = list(map(read_headings, decode_text(state, tokenizer, brace, WORDS_TOKENS)))

    # A model trained by distill.py writes four fields and a block of numbers, in either order.
    for text, slot in skeleton:
        if slot in FIELDS:
            state.feed(state.mask.new_tensor([tokenizer.encode(text)] * len(descriptions)))
            texts = decode_text(state, tokenizer, "\n", FIELD_TOKENS)
            for description, words in zip(descriptions, texts):
                description[slot] = words
        elif slot == ARKIT_NAMES[0]:  # all 52 are decoded here, and the others skipped
            probabilities, choice = decode_numbers(state, before_numbers, value_ids)
    return probabilities, choice, descriptions

def read_headings(text: str) -> dict | None:
    """Reads the four fields from a text with four numbered headings, such as "1. **Category**: joy"
    or "**1. Category**" with the text below. Returns None if one is missing."""
    text = re.sub(r"\*\*|```\w*", "", text)
    heading = r"(?m)^\W*[1-4][.)][^:\n]*[:\n]"  # \W* matches, for example, "### "
    bodies = [" ".join(body.split()) for body in re.split(heading, text)[1:]]
    return dict(zip(FIELDS, bodies)) if len(bodies) == len(FIELDS) else None

# ---- Loading a checkpoint ------------------------------------------------------------------------
def read_prompt(path: Path) -> tuple:
    """Reads (system, prompt) from a text file, or from the first record of a .jsonl."""
    text = path.read_text(encoding="utf-8-sig").lstrip()
    system, _, prompt = map(str.strip, text.rpartition("\n---\n"))
    try:
        if text.startswith(("{", "[")):  # an array has no "messages", so it fails
            turns = {turn["role"]: turn["content"]
                     for turn in json.loads(text.split("\n")[0])["messages"]}
            system, prompt = turns.get("system"), turns["user"].removeprefix("<image>")
        if not prompt or "<image>" in prompt:
            raise ValueError("the prompt is empty or contains <image> other than at its start")
    except Exception as error:  # JSON of another form raises many types
        raise ValueError(f"--prompt {path}: {error!s:.100}; expected a text file, or a .jsonl with "
                         '{"messages": [{"role": "user", "content": "<image>Describe ..."}]}')
    return system, prompt

# distill.py has copies of load_base (with fewer KINDS), open_image and prompt_text.
def load_base(source: str, dtype: torch.dtype) -> tuple:
    """Loads (model, tokenizer, image processor) of a Qwen-VL from a folder or the hub. Raises
    ValueError if the files cannot be used."""
    try:
        kind = AutoConfig.from_pretrained(source).model_type
        if kind not in KINDS:
            raise ValueError(f"its type is {kind}; expected {' or '.join(KINDS)}")
        model, found = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(f"it lacks weights such as {min(found['missing_keys'])}")
        # AutoProcessor would require torchvision for video. These two do everything needed here.
        tokenizer = AutoTokenizer.from_pretrained(source)
        return model, tokenizer, Qwen2VLImageProcessorPil.from_pretrained(source)
    except Exception as error:  # damaged files raise many types
        raise ValueError(f"the model in {source} cannot be used: {error!s:.250}")

def load(model_dir: str, device: str = "cpu", dtype: str | None = None,
         prompt_file: str | None = None, base: str | None = None) -> Namespace:
    """Loads what predict() takes: a run of distill.py or, with `prompt_file`, any Qwen-VL or an
    adapter for one. `base` replaces the base model that an adapter names. Raises ValueError if the
    checkpoint is unfinished, damaged, or of an unsupported kind."""
    # The settings of the run. `supervision` is None for a checkpoint that was trained elsewhere.
    folder = Path(model_dir)
    predictor = Namespace(supervision=None, max_pixels=MAX_PIXELS, system=None)
    if (folder / "run.json").is_file():
        vars(predictor).update(json.loads((folder / "run.json").read_bytes()))
        if "answer" not in predictor:  # of an earlier version, which wrote words as JSON
            raise ValueError(f"{folder} was trained with another answer form; train again")
    elif not prompt_file:
        raise ValueError(f"{folder} holds no run of distill.py, and any other model needs --prompt")
    if prompt_file:
        predictor.system, predictor.prompt = read_prompt(Path(prompt_file))

    dtype = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    is_adapter = (folder / "adapter_config.json").is_file()
    parts = load_adapter(folder, base, dtype) if is_adapter else load_base(model_dir, dtype)
    predictor.model, predictor.tokenizer, predictor.image_processor = parts
    predictor.model.to(device)
    return predictor

# The settings of a plain LoRA. Others change the formula below or, like pissa, the base weights.
MUST_BE_UNSET = """bias use_dora use_rslora use_qalora alpha_pattern rank_pattern lora_bias
    modules_to_save alora_invocation_tokens trainable_token_indices target_parameters
    layer_replication fan_in_fan_out""".split()
PLAIN_LORA = {"peft_type": ["LORA"], **dict.fromkeys(MUST_BE_UNSET, [None, False, {}, [], "none"]),
              "init_lora_weights": [None, True, False, "gaussian", "eva", "orthogonal"]}

@torch.no_grad()
def load_adapter(folder: Path, base: str | None, dtype: torch.dtype) -> tuple:
    """Loads the base model of a PEFT adapter and adds alpha / r B A to its weights (LoRA, arXiv
    2106.09685, Eq. 3). Raises ValueError unless the adapter is plain LoRA and every tensor fits,
    since anything else would silently give wrong results."""
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        for name, plain in PLAIN_LORA.items():
            if config.get(name) not in plain:
                raise ValueError(f"{name} = {config.get(name)}")

        model, *processors = load_base(base or config["base_model_name_or_path"], dtype)
        tensors = load_file(folder / "adapter_model.safetensors")
        if not tensors:
            raise ValueError("it holds no tensor")
        for stem in {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in tensors}:
            low = tensors[f"{stem}.lora_A.weight"].float()  # (r, in)
            high = tensors[f"{stem}.lora_B.weight"].float()  # (out, r)
            weight = model.get_parameter(f"{stem}.weight".removeprefix("base_model.model."))
            update = config["lora_alpha"] / config["r"] * high @ low  # (out, in)
            fits = [len(low), *update.shape] == [config["r"], *weight.shape]
            # lm_head may share its weight with embed_tokens. A one-byte weight is too coarse.
            may_be_tied = re.search("embed_tokens|lm_head", stem)
            if not fits or may_be_tied or weight.element_size() < 2:
                raise ValueError(f"{stem} fits no weight that may be changed")
            weight += update  # computed in float32
    except Exception as error:  # damaged files raise many types
        raise ValueError(f"adapter {folder} (--base sets its base model): {error!s:.200}; if it is "
                         "not plain LoRA, merge it with peft and give the merged model as --model")
    return model, *processors

# ---- Pictures -> predictions ---------------------------------------------------------------------
def open_image(path: str) -> Image.Image:
    """Opens a picture upright and in RGB: 16-bit grey is scaled, transparency becomes white."""
    image = ImageOps.exif_transpose(Image.open(path, formats=IMAGE_FORMATS))
    if image.mode.startswith("I"):  # 16-bit grey, which convert() alone would clip at 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")

def prompt_text(prompt: str, image_tokens: int) -> str:
    """Returns the chat up to the answer, with the image's placeholder tokens written out."""
    image = "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
    return f"<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n"

def prepare(predictor: Namespace, pixels: list) -> dict:
    """Builds model inputs for B pictures. Prompts (B, T) are padded on the left."""
    grid = torch.cat([one.image_grid_thw for one in pixels])  # (B, 3)
    counts = grid.prod(dim=1) // predictor.image_processor.merge_size ** 2  # (B,) image tokens
    system = f"<|im_start|>system\n{predictor.system}<|im_end|>\n" if predictor.system else ""
    texts = [system + prompt_text(predictor.prompt, count) for count in counts.tolist()]
    inputs = predictor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt",
                                 return_token_type_ids=False)
    # Without mm_token_type_ids, image tokens would silently get the positions of text.
    is_image = inputs.input_ids == predictor.model.config.image_token_id
    inputs.update(mm_token_type_ids=is_image.long(), image_grid_thw=grid,
                  pixel_values=torch.cat([one.pixel_values for one in pixels]))  # (patches, .)
    return dict(inputs.to(predictor.model.device))

def predict(predictor: Namespace, images: list, estimate: str = "mean") -> list[dict]:
    """Returns the prediction records of one batch of images, in order. Images are paths or upright
    PIL pictures. An unusable picture gets a record with "error" and null coefficients."""
    processor = predictor.image_processor
    # Both limits are areas in pixels. The smallest picture is one token.
    size = {"shortest_edge": (processor.patch_size * processor.merge_size) ** 2,
            "longest_edge": predictor.max_pixels}
    records, usable, pixels = [], [], []
    for source in images:
        record = dict.fromkeys(["image", "coefficients", "std", "description", "error"])
        records.append(record)
        try:
            if not isinstance(source, Image.Image):
                record["image"] = str(source)
                source = open_image(source)
            pixels.append(processor([source], size=size, return_tensors="pt"))
            usable.append(record)
        except Exception as error:  # Pillow raises many types on damaged files
            record["error"] = repr(error)
    if not usable:
        return records

    # Mean and standard deviation of each distribution.
    probabilities, choice, descriptions = decode_answers(predictor, prepare(predictor, pixels))
    values = torch.arange(11, dtype=torch.float64, device=choice.device) / 10  # (11,)
    mean = probabilities.double() @ values  # (B, C)
    std = (probabilities.double() @ values ** 2 - mean ** 2).clamp(min=0).sqrt()
    estimates = mean if estimate == "mean" else values[choice]

    for record, numbers, stds, words in zip(usable, estimates.round(decimals=4).tolist(),
                                            std.round(decimals=4).tolist(), descriptions):
        record.update(coefficients=dict(zip(ARKIT_NAMES, numbers)),
                      std=dict(zip(ARKIT_NAMES, stds)), description=words or None)
    return records

# ---- Files and charts ----------------------------------------------------------------------------
def list_pictures(folder: Path) -> list[Path]:
    """Lists a folder's pictures in natural order (frame2 before frame10), without hidden files."""
    pictures = [path for path in sorted(folder.glob("[!.]*")) if path.suffix.lower() in PICTURES]
    return sorted(pictures, key=lambda path: re.sub(
        r"\d+", lambda digits: digits[0].zfill(20), path.name.lower()))

def list_images(inputs: list) -> list[Path]:
    """Lists the pictures of all inputs, each once. Raises ValueError if none of them exists."""
    images = []
    for path in map(Path, inputs):
        if path.is_dir():
            images += list_pictures(path)
        elif path.suffix != ".jsonl":
            images.append(path)
        else:
            for number, line in enumerate(path.read_text("utf-8-sig", "replace").split("\n"), 1):
                try:
                    if line.strip():
                        images.append(path.parent / json.loads(line)["image"])
                except Exception as error:
                    raise ValueError(f"{path}, line {number}: {error}; expected an image record")
    if not any(map(Path.is_file, images)):
        raise ValueError(f"no pictures in {inputs!s:.200}; expected pictures, folders or .jsonl")
    return list(dict.fromkeys(map(Path.resolve, images)))

def complete_lines(path: Path) -> list[bytes]:
    """Creates a file if it is missing, cuts off an incomplete last line, and returns the others."""
    path.touch()
    text = path.read_bytes()
    complete = text[:text.rfind(b"\n") + 1]
    os.truncate(path, len(complete))
    return complete.splitlines()

def predict_all(predictor: Namespace, images: list, args: Namespace) -> list:
    """Predicts pictures, writes the records to --out and returns them. Under torchrun each process
    predicts a share, and only the first one writes --out and returns records."""
    # Each process appends to its own part. A checksum of settings and pictures is in its name, so
    # that only the same command continues it.
    rank, world_size = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
    settings = [args.model, args.base, args.prompt, args.estimate, world_size, images]
    checksum = zlib.crc32(repr(settings).encode())
    out = Path(args.out)
    parts = [Path(f"{out}.{checksum:08x}.{k}") for k in range(world_size)]
    share = np.array_split(images, world_size)[rank]
    done = len(complete_lines(parts[rank])) if args.resume else 0

    # A picture is named by its path relative to the folder of --out, which is only right without
    # symlinks. list_images() has resolved them.
    folder = out.parent.resolve()
    with parts[rank].open("a" if done else "w") as file:
        for start in tqdm(range(done, len(share), args.batch_size), disable=rank > 0):
            for record in predict(predictor, share[start:start + args.batch_size], args.estimate):
                record["image"] = os.path.relpath(record["image"], folder).replace(os.sep, "/")
                print(json.dumps(record), file=file, flush=True)

    # The first process waits for the others and joins the parts.
    if world_size > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # only to wait
        torch.distributed.barrier()
    if rank:
        return []
    text = b"".join(map(Path.read_bytes, parts))
    out.write_bytes(text)
    for part in parts:
        part.unlink()
    return list(map(json.loads, text.splitlines()))

def write_livelink(path: Path, records: list, fps: int) -> None:
    """Writes a Live Link Face take: 61 values per row, and no row for an unusable picture. The
    timecode HH:MM:SS:FF.mmm counts sixtieths of a second in FF, whatever `fps` is."""
    with path.open("w") as file:
        print(*COLUMNS, sep=",", file=file)
        for k, record in enumerate(records):
            if record["error"]:
                continue
            # A tick is a thousandth of a sixtieth, so a second has 60,000.
            seconds, ticks = divmod(round(60_000 * k / fps), 60_000)
            clock = str(timedelta(seconds=seconds)).zfill(8)  # 00:00:00
            clock += ":{:02d}.{:03d}".format(*divmod(ticks, 1000))
            values = [*record["coefficients"].values(), *[0] * 9]
            print(clock, 61, *map("{:.10f}".format, values), sep=",", file=file)

def draw_chart(picture: Image.Image, record: dict) -> Image.Image:
    """Draws photo, description, and bars with standard deviations of the 24 strongest actions."""
    chart = Image.new("RGB", (1200, 1080), "white")
    draw = ImageDraw.Draw(chart)
    draw.font = ImageFont.load_default(16)

    # Left: the photo, with the words below it.
    chart.paste(ImageOps.contain(picture, (500, 360)), (40, 40))
    words = (record["description"] or {}).values()
    draw.text((40, 420), "\n\n".join(textwrap.fill(text, 62) for text in words), "black")

    # Right: the bars, 240 pixels long for 1.
    coefficients = record["coefficients"]
    strongest = sorted(coefficients, key=coefficients.get, reverse=True)
    for y, name in zip(range(60, 1044, 41), strongest):
        end, std = 880 + 240 * coefficients[name], 240 * record["std"][name]
        draw.text((580, y), f"{coefficients[name]:.2f}  {name}", "black", anchor="lm")
        draw.line([880, y, end, y], "#0072b2", 17)
        draw.line([end - std, y, end + std, y], "black", 2)
    return chart

# ---- Main ----------------------------------------------------------------------------------------
def main(args: Namespace) -> None:
    """Predicts, and writes records, take and charts."""
    out = Path(args.out)
    if out.is_dir() or out.resolve() in [Path(path).resolve() for path in args.inputs]:
        raise ValueError(f"--out {out} is a folder, or an INPUT, which would be overwritten")
    images = list_images(args.inputs)
    for folder in (out.parent, args.plot or out.parent, Path(args.csv or out).parent):
        os.makedirs(folder, exist_ok=True)
    predictor = load(args.model, args.device, args.dtype, args.prompt, args.base)
    records = predict_all(predictor, images, args)
    if not records:
        return  # only the first process reports

    if args.csv:
        write_livelink(Path(args.csv), records, args.fps)
    for index, (image, record) in enumerate(zip(images, records)):
        if args.plot and not record["error"]:
            chart = draw_chart(open_image(image), record)
            chart.save(f"{args.plot}/{index:06d}_{image.stem}.png")
    failed = [record for record in records if record["error"]]
    print("wrote", out, "with", len(records), "records,", len(failed), "of them failures")
    print("next, if you have the truth: python evaluate.py", out, "[TRUTH; default: the demo's]")

if __name__ == "__main__":
    try:
        main(parse_args())
    except (OSError, ValueError) as error:
        sys.exit(str(error).partition("\n")[0][:400])
    except KeyboardInterrupt:
        sys.exit("interrupted; finished predictions are kept, add --resume to continue")
