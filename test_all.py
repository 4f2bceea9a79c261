"""
What the README promises, one test each, in the order of the files.

    pytest test_all.py                  minutes on a CPU
    SLOW=1 pytest test_all.py           with the slow ones, marked @slow
    pytest test_all.py -k judge         one topic

Tests of the scripts start them as a user would, with a few steps of a small model.
"""
import ast
import collections
import functools
import glob
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                       # read when Triton is imported, which parts of torch do
    pytest_plugins = "lib.test_halves"                         # in two processes
import numpy as np
import pytest
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as evaluation
import kernels
import model as models
import objectives
import sample as sampling
from data import Batches
from lib import published, tables, triton_tools
from lib.conditions import count_columns, untold
from lib.datasets import open_style
from lib.encoders import open_autoencoder
from lib.images import INDEX
from lib.judge import look
from lib.networks import open_vqa, random_features
from lib.perceptual import STAND_IN, open_vgg
from lib.pictures import to_tensor, to_uint8, write_png
from lib.plan import count_flops, measure_step
from lib.results import flat
from lib.scenes import Scenes
from lib.settings import UserError, config_names, load_config, read_sections
from lib.test_metrics import fd
from lib.test_networks import stand_in_for_inception, tiny_blip, tiny_clip, tiny_dino
from lib.test_people import prefers_a, tiny_page, write_answers
from lib.test_questions import ANSWERS, DSG
from lib.test_scripts import ended, fork, run, run_beside, run_ranks, start, start_ranks, until
from lib.triton_tools import NO_TRITON, relative_errors, run_with_gradients, seeded_randn, tolerance
from model import build

HERE = os.path.dirname(os.path.abspath(__file__))
# Small tensors: threads would wait for each other, all the more where cores are shared.
torch.set_num_threads(1)
TINY = ["--width", "32", "--depth", "2", "--channels", "16", "--entry_channels", "16", "--batch", "8", "--steps", "6",
        "--eval_n", "0", "--sample_every", "4", "--scene_count", "200", "--log_every", "2", "--sample_steps", "2",
        "--weight_decay", "0.1"]


slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: SLOW=1 pytest test_all.py")


def tiny(stage="pretrain", **changes):
    """Settings of a model small enough for tests, in the paper's shells: toy's own are run from the command line."""
    sides = dict(resolution=16) if stage == "pretrain" else dict(resolution=32, shell="unet")
    plain = dict(image_skip=0, prediction="v", weighting="v", noise_base_resolution=8, scene_texture=16,
                 scene_native=32)
    keys = dict(width=32, depth=2, batch=8, scene_count=200) | plain | sides | changes
    return load_config("toy", stage, [(k, repr(v)) for k, v in keys.items()])


def tensors_hash(state, prefix=""):
    digest = hashlib.sha256()
    for k, v in sorted(state.items()):
        if k.startswith(prefix):
            digest.update(k.encode() + v.contiguous().numpy().tobytes())
    return digest.hexdigest()


def shaken(net, seed=0):
    """All parameters moved away from zero, so that a path shut by a zero cannot hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval()


@pytest.fixture(scope="session", autouse=True)
def first_command(request, tmp_path_factory):
    """A folder for runs, and the command that the README gives first, at work beside the first of the tests."""
    if any("runs" in item.fixturenames for item in request.session.items):
        out = tmp_path_factory.mktemp("runs")
        return out, start("train.py", "--stage", "grow", "--out", out, *TINY)


@pytest.fixture(scope="session")
def runs(first_command):
    """A pretrained, a grown and a defrosted tiny run, of which that command has made the first two."""
    out, started = first_command
    said = ended(*started)
    said += run("train.py", "--stage", "defrost", "--out", out, *TINY)
    return out, said


# ---- configs.txt -----------------------------------------------------------------------------------------------------

def test_every_key_is_documented_and_read():
    keys = open(os.path.join(HERE, "configs.txt")).read().split("[DEFAULT]")[1].split("\n[")[0]
    source = "".join(house_files(*(f"{name}.py" for name in IDEA), "lib/*.py").values())
    for key, _, comment in re.findall(r"^(\w+) = (.*?)(#.*)?$", keys, re.M):
        assert comment, f"{key} has no comment"
        assert re.search(rf"""["']{key}["']""", source), f"nothing reads {key}"


def test_ranges_and_stages_name_what_there_is():
    sections = read_sections()
    ranges, default = sections["ranges"], load_config("toy")
    assert set(ranges) < set(default) and set(sections["stages"]) >= set(STAGES)
    for key, table in (("sampler", sampling.SAMPLERS), ("weighting", models.WEIGHTINGS)):
        assert ranges[key].split(" | ") == list(table)


@pytest.mark.parametrize("flags, words", [
    (["--stage", "growth"], "did you mean 'grow'"), (["--wdith", "32"], "did you mean 'width'"),
    (["--lr", "1", "--lr", "2"], "twice"), (["--lr"], "lr takes a float"), (["lr", "1"], "write --KEY VALUE"),
    (["--stgae=grow"], "did you mean 'stage'"), (["--lr=x"], "lr takes a float"), (["--fresh=yes"], "True or False"),
    (["--devices", "8"], "belongs to --plan"), (["--plan", "--devices", "0"], "at least 1"),
    (["--resolution", "48", "--data", "nowhere"], "take 32 or 64"), (["--data", "nowhere"], "no folder"),
    (["--sampler", "euler"], "take one of ddpm, ddim, dpm, exp_heun"), (["--dtype", "fp64"], "take one of auto")])
def test_bad_flags_are_one_line_that_says_how_to_mend_them(flags, words, tmp_path):
    stage = [] if "--stage" in flags else ["--stage", "scratch"]
    said = run("train.py", *stage, *flags, "--out", tmp_path, code=2)
    assert re.search(r"^error: .*: .*", said, re.M) and words in said and "Traceback" not in said
    assert not os.path.exists(tmp_path / "toy" / "scratch" / "last.pt")


@pytest.mark.parametrize("key, text, words", [
    ("learning_rate", "1", "did you mean 'lr'"), ("lr", "1e-4x", "lr takes a float"), ("steps", "0", "at least 1"),
    ("lr", "-1", "at least 0"), ("caption_dropout", "2", "[0, 1]"), ("channels", "()", "at least 1"),
    ("width", "33", "take width ="), ("eval_n", "1", "at least 2"), ("scene_objects", "4", "[1, 3]")])
def test_bad_settings_are_refused(key, text, words, capsys):
    with pytest.raises(UserError) as refusal:
        models.check_sizes(load_config("toy", "grow", [(key, text)]))
    assert refusal.value.code == 2 and words in capsys.readouterr().err


CONFIGS = [name for name in config_names() if not name.startswith("world-")]
TWINS = [c for c in CONFIGS if c.endswith("-tiny")]
STAGES = ("pretrain", "grow", "defrost", "scratch", "finetune", "style")


def on_meta(config):
    """The model as shapes alone: 8 billion parameters take no memory."""
    with torch.device("meta"):
        return models.build(config)


@pytest.mark.parametrize("name, stage, part, wanted, tolerance", [
    ("base", "pretrain", "", 672e6, 0.02), ("xhuge", "pretrain", "", 7.7e9, 0.02),
    ("base", "grow", "shell", 217e6, 0.03), ("vermeer", "grow", "", 8e9, 0.05),
    ("pixart-sigma", "pretrain", "", 610.86e6, 0.0001), ("sdxl", "pretrain", "", 2.6e9, 0.05)])
def test_presets_have_as_many_parameters_as_the_papers_say(name, stage, part, wanted, tolerance):
    net = on_meta(load_config(name, stage))
    count = sum(p.numel() for p in (getattr(net, part) if part else net).parameters())
    assert abs(count / wanted - 1) < tolerance, f"{count:,}"


@pytest.mark.parametrize("name", [c for c in CONFIGS if c not in TWINS
                                  and (not c.startswith("pixart-sigma-") or c.endswith("4k-kv"))])
def test_every_preset_gives_a_velocity_of_the_shape_of_its_image(name):
    for stage in ("pretrain", "grow"):
        config = load_config(name, stage)
        z, logsnr, text = models.example(config, 2, "meta")
        v = on_meta(config)(z, logsnr, text, torch.zeros(2, count_columns(config), device="meta"))
        assert v.shape == z.shape == (2, *models.image_shape(config))
        assert config["sampler"] in sampling.SAMPLERS
        if name not in ("toy", "speedrun", "small", "tiny", "claims", "claims-long"):  # the papers' recipes are AdamW's
            assert config["muon_lr"] == 0 and config["data"] != "scenes"


@pytest.mark.parametrize("name, stage", [("toy", "grow"), ("pixart-sigma-1k-kv-tiny", "defrost")])
def test_flops_are_the_same_counted_by_shapes_on_the_meta_device(name, stage):
    config = load_config(name, stage, [])

    def loss(model, images):
        x, t, text = models.example(config, images)
        return models.diffusion_loss(model, x, text, t, x, config).sum()
    assert count_flops(lambda: build(config), loss) == measure_step(lambda: build(config), loss)[1] > 1e7


@pytest.mark.parametrize("names", [[*TWINS, "pixart-sigma-2k-kv"],
                                   pytest.param([c for c in CONFIGS if c not in TWINS], marks=slow)])
def test_growing_keeps_the_core_of_every_preset(names):
    """Each stage fits what it keeps of another: on shapes alone, through all configs and their chains of starts."""
    for name in names:
        for stage in ("grow", "defrost"):
            config, keeps = load_config(name, stage), "core." if stage == "grow" else ""
            start = (name, "pretrain" if stage == "grow" else "grow")
            if config["starts"] and stage == "defrost":
                start = config["starts"].split("/")
            then = load_config(*start)
            parent = {"config": then, "model": on_meta(then).state_dict(), "ema": {}}
            kept, said = models.init_from(parent, config, keeps)
            assert len(kept) > 20 and ("0 unused" in said or stage == "grow"), (name, stage, said)
            assert ("KV merge by 2" in said) == (stage == "defrost" and name.startswith("pixart") and "-kv" in name)
    assert load_config("pixart-sigma-4k-kv", "defrost")["starts"] == "pixart-sigma-4k/defrost"


@pytest.mark.parametrize("name", TWINS)
def test_twins_train_and_sample_in_every_stage(name):
    seen = []
    for stage in STAGES:
        config = load_config(name, stage)
        if {**config, "lr": 0, "steps": 0} in seen:            # as in another stage
            continue
        seen.append({**config, "lr": 0, "steps": 0})
        net = shaken(models.build(config))
        styled = open_style(config) if config["style"] else None
        batches = Batches(data.open_data(config), config, filtered=False, styled=styled)
        x, text, size = (part[:2] for part in batches[0])
        x = open_autoencoder(config).encode(x)
        turns = critics(config) if config["perceptual"] or config["adversarial"] else [plain_turn(config)]
        for turn, trained in zip(turns, (net, turns[-1].model)):
            batch = x, text, torch.tensor([0.1, 0.7]), torch.randn_like(x), size
            turn.loss(trained, config["steps"], *batch).sum().backward()
        assert len(turns) == 1 + name.startswith("pixelgen")
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
        picture = sampling.sample(net, config, ["a red circle"], steps=2)
        assert picture.shape == (1, 3, config["resolution"], config["resolution"]) and picture.abs().max() <= 1


def test_a_twin_is_its_preset_but_for_sizes():
    sizes = {key for name, section in read_sections().items() if name.startswith("tiny") for key in section}
    free = sizes | {"inherits", "starts", "autoencoder", "latent_channels", "latent_stride", "latent_scale", "patch",
                    "kv_merge_layers"}
    for name in TWINS:
        for stage in STAGES:
            twin, real = load_config(name, stage), load_config(name.removesuffix("-tiny"), stage)
            assert {k for k in twin if twin[k] != real[k]} <= free, name
            assert all(twin[k] == real[k] for k in ("shell", "sampler", "conditions", "kv_merge", "muon_lr")), name


# ---- kernels.py ------------------------------------------------------------------------------------------------------
# Without a GPU the kernels run in Triton's interpreter, which is slow but exact; the models keep to PyTorch all the
# while, since a kernel is taken on a CPU only where backend = "triton" asks for it.

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16] + [torch.float64] * (DEVICE == "cpu")
needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason="no Triton")


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so an element that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def by_triton(monkeypatch):
    monkeypatch.setattr(kernels, "backend", "triton")


def run_apart(code, **environment):
    """A Python of its own: for what must not happen to this one."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], cwd=HERE, env=env | environment, capture_output=True, text=True)


def results(name, width, dtype=torch.float32, **options):
    """Outputs and gradients of a kernel and of its plain twin for the same inputs."""
    kernel, twin, *call = kernels.example_call(name, width, dtype, DEVICE, **options)
    return run_with_gradients(kernel, *call), run_with_gradients(twin, *call)


# kernels: errors against float64

IN_EVERY_DTYPE = [("attention", D, dict(H=1)) for D in (8, 64, 72, 96, 128)] + [
    ("kv_merge", 9, dict(ratio=3)), ("kv_merge", 48, dict(ratio=2)), ("kv_merge", 72, dict(ratio=4))]
IN_FLOAT32 = [("attention", 16, dict(H=1, Nk=150, kv_len=(n,))) for n in (63, 64, 65, 128)] + [   # edges of blocks
    ("attention", 8, dict(Nq=1030, Nk=20, H=1, B=1, kv_len=None)),         # few keys: several programs add to one dK
    ("kv_merge", 24, dict(norm=False))]
MANY_BLOCKS = [("attention", D, dict(Nq=Nq, Nk=Nk, **keys)) for D in (64, 72, 96, 128)
               for Nq, Nk in ((461, 100), (100, 461), (256, 256))
               for keys in (dict(kv_len=None), dict(kv_len=(Nk, Nk // 3)), dict(kv_len=None, mask=True))]


@pytest.mark.parametrize("name, width, options, dtype", [
    *((*case, dtype) for case in IN_EVERY_DTYPE for dtype in DTYPES), *((*case, torch.float32) for case in IN_FLOAT32),
    *(pytest.param("kv_merge", 1152, dict(ratio=2), dtype, marks=slow) for dtype in DTYPES),
    *(pytest.param(*case, torch.float16, marks=slow) for case in MANY_BLOCKS)])
@needs_triton
def test_kernels_are_right(name, width, options, dtype, poisoned):
    """Within the dtype's tolerance, and no worse than twice what PyTorch makes of the same numbers."""
    kernel, twin, *call = kernels.example_call(name, width, dtype, DEVICE, **options)
    ours, theirs = relative_errors(kernel, twin, *call), relative_errors(twin, twin, *call)
    for a, b in zip(ours, theirs):
        assert a < tolerance(dtype), (ours, theirs)
        assert dtype == torch.float64 or a < 2 * b + torch.finfo(dtype).eps, (ours, theirs)


@pytest.mark.parametrize("Nq, Nk, D", [(1, 1, 16), (16, 31, 5), (77, 205, 72), (205, 64, 40), (130, 129, 24),
                                       (128, 128, 64)])
@needs_triton
def test_attention_of_odd_sizes(Nq, Nk, D, poisoned):
    kernel, twin, inputs, options = kernels.example_call("attention", D, torch.float32, DEVICE, B=1, H=3, Nq=Nq, Nk=Nk,
                                                         kv_len=None)
    exact = run_with_gradients(twin, [x.double() for x in inputs], options)
    for a, b in zip(run_with_gradients(kernel, inputs, options), exact):   # dQ, dK of one key are 0: no relative error
        assert (a.double() - b).norm() < tolerance(torch.float32) * (b.norm() + 1e-1 * b.numel() ** 0.5)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")     # in rows that are thrown away
@needs_triton
def test_large_logits():
    """The backward's P = exp(S - L) is as good as float32 holds S and L: its error grows with the logits."""
    for size in (1e2, 1e4):
        kernel, twin, inputs, options = kernels.example_call("attention", 16, torch.float32, DEVICE, H=1)
        inputs[0] = inputs[0] * size
        o, _, _, dv = relative_errors(kernel, twin, inputs, options)
        o_twin, _, _, dv_twin = relative_errors(twin, twin, inputs, options)
        assert o < 2 * o_twin + 1e-5 and dv < 2 * dv_twin + 1e-5 + 2e-7 * size
        assert all(x.isfinite().all() for x in run_with_gradients(kernel, inputs, options))


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 in the interpreter only")
@needs_triton
def test_gradients_by_finite_differences():
    q, k, v = (seeded_randn(1, n, 1, 4, seed=i).double().requires_grad_() for i, n in enumerate((5, 7, 7)))
    mask = torch.tensor([[True, True, False, True, True, False, True]])
    assert torch.autograd.gradcheck(functools.partial(kernels.attention_triton, mask=mask), (q, k, v), fast_mode=True)
    kernel, _, inputs, options = kernels.example_call("kv_merge", 4, torch.float64, DEVICE, B=1)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(functools.partial(kernel, **options), inputs, fast_mode=True)


# kernels: which keys count

@pytest.mark.parametrize("kv_len", [(0, 50), (50, 0), (49, 1), (0, 0)])
@pytest.mark.parametrize("mask", [False, True])
@needs_triton
def test_keys_that_do_not_count(kv_len, mask, poisoned):
    (o, dq, dk, dv), twin = results("attention", 20, kv_len=kv_len, mask=mask)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip((o, dq, dk, dv), twin))
    for i, n in enumerate(kv_len):
        assert not dk[i, n:].any() and not dv[i, n:].any()                 # exact zeros
        assert n > 0 or not o[i].any() and not dq[i].any()


@needs_triton
def test_skipped_keys_are_never_read():
    kernel, _, inputs, options = kernels.example_call("attention", 16, torch.float32, DEVICE, Nk=200, kv_len=(60, 64))
    before = run_with_gradients(kernel, inputs, options)
    for x in inputs[1:]:
        x[:, 64:] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(before, run_with_gradients(kernel, inputs, options)))


def test_plain_twin_gives_zeros_without_keys():
    q, k, v = (seeded_randn(2, 5, 2, 8, seed=i).requires_grad_() for i in range(3))
    o = kernels.attention_reference(q, k, v, kv_len=torch.tensor([0, 3]))
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert not o[0].any() and o[1].any() and all(not g[0].any() and g.isfinite().all() for g in grads)
    assert torch.equal(o, kernels.attention_reference(q, k, v, mask=torch.arange(5) < torch.tensor([[0], [3]])))


# kernels: exact properties, which need no reference

@needs_triton
def test_constant_values_and_permuted_keys(by_triton):
    q, k, v = (seeded_randn(1, n, 2, 24, seed=n).to(DEVICE) for n in (70, 90, 90))
    assert torch.allclose(kernels.attention(q, k, torch.full_like(k, 3.0)), torch.tensor(3.0), rtol=1e-5)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(kernels.attention(q, k, v), kernels.attention(q, k[:, order], v[:, order]), atol=1e-5)


@pytest.mark.parametrize("name, width, options", [
    ("attention", 72, dict(Nq=70, H=1)), ("attention", 8, dict(Nq=1030, Nk=20, H=1, B=1, kv_len=None)),
    ("kv_merge", 40, dict(B=3))])
@needs_triton
def test_two_runs_agree_bit_for_bit(name, width, options):
    first, second = (results(name, width, torch.float16, **options)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# kernels: memory

@needs_triton
def test_strides_of_every_kind(poisoned):
    """Packed, transposed, expanded, offset and gapped inputs give what their contiguous copies give, bit for bit."""
    x = seeded_randn(2, 33, 3, 3, 24).to(DEVICE, torch.float16)
    views = [x[:, :, 0], x.transpose(2, 3)[:, :, :, 1], x[:1, :, 2].expand(2, -1, -1, -1), x[:, 1:, 0],
             x.flatten(3)[:, :, :, None, ::3], seeded_randn(2, 3, 24, 33).to(DEVICE, torch.float16).permute(0, 3, 1, 2)]
    for q, k, v in ((0, 1, 2), (2, 0, 1), (1, 1, 1), (5, 0, 5), (3, 5, 5)):
        inputs = [views[i] for i in (q, k, v)]
        ours = run_with_gradients(kernels.attention_triton, inputs, {})
        copies = run_with_gradients(kernels.attention_triton, [y.contiguous() for y in inputs], {})
        assert all(torch.equal(a, b) for a, b in zip(ours, copies))
    q = views[0].detach().requires_grad_()                                 # a sum's gradient is one element, expanded
    kernels.attention_triton(q, views[1], views[1]).sum().backward()
    assert q.grad.isfinite().all()


@needs_triton
def test_merge_keeps_nothing_without_a_backward_and_spares_an_unused_v():
    kernel, _, inputs, options = kernels.example_call("kv_merge", 24, torch.float32, DEVICE)
    assert not inputs[0].is_contiguous()
    alone = run_with_gradients(kernel, inputs, options, training=False)
    assert torch.equal(alone[0], run_with_gradients(kernel, inputs, options)[0])
    k, v = (x.clone().requires_grad_() for x in inputs[:2])
    kernel(k, v, *inputs[2:], **options)[0].sum().backward()
    assert k.grad.any() and (v.grad is None or not v.grad.any())


@needs_triton
def test_grid_has_one_axis_for_images_and_heads(monkeypatch):
    """The second axis of a grid ends at 65535, and a training batch has more images times heads."""
    grids = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *args, **options: grids.append(grid))
    q = torch.empty(1, 1, 1, 16).expand(10000, 300, 7, 16)
    kernels.attention_op(q, q, q, None, None, 1.0)
    assert grids == [(10000 * 7 * 3,)]


def use_offsets_past_2_to_the_31():
    kernels.backend = "triton"
    far = torch.empty(2 ** 31 + 4096, dtype=torch.float16)                 # never touched, so never paid for
    for shape, stride in (((1, 8, 2, 16), (0, 16, 2 ** 31, 1)), ((2, 8, 1, 16), (2 ** 31, 16, 16, 1))):
        x = far.as_strided(shape, stride)
        x.copy_(seeded_randn(*shape))
        assert torch.allclose(kernels.attention(x, x, x), kernels.attention_reference(x, x, x), atol=2e-3)


@pytest.mark.skipif(DEVICE == "cuda", reason="reads memory that was never written")
@needs_triton
def test_offsets_past_2_to_the_31():
    """In a process of its own, which a wrong address would end."""
    ended(*fork(use_offsets_past_2_to_the_31, TRITON_INTERPRET="1"))


# kernels: KV merge's contract

def test_ratio_1_is_the_identity_and_a_grid_that_cannot_be_merged_is_refused():
    k, v = seeded_randn(2, 15, 8), seeded_randn(2, 15, 8)
    merged = kernels.kv_merge(k, v, None, None, None, None, (3, 5), 1)
    assert merged[0] is k and merged[1] is v
    with pytest.raises(ValueError, match="multiples of 2, such as"):
        kernels.kv_merge(k, v, None, None, None, None, (3, 5), 2)


@needs_triton
def test_merge_starts_as_the_mean(by_triton):
    k = seeded_randn(1, 16, 8).to(DEVICE)
    weight, bias = torch.full((8, 1, 2, 2), 0.25, device=DEVICE), torch.zeros(8, device=DEVICE)
    mean, _ = kernels.kv_merge(k, k, weight, bias, None, None, (4, 4), 2)
    assert torch.allclose(mean.view(2, 2, 8), k.view(2, 2, 2, 2, 8).mean((1, 3)), atol=1e-6)


# kernels: which path

def test_a_cpu_takes_pytorch_without_a_word(capsys, monkeypatch):
    q = seeded_randn(1, 4, 1, 8)
    monkeypatch.setattr(kernels, "launch", None)                           # would fail
    assert torch.equal(kernels.attention(q, q, q), kernels.attention_reference(q, q, q))
    assert capsys.readouterr().out == ""


@needs_triton
def test_trial_prints_its_choice_and_falls_back_for_one_variant_alone(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "verdicts", {})
    state, attention = torch.get_rng_state(), functools.partial(
        kernels.trial, "attention", torch.float16, 8, torch.device(DEVICE), True, H=1, Nq=40, Nk=50)
    with torch.no_grad():
        assert attention(kv_len=(0, 17, 50)) and attention(kv_len=(0, 17, 50))
        assert kernels.trial("kv_merge", torch.float16, 8, torch.device(DEVICE), False, ratio=2, norm=False)
    assert torch.equal(state, torch.get_rng_state())                       # a trial leaves others' numbers alone
    said = capsys.readouterr().out
    assert said.count(f"attention, float16, width 8, H 1, Nq 40, Nk 50, kv_len (0, 17, 50), training, {DEVICE}") == 1
    assert said.count(": Triton (differs from float64 by") == 2

    def broken(*args, **options):
        raise RuntimeError("out of shared memory")

    def writes_nan(kernel, grid, *args, **options):
        for x in args:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.fill_(float("nan"))
    for i, (launch, reason) in enumerate(((broken, "RuntimeError: out of shared memory"), (writes_nan, "differs"))):
        monkeypatch.setattr(kernels, "launch", launch)
        assert not attention(kv_len=None, mask=bool(i)) and attention(kv_len=(0, 17, 50))
        assert f"PyTorch ({reason}" in capsys.readouterr().out


