"""Every wrong use of EGMI is one line with the parameter and the way out, before any network is used."""
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import egmi.model
from egmi.base.audio_files import wav_bytes
from egmi.base.config import get_preset
from egmi.base.inputs import read_inputs
from egmi.mapper import GILLMapper, MapperConfig
from egmi.model import EGMI
from egmi.outputs import EGMIOutput

PICTURE = Image.new('RGB', (8, 8))
WAVE_T = np.sin(np.arange(16_000) / 10).astype(np.float32)
SMALL = MapperConfig(d_llm=8, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=8)
EMPTY = EGMIOutput(['a dog'], None, None, 16_000, ['what is this?'], [0])
STEREO_2T = torch.from_numpy(np.stack([WAVE_T, WAVE_T]))


class Untouched:
    "Stands for a network: whoever uses it has not checked the inputs first."
    def __getattr__(self, name):
        raise AssertionError(f'{name} was used')


@pytest.fixture
def model():
    "An EGMI without networks; only the sample rate of its sounds is known, and that it makes pictures."
    vocoder = SimpleNamespace(config=SimpleNamespace(sampling_rate=16_000))
    conditioner = SimpleNamespace(mapper=SimpleNamespace(image_head=Untouched()))
    return EGMI(get_preset('mini'), Untouched(), conditioner, Untouched(), SimpleNamespace(vocoder=vocoder))


def refuse(error, message, make, *args, **kwargs):
    "Test that a call is refused in one line."
    with pytest.raises(error) as raised:
        make(*args, **kwargs)
    line = str(raised.value)
    assert message in line
    assert '\n' not in line
    assert len(line) < 400


PICTURES = 'must be a picture (a path, a URL, bytes, a PIL picture, an array or a tensor), not'
SOUNDS = 'must be a sound (a path, a URL, bytes, an array, a tensor, or (rate, samples)), not'
NUMBER = 'must be a whole number of 1 or more, not'
RATE = 'sample_rate must be a whole number from 1,000 to 10,000,000 Hz, not'


