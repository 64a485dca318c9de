"""What people hand in goes in right: pictures of any mode, with their own captions, and no row is lost."""
import csv
import io
import json
import warnings

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import egmi.data
from egmi.base.config import component_path
from egmi.base.images import as_rgb, check_image, read_image
from egmi.data.corpora import load_audiocaps, load_coco, load_karpathy
from egmi.data.folders import load_folder
from egmi.data.hub import load_huggingface
from egmi.evaluation.encoders import TransformersClip
from egmi.frozen.imagebind import ImageBindConfig, preprocess_images

BLOCKS = np.random.default_rng(0).integers(0, 256, (6, 8, 3))
PHOTO = Image.fromarray(np.kron(BLOCKS, np.ones((8, 8, 1))).astype(np.uint8)) # 64 x 48
RAMP = np.arange(65_536).reshape(256, 256)
WHITE = (255, 255, 255)


def save_picture(picture, tmp_path, suffix='.png', **options):
    "Saves a picture; returns its file."
    picture.save(tmp_path/f'picture{suffix}', **options)
    return tmp_path/f'picture{suffix}'


def assert_same_pixels(ours, theirs):
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def raises(problem):
    return pytest.raises(ValueError, match=problem)


def warns(problem):
    return pytest.warns(UserWarning, match=problem)


# Pictures

# orientation of EXIF -> how an upright picture lies in the file
LYING = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
         5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, 1),
         7: lambda x: x[::-1, ::-1].transpose(1, 0, 2), 8: lambda x: np.rot90(x, -1)}


@pytest.mark.parametrize('suffix, options', [('.png', {}), ('.jpg', dict(quality=100, subsampling=0)),
                                             ('.webp', dict(lossless=True)), ('.tif', {})])
@pytest.mark.parametrize('orientation', LYING)
def test_pictures_are_upright(orientation, suffix, options, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = Image.fromarray(np.ascontiguousarray(LYING[orientation](np.asarray(PHOTO))))
    picture = read_image(save_picture(lying, tmp_path, suffix, exif=exif, **options))
    difference = np.abs(np.asarray(picture, int) - np.asarray(PHOTO, int))
    assert picture.size == (64, 48) and difference.max() <= (6 if suffix == '.jpg' else 0)


def test_damaged_exif_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = save_picture(PHOTO, tmp_path, '.jpg', exif=exif)
    file.write_bytes(file.read_bytes().replace(b'Exif\0\0MM', b'Exif\0\0XX'))
    assert read_image(file).size == as_rgb(Image.open(file)).size == (64, 48)


def transparent_pictures():
    "A pixel that hides a colour beside an opaque one, in every way to say so; the opaque colour."
    palette = Image.new('P', (2, 1))
    palette.putpalette([10, 20, 30, 10, 20, 30])
    palette.putdata([0, 1])
    grey, alpha = (Image.fromarray(np.array([x], np.uint8)) for x in ([9, 40], [0, 255]))
    rgb = Image.fromarray(np.array([[[1, 2, 3], [10, 20, 30]]], np.uint8))
    return {'RGBA': (Image.merge('RGBA', [*rgb.split(), alpha]), {}, (10, 20, 30)),
            'LA': (Image.merge('LA', [grey, alpha]), {}, (40, 40, 40)),
            'P': (palette, dict(transparency=0), (10, 20, 30)),
            'P, a byte for each colour': (palette, dict(transparency=bytes([0, 255])), (10, 20, 30)),
            'L': (grey, dict(transparency=9), (40, 40, 40)),
            'RGB': (rgb, dict(transparency=(1, 2, 3)), (10, 20, 30)),
            'I;16': (Image.fromarray(np.array([[9, 2570]], np.uint16)), dict(transparency=9), (10, 10, 10))}


@pytest.mark.parametrize('mode', transparent_pictures())
def test_transparency_shows_white(mode, tmp_path):
    picture, options, colour = transparent_pictures()[mode]
    shown = read_image(save_picture(picture, tmp_path, **options))
    assert [shown.getpixel((x, 0)) for x in range(2)] == [WHITE, colour]


def test_half_transparency_shows_half_white():
    assert as_rgb(np.array([[[10, 20, 30, 128]]]) / 255).getpixel((0, 0)) == (132, 137, 142)


@pytest.mark.parametrize('pixels', [RAMP.astype(np.uint16), RAMP.astype(np.int32), np.float32(RAMP / 65_535)],
                         ids=['16 bits', '32 bits', 'floats'])
def test_grey_is_scaled(pixels, tmp_path):
    grey = np.asarray(read_image(save_picture(Image.fromarray(pixels), tmp_path, '.tif')))
    assert (grey.mean(), grey.min(), grey.max()) == (127.5, 0, 255)
    for array in (pixels, pixels[..., None], np.dstack([pixels] * 3)):
        assert_same_pixels(as_rgb(array), grey)
    if pixels.dtype == np.uint16:
        assert_same_pixels(read_image(save_picture(Image.fromarray(pixels), tmp_path)), grey)


def test_arrays_are_pictures():
    assert as_rgb(np.array([[True, False]])).getpixel((0, 0)) == WHITE
    pixels = np.array(PHOTO)
    trained = torch.tensor(pixels / 255, requires_grad=True)
    for array in (pixels, pixels / 255, pixels.astype(np.int64), torch.from_numpy(pixels), trained):
        assert_same_pixels(as_rgb(array), PHOTO)


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'RGBX'])
def test_other_modes_are_what_pillow_makes_of_them(mode):
    assert_same_pixels(as_rgb(PHOTO.convert(mode)), PHOTO.convert(mode).convert('RGB'))


