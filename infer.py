# SPDX-License-Identifier: MIT
"""Inference for SemanticFace (arXiv 2603.14827, Sec. 3.2): images -> description and 52 ARKit coefficients.

The answer's braces, names and quotes are known in advance, so they are fed to the model, not sampled: every
answer is valid and complete by construction. The model decides the words of the description and, for each
coefficient, a distribution over the eleven values 0.0, 0.1, ... 1.0, whose mean is the estimate (RAIL,
arXiv 2403.04182) and whose standard deviation is reported.

Reads:  pictures, folders of pictures, .jsonl records with an "image"; a checkpoint folder of distill.py
Writes: prediction records, one JSON object a line, image paths relative to the file; an unreadable picture
        becomes an error record; with --csv also a Live Link Face take
    {"image": "images/000001.png", "coefficients": {"jawOpen": 0.12, ...}, "std": {"jawOpen": 0.05, ...},
     "description": {"expression_category": "slight happiness", ...}, "error": null}

    python infer.py photo.jpg folder/ --model runs/demo --out predictions.jsonl --csv take.csv

Shapes: B images in a batch, T tokens so far, n new tokens, V vocabulary, C = 52 coefficients.
"""
import argparse
import csv
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image, ImageOps
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoTokenizer
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
ANGLES = ["HeadYaw", "HeadPitch", "HeadRoll", "LeftEyeYaw", "LeftEyePitch", "LeftEyeRoll",
          "RightEyeYaw", "RightEyePitch", "RightEyeRoll"]
MAX_TEXT_TOKENS = 400  # of one description field
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
    add("--fps", type=int, default=60, help="frames per second of the take (default %(default)s)")
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
            suffixes = Image.registered_extensions()
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
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
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            images.append(path.parent / json.loads(line)["image"])
        except (json.JSONDecodeError, KeyError, TypeError):
            example = '{"image": "images/000001.png", ...}'
            raise SystemExit(f"{path}, line {number}: no \"image\"; expected JSON lines such as {example}")
    return images


def open_image(path: str) -> Image.Image:
    """Opens a picture upright and in RGB, on white where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(path))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def try_image(source) -> tuple:
    """Returns (picture, None), or (None, why) where `source`, a path or an open picture, cannot be used."""
    try:
        picture = source.convert("RGB") if isinstance(source, Image.Image) else open_image(source)
        if max(picture.size) > MAX_ASPECT * min(picture.size):
            size = f"{picture.width} x {picture.height} pixels"
            raise ValueError(f"{size}, one side is over {MAX_ASPECT} times the other")
        return picture, None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return None, f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------

def load(model_dir: str, device: str = "cpu", dtype: str = "auto") -> SimpleNamespace:
    """Loads a checkpoint folder of distill.py for `predict`. SystemExit if it holds no finished one."""
    folder = Path(model_dir)
    if not (folder / "config.json").is_file() or not (folder / "run.json").is_file():
        fix = "make one with: python distill.py"
        if (folder / "state.pt").is_file():
            fix = f"finish the run with: python distill.py --out {folder} --resume"
        raise SystemExit(f"--model {folder} holds no finished checkpoint (config.json and run.json); {fix}")
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        auto = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        weights_dtype = auto if dtype == "auto" else getattr(torch, dtype)
        network = AutoModelForImageTextToText.from_pretrained(folder, dtype=weights_dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    except Exception as error:  # a damaged file surfaces as one of a dozen types, all with the same cure
        why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise SystemExit(f"--model {folder} cannot be read ({why}); copy it again or repeat distill.py")
    return SimpleNamespace(network=network.to(device).eval(), tokenizer=tokenizer, prompt=run["prompt"],
                           image_processor=image_processor, supervision=run["supervision"],
                           max_pixels=run["max_pixels"], device=torch.device(device))


def prompt_text(prompt: str, image_tokens: int) -> str:
    """The Qwen-VL chat up to the answer, with the image's place holders written by hand."""
    image = "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
    return f"<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n"


