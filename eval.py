"""
How good is a run: does the picture show what the caption says, and do the pictures look like the data?

    python eval.py out/toy/grow --n 500 --guidance 2,3,4      questions, Frechet distance, MMD; curves in guidance.png
    python eval.py out/toy/grow --metrics counting,zeroshot   counts by number; the denoiser tells shapes and colours
    python eval.py RUN --prompts FILE --reference real/       your captions, one a line, against images of your own
    python eval.py RUN --dsg dsg-1k-anns.csv --vqa WEIGHTS    a network answers questions about each picture (DSG)
    python eval.py real/ fake/ --features dino --weights W    two folders of images, in the features of a known network
    python eval.py RUN_A RUN_B --sheet sheet/                 a web page on which people compare the two, then
    python eval.py --sheet sheet/ --ratings FILES             their answers, and how far they agree
    torchrun --standalone --nproc-per-node 8 -- eval.py RUN   the same figures, made by eight devices; the -- keeps
                                                              torchrun from taking --n for its own

On `scenes` a judge without learned weights (lib/judge.py) looks at each generated picture and answers the caption's
questions. Beside each score stands its chance level: the same pictures judged against other captions. Features named
`random` come from a fixed random network: they compare only runs of this repository at equal n, and no number made
from them is FID. Every result ends with a card that says how it was made.

Where to read: the metrics are plain functions in lib/metrics.py, and METRICS is the table of them. A Task is what a run
is asked to draw, and who looks at it; `evaluate` is where pictures meet tasks and metrics.

Letters: n and m images, D features, H W height and width in pixels.
"""
import itertools
import math
import os
import sys

from lib.settings import Parser, UserError, check_range, parse_numbers, parse_words, words_of

parser = Parser(__doc__, keys=("scene_exam", "guidance_end", "prefix", "suffix", "base", "augmentation_sample"))
add = parser.add_argument
add("run", nargs="*", help="a run such as out/toy/grow; or two folders of images, reference first; or two runs")
add("--n", type=int, help="images; default 1000, or all captions of a file, or 50 pairs of a sheet")
add("--metrics", help="of questions,counting,fidelity,style,diversity,fd,mmd,kid,pr,prdc,is,zeroshot; "
    "default questions,fidelity,style,diversity,fd,mmd; for folders fd,mmd,pr,prdc")
add("--features", default="random", help="of random,inception,dino,clip: one or several")
add("--weights", default="", help="file or folder with the weights, one for each of --features that is not random")
add("--guidance", help="one value or several, such as 1,2,4; default: the run's own")
add("--sampler", choices=words_of("sampler"), help="default: the run's own")
add("--steps", type=int, help="default: the run's own")
add("--dtype", choices=["bf16", "fp16"], help="of products, half as exact and faster; default fp32")
add("--style", action="store_true", help="in the style of a run of --stage style")
add("--seeds", type=int, default=1, help="repeat with seeds 0 to k-1: mean and spread")
add("--prompts", metavar="FILE", help="captions, one a line; a blank line is the null caption")
add("--reference", metavar="PATH", help="images to compare a run with: a folder, or the .pt file kept of one")
add("--dsg", metavar="FILE", help="questions as in dsg-1k-anns.csv, about a run or a folder of ITEM.png")
add("--vqa", metavar="FOLDER", help="BLIP weights that answer them; without it, --keep leaves that to others")
add("--answers", metavar="FILE", help="or their answers: CSV with item_id, question_id, answer")
add("--keep", metavar="FOLDER", help="keep the pictures of a run there, for other programs")
add("--classes", metavar="FOLDER", help="FOLDER/CLASS/*.png for --metrics zeroshot; default: scenes")
add("--template", default="a photo of a {}", help="the caption of a class")
add("--sheet", metavar="FOLDER", help="write a page there on which people compare two runs")
add("--ratings", metavar="FILE", nargs="+", help="the files that this page saved: win rates and agreement")
add("--json", help="write the figures to this file")
parser.answer(__name__)                                        # --help need not wait for what is imported next

import numpy as np
import torch

