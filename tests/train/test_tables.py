"""A run's tables are read by one reader, which names what is damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tardkd import cli
from tardkd.files import UnwritableFileError
from tardkd.train.loop import train
from tardkd.train.tables import Table, TableError, read_table

from .recipe import recipe

DAMAGED = {
    "no column": (b"a,b\r\n1,2\r\n", "its first line does not name the columns"),
    "twice": (b"epoch,step,epoch\r\n1,1,1\r\n", "its first line does not name the columns"),
    "not UTF-8": (b"epoch,step,l\xffss\r\n1,1,1\r\n", "its first line does not name the columns"),
    "zeros": (b"\0" * 64 + b"\n", "its first line does not name the columns"),
    "text": (b"epoch,step,loss\r\n1,x,2\r\n1,2,2\r\n", "row 1 is a row that does not fit its columns"),
    "fraction": (b"epoch,step,loss\r\n1,1.5,2\r\n", "row 1 is a row"),
    "infinite": (b"epoch,step,loss\r\n1,1,1\r\n1,inf,2\r\n", "row 2 is a row"),
    "no step": (b"epoch,step,loss\r\n1,,2\r\n", "row 1 is a row"),
    "short": (b"epoch,step,loss\r\n1,1\r\n1,2,2\r\n", "row 1 is a row"),
    "long": (b"epoch,step,loss\r\n1,1,1,1\r\n", "row 1 is a row"),
    "quote": (b'epoch,step,loss\r\n1,1,"2\r\n1,2,2\r\n', "row 1 is a row"),
    "NUL": (b"epoch,step,loss\r\n1,1,\0\0\0\r\n", "row 1 is a row"),
    "endless cell": (b"epoch,step,loss\r\n1,1," + b"1" * 200_000 + b"\r\n", "row 1 is a row"),
    "endless name": (b"epoch,step," + b"x" * 200_000 + b"\r\n1,1,1\r\n", "field larger than field limit"),
}


@pytest.mark.parametrize("name", ["train.csv", "eval.csv"])
@pytest.mark.parametrize("content, message", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_named_by_plot_and_resume(runs, tmp_path, capsys, name, content, message):
    shutil.copytree(runs / "baseline", tmp_path / "baseline")
    (tmp_path / "baseline" / name).write_bytes(content)
    assert cli.main(["plot", str(tmp_path / "baseline"), "--out", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'baseline' / name} is not a run's log: " in error and message in error
    with pytest.raises(TableError, match=f"{tmp_path / 'baseline' / name} is not a run's log: .*{message}"):
        train(recipe(tmp_path).for_role("baseline"), resume=True)
    (tmp_path / "baseline" / name).unlink()  # as the message says: it is a record alone
    train(recipe(tmp_path).for_role("baseline"), resume=True)


def test_what_a_crash_cut_short_is_left_out(tmp_path):
    path = tmp_path / "train.csv"
    for tail in (b"1,2,3", b"1,", b"\0" * 100, b"\xff"):
        path.write_bytes(b"epoch,step,loss\r\n1,1,0.5\r\n" + tail)
        assert read_table(path) == (["epoch", "step", "loss"], [["1", "1", "0.5"]])
    assert read_table(tmp_path / "none.csv") == ([], [])
    path.write_bytes(b"")
    assert read_table(path) == ([], [])


def test_names_of_classes_may_have_signs_of_their_own(tmp_path):
    names = {"epoch": 1, "step": 2, 'AP/a "b", c\n d': 3.5, "AP/caf\u00e9\u2028": None}
    table = Table(tmp_path / "eval.csv", last=None)
    table.write(names)
    table.close()
    assert read_table(tmp_path / "eval.csv") == (list(names), [["1", "2", "3.5", ""]])


def test_a_folder_in_the_place_of_a_table(tmp_path):
    (tmp_path / "train.csv").mkdir()
    with pytest.raises(TableError, match="cannot read .*train.csv: Is a directory"):
        read_table(tmp_path / "train.csv")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_told_by_the_name_of_the_table():
    table = Table(Path("/dev/full"), last=None)
    with pytest.raises(UnwritableFileError, match="cannot write /dev/full: No space left on device"):
        table.write({"epoch": 1, "step": 1})
    table.close()
