"""
Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): gradient descent with momentum, for matrices, whose every
step is made orthogonal first, so that all directions of a matrix learn at the same rate.

torch.optim.Muon does the same with products in bfloat16 on any machine. A CPU without instructions for that takes 13
times as long for them as in float32 (AMD EPYC of the third generation, matrices of 96 x 96 to 96 x 864): three quarters
of the time of a training step went there. Here products are bfloat16 on a GPU and float32 on a CPU, and matrices of one
shape go through them together.
"""
import torch

# of the polynomial p(s) = a s + b s^3 + c s^5 that takes every singular value s in (0, 1] to the neighbourhood of 1
COEFFICIENTS = 3.4445, -4.7750, 2.0315
STEPS = 5                                                      # times that it is applied


def orthogonalize(x):
    """Matrices (n, rows, columns) -> those with the same singular vectors, and singular values of 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x                                    # the product with its transpose is the smaller one
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)   # singular values of at most 1
    for _ in range(STEPS):                                     # Newton-Schulz: p(s), by products alone
        gram = x @ x.mT                                                            # (n, k, k), k the smaller side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For parameters that are matrices (rows, columns). Weight decay is decoupled, as in AdamW."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}                                        # {shape: parameters}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                update = orthogonalize(torch.stack([self.nesterov(p, group["momentum"]) for p in params]))
                lr = group["lr"] * max(1, rows / columns) ** 0.5                   # the same change of every output
                for p, change in zip(params, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(change.to(p.dtype), alpha=-lr)

    def nesterov(self, p, momentum):
        """The gradient, averaged over steps and looking one step ahead."""
        if p not in self.state:                                # its first step
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        update = p.grad.lerp(buffer, momentum)
        return update.bfloat16() if p.is_cuda else update
