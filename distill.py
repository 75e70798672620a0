# SPDX-License-Identifier: MIT
"""Stage II of SemanticFace, semantic distillation (arXiv 2603.14827, Sec. 3.2): image -> description + coefficients.

Fine-tunes a Qwen-VL model to look at a face, write what the muscles do, and then the 52 ARKit coefficients at one decimal:
    {"analysis": {"expression_category": "slight happiness", ...}, "arkit": {"eyeBlinkLeft": 0.1, ...}}

Reads:  annotated records (.jsonl) from annotate.py; the demo is drawn first if it is not there
Writes: a folder that transformers loads as it stands (config.json, model.safetensors, tokenizer), and beside that
        run.json (settings, prompt, versions), log.jsonl (losses) and state.pt (for --resume)

    python distill.py                                                     # the demo: a tiny Qwen3-VL from scratch
    python distill.py --model Qwen/Qwen3-VL-4B-Instruct --data train.jsonl --out runs/mine

Shapes: B images in a batch, T tokens, P image patches, D width, V vocabulary, N supervised tokens, C = 52 coefficients.
"""
import argparse
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# ---------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------

# The 52 names in Live Link Face column order; the same block stands in every script.
ARKIT_NAMES = [
    "eyeBlinkLeft", "eyeLookDownLeft", "eyeLookInLeft", "eyeLookOutLeft", "eyeLookUpLeft", "eyeSquintLeft", "eyeWideLeft",
    "eyeBlinkRight", "eyeLookDownRight", "eyeLookInRight", "eyeLookOutRight", "eyeLookUpRight", "eyeSquintRight", "eyeWideRight",
    "jawForward", "jawRight", "jawLeft", "jawOpen", "mouthClose", "mouthFunnel", "mouthPucker", "mouthRight", "mouthLeft",
    "mouthSmileLeft", "mouthSmileRight", "mouthFrownLeft", "mouthFrownRight", "mouthDimpleLeft", "mouthDimpleRight",
    "mouthStretchLeft", "mouthStretchRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper",
    "mouthPressLeft", "mouthPressRight", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthUpperUpLeft", "mouthUpperUpRight",
    "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight",
    "cheekPuff", "cheekSquintLeft", "cheekSquintRight", "noseSneerLeft", "noseSneerRight", "tongueOut",
]

FIELDS = ["expression_category", "muscle_movements", "emotional_implication", "symmetry"]  # Sec. 3.1
VALUES = [f"{k / 10:.1f}" for k in range(11)]  # one decimal, Sec. 3.2
PROMPT = "Describe the facial muscle movements, then give the 52 ARKit blendshape coefficients as one JSON object."
IGNORE_INDEX = -100
ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl"]

# DIFFERS FROM PAPER: braces, names and quotes weigh less than what the picture decides. They are learnt within a few steps.
SKELETON_WEIGHT = 0.2
SKELETON, TEXT, NUMBER = 0, 1, 2  # kinds of tokens
HIDDEN = {TEXT: (0.3, 0.1), NUMBER: (1.0, 0.1)}  # share hidden by --grounding at the first and at the last step
NUMERIC_SHARE = 0.8  # of the steps, until which --grounding mixes in answers without description
TOWER_BATCH = 2  # the tower's steps are short: twice the images at a time
WARMUP_STEPS = 30
WORKERS = 2  # processes that prepare pictures and tokens
VAL_RECORDS = 128  # of the validation loss, which only watches over the run: evaluate.py measures

