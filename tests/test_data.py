"""What people hand in goes in right: pictures of any mode, captions with the picture they lie beside, broken rows counted."""
import csv
import io
import json
import warnings

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageOps

import egmi.images
from egmi.config import component_path
from egmi.data import find_bad, load_audiocaps, load_coco, load_folder, load_huggingface, load_karpathy, load_vctk
from egmi.encoders import TransformersClip
from egmi.imagebind import ImageBindConfig, preprocess_images
from egmi.images import check_image, read_image

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(np.kron(RNG.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)) # 64 x 48
RAMP = np.arange(65_536).reshape(256, 256)
WHITE = (255, 255, 255)


def stored(picture, tmp_path, suffix='.png', **options):
    "A picture in a file."
    picture.save(tmp_path/f'picture{suffix}', **options)
    return tmp_path/f'picture{suffix}'


# Pictures

@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.webp', '.tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_pictures_are_upright(orientation, suffix, tmp_path):
    "The eight orientations of EXIF undo these eight transformations."
    lie = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
           5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, 1), 7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
           8: lambda x: np.rot90(x, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = Image.fromarray(np.ascontiguousarray(lie(np.asarray(PHOTO))))
    lossless = dict(lossless=True) if suffix == '.webp' else dict(quality=100, subsampling=0) if suffix == '.jpg' else {}
    picture = read_image(stored(lying, tmp_path, suffix, exif=exif, **lossless))
    assert picture.size == (64, 48)
    np.testing.assert_allclose(np.asarray(picture, int), np.asarray(PHOTO, int), atol=6 if suffix == '.jpg' else 0)


def transparent_pictures():
    "A pixel that hides a colour, and an opaque one of that colour."
    palette = Image.new('P', (2, 1))
    palette.putpalette([10, 20, 30, 10, 20, 30])
    palette.putdata([0, 1])
    grey = Image.fromarray(np.array([[9, 40]], np.uint8))
    return {
        'RGBA': (Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8)), {}, (10, 20, 30)),
        'LA': (Image.merge('LA', [grey, Image.fromarray(np.array([[0, 255]], np.uint8))]), {}, (40, 40, 40)),
        'P': (palette, dict(transparency=0), (10, 20, 30)),
        'P, a byte for each colour': (palette, dict(transparency=bytes([0, 255])), (10, 20, 30)),
        'L': (grey, dict(transparency=9), (40, 40, 40)),
        'RGB': (Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), dict(transparency=(1, 2, 3)), (4, 5, 6)),
        'I;16': (Image.fromarray(np.array([[9, 2570]], np.uint16)), dict(transparency=9), (10, 10, 10))}


@pytest.mark.parametrize('mode', transparent_pictures())
def test_transparency_shows_white(mode, tmp_path):
    picture, options, colour = transparent_pictures()[mode]
    file = stored(picture, tmp_path, **options)
    assert [read_image(file).getpixel((x, 0)) for x in range(2)] == [WHITE, colour]
    assert egmi.images.as_rgb(np.array([[[10, 20, 30, 128]]]) / 255).getpixel((0, 0)) == (132, 137, 142)


@pytest.mark.parametrize('pixels', [RAMP.astype(np.uint16), RAMP.astype(np.int32), (RAMP / 65_535).astype(np.float32)],
                         ids=['16 bits', '32 bits', 'floats'])
def test_grey_is_scaled(pixels, tmp_path):
    for suffix in ['.tif'] + ['.png'] * (pixels.dtype == np.uint16):
        grey = np.asarray(read_image(stored(Image.fromarray(pixels), tmp_path, suffix)))
        assert grey.mean() == 127.5 and grey.min() == 0 and grey.max() == 255
    expected = np.asarray(grey)[..., 0]
    for array in (pixels, pixels[..., None], np.dstack([pixels] * 3)):
        np.testing.assert_array_equal(np.asarray(egmi.images.as_rgb(array))[..., 0], expected)


