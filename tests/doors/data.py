import torch
from PIL import Image

from doors import Door, choice, door, flag, flat, integers, number, off, one_more_axis, tensor, whole
from flowbook.data import Folder, InMemory


def in_memory(n=6): return dict(images=torch.zeros(n, 1, 4, 4, dtype=torch.uint8), labels=torch.arange(n) % 2, classes=('a', 'b'), levels=17)
def pets(tmp): # two classes of two files, and files and folders of other kinds
    for kind in 'ab':
        (tmp/'pets'/kind).mkdir(parents=True, exist_ok=True)
        for i in range(2): Image.new('RGB', (6, 4)).save(tmp/'pets'/kind/f'{i}.png')
    return tmp/'pets'
def in_files(tmp): return dict(paths=sorted(pets(tmp).rglob('*.png')), labels=torch.tensor([0, 0, 1, 1]), classes=('a', 'b'), size=4)
def a_file(tmp): (tmp/'rubbish.png').write_text('no image'); return tmp/'rubbish.png'
def three(): return dict(x=torch.zeros(3, 1, 8, 8))

PATHS = [3, None, '', 'a\0b', [1]]
PICTURES = [*tensor(), integers('x'), lambda good: torch.zeros(3, 2, 8, 8), lambda good: torch.zeros(0, 1, 8, 8), one_more_axis('x'), lambda good: torch.zeros(8, 8)]
LABELS = ['cat', None, 3, torch.zeros(6), torch.full((6,), 2), torch.full((6,), -1), torch.zeros(5).long(), torch.zeros(6, 1).long(), torch.zeros(6).bool(), ['a'] * 6, torch.zeros(0).long()]
INDICES = ['cat', None, 3, [6], [-1], [.5], ['a'], torch.zeros(2, 2).long(), torch.ones(6).bool()]

