"""The explorer without a browser: plain functions, every control moved from code, and sentences instead of tracebacks."""
import asyncio
import dataclasses
import io
import math

import pytest
import torch

from flowbook import explore
from flowbook.explore import (KINDS, SIDE, SIGMAS, SOLVERS, TOLERANCES, Contest, Explorer, Flows, Setting, as_code, compare_solvers, contest, crossed, density_png, density_redraw,
                              density_text, latest, path_log_prob, plain, redraw, render, solver_frames, solver_redraw, titles_of, to_png)
from flowbook.flows import shake
from flowbook.tarflow import TarFlow

PIL = pytest.importorskip('PIL.Image')
replace = dataclasses.replace


def tiny(classes=3, sigma=.2, seed=0):
    torch.manual_seed(seed)
    flow = shake(TarFlow(4, 1, 2, 16, 3, 1, 8, classes=classes), .07, seed=seed).eval()
    with torch.no_grad():
        for block in flow.blocks: block.proj_out.bias[:4] = -.6                              # samples of the size of images
    flow.card = {'sigma': sigma} if sigma else {}
    return flow


@pytest.fixture
def flows(): return {'a': tiny(), 'b': tiny(seed=1), 'free': tiny(classes=0)}


def pixels(png):
    import numpy as np
    return np.asarray(PIL.open(io.BytesIO(png)).convert('L')).astype(int)


def test_the_picture_is_what_the_library_gives(flows):
    from flowbook.denoise import denoise
    from flowbook.guidance import ClassGuidance, guided_sample, score_guidance
    ex, s = Explorer(flows, n=6), Setting('a', kind='class', w=.5, gamma=2., seed=3)
    y = torch.arange(6) % 3
    raw = guided_sample(flows['a'], y, ClassGuidance(.5), torch.Generator().manual_seed(3)).clone()
    p = ex.picture(s)
    assert torch.allclose(p.left, raw, atol=1e-5) and torch.equal(p.left, Explorer(flows, n=6).picture(s).left)
    want = denoise(flows['a'], score_guidance(flows['a'], raw, y, 2 * .2**2), .2, y)
    assert torch.allclose(p.right, want, atol=1e-5)
    assert p.nats_left == pytest.approx(flows['a'].log_prob(raw, y).mean().item(), abs=1e-3)
    assert p.nats_right == pytest.approx(flows['a'].log_prob(want, y).mean().item(), abs=1e-3) and p.ms > 0


def test_the_path_has_a_density_at_every_block(flows):
    ex, s = Explorer(flows, n=4), Setting('a')
    path, y = ex.samples(s), torch.arange(4) % 3
    assert len(path) == 4 and torch.equal(path[-1], ex.picture(s).left)
    flow = flows['a']
    assert torch.allclose(path_log_prob(flow, path[-1], 0, y), flow.log_prob(path[-1], y), atol=1e-4)
    z = flow.to_parts(path[0])
    assert torch.allclose(path_log_prob(flow, path[0], 3, y), torch.distributions.Normal(0., 1.).log_prob(z).sum((1, 2)), atol=1e-4)
    for k in range(4): assert torch.equal(ex.picture(replace(s, block=k)).left, path[k])
    assert torch.equal(ex.picture(replace(s, block=0)).right, ex.picture(s).right)         # the right one is the finished sample


def test_what_comes_later_does_not_sample_again_and_few_paths_are_kept(flows):
    ex, s = Explorer(flows, n=2), Setting('a', kind='class')
    first = ex.samples(s)
    for other in (replace(s, denoise=False), replace(s, gamma=3.), replace(s, block=1), replace(s, tau=.3)): assert ex.samples(other) is first
    for other in (replace(s, w=3.), replace(s, seed=1), replace(s, schedule='linear'), replace(s, label=1), replace(s, model='b')): assert ex.samples(other) is not first
    for seed in range(30): ex.samples(replace(s, seed=seed))
    assert len(ex.paths) == ex.keep


