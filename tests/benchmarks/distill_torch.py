"""The cycle of `test_distill.py` in PyTorch, eager or compiled, on the same networks with the same weights."""

import contextlib

import jax
import numpy as np
import torch
from torch.nn.functional import softplus


def tensor(x):
    return torch.from_numpy(np.array(x, np.float32))


class Linear(torch.nn.Module):
    """A layer with the weights of an Equinox one."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(tensor(x)) for x in (layer.weight, layer.bias))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


def silu(x):
    return torch.nn.functional.silu(x)


def normalize(x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class Residual(torch.nn.Module):
    """`gk.nn.MLP` without a condition."""

    def __init__(self, net):
        super().__init__()
        self.time_in, self.time_out = Linear(net.embed.time_in), Linear(net.embed.time_out)
        self.first, self.last = Linear(net.first), Linear(net.last)
        parts = [[Linear(layer) for layer in (b.modulate, b.widen, b.narrow)] for b in net.blocks]
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleList(layers) for layers in parts)
        phases = 2 * np.pi * np.geomspace(0.125, 16.0, net.embed.time_in.weight.shape[1] // 2)
        self.register_buffer("phases", tensor(phases))

    def forward(self, x, t):
        phase = t[:, None] * self.phases
        embedding = self.time_out(silu(self.time_in(torch.cat([phase.cos(), phase.sin()], 1))))
        embedding, hidden = silu(embedding), self.first(x)
        for modulate, widen, narrow in self.blocks:
            scale, shift = modulate(embedding).chunk(2, 1)
            hidden = hidden + narrow(silu(widen(normalize(hidden) * (1 + scale) + shift)))
        return self.last(silu(normalize(hidden)))


class Fake(torch.nn.Module):
    """`Preconditioned`."""

    def __init__(self, denoiser):
        super().__init__()
        self.net, self.data = Residual(denoiser.net), float(denoiser.sigma_data)

    def forward(self, x, sigma):
        s = sigma[:, None]
        norm = (self.data**2 + s**2).sqrt()
        return (self.data / norm) ** 2 * x + s * self.data / norm * self.net(x / norm, sigma.log() / 4)


class Discriminator(torch.nn.Module):
    """`gk.distill.Discriminator`."""

    def __init__(self, net):
        super().__init__()
        self.net, self.data = Residual(net.net), float(net.sigma_data)

    def forward(self, x, sigma):
        scale = (sigma**2 + self.data**2).rsqrt()[:, None]
        return self.net(x * scale, sigma.log() / 4).sum(1) / x.shape[1] ** 0.5


class Ring:
    """The analytic teacher: equal Gaussians of one variance."""

    def __init__(self, law):
        self.means, self.variance = tensor(law.means), 0.16

    def sample(self, n):
        return self.means[torch.randint(len(self.means), (n,))] + self.variance**0.5 * torch.randn(n, 2)

    def __call__(self, x, sigma):
        total = self.variance + sigma[:, None] ** 2
        share = (-0.5 * (x[:, None] - self.means).square().sum(2) / total).softmax(1)
        mean = share @ self.means
        return mean + self.variance / total * (x - mean)


class Cycle:
    """Critics `fake` times, then the student, as one would write it for this model alone."""

    def __init__(self, teacher, student, fake, net, *, batch, fake_steps, levels, compiled=False):
        layers = [
            layer for i, x in enumerate(student.layers) for layer in ([torch.nn.SiLU()] if i else []) + [Linear(x)]
        ]
        self.teacher, self.student = Ring(teacher), torch.nn.Sequential(*layers)
        self.fake, self.net = Fake(fake), Discriminator(net)
        self.batch, self.fake_steps, self.levels = batch, fake_steps, levels
        options = {"fused": True}
        self.follow = torch.optim.Adam([*self.fake.parameters(), *self.net.parameters()], 2e-3, **options)
        self.lead = torch.optim.Adam(self.student.parameters(), 1e-3, **options)
        wrap = torch.compile if compiled else lambda f: f
        self.critic_loss, self.student_loss = wrap(self._critic_loss), wrap(self._student_loss)

    def draw(self):
        lo, hi = self.levels
        quantile = (torch.rand(()) + torch.arange(self.batch) / self.batch) % 1
        sigma = lo * (hi / lo) ** quantile[torch.randperm(self.batch)]
        x = self.student(torch.randn(self.batch, 2))
        return x, sigma, x + sigma[:, None] * torch.randn_like(x)

    def _critic_loss(self, x, sigma, x_t, real):
        score = ((1 / sigma**2 + 1 / self.fake.data**2) * (self.fake(x_t, sigma) - x).square().sum(1)).mean()
        real = real + sigma[:, None] * torch.randn_like(real)
        return score + softplus(-self.net(real, sigma)).mean() + softplus(self.net(x_t, sigma)).mean()

    def _student_loss(self, x, sigma, x_t):
        with torch.no_grad():
            u = self.net(x_t, sigma)
            gap = self.teacher(x_t, sigma) - self.fake(x_t, sigma)
            order = sigma.argsort().argsort() * 10 // self.batch
            member = order == torch.arange(10)[:, None]
            means = torch.where(member, u, -torch.inf).logsumexp(1) - member.sum(1).log()
            u = (u - means[order]).clamp(-30, 30)
            direction = -2 * u.sigmoid()[:, None] * gap
            log_m = torch.logaddexp(u, torch.zeros_like(u)) - np.log(2.0)
            phi = u.exp() * (u - log_m) - log_m  # of Jensen-Shannon
        return (direction * x).sum(1).mean(), (2 * sigma**2 * phi).mean()

    def step(self):
        for _ in range(self.fake_steps):
            with torch.no_grad():
                x, sigma, x_t = self.draw()
                real = self.teacher.sample(self.batch)
            self.follow.zero_grad()
            self.critic_loss(x, sigma, x_t, real).backward()
            self.follow.step()
        x, sigma, x_t = self.draw()
        self.lead.zero_grad()
        value, report = self.student_loss(x, sigma, x_t.detach())
        value.backward()
        self.lead.step()
        return float(report)

    def run(self, num_steps):
        return [self.step() for _ in range(num_steps)]


@contextlib.contextmanager
def threads(num):
    """So many threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def difference(cycle, teacher, student, fake, net):
    """The largest difference of any network from the one it was copied from."""
    rng = np.random.default_rng(0)
    x, sigma = rng.normal(size=(64, 2)).astype(np.float32), rng.uniform(0.3, 5.0, 64).astype(np.float32)
    theirs = [cycle.student(tensor(x)), *(f(tensor(x), tensor(sigma)) for f in (cycle.teacher, cycle.fake, cycle.net))]
    ours = [jax.vmap(student)(x), *(jax.vmap(f)(x, sigma) for f in (teacher, fake, net))]
    return max(float(np.abs(np.asarray(a) - b.detach().numpy()).max()) for a, b in zip(ours, theirs, strict=True))
