"""Tests of devices.py: `pytest lib/test_devices.py`. What several devices share is tested with train.py."""
import copy

import pytest
import torch

from lib import devices
from lib.settings import UserError


def test_a_cpu_computes_in_float32_unless_it_is_told_otherwise(capsys):
    assert devices.choose_dtype("auto", "cpu") == devices.choose_dtype("fp32", "cpu") == torch.float32
    assert devices.choose_dtype("bf16", "cpu") == torch.bfloat16 and capsys.readouterr().out == ""
    assert devices.choose_dtype("fp16", "cpu") == torch.float16
    assert "fp16 on a CPU is slow" in capsys.readouterr().out


def test_a_run_repeats_itself_and_fp16_in_shards_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert devices.set_precision(dict(dtype="bf16", tf32=True, fsdp=True), "cpu") == torch.bfloat16
    assert torch.backends.cudnn.deterministic
    with pytest.raises(UserError):
        devices.set_precision(dict(dtype="fp16", tf32=True, fsdp=True), "cpu")
    assert "dtype = fp16 with fsdp is not supported" in capsys.readouterr().err


def test_only_fp16_scales_its_loss():
    scaled = [devices.loss_scaler(dtype, "cpu").scale(torch.ones(())) for dtype in (torch.bfloat16, torch.float16)]
    assert scaled[0] == 1 < scaled[1]


def test_products_in_half_precision_end_with_the_call():
    net, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    assert devices.in_half(net, torch.bfloat16)(x).dtype == torch.bfloat16
    assert devices.in_half(net, torch.float32)(x).dtype == net(x).dtype == torch.float32


def test_one_device_has_the_network_to_itself(monkeypatch):
    model, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    monkeypatch.setattr(torch, "compile", lambda net: lambda x: ("compiled", net(x)))
    assert devices.spread(model, "cpu") is model
    assert devices.spread(model, "cpu", compiled=True)(x)[0] == "compiled"


def test_of_a_model_of_ours_half_precision_changes_products_alone():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    plain, config, x = copy.deepcopy(model), {"pipeline": "", "dtype": "auto"}, torch.randn(3, 4)
    devices.in_dtype(model, config, None)
    assert config["dtype"] == "fp32" and torch.equal(model(x), plain(x))
    devices.in_dtype(model, config, "bf16")
    assert config["dtype"] == "bf16" and all(p.dtype == torch.float32 for p in model.parameters())
    assert 0 < (model(x) - plain(x)).abs().max() < 0.05
