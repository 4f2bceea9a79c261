"""
The text encoders of a published pipeline (lib/published.py), as that pipeline uses them.

Letters: n tokens of a caption, E width of an embedding, P of a pooled one.
"""
import functools
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

from lib.files import complete, from_folder, import_extra, local_weights, read_json, weights_hash
from lib.settings import UserError
from lib.tables import DTYPES

# pipeline -> the network's subfolder and class; tokens of a caption; the sampler's settings that its makers advise
PIPELINES = {
    "PixArtSigmaPipeline": ("transformer", "PixArtTransformer2DModel", 300, {"guidance": 4.5, "sample_steps": 20}),
    "StableDiffusionXLPipeline": ("unet", "UNet2DConditionModel", 77 + 1, {"guidance": 5.0, "sample_steps": 30})}


def pipeline_index(folder):
    """What model_index.json says: the subfolders and their classes. UserError for a pipeline of another kind."""
    index = read_json(folder, "model_index.json")
    if index.get("_class_name") not in PIPELINES:
        raise UserError(f"{folder!r} is a {index.get('_class_name')}: take a {' or '.join(PIPELINES)}")
    return index


class PipelineEncoder:
    """
    The text encoders of a pipeline, as it uses them: captions -> a list of (n, E), n <= tokens. PixArt-Sigma: the real
    tokens of T5. SDXL: 77 tokens, padding too, of two CLIPs side by side, and the pooled text of the second as one row
    more. Each is opened where it is needed, after the one before, and let go where memory is short. The null caption ""
    gives n = 0.
    """
    name = "pipeline"

    def __init__(self, tokens, folder, dtype):
        self.tokens, self.folder, self.dtype = tokens, folder, dtype
        self.opened, self.empty = {}, None                     # {part: (tokenizer, network)}; "" as they read it
        self.index = pipeline_index(folder)
        if tokens != (own := PIPELINES[self.index["_class_name"]][2]):
            raise UserError(f"pipeline:{tokens}: the network of {folder!r} takes {own} rows: take pipeline:{own}")
        self.parts = [part for part in ("text_encoder", "text_encoder_2") if part in self.index]
        about = [read_json(folder, part, "config.json") for part in self.parts]
        self.width = sum(c.get("d_model") or c["hidden_size"] for c in about)      # d_model is T5's word
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @functools.cached_property
    def id(self):
        hashes = (weights_hash(os.path.join(self.folder, part)) for part in self.parts)
        return f"pipeline {self.dtype} {' '.join(hashes)}"

    @torch.no_grad()
    def __call__(self, captions):
        texts = list(dict.fromkeys(["", *captions]))           # each once, and "" while the networks are open
        with torch.autocast(self.device, enabled=False):       # the null caption may be asked for in a training pass
            spans = [self.embed(part, texts) for part in self.parts]               # [[(rows, pooled)]]
        rows = [torch.cat([hidden for hidden, _ in parts], 1) for parts in zip(*spans)]
        if len(self.parts) == 2:
            pooled = [F.pad(text, (0, self.width - len(text)))[None] for _, text in spans[1]]
            rows = [torch.cat(pair) for pair in zip(rows, pooled)]                 # (n, E)
        self.empty, by_text = rows[0], dict(zip(texts, rows))
        return [by_text[c] if c else rows[0][:0] for c in captions]

    @property
    def null(self):
        """(tokens, E): "" as the encoders read it, or zeros, where the pipeline asks for them (SDXL)."""
        if self.index.get("force_zeros_for_empty_prompt"):
            return torch.zeros(self.tokens, self.width)
        if self.empty is None:
            self([])
        return F.pad(self.empty, (0, 0, 0, self.tokens - len(self.empty)))

    def embed(self, part, texts):
        """[(rows (n, E) of one encoder, its pooled text (P,) or None)]."""
        tokenizer, net = self.opened.pop(part, None) or self.open(part)
        t5, rows = self.index[part][1].startswith("T5"), []
        limit = self.tokens if t5 else self.tokens - 1         # one row is for the pooled text
        texts = [text.lower().strip() for text in texts] if t5 else texts          # as PixArt's pipeline does
        for text, ids in zip(texts, tokenizer(texts, verbose=False).input_ids):    # it warns of another limit
            if len(ids) > limit:
                print(f"{part} reads {limit} of {len(ids)} tokens, the rest is cut: {text[:60]!r}", file=sys.stderr)
        for start in range(0, len(texts), 16):                 # the activations of T5-XXL are large
            tokens = tokenizer(texts[start:start + 16], padding=True if t5 else "max_length", truncation=True,
                               max_length=limit, return_tensors="pt").to(self.device)
            if t5:
                hidden = net(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
                rows += [(h[m].cpu(), None) for h, m in zip(hidden, tokens.attention_mask.bool())]
            else:                                              # SDXL takes the last layer but one, padding too
                out = net(input_ids=tokens.input_ids, output_hidden_states=True)
                rows += zip(out.hidden_states[-2].cpu(), out[0].cpu())             # out[0]: pooled, of the second one
        if free_memory(self.device) > 2 * sum(p.nbytes for p in net.parameters()):
            self.opened[part] = tokenizer, net                 # for the next captions
        return rows

    def open(self, part):
        """(tokenizer, network) from their own subfolders."""
        library, kind = import_extra("transformers", f"{part} of {self.folder!r}"), self.index[part][1]
        folder = os.path.join(self.folder, part)
        if kind not in ("T5EncoderModel", "CLIPTextModel", "CLIPTextModelWithProjection"):
            raise UserError(f"{part} of {self.folder!r} is a {kind}: take a pipeline with T5 or CLIP")

        def load():
            net = getattr(library, kind).from_pretrained(folder, dtype=DTYPES[self.dtype], **local_weights(folder))
            return self.tokenizer(part), complete(*net).eval().requires_grad_(False).to(self.device)
        return from_folder(part, folder, "bring the whole pipeline, its weights as .safetensors", load)

    def tokenizer(self, part):
        folder = os.path.join(self.folder, part.replace("text_encoder", "tokenizer"))
        kind = import_extra("transformers", f"{part} of {self.folder!r}").AutoTokenizer
        try:
            return kind.from_pretrained(folder, local_files_only=True)
        except Exception as e:                                 # of many kinds
            more = ""
            if os.path.exists(os.path.join(folder, "spiece.model")):               # as PixArt-Sigma is downloaded
                more = "; it holds spiece.model, for which these are needed: pip install sentencepiece protobuf"
            raise UserError(f"{folder!r} does not open as a tokenizer ({type(e).__name__}: {str(e)[:200]}): bring it "
                            f"whole{more}")

    def mean_tokens(self, captions):
        """Mean number of rows that these captions take."""
        if len(self.parts) == 2:                               # padding too
            return float(self.tokens)
        ids = self.tokenizer(self.parts[0])(captions, truncation=True, max_length=self.tokens).input_ids
        return float(np.mean([len(row) for row in ids]))


def encoder_dtype(config):
    """That of encoder_id, the encoders that a model knows; else that in which a pipeline is used."""
    known = config["encoder_id"]                               # such as "t5-xxl fp32 0123456789abcdef, ..."
    return known.split(" ")[1] if known else config["dtype"] if config.get("pipeline") else "fp32"


@functools.lru_cache(1)                                        # the same one serves captions and the null caption
def open_pipeline(tokens, folder, dtype):
    return PipelineEncoder(tokens, folder, dtype)


def null_caption(tokens, config):
    """(tokens, E): the null caption of a pipeline."""
    return open_pipeline(tokens, config["encoder_weights"], encoder_dtype(config)).null


def free_memory(device):
    """Bytes that can be had; 0 where that is not told."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    if not os.path.exists("/proc/meminfo"):
        return 0
    with open("/proc/meminfo") as f:
        return 1024 * int(dict(line.split(":") for line in f)["MemAvailable"].split()[0])      # it tells kB
