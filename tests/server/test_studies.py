"""Blind comparisons: each vote counts once, and is there whatever happens."""

import csv
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings
from server.errors import InvalidField, NotFound, StartupError
from server.studies import PAGE, Studies, Vote, wilson
from tests.server.conftest import wait_until

ROOT = Path(__file__).parents[2]
VOTE = Vote(
    id="vote-0001",
    arms=({"name": "baseline", "attributes": {}}, {"name": "kind", "attributes": {"kind": 1.0}}),
    asked={"prompt": "a", "seed": 1},
    texts=("one, =1+1", 'two "2"\n世'),
    winner=1,
    shown_first=0,
)
VOTER = f"""
import sys
from dataclasses import replace
from pathlib import Path
from server.studies import Studies, Vote
path, name = sys.argv[1:]
studies = Studies(Path(path))
for count in range(1_000_000):
    studies.add("s", replace({VOTE!r}, id=f"{{name}}-{{count:06}}"))
    print(f"{{name}}-{{count:06}}", flush=True)
"""


@pytest.fixture
def studies(tmp_path: Path) -> Studies:
    return Studies(tmp_path / "studies.db")


def test_wins_ties_and_the_win_rate_are_counted(studies: Studies) -> None:
    for count, winner in enumerate([1, 1, 1, 0, None]):
        tally = studies.add("s", replace(VOTE, id=f"vote-{count:04}", winner=winner))
    assert (tally.study, tally.arms, tally.wins, tally.ties, tally.votes) == ("s", ("baseline", "kind"), (1, 3), 1, 5)
    assert tally.win_rate == pytest.approx(0.7)
    assert studies.tallies() == [tally]
    with pytest.raises(NotFound):
        studies.tally("other")


def test_the_interval_is_wilsons() -> None:
    for wins, count in ((0, 1), (3, 5), (17, 40), (40, 40)):
        expected = binomtest(wins, count).proportion_ci(method="wilson")
        assert wilson(wins / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert wilson(0.5, 0) == (0.0, 1.0)


def test_a_vote_that_is_sent_again_counts_once_and_its_id_is_good_for_no_other(studies: Studies) -> None:
    assert studies.add("s", VOTE).votes == studies.add("s", VOTE).votes == 1
    for other in (replace(VOTE, winner=0), replace(VOTE, texts=("x", "y"))):
        with pytest.raises(InvalidField, match="another vote"):
            studies.add("s", other)
    with pytest.raises(InvalidField, match="another vote"):
        studies.add("another study", VOTE)
    assert [one.study for one in studies.tallies()] == ["s"], "what is refused leaves nothing behind"


def test_a_study_is_about_the_same_two_arms_throughout(studies: Studies) -> None:
    studies.add("s", VOTE)
    stronger = {"name": "kind", "attributes": {"kind": 2.0}}
    with pytest.raises(InvalidField, match="other arms"):
        studies.add("s", replace(VOTE, id="vote-0002", arms=(VOTE.arms[0], stronger)))
    assert studies.tally("s").votes == 1


def test_votes_survive_a_restart_as_they_were(studies: Studies, tmp_path: Path) -> None:
    studies.add("s", VOTE)
    studies.close()
    ((_, kept),) = Studies(tmp_path / "studies.db").votes("s")
    assert replace(kept, at=0.0) == VOTE
    assert kept.at > 0


def test_several_people_vote_at_once(studies: Studies, tmp_path: Path) -> None:
    other = Studies(tmp_path / "studies.db")  # another process would have its own

    def vote(count: int) -> None:
        (studies, other)[count % 2].add("s", replace(VOTE, id=f"vote-{count:04}"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(vote, range(80)))
    assert studies.tally("s").votes == other.tally("s").votes == 80


def test_no_vote_that_was_taken_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    voters = [
        subprocess.Popen([sys.executable, "-c", VOTER, path, name], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for name in ("first", "other")
    ]
    taken = set()
    for voter in voters:
        assert voter.stdout is not None
        taken |= {voter.stdout.readline().strip() for _ in range(20)}
        os.kill(voter.pid, signal.SIGKILL)
        taken |= set(voter.stdout.read().split())
        voter.stdout.close()
        voter.wait()
    kept = {vote.id for _, vote in Studies(path).votes("s", most=2**31)}
    assert len(taken) >= 40
    assert taken <= kept
    assert len(kept - taken) <= 2, "at most the vote that each was answering"


@pytest.mark.parametrize("content", [b"not a data base, and longer than a header of SQLite's " * 4, None])
def test_a_file_that_is_none_of_ours_stops_the_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "studies.db"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(StartupError, match="MATSTEER_STUDIES"):
        Studies(path)


@pytest.fixture(scope="module")
def client(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("studies") / "studies.db"
    with TestClient(create_app(settings.model_copy(update={"studies": path}))) as client:
        yield client


def body(**changes: Any) -> dict[str, Any]:
    return {
        "id": VOTE.id,
        "arms": list(VOTE.arms),
        "asked": VOTE.asked,
        "texts": list(VOTE.texts),
        "winner": 1,
        "shown_first": 0,
    } | changes


def test_a_vote_is_posted_listed_and_exported(client: TestClient) -> None:
    assert client.get("/studies").json() == {"studies": []}
    first = client.post("/studies/tone of voice/votes", json=body())
    assert first.status_code == 200, first.text
    client.post("/studies/tone of voice/votes", json=body(id="vote-0002", winner=None))
    (study,) = client.get("/studies").json()["studies"]
    assert (study["study"], study["votes"], study["wins"], study["ties"]) == ("tone of voice", 2, [0, 1], 1)
    assert study["low"] < study["win_rate"] == 0.75 < study["high"]
    exported = client.get("/studies/tone of voice/votes.csv")
    assert exported.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(exported.text)))
    assert [row["winner"] for row in rows] == ["kind", "tie"]
    assert client.get("/studies/unknown/votes.csv").status_code == 404
    assert (rows[0]["text_1"], rows[0]["text_2"], rows[0]["shown_first"]) == (*VOTE.texts, "baseline")


def test_many_votes_are_exported_a_few_at_a_time(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"many-{count:04}" for count in range(2 * PAGE + 3)]
    for one in ids:
        assert client.post("/studies/many/votes", json=body(id=one)).status_code == 200
        client.post("/studies/beside/votes", json=body(id=f"beside-{one}"))
    read: list[int] = []
    real = Studies.votes

    def votes(self: Studies, *asked: Any) -> Any:
        found = real(self, *asked)
        read.append(len(found))
        return found

    monkeypatch.setattr(Studies, "votes", votes)
    exported = client.get("/studies/many/votes.csv")
    assert [row["id"] for row in csv.DictReader(io.StringIO(exported.text))] == ids
    assert read == [PAGE, PAGE, 3, 0]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"id": "short"}, "id"),
        ({"winner": 2}, "winner"),
        ({"texts": ["one"]}, "texts"),
        ({"arms": [VOTE.arms[0], VOTE.arms[0]]}, "arms.1.name"),
        ({"winer": 1}, "winer"),
    ],
)
def test_a_vote_that_cannot_be_read_is_refused_by_field(client: TestClient, changes: Any, param: str) -> None:
    refused = client.post("/studies/s/votes", json=body(**changes))
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error["param"] == param
    if param == "winer":
        assert "winner" in error["message"]