def test_every_control_changes_the_picture(flows):
    pytest.importorskip('ipywidgets')
    panel = explore.panel(flows, Setting('a', kind='temperature', w=1., gamma=1.), n=4)
    assert set(panel.controls) == {f.name for f in dataclasses.fields(Setting)}
    moves = {'model': 'b', 'label': 2, 'kind': 'class', 'w': 3., 'tau': .5, 'schedule': 'linear', 'denoise': False, 'gamma': 4., 'seed': 7, 'block': 1}
    assert set(moves) == set(panel.controls)
    for name, value in moves.items():
        panel = explore.panel(flows, Setting('a', kind='temperature', w=1., gamma=1.), n=4)
        before = [w.value for w in panel.images]
        panel.controls[name].value = value
        after, s = [w.value for w in panel.images], explore.setting_of(panel.controls)
        assert getattr(s, name) == value and after != before, name
        assert after == list(render(Explorer(flows, n=4).picture(s))[:2]), name
        assert ' ms' in panel.text.value and 'Nothing to show' not in panel.text.value


def test_controls_follow_the_model_and_a_mistake_is_a_sentence(flows):
    pytest.importorskip('ipywidgets')
    flows['deep'] = shake(TarFlow(4, 1, 2, 16, 5, 1, 8, classes=7))                          # more blocks and classes, and no card
    panel = explore.panel(flows, Setting('a', label=2), n=4)
    c = panel.controls
    assert c['tau'].disabled and c['w'].disabled and not c['gamma'].disabled
    c['model'].value = 'free'
    assert c['label'].disabled and c['gamma'].disabled and 'no classes' in panel.text.value
    c['kind'].value = 'star'
    assert 'has none; choose' in panel.text.value and 'Traceback' not in panel.text.value
    c['kind'].value = 'none'; c['model'].value = 'deep'
    assert c['block'].max == c['block'].value == 5 and len(c['label'].options) == 8 and c['denoise'].disabled and 'not known' in panel.text.value
    c['model'].value = 'a'
    assert c['block'].max == 3 and 'Nothing' not in panel.text.value


def test_what_was_chosen_is_kept_and_reset_undoes_all(flows):
    pytest.importorskip('ipywidgets')
    flows['deep'] = shake(TarFlow(4, 1, 2, 16, 5, 1, 8, classes=7))
    start = Setting('deep', label=6, denoise=False, block=4)
    panel = explore.panel(flows, start, n=4)
    c = panel.controls
    for name in ('free', 'a'):                                                               # fewer blocks; no classes, or too few
        c['model'].value = name
        assert c['label'].value == -1 and c['block'].value == c['block'].max == 3
    c['model'].value = 'deep'
    assert (c['label'].value, c['block'].value) == (6, 4) and explore.setting_of(c) == start
    for name, value in dict(model='a', label=1, kind='temperature', w=3., tau=.5, schedule='linear', denoise=True, gamma=4., seed=7, block=1).items(): c[name].value = value
    panel.reset.click()
    assert explore.setting_of(c) == start and panel.images[0].value == render(Explorer(flows, n=4).picture(start))[0]
    c['model'].value = 'a'                                                                   # the end of one flow is the end of another
    c['block'].value = 2; c['block'].value = 3; c['model'].value = 'deep'
    assert c['block'].value == 5


def test_a_control_without_effect_says_so(flows):
    pytest.importorskip('ipywidgets')
    c = explore.panel(flows, Setting('a'), n=4).controls
    off = lambda: {k for k, w in c.items() if w.description.endswith(' (off)')}
    assert off() == {k for k, w in c.items() if w.disabled} == {'w', 'tau', 'schedule'}
    c['kind'].value = 'temperature'
    assert off() == set()
    race = explore.solver_panel(flows, Contest('a'))
    assert race.controls['w'].description == 'weight w (off)'