@pytest.mark.parametrize('picture, error, message', [
    (None, TypeError, 'must be a PIL picture or an array, not None'),
    ('dog.png', TypeError, "not 'dog.png'"),
    (np.array([['a']]), TypeError, 'not of numbers'),
    (np.zeros((3, 8, 8)), ValueError, r'has shape \[3, 8, 8\]: give \[height, width\] or'),
    (torch.zeros(1, 3, 8, 8), ValueError, r'has shape \[1, 3, 8, 8\]'),
    (np.full((8, 8, 3), 200.), ValueError, r'has float64 pixels from 200 to 200: give floats in \[0, 1\]'),
    (np.full((8, 8), -1.), ValueError, 'from -1 to -1'),
    (np.full((8, 8), np.nan), ValueError, 'from nan to nan'),
    (np.full((8, 8), -1), ValueError, 'from -1 to -1'),
    (np.zeros((0, 8, 3)), ValueError, 'has no pixels'),
    (Image.new('RGB', (0, 8)), ValueError, 'has no pixels'),
], ids=['None', 'name', 'text', 'channels first', 'batch', 'floats to 255', 'floats below 0', 'NaN',
        'below 0', 'empty array', 'empty picture'])
def test_what_is_no_picture(picture, error, message):
    with pytest.raises(error, match=f'^picture 3 .*{message}'):
        as_rgb(picture, 'picture 3')