# Flags that are not given take the values for the tiny model or those for a pretrained one.
TINY = {"steps": 1800, "tower_steps": 2000, "lr": 1e-3, "grounding": True, "max_pixels": 64 * 64}
PRETRAINED = {"steps": 2000, "tower_steps": 0, "lr": 1e-5, "grounding": False, "max_pixels": 512 * 512}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    both = "(default: {} for tiny, {} for a pretrained model)"
    add("--data", default="data/demo/train.jsonl", help="annotated records to learn from (default %(default)s)")
    add("--val", help="annotated records for the validation loss (default: val.jsonl beside --data, if there is one)")
    add("--model", default="tiny", help="tiny, built here, or a Qwen3-VL or Qwen2.5-VL as hub id or folder (default %(default)s)")
    add("--out", default="runs/demo", help="run folder (default %(default)s)")
    add("--supervision", choices=["semantic", "numeric"], default="semantic",
        help="description then numbers, or numbers only (default %(default)s)")
    add("--steps", type=int, help=f"optimizer steps of distillation {both.format(TINY['steps'], PRETRAINED['steps'])}")
    add("--tower-steps", type=int, help=f"steps before that in which the vision tower learns to regress the coefficients "
                                        f"{both.format(TINY['tower_steps'], PRETRAINED['tower_steps'])}")
    add("--batch-size", type=int, default=8, help="images per forward pass (default %(default)s)")
    add("--grad-accum", type=int, default=1, help="forward passes per optimizer step (default %(default)s)")
    add("--lr", type=float, help=f"peak learning rate {both.format(TINY['lr'], PRETRAINED['lr'])}")
    add("--grounding", action=argparse.BooleanOptionalAction, default=None,
        help="hide words and phase the description in, so that the model learns to look (default: for tiny only)")
    add("--max-pixels", type=int, help=f"pixels that an image is scaled to {both.format(TINY['max_pixels'], PRETRAINED['max_pixels'])}")
    add("--save-every", type=int, default=500, help="steps between saves and validation losses (default %(default)s)")
    add("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on with the unfinished run in --out")
    add("--limit", type=int, help="use the first LIMIT records only")
    add("--seed", type=int, default=0, help="of weights, order and dropout (default %(default)s)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the arithmetic, the weights stay float32; auto is bfloat16 on a GPU (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------
# Data: records -> token ids with supervision
# ---------------------------------------------------------------------------------------------------

def read_records(path: Path, supervision: str, limit: int | None) -> list[dict]:
    """Reads annotated records. Raises SystemExit naming the line when one cannot be used; a torn last line is left out and said."""
    if not path.is_file() or path.stat().st_size == 0:
        raise SystemExit(f"{path} {'is empty' if path.is_file() else 'does not exist'}; expected annotated records, made by: python annotate.py LABELS.jsonl --out {path}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines[:limit], 1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{where}: not JSON ({error}); expected one record a line; delete the line if it was cut off")
        if not isinstance(record, dict) or not isinstance(record.get("coefficients"), dict):
            raise SystemExit(f"{where}: expected an object with coefficients; make such records with: python annotate.py")
        wrong = [name for name in ARKIT_NAMES if not is_coefficient(record["coefficients"].get(name))]
        if wrong or len(record["coefficients"]) != len(ARKIT_NAMES):
            raise SystemExit(f"{where}: {wrong or 'unknown names among the'} coefficients; expected the 52 ARKit names, each a number from 0 to 1")
        if not isinstance(record.get("image"), str) or not (path.parent / record["image"]).is_file():
            raise SystemExit(f"{where}: image is {record.get('image')!r}, which is no file beside {path.name}; training needs a picture for every record")
        description = record.get("description")
        if supervision == "semantic" and not (isinstance(description, dict) and all(isinstance(description.get(field), str) for field in FIELDS)):
            raise SystemExit(f"{where}: no complete description; run: python annotate.py {path}, or train with --supervision numeric")
        records.append({**record, "image": str(path.parent / record["image"])})
    return records


def is_coefficient(value) -> bool:
    """Whether `value` is a number from 0 to 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def open_image(path: str) -> Image.Image:
    """Opens a picture upright and in RGB, on white where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(path))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prompt_text(prompt: str, image_tokens: int) -> str:
    """The Qwen-VL chat up to the answer, with the image's place holders written by hand."""
    image = "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
    return f"<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n"


def answer_skeleton(supervision: str) -> list[tuple]:
    """The answer as (fixed text, slot) pairs: the text is known in advance, the slot (a field, a coefficient, None at the end) is not."""
    pieces, text = [], "{"
    if supervision == "semantic":
        text += '"analysis": {'
        for field in FIELDS:
            pieces.append((f'{text}"{field}": "', field))
            text = '", '
        text = '"}, '
    text += '"arkit": {'
    for name in ARKIT_NAMES:
        pieces.append((f'{text}"{name}": ', name))
        text = ", "
    return pieces + [("}}", None)]


