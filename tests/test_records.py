"""Rows with a step: appended whole, read up to a line cut short, cut back to a resumed step."""

from ueba_helpers.data.records import append_row, cut_rows, read_rows


def test_rows_come_back_as_written_and_a_half_written_last_line_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    for step in (1, 2, 3):
        append_row(path, {"step": step, "reward": step / 2})
    whole = read_rows(path)
    assert whole == [{"step": s, "reward": s / 2} for s in (1, 2, 3)]
    path.write_text(path.read_text() + '{"step": 4, "rew')
    assert read_rows(path) == whole


def test_cutting_back_keeps_the_bytes_of_the_rows_before(tmp_path):
    path = tmp_path / "rows.jsonl"
    for step in (1, 2):
        append_row(path, {"step": step})
    before = path.read_bytes()
    append_row(path, {"step": 3})
    path.write_text(path.read_text() + '{"st')
    assert [row["step"] for row in cut_rows(path, 2)] == [1, 2]
    assert path.read_bytes() == before
    assert cut_rows(path, 0) == [] and path.read_bytes() == b""


def test_a_missing_file_has_no_rows_and_is_not_made(tmp_path):
    assert cut_rows(tmp_path / "none.jsonl", 5) == []
    assert not (tmp_path / "none.jsonl").exists()
