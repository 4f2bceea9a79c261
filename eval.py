"""
How good is a run: does the picture show what the caption says, and do the pictures look like the data?

    python eval.py out/toy/grow --n 500 --guidance 2,3,4      questions, Frechet distance and MMD; curves in guidance.png
    python eval.py out/toy/grow --metrics counting,zeroshot   counts by number; shape and colour told by the denoiser
    python eval.py RUN --prompts FILE --reference real/       your captions, one a line, against images of your own
    python eval.py RUN --dsg dsg-1k-anns.csv --vqa WEIGHTS    a network looks at each picture and answers questions (DSG)
    python eval.py real/ fake/ --features dino --weights W    two folders of images, in the features of a known network
    python eval.py RUN_A RUN_B --sheet sheet/                 a web page on which people compare the two, then
    python eval.py --sheet sheet/ --ratings FILES             what they said, and how far they agree
    torchrun --standalone --nproc-per-node 8 -- eval.py RUN   the same images and figures, made by eight devices; the -- keeps
                                                              torchrun from taking --n for its own

On `scenes` a judge without learned weights looks at each generated picture (nearest colour, connected components, best
matching shape) and answers the caption's questions. Beside each score stands its chance level: the same pictures judged
against other captions. Features named `random` come from a fixed random network: they compare only runs of this
repository at equal n, and no number made from them is FID. Every result ends with a card that says how it was made.

Where to read: "Metrics" are plain functions that need nothing else of this file. The judge and its questions measure
alignment, the networks turn images into features, and `evaluate` is where a run's pictures meet all of these. The rest
is files and people.
"""
import argparse
import glob
import hashlib
import itertools
import json
import os
import platform
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Batches, encode_captions, open_data
from lib.draws import normals
from lib.encoders import open_autoencoder
from lib.files import atomic_write, file_hash, free_name
from lib.images import IMAGES, pillow
from lib.networks import open_network, open_vqa, random_features, to_square
from lib.people import QUESTIONS, ratings_score, read_ratings, write_page
from lib.pictures import draw_tuning, to_tensor, to_uint8, write_png
from lib.questions import dsg_table, read_answers, read_dsg
from lib.scenes import counting, describe, judge, look
from lib.settings import UserError
from model import diffusion_loss, load, read_checkpoint
from sample import SAMPLERS, sample

# ---------------------------------------------------------------------------------------------------------------
# Metrics on features (n, D), answers or logits. All compute in float64, check their input first and raise ValueError. Features are
# what a network that was trained for something else makes of an image: pixels compared one by one would not tell like from unlike.
#
#   metric              what it asks                                                better   mind
#   frechet_distance    have both sets one mean and one covariance?                 lower    biased upward as 1 / n: compare at equal n only
#   mmd, kid            ... one mean of all products of up to three features?       lower    unbiased, so it may be negative
#   cmmd                ... one distribution, seen through a kernel of width 10?    lower    also on few images; biased by about 10 / n
#   precision_recall    is each fake near a real one; is each real near a fake?     higher   (real, fake): the other order swaps the two
#   prdc                the same by counts, which an outlier moves less             higher   may exceed 1 (density)
#   clip_score          does each image lie where its caption lies?                 higher   31, 0.31 and 0.78 are one result on three scales
#   inception_score     is each image of one class, all together of many?           higher   never looks at real images
#   dsg_score           which of the caption's questions does the picture answer?   higher   as good as whoever answers

BLOCK = 2048                                                   # rows at a time: 2048 x 2048 pairs are 34 MB, however many rows


def check(*sets, least=1):
    """
    Each set is (n >= least, D), finite, with one D for all. Unchecked, a NaN compares as False and D = 1 broadcasts.
    """
    for x in sets:
        if not torch.is_tensor(x) or x.ndim != 2 or x.is_complex() or not x.shape[1]:
            raise ValueError(f"expected a real tensor (rows, width), not {tuple(x.shape) if hasattr(x, 'shape') else type(x)}")
        if len(x) < least:
            raise ValueError(f"{len(x)} rows, but this metric needs at least {least}")
        if not all(torch.isfinite(rows).all() for rows in x.split(BLOCK)):
            raise ValueError("the values hold NaN or infinity: look at what produced them")
    if len({x.shape[1] for x in sets}) > 1:                    # as features of two networks have
        raise ValueError(f"widths {[x.shape[1] for x in sets]} differ: all sets must come from one network")


