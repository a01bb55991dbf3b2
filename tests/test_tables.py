"""Problems read from files, and one clear error for each way a file can be wrong."""

import numpy as np
import pytest

from droplens._tables import read_problem


@pytest.fixture
def write(tmp_path):
    def write(text, name="data.csv", encoding="utf-8"):
        path = tmp_path / name
        path.write_text(text, encoding=encoding)
        return path

    return write


class TestCsv:
    def test_columns_by_name(self, write):
        path = write('a,"b c",y\n1,2,3\n4,5,6\n')
        found = read_problem(path, ("y",))
        assert found.X.tolist() == [[1, 2], [4, 5]]
        assert found.Y.tolist() == [[3], [6]]
        assert (found.input_names, found.target_names) == (("a", "b c"), ("y",))
        several = read_problem(path, ("b c", "y"), ("a",))
        assert several.Y.tolist() == [[2, 3], [5, 6]]
        assert several.X.shape == (2, 1)

    def test_columns_by_number_without_a_header(self, write):
        found = read_problem(write("1,2,3\n4,5,6\n"), ("3",))
        assert found.X.tolist() == [[1, 2], [4, 5]]
        assert found.input_names == ("1", "2")

    @pytest.mark.parametrize("delimiter", [";", "\t"])
    def test_other_delimiters_and_byte_order_marks(self, write, delimiter):
        text = "a,y\n1,2\n".replace(",", delimiter)
        assert read_problem(write(text, encoding="utf-8-sig"), ("y",)).input_names == ("a",)

    def test_text_may_stand_in_columns_that_are_not_used(self, write):
        path = write("a,name,y\n1,Ann,2\n3,Bob # 2,4\n")
        assert read_problem(path, ("y",), ("a",)).X.tolist() == [[1], [3]]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a,y\n1,2\nx,3\n", r"column 'a' of data.csv holds text \('x' in line 3\)"),
            ("a,y\n1,2\n,3\n", "column 'a' of data.csv is empty in line 3"),
            ("a,b,y\n1,2,3\n1,2\n", "line 3 of data.csv has 2 cells, but there are 3 columns"),
            ("a,b\n1,2\n", "data.csv has no column 'y'; it has a, b"),
            ("y\n1\n", "no columns left to be inputs"),
            ("a,y\n", "has a header but no rows"),
            ("", "data.csv is empty"),
            ("y,y,a\n1,2,3\n", "two columns of one name"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:loadtxt:UserWarning")
    def test_errors(self, write, text, message):
        with pytest.raises(ValueError, match=message):
            read_problem(write(text), ("y",))

    def test_not_text(self, tmp_path):
        path = tmp_path / "data.csv"
        path.write_bytes(b"\xff\xfe\x00\x01")
        with pytest.raises(ValueError, match="not a text file in UTF-8"):
            read_problem(path, ("y",))


class TestNpz:
    def save(self, tmp_path, **arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        return tmp_path / "data.npz"

    def test_arrays_by_name(self, tmp_path):
        X, y = np.arange(6.0).reshape(3, 2), np.arange(3)
        path = self.save(tmp_path, X=X, y=y, other=X)
        found = read_problem(path, ("y",))
        assert found.X.tolist() == X.tolist()
        assert found.Y.shape == (3, 1)
        assert (found.input_names, found.target_names) == (("X[0]", "X[1]"), ("y",))
        both = read_problem(path, ("y", "other"), ("X", "other"))
        assert (both.X.shape, both.Y.shape) == ((3, 4), (3, 3))
        only = read_problem(self.save(tmp_path, features=X, y=y), ("y",))
        assert only.input_names == ("features[0]", "features[1]")

    def test_errors(self, tmp_path):
        X = np.ones((3, 2))
        with pytest.raises(ValueError, match="holds the arrays a, b, y: say with --inputs"):
            read_problem(self.save(tmp_path, a=X, b=X, y=X), ("y",))
        with pytest.raises(ValueError, match="has no array 'z'; it has X, y"):
            read_problem(self.save(tmp_path, X=X, y=X), ("z",))
        with pytest.raises(ValueError, match=r"has to be 1-D or 2-D, but is of shape \(1, 1, 1\)"):
            read_problem(self.save(tmp_path, X=np.ones((1, 1, 1)), y=X), ("y",))
        with pytest.raises(ValueError, match=r"X, b of data\.npz differ in length"):
            read_problem(self.save(tmp_path, X=X, b=X[:1], y=X), ("y",), ("X", "b"))
        with pytest.raises(ValueError, match="it holds Python objects"):
            read_problem(self.save(tmp_path, X=np.array([None]), y=X), ("y",))
        (tmp_path / "data.npz").write_text("no archive")
        with pytest.raises(ValueError, match=r"is not an archive of plain NumPy arrays"):
            read_problem(tmp_path / "data.npz", ("y",))


def test_files_of_other_kinds(tmp_path, write):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_problem(tmp_path / "none.csv", ("y",))
    with pytest.raises(ValueError, match=r"has to end in \.csv or \.npz, but got data\.txt"):
        read_problem(write("a", "data.txt"), ("y",))
    with pytest.raises(ValueError, match="name at least one target"):
        read_problem(write("a,y\n1,2\n"), ())
