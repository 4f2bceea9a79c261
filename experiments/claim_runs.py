"""
The runs that the registered claims share: arms, their flags and folders, what is missing, what it takes.

    lab = Lab("out/claims", "claims", {}, measures)            # folder, config, flags for all runs, what was measured
    run_of(lab, "G", 1)                                        # out/claims/G-s1/claims/grow
    train(lab, "G", 1)                                         # by train.py; its parent must be there
    missing_runs(lab, ["D"], [1, 2])                           # [(arm, seed)] with those that they start from
    rates(lab)                                                 # GFLOP a minute, as finished runs have told

A run that is finished counts only if it was made with the settings that are asked for now: check_run.
"""
import glob
import json
import os
import time
from collections import namedtuple

from experiments.claim_measures import gflop_of_step
from experiments.trainings import run_train
from lib.files import atomic_write
from lib.runs import is_finished, newest_about, read_settings
from lib.settings import UserError, default_config, load_config

# where all lies; the section of configs.txt; flags for all runs; what was measured
Lab = namedtuple("Lab", "out config keys measures")
# A run: its stage, the arm whose core (or all) it starts from, its share of the stage's steps, its own keys
Arm = namedtuple("Arm", "stage parent share keys")
Times = namedtuple("Times", "factor")                          # of a key: so many times what the config says
SLOW = {"lr": Times(1 / 3), "muon_lr": Times(1 / 3)}           # of the rates at which all else trains
HALF, DOUBLE, THIN = {"depth": Times(1 / 2)}, {"depth": Times(2)}, {"channels": Times(1 / 2)}
FEW = {"scene_native": Times(3 / 8)}                           # leaves 1.75 % of the scenes as large pictures
ARMS = {
    "P": Arm("pretrain", None, 1, {}),
    "G": Arm("grow", "P", 1, {}),                              # frozen
    "F": Arm("finetune", "P", 1, SLOW),
    "F+": Arm("finetune", "P", 1, {}),
    "S": Arm("scratch", None, 1, {}),
    "Q": Arm("grow", "P", 1 / 4, {}),
    "D": Arm("defrost", "Q", 3 / 4, SLOW),                     # freeze-unfreeze: as many steps as G with Q's
    "L": Arm("hold", "Q", 3 / 4, SLOW),                        # the same without unfreezing: D's control
    "Gt": Arm("grow", "P", 1, THIN),                           # with a thin shell, and so on
    "Qt": Arm("grow", "P", 1 / 4, THIN),
    "Dt": Arm("defrost", "Qt", 3 / 4, SLOW | THIN),
    "P1": Arm("pretrain", None, 1, HALF),                      # cores of half and of twice the depth
    "G1": Arm("grow", "P1", 1, HALF),
    "P4": Arm("pretrain", None, 1, DOUBLE),
    "G4": Arm("grow", "P4", 1, DOUBLE),
    "Gf": Arm("grow", "P", 1, FEW),                            # few large pictures
    "Sf": Arm("scratch", None, 1, FEW),
    "Gb": Arm("grow", "P", 1, {"noise_base_resolution": Times(2)}),                # the noise of the core's size
    "Y": Arm("style", "G", 1, {"style": "scenes"}),            # tuned to a style, half of the rows plain
    "Ya": Arm("style", "G", 1, {"style": "scenes", "style_share": 1.0}),           # to a style alone
}
SNAPSHOTS = 0.01, 0.025, 0.05, 0.1, 0.25, 0.5                  # shares of a stage's steps after which weights are kept
SNAPPED = "G", "F", "F+", "S", "D"                             # arms of which they are
START = 0.1                                                    # minutes until a run takes its first step
GFLOP_PER_MINUTE = {"small": 1400, "large": 3600}              # until runs have told: one core of an AMD EPYC
# filled in by train.py, or of how it is looked at: no weight depends on them
UNCOMPARED = ("data_id", "encoder_id", "vgg_id", "condition_ranges", "workers", "log_every", "sample_every",
              "save_every", "snapshots", "tensorboard")


# ---- what a run is ---------------------------------------------------------------------------------------------------

def run_of(lab, arm, seed):
    """The run folder of an arm."""
    return os.path.join(lab.out, f"{arm}-s{seed}", lab.config, ARMS[arm].stage)


def file_of(lab, arm, seed):
    """The run folder of an arm, or of "G@0.1" the weights that G had after a tenth of its steps."""
    arm, _, share = arm.partition("@")
    steps = flags_of(lab, arm, seed)["steps"]
    return snapshots(lab, arm, seed)[max(1, round(float(share) * steps))] if share else run_of(lab, arm, seed)


def config_of(lab, arm, seed=1):
    """All settings of a run."""
    return load_config(lab.config, ARMS[arm].stage, words_of(flags_of(lab, arm, seed)))


def words_of(keys):
    """[(key, text)], as on a command line."""
    return [(key, str(value)) for key, value in keys.items()]


