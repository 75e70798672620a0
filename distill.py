# SPDX-License-Identifier: MIT
"""Stage II of SemanticFace (arXiv 2603.14827), language-prior semantic distillation.

Fine-tunes a Qwen-VL model to write what the muscles of a face do, then its 52 ARKit coefficients.
The method comes first: the answer, LoRA, loss and loop. The demo's tiny model has its own section.

Reads:  annotated records (.jsonl) of annotate.py, the demo is drawn first if missing
    {"image": "images/000001.png", "identity": "id017", "coefficients": {"eyeBlinkLeft": 0.12, ...},
     "description": {"expression_category": "slight happiness", ...}, "annotator": "rules"}
Writes: a folder that transformers loads, or with LoRA a PEFT adapter, run.json (settings, prompt,
        versions), log.jsonl (losses) and, until the run ends, state.pt for --resume

    torchrun --nproc-per-node 8 distill.py --model Qwen/Qwen3-VL-4B-Instruct --data train.jsonl

Shapes: B images, T tokens, P patches, D width, C = 52 coefficients, L tokens a number, O options,
        N supervised tokens.
"""
import json
import math
import os
import re
import subprocess
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from argparse import RawDescriptionHelpFormatter
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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
# What an answer holds, in its order. The paper's is "semantic".
PARTS = {"semantic": ("analysis", "arkit"), "numeric": ("arkit",),
         "numbers-first": ("arkit", "analysis")}
DEMO = "data/demo/train.jsonl"
PROMPT = "Describe the facial muscle movements, then give the 52 ARKit coefficients as JSON."
IMAGE_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]  # that Pillow may open

# What a flag that is not given stands for, with the demo's tiny model and with a pretrained one.
TINY = {"steps": 2500, "lr": 2e-3, "expectation_weight": 25.0, "max_pixels": 64 * 64,
        "lora_rank": 0, "checkpointing": False}
PRETRAINED = {"steps": 2000, "lr": 1e-4, "expectation_weight": 0.0, "max_pixels": 512 * 512,
              "lora_rank": 16, "checkpointing": True}
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 30  # in which the learning rate rises
LOG_STEPS = 100  # between two lines of the log
VAL_RECORDS = 64  # for the validation loss, which only watches over the run: evaluate.py measures
LOADERS, BATCHES_AHEAD = 2, 4  # threads that read pictures, batches that they read in advance
LOSS_LOGITS = 2**27  # logits that exist at a time, 0.5 GB: Qwen's vocabulary has 151,936 tokens

IGNORE_INDEX = -100  # the label of a token that is not supervised
PROMPTED, SKELETON, TEXT, NUMBER = 0, 1, 2, 3  # slot types: what a token belongs to
# The modules that get a LoRA, all linears of the language model, as a pattern of their paths.
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"

