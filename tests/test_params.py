import dataclasses
import re
from pathlib import Path

import pytest

from helpers import devices
from helpers.params import SETTINGS, check, common, limited, param, profile

NOTEBOOKS = sorted(Path(__file__).parent.parent.glob("notebooks/*.ipynb"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(f"NB_{name}", raising=False)


def test_default_without_override():
    assert param("LIMIT", 7) == 7


@pytest.mark.parametrize(("name", "given", "alone"), [("full", 7, 7), ("quick", 3, 7), ("test", 1, 7)])
def test_a_setting_has_a_value_in_each_profile(monkeypatch, name, given, alone):
    monkeypatch.setenv("NB_PROFILE", name)
    assert param("LIMIT", 7, quick=3, test=1) == given
    assert param("LIMIT", 7) == alone
    assert param("LIMIT", 7, quick=3) == (7 if name == "full" else 3)
    assert common()[3] == name


def test_the_profile_follows_the_hardware(monkeypatch):
    for device, expected in (("cpu", "quick"), ("cuda", "full"), ("mps", "full")):
        monkeypatch.setattr(devices, "default_device", lambda device=device: device)
        assert profile() == expected


def test_an_unknown_profile_is_named(monkeypatch):
    monkeypatch.setenv("NB_PROFILE", "fast")
    with pytest.raises(ValueError, match="NB_PROFILE='fast' is none of test, quick, full"):
        param("LIMIT", 7)


@pytest.mark.parametrize(
    ("text", "default", "expected"),
    [("3", 1, 3), ("0.5", 1.0, 0.5), ("busi", "auto", "busi"), ("no", True, False), ("1", False, True)],
)
def test_override_has_the_type_of_the_default(monkeypatch, text, default, expected):
    monkeypatch.setenv("NB_LIMIT", text)
    value = param("LIMIT", default)
    assert value == expected
    assert type(value) is type(default)


@pytest.mark.parametrize(("text", "default"), [("many", 1), ("1.5", 1), ("perhaps", True), ("", 0)])
def test_ill_typed_override(monkeypatch, text, default):
    monkeypatch.setenv("NB_LIMIT", text)
    with pytest.raises(ValueError, match=f"NB_LIMIT='{text}' is not of type"):
        param("LIMIT", default)


def test_misspelt_override_names_the_right_one(monkeypatch):
    monkeypatch.setenv("NB_LIMITS", "3")
    with pytest.raises(ValueError, match="NB_LIMITS.*did you mean NB_LIMIT"):
        param("SEED", 0)


def test_what_container_images_set_is_no_misspelling(monkeypatch):
    monkeypatch.setenv("NB_USER", "jovyan")
    monkeypatch.setenv("NB_PREFIX", "/notebook")
    monkeypatch.setenv("NB_PYTHON_PREFIX", "/srv/conda/envs/notebook")  # Binder and Pangeo
    monkeypatch.setenv("NB_ENVIRONMENT_FILE", "environment.yml")
    monkeypatch.setenv("NB_DIR", "work")
    assert param("SEED", 5) == 5


@pytest.mark.parametrize("name", ["LIMITT", "VGG_EPOCH", "SEEDs", "CHEKPOINT", "UNET_EPOCS", "limit"])
def test_near_misses_are_told(monkeypatch, name):
    monkeypatch.setenv(f"NB_{name}", "3")
    with pytest.raises(ValueError, match=f"NB_{name}, which no notebook reads .did you mean NB_"):
        param("SEED", 0)


def test_a_path_may_begin_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RESULTS", "IMAGE", "CHECKPOINT", "PIPELINE"):
        monkeypatch.setenv(f"NB_{name}", "~/mine")
        assert param(name, "") == str(tmp_path / "mine")


def test_unknown_setting():
    with pytest.raises(KeyError, match="did you mean SEED"):
        param("SEEDD", 0)


def test_every_setting_is_read_by_a_notebook():
    used = {
        name
        for path in NOTEBOOKS
        for name in re.findall(r'param\((?:\\n",\s*"\s*)?\\"(\w+)\\"', path.read_text())
    }
    common = {"DATA", "FOLD", "SEED", "PROFILE", "CACHE", "RESULTS", "SYNTHETIC_IMAGES"}
    assert used | common == set(SETTINGS)


@pytest.mark.parametrize("text", ["0", "false", "no", "False", "1", "true", "yes", "TRUE"])
def test_every_word_for_yes_and_no(monkeypatch, text):
    expected = text.lower() in ("1", "true", "yes")
    monkeypatch.setenv("NB_DRAW", text)
    assert param("DRAW", not expected) is expected


@dataclasses.dataclass(frozen=True)
class Config:
    loss: str = limited("dice", options=("dice", "mse"))
    epochs: int = limited(3, at_least=1)
    rate: float | None = limited(None, above=0)
    dropout: tuple = limited((0.2, 0.1), at_least=0, below=1)
    size: int = limited(64, at_least=64, multiple_of=32)
    free: str = ""

    def __post_init__(self):
        check(self)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "l1"}, "loss 'l1' is none of dice, mse"),
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"rate": 0.0}, "rate is 0.0; it must be above 0"),
        ({"dropout": (0.5, 1)}, "dropout is 1; it must be 0 or more, and below 1"),
        ({"size": 100}, "size is 100; it must be 64 or more, and a multiple of 32"),
        ({"size": 32}, "size is 32; it must be 64 or more, and a multiple of 32"),
    ],
)
def test_a_config_is_held_to_its_limits(wrong, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Config(**wrong)


def test_a_config_within_its_limits_passes():
    assert Config(loss="mse", rate=0.1, dropout=(0, 0), size=96).size == 96
