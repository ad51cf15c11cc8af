"""The page of `layerskip report`: what it shows of measurements, what it refuses, that it loads and runs nothing."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from measured import EVIL

from layerskip.cli import main
from layerskip.cli.page import tokens
from layerskip.cli.page.markup import Html, table, tag
from layerskip.cli.page.svg import Axis, Chart
from layerskip.cli.ways import AUTOREGRESSIVE, SELF_SPECULATIVE

pytestmark = pytest.mark.usefixtures("one_thread")


def page_of(*paths, tmp_path):
    output = tmp_path / "report.html"
    assert main(["report", *map(str, paths), "--output", str(output), "--overwrite"]) == 0
    return output.read_text()


@pytest.fixture(scope="module")
def page(measured, tmp_path_factory):
    names = ("bench", "auto", "sweep", "exits")
    return page_of(*(measured / f"{name}.json" for name in names), tmp_path=tmp_path_factory.mktemp("page"))


class Elements(HTMLParser):
    """Every element's name and attributes, and the text of those of a class; it sees that all are closed."""

    def __init__(self, page, class_=""):
        super().__init__()
        self.found, self.texts, self._open, self._class = [], [], [], class_
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))
        if name not in ("meta", "input"):
            self._open.append((name, dict(attributes).get("class") or ""))
            if self._open[-1][1] == self._class:
                self.texts.append("")

    def handle_endtag(self, name):
        assert self._open.pop()[0] == name

    def handle_data(self, data):
        if any(class_ == self._class for _, class_ in self._open) and self._open[-1][0] != "del":
            self.texts[-1] += data


class TestRecording:
    """What bench and exits write for the page."""

    def test_the_pieces_are_the_tokens_and_the_rounds_give_them(self, measured):
        content = json.loads((measured / "bench.json").read_text())
        assert [one["text"] for one in content["prompts"]] == ["w5 w8 w13 w5 w8", EVIL]
        for name, runs in content["runs"].items():
            for run in runs:
                told = run["told"]
                assert "".join(told["pieces"]).split() == [f"w{token}" for token in run["sequence"]]
                assert len(told["pieces"]) == len(run["sequence"]) == 1 + sum(one["emitted"] for one in told["rounds"])
                assert sum(one["accepted"] for one in told["rounds"]) == run["accepted"]
                assert sum(len(one["drafts"]) for one in told["rounds"]) == run["drafted"]
                assert {one["exit_layer"] for one in told["rounds"]} == {4 if name == AUTOREGRESSIVE else 2}
        assert (
            content["runs"][AUTOREGRESSIVE][0]["told"]["pieces"]
            == content["runs"][SELF_SPECULATIVE][0]["told"]["pieces"]
        )

    def test_drafts_are_texts_and_those_accepted_are_the_pieces(self, measured):
        run = json.loads((measured / "auto.json").read_text())["runs"][SELF_SPECULATIVE][0]
        place = 1
        for one in run["told"]["rounds"]:
            assert one["drafts"][: one["accepted"]] == run["told"]["pieces"][place : place + one["accepted"]]
            place += one["emitted"]

    def test_the_machine_and_the_versions(self, measured):
        for name in ("bench", "exits"):
            machine = json.loads((measured / f"{name}.json").read_text())["machine"]
            assert {"processor", "instruction set", "threads", "torch", "layerskip-kernels", "time"} <= machine.keys()