def test_truth_values_and_bytes_are_pictures():
    as_rgb = egmi.images.as_rgb
    assert as_rgb(np.array([[True, False]])).getpixel((0, 0)) == WHITE
    for array in (np.asarray(PHOTO), np.asarray(PHOTO) / 255, np.asarray(PHOTO).astype(np.int64), torch.from_numpy(np.asarray(PHOTO).copy())):
        np.testing.assert_array_equal(np.asarray(as_rgb(array)), np.asarray(PHOTO))


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'RGBX', 'RGBa', 'La'])
def test_other_modes(mode):
    base = PHOTO.convert('RGBA').convert({'RGBa': 'RGBa', 'La': 'LA'}.get(mode, 'RGB'))
    assert egmi.images.as_rgb(base.convert(mode)).mode == 'RGB'
    if mode != '1': assert np.abs(np.asarray(egmi.images.as_rgb(base.convert(mode)), int) - np.asarray(PHOTO.convert('L' if mode in ('L', 'La') else 'RGB').convert('RGB'), int)).mean() < 20


@pytest.mark.parametrize('picture, error, message', [
    (None, TypeError, 'must be a PIL picture or an array, not None'), ('dog.png', TypeError, "not 'dog.png'"),
    (np.zeros((3, 8, 8)), ValueError, r'has shape \[3, 8, 8\]: give \[height, width\] or'),
    (torch.zeros(1, 3, 8, 8), ValueError, r'has shape \[1, 3, 8, 8\]'),
    (np.full((8, 8, 3), 200.), ValueError, r'has float64 pixels from 200 to 200: give floats in \[0, 1\]'),
    (np.full((8, 8), -1.), ValueError, 'from -1 to -1'), (np.full((8, 8), np.nan), ValueError, 'nan'),
    (np.full((8, 8), -1), ValueError, 'from -1 to -1'), (np.array([['a']]), TypeError, 'not of numbers'),
    (np.zeros((0, 8, 3)), ValueError, 'has no pixels'), (Image.new('RGB', (0, 8)), ValueError, 'has no pixels'),
], ids=str)
def test_what_is_no_picture(picture, error, message):
    with pytest.raises(error, match=f'^picture 3 .*{message}'): egmi.images.as_rgb(picture, 'picture 3')


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
    for suffix in ('.gif', '.png', '.webp'):
        file = stored(frames[0], tmp_path, suffix, save_all=True, append_images=frames[1:], **dict(lossless=True) if suffix == '.webp' else {})
        assert read_image(file).getpixel((0, 0)) == (255, 0, 0)


def test_the_limit_of_pillow_is_named(tmp_path, monkeypatch):
    file = stored(PHOTO, tmp_path)
    for limit, action in ((1000, 'default'), (2000, 'error')): # beyond twice the limit; beyond the limit, where warnings are errors
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
        for read in (read_image, check_image):
            with warnings.catch_warnings(), pytest.raises(ValueError, match=rf'picture\.png has more pixels than Pillow allows.*MAX_IMAGE_PIXELS, now {limit:,}'):
                warnings.simplefilter(action)
                read(file)


def test_networks_read_pictures_alike(tmp_path):
    "What a file holds, and the same as an array or as Pillow opens it, is one picture for CLIP and ImageBind."
    rgba = np.dstack([np.asarray(PHOTO), np.where(np.arange(64) < 32, 0, 255)[None].repeat(48, 0)]).astype(np.uint8)
    expected = np.asarray(PHOTO).copy()
    expected[:, :32] = 255
    file = stored(Image.fromarray(rgba), tmp_path)
    forms = [expected, Image.fromarray(expected), Image.open(file), rgba, rgba / 255, read_image(file)]
    x_B3HW = preprocess_images(forms, ImageBindConfig.mini())
    vectors = TransformersClip(component_path('clip')).embed_images(forms)
    for same in (x_B3HW.numpy(), vectors): np.testing.assert_allclose(same, same[:1].repeat(len(forms), 0), atol=1e-5)


# Pictures and sounds in datasets of the hub

def coded(picture, kind, **options):
    picture.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize('mode', [None, 'L', 'RGB'])
