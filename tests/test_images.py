"""Reading any frame: PNG, JPEG, DICOM; and what is refused, by name."""

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage

from helpers import images


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    return rng.integers(0, 200, (90, 120), dtype=np.uint8)


def dicom(path, pixels=None, photometric="MONOCHROME2", frames=1, **extra):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UltrasoundImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Modality = "US"
    if pixels is not None:
        colour = photometric == "RGB"
        dataset.Rows, dataset.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
        dataset.SamplesPerPixel = 3 if colour else 1
        if colour:
            dataset.PlanarConfiguration = 0
        if frames > 1:
            dataset.NumberOfFrames = frames
        dataset.PhotometricInterpretation = photometric
        depth = pixels.dtype.itemsize * 8
        dataset.BitsAllocated = dataset.BitsStored = depth
        dataset.HighBit = depth - 1
        dataset.PixelRepresentation = 0
        dataset.PixelData = pixels.tobytes()
    for name, value in extra.items():
        setattr(dataset, name, value)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_pictures_come_back_as_they_are(tmp_path, frame, suffix):
    Image.fromarray(frame).save(tmp_path / f"a{suffix}")
    assert (images.read_image(tmp_path / f"a{suffix}") == frame[..., None]).all()


def test_dicom_comes_back_as_it_is(tmp_path, frame):
    found = images.read_image(dicom(tmp_path / "a.dcm", frame))
    assert found.shape == (*frame.shape, 3)
    assert (found == frame[..., None]).all()


def test_dicom_without_a_suffix_is_known_by_its_content(tmp_path, frame):
    assert (images.read_image(dicom(tmp_path / "IM0001", frame)) == frame[..., None]).all()


def test_monochrome1_is_turned_round(tmp_path, frame):
    found = images.read_image(dicom(tmp_path / "a.dcm", frame, "MONOCHROME1"))
    assert (found == 255 - frame[..., None]).all()


def test_colour_stays_colour(tmp_path, frame):
    pixels = np.stack([frame, frame // 2, frame // 3], axis=-1)
    assert (images.read_image(dicom(tmp_path / "a.dcm", pixels, "RGB")) == pixels).all()


def test_sixteen_bits_are_scaled(tmp_path, frame):
    found = images.read_image(dicom(tmp_path / "a.dcm", frame.astype(np.uint16) * 200))
    assert found.min() == 0
    assert found.max() == 255
    assert np.abs(np.diff(np.argsort(found[..., 0].ravel()[:50]))).sum() > 0
    share = (frame - frame.min()) / (frame.max() - frame.min()) * 255
    assert np.abs(found[..., 0] - share).max() <= 1


def test_the_window_is_applied(tmp_path, frame):
    wide = frame.astype(np.uint16) * 20
    path = dicom(tmp_path / "a.dcm", wide, WindowCenter=1000, WindowWidth=500)
    found = images.read_image(path)[..., 0]
    assert (found[wide < 740] == 0).all()
    assert (found[wide > 1260] == 255).all()


def test_one_of_several_frames(tmp_path, frame):
    loop = np.stack([frame, frame // 2, frame // 3])
    path = dicom(tmp_path / "a.dcm", loop, frames=3)
    with pytest.raises(ValueError, match="3 frames; choose one of 0 to 2"):
        images.read_image(path)
    with pytest.raises(ValueError, match="no frame 3; it holds 3"):
        images.read_image(path, frame=3)
    assert (images.read_image(path, frame=1) == loop[1][..., None]).all()


def test_dicom_without_pixels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without pixel data .modality US"):
        images.read_image(dicom(tmp_path / "a.dcm"))


def test_what_is_no_image_is_refused(tmp_path, frame):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="not a whole image"):
        images.read_image(tmp_path / "a.png")
    (tmp_path / "a.dcm").write_text("no image")
    with pytest.raises(ValueError, match="not a whole DICOM"):
        images.read_image(tmp_path / "a.dcm")
    with pytest.raises(FileNotFoundError, match="no image file"):
        images.read_image(tmp_path / "b.png")
    whole = dicom(tmp_path / "c.dcm", frame).read_bytes()
    (tmp_path / "c.dcm").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="c.dcm"):
        images.read_image(tmp_path / "c.dcm")


def test_an_ordinary_frame_passes(frame):
    assert images.check(np.repeat(frame[..., None], 3, axis=2)) == ()


def test_doppler_is_warned_of(frame):
    image = np.repeat(frame[..., None], 3, axis=2)
    image[20:60, 20:70] = [220, 40, 30]
    (warning,) = images.check(image)
    assert "Doppler" in warning


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.full((90, 90, 3), [200, 90, 40], np.uint8) + np.eye(90, dtype=np.uint8)[..., None], "photo"),
        (np.zeros((90, 90, 3), np.uint8), "every pixel of the image is 0"),
        (np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3), "16 x 16 pixels is too small"),
    ],
)
def test_what_cannot_be_a_frame_is_refused(image, words):
    with pytest.raises(ValueError, match=words):
        images.check(image)
