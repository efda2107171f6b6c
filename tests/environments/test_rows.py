import itertools

import datasets
import pandas
import pytest

from vpd.config import ConfigError
from vpd.environments import rows as rows_module
from vpd.environments.rows import load_rows, rows_of

ROWS = [{"prompt": "a"}, {"prompt": "b"}]


def values(rows):
    return {name: [dict(row.values) for row in split] for name, split in rows.items()}


def test_one_file_is_training_data(write_jsonl):
    rows = load_rows(write_jsonl("data.jsonl", ROWS))
    assert values(rows) == {"train": ROWS}
    assert [row.id for row in rows["train"]] == ["train/1", "train/2"]


def test_a_folder_may_have_a_test_file(write_jsonl, tmp_path):
    write_jsonl("train.jsonl", ROWS)
    assert values(load_rows(tmp_path)) == {"train": ROWS}
    write_jsonl("test.jsonl", ROWS[:1])
    assert values(load_rows(str(tmp_path))) == {"train": ROWS, "test": ROWS[:1]}


def test_line_separators_inside_a_text_do_not_cut_the_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a\u2028b\x85c"}\r\n\n{"prompt": "d"}', encoding="utf-8")
    rows = load_rows(path)["train"]
    assert [row.values["prompt"] for row in rows] == ["a\u2028b\x85c", "d"]
    assert rows[1].origin == f"{path}, line 3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', r"data\.jsonl, line 2 is not valid JSON"),
        (b'{"prompt": "a"}\n\n[1]\n', r"data\.jsonl, line 3 must be a JSON object, not list"),
        (b"\n \n", r"data file .*data\.jsonl is empty"),
        (b"\xff\xfe", r"data\.jsonl is not UTF-8 text"),
    ],
)
def test_malformed_files_are_named_with_the_line(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_rows(path)


@pytest.mark.parametrize("path", ["no/such/folder/data.jsonl", "missing.jsonl", "a/b/c"])
def test_a_missing_file_is_told(path):
    with pytest.raises(ConfigError, match=f"no data file or folder {path}"):
        load_rows(path)


def test_a_folder_that_datasets_reads(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "train-00000.parquet"))
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(str(tmp_path / "test-00000.parquet"))
    rows = load_rows(tmp_path)
    assert values(rows) == {"train": ROWS, "test": ROWS[:1]}
    assert rows["test"][0].origin == f"{tmp_path}, split test, row 0"


def test_a_hub_dataset(monkeypatch):
    hub = {"someone/both": ["train", "test"], "someone/one": ["data"], "someone/odd": ["left", "right"]}

    def load_dataset(path, config):
        if path not in hub:
            raise FileNotFoundError(f"{path} does not exist on the Hub")
        return datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS) for name in hub[path]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert values(load_rows("someone/both")) == {"train": ROWS, "test": ROWS}
    assert values(load_rows("someone/one")) == {"train": ROWS}
    with pytest.raises(ConfigError, match="has the splits left, right, but none named train"):
        load_rows("someone/odd")
    with pytest.raises(ConfigError, match="could not be loaded: someone/none does not exist"):
        load_rows("someone/none")


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n', encoding="utf-8-sig")
    assert values(load_rows(path)) == {"train": ROWS[:1]}


def test_a_data_frame_is_read_row_by_row():
    assert [row.values for row in rows_of(pandas.DataFrame(ROWS), "train")] == ROWS


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)), r"DatasetDict with test: .* dataset\['test'\]"),
        ({"easy": ROWS, "hard": ROWS}, "eval is a dict with easy, hard: give one of them"),
        (["a", "b"], "eval, row 0 is a str: rows must be dicts"),
        (itertools.repeat(ROWS[0]), "eval has more than 9 rows"),
    ],
)
def test_what_is_no_set_of_rows_is_named(dataset, message, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_ROWS", 9)
    with pytest.raises(ConfigError, match=message):
        rows_of(dataset, "eval")
