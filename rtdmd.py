"""RTDMD in one file: a 50-step text-to-image flow model becomes a 4-step one, tuned to human preference.

Stage 1 distils (AC-DMD): the generator's boundary states are matched to the teacher's, interval by interval.
Stage 2 reinforces (hybrid policy gradient): SubGRPO on the stochastic steps, reward gradients through the
last, deterministic step, distribution matching to stay near the teacher. Read it beside "Reinforcing Few-step
Generators via Reward-Tilted Distribution Matching". It is not a framework: copy what you need.

    laptop      bash train.sh  # the tiny world: both stages, a table, a picture
    1 GPU       python rtdmd.py --stage 1 --model sd3m
    8 GPUs      torchrun --nproc_per_node 8 rtdmd.py --stage 1 --model sd3m  # then --stage 2, same --out
    2 nodes     NNODES=2 NODE_RANK=0 MASTER_ADDR=host bash train.sh sd3m 8  # on the other node NODE_RANK=1
    no weights  python eval.py --dry_run 1 --stage 1 --model sd3m  # will it fit, how fast is it

Map  section  paper                functions
     1        2.1                  x0_from_velocity, eps_from_velocity, score_from_velocity
     2        App. C               timestep_schedule, cps_mean_std, cps_step, rollout, CPSScheduler
     3        3.1, App. B, D-F     renoise_coefficients, renoise, ambient_velocity_target, ambient_dsm_loss,
                                   reverse_step, consistency_loss, boundary_mean, dmd_loss
     4        3.2, App. G, H       choose_steps, group_noise, gaussian_log_prob, reward_scale,
                                   group_advantages, subgrpo_loss, pathwise_loss
     6        App. I, Algorithm 1  stage1, stage2
     5 is the configuration, 7 rewards, 8 backbones, 9 prompts, 10 plumbing, 11 the command line. For the
     CLIP rewards or your own this file is enough; eval.py has costs, ablations, the tiny world and more
     metrics, usable as rewards too.

Symbols  theta, phi    generator, fake score; psi: frozen teacher, guided with weight w
         k = 1..K      step; t_k: noise level after it, t_0 = 1, t_K = 0; eta: randomness of the sampler
         x_s           state after step k ("boundary state"), at level s = t_k
         x_t           x_s re-noised to a level t in [s, 1]: a x_s + kappa n, n new noise; a is alpha_k(t) of
                       3.1, and kappa stands in for its sigma_k(t) (departure 1)
         v, h          v(x, t) = E[eps - x_0 | x_t = x]; h = x - t v is the x-prediction, G_theta of 3.1
         m_psi, m_phi  E[x_s | x_t] under teacher and fake score; D = mean abs(x_s - m_psi) of a sample
         t', t''       levels of Eq. 11, t' - delta <= t'' <= t'; x', x'' are states there
         gamma, q      weight of the consistency term (Eq. 12); share of the fake updates that have it
         S, M, N       chosen stochastic steps, their number; trajectories per group (prompt)
         r, A, beta    reward, advantage, reward strength: the target is p_psi exp(beta r) / Z (Eq. 6); the
                       gradient of the KL to it is that of distribution matching (DM) minus beta times
                       that of E r (Eq. 7)
         det           the pathwise term: reward gradient through the deterministic step K (Eq. 15)

docs/departures.md numbers 23 departures from the paper or its released code, with reasons; DEPARTURE n in the
code marks where. The main ones: kappa adds variances (1), the reverse kernel of Eq. 11 is the Gaussian
bridge at the x-prediction (3), one forward gives old and new log pi (8), stage 2 matches every k (13).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
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
import uuid
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import torch
import torch._dynamo.utils
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------------------
# 1. Flow algebra (paper 2.1). Rectified path x_t = (1-t) x_0 + t eps, velocity v = E[eps - x_0 | x_t].
#
# Sections 1 to 4 hold pure functions (CPSScheduler apart): no globals, no configuration; noise, or the
# torch.Generator that draws it, is an argument. Levels t, s are numbers or tensors that broadcast against x.
# All compute in fp32 (the schedule in fp64) whatever comes in: bf16 has less than three decimal digits, so
# FLUX.2's t_1 = .9581 would become .957. Training does not call consistency_loss, ambient_velocity_target,
# eps_from_velocity and score_from_velocity; they are here to be read and copied.
# ------------------------------------------------------------------------------------------------------------

def fp32(*values):
    """Each value as an fp32 tensor, its autograd graph and device kept."""
    return [torch.as_tensor(a, dtype=torch.float32) for a in values]


def x0_from_velocity(x, v, t):
    """E[x_0 | x_t = x], the x-prediction (G_theta of 3.1). x, v (B, ...); t broadcasts against them."""
    x, v, t = fp32(x, v, t)
    return x - t * v


def eps_from_velocity(x, v, t):
    """E[eps | x_t = x]. Eq. 19 without its division by t: the same number, and finite at t = 0."""
    x, v, t = fp32(x, v, t)
    return x + (1 - t) * v


def score_from_velocity(x, v, t):
    """grad log p_t(x), Eq. 2 solved for the score (Eq. 1 for this path). Singular only at t = 0."""
    return -eps_from_velocity(x, v, t) / fp32(t)[0]


# ------------------------------------------------------------------------------------------------------------
# 2. Sampler (App. C)
# ------------------------------------------------------------------------------------------------------------

def timestep_schedule(steps, shift=1.0):
    """Levels t_0 = 1 > ... > t_K = 0, (K+1,) float64: shift u / (1 + (shift - 1) u), u a uniform grid.
    shift 3 (SD3) gives 1, .9, .75, .5, 0 for K = 4."""
    u = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    return shift * u / (1 + (shift - 1) * u)


def cps_mean_std(x, v, t, t_next, eta):
    """Eqs. 20 and 21: mean (B, ...) and std of x_{t_next}, given x and v at level t.

    t, t_next: numbers or (B, 1, ..); std, sigma_k of Eq. 13, has t_next's shape. eta 0 is an Euler step, eta
    1 re-noises the x-prediction. For every eta the result has signal coefficient 1 - t_next and noise
    coefficient t_next: "coefficient preserving"."""
    x, v, t, t_next = fp32(x, v, t, t_next)
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
    Returns K+1 states x_{t_0} .. x_{t_K} and the K x-predictions of the steps."""
    states, predictions = [x], []
    for k in range(1, len(times)):
        t, t_next = times[k - 1], times[k]
        v = velocity(states[-1], t.to(x.device, torch.float32).expand(len(x)))
        predictions.append(x0_from_velocity(states[-1], v, t))
        step_noise = noise[k - 1] if k < len(times) - 1 else 0.0
        states.append(cps_step(states[-1], v, t, t_next, step_noise, eta))
    return states, predictions


class CPSScheduler(diffusers.FlowMatchEulerDiscreteScheduler):
    """Eq. 21 for diffusers' own pipelines of SD3, FLUX, Z-Image. It can be pasted with fp32 and cps_mean_std.

        pipe.scheduler = CPSScheduler.from_config(pipe.scheduler.config, eta=0.9)
        pipe.scheduler.generator = torch.Generator().manual_seed(0)      # the noise of the steps
        image = pipe(prompt, num_inference_steps=4, guidance_scale=1).images[0]

    eta = 0 is the Euler step, eta = 1 fresh noise at every level (the parent's `stochastic_sampling=True`).
    Create it with from_config or from_pretrained. Pipelines do not pass their `generator` to `step`, so the
    noise of the steps has a generator of its own, the attribute; None means torch's global one. Put the old
    scheduler back before `pipe.save_pretrained`, or diffusers cannot load what was saved."""

    eta = 0.9                # randomness of a step, 0 to 1   (paper 4.1)
    generator = None         # a torch.Generator, or a list with one per image

    @classmethod
    def from_config(cls, config, eta=None, **options):
        """Takes the config of any flow-matching scheduler. eta: argument, else the config's, else .9."""
        fields = dict(config)
        known = fields.pop("eta", cls.eta)             # the parent warns of fields that it does not know
        scheduler = super().from_config(fields, **options)
        scheduler.eta = known if eta is None else eta
        scheduler.register_to_config(eta=scheduler.eta)
        return scheduler

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        """Levels 1, (n-1)/n ... 1/n shifted once, then 0. `sigmas`: levels BEFORE the shift, as in diffusers.

        The parent's default shifts twice: four steps of SD3 would be 1, .858, .602, .009, 0 and not
        1, .9, .75, .5, 0.  FLUX.2's pipeline passes these very levels itself, and its shift as `mu`."""
        if sigmas is None and timesteps is None:
            sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        super().set_timesteps(device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **unused):
        """x_t -> x_{t_next}. model_output is the velocity v, sample is x_t; the result has v's dtype."""
        if self.step_index is None:
            self._init_step_index(timestep)
        t, t_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        x, std = cps_mean_std(sample, model_output, t, t_next, self.eta)
        if self.eta > 0 and self.step_index < len(self.sigmas) - 2:      # the last step has no noise
            randn = diffusers.utils.torch_utils.randn_tensor      # in full: a pasted class imports no more
            x = x + std * randn(x.shape, generator or self.generator, x.device, torch.float32)
        self._step_index += 1
        x = x.to(model_output.dtype)
        return diffusers.schedulers.scheduling_utils.SchedulerOutput(prev_sample=x) if return_dict else (x,)


# ------------------------------------------------------------------------------------------------------------
# 3. AC-DMD (3.1, App. B, D, E, F). s: level t_k of a boundary state x_s; t in [s, 1]: level after re-noising.
# ------------------------------------------------------------------------------------------------------------

def renoise_coefficients(s, t):
    """a = alpha_k(t) and kappa = sigma_k(t) of 3.1 (above Eq. 8) and App. B: x_t = a x_s + kappa n brings
    level s to level t.

    DEPARTURE 1: new and old noise are independent, so variances add, a^2 s^2 + kappa^2 = t^2. The paper's
    sigma_k = (t-s)/(1-s) adds standard deviations, and x_t would lie below level t. kappa^2 is written as
    (t - a s)(t + a s) with t - a s = (t-s)/(1-s): a difference of squares loses its digits as t -> s."""
    s, t = fp32(s, t)
    a = (1 - t) / (1 - s)
    return a, ((t - s) / (1 - s) * (t + a * s)).clamp_min(0).sqrt()


def renoise(x_s, s, t, noise):
    """x_t ~ q_t^(k)(. | x_s), the Gaussian corruption of 3.1 (above Eq. 8). x_s, noise (B, ...)."""
    x_s, noise = fp32(x_s, noise)
    a, kappa = renoise_coefficients(s, t)
    return a * x_s + kappa * noise


def ambient_scale(s, t):
    """c of the target v* = -x_s/(1-s) + c n: the velocity that Eq. 2 assigns to Eq. 10's score.

    Derivation: put that score, -n/kappa, into Eq. 2 and collect terms: c = (t - kappa^2) / ((1-t) kappa). The
    code has the same value in a form that is finite at t = 1. c >= 1; c = 1 for s = 0 (flow matching); for
    s > 0, c -> infinity as t -> s."""
    s, t = fp32(s, t)
    a, kappa = renoise_coefficients(s, t)
    return (t + a * s * s / (1 - s)) / kappa


def ambient_velocity_target(x_s, noise, s, t):
    """Regression target of v_phi at x_t = a x_s + kappa n: v*, (B, ...). At s = 0 it is n - x_0 of Eq. 5."""
    x_s, noise, s = fp32(x_s, noise, s)
    return -x_s / (1 - s) + ambient_scale(s, t) * noise


def ambient_dsm_loss(v_fake, x_s, noise, s, t):
    """Eq. 10, as a mean over dimensions (DEPARTURE 5) -> scalar. v_fake = v_phi(x_t, t), x_s, noise (B, ...).

    |v_phi - v*|^2 is divided by the variance of v* given x_0, c^2 + b^2 with b = s / (1-s). The loss is of
    order one at every (s, t), is Eq. 5 at s = 0, and stays finite as t -> s > 0, where v* grows as 1/kappa.
    In Eq. 10, omega_k = (t/(1-t))^2 over that variance. The minimiser is the marginal score (App. D)."""
    v_fake, x_s, noise, s = fp32(v_fake, x_s, noise, s)
    c, b = ambient_scale(s, t), s / (1 - s)
    residual = (v_fake + x_s / (1 - s)) / c - noise                        # (v_phi - v*) / c
    return (residual.square() / (1 + (b / c).square())).mean()


def reverse_step(x, v, t, t_next, noise, kernel="posterior", eta=None):
    """x'' ~ p_phi(x_t'' | x_t'), the reverse kernel of Eq. 11. x, v, noise (B, ...); t' = t >= t_next = t''.

    "posterior": the Gaussian bridge q(x'' | x', x_0) with the x-prediction for x_0, which is p(x'' | x') to
    first order in t' - t''; it is Eq. 20 with cos = t''(1-t') / (t'(1-t'')). "cps": Eq. 20 at a fixed eta, as
    released; then Eq. 11 is not 0 at the true score, even for t'' -> t' (DEPARTURE 3). The 1e-9 avoids
    0/0 at t' = t'' = 1, to which bf16 may round a level."""
    x, v, t, t_next, noise = fp32(x, v, t, t_next, noise)
    posterior = t_next * (1 - t + 1e-9) / (t * (1 - t_next + 1e-9))
    cos = math.cos(eta * math.pi / 2) if kernel == "cps" else posterior
    sin = torch.as_tensor(1 - cos * cos).clamp_min(0).sqrt()
    return (1 - t_next) * (x - t * v) + t_next * (cos * (x + (1 - t) * v) + sin * noise)


def consistency_loss(fake, x, v, t, t_next, noise_1, noise_2, kernel="posterior", eta=None):
    """Eq. 22 (App. F) -> scalar: estimates |h(x', t') - E h(x'', t'')|^2 from two independent draws of x''.

    fake(x, t) -> v_phi;  x, v (B, ...) at level t' = t, v = fake(x, t) with its graph;  t, t_next numbers or
    (B, 1, ..);  noise_1, noise_2 (B, ...) independent;  kernel and eta as in reverse_step. The product of two
    draws is unbiased for the squared norm of the mean; the square of one draw would add the variance of
    h(x''). The estimate may be negative. The draws carry no gradient (DEPARTURE 21): only h is trained.
    (Training does not call this: update_fake takes a gradient of the same expectation, in two halves.)"""
    x, v, t, t_next = fp32(x, v, t, t_next)
    draws = (reverse_step(x.detach(), v.detach(), t, t_next, n, kernel, eta) for n in (noise_1, noise_2))
    d_1, d_2 = (x0_from_velocity(x_next, fake(x_next, t_next), t_next) - (x - t * v) for x_next in draws)
    return (d_1 * d_2).mean()


def boundary_mean(x_t, v, s, t):
    """E[x_s | x_t] under velocity v (Tweedie, App. B). x_t, v (B, ...).
    (x_t + kappa^2 score) / a, written without the division by a, which is 0 at t = 1."""
    x_t, v, s, t = fp32(x_t, v, s, t)
    a = (1 - t) / (1 - s)
    return (1 - s) * (x_t - t * v) + (a * s * s / t) * (x_t + (1 - t) * v)