class FaceDataset(Dataset):
    """(index, supervision) -> pixel_values (P, channels * patch), image_grid_thw (1, 3), input_ids (T), labels (T), weights (T), kinds (T).

    The labels are IGNORE_INDEX on the prompt: exactly the answer and its end token are supervised. Pieces are tokenised one by one,
    so that the boundaries are those of decoding, where the skeleton is fed and only the slots are generated.
    """

    def __init__(self, records: list[dict], tokenizer, image_processor, args: argparse.Namespace):
        self.records, self.tokenizer, self.image_processor = records, tokenizer, image_processor
        self.merge = image_processor.merge_size ** 2
        self.size = {"shortest_edge": args.max_pixels, "longest_edge": args.max_pixels}
        self.supervision = args.supervision
        self.skeletons = {supervision: [(self.encode(text), slot) for text, slot in answer_skeleton(supervision)]
                          for supervision in ("semantic", "numeric")}
        self.values = {value: self.encode(value) for value in VALUES}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def __len__(self) -> int:
        return len(self.records)

    def encode_answer(self, record: dict, supervision: str) -> tuple[list[int], list[float], list[int]]:
        """Token ids of the answer with its end token, their loss weights, and their kind: SKELETON, TEXT or NUMBER."""
        ids, weights, kinds = [], [], []
        previous = None
        for skeleton_ids, slot in self.skeletons[supervision]:
            # The token that closes a text is undecided too: the model says when the text ends.
            weights += [1.0 if previous in FIELDS else SKELETON_WEIGHT] + [SKELETON_WEIGHT] * (len(skeleton_ids) - 1)
            if slot in FIELDS:
                slot_ids = self.encode(json.dumps(record["description"][slot], ensure_ascii=False)[1:-1])
            else:
                slot_ids = self.values[f"{record['coefficients'][slot]:.1f}"] if slot else []
            weights += [1.0] * len(slot_ids)
            kinds += [SKELETON] * len(skeleton_ids) + [TEXT if slot in FIELDS else NUMBER] * len(slot_ids)
            ids += skeleton_ids + slot_ids
            previous = slot
        return ids + [self.tokenizer.eos_token_id], weights + [SKELETON_WEIGHT], kinds + [SKELETON]

    def __getitem__(self, key: tuple[int, str]) -> dict:
        index, supervision = key
        record = self.records[index]
        pixels = self.image_processor([open_image(record["image"])], size=self.size, return_tensors="pt")
        image_tokens = int(pixels["image_grid_thw"].prod()) // self.merge
        prompt_ids = self.encode(prompt_text(PROMPT, image_tokens))
        answer_ids, weights, kinds = self.encode_answer(record, supervision)
        return {
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
            "input_ids": torch.tensor(prompt_ids + answer_ids),
            "labels": torch.tensor([IGNORE_INDEX] * len(prompt_ids) + answer_ids),
            "weights": torch.tensor([0.0] * len(prompt_ids) + weights),
            "kinds": torch.tensor([SKELETON] * len(prompt_ids) + kinds),
            "coefficients": torch.tensor([record["coefficients"][name] for name in ARKIT_NAMES]),
        }

    def collate(self, items: list[dict]) -> dict:
        """Pads on the right: input_ids, labels, weights and kinds are (B, T); pixel_values holds the patches of all images (P, ...)."""
        pad = nn.utils.rnn.pad_sequence
        input_ids = pad([item["input_ids"] for item in items], batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return {
            "input_ids": input_ids,
            "labels": pad([item["labels"] for item in items], batch_first=True, padding_value=IGNORE_INDEX),
            "weights": pad([item["weights"] for item in items], batch_first=True),
            "kinds": pad([item["kinds"] for item in items], batch_first=True),
            "mm_token_type_ids": (input_ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).long(),
            "pixel_values": torch.cat([item["pixel_values"] for item in items]),
            "image_grid_thw": torch.cat([item["image_grid_thw"] for item in items]),
            "coefficients": torch.stack([item["coefficients"] for item in items]),  # (B, C)
        }


def batch_indices(count: int, batch_size: int, seed: int, start: int, stop: int):
    """Yields the record indices of batches `start` to `stop` - 1: every epoch a new order, fixed by the seed, so any batch can be recomputed."""
    per_epoch = max(1, count // batch_size)
    for batch in range(start, stop):
        epoch, place = divmod(batch, per_epoch)
        if batch == start or place == 0:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()
        yield order[place * batch_size:(place + 1) * batch_size]


def step_batches(dataset: FaceDataset, args: argparse.Namespace, start: int):
    """Yields the list of batches of one optimizer step after another, from step `start` on: the tower's steps, then the language model's."""
    first = max(start - args.tower_steps, 0) * args.grad_accum
    tower = batch_indices(len(dataset), TOWER_BATCH * args.batch_size, args.seed, start, args.tower_steps)
    language = batch_indices(len(dataset), args.batch_size, args.seed + 1, first, args.steps * args.grad_accum)
    tower_keys = [[(index, "numeric") for index in batch] for batch in tower]
    language_keys = [[(index, choose_supervision(args, number, place)) for place, index in enumerate(batch)]
                     for number, batch in enumerate(language, first)]
    for keys, count in ((tower_keys, 1), (language_keys, args.grad_accum)):
        batches = iter(DataLoader(dataset, batch_sampler=keys, collate_fn=dataset.collate, num_workers=WORKERS))
        while step := list(itertools.islice(batches, count)):
            yield step


def choose_supervision(args: argparse.Namespace, batch: int, place: int) -> str:
    """With --grounding, the description phases in: at first all answers are numbers only, after NUMERIC_SHARE of the batches none is.

    A coefficient's name says where to look, a sentence does not; numbers teach the decoder to read the picture in fewer, shorter steps.
    """
    progress = batch / (args.steps * args.grad_accum)
    lot = random.Random(f"{args.seed} {batch} {place}").random()
    return "numeric" if args.grounding and lot > progress / NUMERIC_SHARE else args.supervision


# ---------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------

def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for `texts` with Qwen-VL's special tokens: any text encodes, and what recurs is one token.

    One token each: frequent words, phrases between punctuation marks (superwords, arXiv 2503.13423), the pieces of the answer's
    skeleton and the eleven values. A short answer is what makes training on a CPU possible: 160 tokens instead of 600.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary += [word for word, _ in words.most_common(2000) if len(word) > 1]
    bpe = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(vocabulary)}, merges=[], ignore_merges=True))
    bpe.pre_tokenizer = split
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=special)
    phrases = Counter(phrase for text in texts for phrase in re.findall(r"[^,.:]+:?", text))
    pieces = [phrase for phrase, count in phrases.most_common(1000) if count >= 20] + [PROMPT, "user\n", "assistant\n"]
    pieces += [text for supervision in ("semantic", "numeric") for text, _ in answer_skeleton(supervision)] + VALUES
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in dict.fromkeys(pieces)])
    return tokenizer


