r"""
PixArt-Sigma's published weights in our own core and patch shell, so that our kernels, the KV merge, shards and plans
serve them, and the poster's kv rows can start from the published model.

    python -m experiments.pixart FOLDER --to own       FOLDER is a pipeline as diffusers saves it (GUIDE.md)
    python sample.py own "a caption"
    python train.py --config pixart-sigma-1k-kv --stage defrost --core own --data PATH

The network is the same one, told in our words: before anything is written, both see the same noise of 4 x 6 tokens at
ten levels, with captions and without, and the largest difference of their v is printed; over 1 % of its standard
deviation nothing is written. Encoders and autoencoder stay in FOLDER; captions of PATH are embedded by them before
(GUIDE.md). Two things are ours from then on: between the ends of DDPM's linear betas levels of noise lie as those of
our cosine, and the null caption, at first the encoder's of "", is learned.
"""
import os

import torch
import torch.nn.functional as F

from lib.draws import normals
from lib.files import read_json
from lib.pipeline_encoder import encoder_dtype, null_caption, open_pipeline
from lib.published import Published, check_new, export, fill, noise_levels, read_published
from lib.settings import Parser, UserError
from lib.timesteps import ddpm_timestep
from model import build, token_grid

SAME = 0.01                                                    # of v: rounding, which 1 / alpha enlarges, stays below
POSITIONS = 32                                                 # those of any number of tokens run from 0 to this
# their names of weights and ours, without a block's number; several of ours in one are laid one below the other
NAMES = {
    "pos_embed.proj": "shell.conv_in", "scale_shift_table": "shell.scale_shift_table", "proj_out": "shell.proj_out",
    "adaln_single.emb.timestep_embedder.linear_1": "core.time.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "core.time.mlp.2", "adaln_single.linear": "core.modulation",
    "caption_projection.linear_1": "core.text.projections.0.0",
    "caption_projection.linear_2": "core.text.projections.0.2"}
BLOCK = {
    "scale_shift_table": "scale_shift_table", "ff.net.0.proj": "mlp.0", "ff.net.2": "mlp.2",
    "attn1.to_q attn1.to_k attn1.to_v": "self_attention.qkv", "attn1.to_out.0": "self_attention.out",
    "attn2.to_q": "cross_attention.query", "attn2.to_k attn2.to_v": "cross_attention.key_value",
    "attn2.to_out.0": "cross_attention.out"}