def test_titles_say_what_is_shown(flows):
    s = Setting('a')
    assert titles_of(s, 3) == ('raw sample', 'finished: after denoising') == titles_of(replace(s, block=3), 3)
    assert titles_of(replace(s, block=0, denoise=False), 3) == ('latents z', 'finished: no step is on')
    assert titles_of(replace(s, block=2, gamma=1.), 3) == ('after 2 of 3 blocks', 'finished: after a score step and denoising')
    pytest.importorskip('ipywidgets')
    panel = explore.panel(flows, s, n=4)
    panel.controls['block'].value = 1
    assert [t.value for t in panel.titles] == list(titles_of(replace(s, block=1), 3))


def test_a_setting_is_shown_as_code_that_makes_it_again(flows):
    for s in (Setting('a'), Setting("it's", label=2, kind='star', w=.25, gamma=1., denoise=False, seed=9, block=0)):
        assert eval(as_code(s)) == s
        assert as_code(s) in plain(redraw(Explorer({s.model: tiny()}, n=2), s)[2])


def test_who_waits_hears_how_far_it_is(flows):
    pytest.importorskip('ipywidgets')
    ex, heard = Explorer(flows, n=2), []
    for _ in range(2): ex.picture(Setting('a'), lambda k, T: heard.append((k, T)))
    assert heard == [(0, 3), (1, 3), (2, 3), (3, 3)]                                         # what is remembered is not drawn again
    with pytest.raises(ValueError, match='told: 3 came'): ex.samples(Setting('a'), 3)
    panel, said = explore.panel(flows, Setting('a'), n=2), []
    panel.text.observe(lambda c: said.append((c.new, 'flowbook-old' in panel.images[0]._dom_classes)), 'value')
    panel.controls['model'].value = 'b'                                                      # not known to be quick
    assert 'Drawing: 0 of 3 blocks' in said[0][0] and said[0][1] and 'nats' in said[-1][0] and 'flowbook-old' not in panel.images[0]._dom_classes


def test_the_classes_that_were_asked_for_are_said(flows):
    assert 'row by row: 0 1 2 / 0 1 2.' in Explorer(flows, n=6).picture(Setting('a')).note
    flows['a'].card = {'sigma': .2, 'class_names': ['cat', 'dog', 'owl']}
    assert 'row by row: cat dog / owl cat.' in Explorer(flows, n=4).picture(Setting('a')).note
    for s, n in ((Setting('a', label=1), 4), (Setting('free'), 4), (Setting('a'), 49)): assert 'row by row' not in Explorer(flows, n=n).picture(s).note


def test_broken_samples_can_be_told_from_grey_ones():
    x = torch.zeros(2, 1, 8, 8)
    x[0] = math.nan
    out = crossed(x)
    assert out[0].diagonal(dim1=-2, dim2=-1).unique().tolist() == [.5] and out[0].unique().tolist() == [0., .5] and not out[1].any()
    assert to_png(x) != to_png(x.nan_to_num()) and crossed(torch.full((1, 3, 4, 6), math.nan)).isfinite().all()


def test_mistakes_are_told_in_the_words_of_the_panel(flows):
    ex = Explorer(flows, n=2)
    for change, says in ((dict(model='free', kind='star'), "guidance: 'star' compares"), (dict(tau=0.), 'temperature: '), (dict(label=9), 'class: '), (dict(gamma=-1.), 'score step: ')):
        left, _, text = redraw(ex, replace(Setting('a'), **change))
        assert says in plain(text) and (pixels(left) == 255).all()                           # white: nothing that could be a broken sample
    assert "guidance: 'class' needs classes" in plain(solver_redraw(Flows(flows), Contest('free', kind='class'))[1])


