"""
What a network learns beyond the plain loss (model.py: diffusion_loss). Each objective gives a loss per image, (B,).

    consistency    a student sees at once where its teacher would arrive in many steps          (Heek et al. 2024)
    lcm            the same with one segment from noise to image                                (Luo et al. 2023)
    dmd            a student's images are moved to where real ones would be                     (Yin et al. 2024)
    critics        VGG-19 and a discriminator say in pixels what the model's images lack       (Esser et al. 2021)
    cascade        the plain loss of a model that has a small picture beside z                 (Ho et al. 2022)

Networks are (z, logsnr, text, conditions) -> v; the teacher, which a student starts as, is the same -> x, with guidance
inside. `distill_turns` and `critic_turns` put them together: a step of training is a list of turns (train.py: Turn).

Letters: B images, C channels, H W pixels or latents.
"""
import math
import os

import torch
import torch.nn.functional as F

from lib.checkpoint import checkpoint_hash
from lib.conditions import augmented, beside, check_levels, untold
from lib.lineage import check_finished
from lib.perceptual import Discriminator, hinge, slope_penalty
from lib.settings import UserError
from model import WEIGHTINGS, alpha_sigma, build, diffusion_loss, get_logsnr, load, read_checkpoint
from sample import STUDENTS, check_student, end_of_guidance, guided, is_student

# ----------------------------------------------------------------------------------------------------------------------
# Students of few steps


def predict_x(net, z, logsnr, text, conditions):
    """x = alpha z - sigma v, (B, C, H, W), float32; logsnr (B,)."""
    alpha, sigma = alpha_sigma(logsnr)                                             # (B, 1, 1, 1)
    return alpha * z - sigma * net(z, logsnr, text, conditions).float()


