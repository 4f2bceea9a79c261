"""
Published models, and ours in the form in which models are published: folders of safetensors and JSON.

    PixArt-Sigma, SDXL    a pipeline's folder as diffusers' save_pretrained leaves it. Its own network predicts v of
                          (z, logsnr, text, conditions), its own encoders read captions, and samplers need not know
    an export             the EMA weights of a run and config.json, which says what they are

Letters: B images, c h w channels and sides of latents, L tokens of a caption at most, E width of an embedding.
"""
import json
import os

import torch
import torch.nn as nn

from lib.checkpoint import FORMAT, find_checkpoint
from lib.conditions import SIZES
from lib.files import atomic_write, import_extra, part_name, read_json, read_weights, weight_files
from lib.pipeline_encoder import PIPELINES, PipelineEncoder, null_caption, open_pipeline, pipeline_index
from lib.runs import newest_about
from lib.settings import UserError, default_config
from lib.timesteps import logsnr_table, timestep_of

# what a pipeline decides: a training that starts from one has these settings of it
DECIDED = ("pipeline", "shell", "encoder", "encoder_width", "text_length", "text_vocab", "autoencoder",
           "latent_channels", "latent_stride", "latent_scale", "conditions", "resolution", "noise_base_resolution",
           "grid", "logsnr_max", "logsnr_min")
OURS = ("prediction", "inner_resolution", "width", "depth", "heads", "mlp_ratio", "channels", "residual_blocks",
        "entry_channels", "patch", "image_skip", "pixart_core")        # of our own networks: here at their defaults
USUAL = "weighting", "encoder_weights", "guidance_end"         # and these, where no flag says otherwise,
ADVISED = "guidance", "sampler", "sample_steps"                # and these, where they stand at their defaults
PARTS = "encoder", "encoder_weights", "autoencoder"            # what our own core takes of it (experiments/pixart.py)
WITHIN = "pipeline"                                            # in an export: where its pipeline may lie, or a link


# ---------------------------------------------------------------------------------------------------------------
# The network


def noise_levels(folder):
    """(logsnr (T,) of its scheduler's timesteps, float64, from clean to noisy; whether its network predicts v)."""
    about = read_json(folder, "scheduler", "scheduler_config.json")
    schedule, prediction = about.get("beta_schedule"), about.get("prediction_type", "epsilon")
    power = {"linear": 1, "scaled_linear": 2}.get(schedule)
    if not power or about.get("trained_betas") is not None or about.get("rescale_betas_zero_snr") \
            or prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"the scheduler of {folder!r} has beta_schedule {schedule} and predicts {prediction}: take a "
                        "model of linear or scaled_linear betas, not rescaled, that predicts epsilon or v_prediction")
    table = logsnr_table(about["beta_start"], about["beta_end"], about["num_train_timesteps"], power)
    return table, prediction == "v_prediction"


class Published(nn.Module):
    """
    The network of config["pipeline"]: z (B, c, h, w), logsnr (B,), text (B, L, E), conditions (B, 6), those of
    size_and_crop, or None -> v (B, c, h, w). Zeros in place of a caption are the null caption here as everywhere; the
    network gets its own.
    """

    def __init__(self, config):
        super().__init__()
        self.config, folder = config, config["pipeline"]
        if not os.path.isdir(folder):
            raise UserError(f"its pipeline, {folder}, is not there: bring it back, or put it, or a link to it, into an "
                            f"export of this run (sample.py --export) as {WITHIN!r}")
        part, kind, _, _ = PIPELINES[pipeline_index(folder)["_class_name"]]
        network = getattr(import_extra("diffusers", "a published pipeline"), kind)
        self.core, self.shell = network.from_config(read_json(folder, part, "config.json")), nn.Identity()
        self.logsnrs, self.predicts_v = noise_levels(folder)   # no buffer: it stays in float64
        self.null = None                                       # its null caption, (L, E), where one is needed

    def forward(self, z, logsnr, text, conditions=None):
        dtype, text = self.core.dtype, self.with_null(text)
        t = timestep_of(logsnr, self.logsnrs.to(logsnr.device))
        if self.config["conditions"]:                          # SDXL
            stride = self.config["latent_stride"]
            h, w = stride * z.shape[2], stride * z.shape[3]    # pixels
            size = torch.tensor([[h, w, 0, 0, h, w]] * len(z), device=z.device) if conditions is None else conditions
            about = self.core.config                           # the pooled text's width, and six of an embedded size
            pooled = about.projection_class_embeddings_input_dim - 6 * about.addition_time_embed_dim
            added = {"text_embeds": text[:, -1, :pooled].to(dtype), "time_ids": size}
            out = self.core(z.to(dtype), t, text[:, :-1].to(dtype), added_cond_kwargs=added).sample
        else:
            added = {"resolution": None, "aspect_ratio": None}
            out = self.core(z.to(dtype), text.to(dtype), t, added, encoder_attention_mask=text.any(-1)).sample
            out = out[:, :z.shape[1]]                          # behind it the learned variance, which no sampler takes
        if self.predicts_v:
            return out
        level = logsnr.view(-1, 1, 1, 1)
        return (out.float() - torch.sigmoid(-level).sqrt() * z) / torch.sigmoid(level).sqrt()      # from eps

    def with_null(self, text):
        """The text with the pipeline's null caption where there is none."""
        blank = ~text.any(-1).any(-1)                          # (B,)
        if not blank.any():
            return text
        if self.null is None:
            self.null = torch.compiler.disable(null_caption)(text.shape[1], self.config)       # no part of a graph
        return torch.where(blank[:, None, None], self.null.to(text), text)


