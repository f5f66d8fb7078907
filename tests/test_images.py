"""Reading any frame: PNG, JPEG, DICOM; and what is refused, by name."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage
from test_geometry import screen, speckle

from helpers import images
from helpers.pipeline import files


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


@pytest.fixture
def pages(frame):
    return [np.repeat(frame[..., None] // k, 3, 2) for k in (1, 2, 3)]


@pytest.mark.parametrize("suffix", ["tif", "png", "gif", "webp", "dcm"])
def test_of_several_frames_one_is_chosen(tmp_path, pages, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "dcm":
        dicom(path, np.stack(pages), "RGB", frames=3)
    else:
        first, *more = [Image.fromarray(page) for page in pages]
        first.save(path, save_all=True, append_images=more, **{"lossless": True} if suffix == "webp" else {})
    with pytest.raises(ValueError, match=f"a.{suffix} holds 3 frames; choose one of 0 to 2: .*--frame"):
        images.read_image(path)
    with pytest.raises(ValueError, match="no frame 3; it holds 3"):
        images.read_image(path, frame=3)
    found = images.read_image(path, frame=1)
    assert np.abs(found.astype(int) - pages[1]).max() <= (4 if suffix == "gif" else 0)
    assert files.frame_numbers(path, "all") == [0, 1, 2]
    assert files.frame_numbers(path, 1) == [1]
    assert files.frame_numbers(path) == [None]
    Image.fromarray(pages[0]).save(tmp_path / "one.png")
    assert files.frame_numbers(tmp_path / "one.png", "all") == [None]
    assert files.frame_numbers(tmp_path / "one.png", 1) == [None]


# Depth, as BMP's and TIFF's decoders know it by numbers that contain 16


@pytest.mark.parametrize("width", [160, 161, 172, 1600])
@pytest.mark.parametrize("form", ["bmp", "tif", "lzw.tif", "jpeg.tif", "ppm", "gif"])
def test_eight_bits_are_read_whatever_their_width(tmp_path, width, form):
    pixels = np.random.default_rng(0).integers(0, 256, (80, width), dtype=np.uint8)
    path = tmp_path / f"a.{form}"
    compression = {"compression": {"lzw.tif": "tiff_lzw", "jpeg.tif": "jpeg"}[form]} if "." in form else {}
    Image.fromarray(pixels).save(path, **compression)
    found = images.read_image(path).astype(int)
    assert np.abs(found - pixels[..., None]).max() <= (60 if form == "jpeg.tif" else 0)


@pytest.mark.parametrize("kind", ["<u2", "<i2", "<f4", "|i1"])
def test_what_eight_bits_cannot_hold_is_refused(tmp_path, kind):
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", np.arange(80 * 90).reshape(80, 90).astype(kind))
    with pytest.raises(ValueError, match="a.tif (has more than 8 bits|is not a whole image)"):
        images.read_image(tmp_path / "a.tif")


def test_sixteen_bit_colours_are_refused(tmp_path):
    import tifffile

    deep = np.full((80, 90, 3), 4000, np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb")
    (tmp_path / "a.ppm").write_bytes(b"P6 90 80 65535\n" + deep.tobytes())
    for name in ("a.tif", "a.ppm"):
        with pytest.raises(ValueError, match=f"{name} (has more than 8 bits|is not a whole image)"):
            images.read_image(tmp_path / name)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_a_turned_frame_is_read_upright(tmp_path, orientation, suffix):
    stored = np.zeros((80, 120, 3), np.uint8)
    stored[:30, :40], stored[:30, 80:], stored[60:, :40] = 250, 150, 60
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    turned = Image.Exif()
    turned[0x0112] = orientation
    settings = {"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(stored).save(tmp_path / f"a.{suffix}", exif=turned, **settings)
    found = images.read_image(tmp_path / f"a.{suffix}").astype(int)
    assert found.shape == upright.shape
    assert np.abs(found - upright).mean() < 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_black(tmp_path, mode):
    values = np.full((80, 90), 200, np.uint8)
    values[:40] = 90  # what lies under the transparent half
    image = Image.fromarray(values).convert("RGBA")
    alpha = np.full((80, 90), 255, np.uint8)
    alpha[:40], alpha[40, 0] = 0, 51
    image.putalpha(Image.fromarray(alpha))
    if mode == "P":
        grey = Image.fromarray(values).convert("P")
        grey.save(tmp_path / "a.png", transparency=grey.getpixel((0, 0)))
    else:
        image.convert(mode).save(tmp_path / "a.png")
    found = images.read_image(tmp_path / "a.png")
    assert (found[:40] == 0).all()
    assert (found[41:] == 200).all()
    if mode != "P":
        assert (found[40, 0] == 40).all()


# DICOM as scanners and viewers write it


def test_a_damaged_number_of_frames_is_no_endless_work(tmp_path, frame):
    path = dicom(tmp_path / "a.dcm", frame, NumberOfFrames=999_999_999)
    assert files.frame_numbers(path, "all") == [None]
    with pytest.raises(ValueError, match="a.dcm can't be decoded .it states 999999999 frames"):
        images.read_image(path)


def test_an_identity_window_changes_no_brightness(tmp_path, frame):
    plain = images.read_image(dicom(tmp_path / "a.dcm", frame))
    for centre, width in ((128, 256), (127.5, 255)):
        path = dicom(tmp_path / "b.dcm", frame, WindowCenter=centre, WindowWidth=width)
        assert np.abs(images.read_image(path).astype(int) - plain).max() <= 1
    path = dicom(tmp_path / "b.dcm", frame, RescaleSlope=1, RescaleIntercept=0)
    assert (images.read_image(path) == plain).all()


def test_eight_bits_in_sixteen_keep_their_brightness(tmp_path, frame):
    path = dicom(tmp_path / "a.dcm", frame.astype(np.uint16), BitsStored=8, HighBit=7)
    assert (images.read_image(path) == frame[..., None]).all()


def test_a_voi_table_is_mapped_by_its_range(tmp_path, frame):
    from pydicom.dataset import Dataset

    lut = Dataset()
    lut.LUTDescriptor = [256, 0, 16]
    lut.LUTData = (np.arange(256) * 64).astype("<u2").tobytes()  # to a quarter of its range
    lut["LUTData"].VR = "OW"
    found = images.read_image(dicom(tmp_path / "a.dcm", frame, VOILUTSequence=[lut]))
    assert np.abs(found[..., 0] - frame / 4).max() <= 1


def test_a_palette_gives_its_colours(tmp_path, frame):
    tables = {}
    ramp = np.arange(256)
    for colour, values in (("Red", ramp), ("Green", 255 - ramp), ("Blue", np.full(256, 7))):
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tables[f"{colour}PaletteColorLookupTableData"] = (values * 257).astype("<u2").tobytes()
    found = images.read_image(dicom(tmp_path / "a.dcm", frame, "PALETTE COLOR", **tables))
    assert (found == np.stack([frame, 255 - frame, np.full_like(frame, 7)], axis=-1)).all()


def test_an_inverse_presentation_is_turned_round(tmp_path, frame):
    found = images.read_image(dicom(tmp_path / "a.dcm", frame, PresentationLUTShape="INVERSE"))
    assert (found == 255 - frame[..., None]).all()


@pytest.mark.parametrize("implicit", [True, False])
def test_no_preamble(tmp_path, frame, implicit):
    dataset = pydicom.dcmread(dicom(tmp_path / "a.dcm", frame))
    bare = pydicom.Dataset(dataset)
    bare.save_as(tmp_path / "IM1", implicit_vr=implicit, little_endian=True)
    assert (tmp_path / "IM1").read_bytes()[:2] == b"\x08\0"
    assert (images.read_image(tmp_path / "IM1") == frame[..., None]).all()


def test_pixels_that_are_not_square_are_made_so(tmp_path, frame):
    path = dicom(tmp_path / "a.dcm", frame, PixelAspectRatio=[2, 1])  # twice as high as wide
    assert images.read_image(path).shape == (180, 120, 3)
    path = dicom(tmp_path / "a.dcm", frame, PixelSpacing=[0.1, 0.15])
    assert images.read_image(path).shape == (90, 180, 3)
    region = pydicom.Dataset()
    region.RegionSpatialFormat, region.PhysicalUnitsXDirection = 1, 3
    region.PhysicalDeltaX, region.PhysicalDeltaY = 0.01, 0.012
    path = dicom(tmp_path / "a.dcm", frame, SequenceOfUltrasoundRegions=[region])
    assert images.read_image(path).shape == (108, 120, 3)
    path = dicom(tmp_path / "a.dcm", frame, PixelSpacing=[0.1, 0.1])
    assert (images.read_image(path) == frame[..., None]).all()
    with pytest.raises(ValueError, match="a.dcm can't be decoded .its pixels are said to be 50 times"):
        images.read_image(dicom(tmp_path / "a.dcm", frame, PixelAspectRatio=[50, 1]))


@pytest.mark.parametrize("modality", ["CT", "MR", "MG", "NM", "SEG", "OT"])
def test_what_is_not_ultrasound_is_refused(tmp_path, frame, modality):
    with pytest.raises(ValueError, match=f"a.dcm is not ultrasound but of modality '{modality}'"):
        images.read_image(dicom(tmp_path / "a.dcm", frame, Modality=modality))


def test_a_modality_that_is_not_stated_is_warned_of(tmp_path, frame):
    path = dicom(tmp_path / "a.dcm", frame, Modality="")
    with pytest.warns(files.ImageWarning, match="a.dcm does not say its modality"):
        images.read_image(path)
    found, (note,) = files.read_noting(path)
    assert "does not say its modality" in note
    assert (found == frame[..., None]).all()


def test_a_broken_number_names_its_file(tmp_path, frame):
    path = dicom(tmp_path / "a.dcm", frame, frames=2)
    content = path.read_bytes()
    at = content.index(b"\x28\0\x08\0IS") + 8
    path.write_bytes(content[:at] + b"x" + content[at + 1 :])
    with pytest.raises(ValueError, match="a.dcm can't be decoded.*; export it again"):
        images.read_image(path)


def test_the_whole_cause_is_told_and_the_advice_fits(tmp_path, frame):
    from pydicom.uid import MPEG4HP41, JPEGLSLossless

    path = dicom(tmp_path / "a.dcm", frame)
    whole = pydicom.dcmread(path)
    whole.PixelData = whole.PixelData[:-500]
    whole.save_as(path)
    with pytest.raises(ValueError, match="number of bytes of pixel data is less.*; export it again"):
        images.read_image(path)
    whole.file_meta.TransferSyntaxUID = JPEGLSLossless
    whole.PixelData = pydicom.encaps.encapsulate([b"no JPEG-LS at all"])
    whole["PixelData"].VR = "OB"
    whole.save_as(path)
    with pytest.raises(ValueError, match="pylibjpeg.*; export it uncompressed .now JPEG-LS Lossless"):
        images.read_image(path)
    whole.file_meta.TransferSyntaxUID = MPEG4HP41
    whole.NumberOfFrames = 30
    whole.save_as(path)
    with pytest.raises(ValueError, match="a.dcm is an MPEG video, which is not read"):
        images.read_image(path)


def test_lossless_jpeg_is_decoded(tmp_path):
    """pydicom has the same picture in JPEG Lossless and in RLE, which needs no plugin."""
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    dataset = pydicom.dcmread(folder / "SC_rgb_jpeg_gdcm.dcm")
    dataset.Modality = "US"
    dataset.save_as(tmp_path / "a.dcm")
    plain = pydicom.dcmread(folder / "SC_rgb_rle.dcm").pixel_array
    assert (images.read_image(tmp_path / "a.dcm") == plain).all()


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
    assert files.check(np.repeat(frame[..., None], 3, axis=2)) == ()


def test_doppler_is_warned_of(frame):
    image = np.repeat(frame[..., None], 3, axis=2)
    image[20:60, 20:70] = [220, 40, 30]
    (warning,) = files.check(image)
    assert "Doppler" in warning


def test_a_speckled_frame_passes_with_a_screen_around_it():
    assert files.check(speckle()) == files.check(screen(speckle())[0]) == ()


@pytest.mark.parametrize("level", [0, 40])
def test_two_images_side_by_side_are_warned_of(level):
    gap = np.full((360, 12, 3), level, np.uint8)
    both = np.hstack([speckle(), gap, speckle(seed=1)])
    for image in (both, screen(both)[0]):
        assert files.check(image) == ("two images side by side: cut one out",)
    both[60:, 480:492] = speckle(300, 12)
    assert files.check(both) == ()  # no gap of the whole height
    beside = np.hstack([speckle(), gap, np.full_like(speckle(), level)])
    assert files.check(beside) == ()  # nothing beside it


def test_an_upside_down_frame_is_warned_of():
    turned = speckle()[::-1]
    for image in (turned, turned[:, ::-1], screen(turned)[0]):
        (warning,) = files.check(np.ascontiguousarray(image))
        assert "upside-down" in warning
    turned = turned.copy()
    turned[100:200, 100:300] = [220, 40, 30]
    assert len(files.check(turned)) == 2  # Doppler too


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.full((90, 90, 3), [200, 90, 40], np.uint8) + np.eye(90, dtype=np.uint8)[..., None], "photo"),
        (np.zeros((90, 90, 3), np.uint8), "every pixel of the image is 0"),
        (screen(np.zeros((360, 480, 3), np.uint8))[0], "of the image has speckle; the rest is flat"),
        (np.repeat(np.eye(90, dtype=np.uint8)[..., None], 3, 2) * 255, "two levels alone, 0 and 255"),
        (np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3), "16 x 16 pixels is too small"),
    ],
)
def test_what_cannot_be_a_frame_is_refused(image, words):
    with pytest.raises(ValueError, match=words):
        files.check(image)