def test_hub_pictures_are_those_of_datasets(mode):
    exif = Image.Exif()
    exif[0x0112] = 8
    clear = PHOTO.convert('RGBA')
    clear.putalpha(100)
    files = [coded(PHOTO, 'JPEG', exif=exif), coded(clear, 'PNG', exif=exif), coded(PHOTO.convert('P'), 'GIF'), coded(PHOTO.convert('CMYK'), 'TIFF'),
             coded(Image.fromarray(RAMP.astype(np.uint16)), 'PNG')]
    data = datasets.Dataset.from_dict(dict(caption=['a'] * 5, image=files)).cast_column('image', datasets.Image(mode=mode))
    for ours, theirs in zip(load_huggingface(data, 'toys', image='image'), data['image'], strict=True):
        np.testing.assert_array_equal(np.asarray(ours.image), np.asarray(egmi.images.as_rgb(theirs)))


def test_hub_bytes():
    wave_T = np.sin(np.arange(1600) / 20).astype(np.float32) / 2
    soundfile.write(flac := io.BytesIO(), wave_T, 16000, format='FLAC')
    data = datasets.Dataset.from_dict(dict(caption=['a'], image=[coded(PHOTO, 'PNG')], sound=[flac.getvalue()]))
    assert [data.features[c].dtype for c in ('image', 'sound')] == ['binary'] * 2
    example, = load_huggingface(data, 'toys', image='image', audio='sound')
    np.testing.assert_array_equal(np.asarray(example.image), np.asarray(PHOTO))
    np.testing.assert_allclose(example.audio, wave_T, atol=1e-4)


@pytest.mark.parametrize('dtype, half', [('float32', .5), ('float64', .5), ('int16', 2**14), ('int32', 2**30)])
def test_hub_samples_are_scaled_by_their_width(dtype, half):
    wave = dict(array=datasets.List(datasets.Value(dtype)), sampling_rate=datasets.Value('int64'))
    data = datasets.Dataset.from_dict(dict(caption=['a'], wave=[dict(array=[0, half, -half], sampling_rate=16000)]),
                                      features=datasets.Features(caption=datasets.Value('string'), wave=wave))
    np.testing.assert_array_equal(load_huggingface(data, 'toys', audio='wave')[0].audio, [0, .5, -.5])


# Which caption belongs to which picture

def folder_of(tmp_path, pictures, texts, sounds=()):
    "Pictures whose blue tells their place in the list, texts that hold their own name, sounds whose length tells their place."
    for k, name in enumerate(pictures):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (8, 8), (0, 0, 10 * k)).save(tmp_path/name, 'PNG')
    for name in texts: (tmp_path/name).write_text(f'text of {name}')
    for k, name in enumerate(sounds): soundfile.write(tmp_path/name, np.sin(np.arange(100 + k)), 16000, format='WAV')
    return tmp_path


def pairs(examples, pictures):
    return {pictures[e.image.getpixel((0, 0))[2] // 10]: e.caption.removeprefix('text of ') for e in examples}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('expected', [
    {'dog1.png': 'dog1.txt', 'dog[1].png': 'dog[1].txt'}, {'IMG.jpg': 'IMG.txt', 'IMG.mask.png': None}, {'IMG.jpg': None, 'IMG.mask.png': 'IMG.mask.txt'},
    {'a.jpg': 'a.txt', 'a.png': 'a.txt'}, {'A.PNG': 'A.TXT'}, {'a.JpEg': 'a.Txt'}, {'?.png': '?.txt', 'a.png': 'a.txt', '*.png': None},
    {'a.png': 'a.txt', '._a.png': '._a.txt', '.hidden.png': '.hidden.txt'}], ids=' '.join)
def test_captions_belong_to_the_pictures_they_lie_beside(expected, tmp_path):
    names = list(expected)
    examples = load_folder(folder_of(tmp_path, names, [t for t in expected.values() if t]))
    shown = {p: t for p, t in expected.items() if t and not p.startswith('.')}
    assert pairs(examples, names) == shown and len({e.id for e in examples}) == len(shown)


def test_sounds_belong_to_the_pictures_they_lie_beside(tmp_path):
    folder = folder_of(tmp_path, ['A.PNG', 'dog[1].png', 'dog1.png', 'b.png'], ['A.TXT', 'dog[1].txt', 'dog1.txt', 'b.txt'],
                       ['A.WAV', 'dog1.wav', 'dog[1].wav', '._b.wav', 'b.mask.wav'])
    assert {e.id: e.audio is not None and len(e.audio) for e in load_folder(folder)} == {'A.PNG': 100, 'dog1.png': 101, 'dog[1].png': 102, 'b.png': False}
    (folder/'b.m4a').write_bytes(b'no sound')
    (folder/'dog1.flac').write_bytes((folder/'dog1.wav').read_bytes())
    with pytest.raises(ValueError, match=r'2 of 4 .*b\.m4a is of a kind that is not read here.*dog1\.flac, dog1\.wav: keep one sound'): load_folder(folder)


