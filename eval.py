"""Scores, and all else of RTDMD that is not the method: prompts, records, costs, ablations, the tiny world.

It samples a checkpoint, or takes a folder of pictures, and prints the columns of the paper's tables.

    a run       python eval.py --run_folder runs/tiny  # teacher, untrained student, both stages
    checkpoint  python eval.py --model sd3m --lora runs/sd3m/stage2 --prompts drawbench --metrics hpsv2,aesthetic
    teacher     python eval.py --model sd3m --teacher --nfe 50 --cfg 7 --prompts drawbench
    pictures    python eval.py --images folder --metrics hpsv2          # of any origin
    difference  python eval.py --compare A/report.json B/report.json    # B - A, picture by picture
    one         python eval.py --model sd3m --lora runs/sd3m/stage2 --prompt "a red fox"
    8 GPUs      torchrun --nproc_per_node 8 eval.py ...                 # the same numbers, sooner
    ablations   python eval.py --ablations --quick                      # the paper's questions, on the tiny world
    costs       python eval.py --dry_run 1 --stage 1 --model sd3m       # will it fit, how fast is it? no download

Metrics, better when higher, on the scale of the paper's tables, with the range found there:
    clipscore    cosine, .25 to .32           rtdmd.ClipReward, as are the next two
    pickscore    100 x cosine, 20 to 24
    hpsv2        cosine, .20 to .35           the weights of version 2.1
    aesthetic    1 to 10, mostly 5 to 6       Aesthetic: does not know the prompt
    imagereward  about 0 +- 1                 ImageReward
    hpsv3        unbounded, 10 to 16          HPSv3
    geneval      0 to 1                       GenEval: mean of six tasks; prompts are rows of its metadata
    geneval2     0 to 1                       GenEval2: geometric mean over a prompt's atoms; prompts likewise
    ocr          0 to 1                       OCR: the prompt has the wanted text in double quotes
    tiny world   of a picture: attributes, strict, heldout, heldout_strict (judges, section 14); of the whole set:
                 distance (better when lower), diversity (better near 1): tiny_set_metrics

A scorer is called as scorer(images (B,3,H,W) in [0,1], prompts or metadata rows) -> (B,). Its networks are
arguments, so that tests use the real classes at small size; `load(cfg)` takes the real ones from --weights_dir
or the hub. Only packages of requirements.txt are needed (hpsv3 wants one text file of its own, too): mmdet and
paddle are no dependencies, and the rewards' own packages break on today's transformers.

Order: 1-7 scorers | 8 METRICS, run_metric | 9 flags | 10 sampling | 11 reports, a function for each command: evaluate,
score_folder, compare, one_picture | 12 what training costs | 13 ablations | 14 the tiny world | 15 main. rtdmd.py
knows none of this: it finds the tiny world and these scorers by their names, as it would find yours.
"""
import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import sys
import textwrap
import threading
import time
import weakref
import zipfile
from collections import defaultdict, deque, namedtuple
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import rtdmd
from rtdmd import REWARDS, UsageError, find_weights, from_hub, load_whole, normalise, opt, rate, resize, square_crop

CLIP_L14 = "openai/clip-vit-large-patch14"
IMAGENET_MEAN, IMAGENET_STD = (.485, .456, .406), (.229, .224, .225)


# ------------------------------------------------------------------------------------------------------------
# 1. What the scorers share
# ------------------------------------------------------------------------------------------------------------

def frozen(net, cfg):
    """The network on the device, in eval mode, weights without gradients (which may still pass through)."""
    return net.to(cfg.device).eval().requires_grad_(False)


def as_bytes(images):
    """[0,1] -> uint8, as a saved picture: what scorers that were trained on files expect."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def score_head(state, prefix):
    """The 768-1024-128-64-16-1 head of Aesthetic and ImageReward, strictly loaded from state[prefix + ...].

    It has no activation anywhere: an affine map in five pieces. Dropout held places 1, 3 and 5 in training.
    """
    gap = nn.Identity()
    head = nn.Sequential(nn.Linear(768, 1024), gap, nn.Linear(1024, 128), gap, nn.Linear(128, 64), gap,
                         nn.Linear(64, 16), nn.Linear(16, 1))
    head.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return head


def chat_inputs(processor, images, texts, **options):
    """Inputs of a Qwen-VL network: one talk for each uint8 image (B,3,H,W), the image and then its text.

    Padding stands on the right, where it moves no position of the text before it.
    """
    talks = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
    texts = processor.apply_chat_template(talks, tokenize=False, add_generation_prompt=True)
    return processor(text=texts, images=list(images), padding=True, padding_side="right", return_tensors="pt",
                     **options)


def read_rows(path, **fields):
    """The objects of a .jsonl file, one a line, each with the fields name=type. UsageError names the line.
    Splits lines and strips prompts as prompt_rows and read_prompts do, since --prompts may name the same file."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            if not (text := line.decode("utf-8-sig").strip()):
                continue
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: this is not JSON in UTF-8 ({error}).") from error
        for name, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                wanted = "text" if kind is str else "list"
                raise UsageError(f"{path}, line {number}: the field {name!r} is missing, or no {wanted}.")
        rows.append({**row, "prompt": row["prompt"].strip()})
    return rows


def find_rows(prompts, known, name):
    """Metadata rows for prompts: a dict is a row already, a text is looked up in `known` {prompt: row}."""
    rows = [p if isinstance(p, dict) else known.get(p.strip()) for p in prompts]
    if None in rows:
        raise UsageError(f"{name} needs to know what the image must show, and has no metadata for the prompt "
                         f"{prompts[rows.index(None)]!r}: give --prompts a metadata .jsonl file.")
    return rows


def rows_of(cfg, read):
    """{prompt: row} of the .jsonl file that --prompts names, read by `read`; {} if it is of another kind."""
    path = str(cfg.prompts or "")
    return {row["prompt"]: row for row in read(path)} if path.endswith(".jsonl") else {}


# ------------------------------------------------------------------------------------------------------------
# 2. Aesthetic: LAION's second predictor, an affine map of CLIP L/14's unit image embedding
# ------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Aesthetic:
    """How good the image looks, whatever the prompt. The paper reports it and does not train on it."""
    name, differentiable = "aesthetic", True
    clip: nn.Module          # CLIPModel of L/14, or a smaller one
    head: nn.Module          # its projected image embedding (B,768) -> (B,1)

    @staticmethod
    def find_head(cfg):
        """LAION's own .pth, if it lies in --weights_dir or here, or its copy on the hub."""
        own = Path(cfg.weights_dir or ".").expanduser() / "sac+logos+ava1-l14-linearMSE.pth"
        return own if own.is_file() else find_weights("ttj/sac-logos-ava1-l14-linearMSE", "model.safetensors", cfg)

    @classmethod
    def load(cls, cfg):
        """Both files: CLIP's and the head's."""
        path = cls.find_head(cfg)
        state = (load_file(path) if path.suffix == ".safetensors" else
                 torch.load(path, map_location="cpu", weights_only=True))
        clip = load_whole(transformers.CLIPModel, CLIP_L14, cfg, dtype=torch.float32)
        return cls(clip, frozen(score_head(state, "layers."), cfg))

    def __call__(self, images, prompts=None):
        """images (B,3,H,W) -> (B,); 5.24 is the head's bias, 5.2 to 6 what generated images get."""
        embedding = self.clip.get_image_features(pixel_values=square_crop(images)).pooler_output
        return self.head(F.normalize(embedding, dim=-1)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------
# 3. ImageReward: BLIP's text encoder reads the prompt with the image in its cross-attention
# ------------------------------------------------------------------------------------------------------------

# Names inside the checkpoint's visual encoder, a timm ViT, and what transformers calls them.
BLIP_VISION = (("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
               ("patch_embed.proj.", "embeddings.patch_embedding."), ("blocks.", "encoder.layers."),
               (".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection."),
               (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."))


def split_imagereward(state):
    """ImageReward.pt's tensors, renamed for (BlipVisionModel, BlipTextModel, score_head): three dicts.

    Left out: the two projections of BLIP's contrastive loss and the position indices, which no score uses.
    """
    vision, text, head = {}, {}, {}
    for name, tensor in state.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            for theirs, ours in BLIP_VISION:
                name = name.replace(theirs, ours)
            vision[re.sub(r"^norm\.", "post_layernorm.", name)] = tensor
        elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
            text[name.removeprefix("blip.text_encoder.")] = tensor
        elif name.startswith("mlp."):
            head[name] = tensor
    return vision, text, head


@dataclasses.dataclass
class ImageReward:
    """Human preference for an image given its prompt. The paper reports it and does not train on it."""
    name, differentiable = "imagereward", True
    MEAN, STD = .16717362830052426, 1.0333394966054072   # of the raw score over its authors' validation set
    vision: nn.Module        # BlipVisionModel
    text: nn.Module          # BlipTextModel
    head: nn.Module          # state of the first token (B,768) -> (B,1)
    tokenizer: object        # BERT's
    device: str = "cpu"

    @staticmethod
    def networks(state, vision_size=None, text_size=None):
        """The three networks, strictly loaded. Sizes are keyword dicts for the two configurations.

        Three values differ from transformers' defaults: the epsilon of the vision norms, 12 text heads, and
        the cross-attention's width. is_decoder stays on, since it is what creates the cross-attention; the
        forward is never causal all the same.
        """
        large = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                     image_size=224, patch_size=16)
        vision_size = {**large, **(vision_size or {})}
        text_size = {"vocab_size": 30524, "num_attention_heads": 12, **(text_size or {})}
        vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision_size, layer_norm_eps=1e-6))
        text = transformers.BlipTextModel(transformers.BlipTextConfig(
            **text_size, encoder_hidden_size=vision_size["hidden_size"], is_decoder=True), add_pooling_layer=False)
        of_vision, of_text, of_head = split_imagereward(state)
        vision.load_state_dict(of_vision)
        text.load_state_dict(of_text)
        return vision, text, score_head(of_head, "mlp.layers.")

    @classmethod
    def load(cls, cfg):
        """The published file, and BERT's tokenizer, which it does not bring."""
        path = find_weights("zai-org/ImageReward", "ImageReward.pt", cfg)
        networks = cls.networks(torch.load(path, map_location="cpu", weights_only=True))
        bert = from_hub(transformers.BertTokenizer.from_pretrained, "google-bert/bert-base-uncased", cfg,
                        needs="tokenizer.json")
        return cls(*(frozen(net, cfg) for net in networks), bert, cfg.device)

    def __call__(self, images, prompts):
        """images (B,3,H,W), prompts -> (B,), about zero mean and unit std over ordinary generated images."""
        words = self.tokenizer(prompts, padding="max_length", max_length=35, truncation=True,   # 35: its own
                               return_tensors="pt").to(self.device)
        seen = self.vision(pixel_values=square_crop(images)).last_hidden_state   # its pooler would norm twice
        read = self.text(input_ids=words["input_ids"], attention_mask=words["attention_mask"],
                         encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0]).squeeze(-1) - self.MEAN) / self.STD        # the first token, [CLS]


# ------------------------------------------------------------------------------------------------------------
# 4. HPSv3: Qwen2-VL reads image and prompt; a small head turns the state at a marker token into a score
# ------------------------------------------------------------------------------------------------------------

def hpsv3_instruction(cfg):
    """The text around the prompt, with {text_prompt} in it, and the marker <|Reward|> behind it.

    It is its authors' prose, so it is not printed here, and the checkpoint knows no other wording. It is
    read, not run, from one source file of their package: `pip install --no-deps hpsv3==1.0.0`, or that file
    alone in --weights_dir.
    """
    name, package = "data_collator_qwen.py", importlib.util.find_spec("hpsv3")
    folders = [Path(p) / "dataset" for p in (package.submodule_search_locations if package else ())]
    if cfg.weights_dir:
        folders += [Path(cfg.weights_dir).expanduser() / "HPSv3", Path(cfg.weights_dir).expanduser()]
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(f"HPSv3's instruction text was not found ({name}, in the package hpsv3 or in "
                         f"--weights_dir {cfg.weights_dir}): run `pip install --no-deps hpsv3==1.0.0`.")
    try:
        texts = {node.targets[0].id: node.value.value for node in ast.parse(found.read_text(encoding="utf-8")).body
                 if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
                 and isinstance(node.targets[0], ast.Name)}
        return texts["INSTRUCTION"] + texts["prompt_with_special_token"]
    except (OSError, SyntaxError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{found} is not HPSv3's file ({error!r:.100}): run `pip install --no-deps "
                         "hpsv3==1.0.0`.") from error


@dataclasses.dataclass
class HPSv3:
    """Human preference, wider and newer than HPSv2. Gradients could pass, but through 8 billion weights."""
    name, differentiable = "hpsv3", False
    PIXELS = 256 * 28 * 28   # every image is brought to 256 tokens, 448 x 448 if it is square
    net: nn.Module           # Qwen2VLModel
    head: nn.Module          # (.., D) -> (.., 2), mean and log-variance, in fp32
    processor: object        # Qwen2-VL's
    instruction: str         # with {text_prompt} in it
    token_id: int            # the marker's
    device: str = "cpu"

    @staticmethod
    def networks(state, config, dtype=torch.bfloat16):
        """Both networks from HPSv3.safetensors' tensors, strictly loaded, the language head left out.

        The vocabulary is the checkpoint's: it has the marker added.
        """
        of_net = {("language_" + k if k.startswith("model.") else k): v for k, v in state.items()
                  if k.startswith(("model.", "visual."))}
        of_head = {k.removeprefix("rm_head."): v.float() for k, v in state.items() if k.startswith("rm_head.")}
        config.text_config.vocab_size, width = of_net["language_model.embed_tokens.weight"].shape
        net, info = transformers.Qwen2VLModel.from_pretrained(None, config=config, state_dict=of_net, dtype=dtype,
                                                              output_loading_info=True)
        wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]})
        if wrong:
            raise UsageError(f"HPSv3.safetensors: {len(wrong)} tensors misfit Qwen2-VL, such as {wrong[0]}: "
                             "download it again.")
        head = nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(),
                             nn.Linear(16, 2))  # dropout held place 2 in training
        head.load_state_dict(of_head)
        return net, head

    @classmethod
    def load(cls, cfg):
        """The instruction first: without it some 16 GB would be loaded for nothing."""
        base, text = "Qwen/Qwen2-VL-7B-Instruct", hpsv3_instruction(cfg)
        processor = from_hub(transformers.AutoProcessor.from_pretrained, base, cfg, needs="tokenizer.json")
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
        token_id = processor.tokenizer.convert_tokens_to_ids("<|Reward|>")
        state = load_file(find_weights("MizzenAI/HPSv3", "HPSv3.safetensors", cfg))
        net, head = cls.networks(state, from_hub(transformers.AutoConfig.from_pretrained, base, cfg))
        return cls(frozen(net, cfg), frozen(head, cfg), processor, text, token_id, cfg.device)

    @torch.no_grad()
    def __call__(self, images, prompts):
        """images (B,3,H,W), prompts -> (B,), unbounded: 10 to 16 in the paper's tables."""
        texts = [self.instruction.format(text_prompt=p) for p in prompts]
        view = {"size": {"shortest_edge": self.PIXELS, "longest_edge": self.PIXELS}}
        inputs = chat_inputs(self.processor, as_bytes(images), texts, images_kwargs=view).to(self.device)
        return self.read(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"],
                         inputs["image_grid_thw"])

    def read(self, input_ids, attention_mask, pixels, grid):
        """Tokens (B,L), patches and their grid -> (B,): the head's mean at the marker token.

        The text stack gets plain positions 0, 1, 2, .. for image tokens too, as in HPSv3's training. Qwen2-VL
        has positions by row and column, and net(input_ids=..) would use them: the scores would differ.
        """
        words = self.net.get_input_embeddings()(input_ids)
        image = torch.cat(self.net.get_image_features(pixels, grid).pooler_output).to(words)
        words = words.masked_scatter((input_ids == self.net.config.image_token_id).unsqueeze(-1), image)
        states = self.net.language_model(inputs_embeds=words, attention_mask=attention_mask).last_hidden_state
        return self.head(states[input_ids == self.token_id].float())[:, 0]


# ------------------------------------------------------------------------------------------------------------
# 5. GenEval: a detector finds the objects, CLIP names their colours, rules decide
# ------------------------------------------------------------------------------------------------------------

# GenEval's names of the detector's 80 classes, in the detector's order (COCO's).
COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack,
umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple,
sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining
table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster,
sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
COCO = COCO.replace("\n", " ").split(", ")
COLOURS = "red orange yellow green blue purple pink brown black white".split()
NUMBERS = "zero one two three four five six seven eight nine ten".split()
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

Detection = namedtuple("Detection", "label score box mask")   # COCO index, 0..1, (x1,y1,x2,y2), (H,W) bool


def read_geneval_metadata(path):
    """Rows of GenEval's evaluation_metadata.jsonl, each {tag, prompt, include, (exclude)}.

    include lists {class, count, (color), (position)}; position is [relation, index of its anchor in include].
    """
    rows = read_rows(path, prompt=str, tag=str, include=list)
    for row in rows:
        if not isinstance(row.get("exclude"), (list, type(None))):
            raise UsageError(f"{path}: {row['prompt']!r} has an exclude that is no list: correct it.")
        needs = [*row["include"], *(row.get("exclude") or ())]
        unknown = [f"tag, {row['tag']!r}: known are {', '.join(TASKS)}"] if row["tag"] not in TASKS else []
        unknown += [f"entry, {need!r}: write {{class, count}}" for need in needs or [None] if not isinstance(need, dict)
                    or type(need.get("count")) is not int or need["count"] < 1]
        for need in needs if not unknown else ():
            if need.get("class") not in COCO:
                unknown.append(f"class, {need.get('class')!r}: known are COCO's 80")
            if need.get("color", COLOURS[0]) not in COLOURS:
                unknown.append(f"colour, {need['color']!r}: known are {', '.join(COLOURS)}")
        for place, need in enumerate(row["include"] if not unknown else ()):
            where = need.get("position")
            if "position" in need and not (isinstance(where, list) and len(where) == 2 and where[0] in RELATIONS
                                           and where[1] in range(place)):
                unknown.append(f"position, {where!r}: write [relation, index of an earlier entry], the relation one of "
                               f"{', '.join(RELATIONS)}")
        if unknown:
            raise UsageError(f"{path}: {row['prompt']!r} has an unknown {unknown[0]}.")
    return rows


def with_article(words):
    """"an apple", "a red apple": by the first letter, as the evaluation prompts have it."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def geneval_row(task, draw):
    """One random row of a task, in the evaluation file's format and wording. draw: a random.Random.

    Plurals are as naive as in the evaluation prompts ("knifes"), so that both come from one distribution.
    """
    coloured = task in ("colors", "color_attr")
    first, second = draw.sample(COCO[1:] if coloured else COCO, 2)   # nobody is asked for a red person
    one, two = {"class": first, "count": 1}, {"class": second, "count": 1}
    include, exclude = [one, two], []
    match task:
        case "single_object":
            include, words = [one], with_article(first)
        case "two_object":
            words = f"{with_article(first)} and {with_article(second)}"
        case "counting":
            one["count"] = draw.randint(2, 4)
            include, exclude = [one], [{"class": first, "count": one["count"] + 1}]   # exactly so many
            words = f"{NUMBERS[one['count']]} {first}{'es' if first.endswith('s') else 's'}"
        case "colors":
            one["color"] = draw.choice(COLOURS)
            include, words = [one], f"{with_article(one['color'])} {first}"
        case "position":
            two["position"] = [draw.choice(RELATIONS), 0]             # relative to include[0], its anchor
            words = f"{with_article(second)} {two['position'][0]} {with_article(first)}"
        case "color_attr":
            one["color"], two["color"] = draw.sample(COLOURS, 2)
            words = f"{with_article(one['color'])} {first} and {with_article(two['color'])} {second}"
    row = {"tag": task, "include": include, "prompt": f"a photo of {words}"}
    return {**row, "exclude": exclude} if exclude else row


def geneval_training_prompts(n, seed, exclude, tasks=TASKS):
    """n different rows, the tasks in turn; none has a prompt of `exclude`: the evaluation rows, or texts.

    The evaluation holds all 80 single objects, so with it excluded that task has none left: a task that fails
    400 times in a row is dropped. UsageError if all of them are used up before n.
    """
    draw, tasks, rows = random.Random(seed), list(tasks), []
    taken = {row["prompt"] if isinstance(row, dict) else row for row in exclude}
    while len(rows) < n:
        if not tasks:
            raise UsageError(f"GenEval's templates give only {len(rows)} new prompts, {n} were asked for.")
        task = tasks.pop(0)
        tries = (geneval_row(task, draw) for _ in range(400))
        row = next((row for row in tries if row["prompt"] not in taken), None)
        if row:
            taken.add(row["prompt"])
            rows.append(row)
            tasks.append(task)
    return rows


def detector_class():
    """Mask2Former without its loss, which insists on scipy even where nothing is trained."""
    class Detector(transformers.Mask2FormerPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model = transformers.Mask2FormerModel(config)
            self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)   # the last: nothing
            self.post_init()

        def forward(self, pixels):
            """(B,3,h,w) -> class logits (B,Q,81), mask logits (B,Q,h/4,w/4)"""
            out = self.model(pixels, output_hidden_states=True)
            queries = out.transformer_decoder_intermediate_states[-1].transpose(0, 1)
            return self.class_predictor(queries), out.masks_queries_logits[-1]

    return Detector


def detector_view(images):
    """(B,3,H,W) -> (B,3,h,w), resized to fit 800 x 1333 and padded to multiples of 32, and its size before padding."""
    height, width = images.shape[-2:]
    scale = min(1333 / max(height, width), 800 / min(height, width))
    size = int(height * scale + .5), int(width * scale + .5)
    pixels = normalise(resize(images, *size, mode="bilinear"), IMAGENET_MEAN, IMAGENET_STD)
    return F.pad(pixels, (0, -size[1] % 32, 0, -size[0] % 32)), size


def instances(class_logits, mask_logits, padded, resized, original, floor=.3):
    """One image's outputs (Q,81), (Q,h,w) -> Detections, best first, by the steps of GenEval's own detector.

    A query may appear under several classes. Masks go to the padded input's size, lose the padding, and go to
    the image's size before they are cut at 0. Score: class probability times the mean sigmoid inside the
    mask, so it is below the class probability, and everything at or under `floor` can be dropped before its
    mask is resized.
    """
    probability = class_logits.float().softmax(-1)[:, :-1]
    best, index = probability.flatten().topk(min(100, probability.numel()))
    best, index = best[best > floor], index[best > floor]
    found, classes = [], probability.shape[1]
    for p, i in zip(best, index.tolist()):
        mask = F.interpolate(mask_logits[None, None, i // classes].float(), padded, mode="bilinear")
        mask = F.interpolate(mask[..., :resized[0], :resized[1]], original, mode="bilinear")[0, 0]
        inside = mask > 0
        if inside.any():
            sure = (mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6)
            y, x = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
            box = (x[0].item(), y[0].item(), x[-1].item() + 1, y[-1].item() + 1)
            found.append(Detection(i % classes, (p * sure).item(), box, inside))
    return sorted(found, key=lambda d: -d.score)


def objects_of(detections, threshold):
    """{class name: Detections above the threshold, best first, 16 at most}"""
    found = {}
    for d in sorted(detections, key=lambda d: -d.score):
        if d.score > threshold and len(found.setdefault(COCO[d.label], [])) < 16:
            found[COCO[d.label]].append(d)
    return found


def relations(a, b):
    """Where box a lies seen from box b: a set of "left of", "right of", "above", "below" (y grows downwards).

    The centres' offset is shrunk by a tenth of the two sizes on each axis, so that objects that overlap stand
    in no relation; then a direction counts if it makes up more than half of the offset's length.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    margin = [.1 * (a[i + 2] - a[i] + b[i + 2] - b[i]) for i in (0, 1)]
    shrunk = [math.copysign(max(abs(o) - m, 0), o) for o, m in zip(offset, margin)]
    if max(abs(shrunk[0]), abs(shrunk[1])) < 1e-3:
        return set()
    x, y = (s / math.hypot(*offset) for s in shrunk)
    return {name for name, holds in zip(RELATIONS, (x < -.5, x > .5, y < -.5, y > .5)) if holds}