class TestPage:
    def test_every_token_is_there_with_its_source(self, measured, page):
        files = [json.loads((measured / f"{name}.json").read_text()) for name in ("bench", "auto", "sweep")]
        told = [run["told"] for content in files for run in content["runs"][SELF_SPECULATIVE]]
        assert Elements(page, "text").texts == ["".join(one["pieces"]) for one in told]
        shown = [attributes for _, attributes in Elements(page).found if "data-tip" in attributes]
        expected = [one for run in told for one in tokens.origins(run)]
        assert [one["data-tip"] for one in shown] == [one.tip for one in expected]
        assert [one["class"] for one in shown] == [f"t {one.kind}" for one in expected]
        assert {one.kind for one in expected} >= {"exit", "fix", "own"}

    def test_all_parts_are_there(self, page):
        for part in (
            "Where every token came from", "Acceptance by position", "Tokens a round", "Roofline", "Speed", "Batches",
            "counting: speed by E and K", "draft threshold 0.5", "Agreement of every exit", "Machine and versions",
            "Can the confidence be trusted?", "identical tokens both ways", "E=2 of 4, K=4", "drafts from auto",
        ):  # fmt: skip
            assert part in page, part

    def test_what_a_prompt_holds_is_text(self, page):
        assert "<script" not in page
        assert "&lt;script&gt;alert(&#x27;w5&#x27;)&lt;/script&gt; &amp; &quot;quoted&quot;" in page
        assert "<b>prose" not in page
        assert {name for name, _ in Elements(page).found}.isdisjoint({"script", "link", "img", "iframe", "object"})

    def test_nothing_is_loaded(self, page):
        for name, attributes in Elements(page).found:
            assert not {"src", "srcset", "xlink:href", "action"} & attributes.keys()
            assert attributes.get("href", "#").startswith("#"), name
            assert not any(key.startswith("on") for key in attributes), name
        assert not re.search(r"url\(|@import|https?://", page)
        assert "Content-Security-Policy" in page

    def test_names_are_there_once(self, page):
        names = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
        assert len(names) == len(set(names))
        assert {f"part-{number}" for number in range(4)} <= set(names)
        targets = {attributes["for"] for name, attributes in Elements(page).found if name == "label"}
        assert targets <= set(names)

    def test_the_figures_are_those_of_the_file(self, measured, page):
        summary = json.loads((measured / "bench.json").read_text())["summary"]
        for name in (AUTOREGRESSIVE, SELF_SPECULATIVE):
            for figure in (f"{summary[name]['tokens_per_second']:.1f}", f"{summary[name]['megabytes_per_token']:.0f}"):
                assert f"<td>{figure}</td>" in page

    def test_torch_is_not_needed(self, measured, tmp_path):
        code = "import sys; from layerskip.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
        command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}", "report"]
        command += [str(measured / "bench.json"), "-o", str(tmp_path / "r.html")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == "False"


def changed(content, *path, to):
    """A copy in which something is another value; it is left out where that is `...`."""
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return content


SWEPT = {"task": "", "draft_threshold": 0, "auto": 1, "autoregressive": 1, "by_source": {}}
RUN = ("runs", SELF_SPECULATIVE, 1)
BROKEN = [
    (("runs",), [1], "runs must be an object, got '[1]'"),
    (("summary",), ..., "it has no 'summary'"),
    ((*RUN, "seconds"), "soon", "runs.self-speculative[1].seconds must be a number, got 'soon'"),
    ((*RUN, "seconds"), float("nan"), "must be a number, got 'nan'"),
    ((*RUN, "seconds"), 0, "tokens in 0 seconds"),
    ((*RUN, "prompt"), 2, "runs.self-speculative[1] is of prompt 2, and there are 2"),
    ((*RUN, "prompt"), True, "must be a whole number, got 'True'"),
    ((*RUN, "told", "rounds"), [], "has 24 new tokens, of which its rounds give 0, not all but 1"),
    ((*RUN, "told", "rounds", 0, "accepted"), 9, "runs.self-speculative[1].told.rounds[0] has 9 accepted of "),
    ((*RUN, "told", "pieces", 3), None, "told.pieces[3] must be a text, got 'None'"),
    ((*RUN, "drafts", "by_position", "exit", 0), [1], "by_position.exit[0] must be a list of 2, got '[1]'"),
    (("sweep",), [{**SWEPT, "fixed": {"E=1": 3}}], "sweep[0].fixed has 'E=1', expected such as 'E=4, K=8'"),
    (("throughput", 1, "tokens_per_second"), {"x": 1}, "throughput has batches of different ways"),
    (("prompts",), [], "runs.autoregressive[0] has texts, and there are no prompts"),
    (("sweep",), [{**SWEPT, "fixed": {}}], "sweep[0].fixed is empty"),
    (("summary", AUTOREGRESSIVE, "tokens_per_second"), 0, "must be a number above 0, got '0'"),
    (("identical",), "yes", "identical must be true or false, got 'yes'"),
]


class TestFiles:
    @pytest.mark.parametrize(("path", "value", "message"), BROKEN, ids=lambda value: str(value)[:40])
    def test_a_broken_file_is_refused_by_name(self, measured, tmp_path, capsys, path, value, message):
        content = json.loads((measured / "bench.json").read_text())
        (tmp_path / "broken.json").write_text(json.dumps(changed(content, *path, to=value)))
        output = tmp_path / "report.html"
        assert main(["report", str(measured / "exits.json"), str(tmp_path / "broken.json"), "-o", str(output)]) == 2
        printed = capsys.readouterr().err
        assert "broken.json looks like a file of layerskip bench, but " in printed
        assert message in printed
        assert not output.exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"{", "x.json is not JSON: "),
            (b"\xff", "x.json is not JSON: "),
            (b"[]", "x.json was written neither by layerskip bench nor by layerskip exits"),
            (b'{"seed": 3}', "x.json was written neither by layerskip bench nor by layerskip exits"),
            (b'{"exits": []}', "x.json looks like a file of layerskip exits, but it has no 'settings'"),
        ],
    )
    def test_another_file_is_refused_by_name(self, tmp_path, capsys, text, message):
        (tmp_path / "x.json").write_bytes(text)
        assert main(["report", str(tmp_path / "x.json"), "-o", str(tmp_path / "report.html")]) == 2
        assert message in " ".join(capsys.readouterr().err.split())

    def test_a_file_that_is_not_there(self, measured, tmp_path, capsys):
        assert main(["report", str(measured / "bnch.json"), "-o", str(tmp_path / "report.html")]) == 2
        assert "no measurements at " in (printed := capsys.readouterr().err)
        assert "did you mean bench.json " in printed

    def test_a_page_is_not_written_over(self, measured, tmp_path, capsys):
        (tmp_path / "report.html").write_text("mine")
        command = ["report", str(measured / "exits.json"), "-o", str(tmp_path / "report.html")]
        assert main(command) == 2
        assert "report.html exists; give another name, or --overwrite" in capsys.readouterr().err
        assert (tmp_path / "report.html").read_text() == "mine"
        assert main([*command, "--overwrite"]) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]

    def test_a_file_of_an_earlier_version(self, measured, tmp_path):
        """It had no texts, no machine, and drafts not by source."""
        content = json.loads((measured / "bench.json").read_text())
        del content["prompts"], content["machine"]
        for runs in content["runs"].values():
            for run in runs:
                del run["told"], run["drafts"]
        (tmp_path / "old.json").write_text(json.dumps(content))
        page = page_of(tmp_path / "old.json", tmp_path=tmp_path)
        assert "The file has no texts" in page
        assert "Roofline" in page

    def test_what_must_be_known_before_the_figures(self, measured, tmp_path):
        content = json.loads((measured / "bench.json").read_text())
        content |= {"identical": False, "complete": False, "skipped": [{"prompt": 1, "reason": "too <long>"}]}
        content["summary"] = dict.fromkeys(content["summary"])
        (tmp_path / "odd.json").write_text(json.dumps(content))
        page = page_of(tmp_path / "odd.json", tmp_path=tmp_path)
        for notice in (
            "no speedup counts",
            "was interrupted",
            "Prompt 2 was skipped: too &lt;long&gt;",
            "the tokens differ",
        ):
            assert notice in page
        assert "no token after the first" in page

    def test_nothing_was_measured_yet(self, measured, tmp_path):
        content = json.loads((measured / "bench.json").read_text())
        content |= {"runs": {name: [] for name in content["runs"]}, "sweep": [], "throughput": [], "by_task": {}}
        content["summary"] = dict.fromkeys(content["summary"])
        (tmp_path / "empty.json").write_text(json.dumps(content))
        assert "Tables" in page_of(tmp_path / "empty.json", tmp_path=tmp_path)