def feature_stats(x):
    """
    (n >= 2, D) -> mean (D,) and covariance (D, D), divisor n - 1 as np.cov. Centred first, so that a common offset
    costs no digits.
    """
    check(x, least=2)
    mu = sum(rows.double().sum(0) for rows in x.split(BLOCK)) / len(x)             # (D,)
    centred = (rows.double() - mu for rows in x.split(BLOCK))  # (p, D) each
    return mu, sum(c.T @ c for c in centred) / (len(x) - 1)    # (D,), (D, D)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """
    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) between two Gaussians (Dowson and Landau 1982; FID: Heusel et al. 2017).
    The last trace is the sum of singular values of S1^1/2 S2^1/2: other routes take roots of eigenvalues that are
    rounding noise, 1e-8 of the trace for each dimension without variance, this one 1e-9 in all. Nothing is added to the
    diagonals.
    """
    check(mu1[None], sigma1, mu2[None], sigma2)
    for sigma in (sigma1, sigma2):
        if len(sigma) != sigma.shape[1] or (sigma - sigma.T).abs().max() > 1e-6 * sigma.abs().max():
            raise ValueError(f"a covariance {tuple(sigma.shape)} must be square and symmetric")

    def root(sigma):
        values, vectors = torch.linalg.eigh(sigma)
        if values[0] < -1e-6 * values[-1].abs():               # rounding gives tiny negative ones, which count as 0
            raise ValueError(f"a covariance has no negative eigenvalue such as {values[0]:.3g}")
        return vectors * values.clamp(min=0).sqrt() @ vectors.T                    # (D, D)
    mu1, sigma1, mu2, sigma2 = (s.double() for s in (mu1, sigma1, mu2, sigma2))
    cross = torch.linalg.svdvals(root(sigma1) @ root(sigma2)).sum()                # tr (S1 S2)^1/2, never below 0
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def pair_sum(kernel, x, y):
    """
    Sum of kernel(a, b) over all pairs of rows of x (n, D) and y (m, D), in blocks; kernel: (p, D), (q, D) -> (p, q).
    """
    return sum(kernel(a.double(), b.double()).sum().item() for a in x.split(BLOCK) for b in y.split(BLOCK))


def mmd(x, y):
    """
    Unbiased squared MMD, mean k(x, x') + mean k(y, y') - 2 mean k(x, y), with the cubic kernel k = (x.y / D + 1)^3 over
    all rows at once: what kid's mean estimates (Binkowski et al. 2018, eq. 4). x (n, D), y (m, D). It may be negative,
    and is for equal sets: pairs of a row with itself are left out.
    """
    check(x, y, least=2)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3      # (p, q)
    own = lambda a: sum(((rows.double().square().sum(1) / a.shape[1] + 1) ** 3).sum().item() for rows in a.split(BLOCK))  # the diagonal
    within = lambda a: (pair_sum(kernel, a, a) - own(a)) / (len(a) * (len(a) - 1))
    return within(x) + within(y) - 2 * pair_sum(kernel, x, y) / (len(x) * len(y))


def kid(x, y, n_subsets=100, subset_size=1000, seed=0):
    """
    Kernel Inception distance (Binkowski et al. 2018): mean and standard deviation (ddof 0) of mmd over random subsets,
    drawn without replacement from one np.random.RandomState(seed), x before y, as torch-fidelity does. Not times 1000.
    """
    check(x, y, least=2)
    if n_subsets < 1 or not 2 <= subset_size <= min(len(x), len(y)):               # others shrink the subset without a word
        raise ValueError(f"{n_subsets} subsets of {subset_size} from {len(x)} and {len(y)} rows: subset_size is 2 to the smaller set")
    draws = np.random.RandomState(seed)                        # the old generator: others' figures come from it
    pick = lambda a: a[torch.from_numpy(draws.choice(len(a), subset_size, replace=False)).to(a.device)]
    values = [mmd(pick(x), pick(y)) for _ in range(n_subsets)]                     # x is drawn before y
    return float(np.mean(values)), float(np.std(values))


def cmmd(x, y):
    """
    1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), k = exp(-|a - b|^2 / (2 10^2)) over all pairs, a row with
    itself included: biased, >= 0, and 0 for equal sets (Jayasumana et al. 2024 and its code). Rows are meant to be CLIP
    image embeddings of length one; they are taken as they come. k is near 1, so k - 1 is summed: the three ones cancel.
    """
    check(x, y)
    kernel = lambda a, b: torch.expm1(squared_distances(a, b) / (-2 * 10 ** 2))    # k - 1, (p, q)
    mean = lambda a, b: pair_sum(kernel, a, b) / (len(a) * len(b))                 # over all pairs, a row with itself too
    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def squared_distances(a, b):
    """(p, D), (q, D) float64 -> (p, q), to 1e-16 of the squared lengths, so >= 0 but for rounding."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2) + a.square().sum(1)[:, None]


def radii(x, k):
    """(n,) squared distance from each row to its k-th nearest other row: the k + 1st, itself being the first."""
    found = []
    for a in x.split(BLOCK):
        nearest = [squared_distances(a.double(), b.double()).topk(min(k + 1, len(b)), largest=False).values for b in x.split(BLOCK)]  # of each block
        found.append(torch.cat(nearest, 1).topk(k + 1, largest=False).values[:, k])  # the nearest of the blocks' nearest
    return torch.cat(found)


def balls(centres, points, k, closed):
    """
    Around each of `centres` (n, D) a ball reaches to its k-th neighbour. How many balls hold each of `points` (m,), and
    how many points each ball holds (n,). `closed` counts points on the surface.
    """
    check(centres, points)
    if not 1 <= k < len(centres):
        raise ValueError(f"k = {k} neighbours among {len(centres)} rows: take k from 1 to {len(centres) - 1}")
    of_point, of_ball = points.new_zeros(len(points), dtype=torch.long), []
    for a, radius in zip(centres.split(BLOCK), radii(centres, k).split(BLOCK)):
        inside = []                                            # one (p, q) of booleans for each block of points
        for b in points.split(BLOCK):
            d = squared_distances(a.double(), b.double())      # (p, q)
            inside.append(d <= radius[:, None] if closed else d < radius[:, None])
        inside = torch.cat(inside, 1)                          # (p, m)
        of_point += inside.sum(0)                              # balls that hold the point
        of_ball.append(inside.sum(1))                          # points that the ball holds
    return of_point, torch.cat(of_ball)


def precision_recall(real, fake, k=3):
    """
    (precision, recall): the share of fake rows in some real row's ball, and of real rows in some fake row's ball; the
    balls are closed and reach to the k-th neighbour (Kynkaanniemi et al. 2019, eq. 1-2). real (n > k, D), fake (m > k,
    D).
    """
    share = lambda centres, points: (balls(centres, points, k, closed=True)[0] > 0).double().mean().item()  # of points that lie in a ball
    return share(real, fake), share(fake, real)                # precision asks of fake, recall of real


def prdc(real, fake, k=5):
    """
    {"precision", "recall", "density", "coverage"} with open balls (Naeem et al. 2020, eq. 1-4, and its code `prdc`).
    Density: real balls around a fake row, over k; coverage: real balls that hold a fake row. real (n > k, D), fake (m >
    k, D).
    """
    of_fake, of_real_ball = balls(real, fake, k, closed=False)                     # (m,), (n,)
    of_real, _ = balls(fake, real, k, closed=False)            # for recall the fake rows carry the balls
    share = lambda counts: (counts > 0).double().mean().item()                     # that lie in, or hold, at least one
    return {"precision": share(of_fake), "recall": share(of_real), "density": of_fake.double().mean().item() / k,
            "coverage": share(of_real_ball)}


def clip_score(image_embeddings, text_embeddings):
    """
    100 x mean cosine of each image (n, D) with its caption (n, D), not clamped. Hessel et al. 2021 clamp and scale by
    2.5.
    """
    check(image_embeddings, text_embeddings)
    if len(image_embeddings) != len(text_embeddings):
        raise ValueError(f"{len(image_embeddings)} images and {len(text_embeddings)} captions: give each image its caption")
    if not all(e.any(1).all() for e in (image_embeddings, text_embeddings)):       # 0 / 0 would be NaN
        raise ValueError("an embedding is all zeros: it has no direction")
    return 100 * F.cosine_similarity(image_embeddings.double(), text_embeddings.double(), eps=0).mean().item()


def inception_score(logits, splits=10):
    """
    Mean and standard deviation (ddof 0) over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016). Logits (n,
    classes) without bias, rows in random order; split i is rows i n // splits to (i + 1) n // splits, as in the first
    code.
    """
    check(logits, least=max(splits, 1))
    if splits < 1:
        raise ValueError(f"splits = {splits}: take at least 1")
    scores = []
    for i in range(splits):
        log_p = logits[i * len(logits) // splits:(i + 1) * len(logits) // splits].double().log_softmax(1)  # (p, classes): no log of a p that is 0
        marginal = log_p.logsumexp(0) - np.log(len(log_p))                         # (classes,): log of the mean p
        scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp().item())  # exp of the mean KL
    return float(np.mean(scores)), float(np.std(scores))