def flags_of(lab, arm, seed):
    """Keys of a run, {key: value}: those of the command line, the arm's, its steps and snapshots."""
    stage, _, share, own = ARMS[arm]
    base = load_config(lab.config, stage, list(lab.keys.items()))
    own = {key: times(base[key], value.factor) if isinstance(value, Times) else value for key, value in own.items()}
    flags = {**lab.keys, **own, "steps": max(1, round(share * base["steps"])), "seed": seed, "eval_n": 0,
             "num_checkpoints": 1}
    return flags | ({"snapshots": snapshot_steps(lab, arm)} if arm in SNAPPED else {})


def times(value, factor):
    """A number, or each of a tuple, times a factor; whole numbers stay whole."""
    if isinstance(value, tuple):
        return tuple(times(v, factor) for v in value)
    return max(1, round(factor * value)) if isinstance(value, int) else round(factor * value, 12)


def snapshot_steps(lab, arm):
    """Steps after which an arm's weights are kept; of D from its thaw on."""
    stage, _, share, _ = ARMS[arm]
    steps = load_config(lab.config, stage, list(lab.keys.items()))["steps"]
    return tuple(sorted({step for s in SNAPSHOTS if 0 < (step := round(s * steps)) < round(share * steps)})) or (0,)


def snapshots(lab, arm, seed):
    """{step: file} of the weights that an arm has kept, its last ones too."""
    run, last = run_of(lab, arm, seed), flags_of(lab, arm, seed)["steps"]
    kept = {step: os.path.join(run, f"step_{step}.pt") for step in snapshot_steps(lab, arm) if step}
    return kept | {last: os.path.join(run, "last.pt")}


# ---- making runs -----------------------------------------------------------------------------------------------------

def with_parents(arms):
    """The arms, each after the one that it starts from."""
    ordered = []
    for arm in arms:
        parent = ARMS[arm].parent
        ordered += with_parents([parent] if parent else []) + [arm]
    return list(dict.fromkeys(ordered))


def missing_runs(lab, arms, seeds):
    """[(arm, seed)] that are still wanted; UserError where one is there that is another one."""
    wanted = [(arm, seed) for seed in seeds for arm in with_parents(arms)]
    return [(arm, seed) for arm, seed in wanted if not is_there(lab, arm, seed)]


def is_there(lab, arm, seed):
    """Is a run finished? UserError where it is, and was made with other settings or from another core."""
    run, parent = run_of(lab, arm, seed), ARMS[arm].parent
    if not is_finished(run):
        return False
    made, asked = default_config() | read_settings(run), config_of(lab, arm, seed)
    differ = [key for key in asked if key not in UNCOMPARED and made[key] != asked[key]]
    changes = [f"{key} {made[key]!r} there, {asked[key]!r} asked for" for key in differ]
    if parent:
        origin = newest_about(run)["parents"][-1]              # PATH (STAGE, step N)
        ours = os.path.join(f"{parent}-s{seed}", lab.config, ARMS[parent].stage)
        if not origin.rpartition(" (")[0].endswith(os.sep + ours):                 # wherever that lies now
            changes.append(f"from {origin}, {ours} asked for")
    if changes:
        raise UserError(f"{run} is another run than the claims ask for ({'; '.join(changes[:3])}): give the flags with "
                        "which it was made, another --out, or move it away to have it made again")
    return True


def train(lab, arm, seed):
    """One run by train.py; what it took is kept in it."""
    words = {**flags_of(lab, arm, seed), "config": lab.config, "stage": ARMS[arm].stage,
             "out": os.path.join(lab.out, f"{arm}-s{seed}")}
    if ARMS[arm].parent:
        words["core"] = run_of(lab, ARMS[arm].parent, seed)
    start, begun = time.time(), newest_about(run_of(lab, arm, seed))
    run_train(words)
    if begun:                                                  # its minutes are those of a part
        return
    took = json.dumps({"minutes": (time.time() - start) / 60, "gflop": gflop_of(lab, arm)})
    atomic_write(os.path.join(run_of(lab, arm, seed), "took.json"), lambda f: f.write(took.encode()))


# ---- what they take --------------------------------------------------------------------------------------------------

def gflop_of(lab, arm):
    """Of a whole run."""
    config = config_of(lab, arm)
    return config["steps"] * gflop_of_step(config, ARMS[arm].stage in ("grow", "hold"), config["batch"])


def size_of(arm):
    """Small pictures or large ones? They differ in how fast a step's FLOPs are done."""
    return "small" if ARMS[arm].stage == "pretrain" else "large"


def rates(lab):
    """{size: GFLOP a minute} of the runs of this config that are finished; without any GFLOP_PER_MINUTE."""
    took = {size: [] for size in GFLOP_PER_MINUTE}
    for arm in ARMS:
        run = run_of(lab._replace(out=glob.escape(lab.out)), arm, "*")
        for file in glob.glob(os.path.join(run, "took.json")):
            with open(file) as f:
                took[size_of(arm)].append(json.load(f))
    return {size: sum(t["gflop"] for t in runs) / sum(max(t["minutes"] - START, START) for t in runs) if runs else usual
            for (size, runs), usual in zip(took.items(), GFLOP_PER_MINUTE.values())}