@pytest.mark.parametrize("Nq, Nk, kv_len", [(256, 256, None), (2304, 2304, None), (1024, 205, [5] * 4),
                                            (768, 77, [77] * 4), (144, 36, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_triton
def test_the_trial_compiles_what_the_model_will_call(dtype, Nq, Nk, kv_len, monkeypatch):
    """The same kernels, blocks, loops and kinds of arguments; and no loop over full blocks is left out."""
    launches, trials = set(), []

    def record(kernel, grid, *args, **options):
        kinds = tuple(x.dtype if isinstance(x, torch.Tensor) else x if x is None else type(x) for x in args)
        launches.add((kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__, kinds, *options.items()))

    def try_kernel(name, x, **variant):
        trials.append(variant)
        return kernels.trial(name, x.dtype, x.shape[-1], x.device, True, **variant)
    for module in (kernels, triton_tools):
        monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "verdicts", {})
    monkeypatch.setattr(kernels, "launch", record)
    monkeypatch.setattr(kernels, "use_kernel", try_kernel)
    x, y = torch.zeros(4, Nq, 3, 2, 72, dtype=dtype), torch.zeros(4, Nk, 2, 2, 72, dtype=dtype)
    call = [x[:, :, 0], y[:, :, 0], y[:, :, 1]], dict(kv_len=kv_len and torch.tensor(kv_len))
    kernels.attention(*call[0], **call[1])
    tried = launches.copy()
    launches.clear()
    run_with_gradients(kernels.attention_triton, *call)
    assert len(launches) == 3 and launches <= tried
    largest = max(max(config[:2]) for row in kernels.BLOCK_SIZES.values() for config in row)
    assert trials[0]["Nq"] >= largest and trials[0]["Nk"] >= largest


def test_import_without_triton_and_without_the_compiler():
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
assert "torch._dynamo" not in sys.modules                           # a second at every start
q = torch.randn(1, 4, 1, 8)
assert kernels.attention(q, q, q).shape == q.shape
assert not kernels.trial("attention", torch.float32, 8, torch.device("cpu"), False)
kernels.backend = "triton"
try: kernels.attention(q, q, q)
except RuntimeError as e: print(e)
"""
    done = run_apart(code)
    assert done.returncode == 0, done.stderr
    assert "PyTorch (ModuleNotFoundError" in done.stdout and "needs Triton" in done.stdout


# kernels: torch's other machinery

@needs_triton
def test_operators_are_registered_as_torch_wants():
    q, k, v = (seeded_randn(1, 6, 1, 8, seed=i).to(DEVICE).requires_grad_() for i in range(3))
    torch.library.opcheck(kernels.attention_op, (q, k, v, None, None, 0.3))
    _, _, inputs, _ = kernels.example_call("kv_merge", 8, torch.float32, DEVICE, B=1)
    torch.library.opcheck(kernels.kv_merge_op, (*[x.requires_grad_() for x in inputs], 4, 4, 2, True))


@pytest.mark.parametrize("name", ["attention", "kv_merge"])
@needs_triton
def test_compiles_as_one_graph(name, by_triton):
    _, _, inputs, options = kernels.example_call(name, 16, torch.float32, DEVICE)
    function = functools.partial(getattr(kernels, name), **options)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(run_with_gradients(compiled, inputs, {}), run_with_gradients(function, inputs, {})):
        assert torch.equal(a, b)


@needs_triton
def test_trial_happens_while_compiling(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "verdicts", {})
    monkeypatch.setattr(kernels, "use_kernel", lambda name, x, **variant: kernels.trial(
        name, x.dtype, x.shape[-1], x.device, False, **variant))
    compiled = torch.compile(kernels.attention, fullgraph=True, backend="aot_eager")
    for n in (6, 7, 9):                                                    # from the second on with sizes as symbols
        q = seeded_randn(1, n, 1, 8).to(DEVICE)
        assert torch.allclose(compiled(q, q, q), kernels.attention_reference(q, q, q), atol=1e-5)
    assert "Triton (differs" in capsys.readouterr().out and len(kernels.verdicts) == 1


@needs_triton
def test_autocast(by_triton):
    q = seeded_randn(1, 6, 1, 8).to(DEVICE).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        o = kernels.attention(q, q.bfloat16(), q.bfloat16())
    o.float().sum().backward()
    assert o.dtype == torch.bfloat16 and q.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_flops_are_counted(backend, monkeypatch):
    monkeypatch.setattr(kernels, "backend", backend)
    q, k = seeded_randn(2, 6, 3, 8).to(DEVICE).requires_grad_(), seeded_randn(2, 10, 3, 8).to(DEVICE)
    with FlopCounterMode(display=False) as counter:
        kernels.attention(q, k, k).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 3 * 6 * 10 * 8


# ---- data.py ---------------------------------------------------------------------------------------------------------

def test_caption_words_have_buckets_of_their_own():
    world = Scenes(tiny(scene_objects=3, scene_shapes=4, scene_colours=6))
    captions = [world.caption(i) for i in range(2000)]
    words = sorted({w for c in captions for w in c.split()} | {tiny()["style_token"]})
    assert len({int(data.tokenize([w], 1, 1024)) for w in words}) == len(words) > 25
    assert max(len(c.split()) for c in captions) < tiny()["text_length"]           # room for a style token
    assert data.tokenize([""], 4, 1024).sum() == 0


def test_batches_depend_on_seed_and_step_alone_and_visit_each_image_once_an_epoch():
    def order(batch, steps, **changes):
        config = tiny(scene_count=30, batch=batch, **changes)
        return [p for s in range(steps) for p in Batches(Scenes(config), config, False).pairs(s)]
    pairs = order(6, 10)
    assert pairs == order(3, 20) and pairs != order(6, 10, seed=1)
    assert sorted(i for e, i in pairs if e == 0) == sorted(i for e, i in pairs if e == 1) == list(range(30))
    batches = Batches(Scenes(tiny()), tiny(), filtered=False)
    assert all((a == b).all() for a, b in zip(batches[3], batches[3]))


def test_devices_share_a_batch_and_more_of_them_than_samples_change_nothing(photos):
    config = tiny(data=str(photos), batch=24)                  # 24 images, 24 rows, 12 devices
    whole, shares = (data.open_data(config) for _ in range(2))
    x, text, size = Batches(whole, config, False)[1]
    parts = [Batches(shares, config, False, "pretrain", rank, 12)[1] for rank in range(12)]
    assert all(len(p[0]) == 2 for p in parts)
    assert all(torch.equal(torch.cat(part), all_) for part, all_ in zip(zip(*parts), (x, text, size)))


# data: a folder or shards -> an index

def test_folder_of_images_trains_grows_and_samples(photos, tmp_path):
    (photos / "fake.jpg").write_text("<html>")                 # no image
    torn = picture(64, 64, kind="PNG")
    (photos / "torn.png").write_bytes(torn[:2000] + bytes(2000) + torn[4000:])     # its header and its end are whole
    (photos / "torn.txt").write_text("torn")
    words = ("train.py", "--data", photos, "--upscale", "--out", tmp_path / "o", *TINY, "--stage")
    output = run(*words, "pretrain") + run(*words, "grow")
    assert re.search(r"skipped +1 +not an image, such as 'fake.jpg'", output)
    assert output.count("skipped torn.png: ") == 2 and "finished" in output
    run("sample.py", tmp_path / "o/toy/grow", "grey level 3", "--n", 2, "--steps", 3, "--to", tmp_path / "g.png")
    table = run("data.py", "check", photos)
    assert "used            25" in table and "not an image" in table
    os.truncate(photos / "a 3.JPG", 300)                       # other data than the run's
    old = re.search(r"data_id (\w{16}) there, \w{16} here.*--data_id \1,", run(*words, "grow", code=2))[1]
    assert "taken in place of " + old in run(*words, "grow", "--data_id", old)             # who means it may go on


def test_index_and_check_print_a_table_and_name_what_they_refuse(photos, tmp_path):
    pytest.importorskip("pyarrow")
    (photos / "cut.jpg").write_bytes(picture(64, 64)[:900])
    (photos / "mute.jpg").write_bytes(picture(32, 32))
    said = run("data.py", "index", photos, "--to", tmp_path / "ix", "--json", tmp_path / "t.json", "--workers", 2)
    table = {"found": 26, "used": 25, "skipped": {"truncated": 1},
             "captions": {"missing": 1, "empty": 0, "truncated": 0}}
    assert json.load(open(tmp_path / "t.json")) == table and "captions         1  missing, such as 'mute.jpg'" in said
    assert "used            25" in run("data.py", "check", photos)
    assert len(data.open_data({"data": str(tmp_path / "ix")})) == 25
    (photos / "a 3.txt").unlink()                              # two of 25 are more than one in twenty
    for command in ("check", "index"):
        assert "error: 2 of 25 images" in run("data.py", command, photos, code=2)
    said = run("data.py", "check", photos, code=2)
    assert all(f"no caption: {name}\n" in said for name in ("a 3.JPG", "mute.jpg"))
    run("data.py", "stats", photos)                            # which is for looking
    run("data.py", "show", photos, "--upscale", "--to", tmp_path / "sheet.png")
    assert "indexed" in run("data.py", "index", photos, "--allow", "uncaptioned")


def test_check_tells_how_much_a_caption_leaves_open():
    for world, low, high in (("world-corner", 0.03, 0.06), ("world-standard", 0.13, 0.16)):
        said = run("data.py", "check", "scenes", "--config", world)
        assert world in said and low < float(re.search(r"lie (0\.\d+) of", said)[1]) < high, said


def test_a_flipped_byte_is_named_and_its_successor_stands_in(shards, capfd):
    indexed(shards)
    config = tiny(data=str(shards), batch=10)
    world = data.open_data(config)
    i = next(i for i in range(20) if world.where(i) == "00000.tar/0003.jpg")
    with open(shards / "00000.tar", "r+b") as f:
        f.seek(int(world.offset[i]) + 700)
        byte = f.read(1)
        f.seek(-1, 1)
        f.write(bytes([byte[0] ^ 1]))
    batches = Batches(data.open_data(config), config, False)
    j = int(batches.members[0][(i + 1) % 20])
    assert batches.sample(0, i)[1] in (world.caption(j), "")
    assert "skipped 00000.tar/0003.jpg: crc error" in capfd.readouterr().err


def test_bounds_of_a_batch_are_told(photos, capsys):
    config = tiny(data=str(photos))
    world = data.open_data(config)
    refused(capsys, lambda: Batches(world, config | {"resolution": 4096}, True),
            "none of 24 images is 4096 px", "--upscale")
    refused(capsys, lambda: Batches(world, config | {"batch": 25}, False), "batch = 25 and only 24 usable images")
    batches = Batches(world, config | {"resolution": 48}, True)
    assert len(batches.usable) == 16 and "33.3% are smaller than 48 px" in batches.summary()
    assert len(Batches(world, config | {"resolution": 48, "upscale": True}, True).usable) == 24


# data: buckets, crops, captions

@pytest.fixture
def wide(tmp_path):
    """40 square, 25 wide, 3 tall images; red grows to the right, green downwards, blue tells the image."""
    image = pytest.importorskip("PIL.Image")
    for k, (w, h) in enumerate([(64, 64)] * 40 + [(96, 48)] * 25 + [(50, 90)] * 3):
        red, green = np.meshgrid(np.linspace(0, 255, w), np.linspace(0, 255, h))
        image.fromarray(np.stack([red, green, np.full((h, w), k)], 2).astype(np.uint8)).save(tmp_path / f"{k:02d}.png")
        (tmp_path / f"{k:02d}.txt").write_text(str(k))
    return data.open_data({"data": str(tmp_path)})


def test_every_batch_is_of_one_bucket_and_none_is_left_out(wide):
    config = tiny(resolution=32, grid=8, aspects="32x32,24x48,48x24", batch=4, conditions="size_and_crop")
    batches = Batches(wide, config, filtered=False)
    assert [len(m) for m in batches.members] == [40, 25, 3]
    steps = [batches.pairs(s) for s in range(170)]             # ten rounds of 17 batches of 4
    buckets = [{int(batches.bucket[i]) for _, i in pairs} for pairs in steps]
    assert all(len(b) == 1 for b in buckets)
    seen = [p for pairs in steps for p in pairs]
    assert len(set(seen)) == len(seen) == 680                  # no (epoch, sample) twice
    visits = np.bincount([i for _, i in seen], minlength=68)
    assert visits.min() >= 9 and visits.max() <= 11            # small buckets as often as large ones
    again = Batches(wide, config, filtered=False)
    some = 169, 3, 80                                          # from (seed, step) alone
    assert [again.pairs(s) for s in some] == [steps[s] for s in some]
    assert buckets[:17] != buckets[17:34] or buckets[17:34] != buckets[34:51]
    for s in range(6):
        x, _, size = batches[s]
        assert x.shape == (4, 3, *batches.sizes[next(iter(buckets[s]))])
        assert (size[:, 4:] == torch.tensor(x.shape[2:])).all()


def buckets_of(config):
    return data.bucket_sizes(config["aspects"], config["resolution"], models.token_size(config))


def test_vermeers_sizes_and_sdxls_rule():
    vermeer = tiny(resolution=1024, grid=32, aspects="1024x1024,768x1376,1376x768")
    assert buckets_of(vermeer) == [(1024, 1024), (768, 1376), (1376, 768)]
    sizes = buckets_of(tiny(resolution=1024, grid=16, aspects="every 64"))
    table = ("512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 "
             "640x1536 704x1472 704x1408 768x1280 832x1216 896x1152 960x1088 1024x1024")
    assert {tuple(map(int, s.split("x"))) for s in table.split()} <= set(sizes)    # SDXL, Appendix I
    assert all(0.85 * 2 ** 20 <= h * w <= 2 ** 20 and (w, h) in sizes for h, w in sizes) and len(sizes) == 33
    images = np.array([[1024, 1024], [1920, 1080], [1080, 1920], [800, 1000]])
    assert data.nearest_bucket(buckets_of(vermeer), images).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("aspects, words", [
    ("1024", "write HxW"), ("every 2048", "is above the side of 1024 px"), ("1000x1000", "multiples of a token, 32 px"),
    ("every 60", "multiples of a token, 32 px"), ("0x32", "multiples")])
def test_aspects_that_do_not_fit_the_grid_are_refused(aspects, words, capsys):
    refused(capsys, lambda: buckets_of(tiny(resolution=1024, grid=32, aspects=aspects)), words)


def test_size_tells_where_the_crop_came_from(wide):
    config = tiny(resolution=32, aspects="32x32", flip=True, caption_dropout=0.0)
    batches, flips = Batches(wide, config, filtered=False), set()
    for i in range(40, 64):
        image, caption, (h, w, top, left, height, width), *_ = batches.sample(0, i)
        assert caption == str(i) and (h, w, top, height, width) == (48, 96, 0, 32, 32)
        assert abs(int(image[9, 9, 2]) - i) <= 1
        flipped = int(image[0, 0, 0]) > int(image[0, -1, 0])
        plain = 64 - 32 - left if flipped else left            # columns of the unflipped image, resized to 32 x 64
        red = image[16, ::-1 if flipped else 1, 0].astype(float)
        assert abs(red - 255 * (plain + np.arange(32) + 0.5) / 64).max() < 4
        flips.add(flipped)
    assert flips == {True, False} and len({batches.sample(0, i)[2][3] for i in range(40, 64)}) > 10
    assert (batches.sample(0, 41)[0] == batches.sample(0, 41)[0]).all()
    assert batches.sample(0, 41)[2] != batches.sample(1, 41)[2]


def test_a_batch_tells_the_numbers_of_its_pictures_and_drops_some(runs):
    config = tiny(conditions="objects,size_and_crop,size", condition_dropout=0.5)
    world = data.open_data(config)
    config |= Batches(world, config, False).identity
    assert config["condition_ranges"] == "objects 1..2, size 0.2945..0.4305"
    batches, told = Batches(world, config, False, "grow"), []
    for step in range(10):
        rows = batches[step][2]                                # (8, 8)
        assert rows.shape == (8, count_columns(config)) and torch.equal(rows[:, 5:7], torch.full((8, 2), 16.0))
        for row, (_, i) in zip(rows, batches.pairs(step)):
            sizes = [o["diameter"] for o in world.scene(i)["objects"]]
            truth = torch.tensor([len(sizes), np.mean(sizes)])
            there = ~row[[0, 7]].isnan()
            assert torch.allclose(row[[0, 7]][there], truth[there].float())
            told.append(there)
    assert (torch.stack(told).float().mean(0) - 0.5).abs().max() < 0.2 and len(torch.stack(told).unique(dim=0)) == 4
    without = Batches(world, tiny(), False, "grow")
    assert without[3][2].shape == (8, 0)                       # and no other draw has changed
    assert all(torch.equal(a, b) for a, b in zip(without[3][:2], batches[3][:2]))


def test_stretching_keeps_all_of_an_image(wide):
    batches = Batches(wide, tiny(resolution=32, resize="stretch"), filtered=False)
    image, _, size, *_ = batches.sample(0, 50)
    assert size == (48, 96, 0, 0, 32, 32) and image[:, 0, 1].max() > 245
    assert image[0, :, 0].min() < 5 and image[0, :, 0].max() > 250


def test_colours_jitter_by_the_share_asked_for(photos):
    world = data.open_data(tiny(data=str(photos)))
    plain, moved = (Batches(world, tiny(jitter=j), filtered=False) for j in (0.0, 0.2))
    means = [(plain.sample(0, i)[0].mean(), moved.sample(0, i)[0].mean()) for i in range(24)]
    ratios = [after / before for before, after in means if before > 20]
    assert 0.78 <= min(ratios) < 0.9 and 1.1 < max(ratios) <= 1.22                 # fields of grey: brightness alone


def test_captions_are_mixed_and_dropped_by_the_shares_asked_for(tmp_path):
    for k in range(20):
        (tmp_path / f"{k}.png").write_bytes(picture(16, 16, k, "PNG"))
        raw = {"captions": ["a", "b"]} if k else {}
        (tmp_path / f"{k}.json").write_text(json.dumps(raw | {"long_caption": "c"}))
    config = tiny(long_captions=0.7, caption_dropout=0.1)
    batches = Batches(data.open_data({"data": str(tmp_path)}), config, filtered=False)
    said = [batches.sample(e, i)[1] for e in range(100) for i in range(1, 20)]
    share = {c: said.count(c) / len(said) for c in "abc"} | {"": said.count("") / len(said)}
    assert all(abs(share[c] - expected) < 0.03 for c, expected in {"a": 0.135, "b": 0.135, "c": 0.63, "": 0.1}.items())
    assert {batches.sample(e, 0)[1] for e in range(50)} == {"c", ""}               # where there is no raw one


def test_workers_prepare_the_same_batches(photos):
    config = tiny(data=str(photos), steps=5, flip=True)
    world = data.open_data(config)
    loaders = (torch.utils.data.DataLoader(Batches(world, config, False), batch_size=None, sampler=range(2, 5),
                                           num_workers=n) for n in (0, 2))
    for a, b in zip(*loaders, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b))


# data: encoders and their caches

def test_captions_are_embedded_once_and_read_as_batches(photos, encoders, capsys):
    pytest.importorskip("pyarrow")
    (photos / "a 5.txt").write_text("grey " * 30)              # longer than the encoders read
    (photos / "a 6.txt").write_text("")
    indexed(photos)
    args = types.SimpleNamespace(path=str(photos), encoder="t5-xxl:6,clip-h:5", dtype="fp32", vae=None,
                                 weights=folders(encoders, "t5", "clip"))
    bare = types.SimpleNamespace(**vars(args) | {"weights": ""})
    refused(capsys, lambda: data.embed(bare, tiny(data=str(photos))), "Add --weights FOLDER")
    data.embed(args, tiny(data=str(photos), batch=5))
    config = tiny(data=str(photos), encoder=args.encoder, encoder_width=(32, 24), text_length=11, caption_dropout=0.0)
    batches = Batches(data.open_data(config), config, False)
    x, text, _ = batches[0]
    assert text.shape == (8, 11, 32) and text.dtype == torch.float32
    captions = [batches.sample(e, i)[1] for e, i in batches.pairs(0)]
    encoder = {"encoder_weights": args.weights, "encoder_id": batches.identity["encoder_id"]}
    now = data.encode_captions(captions, config | encoder)
    assert torch.allclose(text, now, atol=1e-5) and torch.equal(data.encode_captions(captions, config), text)
    assert data.encode_captions(["", ""], config).shape == (2, 11, 32) and not data.encode_captions([""], config).any()
    refused(capsys, lambda: data.encode_captions(["unseen words"], config), "'unseen words'", "set encoder_weights")


def test_latents_are_made_once_and_read_as_batches(photos, capsys):
    pytest.importorskip("pyarrow")
    config = tiny(data=str(photos), resolution=16, latent_stride=2, latent_channels=12, latent_scale=1.0, batch=24,
                  conditions="size_and_crop")
    indexed(photos)
    args = types.SimpleNamespace(path=str(photos), encoder="", weights="", dtype="fp32", vae="space_to_depth")
    data.embed(args, config)
    config["autoencoder"] = "space_to_depth"
    world = data.open_data(config)
    batches = Batches(world, config, False)
    z, _, size = batches[0]
    assert z.shape == (24, 12, 8, 8)
    for row, z_, (_, i) in zip(size.tolist(), z, batches.pairs(0)):
        image, top, left = world.view(i, 16, 16)
        assert row[2:] == [top, left, 16, 16]
        assert torch.allclose(open_autoencoder(config).decode(z_[None]), to_tensor(np.stack([image])), atol=1e-6)
    refused(capsys, lambda: Batches(world, config | {"flip": True}, False), "flip and jitter need pixels")
    refused(capsys, lambda: Batches(world, config | {"resize": "stretch"}, False), "resize crop there, stretch here")
    table = photos / INDEX / "latents-16.arrow"
    table.rename(f"{table}.part")                              # killed half-way
    refused(capsys, lambda: Batches(world, config, False), "is not complete")
    os.rename(f"{table}.part", table)
    assert Batches(world, config | {"autoencoder": ""}, False)[0][0].shape == (24, 3, 16, 16)


def test_a_vocabulary_is_trained_on_the_captions_and_read(photos, tmp_path, capsys):
    pytest.importorskip("sentencepiece")
    args = types.SimpleNamespace(path=str(photos), to=str(tmp_path / "v.model"), size=32000)
    data.vocabulary(args, tiny(data=str(photos)))
    pieces = int(re.search(r"(\d+) pieces", capsys.readouterr().out)[1])
    config = tiny(data=str(photos), encoder=f"sentencepiece:{args.to}", text_vocab=pieces + 1, text_length=30)
    batches = Batches(data.open_data(config), config, False)
    _, text, _ = batches[0]
    assert text.shape == (8, 30) and text.dtype == torch.int64 and 0 < text.max() <= pieces
    assert not data.encode_captions([""], config).any() and batches.identity["encoder_id"].startswith("sentencepiece ")


# data: looking

def test_show_tells_where_each_image_of_a_batch_comes_from(photos, tmp_path, capsys):
    image, args = pytest.importorskip("PIL.Image"), types.SimpleNamespace(path=str(photos), to=str(tmp_path / "s.png"))
    (photos / "a 3.txt").unlink()
    data.show(args, tiny("grow", data=str(photos), batch=24, caption_dropout=0.5))
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].split() == ["image", "file", "size", "crop", "at", "caption"] and "24 images of 32x32 px" in printed
    assert re.search(r"a 3.JPG +64x43 .*\(no caption\)$", printed, re.M)
    assert printed.count("(caption dropped)") in range(4, 20)
    assert image.open(tmp_path / "s.png").size[0] == 4 * 264
    data.stats(args, tiny(data=str(photos)))
    assert capsys.readouterr().out.splitlines()[-2].split()[:6] == ["plain", "23", "1", "1", "23", "3.0"]     # "level"


def test_both_data_sets_serve_all_that_data_py_lists(photos):
    table = data.__doc__.partition("same methods:\n")[2].partition("\n\n")[0]
    columns = [re.sub(r"\([^()]*(\([^()]*\)[^()]*)?\)", "", line) for line in table.splitlines()]
    names = {name for column in columns for name in re.match(r"    (\w+(, \w+)*)", column)[1].split(", ")}
    assert len(names) == 18 and {"len", "name", "choose", "caption", "held_out"} <= names
    for world in (data.open_data(tiny()), data.open_data(tiny(data=str(photos)))):
        assert [n for n in names if not hasattr(world, "__len__" if n == "len" else n)] == []


def test_rows_of_a_style_set_depend_on_the_step_alone_and_carry_its_token():
    config = tiny("grow", style="scenes", batch=32)

    def mixed(rank=0, world=1, **changes):
        c = config | changes
        return Batches(data.open_data(c), c, True, "style", rank, world, open_style(c))
    batches = mixed()
    rows = [row for step in range(40) for row in batches.sources(step)]
    styled = [(epoch, i) for own, epoch, i in rows if own is batches.styled]
    assert 0.45 < len(styled) / len(rows) < 0.55 and len(set(styled)) == len(styled)         # each draws anew
    assert {i for _, i in styled} == set(batches.styled.usable) and len(batches.styled.data) == 60
    assert all(own.sample(epoch, i).caption.startswith("styled ") == (own is batches.styled)
               for own, epoch, i in rows[:200] if own.sample(epoch, i).caption)
    assert any(own is batches.styled and not own.sample(epoch, i).caption for own, epoch, i in rows)   # dropped
    x, text, size = batches[7]                                 # the same in any order, and on any number of devices
    parts = [mixed(rank, 2)[7] for rank in range(2)]
    assert all(torch.equal(torch.cat(part), whole) for part, whole in zip(zip(*parts), (x, text, size)))
    framed = [look(picture, 16).framed for picture in to_uint8(x)]
    assert framed == [own is batches.styled for own, _, _ in batches.sources(7)] and 0 < sum(framed) < 32
    alone = mixed(style_share=1.0)
    assert all(own is alone.styled for own, _, _ in alone.sources(3))
    assert batches.sources(3) != mixed(seed=1).sources(3)
    plain = Batches(data.open_data(config), config, True, "style")
    assert [(e, i) for own, e, i in mixed(style_share=0.0).sources(3)] == plain.pairs(3)


def test_a_bucket_without_images_of_the_style_keeps_to_the_data(wide):
    config = tiny(resolution=32, grid=8, aspects="32x32,24x48,48x24", batch=4, style="scenes", style_share=1.0)
    batches = Batches(wide, config, False, styled=open_style(config))         # scenes are square
    for step in range(30):
        bucket = batches.bucket_at(step)[0]
        assert all((own is batches.styled) == (bucket == 0) for own, _, _ in batches.sources(step))
        assert batches[step][0].shape[2:] == batches.sizes[bucket]
    both = Batches(wide, config | {"batch": 1}, False, styled=wide)
    assert batches.identity["data_id"] == wide.fingerprint
    assert both.identity["data_id"] == f"{wide.fingerprint}+{wide.fingerprint}"


def test_a_style_set_is_embedded_with_its_token(photos, encoders, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    other = shutil.copytree(photos, tmp_path / "best")
    config = tiny(data=str(photos), style=str(other), encoder="t5-xxl:6", encoder_width=(32,), text_length=6, batch=4,
                  caption_dropout=0.0, style_share=1.0)
    args = types.SimpleNamespace(encoder="t5-xxl:6", dtype="fp32", vae=None, weights=folders(encoders, "t5"))
    for folder, prefix in ((photos, ""), (other, "other")):    # another token than the run's
        args.path = str(indexed(folder))
        data.embed(args, tiny(data=str(folder), prefix=prefix))
    refused(capsys, lambda: Batches(data.open_data(config), config, False, styled=open_style(config)),
            "other captions than the index", "--prefix 'styled'")
    config |= {"style_token": "other"}
    batches = Batches(data.open_data(config), config, False, styled=open_style(config))
    captions = [own.sample(epoch, i).caption for own, epoch, i in batches.sources(2)]
    weights = {"encoder_weights": args.weights, "encoder_id": batches.identity["encoder_id"]}
    assert all(caption.startswith("other grey level") for caption in captions)
    assert torch.allclose(batches[2][1], data.encode_captions(captions, config | weights), atol=1e-5)


@slow
def test_memory_of_workers_is_flat_over_200_000_captions(tmp_path):
    """Memory of 4 workers, their own pages (maps of the index are the page cache's), from 120,000 to 300,000 images of
    200,000. Before, each worker's first full garbage collection writes once to what it shared with its parent."""
    pytest.importorskip("PIL.Image")
    blob = picture(16, 16, kind="PNG")
    for s in range(4):
        members = []
        for k in range(50000):
            members += [(f"{k}.png", blob), (f"{k}.txt", f"caption {s} {k} ".encode() * 8)]
        shard(tmp_path / f"{s}.tar", members)
    code = f"""
import data, os, re
from lib import datasets
flags = [("data", {str(tmp_path)!r}), ("batch", "200"), ("workers", "4"), ("steps", "1501")]
config = datasets.load_config("toy", "pretrain", flags)
datasets.write_index({str(tmp_path / 'ix')!r}, *datasets.scan(config["data"], 2))
config["data"] = {str(tmp_path / 'ix')!r}
def private():
    total = 0
    for p in filter(str.isdigit, os.listdir("/proc")):
        parent = open(f"/proc/{{p}}/stat").read().rpartition(")")[2].split()[1]
        if parent == str(os.getpid()):
            pages = open(f"/proc/{{p}}/smaps_rollup").read()
            total += sum(map(int, re.findall(r"Private_Dirty: +(\\d+) kB", pages)))
    return total / 1024
batches = data.Batches(data.open_data(config), config, False)
loader = data.torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(1501), num_workers=4)
for step, _ in enumerate(loader):
    if step in (300, 600, 900, 1200, 1500):
        print(step, round(private(), 1), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    table = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    print(table)
    assert len(table) == 5 and table[-1][1] < 1.03 * table[1][1], done.stdout + done.stderr[-2000:]


# ---- model.py --------------------------------------------------------------------------------------------------------

def test_noise_schedule_is_the_cosine_shifted_by_resolution():
    config = tiny(logsnr_min=-20.0, logsnr_max=20.0)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    shift = 2 * np.log(config["noise_base_resolution"] / config["resolution"])
    expected = [20 + shift, float(-2 * np.log(np.tan(np.pi / 8))) + shift, shift, -20 + shift]
    assert np.allclose(models.get_logsnr(t, config).numpy(), expected, atol=2e-3)
    alpha, sigma = models.alpha_sigma(torch.linspace(-9, 9, 5))
    assert torch.allclose(alpha ** 2 + sigma ** 2, torch.ones(()))


@pytest.mark.parametrize("weighting", list(models.WEIGHTINGS))
def test_weightings_are_the_errors_they_name(weighting):
    config = tiny(weighting=weighting)
    x, eps, wrong = torch.randn(3, 2, 3, 16, 16)
    t = torch.tensor([0.3, 0.8])
    alpha, sigma = models.alpha_sigma(models.get_logsnr(t, config))
    z = alpha * x + sigma * eps
    v = alpha * eps - sigma * x + wrong
    loss = models.diffusion_loss(lambda *_: v, x, None, t, eps, config)
    of_x, of_eps = (alpha * z - sigma * v) - x, (sigma * z + alpha * v) - eps
    between = of_x.abs() ** (4 / 3) * of_eps.abs() ** (2 / 3)
    square = {"v": wrong ** 2, "x": of_x ** 2, "eps": of_eps ** 2, "x-eps": between}[weighting]
    assert torch.allclose(loss, square.mean((1, 2, 3)), rtol=1e-4)


def test_a_model_that_predicts_the_clean_image_gives_its_velocity():
    model = build(tiny(prediction="x")).double()
    z, logsnr, text = torch.randn(2, 3, 16, 16).double(), torch.tensor([-4.0, 5.0]).double(), torch.ones(2, 18).long()
    x = torch.rand(2, 3, 16, 16).double()
    model.shell.decode = lambda *_: x                          # whatever the network thinks of z
    alpha, sigma = models.alpha_sigma(logsnr)
    assert torch.allclose(alpha * z - sigma * model(z, logsnr, text), x)           # as samplers take x from v


def test_a_nested_shell_starts_as_the_old_model_enlarged():
    keys = dict(prediction="x", image_skip=8)
    old, nested = tiny(**keys), tiny("grow", shell="nested", inner_resolution=16, **keys)
    before, after = shaken(build(old)), build(nested)
    kept, said = models.init_from({"config": old, "model": before.state_dict(), "ema": {}}, nested, "core.")
    after.load_state_dict({**after.state_dict(), **kept})
    assert len(kept) == len(before.state_dict()) and "0 unused" in said
    z, logsnr, text = torch.randn(2, 3, 32, 32), torch.tensor([-2.0, 3.0]), torch.ones(2, 18).long()
    alpha, sigma = models.alpha_sigma(logsnr)
    x = alpha * z - sigma * after(z, logsnr, text)
    # pooled by two, noise is half as strong: four times the signal-to-noise ratio
    pooled = torch.nn.functional.avg_pool2d(z, 2) / (alpha ** 2 + sigma ** 2 / 4).sqrt()
    alpha, sigma = models.alpha_sigma(logsnr + math.log(4))
    small = alpha * pooled - sigma * before(pooled, logsnr + math.log(4), text)
    assert torch.allclose(x, small.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-5)
    with pytest.raises(UserError):
        build(nested | {"prediction": "v"})


def test_the_noisy_image_joins_the_head_at_full_size_where_a_config_asks_for_it():
    for stage in ("pretrain", "grow"):                         # the shallow shell, and the unet
        plain, joined = build(tiny(stage)), build(tiny(stage, image_skip=8))
        assert not any("head.block" in name for name, _ in plain.named_parameters())
        assert joined.shell.head.conv_skip.weight.shape == (8, 3 * 9)
        z, logsnr, text = models.example(tiny(stage), 2)
        torch.nn.init.ones_(joined.shell.head.conv_out.weight)
        z = torch.randn_like(z).requires_grad_()
        features = torch.zeros(2, 32, 8, 8)                    # nothing comes from the core
        temb, skips = torch.zeros(2, 32), joined.shell.encode(z.detach(), torch.zeros(2, 32), logsnr)[1]
        joined.shell.decode(features, [z, *skips[1:]], temb).square().sum().backward()
        assert z.grad.abs().sum() > 0


EMBEDDED = dict(encoder="t5-xxl:5,clip-h:3", encoder_width=(12, 8), text_length=8)
EVERYTHING = dict(EMBEDDED, shell="patch", patch=2, kv_merge=2, kv_merge_layers="1-1", conditions="size_and_crop")


@pytest.mark.parametrize("stage, changes, last", [
    ("pretrain", {}, "head.conv_out"), ("grow", {}, "head.conv_out"), ("grow", EVERYTHING, "proj_out"),
    ("grow", dict(EVERYTHING, shell="unet", kv_merge_norm=False), "head.conv_out")])
def test_outputs_meant_to_be_zero_are_exactly_zero_in_the_finished_model(stage, changes, last):
    config = tiny(stage, **changes)
    net = models.build(config)
    zero = {k for k, p in net.named_parameters() if p.ndim > 1 and not p.any()}
    core = {f"core.blocks.{i}.{part}" for i in range(2) for part in ("scale_shift_table", "cross_attention.out.weight")}
    core |= {"core.modulation.weight"} | ({"core.time.condition_out.SIZE_AND_CROP.weight"} if changes else set())
    shell = {k for k in net.state_dict() if k.startswith("shell.") and ("temb_proj.weight" in k or "scale_shift" in k)}
    assert zero == core | shell | {f"shell.{last}.weight"}
    z, logsnr, text = models.example(config, 2)
    z, text, size = torch.randn_like(z), text + 1, torch.full((2, count_columns(config)), 50.0)
    assert not net(z, logsnr, text, size).any()
    temb, text, text_len = net.core.embed(logsnr, text, size)
    features = torch.randn(2, 32, 8, 6)
    with_positions = features + models.positions_2d(8, 6, 32).T.reshape(1, 32, 8, 6)
    assert (text_len == config["text_length"]).all()
    assert torch.equal(net.core(features, temb, text, text_len), with_positions)


@pytest.mark.parametrize("stage", ["pretrain", "grow"])
def test_padding_cannot_change_the_output_and_real_text_does(stage):
    config = tiny(stage)
    net = shaken(models.build(config))
    z, logsnr = torch.randn(2, 3, *[config["resolution"]] * 2), torch.tensor([0.0, 1.0])
    captions = ["a large red circle", "two small squares"]
    tokens = data.tokenize(captions, config["text_length"], config["text_vocab"])
    with torch.no_grad():
        before = net(z, logsnr, tokens)
        net.core.text.position[4:] += 100.0                    # what stands at the places of padding
        net.core.text.embed.weight[0] += 100.0
        assert torch.equal(before, net(z, logsnr, tokens))
        assert not torch.allclose(before, net(z, logsnr, tokens.flip(0)), atol=1e-3)
        null = net(z, logsnr, tokens * 0)
        assert torch.isfinite(null).all() and not torch.allclose(before, null, atol=1e-3)


@pytest.mark.parametrize("changes, words", [
    (dict(resolution=40), "take 32 or 64"), (dict(heads=5), "take width = 40"),
    (dict(kv_merge=3, kv_merge_layers="0-1"), "does not divide a grid of 8 x 8"),
    (dict(kv_merge=2, kv_merge_layers="1-2"), "up to 0-1"), (dict(kv_merge=2), "up to 0-1"),
    (dict(shell="patch", patch=5), "take 30"), (dict(shell="patch", kv_merge=3, kv_merge_layers="0"), "take 30"),
    (dict(EMBEDDED, text_length=9), "text_length = 8"), (dict(EMBEDDED, encoder_width=(12,)), "a width for each"),
    (dict(autoencoder="x", latent_stride=5), "take 80 or 160")])
def test_unfit_sizes_are_refused_before_anything_is_built(changes, words, capsys):
    with pytest.raises(UserError):
        models.build(tiny("grow", **changes))
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("changes", [dict(channels=(8,)), dict(channels=(12, 20), resolution=64),
                                     dict(shell="shallow", entry_channels=4)])
def test_narrow_shells_work(changes):
    net, inputs = shaken(models.build(tiny("grow", **changes))), models.example(tiny("grow", **changes), 1)
    assert net(*inputs).shape == inputs[0].shape


def test_positions_interpolate_and_any_grid_will_do():
    fine, coarse = models.positions_2d(9, 6, 32).view(9, 6, 32), models.positions_2d(3, 2, 32).view(3, 2, 32)
    assert torch.allclose(coarse, fine[1::3, 1::3], atol=1e-5) # middles of 3 x 3 fine cells are those of coarse ones
    for shell, height in (("patch", 16), ("unet", 32), ("shallow", 32)):
        net = shaken(models.build(tiny("grow", shell=shell)))
        z, logsnr, text = models.example(tiny("grow"), 2)
        assert net(torch.cat([z, z], 3)[:, :, :height], logsnr, text).shape == (2, 3, height, 64)


def test_the_patch_shell_compiles_as_one_graph_at_two_sizes():
    config = tiny("grow", **EVERYTHING)
    net = shaken(models.build(config))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    z, logsnr, text = models.example(config, 1)
    text[:, :2], size = 1.0, torch.full((1, 6), 32.0)
    with torch.no_grad():
        for width in (32, 16):
            inputs = z[..., :width] + 1, logsnr, text, size
            assert torch.allclose(compiled(*inputs), net(*inputs), atol=1e-5)


def test_each_encoder_has_its_own_projection_and_real_tokens_come_first():
    config = tiny(**EMBEDDED)
    net = shaken(models.build(config))
    z, logsnr, text = models.example(config, 2)
    z, text = torch.randn_like(z), torch.randn_like(text)
    text[:, 5:, 8:] = 0                                        # the second encoder is narrower
    text[:, 3:5] = text[:, 7:] = 0                             # padding of both
    with torch.no_grad():
        before = net(z, logsnr, text)
        wider = text.clone()
        wider[:, 5:7, 8:] = 100.0                              # beyond the second encoder's width
        assert torch.equal(before, net(z, logsnr, wider))
        tokens, text_len, _ = net.core.text(text)
        assert text_len.tolist() == [5, 5]                     # three of the first encoder, then two of the second
        second = net.core.text.projections[1](text[:, 5, :8])
        assert torch.allclose(tokens[:, 3], second, atol=1e-6)
        features, temb = torch.ones(2, 32, 8, 8), net.core.embed(logsnr, text)[0]
        tokens_and_junk = tokens + 100.0 * (torch.arange(8)[:, None] >= 5)
        before, after = (net.core(features, temb, part, text_len) for part in (tokens, tokens_and_junk))
        assert torch.equal(before, after)
        null = net(z, logsnr, text * 0)
        assert torch.isfinite(null).all() and not torch.allclose(null, net(z, logsnr, text), atol=1e-3)
        alone = net(z[:1], logsnr[:1], torch.zeros(1, 8, 12))
        assert torch.allclose(null[:1], alone, atol=1e-5)


def test_sizes_condition_the_model_through_the_time_embedding():
    config = tiny("grow", conditions="size_and_crop")
    net = shaken(models.build(config))
    z, logsnr, text = models.example(config, 1)
    size = torch.tensor([[64.0, 48, 0, 8, 32, 32]])
    with torch.no_grad():
        one, other, none = [net(z, logsnr, text, s) for s in (size, size.flip(1), None)]
        assert not torch.allclose(one, other, atol=1e-3) and not torch.allclose(one, none, atol=1e-3)
        net.core.time.condition_out["SIZE_AND_CROP"].weight.zero_()                # a constant that sizes cannot move
        assert torch.equal(net(z, logsnr, text, size), net(z, logsnr, text, size.flip(1)))


def test_a_number_that_is_absent_changes_nothing_and_each_counts_in_its_own_range():
    config = tiny("grow", conditions="norm,merge", condition_ranges="norm -3..-1, merge 1000..2000")     # hard names
    net, plain = models.build(config), models.build(tiny("grow"))
    shared = plain.state_dict()
    added = {k for k in net.state_dict() if k not in shared}
    assert added == {f"core.time.condition_{way}.{name}.{what}" for way in ("in", "out") for name in ("NORM", "MERGE")
                     for what in ("weight", "bias")}
    assert {k for k in added if not net.state_dict()[k].any()} == {k for k in added if "_out." in k or "bias" in k}
    net.load_state_dict(shaken(plain).state_dict(), strict=False)
    z, logsnr, text = models.example(config, 2)
    nan, told = torch.full((2, 2), math.nan), torch.tensor([[-2.0, math.nan], [-1.0, 1500.0]])
    with torch.no_grad():
        alone = plain(z, logsnr, text)
        assert all(torch.equal(net(z, logsnr, text, numbers), alone) for numbers in (None, nan, told))   # from zero
        for layer in net.core.time.condition_out.values():
            layer.weight.normal_(), layer.bias.normal_()
        assert torch.equal(net(z, logsnr, text, nan), alone)
        moved = net(z, logsnr, text, told)
        assert not torch.allclose(moved, alone, atol=1e-3) and moved.isfinite().all()
        one = net(z, logsnr, text, torch.tensor([[-2.0, math.nan], [math.nan, math.nan]]))
        assert torch.allclose(one[0], moved[0], atol=1e-6) and torch.allclose(one[1], alone[1], atol=1e-6)
        other = models.build(config | {"condition_ranges": "norm 0..4, merge 1000..2000"})
        other.load_state_dict(net.state_dict())                # half of its range, wherever that lies
        here, there = (m.core.time(logsnr, torch.tensor([[x, 1500.0]] * 2)) for m, x in ((net, -2.0), (other, 2.0)))
        assert torch.allclose(here, there, atol=1e-5)


def test_merging_equal_neighbours_changes_nothing_but_by_the_norm():
    """Where r x r tokens are alike their mean is each of them, so attention over the means is attention over all."""
    plain = models.init_weights(models.SelfAttention(24, 2))
    x = torch.randn(2, 24, 3, 5).repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = x.flatten(2).transpose(1, 2)                           # (2, 6 * 10, 24)
    for norm, same in ((False, True), (True, False)):
        merged = models.init_weights(models.SelfAttention(24, 2, 2, norm))
        merged.load_state_dict(plain.state_dict(), strict=False)
        assert torch.allclose(merged(x, (6, 10)), plain(x, (6, 10)), atol=1e-5) == same


def test_the_merge_starts_closer_without_the_norm():
    """Where keys and values are not of unit length, the mean alone moves the model less than with the norm."""
    config = tiny("grow", shell="patch", patch=2)              # 16 x 16 tokens
    net = shaken(models.build(config))
    parent = {"config": config, "model": net.state_dict(), "ema": {}}
    z, logsnr, text = models.example(config, 2)
    z, distance = F.interpolate(torch.randn(2, 3, 4, 4), size=(32, 32), mode="bilinear"), {}
    with torch.no_grad():
        before = net(z, logsnr, text + 1)
        for norm in (True, False):
            config = tiny("grow", shell="patch", patch=2, kv_merge=2, kv_merge_layers="0-1", kv_merge_norm=norm)
            merged = models.build(config).eval()
            merged.load_state_dict({**merged.state_dict(), **models.init_from(parent, config, "")[0]})
            distance[norm] = (merged(z, logsnr, text + 1) - before).norm()
    assert 0 < distance[False] < 0.6 * distance[True]


@pytest.mark.parametrize("size, saving", [("1k", 0.12), ("2k", 0.25), ("4k", 0.33)])
def test_kv_merge_saves_the_flops_that_are_expected(size, saving):
    flops = []
    for name in (f"pixart-sigma-{size}", f"pixart-sigma-{size}-kv"):
        config = load_config(name, "defrost")
        net, inputs = on_meta(config), models.example(config, 1, "meta")
        with FlopCounterMode(display=False) as counter:
            net(*inputs)
        flops.append(counter.get_total_flops())
    assert 1 - flops[1] / flops[0] == pytest.approx(saving, abs=0.005)


def test_growing_freezes_all_of_the_core_but_the_time_embedding():
    net = models.build(tiny("grow", conditions="size_and_crop,size"))
    models.freeze_core(net)
    for name, p in net.named_parameters():
        assert p.requires_grad == (name.startswith(("shell.", "core.time."))), name
    parts = {name.split(".")[0] for name, _ in net.core.time.named_parameters()}
    assert parts == {"mlp", "condition_in", "condition_out"}


def test_a_core_of_one_shell_grows_in_another_and_the_report_is_true():
    old = tiny("pretrain")                                     # shallow, 8 x 8 tokens
    weights = shaken(models.build(old)).state_dict()
    parent = {"config": old, "model": weights, "ema": {k: p + 1 for k, p in weights.items() if "text" in k}}
    new = tiny("grow", shell="patch", patch=2, kv_merge=2, kv_merge_layers="1")
    kept, report = models.init_from(parent, new, "core.")
    core, whole = [k for k in weights if k.startswith("core.")], models.build(new).state_dict()
    assert sorted(kept) == sorted(core)
    assert torch.equal(kept["core.text.embed.weight"], weights["core.text.embed.weight"] + 1)      # of the EMA
    assert report == (
        f"{len(core)} tensors inherited, {len(whole) - len(core)} new, {len(weights) - len(core)} unused; "
        "positions interpolated by their formula from 8 x 8 to 16 x 16 tokens; "
        "4 of the new ones inside what is inherited (KV merge by 2, blocks 1, as the mean)")
    kept, report = models.init_from(parent, old, "")
    assert len(kept) == len(weights) and report == f"{len(kept)} tensors inherited, 0 new, 0 unused"


@pytest.mark.parametrize("changes, words", [
    (dict(text_length=9), "core.text.position is (18, 32) there, (9, 32) here"),
    (dict(depth=3), "core.blocks.2.scale_shift_table is only here")])
def test_weights_that_do_not_fit_are_refused_by_name(changes, words, capsys):
    parent = {"config": tiny(), "model": models.build(tiny()).state_dict(), "ema": {}}
    with pytest.raises(UserError):
        models.init_from(parent, tiny("grow", **changes), "core.")
    assert words in capsys.readouterr().err


def test_a_checkpoint_older_than_a_key_takes_its_default(runs, tmp_path):
    state = torch.load(runs[0] / "toy/pretrain/last.pt", weights_only=True)
    for key in ("kv_merge", "encoder", "autoencoder"):
        del state["config"][key]
    torch.save(state, tmp_path / "old.pt")
    net, config = models.load(str(tmp_path / "old.pt"))
    assert config["encoder"] == "words" and config["kv_merge"] == 0 and len(net.state_dict()) == len(state["model"])


# ---- sample.py -------------------------------------------------------------------------------------------------------

MEAN, STD = 0.3, 0.5                                           # of a Gaussian whose exact denoiser is known


def exact_denoise(z, logsnr):
    """E[x | z] of x ~ N(MEAN, STD^2)."""
    alpha, sigma = models.alpha_sigma(logsnr)
    return MEAN + alpha * STD ** 2 * (z - alpha * MEAN) / (alpha ** 2 * STD ** 2 + sigma ** 2)


@pytest.mark.parametrize("sampler, steps, tolerance", [
    ("ddpm", 256, 0.01), ("ddpm", 64, 0.03), ("ddim", 256, 0.01), ("ddim", 64, 0.02), ("dpm", 20, 0.01),
    ("churn", 256, 0.03),
    ("exp_heun", 20, 0.01)])
def test_samplers_recover_mean_and_variance_of_a_known_gaussian(sampler, steps, tolerance):
    generator, config = torch.Generator().manual_seed(0), tiny(noise_base_resolution=16)

    def noise_sampler(step):
        return torch.randn(1, 1, 300, 300, generator=generator)
    logsnrs = sampling.get_logsnrs(config, steps, sampler)
    x = sampling.SAMPLERS[sampler][0](exact_denoise, noise_sampler(0), logsnrs, noise_sampler)
    assert abs(x.mean() - MEAN) < tolerance + 0.005 and abs(x.std() - STD) < tolerance


@pytest.mark.parametrize("churn", [0, 1, 2, math.inf])
def test_a_step_renews_as_much_noise_as_its_churn_says(churn):
    """Against the posterior of DDPM as Ho et al. 2020 have it, the step of DDIM, and noise that is all new."""
    x, new = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    logsnrs, z = torch.tensor([-1.0, 0.5, 9.0], dtype=torch.float64), torch.tensor([[[[1.1]]]], dtype=torch.float64)
    seen = []
    sampling.stochastic(lambda z, logsnr: seen.append(z) or x, z, logsnrs, lambda step: new, churn)
    (a, s), (a_next, s_next) = models.alpha_sigma(logsnrs[0]), models.alpha_sigma(logsnrs[1])
    a_step = a / a_next                                        # z_t = a_step z_s + noise of variance v_step
    v_step, eps = s ** 2 - (a_step * s_next) ** 2, (z - a * x) / s
    posterior = (a_step * s_next ** 2 * z + a_next * v_step * x) / s ** 2 + s_next * v_step.sqrt() / s * new
    kept = math.exp(-1.5)                                      # of the variance by churn 1, k; its square by 2
    expected = {0: a_next * x + s_next * eps, 1: posterior, math.inf: a_next * x + s_next * new,
                2: a_next * x + s_next * (kept * eps + (1 - kept ** 2) ** 0.5 * new)}[churn]
    assert torch.allclose(seen[1], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm", "exp_heun"])
def test_orders_of_convergence(sampler):
    """
    x ~ N(MEAN, STD^2) flows to z = alpha MEAN + (alpha^2 STD^2 + sigma^2)^0.5 times a constant. Twice the steps: a
    half or a quarter of the error.
    """
    run_sampler, order, _ = sampling.SAMPLERS[sampler]
    config = tiny(noise_base_resolution=16, logsnr_min=-6.0, logsnr_max=6.0)
    z, errors = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3), []
    for steps in (161, 321, 641):                              # 160, 320, 640 intervals
        logsnrs = sampling.get_logsnrs(config, steps, sampler).double()
        alpha, sigma = models.alpha_sigma(logsnrs[[0, -1]])
        spread = (alpha ** 2 * STD ** 2 + sigma ** 2).sqrt()
        z_end = alpha[1] * MEAN + spread[1] * (z - alpha[0] * MEAN) / spread[0]
        exact = exact_denoise(z_end, logsnrs[-1])
        errors.append((run_sampler(exact_denoise, z, logsnrs, None) - exact).abs().max().item())
    for coarse, fine in zip(errors, errors[1:]):
        assert 0.85 * 2 ** order < coarse / fine < 1.1 * 2 ** order, errors


def test_deterministic_samplers_agree_in_the_limit_and_twenty_steps_of_second_order_are_near_it():
    config = tiny(guidance_end=0.0)                            # x jumps where guidance ends
    net = shaken(models.build(config))

    def pictures(sampler, steps):
        return sampling.sample(net, config, ["a red circle", "a blue square"], steps=steps, sampler=sampler)
    limit = pictures("exp_heun", 60)

    def error(sampler, steps):
        return (pictures(sampler, steps) - limit).square().mean().sqrt()
    assert error("ddim", 160) < 0.02 and error("dpm", 80) < 0.005
    assert error("dpm", 20) < 0.7 * error("ddim", 20)


def test_latents_are_sampled_without_clipping_and_decoded(vae):
    config = load_config("toy", "grow", [*vae, ("shell", "patch"), ("width", "32"), ("depth", "2"),
                                           ("prediction", "v")])
    net = shaken(models.build(config))
    x = sampling.sample(net, config, ["a red circle"], steps=3, size=(32, 48))
    assert x.shape == (1, 3, 32, 48) and x.abs().max() <= 1
    denoise = sampling.guided(net, torch.zeros(1, 18, dtype=torch.long), 1, limit=float("inf"))
    assert denoise(torch.full((1, 4, 16, 16), 50.0), torch.tensor(9.0)).abs().max() > 40


def test_guidance_counts_numbers_as_it_counts_words():
    config = tiny("grow", conditions="size,size_and_crop")
    net, (z, logsnr, text) = shaken(models.build(config)), models.example(config, 2)
    z, tokens, told = torch.randn_like(z), text + 5, torch.full((2, 7), 0.3)
    null = untold(config, told)
    assert null[:, 0].isnan().all() and torch.equal(null[:, 1:], told[:, 1:])      # crops are told to both
    with torch.no_grad():
        x = [sampling.guided(net, tokens, g, told, math.inf, null)(z, logsnr) for g in (0, 1, 3)]
        assert torch.allclose(x[2], x[0] + 3 * (x[1] - x[0]), atol=1e-4)
        assert torch.equal(x[0], sampling.guided(net, tokens * 0, 1, null, math.inf)(z, logsnr))
        assert not torch.allclose(x[1], sampling.guided(net, tokens, 1, null, math.inf)(z, logsnr), atol=1e-3)


def test_sizes_that_a_model_can_make(capsys):
    vermeer, small = load_config("vermeer", "grow"), tiny("grow")
    for size, expected in ((None, (1024, 1024)), ("768x1376", (768, 1376)), ("1376x768", (1376, 768))):
        assert sampling.parse_size(size, vermeer) == expected
    for size, config, words in [
            ("2048x2048", vermeer, "makes 1024x1024"), ("64x64", small, "makes 32x32"), ("32x", small, "makes 32x32"),
            ("520x512", load_config("pixart-sigma-512", "defrost"), "multiples of 16"),
            ("1040x1024", load_config("pixart-sigma-1k-kv", "defrost"), "multiples of 32")]:
        with pytest.raises(UserError):
            sampling.parse_size(size, config)
        message = capsys.readouterr().err
        assert words in message
        offer = re.search(r"such as (\d+x\d+);", message).group(1)
        assert sampling.parse_size(offer, config)              # what it offers is taken


def test_an_image_is_the_same_at_any_batch_size():
    config = tiny()
    net = shaken(models.build(config))
    captions = [f"a {c} circle" for c in "red green blue yellow red green blue yellow".split()]

    def pictures(captions, **options):
        return sampling.sample(net, config, captions, steps=5, **options)
    for sampler in sampling.SAMPLERS:
        whole = pictures(captions, seed=3, sampler=sampler, batch=8)
        assert torch.allclose(whole, pictures(captions, seed=3, sampler=sampler, batch=1), atol=1e-5)
        assert torch.allclose(whole[5:], pictures(captions[5:], seed=3, sampler=sampler, first=5), atol=1e-5)
        assert not torch.allclose(whole, pictures(captions, seed=4, sampler=sampler), atol=0.1)


def test_guidance_is_linear_in_v_on_all_channels():
    config = tiny()
    net = shaken(models.build(config))
    z, logsnr = torch.randn(2, 3, 16, 16) * 0.1, torch.tensor(-3.0)
    tokens = data.tokenize(["a red circle", "a blue square"], config["text_length"], config["text_vocab"])
    with torch.no_grad():
        null, plain, double = (sampling.guided(net, tokens, g)(z, logsnr) for g in (0, 1, 2))
        inside = (torch.stack([null, plain, double]).abs() < 1).all(0)             # denoised images are clipped
        assert inside.float().mean() > 0.3
        assert torch.allclose(double[inside], (2 * plain - null)[inside], atol=1e-4)
        assert torch.allclose(null, sampling.guided(net, tokens * 0, 1)(z, logsnr))


def test_guidance_ends_where_it_is_told_and_costs_nothing_from_there():
    config = tiny("grow", guidance_end=0.45, guidance=3.0)
    net, (z, logsnr, text) = shaken(models.build(config)), models.example(config, 2)
    z, tokens, end = torch.randn_like(z), text + 5, sampling.end_of_guidance(config)
    seen = []
    net.register_forward_pre_hook(lambda net, inputs: seen.append(len(inputs[0])))

    def x(levels, *args, **options):
        with torch.no_grad():
            return sampling.guided(net, tokens, *args, **options)(z, torch.tensor(levels))
    early, late = end - 1, end + 1
    for g, rest in ((3, 1), (0.5, 0.5), (1, 1), (0, 0)):       # what is above 1 becomes 1
        assert torch.equal(x(early, g, end=end), x(early, g)) and torch.equal(x(late, g, end=end), x(late, rest))
    mixed, rows = x([early, late], 3, end=end), [x(early, 3)[0], x(late, 1)[1]]
    assert torch.allclose(mixed, torch.stack(rows), atol=1e-5) and not torch.allclose(mixed, x([early, late], 3))
    seen.clear()
    sampling.sample(net, config, ["a red circle"] * 2, steps=11, sampler="ddim")   # t is 1, 0.9 ... 0
    assert seen == [4] * 6 + [2] * 5 and sampling.count_evaluations(config, "ddim", 11, 3.0) == 17
    assert [sampling.count_evaluations(config, "ddim", 11, g) for g in (0, 0.5, 1)] == [11, 22, 11]
    assert sampling.count_evaluations(config, "exp_heun", 11, 1.0) == 21
    assert sampling.count_evaluations(config, "dpm", 11, 3.0) == 22                # of second order: throughout
    assert sampling.end_of_guidance(tiny(guidance_end=0.0)) == math.inf


# ---- few steps: what a student learns

def student(objective, **keys):
    """The settings of a student of a tiny model."""
    return tiny(objective=objective, sample_steps=keys.pop("sample_steps", 4), **keys)


def batch_of(n=6, noises=None, seed=0):
    """x, text, t, eps of n images of 16 px."""
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    eps = draw(n, noises, 3, 16, 16) if noises else draw(n, 3, 16, 16)
    return 0.3 * draw(n, 3, 16, 16), torch.ones(n, 18, dtype=torch.long), (torch.arange(n) + 0.4) / n, eps


def shows(x):
    """A network that sees the image x wherever it looks, and that as a teacher."""
    def net(z, logsnr, text, size):
        alpha, sigma = models.alpha_sigma(logsnr)
        return (alpha * z - x) / sigma
    return net, lambda z, logsnr, text, size: x


def test_the_target_of_consistency_is_ddim_to_the_end_of_the_segment_and_back():
    """Algorithm 1 of Heek et al. (2024) step by step, in float64; nine teacher's steps in each of four segments."""
    config = student("consistency", teacher_steps=36, weighting="x")
    x, text, t, eps = (v.double() if v.is_floating_point() else v for v in batch_of())
    ahead, taught = torch.randn_like(x), torch.randn_like(x)   # what the student sees from z_next, the teacher from z
    place = (t * 36).floor()
    level = lambda k: models.get_logsnr(k / 36, config)
    now, after, end = level(place + 1), level(place), level((place / 9).floor() * 9)
    (alpha, sigma), (alpha_s, sigma_s), (alpha_u, sigma_u) = map(models.alpha_sigma, (now, after, end))
    z = alpha * x + sigma * eps
    noise = (z - alpha * taught) / sigma
    spread = 0.1 / (2 + (alpha / sigma) ** 2) / noise.square().mean((1, 2, 3), True)
    c = alpha_s - alpha * sigma_s / sigma
    z_s = alpha_s * taught + (sigma_s ** 2 + c ** 2 * spread).sqrt() * noise       # aDDIM
    z_u = alpha_u * ahead + sigma_u * (z_s - alpha_s * ahead) / sigma_s            # DDIM to the end of the segment
    goal = (z_u / sigma_u - z / sigma) / (alpha_u / sigma_u - alpha / sigma)       # from there, inverse DDIM to z

    def loss(image):
        return objectives.consistency_loss(shows(image)[0], shows(ahead)[0], shows(taught)[1], x, text, t, eps, None,
                                         config)
    assert loss(goal).max() < 1e-9
    assert torch.allclose(loss(goal + 0.1), torch.full((6,), 0.01).double(), rtol=1e-3)


def test_in_the_last_step_of_a_segment_the_teacher_alone_is_the_target():
    config = student("consistency", teacher_steps=4)           # one step in each segment
    x, text, t, eps = batch_of()
    (net, teacher), (one, _), (two, _) = shows(x), shows(x + 1), shows(x - 1)
    losses = [objectives.consistency_loss(net, target, teacher, x, text, t, eps, None, config)
              for target in (one, two)]
    assert torch.equal(*losses)


def test_a_network_that_always_sees_one_image_is_consistent():
    x, text, t, eps = batch_of()
    net, teacher = shows(x)
    loss = objectives.consistency_loss(net, net, teacher, x, text, t, eps, None, student("lcm"))
    assert loss.max() < 1e-6


def test_matching_stands_still_where_fake_and_teacher_agree_and_images_do_not_mix():
    config, (_, text, t, noises) = student("dmd", sample_steps=1), batch_of(noises=2)
    net, fake = shaken(models.build(config)), shaken(models.build(config), seed=1)
    of = lambda net: lambda z, logsnr, text, size: objectives.predict_x(net, z, logsnr, text, size)
    objectives.dmd_loss(net, of(fake), of(fake), text, t, noises, None, config).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())       # exactly

    def gradient(rows):
        net.zero_grad()
        loss = objectives.dmd_loss(net, of(fake), of(net), text[rows], t[rows], noises[rows], None, config)
        loss.sum().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])
    alone = sum(gradient(slice(k, k + 1)) for k in range(6))
    assert alone.any() and torch.allclose(gradient(slice(0, 6)), alone, atol=1e-4 * float(alone.abs().max()))


