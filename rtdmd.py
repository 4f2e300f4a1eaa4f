"""RTDMD in one file: a 50-step text-to-image flow model becomes a 4-step one, then is pushed towards human preference.

Stage 1 distils (AC-DMD): the generator's noisy boundary states are matched to the teacher's, on every sub-interval.
Stage 2 reinforces (hybrid policy gradient): SubGRPO on the stochastic steps, reward back-propagation through the last,
deterministic one, distribution matching as the leash. After "Reinforcing Few-step Generators via Reward-Tilted
Distribution Matching"; read it beside the paper, section by section. Not a framework: copy what you need.

    laptop      bash train.sh                                       # the tiny world: both stages, a table, a picture
    1 GPU       python rtdmd.py --stage 1 --model sd3m --micro_batch 2
    8 GPUs      torchrun --nproc_per_node 8 rtdmd.py --stage 1 --model sd3m                # then --stage 2, same --out
    2 nodes     NNODES=2 NODE_RANK=0 MASTER_ADDR=host bash train.sh sd3m 8            # on the other node NODE_RANK=1
    no weights  python rtdmd.py --stage 1 --model sd3m --random_weights --dry_run 1    # will it fit, how fast will it be

Map      2.1 flow algebra             x0_from_velocity, eps_from_velocity, score_from_velocity
         App. C sampler               timestep_schedule, cps_mean_std, rollout, CPSScheduler
         3.1, B, D, E, F AC-DMD       renoise*, ambient_*, reverse_step, consistency_loss, boundary_mean, dmd_loss
         3.2, G, H policy gradient    choose_steps, group_noise, gaussian_log_prob, group_advantages, subgrpo_loss,
                                      pathwise_loss
         App. I Algorithm 1           stage1, stage2

Symbols  theta generator | psi frozen teacher, with guidance w | phi fake score | steps k = 1..K | t_k noise level
         (t_0 = 1, t_K = 0)
         x_s boundary state, s = t_k | t in [s, 1] the level it is re-noised to | a, kappa signal and noise of that
         v = E[eps - x_0 | x_t] | h(x, t) = x - t v x-prediction | S chosen stochastic steps, |S| = M | N group size
         A advantage | beta reward strength: the target is p_psi exp(beta r) / Z (Eq. 6), so the gradient is the
         distribution matching (DM) term minus beta times the gradient of the expected reward (Eq. 7). In practice DM
         is divided by its own size and a reward by its std: beta is a relative weight, not that exponent

DEPARTURES from the paper and from its released code. Those that are mathematics have a test that shows
them in numbers.
 1. Re-noising std is kappa = sqrt(t^2 - a^2 s^2). The paper's (t-s)/(1-s) (Eq. 8, App. B) adds standard deviations,
    which is right only if the new noise is the old one: at s = .5, t = .7 its noise has variance .25 where the teacher
    expects .49. --renoise paper has it. (The released code does as we do.)
 2. So the self-consistency of App. E holds for noisy x_s too: h is a martingale iff kappa^2 = t^2 - a^2 s^2. (The
    display in App. E conditions on x_t' where x_t'' is meant.)
 3. The reverse kernel of Eqs. 11 and 22 is the Gaussian posterior: with the true score the loss vanishes like
    (t' - t'')^4. With a fixed eta = .9 (released; --kernel cps) it stays, and pulls the fake score off the truth.
 4. t' is the re-noising time and t'' lies within --delta below it and above s, "close" as 3.1 asks. App. F's
    t'' = t_{k+1} (--consistency_times schedule) is outside [t_k, 1], where states of step k never train it.
 5. The fake loss is in velocity form, divided by the variance of its target: Eq. 5 at s = 0, of order one everywhere
    else, at t = s and t = 1 too. The released weight min(1, 10 kappa^2) is not Eq. 5 at s = 0.
 6. The generator's gradient is the difference of the boundary means E[x_s | x_t] under the two scores, over the mean
    distance from x_s to the teacher's: Eq. 9 with a positive weight. The released code puts one noise sample into
    both means and so into the normaliser, which mutes the early steps.
 7. log pi is the exact Gaussian log-density, averaged over dimensions. The released code drops 1 / (2 std^2): its
    ratio is no likelihood ratio, and its steps are weighted by their variance (--log_prob unscaled).
 8. The ratio is exactly 1 in the first update of a rollout: old and new log-probability come from one forward. A
    second forward in bf16 differs by more than the clip of 1e-5.
 9. (K-1)/M of Eq. 17 is kept; the released code has no such factor.
10. S is drawn for every prompt, as Algorithm 1 says; the released code draws one per iteration.
11. Eqs. 15 and 17 share units. Each reward is divided by the same std in both, and all of Eq. 18 is a mean over
    dimensions. Otherwise the two reward terms change their balance with resolution and with each reward's unit.
12. Unscaled advantages (--advantage_std none) compare with the mean of the others (N/(N-1)): a mean that contains r_i
    makes the stochastic term short by (N-1)/N against the pathwise one. Scaled ones follow App. H, that flaw included,
    and have a floor under the std, or a group without differences becomes noise.
13. Distribution matching in stage 2 acts on all steps in equal parts, at no extra generator forward, and the fake
    score trains on all boundary states. The released code does both at the last step only (--dm_steps last).
14. Adapters, gradients, Adam and EMA are fp32: a step of 1e-6 does not exist in bf16. Stage 2 goes on with stage 1's
    adapters (averaged generator, raw fake score) instead of merging them and starting others.
15. Three roles, one frozen base: generator and fake score are two adapters on it, the teacher is it without any.
16. k is stratified: each iteration trains every step on an equal share of its samples.
17. Levels are drawn inside (s, 1), not clamped into it. Clamping t at .98 (released) puts 62 % of FLUX.2's
    first-step draws on that single level.
18. One fake score serves all k, here and in the released code: at t it learns the mixture of the step-k laws with
    t_k < t, which is each p^(k) of Eq. 9 only where they agree. Conditioning it on k would remove this.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn


class UsageError(Exception):
    """Bad input or a hopeless run. One sentence that says what to do: main prints it and exits with `code`."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


# ----------------------------------------------------------------------------------------------------------------------
# 1. Configuration. One typed place; every default says its unit and where it comes from.
# ----------------------------------------------------------------------------------------------------------------------

