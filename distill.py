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

Shapes: B images, T tokens, P patches, D width, C = 52 coefficients, N supervised tokens, O options.
"""
import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
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
PROMPT = "Describe the facial muscle movements, then give the 52 ARKit coefficients as JSON."
IGNORE_INDEX = -100  # the label of a token that is not supervised
SKELETON, TEXT, NUMBER = 0, 1, 2  # token types
# What flags that are not given stand for, with the tiny model and with a pretrained one.
DEFAULTS = {"steps": (3400, 2000), "lr": (1e-3, 1e-4), "expectation_weight": (25.0, 0.0),
            "grounding": (True, False), "max_pixels": (64 * 64, 512 * 512), "lora_rank": (0, 16)}
WARMUP_STEPS, LOG_STEPS = 30, 100  # of the learning rate; between two lines of the log
VAL_RECORDS = 64  # for the validation loss, which only watches over the run: evaluate.py measures
VAL_SHARE = 0.05  # of the records, held out where no validation file is given
WORKERS = 2  # processes that open pictures and tokenise
LOSS_LOGITS = 2**27  # logits that exist at a time, 0.5 GB: Qwen's vocabulary has 151,936 tokens

def parse_args(argv=None) -> argparse.Namespace:
    """Reads the command line, or `argv`."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    by_model = {name: f"(default: {tiny} for tiny, {pretrained} for a pretrained model)"
                for name, (tiny, pretrained) in DEFAULTS.items()}
    add("--data", default="data/demo/train.jsonl", help="annotated records (default %(default)s)")
    add("--val", help="validation records (default: val.jsonl beside --data, or some identities)")
    add("--model", default="tiny", help="tiny, or a Qwen-VL's hub id or folder (default tiny)")
    add("--out", default="runs/demo", help="run folder (default %(default)s)")
    add("--supervision", choices=list(PARTS), default="semantic",
        help="description then numbers, numbers only, or numbers first (default %(default)s)")
    add("--steps", type=int, help=f"optimizer steps {by_model['steps']}")
    add("--epochs", type=float, help="passes over the records, instead of --steps")
    add("--expectation-weight", type=float, help="of the squared error of each coefficient's "
        f"expected value, beside cross-entropy {by_model['expectation_weight']}")
    add("--batch-size", type=int, default=8, help="images per pass and GPU (default %(default)s)")
    add("--grad-accum", type=int, default=1, help="passes per optimizer step (default %(default)s)")
    add("--lr", type=float, help=f"peak learning rate {by_model['lr']}")
    add("--lora-rank", type=int, help=f"0: all weights, at --lr 1e-5 {by_model['lora_rank']}")
    add("--lora-alpha", type=float, default=32.0, help="weight: alpha / rank (default %(default)s)")
    add("--checkpointing", action=switch, default=True, help="with LoRA: less memory, slower")
    add("--grounding", action=switch,
        help=f"hide and sample words, which teaches to look {by_model['grounding']}")
    add("--max-pixels", type=int, help=f"larger pictures are shrunk {by_model['max_pixels']}")
    add("--save-every", type=int, default=500, help="steps between saves (default %(default)s)")
    add("--resume", action=switch, default=False, help="go on with --out, by its settings")
    add("--limit", type=int, help="first records only; one pass unless --steps or --epochs")
    add("--seed", type=int, default=0, help="of weights, order, hidden words (default %(default)s)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of arithmetic and frozen weights; auto is bfloat16 on a GPU (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser.parse_args(argv)

# ---- The answer and its supervision --------------------------------------------------------------
# A training sequence, shortened. The answer and its end token are supervised, the prompt is not:
#   <|im_start|>user
#   <|vision_start|><|image_pad|>...<|vision_end|>Describe the ... as JSON.<|im_end|>
#   <|im_start|>assistant
#   {"analysis": {"expression_category": "slight happiness", ..., "symmetry": "symmetric"},
#   "arkit": {"eyeBlinkLeft": 0.1, "eyeLookDownLeft": 0.0, ..., "tongueOut": 0.0}}<|im_end|>

# The next three functions stand in infer.py too, check_coefficients in evaluate.py, word for word.
def prompt_text(prompt: str, image_tokens: int) -> str:
    """The Qwen-VL chat up to the answer, with the image's placeholder tokens written by hand."""
    image = "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
    return f"<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n"

def answer_skeleton(supervision: str) -> list[tuple]:
    """The answer as (fixed text, slot) pairs; a slot is a field, a coefficient or, last, None."""
    # An answer with 999 in every slot, cut there.
    blanks = {"analysis": dict.fromkeys(FIELDS, "999"), "arkit": dict.fromkeys(ARKIT_NAMES, 999)}
    answer = {part: blanks[part] for part in PARTS[supervision]}
    slots = [slot for part in answer.values() for slot in part]
    return list(zip(json.dumps(answer).split("999"), [*slots, None]))

def open_image(path: str) -> Image.Image:
    """Opens a picture upright and in RGB: 16-bit grey is scaled, transparency becomes white."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

class FaceDataset(Dataset):
    """One record -> pixels, token ids with labels and token types (T,), coefficients (1, C)."""

    def __init__(self, records: list[dict], tokenizer, image_processor, supervision: str,
                 max_pixels: int):
        self.records, self.tokenizer, self.image_processor = records, tokenizer, image_processor
        token_side = image_processor.patch_size * image_processor.merge_size  # pixels
        self.size = {"shortest_edge": token_side ** 2, "longest_edge": max_pixels}  # pixel counts
        self.skeleton = [(self.encode(text), slot) for text, slot in answer_skeleton(supervision)]
        self.value_ids = {value: self.encode(value) for value in VALUES}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_answer(self, record: dict) -> tuple[list[int], list[int]]:
        """Token ids and types of the answer, each piece tokenised alone as infer.py feeds it."""
        ids, types = [], []
        for skeleton_ids, slot in self.skeleton:
            if slot in FIELDS:
                text = json.dumps(record["description"][slot], ensure_ascii=False)[1:-1]
                slot_ids, slot_type = self.encode(text), TEXT
            elif slot in ARKIT_NAMES:
                slot_ids, slot_type = self.value_ids[f"{record['coefficients'][slot]:.1f}"], NUMBER
            else:
                slot_ids, slot_type = [self.tokenizer.eos_token_id], SKELETON
            ids += skeleton_ids + slot_ids
            types += [SKELETON] * len(skeleton_ids) + [slot_type] * len(slot_ids)
        return ids, types

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        try:
            image = open_image(record["image"])
            pixels = self.image_processor([image], size=self.size, return_tensors="pt")
        except Exception as error:  # Pillow's readers raise a dozen types on damaged files
            raise OSError(f"{record['image']} cannot be used ({error}); drop its record")
        image_tokens = int(pixels["image_grid_thw"].prod()) // self.image_processor.merge_size ** 2
        prompt_ids = self.encode(prompt_text(PROMPT, image_tokens))
        answer_ids, answer_types = self.encode_answer(record)
        return {
            **pixels,  # pixel_values (P, .) and image_grid_thw (1, 3)
            "coefficients": torch.tensor([[record["coefficients"][name] for name in ARKIT_NAMES]]),
            "input_ids": torch.tensor(prompt_ids + answer_ids),
            "labels": torch.tensor([IGNORE_INDEX] * len(prompt_ids) + answer_ids),
            "token_types": torch.tensor([SKELETON] * len(prompt_ids) + answer_types),
        }

    def collate(self, items: list[dict]) -> dict:
        """Joins items: patches follow one another (P, .), tokens are padded on the right (B, T)."""
        batch = {name: torch.cat([item[name] for item in items])
                 for name in ("pixel_values", "image_grid_thw", "coefficients")}
        padding = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORE_INDEX,
                   "token_types": SKELETON}
        for name, value in padding.items():
            rows = [item[name] for item in items]
            batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        image_pad_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        batch["mm_token_type_ids"] = (batch["input_ids"] == image_pad_id).long()
        return batch

# ---- LoRA ----------------------------------------------------------------------------------------
class LoraLinear(nn.Module):
    """y = W x + alpha / r B A x (LoRA, arXiv 2106.09685, Eq. 3): W is frozen, B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (B, T, out)
        low = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # (B, T, r)
        return y + self.scale * F.linear(low, self.lora_B).to(y.dtype)

def add_lora(model: nn.Module, rank: int, alpha: float, checkpointing: bool) -> None:
    """Freezes the model and puts a LoraLinear in place of every linear of its language model."""
    model.requires_grad_(False)
    for parent in list(model.model.language_model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                setattr(parent, name, LoraLinear(module, rank, alpha))
    if checkpointing:
        # The re-entrant form would find no input that requires a gradient and train nothing.
        model.gradient_checkpointing_enable({"use_reentrant": False})

# ---- Loss and loop -------------------------------------------------------------------------------
def hidden_states(model: nn.Module, batch: dict) -> torch.Tensor:
    """The language model's last hidden states (B, T, D)."""
    names = ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    # No attention mask: padding stands on the right, where a causal model does not look.
    inputs = {name: batch[name] for name in names}
    return model.model(**inputs, use_cache=False).last_hidden_state

def cross_entropy(model: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of hidden states (B, T, D) and labels (B, T), summed over N tokens."""
    def part_sum(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.lm_head(hidden).float(), labels, reduction="sum")

    supervised = labels != IGNORE_INDEX
    hidden, labels = hidden[supervised], labels[supervised]  # (N, D), (N,)
    # With a large vocabulary, a part of the logits at a time, made again in the backward pass.
    count = max(1, LOSS_LOGITS // model.config.text_config.vocab_size)
    if len(labels) <= count:
        return part_sum(hidden, labels)
    parts = zip(hidden.split(count), labels.split(count))
    return sum(checkpoint(part_sum, *part, use_reentrant=False) for part in parts)

def squared_error(model: nn.Module, hidden: torch.Tensor, batch: dict,
                  option_ids: list[int]) -> torch.Tensor:
    """Squared error of the coefficients' expected values, summed (regression-aware fine-tuning).

    `hidden` (B, T-1, D) predicts tokens 1 to T-1, `option_ids` (O,) are the last tokens of 0.0, 0.1
    and so on: all eleven values where a number is one token. Where digits are split, they are the
    tenths behind "0.", and 1.0 is left to cross-entropy.
    """
    target, shape = batch["coefficients"], batch["coefficients"].shape  # (B, C)
    is_number = batch["token_types"][:, 1:] == NUMBER  # (B, T-1)
    last = hidden[is_number].view(*shape, -1, hidden.shape[-1])[:, :, -1]  # (B, C, D)
    scores = F.linear(last, model.lm_head.weight[option_ids]).float()  # (B, C, O)
    values = torch.arange(len(option_ids), device=hidden.device) / 10
    with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would be too coarse
        errors = (scores.softmax(dim=-1) @ values - target) ** 2  # (B, C)
    if len(option_ids) < len(VALUES):
        errors = errors * (target < 0.95)
    return errors.sum()

def answer_loss(model: nn.Module, batch: dict, option_ids: list[int]) -> tuple:
    """(cross-entropy in nats summed over supervised tokens, squared error summed over numbers)."""
    hidden = hidden_states(model, batch)[:, :-1]  # (B, T-1, D): position t predicts token t + 1
    nats = cross_entropy(model, hidden, batch["labels"][:, 1:])
    return nats, squared_error(model, hidden, batch, option_ids)

def lr_scale(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to 3%."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.03 + 0.97 * cosine)

def sum_over_processes(tensors: list[torch.Tensor]) -> None:
    """Adds up tensors over all processes of torchrun, in place and in one message."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))

def train(model: nn.Module, optimizer: torch.optim.Optimizer, dataset: FaceDataset,
          val_set: FaceDataset, args: argparse.Namespace, start: int) -> None:
    """Trains from step `start` on, logs and saves. Ctrl-C saves, then raises SystemExit."""
    interrupts = []
    signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))  # the workers inherit it
    order = batch_order(len(dataset), args)[start * args.grad_accum:]
    batches = iter(DataLoader(dataset, batch_sampler=order, collate_fn=dataset.collate,
                              num_workers=WORKERS))
    trained = [p for p in model.parameters() if p.requires_grad]
    option_ids = list(dict.fromkeys(dataset.encode(value)[-1] for value in VALUES))
    pad_id = dataset.tokenizer.pad_token_id
    numbers = args.batch_size * args.grad_accum * args.world_size * len(ARKIT_NAMES)
    autocast = torch.autocast(args.device.partition(":")[0], torch.bfloat16,
                              enabled=args.dtype == "bfloat16")
    bar = tqdm(total=args.steps, initial=start, unit=" steps", disable=True if args.rank else None)
    began, losses, samples, tokens = time.time(), [], 0, 0

    for step in range(start, args.steps):
        # The learning rate of this step.
        lr = args.lr * lr_scale(step, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The batches of this step, and how many tokens they supervise in all processes.
        try:
            step_batches = list(islice(batches, args.grad_accum))
        except OSError as error:  # a worker could not use a picture: the last line says which
            raise SystemExit(str(error).strip().rpartition("\n")[2])
        supervised = sum((batch["labels"] != IGNORE_INDEX).sum() for batch in step_batches)
        supervised = supervised.to(args.device)
        sum_over_processes([supervised])

        # Forward and backward. All divide by the counts of all processes: gradients simply add up.
        loss = torch.zeros(1, device=args.device)
        for k, batch in enumerate(step_batches):
            tokens += int((batch["input_ids"] != pad_id).sum()) * args.world_size
            batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
            with autocast:
                if args.grounding:  # for the tiny model, see its section
                    nats, squared = grounded_loss(model, batch, option_ids, pad_id, args,
                                                  step * args.grad_accum + k)
                else:
                    nats, squared = answer_loss(model, batch, option_ids)
                part = nats / supervised + args.expectation_weight * squared / numbers
            part.backward()
            loss += part.detach()

        # The gradients of all processes; with them the loss and whether Ctrl-C was pressed.
        stop = torch.full((1,), float(len(interrupts)), device=args.device)
        gradients = [p.grad for p in trained if p.grad is not None]
        sum_over_processes([*gradients, loss, stop])
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is {loss.item()} at step {step}; choose a lower --lr")

        # The update.
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

        # The log and, from time to time, the state that --resume goes on from.
        losses.append(loss.item())
        samples += args.batch_size * args.grad_accum * args.world_size
        bar.update()
        done, stopping = step + 1, stop.item() > 0
        saving = done % args.save_every == 0 or done == args.steps or stopping
        if (saving or done % LOG_STEPS == 0) and args.rank == 0:
            seconds = time.time() - began
            line = {"step": done, "loss": sum(losses) / len(losses), "lr": lr,
                    "samples/s": samples / seconds, "tokens/s": tokens / seconds}
            if saving and len(val_set):
                with autocast:
                    line["val_loss"] = validate(model, val_set, args)
            if saving:
                save_state(model, optimizer, done, args)
            with Path(args.out, "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            bar.write(" | ".join(f"{name} {value:.4g}" for name, value in line.items()), sys.stdout)
            began, losses, samples, tokens = time.time(), [], 0, 0
        if stopping and done < args.steps:
            raise SystemExit(f"interrupted after step {done}; nothing is lost, add --resume")
    bar.close()

def batch_order(count: int, args: argparse.Namespace) -> list[list[int]]:
    """Record indices of all this process's batches: a function of the seed and the sizes alone."""
    total = args.steps * args.grad_accum * args.world_size * args.batch_size
    rng = torch.Generator().manual_seed(args.seed)
    epochs = [torch.randperm(count, generator=rng) for _ in range(math.ceil(total / count))]
    order = torch.cat(epochs)[:total].view(-1, args.world_size, args.batch_size)
    return order[:, args.rank].tolist()

@torch.no_grad()
def validate(model: nn.Module, val_set: FaceDataset, args: argparse.Namespace) -> float:
    """Cross-entropy in nats a token behind the true beginning: it only watches over the run."""
    model.eval()
    nats, count = 0.0, 0
    for batch in DataLoader(val_set, args.batch_size, collate_fn=val_set.collate):
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        hidden = hidden_states(model, batch)[:, :-1]  # (B, T-1, D)
        nats += cross_entropy(model, hidden, batch["labels"][:, 1:]).item()
        count += int((batch["labels"] != IGNORE_INDEX).sum())
    model.train()
    return nats / count

# ---- Saving and resuming -------------------------------------------------------------------------
def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are trained, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

def save_state(model: nn.Module, optimizer, step: int, args: argparse.Namespace) -> None:
    """Writes state.pt under a temporary name and renames it, so that state.pt is always whole."""
    state = {"args": vars(args), "step": step, "model": trained_weights(model),
             "optimizer": optimizer.state_dict()}
    torch.save(state, Path(args.out, "state.partial"))
    os.replace(Path(args.out, "state.partial"), Path(args.out, "state.pt"))

def load_state(args: argparse.Namespace) -> dict:
    """Reads the state of the unfinished run in --out and takes over its settings."""
    path = Path(args.out) / "state.pt"
    if not path.is_file():
        raise SystemExit(f"--resume: {args.out} holds no unfinished run; start without --resume")
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = {name: getattr(args, name) for name in ("out", "device", "resume", "rank", "world_size")}
    vars(args).update({**state["args"], **own})
    return state

def save_checkpoint(model: nn.Module, tokenizer, image_processor, args) -> None:
    """Writes what infer.py loads, an adapter as peft does; run.json marks the run as finished."""
    out = Path(args.out)
    if args.lora_rank:
        weights = {f"base_model.model.{name}.weight": weight.float().cpu().contiguous()
                   for name, weight in trained_weights(model).items()}
        save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = "|".join(sorted({name.split(".")[-3] for name in weights}))
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": args.lora_rank,
                  "lora_alpha": args.lora_alpha, "lora_dropout": 0.0, "bias": "none",
                  "target_modules": rf".*language_model.*\.({targets})",
                  "base_model_name_or_path": args.model, "inference_mode": True}
        (out / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    else:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        image_processor.save_pretrained(out)
    run = {**vars(args), "prompt": PROMPT, "torch": torch.__version__,
           "transformers": transformers.__version__}
    (out / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (out / "state.pt").unlink()

# ---- Records, a pretrained model, settings -------------------------------------------------------
def check_coefficients(coefficients: dict) -> None:
    """Raises ValueError unless there are the 52 ARKit names, each with a number from 0 to 1."""
    different = sorted(set(coefficients) ^ set(ARKIT_NAMES), key=str)
    if different:
        raise ValueError(f"{str(different[:3]):.120} missing or unknown; expected 52 ARKit names")
    for name, value in coefficients.items():
        if type(value) not in (int, float) or not 0 <= value <= 1:  # True and NaN are neither
            raise ValueError(f"{name} is {value!r:.40}; expected a number from 0 to 1")

def read_records(path: Path, supervision: str, limit: int | None) -> list[dict]:
    """Reads annotated records. SystemExit names the first line that cannot be used."""
    if not path.is_file() or not path.stat().st_size:
        raise SystemExit(f"{path} does not exist or is empty; make it: annotate.py --out {path}")
    records = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(islice(file, limit), 1):
            try:
                record = json.loads(line)
                check_coefficients(record["coefficients"])
                record["image"] = str(path.parent / record["image"])
                Image.open(record["image"]).close()  # raises OSError if it is missing or no picture
                if "analysis" in PARTS[supervision]:
                    "".join(record["description"][field] for field in FIELDS)  # all are texts
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"{path}, line {number}: {type(error).__name__} {error}; expected "
                                 "a record with image, coefficients and description")
            records.append(record)
    return records

def hold_out(records: list[dict]) -> tuple[list[dict], list[dict]]:
    """Splits records into (training, validation): the last identities, or records if below five."""
    wanted = round(VAL_SHARE * len(records))
    people = [str(record.get("identity")) for record in records]
    count = Counter(people)
    if len(count) < 5:  # frames of one recording are alike: those nearest in time stay together
        return records[:len(records) - wanted], records[len(records) - wanted:]
    identities, held_out = sorted(count), set()
    while sum(count[identity] for identity in held_out) < wanted:
        held_out.add(identities.pop())
    training = [record for record, person in zip(records, people) if person not in held_out]
    validation = [record for record, person in zip(records, people) if person in held_out]
    return training, validation

def prepare_records(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The records for training and for validation. Draws the demo if it is wanted and missing."""
    data, script = Path(args.data), Path(__file__).with_name("annotate.py")
    if data == Path("data/demo/train.jsonl") and not data.is_file() and args.rank == 0:
        print("drawing the demo first: python annotate.py", flush=True)
        subprocess.run([sys.executable, str(script)], check=True)
    if dist.is_initialized():
        dist.barrier()
    records = read_records(data, args.supervision, args.limit)
    val = Path(args.val) if args.val else data.with_name("val.jsonl")
    if args.val or val.is_file() and val != data:
        return records, read_records(val, args.supervision, VAL_RECORDS)
    records, val_records = hold_out(records)
    return records, val_records[:VAL_RECORDS]

def load_pretrained(args: argparse.Namespace) -> tuple:
    """(model, tokenizer, image processor) of --model; its vision encoder stays frozen."""
    try:
        kind = AutoConfig.from_pretrained(args.model).model_type
        if kind not in ("qwen3_vl", "qwen2_5_vl"):
            raise ValueError(f"it is a {kind}, expected qwen3_vl or qwen2_5_vl")
        # AutoProcessor would need torchvision for its video half; these two do all that is needed.
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(args.model)
        dtype = torch.bfloat16 if args.lora_rank and args.dtype == "bfloat16" else torch.float32
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"--model {args.model} cannot be loaded: {str(error):.300}".split("\n")[0])
    model.model.visual.requires_grad_(False)
    return model, tokenizer, image_processor

def complete(args: argparse.Namespace) -> None:
    """Fills in what depends on the model and the machine. SystemExit on unusable values."""
    args.rank = int(os.environ.get("RANK", 0))
    args.world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: torch sees no GPU; use --device cpu")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    if args.limit and args.steps is None:
        args.epochs = args.epochs or 1.0
    for name, (tiny, pretrained) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, tiny if args.model == "tiny" else pretrained)
    if args.model == "tiny" and args.lora_rank > 0:
        raise SystemExit("--lora-rank needs a pretrained --model; tiny trains all its weights")
    for name, value in vars(args).items():
        least = 0 if name in ("lora_rank", "expectation_weight", "seed", "rank") else 1e-12
        if type(value) in (int, float) and value < least:
            raise SystemExit(f"--{name.replace('_', '-')} {value}: expected a larger number")
    if Path(args.out, "run.json").is_file():
        raise SystemExit(f"--out {args.out} holds a finished run; delete it or name another folder")
    if Path(args.out, "state.pt").is_file() and not args.resume:
        raise SystemExit(f"--out {args.out} holds an unfinished run; add --resume or delete it")

# ---- The demo's tiny model: skip this with a real one --------------------------------------------
# RMSE, seed 0. Commit 86a9bcc, 2,400 steps: 0.159 without sampling, 0.098 without hidden words,
# 0.094 so. 89adca3, numbers-first: 0.073 with a tenth of the numbers always hidden, 0.067 so.
HIDDEN = [(0.0, 0.0), (0.3, 0.1), (1.0, 0.1)]  # share at the first and last step, by token type
TEMPERATURE = 1.5  # of sampled words, to err as at inference: then RMSE 0.091, 0.094 was at 1.0
SPECIAL = ["vision_start", "vision_end", "image_pad", "video_pad"]  # Qwen-VL's tokens

def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for `texts` with Qwen-VL's special tokens: any text encodes.

    One token each: frequent words, phrases with the punctuation before them (superwords, arXiv
    2503.13423), the pieces of the skeleton and the eleven values. Short answers train quickly.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary += [word for word, _ in words.most_common(2000) if len(word) > 1]
    ids = {word: index for index, word in enumerate(vocabulary)}
    bpe = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    bpe.pre_tokenizer, bpe.decoder = split, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=[f"<|{name}|>" for name in ("im_start", *SPECIAL)])
    phrases = Counter(phrase for text in texts for phrase in re.findall(r"[,.]?[^,.:]+:?", text))
    pieces = [phrase for phrase, count in phrases.most_common(1000) if count >= 20]
    pieces += [PROMPT, "user\n", "assistant\n"] + VALUES
    pieces += [text for supervision in PARTS for text, _ in answer_skeleton(supervision)]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in dict.fromkeys(pieces)])
    return tokenizer

def build_tiny(records: list[dict], max_pixels: int) -> tuple:
    """(model, tokenizer, image processor): a Qwen3-VL of a million parameters, D = 96, 3 layers."""
    texts = [text for record in records for text in (record.get("description") or {}).values()]
    tokenizer = build_tokenizer(texts)
    to_unit = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # pixels from -1 to 1
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, **to_unit)
    special_ids = {f"{name.removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(
        f"<|{name}|>") for name in SPECIAL}
    # Weights start near 1 / sqrt(D); the library's 0.02 suits widths of thousands.
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 4, 4]}
    text = {"vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 192,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
            "head_dim": 24, "initializer_range": 0.08, "tie_word_embeddings": True,
            "max_position_embeddings": 4096, "rope_parameters": rope, "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"depth": 3, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4,
              "patch_size": 8, "initializer_range": 0.04, "out_hidden_size": 96,
              "num_position_embeddings": 64, "deepstack_visual_indexes": [1]}
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **special_ids))
    pictures = [open_image(record["image"]) for record in records[:400]]
    size = {"shortest_edge": 16 ** 2, "longest_edge": max_pixels}
    pixels = image_processor(pictures, size=size, return_tensors="pt")
    whiten_patches(model, pixels["pixel_values"])
    return model, tokenizer, image_processor

@torch.no_grad()
def whiten_patches(model: nn.Module, patches: torch.Tensor) -> None:
    """Starts the patch embedding as the whitening of real patches (P, .), as in arXiv 2404.00498:
    the fine differences that tell expressions apart are a tiny part of the pixels' variance.
    Commit 89adca3, numbers-first, seed 0: RMSE 0.067, without it 0.094. Other style: 0.172, 0.147.
    """
    image_tower = model.model.visual
    mean = patches.mean(dim=0)
    variances, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    width = image_tower.patch_embed.embed_dim
    whitening = (directions[:, -width:] / (variances[-width:] + 3e-3).sqrt()).T  # (D, .)
    projection = image_tower.patch_embed.proj
    projection.weight.copy_(whitening.view_as(projection.weight))
    projection.bias.copy_(-whitening @ mean)
    image_tower.pos_embed.weight.mul_(12)  # positions as strong as content

def grounded_loss(model: nn.Module, batch: dict, option_ids: list[int], pad_id: int,
                  args: argparse.Namespace, forward: int) -> tuple:
    """The loss of a forward pass in which words are hidden or sampled, to make the model look.

    Word dropout (Bowman et al. 2016, Sec. 3.1): while all numbers are hidden, the picture is their
    only source. Scheduled sampling (arXiv 1906.04331): numbers lean on the words before them, which
    at inference are the model's own. So words are trained behind true words, and the numbers, in a
    pass of their own, behind words that the model itself says in those places.
    """
    stream = forward * args.world_size + args.rank
    rng = torch.Generator().manual_seed(args.seed + 1009 * stream)  # keeps seeds 0, 1, 2, ... apart
    progress, types = forward / (args.steps * args.grad_accum), batch["token_types"]
    rates = torch.tensor([first + (last - first) * progress for first, last in HIDDEN])
    is_hidden = torch.rand(types.shape, generator=rng) < rates[types.cpu()]
    input_ids = batch["input_ids"].masked_fill(is_hidden.to(types.device), pad_id)
    if args.supervision != "semantic":
        return answer_loss(model, {**batch, "input_ids": input_ids}, option_ids)
    # The words behind the true words, in every other pass at twice the weight: an eighth faster.
    is_before = (types == NUMBER).cumsum(dim=1) == 0  # (B, T): before the first number
    n = int(is_before.sum(dim=1).max())  # in the longest answer
    part = {**batch, "input_ids": input_ids[:, :n],
            "mm_token_type_ids": batch["mm_token_type_ids"][:, :n]}
    trains_words = forward % 2 == 0
    with torch.set_grad_enabled(trains_words):
        states = hidden_states(model, part)[:, :-1]  # (B, n-1, D)
    labels = batch["labels"].masked_fill(~is_before, IGNORE_INDEX)[:, 1:n]
    word_nats = 2 * cross_entropy(model, states, labels) if trains_words else 0.0
    # The numbers behind sampled words, through which no gradient flows.
    is_word = types[:, 1:n] == TEXT
    logits = model.lm_head(states[is_word]).detach().float() / TEMPERATURE  # (words, V)
    logits[:, [model.config.image_token_id, model.config.video_token_id]] = -math.inf  # not words
    words = torch.multinomial(logits.softmax(dim=-1).cpu(), 1, generator=rng)[:, 0]
    drawn = input_ids.clone()
    drawn[:, 1:n][is_word] = words.to(types.device)
    labels = batch["labels"].masked_fill(is_before, IGNORE_INDEX)
    nats, squared = answer_loss(model, {**batch, "input_ids": drawn, "labels": labels}, option_ids)
    return word_nats + nats, squared

# ---- The stage itself ----------------------------------------------------------------------------
def main(args: argparse.Namespace) -> None:
    """Runs the stage."""
    complete(args)
    state = load_state(args) if args.resume else None
    if args.world_size > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    torch.manual_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()
    records, val_records = prepare_records(args)
    if args.epochs:
        batches = args.epochs * len(records) / (args.batch_size * args.grad_accum)
        args.steps = math.ceil(batches / args.world_size)
    if args.model == "tiny":
        model, tokenizer, image_processor = build_tiny(records, args.max_pixels)
    else:
        model, tokenizer, image_processor = load_pretrained(args)
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, args.checkpointing)
    model.to(args.device).train()
    dataset, val_set = (FaceDataset(part, tokenizer, image_processor, args.supervision,
                                    args.max_pixels) for part in (records, val_records))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    if state:
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    start = state["step"] if state else 0
    Path(args.out).mkdir(parents=True, exist_ok=True)
    began = time.time()
    if args.rank == 0:
        total, count = (sum(p.numel() for p in part) for part in (model.parameters(), trained))
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.device}, "
              f"{args.dtype}; {args.model}: {total:,} parameters, {count:,} trained")
        print(f"{len(records)} records, {len(val_records)} for validation, {args.supervision} "
              f"answers, steps {start} to {args.steps}", flush=True)
    train(model, optimizer, dataset, val_set, args, start)
    if args.rank == 0:
        save_checkpoint(model, tokenizer, image_processor, args)
        if args.device.startswith("cuda"):
            print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        print(f"wrote {args.out} after {(time.time() - began) / 60:.1f} minutes")
        print("next: python infer.py" + ("" if args.out == "runs/demo" else f" --model {args.out}"))

if __name__ == "__main__":
    try:
        main(parse_args())
    except torch.OutOfMemoryError:
        raise SystemExit("out of GPU memory; lower --batch-size (and raise --grad-accum for it)")
    except KeyboardInterrupt:
        raise SystemExit("interrupted before the first step; run the same command again")
