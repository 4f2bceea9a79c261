"""
Two networks that look at pictures: VGG-19, by whose features two pictures are compared, and a discriminator, which
tells real patches from made ones. Pictures are (B, 3, H, W) in [-1, 1], of 8 px at least; both compute in float32,
whatever is around them.

    vgg, about = open_vgg("weights/vgg19-dcbb9e9d.pth")        # about: whose weights these are
    vgg.distance(image, real)                                  # (B,)
    Discriminator(64)(image)                                   # (B, 1, H / 8, W / 8), above 0 what it takes for real

VGG's weights are those of torchvision, in a local file whose sha256 is checked. The name "random" stands for random
weights of the same shapes, which show gradients and cost and are no measure of anything: `about` says so, in words that
cannot be taken for a hash.

B pictures of height H and width W; c channels of features and h w their size.
"""
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.files import file_hash
from lib.networks import IMAGENET
from lib.settings import UserError

VGG_FILE, VGG_SHA256 = "vgg19-dcbb9e9d.pth", "dcbb9e9d"        # torchvision puts the first digits of the hash there
LAYERS = 3, 8, 15, 24                                          # relu1_2, relu2_2, relu3_3 and relu4_3, in `features`
STAND_IN = "random weights in place of VGG-19: gradients and cost, not quality"


# ---- VGG-19 ----------------------------------------------------------------------------------------------------------

class VGG19(nn.Module):
    """VGG-19 (Simonyan and Zisserman 2015) up to relu4_3, 8.2M parameters, with torchvision's names."""

    def __init__(self):
        super().__init__()
        layers, before = [], 3
        for width, convolutions in ((64, 2), (128, 2), (256, 4), (512, 3)):        # the last has a fourth, of relu4_4
            for _ in range(convolutions):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, image):
        mean, std = image.new_tensor(IMAGENET)[..., None, None]                    # (3, 1, 1) each
        x, found = ((image + 1) / 2 - mean) / std, []
        for k, layer in enumerate(self.features):
            x = layer(x)                                       # (B, c, h, w)
            if k in LAYERS:
                found.append(x)
        return found

    def distance(self, image, real):
        """
        (B,): squared differences of features of length one along their channels, a mean over places and the four
        layers. That is LPIPS (Zhang et al. 2018, eq. 1) without its learned weights. Gradients go to `image` alone.
        """
        with torch.autocast(image.device.type, enabled=False):
            made = self(image.float())
            with torch.no_grad():
                wanted = self(real.float())
            return sum((unit(a) - unit(b)).square().sum(1).mean((1, 2)) for a, b in zip(made, wanted)) / len(LAYERS)


def unit(features):
    """(B, c, h, w), each place of length one along its channels; zeros stay zeros, and have a finite gradient."""
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-8)


def open_vgg(path, device="cpu"):
    """(VGG19, whose weights it has), frozen. UserError where `path` holds no VGG-19, or another one."""
    with torch.device("meta"):                                 # shapes alone: no first weights are drawn
        net = VGG19()
    if path == "random":
        generator, about = torch.Generator().manual_seed(0), STAND_IN
        weights = {name: torch.randn(p.shape, generator=generator) * (2 / p[0].numel()) ** 0.5 if p.ndim > 1
                   else torch.zeros(p.shape) for name, p in net.named_parameters()}        # He et al. 2015
    else:
        about = f"VGG-19, sha256 {check_vgg(path)}"
        read = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: read[name] for name in net.state_dict()}
    net.load_state_dict(weights, assign=True)
    return net.requires_grad_(False).to(device), about


def check_vgg(path):
    """sha256 of torchvision's file. UserError where it is missing, or another one: other weights want other inputs."""
    put = f"put torchvision's {VGG_FILE} (548 MB) there and name it by --vgg, or give --perceptual 0"
    if not os.path.isfile(path):
        at = f" at {path!r}" if path else ""
        raise UserError(f"perceptual: no weights of VGG-19{at}, and nothing is downloaded: {put}")
    digest = file_hash(path)
    if not digest.startswith(VGG_SHA256):
        raise UserError(f"perceptual: {path!r} has sha256 {digest[:8]}..., not {VGG_SHA256}...: {put}")
    return digest


# ---- discriminator ---------------------------------------------------------------------------------------------------

class Discriminator(nn.Module):
    """
    Is a patch real? (Isola et al. 2017, Sec. 3.2.2; three strided convolutions as in VQGAN's.) Each value sees 38 x 38
    px. GroupNorm in place of BatchNorm: pictures of a batch do not meet, and there are no buffers that a forward moves.
    """

    def __init__(self, width):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c in (2 * width, 4 * width):
            layers += [nn.Conv2d(c // 2, c, 4, 2, 1), nn.GroupNorm(math.gcd(8, c), c), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 3, 1, 1))
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)                   # as in Isola et al. 2017, Sec. 6.2

    def forward(self, image):
        with torch.autocast(image.device.type, enabled=False):
            return self.layers(image.float())                                      # (B, 1, H / 8, W / 8)


def hinge(real, fake):
    """(B,): what a discriminator pays for values (B, 1, h, w) of real pictures and of made ones (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean((1, 2, 3))


def slope_penalty(values, image):
    """(B,): half the squared gradient of each picture's mean value, for R1 (Mescheder et al. 2018, eq. 9)."""
    (slope,) = torch.autograd.grad(values.mean((1, 2, 3)).sum(), image, create_graph=True)     # (B, 3, H, W)
    return 0.5 * slope.square().sum((1, 2, 3))
