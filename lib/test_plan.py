"""Tests of plan.py, with layers small enough to count by hand: `pytest lib/test_plan.py`."""
import pytest
import torch

from lib import plan

IMAGES, WIDTH, HIDDEN = 5, 8, 32                                             # images, width, hidden width


class SmallBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(WIDTH, HIDDEN, bias=False), torch.nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        return self.narrow(self.wide(x).sigmoid())


def three_blocks():
    return torch.nn.Sequential(SmallBlock(), SmallBlock(), SmallBlock())


def small_loss(model, images):
    return model(torch.zeros(images, WIDTH, requires_grad=True)).sum()


def test_activations_and_flops_are_those_counted_by_hand():
    """Of each block autograd keeps its input and the sigmoid's output, which is what the second product needs too."""
    _, flops, plain = plan.measure_step(three_blocks, small_loss, IMAGES)
    assert flops == 3 * 2 * 3 * 2 * IMAGES * WIDTH * HIDDEN  # a backward: two products for each of the forward
    assert plain == 4 * 3 * IMAGES * (WIDTH + HIDDEN)
    _, same, less = plan.measure_step(three_blocks, small_loss, IMAGES, blocks=lambda model: list(model))
    # three inputs, and the inside of one block
    assert plan.count_flops(three_blocks, small_loss) * IMAGES == flops
    assert same == flops and less == 4 * (3 * IMAGES * WIDTH + IMAGES * (WIDTH + HIDDEN))


def test_frozen_weights_take_no_state_and_fsdp_divides_it():
    def frozen_first():
        model = three_blocks()
        model[0].requires_grad_(False)
        return model
    p = plan.plan_training(frozen_first, small_loss, steps=100, batch=40, micro=5, devices=4, kind="a100-80g", mfu=0.5,
                           dtype=torch.float32, moments=lambda name, p: 1 if "wide" in name else 2, units=list)
    assert p["parameters"] == {"total": 6 * WIDTH * HIDDEN, "trainable": 4 * WIDTH * HIDDEN} and p["accumulation"] == 2
    ddp, fsdp = ({part: size * 2 ** 30 for part, size in p["memory"][way].items()} for way in ("ddp", "fsdp"))
    assert ddp["weights"] == 24 * WIDTH * HIDDEN and ddp["gradients"] == ddp["ema"] == 16 * WIDTH * HIDDEN
    assert ddp["optimizer"] == 4 * 2 * 3 * WIDTH * HIDDEN and fsdp["gathered"] == 8 * WIDTH * HIDDEN
    assert all(fsdp[part] == ddp[part] / 4 for part in ("weights", "gradients", "optimizer", "ema"))
    assert fsdp["activations"] == ddp["activations"] and ddp["total"] == pytest.approx(sum(ddp.values()) - ddp["total"])
    assert p["days"] == pytest.approx(100 * 40 * p["flops_per_image"] / (4 * 156e12 * 0.5) / 86400)


@pytest.mark.parametrize("kind, dtype, tf32, rate", [
    ("NVIDIA H200", torch.bfloat16, True, 989e12), ("h100", torch.float32, True, 495e12),
    ("a100-80g", torch.float32, False, 19.5e12), ("some other", torch.bfloat16, True, None)])
def test_peak_rates(kind, dtype, tf32, rate):
    assert plan.peak_rate(kind, dtype, tf32) == rate


def test_the_table_says_what_fits_and_an_unknown_device_is_refused(capsys):
    p = plan.plan_training(three_blocks, small_loss, 100, 40, 5)
    plan.print_plan(p)
    plan.print_plan(p | {"device_gib": 0})
    said = capsys.readouterr().out
    for words in ("batch 40 = 5 micro x 8 accumulated x 1 device\n", "fits", "too much: lower --micro"):
        assert words in said
    for wrong, words in ((dict(kind="tpu"), "take one of v100"), (dict(devices=0), "give at least 1"),
                         (dict(mfu=1.5), "a share above 0"), (dict(devices=3), "take a multiple of 15")):
        with pytest.raises(SystemExit):
            plan.plan_training(three_blocks, small_loss, 100, 40, 5, **wrong)
        assert words in capsys.readouterr().err


def test_the_yardstick_of_a_cpu_is_a_rate():
    assert 1e8 < plan.sgemm_rate() < 1e15