def dmd_loss(x_s, x_t, v_teacher, v_fake, s, t):
    """Eq. 9 -> scalar. Its gradient with respect to x_s is g / x_s.numel(), g = (m_phi - m_psi) / D: Eq. 9
    with lambda_k alpha_k = kappa^2 / (a D), D of each sample (DEPARTURE 6); DMD (Eq. 4) at s = 0.

    x_s (B, ...) with its graph; x_t = renoise(x_s); velocities at (x_t, t), treated as constants; s, t
    numbers or (B, 1, ..). g points from the teacher's boundary mean to the fake score's, so descent moves x_s
    towards the teacher; D is DMD's normaliser. (x_s - stop(x_s - g))^2 / 2 has the gradient g."""
    x_s, = fp32(x_s)
    with torch.no_grad():
        m_fake, m_teacher = (boundary_mean(x_t, v, s, t) for v in (v_fake, v_teacher))
        D = (x_s - m_teacher).abs().mean(dim=tuple(range(1, x_s.dim())), keepdim=True)
        g = (m_fake - m_teacher) / D.clamp_min(1e-3)  # no blow-up where the student is at its target
    return 0.5 * (x_s - (x_s - g).detach()).square().mean()


# ------------------------------------------------------------------------------------------------------------
# 4. Hybrid policy gradient (3.2, App. G, H). Steps 1 .. K-1 are Gaussian policies, step K is deterministic.
# ------------------------------------------------------------------------------------------------------------

def choose_steps(steps, subset_size, generator):
    """S of 3.2: sorted list of subset_size of the stochastic steps {1 .. K-1}; generator: torch.Generator."""
    return sorted((torch.randperm(steps - 1, generator=generator)[:subset_size] + 1).tolist())


def group_noise(shape, selected, group_size, steps, generator):
    """Eq. 16: eps_k of a group (K-1, N, *shape): one draw per member at the steps in `selected`, one common
    draw at the others. The start x_{t_0} is not in Eq. 16: independent for every member (DEPARTURE 10)."""
    noise = torch.randn(steps - 1, group_size, *shape, generator=generator)
    shared = [k - 1 for k in range(1, steps) if k not in selected]
    noise[shared] = noise[shared, :1]
    return noise


