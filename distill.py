# SPDX-License-Identifier: MIT
"""Stage II of SemanticFace, semantic distillation (arXiv 2603.14827, Sec. 3.2): image -> words and numbers.

Fine-tunes a Qwen-VL model to look at a face and write what the muscles do, then the 52 ARKit coefficients:
    {"analysis": {"expression_category": "slight happiness", ...}, "arkit": {"eyeBlinkLeft": 0.1, ...}}

Reads:  annotated records (.jsonl) of annotate.py (the demo is drawn first if it is not there)
Writes: a folder that transformers loads as it stands (config.json, model.safetensors, tokenizer), or with
        LoRA a PEFT adapter (adapter_config.json, adapter_model.safetensors). Beside it run.json (settings,
        prompt, versions), log.jsonl (losses) and, until it ends, state.pt (for --resume)

    python distill.py                                       # the demo: a tiny Qwen3-VL from scratch
    python distill.py --model Qwen/Qwen3-VL-4B-Instruct --data train.jsonl --out runs/mine
    torchrun --nproc-per-node 8 distill.py ...              # the same on eight GPUs

Shapes: B images, T tokens, P image patches, D width, V vocabulary, N supervised tokens, C = 52 coefficients.
"""
import argparse
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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
PROMPT = "Describe the facial muscle movements, then give the 52 ARKit blendshape coefficients as JSON."
ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl"]
IGNORE_INDEX = -100
SKELETON, TEXT, NUMBER = 0, 1, 2  # kinds of tokens

# DIFFERS FROM PAPER: braces, names and quotes weigh less than what the picture decides.
SKELETON_WEIGHT = 0.2
# DIFFERS FROM PAPER: how --grounding teaches a small model to look (see hide_words, doubt_words and
# choose_supervision).
HIDDEN = {TEXT: (0.3, 0.1), NUMBER: (1.0, 0.1)}  # share of tokens hidden at the first and at the last step
GUESSED = {TEXT: 0.5, NUMBER: 0.5}  # share of answers with guessed words, share of numbers guessed
NUMERIC_SHARE = 0.8  # of the steps, until which answers without description are mixed in
ALIGNMENT_WEIGHT = 10.0  # of the regression loss beside the language loss

# Flags that are not given take the values for the tiny model or those for a pretrained one.
TINY = {"steps": 1200, "tower_steps": 1600, "lr": 1e-3, "grounding": True, "max_pixels": 64 * 64,
        "lora_rank": 0}
PRETRAINED = {"steps": 2000, "tower_steps": 0, "lr": 1e-4, "grounding": False, "max_pixels": 512 * 512,
              "lora_rank": 16}
TOWER_BATCH = 2  # the tower's steps are short: twice the images at a time
WARMUP_STEPS = 30
VAL_RECORDS = 128  # for the validation loss, which only watches over the run: evaluate.py measures
VAL_SHARE = 0.05  # of the records, held out where no validation file is given
WORKERS = 2  # processes that prepare pictures and tokens
LOSS_LOGITS = 2**27  # logits that exist at a time, 0.5 GB: at 151,936 a token, all of them would fill a GPU
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12,
              "4090": 165e12, "3090": 71e12}  # dense bfloat16 per second, of the makers' data sheets


