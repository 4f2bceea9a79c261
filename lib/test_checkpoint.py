"""Tests of checkpoint.py: `pytest lib/test_checkpoint.py`."""
import os

import pytest
import torch

from lib import checkpoint
from lib.muon import Muon


def train_small(seed=0, steps=3):
    """(model, EMA, optimizers) of a small model after so many steps: matrices under Muon, biases under AdamW."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim < 2]
    optimizers = [torch.optim.AdamW(biases, lr=0.1), Muon(matrices, lr=0.1)]
    for _ in range(steps):
        step_small(model, optimizers)
    return model, {name: 0.5 * p.detach() for name, p in model.named_parameters()}, optimizers


def step_small(model, optimizers):
    model(torch.linspace(-1, 1, 12).view(3, 4)).square().sum().backward()
    for o in optimizers:
        o.step()
    model.zero_grad()


def save_small(folder, step=3, sharded=False, num_checkpoints=2, snapshots=(), **more):
    """The path of a checkpoint of that training, and its tensors."""
    parts = checkpoint.training_state(*train_small())
    file = os.path.join(str(folder), "last.pt")
    checkpoint.save(file, {"step": step, "config": {"lr": 0.1}, **more}, parts, sharded, num_checkpoints, snapshots)
    return file, parts


@pytest.mark.parametrize("sharded", [False, True])
def test_a_training_goes_on_from_a_checkpoint_to_the_bit(sharded, tmp_path):
    if sharded:
        pytest.importorskip("safetensors")
    file, parts = save_small(tmp_path, sharded=sharded)
    model, ema, optimizers = train_small(seed=1, steps=0)
    state, found = checkpoint.newest_checkpoint(str(tmp_path), {"lr": 1, "younger": 2})
    assert found == file and os.path.isdir(file) == sharded and state["config"] == {"lr": 0.1, "younger": 2}
    checkpoint.make_moments(model, optimizers, state["step"])
    checkpoint.restore(state, file, checkpoint.training_state(model, ema, optimizers))
    unbroken = train_small()
    for trained in (unbroken, (model, ema, optimizers)):
        step_small(trained[0], trained[2])
    states = [checkpoint.training_state(*trained) for trained in (unbroken, (model, ema, optimizers))]
    one, two = map(checkpoint.flatten, states)
    assert len(one) == 14 and one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    whole, _ = checkpoint.open_checkpoint(file)                # whole tensors, for all who only read
    assert all(torch.equal(whole["model"][name], value) for name, value in parts["model"].items())


def test_the_last_checkpoints_stay_and_broken_ones_do_not_push_them_out(tmp_path):
    files = lambda: sorted(os.listdir(tmp_path))
    for step, older in ((0, []), (2, []), (4, ["step_2.pt"]), (6, ["step_4.pt"]), (6, ["step_4.pt"])):
        save_small(tmp_path, step)
        assert files() == ["last.pt", *older], step
    (tmp_path / "last.pt").write_bytes(b"")
    assert checkpoint.newest_checkpoint(str(tmp_path))[0]["step"] == 4
    save_small(tmp_path, 6)
    assert files() == ["last.pt", "step_4.pt"]
    assert checkpoint.open_checkpoint(str(tmp_path / "step_4.pt"))[0]["step"] == 4
    save_small(tmp_path, 8, num_checkpoints=1)
    assert files() == ["last.pt"]
    for step in (10, 12, 14):                                  # snapshots are kept for good
        save_small(tmp_path, step, num_checkpoints=1, snapshots=(0, 8, 10, 14))
    assert files() == ["last.pt", "step_10.pt", "step_8.pt"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_kill_between_any_two_moves_leaves_a_checkpoint(sharded, tmp_path, monkeypatch):
    """The process dies before the first, the second ... change of a name or removal."""
    if sharded:
        pytest.importorskip("safetensors")
    for survived in range(7):
        folder, calls = tmp_path / str(survived), []
        folder.mkdir()
        save_small(folder, 2, sharded), save_small(folder, 4, sharded)

        def dying(work):
            def work_or_die(*args, **options):
                calls.append(work)
                if len(calls) > survived:
                    raise KeyboardInterrupt                    # which nothing in save catches
                return work(*args, **options)
            return work_or_die
        with monkeypatch.context() as m:
            for module, name in ((os, "link"), (os, "rename"), (os, "replace"), (checkpoint, "remove")):
                m.setattr(module, name, dying(getattr(module, name)))
            try:
                save_small(folder, 6, sharded)
            except KeyboardInterrupt:
                pass
        assert sharded or (folder / "last.pt").exists()        # a file is there at any moment
        state, _ = checkpoint.newest_checkpoint(str(folder))
        moves = 4 + sharded                                    # a folder has no link, and is renamed
        assert state["step"] == (6 if survived >= moves else 4), survived
        save_small(folder, 8, sharded)                              # whatever is left is tidied up
        assert sorted(os.listdir(folder)) == ["last.pt", f"step_{state['step']}.pt"]


def no_space_left(*args, **options):
    raise OSError(28, "No space left on device")


def no_space_for_torch(*args, **options):
    raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")


def forgetful_disk(about, file):
    torch.serialization.save({**about, "model": {name: v + 1 for name, v in about["model"].items()}}, file)


@pytest.mark.parametrize("fault, words", [(no_space_left, "No space left"), (no_space_for_torch, "unexpected pos"),
                                          (forgetful_disk, "read back differs")])
def test_what_cannot_be_written_leaves_the_old_file(fault, words, tmp_path, monkeypatch):
    save_small(tmp_path, 2)
    monkeypatch.setattr(torch, "save", fault)
    with pytest.raises(OSError, match=words):
        save_small(tmp_path, 4)
    assert checkpoint.open_checkpoint(str(tmp_path / "last.pt"))[0]["step"] == 2


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    parts = checkpoint.training_state(*train_small())
    parts["model"]["2.bias"][1] = float("nan")
    with pytest.raises(FloatingPointError, match="model/2.bias"):
        checkpoint.save(str(tmp_path / "last.pt"), {"step": 1, "config": {}}, parts)
    assert not os.listdir(tmp_path)


class Malice:
    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


@pytest.mark.parametrize("change, words", [
    (lambda state: {**state, "config": Malice()}, "no complete checkpoint"),
    (lambda state: {**state, "format": 99}, "format 99 and this code reads format 5: update the code"),
    (lambda state: {**state, "format": 2}, "format 2 and this code reads format 5: train it again"),
    (lambda state: {key: value for key, value in state.items() if key != "ema"}, "no complete checkpoint (KeyError)"),
    (lambda state: {**state, "ema": {key: v / 0 for key, v in state["ema"].items()}}, "not finite in ema/0.weight"),
])
def test_checkpoints_of_others_run_nothing_and_are_told_apart(change, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file, _ = save_small(".")
    torch.save(change(torch.load(file, weights_only=True)), file)
    state, why = checkpoint.open_checkpoint(file)
    assert state is None and words in why and not os.path.exists("EXECUTED")
    with pytest.raises(SystemExit):                            # the only one of its run
        checkpoint.newest_checkpoint(".")
    assert "falling back" in (said := capsys.readouterr()).out and "can be read: start anew with --fresh" in said.err


@pytest.mark.parametrize("content", [b"", b"some text", None])
def test_half_a_file_is_no_checkpoint(content, tmp_path):
    file, _ = save_small(tmp_path)
    whole = open(file, "rb").read()
    open(file, "wb").write(whole[:len(whole) // 2] if content is None else content)
    assert "no complete checkpoint" in checkpoint.open_checkpoint(file)[1]


def test_the_checkpoint_of_step_zero_is_no_state_to_go_on_from(tmp_path):
    save_small(tmp_path, 0)
    for run in (tmp_path, tmp_path / "nowhere"):
        assert checkpoint.newest_checkpoint(str(run)) == (None, None)