def answer_skeleton(supervision: str) -> list[tuple]:
    """The answer as (fixed text, slot) pairs; a slot is a field, a coefficient or, at the end, None."""
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


def prepare(model: SimpleNamespace, images: list[Image.Image]) -> dict:
    """Pictures -> model inputs: prompts (B, T) padded on the left, so that answers start in one column."""
    size = {"shortest_edge": model.max_pixels, "longest_edge": model.max_pixels}
    pixels = model.image_processor(images, size=size, return_tensors="pt")
    counts = pixels["image_grid_thw"].prod(dim=1) // model.image_processor.merge_size ** 2  # (B,)
    texts = [prompt_text(model.prompt, count) for count in counts.tolist()]
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
# Decoding: feed the skeleton, decide the slots
# ---------------------------------------------------------------------------------------------------

class Answers:
    """B answers in the making: key-value cache, mask of its tokens (B, T), next token's logits (B, V)."""

    def __init__(self, network, inputs: dict):
        self.network = network
        output = network(**inputs, use_cache=True, logits_to_keep=1)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1].float()
        self.mask = inputs["attention_mask"]
        self.offset = network.model.rope_deltas  # (B, 1): an image takes fewer positions than tokens

    def feed(self, ids: torch.Tensor, active: torch.Tensor) -> None:
        """Appends tokens (B, n); an answer not `active` (B,) gets masked padding and keeps its logits."""
        added = active[:, None].expand(-1, ids.shape[1]).to(self.mask.dtype)  # (B, n)
        self.mask = torch.cat([self.mask, added], dim=1)  # (B, T + n)
        positions = (self.mask.cumsum(dim=1) - 1)[:, -ids.shape[1]:] + self.offset  # (B, n)
        output = self.network(input_ids=ids, attention_mask=self.mask, past_key_values=self.cache,
                              position_ids=positions.expand(3, -1, -1), use_cache=True, logits_to_keep=1)
        self.logits = torch.where(active[:, None], output.logits[:, -1].float(), self.logits)


def decode_text(answers: Answers, closing_id: int, pad_id: int) -> list[list[int]]:
    """Greedy decoding until the token that closes the text, without it. Returns each answer's token ids."""
    active = torch.ones(len(answers.logits), dtype=torch.bool, device=answers.logits.device)
    texts = [[] for _ in active]
    for _ in range(MAX_TEXT_TOKENS):
        ids = answers.logits.argmax(dim=-1)  # (B,)
        active = active & (ids != closing_id)
        if not active.any():
            break
        for index in active.nonzero().flatten().tolist():
            texts[index].append(int(ids[index]))
        answers.feed(torch.where(active, ids, pad_id)[:, None], active)
    return texts