def test_extremes_show_samples_or_a_sentence(flows):
    flows['wild'] = shake(tiny(), .8)                                                        # overflows on purpose
    ex, seen = Explorer(flows, n=4), set()
    for name in flows:
        for kind in KINDS:
            for w, tau, gamma in ((0., .1, 0.), (10., .1, 10.), (10., 5., 10.)):
                left, right, text = redraw(ex, Setting(name, kind=kind, w=w, tau=tau, gamma=gamma))
                assert pixels(left).size and pixels(right).size and 'Error' not in text and 'Traceback' not in text
                seen |= {k for k in ('broken', 'has none', 'nats') if k in text}
    assert seen == {'broken', 'has none', 'nats'}


@pytest.mark.parametrize('change,says', [
    (dict(model='c'), 'one of'), (dict(label=3), '0 to 2'), (dict(label=-2), '0 to 2'), (dict(label=1.5), '0 to 2'), (dict(kind='clas'), 'one of'), (dict(w=-1.), '0 or more'), (dict(w=math.nan), '0 or more'),
    (dict(tau=0.), 'above 0'), (dict(tau=-1.), 'above 0'), (dict(schedule='cosine'), 'constant'), (dict(gamma=-1.), '0 or more'), (dict(gamma=math.inf), '0 or more'), (dict(seed=-1), '0 or more'),
    (dict(block=4), '3 blocks'), (dict(block=-1), '3 blocks')])
def test_bad_settings(flows, change, says):
    ex, s = Explorer(flows, n=2), Setting('a', **change) if 'model' not in change else Setting(**change)
    with pytest.raises(ValueError, match=says): ex.picture(s)
    text = redraw(ex, s)[2]
    assert 'Nothing to show' in text and 'Traceback' not in text


def test_bad_explorers(flows):
    for args, says in ((({},), 'flows: none'), (({'a': torch.nn.Linear(1, 1)},), 'takes TarFlow'), ((flows, 0), 'at most 1024'), ((flows, 4, -1.), 'above 0')):
        with pytest.raises(ValueError, match=says): Explorer(*args)
    with pytest.raises(ValueError, match='give sigma='): Explorer(tiny(sigma=None)).picture(Setting('model'))
    with pytest.raises(ValueError, match='has no classes'): Explorer(flows).picture(Setting('free', gamma=1.))


def test_the_density_panel():
    pytest.importorskip('ipywidgets')
    panel = explore.density_panel(.2)
    seen = [tuple(w.value for w in panel.images)]
    for sigma in (SIGMAS[0], SIGMAS[-1]):
        panel.controls['sigma'].value = sigma
        seen.append(tuple(w.value for w in panel.images))
        assert all(abs(pixels(a) - pixels(b)).max() <= 2 for a, b in zip(seen[-1], density_png(sigma)))
    assert len(set(seen)) == 3
    said = []
    panel.text.observe(lambda c: said.append(c.new), 'value')
    for sigma in (.07, SIGMAS[0]): panel.controls['sigma'].value = sigma
    assert [k for k, text in enumerate(said) if text.startswith('Drawing')] == [0] or .07 in explore.DRAWN       # a stop is drawn once
    assert '0.001 in z moves x by 0.002' in density_text(.2) and 'from one point to the next' in density_text(.05)
    for bad in (0., -1., math.nan):
        with pytest.raises(ValueError, match='above 0'): density_png(bad)
        assert 'Nothing to show' in density_redraw(bad)[2]


def test_the_flows_of_the_book():
    flows = explore.book_flows()
    assert {'digits, sigma 0.05', 'digits, sigma 0.1', 'digits, sigma 0.2', 'digits, sigma 0.4', 'digits, sigma 0.1, no classes', 'mnist5k, sigma 0.2'} <= set(flows)
    assert all(f.card['sigma'] and not f.training for f in flows.values())
    assert flows['digits, sigma 0.1'].z_shape[0] == 16 and flows['mnist5k, sigma 0.2'].z_shape[0] == 49
    assert flows['digits, sigma 0.1, 64 tokens'].z_shape[0] == 64 and flows['mnist5k, sigma 0.2, 256 tokens'].z_shape[0] == 256