@pytest.mark.parametrize('given, error, message', [
    (dict(), ValueError, 'give text, images or audio: nothing was given'),
    (dict(text=[]), ValueError, 'text is empty: give at least one'),
    (dict(text=5), TypeError, 'text must be a string, not 5'),
    (dict(text={'a': 1}), TypeError, "text must be a string, not {'a': 1}"),
    (dict(text=['a dog', None]), TypeError, 'text 1 must be a string, not None'),
    (dict(text=['a', 'b'], images=[PICTURE] * 3), ValueError, "or one for all, not {'text': 2, 'images': 3}"),
    (dict(images='pic.png'), ValueError, 'images: picture pic.png is missing: replace it or leave it out'),
    (dict(images=[PICTURE, None]), TypeError, f'images 1 {PICTURES} None'),
    (dict(images=b'png'), ValueError, 'images: picture of 3 bytes cannot be read: replace it'),
    (dict(images='ftp://a/b.png'), ValueError, 'images must be a path or begin with http'),
    (dict(images='http://127.0.0.1:1/b.png'), ValueError, 'b.png cannot be downloaded ('),
    (dict(images={'image': 1}), TypeError, f"images {PICTURES} {{'image': 1}}"),
    (dict(images=np.zeros((3, 8, 8))), ValueError, 'images has shape [3, 8, 8]: give [height, width]'),
    (dict(images=np.full((8, 8, 3), 255.)), ValueError, 'give floats in [0, 1], uint8 or uint16'),
    (dict(audio='bell.wav'), ValueError, 'audio: sound bell.wav is missing: replace it or leave it out'),
    (dict(audio=['bell.wav', None]), ValueError, 'audio 0: sound bell.wav is missing'),
    (dict(audio=[WAVE_T, None], sample_rate=16_000), TypeError, f'audio 1 {SOUNDS} None'),
    (dict(audio=WAVE_T), ValueError, 'audio needs its sample_rate in Hz'),
    (dict(audio=WAVE_T, sample_rate=0), ValueError, f'{RATE} 0'),
    (dict(audio=WAVE_T, sample_rate='16000'), ValueError, f"{RATE} '16000'"),
    (dict(audio=(0, WAVE_T)), ValueError, f'audio: {RATE} 0'),
    (dict(audio=dict(array=WAVE_T)), ValueError, 'audio needs its sample_rate in Hz'),
    (dict(audio=STEREO_2T, sample_rate=16_000), ValueError, 'give list(audio) or [audio]'),
    (dict(audio=WAVE_T[:100], sample_rate=16_000), ValueError, 'audio lasts 6.25 ms: at least 25 ms'),
    (dict(audio=WAVE_T * 30_000, sample_rate=16_000), ValueError, 'audio has a peak of 30,000, far'),
    (dict(text='a dog', outputs='video'), ValueError, "unknown outputs ['video']: choose from"),
    (dict(text='a dog', outputs=[]), ValueError, 'no outputs are wanted: choose from text, image, audio'),
    (dict(text='a dog', generator=0), TypeError, 'torch.Generator or None, not 0: give a number as seed'),
    (dict(text='a dog', seed=.5), ValueError, 'seed must be a whole number from 0 to 2**63 - 1, not 0.5'),
    (dict(text='a dog', seed=[1, 2]), ValueError, '2 seeds for 1 samples: give one, or one for each'),
    (dict(text='a dog', seed=1, generator=torch.Generator()), ValueError, 'seed and generator were given'),
    (dict(text='a dog', steps=-1), ValueError, f'steps {NUMBER} -1'),
    (dict(text='a dog', seconds=0), ValueError, 'seconds must lie between 0.025 and 600, not 0'),
    (dict(text='a dog', seconds='5'), ValueError, "seconds must be a finite number, not '5'"),
    (dict(text='a dog', guidance_image='7'), ValueError, "guidance_image must be a finite number, not '7'"),
    (dict(text='a dog', negative=5), TypeError, 'negative must be a string, not 5'),
    (dict(text='a dog', negative=['a', 'b']), ValueError, 'negative has 2 texts for 1 prompts: give one, or'),
    (dict(text='a dog', samples=0), ValueError, f'samples {NUMBER} 0'),
    (dict(text='a dog', max_new_tokens=0), ValueError, f'max_new_tokens {NUMBER} 0'),
    (dict(text='a dog', callback=5), TypeError, 'callback must be a function of three arguments'),
    (dict(text='caf\udce9'), ValueError, r"text has no character at 3 but '\udce9': read it with"),
    (dict(images=''), ValueError, 'images is an empty string: give a path or a URL'),
    (dict(images='.'), ValueError, 'images: picture . is a folder: replace it or leave it out'),
    (dict(audio=EMPTY), ValueError, 'audio is an output without sounds: make it with audio in outputs'),
    (dict(text='a dog', steps=1000), ValueError, 'steps must be fewer than 1,000, the levels of noise'),
    (dict(text='a dog', seconds=1e9), ValueError, 'seconds must lie between 0.025 and 600, not 1000000000.0'),
    (dict(text='a dog', seconds=float('nan')), ValueError, 'seconds must be a finite number, not nan'),
    (dict(text='a dog', seed=2**63 - 1, samples=2), ValueError, 'seed must be at most 2**63 - 2 for 2'),
    (dict(text='a dog', seed=np.array(1.)), ValueError, 'seed must be a whole number from 0'),
    (dict(text='a dog', callback=lambda step: None), TypeError, 'callback must take three arguments'),
], ids=lambda value: ' '.join(value) if isinstance(value, dict) else '')
def test_generate_refuses(given, error, message, model):
    refuse(error, message, model.generate, **given)


@pytest.mark.parametrize('outputs', [('image', 'audio'), 'image', ['text', 'image']])
def test_generate_refuses_what_the_mapper_has_no_head_for(outputs, model):
    model.conditioner.mapper = GILLMapper(SMALL)
    message = 'GILLMapper makes no pictures: leave image out of outputs'
    refuse(ValueError, message, model.generate, 'a dog', outputs=outputs)


@pytest.mark.parametrize('given, error, message', [
    (dict(audio=None), ValueError, 'there is nothing to edit: give one sound or many as audio'),
    (dict(audio=[]), ValueError, 'audio is empty: give at least one'),
    (dict(audio='bell.wav'), ValueError, 'audio: sound bell.wav is missing'),
    (dict(audio=WAVE_T), ValueError, 'audio needs its sample_rate in Hz'),
    (dict(audio=[(16_000, WAVE_T), (8000, WAVE_T)]), ValueError, '2 different lengths: edit sounds'),
    (dict(audio=(16_000, WAVE_T), strength=2), ValueError, 'strength must lie between 0 and 1, not 2'),
    (dict(audio=(16_000, WAVE_T), steps=0), ValueError, f'steps {NUMBER} 0'),
    (dict(audio=(16_000, WAVE_T), samples=0), ValueError, f'samples {NUMBER} 0'),
    (dict(audio=(16_000, WAVE_T), generator=0), TypeError, 'give a number as seed'),
    (dict(audio=(16_000, WAVE_T), callback='x'), TypeError, "and those of all samples; not 'x'"),
], ids=lambda value: ' '.join(value) if isinstance(value, dict) else '')
def test_edit_refuses(given, error, message, model):
    refuse(error, message, model.edit, 'louder', **given)