def fill(model, weights, path):
    """Copy weights by name into a model. UserError where one is missing, unknown, of another shape or not finite."""
    there = {name: value.shape for name, value in model.state_dict().items()}
    wrong = [f"{name} is missing" for name in there if name not in weights]
    wrong += [f"{name} is {tuple(weights[name].shape)}, not {tuple(shape)}" for name, shape in there.items()
              if name in weights and weights[name].shape != shape]
    wrong += [f"{name} is none of its weights" for name in weights if name not in there]
    wrong = wrong or [f"{name} is not finite" for name in there if not weights[name].isfinite().all()]
    if wrong:
        raise UserError(f"the weights in {path!r} do not fit ({', '.join(wrong[:3])}): bring them whole, of this model")
    model.load_state_dict(weights)


# ---------------------------------------------------------------------------------------------------------------
# Folders as checkpoints: "stage", "name", "step", "config", "parents" and weights by name, as model.py reads them


def read_published(folder):
    """The state in a pipeline's folder or in an export; None where it is neither."""
    if os.path.exists(os.path.join(folder, "model_index.json")):
        return read_pipeline(folder)
    return read_export(folder) if os.path.exists(os.path.join(folder, "config.json")) else None


def read_pipeline(folder):
    """A pipeline as the state of a run that took no steps, weights mapped into memory and read where they are used."""
    name, config = pipeline_index(folder)["_class_name"], pipeline_config(folder)
    part = os.path.join(folder, PIPELINES[name][0])
    files = weight_files(part)[1]
    if not files:
        raise UserError(f"no .safetensors in {part!r}: bring them, since pickled weights (.bin) could run code")
    named = (pair for file in files for pair in read_weights(file, "a published pipeline").items())
    weights = {f"core.{key}": value for key, value in named}
    return {"name": name, "stage": "published", "step": 0, "config": config, "parents": [], "model": weights, "ema": {}}


def pipeline_config(folder):
    """The config of a run that would have made this pipeline."""
    part, _, tokens, advice = PIPELINES[pipeline_index(folder)["_class_name"]]
    about, vae = read_json(folder, part, "config.json"), read_json(folder, "vae", "config.json")
    encoder = PipelineEncoder(tokens, folder, "fp32")          # which opens nothing yet
    if vae.get("latents_mean") or vae.get("shift_factor"):
        raise UserError(f"the latents of {folder!r} are shifted: take a pipeline whose autoencoder scales them alone")
    stride, side, logsnrs = 2 ** (len(vae["block_out_channels"]) - 1), about["sample_size"], noise_levels(folder)[0]
    unet = part == "unet"
    patch = 2 ** (len(about["block_out_channels"]) - 1) if unet else about["patch_size"]   # a token's, in latents
    return default_config() | advice | {
        "pipeline": folder, "shell": "published", "data": "", "sampler": "dpm", "dtype": "fp32", "weighting": "eps",
        "encoder": f"pipeline:{tokens}", "encoder_width": (encoder.width,), "encoder_weights": folder,
        "text_length": tokens, "autoencoder": os.path.join(folder, "vae"), "latent_channels": vae["latent_channels"],
        "latent_stride": stride, "latent_scale": vae["scaling_factor"], "conditions": SIZES if unet else "",
        "resolution": side * stride, "noise_base_resolution": side * stride, "grid": side // patch,
        "logsnr_max": float(logsnrs[0]), "logsnr_min": float(logsnrs[-1]), "steps": 0}