def parse_args(argv=None) -> argparse.Namespace:
    """Reads the command line, or `argv`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument

    def by_model(name: str) -> str:
        return f"(default: {TINY[name]} for tiny, {PRETRAINED[name]} for a pretrained model)"

    add("--data", default="data/demo/train.jsonl", help="annotated records (default %(default)s)")
    add("--val", help="records for the validation loss (default: val.jsonl beside --data, else some of its "
        "identities are held out)")
    add("--model", default="tiny",
        help="tiny, or a Qwen3-VL or Qwen2.5-VL as hub id or folder (default %(default)s)")
    add("--out", default="runs/demo", help="run folder (default %(default)s)")
    add("--supervision", choices=list(PARTS), default="semantic",
        help="description then numbers, numbers only, or the description last (default %(default)s)")
    add("--steps", type=int, help="optimizer steps of distillation; 0 stops after the tower, which then "
        f"regresses the coefficients {by_model('steps')}")
    add("--epochs", type=float, help="passes over the records, instead of --steps")
    add("--tower-steps", type=int,
        help=f"steps before, in which the vision tower learns to regress {by_model('tower_steps')}")
    add("--batch-size", type=int, default=8, help="images per forward pass and GPU (default %(default)s)")
    add("--grad-accum", type=int, default=1, help="forward passes per optimizer step (default %(default)s)")
    add("--lr", type=float, help=f"peak learning rate {by_model('lr')}")
    add("--lora-rank", type=int, help=f"of the low-rank updates; 0: all weights {by_model('lora_rank')}")
    add("--lora-alpha", type=float, default=32.0, help="the updates weigh alpha / rank (default %(default)s)")
    add("--lora-dropout", type=float, default=0.05, help="on the updates' input (default %(default)s)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="with LoRA, keep little for the backward pass: less memory, slower (default %(default)s)")
    add("--grounding", action=argparse.BooleanOptionalAction,
        help=f"hide words, phase the description in: teaches to look {by_model('grounding')}")
    add("--max-pixels", type=int, help=f"pixels that an image is scaled to {by_model('max_pixels')}")
    add("--save-every", type=int, default=500,
        help="steps between saves and validation losses (default %(default)s)")
    add("--resume", action=argparse.BooleanOptionalAction, default=False,
        help="go on with the unfinished run in --out")
    add("--limit", type=int, help="use the first LIMIT records only")
    add("--seed", type=int, default=0, help="of weights, order and hidden words (default %(default)s)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the arithmetic and of frozen weights; auto is bfloat16 on a GPU (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------
# Data: records -> token ids with supervision
# ---------------------------------------------------------------------------------------------------

def read_records(path: Path, supervision: str, limit: int | None) -> list[dict]:
    """Reads annotated records. Raises SystemExit, naming the line, at the first that cannot be used."""
    if not path.is_file() or path.stat().st_size == 0:
        state = "is empty" if path.is_file() else "does not exist"
        raise SystemExit(f"{path} {state}; make it with: python annotate.py LABELS --out {path}")
    records, lines = [], path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    for number, line in enumerate(lines[:limit], 1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{where}: not JSON ({error}); expected a record; delete the line if cut off")
        if not isinstance(record, dict) or not isinstance(record.get("coefficients"), dict):
            raise SystemExit(f"{where}: no coefficients; expected records of python annotate.py")
        coefficients, image = record["coefficients"], record.get("image")
        unusable = [name for name in ARKIT_NAMES if not is_coefficient(coefficients.get(name))]
        if unusable or len(coefficients) != len(ARKIT_NAMES):
            given = {name: coefficients.get(name) for name in unusable[:3]} or "unknown names"
            raise SystemExit(f"{where}: {given}; expected the 52 ARKit names, each a number from 0 to 1")
        if not isinstance(image, str) or not (path.parent / image).is_file():
            raise SystemExit(f"{where}: image {image!r} is no file; training needs a picture a record")
        description = record.get("description") or {}
        described = all(isinstance(description.get(field), str) for field in FIELDS)
        if "analysis" in PARTS[supervision] and not described:
            fix = f"run python annotate.py {path}, or use --supervision numeric"
            raise SystemExit(f"{where}: no complete description; {fix}")
        records.append({**record, "image": str(path.parent / image)})
    return records


def hold_out(records: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """Splits records into (training, validation): whole identities where there are five, else the last."""
    wanted = round(VAL_SHARE * len(records))
    identities = sorted({str(record.get("identity")) for record in records})
    if len(identities) < 5:  # frames of one recording are alike: those nearest in time stay together
        return records[:len(records) - wanted], records[len(records) - wanted:]
    random.Random(seed).shuffle(identities)
    held_out, count = set(), Counter(str(record.get("identity")) for record in records)
    while wanted and sum(count[identity] for identity in held_out) < wanted:
        held_out.add(identities.pop())
    parts = [], []
    for record in records:
        parts[str(record.get("identity")) in held_out].append(record)
    return parts


def is_coefficient(value) -> bool:
    """Whether `value` is a number from 0 to 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def open_image(path: str) -> Image.Image:
    """Opens a picture upright and in RGB: 16-bit grey is scaled down, what is transparent becomes white."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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


class FaceDataset(Dataset):
    """(index, supervision) -> pixel_values (P, .), image_grid_thw (1, 3), input_ids, labels, weights, kinds.

    The labels are IGNORE_INDEX on the prompt: exactly the answer and its end token are supervised. Pieces of
    the answer are tokenised one by one, with the boundaries of decoding, where the skeleton is fed.
    """

    def __init__(self, records: list[dict], tokenizer, image_processor, args: argparse.Namespace):
        self.records, self.tokenizer, self.image_processor = records, tokenizer, image_processor
        self.size = {"shortest_edge": args.max_pixels, "longest_edge": args.max_pixels}
        self.skeletons = {kind: [(self.encode(text), slot) for text, slot in answer_skeleton(kind)]
                          for kind in PARTS}
        self.values = {value: self.encode(value) for value in VALUES}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_answer(self, record: dict, supervision: str) -> tuple[list[int], list[float], list[int]]:
        """Token ids of the answer with its end token, their loss weights and their kinds."""
        ids, weights, kinds = [], [], []
        previous = None
        for skeleton_ids, slot in self.skeletons[supervision]:
            # The token that closes a text is undecided too: the model says when the text ends.
            weights.append(1.0 if previous in FIELDS else SKELETON_WEIGHT)
            weights += [SKELETON_WEIGHT] * (len(skeleton_ids) - 1)
            if slot in FIELDS:
                slot_ids = self.encode(json.dumps(record["description"][slot], ensure_ascii=False)[1:-1])
            else:
                slot_ids = self.values[f"{record['coefficients'][slot]:.1f}"] if slot else []
            weights += [1.0] * len(slot_ids)
            kinds += [SKELETON] * len(skeleton_ids) + [TEXT if slot in FIELDS else NUMBER] * len(slot_ids)
            ids += skeleton_ids + slot_ids
            previous = slot
        return ids + [self.tokenizer.eos_token_id], weights + [SKELETON_WEIGHT], kinds + [SKELETON]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, str]) -> dict:
        index, supervision = key
        record = self.records[index]
        pixels = self.image_processor([open_image(record["image"])], size=self.size, return_tensors="pt")
        image_tokens = int(pixels["image_grid_thw"].prod()) // self.image_processor.merge_size ** 2
        prompt_ids = self.encode(prompt_text(PROMPT, image_tokens))
        answer_ids, weights, kinds = self.encode_answer(record, supervision)
        return {
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
            "input_ids": torch.tensor(prompt_ids + answer_ids),
            "labels": torch.tensor([IGNORE_INDEX] * len(prompt_ids) + answer_ids),
            "weights": torch.tensor([0.0] * len(prompt_ids) + weights),
            "kinds": torch.tensor([SKELETON] * len(prompt_ids) + kinds),
            "coefficients": torch.tensor([[record["coefficients"][name] for name in ARKIT_NAMES]]),
        }

    def collate(self, items: list[dict]) -> dict:
        """Joins items: token tensors are padded on the right to (B, T); patches follow one another (P, .)."""
        joined = ("pixel_values", "image_grid_thw", "coefficients")
        batch = {name: torch.cat([item[name] for item in items]) for name in joined}
        pad_id = self.tokenizer.pad_token_id
        padding = {"input_ids": pad_id, "labels": IGNORE_INDEX, "weights": 0.0, "kinds": SKELETON}
        for name, value in padding.items():
            rows = [item[name] for item in items]
            batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        image_pad_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        batch["mm_token_type_ids"] = (batch["input_ids"] == image_pad_id).long()
        return batch


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int) -> list[int]:
    """A permutation of the records that the seed alone decides."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def step_keys(records: list[dict], args: argparse.Namespace, step: int) -> list[list[tuple[int, str]]]:
    """This process's batches of one optimizer step, as (record index, supervision): a function of the step.

    The records of a step depend on its total size alone. Sorted by length, they are dealt out so that each
    batch, and at any time all processes, have answers of similar length.
    """
    in_tower = step < args.tower_steps
    size = args.batch_size * (TOWER_BATCH if in_tower else 1)
    accumulated = 1 if in_tower else args.grad_accum
    place, seed = (step, args.seed) if in_tower else (step - args.tower_steps, args.seed + 1)
    total = size * accumulated * args.world_size
    epoch, place_in_epoch = divmod(place, max(1, len(records) // total))
    first = place_in_epoch * total
    indices = epoch_order(len(records), seed * 100_003 + epoch)[first:first + total]
    indices = (indices * total)[:total]  # few records fill the step again and again
    lots = random.Random(f"{args.seed} {step}")
    keys = [(index, "numeric" if in_tower else choose_supervision(args, place, lots)) for index in indices]
    if len(keys) > size:
        keys.sort(key=lambda key: (key[1], len(str(records[key[0]].get("description")))))
    batches = [keys[first:first + size] for first in range(0, total, size)]
    return batches[args.rank::args.world_size]


def choose_supervision(args: argparse.Namespace, step: int, lots: random.Random) -> str:
    """With --grounding the description phases in: at first all answers are numbers only, later none is.

    A coefficient's name says where to look, a sentence does not: numbers teach the decoder to look sooner.
    """
    numeric = args.grounding and lots.random() > step / args.steps / NUMERIC_SHARE
    return "numeric" if numeric else args.supervision


def step_batches(dataset: FaceDataset, args: argparse.Namespace, start: int):
    """Yields the batches of each optimizer step from `start` on, the tower's before the language model's."""
    stop = args.tower_steps + args.steps
    keys = (batch for step in range(start, stop) for batch in step_keys(dataset.records, args, step))
    loader = DataLoader(dataset, batch_sampler=list(keys), collate_fn=dataset.collate, num_workers=WORKERS)
    batches = iter(loader)
    for step in range(start, stop):
        yield list(itertools.islice(batches, 1 if step < args.tower_steps else args.grad_accum))


# ---------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------

def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for `texts` with Qwen-VL's special tokens: any text encodes, in few tokens.

    One token each: frequent words, phrases with the punctuation mark before them (superwords, arXiv
    2503.13423), the pieces of the answer's skeleton and the eleven values. Answers this short make training
    on a CPU possible.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary += [word for word, _ in words.most_common(2000) if len(word) > 1]
    ids = {word: index for index, word in enumerate(vocabulary)}
    bpe = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    bpe.pre_tokenizer = split
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>",
                                        pad_token="<|endoftext|>", additional_special_tokens=special)
    phrases = Counter(phrase for text in texts for phrase in re.findall(r"[,.]?[^,.:]+:?", text))
    pieces = [phrase for phrase, count in phrases.most_common(1000) if count >= 20]
    pieces += [PROMPT, "user\n", "assistant\n"] + VALUES
    pieces += [text for kind in PARTS for text, _ in answer_skeleton(kind)]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in dict.fromkeys(pieces)])
    return tokenizer


