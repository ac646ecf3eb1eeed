"""The ledger and verification: any changed byte, broken link, wrong key and half-written line is found."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil

import pytest
from assurance_runs import LIMITS, toy_result

from modules.assurance import ledger, report, signature
from modules.assurance.canonical import canonical_bytes, canonical_line
from modules.assurance.ledger import append, entries, inspect_path, verify_path
from modules.assurance.subject import AssuranceError, state_digest

SECRET, OTHER = b"0123456789abcdef0123456789abcdef", b"another key, long enough"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv(signature.KEY, raising=False)
    monkeypatch.delenv(signature.KEY_FILE, raising=False)


def _make_cycle(run, rounds=2):
    parent = ""
    for number in range(rounds):
        result = toy_result(number, 0.5 * number, units=12)
        path = ledger.round_folder(run, number)
        path.mkdir(parents=True)
        if not number:
            append(run / ledger.LEDGER, "declared", 0, ledger.declared_payload(result.settings, LIMITS, []))
        (path / ledger.OBJECTIVES).write_text(f"model: {{eps: {0.1 * number}}}\n")
        append(run / ledger.LEDGER, "objectives", number, ledger.file_payload(path / ledger.OBJECTIVES))
        append(run / ledger.LEDGER, "model", number, {"digest": state_digest(result.subject.model)})
        report.write(path / ledger.ASSURANCE, result, parent=parent)
        payload = ledger.report_payload(path / ledger.ASSURANCE)
        append(run / ledger.LEDGER, "report", number, payload)
        append(run / ledger.LEDGER, "decision", number, {"outcome": "", "deficit": 0.1 + 0.2})
        parent = payload["report"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cycle")
    _make_cycle(folder / "run")
    return folder / "run"


@pytest.fixture
def cycle(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(signature.KEY, SECRET.decode())
        folder = tmp_path_factory.mktemp("signed")
        _make_cycle(folder / "run")
    return folder / "run"


FILES = (
    "ledger.jsonl",
    "round_00/objectives.yaml",
    "round_01/objectives.yaml",
    "round_00/assurance/report.json",
    "round_01/assurance/report.json",
    "round_00/assurance/samples.jsonl",
    "round_00/assurance/signature.json",
    "round_01/assurance/card.md",
    "round_01/assurance/report.html",
)


def test_an_untouched_cycle_has_no_problem(made):
    found = inspect_path(made)
    assert found.problems == []
    assert any("UNSIGNED" in note for note in found.notes)
    assert verify_path(made / "round_00" / "assurance") == []
    assert verify_path(made / "round_00" / "assurance" / "report.json") == []
    assert verify_path(made / "ledger.jsonl") == []


@pytest.mark.parametrize("place", [0.0, 0.13, 0.37, 0.5, 0.71, 0.93, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_found(cycle, name, place):
    path = cycle / name
    content = bytearray(path.read_bytes())
    position = min(int(place * len(content)), len(content) - 1)
    content[position] ^= 1
    path.write_bytes(content)
    assert verify_path(cycle), f"{name}: byte {position}"
    if "assurance" in name:
        assert verify_path(path.parent), f"{name} alone: byte {position}"


def test_every_byte_of_the_ledger_and_of_a_signature_counts(made, tmp_path):
    chain = (made / "ledger.jsonl").read_bytes()
    path = tmp_path / "ledger.jsonl"
    for position in range(0, len(chain), 13):
        content = bytearray(chain)
        content[position] ^= 4
        path.write_bytes(content)
        assert verify_path(path), position
    sealed = (made / "round_00" / "assurance" / "signature.json").read_bytes()
    for position in range(0, len(sealed), 2):
        content = bytearray(sealed)
        content[position] ^= 4
        (tmp_path / "signature.json").write_bytes(content)
        with pytest.raises(AssuranceError, match="was changed"):
            signature.load_signature(tmp_path)


@pytest.mark.parametrize("name", [name for name in FILES if name != "ledger.jsonl"])
def test_a_missing_file_is_found(cycle, name):
    (cycle / name).unlink()
    assert verify_path(cycle)


@pytest.mark.parametrize("index", range(9))
def test_a_dropped_entry_breaks_the_chain(cycle, index):
    path = cycle / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:index] + lines[index + 1 :]))
    assert len(lines) == 9
    found = inspect_path(cycle)
    if index < 8:
        assert found.problems
    else:  # no link leads to the last entry: without its decision a round looks as if it were going on
        assert found.problems == []
        assert f"{cycle / 'round_01'} has a report and no decision yet" in found.notes


def test_swapped_entries_and_a_rewritten_one_break_the_chain(cycle):
    path = cycle / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    assert "the chain is broken" in verify_path(path)[0]
    entry = json.loads(lines[4])
    entry["payload"]["outcome"] = "passed"
    forged = ledger._line(entry, None)  # its own hash is right, the next one's link is not
    path.write_bytes(b"".join([*lines[:4], canonical_line(forged), *lines[5:]]))
    assert verify_path(path) == [f"{path}: entry 5 does not follow the one before: the chain is broken"]
    with pytest.raises(AssuranceError, match="the chain is broken"):
        append(path, "decision", 7, {})


def test_a_report_of_another_run_does_not_fit(cycle, tmp_path):
    place = cycle / "round_01" / "assurance"
    report.write(place, toy_result(1, 1.0, units=12), parent=report.read(place)["lineage"]["parent_report"])
    assert verify_path(place) == []  # in itself it is whole
    found = verify_path(cycle)
    assert any("report.json was changed: its sha256 is not the ledger's" in problem for problem in found)


def _rebuilt(run, folder, change):
    """The same ledger with one payload changed, all links made good again: only what it says can give it away."""
    path = run / "ledger.jsonl"
    before = entries(path)
    path.unlink()
    for entry in before:
        payload = change(entry["kind"], entry["round"], dict(entry["payload"]))
        if payload is not None:
            append(path, entry["kind"], entry["round"], payload)
    return verify_path(run)


def test_a_consistent_lie_contradicts_the_reports(cycle, tmp_path):
    def lie(kind, key, value):
        return lambda k, n, p: {**p, key: value} if k == kind and n in (0, 1) else p

    cases = {
        "limits are not those that were declared": lie("declared", "limits", "0" * 64),
        "the measured model is not the one": lie("model", "digest", "0" * 64),
        "its sha256 is not the ledger's": lie("report", "report", "0" * 64),
        "stands in no entry of the ledger": lambda k, n, p: None if (k, n) == ("report", 1) else p,
    }
    for said, change in cases.items():
        place = tmp_path / said.split()[-1] / "run"
        shutil.copytree(cycle, place)
        assert any(said in problem for problem in _rebuilt(place, tmp_path, change)), said


def test_lineage_must_name_the_last_report(cycle):
    place = cycle / "round_01" / "assurance"
    report.write(place, toy_result(1, 0.5, units=12), parent="ee" * 32)
    found = _rebuilt(cycle, None, lambda k, n, p: ledger.report_payload(place) if (k, n) == ("report", 1) else p)
    assert found == [f"{place / 'report.json'}: its parent is not the report of round 0"]


def test_limits_declared_late_are_found(tmp_path):
    append(tmp_path / "ledger.jsonl", "model", 0, {"digest": "00"})
    append(tmp_path / "ledger.jsonl", "declared", 0, {"limits": "00"})
    assert "declared after the cycle had begun" in verify_path(tmp_path)[0]


def test_keys(signed, made):
    assert verify_path(signed, SECRET) == []
    assert inspect_path(signed, SECRET).notes == []
    wrong = verify_path(signed, OTHER)
    assert sum("another key" in problem for problem in wrong) == len(entries(signed / "ledger.jsonl")) + 2
    assert verify_path(signed) == []  # no key at hand: the hashes still hold
    assert any("to check by whom" in note for note in inspect_path(signed).notes)
    unsigned = verify_path(made, SECRET)
    assert unsigned
    assert all("UNSIGNED" in problem for problem in unsigned)
    place = signed / "round_00" / "assurance"
    assert "HMAC-SHA256" in (place / "card.md").read_text()
    assert "UNSIGNED" not in (place / "card.md").read_text() + (place / "report.html").read_text()


def test_a_forger_without_the_key_is_found(signed, tmp_path):
    place = tmp_path / "assurance"
    shutil.copytree(signed / "round_00" / "assurance", place)
    path = place / "report.json"
    path.write_bytes(path.read_bytes().replace(b'"verdict": "fail"', b'"verdict": "pass"'))
    old = signature.load_signature(place)
    signature.seal(place)  # all hashes made good again, without the key
    assert verify_path(place) == []
    assert "UNSIGNED" in verify_path(place, SECRET)[0]
    body = {name: json.loads((place / "signature.json").read_bytes())[name] for name in ("schema", "version", "files")}
    body = {**body, "algorithm": "hmac-sha256"}
    (place / "signature.json").write_bytes(signature._closed(body, old["mac"]))  # and with the old HMAC
    assert "another key, or forged" in verify_path(place, SECRET)[0]


def test_hmac_equals_the_standard_library():
    found = ledger.sign(b"evidence", SECRET)
    assert found.sha256 == hashlib.sha256(b"evidence").hexdigest()
    assert found.mac == hmac.digest(SECRET, b"evidence", "sha256").hex()
    assert found.signed
    assert not ledger.sign(b"evidence").signed


def test_the_key_comes_from_the_environment(tmp_path, monkeypatch):
    assert signature.signing_key() is None
    monkeypatch.setenv(signature.KEY, SECRET.decode())
    assert signature.signing_key() == SECRET
    file = tmp_path / "key"
    file.write_bytes(OTHER + b"\n")
    monkeypatch.setenv(signature.KEY_FILE, str(file))
    with pytest.raises(AssuranceError, match="both set"):
        signature.signing_key()
    monkeypatch.delenv(signature.KEY)
    assert signature.signing_key() == OTHER
    file.write_bytes(b"short\n")
    with pytest.raises(AssuranceError, match="gives 5 bytes, at least 16"):
        signature.signing_key()
    file.unlink()
    with pytest.raises(AssuranceError, match="No such file"):
        signature.signing_key()


def test_append_is_idempotent_and_refuses_a_second_opinion(tmp_path):
    path = tmp_path / "new" / "ledger.jsonl"
    first = append(path, "decision", 0, {"gain": 0.1 + 0.2, "names": ("a", "b")})
    content = path.read_bytes()
    assert append(path, "decision", 0, {"names": ["a", "b"], "gain": 0.3}) == first  # equal at 12 digits
    assert path.read_bytes() == content
    with pytest.raises(AssuranceError, match="holds another 'decision' of round 0"):
        append(path, "decision", 0, {"gain": 0.4, "names": ["a", "b"]})
    with pytest.raises(AssuranceError, match="kind must be one of declared"):
        append(path, "verdict", 0, {})
    append(path, "decision", 1, {})
    assert [entry["prev"] for entry in entries(path)] == ["0" * 64, first["sha"]]


def test_a_kill_at_any_byte_of_an_append_is_mended(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append(path, "objectives", 0, {"sha256": "00"})
    begun = len(path.read_bytes())
    append(path, "model", 0, {"digest": "ü"})
    whole = path.read_bytes()
    for cut in range(begun + 1, len(whole), 29):
        path.write_bytes(whole[:cut])
        assert "the last line is cut" in verify_path(path)[0]
        append(path, "model", 0, {"digest": "ü"})
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # all but the newline
    append(path, "model", 0, {"digest": "ü"})
    assert path.read_bytes() == whole


def test_nothing_to_verify(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(AssuranceError, match="nothing to verify"):
            verify_path(path)


def test_an_unfinished_round_is_a_note(cycle):
    (cycle / "round_02" / "assurance").mkdir(parents=True)
    found = inspect_path(cycle)
    assert found.problems == []
    assert any("round_02/assurance is unfinished" in note for note in found.notes)


def test_a_signature_of_an_unknown_form_is_refused(cycle):
    place = cycle / "round_00" / "assurance"
    body = {**signature.load_signature(place), "version": 9}
    body = {name: body[name] for name in ("schema", "version", "algorithm", "files")}
    (place / "signature.json").write_bytes(signature._closed(body, ""))
    with pytest.raises(AssuranceError, match="version 9 is unknown here"):
        signature.load_signature(place)


def test_hostile_bytes_are_problems_and_no_crash(cycle):
    for content in (b"", b"{}", b"[]", b"null\n", b"\xff\xfe", b'{"files": 3}', b"[" * 5000):
        (cycle / "round_00" / "assurance" / "signature.json").write_bytes(content)
        assert verify_path(cycle)
        (cycle / "ledger.jsonl").write_bytes(content + b"\n")
        assert verify_path(cycle / "ledger.jsonl")
    (cycle / "round_00" / "assurance" / "report.json").write_bytes(b"[1]")
    signature.seal(cycle / "round_00" / "assurance")
    assert verify_path(cycle / "round_00" / "assurance")


def test_declared_settings_do_not_depend_on_the_round():
    first, later = (toy_result(number, units=12).settings for number in (0, 3))
    assert ledger.declared_payload(first, LIMITS) == ledger.declared_payload(later, LIMITS)
    assert ledger.declared_payload(first, LIMITS[1:]) != ledger.declared_payload(first, LIMITS)
    assert len(canonical_bytes(ledger.declared_payload(first, LIMITS, [{"path": "a", "gain": 0.5}]))) < 400