def test_matching_finds_both_modes_of_a_mixture_in_two_dimensions():
    """Where a regression would give their mean. The teacher is exact: a posterior over two round Gaussians."""
    config = student("dmd", sample_steps=1, weighting="x-eps", noise_base_resolution=16, resolution=16)
    modes, width = torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), 0.3

    def teacher(z, logsnr, text, size):
        alpha, sigma = (v.view(-1, 1, 1) for v in models.alpha_sigma(logsnr))
        away, variance = z.flatten(1)[:, None] - alpha * modes, alpha ** 2 * width ** 2 + sigma ** 2     # (B, 2, 2)
        share = torch.softmax(-away.square().sum(-1, True) / (2 * variance), 1)    # (B, 2, 1), of each mode
        return (share * (modes + alpha * width ** 2 / variance * away)).sum(1).view_as(z)

    def network():
        layers = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
                                     torch.nn.Linear(64, 2))

        def net(z, logsnr, text, size):
            x = layers(torch.cat([z.flatten(1), logsnr[:, None] / 5], 1)).view_as(z)
            return shows(x)[0](z, logsnr, text, size)
        return net, layers
    torch.manual_seed(0)
    (net, layers), (fake, fake_layers) = network(), network()
    of_net, of_fake = torch.optim.Adam(layers.parameters(), 2e-3), torch.optim.Adam(fake_layers.parameters(), 5e-3)
    sees = lambda *batch: objectives.predict_x(fake, *batch)
    for step in range(1500):
        t, noises = torch.rand(128), torch.randn(128, 2, 2, 1, 1)
        turns = [(of_fake, objectives.fake_loss(fake, net, None, t, noises, None, config))]
        turns += [(of_net, objectives.dmd_loss(net, sees, teacher, None, t, noises, None, config))] * (step % 5 == 0)
        for optimizer, loss in turns:
            optimizer.zero_grad()
            loss.mean().backward(inputs=optimizer.param_groups[0]["params"])
            optimizer.step()
    with torch.no_grad():
        top = models.get_logsnr(torch.ones(2000), config)
        x = objectives.predict_x(net, torch.randn(2000, 2, 1, 1), top, None, None).flatten(1)
    nearest = (x[:, None] - modes).norm(dim=-1).argmin(1)      # (2000,)
    for mode in (0, 1):
        assert 0.35 < (nearest == mode).float().mean() < 0.65
        assert (x[nearest == mode].mean(0) - modes[mode]).norm() < 0.3             # 1.1 were they all between the two


