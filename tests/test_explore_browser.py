"""The panels of chapter 17 in a real JupyterLab: every control is moved by keys, and what the page then shows is compared,
pixel by pixel, with what the plain functions give for the setting at which the controls stand."""
import base64, io, json, os, shutil, signal, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')


def wait_for(question, seconds, what, every=.2):
    "The first true answer; TimeoutError says what was waited for and what was seen last."
    end, answer = time.monotonic() + seconds, None
    while time.monotonic() < end:
        if answer := question(): return answer
        time.sleep(every)
    raise TimeoutError(f'{what}: not within {seconds} s')


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    "(address, log) of a JupyterLab on a copy of the notebook; its whole process group ends with the test."
    book, settings = tmp_path/'book', tmp_path/'settings'
    book.mkdir()
    shutil.copy(ROOT/'nbs'/'17_explore.ipynb', book)
    for plugin, values in {'notebook-extension/tracker': {'windowingMode': 'none'},         # cells out of sight are drawn, too
                           'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False}}.items():
        file = settings/'@jupyterlab'/f'{plugin}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    port, log = free_port(), tmp_path/'lab.log'
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JUPYTERLAB_SETTINGS_DIR': str(settings), 'JUPYTERLAB_WORKSPACES_DIR': str(tmp_path/'workspaces'),
           'JUPYTER_CONFIG_DIR': str(tmp_path/'config'), 'JUPYTER_RUNTIME_DIR': str(tmp_path/'runtime'), 'IPYTHONDIR': str(tmp_path/'ipython')}
    env.pop('MPLBACKEND', None)                                       # the kernel chooses its own
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--expose-app-in-browser', '--ServerApp.token=', '--ServerApp.password=',
               '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}', '--ServerApp.port_retries=0', f'--ServerApp.root_dir={book}']
    address = f'http://127.0.0.1:{port}'

    def up():
        if server.poll() is not None: raise RuntimeError(f'JupyterLab ended with {server.returncode}:\n{log.read_text()[-3000:]}')
        try: return urllib.request.urlopen(f'{address}/api', timeout=2).status == 200
        except OSError: return False

    with log.open('w') as out:
        server = subprocess.Popen(command, cwd=book, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(up, 90, 'the server')
        yield address, log
    finally:
        for sig, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            try: os.killpg(server.pid, sig)
            except ProcessLookupError: break
            try: server.wait(patience)
            except subprocess.TimeoutExpired: continue


@pytest.fixture
def driver(tmp_path):
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
    browser, tool = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which('chromedriver')
    if not browser or not tool: pytest.skip(f"no {'browser' if not browser else 'chromedriver'} here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for o in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--window-size=1400,1200', f'--user-data-dir={tmp_path}/profile'):
        options.add_argument(o)
    d = webdriver.Chrome(options=options, service=webdriver.ChromeService(tool))
    d.set_script_timeout(60)
    try: yield d
    finally: d.quit()


NOTEBOOK = "const book = [...window.jupyterapp.shell.widgets('main')].find(w => w.sessionContext && w.content && w.content.model);\n"
READY = NOTEBOOK + """if (!book || !book.context.isReady || !book.sessionContext.isReady) return false;
const kernel = book.sessionContext.session && book.sessionContext.session.kernel;
return !!kernel && kernel.connectionStatus === 'connected';"""
RUN = NOTEBOOK + """window.jupyterapp.shell.activateById(book.id);
window.jupyterapp.commands.execute('notebook:run-all-cells');"""
CELLS = NOTEBOOK + """return book.content.widgets.filter(c => c.model.type === 'code' && c.model.sharedModel.getSource().trim()).map(c => ({
    count: c.model.executionCount, state: c.model.executionState, tags: c.model.getMetadata('tags') || [], source: c.model.sharedModel.getSource(),
    outputs: c.model.outputs.toJSON()}));"""
STATUS = NOTEBOOK + "return book.sessionContext.session.kernel.status;"
PIXELS = """const [selector, done] = arguments;
const img = document.querySelector(selector);
if (!img || !img.src) { done(null); return; }
fetch(img.src).then(r => r.blob()).then(b => { const r = new FileReader(); r.onload = () => done(r.result.split(',')[1]); r.readAsDataURL(b); })
    .catch(() => done(null));                                         // the address was replaced while it was read"""


def array(png):
    import numpy as np
    from PIL import Image
    return np.asarray(Image.open(io.BytesIO(png)).convert('RGB')).astype(int)


class Page:
    "The notebook in the browser, as a reader has it."
    def __init__(self, driver): self.driver = driver
    def find(self, selector): return self.driver.find_element('css selector', selector)
    def shown(self, name): return array(base64.b64decode(p)) if (p := self.driver.execute_async_script(PIXELS, f'img.flowbook-{name}')) else None
    def text(self, name='text'): return self.find(f'.flowbook-{name}').text
    def pale(self, name): return float(self.driver.execute_script('return getComputedStyle(arguments[0]).opacity', self.find(f'img.flowbook-{name}'))) < .5

    def choose(self, name, wanted=None):
        "Another option of a menu: the one called `wanted`, or the next."
        from selenium.webdriver.support.ui import Select
        e = self.find(f'.flowbook-{name} select')
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", e)
        menu = Select(e)
        texts = [o.text.replace('\xa0', ' ') for o in menu.options]
        at = texts.index(menu.first_selected_option.text.replace('\xa0', ' '))
        menu.select_by_index((at + 1) % len(texts) if wanted is None else texts.index(wanted))

    def press(self, name, part, *keys):
        e = self.find(f'.flowbook-{name} {part}')
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus();", e)
        e.send_keys(*keys)

    def stands(self, name, widget):
        "The value of a control as the page shows it; `widget`: its twin in this process, which knows what the menu's texts mean."
        kind = type(widget).__name__
        if kind == 'Checkbox': return self.find(f'.flowbook-{name} input').is_selected()
        if kind == 'Dropdown':
            label = self.driver.execute_script('return arguments[0].selectedOptions[0].text', self.find(f'.flowbook-{name} select')).replace('\xa0', ' ')
            return dict((o, o) if isinstance(o, str) else o for o in widget.options)[label]
        shown = self.find(f'.flowbook-{name} .widget-readout').text.strip()
        return int(shown) if kind == 'IntSlider' else float(shown)

    def errors(self):
        "Errors in outputs; the checks of unsolved exercises are meant to fail, and say so by their tag."
        cells = self.driver.execute_script(CELLS)
        bad = [(c['source'], o) for c in cells for o in c['outputs'] if o['output_type'] == 'error' and 'raises-exception' not in c['tags']]
        return bad + [(c['source'], o) for c in cells for o in c['outputs'] if 'Traceback' in ''.join(o.get('text', ''))]

    def settle(self, names, wanted, before, what):
        "Wait until the pictures are the wanted ones; they must have been others before."
        seen = {}
        def same():
            seen.update({k: self.shown(k) for k in names})
            return all(seen[k] is not None and seen[k].shape == w.shape and abs(seen[k] - w).max() <= 2 for k, w in zip(names, wanted()))
        try: wait_for(same, 30, what)
        except TimeoutError:
            away = {k: 'nothing' if seen[k] is None else f'{seen[k].shape} instead of {w.shape}' if seen[k].shape != w.shape
                    else f'{abs(seen[k] - w).max()} levels away' for k, w in zip(names, wanted())}
            raise AssertionError(f'{what}: the page does not show what the plain function gives: {away}') from None
        now = [seen[k] for k in names]
        if before is not None:
            assert any(a.shape != b.shape or abs(a - b).max() > 2 for a, b in zip(now, before)), f'{what}: the picture did not change'
        return now


def test_every_control_of_the_panels_in_jupyterlab(driver, lab):
    from selenium.webdriver.common.keys import Keys
    from dataclasses import replace
    from flowbook import explore
    address, log = lab
    driver.get(f'{address}/lab/tree/17_explore.ipynb?reset')
    script = driver.execute_script
    wait_for(lambda: script('return !!window.jupyterapp'), 90, 'the page')
    wait_for(lambda: script(READY), 90, "the notebook's kernel")
    script(RUN)
    def finished():
        cells = script(CELLS)
        return all(c['count'] is not None and c['state'] in ('idle', None) for c in cells) and script(STATUS) == 'idle'
    wait_for(finished, 300, 'all cells')
    page, right, left = Page(driver), Keys.ARROW_RIGHT, Keys.ARROW_LEFT
    assert not page.errors()

    ours = explore.Explorer(explore.book_flows())
    twins = explore.make_controls(ours, explore.START)
    def setting():
        at = {k: page.stands(k, w) for k, w in twins.items()}
        if not ours.flow(at['model']).classes: at['gamma'] = 0.      # switched off there, whatever it stands at
        at['block'] = min(at['block'], len(ours.flow(at['model']).blocks))   # the slider follows the model when the kernel has heard of it
        return explore.Setting(**at)
    def titles(): return tuple(page.text(f'{side}-title') for side in ('left', 'right'))
    def wanted(): return [array(png) for png in explore.render(ours.picture(setting()))[:2]]
    pictures = page.settle(('left', 'right'), wanted, None, 'the panel at its start')

    slider, menu = '.noUi-handle', 'select'
    moves = [('seed', slider, right), ('w', slider, right), ('gamma', slider, right), ('label', menu, None), ('schedule', menu, None), ('block', slider, left),
             ('denoise', 'input', Keys.SPACE), ('model', menu, 'digits, sigma 0.2'), ('kind', menu, None), ('tau', slider, right)]   # a model of as many blocks
    assert {m[0] for m in moves} == set(twins)
    for name, part, key in moves:
        before = setting()
        if part == menu: page.choose(name, key)
        else: page.press(name, part, key)
        wait_for(lambda: setting() != before, 10, f'{name}: the control itself')
        changed = [k for k in twins if getattr(setting(), k) != getattr(before, k)]
        assert changed == [name], f'{name} moved, and {changed} changed'
        pictures = page.settle(('left', 'right'), wanted, pictures, name)
        wait_for(lambda: ' ms' in page.text(), 10, 'the text below the pictures')
        assert 'nats' in page.text() and 'Nothing to show' not in page.text() and not page.pale('left')
        assert titles() == explore.titles_of(setting(), len(ours.flow(setting().model).blocks))

    # what cannot be becomes a sentence, and the panel lives on
    page.choose('kind', 'star (product of Gaussians)')
    page.choose('model', 'digits, sigma 0.1, no classes')
    wait_for(lambda: 'has none; choose' in page.text(), 30, 'a sentence about a flow without classes')
    page.choose('kind', 'temperature')                               # the ends of the temperature and of the weight
    for name, key, end in (('tau', Keys.HOME, .1), ('w', Keys.END, 10.)):
        def stands():                                                # a slider that the kernel has yet to switch on takes no key: press again
            page.press(name, slider, key)
            return getattr(setting(), name) == end
        wait_for(stands, 30, f'{name} at its end', every=1.)
    assert setting().w == 10. and setting().tau == .1
    pictures = page.settle(('left', 'right'), wanted, pictures, 'w = 10, tau = 0.1')
    page.choose('kind', 'class')
    page.choose('model', 'digits, sigma 0.1')
    page.press('seed', slider, right)
    pictures = page.settle(('left', 'right'), wanted, pictures, 'w = 10')
    assert 'broken' in page.text() and 'drawn grey' in page.text()

    # what was chosen is not lost where a model cannot show it, and a button undoes all
    page.choose('label', '7')
    pictures = page.settle(('left', 'right'), wanted, pictures, 'class 7')
    for model in ('digits, sigma 0.1, no classes', 'digits, sigma 0.2'):
        page.choose('model', model)
        wait_for(lambda: page.find('.flowbook-label select').is_enabled() == ('no' not in model), 30, f'the menu of classes of {model}')
    assert setting().label == 7
    page.find('.flowbook-reset').click()
    wait_for(lambda: setting() == replace(explore.START, block=8), 30, 'the start')
    pictures = page.settle(('left', 'right'), wanted, pictures, 'reset')
    page.choose('model', 'mnist5k, sigma 0.2, 256 tokens')           # too slow to be seen at once
    pictures = page.settle(('left', 'right'), wanted, pictures, 'many tokens')
    page.press('seed', slider, right)
    wait_for(lambda: 'Drawing' in page.text() and page.pale('left'), 10, 'a word while it draws', every=.01)
    pictures = page.settle(('left', 'right'), wanted, pictures, 'many tokens, another seed')
    wait_for(lambda: not page.pale('left') and 'nats' in page.text(), 10, 'the end of drawing')

    def densities(): return [array(png) for png in explore.density_png(page.stands('sigma', None))]
    pictures = page.settle(('one', 'two'), densities, None, 'the density at its start')
    for key, end in ((right, None), (Keys.HOME, .02), (Keys.END, 1.)):
        page.press('sigma', slider, key)
        pictures = page.settle(('one', 'two'), densities, pictures, 'sigma')
        assert end is None or page.stands('sigma', None) == end
        assert 'Nothing to show' not in page.text('density-text')

    # the solvers: each picture is what the plain function gives, and so are the passes but for rounding ('auto' may choose otherwise in another process)
    fields = explore.solver_controls(ours, explore.SOLVER_START)
    def at(): return explore.Contest(**{k: page.stands(f'solver-{k}', w) for k, w in fields.items()})
    def passes(): return [int(cells[1]) for row in page.text('solver-text').split('\n') if (cells := row.split())[:1] and cells[0] in explore.SOLVERS[:3]]
    memory = {}                                                      # compared again and again while the page catches up
    def plain():
        if at() not in memory: memory[at()] = explore.contest(ours, at())
        return memory[at()]
    def solved(): return [array(explore.to_png(r.images, explore.SIDE)) for r in plain()]
    names = [f'solver-{k}' for k in explore.SOLVERS]
    pictures = page.settle(names, solved, None, 'the solvers at their start')
    moves = [('seed', slider, right), ('n', menu, '1'), ('kind', menu, 'class'), ('w', slider, right), ('model', menu, 'digits, sigma 0.1'), ('tol', menu, '1e-03')]
    assert {m[0] for m in moves} == set(fields)
    for name, part, key in moves:
        before, said = at(), page.text('solver-text')
        if part == menu: page.choose(f'solver-{name}', key)
        else: page.press(f'solver-{name}', part, key)
        wait_for(lambda: at() != before, 10, f'{name} of the solvers: the control itself')
        assert [k for k in fields if getattr(at(), k) != getattr(before, k)] == [name]
        wait_for(lambda: page.text('solver-text') != said and 'Compared' in page.text('solver-text'), 60, f'{name} of the solvers: the text')
        pictures = page.settle(names, solved, None if name == 'tol' else pictures, f'{name} of the solvers')   # a looser tolerance shows in the passes only
        assert all(abs(a - r.passes) <= 3 for a, r in zip(passes(), plain())) and len(passes()) == 3 and 'Nothing' not in page.text('solver-text')
    page.choose('solver-model', 'digits, sigma 0.1, no classes')
    wait_for(lambda: 'needs classes' in page.text('solver-text'), 30, 'a sentence about a flow without classes')
    page.choose('solver-kind', 'none')
    page.settle(names, solved, None, 'the solvers again')

    # many moves at once: what is not ready is pale, and the last one wins without the comparisons between
    for name, value in (('model', 'mnist5k, sigma 0.2, 256 tokens'), ('n', '16'), ('kind', 'class')): page.choose(f'solver-{name}', value)
    wait_for(lambda: 'Comparing' in page.text('solver-text') and page.pale('solver-jacobi'), 30, 'a word while it compares', every=.02)
    page.choose('solver-n', '1'); page.choose('solver-kind', 'none'); page.choose('solver-model', 'digits, sigma 0.05')
    page.settle(names, solved, None, 'the solvers after many moves')
    wait_for(lambda: 'Compared' in page.text('solver-text') and not any(map(page.pale, names)), 30, 'the end of the comparison')

    assert not page.errors() and script(STATUS) == 'idle'
    if folder := os.environ.get('FLOWBOOK_SCREENSHOT'):               # for people who want to look
        for name in ('left', 'one', 'solver-jacobi'):
            script("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", f'img.flowbook-{name}')
            driver.save_screenshot(f'{folder}/{name}.png')
    assert 'Traceback' not in (lines := log.read_text()), lines[-3000:]  # exceptions of callbacks go here, not to the page