def parse_args(argv=None) -> Namespace:
    """Reads the command line, or `argv`."""
    parser = ArgumentParser(
        description=f"{__doc__}\nDefaults, tiny: {TINY}\nDefaults, pretrained: {PRETRAINED}",
        formatter_class=RawDescriptionHelpFormatter)
    add, switch = parser.add_argument, BooleanOptionalAction
    add("--data", default=DEMO, help="annotated records (default %(default)s)")
    add("--val", help="validation records (default: val.jsonl beside --data, if there is one)")
    add("--model", default="tiny", help="tiny, or a Qwen-VL's hub id or folder (default tiny)")
    add("--out", default="runs/demo", help="run folder (default %(default)s)")
    add("--supervision", choices=list(PARTS), default="semantic",
        help="description then numbers, numbers only, or numbers first (default %(default)s)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--epochs", type=float, help="passes over the records, instead of --steps")
    add("--expectation-weight", type=float, help="of the squared error of expected values")
    add("--batch-size", type=int, default=8, help="images per pass and GPU (default %(default)s)")
    add("--grad-accum", type=int, default=1, help="passes per optimizer step (default %(default)s)")
    add("--lr", type=float, help="peak learning rate, about 1e-5 where all weights are trained")
    add("--lora-rank", type=int, help="0 trains all weights of the language model")
    add("--lora-alpha", type=float, default=32.0, help="weight: alpha / rank (default %(default)s)")
    add("--checkpointing", action=switch, help="compute activations twice, for less memory")
    add("--compile", action=switch, help="compile the decoder layers (default: on a GPU)")
    add("--corrupt", action=switch, help="hide and sample words (default: tiny, semantic answers)")
    add("--max-pixels", type=int, help="larger pictures are shrunk")
    add("--save-every", type=int, default=100, help="steps between saves (default %(default)s)")
    add("--resume", action=switch, default=False, help="go on with --out, by its settings")
    add("--limit", type=int, help="first records only, once unless --steps or --epochs is given")
    add("--seed", type=int, default=0, help="of weights, order, hidden words (default %(default)s)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of arithmetic and frozen weights, auto is bfloat16 on a GPU (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser.parse_args(argv)

# ---- The answer and its supervision --------------------------------------------------------------
# A training sequence, shortened. The answer and its end token are supervised, the prompt is not:
#   <|im_start|>user
#   <|vision_start|><|image_pad|>...<|vision_end|>Describe the ... as JSON.<|im_end|>
#   <|im_start|>assistant
#   {"analysis": {"expression_category": "slight happiness", ..., "symmetry": "symmetric"},
#   "arkit": {"eyeBlinkLeft": 0.1, "eyeLookDownLeft": 0.0, ..., "tongueOut": 0.0}}<|im_end|>

# prompt_text and open_image stand word for word in infer.py, check_coefficients in evaluate.py.
# infer.py's answer_skeleton knows the authors' form, too.
def prompt_text(prompt: str, image_tokens: int) -> str:
    """The Qwen-VL chat up to the answer, with the image's placeholder tokens written by hand."""
    image = "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
    return f"<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n"

def answer_skeleton(supervision: str) -> list[tuple]:
    """The answer as (fixed text, slot) pairs: ('{"arkit": {"eyeBlinkLeft": ', "eyeBlinkLeft"), ...

    A slot is a field, a coefficient or, last, None.
    """
    # An answer with 999 in every slot, cut there.
    blanks = {"analysis": dict.fromkeys(FIELDS, "999"), "arkit": dict.fromkeys(ARKIT_NAMES, 999)}
    answer = {part: blanks[part] for part in PARTS[supervision]}
    return list(zip(json.dumps(answer).split("999"), [*chain(*answer.values()), None]))

def open_image(path: str) -> Image.Image:
    """Opens a picture upright and in RGB: 16-bit grey is scaled, transparency becomes white."""
    image = ImageOps.exif_transpose(Image.open(path, formats=IMAGE_FORMATS))
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

class FaceDataset:
    """One record -> pixels, token ids and their slot types (T,), coefficients (1, C)."""

    def __init__(self, records: list[dict], tokenizer, image_processor, supervision: str,
                 max_pixels: int):
        self.records, self.tokenizer, self.image_processor = records, tokenizer, image_processor
        token_side = image_processor.patch_size * image_processor.merge_size  # pixels
        self.size = {"shortest_edge": token_side ** 2, "longest_edge": max_pixels}  # pixel counts
        self.skeleton = [(self.encode(text), slot) for text, slot in answer_skeleton(supervision)]
        self.value_ids = [self.encode(value) for value in VALUES]  # 11 lists of L tokens

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_answer(self, record: dict) -> tuple[list[int], list[int]]:
        """Token ids and slot types of the answer, each piece tokenised alone as infer.py does."""
        ids, types = [], []
        for skeleton_ids, slot in self.skeleton:
            if slot in FIELDS:
                # Without its quotes, which belong to the skeleton.
                text = json.dumps(record["description"][slot], ensure_ascii=False)[1:-1]
                slot_ids, slot_type = self.encode(text), TEXT
            elif slot in ARKIT_NAMES:
                value = record["coefficients"][slot] + 0.0  # -0.0 becomes 0.0
                slot_ids, slot_type = self.value_ids[VALUES.index(f"{value:.1f}")], NUMBER
            else:  # None, the end
                slot_ids, slot_type = [self.tokenizer.eos_token_id], SKELETON
            ids += skeleton_ids + slot_ids
            types += [SKELETON] * len(skeleton_ids) + [slot_type] * len(slot_ids)
        return ids, types

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        """The example at `index` or, if its picture cannot be used, the next one that can."""
        for offset in range(len(self)):
            record = self.records[(index + offset) % len(self)]
            try:
                image = open_image(record["image"])
                pixels = self.image_processor([image], size=self.size, return_tensors="pt")
                break
            except Exception as error:  # Pillow's readers raise a dozen types on damaged files
                print(f"left out: {record['image']} ({error})", flush=True)
        else:
            raise SystemExit("none of the pictures can be used, for the reasons above")

        image_tokens = int(pixels["image_grid_thw"].prod()) // self.image_processor.merge_size ** 2
        prompt_ids = self.encode(prompt_text(PROMPT, image_tokens))
        answer_ids, answer_types = self.encode_answer(record)
        return {
            **pixels,  # pixel_values (P, .) and image_grid_thw (1, 3)
            "coefficients": torch.tensor([[record["coefficients"][name] for name in ARKIT_NAMES]]),
            "input_ids": torch.tensor(prompt_ids + answer_ids),
            "slot_types": torch.tensor([PROMPTED] * len(prompt_ids) + answer_types),
        }

    def batch(self, indices: list[int]) -> dict:
        """Joins examples: patches in a row (P, .), tokens padded on the right (B, T)."""
        items = [self[index] for index in indices]
        batch = {name: torch.cat([item[name] for item in items])
                 for name in ("pixel_values", "image_grid_thw", "coefficients")}
        padding = {"input_ids": self.tokenizer.pad_token_id, "slot_types": PROMPTED}
        for name, value in padding.items():
            rows = [item[name] for item in items]
            batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        # Exactly the answer is supervised, its end token included.
        is_prompt = batch["slot_types"] == PROMPTED
        batch["labels"] = batch["input_ids"].masked_fill(is_prompt, IGNORE_INDEX)
        return batch

def load_batches(dataset: FaceDataset, order: list[list[int]]) -> Iterator[dict]:
    """Yields the batches of `order`, a list of indices each, which threads read in advance.

    Threads, not processes: decoding and resizing let other threads run, nothing passes through
    shared memory, of which containers may have too little, and an error arrives as it was raised.
    """
    with ThreadPoolExecutor(LOADERS) as pool:
        waiting = deque()
        for indices in order:
            waiting.append(pool.submit(dataset.batch, indices))
            if len(waiting) > BATCHES_AHEAD:
                yield waiting.popleft().result()
        for batch in waiting:
            yield batch.result()

# ---- LoRA ----------------------------------------------------------------------------------------
class LoraLinear(nn.Module):
    """y = W x + alpha / r B A x (LoRA, arXiv 2106.09685, Eq. 3): W is frozen, B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # (B, T, out)
        low = F.linear(x, self.lora_A)  # (B, T, r)
        return y + self.scale * F.linear(low, self.lora_B)

def add_lora(model: nn.Module, rank: int, alpha: float) -> None:
    """Freezes the model and puts a LoraLinear in place of every linear of its language model."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if re.fullmatch(LORA_TARGETS, path):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, LoraLinear(module, rank, alpha))

# ---- Loss and loop -------------------------------------------------------------------------------
def hidden_states(model: nn.Module, batch: dict) -> Tensor:
    """The language model's last hidden states (B, T, D)."""
    # No attention mask: padding stands on the right, where a causal model does not look.
    return model.model(
        input_ids=batch["input_ids"],
        mm_token_type_ids=(batch["input_ids"] == model.config.image_token_id).long(),
        pixel_values=batch["pixel_values"], image_grid_thw=batch["image_grid_thw"],
        use_cache=False).last_hidden_state

def cross_entropy(model: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats of hidden states (B, T, D) and labels (B, T), summed over N tokens."""
    def part_sum(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = model.lm_head(hidden).float()  # (N, vocabulary)
        return F.cross_entropy(logits, labels, reduction="sum")

    supervised = labels != IGNORE_INDEX
    hidden, labels = hidden[supervised], labels[supervised]  # (N, D), (N,)
    at_once = LOSS_LOGITS // model.config.text_config.vocab_size  # tokens
    if len(labels) <= at_once:
        return part_sum(hidden, labels)

    # With a large vocabulary, a part of the logits at a time, made again in the backward pass.
    nats = 0.0
    for part in zip(hidden.split(at_once), labels.split(at_once)):
        nats = nats + checkpoint(part_sum, *part, use_reentrant=False)
    return nats

def squared_error(model: nn.Module, hidden: Tensor, batch: dict, value_ids: Tensor) -> Tensor:
    """Squared error of the coefficients' expected values, summed (regression-aware fine-tuning).

    `hidden` (B, T-1, D) predicts the tokens that follow. `value_ids` (11, L) are the tokens of 0.0,
    0.1 and so on. Where digits are split (L = 3) the options are the tenths behind "0.", and 1.0 is
    left to cross-entropy.
    """
    target = batch["coefficients"]  # (B, C)
    is_number = batch["slot_types"][:, 1:] == NUMBER  # (B, T-1), as long as hidden
    states = hidden[is_number].view(*target.shape, -1, hidden.shape[-1])  # (B, C, L, D)
    last = states[:, :, -1]  # (B, C, D): predicts the last token of a number

    digits_are_split = value_ids.shape[1] > 1
    option_ids = value_ids[:10 if digits_are_split else 11, -1]  # (O,)
    scores = F.linear(last, model.lm_head.weight[option_ids]).float()  # (B, C, O)
    values = torch.arange(len(option_ids), device=hidden.device) / 10  # (O,)
    # A matrix product would be in bfloat16 under autocast, which is too coarse here.
    expected = (scores.softmax(dim=-1) * values).sum(dim=-1)  # (B, C)
    errors = (expected - target) ** 2
    if digits_are_split:
        errors = errors * (target < 0.95)  # the others are written 1.0
    return errors.sum()

def answer_loss(model: nn.Module, batch: dict, value_ids: Tensor | None = None) -> tuple:
    """(cross-entropy in nats summed over supervised tokens, squared error summed over numbers, or 0
    without `value_ids`)."""
    hidden = hidden_states(model, batch)[:, :-1]  # (B, T-1, D): position t predicts token t + 1
    nats = cross_entropy(model, hidden, batch["labels"][:, 1:])
    squared = 0.0 if value_ids is None else squared_error(model, hidden, batch, value_ids)
    return nats, squared

def lr_scale(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to 3%."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warmup * (0.03 + 0.97 * cosine)

def sum_over_processes(tensors: list[Tensor]) -> None:
    """Adds up each tensor over all processes of torchrun, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)

def make_adamw(params) -> torch.optim.Optimizer:
    """AdamW, which leaves alone what gets no gradient, such as the frozen weights."""
    return torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)