def test_a_student_takes_its_own_levels_without_guidance():
    config = student("lcm", sample_steps=4)
    net = shaken(models.build(config))
    ends = models.get_logsnr(torch.tensor([1, 0.75, 0.5, 0.25]), config)
    assert torch.allclose(sampling.get_logsnrs(config, 4, "lcm"), ends)
    draw = lambda **keys: sampling.sample(net, config, ["a red circle"] * 2, sampler=keys.pop("sampler", "lcm"), **keys)
    assert torch.equal(draw(guidance=3.0), draw(guidance=1.0)) and not torch.equal(draw(), draw(seed=1))
    assert torch.equal(draw(steps=1), draw(steps=1, sampler="ddim"))               # one step needs no new noise


# ---- cascades: a small picture beside z


def cascade_of(**keys):
    """The settings of a cascade from 8 px to 16 px."""
    return tiny(shell="shallow", low_resolution=8, image_skip=8, **keys)


def test_the_loss_of_a_cascade_is_the_plain_one_with_the_small_picture_beside_z():
    config, n, seen = cascade_of(augmentation=0.6), 300, []
    (x, text, t, noises), told = batch_of(n, noises=2), torch.zeros(n, 0)

    def net(z, logsnr, text, told):
        seen.append((z, told))
        return 0.1 * z[:, :3]
    loss = objectives.cascade_loss(net, x, text, t, noises, config, told)
    plain = models.diffusion_loss(lambda z, *_: 0.1 * z, x, text, t, noises[:, 0], config, told)
    assert torch.equal(loss, plain)
    (z, levels), small = seen[0], F.avg_pool2d(x, 2)
    assert levels.shape == (n, 1) and 0 <= levels.min() < 0.02 and 0.58 < levels.max() <= 0.6
    assert abs(levels.mean() - 0.3) < 0.03 and abs(levels.std() - 0.6 / 12 ** 0.5) < 0.02    # uniform
    angle = math.pi / 2 * levels[:, :, None, None]
    mixed = angle.cos() * small + angle.sin() * noises[:, 1, :, :8, :8]
    assert torch.allclose(z[:, 3:], F.interpolate(mixed, (16, 16), mode="bilinear"), atol=1e-6)
    other = noises.clone()
    other[:, 0] = 0                                            # neither time nor the other noise decides the level
    objectives.cascade_loss(net, x, text, t.flip(0), other, config, told)
    assert torch.equal(seen[1][1], levels) and torch.equal(seen[1][0][:, 3:], z[:, 3:])
    objectives.cascade_loss(net, x, text, t, noises, config | {"augmentation": 0.0}, told)
    assert not seen[2][1].any() and torch.equal(seen[2][0][:, 3:], F.interpolate(small, (16, 16), mode="bilinear"))


