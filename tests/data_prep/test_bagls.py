"""BAGLS becomes a store of videos; what does not fit its layout is told by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.bagls import find_cases, main
from medseg_reg.data.splits import SplitSpec, make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.data.verify import verify
from medseg_reg.errors import MedsegError


def add_frame(
    folder: Path,
    number: int,
    video: Any,
    size: tuple[int, int] = (16, 12),
    foreground: bool = True,
    colour: bool = False,
) -> None:
    """Write one frame of the official layout; its gray value tells its number."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([number, len(folder.name)])
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    if not colour:
        image[...] = image[..., :1]
    image[0, 0] = number
    mask = np.zeros(size, np.uint8)
    if foreground:
        mask[4:8, 3:6] = 255
    Image.fromarray(image).save(folder / f"{number}.png")
    Image.fromarray(mask).save(folder / f"{number}_seg.png")
    (folder / f"{number}.meta").write_text(json.dumps({"Video Id": video, "Camera": ""}))


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "bagls"
    for number in range(12):
        add_frame(folder / "training", number, video=number % 3, foreground=number != 4)
    for number in range(4):
        add_frame(folder / "test", number, video=149)
    return folder


def convert(source: Path, *more: str) -> SliceStore:
    out = source.parent / "store"
    main(["--source", str(source), "--out", str(out), "--workers", "1", *more])
    return SliceStore(out)


def test_a_case_is_a_video_with_its_frames_in_numerical_order(source, capsys):
    store = convert(source)
    assert list(store.rows) == ["video_0000", "video_0001", "video_0002", "video_0149"]
    row = store.row("video_0001")
    assert row.slice_names == ("1", "4", "7", "10")
    assert row.shape == (4, 16, 12)
    assert list(store.image("video_0001")[:, 0, 0]) == [1, 4, 7, 10]
    assert row.foreground == (12, 0, 12, 12)
    assert (row.part, store.row("video_0149").part) == ("train", "test")
    assert store.classes == ("background", "glottis")
    assert store.manifest.description.licence == "CC BY-NC-SA 4.0"
    assert verify(store) == []
    assert "1 of 16 masks have no foreground" in capsys.readouterr().out


def test_the_official_test_part_is_the_test_part(source):
    assert make_splits(convert(source), SplitSpec()).test == ("video_0149",)


def test_colour_is_kept_on_request(source):
    add_frame(source / "training", 50, video=7, colour=True)
    assert convert(source, "--color", "rgb").row("video_0007").shape == (1, 16, 12, 3)


def test_frames_of_two_sizes_make_two_cases_of_one_group(source):
    add_frame(source / "training", 100, video=1, size=(20, 30))
    store = convert(source)
    assert {name for name, row in store.rows.items() if row.group == "video_0001"} == {
        "video_0001_16x12",
        "video_0001_20x30",
    }


def test_a_second_run_changes_nothing_and_other_settings_are_refused(source, capsys):
    before = (convert(source).path / "manifest.json").read_bytes()
    assert (convert(source).path / "manifest.json").read_bytes() == before
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(MedsegError, match="color: 'gray', now 'rgb'"):
        convert(source, "--color", "rgb")


def test_worker_processes_make_the_same_store(source, tmp_path):
    one = convert(source)
    main(["--source", str(source), "--out", str(tmp_path / "two"), "--workers", "2"])
    assert SliceStore(tmp_path / "two").manifest.cases == one.manifest.cases


