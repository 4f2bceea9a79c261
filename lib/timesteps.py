"""
Timesteps of a table of betas (DDPM, Ho et al. 2020), the scale on which many published networks are told the noise:
they count from 0, clean, and here also between whole numbers.
"""
import torch


def logsnr_table(first, last, count, power=1, device=None):
    """logsnr (count,), falling, float64, of betas that rise linearly from first to last, or their roots of `power`."""
    betas = torch.linspace(first ** (1 / power), last ** (1 / power), count, device=device) ** power     # float32
    return torch.logit(torch.cumprod(1 - betas, 0).double())


def timestep_of(logsnr, table):
    """logsnr (B,) -> (B,) float32: where in the table, (count,), there is so much noise; its ends bound it."""
    logsnr = logsnr.double()
    after = torch.searchsorted(-table, -logsnr).clamp(1, len(table) - 1)           # the table falls
    share = (table[after - 1] - logsnr) / (table[after - 1] - table[after])
    return (after - 1 + share.clamp(0, 1)).float()


def ddpm_timestep(logsnr):
    """logsnr (B,) -> (B,): on DDPM's own scale, of 1000 betas from 0.0001 to 0.02."""
    return timestep_of(logsnr, logsnr_table(0.0001, 0.02, 1000, device=logsnr.device))
