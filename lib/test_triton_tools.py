"""A function that is wrong, or fails, or leaves NaN anywhere is never taken for a fast one."""
import pytest
import torch

from lib import triton_tools
from lib.triton_tools import agrees, cdiv, power_of_two, relative_errors, run_with_gradients, seeded_randn, unit_strides


def fail(x, y):
    raise RuntimeError("out of shared memory")


def wrong_gradient(x, y):
    return x * y, x + y - 1.1 * (y - y.detach())


def nan_at_the_end(x, y):
    return x * y, (x + y).masked_fill(torch.arange(x.numel()).view_as(x) == 3, float("nan"))


@pytest.mark.parametrize("function, training, good, reason", [
    (lambda x, y: (x * y, x + y), True, True, "Triton (differs from float64 by"),
    (lambda x, y: (x * y, x + 1.1 * y), True, False, "PyTorch (differs from float64 by"),
    (wrong_gradient, True, False, "PyTorch (differs"), (wrong_gradient, False, True, "Triton (differs"),
    (nan_at_the_end, True, False, "PyTorch (differs from float64 by nan)"),
    (fail, True, False, "PyTorch (RuntimeError: out of shared memory)")])
def test_a_trial_takes_what_agrees_alone(function, training, good, reason, monkeypatch, capsys):
    def twin(x, y):
        return x * y, x + y
    monkeypatch.setattr(triton_tools, "NO_TRITON", None)
    state = torch.get_rng_state()
    inputs = [seeded_randn(2, 3, seed=i) for i in range(2)]
    with torch.no_grad():
        answer = agrees("a sum", lambda: [(function, twin, inputs, {})], torch.float32, torch.device("cpu"), training)
    assert answer == good and reason in capsys.readouterr().out
    assert torch.equal(state, torch.get_rng_state())


def test_errors_are_relative_and_one_for_each_output_and_gradient():
    inputs = [torch.ones(4), torch.ones(4)]
    errors = relative_errors(lambda x, y: 1.01 * x * y, lambda x, y: x * y, inputs, {})
    assert errors == pytest.approx([0.01] * 3, rel=1e-4)
    assert len(run_with_gradients(torch.mul, inputs, {}, training=False)) == 1


def test_sizes_of_tiles_and_strides():
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [power_of_two(n) for n in (1, 16, 17, 64, 72)] == [16, 16, 32, 64, 128]
    packed = torch.zeros(2, 5, 3, 4, 72)
    assert unit_strides(packed[:, :, 0]) == (8, [(540, 108, 9)])
    assert unit_strides(packed[:, :, 0], torch.zeros(2, 5, 4, 9))[0] == 1