@pytest.mark.parametrize('source, error, message', [
    ('small', FileNotFoundError, 'there is no folder small: give mini or the folder of a trained mapper'),
    ('paper', FileNotFoundError, 'paper comes without a trained mapper, as none was published: `egmi train'),
    ('me/repo', FileNotFoundError, 'me/repo is no folder, and the hub does not give a model of this name'),
    ('model.safetensors', NotADirectoryError, 'model.safetensors is a file: give the folder'),
    ('.', FileNotFoundError, 'holds no config.json: give mini or the folder of a trained mapper'),
    (None, TypeError, 'source must be mini or the folder of a trained mapper, not None'),
])
def test_from_pretrained_refuses_a_source(source, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr(egmi.model, 'load_panda', Untouched())
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)
    (tmp_path/'model.safetensors').touch()
    refuse(error, message, EGMI.from_pretrained, source)


@pytest.mark.parametrize('device', ['cuda:99', 'gpu', 'meta', 5, ['cpu']])
def test_from_pretrained_refuses_a_device(device, monkeypatch):
    monkeypatch.setattr(egmi.model, 'load_panda', Untouched())
    message = f'device {device!r} is not available here: use auto'
    refuse(ValueError, message, EGMI.from_pretrained, 'mini', device)


@pytest.mark.parametrize('folder, error, message', [
    ('sound.wav', FileExistsError, 'sound.wav is a file, give another name'),
    ('sound.wav/egmi', FileExistsError, 'sound.wav is a file, give another name'),
    (5, TypeError, 'folder must be a path, not 5'),
    ('', TypeError, "folder must be a path, not ''"),
    ('/dev/null/egmi', NotADirectoryError, 'folder /dev/null/egmi cannot be made: Not a directory, give'),
])
def test_a_folder_that_cannot_be_written_to_is_refused(folder, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'sound.wav').write_text('kept')
    mapper = object.__new__(egmi.model.MAPPERS['EGMI mapper'])
    model = EGMI(get_preset('mini'), None, SimpleNamespace(mapper=mapper), None, None)
    refuse(error, message, model.save_pretrained, folder)
    refuse(error, message, EMPTY.save, folder)
    assert [path.name for path in tmp_path.iterdir()] == ['sound.wav']
    assert (tmp_path/'sound.wav').read_text() == 'kept'


def test_sharing_refuses_what_is_no_name_and_no_run(model):
    refuse(TypeError, 'repo_id must be a string, not None', model.push_to_hub, None)
    refuse(ValueError, '5/run.json is not the record of an experiment', model.push_to_hub, 'me/bells', 5)


# Rows of a dataset

@pytest.mark.parametrize('decode', [True, False])
def test_columns_and_rows_of_a_dataset_are_read(decode):
    datasets = pytest.importorskip('datasets')
    file = io.BytesIO()
    PICTURE.save(file, 'PNG')
    rows = dict(image=[dict(bytes=file.getvalue(), path=None)] * 2,
                sound=[dict(bytes=wav_bytes(WAVE_T, 16_000), path=None)] * 2)
    stored = dict(bytes=datasets.Value('binary'), path=datasets.Value('string')) # as Audio is
    features = dict(image=datasets.Image(decode=decode), sound=stored)
    data = datasets.Dataset.from_dict(rows, datasets.Features(features))
    for images in (data['image'], data[:2]['image'], [data[0]['image'], data[1]['image']]):
        assert len(read_inputs(images=images).images) == 2
    assert read_inputs(images=data[0]['image']).images == [PICTURE]
    sounds = read_inputs(audio=data['sound']).sounds
    assert [rate for _, rate in sounds] == [16_000] * 2
    np.testing.assert_allclose(sounds[0][0], WAVE_T, atol=1e-6)