def decode_value(answers: Answers, value_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decides one coefficient. value_ids (11, L): one token a value in the tiny model, else "0", ".", "3".

    Returns probabilities of the eleven values (B, 11) and the greedy choice (B,), last token not yet fed.
    """
    if value_ids.shape[1] == 1:
        probabilities = answers.logits[:, value_ids[:, 0]].softmax(dim=-1)
        return probabilities, probabilities.argmax(dim=-1)
    whole_ids, digit_ids = value_ids[[0, 10], 0], value_ids[:10, 2]
    whole = answers.logits[:, whole_ids].softmax(dim=-1)  # (B, 2): "0" or "1"
    is_one = whole[:, 1] > whole[:, 0]
    ids = torch.stack([whole_ids[is_one.long()], value_ids[0, 1].expand(len(whole))], dim=1)
    answers.feed(ids, torch.ones_like(is_one))
    digits = answers.logits[:, digit_ids].softmax(dim=-1)  # (B, 10)
    # After "1." only "0" is valid, and what was given to "0." counts as its neighbour 0.9.
    digits = torch.where(is_one[:, None], torch.eye(10, device=digits.device)[9], digits)
    probabilities = torch.cat([whole[:, :1] * digits, whole[:, 1:]], dim=1)
    return probabilities, torch.where(is_one, 10, digits.argmax(dim=-1))


@torch.inference_mode()
def decode(model: SimpleNamespace, inputs: dict, supervision: str) -> tuple:
    """Forced-skeleton decoding of a batch.

    Returns probabilities (B, C, 11), the greedy choice as numbers (B, C) and the descriptions.
    """
    encode = model.tokenizer.encode
    pieces = answer_skeleton(supervision)
    skeleton = [(encode(text, add_special_tokens=False), slot) for text, slot in pieces]
    encoded_values = [encode(value, add_special_tokens=False) for value in VALUES]
    value_ids = torch.tensor(encoded_values, device=model.device)  # (11, L)
    answers = Answers(model.network, inputs)
    everyone = torch.ones(len(inputs["input_ids"]), dtype=torch.bool, device=model.device)
    pending = torch.empty(len(everyone), 0, dtype=torch.long, device=model.device)
    probabilities, chosen, texts = [], [], [{} for _ in everyone]
    for index, (skeleton_ids, slot) in enumerate(skeleton[:-1]):
        ids = torch.tensor(skeleton_ids, device=model.device).expand(len(everyone), -1)
        answers.feed(torch.cat([pending, ids], dim=1), everyone)
        if slot in FIELDS:
            closing_id = skeleton[index + 1][0][0]
            written = decode_text(answers, closing_id, model.tokenizer.pad_token_id)
            for text, text_ids in zip(texts, written):
                text[slot] = unescape(model.tokenizer.decode(text_ids))
            pending = pending[:, :0]
        else:
            distribution, choice = decode_value(answers, value_ids)
            pending = value_ids[choice, -1:]
            probabilities.append(distribution)
            chosen.append(choice)
    return torch.stack(probabilities, dim=1), torch.stack(chosen, dim=1), texts


def unescape(text: str) -> str:
    """Undoes JSON's escapes (\\" and the like); a text that is no valid JSON string is returned as is."""
    try:
        return json.loads(f'"{text}"')
    except json.JSONDecodeError:
        return text


def estimate(probabilities: torch.Tensor, chosen: torch.Tensor, kind: str) -> tuple:
    """Point estimate and standard deviation, (B, C) each, of the coefficients' distributions (B, C, 11).

    The mean minimises expected squared error, the median absolute; the mode is the greedy `chosen` (B, C).
    """
    values = torch.arange(len(VALUES), device=probabilities.device) / 10
    mean = probabilities @ values
    std = (probabilities @ values ** 2 - mean ** 2).clamp(min=0).sqrt()
    if kind == "mean":
        return mean, std
    if kind == "median":
        return values[(probabilities.cumsum(dim=-1) >= 0.5).float().argmax(dim=-1)], std
    return values[chosen], std


def predict(model: SimpleNamespace, images: list, batch_size: int = 32, kind: str = "mean",
            numeric: bool = False) -> list[dict]:
    """Predicts the coefficients of `images` (paths or pictures), one prediction record each, in order.

    An unreadable picture gives a record with "error" set and null coefficients; a batch of them is free.
    """
    records = []
    for start in range(0, len(images), batch_size):
        sources = images[start:start + batch_size]
        opened = [try_image(source) for source in sources]
        readable = [picture for picture, _ in opened if picture]
        if readable:
            supervision = "numeric" if numeric else model.supervision
            probabilities, chosen, texts = decode(model, prepare(model, readable), supervision)
            estimates = estimate(probabilities, chosen, kind)
            values, stds = (tensor.clamp(0, 1).cpu().tolist() for tensor in estimates)
            answers = iter(zip(values, stds, texts))
        for source, (picture, why) in zip(sources, opened):
            path = None if isinstance(source, Image.Image) else str(source)
            record = {"image": path, "coefficients": None, "std": None, "description": None, "error": why}
            if picture:
                row, spread, text = next(answers)
                record["coefficients"] = {name: round(value, 4) for name, value in zip(ARKIT_NAMES, row)}
                record["std"] = {name: round(value, 4) for name, value in zip(ARKIT_NAMES, spread)}
                record["description"] = text or None
            records.append(record)
    return records


# ---------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------

def resume(out: Path, settings: dict) -> list[dict]:
    """Prepares the prediction file; returns an interrupted run's records if its settings were the same.

    While a run is unfinished, its settings stand in a file beside `out`; a torn last line is dropped.
    """
    marker = out.with_name(out.name + ".unfinished")
    out.parent.mkdir(parents=True, exist_ok=True)
    records = []
    if out.is_file() and marker.is_file() and marker.read_text(encoding="utf-8") == json.dumps(settings):
        for line in out.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    marker.write_text(json.dumps(settings), encoding="utf-8")
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    out.write_text(text, encoding="utf-8")
    return records


def write_livelink(path: Path, records: list[dict], fps: int) -> None:
    """Writes a Live Link Face take: 61 columns, timecode HH:MM:SS:FF.mmm with gaps at failed pictures."""
    columns = [name[0].upper() + name[1:] for name in ARKIT_NAMES]
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


def main(args: argparse.Namespace) -> None:
    """Runs the stage."""
    if args.batch_size < 1 or args.fps < 1 or (args.limit is not None and args.limit < 1):
        given = f"--batch-size {args.batch_size}, --fps {args.fps}, --limit {args.limit}"
        raise SystemExit(f"{given}: expected whole numbers of at least 1")
    if Path(args.out).absolute() in [Path(name).absolute() for name in args.inputs]:
        raise SystemExit(f"--out {args.out} is an INPUT and would be overwritten; choose another file")
    images = list_images(args.inputs)[:args.limit]
    logging.disable_progress_bar()
    model = load(args.model, args.device, args.dtype)
    out = Path(args.out)
    base = out.parent.absolute()
    names = [os.path.relpath(image.absolute(), base) for image in images]
    checkpoint = str(Path(args.model).absolute()), (Path(args.model) / "run.json").stat().st_mtime
    settings = {"estimate": args.estimate, "numeric": args.numeric, "dtype": args.dtype}
    records = resume(out, {"model": checkpoint, **settings})
    done = {record["image"]: record for record in records}
    todo = [(name, image) for name, image in zip(names, images) if name not in done]
    count = f"{len(images)} pictures, {len(images) - len(todo)} done before"
    print(f"{args.model} | {args.device} | {count} | {args.estimate} of each distribution")

    bar = tqdm(total=len(todo), unit=" images", disable=None)
    with bar, out.open("a", encoding="utf-8") as file:
        for start in range(0, len(todo), args.batch_size):
            batch = todo[start:start + args.batch_size]
            paths = [image for _, image in batch]
            predictions = predict(model, paths, args.batch_size, args.estimate, args.numeric)
            for (name, _), record in zip(batch, predictions):
                done[name] = {**record, "image": name}
                file.write(json.dumps(done[name], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))
    out.with_name(out.name + ".unfinished").unlink()

    records = [done[name] for name in names]
    failed = [record for record in records if record["error"]]
    for record in failed[:5]:
        print(f"unreadable: {record['image']} ({record['error']})")
    if args.csv:
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
        write_livelink(Path(args.csv), records, args.fps)
        print(f"wrote {args.csv}")
    print(f"wrote {out}: {len(records) - len(failed)} predictions, {len(failed)} unreadable pictures")
    print("next: python evaluate.py" + ("" if args.out == "predictions.jsonl" else f" {out}"))


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("interrupted; what is finished is kept, and the same command goes on where it stopped")