def geneval_terms(objects, row, colours, best=False):
    """Partial credit for each thing that a row asks for, and whether all of it is there: (list, bool).

    objects {class: Detections, best first}; colours(Detections, class name) -> colour names. A count gives
    1 - |count - found| / count, which may be negative; a colour the same; a position 0 or 1. Where the count is
    wrong, colour and position together give one 0. A violated position gives a 0 and then a 1: an oddity
    of the original, kept because scores are compared with its own. best: look at the best `count` only.
    """
    terms, groups = [], []  # groups: the objects that meet each need, or None; positions refer to them
    for need in row["include"]:
        name, count = need["class"], need["count"]
        found = objects.get(name, [])[:count if best else None]
        good = len(found) == count
        terms.append(1 - abs(count - len(found)) / count)
        if not good and ("color" in need or "position" in need):
            terms.append(0.)
        if good and "color" in need:
            hits = colours(found, name).count(need["color"])
            terms.append(1 - abs(count - hits) / count)
            good = hits == count
        if good and "position" in need:
            relation, anchors = need["position"][0], groups[need["position"][1]]
            good = bool(anchors) and all(relation in relations(a.box, b.box) for a in found for b in anchors)
            terms += [1.] if good else [0.] if anchors is None else [0., 1.]
        groups.append(found if good else None)
    return terms, None not in groups


def geneval_official(objects, row, colours):
    """GenEval's verdict on one image. More objects than asked for fail only through `exclude`."""
    absent = all(len(objects.get(no["class"], [])) < no["count"] for no in row.get("exclude") or ())
    return absent and geneval_terms(objects, row, colours, best=True)[1]


def geneval_partial(objects, row, colours):
    """(mean credit, strict verdict) of one image: the reward that GenEval training uses, and its accuracy.

    Counts are exact here, and `exclude` plays no part.
    """
    terms, verdict = geneval_terms(objects, row, colours)
    return sum(terms) / len(terms), verdict


@dataclasses.dataclass
class ColourNames:
    """CLIP L/14 names the colour of an object."""
    net: nn.Module           # an open_clip CLIP
    tokenise: object         # its tokenizer
    known: dict = dataclasses.field(default_factory=dict)    # class name -> weights (10, D)

    def weights(self, name):
        """(10, D) unit vectors, the colours as that class wears them: means over three wordings, cached."""
        if name not in self.known:
            wordings = [f"a photo of a {words}" for colour in COLOURS
                        for words in (f"{colour} {name}", f"{colour}-colored {name}", f"{colour} object")]
            tokens = self.tokenise(wordings).to(next(self.net.parameters()).device)
            text = F.normalize(self.net.encode_text(tokens), dim=-1)
            self.known[name] = F.normalize(text.view(len(COLOURS), 3, -1).mean(1), dim=-1)
        return self.known[name]

    def __call__(self, image, detections, name):
        """image (3,H,W), its Detections of one class -> their colours' names.

        CLIP sees the object alone: grey #999 outside its mask, cropped to its box.
        """
        crops = []
        for d in detections:
            x1, y1, x2, y2 = d.box
            crops.append(square_crop(torch.where(d.mask, image, .6)[None, :, y1:y2, x1:x2]))  # .6 is 0x99 / 255
        seen = F.normalize(self.net.encode_image(torch.cat(crops)), dim=-1)
        return [COLOURS[i] for i in (seen @ self.weights(name).T).argmax(-1).tolist()]


@dataclasses.dataclass
class GenEval:
    """Whether the things that the prompt names are there: objects, counts, colours, positions.

    The detector is Meta's own training of the architecture that GenEval used, so numbers compare only with
    others that were made with it: they move most near the .9 threshold of counting.
    """
    name, differentiable = "geneval", False
    rule = "geneval"         # which of the three scores a call returns
    detector: object         # pixels (B,3,h,w) -> class logits, mask logits
    colours: object          # (image, Detections, class name) -> colour names
    known: dict = dataclasses.field(default_factory=dict)  # {prompt: row}, for callers who have only prompts

    @classmethod
    def load(cls, cfg):
        """open_clip must be asked for the quickgelu twin: OpenAI's weights under plain GELU lose accuracy."""
        import open_clip                                    # takes seconds, which nothing else here needs
        known = rows_of(cfg, read_geneval_metadata)         # first: a misspelt class would cost a download
        arch, repo = "ViT-L-14-quickgelu", "timm/vit_large_patch14_clip_224.openai"
        detector = load_whole(detector_class(), "facebook/mask2former-swin-small-coco-instance", cfg)
        weights = find_weights(repo, "open_clip_model.safetensors", cfg)
        clip = frozen(open_clip.create_model(arch, pretrained=str(weights)), cfg)
        return cls(detector, ColourNames(clip, open_clip.get_tokenizer(arch)), known=known)

    @torch.no_grad()
    def details(self, images, prompts):
        """{"geneval", "geneval_partial", "geneval_strict"}: (B,) each, from one look at the images."""
        rows, (pixels, size), scores = find_rows(prompts, self.known, "geneval"), detector_view(images), []
        for image, row, classes, masks in zip(images, rows, *self.detector(pixels)):
            found = instances(classes, masks, pixels.shape[-2:], size, image.shape[-2:])
            objects = objects_of(found, .9 if row["tag"] == "counting" else .3)      # GenEval's two thresholds
            colours = lambda detections, name: self.colours(image, detections, name)
            scores.append((geneval_official(objects, row, colours), *geneval_partial(objects, row, colours)))
        return dict(zip(("geneval", "geneval_partial", "geneval_strict"), images.new_tensor(scores).T))

    def __call__(self, images, prompts):
        """images (B,3,H,W), metadata rows or known prompts -> (B,); 0 or 1 by the official rule."""
        return self.details(images, prompts)[self.rule]


class GenEvalCredit(GenEval):
    """GenEval as a training reward: partial credit instead of the official verdict."""
    rule = "geneval_partial"


def read_geneval2_metadata(path):
    """Rows of GenEval2, each {prompt, vqa_list}: pairs of a question and its answer, one at least."""
    rows = read_rows(path, prompt=str, vqa_list=list)
    for row in rows:
        try:
            asked = [accepted_answers(question, answer) for question, answer in row["vqa_list"]]
        except (ValueError, TypeError, AttributeError):
            asked = []
        if not asked:
            raise UsageError(f"{path}: {row['prompt']!r} has a vqa_list that is no list of [question, answer]: "
                             "correct it.")
    return rows


def geneval_tasks(metrics, prompts, cfg):
    """{prompt: its task}, {} if geneval is not among the metrics. Refuses prompts without the metadata row that geneval
    or geneval2 needs, and a set in which ocr has nothing to read."""
    if "geneval2" in metrics:
        find_rows(prompts, rows_of(cfg, read_geneval2_metadata), "geneval2")
    if "ocr" in metrics and not any(map(QUOTED.search, prompts)):
        raise UsageError("--metrics ocr compares with the text in double quotes, and no prompt has one: leave it out, "
                         "or give other --prompts.")
    if "geneval" not in metrics:
        return {}
    rows = find_rows(prompts, rows_of(cfg, read_geneval_metadata), "geneval")
    return {prompt: row["tag"] for prompt, row in zip(prompts, rows)}


def geneval_summary(scores, prompts, tasks):
    """(mean, standard error) of each task, and under "geneval" of their unweighted mean, which the paper prints:
    tasks differ in size, 80 to 100 prompts. tasks {prompt: its task}."""
    result = {}
    for task in dict.fromkeys(tasks[prompt] for prompt in prompts):
        mine = [i for i, prompt in enumerate(prompts) if tasks[prompt] == task]
        result[task] = mean_and_error([scores[i] for i in mine], [prompts[i] for i in mine])
    means, errors = zip(*result.values())
    return {**result, "geneval": (sum(means) / len(means), math.hypot(*errors) / len(errors))}


# ------------------------------------------------------------------------------------------------------------
# 6. GenEval2: a vision language model answers one question for each atom of the prompt (Soft-TIFA)
# ------------------------------------------------------------------------------------------------------------

def accepted_answers(question, answer):
    """Spellings that count: a number as word and digits, words in both cases, with and without a blank."""
    words = [str(answer)]
    if question.lower().startswith("how many"):
        number = NUMBERS.index(answer.lower()) if str(answer).lower() in NUMBERS else int(answer)
        words = [str(number)] + ([NUMBERS[number]] if number < len(NUMBERS) else [])
    spelt = dict.fromkeys(form for word in words for form in (word.lower(), word.capitalize()))
    return [blank + word for word in spelt for blank in ("", " ")]


def soft_tifa(probabilities):
    """Probabilities of the right answers (a list of numbers) -> (arithmetic mean, geometric mean)."""
    p = torch.as_tensor(probabilities, dtype=torch.float64)
    return p.mean().item(), p.log().mean().exp().item()   # one atom at 0 makes the second 0, as it should


@dataclasses.dataclass
class GenEval2:
    """Whether each atom of the prompt (an object, a count, an attribute, a relation) is in the image."""
    name, differentiable = "geneval2", False
    net: nn.Module           # Qwen3VLForConditionalGeneration
    processor: object        # its own
    known: dict = dataclasses.field(default_factory=dict)  # {prompt: row}, for callers who have only prompts
    device: str = "cpu"

    @classmethod
    def load(cls, cfg):
        """The judge of the benchmark's authors, in bf16: some 17 GB."""
        repo, known = "Qwen/Qwen3-VL-8B-Instruct", rows_of(cfg, read_geneval2_metadata)
        net = load_whole(transformers.Qwen3VLForConditionalGeneration, repo, cfg, dtype=torch.bfloat16)
        processor = from_hub(transformers.AutoProcessor.from_pretrained, repo, cfg, needs="tokenizer.json")
        return cls(net, processor, known, cfg.device)

    @torch.no_grad()
    def first_word(self, images, questions):
        """uint8 images (n,3,H,W), n questions -> probabilities of the answer's first token (n, vocabulary).

        One forward and no generation: greedy decoding changes nothing before the first token.
        """
        inputs = chat_inputs(self.processor, images, questions).to(self.device)
        states = self.net.model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1   # the end of each question, before its padding
        return self.net.lm_head(states[torch.arange(len(last)), last]).float().softmax(-1)

    def atoms(self, image, row):
        """Probability of the right answer to each question of a row, 3 to 10 of them. image (3,H,W) uint8"""
        questions = [f"{question} Answer in one word." for question, _ in row["vqa_list"]]
        found, words = [], self.first_word(image.expand(len(questions), -1, -1, -1), questions)
        for (question, answer), p in zip(row["vqa_list"], words):
            tokens = {self.processor.tokenizer.encode(spelt, add_special_tokens=False)[0]
                      for spelt in accepted_answers(question, answer)}           # a set: some begin alike
            found.append(p[sorted(tokens)].sum().item())
        return found

    def details(self, images, prompts):
        """{"geneval2_am": arithmetic mean over the atoms, "geneval2": geometric mean}: (B,) each"""
        rows = find_rows(prompts, self.known, "geneval2")
        means = [soft_tifa(self.atoms(image, row)) for image, row in zip(as_bytes(images), rows)]
        return dict(zip(("geneval2_am", "geneval2"), images.new_tensor(means).T))

    def __call__(self, images, prompts):
        """images (B,3,H,W), rows with vqa_list [[question, answer], ..] or known prompts -> (B,) in 0..1"""
        return self.details(images, prompts)["geneval2"]


# ------------------------------------------------------------------------------------------------------------
# 7. OCR: find the lines of text, read them, compare with what the prompt puts in quotes
# ------------------------------------------------------------------------------------------------------------