class TestOrigins:
    def told(self, *rounds):
        emitted = sum(one["emitted"] for one in rounds)
        return {"pieces": [f"p{number}" for number in range(emitted + 1)], "rounds": list(rounds)}

    def round(self, source, drafts, accepted, own=True, exit_layer=4):
        drafts = [f"d{number}" for number in range(drafts)]
        return {
            "source": source, "exit_layer": exit_layer, "drafts": drafts, "accepted": accepted,
            "emitted": accepted + own,
        }  # fmt: skip

    def test_every_kind(self):
        rounds = [
            self.round("exit", 3, 2), self.round("ngram", 2, 2, exit_layer=0), self.round("exit", 0, 0),
            self.round("Mine", 1, 1, own=False, exit_layer=0),
        ]  # fmt: skip
        found = list(tokens.origins(self.told(*rounds)))
        assert [one.kind for one in found] == ["own", "exit", "exit", "fix", "ngram", "ngram", "own", "own", "other"]
        assert [one.text for one in found] == [f"p{number}" for number in range(9)]
        assert found[0].tip == "the first token: the prompt gives it, before the first round"
        assert found[2].tip == "round 1: drafted after layer 4, token 2 of 3, accepted"
        assert found[3].tip == "round 1: the model's own, in the place of “d2”, drafted after layer 4, token 3 of 3"
        assert found[3].rejected == "d2"
        assert found[4].tip == "round 2: looked up by ngram, token 1 of 2, accepted"
        assert found[6].tip == "round 2: the model's own, after 2 right drafts"
        assert found[7].tip == "round 3: the model's own, nothing was drafted"
        assert found[8].tip == "round 4: looked up by Mine, token 1 of 1, accepted"

    def test_the_end_of_a_line_can_be_seen_and_the_text_stays(self):
        shown = tokens.visible("a\n\nb")
        assert re.sub("<[^>]*>", "", shown) == "a\n\nb"
        assert shown.count("<i") == 2
        assert "<i" in tokens.visible(""), "a token without text of its own"