def batch_order(count: int, args: Namespace) -> list[list[int]]:
    """Record indices of all this process's batches: a function of the seed and the sizes alone."""
    total = args.steps * args.grad_accum * args.world_size * args.batch_size
    rng = torch.Generator().manual_seed(args.seed)
    shuffles = [torch.randperm(count, generator=rng) for _ in range(math.ceil(total / count))]
    order = torch.cat(shuffles)[:total].view(-1, args.world_size, args.batch_size)
    return order[:, args.rank].tolist()  # (batches, B)

def train(model: nn.Module, optimizers: list, dataset: FaceDataset, val_set: FaceDataset,
          args: Namespace, start: int) -> None:
    """Trains from step `start` on, saves, validates and logs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    value_ids = None
    if args.expectation_weight:
        value_ids = torch.tensor(dataset.value_ids, device=args.device)  # (11, L)
    autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16,
                              enabled=args.dtype == "bfloat16")
    samples = args.batch_size * args.grad_accum * args.world_size  # a step
    numbers = samples * len(ARKIT_NAMES)
    pad_id = dataset.tokenizer.pad_token_id
    batches = load_batches(dataset, batch_order(len(dataset), args)[start * args.grad_accum:])
    began, losses, tokens = time.time(), [], 0

    for step in tqdm(range(start, args.steps), initial=start, total=args.steps,
                     disable=True if args.rank else None):
        # The learning rate of this step.
        lr = args.lr * lr_scale(step, args.steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

        # Fetch the batches and count what all processes supervise, before corrupt() takes some of
        # it away. Every loss is divided by that count, so losses and gradients are summed over
        # passes and processes, never averaged.
        step_batches = list(islice(batches, args.grad_accum))
        supervised = sum((batch["labels"] != IGNORE_INDEX).sum() for batch in step_batches)
        supervised = supervised.to(args.device)
        sum_over_processes([supervised])

        # Forward and backward.
        loss = 0.0
        for k, batch in enumerate(step_batches):
            tokens += int((batch["input_ids"] != pad_id).sum())
            batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
            with autocast:
                if args.corrupt:  # for the tiny model, see its section
                    batch = corrupt(model, batch, step * args.grad_accum + k, pad_id, args)
                nats, squared = answer_loss(model, batch, value_ids)
                part = nats / supervised + args.expectation_weight * squared / numbers
            part.backward()
            loss += part.detach()
        sum_over_processes([loss, *(p.grad for p in trained)])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"the loss is no number at step {step}; start anew with a lower --lr "
                             "and another --out")

        # The update.
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        # Save first: nothing that follows can lose the step.
        done = step + 1
        saves = done % args.save_every == 0 or done == args.steps
        if args.rank == 0 and saves:
            save_state(model, optimizers, done, args)

        # The log.
        if args.rank == 0 and (saves or done % LOG_STEPS == 0):
            seconds = time.time() - began
            line = {"step": done, "loss": sum(losses) / len(losses), "lr": lr,
                    "samples/s": samples * len(losses) / seconds,
                    "tokens/s": tokens * args.world_size / seconds}
            if val_set:
                with autocast:
                    line["val_loss"] = validate(model, val_set, args)
            with Path(args.out, "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            tqdm.write(", ".join(f"{name} {value:.4g}" for name, value in line.items()), sys.stdout)
            began, losses, tokens = time.time(), [], 0

@torch.no_grad()
def validate(model: nn.Module, val_set: FaceDataset, args: Namespace) -> float:
    """Teacher-forced cross-entropy in nats a token, which only watches over the run."""
    model.eval()
    nats, count = 0.0, 0
    for indices in torch.arange(len(val_set)).split(args.batch_size):
        batch = val_set.batch(indices.tolist())
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        nats += answer_loss(model, batch)[0]
        count += (batch["labels"] != IGNORE_INDEX).sum()
    model.train()
    return float(nats / count)

# ---- Saving and resuming -------------------------------------------------------------------------
def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

def save_state(model: nn.Module, optimizers: list, step: int, args: Namespace) -> None:
    """Writes state.pt under a temporary name and renames it, so that state.pt is always whole."""
    state = {"args": vars(args), "step": step, "model": trained_weights(model),
             "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    partial = Path(args.out, "state.partial")
    torch.save(state, partial)
    partial.replace(partial.with_suffix(".pt"))

def read_state(out: str) -> dict:
    """The state of an unfinished run."""
    path = Path(out, "state.pt")
    if not path.is_file():
        raise SystemExit(f"--resume: {out} holds no unfinished run; start without --resume")
    return torch.load(path, map_location="cpu", weights_only=True)

def restore(model: nn.Module, optimizers: list, out: str) -> int:
    """Loads weights and optimizers of an unfinished run. Returns how many steps it has done."""
    state = read_state(out)
    model.load_state_dict(state["model"], strict=False)
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return state["step"]

def save_checkpoint(model: nn.Module, tokenizer, image_processor, args) -> None:
    """Writes what infer.py loads, an adapter as peft does. run.json marks the run as finished."""
    out = Path(args.out)
    if args.lora_rank:
        weights = {f"base_model.model.{name}.weight": weight.float().cpu()
                   for name, weight in trained_weights(model).items()}
        save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
        base = os.path.realpath(args.model) if os.path.isdir(args.model) else args.model
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": args.lora_rank,
                  "lora_alpha": args.lora_alpha, "bias": "none",
                  "target_modules": LORA_TARGETS, "base_model_name_or_path": base}
        (out / "adapter_config.json").write_text(json.dumps(config, indent=1))
    else:
        for part in (model, tokenizer, image_processor):
            part.save_pretrained(out)
    run = {**vars(args), "prompt": PROMPT, "torch": torch.__version__,
           "transformers": transformers.__version__}
    (out / "run.json").write_text(json.dumps(run, indent=1))
    (out / "state.pt").unlink()

# ---- Records, a pretrained model, settings -------------------------------------------------------
def check_coefficients(coefficients: dict) -> None:
    """Raises ValueError or KeyError unless the 52 ARKit names have a number from 0 to 1 each."""
    if len(coefficients) != len(ARKIT_NAMES):
        raise ValueError(f"{len(coefficients)} coefficients; expected the 52 ARKit names")
    for name in ARKIT_NAMES:
        value = coefficients[name]
        if type(value) not in (int, float) or not 0 <= value <= 1:  # True and NaN are neither
            raise ValueError(f"{name} is {value!r:.40}; expected a number from 0 to 1")

def read_records(path: Path, supervision: str, limit: int | None) -> list[dict]:
    """Reads annotated records. SystemExit names the first line that cannot be used."""
    records, number = [], 0
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.strip() or len(records) == limit:
                    continue
                record = json.loads(line)
                check_coefficients(record["coefficients"])
                # Of a record without a picture, None as text, so that it is missed like any other.
                record["image"] = str(path.parent / str(record["image"]))
                if not Path(record["image"]).is_file():
                    raise ValueError(f"there is no picture {record['image']}")
                if "analysis" in PARTS[supervision]:
                    words = "".join(record["description"][field] for field in FIELDS)
                    if re.search(r"<\|\w+\|>", words):
                        raise ValueError("the description holds a special token of the model")
                records.append(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}, line {number}: {error}; expected records "
                         "with image, coefficients and description, as annotate.py writes them")
    if not records:
        raise SystemExit(f"{path} is empty; make it: annotate.py INPUT --out {path}")
    return records

def prepare_records(args: Namespace) -> tuple[list[dict], list[dict]]:
    """The records for training and for validation, which may be none."""
    data = Path(args.data)
    records = read_records(data, args.supervision, args.limit)
    val = Path(args.val) if args.val else data.with_name("val.jsonl")
    val_records = []
    if args.val or val.is_file() and val != data:
        val_records = read_records(val, args.supervision, VAL_RECORDS)
    if args.rank == 0:
        people = {record.get("identity", record["image"]) for record in records}
        print(f"{data}: {len(records)} faces of {len(people)} people; validation loss on "
              f"{val if val_records else 'nothing, name records with --val'}")
    return records, val_records

def load_pretrained(args: Namespace) -> tuple:
    """(model, tokenizer, image processor) of --model; its vision encoder stays frozen."""
    try:
        kind = AutoConfig.from_pretrained(args.model).model_type
        if kind not in ("qwen3_vl", "qwen2_5_vl"):
            raise ValueError(f"it is a {kind}, expected qwen3_vl or qwen2_5_vl")
        # AutoProcessor would need torchvision for its video half. These two do all that is needed.
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(args.model)
        dtype = torch.bfloat16 if args.lora_rank and args.dtype == "bfloat16" else torch.float32
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"--model {args.model} cannot be loaded: {str(error):.300}".split("\n")[0])

    model.model.visual.requires_grad_(False)
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha)
    if args.checkpointing:
        model.activation_checkpointing_enable()
        # The library makes embedded inputs require a gradient, Qwen2.5-VL's patches among them, for
        # which every backward pass would go through the frozen vision encoder, in vain.
        model.disable_input_require_grads()
    if args.compile:
        torch._dynamo.config.suppress_errors = True  # without a C compiler, warn and go on
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=True)  # one graph serves all layers and all lengths
    return model, tokenizer, image_processor

def resolve_settings(args: Namespace) -> None:
    """Fills in what depends on the model and the machine. SystemExit on unusable values."""
    # The machine.
    args.rank = int(os.environ.get("RANK", 0))
    args.world_size = int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = args.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: torch sees no GPU; use --device cpu")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if on_gpu else "float32"

    # The model.
    is_tiny = args.model == "tiny"
    defaults = {**(TINY if is_tiny else PRETRAINED), "compile": on_gpu and not is_tiny,
                "corrupt": is_tiny and args.supervision == "semantic"}
    if args.limit and args.steps is None and args.epochs is None:
        args.epochs = 1.0
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    # Numbers have to be positive. These may also be 0, and none is negative.
    may_be_zero = ("lora_rank", "expectation_weight", "seed", "rank")
    for name, value in vars(args).items():
        # NaN is not larger than 0 either.
        if type(value) in (int, float) and not value > 0 and (value or name not in may_be_zero):
            raise SystemExit(f"--{name.replace('_', '-')} {value}: expected a larger number")
    if is_tiny and args.lora_rank:
        raise SystemExit("--lora-rank needs a pretrained --model; tiny trains all its weights")
    done, begun = Path(args.out, "run.json"), Path(args.out, "state.pt")
    if done.is_file() or begun.is_file() and not args.resume:
        raise SystemExit(f"--out {args.out} holds a run; name another folder, delete it or, if it "
                         "is unfinished, add --resume")

# ---- The demo's tiny model: skip this with a real one --------------------------------------------
# It has no pretraining, so it gets a tokenizer of its own, an optimizer that learns in fewer steps,
# and answers in which words are hidden and sampled.
# Shares of the tokens that are hidden, at the first step and at the last: of the prompt, the
# skeleton, texts and numbers.
HIDDEN = torch.tensor([[0.0, 0.0, 0.4, 1.0], [0.0, 0.0, 0.2, 0.1]])
CANDIDATES = 10  # words are sampled among so many
TEMPERATURE = 1.5  # of sampled words, so that they err as the model's own do at inference
BLOCK_ROWS = 96  # that Muon makes orthogonal at a time, a divisor of every matrix' rows
BATCH_STRIDE = 1009  # between the seeds of two batches. Runs with a --seed below it share none
# Qwen-VL's special tokens, and what its settings call their ids.
SPECIAL = {"<|vision_start|>": "vision_start_token_id", "<|vision_end|>": "vision_end_token_id",
           "<|image_pad|>": "image_token_id", "<|video_pad|>": "video_token_id"}
# Weights start near 1 / sqrt(width). The library's 0.02 suits widths of thousands.
TINY_TEXT = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24,
             "initializer_range": 0.08, "tie_word_embeddings": True, "bos_token_id": None,
             "max_position_embeddings": 4096,
             "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0,
                                 "mrope_section": [4, 4, 4]}}
TINY_VISION = {"depth": 3, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4,
               "patch_size": 8, "initializer_range": 0.04, "out_hidden_size": 96,
               "num_position_embeddings": 64, "deepstack_visual_indexes": [1]}
TINY_PIXELS = {"patch_size": 8, "merge_size": 2,
               "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # from -1 to 1

def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, so that any text encodes, with Qwen-VL's special tokens.

    The frequent phrases of `texts`, with the punctuation before them, are one token each
    (superwords, arXiv 2503.13423), and so are the pieces of the skeleton and the eleven values.
    "Jaw: jaw strongly opened, jaw slightly shifted left." has four tokens: "Jaw:", " jaw strongly
    opened", ", jaw slightly shifted left" and ".". Short answers train quickly.
    """
    ids = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab=ids, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *SPECIAL])

    phrases = Counter()  # words, with the comma, point or semicolon before and the colon behind
    for text in texts:
        phrases.update(re.findall(r"[,.;]?[^,.;:]+:?", text))
    pieces = [PROMPT, "user\n", "assistant\n", *VALUES]
    pieces += [phrase for phrase, _ in phrases.most_common(1000)]
    for supervision in PARTS:
        pieces += [text for text, _ in answer_skeleton(supervision)]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in dict.fromkeys(pieces)])
    return tokenizer