from data import Batches, encode_captions, open_data
from lib.answers import score_answers, score_people
from lib.checkpoint import checkpoint_hash, is_run
from lib.conditions import condition_row
from lib.draws import normals
from lib.encoders import open_autoencoder
from lib.files import file_hash, free_name
from lib.judge import counting, diversity, fidelity, judge, look, style
from lib.metrics import clip_score, cmmd, fd, kid, mmd, named, prdc, precision_recall, shuffled_inception_score
from lib.networks import open_networks, open_vqa, random_features, to_square
from lib.people import write_page
from lib.pictures import draw_tuning, to_tensor, to_uint8
from lib.processes import chunks, exit_with, get_rank, get_world_size, join, on_all_ranks
from lib.questions import read_dsg
from lib.references import check_same_size, image_features, labelled_images, list_images, open_reference, read_image
from lib.results import accuracy, best_point, make_card, over_seeds, report, tuning, write_result
from lib.scenes import describe, world_name
from lib.tasks import Task, dsg_task, keep_pictures, prompts_task
from model import diffusion_loss, read_checkpoint
from sample import is_student, open_base, open_run, sample

# ----------------------------------------------------------------------------------------------------------------------
# What a run is asked to draw, and who looks at it: a Task (lib/tasks.py)


def held_out_task(config, n, noises=1):
    """
    n pictures of held-out captions, at which the judge looks: `noises` of each caption, so n is rounded up to
    a multiple of that. Of a folder the first captions, and no judge: only scenes know what is true.
    """
    world = open_data(config).held_out()                       # scenes: the same for all runs
    numbers = [i % len(world) for i in range(-(-n // noises))] # round again where there are fewer
    task = Task([world.caption(i) for i in numbers for _ in range(noises)])
    if config["data"] != "scenes":
        return task
    scenes = [world.scene(i) for i in numbers]                 # what is true
    metrics = {"diversity": lambda looks: diversity(world, numbers, looks)} if noises > 1 else {
        "questions": lambda looks: judge(world, scenes, looks), "counting": lambda looks: counting(scenes, looks),
        "fidelity": fidelity, **({"style": style} if config["style"] == "scenes" else {})}
    return task._replace(look=lambda image, i: look(image, world.cycles), metrics=metrics)


# ----------------------------------------------------------------------------------------------------------------------
# The denoiser as a classifier (Li et al. 2023; Clark and Jaini 2023): the caption under which its loss is lowest


@torch.no_grad()
def best_caption(model, config, image, text, number, seed=0, draws=16):
    """
    Index of the row of text (options, L) or (options, L, E) under which the mean loss of image (H, W, 3) uint8 is
    lowest. All options meet the same `draws` noises, at times spread evenly over [0, 1]: differences in noise would
    drown those in words. `number` is that of the image, which has noises of its own.
    """
    device = next(model.parameters()).device
    x = open_autoencoder(config, device).encode(to_tensor(image[None]).to(device)) # (1, C, H, W): pixels, or latents
    times = ((torch.arange(draws) + 0.5) / draws).to(device)   # (draws,)
    eps = normals([("zeroshot", seed, number, k) for k in range(draws)], x.shape[1:], device)      # (draws, C, H, W)
    height, width = image.shape[:2]
    row = condition_row(config, (height, width, 0, 0, height, width), lambda name: math.nan)
    told, losses = torch.tensor([row] * draws, device=device), []                  # (draws, K): its size alone
    for option in text.split(1):                               # (1, L) or (1, L, E)
        repeated = option.expand(draws, *option.shape[1:])     # no copy
        losses.append(diffusion_loss(model, x.expand_as(eps), repeated, times, eps, config, told).mean())
    return int(torch.stack(losses).argmin())                   # the first of equals


def zeroshot(model, config, world, n, seed=0, draws=16):
    """On n scenes of one group, by captions that differ in a word: {"shape": {class: accuracy, "mean", ...}, ...}."""
    device, options = next(model.parameters()).device, {"shape": world.shapes, "colour": world.colours}  # classes
    single = (i for i in itertools.count() if len(world.scene(i)["groups"]) == 1)  # endless: islice takes n

    def guess(i):
        scene, guesses = world.scene(i), {}
        (group,), image = scene["groups"], world.image(i, config["resolution"])
        for kind, words in options.items():
            captions = [describe(scene | {"groups": [group | {kind: word}]}) for word in words]  # all but one is false
            text = encode_captions(captions, config).to(device)                    # (options, L)
            guesses[kind] = words[best_caption(model, config, image, text, i, seed, draws)], group[kind]
        return guesses
    guesses = on_all_ranks(guess, itertools.islice(single, n), "zero-shot")        # [{kind: (guess, truth)}]
    return {kind: accuracy([g[kind] for g in guesses], words) for kind, words in options.items()}


def zeroshot_folder(model, config, folder, template, n, seed=0, draws=16):
    """
    On n images of folder/CLASS/*, as many of each class, their centre squares: {class: accuracy, "mean", "chance"}.
    The caption is the `template` with the class in place of {}, an underscore being a space.
    """
    if "{}" not in template:
        raise UserError(f"--template {template!r}: put {{}} where the class belongs")
    names, files = labelled_images(folder, n)                  # [class], [(file, class)]
    captions = [template.replace("{}", name.replace("_", " ")) for name in names]
    text = encode_captions(captions, config).to(next(model.parameters()).device)   # (classes, L)

    def guess(number):
        file, truth = files[number]
        square = to_square(read_image(file)[None], config["resolution"], crop=True)[0]     # (3, H, W)
        image = square.permute(1, 2, 0).byte().numpy()
        return names[best_caption(model, config, image, text, number, seed, draws)], truth
    return accuracy(on_all_ranks(guess, range(len(files)), "zero-shot"), names)


# ----------------------------------------------------------------------------------------------------------------------
# The table of metrics: what each is measured on, and how. A new one of features is a new row, and a word in the help of
# --metrics; one of pictures is also a function of a task (held_out_task), which gets all that `look` returned


def zeroshot_of_run(model, config, n, seed, classes):
    """Zero-shot accuracy on `classes` = (folder, template), else on held-out scenes."""
    if is_student(config) or config["low_resolution"]:
        raise UserError("--metrics zeroshot: a student of few steps is no denoiser, a cascade sees the picture itself: "
                        "ask the run that it learned from, or its base")
    if classes:
        return zeroshot_folder(model, config, *classes, n, seed)
    if config["data"] != "scenes":
        raise UserError("--metrics zeroshot: this run was not trained on scenes: "
                        "give --classes FOLDER with FOLDER/CLASS/*.png")
    return zeroshot(model, config, open_data(config).held_out(), n, seed)


METRICS = {
    # a task's pictures, by the task's own function; a task that has none leaves the metric out
    "questions": ("pictures", None),
    "counting": ("pictures", None),
    "fidelity": ("pictures", None),
    "style": ("pictures", None),
    # the same, of pictures from several noises for each caption
    "diversity": ("noises", None),
    # two sets of features of one network, the real one first
    "fd": ("features", fd),
    "mmd": ("features", mmd),
    "kid": ("features", named(kid, "mean", "std")),
    "pr": ("features", named(precision_recall, "precision", "recall")),
    "prdc": ("features", prdc),
    # Inception's logits of generated images alone
    "is": ("logits", named(shuffled_inception_score, "mean", "std")),
    # the denoiser without a picture of its own: (model, config, n, seed, classes)
    "zeroshot": ("denoiser", zeroshot_of_run)}


def rows_of(kind, metrics):
    """{name: function} of those `metrics` that are measured on this kind of thing, in the order of the table."""
    return {name: row[1] for name, row in METRICS.items() if row[0] == kind and name in metrics}


def compared(networks, metrics):
    """The networks whose features are compared with those of real images, if any metric asks for that."""
    return {name: network for name, network in networks.items() if name != "logits" and rows_of("features", metrics)}


def needed(networks, metrics):
    """Those, and the ones that need no real images: of the Inception score and the CLIP score."""
    return compared(networks, metrics) | {name: networks[name] for name in ("logits", "clip") if name in networks}


def compare(reference, fake, metrics, captions=None):
    """
    {metric_network: value} of {network: (n, D)} features of reference and generated images; captions (n, D) from CLIP.
    fd_inception is FID, fd_dino is FD-DINO; mmd on clip is CMMD. `logits` and clip_score need no reference.
    """
    result = {}
    for network, x in fake.items():
        functions = rows_of("features", metrics) if network != "logits" else {}
        if "fd" in functions and (least := min(len(x), len(reference[network]))) <= x.shape[1]:    # no full rank then
            print(f"biased: {least} images for {x.shape[1]} features of {network}; "
                  "compare such numbers at equal n only")
        try:
            for metric, function in functions.items():
                if (metric, network) == ("mmd", "clip"):
                    result["cmmd"] = cmmd(reference[network], x)
                else:
                    result[f"{metric}_{network}"] = function(reference[network], x)
            if network == "logits":
                result["inception_score"] = METRICS["is"][1](x)
            if network == "clip" and captions is not None:
                result["clip_score"] = clip_score(x, captions)
        except ValueError as why:
            raise UserError(f"features {network}, {len(x)} images: {why}")
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Evaluating a run

RANDOM = {"random": (random_features, {})}                     # networks: {name: (features, about)}, as open_network
NOISES = 8                                                     # pictures of each caption for diversity
USUAL = ("questions", "fidelity", "style", "diversity", "fd", "mmd")               # unless others are asked for


@torch.no_grad()
def evaluate(model, config, n, seed=0, metrics=USUAL, networks=RANDOM, task=None, reference=None, shared=False,
             poll=None):
    """
    {metric: value} of n images, for the captions of `task` (default: held-out ones), against the features `reference`
    {network: (m, D)} (default: of n real images). With CLIP among the networks the CLIP score comes too. `shared`:
    several processes do their part each, and rank 0 alone gets the result, the others {}. `poll` is as in `sample`.
    """
    task = task or held_out_task(config, n)
    if reference is None:
        reference = real_features(config, n, compared(networks, metrics), shared)  # of real images
    looks, fake, texts = draw_and_look(model, config, task, n, needed(networks, metrics), seed, shared, poll)
    judged = [(task, looks)]                                   # every task is judged on its own pictures
    if "diversity" in metrics and config["data"] == "scenes":  # of pictures of its own, all noises of each caption
        several = held_out_task(config, n, NOISES)             # n / 8 captions
        looks = draw_and_look(model, config, several, len(several.captions), {}, seed, shared, poll)[0]
        judged.append((several, looks))
    result = {}
    for task, looks in judged:
        result |= {name: function(looks) for name, function in task.metrics.items() if name in metrics and looks}
    return result | compare(reference, fake, metrics, texts)


def draw_and_look(model, config, task, n, networks, seed, shared, poll):
    """
    (what the task's `look` returned for each of its first n pictures, {network: features (n, D)}, CLIP's embeddings of
    the captions or None). No chunk of pictures outlives its turn. All empty in a process that only helps.
    """
    captions = task.captions[:n]                               # fewer than n: all

    def work(rows):                                            # a chunk of places in the list of captions
        images = generate(model, config, captions, rows, seed, poll)               # (B, H, W, 3) uint8
        looks = [task.look(image, i) for image, i in zip(images, rows)]            # objects, answers, or None
        texts = networks["clip"][0](captions[rows.start:rows.stop]).cpu() if "clip" in networks else None  # (B, D)
        return looks, all_features(networks, images), texts
    parts = on_all_ranks(work, chunks(len(captions)), "images", shared)            # in order
    looks, features, texts = zip(*parts) if parts else ((), (), ())
    fake = {name: torch.cat([chunk[name] for chunk in features]) for name in networks if parts}    # (n, D) each
    return [one for chunk in looks for one in chunk], fake, torch.cat(texts) if "clip" in fake else None


def generate(model, config, captions, rows, seed=0, poll=None):
    """Pictures of captions[rows], (len(rows), H, W, 3) uint8; each depends on its place in the whole list alone."""
    x = sample(model, config, captions[rows.start:rows.stop], seed, rows.start, bar=get_rank() == 0, poll=poll)
    return to_uint8(x)


def all_features(networks, images):
    """(B, H, W, 3) uint8 -> {network: (B, D)}, on the CPU."""
    return {name: features(images).cpu() for name, (features, _) in networks.items()}


@torch.no_grad()
def real_features(config, n, networks, shared=False):
    """
    {network: (n, D)} of n real images, other than those whose captions held_out_task takes: numbers n to 2 n - 1. A
    folder of fewer than 2 n is gone round again. Without networks: {}.
    """
    if not networks:
        return {}
    plain = config | {"aspects": "", "flip": False, "jitter": 0.0}                 # augmented images would not be real
    batches = Batches(open_data(config).held_out(), plain, filtered=False)      # names and passes over broken ones

    def work(rows):
        images = [batches.sample(0, (n + i) % len(batches.data))[0] for i in rows] # (H, W, 3) each
        return all_features(networks, np.stack(images))
    parts = on_all_ranks(work, chunks(n), "real images", shared)                   # in order
    return {name: torch.cat([part[name] for part in parts] or [torch.zeros(0)]) for name in networks}


def evaluate_all(model, config, n, task, metrics, networks, reference, guidances, seeds, classes=None):
    """
    (rows, points) of all guidances and seeds, printed as they come: rows [{"guidance", "seed", "metrics"}], points
    [(guidance, mean, spread)], the spread being the standard deviation (ddof 0) over seeds, None of a single one.
    """
    once = []                                                  # by seed: guidance plays no part in these
    for seed in range(seeds):
        functions = rows_of("denoiser", metrics)
        once.append({name: function(model, config, n, seed, classes) for name, function in functions.items()})
    drawn = [name for name in metrics if METRICS[name][0] != "denoiser"]           # those that need pictures
    rows, points = [], []
    for guidance in guidances:                                 # a point of the curve each
        at = config | {"guidance": guidance}                   # no other key changes
        for seed in range(seeds):                              # the same noise for every guidance
            result = evaluate(model, at, n, seed, drawn, networks, task, reference, shared=True) if drawn else {}
            rows.append({"guidance": guidance, "seed": seed, "metrics": result | once[seed]})  # one line of the table
            print(f"guidance {guidance:g}  seed {seed}  {report(rows[-1]['metrics'])}", flush=True)
        results = [row["metrics"] for row in rows[-seeds:]]    # all seeds of this guidance
        mean, spread = over_seeds(results, np.mean), over_seeds(results, np.std) if seeds > 1 else None
        points.append((guidance, mean, spread))
        if spread:
            print(f"guidance {guidance:g}  mean    {report(mean)}\nguidance {guidance:g}  spread  {report(spread)}")
    return rows, points


# ----------------------------------------------------------------------------------------------------------------------
# Programs: a run, two folders, a page for people; questions about other pictures, and ratings, are in lib/answers.py


def score_run(args, metrics, networks, task, vqa, device):
    """All guidances and seeds of one run, the curves over guidance, and the card. `vqa` is (ask, about) or None."""
    step = read_checkpoint(args.run[0])["step"]                # the step alone: moments are large
    model, config, guidances = load_run(args.run[0], args, device)
    n = args.n or (len(task.captions) if task else 1000)       # images
    prompts, classes = args.prompts or args.dsg, (args.classes, args.template) if args.classes else None
    if task and n > len(task.captions):
        raise UserError(f"--n {n}: {prompts} holds {len(task.captions)} captions; give at most so many")
    if args.keep and len(guidances) * args.seeds > 1:
        raise UserError(f"--keep {args.keep}: {len(guidances)} guidances and {args.seeds} seeds would overwrite each "
                        "other: give one value of each")
    print(f"scoring {n} images, {config['sample_steps']} steps each, {len(guidances)} guidances, {args.seeds} seeds")
    task = task or held_out_task(config, n)
    task = keep_pictures(task, args.keep) if args.keep else task                   # written as they are looked at
    reference, about_reference = reference_of_run(args.reference, config, compared(networks, metrics), n)
    rows, points = evaluate_all(model, config, n, task, metrics, networks, reference, guidances, args.seeds, classes)
    if get_rank():
        return
    card = make_card(
        networks | ({"vqa": vqa} if vqa else {}), device, n=n, reference=about_reference, guidance=guidances,
        captions=f"{prompts}, sha256 {file_hash(prompts)}" if prompts else describe_captions(config, n),
        checkpoint=checkpoint_hash(args.run[0]), checkpoint_step=step, ema=True,
        sampler=config["sampler"], steps=config["sample_steps"], seeds=list(range(args.seeds)),
        **{key: config[key] for key in ("guidance_end", "dtype", "prefix", "suffix")}, processes=get_world_size(),
        **({"perceptual": config["vgg_id"]} if config["vgg_id"] else {}),
        **({key: config[key] for key in ("base_id", "augmentation_sample") if config["base_id"]}),
        **({"classes": f"{args.classes}, {args.template!r}"} if classes else {}))
    (guidance, mean, spread), why = best_point(points)         # by which metric, the words tell
    print(f"{n} images, {card['sampler']}, {card['steps']} steps, EMA weights of step {step}"
          + f"; {why} at guidance {guidance:g}" * (len(points) > 1))
    figures = {"run": args.run[0], "n": n, "guidance": guidance, "seeds": args.seeds, "metrics": mean, "spread": spread,
               "all": rows, "config": config}
    if len(points) > 1:
        figures["tuning"] = tuning([point[:2] for point in points])                # best by each metric
        folder = args.run[0] if os.path.isdir(args.run[0]) else "."                # of a checkpoint alone: here
        draw_tuning(figures["tuning"], free_name(os.path.join(folder, "guidance.png")))
    write_result(card, figures, args.json)


def load_run(run, args, device):
    """(model, config) of a run, with the sampler and steps of the command line, and the values of --guidance."""
    model, config = open_run(run, args.words, args, device)
    if config["low_resolution"]:                               # a cascade: is its base there?
        open_base(config["base"], config["base_id"], torch.device(device))
    config |= {"guidance": 1.0, "guidance_end": 0.0} if is_student(config) else {}           # it is inside
    config |= {"sampler": args.sampler or config["sampler"], "sample_steps": args.steps or config["sample_steps"]}
    return model, config, parse_numbers(args.guidance, "--guidance") if args.guidance else [config["guidance"]]


def reference_of_run(path, config, networks, n):
    """({network: (n, D)} or None, words for the card): of a folder or kept file `path`, else of n real images."""
    if not networks:
        return None, "none: nothing is compared"
    if path:
        reference, size, words = open_reference(path, networks, shared=True)
        check_same_size(networks, size, (config["resolution"],) * 2)
        return reference, words
    known = "which training never draws" if config["data"] == "scenes" else "training images, as often as it takes"
    return real_features(config, n, networks, shared=True), f"images {n} to {2 * n - 1} of {config['data']}, {known}"


def describe_captions(config, n):
    """Where the captions of held_out_task come from, for the card."""
    if config["data"] == "scenes":
        return f"held out: of scenes ({world_name(config)}, {config['scene_exam']}) that training never draws"
    return f"training captions: the first {n} of {config['data']}, none is held out"


def score_folders(args, metrics, networks, device):
    """The images in two folders, the real ones first: precision and recall need the order."""
    files, size = list_images(args.run[1])                     # paths, (width, height)
    reference, real_size, words = open_reference(args.run[0], compared(networks, metrics), shared=True)
    check_same_size(networks, real_size, size)                 # before the long work
    fake = {name: image_features(files, features, shared=True)
            for name, (features, _) in needed(networks, metrics).items()}
    if get_rank():
        return
    result = compare(reference, fake, metrics)                 # no captions: folders have none that this reads
    print(report(result))
    card = make_card(networks, device, n=len(files), reference=words, generated=f"{args.run[1]}, {size} px")
    write_result(card, {"reference": args.run[0], "run": args.run[1], "n": len(files), "metrics": result}, args.json)


def make_sheet(args, task, device):
    """A page of two runs' pictures of the same captions from the same noise, each at its own guidance unless given."""
    if os.path.exists(os.path.join(args.sheet, "key.json")):
        raise UserError(f"{args.sheet!r} holds a sheet already, whose key would be lost: give another folder")
    runs, images = [load_run(run, args, device) for run in args.run], []           # images: one list a run
    if len(sides := {config["resolution"] for _, config, _ in runs}) > 1:
        print(f"warning: pictures of {' and '.join(map(str, sorted(sides)))} px: raters may tell the runs by that")
    captions = (task or held_out_task(runs[0][1], args.n or 50)).captions[:args.n]
    for model, config, guidances in runs:
        if len(guidances) > 1:
            raise UserError(f"--guidance {args.guidance}: a sheet shows each run at one guidance: give one value")
        at = config | {"guidance": guidances[0]}               # each run's own
        parts = on_all_ranks(lambda rows: generate(model, at, captions, rows), chunks(len(captions)), "pairs")
        images.append([image for part in parts for image in part])                 # (H, W, 3) each
    if get_rank() == 0:                                        # the others only helped
        write_page(args.sheet, args.run, captions, images)     # sides by chance, the key apart
        print(f"{args.sheet}: {len(captions)} pairs. Give index.html to the raters and keep key.json; then\n"
              f"python eval.py --sheet {args.sheet} --ratings FILES")


# ----------------------------------------------------------------------------------------------------------------------
# python eval.py


def parse():
    """The command line. What cannot be meant is refused here, before any picture is made."""
    args, words = parser.parse_values()
    args.words = words
    if (args.vqa or args.answers) and not args.dsg:
        raise UserError("--vqa and --answers need questions: give --dsg FILE")
    least = {"n": 2, "seeds": 1, "steps": 1}
    if any(getattr(args, key) is not None and getattr(args, key) < low for key, low in least.items()):
        raise UserError(f"--n {args.n} --seeds {args.seeds} --steps {args.steps}: "
                        "give n of at least 2, seeds and steps of at least 1")
    if args.json and (os.path.isdir(args.json) or not os.path.isdir(os.path.dirname(args.json) or ".")):
        raise UserError(f"--json {args.json}: give the name of a file in a folder that exists")      # not after hours
    wanted = 2 if args.sheet and not args.ratings else 1       # at least so many runs or folders
    two = len(args.run) == 2 and args.dsg and not args.sheet
    if not args.ratings and (len(args.run) < wanted or len(args.run) > 2 or two):
        raise UserError(f"too {'many' if len(args.run) > wanted else 'few'} folders: give one run, or two folders of "
                        "images, the reference first, or two runs with --sheet")
    for value in parse_numbers(args.guidance, "--guidance") if args.guidance else ():
        check_range("guidance", value)
    kept = args.dsg or args.keep or args.sheet or args.ratings or "clip" in args.features.split(",")
    if args.prompts and not kept and all(METRICS[name][0] == "pictures" for name in parse_metrics(args)):
        raise UserError(f"--metrics {args.metrics}: captions of a file have no answers: add --keep FOLDER, or for the "
                        "CLIP score --features clip --weights FOLDER, or take fd,mmd")
    return args


def check_folders(args):
    """Two folders of images take neither runs nor what concerns the making of pictures."""
    if is_run(args.run[1]) or os.path.isdir(args.run[0]) and is_run(args.run[0]):
        raise UserError("one of the two is a run: give one run alone, two folders of images, or two runs with --sheet")
    of_runs = "n guidance sampler steps dtype style words prompts reference keep classes".split()
    if flags := [f"--{flag}" for flag in of_runs if getattr(args, flag)]:
        raise UserError(f"{' '.join(flags)}: two folders are compared as they are, with all images: leave that away")


def parse_metrics(args):
    """The metrics of --metrics, else the usual ones. Two folders have features and nothing else."""
    folders = len(args.run) == 2                               # no run among them
    known = [name for name, (kind, _) in METRICS.items() if not folders or kind in ("features", "logits")]
    usual = ("fd,mmd,pr,prdc" if folders else "zeroshot" if args.classes else "questions" if args.dsg
             else "fd,mmd" if args.prompts else ",".join(USUAL))
    return parse_words(args.metrics or usual, known, "--metrics")                  # in this order


def choose_program(args, device):
    """By the flags: answers, a sheet, two folders, or a run. Ratings of a sheet need no device (main)."""
    prompts = read_dsg(args.dsg)[:args.n] if args.dsg else None                    # with their questions
    if args.dsg and (args.answers or not is_run(args.run[0])): # pictures, or even answers, from elsewhere
        return score_answers(args.run, prompts, args.dsg, args.answers, args.vqa, device, args.json)
    asked_elsewhere = (args.keep or args.sheet) and not args.vqa
    vqa = open_vqa(args.vqa, device) if args.dsg and not asked_elsewhere else None
    task = dsg_task(prompts, vqa and vqa[0]) if args.dsg else prompts_task(args.prompts) if args.prompts else None
    if args.sheet:
        return make_sheet(args, task, device)
    metrics = parse_metrics(args)
    networks = open_networks(args.features, args.weights, bool(rows_of("logits", metrics)), device)
    if len(args.run) == 2:
        check_folders(args)
        return score_folders(args, metrics, networks, device)
    return score_run(args, metrics, networks, task, vqa, device)


def main():
    args = parse()
    if args.ratings:
        score_people(args.sheet, args.ratings, args.run, args.json)
        return
    rank, world, device = join(timeout=24 * 3600)              # seconds: a chunk of images may take long
    if rank:
        sys.stdout = open(os.devnull, "w")                     # one voice
    choose_program(args, device)
    if world > 1:
        exit_with(0)


if __name__ == "__main__":
    main()
