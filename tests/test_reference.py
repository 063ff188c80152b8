"""TARFlow a second time, written from the paper's formulas with plain loops, on the layout of the published checkpoints.

Nothing here is shared with flowbook: patches by `unfold`, an explicit mask, heads in a Python loop, and an inverse
that runs the whole network again for every token.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from flowbook.tarflow import TarFlow


def random_state(size, channels, patch, dim, layers, classes=0, vp=False, seed=0):
    "A state dict in the published layout, all entries random (a fresh flow would be the identity)."
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    n, d = (size // patch)**2, channels * patch**2
    sd = {'var': rand(n, d).square() + .3 if vp else torch.ones(n, d, dtype=torch.float64)}
    linear = lambda name, i, o: sd.update({f'{name}.weight': rand(o, i) / math.sqrt(i), f'{name}.bias': .1 * rand(o)})
    norm = lambda name: sd.update({f'{name}.weight': 1 + .2 * rand(dim), f'{name}.bias': .2 * rand(dim)})
    for t, k in enumerate(layers):
        b = f'blocks.{t}'
        linear(f'{b}.proj_in', d, dim)
        sd[f'{b}.pos_embed'] = rand(n, dim)
        if classes: sd[f'{b}.class_embed'] = rand(classes, 1, dim)
        for j in range(k):
            a = f'{b}.attn_blocks.{j}'
            norm(f'{a}.attention.norm'); linear(f'{a}.attention.qkv', dim, 3 * dim); linear(f'{a}.attention.proj', dim, dim)
            norm(f'{a}.mlp.norm'); linear(f'{a}.mlp.main.0', dim, 4 * dim); linear(f'{a}.mlp.main.2', 4 * dim, dim)
        linear(f'{b}.proj_out', dim, d if vp else 2 * d)
        sd[f'{b}.proj_out.weight'] *= .1      # larger scales would amplify rounding beyond 1e-10, in both
        sd[f'{b}.attn_mask'] = torch.ones(n, n, dtype=torch.float64).tril()
    return sd


class Reference:
    "Eq. 3-5 of the paper, straight from the state dict."
    def __init__(self, sd, channels, patch, head_dim):
        self.sd, self.channels, self.patch, self.e = sd, channels, patch, head_dim
        self.T = 1 + max(int(k.split('.')[1]) for k in sd if k.startswith('blocks.'))

    def lin(self, name, x): return x @ self.sd[f'{name}.weight'].T + self.sd[f'{name}.bias']

    def norm(self, name, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + 1e-5) * self.sd[f'{name}.weight'] + self.sd[f'{name}.bias']

    def attend(self, name, x):
        b, n, dim = x.shape
        qkv, heads, outs = self.lin(f'{name}.qkv', self.norm(f'{name}.norm', x)), dim // self.e, []
        for h in range(heads):
            q, k, v = (qkv[..., (s * heads + h) * self.e:(s * heads + h + 1) * self.e] for s in range(3))
            out = torch.zeros_like(v)
            for i in range(n):
                w = torch.stack([(q[:, i] * k[:, j]).sum(-1) / math.sqrt(self.e) for j in range(i + 1)], 1)
                w = torch.exp(w - w.max(1, keepdim=True).values)
                out[:, i] = ((w / w.sum(1, keepdim=True))[..., None] * v[:, :i + 1]).sum(1)
            outs.append(out)
        return self.lin(f'{name}.proj', torch.cat(outs, -1))

    def classes(self, t, y, b):
        E = self.sd.get(f'blocks.{t}.class_embed')
        if E is None: return 0.
        rows = [E.mean(0) if y is None or int(y[i]) < 0 else E[int(y[i])] for i in range(b)]
        return torch.stack(rows)                                                # (b, 1, dim)

    def params(self, t, x, y):
        "mu, alpha for tokens in the block's reading order."
        sd, b = self.sd, f'blocks.{t}'
        pos = sd[f'{b}.pos_embed'].flip(0) if t % 2 else sd[f'{b}.pos_embed']
        h = self.lin(f'{b}.proj_in', x) + pos + self.classes(t, y, len(x))
        j = 0
        while f'{b}.attn_blocks.{j}.attention.norm.weight' in sd:
            a = f'{b}.attn_blocks.{j}'
            h = h + self.attend(f'{a}.attention', h)
            u = self.lin(f'{a}.mlp.main.0', self.norm(f'{a}.mlp.norm', h))
            h = h + self.lin(f'{a}.mlp.main.2', u * .5 * (1 + torch.erf(u / math.sqrt(2))))
            j += 1
        out, d = self.lin(f'{b}.proj_out', h), x.shape[-1]
        mu, alpha = torch.zeros_like(x), torch.zeros_like(x)
        for i in range(1, x.shape[1]):                                          # what i - 1 computed serves i
            if out.shape[-1] == d: mu[:, i] = out[:, i - 1]
            else: alpha[:, i], mu[:, i] = out[:, i - 1, :d], out[:, i - 1, d:]
        return mu, alpha

    def forward(self, img, y):
        x, logdet = F.unfold(img, self.patch, stride=self.patch).transpose(1, 2), 0.
        for t in range(self.T):
            u = x.flip(1) if t % 2 else x
            mu, alpha = self.params(t, u, y)
            u = (u - mu) * torch.exp(-alpha)
            x, logdet = u.flip(1) if t % 2 else u, logdet - alpha.sum((1, 2))
        return x, logdet

    def inverse(self, z, y, size):
        x = z
        for t in reversed(range(self.T)):
            zt = x.flip(1) if t % 2 else x
            u = torch.zeros_like(zt)
            for i in range(zt.shape[1]):
                mu, alpha = self.params(t, u, y)
                u[:, i] = zt[:, i] * torch.exp(alpha[:, i]) + mu[:, i]
            x = u.flip(1) if t % 2 else u
        return F.fold(x.transpose(1, 2), size, self.patch, stride=self.patch)


SIZES = {'grey': dict(size=8, channels=1, patch=2, dim=16, layers=(2, 2, 2), head_dim=8),
         'colour, odd': dict(size=6, channels=3, patch=2, dim=24, layers=(1, 1), head_dim=8),
         'deep-shallow': dict(size=4, channels=2, patch=1, dim=8, layers=(1, 3), head_dim=4),
         'one block, one token': dict(size=4, channels=3, patch=4, dim=8, layers=(1,), head_dim=8)}


@pytest.mark.parametrize('vp', [False, True], ids=['nvp', 'vp'])
@pytest.mark.parametrize('classes', [0, 5])
@pytest.mark.parametrize('name', SIZES)
def test_published_layout(name, classes, vp):
    s = SIZES[name]
    sd = random_state(s['size'], s['channels'], s['patch'], s['dim'], s['layers'], classes, vp)
    flow = TarFlow.from_ml_tarflow(sd, channels=s['channels'], head_dim=s['head_dim'])
    ref = Reference(sd, s['channels'], s['patch'], s['head_dim'])
    x = torch.randn(3, s['channels'], s['size'], s['size'], dtype=torch.float64)
    for y in ([None, torch.tensor([0, 4, -1])] if classes else [None]):
        z, logdet = flow(x, y)
        zr, ldr = ref.forward(x, y)
        assert (z - zr).abs().max() <= 1e-10
        assert (logdet - ldr).abs().max() <= 1e-10
        log_prob = (-.5 * zr**2 / sd['var'] - .5 * torch.log(2 * math.pi * sd['var'])).sum((1, 2)) + ldr
        assert (flow.log_prob(x, y) - log_prob).abs().max() <= 1e-10
        # samples: the same noise, the prior's standard deviation, the inverse
        g = torch.Generator().manual_seed(3)
        got = flow.sample(3 if y is None else y, generator=g)
        noise = torch.randn(3, *flow.z_shape, generator=torch.Generator().manual_seed(3)).double()
        want = ref.inverse(noise * sd['var'].sqrt(), y, s['size'])
        assert (got - want).abs().max() <= 1e-10


def test_all_weights_are_loaded():
    "Every published tensor but the mask ends up in the model, none twice."
    s = SIZES['grey']
    sd = random_state(s['size'], s['channels'], s['patch'], s['dim'], s['layers'], 5)
    flow = TarFlow.from_ml_tarflow(sd, channels=1, head_dim=8)
    theirs = sum(v.numel() for k, v in sd.items() if not k.endswith(('attn_mask', 'var')))
    assert sum(p.numel() for p in flow.parameters()) == theirs


def test_sigma_goes_on_the_card_and_sampling_finds_it(tmp_path):
    "With sigma= a published model is denoised without more ado; the card is saved with it."
    from flowbook.sampling import sample
    s = SIZES['grey']
    sd = random_state(s['size'], s['channels'], s['patch'], s['dim'], s['layers'], 5)
    torch.save(sd, tmp_path/'afhq_model.pth')
    read = torch.load(tmp_path/'afhq_model.pth', map_location='cpu', weights_only=True)
    flow = TarFlow.from_ml_tarflow(read, channels=1, head_dim=8, sigma=.07)
    assert flow.card['sigma'] == .07 and 'sigma' not in TarFlow.from_ml_tarflow(sd, channels=1, head_dim=8).card
    flow.save_pretrained(tmp_path/'m')
    assert TarFlow.from_pretrained(tmp_path/'m').card['sigma'] == .07
    y = torch.arange(2)
    got = sample(flow, y, denoise=True, on_broken='keep', generator=torch.Generator().manual_seed(0))
    want = sample(flow, y, denoise=.07, on_broken='keep', generator=torch.Generator().manual_seed(0))
    assert torch.equal(got, want)


def test_bad_layouts_are_named():
    s = SIZES['grey']
    sd = random_state(s['size'], s['channels'], s['patch'], s['dim'], s['layers'], 5)
    with pytest.raises(ValueError, match='do not come from square images with 3 channels'): TarFlow.from_ml_tarflow(sd, channels=3, head_dim=8)
    with pytest.raises(ValueError, match='missing: blocks.1.proj_out.bias'):
        TarFlow.from_ml_tarflow({k: v for k, v in sd.items() if k != 'blocks.1.proj_out.bias'}, channels=1, head_dim=8)
    with pytest.raises(ValueError, match='unknown: blocks.0.extra'): TarFlow.from_ml_tarflow({**sd, 'blocks.0.extra': torch.ones(1)}, channels=1, head_dim=8)
    with pytest.raises(ValueError, match='multiple of head_dim 64; give a head_dim= that divides it'): TarFlow.from_ml_tarflow(sd, channels=1)
    with pytest.raises(ValueError, match=r"keys are 'epoch', 'model'; give state\['model'\]"): TarFlow.from_ml_tarflow({'epoch': 3, 'model': sd}, channels=1, head_dim=8)
    with pytest.raises(ValueError, match='sigma'): TarFlow.from_ml_tarflow(sd, channels=1, head_dim=8, sigma=-1.)
