"""`layerskip report`: what the page shows, which files it refuses, and that it loads and runs nothing."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from measured import EVIL

from layerskip.cli import main, rendering, report
from layerskip.cli.rendering import AUTOREGRESSIVE, SELF_SPECULATIVE

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
                assert {one["exit_layer"] for one in told["rounds"]} == {0 if name == AUTOREGRESSIVE else 2}
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
        expected = [one for run in told for one in report.origins(run, "")]
        assert [one["data-tip"] for one in shown] == [one.tip for one in expected]
        assert [one["class"] for one in shown] == [f"t {one.kind}" for one in expected]
        assert {one.kind for one in expected} >= {"exit", "fix", "own"}

    def test_all_parts_are_there(self, page):
        for part in (
            "Where every token came from", "Acceptance by position", "Tokens per round", "Roofline", "Speed", "Batches",
            "counting: speed by E and K", "draft threshold 0.5", "Agreement of every exit", "Speedup at most",
            "Can the confidence be trusted?", "identical tokens both ways", "E=2 of 4, K=4", "drafts from auto",
            "Machine and versions", "round by round", "show rejected draft tokens", 'class="heat best"',
        ):  # fmt: skip
            assert part in page, part

    def test_what_a_prompt_holds_is_text(self, page):
        assert "<script" not in page
        assert "&lt;script&gt;alert(&#39;w5&#39;)&lt;/script&gt; &amp; &#34;quoted&#34;" in page
        assert EVIL in Elements(page, "prompt").texts
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
    (("sweep",), [{**SWEPT, "fixed": {"E=1": 3}}], "sweep[0].fixed has ['E=1'], expected names such as 'E=4, K=8'"),
    (("throughput", 1, "tokens_per_second"), {"x": 1}, "throughput has batches of different ways"),
    (("prompts",), [], "runs.autoregressive[0] is of prompt 0, and there are 0"),
    (("sweep",), [{**SWEPT, "fixed": {}}], "sweep[0].fixed has [], expected names such as 'E=4, K=8'"),
    (("runs", SELF_SPECULATIVE), {}, "runs.self-speculative must be a list, got '{}'"),
    (("throughput", 0, "tokens_per_second"), [], "throughput[0].tokens_per_second must be an object, got '[]'"),
    ((*RUN, "seconds"), 10**400, "seconds must be a number, got '1000"),
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
        found = list(report.origins(self.told(*rounds), ""))
        assert [one.kind for one in found] == ["own", "exit", "exit", "fix", "ngram", "ngram", "own", "own", "other"]
        assert [one.text for one in found] == [f"p{number}" for number in range(9)]
        assert found[0].tip == "the first token: from the prompt, before the first round"
        assert found[2].tip == "round 1: drafted after layer 4, token 2 of 3, accepted"
        assert found[3].tip == "round 1: the model's own, in place of “d2”, drafted after layer 4, token 3 of 3"
        assert found[3].rejected == "d2"
        assert found[4].tip == "round 2: drafted by ngram, token 1 of 2, accepted"
        assert found[6].tip == "round 2: the model's own, after accepting 2 of 2"
        assert found[7].tip == "round 3: the model's own, nothing was drafted"
        assert found[8].tip == "round 4: drafted by Mine, token 1 of 1, accepted"

    def test_the_end_of_a_line_can_be_seen_and_the_text_stays(self, measured, tmp_path):
        content = json.loads((measured / "bench.json").read_text())
        pieces = content["runs"][SELF_SPECULATIVE][0]["told"]["pieces"]
        pieces[1:3] = ["a\n\nb", ""]
        (tmp_path / "lines.json").write_text(json.dumps(content))
        page = page_of(tmp_path / "lines.json", tmp_path=tmp_path)
        assert Elements(page, "text").texts[0] == "".join(pieces)
        shown = re.findall(r'<span class="t \w+" data-tip[^>]*>(.*?)</span>', page, flags=re.S)
        assert shown[1] == 'a<i class="end"></i>\n<i class="end"></i>\nb'
        assert shown[2] == '<i class="part"></i>', "a token without text of its own"


HOSTILE = "<b onclick='x'>&\"$\\frac{--><script>"


class TestEscaping:
    def test_every_text_of_a_bench_file_is_text(self, measured, tmp_path):
        content = json.loads((measured / "auto.json").read_text())
        content["settings"] |= {"model": HOSTILE, HOSTILE: HOSTILE, "draft_source": HOSTILE}
        content["machine"] |= {HOSTILE: HOSTILE, "time": HOSTILE}
        content["skipped"] = [{"prompt": 1, "reason": HOSTILE}]
        content["prompts"][0] = {"task": HOSTILE, "text": HOSTILE * 20}
        content["by_task"] = {HOSTILE: content["summary"], "": content["summary"]}
        for part in (content["summary"], content["runs"]):
            part[HOSTILE] = part[AUTOREGRESSIVE]
        content["throughput"] = [{"size": 1, "tokens_per_second": {HOSTILE: 1.0}}]
        content["sweep"] = [{**SWEPT, "task": HOSTILE, "fixed": {"E=1, K=2": 3}, "by_source": {HOSTILE: 4}}]
        for run in content["runs"][SELF_SPECULATIVE]:
            run["drafts"]["by_position"] = {HOSTILE: [[2, 1]]}
            run["told"]["pieces"] = [HOSTILE for _ in run["told"]["pieces"]]
            for one in run["told"]["rounds"]:
                one |= {"source": HOSTILE, "drafts": [HOSTILE for _ in one["drafts"]]}
        self.check(content, tmp_path, at_least=60)

    def test_every_text_of_an_exits_file_is_text(self, measured, tmp_path):
        content = json.loads((measured / "exits.json").read_text())
        content["settings"] |= {"model": HOSTILE, "prompts": HOSTILE, HOSTILE: HOSTILE}
        content["exits"][-1]["label"] = HOSTILE
        content["reliability"] = {HOSTILE: [{"positions": 9, "confidence": 0.5, "agreement": 0.5}]}
        self.check(content, tmp_path, at_least=15)

    def check(self, content, tmp_path, at_least):
        (tmp_path / f"{HOSTILE.replace('/', '')}.json").write_text(json.dumps(content))
        page = page_of(next(tmp_path.glob("*.json")), tmp_path=tmp_path)
        names = {name for name, _ in Elements(page).found}
        assert names.isdisjoint({"script", "link", "img", "iframe", "object"})
        assert not any("onclick" in attributes for _, attributes in Elements(page).found)
        assert "<b onclick" not in page
        assert page.count("&lt;b onclick") >= at_least


class TestPlots:
    @pytest.fixture
    def axes(self):
        with rendering.panels() as panels:
            yield next(panels)

    def test_bars_and_lines_are_those_of_the_file(self, measured):
        content = report.read(measured / "auto.json")
        with rendering.panels() as panels:
            drawn = {title: axes for title, _, axes in rendering.of_bench(content, panels)}
        rates = [bar.get_width() for bar in drawn["Speed"].patches]
        assert rates == [one["tokens_per_second"] for one in content["summary"].values()]
        counts = {}
        for run in content["runs"][SELF_SPECULATIVE]:
            for source, pairs in run["drafts"]["by_position"].items():
                for place, pair in enumerate(pairs):
                    counts.setdefault((source, place), []).append(pair)
        expected = [sum(two for _, two in pairs) / sum(one for one, _ in pairs) for _, pairs in sorted(counts.items())]
        bars = drawn["Acceptance by position"].patches
        assert sorted(bar.get_height() for bar in bars) == pytest.approx(sorted(expected))
        emitted = [one["emitted"] for run in content["runs"][SELF_SPECULATIVE] for one in run["told"]["rounds"]]
        for bar in drawn["Tokens per round"].patches:
            size = round(bar.get_x() + bar.get_width() / 2)
            assert bar.get_height() == pytest.approx(emitted.count(size) / len(emitted))
        ways = [line.get_xydata() for line in drawn["Roofline"].lines]
        runs = content["runs"][AUTOREGRESSIVE]
        assert ways[0].tolist() == [[one["bytes_per_token"] / 1e6, one["tokens"] / one["seconds"]] for one in runs]
        size, rate = ways[-1].T
        assert size * rate / 1e3 == pytest.approx(content["read_gigabytes_per_second"])

    def test_a_sweep_and_exits_are_those_of_the_files(self, measured):
        content, exits = report.read(measured / "sweep.json"), report.read(measured / "exits.json")
        with rendering.panels() as panels:
            *_, (_, _, swept) = rendering.of_bench(content, panels)
            drawn = {title: axes for title, _, axes in rendering.of_exits(exits, panels)}
        lines = {line.get_label(): line.get_xydata().tolist() for line in swept.lines}
        task = content["sweep"][-1]
        assert lines["E=2"] == [[count, task["fixed"][f"E=2, K={count}"]] for count in (1, 2, 4, 8, 12)]
        assert f"auto: {task['auto']:.1f}" in lines
        agreement = drawn["Agreement of every exit"].lines[0].get_xydata().tolist()
        assert agreement == [[int(one["label"]), one["agreement"]] for one in exits["exits"] if one["label"].isdigit()]
        assert drawn["Speedup at most"].lines[-1].get_ydata()[0] == exits["exits"][-1]["bound"]

    def test_svg_has_tooltips_and_follows_the_color_scheme(self, page):
        found = re.findall(r"<svg.*?</svg>", page, flags=re.S)
        assert len(found) == page.count("<figure") == 18
        for svg in found:
            assert "<title>" in svg
            assert "var(--ink)" in svg
            assert not re.search(r"(fill|stroke): #", svg), "every color is a variable of the style sheet"
        for tip in ("self-speculative: ", "at 1</title>", "auto: "):
            assert f"<title>{tip}" in page or tip in page

    def test_ticks_are_round(self, axes):
        for low, high, scale, expected in (
            (0, 730, "linear", [0, 100, 200, 300, 400, 500, 600, 700]),
            (0, 1.3, "linear", [0, 0.2, 0.4, 0.6, 0.8, 1, 1.2]),
            (90, 1100, "log", [100, 200, 500, 1000]), (180, 420, "log", [200, 250, 300, 350, 400]),
        ):  # fmt: skip
            axes.set(yscale=scale, ylim=(low, high))
            rendering.labelled(axes, "", "", top=high)
            ticks = axes.get_yticks()
            assert [tick for tick in ticks if low <= tick <= high] == pytest.approx(expected)

    def test_values_are_short(self, axes):
        rendering.labelled(axes, "", "", percent="x")
        told = [axes.yaxis.get_major_formatter()(value) for value in (0, 0.5, 9000, 20000, 150000)]
        assert told == ["0", "0.5", "9,000", "20,000", "150,000"]
        assert axes.xaxis.get_major_formatter()(0.25) == "25%"

    def test_a_mark_is_where_its_value_is(self, axes):
        axes.semilogy([0, 5, 10], [1, 10, 100], label="line")
        svg = ElementTree.fromstring(rendering.svg(rendering.labelled(axes, "x", "y"), "p-"))
        marks = [mark for mark in svg.iter("use") if mark.get("href", "").startswith("#p-m")]
        width, height = map(float, svg.get("viewBox").split()[2:])
        places = axes.transData.transform(axes.lines[0].get_xydata()) / axes.figure.bbox.size * (width, height)
        found = {(float(mark.get("x")), float(mark.get("y"))) for mark in marks}
        for x, y in places:
            assert min(np.hypot(x - left, height - y - top) for left, top in found) < 0.1
