"""The book's own tools: exercises, README, pages, and the checks that CI asks first."""
import os, re, shutil, subprocess, sys
from pathlib import Path

import pytest
for needed in ('nbdev', 'nbconvert', 'nbclient', 'jupyter_server_mathjax'): pytest.importorskip(needed)
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from flowbook import book

ROOT = book.book_root(Path(__file__).parent)
OFF = '#| eval: false\n'
PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='


def code(source, *tags, outputs=()):
    fold = {'jupyter': {'source_hidden': True}} if {'solution', 'wrong'} & set(tags) else {}
    return new_code_cell(source, metadata={'tags': list(tags), **fold} if tags else {}, outputs=list(outputs))

def figure():
    shown = new_output('display_data', {'image/png': PNG, 'text/plain': '<Figure>'})
    return code("plt.plot([1]); plt.title('One point')", outputs=[shown])

def exercise(unsolved='def twice(x): ...', solution='def twice(x): return 2 * x', wrong='def twice(x): return x**2',
             check="assert twice(3) is not None, 'hint: return a number'\nassert twice(3) == 6, 'hint: not the square'"):
    return [code(OFF + unsolved, 'exercise', 'ex-twice'), code(OFF + check, 'check', 'ex-twice', 'raises-exception'),
            code(OFF + solution, 'solution', 'ex-twice'), code(OFF + wrong, 'wrong', 'ex-twice')]

CHAPTER = ['# Points\n\n> About one point.', code('#| default_exp points'),
           '## Where $x^2$ is\n\nInline $x^2$, displayed $$\\int p(x)\\,dx = 1.$$',
           code('#| export\ndef point(): return 1'), code('#| hide\nsecret = 1'), figure(),
           'See [the front](index.ipynb), [a result](results/r.json) and [the licence](../LICENSE).']
INDEX = ['# Book\n\n> In short.', 'Chapter [one](01_points.ipynb#Exercises). ![a square](images/square.png)',
         code('#| echo: false\nprint("shown")', outputs=[new_output('stream', name='stdout', text='shown\n')])]

@pytest.fixture
def make(tmp_path):
    "Makes a checkout from chapters: lists of cells, where a string is markdown."
    def make(**chapters):
        (tmp_path/'nbs'/'images').mkdir(parents=True), (tmp_path/'nbs'/'results').mkdir()
        shutil.copy(ROOT/'settings.ini', tmp_path)
        (tmp_path/'LICENSE').write_text('free'), (tmp_path/'nbs'/'results'/'r.json').write_text('{}')
        shutil.copy(ROOT/'LICENSE', tmp_path/'nbs'/'images'/'square.png')     # any file will do
        for name, cells in chapters.items(): write(tmp_path/'nbs'/f'{name}.ipynb', cells)
        return tmp_path
    return make

