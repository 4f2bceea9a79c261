"""
The figures of `python -m experiments.bench all` as Markdown: a table for each part, ratios, and what failed.
"""
import os

from lib.files import atomic_write

# part -> its columns (heading, key of a row); rows without the first key are left to the list of what failed
TABLES = {
    "kernels": [("case", "case"), ("by", "method"), ("forward, us", "fwd_us"), ("of the floor", "share_fwd"),
                ("backward, us", "bwd_us"), ("of the floor", "share_bwd"), ("time over ours", "over_ours")],
    "models": [("model", "model"), ("images", "batch"), ("M parameters", "millions"), ("what", "what"),
               ("TFLOP", "tflop"), ("s", "seconds"), ("GiB", "gib"), ("share of peak", "share_of_peak")],
    "processes": [("backend", "backend"), ("DDP off by", "ddp"), ("FSDP off by", "fsdp")],
    "plan": [("foretold, GiB", "foretold_gib"), ("config", "config"), ("stage", "stage"), ("measured, GiB", "gib"),
             ("measured over foretold", "ratio")],
    "numbers": [("numbers", "numbers"), ("config", "config"), ("images/s", "img_s"), ("over float32", "ratio"),
                ("GiB", "gib"), ("loss", "loss"), ("MFU", "mfu")],
    "published": [("network", "published"), ("images", "batch"), ("M parameters", "millions"), ("latents", "side"),
                  ("TFLOP", "tflop"), ("s", "seconds"), ("GiB", "gib"), ("share of peak", "share_of_peak")],
    "loaders": [("by", "way"), ("workers", "workers"), ("images/s", "img_s"), ("least", "least"), ("most", "most"),
                ("ours over it", "ours_over"), ("CPU ms an image", "cpu_ms")],
    "small": [("steps", "steps"), ("config", "config"), ("stage", "stage"), ("loss", "loss"), ("images/s", "img_s"),
              ("GiB", "gib")]}


def write_report(figures, json_file):
    """Print the report, and write it beside the JSON file where there is one."""
    text = report_of(figures)
    print("\n" + text, flush=True)
    if json_file:
        path = os.path.splitext(json_file)[0] + ".md"
        atomic_write(path, lambda file: file.write(text.encode()))
        print(f"{path}: the report")


def report_of(figures):
    """figures: those of about(), and rows, each with its part."""
    rows = [row | derived(row, figures["rows"]) for row in figures["rows"]]
    lines = [f"Measured on {figures['device']} ({figures['date']}, torch {figures['torch']}, triton "
             f"{figures['triton']}, {figures['threads']} threads): `{figures['command']}`", ""]
    for part, columns in TABLES.items():
        mine = [row for row in rows if row.get("part") == part]
        errors = [row["ours"] / row["torch"] for row in mine if row.get("torch")]
        if errors:                                                  # of kernels, against float64
            good = sum(row.get("good", False) for row in mine)
            lines += [f"**kernels, errors**: {good} of {len(errors)} cases good; ours over PyTorch's at most "
                      f"{max(errors):.2f}", ""]
        if part == "kernels" and (found := next((row for row in mine if "matmul_tflops" in row), None)):
            lines += [f"matrix product {found['matmul_tflops']:.0f} TFLOP/s, copy {found['copy_tb']:.2f} TB/s", ""]
        shown = [row for row in mine if columns[0][1] in row and "problem" not in row]
        if shown:
            used = [(heading, key) for heading, key in columns if any(row.get(key) is not None for row in shown)]
            lines += [f"**{part}**", "", "| " + " | ".join(heading for heading, _ in used) + " |",
                      "|" + "---|" * len(used)]
            lines += ["| " + " | ".join(cell(row.get(key)) for _, key in used) + " |" for row in shown] + [""]
    lines += [f"A step with the core frozen takes {ratio:.2f} of a joint one ({name})."
              for name, ratio in frozen_over_joint(rows).items()]
    lines += [f"Score of {row['score']}, {row['n']} images: {row['metrics']}" for row in rows if "metrics" in row]
    lines += [f"Pictures: {row['pictures']}" for row in rows if "pictures" in row]
    compiled = [row["good"] for row in rows if row.get("part") == "sm90" and "regs" in row]
    lines += [f"Compiled for an H100: {sum(compiled)} of {len(compiled)} kernels without fault."] * bool(compiled)
    failed = [row for row in rows if "problem" in row or not row.get("good", True)]
    if failed:
        lines += ["", "**what failed or had no time**", ""]
        lines += ["- " + ", ".join(f"{key} {cell(value)}" for key, value in row.items() if value is not None)
                  for row in failed]
    return "\n".join(lines) + "\n"


def derived(row, rows):
    """What follows from a row and its peers: shares of the floor, time over that of our kernel."""
    if "training" in row:
        return dict(what="training step" if row["training"] else "forward")
    if "fwd_us" not in row:
        return {}
    ours = next((r for r in rows if r.get("case") == row["case"] and r.get("method") == "ours" and "fwd_us" in r), None)
    both = row["fwd_us"] + row["bwd_us"]
    return dict(share_fwd=row["floor_fwd_us"] / row["fwd_us"], share_bwd=row["floor_bwd_us"] / row["bwd_us"],
                over_ours=ours and both / (ours["fwd_us"] + ours["bwd_us"]))


def frozen_over_joint(rows):
    """{config: seconds per image of a training step of grow over that of defrost}, where both were measured."""
    steps = {row["model"]: row["seconds"] / row["batch"] for row in rows if row.get("training")}
    return {name[:-5]: seconds / steps[name[:-5] + "/defrost"] for name, seconds in steps.items()
            if name.endswith("/grow") and name[:-5] + "/defrost" in steps}


def cell(value):
    """A value as text: three digits of a fraction."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