def consistency_loss(net, target, teacher, x, text, t, eps, conditions, config, step=0):
    """
    Multistep consistency distillation (Heek et al. 2024, Algorithm 1). [0, 1] is cut into sample_steps segments; from
    anywhere in one, the student learns to see the image with which one step of DDIM lands at its clean end. The teacher
    takes one of its teacher_steps, then the student itself (`target`, without gradient) sees further. LCM (Luo et al.
    2023) is the same with one segment that ends where no noise is left, and an average of the student as its target.
    """
    segments = config["sample_steps"] if config["objective"] == "consistency" else 1
    rise = (config["teacher_steps_end"] or config["teacher_steps"]) / config["teacher_steps"]
    inside = max(1, round(config["teacher_steps"] * rise ** (step / config["steps"]) / segments))    # in a segment
    place = (t * inside * segments).floor().clamp(max=inside * segments - 1)       # (B,), of the teacher's step
    logsnr, logsnr_next, logsnr_end = (get_logsnr(k / (inside * segments), config)
                                       for k in (place + 1, place, place // inside * inside))      # (B,) each
    (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(logsnr), alpha_sigma(logsnr_next)       # (B, 1, 1, 1) each
    snr_root, end_root = (torch.exp(level / 2)[:, None, None, None] for level in (logsnr, logsnr_end))     # alpha/sigma
    z = alpha * x + sigma * eps                                                    # (B, C, H, W)
    with torch.no_grad():
        x_teacher = teacher(z, logsnr, text, conditions)
        eps_teacher = (z - alpha * x_teacher) / sigma
        # share of the way to the segment's end that this step makes: 1 in the segment's last; with lcm else near 0
        share = torch.expm1((logsnr_next - logsnr) / 2) / torch.expm1((logsnr_end - logsnr) / 2)
        spread = sigma_next
        if config["objective"] == "consistency":               # aDDIM (ibid., Algorithm 3): few steps of DDIM blur
            c = alpha_next - alpha * sigma_next / sigma
            variance = config["addim"] / (2 + snr_root ** 2)   # of x given z, as they found it
            spread = (sigma_next ** 2 + c ** 2 * variance / eps_teacher.square().mean((1, 2, 3), True)).sqrt()
        z_next = alpha_next * x_teacher + spread * eps_teacher
        x_next = predict_x(target, z_next, logsnr_next, text, conditions)
        x_end = torch.lerp(x_next, x_teacher, share[:, None, None, None])          # DDIM to the end and inverse DDIM
        x_end = x_end + (spread - sigma_next) / sigma_next / (end_root - snr_root) * eps_teacher
    error = (predict_x(net, z, logsnr, text, conditions) - x_end).square().mean((1, 2, 3))   # e_x^2 = sigma^2 e_v^2
    weighting = WEIGHTINGS["x" if config["objective"] == "lcm" else config["weighting"]]
    return weighting(logsnr) / torch.sigmoid(-logsnr) * error


def dmd_loss(net, fake, teacher, text, t, noises, conditions, config):
    """
    Distribution matching (Yin et al. 2024, eq. 7-8): the student makes an image of pure noise in one step; at a random
    level the teacher sees what real images would be there, and `fake`, a network trained on the student's images, what
    the student's would be, both as x. Their difference says where the image should move. noises (B, 2, C, H, W).
    """
    start, eps = noises.unbind(1)
    x = predict_x(net, start, get_logsnr(torch.full_like(t, config["start_time"]), config), text, conditions)
    logsnr = get_logsnr(0.02 + 0.96 * t, config)                                   # (B,), but for both ends, as DMD
    alpha, sigma = alpha_sigma(logsnr)
    with torch.no_grad():
        z = alpha * x + sigma * eps
        real = teacher(z, logsnr, text, conditions)
        pull = (fake(z, logsnr, text, conditions) - real) / (x - real).abs().mean((1, 2, 3), True).clamp(min=1e-6)
    return 0.5 * (x - (x - pull).detach()).square().mean((1, 2, 3))                # its gradient at x is along `pull`


def fake_loss(fake, student, text, t, noises, conditions, config):
    """Plain diffusion on images that the student makes (Yin et al. 2024, eq. 6). noises (B, 2, C, H, W)."""
    start, eps = noises.unbind(1)
    with torch.no_grad():
        x = predict_x(student, start, get_logsnr(torch.full_like(t, config["start_time"]), config), text, conditions)
    return diffusion_loss(fake, x, text, t, eps, config, conditions)


def distill_turns(own, path, config, device, in_half, second_turn):
    """
    The turns of --stage distill: `own`, the student's, with its loss; and for dmd that of a network for its own images.
    path is the teacher's; in_half(net) has its products in half precision; second_turn(name, model) makes a turn.
    """
    # passes without gradient go through bare models: DDP would make ready for an exchange that never comes
    teacher_model, teacher_config = load(path, device)
    limit = math.inf if config["autoencoder"] else 1.0

    def denoiser(model, guidance):                             # (z, logsnr, text, conditions) -> x
        def predict(z, logsnr, text, conditions):
            return guided(in_half(model), text, guidance, conditions, limit, untold(config, conditions),
                          end_of_guidance(config))(z, logsnr)
        return predict
    teacher = denoiser(teacher_model, config["guidance"])

    def averaged(z, *batch):                                   # the student with its EMA weights
        return torch.func.functional_call(own.model, own.ema_params, (z, *batch))

    def of_consistency(net, step, x, text, t, eps, conditions):
        target = in_half(averaged if config["objective"] == "lcm" else own.model)
        return consistency_loss(net, target, teacher, x, text, t, eps, conditions, config, step)
    if config["objective"] == "lcm" and config["fsdp"]:
        raise UserError("objective = lcm with fsdp is not supported, for its target is an average: take another one")
    if config["objective"] != "dmd":
        return [own._replace(loss=of_consistency)]
    fake = build(teacher_config)
    fake.load_state_dict(teacher_model.state_dict())           # starts as the teacher

    def of_student(net, step, x, text, t, noises, conditions):
        return dmd_loss(net, denoiser(fake, 1), teacher, text, t, noises, conditions, config)

    def of_fake(net, step, x, text, t, noises, conditions):
        return fake_loss(net, in_half(own.model), text, t, noises, conditions, config)
    return [own._replace(every=config["fake_updates"], noises=2, loss=of_student),
            second_turn("fake", fake)._replace(noises=2, loss=of_fake)]


# ----------------------------------------------------------------------------------------------------------------------
# Critics: networks that look at pixels. Each says in which direction an image should move, and the model's loss gets
# that direction as a gradient, so that nothing reaches the critics' weights.


def along(x_hat, field):
    """
    (n,): zeros, whose gradient at x_hat (n, C, H, W) is the field, of that shape. What is logged stays the plain loss.
    """
    product = (x_hat * field).flatten(1).sum(1)
    return product - product.detach()


def gradient(term, at):
    """Of each image's term, (n,), at these images, (n, C, H, W). Unlike a backward it leaves all weights alone."""
    return torch.autograd.grad(term.sum(), at, retain_graph=True)[0]


def critic_field(at, image, real, slope, vgg, discriminator, config):
    """
    Where critics would move images `at` (n, C, H, W), (n, 3, H, W) as pixels: `perceptual` times the gradient of VGG's
    distance to the real ones; and that of the discriminator's opinion, scaled to `adversarial` times the length of all
    other gradients there, of which `slope` is the plain loss's. VQGAN does so at its decoder's last layer (Esser et al.
    2021, eq. 7); image by image at x it does not depend on how a batch is spread. A critic that is None has no say.
    """
    field = torch.zeros_like(at)
    if vgg:
        field = config["perceptual"] * gradient(vgg.distance(image, real), at)
    if discriminator:
        doubt = gradient(-discriminator(image).mean((1, 2, 3)), at)                # against it an image looks more real
        length, own = (g.flatten(1).norm(dim=1)[:, None, None, None] for g in (slope + field, doubt))
        field = field + config["adversarial"] * length / (own + 1e-6) * doubt
    return field


def discriminator_loss(net, real, fake, r1):
    """(n,): hinge loss of pictures (n, 3, H, W), and r1 times that of its slope at real ones. One pass for both."""
    real = real.detach().requires_grad_(r1 > 0)
    of_real, of_fake = net(torch.cat([real, fake])).chunk(2)                       # (n, 1, H / 8, W / 8) each
    loss = hinge(of_real, of_fake)
    return loss + r1 * slope_penalty(of_real, real) if r1 else loss


def critic_turns(own, vgg, autoencoder, config, second_turn):
    """
    The turns of a stage with `perceptual` or `adversarial`: `own`, the model's, whose loss, whatever it is, gets the
    field of the critics; and the discriminator's, which learns from the first step on. Images seen through more noise
    than critic_logsnr are left alone: they are means of many, which should be soft. vgg is None without `perceptual`;
    second_turn(name, model, lr) makes a turn.
    """
    if config["adversarial"] and config["fsdp"]:
        raise UserError("adversarial with fsdp is not supported, for the exchanges of two networks would mix: leave "
                        "one out")
    discriminator = Discriminator(config["discriminator_width"]) if config["adversarial"] else None
    seen = {}                                                  # what the model saw in this step, by micro-batch: of one
                                                               # x they are slices, which their offset tells apart

    def of_model(net, step, x, *batch):
        calls = []

        def watched(z, logsnr, *rest):
            calls.append((z, logsnr, net(z, logsnr, *rest).float()))
            return calls[-1][-1]
        loss = own.loss(watched, step, x, *batch)                                  # (b,)
        if not torch.is_grad_enabled():                        # a fault is being looked for
            return loss
        (z, logsnr, v), = calls
        (alpha, sigma), near = alpha_sigma(logsnr), logsnr > config["critic_logsnr"]       # (b, 1, 1, 1) each, (b,)
        if not near.any():
            seen[x.storage_offset()] = near, *x.new_zeros(2, 0, 3, 8, 8)
            return loss
        x_hat = (alpha * z[:, :v.shape[1]] - sigma * v)[near]                      # (n, C, H, W)
        at = x_hat.detach().requires_grad_()
        image = autoencoder.pixels(at)                                             # (n, 3, H, W)
        with torch.no_grad():                                  # through the decoder as well, which leaves its traces
            real = autoencoder.pixels(x[near])
        seen[x.storage_offset()] = near, real, image.detach()
        heard = discriminator if step >= config["adversarial_start"] else None
        if not vgg and not heard:
            return loss
        slope = (-gradient(loss, v) / sigma)[near] if heard else 0.0               # at x_hat: v = (alpha z - x) / sigma
        field = critic_field(at, image, real, slope, vgg, heard, config)
        return loss.index_add(0, near.nonzero()[:, 0], along(x_hat, field))

    def of_discriminator(net, step, x, *batch):
        near, real, fake = seen[x.storage_offset()]
        r1 = 16 * config["r1"] * (step % 16 == 0 and torch.is_grad_enabled())      # lazily (Karras et al. 2020)
        return x.new_zeros(len(near)).index_add(0, near.nonzero()[:, 0], discriminator_loss(net, real, fake, r1))
    turns = [own._replace(loss=of_model)]
    if discriminator:                                          # its turn draws no noise of its own
        turn = second_turn("discriminator", discriminator, lr=config["discriminator_lr"])
        turns.append(turn._replace(noises=0, loss=of_discriminator))
    return turns


def check_objective(config, stage, teacher, flags):
    """
    (is it a student that learns, do critics take part), after the sampler of a student is filled in. UserError where
    keys, flags {key: text} and the stage cannot go together.
    """
    distills, critics = stage == "distill", config["perceptual"] > 0 or config["adversarial"] > 0
    if distills != is_student(config) or teacher and not distills:
        raise UserError(f"--stage {stage}, objective = {config['objective']}: distill takes --objective consistency, "
                        "lcm or dmd, and --teacher RUN; all other stages take diffusion")
    if distills:
        check_student(config, sampler=flags.get("sampler"))
        if config["sampler"] not in (samplers := STUDENTS[config["objective"]][0]):
            config["sampler"] = samplers[0]
    if critics and distills:
        raise UserError("a student takes neither perceptual nor adversarial terms: give --perceptual 0 --adversarial 0")
    return distills, critics


# ----------------------------------------------------------------------------------------------------------------------
# Cascades (--stage cascade): super-resolution, told how much noise lies on the picture that it starts from


def cascade_loss(net, x, text, t, noises, config, conditions):
    """
    The plain loss, (B,), of a model that has beside z the picture itself, as small as its base's and noised to a level
    that is uniform up to `augmentation`. noises (B, 2, C, H, W): of the second the first corner is the small picture's
    noise, and the last number, which lies outside, becomes the level; so neither depends on t or on the first.
    """
    eps, spare = noises.unbind(1)
    low = F.avg_pool2d(x, config["resolution"] // config["low_resolution"])        # (B, C, h, w)
    level = config["augmentation"] * torch.special.ndtr(spare[:, -1, -1, -1])      # (B,): N(0, 1) made uniform
    low = augmented(low, spare[:, :, :low.shape[2], :low.shape[3]], level, x.shape[2:])      # (B, C, H, W)
    return diffusion_loss(beside(net, low, level), x, text, t, eps, config, conditions)


def check_cascade(config, stage):
    """Is this a cascade? UserError where its keys and the stage cannot go together."""
    c, small = config, config["low_resolution"]
    if (small > 0) != (stage == "cascade"):
        raise UserError(f"--stage {stage}, low_resolution = {small}: give the side of the base's pictures, as in "
                        "--low_resolution 32, to --stage cascade alone")
    if not small:
        return False
    if c["resolution"] % small or c["resolution"] == small:
        raise UserError(f"low_resolution = {small} does not divide resolution = {c['resolution']}, or is as large: "
                        f"take {c['resolution'] // 2}")
    if c["autoencoder"] or c["shell"] == "nested":
        raise UserError(f"autoencoder = {c['autoencoder']!r}, shell = {c['shell']}: a cascade works in pixels, from "
                        "random weights: give --autoencoder '' and --shell shallow, unet or patch")
    check_levels(c)
    return True


def check_base(config):
    """The sha256 of a cascade's base. UserError unless that is a finished run of pixels and of low_resolution."""
    path, other = config["base"], "name another one, --base RUN"
    if not os.path.exists(path):
        raise UserError(f"no run in {path}: bring it back, or {other}")
    state = read_checkpoint(path)
    its = state["config"]
    check_finished(path, state, other)
    if its["autoencoder"]:
        raise UserError(f"{path} works in latents, and a cascade in pixels: {other}")
    if its["resolution"] != config["low_resolution"]:
        raise UserError(f"{path} draws {its['resolution']} px, and low_resolution = {config['low_resolution']}: give "
                        f"--low_resolution {its['resolution']}, or {other}")
    return checkpoint_hash(path)