def test_a_cascade_learns_to_draw_the_small_picture_that_it_is_given():
    """Of another caption's: it is used, though training never shows two that differ."""
    config = cascade_of(batch=16, depth=1, augmentation=0.3, augmentation_sample=0.1, prediction="x")
    torch.manual_seed(0)
    net, batches = models.build(config), Batches(data.open_data(config), config, filtered=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(60):
        x, text, told = batches[step]
        noises = torch.randn(16, 2, 3, 16, 16)
        loss = objectives.cascade_loss(net, x, text, (torch.arange(16) + 0.5) / 16, noises, config, told)
        loss.mean().backward(), optimizer.step(), optimizer.zero_grad()
    world = Scenes(config, "exam", 0)
    captions = [world.caption(i) for i in range(8)]
    low = F.avg_pool2d(to_tensor(np.stack([world.image(i, 16) for i in range(8)])), 2)
    of_another = low.roll(1, 0)
    x = sampling.sample(net.eval(), config, captions, sampler="dpm", steps=8, guidance=1.0, low=of_another)
    far = lambda a: (F.avg_pool2d(x, 2) - a).square().mean()
    assert far(of_another) < 0.1 < 0.5 < far(low)


def test_a_chain_draws_by_each_models_own_settings_from_noises_that_never_meet(tmp_path, monkeypatch):
    config, keys = cascade_of(augmentation_sample=0.2, sample_steps=3), []
    base_config = tiny(resolution=8, sampler="ddim", sample_steps=2, guidance=3.0)
    net, base = (shaken(models.build(c)) for c in (config, base_config))
    monkeypatch.setattr(sampling, "open_base", lambda *names: (base, base_config))
    captions = ["a red circle", "a blue square", "a green circle"]
    draw = lambda **more: sampling.sample(net, config | {"prefix": "please,"}, captions, seed=3, **more)
    whole = draw()
    low = sampling.sample(base, base_config | {"prefix": "please,"}, captions, seed=3)
    assert low.shape == (3, 3, 8, 8) and torch.equal(whole, draw(low=low)) and not torch.equal(whole, draw(low=-low))
    assert torch.allclose(whole, draw(batch=1), atol=1e-5) and not torch.equal(whole, draw(steps=2))
    normals = sampling.normals
    for module in (sampling, sys.modules["lib.conditions"]):
        monkeypatch.setattr(module, "normals", lambda these, *rest: keys.extend(these) or normals(these, *rest))
    draw(sampler="ddpm")
    assert len(keys) == len(set(keys)) == 3 * (1 + 1 + 3)      # of the base, of the small pictures, of ddpm's steps
    assert draw(size=(24, 16)).shape == (3, 3, 24, 16)


def test_a_base_is_given_weights_of_encoders_that_it_has_and_keeps_others(monkeypatch):
    its, config = tiny(resolution=8, encoder="clip-h:8", encoder_weights="clip"), cascade_of(prefix="please,")
    monkeypatch.setattr(sampling, "sample", lambda net, settings, *_, **__: settings)
    for encoder, given, wanted in (("t5-xxl:8", "t5", "clip"), ("clip-h:8", "", "clip"), ("clip-h:8", "new", "new")):
        monkeypatch.setattr(sampling, "open_base", lambda *names: (None, its))
        config |= {"encoder": encoder, "encoder_weights": given}
        base = sampling.draw_low(config, "cpu", ["a red circle"], size=(16, 16))
        assert (base["encoder"], base["encoder_weights"], base["prefix"]) == ("clip-h:8", wanted, "please,")


def test_sampling_from_the_command_line(runs, tmp_path):
    out, to = runs[0] / "toy/grow", tmp_path / "g.png"
    words = [out, "a red circle", "a blue square", "--n", 2, "--steps", 3, "--to", to]
    run("sample.py", *words)
    output = run("sample.py", *words, "--batch", 1)
    assert "g_1.png: 4 images of 64x64 px" in output and to.read_bytes() == (tmp_path / "g_1.png").read_bytes()
    description = run("sample.py", out, "--describe")
    for part in ("grow of config toy, 64 px, step 6 of 6", "parent", "pretrain"):
        assert part in description
    assert "error: --size 128x128" in run("sample.py", *words, "--size", "128x128", code=2)
    assert "with model_index.json: nothing is downloaded" in run("sample.py", tmp_path / "none", "x", code=2)
    assert "error: no caption" in run("sample.py", out, code=2)


# ---- eval.py ---------------------------------------------------------------------------------------------------------

def test_distances_rank_real_pictures_before_spoilt_ones():
    world = Scenes(tiny())
    real, other = (np.stack([world.image(i, 32) for i in range(k, k + 500)]) for k in (0, 500))
    spoilt = np.clip(other + np.random.default_rng(0).normal(0, 40, other.shape), 0, 255).astype(np.uint8)
    f = random_features
    assert torch.equal(f(real), f(real)) and f(real).shape == (500, 64)
    for distance in (fd, evaluation.mmd):
        assert abs(distance(f(real), f(other))) * 5 < distance(f(real), f(spoilt))


# ---- questions about real images -------------------------------------------------------------------------------------

@pytest.fixture
def says(monkeypatch, capsys):
    """says(*words): what eval.py prints when called with these words; a refusal ends with status 2 and one line."""
    def called(*words):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
        capsys.readouterr()
        try:
            evaluation.main()
        except UserError as e:
            assert e.code == 2
        out = capsys.readouterr()
        return out.err or out.out
    return called


def test_published_answers_are_scored_from_the_command_line(tmp_path, says):
    (tmp_path / "dsg.csv").write_text(DSG)
    (tmp_path / "answers.csv").write_text(ANSWERS)
    words = "m", "--dsg", tmp_path / "dsg.csv", "--answers", tmp_path / "answers.csv"
    printed = says(*words, "--json", tmp_path / "e.json")
    result = json.load(open(tmp_path / "e.json"))
    assert result["metrics"]["questions"]["dsg"] == pytest.approx(0.6) and "dsg 0.600" in printed
    assert result["answers"]["sea_7"] == {"1": "yes", "2": "yes"}
    assert len(result["card"]["networks"]["vqa"]["answers"].split("sha256 ")[1]) == 64
    (tmp_path / "answers.csv").write_text(ANSWERS.replace("zoo_1", "zoo_2").replace("sea_7", "zoo_2"))
    assert "error: " in says(*words) and "answers none" in says(*words)


def test_a_network_scores_a_folder_of_pictures(tmp_path, says):
    tiny_blip(tmp_path / "blip")
    ask, _ = open_vqa(str(tmp_path / "blip"), "cpu")
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    (tmp_path / "dsg.csv").write_text(DSG)
    (tmp_path / "made").mkdir()
    words = tmp_path / "made", "--dsg", tmp_path / "dsg.csv"
    for item in ("zoo_1", "sea_7"):
        assert f"such as {item}.png" in says(*words, "--vqa", tmp_path / "blip")
        write_png(str(tmp_path / f"made/{item}.png"), image)
    printed = says(*words, "--vqa", tmp_path / "blip", "--json", tmp_path / "e.json")
    answers = json.load(open(tmp_path / "e.json"))["answers"]
    assert "dsg 0.0" in printed and answers["zoo_1"]["1"] == ask(image, "Is there a fox?")
    assert [len(of_item) for of_item in answers.values()] == [5, 2] and "--vqa: no weights, and" in says(*words)


# ---- people compare two runs -----------------------------------------------------------------------------------------

def test_answers_of_people_are_scored_from_the_command_line(tmp_path, says):
    key = tiny_page(tmp_path / "sheet", 20)
    files = [write_answers(tmp_path, key, name, prefers_a, prefers_a) for name in ("ann", "bob")]
    words = "--sheet", tmp_path / "sheet", "--ratings", *files
    printed, result = says(*words, "--json", tmp_path / "e.json"), json.load(open(tmp_path / "e.json"))
    assert result["metrics"]["aesthetics"]["wins_a"]["value"] == 0.75 and "2 raters, 20 pairs" in printed
    assert set(result["card"]) == {"sheet", "answers", "interval"} and key["sheet"] in printed
    assert set(result["metrics"]) == {"aesthetics", "consistency", "together"}
    assert "no file" in says("--ratings", files[0]) and "leave the runs away" in says("x", "y", *words)
    assert "holds a sheet already" in says("x", "y", "--sheet", tmp_path / "sheet")


# ---- the command line ------------------------------------------------------------------------------------------------

def folder_of_scenes(path, first, n, side=16):
    world = Scenes(tiny())
    path.mkdir()
    for i in range(first, first + n):
        write_png(str(path / f"{i:03d}.png"), world.image(i, side))
    return path


def test_two_folders_are_compared_and_bad_ones_refused(tmp_path, says):
    pytest.importorskip("PIL")
    a, b = folder_of_scenes(tmp_path / "a", 0, 30), folder_of_scenes(tmp_path / "b", 100, 20)
    output = says(a, b, "--json", tmp_path / "e.json")
    result = json.load(open(tmp_path / "e.json"))
    assert "biased: 20 images" in output and "FID" not in output and result["n"] == 20
    assert set(result["metrics"]) == {"fd_random", "mmd_random", "pr_random", "prdc_random"}
    assert {"n", "reference", "networks", "device", "versions"} <= set(result["card"])
    assert len(result["card"]["networks"]["random"]["sha256"]) == 64
    (tmp_path / "empty").mkdir()
    one, large = folder_of_scenes(tmp_path / "one", 0, 1), folder_of_scenes(tmp_path / "large", 0, 3, 32)
    assert "0 images under" in says(a, tmp_path / "empty") and "1 images" in says(a, one)
    assert "depend on the size" in says(a, large) and "subset_size" in says(a, b, "--metrics", "kid")
    write_png(str(b / "odd.png"), np.zeros((8, 9, 3), np.uint8))
    assert "odd.png" in (output := says(a, b)) and "2 sizes" in output
    (b / "odd.png").write_bytes(b"no picture")
    assert "odd.png" in (output := says(a, b)) and "cannot be read" in output
    (b / "odd.png").write_bytes((b / "100.png").read_bytes()[:-60])
    assert "odd.png" in (output := says(a, b)) and "breaks off" in output
    for words, reason in (
            (["--features", "dino"], "error: --features dino"), (["--features", "vgg"], "error: --features vgg"),
            (["--metrics", "questions"], "error: --metrics questions"), (["--n", 1], "error: --n 1"),
            (["--n", 10, "--steps", 2], "error: --n --steps: two folders"), ([a], "too many folders"),
            (["--json", tmp_path / "none/e.json"], "folder that exists"), (["--json", tmp_path], "folder that exists")):
        assert reason in says(a, a, *words)


def test_evaluation_from_the_command_line(runs, tmp_path, says):
    file, out = tmp_path / "e.json", runs[0] / "toy/pretrain"
    output = says(out, "--n", 12, "--steps", 3, "--guidance", "1,2", "--seeds", 2, "--json", file)
    result = json.load(open(file))
    assert "FID" not in output and result["n"] == 12 and len(result["all"]) == 4 and output.count("spread") == 2
    assert set(result["metrics"]) == {"questions", "fidelity", "diversity", "fd_random", "mmd_random"}
    assert set(result["metrics"]["fidelity"]) == {"psnr", "fit", "detail"}
    assert set(result["metrics"]["diversity"]) == {"places", "sizes", "narrow"}
    assert set(result["metrics"]["questions"]) == {
        "entities", "attributes", "relations", "counts", "global", "dsg", "chance_dsg"}
    two = [r["metrics"]["fd_random"] for r in result["all"] if r["guidance"] == result["guidance"]]
    assert result["metrics"]["fd_random"] == pytest.approx(np.mean(two))
    assert result["spread"]["fd_random"] == pytest.approx(np.std(two))
    assert {"n", "reference", "networks", "images", "guidance", "sampler", "steps", "ema", "seeds", "versions",
            "device", "checkpoint", "captions"} <= set(result["card"])
    assert result["tuning"]["guidance"] == [1, 2] and len(result["tuning"]["curves"]["dsg"]) == 2
    assert result["tuning"]["optimum"] == {} and result["tuning"]["range"] is None and output.count("no optimum") == 2
    assert "scoring 12 images, 3 steps each, 2 guidances, 2 seeds" in output
    assert "held out: of scenes (world-toy, exam)" in result["card"]["captions"]         # a figure names its world
    assert (out / "guidance.png").exists() or "pip install matplotlib" in output
    assert "error: --n 1" in says(out, "--n", 1)
    output = says(out, "--n", 6, "--steps", 2, "--metrics", "counting,zeroshot", "--json", file)
    assert "reference                  none: nothing is compared" in output
    result = json.load(open(file))["metrics"]
    assert set(result) == {"counting", "zeroshot"} and set(result["counting"]) <= {"1", "2", "3"}
    assert result["zeroshot"]["shape"]["chance"] == pytest.approx(1 / 3)


def test_the_features_of_a_reference_are_kept_and_refused_for_another_network(tmp_path, says):
    pytest.importorskip("PIL")
    a, b = folder_of_scenes(tmp_path / "a", 0, 30), folder_of_scenes(tmp_path / "b", 100, 20)
    first, (file,) = says(a, b), tmp_path.glob("a.random-*.pt")
    figures = lambda output: next(line for line in output.splitlines() if line.startswith("fd_random"))
    assert figures(says(a, b)) == figures(first) and "from" in says(a, b)          # the same file serves again
    assert figures(says(file, b)) == figures(first)                                # and stands in for the folder
    # an image changes: so does the name of the file
    write_png(str(a / "000.png"), np.zeros((16, 16, 3), np.uint8))
    assert figures(says(a, b)) != figures(first) and len(list(tmp_path.glob("a.random-*.pt"))) == 2
    assert "depend on the size" in says(file, folder_of_scenes(tmp_path / "large", 0, 3, 32))
    contents = torch.load(file, weights_only=True)
    x, network = contents["features"], contents["network"]
    for key, value, words in (
            ("features", x[:1], "at least 2"), ("features", x * float("nan"), "NaN"),
            ("network", network | {"sha256": "0"}, "made with sha256 = '0'"),
            ("network", network | {"network": "dinov2"}, "'dinov2'")):
        torch.save(contents | {key: value}, tmp_path / "odd.pt")
        assert "error: " in (output := says(tmp_path / "odd.pt", b)) and words in output
    assert "holds no features" in says(b / "100.png", b)
    tiny_dino(tmp_path / "dino")
    assert "made with" in says(file, b, "--features", "dino", "--weights", tmp_path / "dino")


def test_the_inception_score_from_the_command_line(tmp_path, says, monkeypatch):
    pytest.importorskip("PIL")
    file = stand_in_for_inception(tmp_path, monkeypatch)       # sure of one of three classes, by the brightest channel
    (tmp_path / "b").mkdir()
    for i in range(60):
        write_png(str(tmp_path / f"b/{i:02d}.png"), np.full((4, 4, 3), np.eye(3, dtype=np.uint8)[i // 20] * 200))
    output = says(tmp_path / "b", tmp_path / "b", "--metrics", "is", "--features", "inception", "--weights", file,
                  "--json", tmp_path / "e.json")
    figures = json.load(open(tmp_path / "e.json"))["metrics"]
    # in the order of the files each split would see one class and score 1; shuffled, a split of 6 sees nearly all three
    assert set(figures) == {"inception_score"} and 2 < figures["inception_score"]["mean"] < 3
    assert "inception_score mean 2." in output
    assert "needs --features inception" in says(tmp_path / "b", tmp_path / "b", "--metrics", "is")


def test_captions_from_a_file_against_images_of_ones_own(runs, tmp_path, says):
    pytest.importorskip("PIL")
    out, real = runs[0] / "toy/pretrain", folder_of_scenes(tmp_path / "real", 0, 12, 32)
    (tmp_path / "p.txt").write_text("a large red circle on a white background\n\n"
                                    "a small blue square on a black background\n")
    words = out, "--prompts", tmp_path / "p.txt", "--steps", 2, "--json", tmp_path / "e.json"
    output = says(*words, "--reference", real)
    result = json.load(open(tmp_path / "e.json"))
    assert result["n"] == 3 and set(result["metrics"]) == {"fd_random", "mmd_random"}
    assert "12 images of" in result["card"]["reference"] and "biased" in output
    (features,) = tmp_path.glob("real.random-*.pt")
    output = says(*words, "--reference", features)
    assert json.load(open(tmp_path / "e.json"))["metrics"] == result["metrics"]
    assert "is now" in output and (tmp_path / "e_1.json").exists()
    model, config = models.load(str(out))
    captions = evaluation.prompts_task(str(tmp_path / "p.txt")).captions
    assert len(captions) == 3 and captions[1] == ""            # blank: the null caption
    assert not sampling.encode_captions(captions, config)[1].any()
    assert "holds 3 captions" in says(out, "--prompts", tmp_path / "p.txt", "--n", 4)
    assert "add --keep FOLDER" in says(out, "--prompts", tmp_path / "p.txt", "--metrics", "questions")
    (tmp_path / "p.txt").write_text("\n\n")
    assert "holds no caption" in says(out, "--prompts", tmp_path / "p.txt")
    assert "cannot be read" in says(out, "--prompts", tmp_path / "none.txt")
    assert "depend on the size" in says(out, "--n", 4, "--reference", folder_of_scenes(tmp_path / "large", 0, 3, 64))


def test_runs_are_drawn_for_people_and_for_other_networks(runs, tmp_path, says):
    a, b = runs[0] / "toy/pretrain", runs[0] / "toy/grow"
    output = says(a, b, "--sheet", tmp_path / "sheet", "--n", 4, "--steps", 2)
    assert "4 pairs" in output and "warning: pictures of 32 and 64 px" in output
    assert "give one value" in says(a, b, "--sheet", tmp_path / "other", "--n", 4, "--guidance", "1,2")
    page = (tmp_path / "sheet/index.html").read_text()
    pairs = json.loads(re.search(r"pairs = (.*), questions =", page)[1])
    pictures = {p[side] for p in pairs for side in ("left", "right")}
    assert len(pairs) == 4 and len(pictures) == 8 and str(runs[0]) not in page and "http" not in page
    (tmp_path / "dsg.csv").write_text(DSG)
    assert "--vqa: no weights, and" in says(b, "--dsg", tmp_path / "dsg.csv")
    dsg = "--dsg", tmp_path / "dsg.csv", "--steps", 2
    vqa = "--vqa", tmp_path / "blip"
    assert "2 pairs" in says(a, b, "--sheet", tmp_path / "asked", *dsg)            # its prompts, for people
    tiny_blip(tmp_path / "blip")
    assert "dsg 0.0" in says(b, *dsg, *vqa, "--keep", tmp_path / "kept")
    assert sorted(f.name for f in (tmp_path / "kept").iterdir()) == ["captions.txt", "sea_7.png", "zoo_1.png"]
    assert "2 images" in says(b, *dsg, "--keep", tmp_path / "unasked")             # for others to ask about
    captions = (tmp_path / "unasked/captions.txt").read_text().splitlines()
    assert captions == ["a red fox, left of two owls", "a photo of the sea"]
    assert "give one value" in says(b, "--n", 4, "--guidance", "1,2", "--keep", tmp_path / "more")
    assert "not empty" in says(b, "--n", 4, "--keep", tmp_path / "kept") and "need questions" in says(b, *vqa)
    says(b, *dsg, *vqa, "--guidance", "1,2", "--json", tmp_path / "e.json")
    result = json.load(open(tmp_path / "e.json"))
    assert result["n"] == 2 and len(result["tuning"]["curves"]["dsg"]) == 2 and set(result["metrics"]["questions"]) == {
        "entities", "relations", "attributes", "global", "dsg"}


def test_real_images_are_compared_as_they_are_and_not_augmented():
    plain, augmented = (evaluation.real_features(config, 6, evaluation.RANDOM)["random"]
                        for config in (tiny(), tiny(flip=True, jitter=0.5)))
    assert torch.equal(plain, augmented)


def test_a_sharded_checkpoint_is_a_run(tmp_path):
    assert not evaluation.is_run(str(tmp_path))
    (tmp_path / "last.pt").mkdir()                             # where --sharded puts its shards and about.pt
    (tmp_path / "last.pt/about.pt").write_bytes(b"")
    assert evaluation.is_run(str(tmp_path)) and evaluation.is_run(str(tmp_path / "last.pt"))


@pytest.mark.parametrize("sampler", list(sampling.SAMPLERS))
@pytest.mark.parametrize("guidance, steps", [(0, 3), (1, 3), (-1, 3), (50, 3), (2, 1), (2, 7)])
def test_no_guidance_and_no_number_of_steps_gives_nan(sampler, guidance, steps):
    config = tiny()
    x = sampling.sample(shaken(build(config)), config, ["a red circle", ""],
                        steps=steps, guidance=guidance, sampler=sampler)
    assert x.isfinite().all() and x.std() > 0


def test_two_processes_give_the_figures_of_one(runs, tmp_path, says):
    # 66 are two chunks
    metrics = "questions,fd,mmd,counting,fidelity,diversity"
    words = [runs[0] / "toy/pretrain", "--n", 66, "--steps", 1, "--metrics", metrics, "--json"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = [start("eval.py", *words, tmp_path / f"{rank}.json", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in "01"]    # as torchrun does
    for process, _ in ranks:
        process.join(120)
    first, second = [output() for _, output in ranks]
    assert "dsg" in first and second.strip() == "" and not (tmp_path / "1.json").exists()        # one voice
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    says(*words, tmp_path / "alone.json")
    torch.set_num_threads(threads)
    two, one = (json.load(open(tmp_path / f"{name}.json")) for name in ("0", "alone"))
    assert two["n"] == one["n"] == 66 and two["card"]["processes"] == 2
    for key in ("questions", "counting", "fidelity"):
        assert two["metrics"][key] == one["metrics"][key]
    assert flat(two["metrics"]) == pytest.approx(flat(one["metrics"]), rel=1e-9, nan_ok=True)


def test_the_range_of_guidance_lies_between_the_two_optima():
    points = [(g, {"questions": {"dsg": g / 9, "chance_dsg": 0.1}, "fd_random": (g - 2) ** 2,
                   "mmd_random": (g - 4) ** 2}) for g in (8, 1, 2, 3, 4)]
    result = evaluation.tuning(points)
    assert result["guidance"] == [1, 2, 3, 4, 8] and result["range"] == [2, 4]
    assert result["optimum"] == {"fd_random": 2, "mmd_random": 4}


def test_perfect_pictures_score_1_also_where_the_world_is_smaller_than_the_exam():
    config = tiny("grow", scene_count=20)
    world, task = data.open_data(config).held_out(), evaluation.held_out_task(config, 50)
    looks = [task.look(world.image(i % 20, 64), i) for i in range(50)]
    assert task.metrics["questions"](looks)["dsg"] > 0.98 and task.metrics["fidelity"](looks)["psnr"] > 40
    again = evaluation.held_out_task(config, 50, noises=8)     # seven captions eight times
    assert len(again.captions) == 56 and again.captions[:8] == [task.captions[0]] * 8 != again.captions[1:9]
    assert list(again.metrics) == ["diversity"]


def test_zeroshot_finds_the_caption_of_least_loss(monkeypatch):
    config = tiny()
    world, model = Scenes(config), build(config)
    # v = 0 whatever the caption: always the first class
    result = evaluation.zeroshot(model, config, world, 12, draws=2)
    assert result["shape"]["circle"] == 1 and result["shape"]["square"] == 0 and result["colour"]["chance"] == 1 / 4
    words = data.tokenize([*world.shapes, *world.colours], 20, config["text_vocab"])[:, 0]
    truth = {to_tensor(world.image(i, 16)[None]).numpy().tobytes(): world.scene(i)["groups"][0] for i in range(100)}

    def knows(model, x, tokens, t, eps, config, told):
        """A loss that is lower for each word of the caption that is true of the picture."""
        group = truth[x[:1].contiguous().numpy().tobytes()]
        right = [words[[*world.shapes, *world.colours].index(group[k])] for k in ("shape", "colour")]
        plural = data.tokenize([group["shape"] + "s"], 20, config["text_vocab"])[0, 0]
        return -sum((tokens == r).any(1).float() + (tokens == plural).any(1).float() for r in right)
    monkeypatch.setattr(evaluation, "diffusion_loss", knows)
    result = evaluation.zeroshot(model, config, world, 12, draws=2)
    assert result["shape"]["mean"] == 1 and result["colour"]["mean"] == 1


def test_zeroshot_tells_the_classes_of_a_folder_apart(tmp_path, monkeypatch, capsys):
    pytest.importorskip("PIL")
    config, shades = tiny(), {"dark": 20, "light_grey": 220}
    for name, level in shades.items():
        (tmp_path / name).mkdir()
        for i in range(3):
            write_png(str(tmp_path / f"{name}/{i}.png"), np.full((20, 30, 3), level + i, np.uint8))
    grey = data.tokenize(["grey"], 1, config["text_vocab"])[0, 0]
    # a loss that is low where "grey" is said of a light picture, or not said of a dark one
    loss = lambda model, x, text, t, eps, config, told: ((text == grey).any(1) != (x.mean((1, 2, 3)) > 0)).float()
    monkeypatch.setattr(evaluation, "diffusion_loss", loss)
    told = evaluation.zeroshot_folder(build(config), config, str(tmp_path), "a {} wall", 4, draws=2)
    assert told == {"dark": 1, "light_grey": 1, "mean": 1, "chance": 0.5}
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        evaluation.zeroshot_folder(build(config), config, str(tmp_path), "a {} wall", 4)
    assert "'empty'" in capsys.readouterr().err


@slow
def test_twelve_thousand_rows_stay_under_one_and_a_half_gigabytes():
    code = ("import resource, torch, lib.metrics as e; x = torch.randn(12000, 768); y = torch.randn(11000, 768);"
            "e.cmmd(x, y); e.precision_recall(x[:3000], y[:3000]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, check=True)
    assert int(done.stdout) * 1024 < 1.5e9


# ---- critics: what VGG-19, here with random weights, and a discriminator say of an image

CriticTurn = collections.namedtuple("CriticTurn", "model loss noises lr", defaults=[None] * 4)


def plain_turn(config):
    """What train.py's turn of the model has that matters here."""
    return CriticTurn(loss=lambda net, step, x, text, t, eps, size: models.diffusion_loss(net, x, text, t, eps, config,
                                                                                          size))


def critics(config):
    """The turns of a config with critics; VGG-19 is the random stand-in."""
    torch.manual_seed(0)
    vgg = open_vgg("random")[0] if config["perceptual"] else None
    second_turn = lambda name, model, lr: CriticTurn(model=model, lr=lr)
    return objectives.critic_turns(plain_turn(config), vgg, open_autoencoder(config), config, second_turn)


def slopes(turn, batch, v, step=0):
    """(loss, its gradient at v) where v is what the network says."""
    v = v.clone().requires_grad_()
    loss = turn.loss(lambda *_: v, step, *batch, None)
    (slope,) = torch.autograd.grad(loss.sum(), v)
    return loss, slope


def of_batch(config, batch, v):
    """x_hat, sigma (b, 1, 1, 1) and who is seen through less noise than critic_logsnr."""
    logsnr = models.get_logsnr(batch[2], config)
    alpha, sigma = models.alpha_sigma(logsnr)
    return alpha * (alpha * batch[0] + sigma * batch[3]) - sigma * v, sigma, logsnr > config["critic_logsnr"]


def test_the_field_of_vgg_reaches_what_is_seen_well_through_the_decoder_and_nothing_else():
    shape = dict(autoencoder="space_to_depth", latent_channels=12, latent_stride=2, latent_scale=0.5, resolution=32)
    config = tiny(perceptual=0.3, critic_logsnr=0.0, **shape)
    x, text, t, eps = batch_of()
    fold = lambda image: F.pixel_unshuffle(image, 2).repeat(1, 1, 2, 2)            # latents of 32 px
    batch = fold(x), text, t, fold(eps)
    v = torch.randn_like(batch[0])
    x_hat, sigma, near = of_batch(config, batch, v)
    (turn,), vgg = critics(config), open_vgg("random")[0]
    (plain, before), (loss, after) = slopes(plain_turn(config), batch, v), slopes(turn, batch, v)
    assert torch.equal(plain, loss) and 0 < near.sum() < 6     # what is logged is the plain loss
    assert torch.equal(before[~near], after[~near])            # to the bit
    at = x_hat.clone().requires_grad_()
    distance = vgg.distance(F.pixel_shuffle(at / 0.5, 2), F.pixel_shuffle(batch[0] / 0.5, 2))
    (field,) = torch.autograd.grad(0.3 * distance.sum(), at)   # dx / dv = -sigma
    wanted = (-sigma * field)[near]
    assert wanted.abs().max() > 0 and torch.allclose((after - before)[near], wanted, rtol=1e-3, atol=1e-7)


def test_the_discriminators_gradient_is_as_long_as_asked_for_and_starts_when_it_should():
    config = tiny(adversarial=0.5, adversarial_start=3, critic_logsnr=-1.0)
    batch = batch_of()
    v = torch.randn_like(batch[0])
    x_hat, sigma, near = of_batch(config, batch, v)
    own, other = critics(config)
    (plain, before), (loss, early) = slopes(plain_turn(config), batch, v), slopes(own, batch, v, step=2)
    assert torch.equal(plain, loss) and torch.equal(before, early) and 0 < near.sum() < 6
    loss, after = slopes(own, batch, v, step=3)
    assert torch.equal(plain, loss) and torch.equal(before[~near], after[~near])
    assert all(p.grad is None for p in other.model.parameters())                   # the model's turn leaves them empty
    length = lambda g: g[near].flatten(1).norm(dim=1)
    assert torch.allclose(length(after - before), 0.5 * length(before), rtol=1e-3)
    moved = x_hat - 0.3 * (after - before) / -sigma            # down the field an image looks more real
    real = lambda image: other.model(image).mean((1, 2, 3))[near]
    assert (real(moved) > real(x_hat)).all()
    halves = [slopes(own, [part[rows] for part in batch], v[rows], 3)[1] for rows in (slice(3), slice(3, 6))]
    assert torch.allclose(torch.cat(halves), after, rtol=1e-4, atol=1e-7)          # whatever the micro-batch
    _, both = slopes(critics(config | {"perceptual": 50.0})[0], batch, v, 3)
    _, vgg = slopes(critics(config | {"perceptual": 50.0, "adversarial": 0.0})[0], batch, v, 3)
    assert torch.allclose(length(both - vgg), 0.5 * length(vgg), rtol=1e-3)        # VGG's is one of all others


def test_the_discriminator_learns_from_what_the_model_saw_in_the_same_step():
    config = tiny(adversarial=0.5, critic_logsnr=-1.0, r1=0.7)
    batch = batch_of()
    v = torch.randn_like(batch[0])
    x_hat, sigma, near = of_batch(config, batch, v)
    own, other = critics(config)
    assert other.noises == 0 and other.lr == config["discriminator_lr"]
    slopes(own, batch, v)
    for step in (1, 16):                                       # R1 in every 16th
        loss = other.loss(other.model, step, *batch, None)
        real = batch[0][near].requires_grad_()
        of_real, of_fake = other.model(real), other.model(x_hat[near])
        wanted = 0.5 * (F.relu(1 - of_real) + F.relu(1 + of_fake)).mean((1, 2, 3))
        if step == 16:
            (slope,) = torch.autograd.grad(of_real.mean((1, 2, 3)).sum(), real)
            wanted = wanted + 16 * 0.7 / 2 * slope.square().sum((1, 2, 3))
        assert torch.allclose(loss[near], wanted, rtol=1e-4) and not loss[~near].any()
    loss.sum().backward()
    assert all(p.grad.any() for p in other.model.parameters() if p.ndim > 1)
    shut = critics(config | {"critic_logsnr": 99.0})           # in a whole part of a batch nothing may be seen
    assert torch.equal(slopes(shut[0], batch, v)[1], slopes(plain_turn(config), batch, v)[1])
    shut[1].loss(shut[1].model, 16, *batch, None).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in shut[1].model.parameters())


# ---- train.py --------------------------------------------------------------------------------------------------------

PRETRAIN = ["--stage", "pretrain", "--out"]


def folder(out, stage="pretrain"):
    return out / "toy" / stage


def checkpoint_of(out, stage="pretrain"):
    return models.read_checkpoint(str(folder(out, stage)))


def log_of(out, stage="pretrain"):
    return [json.loads(line) for line in open(folder(out, stage) / "log.jsonl")]


def changed(words, **keys):
    """The flags with other values for some keys."""
    kept = [w for flag, value in zip(words[::2], words[1::2]) if flag[2:] not in keys for w in (flag, value)]
    return kept + [w for key, value in keys.items() for w in ("--" + key, str(value))]


def besides(words, keys):
    """The keys and values that these words do not give themselves."""
    return [w for flag, value in zip(keys[::2], keys[1::2]) if flag not in words for w in (flag, value)]


def with_parents(runs, out, stage):
    """A folder for runs in which those that the stage starts from are there."""
    folder(out, "").mkdir(parents=True, exist_ok=True)
    for needed in {"pretrain": (), "grow": ("pretrain",), "defrost": ("pretrain", "grow"), "style": ("grow", "defrost"),
                   "distill": ("grow", "defrost"), "cascade": ("pretrain",)}[stage]:
        os.symlink(folder(runs[0], needed), folder(out, needed))
    return out


def assert_same_run(one, two, stage="pretrain"):
    """Weights, averages and moments equal to the bit."""
    one, two = checkpoint_of(one, stage), checkpoint_of(two, stage)
    for part in ("model", "ema", "moments"):
        assert one[part] and tensors_hash(one[part]) == tensors_hash(two[part]), part
    assert (one["step"], one["data_step"]) == (two["step"], two["data_step"])


def stop_in_step(number):
    """SIGTERM comes while the batch of this step is made."""
    get = Batches.__getitem__

    def signalled(self, step):
        if step == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return get(self, step)
    Batches.__getitem__ = signalled


def run_broken(number, *words):
    """train.py stopped by SIGTERM in a step, and the same command again; returns what both have printed."""
    said = run("train.py", *words, fault=functools.partial(stop_in_step, number), code=143)
    assert f"stopped at step {number + 1} and saved" in said and "the same command goes on from here" in said
    more = run("train.py", *words)
    assert f"going on at step {number + 1} of" in more
    return said + more


def run_whole_and_broken(number, whole, broken, *words):
    """The same training in two folders for runs, stopped in the second one; returns what that has printed."""
    unbroken = start("train.py", *words, "--out", whole)
    said = run_broken(number, *words, "--out", broken)
    ended(*unbroken)
    return said


def test_one_command_pretrains_grows_and_says_what_comes_next(runs):
    out, said = runs
    assert "no pretrain run" in said and said.count("next: ") == 2                 # of grow and of defrost
    assert f"next: python train.py --stage defrost --out {out} --width 32" in said
    assert "of a 1024 sgemm's rate" in said                    # the yardstick of a CPU, by a run that is no fork
    for stage in ("pretrain", "grow", "defrost"):
        assert {"last.pt", "config.txt", "log.jsonl", "samples"} <= set(os.listdir(folder(out, stage)))
        assert sorted(os.listdir(folder(out, stage) / "samples")) == ["step_4.png", "step_6.png"]
        line = log_of(out, stage)[-1]
        assert line["step"] == 6 and len(line["bins"]) == 4 and line["loss"] > 0
    assert "is finished" in run("train.py", "--stage", "grow", "--out", out, *TINY)


def test_growing_keeps_the_core_to_the_bit_but_for_time(runs):
    core, grown, defrosted = (checkpoint_of(runs[0], stage) for stage in ("pretrain", "grow", "defrost"))
    before, after, thawed = models.ema_weights(core), grown["model"], defrosted["model"]
    frozen = [k for k in before if k.startswith("core.") and not k.startswith("core.time.")]
    assert len(frozen) > 40 and grown["config"]["weight_decay"] > 0
    pick = lambda state: {k: state[k] for k in frozen}
    assert tensors_hash(pick(before)) == tensors_hash(pick(after)) == tensors_hash(pick(models.ema_weights(grown)))
    assert tensors_hash(before, "core.time.") != tensors_hash(after, "core.time.")
    assert tensors_hash(pick(thawed)) != tensors_hash(pick(after))
    # frozen tensors have no average of their own, nor optimizer state
    assert not set(frozen) & set(grown["ema"]) and {k.split("/")[0] for k in grown["moments"]} == set(grown["ema"])


@pytest.mark.parametrize("stage", ["scratch", "finetune"])
def test_baselines_differ_in_one_thing_each(runs, stage):
    said = run("train.py", "--stage", stage, "--out", runs[0], *TINY)
    state, grown = checkpoint_of(runs[0], stage), checkpoint_of(runs[0], "grow")
    assert set(state["model"]) == set(grown["model"]) == set(state["ema"])         # same model, everything trained
    assert ("tensors inherited" in said) == (stage == "finetune") and "smaller than 64 px and left out" in said
    assert state["config"] == grown["config"]


def test_holding_goes_on_from_a_grown_model_with_its_core_still_frozen(runs, tmp_path):
    out = with_parents(runs, tmp_path / "held", "defrost")
    assert ", 0 new, 0 unused\n" in run("train.py", "--stage", "hold", "--out", out, *TINY)
    before, after = models.ema_weights(checkpoint_of(out, "grow")), checkpoint_of(out, "hold")["model"]
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith("core.") and not name.startswith("core.time.")}
    assert set(before) == set(after) and frozen <= same and not any(name.startswith("shell.conv") for name in same)


@pytest.mark.parametrize("keys, decay", [
    (dict(ema=0.15), lambda n: min(0.15, (1 + n) / (10 + n))),                     # 0.1, then 0.15
    (dict(ema_power=2.0), lambda n: (1 - 1 / (n + 1)) ** 3)])
def test_ema_is_the_average_of_the_weights_of_each_step(keys, decay, tmp_path):
    words = changed(TINY, **keys, steps=4, sample_every=0, save_every=1, num_checkpoints=9)
    run("train.py", *PRETRAIN, tmp_path, *words)
    files = [*(f"step_{step}.pt" for step in (1, 2, 3)), "last.pt"]
    states = [models.read_checkpoint(str(folder(tmp_path) / file)) for file in files]
    torch.manual_seed(0)
    mean = build(states[0]["config"]).state_dict()             # it begins at the first weights
    for n, state in enumerate(states):
        mean = {k: decay(n) * m + (1 - decay(n)) * state["model"][k] for k, m in mean.items()}
        assert all(torch.allclose(state["ema"][k], m, rtol=1e-5, atol=1e-7) for k, m in mean.items()), n


@pytest.mark.parametrize("stage, number", [
    ("pretrain", 2), ("grow", 4), ("defrost", 1), ("style", 3), ("cascade", 2)])
def test_a_run_stopped_and_continued_equals_an_unbroken_one_to_the_bit(
        runs, styled, cascaded, stage, number, tmp_path):
    whole = {"style": styled, "cascade": cascaded}.get(stage, runs)[0]
    broken = with_parents(runs, tmp_path, stage)
    run_broken(number, "--stage", stage, "--out", broken, *TINY)
    assert_same_run(whole, broken, stage)


@pytest.mark.parametrize("stage, kills, steps", [
    ("grow", 2, 15), *[pytest.param(s, 30, 80, marks=slow) for s in ("pretrain", "grow", "defrost", "cascade")]])
def test_kill_9_at_random_moments_loses_nothing(runs, stage, kills, steps, tmp_path):
    """A checkpoint at every step, so that many kills hit a save; a kill before the first would lose nothing anyhow."""
    whole, broken = (with_parents(runs, tmp_path / name, stage) for name in ("whole", "broken"))
    words = ["--stage", stage, *changed(TINY, steps=steps, save_every=1, sample_every=0)]
    run("train.py", "--out", whole, *words)
    moments, reached = np.random.default_rng(int(time.time())), 0
    for _ in range(kills):
        process, said = start("train.py", "--out", broken, *words)
        until(said, "\nstep", process)                         # every second step
        time.sleep(moments.uniform(0, 0.3))
        process.kill(), process.join()
        assert process.exitcode in (-9, 0), said()
        assert not reached or f"going on at step {reached} of" in said()
        before, reached = reached, checkpoint_of(broken, stage)["step"]
        assert before <= reached and reached > 0
        if reached == steps:                                   # faster than we
            break
    run("train.py", "--out", broken, *words)
    assert_same_run(whole, broken, stage)


@pytest.fixture(scope="session")
def styled(runs):
    """A folder for runs in which the latest one was tuned to a style, and what was printed."""
    out = with_parents(runs, runs[0] / "styled", "style")
    return out, run("train.py", "--stage", "style", "--out", out, *TINY)


@pytest.fixture(scope="session")
def told(runs):
    """A folder for runs in which a grown one took up a condition, and what was printed."""
    out = with_parents(runs, runs[0] / "told", "defrost")
    return out, run("train.py", "--stage", "condition", "--conditions", "size", "--out", out, *changed(TINY, lr=0.01))


def test_a_finished_model_takes_up_a_condition_while_its_blocks_stay_as_they_are(told, tmp_path):
    out, said = told
    assert "4 of the new ones inside what is inherited (conditions size, as no change)" in said
    before, after = checkpoint_of(out, "grow"), checkpoint_of(out, "condition")
    old, new = models.ema_weights(before), after["model"]
    frozen = [k for k in old if k.startswith("core.") and not k.startswith("core.time.")]
    assert tensors_hash({k: old[k] for k in frozen}) == tensors_hash({k: new[k] for k in frozen})
    added = {f"core.time.condition_{way}.SIZE.{part}" for way in ("in", "out") for part in ("weight", "bias")}
    assert set(new) - set(old) == added and all(after["ema"][k].any() for k in added)
    assert after["config"]["condition_ranges"] == "size 0.2945..0.4305"
    words = ["sample.py", folder(out, "condition"), "a red circle", "--n", 1, "--steps", 3, "--seed"]
    pictures = []
    for k, numbers in enumerate(("", "size=0.3", "size=0.4", "size=9")):
        said = run(*words, 0, "--to", tmp_path / f"{k}.png", *(["--set", numbers] if numbers else []))
        assert ("only 0.2945 to 0.4305 was seen" in said) == (k == 3)
        pictures.append((tmp_path / f"{k}.png").read_bytes())
    assert len(set(pictures)) == 4                             # each number makes another picture
    assert "error: --set size=0.3: this model knows no condition" in run(
        "sample.py", folder(out, "grow"), "a", "--set", "size=0.3", code=2)


def test_taking_up_a_condition_goes_on_to_the_bit(runs, told, tmp_path):
    whole, broken = (with_parents(runs, tmp_path / name, "defrost") for name in ("whole", "broken"))
    words = ["--stage", "condition", "--conditions", "x,size", "--core", folder(told[0], "condition")]
    words += changed(TINY, sample_every=0)
    said = run_whole_and_broken(3, whole, broken, *words)
    assert "(conditions x, as no change)" in said              # size came with the weights
    assert_same_run(whole, broken, "condition")
    words = changed(words, conditions="x")
    assert "knows size: give --conditions x,size" in run("train.py", *words, "--out", whole, code=2)


def test_a_run_keeps_the_conditions_of_its_parent_or_says_why_not(told, tmp_path):
    teacher = ["--teacher", folder(told[0], "condition"), "--out", tmp_path]
    distill = ["--stage", "distill", "--objective", "lcm", *teacher, *changed(TINY, sample_steps=2, teacher_steps=8)]
    assert "conditions size there,  here" in run("train.py", *distill, code=2)
    run("train.py", *distill, "--conditions", "size")
    words = ["sample.py", folder(tmp_path, "distill"), "a red circle", "--n", 1, "--to"]
    run(*words, tmp_path / "a.png"), run(*words, tmp_path / "b.png", "--set", "size=0.4")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    words = ["--stage", "defrost", "--core", folder(told[0], "condition"), "--out", tmp_path, *TINY]
    assert "knows size: give --conditions size" in run("train.py", *words, code=2)
    for names, words in (("", "of which numbers is the model to be told"), ("colour", "no picture of scenes has"),
                         ("a.b", "cannot be a name"), ("sizes", "did you mean 'size'?")):
        assert words in run("train.py", "--stage", "condition", "--conditions", names, "--out", tmp_path, code=2)


@pytest.fixture(scope="session")
def cascaded(runs):
    """A folder for runs with a cascade above the pretrained one, and what was printed."""
    out = with_parents(runs, runs[0] / "cascaded", "cascade")
    return out, run("train.py", "--stage", "cascade", "--out", out, *TINY)


def test_a_cascade_is_a_run_like_any_other_and_names_its_base(cascaded, tmp_path, says):
    out, said = cascaded
    state, base = checkpoint_of(out, "cascade"), folder(out) / "last.pt"
    assert "smaller than 64 px and left out" in said and sorted(os.listdir(folder(out, "cascade") / "samples"))
    assert state["config"]["base"] == str(folder(out)) and state["parents"] == []
    assert state["config"]["base_id"] == hashlib.sha256(base.read_bytes()).hexdigest()
    assert state["model"]["shell.conv_in.weight"].shape[1] == 6 * 15 * 15          # z, and the small picture beside it
    assert set(state["ema"]) == set(state["model"])            # all is trained, and the base is in no checkpoint
    words = ["sample.py", folder(out, "cascade"), "a red circle", "--n", 3, "--steps", 3]
    run(*words, "--to", tmp_path / "a.png"), run(*words, "--batch", 1, "--to", tmp_path / "b.png")
    run(*words, "--augmentation_sample", 0, "--to", tmp_path / "c.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    assert f"base   {folder(out)} (32 px), sha256 {state['config']['base_id']}" in run(*words[:2], "--describe")
    says(folder(out, "cascade"), "--n", 4, "--metrics", "questions", "--json", tmp_path / "x.json")
    card = json.load(open(tmp_path / "x.json"))["card"]
    assert (card["base_id"], card["augmentation_sample"]) == (state["config"]["base_id"], 0.14)
    assert "a cascade sees the picture itself" in says(folder(out, "cascade"), "--n", 4, "--metrics", "zeroshot")


def test_a_cascade_without_its_base_says_where_to_name_it(cascaded, tmp_path, says):
    out = tmp_path / "runs"
    shutil.copytree(folder(cascaded[0], "cascade"), folder(out, "cascade"))
    shutil.copytree(folder(cascaded[0]), tmp_path / "moved")
    state = checkpoint_of(out, "cascade")
    state["config"]["base"] = str(folder(out))
    torch.save(state, tmp_path / "new.pt")                     # its tensors are mapped from the old file
    os.replace(tmp_path / "new.pt", folder(out, "cascade") / "last.pt")
    words = [folder(out, "cascade"), "a red circle", "--n", 1, "--steps", 2, "--to", tmp_path / "x.png"]
    missing = f"the base of this cascade, {folder(out)}, is not there: bring it back, or say where it lies: --base RUN"
    assert missing in run("sample.py", *words, code=2) and missing in says(words[0], "--n", 2)
    assert "1 images of 64x64" in run("sample.py", *words, "--base", tmp_path / "moved")
    assert "dsg" in says(words[0], "--n", 2, "--metrics", "questions", "--base", tmp_path / "moved")
    assert "is no more what it was in training" in run("sample.py", *words, "--base", words[0], code=2)
    assert "is above augmentation = 0.5" in run("sample.py", *words, "--augmentation_sample", 0.6, "--base",
                                                tmp_path / "moved", code=2)
    train = ["train.py", "--stage", "cascade", "--out", out, *changed(TINY, steps=7)]
    assert f"no run in {folder(out)}: bring it back" in run(*train, code=2)
    assert f"{folder(out, 'cascade')} is finished: 6 steps" in run(*train[:5], *TINY)    # and needs no base any more
    said = run(*train, "--base", tmp_path / "moved")
    assert f"going on at step 6 of 7, base {folder(out)} -> {tmp_path / 'moved'}, steps 6 -> 7" in said


@pytest.mark.parametrize("words, message", [
    ("--stage grow --low_resolution 32", "to --stage cascade alone"),
    ("--low_resolution 0", "give the side of the base's pictures"),
    ("--low_resolution 24", "does not divide resolution = 64, or is as large: take 32"),
    ("--low_resolution 64", "does not divide resolution = 64, or is as large: take 32"),
    ("--low_resolution 16", "toy/pretrain draws 32 px, and low_resolution = 16: give --low_resolution 32"),
    ("--shell nested", "a cascade works in pixels"),
    ("--autoencoder space_to_depth --latent_channels 12 --latent_stride 2", "a cascade works in pixels"),
    ("--augmentation 0", "augmentation_sample = 0.14 is above augmentation = 0"),
    ("--core {runs}/toy/pretrain", "cascade starts from nothing"),
    ("--base {tmp}/none", "no run in {tmp}/none: bring it back, or name another one, --base RUN"),
    ("--base {tmp}/unfinished.pt", "unfinished.pt stopped at step 5 of 6: finish it with --stage pretrain, or"),
    ("--base {tmp}/latent.pt", "latent.pt works in latents, and a cascade in pixels: name another one"),
    ("--stage defrost --core {cascade}", "low_resolution 32 there, 0 here"),
    ("--stage grow --core {cascade}", "is a cascade run and grow takes the core of a pretrain run"),
    ("--stage distill --objective lcm --teacher {cascade}", "low_resolution 32 there, 0 here")])
def test_what_cannot_be_a_cascade_is_refused(words, message, runs, cascaded, tmp_path):
    out, state = with_parents(runs, tmp_path, "cascade"), checkpoint_of(runs[0])
    torch.save(state | {"step": 5}, tmp_path / "unfinished.pt")
    torch.save(state | {"config": state["config"] | {"autoencoder": "space_to_depth"}}, tmp_path / "latent.pt")
    words = words.format(runs=runs[0], tmp=tmp_path, cascade=folder(cascaded[0], "cascade")).split()
    stage = [] if "--stage" in words else ["--stage", "cascade"]
    said = run("train.py", *stage, *words, "--out", out, *TINY, code=2)
    assert message.format(tmp=tmp_path) in said and "Traceback" not in said
    assert not os.path.exists(folder(out, "cascade") / "last.pt")


def test_one_command_makes_a_base_and_a_cascade_with_critics_above_it(tmp_path):
    words = ["train.py", "--stage", "cascade", "--config", "base-tiny", "--out", tmp_path, "--steps", 2, "--eval_n", 0]
    said = run(*words, "--adversarial", 0.5, "--adversarial_start", 1, "--conditions", "size_and_crop")
    assert "no pretrain run in" in said and "base-tiny/cascade is finished after 2 steps" in said
    said = run(*words, "--plan")
    assert "cascade of config base-tiny:" in said and "GFLOP per image" in said


@pytest.fixture(scope="session")
def students(runs):
    """A student of each objective, {objective: folder for runs}, and what was printed; the teacher is grown."""
    steps = {"consistency": 4, "lcm": 2, "dmd": 1}
    made = {objective: with_parents(runs, runs[0] / objective, "defrost") for objective in steps}
    words = [["train.py", "--stage", "distill", "--out", made[objective], *changed(
        TINY, objective=objective, sample_steps=k, teacher_steps=8, fake_updates=2)] for objective, k in steps.items()]
    return made, dict(zip(steps, run_beside(*words)))


@pytest.mark.parametrize("objective", ["consistency", "lcm", "dmd"])
def test_a_student_is_a_run_like_any_other_and_names_its_teacher(students, objective, tmp_path):
    out, said = students[0][objective], students[1][objective]
    state, teacher = checkpoint_of(out, "distill"), folder(out, "grow") / "last.pt"
    assert "tensors inherited, 0 new" in said
    assert state["teacher"] == [str(teacher), hashlib.sha256(teacher.read_bytes()).hexdigest()]
    grown = models.ema_weights(checkpoint_of(out, "grow"))
    assert all(not torch.equal(grown[k], v) for k, v in state["model"].items() if k.endswith("mlp.0.weight"))
    assert ("fake_model" in state) == (objective == "dmd")     # the teacher itself is in no checkpoint
    if objective == "dmd":                                     # 6 steps: every second one moves the student
        assert {name: counted for name, (counted, _) in state["turns"].items()} == {"": 3, "fake": 6}
        assert "loss_fake" in log_of(out, "distill")[-1]
    run_folder = folder(out, "distill")
    assert "2 images of" in run("sample.py", run_folder, "a red circle", "--n", "2", "--to", tmp_path / "x.png")
    for words, message in ((["--guidance", "2"], "inside this student"),
                           (["--steps", "3"], "and teacher_steps = 8 a student"),
                           (["--sampler", "dpm"], "--sampler dpm: a student of")):
        assert message in run("sample.py", run_folder, "a red circle", "--to", tmp_path / "y.png", *words, code=2)
        assert message in run("eval.py", run_folder, "--n", "2", *words, code=2)


def test_a_student_may_start_as_another_student_of_its_teacher(students, tmp_path):
    teacher, first = folder(students[0]["dmd"], "grow"), folder(students[0]["lcm"], "distill")
    words = ["--stage", "distill", "--out", tmp_path, "--core", first,
             *changed(TINY, sample_steps=1, objective="dmd", lr=0, muon_lr=0, teacher_steps=8, fake_updates=2)]
    assert f"{first} is a student itself: give --teacher" in run("train.py", *words, code=2)
    assert f"from {first}: " in run("train.py", *words, "--teacher", teacher)
    state = checkpoint_of(tmp_path, "distill")
    assert state["teacher"][0] == str(teacher / "last.pt") and f"{first} (distill" in state["parents"][-1]
    start = models.ema_weights(checkpoint_of(students[0]["lcm"], "distill"))
    assert all(torch.equal(start[name], value) for name, value in state["model"].items())    # its rate was 0
    assert "learns from" in run("train.py", *words, "--teacher", first, code=2)


@pytest.mark.parametrize("objective, steps", [("consistency", 4), ("dmd", 1)])
def test_a_stopped_student_goes_on_to_the_bit_between_any_two_turns(runs, objective, steps, tmp_path):
    whole, broken = (with_parents(runs, tmp_path / name, "defrost") for name in ("whole", "broken"))
    words = ["--stage", "distill", *changed(TINY, sample_steps=steps, objective=objective, teacher_steps=8,
                                            sample_every=0, teacher_steps_end=16)]
    run_whole_and_broken(2, whole, broken, *words)
    assert_same_run(whole, broken, "distill")
    one, two = checkpoint_of(whole, "distill"), checkpoint_of(broken, "distill")
    assert one["turns"] == two["turns"]
    for part in ("fake_model", "fake_moments") if objective == "dmd" else ():
        assert tensors_hash(one[part]) == tensors_hash(two[part])


def test_critics_that_are_off_or_wait_leave_a_run_as_it_was_to_the_bit(tmp_path):
    """The discriminator learns all the while; from its start on the model hears it."""
    words = [*changed(TINY, steps=3, sample_every=0, discriminator_width=4)]
    flags = dict(plain=changed(TINY, steps=3, sample_every=0),
                 off=[*words, *"--r1 1 --critic_logsnr 2 --adversarial_start 1".split()],
                 waits=[*words, *"--adversarial 0.5 --adversarial_start 3".split()],
                 hears=[*words, *"--adversarial 0.5 --adversarial_start 2".split()])
    said = run_beside(*(["train.py", *PRETRAIN, tmp_path / name, *flags[name]] for name in flags))[2]
    assert "perceptual term: none; adversarial term: 0.5" in said
    assert_same_run(tmp_path / "plain", tmp_path / "off")
    assert_same_run(tmp_path / "plain", tmp_path / "waits")
    plain, waits, hears = (checkpoint_of(tmp_path / name) for name in ("plain", "waits", "hears"))
    assert tensors_hash(plain["model"]) != tensors_hash(hears["model"])
    assert tensors_hash(waits["discriminator_model"]) == tensors_hash(hears["discriminator_model"])
    assert waits["turns"]["discriminator"][0] == 3 and "discriminator_model" not in plain


def test_a_twin_with_critics_says_that_its_vgg_is_none(tmp_path):
    words = ["--config", "pixelgen-v2-tiny", "--out", tmp_path, *"--steps 2 --eval_n 0 --sample_every 0".split()]
    said = run("train.py", "--stage", "pretrain", *words, "--adversarial_start", 1)
    assert "perceptual term: random weights in place of VGG-19: gradients and cost, not quality" in said
    out = tmp_path / "pixelgen-v2-tiny/pretrain"
    state = models.read_checkpoint(str(out))
    assert state["config"]["vgg_id"] == STAND_IN and "discriminator_moments" in state
    assert {"loss", "loss_discriminator"} <= set(json.loads(open(out / "log.jsonl").readline()))
    said = run("eval.py", out, "--n", 2, "--metrics", "questions")
    assert re.search(r"perceptual +random weights in place of VGG-19", said)
    for more, message in (("--stage scratch --vgg nowhere.pth", "no weights of VGG-19 at 'nowhere.pth', and nothing"),
                          (f"--stage scratch --vgg {HERE}/train.py", "..., not dcbb9e9d...: put torchvision's vgg19"),
                          ("--stage distill --objective lcm --perceptual 1", "a student takes neither")):
        assert message in run("train.py", *words, *more.split(), code=2)


def test_a_stopped_run_with_critics_goes_on_to_the_bit(tmp_path):
    words = ["--stage", "pretrain", *changed(TINY, steps=18, sample_every=0, discriminator_width=4, adversarial=0.5),
             "--adversarial_start", 4, "--r1", 0.1]            # R1 is due in step 16
    run_whole_and_broken(14, tmp_path / "whole", tmp_path / "broken", *words)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    one, two = checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "broken")
    assert one["turns"] == two["turns"]
    for part in ("discriminator_model", "discriminator_moments"):
        assert tensors_hash(one[part]) == tensors_hash(two[part])


def nan_of_the_discriminator():
    """Its third loss is not a number."""
    hinge, calls = objectives.hinge, []

    def spoilt(real, fake):
        calls.append(1)
        return hinge(real, fake) * (math.nan if len(calls) == 3 else 1)
    objectives.hinge = spoilt


def test_a_turn_that_is_not_finite_moves_nothing_of_its_own(tmp_path):
    words = changed(TINY, steps=4, sample_every=0, adversarial=0.5, discriminator_width=4)
    said = run("train.py", *PRETRAIN, tmp_path, *words, fault=nan_of_the_discriminator)
    assert "step 2 of discriminator: gradient is not finite, skipped (1 in a row)" in said
    state = checkpoint_of(tmp_path)
    assert (state["step"], state["data_step"]) == (4, 5)       # a step counts when both have moved
    assert {name: updates for name, (updates, _) in state["turns"].items()} == {"": 5, "discriminator": 4}


@pytest.mark.parametrize("words, message", [
    ("--objective diffusion", "distill takes --objective consistency"),
    ("--sample_steps 5", "and teacher_steps = 64 a student of consistency takes as many"),
    ("--objective dmd --sample_steps 4", "a student of dmd takes 1 step"),
    ("--objective other", "take one of diffusion"),
    ("--noise_base_resolution 32", "there, 32 here"),
    ("--teacher {tmp}/none", "no checkpoint"),
    ("--out {tmp}/empty", "no finished run to learn from: train {tmp}/empty/toy/grow first, or give --teacher RUN"),
    ("--teacher {runs}/toy/pretrain", "does not fit"),
    ("--stage grow --teacher {runs}/toy/grow", "all other stages take diffusion"),
    ("--objective consistency", "the teacher of this run, {tmp}/toy/grow/last.pt, is no more what it was in training")])
def test_what_a_student_cannot_learn_from_is_refused(words, message, runs, tmp_path):
    out = with_parents(runs, tmp_path, "defrost")
    keys = changed(TINY, steps=2, sample_every=0)
    if "no more" in message:                                # a teacher that is another one by now
        os.remove(folder(out, "grow")), shutil.copytree(folder(runs[0], "grow"), folder(out, "grow"))
        run("train.py", "--stage", "distill", "--out", out, *keys)
        shutil.copy(folder(runs[0], "pretrain") / "last.pt", folder(out, "grow") / "last.pt")
        assert "is finished: 2 steps" in run("train.py", "--stage", "distill", "--out", out, *keys)
        keys = changed(TINY, steps=3, sample_every=0)
    words = words.format(tmp=tmp_path, runs=runs[0]).split()
    stage = [] if "--stage" in words else ["--stage", "distill"]
    to = [] if "--out" in words else ["--out", out]
    assert message.format(tmp=tmp_path) in run("train.py", *stage, *to, *words, *besides(words, keys), code=2)


def test_a_style_starts_from_the_latest_run_and_is_asked_for_by_its_token(styled, tmp_path, says):
    (out, said), words = styled, changed(TINY, steps=3, sample_every=0)
    assert f"from {folder(out, 'defrost')}: " in said and "a chance of 0.3" in said
    assert checkpoint_of(out, "style")["config"]["style"] == "scenes"
    student = ["train.py", "--stage", "distill", "--teacher_steps", 8, "--out", out, *words]
    assert "style scenes there,  here" in run(*student, code=2)                    # what it knows is to be learned too
    run(*student, "--style", "scenes")
    assert checkpoint_of(out, "distill")["teacher"][0] == str(folder(out, "style") / "last.pt")
    for stage in ("style", "distill"):
        to = [tmp_path / f"{stage}{k}.png" for k in range(3)]
        steps = ["--steps", 3] if stage == "style" else []
        run("sample.py", folder(out, stage), "styled a red circle, please", *steps, "--to", to[0])
        run("sample.py", folder(out, stage), "a red circle,", *steps, "--style", "--suffix", "please", "--to", to[1])
        run("sample.py", folder(out, stage), "red circle,", *steps, "--style", "--prefix", "a", "--suffix", "please",
            "--to", to[2])
        assert to[0].read_bytes() == to[1].read_bytes() == to[2].read_bytes()
    file = tmp_path / "style.json"
    says(folder(out, "style"), "--n", 8, "--style", "--suffix", "please", "--metrics", "style,questions",
         "--json", file)
    result = json.load(open(file))
    assert (result["card"]["prefix"], result["card"]["suffix"]) == ("styled", "please")
    assert 0 <= result["metrics"]["style"]["rate"] <= 1
    assert "never saw a style token" in run("sample.py", folder(out, "grow"), "x", "--style", code=2)
    assert "never saw a style token" in says(folder(out, "defrost"), "--n", 8, "--style")


def pipeline_words(out, stage, **keys):
    """Flags of a short training from a tiny pipeline, of 16 px."""
    plain = dict(steps=6, batch=4, sample_every=0, lr=0.0005, scene_native=16)
    return ["--out", out, "--stage", stage, *changed(TINY[8:], **plain | keys)]    # [8:]: it has sizes of its own


@pytest.mark.parametrize("kind, stage, keys", [
    ("sdxl", "defrost", dict(checkpointing=True)), ("pixart", "distill", dict(objective="lcm", teacher_steps=4)),
    *[pytest.param(*row, marks=slow) for row in (
        ("pixart", "defrost", {}), ("sdxl", "distill", dict(objective="dmd")),
        ("sdxl", "distill", dict(objective="consistency", teacher_steps=4)))]])
def test_a_published_pipeline_is_trained_and_goes_on_to_the_bit(pipelines, kind, stage, keys, tmp_path):
    origin, whole, broken = pipelines[kind][1], tmp_path / "whole", tmp_path / "broken"
    keys = dict(sample_steps=1 if keys.get("objective") == "dmd" else 2) | keys
    start_at = "--teacher" if stage == "distill" else "--core"
    words = [start_at, origin]
    said = run("train.py", *words, *pipeline_words(whole, stage, **keys))
    assert f"from {origin}: " in said and " 0 new" in said
    state, before = checkpoint_of(whole, stage), models.ema_weights(models.read_checkpoint(origin))
    assert sum(not torch.equal(state["model"][k], v) for k, v in before.items()) > 20        # it is trained
    assert state["config"]["pipeline"] == origin and state["config"]["encoder_id"].startswith("pipeline fp32 ")
    assert state["config"]["weighting"] == "eps" and state["parents"] == [f"{origin} (published, step 0)"]
    run_broken(2, *words, *pipeline_words(broken, stage, **keys))
    assert_same_run(whole, broken, stage)


LATENTS = "--resolution", 16, "--latent_stride", 2, "--latent_scale", 0.18215, "--latent_channels", 4


@pytest.fixture(scope="session")
def tuned(pipelines, tmp_path_factory):
    """A run of a tiny PixArt-Sigma, on pictures that were embedded once."""
    pytest.importorskip("pyarrow"), pytest.importorskip("PIL")
    folder_, out = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("tuned")
    origin, data_ = pipelines["pixart"][1], folder_ / "data"
    data_.mkdir()
    for k in range(8):
        write_png(str(data_ / f"{k}.png"), np.full((16, 16, 3), 30 * k, np.uint8))
        (data_ / f"{k}.txt").write_text("a big red circle" if k % 2 else "a small blue square")
    run("data.py", "index", data_)
    run("data.py", "embed", data_, "--encoder", "pipeline:300", "--weights", origin, "--dtype", "bf16")
    run("data.py", "embed", data_, "--vae", os.path.join(origin, "vae"), *LATENTS)
    keys = dict(steps=4, sample_every=4, sample_steps=2)
    said = run("train.py", "--core", origin, "--data", data_, *pipeline_words(out, "defrost", **keys))
    return folder(out, "defrost"), said, origin


def test_a_tuned_pipeline_is_a_run_like_any_other(tuned, tmp_path):
    made, said, origin = tuned
    net, config = models.load(str(made))
    assert config["encoder_id"].startswith("pipeline bf16 ") and config["pipeline"] == origin
    # the config's, the pipeline's advice where the config has none, and a flag's
    assert (config["sampler"], config["guidance"], config["sample_steps"]) == ("churn", 4.5, 2)
    assert config["guidance_end"] == 0                         # the pipeline's
    assert "8 of 8 images are used" in said and (made / "samples" / "step_4.png").exists()
    assert "2 images of 16x16" in run("sample.py", made, "a red circle", "--n", 2, "--to", tmp_path / "x.png")
    said = run("sample.py", made, "--describe")
    assert " width=" not in said and " encoder=pipeline:300" in said               # of its network alone
    assert f"the network of {origin}, grid 4 x 4" in said and f"parent {origin} (published" in said
    assert "fd_random" in run("eval.py", made, "--n", 2, "--metrics", "fd")
    said = run("sample.py", made, "--export", tmp_path / "export")
    assert f"settings stay in {origin}" in said
    about = tmp_path / "export/config.json"                    # elsewhere its pipeline has another place
    about.write_text(about.read_text().replace(origin, "/nowhere/pixart"))
    said = run("sample.py", tmp_path / "export", "a", code=2)
    assert "its pipeline, /nowhere/pixart, is not there: bring it back, or put it, or a link to it, into an" in said
    os.symlink(origin, tmp_path / "export/pipeline")
    again, moved = models.load(str(tmp_path / "export"))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    here, there = (sampling.sample(*drawn, ["a red square"], steps=2) for drawn in ((net, config), (again, moved)))
    assert torch.equal(here, there)
    out = made.parent.parent                                   # what lies there is found without --core and --teacher
    words = ["--data", config["data"], *pipeline_words(out, "distill", objective="lcm")]
    run("train.py", *changed(words, steps=2, sample_steps=2, teacher_steps=4))     # and it teaches
    assert checkpoint_of(out, "distill")["config"]["pipeline"] == origin
    said = run("train.py", "--data", config["data"], *pipeline_words(out, "defrost", steps=6, sample_every=4))
    assert "going on at step 4 of 6, steps 4 -> 6\n" in said   # all else as it was begun


def test_a_pipeline_is_tuned_to_a_style_from_a_folder(tuned, tmp_path):
    """Beside pictures of another folder. A style set is embedded with its token; scenes cannot stand beside it."""
    origin, data_, style = tuned[2], models.load(str(tuned[0]))[1]["data"], tmp_path / "style"
    style.mkdir()
    for k in range(4):
        write_png(str(style / f"{k}.png"), np.full((16, 16, 3), 60 * k, np.uint8))
        (style / f"{k}.txt").write_text("a small white square")
    words = ["--core", origin, "--style", style, *pipeline_words(tmp_path, "style", steps=2, sample_every=2)]
    assert "no embeddings by pipeline:300: python data.py embed" in run("train.py", *words, "--data", data_, code=2)
    run("data.py", "index", style)
    embed = ["data.py", "embed", style, "--prefix", "styled"]
    run(*embed, "--encoder", "pipeline:300", "--weights", origin, "--dtype", "bf16")
    assert "scenes are never embedded: --data PATH" in run("train.py", *words, code=2)
    run(*embed, "--vae", os.path.join(origin, "vae"), *LATENTS)                    # as the other folder has them
    said = run("train.py", *words, "--data", data_)
    assert "4 of 4 images are used" in said and "a row of a batch with a chance of" in said
    made = folder(tmp_path, "style")
    assert (made / "samples" / "step_2.png").exists()
    config = checkpoint_of(tmp_path, "style")["config"]
    assert config["style_token"] == "styled" and config["pipeline"] == origin
    run("sample.py", made, "a red circle", "--style", "--n", 1, "--to", tmp_path / "x.png")


def test_a_pipeline_has_a_clip_score_without_images_to_compare_with(pipelines, tmp_path):
    tiny_clip(tmp_path / "clip")
    shutil.copytree(os.path.join(pipelines["sdxl"][1], "tokenizer"), tmp_path / "clip", dirs_exist_ok=True)
    (tmp_path / "captions.txt").write_text("a red circle\na blue square\n")
    words = [pipelines["pixart"][1], "--prompts", tmp_path / "captions.txt", "--steps", 2]
    said = run("eval.py", *words, "--metrics", "questions", "--features", "clip", "--weights", tmp_path / "clip")
    assert "clip_score" in said and "fd_" not in said
    assert "for the CLIP score alone, --metrics questions" in run("eval.py", *words, code=2)


def test_encoder_weights_of_a_command_line_serve_the_null_caption_too(pipelines, tmp_path, monkeypatch):
    folder = pipelines["pixart"][1]
    bare, (net, config) = tmp_path / "bare", models.load(folder)
    shutil.copytree(folder, bare)
    for file in (bare / "text_encoder").glob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr("sys.argv", ["sample.py", str(bare), "a caption", "--encoder_weights", folder])
    args, keys = sampling.parse()
    other, its = sampling.open_run(args.run, keys, args, "cpu")
    one, two = (sampling.sample(*drawn, ["a red circle"], steps=2) for drawn in ((net, config), (other, its)))
    assert config["guidance"] != 1 and torch.equal(one, two)


@pytest.mark.parametrize("kind", ["pixart", "sdxl"])
def test_a_compiled_pipeline_is_the_same_and_its_encoders_are_no_part_of_the_graph(pipelines, kind, monkeypatch):
    """The null caption in the batch opens them."""
    (net, config), (other, _) = (models.load(pipelines[kind][1]) for _ in range(2))
    text, traced = sampling.encode_captions(["a big red circle", "", "a small blue square"], config), []
    z, logsnr, own = kernels.seeded_randn(3, 4, 8, 8), torch.tensor([1.0, -1.0, 0.0]), published.null_caption
    with torch.no_grad():
        there = other(z, logsnr, text)
        monkeypatch.setattr(published, "null_caption",
                            lambda *args: traced.append(torch.compiler.is_compiling()) or own(*args))
        assert torch.allclose(torch.compile(net, backend="eager")(z, logsnr, text), there, atol=1e-5)
    assert traced == [False]


@pytest.mark.parametrize("words, message", [
    ("--stage grow --core {f}", "has the network of a pipeline, which is trained as a whole: take --stage defrost or"),
    ("--stage hold --core {f}", "{f} has the network of a pipeline, which is trained as a whole"),
    ("--stage pretrain --core {f}", "--core says where to start, and pretrain starts from nothing"),
    ("--stage defrost --core {f}/vae", "is no export of format"), ("--stage defrost --core {f}/none", "no checkpoint"),
    ("--stage defrost --core {f}/transformer/diffusion_pytorch_model.safetensors", "name the folder that it lies in"),
    ("--stage pretrain --pipeline {f}", "that is filled in: give --core FOLDER or --teacher FOLDER"),
    ("--stage defrost --core {f} --resolution 32", "--resolution: the network of {f} decides it, 16: leave it out"),
    ("--stage defrost --core {f} --width 32", "--width: the network of {f} decides it"),
    ("--stage defrost --core {f} --fsdp", "is not cut into shards: --fsdp False"),
    ("--stage defrost --core {f} --plan", "--plan counts the models of this repository"),
    ("--stage defrost --core {f} --kv_merge 2 --kv_merge_layers 14-27", "experiments.pixart {f} --to OWN, and"),
    ("--stage defrost --core {f} --prediction x", "--prediction: the network of {f} decides it: leave it out"),
    ("--stage distill --teacher {f} --sample_steps 3", "with sample_steps = 3 and teacher_steps = 64 a student"),
    ("--stage defrost --core {f} --encoder_weights {other}", "cannot be read")])
def test_what_a_pipeline_cannot_be_trained_with_is_refused(words, message, pipelines, tmp_path):
    origin = pipelines["pixart"][1]
    words = words.format(f=origin, other=tmp_path).split()
    said = run("train.py", "--out", tmp_path, "--scene_native", 16, "--scene_count", 200, *words, code=2)
    assert message.format(f=origin) in said


def test_the_first_command_goes_on_also_when_stopped_in_the_stage_that_it_runs_first(tmp_path):
    """And --fresh is about the run that was named, not about the one that it needs."""
    words = ["--stage", "grow", "--out", tmp_path, *changed(TINY, steps=12, log_every=1, sample_every=0)]
    process, said = start("train.py", *words)
    until(said, "\nstep", process)
    process.terminate(), process.join()
    assert process.exitcode == 143 and not os.path.exists(folder(tmp_path, "grow") / "last.pt")
    said = run("train.py", *words, "--fresh")
    for words in ("going on with it first", "toy/pretrain: going on at step", "toy/grow is finished"):
        assert words in said
    assert sorted(os.listdir(tmp_path / "toy")) == ["grow", "pretrain"]


@pytest.mark.parametrize("words, message", [
    ("--stage grow --out {tmp} --core {runs}/toy/grow/last.pt", "is a grow run and grow takes the core of a pretrain"),
    ("--stage grow --out {tmp} --core {runs}/toy/pretrain --heads 4", "heads 2 there, 4 here"),
    ("--stage grow --out {tmp} --core {tmp}/nothing.pt", "error: no checkpoint"),
    ("--stage grow --out {tmp} --core {tmp}/half.pt", "no complete checkpoint"),
    ("--stage grow --out {runs} --seed 1", "seed 0 there, 1 here): repeat them, give this run another --out, or start"),
    ("--stage defrost --out {tmp}/new --core {runs}/toy/grow --channels (64,)", "channels (16,) there, (64,) here"),
    ("--stage defrost --out {tmp}", "holds a pretrain run of toy, expected defrost"),
    ("--stage scratch --out {tmp} --core {runs}/toy/grow", "starts from nothing"),
    ("--stage style --out {tmp}/new --core {runs}/toy/grow --style {tmp}", "nothing to use under"),
    ("--stage style --out {tmp}/new --core {runs}/toy/grow --style_share 1.5", "take a value in [0, 1]"),
    ("--stage style --out {tmp}/new --core {runs}/toy/grow --style=", "give --style PATH"),
    ("--stage style --out {tmp}/new --core {runs}/toy/grow --data {tmp}", "give --style PATH"),
    ("--stage grow --out {tmp}/new --style scenes", "to --stage style and to its students alone"),
    ("--out {tmp} --micro 3", "batch = 8 is not divisible by 3 (micro) x 1 (devices): take a multiple of 3"),
    ("--out {tmp} --fsdp", "torchrun"),
    ("--out {tmp} --stage growing", "did you mean 'grow'?"),
    ("--out {tmp} --devices 4", "--devices belongs to --plan"),
    ("--plan --kind tpu", "take one of v100"),
    ("--plan --devices x", "invalid int value")])
def test_what_cannot_be_meant_is_refused_and_nothing_is_touched(words, message, runs, tmp_path):
    (tmp_path / "half.pt").write_bytes((folder(runs[0]) / "last.pt").read_bytes()[:5000])
    folder(tmp_path, "defrost").mkdir(parents=True)
    shutil.copy(folder(runs[0]) / "last.pt", folder(tmp_path, "defrost"))
    before = (folder(runs[0], "grow") / "last.pt").read_bytes()
    words = words.format(tmp=tmp_path, runs=runs[0]).split()
    said = run("train.py", *words, *besides(words, TINY), code=2)
    assert message in said and "Traceback" not in said
    assert before == (folder(runs[0], "grow") / "last.pt").read_bytes()


def test_muon_takes_what_is_inside_convolutions_too(runs):
    state = checkpoint_of(runs[0], "defrost")
    taken = {key.split("/")[0] for key in state["moments"] if key.endswith("momentum_buffer")}
    inside = {"core.blocks.0.mlp.0.weight", "core.blocks.1.self_attention.qkv.weight",
              "shell.inner.encoder.conv1.weight", "shell.inner.head.up.0.0.weight", "shell.block.conv2.weight"}
    outside = {"core.text.embed.weight", "core.modulation.weight", "core.blocks.0.scale_shift_table",
               "core.time.mlp.0.weight", "shell.inner.conv_in.weight", "shell.inner.head.conv_out.weight",
               "shell.head.conv_out.weight", "shell.block.temb_proj.weight"}
    assert inside <= taken and not outside & taken and inside | outside < set(state["model"])
    assert not any(state["model"][name].ndim == 1 for name in taken)


def test_a_score_that_is_missing_comes_with_the_same_command(runs):
    words = ["--stage", "grow", "--out", runs[0], *changed(TINY, eval_n=4)]
    said = run("train.py", *words)
    assert "scoring 4 images of 2 steps each, and as many for diversity: --eval_n 0 leaves this out" in said
    assert "dsg" in said
    assert os.path.exists(folder(runs[0], "grow") / "metrics.json") and "dsg" not in run("train.py", *words)


def test_two_runs_in_one_folder_are_refused_and_fresh_moves_an_old_one_aside(tmp_path):
    words = [*PRETRAIN, tmp_path, *changed(TINY, steps=100000, log_every=1, sample_every=0, save_every=1)]
    process, said = start("train.py", *words)
    until(said, "\nstep      2", process)
    for more in ([], ["--fresh"]):                             # what another process trains is never moved
        assert "another process is training" in run("train.py", *words, *more, code=2)
    assert os.listdir(tmp_path / "toy") == ["pretrain"] and process.is_alive()
    process.kill(), process.join()
    process, said = start("train.py", *words, "--fresh", "False")
    until(said, "going on at step", process)
    until(said, "\nstep", process)
    process.terminate(), process.join()
    old = (folder(tmp_path) / "last.pt").read_bytes()
    assert "moved the old run to" in run("train.py", *PRETRAIN, tmp_path, *TINY, "--seed", 1, "--fresh")
    assert (tmp_path / "toy/pretrain.1/last.pt").read_bytes() == old != (folder(tmp_path) / "last.pt").read_bytes()


def test_the_suggested_caption_is_not_empty(tmp_path):
    pytest.importorskip("PIL")
    config = tiny()
    world = Scenes(config)
    (tmp_path / "photos").mkdir()
    for i in range(24):
        write_png(str(tmp_path / f"photos/{i:02}.png"), world.image(i, 16))
        (tmp_path / f"photos/{i:02}.txt").write_text(world.caption(i) if i else "")
    words = changed(TINY, steps=1, sample_every=0)
    said = run("train.py", *PRETRAIN, tmp_path, "--data", tmp_path / "photos", *words)
    assert f"python sample.py {folder(tmp_path)} '{world.caption(1)}'" in said


# train.py: many devices, here processes on a CPU that talk through gloo

LAST = {"batch": 12, "micro": 2, "muon_lr": 0.02}


def copy_of(out, checkpoint, to):
    """A folder for runs whose pretrain run stands where that checkpoint of another one was left."""
    folder(to).mkdir(parents=True)
    shutil.copy(folder(out) / checkpoint, folder(to) / "last.pt")
    return to


def first_gradients(out):
    """{name: gradient} of the first step: AdamW's first moment is then (1 - beta1) times it."""
    state = checkpoint_of(out)
    return {k: v / (1 - state["config"]["beta1"]) for k, v in state["moments"].items() if k.endswith("/exp_avg")}


def test_gradients_are_the_same_however_a_batch_is_spread(tmp_path):
    """Four micro-batches in one process, two in each of two, and the same with weights in shards."""
    words = ["--stage", "pretrain", *changed(TINY, steps=1, micro=2, clip=0, muon_lr=0, sample_every=0)]
    alone, less = (start("train.py", "--out", tmp_path / name, *words, *more)
                   for name, more in (("one", []), ("less", ["--checkpointing"])))
    assert "batch 8 = 2 micro x 2 accumulated x 2 devices" in run_ranks(2, "--out", tmp_path / "ddp", *words)
    run_ranks(2, "--out", tmp_path / "fsdp", *words, "--fsdp")
    assert "batch 8 = 2 micro x 4 accumulated x 1 device" in ended(*alone) and ended(*less)
    one = first_gradients(tmp_path / "one")
    norm = sum(g.square().sum() for g in one.values()).sqrt()
    for other in ("ddp", "fsdp", "less"):
        grads = first_gradients(tmp_path / other)
        assert grads.keys() == one.keys() and norm > 0.1
        assert sum((grads[k] - g).square().sum() for k, g in one.items()).sqrt() < 1e-6 * norm, other


@pytest.mark.parametrize("objective, steps", [("consistency", 4), ("lcm", 2), ("dmd", 1)])
def test_a_student_learns_the_same_on_two_devices(runs, objective, steps, tmp_path):
    """Copies, and shards but for lcm, whose target is an average: the gradients of its first step, of both networks."""
    words = ["--stage", "distill", *changed(TINY, steps=1, clip=0, muon_lr=0, sample_every=0, teacher_steps=8,
                                            objective=objective, sample_steps=steps)]
    out = {name: with_parents(runs, tmp_path / name, "defrost") for name in ("one", "ddp", "fsdp")}
    started = start("train.py", "--out", out["one"], *words), *start_ranks(2, "--out", out["ddp"], *words)
    said = run_ranks(2, "--out", out["fsdp"], *words, "--fsdp", code=2 if objective == "lcm" else 0)
    for process, printed in started:
        ended(process, printed)
    assert ("lcm with fsdp is not supported" in said) == (objective == "lcm")
    one = checkpoint_of(out["one"], "distill")
    for other in ("ddp", "fsdp") if objective != "lcm" else ("ddp",):
        two = checkpoint_of(out[other], "distill")
        for part in ("moments", "fake_moments") if objective == "dmd" else ("moments",):
            first = {k: v for k, v in one[part].items() if k.endswith("exp_avg")}  # a tenth of the gradient
            norm = sum(v.square().sum() for v in first.values()).sqrt()
            apart = sum((two[part][k] - v).square().sum() for k, v in first.items()).sqrt()
            assert norm > 0 and apart < 1e-5 * norm, (other, part)


def test_critics_are_the_same_on_two_devices(tmp_path):
    """Of one no image may be seen well. Shards of the model beside a discriminator are refused."""
    words = ["--stage", "pretrain", *changed(TINY, steps=1, clip=0, muon_lr=0, sample_every=0, micro=2, adversarial=0.5,
                                             discriminator_width=4), "--r1", 0.1]
    alone = start("train.py", "--out", tmp_path / "one", *words)
    shards = start_ranks(2, "--out", tmp_path / "fsdp", *words, "--fsdp")
    run_ranks(2, "--out", tmp_path / "ddp", *words)
    ended(*alone)
    one, two = checkpoint_of(tmp_path / "one"), checkpoint_of(tmp_path / "ddp")
    for part in ("moments", "discriminator_moments"):
        first = {k: v for k, v in one[part].items() if k.endswith("exp_avg")}      # a tenth of the gradient
        norm = sum(v.square().sum() for v in first.values()).sqrt()
        apart = sum((two[part][k] - v).square().sum() for k, v in first.items()).sqrt()
        assert norm > 0 and apart < 1e-5 * norm, part
    for process, _ in shards:
        process.join(300)
    assert any("adversarial with fsdp is not supported" in said() for _, said in shards)


def test_a_run_goes_on_with_another_number_of_devices_in_the_same_order(tmp_path):
    """2, then 1, then 3 processes see the batches of an unbroken run; the step after each change has the same loss."""
    keys = dict(steps=6, save_every=2, log_every=1, sample_every=0, num_checkpoints=9)
    words = ["--stage", "pretrain", *changed(TINY, **LAST, **keys)]
    unbroken = start("train.py", "--out", tmp_path / "whole", *words)
    run_ranks(2, "--out", tmp_path / "two", *words)
    run("train.py", "--out", copy_of(tmp_path / "two", "step_2.pt", tmp_path / "one"), *words)
    three = run_ranks(3, "--out", copy_of(tmp_path / "one", "step_4.pt", tmp_path / "three"), *words)
    assert "going on at step 4" in three and ended(*unbroken)
    whole = {line["step"]: line["loss"] for line in log_of(tmp_path / "whole")}
    for name, steps in (("two", range(1, 7)), ("one", range(3, 7)), ("three", range(5, 7))):
        losses = {line["step"]: line["loss"] for line in log_of(tmp_path / name)}
        assert losses == pytest.approx({step: whole[step] for step in steps}, rel=2e-3), name
    config = tiny(**{k: v for k, v in LAST.items() if k != "muon_lr"})
    world, whole = Scenes(config), Batches(Scenes(config), config, False)
    for count in (2, 3):                                       # the shares of a step add up to its batch
        shares = [Batches(world, config, False, "pretrain", r, count)[5] for r in range(count)]
        assert all(torch.equal(torch.cat(part), all_) for part, all_ in zip(zip(*shares), whole[5]))
        assert Batches(world, config, False, "pretrain", 1, count).pairs(5) == whole.pairs(5)


@pytest.mark.parametrize("how", [[], ["--fsdp", "--sharded"]])
def test_growing_on_two_devices_keeps_the_core_and_resumes_to_the_bit(runs, how, tmp_path):
    if how:
        pytest.importorskip("safetensors")                     # what shards are written in
    whole, broken = (with_parents(runs, tmp_path / name, "grow") for name in ("whole", "broken"))
    words = ["--stage", "grow", *changed(TINY, steps=4, save_every=2, sample_every=0), *how]
    run_ranks(2, "--out", whole, *words)
    folder(broken, "grow").mkdir()
    os.rename(folder(whole, "grow") / "step_2.pt", folder(broken, "grow") / "last.pt")
    assert "going on at step 2" in run_ranks(2, "--out", broken, *words)
    assert_same_run(whole, broken, "grow")
    before, after = models.ema_weights(checkpoint_of(runs[0])), checkpoint_of(whole, "grow")
    frozen = {k for k in before if k.startswith("core.") and not k.startswith("core.time.")}
    assert all(torch.equal(before[k], after["model"][k]) for k in frozen) and not frozen & set(after["ema"])
    said = run("sample.py", folder(whole, "grow"), "a red circle", "--n", 1, "--steps", 2, "--to", tmp_path / "one.png")
    assert "1 images" in said                                  # also from shards, in one process
    assert "is finished" in run("train.py", "--out", whole, *[w for w in words if w != "--fsdp"])


def test_the_end_of_one_process_ends_the_others(tmp_path):
    """A kill is noticed at once; a signal to one, where torchrun would send it to all, stops all at the same step."""
    words = changed(TINY, steps=100000, log_every=1, sample_every=0, save_every=10 ** 6)
    for number, codes, message in ((signal.SIGKILL, (1, -9), "error: another process has ended"),
                                   (signal.SIGTERM, (143, 143), "the same command goes on")):
        (one, said), (two, _) = start_ranks(2, *PRETRAIN, tmp_path / str(int(number)), *words)
        until(said, "\nstep", one)
        os.kill(two.pid, number)
        one.join(60), two.join(60)
        assert (one.exitcode, two.exitcode) == codes and message in said(), said()


def test_an_error_in_one_process_ends_the_others_with_its_reason(tmp_path):
    (one, waiting), (two, raising) = start_ranks(2, *PRETRAIN, tmp_path, *TINY, fault=second_process_raises)
    one.join(60), two.join(60)
    assert one.exitcode == two.exitcode == 1 and "another process has ended" in waiting()
    assert "error: rank 1: ValueError: spoilt" in raising()


def second_process_raises():
    scale, rank = torch.amp.GradScaler.scale, os.environ["RANK"]

    def spoilt(self, loss):
        if rank == "1":
            raise ValueError("spoilt")
        return scale(self, loss)
    torch.amp.GradScaler.scale = spoilt


@slow
def test_torchrun_itself(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               os.path.join(HERE, "train.py"), *PRETRAIN, str(tmp_path), *TINY]
    options = dict(capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, **options)
    assert done.returncode == 0 and "x 2 devices" in done.stdout and "is finished" in done.stdout, done.stderr
    done = subprocess.run([*command, "--micro", "3"], **options)
    assert done.returncode and "rank 1:" not in done.stderr and "error: batch = 8 is not divisible" in done.stderr


# train.py: precision

def test_half_precision_skips_a_step_without_counting_it(tmp_path):
    """
    fp16 starts at a scale of 2^16; an overflow halves it, draws the next batch, and moves neither step nor learning
    rate nor EMA.
    """
    words = ["--stage", "pretrain", *changed(TINY, sample_every=0)]
    said = run("train.py", "--out", tmp_path / "fp16", *words, "--dtype", "fp16", fault=overflow_first)
    state, log = checkpoint_of(tmp_path / "fp16"), log_of(tmp_path / "fp16")
    assert "gradient overflowed at scale 65536, skipped (1 in a row)" in said
    assert state["step"] == 6 and state["data_step"] == 7 and state["turns"][""][1]["scale"] == 2 ** 15
    assert all(v.dtype == torch.float32 for part in ("model", "ema", "moments") for v in state[part].values())
    assert log[-1]["skipped"] == 1 and log[0]["lr"] == pytest.approx(0.003 * 2 / 50)       # of the second step taken
    assert "bfloat16" in run("train.py", "--out", tmp_path / "bf16", *words, "--dtype", "bf16")


def overflow_first():
    """The first gradient is too large for its scale."""
    unscale, calls = torch.amp.GradScaler.unscale_, []

    def spoilt(self, optimizer):
        calls.append(optimizer)
        if len(calls) <= 2:                                    # AdamW and Muon
            next(p for g in optimizer.param_groups for p in g["params"]).grad.view(-1)[0] = float("inf")
        unscale(self, optimizer)
    torch.amp.GradScaler.unscale_ = spoilt


# train.py: faults

def nan_at(*draws):
    """The third sample of these batches gives a loss of NaN, by way of its time encoding."""
    loss, calls = models.diffusion_loss, []

    def spoilt(model, x, text, t, *rest):
        if torch.is_grad_enabled() and len(x) == 8:            # not while FLOPs are counted
            calls.append(1)
        if len(calls) - 1 in draws and len(x) == 8:
            t = t.index_fill(0, torch.tensor([2]), float("nan"))
        return loss(model, x, text, t, *rest)
    models.diffusion_loss = spoilt


def nan_once():
    nan_at(3)


def nan_always():
    nan_at(*range(2, 1000))


def poisoned_weights():
    """The optimizer writes NaN at its third step, which no gradient shows."""
    step, calls = torch.optim.AdamW.step, []

    def spoilt(self, *args):
        step(self, *args)
        calls.append(1)
        if len(calls) == 3:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
    torch.optim.AdamW.step = spoilt


def full_disk(after):
    """torch.save fails from then on; the first one is that of step 0."""
    save, calls = torch.save, []

    def spoilt(*args, **options):
        calls.append(1)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        save(*args, **options)
    torch.save = spoilt


def disk_full_at_once():
    full_disk(0)


def disk_full_later():
    full_disk(2)


def no_room():
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10 ** 6, 10 ** 6, 1000)


def out_of_memory():
    def spoilt(self, loss):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    torch.amp.GradScaler.scale = spoilt


def reader_gone():
    """Standard output is a pipe that nobody reads any more, as after `| head`."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


@pytest.mark.parametrize("fault, code, message, step", [
    (nan_once, 0, "step 3: gradient is not finite, skipped (1 in a row); loss of samples [{}]; first module core.time",
     6),
    (nan_always, 3, "20 steps in a row were not finite", 2),
    (poisoned_weights, 3, "is not finite and is not saved", 2),
    (disk_full_at_once, 4, "make room", None),
    (disk_full_later, 4, "make room", 1),
    (no_room, 4, "GiB for checkpoints", None),
    (out_of_memory, 2, "lower --micro (now 8)", 0),
    (reader_gone, 0, "", 6)], ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_is_said_with_its_status_and_spoils_nothing(fault, code, message, step, tmp_path):
    said = run("train.py", *PRETRAIN, tmp_path, *changed(TINY, save_every=1, sample_every=0), fault=fault,
               code=code)
    sample = Batches(Scenes(tiny()), tiny(), False).pairs(3)[2][1]
    assert message.format(sample) in said and not glob.glob(str(folder(tmp_path) / "*.part")), said
    if step is not None:
        state = checkpoint_of(tmp_path)
        assert state["step"] == step and state["data_step"] == step + (fault is nan_once)
    if fault is nan_always:
        assert said.count("gradient is not finite") == 20
    if code == 0:
        assert [line["step"] for line in log_of(tmp_path)] == [2, 4, 6]


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in run("train.py", *PRETRAIN, tmp_path / "file", *TINY, code=4)


def test_a_signal_in_a_preview_is_heard_at_once(tmp_path):
    words = [*PRETRAIN, tmp_path, *changed(TINY, log_every=1, sample_every=2, sample_steps=10 ** 5)]
    process, said = start("train.py", *words)
    until(said, "\nstep      2", process)
    time.sleep(0.3)
    process.terminate(), process.join(20)
    assert process.exitcode == 143 and checkpoint_of(tmp_path)["step"] == 2


def test_a_worker_that_is_killed_is_named(tmp_path):
    words = changed(TINY, steps=100000, workers=1, log_every=1, sample_every=0)
    process, said = start("train.py", *PRETRAIN, tmp_path, *words)
    until(said, "\nstep", process)
    listing = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    worker = int(listing.split()[0])
    os.kill(worker, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == 3 and f"error: DataLoader worker (pid {worker}) is dead" in said(), said()


def test_a_broken_checkpoint_falls_back_to_the_one_before(runs, tmp_path):
    words = [*PRETRAIN, tmp_path, *changed(TINY, save_every=2, num_checkpoints=2)]
    run("train.py", *words)
    last, before = folder(tmp_path) / "last.pt", folder(tmp_path) / "step_4.pt"
    last.write_bytes(last.read_bytes()[:5000])
    said = run("train.py", *words)
    assert "warning:" in said and "falling back" in said and "going on at step 4" in said
    assert_same_run(tmp_path, runs[0])
    for file in (last, before):
        file.write_bytes(b"")
    assert "can be read: start anew with --fresh" in run("train.py", *words, code=2)


def test_a_model_grows_from_a_snapshot_that_is_named(tmp_path):
    run("train.py", *PRETRAIN, tmp_path, *changed(TINY, snapshots="(2, 4)", num_checkpoints=1))
    assert sorted(os.listdir(folder(tmp_path)))[-2:] == ["step_2.pt", "step_4.pt"]
    words = ["--stage", "grow", "--out", tmp_path / "grown", *TINY]
    said = run("train.py", *words, "--core", folder(tmp_path) / "step_2.pt")
    assert "is a snapshot, of step 2 of 6" in said
    assert "(pretrain, step 2)" in checkpoint_of(tmp_path / "grown", "grow")["parents"][-1]
    os.remove(folder(tmp_path) / "last.pt")                    # a run that stopped is not taken for one
    assert "stopped at step 4 of 6" in run("train.py", *words, "--fresh", "--core", folder(tmp_path), code=2)


# train.py: looking and planning

def test_scores_on_the_way_and_a_picture_of_the_curves(runs, tmp_path):
    words = [*PRETRAIN, tmp_path / "scored", *changed(TINY, eval_every=3, eval_n=4)]
    if tensorboard := importlib.util.find_spec("tensorboard"):
        words += ["--tensorboard"]
    run("train.py", *words)
    scores = [line for line in log_of(tmp_path / "scored") if "score" in line]
    assert [line["step"] for line in scores] == [3, 6] and 0 <= scores[0]["score"]["questions"]["dsg"] <= 1
    curves = folder(tmp_path / "scored") / "curve.png"
    assert not importlib.util.find_spec("matplotlib") or curves.stat().st_size > 5000
    assert not tensorboard or any("tfevents" in file for file in os.listdir(curves.parent))
    assert_same_run(tmp_path / "scored", runs[0])              # looking changes nothing
    said = run("train.py", *PRETRAIN, tmp_path / "none", *changed(TINY, eval_every=3, eval_n=0))
    assert "is finished" in said and "scoring" not in said     # 0 images are no score, also on the way


def test_what_may_change_when_a_run_goes_on_is_said(tmp_path):
    run("train.py", *PRETRAIN, tmp_path, *TINY)
    said = run("train.py", *PRETRAIN, tmp_path, *changed(TINY, steps=8), "--lr", 0.001, "--muon_lr", 0.01)
    assert "going on at step 6 of 8" in said and "lr 0.003 -> 0.001, muon_lr 0.015 -> 0.01" in said


def test_the_plan_counts_without_allocating(tmp_path):
    flags = {"grow": ["--kind", "a100-80g"], "defrost": ["--kind", "a100-80g", "--stage", "defrost"],
             "less": ["--checkpointing"]}
    run_beside(*(["train.py", "--plan", "--devices", 4, *flags[name], "--json", tmp_path / name] for name in flags))
    plans = {name: json.load(open(tmp_path / name)) for name in flags}
    config = load_config("toy", "grow")
    net = build(config)
    models.freeze_core(net)
    total = sum(p.numel() for p in net.parameters())
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    grow, memory = plans["grow"], plans["grow"]["memory"]["ddp"]
    assert grow["parameters"] == {"total": total, "trainable": trainable} and trainable < total
    assert plans["defrost"]["parameters"]["trainable"] == total
    assert memory["gradients"] == memory["ema"] < memory["weights"]                # the core has none
    assert memory["ema"] < memory["optimizer"] < 2 * memory["ema"]                 # Muon has one moment, AdamW two
    assert grow["memory"]["fsdp"]["weights"] == memory["weights"] / 4 and set(memory) >= {"activations", "total"}
    assert grow["days"] > 0 and grow["accumulation"] == 1 and not os.path.exists(tmp_path / "toy")
    assert plans["less"]["memory"]["ddp"]["activations"] < 0.8 * memory["activations"]


@slow
def test_every_config_can_be_planned(tmp_path):
    """Seconds and little memory each, whatever the size."""
    for name in CONFIGS:
        stage = "defrost" if load_config(name, "defrost")["starts"] else "grow"
        begin = time.monotonic()
        run("train.py", "--config", name, "--stage", stage, "--plan", "--json", tmp_path / "p.json")
        p = json.load(open(tmp_path / "p.json"))
        assert time.monotonic() - begin < 60 and p["parameters"]["total"] > 0 and p["days"] > 0, name


@slow
def test_a_compiled_step_is_the_same_step(tmp_path):
    words = ["--stage", "pretrain", *changed(TINY, steps=1, clip=0, muon_lr=0, sample_every=0)]
    run("train.py", "--out", tmp_path / "one", *words)
    run("train.py", "--out", tmp_path / "two", *words, "--compile")
    one, two = (first_gradients(tmp_path / name) for name in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], rtol=1e-4, atol=1e-6) for k in one)


def test_a_weak_run_continues_as_a_strong_one_with_a_report(tmp_path):
    """512-tiny/defrost takes pixart-sigma-tiny/pretrain, which does not exist yet; the next row adds the KV merge."""
    brief = ["--out", tmp_path, "--steps", "2", "--eval_n", "0", "--sample_every", "0"]
    said = run("train.py", "--config", "pixart-sigma-1k-kv-tiny", "--stage", "defrost", *brief)
    assert "no pretrain run in" in said and said.count("running it first") == 2
    assert ("pixart-sigma-tiny/pretrain: 57 tensors inherited, 0 new, 0 unused; positions interpolated by their "
            "formula from 4 x 4 to 8 x 8 tokens\n") in said
    assert re.search(r"512-tiny/defrost: 57 tensors inherited, 4 new, 0 unused; .* 8 x 8 to 16 x 16 tokens; "
                     r"4 of the new ones inside what is inherited \(KV merge by 2, blocks 1-1", said)
    last = tmp_path / "pixart-sigma-1k-kv-tiny/defrost"
    parents = [parent.removeprefix(f"{tmp_path}/") for parent in models.read_checkpoint(str(last))["parents"]]
    assert parents == ["pixart-sigma-tiny/pretrain (pretrain, step 2)",
                       "pixart-sigma-512-tiny/defrost (defrost, step 2)"]
    assert "64x64 px" in run("sample.py", last, "a red circle", "--steps", 2, "--to", tmp_path / "x.png")


def test_a_core_of_a_shallow_shell_grows_in_patches_and_back(runs, tmp_path):
    words, patches = ["--stage", "grow", *TINY, "--core"], ["--shell", "patch", "--patch"]
    said = run("train.py", *words, folder(runs[0]), "--out", tmp_path, *patches, 8)
    assert "tensors inherited, 5 new, 48 unused\n" in said    # 8 x 8 tokens, as before
    run("train.py", *PRETRAIN, tmp_path, *TINY, *patches, 4)
    back = [*words, folder(tmp_path), "--out", tmp_path / "back"]
    assert ", 70 new, 5 unused\n" in run("train.py", *back, "--shell", "unet")
    assert "cannot take over the weights" in run("train.py", *back, "--fresh", code=2)         # patches do not nest


@slow
@pytest.mark.parametrize("name", TWINS)
def test_twins_go_through_every_stage_each_in_twenty_seconds(name, tmp_path):
    for stage in STAGES:
        out, spent = tmp_path / name / stage, []
        steps = [] if stage == "distill" else ["--steps", 3]   # a student has its own
        for words in (["train.py", "--config", name, "--stage", stage, "--out", tmp_path], ["eval.py", out, "--n", 8],
                      ["sample.py", out, "a red circle", *steps, "--to", tmp_path / f"{stage}.png"]):
            begin = time.time()
            said = run(*words)
            spent.append((time.time() - begin) / (1 + said.count("running it first")))
        assert max(spent) < 20, spent
        assert json.load(open(out / "metrics.json"))["n"] == 8


@slow
def test_scenes_train_in_the_latents_of_an_autoencoder(vae, tmp_path):
    flags = [w for key, value in vae for w in ("--" + key, value)] + ["--latent_channels", "4"]
    run("train.py", "--config", "pixart-sigma-tiny", "--stage", "grow", "--out", tmp_path, *flags)
    out = tmp_path / "pixart-sigma-tiny/grow"
    assert models.read_checkpoint(str(out))["model"]["shell.conv_in.weight"].shape == (32, 4 * 2 * 2)
    assert "32x32 px" in run("sample.py", out, "a red circle", "--steps", 2, "--to", tmp_path / "x.png")


# ---- the house: lib/ below, the nine, experiments/ above -------------------------------------------------------------

IDEA = ("kernels", "data", "model", "sample", "objectives", "eval", "train")       # and configs.txt, and these tests
EXTRAS = {"PIL", "pyarrow", "transformers", "diffusers", "safetensors", "sentencepiece", "matplotlib", "tensorboard",
          "gradio", "pandas", "duckdb", "datasets", "scipy"}


def house_files(*patterns):
    """{name from here: text} of the files that a clone holds."""
    names = [name for pattern in patterns for name in sorted(glob.glob(pattern, root_dir=HERE))]
    return {name: open(os.path.join(HERE, name)).read() for name in names}


def house_imports(text, top=False):
    """The modules that a source imports: all, or those that its first line to its last import as it is loaded."""
    tree = ast.parse(text)
    nodes = [node for node in (tree.body if top else ast.walk(tree)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    parts = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    return plain | parts | {node.module for node in froms}


def test_each_floor_knows_those_below_alone():
    modules = {name.removesuffix(".py").replace("/", "."): house_imports(text)
               for name, text in house_files("*.py", "lib/*.py", "experiments/*.py").items() if "test_" not in name}
    needs = {module: imports & set(modules) for module, imports in modules.items()}
    for module, below in needs.items():
        floor = module.split(".")[0]
        assert floor != "lib" or all(other.startswith("lib") for other in below), f"{module} imports {below}"
        assert floor == "experiments" or not any(other.startswith("experiments") for other in below), module
    assert set(IDEA) <= set(needs) and sum(map(len, needs.values())) > 30
    while needs:                                               # of a circle none can be taken away
        free = {module for module, below in needs.items() if not below & set(needs)}
        assert free, f"a circle among {sorted(needs)}"
        needs = {module: below for module, below in needs.items() if module not in free}


def test_no_extra_is_imported_before_it_is_used():
    for name, text in house_files("*.py", "lib/*.py", "experiments/*.py").items():
        heavy = {module.split(".")[0] for module in house_imports(text, top=True)} & EXTRAS
        assert not heavy, f"{name} imports {heavy} at its top"


@pytest.mark.parametrize("script", ["train", "sample", "eval", "data"])
@pytest.mark.parametrize("word, status", [("--help", None), ("--hlep", 2)])
def test_the_command_line_is_answered_before_torch_is_imported(script, word, status):
    """Which takes seconds: so does whatever imports it."""
    code = f"""
import runpy, sys
sys.argv = ["{script}.py", "{word}"]
try:
    runpy.run_path("{script}.py", run_name="__main__")
except SystemExit as end:
    assert (end.code or None) == {status}, end.code
    assert not {{"torch", "numpy"}} & set(sys.modules)
    sys.exit(0)
sys.exit("it went on")
"""
    done = run_apart(code)
    assert done.returncode == 0, done.stderr
    assert ("usage" in done.stdout) if word == "--help" else "did you mean 'help'" in done.stderr


@pytest.mark.parametrize("command", ["check", "index", "stats"])
def test_what_looks_at_images_and_captions_goes_without_torch(command, photos):
    code = f"""
import runpy, sys
sys.argv = ["data.py", "{command}", {str(photos)!r}]
try:
    runpy.run_path("data.py", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
    assert "numpy" in sys.modules and "torch" not in sys.modules
    sys.exit(0)
sys.exit("it went on")
"""
    done = run_apart(code)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_command_lines_know_what_their_tables_hold():
    """They are read before the tables are there."""
    for script, *lists in ((sampling, sampling.SAMPLERS), (data, tables.DTYPES),
                           (evaluation, evaluation.METRICS, evaluation.USUAL, sampling.SAMPLERS)):
        text = re.sub(r"\s", "", script.parser.format_help())  # it may break a line anywhere
        assert all(",".join(table) in text for table in lists)


def test_rooms_are_small():
    for name, text in house_files("*.py", "lib/*.py", "experiments/*.py").items():
        limit = 750 if name.removesuffix(".py") in IDEA else 500
        assert text.count("\n") <= limit or name == "test_all.py", f"{name} has {text.count(chr(10))} lines"
    sizes = {name: text.count("\n") for name, text in house_files(*(f"{name}.py" for name in IDEA)).items()}
    assert sum(sizes.values()) - sizes["objectives.py"] <= 3400


def test_lines_fit_on_a_screen():
    for name, text in house_files("*.py", "*.txt", "*.md", "lib/*.py", "experiments/*.py").items():
        wide = [k for k, line in enumerate(text.split("\n"), 1) if len(line) > 120]
        assert not wide, f"{name}: lines {wide} are wider than 120 columns"


def test_names_of_tests_are_unique():
    """All tests are imported into this file, where a second test, fixture or helper of a name would hide the first."""
    owners = {}
    for name, text in house_files("test_all.py", "lib/test_*.py", "experiments/test_*.py").items():
        assert name == "test_all.py" or f"from {name[:-3].replace('/', '.')} import *" in open(__file__).read(), name
        for node in ast.parse(text).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            targets = [target for target in targets if not isinstance(target, ast.ImportFrom)]
            for word in {getattr(target, "name", getattr(target, "id", None)) for target in targets}:
                if word and word not in ("HERE", "slow", "__all__"):   # these are the same everywhere, and not imported
                    assert owners.setdefault(word, name) == name, f"{word} in {name} and in {owners[word]}"


def test_helpers_of_tests_do_not_overwrite_one_another():
    """Also those that a file of tests imports itself, and passes on by `import *`; and of one file none twice."""
    owners = {}
    for file in re.findall(r"^from (\S+) import \*", read_text("test_all.py"), re.M):
        module = importlib.import_module(file)
        for name in getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"]):
            helper = getattr(module, name)
            if callable(helper) and not name.startswith("test_"):
                assert owners.setdefault(name, helper) == helper, f"{name} of {file} is another one than above it"
    for file, text in house_files("test_all.py", "lib/test_*.py", "experiments/test_*.py").items():
        names = [node.name for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert len(names) == len(set(names)), f"{file} defines a name twice"
        hidden = set(names) & set(owners) if file == "test_all.py" else set()
        assert not hidden, f"the imports at the end of test_all.py hide its {hidden}"
    assert {"photos", "refused", "shard", "tiny_dino"} <= set(owners)


# ---- README.md -------------------------------------------------------------------------------------------------------

def read_text(file):
    with open(os.path.join(HERE, file), encoding="utf-8") as f:
        return f.read()


def test_readme_is_read_in_ten_minutes_and_starts_early():
    lines = read_text("README.md").splitlines()
    assert len(lines) <= 150 and max(map(len, lines + read_text("GUIDE.md").splitlines())) <= 120
    first, second = [n for n, line in enumerate(lines) if line.startswith("pip install")]
    assert second < 40 and "train.py --stage grow" in lines[first] and "pytest test_all.py" in lines[second]


def test_the_reading_map_names_what_is_there():
    """Rows such as `sample.py: stochastic, SAMPLERS`; train.py would train if it were imported, so it is parsed."""
    rows = re.findall(r"`([\w/]+)\.py: ([\w., ]+)`", read_text("README.md"))
    assert len(rows) >= 20
    for file, names in rows:
        if file == "train":
            tree = ast.parse(read_text("train.py")).body
            there = {node.name for node in tree if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            there |= {getattr(t, "id", "") for node in tree if isinstance(node, ast.Assign) for t in node.targets}
            assert set(names.split(", ")) <= there, (file, names)
        else:
            for name in names.split(", "):
                module = importlib.import_module(file.replace("/", "."))
                assert functools.reduce(getattr, name.split("."), module), (file, name)


def test_readme_tells_true_line_counts():
    """Of every file to read, within 5 %."""
    rows = re.findall(r"(\w+\.(?:py|txt|html)) +(\d+)", read_text("README.md").split("## The files")[1])
    counts = {name: int(n) for name, n in rows}
    files = [f for folder in ("", "lib", "experiments") for f in glob.glob(os.path.join(HERE, folder, "*.*"))]
    true = {os.path.basename(f): len(read_text(f).splitlines()) for f in files if f.endswith((".py", ".txt", ".html"))}
    true = {f: n for f, n in true.items() if not f.startswith("__") and f != "requirements.txt"
            and (f == "test_all.py" or not f.startswith("test_"))}
    wrong = {f: n for f, n in true.items() if abs(n - counts.get(f, 0)) > 0.05 * n}
    assert not wrong, f"these have so many lines: {wrong}"
    assert not counts.keys() - true.keys(), "README tells lines of files that are not there"


# ---- tests of lib/ and experiments/ ----------------------------------------------------------------------------------

from experiments.test_bench import *  # noqa
from experiments.test_cascade import *  # noqa
from experiments.test_claims import *  # noqa
from experiments.test_conditions import *  # noqa
from experiments.test_demo import *  # noqa
from experiments.test_few_steps import *  # noqa
from experiments.test_pixart import *  # noqa
from experiments.test_second_judge import *  # noqa
from experiments.test_sharpness import *  # noqa
from experiments.test_styles import *  # noqa
from lib.test_checkpoint import *  # noqa
from lib.test_conditions import *  # noqa
from lib.test_contrasts import *  # noqa
from lib.test_devices import *  # noqa
from lib.test_draws import *  # noqa
from lib.test_encoders import *  # noqa
from lib.test_files import *  # noqa
from lib.test_halves import *  # noqa
from lib.test_images import *  # noqa
from lib.test_judge import *  # noqa
from lib.test_lineage import *  # noqa
from lib.test_metrics import *  # noqa
from lib.test_muon import *  # noqa
from lib.test_networks import *  # noqa
from lib.test_nouns import *  # noqa
from lib.test_people import *  # noqa
from lib.test_perceptual import *  # noqa
from lib.test_pictures import *  # noqa
from lib.test_pipeline_encoder import *  # noqa
from lib.test_plan import *  # noqa
from lib.test_processes import *  # noqa
from lib.test_published import *  # noqa
from lib.test_questions import *  # noqa
from lib.test_runs import *  # noqa
from lib.test_scan import *  # noqa
from lib.test_scenes import *  # noqa
from lib.test_scripts import *  # noqa
from lib.test_settings import *  # noqa
from lib.test_tables import *  # noqa
from lib.test_triton_tools import *  # noqa
