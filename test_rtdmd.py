"""Tests of rtdmd.py and eval.py, in the order of the two files: `python test_rtdmd.py` runs all of them, one process
per core; `python -m pytest -q test_rtdmd.py -k WORDS` some of them.

Map  section  what is tested                          against what
     0        the file as a text                      budgets of lines, the paper's equations
     1        flow algebra: Eq. 1, 2, 19              a mixture whose score is known at every level
     2        sampler: Eq. 20, 21                     the formulas written out
     3        AC-DMD: Eq. 4, 5, 8 to 12, 22           1-D mixtures, 40-point quadrature, the closed-form KL
     4        policy gradient: Eq. 6, 7, 13 to 18, 31 a linear-Gaussian generator whose gradient is known
     5        configuration                           the contract of the command line
     6        Algorithm 1: stage1, stage2             the expected gradients; small runs with every switch
     7        rewards                                 PIL, torchvision, transformers, open_clip
     8        backbones, export                       small networks of the real classes in the stock pipelines
     9        plumbing                                other numbers of processes, kills, damaged files, full disks
     10       command line                            one sentence for each mistake, and nothing written
     eval.py  metrics, prompts and embeddings,        the originals' names and rules at small size; costs counted
              reports, costs, ablations, tiny world   on paper; what is known of captions and judges
     At the end: the 1-D laboratory (`python test_rtdmd.py lab` prints how much each choice matters), and torture
     (`python test_rtdmd.py torture --kills 100` kills and resumes a run).

Everything runs offline on a CPU. The test of an equation is found by its number, "Eq. 17", and so is what a test
shows of a departure in rtdmd.py's docstring, "DEPARTURE 11".

Where a number comes from random draws, its tolerance is a multiple of the standard error of the same draws: off()
says how many standard errors the worst component is away from the truth. Below 4.5 is agreement (one false alarm
in 100 000), above 8 is proof of a difference; estimators are tested on both sides, so that a test that cannot fail
would be noticed.
"""
import argparse
import ast
import concurrent.futures
import contextlib
import copy
import dataclasses
import errno
import functools
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import socket
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"     # before huggingface_hub is imported: a missing file is an answer at once
os.environ["OMP_NUM_THREADS"] = "1"    # for the processes that tests start: more threads only wait for one another

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (AutoencoderKL, AutoencoderKLFlux2, DiffusionPipeline, FlowMatchEulerDiscreteScheduler,
                       Flux2KleinPipeline, Flux2Transformer2DModel, FluxPipeline, FluxTransformer2DModel,
                       SD3Transformer2DModel, StableDiffusion3Pipeline, ZImagePipeline, ZImageTransformer2DModel)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFont
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from tqdm import tqdm
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer,
                          Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model, T5Config, T5EncoderModel,
                          T5TokenizerFast)

import eval as ev
import rtdmd

torch.set_num_threads(1)


# -----------------------------------------------------------------------------------------------------------------
# What all sections share: statistics, files, sentences
# -----------------------------------------------------------------------------------------------------------------

AGREE, DIFFER = 4.5, 8.0


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def off(sample, truth=0.0):
    """Standard errors from the mean of independent rows (n, ...) to the truth, for the worst component."""
    sample = sample.double()
    error = sample.std(0) / len(sample) ** 0.5
    return float(((sample.mean(0) - truth).abs() / error).max())


def apart(a, b):
    """Standard errors between the means of independent samples (n, ...), (m, ...), for the worst component."""
    variance = sum(x.double().var(0) / len(x) for x in (a, b))
    return float(((a.double().mean(0) - b.double().mean(0)).abs() / variance.sqrt()).max())


def close(a, b, tolerance=1e-5):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def snapshot(folder):
    """Every file and its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stamps(folder):
    """Every file, its size and the time of its last change: snapshot without reading it all."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def sentence(error):
    """The text of a UsageError that was caught: one line, one sentence, not too long."""
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500, text
    return text


def settings(weights_dir=None, prompts=None):
    """The least that a reward or metric must be told."""
    return SimpleNamespace(weights_dir=weights_dir and str(weights_dir), device="cpu", prompts=prompts, std_floor=1e-4)


def prepared(argv):
    """A run that is ready to begin, from its command line."""
    return rtdmd.prepare(rtdmd.resolve(rtdmd.parse_flags(argv)))


# -----------------------------------------------------------------------------------------------------------------
# 0. The file as a text
# -----------------------------------------------------------------------------------------------------------------

EQUATIONS = [2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 31]    # numbered, not proofs


def test_the_file_stays_readable():
    """Its length, its functions' length, and a step of stage 2 without a jump: budgets, since files only grow."""
    source = Path(rtdmd.__file__).read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    longest = max(n.end_lineno - n.lineno + 1 for n in functions.values())
    assert len(lines) <= 2253 and longest <= 60 and max(map(len, lines)) <= 110
    assert functions["pathwise_terms"].end_lineno - functions["rollout_in_chunks"].lineno + 1 <= 250


@pytest.mark.parametrize("module", ["rtdmd.py", "test_rtdmd.py"])
def test_every_equation_is_cited(module):
    """By its number, "Eq. 17" or "Eqs. 20 and 21", in the docstring or comment of what it is, and of its test."""
    cited, text = set(), Path(rtdmd.__file__).with_name(module).read_text()
    for group in re.findall(r"Eqs?\. (\d+(?:(?:, | and | to |-)\d+)*)", text):
        ends = [int(number) for number in re.findall(r"\d+", group)]
        cited |= set(range(ends[0], ends[-1] + 1)) if re.search(" to |-", group) else set(ends)
    assert set(EQUATIONS) <= cited


# -----------------------------------------------------------------------------------------------------------------
# 1. Flow algebra (paper 2.1)
# -----------------------------------------------------------------------------------------------------------------

class Mixture:
    """p(x_s) = sum_j w_j N(m_j, d_j^2) in 1-D: boundary states at level s, known exactly at every t >= s.

    For s > 0 it need not be the noised version of anything (d_j < s): a student's states are not either.
    """

    def __init__(self, s=0.0, w=(0.3, 0.7), m=(-1.2, 0.8), d=(0.3, 0.5)):
        self.s = s
        self.w, self.m, self.d = (torch.tensor(a, dtype=torch.float64) for a in (w, m, d))

    def sample(self, n, g):
        j = torch.multinomial(self.w, n, True, generator=g)
        return (self.m[j] + self.d[j] * torch.randn(n, generator=g)).float()[:, None]

    def components(self, t):
        """Scale, means and variances (..., J) at level t: variances add, hence t^2 - a^2 s^2 of new noise."""
        t = torch.as_tensor(t, dtype=torch.float64)[..., None]
        a = (1 - t) / (1 - self.s)
        return a, a * self.m, (a * self.d) ** 2 + t ** 2 - (a * self.s) ** 2

    def responsibilities(self, x, t):
        _, mean, var = self.components(t)
        return torch.softmax(self.w.log() - 0.5 * var.log() - (x[..., None] - mean) ** 2 / (2 * var), -1)

    def score(self, x, t):
        _, mean, var = self.components(t)
        return (self.responsibilities(x, t) * (mean - x[..., None]) / var).sum(-1)

    def boundary(self, x, t):
        """E[x_s | x_t = x], component by component as for jointly Gaussian variables."""
        a, mean, var = self.components(t)
        means = self.m + a * self.d ** 2 / var * (x[..., None] - mean)
        return (self.responsibilities(x, t) * means).sum(-1)

    def velocity(self, x, t):
        """Eq. 2, for t < 1."""
        return -(x + t * self.score(x, t)) / (1 - t)

    def cdf(self, x, t):
        _, mean, var = self.components(t)
        return (self.w * torch.special.ndtr((x[..., None] - mean) / var.sqrt())).sum(-1)

    def variance(self, t):
        _, mean, var = self.components(t)
        return (self.w * (mean ** 2 + var)).sum(-1) - (self.w * mean).sum(-1) ** 2


@pytest.mark.parametrize("t", [0.02, 0.4, 0.97])
def test_velocity_is_the_score_in_other_units(t):
    """Eq. 1 with alpha = 1-t, sigma = t is Eq. 2, and both are E[eps - x_0 | x_t] of a known mixture."""
    world, x = Mixture(), torch.linspace(-3, 3, 41)
    score, x0 = world.score(x, t), world.boundary(x, t)
    v = (x - (1 - t) * x0) / t - x0                                        # E[eps | x_t] - E[x_0 | x_t]
    alpha_rate, sigma, sigma_rate = -1 / (1 - t), t, 1
    close(alpha_rate * x + (alpha_rate * sigma ** 2 - sigma_rate * sigma) * score, v)
    close(world.velocity(x, t), v)
    close(rtdmd.score_from_velocity(x, v, t), score, 1e-4)
    close(rtdmd.x0_from_velocity(x, v, t), x0)


def test_noise_prediction_has_no_division():
    """Eq. 19 without its division by t_{k-1}: the same number, and right where Eq. 19 is 0/0."""
    g = rng()
    x0, eps = torch.randn(2, 64, 3, generator=g)
    for t in (0.0, 0.1, 0.5, 1.0):
        x = (1 - t) * x0 + t * eps
        close(rtdmd.eps_from_velocity(x, eps - x0, t), eps)
        if t:
            prediction = rtdmd.x0_from_velocity(x, eps - x0, t)
            close(rtdmd.eps_from_velocity(x, eps - x0, t), (x - (1 - t) * prediction) / t)


# -----------------------------------------------------------------------------------------------------------------
# 2. Sampler (App. C). CPSScheduler inside the stock pipelines: section 8.
# -----------------------------------------------------------------------------------------------------------------

def test_timestep_schedule():
    """App. J's uniform grid, and the shifts of SD3 (3) and FLUX.2 (e^mu)."""
    close(rtdmd.timestep_schedule(4), [1, 0.75, 0.5, 0.25, 0])
    close(rtdmd.timestep_schedule(4, 3.0), [1, 0.9, 0.75, 0.5, 0])
    for steps, shift in itertools.product((1, 4, 50), (1.0, 3.0, math.exp(2.1))):
        times = rtdmd.timestep_schedule(steps, shift)
        assert len(times) == steps + 1 and times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()


@pytest.mark.parametrize("t, t_next", [(1.0, 0.75), (0.75, 0.5), (0.25, 0.0)])
def test_cps_step_is_the_written_out_formula(t, t_next):
    """Eq. 21 written out, Euler at eta 0, re-noising of the x-prediction at eta 1, Eq. 20 for the draw."""
    g = rng(1)
    x, v, noise = torch.randn(3, 64, 3, generator=g)
    prediction = x - t * v
    for eta in (0.0, 0.5, 0.9, 1.0):
        cos, sin = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
        mean, std = rtdmd.cps_mean_std(x, v, t, t_next, eta)
        close(mean, (1 - t_next + t_next * cos * (1 - 1 / t)) * prediction + t_next / t * cos * x)
        close(std, t_next * sin)
        close(rtdmd.cps_step(x, v, t, t_next, noise, eta), mean + t_next * sin * noise)
    close(rtdmd.cps_step(x, v, t, t_next, noise, 0.0), x + (t_next - t) * v)
    close(rtdmd.cps_step(x, v, t, t_next, noise, 1.0), (1 - t_next) * prediction + t_next * noise)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9, 1.0])
def test_cps_preserves_signal_and_noise_coefficients(eta):
    """Eq. 20: the exact velocity of a point c gives (1 - t_k) c + t_k N(0, 1) at every k, for any eta."""
    n, c, g = 100_000, 1.7, rng(2)
    times = rtdmd.timestep_schedule(4, 3.0)
    states, predictions = rtdmd.rollout(lambda x, t: (x - c) / t[:, None], torch.randn(n, 1, generator=g),
                                        torch.randn(3, n, 1, generator=g), times, eta)
    assert len(states) == 5 and len(predictions) == 4
    for t, x in list(zip(times, states))[:-1]:
        assert off(x, (1 - t) * c) < AGREE and off((x - (1 - t) * c) ** 2, t ** 2) < AGREE
    assert torch.equal(states[-1], predictions[-1])                        # the last step is deterministic
    close(states[-1], torch.full((n, 1), c))


def test_the_scheduler_stands_alone():
    """What people copy: the class, two functions and three imports, in an empty file of a fresh Python."""
    parts = (rtdmd.fp32, rtdmd.cps_mean_std, rtdmd.CPSScheduler)
    source = "import math\nimport torch\nimport diffusers\n" + "\n".join(map(inspect.getsource, parts))
    use = ("scheduler = CPSScheduler(shift=3.0)\nscheduler.set_timesteps(4)\nx = torch.ones(1, 2)\n"
           "print(scheduler.step(0 * x, scheduler.timesteps[0], x).prev_sample.shape == x.shape)\n")
    done = subprocess.run([sys.executable, "-c", source + use], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


# -----------------------------------------------------------------------------------------------------------------
# 3. AC-DMD (3.1, App. B, D, E, F)
# -----------------------------------------------------------------------------------------------------------------

LEVELS = [(0.0, 0.3), (0.25, 0.3), (0.25, 0.6), (0.5, 0.7), (0.75, 0.95)]      # (s, t)

WIDE = (0.6, 0.9)                # stds of a world that is as wide as noised data are, at any s up to .5
ETA, DIMS = 0.9, 2


# ---- Eq. 8 and Eq. 10: re-noising and the ambient score

@pytest.mark.parametrize("s, t", LEVELS)
def test_renoised_student_has_the_teachers_marginal(s, t):
    """Eq. 8, DEPARTURE 1: student = teacher at s stays so at t; with the printed (t-s)/(1-s) it does not."""
    teacher, n, g = Mixture(), 200_000, rng(3)
    x_s = (1 - s) * teacher.sample(n, g) + s * torch.randn(n, 1, generator=g)
    noise = torch.randn(n, 1, generator=g)
    points = torch.linspace(-1.5, 1.5, 7)

    def error():
        return off((rtdmd.renoise(x_s, s, t, noise) < points).double(), teacher.cdf(points, t))

    assert error() < AGREE
    with ev.replaced(["paper_std"], None):
        assert error() > DIFFER if s > 0 else error() < AGREE


def test_literal_std_of_the_paper_loses_variance():
    """DEPARTURE 1: at s = .5, t = .7, Eq. 8's printed std leaves a variance of .34 where psi expects .58."""
    a, kappa = rtdmd.renoise_coefficients(0.5, 0.7)
    assert abs(a ** 2 * 0.5 + kappa ** 2 - 0.58) < 1e-6
    with ev.replaced(["paper_std"], None):
        a, kappa = rtdmd.renoise_coefficients(0.5, 0.7)
    assert abs(a ** 2 * 0.5 + kappa ** 2 - 0.34) < 1e-6
    for s, t in LEVELS + [(0.6, 0.6), (0.6, 1.0)]:
        a, kappa = rtdmd.renoise_coefficients(s, t)
        close(a ** 2 * s ** 2 + kappa ** 2, t ** 2)


@pytest.mark.parametrize("s, t", [(0.25, 0.6), (0.5, 0.7)])
def test_the_boundary_mean_goes_with_the_papers_std(s, t):
    """Tweedie, App. B, on Gaussians: E[x_s | x_t] by regression, for whatever std re-noises."""
    g = rng(91)
    x_s, noise = 0.5 + 0.8 * torch.randn(200_000, 1, generator=g), torch.randn(200_000, 1, generator=g)
    with ev.replaced(["paper_std"], None):
        a, kappa = rtdmd.renoise_coefficients(s, t)
        mean, var = a * 0.5, (a * 0.8) ** 2 + kappa ** 2
        x_t = rtdmd.renoise(x_s, s, t, noise)
        v = (-x_t - t * -(x_t - mean) / var) / (1 - t)            # Eq. 2 with the score of x_t's law
        found = rtdmd.boundary_mean(x_t, v, s, t)
    close(found, 0.5 + a * 0.64 / var * (x_t - mean), 1e-4)
    assert off((found - x_s) * torch.cat([x_t, torch.ones_like(x_t)], 1)) < AGREE


@pytest.mark.parametrize("variants", [[], ["paper_std"]])
@pytest.mark.parametrize("s, t", LEVELS)
def test_ambient_loss_is_a_weighted_score_regression(s, t, variants):
    """Eq. 10 written out with scores: the loss differs from it by one positive number omega_k(t) only."""
    g = rng(4)
    x_s, noise, v = torch.randn(3, 256, 2, generator=g)
    with ev.replaced(variants, None):
        check_ambient_loss(s, t, x_s, noise, v)


def check_ambient_loss(s, t, x_s, noise, v):
    a, kappa = rtdmd.renoise_coefficients(s, t)
    x_t = rtdmd.renoise(x_s, s, t, noise)
    residual = rtdmd.score_from_velocity(x_t, v, t) - (a * x_s - x_t) / kappa ** 2
    c = (t - kappa ** 2) / ((1 - t) * kappa)
    omega = (t / (1 - t)) ** 2 / (c ** 2 + (s / (1 - s)) ** 2)
    close(rtdmd.ambient_dsm_loss(v, x_s, noise, s, t), omega * residual.square().mean(), 1e-3)
    implied = rtdmd.score_from_velocity(x_t, rtdmd.ambient_velocity_target(x_s, noise, s, t), t)
    close(implied, -noise / kappa, 1e-3)


def test_ambient_loss_at_s_0_is_flow_matching():
    """DEPARTURE 5: Eq. 10 at s = 0 is Eq. 5, including its weight."""
    x_0, noise, v = torch.randn(3, 64, 5, generator=rng(5))
    t = torch.rand(64, 1, generator=rng(6))
    close(rtdmd.ambient_velocity_target(x_0, noise, torch.zeros(64, 1), t), noise - x_0)
    close(rtdmd.ambient_dsm_loss(v, x_0, noise, 0.0, t), (v - (noise - x_0)).square().mean())


def test_ambient_loss_has_no_singularity():
    """DEPARTURE 5: Eq. 10 at s = 0, t -> s and t = 1 is finite, and so is its gradient; at most 1 near t = s."""
    g = rng(7)
    for s, gap in itertools.product((0.0, 0.25, 0.75), (1e-7, 1e-3, 1.0)):
        t = s + gap * (1 - s)
        world = Mixture(s)
        x_s, noise = world.sample(20_000, g), torch.randn(20_000, 1, generator=g)
        v = torch.randn(20_000, 1, generator=g, requires_grad=True)
        loss = rtdmd.ambient_dsm_loss(v, x_s, noise, s, t)
        loss.backward()
        assert loss.isfinite() and v.grad.isfinite().all()
        if 1e-6 < gap < 1:
            x_t = rtdmd.renoise(x_s, s, t, noise)
            assert rtdmd.ambient_dsm_loss(world.velocity(x_t, t), x_s, noise, s, t) < 1.05


def bumps(x):
    """A flexible basis: eighteen Gaussian bumps, a line and a constant. x (n, 1) -> (n, 20)."""
    centres = torch.linspace(-2.4, 2.4, 18)
    return torch.cat([torch.exp(-0.5 * ((x - centres) / 0.3) ** 2), x, torch.ones_like(x)], 1)


@pytest.mark.parametrize("s, t", [(0.25, 0.4), (0.25, 0.7), (0.5, 0.6), (0.5, 0.9)])
def test_ambient_loss_is_stationary_at_the_score(s, t):
    """Eq. 10, Prop. D.1: at the analytic velocity the slope is 0 in every direction, but not if x_s counts as clean."""
    world, n, g = Mixture(s), 100_000, rng(9)
    x_s, noise = world.sample(n, g), torch.randn(n, 1, generator=g)
    x_t = rtdmd.renoise(x_s, s, t, noise)

    def slope(other):
        v = other.velocity(x_t, t).float().requires_grad_()
        residual, = torch.autograd.grad(rtdmd.ambient_dsm_loss(v, x_s, noise, s, t), v)
        return off(n * residual * bumps(x_t))

    assert slope(world) < AGREE and slope(Mixture(0.0)) > DIFFER


# ---- Eq. 11, Eq. 12 and Eq. 22: self-consistency

def test_posterior_kernel_is_the_gaussian_bridge():
    """Eq. 11's p_phi: Bayes' rule for x'' given x' and x_0. The fixed-eta kernel is Eq. 20."""
    g = rng(10)
    x0, x, noise = torch.randn(3, 500, 1, generator=g)
    for t, t_next in [(0.9, 0.8), (1.0, 0.7), (0.5, 0.5), (0.4, 0.05), (0.3, 0.0)]:
        v = (x - x0) / t                                                   # makes x0 the x-prediction
        a, kappa = rtdmd.renoise_coefficients(t_next, t)
        var = (kappa * t_next) ** 2 / t ** 2                     # kappa^2 t''^2 / (kappa^2 + a^2 t''^2)
        mean = (1 - t_next) * x0 + a * t_next ** 2 / t ** 2 * (x - (1 - t) * x0)
        close(rtdmd.reverse_step(x, v, t, t_next, noise), mean + var.sqrt() * noise, 1e-4)
        fixed = rtdmd.reverse_step(x, v, t, t_next, noise, "cps", 0.9)
        close(fixed, rtdmd.cps_step(x, v, t, t_next, noise, 0.9))


def test_posterior_kernel_at_the_corner():
    """Eq. 11 at t' = t'' = 1, where bf16 levels may fall: x'' = x', and no 0/0."""
    x, v, noise = torch.randn(3, 8, 2, generator=rng(3))
    close(rtdmd.reverse_step(x, v, 1.0, 1.0, noise), x)
    one = torch.ones(8, 1)
    assert rtdmd.consistency_loss(lambda x, t: torch.zeros_like(x), x, v, one, one, noise, noise).isfinite()


NODES, WEIGHTS = (torch.tensor(a).float() for a in np.polynomial.hermite_e.hermegauss(40))


def residual_of(velocity, x, t, t_next, kernel):
    """h(x', t') - E h(x'', t'') of Eq. 11 at each x (n, 1), the expectation by 40-point quadrature: exact."""
    x_next = rtdmd.reverse_step(x, velocity(x, t).detach(), t, t_next, NODES, kernel, ETA)
    expected = (x_next - t_next * velocity(x_next, t_next)) @ (WEIGHTS / WEIGHTS.sum())[:, None]
    return x - t * velocity(x, t) - expected


def consistency_batches(fake, states, t, t_next, g, one_sample=False, kernel="posterior"):
    """consistency_loss on 100 batches of states (n, 1), (100,): their mean has a standard error."""
    losses = []
    for x in states.chunk(100):
        noise_1, noise_2 = torch.randn(2, len(x), 1, generator=g)
        noise_2 = noise_1 if one_sample else noise_2
        losses.append(rtdmd.consistency_loss(fake, x, fake(x, t), t, t_next, noise_1, noise_2, kernel, ETA))
    return torch.stack(losses)


@pytest.mark.parametrize("s, t", [(0.0, 0.5), (0.25, 0.5), (0.5, 0.75)])
def test_analytic_score_is_self_consistent(s, t):
    """Eq. 22, Prop. E.1, DEPARTURE 2: 0 within its standard error for our kernel, on clean and ambient states.

    Not so for the square of one draw, which adds the variance of h(x''), nor for the released fixed eta.
    """
    world, g = Mixture(s, d=WIDE), rng(11)
    states = rtdmd.renoise(world.sample(100_000, g), s, t, torch.randn(100_000, 1, generator=g))

    def loss(**options):
        fake = lambda x, t: world.velocity(x, t).float()
        return consistency_batches(fake, states, t, t - 0.05, g, **options)

    assert off(loss()) < AGREE
    assert off(loss(one_sample=True)) > DIFFER and off(loss(kernel="cps")) > DIFFER


@pytest.mark.parametrize("s, t", [(0.0, 0.5), (0.25, 0.5), (0.5, 0.75)])
def test_self_consistency_is_local(s, t):
    """Eq. 11, DEPARTURE 3: without sampling error, at the true score, it falls like (t'-t'')^4 for our kernel.

    It is not 0, because the bridge at the x-prediction is Gaussian and the true reverse step is not: reason
    enough to take t' and t'' close. With the fixed eta it does not fall at all.
    """
    world, g = Mixture(s, d=WIDE), rng(42)
    x = rtdmd.renoise(world.sample(5000, g), s, t, torch.randn(5000, 1, generator=g))

    def loss(delta, kernel):
        return residual_of(lambda x, t: world.velocity(x, t).float(), x, t, t - delta, kernel).square().mean()

    assert 6 < loss(0.1, "posterior") / loss(0.05, "posterior") < 25
    assert loss(0.05, "posterior") < 3e-4 and loss(0.05, "cps") > 100 * loss(0.05, "posterior")
    assert loss(0.05, "cps") > loss(0.1, "cps")


def wrong_fake(w):
    """A fake score that is wrong everywhere, with two weights (..., 2)."""
    return lambda x, t: w[..., :1] * torch.sin(2 * x) + w[..., 1:] * x * t


def test_two_draws_are_unbiased():
    """Eq. 22 estimates Eq. 11: value and gradient equal quadrature. The square of one draw does not."""
    g, t, t_next = rng(12), 0.6, 0.35
    x = torch.full((100_000, 1), 0.7)
    w = torch.tensor([0.9, -0.5], requires_grad=True)
    truth = residual_of(wrong_fake(w), x[:1], t, t_next, "posterior").square().mean()
    slope, = torch.autograd.grad(truth, w)
    copies = w.detach().expand(len(x), 2).clone().requires_grad_()   # one gradient per pair of draws
    noise_1, noise_2 = torch.randn(2, len(x), 1, generator=g)
    loss = rtdmd.consistency_loss(wrong_fake(copies), x, wrong_fake(copies)(x, t), t, t_next, noise_1, noise_2)
    slopes, = torch.autograd.grad(loss, copies)
    assert off(len(x) * slopes, slope) < AGREE
    values = consistency_batches(wrong_fake(w.detach()), x, t, t_next, g)
    squares = consistency_batches(wrong_fake(w.detach()), x, t, t_next, g, one_sample=True)
    assert off(values, truth.detach()) < AGREE and off(squares, truth.detach()) > DIFFER


def pooled(worlds):
    """Velocity that one fake score learns at t: the step-k laws with t_k < t, each with its density of t."""
    def velocity(x, t):
        weight, total = 0, 0
        for world in worlds:
            _, mean, var = world.components(t)
            here = (world.w / var.sqrt() * torch.exp(-(x[..., None] - mean) ** 2 / (2 * var))).sum(-1)
            here = torch.where(torch.as_tensor(world.s < t), here / (1 - world.s), 0.0)
            weight, total = weight + here, total + here * world.velocity(x, t)
        return total / weight
    return velocity


def test_consistency_holds_between_boundaries_and_not_across():
    """DEPARTURE 4: the pooled law changes at every t_j. Eq. 11's residual at its exact score is that of one law
    on either side of a t_j, and a hundred times as large from one side to the other, however close."""
    worlds = [Mixture(0.25, d=WIDE), Mixture(0.5, w=(0.5, 0.5), m=(-0.4, 1.6), d=WIDE)]
    x = torch.linspace(-2, 2, 41)[:, None].double()
    exact = lambda x, t: pooled(worlds)(x.double(), t).float()
    residual = lambda t, t_next: residual_of(exact, x.float(), t, t_next, "posterior").square().mean()
    above, below, across = residual(0.58, 0.55), residual(0.48, 0.45), residual(0.515, 0.485)
    assert across > 100 * max(above, below), (above, below, across)
    run = SimpleNamespace(cfg=SimpleNamespace(delta=0.2), times=rtdmd.timestep_schedule(4, 3.0),
                          backbone=SimpleNamespace(quantise=lambda t: t))
    t, u = torch.rand(2, 10_000, 1, 1, 1, generator=rng(52)).clamp(1e-3)
    t_next = rtdmd.draw_next_level(run, t, u)
    assert (t_next <= t).all() and (t - t_next <= 0.2 + 1e-6).all()
    for t_j in run.times.float():
        assert not ((t_next < t_j - 1e-6) & (t_j < t)).any()


def test_consistency_draws_come_from_the_reverse_step_and_are_constants():
    """Eq. 22, DEPARTURE 21: x'' is reverse_step's, and no gradient flows into it."""
    x, noise_1, noise_2 = torch.randn(3, 32, 1, generator=rng(13))
    for kernel, t in itertools.product(("posterior", "cps"), (1.0, 0.6)):
        v, seen = torch.zeros(32, 1, requires_grad=True), []

        def fake(x, t):
            seen.append(x)
            return torch.tanh(x)

        rtdmd.consistency_loss(fake, x, v, t, 0.5, noise_1, noise_2, kernel, ETA)
        for x_next, noise in zip(seen, (noise_1, noise_2)):
            assert not x_next.requires_grad
            close(x_next, rtdmd.reverse_step(x, v, t, 0.5, noise, kernel, ETA))


def test_consistency_term_does_not_move_the_minimiser():
    """Eq. 12: the true velocity stays best at any gamma with our kernel; the fixed eta pulls away.

    The slope of Eq. 11 at the truth, in twenty directions; that of Eq. 10 is 0 there (tested above).
    """
    s, t, t_next = 0.25, 0.6, 0.55
    world, g = Mixture(s, d=WIDE), rng(14)
    x = rtdmd.renoise(world.sample(5000, g), s, t, torch.randn(5000, 1, generator=g))
    w = torch.zeros(20, 1, requires_grad=True)

    def fake(x, t):
        return world.velocity(x, t).float() + (bumps(x.flatten()[:, None]) @ w).view_as(x)

    def slope(kernel):
        return torch.autograd.grad(residual_of(fake, x, t, t_next, kernel).square().mean(), w)[0].norm()

    assert slope("posterior") < 3e-3 and slope("cps") > 30 * slope("posterior")


# ---- Eq. 8 and Eq. 9: distribution matching

@pytest.mark.parametrize("s, t", LEVELS)
def test_boundary_mean_is_tweedie(s, t):
    """App. B: E[x_s | x_t] of a known mixture, from its velocity alone."""
    world, x = Mixture(s), torch.linspace(-2.5, 2.5, 31)
    close(rtdmd.boundary_mean(x, world.velocity(x, t), s, t), world.boundary(x, t), 1e-4)


def test_boundary_mean_at_pure_noise():
    """App. B at t = 1, where x_t says nothing: v = x - E x_0 gives E x_s = (1-s) E x_0, no division by 0."""
    x = torch.linspace(-2, 2, 9)
    close(rtdmd.boundary_mean(x, x - 0.7, 0.25, 1.0), torch.full((9,), 0.75 * 0.7))


def dmd_gradient(x_s, x_t, v_teacher, v_fake, s, t):
    """Gradient of dmd_loss in x_s, times the number of elements: g of each sample."""
    x_s = x_s.clone().requires_grad_()
    return torch.autograd.grad(rtdmd.dmd_loss(x_s, x_t, v_teacher, v_fake, s, t), x_s)[0] * x_s.numel()


@pytest.mark.parametrize("s, t", LEVELS)
def test_dmd_gradient_is_the_written_out_formula(s, t):
    """Eq. 9, DEPARTURE 6: its weight is kappa^2 / (a D); the loss has the value mean of g^2 / 2."""
    x_s, noise, v_teacher, v_fake = torch.randn(4, 64, 3, generator=rng(15))
    x_t = rtdmd.renoise(x_s, s, t, noise)
    a, kappa = rtdmd.renoise_coefficients(s, t)
    size = (x_s - rtdmd.boundary_mean(x_t, v_teacher, s, t)).abs().mean(1, keepdim=True)
    gap = rtdmd.score_from_velocity(x_t, v_fake, t) - rtdmd.score_from_velocity(x_t, v_teacher, t)
    g = dmd_gradient(x_s, x_t, v_teacher, v_fake, s, t)
    close(g, kappa ** 2 / (a * size) * gap, 1e-4)
    close(rtdmd.dmd_loss(x_s, x_t, v_teacher, v_fake, s, t), 0.5 * (g ** 2).mean())
    assert not dmd_gradient(x_s, x_t, v_teacher, v_teacher, s, t).any()     # equal scores: exactly zero
    target, mean = (rtdmd.boundary_mean(x_t, v, s, t) for v in (v_teacher, v_fake))
    close(dmd_gradient(target, x_t, v_teacher, v_fake, s, t), (mean - target) / 1e-3, 1e-3)   # D = 0 has a floor


def test_dmd_at_s_0_is_ordinary_dmd():
    """Eq. 4 as DMD2 implements it: (p_real - p_fake) / mean abs(p_real), p = x_0 - x-prediction."""
    x_0, noise, v_teacher, v_fake = torch.randn(4, 16, 3, 4, 4, generator=rng(17))
    t = torch.rand(16, 1, 1, 1, generator=rng(18)) * 0.96 + 0.02
    x_t = (1 - t) * x_0 + t * noise
    p_real, p_fake = x_0 - (x_t - t * v_teacher), x_0 - (x_t - t * v_fake)
    ordinary = (p_real - p_fake) / p_real.abs().mean((1, 2, 3), keepdim=True)
    close(dmd_gradient(x_0, x_t, v_teacher, v_fake, 0.0, t), ordinary, 1e-4)


def test_dmd_sends_no_gradient_into_the_networks():
    """Eq. 9: scores are constants, also x_t inside them; only the direct path through x_s is left."""
    leaves = [a.clone().requires_grad_() for a in torch.randn(4, 8, 3, generator=rng(19))]
    x_s, noise, v_teacher, v_fake = leaves
    x_t = rtdmd.renoise(x_s, 0.25, 0.6, noise)
    rtdmd.dmd_loss(x_s, x_t, v_teacher, v_fake, 0.25, 0.6).backward()
    assert v_teacher.grad is None and v_fake.grad is None and noise.grad is None
    plain = [a.detach() for a in (x_s, x_t, v_teacher, v_fake)]
    close(x_s.grad * 24, dmd_gradient(*plain, 0.25, 0.6))


def gaussian_kl(mean, var, other_mean, other_var):
    return 0.5 * ((var + (mean - other_mean) ** 2) / other_var - 1 - torch.log(var / other_var))


def dm_slopes(x_s, s, t, noise, teacher, moments):
    """Eq. 9 with lambda_k = 1, (n, 1): dmd_loss's gradient in x_s freed of its weight kappa^2 / (a D).

    The student is Gaussian with the given moments, so that its score is known.
    """
    mean, var = (a.detach() for a in moments)
    student = Mixture(s, (1.0,), (mean.item(),), (var.item() ** 0.5,))
    x_t, (a, kappa) = rtdmd.renoise(x_s, s, t, noise), rtdmd.renoise_coefficients(s, t)
    v_teacher, v_fake = teacher.velocity(x_t, t).float(), student.velocity(x_t, t).float()
    size = (x_s - rtdmd.boundary_mean(x_t, v_teacher, s, t)).abs().mean(1, keepdim=True)
    return dmd_gradient(x_s, x_t, v_teacher, v_fake, s, t) * size * a * a / kappa ** 2


@pytest.mark.parametrize("s, t", [(0.0, 0.3), (0.25, 0.6), (0.5, 0.9)])
def test_dmd_gradient_is_that_of_the_noised_kl(s, t):
    """Eq. 9 is the gradient of Eq. 8: location and scale of a Gaussian student against the closed-form KL."""
    n, g, teacher = 200_000, rng(20), Mixture(s, (1.0,), (0.6,), (0.7,))
    mean, scale = torch.tensor(-0.4, requires_grad=True), torch.tensor(0.9, requires_grad=True)
    a, kappa = rtdmd.renoise_coefficients(s, t)
    kl = gaussian_kl(a * mean, a ** 2 * scale ** 2 + kappa ** 2, a * 0.6, a ** 2 * 0.49 + kappa ** 2)
    truth = torch.stack(torch.autograd.grad(kl, (mean, scale)))
    unit, noise = torch.randn(2, n, 1, generator=g)
    slopes = dm_slopes((mean + scale * unit).detach(), s, t, noise, teacher, (mean, scale ** 2))
    assert off(torch.cat([slopes, slopes * unit], 1), truth) < AGREE


# -----------------------------------------------------------------------------------------------------------------
# 4. Hybrid policy gradient (3.2, App. G, H)
# -----------------------------------------------------------------------------------------------------------------

# ---- The parts: S, shared noise, log-probability, advantages

def test_reward_tilting_splits_into_two_terms():
    """Eq. 6 and Eq. 7 on 50 outcomes: gradient of KL to the tilted teacher = DM term - beta * reward term. A
    derivation: it uses nothing of rtdmd.py, which test_total_gradient_is_that_of_the_tilted_kl compares with it."""
    g, beta = rng(21), 1.7
    theta, teacher, reward = torch.randn(3, 50, generator=g, dtype=torch.float64)
    theta.requires_grad_()
    teacher = teacher.softmax(0)
    tilted = teacher * torch.exp(beta * reward)
    tilted = tilted / tilted.sum()
    student = theta.softmax(0)

    def slope(value):
        return torch.autograd.grad(value, theta, retain_graph=True)[0]

    def kl(other):
        return (student * (student / other).log()).sum()

    close(slope(kl(tilted)), slope(kl(teacher)) - beta * slope((student * reward).sum()), 1e-12)
    assert (slope(kl(tilted)) - slope(kl(teacher))).norm() > 0.01


def test_choose_steps_is_uniform():
    """S of 3.2: sorted, of the right size, every subset equally often, reproducible."""
    draws = [tuple(rtdmd.choose_steps(5, 2, g)) for g in [rng(24)] for _ in range(6000)]
    subsets = list(itertools.combinations(range(1, 5), 2))
    assert set(draws) == set(subsets)
    counts = torch.tensor([[draw == subset for subset in subsets] for draw in draws])
    assert off(counts, 1 / 6) < AGREE
    assert rtdmd.choose_steps(4, 3, rng()) == [1, 2, 3]
    assert rtdmd.choose_steps(9, 4, rng(1)) == rtdmd.choose_steps(9, 4, rng(1))


def test_group_noise_structure():
    """Eq. 16: independent inside S, the same bits for the group outside S; steps and groups independent."""
    g, size, steps = rng(25), 4, 4
    groups = torch.stack([rtdmd.group_noise((3, 50), [2], size, steps, g) for _ in range(200)])
    assert groups.shape == (200, 3, size, 3, 50)
    assert all(torch.equal(groups[:, k, i], groups[:, k, 0]) for k in (0, 2) for i in range(size))
    rows = groups.flatten(3).transpose(1, 3).flatten(0, 1)                 # (200 * 150, N, K-1)
    assert off(rows.flatten(1)) < AGREE and off(rows.flatten(1) ** 2, 1.0) < AGREE
    products = [rows[:, 0, 1] * rows[:, 1, 1],                             # two members, the selected step
                rows[:, 0, 0] * rows[:, 0, 1], rows[:, 0, 0] * rows[:, 0, 2],          # two steps
                (groups[:-1, :, 0] * groups[1:, :, 0]).flatten()[:30_000]]             # two groups
    assert off(torch.stack([a[:29_000] for a in products], 1)) < AGREE


def test_log_prob_is_the_exact_gaussian_averaged_over_dimensions():
    """Eq. 13, DEPARTURE 7: against torch.distributions, with the 1 / (2 std^2) of a likelihood ratio."""
    x, mean = torch.randn(2, 5, 4, 6, 6, generator=rng(22))
    for std in (0.05, 0.7, torch.rand(5, 1, 1, 1, generator=rng(23)) + 0.1):
        exact = torch.distributions.Normal(mean, torch.as_tensor(std)).log_prob(x).mean((1, 2, 3))
        close(rtdmd.gaussian_log_prob(x, mean, std), exact)
    assert rtdmd.gaussian_log_prob(x, mean, 0.7).shape == (5,)


def test_reward_scale_has_a_floor():
    """App. H's std: a group that agrees up to rounding gets advantages near 0, not a vote of +-1."""
    agree = 0.9 + 1e-7 * torch.randn(1, 8, generator=rng(27))
    assert rtdmd.group_advantages(agree, "group", 1e-4).abs().max() < 0.01
    assert rtdmd.reward_scale(agree, "group", 0.05).item() == pytest.approx(0.05)
    spread = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    close(rtdmd.reward_scale(spread), [[0.5 ** 0.5], [4.5 ** 0.5]])
    close(rtdmd.reward_scale(spread, "global"), spread.std())


def test_advantages():
    """A_i of App. H: mean 0, std 1 per group; DEPARTURE 12: without std the others are the baseline."""
    rewards = torch.randn(6, 5, generator=rng(26)) * torch.tensor([0.1, 1, 1, 2, 3, 10])[:, None]
    grouped = rtdmd.group_advantages(rewards)
    close(grouped.mean(1), torch.zeros(6))
    close(grouped.std(1), torch.ones(6))
    centred = rewards - rewards.mean(1, keepdim=True)
    close(rtdmd.group_advantages(rewards, "global"), centred / rewards.std())
    others = (rewards.sum(1, keepdim=True) - rewards) / 4
    close(rtdmd.group_advantages(rewards, "none"), rewards - others, 1e-4)


# ---- A linear-Gaussian generator with two parameters, whose expected reward is known

THETA = torch.tensor([0.3, -0.4])


def toy_velocity(theta, x, t):
    """A linear-Gaussian generator with two parameters, v = p x + q. theta (B, 2), x (B, D)."""
    return theta[:, :1] * x + theta[:, 1:]


def toy_reward(x):
    """A bump at 1, averaged over dimensions, (..., D) -> (...)."""
    return torch.exp(-0.5 * (x - 1) ** 2).mean(-1)


def toy_moments(theta, times, last=None):
    """Mean and variance of x_{t_K}, exactly. theta (2,) for steps 1..K-1, `last` for step K."""
    mean, var = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    steps = len(times) - 1
    for k in range(1, steps + 1):
        p, q = (last if last is not None and k == steps else theta).double()
        t, t_next = times[k - 1], times[k]
        cos, sin = math.cos(ETA * math.pi / 2), math.sin(ETA * math.pi / 2)
        slope = (1 - t_next) * (1 - t * p) + t_next * cos * (1 + (1 - t) * p)
        mean = slope * mean + (t_next * cos * (1 - t) - (1 - t_next) * t) * q
        var = slope ** 2 * var + (t_next * sin) ** 2
    return mean, var


def toy_objective(theta, times, last=None):
    """E r(x_0), exactly."""
    mean, var = toy_moments(theta, times, last)
    return torch.exp(-0.5 * (mean - 1) ** 2 / (1 + var)) / torch.sqrt(1 + var)


def toy_gradients(steps):
    """The exact stochastic and pathwise parts of Eq. 14, (2,) each."""
    times = rtdmd.timestep_schedule(steps)
    theta, last = THETA.clone().requires_grad_(), THETA.clone().requires_grad_()
    return torch.autograd.grad(toy_objective(theta, times, last), (theta, last))


def toy_rollouts(groups, size, steps, selected, seed=0, share_noise=True, share_initial=False, dims=DIMS,
                 shift=1.0):
    """States x_{t_0} .. x_{t_K}, (G, N, D) each, of `groups` groups that have the same S."""
    g = rng(seed)
    independent = selected if share_noise else range(1, steps)
    noise = rtdmd.group_noise((groups, dims), independent, size, steps, g).transpose(1, 2).flatten(1, 2)
    x = torch.randn(groups, 1 if share_initial else size, dims, generator=g)
    x = x.expand(-1, size, -1).flatten(0, 1)
    theta, times = THETA.expand(len(x), 2), rtdmd.timestep_schedule(steps, shift)
    states, _ = rtdmd.rollout(lambda x, t: toy_velocity(theta, x, t), x, noise, times, ETA)
    return [x.unflatten(0, (groups, size)) for x in states]


def over_subsets(steps, size, subset_size, groups, seed, **options):
    """Rollouts for every S of the given size in turn, the same number of groups each: [(S, states)]."""
    subsets = list(itertools.combinations(range(1, steps), subset_size))
    return [(S, toy_rollouts(groups // len(subsets), size, steps, S, seed + i, **options))
            for i, S in enumerate(subsets)]


def toy_estimates(states, selected, std="none", advantages=None):
    """One estimate per group of both parts of Eq. 14, (G, 2) each, by rtdmd's own losses.

    Every group gets its own copy of theta, so that one backward pass gives all groups' gradients. The losses
    are means over dimensions: D times their gradient is compared with the truth.
    """
    groups, size, dims = states[0].shape
    steps = len(states) - 1
    times = rtdmd.timestep_schedule(steps)
    theta = THETA.expand(groups, 2).clone().requires_grad_()
    member = theta.repeat_interleave(size, 0)
    if advantages is None:
        advantages = rtdmd.group_advantages(toy_reward(states[-1]), std)
    x = [state.flatten(0, 1) for state in states]

    def step(k):
        return rtdmd.cps_mean_std(x[k - 1], toy_velocity(member, x[k - 1], None), times[k - 1], times[k], ETA)

    log_prob = torch.stack([rtdmd.gaussian_log_prob(x[k], *step(k)) for k in selected], 1)
    policy = rtdmd.subgrpo_loss(log_prob, log_prob.detach(), advantages.flatten(), steps, 1e-5)
    pathwise = rtdmd.pathwise_loss(toy_reward(step(steps)[0]), dims=dims)
    slopes = [torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in (policy, pathwise)]
    return [-dims * groups * slope for slope in slopes]


def test_exact_gradient_agrees_with_finite_differences():
    """Eq. 14's left side: the closed form that judges all others, by common random numbers."""
    steps, n = 4, 100_000
    noise, x = torch.randn(3, n, DIMS, generator=rng(29)), torch.randn(n, DIMS, generator=rng(30))

    def rewards(theta):
        states, _ = rtdmd.rollout(lambda x, t: toy_velocity(theta.expand(n, 2), x, t), x, noise,
                                  rtdmd.timestep_schedule(steps), ETA)
        return toy_reward(states[-1])

    steps_of_theta = 0.02 * torch.eye(2)
    slopes = torch.stack([(rewards(THETA + d) - rewards(THETA - d)) / 0.04 for d in steps_of_theta], 1)
    assert off(slopes, sum(toy_gradients(steps))) < AGREE


# ---- Eq. 14 to Eq. 18 and Eq. 31: the gradients

@pytest.mark.parametrize("steps", [2, 3])
def test_hybrid_gradient_is_the_gradient_of_the_expected_reward(steps):
    """Eq. 14 with Eq. 15, Prop. G.1: REINFORCE + pathwise = closed form; neither alone, nor counted twice."""
    stochastic, pathwise = toy_gradients(steps)
    everything = list(range(1, steps))
    states = toy_rollouts(50_000, 1, steps, everything, seed=28)
    rewards = toy_reward(states[-1])
    policy, last = toy_estimates(states, everything, advantages=rewards)
    truth = stochastic + pathwise
    assert off(policy, stochastic) < AGREE and off(last, pathwise) < AGREE
    assert off(policy + last, truth) < AGREE
    assert off(policy, truth) > DIFFER and off(last, truth) > DIFFER
    assert off(policy + through_all_steps(states), truth) > DIFFER
    assert off(through_all_steps(states), truth) < AGREE  # it is the whole gradient already


def replayed(theta, states):
    """x_{t_K} (G N, D) of the same draws, with gradient through every step. theta (G N, 2)."""
    times, x = rtdmd.timestep_schedule(len(states) - 1), states[0].flatten(0, 1)
    for k in range(1, len(states)):
        mean, _ = rtdmd.cps_mean_std(x, toy_velocity(theta, x, None), times[k - 1], times[k], ETA)
        x = mean + (states[k].flatten(0, 1) - mean).detach()
    return x


def through_all_steps(states):
    """The mistake of App. G.2: gradient flows on into x_{t_{K-1}}. Per trajectory, (G N, 2)."""
    theta = THETA.expand(len(states[0].flatten(0, 1)), 2).clone().requires_grad_()
    loss = rtdmd.pathwise_loss(toy_reward(replayed(theta, states)), dims=DIMS)
    return -DIMS * len(theta) * torch.autograd.grad(loss, theta)[0]


@pytest.mark.parametrize("share_initial", [False, True])
@pytest.mark.parametrize("subset_size", [1, 2, 3])
def test_subgrpo_is_unbiased_over_subsets(subset_size, share_initial):
    """Eq. 17 with leave-one-out advantages = the stochastic part of Eq. 14; M = K-1 is naive GRPO, Eq. 31.

    The group mean as baseline shrinks it by (N-1)/N (DEPARTURE 12), leaving out (K-1)/M by M/(K-1) (DEPARTURE 9).
    """
    steps, size = 4, 3
    truth, _ = toy_gradients(steps)
    rollouts = over_subsets(steps, size, subset_size, 60_000, 31, share_initial=share_initial)

    def estimates(advantages):
        return torch.cat([toy_estimates(states, S, advantages=advantages(toy_reward(states[-1])))[0]
                          for S, states in rollouts])

    one_out = estimates(lambda r: rtdmd.group_advantages(r, "none"))
    mean_in = estimates(lambda r: r - r.mean(1, keepdim=True))
    assert off(one_out, truth) < AGREE
    assert off(mean_in, truth * (size - 1) / size) < AGREE and off(mean_in, truth) > AGREE
    if subset_size < 3:
        assert off(one_out * subset_size / 3, truth) > AGREE


def test_ratio_is_one_and_the_clip_acts_after():
    """Eq. 17: ratios are exactly 1 before the first update; what went too far after it gets no gradient."""
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    log_prob = (torch.randn(4, 2, generator=rng(33)) * 40).requires_grad_()
    loss = rtdmd.subgrpo_loss(log_prob, log_prob.detach(), advantages, 4, 1e-5)
    gradient, = torch.autograd.grad(loss, log_prob)
    close(gradient, -1.5 * advantages[:, None].expand(4, 2) / 4)           # (K-1)/M = 3/2, no clip at ratio 1

    old = torch.zeros(4, 1)
    moved = torch.tensor([[2e-5], [-2e-5], [2e-5], [-2e-5]], requires_grad=True)
    gradient, = torch.autograd.grad(rtdmd.subgrpo_loss(moved, old, advantages, 4, 1e-5), moved)
    close(gradient, torch.tensor([[0.0], [-0.75], [0.75], [0.0]]), 1e-4)


def test_pathwise_loss_is_in_the_units_of_the_policy_term():
    """Eq. 15: minus the mean reward, over the advantage's std and over the dimensions."""
    reward = torch.randn(6, generator=rng(34), requires_grad=True)
    scale = torch.rand(6, generator=rng(35)) + 0.5
    close(rtdmd.pathwise_loss(reward), -reward.mean())
    gradient, = torch.autograd.grad(rtdmd.pathwise_loss(reward, scale, 12), reward)
    close(gradient, -1 / (6 * 12 * scale))


def test_the_pathwise_term_divides_each_reward_by_its_own_std():
    """Eq. 15, DEPARTURE 11: over the differentiable rewards, weight times reward over the std in its advantages."""
    mean, square = (lambda x, prompts: x.mean(1)), (lambda x, prompts: x.square().mean(1))
    mean.differentiable = square.differentiable = True
    blind = SimpleNamespace(differentiable=False)                           # not even called
    run = SimpleNamespace(rewards={"mean": (mean, 2.0), "square": (square, -0.5), "blind": (blind, 9.0)},
                          cfg=rtdmd.Config(), backbone=SimpleNamespace(decode=lambda x: 3 * x))
    x, scale = torch.randn(6, 4, generator=rng(36), requires_grad=True), torch.rand(6, generator=rng(35)) + 0.5
    loss = rtdmd.pathwise_terms(run, x, [""] * 6, dict(mean=scale, square=1 + scale, blind=scale))
    close(loss, -(2 * 3 * x.mean(1) / scale - 0.5 * 9 * x.square().mean(1) / (1 + scale)).mean() / 4)


def test_the_price_of_shared_units():
    """DEPARTURE 11: a group's std holds the noise of its S only, so Eq. 15, divided by it, weighs more for some S.

    On FLUX.2's grid, where the last state has almost forgotten the first steps' noise, S = {1, 2} weighs 2.7 times
    as much as S = {2, 3}; on SD3's 1.6 times, on the uniform one 1.2. One std over all prompts is one number.
    """
    rollouts = [toy_rollouts(2000, 24, 4, S, 72, shift=math.exp(2.1)) for S in ([1, 2], [1, 3], [2, 3])]
    rewards = [toy_reward(states[-1]) for states in rollouts]
    weights = [rtdmd.reward_scale(r, "group").reciprocal().mean() for r in rewards]
    assert max(weights) == weights[0] > 2 * min(weights), weights
    assert rtdmd.reward_scale(torch.cat(rewards), "global").numel() == 1


def test_total_gradient_is_that_of_the_tilted_kl():
    """Eq. 18: DM - beta (SubGRPO + pathwise) = gradient of (noised KL - beta E r), on a 3-step generator."""
    steps, size, beta, t, groups = 3, 4, 1.3, 0.4, 30_000
    times, teacher = rtdmd.timestep_schedule(steps), Mixture(0.0, (1.0,), (0.3,), (0.6,))
    theta = THETA.clone().requires_grad_()
    mean, var = toy_moments(theta, times)
    kl = gaussian_kl((1 - t) * mean, (1 - t) ** 2 * var + t ** 2, (1 - t) * 0.3, (1 - t) ** 2 * 0.36 + t ** 2)
    truth, = torch.autograd.grad(kl - beta * toy_objective(theta, times), theta)

    totals = []
    for S, states in over_subsets(steps, size, 1, groups, 36):
        policy, pathwise = toy_estimates(states, S)
        totals.append(dm_estimates(states, teacher, t) - beta * (policy + pathwise))
    assert off(torch.cat(totals), truth) < AGREE
    without = torch.cat(totals) + beta * toy_gradients(steps)[1]           # the pathwise part left out
    assert off(without, truth) > DIFFER


def dm_estimates(states, teacher, t):
    """Eq. 4 for the linear generator, x_0 differentiated through every step, one estimate per group."""
    groups, size, _ = states[0].shape
    times = rtdmd.timestep_schedule(len(states) - 1)
    theta = THETA.expand(groups, 2).clone().requires_grad_()
    x = replayed(theta.repeat_interleave(size, 0), states)
    x_0 = x.detach().reshape(-1, 1)                              # dimensions are independent: samples too
    noise = torch.randn(len(x_0), 1, generator=rng(37))
    slopes = dm_slopes(x_0, 0.0, t, noise, teacher, toy_moments(THETA, times))
    return torch.autograd.grad((x * slopes.view_as(x)).mean(1).sum() / size, theta)[0]


# ---- What the functions of 2 to 5 promise besides their formulas

def test_every_sample_may_have_its_own_level():
    """Levels (B, 1) give what the same levels give as numbers, sample by sample."""
    x, v, noise, other = torch.randn(4, 5, 3, generator=rng(43))
    s = torch.tensor([0.0, 0.25, 0.25, 0.5, 0.75])[:, None]
    t = torch.tensor([0.3, 0.4, 1.0, 0.7, 0.9])[:, None]
    losses = [lambda x, v, n, o, s, t: rtdmd.ambient_dsm_loss(v, x, n, s, t),
              lambda x, v, n, o, s, t: rtdmd.consistency_loss(lambda x, t: t * x, x, v, t, s, n, o),
              lambda x, v, n, o, s, t: rtdmd.dmd_loss(x, n, v, o, s, t)]
    for loss in losses:
        rows = [loss(*(a[i:i + 1] for a in (x, v, noise, other)), float(s[i]), float(t[i])) for i in range(5)]
        close(loss(x, v, noise, other, s, t), torch.stack(rows).mean())


def test_fp32_out_for_bf16_in():
    """bf16 in, fp32 arithmetic and fp32 out: rounding on the way would drown x - t v."""
    x, v, noise, other = torch.randn(4, 8, 3, generator=rng(38)).bfloat16()
    fake = torch.tanh
    pure = dict(
        x0_from_velocity=lambda x, v, n, o: rtdmd.x0_from_velocity(x, v, 0.9582),
        eps_from_velocity=lambda x, v, n, o: rtdmd.eps_from_velocity(x, v, 0.9582),
        score_from_velocity=lambda x, v, n, o: rtdmd.score_from_velocity(x, v, 0.9582),
        cps_mean=lambda x, v, n, o: rtdmd.cps_mean_std(x, v, 0.9582, 0.7, 0.9)[0],
        cps_step=lambda x, v, n, o: rtdmd.cps_step(x, v, 0.9582, 0.7, n, 0.9),
        renoise=lambda x, v, n, o: rtdmd.renoise(x, 0.3, 0.9582, n),
        target=lambda x, v, n, o: rtdmd.ambient_velocity_target(x, n, 0.3, 0.9582),
        dsm=lambda x, v, n, o: rtdmd.ambient_dsm_loss(v, x, n, 0.3, 0.9582),
        reverse=lambda x, v, n, o: rtdmd.reverse_step(x, v, 0.9582, 0.9, n),
        consistency=lambda x, v, n, o: rtdmd.consistency_loss(lambda x, t: fake(x), x, v, 0.9582, 0.9, n, o),
        boundary=lambda x, v, n, o: rtdmd.boundary_mean(x, v, 0.3, 0.9582),
        dmd=lambda x, v, n, o: rtdmd.dmd_loss(x, n, v, o, 0.3, 0.9582),
        log_prob=lambda x, v, n, o: rtdmd.gaussian_log_prob(x, v, 0.7),
        pathwise=lambda x, v, n, o: rtdmd.pathwise_loss(x[:, 0]),
        scale=lambda x, v, n, o: rtdmd.reward_scale((20 + x.bfloat16()).to(x.dtype)),
        advantages=lambda x, v, n, o: rtdmd.group_advantages((20 + x.bfloat16()).to(x.dtype)),
        subgrpo=lambda x, v, n, o: rtdmd.subgrpo_loss(x, v, n[:, 0], 4, 0.1),
    )
    for name, f in pure.items():
        low, high = f(x, v, noise, other), f(x.float(), v.float(), noise.float(), other.float())
        assert low.dtype == torch.float32, name
        close(low, high, 1e-6)


def copied(*names):
    """The source text of functions alone, in an empty module that knows only math and torch: returns the last."""
    module = {"math": math, "torch": torch}
    for name in names:
        exec(inspect.getsource(getattr(rtdmd, name)), module)
    return module[names[-1]]


def test_functions_can_be_copied_out():
    """What people will copy works without the rest of the file, and gives the same number."""
    x, v, noise_1, noise_2 = torch.randn(4, 16, 3, generator=rng(39))
    cps_mean_std = copied("fp32", "cps_mean_std")
    close(cps_mean_std(x, v, 0.75, 0.5, 0.9)[0], rtdmd.cps_mean_std(x, v, 0.75, 0.5, 0.9)[0], 0)
    consistency_loss = copied("fp32", "x0_from_velocity", "reverse_step", "consistency_loss")
    for kernel in ("posterior", "cps"):
        arguments = (lambda x, t: torch.sin(x), x, v, 0.75, 0.5, noise_1, noise_2, kernel, 0.9)
        close(consistency_loss(*arguments), rtdmd.consistency_loss(*arguments), 0)
    dmd_loss = copied("fp32", "boundary_mean", "dmd_loss")
    close(dmd_loss(x, noise_1, v, noise_2, 0.25, 0.6), rtdmd.dmd_loss(x, noise_1, v, noise_2, 0.25, 0.6), 0)
    group_noise, subgrpo_loss = copied("group_noise"), copied("subgrpo_loss")
    log_prob = group_noise((2,), [1, 3], 5, 4, rng(40))[0]
    close(log_prob, rtdmd.group_noise((2,), [1, 3], 5, 4, rng(40))[0], 0)
    arguments = (log_prob, 0.9 * log_prob, torch.randn(5, generator=rng(41)), 4, 0.1)
    close(subgrpo_loss(*arguments), rtdmd.subgrpo_loss(*arguments), 0)


# -----------------------------------------------------------------------------------------------------------------
# 5. Configuration
# -----------------------------------------------------------------------------------------------------------------

def test_zero_is_the_stages_own():
    """0, where a stage has a value of its own, is the same as not naming the setting."""
    own = rtdmd.resolve(dict(model="tiny", device="cpu"))
    zeros = dict(lr=0.0, lr_fake=0.0, iterations=0, fake_updates=0)
    assert rtdmd.resolve(dict(model="tiny", device="cpu", **zeros)) == own
    assert (own.lr, own.iterations, own.dtype) == (1e-3, 150, "fp32")


def test_the_papers_numbers():
    """Iterations, learning rates, fake updates, guidance and groups of each model: paper 4.1, App. J, released."""
    names = "iterations fake_updates lr lr_fake guidance groups".split()
    slow = dict(lr=1e-6, lr_fake=1e-6)
    for model, guidance, groups, first in (("sd3m", 7, 48, {}), ("sd35m", 4.5, 48, {}), ("sd35l", 3.5, 48, {}),
                                           ("flux1", 3.5, 64, {}), ("flux2-4b", 4, 64, slow),
                                           ("flux2-9b", 4, 64, slow), ("zimage", 5, 48, slow)):
        flag = dict(model=model, device="cpu", prompts="rows.jsonl")        # geneval wants such rows
        one, two = ({n: getattr(rtdmd.resolve(flag | dict(stage=stage)), n) for n in names} for stage in (1, 2))
        own = dict(iterations=1500, fake_updates=10, lr=3e-5, lr_fake=3e-5, guidance=guidance, groups=48)
        assert one == own | first
        assert two == dict(iterations=1000, fake_updates=1, lr=3e-6, lr_fake=first.get("lr_fake", 3e-5),
                           guidance=guidance, groups=groups)


def test_geneval_as_a_reward_asks_for_metadata_at_once():
    """flux2-4b's own geneval is refused before 20 GB are loaded; others that are called alike are not."""
    for rewards in ({}, dict(rewards="geneval"), dict(rewards="ocr=.5, geneval =2,hpsv2")):
        with pytest.raises(rtdmd.UsageError, match="FILE.jsonl"):
            rtdmd.resolve(dict(stage=2, model="flux2-4b", device="cpu") | rewards)
    rows = dict(stage=2, model="flux2-4b", device="cpu", prompts="rows.jsonl")
    assert rtdmd.resolve(rows).groups == 64
    for rewards in ("geneval2", "my_rewards:geneval", "my_geneval:score=1"):
        assert rtdmd.resolve(dict(stage=2, model="sd3m", device="cpu", rewards=rewards)).rewards == rewards


# -----------------------------------------------------------------------------------------------------------------
# 6. The two stages (App. I, Algorithm 1)
# -----------------------------------------------------------------------------------------------------------------

# ---- Sharing passes through the networks keeps the expected gradients

FAKE, TEACHER = torch.tensor([-0.6, 0.5]), torch.tensor([0.4, -1.0])


def toy_run(monkeypatch, stage, iterations, dims=128, rewards=None, **options):
    """The gradients {role: (updates, 2)} of a stage's own loop on the linear-Gaussian world, v = p x + q."""
    settings = dict(stage=stage, eta=ETA, gamma=0.0, batch=8, fake_updates=3 if stage == 1 else 1, groups=2,
                    group_size=8, micro_batch=9)
    settings |= {} if rewards else dict(policy_weight=0.0, det_weight=0.0)
    cfg = rtdmd.Config(**settings | options)
    weights = {"generator": THETA.clone().requires_grad_(), "fake": FAKE.clone().requires_grad_(),
               "teacher": TEACHER}
    gradients = {"generator": [], "fake": []}

    def keep_gradient(run, role):
        gradients[role].append(weights[role].grad)
        weights[role].grad = None
        return False

    velocity = lambda role, x, t, cond: weights[role][0] * x + weights[role][1]
    run = SimpleNamespace(
        cfg=cfg, device="cpu", times=rtdmd.timestep_schedule(cfg.steps), terms={}, rewards=rewards or {},
        prompts=SimpleNamespace(at=lambda i: "ab"[i % 2]),
        text=SimpleNamespace(batch=lambda prompts, device: {}, prefetch=lambda prompts: None),
        backbone=SimpleNamespace(latent_shape=(dims,), quantise=lambda t: t, decode=lambda x: x),
        roles=SimpleNamespace(velocity=velocity, teacher=lambda x, t, cond, null: velocity("teacher", x, t, cond)))
    with monkeypatch.context() as patch:
        patch.setattr(rtdmd, "iterations", lambda run: range(iterations))
        patch.setattr(rtdmd, "optimizer_step", keep_gradient)
        if not rewards:
            patch.setattr(rtdmd, "judge_groups", lambda run, b: None)
        (rtdmd.stage1 if stage == 1 else rtdmd.stage2)(run)
    return {role: torch.stack(rows) for role, rows in gradients.items() if rows}


def fresh_fake_gradient():
    """Gradient (2,) of Eq. 10 for a fresh rollout at a random step k, exactly: x_s Gaussian, fake linear."""
    times, u, total = rtdmd.timestep_schedule(4), (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000, 0.0
    p, q = FAKE.double()
    for k in range(1, 5):
        mean, var = toy_moments(THETA, times[:k + 1])
        s = float(times[k])
        t = s + (1 - s) * (0.01 + 0.98 * u)
        a, b = (1 - t) / (1 - s), 1 / (1 - s)
        kappa = (t * t - a * a * s * s).sqrt()
        c = (t - kappa ** 2) / ((1 - t) * kappa)
        square, x_t = var + mean ** 2, a * mean                             # of x_s, and E x_t
        residual_x = p * (a * a * square + kappa ** 2) + q * x_t + a * b * square - kappa * c      # E (v - v*) x_t
        residual = p * x_t + q + b * mean                                                             # E (v - v*)
        weight = 2 / (c ** 2 + (b * s) ** 2)
        total = total + torch.stack([(weight * residual_x).mean(), (weight * residual).mean()]) / 4
    return total


def fresh_matching_gradients(n=6000, dims=128):
    """Eq. 9 on all K steps of n fresh rollouts, the mean of each (n, 2): what a random k expects."""
    g, times = rng(71), rtdmd.timestep_schedule(4)
    theta, total = THETA.expand(n, 2).clone().requires_grad_(), 0.0
    velocity = lambda w, x: w[..., :1] * x + w[..., 1:]
    states, _ = rtdmd.rollout(lambda x, t: velocity(THETA, x), torch.randn(n, dims, generator=g),
                              torch.randn(3, n, dims, generator=g), times, ETA)
    for k in range(1, 5):
        s = float(times[k])
        mean, _ = rtdmd.cps_mean_std(states[k - 1], velocity(theta, states[k - 1]), times[k - 1], s, ETA)
        x_s = states[k] + mean - mean.detach()
        t = s + (1 - s) * (0.01 + 0.98 * torch.rand(n, 1, generator=g))
        x_t = rtdmd.renoise(x_s.detach(), s, t, torch.randn(n, dims, generator=g))
        total = total + n * rtdmd.dmd_loss(x_s, x_t, velocity(TEACHER, x_t), velocity(FAKE, x_t), s, t) / 4
    return torch.autograd.grad(total, theta)[0]


def test_every_process_trains_every_step(monkeypatch):
    """Line 4 on 8 processes: each has all k of 1..K, as equally as 9 of 72 samples allow; together exactly so."""
    everywhere = []

    def walk(run, normal, k, cond):
        everywhere.append(k.tolist())
        raise StopIteration

    monkeypatch.setattr(rtdmd, "walk", walk)
    run = SimpleNamespace(cfg=rtdmd.Config(batch=72, fake_updates=1, micro_batch=72), device="cpu", terms={},
                          prompts=SimpleNamespace(at=str), text=SimpleNamespace(batch=lambda *more: {}),
                          backbone=SimpleNamespace(latent_shape=(1,)))
    for rank in range(8):
        monkeypatch.setattr(rtdmd, "dist_info", lambda: (rank, rank, 8))
        with pytest.raises(StopIteration):
            rtdmd.update_generator(run, 0, 0)
        counts = [everywhere[-1].count(k) for k in (1, 2, 3, 4)]
        assert sum(counts) == 9 and max(counts) - min(counts) <= 1
    assert [sum(own.count(k) for own in everywhere) for k in (1, 2, 3, 4)] == [18] * 4


def test_dmd2_matches_the_x_prediction_as_a_clean_sample(monkeypatch):
    """App. K: what Eq. 9 gets is the x-prediction of step k at s = 0, whatever eta, with its gradient."""
    matched, predicted, prediction = [], [], rtdmd.x0_from_velocity

    def x0_from_velocity(x, v, t):
        predicted.append((x - t * v).detach())
        return prediction(x, v, t)

    def matching_loss(run, x_s, s, *more):
        assert (s == 0).all() and x_s.requires_grad
        matched.append(x_s.detach())
        return x_s.sum()

    monkeypatch.setattr(rtdmd, "x0_from_velocity", x0_from_velocity)
    monkeypatch.setattr(rtdmd, "matching_loss", matching_loss)
    with ev.replaced(["dmd2_renoising"], None):
        toy_run(monkeypatch, 1, 2, dims=3)
    known = torch.cat(predicted)
    assert len(matched) >= 2
    assert all((known - row).abs().amax(1).min() < 1e-5 for rows in matched for row in rows)


@pytest.mark.parametrize("stage", [1, 2])
def test_shared_rollouts_keep_the_expected_gradients(stage, monkeypatch):
    """Algorithm 1 as with a fresh rollout and a random step k for each sample: Eq. 10 and Eq. 9.

    Stage 1: F fake updates on the K states of shared rollouts, DEPARTURE 17, DEPARTURE 22; k in equal parts for
    the generator, DEPARTURE 16, and the gradient through step k alone, DEPARTURE 19. Stage 2: the fake score on the
    rollout's own states; matching on one of the M + 1 forwards, DEPARTURE 13.

    Per iteration, so that rows are independent, and in stage 1 for each of the F updates by itself. It can fail:
    a step that is never visited is 14 to 70 standard errors away, step K matched in a third instead of a quarter
    of all cases 7.
    """
    n, weight = 400, 0.5 if stage == 2 else 1.0                             # stage 1 has no weight to give
    found, fresh = toy_run(monkeypatch, stage, n, dm_weight=weight), fresh_matching_gradients()
    updates = found["fake"].view(n, -1, 2)
    assert off(updates, fresh_fake_gradient()) < AGREE and apart(found["generator"], weight * fresh) < AGREE


@pytest.mark.parametrize("subset_size", [1, 2, 3])
def test_stage_2_climbs_the_exact_gradient(subset_size, monkeypatch):
    """The very loop of stage 2 gives Eq. 14: its stochastic part through S, noise and advantages (Eqs. 16, 17), its
    pathwise part through the last step (Eq. 15), each times its weights in Eq. 18, both per dimension."""
    def reward(images, prompts):
        return toy_reward(images)

    reward.differentiable, ratio = True, 2.0 * 1.5 * 0.5                    # weights of the reward, beta, the term
    stochastic, pathwise = toy_gradients(4)
    options = dict(dims=DIMS, rewards={"bump": (reward, 2.0)}, beta=1.5, dm_weight=0.0,
                   groups=24, micro_batch=192, subset_size=subset_size)
    for term, truth in ((dict(det_weight=0.0, policy_weight=0.5), stochastic),
                        (dict(policy_weight=0.0, det_weight=0.5), pathwise)):
        with ev.replaced(["no_std"], None):
            found = -DIMS * toy_run(monkeypatch, 2, 80, **options | term)["generator"]
        assert off(found, ratio * truth) < AGREE and off(found) > DIFFER, term


def test_a_push_is_the_norm_of_a_terms_gradient():
    """Eq. 18 in the log: push_NAME is the norm of one term's gradient at the velocity, the mean over its samples."""
    n, D, bright = 5, 6, lambda images, prompts: images.sum(1)
    bright.differentiable, g = True, rng(38)
    cfg = rtdmd.Config(beta=1.5, policy_weight=0.5, det_weight=2.0, dm_weight=0.7)
    states, pull, A = torch.randn(5, n, D, generator=g), torch.randn(n, D, generator=g), torch.randn(n, generator=g)
    b = SimpleNamespace(states=states, slots=torch.tensor([[1, 3, 4]] * n), prompts=[""] * n, advantages=A,
                        scales={"bright": torch.rand(n, generator=g) + 0.5}, old=torch.zeros(n, 2))
    q, times = torch.zeros((), requires_grad=True), rtdmd.timestep_schedule(4)
    run = SimpleNamespace(cfg=cfg, device="cpu", times=times, terms={}, rewards={"bright": (bright, 3.0)},
                          roles=SimpleNamespace(velocity=lambda role, x, t, cond: q + 0.3 * x),
                          text=SimpleNamespace(batch=lambda *more: {}), backbone=SimpleNamespace(decode=lambda x: x))
    for slot in (1, 2):                                                     # step 3 of S, and step K
        rtdmd.reinforce_slot(run, b, slot, True, range(n), [0, 2] if slot == 1 else [], pull, True, 3 * n)
    mean, std = rtdmd.cps_mean_std(states[2], 0.3 * states[2], times[2], times[3], 0.9)
    slope = abs(-0.75 * 0.5 + 0.25 * math.cos(0.45 * math.pi) * 0.5)        # of Eq. 20's mean in v
    policy = 1.5 * 0.5 * 3 / 2 * A.abs() * ((states[3] - mean) / std ** 2 / D).norm(dim=1) * slope
    found = {name: float(total / count) for name, (total, count) in run.terms.items()}
    close(found["push_policy"], policy.mean())
    close(found["push_dm"], 0.7 * pull[[0, 2]].norm(dim=1).mean() * slope)
    close(found["push_det"], 1.5 * 2.0 * 3.0 * D ** 0.5 / D * 0.25 * (1 / b.scales["bright"]).mean())


def test_one_side_of_the_consistency_term_is_enough(monkeypatch):
    """Eq. 12: update_fake's gradient is gamma times that of Eq. 11 at the levels that it drew, each of its own u."""
    n, w, drawn, uniforms = 40_000, torch.tensor([0.9, -0.5]), {}, []
    copies = w.expand(n, 2).clone().requires_grad_()
    cfg = rtdmd.resolve(dict(model="tiny", device="cpu", gamma=2.0, micro_batch=n, delta=0.3,
                             consistency_share=1.0))
    velocity = lambda role, x, t, cond: wrong_fake(copies)(x, t)
    run = SimpleNamespace(cfg=cfg, device="cpu", terms={}, times=rtdmd.timestep_schedule(4, 1.0),
                          roles=SimpleNamespace(velocity=velocity), text=SimpleNamespace(batch=lambda *a: {}),
                          backbone=SimpleNamespace(quantise=lambda t: t))
    original = rtdmd.reverse_step

    def reverse_step(x, v, t, t_next, *rest):
        drawn.update(x=x, t=t, t_next=t_next)
        return original(x, v, t, t_next, *rest)
    for name in ("draw_level", "draw_next_level"):
        monkeypatch.setattr(rtdmd, name, lambda run, t, u, at=getattr(rtdmd, name): uniforms.append(u) or at(run, t, u))
    monkeypatch.setattr(rtdmd, "reverse_step", reverse_step)
    monkeypatch.setattr(rtdmd, "ambient_dsm_loss", lambda v, *rest: 0 * v.sum())
    monkeypatch.setattr(rtdmd, "optimizer_step", lambda run, role: None)
    k, x_s = torch.arange(n) % 4 + 1, torch.randn(n, 1, generator=rng(51))
    rtdmd.update_fake(run, 0, 0, x_s, run.times[k].float(), k, [""] * n, list(range(n)), n)
    monkeypatch.undo()
    u, other = torch.cat(uniforms, 1).double().T
    moments = torch.stack([u, other, u ** 2, other ** 2, u * other], 1)     # uniform and independent
    assert off(moments, torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 4])) < AGREE
    exact = w.expand(n, 2).clone().requires_grad_()
    residual = residual_of(wrong_fake(exact), drawn["x"], drawn["t"], drawn["t_next"], "posterior")
    slopes, = torch.autograd.grad(residual.square().sum(), exact)
    assert off(n * copies.grad - 2.0 * slopes) < AGREE and slopes.mean(0).abs().min() > 1e-3


def test_a_share_of_the_consistency_term_has_the_mean_of_all(monkeypatch):
    """Eq. 12 with --consistency_share: in a quarter of the updates, divided by a quarter. gamma 0 costs nothing."""
    n, passes, gradients = 32, [], {}
    monkeypatch.setattr(rtdmd, "ambient_dsm_loss", lambda v, *rest: 0 * v.sum())
    for share, gamma in ((1.0, 2.0), (0.25, 2.0), (0.25, 0.0)):
        w = torch.tensor([0.9, -0.5], requires_grad=True)
        cfg = rtdmd.Config(model="tiny", gamma=gamma, micro_batch=20, delta=0.3, consistency_share=share,
                           fake_updates=4)
        velocity = lambda role, x, t, cond: passes.append(len(x)) or wrong_fake(w.expand(len(x), 2))(x, t)
        run = SimpleNamespace(cfg=cfg, device="cpu", terms={}, times=rtdmd.timestep_schedule(4, 1.0),
                              roles=SimpleNamespace(velocity=velocity), backbone=SimpleNamespace(quantise=lambda t: t),
                              text=SimpleNamespace(batch=lambda prompts, device: {"text": torch.zeros(len(prompts))}))
        found, k = gradients.setdefault((share, gamma), []), torch.arange(n) // 8 % 4 + 1
        monkeypatch.setattr(rtdmd, "optimizer_step", lambda run, role: found.append(w.grad.clone()) or w.grad.zero_())
        for i in range(800):
            x_s = torch.randn(n, 1, generator=rng(i))
            rtdmd.update_fake(run, i // 4, i % 4, x_s, run.times[k].float(), k, [""] * n, list(range(n)), n)
        assert sum(passes) == 800 * n * (1 + 2 * share if gamma else 1) and set(passes) == {16}
        passes.clear()
    every, some, none = (torch.stack(rows) for rows in gradients.values())
    has = some.any(1)
    assert has.sum() == 200 and not none.any()
    close(some[has], 4 * every[has])                                    # the very gradient of an update with the term
    assert off(some - every) < AGREE and off(every) > DIFFER


def test_a_quarter_of_the_updates_has_the_consistency_term():
    """DEPARTURE 23: in a run each update with probability q, evenly spaced within an iteration; by the seed."""
    for stage, updates, q in ((1, 10, 0.25), (2, 1, 0.25), (1, 4, 1.0), (2, 3, 0.3)):
        cfg = rtdmd.Config(stage=stage, consistency_share=q, fake_updates=updates)
        have = torch.tensor([[rtdmd.has_consistency(cfg, it, u) for u in range(updates)] for it in range(1000)])
        assert set(have.sum(1).tolist()) <= {math.floor(q * updates), math.ceil(q * updates)}
        assert (have.double().mean(0) - q).abs().max() < 5 * (q * (1 - q) / 1000) ** 0.5 + 1e-6
        gaps = torch.cat([row.nonzero()[:, 0].diff() for row in have]).tolist()
        assert {math.floor(1 / q), math.ceil(1 / q)} >= set(gaps)
        other = rtdmd.Config(stage=stage, consistency_share=q, fake_updates=updates, seed=1)
        assert q == 1 or any(rtdmd.has_consistency(other, it, 0) != have[it, 0] for it in range(40))


def test_an_update_uses_no_trajectory_twice():
    """Each k equally often in every fake update; in stage 1 each state once in an iteration."""
    K, n = 4, 32
    for updates in (4, 5, 10):
        cfg = rtdmd.Config(stage=1, batch=n, fake_updates=updates)
        ids, seen = list(range(n // K * updates)), set()
        for update in range(updates):
            rows, k = rtdmd.states_of_update(cfg, update, ids)
            assert len(set(rows)) == n and k.bincount().tolist() == [0, 8, 8, 8, 8]
            seen |= {*zip(rows, k.tolist())}
        assert len(seen) == n * updates
    assert all(rtdmd.fake_steps(cfg, it, 0, range(n)).bincount().tolist() == [0, 8, 8, 8, 8] for it in range(4))


def compiled_by(monkeypatch, backend):
    """rtdmd.compile_blocks with another backend; "aot_eager" traces and splits the graphs, but needs no compiler."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compile_module(module, backend=backend, **how))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("name, backend", [("sd3m", "aot_eager"), ("flux2-4b", "eager"), ("zimage", "eager")])
def test_compiled_blocks_compute_what_eager_ones_do(folders, name, backend, monkeypatch):
    """Outputs and gradients of each role; after an optimizer step too (an adapter that the compiler took for a
    constant would stay as it was). Roles share the graphs; nothing is compiled twice, and no graph is broken."""
    compiled_by(monkeypatch, backend)
    graphs, backbones = [], [backbone_of(folders, name) for _ in range(2)]
    both = [rtdmd.Roles(b, rtdmd.Config(model=name, device="cpu", lora_rank=4)) for b in backbones]
    for net in dict.fromkeys(both[1].nets.values()):
        rtdmd.compile_blocks(net)
    x, t, cond = latents(backbones[0]), torch.tensor([.75, .5]), backbones[0].encode(PROMPTS)
    for step in range(3):
        found = []
        for roles in both:
            for i, p in enumerate(roles.flat.values()):
                p.data += 0.05 * torch.randn(p.shape, generator=rng(10 * step + i))
            found.append([])
            for role in ("generator", "fake"):
                v = roles.velocity(role, x, t, cond)
                with torch.no_grad():
                    found[-1] += [v, roles.velocity("fake", x, t, cond), roles.velocity("teacher", x, t, cond)]
                v.square().mean().backward()
                found[-1].append(roles.flat[role].grad)
                roles.flat[role].grad = None
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        graphs.append(rtdmd.compiled()[0])
    # Two kinds of blocks, with and without gradient, and without adapter; the first block's input has no gradient.
    assert graphs == [graphs[0]] * 3 and 6 <= graphs[0] <= 9
    assert not torch._dynamo.utils.counters["graph_break"]


def test_each_shape_has_a_graph_of_its_own(folders, monkeypatch):
    """No graph is made for any number of samples: it would take longer to make, and be slower."""
    sizes = []

    def backend(graph, inputs):
        sizes.extend(n for x in inputs for n in (x.shape if torch.is_tensor(x) else [x]))
        return graph.forward

    compiled_by(monkeypatch, backend)
    backbone = backbone_of(folders, "sd3m")
    roles = rtdmd.Roles(backbone, rtdmd.Config(model="sd3m", device="cpu", lora_rank=4))
    rtdmd.compile_blocks(roles.nets["teacher"])
    x, cond = latents(backbone), backbone.encode(PROMPTS)
    for rows in ([0], [0, 1], [0, 1, 0]):
        with torch.no_grad():
            roles.velocity("teacher", x[rows], torch.full((len(rows),), .5), {n: c[rows] for n, c in cond.items()})
    assert not any(isinstance(n, torch.SymInt) for n in sizes) and {1, 2, 3} <= set(sizes)


@pytest.mark.parametrize("stage", [1, 2])
def test_no_graph_is_compiled_after_the_first_iterations(stage, flags, monkeypatch):
    """The loops use few shapes, all of them in the first iteration: forwards without gradient in parts of their own,
    matching on a fixed number of rows; and the consistency term's shapes are those of the other passes."""
    compiled_by(monkeypatch, "eager")                                   # the graphs are cut before a backend sees them
    more = ["--batch", 16, "--micro_batch", 8] if stage == 1 else ["--group_size", 4, "--micro_batch", 4]
    run = prepared(flags(stage, "--iterations", 6, *more))
    rtdmd.compile_blocks(run.roles.nets["generator"])
    monkeypatch.setattr(rtdmd, "has_consistency", lambda cfg, it, update: it >= 2)
    graphs = []
    monkeypatch.setattr(rtdmd, "iterations", lambda run: (graphs.append(rtdmd.compiled()[0]) or it for it in range(4)))
    (rtdmd.stage1 if stage == 1 else rtdmd.stage2)(run)
    assert 0 == graphs[0] < graphs[1] and graphs[1:] == [graphs[1]] * 3, graphs


@pytest.mark.parametrize("reason", ["no C++ compiler here", "CUDA error: an illegal memory access"])
def test_a_compiler_that_fails_is_one_line(reason, flags, monkeypatch, capfd, tmp_path):
    """The update is done again without it: the numbers of a run that never compiled. A GPU that has failed computes
    nothing more in this process."""
    rtdmd.main(flags(1, "--out", tmp_path / "eager"))

    def broken(graph, inputs):
        raise RuntimeError(reason)

    compiled_by(monkeypatch, broken)
    roles = rtdmd.Roles.__init__

    def compiled_roles(self, backbone, cfg):
        roles(self, backbone, cfg)
        rtdmd.compile_blocks(self.nets["generator"])

    monkeypatch.setattr(rtdmd.Roles, "__init__", compiled_roles)
    capfd.readouterr()
    if "CUDA" in reason:
        with pytest.raises(SystemExit) as end:
            rtdmd.main(flags(1))
        text = capfd.readouterr().err
        assert end.value.code == 1 and "start again with --no_compile." in text and "Traceback" not in text
        return
    try:
        rtdmd.main(flags(1))
    finally:
        torch.compiler.set_stance("default")
    text = capfd.readouterr().err
    assert text.count("cannot compile the network") == 1 and reason in text and "Traceback" not in text
    a, b = state_of(tmp_path / "eager/stage1"), state_of(tmp_path / "run/stage1")
    assert all(torch.equal(p, b[n]) for n, p in a.items())


def test_only_what_a_card_has_confirmed_is_compiled():
    """SD3's blocks, on a GPU, unless --no_compile."""
    told = lambda model, **more: rtdmd.resolve(dict(model=model, device="cpu", prompts="p.jsonl", **more)).no_compile
    assert not told("sd3m") and not told("sd35m") and told("sd3m", no_compile=True)
    assert all(map(told, ("tiny", "flux1", "flux2-4b", "flux2-9b", "zimage")))


def on_a_card(stage, free, monkeypatch):
    """A run on a GPU with so many bytes free, and its decoder, whose `again` says whether it computes twice."""
    vae = SimpleNamespace(again=True)
    vae.enable_gradient_checkpointing = lambda: setattr(vae, "again", True)
    vae.disable_gradient_checkpointing = lambda: setattr(vae, "again", False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    backbone = SimpleNamespace(vae=vae, latent_shape=(0,))
    return SimpleNamespace(device="cuda:0", cfg=rtdmd.Config(stage=stage), backbone=backbone), vae


@pytest.mark.parametrize("stage, free, expected, checkpointed", [
    (1, 20, 16, None), (1, 6, 5, None), (1, .1, 1, None), (2, 20, 16, False), (2, 6, 10, True), (2, 1, 1, True)])
def test_micro_batch_0_is_what_the_card_holds(stage, free, expected, checkpointed, monkeypatch, capfd):
    """85 % of the free memory, at most 16 samples; the decoder computes again only where 8 would not fit without."""
    run, vae = on_a_card(stage, free * 1e9, monkeypatch)
    monkeypatch.setattr(rtdmd, "peak_bytes", lambda run, n: (0.1 + n * (.5 if stage == 2 and vae.again else 1)) * 1e9)
    assert rtdmd.micro_batch_of_card(run) == expected
    assert f"Micro-batch {expected}: " in capfd.readouterr().err
    assert checkpointed is None or vae.again is checkpointed


@pytest.mark.parametrize("stage, kept", [(2, 48 // 2 * 24), (1, 72 // 4 * 10 // 2)])
def test_the_trajectories_of_an_iteration_need_memory_too(stage, kept, monkeypatch):
    """Noise and states of those of this process, 9 latents each. FLUX.2's are 524 kB: 7 GB on one card, more than the
    margin."""
    run, _ = on_a_card(stage, 8 / .85 * 1e9, monkeypatch)
    monkeypatch.setattr(rtdmd, "dist_info", lambda: (0, 0, 2))
    monkeypatch.setattr(rtdmd, "peak_bytes", lambda run, n: n * 1e9)
    run.cfg.fake_updates, run.backbone.latent_shape = 10, (1000, 1000)
    assert rtdmd.micro_batch_of_card(run) == max(1, int(8 - .85 * kept * 9 * 4e-3))
    run.backbone.latent_shape = (1,)
    assert rtdmd.micro_batch_of_card(run) == 7


@pytest.mark.parametrize("room, expected", [(2.5, 2), (1.5, 1), (0.5, 1)])
def test_a_card_too_small_for_two_samples_gets_micro_batch_1(room, expected, monkeypatch, capfd):
    """The probe itself runs out of memory: with the decoder's activations kept, or with them computed again, too."""
    run, vae = on_a_card(2, room * 1e9 / .85, monkeypatch)

    def peak_bytes(run, n):
        if n * (1 if vae.again else 2) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return n * 1e9

    monkeypatch.setattr(rtdmd, "peak_bytes", peak_bytes)
    assert rtdmd.micro_batch_of_card(run) == expected and vae.again
    assert f"Micro-batch {expected}: " in capfd.readouterr().err


@pytest.mark.parametrize("name, version, off", [("flux2-4b", "2.11.0+cu130", True), ("flux1", "2.13.1", True),
                                               ("flux2-4b", "2.14.0", False), ("sd3m", "2.11.0", False)])
def test_flux_trains_without_cudnns_attention_where_it_is_wrong(name, version, off, folders, tmp_path, monkeypatch):
    """Before torch 2.14 its backward pass ignores the layout of the gradient, of which FLUX has two."""
    calls = []
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "prompts.txt", "a cat")
    prepared(["--stage", "1", "--model", name, "--pretrained", folders[name], "--resolution", "64", "--device", "cpu",
              "--prompts", "prompts.txt", "--lora_rank", "2", "--text_length", "8"])
    assert calls == ([False] if off else [])


@pytest.mark.parametrize("stage", [1, 2])
def test_the_probe_of_the_memory_leaves_nothing_behind(stage, flags, monkeypatch):
    """peak_bytes runs the pass that takes most; the run goes on as if it had not."""
    seen = []
    counters = dict(empty_cache=None, reset_peak_memory_stats=None, memory_allocated=3, max_memory_allocated=10)
    for name, value in counters.items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: seen.append(name) or value)
    run = prepared(flags(stage))
    before = rtdmd.training_state(run)
    before = {n: p.clone() for n, p in before.items()}
    assert rtdmd.peak_bytes(run, 2) == 7 and seen == [*counters]
    assert run.terms == {} and all(p.grad is None for p in run.roles.flat.values())

    def fails_late(*arguments):
        run.roles.flat["generator"].grad, run.terms = torch.ones_like(run.roles.flat["generator"]), dict(dm=1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rtdmd, "reinforce_slot", fails_late)
    with pytest.raises(torch.OutOfMemoryError):
        rtdmd.peak_bytes(run, 2)
    assert run.terms == {} and all(p.grad is None for p in run.roles.flat.values())
    assert all(torch.equal(p, before[n]) for n, p in rtdmd.training_state(run).items())


def test_chunks_are_alike():
    """They cover everything in order, and differ by one sample at most: few shapes for the compiler."""
    for total, size in itertools.product(range(30), range(1, 12)):
        parts = rtdmd.chunks(total, size)
        assert [i for part in parts for i in range(total)[part]] == list(range(total))
        lengths = {part.stop - part.start for part in parts}
        assert not parts or max(lengths) - min(lengths) <= 1 and 0 < max(lengths) <= size
        assert len(parts) == -(-total // size)


def test_the_dry_run_says_whether_the_host_is_waited_for(flags):
    """Kernels, and the time to launch and to run them (here of the CPU's operators)."""
    text = ev.host_or_gpu(prepared(flags(1)))
    assert re.fullmatch(r"Forward and backward pass of 6 samples: [\d,]+ kernels, launched within \d+ ms, "
                        r"run in \d+ ms: bound by the (host|GPU)\.", text)


@pytest.mark.parametrize("factor, right", [(1, True), (1.5, False)])
def test_the_dry_run_compares_compiled_and_uncompiled(factor, right, flags, monkeypatch):
    """A compiler that makes a wrong graph is seen in the output and in the gradient."""
    compiled_by(monkeypatch, lambda graph, inputs: lambda *now: [factor * y for y in graph(*now)])
    run = prepared(flags(1))
    run.roles.flat["generator"].data += 0.05 * torch.randn(run.ema.shape, generator=rng())
    rtdmd.compile_blocks(run.roles.nets["generator"])
    text = ev.compiled_or_not(run)
    numbers = [float(number) for number in re.findall(r"by (\S+e\S+) in", text)]
    assert text.startswith("A compiled pass of 6 samples") and len(numbers) == 2
    assert all((number < 1e-4) is right for number in numbers), text


def test_out_of_memory_goes_on_with_half_the_micro_batch(flags, tmp_path, monkeypatch, capfd):
    """The update is done again from its start: the same numbers, but for the order of sums. At 1 it gives up."""
    rtdmd.main(flags(2, "--out", tmp_path / "whole"))
    velocity, graded = rtdmd.Roles.velocity, []

    def full(self, role, x, t, cond):
        graded.append(role if torch.is_grad_enabled() and len(x) > 1 else "")
        if graded[-1] and graded.count(role) == 2:                          # the first has left a gradient
            raise torch.OutOfMemoryError("CUDA out of memory")
        return velocity(self, role, x, t, cond)

    monkeypatch.setattr(rtdmd.Roles, "velocity", full)
    rtdmd.main(flags(2))
    text = capfd.readouterr().err
    assert re.search("in update_fake.*--micro_batch 3.*in reinforce.*--micro_batch 1,", text, re.S)
    a, b = state_of(tmp_path / "whole/stage2"), state_of(tmp_path / "run/stage2")
    assert all(torch.allclose(p, b[n], atol=1e-4) for n, p in a.items())
    assert [row["dm"] for row in rows_of(tmp_path / "whole/stage2")] == pytest.approx(
        [row["dm"] for row in rows_of(tmp_path / "run/stage2")], rel=1e-3)
    always = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(rtdmd.Roles, "velocity", always)
    refused(capfd, flags(2, "--out", tmp_path / "other"), "lower --micro_batch", code=1)


def test_re_noising_levels_are_uniform_without_a_lump_at_the_ends():
    """DEPARTURE 17: t is linear in u, from s + e to 1 - e with e = max(.01 (1 - s), .0025), near s = 1 a quarter."""
    run = SimpleNamespace(backbone=SimpleNamespace(quantise=lambda t: t))
    s = torch.tensor([0.0, 0.5, 0.75, 0.9, 0.958, 0.998]).view(-1, 1)
    e = torch.minimum(torch.maximum(0.01 * (1 - s), torch.tensor(0.0025)), (1 - s) / 4)
    for u in (0.0, 0.1, 0.5, 1.0):
        close(rtdmd.draw_level(run, s, torch.full_like(s, u)), s + e + u * (1 - s - 2 * e), 1e-6)


def test_the_levels_of_a_pair():
    """t'' of Eq. 11: uniform from t' - delta, or from the boundary level below t', up to t' (DEPARTURE 4)."""
    run = SimpleNamespace(cfg=rtdmd.Config(delta=0.1), times=rtdmd.timestep_schedule(4),
                          backbone=SimpleNamespace(quantise=lambda t: t))
    t, low = torch.tensor([[0.7], [0.55], [0.05], [1.0]]), torch.tensor([[0.6], [0.5], [0.0], [0.9]])
    for u in (0.0, 0.5, 1.0):
        close(rtdmd.draw_next_level(run, t, torch.full_like(t, u)), low + u * (t - low))
    with ev.replaced(["pairs_across"], None):
        close(rtdmd.draw_next_level(run, t, torch.zeros_like(t)), (t - 0.1).clamp_min(0))


def test_the_times_of_appendix_f(monkeypatch):
    """x' is the boundary state itself, t' = t_k and t'' = t_{k+1}, 0 after the last."""
    n, drawn = 8, {}
    cfg = rtdmd.Config(model="tiny", gamma=1.0, micro_batch=n)
    velocity = lambda role, x, t, cond: 0.3 * x + torch.zeros((), requires_grad=True)
    run = SimpleNamespace(cfg=cfg, device="cpu", terms={}, times=rtdmd.timestep_schedule(4),
                          roles=SimpleNamespace(velocity=velocity), text=SimpleNamespace(batch=lambda *a: {}),
                          backbone=SimpleNamespace(quantise=lambda t: t))
    original = rtdmd.reverse_step
    monkeypatch.setattr(rtdmd, "optimizer_step", lambda run, role: None)
    monkeypatch.setattr(rtdmd, "reverse_step", lambda x, v, t, t_next, *rest:
                        drawn.update(x=x, t=t, t_next=t_next) or original(x, v, t, t_next, *rest))
    k, x_s = torch.arange(n) % 4 + 1, torch.randn(n, 3, generator=rng(52))
    with ev.replaced(["app_f_times"], None):
        rtdmd.update_fake(run, 0, 0, x_s, run.times[k].float(), k, [""] * n, list(range(n)), n)
    assert torch.equal(drawn["x"], x_s)
    close(drawn["t"].flatten(), run.times[k].float(), 1e-5)
    close(drawn["t_next"].flatten(), torch.tensor([0.5, 0.25, 0.0, 0.0] * 2))


def test_an_update_is_clipped_and_averaged():
    """The gradient's norm is cut to --grad_clip and not raised to it; the EMA's decay warms up to --ema. An update that
    is not finite moves neither."""
    p = torch.nn.Parameter(torch.zeros(4))
    cfg, direction = rtdmd.Config(grad_clip=2.0, ema=0.3), torch.tensor([0.6, 0.0, -0.8, 0.0])
    fixed = torch.optim.SGD([p], 1.0)
    fixed.state[p]["step"] = torch.tensor(0.0)
    fixed.register_step_post_hook(lambda *_: fixed.state[p]["step"].add_(1))      # as AdamW counts
    run = SimpleNamespace(cfg=cfg, device="cpu", terms={}, bad=dict(generator=0), skipped=0, ema=torch.zeros(4), done=0,
                          roles=SimpleNamespace(flat=dict(generator=p)), optimizers={"generator": fixed})
    average = torch.zeros(4)
    for size, step, decay in ((10.0, 2.0, 2 / 11), (math.nan, 0.0, 1.0), (0.5, 0.5, 3 / 12), (2.0, 2.0, 0.3),
                              (1.0, 1.0, 0.3)):
        before, p.grad = p.detach().clone(), direction * size
        rtdmd.optimizer_step(run, "generator")
        close(p.detach(), before - direction * step, 1e-5)
        average = decay * average + (1 - decay) * p.detach()
        close(run.ema, average, 1e-6)
    assert run.skipped == 1


def test_each_adapter_has_an_optimiser_of_its_own(flags):
    """AdamW with --lr and --weight_decay for the generator, --lr_fake and no decay for the fake score. With bf16 what
    stays fp32 is multiplied in TF32."""
    try:
        for dtype, precision in (("bf16", "high"), ("fp32", "highest")):
            argv = ("--lr", 2e-3, "--lr_fake", 3e-3, "--weight_decay", 0.1, "--dtype", dtype)
            run = prepared(flags(1, *argv))
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    for role, lr, decay in (("generator", 2e-3, 0.1), ("fake", 3e-3, 0.0)):
        group, = run.optimizers[role].param_groups
        assert type(run.optimizers[role]) is torch.optim.AdamW and group["params"] == [run.roles.flat[role]]
        assert (group["lr"], group["weight_decay"], group["betas"]) == (lr, decay, (0.9, 0.999))


@pytest.mark.parametrize("stage", [1, 2])
def test_every_draw_has_a_key_of_its_own(stage, flags, monkeypatch):
    """Each begins with --seed, and no two draws of a run have the same key, in whatever epoch or iteration."""
    seen, drawn, key, draw = [], [], rtdmd.key, rtdmd.draw
    monkeypatch.setattr(rtdmd, "key", lambda *parts: seen.append(parts) or key(*parts))
    monkeypatch.setattr(rtdmd, "draw", lambda keys, *rest: drawn.extend(keys) or draw(keys, *rest))
    monkeypatch.setattr(rtdmd, "panel", lambda run: {})
    more = "--seed 77 --force_resume --iterations 2 --inner_epochs 2 --fake_updates 2".split()
    rtdmd.main(flags(stage, *more))
    words = {1: {"lora", "rollout", "fake", "consistency", "generator"},
             2: {"lora", "group", "fake", "consistency", "generator"}}
    named = [(word, parts) for parts in seen for word in words[stage] if word in parts]
    assert {word for word, _ in named} == words[stage] and all(parts[0] == 77 for _, parts in named)
    groups = [parts for word, parts in named if word == "group"]
    assert len(set(drawn)) == len(drawn) > 0 and len(set(groups)) == len(groups)
    assert ("order", 77, 0) in seen


def test_every_step_is_matched_equally_often():
    """DEPARTURE 13: stage 2's matching term visits k, over S and the draw, uniformly in 1..K."""
    K, n = 4, 40_000
    for M in (1, 2, 3):
        cfg = SimpleNamespace(steps=K, subset_size=M, dm_weight=0.5)
        g, counts = rng(M), [0] * (K + 1)
        for slot in rtdmd.matched_slots(cfg, torch.rand(n, generator=g).tolist()):
            S = rtdmd.choose_steps(K, M, g)
            counts[K if slot == M else int(S[slot])] += 1
        chi = sum((c - n / K) ** 2 / (n / K) for c in counts[1:])
        assert counts[0] == 0 and chi < 16.3, counts            # 3 degrees of freedom: p = .001
    with ev.replaced(["matching_last"], None):
        assert rtdmd.matched_slots(SimpleNamespace(subset_size=2), [0.1, 0.9]) == [2, 2]
        assert rtdmd.fake_steps(SimpleNamespace(steps=4), 1, 2, [5, 6]).tolist() == [4, 4]


# ---- Small runs of the tiny world

# Small enough for a second a run: 3 iterations, 8 boundary states or 4 groups of 3, adapters of rank 4.
SMALL = ("--device cpu --pretrained tiny-1 --max_prompts 24 --batch 8 --fake_updates 1 --groups 4 --group_size 3 "
         "--micro_batch 6 --lora_rank 4 --lora_alpha 4 --iterations 3 --save_every 1 --keep 9 "
         "--sample_every 3 --consistency_share 1").split()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A tiny world after one update; its gates and output, almost zero, become random to let gradients pass."""
    folder = tmp_path_factory.mktemp("cache")
    make_world(folder)
    return folder


def make_world(folder):
    cfg = rtdmd.resolve(dict(model="tiny", device="cpu", pretrained="tiny-1", cache=str(folder)))
    ev.TinyBackbone(cfg)
    path, g = folder / "tiny-1.safetensors", rng()
    state = rtdmd.load_file(path)
    for name, p in state.items():
        if name.startswith("net.") and p.abs().max() < 1e-3:
            state[name] = 0.5 * torch.randn(p.shape, generator=g)
    path.write_bytes(rtdmd.safetensors_bytes(state))


@pytest.fixture(autouse=True)
def seeded():
    """Draws without a generator of their own are the same every time."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals():
    """What a run does to SIGINT and SIGTERM ends with the test."""
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def begun(cache, tmp_path_factory):
    """A finished stage 1 of 3 iterations, for stage 2 to start from. Nobody writes to it."""
    out = tmp_path_factory.mktemp("begun")
    rtdmd.main([*SMALL, "--stage", "1", "--cache", str(cache), "--out", str(out)])
    return out


@pytest.fixture
def flags(cache, begun, tmp_path):
    """flags(stage, *more) -> a command line that writes to tmp_path / "run"."""
    return lambda stage, *more: small_flags(stage, cache, begun, tmp_path / "run", *more)


def small_flags(stage, cache, begun, out, *more):
    init = ["--init", str(begun / "stage1")] if stage == 2 else []
    return [*SMALL, *init, "--stage", str(stage), "--cache", str(cache), "--out", str(out), *map(str, more)]


def state_of(folder):
    """All tensors of a checkpoint, or of the newest one below."""
    return rtdmd.load_file(rtdmd.find_checkpoint(folder) / "state/state.safetensors")


def rows_of(folder):
    """metrics.jsonl without the one number that differs from run to run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in row.items() if n != "seconds"} for row in rows]


def bytes_differing(a, b):
    """Bytes in which two sets of tensors differ; a missing tensor differs in all of them."""
    raw = lambda tensor: tensor.contiguous().flatten().view(torch.uint8)
    lost = sum((a.get(n, b.get(n))).nbytes for n in a.keys() ^ b.keys())
    return lost + sum(int((raw(a[n]) != raw(b[n])).sum()) for n in a.keys() & b.keys())


def same(a, b):
    """Two run folders hold the same newest checkpoint and the same log, bit for bit."""
    assert bytes_differing(state_of(a), state_of(b)) == 0
    assert rtdmd.find_checkpoint(a).name == rtdmd.find_checkpoint(b).name and repr(rows_of(a)) == repr(rows_of(b))


def nothing_in(folder):
    """No file below, but for the lock of a run that was refused."""
    return not [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]


def refused(capfd, argv, words, code=2):
    """The run ends with this code and one sentence, the last line of stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        rtdmd.main(argv)
    return one_sentence(capfd.readouterr().err, exit.value.code, words, code)


def one_sentence(text, found, words, code=2):
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    assert found == code, text
    assert [line for line in lines if line.startswith("rtdmd: ")] == lines[-1:], text
    assert "Traceback" not in text and re.search(words, lines[-1]), text
    assert lines[-1].endswith("."), text
    return lines[-1]


def test_the_ratio_is_exactly_one_before_the_first_update(flags, monkeypatch):
    """DEPARTURE 8; in the second epoch it is not, and goes beyond --clip, which Eq. 17's loss is told, as is K."""
    seen, original = [], rtdmd.subgrpo_loss

    def subgrpo_loss(log_prob, old, advantages, steps, clip):
        assert (steps, clip) == (4, 2e-5)
        seen.append((log_prob - old).detach().exp())
        return original(log_prob, old, advantages, steps, clip)

    monkeypatch.setattr(rtdmd, "subgrpo_loss", subgrpo_loss)
    rtdmd.main(flags(2, "--inner_epochs", 2, "--iterations", 1, "--micro_batch", 12, "--clip", 2e-5))
    first, second = seen[:2], seen[2:]                          # M = 2 slots, 12 trajectories in each
    assert len(second) == 2 and sum(len(ratio) for ratio in first) == 24
    assert all(ratio.eq(1.0).all() for ratio in first)
    assert any(((ratio - 1).abs() > 2e-5).any() for ratio in second)


@pytest.fixture(scope="session")
def plain_updates(cache, begun, tmp_path_factory):
    """{stage: the state after its first iteration, without any switch}."""
    out = tmp_path_factory.mktemp("plain")
    rtdmd.main([*small_flags(2, cache, begun, out), "--iterations", "1"])
    return {1: state_of(begun / "stage1/checkpoint-000001"), 2: state_of(out / "stage2")}


ABLATIONS = [
    "1 --gamma 0", "1 --eta 0", "1 --eta .5", "1 --eta 1", "1 @released_kernel", "1 @app_f_times", "1 @paper_std",
    "1 @dmd2_renoising", "1 --lora_rank 4 --lora_alpha 64 --delta .2 @released_kernel", "1 --guidance 1",
    "2 --gamma 0", "2 --eta .5", "2 --eta 1", "2 --eta 0 --policy_weight 0", "2 --subset_size 1", "2 --subset_size 3",
    "2 @independent_noise", "2 @shared_start", "2 --det_weight 0", "2 --dm_weight 0", "2 --policy_weight 0",
    "2 @released_kernel", "2 @app_f_times", "2 @paper_std", "2 @no_std", "2 --std_floor 1e-4 @std_over_all",
    "2 @matching_last", "2 @unscaled_log_prob", "2 --inner_epochs 2",
    "2 --weight_decay 1e-4 @released_kernel @std_over_all @unscaled_log_prob @matching_last",
    "2 --rewards strict=1,attributes=-.5", "2 --checkpointing", "2 --policy_weight 0 @pathwise_4",
    "1 --eta 1 @dmd2_renoising @dmd_regression", "1 --eta 0 @tdm_intervals",
    "2 --eta 1 --policy_weight 0 @dmd2_renoising @from_the_teacher",
    "2 --rewards strict=1 --policy_weight 0 @tdm_r1 @pathwise_4"]


@pytest.mark.parametrize("switch", ABLATIONS)
def test_every_switch_runs(switch, flags, tmp_path, plain_updates):
    """Each ablation and each switch of a DEPARTURE: adapters that move, finite numbers, another first update."""
    stage, *words = switch.split()
    more = [word for word in words if word[0] != "@"]
    with ev.replaced([word[1:] for word in words if word[0] == "@"], None):
        rtdmd.main(flags(int(stage), *more, "--iterations", 2))
    if not {"--checkpointing", "--lora_rank"} & set(more):
        mine = state_of(tmp_path / f"run/stage{stage}/checkpoint-000001")
        assert bytes_differing(mine, plain_updates[int(stage)]) > 0
    states = [state_of(folder) for folder in rtdmd.list_checkpoints(tmp_path / f"run/stage{stage}")]
    assert len(states) == 2 and all(p.isfinite().all() for p in states[0].values())
    for role in ("generator.", "ema.") if "--dm_weight" in more else ("generator.", "fake.", "ema."):
        moved = [not torch.equal(p, states[1][n]) for n, p in states[0].items() if n.startswith(role)]
        assert sum(moved) >= len(moved) - 2, role               # the last block makes no use of the text's query
    assert all(math.isfinite(v) for row in rows_of(tmp_path / f"run/stage{stage}") for v in row.values())


# -----------------------------------------------------------------------------------------------------------------
# 7. Rewards
# -----------------------------------------------------------------------------------------------------------------

# ---- Preprocessing

def picture(height, width, seed=0):
    """A smooth random image with edges in it, uint8 (H,W,3): noise alone would hide a wrong resize."""
    draw, (y, x) = np.random.default_rng(seed), np.mgrid[:height, :width]
    waves = [np.sin(x / draw.uniform(3, 40) + c) * np.cos(y / draw.uniform(3, 40)) for c in range(3)]
    image = (np.stack(waves, -1) * 100 + 128).astype(np.uint8)
    image[height // 4:height // 2, width // 3:width // 2] = (220, 40, 60)
    return image


def tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("size", [(256, 256), (512, 384), (300, 700), (224, 224), (300, 503)])   # 503: 75.5 a side
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_square_crop_is_pils(size, mode):
    """CLIP's preprocessing of tensors is torchvision's of PIL pictures, but for PIL's rounding."""
    from torchvision import transforms as T
    image = picture(*size)
    way = T.InterpolationMode.BICUBIC if mode == "bicubic" else T.InterpolationMode.BILINEAR
    theirs = T.Compose([T.Resize(224, way), T.CenterCrop(224), T.ToTensor(),
                        T.Normalize(rtdmd.CLIP_MEAN, rtdmd.CLIP_STD)])
    error = (rtdmd.square_crop(tensor(image), mode=mode)[0] - theirs(Image.fromarray(image))).abs()
    error = error * torch.tensor(rtdmd.CLIP_STD).view(3, 1, 1) * 255   # in units of 1/255
    assert error.max() < 2.05 and error.mean() < .35   # all of it is PIL's rounding to 8 bits


def test_square_crop_clips_overshoots():
    """Black and white squares: without the clamp bicubic would go far below black and above white."""
    board = torch.from_numpy(np.kron(np.indices((20, 20)).sum(0) % 2, np.ones((15, 15)))).expand(1, 3, -1, -1)
    pixels = rtdmd.square_crop(board)
    pixels = pixels * torch.tensor(rtdmd.CLIP_STD).view(3, 1, 1) + torch.tensor(rtdmd.CLIP_MEAN).view(3, 1, 1)
    assert -1e-6 < pixels.min() and pixels.max() < 1 + 1e-6
    assert rtdmd.resize(board, 224, 224).min() < -.02


def test_square_crop_is_transformers_processor():
    """It is transformers' own processor as well, with its mean and std, and with half a pixel cut off."""
    from transformers import CLIPImageProcessorPil
    for image in (picture(400, 300), picture(300, 503)):
        theirs = CLIPImageProcessorPil()(images=[Image.fromarray(image)], return_tensors="pt")["pixel_values"]
        assert (rtdmd.square_crop(tensor(image), offset=int) - theirs).abs().max() < .035


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (768, 512), (300, 512), (224, 224), (100, 60)])
def test_letterbox_is_hpsv2s(size):
    """ToTensor, tensor bicubic resize of the longest side, zero pad, normalise: the same numbers."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as T
    image = tensor(picture(*size))[0]
    scale = 224 / max(size)
    small = [round(side * scale) for side in size]
    rows, columns = 224 - small[0], 224 - small[1]
    theirs = T.resize(image, small, InterpolationMode.BICUBIC, antialias=True) if scale != 1 else image
    theirs = T.pad(theirs, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2], fill=0)
    theirs = T.normalize(theirs, rtdmd.CLIP_MEAN, rtdmd.CLIP_STD)
    torch.testing.assert_close(rtdmd.letterbox(image[None])[0], theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("view", [rtdmd.square_crop, rtdmd.letterbox, rtdmd.REWARDS["clipscore"]["view"]])
def test_preprocessing_gradient_is_finite_differences(view):
    """Eq. 15 needs the gradient of every view: it is that of central differences."""
    torch.manual_seed(0)
    image = (torch.rand(1, 3, 20, 30) * .6 + .2).requires_grad_()   # away from 0 and 1, where the clamp bends
    weight, way = torch.randn(1, 3, 224, 224), torch.randn(1, 3, 20, 30)

    def value(x):
        return (view(x).double() * weight).sum()

    slope = (torch.autograd.grad(value(image), image)[0].double() * way).sum()
    step = 1e-3
    with torch.no_grad():
        measured = (value(image + step * way) - value(image - step * way)) / (2 * step)
    assert measured == pytest.approx(slope.item(), rel=2e-3)


def test_which_reward_sees_what():
    """The tables' CLIPScore was resized bilinearly, PickScore as CLIP itself, HPSv2 in a letterbox."""
    image = tensor(picture(300, 503))
    views = {name: rtdmd.REWARDS[name]["view"](image) for name in ("clipscore", "pickscore", "hpsv2")}
    assert torch.equal(views["clipscore"], rtdmd.square_crop(image, mode="bilinear"))
    assert torch.equal(views["pickscore"], rtdmd.square_crop(image, mode="bicubic", offset=int))
    assert torch.equal(views["hpsv2"], rtdmd.letterbox(image))


def test_half_precision_images_are_resized_in_fp32():
    """bf16 in, fp32 out: antialiasing sums many small weights."""
    image = tensor(picture(64, 48)).bfloat16()
    assert rtdmd.square_crop(image).dtype == torch.float32 and rtdmd.letterbox(image).dtype == torch.float32


# ---- The CLIP family

def clip_net(projection=8):
    """A CLIPModel of two layers."""
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(0)
    part = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return CLIPModel(CLIPConfig(text_config=dict(part, vocab_size=64, eos_token_id=63), projection_dim=projection,
                                vision_config=dict(part, image_size=224, patch_size=56)))


def letter_ids(prompts):
    """A token a letter, 20 letters and the end: (B, 21)."""
    return torch.tensor([[ord(c) % 60 for c in (p + " " * 20)[:20]] + [63] for p in prompts])


def tiny_clip():
    """What a host of rtdmd hands to ClipReward: network, embed_image, embed_text."""
    net = clip_net()
    return (net, lambda pixels: net.get_image_features(pixel_values=pixels).pooler_output,
            lambda prompts: net.get_text_features(input_ids=letter_ids(prompts)).pooler_output)


def test_hpsv2_is_strictly_loadable_into_open_clip():
    """The checkpoint is known by 686 names; the shapes here were read from hpsv2's own network."""
    import open_clip
    with torch.device("meta"):
        state = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()
    assert len(state) == 686 and sum(t.numel() for t in state.values()) == 986_109_441
    shapes = {"logit_scale": (), "positional_embedding": (77, 1024), "text_projection": (1024, 1024),
              "visual.proj": (1280, 1024), "visual.conv1.weight": (1280, 3, 14, 14),
              "visual.positional_embedding": (257, 1280), "token_embedding.weight": (49408, 1024),
              "visual.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
              "transformer.resblocks.23.mlp.c_proj.weight": (1024, 4096), "ln_final.bias": (1024,)}
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def small_vit_h(monkeypatch):
    """A small network of open_clip's, which it also makes under the name of HPSv2's: that takes 4 GB and 10 seconds."""
    import open_clip
    sizes = dict(embed_dim=8, vision_cfg=dict(layers=1, width=64, image_size=224, patch_size=56),
                 text_cfg=dict(layers=1, width=16, heads=2, vocab_size=49408, context_length=77))
    monkeypatch.setattr(open_clip.factory, "get_model_config", lambda name: copy.deepcopy({"ViT-H-14": sizes}[name]))
    return open_clip.CLIP(**sizes)


def test_hpsv2_host_loads_strictly_and_scores_a_cosine(tmp_path, monkeypatch):
    """HPSv2 is the cosine of open_clip's embeddings; a checkpoint that lacks a tensor is refused."""
    import open_clip
    from hpsv2.utils import hps_version_map
    small, cfg = small_vit_h(monkeypatch), settings(tmp_path)
    file = tmp_path / "HPSv2" / hps_version_map["v2.1"]
    file.parent.mkdir()
    torch.save({"state_dict": small.state_dict()}, file)
    reward = rtdmd.load_reward("hpsv2", cfg)
    images, prompts = torch.rand(2, 3, 40, 30), ["a cat", "“two” dogs"]
    tokens = open_clip.get_tokenizer("ViT-H-14")(prompts)
    with torch.no_grad():
        seen, read = small.eval().encode_image(rtdmd.letterbox(images)), small.encode_text(tokens)
        theirs = F.cosine_similarity(seen, read)
    torch.testing.assert_close(reward(images, prompts), theirs, atol=1e-6, rtol=0)
    lacking = dict(small.state_dict())
    del lacking["visual.proj"]
    torch.save({"state_dict": lacking}, file)
    with pytest.raises(rtdmd.UsageError, match="reward hpsv2 cannot be loaded.*visual.proj"):
        rtdmd.load_reward("hpsv2", cfg)


def test_clip_rewards_match_transformers_logits():
    """clipscore = logits / exp(logit_scale); pickscore = logits, about 100 times as much."""
    host = tiny_clip()
    images, prompts = torch.rand(3, 3, 64, 48), ["one", "two", "one"]
    for name in ("clipscore", "pickscore"):
        reward = rtdmd.ClipReward(name, rtdmd.REWARDS[name], host)
        with torch.no_grad():
            out = host[0](input_ids=letter_ids(prompts), pixel_values=reward.row["view"](images))
        logits = out.logits_per_image.diagonal()
        expected = logits if name == "pickscore" else logits / host[0].logit_scale.exp()
        torch.testing.assert_close(reward(images, prompts), expected, atol=1e-5, rtol=1e-5)
        assert reward.differentiable and reward.name == name


def test_text_goes_through_the_network_once():
    """A prompt that was seen before is not embedded again."""
    net, embed_image, embed_text = tiny_clip()
    calls = []

    def counting(prompts):
        calls.append(list(prompts))
        return embed_text(prompts)

    reward = rtdmd.ClipReward("clipscore", rtdmd.REWARDS["clipscore"], (net, embed_image, counting))
    reward(torch.rand(3, 3, 32, 32), ["a", "b", "a"])
    reward(torch.rand(2, 3, 32, 32), ["b", "c"])
    assert calls == [["a"], ["b"], ["c"]]


def test_reward_gradient_reaches_images_and_not_weights():
    """Eq. 15's gradient in the pictures is that of central differences; a reward's weights get none."""
    torch.manual_seed(1)
    reward = rtdmd.ClipReward("pickscore", rtdmd.REWARDS["pickscore"], tiny_clip())
    images = (torch.rand(2, 3, 32, 40) * .5 + .25).requires_grad_()
    gradient = torch.autograd.grad(reward(images, ["x", "y"]).sum(), images)[0]
    way, step = gradient / gradient.norm(), .05
    with torch.no_grad():
        up, down = (reward(images + sign * step * way, ["x", "y"]).sum() for sign in (1, -1))
    rise = (up - down) / (2 * step)
    assert rise.item() == pytest.approx(gradient.norm().item(), rel=.02)
    assert not any(p.requires_grad for p in reward.net.parameters())


def test_transformers_host_loads_a_folder(tmp_path):
    """A saved CLIPModel and a tokenizer made from open_clip's own vocabulary: real files, real tokens."""
    import open_clip
    from transformers import CLIPTokenizer
    net = tiny_clip()[0]
    net.config.text_config.vocab_size = 49408
    net = type(net)(net.config)
    folder = tmp_path / "clip-vit-large-patch14"
    net.save_pretrained(folder)
    cfg = settings(tmp_path)
    with pytest.raises(rtdmd.UsageError, match="tokenizer.json"):   # not a tokenizer without a vocabulary
        rtdmd.load_reward("clipscore", cfg)
    base = open_clip.tokenizer.SimpleTokenizer()
    start, end = "<start_of_text>", "<end_of_text>"
    CLIPTokenizer(vocab=base.encoder, merges=list(base.bpe_ranks), bos_token=start, eos_token=end,
                  unk_token=end, pad_token=end).save_pretrained(folder)
    reward = rtdmd.load_reward("clipscore", cfg)
    assert reward(torch.rand(2, 3, 32, 32), ["a red fox", "snow " * 200]).shape == (2,)   # one is cut
    net.save_pretrained(folder, state_dict={n: p for n, p in net.state_dict().items() if "vision" not in n})
    with pytest.raises(rtdmd.UsageError, match="lacks [0-9]+ tensors of CLIPModel"):      # not a random image tower
        rtdmd.load_reward("clipscore", cfg)


@pytest.mark.parametrize("name, words", [
    ("quits", "SystemExit"), ("lookup", "KeyError"), ("wants", "TypeError"), ("nothing", "NoneType"),
    ("number", "'int' object")])
def test_prompts_of_a_module_that_fails(name, words, flags, capfd, tmp_path, monkeypatch):
    """Functions that exit, raise or want an argument, and things that are no list."""
    written(tmp_path, "bad_prompts.py", """
import sys
quits = lambda: sys.exit(0)
lookup = lambda: {}["x"]
wants = lambda number: ["a"]
nothing, number = None, 7
""")
    monkeypatch.delitem(sys.modules, "bad_prompts", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    refused(capfd, flags(1, "--prompts", f"bad_prompts:{name}"), f"--prompts bad_prompts:{name}.*{words}")


def test_a_tiny_world_that_is_made_anew_reads_no_old_embeddings(cache, tmp_path):
    """They belong to the text encoder that is trained with the teacher, which another processor makes otherwise."""
    shutil.copy(cache / "tiny-1.safetensors", tmp_path)
    cfg = rtdmd.resolve(dict(model="tiny", device="cpu", pretrained="tiny-1", cache=str(tmp_path)))
    first, again = (ev.TinyBackbone(cfg).text_key for _ in range(2))
    weights = rtdmd.load_file(tmp_path / "tiny-1.safetensors")
    name = next(n for n in weights if n.startswith("text."))
    rtdmd.write_atomic(tmp_path / "tiny-1.safetensors", rtdmd.safetensors_bytes(weights | {name: weights[name] + 1e-3}))
    assert first == again != ev.TinyBackbone(cfg).text_key


# ---- Your own rewards

def test_user_rewards(tmp_path, monkeypatch):
    """module:attribute may be a function, an object or a class; what breaks in it is one sentence."""
    (tmp_path / "my_rewards.py").write_text("""
def brightness(images, prompts):
    return images.mean((1, 2, 3))
class Judge:
    differentiable = True
    def __init__(self, strength=2): self.strength = strength
    def __call__(self, images, prompts): return images.mean((1, 2, 3)) * self.strength
judge = Judge(3)
class Broken:
    def __init__(self): raise RuntimeError("no\\ngood")
""")
    monkeypatch.chdir(tmp_path)
    images = torch.rand(2, 3, 4, 4)
    for name, factor, differentiable in (("brightness", 1, False), ("Judge", 2, True), ("judge", 3, True)):
        reward = rtdmd.load_reward(f"my_rewards:{name}", settings())
        torch.testing.assert_close(rtdmd.rate("own", reward, images, ["", ""]), images.mean((1, 2, 3)) * factor)
        assert getattr(reward, "differentiable", False) is differentiable
    (tmp_path / "my_exit.py").write_text("raise SystemExit(0)")
    for name, words in (("my_rewards:nothing", "nothing"), ("no_such_module:x", "no_such_module"),
                        ("os:path", "cannot be loaded.*must be callable"),
                        ("my_exit:x", "SystemExit.*correct"),
                        ("my_rewards:Broken", r"RuntimeError.*no\\ngood.*correct")):
        with pytest.raises(rtdmd.UsageError, match=words):
            rtdmd.load_reward(name, settings())
    own = lambda images, prompts: None
    assert rtdmd.load_reward("judge", settings(), own={"judge": own}) is own


def test_rewards_are_loaded_once_and_none_is_lost(flags, tmp_path, monkeypatch):
    """One that is trained on and watched is one object; one that Python calls false, an empty list, is a reward."""
    written(tmp_path, "odd_rewards.py", """made = []
class Empty(list):
    def __call__(self, images, prompts): return images.mean((1, 2, 3))
class Counted:
    def __init__(self): made.append(self)
    def __call__(self, images, prompts): return images.mean((1, 2, 3))
""")
    monkeypatch.syspath_prepend(tmp_path)
    names = "odd_rewards:Empty", "odd_rewards:Counted"
    run = prepared(flags(2, "--rewards", ",".join(names), "--watch", ",".join(names), "--det_weight", 0))
    assert tuple(run.rewards) == tuple(run.watched) == names
    assert all(run.watched[name] is run.rewards[name][0] for name in names)
    assert len(sys.modules["odd_rewards"].made) == 1


def test_a_reward_that_only_says_that_it_is_differentiable(flags, tmp_path, monkeypatch, capfd):
    """A detach or NumPy on the way is named; without the check PyTorch would speak of element 0 of tensors."""
    written(tmp_path, "cut_rewards.py", """def cut(images, prompts):
    return images.detach().mean((1, 2, 3))
cut.differentiable = True
""")
    monkeypatch.syspath_prepend(tmp_path)
    refused(capfd, flags(2, "--rewards", "cut_rewards:cut=1"),
            "reward cut_rewards:cut, prompts .*differentiable.*no gradient")


def test_a_reward_that_frees_its_own_graph(flags, tmp_path, monkeypatch, capfd):
    """It calls backward itself, as code that was copied from a training loop does."""
    written(tmp_path, "freed_rewards.py", """def freed(images, prompts):
    values = images.square().mean((1, 2, 3)) ** 2
    if values.requires_grad:
        values.sum().backward()
    return values
freed.differentiable = True
""")
    monkeypatch.syspath_prepend(tmp_path)
    refused(capfd, flags(2, "--rewards", "freed_rewards:freed=1"), "freed the graph.*retain_graph")


def test_a_reward_without_the_gradient_that_it_claims():
    """Alone it would end in a traceback; beside another reward it would be missing from Eq. 15 without a word."""
    def claims(images, prompts):
        return images.detach().mean((1, 2, 3))

    claims.differentiable = True
    with pytest.raises(rtdmd.UsageError, match="result has no gradient"):
        rtdmd.rate("claims", claims, torch.rand(2, 3, 4, 4, requires_grad=True), ["", ""])


def test_what_is_explained_and_what_main_must_see():
    """Lack of memory keeps its type, also as PyTorch's RuntimeError; a text that only speaks of it does not."""
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for error in (MemoryError(), torch.OutOfMemoryError("x"), full, rtdmd.UsageError("said", code=1),
                  KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, rtdmd.explained("it", "mend it"):
            raise error
        assert caught.value is error
    for error in (ValueError("a man is out of memory"), SystemExit(0), StopIteration(), RuntimeError("broken")):
        with pytest.raises(rtdmd.UsageError, match="it: .*; mend it[.]"), rtdmd.explained(lambda: "it", "mend it"):
            raise error


def test_a_backbones_own_reward_comes_before_one_of_that_name(monkeypatch):
    """Also where eval.py, which has the other one, is not there."""
    monkeypatch.setitem(rtdmd.REWARDS, "ocr", "no_such_module:OCR")
    assert rtdmd.parse_rewards("ocr=2", own=("ocr",)) == [("ocr", 2.0)]
    with pytest.raises(rtdmd.UsageError, match="--rewards ocr: .*no_such_module"):
        rtdmd.parse_rewards("ocr=2")


def test_a_reward_cannot_change_what_others_see():
    """In-place changes of the pictures or of the list of prompts stay with the reward that makes them."""
    def rude(images, prompts):
        images.zero_()
        prompts.clear()
        return torch.zeros(2)

    images, prompts = torch.ones(2, 3, 4, 4), ["a", "b"]
    assert rtdmd.rate("rude", rude, images, prompts).tolist() == [0, 0]
    assert images.min() == 1 and prompts == ["a", "b"]
    with pytest.raises(rtdmd.UsageError, match="complex64 of shape .2,., not real of .2,."):
        rtdmd.rate("own", lambda images, prompts: torch.full((2,), 1 + 1j), images, prompts)


def test_stage_2_wants_the_world_of_its_stage_1(flags, capfd):
    """Adapters of another base are refused, as those of another rank are; --force_resume overrides it."""
    refused(capfd, flags(2, "--pretrained", "tiny-2"), "pretrained 'tiny-1' -> 'tiny-2'")


def test_a_reward_has_its_own_floor_under_its_std(flags, tmp_path, monkeypatch):
    """One number cannot suit two units: .std_floor of a reward replaces --std_floor for this one alone."""
    (tmp_path / "my_floors.py").write_text("""
def wide(images, prompts):
    return images.mean((1, 2, 3))
wide.std_floor = 50.0
def wrong(images, prompts):
    return images.mean((1, 2, 3))
wrong.std_floor = "small"
""")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(rtdmd.UsageError, match="my_floors:wrong cannot be loaded: .*TypeError"):
        rtdmd.load_reward("my_floors:wrong", settings())
    run = prepared(flags(2, "--rewards", "attributes=1,my_floors:wide=2", "--std_floor", 1e-3))
    monkeypatch.setattr(run.backbone, "decode", lambda x: x)
    ids = list(range(2 * run.cfg.group_size))
    images = torch.rand(len(ids), 3, 24, 24, generator=rng(4))
    b = SimpleNamespace(ids=ids, prompts=[run.prompts[i // run.cfg.group_size] for i in ids],
                        states=[images])
    run.terms = {}
    rtdmd.judge_groups(run, b)
    groups = lambda x: x.view(2, -1)
    own = groups(images.mean((1, 2, 3)))
    close(groups(b.scales["my_floors:wide"]), torch.full_like(own, 50))
    assert groups(b.scales["attributes"]).max() < 1            # its own std, or --std_floor
    judged = run.rewards["attributes"][0](images, b.prompts)
    expected = rtdmd.group_advantages(groups(judged), floor=1e-3) + 2 * (own - own.mean(1, keepdim=True)) / 50
    close(groups(b.advantages), expected, 1e-4)


def test_rate_names_reward_and_prompt():
    """A reward that raises or returns another shape is named with its prompt; nan passes as it is, and so does a
    lack of GPU memory, for which main has the remedy."""
    def picky(images, prompts):
        if "bad" in prompts:
            raise ValueError("cannot look at this")
        return images.mean((1, 2, 3))

    images = torch.rand(3, 3, 4, 4)
    assert rtdmd.rate("picky", picky, images, ["a", "b", "c"]).shape == (3,)
    with pytest.raises(rtdmd.UsageError, match="picky, prompts .*'bad'.*cannot look"):
        rtdmd.rate("picky", picky, images, ["good", "bad", "fine"])
    for wrong in (lambda i, p: i.mean(), lambda i, p: i[:, :1, 0, 0], lambda i, p: i[:2, 0, 0, 0]):
        with pytest.raises(rtdmd.UsageError, match="misshapen.*shape"):
            rtdmd.rate("misshapen", wrong, images, ["a", "b", "c"])
    assert rtdmd.rate("own", lambda i, p: i[:, 0, 0, 0] * math.nan, images, ["a"] * 3).isnan().all()   # as it is

    def together(images, prompts):
        if len(prompts) > 1:
            raise ValueError("one at a time, please")
        return images.mean((1, 2, 3))

    with pytest.raises(rtdmd.UsageError, match="'a', 'b', 'c'.*one at a time"):
        rtdmd.rate("together", together, images, ["a", "b", "c"])

    def large(images, prompts):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        rtdmd.rate("large", large, images, ["a", "b", "c"])
    with pytest.raises(rtdmd.UsageError, match="SystemExit"):         # or a run would end with 0, without a word
        rtdmd.rate("own", lambda images, prompts: sys.exit(0), images, ["a", "b", "c"])


# -----------------------------------------------------------------------------------------------------------------
# 8. Backbones
# -----------------------------------------------------------------------------------------------------------------

# ---- Small pipelines, channels as in the real ones: 64 px -> 16 x 8 x 8, FLUX.2 128 x 4 x 4

PROMPTS = ["a red cat", "two blue birds above a très long " + "wooden " * 40 + "fence"]      # CLIP cuts it

BYTES = sorted(ByteLevel.alphabet())           # 256 symbols: any text tokenises without a merge
VAE = dict(in_channels=3, out_channels=3, block_out_channels=[4] * 4, layers_per_block=1, norm_num_groups=1,
           sample_size=64)
KL_VAE = dict(VAE, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
              latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)


def clip_tokenizer():
    tokens = BYTES + [a + "</w>" for a in BYTES] + ["<|startoftext|>", "<|endoftext|>"]  # EOS: highest id
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(c), -3.0) for c in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def qwen_tokenizer():
    vocab = {token: i for i, token in enumerate(BYTES + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    tokenizer = Qwen2TokenizerFast(vocab=vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   model_max_length=131072)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        "{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}")
    return tokenizer


def small_clip(tokenizer):
    return CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
        vocab_size=len(tokenizer), max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def small_t5(tokenizer):
    return T5EncoderModel(T5Config(
        d_model=32, d_ff=32, d_kv=8, num_heads=2, num_layers=1, dropout_rate=0.0, vocab_size=len(tokenizer),
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1))


def small_sd3(dual):
    torch.manual_seed(0)
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    clip = lambda: CLIPTextModelWithProjection(small_clip(tokenizer))
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=16, **dict(dual_attention_layers=(0,), qk_norm="rms_norm") if dual else {})
    vae, encoder = AutoencoderKL(**KL_VAE, scaling_factor=1.5305, shift_factor=0.0609), small_t5(t5)
    return StableDiffusion3Pipeline(
        transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=clip(),
        tokenizer=tokenizer, text_encoder_2=clip(), tokenizer_2=clip_tokenizer(), text_encoder_3=encoder,
        tokenizer_3=t5)


def small_klein(distilled):
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    encoder = Qwen3ForCausalLM(Qwen3Config(      # 30 layers: some above the last tap, as in the real one
        hidden_size=16, intermediate_size=16, num_hidden_layers=30, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, vocab_size=len(tokenizer), tie_word_embeddings=True,
        max_position_embeddings=1024))
    vae = AutoencoderKLFlux2(**VAE, latent_channels=32)
    vae.bn.running_mean.normal_(0, .05)         # like the real ones: mistakes would hide behind 0 and 1
    vae.bn.running_var.uniform_(2.9, 3.5)
    torch.manual_seed(int(distilled))           # the two repositories differ in this network alone
    net = Flux2Transformer2DModel(
        patch_size=1, in_channels=128, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer,
                              transformer=net, is_distilled=distilled)


def small_flux1(guidance):
    """FLUX.1-dev, or -schnell, whose network reads no guidance."""
    torch.manual_seed(0)
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    net = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), guidance_embeds=guidance)
    return FluxPipeline(
        transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
        vae=AutoencoderKL(**KL_VAE, scaling_factor=.3611, shift_factor=.1159),
        text_encoder=CLIPTextModel(small_clip(tokenizer)), tokenizer=tokenizer, text_encoder_2=small_t5(t5),
        tokenizer_2=t5)


def small_zimage(base):
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    encoder = Qwen3Model(Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=len(tokenizer), max_position_embeddings=1024))
    vae = AutoencoderKL(**KL_VAE, scaling_factor=.3611, shift_factor=.1159)
    torch.manual_seed(int(base))                # as in FLUX.2
    net = ZImageTransformer2DModel(in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
                                   cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64])
    for parameter in (net.x_pad_token, net.cap_pad_token):
        parameter.data.normal_()                # made by torch.empty: whatever was in memory
    return ZImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=encoder,
                          tokenizer=tokenizer, transformer=net)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Saved pipelines by name; "flux2-4b" and "zimage" are GENERATOR,TEACHER pairs."""
    root = tmp_path_factory.mktemp("pipelines")
    pipes = {"sd3m": small_sd3(False), "sd35m": small_sd3(True), "flux1": small_flux1(True),
             "schnell": small_flux1(False), "distilled": small_klein(True), "base": small_klein(False),
             "turbo": small_zimage(False), "zimage-base": small_zimage(True)}
    for name, pipe in pipes.items():
        pipe.save_pretrained(root / name)
    pairs = {"flux2-4b": "distilled,base", "zimage": "turbo,zimage-base"}
    return {name: str(root / name) for name in pipes} | {
        name: ",".join(str(root / one) for one in pair.split(",")) for name, pair in pairs.items()}


FAMILIES = ["sd3m", "sd35m", "flux1", "flux2-4b", "zimage"]


def backbone_of(folders, name, **options):
    cls = rtdmd.backbone_class(name)
    return cls(rtdmd.Config(model=name, pretrained=folders[name], resolution=64, device="cpu", **options))


def stock(folder, **options):
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(backbone, batch=2):
    return torch.randn(batch, *backbone.latent_shape, generator=rng(5))


def timesteps(backbone):
    return rtdmd.timestep_schedule(4, backbone.shift)


def packed(x, name):
    """Latents as FLUX's pipelines step them, in tokens (B, h w, C)."""
    if name == "flux1":
        return FluxPipeline._pack_latents(x, *x.shape)
    return Flux2KleinPipeline._pack_latents(x) if name.startswith("flux2") else x


def unpacked(tokens, name):
    if name == "flux1":
        return FluxPipeline._unpack_latents(tokens, 64, 64, 8)
    return tokens.transpose(1, 2).unflatten(2, (4, 4)) if name.startswith("flux2") else tokens


def pipeline_noise(x, generator, name):
    """Noise of three steps as the stock pipeline draws it, (3, *x.shape)."""
    shape = packed(x, name).shape
    return torch.stack([unpacked(torch.randn(shape, generator=generator), name) for _ in range(3)])


def image_of(pipe, x, **options):
    """Unguided, if not said otherwise. FLUX.1 wants tokens; Z-Image's w is 1 more, and it overwrites the prompts."""
    x = packed(x, "flux1") if isinstance(pipe, FluxPipeline) else x
    plain = 0.0 if isinstance(pipe, ZImagePipeline) else 1.0
    return pipe(prompt=list(PROMPTS), height=64, width=64, latents=x.clone(), output_type="pt",
                **{"num_inference_steps": 4, "guidance_scale": plain} | options).images


# ---- Sampling: CPSScheduler in the stock pipelines

@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("eta", [0.0, 0.9])
def test_our_rollout_equals_the_stock_pipeline_with_our_scheduler(folders, name, eta):
    """Eq. 20: CPSScheduler in the stock pipeline paints rollout's pictures, noise for noise."""
    backbone, pipe = backbone_of(folders, name), stock(folders[name].split(",")[0])
    pipe.scheduler = rtdmd.CPSScheduler.from_config(pipe.scheduler.config, eta=eta)
    pipe.scheduler.generator = rng(9)
    x = latents(backbone)
    theirs, cond = image_of(pipe, x), backbone.encode(PROMPTS)
    velocity = lambda x, t: backbone.velocity(backbone.nets["generator"], x, t, cond)
    with torch.no_grad():
        states, _ = rtdmd.rollout(velocity, x, pipeline_noise(x, rng(9), name), timesteps(backbone), eta)
        ours = backbone.decode(states[-1])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert theirs.std() > 1e-3 and (theirs[0] - theirs[1]).abs().max() > 1e-3
    torch.testing.assert_close(pipe.scheduler.sigmas.double(), timesteps(backbone), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_eta_0_is_stock_euler_and_eta_1_is_stochastic_sampling(folders, name):
    """App. C's two ends are diffusers' Euler step and its stochastic sampling."""
    pipe = stock(folders[name].split(",")[0])
    config, x, images = pipe.scheduler.config, latents(backbone_of(folders, name)), {}
    euler = FlowMatchEulerDiscreteScheduler
    for label, scheduler in {"euler": euler.from_config(config),
                             "eta 0": rtdmd.CPSScheduler.from_config(config, eta=0.0),
                             "stochastic": euler.from_config(config, stochastic_sampling=True),
                             "eta 1": rtdmd.CPSScheduler.from_config(config, eta=1.0)}.items():
        pipe.scheduler = scheduler
        torch.manual_seed(3)
        images[label] = image_of(pipe, x, sigmas=[1, .75, .5, .25])
    torch.testing.assert_close(images["eta 0"], images["euler"], atol=1e-5, rtol=0)
    torch.testing.assert_close(images["eta 1"], images["stochastic"], atol=1e-5, rtol=0)
    assert (images["eta 0"] - images["eta 1"]).abs().max() > 1e-3


def test_the_scheduler_gives_the_papers_grid_by_default(folders):
    """App. J: eta .9 and the shifted grids of SD3, and of FLUX.1 and FLUX.2 at 512 and 1024 pixels."""
    sd3 = rtdmd.CPSScheduler.from_config(stock(folders["sd3m"]).scheduler.config)
    sd3.set_timesteps(4)
    assert sd3.eta == 0.9 and sd3.sigmas.tolist() == pytest.approx([1, .9, .75, .5, 0])
    for name, mu, grid in (("flux1", .63, [1, .849235, .652489, .384945, 0]),
                           ("flux1", 1.15, [1, .904531, .759511, .512844, 0]),
                           ("base", 2.030690, [1, .958085, .883982, .717497, 0]),
                           ("base", 2.291180, [1, .967384, .908144, .767200, 0])):
        flux = rtdmd.CPSScheduler.from_config(stock(folders[name]).scheduler.config)
        flux.set_timesteps(4, mu=mu)
        assert flux.sigmas.tolist() == pytest.approx(grid, abs=1e-6)


@pytest.mark.parametrize("name, resolution, grid", [
    ("sd3m", 512, [1, .9, .75, .5, 0]), ("sd35m", 1024, [1, .9, .75, .5, 0]),
    ("flux1", 512, [1, .849235, .652489, .384945, 0]), ("flux1", 1024, [1, .904531, .759511, .512844, 0]),
    ("flux2-4b", 512, [1, .958085, .883982, .717497, 0]),
    ("flux2-4b", 1024, [1, .967384, .908144, .767200, 0]), ("zimage", 1024, [1, .9, .75, .5, 0])])
def test_the_grid_by_resolution(folders, name, resolution, grid):
    """A backbone's own shift gives the same grids; only FLUX's depends on the resolution."""
    backbone = backbone_of(folders, name)
    side = resolution // (16 if name.startswith("flux2") else 8)
    backbone.latent_shape = (backbone.latent_shape[0], side, side)
    backbone.shift = backbone.shift_for(4)
    assert timesteps(backbone).tolist() == pytest.approx(grid, abs=1e-6)


def test_the_scheduler_keeps_eta_and_repeats_with_a_generator(folders, tmp_path):
    """eta survives saving and loading; the attribute `generator` makes the noise of the steps repeatable."""
    pipe = stock(folders["sd3m"])
    pipe.scheduler = rtdmd.CPSScheduler.from_config(pipe.scheduler.config, eta=0.7)
    assert rtdmd.CPSScheduler.from_config(pipe.scheduler.config).eta == 0.7
    pipe.scheduler.save_pretrained(tmp_path)
    assert rtdmd.CPSScheduler.from_pretrained(tmp_path).eta == 0.7
    x, images = torch.randn(2, 16, 8, 8), []
    for seed in (1, 1, 2):
        pipe.scheduler.generator = rng(seed)
        images.append(image_of(pipe, x))
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_a_step_of_the_scheduler_has_the_networks_dtype_and_the_callers_generator():
    """What comes out of bf16 is bf16, or the next forward would fail; a list has a generator for each image."""
    scheduler = rtdmd.CPSScheduler.from_config(dict(shift=3.0))
    v, x = torch.randn(2, 2, 4, 3, 3)

    def step(v, x, **options):
        scheduler.set_timesteps(4)
        return scheduler.step(v, scheduler.timesteps[0], x, **options).prev_sample

    one, each = step(v, x, generator=rng(1)), step(v, x, generator=[rng(1), rng(2)])
    close(one, rtdmd.cps_step(x, v, 1.0, 0.9, torch.randn(x.shape, generator=rng(1)), 0.9))
    noise = torch.stack([torch.randn(x.shape[1:], generator=rng(seed)) for seed in (1, 2)])
    close(each, rtdmd.cps_step(x, v, 1.0, 0.9, noise, 0.9))
    scheduler.generator = rng(3)
    assert torch.equal(step(v, x, generator=rng(1)), one)                   # the argument comes first
    low = step(v.bfloat16(), x.bfloat16(), generator=rng(1))
    assert low.dtype == torch.bfloat16
    close(low, one, 0.05)


# ---- Velocity

@pytest.mark.parametrize("name, rows", [("sd3m", 4), ("sd35m", 4), ("flux1", 2), ("flux2-4b", 4), ("zimage", 4)])
def test_teacher_guidance_equals_the_stock_pipeline(folders, name, rows):
    """The guided psi is step by step what the stock pipeline takes, and not the plain one: u + w (c - u) in one batch.
    FLUX.1 reads w, so two samples are two rows. Z-Image's pipeline says w - 1."""
    backbone, w = backbone_of(folders, name), rtdmd.MODELS[name]["guidance"]
    pipe = stock(folders[name].split(",")[-1])
    seen, step = [], pipe.scheduler.step
    pipe.scheduler.step = lambda v, t, x, **options: seen.append((v, t, x)) or step(v, t, x, **options)
    image_of(pipe, latents(backbone), guidance_scale=w - 1 if name == "zimage" else w)
    cond, null = backbone.encode(PROMPTS), backbone.encode([""])
    roles = rtdmd.Roles(backbone, rtdmd.Config(model=name, device="cpu", lora_rank=4, guidance=w))
    assert len(seen) == 4
    forwards = []
    roles.nets["teacher"].register_forward_pre_hook(
        lambda net, args, kwargs: forwards.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True)
    for v, t, x in seen:
        v, x, t = unpacked(v, name), unpacked(x, name), (t / 1000).expand(2)
        with torch.no_grad():
            torch.testing.assert_close(roles.teacher(x, t, cond, null), v, atol=1e-5, rtol=1e-5)
            assert (roles.velocity("teacher", x, t, cond) - v).abs().max() > 1e-4
    assert forwards == [rows, 2] * 4


@pytest.mark.parametrize("name", ["flux1", "flux2-4b"])
def test_the_order_of_fluxs_tokens(folders, name):
    """Tokens, and positions of image and text, as the pipeline makes them; there and back changes nothing."""
    backbone, told = backbone_of(folders, name), {}
    x, cond = torch.randn(2, *backbone.latent_shape), backbone.encode(PROMPTS)
    net = lambda **inputs: told.update(inputs) or (inputs["hidden_states"],)
    net.config = SimpleNamespace(guidance_embeds=True)
    assert torch.equal(backbone.velocity(net, x, torch.tensor([.9, .5]), cond), x)
    assert torch.equal(told["hidden_states"], packed(x, name))
    assert torch.equal(told["encoder_hidden_states"], cond["text"])
    if name == "flux1":
        image = FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
        words = stock(folders["flux1"], vae=None).encode_prompt("")[2]
        assert torch.equal(told["guidance"], torch.ones(2)) and told["pooled_projections"].shape == (2, 16)
    else:
        image, = Flux2KleinPipeline._prepare_latent_ids(x[:1])
        words, = Flux2KleinPipeline._prepare_text_ids(cond["text"][:1])
    assert torch.equal(told["img_ids"].float(), image.float())
    assert torch.equal(told["txt_ids"].float(), words.float())


def test_zimage_runs_the_other_way(folders):
    """Its time is 1 - t, exact in bf16 too; its velocity points to the image; it reads words without padding."""
    backbone, told = backbone_of(folders, "zimage", dtype="bf16"), []
    x, t, cond = latents(backbone), torch.tensor([.8125, .3]), backbone.encode(PROMPTS)
    net = lambda x, t, words, **options: told.append((x, t, words)) or (x,)
    assert torch.equal(backbone.velocity(net, x, t, cond), -x.bfloat16().float())
    (images, times, words), = told
    assert torch.equal(times, 1 - t) and all(image.shape == (16, 1, 8, 8) for image in images)
    for ours, one in zip(words, PROMPTS):
        theirs, = backbone.text.encode_prompt([one], do_classifier_free_guidance=False)[0]
        assert torch.equal(ours, theirs)
    real, heard = backbone.nets["teacher"], []
    real.t_embedder.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
    v = backbone.velocity(real, x, t, cond)
    assert heard[0].tolist() == pytest.approx([187.5, 700], abs=1e-3) and v.dtype == torch.float32


@pytest.mark.parametrize("graded", [False, True])
def test_zimages_prompts_of_any_length_share_a_batch(folders, graded):
    """Rows of a batch do not see one another's length: the same as one by one, the gradient too."""
    backbone = backbone_of(folders, "zimage")
    net, x, t = backbone.nets["teacher"], latents(backbone, 4), torch.tensor([.9, .75, .5, .2])
    cond = backbone.encode([PROMPTS[1], "", PROMPTS[0], PROMPTS[1][:100]])
    assert len(set(cond["length"].tolist())) == 4
    x.requires_grad_(graded)
    v = backbone.velocity(net, x, t, cond)
    alone = torch.cat([backbone.velocity(net, x[i:i + 1], t[i:i + 1], {n: c[i:i + 1] for n, c in cond.items()})
                       for i in range(4)])
    if graded:
        v, alone = (torch.autograd.grad(one.square().sum(), x)[0] for one in (v, alone))
    torch.testing.assert_close(v, alone, atol=1e-5, rtol=1e-5)
    assert v.flatten(1).std(1).min() > 1e-3


@pytest.mark.parametrize("name, grids", [
    ("flux1", {(1, .849235, .652489, .384945): [1000, 848, 652, 384],
               (1, .904531, .759511, .512844): [1000, 904, 760, 512]}),
    ("flux2-4b", {(1, .958085, .883982, .717497): [1000, 960, 884, 716],
                  (1, .967384, .908144, .767200): [1000, 968, 908, 768]})])
def test_flux_is_told_what_quantise_says(folders, name, grids):
    """FLUX hears levels in bf16: quantise names those that it hears, and leaves them alone. So does the pipeline."""
    backbone, told = backbone_of(folders, name, dtype="bf16"), []
    hook = lambda module, inputs: told.append(inputs[0].float())
    embeds = {"flux1": "time_text_embed", "flux2-4b": "time_guidance_embed"}[name]
    listen = lambda net: getattr(net, embeds).time_proj.register_forward_pre_hook(hook)
    listen(backbone.nets["teacher"])
    cond = backbone.encode(PROMPTS[:1] * 4)
    for t, heard in grids.items():
        t = torch.tensor(t)
        backbone.velocity(backbone.nets["teacher"], latents(backbone, 4), t, cond)
        first = told[0]                                           # FLUX.1's guidance, 1, comes through here as well
        assert first.tolist() == heard and torch.equal(first, (1000 * backbone.quantise(t)).round())
        told.clear()
    t = backbone.quantise(torch.rand(100_000))
    assert torch.equal(backbone.quantise(t), t) and t.max() <= 1      # such a level is told as it is
    pipe = stock(backbone.base, dtype=torch.bfloat16)
    listen(pipe.transformer)
    image_of(pipe, latents(backbone).bfloat16())
    theirs = [row[0].item() for row in told[::2 if name == "flux1" else 1]]
    assert theirs == (1000 * backbone.quantise(timesteps(backbone)[:-1])).round().tolist()
    exact = backbone_of(folders, "zimage" if name == "flux1" else "sd3m", dtype="bf16")
    assert torch.equal(exact.quantise(t), t)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_recomputes_under_its_own_role(folders, name):
    """--checkpointing: the gradients without it, though another role ran before the backward pass."""
    found = []
    for checkpointing in (False, True):
        backbone = backbone_of(folders, name)
        roles = rtdmd.Roles(backbone, rtdmd.Config(model=name, device="cpu", lora_rank=4, checkpointing=checkpointing))
        for i, p in enumerate(roles.flat.values()):
            nn.init.normal_(p, std=.1, generator=rng(i))
        x, t, cond = latents(backbone), torch.tensor([.75, .5]), backbone.encode(PROMPTS)
        v = roles.velocity("generator", x, t, cond)
        roles.velocity("fake", x, t, cond)
        v.square().mean().backward()
        assert roles.flat["fake"].grad is None
        found.append(list(roles.parts("generator", roles.flat["generator"].grad).values()))
    assert len(found[0]) == len(found[1]) > 20
    assert sum(bool(gradient.any()) for gradient in found[0]) > len(found[0]) - 3        # SD3's last text query
    torch.testing.assert_close(found[0], found[1], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_have_gates_for_k(folders, name):
    """The variant fake_gates_k: the gradient reaches the gates of the steps that a batch has, also if activations are
    computed again after a pass with others; the other roles have none."""
    found, plain = [], None
    for checkpointing in (None, False, True):
        with contextlib.nullcontext() if checkpointing is None else ev.replaced(["fake_gates_k"], None):
            backbone, again = backbone_of(folders, name), bool(checkpointing)
            roles = rtdmd.Roles(backbone, rtdmd.Config(model=name, device="cpu", lora_rank=4, checkpointing=again))
            for i, p in enumerate(roles.flat.values()):
                nn.init.normal_(p, std=.1, generator=rng(i))
            x, t, cond = latents(backbone), torch.tensor([.75, .5]), backbone.encode(PROMPTS)
            others = [roles.velocity(role, x, t, cond) for role in ("generator", "teacher")]
            if checkpointing is None:
                plain = others
                continue
            v = roles.velocity("fake", x, t, cond | dict(k=torch.tensor([1, 3])))
            with torch.no_grad():
                roles.velocity("fake", x.flip(0), t, cond | dict(k=torch.tensor([2, 4])))
                torch.testing.assert_close([roles.velocity(role, x, t, cond) for role in ("generator", "teacher")],
                                           plain, atol=1e-6, rtol=1e-4)
            v.square().mean().backward()
            found.append(roles.parts("fake", roles.flat["fake"].grad))
    gates = found[0]["steps"]
    assert gates[[1, 3]].flatten(1).any(1).all() and not gates[[0, 2, 4]].any()
    torch.testing.assert_close(*(list(gradients.values()) for gradients in found), atol=1e-7, rtol=1e-4)


def test_sd3_is_told_the_exact_timestep_even_in_bf16(folders):
    """1000 t reaches the network in fp32."""
    backbone, told = backbone_of(folders, "sd3m", dtype="bf16"), []
    net, cond = backbone.nets["teacher"], backbone.encode(PROMPTS[:1])
    net.time_text_embed.time_proj.register_forward_pre_hook(lambda module, inputs: told.append(inputs[0]))
    v = backbone.velocity(net, latents(backbone, 1), torch.tensor([.8125]), cond)
    assert told[0].item() == 812.5 and v.dtype == torch.float32                    # bf16 would say 812


# ---- Text

@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("length", [None, 128])
def test_encoding_is_the_pipelines_bit_for_bit(folders, name, length):
    """At the pipeline's own text length and at a chosen one; free_text then drops the encoders."""
    backbone, pipe = backbone_of(folders, name, text_length=length), stock(folders[name].split(",")[0])
    prompts, options = PROMPTS + [""], {"max_sequence_length": length} if length else {}
    ours, size = backbone.encode(prompts), length or 512
    assert prompts == PROMPTS + [""]                                  # Z-Image's pipeline writes into what it gets
    with torch.no_grad():
        if name == "flux1":
            text, pooled, _ = pipe.encode_prompt(prompts, **options)
            theirs = {"text": text, "pooled": pooled, "guidance": torch.ones(3)}
        elif name.startswith("flux2"):
            theirs = {"text": pipe.encode_prompt(prompts, **options)[0]}
        elif name == "zimage":
            rows, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, **options)
            theirs = {"text": torch.stack([F.pad(row, (0, 0, 0, size - len(row))) for row in rows]),
                      "length": torch.tensor([len(row) for row in rows])}
        else:
            rows = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **options)
            size = 77 + (length or 256)
            theirs = {"text": rows[0], "pooled": rows[2]}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours["text"].shape[1] == size
    assert str(backbone.text_length) in backbone.text_key.split()     # no cached row serves another length
    backbone.free_text()
    assert backbone.text is None


def test_qwen_runs_only_to_its_last_tap(folders):
    """Layers above the last one that is read are gone, and so is the language head."""
    backbone = backbone_of(folders, "flux2-4b")
    backbone.encode([""])
    assert len(backbone.text.text_encoder.layers) == 27 and not hasattr(backbone.text.text_encoder, "lm_head")


# ---- Images

@pytest.mark.parametrize("name", FAMILIES)
def test_decode_inverts_the_pipelines_scaling(folders, name):
    """A latent that the pipeline scaled reaches the VAE as the VAE had made it."""
    backbone, image = backbone_of(folders, name), torch.rand(2, 3, 64, 64) * 2 - 1
    vae = backbone.vae
    z = vae.encode(image).latent_dist.mode()
    if name.startswith("flux2"):
        x = stock(folders["base"])._encode_vae_image(image, None)
    else:
        x = (z - vae.config.shift_factor) * vae.config.scaling_factor
    images, decode, seen = None, vae.decode, []
    vae.decode = lambda z, **options: seen.append(z) or decode(z, **options)
    images = backbone.decode(x)
    torch.testing.assert_close(torch.cat(seen), z, atol=1e-5, rtol=1e-5)
    assert images.shape == (2, 3, 64, 64) and 0 <= images.min() and images.max() <= 1


@pytest.mark.parametrize("name", ["sd3m", "flux2-4b"])
def test_decode_in_chunks_with_gradient_and_checkpointing(folders, name):
    """Neither changes the gradient that Eq. 15 sends through the decoder."""
    gradients = []
    for checkpointing, pixels in ((False, 2**20), (False, 64 * 64), (True, 2**20)):
        backbone = backbone_of(folders, name)
        if not checkpointing:
            backbone.vae.disable_gradient_checkpointing()
        assert backbone.vae.decoder.gradient_checkpointing == checkpointing
        x = latents(backbone).requires_grad_()
        backbone.decode(x, pixels=pixels).square().mean().backward()
        gradients.append(x.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


# ---- What is loaded, and what cannot be

def test_every_model_has_a_class():
    """Each row of BACKBONES, and a class of one's own by module:Class."""
    found = {model: rtdmd.backbone_class(model).__name__ for model in rtdmd.BACKBONES}
    assert found == {"tiny": "TinyBackbone", "sd3m": "SD3Backbone", "sd35m": "SD3Backbone", "sd35l": "SD3Backbone",
                     "flux1": "Flux1Backbone", "flux2-4b": "Flux2Backbone", "flux2-9b": "Flux2Backbone",
                     "zimage": "ZImageBackbone"}
    assert rtdmd.backbone_class("eval:TinyBackbone") is ev.TinyBackbone
    with pytest.raises(rtdmd.UsageError, match="--model 'sd4' is unknown: take one of tiny, sd3m"):
        rtdmd.backbone_class("sd4")


def test_a_repository_that_cannot_be_used(folders, tmp_path):
    """Missing, foreign, partial or damaged: one sentence that names it."""
    def attempt(path, model="sd3m"):
        with pytest.raises(rtdmd.UsageError) as error:
            backbone_of({model: str(path)}, model)
        return sentence(error)

    for path in (tmp_path / "nowhere", "someone/model-that-is-not-cached"):
        text = attempt(path)
        assert text.startswith(f"model_index.json of {path} is not on the hub") and "check name" in text
    assert attempt(tmp_path) == f"{tmp_path} has no model_index.json: name a folder that is whole."
    assert "Flux2KleinPipeline" in attempt(folders["base"])
    assert "StableDiffusion3Pipeline" in attempt(folders["sd3m"], "flux2-4b")
    broken = tmp_path / "broken"
    for part in ("vae", "transformer", "scheduler"):
        shutil.copytree(folders["sd3m"], broken)
        shutil.rmtree(broken / part)
        assert re.match(fr"{broken} has no {part}/\S*config.json", attempt(broken))
        shutil.rmtree(broken)
    shutil.copytree(folders["sd3m"], broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])                             # a download that stopped
    assert f"{broken} is incomplete or damaged" in attempt(broken)
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None]}))
    assert "StableDiffusion3Pipeline without text_encoder_3" in attempt(broken)


@pytest.mark.parametrize("model, name", [("sd3m", "sd3m"), ("flux1", "flux1"), ("flux2-4b", "base"),
                                         ("zimage", "turbo")])
def test_every_network_that_is_read_is_whole(folders, tmp_path, model, name):
    """One tensor missing in any component: transformers would make it up, another one at every load."""
    from safetensors.torch import save_file
    folder = folders[name]
    for weights in Path(folder).glob("*/*.safetensors"):
        broken, tensors = tmp_path / weights.parent.name, rtdmd.load_file(weights)
        shutil.copytree(folder, broken)
        lost = [n for n in tensors if tensors[n].dim() > 1][-1]
        del tensors[lost]
        save_file(tensors, broken / weights.relative_to(folder), {"format": "pt"})
        with pytest.raises(rtdmd.UsageError) as error:
            backbone_of({model: str(broken)}, model).encode(PROMPTS)
        assert re.search(f"{weights.parent.name} lacks [12] tensors", sentence(error)), lost    # 2: a tied one


def test_weights_of_noise_are_one_sentence(tmp_path, monkeypatch):
    """Only loading shows it, and unpickling raises almost anything."""
    small_vit_h(monkeypatch)
    for repo, file in (("HPSv2", "HPS_v2.1_compressed.pt"), (".", "sac+logos+ava1-l14-linearMSE.pth"),
                       ("ImageReward", "ImageReward.pt")):
        (tmp_path / repo).mkdir(exist_ok=True)
        (tmp_path / repo / file).write_bytes(bytes(range(256)))
    for name in ("hpsv2", "aesthetic", "imagereward"):
        with pytest.raises(rtdmd.UsageError, match=f"reward .*{name} cannot be loaded") as error:
            ev.load_metric(name, settings(tmp_path))
        sentence(error)


def test_missing_text_encoder_and_gated_repository(folders, tmp_path, monkeypatch):
    """The one shows when text is encoded, the other at once, with the link to its licence."""
    broken = tmp_path / "broken"
    shutil.copytree(folders["sd3m"], broken)
    shutil.rmtree(broken / "text_encoder_3")
    backbone = backbone_of({"sd3m": str(broken)}, "sd3m")
    with pytest.raises(rtdmd.UsageError) as error:
        backbone.encode(PROMPTS)
    assert f"{broken} has no text_encoder_3/config.json" in sentence(error)

    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args, **options):
        raise GatedRepoError("Access to this model is restricted", response=Response())

    class Response:
        headers, status_code, text, request = {}, 403, "", None

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(rtdmd.UsageError) as error:
        rtdmd.SD3Backbone(rtdmd.Config(model="sd3m", device="cpu"))
    assert re.search("GatedRepoError.*accept the licence on https://huggingface.co/stabilityai/", sentence(error))


def test_the_distilled_flux2_is_no_teacher(folders):
    """DEPARTURE 15: it may be the generator's base, never psi; one base may serve both."""
    for path in (folders["distilled"], f"{folders['base']},{folders['distilled']}"):
        with pytest.raises(rtdmd.UsageError) as error:
            backbone_of({"flux2-4b": path}, "flux2-4b")
        assert "cannot be the teacher" in sentence(error)
    backbone = backbone_of({"flux2-4b": folders["base"]}, "flux2-4b")      # one base for both roles is fine
    assert backbone.nets["generator"] is backbone.nets["teacher"]
    pair = backbone_of(folders, "flux2-4b").nets
    assert pair["generator"] is not pair["teacher"]


def test_schnell_is_no_teacher(folders):
    """FLUX.1-schnell reads no guidance: a generator that keeps its own grid, and never psi."""
    for path in (folders["schnell"], f"{folders['flux1']},{folders['schnell']}"):
        with pytest.raises(rtdmd.UsageError) as error:
            backbone_of({"flux1": path}, "flux1")
        assert "ignores guidance" in sentence(error)
    backbone = backbone_of({"flux1": f"{folders['schnell']},{folders['flux1']}"}, "flux1")
    pipe = stock(folders["schnell"])
    x, cond = latents(backbone), backbone.encode(PROMPTS)
    velocity = lambda x, t: backbone.velocity(backbone.nets["generator"], x, t, cond)
    with torch.no_grad():
        states, _ = rtdmd.rollout(velocity, x, [0.0] * 4, timesteps(backbone), 0)
    torch.testing.assert_close(backbone.decode(states[-1]), image_of(pipe, x), atol=2e-5, rtol=0)
    assert pipe.scheduler.sigmas.tolist() == [1, .75, .5, .25, 0]


def test_a_resolution_that_does_not_fit(folders):
    """No multiple of 16, or beyond the position table: one sentence."""
    for name, resolution in (("sd3m", 100), ("sd3m", 272), ("flux2-4b", 72)):           # pos_embed: 256
        backbone = backbone_of(folders, name)
        cls = type(backbone)
        with pytest.raises(rtdmd.UsageError) as error:
            cls(replace(backbone.cfg, resolution=resolution))
        assert "multiple of 16" in sentence(error)


def test_a_tilde_in_pretrained_is_the_home_folder(folders, monkeypatch):
    """No shell expands the second of GENERATOR,TEACHER, or what stands behind "--pretrained="."""
    one, two = map(Path, folders["flux2-4b"].split(","))
    monkeypatch.setenv("HOME", str(one.parent))
    backbone = backbone_of({"flux2-4b": f"~/{one.name},~/{two.name}"}, "flux2-4b")
    assert backbone.base == str(one)


def test_weights_dir_comes_before_the_hub(tmp_path):
    """A file in its repository's folder, or else in --weights_dir itself, is taken from there."""
    cfg = settings(tmp_path)
    (tmp_path / "file.pt").touch()
    assert rtdmd.find_weights("some/repo", "file.pt", cfg) == tmp_path / "file.pt"
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "file.pt").touch()
    assert rtdmd.find_weights("some/repo", "file.pt", cfg) == tmp_path / "repo" / "file.pt"


def test_a_repository_is_not_taken_for_another(tmp_path, monkeypatch):
    """Every repository has a config.json. --weights_dir a/generator held the teacher's, too, and trained on itself."""
    monkeypatch.setattr(rtdmd.huggingface_hub, "hf_hub_download", lambda repo, name: f"hub/{repo}/{name}")
    cfg = settings(tmp_path / "generator")
    (tmp_path / "generator/transformer").mkdir(parents=True)
    found = written(tmp_path, "generator/transformer/config.json", "{}")
    assert rtdmd.find_weights("some/generator", "transformer/config.json", cfg) == Path(found)
    assert rtdmd.find_weights("some/teacher", "transformer/config.json", cfg) == \
        Path("hub/some/teacher/transformer/config.json")


class OneOfAFamily(rtdmd.SD3Backbone):
    """As module:Class it has no row in BACKBONES."""


def test_a_class_that_extends_a_family(folders):
    """It needs --pretrained, and is told so; with another pipeline's folder the sentence names no example."""
    make = lambda path: OneOfAFamily(rtdmd.Config(model=f"{__name__}:OneOfAFamily", pretrained=path, resolution=64,
                                                  device="cpu"))
    assert make(folders["sd3m"]).base == folders["sd3m"]
    for path, words in (("", "give --pretrained"), (",", "give --pretrained"),
                        (folders["flux1"], "take a whole StableDiffusion3Pipeline")):
        with pytest.raises(rtdmd.UsageError, match=words) as error:
            make(path)
        sentence(error)


def test_a_tokenizer_that_is_another_thing(tmp_path):
    """transformers answers with a KeyError."""
    from transformers import CLIPTokenizer
    written(tmp_path, "tokenizer.json", "{}")
    with pytest.raises(rtdmd.UsageError, match="incomplete or damaged") as error:
        rtdmd.from_hub(CLIPTokenizer.from_pretrained, str(tmp_path), settings(), needs="tokenizer.json")
    sentence(error)


# ---- Export

@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rank, alpha", [(64, 32), (32, 64)])
def test_an_exported_adapter_is_exact_in_the_stock_pipeline(folders, tmp_path, name, rank, alpha):
    """pipe.load_lora_weights and load_lora give our velocity and tensors, for any rank and alpha."""
    backbone = backbone_of(folders, name)
    net, x, t = backbone.nets["generator"], latents(backbone), torch.tensor([.9, .5])
    cond = backbone.encode(PROMPTS)
    bare = backbone.velocity(net, x, t, cond).detach()
    net.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=backbone.lora_targets), "generator")
    torch.manual_seed(1)
    for parameter in net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=.05)
    ours = backbone.velocity(net, x, t, cond).detach()
    state = get_peft_model_state_dict(net, adapter_name="generator")
    folder = tmp_path / "checkpoint-000100"
    rtdmd.save_lora(folder, state, rank, alpha, backbone.lora_targets, {"steps": 4, "eta": .9})
    pipe = stock(backbone.base)
    pipe.load_lora_weights(folder)
    assert torch.equal(backbone.velocity(pipe.transformer, x, t, cond), ours)
    assert (ours - bare).abs().max() > 1e-3
    loaded, info = ev.load_lora(folder)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[n], state[n]) for n in state)
    assert info == dict(steps=4, eta=.9, rank=rank, alpha=alpha, targets=sorted(backbone.lora_targets))


def test_adapters_that_cannot_be_loaded(tmp_path):
    """No file, a foreign one and a truncated one are one sentence each."""
    with pytest.raises(rtdmd.UsageError, match="missing or damaged"):
        ev.load_lora(tmp_path)
    from safetensors.torch import save_file
    save_file({"transformer.x.lora_A.weight": torch.zeros(1)}, tmp_path / rtdmd.LORA_FILE)
    with pytest.raises(rtdmd.UsageError, match="rank and alpha"):
        ev.load_lora(tmp_path)
    path = tmp_path / rtdmd.LORA_FILE
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(rtdmd.UsageError, match="missing or damaged"):
        ev.load_lora(tmp_path)


@pytest.mark.parametrize("name", ["sd3m", "flux1", "flux2-4b", "zimage"])
def test_adapters_are_fp32_over_a_bf16_base_and_run_as_deployed(folders, tmp_path, name):
    """DEPARTURE 14: a step of 1e-6 moves both adapters, not only the last that PEFT made; and what is trained is
    what is deployed: the stock bf16 pipeline with the exported adapter gives our velocity bit for bit."""
    backbone = backbone_of(folders, name, dtype="bf16")
    roles = rtdmd.Roles(backbone, rtdmd.Config(model=name, device="cpu", lora_rank=4, lora_alpha=2))
    assert {p.dtype for p in roles.flat.values()} == {torch.float32}
    torch.nn.init.normal_(roles.flat["generator"], std=.3, generator=rng(1))
    x, t, cond = latents(backbone), torch.tensor([.75, .5]), backbone.encode(PROMPTS)
    ours = roles.velocity("generator", x, t, cond)
    ours.square().mean().backward()
    assert roles.flat["generator"].grad.dtype == torch.float32
    p = roles.flat["generator"]
    before = p.detach().clone()
    rtdmd.save_lora(tmp_path, roles.named["generator"], 4, 2, backbone.lora_targets, {})
    torch.optim.AdamW([roles.flat["generator"]], 1e-6).step()
    assert not torch.equal(before, p)
    pipe = stock(backbone.base, dtype=torch.bfloat16)
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        assert torch.equal(backbone.velocity(pipe.transformer, x, t, cond), ours)


# ---- Both stages on the real classes: from the command line to a picture by stock diffusers

JUDGE = '''
def vivid(images, prompts):
    """Spread and redness: its gradient passes through the VAE's decoder."""
    return images.flatten(1).std(1) + images[:, 0].mean((1, 2))
vivid.differentiable = True
'''
REAL_FLAGS = ("--iterations 2 --batch 4 --fake_updates 2 --groups 2 --group_size 2 --micro_batch 4 --lora_rank 4 "
              "--lora_alpha 2 --resolution 64 --device cpu --prompts prompts.txt --rewards vivid_judge:vivid "
              "--lr 1e-3 --lr_fake 1e-3 --consistency_share 1")
REAL_LENGTHS = {"sd3m": 256, "sd35m": 32, "flux1": 512, "flux2-4b": 512, "zimage": 128}    # the pipelines' own, but
ASKED_FOR = {"sd35m": ["--text_length", "32"], "zimage": ["--text_length", "128"]}


def frozen_hashes(backbone):
    """Hash of every weight and buffer of the base networks and the VAE, by its name in the bare network."""
    nets = {"generator": backbone.nets["generator"], "teacher": backbone.nets["teacher"], "vae": backbone.vae}
    return {f"{part}.{name.replace('.base_layer.', '.')}": hash(tensor.numpy().tobytes())
            for part, net in nets.items() for name, tensor in net.state_dict().items() if ".lora_" not in name}


@contextlib.contextmanager
def ema_weights(run):
    """The averaged generator in place of the raw one."""
    theta = run.roles.flat["generator"].data
    raw = theta.clone()
    theta.copy_(run.ema)
    yield
    theta.copy_(raw)


def adapter_copy(run, role):
    return {name: p.detach().clone() for name, p in run.roles.named[role].items()}


def trained_on_small(folders, root, name):
    """Runs both stages of a family; {stage: what was seen of the run}."""
    (root / "vivid_judge.py").write_text(JUDGE)
    (root / "prompts.txt").write_text("\n".join(PROMPTS + ["a green house"]))
    seen, found, prepare = {}, rtdmd.backbone_class, rtdmd.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)

        def load_and_hash(cfg):
            backbone = found(cfg.model)(cfg)
            seen[cfg.stage] = SimpleNamespace(hashes=frozen_hashes(backbone))
            return backbone

        def prepare_and_keep(cfg):
            run = prepare(cfg)
            seen[cfg.stage].run = run
            seen[cfg.stage].start = {role: adapter_copy(run, role) for role in ("generator", "fake")}
            return run

        patch.setattr(rtdmd, "backbone_class", lambda model: load_and_hash)
        patch.setattr(rtdmd, "prepare", prepare_and_keep)
        for stage in ("1", "2"):
            rtdmd.main(["--stage", stage, "--model", name, "--pretrained", folders[name], "--out", "run",
                        "--cache", str(root / "cache"), *REAL_FLAGS.split(), *ASKED_FOR.get(name, [])])
    for stage, one in seen.items():
        one.folder = root / f"run/stage{stage}"
        one.checkpoint = one.folder / "checkpoint-000002"
    return seen


@pytest.fixture(scope="module", params=FAMILIES)
def real_run(request, folders, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    return SimpleNamespace(name=request.param, root=root, stages=trained_on_small(folders, root, request.param))


def test_both_stages_train_a_real_class(real_run):
    """Finite losses and gradients, adapters that move, a base that does not; DEPARTURE 14: stage 2 starts where
    stage 1's average and its fake score ended."""
    for stage, one in real_run.stages.items():
        rows = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in rows] == [1, 2]
        assert all(math.isfinite(v) for row in rows for v in row.values())
        wanted = ["dsm", "consistency", "dm", "grad_generator", "grad_fake"]
        wanted += ["push_policy", "push_det", "push_dm"] if stage == 2 else []
        assert all(row[name] != 0 for row in rows for name in wanted) and rows[-1]["skipped"] == 0
        for role in ("generator", "fake"):
            now, start = adapter_copy(one.run, role), one.start[role]
            # The last block of SD3 has a text query that nobody reads: its adapter has no gradient.
            still = [n for n in now if torch.equal(now[n], start[n]) and "add_q_proj" not in n]
            assert not still, still[:3]
        assert frozen_hashes(one.run.backbone) == one.hashes and len(one.hashes) > 50
        assert list((one.folder / "samples").glob("*.png"))
    first, second = real_run.stages[1], real_run.stages[2]
    average = first.run.roles.parts("generator", first.run.ema)
    assert all(torch.equal(second.start["generator"][n], p) for n, p in average.items())
    fake = adapter_copy(first.run, "fake")
    assert all(torch.equal(second.start["fake"][n], p) for n, p in fake.items())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_is_exact_in_the_stock_pipeline(real_run, stage):
    """load_lora_weights(folder) gives the average's velocity bit for bit, not the raw one's or the base's."""
    one = real_run.stages[stage]
    backbone, x, t = one.run.backbone, latents(one.run.backbone), torch.tensor([.9, .5])
    cond, pipe = one.run.text.batch(PROMPTS, "cpu"), stock(backbone.base)
    with torch.no_grad():
        raw = one.run.roles.velocity("generator", x, t, cond)
        with ema_weights(one.run):
            ours = one.run.roles.velocity("generator", x, t, cond)
        bare = backbone.velocity(pipe.transformer, x, t, cond)
        pipe.load_lora_weights(one.checkpoint)
        theirs = backbone.velocity(pipe.transformer, x, t, cond)
    assert torch.equal(theirs, ours) and not torch.equal(raw, ours) and not torch.equal(bare, ours)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_says_how_to_sample(real_run, stage):
    """Its metadata: model, steps, eta, shift, levels, guidance, text length, rank and alpha."""
    one, (_, info) = real_run.stages[stage], ev.load_lora(real_run.stages[stage].checkpoint)
    backbone = one.run.backbone
    wanted = dict(model=real_run.name, base=backbone.base, stage=stage, iteration=2, steps=4, eta=0.9,
                  shift=backbone.shift, guidance=0.0 if real_run.name == "zimage" else 1.0,      # of the pipeline
                  text_length=REAL_LENGTHS[real_run.name], resolution=64, rank=4, alpha=2)
    assert {n: info[n] for n in wanted} == wanted
    assert info["sigmas"] == pytest.approx(timesteps(backbone)[:-1].tolist())


def test_the_readmes_lines_give_our_picture(real_run):
    """pipe.load_lora_weights and CPSScheduler against rtdmd.rollout, with the same noise."""
    one = real_run.stages[2]
    backbone, info, x = one.run.backbone, ev.load_lora(one.checkpoint)[1], latents(one.run.backbone)
    pipe = stock(backbone.base)
    pipe.load_lora_weights(one.checkpoint)
    pipe.scheduler = rtdmd.CPSScheduler.from_config(pipe.scheduler.config, eta=info["eta"])
    pipe.scheduler.generator = rng(0)
    theirs = image_of(pipe, x, num_inference_steps=info["steps"], max_sequence_length=info["text_length"],
                      guidance_scale=info["guidance"])
    cond = one.run.text.batch(PROMPTS, "cpu")
    with torch.no_grad(), ema_weights(one.run):
        velocity = lambda x, t: one.run.roles.velocity("generator", x, t, cond)
        states, _ = rtdmd.rollout(velocity, x, pipeline_noise(x, rng(0), real_run.name), one.run.times, info["eta"])
        ours = backbone.decode(states[-1])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


README = Path(rtdmd.__file__).with_name("README.md")


def readme_block(first_words, path=README):
    """The block of Python in README.md, or in another file, that begins with these words."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
    return next(text for text in blocks if text.startswith(first_words))


def test_every_flag_of_the_documents_exists():
    """README and docs name no flag that has gone."""
    ours = {field.name for options in (rtdmd.Config, ev.Flags) for field in dataclasses.fields(options)}
    others = set("nproc_per_node help no-deps kills jobs".split())
    for path in (README, *README.parent.glob("docs/*.md")):
        found = set(re.findall(r"(?<![\w-])--([a-z][a-z_-]+)", path.read_text()))
        assert found <= ours | others, (path.name, found - ours - others)


def test_the_readmes_own_backbone_and_reward_train(tmp_path, monkeypatch):
    """Pasted into files beside the prompts: both stages, as the README calls them, and an evaluation of the result."""
    for name in ("my_models", "my_rewards"):
        written(tmp_path, f"{name}.py", readme_block(f"# {name}.py"))
        monkeypatch.delitem(sys.modules, name, raising=False)                # another test has one of this name
    monkeypatch.syspath_prepend(tmp_path)
    written(tmp_path, "prompts.txt", "a red fox\na blue whale\n")
    monkeypatch.chdir(tmp_path)
    line = "--model my_models:Pixels --prompts prompts.txt --iterations 2 --device cpu".split()
    for stage in ("1", "2"):
        rtdmd.main(["--stage", stage, *line])
    rows = rows_of(tmp_path / "runs/Pixels/stage2")
    assert len(rows) == 2 and math.isfinite(rows[-1]["reward_my_rewards:blueness"])
    ev.main(["--model", "my_models:Pixels", "--lora", "runs/Pixels/stage2", "--prompts", "prompts.txt", "--device",
             "cpu", "--metrics", "my_rewards:blueness"])
    assert json.loads(Path("runs/eval/report.json").read_text())["scores"]["stage2"]


def test_the_documents_reward_with_a_network(tmp_path, monkeypatch):
    """Loaded by its name, it scores, and its gradient reaches the pictures."""
    from transformers import ViTConfig, ViTForImageClassification
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(tmp_path / "model")
    code = readme_block("import torch\nimport transformers", README.parent / "docs/scores.md")
    assert "your/model" in code
    written(tmp_path, "with_network.py", code.replace("your/model", str(tmp_path / "model")))
    monkeypatch.syspath_prepend(tmp_path)
    reward = rtdmd.load_reward("with_network:Classifier", settings())
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    values = rtdmd.rate("own", reward, images + 0, ["a cat", "a dog"])
    assert reward.differentiable and values.shape == (2,)
    assert torch.autograd.grad(values.sum(), images)[0].abs().amax((1, 2, 3)).min() > 0
    assert not any(p.requires_grad for p in reward.net.parameters())


@pytest.mark.parametrize("real_run", ["sd3m"], indirect=True)
def test_the_readmes_snippet_for_diffusers(real_run, folders, tmp_path, monkeypatch):
    """As it stands, with our folder and size: the picture has the size that was trained, not the pipeline's own."""
    from diffusers import StableDiffusion3Pipeline
    monkeypatch.chdir(tmp_path)
    load = StableDiffusion3Pipeline.from_pretrained

    def twice_as_large(*args, **options):
        pipe = load(*args, **options)
        pipe.default_sample_size *= 2
        return pipe

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", twice_as_large)
    code = readme_block("import torch\nfrom diffusers")
    for old, new in (("stabilityai/stable-diffusion-3-medium-diffusers", folders["sd3m"]), ('.to("cuda")', ""),
                     ("runs/sd3m/stage2/checkpoint-001000", str(real_run.stages[2].checkpoint)),
                     ("torch.bfloat16", "torch.float32"), ("512", "64")):
        assert old in code
        code = code.replace(old, new)
    exec(code, {})
    assert Image.open("fox.png").size == (64, 64)


FATAL = """
import os, signal, pathlib, torch
def watch(images, prompts):
    seen = pathlib.Path("seen")
    seen.write_text(seen.read_text() + "x" if seen.exists() else "x")
    if len(seen.read_text()) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean((1, 2, 3))
def bright(images, prompts):
    return images.mean((1, 2, 3))
bright.differentiable = True
"""


def test_the_file_trains_alone(folders, tmp_path):
    """Copied into an empty folder, without eval.py: stage 1 is killed in its second iteration and goes on, stage 2 has
    an own reward, and a stock pipeline loads what comes out."""
    shutil.copy(rtdmd.__file__, tmp_path / "rtdmd.py")
    (tmp_path / "own.py").write_text(FATAL)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    line = ["--model", "sd3m", "--pretrained", folders["sd3m"], "--out", "run", "--cache", "cache", "--save_every", "1",
            "--sample_every", "1", "--watch", "own:watch",
            *REAL_FLAGS.replace("vivid_judge:vivid", "own:bright").split()]
    alone = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | dict(OMP_NUM_THREADS="1")
    run = functools.partial(subprocess.run, cwd=tmp_path, env=alone, capture_output=True, text=True)
    killed = run([sys.executable, "rtdmd.py", "--stage", "1", *line])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    both = f"import rtdmd\nfor stage in '12': rtdmd.main(['--stage', stage, *{line!r}])"
    done = run([sys.executable, "-c", both])
    assert done.returncode == 0 and "Resumed run/stage1/checkpoint-000001" in done.stderr, done.stderr
    assert (tmp_path / "run/stage2/start-000000/rtdmd.py").exists() and not list(tmp_path.rglob("eval.py"))
    stock(folders["sd3m"]).load_lora_weights(tmp_path / "run/stage2/checkpoint-000002")


def test_eval_samples_a_real_checkpoint(real_run, folders, monkeypatch, capsys):
    """eval.py --lora scores it, --prompt paints with it; both take the text length from the checkpoint."""
    monkeypatch.chdir(real_run.root)
    loaded, found, judge = [], rtdmd.backbone_class, "vivid_judge:vivid"
    make = lambda cfg: loaded.append(found(cfg.model)(cfg)) or loaded[-1]
    monkeypatch.setattr(rtdmd, "backbone_class", lambda model: make)
    base = ["--model", real_run.name, "--pretrained", folders[real_run.name], "--lora", "run/stage2",
            "--resolution", "64", "--device", "cpu", "--cache", "cache", "--out", "eval"]
    ev.main([*base, "--prompts", "prompts.txt", "--metrics", judge])
    report = json.loads(Path("eval/report.json").read_text())
    assert math.isfinite(report["rows"]["stage2"][judge]) and len(report["scores"]["stage2"][judge]) == 3
    ev.main([*base, "--prompt", PROMPTS[0]])
    assert Image.open("eval/prompt.png").size[0] >= 64
    assert [backbone.text_length for backbone in loaded] == 2 * [REAL_LENGTHS[real_run.name]]


# -----------------------------------------------------------------------------------------------------------------
# 9. Plumbing
# -----------------------------------------------------------------------------------------------------------------

# ---- Processes

FORK = multiprocessing.get_context("forkserver")          # a process that has imported everything, and run nothing
STARTED = []


@pytest.fixture(autouse=True)
def no_process_is_left():
    """What a test has started ends with it, also where it fails."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.join()


def child(argv, env, output, before):
    """One process of a run, in a fresh fork; `before` names a function of this file that prepares a fault."""
    os.environ.update(env, OMP_NUM_THREADS="1")
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                        # tqdm's own is a semaphore that a killed process leaks
    if before:
        globals()[before](Path(output))
    rtdmd.main(argv)


def start(argv, folder, world=1, before=None):
    """Processes of one run, as torchrun would start them; what they print goes to FOLDER/rank-0 and so on."""
    # The fork server imports this file before it forks.
    own, paths = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "").split(":")
    os.environ["PYTHONPATH"] = ":".join(paths if own in paths else [own, *paths])
    FORK.set_forkserver_preload([Path(__file__).stem])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(world):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        args = argv, {n: str(value) for n, value in env.items()}, str(folder / f"rank-{rank}"), before
        processes.append(FORK.Process(target=child, args=args, daemon=True))
        processes[-1].start()
        STARTED.append(processes[-1])
    return processes


def finish(processes, limit=300):
    """Exit codes; a process that hangs is killed and fails the test."""
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "a process hangs"
    return [process.exitcode for process in processes]


def keep_rewards(output):
    """Before a run: every (G, N) table of rewards goes to a file as well."""
    original, tables = rtdmd.group_advantages, []

    def group_advantages(rewards, **options):
        tables.append(rewards)
        torch.save(tables, output.with_suffix(".rewards"))
        return original(rewards, **options)

    rtdmd.group_advantages = group_advantages


def mean_colour(images, prompts):
    """A reward for networks that come without one: red minus blue."""
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


mean_colour.differentiable = True


@pytest.fixture(scope="session")
def small_sd3_world(folders, tmp_path_factory):
    """(flags, finished stage 1) of an SD3 with two blocks, a VAE and three text encoders."""
    root = tmp_path_factory.mktemp("sd3")
    words = "red blue tall wet loud old flat warm".split()
    prompts = written(root, "prompts.txt", "".join(f"a {word} cat\n" for word in words))
    common = [*SMALL, "--model", "sd3m", "--pretrained", folders["sd3m"], "--resolution", "64", "--lr", "1e-3",
              "--prompts", prompts, "--rewards", f"{Path(__file__).stem}:mean_colour=1",
              "--cache", str(root / "cache")]
    rtdmd.main([*common, "--stage", "1", "--out", str(root / "begun")])
    return common, root / "begun"


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("model", ["tiny", "sd3m"])
def test_processes_and_micro_batches_change_nothing(model, stage, flags, tmp_path, request):
    """1 to 4 processes and any micro-batch are one run, but for the order of fp32 sums. So is the log: 8 samples of
    stage 1 on 3 processes would tell a mean of means.

    Tolerances. A gradient is a sum of some 10^3 terms of either sign, 10 to 100 times larger than what is left
    (advantages cancel): another order costs about 10^3^.5 * 6e-8 * 100 = 2e-4 of its largest component. Adam's
    first moments after one iteration are that gradient: 5e-4 is allowed, where a lost sample or a mean of means
    makes 1e-1. Adam divides by the gradient's size, so a component close to its rounding error may move by a part
    of lr = 1e-3; the others agree like gradients: 99 % of all weights within 1e-6, a thousandth of one update,
    and all within a tenth (seen: 3e-8 and 6e-7). Rewards before the first update come from the same weights and
    noise: equal to the last bit, for every trajectory, where the same four go through the network together
    (--micro_batch 1); another shape may round differently.
    """
    base = None
    if model == "sd3m":
        common, begun = request.getfixturevalue("small_sd3_world")
    for world, micro in ((1, 1), (2, 1), (2 + stage, 6)) if model == "tiny" else ((1, 1), (4, 5)):
        more = f"--group_size 4 --sample_every 9 --micro_batch {micro}".split()
        out = tmp_path / f"{world}-{micro}"
        if model == "sd3m":
            argv = [*common, "--stage", str(stage), *(["--init", str(begun / "stage1")] if stage == 2 else [])]
        else:
            argv = flags(stage)
        argv += ["--out", str(out), *more]
        assert finish(start(argv, out / "log", world, "keep_rewards")) == [0] * world
        states = [state_of(out / f"stage{stage}/checkpoint-{n:06d}") for n in (1, 3)]
        rewards = torch.load(out / "log/rank-0.rewards") if stage == 2 else []
        logged = rows_of(out / f"stage{stage}")
        base = base or (states, rewards, logged)
        for row, other in zip(logged, base[2], strict=True):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-6), (world, micro)
        for n, other in base[0][0].items():
            if "exp_avg" in n and not n.endswith("sq"):
                assert (states[0][n] - other).abs().max() <= 5e-4 * other.abs().max(), (world, micro, n)
        weights = [n for n in states[1] if not n.startswith("adam")]
        differences = torch.cat([(states[1][n] - base[0][1][n]).abs().flatten() for n in weights])
        assert differences.quantile(0.99) < 1e-6 and differences.max() < 1e-4, (world, micro)
        for a, b in zip(rewards[:1], base[1]):
            assert torch.equal(a, b) if micro == 1 else torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("error, words, code", [
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory", 1),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory", 1),
    (MemoryError(), "out of memory", 1),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out of memory", 1),
    (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [::1]:52"), "another process has ended", 1),
    (torch.distributed.DistBackendError("NCCL error: remote process exited"), "another process has ended", 1)])
def test_what_pytorch_says_in_its_own_words(error, words, code, capfd):
    """Faults that a user can do something about; any other error of PyTorch keeps its traceback."""
    with pytest.raises(SystemExit) as exit, rtdmd.one_sentence("rtdmd"):
        raise error
    one_sentence(capfd.readouterr().err, exit.value.code, words, code)
    with pytest.raises(RuntimeError, match="shapes"), rtdmd.one_sentence("rtdmd"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize("error, code", [(rtdmd.UsageError("The disk is full."), 2), (SystemExit(3), 3),
                                         (ZeroDivisionError("a defect"), 1), (None, None)])
def test_after_an_error_nccl_is_not_left_in_order(error, code, monkeypatch, capfd):
    """destroy_process_group waits for processes that wait for this one in a collective: the run would hang."""
    class Left(BaseException):
        pass

    ends = []
    monkeypatch.setattr(rtdmd.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(rtdmd.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(rtdmd.dist, "destroy_process_group", lambda: ends.append("in order"))
    monkeypatch.setattr(os, "_exit", lambda code: ends.append(code) or (_ for _ in ()).throw(Left))
    with pytest.raises(Left) if error else contextlib.nullcontext(), rtdmd.one_sentence("rtdmd"):
        if error:
            raise error
    assert ends == ([code] if error else ["in order"])
    shown = capfd.readouterr().err
    assert ("rtdmd: The disk is full." in shown) == (code == 2)
    assert ("Traceback" in shown and "a defect" in shown) == (code == 1)


@pytest.mark.parametrize("batch, warned", [(4, True), (8, False)])
def test_an_uneven_batch_is_said(batch, warned, flags, tmp_path):
    """On two processes with K = 4 each should get as many samples of every step."""
    argv = flags(1, "--batch", batch, "--iterations", 1)
    assert finish(start(argv, tmp_path / "log", 2)) == [0, 0]
    assert (f"--batch {batch} splits unevenly: multiples of 8" in (tmp_path / "log/rank-0").read_text()) == warned


def test_processes_that_differ_are_refused(flags, tmp_path):
    """Another seed, or a folder that one node does not see: the gradients would be added up all the same."""
    assert finish(start(flags(1), tmp_path / "log", 2, "another_seed")) == [2, 2]
    for rank in (0, 1):
        one_sentence((tmp_path / f"log/rank-{rank}").read_text(), 2, "processes differ")
    assert nothing_in(tmp_path / "run")


def another_seed(output):
    """Before a run: rank 1 is started with another seed."""
    original = rtdmd.resolve
    rtdmd.resolve = lambda given: original({**given, "seed": rtdmd.dist_info()[0]})


# ---- Roles

def tiny_roles(cache, **options):
    world = dict(model="tiny", device="cpu", pretrained="tiny-1", cache=str(cache))
    cfg = rtdmd.resolve(dict(world, lora_rank=4, **options))
    backbone, g = ev.TinyBackbone(cfg), rng(3)
    x, t = torch.randn(6, *backbone.latent_shape, generator=g), torch.rand(6, generator=g)
    cond = backbone.encode(ev.tiny_captions()[20:26])
    with torch.no_grad():
        base = backbone.velocity(backbone.nets["teacher"], x, t, cond)
    return rtdmd.Roles(backbone, cfg), x, t, cond, base


def shake(roles, role, seed=0):
    p = roles.flat[role]
    p.data += 0.3 * torch.randn(p.shape, generator=rng(seed))


def test_three_roles_on_one_base(cache):
    """DEPARTURE 15: both adapters begin as the teacher; training one moves no other role."""
    roles, x, t, cond, base = tiny_roles(cache)
    look = torch.no_grad()(lambda role: roles.velocity(role, x, t, cond))
    assert all(torch.equal(look(role), base) for role in ("generator", "fake", "teacher"))        # B = 0
    shake(roles, "generator")
    fake = look("fake")
    generator = look("generator")
    assert torch.equal(look("teacher"), base) and torch.equal(fake, base) and not torch.equal(generator, base)
    shake(roles, "fake", 1)
    assert torch.equal(look("teacher"), base) and torch.equal(look("generator"), generator)
    assert not torch.equal(look("fake"), fake)
    for role in ("generator", "fake"):
        assert len(roles.named[role]) == 2 * len(roles.backbone.lora_targets)


@pytest.mark.parametrize("checkpointing, compiled", [(False, False), (True, False), (True, True)])
def test_gradients_survive_the_other_roles(cache, checkpointing, compiled, monkeypatch):
    """A teacher and a fake pass between the generator's forward and backward change no bit of its gradient."""
    compile_net, gradients = nn.Module.compile, []              # aot_eager needs no C++ compiler
    monkeypatch.setattr(nn.Module, "compile", lambda net, **how: compile_net(net, backend="aot_eager", **how))
    for between in ((), ("teacher", "fake")):
        roles, x, t, cond, _ = tiny_roles(cache, checkpointing=checkpointing)
        if compiled:
            rtdmd.compile_blocks(roles.nets["generator"])
        roles.nets["generator"].train()                         # diffusers checkpoints whenever gradients are on
        shake(roles, "generator")
        shake(roles, "fake", 1)
        v = roles.velocity("generator", x, t, cond)
        with torch.no_grad():
            for role in between:
                roles.velocity(role, x, t, cond)
        v.square().mean().backward()
        gradients.append(list(roles.parts("generator", roles.flat["generator"].grad).values()))
        assert roles.flat["fake"].grad is None
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert sum(bool(a.any()) for a in gradients[0]) >= len(gradients[0]) - 2    # the last block drops a text query
    if checkpointing:
        plain = tiny_roles(cache)[0]
        shake(plain, "generator")
        plain.velocity("generator", x, t, cond).square().mean().backward()
        pairs = zip(gradients[0], plain.parts("generator", plain.flat["generator"].grad).values())
        assert all(torch.allclose(a, p, rtol=1e-4, atol=1e-7) for a, p in pairs)


def test_everything_that_learns_is_fp32_over_a_bf16_base(small_sd3_world, tmp_path):
    """DEPARTURE 14: adapters, Adam's moments, the average and the checkpoint."""
    common, _ = small_sd3_world
    run = prepared([*common, "--dtype", "bf16", "--out", str(tmp_path), "--iterations", "1"])
    rtdmd.stage1(run)
    teacher = run.roles.nets["teacher"].named_parameters()
    assert {p.dtype for n, p in teacher if "lora" not in n} == {torch.bfloat16}
    learnt = list(run.roles.flat.values())
    states = [state for optimizer in run.optimizers.values() for state in optimizer.state.values()]
    moments = [m for state in states for m in state.values()]
    assert len(moments) == 3 * len(learnt) and {p.dtype for p in [*learnt, *moments, run.ema]} == {torch.float32}
    assert {p.dtype for p in state_of(tmp_path / "stage1").values()} == {torch.float32}


# ---- Numbers that are none

def spoil(name, when, value=math.nan):
    """A function of rtdmd.py whose result is multiplied by value wherever `when()` is true."""
    original = getattr(rtdmd, name)
    return lambda *args, **options: original(*args, **options) * (value if when() else 1.0)


SOURCES = {                 # what the log names: function, which adapter is left alone, stage
    "dm": ("dmd_loss", "generator", 1), "dsm": ("ambient_dsm_loss", "fake", 1),
    "consistency": ("reverse_step", "fake", 1), "reward_attributes": ("rate", "generator", 2),
}


@pytest.mark.parametrize("source, value", [*((source, math.nan) for source in SOURCES), ("dm", math.inf)])
def test_a_number_that_is_none_skips_the_step(source, value, flags, tmp_path, monkeypatch, capfd):
    """nan or inf skips one adapter's update and is counted; the other goes on, no weight is spoilt."""
    name, role, stage = SOURCES[source]
    rows = tmp_path / f"run/stage{stage}/metrics.jsonl"
    in_the_second = lambda: rows.exists() and rows.read_text().count("\n") == 1
    monkeypatch.setattr(rtdmd, name, spoil(name, in_the_second, value))
    states, record = [], rtdmd.record                  # there is no checkpoint of a bad update
    monkeypatch.setattr(rtdmd, "record", lambda run, row: states.append(
        {n: p.clone() for n, p in rtdmd.training_state(run).items()}) or record(run, row))
    rtdmd.main(flags(stage, "--watch", ""))
    text = capfd.readouterr().err
    assert re.search(f"Iteration 2: the {role}'s gradient is not finite .*{source}.* is skipped", text)
    first, second, third = states
    assert names_in(rows.parent) == ["checkpoint-000003", "checkpoint-000001"]
    assert all(p.isfinite().all() for p in third.values())
    for kind, of in (("generator", "generator"), ("ema", "generator"), ("adam.generator.", "generator"),
                     ("fake", "fake"), ("adam.fake.", "fake")):
        moved = lambda a, b: any(not torch.equal(p, b[n]) for n, p in a.items() if n.startswith(kind))
        assert moved(first, second) is (of != role) and moved(second, third), kind
    assert [row["skipped"] for row in rows_of(rows.parent)] == [0, 1, 1]


def nan_on_rank_1(output):
    """Before a run: rank 1's matching loss is nan in the second iteration."""
    rows = output.parents[1] / "run/stage1/metrics.jsonl"
    rtdmd.dmd_loss = spoil("dmd_loss", lambda: rtdmd.dist_info()[0] == 1 and rows.read_text().count("\n") == 1)


def test_all_processes_skip_together(flags, tmp_path):
    """A nan on one rank skips the update on all, or their weights would part."""
    assert finish(start(flags(1), tmp_path / "log", 2, "nan_on_rank_1")) == [0, 0]
    text = (tmp_path / "log/rank-0").read_text()
    assert re.search("Iteration 2: the generator's gradient is not finite .dm.; ", text)
    assert [row["skipped"] for row in rows_of(tmp_path / "run/stage1")] == [0, 1, 1]


@pytest.mark.parametrize("name, stage", [("dmd_loss", 1), ("rate", 2), ("ambient_dsm_loss", 1)])
def test_a_run_without_numbers_stops(name, stage, flags, tmp_path, monkeypatch, capfd):
    """Although the other adapter goes on well in between."""
    monkeypatch.setattr(rtdmd, name, spoil(name, lambda: True))
    argv = flags(stage, "--max_bad_steps", 2, "--watch", "")
    text = refused(capfd, argv, "2 updates of the .* in a row are not finite", code=1)
    assert {"dmd_loss": "(dm)", "rate": "reward_attributes", "ambient_dsm_loss": "(dsm)"}[name] in text


# ---- Checkpoints and resuming

FILES = [rtdmd.LORA_FILE, rtdmd.STATE_FILE]


def cut(path):
    """Halves a file, as a new one: to shorten it in place would kill a thread that has it mapped."""
    rtdmd.write_atomic(path, path.read_bytes()[:path.stat().st_size // 2])


def longer(path):
    with open(path, "ab") as file:
        file.write(b"x")


def seal(folder, edit):
    """Gives edit the facts that lie in a checkpoint's state, to change them in place."""
    path = folder / rtdmd.STATE_FILE
    facts = facts_of(folder)
    edit(facts)
    path.write_bytes(rtdmd.safetensors_bytes(rtdmd.load_file(path), metadata=dict(rtdmd=json.dumps(facts))))


def facts_of(folder):
    """Settings and counters of a checkpoint."""
    with rtdmd.safe_open(folder / rtdmd.STATE_FILE, "pt") as file:
        return json.loads(file.metadata()["rtdmd"])


def names_in(folder):
    """Names of a stage's checkpoints that a run can go on from, newest first."""
    return [path.name for path in rtdmd.list_checkpoints(folder) if (path / "state").exists()]


@pytest.fixture(scope="session")
def four(cache, tmp_path_factory):
    """A stage 1 of four iterations, never stopped."""
    out = tmp_path_factory.mktemp("four")
    rtdmd.main(small_flags(1, cache, None, out, "--iterations", 4))
    return out / "stage1"


def stop_after(monkeypatch, iteration, number=signal.SIGTERM):
    """The run gets a signal while this iteration ends."""
    original = rtdmd.record

    def record(run, row):
        if run.done == iteration:
            os.kill(os.getpid(), number)
        return original(run, row)

    monkeypatch.setattr(rtdmd, "record", record)


@pytest.mark.parametrize("stage, iteration", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_stopped_run_goes_on_bit_for_bit(stage, iteration, flags, tmp_path, monkeypatch):
    """SIGTERM saves, and the same command ends with the bits of a run that was left alone."""
    rtdmd.main(flags(stage, "--out", tmp_path / "whole"))
    stop_after(monkeypatch, iteration)
    rtdmd.main(flags(stage, "--save_every", 50))                    # SIGTERM: returns, having saved
    assert names_in(tmp_path / f"run/stage{stage}") == [f"checkpoint-{iteration:06d}"]
    monkeypatch.undo()
    with open(tmp_path / f"run/stage{stage}/metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "dm": 1.0, "seconds": 1.0}\n{"iteration": 4, "d')     # what a kill leaves
    rtdmd.main(flags(stage))
    same(tmp_path / f"whole/stage{stage}", tmp_path / f"run/stage{stage}")
    state = state_of(tmp_path / f"run/stage{stage}")
    assert {n.split(".")[0] for n in state} == {"generator", "fake", "ema", "adam"}
    assert all(p.dtype == torch.float32 for p in state.values())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, longer, Path.unlink])
def test_a_damaged_newest_checkpoint_is_passed_over(name, damage, begun, four, flags, tmp_path, capfd):
    """Cut, lengthened or lost: it is seen; and the run goes on from the one before, to the same bits."""
    shutil.copytree(begun, tmp_path / "run")
    damage(tmp_path / "run/stage1/checkpoint-000003" / name)
    if (name, damage) != (FILES[1], cut):                                       # one goes on for all of them
        assert rtdmd.find_checkpoint(tmp_path / "run/stage1").name == "checkpoint-000002"
        said = re.search(r"checkpoint-000003 is damaged.*passed over", capfd.readouterr().err)
        assert bool(said) == ((name, damage) != (FILES[1], Path.unlink))       # without a state it is an export
        return
    rtdmd.main(flags(1, "--iterations", 4, "--keep", 1))
    text = capfd.readouterr().err
    assert re.search(r"checkpoint-000003 is damaged.*passed over", text)
    assert "Resumed" in text and "2 iterations are left" in text
    assert bytes_differing(state_of(tmp_path / "run/stage1"), state_of(four)) == 0
    assert names_in(tmp_path / "run/stage1") == ["checkpoint-000004"]


@pytest.mark.parametrize("damage", [cut, longer, Path.unlink])
def test_nothing_is_overwritten_where_all_checkpoints_are_damaged(damage, begun, flags, tmp_path, capfd):
    """To begin again from nothing would delete what may be all that is left; stage 2 does not go back to stage 1."""
    shutil.copytree(begun, tmp_path / "run")
    rtdmd.main(flags(2, "--iterations", 1))
    for folder in (tmp_path / "run").glob("stage*/checkpoint-*"):
        damage(folder / rtdmd.STATE_FILE)
    before = snapshot(tmp_path)
    refused(capfd, flags(1, "--iterations", 9), "All checkpoints at .*stage1 are damaged.*move them away")
    refused(capfd, flags(2, "--iterations", 9), "All checkpoints at .*stage2 are damaged")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_checkpoint_that_cannot_be_read_is_no_damaged_one(number, begun, flags, tmp_path, capfd, monkeypatch):
    """A passing fault of the disk ends the program before anything is written."""
    shutil.copytree(begun, tmp_path / "run")
    before = snapshot(tmp_path)

    def fails(path, *mode):
        if path.name == rtdmd.LORA_FILE:
            raise OSError(number, os.strerror(number), str(path))
        return open(path, *mode)

    monkeypatch.setattr(rtdmd, "open", fails, raising=False)
    refused(capfd, flags(1, "--iterations", 9), re.escape(os.strerror(number)))
    monkeypatch.undo()
    assert snapshot(tmp_path) == before


def test_a_run_is_not_begun_again_over_its_exports(begun, flags, tmp_path, capfd):
    """Checkpoints whose state is gone cannot be resumed, and are all that is left."""
    shutil.copytree(begun, tmp_path / "run")
    for folder in rtdmd.list_checkpoints(tmp_path / "run/stage1"):
        shutil.rmtree(folder / "state")
    refused(capfd, flags(1), "have no state/, and none was touched")


def test_what_made_a_run_is_kept_for_every_start(begun, flags, tmp_path):
    """Code and settings of the first part of a resumed run stay beside those of the second."""
    shutil.copytree(begun, tmp_path / "run")
    folder = tmp_path / "run/stage1"
    (folder / "start-000000/rtdmd.py").write_text("an older version")
    rtdmd.main(flags(1, "--iterations", 4))
    assert (folder / "start-000000/rtdmd.py").read_text() == "an older version"
    for name in ("rtdmd.py", "eval.py"):
        assert (folder / "start-000003" / name).read_bytes() == Path(rtdmd.__file__).with_name(name).read_bytes()
    first, second, latest = (json.loads((folder / name).read_text())["config"]["iterations"]
                             for name in ("start-000000/run.json", "start-000003/run.json", "run.json"))
    assert (first, second, latest) == (3, 4, 4)


def test_an_export_is_sampled_although_its_state_is_half_gone(begun, tmp_path):
    """NFS may leave an empty state/, which is nothing to check; and a stray file with a checkpoint's name is none."""
    shutil.copytree(begun / "stage1/checkpoint-000002", folder := tmp_path / "stage1/checkpoint-000002")
    (folder / rtdmd.STATE_FILE).unlink()
    assert ev.checkpoint_at(folder) == folder
    written(tmp_path / "stage1", "checkpoint-000009", "x")
    shutil.copytree(begun / "stage1/checkpoint-000001", tmp_path / "stage1/checkpoint-000001")
    assert rtdmd.find_checkpoint(tmp_path / "stage1").name == "checkpoint-000001"


def test_a_million_iterations_and_copies(tmp_path):
    """Checkpoints are sorted by number, not by letter; a copy under another name is none."""
    for name in ("checkpoint-999950", "checkpoint-1000000", "checkpoint-000050", "checkpoint-best", "checkpoint-7"):
        (tmp_path / name / "state").mkdir(parents=True)
    assert names_in(tmp_path) == ["checkpoint-1000000", "checkpoint-999950", "checkpoint-000050"]


def test_a_run_that_diverges_keeps_its_good_checkpoints(flags, tmp_path, monkeypatch, capfd):
    """No save while updates are not finite: with --keep 2 they would have pushed the good ones out."""
    monkeypatch.setattr(rtdmd, "dmd_loss", spoil("dmd_loss", lambda: len(rows_of(tmp_path / "run/stage1")) >= 2))
    argv = flags(1, "--iterations", 5, "--save_every", 1, "--max_bad_steps", 9)
    refused(capfd, argv, "not finite.*no checkpoint is saved", code=1)
    assert names_in(tmp_path / "run/stage1") == ["checkpoint-000002", "checkpoint-000001"]
    assert len(rows_of(tmp_path / "run/stage1")) == 5


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newer_one_does_not_push_out_the_whole_one(name, begun, flags, tmp_path, monkeypatch):
    """--keep 1, and the run ends before it reaches the damaged number again."""
    shutil.copytree(begun, tmp_path / "run")
    cut(tmp_path / "run/stage1/checkpoint-000003" / name)
    shutil.rmtree(tmp_path / "run/stage1/checkpoint-000002")
    stop_after(monkeypatch, 2)
    rtdmd.main(flags(1, "--keep", 1))
    assert rtdmd.find_checkpoint(tmp_path / "run/stage1").name == "checkpoint-000002"


def test_checkpoints_are_kept_by_number(flags, tmp_path):
    """--keep leaves the newest, nothing half written, and the exports of all; a folder of another name is none."""
    rtdmd.main(flags(1, "--iterations", 5, "--keep", 2))
    (tmp_path / "run/stage1/checkpoint-best").mkdir()
    exports = [path for path in rtdmd.list_checkpoints(tmp_path / "run/stage1") if (path / rtdmd.LORA_FILE).exists()]
    assert [ev.iteration_of(path) for path in exports] == [5, 4, 3, 2, 1]
    assert ev.checkpoint_at(exports[-1]) == exports[-1]
    assert names_in(tmp_path / "run/stage1") == ["checkpoint-000005", "checkpoint-000004"]
    assert not [p for p in tmp_path.rglob("*.partial")]


def test_a_changed_setting_is_refused_with_the_differences(begun, flags, tmp_path, capfd):
    """One sentence, nothing written; --force_resume goes on all the same."""
    shutil.copytree(begun, tmp_path / "run")
    before = snapshot(tmp_path)
    text = refused(capfd, flags(1, "--gamma", .5, "--lr", 1e-4, "--keep", 3), "other settings")
    assert "gamma 0.01 -> 0.5; " in text and "lr 0.001 -> 0.0001)" in text and "keep" not in text
    prompts = written(tmp_path, "p.txt", "a red circle\n")
    refused(capfd, flags(1, "--prompts", prompts), "prompts '24 prompts, .*' -> '1 prompts")
    assert before == {n: v for n, v in snapshot(tmp_path).items() if n != "p.txt"}
    rtdmd.main(flags(1, "--gamma", .5, "--force_resume", "--iterations", 4))
    assert rows_of(tmp_path / "run/stage1")[-1]["iteration"] == 4


def test_settings_of_the_other_stage_may_change(begun, flags, tmp_path, capfd):
    """One command line for both stages, in which only what the running stage reads must stay as it was."""
    shutil.copytree(begun, tmp_path / "run")
    others = ("--beta", 2, "--rewards", "strict=1", "--groups", 2, "--det_weight", 3, "--clip", .1)
    rtdmd.main(flags(1, "--iterations", 4, *others))
    assert rows_of(tmp_path / "run/stage1")[-1]["iteration"] == 4
    rtdmd.main(flags(2, "--iterations", 1, "--init", tmp_path / "run/stage1"))
    refused(capfd, flags(2, "--init", tmp_path / "run/stage1", "--beta", 2), "beta 1.0 -> 2.0")
    rtdmd.main(flags(2, "--iterations", 2, "--init", tmp_path / "run/stage1", "--batch", 16))
    assert rows_of(tmp_path / "run/stage2")[-1]["iteration"] == 2


def test_a_checkpoint_of_another_version(begun, flags, tmp_path, capfd):
    """Whole, and yet without what is asked for."""
    shutil.copytree(begun, tmp_path / "run")
    folder = tmp_path / "run/stage1/checkpoint-000003"
    for name in ("iteration", "prompts", "config"):
        seal(folder, lambda facts: facts.pop(name))
        refused(capfd, flags(1, "--force_resume"), f"checkpoint-000003 is not of this version: .*{name}")
    tensors = rtdmd.load_file(folder / rtdmd.STATE_FILE)
    for facts in (None, dict(rtdmd="[1]"), dict(other="x")):
        (folder / rtdmd.STATE_FILE).write_bytes(rtdmd.safetensors_bytes(tensors, metadata=facts))
        refused(capfd, flags(1), "checkpoint-000003 is not of this version")


def test_stage_2_resumes_without_stage_1(begun, flags, tmp_path):
    """A checkpoint of stage 2 is whole by itself."""
    shutil.copytree(begun, tmp_path / "init")
    rtdmd.main([*flags(2), "--init", str(tmp_path / "init/stage1"), "--iterations", "1"])
    shutil.rmtree(tmp_path / "init")
    rtdmd.main([*flags(2), "--init", str(tmp_path / "init/stage1"), "--iterations", "2"])
    assert rows_of(tmp_path / "run/stage2")[-1]["iteration"] == 2


# ---- Faults

def wait_for(path, processes=(), words="", limit=300):
    """Until a file holds something, or these words."""
    end = time.monotonic() + limit
    while not (path.exists() and path.stat().st_size and words in path.read_text()):
        assert time.monotonic() < end and all(p.is_alive() for p in processes), f"no {path}"
        time.sleep(0.02)


def slow(output, seconds=0.25):
    """Before a run: iterations take a while."""
    original = rtdmd.record

    def record(run, row):
        text = original(run, row)
        time.sleep(seconds)
        return text

    rtdmd.record = record


def very_slow(output):
    slow(output, 60)


def test_two_runs_on_one_folder(flags, tmp_path, capfd):
    """The second is refused for as long as the first holds the lock, which goes with main."""
    with rtdmd.claim(rtdmd.resolve(rtdmd.parse_flags(flags(1)))):
        refused(capfd, flags(1), "Another run writes to")
    for iterations in (1, 2):
        rtdmd.main(flags(1, "--iterations", iterations))
    assert len(rows_of(tmp_path / "run/stage1")) == 2


@pytest.mark.parametrize("numbers, world", [([signal.SIGTERM], 1), ([signal.SIGINT], 1), ([signal.SIGTERM] * 2, 1),
                                            ([signal.SIGTERM], 2)])
def test_a_signal_ends_the_run_with_a_checkpoint(numbers, world, flags, tmp_path):
    """A second SIGTERM changes nothing: a cluster signals everybody, and torchrun passes it on."""
    folder = tmp_path / "run/stage1"
    processes = start(flags(1, "--iterations", 100, "--save_every", 100), tmp_path / "log", world, "slow")
    wait_for(folder / "metrics.jsonl", processes)
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):        # it may have ended before the second signal
            os.kill(processes[-1].pid, number)               # of two processes the second alone: both end together
        if world == 1:
            wait_for(tmp_path / "log/rank-0", words="Stopping after this iteration")
    assert finish(processes) == [0] * world
    rows = rows_of(folder)
    assert rtdmd.find_checkpoint(folder).name == f"checkpoint-{len(rows):06d}" and len(rows) < 100
    assert "Stopped by a signal" in (tmp_path / "log/rank-0").read_text()


def test_a_second_interrupt_ends_at_once(flags, tmp_path):
    """Ctrl-C twice does not wait for the iteration to end."""
    processes = start(flags(1), tmp_path / "log", before="very_slow")
    wait_for(tmp_path / "run/stage1/metrics.jsonl", processes)
    os.kill(processes[0].pid, signal.SIGINT)
    wait_for(tmp_path / "log/rank-0", processes, "Stopping after this iteration")
    time.sleep(0.1)                                          # until the handler is through
    os.kill(processes[0].pid, signal.SIGINT)
    assert finish(processes) == [-signal.SIGINT]             # 0, a minute later, if it had waited


def die_in_the_second(output):
    """Before a run: rank 1 is killed in its second iteration, unless it was before."""
    original, marker = rtdmd.optimizer_step, output.with_suffix(".died")

    def optimizer_step(run, role):
        original(run, role)
        if role == "generator" and run.done == 1 and rtdmd.dist_info()[0] == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    rtdmd.optimizer_step = optimizer_step


def test_one_rank_that_dies_ends_the_others(flags, tmp_path):
    """None waits for ever, and a restart goes on from the last checkpoint."""
    codes = finish(start(flags(1), tmp_path / "log", 2, "die_in_the_second"))
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    assert rtdmd.find_checkpoint(tmp_path / "run/stage1").name == "checkpoint-000001"
    assert finish(start(flags(1), tmp_path / "log", 2)) == [0, 0]                    # what torchrun's restart does
    assert len(rows_of(tmp_path / "run/stage1")) == 3


@contextlib.contextmanager
def quota(size):
    """No file may grow beyond size bytes: writes fail as on a full disk."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def test_a_full_disk(flags, tmp_path, capfd):
    """What was saved stays as it was; with room again the run ends with the same bits."""
    rtdmd.main(flags(1, "--sample_every", 1, "--out", tmp_path / "whole"))
    rtdmd.main(flags(1, "--sample_every", 1, "--iterations", 1))
    kept = tmp_path / "run/stage1/checkpoint-000001"
    assert (kept / FILES[1]).stat().st_size > 260_000 > Path(rtdmd.__file__).stat().st_size > 60_000
    before = snapshot(kept)
    for size in (60_000, 260_000):                           # too small for the copy of the source, for the checkpoint
        with quota(size):
            refused(capfd, flags(1, "--sample_every", 1), "Cannot write .*: make room")
        assert before == snapshot(kept) and rtdmd.list_checkpoints(tmp_path / "run/stage1") == [kept]
        assert not [p for p in tmp_path.rglob(".*.partial") if p.is_file()]
    rtdmd.main(flags(1, "--sample_every", 1))
    same(tmp_path / "whole/stage1", tmp_path / "run/stage1")


def test_folders_that_cannot_be_written(flags, tmp_path, capfd, monkeypatch):
    """A file in the way, too long a name, no permission: one sentence, and nothing left behind."""
    file = Path(written(tmp_path, "file", "x"))
    refused(capfd, flags(1, "--out", file / "run"), "Not a directory: .*run.*choose another folder")
    refused(capfd, flags(1, "--out", "/proc/run"), "/proc/run")
    refused(capfd, flags(1, "--out", tmp_path / ("x" * 300)), "File name too long")
    refused(capfd, flags(1, "--cache", file), "File exists: .*file.*choose another folder")

    def read_only(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)               # root may write anywhere, so the refusal is played
    refused(capfd, flags(1), "Permission denied: .*run.*choose another folder")
    file.unlink()
    assert nothing_in(tmp_path)


def test_truncated_caches(cache, flags, tmp_path, capfd):
    """A text embedding is made anew; a tiny world takes minutes, so its owner decides."""
    shutil.copytree(cache, tmp_path / "cache", ignore=shutil.ignore_patterns("text"))   # of other tests' prompts
    rtdmd.main(flags(1, "--cache", tmp_path / "cache", "--sample_every", 1, "--iterations", 1))
    for path in (tmp_path / "cache/text").rglob("*.safetensors"):
        cut(path)
    rtdmd.main(flags(1, "--cache", tmp_path / "cache", "--sample_every", 1))
    rtdmd.main(flags(1, "--sample_every", 1, "--out", tmp_path / "whole"))
    same(tmp_path / "run/stage1", tmp_path / "whole/stage1")
    teacher = tmp_path / "cache/tiny-1.safetensors"
    whole = {n: x.clone() for n, x in rtdmd.load_file(teacher).items()}
    for value in (0, 1):                         # all zeros, or one nan: a whole file that no training leaves behind
        spoilt = {n: x * value for n, x in whole.items()}
        if value:
            spoilt["net.proj_out.weight"][0, 0] = torch.nan
        rtdmd.write_atomic(teacher, rtdmd.safetensors_bytes(spoilt))
        refused(capfd, flags(1, "--cache", tmp_path / "cache"), "tiny-1.safetensors is damaged.*delete")
    cut(teacher)
    refused(capfd, flags(1, "--cache", tmp_path / "cache"), "tiny-1.safetensors is damaged.*delete")


# -----------------------------------------------------------------------------------------------------------------
# 10. Command line
# -----------------------------------------------------------------------------------------------------------------

WRONG = [line.split(" | ") for line in r"""
1 --stage 3 | invalid choice: 3 .choose from 1, 2
1 --stage two | invalid int
1 --stage | expected one argument
1 --model sdxl | --model 'sdxl' is unknown: take one of tiny
1 --model | expected one argument
1 --iteration 3 | unrecognized arguments
1 --leraning_rate 3 | unrecognized arguments
1 extra | unrecognized arguments: extra
1 --seed 1.5 | invalid int
1 --seed -1 | at least 0
1 --lora_rank 1000000000000000000000000000000 | at most 4096
1 --batch 1000000000000000000000000000000 | at most 1000000
1 --fake_updates 1000000000000000000000000000000 | at most 10000
2 --groups 1000000000000000000000000000000 | at most 100000
1 --keep 1000000000000000000000000000000 | at most 1000000000
1 --lr 1e300 | at most 1000000
1 --text_length 100000 | at most 10000
1 --iterations -5 | at least 1
1 --eta 1.5 | at most 1
1 --eta -.1 | at least 0
1 --eta nan | at least 0 and at most
1 --gamma inf | at least 0 and at most
1 --gamma -1 | at least 0
1 --lr -1 | at least 0
1 --lr fast | invalid float
1 --lr_fake nan | at least 0 and at most
1 --grad_clip 0 | above 0
1 --clip 0 | above 0
1 --delta 0 | above 0
1 --delta 2 | at most 1
1 --consistency_share 0 | above 0
1 --consistency_share 2 | at most 1
1 --steps 1001 | at most 1000
2 --group_size 10001 --watch nonsense | at most 10000
2 --inner_epochs 10001 --watch nonsense | at most 10000
1 --resolution 100001 | at most 100000
1 --ema 1.01 | at most 1
1 --steps 1 | at least 2
1 --batch 7 | multiple of --steps
1 --batch 0 | at least 1
1 --fake_updates -1 | at least 1
1 --micro_batch -1 | at least 0
1 --keep 0 | at least 1
1 --save_every 0 | at least 1
1 --sample_every 0 | at least 1
1 --max_bad_steps 0 | at least 1
1 --max_prompts 0 | at least 1
1 --lora_rank 0 | at least 1
1 --lora_alpha 0 | at least 1
1 --resolution 0 | at least 8
1 --weight_decay -.1 | at least 0
1 --guidance nan | at least 0 and at most
1 --dtype fp16 | invalid choice
1 --device tpu | --device tpu: take cpu, or cuda
1 --device meta | --device meta: take cpu, or cuda
1 --renoise yes | unrecognized arguments
1 --watch nonsense | --watch 'nonsense' is unknown: take one of
1 --rewards nonsense | --rewards 'nonsense' is unknown: take one of
2 --rewards no_such_module:score | No module
2 --group_size 1 | at least 2
2 --groups 0 | at least 1
2 --subset_size 0 | at least 1
2 --subset_size 4 | only 3
2 --std_floor -1 | at least 0
2 --inner_epochs 0 | at least 1
2 --eta 0 | no stochastic step
2 --policy_weight 0 --det_weight 0 --dm_weight 0 | leaves nothing to train
2 --beta 0 --dm_weight 0 | leaves nothing to train
2 --policy_weight 0 --dm_weight 0 --rewards strict=1 | No reward is differentiable
2 --lora_rank 8 | lora_rank 4 -> 8
2 --lora_alpha 8 | lora_alpha 4 -> 8
2 --init TMP/nothing | No stage-1 checkpoint
2 --init TMP/file | No stage-1 checkpoint
2 --init TMP/cut/checkpoint-000003 | All checkpoints at .* are damaged
2 --init TMP/other | model 'sd3m' -> 'tiny'
2 --init TMP/bare | not of this version
1 --out TMP/file/run | Not a directory
1 --prompts TMP/nothing.txt | nothing.txt is no file: give one
1 --prompts TMP | is no file: give one
1 --prompts TMP/long.txt | up to 20,000
1 --prompts TMP/sentence.txt | tiny world (does not know|cannot draw)
1 --out= | must name a folder
1 --cache= | must name a folder
1 --resolution 64 | 24 pixels and its own teacher
1 --pretrained TMP/nothing | 24 pixels and its own teacher
1 --device cuda:1 | take cpu, or cuda with a GPU .*CUDA_VISIBLE_DEVICES
1 SD3 --pretrained TMP/nothing | not on the hub
1 SD3 --pretrained TMP/cut | has no model_index.json
""".strip().splitlines()]


@pytest.fixture(scope="session")
def wrong_files(begun, tmp_path_factory):
    root = tmp_path_factory.mktemp("wrong")
    contents = {"file": "x", "good.txt": "a cat\n", "long.txt": "x" * 1_000_000, "sentence.txt": "a cat\n"}
    for name, content in contents.items():
        written(root, name, content)
    shutil.copytree(begun / "stage1", root / "cut")
    cut(root / "cut/checkpoint-000003" / FILES[1])
    for name, edit in (("other", lambda saved: saved["config"].update(model="sd3m")), ("bare", dict.clear)):
        folder = root / name / "checkpoint-000003"
        shutil.copytree(begun / "stage1/checkpoint-000003", folder)
        seal(folder, edit)
    return root


@pytest.mark.parametrize("line, words", WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_is_one_sentence(line, words, flags, wrong_files, cache, tmp_path, capfd):
    """Exit code 2 and the remedy; no file is written or changed."""
    sd3 = f"--model sd3m --resolution 64 --prompts TMP/good.txt --rewards {Path(__file__).stem}:mean_colour"
    stage, *more = line.replace("SD3", sd3).replace("TMP", str(wrong_files)).split()
    before = stamps(wrong_files), stamps(cache)
    refused(capfd, flags(int(stage), *more), words)
    assert before == (stamps(wrong_files), stamps(cache)) and nothing_in(tmp_path)


def test_other_wrong_input(flags, tmp_path, capfd, monkeypatch):
    """The same for no stage 1 at all, empty values, no GPU and groups that do not split."""
    argv = ["--stage", "2", "--device", "cpu", "--out", str(tmp_path / "none")]
    refused(capfd, argv, "No stage-1 checkpoint at .*none/stage1")
    refused(capfd, flags(2, "--rewards", ""), "write name=weight|no name")
    refused(capfd, flags(1, "--prompts", ""), "--prompts  is no file: give one")
    if not torch.cuda.is_available():
        refused(capfd, flags(1, "--device", "cuda"), "a GPU for each process; PyTorch sees 0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(capfd, flags(1), "the processes cannot meet: .*; start them with torchrun")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("RANK", "0")
    for port in ("", "http", "65536"):
        monkeypatch.setenv("MASTER_PORT", port)
        refused(capfd, flags(1), "the processes cannot meet")
    refused(capfd, flags(2), "--groups 4 does not split over 3 processes: take 6")
    refused(capfd, flags(1, "--device", "cuda:0"), "--device cuda:0: take cpu, or cuda")  # all on one GPU
    for name, value in (("RANK", "x"), ("RANK", "3"), ("RANK", "-1"), ("WORLD_SIZE", ""), ("WORLD_SIZE", "0"),
                        ("LOCAL_RANK", "x")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            refused(capfd, flags(1), "RANK, LOCAL_RANK or WORLD_SIZE is not torchrun's")
    assert nothing_in(tmp_path)


def test_what_is_found_by_name(tmp_path, monkeypatch):
    """A backbone, a reward, prompts: in the current folder too. The running program is found under its own name."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "found_here.py", "import rtdmd\nthing = rtdmd.UsageError\ntexts = ['a cat', ' a dog ', 'a cat']")
    assert rtdmd.find_named("found_here:thing", "reward") is rtdmd.UsageError
    assert rtdmd.read_prompts("found_here:texts") == ["a cat", "a dog"]
    assert rtdmd.read_prompts("eval:tiny_test_captions") == ev.tiny_captions(held_out=True)
    for name in ("found_here:nothing", "no_such_module:x", "found_here:", ":x", "json:"):
        with pytest.raises(rtdmd.UsageError, match="correct it, or put"):
            rtdmd.find_named(name, "reward")
    written(tmp_path, "lazily.py", "nothing = None\ndef texts():\n    yield 'a cat'\n    import no_such_module")
    with pytest.raises(rtdmd.UsageError, match="row 2: .*No module named 'no_such_module'.*; correct it"):
        rtdmd.read_prompts("lazily:texts")
    with pytest.raises(rtdmd.UsageError, match="lazily:nothing cannot be loaded: .*must be callable"):
        rtdmd.load_reward("lazily:nothing", settings())
    program = SimpleNamespace(__file__=str(tmp_path / "someprogram.py"), marker=7)
    monkeypatch.setitem(sys.modules, "__main__", program)
    assert rtdmd.find_named("someprogram:marker", "reward") == 7
    sys.modules.pop("someprogram")


@pytest.mark.parametrize("line, words", [
    ("--steps 4", "bash train.sh sd3m 8"), ("tiny 0", "bash train.sh sd3m 8"),
    ("tiny 1 --out x", "--out is not for both"), ("tiny 1 --stage=2", "--stage=2 is not for both"),
    ("tiny 1 --subset_size 9", "only 3 stochastic steps"),
    ("sd3m 7", "--groups 48 does not split over 7 processes")])
def test_train_sh_refuses_before_it_trains(line, words):
    """What stage 2 would refuse after hours of stage 1, and what does not fit both stages."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", Path(rtdmd.__file__).with_name("train.sh"), *line.split()], text=True,
                          env=os.environ | dict(PATH=path, VIRTUAL_ENV="active"), capture_output=True)
    assert done.returncode and words in done.stderr and "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize("options", [rtdmd.Config, ev.Flags])
def test_torchrun_does_not_swallow_a_flag(options):
    """torchrun takes a script's flag for an abbreviation of its own if it can: --run was its --run-path."""
    from torch.distributed.run import get_args_parser
    theirs = [name for action in get_args_parser()._actions for name in action.option_strings]
    ours = [f"--{field.name}" for field in dataclasses.fields(options)]
    assert not [(a, b) for a in ours for b in theirs if b.startswith(a)]


# -----------------------------------------------------------------------------------------------------------------
# eval.py: metrics
# -----------------------------------------------------------------------------------------------------------------

# ---- Names, files, the table

def test_metric_table_is_complete():
    """Every metric of the paper's tables with its column, scale, licence and repository."""
    assert list(ev.METRICS) == ["clipscore", "aesthetic", "pickscore", "hpsv2", "imagereward", "hpsv3",
                                "geneval", "geneval2", "ocr"]
    for name, row in ev.METRICS.items():
        assert {"column", "scale", "licence", "repo"} <= set(row), name
        if isinstance(scorer := rtdmd.REWARDS[name], str):
            scorer = rtdmd.find_named("eval:GenEval" if name == "geneval" else scorer, "reward")
            assert scorer.name == name and scorer.differentiable == (name in ("aesthetic", "imagereward"))
    with pytest.raises(rtdmd.UsageError, match="clip"):
        ev.load_metric("clip", settings())


def test_parse_rewards():
    """name=weight,... with 1 as the weight that is not named; negative ones and user's modules."""
    assert rtdmd.parse_rewards("hpsv2=1, clipscore=.5,torch:dot=2,pickscore", ()) == [
        ("hpsv2", 1.), ("clipscore", .5), ("torch:dot", 2.), ("pickscore", 1.)]
    assert rtdmd.parse_rewards("judge=-1e-1", own={"judge": None}) == [("judge", -.1)]


@pytest.mark.parametrize("text, words", [
    ("", "write name=weight"), ("hpsv2=1,", "write name=weight"), ("=2", "write name=weight"),
    ("hpsv2=x", "hpsv2=x"), ("hpsv2=", "finite"), ("hpsv2=1,hpsv2=2", "twice"), ("hpsv2=0", "other than 0"),
    ("hpsv2=nan", "finite"), ("hpsv2=inf", "finite"), ("hpsv9=1", "hpsv9.*hpsv2"),
    ("no_such_module:score", "no_such_module"), ("torch:no_such_score", "no_such_score")])
def test_parse_rewards_complains(text, words):
    """Each mistake in --rewards has its own words."""
    with pytest.raises(rtdmd.UsageError, match=words):
        rtdmd.parse_rewards(text)


def test_missing_files_are_one_sentence(tmp_path):
    """It names the file, where it was looked for, and --weights_dir."""
    cfg = settings(tmp_path)
    missing = {"hpsv2": "HPS_v2.1_compressed.pt", "imagereward": "ImageReward.pt", "hpsv3": "hpsv3",
               "aesthetic": "model.safetensors", "clipscore": "config.json", "pickscore": "config.json",
               "geneval": "config.json", "geneval2": "config.json", "ocr": "preprocessor_config.json"}
    assert set(missing) == set(ev.METRICS)
    for name, file in missing.items():
        with pytest.raises(rtdmd.UsageError) as caught:
            ev.load_metric(name, cfg)
        text = str(caught.value)
        assert file in text and str(tmp_path) in text and "weights_dir" in text and "\n" not in text, text


def load(name, folder, prompts=None):
    return ev.load_metric(name, settings(folder, prompts))


# ---- Aesthetic

def head_state(prefix):
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    return {f"{prefix}{i}.{part}": torch.randn(shape if part == "weight" else shape[:1]) * .1
            for i, shape in sizes.items() for part in ("weight", "bias")}


def test_aesthetic_is_affine_in_the_unit_embedding():
    """Against its five layers written out; a head that lacks a bias is refused."""
    clip = clip_net(768).eval()
    state = head_state("layers.")
    scorer = ev.Aesthetic(clip, ev.score_head(state, "layers."))
    images = torch.rand(2, 3, 50, 40)
    with torch.no_grad():
        text = dict(input_ids=torch.tensor([[1, 63]]))
        e = clip(pixel_values=rtdmd.square_crop(images), **text).image_embeds     # transformers: of unit length
        for i in (0, 2, 4, 6, 7):
            e = e @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
        torch.testing.assert_close(scorer(images), e[:, 0], atol=1e-5, rtol=1e-5)
    del state["layers.4.bias"]
    with pytest.raises(RuntimeError, match="4.bias"):
        ev.score_head(state, "layers.")


def test_load_aesthetic(tmp_path):
    """From the hub copy's safetensors and from LAION's own file: the same scores."""
    from safetensors.torch import save_file
    clip_net(768).save_pretrained(tmp_path / "clip-vit-large-patch14")
    state = head_state("layers.")
    (tmp_path / "sac-logos-ava1-l14-linearMSE").mkdir()
    save_file(state, tmp_path / "sac-logos-ava1-l14-linearMSE" / "model.safetensors")
    images = torch.rand(2, 3, 30, 30)
    scores = load("aesthetic", tmp_path)(images)
    (tmp_path / "sac-logos-ava1-l14-linearMSE" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    assert torch.equal(scores, load("aesthetic", tmp_path)(images))


# ---- ImageReward

VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(vocab_size=50, hidden_size=768, intermediate_size=32, num_hidden_layers=2)


def imagereward_state():
    """ImageReward.pt at small size: the original's names (timm's ViT, BLIP's med.py) and random values."""
    torch.manual_seed(0)
    shapes = {"visual_encoder.cls_token": (1, 1, 32), "visual_encoder.pos_embed": (1, 197, 32),
              "visual_encoder.patch_embed.proj.weight": (32, 3, 16, 16),
              "visual_encoder.patch_embed.proj.bias": (32,),
              "text_encoder.embeddings.word_embeddings.weight": (50, 768),
              "text_encoder.embeddings.position_embeddings.weight": (512, 768),
              "vision_proj.weight": (8, 32), "text_proj.weight": (8, 768)}   # the last two: to be left out

    def linear(name, out, into):
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    norm("visual_encoder.norm", 32)
    norm("text_encoder.embeddings.LayerNorm", 768)
    parts = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc1": (64, 32), "mlp.fc2": (32, 64)}
    for i in range(2):
        block = f"visual_encoder.blocks.{i}"
        for part, size in parts.items():
            linear(f"{block}.{part}", *size)
        norm(f"{block}.norm1", 32)
        norm(f"{block}.norm2", 32)
        layer = f"text_encoder.encoder.layer.{i}"
        for way, width in (("attention", 768), ("crossattention", 32)):
            for part, into in (("query", 768), ("key", width), ("value", width)):
                linear(f"{layer}.{way}.self.{part}", 768, into)
            linear(f"{layer}.{way}.output.dense", 768, 768)
            norm(f"{layer}.{way}.output.LayerNorm", 768)
        linear(f"{layer}.intermediate.dense", 32, 768)
        linear(f"{layer}.output.dense", 768, 32)
        norm(f"{layer}.output.LayerNorm", 768)
    state = {f"blip.{name}": torch.randn(shape) * (.05 if name.startswith("text") else .2)
             for name, shape in shapes.items()}
    state.update({name: 1 + tensor for name, tensor in state.items() if name.lower().endswith("norm.weight")})
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return {**state, **head_state("mlp.layers.")}


class LetterTokenizer:
    """Stands for BERT's: [CLS] is 1, a letter a token, padded with 0 to max_length."""

    def __call__(self, prompts, padding, max_length, truncation, return_tensors):
        from transformers import BatchEncoding
        ids = [([1] + [2 + ord(c) % 40 for c in p])[:max_length] for p in prompts]
        full = torch.tensor([i + [0] * (max_length - len(i)) for i in ids])
        return BatchEncoding({"input_ids": full, "attention_mask": (full > 0).long()})


def test_imagereward_loads_the_originals_names_strictly():
    """Each tensor finds its place; one too few or too many is refused."""
    state = imagereward_state()
    vision, text, head = ev.ImageReward.networks(state, VISION, TEXT)
    ours = vision.encoder.layers[1].self_attn.projection.weight
    assert torch.equal(ours, state["blip.visual_encoder.blocks.1.attn.proj.weight"])
    assert torch.equal(vision.post_layernorm.weight, state["blip.visual_encoder.norm.weight"])
    assert torch.equal(head[7].weight, state["mlp.layers.7.weight"])
    assert vision.post_layernorm.eps == 1e-6 and text.config.num_attention_heads == 12
    for name in ("visual_encoder.norm.weight", "text_encoder.encoder.layer.1.crossattention.self.key.bias"):
        lacking = {k: v for k, v in state.items() if k != f"blip.{name}"}
        with pytest.raises(RuntimeError, match="Missing key"):
            ev.ImageReward.networks(lacking, VISION, TEXT)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ev.ImageReward.networks({**state, "blip.text_encoder.surprise": torch.zeros(1)}, VISION, TEXT)


def slow_vit(state, pixels):
    """timm's ViT forward from ImageReward's own names: what vision.last_hidden_state must be."""
    def get(name):
        return state["blip.visual_encoder." + name]

    def norm(x, name):
        return F.layer_norm(x, (32,), get(name + ".weight"), get(name + ".bias"), 1e-6)

    x = F.conv2d(pixels, get("patch_embed.proj.weight"), get("patch_embed.proj.bias"), stride=16)
    x = x.flatten(2).mT
    x = torch.cat([get("cls_token").expand(len(x), -1, -1), x], 1) + get("pos_embed")
    for i in range(2):
        b = f"blocks.{i}."
        qkv = F.linear(norm(x, b + "norm1"), get(b + "attn.qkv.weight"), get(b + "attn.qkv.bias"))
        q, k, v = qkv.view(len(x), 197, 3, 2, 16).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, get(b + "attn.proj.weight"), get(b + "attn.proj.bias"))
        inner = F.gelu(F.linear(norm(x, b + "norm2"), get(b + "mlp.fc1.weight"), get(b + "mlp.fc1.bias")))
        x = x + F.linear(inner, get(b + "mlp.fc2.weight"), get(b + "mlp.fc2.bias"))
    return norm(x, "norm")


def test_imagereward_scores():
    """Against the vision network written out; text padding is not seen, gradients reach the pixels."""
    state = imagereward_state()
    vision, text, head = (net.eval() for net in ev.ImageReward.networks(state, VISION, TEXT))
    scorer = ev.ImageReward(vision, text, head, LetterTokenizer())
    images = torch.rand(2, 3, 60, 50, requires_grad=True)
    scores = scorer(images, ["a cat", "a very long prompt"])
    assert (scores[0] - scores[1]).abs() > .01   # the random networks do tell prompts apart
    assert scores.shape == (2,) and torch.autograd.grad(scores.sum(), images)[0].abs().sum() > 0
    with torch.no_grad():
        seen = slow_vit(state, rtdmd.square_crop(images))
        ours = vision(pixel_values=rtdmd.square_crop(images)).last_hidden_state
        torch.testing.assert_close(ours, seen, atol=1e-4, rtol=1e-4)
        words = torch.tensor([[1] + [2 + ord(c) % 40 for c in "a cat"]])
        read = text(input_ids=words, encoder_hidden_states=seen[:1])
        by_hand = (head(read.last_hidden_state[:, 0]) - .16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(scores[:1], by_hand[:, 0], atol=1e-4, rtol=1e-4)


def test_load_imagereward(tmp_path, monkeypatch):
    """From ImageReward.pt and BERT's words: lower case, [CLS] first, a long prompt cut."""
    from transformers import BertTokenizer
    networks = ev.ImageReward.networks
    monkeypatch.setattr(ev.ImageReward, "networks", staticmethod(lambda state: networks(state, VISION, TEXT)))
    (tmp_path / "ImageReward").mkdir()
    torch.save(imagereward_state(), tmp_path / "ImageReward" / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox"]
    BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(tmp_path / "bert-base-uncased")
    scorer = load("imagereward", tmp_path)
    assert scorer.tokenizer("A red fox")["input_ids"] == [2, 5, 6, 7, 3]      # lower case, [CLS] first
    assert scorer(torch.rand(2, 3, 30, 30), ["a red fox", "a fox " * 40]).isfinite().all()


# ---- HPSv3

def tiny_qwen2(vocabulary=60, image=5):
    from transformers import Qwen2VLConfig
    text = dict(vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4})
    vision = dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2)
    return Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=image, video_token_id=6,
                         vision_start_token_id=7, vision_end_token_id=8)


def hpsv3_state(config):
    """HPSv3.safetensors at small size: transformers 4.45's names, and one token more than the base has."""
    from transformers import Qwen2VLModel
    torch.manual_seed(0)
    config.text_config.vocab_size += 1
    state = {k.replace("language_model.", "model."): torch.randn(v.shape) * .4
             for k, v in Qwen2VLModel(config).state_dict().items()}
    for i, (out, into) in {0: (1024, 32), 3: (16, 1024), 5: (2, 16)}.items():
        state[f"rm_head.{i}.weight"] = torch.randn(out, into) * .1
        state[f"rm_head.{i}.bias"] = torch.randn(out)
    config.text_config.vocab_size -= 1
    return {**state, "lm_head.weight": torch.randn(config.text_config.vocab_size + 1, 32)}


def test_hpsv3_loads_the_originals_names_strictly():
    """Each tensor finds its place; one too few or too many is refused."""
    config, state = tiny_qwen2(), hpsv3_state(tiny_qwen2())
    net, head = ev.HPSv3.networks(dict(state), config, torch.float32)
    assert torch.equal(net.language_model.embed_tokens.weight, state["model.embed_tokens.weight"])   # 61 rows
    assert torch.equal(net.visual.blocks[0].attn.qkv.weight, state["visual.blocks.0.attn.qkv.weight"])
    assert torch.equal(head[5].weight, state["rm_head.5.weight"]) and head[0].weight.dtype == torch.float32
    for name in ("visual.merger.ln_q.weight", "model.layers.1.mlp.up_proj.weight"):
        with pytest.raises(rtdmd.UsageError, match="HPSv3.safetensors"):
            ev.HPSv3.networks({k: v for k, v in state.items() if k != name}, tiny_qwen2(), torch.float32)
    with pytest.raises(rtdmd.UsageError, match="surprise"):
        ev.HPSv3.networks({**state, "model.surprise": torch.zeros(1)}, tiny_qwen2(), torch.float32)


def hpsv3_inputs():
    from transformers import Qwen2VLImageProcessor
    patches = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56})(
        images=[torch.rand(3, 90, 90), torch.rand(3, 90, 90)], do_rescale=False, return_tensors="pt")
    ids = torch.tensor([[7, 5, 5, 5, 5, 8, 11, 12, 60, 13], [7, 5, 5, 5, 5, 8, 14, 60, 0, 0]])
    return ids, (ids > 0).long(), patches["pixel_values"], patches["image_grid_thw"]


def test_hpsv3_uses_plain_positions():
    """Explicit positions 0, 1, 2, .. give the same states; the full model's own multi-axis ones do not."""
    net, head = (n.eval() for n in ev.HPSv3.networks(hpsv3_state(tiny_qwen2()), tiny_qwen2(), torch.float32))
    scorer = ev.HPSv3(net, head, None, "", 60)
    ids, mask, pixels, grid = hpsv3_inputs()
    with torch.no_grad():
        scores = scorer.read(ids, mask, pixels, grid)

        def through_the_full_model(positions):
            states = net(input_ids=ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grid,
                         position_ids=positions, mm_token_type_ids=(ids == 5).int()).last_hidden_state
            return head(states[[0, 1], [8, 7]])[:, 0]

        plain = torch.arange(10).expand(3, 2, -1)
        torch.testing.assert_close(scores, through_the_full_model(plain), atol=1e-5, rtol=1e-4)
        assert (scores - through_the_full_model(None)).abs().max() > 1e-3
        alone = scorer.read(ids[1:, :8], mask[1:, :8], pixels[16:], grid[1:])   # padding is not seen
    torch.testing.assert_close(scores[1:], alone, atol=1e-5, rtol=1e-4)


def test_hpsv3_without_its_instruction_is_known_before_anything_is_sampled(tmp_path):
    """The weights, 16 GB, are there, and useless."""
    found = ev.missing_weights(["hpsv3"], settings(tmp_path))
    assert "instruction text was not found" in found["hpsv3"]


def test_hpsv3_instruction_is_read_and_not_run(tmp_path):
    """The question comes from the repository's source, none of which is run."""
    (tmp_path / "HPSv3").mkdir()
    (tmp_path / "HPSv3" / "data_collator_qwen.py").write_text(
        'import a_package_that_is_not_there\nINSTRUCTION = """Rate. Prompt - {text_prompt}"""\n'
        'prompt_with_special_token = """ <|Reward|>"""\nraise SystemExit\n')
    cfg = settings(tmp_path)
    assert ev.hpsv3_instruction(cfg).format(text_prompt="a fox") == "Rate. Prompt - a fox <|Reward|>"
    for text in ("<!DOCTYPE html>", "x = 1\n", "", "a.b = 'x'\n", "INSTRUCTION = 1\nprompt_with_special_token = ''\n"):
        (tmp_path / "HPSv3" / "data_collator_qwen.py").write_text(text)      # a page saved under that name
        assert "is not HPSv3's file" in ev.missing_weights(["hpsv3"], cfg)["hpsv3"]


def qwen_processor(number):
    """Qwen2-VL's or Qwen3-VL's real processor, over a tokenizer that knows only bytes and special tokens."""
    import transformers
    tokenizer = transformers.Qwen2Tokenizer(vocab={c: i for i, c in enumerate(BYTES)}, merges=[])
    marks = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{mark}|>" for mark in marks]})
    template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
                "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}"
                "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    view = transformers.Qwen2VLImageProcessor(patch_size={2: 14, 3: 16}[number])
    video = getattr(transformers, f"Qwen{number}VLVideoProcessor")()
    return getattr(transformers, f"Qwen{number}VLProcessor")(view, tokenizer, video, chat_template=template)


def test_hpsv3_through_the_real_processor():
    """256 image tokens whatever the size, and a score that the padding does not change."""
    processor = qwen_processor(2)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    token_id, image_id = processor.tokenizer.convert_tokens_to_ids(["<|Reward|>", "<|image_pad|>"])
    config = tiny_qwen2(token_id, image_id)
    net, head = (n.eval() for n in ev.HPSv3.networks(hpsv3_state(config), config, torch.float32))
    scorer, seen = ev.HPSv3(net, head, processor, "rate {text_prompt} <|Reward|>!", token_id), []
    read = scorer.read
    scorer.read = lambda ids, *rest: seen.append(ids) or read(ids, *rest)
    images = torch.rand(2, 3, 96, 96)
    scores = scorer(images, ["a", "a longer prompt"])
    assert [(ids == image_id).sum(1).tolist() for ids in seen] == [[256, 256]]
    assert "<|vision_end|>rate a <|Reward|>!<|im_end|>" in processor.tokenizer.decode(seen[0][0])
    torch.testing.assert_close(scores[:1], scorer(images[:1], ["a"]), atol=1e-5, rtol=1e-4)


def test_load_hpsv3(tmp_path):
    """From Qwen2-VL's folder, HPSv3's tensors and the source with its question."""
    from safetensors.torch import save_file
    processor = qwen_processor(2)
    config = tiny_qwen2(len(processor.tokenizer), processor.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    for folder in ("Qwen2-VL-7B-Instruct", "HPSv3"):
        (tmp_path / folder).mkdir()
    processor.save_pretrained(tmp_path / "Qwen2-VL-7B-Instruct")
    config.save_pretrained(tmp_path / "Qwen2-VL-7B-Instruct")
    save_file(hpsv3_state(config), tmp_path / "HPSv3" / "HPSv3.safetensors")
    (tmp_path / "HPSv3" / "data_collator_qwen.py").write_text(
        'INSTRUCTION = "rate {text_prompt}"\nprompt_with_special_token = " <|Reward|>"\n')
    scores = load("hpsv3", tmp_path)(torch.rand(2, 3, 30, 30), ["a", "longer"])
    assert scores.shape == (2,) and scores.dtype == torch.float32 and scores.isfinite().all()


# ---- GenEval

def seen(name, score, box=(0, 0, 10, 10)):
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[box[1]:box[3], box[0]:box[2]] = True
    return ev.Detection(ev.COCO.index(name), score, box, mask)


def judge(detections, row, colours=None, threshold=.3):
    """(official, partial, strict) with a stub colour judge: a dict from box to colour name."""
    def names(found, name):
        return [(colours or {}).get(d.box, "red") for d in found]

    objects = ev.objects_of(detections, threshold)
    return (ev.geneval_official(objects, row, names), *ev.geneval_partial(objects, row, names))


A, B, C = (0, 0, 10, 10), (50, 0, 60, 10), (0, 50, 10, 60)


def test_geneval_single_and_two_objects():
    """Officially at least as many as asked, strictly as many; partial credit is a mean of terms."""
    one = {"include": [{"class": "dog", "count": 1}]}
    two = {"include": [{"class": "dog", "count": 1}, {"class": "tv remote", "count": 1}]}
    assert judge([seen("dog", .31)], one) == (True, 1, True)
    assert judge([seen("dog", .3)], one) == (False, 0, False)                        # above .3, not at it
    assert judge([seen("dog", .9, A), seen("dog", .9, B)], one) == (True, 0, False)   # one too many
    assert judge([seen("dog", .9), seen("tv remote", .8, B)], two) == (True, 1, True)
    assert judge([seen("dog", .9)], two) == (False, .5, False)
    assert judge([seen("dog", .9, (i, 0, i + 5, 5)) for i in range(3)], one)[1] == -1   # may be negative


def test_geneval_counting_is_exact_through_exclude():
    """Three cats asked for: two and four are wrong, a fourth below the threshold is not seen."""
    row = {"include": [{"class": "cat", "count": 3}], "exclude": [{"class": "cat", "count": 4}]}
    cats = [seen("cat", .95, (10 * i, 0, 10 * i + 5, 5)) for i in range(4)]
    assert judge(cats[:3], row, threshold=.9) == (True, 1, True)
    assert judge(cats, row, threshold=.9) == (False, 1 - 1 / 3, False)
    assert judge(cats[:2], row, threshold=.9) == (False, 1 - 1 / 3, False)
    assert judge(cats[:3] + [seen("cat", .89, B)], row, threshold=.9)[0] is True   # below .9


def test_geneval_keeps_sixteen_of_a_class_the_best_first():
    """GenEval's own limit on detections, and its floor of .3."""
    found = ev.objects_of([seen("cat", .31 + i / 100) for i in range(30)] + [seen("dog", .2)], .3)
    assert set(found) == {"cat"} and len(found["cat"]) == 16
    assert [d.score for d in found["cat"]] == sorted((.31 + i / 100 for i in range(14, 30)), reverse=True)


def test_geneval_colours_look_at_the_best_objects_only():
    """With one car asked for, the colour of the second one neither helps nor hurts."""
    row = {"include": [{"class": "car", "count": 1, "color": "blue"}]}
    pair = [seen("car", .9, A), seen("car", .5, B)]
    assert judge(pair[:1], row, {A: "blue"}) == (True, 1, True)
    assert judge(pair[:1], row, {A: "green"}) == (False, .5, False)
    assert judge(pair, row, {A: "green", B: "blue"})[0] is False      # the better one counts
    assert judge(pair, row, {A: "blue", B: "green"}) == (True, 0, False)   # terms: 1 - 1/1 and 0
    assert judge([], row) == (False, 0, False)


def test_geneval_colour_of_two_objects():
    """Each object is asked for its own colour: swapped ones are wrong."""
    row = {"include": [{"class": "car", "count": 1, "color": "blue"},
                       {"class": "cup", "count": 1, "color": "red"}]}
    pair = [seen("car", .9, A), seen("cup", .9, B)]
    assert judge(pair, row, {A: "blue", B: "red"}) == (True, 1, True)
    assert judge(pair, row, {A: "red", B: "blue"}) == (False, .5, False)   # attributes swapped


def test_geneval_position():
    """The relation is to the anchor: without one its term is 0."""
    row = {"include": [{"class": "dog", "count": 1},
                       {"class": "cat", "count": 1, "position": ["right of", 0]}]}
    assert judge([seen("dog", .9, A), seen("cat", .9, B)], row) == (True, 1, True)
    assert judge([seen("dog", .9, B), seen("cat", .9, A)], row) == (False, .75, False)   # terms 1, 1, 0, 1
    assert judge([seen("dog", .9, A), seen("cat", .9, C)], row)[0] is False
    assert judge([seen("cat", .9, B)], row) == (False, 1 / 3, False)          # no anchor: terms 0, 1, 0
    assert judge([seen("dog", .9, A)], row) == (False, 1 / 3, False)          # terms 1, 0, 0


@pytest.mark.parametrize("box, expected", [
    ((100, 0, 110, 10), {"right of"}), ((-100, 0, -90, 10), {"left of"}), ((0, -50, 10, -40), {"above"}),
    ((0, 50, 10, 60), {"below"}), ((50, 50, 60, 60), {"right of", "below"}), ((0, 0, 10, 10), set()),
    ((2, 0, 12, 10), set()),                # 2 = .1 (10 + 10): nothing is left of the offset
    ((2.1, 0, 12.1, 10), set()),            # .1 / 2.1 is less than half
    ((4.1, 0, 14.1, 10), {"right of"}),     # 2.1 / 4.1 is more than half
    ((30, 100, 40, 110), {"below"}),        # 28 / 104 is less than half
])
def test_relations_and_their_margin(box, expected):
    """GenEval's rule: beyond a tenth of both sizes, and more than half of the way in that direction."""
    assert ev.relations(box, (0, 0, 10, 10)) == expected


def test_colour_is_judged_on_the_masked_crop():
    """A stub CLIP that sees mean colour: what is around the mask, or outside the box, must not count."""
    class Mean(nn.Module):
        palette = dict(zip(ev.COLOURS, torch.tensor([
            [1, 0, 0], [1, .5, 0], [1, 1, 0], [0, .6, 0], [0, 0, 1], [.5, 0, .5], [1, .6, .7], [.5, .25, 0],
            [0, 0, 0], [1, 1, 1]])))

        def __init__(self):
            super().__init__()
            self.dummy = nn.Parameter(torch.zeros(()))

        def encode_image(self, pixels):
            rgb = pixels * torch.tensor(rtdmd.CLIP_STD).view(3, 1, 1) + torch.tensor(rtdmd.CLIP_MEAN).view(3, 1, 1)
            return rgb.mean((2, 3)) - .6   # the grey #999 is the origin

        def encode_text(self, tokens):
            return torch.stack([self.palette[ev.COLOURS[t]] - .6 for t in tokens])

    def tokenise(texts):
        assert texts[:3] == [f"a photo of a red{words}" for words in (" car", "-colored car", " object")]
        return torch.tensor([ev.COLOURS.index(next(c for c in ev.COLOURS if f"a {c}" in t)) for t in texts])

    image = torch.zeros(3, 100, 100)
    image[1] = .6                                     # green everywhere
    image[:, 20:40, 20:40] = torch.tensor([0., 0, 1]).view(3, 1, 1)
    blue = seen("car", .9, (20, 20, 40, 40))
    wide = ev.Detection(blue.label, .9, (10, 10, 50, 50), blue.mask)   # a wide box around the same mask
    names = ev.ColourNames(Mean(), tokenise)
    assert names(image, [blue, wide], "car") == ["blue", "blue"]
    broad = torch.zeros(3, 100, 300)                  # at the edge: a centre crop of all would miss it
    broad[2, 20:40, :20] = 1
    mask = broad[2] > 0
    assert names(broad, [ev.Detection(2, .9, (0, 20, 20, 40), mask)], "car") == ["blue"]
    everything = ev.Detection(blue.label, .9, (0, 0, 100, 100), torch.ones(100, 100, dtype=torch.bool))
    assert names(image, [everything], "car") == ["green"]


def slow_instances(class_logits, mask_logits, padded, resized, original):
    """The detector's steps word by word: every one of the 100 best (query, class) pairs, no shortcut."""
    full = F.interpolate(mask_logits[None], size=padded, mode="bilinear", align_corners=False)
    full = full[..., :resized[0], :resized[1]]
    full = F.interpolate(full, size=original, mode="bilinear", align_corners=False)[0]
    p, found = class_logits.softmax(-1)[:, :80], []
    pairs = sorted(((p[q, c].item(), q, c) for q in range(len(p)) for c in range(80)), reverse=True)[:100]
    for value, q, c in pairs:
        mask = full[q] > 0
        if not mask.any():
            continue
        pixels = [(y, x) for y in range(original[0]) for x in range(original[1]) if mask[y, x]]
        sure = sum(full[q, y, x].sigmoid().item() for y, x in pixels) / (len(pixels) + 1e-6)
        ys, xs = [y for y, _ in pixels], [x for _, x in pixels]
        found.append((c, value * sure, (min(xs), min(ys), max(xs) + 1, max(ys) + 1), mask))
    return sorted((f for f in found if f[1] > .3), key=lambda f: -f[1])


def test_detector_outputs_against_a_literal_version():
    """Two classes for one query, overlapping masks, padding, resizing, a query without a mask."""
    torch.manual_seed(0)
    classes, masks = torch.randn(5, 81), torch.full((5, 8, 12), -6.)
    classes[0, 3] = classes[0, 7] = 12        # one query, two classes at nearly one half each
    classes[0, 3] += .3
    classes[1, 3] = classes[2, 70] = 15
    classes[3, 80] = 15                       # nothing, whatever its mask
    classes[4, 9] = 15                        # sure of a class, and an empty mask
    masks[0, 1:5, 2:7] = 4.
    masks[1, 2:6, 4:10] = 1.5                 # overlaps the first, and the padding
    masks[2, 5:8, 0:3] = masks[3, 0:3, 0:3] = 3.
    shape = dict(padded=(32, 48), resized=(28, 41), original=(35, 50))
    ours = ev.instances(classes, masks, **shape)
    ours = [d for d in ours if d.score > .3]
    theirs = slow_instances(classes, masks, **shape)
    assert [d.label for d in ours] == [t[0] for t in theirs] and {3, 7, 70} <= {d.label for d in ours}
    for d, (_, score, box, mask) in zip(ours, theirs):
        assert d.score == pytest.approx(score, rel=1e-4) and d.box == box and torch.equal(d.mask, mask)


def tiny_detector(labels=80):
    from transformers import Mask2FormerConfig, SwinConfig
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, image_size=64,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    return Mask2FormerConfig(backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
                             encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_queries=6,
                             num_attention_heads=2, dim_feedforward=16, num_labels=labels)


def test_detector_is_mask2former(tmp_path, monkeypatch):
    """Same outputs as transformers' own class, from files that it wrote; without scipy."""
    from transformers.models.mask2former import modeling_mask2former as theirs
    monkeypatch.setattr(theirs, "requires_backends", lambda *_: None)
    torch.manual_seed(0)
    whole = theirs.Mask2FormerForUniversalSegmentation(tiny_detector()).eval()
    folder = tmp_path / "mask2former-swin-small-coco-instance"
    whole.save_pretrained(folder)
    cfg = settings(tmp_path)
    net = rtdmd.load_whole(ev.detector_class(), "facebook/mask2former-swin-small-coco-instance", cfg)
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        out, (classes, masks) = whole(pixels), net(pixels)
    assert torch.equal(out.class_queries_logits, classes) and torch.equal(out.masks_queries_logits, masks)
    state = whole.state_dict()
    del state["class_predictor.weight"]
    whole.save_pretrained(folder, state_dict=state)
    with pytest.raises(rtdmd.UsageError, match="class_predictor.weight"):   # never random weights in silence
        rtdmd.load_whole(ev.detector_class(), "facebook/mask2former-swin-small-coco-instance", cfg)


@pytest.mark.parametrize("size, seen_size, padded", [
    ((512, 512), (800, 800), (800, 800)), ((512, 1024), (667, 1333), (672, 1344)),
    ((1024, 768), (1067, 800), (1088, 800))])
def test_detector_view(size, seen_size, padded):
    """At most 800 x 1333, padded with zeros to multiples of 32."""
    pixels, resized = ev.detector_view(torch.rand(1, 3, *size))
    assert resized == seen_size and tuple(pixels.shape[-2:]) == padded
    assert pixels[..., resized[0]:, :].abs().sum() == 0 and pixels[..., resized[1]:].abs().sum() == 0


def test_geneval_end_to_end_with_a_stub_detector(monkeypatch):
    """Two images through the real calls; the stub detector reports a dog, surely or half so, then a cat."""
    def detector(pixels):
        classes, masks = torch.zeros(2, 3, 81), torch.full((2, 3, 16, 16), -9.)
        classes[..., 80] = 20
        classes[0, 0, 16], classes[0, 0, 80] = 20, doubt
        classes[1, 1, 15], classes[1, 1, 80] = 20, 0
        masks[0, 0, 4:8, 4:8] = masks[1, 1, 4:8, 4:8] = 9
        return classes, masks

    doubt = 0

    monkeypatch.setattr(ev, "detector_view", lambda images: (torch.zeros(2, 3, 64, 64), (64, 64)))
    row = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    scorer = ev.GenEval(detector, None, known={row["prompt"]: row})
    assert scorer(torch.rand(2, 3, 32, 32), [row, "a photo of a dog"]).tolist() == [1, 0]
    assert {k: v.tolist() for k, v in scorer.details(torch.rand(2, 3, 32, 32), [row, row]).items()} == {
        "geneval": [1, 0], "geneval_partial": [1, 0], "geneval_strict": [1, 0]}
    doubt = 20   # the dog's score is one half: enough, but not for counting
    assert scorer(torch.rand(2, 3, 32, 32), [row, row]).tolist() == [1, 0]
    assert scorer(torch.rand(2, 3, 32, 32), [{**row, "tag": "counting"}, row]).tolist() == [0, 0]
    with pytest.raises(rtdmd.UsageError, match="a photo of a cow"):
        scorer(torch.rand(2, 3, 32, 32), [row, "a photo of a cow"])


def test_geneval_summary_is_the_mean_of_the_tasks():
    """Its error is that of a mean of independent means; a picture without a score costs nothing but itself."""
    tasks = dict(a="colors", b="colors", c="colors", d="counting", e="counting")
    found = ev.geneval_summary([1, 1, 0, 0, 1, math.nan], [*"abcdee"], tasks)
    assert found == {"colors": (pytest.approx(2 / 3), pytest.approx(1 / 3)), "counting": (.5, .5),
                     "geneval": (pytest.approx(7 / 12), pytest.approx(math.hypot(1 / 3, .5) / 2))}
    assert ev.geneval_summary([1, 0, 1], [*"ade"], tasks)["geneval"][0] == .75


def test_geneval_metadata_and_training_prompts(tmp_path):
    """Rows survive the file; training prompts repeat by seed and meet no evaluation prompt."""
    evaluation = [ev.geneval_row(task, random.Random(i)) for task in ev.TASKS for i in range(40)]
    evaluation += [{"tag": "single_object", "include": [{"class": name, "count": 1}],
                    "prompt": f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"} for name in ev.COCO]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in evaluation))
    assert ev.read_geneval_metadata(file) == evaluation
    rows = ev.geneval_training_prompts(300, 7, evaluation)
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == 300 and not set(prompts) & {row["prompt"] for row in evaluation}
    assert rows == ev.geneval_training_prompts(300, 7, evaluation)
    assert rows != ev.geneval_training_prompts(300, 8, evaluation)
    assert {row["tag"] for row in rows} == set(ev.TASKS) - {"single_object"}   # all 80 are evaluation prompts
    assert {row["tag"] for row in ev.geneval_training_prompts(12, 7, ())} == set(ev.TASKS)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ev.read_geneval_metadata(tmp_path / "train.jsonl") == rows
    with pytest.raises(rtdmd.UsageError, match="only 80"):
        ev.geneval_training_prompts(90, 0, (), ["single_object"])


@pytest.mark.parametrize("line, words", [
    ("{oops", "line 2.*JSON"), ('{"tag": "colors", "prompt": "x"}', "line 2.*include"),
    ('{"tag": "colors", "prompt": "x", "include": [{"class": "elf", "count": 1}]}', "elf"),
    ('{"tag": "colour", "prompt": "x", "include": []}', "colour"), ("7", "line 2"), ('"x"', "line 2"),
    ('{"tag": "colors", "prompt": 7, "include": []}', "line 2.*prompt"), (b"\xefx", "line 2.*UTF-8"),
    ('{"tag": "colors", "prompt": "x", "include": [], "exclude": [{"class": "elf", "count": 2}]}', "elf"),
    ('{"tag": "colors", "prompt": "x", "include": [{"class": "cat", "count": 1, "color": "rad"}]}', "rad.*orange"),
    ('{"tag": "colors", "prompt": "x", "include": [{"count": 1}]}', "class, None"),
    ('{"tag": "colors", "prompt": "x", "include": []}', "entry, None"),
    ('{"tag": "colors", "prompt": "x", "include": [{"class": "cat"}]}', "entry, .*class, count"),
    ('{"tag": "counting", "prompt": "x", "include": [{"class": "cat", "count": 0}]}', "entry, .*class, count"),
    ('{"tag": "colors", "prompt": "x", "include": ["cat"]}', "entry, 'cat'")])
def test_geneval_metadata_complains(tmp_path, line, words):
    """A bad row is named by its line, its field, its class or its colour."""
    good, line = json.dumps(ev.geneval_row("counting", random.Random(0))), getattr(line, "encode", lambda: line)()
    rows = written(tmp_path, "rows.jsonl", good.encode() + b"\n" + line + b"\n")
    with pytest.raises(rtdmd.UsageError, match=words):
        ev.read_geneval_metadata(rows)


def test_prompts_that_a_metric_cannot_use_are_refused_before_sampling(tmp_path):
    """geneval2 without its questions, ocr without a single text to read; one prompt with a text is enough."""
    rows = written(tmp_path, "rows.jsonl", json.dumps(ev.geneval_row("counting", random.Random(0))))
    with pytest.raises(rtdmd.UsageError, match="vqa_list"):
        ev.geneval_tasks(["geneval2"], ["x"], settings(prompts=rows))
    with pytest.raises(rtdmd.UsageError, match="ocr compares.*no prompt has one"):
        ev.geneval_tasks(["ocr"], ["a sign", 'an empty " " one'], settings())
    assert ev.geneval_tasks(["ocr"], ["a sign", 'a sign that says "open"'], settings()) == {}


def test_geneval_rows_without_exclude(tmp_path):
    """The key may be null."""
    row = ev.geneval_row("counting", random.Random(0)) | dict(exclude=None)
    assert ev.read_geneval_metadata(written(tmp_path, "rows.jsonl", json.dumps(row))) == [row]
    assert ev.geneval_official({}, row, None) is False


@pytest.mark.parametrize("fields, words", [
    (dict(exclude=5), "an exclude that is no list"), (dict(exclude={}), "an exclude that is no list"),
    *((dict(position=position), "unknown position") for position in (
        ["on top of", 0], ["left of", 1], ["left of", -1], ["left of"], "left of", None, ["left of", "0"], [[], 0]))])
def test_a_geneval_row_that_would_fail_at_every_picture(fields, words, tmp_path):
    """It is refused when it is read, and not after the sampling."""
    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    row = dict(prompt="a dog left of a cat", tag="position", include=include)
    assert ev.read_geneval_metadata(written(tmp_path, "good.jsonl", json.dumps(row))) == [row]
    if "position" in fields:
        include[1].update(fields)
    else:
        row.update(fields)
    with pytest.raises(rtdmd.UsageError, match=words) as error:
        ev.read_geneval_metadata(written(tmp_path, "rows.jsonl", json.dumps(row)))
    sentence(error)


@pytest.mark.parametrize("asked", [[], [["only a question"]], [["How many cats?", "a dozen"]], ["text"], [[1, 2]]])
def test_a_geneval2_row_that_would_fail_at_every_picture(asked, tmp_path):
    """The same."""
    good = dict(prompt="two cats", vqa_list=[["How many cats?", "two"], ["Is it a cat?", "Yes"]])
    assert ev.read_geneval2_metadata(written(tmp_path, "good.jsonl", json.dumps(good))) == [good]
    with pytest.raises(rtdmd.UsageError, match="vqa_list that is no list of .question, answer.") as error:
        ev.read_geneval2_metadata(written(tmp_path, "rows.jsonl", json.dumps(good | dict(vqa_list=asked))))
    sentence(error)


def test_metadata_is_read_as_prompts_are(tmp_path):
    """One file is both: a mark at its start, blanks around a prompt, a line separator inside one."""
    texts = ["a photo of a cat", "two\u2028lines", "a dog"]
    rows = [json.dumps(dict(prompt=f" {text} ", file_name=f"{i}.png"), ensure_ascii=False)
            for i, text in enumerate(texts)]
    path = written(tmp_path, "metadata.jsonl", b"\xef\xbb\xbf" + "\r\n\n".join(rows).encode())
    read = lambda path: ev.read_rows(path, prompt=str)
    assert [*ev.rows_of(settings(prompts=path), read)] == rtdmd.read_prompts(path) == texts
    known = ev.rows_of(settings(prompts=path), read)
    assert [row["file_name"] for row in ev.find_rows([" a dog"], known, "x")] == ["2.png"]
    for i in range(3):
        (tmp_path / f"{i}.png").touch()
    assert ev.read_folder(tmp_path)[1] == texts
    written(tmp_path, "metadata.jsonl", '{"file_name": 7, "prompt": "a"}')
    with pytest.raises(rtdmd.UsageError, match="line 1.*file_name") as error:
        ev.read_folder(tmp_path)
    sentence(error)


def test_load_geneval(tmp_path, monkeypatch):
    """The detector from files; CLIP's weights from the file that open_clip is handed; rows from --prompts."""
    import open_clip
    from transformers.models.mask2former import modeling_mask2former as theirs
    monkeypatch.setattr(theirs, "requires_backends", lambda *_: None)
    theirs.Mask2FormerForUniversalSegmentation(tiny_detector()).save_pretrained(
        tmp_path / "mask2former-swin-small-coco-instance")
    (tmp_path / "open_clip_model.safetensors").touch()
    asked = []
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: asked.append((a, k)) or nn.Linear(1, 1))
    row = ev.geneval_row("counting", random.Random(0))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    scorer = load("geneval", tmp_path, str(tmp_path / "rows.jsonl"))
    assert asked == [(("ViT-L-14-quickgelu",), {"pretrained": str(tmp_path / "open_clip_model.safetensors")})]
    assert scorer(torch.rand(1, 3, 64, 64), [row["prompt"]]).tolist() == [0]
    cfg = settings(tmp_path)
    assert (scorer.rule, rtdmd.load_reward("geneval", cfg).rule) == ("geneval", "geneval_partial")
    row["include"][0]["class"] = "elf"
    with pytest.raises(rtdmd.UsageError, match="elf"):
        load("geneval", tmp_path, written(tmp_path, "rows.jsonl", json.dumps(row)))


# ---- GenEval2

def test_accepted_answers():
    """Digits and words, blanks and capitals, count as one answer."""
    three = ["3", " 3", "three", " three", "Three", " Three"]
    assert ev.accepted_answers("How many dogs are there?", "three") == three
    assert ev.accepted_answers("How many dogs are there?", "3") == three
    assert ev.accepted_answers("Is the dog blue?", "Yes") == ["yes", " yes", "Yes", " Yes"]


@pytest.mark.parametrize("p, am, gm", [([.5, .5], .5, .5), ([1., .25], .625, .5), ([1., 0.], .5, 0.),
                                       ([.9], .9, .9), ([.1, .2, .4], .7 / 3, .2)])
def test_soft_tifa(p, am, gm):
    """The arithmetic and the geometric mean of the answers' probabilities."""
    assert ev.soft_tifa(p) == pytest.approx((am, gm))


def test_geneval2_sums_the_answers_probability_at_the_last_token():
    """A stub network whose states are one-hot in the question's last token, behind padding; known logits."""
    from transformers import BatchEncoding
    vocabulary = ["<pad>", "?", "yes", "Yes", " yes", " Yes", "no", "3", "three", "Three", " three", " Three",
                  " "]
    p = torch.tensor([.01, .01, .3, .2, .1, .05, .1, .08, .04, .03, .02, .01, .05])

    class Processor:
        tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [
            vocabulary.index(text) if text in vocabulary else vocabulary.index(text[0])])

        def apply_chat_template(self, talks, tokenize, add_generation_prompt):
            return [talk[0]["content"][1]["text"] for talk in talks]

        def __call__(self, text, images, padding, padding_side, return_tensors):
            assert all(t.endswith("Answer in one word.") for t in text) and len(images) == len(text)
            mask = torch.zeros(len(text), 9, dtype=torch.long)
            for row, t in zip(mask, text):
                row[:3 + len(t) % 5] = 1
            return BatchEncoding({"attention_mask": mask})

    class Net:
        lm_head = staticmethod(lambda states: torch.where(states > 0, p.log(), torch.zeros(())))

        def model(self, attention_mask):
            last = attention_mask.sum(1) - 1
            return SimpleNamespace(last_hidden_state=F.one_hot(last, 9)[..., None].float())

    questions = [["Is there a dog?", "Yes"], ["How many dogs?", "three"], ["Is it?", "Yes"]]
    row = {"prompt": "three dogs", "vqa_list": questions}
    scorer = ev.GenEval2(Net(), Processor(), {"three dogs": row})
    details = scorer.details(torch.rand(2, 3, 8, 8), [row, "three dogs"])
    yes, three = .65, .08 + .05 + .04 + .03 + .02 + .01     # " 3" begins with the bare blank
    torch.testing.assert_close(details["geneval2_am"], torch.full((2,), (2 * yes + three) / 3))
    torch.testing.assert_close(details["geneval2"], torch.full((2,), (yes * yes * three) ** (1 / 3)))
    torch.testing.assert_close(scorer(torch.rand(1, 3, 8, 8), [row]), details["geneval2"][:1])


def tiny_qwen3(processor):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    torch.manual_seed(0)
    text = dict(vocab_size=270, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
                num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4})
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32,
                  patch_size=16, num_position_embeddings=16, deepstack_visual_indexes=[0])
    marks = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    marks = {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in marks.items()}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **marks)
    return Qwen3VLForConditionalGeneration(config).eval()


def test_geneval2_on_a_tiny_qwen3vl():
    """Padding changes nothing, and the answer is what generate's first step would see."""
    processor = qwen_processor(3)
    net = tiny_qwen3(processor)
    scorer = ev.GenEval2(net, processor)
    images = torch.rand(2, 3, 80, 80)
    both = scorer.first_word(ev.as_bytes(images), ["dog?", "a much longer one?"])
    alone = scorer.first_word(ev.as_bytes(images)[:1], ["dog?"])
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both.sum(-1), torch.ones(2))
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "dog?"}]}]
    text = processor.apply_chat_template([talk], tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, images=list(ev.as_bytes(images)[:1]), return_tensors="pt")
    step = net.generate(**inputs, max_new_tokens=1, do_sample=False, output_scores=True,
                        return_dict_in_generate=True)
    torch.testing.assert_close(both[:1], step.scores[0].softmax(-1), atol=1e-5, rtol=1e-4)
    row = {"prompt": "dogs", "vqa_list": [["Is there a dog?", "Yes"], ["How many dogs?", "two"]]}
    assert scorer(images, [row, row]).shape == (2,)


def test_load_geneval2(tmp_path):
    """From a saved Qwen3-VL and its processor."""
    processor, folder = qwen_processor(3), tmp_path / "Qwen3-VL-8B-Instruct"
    tiny_qwen3(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    row = {"prompt": "dogs", "vqa_list": [["Is there a dog?", "Yes"], ["How many dogs?", "two"]]}
    details = load("geneval2", tmp_path).details(torch.rand(1, 3, 64, 64), [row])
    assert 0 < details["geneval2"] <= details["geneval2_am"] < 1


# ---- OCR

@pytest.mark.parametrize("a, b, distance", [
    ("", "", 0), ("a", "", 1), ("", "abc", 3), ("abc", "abc", 0), ("kitten", "sitting", 3),
    ("flaw", "lawn", 2), ("intention", "execution", 5), ("saturday", "sunday", 3), ("abc", "acb", 2),
    ("open", "0pen", 1)])
def test_edit_distance(a, b, distance):
    """Levenshtein's distance, symmetric."""
    assert ev.edit_distance(a, b) == ev.edit_distance(b, a) == distance


def test_text_score():
    """1 where the quoted text is read, blanks and case aside; never negative."""
    assert ev.text_score("OPEN", "open") == 1 and ev.text_score("we are O P E N today", "Open") == 1
    assert ev.text_score("opne", "open") == .5 and ev.text_score("", "open") == 0
    assert ev.text_score("something else entirely", "open") == 0       # capped: never negative
    assert ev.quoted_text('a sign "Open 24h" and "no"') == "Open 24h"
    assert ev.quoted_text("a sign “Olá”") == "Olá"
    for prompt in ("a sign without a text", 'a sign " "', 'a sign ""'):
        with pytest.raises(rtdmd.UsageError, match="a sign"):
            ev.quoted_text(prompt)


def test_components_against_flood_fill():
    """Connected regions by runs of rows are those of a plain flood fill."""
    draw = np.random.default_rng(0)
    for density in (.1, .3, .45, .6):
        mask = draw.random((23, 31)) < density
        ours = {frozenset((y, x) for y, start, end in region for x in range(start, end))
                for region in ev.components(mask)}
        todo, theirs = {(y, x) for y, x in zip(*np.nonzero(mask))}, set()
        while todo:
            stack, region = [todo.pop()], set()
            while stack:
                y, x = stack.pop()
                region.add((int(y), int(x)))
                near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & todo
                todo -= near
                stack += near
            theirs.add(frozenset(region))
        assert ours == theirs


def test_text_boxes():
    """Sure and thick regions alone, grown as PP-OCR does and scaled to the picture."""
    heat = np.zeros((100, 200), np.float32)
    heat[20:30, 40:100] = .9            # a word
    heat[22:30, 120:180] = .9           # another on the same line
    heat[60:70, 10:60] = .45            # visible, and not sure enough
    heat[80:82, 10:60] = .9             # too thin
    heat[50:60, 30:90] = .2             # below the threshold
    boxes = ev.text_boxes(heat, 200, 400)
    grow = 1.5 * 600 / 140              # 10 x 60 cells
    assert len(boxes) == 2 and boxes[0][0] < boxes[1][0]
    assert boxes[0] == tuple(round(2 * v) for v in (40 - grow, 20 - grow, 100 + grow, 30 + grow))


def test_reading_order():
    """Lines from above, the words of a line from the left."""
    boxes = [(200, 103, 1, 1), (10, 108, 1, 1), (90, 20, 1, 1), (10, 25, 1, 1), (10, 300, 1, 1)]
    assert ev.reading_order(boxes) == [boxes[3], boxes[2], boxes[1], boxes[0], boxes[4]]


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def written_rows(text, at, canvas=(160, 320), size=28):
    """Black letters on white, with wide gaps between them: uint8 (3,H,W)."""
    image = Image.new("RGB", (canvas[1], canvas[0]), "white")
    font = ImageFont.load_default(size)
    for i, letter in enumerate(text):
        ImageDraw.Draw(image).text((at[0] + 26 * i, at[1]), letter, fill="black", font=font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class InkDetector:
    """Stands for the network: heat where ink is, filled between letters and shrunk as PP-OCR's map is."""

    def __call__(self, pixels):
        ink = (pixels.mean(1, keepdim=True) < 0).float()
        wide = F.max_pool2d(ink, (9, 31), 1, (4, 15))             # letters of a line become one block
        core = -F.max_pool2d(-wide, (15, 33), 1, (7, 16))         # and the block shrinks to its core
        return SimpleNamespace(last_hidden_state=core * .95)


class TemplateReader:
    """Stands for the network: compares the crop's letters with rendered ones; CTC outputs, blank = 0."""
    templates = []

    def __call__(self, pixels):
        ink = pixels[0].mean(0) < 0
        columns, steps = ink.any(0).tolist(), [0]
        starts = [x for x in range(len(columns)) if columns[x] and (x == 0 or not columns[x - 1])]
        for x in starts:
            end = next((i for i in range(x, len(columns)) if not columns[i]), len(columns))
            letter = self.nearest(ink[:, x:end])
            steps += [letter, letter, 0]                          # repeated, then a blank: CTC must merge
        sure = F.one_hot(torch.tensor(steps), len(LETTERS) + 1)[None].float()
        return SimpleNamespace(last_hidden_state=sure)

    def nearest(self, glyph):
        def fit(ink):
            rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
            tight = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
            return F.interpolate(tight[None, None].float(), (16, 12), mode="area").flatten()

        if not self.templates:
            self.templates += [fit(written_rows(c, (8, 8), (60, 60)).float().mean(0) < 128) for c in LETTERS]
        return 1 + int(torch.stack([(fit(glyph) - t).square().sum() for t in self.templates]).argmin())


def ocr_with_stubs():
    from transformers import PPOCRV5ServerDetImageProcessor, PPOCRV5ServerRecImageProcessor
    reader_view = PPOCRV5ServerRecImageProcessor(character_list=["blank", *LETTERS])
    return ev.OCR(InkDetector(), PPOCRV5ServerDetImageProcessor(), TemplateReader(), reader_view)


def test_ocr_reads_rendered_text():
    """Real processors around stub networks: boxes found, scaled back, cropped, read and decoded in order."""
    image = torch.minimum(written_rows("HELLO", (30, 20)), written_rows("W0RLD", (60, 100)))
    scorer = ocr_with_stubs()
    assert scorer.read(image) == "HELLOW0RLD"
    prompts = ['a sign "Hello"', 'a sign "hello world"', 'a sign "xyz"']
    scores = scorer(image[None].expand(3, -1, -1, -1) / 255, prompts)
    assert scores.tolist() == pytest.approx([1, .9, 0])
    assert scorer.read(torch.full((3, 64, 64), 255, dtype=torch.uint8)) == ""      # nothing written
    assert scorer(torch.ones(1, 3, 64, 64), ['"HI"']).tolist() == [0]


def test_ocr_drops_lines_it_is_unsure_of():
    """A line read with a score below .5 is no text."""
    scorer = ocr_with_stubs()
    sure = scorer.reader
    scorer.reader = lambda pixels: SimpleNamespace(last_hidden_state=sure(pixels).last_hidden_state * .49)
    assert scorer.read(written_rows("HELLO", (30, 20))) == ""


def test_ocr_lays_upright_lines_down():
    """A crop much higher than wide is turned, one a little higher is not."""
    shapes = []
    scorer = ocr_with_stubs()
    scorer.reader_view = lambda images, return_tensors: shapes.append(tuple(images[0].shape)) or 1 / 0
    for size, expected in (((3, 60, 20), (3, 20, 60)), ((3, 25, 20), (3, 25, 20))):
        with pytest.raises(ZeroDivisionError):
            scorer.line(torch.zeros(size, dtype=torch.uint8))
        assert shapes[-1] == expected


def test_load_ocr(tmp_path, monkeypatch):
    """The networks' outputs are what the code takes them for. The detector is the server one's small twin,
    since the server one takes its layers from the hub's configuration."""
    import transformers as t
    views = (t.PPOCRV5ServerDetImageProcessor(),
             t.PPOCRV5ServerRecImageProcessor(character_list=["-", *LETTERS]))
    nets = (t.PPOCRV5MobileDetForObjectDetection(t.PPOCRV5MobileDetConfig()),
            t.PPOCRV5ServerRecForTextRecognition(t.PPOCRV5ServerRecConfig(head_out_channels=37)))
    for part, net, view in zip(("det", "rec"), nets, views):
        net.save_pretrained(tmp_path / f"PP-OCRv5_server_{part}_safetensors")
        view.save_pretrained(tmp_path / f"PP-OCRv5_server_{part}_safetensors")
    monkeypatch.setattr(t, "PPOCRV5ServerDetForObjectDetection", t.PPOCRV5MobileDetForObjectDetection)
    scorer = load("ocr", tmp_path)
    assert scorer.reader_view.character_list[1:] == list(LETTERS)
    assert scorer(torch.rand(1, 3, 64, 64), ['"A"']).shape == (1,)
    with torch.no_grad():
        heat = scorer.detector(torch.randn(1, 3, 64, 96)).last_hidden_state
        sure = scorer.reader(torch.randn(1, 3, 48, 320)).last_hidden_state
    assert heat.shape == (1, 1, 64, 96) and 0 <= heat.min() and heat.max() <= 1   # a probability by pixel
    torch.testing.assert_close(sure.sum(-1), torch.ones(1, 40))                   # and by letter
    assert isinstance(scorer.line(torch.randint(0, 255, (3, 20, 90), dtype=torch.uint8)), str)


# ---- Scoring many pictures

def test_one_bad_image_does_not_stop_an_evaluation():
    """It costs its own score and one sentence; so does a score of nan."""
    class Picky:
        name = "picky"

        def __call__(self, images, prompts):
            if "bad" in prompts:
                raise ValueError("broken picture")
            values = images.mean((1, 2, 3))
            values[[p == "nan" for p in prompts]] = math.nan
            return values

    images = [torch.full((3, 8, 8), i / 10) for i in range(5)] + [torch.full((3, 6, 8), .5)]
    scores, failures = ev.run_metric(Picky(), images, ["a", "bad", "c", "nan", "e", "other size"], batch=3)
    values = scores["picky"]
    assert [round(v, 4) for i, v in enumerate(values) if i not in (1, 3)] == [0, .2, .4, .5]
    assert math.isnan(values[1]) and math.isnan(values[3]) and len(failures) == 2
    assert "picky" in failures[0] and "'bad'" in failures[0] and "broken picture" in failures[0]
    assert "picky is nan" in failures[1] and "'nan'" in failures[1]


def test_an_unreadable_file_is_counted(tmp_path):
    """Images from files, read one by one; a broken and a missing one cost nothing but their own scores."""
    scorer = SimpleNamespace(name="mean", details=lambda images, rows: {"mean": images.mean((1, 2, 3))})
    for i in (0, 3):
        Image.fromarray(picture(8, 8, i)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"not a picture")
    rows = [{"prompt": f"prompt {i}", "tag": "colors"} for i in range(4)]
    scores, failures = ev.run_metric(scorer, [tmp_path / f"{i}.png" for i in range(4)], rows)
    truth = [picture(8, 8, i).mean() / 255 if i in (0, 3) else math.nan for i in range(4)]
    assert scores["mean"] == pytest.approx(truth, nan_ok=True)
    assert len(failures) == 2 and "'prompt 1'" in failures[0] and "2.png" in failures[1]


class Two:
    """A scorer that knows two numbers, and cannot look at the prompt "bad"."""

    name = "two"

    def details(self, images, prompts):
        if "bad" in prompts:
            raise ValueError("broken")
        return {"two": images.mean((1, 2, 3)), "two_max": images.amax((1, 2, 3))}


def test_a_batch_that_failed_leaves_memory_before_its_halves_are_scored():
    """Or a set that is one picture too large for the GPU is never scored."""
    alive = []

    class Full:
        name, differentiable = "full", False

        def __call__(self, images, prompts):
            work = images * 2
            alive[:] = [one for one in alive if one() is not None] + [weakref.ref(work)]
            if sum(len(one()) for one in alive) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return work.mean((1, 2, 3))

    scores, failures = ev.run_metric(Full(), torch.rand(16, 3, 4, 4), ["a"] * 16, batch=16)
    assert not failures and np.isfinite(scores["full"]).all()


def test_run_metric_returns_every_number_that_a_scorer_knows():
    """details() names several; a picture that fails is nan in all."""
    scores, failures = ev.run_metric(Two(), torch.rand(4, 3, 4, 4), ["a", "b", "bad", "d"], batch=2)
    assert set(scores) == {"two", "two_max"} and len(failures) == 1
    assert ev.run_metric(Two(), torch.rand(1, 3, 4, 4), ["bad"])[0].keys() == {"two"}
    for values in scores.values():
        assert [math.isnan(v) for v in values] == [False, False, True, False]


def test_mean_and_error_counts_prompts_not_pictures():
    """Two prompts of two pictures each: the error is over the two means; nan pictures are left out."""
    assert ev.mean_and_error([1.0, 3.0, 5.0, 7.0], [*"aabb"]) == (4.0, pytest.approx(2.0))
    assert ev.mean_and_error([1.0, 5.0, 7.0, 3.0], [*"abba"]) == (4.0, pytest.approx(2.0))
    assert ev.mean_and_error([2.0, 3.0, 7.0, 8.0], [*"abbb"]) == (4.0, pytest.approx(2.0))
    assert ev.mean_and_error([1.0, math.nan, 5.0, 7.0], [*"aabb"])[0] == 3.5
    assert ev.mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))
    assert math.isnan(ev.mean_and_error([math.nan])[0])


def test_processes_agree_on_names_and_failures(monkeypatch):
    """Rank 1 has no picture, or only one that fails: it makes the calls that rank 0 makes, and is heard."""
    def process(rank):
        """score_rows as on that rank, the other's values waited for where it asks everyone."""
        def everyone(value):
            values[rank].append(value)
            meet.wait()
            both = [values[r][-1] for r in (0, 1)]
            meet.wait()
            return both

        local.everyone = everyone
        index = [i for i in range(len(captions)) if i % 2 == rank]
        images = torch.stack([torch.full((3, 4, 4), i / 4) for i in range(len(captions))])
        pictures = {"row": (index, images[index])}
        flags = SimpleNamespace(metrics=["two"], batch=1)
        found[rank] = ev.score_rows(pictures, captions, flags, settings(), {"two": Two()})

    local = threading.local()
    monkeypatch.setattr(rtdmd, "everyone", lambda value: local.everyone(value))
    for captions in (["a", "bad", "c"], ["a"]):
        meet, values, found = threading.Barrier(2, timeout=300), ([], []), {}
        threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        (scores, failures), other = found[0], found[1]
        assert repr(found[0]) == repr(other) and set(scores["row"]) == {"two", "two_max"}
        for row in scores["row"].values():
            assert [math.isnan(v) for v in row] == [text == "bad" for text in captions]
        assert len(failures) == captions.count("bad") and all("'bad'" in text for text in failures)


# ---- Prompts

GOOD = {
    "plain.txt": "a cat\na dog\n",
    "no end.txt": "a cat\na dog",
    "windows.txt": b"\xef\xbb\xbfa cat\r\n\r\n  a dog \r\na cat\r\n",
    "UPPER.TXT": "a cat\na dog\n",
    "geneval.jsonl": '{"tag": "two_object", "prompt": "a cat"}\n\n{"caption": "a dog"}\n',
    "strings.jsonl": '"a cat"\n"a dog"\n',
    "table.csv": 'id,Prompt\n1,a cat\n2,"a dog"\n3,\n',
    "table.tsv": "Category\tPrompt\nx\ta cat\ny\ta dog\n",
    "mark.csv": "\ufeffPrompts,Category\na cat,x\na dog,y\n",
    "text.csv": "text\na cat\na dog\n",
}


@pytest.mark.parametrize("name", GOOD)
def test_prompt_files(tmp_path, name):
    """Text, JSON lines, CSV and TSV, with marks, blanks and duplicates: the same two prompts."""
    path = written(tmp_path, name, GOOD[name])
    assert rtdmd.read_prompts(path) == sorted(rtdmd.read_prompts(path, seed=0)) == ["a cat", "a dog"]


def test_prompt_parquet(tmp_path):
    """A caption or prompt column is found; none, an unknown codec and a broken file are one sentence."""
    import pandas
    path = tmp_path / "p.parquet"
    pandas.DataFrame({"url": ["u"] * 4, "caption": ["a cat", None, "a dog", "a cat"]}).to_parquet(path)
    assert rtdmd.read_prompts(str(path)) == ["a cat", "a dog"]
    pandas.DataFrame({"url": ["u"]}).to_parquet(path)
    with pytest.raises(rtdmd.UsageError, match="no column or key"):
        rtdmd.read_prompts(str(path))
    pandas.DataFrame({"Prompt ": ["a cat", "a dog"]}).rename(columns=str.strip).to_parquet(path)
    assert rtdmd.read_prompts(str(path)) == ["a cat", "a dog"]
    from pyarrow import parquet

    def refuse(*args):
        raise __import__("pyarrow").ArrowNotImplementedError("Support for codec 'x' not built")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ParquetFile", refuse)
        with pytest.raises(rtdmd.UsageError, match="not built"):
            rtdmd.read_prompts(str(path))
    path.write_bytes(b"PAR1 no parquet")
    with pytest.raises(rtdmd.UsageError) as error:
        rtdmd.read_prompts(str(path))
    sentence(error)


def test_prompts_are_counted_and_shuffled_by_seed(tmp_path, capsys, flags):
    """Blanks and duplicates are told; the order depends on the seed and each text alone."""
    texts = [f"prompt {i}" for i in range(200)]
    path = written(tmp_path, "p.txt", "\n".join(texts + ["", "  ", "prompt 5"]))
    order = rtdmd.read_prompts(path, seed=1)
    assert "200 from 203 rows" in "".join(capsys.readouterr())
    assert order == rtdmd.read_prompts(path, seed=1) != rtdmd.read_prompts(path, seed=2)
    assert sorted(order) == sorted(texts) and order != texts
    more = rtdmd.read_prompts(written(tmp_path, "q.txt", "\n".join(["new one"] + texts)), seed=1)
    assert [text for text in more if text != "new one"] == order      # one line more moves no other
    doubled = written(tmp_path, "p.txt", "a red circle\na red circle\n\na blue square\n")
    rtdmd.main(flags(1, "--prompts", doubled, "--iterations", 1))
    assert "2 from 4 rows" in capsys.readouterr().err


@pytest.mark.parametrize("name, content, words", [
    ("p.tsv", 'prompt\n"the quick\nfox\na quoted" word\na dog\n', "row 1.*expected after"),
    ("p.tsv", 'prompt\na cat\n"the quick\nfox\n', "row 2.*end of data"),
    ("p.csv", 'prompt\na cat\n"a "red" dog"\n', "row 2.*expected after"),
    ("p.csv", 'id,prompt\n1,a cat\n2,a red, small dog\n', "row 2.*more cells.*in quotes")])
def test_quotes_and_commas_in_tables(name, content, words, tmp_path):
    """A quote that is not closed would swallow the rows after it, a comma cut its caption: the row is named."""
    with pytest.raises(rtdmd.UsageError, match=words) as error:
        rtdmd.read_prompts(written(tmp_path, name, content))
    sentence(error)


# ---- Pictures

def mean_of_halves(path):
    """Mean colour of the upper and of the lower half of a picture file, as it is scored."""
    top, bottom = ev.picture(path).chunk(2, 1)
    return [[round(v, 2) for v in half.mean((1, 2)).tolist()] for half in (top, bottom)]


def test_a_picture_is_scored_as_a_viewer_shows_it(tmp_path):
    """EXIF's orientation, 16 bits, transparency, palettes, a colour profile."""
    red_on_top = Image.new("RGB", (16, 16), "blue")
    red_on_top.paste("red", (0, 0, 16, 8))
    seen, path = [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], tmp_path / "p.png"
    exif = Image.Exif()
    exif[0x0112] = 6                                                        # shown turned by 90 degrees clockwise
    red_on_top.rotate(90).save(path, exif=exif)
    assert mean_of_halves(path) == seen
    red_on_top.convert("P", palette=Image.Palette.ADAPTIVE).save(path)
    assert mean_of_halves(path) == seen
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(path)
    assert ev.picture(path).mean().item() == pytest.approx(.5, abs=.001) and len(ev.picture(path).unique()) == 256
    red = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    red.paste((255, 0, 0, 0), (0, 8, 16, 16))
    for image in (red, red.quantize(4)):
        image.save(path)
        assert mean_of_halves(path) == [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]    # a viewer's ground is white
    Image.new("LA", (16, 16), (0, 0)).save(path)
    assert mean_of_halves(path) == [[1.0] * 3] * 2
    from PIL import ImageCms
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    for embedded, shown in ((profile, [255, 0, 0]), (swapped, [0, 0, 255]), (b"no profile", [255, 0, 0])):
        Image.new("RGBA", (16, 16), "red").save(tmp_path / "alpha.png", icc_profile=embedded)
        Image.new("RGB", (16, 16), "red").quantize(4).save(tmp_path / "palette.png", icc_profile=embedded)
        for other in ("alpha.png", "palette.png"):
            with Image.open(tmp_path / other) as image:
                assert np.abs(np.array(ev.as_shown(image))[0, 0].astype(int) - shown).max() <= 2, other
        Image.new("RGB", (16, 16), "red").save(path, icc_profile=embedded)
        assert (ev.picture(path)[:, 0, 0] * 255 - torch.tensor(shown)).abs().max() <= 1


def bomb(path):
    """A PNG whose header says 100,000 x 100,000."""
    import zlib
    chunk = lambda kind, data: len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    side = (100_000).to_bytes(4, "big")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", side + side + b"\x08\x02\0\0\0") + chunk(b"IEND", b""))


def broken_chunk(path):
    Image.new("RGB", (64, 64), "red").save(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 1] ^= 0xff
    path.write_bytes(data)


def animated(path):
    Image.new("RGB", (8, 8)).save(path, save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])


@pytest.mark.parametrize("spoilt", [bomb, broken_chunk, animated, os.mkfifo, Path.mkdir, Path.touch,
                                    lambda path: path.write_text("<html>"),
                                    lambda path: Image.new("F", (8, 8)).save(path, "TIFF")])
def test_a_picture_that_cannot_be_read_costs_its_own_score(spoilt, tmp_path):
    """Whatever Pillow raises, a pipe that would be read for ever, and frames of which none is meant."""
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (8, 8), "white").save(good)
    spoilt(bad)
    scorer = type("Mean", (), dict(name="mean", differentiable=False,
                                   __call__=lambda self, images, prompts: images.mean((1, 2, 3))))()
    scores, failures = ev.run_metric(scorer, [good, bad, good], ["a", "b", "c"])
    assert scores["mean"][::2] == [1, 1] and math.isnan(scores["mean"][1])
    assert len(failures) == 1 and "bad.png" in failures[0]


def test_files_beside_the_pictures_are_told(tmp_path, capsys):
    """What Pillow reads is scored, the rest is named; a row of metadata may not lead out of the folder."""
    for name in ("a_cat.png", "b.bmp", "c.tiff", "d.GIF"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("notes.txt", "e.mp4", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    files, prompts = ev.read_folder(tmp_path)
    assert [f.name for f in files] == ["a_cat.png", "b.bmp", "c.tiff", "d.GIF"] and prompts[0] == "a cat"
    assert "3 files are left out" in (out := capsys.readouterr().err) and ".mp4, .png, .txt" in out
    assert "4 pictures are from their names, such as 'a cat'" in out
    for name in ("../x.png", "/etc/x.png", "a/../../x.png"):
        written(tmp_path, "metadata.jsonl", json.dumps(dict(file_name=name, prompt="a")))
        with pytest.raises(rtdmd.UsageError, match="leads out of the folder"):
            ev.read_folder(tmp_path)


BAD = {
    "latin.txt": (b"a cat\nna\xefve\n", "row 2"),
    "utf16.txt": ("a cat".encode("utf-16"), "row 1"),
    "nul.txt": (b"a cat\na\x00dog\n", "row 2.*without NUL"),
    "long.txt": (b"a cat\n\n" + b"x" * 1_000_001 + b"\n", "row 3.*up to 20,000 characters"),
    "empty.txt": (b"", "no prompt"),
    "blank.txt": (b"\n \n", "no prompt"),
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', "row 2"),
    "list.jsonl": (b"[1, 2]\n", "row 1.*\\[1, 2"),
    "number.jsonl": (b'"a"\n{"prompt": 7}\n', "row 2.*: 7"),
    "surrogate.jsonl": (b'{"prompt": "\\ud800"}\n', "row 1"),
    "other.jsonl": (b'{"prompt": "a"}\n{"id": 3}\n', "row 2.*no column"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "row 1"),
    "other.csv": (b"id,name\n1,x\n", "no column"),
    "wide.csv": (b"prompt\nx\n" + b"y" * 200_000 + b"\n", "row 2"),
    "empty.csv": (b"", "no prompt"),
    "what.docx": (b"", "none of .txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_broken_prompt_files_are_named_by_row(tmp_path, name):
    """One sentence with the row, or with what the file lacks."""
    content, words = BAD[name]
    with pytest.raises(rtdmd.UsageError, match=words) as error:
        rtdmd.read_prompts(written(tmp_path, name, content))
    sentence(error)


def test_prompts_that_are_not_there(tmp_path):
    """No file, a folder, a misspelt name, a set that was not downloaded: one sentence each."""
    (tmp_path / "folder.txt").mkdir()
    for name in (tmp_path / "no.txt", tmp_path / "folder.txt", "pickapick", "pickapic", "drawbench", "hpdv2"):
        with pytest.raises(rtdmd.UsageError) as error:
            rtdmd.read_prompts(str(name))
        sentence(error)


def test_known_prompts(tmp_path, monkeypatch):
    """The sets of the paper from their own files, and the tiny world's captions."""
    import hpsv2
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **options: str(tmp_path))
    written(tmp_path, "DrawBench Prompts - Sheet1.csv", "Prompts,Category\nA red colored car.,Colors\n")
    written(tmp_path, "PartiPrompts.tsv", "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n")
    monkeypatch.setattr(hpsv2, "benchmark_prompts", lambda style: {"anime": ["a"], "photo": ["b", "a"]})
    assert rtdmd.read_prompts("drawbench") == ["A red colored car."]
    assert rtdmd.read_prompts("partiprompts") == ["bond"]
    assert rtdmd.read_prompts("hpdv2") == ["a", "b"]
    assert rtdmd.read_prompts("eval:tiny_captions") == ev.tiny_captions()


def test_prompts_come_once_an_epoch_and_each_time_in_another_order(tmp_path):
    """An endless stream: each epoch is a permutation of its own, the same at every start."""
    file = written(tmp_path, "prompts.txt", "".join(f"p{i}\n" for i in range(20)).encode())
    stream = rtdmd.PromptStream(rtdmd.Config(seed=3, prompts=str(file)))
    epochs = [[stream.at(20 * e + i) for i in range(20)] for e in range(3)]
    assert all(sorted(epoch) == sorted(stream) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, stream]}) == 4
    assert [stream.at(i) for i in range(20)] == epochs[0]


# ---- Text embeddings

class Letters:
    """The least that a backbone must have for the cache."""
    text_key, calls = "letters 8", 0

    def encode(self, prompts):
        self.calls += 1
        rows = [[float(len(p)), *map(float, p.encode()[:7].ljust(7, b"\0"))] for p in prompts]
        return {"text": torch.tensor(rows), "pooled": torch.tensor(rows)[:, :1].bfloat16()}

    def free_text(self):
        self.freed = True


def test_text_cache(tmp_path, capsys):
    """A file a prompt, whatever its letters: made once, read back bit for bit, anew where damaged."""
    backbone = Letters()
    cache = rtdmd.TextCache(backbone, tmp_path)
    prompts = [f"prompt {i}" for i in range(40)] + ["prompt 3", "ünï/..\n\0 odd"]
    cache.prepare(prompts)
    files = list(tmp_path.rglob("*.safetensors"))
    assert backbone.freed and len(files) == 42 and "42 prompts" in "".join(capsys.readouterr())
    wanted = ["prompt 3", "", "prompt 3", "ünï/..\n\0 odd"]
    cond, truth = cache.batch(wanted, "cpu"), backbone.encode(wanted)
    assert all(torch.equal(cond[name], truth[name]) for name in truth)
    assert cond["pooled"].dtype == torch.bfloat16
    assert all(path.stat().st_size < 1000 for path in files)      # no file drags its whole batch along

    calls = backbone.calls
    cache.prepare(prompts)      # nothing to do
    assert backbone.calls == calls
    for cut in (slice(0, 0), slice(0, 20), slice(0, -1)):      # empty, within the header, one byte short
        path = cache.path("prompt 7")
        path.write_bytes(path.read_bytes()[cut])
        cache = rtdmd.TextCache(backbone, tmp_path)                   # a new process: nothing in memory
        with pytest.raises(rtdmd.UsageError, match="cannot be read"):
            cache.batch(["prompt 7"], "cpu")
        cache.prepare(prompts)
        assert torch.equal(cache.batch(["prompt 7"], "cpu")["text"], backbone.encode(["prompt 7"])["text"])
    backbone.text_key = "letters 9"
    assert rtdmd.TextCache(backbone, tmp_path).folder != cache.folder


def test_a_prompt_of_several_samples_goes_to_the_card_once(tmp_path, monkeypatch):
    """24 trajectories of SD3 share one prompt: 2.7 MB, not 64."""
    backbone = Letters()
    cache, sent, to_device = rtdmd.TextCache(backbone, tmp_path), [], rtdmd.to_device
    cache.prepare(["a", "b"])
    monkeypatch.setattr(rtdmd, "to_device", lambda x, device: sent.append(x.shape[0]) or to_device(x, device))
    for prompts, rows in ((["b", "a", "b", "b"], 2), (["a", "a"], 1), (["a", "b"], 2)):
        sent.clear()
        cond, truth = cache.batch(prompts, "cpu"), backbone.encode(prompts)
        assert all(torch.equal(cond[name], truth[name]) for name in truth)
        assert sorted(sent)[:2] == [rows, rows]


def test_text_cache_reads_ahead_each_row_once_and_keeps_the_latest(tmp_path, monkeypatch):
    """In a thread of its own; the row not asked for the longest goes first."""
    backbone, prompts = Letters(), [f"prompt {i}" for i in range(5)]
    cache, truth, read, go = rtdmd.TextCache(backbone, tmp_path), backbone.encode(prompts), [], threading.Event()
    cache.prepare(prompts)
    load_file = rtdmd.load_file

    def slowly(path):
        assert threading.current_thread() is not threading.main_thread() and go.wait(300)
        read.append(path)
        return load_file(path)

    monkeypatch.setattr(rtdmd, "load_file", slowly)
    assert cache.row.cache_parameters()["maxsize"] == 512
    cache.row = functools.lru_cache(3)(cache.row.__wrapped__)
    try:
        cache.prefetch(prompts[:3])             # returns although nothing can be read yet
        assert not read
    finally:
        go.set()                                # or the thread would wait on
    for wanted in ([0, 1], [2, 0, 2], [3], [2, 0]):                  # the fourth row pushes out the second
        cond = cache.batch([prompts[i] for i in wanted], "cpu")
        assert all(torch.equal(cond[name], truth[name][wanted]) for name in truth)
    assert read == [cache.path(prompts[i]) for i in (0, 1, 2, 3)]
    asked = []
    monkeypatch.setattr(cache, "row", asked.append)
    cache.prefetch([f"{i}" for i in range(2000)])        # more than are kept would push out what is wanted first
    assert asked == [f"{i}" for i in range(500)]
    monkeypatch.undo()
    cache.row = functools.lru_cache(3)(cache.row.__wrapped__)
    cache.batch([prompts[2]], "cpu")
    shutil.rmtree(cache.folder)
    cache.prefetch(prompts[4:])                 # a file that is not there is nobody's concern
    assert torch.equal(cache.batch([prompts[2]], "cpu")["text"], truth["text"][2:3])
    with pytest.raises(rtdmd.UsageError, match="cannot be read"):       # before it is wanted
        cache.batch(prompts, "cpu")


@pytest.mark.parametrize("stage", [1, 2])
def test_an_iteration_waits_for_no_text_but_the_first(stage, flags, monkeypatch):
    """Whatever batch is asked for was prefetched an iteration before, but for "". DEPARTURE 22: in stage 1 line 4 has
    other prompts than the rollout of its iteration."""
    asked, ahead, readers = [], [], {}
    batch, prefetch = rtdmd.TextCache.batch, rtdmd.TextCache.prefetch

    def noted_batch(self, prompts, device):
        asked.append((len(ahead), set(prompts)))
        reader = inspect.currentframe().f_back.f_code.co_name
        readers.setdefault((len(ahead), reader), set()).update(prompts)
        return batch(self, prompts, device)

    def noted_prefetch(self, prompts):
        if inspect.currentframe().f_back.f_code.co_name == f"stage{stage}":
            ahead.append(set(prompts))
        return prefetch(self, prompts)

    monkeypatch.setattr(rtdmd.TextCache, "batch", noted_batch)
    monkeypatch.setattr(rtdmd.TextCache, "prefetch", noted_prefetch)
    monkeypatch.setattr(rtdmd, "panel", lambda run: {})                     # it has prompts of its own
    rtdmd.main(flags(stage, "--sample_every", 9, "--iterations", 2, "--max_prompts", 400))
    assert len(ahead) == 2
    for call, prompts in asked:
        assert prompts <= ahead[0] | {""} or call == 2 and prompts <= ahead[1] | {""}
    own = set().union(*(prompts for call, prompts in asked if call == 2)) - {""}
    assert own and own <= ahead[0] & ahead[1]             # the second iteration's were known in the first
    for call in (1, 2) if stage == 1 else ():
        rolled, trained = readers[call, "rollout_in_chunks"], readers[call, "update_generator"]
        assert readers[call, "update_fake"] == rolled and readers[call, "walk"] <= trained and not rolled & trained


def test_text_cache_refuses_a_full_disk_and_splits_over_ranks(tmp_path, monkeypatch):
    """Refused before the first file; each rank encodes its share."""
    monkeypatch.setattr(rtdmd.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(rtdmd.UsageError) as error:
        rtdmd.TextCache(Letters(), tmp_path).prepare(["a"])
    assert "--cache needs more room" in sentence(error)
    monkeypatch.undo()
    prompts = [f"prompt {i}" for i in range(100)]
    for rank in range(3):
        monkeypatch.setattr(rtdmd, "dist_info", lambda: (rank, rank, 3))
        before = len(list(tmp_path.rglob("*.safetensors")))
        cache = rtdmd.TextCache(Letters(), tmp_path / "shared")
        monkeypatch.setattr(rtdmd, "is_whole", lambda path: False)     # all three listed before one wrote
        cache.prepare(prompts)
        assert len(list(tmp_path.rglob("*.safetensors"))) - before in range(20, 49)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 101


@pytest.mark.parametrize("name", FAMILIES)
def test_text_cache_of_a_real_backbone(folders, tmp_path, name):
    """What was encoded comes back bit for bit, and the encoders are gone."""
    backbone = backbone_of(folders, name)
    cache = rtdmd.TextCache(backbone, tmp_path)
    cache.prepare(PROMPTS)
    assert backbone.text is None
    cond, truth = cache.batch([PROMPTS[1], ""], "cpu"), backbone.encode(["", *PROMPTS])
    assert all(torch.equal(cond[name], truth[name][[2, 0]]) for name in truth)


# -----------------------------------------------------------------------------------------------------------------
# eval.py: reports
# -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny_report(tmp_path_factory):
    """eval.py on a tiny world with a teacher of ten updates, of a run that has just begun: its folder, and its
    flags."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "run/stage1").mkdir(parents=True)
    written(folder, "run/stage1/run.json", '{"config": {}}')
    flags = ["--run_folder", str(folder / "run"), "--cache", str(folder / "cache"), "--pretrained", "tiny-10",
             "--max_prompts", "4", "--per_prompt", "2"]
    ev.main(flags)
    return folder, flags


def test_report_has_the_contracts_rows(tiny_report):
    """report.json: rows, metrics, a score per picture; a grid with the same prompts in every row."""
    folder, _ = tiny_report
    report = json.loads((folder / "run/report.json").read_text())
    assert list(report["rows"]) == ["teacher", "teacher_cfg", "student_init"]
    for row in report["rows"].values():
        assert set(row) == {*ev.TINY_COLUMNS, "seconds_per_image"}
        assert all(math.isfinite(value) for value in row.values())
    assert len(report["scores"]["teacher"]["attributes"]) == 8 and len(report["prompts"]) == 4
    grid = np.array(Image.open(folder / "run/grid.png"))
    cell = 2 * 48 + 2                                            # painted at 48 pixels, shown at 96, with a frame
    line, width = 20, 4 * cell                                   # a name above each row, the captions below
    foot = grid.shape[0] - 4 * (line + cell)                     # real pictures on top
    assert grid.shape[1] == width and line < foot <= 7 * line
    dark = (grid < 128).any(2)
    assert all(dark[top:top + line, :cell].any() for top in range(0, 4 * (line + cell), line + cell))
    real = ev.real_renders([caption for caption in report["prompts"] for _ in range(2)])[::2]
    shown = torch.from_numpy(grid[line:line + cell]).permute(2, 0, 1) / 255.0
    for column, picture in enumerate(real):                      # but the edge, where a frame may lie
        close(shown[:, 7:-5:4, column * cell + 7:(column + 1) * cell - 5:4], picture[:, 1:-1, 1:-1], 1 / 255)
    assert dark[-foot:].any(0).reshape(4, cell).any(1).all()


def test_wrong_pictures_stand_in_red_frames(tiny_report, tmp_path, monkeypatch):
    """Those of which the held-out judge says 0; not those without a verdict, and none if it was not asked."""
    _, flags = tiny_report
    score_rows, verdicts = ev.score_rows, [1, 0, 1, 1, math.nan, 0, 0, 1]

    def judged(*args):
        scores, failures = score_rows(*args)
        for row in scores.values():
            row.update({name: verdicts for name in row if name == "heldout_strict"})
        return scores, failures
    monkeypatch.setattr(ev, "score_rows", judged)
    for metrics, wrong in (("heldout_strict,heldout", [False, False, False, True]), ("heldout", 4 * [False])):
        ev.main([*flags, "--out", str(tmp_path), "--metrics", metrics])
        grid = np.array(Image.open(tmp_path / "grid.png")).astype(int)
        cell, line = 98, 20                                      # as in the test of the report
        for top in range(line + line + cell, 4 * (line + cell), line + cell):  # shown are pictures 0, 2, 4 and 6
            corners = grid[top, [98 * column for column in range(4)]]
            assert [*(corners == (255, 0, 0)).all(1)] == wrong


def test_pictures_of_a_run(begun, cache, tmp_path):
    """trajectory.png: a row for each student, in which the last prediction is the picture that is scored; training.gif
    has the panels in their order."""
    shutil.copytree(begun, tmp_path / "run")
    for name in ("000010", "000020", "mine", "000030 (copy)"):
        shutil.copy(tmp_path / "run/stage1/samples/000003.png", tmp_path / f"run/stage1/samples/{name}.png")
    written(tmp_path, "run/stage1/samples/000015.png", "no picture")         # costs its frame, and no more
    ev.main(["--run_folder", str(tmp_path / "run"), "--cache", str(cache), "--max_prompts", "3", "--per_prompt", "1",
             "--metrics", "attributes", "--nfe", "2", "--device", "cpu"])
    picture = Image.open(tmp_path / "run/trajectory.png")        # 2 captions, 2 steps each, a gap of half a picture
    assert picture.width == 4 * 98 + 49 and 2 * 98 < picture.height < 2 * 98 + 150
    with Image.open(tmp_path / "run/training.gif") as film:
        assert film.n_frames == 3 and film.width <= 800
    steps = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 4, 4)
    saved, named_grid = [], ev.named_grid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ev, "named_grid", lambda *arguments: saved.append(arguments) or named_grid(*arguments))
        ev.save_trajectories(tmp_path / "a.png", {"a": steps, "b": steps + 8}, {"a": "A", "b": "B"}, ["one", "two"])
        (one, columns, names, below), (two, *_) = saved
        assert columns == 4 and names == ["A", "B"] and below == ["step 1", "step 2", "step 3", "step 4"]
        assert one[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11] and torch.equal(two, one + 4)
        saved.clear()
        ev.save_trajectories(tmp_path / "b.png", {"a": steps, "b": steps[:4]}, {"a": "A", "b": "B"}, ["one"])
        assert not saved and not (tmp_path / "b.png").exists()   # students of 8 and 4 steps share no columns


def test_a_film_of_panels_of_several_sizes(tmp_path):
    """No frame is cropped to the first one's size; a damaged panel is left out, whatever Pillow calls it."""
    for stage, height in ((1, 100), (2, 200)):
        folder = tmp_path / f"stage{stage}/samples"
        folder.mkdir(parents=True)
        Image.new("RGB", (800, height), "blue").save(folder / "000010.png")
    bytes_of = (tmp_path / "stage1/samples/000010.png").read_bytes()
    (tmp_path / "stage1/samples/000020.png").write_bytes(bytes_of[:45] + b"\0\0" + bytes_of[47:])
    ev.save_film(tmp_path, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 2 and film.size == (800, 220)
        film.seek(1)
        assert film.convert("RGB").getpixel((400, 215))[2] > 200


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory"), rtdmd.UsageError("no file")])
def test_a_scorer_that_does_not_load_costs_the_others_nothing(error, monkeypatch):
    """Not even one for which there is no memory: the pictures are sampled by then."""
    def load_metric(name, cfg):
        if name == "large":
            raise error
        return lambda images, prompts: images.mean((1, 2, 3))

    monkeypatch.setattr(ev, "load_metric", load_metric)
    pictures, cfg = {"row": ([0], torch.full((1, 3, 8, 8), 255, dtype=torch.uint8))}, SimpleNamespace(device="cpu")
    flags = SimpleNamespace(metrics=["large", "light"], batch=0)
    scores, failures = ev.score_rows(pictures, ["a"], flags, cfg)
    assert scores == {"row": {"light": [1.0]}} and len(failures) == 1 and failures[0].startswith("large: ")


def test_a_reward_without_a_name_can_score(tmp_path):
    """A backbone's own may be plain functions, as for training."""
    scores, failures = ev.run_metric(lambda images, prompts: images.mean((1, 2, 3)),
                                     torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), ["a", "b"], 2)
    assert scores == {"<lambda>": [1.0, 1.0]} and not failures


def test_a_good_file_that_begins_like_a_page(tmp_path):
    """The length at the start of a .safetensors may be spelt " <"."""
    file = tmp_path / "model.safetensors"
    head = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(0x3c20)
    file.write_bytes(len(head).to_bytes(8, "little") + head.encode() + bytes(4))
    assert file.read_bytes()[:2] == b" <" and torch.equal(rtdmd.load_file(file)["a"], torch.zeros(1))
    ev.look_at(file)
    (tmp_path / "page.bin").write_text("<html>")
    with pytest.raises(rtdmd.UsageError, match="a web page"):
        ev.look_at(tmp_path / "page.bin")


@pytest.mark.parametrize("flag", ["--max_prompts 3", "--per_prompt 2", "--save_images"])
def test_images_takes_no_flag_of_sampling(flag, tmp_path, capsys):
    """It would be ignored."""
    eval_refused(capsys, ["--images", str(tmp_path), "--metrics", "hpsv2", *flag.split()], "scores every picture")


def test_each_step_of_a_student_is_shown(cache, tmp_path, monkeypatch):
    """The last prediction is the picture of Sampler.batch, to the bit; no pass has more than one sample, since two may
    not fit where --batch 1 is needed."""
    flags, cfg = ev.parse(["--model", "tiny", "--teacher", "--nfe", "4", "--cache", str(cache), "--pretrained",
                           "tiny-1", "--device", "cpu", "--out", str(tmp_path)])
    row = next(iter(ev.plan(flags, cfg).values())) | dict(role="generator", eta=0.9)
    captions = ev.tiny_test_captions()[:2]
    sampler = ev.Sampler(cfg, {"student": row}, captions)
    sizes, velocity = [], rtdmd.Roles.velocity
    monkeypatch.setattr(rtdmd.Roles, "velocity", lambda *args: sizes.append(len(args[2])) or velocity(*args))
    found = ev.student_predictions(sampler, {"teacher": row | dict(role="teacher"), "student": row}, captions)
    assert {*sizes} == {1}
    keys = [rtdmd.key("eval", cfg.seed, caption, 0) for caption in captions]
    images = torch.cat([sampler.batch(row, [caption], [one]) for caption, one in zip(captions, keys)])
    assert [*found] == ["student"] and torch.equal(found["student"][3::4], images) and len(found["student"]) == 8


class Glow:
    """A scorer with a name of its own."""
    name, differentiable = "geneval", False

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


def test_a_metric_has_the_name_that_was_asked_for(tiny_report, tmp_path, monkeypatch):
    """Whatever its object calls itself; the rewards that a backbone of one's own brings are metrics, too."""
    folder, _ = tiny_report
    monkeypatch.setattr(ev.TinyBackbone, "rewards", dict.fromkeys([*ev.TINY_REWARDS, "glow"]))
    made = ev.TinyBackbone.__init__
    glowing = lambda self, cfg: made(self, cfg) or self.rewards.update(glow=Glow())
    monkeypatch.setattr(ev.TinyBackbone, "__init__", glowing)
    ev.main(["--model", "eval:TinyBackbone", "--teacher", "--nfe", "1", "--cache", str(folder / "cache"),
             "--pretrained", "tiny-10", "--prompts", "eval:tiny_test_captions", "--max_prompts", "2", "--device", "cpu",
             "--out", str(tmp_path), "--metrics", f"{__name__}:Glow,glow"])
    scores = json.loads((tmp_path / "report.json").read_text())["scores"]["teacher"]
    assert [*scores] == [f"{__name__}:Glow", "glow"] and scores["glow"] == scores[f"{__name__}:Glow"]
    assert len(scores["glow"]) == 2 and None not in scores["glow"]


def test_gathered_pictures_travel_alone(monkeypatch):
    """A view is sent between processes with all of the tensor that it is a view of."""
    seen, everyone = [], rtdmd.everyone
    monkeypatch.setattr(rtdmd, "everyone", lambda value: seen.append(value) or everyone(value))
    images = torch.zeros(64, 3, 24, 24, dtype=torch.uint8)
    ev.grid_rows({"row": (list(range(64)), images)}, range(8))
    ev.whole_set_metrics([*range(64)], images, ev.tiny_captions()[:32] * 2, 2)
    assert all(image.untyped_storage().nbytes() == 3 * 24 * 24 for pairs in seen for _, image in pairs)
    assert [*map(len, seen)] == [8, 64]


def test_untrained_student_is_the_teacher_without_steps(tiny_report):
    """A generator with B = 0 is the teacher; a picture depends on its key, not on batch, order or row."""
    folder, flags = tiny_report
    parsed, cfg = ev.parse(flags)
    rows = ev.plan(parsed, cfg)
    sampler = ev.Sampler(cfg, rows, ["a red circle", "a blue square"])
    teacher = dict(rows["teacher"], nfe=4)
    together = sampler.batch(teacher, ["a red circle", "a blue square"], [1, 2])
    alone = sampler.batch(dict(teacher, role="generator"), ["a blue square"], [2])
    close(together[1:], alone, 1e-5)


def test_images_reads_what_eval_writes(tiny_report):
    """--save_images, then --images on that folder."""
    folder, flags = tiny_report
    ev.main([*flags, "--save_images"])
    files, prompts = ev.read_folder(folder / "run/images/student_init")
    assert len(files) == 8 and prompts[0] == prompts[1] != prompts[2]


def test_the_sampler_guides(cache):
    """One Euler step is linear in the guidance weight, and 1 is no guidance."""
    parsed, cfg = ev.parse(["--teacher", "--cache", str(cache), "--pretrained", "tiny-1", "--device", "cpu"])
    sampler = ev.Sampler(cfg, ev.plan(parsed, cfg), ["a red circle"])
    sampler.backbone.decode = lambda x: x
    row = dict(role="teacher", nfe=1, eta=0.0, lora=None)
    one, two, three = (sampler.batch(dict(row, guidance=w), ["a red circle"], [1]) for w in (1.0, 2.0, 3.0))
    assert (two - one).abs().max() > 1e-2
    close(three - one, 2 * (two - one), 1e-4)
    close(one, sampler.batch(dict(row, role="generator", guidance=1.0), ["a red circle"], [1]), 1e-5)


def written_report(folder, name, scores, prompts, per_prompt=1, **facts):
    rows = {"row": {m: 0.0 for m in (*scores, "distance")}}
    return written(folder, name, json.dumps(dict(scores={"row": scores}, prompts=prompts, rows=rows,
                                                 per_prompt=per_prompt, **facts)))


def test_compare_pairs_by_caption(tmp_path, capsys):
    """--seed orders the prompts; rows of one name that were sampled otherwise are both named; small errors show."""
    sampler = lambda nfe: {"row": dict(role="teacher", nfe=nfe, guidance=1.0)}
    a = written_report(tmp_path, "a.json", dict(ocr=[.1, .2, .3, .4]), ["a", "b"], 2, sampler=sampler(1))
    b = written_report(tmp_path, "b.json", dict(ocr=[.5, .6004, .1, .2]), ["b", "a"], 2, sampler=sampler(2))
    ev.main(["--compare", a, b])
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert row.split("  ")[0] == "teacher, 2 steps - teacher, 1 step" and row.split()[-1] == "0.100±0.100"
    empty = written_report(tmp_path, "c.json", dict(geneval=[]), [])
    with pytest.raises(SystemExit):
        ev.main(["--compare", empty, empty])
    assert "two report.json" in capsys.readouterr().err
    assert ev.number(.0012, .0004) == "0.0012±0.0004" and ev.number(.5, 2e-17) == "0.50000±0.00000"


def test_compare_is_the_second_less_the_first(tmp_path, capsys):
    """In the statistic of each metric; what has no score for each picture is said to be left out."""
    prompts, tasks = ["a", "b", "c", "d"], dict(a="colors", b="colors", c="colors", d="counting")
    a = written_report(tmp_path, "a.json", dict(geneval=[0, 0, 0, 0], ocr=[.1, .3, .5, .2]), prompts, tasks=tasks)
    b = written_report(tmp_path, "b.json", dict(geneval=[0, 0, 0, 1], ocr=[.6, .8, 1., .7]), prompts, tasks=tasks)
    ev.main(["--compare", a, b])
    head, row, *rest = capsys.readouterr().out.splitlines()
    found = dict(zip(re.split("  +", head.strip()), row.split()[1:]))
    assert found == {"GenEval": "0.5", "OCR": "0.50000±0.00000", "colors": "0.000±0.000", "counting": "1"}
    assert len(rest) == 1 and "Not compared" in rest[0] and rest[0].endswith("distance.")
    for path in (a, b):
        Path(path).write_text(json.dumps({**json.loads(Path(path).read_text()), "tasks": {}}))
    ev.main(["--compare", a, b])
    out = capsys.readouterr().out
    assert "GenEval" not in out and "distance, geneval." in out


def test_images_of_one_prompt_are_not_independent(tmp_path, monkeypatch, capsys):
    """--images: 2 prompts x 4 pictures give the error of two prompts; an unreadable file is one sentence."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "grey_judge.py", "def grey(images, prompts):\n    return images.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = [dict(file_name=f"{i}.png", prompt="ab"[i % 2]) for i in range(8)]
    for i in range(8):
        Image.new("RGB", (8, 8), 3 * (255 * (i % 2),)).save(folder / f"{i}.png")
    written(folder, "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    line = ["--images", str(folder), "--metrics", "grey_judge:grey", "--device", "cpu", "--out", "out"]
    ev.main(line)
    report = json.loads(Path("out/report.json").read_text())
    name = "grey_judge:grey"
    assert report["rows"]["pictures"][name] == .5 and report["errors"]["pictures"][name] == pytest.approx(.5)
    (folder / "7.png").write_bytes(b"no picture")
    ev.main(line)
    report = json.loads(Path("out/report.json").read_text())
    assert len(report["failures"]) == 1 and report["rows"]["pictures"][name] == .5
    assert "not scored: pictures: " in capsys.readouterr().out


def eval_refused(capsys, line, words, code=2):
    """eval.py ends with this code and one sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        ev.main(line)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code and error[-1].startswith("eval: ") and error[-1].endswith("."), error
    assert re.search(words, error[-1]) and not any("Traceback" in text for text in error), error


@pytest.mark.parametrize("content", [
    "{}", "[]", '{"scores": 3}', '"x"', '{"scores": {}, "prompts": ["a"], "per_prompt": null}'])
def test_compare_refuses_what_is_no_report(content, tmp_path, capsys):
    """Valid JSON that holds no scores."""
    path = written(tmp_path, "report.json", content)
    eval_refused(capsys, ["--compare", path, path], "two report.json")


def test_compare_refuses_reports_without_a_common_metric(tmp_path, capsys):
    """An empty table is no answer."""
    paths = [written(tmp_path, f"{metric}.json", json.dumps(dict(
        scores=dict(stage1={metric: [1.0]}), prompts=["a"], per_prompt=1))) for metric in ("hpsv2", "ocr")]
    eval_refused(capsys, ["--compare", *map(str, paths)], "no metric in common")


@pytest.mark.parametrize("content", ['{"config": {"mod', "[]", "{}", '{"config": [3]}'])
def test_a_damaged_run_json_is_named(content, tmp_path, capsys):
    """Cut short, or without its settings: one sentence, and no model is guessed."""
    (tmp_path / "run/stage1").mkdir(parents=True)
    written(tmp_path, "run/stage1/run.json", content)
    eval_refused(capsys, ["--run_folder", str(tmp_path / "run")], "run.json is damaged")


def test_pictures_without_metadata_are_refused(tmp_path, capsys):
    """GenEval needs a row for each prompt, and says so before it loads a network."""
    rows = written(tmp_path, "rows.jsonl", json.dumps(ev.geneval_row("colors", random.Random(0))))
    written(tmp_path, "a_cat.png", "")
    line = ["--images", str(tmp_path), "--metrics", "geneval", "--prompts", rows, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ev.GenEval, "load", lambda cfg: SimpleNamespace(name="geneval"))
        eval_refused(capsys, line, "no metadata for the prompt 'a cat'")
        eval_refused(capsys, [*line[:5], str(tmp_path / "no.jsonl")], "No such file.*no.jsonl")


def test_a_finished_evaluation_is_not_lost(tiny_report, tmp_path, capsys):
    """The report is there whatever happens to the pictures after it; a single picture has no distance."""
    folder, flags = tiny_report
    (tmp_path / "images").touch()                                              # where a folder would go
    line = [*flags[:6], "--max_prompts", "1", "--per_prompt", "1", "--out", str(tmp_path), "--save_images"]
    eval_refused(capsys, line, "Cannot write .*images/teacher/000000.png")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"]["teacher"]["distance"] is None and report["rows"]["teacher"]["attributes"] < 0


def test_a_metric_that_fails_costs_the_others_nothing(tiny_report, tmp_path, monkeypatch, capsys):
    """Its weights are missing, or every picture is too much for it: the report has the rest, the exit code is 1.
    A module that is not there is refused before anything is sampled."""
    folder, flags = tiny_report
    written(tmp_path, "sick_judge.py", "def score(images, prompts): raise ValueError('not today')\n")
    monkeypatch.chdir(tmp_path)
    line = [*flags[:6], "--max_prompts", "1", "--per_prompt", "1", "--out", str(tmp_path / "out"), "--metrics"]
    load = ev.load_metric
    lacking = lambda name, cfg: rtdmd.find_weights(str(tmp_path), "x.bin", cfg) if name == "hpsv2" else load(name, cfg)
    monkeypatch.setattr(ev, "load_metric", lacking)
    eval_refused(capsys, [*line, "hpsv2,sick_judge:score,attributes"], "nothing was scored by hpsv2, sick_judge", 1)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["rows"]["teacher"]["attributes"] < 0 and "hpsv2: " in report["failures"][0]
    monkeypatch.setattr(ev, "Sampler", None)
    eval_refused(capsys, [*line, "no_such:score"], "no_such.*correct it, or put")


def test_eval_out_of_memory_names_the_knob(tiny_report, monkeypatch, capsys):
    """A GPU that is full while sampling ends with --batch in the sentence."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ev.Sampler, "batch", full)
    eval_refused(capsys, tiny_report[1], "lower --batch .was 128", code=1)


def test_a_run_is_sampled_like_itself(tmp_path):
    """The untrained student too; a checkpoint's own numbers come before the run's, and flags before both."""
    (tmp_path / "stage1").mkdir()
    run = lambda *more: ev.plan(*ev.parse(["--run_folder", str(tmp_path), *more]))
    pair = lambda row: (row["nfe"], row["eta"])
    written(tmp_path, "stage1/run.json", '{"config": {}}')
    assert pair(run()["student_init"]) == (4, .9)
    lora = {"attn.lora_A.weight": torch.zeros(4, 2)}
    rtdmd.save_lora(tmp_path / "lora", lora, 4, 4, ["attn"], dict(model="tiny", steps=3, eta=.7, resolution=24))
    of_lora = lambda *more: ev.plan(*ev.parse(["--lora", str(tmp_path / "lora"), *more]))["lora"]
    assert pair(of_lora()) == (3, .7) and pair(of_lora("--nfe", "6", "--eta", ".2")) == (6, .2)
    written(tmp_path, "stage1/run.json", '{"config": {"steps": 2, "eta": 0.5, "model": "tiny", "batch": 16}}')
    assert pair(run()["student_init"]) == (2, .5) and pair(run("--nfe", "5")["student_init"]) == (5, .5)
    assert pair(run("--eta", "0")["student_init"]) == (2, 0)
    written(tmp_path, "stage1/run.json", '{"config": {"steps": 5}}')    # the default --batch is no multiple of it
    assert pair(run()["student_init"]) == (5, .9)


def test_geneval_of_a_folder(tmp_path, monkeypatch):
    """--images with metadata rows: each task, and the mean of tasks as the headline."""
    monkeypatch.chdir(tmp_path)
    rows = [ev.geneval_row(task, random.Random(i)) for i, task in enumerate(["colors"] * 3 + ["counting"])]
    path = written(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), 3 * (255 * (i == 3),)).save(tmp_path / f"pictures/{i}.png")
    lines = [json.dumps(dict(file_name=f"{i}.png", prompt=row["prompt"])) + "\n" for i, row in enumerate(rows)]
    written(tmp_path / "pictures", "metadata.jsonl", "".join(lines))
    score = lambda images, rows: {"geneval": images.mean((1, 2, 3)), "geneval_strict": 0 * images.mean((1, 2, 3))}
    scorer = lambda images, rows: score(images, rows)["geneval"]
    scorer.name, scorer.details, scorer.differentiable = "geneval", score, False
    monkeypatch.setattr(ev.GenEval, "load", lambda cfg: scorer)
    ev.main(["--images", "pictures", "--metrics", "geneval", "--prompts", path, "--device", "cpu", "--out", "."])
    report = json.loads(Path("report.json").read_text())
    assert report["rows"]["pictures"] == dict(geneval=.5, colors=0, counting=1, geneval_strict=0)
    assert report["tasks"] == {row["prompt"]: row["tag"] for row in rows}


def test_a_run_folder_begins_with_what_made_it(begun):
    """Settings, processes, versions, and both source files."""
    facts = json.loads((begun / "stage1/run.json").read_text())
    assert facts["config"]["stage"] == 1 and facts["processes"] == 1 and {"torch", "peft"} <= set(facts["versions"])
    for module in (rtdmd, ev):
        source = Path(module.__file__)
        assert (begun / "stage1/start-000000" / source.name).read_bytes() == source.read_bytes()


def test_the_panel_measures_its_pictures(flags, monkeypatch):
    """Saturation, contrast and edges of pictures whose left half is one colour and whose right half is black. They are
    the averaged generator's, and the raw one is back afterwards."""
    run = prepared(flags(1))
    run.ema += 1
    theta, sampled, roll = run.roles.flat["generator"], [], rtdmd.rollout_in_chunks
    raw, place = theta.detach().clone(), theta.data_ptr()
    monkeypatch.setattr(rtdmd, "rollout_in_chunks", lambda *rest: sampled.append(theta.data.clone()) or roll(*rest))
    halves = torch.zeros(3, 24, 24)
    halves[:, :, :12] = torch.tensor([.9, .6, .3]).view(3, 1, 1)
    run.backbone.decode = lambda x: halves.expand(len(x), -1, -1, -1)
    found = rtdmd.panel(run)
    half_and_half = torch.tensor([.6, 0.]).repeat(288).std().item()
    assert found["saturation"] == pytest.approx(.3) and found["contrast"] == pytest.approx(half_and_half)
    assert found["edges"] == pytest.approx(.6 / 23) and len([*(run.folder / "samples").iterdir()]) == 1
    assert torch.equal(sampled[0], run.ema) and torch.equal(theta.data, raw) and theta.data_ptr() == place


@pytest.mark.parametrize("flags, words", [
    (["--lora", "nowhere"], "no checkpoint"), ([], "what to evaluate"), (["--teacher", "--nfe", "0"], "--nfe"),
    (["--teacher", "--metrics", "beauty"], "beauty"), (["--teacher", "--metrics", "attributes=2"], "give names"),
    (["--teacher", "--metrics", "attributes,attributes"], "each once"), (["--ablations", "--seed", "3"], "--seed out"),
    (["--teacher", "--metrics", "geneval"], "FILE.jsonl"), (["--images", "nowhere"], "not a folder"),
    (["--compare", "a"], "2 arguments"), (["--compare", "a", "b"], "report.json"),
    (["--teacher", "--model", "sd4"], "sd4"), (["--colour", "red"], "--colour"),
    (["--teacher", "--prompts", "nowhere.txt"], "nowhere.txt"), (["--run_folder", "typo"], "no run"),
    (["--teacher", "--images", "here"], "one after the other"), (["--teacher", "--cfg", "nan"], "--cfg"),
    (["--lora", "x", "--cfg", "7"], "--cfg"), (["--ablations", "--model", "sd3m"], "leave out --model"),
    (["--ablations", "--lora", "x"], "one after the other")])
def test_eval_refuses_in_one_sentence(flags, words, capsys, tmp_path, monkeypatch):
    """Exit code 2 and the remedy; no file is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ev.main(flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and "Traceback" not in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------------------------------------------
# eval.py: costs (--dry_run), and networks of full size without download
# -----------------------------------------------------------------------------------------------------------------

# ---- Sizes

@pytest.mark.parametrize("name, parameters, linears, rank_64", [
    ("sd3m", 2_028_328_000, 191, 37_552_128), ("sd35m", 2_243_171_520, 243, 47_775_744),
    ("sd35l", 8_056_627_520, 303, 94_322_688), ("flux1", 11_901_408_320, 266, 104_595_456),
    ("flux2-4b", 3_875_544_576, 80, 74_711_040), ("flux2-9b", 9_078_581_248, 112, 127_926_272),
    ("zimage", 6_154_908_736, 136, 66_846_720)])
def test_full_size_networks(name, parameters, linears, rank_64):
    """FULL_SIZE holds the real sizes: parameters, attention linears, weights of rank-64 adapters."""
    import diffusers
    cls = rtdmd.backbone_class(name)
    with torch.device("meta"):
        net = getattr(diffusers, cls.net_class)(**ev.FULL_SIZE[name]["transformer"])
    targets = rtdmd.matching_linears(net, cls.attention)
    assert sum(p.numel() for p in net.parameters()) == parameters and len(targets) == linears
    modules = dict(net.named_modules())
    assert sum(64 * (modules[t].in_features + modules[t].out_features) for t in targets) == rank_64


def test_full_size_vaes():
    """The VAEs that are made have the real ones' sizes and channels."""
    with torch.device("meta"):
        vaes = sd3, flux1, flux2 = AutoencoderKL(**ev.SD3_VAE), AutoencoderKL(**ev.FLUX_VAE), AutoencoderKLFlux2()
    assert [round(sum(p.numel() for p in vae.parameters()) / 1e6, 1) for vae in vaes] == [83.8, 83.8, 84.0]
    assert [vae.config.latent_channels for vae in vaes] == [16, 16, 32] and flux2.bn.eps == 1e-4
    assert (sd3.config.scaling_factor, sd3.config.shift_factor) == (1.5305, .0609)
    assert (flux1.config.scaling_factor, flux1.config.shift_factor) == (.3611, .1159)


@pytest.mark.parametrize("name", FAMILIES)
def test_made_networks_need_no_repository(folders, name, monkeypatch):
    """The same network on every rank, and embeddings that depend on the prompt."""
    tiny = dict(num_layers=2, num_attention_heads=1, caption_projection_dim=64)
    small = {"sd3m": dict(ev.SD3_NET, **tiny),
             "sd35m": dict(ev.SD35_NET, dual_attention_layers=(0,), **tiny),
             "flux1": dict(guidance_embeds=True, num_layers=1, num_single_layers=1, num_attention_heads=1),
             "flux2-4b": dict(ev.K4_NET, num_layers=1, num_single_layers=1, num_attention_heads=1),
             "zimage": dict(dim=128, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1)}
    vae = dict(ev.FULL_SIZE[name]["vae"], block_out_channels=(32,) * 4)
    real, one = backbone_of(folders, name, text_length=16), torch.ones(1)
    monkeypatch.setitem(ev.FULL_SIZE, name, dict(ev.FULL_SIZE[name], transformer=small[name], vae=vae))
    cfg = rtdmd.Config(model=name, device="cpu", dtype="fp32", resolution=64, text_length=16)
    state = torch.get_rng_state()
    stand_ins = ev.made_networks(cfg)
    for (owner, attribute), function in stand_ins.items():
        monkeypatch.setattr(owner, attribute, function)
    make = lambda: rtdmd.backbone_class(name)(cfg)
    a = make()
    assert torch.equal(state, torch.get_rng_state()) and torch.get_default_dtype() == torch.float32
    torch.manual_seed(1234)                    # another rank may be anywhere in its random stream
    b = make()
    pair = zip(a.nets["teacher"].parameters(), b.nets["teacher"].parameters())
    assert all(torch.equal(p, q) for p, q in pair)
    cond, again = a.encode(PROMPTS), a.encode(PROMPTS[::-1])
    assert torch.equal(cond["text"][0], again["text"][1])
    truth = real.encode(PROMPTS)                                            # guidance, lengths: not random
    kind = lambda cond: {name: (rows.dtype, rows.dim()) for name, rows in cond.items()}
    assert kind(cond) == kind(truth) and torch.equal(cond.get("guidance", one), truth.get("guidance", one))
    assert not torch.equal(cond["text"][0], cond["text"][1])
    assert torch.equal(*a.encode(["twice", "twice"])["text"])
    v = a.velocity(a.nets["generator"], latents(a), torch.tensor([.9, .5]), cond)
    assert v.shape == (2, *a.latent_shape) and v.isfinite().all() and v.std() > .01
    assert a.decode(latents(a)).shape == (2, 3, 64, 64)
    assert a.text_key != real.text_key


@pytest.mark.parametrize("name", FAMILIES)
def test_meta_device_counts_full_size_networks_without_memory(tmp_path, name, monkeypatch):
    """--device meta: encoding, forward, decoding and backward pass without a byte."""
    config = rtdmd.Config(model=name, device="meta", dtype="bf16", resolution=512)
    for (owner, attribute), function in ev.made_networks(config).items():
        monkeypatch.setattr(owner, attribute, function)
    backbone = rtdmd.backbone_class(name)(config)
    for module in (*backbone.nets.values(), backbone.vae):
        rows = [*module.parameters(), *module.buffers()]
        assert all(row.is_meta and row.dtype in (torch.bfloat16, torch.int64) for row in rows)
    assert torch.get_default_dtype() == torch.float32
    cond = backbone.encode(PROMPTS)
    assert all(rows.device.type == "cpu" for rows in cond.values()) and cond["text"].dtype == torch.bfloat16
    cache = rtdmd.TextCache(backbone, tmp_path)
    cache.prepare(PROMPTS)
    cond = cache.batch(PROMPTS, "meta")
    assert all(rows.is_meta and len(rows) == 2 for rows in cond.values())
    x = torch.randn(2, *backbone.latent_shape, device="meta", requires_grad=True)
    v = backbone.velocity(backbone.nets["teacher"], x, torch.rand(2, device="meta"), cond)
    assert v.is_meta and v.shape == x.shape and v.dtype == torch.float32
    images = backbone.decode(v)
    assert images.is_meta and images.shape == (2, 3, 512, 512)
    images.mean().backward()
    assert x.grad.is_meta


SMALL_NETS = {"sd3m": dict(ev.SD3_NET, num_layers=2, num_attention_heads=2, caption_projection_dim=128),
              "flux1": dict(guidance_embeds=True, num_layers=1, num_single_layers=1, num_attention_heads=2),
              "flux2-4b": dict(ev.K4_NET, num_layers=1, num_single_layers=1, num_attention_heads=2),
              "zimage": dict(dim=256, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2)}


def dry_run(tmp_path, monkeypatch, name, stage, *flags):
    """dry_run.json of a network of few layers on `meta`, and the run."""
    monkeypatch.setitem(ev.FULL_SIZE[name], "transformer", SMALL_NETS[name])
    seen, prepare = [], rtdmd.prepare
    monkeypatch.setattr(rtdmd, "prepare", lambda cfg: seen.append(prepare(cfg)) or seen[-1])
    ev.main(["--stage", str(stage), "--model", name, "--device", "meta", "--dry_run", "1", "--resolution", "64",
             "--text_length", "32", "--micro_batch", "1", "--out", str(tmp_path), "--cache", str(tmp_path), *flags])
    return json.loads((tmp_path / f"stage{stage}/dry_run.json").read_text()), seen[-1]


def tflop_by_hand(run, role, gradient):
    """TFLOP of one forward, and of its backward pass, from the layers' shapes: hooks on linears and convolutions,
    a formula for attention.

    A linear of (n, i) -> (n, o) is 2 n i o; the same again for the gradient of its input, and for that of its
    weight, where needed.
    """
    cost, hooks = dict(forward=0, backward=0), []

    def linear(layer, inputs, result):
        one = 2 * result.numel() * layer.weight[0].numel()
        cost["forward"] += one
        cost["backward"] += one * (inputs[0].requires_grad + layer.weight.requires_grad)
        if getattr(layer, "A", None) is not None:
            down, up = (2 * len(layer.A) * values.numel() for values in (inputs[0], result))
            cost["forward"] += down + up
            cost["backward"] += down * (inputs[0].requires_grad + layer.A.requires_grad)
            cost["backward"] += 2 * up * layer.B.requires_grad

    net = run.roles.nets[role]
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            hooks.append(module.register_forward_hook(linear))
    attention = F.scaled_dot_product_attention

    def counted(query, key, value, **options):
        products = 4 * query.numel() * key.shape[2]                # of q and k, of the weights and v: 2 n m d each
        cost["forward"] += products
        cost["backward"] += 2 * products * query.requires_grad
        return attention(query, key, value, **options)

    x, cond = torch.empty(1, *run.backbone.latent_shape, device="meta"), run.text.batch(run.prompts[:1], "meta")
    F.scaled_dot_product_attention = counted
    with torch.set_grad_enabled(gradient):
        run.roles.velocity(role, x, torch.ones(1, device="meta"), cond)
    F.scaled_dot_product_attention = attention
    for hook in hooks:
        hook.remove()
    return cost["forward"] / 1e12, cost["backward"] / 1e12 if gradient else 0.0


@pytest.mark.parametrize("name, stage", [("sd3m", 1), ("sd3m", 2), ("flux1", 1), ("flux2-4b", 1), ("zimage", 2)])
def test_counted_costs_are_those_on_paper(tmp_path, monkeypatch, name, stage):
    """Forwards. Stage 1, F fake updates: F of the rollout, 3 F of the fake score (2 with gradient), (K-1)/2 + 1 of
    the generator, for Eq. 9 2 of the guided teacher (FLUX.1: 1) and 1 of the fake score. Stage 2: K, 3, M + 1 and
    again 3."""
    flags = "--batch 4 --fake_updates 1" if stage == 1 else "--groups 1 --group_size 4 --rewards hpsv2=1"
    if stage == 2:
        monkeypatch.setitem(ev.CLIP_SIZES, "hpsv2", "ViT-B-32")
    costs, run = dry_run(tmp_path, monkeypatch, name, stage, "--consistency_share", "1", *flags.split())
    forwards = {n: f for n, f in costs["forwards"].items() if not n.startswith(("decoder", "hpsv2"))}
    plain, graded = {1: (2.5, 1), 2: (4, 3)}[stage]
    assert forwards == pytest.approx({"generator": plain, "generator with gradient": graded, "fake": 2,
                                      "fake with gradient": 2, "teacher": 1 if name == "flux1" else 2})
    by_hand = 0.0
    for role, number in forwards.items():
        forward, backward = tflop_by_hand(run, role.split()[0], "gradient" in role)
        by_hand += number * (forward + backward)
    assert costs["tflop_by_part"]["network"] == pytest.approx(by_hand, rel=1e-3)
    if stage == 2:
        assert costs["forwards"]["decoder"] == 1 and costs["forwards"]["hpsv2 with gradient"] == 1
        assert costs["tflop_by_part"]["decoder"] > 2 * costs["phases"]["reward"]["tflop_by_part"]["decoder"]


def test_a_share_of_the_consistency_term_is_counted_as_the_mean(tmp_path, monkeypatch):
    """--dry_run: an update with it is made and one without, whatever updates the seed gives it to."""
    flags, part = "--batch 4 --fake_updates 1".split(), ("--consistency_share", "0.25")
    every, mean, none = (dry_run(tmp_path, monkeypatch, "sd3m", 1, *flags, *more)[0]
                         for more in (("--consistency_share", "1"), part, ("--gamma", "0")))
    assert mean["forwards"]["fake"] == 1.25 and mean["forwards"]["fake with gradient"] == 1.25   # 1: matching's
    assert mean["forwards"]["generator"] == every["forwards"]["generator"] == none["forwards"]["generator"] == 2.5
    total = "tflop_per_sample"
    assert mean[total] == pytest.approx(.25 * every[total] + .75 * none[total])
    peak = lambda costs: costs["phases"]["fake"]["peak_bytes"]
    assert peak(none) < peak(every) == peak(mean)


def test_checkpointing_saves_memory_and_costs_a_forward(tmp_path, monkeypatch):
    """--checkpointing, as --dry_run counts it."""
    plain, _ = dry_run(tmp_path, monkeypatch, "sd3m", 1, "--batch", "4", "--fake_updates", "1")
    less, _ = dry_run(tmp_path, monkeypatch, "sd3m", 1, "--batch", "4", "--fake_updates", "1", "--checkpointing")
    assert less["phases"]["generator"]["peak_bytes"] < 0.95 * plain["phases"]["generator"]["peak_bytes"]
    assert plain["tflop_per_sample"] < less["tflop_per_sample"] < 1.5 * plain["tflop_per_sample"]


def test_the_peak_is_what_a_gpu_would_hold(tmp_path, monkeypatch):
    """Beside the weights, and nothing twice: the table has Adam's moments and the average by themselves. The norm
    of q and k keeps no fp32 copy of them, as its CUDA kernel does not."""
    costs, run = dry_run(tmp_path, monkeypatch, "flux2-4b", 1, "--batch", "4", "--fake_updates", "1")
    layers = {*run.roles.layers["generator"], *run.roles.layers["fake"]}     # they hold the cast of the last forward
    cast = sum(layer.A.nbytes + layer.B.nbytes for layer in layers if layer.A is not None)
    assert run.live["now"] - cast < 0.01 * costs["bytes"]["adapters"]    # all that is left over: the log's numbers
    x = torch.empty(1, 64, 2, 128, device="meta", dtype=torch.bfloat16, requires_grad=True)
    meter = ev.CostMeter
    norm, before = nn.RMSNorm(128, device="meta", dtype=torch.bfloat16).requires_grad_(False), run.live["now"]
    run.done = 0
    with meter(run, "norm"):
        y = norm(x)
        kept = run.live["now"] - before
        y.sum().backward()
    assert kept == y.nbytes == x.nbytes and x.grad.shape == x.shape


def test_each_phase_has_its_own_peak():
    """Also after the iteration that counts, on a CPU: the last phase's peak is not the others'."""
    run = SimpleNamespace(device="cpu", done=0, kind_weight=1, forwards={}, part="network", costs={},
                          standing_bytes=0, live=dict(now=0, peak=0, held=set()))
    for run.done in (0, 1, 2):
        for name, size in (("small", 10), ("large", 10_000)):
            with ev.CostMeter(run, name):
                torch.zeros(size) + 1
    assert run.costs["large"]["peak_bytes"] > 100 * run.costs["small"]["peak_bytes"] > 0


@pytest.mark.parametrize("gradient", [False, True])
def test_a_product_counts_the_same_on_every_device(gradient):
    """The CPU has an attention of its own, and open_clip's layer is one operation where nothing needs a gradient."""
    found = {}
    for device in ("meta", "cpu"):
        net = nn.MultiheadAttention(64, 4, batch_first=True, device=device).requires_grad_(False).eval()
        x = torch.zeros(2, 17, 64, device=device, requires_grad=gradient)
        run = SimpleNamespace(device=device, done=0, kind_weight=1, costs={}, forwards={}, part="network",
                              standing_bytes=0, live=dict(now=0, peak=0, held=set()))
        with ev.CostMeter(run, "x"):
            y = net(x, x, x, need_weights=False)[0]
            y.sum().backward() if gradient else None
        found[device] = run.costs["x"]["tflop"]["network"]
    linears, attention = 8 * 64 * 64 * (1 + gradient), 4 * 17 * 64 * (1 + 2 * gradient)      # weights are frozen
    by_hand = 2 * 17 * (linears + attention) / 1e12
    assert found == pytest.approx(dict.fromkeys(found, by_hand))


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_the_seconds_of_a_dry_run_are_an_iterations_mean(iterations, cache, tmp_path, monkeypatch):
    """By a clock that ticks when it is read, every phase takes a second, whatever share has the consistency term."""
    monkeypatch.setattr(ev.time, "perf_counter", lambda ticks=itertools.count(): float(next(ticks)))
    ev.main(["--dry_run", str(iterations), "--stage", "1", *SMALL, "--cache", str(cache), "--out", str(tmp_path),
             "--consistency_share", ".25"])
    phases = json.loads((tmp_path / "stage1/dry_run.json").read_text())["phases"]
    assert [phase["seconds"] for phase in phases.values()] == pytest.approx([1, 1, 1])


def test_a_network_that_two_rewards_share_counts_once(cache, tmp_path):
    """One judge, two of its outputs: its weights stand in memory once, and its work is the first one's."""
    ev.main(["--dry_run", "1", "--stage", "2", *SMALL, "--cache", str(cache), "--out", str(tmp_path), "--rewards",
             "attributes=1,strict=1"])
    found = json.loads((tmp_path / "stage2/dry_run.json").read_text())
    assert found["bytes"]["attributes"] > 0 and found["bytes"]["strict"] == 0
    assert "strict" not in found["phases"]["reward"]["forwards"]


def test_a_measurement_that_fails_costs_no_other(cache, tmp_path, monkeypatch):
    """The counts are on disk by then."""
    def fails(run, *arguments):
        yield "phase"
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(ev, "cost_lines", fails)
    with pytest.raises(SystemExit):
        ev.main(["--dry_run", "1", "--stage", "1", *SMALL, "--cache", str(cache), "--out", str(tmp_path)])
    assert json.loads((tmp_path / "stage1/dry_run.json").read_text())["tflop_per_sample"] > 0


@pytest.mark.parametrize("line", ["--ablations", "--dry_run 1 --stage 2 --model sd3m --device meta"])
def test_what_needs_one_process_refuses_torchrun(line, tmp_path, monkeypatch, capsys):
    """Each process would do all of it, and wait for the others in places."""
    monkeypatch.chdir(tmp_path)
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=29500).items():
        monkeypatch.setenv(name, str(value))
    eval_refused(capsys, line.split(), "leave out torchrun")
    assert not [*tmp_path.iterdir()]


def test_flux2_4b_trains_on_a_24_gb_card(tmp_path):
    """Stage 1, full size, 512 x 512, no recomputation; the peak is one sample's, so few steps suffice."""
    ev.main(f"--stage 1 --model flux2-4b --device meta --dry_run 1 --steps 2 --batch 2 "
            f"--fake_updates 1 --micro_batch 1 --consistency_share 1 --out {tmp_path} --cache {tmp_path}".split())
    assert json.loads((tmp_path / "stage1/dry_run.json").read_text())["peak_bytes"] < 24e9


def test_a_dry_run_counts_the_rest_if_no_reward_can_be_made(tmp_path, monkeypatch):
    """HPSv3 needs a download even for its size: it is left out and said to be, alone too."""
    costs, run = dry_run(tmp_path, monkeypatch, "sd3m", 2, *"--rewards hpsv3=1 --groups 1 --group_size 2".split())
    assert not run.rewards and costs["phases"]["generator"]["tflop_per_sample"] > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_a_dry_run_keeps_nothing_but_its_report(folders, tmp_path, monkeypatch, stage):
    """On the CPU with a real repository: the contract's keys, finite numbers, no checkpoint and no log."""
    monkeypatch.chdir(tmp_path)
    Path("vivid_judge.py").write_text(JUDGE)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    ev.main(["--stage", str(stage), "--model", "sd3m", "--pretrained", folders["sd3m"], "--dry_run", "2",
             "--out", "run", "--cache", "cache", *REAL_FLAGS.split()])
    costs = json.loads(Path(f"run/stage{stage}/dry_run.json").read_text())
    wanted = {"tflop_per_sample", "seconds", "peak_bytes"}
    assert all(costs[n] > 0 for n in wanted | {"weight_bytes"}) and sum(costs["forwards"].values()) > 5
    assert all(wanted | {"forwards"} <= phase.keys() for phase in costs["phases"].values())
    assert [p.name for p in Path(f"run/stage{stage}").iterdir()] == ["dry_run.json"]


# -----------------------------------------------------------------------------------------------------------------
# eval.py: ablations, and the experiments beyond the paper
# -----------------------------------------------------------------------------------------------------------------

def test_every_row_of_the_ablations_parses():
    """Flags that rtdmd.py knows and variants that exist; a row of two tables is one, others share no result file."""
    tables = [*ev.TABLE1, *((stage, name, rows) for stage, table in ((1, ev.STAGE1_ROWS), (2, ev.STAGE2_ROWS))
                            for name, rows in table.items())]
    rows = {(stage, row, words) for stage, _, question in tables for row, words in question.items()}
    assert ev.TABLE1_NAMES.keys() <= {row for _, row, _ in rows}
    assert len({ev.result_of(Path(), row, 0) for _, row, _ in rows}) == len(rows)
    for stage, _, words in rows:
        known = [word for word in words.split() if word[0] != "@"]
        if stage == 0:
            ev.parse(["--teacher", *known])
            continue
        rtdmd.resolve(rtdmd.parse_flags(["--stage", str(stage), *known]))
        assert all(word[1:] in ev.VARIANTS for word in words.split() if word[0] == "@")


def test_a_row_is_compared_with_the_first_seed_by_seed():
    """The difference over the seeds that both have: its error is that of pairs, not of two independent means."""
    row = lambda seed, value: dict.fromkeys(ev.TINY_COLUMNS, value) | dict(seed=seed, dm=0.5)
    results = {"first": [row(0, 0.1), row(1, 0.5), row(2, 0.9)], "other": [row(2, 1.2), row(1, 0.6), row(4, 7.0)]}
    head, _, first, other = (line.split("|")[1:-1] for line in ev.ablation_table(results, results).splitlines())
    at = [cell.strip() for cell in head].index("held-out accuracy - row 1")
    assert first[at].strip() == "" and other[at].strip() == "0.200±0.100"
    assert first[2].strip() == "0.500±0.231" and other[0].strip() == "other" and other[1].strip() == "3"


def test_ablations_go_on_where_they_were_stopped(flags, tmp_path, monkeypatch, cache, capsys):
    """A second call trains nothing, and a row that fails is one sentence. Each row has its forwards, stage 2's with
    those of its start; a row that is not trained has none, and pictures of its own seed."""
    small = " ".join(SMALL[2:])                                   # without --device, which the runner hands on
    first, second = "Table 3: the consistency term", "Table 4: the hybrid policy gradient"
    monkeypatch.setattr(ev, "STAGE1_ROWS", {first: {ev.BASE: small}})
    monkeypatch.setattr(ev, "STAGE2_ROWS", {second: {"DM only": f"{small} --policy_weight 0 --det_weight 0"}})
    monkeypatch.setattr(ev, "TABLE1", [(0, "Table 1, here", {"untrained": "", "teacher": "--nfe 2 --cfg 1.5"})])
    line = ["--ablations", "--seeds", "1", "--jobs", "2", "--cache", str(cache), "--pretrained", "tiny-1",
            "--device", "cpu", "--out", str(tmp_path / "abl")]
    ev.main(line)
    table = capsys.readouterr().out
    assert f"### {first}" in table and re.search(r"\| DM only \| 1 \| -\d", table)
    results = json.loads((tmp_path / "abl/results.json").read_text())
    assert set(results) == {ev.BASE, "DM only", "untrained", "teacher"}
    assert all(len(rows) == 1 for rows in results.values())
    reports = {row: json.loads((tmp_path / f"abl/{row}_0/report.json").read_text())
               for row in ("untrained", "teacher")}
    assert {row: (list(report["rows"]), *report["sampler"].values()) for row, report in reports.items()} == {
        "untrained": (["student_init"], dict(role="generator", nfe=4, eta=.9, guidance=1.0, lora=None)),
        "teacher": (["teacher"], dict(role="teacher", nfe=2, eta=0.0, guidance=1.5, lora=None))}
    # Stage 1: 8 rollout, 24 fake, 12 + 8 generator, 16 + 8 matching. Stage 2: 48 rollout, 36 fake, 24 + 12 matching,
    # and a forward with gradient for each of the 12 trajectories. Three iterations each.
    assert [results[row][0].get("forwards") for row in (ev.BASE, "DM only", "teacher")] == [228, 228 + 396, None]
    assert f"| {0.228 + 0.396:.1f} |" in table
    assert Image.open(tmp_path / "abl/curves.png").size[0] == 2 * 560
    result = ev.result_of(tmp_path / "abl", ev.BASE, 0)
    trained = result.stat().st_mtime_ns
    ev.main(line)
    assert capsys.readouterr().out == table and result.stat().st_mtime_ns == trained
    cfg = rtdmd.resolve(dict(cache=str(cache), pretrained="tiny-1", device="cpu"))
    with pytest.raises(rtdmd.UsageError, match="bad row.*is unknown"):
        ev.ablation(tmp_path / "abl", cfg, 2, "bad row", f"{small} --rewards beauty=1", 0)


def works(file):
    """A process of the ablations, at work."""
    ev.begin_worker(1)
    file.write_text(str(os.getpid()))
    time.sleep(60)


def leads(file):
    """A program that has such a process."""
    multiprocessing.get_context("fork").Process(target=works, args=(file,)).start()
    time.sleep(60)


def test_a_worker_ends_with_its_program(tmp_path):
    """It would train on alone, and its locked folder would keep the same command from going on."""
    FORK.set_forkserver_preload([Path(__file__).stem])
    program, file = FORK.Process(target=leads, args=(tmp_path / "pid",)), tmp_path / "pid"
    program.start()
    wait_for(file, [program])
    program.kill()
    stat, end = Path("/proc") / file.read_text() / "stat", time.monotonic() + 300
    while stat.exists() and stat.read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < end, "it works on alone"
        time.sleep(0.1)


@pytest.mark.parametrize("only, base, rows", [
    ("nonsense", None, None), ("lag, gamma 0", [], ["lag, gamma 0"]), ("stage 1: eta 0", [], [ev.BASE, "eta 0"]),
    ("behind, gamma 1", [ev.BASE], ["behind, gamma 0", "behind, gamma 1"]),
    ("strict, SubGRPO M=1", [ev.BASE], ["strict, naive GRPO", "strict, SubGRPO M=1"]),
    ("both stages, a fake score with", ["a fake score with gates for k", ev.BASE],
     [ev.BASE_2, "both stages, a fake score with gates for k"]),
    ("Table 1 in small: not", [], ["teacher, 50 steps, guidance 1.5", "teacher, 50 steps",
                                   "untrained student, 4 steps"]),
    ("Table 1", [ev.BASE], list(dict.fromkeys(row for _, _, rows in ev.TABLE1 for row in rows)))])
def test_ablations_train_what_is_asked_for(only, base, rows, tmp_path, monkeypatch, capsys):
    """And what it starts from or is compared with. Nothing, said in one line, where --only names nothing."""
    trained = []
    monkeypatch.setattr(ev, "train_rows", lambda jobs, *_: trained.append([job[1] for job in jobs]))
    monkeypatch.setattr(ev, "TinyBackbone", lambda cfg: trained.append("world"))
    line = ["--ablations", "--seeds", "1", "--only", only, "--out", str(tmp_path / "abl")]
    if rows is None:
        with pytest.raises(SystemExit):
            ev.main(line)
        assert "'nonsense' names no row" in capsys.readouterr().err and nothing_in(tmp_path / "abl")
        return
    ev.main(line)
    assert trained == ["world", base, rows] and "rows without a result." in capsys.readouterr().out


@pytest.mark.parametrize("size", [4, 3])
def test_antithetic_noise(size, flags):
    """The other half of a group has minus the noise where it is drawn anew, Eq. 16; shared noise stays shared."""
    cfg, half = rtdmd.resolve(rtdmd.parse_flags(flags(2, "--group_size", size))), size // 2
    run = SimpleNamespace(cfg=cfg, device="cpu", backbone=SimpleNamespace(latent_shape=(3, 5, 5)))
    plain = rtdmd.group_draws(run, 0, range(6))
    with ev.replaced(["antithetic"], None):
        first, noise, subsets = rtdmd.group_draws(run, 0, range(6))
    assert torch.equal(subsets, plain[2]) and rtdmd.group_draws(run, 0, range(6))[1].equal(plain[1])
    first, noise = first.unflatten(0, (6, size)), noise.unflatten(1, (6, size))
    assert torch.equal(first[:, half:2 * half], -first[:, :half])
    assert torch.equal(first[:, 2 * half:], plain[0].unflatten(0, (6, size))[:, 2 * half:])
    for g in range(6):
        for k in (1, 2, 3):
            if k in subsets[size * g]:
                assert torch.equal(noise[k - 1, g, half:2 * half], -noise[k - 1, g, :half])
            else:
                assert torch.equal(noise[k - 1, g], noise[k - 1, g, :1].expand_as(noise[k - 1, g]))


def test_what_a_group_shares(flags):
    """Eq. 16: S, its own for every prompt (DEPARTURE 10), and the noise outside S; with independent_noise no
    noise, with shared_start x_{t_0} too."""
    cfg = rtdmd.resolve(rtdmd.parse_flags(flags(2, "--group_size", 4, "--subset_size", 1)))
    run = SimpleNamespace(cfg=cfg, device="cpu", backbone=SimpleNamespace(latent_shape=(3, 5, 5)))
    for names, noise_is_shared, start_is_shared in (((), True, False), (("independent_noise",), False, False),
                                                    (("shared_start",), True, True)):
        with ev.replaced(names, None):
            first, noise, subsets = rtdmd.group_draws(run, 0, range(6))
        first, noise, S = first.unflatten(0, (6, 4)), noise.unflatten(1, (6, 4)), subsets.view(6, 4).tolist()
        alike = lambda x: bool((x == x[:1]).all())
        assert all(len(set(group)) == 1 for group in S) and len({group[0] for group in S}) == 3
        assert all(alike(first[g]) is start_is_shared for g in range(6))
        for g, k in itertools.product(range(6), (1, 2, 3)):
            assert alike(noise[k - 1, g]) is (noise_is_shared and k != S[g][0])


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_pathwise_through_more_steps_is_the_gradient_with_fixed_noise(steps, flags, monkeypatch):
    """Eq. 15 through the last steps of a rollout against central differences of the mean reward, noise held
    fixed, along one direction; states before those steps held fixed as well."""
    run = prepared(flags(2, "--policy_weight", 0, "--dm_weight", 0))
    cfg, groups = run.cfg, rtdmd.share(run.cfg.groups)
    monkeypatch.setattr(rtdmd, "optimizer_step", lambda run, role: False)          # the gradient stays where it is
    smooth = lambda images, prompts: torch.tanh(images.flatten(1).double() @ weights).float()   # no clamp anywhere
    weights = torch.randn(1728, generator=rng(9)).double() / 20
    smooth.differentiable, run.backbone.decode, run.rewards = True, lambda x: x, dict(smooth=(smooth, 1.0))
    b = SimpleNamespace(ids=list(range(12)), prompts=[p for p in run.prompts[:4] for _ in range(3)])
    start, noise, S = rtdmd.group_draws(run, 0, groups)
    b.slots = torch.nn.functional.pad(S, (0, 1), value=4)
    b.states = rtdmd.rollout_in_chunks(run, start, noise, b.prompts)
    run.terms = {}
    with ev.replaced(["no_std"], None):
        rtdmd.judge_groups(run, b)
    params = [run.roles.flat["generator"]]
    direction = [torch.randn(p.shape, generator=rng(i)) * p.norm() / p.numel() ** 0.5
                 for i, p in enumerate(params)]
    with ev.replaced([f"pathwise_{steps}"], None):
        rtdmd.reinforce(run, 0, 0, b)
    slope = -sum((p.grad * d).sum() for p, d in zip(params, direction)).item()
    k = cfg.steps - steps

    def reward(size):
        for p, d in zip(params, direction):
            p.data += size * d
        times = run.times[k:]
        with torch.no_grad():
            cond = run.text.batch(b.prompts, "cpu")
            velocity = lambda x, t: run.roles.velocity("generator", x, t, cond)
            states, _ = rtdmd.rollout(velocity, b.states[k], noise[k:], times, cfg.eta)
        value = smooth(states[-1], b.prompts).double().mean().item()
        for p, d in zip(params, direction):
            p.data -= size * d
        return cfg.beta * cfg.det_weight * value / b.states[0, 0].numel()
    truth = (reward(0.005) - reward(-0.005)) / 0.01
    assert abs(slope - truth) < 0.01 * abs(truth), (slope, truth)


TABLE1_BUDGETS = {"distillation": (93_600, 0), "with gradient": (38_400, 93_600),
                  "without gradient": (38_400, 93_600)}


@pytest.mark.parametrize("row", [row for stage, _, rows in ev.TABLE1 if stage for row in rows])
def test_the_rows_of_table_1_spend_the_same_forwards(row, cache, tmp_path, monkeypatch):
    """Every row trains, at its own size, and its iterations take the budget of its block to within 5 %. From the
    second iteration on all cost the same, but for the draw of the step that is matched in stage 2, and the updates
    that have the consistency term, which are known: two passes more of all samples. The reward here tells the pictures
    of a group apart, which TDM-R1's surrogate needs, and a judge of noise would not."""
    scores = lambda judge, images, captions: (images.mean((1, 2, 3)), torch.arange(len(images)) % 2.0)
    monkeypatch.setattr(ev, "judge_scores", scores)
    (stage, name, words), = [(stage, name, rows[row]) for stage, name, rows in ev.TABLE1 if row in rows]
    words = words.split()
    flags = [word for word in words if word[0] != "@"]
    line = ["--stage", str(stage), "--device", "cpu", "--pretrained", "tiny-1", "--cache", str(cache),
            "--out", str(tmp_path), "--max_prompts", "24", *flags]
    cfg = rtdmd.resolve(rtdmd.parse_flags(line))
    if stage == 2:                                                           # a start of full rank, as it begins
        rtdmd.main([*line[2:10], "--stage", "1", "--iterations", "1", "--batch", "4", "--fake_updates", "1"])
    tried = 2 if "@dmd_regression" in words else 1                           # it makes its pairs in the first
    with ev.replaced([*(word[1:] for word in words if word[0] == "@"), "counted"], None):
        rtdmd.main([*line, "--iterations", str(tried)])
    found = [line["forwards"] for line in rows_of(tmp_path / f"stage{stage}")]
    own, start = next(budget for part, budget in TABLE1_BUDGETS.items() if part in name.split(",")[0])
    whole = "@from_the_teacher" in words or "both stages" in row
    wanted = own if not whole else own + start if start else own + 38_400
    samples = cfg.batch if stage == 1 else cfg.groups * cfg.group_size
    terms = [2 * samples * sum(rtdmd.has_consistency(cfg, it, update) for update in range(cfg.fake_updates))
             if cfg.gamma and cfg.dm_weight else 0 for it in range(cfg.iterations)]
    first, last = (found[it] - terms[it] for it in (0, tried - 1))
    assert abs(first + (cfg.iterations - 1) * last + sum(terms) - wanted) < 0.05 * wanted
    assert all(math.isfinite(v) for line in rows_of(tmp_path / f"stage{stage}") for v in line.values())


# Stage 1: as in the ablations' test above. Stage 2: 48 rollout, 12 fake, 24 + 12 matching, 12 generator.
@pytest.mark.parametrize("stage, forwards", [(1, 76), (2, 108)])
def test_forwards_are_counted(stage, forwards, flags, tmp_path):
    """Each sample of each pass, 2 for the guided teacher; the panel's are left out, and nothing else changes."""
    words = ["--sample_every", 2, *(["--policy_weight", 0, "--det_weight", 0, "--gamma", 0] if stage == 2 else [])]
    rtdmd.main(flags(stage, *words, "--out", tmp_path / "plain"))
    with ev.replaced(["counted"], None):
        rtdmd.main(flags(stage, *words))
    plain, rows = (rows_of(tmp_path / f"{run}/stage{stage}") for run in ("plain", "run"))
    counts = [row.pop("forwards") for row in rows]
    assert rows == plain and counts == [forwards] * 3


def test_tdm_draws_levels_from_the_steps_own_interval():
    """TDM: t = s + (t_{k-1} - s) (.01 + .98 u), where the paper's Eq. 8 has 1 for t_{k-1}."""
    run = SimpleNamespace(times=rtdmd.timestep_schedule(4, 3.0), backbone=SimpleNamespace(quantise=lambda t: t))
    s, u = (x.float().view(-1, 1, 1) for x in (run.times[[1, 2, 3, 4]], torch.tensor([0.0, 0.5, 0.75, 1.0])))
    with ev.replaced(["tdm_intervals"], None):
        t = rtdmd.draw_level(run, s, u)
    above = run.times[[0, 1, 2, 3]].view(-1, 1, 1)
    close(t, s + (above - s) * (0.01 + 0.98 * u))
    assert (rtdmd.draw_level(run, s, u) > t).all()


def test_dmd2_matches_the_x_prediction_in_stage_2_too(flags, monkeypatch):
    """At eta 1. The pull on a step's mean is the gradient at the x-prediction: through v it is -t_{k-1} times it."""
    run = prepared(flags(2, "--eta", 1, "--policy_weight", 0))
    b = SimpleNamespace(ids=list(range(12)), prompts=[p for p in run.prompts[:4] for _ in range(3)])
    start, noise, S = rtdmd.group_draws(run, 0, range(4))
    b.slots, seen = torch.nn.functional.pad(S, (0, 1), value=4), []
    slots = [0, 1, 2] * 2                                                    # of the trajectories 3 to 8
    k = torch.tensor([S[3 + i, m] if m < 2 else 4 for i, m in enumerate(slots)])
    weights = torch.randn(6, *run.backbone.latent_shape, generator=rng())

    def matching_loss(run, x_s, s, cond, u, noise):
        seen.append(x_s.detach().clone())
        assert not s.any() and s.shape == (6, 1, 1, 1)
        return (weights * x_s).flatten(1).sum(1).mean()

    monkeypatch.setattr(rtdmd, "matching_loss", matching_loss)
    with ev.replaced(["dmd2_renoising"], None):
        b.states = rtdmd.rollout_in_chunks(run, start, noise, b.prompts)
        pull = rtdmd.matching_pull(run, b, slice(3, 9), slots, torch.rand(6), torch.zeros(6))
    x, t, t_next = b.states[k - 1, range(3, 9)], *(rtdmd.level(run.times[j], b.states[0]) for j in (k - 1, k))
    cond = run.text.batch(b.prompts[3:9], "cpu")
    close(seen[0], rtdmd.x0_from_velocity(x, run.roles.velocity("generator", x, t, cond), t), 1e-4)
    v = torch.randn(x.shape, generator=rng(1)).requires_grad_()
    mean, _ = rtdmd.cps_mean_std(x, v, t, t_next, 1.0)
    close(torch.autograd.grad((pull * mean).sum(), v)[0], -t * weights, 1e-4)


def test_dmd_regresses_on_the_teachers_pictures(flags, monkeypatch):
    """Its gradient beside the matching term's is that of .25 times the mean square of G(z) - y, where y is the end of
    the guided teacher's Euler steps from z, written out."""
    run = prepared(flags(1))
    monkeypatch.setattr(rtdmd, "update_generator", lambda run, it, first: None)     # leaves the gradient alone
    with ev.standing_in(ev.dmd_regression(None, pairs=2, steps=3)):
        rtdmd.update_generator(run, 0, 0)                                    # batch / K is 2: both pairs
    found = run.roles.flat["generator"].grad.clone()
    prompts = [run.prompts.at(i) for i in range(2)]
    keys = [rtdmd.key(run.cfg.seed, "pair", i) for i in range(2)]
    _, (z,) = rtdmd.draw(keys, 0, 1, run.backbone.latent_shape, "cpu")
    cond, null, y = run.text.batch(prompts, "cpu"), run.text.batch(["", ""], "cpu"), z
    with torch.no_grad():
        for t in (1.0, 2 / 3, 1 / 3):
            level = torch.full((2,), t)
            v_c, v_u = (run.roles.velocity("teacher", y, level, c) for c in (cond, null))
            y = y - (v_u + 1.5 * (v_c - v_u)) / 3
    x_0 = z - run.roles.velocity("generator", z, torch.ones(2), cond)
    truth, = torch.autograd.grad(0.25 * (x_0 - y).square().mean(), run.roles.flat["generator"])
    assert found.norm() > 0 and (found - truth).norm() < 1e-4 * truth.norm()


def test_a_stage_2_without_a_cold_start(flags, tmp_path):
    """Student and fake score begin as the teacher; a run that was stopped goes on from its own checkpoint."""
    words = ["--policy_weight", 0, "--iterations", 1]
    with ev.replaced(["from_the_teacher"], None):
        run = prepared(flags(2, *words))
        for role in ("generator", "fake"):
            assert not any(p.any() for n, p in run.roles.named[role].items() if "lora_B" in n)
        assert torch.equal(run.ema, run.roles.flat["generator"])
        rtdmd.main(flags(2, *words))
        again = prepared(flags(2, *words))
    assert again.done == 1 and torch.equal(again.ema, state_of(tmp_path / "run/stage2")["ema"])
    assert not torch.equal(again.ema, run.ema)


def test_a_surrogate_learns_a_reward_without_gradient(flags, monkeypatch):
    """TDM-R1: at first it is 0; then it ranks the pictures of a group as the reward does; what the student is told is
    half the difference of the squared errors of teacher and surrogate, with its gradient in the picture. The gradient
    that the student's update leaves in it is thrown away."""
    run = prepared(flags(2, "--rewards", "strict=1", "--policy_weight", 0, "--lr_fake", .003))
    prompts, x = [p for p in run.prompts[:4] for _ in range(3)], torch.randn(12, 3, 24, 24, generator=rng())
    b = SimpleNamespace(ids=range(12), states=x[None], prompts=prompts,
                        advantages=torch.tensor([1., -1, 0] * 3 + [0., 0, 0]))   # the last group says nothing
    monkeypatch.setattr(rtdmd, "prepare", lambda cfg: run)
    monkeypatch.setattr(rtdmd, "judge_groups", lambda run, b: None)
    with ev.replaced(["tdm_r1"], None):
        assert rtdmd.prepare(run.cfg) is run and all(reward.differentiable for reward, _ in run.rewards.values())
        tell = lambda: rtdmd.pathwise_terms(run, x, prompts, {})
        assert tell() == 0
        for run.done in range(40):
            run.terms, run.roles.flat["surrogate"].grad = {}, torch.full_like(run.roles.flat["surrogate"], 1e6)
            rtdmd.judge_groups(run, b)
        assert rtdmd.gather(run)["surrogate_right"] > 0.99 and run.terms["surrogate_right"][1] == 2 * 4
        x.requires_grad_()
        told = tell()
    keys = [rtdmd.key(run.cfg.seed, run.done, "surrogate", "teaches", 12, i) for i in range(12)]
    u, (noise,) = rtdmd.draw(keys, 1, 1, run.backbone.latent_shape, "cpu")
    t, cond = rtdmd.level(0.01 + 0.98 * u[0], x), run.text.batch(prompts, "cpu")
    teacher, surrogate = ((run.roles.velocity(role, (1 - t) * x + t * noise, t, cond) - noise + x).square().sum()
                          for role in ("teacher", "surrogate"))
    close(told, (surrogate - teacher) / 2 / 12 / 1728, 1e-4)
    gradient, = torch.autograd.grad(told, x)
    assert gradient.flatten(1).any(1).all()


@pytest.mark.parametrize("name, size", [("fake_knows_k", ev.TINY_WIDTH), ("fake_gates_k", None)])
def test_a_fake_score_that_knows_k(name, size, flags, tmp_path):
    """DEPARTURE 18: what tells it k begins at zero, where it is the plain fake score, and learns; the null has no k.
    Stage 2 goes on with it."""
    rtdmd.main(flags(1, "--out", tmp_path / "plain", "--iterations", 1))
    with ev.replaced([name], None):
        rtdmd.main(flags(1, "--out", tmp_path / "knows", "--iterations", 2))    # B is zero in the first, so g stays
        rtdmd.main(flags(2, "--out", tmp_path / "knows", "--init", tmp_path / "knows/stage1", "--iterations", 1))
    plain, knows = rows_of(tmp_path / "plain/stage1")[0], rows_of(tmp_path / "knows/stage1")[0]
    run = prepared(flags(1, "--out", tmp_path / "other"))
    size = size or len(run.roles.layers["fake"]) * run.cfg.lora_rank
    told = [state_of(tmp_path / f"knows/stage{i}")["fake"][-5 * size:].view(5, -1) for i in (1, 2)]
    assert plain["dsm"] == knows["dsm"] and not told[0][0].any()
    assert told[0][1:].any(1).all() and (told[0][1:] != told[1][1:]).any(1).all()
    run.backbone.nets["generator"].to("meta")                               # it lives where the network does
    with ev.replaced([name], None):
        assert rtdmd.Roles(run.backbone, run.cfg).flat["fake"].is_meta


def test_the_documents_way_to_train_with_a_variant(flags, tmp_path, monkeypatch):
    """The file of docs/claims.md, with rtdmd's own flags."""
    file = written(tmp_path, "with_gates.py", readme_block("# with_gates.py", README.parent / "docs/claims.md"))
    monkeypatch.setattr(sys, "argv", [str(file), *flags(1, "--iterations", 1)])
    runpy.run_path(str(file), run_name="__main__")
    run = prepared(flags(1, "--out", tmp_path / "other"))
    gates = 5 * len(run.roles.layers["fake"]) * run.cfg.lora_rank
    assert state_of(tmp_path / "run/stage1")["fake"].numel() == run.roles.flat["fake"].numel() + gates


def test_gates_for_k(flags, tmp_path):
    """B (1 + g_k) A: the fake score of a sample with step k is the plain one with scaled rows of A."""
    with ev.replaced(["fake_gates_k"], None):
        run = prepared(flags(1, "--out", tmp_path))
        flat, named = run.roles.flat["fake"].data, run.roles.named["fake"]
        flat.copy_(0.3 * torch.randn(flat.shape, generator=rng()))
        cond, gates = run.text.batch([f"{run.prompts[0]}\0{k}" for k in (2, 3)], "cpu"), named["steps"].clone()
        x, t = torch.randn(2, *run.backbone.latent_shape, generator=rng(1)), torch.tensor([.4, .8])
        found = run.roles.velocity("fake", x, t, cond)
        named["steps"].zero_()
        for row, k in enumerate((2, 3)):
            flat_before = flat.clone()
            for layer, name in enumerate(n for n in named if n.endswith("lora_A.weight")):
                named[name].mul_(1 + gates[k, layer][:, None])
            assert torch.allclose(run.roles.velocity("fake", x, t, cond)[row], found[row], atol=1e-3, rtol=1e-4)
            flat.copy_(flat_before)


def test_a_fake_score_that_starts_from_zero(flags, begun):
    """The generator is the trained one, averaged; the fake score is the teacher."""
    with ev.replaced(["fake_from_zero"], begun / "stage1"):
        run = prepared(flags(1))
    trained = state_of(begun / "stage1")
    assert torch.equal(run.roles.flat["generator"], trained["ema"]) and torch.equal(run.ema, trained["ema"])
    assert not any(p.any() for n, p in run.roles.named["fake"].items() if "lora_B" in n)


def test_the_held_out_judge_chooses_a_checkpoint(tmp_path):
    """Its score is averaged with the neighbours of a panel: one lucky panel does not win."""
    scores = {10: -.6, 20: -.1, 25: -.4, 30: -.7, 40: -.3, 50: -.2, 60: -.5}
    lines = [json.dumps(dict(iteration=i, watch_heldout=score)) for i, score in scores.items()]
    written(tmp_path, "metrics.jsonl", "\n".join(lines) + "\n")
    for i in (20, 30, 50, 60):
        (tmp_path / f"checkpoint-{i:06d}").mkdir()
    assert ev.best_checkpoint(tmp_path).name == "checkpoint-000050"


def test_curves_of_a_run(tmp_path, monkeypatch):
    """From whole lines only; the last line need not be one of a panel. Nothing is drawn of nothing."""
    for stage in (1, 2):
        (tmp_path / f"stage{stage}").mkdir()
        written(tmp_path, f"stage{stage}/metrics.jsonl", "")
    ev.draw_run_curves(tmp_path, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
    lines = [json.dumps(dict(iteration=i, dm=-1.0, reward_a=i / 4) | (dict(watch_b=.5) if i == 2 else {}))
             for i in (1, 2, 3)]
    for stage, text in ((1, '{"iteration": 1, "d'), (2, "\n".join(lines) + '\n{"iteration": 4, "dm": 0')):
        written(tmp_path, f"stage{stage}/metrics.jsonl", text)
    ev.draw_run_curves(tmp_path, tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").size[0] == 1120
    for line in ('{"iteration": 1, "dm": }', '{"dm": 1}', '{"iteration": "1"}', '{"iteration": 1, "dm": NaN}',
                 '{"iteration": 1, "dm": null}'):                                    # edited by hand
        written(tmp_path, "stage1/metrics.jsonl", line + "\n")
        with pytest.raises(rtdmd.UsageError, match="has lines that no run wrote"):
            ev.draw_run_curves(tmp_path, tmp_path / "c.png")
    written(tmp_path, "stage1/metrics.jsonl", "")
    drawn = {}
    monkeypatch.setattr(ev, "draw_curves", lambda path, panels: drawn.update(panels))
    ev.draw_run_curves(tmp_path, tmp_path / "c.png")
    gap, rewards = drawn.values()
    assert list(drawn)[0].startswith("stage 2: dm") and gap == {"dm": [(1, -1), (2, -1), (3, -1)]}
    assert rewards == {"reward_a": [(1, .25), (2, .5), (3, .75)], "watch_b": [(2, .5)]}


def test_a_curve_is_smoothed_over_what_was():
    """The mean over logs, then over the last lines: a step at 20 is not seen before it."""
    logs = [[dict(iteration=i, x=float(i >= 20) + side) for i in range(40)] for side in (-1, 1)]
    curve = dict(ev.mean_curve(logs, "x"))
    assert [curve[i] for i in (0, 19, 20, 21, 24, 39)] == pytest.approx([0, 0, .2, .4, 1, 1])


def test_ticks_are_round():
    """Some five of them, inside the range, multiples of one round step."""
    assert ev.ticks(1, 50) == [10, 20, 30, 40, 50] and ev.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    for low, high in ((-0.351, -0.0605), (0.0386, 0.0933), (3.0, 4.0), (1, 6)):
        found = ev.ticks(low, high)
        assert 3 <= len(found) <= 7 and low <= found[0] and found[-1] <= high


def test_curves(tmp_path):
    """One panel beside the other; a level curve and a single point have an axis too."""
    panels = {"a": {"x": [(1, 0.0), (2, 1.0)], "y": [(1, 1.0), (2, 0.0)]}, "b": {"x": [(1, 3.0)]}}
    ev.draw_curves(tmp_path / "c.png", panels)
    pixels = np.array(Image.open(tmp_path / "c.png"))
    assert pixels.shape[1] == 1120 and all((pixels[:300] == colour).all(2).any() for colour in ev.LINE_COLOURS[:2])


# -----------------------------------------------------------------------------------------------------------------
# eval.py: faults that outsiders found
# -----------------------------------------------------------------------------------------------------------------

# ---- Adapters and rows

GOOD_ADAPTER = dict(model="tiny", steps=3, eta=.7, resolution=24, text_length=0)


def saved_adapter(folder, value=0.0, **facts):
    """An adapter of one matrix pair, whose metadata has these facts; one that is ... is left out."""
    tensors = {"attn.lora_A.weight": torch.full((4, 2), value), "attn.lora_B.weight": torch.zeros(2, 4)}
    rtdmd.save_lora(folder, tensors, 4, 4, ["attn"], GOOD_ADAPTER)
    with rtdmd.safe_open(folder / rtdmd.LORA_FILE, "pt") as file:
        info = json.loads(file.metadata()["rtdmd"]) | facts
    text = json.dumps({name: fact for name, fact in info.items() if fact is not ...})
    content = rtdmd.safetensors_bytes(tensors, metadata={"rtdmd": facts.get("text", text)})
    (folder / rtdmd.LORA_FILE).write_bytes(content)
    return folder


NO_NUMBERS = [..., None, "4", 3.5, 0, -1, 10**30, True, [4], {}]
WRONG_FACTS = [*itertools.product(("rank", "alpha", "steps"), NO_NUMBERS),
               *itertools.product(["resolution"], [..., None, "24", 24.5, 0, 10**30]), ("rank", 64),
               *itertools.product(["eta"], [..., None, "1", 5, -1, math.nan, [1]]), ("steps", 1),
               *itertools.product(["text_length"], [None, "x", -1, 10**30, 2.5]),
               *itertools.product(["model"], [..., None, 3, ["tiny"]]),
               *itertools.product(["targets"], [..., None, "attn", 3, [3]])]


def test_an_adapters_metadata_is_checked_like_flags(tmp_path, capsys):
    """Each field that is missing, of another type or out of range is named, with the file; so are broken values."""
    line = ["--lora", str(tmp_path), "--device", "cpu"]
    for field, value in WRONG_FACTS:
        saved_adapter(tmp_path, **{field: value})
        eval_refused(capsys, line, f"{rtdmd.LORA_FILE}: the field '{field}' .*: take another checkpoint")
    for text in ("[" * 100_000, "[]", "3", "null", '"x"', "{}", "{"):
        saved_adapter(tmp_path, text=text)
        eval_refused(capsys, line, f"{rtdmd.LORA_FILE}")
    for value in (math.nan, math.inf):
        saved_adapter(tmp_path, value=value)
        eval_refused(capsys, line, f"{rtdmd.LORA_FILE}: its tensor 'attn.lora_A.weight' .*no finite numbers")
    saved_adapter(tmp_path, model="sd3m")
    with pytest.raises(rtdmd.UsageError, match="adapter is one of 'sd3m'"):
        ev.plan(*ev.parse(line))
    saved_adapter(tmp_path, steps=..., eta=..., resolution=...)      # a flag may say what it does not
    assert ev.plan(*ev.parse([*line, "--nfe", "2", "--eta", "0", "--resolution", "24"]))


@pytest.mark.parametrize("field, value", [
    ("steps", "x"), ("steps", None), ("steps", 10**30), ("eta", 5), ("eta", math.nan), ("resolution", [3]),
    ("seed", "x"), ("guidance", "7"), ("text_length", -1), ("model", 3), ("cache", None), ("dtype", "fp16")])
def test_a_run_json_is_checked_like_flags(field, value, tmp_path, capsys):
    """It is used like them."""
    (tmp_path / "stage1").mkdir()
    written(tmp_path, "stage1/run.json", json.dumps(dict(config={field: value})))
    eval_refused(capsys, ["--run_folder", str(tmp_path)], f"run.json: the field '{field}'")
    written(tmp_path, "stage1/run.json", "[" * 100_000)
    eval_refused(capsys, ["--run_folder", str(tmp_path)], "run.json is damaged")


def test_rows_have_names_of_their_own(tmp_path, monkeypatch, capsys):
    """--lora does not replace a row of the run or the teacher; "." and ".." are called by their folder's name."""
    (tmp_path / "A/stage1").mkdir(parents=True)
    written(tmp_path, "A/stage1/run.json", '{"config": {}}')
    for name in ("A/stage1/checkpoint-000001", "B/stage1", "B/teacher", "B/x/y", "stage1"):
        saved_adapter(tmp_path / name)
    monkeypatch.chdir(tmp_path / "B/x/y")
    monkeypatch.setattr(rtdmd, "find_checkpoint", lambda path: Path(path) / "checkpoint-000001")
    rows = lambda *line: ev.plan(*ev.parse([*map(str, line), "--device", "cpu"]))
    run, usual = ["--run_folder", tmp_path / "A"], ["teacher", "teacher_cfg", "student_init", "stage1"]
    assert [*rows(*run)] == usual
    (tmp_path / "C/stage1").mkdir(parents=True)
    written(tmp_path, "C/stage1/run.json", '{"config": {"guidance": 1.0}}')        # a guided row would be the first one
    assert [*rows("--run_folder", tmp_path / "C")] == ["teacher", "student_init"]
    both = rows(*run, "--lora", tmp_path / "B/stage1")
    assert [*both] == [*usual, "stage1 of B"] and both["stage1"]["lora"] != both["stage1 of B"]["lora"]
    assert [*rows(*run, "--lora", tmp_path / "A/stage1/checkpoint-000001")] == [*usual, "checkpoint-000001"]
    assert [*rows("--teacher", "--lora", tmp_path / "B/teacher")] == ["teacher", "teacher of B"]
    assert [*rows("--lora", tmp_path / "B/teacher")] == ["teacher of B"]           # it is none
    assert [*rows("--lora", ".")] == ["y"]
    assert [*rows(*run, "--teacher")] == usual                                     # it is that of the run
    other = rows(*run, "--teacher", "--nfe", 9, "--cfg", 7)
    assert [*other] == [*usual, "teacher_2"] and other["teacher"]["nfe"] == 50 and other["teacher_2"]["guidance"] == 7
    (tmp_path / "B/x/y/z").mkdir()
    monkeypatch.chdir(tmp_path / "B/x/y/z")
    assert [*rows("--lora", "..")] == ["y"]
    saved_adapter(tmp_path / "B/stage1 of B")
    monkeypatch.setattr(ev, "folder_name", lambda path: "stage1")
    assert [*rows(*run, "--lora", tmp_path / "B/stage1")] == [*usual, "stage1 of stage1"]
    ev.add_row(found := {"stage1 of stage1": None} | both, tmp_path / "A/stage1", both["stage1"])
    assert len(found) == 6                                                     # the very same adapter: no second row
    with pytest.raises(rtdmd.UsageError, match="second row called 'stage1': rename its folder"):
        ev.add_row(found, tmp_path / "C/stage1", both["teacher"] | dict(lora=tmp_path))


def test_names_of_rows_are_names_of_folders():
    """Whatever a path ends in."""
    for path in ("/", ".", "..", "a/..", "/x/" + "é" * 300, "/x/a\nb", os.fsdecode(b"/x/a\xff"), "/x/\u202eab"):
        name = ev.folder_name(path)
        assert name and name not in (".", "..") and "/" not in name and name.isprintable()
        assert len(name.encode()) < 255


def test_checkpoints_of_two_kinds_are_not_sampled_as_one(tmp_path, capsys):
    """Rank and alpha of the last would be used for both."""
    (tmp_path / "A/stage1").mkdir(parents=True)
    written(tmp_path, "A/stage1/run.json", '{"config": {}}')
    saved_adapter(tmp_path / "A/stage1/checkpoint-000001")
    saved_adapter(tmp_path / "B", alpha=9)
    line = ["--run_folder", str(tmp_path / "A"), "--lora", str(tmp_path / "B"), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtdmd, "find_checkpoint", lambda path: Path(path) / "checkpoint-000001")
        eval_refused(capsys, line, "differ in alpha: evaluate them one after the other")


def test_an_adapter_that_does_not_fit_is_refused_before_sampling(tiny_report, tmp_path, monkeypatch, capsys):
    """Of another network: the rows before it are not sampled in vain."""
    saved_adapter(tmp_path / "B")
    monkeypatch.setattr(ev.Sampler, "sample", None)
    eval_refused(capsys, [*tiny_report[1], "--out", str(tmp_path / "out"), "--lora", str(tmp_path / "B")],
                 "adapter of B does not fit")


def test_rows_in_words():
    """Steps and guidance as they were sampled."""
    teacher, student = dict(role="teacher", nfe=50, guidance=1.0), dict(role="generator", nfe=4, lora=None)
    assert ev.label("teacher", teacher) == "teacher, 50 steps"
    assert ev.label("teacher_cfg", dict(teacher, guidance=1.5)) == "teacher, 50 steps, guidance 1.5"
    assert ev.label("teacher_cfg", teacher) == "teacher, 50 steps, guidance 1"     # or it would be the first again
    assert ev.label("student_init", student) == "untrained student, 4 steps"
    student["lora"] = "x"
    assert ev.label("stage1", student) == "stage 1, 4 steps"
    assert ev.label("stage2", dict(student, nfe=1)) == "stage 2, 1 step"
    assert ev.label("stage1 of B", student) == "stage 1 of B, 4 steps"
    assert ev.label("stage100", student) == "stage100, 4 steps"


def test_the_table_speaks_in_words(tiny_report, tmp_path, monkeypatch, capsys):
    """So do the grid and --compare; the keys of report.json stay."""
    folder, flags = tiny_report
    names = []
    drawn = ev.named_grid
    monkeypatch.setattr(ev, "named_grid", lambda images, columns, rows, below, framed=(): names.extend(rows) or drawn(
        images, columns, rows, below, framed))
    ev.main([*flags, "--out", str(tmp_path)])
    words = ["teacher, 50 steps", "teacher, 50 steps, guidance 1.5", "untrained student, 4 steps"]
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())["rows"]
    numbers = [f": {100 * row['heldout_strict']:.0f}% right, distance {row['distance']:.2f}, "
               f"diversity {row['diversity']:.2f}" for row in found.values()]
    # The grid, under its real pictures; a trajectory for each of two captions.
    assert re.fullmatch(r"real pictures: \d+% right", names[0])
    assert names[1:] == [*map("".join, zip(words, numbers))] + 2 * words[2:]
    assert all(f"\n{name}  " in out for name in words) and "±" in out and "+-" not in out
    assert "teacher_cfg" not in out and "student_init" not in out
    report = str(tmp_path / "report.json")
    assert [*json.loads(Path(report).read_text())["rows"]] == ["teacher", "teacher_cfg", "student_init"]
    ev.main(["--compare", report, report])
    out = capsys.readouterr().out
    assert all(f"\n{name}  " in out for name in words) and "0.000±0.000" in out


# ---- What fails costs no more than itself

SPOILT = dict(empty=b"", web=b"<!DOCTYPE html><html>", pointer=b"version https://git-lfs.github.com/spec/v1\noid",
              cut=b"PK\x03\x04" + bytes(40))


def spoilt_weights(folder, content):
    """A --weights_dir with one spoilt file for each of four metrics."""
    written(folder, "sac+logos+ava1-l14-linearMSE.pth", content)
    written(folder, "HPS_v2.1_compressed.pt", content)
    written(folder, "ImageReward.pt", content)
    clip = folder / "clip-vit-large-patch14"
    clip_net(8).save_pretrained(clip)
    weights = (clip / "model.safetensors").read_bytes()
    (clip / "model.safetensors").write_bytes(weights[:-9] if content.startswith(b"PK") else content)
    for name in ("tokenizer.json", "vocab.txt"):
        written(folder, name, "{}")


@pytest.mark.parametrize("kind", SPOILT)
def test_weights_that_cannot_be_read_cost_their_metric_alone(kind, tiny_report, tmp_path, monkeypatch, capsys):
    """It is told before anything is sampled, as far as a look at the file can tell; the report has the others."""
    small_vit_h(monkeypatch)
    _, flags = tiny_report
    spoilt_weights(tmp_path, SPOILT[kind])
    names = ["aesthetic", "hpsv2", "imagereward", "clipscore"]
    line = [*flags[:6], "--max_prompts", "1", "--per_prompt", "1", "--out", str(tmp_path / "out"), "--weights_dir",
            str(tmp_path), "--metrics"]
    eval_refused(capsys, [*line, ",".join([*names, "attributes"])], f"nothing was scored by {', '.join(names)}", 1)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["rows"]["teacher"]["attributes"] < 0 and len(report["failures"]) == 4
    assert all(re.search("cannot be loaded|incomplete or damaged", text) for text in report["failures"])
    told = ev.missing_weights([*names, "attributes"], settings(tmp_path))
    assert set(told) == set(names), told
    for name, text in told.items():
        assert "download it again" in text and str(tmp_path) in text


def test_missing_weights_are_told_before_anything_is_sampled(tiny_report, tmp_path, monkeypatch, capsys):
    """And refused, where nothing would be left."""
    line = [*tiny_report[1], "--weights_dir", str(tmp_path), "--out", str(tmp_path / "out"), "--metrics"]
    monkeypatch.setattr(ev, "Sampler", None)
    eval_refused(capsys, [*line, "hpsv2,aesthetic"], "HPS_v2.1_compressed.pt of xswu/HPSv2 is neither")
    with pytest.raises(TypeError):                                             # the sampler that is not there
        ev.main([*line, "hpsv2,attributes"])
    assert "--metrics hpsv2 will be left out: HPS_v2.1" in capsys.readouterr().err


def test_a_full_gpu_at_loading_costs_its_metric_alone(monkeypatch):
    """The pictures, which took hours, are scored by the others."""
    def full(name, cfg):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ev, "load_metric", full)
    scorer = SimpleNamespace(name="mean", details=lambda images, rows: {"mean": images.mean((1, 2, 3))})
    flags, pictures = SimpleNamespace(metrics=["hpsv3", "mean"], batch=1), {"row": ([0], torch.zeros(1, 3, 4, 4))}
    scores, failures = ev.score_rows(pictures, ["a"], flags, settings(), {"mean": scorer})
    assert scores == {"row": {"mean": [0.0]}} and len(failures) == 1 and "hpsv3: CUDA" in failures[0]


def spoil_checkpoint(monkeypatch, value, when):
    """Latents of the pictures of a row (role, guidance) and prompt become `value`."""
    rollout, sampled, now = rtdmd.rollout, ev.Sampler.rollout, {}

    def marked(self, row, prompts, keys):
        now.update(row=row, prompts=prompts)
        return sampled(self, row, prompts, keys)

    def spoilt(*args):
        states, predictions = rollout(*args)
        for i, prompt in enumerate(now["prompts"]):
            if when(now["row"], prompt):
                states[-1][i, 0, 0, 0] = value
        return states, predictions

    monkeypatch.setattr(ev.Sampler, "rollout", marked)
    monkeypatch.setattr(rtdmd, "rollout", spoilt)


def strict_json(path):
    """JSON as others read it: without NaN and Infinity."""
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")
    return json.loads(Path(path).read_text(), parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_picture_that_is_not_finite_costs_its_own_score(value, tiny_report, tmp_path, monkeypatch, capsys):
    """It is no black picture with a score: a sentence, null in the report, and no file; the rest is scored."""
    folder, flags = tiny_report
    bad = json.loads((folder / "run/report.json").read_text())["prompts"][1]
    spoil_checkpoint(monkeypatch, value, lambda row, prompt: row["role"] == "generator" and prompt == bad)
    ev.main([*flags, "--out", str(tmp_path), "--save_images"])
    report = strict_json(tmp_path / "report.json")
    scores = report["scores"]["student_init"]["attributes"]
    assert [score is None for score in scores] == [False] * 2 + [True] * 2 + [False] * 4
    assert None not in report["scores"]["teacher"]["attributes"]
    assert math.isfinite(report["rows"]["student_init"]["distance"])
    said = f"untrained student, 4 steps: the picture of the prompt {bad!r} is not finite"
    assert report["failures"] == [said] * 2 and f"not scored: {said}" in capsys.readouterr().out
    files, prompts = ev.read_folder(tmp_path / "images/student_init")
    assert len(files) == 6 and bad not in prompts and len(ev.read_folder(tmp_path / "images/teacher")[0]) == 8
    assert (tmp_path / "grid.png").exists()


def test_a_dead_checkpoint_ends_with_an_error(tiny_report, tmp_path, monkeypatch, capsys):
    """After the report, which has the other rows; a single picture of it is not written at all."""
    line = [*tiny_report[1], "--out", str(tmp_path)]
    spoil_checkpoint(monkeypatch, math.nan, lambda row, prompt: row["role"] == "generator")
    eval_refused(capsys, line, "no picture of untrained student, 4 steps is finite: take another", code=1)
    report = strict_json(tmp_path / "report.json")
    assert report["rows"]["student_init"]["attributes"] is None and report["rows"]["teacher"]["attributes"] < 0
    eval_refused(capsys, ["--prompt", "a red circle", *line[2:6], "--out", str(tmp_path / "one")],
                 "the picture is not finite", code=1)
    assert nothing_in(tmp_path / "one")
    spoil_checkpoint(monkeypatch, math.nan, lambda row, prompt: True)
    eval_refused(capsys, [*line[:-1], str(tmp_path / "all")], "no picture of teacher, 50 steps and ", code=1)
    assert len(strict_json(tmp_path / "all/report.json")["failures"]) == 24


@pytest.mark.parametrize("line", [
    ["--teacher"], ["--prompt", "a red circle"], ["--images", "pictures"], ["--ablations", "--seeds", "1"],
    ["--dry_run", "1", "--stage", "1"]])
def test_out_is_tried_before_hours_of_work(line, tmp_path, monkeypatch, capsys):
    """Where nothing can be written, nothing is sampled, scored or trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save("pictures/a.png")
    written(tmp_path, "file", "x")
    monkeypatch.setattr(ev, "Sampler", None)
    monkeypatch.setattr(ev, "TinyBackbone", None)
    monkeypatch.setattr(ev, "score_rows", None)
    monkeypatch.setattr(rtdmd, "prepare", None)
    before = snapshot(tmp_path)
    line = [*line, "--device", "cpu", "--out", "file/run"]
    eval_refused(capsys, line, "Cannot write file/run.*Not a directory")
    assert snapshot(tmp_path) == before
    ev.try_folder(tmp_path / "new")
    assert not [*(tmp_path / "new").iterdir()]


def test_a_report_that_cannot_be_written_is_printed(tiny_report, tmp_path, monkeypatch, capsys):
    """And one that cannot be printed is written."""
    line, write = [*tiny_report[1], "--out", str(tmp_path)], rtdmd.write_atomic

    def full(path, data):
        if Path(path).name == "report.json":
            raise rtdmd.UsageError("Cannot write report.json: make room.")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(rtdmd, "write_atomic", full)
        with pytest.raises(SystemExit):
            ev.main(line)
    assert "held-out reward" in capsys.readouterr().out and not (tmp_path / "report.json").exists()

    def closed(*_, **options):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", closed)
        with pytest.raises(BrokenPipeError):
            ev.report(SimpleNamespace(out=tmp_path, per_prompt=1), {"a": {"x": (math.nan, math.nan)}}, {}, [])
    assert strict_json(tmp_path / "report.json")["rows"] == {"a": {"x": None}}


# ---- --compare, --ablations, --prompt, --images

def of_report(**changes):
    return dict(scores=dict(row=dict(ocr=[.1, .2])), prompts=["a", "b"], per_prompt=1) | changes


@pytest.mark.parametrize("changes, words", [
    (dict(scores=dict(row=dict(ocr=[.1]))), "ocr of row is no list of 2 scores"),
    (dict(scores=dict(row=dict(ocr=[.1, .2, .3]))), "ocr of row is no list of 2 scores"),
    (dict(scores=dict(row=dict(ocr=3))), "ocr of row is no list of 2 scores"),
    (dict(scores=dict(row=dict(ocr=[.1, "x"]))), "ocr of row has a score that is no number .'x'"),
    (dict(scores=dict(row=dict(ocr=[.1, True]))), "ocr of row has a score that is no number .True"),
    (dict(scores=dict(row=dict(ocr=[.1, [3]]))), "ocr of row has a score that is no number"),
    (dict(scores=dict(row=dict(ocr=[.1, 10**400]))), "ocr of row has a score that is no number"),
    (dict(scores=dict(row=[.1, .2])), "two report.json"), (dict(prompts=[1, 2]), "two report.json"),
    (dict(per_prompt=10**30), "two report.json"), (dict(per_prompt=0), "two report.json"),
    (dict(tasks=[]), "two report.json"), (dict(tasks=dict(a=[1], b=[2])), "two report.json"),
    (dict(rows=dict(row=3)), "two report.json"), (dict(scores={}), "no metric in common")])
def test_compare_refuses_a_damaged_report(changes, words, tmp_path, capsys):
    """Lists of other lengths were compared as far as they went. The second may be the damaged one."""
    good = written(tmp_path, "good.json", json.dumps(of_report()))
    bad = written(tmp_path, "bad.json", json.dumps(of_report(**changes)))
    eval_refused(capsys, ["--compare", good, bad], words)
    eval_refused(capsys, ["--compare", bad, bad], words)
    written(tmp_path, "bad.json", "[" * 100_000)
    eval_refused(capsys, ["--compare", good, bad], "two report.json")


def test_compare_of_reports_with_gaps(tmp_path, capsys):
    """null, and nan of older reports, are no scores; what tells how rows were sampled may be spoilt."""
    paths = [written(tmp_path, f"{i}.json", json.dumps(of_report(scores=dict(row=dict(ocr=[gap, .5 + i])), **facts)))
             for i, (gap, facts) in enumerate([(None, {}), (math.nan, dict(sampler=dict(row=3)))])]
    ev.main(["--compare", *paths])
    assert capsys.readouterr().out.splitlines()[1].split() == ["row", "1"]


def ablated(out, row, seed, **scores):
    """A result as --ablations leaves it."""
    target = ev.result_of(out, row, seed)
    target.parent.mkdir(exist_ok=True)
    words = {name: words for tables in (ev.STAGE1_ROWS, ev.STAGE2_ROWS) for rows in tables.values()
             for name, words in rows.items()}.get(row, "")
    facts = dict(seed=seed, dm=.1, words=words, pretrained="")
    target.write_text(json.dumps(dict.fromkeys(ev.TINY_COLUMNS, .5) | facts | scores))
    for stage, names in ((1, ["dsm"]), (2, ["reward_attributes", "watch_heldout"])):
        folder = target.with_suffix("") / f"stage{stage}"
        folder.mkdir(parents=True)
        line = json.dumps(dict(iteration=1, **dict.fromkeys(names, .5)))
        written(folder, "metrics.jsonl", line + "\n" + line.replace(": 1,", ": 2,") + "\n")


@pytest.mark.parametrize("was", [dict(words="--gamma 0"), dict(pretrained="tiny-500"), None])
def test_results_of_another_world_or_row_are_no_results(was, tmp_path):
    """A file of that name from other settings, or cut short, would silently stand for today's row."""
    ablated(tmp_path, "row", 0, **(dict(words="", pretrained="") | (was or {})))
    if was is None:
        ev.result_of(tmp_path, "row", 0).write_text("{")
    with pytest.raises(rtdmd.UsageError, match="damaged, or of other settings"):
        ev.train_rows([(1, "row", "", 0)], tmp_path, rtdmd.resolve({}), 1)


def test_a_row_whose_process_was_killed(tmp_path, monkeypatch):
    """One sentence, and no traceback."""
    broken = lambda self, *arguments: (_ for _ in ()).throw(concurrent.futures.process.BrokenProcessPool("gone"))
    monkeypatch.setattr(concurrent.futures.Future, "result", broken)
    monkeypatch.setattr(concurrent.futures.ProcessPoolExecutor, "submit", lambda *_: done_future())
    with pytest.raises(rtdmd.UsageError, match="process was killed.*--jobs"):
        ev.train_rows([(1, "row", "", 0)], tmp_path, rtdmd.resolve({}), 1)


def done_future():
    future = concurrent.futures.Future()
    future.set_result(None)
    return future


def test_ablations_print_what_there_is(tmp_path, monkeypatch, capsys):
    """Tables and rows without a result are counted in one line; a panel of a row that was not run is left out."""
    monkeypatch.setattr(ev, "train_rows", lambda *_: None)
    monkeypatch.setattr(ev, "TinyBackbone", lambda cfg: None)
    ablated(tmp_path, "DM only", 0)
    ablated(tmp_path, ev.BASE, 0)
    line = ["--ablations", "--seeds", "1", "--only", "DM only", "--out", str(tmp_path)]
    ev.main(line)
    out = capsys.readouterr().out
    titles = [text for text in out.splitlines() if text.startswith("###")]
    assert [text.split(":")[0][4:] for text in titles] == [
        "Table 1 in small", "Table 3", "Figure 5", "DEPARTURE 1", "Beyond the paper, stage 1",
        "The constants and functions of the released code", "Table 4", "Matching alone"]
    assert len(re.findall(r"^\| DM only \| 1 \|", out, re.M)) == 2 and not re.search(r"\| 0 \|", out)
    rows = {row for table in (ev.STAGE1_ROWS, ev.STAGE2_ROWS) for question in table.values() for row in question}
    rows |= {row for _, _, question in ev.TABLE1 for row in question}
    assert "| AC-DMD (ours) | 1 |" in out
    assert out.splitlines()[-1] == f"{len(rows) - 2} rows without a result."
    assert (tmp_path / "table.md").read_text() == out and strict_json(tmp_path / "results.json")["naive GRPO"] == []
    assert Image.open(tmp_path / "curves.png").size[0] == 2 * 560
    ablated(tmp_path, "lag, gamma .01", 0)
    ev.main(line)
    assert Image.open(tmp_path / "curves.png").size[0] == 3 * 560
    ablated(tmp_path, "eta 0", 0, words="--eta .1")             # not asked for, but it would stand in the table
    eval_refused(capsys, line, "eta_0_0.json is damaged, or of other settings than today's row")


def test_a_row_whose_metric_is_null(tmp_path):
    """A report may have null for a number; a difference needs both."""
    row = lambda seed, **scores: dict.fromkeys(ev.TINY_COLUMNS, .5) | dict(seed=seed) | scores
    lacking = row(0)
    del lacking["distance"]
    text = ev.ablation_table({"a": "", "b": "", "c": ""}, {"a": [row(0)], "b": [lacking], "c": []})
    assert "| a | 1 |" in text and "| b | 1 |" in text and "| c |" not in text


def test_eval_prompt_saves_the_bare_picture(tiny_report):
    """As it was decoded: no border, nothing enlarged."""
    folder, flags = tiny_report
    out = folder / "bare"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ev.Sampler, "batch", lambda *_: torch.rand(1, 3, 24, 24, generator=rng()))
        ev.main(["--prompt", "a red circle", *flags[2:6], "--out", str(out)])
    pixels = np.array(Image.open(out / "prompt.png"))
    expected = (torch.rand(1, 3, 24, 24, generator=rng())[0] * 255).round().permute(1, 2, 0).numpy()
    assert pixels.shape == (24, 24, 3) and (pixels == expected).all()


def test_a_gap_is_drawn_from_zero(tmp_path, monkeypatch):
    """dm that moves between .10 and .11 is not drawn as if it doubled; other curves fill their panel."""
    seen = []
    monkeypatch.setattr(ev, "ticks", lambda low, high: seen.append((low, high)) or [])
    curve = [(i, .10 + .01 * (i % 2)) for i in range(4)]
    ev.draw_curves(tmp_path / "c.png", {"a": {"dm": curve}, "b": {"reward": curve}})
    assert [low for low, _ in seen[::2]] == [0, pytest.approx(.1)]


def test_a_long_curve_is_smoothed_more():
    """The noise of stage 2's four prompts is not a climb: 10 of 50 lines, a tenth of more, 50 at most."""
    step = lambda n: dict(ev.mean_curve([[dict(iteration=i, x=float(i >= n // 2)) for i in range(n)]], "x"))
    for n, width in ((19, 1), (20, 5), (49, 5), (50, 10), (150, 15), (2000, 50)):
        curve = step(n)
        assert curve[n // 2] == pytest.approx(1 / width) and curve[n // 2 + width - 1] == 1


def test_names_that_are_not_utf8(tmp_path, monkeypatch, capfd):
    """A folder's is shown as far as it can be; a picture's, which is its prompt, and --prompt are refused."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "white_judge.py", "def white(images, prompts):\n    return images.mean((1, 2, 3))\n")
    folder = tmp_path / os.fsdecode(b"pictures\xff")
    folder.mkdir()
    Image.new("RGB", (8, 8), "white").save(folder / "a cat.png")
    line = ["--images", str(folder), "--metrics", "white_judge:white", "--device", "cpu", "--out",
            os.fsdecode(b"out\xfe")]
    ev.main(line)
    assert re.search("^pictures_ +1$", capfd.readouterr().out, re.M)
    report = strict_json(Path(os.fsdecode(b"out\xfe")) / "report.json")
    assert report["rows"] == {"pictures_": {"white_judge:white": 1}}
    Image.new("RGB", (8, 8), "white").save(folder / os.fsdecode(b"a\xffcat.png"))
    eval_refused(capfd, line, "no text in UTF-8: rename the file")
    lines = [json.dumps(dict(file_name=os.fsdecode(b"a\xffcat.png"), prompt=text)) for text in ("a cat", "\udcff")]
    (folder / "metadata.jsonl").write_text(lines[0])
    ev.main(line)
    (folder / "metadata.jsonl").write_text(lines[1])
    eval_refused(capfd, line, "no text in UTF-8")
    eval_refused(capfd, ["--prompt", os.fsdecode(b"a \xff fox")], "--prompt cannot be read .*give a text in UTF-8")
    eval_refused(capfd, ["--prompt", "x" * 10**6], "--prompt cannot be read .*up to 20,000")


def test_a_terminal_that_knows_no_sign_for_it(monkeypatch):
    """± is printed as ? where the encoding lacks it, instead of a traceback."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(ev, "compare", lambda flags, cfg: print("1±2 \udcff", flush=True))
    ev.main(["--compare", "x", "y"])
    assert sys.stdout.buffer.getvalue().strip() == b"1?2 ?"


# ---- Flags

@pytest.mark.parametrize("name", ["nfe", "batch", "per_prompt", "max_prompts", "jobs", "seeds"])
def test_numbers_beyond_reason(name, tmp_path, monkeypatch, capsys):
    """One sentence with the bound, before anything is made."""
    monkeypatch.chdir(tmp_path)
    command = ["--ablations"] if name in ("jobs", "seeds") else ["--teacher"]
    eval_refused(capsys, [*command, f"--{name}", str(10**30)], rf"--{name} must be at most \d+")
    eval_refused(capsys, [*command, f"--{name}", "-1"], f"--{name} must be at least 1")
    eval_refused(capsys, ["--teacher", "--cfg", "1e30"], "--cfg .*to 1000000")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("line, words", [
    ("--lora x", "--lora is none of them: give the two commands one after the other"),
    ("--teacher", "--teacher is none"), ("--compare a b", "--compare is none"), ("--prompt=x", "--prompt=x is none"),
    ("--run_folder runs/tiny", "--run_folder is none"), ("--ablations", "--ablations is none"),
    ("--images x", "--images is none"), ("--stgae 2", "--stgae"), ("--modle sd3m", "--modle"),
    ("--device meta --modle sd3m", "--modle"), ("--dry_run 1000000000000000000000000", "from 1 to"),
    ("--dry_run 0", "from 1 to")])
def test_a_dry_run_is_a_command_of_its_own(line, words, tmp_path, monkeypatch, capsys):
    """Other commands and misspelt flags are named."""
    monkeypatch.chdir(tmp_path)
    eval_refused(capsys, ["--dry_run", "1", *line.split()], words)
    eval_refused(capsys, [*line.split(), "--dry_run=1"] if "dry" not in line else line.split(), words)
    assert not [*tmp_path.iterdir()]


# -----------------------------------------------------------------------------------------------------------------
# eval.py: the tiny world
# -----------------------------------------------------------------------------------------------------------------

def test_tiny_captions_are_disjoint_and_parse():
    """66 captions are kept from all training; "a below b" is the picture of "b above a"."""
    train, held_out = ev.tiny_captions(), ev.tiny_captions(held_out=True)
    assert (len(train), len(held_out), len(set(train) & set(held_out))) == (2166, 66, 0)
    below = ev.parse_caption("a red circle below a blue square")
    above = ev.parse_caption("a blue square above a red circle")
    assert torch.equal(below[1], above[1]) and not torch.equal(below[0], above[0])
    assert ev.parse_caption("a red circle")[1].tolist() == [0, 0, 0, -1, -1]
    three = "a red circle above a blue square above a red circle"
    for bad in ("a pink circle", "a red circle above", three, "circle"):
        with pytest.raises(rtdmd.UsageError, match="cannot draw"):
            ev.parse_caption(bad)


def test_render_draws_what_the_caption_says():
    """Above is above, left is left, and the colours are those of the objects."""
    red, blue = (lambda image: image[:, 0] - image[:, 2]), (lambda image: image[:, 2] - image[:, 0])
    for caption, axis in (("a red square above a blue square", 2), ("a blue circle right of a red triangle", 3)):
        one, two = (half.mean((2, 3)) for half in ev.render([caption] * 50, rng(53)).split(12, axis))
        assert (red(one) > 0.05).all() and (blue(two) > 0.05).all(), caption


def test_each_shape_is_drawn_under_its_own_name():
    """Which cells of its bounding box a shape covers: upper left corner, beside the lower left one, centre, halfway to
    the upper left corner; a diamond less than a circle, and between two arms of a cross."""
    known = dict(circle=(0, 0, 1, 1), square=(1, 1, 1, 1), triangle=(0, 1, 1, 0), ring=(0, 0, 0, 1),
                 cross=(0, 0, 1, 0), diamond=(0, 0, 1, None))
    full, shoulder = {}, {}
    for shape in ev.TINY_SHAPES:
        boxes = []
        for image in ev.render([f"a red {shape}"] * 40, rng(5)):
            red = image[0] - image[2] > 0.8
            rows, columns = (red.any(axis).nonzero() for axis in (1, 0))
            box = red[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
            boxes.append(F.interpolate(box[None, None].float(), (9, 9))[0, 0])
        mean = torch.stack(boxes).mean(0)
        cells = mean[0, 0], mean[8, 1], mean[4, 4], mean[2, 2]
        full[shape], shoulder[shape] = mean.mean(), mean[2, 6]
        assert all(want is None or abs(cell - want) < 0.3 for cell, want in zip(cells, known[shape])), (shape, cells)
    assert full["diamond"] < full["circle"] - 0.1 and shoulder["diamond"] > shoulder["cross"] + 0.5


def test_a_rounded_level_stays_inside_its_interval():
    """FLUX.2's levels are rounded to bf16, by up to .002: at 1024 pixels a draw just above t_2 = .9082 would become t_2
    itself, where kappa is 0. Where nothing is rounded the margin is 1 %."""
    rounding = SimpleNamespace(backbone=SimpleNamespace(dtype=torch.bfloat16))
    rounding.backbone.quantise = functools.partial(rtdmd.flux_level, rounding.backbone)
    exact = SimpleNamespace(backbone=SimpleNamespace(quantise=lambda t: t))
    u = torch.linspace(0, 1, 2001)[:-1].view(-1, 1, 1, 1)
    rounding.cfg, rounding.times = rtdmd.Config(delta=.1), rtdmd.timestep_schedule(4, math.exp(2.29118))
    t = torch.linspace(.003, .997, 2000).view(-1, 1, 1, 1)
    low = torch.stack([t - .1, *(torch.where(level < t, level, 0.0) for level in rounding.times.float())]).amax(0)
    for chance in (u, torch.zeros_like(u), torch.ones_like(u)):
        t_next = rtdmd.draw_next_level(rounding, t, chance)
        assert (low <= t_next).all() and (t_next <= t).all()
    t = rtdmd.draw_level(rounding, torch.full_like(u, .998), u)
    assert .998 <= t.min() and t.max() <= 1                                 # rounded, but not out of it
    for s in (0.0, .5, .75, .9082, .9674):
        levels = torch.full_like(u, s)
        t = rtdmd.draw_level(rounding, levels, u)
        assert (t > s).all() and (t < 1).all(), s
        t = rtdmd.draw_level(exact, levels, u)
        margin = max(.01 * (1 - s), min(.0025, (1 - s) / 4))
        assert t.min() - s == pytest.approx(margin, rel=1e-3) and 1 - t.max() == pytest.approx(margin, rel=.06)


def test_tiny_judge_learns_and_scores():
    """100 updates teach a judge layouts and colours; only its soft score is differentiable."""
    torch.manual_seed(0)
    judge = ev.train_tiny_judge(ev.TinyJudge(16, torch.nn.ReLU), "judge", 100, seed=0)
    captions = ev.tiny_captions()[24:224]
    images = (ev.render(captions, rng(1)) / 2 + 0.5).requires_grad_()
    soft, strict = ev.judge_scores(judge, images, captions)
    wrong = ev.judge_scores(judge, images, captions[1:] + captions[:1])[0]
    assert soft.mean() > wrong.mean() + 0.5 and set(strict.unique().tolist()) <= {0.0, 1.0} and strict.mean() > 0.2
    assert (soft <= 0).all() and (soft >= -4).all()
    certain = lambda images: [100 * logits for logits in judge(images)]
    assert -4 <= ev.judge_scores(certain, images, captions[1:] + captions[:1])[0].min() < -1
    assert torch.autograd.grad(soft.sum(), images)[0].abs().sum() > 0
    assert ev.TinyReward("strict", judge, 1).differentiable is False


def test_muon_is_torchs_muon():
    """Matrices of several sizes, some of them two at a time, some tall: after five updates they are where torch's
    are, within bf16's digits; a first update has singular values near 1, times rate and sqrt(rows / columns)."""
    shapes = [(64, 64), (64, 64), (48, 64), (64, 256), (256, 64), (256, 64)]
    start = [torch.randn(shape, generator=rng(i)) for i, shape in enumerate(shapes)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = ev.Muon(ours, 0.02), torch.optim.Muon(theirs, 0.02, weight_decay=0.0)
    for update in range(5):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = torch.randn(p.shape, generator=rng(100 * update + i)) + 0.3
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, q, first, (rows, columns) in zip(ours, theirs, start, shapes):
            assert (p - q).norm() < 0.02 * (q - first).norm()
            if update == 0:
                values = torch.linalg.svdvals(p.detach() - first) / (0.02 * max(1, rows / columns)**.5)
                assert 0.3 < values[:-4].min() and values.max() < 1.3


def test_frechet_and_spread_against_known_values():
    """Two Gaussians whose distance is |m|^2 + sum (s_a - s_b)^2; a correlated one, by the closed form of 2 x 2
    matrices, tr (A B)^1/2 = sqrt(tr A B + 2 sqrt(det A B)); points whose mean distance is known."""
    g = rng(0)
    a, b = torch.randn(200_000, 3, generator=g), torch.randn(200_000, 3, generator=g) * 2 + 1
    assert abs(ev.frechet(a, b) - 6) < 0.1 and abs(ev.frechet(a, a)) < 1e-6
    a = torch.randn(200_000, 2, generator=g)
    a[:, 1] = .9 * a[:, 0] + math.sqrt(.19) * a[:, 1]
    b = torch.randn(200_000, 2, generator=g) * torch.tensor([1., 2.])
    truth = 2 + 5 - 2 * math.sqrt(5 + 2 * math.sqrt(.19 * 4))
    assert abs(ev.frechet(a, b) - truth) < 0.03 and abs(ev.frechet(b, a) - truth) < 0.03
    assert math.isnan(ev.frechet(a[:1], b[:1]))
    assert ev.spread(torch.tensor([[0.0], [3.0], [10.0], [10.0]]), 2) == 1.5


def test_set_metrics_of_renders():
    """Fresh renders are near the real ones and as diverse; one picture for each caption is not."""
    captions = [caption for caption in ev.tiny_captions(True)[:24] for _ in range(8)]
    fresh = ev.render(captions, rng(5)) / 2 + 0.5
    right = ev.tiny_set_metrics(fresh, captions, 8)
    collapsed = ev.tiny_set_metrics(fresh[::8].repeat_interleave(8, 0), captions, 8)
    assert abs(right["diversity"][0] - 1) < 0.1 and collapsed["diversity"][0] < 0.01
    assert right["distance"][0] < 0.6 and collapsed["distance"][0] > 2 * right["distance"][0]
    assert all(0 < error < 0.5 for _, error in right.values())


# -----------------------------------------------------------------------------------------------------------------
# The 1-D laboratory: `python test_rtdmd.py lab`. Measurements, not tests: they say how much, whoever wins.
# -----------------------------------------------------------------------------------------------------------------

# ---- (a) The variance of the policy gradient

def table(title, rows):
    """Prints a list of dicts as columns under a title and hands it back."""
    text = [list(rows[0])] + [[a if isinstance(a, str) else f"{a:.4g}" for a in row.values()] for row in rows]
    width = [max(map(len, column)) for column in zip(*text)]
    print("\n" + title)
    for line in text:
        print("  ".join(a.ljust(n) for a, n in zip(line, width)))
    return rows


def estimator_row(estimates, truth, backward_passes, factor):
    """Bias and variance of one estimate per group (G, 2) of the gradient `truth` (2,).

    scale, cos: the mean against the truth, in length and direction. bias: |mean - truth| / |truth|, beside
    its size by chance alone. variance: trace of one group's covariance over (scale |truth|)^2, so that
    estimates of different scale can be compared: the inverse of signal to noise, squared.
    """
    estimates, truth = estimates.double(), truth.double()
    mean, error, norm = estimates.mean(0), estimates.std(0) / len(estimates) ** 0.5, truth.norm()
    scale = float(mean @ truth / norm ** 2)
    squares = (estimates - mean).square().sum(1) / (scale * norm) ** 2
    return {"bias": float((mean - truth).norm() / norm), "(s.e.)": float(error.norm() / norm), "scale": scale,
            "without (K-1)/M": scale / factor, "cos": float(mean @ truth / norm / mean.norm()),
            "variance": float(squares.mean()), "+-": float(squares.std() / len(squares) ** 0.5),
            "variance x M": float(squares.mean()) * backward_passes}


def lab_variance(dims=DIMS, groups=24_000, size=12, steps=4):
    """(a) Stochastic part of Eq. 14 by naive GRPO (Eq. 31) and by SubGRPO (Eq. 17), bias and variance."""
    truth, _ = toy_gradients(steps)
    rows = []
    for start, M, share in itertools.product((False, True), (3, 2, 1), (True, False)):
        if M == steps - 1 and not share:                         # naive GRPO: no step is outside S
            continue
        options = dict(share_noise=share, share_initial=start, dims=dims)
        rollouts = over_subsets(steps, size, M, groups, 50, **options)
        label = {"estimator": "naive" if M == steps - 1 else f"subset M={M}",
                 "noise outside S": "-" if M == steps - 1 else "shared" if share else "independent",
                 "x_t0": "shared" if start else "independent"}
        for std, name in (("none", "leave-one-out"), ("group", "over group std")):
            estimates = torch.cat([toy_estimates(states, S, std)[0] for S, states in rollouts])
            row = estimator_row(estimates, truth, M, (steps - 1) / M)
            rows.append(label | {"advantage": name} | row)
    return table(f"(a) {groups} groups of {size}, K = {steps}, {dims} dimensions. variance: one group, so at "
                 "equal rollouts; variance x M: at equal backward passes", rows)


# ---- (b) Does the consistency term help the fake score to follow?

def network(runs, width, g):
    """Weights of `runs` independent MLPs (x, t) -> v."""
    shapes = [(3, width), (width, width), (width, 1)]
    weights = []
    for n_in, n_out in shapes:
        weights += [torch.randn(runs, n_in, n_out, generator=g) / n_in ** 0.5, torch.zeros(runs, 1, n_out)]
    return [w.requires_grad_() for w in weights]


def run_network(weights, x, t):
    """v of every run on its own batch: x, t (R, B, 1)."""
    h = torch.cat([x, t, x * t], -1)
    for w, b in zip(weights[:4:2], weights[1:4:2]):
        h = F.silu(torch.baddbmm(b, h, w))
    return torch.baddbmm(weights[5], h, weights[4])


def moving_student(progress):
    """Two modes that travel by 1 and trade places in weight; progress in [0, 1]."""
    w = 0.3 + 0.4 * progress
    return Mixture(0.0, (w, 1 - w), (-1.2 + progress, 0.8 + progress), (0.3, 0.5))


def boundary_batch(student, runs, batch, g):
    """Boundary states as stage 1 has them: x_s (R, B, 1), s from the 4-step grid, t in [s, 1], new noise."""
    x_0 = student.sample(runs * batch, g).view(runs, batch, 1)
    s = torch.randint(4, (runs, batch, 1), generator=g) / 4
    t = s + (1 - s) * (0.02 + 0.96 * torch.rand(runs, batch, 1, generator=g))
    first, noise = torch.randn(2, runs, batch, 1, generator=g)
    return (1 - s) * x_0 + s * first, s, t, noise


def fake_update(weights, optimizer, student, batch, gamma, kernel, g, g_consistency):
    """One step of Eq. 12 for every run. Two generators: gamma does not change the data that a run sees."""
    runs = len(weights[0])
    x_s, s, t, noise = boundary_batch(student, runs, batch, g)
    x = rtdmd.renoise(x_s, s, t, noise)
    v = run_network(weights, x, t)
    loss = rtdmd.ambient_dsm_loss(v, x_s, noise, s, t)
    if gamma:
        low = torch.maximum(s, t - 0.1)
        t_next = low + (t - low) * torch.rand(t.shape, generator=g_consistency)
        noises = torch.randn(2, *x.shape, generator=g_consistency)
        fake = functools.partial(run_network, weights)
        loss = loss + gamma * rtdmd.consistency_loss(fake, x, v, t, t_next, *noises, kernel, ETA)
    optimizer.zero_grad()
    (runs * loss).backward()                     # undoes the mean over runs, which are strangers
    optimizer.step()


@torch.no_grad()
def fake_error(weights, student, g):
    """E |v_phi - v|^2 of every run, (R,): the score's error times t / (1-t), where DMD asks for it."""
    x_s, s, t, noise = boundary_batch(student, len(weights[0]), 512, g)
    x = rtdmd.renoise(x_s, s, t, noise)
    truth = student.velocity(x.double(), t[..., 0].double()[..., None]).float()
    return (run_network(weights, x, t) - truth).square().mean((1, 2))


def track(start, updates, lr, batch, gamma, kernel, iterations=120):
    """Mean squared error along the student's way, (R,), of fakes that begin at the weights `start`."""
    weights = [w.detach().clone().requires_grad_() for w in start]
    optimizer = torch.optim.Adam(weights, lr)
    g, g_consistency, g_test, errors = rng(60), rng(61), rng(62), []
    for i in range(iterations):
        student = moving_student(i / iterations)
        for _ in range(updates):
            fake_update(weights, optimizer, student, batch, gamma, kernel, g, g_consistency)
        if i % 4 == 3:
            errors.append(fake_error(weights, student, g_test))
    return torch.stack(errors).mean(0)


def lab_tracking(runs=8):
    """(b) Does the consistency term of Eq. 12 help a fake score to follow a moving student?"""
    start, g = network(runs, 48, rng(63)), rng(64)
    optimizer = torch.optim.Adam(start, 3e-3)
    for i in range(1500):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - i / 1500)
        fake_update(start, optimizer, moving_student(0.0), 64, 0.0, None, g, g)
    before = fake_error(start, moving_student(0.0), g)
    rows = []
    for name, *settings in (("tracks", 5, 3e-3, 64), ("lags", 1, 3e-4, 64), ("few samples", 5, 3e-3, 8)):
        name = "{} (updates {}, lr {:g}, batch {})".format(name, *settings)
        base = track(start, *settings, 0.0, None)
        rows.append(tracking_row(name, 0.0, "-", base, base))
        for kernel, gamma in itertools.product(("posterior", "cps"), (0.01, 0.1, 1.0, 10.0)):
            error = track(start, *settings, gamma, kernel)
            rows.append(tracking_row(name, gamma, kernel, error, base))
    return table(f"(b) E |v_phi - v|^2 along the way of a moving student, {runs} seeds; {before.mean():.4f} "
                 "before it moves. change: against gamma 0 on the same data", rows)


def tracking_row(name, gamma, kernel, error, base):
    change, n = 100 * (error / base - 1), len(error) ** 0.5
    return {"fake score": name, "gamma": f"{gamma:g}", "kernel": kernel, "error": float(error.mean()),
            "error +-": float(error.std() / n), "change %": float(change.mean()),
            "change +-": float(change.std() / n)}


# ---- (c) What the printed std of re-noising does

def lab_renoise():
    """(c) Eq. 8, student = teacher: the state's variance and its W1 to the teacher's marginal, exactly."""
    teacher, x, rows = Mixture(), torch.linspace(-8, 8, 16_001, dtype=torch.float64), []
    for s, t in [(0.25, 0.3), (0.25, 0.5), (0.25, 0.8), (0.5, 0.55), (0.5, 0.7), (0.5, 0.9), (0.75, 0.9)]:
        row = {"s": s, "t": t, "variance teacher": float(teacher.variance(t))}
        for variants, name in (([], "ours"), (["paper_std"], "printed")):
            with ev.replaced(variants, None):
                a, kappa = map(float, rtdmd.renoise_coefficients(s, t))
            stds = ((a * (1 - s) * teacher.d) ** 2 + (a * s) ** 2 + kappa ** 2).sqrt()
            state = Mixture(t, m=tuple(((1 - t) * teacher.m).tolist()), d=tuple(stds.tolist()))
            gap = float((state.cdf(x, t) - teacher.cdf(x, t)).abs().sum() * (x[1] - x[0]))
            row |= {f"variance {name}": float(state.variance(t)), f"W1 {name}": gap}
        rows.append(row)
    return table("(c) Variance of the re-noised state and its W1 to the teacher's marginal at level t", rows)


def test_the_laboratory_still_runs(capsys):
    """Its parts (a) and (c), small; docs/claims.md quotes the row at s = .5, t = .7."""
    rows = lab_renoise()
    row, = (row for row in rows if (row["s"], row["t"]) == (0.5, 0.7))
    assert [round(row[f"variance {who}"], 3) for who in ("teacher", "ours", "printed")] == [0.584, 0.584, 0.344]
    assert round(row["W1 printed"], 2) == 0.14 and all(row["W1 ours"] < 1e-6 for row in rows)
    assert all(math.isfinite(row["variance"]) for row in lab_variance(groups=480))
    assert "printed" in capsys.readouterr().out


# ---- All of it

def lab(out=None):
    """Runs the laboratory, prints its tables, returns them; `out` also gets them as JSON."""
    torch.set_num_threads(1)
    tables = {"variance": lab_variance(), "variance_32": lab_variance(32, 9_000), "tracking": lab_tracking(),
              "renoise": lab_renoise()}
    if out:
        Path(out).write_text(json.dumps(tables, indent=1))
    return tables


# -----------------------------------------------------------------------------------------------------------------
# Torture: `python test_rtdmd.py torture --kills 100`
# -----------------------------------------------------------------------------------------------------------------

def torture(kills=100, folder=None, seed=0):
    """Kills a run at random moments, resumes it until it is through, and compares with the run that was left
    alone.

    Each life lasts a random while between nothing and most of a run, so that starting, training, logging, saving
    and deleting are all hit. Returns and prints kills, resumes and the bytes that differ; a run that is through
    begins anew.
    """
    folder = Path(folder or tempfile.mkdtemp())
    cache, dice = folder / "cache", random.Random(seed)
    make_world(cache)
    argv = lambda stage, out: small_flags(stage, cache, folder / "whole", out, "--keep", 2, "--sample_every", 1,
                                          "--iterations", 6)
    totals, begin = dict(kills=0, resumes=0, runs=0, bytes_differing=0, logs_differing=0), time.monotonic()
    life = {}
    for stage, out in itertools.product((1, 2), ("whole", "timed")):        # the second time without imports
        started = time.monotonic()
        assert finish(start(argv(stage, folder / out), folder / "log")) == [0], (folder / "log/rank-0").read_text()
        life[stage] = time.monotonic() - started
    while totals["kills"] < kills:
        stage, out = 1 + totals["runs"] % 2, folder / f"run-{totals['runs']}"
        while True:
            begun_before = bool(rtdmd.list_checkpoints(out / f"stage{stage}"))
            process, = start(argv(stage, out), folder / "log")
            process.join(dice.uniform(0, 0.8 * life[stage]) if totals["kills"] < kills else 120)
            totals["resumes"] += begun_before
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            totals["kills"] += 1
        assert process.exitcode == 0, (folder / "log/rank-0").read_text()
        totals["runs"] += 1
        whole, mine = folder / f"whole/stage{stage}", out / f"stage{stage}"
        totals["bytes_differing"] += bytes_differing(state_of(whole), state_of(mine))
        totals["logs_differing"] += repr(rows_of(whole)) != repr(rows_of(mine))
        left = [p for p in mine.rglob(".*.partial")]
        assert not left and len(names_in(mine)) in (2, 3), left
        shutil.rmtree(out)
    summary = ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in totals.items())
    print(f"{summary} ({time.monotonic() - begin:.0f} s)")
    return totals


def test_torture(tmp_path):
    """Six kills at random moments change no bit of what is saved and no row of the log."""
    totals = torture(kills=6, folder=tmp_path)
    assert totals["bytes_differing"] == totals["logs_differing"] == 0


class Part:
    """Pytest plugin of one of several processes that share the tests: each begins at another place, goes round, and
    runs what nobody has claimed yet."""

    def __init__(self, claims, start):
        self.claims, self.start = Path(claims), float(start)

    def pytest_collection_modifyitems(self, items):
        begin = int(self.start * len(items))
        items[:] = items[begin:] + items[:begin]

    def pytest_runtest_protocol(self, item):
        try:
            (self.claims / f"{rtdmd.key(item.nodeid)}").touch(exist_ok=False)
        except FileExistsError:
            return True                                             # as if it had been run: nothing is reported


def all_tests(processes):
    """Every test, one process per core; the first prints as it goes, the others at the end. Returns the exit code."""
    with tempfile.TemporaryDirectory() as claims:
        command = [sys.executable, __file__, "part", "--claims", claims, "--start"]
        outputs = [None, *(tempfile.TemporaryFile("w+") for _ in range(1, processes))]
        parts = [subprocess.Popen([*command, str(i / processes)], stdout=output) for i, output in enumerate(outputs)]
        codes = [part.wait() for part in parts]
    for output in outputs[1:]:
        output.seek(0)
        print(output.read(), end="")
    return max(map(abs, codes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("all", "part", "lab", "torture"), nargs="?", default="all")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()     # macOS has none
    parser.add_argument("--processes", type=int, default=min(4, cores))
    parser.add_argument("--claims")
    parser.add_argument("--start")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.command == "all":
        sys.exit(all_tests(options.processes))
    if options.command == "part":
        sys.exit(pytest.main(["-q", __file__], plugins=[Part(options.claims, options.start)]))
    if options.command == "torture":
        totals = torture(options.kills, seed=options.seed)
        sys.exit(bool(totals["bytes_differing"] or totals["logs_differing"]))
    lab()
