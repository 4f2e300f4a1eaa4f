"""The paper's metrics on the ten packages: Aesthetic, ImageReward, HPSv3, GenEval, GenEval2, OCR.

Each is a small class called as scorer(images (B,3,H,W) in [0,1], prompts or metadata rows) -> (B,), on the
scale of the paper's tables, better when higher. `METRICS` lists them, `load_metric` loads one, `run_metric`
scores a set of images and frees the network again. Networks are arguments, so that tests use the real classes
at small size; the classmethod `load(cfg)` takes the real ones from --weights_dir or the hub.
"""
import argparse
import ast
import contextlib
import dataclasses
import gc
import importlib.metadata
import importlib.util
import io
import json
import math
import random
import re
import subprocess
import sys
import time
import weakref
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import rtdmd
from rtdmd import REWARDS, UsageError, find_weights, from_hub, load_reward, normalise, resize, score, square_crop

CLIP_L14 = "openai/clip-vit-large-patch14"
IMAGENET_MEAN, IMAGENET_STD = (.485, .456, .406), (.229, .224, .225)


# -----------------------------------------------------------------------------------------------------------
# What the scorers share


def frozen(net, cfg):
    """The network on the device, in eval mode, weights without gradients (which may still pass through)."""
    return net.to(cfg.device).eval().requires_grad_(False)


def load_net(loader, repo, cfg, **options):
    """A frozen transformers network. Tensors that the files lack are an error.

    transformers would fill them with random numbers and say so only in a log: the score would be noise.
    """
    net, info = from_hub(loader, repo, cfg, output_loading_info=True, **options)
    if info["missing_keys"]:
        lacking = sorted(info["missing_keys"])
        raise UsageError(f"{repo} lacks {len(lacking)} tensors of {loader.__name__}, such as {lacking[0]}: "
                         f"download the repository again.")
    return frozen(net, cfg)


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


def read_rows(path, needed):
    """The objects of a .jsonl file, one a line, each with the fields `needed`. UsageError names the line."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}: this is not JSON ({error.msg}).") from error
        missing = [name for name in needed if name not in row]
        if missing:
            raise UsageError(f"{path}, line {number}: the field {missing[0]!r} is missing.")
        rows.append(row)
    return rows


def find_rows(prompts, known, name):
    """Metadata rows for prompts: a dict is a row already, a text is looked up in `known` {prompt: row}."""
    rows = [p if isinstance(p, dict) else known.get(p) for p in prompts]
    if None in rows:
        raise UsageError(f"{name} needs to know what the image must show, and has no metadata for the prompt "
                         f"{prompts[rows.index(None)]!r}: give --prompts a metadata .jsonl file.")
    return rows


def rows_of(cfg, needed):
    """{prompt: row} of the .jsonl file that --prompts names, if it does: for use as a training reward."""
    path = str(cfg.prompts or "")
    return {row["prompt"]: row for row in read_rows(path, needed)} if path.endswith(".jsonl") else {}


# -----------------------------------------------------------------------------------------------------------
# Aesthetic: LAION's second predictor, an affine map of CLIP L/14's unit image embedding


class Aesthetic:
    """clip: CLIPModel of L/14, or a smaller one; head: its projected image embedding (B,768) -> (B,1)."""
    name, differentiable = "aesthetic", True

    def __init__(self, clip, head):
        self.clip, self.head = clip, head

    @classmethod
    def load(cls, cfg):
        """The head: LAION's own .pth, if it lies in --weights_dir or here, or its copy on the hub."""
        from safetensors.torch import load_file
        from transformers import CLIPModel
        own = Path(cfg.weights_dir or ".").expanduser() / "sac+logos+ava1-l14-linearMSE.pth"
        if own.is_file():
            state = torch.load(own, map_location="cpu", weights_only=True)
        else:
            state = load_file(find_weights("ttj/sac-logos-ava1-l14-linearMSE", "model.safetensors", cfg))
        clip = load_net(CLIPModel, CLIP_L14, cfg, dtype=torch.float32)
        return cls(clip, frozen(score_head(state, "layers."), cfg))

    def __call__(self, images, prompts=None):
        """images (B,3,H,W) -> (B,); 5.24 is the head's bias, 5.2 to 6 what generated images get."""
        embedding = self.clip.get_image_features(pixel_values=square_crop(images)).pooler_output
        return self.head(F.normalize(embedding, dim=-1)).squeeze(-1)


# -----------------------------------------------------------------------------------------------------------
# ImageReward: BLIP's text encoder reads the prompt with the image in its cross-attention

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


class ImageReward:
    """vision, text: BlipVisionModel and BlipTextModel; head (B,768) -> (B,1); tokenizer: BERT's."""
    name, differentiable = "imagereward", True
    MEAN, STD = .16717362830052426, 1.0333394966054072   # of the raw score over its authors' validation set

    def __init__(self, vision, text, head, tokenizer, device="cpu"):
        self.vision, self.text, self.head, self.tokenizer, self.device = vision, text, head, tokenizer, device

    @staticmethod
    def networks(state, vision_size=None, text_size=None):
        """The three networks, strictly loaded. Sizes are keyword dicts for the two configurations.

        Three values differ from transformers' defaults: the epsilon of the vision norms, 12 text heads, and
        the cross-attention's width. is_decoder stays on, since it is what creates the cross-attention; the
        forward is never causal all the same.
        """
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
        large = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                     image_size=224, patch_size=16)
        vision_size = {**large, **(vision_size or {})}
        text_size = {"vocab_size": 30524, "num_attention_heads": 12, **(text_size or {})}
        vision = BlipVisionModel(BlipVisionConfig(**vision_size, layer_norm_eps=1e-6))
        text = BlipTextModel(BlipTextConfig(**text_size, encoder_hidden_size=vision_size["hidden_size"],
                                            is_decoder=True), add_pooling_layer=False)
        of_vision, of_text, of_head = split_imagereward(state)
        vision.load_state_dict(of_vision)
        text.load_state_dict(of_text)
        return vision, text, score_head(of_head, "mlp.layers.")

    @classmethod
    def load(cls, cfg):
        from transformers import BertTokenizer
        path = find_weights("THUDM/ImageReward", "ImageReward.pt", cfg)
        networks = cls.networks(torch.load(path, map_location="cpu", weights_only=True))
        tokenizer = from_hub(BertTokenizer, "google-bert/bert-base-uncased", cfg, needs="tokenizer.json")
        return cls(*(frozen(net, cfg) for net in networks), tokenizer, cfg.device)

    def __call__(self, images, prompts):
        """images (B,3,H,W), prompts -> (B,), about zero mean and unit std over ordinary generated images."""
        words = self.tokenizer(prompts, padding="max_length", max_length=35, truncation=True,
                               return_tensors="pt").to(self.device)
        seen = self.vision(pixel_values=square_crop(images)).last_hidden_state   # its pooler would norm twice
        read = self.text(input_ids=words["input_ids"], attention_mask=words["attention_mask"],
                         encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0]).squeeze(-1) - self.MEAN) / self.STD        # the first token, [CLS]


# -----------------------------------------------------------------------------------------------------------
# HPSv3: Qwen2-VL reads image and prompt; a small head turns the state at a marker token into a score


def hpsv3_instruction(cfg):
    """The text around the prompt, with {text_prompt} in it, and the marker <|Reward|> behind it.

    It is its authors' prose, so it is not printed here, and the checkpoint knows no other wording. It is
    read, not run, from one source file of their package: `pip install --no-deps hpsv3==1.0.0`, or that file
    alone in --weights_dir.
    """
    name = "data_collator_qwen.py"
    package = importlib.util.find_spec("hpsv3")
    folders = [Path(p) / "dataset" for p in (package.submodule_search_locations if package else ())]
    if cfg.weights_dir:
        folders += [Path(cfg.weights_dir).expanduser() / "HPSv3", Path(cfg.weights_dir).expanduser()]
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(f"HPSv3's instruction text was not found ({name}, in the package hpsv3 or in "
                         f"--weights_dir {cfg.weights_dir}): run `pip install --no-deps hpsv3==1.0.0`.")
    statements = ast.parse(found.read_text(encoding="utf-8")).body
    texts = {node.targets[0].id: node.value.value for node in statements
             if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)}
    return texts["INSTRUCTION"] + texts["prompt_with_special_token"]


def split_hpsv3(state):
    """HPSv3.safetensors' tensors, renamed for (Qwen2VLModel, head): two dicts, the language head left out."""
    net = {("language_" + k if k.startswith("model.") else k): v for k, v in state.items()
           if k.startswith(("model.", "visual."))}
    head = {k.removeprefix("rm_head."): v.float() for k, v in state.items() if k.startswith("rm_head.")}
    return net, head


