"""
A page to type captions into: pictures of a run, and the path from noise to image.

    python -m experiments.demo out/toy/grow            then open the address that it prints
    python -m experiments.demo FOLDER --dtype bf16     a published pipeline: PixArt-Sigma, SDXL (GUIDE.md)

It listens on this machine alone, unless --host 0.0.0.0 opens it to the network or --share to the world (which sends
all through gradio's servers). Needs gradio; nothing on the page comes from elsewhere, and nobody is told of it.
"""
import html
import os

import numpy as np
import torch
import torch.nn.functional as F

from lib.devices import in_dtype
from lib.encoders import open_autoencoder
from lib.files import import_extra
from lib.pictures import make_grid, to_uint8
from lib.processes import is_out_of_memory, prepare_cpu
from lib.settings import Parser, UserError, check_range
from model import load
from sample import SAMPLERS, STUDENTS, check_student, is_student, parse_size, sample

STRIP = 8                                                      # places of the path that are shown
EXAMPLE = "a large red circle left of a small blue square on a white background"
SENTENCE = ("The path of the first picture, from noise to image. Above: what the sampler has. Below: the clean image "
            "that the network sees in it.")


def draw(model, config, caption, n, steps, guidance, sampler, seed, size):
    """
    Pictures of a caption as they would be seen: (h, w, 3) uint8 of n in rows of four, and the strip that `path` makes
    of the first. A guidance of None is the run's own, a size of "" too. UserError for what this run does not draw.
    """
    if None in (n, steps, seed) or min(n, steps) < 1:
        raise UserError("pictures, steps, seed: give whole numbers, of pictures and steps at least 1")
    if guidance is not None:
        check_range("guidance", guidance)
    check_student(config, steps, guidance, sampler)
    size, seen = parse_size(size.strip() or None, config), []  # seen: (z, x) of every evaluation, of the first picture
    x = sample(model, config, [caption.strip()] * n, seed, steps=steps, guidance=guidance, sampler=sampler, size=size,
               watch=lambda z, x: seen.append((z[:1].clone(), x[:1].clone())))     # x (n, 3, H, W)
    evaluations = SAMPLERS[sampler][2](steps)                  # more are of a second batch
    return make_grid(to_uint8(x), min(n, 4), most=256), path(config, seen[:evaluations])


def path(config, seen):
    """Of [(z, x)], each (1, C, H, W), at most STRIP in even distances: (h, w, 3) uint8, z above, x below."""
    places = np.linspace(0, len(seen) - 1, min(STRIP, len(seen))).round().astype(int)
    rows = [seen[place][which] for which in (0, 1) for place in places]            # (1, C, H, W) each
    autoencoder = open_autoencoder(config, rows[0].device)
    pixels = torch.cat([autoencoder.decode(row).cpu() for row in rows])            # (2 places, 3, H, W), one at a time
    pixels = F.avg_pool2d(pixels, max(1, pixels.shape[2] // 128))                  # a strip need not be large
    return make_grid(to_uint8(pixels), len(places), most=128)


def answer(error):
    """What the page says of an error, in a sentence. What nobody foresaw stays an error."""
    if isinstance(error, UserError):
        return error.message
    if is_out_of_memory(error):
        return "out of memory: take fewer pictures, or --dtype bf16 for a published pipeline"
    raise error


def build_page(gradio, model, config, name):
    """The page, a gradio.Blocks. Its fields begin with the run's own settings."""
    student = is_student(config)
    samplers = STUDENTS[config["objective"]][0] if student else tuple(SAMPLERS)

    def pictures(caption, n, steps, guidance, *others):
        try:                                                   # the page makes 0 of a number that is empty
            return draw(model, config, caption, n, steps, None if student else guidance, *others)
        except (UserError, Exception) as error:                # a UserError is no Exception
            raise gradio.Error(html.escape(answer(error)), duration=None, print_exception=False)
    with gradio.Blocks(title=f"nanoVermeer: {name}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"### nanoVermeer draws by `{name}`")
        caption = gradio.Textbox(EXAMPLE, label="caption", info="empty: the null caption", elem_id="caption")
        with gradio.Row():
            n = gradio.Slider(1, 16, 4, step=1, label="pictures")
            steps = gradio.Number(config["sample_steps"], label="steps", precision=0, elem_id="steps")
            guidance = gradio.Number(config["guidance"], label="guidance", elem_id="guidance", info="1 is none",
                                     visible=not student)      # it is inside a student
            sampler = gradio.Dropdown(samplers, value=config["sampler"], label="sampler")
            seed = gradio.Number(0, label="seed", precision=0)
            side = config["resolution"]
            size = gradio.Textbox("", placeholder=f"{side}x{side}", label="size, HxW in pixels", elem_id="size")
        button = gradio.Button("draw", variant="primary", elem_id="draw")
        pictures_shown, path_shown = (gradio.Image(show_label=False, format="png", interactive=False, elem_id=name,
                                                   buttons=["fullscreen", "download"]) for name in ("pictures", "path"))
        gradio.Markdown(SENTENCE)
        fields = [caption, n, steps, guidance, sampler, seed, size]
        for event in (button.click, caption.submit):
            event(pictures, fields, [pictures_shown, path_shown], api_visibility="private")
    return page


def main():
    parser = Parser(__doc__, keys=("guidance_end", "encoder_weights"))
    parser.add_argument("run", help="run folder, such as out/toy/grow, or a published pipeline")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default this machine alone")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="a public address, by way of gradio's servers")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], help="of products, half as exact and faster; default fp32")
    args, keys = parser.parse_keys()
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}     # read on import
    gradio = import_extra("gradio", "the page")
    prepare_cpu()
    model, config = load(args.run, "cuda" if torch.cuda.is_available() else "cpu")
    config |= dict(keys)
    in_dtype(model, config, args.dtype)
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}      # the machine's own
    page = build_page(gradio, model, config, args.run)
    try:
        _, here, public = page.launch(
            server_name=args.host, server_port=args.port, share=args.share, theme=gradio.themes.Default(**fonts),
            footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, quiet=True, prevent_thread_lock=True)
    except OSError as e:
        raise UserError(f"the page cannot listen on {args.host} ({e}): give another --port, or leave it out")
    print(f"{args.run} draws on {public or here} until Ctrl-C", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