def opt(default, help, choices=None):
    """A dataclass field whose help text and admissible values the command line reads."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices))


@dataclasses.dataclass
class Config:
    """Every setting: type, default, unit and source. The command line is made from it, and nothing else has defaults."""

    # ---- What to run
    stage: int = opt(1, "1 distils (AC-DMD), 2 reinforces (hybrid policy gradient)", (1, 2))
    model: str = opt("tiny", "backbone: tiny, sd3m, sd35m, flux2-4b, flux2-9b")
    recipe: str = opt("paper", "named set of differences from these defaults: paper, official")
    out: str = opt("runs/MODEL", "run folder; stage 1 and stage 2 share it")
    init: str = opt("", "stage 2: checkpoint of stage 1 to start from (default: the newest under --out)")
    iterations: int = opt(0, "generator updates; 0: the stage's own number (paper 4.1: 1500, then 1000)")
    seed: int = opt(0, "the only source of randomness")
    device: str = opt("", "cuda, cpu or meta (counting only); default: cuda if there is one")
    prompts: str = opt("pickapic", "file (.txt .jsonl .csv .tsv .parquet) or pickapic, drawbench, partiprompts, hpdv2")
    max_prompts: int = opt(25000, "prompts taken from the set: their text embeddings go to disk, 2 to 8 MB each")
    cache: str = opt("runs/cache", "text embeddings and the tiny world's teacher, shared by all runs")
    # ---- Network
    pretrained: str = opt("", "local folder or hub id instead of the model's own; FLUX.2: GENERATOR,TEACHER")
    random_weights: bool = opt(False, "full-size network without any download: will it fit, how fast is it")
    weights_dir: str = opt("", "folder searched for reward checkpoints before the hub (offline clusters)")
    resolution: int = opt(512, "pixels, width and height (paper 4.1; its Table 1 uses 1024)")
    text_length: int = opt(0, "tokens of the long text encoder; 0: the stock pipeline's (SD3 256, FLUX.2 512)")
    guidance: float = opt(1.0, "w of the teacher; the model's own: 7, 4.5, 4 (released), tiny 1.5")
    dtype: str = opt("", "of the frozen network; default: bf16 on cuda, fp32 on cpu", ("", "bf16", "fp32"))
    lora_rank: int = opt(64, "r (paper 4.1)")
    lora_alpha: int = opt(32, "alpha (paper 4.1): the update is scaled by alpha / r")
    checkpointing: bool = opt(False, "recompute the network's activations in the backward pass: less memory, slower")
    no_vae_checkpointing: bool = opt(False, "keep the VAE decoder's activations in the pathwise term: faster, gigabytes")
    compile: bool = opt(False, "torch.compile the network (worth it on a GPU, after some minutes of compilation)")
    # ---- Sampler (App. C)
    steps: int = opt(4, "K (paper 3.1)")
    eta: float = opt(0.9, "CPS randomness: 0 Euler ODE, 1 consistency sampler (paper 4.1, App. K)")
    # ---- AC-DMD (3.1)
    gamma: float = opt(0.01, "weight of the consistency term in Eq. 12 (paper 4.1); 0 is A-DMD")
    kernel: str = opt("posterior", "reverse kernel of Eq. 11; cps: fixed eta, as released", ("posterior", "cps"))
    consistency_times: str = opt("local", "t'' within delta of t'; schedule: App. F's t_{k+1}", ("local", "schedule"))
    delta: float = opt(0.1, "largest t' - t'' of the consistency term, in noise level (ours; released: 0.2)")
    renoise: str = opt("markov", "std of Eq. 8: sqrt(t^2 - a^2 s^2); paper prints (t-s)/(1-s); dmd2 re-noises "
                       "the x-prediction over [0, 1] (App. K)", ("markov", "paper", "dmd2"))
    batch: int = opt(72, "boundary states per update, over all processes (released: 9 x 8 GPUs)")
    fake_updates: int = opt(0, "fake updates per generator update; 0: the stage's own (released: 10, then 1)")
    # ---- Hybrid policy gradient (3.2)
    rewards: str = opt("hpsv2=1,clipscore=1", "name=weight,... ; module:attribute=weight for your own (paper 4.1)")
    groups: int = opt(48, "prompts per iteration, over all processes (paper 4.1)")
    group_size: int = opt(24, "N, trajectories per prompt (paper 4.1)")
    subset_size: int = opt(2, "M, size of S (paper 4.3); K-1 is naive GRPO")
    independent_noise: bool = opt(False, "ablation: no shared noise outside S (Eq. 16 off)")
    share_initial: bool = opt(False, "share x_{t_0} in a group too (the paper does not say; released: no)")
    beta: float = opt(1.0, "reward strength, Eq. 6 (App. J)")
    policy_weight: float = opt(1.0, "weight of Eq. 17 inside Eq. 18")
    det_weight: float = opt(1.0, "weight of Eq. 15 inside Eq. 18")
    dm_weight: float = opt(1.0, "weight of the distribution matching term inside Eq. 18")
    no_policy: bool = opt(False, "ablation: no stochastic term")
    no_det: bool = opt(False, "ablation: no pathwise term")
    no_dmd: bool = opt(False, "ablation: no distribution matching in stage 2")
    advantage_std: str = opt("group", "divide rewards by their std over the group, over all, or not at all",
                             ("group", "global", "none"))
    std_floor: float = opt(1e-4, "least std that a reward is divided by, in its own units (ours)")
    clip: float = opt(1e-5, "PPO clip on the ratio of mean-over-dimension likelihoods (App. J)")
    log_prob: str = opt("exact", "unscaled drops 1 / (2 std^2), as released", ("exact", "unscaled"))
    dm_steps: str = opt("all", "steps k of stage 2's matching term and fake score; last: as released", ("all", "last"))
    inner_epochs: int = opt(1, "generator updates per rollout; the ratio is exactly 1 in the first")
    # ---- Optimisation (App. J)
    lr: float = opt(0.0, "generator; 0: the stage's own (3e-5 or 1e-6, then 3e-6)")
    lr_fake: float = opt(0.0, "fake score; 0: the stage's own (3e-5; FLUX.2 1e-6)")
    weight_decay: float = opt(0.0, "AdamW's, generator (released stage 2: 1e-4)")
    grad_clip: float = opt(1.0, "gradient norm, per adapter (released)")
    ema: float = opt(0.95, "decay per generator update of the exported weights (ours; released: .904, then .81)")
    micro_batch: int = opt(1, "samples per pass with gradient, per process: the memory knob, changes nothing else")
    max_bad_steps: int = opt(5, "stop after so many non-finite updates in a row")
    # ---- Records
    save_every: int = opt(50, "generator updates between checkpoints")
    keep: int = opt(2, "checkpoints kept")
    sample_every: int = opt(25, "generator updates between fixed-seed panels")
    watch: str = opt("", "rewards that are only looked at, on the panel (reward hacking shows there first)")
    force_resume: bool = opt(False, "resume although settings that change the result have changed")
    dry_run: int = opt(0, "N: run N iterations, print cost per phase, keep nothing")
    tiny_steps: int = opt(2000, "updates that train the tiny world's teacher")


# Differences from the defaults above. Numbers under 1 and 2 hold for that stage only.
STAGES = {1: dict(iterations=1500, lr=3e-5, lr_fake=3e-5, fake_updates=10),                      # paper 4.1, App. J
          2: dict(iterations=1000, lr=3e-6, lr_fake=3e-5, fake_updates=1)}                      # released: 10:1, 1:1
MODELS = {
    "tiny": {"prompts": "tiny", "resolution": 12, "guidance": 1.5, "micro_batch": 48, "rewards": "attributes=1",
             "watch": "heldout", "lora_rank": 32, "lora_alpha": 16, "ema": 0.97, "std_floor": 0.05,
             1: dict(iterations=150, lr=1e-3, lr_fake=1e-3, fake_updates=3, batch=48),
             # The DM gradient is divided by its own size, so its weight against the reward is a matter of taste
             # (a GPU budget in the paper). On 432 dimensions det_weight 1 would leave 50 updates without effect.
             2: dict(iterations=50, lr=1e-3, lr_fake=1e-3, fake_updates=2, groups=4, group_size=12, det_weight=10.0)},
    "sd3m": {"guidance": 7.0},
    "sd35m": {"guidance": 4.5, "rewards": "hpsv2=1,clipscore=1,pickscore=1"},                              # paper 4.3
    "flux2-4b": {"guidance": 4.0, "rewards": "hpsv2=1,clipscore=1,pickscore=1,geneval=1",
                 1: dict(lr=1e-6, lr_fake=1e-6), 2: dict(lr_fake=1e-6, groups=64)},                # App. J, paper 4.1
    "flux2-9b": {"guidance": 4.0, "rewards": "hpsv2=1,clipscore=1,pickscore=1,geneval=1",
                 1: dict(lr=1e-6, lr_fake=1e-6), 2: dict(lr_fake=1e-6, groups=64)},
}
RECIPES = {
    "paper": {},
    # The constants of the released code that have a flag here. Not reproduced: its raw pathwise scale (1e-4 per unit of
    # reward, so that PickScore counts four times), its fake weight min(1, 10 kappa^2), its clamps, bf16 adapters.
    "official": {"lora_rank": 32, "lora_alpha": 64, "kernel": "cps", "delta": 0.2, "ema": 0.904,
                 2: dict(advantage_std="global", log_prob="unscaled", dm_steps="last", weight_decay=1e-4, dm_weight=1e-3,
                         policy_weight=2 / 3, ema=0.81)},
}


def resolve(flags):
    """Config from the flags that were given: default < STAGES < MODELS < RECIPES < flag. Raises UsageError."""
    stage, model, recipe = (flags.get(n, getattr(Config, n)) for n in ("stage", "model", "recipe"))
    for kind, name, table in (("model", model, MODELS), ("recipe", recipe, RECIPES), ("stage", stage, STAGES)):
        if name not in table:
            raise UsageError(f"--{kind} {name} is unknown: take one of {', '.join(map(str, table))}.")
    values = dict(STAGES[stage])
    for row in (MODELS[model], RECIPES[recipe]):
        values.update({n: v for n, v in row.items() if isinstance(n, str)}, **row.get(stage, {}))
    given = {n: v for n, v in flags.items() if v != 0 or n not in STAGES[stage]}         # there 0 means the stage's own
    cfg = Config(**{**values, "out": f"runs/{model}", **given})
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cfg.dtype = cfg.dtype or ("fp32" if cfg.device == "cpu" else "bf16")
    check(cfg)
    return cfg


def check(cfg):
    """Contradictions and values out of range, before anything is loaded. Raises UsageError."""
    least = dict(iterations=1, batch=1, groups=1, micro_batch=1, steps=2, lora_rank=1, lora_alpha=1, keep=1,
                 save_every=1, sample_every=1, fake_updates=1, inner_epochs=1, max_bad_steps=1, max_prompts=1,
                 group_size=2, tiny_steps=1, resolution=8, dry_run=0, seed=0, gamma=0, beta=0,
                 policy_weight=0, det_weight=0, dm_weight=0,
                 guidance=0, weight_decay=0, text_length=0, std_floor=0)
    for field in dataclasses.fields(cfg):
        value, choices = getattr(cfg, field.name), field.metadata["choices"]
        if choices and value not in choices:
            raise UsageError(f"--{field.name} {value!r}: take one of {', '.join(repr(c) for c in choices if c != '')}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{field.name} must be a finite number, not {value}.")
        if field.name in least and value < least[field.name]:
            raise UsageError(f"--{field.name} must be at least {least[field.name]}, not {value}.")
    for name in ("lr", "lr_fake", "grad_clip", "clip", "delta"):
        if getattr(cfg, name) <= 0:
            raise UsageError(f"--{name} must be positive, not {getattr(cfg, name)}.")
    for name, top in (("eta", 1.0), ("ema", 1.0), ("delta", 1.0)):
        if not 0 <= getattr(cfg, name) <= top:
            raise UsageError(f"--{name} must lie in [0, {top:g}], not {getattr(cfg, name)}.")
    if cfg.renoise == "dmd2" and cfg.consistency_times == "schedule":
        raise UsageError("--consistency_times schedule has no meaning with --renoise dmd2, whose level is 0: take local.")
    if cfg.stage == 2 and not 1 <= cfg.subset_size <= cfg.steps - 1:
        raise UsageError(f"--subset_size must lie in 1..{cfg.steps - 1} (the stochastic steps), not {cfg.subset_size}.")
    if cfg.stage == 1 and cfg.batch % cfg.steps:
        raise UsageError(f"--batch {cfg.batch} must be a multiple of --steps {cfg.steps}: every k gets an equal share.")
    if cfg.stage == 2 and cfg.eta == 0 and not cfg.no_policy:
        raise UsageError("--eta 0 leaves no stochastic step to reinforce: give --eta above 0 or --no_policy.")
    if cfg.stage == 2 and cfg.no_policy and cfg.no_det and cfg.no_dmd:
        raise UsageError("--no_policy --no_det --no_dmd together leave nothing to train: drop one of them.")
    if cfg.stage == 2 and "geneval" in cfg.rewards and not cfg.prompts.endswith(".jsonl") and not cfg.random_weights:
        raise UsageError("--rewards geneval must know what a picture has to show: give --prompts FILE.jsonl of GenEval's metadata "
                         "rows (README says how to make one), or other --rewards.")
    if cfg.device not in ("cpu", "meta") and not cfg.device.startswith("cuda"):
        raise UsageError(f"--device {cfg.device} is unknown: take cuda, cpu or meta.")
    if cfg.device.startswith("cuda") and torch.cuda.device_count() <= dist_info()[1]:
        raise UsageError(f"--device cuda needs a GPU for each process, and PyTorch sees {torch.cuda.device_count()} here: "
                         "start fewer processes, or take --device cpu.")
    if cfg.device == "meta" and not (cfg.dry_run and cfg.random_weights):
        raise UsageError("--device meta only counts: add --dry_run 1 --random_weights.")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Flow algebra (paper 2.1). Rectified path x_t = (1-t) x_0 + t eps, velocity v = E[eps - x_0 | x_t].
#
# From here to section 5 everything is a pure function: no globals, no configuration, noise comes in as an argument,
# levels t, s are numbers or tensors that broadcast against x, and all arithmetic is fp32 whatever comes in, because
# bf16 rounds 0.9582 to 0.957 and loses x - t v in its noise.
# ----------------------------------------------------------------------------------------------------------------------

def fp32(*values):
    """Each value as an fp32 tensor, its autograd graph and device kept."""
    return [torch.as_tensor(a, dtype=torch.float32) for a in values]


def x0_from_velocity(x, v, t):
    """E[x_0 | x_t = x], the x-prediction. x, v (B, ...), t broadcastable."""
    x, v, t = fp32(x, v, t)
    return x - t * v


def eps_from_velocity(x, v, t):
    """E[eps | x_t = x]. Eq. 19 without its division by t: the same number, and finite at t = 0."""
    x, v, t = fp32(x, v, t)
    return x + (1 - t) * v


def score_from_velocity(x, v, t):
    """grad log p_t(x), Eq. 2 solved for s (Eq. 1 for this path). Singular only at t = 0."""
    x, v, t = fp32(x, v, t)
    return -(x + (1 - t) * v) / t


# ----------------------------------------------------------------------------------------------------------------------
# 3. Sampler (App. C)
# ----------------------------------------------------------------------------------------------------------------------

def timestep_schedule(steps, shift=1.0):
    """t_0 = 1 > ... > t_K = 0, (K+1,) float64: the uniform grid u (App. J), shifted as shift u / (1 + (shift-1) u).

    shift 3 (SD3) gives 1, .9, .75, .5, 0 for K = 4.
    """
    u = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    return shift * u / (1 + (shift - 1) * u)


def cps_mean_std(x, v, t, t_next, eta):
    """Eqs. 20 and 21: mean (B, ...) and std of x_{t_next} given x at level t and the velocity there.

    eta 0 is an Euler step, eta 1 re-noises the x-prediction; the signal and noise coefficients are (1 - t_next, t_next)
    for every eta, which is what "coefficient preserving" means. std has the shape of t_next; it is sigma_k of Eq. 13.
    """
    x, v, t, t_next = (torch.as_tensor(a, dtype=torch.float32) for a in (x, v, t, t_next))
    x0, eps = x - t * v, x + (1 - t) * v
    mean = (1 - t_next) * x0 + t_next * math.cos(eta * math.pi / 2) * eps
    return mean, t_next * math.sin(eta * math.pi / 2)


def cps_step(x, v, t, t_next, noise, eta):
    """One draw from Eq. 20. At t_next = 0 the noise has no weight: the last step is deterministic."""
    mean, std = cps_mean_std(x, v, t, t_next, eta)
    return mean + std * fp32(noise)[0]


def rollout(velocity, x, noise, times, eta):
    """K steps of Eq. 20 from x = x_{t_0} ~ N(0, I), (B, ...).

    velocity(x, t (B,)) -> v;  noise (K-1, B, ...), eps_k at index k - 1;  times (K+1,).
    Returns K+1 states x_{t_0} .. x_{t_K} and the K x-predictions of the steps.
    """
    states, predictions = [x], []
    for k in range(1, len(times)):
        t, t_next = times[k - 1], times[k]
        v = velocity(states[-1], t.to(x.device, torch.float32).expand(len(x)))
        predictions.append(x0_from_velocity(states[-1], v, t))
        step_noise = noise[k - 1] if k < len(times) - 1 else 0.0
        states.append(cps_step(states[-1], v, t, t_next, step_noise, eta))
    return states, predictions


class CPSScheduler(FlowMatchEulerDiscreteScheduler):
    """Eq. 21 for the stock diffusers pipelines of SD3 and FLUX.2.  Copy it alone: it needs nothing else here.

        pipe.scheduler = CPSScheduler.from_config(pipe.scheduler.config, eta=0.9)
        pipe.scheduler.generator = torch.Generator().manual_seed(0)      # the noise of the steps
        image = pipe(prompt, num_inference_steps=4, guidance_scale=1).images[0]

    eta = 0 is the Euler step, eta = 1 fresh noise at every level (the parent's `stochastic_sampling=True`).
    No pipeline hands its `generator` on to `step`, hence the attribute; None means torch's global state.
    Put the old scheduler back before `pipe.save_pretrained`, or diffusers cannot load what was saved.
    """

    eta = 0.9                # randomness of a step, 0 to 1   (paper 4.1)
    generator = None         # a torch.Generator, or a list with one per image

    @classmethod
    def from_config(cls, config, eta=None, **options):
        """From any flow-matching scheduler's `config`, with its shift; eta defaults to its own, or .9."""
        fields = dict(config)
        known = fields.pop("eta", cls.eta)             # the parent warns of fields that it does not know
        scheduler = super().from_config(fields, **options)
        scheduler.eta = known if eta is None else eta
        scheduler.register_to_config(eta=scheduler.eta)
        return scheduler

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        """Levels 1, (n-1)/n ... 1/n shifted once, then 0.  `sigmas` are levels BEFORE the shift, as ever.

        The parent's default shifts twice: four steps of SD3 would be 1, .858, .602, .009, 0 and not
        1, .9, .75, .5, 0.  FLUX.2's pipeline passes these very levels itself, and its shift as `mu`.
        """
        if sigmas is None and timesteps is None:
            sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        super().set_timesteps(device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **unused):
        """x_t -> x_t_next by Eq. 21.  model_output is the velocity v, sample is x_t, of any shape.

        In fp32 inside (bf16 would lose .004 of a unit-variance latent in x - t v); the result has v's dtype.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        t, t_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        x, v = sample.float(), model_output.float()
        x0, eps = x - t * v, x + (1 - t) * v
        x = (1 - t_next) * x0 + t_next * math.cos(self.eta * math.pi / 2) * eps
        if self.eta > 0 and self.step_index < len(self.sigmas) - 2:      # the last step has no noise
            noise = randn_tensor(x.shape, generator or self.generator, x.device, torch.float32)
            x = x + t_next * math.sin(self.eta * math.pi / 2) * noise
        self._step_index += 1
        x = x.to(model_output.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


# ----------------------------------------------------------------------------------------------------------------------
# 4. AC-DMD (3.1, App. B, D, E, F). s: level t_k of a boundary state x_s; t in [s, 1]: level it is re-noised to.
# ----------------------------------------------------------------------------------------------------------------------

def renoise_coefficients(s, t, std="markov"):
    """a = alpha_k(t) and kappa = sigma_k(t) of Eq. 8: x_t = a x_s + kappa n brings level s to level t.

    The new noise is independent of the old, so variances add: a^2 s^2 + kappa^2 = t^2. The root is written without the
    difference of squares, which would cancel as t -> s. std="paper" is (t-s)/(1-s), DEPARTURE 1.
    """
    s, t = fp32(s, t)
    a = (1 - t) / (1 - s)
    new = (t - s) / (1 - s)                                                # = t - a s
    return a, new if std == "paper" else (new * (t + a * s)).clamp_min(0).sqrt()


def renoise(x_s, s, t, noise, std="markov"):
    """x_t ~ q_t(. | x_s), the corruption of Eq. 8. x_s, noise (B, ...)."""
    a, kappa = renoise_coefficients(s, t, std)
    return a * x_s.float() + kappa * noise.float()


def ambient_scale(s, t, std="markov"):
    """c, with which the velocity that the conditional score of Eq. 10 implies is  v* = -x_s/(1-s) + c n.

    Derivation: put the conditional score -n/kappa into Eq. 2 and collect; c = (t - kappa^2) / ((1-t) kappa), written
    so that it is finite at t = 1. c >= 1; c = 1 for s = 0 (flow matching), c -> infinity as t -> s.
    """
    s, t = fp32(s, t)
    a, kappa = renoise_coefficients(s, t, std)
    rest = s * (t + kappa) if std == "paper" else a * s * s                # (t^2 - kappa^2) / a
    return (t + rest / (1 - s)) / kappa


def ambient_velocity_target(x_s, noise, s, t, std="markov"):
    """Regression target v* of the fake score on x_t = a x_s + kappa n; Eq. 5's n - x_0 at s = 0. x_s, noise (B, ...)."""
    x_s, noise, s = fp32(x_s, noise, s)
    return -x_s / (1 - s) + ambient_scale(s, t, std) * noise


def ambient_dsm_loss(v_fake, x_s, noise, s, t, std="markov"):
    """Eq. 10 -> scalar. v_fake = v_phi(x_t, t), x_s, noise (B, ...).

    |v_phi - v*|^2 is divided by the variance of v* given x_0, c^2 + s^2 / (1-s)^2 (omega_k is (t/(1-t))^2 over that): of
    order one at every (s, t), exactly Eq. 5 at s = 0, and without singularity as t -> s, where v* grows like 1 / kappa.
    """
    v_fake, x_s, noise, s = fp32(v_fake, x_s, noise, s)
    c, b = ambient_scale(s, t, std), s / (1 - s)
    residual = (v_fake + x_s / (1 - s)) / c - noise                        # (v_phi - v*) / c
    return (residual.square() / (1 + (b / c).square())).mean()


def reverse_step(x, v, t, t_next, noise, kernel="posterior", eta=None):
    """x'' ~ p_phi(x_t'' | x_t'), the reverse kernel of Eq. 11. x, v, noise (B, ...); t' = t >= t_next = t''.

    "posterior": the Gaussian bridge q(x'' | x', x_0) at the x-prediction: Eq. 20 with cos = t''(1-t') / (t'(1-t'')).
    (1e-9: at t' = t'' = 1, where bf16 levels may fall, it is 1 and not 0/0.)
    "cps": Eq. 20 at a fixed eta, as released; the true score is then no fixed point of Eq. 11 (DEPARTURE 3).
    """
    x, v, t, t_next, noise = fp32(x, v, t, t_next, noise)
    cos = math.cos(eta * math.pi / 2) if kernel == "cps" else t_next * (1 - t + 1e-9) / (t * (1 - t_next + 1e-9))
    sin = torch.as_tensor(1 - cos * cos).clamp_min(0).sqrt()
    return (1 - t_next) * (x - t * v) + t_next * (cos * (x + (1 - t) * v) + sin * noise)


def consistency_loss(fake, x, v, t, t_next, noise_1, noise_2, kernel="posterior", eta=None, one_sided=True, early=None):
    """Eq. 22 -> scalar: |h(x', t') - E h(x'', t'')|^2 with h = x - t v the x-prediction, over two draws x'' (App. F).

    fake(x, t) -> v_phi;  x, v (B, ...) at level t, v = fake(x, t) with its graph: the DSM forward is used again;
    noise_1, noise_2 (B, ...) independent. The product of two draws is unbiased for the squared norm of the mean; the
    square of one draw would add the variance of h(x''). It may be negative. The draws are constants: a gradient into
    x'' would teach the kernel, not the prediction. The two factors are exchangeable, so twice the gradient through one
    of them has the expectation of the gradient through both (one_sided) and saves a backward pass. early(loss) is given
    the part that acts through v, before the graph at x'' exists: backward there, and only one graph at a time is kept.
    """
    x, v, t, t_next, noise_1, noise_2 = (torch.as_tensor(a, dtype=torch.float32)
                                         for a in (x, v, t, t_next, noise_1, noise_2))
    h = x - t * v
    # reverse_step twice, written out so that this function can be copied alone.
    cos = math.cos(eta * math.pi / 2) if kernel == "cps" else t_next * (1 - t + 1e-9) / (t * (1 - t_next + 1e-9))
    sin = torch.as_tensor(1 - cos * cos).clamp_min(0).sqrt()
    mean = ((1 - t_next) * h + t_next * cos * (x + (1 - t) * v)).detach()
    x_1, x_2 = mean + t_next * sin * noise_1, mean + t_next * sin * noise_2
    with torch.set_grad_enabled(torch.is_grad_enabled() and not one_sided):
        d_1 = x_1 - t_next * fake(x_1, t_next).float() - h
    if early:
        early(-2 * (d_1 * h).mean())
        h = h.detach()
    d_2 = x_2 - t_next * fake(x_2, t_next).float() - h
    product = (d_1 * d_2).mean()
    return 2 * product - product.detach() if one_sided else product


def boundary_mean(x_t, v, s, t):
    """E[x_s | x_t] under velocity v (Tweedie, App. B). x_t, v (B, ...).

    (x_t + kappa^2 score) / a, written without the division by a, which is 0 at t = 1.
    """
    x_t, v, s, t = fp32(x_t, v, s, t)
    a = (1 - t) / (1 - s)
    return (1 - s) * (x_t - t * v) + (a * s * s / t) * (x_t + (1 - t) * v)


def dmd_loss(x_s, x_t, v_teacher, v_fake, s, t):
    """Scalar whose gradient in x_s is Eq. 9 with lambda_k alpha_k = kappa^2 / (a N); Eq. 4 (ordinary DMD) at s = 0.

    x_s (B, ...) with its graph; x_t = renoise(x_s); velocities at (x_t, t), treated as constants.
    g = (m_phi - m_psi) / N points from the teacher's boundary mean to the fake's, so descent moves x_s towards the
    teacher; N = mean abs(x_s - m_psi) per sample is DMD's normaliser. We know the gradient but no function that has
    it: (x_s - stop(x_s - g))^2 / 2 does. Its value, mean g^2 / 2, is half the squared relative gap.
    """
    x_s, x_t, v_teacher, v_fake, s, t = (torch.as_tensor(value, dtype=torch.float32)
                                         for value in (x_s, x_t, v_teacher, v_fake, s, t))
    a = (1 - t) / (1 - s)
    with torch.no_grad():                                                  # boundary_mean, twice
        m_fake, m_teacher = ((1 - s) * (x_t - t * v) + (a * s * s / t) * (x_t + (1 - t) * v)
                             for v in (v_fake, v_teacher))
        size = (x_s - m_teacher).abs().mean(dim=tuple(range(1, x_s.dim())), keepdim=True)
        g = (m_fake - m_teacher) / size.clamp_min(1e-3)                     # a student on top of its target: no blow-up
    return 0.5 * (x_s - (x_s - g).detach()).square().mean()


# ----------------------------------------------------------------------------------------------------------------------
# 5. Hybrid policy gradient (3.2, App. G, H). Step k = 1 .. K-1 is a Gaussian policy, step K is deterministic (Eq. 14).
# ----------------------------------------------------------------------------------------------------------------------

def choose_steps(steps, subset_size, generator):
    """S: sorted list of subset_size of the stochastic steps {1 .. K-1}, uniformly (3.2). generator: torch.Generator."""
    return sorted((torch.randperm(steps - 1, generator=generator)[:subset_size] + 1).tolist())


def group_noise(shape, selected, group_size, steps, generator):
    """Eq. 16: the noise of one group, (K-1, N, *shape), independent at the steps in `selected`, shared at all others."""
    noise = torch.randn(steps - 1, group_size, *shape, generator=generator)
    for k in range(1, steps):
        if k not in selected:
            noise[k - 1] = noise[k - 1, :1]
    return noise


def gaussian_log_prob(x_next, mean, std):
    """log pi of Eq. 13, (B,), averaged over dimensions so that one clip suits every resolution. x_next, mean (B, ...).

    The exact density with its 1 / (2 std^2): without it the ratio is no likelihood ratio (DEPARTURE 7).
    """
    x_next, mean, std = fp32(x_next, mean, std)
    log_density = -0.5 * ((x_next - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


def reward_scale(rewards, std="group", floor=1e-4):
    """What rewards are divided by, broadcastable to (G, N): std over the group or over all, at least floor; or 1.

    Without a floor a group whose members are all right becomes a vote of +-1 on rounding noise (DEPARTURE 12).
    """
    if std == "none":
        return torch.ones_like(rewards[:, :1])
    return (rewards.std(1, keepdim=True) if std == "group" else rewards.std()).clamp_min(floor)


def group_advantages(rewards, std="group", floor=1e-4):
    """A_i of 3.2 and App. H: (G, N) -> (G, N), rewards of N trajectories for each of G prompts.

    std="none" compares each with the mean of the N-1 others, i.e. stretches by N/(N-1): a baseline that contains r_i
    itself would shrink the stochastic term of Eq. 14 by (N-1)/N against the pathwise one.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if std == "none":
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)
    return centred / reward_scale(rewards, std, floor)


def subgrpo_loss(log_prob, old_log_prob, advantages, steps, clip):
    """Loss whose gradient is minus Eq. 17 (per dimension), -> scalar. log_prob, old_log_prob (B, M): a column per step of S;
    advantages (B,).

    (K-1)/M makes the sum over S an unbiased stand-in for the sum over all K-1 steps, Eq. 31, of naive GRPO (M = K-1).
    The clip is PPO's: it acts only once the ratio has left 1, i.e. from the second update of a rollout on.
    """
    ratio, A = torch.exp(log_prob - old_log_prob), advantages[:, None]
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    return -(steps - 1) / log_prob.shape[1] * surrogate.sum(1).mean()


def pathwise_loss(reward, scale=1.0, dims=1):
    """Loss whose gradient is minus Eq. 15, -> scalar. reward (B,) = r(G(x_{t_{K-1}})), a function of G's parameters only.

    x_{t_{K-1}} must enter detached: its dependence on theta is the policy term's business (App. G.2, counted twice
    otherwise). scale (B,): the std that the advantage was divided by; dims: the log-probabilities and the DM loss are
    means over dimensions, so this term is divided by their number too (DEPARTURE 11).
    """
    return -(reward.float() / scale).mean() / dims


# ----------------------------------------------------------------------------------------------------------------------
# 6. Rewards r(x): reward(images (B, 3, H, W) in [0, 1], prompts) -> (B,)
#
# Every reward enters SubGRPO (Eq. 17); only one whose .differentiable is true also enters the pathwise term (Eq. 15). The
# CLIP family stands here, the paper's other metrics in eval.py; your own is `--rewards my_module:my_function=1`.
# ----------------------------------------------------------------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)


def resize(images, height, width, mode="bicubic"):
    """What PIL does, but differentiable: (B, C, H, W) -> (B, C, height, width), antialiased, in fp32 whatever comes in.

    Without antialias most pixels of a large image are never looked at, and the gradient writes a grid into the others.
    """
    return F.interpolate(images.float(), (height, width), mode=mode, antialias=True, align_corners=False)


def normalise(images, mean=CLIP_MEAN, std=CLIP_STD):
    """Pixels in [0, 1], (B, 3, H, W), in the units that the network was trained on."""
    mean, std = (images.new_tensor(m).view(3, 1, 1) for m in (mean, std))
    return (images - mean) / std


def square_crop(images, size=224, mode="bicubic"):
    """CLIP's view: short side to `size`, centre crop, normalise. (B, 3, H, W) -> (B, 3, size, size).

    Bicubic overshoots to -.03 .. 1.03 where PIL clips at 8 bits, hence the clamp: 2/255 from PIL at most.
    """
    h, w = images.shape[-2:]
    height, width = int(size * h / min(h, w)), int(size * w / min(h, w))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return normalise(resize(images, height, width, mode).clamp(0, 1)[..., top:top + size, left:left + size])


def letterbox(images, size=224):
    """HPSv2's view: longest side to `size`, the rest black, normalise. (B, 3, H, W) -> (B, 3, size, size).

    No crop, and no clamp: HPSv2 resizes tensors instead of PIL images, so its network sees the overshoots.
    """
    h, w = images.shape[-2:]
    height, width = round(size * h / max(h, w)), round(size * w / max(h, w))
    rows, columns = size - height, size - width                            # an odd one goes right and below
    return normalise(F.pad(resize(images, height, width), (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)))


def find_weights(repo, filename, cfg):
    """Path of a hub file: WEIGHTS_DIR/<repo's last name>/filename, WEIGHTS_DIR/filename, or the hub and its cache."""
    from huggingface_hub import hf_hub_download
    folder = Path(cfg.weights_dir).expanduser() if cfg.weights_dir else None
    places = [folder / repo.split("/")[-1] / filename, folder / filename] if folder else []
    for path in places:
        if path.is_file():
            return path
    try:
        return Path(hf_hub_download(repo, filename))
    except OSError as error:                                                # all of the hub's own errors are of this kind
        looked = "".join(f"{path}, " for path in places) + f"the hub and its cache ({type(error).__name__})"
        raise UsageError(f"{filename} of {repo} is not in {looked}: download it (accept its licence first if it is gated), or "
                         "name the folder that holds it by --weights_dir.") from error


def from_hub(loader, repo, cfg, needs="config.json", **options):
    """loader.from_pretrained, of WEIGHTS_DIR/<repo's last name> or of the hub.

    The file `needs` is looked for first: transformers makes a tokenizer without its vocabulary in silence, and asks a hub
    that cannot be reached for every file in turn, 20 s each.
    """
    found = find_weights(repo, needs, cfg)
    local = cfg.weights_dir and found.is_relative_to(Path(cfg.weights_dir).expanduser())
    try:
        return loader.from_pretrained(str(found.parent) if local else repo, **options)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{loader.__name__} of {repo}, of which {found} is there, is incomplete ({reason}): "
                         f"download the whole repository into WEIGHTS_DIR/{repo.split('/')[-1]}.") from error


def open_clip_host(row, cfg):
    """HPSv2.1 in open_clip's ViT-H-14: the same 686 tensors, so the load is strict.

    Hosts return the network and embeddings (B, D) of pixels and of prompts: (net, embed_image, embed_text).
    """
    import open_clip
    from hpsv2.utils import hps_version_map
    weights = torch.load(find_weights(row["repo"], hps_version_map["v2.1"], cfg), "cpu", weights_only=True)
    net = open_clip.create_model("ViT-H-14", pretrained=None)              # the LAION weights would only be overwritten
    net.load_state_dict(weights["state_dict"], strict=True)
    net, tokenise = net.to(cfg.device), open_clip.get_tokenizer("ViT-H-14")
    return net, net.encode_image, lambda prompts: net.encode_text(tokenise(prompts).to(cfg.device))


def transformers_host(row, cfg):
    """CLIPScore and PickScore in transformers, with its tokenizer: open_clip's reads curly quotes otherwise."""
    from transformers import CLIPModel, CLIPTokenizer
    net = from_hub(CLIPModel, row["repo"], cfg, dtype=torch.float32).to(cfg.device)
    tokenizer = from_hub(CLIPTokenizer, row["repo"], cfg, needs="tokenizer.json")

    def embed_text(prompts):
        tokens = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return net.get_text_features(**tokens.to(cfg.device)).pooler_output       # already projected

    return net, lambda pixels: net.get_image_features(pixel_values=pixels).pooler_output, embed_text


# All are better when higher. CLIP's own resize is bicubic; the paper's CLIPScore column is bilinear.
REWARDS = {
    "hpsv2": dict(host=open_clip_host, repo="xswu/HPSv2", view=letterbox, logit_scale=False,
                  scale="cosine, v2.1 weights", licence="Apache-2.0"),
    "clipscore": dict(host=transformers_host, repo="openai/clip-vit-large-patch14", logit_scale=False,
                      view=functools.partial(square_crop, mode="bilinear"), scale="cosine", licence="MIT"),
    "pickscore": dict(host=transformers_host, repo="yuvalkirstain/PickScore_v1", view=square_crop,
                      logit_scale=True, scale="cosine x about 100", licence="MIT"),
}


class ClipReward:
    """Cosine of image and prompt, times exp(logit_scale) where the row says so: the scale of the paper's tables.

    Scoring and back-propagation run this same code: what is climbed is what is reported.
    """

    differentiable = True

    def __init__(self, name, row, host):
        self.name, self.row = name, row
        self.net, self.embed_image, self.embed_text = host
        self.net.eval().requires_grad_(False)                               # gradients pass through it, never into it
        self.known = {}                                                     # prompt -> (D,): a group asks for it 24 times

    @torch.no_grad()
    def text(self, prompts):
        """Unit text embeddings (B, D)."""
        new = [p for p in dict.fromkeys(prompts) if p not in self.known]
        if new:
            self.known.update(zip(new, F.normalize(self.embed_text(new).float(), dim=-1)))
        return torch.stack([self.known[p] for p in prompts])

    def __call__(self, images, prompts):
        """images (B, 3, H, W) in [0, 1], B prompts -> (B,)."""
        image = F.normalize(self.embed_image(self.row["view"](images)).float(), dim=-1)
        cosine = (image * self.text(prompts)).sum(-1)
        return cosine * self.net.logit_scale.exp() if self.row["logit_scale"] else cosine


def eval_module():
    """eval.py beside this file, loaded on first need: training on REWARDS does without it.

    It imports rtdmd in turn. When rtdmd.py is the script, Python knows it as __main__ only and would run it once more,
    with a second UsageError that nobody catches; so it is registered under its name first.
    """
    if "rtdmd_eval" not in sys.modules:
        sys.modules.setdefault("rtdmd", sys.modules[__name__])
        spec = importlib.util.spec_from_file_location("rtdmd_eval", Path(__file__).with_name("eval.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["rtdmd_eval"] = module
    return sys.modules["rtdmd_eval"]


def parse_rewards(text, extra=(), flag="--rewards"):
    """"hpsv2=1,ocr=.5,my_module:score=2" -> [(name, weight), ...]. extra: names that the backbone brings.

    No weight means 1, a negative one makes a penalty; 0 would load a network for nothing.
    """
    pairs = {}
    for item in text.split(","):
        name, equals, weight = (part.strip() for part in item.partition("="))
        if not name or name in pairs:
            raise UsageError(f"{flag} {text!r}: {f'{name} is named twice: keep one' if name else 'write name=weight,name=weight'}.")
        try:
            pairs[name] = float(weight if equals else 1)
        except ValueError:
            pairs[name] = math.nan
        if pairs[name] == 0 or not math.isfinite(pairs[name]):
            raise UsageError(f"{flag} {item.strip()}: the weight must be a finite number other than 0.")
        if ":" not in name and name not in {*extra, *REWARDS} and name not in eval_module().METRICS:
            names = ", ".join(dict.fromkeys([*extra, *REWARDS, *eval_module().METRICS]))
            raise UsageError(f"{flag}: no reward is called {name!r}; there are {names}, module:attribute.")
    return list(pairs.items())


def load_reward(name, cfg, extra=None):
    """The reward of that name: the backbone's own (extra), one of REWARDS, of eval.py, or module:attribute."""
    if extra and name in extra:
        return extra[name]
    if name in REWARDS:
        return ClipReward(name, REWARDS[name], REWARDS[name]["host"](REWARDS[name], cfg))
    return user_reward(name) if ":" in name else eval_module().load_metric(name, cfg, training=True)


def user_reward(name):
    """"module:attribute": a function (images, prompts) -> (B,), or a class or factory without arguments that makes one;
    searched in the current directory too. Its .differentiable counts as False if it has none."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())                                        # Python itself looks in the script's folder
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"reward {name}: {error}; looked in {os.getcwd()} and among the packages: put {module}.py there, or mend "
                         "the name.") from error
    needs = [p for p in inspect.signature(found).parameters.values() if p.default is p.empty]
    reward = functools.partial(found() if isinstance(found, type) or not needs else found)
    reward.name, reward.differentiable = name, getattr(reward.func, "differentiable", False)
    return reward                                                           # a partial: methods and builtins take no attributes


def score(reward, images, prompts):
    """reward(images, prompts), checked: (B,) fp32 on the images' device; nan and inf are left to the caller.

    Whatever a reward raises becomes one sentence with the reward and the prompt: when a batch fails, its images are tried
    one by one to find the one at fault.
    """
    name = getattr(reward, "name", type(reward).__name__)
    try:
        values = torch.as_tensor(reward(images, prompts), device=images.device)
    except UsageError:
        raise
    except Exception as error:                                              # foreign code raises anything; nothing is swallowed
        for i in range(len(prompts) if len(prompts) > 1 else 0):
            score(reward, images[i:i + 1], prompts[i:i + 1])
        raise UsageError(f"reward {name}, prompt {prompts[0]!r}: {type(error).__name__}: {error}") from error
    if values.shape != (len(prompts),):
        raise UsageError(f"reward {name}, prompt {prompts[0]!r}: returned shape {tuple(values.shape)}, must be "
                         f"({len(prompts)},): mend the reward, or leave it out.")
    return values.float()


# ----------------------------------------------------------------------------------------------------------------------
# 7. Backbones: all that the loops know of a model
#
#   nets             {"generator": net, "score": net}, frozen. The fake adapter lives on "score", which with adapters
#                    off is the teacher. The same object twice where both share weights (SD3)
#   lora_targets     full names of the linears that get an adapter
#   latent_shape     (C, H, W) of one sample
#   shift            of the schedule, u -> shift u / (1 + (shift-1) u), for cfg.steps; shift_for(steps) for others
#   base, text_key   pipeline that an export is loaded into; all that the text embeddings depend on
#   encode(prompts)  -> cond: dict of tensors, batch first, CPU. free_text() drops the text encoders
#   velocity(net, x, t, cond)   v = eps - x0 (B,C,H,W) fp32 at levels t (B,); differentiable
#   quantise(t)      the level that the network is really told when it is asked for t
#   decode(x)        latents -> images (B,3,H,W) in [0,1]; differentiable
# ----------------------------------------------------------------------------------------------------------------------

# Full-size networks for --random_weights: where the hub's config.json departs from the defaults of the class.
SD3_NET = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)
SD35_NET = dict(SD3_NET, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")
K4_NET = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
              guidance_embeds=False)
K9_NET = dict(K4_NET, num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)
SD3_VAE = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2,
               block_out_channels=[128, 256, 512, 512], latent_channels=16, use_quant_conv=False,
               use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609)

# Hub repositories; guidance and learning rates stand in MODELS. SD3: Stability AI Community licence,
# gated. FLUX.2: the 4B Apache-2.0, the 9B FLUX Non-Commercial licence, gated.
SD3, KLEIN = "StableDiffusion3Pipeline", "Flux2KleinPipeline"
SAI, BFL = "stabilityai/stable-diffusion", "black-forest-labs/FLUX.2-klein"
BACKBONES = {
    "sd3m": dict(pipeline=SD3, net=SD3_NET, teacher=f"{SAI}-3-medium-diffusers"),
    "sd35m": dict(pipeline=SD3, net=SD35_NET, teacher=f"{SAI}-3.5-medium"),
    "flux2-4b": dict(pipeline=KLEIN, net=K4_NET, teacher=f"{BFL}-base-4B", generator=f"{BFL}-4B"),
    "flux2-9b": dict(pipeline=KLEIN, net=K9_NET, teacher=f"{BFL}-base-9B", generator=f"{BFL}-9B")}

KNOWN_PROMPTS = {        # name: (data set on the hub, its files)
    "pickapic": ("yuvalkirstain/pickapic_v1_no_images", "data/train-*.parquet"),       # 584k rows, 168 MB
    "drawbench": ("sayakpaul/drawbench", "*.csv"),                                     # 200 rows
    "partiprompts": ("nateraw/parti-prompts", "PartiPrompts.tsv"),                     # 1,632 rows
    "hpdv2": None, "tiny": None, "tiny-test": None}            # 3,200 through hpsv2; the captions of the tiny world
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")      # in any case; the first that a table has
LONGEST_PROMPT = 20_000          # characters; the encoders read some 2,000, more is a broken file
LORA_FILE = "pytorch_lora_weights.safetensors"


def load_backbone(cfg):
    """The backbone of --model."""
    return {"tiny": TinyBackbone, "sd3m": SD3Backbone, "sd35m": SD3Backbone}.get(cfg.model, Flux2Backbone)(cfg)


class SD3Backbone:
    """SD3 and SD3.5 medium: latents (B, 16, H/8, W/8), 77 CLIP + 256 T5 tokens. From --pretrained PATH or the hub.
    UsageError says which part of it cannot be had, and what to do."""

    def __init__(self, cfg):
        row, self.cfg, self.text, self.text_length = BACKBONES[cfg.model], cfg, None, cfg.text_length or 256
        self.base = cfg.pretrained or row["teacher"]
        check_repository(self.base, cfg)
        net = build(diffusers.SD3Transformer2DModel, self.base, "transformer", row["net"], cfg)
        self.vae = build(diffusers.AutoencoderKL, self.base, "vae", SD3_VAE, cfg)
        self.nets, self.dtype, self.lora_targets = {"generator": net, "score": net}, net.dtype, attention_linears(net)
        self.latent_shape = (16, cfg.resolution // 8, cfg.resolution // 8)
        self.shift = 3.0 if cfg.random_weights else fetch(FlowMatchEulerDiscreteScheduler.from_pretrained, self.base,
                                                          "scheduler", subfolder="scheduler").config.shift
        self.text_key = f"{self.base} random {cfg.random_weights} clip 77 t5 {self.text_length} {self.dtype}"

    def shift_for(self, steps):
        """The same for every size and number of steps."""
        return self.shift

    @torch.no_grad()
    def encode(self, prompts):
        """prompts list[str] -> text (B, 77 + 256, 4096), pooled (B, 2048), by the pipeline itself.
        T5 sees its padding (it gets no mask), so the length is part of the condition: sample with the same."""
        if self.cfg.random_weights:
            return random_text(prompts, self.dtype, text=(77 + self.text_length, 4096), pooled=(2048,))
        if self.text is None:
            self.text = fetch(diffusers.StableDiffusion3Pipeline.from_pretrained, self.base, "text encoders",
                              transformer=None, vae=None, dtype=self.dtype).to(self.cfg.device)
        text, _, pooled, _ = self.text.encode_prompt(prompts, None, None, do_classifier_free_guidance=False,
                                                     max_sequence_length=self.text_length)
        return {"text": text.cpu(), "pooled": pooled.cpu()}

    def free_text(self):
        """Drop the text encoders: 10.4 GiB in bf16."""
        self.text = None
        torch.cuda.empty_cache()

    def velocity(self, net, x, t, cond):
        """The timestep 1000 t stays fp32: bf16 would tell the network 752 for 750."""
        return net(hidden_states=x.to(self.dtype), timestep=1000 * t.float(), encoder_hidden_states=cond["text"],
                   pooled_projections=cond["pooled"], return_dict=False)[0].float()

    def quantise(self, t):
        """SD3 is told every level exactly."""
        return t

    def decode(self, x):
        """Latents (B,16,h,w) -> images (B,3,8h,8w)."""
        return decode_chunks(self.vae, x / self.vae.config.scaling_factor + self.vae.config.shift_factor)


class Flux2Backbone:
    """FLUX.2-klein: latents (B, 128, H/16, W/16), 512 Qwen tokens. The generator starts from the distilled repository,
    teacher and fake score on the base one, where guidance works. --pretrained GENERATOR,TEACHER or one for both."""

    TAPS = (9, 18, 27)          # the hidden states of Qwen that make the embedding

    def __init__(self, cfg):
        row, self.cfg, self.text, self.text_length = BACKBONES[cfg.model], cfg, None, cfg.text_length or 512
        paths = cfg.pretrained.split(",") if cfg.pretrained else [row["generator"], row["teacher"]]
        self.base, teacher = paths[0].strip(), paths[-1].strip()
        check_repository(self.base, cfg)
        if check_repository(teacher, cfg).get("is_distilled"):        # its pipeline ignores w without a word
            raise UsageError(f"{teacher} is distilled and ignores guidance, so it cannot be the teacher: "
                             f"take --pretrained GENERATOR,TEACHER with {row['teacher']} or a copy as TEACHER.")
        nets = {path: build(diffusers.Flux2Transformer2DModel, path, "transformer", row["net"], cfg)
                for path in dict.fromkeys([self.base, teacher])}          # one path: one network for both
        self.nets, self.dtype = {"generator": nets[self.base], "score": nets[teacher]}, nets[teacher].dtype
        self.lora_targets = attention_linears(nets[teacher])
        self.vae = build(diffusers.AutoencoderKLFlux2, self.base, "vae", {}, cfg)    # {}: its defaults are the hub's
        self.latent_shape = (128, cfg.resolution // 16, cfg.resolution // 16)
        self.shift = self.shift_for(cfg.steps)
        self.text_key = f"{self.base} random {cfg.random_weights} qwen {self.text_length} {self.dtype}"

    def shift_for(self, steps):
        """e^mu by the pipeline's rule on tokens and steps: 7.62 for four steps at 512, 9.89 at 1024."""
        pipeline = diffusers.pipelines.flux2.pipeline_flux2_klein
        return math.exp(pipeline.compute_empirical_mu(self.latent_shape[1] * self.latent_shape[2], steps))

    @torch.no_grad()
    def encode(self, prompts):
        """prompts list[str] -> text (B, 512, 3 Qwen widths), bit for bit as the whole pipeline does."""
        if self.cfg.random_weights:
            width = self.nets["score"].config.joint_attention_dim
            return random_text(prompts, self.dtype, text=(self.text_length, width))
        if self.text is None:
            self.text = fetch(diffusers.Flux2KleinPipeline.from_pretrained, self.base, "text encoders",
                              transformer=None, vae=None, dtype=self.dtype)
            qwen = self.text.text_encoder.model            # without the 152k-wide output layer
            qwen.layers = qwen.layers[:self.TAPS[-1]]      # and without the layers above the last tap,
            qwen.norm = nn.Identity()                      # which lies before the norm, as in the whole
            self.text.text_encoder = qwen.to(self.cfg.device)
        text, _ = self.text.encode_prompt(prompts, self.cfg.device, max_sequence_length=self.text_length,
                                          text_encoder_out_layers=self.TAPS)
        return {"text": text.cpu()}

    def free_text(self):
        """Drop Qwen: 5.8 GiB for the 4B model in bf16."""
        self.text = None
        torch.cuda.empty_cache()

    def velocity(self, net, x, t, cond):
        """The network wants tokens (B, h w, 128), and positions (T, row, column, word) of image and text.
        It takes t in [0,1], rounded as the pipeline does: an exact t would train levels nobody asks for."""
        sizes = (1, *x.shape[2:], cond["text"].shape[1])
        one, row, column, word = (torch.arange(size, device=x.device) for size in sizes)
        v = net(hidden_states=x.flatten(2).mT.to(self.dtype), timestep=(1000 * t.float()).to(self.dtype) / 1000,
                encoder_hidden_states=cond["text"], img_ids=torch.cartesian_prod(one, row, column, one),
                txt_ids=torch.cartesian_prod(one, one, one, word), return_dict=False)[0]
        return v.float().mT.unflatten(2, x.shape[2:])

    def quantise(self, t):
        """What becomes of t in `velocity` and the network: 1000 t rounded, divided, multiplied: +-.003.
        Draw t, quantise it, then noise with the result: the mathematics uses what the network is told."""
        return ((1000 * t.float()).to(self.dtype) / 1000 * 1000).float() / 1000

    def decode(self, x):
        """Latents (B,128,h,w) -> images (B,3,16h,16w): 2x2 patches of the VAE's own, standardised by its batch norm."""
        mean, variance = (row.float().view(-1, 1, 1) for row in (self.vae.bn.running_mean, self.vae.bn.running_var))
        z = x * torch.sqrt(variance + self.vae.config.batch_norm_eps) + mean
        return decode_chunks(self.vae, F.pixel_shuffle(z, 2))


def build(cls, path, part, config, cfg):
    """One frozen network on cfg.device: component `part` of a repository, or a random one of full size. The seed is
    keyed: every rank makes the same weights, and the global random state stays where it was."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.dtype or ("fp32" if cfg.device == "cpu" else "bf16")]
    if not cfg.random_weights:
        net = fetch(cls.from_pretrained, path, part, subfolder=part, dtype=dtype)
    else:
        gpus = [torch.cuda.current_device()] if cfg.device.startswith("cuda") else []
        with torch.random.fork_rng(gpus), torch.device(cfg.device):
            torch.manual_seed(key("random weights", path, part))
            torch.set_default_dtype(dtype)                # built in fp32 first, it would need three times its memory
            net = nn.Module.to(cls(**config), dtype)      # the position tables are made in fp32
            torch.set_default_dtype(torch.float32)
    largest = 16 * net.config.get("pos_embed_max_size", 256)
    if cfg.resolution % 16 or not 0 < cfg.resolution <= largest:
        raise UsageError(f"--resolution {cfg.resolution} is not possible: take a multiple of 16 up to {largest}.")
    if part == "vae" and not cfg.no_vae_checkpointing:
        net.enable_gradient_checkpointing()
    return net.to(cfg.device).eval().requires_grad_(False)


def check_repository(path, cfg):
    """model_index.json of a pipeline as a dict. UsageError if it is another pipeline or lacks a component."""
    if cfg.random_weights:
        return {}
    diffusers.utils.logging.set_verbosity_error()     # or each caption beyond 77 tokens prints a warning
    row, index = BACKBONES[cfg.model], fetch(diffusers.DiffusionPipeline.load_config, path, "model_index.json")
    optional = {"image_encoder", "feature_extractor"}
    lacking = [part for part, origin in index.items() if origin == [None, None] and part not in optional]
    if index.get("_class_name") != row["pipeline"] or lacking:
        state = f"saved without {', '.join(lacking)}" if lacking else f"a {index.get('_class_name')}"
        raise UsageError(f"{path} is {state}; --model {cfg.model} needs a whole {row['pipeline']} as {row['teacher']}.")
    return index


def fetch(load, path, part, **options):
    """load(path) of `part` of a pipeline repository; any failure to read it as one sentence with the remedy."""
    try:
        return load(path, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:150]
        remedy = f"is no folder, and no hub repository in reach ({reason}): check name and network."
        if Path(path).exists():
            remedy = f"has no usable {part} ({reason}): get the whole diffusers folder again."
        if any(isinstance(cause, huggingface_hub.errors.GatedRepoError) for cause in (error, error.__context__)):
            remedy = f"is gated: accept the licence on https://huggingface.co/{path} and run `hf auth login`."
        raise UsageError(f"{path} {remedy}") from error


def random_text(prompts, dtype, **shapes):
    """Normal embeddings of the given shapes on the CPU, the same for the same prompt."""
    return {name: torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(key("random text", name, p)))
                               for p in prompts]).to(dtype) for name, shape in shapes.items()}


def attention_linears(net):
    """Full names of the attention linears of both streams: 191 in SD3, 243 in SD3.5, 80 and 112 in FLUX.2.
    Full, because PEFT reads others as suffixes: `attn.to_q` misses attn2, `to_out` hits lists as well."""
    # attn2 is SD3.5's second, image-only attention. FLUX.2's single-stream blocks fuse q, k, v with the MLP into one
    # linear: an adapter there reaches the MLP too.
    pattern = r"(single_)?transformer_blocks\.\d+\.attn2?\..+"
    return [name for name, part in net.named_modules() if isinstance(part, nn.Linear) and re.fullmatch(pattern, name)]


def decode_chunks(vae, z, pixels=2**20):
    """VAE latents (B,c,h,w) -> images (B,3,8h,8w) in [0,1], 2^20 pixels at a time (four images of 512).
    Clamped as the pipelines clamp: a pixel that is out of range passes no gradient."""
    chunks = z.to(vae.dtype).split(max(1, pixels // (64 * z.shape[2] * z.shape[3])))
    images = torch.cat([vae.decode(chunk, return_dict=False)[0].float() for chunk in chunks])
    return (images / 2 + 0.5).clamp(0, 1)


class TextCache:
    """Text embeddings on disk, so that the encoders need not live beside the network while it trains.
    FOLDER/<hash of text_key>/<hash of prompt>.safetensors is encode([prompt]) of any backbone without batch axis. A
    file that is cut short is known by its size, and made anew. One thread reads, ahead of the network if it is told to."""

    def __init__(self, backbone, folder):
        self.backbone, self.reader = backbone, ThreadPoolExecutor(1)
        self.rows, self.keep = {}, 512       # prompt -> future of its row, the latest last; at most so many (SD3: 1.4 GB)
        self.folder = Path(folder) / hashlib.sha256(backbone.text_key.encode()).hexdigest()[:16]

    def path(self, prompt):
        """The file of one prompt."""
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"

    def has(self, prompt):
        """True if the prompt's file is whole: opening it compares header and size."""
        try:
            with safe_open(self.path(prompt), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def prepare(self, prompts, batch=16):
        """Encode what is missing of `prompts` and "" (the null condition), split over ranks; then free_text.
        UsageError if the disk is too small. All ranks list what is missing before any of them writes."""
        rank, _, world = dist_info()
        missing = [prompt for prompt in dict.fromkeys(["", *prompts]) if not self.has(prompt)]
        barrier()
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free / 1e9
            need = sum(row.nbytes for row in self.backbone.encode([""]).values()) * len(missing) / 1e9
            log(f"text embeddings: {len(missing):,} prompts, {need:.2f} GB in {self.folder} ({free:.0f} free)")
            if 1.1 * need > free:
                raise UsageError(f"{need:.1f} GB of text embeddings, {free:.1f} GB free: --cache needs a larger disk.")
        chunks = [missing[i:i + batch] for i in range(rank * batch, len(missing), world * batch)]
        for chunk in progress(chunks, len(chunks), "text embeddings"):
            cond = self.backbone.encode(chunk)
            for i, prompt in enumerate(chunk):
                write_atomic(self.path(prompt), safetensors_bytes({name: rows[i] for name, rows in cond.items()}))
        self.backbone.free_text()
        self.rows.clear()                                  # a file that could not be read is whole now
        barrier()

    def read(self, prompt):
        """One row from its file. Cloned: load_file gives views of the open file, and 65,530 of those are allowed."""
        try:
            return {name: x.clone() for name, x in load_file(self.path(prompt)).items()}
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{self.path(prompt)} cannot be read: start again, and it is made anew (several nodes "
                             "need one --cache that all of them see).") from error

    def prefetch(self, prompts):
        """Has the thread read `prompts` in this order, each once, and returns at once. A loop that asks here for this
        iteration and the next one finds in `batch` what was read while the network worked."""
        prompts = list(dict.fromkeys(prompts))
        self.rows |= {p: self.rows.pop(p, None) or self.reader.submit(self.read, p) for p in prompts}
        self.keep = max(self.keep, len(prompts))
        for old in list(self.rows)[:-self.keep]:
            del self.rows[old]

    def batch(self, prompts, device):
        """cond of `prompts`, batch first, on `device`."""
        self.prefetch(prompts)
        rows = [self.rows[prompt].result() for prompt in prompts]
        cond = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        pin = torch.device(device).type == "cuda"         # a copy from pinned memory does not stop the host
        return {name: (x.pin_memory() if pin else x).to(device, non_blocking=True) for name, x in cond.items()}


def read_prompts(name_or_path, seed=None):
    """--prompts as list[str]: a .txt, .jsonl (GenEval's too), .csv, .tsv or .parquet file, or a known name. Stripped,
    without blank lines and duplicates; in an order by `seed` and each text alone (a new line moves no other), or
    without seed in the file's. UsageError names the line that is wrong."""
    texts = []
    try:
        for row in prompt_rows(name_or_path):
            if isinstance(row, dict):
                row = {str(name).strip().lower(): text for name, text in row.items()}
                if not (found := [row[name] or "" for name in PROMPT_COLUMNS if name in row]):
                    raise ValueError(f"no column or key called {', '.join(PROMPT_COLUMNS)}")
                row = found[0]
            if not isinstance(row, str) or "\0" in row or len(row) > LONGEST_PROMPT:
                raise ValueError(f"a prompt is text without NUL, up to {LONGEST_PROMPT:,} characters: {row!r:.30}")
            row.encode()            # JSON can hold half a surrogate pair: an error here, and not in the tokenizer
            texts.append(row.strip())
    except OSError as error:
        raise UsageError(f"--prompts {name_or_path} cannot be read ({error.strerror or error}): give a file, or one of "
                         f"{', '.join(KNOWN_PROMPTS)}.") from error
    except (ValueError, RuntimeError, csv.Error) as error:                  # pyarrow's are subclasses of the first two
        line = len(texts) + (2 if name_or_path.lower().endswith((".csv", ".tsv")) else 1)        # they have a header
        reason = " ".join(str(getattr(error, "msg", error)).split())[:150]
        raise UsageError(f"--prompts {name_or_path}, line {line}: {reason}; mend it, or give one of "
                         f"{', '.join(KNOWN_PROMPTS)}.") from error
    prompts = list(dict.fromkeys(filter(None, texts)))
    if not prompts:
        raise UsageError(f"--prompts {name_or_path} holds no prompt: give a file with one prompt a line.")
    again = len(texts) - len(prompts) - texts.count("")
    log(f"prompts: {len(prompts):,} from {name_or_path}, less {texts.count('')} blank lines and {again} duplicates")
    return prompts if seed is None else sorted(prompts, key=lambda text: key("prompt order", seed, text))


def prompt_rows(source):
    """The rows of a known set or of a file by its ending: strings, or dicts by column names."""
    kind = Path(source).suffix.lower()
    if source in ("tiny", "tiny-test"):
        return tiny_captions(source == "tiny-test")
    if source == "hpdv2":
        import hpsv2
        return sum(hpsv2.benchmark_prompts("all").values(), [])
    if source in KNOWN_PROMPTS:
        repository, pattern = KNOWN_PROMPTS[source]
        folder = huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=pattern)
        return (row for file in sorted(Path(folder).glob(pattern)) for row in prompt_rows(str(file)))
    if kind == ".parquet":
        from pyarrow.parquet import ParquetFile           # reads those of the named columns that there are
        return ParquetFile(source).read([*PROMPT_COLUMNS, *map(str.title, PROMPT_COLUMNS)]).to_pylist()
    lines = (line.decode("utf-8-sig") for line in Path(source).read_bytes().splitlines(keepends=True))
    if kind in (".csv", ".tsv"):
        return csv.DictReader(lines, delimiter="," if kind == ".csv" else "\t")
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"it ends in {kind or 'nothing'}, in none of .txt, .jsonl, .csv, .tsv, .parquet")
    return lines if kind == ".txt" else (json.loads(line) if line.strip() else "" for line in lines)


def save_lora(folder, state_dict, rank, alpha, targets, info):
    """Write an adapter for `pipe.load_lora_weights(folder)`, which then computes exactly what was trained.
    state_dict {"transformer_blocks.0.attn.to_q.lora_A.weight": (r, in), ...}; targets full module names; info any JSON
    (how to sample). The loader knows alpha from this metadata alone: without, it would apply the update r / alpha times
    too strongly. A field that its PEFT does not know stops it: hence only three, and our facts under another key."""
    adapter = {"transformer.r": rank, "transformer.lora_alpha": alpha, "transformer.target_modules": sorted(targets)}
    facts = info | {"rank": rank, "alpha": alpha, "targets": sorted(targets)}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter), "rtdmd": json.dumps(facts)}
    tensors = {f"transformer.{name}": row.detach().cpu().contiguous() for name, row in state_dict.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_atomic(Path(folder) / LORA_FILE, safetensors_bytes(tensors, metadata=metadata))


def load_lora(folder):
    """(state_dict, info) of a saved adapter; info as it was saved, plus "rank", "alpha" and "targets"."""
    path = Path(folder) / LORA_FILE
    try:
        with safe_open(path, "pt") as file:
            state_dict = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}
            return state_dict, json.loads((file.metadata() or {})["rtdmd"])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UsageError(f"{path} is missing or damaged, or does not tell rank, alpha and sampler: take another.") from error


