"""Images that cannot be read, or lie elsewhere than they should."""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile

from tardkd.data import CocoDetection, build_loader
from tardkd.data.scenes import write_scenes
from tardkd.train.evaluate import evaluate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_scenes(tmp_path, splits={"train": 5}, image_size=64, seed=0)
    return tmp_path


def files(folder: Path) -> list[str]:
    return [image["file_name"] for image in json.loads((folder / "annotations/train.json").read_text())["images"]]


def dataset(folder: Path, **settings) -> CocoDetection:
    return CocoDetection(folder / "images", folder / "annotations/train.json", **settings)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def other_size(path: Path) -> None:
    Image.new("RGB", (10, 10)).save(path)


@pytest.mark.parametrize("damage", [truncate, other_size, Path.unlink, lambda path: path.write_bytes(b"")])
def test_by_default_an_error_that_names_id_and_file(folder, damage):
    name = files(folder)[2]
    damage(folder / "images" / name)
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        dataset(folder)[2]


@pytest.mark.parametrize("damage", [truncate, other_size, Path.unlink])
def test_replaced_by_the_next_good_one_the_same_each_time(folder, damage):
    names = files(folder)
    for index in (2, 3):
        damage(folder / "images" / names[index])
    data = dataset(folder, on_bad_image="replace")
    with pytest.warns(UserWarning, match="the next good one takes its place") as caught:
        image, target = data[2]
    assert len(caught) == 2 and names[2] in str(caught[0].message)
    expected, its_target = data[4]
    assert torch.equal(image, expected) and target["image_id"] == its_target["image_id"] == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each is told once
        assert torch.equal(data[3][0], expected)
    assert data.bad_images == [3, 4]


def test_workers_tell_what_they_found(folder):
    truncate(folder / "images" / files(folder)[1])
    data = dataset(folder, on_bad_image="replace")
    for _ in build_loader(data, batch_size=1, shuffle=False, seed=0, epoch=0, workers=1):
        pass
    assert data.bad_images == [2]


def test_in_an_evaluation_it_counts_as_an_image_without_detections(folder):
    class Finds(torch.nn.Module):
        """All objects, everywhere."""

        def __init__(self, data: CocoDetection) -> None:
            super().__init__()
            self.nothing, self.data, self.turn = torch.nn.Parameter(torch.zeros(())), data, 0

        def forward(self, images):
            targets = [self.data._target(self.turn + i) for i in range(len(images))]
            self.turn += len(images)
            return [{**target, "scores": torch.ones(len(target["labels"]))} for target in targets]

    whole = dataset(folder)
    loader = build_loader(whole, batch_size=2, shuffle=False, seed=0, epoch=0)
    assert evaluate(Finds(whole), loader, whole)["AP"] == pytest.approx(100, abs=0.1)
    truncate(folder / "images" / files(folder)[0])
    data = dataset(folder, on_bad_image="blank")
    with pytest.warns(UserWarning, match="an image without detections"):
        found = evaluate(Finds(data), build_loader(data, batch_size=2, shuffle=False, seed=0, epoch=0), data)
    assert found["AP"] < 95


def test_none_that_can_be_read(folder):
    for name in files(folder):
        truncate(folder / "images" / name)
    with (
        pytest.warns(UserWarning, match="cannot read image"),
        pytest.raises(ValueError, match="none of the 5 images can be read"),
    ):
        dataset(folder, on_bad_image="replace")[0]


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    Image.new("RGB", (64, 64)).save(elsewhere)
    name = files(folder)[1]
    (folder / "images" / name).unlink()
    (folder / "images" / name).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"{name}.* is a link that leads out of the image folder"):
        dataset(folder)


def test_links_within_the_folder_are_followed(folder):
    first, second = files(folder)[:2]
    (folder / "images" / second).unlink()
    (folder / "images" / second).symlink_to(folder / "images" / first)
    data = dataset(folder)
    assert torch.equal(data[0][0], data[1][0])


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGBA", "CMYK", "1"])
def test_modes(folder, mode):
    name = files(folder)[0]
    path = folder / "images" / name
    if mode == "I;16":
        Image.fromarray(np.full((64, 64), 40000, dtype=np.uint16)).save(path)
    else:
        image = Image.open(path).convert(mode)
        image.save(path, format="TIFF" if mode == "CMYK" else "PNG")
    image, _ = dataset(folder)[0]
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
    if mode == "I;16":
        assert (image.float() / 255 - 40000 / 65535).abs().max() < 0.005


def test_an_image_of_another_size_is_not_decoded(folder, monkeypatch):
    """Its header alone tells, and what a few bytes decode to may fill the memory."""
    name = files(folder)[2]
    Image.new("L", (3000, 2000)).save(folder / "images" / name)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("the image was decoded"))
    with pytest.raises(ValueError, match=f"image id 3: image .*{name} is 3000x2000, its annotation says 64x64"):
        dataset(folder)[2]


def test_no_program_is_started_for_an_image(folder, monkeypatch):
    """Pillow leaves PostScript to Ghostscript, whatever the file's name."""
    name = files(folder)[2]
    Image.new("RGB", (64, 64)).save(folder / "images" / name, format="EPS")
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **settings: pytest.fail("a program was started"))
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **settings: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match=f"image id 3: cannot read image .*{name}"):
        dataset(folder)[2]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "TGA"])
def test_the_usual_kinds_of_images_are_read(folder, kind):
    name = files(folder)[2]
    Image.new("RGB", (64, 64), (0, 255, 0)).save(folder / "images" / name, format=kind)
    image, _ = dataset(folder)[2]
    assert abs(image.float().mean((1, 2)) - torch.tensor([0.0, 255.0, 0.0])).max() < 3


def thin(folder: Path, index: int, size: tuple[int, int]) -> str:
    """Make that image and its annotation so many pixels (width, height)."""
    path = folder / "annotations/train.json"
    annotations = json.loads(path.read_text())
    annotations["images"][index] |= {"width": size[0], "height": size[1]}
    path.write_text(json.dumps(annotations))
    name = annotations["images"][index]["file_name"]
    Image.new("RGB", size).save(folder / "images" / name)
    return name


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000)])
def test_an_image_that_is_too_thin_is_named(folder, size):
    """A detector resizes by the longer side, and would be left with none of the shorter one."""
    name = thin(folder, 2, size)
    data = dataset(folder)
    assert data[2][0].shape == (3, size[1], size[0])  # whoever sets no limit may have it
    with pytest.raises(ValueError, match=f"image id 3: image .*{name} is {size[0]}x{size[1]}, too thin"):
        data.limit_aspect(1333)
    skipping = dataset(folder, on_bad_image="replace")
    skipping.limit_aspect(1333)
    with pytest.warns(UserWarning, match=f"{name} is {size[0]}x{size[1]}, too thin.*; the next good one"):
        assert skipping[2][1]["image_id"] == 4