def write(path, cells):
    cells = [new_markdown_cell(c) if isinstance(c, str) else c for c in cells]
    nb = new_notebook(cells=cells, metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
    for i, c in enumerate(nb.cells): c.id = f'cell-{i}'
    nbformat.write(nb, path)
    return path


# exercises

BOOK = [(f, ex) for f in book.notebooks(ROOT) for ex in book.exercises(f)]

@pytest.mark.parametrize('ex', [ex for _, ex in BOOK], ids=[f'{f.stem}:{ex.name}' for f, ex in BOOK])
def test_exercises_of_the_book(ex):
    report = book.check_exercise(ex)
    assert report.problems == [] and {'unsolved', 'wrong'} <= report.hints.keys()

def test_good_exercise(tmp_path):
    ex, = book.exercises(write(tmp_path/'a.ipynb', exercise()))
    assert book.check_exercise(ex) == ('ex-twice', {'unsolved': 'hint: return a number', 'wrong': 'hint: not the square'}, [])

@pytest.mark.parametrize('change, problem', [
    (dict(solution='def twice(x): return 3 * x'), 'the check does not pass the solution: AssertionError'),
    (dict(solution='raise SystemExit(1)'), 'the check does not pass the solution: SystemExit'),
    (dict(unsolved='def twice(x): return 6'), 'the check passes the unsolved answer'),
    (dict(unsolved=''), 'the unsolved answer raises NameError'),
    (dict(wrong='def twice(x): return x + x'), 'the check passes the wrong answer'),
    (dict(wrong='def twice(x): return x.y'), 'the wrong answer raises AttributeError'),
    (dict(check='assert twice(3) == 6'), 'the unsolved answer fails without a hint'),
    (dict(check='assert twice(3) == 6, " "'), 'the wrong answer fails without a hint'),
])
def test_bad_exercise(tmp_path, change, problem, capsys):
    path = write(tmp_path/'a.ipynb', exercise(**change))
    assert any(p.startswith(problem) for p in book.check_exercise(book.exercises(path)[0]).problems)
    assert book.report_exercises([path]) == 1 and '0 passed, 1 failed' in capsys.readouterr().out

@pytest.mark.parametrize('missing', ['exercise', 'check', 'solution', 'wrong'])
def test_missing_cell_is_named(tmp_path, missing):
    cells = [c for c in exercise() if missing not in c.metadata.tags]
    assert book.exercises(write(tmp_path/'a.ipynb', cells))[0].problems == [f'there is no {missing} cell']

def test_malformed_cells_are_named(tmp_path):
    cells = exercise()
    cells[0].source = 'def twice(x): ...'                      # would be run by nbdev_test
    cells[1].metadata.tags.remove('raises-exception')
    del cells[2].metadata['jupyter']
    cells += [code(OFF + 'x', 'wrong'), code(OFF + 'x', 'ex-twice'), code(OFF + 'y', 'solution', 'ex-twice')]
    found = {ex.name: ex.problems for ex in book.exercises(write(tmp_path/'a.ipynb', cells))}
    text = '\n'.join(sum(found.values(), []))
    for problem in ('exercise cell lacks `#| eval: false`', 'lacks the tag raises-exception', 'solution cell is not folded',
                    'a wrong cell needs one tag ex-NAME', 'a cell needs one of the tags', 'there are 2 solution cells'):
        assert problem in text
    assert 'cell 5' in found, 'a cell without a name is named by its place'

def test_answers_do_not_see_each_other(tmp_path):
    ex, = book.exercises(write(tmp_path/'a.ipynb', exercise(solution='left = 1\ndef twice(x): return 2 * x',
        wrong='def twice(x): return globals().get("left", 0)', unsolved='def twice(x): return globals().get("left")')))
    assert book.check_exercise(ex).problems == []


# README

def test_readme_follows_the_index(make):
    root = make(index=INDEX)
    text = book.readme(root)
    assert '](nbs/01_points.ipynb#Exercises)' in text and '](nbs/images/square.png)' in text
    assert 'print' not in text and 'shown' in text, 'echo: false hides the code, not what it printed'
    assert book.readme_problems(root)[0].startswith('README.md is not current')
    (root/'README.md').write_text(text)
    assert book.readme_problems(root) == []

def test_readme_command(make, monkeypatch, capsys):
    root = make()
    monkeypatch.chdir(root/'nbs')
    assert book.main(['readme', '--check']) == 0 and 'skipped' in capsys.readouterr().out
    write(root/'nbs'/'index.ipynb', INDEX)
    assert book.main(['readme', '--check']) == 1 and 'not current' in capsys.readouterr().out
    assert book.main(['readme']) == 0 and book.main(['readme', '--check']) == 0

def test_readme_refuses_image_outputs(make):
    root = make(index=INDEX + [figure()])
    with pytest.raises(ValueError, match=r'One point.*nbs/images'): book.readme(root)


# pages

@pytest.fixture
def site(make):
    return book.pages(make(**{'index': INDEX, '01_points': CHAPTER + ['## Exercises'] + exercise()}))

@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def test_pages(site):
    assert book.check_site(site) == []
    html = (site/'01_points.html').read_text()
    assert '<h1 id="Points">' in html and '$$\\int p(x)\\,dx = 1.$$' in html
    assert 'secret' not in html and 'exported to points.py' in html and '#|' not in html and 'default_exp' not in html
    assert re.search(r'<img alt="One point" src="01_points_files/\w+\.png"', html)
    assert 'base64' not in html and '&lt;Figure' not in html
    assert 'href="index.html"' in html and 'results/r.json' in html and (site/'results'/'r.json').is_file()
    assert f"{book.settings(ROOT)['git_url']}/blob/main/LICENSE" in html, 'what is not on the site is linked to the repository'
    assert html.count('<details class="solution">') == html.count('<details class="wrong">') == 1
    assert 'Check: run it after your answer' in html
    assert 'rel="next" href="01_points.html"' in (site/'index.html').read_text() and 'aria-current="page"' in html
    assert (site/'images'/'square.png').is_file()

def test_pages_load_nothing_from_the_web(site):
    for f in [*site.glob('*.html'), *site.glob('assets/*.css')]:
        text = f.read_text()
        assert not re.search(r'(src|<link[^>]*href)\s*=\s*"(https?:)?//', text) and '@import' not in text
        assert not re.search('cdn|require(\\.min)?\\.js|jquery|mermaid|fonts\\.g', text, re.I)
    assert (site/'assets'/'mathjax'/'MathJax.js').is_file() and list(site.rglob('*.woff'))
    assert not list(site.rglob('mathmaps'))

def test_widgets_fall_back_to_their_figure(make):
    view = {'application/vnd.jupyter.widget-view+json': {'model_id': 'x'}, 'text/plain': 'interactive(children=())'}
    cell = code('interact(f)', outputs=[new_output('display_data', view), *figure().outputs])
    script = code('js', outputs=[new_output('display_data', {'application/javascript': '1'})])
    root = make(**{'01_w': ['# W', cell, script]})
    html = (book.pages(root)/'01_w.html').read_text()
    assert 'interactive(children' not in html and 'widget' not in html and html.count('<img') == 1

def test_pages_do_not_run_code(make):
    exported = code("#| export\nopen('ran', 'w').write('x')\nimport nothing_of_this_name")
    root = make(**{'01_x': ['# X', code('#| default_exp x'), exported]})
    book.pages(root)
    assert not list(root.rglob('ran'))

def test_pages_without_index(make):
    site = book.pages(make(**{'01_points': ['# Points', figure()]}))
    assert book.check_site(site) == [] and '01_points.html' in (site/'index.html').read_text()

def test_pages_leave_other_folders_alone(make, tmp_path):
    root = make(index=['# Book'])
    with pytest.raises(ValueError, match='not an older site'): book.pages(root, tmp_path/'nbs')
    assert book.pages(root, tmp_path/'out') == book.pages(root, tmp_path/'out'), 'an older site is replaced'

@pytest.mark.parametrize('bad, problem', [
    ('<a href="nowhere.html">x</a>', 'broken link: nowhere.html'),
    ('<a href="01_points.html#nothing">x</a>', 'no such anchor: 01_points.html#nothing'),
    ('<a href="#nothing">x</a>', 'no such anchor: #nothing'),
    ('<a href="/root.html">x</a>', 'broken link: /root.html'),
    ('<img src="no.png" alt="">', 'broken resource: no.png'),
    ('<img src="images/square.png">', 'image without alt text: images/square.png'),
    ('<script src="https://cdn.example.org/a.js"></script>', 'resource from the web: https://cdn.example.org/a.js'),
    ('<script src="//example.org/a.js"></script>', 'resource from the web: //example.org/a.js'),
    ('<script>load("https://cdn.example.org/a.js")</script>', 'resource from the web: https://cdn.example.org/a.js'),
    ('<link rel="stylesheet" href="http://example.org/a.css">', 'resource from the web: http://example.org/a.css'),
    ('<img src="https://example.org/a.png" alt="">', 'resource from the web: https://example.org/a.png'),
    ('<style>@import url("https://example.org/a.css");</style>', 'resource from the web: https://example.org/a.css'),
    ('<p style="background: url(https://example.org/a.png)">x</p>', 'resource from the web: https://example.org/a.png'),
])
def test_check_site_finds(site, bad, problem):
    page = site/'index.html'
    page.write_text(page.read_text().replace('</main>', bad + '</main>'))
    assert f'index.html: {problem}' in book.check_site(site)

def test_check_site_allows(site):
    page = site/'index.html'
    good = ('<a href="https://arxiv.org/abs/2412.06329">paper</a><a href="mailto:a@b.org">mail</a><a href="#">top</a>'
            '<a href="01_points.html#Points">x</a><img src="data:image/png;base64,AA" alt="">'
            '<script>var ns = "http://www.w3.org/1999/xhtml"</script>')
    page.write_text(page.read_text().replace('</main>', good + '</main>'))
    assert book.check_site(site) == []

def test_check_site_of_nothing(tmp_path): assert book.check_site(tmp_path)

def test_pages_command(make, monkeypatch, capsys):
    root = make(**{'01_x': ['# X', 'A [link](02_missing.ipynb) and ![a picture](images/none.png)']})
    monkeypatch.chdir(root)
    assert book.main(['pages']) == 1
    out = capsys.readouterr().out
    assert 'broken link: 02_missing.html' in out and 'broken resource: images/none.png' in out
    assert (root/'_site'/'01_x.html').is_file()

@pytest.fixture
def browser(tmp_path):
    "Chromium without a window and without a network."
    webdriver = pytest.importorskip('selenium.webdriver')
    paths = [next(filter(None, map(shutil.which, names)), None) for names in (('chromium', 'chromium-browser', 'google-chrome'), ('chromedriver',))]
    if None in paths: pytest.skip('no browser')
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for o in ('--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking', '--allow-file-access-from-files',
              '--host-resolver-rules=MAP * ~NOTFOUND', '--window-size=1200,900', f'--user-data-dir={tmp_path}/profile'): options.add_argument(o)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()

TYPESET = """const done = arguments[0], end = Date.now() + 100000;
const wait = () => { if (window.MathJax && MathJax.Hub && MathJax.isReady) MathJax.Hub.Queue(() => done('ready'));
                     else if (Date.now() > end) done('MathJax is not there'); else setTimeout(wait, 50); }; wait();"""
LOOK = """return {broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(-60)),
 figures: document.images.length, maths: document.querySelectorAll('.MathJax').length,
 bad: document.querySelectorAll('.MathJax_Error, .merror, .noError, .MathJax [style*="color: red"]').length, wide: document.documentElement.scrollWidth - innerWidth}"""

def looked_at(driver, page, width=None):
    "What a page shows once its maths is typeset, and what the console says."
    if width: driver.set_window_size(width, 900)
    driver.get(page.as_uri())
    assert driver.execute_async_script(TYPESET) == 'ready', page.name
    found = driver.execute_script(LOOK)
    return {**found, 'console': [e['message'] for e in driver.get_log('browser') if e['level'] in ('SEVERE', 'WARNING')], 'html': driver.page_source}

def prose(html): return re.sub(r'(?s)<(script|style|pre|code|title)\b.*?</\1>|<[^>]*>', '', html)

@pytest.mark.slow
def test_every_page_in_a_browser(tmp_path, browser):
    "Every page of the book, without a network: every link and figure, the maths, and not a word on the console."
    site = book.pages(ROOT, tmp_path/'site')
    assert book.check_site(site) == []
    for page in sorted(site.glob('*.html')):
        seen = looked_at(browser, page)
        assert seen['broken'] == [] and seen['console'] == [] and seen['bad'] == 0, (page.name, seen['broken'], seen['console'])
        assert seen['figures'] == len(re.findall(r'<img\b', page.read_text())), page.name
        assert not re.search(r'\$\$|\\(frac|log|mathcal|mu|alpha)\b', prose(seen['html'])), f'{page.name}: maths left as TeX'
        if '$' in prose(page.read_text()): assert seen['maths'], f'{page.name}: no maths was typeset'
        assert seen['wide'] <= 0, f'{page.name} is wider than the window'

@pytest.mark.slow
@pytest.mark.parametrize('change, seen', [(('square.png"', 'no.png"'), 'broken'), (('</main>', '<script>nosuch()</script></main>'), 'console'), (('$x^2$', '$\\frac$'), 'bad'), (('$x^2$', '$\\nosuch x$'), 'bad')])
def test_the_browser_sees_what_is_broken(tmp_path, browser, site, change, seen):
    site = Path(shutil.copytree(site, tmp_path/'broken'))
    for page in site.glob('*.html'): page.write_text(page.read_text().replace(*change))
    assert any(looked_at(browser, p)[seen] for p in site.glob('*.html'))


# doors, folded answers, a class

ASKED = [new_markdown_cell('> **Predict, then run.** How much?'), new_code_cell('x = 2'), new_code_cell('print(x)'), new_code_cell('print(x)')]

def test_answers_are_folded_and_open_again(make):
    root = make(**{'01_points': ['# P', *ASKED]})
    path = root/'nbs'/'01_points.ipynb'
    assert book.run([path]) == [] and book.undressed(root)                       # no badges yet
    hidden = lambda: [bool(c.metadata.get('jupyter', {}).get('outputs_hidden')) for c in nbformat.read(path, 4).cells if c.source.startswith('print')]
    assert hidden() == [True, False]
    nb = nbformat.read(path, 4); nb.cells = [c for c in nb.cells if 'Predict' not in c.source]; nbformat.write(nb, path)
    assert any('folded' in p for p in book.undressed(root))
    book.dress(root); assert hidden() == [False, False]

def test_a_folded_answer_on_a_page(make, tmp_path):
    root = make(**{'01_points': ['# P', *ASKED]})
    book.run([root/'nbs'/'01_points.ipynb'])
    html = (book.pages(root, tmp_path/'s')/'01_points.html').read_text()
    assert html.count('<details class="answer">') == 1 and html.index('What it gives') < html.index('<pre>2')

def test_every_chapter_has_its_doors(make):
    root = make(**{'index': INDEX, '01_points': CHAPTER, '13_points_x': CHAPTER})
    book.dress(root)
    cells = nbformat.read(root/'nbs'/'13_points_x.ipynb', 4).cells
    assert 'blob/main/nbs/13_points_x.ipynb' in cells[1].source and 'labpath=nbs%2F13_points_x.ipynb' in cells[1].source and 'google.colab' in cells[2].source
    assert 'colab' not in (root/'nbs'/'index.ipynb').read_text()
    before = {f: f.read_bytes() for f in book.notebooks(root)}
    book.dress(root); assert before == {f: f.read_bytes() for f in book.notebooks(root)}, 'twice is once'
    assert book.undressed(root) == [] and book.unclean_notebooks(root) == []
    write(root/'nbs'/'02_new.ipynb', CHAPTER)
    assert [p.split(':')[0].split()[0] for p in book.undressed(root)] == ['02_new.ipynb', '_quarto.yml']

def test_quarto_knows_every_chapter_in_order():
    yaml = pytest.importorskip('yaml')
    said = yaml.safe_load((ROOT/'nbs'/'_quarto.yml').read_text())
    chapters = said['website']['sidebar']['contents']
    assert chapters[:2] == ['index.ipynb', 'prerequisites.ipynb'] and chapters[2:] == sorted(chapters[2:])
    assert {*chapters} == {f.name for f in book.notebooks(ROOT)} and said['project']['type'] == 'website'

@pytest.mark.parametrize('colab', [True, False])
def test_the_install_cell_fetches_the_book_on_colab_alone(tmp_path, colab):
    "The cell of a real chapter, with a git and a pip that write down what they are told."
    cell = next(c for c in nbformat.read(ROOT/'nbs'/'07_denoise.ipynb', 4).cells if c.get('id') == 'colab')
    (tmp_path/'bin').mkdir()
    for name in ('git', 'pip'):
        (tmp_path/'bin'/name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/told\nmkdir -p {tmp_path}/content/flowbook/nbs\n')
        (tmp_path/'bin'/name).chmod(0o755)
    source = cell.source.replace('/content', f'{tmp_path}/content')
    fake = "import types; sys.modules['google.colab'] = types.ModuleType('google.colab')" if colab else ''
    (tmp_path/'try.py').write_text(f"""import sys, os
from IPython.core.interactiveshell import InteractiveShell
{fake}
done = InteractiveShell.instance().run_cell({source!r})
done.raise_error(); print(os.getcwd()); print(sys.path[0])""")
    env = {**os.environ, 'PATH': f"{tmp_path}/bin:{os.environ['PATH']}", 'IPYTHONDIR': str(tmp_path/'ipython')}
    out = subprocess.run([sys.executable, 'try.py'], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert out.returncode == 0, out.stderr
    where, first = out.stdout.splitlines()[-2:]
    if not colab: assert Path(where) == tmp_path and not (tmp_path/'told').exists(); return
    told = (tmp_path/'told').read_text().splitlines()
    assert where.endswith('content/flowbook/nbs') and first.endswith('content/flowbook')
    assert told[0].startswith('git clone') and 'flowbook/flowbook' in told[0] and told[1].startswith('pip install')

def test_a_class_gets_questions_and_no_answers(make, tmp_path, monkeypatch, capsys):
    root = make(**{'index': INDEX, '01_points': [*CHAPTER, *exercise(solution='def twice(x): return x + x')]})
    monkeypatch.chdir(root)
    assert book.main(['handout', '--out', 'class']) == 0 and '2 notebooks' in capsys.readouterr().out
    nb = nbformat.read(root/'class'/'01_points.ipynb', 4); nbformat.validate(nb)
    text = (root/'class'/'01_points.ipynb').read_text()
    assert 'x + x' not in text and 'x**2' not in text and 'not the square' in text and PNG not in text
    ids = lambda f: [c.id for c in nbformat.read(f, 4).cells]
    assert [i for i in ids(root/'nbs'/'01_points.ipynb') if i in ids(root/'class'/'01_points.ipynb')] == ids(root/'class'/'01_points.ipynb')
    assert (root/'class'/'images'/'square.png').is_file() and (root/'class'/'results'/'r.json').is_file()
    assert book.main(['handout', '--out', 'class']) == 2 and 'not empty' in capsys.readouterr().err, 'what a class wrote is not overwritten'

def test_a_chapter_of_the_class_runs_where_it_lies(tmp_path):
    "The prerequisites, without answers, from top to bottom in the folder of the class."
    out = book.handout(ROOT, tmp_path/'class')
    assert len(list(out.glob('*.ipynb'))) == len(book.notebooks(ROOT))
    for f in out.glob('*.ipynb'):
        cells = nbformat.read(f, 4).cells
        assert not any(c.get('outputs') or {'solution', 'wrong'} & set(c.metadata.get('tags', [])) for c in cells), f.name
    assert book.run_notebook(out/'prerequisites.ipynb') == ''

@pytest.mark.parametrize('text, found', [('See chapter 02.', 1), ('See [chapter 02](02_b.ipynb).', 0), ('Chapters 02 and 03.', 2), ('Chapters 02 and [03](03_c.ipynb).', 1), ('`chapter 02`', 0),
                                         ('## Chapter 02', 0), ('In chapter 01 itself.', 0), ('In chapter 77.', 0), ('chapter 02\n\n[x](02_b.ipynb)', 1)])
def test_bare_references(make, text, found):
    root = make(**{'01_a': ['# A\n\n> After chapter 03.', text], '02_b': ['# B'], '03_c': ['# C']})
    assert len(book.bare_references(root)) == found


# run

def test_run_stores_outputs(make):
    root = make(**{'01_points': ['# P', code('#| default_exp p'), code("#| export\ndef p(): return 1"),
                                 code("print('10%\\r100%')"), code("import warnings; warnings.warn('not in the book')"),
                                 *exercise()]})
    path = root/'nbs'/'01_points.ipynb'
    assert book.run([path]) == []
    cells = nbformat.read(path, 4).cells
    printed = [o.text for c in cells if c.cell_type == 'code' for o in c.outputs]
    assert printed == ['100%\n'], 'folded, no warning, exercises not run'
    assert all(c.cell_type == 'code' for c in cells[1:]) and (root/'flowbook'/'p.py').is_file()
    assert book.unclean_notebooks(root) == book.stored_errors(root) == []

def test_run_keeps_what_ran(make, monkeypatch, capsys):
    root = make(**{'01_bad': ['# Bad', code("print('before')"), code('1 / 0'), code("print('after')")]})
    monkeypatch.chdir(root)
    assert book.main(['run', 'nbs/01_bad.ipynb']) == 1
    assert '01_bad.ipynb: cell 3 of 4 failed: ZeroDivisionError: division by zero\n1 / 0' in capsys.readouterr().out
    cells = nbformat.read('nbs/01_bad.ipynb', 4).cells[1:]
    assert [[o.output_type for o in c.outputs] for c in cells] == [['stream'], ['error'], []]
    assert book.stored_errors(root) == ['01_bad.ipynb: cell 3 holds a stored ZeroDivisionError; run the notebook']

def test_run_names_what_took_too_long_or_died(tmp_path):
    path = write(tmp_path/'a.ipynb', [code('import time; time.sleep(60)')])
    assert book.run_notebook(path, timeout=1).startswith('a.ipynb: cell 1 of 1 failed: A cell timed out')
    path = write(tmp_path/'b.ipynb', [code('x = 1'), code('import os; os._exit(1)')])
    assert book.run_notebook(path).startswith('b.ipynb: cell 2 of 2 failed: Kernel died')


# damaged files

BAD = {'bytes': bytes(range(256)), 'empty': b'', 'cut off': b'{"cells": [{"cell_type": "code", "sour', 'nested': b'[' * 100_000, 'list': b'[]', 'null': b'null', 'cells': b'{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}',
       'no source': b'{"cells": [{"cell_type": "code", "metadata": {}}], "nbformat": 4, "nbformat_minor": 5, "metadata": {}}', 'no notebook': b'{"a": 1}'}

@pytest.mark.fault('malice', 'a notebook of the book is rubbish, cut off, or a file of another kind', 'the tools name the file and the reason, run nothing and write nothing; take the file from git')
@pytest.mark.parametrize('kind', BAD)
def test_a_damaged_notebook_is_named(make, monkeypatch, capsys, kind, tried):
    root = make(**{'01_x': ['# X']})
    (bad := root/'nbs'/'02_bad.ipynb').write_bytes(BAD[kind])
    monkeypatch.chdir(root)
    before = sorted(root.rglob('*'))
    for f in (book.read_notebook, book.processed, book.exercises, book.make_page, book.run_notebook, lambda p: book.run([root/'nbs'/'01_x.ipynb', p])):
        with pytest.raises(ValueError, match='02_bad.ipynb is no notebook') as e: f(bad)
    tried(said=str(e.value))
    for line in (['exercises'], ['run', 'nbs/02_bad.ipynb'], ['pages']):
        assert book.main(line) == 2 and '02_bad.ipynb' in capsys.readouterr().err
    assert bad.read_bytes() == BAD[kind] and [p for p in sorted(root.rglob('*')) if p not in before] == []

@pytest.mark.fault('malice', 'settings.ini is rubbish, or says nothing of what the tools need', 'it is named, and nothing is written; take the file from git')
@pytest.mark.parametrize('content', [bytes(range(256)), b'', b'[DEFAULT]\nnbs_path = nbs\n', b'nbs_path = nbs\n', b'[DEFAULT]\nnbs_path = nbs\nnbs_path = nbs\n'])
def test_damaged_settings_are_named(make, monkeypatch, capsys, content, tried):
    root = make(index=INDEX)
    (root/'settings.ini').write_bytes(content)
    monkeypatch.chdir(root)
    with pytest.raises(ValueError, match='root: .*settings.ini') as e: book.settings(root)
    tried(said=str(e.value))
    for line in (['check'], ['pages'], ['readme'], ['exercises']):
        assert book.main(line) == 2 and 'settings.ini' in capsys.readouterr().err
    assert not (root/'_site').exists() and not (root/'README.md').exists()

@pytest.mark.fault('malice', 'a notebook names its figure so that it would be written outside of the site', 'it is written inside, under its last name, or refused; nothing to do')
@pytest.mark.parametrize('name', ['../../../out.png', '/out.png', 'a/b.png'])
def test_a_figure_is_written_inside_the_site(make, tmp_path, name):
    cell = figure()
    cell.outputs[0].metadata['filename'] = name
    root = make(index=['# Book', cell])
    before = {p for p in tmp_path.rglob('*')}
    try: book.pages(root, tmp_path/'a'/'b'/'site')
    except ValueError as e: assert 'outside of the site' in str(e)           # an older nbconvert keeps the whole name
    assert all(tmp_path/'a' in (p, *p.parents) for p in set(tmp_path.rglob('*')) - before) and not Path('/out.png').exists()
    assert {p for p in (tmp_path/'a'/'b').iterdir()} <= {tmp_path/'a'/'b'/'site'}

def test_as_a_module_it_is_the_command(tmp_path):
    r = subprocess.run([sys.executable, '-m', 'flowbook.book', 'check'], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert r.returncode == 2 and 'settings.ini' in r.stderr


# check

@pytest.fixture
def exported(make, monkeypatch):
    "A checkout that is in order."
    root = make(**{'index': INDEX, '01_points': CHAPTER})
    monkeypatch.setenv('IN_TEST', '1')                         # nbdev_export would silently do nothing
    book.nbdev('doclinks.nbdev_export', root)
    book.nbdev('clean.nbdev_clean', root)
    book.dress(root)
    (root/'README.md').write_text(book.readme(root))
    return root

def test_check_passes(exported, capsys):
    assert book.check(exported) == 0 and capsys.readouterr().out.count('ok ') == len(book.CHECKS)

def test_stale_modules(exported):
    lib = exported/'flowbook'
    assert book.stale_modules(exported) == []
    (lib/'points.py').write_text((lib/'points.py').read_text().replace('return 1', 'return 2'))
    (lib/'old.py').write_text('x = 1\n')
    assert book.stale_modules(exported) == ['flowbook/old.py: no notebook exports it; delete it',
                                            'flowbook/points.py: it is not what its notebook exports; run nbdev_export']
    (lib/'old.py').unlink(), (lib/'points.py').unlink()
    assert book.stale_modules(exported) == ['flowbook/points.py: it is missing; run nbdev_export']

def test_undefined_names(exported):
    assert book.undefined_names(exported) == []
    for text, rules in (('from os import *\ndef f(): return getcwd()\n', ('F403', 'F405')),
                        ("__all__ = ['gone']\ndef f(): return nowhere\n", ('F822', 'F821'))):
        (exported/'flowbook'/'points.py').write_text(text)
        assert all(rule in '\n'.join(book.undefined_names(exported)) for rule in rules)

def test_notebook_checks(exported):
    path = exported/'nbs'/'02_bad.ipynb'
    error = new_output('error', ename='ValueError', evalue='no', traceback=['no'])
    write(path, ['# Bad', code('1', outputs=[error]), code(OFF + 'x', 'exercise', 'ex-x')])
    text = path.read_text().replace('"execution_count": null', '"execution_count": 7')
    path.write_text(text)
    assert book.unclean_notebooks(exported) == ['02_bad.ipynb: nbdev_clean changes it; run it']
    assert book.stored_errors(exported) == ['02_bad.ipynb: cell 2 holds a stored ValueError; run the notebook']
    assert book.without_figure(exported) == ['02_bad.ipynb: it has no figure']
    assert '02_bad.ipynb: ex-x: there is no check cell' in book.malformed_exercises(exported)
    assert book.invalid_notebooks(exported) == []
    path.write_text(text.replace('"cell_type": "markdown"', '"cell_type": "prose"'))
    assert book.invalid_notebooks(exported)[0].startswith('02_bad.ipynb')

def test_machine_paths(exported):
    (exported/'a.txt').write_text(f'fine: https://a.org/home/x ~/data\nbad: {exported.parent}/x\n')
    (exported/'b.txt').write_text('/'.join(['', 'home', 'somebody', 'c']))
    assert [p.split(': ')[0] for p in book.machine_paths(exported)] == ['a.txt:2', 'b.txt:1']
    if shutil.which('git'):                                    # what git ignores is nobody else's business
        subprocess.run(['git', 'init', '-q'], cwd=exported, check=True)
        (exported/'.gitignore').write_text('a.txt\n')
        assert [p.split(': ')[0] for p in book.machine_paths(exported)] == ['b.txt:1']

def test_outside_a_checkout(tmp_path, capsys):
    with pytest.raises(ValueError, match='settings.ini'): book.book_root(tmp_path)
    assert book.main(['check']) == 2 and 'settings.ini' in capsys.readouterr().err

def test_import_is_light():
    "The tools' packages are for developers; importing the module must not need them."
    heavy = ['nbformat', 'nbconvert', 'nbdev', 'nbclient', 'jinja2', 'pygments', 'torch', 'fastcore']
    code = f'import sys; sys.modules.update(dict.fromkeys({heavy})); import flowbook.book'
    subprocess.run([sys.executable, '-c', code], check=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