# ----------------------------------------------------------------------------------------------------------------------
# 8. Plumbing: processes, keyed randomness, LoRA roles, optimiser step, checkpoints, log
# ----------------------------------------------------------------------------------------------------------------------

def dist_info():
    """(rank, local rank, world size). A plain `python rtdmd.py` is world 1 of the same code."""
    return tuple(int(os.environ.get(n, default)) for n, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def start_processes(device):
    """Joins the processes that torchrun started: NCCL on GPUs, gloo on CPUs. Returns this process's device."""
    _, local, world = dist_info()
    device = f"cuda:{local}" if device == "cuda" else device
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun keeps one store over restarts, where a restarted gloo would find the addresses of the dead.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank, world_size=world)
    return device


def barrier():
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def share(total):
    """Global indices that this process owns: every world-th. What is computed for an index never depends on its owner."""
    rank, _, world = dist_info()
    return list(range(rank, total, world))


def log(text):
    """One line on rank 0, beside a progress bar instead of through it."""
    if dist_info()[0] == 0:
        from tqdm import tqdm
        tqdm.write(text, file=sys.stderr)


def progress(iterable, total, label, start=0):
    """Progress bar with the time left, on rank 0 only. A file instead of a terminal gets a line every ten seconds."""
    from tqdm import tqdm
    return tqdm(iterable, total=total, desc=label, initial=start, dynamic_ncols=True, disable=dist_info()[0] != 0,
                mininterval=0.5 if sys.stderr.isatty() else 10)