def read_start(path):
    """
    What a training starts from, {"stage", "config" ...}: a pipeline's folder, a run or an export, without reading what
    is large. None where nothing is there yet; what is broken is told when it is read.
    """
    if not path:
        return None
    if os.path.exists(os.path.join(path, "model_index.json")):
        return {"stage": "published", "config": pipeline_config(path)}
    state = read_export(path) if os.path.exists(os.path.join(path, "config.json")) else newest_about(path)
    return state | {"config": default_config() | state["config"]} if state and "config" in state else None


def check_there(path):
    """UserError where no pipeline, run or export is at a path that was named."""
    if not any(os.path.exists(os.path.join(path, name)) for name in ("model_index.json", "config.json")):
        find_checkpoint(path)


def start_config(config, path, start, flags, whole):
    """
    The config of a training that starts from `path`, which read_start read. `home` is the folder of a pipeline that
    it needs. Where that is its network, and this is to be trained as a `whole`, its config gets all that the pipeline
    decides, and what is usual for it where config and `flags`, [(key, text)], leave it open; where the network is ours
    and the pipeline only reads its captions, these PARTS of it. UserError for a flag that it contradicts, and for a
    stage that keeps a part of a pipeline's network.
    """
    if config["pipeline"]:
        raise UserError(f"pipeline = {config['pipeline']}: that is filled in: give --core FOLDER or --teacher FOLDER")
    if not start or not home(start["config"]):
        return config
    there, given = start["config"], {key for key, _ in flags}
    if not there["pipeline"]:
        other = "encoder" in given and config["encoder"] != there["encoder"]       # encoder_weights are not of this one
        taken = [key for key in PARTS if key not in given and not (other and key == "encoder_weights")]
        return config | {key: there[key] for key in taken}
    if not whole:
        raise UserError(f"{path} has the network of a pipeline, which is trained as a whole: take --stage defrost or "
                        "style and --core, or distill and --teacher")
    for key in (*DECIDED, *OURS):
        if key in given and config[key] != there[key]:
            value = f", {there[key]!r}" if key in DECIDED else ""
            raise UserError(f"--{key}: the network of {path} decides it{value}: leave it out")
    if config["kv_merge"] > 1:
        raise UserError(f"kv_merge = {config['kv_merge']}: that is for our own blocks: --kv_merge 0, or bring a "
                        f"PixArt-Sigma into them, python -m experiments.pixart {there['pipeline']} --to OWN, and start "
                        "from OWN")
    if config["fsdp"]:
        raise UserError("fsdp = True: the network of a pipeline is not cut into shards: --fsdp False, and for memory "
                        "--checkpointing and --micro")
    defaults, student = default_config(), config["objective"] != "diffusion"       # a student has its own steps
    advised = [key for key in (ADVISED[:1] if student else ADVISED) if config[key] == defaults[key]]
    taken = {key: there[key] for key in (*USUAL, *advised) if key not in given}
    return config | {key: there[key] for key in (*DECIDED, *OURS)} | taken


def home(config):
    """The folder of the pipeline that is the network, or that reads its captions; "" where there is none."""
    if config["encoder"].startswith("pipeline:"):
        return config["pipeline"] or config["encoder_weights"]
    return config["pipeline"]