DISTANCES = {                                                  # metrics of two sets of features, the real one first
    "fd": lambda real, fake: frechet_distance(*feature_stats(real), *feature_stats(fake)),
    "mmd": mmd,
    "kid": lambda real, fake: dict(zip(("mean", "std"), kid(real, fake))),
    "pr": lambda real, fake: dict(zip(("precision", "recall"), precision_recall(real, fake))),
    "prdc": prdc}


def needed(networks, metrics):
    """The networks whose features something asks for: the Inception score and the CLIP score need no reference."""
    return {name: network for name, network in networks.items() if set(DISTANCES) & set(metrics) or name in ("logits", "clip")}


def compare(reference, fake, metrics, captions=None):
    """
    {metric_network: value} of {network: (n, D)} features of reference and generated images; captions (n, D) from CLIP.
    fd_inception is FID, fd_dino is FD-DINO; mmd on clip is CMMD. `logits` stand alone.
    """
    result = {}
    for name, x in fake.items():
        asked = [metric for metric in DISTANCES if metric in metrics and name != "logits"]
        if "fd" in asked and min(len(x), len(reference[name])) <= x.shape[1]:      # no covariance has full rank then
            print(f"biased: {min(len(x), len(reference[name]))} images for {x.shape[1]} features of {name}; compare such numbers at equal n only")
        try:
            for metric in asked:
                key, function = ("cmmd", cmmd) if (metric, name) == ("mmd", "clip") else (f"{metric}_{name}", DISTANCES[metric])
                result[key] = function(reference[name], x)
            if name == "logits":                               # shuffled as torch-fidelity does it: splits must not follow the order of files
                order = torch.from_numpy(np.random.RandomState(2020).permutation(len(x)))
                result["inception_score"] = dict(zip(("mean", "std"), inception_score(x[order])))
            if name == "clip" and captions is not None:
                result["clip_score"] = clip_score(x, captions)
        except ValueError as why:
            raise UserError(f"features {name}, {len(x)} images: {why}")
    return result


# ---------------------------------------------------------------------------------------------------------------
# Work shared by all devices: `torchrun --standalone --nproc-per-node 8 -- eval.py RUN ...`

CHUNK = 64                                                     # images at a time, and the unit in which ranks share them


def chunks(n):
    """
    Ranges that cover 0 to n - 1. They do not depend on the number of ranks, so neither does a single bit of an image.
    """
    return [range(k, min(k + CHUNK, n)) for k in range(0, n, CHUNK)]


def on_all_ranks(work, jobs, ranks, label=""):
    """
    [work(job) for job in jobs], every world-th job done here: ranks = (rank, world). Rank 0 gets all results, in order;
    the others get their own. One rank alone touches nothing of torch.distributed.
    """
    (rank, world), jobs = ranks, list(jobs)                    # jobs may be a generator
    mine = tqdm(range(rank, len(jobs), world), label, leave=False, disable=True if rank else None)  # in turns: all ranks end together
    done = {k: work(jobs[k]) for k in mine}
    if world > 1:                                              # nothing else is ever sent between ranks
        everyone = None if rank else [None] * world
        torch.distributed.gather_object(done, everyone)
        done = {k: part for parts in everyone or [done] for k, part in parts.items()}  # rank 0 has all
    return [done[k] for k in sorted(done)]


def join_ranks():
    """
    (rank, world) of this process under torchrun, else (0, 1). Over gloo also on GPUs: only finished results are
    gathered.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:              # torchrun sets it
        return 0, 1
    torch.distributed.init_process_group("gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))   # which "cuda" means from now on
    rank = torch.distributed.get_rank()
    if rank:
        sys.stdout = open(os.devnull, "w")                     # one voice
    return rank, torch.distributed.get_world_size()


# ---------------------------------------------------------------------------------------------------------------
# Folders of images, and the features of a reference, kept so that they are computed once. What a file may stand for is checked
# by hashes: features of another network or of other pixels would give figures that look alike and mean nothing.


def list_images(path):
    """The image files under `path`, all readable and of one size (width, height), at least two of them."""
    files = sorted(f for f in glob.glob(os.path.join(glob.escape(path), "**"), recursive=True) if f.lower().endswith(IMAGES))
    if len(files) < 2:
        raise UserError(f"{len(files)} images under {path!r}: a distance between sets needs at least 2 ({' '.join(IMAGES)})")
    sizes = {}
    for file in files:
        try:
            with pillow().open(file) as image:
                sizes.setdefault(image.size, file)             # from the header alone
        except Exception:                                      # pillow raises many kinds on bytes that are no image
            raise UserError(f"{file!r} cannot be read as an image: replace or remove it")
    if len(sizes) > 1:
        (a, b), (one, other) = list(sizes.values())[:2], list(sizes)[:2]           # a file of each size
        raise UserError(f"images of {len(sizes)} sizes under {path!r}, such as {a!r} {one} and {b!r} {other}: crop and resize them alike first")
    return files, next(iter(sizes))


def read_image(file):
    """(H, W, 3) uint8; transparency is dropped, as pytorch-fid does."""
    try:
        with pillow().open(file) as image:
            return np.asarray(image.convert("RGB"))            # grey and palette images too
    except Exception as e:
        raise UserError(f"{file!r} breaks off ({e}): replace or remove it")


@torch.no_grad()
def folder_features(files, features, ranks=(0, 1)):
    """(n, D) on the CPU, read and computed a chunk at a time, so that the images need not fit into memory."""
    work = lambda rows: features(np.stack([read_image(files[i]) for i in rows])).cpu()  # (B, D)
    return torch.cat(on_all_ranks(work, chunks(len(files)), ranks, "features") or [torch.zeros(0)])  # of a rank without a chunk: none


def fingerprint(files):
    """
    sha256 over the names and contents of files in order: it changes with any image that is added, renamed or edited.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{os.path.basename(file)} {file_hash(file)}\n".encode())
    return digest.hexdigest()