def key(*parts):
    """A 63-bit seed from anything printable.

    Every draw names its purpose, so that there is no random state to save: the same numbers come out after a restart,
    with any number of processes and with any micro-batch.
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def draw(keys, uniforms, normals, shape, device):
    """One generator per sample -> U[0,1) (uniforms, B) on the CPU, N(0,1) (normals, B, *shape) on `device`.
    Drawn on the CPU: equal on all devices."""
    u, n = torch.empty(uniforms, len(keys)), torch.empty(normals, len(keys), *shape)
    for i, seed in enumerate(keys):
        generator = torch.Generator().manual_seed(seed)
        u[:, i] = torch.rand(uniforms, generator=generator)
        n[:, i] = torch.randn(normals, *shape, generator=generator)
    return u, n.to(device)


def chunks(total, size):
    """Slices of at most `size` that cover range(total)."""
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def level(values, like):
    """Noise levels (B,) as (B, 1, ..., 1), to broadcast against like (B, ...)."""
    return values.to(like.device, torch.float32).view(-1, *[1] * (like.dim() - 1))


def write_atomic(path, data):
    """Writes bytes or text beside the target, flushes to disk, renames: a reader sees all of it or the old file. Raises
    UsageError."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()                                                 # half a file would fill the disk further
        raise UsageError(f"Cannot write {path} ({error.strerror}): make room, or choose another folder; what was saved "
                         "before is whole, and the same command goes on from it.") from error


