"""A file is written whole or not at all."""

import pytest

from orthoact.interp.files import beside


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a" / "b.svg"
    with beside(path) as part:
        part.write_text("first")
        assert part.suffix == ".svg" and not path.exists()
    with pytest.raises(RuntimeError), beside(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