class TestMarkup:
    def test_what_is_not_markup_is_text(self):
        assert tag("p", "<&>", Html("<b>"), class_='"') == '<p class="&quot;">&lt;&amp;&gt;<b></p>'
        assert tag("input", data_tip="x", hidden=None) == '<input data-tip="x">'
        assert "<td>&lt;i&gt;</td>" in table(("", "a"), [("r", "<i>")], "c")

    def test_ticks_are_round(self):
        assert Axis("", 0, 1.2).places() == pytest.approx([0, 0.5, 1])
        assert Axis("", 0, 730).places() == pytest.approx([0, 200, 400, 600])
        assert Axis("", 90, 1100, log=True).places() == pytest.approx([100, 200, 500, 1000])
        assert Axis("", 180, 420, log=True).places() == pytest.approx([200, 300, 400])

    def test_large_values_are_short(self):
        told = [Axis("", 0, 1).told(value) for value in (0, 0.5, 9000, 20000, 1e6, 5e10)]
        assert told == ["0", "0.5", "9000", "20k", "1M", "50G"]
        assert Axis("", 0, 1, form="{:.0%}").told(0.25) == "25%"

    def test_a_mark_is_where_its_value_is(self):
        chart = Chart("t", "r", Axis("x", 0, 10), Axis("y", 1, 100, log=True))
        chart.points([(5, 10)], 0, ["tip"])
        (at,) = re.findall(r"translate\(([\d.]+) ([\d.]+)\)", chart.figure().partition("mark")[0])[-1:]
        assert (float(at[0]), float(at[1])) == pytest.approx(((46 + 398) / 2, (32 + 244) / 2), abs=0.1)