class Roles:
    """theta, phi and psi on frozen base networks: two LoRA adapters, and none at all for the teacher.

    Adapters, gradients, Adam's moments and the EMA are fp32 whatever the base is (DEPARTURES 14, 15).
    """

    def __init__(self, backbone, cfg):
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
        self.backbone, self.guidance, self.active = backbone, cfg.guidance, None
        score = backbone.nets["score"]
        self.nets = {"generator": backbone.nets["generator"], "fake": score, "teacher": score}
        unique = list(dict.fromkeys(self.nets.values()))
        for net in unique:
            net.requires_grad_(False)
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are what we want
        for role in ("generator", "fake"):
            torch.manual_seed(key(cfg.seed, "lora", role))                  # the same A on every process; B is 0
            self.nets[role].add_adapter(LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, init_lora_weights="gaussian",
                                                   target_modules=backbone.lora_targets), adapter_name=role)
        for net in unique:
            net.to(next(net.parameters()).device)                           # PEFT leaves them on the CPU for `meta`
            for name, p in net.named_parameters():
                if ".lora_" in name:                                        # PEFT makes them in the base's bf16
                    p.data = p.data.float()
        self.layers = [m for net in unique for m in net.modules() if isinstance(m, BaseTunerLayer)]
        self.named = {role: {n.replace(f".{role}.", "."): p.requires_grad_() for n, p in self.nets[role].named_parameters()
                             if f".lora_A.{role}." in n or f".lora_B.{role}." in n} for role in ("generator", "fake")}
        for layer in self.layers:                                           # computed in the base's dtype, as deployed
            layer.cast_input_dtype_enabled = False
            for matrix in [*layer.lora_A.values(), *layer.lora_B.values()]:
                matrix.forward = functools.partial(lora_product, matrix)
        for net in unique:
            if cfg.checkpointing:
                net.enable_gradient_checkpointing(self.checkpoint)
            if cfg.compile:
                torch._dynamo.config.recompile_limit = 32                   # roles x with and without gradient x shapes
                net.compile()

    def parameters(self, role):
        """The LoRA matrices of "generator" or "fake"."""
        return list(self.named[role].values())

    def switch(self, role):
        """Sets flags only. peft's set_adapter would also freeze the other adapter: called between a forward and its
        backward pass, it makes the gradient vanish without an error."""
        for layer in self.layers:
            layer._disable_adapters = role == "teacher"
            if role != "teacher":
                layer._active_adapter = [role]
        self.active = role

    @contextlib.contextmanager
    def as_role(self, role):
        """That role inside the block, the former one after it."""
        before = self.active
        self.switch(role)
        try:
            yield
        finally:
            self.switch(before)

    def checkpoint(self, module, *args):
        """Gradient checkpointing that recomputes under the adapter of the forward pass, not under the latest one: with
        the latest one gradients come out wrong, and silently."""
        role = self.active
        contexts = lambda: (contextlib.nullcontext(), self.as_role(role))
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False, context_fn=contexts)

    def velocity(self, role, x, t, cond):
        """v_theta, v_phi or v_psi without guidance. x (B, ...) fp32, t (B,) or (B, 1, ..) -> (B, ...) fp32."""
        self.switch(role)
        return self.backbone.velocity(self.nets[role], x, t.flatten(), cond).float()

    def teacher(self, x, t, cond, null):
        """v_psi with classifier-free guidance, v_u + w (v_c - v_u), in one batch. null: the embedding of "", batch 1."""
        if self.guidance == 1:
            return self.velocity("teacher", x, t, cond)
        both = {n: torch.cat([null[n].expand_as(c), c]) for n, c in cond.items()}
        v_u, v_c = self.velocity("teacher", torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return v_u + self.guidance * (v_c - v_u)


def lora_product(matrix, x):
    """x A^T of an fp32 LoRA matrix, in the dtype of x: just what the deployed pipeline computes. PEFT would copy x to fp32
    instead, once for each of q, k and v; autocast would compute every norm of the base in fp32, and keep it."""
    return F.linear(x, matrix.weight.to(x.dtype))


def optimizer_step(run, role):
    """Sums the gradient over processes, clips it, steps. Returns whether it did: a gradient that is not finite is skipped.

    The sum carries one process's nan to all of them, so that they skip together without asking each other.
    """
    params, optimizer = run.roles.parameters(role), run.optimizers[role]
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in params])
    if dist.is_initialized():
        dist.all_reduce(flat)
    norm = flat.norm()
    good = run.device == "meta" or bool(norm.isfinite())                    # the only wait for the GPU in an update
    if good:
        flat *= (run.cfg.grad_clip / (norm + 1e-6)).clamp(max=1)
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad = g.view_as(p)
        optimizer.step()
        note(run, 1, **{f"grad_{role}": norm})
    optimizer.zero_grad(set_to_none=True)
    run.bad[role], run.skipped = 0 if good else run.bad[role] + 1, run.skipped + (not good)
    if not good:
        terms = gather(run)                                                 # of all processes: one of them has the culprit
        source = [n for n, value in terms.items() if not math.isfinite(value)] or [f"backward pass of the {role}"]
        log(f"Iteration {run.done + 1}: the {role}'s gradient is not finite ({', '.join(source)}); this update is skipped.")
        if run.bad[role] >= run.cfg.max_bad_steps:
            raise UsageError(f"{run.bad[role]} updates of the {role} in a row were not finite ({', '.join(source)}; all terms: "
                             f"{terms}). The last checkpoint is sound: look at what is named here, or resume with a lower --lr.", code=1)
    return good


def update_ema(run):
    """Average of the generator's adapter, in fp32. Its decay warms up, so that the start is forgotten early."""
    run.ema_updates += 1
    decay = min(run.cfg.ema, (1 + run.ema_updates) / (10 + run.ema_updates))
    torch._foreach_lerp_(run.ema, [p.detach() for p in run.roles.parameters("generator")], 1 - decay)


@contextlib.contextmanager
def ema_weights(run):
    """The averaged generator in place of the raw one."""
    params = [p.data for p in run.roles.parameters("generator")]
    raw = [p.clone() for p in params]
    torch._foreach_copy_(params, run.ema)
    try:
        yield
    finally:
        torch._foreach_copy_(params, raw)


# Settings that do not change what is computed (beyond the order of a sum): a run may be resumed with others.
FREE_SETTINGS = {"out", "init", "iterations", "device", "cache", "weights_dir", "checkpointing", "no_vae_checkpointing",
                 "compile", "micro_batch", "max_bad_steps", "save_every", "keep", "sample_every", "watch", "force_resume",
                 "dry_run"}