# --- the solvers, side by side

def test_the_solvers_find_what_the_plain_sampler_finds(flows):
    from flowbook.guidance import ClassGuidance, guided_inverse
    for guidance in (None, ClassGuidance(.5)):
        found = compare_solvers(flows['a'], 5, guidance, 1e-6, seed=3)
        z = flows['a'].draw(5, torch.Generator().manual_seed(3))
        want = guided_inverse(flows['a'], z, torch.arange(5) % 3, guidance)
        assert [r.solver for r in found] == list(SOLVERS)
        for r in found:
            assert torch.allclose(r.images, want, atol=1e-4) and r.ms > 0 and len(r.windows) == 3
            assert r.away == (r.images - found[0].images).abs().max().item() <= 1e-4
    sequential, gauss_seidel, jacobi, auto = found
    assert sequential.passes == 3 * 3 and sequential.away == 0. and max(r.passes for r in found) == 9            # never more than the tokens have steps
    assert (sequential.windows, gauss_seidel.windows, jacobi.windows) == ((1,) * 3, (2,) * 3, (4,) * 3)
    free, = compare_solvers(flows['free'], 2, solvers=('jacobi',))                                               # no classes
    assert free.away < 1e-4


def test_a_looser_tolerance_takes_no_more_passes(flows):
    passes = [compare_solvers(flows['a'], 4, None, tol, solvers=('jacobi',))[0].passes for tol in (10., *TOLERANCES, 0.)]
    assert passes == sorted(passes) and passes[0] < passes[-1] <= 9


def test_broken_samples_of_a_comparison_are_grey_and_said(flows):
    flows['wild'] = shake(tiny(), .8)
    found = compare_solvers(flows['wild'], 8)
    assert found[0].images.isnan().any() and all(r.away >= 0 or math.isnan(r.away) for r in found)
    assert 'broken' in solver_redraw(Flows(flows), Contest('wild', n=8))[1]


@pytest.mark.parametrize('change,says', [
    (dict(model='c'), 'one of'), (dict(n=0), 'at most 1024'), (dict(n=2.5), 'at most 1024'), (dict(kind='star'), "'none', 'class'"), (dict(kind='class', w=-1.), '0 or more'), (dict(tol=-1.), 'tol: -1.0'),
    (dict(tol=math.nan), 'tol: nan'), (dict(seed=-1), 'seed: -1'), (dict(model='free', kind='class'), 'class')])
def test_bad_contests(flows, change, says):
    s = Contest(**{'model': 'a', **change})
    with pytest.raises(ValueError, match=says): contest(Flows(flows), s)
    pngs, text = solver_redraw(Flows(flows), s)
    assert 'Nothing to show' in text and 'Traceback' not in text and all(pixels(p).size for p in pngs) and len(pngs) == len(SOLVERS)
    with pytest.raises(ValueError, match='newton'): compare_solvers(flows['a'], solvers=('newton',))


def test_every_control_of_the_solvers(flows):
    pytest.importorskip('ipywidgets')
    moves = {'model': 'b', 'n': 16, 'kind': 'none', 'w': 3., 'tol': 1e-2, 'seed': 7}
    start = Contest('a', kind='class', w=1.)
    assert set(moves) == {f.name for f in dataclasses.fields(Contest)}
    for name, value in moves.items():
        panel = explore.solver_panel(flows, start)
        assert set(panel.controls) == set(moves) and len(panel.images) == 4
        before, said = [w.value for w in panel.images], "not redrawn"
        panel.text.value = said                               # two redraws may take equally many milliseconds
        panel.controls[name].value = value
        after = [w.value for w in panel.images]
        assert (after != before or name == 'tol') and panel.text.value != said and ' ms' in panel.text.value, name
        want = contest(Flows(flows), replace(start, **{name: value}))
        assert all(abs(pixels(png) - pixels(to_png(r.images, SIDE))).max() <= (2 if name != 'tol' else 30) for png, r in zip(after, want)), name
        assert all(f'{r.solver}</td>' in panel.text.value for r in want) and panel.controls['w'].disabled == (name == 'kind')
    panel.controls['kind'].value = 'class'; panel.controls['model'].value = 'free'
    assert 'Nothing to show' in panel.text.value
    panel.controls['kind'].value = 'none'
    assert 'Nothing' not in panel.text.value
    with pytest.raises(ValueError, match='one of'): explore.solver_panel(flows, Contest('c'))