class HPSv3:
    """net: Qwen2VLModel; head: (.., D) -> (.., 2), mean and log-variance, in fp32; processor: Qwen2-VL's.

    token_id: the marker's. Gradients could pass, but through 8 billion weights, so they are not offered.
    """
    name, differentiable = "hpsv3", False
    PIXELS = 256 * 28 * 28   # every image is brought to 256 tokens, 448 x 448 if it is square

    def __init__(self, net, head, processor, instruction, token_id, device="cpu"):
        self.net, self.head, self.processor, self.device = net, head, processor, device
        self.instruction, self.token_id = instruction, token_id

    @staticmethod
    def networks(state, config, dtype=torch.bfloat16):
        """Both networks, strictly loaded. The vocabulary is the checkpoint's: it has the marker added."""
        from transformers import Qwen2VLModel
        of_net, of_head = split_hpsv3(state)
        config.text_config.vocab_size, width = of_net["language_model.embed_tokens.weight"].shape
        net, info = Qwen2VLModel.from_pretrained(None, config=config, state_dict=of_net, dtype=dtype,
                                                 output_loading_info=True)
        wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]})
        if wrong:
            raise UsageError(f"HPSv3.safetensors: {len(wrong)} tensors misfit Qwen2-VL, such as {wrong[0]}.")
        head = nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(),
                             nn.Linear(16, 2))
        head.load_state_dict(of_head)
        return net, head

    @classmethod
    def load(cls, cfg):
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoProcessor
        base, text = "Qwen/Qwen2-VL-7B-Instruct", hpsv3_instruction(cfg)
        processor = from_hub(AutoProcessor, base, cfg, needs="tokenizer.json", padding_side="right")
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
        token_id = processor.tokenizer.convert_tokens_to_ids("<|Reward|>")
        state = load_file(find_weights("MizzenAI/HPSv3", "HPSv3.safetensors", cfg))
        net, head = cls.networks(state, from_hub(AutoConfig, base, cfg))
        return cls(frozen(net, cfg), frozen(head, cfg), processor, text, token_id, cfg.device)

    @torch.no_grad()
    def __call__(self, images, prompts):
        """images (B,3,H,W), prompts -> (B,), unbounded: 10 to 16 in the paper's tables."""
        talks = [[{"role": "user", "content": [{"type": "image"}, {"type": "text",
                  "text": self.instruction.format(text_prompt=p)}]}] for p in prompts]
        texts = self.processor.apply_chat_template(talks, tokenize=False, add_generation_prompt=True)
        size = {"shortest_edge": self.PIXELS, "longest_edge": self.PIXELS}
        inputs = self.processor(text=texts, images=list(as_bytes(images)), images_kwargs={"size": size},
                                padding=True, return_tensors="pt").to(self.device)
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


# -----------------------------------------------------------------------------------------------------------
# GenEval: a detector finds the objects, CLIP names their colours, rules decide

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
    rows = read_rows(path, ("tag", "include", "prompt"))
    for row in rows:
        strange = [need["class"] for need in row["include"] if need["class"] not in COCO]
        if strange or row["tag"] not in TASKS:
            raise UsageError(f"{path}: {row['prompt']!r} has an unknown " + (
                f"class, {strange[0]!r}." if strange else f"tag, {row['tag']!r}; known are {TASKS}."))
    return rows


def an(words):
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
            include, words = [one], an(first)
        case "two_object":
            words = f"{an(first)} and {an(second)}"
        case "counting":
            one["count"] = draw.randint(2, 4)
            include, exclude = [one], [{"class": first, "count": one["count"] + 1}]   # exactly so many
            words = f"{NUMBERS[one['count']]} {first}{'es' if first.endswith('s') else 's'}"
        case "colors":
            one["color"] = draw.choice(COLOURS)
            include, words = [one], f"{an(one['color'])} {first}"
        case "position":
            two["position"] = [draw.choice(RELATIONS), 0]             # relative to include[0], its anchor
            words = f"{an(second)} {two['position'][0]} {an(first)}"
        case "color_attr":
            one["color"], two["color"] = draw.sample(COLOURS, 2)
            words = f"{an(one['color'])} {first} and {an(two['color'])} {second}"
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
    from transformers import Mask2FormerModel, Mask2FormerPreTrainedModel

    class Detector(Mask2FormerPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model = Mask2FormerModel(config)
            self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)   # the last: nothing
            self.post_init()

        def forward(self, pixels):
            """(B,3,h,w) -> class logits (B,Q,81), mask logits (B,Q,h/4,w/4)"""
            out = self.model(pixels, output_hidden_states=True)
            queries = out.transformer_decoder_intermediate_states[-1].transpose(0, 1)
            return self.class_predictor(queries), out.masks_queries_logits[-1]

    return Detector


def detector_view(images):
    """(B,3,H,W) -> (B,3,h,w) and the size before padding: up to 800 x 1333, then to multiples of 32."""
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


def placed(found, position, groups):
    """True if the group that `found` relates to is there, and all of `found` stand as asked to all of it."""
    relation, target = position
    return groups[target] is not None and all(relation in relations(a.box, b.box)
                                              for a in found for b in groups[target])


def geneval_official(objects, row, colours):
    """GenEval's verdict on one image: True or False. colours(Detections, class name) -> list of colour names.

    Only the best `count` objects of a class are looked at; more of them fail only through `exclude`.
    """
    groups = []
    for need in row["include"]:
        name, count = need["class"], need["count"]
        found = objects.get(name, [])[:count]
        good = len(found) == count
        if good and "color" in need:
            good = colours(found, name).count(need["color"]) >= count
        if good and "position" in need:
            good = placed(found, need["position"], groups)
        groups.append(found if good else None)
    absent = all(len(objects.get(no["class"], [])) < no["count"] for no in row.get("exclude", ()))
    return absent and None not in groups


def geneval_partial(objects, row, colours):
    """(partial credit, strict verdict) of one image: the reward that GenEval training uses, and its accuracy.

    A term for each thing asked: 1 - |count - found| / count, which may be negative, the same for colours, 0
    or 1 for a position; the reward is their mean. Counts are exact here, and `exclude` plays no part. A
    violated position adds a 0 and then a 1: an oddity of the original, kept because scores are compared with
    its own.
    """
    terms, groups = [], []
    for need in row["include"]:
        name, count = need["class"], need["count"]
        found = objects.get(name, [])
        good = len(found) == count
        terms.append(1 - abs(count - len(found)) / count)
        if not good and ("color" in need or "position" in need):
            terms.append(0.)
        if good and "color" in need:
            hits = colours(found, name).count(need["color"])
            terms.append(1 - abs(count - hits) / count)
            good = hits == count
        if good and "position" in need:
            good = placed(found, need["position"], groups)
            terms += [1.] if good else [0., 1.] if groups[need["position"][1]] is not None else [0.]
        groups.append(found if good else None)
    return sum(terms) / len(terms), None not in groups


class ColourNames:
    """CLIP L/14 names the colour of an object. net: an open_clip CLIP; tokenise: its tokenizer."""

    def __init__(self, net, tokenise):
        self.net, self.tokenise, self.known = net, tokenise, {}

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
            crops.append(square_crop(torch.where(d.mask, image, .6)[None, :, y1:y2, x1:x2]))
        seen = F.normalize(self.net.encode_image(torch.cat(crops)), dim=-1)
        return [COLOURS[i] for i in (seen @ self.weights(name).T).argmax(-1).tolist()]


class GenEval:
    """detector: pixels -> (class logits, mask logits); colours: (image, Detections, name) -> names.

    rule: which of the three scores a call returns; known: {prompt: row}, for callers who have only prompts.
    The detector is Meta's own training of the architecture that GenEval used, so numbers compare only with
    others that were made with it: they move most near the .9 threshold of counting.
    """
    name, differentiable = "geneval", False

    def __init__(self, detector, colours, rule="geneval", known=None):
        self.detector, self.colours, self.rule, self.known = detector, colours, rule, known or {}

    @classmethod
    def load(cls, cfg):
        """open_clip must be asked for the quickgelu twin: OpenAI's weights under plain GELU lose accuracy."""
        import open_clip
        arch, repo = "ViT-L-14-quickgelu", "timm/vit_large_patch14_clip_224.openai"
        detector = load_net(detector_class(), "facebook/mask2former-swin-small-coco-instance", cfg)
        weights = find_weights(repo, "open_clip_model.safetensors", cfg)
        clip = frozen(open_clip.create_model(arch, pretrained=str(weights)), cfg)
        return cls(detector, ColourNames(clip, open_clip.get_tokenizer(arch)),
                   known=rows_of(cfg, ("tag", "include", "prompt")))

    @torch.no_grad()
    def details(self, images, prompts):
        """{"geneval", "geneval_partial", "geneval_strict"}: (B,) each, from one look at the images."""
        rows, (pixels, size) = find_rows(prompts, self.known, "geneval"), detector_view(images)
        scores = {"geneval": [], "geneval_partial": [], "geneval_strict": []}
        for image, row, classes, masks in zip(images, rows, *self.detector(pixels)):
            found = instances(classes, masks, pixels.shape[-2:], size, image.shape[-2:])
            objects = objects_of(found, .9 if row["tag"] == "counting" else .3)

            def colours(detections, name):
                return self.colours(image, detections, name)

            verdicts = geneval_official(objects, row, colours), *geneval_partial(objects, row, colours)
            for value, kept in zip(verdicts, scores.values()):
                kept.append(float(value))
        return {name: images.new_tensor(values) for name, values in scores.items()}

    def __call__(self, images, prompts):
        """images (B,3,H,W), metadata rows or known prompts -> (B,); 0 or 1 by the official rule."""
        return self.details(images, prompts)[self.rule]