def build_tiny(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """Qwen3-VL at a million parameters: D = 96, three layers each, 64 patches, 16 image tokens."""
    places = {"image": "image_pad", "video": "video_pad",
              "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
           for name, token in places.items()}
    # Weights start at about 1 / sqrt(D); the library's 0.02 suits widths of thousands and learns slowly here.
    text = {"vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24, "initializer_range": 0.08,
            "tie_word_embeddings": True, "max_position_embeddings": 4096, "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 4, 4]}}
    vision = {"depth": 3, "hidden_size": 96, "intermediate_size": 288, "num_heads": 4, "patch_size": 8,
              "initializer_range": 0.04, "out_hidden_size": 96, "num_position_embeddings": 64,
              "deepstack_visual_indexes": [1]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    return Qwen3VLForConditionalGeneration(config)


def whiten_patches(model: nn.Module, pixel_values: torch.Tensor) -> None:
    """Starts the patch embedding as the whitening of real patches (P, .), positions as strong as content.

    Neighbouring pixels are nearly equal, so that the fine differences that tell expressions apart are a tiny
    part of the variance. On smooth, photo-like faces the tower learns nothing for minutes without this start
    (whitening as in airbench, arXiv 2404.00498).
    """
    tower = model.model.visual
    mean = pixel_values.mean(dim=0)
    centred = pixel_values - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    width = tower.patch_embed.embed_dim
    whitening = (directions[:, -width:] / (variances[-width:] + 1e-3).sqrt()).T  # (D, .)
    with torch.no_grad():
        tower.patch_embed.proj.weight.copy_(whitening.view_as(tower.patch_embed.proj.weight))
        tower.patch_embed.proj.bias.copy_(-whitening @ mean)
        tower.pos_embed.weight.mul_(12)


def load_model(args: argparse.Namespace, records: list[dict]) -> tuple:
    """Returns (model, tokenizer, image processor): tiny, or a pretrained one."""
    if args.model == "tiny":
        descriptions = [record.get("description") or {} for record in records]
        tokenizer = build_tokenizer([text for description in descriptions for text in description.values()])
        to_unit = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # pixels from -1 to 1
        image_processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, **to_unit)
        return build_tiny(tokenizer), tokenizer, image_processor
    try:
        kind = AutoConfig.from_pretrained(args.model).model_type
        if kind not in ARCHITECTURES:
            raise SystemExit(f"--model {args.model} is a {kind}; expected tiny, {' or '.join(ARCHITECTURES)}")
        # AutoProcessor would need torchvision for its video half; these two do all that is needed.
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(args.model)
        frozen = args.lora_rank and args.dtype == "bfloat16"
        dtype = torch.bfloat16 if frozen else torch.float32
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        expected = "expected tiny, a folder, or a hub id such as Qwen/Qwen3-VL-4B-Instruct"
        raise SystemExit(f"--model {args.model} cannot be loaded ({reason}); {expected}")
    return model, tokenizer, image_processor


class LoraLinear(nn.Module):
    """y = W x + alpha / r B A dropout(x) (LoRA, arXiv 2106.09685, Eq. 3): W is frozen, B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, dropout
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (B, T, out)
        x = F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype)
        low = F.linear(x, self.lora_A)  # (B, T, r)
        return y + self.scale * F.linear(low, self.lora_B).to(y.dtype)


def add_lora(model: nn.Module, args: argparse.Namespace) -> None:
    """Freezes the model and puts a LoraLinear in the place of every linear of its language model."""
    model.requires_grad_(False)
    for parent in list(model.model.language_model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                setattr(parent, name, LoraLinear(module, args.lora_rank, args.lora_alpha, args.lora_dropout))
    if not args.checkpointing:
        return
    # Only what enters a layer is kept for the backward pass. The other, re-entrant form of checkpointing
    # would find no input that requires a gradient and train nothing.
    renamed = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.18
    enable = renamed or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


class RegressionHead(nn.Module):
    """Reads the coefficients off the image tokens, as inner products with the embeddings of their names.

    It stands in for the pretraining that the tiny model lacks. The tie to the embeddings aligns picture and
    words: the decoder then finds a coefficient by matching its name against the image. With weights of its
    own the regression is as good, but the decoder still ignored the picture after 6,000 faces.

    If it `attends`, each name learns which image tokens count for it. That is the better regression, and the
    worse start for a decoder (RMSE 0.109 instead of 0.093), which has to find them anew.
    """

    def __init__(self, name_ids: list[int], width: int, attends: bool):
        super().__init__()
        self.register_buffer("name_ids", torch.tensor(name_ids))  # (C,)
        self.look = nn.Parameter(torch.zeros(width, width), requires_grad=attends)  # zeros: all count alike
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.zeros(len(name_ids)))

    def forward(self, model: nn.Module, batch: dict, tokens: torch.Tensor) -> torch.Tensor:
        """Image tokens of the whole batch, one image after another (., D) -> coefficients (B, C)."""
        counts = batch["image_grid_thw"].prod(dim=1) // model.model.visual.spatial_merge_size ** 2  # (B,)
        names = model.get_input_embeddings().weight[self.name_ids].float()  # (C, D)
        queries, rows = names @ self.look, []
        for part in F.layer_norm(tokens.float(), tokens.shape[-1:]).split(counts.tolist()):  # (n, D)
            attention = (queries @ part.T).softmax(dim=1)  # (C, n)
            rows.append((attention * (names @ part.T)).sum(dim=1))
        return self.scale * torch.stack(rows) + self.bias


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------

def hidden_states(model: nn.Module, batch: dict) -> torch.Tensor:
    """The language model's last hidden states (B, T, D)."""
    names = ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    # No attention mask: padding stands on the right, where a causal model does not look.
    return model.model(**{name: batch[name] for name in names}, use_cache=False).last_hidden_state


def token_losses(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy (nats) and weight of each supervised token, (N,) each, and the image tokens (., D)."""
    seen = []
    tower = model.model.visual
    hook = tower.register_forward_hook(lambda module, args, output: seen.append(output.pooler_output))
    hidden = hidden_states(model, batch)  # (B, T, D)
    hook.remove()
    supervised = batch["labels"][:, 1:] != IGNORE_INDEX  # (B, T-1): position t predicts token t + 1
    hidden, labels = hidden[:, :-1][supervised], batch["labels"][:, 1:][supervised]  # (N, D), (N,)

    def cross_entropy(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.lm_head(hidden).float(), labels, reduction="none")

    # Logits exist at supervised positions only; if many, a part at a time, made again in the backward pass.
    if labels.numel() * model.config.text_config.vocab_size <= LOSS_LOGITS:
        losses = cross_entropy(hidden, labels)
    else:
        count = max(1, LOSS_LOGITS // model.config.text_config.vocab_size)
        parts = zip(hidden.split(count), labels.split(count))
        losses = torch.cat([checkpoint(cross_entropy, *part, use_reentrant=False) for part in parts])
    return losses, batch["weights"][:, 1:][supervised], seen[0]


def hide_words(batch: dict, progress: float, pad_id: int, seed: int) -> dict:
    """Word dropout (Bowman et al. 2016, Sec. 3.1): hides a share of the answer's words as inputs.

    Left alone, a decoder predicts each word from the words before it and never learns to look, and numbers
    trained behind a perfect description lean on it, though at inference it is the model's own. While all
    numbers are hidden the picture is their only source. The share that stays hidden keeps them doubtful.
    """
    rates = torch.zeros(3)
    for kind, (first, last) in HIDDEN.items():
        rates[kind] = first + (last - first) * progress
    kinds = batch["kinds"]
    lots = torch.rand(kinds.shape, generator=torch.Generator().manual_seed(seed)).to(kinds.device)
    hidden = lots < rates.to(kinds.device)[kinds]  # (B, T)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, pad_id)}


@torch.no_grad()
def doubt_words(model: nn.Module, batch: dict, pad_id: int, seed: int, text_share: float) -> dict:
    """Parallel scheduled sampling (arXiv 1906.04331): puts the model's own guesses in place of the truth.

    Numbers trained behind perfect words lean on them, though at inference the words are the model's own. So
    in `text_share` of the answers every word is what the model would have said there, and only the numbers
    are trained. A share of the numbers is guessed in the same way. Hidden tokens stay hidden.
    """
    device = batch["input_ids"].device
    hidden = hidden_states(model, batch)  # (B, T, D)
    kinds, inputs = batch["kinds"][:, 1:], batch["input_ids"][:, 1:]  # (B, T-1)
    undecided = kinds != SKELETON
    logits = model.lm_head(hidden[:, :-1][undecided]).float()  # (N, V)
    logits[:, [model.config.image_token_id, model.config.video_token_id]] = -math.inf
    generator = torch.Generator(device).manual_seed(seed + 1)  # other lots than those of hide_words
    guesses = inputs.clone()
    guesses[undecided] = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    lots = torch.rand(kinds.shape, generator=generator, device=device)
    doubtful_text = (kinds == TEXT) & (lots[:, :1] < text_share)  # (B, T-1)
    guessed = doubtful_text | (kinds == NUMBER) & (lots < GUESSED[NUMBER])
    guessed &= inputs != pad_id
    start = batch["input_ids"][:, :1]
    weights = F.pad(batch["weights"][:, 1:].masked_fill(doubtful_text, 0.0), (1, 0))  # (B, T)
    return {**batch, "weights": weights,
            "input_ids": torch.cat([start, torch.where(guessed, guesses, inputs)], dim=1)}


def sum_over_processes(tensors: list[torch.Tensor]) -> None:
    """Adds up tensors over all processes of torchrun, in place and in one message."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))


def step_loss(model: nn.Module, head: nn.Module, batches: list[dict], step: int, args: argparse.Namespace,
              pad_id: int) -> float:
    """Forward and backward over this process's batches of a step.

    Returns its share of the loss: of the squared error, or of the nats a weighted token. Shares and
    gradients add up over processes, since all divide by the weight and the number of batches of all.
    """
    torch.manual_seed((args.seed * 1_000_003 + step) * 1_009 + args.rank)  # for dropout, on resuming too
    kind = torch.device(args.device).type
    total_weight = sum(batch["weights"][:, 1:].sum() for batch in batches).to(args.device)
    sum_over_processes([total_weight])
    count = len(batches) * args.world_size
    total = 0.0
    for number, batch in enumerate(batches):
        batch = {name: tensor.to(args.device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
            if step < args.tower_steps:
                tower = model.model.visual
                tokens = tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
                loss = shown = F.mse_loss(head(model, batch, tokens), batch["coefficients"]) / count
            else:
                if args.grounding:
                    seed = args.seed * 1_000_003 + step * 101 + number * args.world_size + args.rank
                    batch = hide_words(batch, (step - args.tower_steps) / args.steps, pad_id, seed)
                    # Numbers cannot lean on words that come after them.
                    text_share = GUESSED[TEXT] if args.supervision == "semantic" else 0.0
                    batch = doubt_words(model, batch, pad_id, seed, text_share)
                losses, weights, tokens = token_losses(model, batch)
                loss = shown = (losses * weights).sum() / total_weight
                if args.tower_steps:  # without it, the first large gradients undo the alignment
                    regression = F.mse_loss(head(model, batch, tokens), batch["coefficients"]) / count
                    loss = loss + ALIGNMENT_WEIGHT * regression
        loss.backward()
        total += shown.item()
    return total


@torch.no_grad()
def validate(model: nn.Module, head: nn.Module, loader: DataLoader, args: argparse.Namespace) -> dict:
    """val_loss: nats per weighted token after the true beginning. tower_rmse: of the regression head."""
    model.eval()
    squared, nats, weight_sum = [], 0.0, 0.0
    for batch in loader:
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        losses, weights, tokens = token_losses(model, batch)
        if args.tower_steps:
            squared.append((head(model, batch, tokens).clamp(0, 1) - batch["coefficients"]).square())
        nats, weight_sum = nats + float((losses * weights).sum()), weight_sum + float(weights.sum())
    model.train()
    result = {"val_loss": nats / weight_sum}
    return result | ({"tower_rmse": float(torch.cat(squared).mean().sqrt())} if squared else {})


def schedule(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to 3%."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def step_flops(model: nn.Module, batches: list[dict], args: argparse.Namespace) -> float:
    """Floating-point operations that training on `batches` needs, without those that checkpointing repeats.

    Two for each weight and token forward, the same for the gradient of the input, and again for that of the
    weight where it is trained, and 4 T D a token and layer for attention (PaLM, arXiv 2204.02311, App. B).
    """
    text = model.config.text_config
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    supervised = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    patches = sum(len(batch["pixel_values"]) for batch in batches)
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    tower = sum(p.numel() for p in model.model.visual.parameters())
    width = text.num_attention_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    squares = sum(batch["input_ids"].shape[1] * batch["input_ids"].numel() for batch in batches)
    attention = 4 * width * text.num_hidden_layers * squares / 2  # causal: half
    language = 2 * layers * tokens + 2 * text.vocab_size * text.hidden_size * supervised
    passes = 2 if args.lora_rank else 3
    return passes * language + 3 * attention + (3 if args.tower_steps else 1) * 2 * tower * patches


def train(model: nn.Module, head: nn.Module, optimizer: torch.optim.Optimizer, dataset: FaceDataset,
          val_loader: DataLoader, args: argparse.Namespace, step: int):
    """Trains from `step` on. Yields (next step, its validation loss or None) when it is time to save.

    That is every --save-every steps, at the end of either phase and on Ctrl-C, with the weights whole.
    """
    last, losses, interrupts = args.tower_steps + args.steps, [], []
    previous = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))  # the workers inherit it
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    pad_id = dataset.tokenizer.pad_token_id
    peak = next((peak for name, peak in PEAK_FLOPS.items()
                 if args.device.startswith("cuda") and name in torch.cuda.get_device_name()), None)
    bar = tqdm(total=last, initial=step, unit=" steps", disable=True if args.rank else None)
    started, samples, tokens, flops = time.time(), 0, 0, 0.0
    for batches in step_batches(dataset, args, step):
        in_tower = step < args.tower_steps
        phase = (step, args.tower_steps) if in_tower else (step - args.tower_steps, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(*phase) * (1.0 if in_tower else group["pace"])
        losses.append(step_loss(model, head, batches, step, args, pad_id))
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"the loss is {losses[-1]} at step {step}; choose a --lr below {args.lr}")
        sum_over_processes([p.grad for p in trained if p.grad is not None])
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        samples += sum(len(batch["labels"]) for batch in batches)
        tokens += sum(int((batch["input_ids"] != pad_id).sum()) for batch in batches)
        flops += step_flops(model, batches, args) if peak else 0.0
        stopping = torch.tensor(float(len(interrupts)), device=args.device)
        sum_over_processes([stopping])
        pausing = step % args.save_every == 0 or step in (args.tower_steps, last)
        if step % 100 == 0 or pausing:
            mean = torch.tensor(sum(losses) / len(losses), device=args.device)
            sum_over_processes([mean])
            seconds, world = time.time() - started, args.world_size
            line = {"step": step, "loss": mean.item(), "lr": args.lr * schedule(*phase),
                    "samples/s": samples * world / seconds}
            if not in_tower:
                line["tokens/s"] = tokens * world / seconds
                line |= {"mfu": flops / seconds / peak} if peak else {}
            if pausing and len(val_loader) and not args.rank:
                line |= validate(model, head, val_loader, args)
            if not args.rank:
                with (Path(args.out) / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                shown = " | ".join(f"{name} {value:.4g}" for name, value in line.items() if name != "step")
                bar.write(f"step {step:6d}/{last} | {shown}", file=sys.stdout)
            losses, started, samples, tokens, flops = [], time.time(), 0, 0, 0.0
        if pausing or stopping:
            yield step, line.get("val_loss") if pausing and not in_tower else None
        if stopping:
            break
    bar.close()
    signal.signal(signal.SIGINT, previous)


def estimate_seconds(model: nn.Module, head: nn.Module, dataset: FaceDataset, args: argparse.Namespace,
                     start: int) -> float:
    """Seconds that the steps from `start` on will take, judged by a few that change no weight."""
    seconds = 0.0
    for first, end in ((0, args.tower_steps), (args.tower_steps, args.tower_steps + args.steps)):
        stamps = []
        # From the middle, where answers with and without description are mixed.
        steps = step_batches(dataset, args, (first + end) // 2)
        for batches in itertools.islice(steps, 8 if start < end else 0):
            step_loss(model, head, batches, first, args, dataset.tokenizer.pad_token_id)
            stamps.append(time.time())
        if len(stamps) > 3:
            seconds += (stamps[-1] - stamps[1]) / (len(stamps) - 2) * (end - max(start, first))
    model.zero_grad()
    head.zero_grad()
    return seconds


# ---------------------------------------------------------------------------------------------------
# Saving and resuming
# ---------------------------------------------------------------------------------------------------

def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are trained, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_whole(value: dict, path: Path) -> None:
    """Saves under a temporary name and renames, so that a file under `path` is always whole."""
    torch.save(value, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


def load_state(path: Path, settings: dict) -> dict:
    """Reads state.pt. Raises SystemExit, naming the flag, when the run was started with other settings."""
    if not path.is_file():
        raise SystemExit(f"--resume: {path.parent} holds no unfinished run; start one without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file surfaces as one of several types, all with the same cure
        fix = f"delete {path.parent} and start anew"
        raise SystemExit(f"--resume: {path} cannot be read ({type(error).__name__}); {fix}")
    for name, value in state["settings"].items():
        if settings[name] != value:
            given = f"has --{name.replace('_', '-')} {value}, not {settings[name]}"
            raise SystemExit(f"--resume: the run in {path.parent} {given}; repeat its flags, or change --out")
    return state


def cut_log(path: Path, step: int) -> None:
    """Drops the log's lines that a killed run wrote after its last save, at `step`."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")


def save_checkpoint(folder: Path, model: nn.Module, head: nn.Module, tokenizer, image_processor,
                    run: dict) -> None:
    """Writes what infer.py loads, the model or its adapter; run.json comes last and marks it as complete."""
    partial = folder / "checkpoint.partial"
    partial.mkdir(exist_ok=True)
    if run["steps"] == 0:
        save_file(head.state_dict(), partial / "regression.safetensors")
    if run["lora_rank"]:
        save_adapter(partial, model, run)
    else:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        image_processor.save_pretrained(partial)
    (partial / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "run.json"):
        os.replace(file, folder / file.name)
    partial.rmdir()


def save_adapter(folder: Path, model: nn.Module, run: dict) -> None:
    """Writes the low-rank updates as peft does, so that peft, ms-swift and vLLM load them too."""
    weights = {f"base_model.model.{name}.weight": weight.float().cpu().contiguous()
               for name, weight in trained_weights(model).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-3] for name in weights})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": run["model"],
              "r": run["lora_rank"], "lora_alpha": run["lora_alpha"], "lora_dropout": run["lora_dropout"],
              "bias": "none", "target_modules": rf".*language_model.*\.({'|'.join(targets)})",
              "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def check_args(args: argparse.Namespace) -> None:
    """Fills in the flags that depend on the model. SystemExit on unusable values and on an occupied --out."""
    if args.lr is None and args.lora_rank == 0 and args.model != "tiny":
        args.lr = 1e-5  # all weights of a pretrained model move in small steps
    for name, value in (TINY if args.model == "tiny" else PRETRAINED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.rank, args.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: torch sees no GPU; expected one, or use --device cpu")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    for name in ("steps", "batch_size", "grad_accum", "save_every", "max_pixels", "limit"):
        value, least = getattr(args, name), 0 if name == "steps" and args.tower_steps > 0 else 1
        if value is not None and value < least:
            raise SystemExit(f"--{name.replace('_', '-')} {value}: expected a number of at least {least}")
    if args.epochs is not None and not args.epochs > 0:
        raise SystemExit(f"--epochs {args.epochs}: expected a number above 0")
    if min(args.tower_steps, args.lora_rank) < 0 or not args.lr > 0 or not 0 <= args.lora_dropout < 1:
        raise SystemExit(f"--tower-steps {args.tower_steps}, --lora-rank {args.lora_rank}, --lr {args.lr}, "
                         f"--lora-dropout {args.lora_dropout}: expected at least 0, 0, above 0, and 0 to 1")
    if args.lora_rank and (args.model == "tiny" or args.tower_steps):
        raise SystemExit(f"--lora-rank {args.lora_rank} adapts a pretrained model; expected 0 with --model "
                         "tiny and with --tower-steps")
    out = Path(args.out)
    files = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if "run.json" in files:
        raise SystemExit(f"--out {out} holds a finished run; use it (python infer.py --model {out}), "
                         "delete it, or choose another folder")
    if "state.pt" in files and not args.resume:
        raise SystemExit(f"--out {out} holds an unfinished run; add --resume, delete it, or choose another")
    if "state.pt" not in files and files - {"state.partial", "log.jsonl"}:
        given = ", ".join(sorted(files)[:3])
        raise SystemExit(f"--out {out} holds other files ({given}); choose a new or empty folder")


def draw_demo(data: Path) -> None:
    """Draws the demo with annotate.py if it is asked for and not there."""
    script = Path(__file__).with_name("annotate.py")
    if data == Path("data/demo/train.jsonl") and not data.is_file() and script.is_file():
        print("drawing the demo first: python annotate.py", flush=True)
        if subprocess.run([sys.executable, str(script)]).returncode:
            raise SystemExit("annotate.py did not finish; run: python annotate.py")


def prepare_data(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Reads the records for training and validation and turns --epochs into --steps."""
    data = Path(args.data)
    if args.rank == 0:
        draw_demo(data)
    if dist.is_initialized():
        dist.barrier()
    val = Path(args.val) if args.val else data.with_name("val.jsonl")
    records = read_records(data, args.supervision, args.limit)
    if args.val or val.is_file() and val != data:
        val_records = read_records(val, args.supervision, VAL_RECORDS)
    else:
        records, val_records = hold_out(records, args.seed)
    if args.epochs:
        batch = args.batch_size * args.grad_accum * args.world_size
        args.steps = math.ceil(args.epochs * len(records) / batch)
    return records, val_records[:VAL_RECORDS]


def make_optimizer(model: nn.Module, head: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW over what is trained; during distillation the tower moves at half the pace."""
    tower = [p for p in model.model.visual.parameters() if p.requires_grad]
    language = [p for name, p in model.named_parameters() if ".visual." not in name and p.requires_grad]
    groups = [{"params": language + list(head.parameters()), "pace": 1.0}, {"params": tower, "pace": 0.5}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)


def main(args: argparse.Namespace) -> None:
    """Runs the stage."""
    check_args(args)
    if args.world_size > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    torch.manual_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()
    out = Path(args.out)
    records, val_records = prepare_data(args)
    free = ("resume", "device", "save_every", "out", "rank")  # may differ when a run is resumed
    settings = {name: value for name, value in vars(args).items() if name not in free}
    state = load_state(out / "state.pt", settings) if args.resume else None

    model, tokenizer, image_processor = load_model(args, records)
    dataset = FaceDataset(records, tokenizer, image_processor, args)
    val_keys = [(index, args.supervision) for index in range(len(val_records))]
    size = args.batch_size
    val_batches = [val_keys[first:first + size] for first in range(0, len(val_keys), size)]
    val_set = FaceDataset(val_records, tokenizer, image_processor, args)
    val_loader = DataLoader(val_set, batch_sampler=val_batches, collate_fn=dataset.collate)
    if args.model == "tiny" and args.tower_steps and not state:
        sample = [dataset[index, "numeric"]["pixel_values"] for index in range(min(400, len(dataset)))]
        whiten_patches(model, torch.cat(sample))
    name_ids = [ids[-1] for ids, slot in dataset.skeletons["numeric"] if slot]
    head = RegressionHead(name_ids, model.config.text_config.hidden_size, attends=args.steps == 0)
    if not args.tower_steps:
        model.model.visual.requires_grad_(False)  # Sec. 3.2: a pretrained vision encoder stays frozen
    if args.lora_rank:
        add_lora(model, args)
    model.to(args.device).train()
    head.to(args.device)
    optimizer = make_optimizer(model, head, args)
    step, last, best = 0, args.tower_steps + args.steps, math.inf
    if state:
        model.load_state_dict(state["model"], strict=False)
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        step, best = state["step"], state["best"]

    out.mkdir(parents=True, exist_ok=True)
    if args.rank == 0:
        cut_log(out / "log.jsonl", step)
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        print(f"{versions}, {args.device}, {args.dtype}")
        print(f"{args.model}: {total:,} parameters, {trained:,} trained, {args.world_size} processes")
        print(f"{len(records)} records, {len(val_records)} for validation, {args.supervision} answers")
        print(f"{args.tower_steps} steps of the tower, {args.steps} of distillation, from step {step} on")
    seconds = estimate_seconds(model, head, dataset, args, step)
    if args.rank == 0:
        print(f"estimated time on this machine: {seconds / 60:.1f} minutes", flush=True)

    started = time.time()
    for step, val_loss in train(model, head, optimizer, dataset, val_loader, args, step):
        if args.rank == 0:
            if val_loss is not None and val_loss <= best:
                best = val_loss
                save_whole(trained_weights(model), out / "best.pt")
            save_whole({"settings": settings, "step": step, "best": best, "model": trained_weights(model),
                        "head": head.state_dict(), "optimizer": optimizer.state_dict()}, out / "state.pt")
    if step < last:
        raise SystemExit(f"interrupted after step {step}; nothing is lost, repeat the command with --resume")
    if args.rank:
        return
    if (out / "best.pt").is_file():
        weights = torch.load(out / "best.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(weights, strict=False)
        print(f"kept the weights of the lowest validation loss, {best:.4f}")
    run = {**settings, "prompt": PROMPT, "torch": torch.__version__, "transformers": transformers.__version__}
    save_checkpoint(out, model.eval(), head, tokenizer, image_processor, run)
    for name in ("state.pt", "best.pt"):
        (out / name).unlink(missing_ok=True)
    if args.device.startswith("cuda"):
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print(f"wrote {out} after {(time.time() - started) / 60:.1f} minutes")
    print("next: python infer.py" + ("" if args.out == "runs/demo" else f" PICTURES --model {out}"))


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except torch.OutOfMemoryError:
        sys.exit(f"out of GPU memory; lower --batch-size {arguments.batch_size} (and raise --grad-accum) or "
                 f"--max-pixels {arguments.max_pixels}, and choose a new --out")
    except KeyboardInterrupt:
        sys.exit("interrupted before the first step; nothing is lost, run the same command again")