class TestRefused:
    def test_another_layout(self, tmp_path):
        with pytest.raises(MedsegError, match="neither training/ nor test/"):
            find_cases(tmp_path)

    @pytest.mark.parametrize("unpacked", [True, False])
    def test_archives_that_are_not_unpacked(self, source, unpacked):
        if not unpacked:
            source = source.parent / "fresh"
            source.mkdir()
        (source / "training.zip").touch()
        (source / "test.zip").touch()
        if unpacked:
            assert len(find_cases(source)) == 4
        else:
            with pytest.raises(MedsegError, match=r"training\.zip and test\.zip must be unpacked"):
                find_cases(source)

    @pytest.mark.parametrize(
        ("missing", "message"),
        [
            ("5_seg.png", r"frame 5 has no mask \(N_seg\.png\)"),
            ("5.meta", r"frame 5 has no metadata"),
            ("5.png", "frame 5 has no image"),
        ],
    )
    def test_an_incomplete_frame(self, source, missing, message):
        (source / "training" / missing).unlink()
        with pytest.raises(MedsegError, match=message):
            find_cases(source)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", r"5\.meta: is not valid JSON"),
            ("\xff", r"5\.meta: is not valid JSON"),
            ("[]", r"5\.meta: has no key 'Video Id'"),
            ('{"Video ID": 3}', r"5\.meta: has no key 'Video Id'"),
            ('{"Video Id": ""}', r"5\.meta: 'Video Id' is '', expected a number"),
            ('{"Video Id": null}', r"5\.meta: 'Video Id' is None"),
            ('{"Video Id": true}', r"5\.meta: 'Video Id' is True"),
            ('{"Video Id": "../x"}', r"5\.meta: 'Video Id' is '\.\./x'"),
        ],
    )
    def test_broken_metadata(self, source, text, message):
        (source / "training" / "5.meta").write_bytes(text.encode("latin-1"))
        with pytest.raises(MedsegError, match=message):
            find_cases(source)

    def test_a_video_in_both_parts(self, source):
        add_frame(source / "test", 9, video=2)
        with pytest.raises(MedsegError, match=r"training/2\.meta and .*test/9\.meta: both .* 2\."):
            find_cases(source)

    def test_a_frame_without_a_number(self, source):
        add_frame(source / "training", 30, video=2)
        for file in (source / "training").glob("30*"):
            file.rename(file.with_name(file.name.replace("30", "x30")))
        with pytest.raises(MedsegError, match=r"x30.*is not named by a number"):
            find_cases(source)

    def test_an_empty_part(self, source):
        for file in (source / "test").iterdir():
            file.unlink()
        with pytest.raises(MedsegError, match="test: has no frames"):
            find_cases(source)

    def test_a_mask_of_another_size(self, source):
        Image.new("L", (16, 12)).save(source / "training" / "5_seg.png")
        with pytest.raises(MedsegError, match=r"5_seg\.png: is 12x16, .* 5\.png is 16x12"):
            convert(source)

    def test_a_mask_with_other_values_lists_them_and_can_be_cut(self, source):
        Image.fromarray(np.full((16, 12), 90, np.uint8)).save(source / "training/5_seg.png")
        with pytest.raises(
            MedsegError, match=r"5_seg\.png: the mask holds 90; expected only 0, 255\.\n.*threshold"
        ):
            convert(source)
        for file in source.parent.glob(".store.partial/cases/*"):
            file.unlink()
        assert not (source.parent / "store").exists()

    def test_a_deep_image(self, source):
        Image.fromarray(np.full((16, 12), 900, np.uint16)).save(source / "training/5.png")
        with pytest.raises(MedsegError, match=r"5\.png: holds int16, expected an 8-bit image"):
            convert(source)

    def test_a_truncated_image(self, source):
        file = source / "training/5.png"
        file.write_bytes(file.read_bytes()[:-60])
        with pytest.raises(MedsegError, match=r"5\.png: cannot be read"):
            convert(source)


def test_masks_saved_as_gray_levels_are_cut_by_a_threshold(source):
    levels = np.arange(192, dtype=np.uint8).reshape(16, 12)
    Image.fromarray(levels).save(source / "training/5_seg.png")
    store = convert(source, "--threshold", "127")
    assert store.row("video_0002").foreground[1] == 64


def test_the_real_frames(shared_data, tmp_path):
    store = tmp_path / "store"
    main(["--source", str(shared_data("bagls")), "--out", str(store), "--workers", "1"])
    rows = SliceStore(store).manifest.cases
    assert len(rows) == 45
    assert [sum(row.part == part for row in rows) for part in ("train", "test")] == [33, 12]
    assert {row.slices for row in rows} == {16}
    assert len({row.shape for row in rows}) == 9
    assert sum(count == 0 for row in rows for count in row.foreground) == 88
    splits = make_splits(SliceStore(store), SplitSpec(train_frames=300))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (28, 5, 12)
    assert splits.unused == ()
