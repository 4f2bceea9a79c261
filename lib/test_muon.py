"""Tests of lib/muon.py, against torch's own Muon, which rounds to bfloat16."""
import pytest
import torch

from lib.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 40), (1, 5)])
def test_orthogonalize_keeps_singular_vectors_and_evens_values(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    there = torch.einsum("nki,nkl,njl->nij", u, orthogonalize(x), v)               # in the basis of its own vectors
    values = there.diagonal(dim1=1, dim2=2)
    assert (there - torch.diag_embed(values)).abs().max() < 1e-9                   # no direction leaks into another
    well = s > 0.05 * s[:, :1]                                                   # the polynomial lifts small ones too
    assert (values[well] > 0.6).all() and (values < 1.3).all()


def test_steps_are_those_of_torchs_muon():
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((6, 4), (6, 4), (4, 9))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = Muon(ours, lr=0.1, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1)
    for step in range(4):
        for params, optimizer in zip((ours, theirs), optimizers):
            for k, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + k))
            optimizer.step()
    for p, q, first in zip(ours, theirs, start):
        assert (p - q).norm() < 0.03 * (p - first).norm()                          # bfloat16 keeps 8 bits
    buffers = [optimizer.state[params[0]]["momentum_buffer"] for optimizer, params in zip(optimizers, (ours, theirs))]
    assert torch.equal(*buffers)


def test_a_parameter_without_gradient_stays():
    still, moving = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    optimizer = Muon([still, moving], lr=0.1, weight_decay=0.5)
    moving.grad = torch.ones(2, 3)
    optimizer.step()
    assert torch.equal(still, torch.ones(2, 3)) and not torch.equal(moving, still) and still not in optimizer.state