def own_config(config):
    """The config of the same network as a core in a patch shell. UserError for a pipeline that is none such."""
    folder = config["pipeline"]
    if not os.path.exists(os.path.join(folder, "transformer", "config.json")):
        raise UserError(f"{folder!r} is no PixArt-Sigma: only that has a core of ours")
    about = read_json(folder, "transformer", "config.json")
    scale = about.get("interpolation_scale") or max(about["sample_size"] // 64, 1)
    units = about["sample_size"] / about["patch_size"] / scale
    levels, predicts_v = noise_levels(folder)
    if predicts_v or len(levels) != 1000 or abs(float(ddpm_timestep(levels[500:501])) - 500) > 1e-3:
        raise UserError(f"the scheduler of {folder!r} is not PixArt-Sigma's: take one of 1000 linear betas from 0.0001 "
                        "to 0.02, whose network predicts epsilon")
    told = about.get("use_additional_conditions")              # None is diffusers' own rule
    if told or told is None and about["sample_size"] == 128 or units != POSITIONS:
        raise UserError(f"the transformer of {folder!r} is told sizes, or its positions run over {units:g} units a "
                        "side (sample_size / patch_size / interpolation_scale): take a PixArt-Sigma, which is told "
                        f"none, and whose positions run over {POSITIONS}, however many tokens there are")
    heads = about["num_attention_heads"]
    return config | {"pipeline": "", "shell": "patch", "patch": about["patch_size"], "heads": heads, "mlp_ratio": 4,
                     "width": heads * about["attention_head_dim"], "depth": about["num_layers"], "prediction": "eps",
                     "pixart_core": True}


def own_weights(theirs, config):
    """Weights by our names, from theirs by their names."""
    theirs = {name.removeprefix("core."): value for name, value in theirs.items()}
    names = NAMES | {" ".join(f"transformer_blocks.{k}.{part}" for part in old.split()): f"core.blocks.{k}.{new}"
                     for k in range(config["depth"]) for old, new in BLOCK.items()}
    patch, channels, ours = config["patch"], config["latent_channels"], {}
    for old, new in names.items():
        for kind in ("", ".weight", ".bias"):                  # a table is a parameter itself
            if (parts := [theirs[part + kind] for part in old.split() if part + kind in theirs]):
                ours[new + kind] = torch.cat(parts).float()
    ours["shell.conv_in.weight"] = ours["shell.conv_in.weight"].flatten(1)                   # (D, C p^2)
    time = ours["core.time.mlp.0.weight"]                      # (D, 256): cosines first there, sines here
    ours["core.time.mlp.0.weight"] = torch.cat(time.chunk(2, 1)[::-1], 1)
    for name in ("shell.proj_out.weight", "shell.proj_out.bias"):                  # rows (p, p, 2 C), here (C, p, p)
        rows = ours[name].unflatten(0, (patch, patch, -1))[:, :, :channels]        # without the learned variance
        ours[name] = rows.movedim(2, 0).flatten(0, 2).contiguous()
    empty = null_caption(config["text_length"], config)[0].float()                 # (E,): "" has one token, its end
    (w1, b1), (w2, b2) = ([ours[f"core.text.projections.0.{k}.{kind}"] for kind in ("weight", "bias")] for k in (0, 2))
    ours["core.text.null"] = F.linear(F.gelu(F.linear(empty, w1, b1), approximate="tanh"), w2, b2)     # (D,)
    return ours


@torch.no_grad()
def largest_difference(theirs, ours, config):
    """Of their v, over its standard deviation: ten levels of noise of 4 x 6 tokens, random captions and none."""
    side, text_shape = 2 * config["patch"], (config["text_length"], config["encoder_width"][0])
    worst = 0.0
    for k, logsnr in enumerate(torch.linspace(config["logsnr_min"], config["logsnr_max"], 10)):
        z = normals([("z", k, image) for image in range(2)], (config["latent_channels"], 2 * side, 3 * side), "cpu")
        text = 0.1 * normals([("text", k, image) for image in range(2)], text_shape, "cpu")  # about T5's own size
        text[0] *= (torch.arange(text_shape[0]) <= 7 * k)[:, None]                 # so many tokens, then padding
        text[1] = 0                                                                # the null caption
        v, other = theirs(z, logsnr.expand(2), text), ours(z, logsnr.expand(2), text)
        worst = max(worst, float((v - other).abs().max() / v.std()))
    return worst


def main():
    parser = Parser(__doc__, keys=())
    parser.add_argument("folder", help="a pipeline of PixArt-Sigma, as diffusers saves it")
    parser.add_argument("--to", required=True, help="a new folder for our export")
    args = parser.parse_args()
    check_new(args.to)                                         # not after minutes
    state = read_published(args.folder)
    if state is None or not state["config"]["pipeline"]:
        raise UserError(f"{args.folder!r} is no pipeline: name a whole folder, that with model_index.json")
    config = own_config(state["config"])
    theirs, ours = Published(state["config"]), build(config)
    fill(theirs, state["model"], args.folder)                  # whole, and with nothing beside
    weights = own_weights(state["model"], config)
    encoder = open_pipeline(config["text_length"], config["encoder_weights"], encoder_dtype(config))
    config["encoder_id"] = encoder.id                          # captions of others are refused from now on
    fill(ours, weights, args.folder)
    worst = largest_difference(theirs.eval(), ours.eval(), config)
    grid = token_grid(config)
    print(f"{config['depth']} blocks of width {config['width']}, grid {grid} x {grid}: v of both networks differs by "
          f"{worst:.1e} of its standard deviation at most")
    if not worst < SAME:                                       # also where it is not finite
        raise UserError(f"the network of {args.folder!r} is not quite ours: take a PixArt-Sigma whose "
                        "transformer/config.json is as it was published")
    parents = [f"{args.folder} (published, step 0)"]
    print(export(state | {"config": config, "model": weights, "parents": parents}, args.to))


if __name__ == "__main__":
    main()