def geneval_summary(scores, rows):
    """Mean of each task, and under "geneval" the unweighted mean of these, which the paper prints."""
    tasks = {}
    for value, row in zip(scores, rows):
        tasks.setdefault(row["tag"], []).append(float(value))
    means = {tag: sum(values) / len(values) for tag, values in tasks.items()}
    return {**means, "geneval": sum(means.values()) / len(means)}


# -----------------------------------------------------------------------------------------------------------
# GenEval2: a vision language model answers one question for each atom of the prompt (Soft-TIFA)


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


class GenEval2:
    """net: Qwen3VLForConditionalGeneration; processor: its own; known: {prompt: row}; batch: of questions."""
    name, differentiable = "geneval2", False

    def __init__(self, net, processor, known=None, batch=8, device="cpu"):
        self.net, self.processor, self.known = net, processor, known or {}
        self.batch, self.device = batch, device

    @classmethod
    def load(cls, cfg):
        from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
        repo = "Qwen/Qwen3-VL-8B-Instruct"
        net = load_net(Qwen3VLForConditionalGeneration, repo, cfg, dtype=torch.bfloat16)
        processor = from_hub(AutoProcessor, repo, cfg, needs="tokenizer.json")
        return cls(net, processor, rows_of(cfg, ("prompt", "vqa_list")), device=cfg.device)

    @torch.no_grad()
    def first_word(self, images, questions):
        """uint8 images (n,3,H,W), n questions -> probabilities of the answer's first token (n, vocabulary).

        One forward and no generation: greedy decoding changes nothing before the first token.
        """
        talks = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
                 for question in questions]
        texts = self.processor.apply_chat_template(talks, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=texts, images=list(images), padding=True, padding_side="right",
                                return_tensors="pt").to(self.device)
        states = self.net.model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1   # the end of each question, before its padding
        return self.net.lm_head(states[torch.arange(len(last)), last]).float().softmax(-1)

    def atoms(self, image, row):
        """Probability of the right answer to each question of a row. image (3,H,W) uint8"""
        found = []
        for start in range(0, len(row["vqa_list"]), self.batch):
            pairs = row["vqa_list"][start:start + self.batch]
            questions = [f"{question} Answer in one word." for question, _ in pairs]
            words = self.first_word(image.expand(len(pairs), -1, -1, -1), questions)
            for (question, answer), p in zip(pairs, words):
                tokens = {self.processor.tokenizer.encode(spelt, add_special_tokens=False)[0]
                          for spelt in accepted_answers(question, answer)}   # a set: some begin alike
                found.append(p[sorted(tokens)].sum().item())
        return found

    def details(self, images, prompts):
        """{"geneval2": geometric mean over the atoms, "geneval2_am": arithmetic mean}: (B,) each"""
        rows = find_rows(prompts, self.known, "geneval2")
        means = [soft_tifa(self.atoms(image, row)) for image, row in zip(as_bytes(images), rows)]
        return {"geneval2": images.new_tensor([g for _, g in means]),
                "geneval2_am": images.new_tensor([a for a, _ in means])}

    def __call__(self, images, prompts):
        """images (B,3,H,W), rows with vqa_list [[question, answer], ..] or known prompts -> (B,) in 0..1"""
        return self.details(images, prompts)["geneval2"]


# -----------------------------------------------------------------------------------------------------------
# OCR: find the lines of text, read them, compare with what the prompt puts in quotes


def components(mask):
    """Connected regions (8 neighbours) of a bool array (H,W): lists of runs (row, first column, end)."""
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

    The map shows text shrunk to its core. Regions above .3 whose mean is .6 at least are text; each box grows
    by 1.5 area / perimeter, which undoes the shrinking. Boxes are upright: slanted lines get more of their
    surroundings than the original's rotated ones.
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


def quoted_text(prompt):
    """What the image should say: the prompt's first text in double quotes, straight or curly."""
    found = re.search(r'["“”]([^"“”]+)["“”]', prompt)
    if not found:
        raise UsageError(f"ocr compares with the text in double quotes, and the prompt {prompt!r} has none.")
    return found[1]


def text_score(read, wanted):
    """1 - edit distance / length, 0 or more; 1 if `read` holds `wanted`. Blanks and capitals are ignored."""
    read, wanted = (text.replace(" ", "").lower() for text in (read, wanted))
    distance = 0 if wanted in read else min(edit_distance(read, wanted), len(wanted))
    return 1 - distance / len(wanted)


class OCR:
    """detector, reader: PP-OCRv5 networks; views: their two image processors.

    Another version of PP-OCR than the paper's (2.9.1 of paddleocr), so scores come close to its own, not
    equal.
    """
    name, differentiable = "ocr", False

    def __init__(self, detector, detector_view, reader, reader_view, device="cpu"):
        self.detector, self.detector_view, self.device = detector, detector_view, device
        self.reader, self.reader_view = reader, reader_view

    @classmethod
    def load(cls, cfg):
        from transformers import (AutoImageProcessor, PPOCRV5ServerDetForObjectDetection,
                                  PPOCRV5ServerRecForTextRecognition)
        find, read = (f"PaddlePaddle/PP-OCRv5_server_{part}_safetensors" for part in ("det", "rec"))
        views = [from_hub(AutoImageProcessor, repo, cfg, needs="preprocessor_config.json")
                 for repo in (find, read)]
        return cls(load_net(PPOCRV5ServerDetForObjectDetection, find, cfg), views[0],
                   load_net(PPOCRV5ServerRecForTextRecognition, read, cfg), views[1], cfg.device)

    def line(self, crop):
        """One line of text, uint8 (3,h,w) -> its letters, or "" when unsure.

        Lines are read one by one: in a batch the processor would stretch all of them to the widest one's
        shape.
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


# -----------------------------------------------------------------------------------------------------------
# The table of metrics

# All are better when higher; REWARDS, in rtdmd.py, has the rows of hpsv2, clipscore and pickscore.
METRICS = {
    "clipscore":   dict(column="CLIPScore", **REWARDS["clipscore"], differentiable=True),
    "aesthetic":   dict(column="Aesthetic", scorer=Aesthetic, scale="1 to 10", differentiable=True,
                        licence="Apache-2.0, MIT", repo=f"ttj/sac-logos-ava1-l14-linearMSE, {CLIP_L14}"),
    "pickscore":   dict(column="PickScore", **REWARDS["pickscore"], differentiable=True),
    "hpsv2":       dict(column="HPSv2", **REWARDS["hpsv2"], differentiable=True),
    "imagereward": dict(column="ImageReward", scorer=ImageReward, scale="about 0 +- 1", licence="Apache-2.0",
                        differentiable=True, repo="THUDM/ImageReward, google-bert/bert-base-uncased"),
    "hpsv3":       dict(column="HPSv3", scorer=HPSv3, scale="unbounded, 10 to 16", licence="MIT, Apache-2.0",
                        differentiable=False, repo="MizzenAI/HPSv3, Qwen/Qwen2-VL-7B-Instruct"),
    "geneval":     dict(column="GenEval", scorer=GenEval, scale="0 to 1", licence="MIT rules, other detector",
                        differentiable=False, repo="facebook/mask2former-swin-small-coco-instance, "
                                                   "timm/vit_large_patch14_clip_224.openai"),
    "geneval2":    dict(column="GenEval2", scorer=GenEval2, scale="0 to 1", differentiable=False,
                        licence="Apache-2.0 judge, CC BY-NC 4.0 prompts", repo="Qwen/Qwen3-VL-8B-Instruct"),
    "ocr":         dict(column="OCR", scorer=OCR, scale="0 to 1", licence="Apache-2.0", differentiable=False,
                        repo="PaddlePaddle/PP-OCRv5_server_det_safetensors, "
                             "PaddlePaddle/PP-OCRv5_server_rec_safetensors"),
}


def load_metric(name, cfg, training=False):
    """The scorer of that name with its real networks. As a training reward, geneval gives partial credit."""
    if name in REWARDS:
        return load_reward(name, cfg)
    if name not in METRICS:
        raise UsageError(f"--metrics: no metric is called {name!r}; there are {', '.join(METRICS)}.")
    scorer = METRICS[name]["scorer"].load(cfg)
    if training and name == "geneval":
        scorer.rule = "geneval_partial"
    return scorer


@torch.no_grad()
def run_metric(scorer, images, prompts, batch=16, device="cpu"):
    """Scores of a set of images: {name: list of floats, NaN where one failed}, a sentence on each failure.

    images: anything indexable that gives (3,H,W) in [0,1], so also a lazy reader of files; neighbours of one
    size are scored together. One bad image or file costs its own score and no other. Scorers that know more
    than one number (geneval, geneval2) return them all.
    """
    results, failures, group = [{} for _ in prompts], [], []   # {name: float} by image; group of (i, image)
    for i in range(len(prompts)):
        try:
            image = images[i]
        except OSError as error:   # PIL's word for a broken picture, and Python's for a missing one
            failures.append(f"{scorer.name} has no image for the prompt {text_of(prompts[i])!r}: {error}")
            continue
        if group and (len(group) == batch or group[0][1].shape != image.shape):
            score_group(scorer, group, prompts, device, results, failures)
            group = []
        group.append((i, image))
    if group:
        score_group(scorer, group, prompts, device, results, failures)
    names = dict.fromkeys([scorer.name, *(name for result in results for name in result)])
    return {name: [result.get(name, math.nan) for result in results] for name in names}, failures


def text_of(prompt):
    """The prompt's words, for messages: metadata rows are long."""
    return prompt["prompt"] if isinstance(prompt, dict) else prompt