def build_tiny(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """The Qwen3-VL architecture at a million parameters: tower and decoder of 3 layers, D = 96, 64 patches of 8 x 8 pixels, 16 image tokens."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    # Weights start at about 1 / sqrt(D); the library's 0.02 suits widths of thousands and learns slowly here.
    text = {"vocab_size": len(tokenizer), "hidden_size": 96, "initializer_range": 0.08, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": 24, "tie_word_embeddings": True, "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 4, 4], "mrope_interleaved": True}}
    vision = {"depth": 3, "hidden_size": 96, "intermediate_size": 288, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2,
              "out_hidden_size": 96, "num_position_embeddings": 64, "initializer_range": 0.04, "deepstack_visual_indexes": [1]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=ids["image_pad"],
                           video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"])
    return Qwen3VLForConditionalGeneration(config)


def load_model(args: argparse.Namespace, records: list[dict]) -> tuple:
    """Returns (model, tokenizer, image processor): the tiny model built around `records`, or a Qwen-VL from a folder or the hub."""
    if args.model == "tiny":
        texts = [text for record in records for text in record.get("description", {}).values()]
        tokenizer = build_tokenizer(texts)
        return build_tiny(tokenizer), tokenizer, Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    try:
        config = AutoConfig.from_pretrained(args.model)
        if config.model_type not in ARCHITECTURES:
            raise SystemExit(f"--model {args.model} is a {config.model_type}; expected one of {', '.join(ARCHITECTURES)}, or tiny")
        # AutoProcessor would need torchvision for its video half; tokenizer and PIL image processor do all that is needed here.
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        image_processor = AutoImageProcessor.from_pretrained(args.model, backend="pil")
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f"--model {args.model} cannot be loaded ({reason}); expected tiny, a hub id such as Qwen/Qwen3-VL-4B-Instruct, or a folder with such a model")
    return model, tokenizer, image_processor


class RegressionHead(nn.Module):
    """Reads the coefficients off the image tokens as inner products with the decoder's own embeddings of their names.

    It stands in for the pretraining that the tiny model lacks, and is the baseline every result is compared with. Tying its rows to
    the name embeddings aligns picture and words: afterwards the decoder finds a coefficient by matching its name against the image
    tokens. With rows of its own (as good a regression) the decoder still ignored the picture after 6,000 samples.
    """

    def __init__(self, name_ids: list[int]):
        super().__init__()
        self.register_buffer("name_ids", torch.tensor(name_ids))  # (C,)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.zeros(len(name_ids)))

    def forward(self, model: nn.Module, batch: dict) -> torch.Tensor:
        """Returns the coefficients (B, C), unbounded."""
        tower = model.model.visual
        tokens = tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output  # (image tokens of the batch, D)
        counts = batch["image_grid_thw"].prod(dim=1) // tower.spatial_merge_size ** 2  # (B,)
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])
        means = torch.stack([part.mean(dim=0) for part in tokens.split(counts.tolist())])  # (B, D)
        names = model.get_input_embeddings().weight[self.name_ids].float()  # (C, D)
        return self.scale * means @ names.T + self.bias


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------

def token_losses(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats and weight of each supervised token, (N,) each. Logits are computed at supervised positions only."""
    inputs = {name: batch[name] for name in ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")}
    # No attention mask: padding stands on the right, where a causal model does not look.
    hidden = model.model(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
    supervised = batch["labels"][:, 1:] != IGNORE_INDEX  # (B, T-1): position t predicts token t + 1
    logits = model.lm_head(hidden[:, :-1][supervised])  # (N, V)
    losses = F.cross_entropy(logits.float(), batch["labels"][:, 1:][supervised], reduction="none")
    return losses, batch["weights"][:, 1:][supervised]


def hide_words(batch: dict, progress: float, pad_id: int, seed: int) -> dict:
    """Word dropout (Bowman et al. 2016, Sec. 3.1): replaces a share of the answer's own words and numbers, as inputs, by padding.

    Left alone, a decoder predicts each word from the words before it and never learns to look at the picture; and numbers trained behind
    a perfect description lean on it, though at inference it is the model's own. While all numbers are hidden, the picture is their only
    source; the share that stays hidden to the end keeps them from trusting what stands before. Labels are untouched.
    """
    rates = torch.zeros(3)
    for kind, (first, last) in HIDDEN.items():
        rates[kind] = first + (last - first) * progress
    lots = torch.rand(batch["kinds"].shape, generator=torch.Generator().manual_seed(seed))
    hidden = lots.to(batch["kinds"].device) < rates.to(batch["kinds"].device)[batch["kinds"]]  # (B, T)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, pad_id)}


def schedule(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to 3%."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def step_loss(model: nn.Module, head: nn.Module, batches: list[dict], step: int, args: argparse.Namespace, pad_id: int) -> float:
    """Forward and backward over the `batches` of one optimizer step. Returns the loss: squared error, then nats per weighted token."""
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    total_weight = sum(float(batch["weights"][:, 1:].sum()) for batch in batches)
    total = 0.0
    for number, batch in enumerate(batches):
        batch = {name: tensor.to(args.device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(torch.device(args.device).type, dtype=dtype, enabled=dtype != torch.float32):
            if step < args.tower_steps:
                loss = F.mse_loss(head(model, batch), batch["coefficients"]) / len(batches)
            else:
                if args.grounding:
                    seed = args.seed * 1_000_003 + step * 101 + number
                    batch = hide_words(batch, (step - args.tower_steps) / args.steps, pad_id, seed)
                losses, weights = token_losses(model, batch)
                loss = (losses * weights).sum() / total_weight
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def validate(model: nn.Module, head: nn.Module, loader: DataLoader, args: argparse.Namespace) -> dict:
    """The tower's root mean squared error, and the language model's nats per weighted token on the true prefix."""
    model.eval()
    squared, nats, weight_sum = [], 0.0, 0.0
    for batch in loader:
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        squared.append((head(model, batch).clamp(0, 1) - batch["coefficients"]).square())
        losses, weights = token_losses(model, batch)
        nats, weight_sum = nats + float((losses * weights).sum()), weight_sum + float(weights.sum())
    model.train()
    return {"val_loss": nats / weight_sum, "tower_rmse": float(torch.cat(squared).mean().sqrt())}


def estimate_seconds(model: nn.Module, head: nn.Module, dataset: FaceDataset, args: argparse.Namespace, start: int) -> float:
    """Seconds that the steps from `start` on will take, from three measured steps of either kind; no weight changes."""
    seconds = 0.0
    for first, end in ((0, args.tower_steps), (args.tower_steps, args.tower_steps + args.steps)):
        if start < end > first:
            batches = next(step_batches(dataset, args, first))
            step_loss(model, head, batches, first, args, dataset.tokenizer.pad_token_id)
            begun = time.time()
            for _ in range(3):
                step_loss(model, head, batches, first, args, dataset.tokenizer.pad_token_id)
            seconds += (time.time() - begun) / 3 * (end - max(start, first))
    model.zero_grad()
    head.zero_grad()
    return seconds


# ---------------------------------------------------------------------------------------------------
# Saving and resuming
# ---------------------------------------------------------------------------------------------------

def save_state(path: Path, settings: dict, step: int, model: nn.Module, head: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Saves all that the next step depends on, whole or not at all. Order and dropout are functions of seed and step."""
    state = {"settings": settings, "step": step, "model": model.state_dict(), "head": head.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


def load_state(path: Path, settings: dict) -> dict:
    """Reads state.pt. Raises SystemExit, naming the flag, when the run in the folder was started with other settings."""
    if not path.is_file():
        raise SystemExit(f"--resume: {path} does not exist, there is no unfinished run in {path.parent}; start one without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file surfaces as one of several types, all with the same cure
        raise SystemExit(f"--resume: {path} cannot be read ({type(error).__name__}); delete {path.parent} and start anew")
    for name, value in state["settings"].items():
        if settings[name] != value:
            flag = "--" + name.replace("_", "-")
            raise SystemExit(f"--resume: the run in {path.parent} has {flag} {value}, not {settings[name]}; give the same flags, or another --out")
    return state


def save_checkpoint(folder: Path, model: nn.Module, tokenizer, image_processor, run: dict) -> None:
    """Writes the folder that transformers and infer.py load; run.json comes last and marks it as complete."""
    partial = folder / "checkpoint.partial"
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    image_processor.save_pretrained(partial)
    (partial / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "run.json"):
        os.replace(file, folder / file.name)
    partial.rmdir()


def check_args(args: argparse.Namespace) -> None:
    """Fills in the flags that depend on the model and raises SystemExit on values that cannot work."""
    for name, value in (TINY if args.model == "tiny" else PRETRAINED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    for name in ("steps", "batch_size", "grad_accum", "save_every", "max_pixels", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a whole number of at least 1")
    if args.tower_steps < 0 or args.lr <= 0:
        raise SystemExit(f"--tower-steps {args.tower_steps}, --lr {args.lr}: expected at least 0, and above 0")
    out = Path(args.out)
    if (out / "run.json").is_file():
        raise SystemExit(f"--out {out} holds a finished run; choose another --out, delete the folder, or use it: python infer.py --model {out}")
    if (out / "state.pt").is_file() and not args.resume:
        raise SystemExit(f"--out {out} holds an unfinished run; add --resume to go on with it, or choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / "state.pt").is_file() and not (out / "log.jsonl").is_file():
        raise SystemExit(f"--out {out} holds other files; choose a new or empty folder")


def draw_demo(data: Path) -> None:
    """Draws the demo with annotate.py if it is asked for and not there."""
    script = Path(__file__).with_name("annotate.py")
    if data == Path("data/demo/train.jsonl") and not data.is_file() and script.is_file():
        print("drawing the demo first: python annotate.py", flush=True)
        if subprocess.run([sys.executable, str(script)]).returncode:
            raise SystemExit("annotate.py did not finish; run: python annotate.py")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    torch.manual_seed(args.seed)
    data, out = Path(args.data), Path(args.out)
    draw_demo(data)
    val = Path(args.val) if args.val else data.with_name("val.jsonl")
    records = read_records(data, args.supervision, args.limit)
    val_records = read_records(val, args.supervision, VAL_RECORDS) if args.val or val.is_file() else []
    model, tokenizer, image_processor = load_model(args, records)
    dataset = FaceDataset(records, tokenizer, image_processor, args)
    val_set = FaceDataset(val_records, tokenizer, image_processor, args)
    val_keys = [(index, args.supervision) for index in range(len(val_records))]
    val_loader = DataLoader(val_set, batch_sampler=[val_keys[k:k + 16] for k in range(0, len(val_keys), 16)], collate_fn=dataset.collate)
    name_ids = [ids[-1] for ids, slot in dataset.skeletons["numeric"] if slot in ARKIT_NAMES]
    head = RegressionHead(name_ids)
    model.to(args.device).train()
    head.to(args.device)

    tower = list(model.model.visual.parameters())
    if not args.tower_steps:
        model.model.visual.requires_grad_(False)  # Sec. 3.2: a pretrained vision encoder stays frozen
    language = [p for name, p in model.named_parameters() if p.requires_grad and ".visual." not in name] + list(head.parameters())
    groups = [{"params": language, "scale": 1.0}, {"params": [p for p in tower if p.requires_grad], "scale": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("resume", "device", "save_every")}
    step, last = 0, args.tower_steps + args.steps
    if args.resume:
        state = load_state(out / "state.pt", settings)
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    out.mkdir(parents=True, exist_ok=True)
    total = sum(p.numel() for p in model.parameters())
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}, {args.device}, {args.dtype}")
    print(f"{args.model}: {total:,} parameters, {total - sum(p.numel() for p in model.parameters() if not p.requires_grad):,} trained")
    print(f"{len(records)} records, {len(val_records)} for validation, {args.supervision} answers")
    print(f"{args.tower_steps} steps of the tower, then {args.steps} of distillation, starting at {step}", flush=True)
    print(f"estimated time: {estimate_seconds(model, head, dataset, args, step) / 60:.1f} minutes on this machine", flush=True)

    started, losses, done = time.time(), [], step
    bar = tqdm(total=last, initial=step, unit=" steps", disable=None)
    try:
        with (out / "log.jsonl").open("a", encoding="utf-8") as log:
            for batches in step_batches(dataset, args, step):
                phase_step, phase_steps = (step, args.tower_steps) if step < args.tower_steps else (step - args.tower_steps, args.steps)
                for group in optimizer.param_groups:
                    scale = 1.0 if step < args.tower_steps else group["scale"]
                    group["lr"] = args.lr * scale * schedule(phase_step, phase_steps)
                losses.append(step_loss(model, head, batches, step, args, tokenizer.pad_token_id))
                nn.utils.clip_grad_norm_(language + tower, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                bar.update()
                if not math.isfinite(losses[-1]):
                    raise SystemExit(f"the loss became {losses[-1]} at step {step}; lower --lr (now {args.lr}) and go on with --resume")
                if step % 100 == 0 or step in (args.tower_steps, last):
                    line = {"step": step, "loss": sum(losses) / len(losses), "lr": args.lr * schedule(phase_step, phase_steps)}
                    if step % args.save_every == 0 or step in (args.tower_steps, last):
                        line |= validate(model, head, val_loader, args) if val_records else {}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    losses = []
                    bar.write(f"step {step:6d}/{last} | " + " | ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "step"))
                if step % args.save_every == 0:
                    save_state(out / "state.pt", settings, step, model, head, optimizer)
    except KeyboardInterrupt:
        bar.close()
        save_state(out / "state.pt", settings, step, model, head, optimizer)
        sys.exit(f"interrupted after step {step}; nothing is lost, go on with the same command and --resume")
    bar.close()
    run = {**settings, "prompt": PROMPT, "torch": torch.__version__, "transformers": transformers.__version__}
    save_checkpoint(out, model.eval(), tokenizer, image_processor, run)
    (out / "state.pt").unlink(missing_ok=True)
    print(f"wrote {out} after {(time.time() - started) / 60:.1f} minutes")
    print("next: python infer.py" + ("" if args.out == "runs/demo" else f" INPUT --model {out}"))


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("interrupted before the first step; nothing is lost, run the same command again")