def build_tiny(records: list[dict]) -> tuple:
    """(model, tokenizer, image processor): a Qwen3-VL of a million parameters, D = 96, 3 layers."""
    texts = []
    for record in records:
        texts += (record.get("description") or {}).values()
    tokenizer = build_tokenizer(texts)
    image_processor = Qwen2VLImageProcessorPil(**TINY_PIXELS)
    special_ids = {name: tokenizer.convert_tokens_to_ids(token) for token, name in SPECIAL.items()}
    text = {**TINY_TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=text, vision_config=TINY_VISION, tie_word_embeddings=True, **special_ids))
    nn.init.normal_(model.model.visual.pos_embed.weight, std=0.5)  # as strong as content
    return model, tokenizer, image_processor

def orthogonalize(x: Tensor) -> Tensor:
    """U V^T, roughly, of the singular value decomposition U S V^T of each block (rows, width).

    Five Newton-Schulz steps, with the coefficients of torch.optim.Muon. No more rows than width.
    """
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        # 3.4445 x - 4.775 (x x^T) x + 2.0315 (x x^T)^2 x
        factor = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x

class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal, at the size of AdamW's (arXiv 2502.16982).

    For weights of one width, which are cut into blocks of BLOCK_ROWS rows, each orthogonal in
    itself (arXiv 2510.16981): the largest, of the image tower's mergers, need a fifth of the
    arithmetic so. All blocks are computed together, and in float32: torch.optim.Muon computes in
    bfloat16, for which many processors have no instructions and take 25 times as long.
    """

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        params = group["params"]
        rows = torch.cat([p.grad.flatten(1) for p in params])  # (all rows, width)
        grad = rows.unflatten(0, (-1, BLOCK_ROWS))  # (blocks, BLOCK_ROWS, width)
        # One momentum for all of them, kept with the first.
        momentum = self.state[params[0]].setdefault("momentum", torch.zeros_like(grad))
        momentum.lerp_(grad, 0.05)
        # Nesterov's momentum mixes the gradient in once more.
        update = orthogonalize(grad.lerp(momentum, 0.95))
        # Orthogonal rows times this have a root mean square of 0.2, as AdamW's updates do.
        size = 0.2 * math.sqrt(update.shape[2])

        lr = group["lr"]
        parts = update.flatten(0, 1).split([len(p) for p in params])  # (out, width) each
        for p, part in zip(params, parts):
            p.mul_(1 - lr * WEIGHT_DECAY).sub_(part.view_as(p), alpha=lr * size)

def tiny_optimizers(model: nn.Module) -> list:
    """A Muon for the matrices of each width, AdamW for embeddings, biases and norms."""
    matrices, others = {}, []
    for name, p in model.named_parameters():
        if p.dim() > 1 and not re.search("embed_tokens|pos_embed", name):
            matrices.setdefault(p[0].numel(), []).append(p)
        else:
            others.append(p)
    defaults = {"lr": 0.0}  # the loop sets it at every step
    return [make_adamw(others), *(Muon(alike, defaults) for alike in matrices.values())]

@torch.no_grad()
def corrupt(model: nn.Module, batch: dict, index: int, pad_id: int, args: Namespace) -> dict:
    """Returns the batch with tokens hidden and, in every other batch, words sampled.

    Word dropout (Bowman et al. 2016, Sec. 3.1): what is hidden has to be seen in the picture.
    Scheduled sampling (arXiv 1906.04331): numbers lean on the words before them, which at inference
    are the model's own. So in every other batch the part from the first number on, and only that,
    is learnt behind words that the model itself says in those places. In the others all is learnt,
    behind true words.
    """
    seed = args.seed + BATCH_STRIDE * (index * args.world_size + args.rank)
    rng = torch.Generator(args.device).manual_seed(seed)
    types = batch["slot_types"]  # (B, T)

    # Hide tokens.
    progress = index / (args.steps * args.grad_accum)
    shares = HIDDEN[0].lerp(HIDDEN[1], progress).to(args.device)[types]  # (B, T)
    is_hidden = torch.bernoulli(shares, generator=rng).bool()
    input_ids = batch["input_ids"].masked_fill(is_hidden, pad_id)
    if index % 2 == 0:
        return {**batch, "input_ids": input_ids}

    # What the model says in place of each word before the first number, all in one pass: behind the
    # true words, as far as they are not hidden.
    is_before = (types == NUMBER).cumsum(dim=1) == 0  # (B, T)
    is_word = is_before & (types == TEXT)
    n = int(is_before.sum(dim=1).max())  # the longest such part. Of shorter ones the rest is unused
    # Position t predicts token t + 1.
    hidden = hidden_states(model, {**batch, "input_ids": input_ids[:, :n]})[:, :-1]  # (B, n-1, D)
    logits = model.lm_head(hidden[is_word[:, 1:n]])  # (N, vocabulary), of N words
    # Image tokens without an image would break the model.
    logits[:, [model.config.image_token_id, model.config.video_token_id]] = -math.inf
    best, candidates = (logits / TEMPERATURE).topk(CANDIDATES)  # (N, K)
    # Of a model that has diverged every chance is NaN, and any word will do: the loss says so.
    chances = best.softmax(dim=-1).nan_to_num(1.0)
    choice = torch.multinomial(chances, 1, generator=rng)  # (N, 1)
    input_ids[is_word] = candidates.gather(1, choice)[:, 0]

    # What stands before the numbers is not supervised.
    return {**batch, "input_ids": input_ids,
            "labels": batch["labels"].masked_fill(is_before, IGNORE_INDEX)}

# ---- The stage itself ----------------------------------------------------------------------------
def main(args: Namespace) -> None:
    """Runs the stage."""
    if args.resume:  # by the settings of the run, wherever it goes on
        saved = read_state(args.out)["args"]
        vars(args).update(saved, out=args.out, device=args.device, resume=True)
    resolve_settings(args)
    if args.data == DEMO and not Path(DEMO).is_file() and args.rank == 0:
        print("drawing the demo first: python annotate.py", flush=True)
        subprocess.run([sys.executable, Path(__file__).with_name("annotate.py")])
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(args.device)
    if args.world_size > 1:  # the others wait here while the demo is drawn
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=6))
    torch.manual_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()

    # Data, model and optimizers.
    records, val_records = prepare_records(args)
    if args.epochs:
        batches = args.epochs * len(records) / (args.batch_size * args.world_size)  # a process
        args.steps, args.epochs = math.ceil(batches / args.grad_accum), None
    if args.model == "tiny":
        model, tokenizer, image_processor = build_tiny(records)
        optimizers = tiny_optimizers(model)
    else:
        model, tokenizer, image_processor = load_pretrained(args)
        optimizers = [make_adamw(model.parameters())]
    model.to(args.device).train()
    rest = (tokenizer, image_processor, args.supervision, args.max_pixels)
    dataset, val_set = FaceDataset(records, *rest), FaceDataset(val_records, *rest)
    start = restore(model, optimizers, args.out) if args.resume else 0

    # Train and write.
    Path(args.out).mkdir(parents=True, exist_ok=True)
    began = time.time()
    if args.rank == 0:
        total = sum(p.numel() for p in model.parameters())
        count = sum(p.numel() for p in trained_weights(model).values())
        print(f"torch {torch.__version__}, transformers {transformers.__version__}; {total:,} "
              f"parameters, {count:,} trained; from step {start} on by {vars(args)}", flush=True)
    train(model, optimizers, dataset, val_set, args, start)
    if args.rank == 0:
        save_checkpoint(model, tokenizer, image_processor, args)
        if on_gpu:
            print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        print(f"wrote {args.out} after {(time.time() - began) / 60:.1f} minutes")
        print(f"next: python infer.py --model {args.out} [PICTURES, if not the demo's]")

if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except torch.OutOfMemoryError:
        raise SystemExit("out of GPU memory; start anew with a lower --batch-size (and, for it, a "
                         "higher --grad-accum) and another --out")
    except OSError as error:  # a folder in place of a file, no right to write, a full disk
        raise SystemExit(f"{error}; name another file or folder")
    except KeyboardInterrupt:
        if not Path(arguments.out, "state.pt").is_file():
            raise SystemExit("interrupted before the first save; run the same command again")
        step = read_state(arguments.out)["step"]
        raise SystemExit(f"interrupted; {arguments.out} holds step {step}, --resume goes on there")