def components(mask):
    """Connected regions (8 neighbours) of a bool array (H,W): lists of runs (row, first column, end).

    Row by row, each run joins the trees of the runs that it touches above: pixel by pixel takes a second.
    """
    parent, runs, above = [], [], []

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for y, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.pad(line.astype(np.int8), 1)))
        here = list(range(len(runs), len(runs) + len(edges) // 2))
        runs += [(y, int(start), int(end)) for start, end in edges.reshape(-1, 2)]
        parent += here
        for i in here:
            for j in above:
                if runs[j][1] <= runs[i][2] and runs[i][1] <= runs[j][2]:   # they touch, at a corner at least
                    parent[root(j)] = root(i)
        above = here
    regions = {}
    for i, run in enumerate(runs):
        regions.setdefault(root(i), []).append(run)
    return list(regions.values())


def text_boxes(heat, height, width):
    """The detector's text probability (h,w) -> boxes (x1,y1,x2,y2) in pixels of the image, in reading order.

    The map shows text shrunk to its core; each box grows by 1.5 area / perimeter, which undoes that. The
    thresholds and the 1.5 are PP-OCR's own. Boxes are upright: slanted lines get more of their surroundings
    than the original's rotated ones.
    """
    boxes, (h, w) = [], heat.shape
    for region in components(heat > .3):
        x1, x2 = min(r[1] for r in region), max(r[2] for r in region)
        y1, y2 = region[0][0], region[-1][0] + 1   # runs come from top to bottom
        sure = np.concatenate([heat[y, start:end] for y, start, end in region]).mean()
        grow = 1.5 * (x2 - x1) * (y2 - y1) / (2 * (x2 - x1 + y2 - y1))
        if min(x2 - x1, y2 - y1) < 3 or sure < .6:   # specks and doubts
            continue
        left, top = max(x1 - grow, 0) * width / w, max(y1 - grow, 0) * height / h
        right, bottom = min(x2 + grow, w) * width / w, min(y2 + grow, h) * height / h
        boxes.append((round(left), round(top), round(right), round(bottom)))
    return reading_order(boxes)


def reading_order(boxes):
    """Boxes from top to bottom, and from left to right where tops differ by less than 10 pixels: one line."""
    boxes = sorted(boxes, key=lambda box: (box[1], box[0]))
    for end in range(1, len(boxes)):
        for i in range(end, 0, -1):
            if abs(boxes[i][1] - boxes[i - 1][1]) < 10 and boxes[i][0] < boxes[i - 1][0]:
                boxes[i - 1:i + 1] = boxes[i], boxes[i - 1]
    return boxes


def edit_distance(a, b):
    """Levenshtein: how few insertions, deletions and replacements of a letter turn a into b."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (letter != other))
    return row[-1]


QUOTED = re.compile(r'["“”]([^"“”]*[^"“”\s][^"“”]*)["“”]')  # in double quotes, straight or curly, and not blank


def quoted_text(prompt):
    """What the image should say: the prompt's first text in quotes."""
    found = QUOTED.search(prompt)
    if not found:
        raise UsageError(f"ocr compares with the text in double quotes, and the prompt {prompt!r} has none.")
    return found[1]


def text_score(read, wanted):
    """1 - edit distance / length, 0 or more; 1 if `read` holds `wanted`. Blanks and capitals are ignored."""
    read, wanted = (text.replace(" ", "").lower() for text in (read, wanted))
    distance = 0 if wanted in read else min(edit_distance(read, wanted), len(wanted))
    return 1 - distance / len(wanted)


@dataclasses.dataclass
class OCR:
    """How much of the quoted text can be read in the image.

    Another version of PP-OCR than the paper's (2.9.1 of paddleocr): compare scores with others of this file only.
    """
    name, differentiable = "ocr", False
    detector: object         # PP-OCRv5's network that finds lines of text
    detector_view: object    # and its image processor
    reader: object           # PP-OCRv5's network that reads a line
    reader_view: object      # and its image processor
    device: str = "cpu"

    @classmethod
    def load(cls, cfg):
        """The two server networks, which are the larger ones."""
        parts = []
        for part, loader in (("det", transformers.PPOCRV5ServerDetForObjectDetection),
                             ("rec", transformers.PPOCRV5ServerRecForTextRecognition)):
            repo = f"PaddlePaddle/PP-OCRv5_server_{part}_safetensors"
            view = from_hub(transformers.AutoImageProcessor.from_pretrained, repo, cfg,
                            needs="preprocessor_config.json")
            parts += [load_whole(loader, repo, cfg), view]
        return cls(*parts, cfg.device)

    def line(self, crop):
        """One line of text, uint8 (3,h,w) -> its letters, or "" when unsure.

        Lines are read one by one: in a batch the processor would stretch all of them to the widest one's shape.
        """
        if crop.shape[1] >= 1.5 * crop.shape[2]:
            crop = crop.rot90(1, (1, 2))   # upright writing, laid down
        inputs = self.reader_view(images=[crop], return_tensors="pt").to(self.device)
        found = self.reader_view.post_process_text_recognition(self.reader(inputs["pixel_values"]))[0]
        return found["text"] if found["score"] >= .5 else ""   # NaN, the score of no letters, fails too

    @torch.no_grad()
    def read(self, image):
        """uint8 (3,H,W) -> all of its text, lines in reading order, joined without a blank."""
        inputs = self.detector_view(images=[image], return_tensors="pt").to(self.device)
        heat = self.detector(inputs["pixel_values"]).last_hidden_state[0, 0].float().cpu().numpy()
        boxes = text_boxes(heat, *image.shape[-2:])
        return "".join(self.line(image[:, y1:y2, x1:x2]) for x1, y1, x2, y2 in boxes)

    def __call__(self, images, prompts):
        """images (B,3,H,W), prompts with a quoted text -> (B,) in 0..1"""
        wanted = [quoted_text(p) for p in prompts]
        return images.new_tensor([text_score(self.read(i), w) for i, w in zip(as_bytes(images), wanted)])


# ------------------------------------------------------------------------------------------------------------
# 8. The table of metrics, and how a set of images is scored and summed up
# ------------------------------------------------------------------------------------------------------------

# In the order of the paper's tables. What computes them is found by REWARDS of rtdmd.py.
METRICS = {
    "clipscore":   dict(column="CLIPScore", scale="cosine", licence="MIT", repo=CLIP_L14),
    "aesthetic":   dict(column="Aesthetic", scale="1 to 10", licence="Apache-2.0, MIT",
                        repo=f"ttj/sac-logos-ava1-l14-linearMSE, {CLIP_L14}"),
    "pickscore":   dict(column="PickScore", scale="cosine x about 100", licence="MIT",
                        repo=REWARDS["pickscore"]["repo"]),
    "hpsv2":       dict(column="HPSv2", scale="cosine, v2.1 weights", licence="Apache-2.0",
                        repo=REWARDS["hpsv2"]["repo"]),
    "imagereward": dict(column="ImageReward", scale="about 0 +- 1", licence="Apache-2.0",
                        repo="zai-org/ImageReward, google-bert/bert-base-uncased"),
    "hpsv3":       dict(column="HPSv3", scale="unbounded, 10 to 16", licence="MIT, Apache-2.0",
                        repo="MizzenAI/HPSv3, Qwen/Qwen2-VL-7B-Instruct"),
    "geneval":     dict(column="GenEval", scale="0 to 1", licence="MIT rules, other detector",
                        repo="facebook/mask2former-swin-small-coco-instance, "
                             "timm/vit_large_patch14_clip_224.openai"),
    "geneval2":    dict(column="GenEval2", scale="0 to 1", repo="Qwen/Qwen3-VL-8B-Instruct",
                        licence="Apache-2.0 judge, CC BY-NC 4.0 prompts"),
    "ocr":         dict(column="OCR", scale="0 to 1", licence="Apache-2.0",
                        repo="PaddlePaddle/PP-OCRv5_server_det_safetensors, "
                             "PaddlePaddle/PP-OCRv5_server_rec_safetensors"),
}
TINY_COLUMNS = dict(attributes="reward", strict="accuracy", heldout="held-out reward",
                    heldout_strict="held-out accuracy", distance="distance", diversity="diversity")
SET_METRICS = ("distance", "diversity")           # of the whole set, not of a picture
DEFAULT_METRICS = {"tiny": ",".join(TINY_COLUMNS), "real": "clipscore,aesthetic,pickscore,hpsv2,imagereward"}


def check_metrics(flags, own=()):
    """Refuses an unknown metric, and a module without it, before anything is loaded or sampled."""
    if "=" in ",".join(flags.metrics) or not all(flags.metrics) or len({*flags.metrics}) < len(flags.metrics):
        raise UsageError(f"--metrics {','.join(flags.metrics)}: give names, each once, separated by commas.")
    rtdmd.parse_rewards(",".join(flags.metrics), own, "--metrics")


# Of each repository one file is looked for before anything is sampled: this one, or else config.json.
FIRST_FILE = {"xswu/HPSv2": "HPS_v2.1_compressed.pt", "zai-org/ImageReward": "ImageReward.pt",
              "google-bert/bert-base-uncased": "tokenizer.json", "MizzenAI/HPSv3": "HPSv3.safetensors",
              "timm/vit_large_patch14_clip_224.openai": "open_clip_model.safetensors"}


def missing_weights(metrics, cfg):
    """{metric: a sentence} for each whose files are neither here nor on the hub, or hold no weights. No network is
    loaded, which would take minutes: a fault that only loading shows costs that metric alone, in score_rows."""
    problems = {}
    for name in (name for name in metrics if name in METRICS):
        try:
            if name == "hpsv3":
                hpsv3_instruction(cfg)                       # without it the weights are useless
            for repo in METRICS[name]["repo"].split(", "):
                look_at(Aesthetic.find_head(cfg) if repo.startswith("ttj/") else
                        find_weights(repo, FIRST_FILE.get(repo, "config.json"), cfg))
        except UsageError as error:
            problems[name] = str(error)
    return problems


def look_at(path):
    """UsageError where a file, or the weights beside a config.json, are empty, cut short, a web page or what Git LFS
    leaves in place of a file. Only the beginning is read, and the directory of a .safetensors or zip."""
    for file in sorted(path.parent.glob("*.safetensors")) if path.name == "config.json" else [path]:
        try:
            with open(file, "rb") as opened:
                head = opened.read(32).strip().lower()
            page = head.startswith(b"<") and file.suffix != ".safetensors"   # which begins with a length: any bytes
            if not head or page or head.startswith(b"version https://git-lfs"):
                raise ValueError("it is empty, a web page or a pointer of Git LFS")
            if head.startswith(b"pk") and not zipfile.is_zipfile(file):      # PyTorch's own format is a zip
                raise ValueError("it is cut short")
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            raise UsageError(f"{file} holds no weights ({error!s:.100}): download it again.") from error


def load_metric(name, cfg):
    """The scorer of that name with its real networks. (As a reward, geneval gives partial credit.)"""
    return rtdmd.load_reward("eval:GenEval" if name == "geneval" else name, cfg)


def picture(item):
    """A picture file, or bytes or floats (3, H, W), as floats in [0, 1]. OSError names a file that is no picture."""
    if isinstance(item, Path):
        try:
            if not item.is_file():                        # a pipe or a device would be read for ever
                raise ValueError("it is no file")
            with Image.open(item) as image:
                item = torch.from_numpy(np.array(as_shown(image))).permute(2, 0, 1)
        except Exception as error:                        # Pillow raises ten kinds, SyntaxError among them
            raise OSError(f"the picture {str(item)!r} cannot be read ({error!r:.150}).") from error
    return item if item.is_floating_point() else item.float() / 255


def as_shown(image):
    """A PIL image as a viewer shows it, in sRGB: turned as its EXIF orientation says, 16 bits scaled to 8, its colour
    profile applied, transparent parts on white. convert("RGB") alone does none of this. ValueError where there is more
    than one frame, or no agreed range of values."""
    if getattr(image, "is_animated", False) and image.format != "MPO":     # MPO: a photo with its preview
        raise ValueError("it has several frames: save the one that is meant")
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() clips
        values = np.array(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its values are beyond 16 bits")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("it holds floats without a known range: save it with 8 or 16 bits")
    with contextlib.suppress(ImageCms.PyCMSError, OSError):  # viewers ignore a profile that is broken
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        if image.mode in ("RGB", "RGBA", "L", "CMYK") and "sRGB" not in ImageCms.getProfileDescription(source):
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"),
                                              outputMode="RGBA" if image.mode == "RGBA" else "RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@torch.no_grad()
def run_metric(scorer, images, prompts, batch=16, device="cpu"):
    """Scores of a set of images: {name: list of floats, NaN where one failed}, a sentence on each failure.

    images: anything indexable that gives what picture() takes, files too: a set may not fit into memory.
    Scorers that know more than one number (geneval, geneval2) have `details`, which returns them all.
    """
    own = getattr(scorer, "name", getattr(scorer, "__name__", type(scorer).__name__))
    results, failures = [{} for _ in prompts], []

    def judge(rows):
        """Scores a batch, or its halves if it fails: one bad image or file costs its own score and no other."""
        found = {}

        def call(images, prompts):
            found.update(scorer.details(images, prompts) if hasattr(scorer, "details") else {})
            return found[own] if found else scorer(images, prompts)

        try:
            stack = torch.stack([picture(images[i]) for i in rows]).to(device)
            found[own] = rate(own, call, stack, [prompts[i] for i in rows])
        except (UsageError, MemoryError, OSError, RuntimeError) as error:   # scorer, file, images of two sizes
            if len(rows) == 1:
                where = "" if isinstance(error, UsageError) else f"{own}, prompt {prompts[rows[0]]!r}: "
                failures.append(f"{where}{error}")
                return
        else:
            for n, i in enumerate(rows):
                results[i] = {name: column[n].item() for name, column in found.items()}
                if not math.isfinite(results[i][own]):
                    failures.append(f"{own} is {results[i][own]} for the prompt {prompts[i]!r}")
            return
        judge(rows[:len(rows) // 2])    # not inside `except`, where the exception holds the memory of the failed pass
        judge(rows[len(rows) // 2:])

    for rows in rtdmd.chunks(len(prompts), batch):
        judge(range(len(prompts))[rows])
    names = dict.fromkeys([own, *(name for row in results for name in row)])
    return {name: [row.get(name, math.nan) for row in results] for name in names}, failures


def free():
    """Gives the memory of networks that nobody holds any more back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def mean_and_error(values, prompts=None):
    """Mean of the finite scores, and its standard error over prompts (none given: all differ).

    The pictures of one prompt are not independent: an error over pictures would be too small.
    """
    groups = {}
    for prompt, value in zip(prompts or range(len(values)), values):
        if math.isfinite(value):
            groups.setdefault(prompt, []).append(value)
    means = [sum(group) / len(group) for group in groups.values()]
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return float(np.mean(means)) if means else math.nan, error


# ------------------------------------------------------------------------------------------------------------
# 9. Command line. About the model itself eval.py has rtdmd.py's flags; a run folder and a checkpoint bring
# theirs.
# ------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Flags:
    """What to sample and what to measure: type, default, unit and source."""

    # ---- What to do: one of these
    run_folder: str = opt("", "run folder: teacher, also with guidance, untrained student, both stages side by side")
    lora: str = opt("", "checkpoint, or a stage's folder (its newest): sampled as it was trained")
    teacher: bool = opt(False, "the teacher, Euler steps: --teacher --nfe 50 --cfg 7")
    images: str = opt("", "folder of pictures; metadata.jsonl (file_name, prompt) or names give the prompts")
    compare: list = opt((), "two report.json: differences B - A with paired standard errors", type=str, nargs=2,
                        metavar=("A", "B"))
    prompt: str = opt("", "only make one picture of this prompt, OUT/prompt.png")
    dry_run: int = opt(0, "what N iterations of training cost; takes all flags of rtdmd.py; --device meta counts")
    ablations: bool = opt(False, "the paper's questions on the tiny world; goes on where it was stopped")
    seeds: int = opt(0, "seeds of --ablations; default: 5, with --quick 2")
    quick: bool = opt(False, "--ablations: Tables 3 and 4 only, with two seeds, in half an hour")
    jobs: int = opt(2, "rows of --ablations that are trained at a time, on the cores divided by it")
    only: str = opt("", "rows of --ablations whose name, such as 'stage 2: SubGRPO M=2', contains this, or tables "
                    "whose name begins with it")
    # ---- What to measure
    metrics: str = opt("", "names, comma separated; module:attribute for your own")
    per_prompt: int = opt(0, "pictures per prompt (ours; diversity needs two)")
    max_prompts: int = opt(1000, "prompts taken from the set (ours)")
    out: str = opt("", "folder of report.json, grid.png, images/; default: the run folder, else runs/eval")
    save_images: bool = opt(False, "also write every picture to OUT/images")
    # ---- Sampler (App. C)
    nfe: int = opt(0, "steps; default: the checkpoint's own, else 4 (paper 3.1); the teacher's 50")
    eta: float = opt(-1.0, "the student's CPS randomness; default: the checkpoint's, else 0.9 (paper 4.1)")
    cfg: float = opt(1.0, "guidance weight of --teacher; 1 is none")
    batch: int = opt(0, "pictures per forward: the memory knob, changes nothing else")


FLAG_GROUPS = dict(run_folder="what to do (one of these)", metrics="what to measure", nfe="sampler (App. C)",
                   model="model (flags of rtdmd.py)")  # first fields
MODEL_FLAGS = ("model", "pretrained", "resolution", "device", "dtype", "cache", "prompts", "text_length",
               "weights_dir", "seed")
# Defaults that depend on the model. DrawBench is the set of the paper's Tables 2 to 4.
OWN_DEFAULTS = {"tiny": dict(prompts="eval:tiny_test_captions", metrics=DEFAULT_METRICS["tiny"], per_prompt=8,
                             batch=128),
                "real": dict(prompts="drawbench", metrics=DEFAULT_METRICS["real"], per_prompt=1, batch=8)}


# Beyond these a number is a slip of the finger, and would end in an overflow or never.
MOST = dict(nfe=rtdmd.MOST["steps"], per_prompt=10**4, batch=10**6, max_prompts=10**9, seeds=1000, jobs=256)
MOST_DRY = 10**6


def read_flags(argv):
    """The flags that were given, by name. Raises UsageError for an unknown one."""
    shared = [field for field in dataclasses.fields(rtdmd.Config) if field.name in MODEL_FLAGS]
    shown = {name: f"{real}; tiny: {OWN_DEFAULTS['tiny'][name]}" for name, real in OWN_DEFAULTS["real"].items()}
    shown |= dict(nfe="", eta="", seeds="")                  # their help texts say it
    return rtdmd.parse_flags(argv, [*dataclasses.fields(Flags), *shared], FLAG_GROUPS,
                             "eval.py --lora DIR | --run_folder DIR | ... [flags]", __doc__, shown)


def parse(argv):
    """(Flags, rtdmd.Config) from the command line. Raises UsageError for a value out of range."""
    given = read_flags(argv)
    shared, run = {n: v for n, v in given.items() if n in MODEL_FLAGS}, settings_of(given.get("run_folder", ""))
    of_model = {*MODEL_FLAGS, "guidance"} - {"device", "prompts"}
    cfg = rtdmd.resolve({**{n: v for n, v in run.items() if n in of_model}, **shared})
    cfg.steps, cfg.eta = run.get("steps", cfg.steps), run.get("eta", cfg.eta)  # in resolve, --batch would have to fit
    cfg.no_compile = True                                                       # a report has many shapes
    own = dict(OWN_DEFAULTS["tiny" if cfg.model == "tiny" else "real"])
    cfg.prompts = given.get("prompts", own.pop("prompts"))
    if "images" in given:
        own["metrics"] = DEFAULT_METRICS["real"]             # the tiny world's judges know its own pictures only
    flags = Flags(**{**own, **{n: v for n, v in given.items() if n not in MODEL_FLAGS}})
    flags.metrics, flags.given = [name.strip() for name in flags.metrics.split(",")], set(given)
    flags.out = flags.out or flags.run_folder or ("runs/ablations" if flags.ablations else "runs/eval")
    check_flags(flags, cfg, given)
    return flags, cfg


ABLATION_FLAGS = set("ablations quick seeds jobs only out model cache pretrained device".split())


def check_flags(flags, cfg, given):
    """Values out of range, commands that exclude each other, and text that is none. Raises UsageError."""
    for name, most in MOST.items():
        if name in given and not 1 <= given[name] <= most:
            raise UsageError(f"--{name} must be at {'least 1' if given[name] < 1 else f'most {most}'}.")
    if "eta" in given and not 0 <= flags.eta <= 1:
        raise UsageError("--eta must lie in [0, 1].")
    if "cfg" in given and not (flags.teacher and 0 <= flags.cfg <= 10**6):
        raise UsageError("--cfg is the guidance of --teacher, a number from 0 to 1000000: students are sampled "
                         "without.")
    try:
        rtdmd.prompt_of(flags.prompt)
    except ValueError as error:                              # bytes that are not UTF-8, or a text without end
        raise UsageError(f"--prompt cannot be read ({error!s:.100}): give a text in UTF-8.") from error
    if flags.ablations and cfg.model != "tiny":
        raise UsageError("--ablations are asked on the tiny world: leave out --model.")
    if flags.ablations and rtdmd.dist_info()[2] > 1:
        raise UsageError("--ablations start their own processes: leave out torchrun, and give --jobs.")
    commands = ("ablations", "lora", "run_folder", "teacher", "images", "compare", "prompt")
    chosen = [name for name in commands if given.get(name)]
    if not chosen:
        raise UsageError("Say what to evaluate: --lora DIR, --run_folder DIR, --teacher, --images DIR, "
                         "--compare A B or --prompt TEXT.")
    if len(chosen) > 1 and {"ablations", "images", "compare"} & set(chosen):
        raise UsageError(f"--{' and --'.join(chosen)} are different commands: give them one after the other.")
    if flags.images and (more := {"max_prompts", "per_prompt", "save_images"} & set(given)):
        raise UsageError(f"--images scores every picture of the folder: leave --{min(more)} out.")
    if flags.ablations and (more := given.keys() - ABLATION_FLAGS):
        raise UsageError(f"--ablations have their own {', '.join(sorted(more))}: leave --{min(more)} out.")
    if {"geneval", "geneval2"} & set(flags.metrics) and not cfg.prompts.endswith(".jsonl"):
        raise UsageError("--metrics geneval and geneval2 must know what a picture has to show: give --prompts "
                         "FILE.jsonl of their metadata rows, or other --metrics.")


def settings_of(run):
    """The settings in a run folder's own run.json: --run_folder needs no second list of flags. {} without one."""
    found = [path for stage in (1, 2) if run and (path := Path(run) / f"stage{stage}/run.json").exists()]
    if run and not found and not any(Path(run).glob("stage[12]/checkpoint-*")):
        raise UsageError(f"--run_folder {run}: there is no run here: give the --out of rtdmd.py, or --lora.")
    try:
        config = {} | json.loads(found[0].read_text())["config"] if found else {}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UsageError(f"{found[0]} is damaged ({error!r:.100}): delete it, and give the run's flags.") from None
    of_model = {n: n for n in (*MODEL_FLAGS, "guidance", "steps", "eta") if n not in ("device", "prompts")}
    return checked(config, of_model, found and found[0], "delete it, and give the run's flags")


def checked(facts, fields, where, remedy, needed=()):
    """Returns `facts`, read from the file `where`. UsageError names file and field if one of the `fields` {name: flag
    of rtdmd.py} has a value that its flag would refuse, or is missing though it is `needed`."""
    for name, flag in fields.items():
        wrong = unfit(flag, facts[name]) if name in facts else "is missing" if name in needed else ""
        if wrong:
            raise UsageError(f"{where}: the field {name!r} {wrong}: {remedy}.")
    return facts


def unfit(flag, value):
    """What is wrong with a value for a flag of rtdmd.py: its type, or its range. "" if nothing is."""
    kind = type(getattr(rtdmd.Config, flag))
    if kind is str:
        known = ("", "bf16", "fp32") if flag == "dtype" else (value,)
        return "" if isinstance(value, str) and value in known else "is no such text"
    least = rtdmd.LEAST.get(flag, int(kind is int))
    most = rtdmd.MOST.get(flag, 10**9 if kind is int else 10**6)
    fits = type(value) is int or kind is float and type(value) is float
    whole = "whole " if kind is int else ""
    return "" if fits and least <= value <= most else f"is no {whole}number from {least} to {most}"


# ------------------------------------------------------------------------------------------------------------
# 10. Sampling
# ------------------------------------------------------------------------------------------------------------

def checkpoint_at(path):
    """The newest whole checkpoint at a path, or a bare folder with an exported adapter. Raises UsageError."""
    export, state = (Path(path) / name for name in (rtdmd.LORA_FILE, rtdmd.STATE_FILE))
    bare = export.exists() and not state.exists()                           # with a state it is checked
    found = Path(path) if bare else rtdmd.find_checkpoint(path)
    if not found:
        raise UsageError(f"There is no checkpoint at {path}: give a stage's folder, such as runs/tiny/stage2.")
    return found


def plan(flags, cfg):
    """The rows of the table: {name: dict(role, nfe, eta, guidance, lora)}, all from the same starting noise.

    A checkpoint is sampled as it was trained unless a flag says otherwise; cfg.resolution becomes its own, too.
    """
    infos, rows = [], {}

    def student(lora=None):
        info = adapter_info(lora, flags.given) if lora else {}
        infos.extend([info] if lora else [])
        if lora and info["model"] != cfg.model:
            raise UsageError(f"The adapter is one of {info['model']!r:.60}: add the --model of its training.")
        if "resolution" not in flags.given:
            cfg.resolution = info.get("resolution", cfg.resolution)
        return dict(role="generator", nfe=flags.nfe or info.get("steps", cfg.steps), guidance=1.0, lora=lora,
                    eta=flags.eta if flags.eta >= 0 else info.get("eta", cfg.eta))

    def teacher(nfe, guidance):
        return dict(role="teacher", nfe=nfe, eta=0.0, guidance=guidance, lora=None)

    if flags.run_folder:                                     # 50 steps, with guidance 100 NFE: the paper's 4.2
        rows = {"teacher": teacher(50, 1.0)}
        if cfg.guidance != 1:                                # or it is the same row, and another 50 steps
            rows["teacher_cfg"] = teacher(50, cfg.guidance)
        rows["student_init"] = student()
        for folder in (Path(flags.run_folder) / "stage1", Path(flags.run_folder) / "stage2"):
            if rtdmd.list_checkpoints(folder):
                rows[folder.name] = student(checkpoint_at(folder))
    if flags.teacher and (own := teacher(flags.nfe or 50, flags.cfg)) not in rows.values():
        rows["teacher_2" if rows else "teacher"] = own
    if flags.lora:
        add_row(rows, flags.lora, student(checkpoint_at(flags.lora)))
    for name in ("rank", "alpha", "resolution", "text_length"):              # there is one network, of one size
        if name not in flags.given and len({info.get(name) for info in infos}) > 1:
            raise UsageError(f"The checkpoints differ in {name}: evaluate them one after the other.")
    return rows or {"student_init": student()}


def adapter_info(folder, given):
    """load_lora's info. UsageError if it lacks a setting that sampling needs and that no flag gives."""
    flag_of = dict(model="", steps="nfe", eta="eta", resolution="resolution")
    return checked(load_lora(folder)[1], ADAPTER_FIELDS, Path(folder) / rtdmd.LORA_FILE, "take another checkpoint",
                   needed=[name for name, flag in flag_of.items() if flag not in given])


def add_row(rows, path, row):
    """Adds the row of --lora under the name of its folder, which may be a stage's of another run."""
    name, above = folder_name(path), folder_name(Path(path) / "..")
    if name in rows and rows[name]["lora"] and rows[name]["lora"].resolve() == row["lora"].resolve():
        return                                               # it is a row of --run_folder already
    taken = {*rows, "teacher", "teacher_2", "teacher_cfg", "student_init"}
    free = [n for n in (name, f"{name} of {above}"[:60]) if n not in taken]
    if not free:
        raise UsageError(f"--lora {path} would be a second row called {name!r}: rename its folder, or evaluate it "
                         "alone.")
    rows[free[0]] = row


def folder_name(path):
    """The name of a folder, for a row of the table and for a folder of OUT/images: also of "." and "..", without
    what cannot be printed, and short enough for every file system."""
    name = os.path.basename(os.path.abspath(path)) or "root"
    return "".join(letter if letter.isprintable() else "_" for letter in name)[:60]


def label(name, row):
    """A row of plan in words, such as "teacher, 50 steps, guidance 1.5"."""
    steps = f"{row['nfe']} step{'s' if row['nfe'] > 1 else ''}"
    if row["role"] == "teacher":
        guided = row["guidance"] != 1 or name == "teacher_cfg"
        return f"teacher, {steps}" + (f", guidance {row['guidance']:g}" if guided else "")
    words = re.sub("^stage(?=[12]( |$))", "stage ", name) if row["lora"] else "untrained student"
    return f"{words}, {steps}"


# Fields of an adapter's metadata, by the flags of rtdmd.py whose types and ranges they have.
ADAPTER_FIELDS = dict(rank="lora_rank", alpha="lora_alpha", model="model", steps="steps", eta="eta",
                      resolution="resolution", text_length="text_length")


def load_lora(folder):
    """(state_dict, info) of a saved adapter; info as it was saved, plus "rank", "alpha" and "targets"."""
    path, remedy = Path(folder) / rtdmd.LORA_FILE, "take another checkpoint"
    try:
        with safe_open(path, "pt") as file:
            state_dict = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}
            info = {} | json.loads((file.metadata() or {})["rtdmd"])
    except (OSError, KeyError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise UsageError(f"{path} is missing or damaged, or tells no rank and alpha: {remedy}.") from error
    checked(info, ADAPTER_FIELDS, path, remedy, needed=("rank", "alpha"))
    targets = info.get("targets")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise UsageError(f"{path}: the field 'targets' is no list of names: {remedy}.")
    if {tensor.shape[:1] for name, tensor in state_dict.items() if ".lora_A." in name} != {(info["rank"],)}:
        raise UsageError(f"{path}: the field 'rank' is {info['rank']}, which its tensors do not have: {remedy}.")
    for name, tensor in state_dict.items():
        if not (tensor.is_floating_point() and tensor.float().isfinite().all()):
            raise UsageError(f"{path}: its tensor {name!r} holds values that are no finite numbers: {remedy}.")
    return state_dict, info


class Sampler:
    """Backbone, adapters and text embeddings, ready to sample rows of a plan."""

    def __init__(self, cfg, rows, prompts):
        adapters = {name: load_lora(row["lora"]) for name, row in rows.items() if row["lora"]}
        for _, info in adapters.values():
            cfg.lora_rank, cfg.lora_alpha = info["rank"], info["alpha"]
            cfg.text_length = cfg.text_length or info.get("text_length", 0)  # padding is part of the condition
        cfg.device = rtdmd.start_processes(cfg.device)
        self.cfg, self.adapters, self.backbone = cfg, adapters, rtdmd.backbone_class(cfg.model)(cfg)
        self.roles = rtdmd.Roles(self.backbone, cfg)
        self.blank = {n: p.detach().clone() for n, p in self.roles.named["generator"].items()}
        for name in adapters:
            self.load_adapter(name)                          # one that does not fit is known before hours of work
        self.text = rtdmd.TextCache(self.backbone, Path(cfg.cache) / "text")
        self.text.prepare(prompts)

    def load_adapter(self, name):
        """Puts a row's adapter on; a row without one gets the untrained adapter, which does nothing."""
        tensors = self.adapters.get(name, (self.blank,))[0]
        rtdmd.copy_tensors(tensors, self.roles.named["generator"], f"The adapter of {name}")

    @torch.no_grad()
    def rollout(self, row, prompts, keys):
        """States and x-predictions of all steps. Noise belongs to a picture's key: no batch, rank or row changes it."""
        shape, device = self.backbone.latent_shape, self.cfg.device
        _, (start,) = rtdmd.draw([rtdmd.key(k, "start") for k in keys], 0, 1, shape, device)
        steps = row["nfe"] - 1 if row["eta"] > 0 else 0
        _, noise = rtdmd.draw([rtdmd.key(k, "steps") for k in keys], 0, steps, shape, device)
        noise = noise if steps else [0.0] * row["nfe"]                       # Euler steps have none
        cond, null = self.text.batch(prompts, device), self.text.batch([""], device)
        self.roles.guidance = row["guidance"]
        velocity = ((lambda x, t: self.roles.teacher(x, t, cond, null)) if row["role"] == "teacher" else
                    (lambda x, t: self.roles.velocity("generator", x, t, cond)))
        times = rtdmd.timestep_schedule(row["nfe"], self.backbone.shift_for(row["nfe"])).to(device)
        return rtdmd.rollout(velocity, start, noise, times, row["eta"])

    @torch.no_grad()
    def batch(self, row, prompts, keys):
        """Images (B, 3, H, W) in [0, 1]."""
        x = self.rollout(row, prompts, keys)[0][-1]
        broken = ~x.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)  # a decoder would clamp inf to white
        return self.backbone.decode(x).masked_fill(broken, math.nan)

    def sample(self, name, row, captions, flags):
        """This process's share of a row: indices into captions, bytes (n, 3, H, W), seconds per image. Pictures that
        are not finite are left out: as bytes they would look like others."""
        self.load_adapter(name)
        mine, found, parts, start = rtdmd.share(len(captions)), [], [], time.perf_counter()
        parts_of_mine = rtdmd.chunks(len(mine), flags.batch)
        for rows in rtdmd.progress(parts_of_mine, len(parts_of_mine), label(name, row)):
            texts = [captions[i] for i in mine[rows]]
            keys = [rtdmd.key("eval", self.cfg.seed, captions[i], i % flags.per_prompt) for i in mine[rows]]
            images = self.batch(row, texts, keys)
            finite = images.isfinite().flatten(1).all(1).cpu()
            parts.append(as_bytes(images).cpu()[finite])
            found += [i for i, good in zip(mine[rows], finite) if good]
        seconds = (time.perf_counter() - start) / max(1, len(mine))
        return found, torch.cat(parts) if parts else torch.zeros(0, 3, 1, 1, dtype=torch.uint8), seconds

    def free(self):
        """Drops networks before the judges come: a reward model may need the room."""
        self.roles = self.backbone.nets = None
        free()


# ------------------------------------------------------------------------------------------------------------
# 11. Scoring and reports. pictures {row: (indices, images)}: this process's share, all rows of the same captions.
# An index that no process has is a picture that was not finite.
# ------------------------------------------------------------------------------------------------------------

def gathered(pairs):
    """{index: value} of all processes in the order of the index, a picture's place in the set."""
    return dict(sorted(itertools.chain(*rtdmd.everyone(list(pairs)))))


def score_rows(pictures, captions, flags, cfg, own=(), labels={}):
    """{row: {metric: list over all captions}}, sentences on failures, by the rows' labels. One scorer is in memory at
    a time; one that cannot be loaded is a failure, and costs the others nothing."""
    scores, failures = {row: {} for row in pictures}, []
    for name in (name for name in flags.metrics if name not in SET_METRICS):
        scorer = problem = None
        try:
            scorer = own[name] if name in own else load_metric(name, cfg)
        except (UsageError, MemoryError, RuntimeError) as error:
            problem = f"{name}: {error}"
        if problems := [text for text in rtdmd.everyone(problem) if text]:
            failures.append(problems[0])
            continue
        for row, (index, images) in pictures.items():
            texts = [captions[i] for i in index]
            values, failed = run_metric(scorer, images, texts, max(flags.batch, 16), cfg.device)
            values = dict(zip([name, *list(values)[1:]], values.values()))   # first its own, whatever it is called
            failures += [f"{labels.get(row, row)}: {text}" for text in itertools.chain(*rtdmd.everyone(failed))]
            lost = [math.nan] * len(index)  # a process without a score does not know all of the names
            for metric in dict.fromkeys(itertools.chain(*rtdmd.everyone(list(values)))):
                found = gathered(zip(index, values.get(metric, lost)))
                scores[row][metric] = [found.get(i, math.nan) for i in range(len(captions))]
        del scorer
        free()
    return scores, failures


def summarise(scores, captions, tasks):
    """{metric: (mean, standard error)} of one row; for geneval the mean of task means, and each task."""
    result = {name: mean_and_error(values, captions) for name, values in scores.items()}
    return result | (geneval_summary(scores["geneval"], captions, tasks) if "geneval" in scores else {})


def number(mean, error):
    """A mean with its standard error: three decimals, or four or five where the error needs them."""
    digits = min(max(3, -math.floor(math.log10(error))), 5) if 0 < error < math.inf else 3
    return f"{mean:.4g}" if math.isnan(error) else f"{mean:.{digits}f}±{error:.{digits}f}"


def table(rows, labels={}):
    """rows {name: {metric: (mean, error)}} as text, in the order and with the columns of the paper. labels: names in
    words."""
    columns = {**TINY_COLUMNS, **{name: metric["column"] for name, metric in METRICS.items()}}
    found = {metric for row in rows.values() for metric in row}
    metrics = [*(m for m in columns if m in found), *sorted(found - columns.keys())]
    lines = [["", *(columns.get(m, m) for m in metrics)]]
    lines += [[labels.get(name, name), *(number(*row[m]) if m in row else "" for m in metrics)]
              for name, row in rows.items()]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    adjusted = ([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])] for name, *cells in lines)
    return "\n".join(map("  ".join, adjusted))


def try_folder(folder):
    """Makes the folder and, for a moment, a file in it: what cannot be written is known before hours of work."""
    if rtdmd.dist_info()[0] == 0:
        trial = Path(folder) / ".trial"
        rtdmd.write_atomic(trial, bytes(2**16))
        trial.unlink(missing_ok=True)


def without_nan(value):
    """The same value for JSON, which has no nan and no inf: null in their place."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(flags, results, scores, failures, note="", labels={}, **facts):
    """The table, and OUT/report.json: rows, their errors, every score, and what made them. Rank 0 only."""
    if rtdmd.dist_info()[0] != 0:
        return
    used = [m for m in METRICS if any(m in row for row in results.values())]
    content = dict(rows={n: {m: value for m, (value, _) in row.items()} for n, row in results.items()},
                   errors={n: {m: error for m, (_, error) in row.items()} for n, row in results.items()},
                   scores=scores, **rtdmd.provenance(),
                   scorers={m: {k: METRICS[m][k] for k in ("repo", "scale", "licence")} for m in used},
                   per_prompt=flags.per_prompt, failures=failures, **facts)
    lost = [f"not scored: {text}" for text in failures[:10]]
    if len(failures) > 10:
        lost.append(f"not scored: {len(failures) - 10} more, all in {flags.out}/report.json")
    try:                                                     # neither a full disk nor a closed pipe costs the other
        print("\n".join([table(results, labels), *filter(None, [note]), *lost]), flush=True)
    finally:
        text = json.dumps(without_nan(content), indent=1, default=str, allow_nan=False)
        rtdmd.write_atomic(Path(flags.out) / "report.json", text)


def demand_scores(flags, scores, dead=()):
    """After the report: a row without a finite picture and a metric without a score are errors, for whoever waits on
    the exit code."""
    if dead:
        raise UsageError(f"no picture of {' and '.join(dead)} is finite: take another checkpoint or --dtype fp32; "
                         f"{flags.out}/report.json has the rest.", code=1)
    found = {m for row in scores.values() for m, values in row.items() if np.isfinite(values).any()}
    if lost := [m for m in flags.metrics if m not in found and m not in SET_METRICS]:
        raise UsageError(f"nothing was scored by {', '.join(lost)}; {flags.out}/report.json has the rest.", code=1)


def warn_of_missing(flags, cfg, own):
    """Says which metrics will be left out, while the command can still be stopped. UsageError if all will."""
    problems = missing_weights([name for name in flags.metrics if name not in own], cfg)
    if problems.keys() == set(flags.metrics):
        raise UsageError(next(iter(problems.values())))
    for name, problem in problems.items():
        rtdmd.log(f"--metrics {name} will be left out: {problem}")


def evaluate(flags, cfg):
    """--run_folder, --lora, --teacher: samples the rows of a plan, scores them, writes the report and
    grid.png."""
    own = TINY_COLUMNS if cfg.model == "tiny" else getattr(rtdmd.backbone_class(cfg.model), "rewards", ())
    check_metrics(flags, own)
    rows, pictures, seconds = plan(flags, cfg), {}, {}
    labels = {name: label(name, row) for name, row in rows.items()}
    prompts = rtdmd.read_prompts(cfg.prompts, cfg.seed)[:flags.max_prompts]
    tasks = geneval_tasks(flags.metrics, prompts, cfg)
    captions = [prompt for prompt in prompts for _ in range(flags.per_prompt)]
    warn_of_missing(flags, cfg, own)
    try_folder(flags.out)
    sampler = Sampler(cfg, rows, prompts)
    for name, row in rows.items():
        *pictures[name], seconds[name] = sampler.sample(name, row, captions, flags)
    out = Path(flags.out)
    drawn = flags.run_folder and rtdmd.dist_info()[0] == 0
    trails = student_predictions(sampler, rows, prompts[:2]) if drawn else {}
    if cfg.model != "tiny":
        sampler.free()
    lost = {row: {*range(len(captions))} - gathered(zip(index, index)).keys()
            for row, (index, _) in pictures.items()}
    scores, failures = score_rows(pictures, captions, flags, cfg, getattr(sampler.backbone, "rewards", ()), labels)
    failures = [f"{labels[row]}: the picture of the prompt {captions[i]!r} is not finite"
                for row in rows for i in sorted(lost[row])] + failures
    results = {name: summarise(scores[name], captions, tasks) for name in rows}
    for name, (index, images) in pictures.items():
        if of_set := [m for m in SET_METRICS if m in flags.metrics]:
            found = whole_set_metrics(index, images, captions, flags.per_prompt)
            results[name].update({m: found[m] for m in of_set})
        results[name]["seconds_per_image"] = (seconds[name], math.nan)
    shown = range(0, len(captions), flags.per_prompt)[:8]
    panels = grid_rows(pictures, shown)
    prompt_hash = f"{rtdmd.key(prompts):016x}"               # names the prompts and their order
    note = (f"{len(prompts)} prompts x {flags.per_prompt} pictures, set {prompt_hash}, seed {cfg.seed}; ± is one "
            f"standard error. Pictures: {flags.out}/grid.png.")
    report(flags, results, scores, failures, note, labels, model=cfg.model, prompts=prompts,
           prompt_hash=prompt_hash, tasks=tasks, seed=cfg.seed, sampler=rows, resolution=cfg.resolution)
    if flags.save_images:  # after the report, like grid.png: if they cannot be written, the report is there
        save_pictures(out / "images", pictures, captions)
    if rtdmd.dist_info()[0] == 0:
        if len(panels):
            names = [": ".join(filter(None, [labels[row], headline(results[row])])) for row in rows]
            verdicts = [scores[row].get("heldout_strict", {}) for row in rows]
            if cfg.model == "tiny":                          # on top, what the captions mean
                real = real_renders(captions)
                judge = sampler.backbone.rewards["heldout_strict"]
                verdicts.insert(0, judge(real.to(cfg.device), captions).tolist())
                names.insert(0, f"real pictures: {np.mean(verdicts[0]):.0%} right")
                panels = torch.cat([real[[*shown]], panels])
            wrong = [at for at, (row, i) in enumerate(itertools.product(verdicts, shown)) if row and row[i] == 0]
            grid = named_grid(panels, len(shown), names, [captions[i] for i in shown], wrong)
            rtdmd.write_png(out / "grid.png", grid)
        if flags.run_folder:
            save_trajectories(out / "trajectory.png", trails, labels, prompts[:2])
            save_film(flags.run_folder, out / "training.gif")
            draw_run_curves(Path(flags.run_folder), out / "curves.png")
    demand_scores(flags, scores, [labels[row] for row in rows if len(lost[row]) == len(captions)])


def whole_set_metrics(index, images, captions, per_prompt):
    """tiny_set_metrics over the captions of which every picture is there."""
    found = gathered(zip(index, map(torch.clone, images)))
    groups = [range(i, i + per_prompt) for i in range(0, len(captions), per_prompt)]
    whole = [i for group in groups if all(i in found for i in group) for i in group]
    if not whole:
        return dict.fromkeys(SET_METRICS, (math.nan, math.nan))
    stack = torch.stack([found[i] for i in whole]).float() / 255
    return tiny_set_metrics(stack, [captions[i] for i in whole], per_prompt)


def grid_rows(pictures, shown):
    """Of each row the pictures `shown`, as floats: (rows * shown, 3, H, W). One that is missing is white."""
    found = [gathered((i, image.clone()) for i, image in zip(index, images) if i in shown)   # a view would send all
             for index, images in pictures.values()]
    known = next((image for row in found for image in row.values()), None)
    if known is None:
        return torch.zeros(0)
    blank = torch.full_like(known, 255)
    return torch.stack([row.get(i, blank) for row in found for i in shown]).float() / 255


def headline(result):
    """The tiny world's numbers over all pictures, which follow a row's name in grid.png."""
    texts = dict(heldout_strict="{:.0%} right", distance="distance {:.2f}", diversity="diversity {:.2f}")
    return ", ".join(text.format(result[metric][0]) for metric, text in texts.items() if metric in result)


def letters(font, width):
    """How many letters of a text are some `width` pixels wide."""
    return int(8 * width / font.getlength("abcdefgh"))


def named_grid(images, columns, names, below, framed=()):
    """Images (B, 3, H, W) in [0, 1] as one PIL image: each row under its name, and below each column its text, cut
    after six lines; the images `framed` in red. The letters grow with the pictures and names take no margin: a phone
    shows them large enough."""
    tiles = [rtdmd.grid(row, columns) for row in images.split(columns)]
    width, height = tiles[0].width // columns, tiles[0].height
    font = ImageFont.load_default(width // 6)
    line, most = int(1.3 * font.size), letters(font, width)
    texts = ["\n".join(textwrap.wrap(text, most, max_lines=6, placeholder=" ...")) for text in below]
    foot = line * (1 + max([text.count("\n") + 1 for text in texts], default=0))
    image = Image.new("RGB", (tiles[0].width, len(names) * (line + height) + foot), "white")
    pen = ImageDraw.Draw(image)
    for i, (name, tile) in enumerate(zip(names, tiles)):
        pen.text((2, i * (line + height) + line / 2), name, "black", font, anchor="lm")
        image.paste(tile, (0, i * (line + height) + line))
    for row, column in (divmod(i, columns) for i in framed):
        left, top = column * width, row * (line + height) + line
        pen.rectangle((left, top, left + width - 1, top + height - 1), outline="red", width=width // 25)
    for i, text in enumerate(texts):
        middle = (i + 0.5) * width
        pen.multiline_text((middle, image.height - foot + 4), text, "black", font, anchor="ma", align="center")
    return image


def student_predictions(sampler, rows, captions):
    """{student: images}: for each caption what each of the student's steps predicts, h = x - t v, in this order. The
    last prediction is its picture."""
    found = {}
    for name in (name for name, row in rows.items() if row["role"] != "teacher"):
        sampler.load_adapter(name)
        images = []
        for caption in captions:                             # one by one: two may not fit where --batch 1 is needed
            key = rtdmd.key("eval", sampler.cfg.seed, caption, 0)
            _, predictions = sampler.rollout(rows[name], [caption], [key])
            images += [sampler.backbone.decode(h).float().nan_to_num(1.0).cpu() for h in predictions]
        found[name] = torch.cat(images)
    return found


def save_trajectories(path, predictions, labels, captions):
    """Side by side, under each caption, a row for each student of student_predictions. No file if their numbers of
    steps differ."""
    if len({len(images) for images in predictions.values()}) > 1:
        path.unlink(missing_ok=True)                         # it would be another run's
        return
    images = torch.stack([*predictions.values()]).unflatten(1, (len(captions), -1))         # student, caption, step
    names, steps = [labels[name] for name in predictions], [f"step {k}" for k in range(1, images.shape[2] + 1)]
    parts = [named_grid(images[:, i].flatten(0, 1), len(steps), names, steps) for i in range(len(captions))]
    gap = parts[0].width // (2 * len(steps))
    font = ImageFont.load_default(gap // 3)
    image = Image.new("RGB", (len(parts) * (parts[0].width + gap) - gap, parts[0].height + gap), "white")
    for i, (part, caption) in enumerate(zip(parts, captions)):
        left = i * (part.width + gap)
        image.paste(part, (left, gap))
        caption = textwrap.shorten(caption, letters(font, part.width), placeholder=" ...")
        ImageDraw.Draw(image).text((left + part.width / 2, gap / 2), caption, "black", font, anchor="mm")
    rtdmd.write_png(path, image)


def save_film(folder, path, width=800):
    """The panels of both stages, one after the other, as a GIF that repeats: how the pictures of the same prompts and
    noise change while the model trains."""
    frames = []
    panels = sorted(Path(folder).glob("stage[12]/samples/*.png"))
    for panel in (path for path in panels if path.stem.isdigit()):       # others were put there by somebody
        try:
            with Image.open(panel) as image:
                image.load()
                image.thumbnail((width, width))
        except Exception:                                    # Pillow raises ten kinds, SyntaxError among them
            rtdmd.log(f"{panel} is no picture, and is left out of {path}.")
            continue
        frame = Image.new("RGB", (image.width, image.height + 20), "white")
        frame.paste(image, (0, 20))
        text = f"stage {panel.parts[-3][-1]}, iteration {int(panel.stem)}"
        ImageDraw.Draw(frame).text((4, 2), text, "black", ImageFont.load_default(13))
        frames.append(frame)
    if frames:
        width, height = (max(frame.size[i] for frame in frames) for i in (0, 1))
        frames = [ImageOps.pad(frame, (width, height), color="white", centering=(0, 0)) if frame.size != (width, height)
                  else frame for frame in frames]            # or the first frame's size would crop the others
        film = io.BytesIO()
        frames[0].save(film, "GIF", save_all=True, append_images=frames[1:], duration=400, loop=0)
        rtdmd.write_atomic(path, film.getvalue())


def save_pictures(folder, pictures, captions):
    """OUT/images/ROW/000000.png and metadata.jsonl, as --images reads them. A process writes its own pictures."""
    for row, (index, images) in pictures.items():
        for i, image in zip(index, images):
            rtdmd.write_png(folder / row / f"{i:06d}.png", Image.fromarray(image.permute(1, 2, 0).numpy()))
        lines = [json.dumps({"file_name": f"{i:06d}.png", "prompt": captions[i]}) + "\n"
                 for i in gathered(zip(index, index))]
        if rtdmd.dist_info()[0] == 0:
            rtdmd.write_atomic(folder / row / "metadata.jsonl", "".join(lines))


def read_folder(folder):
    """(files, prompts) of a folder of pictures: from metadata.jsonl, else from the names (a_red_cat.png)."""
    folder, listed = Path(folder), Path(folder) / "metadata.jsonl"
    if not folder.is_dir():
        raise UsageError(f"--images {folder} is not a folder: give one that holds pictures.")
    if listed.exists():
        rows = read_rows(listed, file_name=str, prompt=str)
        files, prompts = [folder / row["file_name"] for row in rows], [row["prompt"] for row in rows]
        if out := [row["file_name"] for row in rows if Path(row["file_name"]).is_absolute()
                   or ".." in Path(row["file_name"]).parts]:
            raise UsageError(f"{listed}: the file_name {out[0]!r} leads out of the folder: name pictures below it.")
    else:
        readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        there = sorted(p for p in folder.iterdir() if not p.is_dir() and not p.name.startswith("."))
        files = [p for p in there if p.suffix.lower() in readable and p.exists()]
        if others := sorted({p.suffix or p.name for p in there if p not in files}):
            rtdmd.log(f"{folder}: {len(there) - len(files)} files are left out, no pictures by their ending, or dead "
                      f"links: {', '.join(others[:8])}")
        prompts = [p.stem.replace("_", " ").strip() for p in files]
    for file, prompt in zip(files, prompts):
        if re.search("[\ud800-\udfff]", prompt):
            raise UsageError(f"--images: the prompt of {file.name!r} is no text in UTF-8: rename the file, or give "
                             "its prompt in metadata.jsonl.")
    missing = [file for file in files if not file.exists()]
    if missing or not files:
        below = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())[:5])
        raise UsageError(f"{listed} names {missing[0]}, which does not exist: correct it." if missing else
                         f"{listed} lists no picture: fill it, or delete it." if listed.exists() else
                         f"--images {folder} holds no picture that Pillow reads: give another folder"
                         f"{f', one of {below} in it' if below else ''}.")
    source = "metadata.jsonl" if listed.exists() else f"their names, such as {prompts[0]!r:.60}"
    rtdmd.log(f"{folder}: the prompts of {len(files)} pictures are from {source}")
    return files, prompts


def score_folder(flags, cfg):
    """--images: scores pictures of any origin."""
    files, prompts = read_folder(flags.images)
    check_metrics(flags)
    tasks = geneval_tasks(flags.metrics, prompts, cfg)
    try_folder(flags.out)
    cfg.device = rtdmd.start_processes(cfg.device)
    flags.per_prompt, name, index = 1, folder_name(flags.images), rtdmd.share(len(files))
    scores, failures = score_rows({name: (index, [files[i] for i in index])}, prompts, flags, cfg)
    report(flags, {name: summarise(scores[name], prompts, tasks)}, scores, failures,
           images=[str(file) for file in files], prompts=prompts, tasks=tasks)
    demand_scores(flags, scores)


def compare(flags, cfg):
    """--compare A B: B - A for every row and metric that both have; without a common row, of the first of each.

    Paired picture by picture: what the prompt does to both cancels, in the standard error too, and what the noise
    does, if both were sampled with one seed.
    """
    called, (a, b) = f"--compare {' '.join(flags.compare)}", (read_report(path) for path in flags.compare)
    if a["captions"] != b["captions"]:
        raise UsageError(f"{called}: the reports are of different prompts, so their scores cannot be paired: sample "
                         "both with the same --prompts, --max_prompts, --per_prompt and --seed (it chooses prompts).")
    tasks = a["tasks"] if set(a["prompts"]) <= a["tasks"].keys() else {}
    pairs = [(row, row) for row in a["scores"] if row in b["scores"]] or [*zip(a["scores"], b["scores"])][:1]
    common = {(left, right): [m for m in a["scores"][left] if m in b["scores"][right] and (tasks or m != "geneval")]
              for left, right in pairs}
    if not any(common.values()):
        raise UsageError(f"{called}: they have no metric in common: score both with the same --metrics.")
    results = {}
    for (left, right), metrics in common.items():
        differences = {m: [y - x for x, y in zip(a["scores"][left][m], b["scores"][right][m])] for m in metrics}
        after, before = in_words(b, right), in_words(a, left)
        results[after if after == before else f"{after} - {before}"] = summarise(differences, a["captions"], tasks)
    print(table(results))
    if alone := [m for m in (*SET_METRICS, "geneval") if any(m in row for row in a["rows"].values())
                 and not any(m in row for row in results.values())]:
        print(f"Not compared, since not both reports have them picture by picture: {', '.join(alone)}.")


def read_report(path):
    """A report.json whose parts are what compare() needs: it may have been edited by hand. null becomes nan, scores are
    in the order of their captions, and "captions" lists these."""
    kinds, optional = dict(scores=dict, prompts=list, per_prompt=int), dict(tasks={}, rows={}, sampler={})
    try:
        found = optional | json.loads(Path(path).read_text())
        good = all(isinstance(found[name], kind) for name, kind in (kinds | dict.fromkeys(optional, dict)).items())
        if not (good and found["prompts"] and 0 < found["per_prompt"] <= MOST["per_prompt"]
                and all(isinstance(text, str) for text in (*found["prompts"], *found["tasks"].values()))
                and all(isinstance(row, dict) for row in (*found["scores"].values(), *found["rows"].values()))):
            raise ValueError("a part of it is missing or damaged")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UsageError(f"--compare {path}: {error!s:.150}; give two report.json of eval.py.") from None
    captions = [prompt for prompt in found["prompts"] for _ in range(found["per_prompt"])]
    order = sorted(range(len(captions)), key=captions.__getitem__)          # the order of prompts depends on --seed
    found["captions"] = [captions[i] for i in order]
    for row, metrics in found["scores"].items():
        for metric, values in metrics.items():
            values = score_list(values, len(order), f"--compare {path}: {metric} of {row}")
            metrics[metric] = [values[i] for i in order]
    return found


def score_list(values, count, where):
    """A list of that many scores out of a report; nan where there is none."""
    if not isinstance(values, list) or len(values) != count:
        raise UsageError(f"{where} is no list of {count} scores, one a picture: evaluate it again.")
    if wrong := [v for v in values if v is not None and (type(v) not in (int, float) or abs(v) > 1e300)]:
        raise UsageError(f"{where} has a score that is no number ({wrong[0]!r:.40}): evaluate it again.")
    return [math.nan if v is None else float(v) for v in values]


def in_words(report, row):
    """The label of a report's row, if the report tells how it was sampled; else its name."""
    try:
        return label(row, report["sampler"][row])
    except (LookupError, TypeError, ValueError, OverflowError):     # pictures of any origin, or edited by hand
        return row


def one_picture(flags, cfg):
    """--prompt: OUT/prompt.png, by the last row of the plan, without scores."""
    name, row = plan(flags, cfg).popitem()
    try_folder(flags.out)
    sampler = Sampler(cfg, {name: row}, [flags.prompt])
    sampler.load_adapter(name)
    image = sampler.batch(row, [flags.prompt], [rtdmd.key("eval", cfg.seed, flags.prompt, 0)])
    if not image.isfinite().all():
        raise UsageError("the picture is not finite: take another checkpoint or --dtype fp32.", code=1)
    if rtdmd.dist_info()[0] == 0:
        path = Path(flags.out) / "prompt.png"
        rtdmd.write_png(path, Image.fromarray(as_bytes(image[0]).permute(1, 2, 0).cpu().numpy()))
        print(f"{path}, {label(name, row)}: {flags.prompt}")


# ------------------------------------------------------------------------------------------------------------
# 12. What training costs (--dry_run), on networks of full size that need no download
# ------------------------------------------------------------------------------------------------------------

def dry_run(argv):
    """--dry_run N with flags of rtdmd.py: N iterations of a stage, in which functions stand in for those of rtdmd.py
    that would load a checkpoint, save one, or write a log. A model of FULL_SIZE has random weights, unless
    --pretrained names some. Prints a table and writes OUT/stageN/dry_run.json."""
    parser = rtdmd.FlagParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--dry_run", type=int)
    mode, rest = parser.parse_known_args(argv)
    ours, theirs = ({f"--{field.name}" for field in dataclasses.fields(kind)} for kind in (Flags, rtdmd.Config))
    if others := [word for word in rest if word.split("=")[0] in ours - theirs]:
        raise UsageError(f"--dry_run takes the flags of rtdmd.py, and {others[0]} is none of them: give the two "
                         "commands one after the other.")
    given = rtdmd.parse_flags(rest)
    meta, model = given.get("device") == "meta", given.get("model", rtdmd.Config.model)
    made = model in FULL_SIZE and not given.get("pretrained")
    wrong = not 1 <= (mode.dry_run or 0) <= MOST_DRY
    if wrong or meta and not made:
        raise UsageError(f"--dry_run must be a number from 1 to {MOST_DRY}." if wrong else
                         f"--device meta counts networks of full size: take --model {', '.join(FULL_SIZE)}.")
    if meta and rtdmd.dist_info()[2] > 1:
        raise UsageError("--device meta counts in one process: leave out torchrun.")
    if made:
        given["prompts"] = "made.jsonl"  # a name for what made_prompts gives
    cfg = rtdmd.resolve(given | (dict(device="cpu", dtype=given.get("dtype", "bf16")) if meta else {}))
    cfg.device, steps = "meta" if meta else cfg.device, 1 if meta else mode.dry_run  # on meta all are the same
    try_folder(Path(cfg.out) / f"stage{cfg.stage}")
    cfg.cache = str(Path(cfg.cache) / "made") if made else cfg.cache  # no invented embeddings beside real ones
    read_prompts = rtdmd.read_prompts

    compiles = cfg.device.startswith("cuda") and not cfg.no_compile
    warm = 2 if compiles else 1                        # one iteration counts, and one compiles; the others are timed
    steps = max(steps, 3) if compiles else steps
    # A share q of the fake updates has the consistency term. So each iteration is made twice: with the term in all of
    # its updates, for which its cost has the weight q in the mean, and in none of them.
    q = cfg.consistency_share if cfg.gamma and (cfg.stage == 1 or cfg.dm_weight) else 0.0
    kinds = {True: q, False: 1 - q} if 0 < q < 1 else {bool(q): 1.0}
    has_term = None

    def iterations(run):
        nonlocal has_term
        for run.done in range(steps):
            for cost in getattr(run, "costs", {}).values() if run.done <= warm else ():
                cost["seconds"] = 0.0                  # so far was counting or compiling
            for has_term, run.kind_weight in kinds.items():
                run.terms = {}
                eager = compiles and run.done == 0
                with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
                    yield run.done

    stand_ins = {(rtdmd, "find_start"): lambda run: None, (rtdmd, "iterations"): iterations,
                 (rtdmd, "phase"): CostMeter, (rtdmd, "has_consistency"): lambda *_: has_term,
                 (rtdmd, "read_prompts"): lambda source, seed: read_prompts(source, seed)[:64]}
    with standing_in(stand_ins | (made_networks(cfg) if made else {})):
        run = rtdmd.prepare(cfg)
        (rtdmd.stage1 if cfg.stage == 1 else rtdmd.stage2)(run)
    report_costs(run, max(1, steps - warm))


def made_networks(cfg):
    """Functions that stand in for those of rtdmd.py that read from disk or hub: {(owner, name): function}."""
    def load_whole(cls, repo, cfg, part="", dtype=torch.float32):
        """A network of full size without download. Its seed is keyed: every rank makes the same weights, and the
        global random state stays where it was."""
        gpus = [torch.cuda.current_device()] if cfg.device.startswith("cuda") else []
        with torch.random.fork_rng(gpus), torch.device(cfg.device):
            torch.manual_seed(rtdmd.key("random weights", repo, part))
            torch.set_default_dtype(dtype)  # built in fp32 first, it would need three times its memory
            net = nn.Module.to(cls(**FULL_SIZE[cfg.model][part]), dtype)  # the position tables are made in fp32
            torch.set_default_dtype(torch.float32)
        return net.eval().requires_grad_(False)

    def encode(backbone, prompts):
        """Normal embeddings on the CPU, the same for the same prompt; what has no shape is a number."""
        normal = lambda shape, *what: torch.randn(shape, generator=torch.Generator().manual_seed(rtdmd.key(*what)))
        shapes = FULL_SIZE[backbone.cfg.model]["text"](backbone.text_length)
        rows = lambda name: torch.stack([normal(shapes[name], "random text", name, prompt) for prompt in prompts])
        return {name: rows(name).to(backbone.dtype) if isinstance(shape, tuple) else
                torch.tensor([shape] * len(prompts)) for name, shape in shapes.items()}

    return {(rtdmd, "load_whole"): load_whole, (rtdmd.Backbone, "encode"): encode,
            (rtdmd, "load_reward"): random_reward, (rtdmd, "read_prompts"): lambda source, seed: [*map(str, range(8))],
            (rtdmd, "from_hub"): lambda *_, **__: {"shift": 3.0}, (rtdmd, "check_pipeline"): lambda *_, **__: None}


@contextlib.contextmanager
def standing_in(functions):
    """Other functions in the places of a module's or a class's own: {(owner, name): function}."""
    before = {(owner, name): getattr(owner, name) for owner, name in functions}
    try:
        for (owner, name), function in functions.items():
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)


class CostMeter(TorchDispatchMode):
    """What happens inside a phase of a training iteration, times run.kind_weight, added to run.costs[name].

    Of the first iteration: forwards by role; FLOPs of the transformers ("network"), of the VAE's decoder and of
    each reward, by torch's formulas (a product of (n, m) and (m, k) is 2 n m k, all else nothing); and the peak
    of bytes beside the weights (on a GPU the allocator's, of all iterations): what an operation makes lives until
    its last reference is gone. Seconds are those of all iterations; dry_run sets them to 0 after those that count
    or compile. On `meta` nothing is computed, so that full-size networks can be counted on a laptop. What a
    fused attention kernel recomputes in its backward pass is not counted.
    """

    def __init__(self, run, name):
        super().__init__()
        if not hasattr(run, "costs"):
            start_counting(run)
        self.run, self.counts, self.kind = run, run.done == 0, torch.device(run.device).type
        self.cost = run.costs.setdefault(name, dict(seconds=0.0, tflop={}, peak_bytes=0, forwards={}))

    def __enter__(self):
        """Counting begins where the last phase stood: what it left alive still takes room."""
        if self.counts:
            super().__enter__()
            torch.backends.mha.set_fastpath_enabled(False)  # open_clip's layer as one operation without a formula
            self.run.live["peak"] = self.run.live["now"]
            if self.kind == "meta":
                F.scaled_dot_product_attention, F.rms_norm = fused_attention, fused_norm
        if self.kind == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.run.forwards, self.start = self.cost["forwards"] if self.counts else {}, time.perf_counter()
        return self

    def __exit__(self, *error):
        if self.kind == "cuda":
            torch.cuda.synchronize()
            self.run.live["peak"] = torch.cuda.max_memory_allocated() - self.run.standing_bytes
        self.cost["seconds"] += self.run.kind_weight * (time.perf_counter() - self.start)
        if self.counts or self.kind == "cuda":
            self.cost["peak_bytes"] = max(self.cost["peak_bytes"], self.run.live["peak"])
        if self.counts:
            F.scaled_dot_product_attention, F.rms_norm = PLAIN_ATTENTION, PLAIN_NORM
            torch.backends.mha.set_fastpath_enabled(True)
            super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """torch calls this instead of every operation: runs it, counts its FLOPs and the storages that it
        made."""
        kwargs, live = kwargs or {}, self.run.live
        if operation is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1                                       # the loops ask only whether a gradient is finite
        result = shapes_only(operation, args, kwargs) if self.kind == "meta" else operation(*args, **kwargs)
        if operation.overloadpacket in FLOPS:
            flop = FLOPS[operation.overloadpacket](*args, **kwargs, out_val=result)
            if re.search("attention.*backward", str(operation)):     # 1 of its 5 products is a recomputation
                flop = flop * 4 / 5
            part, flop = self.run.part, self.run.kind_weight * flop
            self.cost["tflop"][part] = self.cost["tflop"].get(part, 0.0) + flop / 1e12
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.kind:
                storage = tensor.untyped_storage()
                if storage._cdata not in live["held"]:                      # a view shares its storage
                    live["held"].add(storage._cdata)
                    live["now"] += storage.nbytes()
                    live["peak"] = max(live["peak"], live["now"])
                    weakref.finalize(storage, released, live, storage._cdata, storage.nbytes())
        return result


def released(live, name, size):
    """Called when a storage is gone: its last reference was dropped."""
    live["held"].discard(name)
    live["now"] -= size


KNOWN_SHAPES = {}
ATTENTION = "_scaled_dot_product_flash_attention"            # torch has a formula for it, and none for its CPU form
FLOPS = flop_registry | {getattr(torch.ops.aten, f"{ATTENTION}_for_cpu{end}"):
                         flop_registry[getattr(torch.ops.aten, f"{ATTENTION}{end}")] for end in ("", "_backward")}


def shapes_only(operation, args, kwargs):
    """An operation on `meta`. torch takes .2 ms to tell the shape of a result, so it is asked once for each kind
    of input; always where the result may share memory with an input (views, in-place operations)."""
    schema = operation._schema
    if any(a.alias_info for a in [*schema.arguments, *schema.returns]):
        return operation(*args, **kwargs)
    leaves = ((a.shape, a.stride(), a.dtype, a.device) if isinstance(a, torch.Tensor) else (type(a), a)
              for a in tree_leaves((args, kwargs)))             # 1, 1.0 and True are equal, and give other types
    kind = (operation, len(args), *kwargs, *leaves)
    if kind not in KNOWN_SHAPES:
        result = operation(*args, **kwargs)
        parts = result if isinstance(result, (tuple, list)) else (result,)
        if not all(isinstance(p, torch.Tensor) and p.device.type == "meta" for p in parts):
            return result
        KNOWN_SHAPES[kind] = type(result), [(p.shape, p.stride(), p.dtype) for p in parts]
        return result
    form, parts = KNOWN_SHAPES[kind]
    made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in parts]
    return form(made) if form in (tuple, list) else made[0]


PLAIN_ATTENTION, PLAIN_NORM = F.scaled_dot_product_attention, F.rms_norm


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
    """Attention on `meta` as a GPU computes it, by a kernel that keeps no matrix of attention weights. (With a mask, as
    in open_clip's text tower, the plain one.)"""
    if attn_mask is not None:
        return PLAIN_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    fused = torch.ops.aten._scaled_dot_product_flash_attention
    return fused(query, key, value, dropout_p, is_causal, scale=scale)[0]


class FusedNorm(torch.autograd.Function):
    """RMS norm on `meta` as a GPU computes it, by a kernel that keeps its input, and no fp32 copy of that."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.empty_like(gradient), None


def fused_norm(x, normalized_shape, weight=None, eps=None):
    """F.rms_norm in that form."""
    return FusedNorm.apply(x, weight)


def tensors_of(nets):
    """Parameters and buffers of some modules."""
    return [t for net in nets for t in [*net.parameters(), *net.buffers()]]


def networks(run):
    """{"network": [...], "decoder": [...], name of a reward: [...]}: the modules that stand in memory."""
    parts = {"network": list(dict.fromkeys(run.roles.nets.values()))}
    if hasattr(run.backbone, "vae"):
        parts["decoder"] = [run.backbone.vae]
    for name, reward in ({n: reward for n, (reward, _) in run.rewards.items()} | run.watched).items():
        known = {id(m) for nets in parts.values() for m in nets}           # shared work is the first one's
        parts[name] = [m for m in getattr(reward, "__dict__", {}).values()
                       if isinstance(m, nn.Module) and id(m) not in known]
    return parts


def start_counting(run):
    """Prepares the run: hooks tell which part is at work, the last one whose layer was entered, in a forward or a
    backward pass."""
    run.costs, run.forwards, run.part, run.live = {}, {}, "network", dict(now=0, peak=0, held=set())

    def watch(module, part, counted):
        def enter(module, args, kwargs):
            run.part = part
            if counted:
                name = run.roles.active if part == "network" else part
                name += " with gradient" if torch.is_grad_enabled() else ""
                first = args[0] if args else next(iter(kwargs.values()))
                run.forwards[name] = run.forwards.get(name, 0) + run.kind_weight * len(first)

        def leave(module, args, result):
            for tensor in tree_leaves(result):                           # a module's hook misses Z-Image's list
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: setattr(run, "part", part))

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)

    for part, nets in networks(run).items():
        if part == "network":
            layers = nets
        elif part == "decoder":
            layers = [nets[0].decoder]
        else:  # the first convolution sees the images
            layers = [m for net in nets for m in net.modules() if any(True for _ in m.parameters(recurse=False))]
            layers = sorted(layers, key=lambda m: not isinstance(m, nn.Conv2d))
        for i, layer in enumerate(layers):
            watch(layer, part, counted=part == "network" or i == 0)
        run.live["held"].update(t.untyped_storage()._cdata for t in tensors_of(nets))
    moments = (m for o in run.optimizers.values() for state in o.state.values() for m in state.values())
    held = [run.ema, *run.roles.flat.values(), *moments]                    # beside the peak in the table
    run.live["held"].update(t.untyped_storage()._cdata for t in held)
    run.standing_bytes = torch.cuda.memory_allocated() if "cuda" in run.device else 0


# Networks of full size: where the hub's config.json departs from the defaults of the class, and the shapes of what the
# text encoders give. (Those of sd35l, flux1 and zimage were not compared with their hub files.)
SD3_NET = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)
SD35_NET = dict(SD3_NET, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")
SD35L_NET = dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192,
                 qk_norm="rms_norm")
K4_NET = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
              guidance_embeds=False)
K9_NET = dict(K4_NET, num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)
SD3_VAE = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
               block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16,
               use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609)
FLUX_VAE = dict(SD3_VAE, scaling_factor=0.3611, shift_factor=0.1159)
sd3_text = lambda length: dict(text=(77 + length, 4096), pooled=(2048,))
FULL_SIZE = {"sd3m": dict(transformer=SD3_NET, vae=SD3_VAE, text=sd3_text),
             "sd35m": dict(transformer=SD35_NET, vae=SD3_VAE, text=sd3_text),
             "sd35l": dict(transformer=SD35L_NET, vae=SD3_VAE, text=sd3_text),
             "flux1": dict(transformer=dict(guidance_embeds=True), vae=FLUX_VAE,
                           text=lambda length: dict(text=(length, 4096), pooled=(768,), guidance=1.0)),
             "flux2-4b": dict(transformer=K4_NET, vae={}, text=lambda length: dict(text=(length, 7680))),
             "flux2-9b": dict(transformer=K9_NET, vae={}, text=lambda length: dict(text=(length, 12288))),
             "zimage": dict(transformer={}, vae=FLUX_VAE,
                            text=lambda length: dict(text=(length, 2560), length=length))}     # the longest


CLIP_SIZES = {"hpsv2": "ViT-H-14", "clipscore": "ViT-L-14", "pickscore": "ViT-H-14"}


def random_reward(name, cfg, own):
    """load_reward for networks that were made: a CLIP reward of full size, its cost without its download. None if that
    cannot be."""
    import open_clip
    if name in own or ":" in name:
        return LOAD_REWARD(name, cfg, own)
    if name not in CLIP_SIZES:
        return rtdmd.log(f"--dry_run: {name} cannot be made without a download, and is left out.")
    with torch.device(cfg.device):
        net = open_clip.CLIP(**open_clip.get_model_config(CLIP_SIZES[name]))
    tokenise = open_clip.get_tokenizer(CLIP_SIZES[name])
    embed_text = lambda prompts: net.encode_text(tokenise(prompts).to(cfg.device))
    return rtdmd.ClipReward(name, REWARDS[name], (net, net.encode_image, embed_text))


LOAD_REWARD = rtdmd.load_reward


def matrix_rate(device, n=8192):
    """TFLOP/s of bf16 products of two n x n matrices: what the chip can do at best."""
    from torch.utils.benchmark import Timer  # on import it looks for a CUDA compiler, and warns without GPU
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    timer = Timer("a @ a", globals={"a": a})                                 # it waits for the GPU
    timer.timeit(3)                                                          # warm
    return 2 * n**3 / timer.timeit(20).mean / 1e12


def pass_of_theta(run):
    """A function of nothing: a forward and backward pass of theta on a micro-batch of noise -> output, gradient."""
    n, p = run.cfg.micro_batch, run.roles.flat["generator"]
    x = torch.randn(n, *run.backbone.latent_shape, device=run.device)
    t, cond = torch.full((n,), 0.5, device=run.device), run.text.batch([""] * n, run.device)

    def once():
        v = run.roles.velocity("generator", x, t, cond)
        v.square().mean().backward()
        gradient, p.grad = p.grad, None
        return v.detach(), gradient
    return once


def host_or_gpu(run):
    """One sentence: do a forward and a backward pass of theta wait for the host, which launches the kernels, or for
    the GPU, which runs them? (A host that is some thousand kernels ahead waits: if it is faster than the GPU, the time
    for the launches is more than it needs.)"""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    once, on_gpu = pass_of_theta(run), run.device.startswith("cuda")
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)

    def launch():
        """Seconds until the last kernel is launched, not until it has run."""
        wait()
        start = time.perf_counter()
        once()
        return time.perf_counter() - start

    host = [launch() for _ in range(3)][-1]                                # the first ones warm up
    what = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else None
    with profile(activities=what, acc_events=True) as seen:                # or it warns that it keeps one cycle
        launch()
        wait()
    kernels = [e for e in seen.events() if e.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)]
    busy = sum(e.time_range.elapsed_us() for e in kernels) / 1e6
    return (f"Forward and backward pass of {run.cfg.micro_batch} samples: {len(kernels):,} kernels, launched within "
            f"{host * 1000:.0f} ms, run in {busy * 1000:.0f} ms: bound by the {'host' if host > busy else 'GPU'}.")


def compiled_or_not(run):
    """One sentence: how far a compiled pass of theta is from an uncompiled one, in output and gradient. bf16 rounds in
    other places if operations are fused: some percent of the gradient. More is a wrong graph."""
    once, found = pass_of_theta(run), []
    for stance in ("force_eager", "default"):
        with torch.compiler.set_stance(stance):
            found.append(once())
    output, gradient = (((b - a).norm() / a.norm()).item() for a, b in zip(*found))
    return (f"A compiled pass of {run.cfg.micro_batch} samples differs from an uncompiled one by {output:.1e} in its "
            f"output and by {gradient:.1e} in its gradient.")


def standing_weights(run):
    """Bytes that stay in memory, by what they are; weights that two modules share count once."""
    lora = sum(p.nbytes for p in run.roles.flat.values())
    sizes = {part: sum({t.untyped_storage()._cdata: t.nbytes for t in tensors_of(nets)}.values())
             for part, nets in networks(run).items()}
    return dict(sizes, adapters=lora, adam=2 * lora, ema=lora // 2)


def report_costs(run, timed):
    """The table of --dry_run, and OUT/stageN/dry_run.json. timed: iterations whose seconds were added up."""
    cfg = run.cfg
    samples = len(rtdmd.share(cfg.batch)) if cfg.stage == 1 else len(rtdmd.share(cfg.groups)) * cfg.group_size
    phases = {name: dict(seconds=c["seconds"] / timed, tflop_per_sample=sum(c["tflop"].values()) / samples,
                         tflop_by_part={n: f / samples for n, f in c["tflop"].items()}, peak_bytes=c["peak_bytes"],
                         forwards={n: f / samples for n, f in c["forwards"].items()})
              for name, c in run.costs.items()}
    total = {n: sum(p[n] for p in phases.values()) for n in ("seconds", "tflop_per_sample")}
    for field in ("tflop_by_part", "forwards"):
        names = dict.fromkeys(n for p in phases.values() for n in p[field])
        total[field] = {n: sum(p[field].get(n, 0) for p in phases.values()) for n in names}
    weights, live = standing_weights(run), max(p["peak_bytes"] for p in phases.values())
    total.update(peak_bytes=sum(weights.values()) + live, weight_bytes=sum(weights.values()))
    result = dict(total, bytes=weights, phases=phases, samples=samples, config=dataclasses.asdict(cfg))
    if rtdmd.dist_info()[0] == 0:
        rtdmd.write_atomic(run.folder / "dry_run.json", json.dumps(result, indent=1))
    for line in cost_lines(run, phases, total, weights, samples):           # some of them measure, and may fail
        rtdmd.log(line)


def cost_lines(run, phases, total, weights, samples):
    """The table as lines of text. Where nothing was computed there are no seconds."""
    words = lambda numbers: ", ".join(f"{value:.3g} {name}" for name, value in numbers.items())
    yield "phase      TFLOP a sample  peak GB  seconds  share  TFLOP/s   TFLOP a sample, of"
    live = max(p["peak_bytes"] for p in phases.values())
    for name, p in [*phases.items(), ("all", dict(total, peak_bytes=live))]:
        rate, times = p["tflop_per_sample"] * samples / max(p["seconds"], 1e-9), 24 * " "
        if run.device != "meta":
            times = f"{p['seconds']:8.3g} {p['seconds'] / total['seconds']:6.0%} {rate:8.3g}"
        sizes = f"{p['tflop_per_sample']:14.4g} {p['peak_bytes'] / 1e9:8.3g}"
        yield f"{name:10} {sizes} {times}   {words(p['tflop_by_part'])}"
    for name, p in phases.items():
        yield f"Forwards a sample, {name}: {words(p['forwards'])}."
    if run.device != "meta":
        hours = total["seconds"] * run.cfg.iterations / 3600
        yield (f"One iteration, {samples:g} samples a process: {total['seconds']:.3g} s, "
               f"{samples / total['seconds']:.3g} samples/s; {run.cfg.iterations} iterations: {hours:.3g} h.")
    if "cuda" in run.device:
        graphs, seconds = rtdmd.compiled()
        yield f"Compiled: {graphs} graphs of transformer blocks, in {seconds:.0f} s."
        yield host_or_gpu(run)
        if graphs:
            yield compiled_or_not(run)
        yield f"Products of large bf16 matrices in the same process: {matrix_rate(run.device):.3g} TFLOP/s."
    source = "allocator" if "cuda" in run.device else "counted, not measured"
    yield (f"Weights GB: {words({n: size / 1e9 for n, size in weights.items()})}; with the highest peak "
           f"{total['peak_bytes'] / 1e9:.3g} GB at micro-batch {run.cfg.micro_batch} ({source}).")


# ------------------------------------------------------------------------------------------------------------
# 13. The paper's questions, asked on the tiny world (bash train.sh ablations)
#
# A question is a dict {row: words}: flags of rtdmd.py, and @names of VARIANTS, which are none of its flags: small
# functions that stand in for some of rtdmd's. Its first row is what the others are compared with, seed by seed. Rows
# of stage 2 start from the stage-1 student of the row BASE of their seed, or of the row that STARTS names. The
# held-out judge decides, not the trained reward.
# ------------------------------------------------------------------------------------------------------------

BASE, BASE_2 = "base (gamma .01)", "base (SubGRPO M=2 + pathwise)"
LAG = "--fake_updates 1 --lr_fake 3e-4"
BEHIND = "--iterations 75 @fake_from_zero"
LONG = "--iterations 150 --save_every 25 --keep 6"
RELEASED_2 = ("--weight_decay 1e-4 --dm_weight 1e-3 --policy_weight .667 --ema .81 "
              "@released_kernel @std_over_all @unscaled_log_prob @matching_last")
STAGE1_ROWS = {
    "Table 3: the consistency term": {
        BASE: "", "gamma 0 (A-DMD)": "--gamma 0", "gamma .001": "--gamma .001", "gamma .005": "--gamma .005",
        "gamma .01, kernel cps, App. F's times": "@released_kernel @app_f_times",
        # With so much weight a share adds noise (DEPARTURE 23): the term is in every update.
        "gamma .1": "--gamma .1 --consistency_share 1", "gamma 1": "--gamma 1 --consistency_share 1",
        "gamma 1, a quarter of the updates": "--gamma 1",
        "gamma 1, kernel cps": "--gamma 1 --consistency_share 1 @released_kernel",
        "gamma 1, App. F's times": "--gamma 1 @app_f_times",
        "gamma 1, pairs across boundaries": "--gamma 1 --consistency_share 1 @pairs_across"},
    "Figure 5: randomness of the sampler (base: eta .9)": {
        BASE: "", "eta 0": "--eta 0", "eta .5": "--eta .5", "eta .8": "--eta .8", "eta 1": "--eta 1"},
    "App. K: DMD2": {"eta 1": "--eta 1", "eta 1, DMD2's re-noising": "--eta 1 @dmd2_renoising"},
    "DEPARTURE 1: the re-noising std": {BASE: "", "the paper's (t-s)/(1-s)": "@paper_std"},
    "A fake score that lags (1 update at lr 3e-4)": {
        "lag, gamma 0": f"{LAG} --gamma 0", "lag, gamma .01": LAG,
        "lag, gamma 1": f"{LAG} --gamma 1 --consistency_share 1"},
    "A fake score that starts from zero behind a trained student (75 iterations)": {
        "behind, gamma 0": f"{BEHIND} --gamma 0", "behind, gamma .01": BEHIND,
        "behind, gamma 1": f"{BEHIND} --gamma 1 --consistency_share 1"},
    "Beyond the paper, stage 1": {
        BASE: "", "a fake score that knows k": "@fake_knows_k", "a fake score with gates for k": "@fake_gates_k"},
    # Not reproduced: its fake weight min(1, 10 kappa^2), its clamp of t, the noise draw in D, the consistency term in
    # all updates, bf16 adapters.
    "The constants and functions of the released code": {
        BASE: "", "released constants": "--lora_rank 32 --lora_alpha 64 --delta .2 --ema .904 @released_kernel"},
}
STAGE2_ROWS = {
    "Table 4: the hybrid policy gradient": {
        BASE_2: "", "DM only": "--policy_weight 0 --det_weight 0", "naive GRPO": "--subset_size 3 --det_weight 0",
        "SubGRPO M=1": "--subset_size 1 --det_weight 0", "SubGRPO M=2": "--det_weight 0",
        "pathwise only": "--policy_weight 0",
        "SubGRPO M=1 + pathwise": "--subset_size 1", "naive GRPO + pathwise": "--subset_size 3",
        "base without DM": "--dm_weight 0"},
    "SubGRPO against naive GRPO": {
        "naive GRPO": "--subset_size 3 --det_weight 0", "SubGRPO M=2": "--det_weight 0",
        "SubGRPO M=1": "--subset_size 1 --det_weight 0",
        "antithetic, naive GRPO": "--subset_size 3 --det_weight 0 @antithetic"},
    "Table 5: a reward without gradient": {
        "strict, naive GRPO": "--rewards strict=1 --subset_size 3", "strict, SubGRPO M=2": "--rewards strict=1",
        "strict, SubGRPO M=1": "--rewards strict=1 --subset_size 1"},
    "Departures 10 to 13, and Eq. 16's shared noise": {
        BASE_2: "", "std over all prompts": "@std_over_all",
        "no std (leave one out)": "--beta 8 @no_std", "shared x_{t_0}": "@shared_start",
        "independent noise outside S": "@independent_noise", "DM at the last step only": "@matching_last"},
    "The stochastic term alone: DEPARTURE 7, weight, std floor (tiny: .05), antithetic noise": {
        "SubGRPO M=2": "--det_weight 0", "log-prob as released": "--det_weight 0 @unscaled_log_prob",
        "SubGRPO M=2, policy_weight 3": "--det_weight 0 --policy_weight 3",
        "std floor .0001, SubGRPO M=2": "--det_weight 0 --std_floor 1e-4",
        "std floor .2, SubGRPO M=2": "--det_weight 0 --std_floor .2",
        "antithetic, SubGRPO M=2": "--det_weight 0 @antithetic"},
    "The weight of the pathwise term (tiny: 30), fake updates (tiny: 4)": {
        BASE_2: "", "base, det_weight 1": "--det_weight 1", "base, det_weight 10": "--det_weight 10",
        "base, 2 fake updates": "--fake_updates 2"},
    "Matching alone": {
        "DM only": "--policy_weight 0 --det_weight 0",
        "DM only, 2 fake updates": "--policy_weight 0 --det_weight 0 --fake_updates 2"},
    "Beyond the paper: pathwise through more steps": {
        BASE_2: "", "pathwise, last 2 steps": "--policy_weight 0 @pathwise_2",
        "pathwise, last 3 steps": "--policy_weight 0 @pathwise_3",
        "pathwise, all 4 steps": "--policy_weight 0 @pathwise_4"},
    # Not reproduced: what stage 1's row leaves out, and its raw pathwise scale (1e-4 per unit of reward, so that
    # PickScore counts four times), its clamp of the advantages (+-5), one S per iteration, alpha 64 (the start has
    # 16), delta .2, one fake update.
    "The constants and functions of the released code": {
        BASE_2: "",
        "released constants, stage 2": RELEASED_2},
    "Beyond the paper: a recipe": {                         # at RTDMD's number of forwards, to within 2 %
        BASE_2: "", "naive GRPO + pathwise, 47 iterations": "--subset_size 3 --iterations 47",
        "naive GRPO (policy_weight 3) + pathwise, 47 iterations": "--subset_size 3 --policy_weight 3 --iterations 47",
        "base, policy_weight 3": "--policy_weight 3", "base, det_weight 60": "--det_weight 60",
        "base, beta 2": "--beta 2", "base, lr 2e-3": "--lr 2e-3",
        "base, 2 fake updates, 60 iterations": "--fake_updates 2 --iterations 60"},
    "Beyond the paper: a fake score that knows k, in both stages": {
        BASE_2: "", "both stages, a fake score that knows k": "@fake_knows_k",
        "both stages, a fake score with gates for k": "@fake_gates_k"},
    # The judge that chooses the checkpoint is the one that scores it, so its columns are flattered.
    "Beyond the paper: when to stop": {
        BASE_2: "", "150 iterations": LONG, "150 iterations, stopped by the held-out judge": f"{LONG} @held_out_stop"},
}
# Table 1 in small (--only "Table 1"): the methods that the paper compares itself with, each by its own rule,
# from one teacher. The rows of a block, but for AC-DMD with the budget of both stages, spend the same number of
# network forwards, to within 5 %: samples that go through the network as generator, fake score, teacher or surrogate;
# guidance makes two of one; rewards and panels do not count (see `counted`). The number of iterations is chosen for
# that. Distillation has the 93,600 forwards of AC-DMD's 150 iterations; a row with a reward starts from that student
# and has the 38,400 of RTDMD's 50 iterations; a row that needs no start has both. What a method leaves open, or asks
# for what is not here, is decided in its favour:
#   DMD        four steps instead of one, trained on its own rollouts as DMD2 introduced it, and the sampler
#              that x-predictions suit (eta 1)
#   DMD2       no GAN, as in App. K: it takes real pictures, which no other row sees
#   TDM        its fake score learns from Eq. 10 (no importance weights) and three times per update, not once
#   DMDR       with the reward from the first step and DMD2's matching; its ReFL variant, the reward's gradient alone,
#              which does as well as both terms in our Table 4; without its warm-up of guidance and noise levels, whose
#              constants we do not have
#   Flow-GRPO  on the distilled student, with CPS steps, the last one deterministic, and without a KL to the
#              student, which would hold it back
#   TDM-R1     on the AC-DMD student, with A-DMD's matching; one reward for the picture, sent back through all
#              steps, where TDM-R1 has a reward for each of them; its weight is the better of 2 and 10 (seed 0)
# Not here: Hyper-SD (trajectory-segmented consistency, then ReFL, with guidance) and Flash Diffusion
# (adversarial, on real pictures) are families of their own, which share no loss with these rows. Of GDMD
# (forward-process RL beside DMD) and R_dm (distribution matching as the reward of GRPO) App. A says one sentence
# each, and to guess their rules would be no comparison.
FLOW_GRPO = "--det_weight 0 --dm_weight 0 --subset_size 3 --iterations 114"
TABLE1 = [
    (0, "Table 1 in small: not trained", {
        "teacher, 50 steps, guidance 1.5": "--nfe 50 --cfg 1.5", "teacher, 50 steps": "--nfe 50",
        "untrained student, 4 steps": ""}),
    (1, "Table 1 in small: distillation, 93,600 forwards", {
        BASE: "",
        "DMD": "--gamma 0 --eta 1 --fake_updates 1 --iterations 226 @dmd2_renoising @dmd_regression",
        "DMD2": "--gamma 0 --eta 1 --fake_updates 5 --iterations 126 @dmd2_renoising",
        "TDM": "--gamma 0 --eta 0 --iterations 170 @tdm_intervals",
        "A-DMD": "--gamma 0 --iterations 170",
        "AC-DMD, the budget of both stages": "--iterations 211"}),
    (2, "Table 1 in small: a reward with gradient, 93,600 + 38,400 forwards", {
        BASE_2: "",
        "DMDR": "--policy_weight 0 --gamma 0 --eta 1 --fake_updates 5 --iterations 200 @dmd2_renoising "
                "@from_the_teacher",
        "reward alone, last step": "--policy_weight 0 --dm_weight 0 --iterations 160",
        "Flow-GRPO": FLOW_GRPO,
        "SubGRPO M=2": "--det_weight 0",
        "pathwise through all steps": "--policy_weight 0 --iterations 44 @pathwise_4",
        "released constants, stage 2": RELEASED_2}),
    (2, "Table 1 in small: a reward without gradient, 93,600 + 38,400 forwards", {
        "strict, SubGRPO M=2": "--rewards strict=1",
        "strict, naive GRPO": "--rewards strict=1 --subset_size 3",
        "strict, Flow-GRPO": f"--rewards strict=1 {FLOW_GRPO}",
        "strict, TDM-R1": "--rewards strict=1 --policy_weight 0 --gamma 0 --det_weight 2 --iterations 36 "
                          "@tdm_r1 @pathwise_4"})]
TABLE1_NAMES = {                                           # of rows that other tables have under another name
    BASE: "AC-DMD (ours)", BASE_2: "RTDMD (ours)", "SubGRPO M=2": "SubGRPO, matching",
    "released constants, stage 2": "RTDMD, released constants", "strict, SubGRPO M=2": "RTDMD (ours)",
    "strict, naive GRPO": "RTDMD, naive GRPO", "strict, Flow-GRPO": "Flow-GRPO", "strict, TDM-R1": "TDM-R1"}
STARTS = {"both stages, a fake score that knows k": "a fake score that knows k",    # rows that do not begin with BASE
          "both stages, a fake score with gates for k": "a fake score with gates for k"}
QUICK = {1: "Table 3: the consistency term", 2: "Table 4: the hybrid policy gradient"}


def ablations(flags, cfg):
    """Trains and evaluates every row for every seed, --jobs at a time; prints mean and standard error over the
    seeds.

    A row that is done is not done again: stop it whenever you like. OUT/NAME.json has one result,
    OUT/results.json and OUT/table.md all of them, OUT/curves.png reward and held-out judge of Table 4 while they
    train.
    """
    out, seeds = Path(flags.out), range(flags.seeds or (2 if flags.quick else 5))
    tables = [*TABLE1, *((stage, name, rows) for stage, table in ((1, STAGE1_ROWS), (2, STAGE2_ROWS))
                         for name, rows in table.items())]
    tables = [table for table in tables if not flags.quick or table[1] in QUICK.values()]
    jobs = {}
    for seed in seeds:
        for stage, name, rows in tables:
            whole = flags.only and name.startswith(flags.only)
            chosen = [row for row in rows if whole or flags.only in f"stage {stage}: {row}"]
            for row in [*list(rows)[:1], *chosen] if chosen else []:
                jobs[row, seed] = (stage, row, rows[row], seed)
    words_of = {row: words for rows in STAGE1_ROWS.values() for row, words in rows.items()}
    starting = {(STARTS.get(row, BASE), seed) for stage, row, words, seed in jobs.values()
                if stage == 2 or "@fake_from_zero" in words}
    base = [(1, row, words_of[row], seed) for row, seed in sorted(starting, key=lambda pair: pair[::-1])]
    if not jobs:
        raise UsageError(f"--only {flags.only!r} names no row of these tables, such as {BASE!r}: correct it.")
    try_folder(out)
    files = {row: [result_of(out, row, seed) for seed in seeds] for _, _, rows in tables for row in rows}
    for _, _, rows in tables:                                # also of rows that are not asked for: the table has them
        for row in rows:
            for file in files[row]:
                is_done(file, rows[row], cfg)
    world = dict(cache=cfg.cache, pretrained=cfg.pretrained, device=cfg.device)
    TinyBackbone(rtdmd.resolve(world))                                      # makes it, if it is not there
    train_rows(base, out, cfg, flags.jobs)  # where these rows start
    train_rows(list(jobs.values()), out, cfg, flags.jobs)
    results = {row: [json.loads(file.read_text()) for file in found if file.exists()] for row, found in files.items()}
    names_in = lambda table: TABLE1_NAMES if table.startswith("Table 1") else {}
    parts = [f"### {name}\n\n{ablation_table(rows, results, names_in(name))}" for _, name, rows in tables
             if any(results[row] for row in rows)]
    if lacking := sum(not found for found in results.values()):
        parts.append(f"{lacking} row{'s' if lacking > 1 else ''} without a result.")
    text = "\n\n".join(parts)
    try:
        print(text, flush=True)
    finally:
        rtdmd.write_atomic(out / "results.json", json.dumps(without_nan(results), indent=1))
        rtdmd.write_atomic(out / "table.md", text + "\n")
    draw_ablation_curves(out, seeds)


def begin_worker(threads):
    """A process of train_rows. It ends with the program: a row that goes on alone would keep its folder locked."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def train_rows(jobs, out, cfg, processes):
    """The jobs (stage, row, words, seed) without a result, in that many processes at a time."""
    jobs = [(stage, row, words, seed) for stage, row, words, seed in jobs
            if not is_done(result_of(out, row, seed), words, cfg)]
    threads, spawn = max(1, (os.cpu_count() or 1) // processes), multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn, begin_worker, (threads,)) as pool:
        waiting = [pool.submit(ablation, out, cfg, *job) for job in jobs]
        try:
            for done in rtdmd.progress(concurrent.futures.as_completed(waiting), len(waiting), "ablations"):
                done.result()
        except BaseException as error:
            pool.shutdown(cancel_futures=True)  # rows at work: after Ctrl-C they end with their iteration, else whole
            if isinstance(error, concurrent.futures.BrokenExecutor):
                raise UsageError("A row's process was killed, perhaps for its memory: lower --jobs, and give the same "
                                 "command again.", code=1) from None
            if isinstance(error, KeyboardInterrupt):
                raise UsageError("Stopped: the same command goes on from here.", code=130) from None
            raise


def is_done(file, words, cfg):
    """Whether a row's result is there. UsageError if it is no result of these words and this world."""
    if not file.exists():
        return False
    with contextlib.suppress(ValueError, LookupError, TypeError):
        was = json.loads(file.read_text())
        if (was["words"], was["pretrained"]) == (words, cfg.pretrained):
            return True
    raise UsageError(f"{file} is damaged, or of other settings than today's row: move it away, or take another --out.")


def result_of(out, row, seed):
    """The file of one row's result; its folder has the same name without .json."""
    return out / (re.sub(r"[^a-z0-9.]+", "_", f"{row} {seed}".lower()) + ".json")


def ablation(out, cfg, stage, row, words, seed):
    """One row for one seed, in a process of its own: trains it (but for stage 0), evaluates it, writes its
    result."""
    target, quiet = result_of(out, row, seed), io.StringIO()
    folder, names, facts = target.with_suffix(""), [word[1:] for word in words.split() if word[0] == "@"], {}
    world = ["--cache", cfg.cache, "--pretrained", cfg.pretrained, "--device", cfg.device]
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            if stage:
                found, facts = train_row(out, stage, row, words, names, seed, world)
                main(["--lora", str(found), "--out", str(folder), *world])
            else:                                            # its seed is that of the pictures
                given = ["--teacher", *words.split(), "--out", str(folder), "--seed", str(seed), *world]
                plain, own = parse(given)
                plain.teacher = row.startswith("teacher")    # else it is the student as it begins
                evaluate(plain, own)
    except SystemExit:
        raise UsageError(f"The ablation {row!r} failed: {quiet.getvalue().strip().splitlines()[-1]}") from None
    scores, = json.loads((folder / "report.json").read_text())["rows"].values()
    scores = {metric: score for metric, score in scores.items() if score is not None}
    rtdmd.write_atomic(target, json.dumps(scores | facts | dict(
        stage=stage, seed=seed, words=words, pretrained=cfg.pretrained)))


def train_row(out, stage, row, words, names, seed, world):
    """Trains a row with its variants -> the checkpoint to evaluate, and what the training tells about
    itself."""
    base, folder = result_of(out, STARTS.get(row, BASE), seed), result_of(out, row, seed).with_suffix("")
    start = base.with_suffix("") / "stage1"
    options = ["--stage", str(stage), "--out", str(folder), "--seed", str(seed), "--keep", "1", *world,
               *(word for word in words.split() if word[0] != "@"),
               *(["--init", str(start)] if stage == 2 else [])]
    last = rtdmd.resolve(rtdmd.parse_flags(options)).iterations
    with replaced([*names, "counted"], start):
        rtdmd.main(options)
    found = rtdmd.find_checkpoint(folder / f"stage{stage}")
    if found is None or found.name != f"checkpoint-{last:06d}":
        raise UsageError(f"The ablation {row!r} was stopped: the same command goes on from there.")
    log = read_log(found.parent)
    found = best_checkpoint(found.parent) if "held_out_stop" in names else found
    gaps = [line["dm"] for line in log[-20:] if "dm" in line]
    facts = dict(iterations=iteration_of(found)) | (dict(dm=float(np.mean(gaps))) if gaps else {})
    started = (stage == 2 or "fake_from_zero" in names) and "from_the_teacher" not in names
    before = json.loads(base.read_text()).get("forwards") if started else 0
    if before is not None:                                   # None: the start's version did not count
        facts["forwards"] = before + sum(line["forwards"] for line in log)
    return found, facts


def iteration_of(folder):
    """The iteration in a checkpoint's name."""
    return int(folder.name.removeprefix("checkpoint-"))


def read_log(folder):
    """The whole lines of a stage's metrics.jsonl: a run that was killed, or is at work, may leave half of one."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    try:
        rows = [json.loads(line) for line in lines if line.endswith("}\n")]
        assert all(isinstance(row["iteration"], int) for row in rows)
        assert all(isinstance(v, (int, float)) and math.isfinite(v) for row in rows for v in row.values())
    except (ValueError, KeyError, AssertionError) as error:
        raise UsageError(f"{path} has lines that no run wrote ({error!r}): restore it, or move it away.") from error
    return rows


def best_checkpoint(folder):
    """The checkpoint with the highest score of the held-out judge, averaged over panels within 10 iterations."""
    curve = {line["iteration"]: line["watch_heldout"] for line in read_log(folder) if "watch_heldout" in line}
    near = lambda it: np.mean([score for other, score in curve.items() if abs(other - it) <= 10])
    return max(rtdmd.list_checkpoints(folder), key=lambda path: near(iteration_of(path)))


def ablation_table(rows, results, names={}):
    """Markdown: mean ± standard error over the seeds that are done; then the same of the difference to the
    first row, over the seeds that both have. dm: mean of the last 20 iterations; kforwards: thousands of
    samples that all of the training sent through the network. Rows without a seed are left out; names: {row:
    another name}."""
    columns, compared = [*TINY_COLUMNS, "dm", "kforwards"], ("heldout_strict", "distance", "diversity")
    in_thousands = lambda scores: {"kforwards": scores["forwards"] / 1000} if "forwards" in scores else {}
    by_seed = {row: {scores["seed"]: scores | in_thousands(scores) for scores in results[row]}
               for row in rows}
    first = by_seed[next(iter(rows))]
    head = ["", "seeds", *(TINY_COLUMNS.get(m, m) for m in columns), *(f"{TINY_COLUMNS[m]} - row 1" for m in compared)]
    lines = [head, ["---"] * len(head)]
    for row, runs in ((row, runs) for row, runs in by_seed.items() if runs):
        both = runs.keys() & first.keys() if runs is not first else ()
        values = [[scores[m] for scores in runs.values() if m in scores] for m in columns]
        cells = [number(*mean_and_error(v)) if v else "" for v in values]
        cells[-1] = f"{np.mean(values[-1]):.1f}" if values[-1] else ""      # hardly differs between seeds
        values = [[runs[seed][m] - first[seed][m] for seed in both if m in runs[seed] and m in first[seed]]
                  for m in compared]
        cells += [number(*mean_and_error(v)) if v else "" for v in values]
        lines.append([names.get(row, row), str(len(runs)), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---- Variants: each is {(owner, name): function}, functions that stand in for those of rtdmd.py while a row trains

def replaced(names, start):
    """rtdmd with the functions of these variants; start: the stage-1 student of the same seed."""
    stack = contextlib.ExitStack()
    for name in names:
        stack.enter_context(standing_in(VARIANTS[name](start)))
    return stack


def paper_std(start):
    """DEPARTURE 1 undone: the std sigma_k(t) = (t-s)/(1-s) of 3.1 and App. B, and what goes with it: the c of Eq. 10
    and the boundary mean."""
    def renoise_coefficients(s, t):
        s, t = rtdmd.fp32(s, t)
        return (1 - t) / (1 - s), (t - s) / (1 - s)

    def ambient_scale(s, t):
        s, t = rtdmd.fp32(s, t)
        _, kappa = renoise_coefficients(s, t)
        return (t + s * (t + kappa) / (1 - s)) / kappa  # s (t + kappa) is (t^2 - kappa^2) / a

    def boundary_mean(x_t, v, s, t):
        x_t, v, s, t = rtdmd.fp32(x_t, v, s, t)
        a, kappa = renoise_coefficients(s, t)
        return (x_t - kappa.square() * (x_t + (1 - t) * v) / t) / a         # t < 1 in training, so a > 0
    return {(rtdmd, "renoise_coefficients"): renoise_coefficients, (rtdmd, "ambient_scale"): ambient_scale,
            (rtdmd, "boundary_mean"): boundary_mean}


def dmd2_renoising(start):
    """App. K: DMD2 takes the x-prediction of a step for a clean sample, s = 0, and re-noises it over [0, 1].
    In stage 2 it needs --eta 1, where a step's mean is 1 - t_k times its x-prediction: the gradient reaches this
    through the mean."""
    rollout, rollout_in_chunks, seen = rtdmd.rollout, rtdmd.rollout_in_chunks, []
    cps_step, matching_loss, fake = rtdmd.cps_step, rtdmd.matching_loss, rtdmd.update_fake

    def recorded(*arguments):
        states, predictions = rollout(*arguments)
        seen.append(torch.stack(predictions))
        return states, predictions

    def with_predictions(*arguments):
        seen.clear()
        states = rollout_in_chunks(*arguments)
        seen[:] = [torch.cat(seen, 1)[:, -states.shape[1]:]]    # those of the last try, if memory ran out before
        return states

    def update_fake(run, it, update, x_s, s, k, prompts, ids, total):
        rows = [i // rtdmd.dist_info()[2] for i in ids] if run.cfg.stage == 1 else range(len(ids))
        fake(run, it, update, seen[0][k - 1, rows], torch.zeros_like(s), k, prompts, ids, total)

    def prediction(x, v, t, *more):                              # with a gradient: the step that is matched
        return rtdmd.x0_from_velocity(x, v, t) if torch.is_grad_enabled() else cps_step(x, v, t, *more)

    def clean(run, x_s, s, *more):
        return matching_loss(run, x_s, torch.zeros_like(s), *more)

    def matching_pull(run, b, part, matched, u, noise):
        rows = range(part.start, part.stop)
        k = b.slots[rows, matched]
        x = seen[0][k - 1, rows].requires_grad_()
        cond, u = run.text.batch(b.prompts[part], run.device), rtdmd.level(u, x)
        dm = rtdmd.matching_loss(run, x, torch.zeros_like(u), cond, u, noise)
        rtdmd.note(run, len(x), dm=dm)
        return len(x) * torch.autograd.grad(dm, x)[0] / (1 - rtdmd.level(run.times[k], x))
    return {(rtdmd, "rollout"): recorded, (rtdmd, "rollout_in_chunks"): with_predictions,
            (rtdmd, "update_fake"): update_fake, (rtdmd, "cps_step"): prediction,
            (rtdmd, "matching_loss"): clean, (rtdmd, "matching_pull"): matching_pull}


def dmd_regression(start, pairs=240, steps=20, weight=.25):
    """DMD's other loss: from noise, the x-prediction of step 1 learns the picture at which the teacher's
    guided ODE arrives from the same noise. The pairs are made once, before the first update; the weight is
    DMD's, the distance that of pixels instead of LPIPS. A row that was stopped makes the pairs, and counts
    them, again."""
    original, kept = rtdmd.update_generator, []

    @torch.no_grad()
    def make_pairs(run):
        prompts = [run.prompts.at(i) for i in range(pairs)]
        keys = [rtdmd.key(run.cfg.seed, "pair", i) for i in range(pairs)]
        _, (noise,) = rtdmd.draw(keys, 0, 1, run.backbone.latent_shape, run.device)
        times, null, ends = rtdmd.timestep_schedule(steps, run.backbone.shift_for(steps)), [""], []
        for rows in rtdmd.chunks(pairs, 4 * run.cfg.micro_batch):
            cond, none = run.text.batch(prompts[rows], run.device), run.text.batch(null, run.device)
            velocity = lambda x, t: run.roles.teacher(x, t, cond, none)
            ends.append(rtdmd.rollout(velocity, noise[rows], [0.0] * steps, times.to(run.device), 0.0)[0][-1])
        return prompts, noise, torch.cat(ends)

    def update_generator(run, it, first):
        prompts, noise, ends = kept or kept.extend(make_pairs(run)) or kept
        chance = random.Random(rtdmd.key(run.cfg.seed, it, "pairs"))
        drawn = chance.sample(range(pairs), run.cfg.batch // run.cfg.steps)
        x, one = noise[drawn], torch.ones(len(drawn), device=run.device)
        v = run.roles.velocity("generator", x, one, run.text.batch([prompts[i] for i in drawn], run.device))
        regression = (rtdmd.x0_from_velocity(x, v, 1.0) - ends[drawn]).square().mean()
        (weight * regression).backward()                     # the step that follows takes both gradients
        rtdmd.note(run, len(x), regression=regression)
        original(run, it, first)
    return {(rtdmd, "update_generator"): update_generator}


def tdm_intervals(start):
    """TDM: the state after step k is re-noised inside that step's own interval [t_k, t_{k-1}] instead of up
    to 1; for the fake score as for matching."""
    def draw_level(run, s, u):
        times = run.times.to(s)
        above = torch.where(times > s.view(-1, 1), times, 1.0).amin(1)
        return rtdmd.between(run, s, rtdmd.level(above, s), 0.01 + 0.98 * u)
    return {(rtdmd, "draw_level"): draw_level}


def from_the_teacher(start):
    """Stage 2 without a cold start: the student and the fake score begin as the teacher."""
    original = rtdmd.load_start

    def load_start(run, checkpoint):
        if run.done:
            original(run, checkpoint)
    return {(rtdmd, "load_start"): load_start}


def released_kernel(start):
    """DEPARTURE 3 undone: Eq. 11's reverse kernel is the sampler's step at its fixed eta."""
    return {(rtdmd, "reverse_step"): functools.partial(rtdmd.reverse_step, kernel="cps", eta=rtdmd.Config.eta)}


def app_f_times(start):
    """DEPARTURES 4 and 23 undone: t' = t_k, so x' is x_s, and t'' = t_{k+1}, 0 for k = K (App. F); in every update."""
    def update_fake(run, it, update, x_s, s, k, prompts, ids, total):
        cfg = run.cfg
        for rows in rtdmd.chunks(len(x_s), cfg.micro_batch):
            keys = [rtdmd.key(cfg.seed, cfg.stage, it, "fake", update, i, j)
                    for i, j in zip(ids[rows], k[rows].tolist())]
            uniform, (n, n_1, n_2) = rtdmd.draw(keys, 2, 3, x_s.shape[1:], run.device)
            x, s_x, cond = x_s[rows], rtdmd.level(s[rows], x_s), run.text.batch(prompts[rows], run.device)
            fake = lambda x, t: run.roles.velocity("fake", x, t, cond)
            t = rtdmd.draw_level(run, s_x, rtdmd.level(uniform[0], x))
            loss = rtdmd.ambient_dsm_loss(fake(rtdmd.renoise(x, s_x, t, n), t), x, n, s_x, t)
            t, t_next = s_x.clamp_min(1e-6), rtdmd.level(run.times[(k[rows] + 1).clamp_max(cfg.steps)], x)  # t_K is 0
            v, weight = fake(x, t), len(x) / total
            h = rtdmd.x0_from_velocity(x, v, t)
            x_1, x_2 = (rtdmd.reverse_step(x, v.detach(), t, t_next, noise) for noise in (n_1, n_2))
            with torch.no_grad():
                d_1 = rtdmd.x0_from_velocity(x_1, fake(x_1, t_next), t_next) - h
            (weight * (loss - 2 * cfg.gamma * (d_1 * h).mean())).backward()
            consistency = (d_1 * (rtdmd.x0_from_velocity(x_2, fake(x_2, t_next), t_next) - h.detach())).mean()
            (weight * 2 * cfg.gamma * consistency).backward()
            rtdmd.note(run, len(x), dsm=loss, consistency=consistency)
        rtdmd.optimizer_step(run, "fake")
    return {(rtdmd, "update_fake"): update_fake}


def unscaled_log_prob(start):
    """DEPARTURE 7 undone: the released log-probability has no 1 / (2 std^2)."""
    return {(rtdmd, "gaussian_log_prob"): lambda x_next, mean, std: -(x_next - mean).square().flatten(1).mean(1)}


def matching_last(start):
    """DEPARTURE 13 undone: matching and the fake score of stage 2 at step K only."""
    return {(rtdmd, "fake_steps"): lambda cfg, it, update, ids: torch.full((len(ids),), cfg.steps),
            (rtdmd, "matched_slots"): lambda cfg, u: [cfg.subset_size] * len(u)}


def another_std(start, std):
    """Advantages over the std of all prompts ("global"), or over none, with the others as baseline ("none")."""
    scale, advantages = rtdmd.reward_scale, rtdmd.group_advantages
    if std == "none":
        scale = lambda rewards, *_: torch.ones_like(rewards[:, :1])
    return {(rtdmd, "reward_scale"): lambda rewards, _="group", floor=1e-4: scale(rewards, std, floor),
            (rtdmd, "group_advantages"): lambda rewards, _="group", floor=1e-4: advantages(rewards, std, floor)}


def independent_noise(start):
    """Eq. 16 undone: nothing is shared in a group outside S."""
    original = rtdmd.group_noise
    return {(rtdmd, "group_noise"): lambda shape, selected, size, steps, generator:
            original(shape, range(1, steps), size, steps, generator)}


def shared_start(start):
    """A group shares x_{t_0} too, which the paper leaves open."""
    original = rtdmd.group_draws

    def group_draws(run, it, groups):
        first, noise, subsets = original(run, it, groups)
        return first[::run.cfg.group_size].repeat_interleave(run.cfg.group_size, 0), noise, subsets
    return {(rtdmd, "group_draws"): group_draws}


def antithetic(start):
    """Half of a group has minus the other half's x_{t_0}, and minus its noise where Eq. 16 draws that anew."""
    original = rtdmd.group_draws

    def group_draws(run, it, groups):
        first, noise, subsets = original(run, it, groups)
        half = run.cfg.group_size // 2
        for g in range(0, len(first), run.cfg.group_size):
            one, two = slice(g, g + half), slice(g + half, g + 2 * half)
            first[two] = -first[one]
            for k in subsets[g].tolist():
                noise[k - 1, two] = -noise[k - 1, one]
        return first, noise, subsets
    return {(rtdmd, "group_draws"): group_draws}


def fake_knows_k(start):
    """DEPARTURE 18 undone: a learned vector per step k, zero at first, joins all of the fake score's text tokens. It
    enters ten times, since Adam moves a number by at most its rate, and tokens have a norm of 20. (The pooled
    embedding would not do: the tiny teacher hardly reads it.)"""
    def tell(roles, rows, cond):
        if rows is None:
            return cond
        return cond | dict(encoder_hidden_states=cond["encoder_hidden_states"] + 10 * rows[:, None])
    return told_k(lambda roles, cfg: (TINY_WIDTH,), tell)


def fake_gates_k(start):
    """DEPARTURE 18 undone in a way that suits every backbone: B (1 + g_k) A x instead of B A x in each linear of the
    fake score; g_k (r,), learned and zero at first, says how much of each of the r directions step k wants."""
    def put(roles, gates):
        for layer, gate in zip(roles.layers["fake"], gates):
            layer.gate = gate

    def tell(roles, rows, cond):
        dtype = roles.layers["fake"][0].weight.dtype
        put(roles, itertools.repeat(1.0) if rows is None else (1 + rows[:, :, None]).to(dtype).unbind(1))
        return cond

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.A is None:
            return y
        return y + F.linear(F.linear(x, self.A) * getattr(self, "gate", 1.0), self.B) * self.scale

    def recompute(self, module, *args):
        gates = [layer.gate for layer in self.layers["fake"]]               # of this pass, as in Roles.checkpoint

        def as_it_was(*args):
            put(self, gates)
            return module(*args)
        return checkpoint(self, as_it_was, *args)

    checkpoint = rtdmd.Roles.checkpoint
    functions = told_k(lambda roles, cfg: (len(roles.layers["fake"]), cfg.lora_rank), tell)
    return functions | {(rtdmd.AdaptedLinear, "forward"): forward, (rtdmd.Roles, "checkpoint"): recompute}


def told_k(shape, tell):
    """The fake score is told k: parameters (K + 1, *shape(roles, cfg)), zero at first, join its adapter, and before
    each forward tell(roles, rows, cond) -> cond gets those of every sample's k; rows is None for the other roles."""
    velocity, teacher, roles = rtdmd.Roles.velocity, rtdmd.Roles.teacher, rtdmd.Roles.__init__
    batch, fake, matching = rtdmd.TextCache.batch, rtdmd.update_fake, rtdmd.matching_loss

    def __init__(self, backbone, cfg):
        roles(self, backbone, cfg)
        steps = torch.zeros(cfg.steps + 1, *shape(self, cfg), device=self.flat["fake"].device)
        self.adopt("fake", self.named["fake"] | dict(steps=steps))

    def batch_with_k(self, prompts, device):
        texts, _, steps = zip(*(p.partition("\0") for p in prompts))
        cond = batch(self, texts, device)
        return cond | dict(k=torch.tensor([int(k) for k in steps], device=device)) if steps[0] else cond

    def velocity_with_k(self, role, x, t, cond):
        cond = dict(cond)
        k = cond.pop("k", None)
        rows = self.parts("fake", self.flat["fake"])["steps"][k] if role == "fake" else None
        return velocity(self, role, x, t, tell(self, rows, cond))

    def update_fake(run, it, u, x_s, s, k, prompts, ids, total):
        fake(run, it, u, x_s, s, k, [f"{p}\0{i}" for p, i in zip(prompts, k.tolist())], ids, total)

    def matching_loss(run, x_s, s, cond, u, noise):
        k = (run.times.to(s) - s.flatten()[:, None]).abs().argmin(1)
        return matching(run, x_s, s, cond | dict(k=k), u, noise)

    without = lambda self, x, t, cond, null: teacher(self, x, t, {n: c for n, c in cond.items() if n != "k"}, null)
    return {(rtdmd.Roles, "__init__"): __init__, (rtdmd.Roles, "velocity"): velocity_with_k,
            (rtdmd.Roles, "teacher"): without, (rtdmd.TextCache, "batch"): batch_with_k,
            (rtdmd, "update_fake"): update_fake, (rtdmd, "matching_loss"): matching_loss}


def pairs_across(start):
    """DEPARTURE 4 undone: t'' may lie below a boundary level that t' is above."""
    def draw_next_level(run, t, u):
        return rtdmd.between(run, (t - run.cfg.delta).clamp_min(0), t, u)
    return {(rtdmd, "draw_next_level"): draw_next_level}


def fake_from_zero(start):
    """Stage 1 begins with the generator of `start` and a fake score that is still the teacher: as far behind as
    can be."""
    original = rtdmd.prepare

    def prepare(cfg):
        run = original(cfg)
        if run.done == 0:
            rtdmd.load_start(run, rtdmd.find_checkpoint(start))
            for name, p in run.roles.named["fake"].items():
                if ".lora_B" in name:
                    p.data.zero_()
        return run
    return {(rtdmd, "prepare"): prepare}


def pathwise_through(start, steps):
    """Beyond the paper: Eq. 15 through the last `steps` steps with their noise held fixed. Exact for all that these
    steps do to the reward, so no policy term may act on them: --policy_weight 0. Their forwards keep their
    activations."""
    original = rtdmd.reinforce_slot

    def reinforce_slot(run, b, slot, reward_term, rows, here, pull, fresh, total):
        if slot < run.cfg.subset_size or not reward_term:
            return original(run, b, slot, reward_term, rows, here, pull, fresh, total)
        cfg, K, prompts = run.cfg, run.cfg.steps, [b.prompts[row] for row in rows]
        x, cond = b.states[K - steps, rows], run.text.batch(prompts, run.device)
        for k in range(K - steps + 1, K + 1):
            t, t_next = (rtdmd.level(run.times[[j] * len(x)], x) for j in (k - 1, k))
            mean, _ = rtdmd.cps_mean_std(x, run.roles.velocity("generator", x, t, cond), t, t_next, cfg.eta)
            x = b.states[k, rows] + mean - mean.detach()                    # the rollout's state, with a gradient
        loss = rtdmd.pathwise_terms(run, x, prompts, {name: scale[rows] for name, scale in b.scales.items()})
        (cfg.beta * cfg.det_weight * loss * len(x) / total).backward()
        if here:                                                            # matching stays as it is
            matched = [rows[i] for i in here]
            original(run, b, slot, False, matched, range(len(matched)), pull[here], fresh, total)
    return {(rtdmd, "reinforce_slot"): reinforce_slot}


def tdm_r1(start, updates=2, kept=40):
    """TDM-R1's idea for a reward without gradient: a surrogate that has one learns from the rewards of the
    student's own groups, and the student climbs it. As in DPO the surrogate is a denoiser, here a third adapter
    that begins as the teacher: r(x_0) is how much better than the teacher it denoises x_0, half the difference
    of their squared errors at a random t. It learns which pictures of a group score above the group's mean
    (Bradley-Terry on the means of those above and of those below; t and noise are the group's), from groups
    drawn among the latest `kept` that do not all score the same. Surrogate and groups are in no checkpoint: a row
    that was stopped goes on with new ones."""
    prepare, judge, memory = rtdmd.prepare, rtdmd.judge_groups, deque(maxlen=kept)

    def begin(cfg):
        run = prepare(cfg)
        roles = run.roles
        roles.layers["surrogate"], roles.nets["surrogate"] = roles.layers["fake"], roles.nets["fake"]
        roles.adopt("surrogate", {name: torch.zeros_like(p) if ".lora_B" in name else p.clone()
                                  for name, p in roles.named["fake"].items()})
        run.surrogate = torch.optim.AdamW([roles.flat["surrogate"]], cfg.lr_fake, weight_decay=0)
        for reward, _ in run.rewards.values():
            reward.differentiable = True                     # by its surrogate: pathwise_terms is ours
        return run

    def surrogate_reward(run, x, prompts, t, noise):
        cond, x_t = run.text.batch(prompts, run.device), rtdmd.renoise(x, 0.0, t, noise)
        wrong = lambda role: (run.roles.velocity(role, x_t, t, cond) - (noise - x)).square().flatten(1).sum(1)
        return (wrong("teacher") - wrong("surrogate")) / 2

    def draws(run, name, number, n):
        keys = [rtdmd.key(run.cfg.seed, run.done, "surrogate", name, number, i) for i in range(n)]
        u, (noise,) = rtdmd.draw(keys, 1, 1, run.backbone.latent_shape, run.device)
        return rtdmd.level(0.01 + 0.98 * u[0], noise), noise

    def judge_groups(run, b):
        judge(run, b)
        N, chance = run.cfg.group_size, random.Random(rtdmd.key(run.cfg.seed, run.done, "memory"))
        half = lambda some: some.float() / some.sum().clamp_min(1)
        for rows in rtdmd.chunks(len(b.ids), N):
            A = b.advantages[rows]
            if A.any():                                      # a group that is all right or all wrong says nothing
                memory.append((b.states[-1][rows], b.prompts[rows], half(A > 0) - half(A < 0)))
        for update in range(updates if memory else 0):
            x, prompts, compare = zip(*chance.sample(memory, min(len(memory), run.cfg.groups)))
            t, noise = (d.repeat_interleave(N, 0) for d in draws(run, "learns", update, len(x)))
            r = surrogate_reward(run, torch.cat(x), [p for group in prompts for p in group], t, noise)
            margin = (torch.cat(compare) * r).view(-1, N).sum(1)
            run.surrogate.zero_grad()                        # the student's update left a gradient here, too
            (-F.logsigmoid(margin).mean()).backward()
            run.surrogate.step()
            rtdmd.note(run, len(margin), surrogate_right=(margin > 0).float().mean())

    def pathwise_terms(run, x_0, prompts, scales):
        t, noise = draws(run, "teaches", len(x_0), len(x_0))
        return rtdmd.pathwise_loss(surrogate_reward(run, x_0, prompts, t, noise), 1.0, x_0[0].numel())
    return {(rtdmd, "prepare"): begin, (rtdmd, "judge_groups"): judge_groups,
            (rtdmd, "pathwise_terms"): pathwise_terms}


def counted(start):
    """Changes nothing: each line of metrics.jsonl says how many samples its iteration sent through the
    network, with whatever adapter. Guidance makes two of one; those of the panel are not part of the
    training."""
    velocity, panel, record, seen = rtdmd.Roles.velocity, rtdmd.panel, rtdmd.record, [0]

    def counting(self, role, x, t, cond):
        seen[0] += len(x)
        return velocity(self, role, x, t, cond)

    def uncounted(run):
        before, row = seen[0], panel(run)
        seen[0] = before
        return row

    def recorded(run, row):
        row["forwards"], seen[0] = seen[0], 0
        return record(run, row)
    return {(rtdmd.Roles, "velocity"): counting, (rtdmd, "panel"): uncounted, (rtdmd, "record"): recorded}


VARIANTS = {function.__name__: function for function in (
    paper_std, dmd2_renoising, released_kernel, app_f_times, unscaled_log_prob, matching_last, independent_noise,
    shared_start, antithetic, pairs_across, fake_knows_k, fake_gates_k, fake_from_zero, dmd_regression, tdm_intervals,
    from_the_teacher, tdm_r1, counted)}
VARIANTS |= dict(std_over_all=functools.partial(another_std, std="global"),
                 no_std=functools.partial(another_std, std="none"),
                 held_out_stop=lambda start: {},                            # train_row() does that
                 **{f"pathwise_{n}": functools.partial(pathwise_through, steps=n) for n in (2, 3, 4)})


# ---- Curves

LINE_COLOURS = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (90, 90, 90),
                (23, 190, 207), (227, 119, 194), (188, 189, 34)]


def draw_ablation_curves(out, seeds):
    """OUT/curves.png: reward and held-out judge of Table 4's rows while they train; stage 1's dsm, healthy and with
    a fake score that lags. Mean over seeds."""
    table4, lag = STAGE2_ROWS["Table 4: the hybrid policy gradient"], (BASE, "lag, gamma .01")
    panels, titles = {}, ("reward (trained on)", "held-out judge",
                          "stage 1: dsm, healthy and with a fake score that lags")
    for title, stage, rows, name in zip(titles, (2, 2, 1), (table4, table4, lag),
                                        ("reward_attributes", "watch_heldout", "dsm")):
        for row in rows:
            files = [result_of(out, row, seed) for seed in seeds]
            logs = [read_log(file.with_suffix("") / f"stage{stage}") for file in files if file.exists()]
            if logs:
                panels.setdefault(title, {})[row] = mean_curve(logs, name)
    if lag[1] not in panels.get(titles[2], {}):
        panels.pop(titles[2], None)                          # its title would speak of a row that was not run
    if panels:
        draw_curves(out / "curves.png", panels)


def draw_run_curves(run, path):
    """README's healthy run as a picture: the gap between fake score and teacher of both stages, the rewards of
    stage 2."""
    logs = {i: read_log(run / f"stage{i}") for i in (1, 2) if (run / f"stage{i}/metrics.jsonl").exists()}
    panels = {f"stage {stage}: dm, the gap between fake score and teacher": {"dm": mean_curve([log], "dm")}
              for stage, log in logs.items() if any("dm" in line for line in log)}
    known = dict.fromkeys(name for line in logs.get(2, ()) for name in line)
    if names := [name for name in known if name.startswith(("reward_", "watch_"))]:
        panels["stage 2: rewards; watch_ is never trained on"] = {n: mean_curve([logs[2]], n) for n in names}
    if panels:
        draw_curves(path, panels)


def mean_curve(logs, name):
    """[(iteration, value)]: mean over logs, then over the latest lines that have it: 1; 5 if there are 20 or more; 10
    from 50 on; a tenth of all from 100 on, at most 50."""
    lines = [[(line["iteration"], line[name]) for line in log if name in line] for log in logs]
    mean = [(pairs[0][0], float(np.mean([value for _, value in pairs]))) for pairs in zip(*lines)]
    width = 1 if len(mean) < 20 else 5 if len(mean) < 50 else min(max(10, len(mean) // 10), 50)
    before = lambda i: [value for _, value in mean[max(0, i - width + 1):i + 1]]
    return [(x, float(np.mean(before(i)))) for i, (x, _) in enumerate(mean)]


def ticks(low, high):
    """Round numbers between low and high: some five multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / 5 * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_curves(path, panels, width=560, height=330):
    """One PNG, a panel beside the other, each with its legend below.  panels {title: {label: [(iteration, y)]}}."""
    font, rows = ImageFont.load_default(13), max(-(-len(curves) // 2) for curves in panels.values())
    image = Image.new("RGB", (width * len(panels), height + 18 * rows + 8), "white")
    pen = ImageDraw.Draw(image)
    for i, (title, curves) in enumerate(panels.items()):
        points = np.array([point for curve in curves.values() for point in curve])
        low, high = points.min(0), points.max(0)
        if "dm" in curves:                                   # a distance: cut off at its least, ripples look steep
            low[1] = min(low[1], 0)
        high = np.where(high > low, high, low + 1)
        left, top, right, bottom = i * width + 62, 30, (i + 1) * width - 14, height - 30
        place = lambda x, y: (left + (x - low[0]) / (high[0] - low[0]) * (right - left),
                              bottom - (y - low[1]) / (high[1] - low[1]) * (bottom - top))
        pen.text(((left + right) / 2, 8), title, "black", font, anchor="ma")
        for y in ticks(low[1], high[1]):                                    # grid lines and their numbers
            pen.line([place(low[0], y), place(high[0], y)], (225, 225, 225))
            pen.text((left - 6, place(low[0], y)[1]), f"{y:.4g}", "black", font, anchor="rm")
        for x in ticks(low[0], high[0]):
            pen.text((place(x, low[1])[0], bottom + 6), f"{x:.4g}", "black", font, anchor="ma")
        pen.text((left - 6, bottom + 6), "iteration", "black", font, anchor="ra")
        for j, (label, curve) in enumerate(curves.items()):
            colour = LINE_COLOURS[j % len(LINE_COLOURS)]
            x, y = left + j % 2 * (right - left) // 2, height + 18 * (j // 2)
            pen.line([place(*point) for point in curve], colour, 2)
            if len(curve) < 20:                                             # a panel's numbers: few, or only one
                for px, py in (place(*point) for point in curve):
                    pen.ellipse([px - 3, py - 3, px + 3, py + 3], colour)
            pen.line([(x, y + 8), (x + 22, y + 8)], colour, 3)
            pen.text((x + 28, y), label, "black", font)
    rtdmd.write_png(path, image)


# ------------------------------------------------------------------------------------------------------------
# 14. The tiny world (--model tiny): a text-to-image problem for a laptop, through the very same stages
#
# 24 x 24 pictures of one or two coloured shapes and their captions; an SD3Transformer2DModel of .44 M parameters in
# pixel space as teacher, with a text encoder of .22 M; two classifiers, A (the reward) and B (held out).
# ------------------------------------------------------------------------------------------------------------

TINY_COLOURS = {"red": (.85, .15, .15), "green": (.15, .7, .2), "blue": (.15, .25, .9), "yellow": (.9, .85, .15)}
TINY_SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
TINY_RELATIONS = {"above": (1, 0), "below": (1, 1), "left of": (2, 0), "right of": (2, 1)}  # layout, does order swap
TINY_WORDS = ["<pad>", *TINY_COLOURS, *TINY_SHAPES, *TINY_RELATIONS]
TINY_TOKENS, TINY_WIDTH, TINY_SIDE = 6, 64, 24
TINY_REWARDS = ("attributes", "strict", "heldout", "heldout_strict")


def tiny_captions(held_out=False):
    """24 captions of one object and 2,142 of two, for all training; or 66 of two in words that no training sees. (It
    sees their scenes, told from the other object: "b below a" for "a above b".)"""
    objects = [f"a {c} {s}" for c in TINY_COLOURS for s in TINY_SHAPES]
    pairs = [f"{a} {r} {b}" for r in TINY_RELATIONS for a in objects for b in objects if a != b]
    return pairs[30::33] if held_out else objects + [p for i, p in enumerate(pairs) if i % 33 != 30]


tiny_test_captions = functools.partial(tiny_captions, held_out=True)  # the 66


@functools.cache
def parse_caption(caption):
    """(word ids (6,), attributes (5,)): layout 0 single, 1 stacked, 2 side by side; colour, shape of the upper or
    left object, then of the other (-1: none). "a below b" is "b above a". UsageError for what cannot be drawn."""
    if not (text := " ".join(caption.split())):
        return torch.zeros(TINY_TOKENS, dtype=torch.long), None            # the null condition
    thing, relation = rf"a ({'|'.join(TINY_COLOURS)}) ({'|'.join(TINY_SHAPES)})", "|".join(TINY_RELATIONS)
    found = re.fullmatch(rf"{thing}(?: ({relation}) {thing})?", text)
    if not found:
        raise UsageError(f"The tiny world cannot draw {caption!r}: write 'a red circle', or 'a red circle above a "
                         "blue square'.")
    ids = [TINY_WORDS.index(word) for word in found.groups() if word]
    layout, swap = TINY_RELATIONS.get(found[3], (0, 0))
    objects = [(list(TINY_COLOURS).index(colour), TINY_SHAPES.index(shape)) if colour else (-1, -1)
               for colour, shape in (found.group(1, 2), found.group(4, 5))]
    return (torch.tensor(ids + [0] * (TINY_TOKENS - len(ids))),
            torch.tensor([layout, *itertools.chain(*objects[::-1 if swap else 1])]))


def render(captions, generator):
    """Pictures (B, 3, 24, 24) in [-1, 1] of captions: random place, size, shade and background; no two agree.
    Lengths below are sixteenths of the side."""
    B, facts = len(captions), torch.stack([parse_caption(c)[1] for c in captions])
    rand = lambda *shape: torch.rand(B, *shape, generator=generator) * 2 - 1                    # U[-1, 1]
    pixel = 16 / TINY_SIDE
    axis = (torch.arange(TINY_SIDE) + 0.5) * pixel
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    tilt = rand(2, 1, 1) * 0.15
    slope = (tilt[:, :1] * (x - 8) / 8 + tilt[:, 1:] * (y - 8) / 8).view(B, 1, TINY_SIDE, TINY_SIDE)
    image = 0.5 + 0.15 * rand(1, 1, 1) + slope + 0.04 * rand(3, 1, 1)
    palette = torch.tensor(list(TINY_COLOURS.values()))
    for which, (colour, shape) in enumerate(((1, 2), (3, 4))):
        present, single = facts[:, colour] >= 0, facts[:, 0] == 0
        shift = torch.where(single, 0.0, 3.8 * (2 * which - 1))          # from the centre, along the layout's axis
        jitter, along = rand(2), facts[:, :1] == torch.tensor([2, 1])   # along: is this axis, x or y, the layout's
        centre = 8 + torch.where(along, shift[:, None] + 0.5 * jitter, 1.2 * jitter)
        r = torch.where(single, 4.2 + 0.6 * rand(), 3.3 + 0.4 * rand()).view(B, 1, 1)
        dx, dy = x - centre[:, 0].view(B, 1, 1), y - centre[:, 1].view(B, 1, 1)
        radius, near, far = (dx**2 + dy**2).sqrt(), torch.minimum(dx.abs(), dy.abs()), torch.maximum(dx.abs(), dy.abs())
        # Distance from the outline, negative inside, of each of TINY_SHAPES.
        distance = torch.stack([radius - r, far - 0.9 * r, torch.maximum(0.87 * dx.abs() - 0.5 * dy, dy) - 0.62 * r,
                                (radius - 0.75 * r).abs() - 0.28 * r, torch.maximum(near - 0.3 * r, far - r),
                                0.72 * (near + far) - 0.85 * r], 1)
        distance = distance[torch.arange(B), facts[:, shape].clamp_min(0)]
        cover = (0.5 - distance / pixel).clamp(0, 1) * present.view(B, 1, 1)  # an edge is one pixel wide
        paint = palette[facts[:, colour].clamp_min(0)] + 0.07 * rand(3)
        image = torch.lerp(image, paint.view(B, 3, 1, 1), cover[:, None])
    return image.clamp(0, 1) * 2 - 1


def real_renders(captions):
    """The pictures (B, 3, 24, 24) in [0, 1] that the tiny world's samples are measured against."""
    return render(captions, torch.Generator().manual_seed(rtdmd.key("real renders"))) / 2 + 0.5


class TinyText(nn.Module):
    """Word and position embeddings, then an MLP that tells each token of the whole caption: the relation decides which
    object is where. Trained with the teacher. ids (B, 6) -> tokens (B, 6, 64), pooled (B, 64)."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(len(TINY_WORDS), TINY_WIDTH)
        self.places = nn.Parameter(torch.randn(TINY_TOKENS, TINY_WIDTH))    # loud, or word order is not heard
        caption = TINY_TOKENS * TINY_WIDTH
        self.mix = nn.Sequential(nn.Linear(caption, 256), nn.GELU(), nn.Linear(256, caption))
        self.pool = nn.Linear(caption, TINY_WIDTH)

    def forward(self, ids):
        tokens = self.words(ids) + self.places
        tokens = tokens + self.mix(tokens.flatten(1)).view_as(tokens)
        return {"encoder_hidden_states": tokens, "pooled_projections": self.pool(tokens.flatten(1))}


class TinyJudge(nn.Module):
    """Reads layout, colours and shapes off images (B, 3, 24, 24) in [-1, 1] -> logits (B, n) of five heads."""

    HEADS = (3, len(TINY_COLOURS), len(TINY_SHAPES), len(TINY_COLOURS), len(TINY_SHAPES))

    def __init__(self, width, act):
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), act())
        self.body = nn.Sequential(conv(5, width), conv(width, 2 * width), conv(2 * width, 2 * width),
                                  nn.Flatten(), nn.Linear(2 * width * 9, 64), act())
        self.heads = nn.ModuleList(nn.Linear(64, n) for n in self.HEADS)

    def forward(self, images):
        axis = torch.linspace(-1, 1, TINY_SIDE, device=images.device)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(len(images), -1, -1, -1)
        features = self.body(torch.cat([images, grid], 1))
        return [head(features) for head in self.heads]


def judge_scores(judge, images, captions):
    """Mean log-probability of the caption's attributes, each at least -4, and whether all are right (0 or 1):
    (B,), (B,). images (B, 3, 24, 24) in [0, 1]."""
    facts = torch.stack([parse_caption(c)[1] for c in captions]).to(images.device)  # -1: not asked
    heads = list(zip(judge(images.float() * 2 - 1), facts.T))
    loss = torch.stack([F.cross_entropy(l, f, ignore_index=-1, reduction="none") for l, f in heads], 1)
    right = torch.stack([(l.argmax(1) == f) | (f < 0) for l, f in heads], 1)
    return -loss.clamp_max(4).sum(1) / (facts >= 0).sum(1), right.all(1).float()


def tiny_transformer():
    """The teacher's network. Zero initialised gates and output: without them it does not learn in minutes."""
    net = diffusers.SD3Transformer2DModel(
        sample_size=TINY_SIDE, patch_size=4, in_channels=3, out_channels=3, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=TINY_WIDTH, caption_projection_dim=TINY_WIDTH,
        pooled_projection_dim=TINY_WIDTH, pos_embed_max_size=6)
    gates = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(gates):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return net


def tiny_velocity(net, x, t, cond):
    """The network predicts x_0, and v = (x - x_0) / t: its 64 channels, which carry more than the patch, seem to have
    no room for a patch's 48 numbers of noise; those of a picture are few in effect. SD3's calling convention: time in
    0 .. 1000."""
    x0 = net(hidden_states=x, timestep=1000 * t, return_dict=False, **cond)[0]
    return (x - x0) / t.view(-1, 1, 1, 1).clamp_min(0.05)


def train_tiny_judge(judge, label, steps, seed):
    """Cross-entropy on noisy renders: the noise keeps its gradient sane between the pictures."""
    generator = torch.Generator().manual_seed(seed)
    captions, optimizer = tiny_captions(), torch.optim.AdamW(judge.parameters(), 3e-3)
    for step in rtdmd.progress(range(steps), steps, label):
        optimizer.param_groups[0]["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = pick_captions(captions, 192, generator)
        facts, images = torch.stack([parse_caption(c)[1] for c in batch]), render(batch, generator)
        logits = judge(images + 0.15 * torch.randn(images.shape, generator=generator))
        loss = sum(F.cross_entropy(l, f, ignore_index=-1) for l, f in zip(logits, facts.T))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval().requires_grad_(False)


def pick_captions(captions, n, generator):
    """n captions, 30 % of them of a single object (those are the first of the list)."""
    objects = len(TINY_COLOURS) * len(TINY_SHAPES)
    one = torch.randint(objects, (n,), generator=generator)
    two = torch.randint(objects, len(captions), (n,), generator=generator)
    return [captions[i] for i in torch.where(torch.rand(n, generator=generator) < 0.3, one, two)]


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon in fp32, all matrices of a size at once. Torch's takes one after the other, in bf16, which many
    CPUs emulate: .10 s an update of the teacher instead of .02, beside .09 for the passes (another CPU: .78 s)."""

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        group, sizes = self.param_groups[0], defaultdict(list)
        for p in group["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
            ahead = p.grad.lerp(mean, group["momentum"])                    # Nesterov's momentum
            sizes[tuple(sorted(p.shape))].append((p, ahead))
        for pairs in sizes.values():
            x = torch.stack([ahead.mT if ahead.shape[0] > ahead.shape[1] else ahead for _, ahead in pairs])
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
            for _ in range(5):                                              # singular values go to some .7 to 1.2
                gram = x @ x.mT
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
            for (p, _), row in zip(pairs, x):
                tall = p.shape[0] / p.shape[1]
                p.sub_(row.mT if tall > 1 else row, alpha=group["lr"] * math.sqrt(max(1, tall)))


def train_tiny_teacher(net, text, steps, seed):
    """Flow matching, Eq. 3, with 10 % empty captions for guidance; leaves averaged weights in net and text.
    Muon for the matrices inside: Adam alone, in as many updates, learns colours and places but few shapes."""
    generator, captions = torch.Generator().manual_seed(seed), tiny_captions()
    params = [*net.parameters(), *text.parameters()]
    inside = [p for part in (net.transformer_blocks, text.mix) for p in part.parameters() if p.dim() == 2]
    others = [p for p in params if not any(p is matrix for matrix in inside)]
    optimizers = [Muon(inside, 0.02), torch.optim.AdamW(others, 3e-3, betas=(.9, .99), fused=True)]
    rate = lambda step: min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    mean = [p.detach().clone() for p in params]
    for step in rtdmd.progress(range(steps), steps, "tiny teacher"):
        batch = pick_captions(captions, 64, generator)
        x0 = render(batch, generator)
        empty = torch.rand(64, generator=generator) < 0.1
        ids = torch.stack([parse_caption("" if e else c)[0] for e, c in zip(empty, batch)])
        logit_normal = torch.sigmoid(1.1 * torch.randn(64, generator=generator))
        chosen, uniform = torch.rand(64, generator=generator) < 0.7, torch.rand(64, generator=generator)
        t = torch.where(chosen, logit_normal, uniform)
        noise = torch.randn(x0.shape, generator=generator)
        x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        loss = (tiny_velocity(net, x_t, t, text(ids)) - (noise - x0)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        torch._foreach_lerp_(mean, [p.detach() for p in params], 0.005 if step > 200 else 1 / (step + 1))
    for p, m in zip(params, mean):
        p.data.copy_(m)


class TinyBackbone:
    """The tiny world behind the interface of the real backbones, as any --model module:Class. Trains its teacher and
    judges on first use: 2,000 updates of the teacher, or as many as --pretrained tiny-500 says."""

    shift, latent_shape, rewards = 1.0, (3, TINY_SIDE, TINY_SIDE), dict.fromkeys(TINY_REWARDS)
    # Matching is divided by D (DEPARTURE 20), so the balance of Eq. 18 does not carry over from the paper's models:
    # the pathwise term has thirty times the weight of the others here. docs/claims.md has 1, 10 and 30.
    settings = {
        "prompts": "eval:tiny_captions", "resolution": TINY_SIDE, "guidance": 1.5, "micro_batch": 48,
        "rewards": "attributes=1", "watch": "heldout", "sample_every": 10, "lora_rank": 32, "lora_alpha": 16,
        "ema": 0.97, "std_floor": 0.05,
        1: dict(iterations=150, lr=1e-3, lr_fake=1e-3, fake_updates=3, batch=48),
        2: dict(iterations=50, lr=1e-3, lr_fake=1e-3, fake_updates=4, groups=8, group_size=6, det_weight=30.0)}

    def __init__(self, cfg):
        name = cfg.pretrained or "tiny-2000"
        if cfg.resolution != TINY_SIDE or not re.fullmatch(r"tiny-[1-9]\d*", name):
            raise UsageError(f"--model tiny has {TINY_SIDE} pixels and its own teacher: leave out --resolution, and "
                             "give --pretrained, if at all, as tiny-500: a teacher after 500 updates.")
        torch.manual_seed(rtdmd.key("tiny world"))  # the world is the same for every --seed
        net, text, A, B = tiny_transformer(), TinyText(), TinyJudge(32, nn.GELU), TinyJudge(24, nn.ReLU)
        parts = nn.ModuleDict(dict(net=net, text=text, reward=A, heldout=B))
        path, updates = Path(cfg.cache) / f"{name}.safetensors", int(name[5:])
        if not path.exists() and rtdmd.dist_info()[0] == 0:
            path.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before minutes
            steps = min(300, updates)
            train_tiny_judge(A, "tiny reward judge", steps, seed=1)
            train_tiny_judge(B, "tiny held-out judge", steps, seed=2)
            train_tiny_teacher(net, text, updates, seed=3)
            rtdmd.write_atomic(path, safetensors_bytes({n: p.contiguous() for n, p in parts.state_dict().items()}))
        rtdmd.barrier()
        try:
            parts.load_state_dict(load_file(path))
            matrices = [p for p in parts.parameters() if p.dim() > 1]
            if 2 * sum(p.any().item() for p in matrices) < len(matrices) or \
                    not all(p.isfinite().all() for p in matrices):
                raise RuntimeError("zeros or nan")
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"{path} is damaged ({type(error).__name__}): delete it, and the tiny world is made "
                             "anew.") from error
        weights = rtdmd.key(safetensors_bytes(text.state_dict()))  # made anew, they are others, and so is the key
        self.base, self.text_key = name, f"{name} {weights:016x}"
        parts.to(cfg.device).eval().requires_grad_(False)
        self.nets, self.text = {"generator": net, "teacher": net}, text
        self.lora_targets = rtdmd.matching_linears(net, rtdmd.Backbone.attention)
        kinds = zip(TINY_REWARDS, (A, A, B, B), (0, 1, 0, 1))
        self.rewards = {name: TinyReward(name, judge, output) for name, judge, output in kinds}

    def encode(self, prompts):
        device = self.text.places.device
        ids = torch.stack([parse_caption(p)[0] for p in prompts]).to(device)
        with torch.no_grad():
            return {n: c.cpu() for n, c in self.text(ids).items()}

    def free_text(self):
        pass

    def velocity(self, net, x, t, cond):
        return tiny_velocity(net, x, t, cond)

    def shift_for(self, steps):
        return self.shift

    def quantise(self, t):
        return t

    def decode(self, x):
        return (x / 2 + 0.5).clamp(0, 1)


class TinyReward:
    """A judge as reward: `attributes` (differentiable), `strict` (0 or 1, not differentiable); `heldout`,
    `heldout_strict`: the same of the other judge, never trained on."""

    def __init__(self, name, judge, output):
        self.name, self.judge, self.output, self.differentiable = name, judge, output, output == 0

    def __call__(self, images, prompts):
        return judge_scores(self.judge, images, prompts)[self.output]


def frechet(a, b):
    """Frechet distance of features a, b (n, d): |mean - mean|^2 + tr(A + B - 2 (A B)^1/2). NaN for n < 2."""
    if min(len(a), len(b)) < 2:
        return math.nan
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()     # those of (A B)^1/2
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * mixed).item()


def spread(images, per_prompt):
    """Mean distance between pictures of one caption. images (P * per_prompt, ...), grouped by caption."""
    sets = images.view(-1, per_prompt, images[0].numel())
    return (torch.cdist(sets, sets).sum() / (len(sets) * per_prompt * (per_prompt - 1))).item()


def tiny_set_metrics(images, captions, per_prompt):
    """What a set of pictures tells in the tiny world: {name: (value, bootstrap error over captions)}.

    distance: Frechet distance, in pixels pooled 4 x 4, to real renders of the same captions; lower is better,
    a second set of renders is at .18. diversity: spread within a caption over that of the renders, 1 is right.
    Neither uses a judge's features, which the student may have learned to deceive.
    """
    real = real_renders(captions)
    pooled, truth = (F.avg_pool2d(2 * x, 4).flatten(1) for x in (images, real))
    generator, P, results = torch.Generator().manual_seed(0), len(captions) // per_prompt, []
    for draw in range(21):  # the set itself, then 20 resamples of its captions
        pick = torch.arange(P) if draw == 0 else torch.randint(P, (P,), generator=generator)
        rows = (pick[:, None] * per_prompt + torch.arange(per_prompt)).flatten()
        ratio = spread(images[rows], per_prompt) / spread(real[rows], per_prompt) if per_prompt > 1 else math.nan
        results.append((frechet(pooled[rows], truth[rows]), ratio))
    return dict(zip(("distance", "diversity"), zip(results[0], torch.tensor(results[1:]).std(0).tolist())))


# ------------------------------------------------------------------------------------------------------------
# 15. main
# ------------------------------------------------------------------------------------------------------------

def main(argv=None):
    """Samples, scores, compares or ablates, as the flags say."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # ± in ASCII, a name that is not UTF-8: ?, and no traceback
    with rtdmd.one_sentence("eval"):
        words = sys.argv[1:] if argv is None else argv
        if any(word.split("=")[0] == "--dry_run" for word in words):
            return dry_run(words)
        flags, cfg = parse(words)
        commands = ((flags.ablations, ablations), (flags.compare, compare), (flags.images, score_folder),
                    (flags.prompt, one_picture), (True, evaluate))
        try:
            next(command for given, command in commands if given)(flags, cfg)
        except torch.OutOfMemoryError:
            raise UsageError(f"out of GPU memory: lower --batch (was {flags.batch}; no result changes); if that "
                             "does not help, the model is too large for this GPU.", code=1) from None


if __name__ == "__main__":
    main()
