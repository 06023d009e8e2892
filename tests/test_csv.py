"""CSV files as spreadsheets and pandas write them."""

import pytest

from data import DataError
from support.formats import read_pairs

HEADER = ["path_A", "path_B", "prompt", "TA"]
ROWS = [["a.mp4", "b.mp4", "A cat; it runs, fast", "A"], ["b.mp4", "a.mp4", 'the "cat"\nsits', "same"]]


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
    return tmp_path


def cell(text):
    return '"' + text.replace('"', '""') + '"' if set(text) & set('",;\t\n') else text


def text_of(rows, separator=","):
    return "".join(separator.join(map(cell, row)) + "\n" for row in rows)


def read(folder, content, encoding="utf-8"):
    (folder / "p.csv").write_text(content, encoding=encoding, newline="")
    return read_pairs(folder / "p.csv")


def check(pairs, *rows):
    assert [(pair.prompt, pair.preference) for pair in pairs] == [("A cat; it runs, fast", "A"),
                                                                 ('the "cat"\nsits', "tie")]
    assert [pair.row for pair in pairs] == list(rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_header_says_what_separates(folder, separator, encoding):
    text = text_of([HEADER, *ROWS], separator)
    check(read(folder, text, encoding), 2, 3)
    check(read(folder, text.replace("\n", "\r\n"), encoding), 2, 3)
    # In every cell of the header, and with the line that tells Excel; it does not show that line.
    quoted = text.replace("path_A", '"path_A"').replace("prompt", '" prompt "')
    for beginning in (f"sep={separator}\n", f'"sep={separator}"\n'):
        check(read(folder, beginning + quoted, encoding), 2, 3)


def test_a_separator_that_no_header_shows_is_said_in_the_first_line(folder):
    text = "\n".join("|".join(map(cell, row)) for row in [HEADER, *ROWS])
    check(read(folder, "SEP=|\n" + text), 2, 3)


def test_blank_lines_and_comments_above_the_header_are_rows_of_the_sheet(folder):
    text = text_of([HEADER, *ROWS])
    check(read(folder, '# made in May, by "us\n\n,,,\n' + text), 5, 6)
    check(read(folder, "\n;;\n" + text_of([HEADER, *ROWS], ";")), 4, 5)
    lines = text.split("\n")
    check(read(folder, "\n".join([lines[0], "", ",,,", *lines[1:]])), 4, 5)
    numbered = [["#", *HEADER], *[["1", *row] for row in ROWS]]
    check(read(folder, text_of(numbered)), 2, 3)  # this # is a column
    hashed = read(folder, text_of([HEADER[2:] + HEADER[:2], ["# 1 fan waves", "A", "a.mp4", "b.mp4"]]))
    assert [pair.prompt for pair in hashed] == ["# 1 fan waves"]  # and this one a prompt
    with pytest.raises(DataError, match=r"p\.csv: a CSV file, and none of the pair formats .*: May, by, us"):
        read(folder, "May,by,us\n" + text)


def test_columns_without_a_name_are_passed_over(folder):
    check(read(folder, text_of([[*row, "", ""] for row in [HEADER, *ROWS]])), 2, 3)
    check(read(folder, text_of([[*HEADER, "", ""], *ROWS])), 2, 3)  # Excel leaves them out further down
    check(read(folder, text_of([HEADER, *[[*row, ""] for row in ROWS]])), 2, 3)
    numbered = [[str(number) if number else "", *row] for number, row in enumerate([HEADER, *ROWS])]
    check(read(folder, text_of(numbered)), 2, 3)  # the index of pandas
    check(read(folder, text_of([row[:2] + [""] + row[2:] for row in [HEADER, *ROWS]])), 2, 3)
    with pytest.raises(DataError, match=r"p\.csv, row 3: not 4 columns"):
        read(folder, text_of([[*HEADER, ""], ROWS[0], ["a.mp4", "b.mp4", "a cat", "A", "runs"]]))
    with pytest.raises(DataError, match=r"p\.csv, row 3: not 4 columns"):
        read(folder, text_of([HEADER, ROWS[0], ROWS[1][:3]]))


def test_a_quote_that_is_never_closed_is_named_by_its_row(folder):
    text = text_of([HEADER, *ROWS, *ROWS]) + 'a.mp4,b.mp4,"A cat,A\na.mp4,b.mp4,p,A\n'
    with pytest.raises(DataError, match=r"p\.csv, row 6: not CSV that can be read"):
        read(folder, text)
    with pytest.raises(DataError, match=r"p\.csv, row 2: not CSV that can be read"):
        read(folder, "path_A,path_B,TA,prompt\na.mp4,b.mp4,A,\"A cat\na.mp4,b.mp4,B,p\n")


@pytest.mark.parametrize("content", [
    "", "\n", "sep=;", "sep=;\n", ",,,\n,,,\n", "# a\n# b", "a", '"', "\t", "sep=", 'sep="\na', "sep=a\nb",
    'a,"b\nc', "path_A\x00,b,c\n"])
def test_what_is_no_table_is_an_error_of_one_line(folder, content):
    with pytest.raises(DataError, match=r"p\.csv"):
        read(folder, content)


@pytest.mark.parametrize(("name", "message"), [
    ("p.csv", "p.csv: a CSV file, and none of the pair formats has these columns: path_A|path_B$"),
    ("p.TSV", "p.TSV: a CSV file, and none"), ("p.txt", "p.txt, row 1: not JSON")])
def test_a_file_of_one_column_is_called_what_its_name_says(folder, name, message):
    (folder / name).write_text("path_A|path_B\na.mp4|b.mp4\n")
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        read_pairs(folder / name)