def open_reference(path, networks, ranks=(0, 1)):
    """
    ({network: (n, D)}, size of the images or None, words for the card) of a folder, or of the one file that an earlier
    call kept of it. The features of a folder are kept beside it under a name with the hashes of network and images.
    """
    networks = {name: network for name, network in networks.items() if name != "logits"}
    if os.path.isfile(path):
        kept = {name: read_features(path, about) for name, (_, about) in networks.items()}
        size = next((tuple(k["size"]) for k in kept.values()), None)
        return {name: k["features"] for name, k in kept.items()}, size, f"features kept in {path}, sha256 {file_hash(path)}"
    files, size = list_images(path)
    images, features = fingerprint(files), {}                  # of the pixels' files
    for name, (network, about) in networks.items():
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()  # resizing and range count too
        file = f"{os.path.normpath(path)}.{name}-{digest[:12]}-{images[:12]}.pt"
        if os.path.isfile(file):
            print(f"{name} features of {path} from {file}")
            features[name] = read_features(file, about)["features"]
            continue
        x = folder_features(files, network, ranks)
        if not ranks[0]:                                       # the other ranks only help to compute
            features[name] = x.float()
            write_features(file, {"features": features[name], "network": about, "size": list(size), "images": images})
    return features, size, f"{len(files)} images of {path}, {size} px, sha256 {images}"


def write_features(file, content):
    """Write them beside the folder, as a whole; a folder that cannot be written next to is no reason to stop."""
    try:
        atomic_write(file, lambda f: torch.save(content, f))
    except (OSError, RuntimeError) as e:
        print(f"the features are not kept in {file}: {e}")


def read_features(file, about):
    """What `write_features` wrote, if it was made by this very network in this very way. Nothing in it is executed."""
    try:
        kept = torch.load(file, weights_only=True)             # which runs no code
        check(kept["features"], least=2)
        made, _ = kept["network"], kept["size"]                # a KeyError where they lack
    except Exception as e:
        raise UserError(f"{file!r} holds no features that were kept here ({type(e).__name__}: {e}): give the folder of images, or another file")
    if made != about:                                          # another network, weights or resizing: figures that look alike and are not
        other = next(k for k in {**about, **made} if about.get(k) != made.get(k))
        raise UserError(f"{file!r} was made with {other} = {made.get(other)!r}, not {about.get(other)!r}: give the folder of images instead")
    return kept


def same_size(networks, one, other):
    """Random features see pixels as they are, so two sets must have one size; the other networks resize."""
    if "random" in networks and None not in (one, other) and tuple(one) != tuple(other):
        raise UserError(f"images of {one} and {other} px: random features depend on the size; resize one set")


def score_folders(real, fake, networks, metrics, ranks=(0, 1)):
    """
    ({metric: value}, facts for the card) of the images in two folders. `real` is the reference: precision and recall
    need the order.
    """
    files, size = list_images(fake)
    reference, real_size, words = open_reference(real, networks if set(DISTANCES) & set(metrics) else {}, ranks)
    same_size(networks, real_size, size)                       # before the long work
    made = {name: folder_features(files, features, ranks) for name, (features, _) in needed(networks, metrics).items()}
    return {} if ranks[0] else compare(reference, made, metrics), {"n": len(files), "reference": words, "generated": f"{fake}, {size} px"}


# ---------------------------------------------------------------------------------------------------------------
# What a run is asked to draw, and who judges it. A task is (captions, names of the pictures, see, score): see(image, i) ->
# what is found in the i-th picture, (H, W, 3) uint8; score(all that was found, metrics) -> {"questions": ..., "counting": ...}.

def held_out(config):
    """
    Scenes that training never draws (a caption may occur in both), or the images of the folder that it was trained on.
    """
    return open_data(config).held_out()


def held_out_task(config, n):
    """The captions of n held-out scenes, whose pictures the judge looks at. A folder's captions have no judge."""
    world, judged = held_out(config), config["data"] == "scenes"                   # only scenes know what is true
    scenes = [world.scene(i) for i in range(n)] if judged else []
    see = lambda image, i: look(image, world.cycles) if judged else None           # (ground, objects)

    def score(seen, metrics):
        result = {"questions": judge(world, scenes, seen)} if judged and "questions" in metrics else {}
        return result | ({"counting": counting(scenes, seen)} if judged and "counting" in metrics else {})
    return [world.caption(i % len(world)) for i in range(n)], numbered(n), see, score


def numbered(n):
    """Names of pictures that have no name: 00000, 00001 ..."""
    return [f"{i:05d}" for i in range(n)]


def prompts_task(file):
    """Captions from a file, one a line; a blank line is the null caption. Nobody judges them."""
    try:
        with open(file, encoding="utf-8") as f:
            captions = [line.strip() for line in f.read().splitlines()]            # blank lines stay: they are null captions
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file!r} cannot be read ({e}): give a text file, one caption a line")
    if not any(captions):
        raise UserError(f"{file!r} holds no caption: write one a line")
    return captions, numbered(len(captions)), lambda image, i: None, lambda seen, metrics: {}


def with_kept_pictures(task, folder, ranks=(0, 1)):
    """The task, with every picture kept as folder/NAME.png when it is seen, for other programs to look at."""
    captions, names, see, score = task
    os.makedirs(folder, exist_ok=True)
    if not ranks[0] and os.listdir(folder):                    # long before any rank has drawn its first one
        raise UserError(f"{folder!r} is not empty: give a new folder, so that it holds the pictures of one call alone")
    def write_and_see(image, i):
        write_png(os.path.join(folder, f"{names[i]}.png"), image)
        return see(image, i)
    return captions, names, write_and_see, score


# ---------------------------------------------------------------------------------------------------------------
# Questions about real images: Davidsonian scene graphs (DSG, Cho et al. 2024), in the columns of Greedy Growing, Table 6

def dsg_task(prompts, ask):
    """The pictures' captions are the prompts; `ask`, where there is one, is asked each question about its picture."""
    see = lambda image, i: {q: ask(image, text) for q, text in prompts[i]["questions"].items()} if ask else None
    score = lambda seen, metrics: {"questions": dsg_table(prompts, seen)} if ask and "questions" in metrics else {}
    return [p["text"] for p in prompts], [p["item"] for p in prompts], see, score


def find_images(folder, prompts):
    """The file of each prompt in a folder of pictures from elsewhere: ITEM.png, or another known ending."""
    files = [next((f for end in IMAGES if os.path.isfile(f := os.path.join(folder, p["item"] + end))), None) for p in prompts]
    if lacking := [p["item"] for p, f in zip(prompts, files) if not f]:
        raise UserError(f"{folder!r} lacks {len(lacking)} of {len(prompts)} pictures, such as {lacking[0]}.png: name each after its item_id")
    return files