def test_a_comparison_says_what_is_ready_and_gives_way(flows):
    known, s = Flows(flows), Contest('a', n=2)
    frames = list(solver_frames(known, s))
    ready = [sum(png is not None for png in pngs) for pngs, _ in frames]
    assert ready == sorted(ready) and set(ready) == set(range(5)) and '0 of 4 solvers' in frames[0][1]
    assert all('Comparing' in text for _, text in frames[:-1]) and 'Compared in' in frames[-1][1] and frames[-1][0] == list(solver_redraw(known, s)[0])

    seen = []
    def steps(name, n):
        for k in range(n): seen.append((name, k)); yield
    async def browser():
        run = latest()
        run(steps('first', 1000)); await asyncio.sleep(.05)
        run(steps('second', 3)); await asyncio.sleep(.2)
    asyncio.run(browser())
    assert 0 < len([1 for name, _ in seen if name == 'first']) < 100 and [k for name, k in seen if name == 'second'] == [0, 1, 2]
    assert seen[-1] == ('second', 2)
    seen.clear()
    latest()(steps('script', 3))
    assert len(seen) == 3


def test_a_panel_under_an_event_loop_shows_the_last_move(flows):
    pytest.importorskip('ipywidgets')
    panel = explore.solver_panel(flows, Contest('a', n=2))
    async def browser():
        for seed in (1, 2, 3): panel.controls['seed'].value = seed
        for _ in range(400):
            await asyncio.sleep(.01)
            if 'Compared' in panel.text.value: return
    panel.text.value = ''
    asyncio.run(browser())
    assert [w.value for w in panel.images] == [to_png(r.images, SIDE) for r in contest(Flows(flows), Contest('a', n=2, seed=3))]
    assert not any('flowbook-old' in w._dom_classes for w in panel.images)


@pytest.mark.fault('malice', 'the card of a model says words for its noise, or names for other classes than it has', 'the explorer refuses the noise by name, and numbers the classes; mend card.json')
@pytest.mark.parametrize('card', [{'sigma': 'loud'}, {'sigma': -1.}, {'sigma': math.inf}, {'sigma': True}, {'sigma': [.1]}, [], 'card'])
def test_a_card_that_cannot_be(card, tried):
    flow = tiny()
    flow.card = card
    with pytest.raises(ValueError, match='flows.*card of .model.') as e: Explorer(flow)
    tried(said=str(e.value))
    for names in ('abc', ['a'], {'a': 1}, 7):
        flow.card = {'sigma': .1, 'class_names': names}
        assert explore.classes_of(flow) == [('all in turn', -1), ('0', 0), ('1', 1), ('2', 2)]


def test_a_panel_opens_a_folder(tmp_path):
    "What `flowbook_train` leaves in RUN/model."
    torch.manual_seed(0)
    flow = TarFlow(8, 3, 4, 16, 2, 1, 8, classes=3)
    flow.card = {'data': 'folder', 'sigma': .1, 'class_names': ['a', 'b', 'c']}
    flow.save_pretrained(tmp_path/'model')
    assert len(explore.panel(tmp_path/'model', n=2).explorer.flows) == 1
    with pytest.raises(ValueError, match="no folder"): explore.panel('gone')
