"""From claims to runs, verdicts, a page and its twin."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from droplens import report, reproduction, runs
from droplens.papers import Judgement, Theory, find
from droplens.reproduction import Request, reproduce

QUICK = ("P1.lower-bound", "P4.index-rule")


def test_finished_runs_are_taken_up(tmp_path):
    first = reproduce(Request(QUICK, "test", seeds=3), folder=tmp_path)
    again = reproduce(Request(QUICK, "test", seeds=3), folder=tmp_path)
    more = reproduce(Request(QUICK, "test", seeds=5), folder=tmp_path)
    assert (first.batches_run, again.batches_run, more.batches_run) == (8, 0, 8)
    assert first.to_dict()["claims"] == again.to_dict()["claims"]
    assert [one.measured.n for one in more.judgements] == [5, 5]
    with runs.Store(tmp_path) as store:
        assert store.count() == 8 * 5


def test_processes_change_nothing():
    one = reproduce(Request(QUICK, "test"))
    two = reproduce(Request(QUICK, "test"), jobs=2)
    assert one.to_dict()["claims"] == two.to_dict()["claims"]


def test_broken_claims_are_told_and_the_others_left_out():
    done = reproduce(Request(QUICK, "test", broken="penalty-doubled"))
    assert [one.claim.id for one in done.judgements] == ["P1.lower-bound"]
    assert [item.what for item in done.left_out] == ["P4.index-rule"]
    assert not done.as_expected
    with pytest.raises(ValueError, match=r"P4\.index-rule: its twins are repaired"):
        reproduce(Request(("P4.index-rule",), "test", broken="wrong-lambda"))


def test_the_page_holds_summary_and_cards(tmp_path):
    done = reproduce(Request((*QUICK, "P1.picture"), "test", command="droplens reproduce"))
    page = report.render_page(done.to_document())
    assert len(page.encode()) < report.MAX_BYTES
    assert (
        page.index("Every claim and its verdict")
        < page.index('<a href="#v-p1-lower-bound">P1.lower-bound</a>')
        < page.index('id="v-p1-lower-bound"')
    )
    assert "For the identity of size 4" in page
    twin = done.to_dict()
    assert next(iter(twin)) == "claims"
    assert json.loads(json.dumps(twin, allow_nan=False)) == twin


def test_one_claim_is_counted_as_one():
    done = reproduce(Request(("P4.fixed-width",), "test"))
    assert done.to_document().subtitle.startswith("1 claim: 1 does not hold. Every verdict is")


def test_a_broken_run_says_whether_every_verdict_turned(monkeypatch):
    done = reproduce(Request(QUICK, "test", broken="penalty-doubled"))
    assert done.survivors == ()
    assert done.to_document().subtitle.endswith("verdicts must turn. All of them did.")
    # A measure that does not ask the theory survives it.
    claim = find("P1.lower-bound")
    deaf = replace(claim, measure=lambda setting, seeds, _: {"value": [1.0 for _ in seeds]})
    kept = Judgement(deaf, done.judgements[0].cells, "penalty-doubled")
    cells = tuple(replace(c, numbers=deaf.measure({}, c.seeds, None)) for c in kept.cells)
    survived = replace(done, judgements=(replace(kept, cells=cells),))
    assert survived.to_dict()["survivors"] == ["P1.lower-bound"]
    assert survived.to_document().subtitle.endswith("These did not: P1.lower-bound.")
    whole = replace(survived, request=Request(QUICK, "test"))
    assert whole.survivors == ()


@pytest.mark.parametrize("seeds", [0, -1])
def test_seeds_have_to_be_positive(seeds):
    with pytest.raises(ValueError, match="seeds has to be at least 1"):
        Request(QUICK, seeds=seeds)


def write_idx(folder: Path, name: str, shape: tuple[int, ...], data: bytes) -> None:
    kind = bytes([0, 0, 8, len(shape)])
    sizes = b"".join(n.to_bytes(4, "big") for n in shape)
    (folder / f"{name}.gz").write_bytes(gzip.compress(kind + sizes + data))


def write_mnist(folder: Path) -> None:
    for part in ("train", "t10k"):
        pixels = bytes((7 * k) % 256 for k in range(30 * 28 * 28))
        write_idx(folder, f"{part}-images-idx3-ubyte", (30, 28, 28), pixels)
        write_idx(folder, f"{part}-labels-idx1-ubyte", (30,), bytes(k % 10 for k in range(30)))


def test_data_folders_add_settings(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    claim = find("P8.images")
    monkeypatch.setattr(type(claim), "seed_count", lambda *_: 1)
    cells = claim.cells("test", tmp_path)
    assert [cell.get("data") for cell in cells] == [None, None, "mnist", "mnist"]
    (found,) = claim.run([{**cells[2], "steps": 3}], [0], Theory())
    assert len(found["value"]) == 1


def write_cifar10(folder: Path, n: int = 4) -> None:
    """The binary version: a label, then 3,072 pixels."""
    folder.mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        rows = (bytes([k % 10]) + bytes((k * j) % 256 for j in range(3072)) for k in range(n))
        (folder / f"{name}.bin").write_bytes(b"".join(rows))


@pytest.mark.parametrize("network", ["MLP", "VGG", "ResNet"])
def test_deep_networks_take_cifar(tmp_path, network):
    write_cifar10(tmp_path / "cifar-10-batches-bin")
    claim = find("P4.deep")
    cells = [cell for cell in claim.cells("laptop", tmp_path) if cell.get("data") == "cifar10"]
    assert len(cells) == len(claim.cells("laptop"))
    setting = next(cell for cell in cells if cell["network"] == network)
    (found,) = claim.run([{**setting, "steps": 2, "n": 7, "width": 4}], [0], Theory())
    assert len(found["found"][0]) == 7


def test_what_the_folder_does_not_hold_is_told(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setattr(
        reproduction,
        "work",
        lambda group: [{"value": [0.0 for _ in batch.seeds]} for batch in group],
    )
    names = ("P8.images", "P4.deep")
    claims = [replace(find(name), figure=None) for name in names]
    monkeypatch.setattr(reproduction, "select", lambda _: tuple(claims))
    done = reproduce(Request(names, "test", data=tmp_path))
    assert [item.what for item in done.left_out] == ["P4.deep on cifar10"]
    assert [len(one.cells) for one in done.judgements] == [4, 3]


def test_a_file_cut_short_is_refused_before_anything_runs(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_mnist(folder)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[: -10 * 784]))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz' is truncated"):
        reproduce(Request(("P8.images",), "test", data=folder), folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_bad_data_folders_are_refused(tmp_path):
    with pytest.raises(OSError, match="there is no data folder"):
        reproduce(Request(("P8.images",), "test", data=tmp_path / "missing"))
    with pytest.raises(OSError, match="holds no data set"):
        reproduce(Request(("P8.images",), "test", data=tmp_path))
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"not a gzip file")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        reproduce(Request(("P8.images",), "test", data=tmp_path))


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 375])
def test_the_landscape_moves_with_the_slider(browser, tmp_path, width):
    done = reproduce(Request(("P1.picture", "P4.index-rule"), "test", seeds=2))
    path, _ = report.write_report(done.to_document(), tmp_path / "claims.html")
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.query_selector("figure.chart").scroll_into_view_if_needed()
    page.wait_for_selector(".interactive input[type=range]")
    colours = (
        "() => [...document.querySelectorAll('.interactive path')]"
        ".map(path => path.getAttribute('fill')).join()"
    )
    before = page.evaluate(colours)
    page.fill(".interactive input[type=range]", "2")
    page.wait_for_function(f"before => ({colours})() !== before", arg=before)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
    page.close()