def score_dsg(args, prompts, device, ranks):
    """Answers from a file, or of a network about a folder of pictures from elsewhere."""
    if args.answers:
        said, about = read_answers(args.answers, prompts), {"answers": f"{args.answers}, sha256 {file_hash(args.answers)}"}
    else:
        files, (ask, about) = find_images(args.run[0], prompts), open_vqa(args.vqa, device)
        _, _, see, _ = dsg_task(prompts, ask)
        work = lambda rows: [see(read_image(files[i]), i) for i in rows]
        said = sum(on_all_ranks(work, chunks(len(files)), ranks, "questions"), [])
    if ranks[0]:
        return
    result = {"questions": dsg_table(prompts, said)}
    print(report(result))
    card = make_card({"vqa": (None, about)}, device, n=len(prompts), dsg=f"{args.dsg}, sha256 {file_hash(args.dsg)}", about=args.run[0])
    tell(card, {"run": args.run[0], "n": len(prompts), "metrics": result, "answers": {p["item"]: a for p, a in zip(prompts, said)}}, args.json)


# ---------------------------------------------------------------------------------------------------------------
# The denoiser as a classifier (Li et al. 2023; Clark and Jaini 2023): the caption under which its loss is lowest


@torch.no_grad()
def best_caption(model, config, image, text, number, seed=0, draws=16):
    """
    Index of the row of text (options, L) or (options, L, E) under which the mean loss of image (H, W, 3) uint8 is
    lowest. All options meet the same `draws` noises, at times spread evenly over [0, 1]: differences in noise would
    drown those in words.
    """
    device = next(model.parameters()).device
    x = open_autoencoder(config, device).encode(to_tensor(image[None]).to(device)) # (1, C, H, W): pixels, or latents
    times = ((torch.arange(draws) + 0.5) / draws).to(device)                       # (draws,)
    eps = normals([("zeroshot", seed, number, k) for k in range(draws)], x.shape[1:], device)    # (draws, C, H, W)
    loss = [diffusion_loss(model, x.expand_as(eps), row.expand(draws, *row.shape[1:]), times, eps, config).mean() for row in text.split(1)]
    return int(torch.stack(loss).argmin())                     # the first of equals


def accuracy(guesses, classes):
    """Of [(guess, truth)] -> {class: share told rightly}, with "mean" over classes and "chance"."""
    right = {c: [g == t for g, t in guesses if t == c] for c in classes}           # by the true class
    table = {c: float(np.mean(r)) for c, r in right.items() if r}                  # a class that was not drawn is left out
    return table | {"mean": float(np.mean(list(table.values()))), "chance": 1 / len(classes)}


def zeroshot(model, config, world, n, seed=0, draws=16, ranks=(0, 1)):
    """
    On n held-out scenes of a single group, among captions that differ in one word: {"shape": {class: accuracy, "mean",
    "chance"}, "colour": ...}.
    """
    device, kinds = next(model.parameters()).device, {"shape": world.shapes, "colour": world.colours}  # what is asked, and the classes
    single = itertools.islice((i for i in itertools.count() if len(world.scene(i)["groups"]) == 1), n)  # the first n of them

    def guess(i):
        (group,), image, told = world.scene(i)["groups"], world.image(i, config["resolution"]), {}
        for kind, options in kinds.items():
            text = encode_captions([describe(dict(world.scene(i), groups=[dict(group, **{kind: o})])) for o in options], config).to(device)
            told[kind] = options[best_caption(model, config, image, text, i, seed, draws)], group[kind]
        return told
    told = on_all_ranks(guess, single, ranks, "zero-shot")
    return {kind: accuracy([t[kind] for t in told], options) for kind, options in kinds.items()}