def gaussian_log_prob(x_next, mean, std):
    """log pi of Eq. 13 (App. H), a mean over dimensions (DEPARTURE 7): x_next, mean (B, ...) -> (B,)."""
    x_next, mean, std = fp32(x_next, mean, std)
    log_density = -0.5 * ((x_next - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


def reward_scale(rewards, std="group", floor=1e-4):
    """What centred rewards (G, N) are divided by. std "group": each group's std (over N-1), (G, 1); "global":
    that of all rewards, (). The floor is for groups whose scores are equal up to rounding."""
    rewards, = fp32(rewards)
    return (rewards.std(1, keepdim=True) if std == "group" else rewards.std()).clamp_min(floor)


def group_advantages(rewards, std="group", floor=1e-4):
    """A_i of 3.2 and App. H: (G, N) -> (G, N), rewards of N trajectories for each of G prompts.
    std="none": r_i less the mean of the N-1 others, which is N/(N-1) (r_i - mean of all) (DEPARTURE 12)."""
    rewards, = fp32(rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    if std == "none":
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)
    return centred / reward_scale(rewards, std, floor)


def subgrpo_loss(log_prob, old_log_prob, advantages, steps, clip):
    """Loss whose gradient is minus Eq. 17 (per dimension), -> scalar. log_prob, old_log_prob (B, M): a column
    per step of S; advantages (B,).

    (K-1)/M (DEPARTURE 9) makes the sum over S an unbiased estimate of that over all K-1 steps, naive GRPO
    (Eq. 31), if the divisor of the advantages does not depend on S. The std of a group does
    (docs/departures.md, 11). The clip is PPO's; the ratio is 1 in a rollout's first update."""
    ratio, A = torch.exp(log_prob.float() - old_log_prob.float()), advantages[:, None].float()
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    return -(steps - 1) / log_prob.shape[1] * surrogate.sum(1).mean()


def pathwise_loss(reward, scale=1.0, dims=1):
    """Loss whose gradient is minus Eq. 15 divided by dims, -> scalar. reward (B,) = r(G(x_{t_{K-1}})).

    x_{t_{K-1}} must enter detached: its dependence on theta is already in the policy term (App. G.2), and a
    graph here would count it twice. Dividing by scale (B,) and dims gives the units of the policy term:
    rewards per std, log-densities per dimension (DEPARTURE 11)."""
    return -(reward.float() / scale).mean() / dims


# ------------------------------------------------------------------------------------------------------------
# 5. Configuration. Each help text gives the unit of a setting and the source of its default (none: ours).
# ------------------------------------------------------------------------------------------------------------

class UsageError(Exception):
    """Bad input, or a run that cannot go on: one sentence that says what to do. main prints it."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def explained(what, remedy):
    """Foreign code and damaged files raise anything; here it becomes one sentence. what: a text, or a
    function that gives it when it is needed."""
    try:
        yield
    except (UsageError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, RuntimeError) and re.search(FAULTS[0][0], str(error)):     # out of memory, too
            raise
        reason = " ".join(repr(error).split())[:160]
        raise UsageError(f"{what() if callable(what) else what}: {reason}; {remedy}.") from error


def opt(default, help, **flag):
    """A dataclass field with its help text; flag: what argparse is told of it beyond its type."""
    return dataclasses.field(default=default, metadata=dict(help=help, flag=flag))


@dataclasses.dataclass
class Config:
    """Every setting. The command line is made from it."""

    # ---- What to run
    stage: int = opt(1, "1 distils (AC-DMD), 2 reinforces (hybrid policy gradient)", choices=(1, 2))
    model: str = opt("tiny", "tiny, sd3m, sd35m, sd35l, flux1, flux2-4b, flux2-9b, zimage, or module:Class; "
                     "its row of the table MODELS overrides the defaults in brackets")
    out: str = opt("runs/MODEL", "run folder; stage 1 and stage 2 share it")
    init: str = opt("", "stage 2: checkpoint of stage 1 to start from (default: the newest under --out)")
    iterations: int = opt(0, "passes of Algorithm 1's loop; 0: the stage's own (paper 4.1: 1500, then 1000)")
    seed: int = opt(0, "the only source of randomness")
    device: str = opt("", "cuda or cpu; default: cuda if there is one")
    prompts: str = opt("pickapic", "file (.txt .jsonl .csv .tsv .parquet), module:attribute, or pickapic "
                       "(released; paper 4.1 for SD3-M: text-to-image-2M), drawbench, partiprompts, hpdv2")
    max_prompts: int = opt(25000, "prompts taken from the set; their embeddings go to disk, 2 to 8 MB each")
    cache: str = opt("runs/cache", "text embeddings, the tiny world's teacher and judges; shared by all runs")
    # ---- Network
    pretrained: str = opt("", "local folder or hub id instead of the model's own; if two: GENERATOR,TEACHER")
    weights_dir: str = opt("", "folder searched for models and reward checkpoints before the hub (offline)")
    resolution: int = opt(512, "pixels, width and height (paper 4.1; its Table 1 uses 1024)")
    text_length: int = opt(0, "tokens of the long text encoder; 0: the pipeline's (SD3 256, FLUX.2 512)")
    guidance: float = opt(1.0, "w of the teacher's guidance, 1 is none; the table MODELS sets it (tiny: 1.5)")
    dtype: str = opt("", "bf16 or fp32, of the frozen network; default: by device", choices=("bf16", "fp32"))
    lora_rank: int = opt(64, "r (paper 4.1)")
    lora_alpha: int = opt(32, "alpha (paper 4.1): the update is scaled by alpha / r")
    checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, slower")
    no_compile: bool = opt(False, "on cuda: do not torch.compile SD3's blocks (a minute or two at the start)")
    # ---- Sampler (App. C)
    steps: int = opt(4, "K (paper 3.1)")
    eta: float = opt(0.9, "CPS randomness: 0 Euler ODE, 1 consistency sampler (paper 4.1, App. K)")
    # ---- AC-DMD (3.1)
    gamma: float = opt(0.01, "weight of the consistency term in Eq. 12 (paper 4.1); 0 is A-DMD")
    consistency_share: float = opt(0.25, "q: share of fake updates with the consistency term (ours); 1: all")
    delta: float = opt(0.1, "largest t' - t'' of the consistency term, in noise level (ours; released: 0.2)")
    batch: int = opt(72, "samples per update in stage 1, over all processes (released: 9 x 8 GPUs)")
    fake_updates: int = opt(0, "fake updates per iteration; 0: the stage's own (released: 10, then 1)")
    # ---- Hybrid policy gradient (3.2)
    rewards: str = opt("hpsv2=1,clipscore=1", "name=weight,...; own: module:attribute=weight (paper 4.1)")
    groups: int = opt(48, "prompts per iteration, over all processes (paper 4.1)")
    group_size: int = opt(24, "N, trajectories per prompt (paper 4.1)")
    subset_size: int = opt(2, "M, size of S (paper 4.3); K-1 is naive GRPO")
    beta: float = opt(1.0, "reward strength, Eq. 6, in our units (App. J; DEPARTURE 20)")
    policy_weight: float = opt(1.0, "weight of Eq. 17 inside Eq. 18; 0 leaves the term out")
    det_weight: float = opt(1.0, "weight of Eq. 15 inside Eq. 18; 0 leaves the term out")
    dm_weight: float = opt(1.0, "weight of the matching term inside Eq. 18; 0: no matching, no fake score")
    std_floor: float = opt(1e-4, "least std a reward is divided by, unless it has its own .std_floor (ours)")
    clip: float = opt(1e-5, "PPO clip on exp(mean of the log-ratio over dimensions) (App. J)")
    inner_epochs: int = opt(1, "generator updates per rollout; the ratio is exactly 1 in the first")
    # ---- Optimisation (App. J)
    lr: float = opt(0.0, "generator; 0: the stage's own (3e-5, then 3e-6; FLUX.2, Z-Image 1e-6, then 3e-6)")
    lr_fake: float = opt(0.0, "fake score; 0: the stage's own (3e-5; FLUX.2 and Z-Image 1e-6)")
    weight_decay: float = opt(0.0, "AdamW's, generator (released stage 2: 1e-4)")
    grad_clip: float = opt(1.0, "gradient norm, per adapter (released)")
    ema: float = opt(0.95, "decay per generator update of the exported weights (ours; released .904, .81)")
    micro_batch: int = opt(0, "samples per pass with gradient, per process; changes no result; 0: what fits")
    max_bad_steps: int = opt(5, "stop after so many non-finite updates in a row")
    # ---- Records
    save_every: int = opt(50, "iterations between checkpoints")
    keep: int = opt(2, "checkpoints kept whole, to resume from; older ones keep their exported adapter")
    sample_every: int = opt(25, "iterations between panels: pictures of the same prompts and noise each time")
    watch: str = opt("", "rewards measured on the panel, not trained on: they show reward hacking first")
    force_resume: bool = opt(False, "resume although settings that change the result have changed")


# Differences from the defaults above; what stands under the key 1 or 2 holds for that stage only. Guidance w
# is as released, but for sd35l (ours) and zimage (its pipeline's 4, plus 1). The tiny world and other classes
# that are given as module:Class have their row in the attribute `settings`.
STAGES = {1: dict(iterations=1500, lr=3e-5, lr_fake=3e-5, fake_updates=10),  # paper 4.1; App. J; released
          2: dict(iterations=1000, lr=3e-6, lr_fake=3e-5, fake_updates=1)}
CLIP_REWARDS = "hpsv2=1,clipscore=1,pickscore=1"  # paper 4.3
MODELS = {
    "sd3m": {"pretrained": "stabilityai/stable-diffusion-3-medium-diffusers", "guidance": 7.0},
    "sd35m": {"pretrained": "stabilityai/stable-diffusion-3.5-medium", "guidance": 4.5,
              "rewards": CLIP_REWARDS},
    "sd35l": {"pretrained": "stabilityai/stable-diffusion-3.5-large", "guidance": 3.5,
              "rewards": CLIP_REWARDS},
    "flux1": {"pretrained": "black-forest-labs/FLUX.1-dev", "guidance": 3.5, "rewards": CLIP_REWARDS,
              2: dict(groups=64)},  # groups: released
    "flux2-4b": {"pretrained": "black-forest-labs/FLUX.2-klein-4B,black-forest-labs/FLUX.2-klein-base-4B",
                 "guidance": 4.0, "rewards": f"{CLIP_REWARDS},geneval=1",
                 1: dict(lr=1e-6, lr_fake=1e-6), 2: dict(lr_fake=1e-6, groups=64)},  # App. J, paper 4.1
    "zimage": {"pretrained": "Tongyi-MAI/Z-Image-Turbo,Tongyi-MAI/Z-Image", "guidance": 5.0,
               "rewards": CLIP_REWARDS,  # ours
               1: dict(lr=1e-6, lr_fake=1e-6), 2: dict(lr_fake=1e-6)},  # as FLUX.2: theta starts distilled
}
MODELS["flux2-9b"] = MODELS["flux2-4b"] | dict(  # the paper has no number for the 9B
    pretrained="black-forest-labs/FLUX.2-klein-9B,black-forest-labs/FLUX.2-klein-base-9B")


def resolve(flags):
    """Config from the flags that were given: default < STAGES < MODELS < flag. Raises UsageError."""
    stage, model = (flags.get(name, getattr(Config, name)) for name in ("stage", "model"))
    row = MODELS.get(model) or getattr(backbone_class(model), "settings", {})
    values = dict(STAGES[stage], out=f"runs/{model.split(':')[-1]}")
    values.update({n: v for n, v in row.items() if isinstance(n, str)}, **row.get(stage, {}))
    values.update({n: v for n, v in flags.items() if v != 0 or n not in STAGES[stage]})  # 0: the default
    cfg = Config(**values)
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cfg.dtype = cfg.dtype or ("fp32" if cfg.device == "cpu" else "bf16")
    cfg.no_compile |= not getattr(backbone_class(model), "compiles", False)  # docs/costs.md says why
    check(cfg)
    return cfg


def find_named(name, what, known={}):
    """What `name` stands for: its entry in the table `known`, or itself. If that is module:attribute, the
    attribute is imported. The module may lie in the current folder, beside this file, or among packages."""
    if name not in known and ":" not in name:
        raise UsageError(f"{what} {name!r} is unknown: take one of {', '.join(known)}, or module:attribute.")
    if not isinstance(found := known.get(name, name), str):
        return found
    module, _, attribute = found.partition(":")
    # The running program is called __main__; a module that imports it by name would get a second copy.
    program = sys.modules["__main__"]
    sys.modules.setdefault(Path(getattr(program, "__file__", None) or "none").stem, program)
    sys.path += [p for p in (os.getcwd(), str(Path(__file__).resolve().parent)) if p not in sys.path]
    with explained(f"{what} {name}", f"correct it, or put {module}.py into {os.getcwd()}, beside "
                   f"{Path(__file__).name} or among the packages"):
        return getattr(importlib.import_module(module), attribute)


# Bounds. Without an entry here whole numbers lie in 1 .. 10^9 and others in 0 .. 10^6.
LEAST = dict(micro_batch=0, seed=0, text_length=0, steps=2, group_size=2, resolution=8)
MOST = dict(eta=1, ema=1, delta=1, consistency_share=1, lora_rank=4096, steps=1000, batch=10**6, groups=10**5,
            group_size=10**4, fake_updates=10**4, inner_epochs=10**4, resolution=10**5, text_length=10**4)


def check(cfg):
    """Values out of range and contradictions, before anything is loaded. Raises UsageError."""
    for field in dataclasses.fields(cfg):
        name, value, is_int = field.name, getattr(cfg, field.name), field.type == "int"  # the type is text
        least, most = LEAST.get(name, int(is_int)), MOST.get(name, 10**9 if is_int else 10**6)
        if field.type in ("int", "float") and not least <= value <= most:
            raise UsageError(f"--{name} must be at least {least} and at most {most}, not {value}.")
    stage2, gpus, (_, local, world) = cfg.stage == 2, torch.cuda.device_count(), dist_info()
    for wrong, sentence in (
            (0 in (cfg.clip, cfg.grad_clip, cfg.delta, cfg.consistency_share),
             "--clip, --grad_clip, --delta and --consistency_share must be above 0."),
            (not stage2 and cfg.batch % cfg.steps,
             f"--batch {cfg.batch} must be a multiple of --steps {cfg.steps}: every k gets an equal share."),
            (stage2 and cfg.subset_size >= cfg.steps,
             f"--subset_size {cfg.subset_size}: there are only {cfg.steps - 1} stochastic steps."),
            (stage2 and cfg.groups % world, f"--groups {cfg.groups} does not split over {world} processes: "
             f"take {-(-cfg.groups // world) * world}."),
            (stage2 and cfg.eta == 0 and cfg.policy_weight,
             "--eta 0 leaves no stochastic step to reinforce: give --eta above 0 or --policy_weight 0."),
            (stage2 and not (cfg.dm_weight or cfg.beta and (cfg.policy_weight or cfg.det_weight)),
             "--dm_weight 0 with --beta 0, or with both other weights 0, leaves nothing to train."),
            (stage2 and re.search(r"(^|,)\s*geneval\s*(,|=|$)", cfg.rewards) and cfg.prompts[-6:] != ".jsonl",
             "--rewards geneval must know what pictures have to show: give --prompts FILE.jsonl of its rows "
             "(docs/scores.md says how to make one), or other --rewards."),
            (cfg.device != "cpu" and (cfg.device != "cuda" or gpus <= local),
             f"--device {cfg.device}: take cpu, or cuda with a GPU for each process; PyTorch sees {gpus} "
             "(CUDA_VISIBLE_DEVICES chooses among several)."),
            (not (cfg.out and cfg.cache), "--out and --cache must name a folder.")):
        if wrong:
            raise UsageError(sentence)


# ------------------------------------------------------------------------------------------------------------
# 6. The two stages: Algorithm 1 (App. I). "Line 3" in a comment is its line 3.
#
# `run` is what a stage works on (prepare, in section 10, makes it):
#   cfg, device, backbone (section 8), times (K+1,), optimizers, ema
#   roles            theta, phi and psi: roles.velocity("generator" | "fake", x, t, cond), and the guided
#                    roles.teacher(x, t, cond, null), null being cond of the empty prompt
#   prompts          prompts.at(i) is the i-th prompt of an endless stream
#   text             text.batch(prompts, device) -> cond, their cached embeddings; text.prefetch reads ahead
#   rewards          {name: (reward, weight)}; rate (section 7) calls one and checks its result
# Helpers of section 10: iterations(run) yields the iterations, and does log and checkpoints; share(n): this
# process's part of range(n); everyone(x): the list of x of all processes; key(...): a seed made of its
# arguments; draw(keys, u, m, ...): u uniforms and m normals per sample, which depend on its key alone;
# chunks(n, size): slices; level(t, x): t shaped to broadcast against x; optimizer_step(run, role): sums the
# gradient over processes, clips, steps, averages theta; note(run, n, ...): adds means over n samples to the
# log; phase(run, name) names a part of an iteration.
# ------------------------------------------------------------------------------------------------------------

def tried_again(function):
    """Decorator. If GPU memory runs out it calls function(run, ...) again with half the micro-batch; if
    torch.compile fails, it calls it again uncompiled. Such a function changes weights only at its very end,
    so the numbers are those of a run without the failure, rounding apart."""
    @functools.wraps(function)
    def wrapped(run, *arguments):
        terms, reason = dict(run.terms), ""
        try:
            return function(run, *arguments)
        except torch.OutOfMemoryError:
            if run.cfg.micro_batch == 1:
                raise
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        # Not inside `except`: there the exception would still hold the graph of the failed pass in memory.
        run.terms = terms
        for optimizer in run.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if "CUDA error" in reason:
            raise UsageError(f"the GPU failed ({reason}): start again with --no_compile.", code=1)
        if reason:
            torch.compiler.set_stance("force_eager")
            text = f"cannot compile the network ({reason}): it goes on uncompiled, slower"
        else:
            run.cfg.micro_batch //= 2
            torch.cuda.empty_cache()
            text = (f"is out of GPU memory in {function.__name__}: it goes on with --micro_batch "
                    f"{run.cfg.micro_batch}, which changes no result")
        print(f"Process {dist_info()[0]} {text}.", file=sys.stderr)
        return wrapped(run, *arguments)
    return wrapped


def stage1(run):
    """Algorithm 1, lines 1-5: AC-DMD, the cold start.

    One rollout yields all K boundary states, and each is used in one fake update. So batch * fake_updates / K
    trajectories are enough for an iteration. (The released code makes a new rollout for each state.)"""
    cfg, K = run.cfg, run.cfg.steps
    trajectories = cfg.batch // K * cfg.fake_updates
    period = trajectories + cfg.batch   # prompts per iteration: first the fake updates', then the generator's
    for it in iterations(run):
        # Line 2: rollouts for line 3. Line 4 makes its own, with other prompts (DEPARTURE 22; see walk).
        ids = share(trajectories)
        prompts = [run.prompts.at(it * period + i) for i in ids]
        own = [*ids, *(trajectories + i for i in share(cfg.batch))]  # places of this process's prompts
        run.text.prefetch([run.prompts.at(i * period + j) for i in (it, it + 1) for j in own])
        with phase(run, "rollout"):
            keys = [key(cfg.seed, 1, it, "rollout", i) for i in ids]
            _, normal = draw(keys, 0, K, run.backbone.latent_shape, run.device)
            states = rollout_in_chunks(run, normal[0], normal[1:], prompts)
        # Line 3: update phi on Eq. 12.
        with phase(run, "fake"):
            for update in range(cfg.fake_updates):
                rows, k = states_of_update(cfg, update, ids)
                update_fake(run, it, update, states[k, rows], run.times[k], k,
                            [prompts[row] for row in rows], [ids[row] for row in rows], cfg.batch)
        # Line 4: update theta on Eq. 9.
        with phase(run, "generator"):
            update_generator(run, it, it * period + trajectories)


def states_of_update(cfg, update, ids):
    """Rows of `ids` (this process's trajectories) and steps k of the boundary states that this update uses.

    The trajectories form fake_updates blocks of batch / K; trajectory i is in block i // (batch / K). Its
    state after step k goes to update (block - k) mod fake_updates: update 0 of 10 takes step 1 of block 1,
    step 2 of block 2, and so on. With K updates or more none of them uses a trajectory twice."""
    size = cfg.batch // cfg.steps
    pick = [(row, k) for row, i in enumerate(ids) for k in range(1, cfg.steps + 1)
            if (i // size - k - update) % cfg.fake_updates == 0]
    return [row for row, _ in pick], torch.tensor([k for _, k in pick], dtype=torch.long)


def has_consistency(cfg, it, update):
    """Whether this fake update has the consistency term: each with probability q, and evenly spaced within an
    iteration (DEPARTURE 23).

    (A share of the samples of every update has the same mean, but costs two more passes in each, of so few
    samples that the host is slower than the GPU.)"""
    q, u = cfg.consistency_share, key(cfg.seed, cfg.stage, it, "consistency") / 2**63
    return math.floor((update + 1) * q + u) > math.floor(update * q + u)


@tried_again
def update_generator(run, it, first):
    """Line 4: one AdamW step of theta on Eq. 9. Sample i: prompt first + i, step k = 1 + floor(i K / batch).

    Every k gets exactly batch / K samples (DEPARTURE 16), on each process the same number to within one.
    (With k = 1 + i mod K a process, which takes every world-th sample, could get only long rollouts.)"""
    cfg, K, ids = run.cfg, run.cfg.steps, share(run.cfg.batch)
    k = torch.tensor([1 + i * K // cfg.batch for i in ids])
    prompts = [run.prompts.at(first + i) for i in ids]
    # normal[0] starts the rollout, normal[k] is eps_k (without weight at K), normal[K] re-noises the result.
    keys = [key(cfg.seed, 1, it, "generator", i) for i in ids]
    uniform, normal = draw(keys, 1, K + 1, run.backbone.latent_shape, run.device)
    before = walk(run, normal, k, prompts)
    for rows in chunks(len(ids), cfg.micro_batch):
        x, cond = before[rows], run.text.batch(prompts[rows], run.device)
        t, t_next = level(run.times[k[rows] - 1], x), level(run.times[k[rows]], x)
        v = run.roles.velocity("generator", x, t, cond)  # DEPARTURE 19: the one forward with gradient
        x_s = cps_step(x, v, t, t_next, normal[k[rows], range(rows.start, rows.stop)], cfg.eta)
        loss = matching_loss(run, x_s, t_next, cond, level(uniform[0, rows], x), normal[K, rows])
        (loss * len(x) / cfg.batch).backward()
        note(run, len(x), dm=loss)
    optimizer_step(run, "generator")


@torch.no_grad()
def walk(run, normal, k, prompts):
    """x_{t_{k-1}} of every sample, k (B,): k - 1 steps without gradient; samples that are done are left
    alone. normal (K+1, B, ...): x_{t_0} at index 0, eps_j at index j."""
    x = normal[0].clone()
    for j in range(1, run.cfg.steps):
        live = (k > j).nonzero()[:, 0].tolist()
        for part in chunks(len(live), 4 * run.cfg.micro_batch):
            rows, t, t_next = live[part], run.times[j - 1].float(), run.times[j].float()
            cond = run.text.batch([prompts[row] for row in rows], run.device)
            v = run.roles.velocity("generator", x[rows], t.expand(len(rows)).to(x.device), cond)
            x[rows] = cps_step(x[rows], v, t, t_next, normal[j][rows], run.cfg.eta)
    return x


@tried_again
@torch.no_grad()
def rollout_in_chunks(run, x, noise, prompts):
    """The states of rollout, some samples at a time: x (L, ...), noise (K-1, L, ...) -> (K+1, L, ...)."""
    states, times = x.new_empty(run.cfg.steps + 1, *x.shape), run.times.to(x.device)
    for rows in chunks(len(x), 4 * run.cfg.micro_batch):  # without gradient: a fifth of the memory
        cond = run.text.batch(prompts[rows], run.device)
        velocity = lambda x, t: run.roles.velocity("generator", x, t, cond)
        states[:, rows] = torch.stack(rollout(velocity, x[rows], noise[:, rows], times, run.cfg.eta)[0])
    return states


def between(run, low, high, u):
    """low + u (high - low), rounded to what the network can be told, within [low, high]. All (B, 1, ..)."""
    return run.backbone.quantise(low + u * (high - low)).clamp(low, high)


def draw_level(run, s, u):
    """t ~ U[s, 1] of Eqs. 8 and 10 without the ends, where kappa or 1 - t is nearly 0 (DEPARTURE 17). Left
    out at each: 1 % of [s, 1], or .0025 if that is more (bf16 rounds by less), but at most a quarter of it.
    s, u (B, 1, ..)."""
    margin = (0.0025 / (1 - s)).clamp(0.01, 0.25)
    return between(run, s, torch.ones_like(s), margin + (1 - 2 * margin) * u)


def draw_next_level(run, t, u):
    """t'' of Eq. 11: at most delta below t, and not below the next t_j < t (DEPARTURE 4). t, u (B, 1, ..)."""
    times = to_device(run.times.float(), t.device)
    boundary = torch.where(times < t.view(-1, 1), times, 0.0).amax(1)
    return between(run, torch.maximum(t - run.cfg.delta, level(boundary, t)), t, u)


@tried_again
def update_fake(run, it, update, x_s, s, k, prompts, ids, total):
    """Lines 3 and 12: one AdamW step on Eq. 12 of phi, which serves every k (DEPARTURE 18). x_s (B, ...):
    states after steps k (B,), at levels s, of the trajectories ids, which key the draws; total: number of
    samples of all processes. A share q of the updates has the consistency term, divided by q."""
    cfg = run.cfg
    gamma = cfg.gamma / cfg.consistency_share * has_consistency(cfg, it, update)
    for rows in chunks(len(x_s), cfg.micro_batch):
        keys = [key(cfg.seed, cfg.stage, it, "fake", update, *ik) for ik in zip(ids[rows], k[rows].tolist())]
        uniform, (n, *pair) = draw(keys, 2, 3 if gamma else 1, x_s.shape[1:], run.device)
        x, s_x, cond = x_s[rows], level(s[rows], x_s), run.text.batch(prompts[rows], run.device)
        t = draw_level(run, s_x, level(uniform[0], x))
        x_t = renoise(x, s_x, t, n)
        v = run.roles.velocity("fake", x_t, t, cond)
        loss, weight = ambient_dsm_loss(v, x, n, s_x, t), len(x) / total
        note(run, len(x), dsm=loss)
        if not gamma:
            (weight * loss).backward()
            continue
        # Eq. 22 is E[d_1 d_2], d_i = h(x''_i) - h(x'), for two draws with the same law. Its gradient is 2
        # E[d_1 grad d_2], so d_1 needs no graph. The parts of d_2 are back-propagated one by one: -h(x') with
        # Eq. 10, then h(x''_2), so that the graph of only one forward is in memory at a time.
        t_next = draw_next_level(run, t, level(uniform[1], x))
        fake = lambda x: run.roles.velocity("fake", x, t_next, cond)
        h = x0_from_velocity(x_t, v, t)
        x_1, x_2 = (reverse_step(x_t, v.detach(), t, t_next, noise) for noise in pair)
        with torch.no_grad():
            d_1 = x0_from_velocity(x_1, fake(x_1), t_next) - h
        (weight * (loss - 2 * gamma * (d_1 * h).mean())).backward()
        d_2 = x0_from_velocity(x_2, fake(x_2), t_next) - h.detach()
        consistency = (d_1 * d_2).mean()
        (weight * 2 * gamma * consistency).backward()
        note(run, len(x), consistency=consistency)
    optimizer_step(run, "fake")


def matching_loss(run, x_s, s, cond, u, noise):
    """Eq. 9 at a t ~ U[s, 1] (Eq. 8), psi guided (DEPARTURE 21). x_s (B, ...) with graph; s, u (B, 1, ..)."""
    with torch.no_grad():
        t = draw_level(run, s, u)
        x_t = renoise(x_s, s, t, noise)
        v_teacher = run.roles.teacher(x_t, t, cond, run.text.batch([""], run.device))
        v_fake = run.roles.velocity("fake", x_t, t, cond)
    return dmd_loss(x_s, x_t, v_teacher, v_fake, s, t)


def stage2(run):
    """Algorithm 1, lines 6-14: the hybrid policy gradient, and stage 1's distribution matching beside it.

    A group lives on one process. `b` (for batch) holds the process's L trajectories, N for each of its
    groups: ids and prompts (L); states (K+1, L, ...); slots (L, M+1), the S of each and K; advantages (L,);
    scales {reward: (L,)}; old (L, M), log pi before this rollout's first update."""
    cfg, N = run.cfg, run.cfg.group_size
    for it in iterations(run):
        groups = share(cfg.groups)
        b = SimpleNamespace(ids=[g * N + n for g in groups for n in range(N)],
                            prompts=[run.prompts.at(it * cfg.groups + g) for g in groups for _ in range(N)])
        run.text.prefetch([run.prompts.at(i * cfg.groups + g) for i in (it, it + 1) for g in groups])
        # Lines 7-9: for each prompt a subset S, noise by Eq. 16, N trajectories.
        with phase(run, "rollout"):
            start, noise, S = group_draws(run, it, groups)
            b.slots = F.pad(S, (0, 1), value=cfg.steps)
            b.states = rollout_in_chunks(run, start, noise, b.prompts)
        # Line 10: rewards and group-normalised advantages.
        with phase(run, "reward"):
            judge_groups(run, b)
        # Line 12: update phi on Eq. 12, with the states of this very rollout.
        with phase(run, "fake"):
            for update in range(cfg.fake_updates if cfg.dm_weight else 0):
                k = fake_steps(cfg, it, update, b.ids)
                x_s = b.states[k, range(len(k))]
                update_fake(run, it, update, x_s, run.times[k], k, b.prompts, b.ids, cfg.groups * N)
        # Line 13: update theta on Eq. 18.
        with phase(run, "generator"):
            b.old = torch.zeros(len(b.ids), cfg.subset_size, device=run.device)  # filled in epoch 0
            for epoch in range(cfg.inner_epochs):
                reinforce(run, it, epoch, b)


def group_draws(run, it, groups):
    """Lines 8 and 9 -> x_{t_0} (L, ...), noise by Eq. 16 (K-1, L, ...), S (L, M)."""
    cfg, shape = run.cfg, run.backbone.latent_shape
    start, noise, subsets = [], [], []
    for g in groups:
        generator = torch.Generator().manual_seed(key(cfg.seed, 2, it, "group", g))
        S = choose_steps(cfg.steps, cfg.subset_size, generator)
        noise.append(group_noise(shape, S, cfg.group_size, cfg.steps, generator))
        start.append(torch.randn(cfg.group_size, *shape, generator=generator))
        subsets += [S] * cfg.group_size
    return torch.cat(start).to(run.device), torch.cat(noise, 1).to(run.device), torch.tensor(subsets)


def fake_steps(cfg, it, update, ids):
    """The step k whose state each trajectory gives to this fake update: each k (nearly) equally often."""
    return torch.tensor([1 + (i + it + update) % cfg.steps for i in ids])


@tried_again
@torch.no_grad()
def judge_groups(run, b):
    """Line 10. b.advantages (L,): the A_i of all rewards, weighted and summed; b.scales[name] (L,): the std
    that A_i was divided by. A reward may have its own floor of it, .std_floor, since its unit may differ."""
    cfg, (rank, _, world) = run.cfg, dist_info()
    values = {name: [] for name in run.rewards}
    for rows in chunks(len(b.ids), 4 * cfg.micro_batch):  # all images at once would be gigabytes
        images = run.backbone.decode(b.states[-1][rows])
        for name, (reward, _) in run.rewards.items():
            values[name].append(rate(name, reward, images, b.prompts[rows]))
    b.advantages, b.scales = torch.zeros(len(b.ids), device=run.device), {}
    for name, (reward, weight) in run.rewards.items():
        own = torch.cat(values[name]).view(-1, cfg.group_size)  # group g is on process g mod world
        rewards = torch.stack(everyone(own), 1).flatten(0, 1).to(run.device)
        floor = getattr(reward, "std_floor", cfg.std_floor)
        scale = reward_scale(rewards, floor=floor).expand(rewards.shape)
        b.scales[name] = scale[rank::world].flatten()
        b.advantages = b.advantages + weight * group_advantages(rewards, floor=floor)[rank::world].flatten()
        spread = rewards.std(1)
        note(run, 1, **{f"reward_{name}": rewards.mean(), f"std_{name}": spread.mean(),
                        f"flat_{name}": (spread <= floor).float().mean()})


@tried_again
def reinforce(run, it, epoch, b):
    """Line 13: one AdamW step of theta on Eq. 18: Eq. 7's two terms, each rescaled (DEPARTURES 6, 11, 20).

    Its reward part is Eq. 14 (proved as Eqs. 23-30 in App. G). Each trajectory costs M + 1 forwards with
    gradient, called slots: slot j < M is step S[j], slot M is step K. The policy term is taken at all of S,
    the pathwise term at K, and the DM term at one of the M + 1, so that every k is matched equally often."""
    cfg, M, total = run.cfg, run.cfg.subset_size, run.cfg.groups * run.cfg.group_size
    for part in chunks(len(b.ids), cfg.micro_batch):
        keys = [key(cfg.seed, 2, it, "generator", epoch, i) for i in b.ids[part]]
        uniform, (noise,) = draw(keys, 2, 1, run.backbone.latent_shape, run.device)
        # Without DM no row is matched, and nothing reads pull.
        matched = matched_slots(cfg, uniform[0].tolist()) if cfg.dm_weight else [-1] * len(keys)
        pull = matching_pull(run, b, part, matched, uniform[1], noise) if cfg.dm_weight else noise
        for slot in range(M + 1):
            reward_term = bool(pathwise_rewards(run) if slot == M else cfg.policy_weight)
            use = [i for i, m in enumerate(matched) if m == slot or reward_term]  # those of part that run
            here = [j for j, i in enumerate(use) if matched[i] == slot]  # those of use that are matched
            if use:
                rows = [part.start + i for i in use]
                reinforce_slot(run, b, slot, reward_term, rows, here, pull[use], epoch == 0, total)
    optimizer_step(run, "generator")


def matched_slots(cfg, u):
    """The slot at which each trajectory is distribution-matched. u: one U[0, 1) for each.

    Step K has probability 1/K, and each slot of S an equal part of the rest. S is uniform, so every k is
    matched equally often (DEPARTURE 13). K = 4, M = 2: slot 2 if u < 1/4, else slot 0 if u < 5/8, else 1."""
    K, M = cfg.steps, cfg.subset_size
    return [M if x * K < 1 else int((x * K - 1) / (K - 1) * M) for x in u]


def matching_pull(run, b, part, matched, u, noise):
    """Gradient of Eq. 9 with respect to the state at which each trajectory of part is matched, per sample
    (B, ...). It needs the states' values alone: one pass of teacher and fake score serves all slots."""
    rows = range(part.start, part.stop)
    k = b.slots[rows, matched]
    x_s = b.states[k, rows].requires_grad_()
    cond = run.text.batch(b.prompts[part], run.device)
    dm = matching_loss(run, x_s, level(run.times[k], x_s), cond, level(u, x_s), noise)
    note(run, len(x_s), dm=dm)
    return len(x_s) * torch.autograd.grad(dm, x_s)[0]


def reinforce_slot(run, b, slot, reward_term, rows, here, pull, fresh, total):
    """Gradient of Eq. 18 through one step of each trajectory in rows; DM, by matching_pull's pull, acts on
    rows[i] for i in here. fresh: epoch 0. The losses' gradients at the velocity are summed, and go once
    through the network: so each term's norm is known, and decoder and rewards are freed by then."""
    cfg, K, M = run.cfg, run.cfg.steps, run.cfg.subset_size
    k = b.slots[rows, slot]
    x, x_next, prompts = b.states[k - 1, rows], b.states[k, rows], [b.prompts[r] for r in rows]
    t, t_next, cond = level(run.times[k - 1], x), level(run.times[k], x), run.text.batch(prompts, run.device)
    output = run.roles.velocity("generator", x, t, cond)
    v = output.detach().requires_grad_()
    mean, std = cps_mean_std(x, v, t, t_next, cfg.eta)
    gradient = torch.zeros_like(v)

    def push(name, loss, n):
        """Adds the gradient at v of a loss, a mean over n of the `total` samples. "det" must come last: it
        frees the graph of `mean`, which the others need, and with it the decoder's activations."""
        part, = torch.autograd.grad(loss * n / total, v, retain_graph=name != "det")
        note(run, n, **{f"push_{name}": total / n * part.flatten(1).norm(dim=1).sum()})
        gradient.add_(part)

    if slot < M and reward_term:                                            # Eq. 17
        log_prob = gaussian_log_prob(x_next, mean, std)
        if fresh:
            b.old[rows, slot] = log_prob.detach()  # DEPARTURE 8: the same forward, so the ratio is exactly 1
        # subgrpo_loss gets one column of S and uses (K-1)/1; dividing by M gives Eq. 17's (K-1)/M.
        old = b.old[rows, slot]
        policy = subgrpo_loss(log_prob[:, None], old[:, None], b.advantages[rows], K, cfg.clip) / M
        push("policy", cfg.beta * cfg.policy_weight * policy, len(rows))
        note(run, len(rows), ratio_off=(log_prob.detach() - old).expm1().abs().mean())
    if here:                                                                # Eq. 9: x_s moves as mean does
        push("dm", cfg.dm_weight * (pull * mean)[here].flatten(1).sum(1).mean(), len(here))
    if slot == M and reward_term:                                           # Eq. 15; mean is x_0 here
        scales = {name: scale[rows] for name, scale in b.scales.items()}
        push("det", cfg.beta * cfg.det_weight * pathwise_terms(run, mean, prompts, scales), len(rows))
    output.backward(gradient)


def pathwise_terms(run, x_0, prompts, scales):
    """Eq. 15's loss over the rewards with a gradient: weight times reward over the std in its advantages."""
    images = run.backbone.decode(x_0)
    return sum(weight * pathwise_loss(rate(name, reward, images, prompts), scales[name], x_0[0].numel())
               for name, (reward, weight) in pathwise_rewards(run).items())


def pathwise_rewards(run):
    """Eq. 15's rewards, {name: (reward, weight)}: those with a gradient; none if its weight is 0."""
    return {name: (reward, weight) for name, (reward, weight) in run.rewards.items()
            if run.cfg.det_weight and getattr(reward, "differentiable", False)}


# ------------------------------------------------------------------------------------------------------------
# 7. Rewards r(x): reward(images (B, 3, H, W) in [0, 1], prompts) -> (B,)
#
# Every reward enters SubGRPO (Eq. 17); one whose .differentiable is true also enters the pathwise term (Eq.
# 15). The CLIP family is here; others are found by name, the paper's other metrics in eval.py among them.
# ------------------------------------------------------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)


def resize(images, height, width, mode="bicubic"):
    """Resizes as PIL does, but differentiably: (B, C, H, W) -> (B, C, height, width), in fp32. Without
    antialias the reward ignores most pixels of a large image, and its gradient has a grid pattern."""
    return F.interpolate(images.float(), (height, width), mode=mode, antialias=True, align_corners=False)


def normalise(images, mean=CLIP_MEAN, std=CLIP_STD):
    """Pixels in [0, 1], (B, 3, H, W), in the units that the network was trained on."""
    mean, std = (images.new_tensor(m).view(3, 1, 1) for m in (mean, std))
    return (images - mean) / std


def square_crop(images, size=224, mode="bicubic", offset=round):
    """CLIP's view: short side to `size`, centre crop, normalise. (B, 3, H, W) -> (B, 3, size, size). Bicubic
    resizing overshoots to -.03 .. 1.03 where PIL clips, hence the clamp; PIL's result differs by <= 2/255.
    offset: how half a pixel is rounded (torchvision rounds, transformers truncates)."""
    height, width = (int(size * side / min(images.shape[-2:])) for side in images.shape[-2:])
    top, left = offset((height - size) / 2), offset((width - size) / 2)
    return normalise(resize(images, height, width, mode).clamp(0, 1)[..., top:top + size, left:left + size])


def letterbox(images, size=224):
    """HPSv2's view: longest side to `size`, the rest black, normalise. (B, 3, H, W) -> (B, 3, size, size).
    No crop, and no clamp: HPSv2 resizes tensors instead of PIL images, so its network sees the overshoots."""
    height, width = (round(size * side / max(images.shape[-2:])) for side in images.shape[-2:])
    x, y = size - width, size - height                                      # an odd one goes right and below
    return normalise(F.pad(resize(images, height, width), (x // 2, x - x // 2, y // 2, y - y // 2)))


def open_clip_host(row, cfg):
    """HPSv2.1 in open_clip's ViT-H-14: the same 686 tensors, so the load is strict. A host returns the
    network and two functions that embed pixels and prompts (B, D): (net, embed_image, embed_text)."""
    import open_clip
    weights = find_weights(row["repo"], "HPS_v2.1_compressed.pt", cfg)
    net = open_clip.create_model("ViT-H-14", pretrained=str(weights), device=cfg.device)
    tokenise = open_clip.get_tokenizer("ViT-H-14")
    return net, net.encode_image, lambda prompts: net.encode_text(tokenise(prompts).to(cfg.device))


def transformers_host(row, cfg):
    """CLIPScore and PickScore by transformers: open_clip's tokenizer reads curly quotes differently."""
    net = load_whole(transformers.CLIPModel, row["repo"], cfg, dtype=torch.float32)
    tokenizer = from_hub(transformers.CLIPTokenizer.from_pretrained, row["repo"], cfg, needs="tokenizer.json")

    def embed_text(prompts):
        tokens = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return net.get_text_features(**tokens.to(cfg.device)).pooler_output       # already projected

    return net, lambda pixels: net.get_image_features(pixel_values=pixels).pooler_output, embed_text


# All are better when higher. CLIP's own resize is bicubic; the paper's CLIPScore column is bilinear. A row
# that is a string names, as module:attribute, the reward to import.
REWARDS = {
    "hpsv2": dict(host=open_clip_host, repo="xswu/HPSv2", view=letterbox, logit_scale=False),
    "clipscore": dict(host=transformers_host, repo="openai/clip-vit-large-patch14", logit_scale=False,
                      view=functools.partial(square_crop, mode="bilinear")),
    "pickscore": dict(host=transformers_host, repo="yuvalkirstain/PickScore_v1", logit_scale=True,
                      view=functools.partial(square_crop, offset=int)),
    "aesthetic": "eval:Aesthetic", "imagereward": "eval:ImageReward", "hpsv3": "eval:HPSv3",
    "geneval": "eval:GenEvalCredit", "geneval2": "eval:GenEval2", "ocr": "eval:OCR"}


class ClipReward:
    """Cosine of image and prompt, times exp(logit_scale) where the row says so: the scale of the paper's
    tables. Training and evaluation call this same code."""

    differentiable = True

    def __init__(self, name, row, host):
        self.name, self.row = name, row
        self.net, self.embed_image, embed_text = host
        self.net.eval().requires_grad_(False)  # gradients pass through, never into it
        # {prompt: (D,)}, each embedded once: all members of a group have one prompt.
        self.text = functools.cache(lambda prompt: F.normalize(embed_text([prompt]).float(), dim=-1)[0])

    def __call__(self, images, prompts):
        """images (B, 3, H, W) in [0, 1], B prompts -> (B,)."""
        image = F.normalize(self.embed_image(self.row["view"](images)).float(), dim=-1)
        cosine = (image * torch.stack([self.text(prompt) for prompt in prompts])).sum(-1)
        return cosine * self.net.logit_scale.exp() if self.row["logit_scale"] else cosine


def parse_rewards(text, own=(), flag="--rewards"):
    """"hpsv2=1,ocr=.5,my_module:score=2" -> [(name, weight), ...]. own: names that the backbone brings.

    No weight means 1, a negative one makes a penalty; 0 (a network for nothing) is refused. Only --watch may
    be empty. Every name is looked up, so that nothing is loaded in vain."""
    pairs = {}
    for item in text.split(",") if text or flag != "--watch" else ():
        name, equals, weight = (part.strip() for part in item.partition("="))
        value = math.nan
        with contextlib.suppress(ValueError):
            value = float(weight if equals else 1)
        if not name or name in pairs or value == 0 or not math.isfinite(value):
            raise UsageError(f"{flag} {text!r}: write name=weight,name=weight with no name named twice, "
                             "and with each weight a finite number other than 0.")
        find_named(name, flag, REWARDS | dict.fromkeys(own))
        pairs[name] = value
    return list(pairs.items())


def load_reward(name, cfg, own={}):
    """The backbone's own reward of that name, one of REWARDS, or what module:attribute names: a function
    (images, prompts) -> (B,), an object that is called so, or its class (load(cfg) or class() makes it)."""
    if name in own:
        return own[name]
    with explained(f"reward {name} cannot be loaded", "correct its code, or download its weights again"):
        found = find_named(name, "reward", REWARDS)
        if isinstance(found, dict):
            return ClipReward(name, found, found["host"](found, cfg))
        if isinstance(found, type):
            found = found.load(cfg) if hasattr(found, "load") else found()
        if not callable(found) or not 0 <= getattr(found, "std_floor", 0) < math.inf:
            raise ValueError("it must be callable, and its .std_floor, if it has one, a number >= 0")
        return found


def rate(name, reward, images, prompts):
    """reward(images, prompts), checked: (B,) fp32 on the images' device; nan, inf pass. It is given copies,
    so no reward changes what the next one sees. An exception becomes a UsageError with name and prompts."""
    with explained(f"reward {name}, prompts {prompts!r:.200}", "correct it, or leave it out"):
        values = torch.as_tensor(reward(images.clone(), list(prompts)), device=images.device)
        if values.shape != (len(prompts),) or values.is_complex():
            raise ValueError(f"{values.dtype} of shape {tuple(values.shape)}, not real of ({len(prompts)},)")
        if images.requires_grad and getattr(reward, "differentiable", False) and not values.requires_grad:
            raise ValueError("it says .differentiable, but its result has no gradient")
    return values.float()


# ------------------------------------------------------------------------------------------------------------
# 8. Backbones: all that the loops know of a model. A class of your own (--model module:Class) is made as
# Class(cfg), and has what the table names; README has one in full.
#
#   nets             {"generator": net, "teacher": net}, frozen. The fake adapter lives on "teacher" too.
#                    The same object twice where both share weights (SD3)
#   lora_targets     full names of the linears that get an adapter
#   latent_shape     (C, H, W) of one sample
#   shift            of the schedule for cfg.steps (see timestep_schedule); shift_for(steps) for others
#   base, text_key   repository into which an export is loaded; a string naming all that embeddings depend on
#   encode(prompts)  -> cond: dict of tensors, batch first, CPU. free_text() drops the text encoders
#   velocity(net, x, t, cond)   v = eps - x0 (B,C,H,W) fp32 at levels t (B,); differentiable
#   quantise(t)      the level that the network is really told when it is asked for t
#   decode(x)        latents -> images (B,3,H,W) in [0,1]; differentiable
#   optional         rewards: of the object {name: reward}, of the class their names; text_length. Of the
#                    class alone: settings, its defaults as a row of MODELS; compiles, whether its blocks are
#                    compiled on a GPU
# ------------------------------------------------------------------------------------------------------------

LORA_FILE = "pytorch_lora_weights.safetensors"


class Backbone:
    """What the families share: latents (B, 16, H/8, W/8), the shift of the scheduler's file, exact levels."""

    # pixels: along the side of a latent; tokens: of the text, by default; unguided: the guidance_scale with
    # which the stock pipeline samples without guidance
    vae_class, channels, pixels, tokens, unguided = "AutoencoderKL", 16, 8, 512, 1.0
    # Linears that get an adapter: attention of both streams. SD3: 191; SD3.5: 243, with its second,
    # image-only attention attn2; FLUX.2: 80 (4B) and 112 (9B). FLUX.2's single-stream blocks fuse q, k, v
    # and the MLP into one linear, so the MLP is adapted too (App. J speaks of attention only).
    attention = r"(single_)?transformer_blocks\.\d+\.attn2?\..+"

    def __init__(self, cfg):
        self.cfg, self.text, self.text_length = cfg, None, cfg.text_length or self.tokens
        self.dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
        self.load = functools.partial(load_whole, cfg=cfg, dtype=self.dtype)
        paths = (cfg.pretrained or MODELS.get(cfg.model, {}).get("pretrained", "")).split(",")
        if not all(paths):
            raise UsageError(f"--model {cfg.model} names no repository of its own: give --pretrained.")
        paths = [os.path.expanduser(path.strip()) for path in (paths[0], paths[-1])]  # generator's, teacher's
        for path in paths:
            check_pipeline(path, self.pipeline, cfg, is_teacher=path == paths[-1])
        net_class, vae_class = getattr(diffusers, self.net_class), getattr(diffusers, self.vae_class)
        nets = {path: self.load(net_class, path, part="transformer") for path in dict.fromkeys(paths)}
        self.base, self.nets = paths[0], {"generator": nets[paths[0]], "teacher": nets[paths[-1]]}
        largest = 16 * nets[paths[0]].config.get("pos_embed_max_size", 256)
        if cfg.resolution % 16 or cfg.resolution > largest:
            raise UsageError(f"--resolution {cfg.resolution}: take a multiple of 16 up to {largest}.")
        self.vae = self.load(vae_class, self.base, part="vae")
        self.vae.enable_gradient_checkpointing()
        self.lora_targets = matching_linears(self.nets["teacher"], self.attention)
        self.latent_shape = (self.channels, cfg.resolution // self.pixels, cfg.resolution // self.pixels)
        self.scheduler = from_hub(CPSScheduler.load_config, self.base, cfg, "scheduler/scheduler_config.json",
                                  subfolder="scheduler")
        self.shift = self.shift_for(cfg.steps)
        self.text_key = f"{self.base} text {self.text_length} {self.dtype}"

    def shift_for(self, steps):
        """The same for every size and number of steps."""
        return self.scheduler["shift"]

    @torch.no_grad()
    def encode(self, prompts):
        """prompts list[str] -> cond, by encode_prompt of the repository's own pipeline, here with its text
        encoders alone. The networks see the padding (there is no mask): sample with the same text length."""
        if self.text is None:
            diffusers.utils.logging.set_verbosity_error()  # or each caption beyond 77 tokens prints a warning
            pipeline, where = diffusers.DiffusionPipeline, (self.base, self.cfg, "model_index.json")
            encoders = {part: self.load(getattr(transformers, origin[1]), self.base, part=part)
                        for part, origin in from_hub(pipeline.load_config, *where).items()
                        if part.startswith("text_encoder")}
            self.text = from_hub(pipeline.from_pretrained, *where, transformer=None, vae=None, **encoders)
        return {n: rows.cpu() for n, rows in self.read(list(prompts)).items()}  # Z-Image writes into the list

    def free_text(self):
        """Drop the text encoders: 10.4 GiB in bf16 (SD3), 5.8 (FLUX.2-4B)."""
        self.text = None
        torch.cuda.empty_cache()

    def quantise(self, t):
        """The network is told every level exactly."""
        return t

    def unscale(self, x):
        """Latents in the units of the VAE's decoder."""
        return x / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def decode(self, x, pixels=2**20):
        """Latents -> images (B,3,H,W) in [0,1], 2^20 pixels at a time (four images of 512). Clamped as the
        pipelines clamp: a pixel that is out of range passes no gradient."""
        parts = self.unscale(x).to(self.dtype).split(max(1, pixels // self.cfg.resolution**2))
        images = torch.cat([self.vae.decode(part, return_dict=False)[0].float() for part in parts])
        return (images / 2 + 0.5).clamp(0, 1)


class SD3Backbone(Backbone):
    """SD3 and SD3.5: 77 CLIP + 256 T5 tokens (B, 333, 4096), pooled (B, 2048)."""

    net_class, pipeline, tokens, compiles = "SD3Transformer2DModel", "StableDiffusion3Pipeline", 256, True

    def read(self, prompts):
        text, _, pooled, _ = self.text.encode_prompt(prompts, None, None, do_classifier_free_guidance=False,
                                                     max_sequence_length=self.text_length)
        return {"text": text, "pooled": pooled}

    def velocity(self, net, x, t, cond):
        """The timestep 1000 t stays fp32: bf16 would tell the network 752 for 750."""
        return net(hidden_states=x.to(self.dtype), timestep=1000 * t.float(), return_dict=False,
                   encoder_hidden_states=cond["text"], pooled_projections=cond["pooled"])[0].float()


def flux_velocity(backbone, net, x, t, text, axes, **more):
    """What FLUX.1 and FLUX.2 share: the network wants tokens (B, h w, C) with positions (0, row, column,
    word), or the first three of them. t is rounded as the pipeline rounds it: see flux_level."""
    sizes = 1, *x.shape[2:], text.shape[1]
    one, row, column, word = (torch.arange(size, device=x.device) for size in sizes)
    places = lambda *sizes: torch.cartesian_prod(*sizes)[:, :axes]
    tokens, told = x.flatten(2).mT.to(backbone.dtype), (1000 * t.float()).to(backbone.dtype) / 1000
    v = net(hidden_states=tokens, timestep=told, encoder_hidden_states=text, return_dict=False, **more,
            img_ids=places(one, row, column, one), txt_ids=places(one, one, one, word))[0]
    return v.float().mT.unflatten(2, x.shape[2:])


def flux_level(backbone, t):
    """The level that the network receives for t: 1000 t rounded, divided, multiplied; +-.003 in bf16.
    Re-noising levels are drawn, quantised and only then used, so that noise and network agree."""
    return ((1000 * t.float()).to(backbone.dtype) / 1000 * 1000).float() / 1000


class Flux1Backbone(Backbone):
    """FLUX.1-dev: 512 T5 tokens and CLIP's pooled state. Guidance is a number that the network reads: 1 for
    theta and phi, w for psi (released), so psi needs one forward, not two: see Roles.teacher."""

    net_class, pipeline, quantise = "FluxTransformer2DModel", "FluxPipeline", flux_level

    def __init__(self, cfg):
        super().__init__(cfg)
        if not self.nets["teacher"].config.guidance_embeds:
            raise UsageError(f"--pretrained {cfg.pretrained}: FLUX.1-schnell ignores guidance: give "
                             "GENERATOR,TEACHER with FLUX.1-dev as TEACHER.")

    def shift_for(self, steps):
        """e^mu, mu linear in the number of tokens: 1.88 at 512 pixels, 3.16 at 1024. FLUX.1-schnell: 1."""
        if not self.scheduler.get("use_dynamic_shifting", True):
            return self.scheduler["shift"]
        tokens = self.latent_shape[1] * self.latent_shape[2] // 4
        return math.exp(diffusers.pipelines.flux.pipeline_flux.calculate_shift(tokens))

    def read(self, prompts):
        text, pooled, _ = self.text.encode_prompt(prompts, max_sequence_length=self.text_length)
        return {"text": text, "pooled": pooled, "guidance": torch.ones(len(prompts))}

    def velocity(self, net, x, t, cond):
        """A token is a patch of 2 x 2 latents. (FLUX.1-schnell reads no guidance.)"""
        guidance = cond["guidance"] if net.config.guidance_embeds else None
        v = flux_velocity(self, net, F.pixel_unshuffle(x, 2), t, cond["text"], 3, guidance=guidance,
                          pooled_projections=cond["pooled"])
        return F.pixel_shuffle(v, 2)


class Flux2Backbone(Backbone):
    """FLUX.2-klein: 512 Qwen tokens (B, 512, three Qwen widths); latents (B, 128, H/16, W/16). The generator
    starts from the distilled model, teacher and fake score from the base one, where guidance works."""

    net_class, pipeline, quantise = "Flux2Transformer2DModel", "Flux2KleinPipeline", flux_level
    vae_class, channels, pixels = "AutoencoderKLFlux2", 128, 16

    def shift_for(self, steps):
        """e^mu by the pipeline's rule on tokens and steps: 7.62 for four steps at 512, 9.89 at 1024."""
        pipeline = diffusers.pipelines.flux2.pipeline_flux2_klein
        return math.exp(pipeline.compute_empirical_mu(self.latent_shape[1] * self.latent_shape[2], steps))

    def read(self, prompts):
        """Qwen without its 152k-wide output layer and without the layers above the last state that is read:
        bit for bit what the whole pipeline gives."""
        if hasattr(self.text.text_encoder, "model"):
            qwen = self.text.text_encoder.model
            qwen.layers, qwen.norm = qwen.layers[:27], nn.Identity()  # states after layers 9, 18, 27 are read
            self.text.text_encoder = qwen
        text, _ = self.text.encode_prompt(prompts, self.cfg.device, max_sequence_length=self.text_length)
        return {"text": text}

    def velocity(self, net, x, t, cond):
        return flux_velocity(self, net, x, t, cond["text"], 4)

    def unscale(self, x):
        """The latents are 2x2 patches, in units of the VAE's batch norm."""
        norm = self.vae.bn
        mean, variance = (row.float().view(-1, 1, 1) for row in (norm.running_mean, norm.running_var))
        return F.pixel_shuffle(x * torch.sqrt(variance + norm.eps) + mean, 2)


class ZImageBackbone(Backbone):
    """Z-Image: up to 512 Qwen tokens without their padding. w is the pipeline's guidance_scale + 1, so a
    student is sampled with guidance_scale 0."""

    net_class, pipeline = "ZImageTransformer2DModel", "ZImagePipeline"
    attention, unguided = r"(layers|noise_refiner|context_refiner)\.\d+\.attention\..+", 0.0

    def read(self, prompts):
        rows, _ = self.text.encode_prompt(prompts, do_classifier_free_guidance=False,
                                          max_sequence_length=self.text_length)
        return {"text": torch.stack([F.pad(row, (0, 0, 0, self.text_length - len(row))) for row in rows]),
                "length": torch.tensor([len(row) for row in rows])}

    def velocity(self, net, x, t, cond):
        """The network takes lists; its time runs from 0, noise, to 1, image, and it predicts x0 - eps."""
        lengths = [self.text_length] * len(x) if x.is_meta else cond["length"].tolist()   # meta has no values
        words = [row[:n] for row, n in zip(cond["text"], lengths)]
        told = (1000 - 1000 * t.float()) / 1000  # 1 - t, rounded as the pipeline rounds it
        v = net(list(x.to(self.dtype).unsqueeze(2).unbind()), told, words, return_dict=False)[0]
        return -torch.stack(v).squeeze(2).float()


# Settings and repositories are in MODELS, licences in README.
BACKBONES = {"tiny": "eval:TinyBackbone", "sd3m": SD3Backbone, "sd35m": SD3Backbone, "sd35l": SD3Backbone,
             "flux1": Flux1Backbone, "flux2-4b": Flux2Backbone, "flux2-9b": Flux2Backbone,
             "zimage": ZImageBackbone}


def backbone_class(model):
    """The class of a row of BACKBONES, or of module:Class."""
    return find_named(model, "--model", BACKBONES)


def check_pipeline(path, pipeline, cfg, is_teacher):
    """UsageError unless a repository is a whole `pipeline`: without T5, SD3 would run on zeros for
    embeddings. A distilled teacher is refused too: it would ignore w."""
    index = from_hub(diffusers.DiffusionPipeline.load_config, path, cfg, "model_index.json")
    lacking = [part for part, origin in index.items() if origin == [None, None] and part.startswith("text_e")]
    found = " without ".join([str(index.get("_class_name")), *lacking])
    if found != pipeline or is_teacher and index.get("is_distilled"):
        wrong = f"a {found}" if found != pipeline else "distilled: it cannot be the teacher"
        raise UsageError(f"{path} is {wrong}: take a whole {pipeline} (GENERATOR,TEACHER if they differ).")


def find_weights(repo, filename, cfg):
    """Path of `filename`: in `repo`, in weights_dir/<last part of repo>, in weights_dir, or on the hub."""
    own = Path(cfg.weights_dir or repo).expanduser()
    places = [Path(repo) / filename, own / Path(repo).name / filename]
    if own.name == Path(repo).name or not filename.endswith(".json"):  # every repository has a config.json
        places.append(own / filename)
    if found := next(filter(Path.is_file, places), None):
        return found
    if Path(repo).is_dir():                               # or the hub would be asked for it, some 20 s
        raise UsageError(f"{repo} has no {filename}: name a folder that is whole.")
    where = f"neither in {own} nor" if cfg.weights_dir else "not"
    remedy = (f"check name and network, accept the licence on https://huggingface.co/{repo} and run `hf auth "
              "login`, or name a folder that has it: --pretrained or --weights_dir")
    with explained(f"{filename} of {repo} is {where} on the hub", remedy):
        return Path(huggingface_hub.hf_hub_download(repo, filename))


def from_hub(load, repo, cfg, needs="config.json", **options):
    """Calls load, a from_pretrained, with the repository or the folder where find_weights finds `needs`. This
    file is looked for first, since transformers silently makes a tokenizer without a vocabulary, and asks a
    hub that is out of reach for every file in turn, 20 s each."""
    found = find_weights(repo, needs, cfg)
    folder, own = found.parents[needs.count("/")], Path(cfg.weights_dir or repo).expanduser()
    repo = str(folder) if folder in (own, own / Path(repo).name) else repo
    with explained(f"{repo} is incomplete or damaged", "get the whole of it, and any package that is named"):
        return load(repo, **options)


def load_whole(cls, repo, cfg, part="", **options):
    """A frozen network on cfg.device: cls.from_pretrained of a repository, or of its component `part`.
    UsageError if the files lack a tensor: it would be random, and only a log would say so."""
    net, info = from_hub(cls.from_pretrained, repo, cfg, f"{part}/config.json".lstrip("/"), subfolder=part,
                         output_loading_info=True, **options)
    if lacking := sorted(info["missing_keys"]):
        raise UsageError(f"{repo} {part} lacks {len(lacking)} tensors of {cls.__name__}, such as "
                         f"{lacking[0]}: get the whole of it again.")
    return net.to(cfg.device).eval().requires_grad_(False)


def matching_linears(net, pattern):
    """Full names of the linears whose name matches. Full, because PEFT takes a shorter name as a suffix:
    attn.to_q would miss attn2.to_q, and to_out would also match the list that holds the linear."""
    return [n for n, part in net.named_modules() if isinstance(part, nn.Linear) and re.fullmatch(pattern, n)]


# ------------------------------------------------------------------------------------------------------------
# 9. Prompts and their text embeddings
# ------------------------------------------------------------------------------------------------------------

KNOWN_PROMPTS = {        # name: (data set on the hub, its files)
    "pickapic": ("yuvalkirstain/pickapic_v1_no_images", "data/train-*.parquet"),       # 584k rows, 168 MB
    "drawbench": ("sayakpaul/drawbench", "*.csv"),                                     # 200 rows
    "partiprompts": ("nateraw/parti-prompts", "PartiPrompts.tsv"),                     # 1,632 rows
    "hpdv2": None}                                                                     # 3,200 through hpsv2
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")      # in any case; the first that a table has
LONGEST_PROMPT = 20_000          # characters; the encoders read some 2,000, more is a broken file


def read_prompts(source, seed=None):
    """--prompts as list[str]: a .txt, .jsonl (GenEval's too), .csv, .tsv or .parquet file, a known name, or
    module:attribute, a list of texts or a function that returns one. Stripped, without blank lines and
    duplicates. Seed and text alone decide the order (a new line moves no other); without a seed they
    stay in the order of the file. UsageError names the row that is wrong."""
    texts = []
    with explained(lambda: f"--prompts {source}, row {len(texts) + 1}", "correct it, or give others"):
        for row in prompt_rows(source):
            texts.append(prompt_of(row))
    prompts = list(dict.fromkeys(filter(None, texts)))
    if not prompts:
        raise UsageError(f"--prompts {source} holds no prompt: give a file with one prompt a line.")
    log(f"prompts: {len(prompts):,} from {len(texts):,} rows of {source}, without blank ones and duplicates")
    return prompts if seed is None else sorted(prompts, key=lambda text: key("prompt order", seed, text))


def prompt_of(row):
    """The stripped prompt of a row: a text, or a dict with one of PROMPT_COLUMNS. Raises ValueError."""
    if isinstance(row, dict):
        if None in row:                                    # csv's name for cells beyond the header's columns
            raise ValueError("more cells than the header has; write a text with a comma or tab in quotes")
        row = {str(name).strip().lower(): text for name, text in row.items()}
        if not (found := [row[name] or "" for name in PROMPT_COLUMNS if name in row]):
            raise ValueError(f"no column or key called {', '.join(PROMPT_COLUMNS)}")
        row = found[0]
    if not isinstance(row, str) or "\0" in row or len(row) > LONGEST_PROMPT:
        raise ValueError(f"a prompt is text without NUL, up to {LONGEST_PROMPT:,} characters: {row!r:.30}")
    row.encode()            # JSON can hold half a surrogate pair: an error here, and not in the tokenizer
    return row.strip()


def prompt_rows(source):
    """The rows of a known set, of module:attribute or of a file: strings, or dicts by column."""
    kind = Path(source).suffix.lower()
    if source == "hpdv2":
        import hpsv2
        return sum(hpsv2.benchmark_prompts("all").values(), [])
    if source in KNOWN_PROMPTS:
        repo, pattern = KNOWN_PROMPTS[source]
        with explained(f"--prompts {source} is not on the hub", "check the network, or give a file"):
            folder = huggingface_hub.snapshot_download(repo, repo_type="dataset", allow_patterns=pattern)
        return (row for file in sorted(Path(folder).glob(pattern)) for row in prompt_rows(str(file)))
    if ":" in source and not Path(source).exists():
        found = find_named(source, "--prompts")
        found = found() if callable(found) else found
        return [found] if isinstance(found, str) else found
    if not Path(source).is_file():                         # a pipe or a device would be read for ever
        raise UsageError(f"--prompts {source} is no file: give one, module:attribute, or one of "
                         f"{', '.join(KNOWN_PROMPTS)}.")
    if kind == ".parquet":
        from pyarrow.parquet import ParquetFile
        file = ParquetFile(source)
        return file.read([n for n in file.schema_arrow.names if n.lower() in PROMPT_COLUMNS]).to_pylist()
    lines = (line.decode("utf-8-sig") for line in Path(source).read_bytes().splitlines(keepends=True))
    if kind in (".csv", ".tsv"):
        # strict, or a quote that is never closed silently swallows the rows after it.
        return csv.DictReader(lines, delimiter="," if kind == ".csv" else "\t", strict=True)
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"it ends in {kind or 'nothing'}, in none of .txt, .jsonl, .csv, .tsv, .parquet")
    return lines if kind == ".txt" else (json.loads(line) if line.strip() else "" for line in lines)


class PromptStream(list):
    """The prompts of a run. at(i) is the i-th of an endless stream: the whole set over and over, each time in
    another order. With 100 prompts, at(250) is number 50 of the third order."""

    def __init__(self, cfg):
        super().__init__(read_prompts(cfg.prompts, cfg.seed)[:cfg.max_prompts])
        chance = lambda epoch: torch.Generator().manual_seed(key("order", cfg.seed, epoch))
        self.order = functools.lru_cache(4)(
            lambda epoch: torch.randperm(len(self), generator=chance(epoch)).tolist())

    def at(self, position):
        """The prompt at a position of the stream."""
        epoch, i = divmod(position, len(self))
        return self[self.order(epoch)[i]]


class TextCache:
    """Text embeddings on disk, so that the encoders need not live beside the network while it trains.
    FOLDER/<hash of text_key>/<hash of prompt>.safetensors holds encode([prompt]) without its batch axis. One
    thread reads ahead of the network; the 512 latest rows stay in memory (1.4 GB for SD3)."""

    def __init__(self, backbone, folder):
        self.backbone, reader = backbone, concurrent.futures.ThreadPoolExecutor(1)
        self.folder = Path(folder) / hashlib.sha256(backbone.text_key.encode()).hexdigest()[:16]
        self.row = functools.lru_cache(512)(lambda prompt: reader.submit(self.read, prompt))

    def path(self, prompt):
        """The file of one prompt."""
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"

    def prepare(self, prompts, batch=16):
        """Encode what is missing of `prompts` and "" (the null condition), split over ranks; then free_text.
        All ranks list before any of them writes."""
        rank, _, world = dist_info()
        missing = [prompt for prompt in dict.fromkeys(["", *prompts]) if not is_whole(self.path(prompt))]
        barrier()
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            need = sum(row.nbytes for row in self.backbone.encode([""]).values()) * len(missing)
            log(f"text embeddings: {len(missing):,} prompts, {need / 1e9:.2f} GB in {self.folder}")
            if 1.1 * need > shutil.disk_usage(self.folder).free:
                raise UsageError(f"{need / 1e9:.1f} GB of embeddings do not fit: --cache needs more room.")
        parts = [missing[i:i + batch] for i in range(rank * batch, len(missing), world * batch)]
        for part in progress(parts, len(parts), "text embeddings") if parts else ():
            cond = self.backbone.encode(part)
            if not all(rows.isfinite().all() for rows in cond.values()):
                raise UsageError(f"The text encoder gives nan or inf for one of {part!r:.200}: mend encode, "
                                 "or get the weights again.")
            for i, prompt in enumerate(part):
                row = {name: rows[i].clone() for name, rows in cond.items()}  # of its own: no shared memory
                write_atomic(self.path(prompt), safetensors_bytes(row))
        self.backbone.free_text()
        self.row.cache_clear()                             # a file that could not be read is whole now
        barrier()

    def read(self, prompt):
        """One row from its file. Cloned, so that no file stays mapped into memory."""
        with explained(f"{self.path(prompt)} cannot be read", "start again; nodes must share one --cache"):
            return {name: x.clone() for name, x in load_file(self.path(prompt)).items()}

    def prefetch(self, prompts):
        """Makes the thread read `prompts` in this order, and returns at once. A loop that asks here for this
        iteration and the next one finds in `batch` what was read while the network worked."""
        for prompt in list(dict.fromkeys(prompts))[:500]:  # fewer than are kept, or they push each other out
            self.row(prompt)

    def batch(self, prompts, device):
        """cond of `prompts`, batch first, on `device`. A prompt of several samples is copied there once."""
        kinds = list(dict.fromkeys(prompts))
        rows = [future.result() for future in [self.row(prompt) for prompt in kinds]]
        cond = {name: to_device(torch.stack([row[name] for row in rows]), device) for name in rows[0]}
        if len(kinds) == len(prompts):
            return cond
        at = to_device(torch.tensor([kinds.index(prompt) for prompt in prompts]), device)
        return {name: values[at] for name, values in cond.items()}


# ------------------------------------------------------------------------------------------------------------
# 10. Plumbing: processes, keyed randomness, LoRA roles, optimiser step, checkpoints, log and panel, signals
# ------------------------------------------------------------------------------------------------------------

def dist_info():
    """(rank, local rank, world size). A plain `python rtdmd.py` is world 1 of the same code."""
    names = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)
    with explained("RANK, LOCAL_RANK or WORLD_SIZE is not torchrun's", "start with torchrun, or unset them"):
        rank, local, world = (int(os.environ.get(name, default)) for name, default in names.items())
        return range(world).index(rank), local, world          # ValueError unless 0 <= rank < world


def start_processes(device):
    """Joins the processes of torchrun (NCCL on GPUs, gloo on CPUs); returns the device of this one."""
    rank, local, world = dist_info()
    device = f"cuda:{local}" if device == "cuda" else device
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        with explained("the processes cannot meet", "start them with torchrun, or unset WORLD_SIZE"):
            # torchrun keeps one store over restarts; the prefix hides the addresses of earlier processes.
            life = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            store = dist.PrefixStore(life, next(dist.rendezvous("env://"))[0])
        # One node may need longer than another to download 20 GB or to encode its prompts, and NCCL's
        # default of ten minutes would end the run. torchrun notices a process that dies, and ends all.
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank,
                                world_size=world, timeout=datetime.timedelta(days=1))
    return device


def everyone(value):
    """The list of every process's value, by rank, the same for all. Tensors travel through host memory."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value.cpu() if torch.is_tensor(value) else value)
    return values


barrier = functools.partial(everyone, None)  # no process goes on before all have come here


def share(total):
    """This process's part of range(total): every world-th index. No result depends on who computes it."""
    return list(range(dist_info()[0], total, dist_info()[2]))


def log(text):
    """Prints one line, on rank 0, without breaking a progress bar."""
    if dist_info()[0] == 0:
        tqdm.write(text, file=sys.stderr)


def progress(iterable, total, label, start=0):
    """Progress bar with the time left, on rank 0; in a file, a line every ten seconds."""
    return tqdm(iterable, label, total, initial=start, dynamic_ncols=True, disable=dist_info()[0] > 0,
                mininterval=0.5 if sys.stderr.isatty() else 10)


def key(*parts):
    """A 63-bit seed made of parts that may be anything with a repr. Every draw names its purpose, so there is
    no random state to save: a restart, other processes or another micro-batch give the same numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def draw(keys, uniforms, normals, shape, device):
    """One generator per key -> U[0, 1) (uniforms, B) on the CPU, N(0, 1) (normals, B, *shape) on `device`,
    all drawn on the CPU, so that they are the same for every device."""
    u, n = torch.empty(uniforms, len(keys)), torch.empty(normals, len(keys), *shape)
    for i, seed in enumerate(keys):
        generator = torch.Generator().manual_seed(seed)
        u[:, i] = torch.rand(uniforms, generator=generator)
        n[:, i] = torch.randn(normals, *shape, generator=generator)
    return u, to_device(n, device)


def to_device(x, device):
    """x on the device. From pinned memory the host need not wait for a GPU."""
    return (x.pin_memory() if "cuda" in str(device) and not x.is_cuda else x).to(device, non_blocking=True)


def chunks(total, size):
    """Slices of at most `size`, nearly equal, that cover range(total): chunks(24, 10) are 8 + 8 + 8."""
    n = -(-total // size)
    return [slice(i * total // n, (i + 1) * total // n) for i in range(n)]


def level(values, like):
    """Noise levels (B,) as fp32 (B, 1, ..., 1), which broadcasts against `like` (B, ...)."""
    return to_device(values.float(), like.device).view(-1, *[1] * (like.dim() - 1))


def is_whole(path):
    """Whether a safetensors file is there, and as long as its header says (no more of it is read)."""
    try:
        with open(path, "rb"), safe_open(path, "pt"):          # safe_open calls every error "not found"
            return True
    except (FileNotFoundError, NotADirectoryError, SafetensorError):
        return False


def write_atomic(path, data):
    """Writes to a file beside `path` and renames it: a reader sees the old file or the whole new one."""
    beside = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()                                    # a half-written file still fills the disk
        raise UsageError(f"Cannot write {path} ({error.strerror}): make room or change folder.") from error


class AdaptedLinear(nn.Linear):
    """A frozen linear layer plus the LoRA update of the role that is active: W x + b + (alpha / r) B A x.

    Roles.attach sets A (r, in) and B (out, r) before every forward pass; the teacher has none. They are no
    parameters, so torch.compile takes them as inputs, and the roles share its graphs."""
    A = B = None

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.A is None:
            return y
        # Rounded as the deployed pipeline rounds: addmm would round once less, and pictures differ in bf16.
        return y + F.linear(F.linear(x, self.A), self.B) * self.scale


def compile_blocks(net):
    """Has torch.compile compile every transformer block by itself, in place, when it is first called.
    Blocks of one kind share a graph; each shape has its own, with and without gradient or adapter. (At the
    second shape torch would otherwise compile for any shape, which takes longer and gives slower code:
    docs/costs.md.)"""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
    for part in net.children():
        for block in part if isinstance(part, nn.ModuleList) else ():
            block.compile(dynamic=False)


def compiled():
    """(number of graphs, seconds) of everything that torch.compile has made in this process."""
    return (torch._dynamo.utils.counters["stats"]["unique_graphs"],
            torch._dynamo.utils.calculate_time_spent().get("entire_frame_compile", 0.0))


class Roles:
    """theta, phi and psi on frozen base networks: theta and phi are LoRA adapters, psi is the base alone.
    All matrices of a role are views of one flat fp32 tensor, the only parameter that its optimizer sees. So
    adapters, gradients, Adam's moments and the EMA are fp32, whatever the base is (DEPARTURES 14, 15)."""

    def __init__(self, backbone, cfg):
        self.backbone, self.guidance, self.active = backbone, cfg.guidance, None
        self.nets = backbone.nets | {"fake": backbone.nets["teacher"]}
        self.layers, self.flat, self.named = {}, {}, {}
        for role in ("generator", "fake"):
            torch.manual_seed(key(cfg.seed, "lora", role))                  # the same A on every process
            layers, matrices = [self.nets[role].get_submodule(name) for name in backbone.lora_targets], {}
            for name, layer in zip(backbone.lora_targets, layers):
                layer.__class__, layer.scale = AdaptedLinear, cfg.lora_alpha / cfg.lora_rank
                A = nn.Linear(layer.in_features, cfg.lora_rank, bias=False).weight
                B = nn.Linear(cfg.lora_rank, layer.out_features, bias=False).weight
                matrices[f"{name}.lora_A.weight"] = nn.init.normal_(A.data, std=1 / cfg.lora_rank)
                matrices[f"{name}.lora_B.weight"] = nn.init.zeros_(B.data)  # at first all roles are the base
            self.layers[role] = layers
            self.adopt(role, matrices)
        self.layers["teacher"] = self.layers["fake"]
        for net in dict.fromkeys(self.nets.values()):
            if cfg.checkpointing:
                net.enable_gradient_checkpointing(self.checkpoint)
            if cfg.device.startswith("cuda") and not cfg.no_compile:
                compile_blocks(net)

    def adopt(self, role, matrices):
        """Makes flat[role], the parameter to train, of the matrices, and named[role], the views of it."""
        flat = torch.cat([matrix.flatten() for matrix in matrices.values()])
        self.flat[role] = nn.Parameter(flat.to(self.layers[role][0].weight.device))
        self.named[role] = matrices  # parts wants their shapes
        self.named[role] = self.parts(role, self.flat[role].data)

    def parts(self, role, flat):
        """{name: view} of the matrices in a tensor like flat[role]."""
        named = self.named[role]
        pieces = flat.split([matrix.numel() for matrix in named.values()])
        return {name: piece.view_as(matrix) for (name, matrix), piece in zip(named.items(), pieces)}

    def attach(self, role, matrices=None):
        """Gives the layers the A and B of a role, all cast to the network's dtype at once. Every forward pass
        begins with it, so the graph of a pass keeps the very matrices that it was computed with."""
        layers = self.layers[role]
        if role != "teacher" and matrices is None:
            matrices = list(self.parts(role, self.flat[role].to(layers[0].weight.dtype)).values())
        pairs = zip(matrices[::2], matrices[1::2]) if matrices else [(None, None)] * len(layers)
        for layer, (A, B) in zip(layers, pairs):
            layer.A, layer.B = A, B
        self.active, self.matrices = role, matrices

    def checkpoint(self, module, *args):
        """Gradient checkpointing: the backward pass computes the block again, with the matrices of its own
        forward pass. Those of the latest attach may be another role's: wrong gradients, and no error."""
        role, matrices = self.active, self.matrices

        def as_it_was(*args):
            self.attach(role, matrices)
            return module(*args)
        return torch.utils.checkpoint.checkpoint(as_it_was, *args, use_reentrant=False)

    def velocity(self, role, x, t, cond):
        """v_theta, v_phi or unguided v_psi, (B, ...) fp32. x (B, ...) fp32; t (B,) or (B, 1, ..)."""
        self.attach(role)
        return self.backbone.velocity(self.nets[role], x, t.flatten(), cond).float()

    def teacher(self, x, t, cond, null):
        """v_psi with classifier-free guidance, v_u + w (v_c - v_u). null: cond of "", batch 1."""
        if "guidance" in cond:                                              # FLUX.1 reads w as an input
            guidance = torch.full_like(cond["guidance"], self.guidance)
            return self.velocity("teacher", x, t, cond | dict(guidance=guidance))
        if self.guidance == 1:
            return self.velocity("teacher", x, t, cond)
        both = {n: torch.cat([null[n].expand_as(c), c]) for n, c in cond.items()}
        v_u, v_c = self.velocity("teacher", torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return v_u + self.guidance * (v_c - v_u)


def optimizer_step(run, role):
    """Sums the gradient over the processes, clips it and steps; the generator's average moves along. If the
    sum, the same for all of them, is not finite, every process skips the step."""
    p, optimizer = run.roles.flat[role], run.optimizers[role]
    p.grad = torch.zeros_like(p) if p.grad is None else p.grad           # this process may have had no sample
    if dist.is_initialized():
        dist.all_reduce(p.grad)
    norm = nn.utils.clip_grad_norm_(p, run.cfg.grad_clip)
    if good := bool(norm.isfinite()):                                       # the only wait for the GPU
        optimizer.step()
        note(run, 1, **{f"grad_{role}": norm})
    optimizer.zero_grad(set_to_none=True)
    if good and role == "generator":  # the exported average; its decay begins at 2/11, to forget the start
        n = int(optimizer.state[p]["step"])                                 # it lies on the CPU: no wait
        run.ema.lerp_(p.data, 1 - min(run.cfg.ema, (1 + n) / (10 + n)))
    run.bad[role], run.skipped = 0 if good else run.bad[role] + 1, run.skipped + (not good)
    if not good:
        # Terms of all processes: one of them has the culprit.
        source = ", ".join(n for n, v in gather(run).items() if not math.isfinite(v)) or "its backward pass"
        log(f"Iteration {run.done + 1}: the {role}'s gradient is not finite ({source}); it is skipped.")
        if run.bad[role] >= run.cfg.max_bad_steps:
            raise UsageError(f"{run.bad[role]} updates of the {role} in a row are not finite ({source}): "
                             "correct that, or give a lower --lr or --lr_fake and --force_resume.", code=1)


# Settings that do not change what is computed (beyond the order of a sum): a run may be resumed with others.
FREE_SETTINGS = set("out init iterations device cache weights_dir checkpointing no_compile "
                    "micro_batch max_bad_steps save_every keep sample_every watch force_resume".split())
# {stage that runs: settings that only the other stage reads}
READ_BY_THE_OTHER = {
    1: set("rewards groups group_size subset_size beta policy_weight det_weight dm_weight std_floor clip "
           "inner_epochs".split()), 2: {"batch"}}
STATE_FILE = "state/state.safetensors"


def training_state(run):
    """The tensors of a checkpoint by name, live: save_checkpoint writes them, load_start copies into them."""
    state = dict(ema=run.ema)
    for role, optimizer in run.optimizers.items():
        p = run.roles.flat[role]
        state[role] = p.data
        state.update({f"adam.{role}.{name}": moment for name, moment in optimizer.state[p].items()})
    return state


def save_lora(folder, state_dict, rank, alpha, targets, info):
    """Writes an adapter for `pipe.load_lora_weights(folder)`, which then computes exactly what was trained.
    state_dict {"transformer_blocks.0.attn.to_q.lora_A.weight": (r, in), ...}; targets: full module names;
    info: how to sample, any JSON. The loader reads alpha from this metadata: without it the update would be
    r / alpha times too strong. A field that its PEFT does not know stops it, so ours have another key."""
    names = sorted(targets)
    adapter = {"transformer.r": rank, "transformer.lora_alpha": alpha, "transformer.target_modules": names}
    facts = info | {"rank": rank, "alpha": alpha, "targets": names}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter), "rtdmd": json.dumps(facts)}
    tensors = {f"transformer.{name}": row.detach().cpu().contiguous() for name, row in state_dict.items()}
    write_atomic(Path(folder) / LORA_FILE, safetensors_bytes(tensors, metadata=metadata))


def save_checkpoint(run):
    """Writes OUT/stageN/checkpoint-000100: the averaged generator for diffusers, and state/ with all that
    resuming needs (no random state: every draw is keyed). Rank 0 writes; all hold the same numbers. The
    folder is made under another name and then renamed: a kill at any moment leaves whole checkpoints only."""
    cfg, backbone = run.cfg, run.backbone
    if dist_info()[0] == 0:
        target = run.folder / f"checkpoint-{run.done:06d}"
        beside = run.folder / f".{target.name}.partial"
        sampling = {n: getattr(cfg, n) for n in ("model", "stage", "steps", "eta", "resolution")}
        sampling.update(iteration=run.done, base=backbone.base, shift=backbone.shift,
                        sigmas=run.times[:-1].tolist(), guidance=getattr(backbone, "unguided", 1.0),
                        text_length=getattr(backbone, "text_length", 0))
        average = run.roles.parts("generator", run.ema)
        save_lora(beside, average, cfg.lora_rank, cfg.lora_alpha, backbone.lora_targets, sampling)
        facts = json.dumps(dict(iteration=run.done, skipped=run.skipped, prompts=run.prompt_hash,
                                config=vars(cfg)))
        write_atomic(beside / STATE_FILE, safetensors_bytes(training_state(run), metadata=dict(rtdmd=facts)))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(beside, target)
        whole = [path for path in list_checkpoints(run.folder)
                 if is_whole(path / STATE_FILE) and is_whole(path / LORA_FILE)]
        for old in whole[cfg.keep:]:                           # every export stays, as any may be the best
            shutil.rmtree(old / "state", ignore_errors=True)   # NFS refuses while somebody reads it
    barrier()


def list_checkpoints(folder):
    """Checkpoints in a folder, newest first, without copies such as checkpoint-best. OSError if it may not be
    read (glob would find nothing)."""
    found = Path(folder).iterdir() if Path(folder).is_dir() else ()
    found = [path for path in found if re.fullmatch(r"checkpoint-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def find_checkpoint(path):
    """The newest whole checkpoint at or below a path; None if there is no checkpoint at all. A damaged one is
    passed over; if all are, it raises UsageError: a new start would overwrite what may be all that is left of
    the run. A file that cannot be read (a passing fault of the disk) is not damaged: OSError ends the run."""
    path = Path(path)
    candidates = [path] if path.name.startswith("checkpoint-") and path.exists() else list_checkpoints(path)
    for folder in candidates:
        if is_whole(folder / STATE_FILE) and is_whole(folder / LORA_FILE):
            return folder
        if (folder / STATE_FILE).exists():                     # others have only their export
            log(f"Checkpoint {folder} is damaged and is passed over.")
    if candidates:
        raise UsageError(f"All checkpoints at {path} are damaged or have no state/, and none was touched: "
                         "restore one, or move them away to start from the beginning.")
    return None


def find_start(run):
    """The checkpoint to go on from: the run's own newest one, or, to begin stage 2, that of stage 1. Sets the
    counters. UsageError, before any weight is loaded, if settings that change the result are not the same."""
    cfg, init = run.cfg, Path(run.cfg.init or Path(run.cfg.out) / "stage1")
    own = find_checkpoint(run.folder)
    start = own or (find_checkpoint(init) if cfg.stage == 2 else None)
    if not start and cfg.stage == 2:
        raise UsageError(f"No stage-1 checkpoint at {init}: run --stage 1 with this --out, or give --init.")
    if start:
        with explained(f"{start} is not of this version", "take another --out or --init"):
            saved = json.loads(safe_open(start / STATE_FILE, "pt").metadata()["rtdmd"])
            then = saved["config"] | {n: saved[n] for n in ("prompts", "iteration", "skipped")}
        now = dict(vars(cfg), prompts=run.prompt_hash)
        # To resume, all settings that change the result must agree; to begin stage 2, the network's.
        matter = now.keys() - FREE_SETTINGS - READ_BY_THE_OTHER[cfg.stage]
        matter = matter if own else {"model", "pretrained", "lora_rank", "lora_alpha"}
        changed = [f"{n} {then.get(n)!r} -> {now[n]!r}" for n in now if n in matter and then.get(n) != now[n]]
        if changed and not cfg.force_resume:
            raise UsageError(f"{start} was made with other settings ({'; '.join(changed)}): take those, or "
                             "another --out or --init, or --force_resume.")
        if own:
            run.done, run.skipped = then["iteration"], then["skipped"]
    return start


def load_start(run, start):
    """Copies a checkpoint: all of it to resume, the average and the fake score to begin stage 2."""
    wanted = lambda tensors: {n: p for n, p in tensors.items() if run.done or n in ("ema", "fake")}
    copy_tensors(wanted(load_file(start / STATE_FILE)), wanted(training_state(run)), start)
    if not run.done:
        run.roles.flat["generator"].data.copy_(run.ema)
    left = run.cfg.iterations - run.done
    log(f"{'Resumed' if run.done else 'Begun from'} {start}; {max(left, 0)} iterations are left.")


@torch.no_grad()
def copy_tensors(source, target, folder):
    """Copies tensors by name. Raises UsageError if those of `folder` belong to another network or rank."""
    if source.keys() != target.keys() or any(source[n].shape != p.shape for n, p in target.items()):
        raise UsageError(f"{folder} does not fit: take the --model, --pretrained and --lora_rank it has.")
    for name, tensor in target.items():
        tensor.copy_(source[name])


def prepare(cfg):
    """Everything that a stage needs, as `run`. Settings and checkpoints are checked before weights are
    loaded; rewards come last, when the text encoders have left the GPU."""
    run = SimpleNamespace(cfg=cfg, folder=Path(cfg.out) / f"stage{cfg.stage}", done=0, skipped=0,
                          bad=dict(generator=0, fake=0), terms={}, stop=False, board=None)
    own = getattr(backbone_class(cfg.model), "rewards", ())
    rewards, watched = parse_rewards(cfg.rewards, own), parse_rewards(cfg.watch, own, "--watch")
    run.prompts = PromptStream(cfg)
    run.prompt_hash = f"{len(run.prompts)} prompts, {key(run.prompts):016x}"
    start = find_start(run)
    run.device = start_processes(cfg.device)
    if len(set(everyone(key(vars(cfg), run.prompt_hash, start and start.name)))) > 1:
        raise UsageError("The processes differ in flags, prompts or newest checkpoint: start all with "
                         "one command, and give an --out that all nodes see.")
    if cfg.stage == 1 and cfg.batch // cfg.steps % dist_info()[2]:
        log(f"--batch {cfg.batch} splits unevenly: multiples of {cfg.steps * dist_info()[2]} are faster.")
    cfg.device = run.device
    # With bf16, TF32 for what stays fp32: rewards (an error of 2 % of a group's std with CLIP ViT-L/14,
    # docs/costs.md) and the network of a class that ignores dtype, as the tiny world's does.
    torch.set_float32_matmul_precision("high" if cfg.dtype == "bf16" else "highest")
    run.backbone = backbone_class(cfg.model)(cfg)
    if isinstance(run.backbone, (Flux1Backbone, Flux2Backbone)) and torch.__version__ < (2, 14):
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass mixes up memory layouts (costs.md)
    run.roles = Roles(run.backbone, cfg)
    run.times = timestep_schedule(cfg.steps, run.backbone.shift)
    run.text = TextCache(run.backbone, Path(cfg.cache) / "text")
    run.text.prepare(run.prompts)
    find = functools.cache(lambda name: load_reward(name, cfg, getattr(run.backbone, "rewards", {})))
    # None is a reward that eval.py --dry_run cannot make and leaves out.
    found = lambda pairs: {n: (r, weight) for n, weight in pairs if (r := find(n)) is not None}
    run.rewards = found(rewards if cfg.stage == 2 else ())
    if cfg.stage == 2 and not (cfg.dm_weight or cfg.policy_weight or pathwise_rewards(run)):
        raise UsageError("No reward is differentiable, so --policy_weight 0 and --dm_weight 0 leave nothing "
                         "to train: give one of them a weight, or a reward that has a gradient.")
    run.watched = {n: reward for n, (reward, _) in found(watched).items()}
    run.optimizers = {}
    for role, lr, decay in (("generator", cfg.lr, cfg.weight_decay), ("fake", cfg.lr_fake, 0.0)):
        p = run.roles.flat[role]
        run.optimizers[role] = torch.optim.AdamW([p], lr, betas=(0.9, 0.999), weight_decay=decay)
        run.optimizers[role].state[p] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p),
                                             exp_avg_sq=torch.zeros_like(p))  # now: a checkpoint has them all
    run.ema = run.roles.flat["generator"].data.clone()
    if start:
        load_start(run, start)
    cfg.micro_batch = cfg.micro_batch or micro_batch_of_card(run)
    return run


def micro_batch_of_card(run, most=16):
    """--micro_batch 0: as many samples as the GPU has memory for, less 15 %, and at most 16: more is no
    faster (docs/costs.md). The decoder computes activations twice only if fewer than 8 fit otherwise."""
    if not run.device.startswith("cuda"):
        return 4
    cfg, vae = run.cfg, getattr(run.backbone, "vae", None)
    rolled = cfg.groups * cfg.group_size if cfg.stage == 2 else cfg.batch // cfg.steps * cfg.fake_updates
    # Noise and states of every trajectory: K + (K + 1) latents in fp32.
    kept = len(share(rolled)) * (2 * cfg.steps + 1) * 4 * math.prod(run.backbone.latent_shape)
    for switch in ("disable", "enable"):
        if vae:
            getattr(vae, f"{switch}_gradient_checkpointing")()
        fits, reason = 1, "two samples do not fit"
        with contextlib.suppress(torch.OutOfMemoryError):
            one, two = (peak_bytes(run, n) for n in (1, 2))
            spare = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            free = torch.cuda.mem_get_info()[0] + spare - kept
            each = max(two - one, 1)
            fits = max(1, min(most, int(1 + (0.85 * free - one) / each)))
            reason = f"a sample takes {each / 1e9:.2f} GB, and {free / 1e9:.1f} GB are free"
        if fits >= 8:
            break
    log(f"Micro-batch {fits}: {reason}.")
    return fits


def peak_bytes(run, n):
    """GPU memory in bytes that n samples take in the largest pass with gradient: stage 2's through the last
    step, i.e. network, decoder and rewards. Stage 1 has no rewards, so it needs no decoder."""
    states = torch.randn(run.cfg.steps + 1, n, *run.backbone.latent_shape, device=run.device)
    scales = {name: torch.ones(n, device=run.device) for name in run.rewards}
    b = SimpleNamespace(states=states, prompts=[run.prompts.at(i) for i in range(n)], scales=scales,
                        slots=torch.full((n, run.cfg.subset_size + 1), run.cfg.steps))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        with torch.compiler.set_stance("force_eager"):
            with_reward = bool(pathwise_rewards(run))
            reinforce_slot(run, b, run.cfg.subset_size, with_reward, range(n), [0], states[0], True, n)
    finally:
        run.roles.flat["generator"].grad, run.terms = None, {}
    return torch.cuda.max_memory_allocated() - before


def note(run, n, **values):
    """Adds values, means over n samples, to this iteration's log. Tensors stay on the GPU: no wait for it."""
    for name, value in values.items():
        total, count = run.terms.get(name, (0.0, 0))
        run.terms[name] = (total + n * (value.detach() if torch.is_tensor(value) else value), count + n)


def gather(run):
    """This iteration's terms as floats, averaged over the samples of all processes."""
    parts = everyone({n: (float(total), count) for n, (total, count) in run.terms.items()})
    pairs = {n: zip(*(p[n] for p in parts if n in p)) for n in sorted(set().union(*parts))}
    return {n: sum(totals) / sum(counts) for n, (totals, counts) in pairs.items()}


def iterations(run):
    """Yields the iterations that are left. After each it logs, looks for signals and, if due, makes a panel
    and a checkpoint (but not while updates are not finite: that checkpoint would displace a good one)."""
    cfg, last = run.cfg, run.cfg.iterations
    bar = progress(range(run.done, last), last, f"stage {cfg.stage}", start=run.done)
    for it in bar:
        run.terms, start, (graphs, before) = {}, time.perf_counter(), compiled()
        yield it
        run.done = it + 1
        if (new := compiled()[0] - graphs) > 0:
            log(f"Iteration {run.done} compiled {new} graphs of the network's blocks, in "
                f"{compiled()[1] - before:.0f} s; later ones of the same shapes need none.")
        row = dict(iteration=run.done, **gather(run), skipped=run.skipped)
        if run.done % cfg.sample_every == 0 or run.done == last:
            row.update(panel(run))
        row["seconds"] = time.perf_counter() - start
        bar.set_postfix_str(record(run, row), refresh=False)
        stop, good = any(everyone(run.stop)), not any(run.bad.values())  # stop: of all, or one waits for ever
        if good and (run.done % cfg.save_every == 0 or run.done == last or stop):
            save_checkpoint(run)
        if stop:
            log(f"Stopped by a signal after iteration {run.done}; the same command goes on from the last "
                "checkpoint.")
            return
        if run.done == last and not good:
            raise UsageError("the last update was not finite, so no checkpoint is saved: correct what was "
                             "named, or give a lower --lr or --lr_fake and --force_resume.", code=1)


def phase(run, name):
    """A named part of an iteration. (eval.py --dry_run puts its cost meter here.)"""
    return contextlib.nullcontext()


@contextlib.contextmanager
def claim(cfg):
    """Makes the run folder, locks it against other runs, and deletes what a killed run left half-written."""
    folder = Path(cfg.out) / f"stage{cfg.stage}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"Another run writes to {folder}: end it, or take another --out.") from None
        for rest in [*folder.rglob(".*.partial")]:
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink(missing_ok=True)
        yield


def provenance():
    """Versions of the packages, and the commit of the source, marked as dirty if files have changed since."""
    names, git = "torch diffusers transformers peft open_clip_torch hpsv2".split(), None
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in names}
    with contextlib.suppress(FileNotFoundError):                             # there may be no git
        ask = "git describe --always --abbrev=40 --dirty --exclude *".split()
        git = subprocess.run(ask, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return dict(versions=versions, git=git)


def open_log(run):
    """Writes what made the run into start-000000 (start-000100 if it was resumed at iteration 100): settings,
    versions and sources. Settings and versions go into run.json, too. Drops the lines of metrics.jsonl that a
    resumed run will write again."""
    facts = dict(config=vars(run.cfg), processes=dist_info()[2], prompts=run.prompt_hash, **provenance(),
                 device=torch.cuda.get_device_name() if "cuda" in run.device else run.device)
    start = run.folder / f"start-{run.done:06d}"
    for folder in (run.folder, start):
        write_atomic(folder / "run.json", json.dumps(facts, indent=1))
    parts = [run.roles, run.backbone, *(reward for reward, _ in run.rewards.values())]
    for module in {sys.modules.get(part.__module__) for part in parts}:
        source = Path(getattr(module, "__file__", None) or "none/none")
        if source.parent in (Path.cwd(), Path(__file__).resolve().parent):  # ours and the user's
            write_atomic(start / source.name, source.read_bytes())
    path = run.folder / "metrics.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = re.findall(r'({"iteration": (\d+), .*}\n)', text)
    write_atomic(path, "".join(line for line, iteration in lines if int(iteration) <= run.done))
    with contextlib.suppress(ImportError):  # the same numbers as curves, if it is installed
        from torch.utils.tensorboard import SummaryWriter
        run.board = SummaryWriter(run.folder / "tensorboard", purge_step=run.done + 1)


def record(run, row):
    """Appends a row to metrics.jsonl. Returns the few numbers that the progress bar shows, as text."""
    row = {n: float(f"{v:.6g}") if isinstance(v, float) else v for n, v in row.items() if math.isfinite(v)}
    if dist_info()[0] == 0:
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items() if run.board else ():
            run.board.add_scalar(name, value, row["iteration"])
    show = [n for n in row if n in ("dm", "dsm", "grad_generator") or n.startswith(("reward_", "watch_"))]
    return " ".join(f"{n} {row[n]:.3g}" for n in show)


@torch.no_grad()
def panel(run):
    """Samples the averaged generator with fixed prompts and noise. Writes 16 pictures into
    OUT/stageN/samples/000100.png; returns, over 64, the watched rewards and what moves when a reward is
    hacked: saturation (max - min over channels), contrast (std of grey), edges (mean step to neighbours)."""
    prompts = sorted(run.prompts, key=lambda prompt: key("panel", prompt))[:64]
    keys, shape = [key("panel", p) for p in prompts], run.backbone.latent_shape
    _, normal = draw(keys, 0, run.cfg.steps, shape, run.device)
    theta = run.roles.flat["generator"]
    raw, theta.data = theta.data, run.ema
    states = rollout_in_chunks(run, normal[0], normal[1:], prompts)
    theta.data = raw
    parts = chunks(len(prompts), run.cfg.micro_batch)
    images = torch.cat([run.backbone.decode(states[-1][rows]).float() for rows in parts])
    rated = lambda n, reward: torch.cat([rate(n, reward, images[rows], prompts[rows]) for rows in parts])
    watched = {f"watch_{name}": rated(name, r).mean().item() for name, r in run.watched.items()}
    if dist_info()[0] == 0:
        write_png(run.folder / "samples" / f"{run.done:06d}.png", grid(images[:16], columns=8))
    grey = images.mean(1)
    edges = grey.diff(dim=1).abs().mean() + grey.diff(dim=2).abs().mean()
    return dict(watched, saturation=(images.amax(1) - images.amin(1)).mean().item(), edges=edges.item(),
                contrast=grey.flatten(1).std(1).mean().item())


def grid(images, columns):
    """Images (B, 3, H, W) in [0, 1] as one PIL image; small ones are enlarged to some 96 pixels."""
    images = F.interpolate(images, scale_factor=max(1, 96 // images.shape[-1]))
    images = F.pad(images, (1, 1, 1, 1, 0, 0, 0, -len(images) % columns), value=1.0)  # white after the last
    canvas = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return Image.fromarray((canvas * 255).round().byte().cpu().numpy())


def write_png(path, image):
    """Saves a PIL image by write_atomic."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def watch_signals(run):
    """SIGTERM and SIGINT end the run after this iteration, with a checkpoint and exit 0. A second SIGINT ends
    it at once, a second SIGTERM does not: torchrun sends one more. (It kills after 30 s: see train.sh.)"""
    def handler(number, _):
        run.stop = True
        if dist_info()[0] == 0:  # print may be what was interrupted
            os.write(2, b"\nStopping after this iteration; Ctrl-C again stops at once.\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------
# 11. Command line
# ------------------------------------------------------------------------------------------------------------

# Titles in --help, each at the first of its fields.
HELP_TITLES = dict(stage="what to run", pretrained="network", steps="sampler (App. C)", gamma="AC-DMD (3.1)",
                   rewards="hybrid policy gradient (3.2)", lr="optimisation (App. J)", save_every="records")


class FlagParser(argparse.ArgumentParser):
    """argparse that raises UsageError."""
    def error(self, message):
        raise UsageError(f"{message}: see --help.")


def parse_flags(argv, fields=None, titles=HELP_TITLES, usage="rtdmd.py --stage 1|2 --model NAME [flags]",
                about=__doc__, shown={}):
    """The flags that were given, by name; an unknown one is an error. The dataclass fields are their only
    list, here and in eval.py. shown: {field: default in --help} where it is not the field's."""
    parser = group = FlagParser(
        description=about.split("\n")[0], usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=25, width=115))
    for field in fields or dataclasses.fields(Config):
        group = parser.add_argument_group(titles[field.name]) if field.name in titles else group
        kind = dict(type=type(field.default), metavar="") | field.metadata["flag"]
        kind = dict(action="store_true") if field.default is False else kind
        default = shown.get(field.name, field.default)
        text = field.metadata["help"]
        text += "" if default is False or default in ("", ()) else f" [{default}]"
        group.add_argument(f"--{field.name}", help=text.replace("%", "%%"), **kind)
    return vars(parser.parse_args(argv))


# What PyTorch says, what it means here, and the exit status.
FAULTS = (
    ("MemoryError|ALLOC_FAILED|out of memory|can't allocate memory",
     "out of memory: lower --micro_batch (no result changes) or --batch, or add --checkpointing.", 1),
    ("through the graph a second time|by an inplace operation",
     "a reward has freed the graph of its result, or changed it in place: it may not call backward, and "
     "torch.autograd.grad only with retain_graph=True.", 2),
    ("Connection (closed|reset) by peer|remote process exited",
     "another process has ended: correct what it said.", 1))


@contextlib.contextmanager
def one_sentence(program):
    """Ends the program with one sentence, and no traceback, for all that a user can correct."""
    def end(text, code):
        print(f"{program}: {text}", file=sys.stderr)
        sys.exit(code)
    try:
        yield
    except UsageError as error:
        end(error, error.code)
    except KeyboardInterrupt:
        end("interrupted: the same command goes on from the last checkpoint, or starts again.", 130)
    except (MemoryError, RuntimeError) as error:
        for pattern, text, code in FAULTS:
            if re.search(pattern, f"{type(error).__name__} {error}"):
                end(text, code)
        raise
    except OSError as error:  # a disk is full, a folder vanished
        end(f"{error}: correct that, or choose another folder, and give the same command again.", 2)
    finally:
        error = sys.exc_info()[1]
        if error and dist.is_initialized() and dist.get_backend() == "nccl":
            # An orderly end would wait for processes that wait for this one; torchrun ends those.
            if not isinstance(error, SystemExit):
                sys.excepthook(type(error), error, error.__traceback__)
            sys.stdout.flush()
            os._exit(error.code if isinstance(error, SystemExit) else 1)
        elif dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None):
    """Trains one stage, from the command line, with its run folder locked."""
    with one_sentence("rtdmd"):
        cfg = resolve(parse_flags(argv))
        with claim(cfg) if dist_info()[0] == 0 else contextlib.nullcontext():
            run = prepare(cfg)
            if dist_info()[0] == 0:
                open_log(run)
            watch_signals(run)
            (stage1 if cfg.stage == 1 else stage2)(run)


if __name__ == "__main__":
    main()
