"""The table of symbols on the front page: each code name is evaluated, each shape is that of what comes out."""
import re
from pathlib import Path

import pytest
import torch
from flowbook.denoise import denoise, score
from flowbook.guidance import ClassGuidance, TemperatureGuidance, score_guidance
from flowbook.repa import Alignment, Reverse, encoder
from flowbook.tarflow import TarFlow

README = (Path(__file__).parents[1]/'README.md').read_text(encoding='utf-8')
SIZES = dict(b=3, c=1, h=8, w=8, n=16, d=4, dim=16, k=10)


def rows():
    table = README.split('## Symbols', 1)[1].split('\n## ', 1)[0]
    cells = [[c.strip() for c in line.strip('| ').split('|')] for line in table.splitlines() if line.startswith('|')][2:]
    return [(c[0], re.findall(r'`([^`]+)`', c[2]), c[3] if len(c) > 3 else '') for c in cells]


@pytest.fixture(scope='module')
def names():
    torch.manual_seed(0)
    flow = TarFlow(image_size=8, channels=1, patch_size=2, dim=16, blocks=3, layers=2, head_dim=8, classes=10)
    for p in flow.parameters(): torch.nn.init.normal_(p, std=.1)
    x, enc = torch.rand(3, 1, 8, 8) * 2 - 1, encoder('digits', grid=(4, 4))
    return dict(flow=flow, block=flow.blocks[0], x=x, tokens=flow.to_parts(x), y=torch.tensor([1, 7, -1]), weights=torch.full((3, 10), .1), sigma=.1, w=1., tau=.8, gamma=.01, l=2, lam=.1,
                strategy=Reverse([(2, 1)]), encoder=enc, denoise=denoise, score=score, score_guidance=score_guidance, ClassGuidance=ClassGuidance, TemperatureGuidance=TemperatureGuidance,
                Alignment=Alignment)


def test_the_table_is_there(): assert len(rows()) >= 15 and all(code for _, code, _ in rows())

@pytest.mark.parametrize('symbol, code, shape', rows(), ids=[str(r[1][0]) for r in rows()])
def test_a_row(names, symbol, code, shape):
    found = [eval(c, {**names}) for c in code]                       # noqa: our own README
    if not shape: return
    sizes = dict(SIZES, D=found[0].shape[-1])
    assert tuple(found[0].shape) == tuple(sizes[s] for s in re.findall(r'\w+', shape)), (symbol, code, tuple(found[0].shape))


def test_what_the_words_say(names):
    flow, x, y = names['flow'], names['x'], names['y']
    z, logdet = flow(x, y)
    mu, alpha, _ = flow.blocks[0].params(flow.blocks[0].read(names['tokens']), y)
    first, own = flow.blocks[0](names['tokens'], y)
    assert torch.allclose(first, flow.blocks[0].unread((flow.blocks[0].read(names['tokens']) - mu) * (-alpha).exp()), atol=1e-5)       # alpha is a log-scale
    assert torch.allclose(own, -alpha.sum((1, 2)), atol=1e-4)                                                                         # summed, in nats
    normal = -.5 * (z**2 / flow.prior_var + flow.prior_var.log() + torch.log(torch.tensor(2 * torch.pi))).sum((1, 2))
    assert torch.allclose(flow.log_prob(x, y), normal + logdet, atol=1e-3)                                                            # constants included
    assert torch.allclose(denoise(flow, x, .1, y), x + .01 * score(flow, x, y), atol=1e-5)