@pytest.mark.parametrize(
    "changes", [{"texts": ["\ud800", "b"]}, {"asked": {"\ud800": 1}}, {"asked": {"prompt": ["\udfff"]}}]
)
def test_half_a_surrogate_pair_is_refused(client: TestClient, changes: Any) -> None:
    text = json.dumps(body(**changes))
    refused = client.post("/studies/halves/votes", content=text, headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (422, "invalid_field")
    assert client.get("/studies/halves/votes.csv").status_code == 404


def test_a_file_that_another_process_writes_to_delays_votes_only(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    service: Any = client.app.state.service  # type: ignore[attr-defined]
    came, real = [], service.in_studies

    async def in_studies(work: Any) -> Any:
        came.append(work)
        return await real(work)

    monkeypatch.setattr(service, "in_studies", in_studies)
    other = sqlite3.connect(service.settings.studies, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(50) as voters:
        votes = [
            voters.submit(client.post, "/studies/busy/votes", json=body(id=f"busy-{count:04}")) for count in range(45)
        ]
        try:
            wait_until(lambda: len(came) == 45)
            assert client.get("/readyz").status_code == client.get("/").status_code == 200
            assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200
            assert not any(vote.done() for vote in votes)
        finally:
            other.execute("ROLLBACK")
        assert {vote.result().status_code for vote in votes} == {200}
    other.close()
    assert [one["votes"] for one in client.get("/studies").json()["studies"] if one["study"] == "busy"] == [45]


def test_without_the_setting_nothing_is_kept(world: Any) -> None:
    for method, path in (("GET", "/studies"), ("POST", "/studies/s/votes"), ("GET", "/studies/s/votes.csv")):
        answer = world.client.request(method, path, json=body() if method == "POST" else None)
        assert answer.status_code == 404
        assert "MATSTEER_STUDIES" in answer.json()["error"]["message"]