def test_files_without_a_partner_are_counted(tmp_path):
    folder = folder_of(tmp_path, ['a.png', 'Dog.png'], ['a.txt', 'dog.txt', 'README.txt'])
    with pytest.warns(UserWarning, match="left out 2 texts without a picture and 1 pictures without a text .*'dog' is missing but 'Dog' is there"):
        example, = load_folder(folder)
    assert example.id == 'a.png'


def test_several_captions_of_one_picture(tmp_path):
    folder = folder_of(tmp_path, ['a.png'], [])
    rows = [dict(image='a.png', caption=['one', 'two']), dict(image='a.png', caption='three')]
    (folder/'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    assert [(e.id, e.caption) for e in load_folder(folder)] == [('a.png/0', 'one'), ('a.png/1', 'two'), ('a.png/2', 'three')]
    (folder/'captions.csv').write_text('image,caption\na.png,one\na.png,two\n')
    assert [(e.id, e.caption) for e in load_folder(folder)] == [('a.png', 'one'), ('a.png/1', 'two')]


# Broken rows

@pytest.fixture
def clips(tmp_path):
    "Writes a table of AudioCaps with a recording for each of its 200 clips; loads it with given lines in the place of others."
    sounds = tmp_path/'sounds'
    sounds.mkdir()
    soundfile.write(whole := io.BytesIO(), np.sin(np.arange(160)), 16000, format='WAV')
    for k in range(1, 201): (sounds/f'clip{k}.wav').write_bytes(whole.getvalue())

    def load(changed, **options):
        lines = [f'{k},clip{k},30,a dog barks' for k in range(1, 201)]
        for k, line in changed.items(): lines[k - 1] = line
        (tmp_path/'test.csv').write_text('\n'.join(['audiocap_id,youtube_id,start_time,caption', *lines]) + '\n')
        return load_audiocaps(tmp_path/'test.csv', sounds, **options)
    load.folder = tmp_path
    return load


@pytest.mark.parametrize('line, problem', [
    ('the dog is whimpering', 'line 8 of .*test.csv has no youtube_id'), ('7,clip7,,a dog', 'line 8 .* has no start_time'), ('7,clip7,0:30,a dog', "'0:30' is no number"),
    ('7,clip7,30.5,a dog', "'30.5' is no number"), ('7,clip7,-1,a dog', "'-1' is no number"), ('7,clip7,inf,a dog', "'inf' is no number"),
    ('7,clip7,30,a red, noisy dog', 'line 8 .* has 5 fields, not 4'), ('7,clip7,30,', 'line 8 .* has no caption'), ('7,clip7,30,nan', "is 'nan', a value"),
    ('7,clip7,30,"[\'a dog\', \'two dogs\']"', 'a value that was cast to text'), ('7,clip7,30,"a dog', 'line 8 .* has a stray quote'),
    ('7,clip7,30,"a "loud" dog"', 'line 8 .* has a stray quote'), ('7,gone7,30,a dog', r'gone7\.wav is missing')])
def test_a_broken_row_is_one_bad_example(line, problem, clips):
    with pytest.warns(UserWarning, match=f'1 of 200 examples .* are bad: .*{problem}'): examples = clips({7: line})
    assert [e.id for e in examples] == [f'audiocaps/clip{k}/{k}' for k in range(1, 201) if k != 7]
    with pytest.raises(ValueError, match='1 of 200 examples'): clips({7: line}, max_bad=0)


def test_rows_that_are_not_broken(clips):
    lines = {1: '1,clip1,30.0,a dog', 2: '2,clip2, 30,  "a dog, and a cat" ', 3: '3,clip3,30,"a ""loud"" dog,\nand a second line, of the same\n\n3 in all"',
             4: '4,clip4,30,a 5" pipe', 5: '\n5,clip5,30,NA'}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        examples = clips(lines)
    assert [e.caption for e in examples[:6]] == ['a dog', 'a dog, and a cat', 'a "loud" dog,\nand a second line, of the same\n\n3 in all', 'a 5" pipe', 'NA', 'a dog barks']
    assert len(examples) == 200


@pytest.mark.parametrize('closing', ['200,clip200,30,a pipe of 5"', '200,clip200,30,"a dog, and a cat"'])
def test_a_stray_quote_swallows_no_rows(closing, clips):
    "Opened in row 57, closed in row 200: 143 rows are inside."
    with pytest.warns(UserWarning, match='1 of 200 .* line 58 of .*test.csv has a stray quote'): examples = clips({57: '57,clip57,30,"a dog', 200: closing})
    assert [e.id for e in examples] == [f'audiocaps/clip{k}/{k}' for k in range(1, 201) if k != 57]


def test_a_stray_quote_in_a_folder(tmp_path):
    folder = folder_of(tmp_path, [f'my dog {k}.png' for k in range(20)], [])
    rows = [[f'my dog {k}.png', 'a dog,\nof two lines, as it were' if k == 3 else 'a dog'] for k in range(20)]
    with open(folder/'captions.csv', 'w', newline='') as f: csv.writer(f).writerows([['image', 'caption'], *rows])
    assert len(load_folder(folder)) == 20
    text = (folder/'captions.csv').read_text()
    (folder/'captions.csv').write_text(text.replace('5.png,a dog', '5.png,"a dog').replace('15.png,"a dog', '15.png,a dog"'))
    with pytest.raises(ValueError, match='1 of 20 examples .*line 8 of .* has a stray quote'): load_folder(folder)


def test_broken_lines_of_a_folder(tmp_path):
    folder = folder_of(tmp_path, [f'{k}.png' for k in range(9)], [])
    lines = [json.dumps(dict(image=f'{k}.png', caption='a dog')) for k in range(5)]
    lines += ['{"image": "5.png", "capt', '["6.png", "a dog"]', '{"caption": "a dog"}', json.dumps(dict(image='8.png', caption=8)), json.dumps(dict(image='9.png', caption='a'))]
    (folder/'captions.jsonl').write_text('\n'.join(lines))
    with pytest.warns(UserWarning, match=r'5 of 10 .*: line 6 of .* is not JSON .*; line 7 of .* not a record; line 8 of .* has no image and 2 more'):
        assert [e.id for e in load_folder(folder, max_bad=.5)] == [f'{k}.png' for k in range(5)]
    (folder/'captions.jsonl').unlink()
    for k in range(9): (folder/f'{k}.txt').write_bytes(b'a dog' if k else b'\xff')
    with pytest.raises(ValueError, match=r'1 of 9 .*0\.txt is not text in UTF-8'): load_folder(folder)


# Captions that are no text

VALUES = [7, 2.5, None, float('nan'), '', ' \n', [], [['a dog', 7]], dict(raw='a dog'), True, 'nan', 'None', 'NaN', '<NA>', "['a dog', 'two dogs']", '["a dog"]', "('a dog',)", "['a dog' 'two dogs']"]


def coco_of(tmp_path, captions):
    Image.new('RGB', (8, 8)).save(tmp_path/'0.jpg')
    (tmp_path/'annotations').mkdir(exist_ok=True)
    (tmp_path/'val2017').mkdir(exist_ok=True)
    (tmp_path/'annotations/captions_val2017.json').write_text(json.dumps(dict(images=[dict(id=0, file_name=str(tmp_path/'0.jpg'))],
        annotations=[dict(id=k, image_id=0, caption=c) for k, c in enumerate(captions)])))
    (tmp_path/'dataset_coco.json').write_text(json.dumps(dict(images=[dict(filepath='', filename='0.jpg', split='test', cocoid=0,
        sentences=[dict(sentid=k, raw=c) for k, c in enumerate(captions)])])))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('value', VALUES, ids=repr)
def test_only_text_is_a_caption(value, tmp_path):
    captions = ['a cat', value, ' a bird\n', ['one', 'two']]
    coco_of(tmp_path, captions)
    (tmp_path/'captions.jsonl').write_text('\n'.join(json.dumps(dict(image='0.jpg', caption=c)) for c in captions))
    texts = ['a cat'] + ['a dog'] * (value == [['a dog', 7]]) + ['a bird', 'one', 'two']
    for load in (lambda: load_coco(tmp_path, 'val2017', max_bad=.5), lambda: load_karpathy(tmp_path, 'test', max_bad=.5), lambda: load_folder(tmp_path, max_bad=.5)):
        examples = load()
        assert [e.caption for e in examples] == texts and len({e.id for e in examples}) == len(texts)
    if isinstance(value, str):
        with open(tmp_path/'captions.csv', 'w', newline='') as f: csv.writer(f).writerows([['image', 'caption'], ['0.jpg', 'a cat'], ['0.jpg', value]])
        assert [e.caption for e in load_folder(tmp_path, max_bad=.5)] == ['a cat']
        data = datasets.Dataset.from_dict(dict(caption=['a cat', value, None]))
        assert [e.caption for e in load_huggingface(data, 'toys', max_bad=.7)] == ['a cat']


# Ids that do not pair

def test_missing_files_are_explained(clips, tmp_path):
    (clips.folder/'sounds/clip7.wav').rename(clips.folder/'sounds/CLIP007.wav')
    with pytest.raises(ValueError, match="'clip7.wav' is missing but 'CLIP007.wav' is there: they differ by upper and lower case and leading zeros"): clips({}, max_bad=0)
    (clips.folder/'ids.csv').write_text('youtube_id\nclip1\nclip2.wav\n')
    with pytest.raises(ValueError, match="clip2.wav is not in the captions .'clip2.wav' is missing but 'clip2' is there: they differ by a suffix"): clips({}, ids=clips.folder/'ids.csv')


def test_missing_pictures_are_explained(tmp_path):
    coco_of(tmp_path, ['a dog'])
    path = tmp_path/'annotations/captions_val2017.json'
    path.write_text(path.read_text().replace(f'{tmp_path}/0.jpg', '000000000139.jpg'))
    Image.new('RGB', (8, 8)).save(tmp_path/'val2017/COCO_val2014_000000000139.jpg')
    with pytest.raises(ValueError, match="'000000000139.jpg' is missing, and 'COCO_val2014_000000000139.jpg' is there"): load_coco(tmp_path, 'val2017')


@pytest.mark.parametrize('name, file, difference', [('12', '12.png', 'a suffix of ids'), ('12.png', '0012.png', 'leading zeros'), ('dog.png', 'DOG.PNG', 'upper and lower case'),
                                                    ('n\u00e4her.png', 'na\u0308her.png', 'the Unicode form')])
def test_names_of_a_table_are_explained(name, file, difference, tmp_path):
    folder = folder_of(tmp_path, [file], [])
    (folder/'captions.csv').write_text(f'image,caption\n{name},a dog\n', encoding='utf-8')
    with pytest.raises(ValueError, match=f'is missing .*they differ by {difference}'): load_folder(folder)


@pytest.mark.filterwarnings('ignore')
def test_texts_and_recordings_are_explained(tmp_path):
    for folder in ('txt', 'wav48_silence_trimmed'): (tmp_path/folder/'p225').mkdir(parents=True)
    for k in range(3): soundfile.write(tmp_path/f'wav48_silence_trimmed/p225/p225_{k:03d}_mic1.flac', np.sin(np.arange(480)), 48000)
    for k in range(3): (tmp_path/f'txt/p225/p225_{k:03d}.txt').write_text('Please call Stella.')
    (tmp_path/'txt/p225/._p225_000.txt').write_bytes(b'\x00\xff')
    assert len(load_vctk(tmp_path)) == 3
    (tmp_path/'txt/p225/p225_002.txt').rename(tmp_path/'txt/p225/p225_2.txt')
    with pytest.raises(ValueError, match="2 of 4 .*'p225_2' is missing but 'p225_002' is there"): load_vctk(tmp_path)
    (tmp_path/'txt/p225/p225_2.txt').unlink()
    (tmp_path/'txt/p225/p225_002.txt').write_bytes(b'\xff')
    assert len(load_vctk(tmp_path, max_bad=.4)) == 2