def score_group(scorer, group, prompts, device, results, failures):
    """Score [(i, image), ..] in one batch and write results[i]. If that fails, one by one; then say which."""
    rows = {text_of(prompts[i]): prompts[i] for i, _ in group}   # texts go through score(), for its messages
    found = {}

    def call(images, texts):
        known = [rows[text] for text in texts]
        found.update(scorer.details(images, known) if hasattr(scorer, "details")
                     else {scorer.name: scorer(images, known)})
        return found[scorer.name]

    call.name = scorer.name
    texts = [text_of(prompts[i]) for i, _ in group]
    try:
        values = score(call, torch.stack([image for _, image in group]).to(device), texts).tolist()
    except UsageError as error:
        for one in group if len(group) > 1 else ():
            score_group(scorer, [one], prompts, device, results, failures)
        failures += [str(error)] if len(group) == 1 else []
        return
    for n, (i, _) in enumerate(group):
        results[i].update({name: column[n].item() for name, column in found.items()})
        if not math.isfinite(values[n]):
            failures.append(f"{scorer.name} is {values[n]} for the prompt {texts[n]!r}")


def free():
    """Give the memory of scorers that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------------------------
# Metrics of the tiny world that look at the whole set, and how a set is summed up
# ----------------------------------------------------------------------------------------------------------------------

def frechet(a, b):
    """Frechet distance of two sets of features (n, d): |mean - mean|^2 + tr(A + B - 2 (A B)^1/2)."""
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * mixed).item()


def spread(images, per_prompt):
    """Mean distance between pictures of one caption. images (P * per_prompt, ...), grouped by caption."""
    sets = images.view(-1, per_prompt, images[0].numel())
    return (torch.cdist(sets, sets).sum() / (len(sets) * per_prompt * (per_prompt - 1))).item()


def tiny_set_metrics(backbone, images, captions, per_prompt):
    """distance: Frechet distance, in pixels pooled 2 x 2, to real renders of the same captions; a second set of renders is at
    .18. diversity: spread within a caption over that of the renders. {name: (value, bootstrap error over captions)}.

    Neither looks through a judge's eyes: a judge's features would also measure what the reward may have spoilt.
    """
    real = backbone.decode(rtdmd.render(captions, torch.Generator().manual_seed(rtdmd.key("real renders"))))
    pooled, truth = (F.avg_pool2d(2 * x, 2).flatten(1) for x in (images, real))
    generator, P, results = torch.Generator().manual_seed(0), len(captions) // per_prompt, []
    for draw in range(21):                                                  # the set itself, then 20 resamples of its captions
        pick = torch.arange(P) if draw == 0 else torch.randint(P, (P,), generator=generator)
        rows = (pick[:, None] * per_prompt + torch.arange(per_prompt)).flatten()
        ratio = spread(images[rows], per_prompt) / spread(real[rows], per_prompt) if per_prompt > 1 else math.nan
        results.append((frechet(pooled[rows], truth[rows]), ratio))
    errors = torch.tensor(results[1:]).std(0).tolist()
    return {"distance": (results[0][0], errors[0]), "diversity": (results[0][1], errors[1])}


def mean_and_error(values, per_prompt):
    """Mean of scores that are not NaN, and its standard error over prompts (pictures of one prompt are not independent)."""
    table = torch.tensor(values, dtype=torch.float64).view(-1, per_prompt)
    prompts = table.nanmean(1)[~table.isnan().all(1)]
    error = prompts.std().item() / math.sqrt(len(prompts)) if len(prompts) > 1 else math.nan
    return prompts.mean().item() if len(prompts) else math.nan, error


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------------------

DEFAULT_METRICS = {"tiny": "attributes,strict,heldout,distance,diversity"}
TINY_COLUMNS = dict(attributes="reward", strict="strict acc.", heldout="held-out", distance="distance", diversity="diversity")


@dataclasses.dataclass
class Flags:
    """What to sample and what to measure. Everything about the model itself is a flag of rtdmd.py, with the same name."""

    lora: str = rtdmd.opt("", "checkpoint, or a stage's folder (its newest): sampled with --nfe steps")
    run_folder: str = rtdmd.opt("", "run folder: rows teacher, teacher_cfg, student_init, stage1, stage2; writes its report.json")
    teacher: bool = rtdmd.opt(False, "the teacher, Euler steps: --teacher --nfe 50 --cfg 7")
    images: str = rtdmd.opt("", "folder of pictures to score; metadata.jsonl (file_name, prompt) or the names give the prompts")
    compare: list = rtdmd.opt((), "two report.json, A B: differences B - A with paired standard errors")
    prompt: str = rtdmd.opt("", "only make one picture of this prompt")
    ablations: bool = rtdmd.opt(False, "the paper's questions on the tiny world; goes on where it was stopped")
    seeds: int = rtdmd.opt(5, "seeds of --ablations")
    only: str = rtdmd.opt("", "rows of --ablations whose name, such as 'stage 2: SubGRPO M=2', contains this")
    metrics: str = rtdmd.opt("", "names, comma separated; default: the model's own")
    nfe: int = rtdmd.opt(0, "steps; default: the checkpoint's, else 4")
    eta: float = rtdmd.opt(-1.0, "CPS randomness of the student; default: the checkpoint's, else 0.9 (paper 4.1)")
    cfg: float = rtdmd.opt(1.0, "guidance weight of --teacher")
    per_prompt: int = rtdmd.opt(0, "pictures per prompt; default 1, tiny 8")
    max_prompts: int = rtdmd.opt(1000, "prompts taken from the set")
    batch: int = rtdmd.opt(8, "pictures per forward; tiny 128")
    out: str = rtdmd.opt("", "folder of report.json, grid.png and images/; default runs/eval, or the run folder")
    save_images: bool = rtdmd.opt(False, "also write every picture to OUT/images")


MODEL_FLAGS = ("model", "pretrained", "resolution", "device", "dtype", "cache", "prompts", "text_length", "weights_dir", "seed",
               "tiny_steps", "random_weights")


def parse(argv):
    """(Flags, rtdmd.Config) from the command line. An unknown flag is an error."""
    parser = rtdmd.FlagParser(description="Samples and scores, in the columns of the paper.", allow_abbrev=False,
                              argument_default=argparse.SUPPRESS)
    known = [*dataclasses.fields(Flags), *(f for f in dataclasses.fields(rtdmd.Config) if f.name in MODEL_FLAGS)]
    for field in known:
        kind = dict(action="store_true") if isinstance(field.default, bool) else dict(type=type(field.default), metavar="")
        kind = dict(nargs=2, metavar=("A", "B")) if field.name == "compare" else kind
        parser.add_argument(f"--{field.name}", help=f"{field.metadata['help']} [{field.default}]".replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    cfg = rtdmd.resolve({**settings_of(given.get("run_folder", "")), **{n: v for n, v in given.items() if n in MODEL_FLAGS}})
    flags = Flags(**{n: v for n, v in given.items() if n not in MODEL_FLAGS})
    flags.given = set(given)
    tiny = cfg.model == "tiny"
    if "prompts" not in given:
        cfg.prompts = "tiny-test" if tiny else "drawbench"
    flags.per_prompt = flags.per_prompt or (8 if tiny else 1)
    flags.batch = 128 if tiny and "batch" not in given else flags.batch
    own = DEFAULT_METRICS.get(cfg.model if not flags.images else "", "clipscore,aesthetic,pickscore,hpsv2,imagereward")
    flags.metrics = flags.metrics or own
    flags.out = flags.out or flags.run_folder or "runs/eval"
    wrong = [n for n in ("nfe", "per_prompt", "batch", "max_prompts") if n in given and given[n] < 1]
    if wrong or "eta" in given and not 0 <= flags.eta <= 1:
        raise UsageError(f"--{wrong[0]} must be at least 1." if wrong else "--eta must lie in [0, 1].")
    if not any((flags.ablations, flags.lora, flags.run_folder, flags.teacher, flags.images, flags.compare, flags.prompt)):
        raise UsageError("Say what to evaluate: --lora DIR, --run_folder DIR, --teacher, --images DIR, --compare A B or --prompt TEXT.")
    return flags, cfg


def settings_of(run):
    """What a run folder's own run.json says about its model: --run_folder needs no second list of the training's flags."""
    found = [path for path in (Path(run) / "stage1/run.json", Path(run) / "stage2/run.json") if run and path.exists()]
    config = json.loads(found[0].read_text())["config"] if found else {}
    return {n: v for n, v in config.items() if n in (*MODEL_FLAGS, "guidance") and n not in ("device", "prompts")}


def checkpoint_at(path):
    """The newest whole checkpoint at a path, or a bare folder with an exported adapter. Raises UsageError."""
    if (Path(path) / rtdmd.LORA_FILE).exists():
        return Path(path)
    found = rtdmd.find_checkpoint(path)
    if not found:
        raise UsageError(f"There is no checkpoint at {path}: give the folder of a stage, such as runs/tiny/stage2.")
    return found


def plan(flags, cfg):
    """The rows of the table: {name: dict(role, nfe, eta, guidance, lora)}. Student and teacher start from the same noise; a
    checkpoint is sampled as it was trained unless a flag says otherwise. Sets cfg.resolution likewise."""
    def student(lora=None):
        info = rtdmd.load_lora(lora)[1] if lora else {}
        if "resolution" not in flags.given:
            cfg.resolution = info.get("resolution", cfg.resolution)
        return dict(role="generator", nfe=flags.nfe or info.get("steps", 4), guidance=1.0, lora=lora,
                    eta=flags.eta if flags.eta >= 0 else info.get("eta", 0.9))

    def teacher(nfe, guidance):
        return dict(role="teacher", nfe=nfe, eta=0.0, guidance=guidance, lora=None)
    rows = {}
    if flags.run_folder:
        rows = {"teacher": teacher(50, 1.0), "teacher_cfg": teacher(50, cfg.guidance), "student_init": student()}
        for stage in ("stage1", "stage2"):
            if rtdmd.list_checkpoints(Path(flags.run_folder) / stage):
                rows[stage] = student(checkpoint_at(Path(flags.run_folder) / stage))
    if flags.teacher:
        rows["teacher"] = teacher(flags.nfe or 50, flags.cfg)
    if flags.lora:
        rows[Path(flags.lora).name] = student(checkpoint_at(flags.lora))
    return rows or {"student_init": student()}


class Sampler:
    """Backbone, adapters and text embeddings, ready to sample rows of a plan."""

    def __init__(self, cfg, rows, prompts):
        adapters = {name: rtdmd.load_lora(row["lora"]) for name, row in rows.items() if row["lora"]}
        for _, info in adapters.values():
            if info["model"] != cfg.model:
                raise UsageError(f"The adapter is one of {info['model']}: evaluate it with --model {info['model']}.")
            cfg.lora_rank, cfg.lora_alpha = info["rank"], info["alpha"]
            cfg.text_length = cfg.text_length or info.get("text_length", 0)         # padding is part of the condition
        cfg.device = rtdmd.start_processes(cfg.device)
        self.cfg, self.adapters, self.backbone = cfg, adapters, rtdmd.load_backbone(cfg)
        self.roles = rtdmd.Roles(self.backbone, cfg)
        self.blank = {n: p.detach().clone() for n, p in self.roles.named["generator"].items()}
        self.text = rtdmd.TextCache(self.backbone, Path(cfg.cache) / "text")
        self.text.prepare(prompts)

    def wear(self, name):
        """Puts a row's adapter on; a row without one gets the untrained adapter, which does nothing."""
        rtdmd.load_adapter(SimpleNamespace(roles=self.roles, cfg=self.cfg), "generator", self.adapters.get(name, (self.blank,))[0])

    @torch.no_grad()
    def batch(self, row, prompts, keys):
        """Images (B, 3, H, W) in [0, 1]. Noise belongs to the key of a picture: no batch, rank or row changes it."""
        shape, device = self.backbone.latent_shape, self.cfg.device
        _, (start,) = rtdmd.draw([rtdmd.key(k, "start") for k in keys], 0, 1, shape, device)
        steps = row["nfe"] - 1 if row["eta"] > 0 else 0
        _, noise = rtdmd.draw([rtdmd.key(k, "steps") for k in keys], 0, steps, shape, device)
        noise = noise if steps else start.new_zeros(row["nfe"], 1, *[1] * len(shape))
        cond, null = self.text.batch(prompts, device), self.text.batch([""], device)
        self.roles.guidance = row["guidance"]
        velocity = ((lambda x, t: self.roles.teacher(x, t, cond, null)) if row["role"] == "teacher" else
                    (lambda x, t: self.roles.velocity("generator", x, t, cond)))
        times = rtdmd.timestep_schedule(row["nfe"], self.backbone.shift_for(row["nfe"])).to(device)
        return self.backbone.decode(rtdmd.rollout(velocity, start, noise, times, row["eta"])[0][-1])

    def sample(self, name, row, prompts, flags):
        """This process's share of a row: indices, bytes (n, H, W, 3), seconds per image. Picture i shows prompts[i // per_prompt]."""
        self.wear(name)
        mine, parts, start = rtdmd.share(len(prompts) * flags.per_prompt), [], time.perf_counter()
        for rows in rtdmd.progress(rtdmd.chunks(len(mine), flags.batch), -(-len(mine) // flags.batch), name):
            texts = [prompts[i // flags.per_prompt] for i in mine[rows]]
            keys = [rtdmd.key("eval", self.cfg.seed, text, i % flags.per_prompt) for text, i in zip(texts, mine[rows])]
            parts.append(as_bytes(self.batch(row, texts, keys)).cpu())
        seconds = (time.perf_counter() - start) / max(1, len(mine))
        return mine, torch.cat(parts) if parts else torch.zeros(0, 3, 1, 1, dtype=torch.uint8), seconds

    def free(self):
        """Drops networks before the judges come: a reward model may need the room."""
        self.roles = self.backbone.nets = None
        free()


# ----------------------------------------------------------------------------------------------------------------------
# Scoring and reports
# ----------------------------------------------------------------------------------------------------------------------

def gathered(index, values):
    """Values of all processes in the order of the global index."""
    parts = [list(zip(index, values))]
    if torch.distributed.is_initialized():
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, list(zip(index, values)))
    return [value for _, value in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]


def load_scorers(names, cfg, backbone=None):
    """Yields (name, scorer), one loaded at a time."""
    own = getattr(backbone, "rewards", {})
    for name in names:
        scorer = own[name] if name in own else load_reward(name, cfg) if ":" in name else load_metric(name, cfg)
        yield name, scorer
        del scorer
        free()


def check_metrics(names, own):
    """Refuses unknown names before anything is sampled."""
    for name in names:
        if name not in own and name not in METRICS and ":" not in name:
            raise UsageError(f"--metrics: no metric is called {name!r}; there are {', '.join(dict.fromkeys([*own, *METRICS]))}, module:attribute.")


def score_rows(pictures, prompts, flags, cfg, backbone=None):
    """pictures {row: (index, bytes)} -> {row: {metric: list over all pictures}}, sentences on failures. Each scorer is loaded once."""
    names = [n for n in flags.metrics.split(",") if n not in ("distance", "diversity")]
    scores, failures = {row: {} for row in pictures}, []
    for name, scorer in load_scorers(names, cfg, backbone):
        for row, (index, images) in pictures.items():
            texts = [prompts[i // flags.per_prompt] for i in index]
            values, failed = run_metric(scorer, LazyImages(images), texts, batch=max(flags.batch, 16), device=cfg.device)
            failures += [f"{row}: {sentence}" for sentence in failed]
            for metric, mine in values.items():
                scores[row][metric] = gathered(index, mine)
    return scores, failures


class LazyImages:
    """Bytes (n, 3, H, W) or picture files, as floats in [0, 1] when asked for."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, i):
        item = self.source[i]
        if isinstance(item, Path):
            from PIL import Image
            item = torch.from_numpy(np.array(Image.open(item).convert("RGB"))).permute(2, 0, 1)
        return item.float() / 255


def summarise(scores, prompts, per_prompt, cfg):
    """{metric: (mean, standard error)} of one row."""
    result = {name: mean_and_error(values, per_prompt) for name, values in scores.items()}
    if "geneval" in scores:                                                  # the paper's number is a mean of task means
        rows = rows_of(cfg, ("tag", "prompt"))
        tasks = geneval_summary(scores["geneval"], [rows[p] for p in prompts for _ in range(per_prompt)])
        result.update({n: (value, result["geneval"][1] if n == "geneval" else math.nan) for n, value in tasks.items()})
    return result


def table(rows):
    """rows {name: {metric: (mean, error)}} as text, in the order and with the columns of the paper."""
    order = [*TINY_COLUMNS, *METRICS]
    metrics = sorted({m for row in rows.values() for m in row}, key=lambda m: (order.index(m) if m in order else len(order), m))
    head = [TINY_COLUMNS.get(m) or METRICS.get(m, {}).get("column", m) for m in metrics]
    lines = [["", *head]] + [[name, *(number(*row[m]) if m in row else "" for m in metrics)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))) for line in lines)


def number(mean, error):
    """A mean with its standard error."""
    return f"{mean:.4g}" if math.isnan(error) else f"{mean:.3f}+-{error:.3f}"


def write_report(out, rows, scores, facts):
    """OUT/report.json: rows and their errors, every score, and all that is needed to get the same numbers again."""
    versions = {n: importlib.metadata.version(n) for n in ("torch", "diffusers", "transformers", "open_clip_torch", "hpsv2")}
    report = dict(rows={n: {m: value for m, (value, _) in row.items()} for n, row in rows.items()},
                  errors={n: {m: error for m, (_, error) in row.items()} for n, row in rows.items()}, scores=scores, versions=versions,
                  scorers={m: {k: METRICS[m][k] for k in ("repo", "scale", "licence")} for m in METRICS if any(m in r for r in rows.values())},
                  **facts)
    rtdmd.write_atomic(Path(out) / "report.json", json.dumps(report, indent=1, default=str))


def evaluate(flags, cfg):
    """Samples the rows of a plan, scores them, writes report.json and grid.png."""
    names = flags.metrics.split(",")
    check_metrics(names, {"attributes", "strict", "heldout", "distance", "diversity"} if cfg.model == "tiny" else ())
    rows = plan(flags, cfg)
    prompts = rtdmd.read_prompts(cfg.prompts, cfg.seed)[:flags.max_prompts]
    sampler = Sampler(cfg, rows, prompts)
    pictures, seconds = {}, {}
    for name, row in rows.items():
        index, images, seconds[name] = sampler.sample(name, row, prompts, flags)
        pictures[name] = (index, images)
    backbone = sampler.backbone if cfg.model == "tiny" else sampler.free()
    scores, failures = score_rows(pictures, prompts, flags, cfg, backbone)
    results = {name: summarise(scores[name], prompts, flags.per_prompt, cfg) for name in rows}
    shown = [i for i in range(0, len(prompts) * flags.per_prompt, flags.per_prompt)][:12]
    panels = []
    for name, (index, images) in pictures.items():
        wanted = None if {"distance", "diversity"} & set(names) else set(shown)
        kept = [(i, image) for i, image in zip(index, images) if wanted is None or i in wanted]
        everything = gathered([i for i, _ in kept], [image for _, image in kept])
        if wanted is None:
            captions = [p for p in prompts for _ in range(flags.per_prompt)]
            results[name].update({m: v for m, v in tiny_set_metrics(backbone, torch.stack(everything).float() / 255, captions,
                                                                    flags.per_prompt).items() if m in names})
            everything = [everything[i] for i in shown]
        panels += everything
        results[name]["seconds_per_image"] = (seconds[name], math.nan)
    if rtdmd.dist_info()[0] == 0:
        rtdmd.save_grid(Path(flags.out) / "grid.png", torch.stack(panels).float() / 255, columns=len(shown))
        if flags.save_images:
            save_pictures(Path(flags.out) / "images", pictures, prompts, flags.per_prompt)
        facts = dict(model=cfg.model, prompts=prompts, per_prompt=flags.per_prompt, prompt_hash=f"{rtdmd.key(prompts):016x}", seed=cfg.seed,
                     sampler=rows, failures=failures, resolution=cfg.resolution)
        write_report(flags.out, results, scores, facts)
        print(table(results))
        print(f"{len(prompts)} prompts x {flags.per_prompt} pictures, set {facts['prompt_hash']}, seed {cfg.seed}; +- is one standard error. "
              f"Rows of {flags.out}/grid.png: {', '.join(rows)}.")
        for sentence in failures[:10]:
            print("not scored:", sentence)


def save_pictures(folder, pictures, prompts, per_prompt):
    """OUT/images/ROW/000000.png and metadata.jsonl, as --images reads them (this process's share)."""
    from PIL import Image
    for row, (index, images) in pictures.items():
        (folder / row).mkdir(parents=True, exist_ok=True)
        lines = []
        for i, image in zip(index, images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / row / f"{i:06d}.png")
            lines.append(json.dumps({"file_name": f"{i:06d}.png", "prompt": prompts[i // per_prompt]}) + "\n")
        rtdmd.write_atomic(folder / row / "metadata.jsonl", "".join(lines))


def read_folder(folder):
    """(files, prompts) of a folder of pictures: from metadata.jsonl, else from the names (a_red_cat.png)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"--images {folder} is not a folder.")
    if (folder / "metadata.jsonl").exists():
        rows = read_rows(folder / "metadata.jsonl", ("file_name", "prompt"))
        return [folder / row["file_name"] for row in rows], [row["prompt"] for row in rows]
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise UsageError(f"--images {folder} holds no .png, .jpg or .webp picture.")
    return files, [p.stem.replace("_", " ").strip() for p in files]


def score_folder(flags, cfg):
    """--images: scores pictures of any origin."""
    files, prompts = read_folder(flags.images)
    check_metrics(flags.metrics.split(","), ())
    missing = [str(f) for f in files if not f.exists()]
    if missing:
        raise UsageError(f"metadata.jsonl names {missing[0]}, which does not exist.")
    cfg.device = rtdmd.start_processes(cfg.device)
    flags.per_prompt, index = 1, rtdmd.share(len(files))
    name = Path(flags.images).name
    scores, failures = score_rows({name: (index, [files[i] for i in index])}, prompts, flags, cfg)
    results = {name: summarise(scores[name], prompts, 1, cfg)}
    if rtdmd.dist_info()[0] == 0:
        write_report(flags.out, results, scores, dict(images=[str(f) for f in files], prompts=prompts, per_prompt=1, failures=failures))
        print(table(results))
        for sentence in failures[:10]:
            print("not scored:", sentence)


def compare(paths):
    """--compare A B: B - A for every row and metric that both have, with standard errors over the pictures they share."""
    try:
        a, b = (json.loads(Path(path).read_text()) for path in paths)
    except (OSError, ValueError) as error:
        raise UsageError(f"--compare {' '.join(paths)}: {error}; give two report.json of eval.py.") from None
    if a["prompts"] != b["prompts"] or a["per_prompt"] != b["per_prompt"]:
        raise UsageError(f"--compare {' '.join(paths)}: the reports are of different prompts, so their scores cannot be paired.")
    rows = [r for r in a["scores"] if r in b["scores"]] or [None]
    pairs = [(r, r) for r in rows] if rows != [None] else [(next(iter(a["scores"])), next(iter(b["scores"])))]
    results = {}
    for left, right in pairs:
        mine, theirs = a["scores"][left], b["scores"][right]
        results[right if left == right else f"{right} - {left}"] = {
            m: mean_and_error([y - x for x, y in zip(mine[m], theirs[m])], a["per_prompt"]) for m in mine if m in theirs}
    print(table(results))


def one_picture(flags, cfg):
    """--prompt: OUT/prompt.png."""
    row = next(reversed(plan(flags, cfg).items()))
    sampler = Sampler(cfg, dict([row]), [flags.prompt])
    sampler.wear(row[0])
    image = sampler.batch(row[1], [flags.prompt], [rtdmd.key("eval", cfg.seed, flags.prompt, 0)])
    rtdmd.save_grid(Path(flags.out) / "prompt.png", image, columns=1)
    print(f"{flags.out}/prompt.png: {flags.prompt}")


# ----------------------------------------------------------------------------------------------------------------------
# What training costs (rtdmd.py --dry_run)
# ----------------------------------------------------------------------------------------------------------------------

class CostMeter(TorchDispatchMode):
    """What happens inside a block of a training iteration, added to run.costs[name].

    Of the first iteration: forwards by role; FLOPs of the transformers ("network"), of the VAE's decoder and of each
    reward, by torch's formulas (a product of (n, m) and (m, k) is 2 n m k, all else nothing); and the peak of bytes
    beside the weights: what an operation makes lives until its last reference is gone, as in the allocator of a GPU.
    Of the others, or of the first if it is alone: seconds. On `meta` nothing is computed, so that full-size networks can
    be counted on a laptop. What a fused attention kernel recomputes in its backward pass is not counted.
    """

    def __init__(self, run, name):
        super().__init__()
        if not hasattr(run, "costs"):
            start_counting(run)
        self.run, self.counts, self.kind = run, run.done == 0, torch.device(run.device).type
        self.cost = run.costs.setdefault(name, dict(seconds=0.0, tflop={}, peak_bytes=0, forwards={}))

    def __enter__(self):
        if self.counts:
            super().__enter__()
            self.run.live["peak"] = self.run.live["now"]
            if self.kind == "meta":
                F.scaled_dot_product_attention, F.rms_norm = fused_attention, fused_norm
        if self.kind == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.before, self.start = dict(self.run.forwards), time.perf_counter()
        return self

    def __exit__(self, *error):
        if self.kind == "cuda":
            torch.cuda.synchronize()
            self.run.live["peak"] = torch.cuda.max_memory_allocated() - self.run.standing_bytes
        if self.run.done == 1:                                               # the first iteration was for counting
            self.cost["seconds"] = 0.0
        self.cost["seconds"] += time.perf_counter() - self.start
        self.cost["peak_bytes"] = max(self.cost["peak_bytes"], self.run.live["peak"])
        if self.counts:
            F.scaled_dot_product_attention, F.rms_norm = PLAIN_ATTENTION, PLAIN_NORM
            super().__exit__(*error)
            grown = {n: c - self.before.get(n, 0) for n, c in self.run.forwards.items()}
            self.cost["forwards"] = {n: c for n, c in grown.items() if c}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, live = kwargs or {}, self.run.live
        result = (shapes_only if self.kind == "meta" else call)(operation, args, kwargs)
        if operation.overloadpacket in flop_registry:
            flop = flop_registry[operation.overloadpacket](*args, **kwargs, out_val=result)
            if re.search("attention.*backward", str(operation)):             # 1 of its 5 products is a recomputation
                flop = flop * 4 / 5
            self.cost["tflop"][self.run.part] = self.cost["tflop"].get(self.run.part, 0.0) + flop / 1e12
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.kind:
                storage = tensor.untyped_storage()
                if storage._cdata not in live["held"]:
                    live["held"].add(storage._cdata)
                    live["now"] += storage.nbytes()
                    live["peak"] = max(live["peak"], live["now"])
                    weakref.finalize(storage, released, live, storage._cdata, storage.nbytes())
        return result


def released(live, name, size):
    """A storage is gone."""
    live["held"].discard(name)
    live["now"] -= size


def call(operation, args, kwargs):
    """An operation where it is computed."""
    return operation(*args, **kwargs)


KNOWN_SHAPES = {}


def shapes_only(operation, args, kwargs):
    """An operation on `meta`. torch takes .2 ms to tell the shape of a result, so it is asked once for each kind of
    input; always where the result may share memory with an input (views, in-place operations)."""
    schema = operation._schema
    if any(a.alias_info for a in [*schema.arguments, *schema.returns]):
        return operation(*args, **kwargs)
    leaves = ((a.shape, a.stride(), a.dtype, a.device) if isinstance(a, torch.Tensor) else a
              for a in tree_leaves((args, kwargs)))
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
    """Attention on `meta` as a GPU computes it, by a kernel that keeps no matrix of attention weights."""
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


def networks(run):
    """{"network": [...], "decoder": [...], name of a reward: [...]}: the modules that stand in memory."""
    parts = {"network": list(dict.fromkeys(run.roles.nets.values()))}
    if hasattr(run.backbone, "vae"):
        parts["decoder"] = [run.backbone.vae]
    for name, (reward, _) in run.rewards.items():
        parts[name] = [m for m in getattr(reward, "__dict__", {}).values() if isinstance(m, nn.Module)]
    return parts


def start_counting(run):
    """Prepares the run: Adam's moments exist from the start, as from the second iteration on, and hooks tell which part
    is at work: the last one whose layer was entered, in a forward or a backward pass."""
    run.costs, run.forwards, run.part, run.live = {}, {}, "network", dict(now=0, peak=0, held=set())
    for role, optimizer in run.optimizers.items():
        for p in run.roles.parameters(role):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def watch(module, part, counted):
        def enter(module, args, kwargs):
            run.part = part
            if counted:
                name = run.roles.active if part == "network" else part
                name += " with gradient" if torch.is_grad_enabled() else ""
                first = args[0] if args else kwargs["hidden_states"]
                run.forwards[name] = run.forwards.get(name, 0) + len(first)

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_full_backward_pre_hook(lambda *_: setattr(run, "part", part))

    for part, nets in networks(run).items():
        if part == "network":
            layers = nets
        elif part == "decoder":
            layers = [nets[0].decoder]
        else:                                                                # the first convolution sees the images
            layers = [m for net in nets for m in net.modules() if any(True for _ in m.parameters(recurse=False))]
            layers = sorted(layers, key=lambda m: not isinstance(m, nn.Conv2d))
        for i, layer in enumerate(layers):
            watch(layer, part, counted=part == "network" or i == 0)
        tensors = [t for net in nets for t in [*net.parameters(), *net.buffers()]]
        run.live["held"].update(t.untyped_storage()._cdata for t in tensors)
    standing = [*run.ema, *(m for o in run.optimizers.values() for state in o.state.values() for m in state.values())]
    run.live["held"].update(t.untyped_storage()._cdata for t in standing)     # in the table they stand beside the peak
    run.standing_bytes = torch.cuda.memory_allocated() if "cuda" in run.device else 0


CLIP_SIZES = {"hpsv2": "ViT-H-14", "clipscore": "ViT-L-14", "pickscore": "ViT-H-14"}


def random_reward(name, cfg):
    """A CLIP reward of full size with random weights (--random_weights): its cost without its download."""
    import open_clip
    with torch.device(cfg.device):
        net = open_clip.create_model(CLIP_SIZES[name], device=cfg.device)
    tokenise = open_clip.get_tokenizer(CLIP_SIZES[name])
    embed_text = lambda prompts: net.encode_text(tokenise(prompts).to(cfg.device))
    return rtdmd.ClipReward(name, REWARDS[name], (net, net.encode_image, embed_text))


def matrix_rate(device, n=8192, repeats=20):
    """TFLOP/s of bf16 products of two n x n matrices: what the chip can do at best."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for i in range(repeats + 3):
        if i == 3:                                                           # warm
            torch.cuda.synchronize()
            start = time.perf_counter()
        a @ a
    torch.cuda.synchronize()
    return 2 * n**3 * repeats / (time.perf_counter() - start) / 1e12


def standing_weights(run):
    """Bytes that stay in memory, by what they are."""
    lora = sum(p.nbytes for role in run.optimizers for p in run.roles.parameters(role))
    sizes = {}
    for part, nets in networks(run).items():
        tensors = [t for net in nets for t in [*net.parameters(), *net.buffers()]]
        sizes[part] = sum({t.untyped_storage()._cdata: t.nbytes for t in tensors}.values())
    sizes["network"] -= lora
    return dict(sizes, adapters=lora, adam=2 * lora, ema=lora // 2)


def report_costs(run):
    """The table of --dry_run, and OUT/stageN/dry_run.json."""
    cfg, timed = run.cfg, max(1, run.cfg.dry_run - 1)
    samples = (cfg.batch if cfg.stage == 1 else cfg.groups * cfg.group_size) / rtdmd.dist_info()[2]
    phases = {name: dict(seconds=c["seconds"] / timed, tflop_per_sample=sum(c["tflop"].values()) / samples,
                         tflop_by_part={n: f / samples for n, f in c["tflop"].items()}, peak_bytes=c["peak_bytes"],
                         forwards={n: f / samples for n, f in c["forwards"].items()}) for name, c in run.costs.items()}
    total = {n: sum(p[n] for p in phases.values()) for n in ("seconds", "tflop_per_sample")}
    for field in ("tflop_by_part", "forwards"):
        names = dict.fromkeys(n for p in phases.values() for n in p[field])
        total[field] = {n: sum(p[field].get(n, 0) for p in phases.values()) for n in names}
    weights, live = standing_weights(run), max(p["peak_bytes"] for p in phases.values())
    total.update(peak_bytes=sum(weights.values()) + live, weight_bytes=sum(weights.values()))
    rtdmd.log("\n".join(cost_lines(run, phases, total, weights, samples)))
    result = dict(total, bytes=weights, phases=phases, samples=samples, config=dataclasses.asdict(cfg))
    if rtdmd.dist_info()[0] == 0:
        rtdmd.write_atomic(run.folder / "dry_run.json", json.dumps(result, indent=1))


def cost_lines(run, phases, total, weights, samples):
    """The table as lines of text. Where nothing was computed there are no seconds."""
    words = lambda numbers: ", ".join(f"{value:.3g} {name}" for name, value in numbers.items())
    yield f"{'phase':10} {'TFLOP':>7} {'peak GB':>8} {'seconds':>8} {'share':>6} {'TFLOP/s':>8}   TFLOP a sample, of"
    live = max(p["peak_bytes"] for p in phases.values())
    for name, p in [*phases.items(), ("all", dict(total, peak_bytes=live))]:
        rate = p["tflop_per_sample"] * samples / max(p["seconds"], 1e-9)
        times = f"{p['seconds']:8.3g} {p['seconds'] / total['seconds']:6.0%} {rate:8.3g}" if run.device != "meta" else 24 * " "
        yield f"{name:10} {p['tflop_per_sample']:7.4g} {p['peak_bytes'] / 1e9:8.3g} {times}   {words(p['tflop_by_part'])}"
    for name, p in phases.items():
        yield f"Forwards a sample, {name}: {words(p['forwards'])}."
    if run.device != "meta":
        hours = total["seconds"] * run.cfg.iterations / 3600
        yield (f"One iteration, {samples:g} samples a process: {total['seconds']:.3g} s, "
               f"{samples / total['seconds']:.3g} samples/s; {run.cfg.iterations} iterations: {hours:.3g} h.")
    if "cuda" in run.device:
        yield f"Products of large bf16 matrices in the same process: {matrix_rate(run.device):.3g} TFLOP/s."
    yield (f"Weights GB: {words({n: size / 1e9 for n, size in weights.items()})}; with the highest peak "
           f"{total['peak_bytes'] / 1e9:.3g} GB ({'allocator' if 'cuda' in run.device else 'counted, not measured'}).")


# ----------------------------------------------------------------------------------------------------------------------
# The paper's questions, asked on the tiny world (bash train.sh ablations)
# ----------------------------------------------------------------------------------------------------------------------

# question: {row: flags}. Rows of stage 2 start from the stage-1 student BASE of their seed.
BASE = "base (gamma .01)"
STAGE1_ROWS = {
    "Table 3: the consistency term": {BASE: "", "gamma 0 (A-DMD)": "--gamma 0", "gamma .1": "--gamma .1",
                                      "gamma 1": "--gamma 1", "gamma 1, kernel cps": "--gamma 1 --kernel cps",
                                      "gamma 1, App. F's times": "--gamma 1 --consistency_times schedule"},
    "Figure 5: randomness of the sampler": {"eta 0": "--eta 0", "eta .5": "--eta .5", "eta .8": "--eta .8", "eta 1": "--eta 1",
                                            "eta 1, DMD2's re-noising": "--eta 1 --renoise dmd2"},
    "DEPARTURE 1: the re-noising std": {"the paper's (t-s)/(1-s)": "--renoise paper"},
    "A fake score that lags (1 update at lr 3e-4)": {"gamma 0": "--fake_updates 1 --lr_fake 3e-4 --gamma 0",
                                                     "gamma .01": "--fake_updates 1 --lr_fake 3e-4",
                                                     "gamma 1": "--fake_updates 1 --lr_fake 3e-4 --gamma 1"},
}
STAGE2_ROWS = {
    "Table 4: the hybrid policy gradient": {"DM only": "--no_policy --no_det", "naive GRPO": "--subset_size 3 --no_det",
                                            "SubGRPO M=1": "--subset_size 1 --no_det", "SubGRPO M=2": "--no_det",
                                            "pathwise only": "--no_policy", "base (SubGRPO M=2 + pathwise)": "",
                                            "SubGRPO M=1 + pathwise": "--subset_size 1", "base without DM": "--no_dmd"},
    "Table 5: a reward without gradient": {"strict, DM only": "--rewards strict=1 --no_policy",
                                           "strict, naive GRPO": "--rewards strict=1 --subset_size 3",
                                           "strict, SubGRPO M=2": "--rewards strict=1"},
    "Departures 7, 12, 13": {"log-prob as released": "--log_prob unscaled --no_det", "std over all prompts": "--advantage_std global",
                             "no std (leave one out)": "--advantage_std none", "shared x_{t_0}": "--share_initial",
                             "independent noise outside S": "--independent_noise", "DM at the last step only": "--dm_steps last"},
}


def ablations(flags, cfg):
    """Trains and evaluates every row above for every seed, and prints mean and standard error over seeds.

    A row that is done is not done again: stop it whenever you like. OUT/NAME.json has one result, OUT/table.md all.
    """
    out = Path(flags.out if flags.out != "runs/eval" else "runs/ablations")
    seeds = range(flags.seeds)
    questions = [(1, *question) for question in STAGE1_ROWS.items()] + [(2, *question) for question in STAGE2_ROWS.items()]
    jobs = [(stage, row, options, seed) for seed in seeds for stage, _, rows in questions for row, options in rows.items()]
    jobs = [job for job in jobs if not flags.only or flags.only in f"stage {job[0]}: {job[1]}" or job[:2] == (1, BASE)]
    for job in rtdmd.progress(jobs, len(jobs), "ablations"):
        if not result_of(out, job[0], job[1], job[3]).exists():
            ablation(out, cfg, *job)
    tables = [f"### {name}\n\n{ablation_table(out, stage, rows, seeds)}" for stage, name, rows in questions]
    rtdmd.write_atomic(out / "table.md", "\n\n".join(tables) + "\n")
    print("\n\n".join(tables))


def result_of(out, stage, row, seed):
    """The file of one row's result; its folder has the same name without .json."""
    return out / (re.sub(r"[^a-z0-9.]+", "_", f"stage{stage} {row} {seed}".lower()) + ".json")


def ablation(out, cfg, stage, row, options, seed):
    """One row for one seed: trains it, evaluates it, writes its result."""
    target = result_of(out, stage, row, seed)
    folder, world = target.with_suffix(""), ["--cache", cfg.cache, "--tiny_steps", str(cfg.tiny_steps), "--device", cfg.device]
    command = [sys.executable, rtdmd.__file__, "--stage", str(stage), "--out", str(folder), "--seed", str(seed), "--keep", "1",
               "--sample_every", "100000", *world, *options.split()]
    if stage == 2:
        command += ["--init", str(result_of(out, 1, BASE, seed).with_suffix("") / "stage1")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"The ablation {row!r} failed: {done.stderr.strip().splitlines()[-1]}")
    with contextlib.redirect_stdout(io.StringIO()):
        main(["--lora", str(folder / f"stage{stage}"), "--out", str(folder), *world])
    row, = json.loads((folder / "report.json").read_text())["rows"].values()
    rtdmd.write_atomic(target, json.dumps(row))


def ablation_table(out, stage, rows, seeds):
    """Markdown: mean +- standard error over the seeds that are done."""
    columns = DEFAULT_METRICS["tiny"].split(",")
    lines = ["| | seeds | " + " | ".join(TINY_COLUMNS[m] for m in columns) + " |", "|---|" + "---|" * (len(columns) + 1)]
    for row in rows:
        files = [result_of(out, stage, row, seed) for seed in seeds]
        results = [json.loads(file.read_text()) for file in files if file.exists()]
        cells = [number(*mean_and_error([r[m] for r in results], 1)) if results else "" for m in columns]
        lines.append(f"| {row} | {len(results)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None):
    """Samples, scores, compares or ablates, as the flags say."""
    try:
        flags, cfg = parse(argv)
        if flags.ablations:
            ablations(flags, cfg)
        elif flags.compare:
            compare(flags.compare)
        elif flags.images:
            score_folder(flags, cfg)
        elif flags.prompt:
            one_picture(flags, cfg)
        else:
            evaluate(flags, cfg)
    except UsageError as error:
        print(f"eval: {error}", file=sys.stderr)
        sys.exit(error.code)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