def save_checkpoint(run):
    """OUT/stageN/checkpoint-000100: the averaged generator for diffusers, and state/ with all that resuming needs.

    Built beside under another name, flushed, renamed: a kill at any moment leaves whole checkpoints only. There is no
    random state in it because there is none (see key). Rank 0 writes: the other processes hold the same numbers.
    """
    if dist_info()[0] == 0:
        target = run.folder / f"checkpoint-{run.done:06d}"
        beside = run.folder / f".{target.name}.partial"
        shutil.rmtree(beside, ignore_errors=True)
        average = dict(zip(run.roles.named["generator"], run.ema))
        tensors = {f"ema.{n}": p for n, p in average.items()}
        for role, optimizer in run.optimizers.items():
            tensors.update({f"{role}.{n}": p.detach() for n, p in run.roles.named[role].items()})
            for i, moments in optimizer.state_dict()["state"].items():
                tensors.update({f"adam.{role}.{i}.{n}": m for n, m in moments.items()})
        counters = dict(iteration=run.done, ema_updates=run.ema_updates, bad=run.bad, skipped=run.skipped,
                        prompts=run.prompt_hash, config=dataclasses.asdict(run.cfg))
        save_lora(beside, average, run.cfg.lora_rank, run.cfg.lora_alpha, run.backbone.lora_targets, sampling_facts(run))
        write_atomic(beside / "state/state.safetensors", safetensors_bytes(tensors))
        write_atomic(beside / "state/run.json", json.dumps(counters, indent=1))
        files = [p for p in sorted(beside.rglob("*")) if p.is_file()]
        digests = {str(p.relative_to(beside)): file_hash(p) for p in files}
        write_atomic(beside / "state/manifest.json", json.dumps(digests, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(beside, target)
        older = [p for p in list_checkpoints(run.folder) if p.name <= target.name]      # a damaged newer one counts for nothing
        for old in older[run.cfg.keep:]:
            shutil.rmtree(old, ignore_errors=True)                          # NFS refuses while somebody reads it
    barrier()


def sampling_facts(run):
    """What a user of the exported adapter must know; it travels in the file's metadata."""
    cfg = run.cfg
    return dict(model=cfg.model, base=run.backbone.base, stage=cfg.stage, iteration=run.done, steps=cfg.steps, eta=cfg.eta,
                shift=run.backbone.shift, sigmas=run.times[:-1].tolist(), guidance=1.0, resolution=cfg.resolution,
                text_length=getattr(run.backbone, "text_length", 0), recipe=cfg.recipe)


def list_checkpoints(folder):
    """Checkpoint folders below, newest first. A copy called checkpoint-best is none of them."""
    return sorted(Path(folder).glob("checkpoint-" + 6 * "[0-9]"), reverse=True)


def file_hash(path):
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_checkpoint(path):
    """The newest whole checkpoint at or below a path, None if there is none. A damaged one is named and passed over."""
    path = Path(path)
    for folder in [path] if path.name.startswith("checkpoint-") else list_checkpoints(path):
        try:
            manifest = dict(json.loads((folder / "state/manifest.json").read_text()))
            files = [LORA_FILE, "state/run.json", "state/state.safetensors"]
            damage = [name for name in files if file_hash(folder / name) != manifest.get(name)]
        except (OSError, TypeError, ValueError) as error:
            damage = [str(error)]
        if not damage:
            return folder
        log(f"Checkpoint {folder} is damaged ({damage[0]}): looking for an older one.")
    return None


def load_adapter(run, role, tensors):
    """Copies LoRA matrices into a role, by name. Raises UsageError if they belong to another network or rank."""
    params = run.roles.named[role]
    if tensors.keys() != params.keys() or any(tensors[n].shape != p.shape for n, p in params.items()):
        raise UsageError(f"The checkpoint's {role} adapter does not fit --model {run.cfg.model} with --lora_rank "
                         f"{run.cfg.lora_rank}: take the model and the rank that it was trained with.")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(tensors[name])


def reads_checkpoint(function):
    """What a whole checkpoint lacks, another version of this program left out: one sentence instead of a KeyError."""
    @functools.wraps(function)
    def guarded(run, folder):
        try:
            function(run, folder)
        except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise UsageError(f"{folder} is not of this version of rtdmd.py ({error!r}): take another --out or --init.") from error
    return guarded


@reads_checkpoint
def check_init(run, folder):
    """Refuses a stage-1 checkpoint whose matrices would mean something else here. Before a weight is loaded."""
    info = load_lora(folder)[1]
    for flag, then in (("model", info["model"]), ("lora_rank", info["rank"]), ("lora_alpha", info["alpha"])):
        if then != getattr(run.cfg, flag):
            raise UsageError(f"{folder} was made with --{flag} {then}, not {getattr(run.cfg, flag)}: take that, or another --init.")


@reads_checkpoint
def load_init(run, folder):
    """Stage 2 goes on from stage 1: its averaged generator (what was looked at) and its raw fake score."""
    tensors = load_file(folder / "state/state.safetensors")
    pick = lambda kind: {n.removeprefix(kind): p for n, p in tensors.items() if n.startswith(kind)}
    load_adapter(run, "generator", pick("ema."))
    load_adapter(run, "fake", pick("fake."))
    log(f"Stage {run.cfg.stage} starts from {folder}.")


@reads_checkpoint
def check_settings(run, folder):
    """Refuses to resume with other settings than a checkpoint's, if they change the result. Before a weight is loaded."""
    saved = json.loads((folder / "state/run.json").read_text())
    now = dict(dataclasses.asdict(run.cfg), prompts=run.prompt_hash)
    then = dict(saved["config"], prompts=saved["prompts"])
    changed = [f"{n} {then.get(n)!r} -> {v!r}" for n, v in now.items() if n not in FREE_SETTINGS and then.get(n) != v]
    if changed and not run.cfg.force_resume:
        raise UsageError(f"{folder} was made with other settings ({'; '.join(changed)}): take those, or another --out, "
                         "or --force_resume.")


@reads_checkpoint
def load_state(run, folder):
    """Resumes a run where a checkpoint left it."""
    saved = json.loads((folder / "state/run.json").read_text())
    tensors = load_file(folder / "state/state.safetensors")
    pick = lambda kind: {n.removeprefix(kind): p for n, p in tensors.items() if n.startswith(kind)}
    for role, optimizer in run.optimizers.items():
        load_adapter(run, role, pick(f"{role}."))
        moments = {}
        for name, value in pick(f"adam.{role}.").items():
            i, moment = name.split(".")
            moments.setdefault(int(i), {})[moment] = value
        optimizer.load_state_dict(dict(state=moments, param_groups=optimizer.state_dict()["param_groups"]))
    torch._foreach_copy_(run.ema, [tensors[f"ema.{n}"].to(run.device) for n in run.roles.named["generator"]])
    run.done, run.ema_updates, run.bad, run.skipped = (saved[n] for n in ("iteration", "ema_updates", "bad", "skipped"))
    log(f"Resumed {folder}: both adapters, both optimisers, the average; {run.done} iterations are done.")


@contextlib.contextmanager
def claim(cfg):
    """Makes the run folder and locks it: two runs that write to one folder would destroy each other's checkpoints.

    Sweeps up what a killed run left half-written. A start that is refused leaves no new folder behind.
    """
    if cfg.dry_run or dist_info()[0] > 0:
        yield
        return
    folder = Path(cfg.out) / f"stage{cfg.stage}"
    try:
        made = next((p for p in [*reversed(folder.parents), folder] if not p.exists()), None)
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for rest in [*folder.rglob(".*.partial")]:
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink(missing_ok=True)
    except BlockingIOError:
        raise UsageError(f"Another run is writing to {folder}: wait for it, or take another --out.") from None
    except OSError as error:
        raise UsageError(f"Cannot write to {folder} ({error.strerror}): choose another --out.") from None
    try:
        yield
    finally:
        lock.close()
        if made and [p.name for p in folder.iterdir()] == [".lock"]:
            shutil.rmtree(made)


def prepare(cfg):
    """Everything that a stage needs, in one namespace. What can be refused is refused before a weight is loaded."""
    rank, _, world = dist_info()
    if cfg.stage == 2 and cfg.groups % world:
        raise UsageError(f"--groups {cfg.groups} does not split over {world} processes: take {-(-cfg.groups // world) * world}.")
    run = SimpleNamespace(cfg=cfg, folder=Path(cfg.out) / f"stage{cfg.stage}", done=0, ema_updates=0, skipped=0,
                          bad=dict(generator=0, fake=0), terms={}, stop=False, board=None)
    own = TINY_REWARDS if cfg.model == "tiny" else ()
    rewards, watched = parse_rewards(cfg.rewards, own), parse_rewards(cfg.watch, own, "--watch") if cfg.watch else []
    if cfg.random_weights and any(name not in (*REWARDS, *own) and ":" not in name for name, _ in rewards):
        rewards = [pair for pair in rewards if pair[0] in (*REWARDS, *own) or ":" in pair[0]]
        log(f"--random_weights: only {', '.join(name for name, _ in rewards)} can be made without a download.")
    few = min(cfg.max_prompts, 64) if cfg.dry_run else cfg.max_prompts      # embeddings of 25,000 take an hour
    run.prompts = ([f"prompt {i}" for i in range(8)] if cfg.random_weights else read_prompts(cfg.prompts, cfg.seed)[:few])
    run.prompt_hash = f"{len(run.prompts)} prompts, {key(run.prompts):016x}"
    found, init = None if cfg.dry_run else find_checkpoint(run.folder), None
    if found:
        check_settings(run, found)
    elif cfg.stage == 2 and not cfg.dry_run:
        start = Path(cfg.init or Path(cfg.out) / "stage1")
        if not (init := find_checkpoint(start)):
            raise UsageError(f"No stage-1 checkpoint at {start}: run --stage 1 with the same --out first, or give --init.")
        check_init(run, init)
    device = start_processes(cfg.device)
    agree(run, found or init)
    run.device = cfg.device = device
    run.backbone = load_backbone(cfg)
    run.roles = Roles(run.backbone, cfg)
    run.times = timestep_schedule(cfg.steps, run.backbone.shift)
    run.text = TextCache(run.backbone, Path(cfg.cache) / "text")
    run.text.prepare(run.prompts)
    find = lambda name: (eval_module().random_reward(name, cfg) if cfg.random_weights and name in REWARDS else
                         load_reward(name, cfg, getattr(run.backbone, "rewards", None)))
    run.rewards = {name: (find(name), weight) for name, weight in rewards} if cfg.stage == 2 else {}
    run.watched = {name: find(name) for name, _ in watched}
    rates = dict(generator=(cfg.lr, cfg.weight_decay), fake=(cfg.lr_fake, 0.0))
    run.optimizers = {role: torch.optim.AdamW(run.roles.parameters(role), lr, betas=(0.9, 0.999), weight_decay=decay)
                      for role, (lr, decay) in rates.items()}
    if init:
        load_init(run, init)
    run.ema = [p.detach().clone() for p in run.roles.parameters("generator")]
    if found:
        load_state(run, found)
    if rank == 0 and not cfg.dry_run:
        open_log(run)
    return run


def agree(run, start):
    """Refuses processes with other flags, prompts or another checkpoint to start from: their gradients would be added up
    all the same. (Several nodes need one --out that all of them see.)"""
    if dist.is_initialized():
        mine, all_of = (dataclasses.asdict(run.cfg), run.prompt_hash, start and start.name), [None] * dist.get_world_size()
        dist.all_gather_object(all_of, mine)
        if any(other != mine for other in all_of):
            raise UsageError("The processes differ in flags, prompts or the newest checkpoint: start all of them with one "
                             "command, and give an --out that all nodes see.")


def open_log(run):
    """The run folder begins with what made it: settings, versions, and this very file. metrics.jsonl loses the lines that
    a resumed run will write again."""
    versions = {n: importlib.metadata.version(n) for n in ("torch", "diffusers", "transformers", "peft", "open_clip_torch")}
    facts = dict(config=dataclasses.asdict(run.cfg), versions=versions, processes=dist_info()[2], prompts=run.prompt_hash,
                 git=git_state(), device=torch.cuda.get_device_name() if "cuda" in run.device else run.device)
    write_atomic(run.folder / "run.json", json.dumps(facts, indent=1))
    write_atomic(run.folder / "rtdmd.py", Path(__file__).read_bytes())
    path = run.folder / "metrics.jsonl"
    lines = re.findall(r'({"iteration": (\d+), .*}\n)', path.read_text(errors="replace") if path.exists() else "")
    write_atomic(path, "".join(line for line, iteration in lines if int(iteration) <= run.done))
    with contextlib.suppress(ImportError):                                  # the same numbers as curves, if it is installed
        from torch.utils.tensorboard import SummaryWriter
        run.board = SummaryWriter(run.folder / "tensorboard", purge_step=run.done + 1)


def git_state():
    """Commit of the source, with a + if it has changed since; empty outside a repository."""
    ask = lambda *words: subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    try:
        return ask("rev-parse", "HEAD").strip() + ("+" if ask("status", "--porcelain").strip() else "")
    except FileNotFoundError:
        return ""


def note(run, n, **values):
    """Adds means over n samples to this iteration's log. Tensors stay on the device: nothing waits for the GPU here."""
    for name, value in values.items():
        total, count = run.terms.get(name, (0.0, 0))
        run.terms[name] = (total + n * (value.detach() if torch.is_tensor(value) else value), count + n)


def gather(run):
    """This iteration's terms as floats, averaged over the samples of all processes."""
    sums = {n: (float(total), count) for n, (total, count) in run.terms.items()}
    parts = [sums]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, sums)
    pairs = {n: [p[n] for p in parts if n in p] for n in sorted(set().union(*parts))}
    return {n: sum(total for total, _ in pair) / sum(count for _, count in pair) for n, pair in pairs.items()}


def iterations(run):
    """Yields the iterations that are left. After each: a line in the log, now and then a panel, a checkpoint; a look at signals."""
    cfg = run.cfg
    last = cfg.dry_run or cfg.iterations
    bar = progress(range(run.done, last), last, f"stage {cfg.stage}", start=run.done)
    for it in bar:
        run.terms, start = {}, time.perf_counter()
        yield it
        run.done = it + 1
        if cfg.dry_run:
            continue
        row = dict(iteration=run.done, **gather(run), skipped=run.skipped)
        if run.done % cfg.sample_every == 0 or run.done == last:
            row.update(panel(run))
        row["seconds"] = time.perf_counter() - start
        bar.set_postfix_str(record(run, row))
        stop = agreed(run)
        if run.done % cfg.save_every == 0 or run.done == last or stop:
            save_checkpoint(run)
        if stop:
            log(f"Stopped by a signal after iteration {run.done}; the same command goes on from there.")
            return


def agreed(run):
    """Whether any process was asked to stop; all of them learn it, so that nobody waits for one that has left."""
    flag = torch.tensor(float(run.stop), device=run.device)
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def watch_signals(run):
    """SIGTERM and SIGINT end the run after this iteration, with a checkpoint and exit 0; a second SIGINT ends it at once.

    A second SIGTERM does not: a cluster sends it to every process, and torchrun sends it on to its own.
    """
    def handler(number, _):
        run.stop = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


def record(run, row):
    """Appends one JSON object to metrics.jsonl; returns the few numbers that tell a healthy run from a sick one."""
    row = {n: float(f"{v:.6g}") if isinstance(v, float) else v for n, v in row.items() if math.isfinite(v)}
    if dist_info()[0] == 0:
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items() if run.board else ():
            run.board.add_scalar(name, value, row["iteration"])
    show = [n for n in row if n in ("dm", "dsm", "grad_generator") or n.startswith(("reward_", "watch_"))]
    return " ".join(f"{n} {row[n]:.3g}" for n in show)


def panel(run):
    """Pictures of fixed prompts and noise from the averaged generator, and numbers that move when a reward is hacked:
    saturation (max - min over channels), contrast (std of grey), edges (mean difference of neighbours), the watched rewards."""
    prompts = sorted(run.prompts, key=lambda prompt: key("panel", prompt))[:16]
    _, normal = draw([key("panel", p) for p in prompts], 0, run.cfg.steps, run.backbone.latent_shape, run.device)
    with ema_weights(run), torch.no_grad():
        states, _ = roll_out(run, normal[0], normal[1:], prompts)
        parts = chunks(len(prompts), run.cfg.micro_batch)
        images = torch.cat([run.backbone.decode(states[-1][rows]).float() for rows in parts])
        watched = {f"watch_{n}": score(r, images, prompts).mean().item() for n, r in run.watched.items()}
    if dist_info()[0] == 0:
        save_grid(run.folder / "samples" / f"{run.done:06d}.png", images, columns=8)
    grey = images.mean(1)
    edges = grey.diff(dim=1).abs().mean() + grey.diff(dim=2).abs().mean()
    return dict(watched, saturation=(images.amax(1) - images.amin(1)).mean().item(), edges=edges.item(),
                contrast=grey.flatten(1).std(1).mean().item())


def save_grid(path, images, columns):
    """Writes images (B, 3, H, W) in [0, 1] as one PNG; small ones are enlarged to 64 pixels."""
    from PIL import Image
    zoom = max(1, 64 // images.shape[-1])
    images = F.pad(images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), (1, 1, 1, 1), value=1.0)
    blank = images.new_ones(-len(images) % columns, *images.shape[1:])
    B, _, H, W = (images := torch.cat([images, blank])).shape
    canvas = images.view(B // columns, columns, 3, H, W).permute(0, 3, 1, 4, 2).reshape(B // columns * H, columns * W, 3)
    buffer = io.BytesIO()
    Image.fromarray((canvas.cpu().numpy() * 255).round().astype(np.uint8)).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def phase(run, name):
    """A named part of an iteration. It costs nothing, but in a dry run eval.py's meter counts what happens inside."""
    return eval_module().CostMeter(run, name) if run.cfg.dry_run else contextlib.nullcontext()


# ----------------------------------------------------------------------------------------------------------------------
# 9. The two stages: Algorithm 1 (App. I), line for line
#
# run: cfg, backbone, roles (theta, phi, psi), text (cached embeddings), times (K+1,), optimizers, ema. From section 8:
# share(n) global indices of this process; draw(keys, u, m, ...) u uniforms and m normals a sample; chunks(n, size) slices;
# level(t, x) broadcasts t; note(run, n, ...) logs means over n samples; phase(run, ...) counts cost in a dry run.
# rollout is the mathematics, roll_out the same in chunks.
# ----------------------------------------------------------------------------------------------------------------------

def stage1(run):
    """Algorithm 1, lines 1-5: AC-DMD, the cold start.

    A rollout visits all K boundary states and each of them serves one fake update, so batch * fake_updates / K trajectories
    feed all fake updates of an iteration. (The released code rolls out anew for every update and keeps one state.)
    """
    cfg, K = run.cfg, run.cfg.steps
    block = cfg.batch // K                                                  # trajectories per block
    for it in iterations(run):
        # Line 2: roll out G_theta from noise.
        ids = share(block * cfg.fake_updates)
        prompts = [prompt_at(run, it * prompts_per_iteration(cfg) + i) for i in ids]
        read_ahead(run, it, prompts_per_iteration(cfg), [*ids, *(block * cfg.fake_updates + i for i in share(cfg.batch))])
        with phase(run, "rollout"):
            _, normal = draw([key(cfg.seed, 1, it, "rollout", i) for i in ids], 0, K, run.backbone.latent_shape, run.device)
            states, predictions = roll_out(run, normal[0], normal[1:], prompts)
        # Line 3: update phi on Eq. 12. Update u takes the k-th states of block u + k: every k in equal parts, and the
        # K states of one trajectory in different updates, if there are as many.
        with phase(run, "fake"):
            for u in range(cfg.fake_updates):
                pick = [(row, k) for row, i in enumerate(ids) for k in range(1, K + 1)
                        if (u + k - i // block) % cfg.fake_updates == 0]
                rows, k = [p[0] for p in pick], torch.tensor([p[1] for p in pick], dtype=torch.long)
                x_s, s = boundary_states(run, states[:, rows], predictions[:, rows], k)
                update_fake(run, it, u, x_s, s, k, [prompts[r] for r in rows], [ids[r] for r in rows], cfg.batch)
        # Line 4: update theta on Eq. 9.
        with phase(run, "generator"):
            update_generator(run, it)


def prompts_per_iteration(cfg):
    """Prompts that one iteration of stage 1 uses: for the fake score's rollout, then for the generator's."""
    return cfg.batch // cfg.steps * cfg.fake_updates + cfg.batch


def prompt_at(run, position):
    """The prompt at a position of an endless stream: the whole set over and over, each time in another order."""
    epoch, i = divmod(position, len(run.prompts))
    return run.prompts[epoch_order(run.cfg.seed, epoch, len(run.prompts))[i]]


def read_ahead(run, it, period, own):
    """Has the embeddings of this iteration, and then of the next, read while the network works. own: which of an
    iteration's `period` prompts are this process's."""
    run.text.prefetch([prompt_at(run, i * period + j) for i in (it, it + 1) for j in own])


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, n):
    """A permutation of range(n)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(key("order", seed, epoch))).tolist()


@torch.no_grad()
def roll_out(run, x, noise, prompts):
    """The generator's K steps, in chunks. x (L, ...), noise (K-1, L, ...) -> states (K+1, L, ...), x-predictions (K, L, ...)."""
    parts = [(x.new_zeros(run.cfg.steps + 1, 0, *x.shape[1:]), x.new_zeros(run.cfg.steps, 0, *x.shape[1:]))]
    for rows in chunks(len(x), 4 * run.cfg.micro_batch):                    # without activations four times as many fit
        cond = run.text.batch(prompts[rows], run.device)
        velocity = lambda x, t: run.roles.velocity("generator", x, t, cond)
        states, predictions = rollout(velocity, x[rows], noise[:, rows], run.times.to(run.device), run.cfg.eta)
        parts.append((torch.stack(states), torch.stack(predictions)))
    return (torch.cat(part, 1) for part in zip(*parts))


def boundary_states(run, states, predictions, k):
    """What is matched to the teacher after step k (B,), and its level: x_s = x_{t_k}, s = t_k (3.1). For --renoise dmd2 the
    x-predictions, taken for clean samples (App. K). states (K+1, B, ...), predictions (K, B, ...)."""
    if run.cfg.renoise == "dmd2":
        return predictions[k - 1, range(len(k))], torch.zeros(len(k))
    return states[k, range(len(k))], run.times[k].float()


def between(run, low, high, u):
    """low + u (high - low), u ~ U[0, 1), rounded to what the network can be told: t of Eqs. 8 and 10, t'' of Eq. 11."""
    return run.backbone.quantise(low + u * (high - low)).clamp(low, torch.as_tensor(high, device=u.device))


def update_fake(run, it, u, x_s, s, k, prompts, ids, total):
    """Lines 3 and 12: one AdamW step of phi on Eq. 12. x_s (B, ...) at levels s (B,), from step k (B,); `total` samples
    over all processes."""
    cfg, std = run.cfg, run.cfg.renoise                                     # dmd2 re-noises like markov, from s = 0
    for rows in chunks(len(x_s), cfg.micro_batch):
        keys = [key(cfg.seed, cfg.stage, it, "fake", u, i, j) for i, j in zip(ids[rows], k[rows].tolist())]
        uniform, (n, n_1, n_2) = draw(keys, 2, 3, x_s.shape[1:], run.device)
        x, s_x, cond = x_s[rows], level(s[rows], x_s), run.text.batch(prompts[rows], run.device)
        fake = lambda x, t: run.roles.velocity("fake", x, t, cond)
        t = between(run, s_x, 1.0, 0.01 + 0.98 * level(uniform[0], x))      # DEPARTURE 17: 1 % off both ends, then rounded
        x_t = renoise(x, s_x, t, n, std)
        v = fake(x_t, t)
        loss = ambient_dsm_loss(v, x, n, s_x, t, std)
        note(run, len(x), dsm=loss)
        if cfg.gamma > 0:
            if cfg.consistency_times == "local":                            # DEPARTURE 4: close, and inside [s, 1]
                t_next = between(run, torch.maximum(s_x, t - cfg.delta), t, level(uniform[1], x))
            else:                                                           # App. F: t' = t_k, t'' = t_{k+1}
                x_t, t, t_next = x, s_x.clamp_min(1e-6), level(run.times[(k[rows] + 1).clamp_max(cfg.steps)], x)
                v = fake(x_t, t)
            early = lambda half, dsm=loss: ((dsm + cfg.gamma * half) * len(x) / total).backward()       # Eq. 12
            consistency = consistency_loss(fake, x_t, v, t, t_next, n_1, n_2, cfg.kernel, cfg.eta, early=early)
            loss = cfg.gamma * consistency
            note(run, len(x), consistency=consistency)
        (loss * len(x) / total).backward()
    optimizer_step(run, "fake")


def matching_loss(run, x_s, s, cond, u, noise):
    """Eq. 9 at a fresh t in [s, 1] -> scalar. x_s (B, ...) with its graph, s (B, 1, ..), u (B, 1, ..) ~ U[0, 1)."""
    with torch.no_grad():
        t = between(run, s, 1.0, 0.01 + 0.98 * u)
        x_t = renoise(x_s, s, t, noise, run.cfg.renoise)
        v_teacher = run.roles.teacher(x_t, t, cond, run.text.batch([""], run.device))
        v_fake = run.roles.velocity("fake", x_t, t, cond)
    return dmd_loss(x_s, x_t, v_teacher, v_fake, s, t)


def update_generator(run, it):
    """Line 4: one AdamW step of theta on Eq. 9. Sample i trains step k = 1 + i mod K: k ~ U{1..K}, in exactly equal parts."""
    cfg, K = run.cfg, run.cfg.steps
    ids, first = share(cfg.batch), (it + 1) * prompts_per_iteration(cfg) - cfg.batch
    for rows in chunks(len(ids), cfg.micro_batch):
        mine = ids[rows]
        k = torch.tensor([1 + i % K for i in mine])
        # normal[0] starts the rollout, normal[k] is eps_k of its step k < K, normal[K] re-noises the result.
        keys = [key(cfg.seed, 1, it, "generator", i) for i in mine]
        uniform, normal = draw(keys, 1, K + 1, run.backbone.latent_shape, run.device)
        cond = run.text.batch([prompt_at(run, first + i) for i in mine], run.device)
        x = walk(run, normal, k, cond)
        t, t_next = level(run.times[k - 1], x), level(run.times[k], x)
        v = run.roles.velocity("generator", x, t, cond)                     # the one forward of the rollout with gradient
        if cfg.renoise == "dmd2":
            x_s, s = x0_from_velocity(x, v, t), torch.zeros_like(t)
        else:
            x_s, s = cps_step(x, v, t, t_next, normal[k, range(len(mine))], cfg.eta), t_next
        loss = matching_loss(run, x_s, s, cond, level(uniform[0], x), normal[K])
        (loss * len(mine) / cfg.batch).backward()
        note(run, len(mine), dm=loss)
    if optimizer_step(run, "generator"):
        update_ema(run)


@torch.no_grad()
def walk(run, normal, k, cond):
    """x_{t_{k-1}} of each sample, k (B,) its own step: the first k - 1 steps of the rollout, by those that need them."""
    x = normal[0].clone()
    for j in range(1, int(k.max())):
        live = (k > j).nonzero()[:, 0].to(x.device)
        t, t_next = run.times[j - 1].float(), run.times[j].float()
        some = {n: c[live] for n, c in cond.items()}
        v = run.roles.velocity("generator", x[live], t.expand(len(live)).to(x.device), some)
        x[live] = cps_step(x[live], v, t, t_next, normal[j][live], run.cfg.eta)
    return x


def stage2(run):
    """Algorithm 1, lines 6-14: the hybrid policy gradient, with the distribution matching of stage 1 as the leash.

    A group lives on one process. Rows of everything in b: the L = groups * N trajectories of this process.
    """
    cfg, K, N = run.cfg, run.cfg.steps, run.cfg.group_size
    for it in iterations(run):
        groups = share(cfg.groups)
        b = SimpleNamespace(ids=[g * N + n for g in groups for n in range(N)],
                            prompts=[prompt_at(run, it * cfg.groups + g) for g in groups for _ in range(N)])
        read_ahead(run, it, cfg.groups, groups)
        # Lines 7-9: for each prompt a subset S, noise by Eq. 16, N trajectories.
        with phase(run, "rollout"):
            start, noise, b.subsets = group_draws(run, it, groups)
            b.states, b.predictions = roll_out(run, start, noise, b.prompts)
        # Line 10: rewards and group-normalised advantages.
        with phase(run, "reward"):
            judge_groups(run, b)
        # Line 12: update phi on Eq. 12, with the states of this very rollout, every k in equal parts.
        with phase(run, "fake"):
            for u in range(cfg.fake_updates):
                k = torch.tensor([K if cfg.dm_steps == "last" else 1 + (i + it + u) % K for i in b.ids])
                x_s, s = boundary_states(run, b.states, b.predictions, k)
                update_fake(run, it, u, x_s, s, k, b.prompts, b.ids, cfg.groups * N)
        # Line 13: update theta on Eq. 18.
        with phase(run, "generator"):
            for epoch in range(cfg.inner_epochs):
                reinforce(run, it, epoch, b)


def group_draws(run, it, groups):
    """Lines 8 and 9 -> x_{t_0} (L, ...), noise by Eq. 16 (K-1, L, ...), S (L, M)."""
    cfg, shape = run.cfg, run.backbone.latent_shape
    start, noise, subsets = [], [], []
    for g in groups:
        generator = torch.Generator().manual_seed(key(cfg.seed, 2, it, "group", g))
        S = choose_steps(cfg.steps, cfg.subset_size, generator)
        own = range(1, cfg.steps) if cfg.independent_noise else S
        noise.append(group_noise(shape, own, cfg.group_size, cfg.steps, generator))
        first = torch.randn(1 if cfg.share_initial else cfg.group_size, *shape, generator=generator)
        start.append(first.expand(cfg.group_size, *shape))
        subsets += [S] * cfg.group_size
    return torch.cat(start).to(run.device), torch.cat(noise, 1).to(run.device), torch.tensor(subsets)


@torch.no_grad()
def judge_groups(run, b):
    """Line 10. b.advantages (L,): the sum over rewards of weight times A_i; b.scales: by reward, what its A_i was divided by (L,).

    Every process sees all rewards: for the global std, and for one log.
    """
    cfg, (rank, _, world) = run.cfg, dist_info()
    values = {name: [] for name in run.rewards}
    for rows in chunks(len(b.ids), 4 * cfg.micro_batch):                    # all images at once would be gigabytes
        images = run.backbone.decode(b.states[-1][rows])
        for name, (reward, _) in run.rewards.items():
            values[name].append(score(reward, images, b.prompts[rows]))
    b.advantages, b.scales, b.old = 0.0, {}, torch.zeros(len(b.ids), cfg.subset_size, device=run.device)
    for name, (_, weight) in run.rewards.items():
        rewards = gather_groups(torch.cat(values[name]).view(-1, cfg.group_size))
        scale = reward_scale(rewards, cfg.advantage_std, cfg.std_floor).expand(rewards.shape)
        advantages = group_advantages(rewards, cfg.advantage_std, cfg.std_floor)
        b.scales[name] = scale[rank::world].flatten()
        b.advantages = b.advantages + weight * advantages[rank::world].flatten()
        spread = rewards.std(1)
        note(run, 1, **{f"reward_{name}": rewards.mean(), f"std_{name}": spread.mean(),
                        f"flat_{name}": (spread <= cfg.std_floor).float().mean()})


def gather_groups(rewards):
    """(G / world, N) of each process -> (G, N) on all, in the order of the global group index."""
    if not dist.is_initialized():
        return rewards
    parts = [torch.empty_like(rewards) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rewards.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def reinforce(run, it, epoch, b):
    """Line 13: one AdamW step of theta on Eq. 18.

    Each trajectory costs M + 1 forwards with gradient, slots 0 .. M-1 for its steps in S and slot M for step K. The policy
    term lives on S, the pathwise term on K, the DM term on one of these M + 1, chosen so that every k is matched equally often.
    """
    cfg, M = run.cfg, run.cfg.subset_size
    total = cfg.groups * cfg.group_size
    for part in chunks(len(b.ids), cfg.micro_batch):
        keys = [key(cfg.seed, 2, it, "generator", epoch, i) for i in b.ids[part]]
        uniform, (noise,) = draw(keys, 2, 1, run.backbone.latent_shape, run.device)
        matched = matched_slots(cfg, uniform[0].tolist())
        for slot in range(M + 1):
            dropped = cfg.no_det if slot == M else cfg.no_policy
            use = [i for i, m in enumerate(matched) if m == slot or not dropped]
            if use:
                rows, here = [part.start + i for i in use], [j for j, i in enumerate(use) if matched[i] == slot]
                reinforce_slot(run, b, slot, rows, here, uniform[1][use], noise[use], epoch == 0, total)
    if optimizer_step(run, "generator"):
        update_ema(run)


def matched_slots(cfg, u):
    """Which of its M + 1 forwards each trajectory's DM term uses, -1 for none. u list of U[0, 1).

    Step K with probability 1/K, else one of S; S is uniform, so every k is matched equally often, as in stage 1.
    """
    if cfg.no_dmd:
        return [-1] * len(u)
    if cfg.dm_steps == "last":
        return [cfg.subset_size] * len(u)
    K, M = cfg.steps, cfg.subset_size
    return [M if x * K < 1 else int((x * K - 1) / (K - 1) * M) for x in u]


def reinforce_slot(run, b, slot, rows, here, u, noise, first, total):
    """Gradient of Eq. 18 through one step of each trajectory in rows; `here` picks those whose DM term falls on it.

    All losses are taken down to the velocity first, and then through the network once: so the share of each term in the
    gradient is known at no cost, and decoder and reward are freed before the network's backward pass.
    """
    cfg, K, M = run.cfg, run.cfg.steps, run.cfg.subset_size
    k = torch.full((len(rows),), K) if slot == M else b.subsets[rows, slot]
    x, x_next, prompts = b.states[k - 1, rows], b.states[k, rows], [b.prompts[r] for r in rows]
    t, t_next, cond = level(run.times[k - 1], x), level(run.times[k], x), run.text.batch(prompts, run.device)
    output = run.roles.velocity("generator", x, t, cond)
    v = output.detach().requires_grad_()
    mean, std = cps_mean_std(x, v, t, t_next, cfg.eta)
    losses = {}
    if slot < M and not cfg.no_policy:                                      # Eq. 17
        log_prob = gaussian_log_prob(x_next, mean, std)
        if cfg.log_prob == "unscaled":                                      # released: no 1 / (2 std^2)
            log_prob = -(x_next - mean).square().flatten(1).mean(1)
        if first:
            b.old[rows, slot] = log_prob.detach()                           # the same forward: the ratio is 1, not nearly 1
        # One column at a time: (K-1)/1 inside, /M here.
        policy = subgrpo_loss(log_prob[:, None], b.old[rows, slot][:, None], b.advantages[rows], K, cfg.clip) / M
        losses["policy"] = cfg.beta * cfg.policy_weight * policy * len(rows) / total
        note(run, len(rows), ratio_off=(log_prob.detach() - b.old[rows, slot]).expm1().abs().mean())
    if slot == M and not cfg.no_det:                                        # Eq. 15; mean is x_0 here
        det = pathwise_terms(run, mean, prompts, {n: scale[rows] for n, scale in b.scales.items()})
        losses["det"] = cfg.beta * cfg.det_weight * det * len(rows) / total
    if here:                                                                # Eq. 9
        x_s, s = (x_next + mean - mean.detach())[here], t_next[here]        # the rollout's state, with the gradient of its mean
        if cfg.renoise == "dmd2":
            x_s, s = x0_from_velocity(x, v, t)[here], torch.zeros_like(s)
        dm = matching_loss(run, x_s, s, {n: c[here] for n, c in cond.items()}, level(u[here], x), noise[here])
        losses["dm"] = cfg.dm_weight * dm * len(here) / total
        note(run, len(here), dm=dm)
    gradient = torch.zeros_like(v)
    while losses:
        name, loss = losses.popitem()
        part, = torch.autograd.grad(loss, v, retain_graph=bool(losses))
        n = len(here) if name == "dm" else len(rows)                        # samples that have this term
        note(run, n, **{f"push_{name}": total / n * part.flatten(1).norm(dim=1).sum()})
        gradient += part
    output.backward(gradient)


def pathwise_terms(run, x_0, prompts, scales):
    """Eq. 15 for each differentiable reward, divided by the std of its own advantage, weighted and added up."""
    images = run.backbone.decode(x_0)
    terms = [weight * pathwise_loss(score(reward, images, prompts), scales[name], x_0[0].numel())
             for name, (reward, weight) in run.rewards.items() if reward.differentiable]
    return sum(terms, start=0.0 * x_0.sum())


# ----------------------------------------------------------------------------------------------------------------------
# 10. Command line
# ----------------------------------------------------------------------------------------------------------------------

GROUPS = dict(stage="what to run", pretrained="network", steps="sampler (App. C)", gamma="AC-DMD (3.1)",
              rewards="hybrid policy gradient (3.2)", lr="optimisation (App. J)", save_every="records")     # first fields


class FlagParser(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors."""

    def error(self, message):
        raise UsageError(f"{message[0].upper()}{message[1:]}: see --help.")


def parse_flags(argv):
    """The flags that were given, by name. The dataclass is the only list of them; an unknown one is an error."""
    parser = FlagParser(description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    group = parser
    for field in dataclasses.fields(Config):
        group = parser.add_argument_group(GROUPS[field.name]) if field.name in GROUPS else group
        kind = dict(action="store_true") if isinstance(field.default, bool) else dict(type=type(field.default), metavar="")
        choices = f" ({' | '.join(map(str, field.metadata['choices']))})" if field.metadata["choices"] else ""
        text = f"{field.metadata['help']}{choices} [{field.default}]"
        group.add_argument(f"--{field.name}", help=text.replace("%", "%%"), **kind)
    return vars(parser.parse_args(argv))


def main(argv=None):
    """One stage, from the command line."""
    try:
        cfg = resolve(parse_flags(argv))
        with claim(cfg):
            run = prepare(cfg)
            watch_signals(run)
            (stage1 if cfg.stage == 1 else stage2)(run)
            if cfg.dry_run:
                eval_module().report_costs(run)
    except UsageError as error:
        print(f"rtdmd: {error}", file=sys.stderr)
        sys.exit(error.code)
    except torch.OutOfMemoryError:
        print(f"rtdmd: out of GPU memory: lower --micro_batch (it was {cfg.micro_batch} and changes nothing else), then add "
              "--checkpointing.", file=sys.stderr)
        sys.exit(1)
    except OSError as error:                                                # a disk is full, a folder vanished
        print(f"rtdmd: {error}: mend that, and the same command goes on from the newest checkpoint.", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Appendix. The tiny world (--model tiny): a text-to-image problem for a laptop, through the very same stages.
#
# 12 x 12 pictures of one or two coloured shapes and their captions; a 0.6 M parameter SD3Transformer2DModel in pixel
# space as teacher; two classifiers, A (the reward) and B (held out). A reader of the paper can stop here.
# ----------------------------------------------------------------------------------------------------------------------

COLOURS = {"red": (.85, .15, .15), "green": (.15, .7, .2), "blue": (.15, .25, .9), "yellow": (.9, .85, .15)}
SHAPES = ("circle", "square", "triangle")
RELATIONS = {"above": (1, 0), "below": (1, 1), "left of": (2, 0), "right of": (2, 1)}      # layout, does order swap
WORDS = ["<pad>", *COLOURS, *SHAPES, *RELATIONS]
TINY_TOKENS, TINY_WIDTH, TINY_SIDE = 6, 64, 12
TINY_REWARDS = ("attributes", "strict", "heldout")


def tiny_captions(held_out=False):
    """12 captions of one object and 462 of two, for all training; or 66 of two that no training sees."""
    objects = [f"a {c} {s}" for c in COLOURS for s in SHAPES]
    pairs = [f"{a} {r} {b}" for r in RELATIONS for a in objects for b in objects if a != b]
    return pairs[3::8] if held_out else objects + [p for i, p in enumerate(pairs) if i % 8 != 3]


@functools.cache
def parse_caption(caption):
    """(word ids (6,), attributes (5,)): layout 0 single, 1 stacked, 2 side by side; colour, shape of the upper or left
    object, then of the other one (-1: there is none). "a below b" and "b above a" are one picture. Raises UsageError."""
    text = caption.strip()
    if not text:
        return torch.zeros(TINY_TOKENS, dtype=torch.long), None            # the null condition
    relation = next((r for r in RELATIONS if f" {r} " in text), None)
    parts = text.split(f" {relation} ") if relation else [text]
    words = [p.split() for p in parts]
    if len(parts) > 2 or any(len(w) != 3 or w[0] != "a" or w[1] not in COLOURS or w[2] not in SHAPES for w in words):
        raise UsageError(f"The tiny world cannot draw {caption!r}: write 'a red circle', or 'a red circle above a blue square'.")
    objects = [(list(COLOURS).index(w[1]), SHAPES.index(w[2])) for w in words]
    tokens = [*words[0][1:], *([relation, *words[1][1:]] if relation else [])]
    layout, swap = RELATIONS[relation] if relation else (0, 0)
    first, second = objects[::-1] if swap else (objects * 2 if relation is None else objects)
    ids = [WORDS.index(w) for w in tokens] + [0] * (TINY_TOKENS - len(tokens))
    return torch.tensor(ids), torch.tensor([layout, *first, *(second if relation else (-1, -1))])


def render(captions, generator):
    """Pictures (B, 3, 12, 12) in [-1, 1] of captions: random place, size, shade and background, so that no two agree."""
    B, facts = len(captions), torch.stack([parse_caption(c)[1] for c in captions])
    rand = lambda *shape: torch.rand(B, *shape, generator=generator) * 2 - 1                    # U[-1, 1]
    axis = (torch.arange(TINY_SIDE) + 0.5) * 16 / TINY_SIDE
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    tilt = rand(2, 1, 1) * 0.15
    slope = (tilt[:, :1] * (x - 8) / 8 + tilt[:, 1:] * (y - 8) / 8).view(B, 1, TINY_SIDE, TINY_SIDE)
    image = 0.5 + 0.15 * rand(1, 1, 1) + slope + 0.04 * rand(3, 1, 1)
    palette = torch.tensor(list(COLOURS.values()))
    for which, (colour, shape) in enumerate(((1, 2), (3, 4))):
        present, single = facts[:, colour] >= 0, facts[:, 0] == 0
        shift = torch.where(single, 0.0, 3.8 * (2 * which - 1))             # from the centre, along the layout's axis
        jitter, along = rand(2), facts[:, :1] == torch.tensor([2, 1])       # along: is this axis, x or y, the layout's
        centre = 8 + torch.where(along, shift[:, None] + 0.5 * jitter, 1.2 * jitter)
        radius = torch.where(single, 4.2 + 0.6 * rand(), 3.3 + 0.4 * rand()).view(B, 1, 1)
        dx, dy = x - centre[:, 0].view(B, 1, 1), y - centre[:, 1].view(B, 1, 1)
        distance = torch.stack([((dx**2 + dy**2).sqrt() - 0.75 * radius).abs() - 0.35 * radius,      # a circle is a ring:
                                torch.maximum(dx.abs(), dy.abs()) - radius,     # a disc is a square on so few pixels
                                torch.maximum(0.87 * dx.abs() - 0.5 * dy, dy) - 0.62 * radius], 1)
        distance = distance[torch.arange(B), facts[:, shape].clamp_min(0)]
        cover = (0.5 - distance / 0.9).clamp(0, 1) * present.view(B, 1, 1)  # soft edge, about one pixel
        paint = palette[facts[:, colour].clamp_min(0)] + 0.07 * rand(3)
        image = torch.lerp(image, paint.view(B, 3, 1, 1), cover[:, None])
    return image.clamp(0, 1) * 2 - 1


class TinyText(nn.Module):
    """Word + position embedding, trained together with the teacher. ids (B, 6) -> tokens (B, 6, 64), pooled (B, 64)."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), TINY_WIDTH)
        self.places = nn.Parameter(torch.randn(TINY_TOKENS, TINY_WIDTH))    # as loud as the words, or order is not heard
        self.pool = nn.Linear(TINY_TOKENS * TINY_WIDTH, TINY_WIDTH)

    def forward(self, ids):
        tokens = self.words(ids) + self.places
        return {"encoder_hidden_states": tokens, "pooled_projections": self.pool(tokens.flatten(1))}


class TinyJudge(nn.Module):
    """Reads layout, colours and shapes off a picture. images (B, 3, 12, 12) in [-1, 1] -> logits (B, n) of five heads."""

    HEADS = (3, 4, 3, 4, 3)

    def __init__(self, width, act):
        super().__init__()
        conv = lambda i, o, stride: nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), act())
        self.body = nn.Sequential(conv(5, width, 1), conv(width, 2 * width, 2), conv(2 * width, 2 * width, 2),
                                  nn.Flatten(), nn.Linear(2 * width * 9, 64), act())
        self.heads = nn.ModuleList(nn.Linear(64, n) for n in self.HEADS)

    def forward(self, images):
        axis = torch.linspace(-1, 1, TINY_SIDE, device=images.device)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(len(images), -1, -1, -1)
        features = self.body(torch.cat([images, grid], 1))
        return [head(features) for head in self.heads]


def judge_scores(judge, images, captions):
    """Mean log-probability of the caption's attributes, each at least -4, and whether all are right (0 or 1): (B,), (B,).
    images (B, 3, 12, 12) in [0, 1]."""
    facts = torch.stack([parse_caption(c)[1] for c in captions]).to(images.device)
    logits = judge(images.float() * 2 - 1)
    mask = facts >= 0
    log_p = torch.stack([l.log_softmax(1).gather(1, f.clamp_min(0)[:, None])[:, 0] for l, f in zip(logits, facts.T)], 1)
    right = torch.stack([l.argmax(1) == f for l, f in zip(logits, facts.T)], 1) | ~mask
    return (log_p.clamp_min(-4) * mask).sum(1) / mask.sum(1), right.all(1).float()


def tiny_transformer():
    """The teacher's network. Zero initialised gates and output: without them it does not learn in minutes."""
    from diffusers import SD3Transformer2DModel
    net = SD3Transformer2DModel(sample_size=TINY_SIDE, patch_size=2, in_channels=3, out_channels=3, num_layers=3,
                                attention_head_dim=16, num_attention_heads=4, joint_attention_dim=TINY_WIDTH,
                                caption_projection_dim=TINY_WIDTH, pooled_projection_dim=TINY_WIDTH,
                                pos_embed_max_size=6)
    gates = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(gates):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return net


def tiny_velocity(net, x, t, cond):
    """SD3's calling convention: time in 0 .. 1000."""
    return net(hidden_states=x, timestep=1000 * t, return_dict=False, **cond)[0]


def train_tiny_judge(judge, label, steps, seed):
    """Cross-entropy on noisy renders: the noise keeps its gradient sane between the pictures."""
    generator = torch.Generator().manual_seed(seed)
    captions, optimizer = tiny_captions(), torch.optim.AdamW(judge.parameters(), 3e-3)
    for step in progress(range(steps), steps, label):
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
    """n captions, 30 % of them of a single object (those are the first 12 of the list)."""
    one, two = torch.randint(12, (n,), generator=generator), torch.randint(12, len(captions), (n,), generator=generator)
    return [captions[i] for i in torch.where(torch.rand(n, generator=generator) < 0.3, one, two)]


def train_tiny_teacher(net, text, steps, seed):
    """Flow matching, Eq. 3, with 10 % empty captions for classifier-free guidance; leaves averaged weights in net and text."""
    generator, captions = torch.Generator().manual_seed(seed), tiny_captions()
    params = [*net.parameters(), *text.parameters()]
    optimizer, mean = torch.optim.AdamW(params, 3e-3, betas=(.9, .99)), [p.detach().clone() for p in params]
    for step in progress(range(steps), steps, "tiny teacher"):
        lr = 3e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr
        batch = pick_captions(captions, 64, generator)
        x0 = render(batch, generator)
        empty = torch.rand(64, generator=generator) < 0.1
        ids = torch.stack([parse_caption("" if e else c)[0] for e, c in zip(empty, batch)])
        logit_normal = torch.sigmoid(1.1 * torch.randn(64, generator=generator))
        t = torch.where(torch.rand(64, generator=generator) < 0.7, logit_normal, torch.rand(64, generator=generator))
        noise = torch.randn(x0.shape, generator=generator)
        x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        loss = (tiny_velocity(net, x_t, t, text(ids)) - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        torch._foreach_lerp_(mean, [p.detach() for p in params], 0.005 if step > 200 else 1 / (step + 1))
    for p, m in zip(params, mean):
        p.data.copy_(m)


class TinyBackbone:
    """The tiny world behind the interface of the real backbones. Trains its teacher and judges on first use."""

    shift, latent_shape, default_prompts = 1.0, (3, TINY_SIDE, TINY_SIDE), "tiny"

    def __init__(self, cfg):
        torch.manual_seed(key("tiny world"))                                # the world is the same for every --seed
        net, text, A, B = tiny_transformer(), TinyText(), TinyJudge(32, nn.GELU), TinyJudge(24, nn.ReLU)
        parts = nn.ModuleDict(dict(net=net, text=text, reward=A, heldout=B))
        path = Path(cfg.cache) / f"tiny-{cfg.tiny_steps}.safetensors"
        if not path.exists() and dist_info()[0] == 0:
            steps = max(1, min(300, cfg.tiny_steps))
            train_tiny_judge(A, "tiny reward judge", steps, seed=1)
            train_tiny_judge(B, "tiny held-out judge", steps, seed=2)
            train_tiny_teacher(net, text, cfg.tiny_steps, seed=3)
            write_atomic(path, safetensors_bytes({n: p.contiguous() for n, p in parts.state_dict().items()}))
        barrier()
        try:
            parts.load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"{path} is damaged ({type(error).__name__}): delete it, and the tiny world is made anew.") from error
        parts.to(cfg.device).eval().requires_grad_(False)
        self.nets, self.text, self.judges = {"generator": net, "score": net}, text, {"reward": A, "heldout": B}
        self.base = self.text_key = path.stem
        self.lora_targets = attention_linears(net)
        self.rewards = {n: TinyReward(n, judge, output) for n, judge, output in zip(TINY_REWARDS, (A, A, B), (0, 1, 0))}

    def encode(self, prompts):
        device = self.text.places.device
        ids = torch.stack([parse_caption(p)[0] for p in prompts]).to(device)
        with torch.no_grad():
            return {n: c.cpu() for n, c in self.text(ids).items()}

    def free_text(self):
        pass

    def shift_for(self, steps):
        return 1.0

    def velocity(self, net, x, t, cond):
        return tiny_velocity(net, x, t, cond)

    def quantise(self, t):
        return t

    def decode(self, x):
        return (x / 2 + 0.5).clamp(0, 1)


class TinyReward:
    """A judge as reward: `attributes` (differentiable), `strict` (0 or 1, not differentiable), `heldout` (never trained on)."""

    def __init__(self, name, judge, output):
        self.name, self.judge, self.output, self.differentiable = name, judge, output, output == 0

    def __call__(self, images, prompts):
        return judge_scores(self.judge, images, prompts)[self.output]


if __name__ == "__main__":
    main()