DOORS = [
    door('check_whole', lambda tmp: dict(name='v', v=3, least=1, most=5), v=whole(1, 5)),
    door('check_number', lambda tmp: dict(name='v', v=.5, low=0, high=1, above=True, below=True), v=number(0, 1, True, True)),
    door('check_choice', lambda tmp: dict(name='v', v='a', choices=('a', 'b')), v=choice()),
    door('check_path', lambda tmp: dict(name='v', v='~/a'), v=[*PATHS, '~nobody-has-this-name/a']),
    door('check_folder', lambda tmp: dict(name='v', v=tmp/'new'), v=[*PATHS, __file__, __file__ + '/in']),
    door('check_device', lambda tmp: dict(name='v', v='cpu'), v=['abacus', None, 3.5, [], 'cuda:99', '']),
    door('read_json', lambda tmp: ((tmp/'a.json').write_text('{}'), dict(path=tmp/'a.json'))[1], says={'path': 'is not JSON'}, path=[lambda good: good['path'].parent, lambda good: good['path'].parent/'none.json', __file__]),
    door('check_tensor', lambda tmp: dict(name='x', x=torch.zeros(2, 3, 4), axes='b 3 n'), x=[*tensor(), torch.zeros(2, 3), torch.zeros(2, 4, 4), torch.zeros(2, 3, 4).long()]),
    door('from_levels', lambda tmp: dict(v=torch.arange(3), levels=3), v=tensor(), levels=whole(2)),
    door('to_levels', lambda tmp: dict(x=torch.zeros(3), levels=3), x=[*tensor(), integers('x'), torch.full((3,), torch.nan)], levels=whole(2, 256)),
    door('image_grid', lambda tmp: dict(**three(), nrow=2, pad=1), x=PICTURES, nrow=[v for v in whole() if v is not None], pad=[*whole(0), (1,), (1, -1), (1, 2, 3)]),
    door('show_images', lambda tmp: dict(**three(), nrow=2, titles='abc', rows='ab', cols='ab', size=1.), x=PICTURES, nrow=[v for v in whole() if v is not None], titles=['ab', 3, []], rows=['a', 3], cols=['a', 3],
         size=[v for v in number(0, above=True) if v is not None]),
    door('save_images', lambda tmp: dict(**three(), path=tmp/'a.png', nrow=2, zoom=1), x=PICTURES, nrow=[v for v in whole() if v is not None], zoom=[v for v in whole(1, 100) if v is not None],
         path=[*PATHS, '.', 'a.xyz', 'a', __file__ + '/a.png']),
    door('patchify', lambda tmp: dict(x=torch.zeros(2, 1, 4, 6), p=2), x=[*tensor(), flat('x'), one_more_axis('x'), off('x', 2), off('x', 3)], p=[*whole(), 4]),
    door('unpatchify', lambda tmp: dict(tokens=torch.zeros(2, 6, 4), p=2, shape=(1, 4, 6)), tokens=[*tensor(), flat('tokens'), off('tokens', 1), off('tokens', 2), one_more_axis('tokens')], p=[*whole(), 4],
         shape=['abc', None, 3, (4, 6), (0, 4, 6), (1, 4., 6)]),
    door('keyed', lambda tmp: dict(seed=0, epoch=0, index=0, stream='flip'), seed=whole(0, 2**128 - 1), epoch=whole(0, 2**63 - 1), index=whole(0, 2**63 - 1), stream=[None, 3, b'flip']),
    door('stratified', lambda tmp: dict(labels=torch.arange(6) % 2, held_out=2, seed=0), labels=[*tensor(), torch.zeros(6), torch.full((6,), -1), torch.zeros(6, 2).long()], held_out=whole(0, 6), seed=whole(0)),
    door('ImageSet', lambda tmp: dict(labels=torch.arange(6) % 2, classes=('a', 'b'), shape=(1, 4, 4), levels=17), labels=[v for v in LABELS if not isinstance(v, torch.Tensor) or v.shape != (5,)], classes=[3, None],
         shape=[3, None, (4, 4), (0, 4, 4), (1, 4., 4), 'abc'], levels=[v for v in whole(2, 256) if v is not None]),
    door('InMemory', lambda tmp: in_memory(), images=[*tensor(), torch.zeros(6, 1, 4, 4), torch.zeros(6, 4, 4).byte(), torch.full((6, 1, 4, 4), 17).byte()], labels=LABELS, classes=[3, None],
         levels=whole(2, 256)),
    door('ImageSet.batch', lambda tmp: dict(index=[0, 5]), of=lambda tmp: InMemory(**in_memory()), index=INDICES),
    door('Folder', in_files, paths=['a.png', None, [], [3], [None] * 4], labels=[torch.zeros(4), torch.full((4,), 2), torch.zeros(3).long(), 'cat', None],
         classes=[3, None], size=[v for v in whole(1, 2**13) if v is not None]),
    door('check_images', lambda tmp: dict(**three()), x=[*tensor(), integers('x'), flat('x'), one_more_axis('x'), lambda good: good['x'] + 1.01, lambda good: good['x'] * torch.nan, lambda good: good['x'] - torch.inf]),
    door('check_labels', lambda tmp: dict(y=torch.arange(2), classes=('a', 'b')), y=[*tensor(), torch.zeros(2), torch.zeros(2).bool(), torch.zeros(2, 1).long(), torch.tensor([0, 2]), torch.tensor([-1, 0])], classes=[3]),
    Door('load', lambda tmp: dict(name='folder', split='test', root=pets(tmp), image_size=4, held_out=.5),
         dict(name=choice(), split=choice(), root=[*PATHS, 'absent', 'a' * 5000, __file__, '/dev/null', lambda good: good['root']/'a'], image_size=[v for v in whole(1, 2**13) if v is not None], held_out=number(0, 1, False, True)), None, {}),
    door('resize_levels', lambda tmp: dict(images=torch.zeros(2, 3, 8, 8).byte(), size=4, levels=17), images=[*tensor(), torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8).byte()], size=whole(1, 2**13), levels=whole(2, 256)),
    door('Flip', lambda tmp: dict(p=.5), p=number(0, 1)),
    door('batches', lambda tmp: dict(data=InMemory(**in_memory()), batch_size=4, seed=0, transforms=[], epochs=2, shuffle=True, drop_last=True, start=0, part=(0, 2)),
         data=['digits', None, 3, [], torch.zeros(6, 1, 4, 4), [torch.zeros(1, 4, 4)] * 6, [(torch.zeros(1, 4, 4),)] * 6, [(torch.zeros(1, 4, 4), .5)] * 6, [(torch.zeros(1, 4, 4), -1)] * 6, [(torch.zeros(1, 4, 4), 'cat')] * 6,
               [(torch.zeros(4, 4), 0)] * 6, [(torch.zeros(1, 4, 4).byte(), 0)] * 6, [(torch.full((1, 4, 4), torch.nan), 0)] * 6, [('a picture', 0)] * 6, [{'x': 1}] * 6],
         batch_size=[*whole(1, 6), 3], seed=whole(0), transforms=[None, 3, [None], 'flip'], epochs=[v for v in whole(0) if v is not None], shuffle=flag(), drop_last=[v for v in flag() if v is not None], start=whole(0),
         part=[None, 3, (0,), (2, 2), (-1, 2), (0, 0), (0., 2), (0, 3)]),
    door('read_image', lambda tmp: dict(path=pets(tmp)/'a'/'0.png', size=4), path=[*PATHS], size=[v for v in whole(1, 2**13) if v is not None]),
    door('read_image', lambda tmp: dict(path=pets(tmp)/'a'/'0.png'), path=['absent.png', lambda good: a_file(good['path'].parent), lambda good: good['path'].parent], says={'path': 'cannot be read as an image'}),
    door('find_images', lambda tmp: dict(root=pets(tmp), split='test', held_out=.5), root=[*PATHS, 'absent', 'a' * 5000, __file__, lambda good: good['root']/'a'], split=choice(), held_out=number(0, 1, False, True)),
]
INNER = {'without arguments': 'plot_style',
         'a record': 'Batch',
         'bytes and tensors that the library writes and reads: tests/test_nothing_lost.py': 'replace_bytes sha256_of_tensors'}