def check_encoder(config, start):
    """
    UserError where the captions of a training were embedded by others than the encoders of its pipeline, or than those
    that `start` (read_start) was published with.
    """
    known, there = config["encoder_id"] or config["encoder"], []
    if start and start["stage"] == "published" and start["config"]["encoder_id"]:
        there.append((start["config"]["encoder_id"], home(start["config"])))
    if config["encoder"].startswith("pipeline:") and config["encoder_weights"]:
        folder = config["encoder_weights"]
        there.append((open_pipeline(config["text_length"], folder, "fp32").id, folder))
    for own, folder in there:
        if known.split(" ")[2:] != own.split(" ")[2:]:         # behind the dtype
            raise UserError(f"the captions were embedded by {known}, and the pipeline holds {own}: embed them with "
                            f"--encoder pipeline:{config['text_length']} --weights {folder}")


def describe_published(state):
    """What a pipeline's folder holds, as lines of text."""
    c, index = state["config"], pipeline_index(state["config"]["pipeline"])
    part, kind, _, _ = PIPELINES[state["name"]]
    count, (levels, predicts_v) = sum(value.numel() for value in state["model"].values()), noise_levels(c["pipeline"])
    encoders = " and ".join(f"{key} ({index[key][1]})" for key in ("text_encoder", "text_encoder_2") if index.get(key))
    return "\n".join([
        f"published {state['name']} in {c['pipeline']}, {c['resolution']} px",
        f"{part:12s} {count:>12,} parameters: {kind}, of latents of {c['latent_channels']} channels, 1 for "
        f"{c['latent_stride']} x {c['latent_stride']} px; predicts {'v' if predicts_v else 'eps'}",
        f"noise        {len(levels)} timesteps, logsnr {c['logsnr_max']:.2f} to {c['logsnr_min']:.2f}",
        f"captions     {c['text_length']} rows of {encoders}",
        f"advice       --sampler {c['sampler']} --steps {c['sample_steps']} --guidance {c['guidance']}"])


def check_new(folder):
    """UserError where a folder that is to be written holds something already."""
    if os.path.isfile(folder) or os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"{folder!r} is there and not empty: name a new folder")


def export(state, folder):
    """
    The EMA weights of a run as model.safetensors, and config.json, which says what they are, into a new folder. -> a
    line about it.
    """
    save_file = import_extra("safetensors.torch", "--export", "safetensors").save_file
    check_new(folder)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "model.safetensors")
    weights = {name: value.contiguous() for name, value in {**state["model"], **state["ema"]}.items()}
    save_file(weights, part_name(path))
    mask = os.umask(0)                                         # which cannot be read but by setting it
    os.umask(mask)
    os.chmod(part_name(path), 0o666 & ~mask)                   # as other files; it makes them for their owner alone
    os.replace(part_name(path), path)
    about = {"format": FORMAT} | {key: state[key] for key in ("name", "stage", "step", "parents", "config")}
    what = "EMA weights of nanoVermeer, v of (z, logsnr, text, conditions): model.load(FOLDER)"
    text = json.dumps({"what": what} | about, indent=1)
    atomic_write(os.path.join(folder, "config.json"), lambda f: f.write(text.encode()))        # last: now it is whole
    needs, folder_of = "", home(state["config"])
    if folder_of:
        parts = ", autoencoder and the network's settings" if state["config"]["pipeline"] else " and autoencoder"
        needs = (f"; encoders{parts} stay in {folder_of}: on another machine put it, or a link to it, there as "
                 f"{WITHIN!r}")
    return (f"{folder}: {len(weights)} tensors of {state['stage']}, step {state['step']}: python sample.py {folder}"
            f"{needs}")


def moved(path, before, now):
    """A path in the folder `before`, or this itself, in the folder `now`; another path as it is."""
    return now + path.removeprefix(before) if f"{path}/".startswith(f"{before}/") else path


def read_export(folder):
    """The state that `export` wrote."""
    state, path = read_json(folder, "config.json"), os.path.join(folder, "model.safetensors")
    if state.get("format") != FORMAT or not os.path.exists(path):
        raise UserError(f"{folder!r} is no export of format {FORMAT} and no pipeline: make one by python sample.py RUN "
                        "--export FOLDER, or name a pipeline's whole folder, that with model_index.json")
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in state["config"].items()}
    config, within = default_config() | config, os.path.join(folder, WITHIN)
    if (before := home(config)) and os.path.isdir(within):     # else where training found it
        config |= {key: moved(config[key], before.rstrip("/"), within)
                   for key in ("pipeline", "encoder_weights", "autoencoder")}
    return state | {"config": config, "model": read_weights(path, "an export"), "ema": {}}
