"""
VGG-19 and the discriminator, with random weights: torchvision's are not at hand. torchvision's own network, where it is
installed, tells whether names, layers and inputs are the same.
"""
import pytest
import torch
import torch.nn.functional as F

from lib import perceptual
from lib.perceptual import LAYERS, STAND_IN, VGG19, Discriminator, hinge, open_vgg, slope_penalty
from lib.settings import UserError

WIDTHS = 64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512
PLACES = 0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34


def two_pictures(n=2, side=32, seed=0):
    return torch.rand(2, n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """Random weights under torchvision's names, in the old format of its file; of the classifier only a name."""
    generator, state, before = torch.Generator().manual_seed(1), {}, 3
    for place, width in zip(PLACES, WIDTHS):
        scale = (2 / (9 * before)) ** 0.5
        state[f"features.{place}.weight"] = scale * torch.randn(width, before, 3, 3, generator=generator)
        state[f"features.{place}.bias"], before = torch.zeros(width), width
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(state | {"classifier.0.bias": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    return str(path)


def test_features_are_the_outputs_of_the_four_layers_by_torchvisions_names(vgg_file, monkeypatch):
    """Written out once more, layer by layer, from the names alone."""
    monkeypatch.setattr(perceptual, "VGG_SHA256", perceptual.file_hash(vgg_file)[:8])
    vgg, about = open_vgg(vgg_file)
    assert about == f"VGG-19, sha256 {perceptual.file_hash(vgg_file)}"
    assert not any(p.requires_grad for p in vgg.parameters())
    state, (image, _), outputs = torch.load(vgg_file), two_pictures(), {}
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (image / 2 + 0.5 - mean) / std
    for k in range(25):
        if k in PLACES:
            x = F.conv2d(x, state[f"features.{k}.weight"], state[f"features.{k}.bias"], padding=1)
        else:
            x = F.max_pool2d(x, 2) if k in (4, 9, 18) else F.relu(x)
        outputs[k] = x
    for k, ours in zip(LAYERS, vgg(image), strict=True):
        assert torch.allclose(ours, outputs[k], rtol=1e-4, atol=1e-4), k
    theirs = pytest.importorskip("torchvision").models.vgg19().features[:25]
    assert [str(layer) for layer in theirs] == [str(layer).replace("()", "(inplace=True)") for layer in vgg.features]


def test_distance_is_0_for_the_same_picture_and_its_gradient_goes_to_the_first_alone():
    vgg, about = open_vgg("random")
    assert about == STAND_IN and "not quality" in about
    image, real = two_pictures()
    image.requires_grad_(), real.requires_grad_()
    distance = vgg.distance(image, real)
    assert distance.shape == (2,) and (distance > 0.01).all() and vgg.distance(real, real).max() == 0
    distance.sum().backward()
    assert image.grad.abs().sum() > 0 and real.grad is None
    assert torch.allclose(vgg.distance(image[:1], real[:1]), distance[:1], rtol=1e-4)          # image by image
    closer = vgg.distance(torch.lerp(image, real, 0.5), real)
    assert (closer < distance).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert vgg.distance(image, real).dtype == torch.float32 and torch.allclose(vgg.distance(image, real), distance)
    black = torch.full((1, 3, 16, 16), -1.0, requires_grad=True)                   # features may be all zeros
    vgg.distance(black, torch.ones(1, 3, 16, 16)).sum().backward()
    assert torch.isfinite(black.grad).all()


def test_the_stand_in_is_the_same_each_time_and_moves_no_generator():
    before = torch.get_rng_state()
    (one, _), (two, _) = open_vgg("random"), open_vgg("random")
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert set(one.state_dict()) == {f"features.{k}.{part}" for k in PLACES[:11] for part in ("weight", "bias")}


@pytest.mark.parametrize("file, words", [("", "no weights of VGG-19, and nothing is downloaded"),
                                         ("nowhere.pth", "no weights of VGG-19 at 'nowhere.pth'"),
                                         (None, ", not dcbb9e9d...: put torchvision's vgg19-dcbb9e9d.pth (548 MB)")])
def test_a_file_that_is_not_vgg_is_refused(file, words, vgg_file, capsys):
    with pytest.raises(UserError):
        open_vgg(vgg_file if file is None else file)
    assert words in capsys.readouterr().err


def test_the_discriminator_sees_patches_each_picture_by_itself_and_has_no_buffers():
    torch.manual_seed(0)
    net, (image, other) = Discriminator(8), two_pictures(side=64)
    values = net(image)
    assert values.shape == (2, 1, 8, 8) and not list(net.buffers())
    assert torch.allclose(net(torch.cat([image, other]))[:2], values, atol=1e-6)
    assert net(torch.zeros(0, 3, 8, 8)).shape == (0, 1, 1, 1)                      # none of a batch may be seen
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(image), values)
    plain = torch.nn.Sequential(*[layer for layer in net.layers if not isinstance(layer, torch.nn.GroupNorm)])
    image.requires_grad_()                                     # what a value sees, but for its picture's statistics
    plain(image)[0, 0, 4, 4].backward()
    assert image.grad[0].abs().sum(0).any(0).sum() == 38 and not image.grad[1].any()


def test_a_discriminator_learns_to_tell_real_from_made_by_its_hinge_loss():
    torch.manual_seed(0)
    net = Discriminator(8)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    real, fake = (0.1 * image for image in two_pictures(8, 16))
    real = real + torch.linspace(-1, 1, 16)
    for _ in range(60):
        of_real, of_fake = net(torch.cat([real, fake])).chunk(2)
        loss = hinge(of_real, of_fake)
        optimizer.zero_grad(), loss.mean().backward(), optimizer.step()
    assert loss.shape == (8,) and loss.mean() < 0.1
    assert hinge(torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), -2.0)) == 0
    assert hinge(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)) == 1            # undecided


def test_the_penalty_is_half_the_squared_slope_of_each_pictures_value():
    weight = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    image = torch.rand(2, 3, 4, 4, requires_grad=True)
    values = (image * weight).sum((1, 2, 3)).view(2, 1, 1, 1) ** 2                 # slope 2 (x . w) w
    penalty = slope_penalty(values, image)
    wanted = 2 * values.flatten() * weight.square().sum()
    assert torch.allclose(penalty, wanted, rtol=1e-4)
    penalty.sum().backward()                                   # a second derivative
    assert weight.grad.abs().sum() > 0