def zeroshot_folder(model, config, folder, template, n, seed=0, draws=16, ranks=(0, 1)):
    """
    On n images of folder/CLASS/*, evenly many of each class (rounded up): {class: accuracy, "mean", "chance"}. The
    caption is the `template` with the class in place of {}, an underscore being a space; a picture's centre square is
    shown.
    """
    classes = sorted(d for d in os.listdir(folder) if os.path.isdir(os.path.join(folder, d))) if os.path.isdir(folder) else []
    files = {c: sorted(f for f in glob.glob(os.path.join(glob.escape(folder), glob.escape(c), "*")) if f.lower().endswith(IMAGES)) for c in classes}
    if len(classes) < 2 or not all(files.values()) or "{}" not in template:
        raise UserError(f"{folder!r} holds classes {classes}, template {template!r}: give FOLDER/CLASS/*.png for two classes or more, and a {{}}")
    captions = [template.replace("{}", c.replace("_", " ")) for c in classes]
    text = encode_captions(captions, config).to(next(model.parameters()).device)   # (classes, L)
    chosen = [(f, c) for c in classes for f in files[c][:-(-n // len(classes))]]

    def guess(number):
        file, truth = chosen[number]                           # a class is its folder's name
        image = to_square(read_image(file)[None], config["resolution"], crop=True)[0].permute(1, 2, 0).byte().numpy()
        return classes[best_caption(model, config, image, text, number, seed, draws)], truth
    return accuracy(on_all_ranks(guess, range(len(chosen)), ranks, "zero-shot"), classes)


# ---------------------------------------------------------------------------------------------------------------
# People compare two runs (Greedy Growing, Sec. 6.2): same caption, same noise, names hidden, three answers to two questions

def write_sheet(args, task, device, ranks):
    """
    A sheet of the two runs' pictures, for the same captions from the same noise, each with its own guidance unless
    told.
    """
    if os.path.exists(os.path.join(args.sheet, "key.json")):
        raise UserError(f"{args.sheet!r} holds a sheet already, whose key would be lost: give another folder")
    loaded = [load(run, device) for run in args.run]
    if len(sides := {config["resolution"] for _, config in loaded}) > 1:
        print(f"warning: pictures of {' and '.join(map(str, sorted(sides)))} px: raters may tell the runs by their size")
    captions = (task or held_out_task(loaded[0][1], args.n or 50))[0][:args.n]
    (guidance, *more), images = guidances(args.guidance, [None]), []               # None: each run its own
    if more:
        raise UserError(f"--guidance {args.guidance}: a sheet shows each run at one guidance: give one value")
    for model, config in loaded:
        work = lambda rows: draw(model, config, captions, rows, 0, args.steps, guidance, args.sampler)
        images.append([image for part in on_all_ranks(work, chunks(len(captions)), ranks, "pairs") for image in part])
    if not ranks[0]:
        write_page(args.sheet, args.run, captions, images)
        print(f"{args.sheet}: {len(captions)} pairs. Give index.html to the raters and keep key.json; then\n"
              f"python eval.py --sheet {args.sheet} --ratings FILES")


def rate(args):
    """
    Win rates, neutral share and agreement of the raters' answer files. Without --sheet, key.json lies beside the first
    of them.
    """
    key, votes = read_ratings(args.sheet or os.path.dirname(args.ratings[0]) or ".", args.ratings)
    if args.run and args.run != key["runs"]:
        raise UserError(f"the sheet compares {' and '.join(key['runs'])}, not {' and '.join(args.run)}: leave the runs away")
    if not votes.sum((1, 2)).all():
        raise UserError("a question has no answer at all: answer at least one pair")
    result = {q: ratings_score(votes[k:k + 1]) for k, q in enumerate(QUESTIONS)} | {"together": ratings_score(votes)}
    print(f"A is {key['runs'][0]}, B is {key['runs'][1]}; {len(args.ratings)} raters, {int((votes.sum((0, 2)) > 0).sum())} pairs; "
          "alpha is Krippendorff's, ordinal; 95 % intervals by bootstrap over pairs")
    for q, figures in result.items():
        print(f"{q:12s}" + "  ".join(f"{k} {v['value']:.3f} [{v['interval'][0]:.3f}, {v['interval'][1]:.3f}]" for k, v in figures.items()))
    answers = {file: f"sha256 {file_hash(file)}" for file in args.ratings}
    card = {"sheet": key["sheet"], "answers": answers, "interval": "95 %, bootstrap over pairs, seed 0"}
    tell(card, {"runs": key["runs"], "raters": len(args.ratings), "metrics": result}, args.json)


# ---------------------------------------------------------------------------------------------------------------
# Evaluating a run

RANDOM = {"random": (random_features, {})}


def draw(model, config, captions, rows, seed=0, steps=None, guidance=None, sampler=None, bar=False, poll=lambda: None):
    """
    Pictures of captions[rows] as (len(rows), H, W, 3) uint8; each depends on its place in the whole list, not on
    `rows`.
    """
    return to_uint8(sample(model, config, captions[rows.start:rows.stop], seed, rows.start, steps, guidance, sampler, bar=bar, poll=poll))


def each_network(networks, images):
    """(B, H, W, 3) uint8 -> {network: (B, D)}, on the CPU."""
    return {name: features(images).cpu() for name, (features, _) in networks.items()}


@torch.no_grad()
def real_features(config, n, networks, ranks=(0, 1)):
    """
    {network: (n, D)} of n other real images than those whose captions held_out takes; a folder of fewer than 2 n is
    gone round again.
    """
    networks = {name: network for name, network in networks.items() if name != "logits"}
    plain = config | {"aspects": "", "flip": False, "jitter": 0.0}                 # augmented images would not be real
    batches = Batches(held_out(config), plain, filtered=False)                     # names and passes over what cannot be decoded
    images = lambda rows: np.stack([batches.sample(0, (n + i) % len(batches.data))[0] for i in rows])  # (B, H, W, 3)
    parts = on_all_ranks(lambda rows: each_network(networks, images(rows)), chunks(n), ranks, "real images")
    return {name: torch.cat([p[name] for p in parts] or [torch.zeros(0)]) for name in networks}    # of a rank without a chunk: none


@torch.no_grad()
def evaluate(model, config, n, guidance=None, steps=None, sampler=None, seed=0, metrics=("questions", "fd", "mmd"), bar=True,
             networks=RANDOM, task=None, reference=None, ranks=(0, 1), poll=lambda: None):
    """
    {metric: value} of n images, for held-out captions or those of `task`, against n real images or the features
    `reference` {network: (m, D)}. Each chunk is drawn, looked at, turned into features and forgotten, so n is not bound
    by memory. CLIP among the networks {name: (features, about)} adds the CLIP score. Of several ranks = (rank, world)
    each does its share, and rank 0 alone gets the result, the others {}. None for guidance, steps or sampler means the
    run's own. `poll` is called between the steps of the sampler and may raise, as training does at a signal.
    """
    captions, _, see, score = task or held_out_task(config, n)
    captions, compared = captions[:n], bool(set(DISTANCES) & set(metrics))
    networks = needed(networks, metrics)

    def work(rows):                                            # a chunk of at most 64 places in the list of captions
        images = draw(model, config, captions, rows, seed, steps, guidance, sampler, bar and not ranks[0], poll)
        seen = [see(image, i) for image, i in zip(images, rows)]                   # objects, or answers
        said = networks["clip"][0](captions[rows.start:rows.stop]).cpu() if "clip" in networks else None
        return seen, each_network(networks, images), said
    if compared and reference is None:
        reference = real_features(config, n, networks, ranks)
    parts = on_all_ranks(work, chunks(len(captions)), ranks, "images")             # in order
    if ranks[0]:
        return {}
    seen, features, said = zip(*parts)
    made = {name: torch.cat([f[name] for f in features]) for name in networks}     # (n, D) each
    return score(sum(seen, []), metrics) | compare(reference, made, metrics, torch.cat(said) if "clip" in networks else None)


def flat(result, before=""):
    """{"a": {"b": 1}} -> {"a b": 1}; the questions keep their plain names."""
    rows = {}
    for key, value in result.items():
        name = before + key
        rows |= flat(value, "" if key == "questions" else name + " ") if isinstance(value, dict) else {name: value}
    return rows


def report(result):
    """One metric result as a line for people, dsg with its chance level first."""
    q = result.get("questions", {})
    chance = f" (chance {q['chance_dsg']:.3f})" if "chance_dsg" in q else ""
    parts = [f"dsg {q['dsg']:.3f}{chance}"] if q else []
    parts += [f"{k} {v:.3f}" for k, v in q.items() if "dsg" not in k]
    return "  ".join(parts + [f"{k} {v:.4f}" for k, v in flat({k: v for k, v in result.items() if k != "questions"}).items()])


def over_seeds(results, how):
    """Results of several seeds -> one of the same shape, with how(values) in each place."""
    if isinstance(results[0], dict):
        return {k: over_seeds([r[k] for r in results if k in r], how) for k in results[0]}
    return float(how(results))


def tuning(points):
    """
    Curves over guidance from [(guidance, metrics)], and the range between the optimum of the first Frechet distance and
    that of the first MMD, where to look for a good value (Greedy Growing, Sec. 5.3, with FD-DINO and CMMD).
    """
    points = sorted(points, key=lambda p: p[0])
    curves = {k: [flat(m)[k] for _, m in points] for k in flat(points[0][1])}      # by metric, over guidance
    guidance = [g for g, _ in points]
    first = lambda *starts: next((c for start in starts for c in curves if c.startswith(start)), None)
    ends = [k for k in (first("fd_dino", "fd_"), first("cmmd", "mmd_")) if k]
    best = {k: guidance[int(np.argmin(curves[k]))] for k in ends}                  # lower is better
    if len(best) == 2:
        low, high = sorted(best.values())
        where = ", ".join(f"lowest {k} at {g:g}" for k, g in best.items())
        print((f"guidance between {low:g} and {high:g}: " if low < high else f"guidance {low:g}: ") + where)
    for k in ends:
        if best[k] in (guidance[0], guidance[-1]):             # then it is no optimum
            print(f"  lowest {k} lies at the end of the values tried: try further ones")
    return {"guidance": guidance, "curves": curves, "optimum": best, "range": sorted(best.values()) if len(best) == 2 else None}


def make_card(networks, device, **rest):
    """What makes a number comparable. Printed with every result, and kept in the JSON."""
    return rest | {"networks": {name: about for name, (_, about) in networks.items()}, "images": "rounded and clamped to uint8 before any metric",
                   "device": torch.cuda.get_device_name() if device == "cuda" else device, "threads": torch.get_num_threads(),
                   "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


def tell(card, figures, file):
    """
    Print the card, and write it with the figures to `file`, if any, as JSON; an older file of that name steps aside.
    """
    for key, value in flat(card).items():
        print(f"  {key:26s} {value}")
    if not file:
        return
    if os.path.exists(file):                                   # nothing is overwritten without a word
        os.replace(file, older := free_name(file))
        print(f"the older {file} is now {older}")
    text = json.dumps(figures | {"card": card}, indent=1)      # under this very name programs look for it
    atomic_write(file, lambda f: f.write(text.encode()))


def guidances(text, default):
    """The values of --guidance."""
    try:
        values = [float(g) for g in text.split(",")] if text else default
    except ValueError:
        values = [np.nan]
    if text and not np.isfinite(values).all():                 # float() takes "nan" and "inf" as well
        raise UserError(f"--guidance {text}: give numbers, such as 1,2,4")
    return values


def run_reference(args, config, networks, metrics, n, ranks):
    """({network: (n, D)} or None, words for the card): of --reference, else of n real images."""
    if not set(DISTANCES) & set(metrics):
        return None, "none: nothing is compared"
    if args.reference:
        reference, size, words = open_reference(args.reference, networks, ranks)
        same_size(networks, size, (config["resolution"],) * 2)
        return reference, words
    which = ", which training never draws" if config["data"] == "scenes" else ", from the first again after the last"
    return real_features(config, n, networks, ranks), f"images {n} to {2 * n - 1} of {config['data']}{which}"


def run_zeroshot(args, model, config, n, seed, ranks):
    """Zero-shot classification of --classes, else of scenes."""
    if args.classes:
        return zeroshot_folder(model, config, args.classes, args.template, n, seed, ranks=ranks)
    if config["data"] != "scenes":
        raise UserError("--metrics zeroshot: this run has seen no scenes: give --classes FOLDER with FOLDER/CLASS/*.png")
    return zeroshot(model, config, held_out(config), n, seed, ranks=ranks)


def score_run(args, networks, metrics, task, about, device, ranks):
    """
    All guidances and seeds of one run: mean and spread (standard deviation, ddof 0) over seeds, curves over guidance,
    card. `task` is None for held-out captions; `about` is what the card says of the network that answers questions, if
    one does.
    """
    step, (model, config) = read_checkpoint(args.run[0])["step"], load(args.run[0], device)      # the step alone: moments are large
    values, n = guidances(args.guidance, [config["guidance"]]), args.n or (len(task[0]) if task else 1000)
    steps, sampler, prompts = args.steps or config["sample_steps"], args.sampler or config["sampler"], args.prompts or args.dsg
    if task and n > len(task[0]):
        raise UserError(f"--n {n}: {prompts} holds {len(task[0])} captions; give at most so many")
    if args.keep and len(values) * args.seeds > 1:
        raise UserError(f"--keep {args.keep}: {len(values)} guidances and {args.seeds} seeds would overwrite each other: give one value of each")
    task = task or held_out_task(config, n)
    task = with_kept_pictures(task, args.keep, ranks) if args.keep else task
    reference, words = run_reference(args, config, networks, metrics, n, ranks)    # once, for all guidances and seeds
    # guidance plays no part in it: once for each seed
    zeroshots = [run_zeroshot(args, model, config, n, seed, ranks) for seed in range(args.seeds)] if "zeroshot" in metrics else []
    rows, points = [], []                                      # a row per image set; a point per guidance: (guidance, mean, spread)
    for guidance in values:
        for seed in range(args.seeds):                         # the same noise for every guidance: the curves differ by guidance alone
            result = {}
            if set(metrics) != {"zeroshot"}:                   # which draws no pictures
                result = evaluate(model, config, n, guidance, steps, sampler, seed, metrics, True, networks, task, reference, ranks)
            result |= {"zeroshot": zeroshots[seed]} if zeroshots else {}
            rows.append({"guidance": guidance, "seed": seed, "metrics": result})
            print(f"guidance {guidance:g}  seed {seed}  {report(result)}", flush=True)
        results = [r["metrics"] for r in rows[-args.seeds:]]   # all seeds of this guidance
        points.append((guidance, over_seeds(results, np.mean), over_seeds(results, np.std) if args.seeds > 1 else None))
        if args.seeds > 1:
            print(f"guidance {guidance:g}  mean    {report(points[-1][1])}\nguidance {guidance:g}  spread  {report(points[-1][2])}")
    if ranks[0]:
        return
    file = os.path.join(args.run[0], "last.pt")                # of a run folder; else a checkpoint itself was given
    card = make_card(networks | ({"vqa": (None, about)} if about else {}), device, n=n, reference=words,
                     captions=f"{prompts}, sha256 {file_hash(prompts)}" if prompts else "held out",
                     checkpoint=file_hash(file if os.path.exists(file) else args.run[0]), checkpoint_step=step, ema=True, guidance=values,
                     sampler=sampler, steps=steps, seeds=list(range(args.seeds)), processes=ranks[1],
                     **({"classes": f"{args.classes}, {args.template!r}"} if args.classes else {}))
    finish(args, card, config, rows, points)


def finish(args, card, config, rows, points):
    """The last words about a run: the best guidance, the curves, the card, the JSON."""
    asked = "questions" in points[0][1]                        # then the highest dsg is best, else the lowest Frechet distance
    lowest = lambda p: -next((v for k, v in flat(p[1]).items() if k.startswith("fd_")), 0)
    best = max(points, key=lambda p: p[1]["questions"]["dsg"] if asked else lowest(p))
    print(f"{card['n']} images, {card['sampler']}, {card['steps']} steps, EMA weights of step {card['checkpoint_step']}"
          + f"; {'highest dsg' if asked else 'lowest fd'} at guidance {best[0]:g}" * (len(points) > 1))
    figures = {"run": args.run[0], "n": card["n"], "guidance": best[0], "seeds": args.seeds, "metrics": best[1], "spread": best[2],
               "all": rows, "config": config}
    if len(points) > 1:
        figures["tuning"] = tuning([(g, mean) for g, mean, _ in points])
        draw_tuning(figures["tuning"], free_name(os.path.join(args.run[0] if os.path.isdir(args.run[0]) else ".", "guidance.png")))
    tell(card, figures, args.json)


# ---------------------------------------------------------------------------------------------------------------
# python eval.py

METRICS = ("questions", *DISTANCES, "is", "counting", "zeroshot")


def parse():
    """The command line. What cannot be meant is refused here, before any picture is drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", nargs="*", help="a run folder such as out/toy/grow; or two: folders of images, reference first, or runs with --sheet")
    add("--n", type=int, help="images; default 1000, or all captions of a file, or 50 pairs of a sheet")
    add("--metrics", help=f"of {','.join(METRICS)}; default questions,fd,mmd; for folders fd,mmd,pr,prdc")
    add("--features", default="random", help="of random,inception,dino,clip: one or several")
    add("--weights", default="", help="file or folder with the weights, one for each of --features that is not random")
    add("--guidance", help="one value or several, such as 1,2,4; default: the run's own")
    add("--sampler", choices=list(SAMPLERS), help="default: the run's own")
    add("--steps", type=int, help="default: the run's own")
    add("--seeds", type=int, default=1, help="repeat with seeds 0 to k-1 and tell mean and spread")
    add("--prompts", metavar="FILE", help="captions, one a line; a blank line is the null caption")
    add("--reference", metavar="PATH", help="folder of images to compare a run with, or the .pt file that was kept of one")
    add("--dsg", metavar="FILE", help="questions about pictures, in the format of dsg-1k-anns.csv; of a run, or of a folder with ITEM.png")
    add("--vqa", metavar="FOLDER", help="BLIP weights that answer them; without it, with --keep, the pictures are drawn for others to ask about")
    add("--answers", metavar="FILE", help="or their answers: CSV with item_id, question_id, answer")
    add("--keep", metavar="FOLDER", help="keep the pictures of a run there, for other programs")
    add("--classes", metavar="FOLDER", help="FOLDER/CLASS/*.png to be told apart by --metrics zeroshot; default: scenes")
    add("--template", default="a photo of a {}", help="the caption of a class")
    add("--sheet", metavar="FOLDER", help="write a page there on which people compare two runs")
    add("--ratings", metavar="FILE", nargs="+", help="the files that this page saved: win rates and agreement")
    add("--json", help="write the figures to this file")
    args = parser.parse_intermixed_args()                      # runs may follow flags
    if (args.vqa or args.answers) and not args.dsg:
        raise UserError("--vqa and --answers need questions: give --dsg FILE")
    least = {"n": 2, "seeds": 1, "steps": 1}
    if any((getattr(args, key) is not None and getattr(args, key) < low) for key, low in least.items()):
        raise UserError(f"--n {args.n} --seeds {args.seeds} --steps {args.steps}: give n of at least 2, seeds and steps of at least 1")
    if args.json and (os.path.isdir(args.json) or not os.path.isdir(os.path.dirname(args.json) or ".")):
        raise UserError(f"--json {args.json}: give the name of a file in a folder that exists")  # now, rather than after hours
    wanted = 2 if args.sheet and not args.ratings else 1       # at least so many runs or folders
    if not args.ratings and (len(args.run) < wanted or len(args.run) > 2 or len(args.run) == 2 and args.dsg and not args.sheet):
        raise UserError(f"too {'many' if len(args.run) > wanted else 'few'} folders: give one run, or two folders of images, the reference first, "
                        "or two runs with --sheet")
    return args


def pick_words(text, known, flag):
    """The words of a comma-separated flag, all of them known."""
    words = [w for w in text.split(",") if w]
    if not words or not set(words) <= set(known):
        raise UserError(f"{flag} {text}: take some of {','.join(known)}")
    return words


def is_run(path):
    """A run folder or a checkpoint, rather than a folder of images."""
    return os.path.isfile(path) or any(os.path.exists(os.path.join(path, name)) for name in ("last.pt", "about.pt"))   # a sharded one is a folder


def open_networks(args, metrics, device):
    """{name: (features, about)} of --features, with the logits of the Inception score where it is asked for."""
    names = pick_words(args.features, ["random", "inception", "dino", "clip"], "--features")
    weights = iter([w for w in args.weights.split(",") if w])  # in the order of --features
    files = {name: None if name == "random" else next(weights, None) for name in names}
    if "is" in metrics:
        if "inception" not in files:
            raise UserError("--metrics is: the Inception score needs --features inception --weights FILE")
        files["logits"] = files["inception"]                   # one file, two outputs
    return {name: open_network(name, file, device) for name, file in files.items()}


def main():
    """
    One of five: answers of people, questions about pictures from elsewhere, a sheet of two runs, two folders, or a run.
    """
    args = parse()
    if args.ratings:
        return rate(args)
    ranks = join_ranks()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = read_dsg(args.dsg)[:args.n] if args.dsg else None
    if args.dsg and (args.answers or not is_run(args.run[0])):                     # pictures, or even answers, from elsewhere
        return score_dsg(args, prompts, device, ranks)
    drawn_only = (args.keep or args.sheet) and not args.vqa    # others will ask, or people look
    ask, about = open_vqa(args.vqa, device) if args.dsg and not drawn_only else (None, None)
    task = dsg_task(prompts, ask) if args.dsg else prompts_task(args.prompts) if args.prompts else None      # None: held-out captions
    if args.sheet:
        return write_sheet(args, task, device, ranks)
    folders = len(args.run) == 2
    usual = ("fd,mmd,pr,prdc" if folders else "zeroshot" if args.classes else "questions" if args.dsg else "fd,mmd" if args.prompts
             else "questions,fd,mmd")
    metrics = pick_words(args.metrics or usual, METRICS[1:-2] if folders else METRICS, "--metrics")
    networks = open_networks(args, metrics, device)
    if not folders:
        return score_run(args, networks, metrics, task, about, device, ranks)
    if is_run(args.run[1]) or os.path.isdir(args.run[0]) and is_run(args.run[0]):
        raise UserError("one of the two is a run: give one run alone, two folders of images, or two runs with --sheet")
    if drawing := [f"--{flag}" for flag in ("n", "guidance", "sampler", "steps", "prompts", "reference", "keep", "classes") if getattr(args, flag)]:
        raise UserError(f"{' '.join(drawing)}: two folders are compared as they are, with all their images: leave that away")
    result, facts = score_folders(*args.run, networks, metrics, ranks)
    if not ranks[0]:
        print(report(result))
        tell(make_card(networks, device, **facts), {"reference": args.run[0], "run": args.run[1], "n": facts["n"], "metrics": result}, args.json)


if __name__ == "__main__":
    main()