@pytest.mark.parametrize('suffix, options', [('.gif', {}), ('.png', {}), ('.webp', dict(lossless=True))])
def test_first_frame_of_an_animation(suffix, options, tmp_path):
    red, blue = (Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue'))
    file = save_picture(red, tmp_path, suffix, save_all=True, append_images=[blue], **options)
    assert read_image(file).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize('limit, action', [(1000, 'default'), (2000, 'error')], ids=['error', 'warning'])
@pytest.mark.parametrize('read', [read_image, check_image])
def test_the_limit_of_pillow_is_named(read, limit, action, tmp_path, monkeypatch):
    "Pillow warns beyond its limit, and refuses beyond twice as much."
    file = save_picture(PHOTO, tmp_path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
    problem = rf'\.png has more pixels than Pillow allows .*PIXELS, now {limit:,}'
    with warnings.catch_warnings(), raises(problem):
        warnings.simplefilter(action)
        read(file)


def test_networks_get_the_same_picture(tmp_path):
    "From a file, from Pillow or from an array, for CLIP and for ImageBind."
    rgba = np.dstack([np.asarray(PHOTO), np.full((48, 64), 255)]).astype(np.uint8)
    rgba[:, :32, 3] = 0
    expected = np.array(PHOTO)
    expected[:, :32] = 255
    file = save_picture(Image.fromarray(rgba), tmp_path)
    forms = [expected, Image.fromarray(expected), Image.open(file), rgba, rgba / 255, read_image(file)]
    clip = TransformersClip(component_path('clip'))
    for rows in (preprocess_images(forms, ImageBindConfig.mini()).numpy(), clip.embed_images(forms)):
        np.testing.assert_allclose(rows, rows[:1].repeat(len(forms), 0), atol=1e-5)


# Pictures and sounds in datasets of the hub

def encode_picture(picture, kind, **options):
    picture.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize('mode', [None, 'L', 'RGB'])
def test_hub_pictures_are_those_of_datasets(mode):
    exif = Image.Exif()
    exif[0x0112] = 8
    clear = PHOTO.convert('RGBA')
    clear.putalpha(100)
    files = [encode_picture(PHOTO, 'JPEG', exif=exif), encode_picture(clear, 'PNG', exif=exif),
             encode_picture(PHOTO.convert('P'), 'GIF'), encode_picture(PHOTO.convert('CMYK'), 'TIFF'),
             encode_picture(Image.fromarray(RAMP.astype(np.uint16)), 'PNG')]
    data = datasets.Dataset.from_dict(dict(caption=['a'] * 5, image=files))
    data = data.cast_column('image', datasets.Image(mode=mode))
    for example, theirs in zip(load_huggingface(data, 'toys', image='image'), data['image'], strict=True):
        assert_same_pixels(example.image, as_rgb(theirs))


# Which caption belongs to which picture

def folder_of(tmp_path, pictures, texts=(), sounds=()):
    "Pictures whose blue tells their place in the list, texts with their name, sounds of different lengths."
    for k, name in enumerate(pictures):
        Image.new('RGB', (8, 8), (0, 0, 10 * k)).save(tmp_path/name, 'PNG')
    for name in texts:
        (tmp_path/name).write_text(name)
    for k, name in enumerate(sounds):
        soundfile.write(tmp_path/name, np.sin(np.arange(100 + k)), 16000, format='WAV')
    return tmp_path


def table(folder, rows):
    "Writes captions.csv as Python's csv module does."
    with open(folder/'captions.csv', 'w', newline='') as f:
        csv.writer(f).writerows([['image', 'caption'], *rows])


def records(path, rows):
    path.write_text('\n'.join(r if isinstance(r, str) else json.dumps(r) for r in rows))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('expected', [
    {'dog1.png': 'dog1.txt', 'dog[1].png': 'dog[1].txt'},
    {'IMG.jpg': 'IMG.txt', 'IMG.mask.png': None}, {'IMG.jpg': None, 'IMG.mask.png': 'IMG.mask.txt'},
    {'a.jpg': 'a.txt', 'a.png': 'a.txt'}, {'A.PNG': 'A.TXT'}, {'a.JpEg': 'a.Txt'},
    {'?.png': '?.txt', 'a.png': 'a.txt', '*.png': None}, {'a.png': 'a.txt', 'b.png': 'b.txt', 'ab.png': None},
    {'a.png': 'a.txt', '._a.png': '._a.txt', '.hidden.png': '.hidden.txt'}], ids=' '.join)
def test_captions_belong_to_the_pictures_they_lie_beside(expected, tmp_path):
    names = list(expected)
    examples = load_folder(folder_of(tmp_path, names, [t for t in expected.values() if t]))
    found = {names[e.image.getpixel((0, 0))[2] // 10]: e.caption for e in examples}
    assert found == {p: t for p, t in expected.items() if t and not p.startswith('.')}
    assert len({e.id for e in examples}) == len(examples) == len(found)


def test_sounds_belong_to_the_pictures_they_lie_beside(tmp_path):
    names = ['A.PNG', 'b.png', 'dog1.png', 'dog[1].png']
    sounds = ['A.WAV', '._b.wav', 'b.mask.wav', 'dog1.wav', 'dog[1].wav']
    folder = folder_of(tmp_path, names, ['A.TXT', 'b.txt', 'dog1.txt', 'dog[1].txt'], sounds)
    assert [None if e.audio is None else len(e.audio) for e in load_folder(folder)] == [100, None, 103, 104]
    (folder/'b.m4a').write_bytes(b'no sound')
    (folder/'dog1.flac').write_bytes((folder/'dog1.wav').read_bytes())
    with raises(r'2 of 4 .*b\.m4a is of a kind that is not read.* has dog1\.flac, dog1\.wav: keep one sound'):
        load_folder(folder)


def test_files_without_a_partner_are_counted(tmp_path):
    folder = folder_of(tmp_path, ['a.png', 'Dog.png'], ['a.txt', 'dog.txt', 'README.txt'])
    with warns("2 texts without a picture and 1 pictures .*'dog' is missing but 'Dog' is there"):
        example, = load_folder(folder)
    assert example.id == 'a.png'


# Broken rows

@pytest.fixture
def clips(tmp_path):
    "Loads a table of AudioCaps with 200 clips, after changing some of its lines."
    (tmp_path/'sounds').mkdir()
    soundfile.write(sound := io.BytesIO(), np.sin(np.arange(160)), 16000, format='WAV')
    for k in range(1, 201):
        (tmp_path/f'sounds/clip{k}.wav').write_bytes(sound.getvalue())

    def load(changed, **options):
        rows = {k: f'{k},clip{k},30,a dog barks' for k in range(1, 201)} | changed
        lines = ['audiocap_id,youtube_id,start_time,caption', *rows.values()]
        (tmp_path/'test.csv').write_text('\n'.join(lines) + '\n')
        return load_audiocaps(tmp_path/'test.csv', tmp_path/'sounds', **options)
    return load


def ids_without(row):
    return [f'audiocaps/clip{k}/{k}' for k in range(1, 201) if k != row]


@pytest.mark.parametrize('line, problem', [
    ('the dog is whimpering', 'line 8 of .*test.csv has no youtube_id, start_time, caption'),
    ('7,clip7,,a dog', 'line 8 .* has no start_time'),
    ('7,clip7,0:30,a dog', "'0:30' is no number of whole seconds"),
    ('7,clip7,30.5,a dog', "'30.5' is no number of whole seconds"),
    ('7,clip7,-1,a dog', "'-1' is no number of whole seconds"),
    ('7,clip7,inf,a dog', "'inf' is no number of whole seconds"),
    ('7,clip7,30,a red, noisy dog', 'line 8 .* has 5 fields, not 4'),
    ('7,clip7,30,', 'line 8 .* has no caption'),
    ('7,clip7,30,nan', "is 'nan', a value that was cast to text"),
    ('7,clip7,30,"[\'a dog\', \'two dogs\']"', 'a value that was cast to text'),
    ('7,clip7,30,"a dog', 'line 8 .* has a stray quote'),
    ('7,clip7,30,"a "loud" dog"', 'line 8 .* has a stray quote'),
    ('7,gone7,30,a dog', r'gone7\.wav is missing')])
def test_a_broken_row_is_one_bad_example(line, problem, clips):
    with warns(f'1 of 200 examples .* are bad: .*{problem}'):
        examples = clips({7: line})
    assert [e.id for e in examples] == ids_without(7)
    with raises('1 of 200 examples'):
        clips({7: line}, max_bad=0)


@pytest.mark.parametrize('line, caption', [
    ('7,clip7,30.0,a dog', 'a dog'), ('7,clip7,30,NA', 'NA'),
    ('7,clip7, 30,  "a dog, and a cat" ', 'a dog, and a cat'),
    ('7,clip7,30,a 5" pipe', 'a 5" pipe'), ('\n7,clip7,30,"a ""loud"" dog"', 'a "loud" dog'),
    ('7,clip7,30,"a dog,\nand another, of it\n\n3 in all"', 'a dog,\nand another, of it\n\n3 in all')])
def test_a_row_that_is_not_broken(line, caption, clips):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        examples = clips({7: line})
    assert len(examples) == 200 and examples[6].caption == caption


@pytest.mark.parametrize('closing', ['200,clip200,30,a pipe of 5"', '200,clip200,30,"a dog, and a cat"'])
def test_a_stray_quote_swallows_no_rows(closing, clips):
    "Opened in row 57, closed in row 200: 143 rows are inside."
    with warns('1 of 200 .* line 58 of .*test.csv has a stray quote'):
        examples = clips({57: '57,clip57,30,"a dog', 200: closing})
    assert [e.id for e in examples] == ids_without(57)


def test_a_stray_quote_in_a_folder(tmp_path):
    names = [f'my dog {k}.png' for k in range(20)]
    folder = folder_of(tmp_path, names)
    table(folder, [[n, 'a dog,\nof two lines, as it were' if n == names[3] else 'a dog'] for n in names])
    assert len(load_folder(folder)) == 20
    text = (folder/'captions.csv').read_text()
    text = text.replace(' 5.png,a dog', ' 5.png,"a dog').replace(' 15.png,a dog', ' 15.png,a dog"')
    (folder/'captions.csv').write_text(text)
    with raises('1 of 20 examples .*line 8 of .* has a stray quote'):
        load_folder(folder)


def test_broken_lines_of_a_folder(tmp_path):
    folder = folder_of(tmp_path, [f'{k}.png' for k in range(9)])
    good = [dict(image=f'{k}.png', caption='a dog') for k in range(5)]
    bad = ['{"image": "5.png", "capt', '["6.png", "a dog"]', dict(caption='a dog'),
           dict(image='8.png', caption=8), dict(image='9.png', caption='a dog')]
    records(folder/'captions.jsonl', good + bad)
    with warns('5 of 10 .*: line 6 .* is not JSON .*; line 7 .* not a record; line 8 .* no image and 2 more'):
        examples = load_folder(folder, max_bad=.5)
    assert [e.id for e in examples] == [f'{k}.png' for k in range(5)]


def test_a_text_of_another_encoding(tmp_path):
    folder = folder_of(tmp_path, ['a.png', 'b.png'], ['a.txt'])
    (folder/'b.txt').write_bytes('Käuzchen'.encode('latin-1'))
    with raises(r'1 of 2 .*b\.txt is not text in UTF-8'):
        load_folder(folder)


def test_a_picture_of_two_names(tmp_path):
    coco_of(tmp_path, ['a dog'])
    path = tmp_path/'annotations/captions_val2017.json'
    coco = json.loads(path.read_text())
    path.write_text(json.dumps(coco | dict(images=coco['images'] + [dict(id=0, file_name='1.jpg')])))
    with raises('picture 0, which has several names'):
        load_coco(tmp_path, 'val2017')


# Captions that are no text

CAST = ['nan', 'None', 'NaN', '<NA>', "['a dog', 'two dogs']", '["a dog"]', "('a dog',)", "['a dog' 'b']"]
VALUES = [7, 2.5, True, None, float('nan'), '', ' \n', [], [None], ['nan'], dict(raw='a dog'), *CAST]


def coco_of(tmp_path, captions, file_name='0.jpg'):
    "One picture with captions: as COCO publishes them, as Karpathy does, and as a folder."
    Image.new('RGB', (8, 8)).save(tmp_path/'0.jpg')
    (tmp_path/'val2017').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path/'val2017/0.jpg')
    (tmp_path/'annotations').mkdir()
    annotations = [dict(id=k, image_id=0, caption=c) for k, c in enumerate(captions)]
    coco = dict(images=[dict(id=0, file_name=file_name)], annotations=annotations)
    (tmp_path/'annotations/captions_val2017.json').write_text(json.dumps(coco))
    sentences = [dict(sentid=k, raw=c) for k, c in enumerate(captions)]
    picture = dict(filepath='', filename=file_name, split='test', cocoid=0, sentences=sentences)
    (tmp_path/'dataset_coco.json').write_text(json.dumps(dict(images=[picture])))
    records(tmp_path/'captions.jsonl', [dict(image=file_name, caption=c) for c in captions])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('value', VALUES, ids=repr)
def test_only_text_is_a_caption(value, tmp_path):
    coco_of(tmp_path, ['a cat', value, ' a bird\n', ['one', 'two']])
    loaded = [load_coco(tmp_path, 'val2017', max_bad=.5), load_karpathy(tmp_path, 'test', max_bad=.5),
              load_folder(tmp_path, max_bad=.5)]
    for examples in loaded:
        assert [e.caption for e in examples] == ['a cat', 'a bird', 'one', 'two']
        assert len({e.id for e in examples}) == 4
    with raises('1 of 5'):
        load_coco(tmp_path, 'val2017')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('value', CAST)
def test_no_value_cast_to_text_is_a_caption(value, tmp_path):
    table(folder_of(tmp_path, ['0.png']), [['0.png', 'a cat'], ['0.png', value]])
    assert [e.caption for e in load_folder(tmp_path, max_bad=.5)] == ['a cat']
    data = datasets.Dataset.from_dict(dict(caption=['a cat', value, None]))
    assert [e.caption for e in load_huggingface(data, 'toys', max_bad=.7)] == ['a cat']


# Ids that do not pair

def test_missing_clips_are_explained(clips, tmp_path):
    (tmp_path/'sounds/clip7.wav').rename(tmp_path/'sounds/CLIP007.wav')
    with raises("'clip7.wav' is missing but 'CLIP007.wav' is there: .* upper .* and leading zeros"):
        clips({}, max_bad=0)
    (tmp_path/'ids.csv').write_text('youtube_id\nclip1\nclip2.wav\n')
    with raises("id clip2.wav is not in the captions .*but 'clip2' is there: they differ by a suffix of ids"):
        clips({}, ids=tmp_path/'ids.csv')


def test_pictures_in_another_folder_are_explained(tmp_path):
    coco_of(tmp_path, ['a dog'])
    (tmp_path/'0.jpg').unlink()
    (tmp_path/'images').mkdir()
    (tmp_path/'val2017').rename(tmp_path/'images/val2017')
    with raises("'val2017/0.jpg' is missing but 'images/val2017/0.jpg' is there"):
        load_coco(tmp_path, 'val2017')


def test_missing_pictures_are_explained(tmp_path):
    coco_of(tmp_path, ['a dog'], '000000000139.jpg')
    (tmp_path/'val2017/0.jpg').rename(tmp_path/'val2017/COCO_val2014_000000000139.jpg')
    with raises("'000000000139.jpg' is missing, and 'COCO_val2014_000000000139.jpg' is there"):
        load_coco(tmp_path, 'val2017')


@pytest.mark.parametrize('name, file, difference', [
    ('12', '12.png', 'a suffix of ids'), ('12.png', '0012.png', 'leading zeros'),
    ('dog.png', 'DOG.PNG', 'upper and lower case'),
    ('n\u00e4her.png', 'na\u0308her.png', 'the Unicode form')])
def test_names_of_a_table_are_explained(name, file, difference, tmp_path):
    table(folder_of(tmp_path, [file]), [[name, 'a dog']])
    with raises(f'is missing .*they differ by {difference}'):
        load_folder(tmp_path)


# The names of the loaders

def test_loaders_come_from_the_package():
    assert set(egmi.data.__all__) <= set(dir(egmi.data))
    for name in egmi.data.__all__:
        assert getattr(egmi.data, name).__name__ == name
    with pytest.raises(AttributeError, match="'egmi.data' has no attribute 'load_imagenet'"):
        egmi.data.load_imagenet
