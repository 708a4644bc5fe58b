"""WritingBench: the aggregates against plain loops, the files, and judging against a real server."""

import asyncio
import json
import random
import re

import numpy as np
import pytest

from lwzlib.base.rows import DataError
from lwzlib.endpoints import llm
from lwzlib.evaluate import common, intervals
from lwzlib.evaluate import writingbench as wb
from lwzlib.evaluate.writingbench import judge_responses, score_table

BANDS = {"1-2": "bad", "3-4": "weak", "5-6": "fair", "7-8": "good", "9-10": "superb"}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def item(index, query="Write an ode to {response}.", names="ABCDE", **fields):
    return {"index": index, "domain1": "Education", "domain2": "Lesson", "query": query, "checklist": [
        {"name": name, "criteria_description": f"about {name}"} | BANDS for name in names]} | fields


def random_benchmark(draw, queries, languages):
    return [item(index, f"{draw.choice(languages)} {index}", domain1=f"D{draw.randrange(3)}", domain2=f"S{draw.randrange(5)}")
            for index in draw.sample(range(1000), queries)]


def random_scores(draw, bench):
    """Of some queries; of a query, some criteria; of a criterion, up to three judgments."""
    rows = []
    for row in draw.sample(bench, draw.randint(1, len(bench))):
        names = draw.sample("ABCDE", draw.choice([1, 4, 5, 5, 5]))
        rows.append({"index": row["index"], "scores": {
            name: [{"score": draw.randint(1, 10), "reason": ""} for _ in range(draw.choice([1, 1, 2, 3]))] for name in names}})
    return rows


def random_requirements(draw, bench, folder):
    made = {}
    for name in ("style", "format", "length"):
        made[name] = {row["index"]: draw.sample("ABCDE", draw.randint(1, 3)) for row in bench if draw.random() < 0.6}
        made[name] = made[name] or {bench[0]["index"]: ["A"]}
        lines(folder / name / f"{name}_subset.jsonl", ({"index": i} for i in made[name]))
        lines(folder / name / f"{name}_subset_C.jsonl", (
            {"index": i, "checklist": [{"name": n} for n in names]} for i, names in made[name].items()))
    return made


def by_the_protocol(bench, rows, required):
    """{(scope, name): score} by plain loops, of what has a score: written from the protocol's text."""
    by_index = {row["index"]: row["scores"] for row in rows}
    everything, query_means = [], {}
    for index, scores in by_index.items():
        mine = []
        for judgments in scores.values():
            for judgment in judgments:
                mine.append(judgment["score"])
        everything.extend(mine)
        query_means[index] = sum(mine) / len(mine)
    found = {("overall", "all"): sum(everything) / len(everything)} if everything else {}
    for scope in ("domain1", "domain2"):
        members = {}
        for row in bench:
            if row["index"] in query_means:
                members.setdefault(row[scope], []).append(query_means[row["index"]])
        for name, values in members.items():
            found[scope, name] = sum(values) / len(values)
    for name, criteria in required.items():
        subset, own = [], []
        for index, wanted in criteria.items():
            if index in query_means:
                subset.append(query_means[index])
                for criterion in wanted:
                    if criterion in by_index[index]:
                        values = [judgment["score"] for judgment in by_index[index][criterion]]
                        own.append(sum(values) / len(values))
        if subset:
            found[f"{name} R", name] = sum(subset) / len(subset)
        if own:
            found[f"{name} C", name] = sum(own) / len(own)
    return found


@pytest.mark.parametrize("languages", [["Write", "写"], ["Write"], ["写"]])
def only(language, raw, rows, required):
    """What a table in one language is about."""
    kept = {row["index"] for row in raw if language == "all" or (language == "zh") == ("写" in row["query"])}
    return ([row for row in raw if row["index"] in kept], [row for row in rows if row["index"] in kept],
            {name: {i: criteria for i, criteria in own.items() if i in kept} for name, own in required.items()})


@pytest.mark.parametrize("languages", [["Write", "写"], ["Write"], ["写"]])
def test_aggregates_are_those_of_the_protocol(tmp_path, languages):
    draw, compared = random.Random(repr(languages)), 0
    for _ in range(70):
        raw = random_benchmark(draw, draw.randint(1, 8), languages)
        bench = wb.read_benchmark(lines(tmp_path / "bench.jsonl", raw))
        required = random_requirements(draw, raw, tmp_path / "requirement")
        assert wb.read_requirements(tmp_path / "requirement", bench) == required
        for _ in range(10):
            rows = random_scores(draw, raw)
            frame = score_table(bench, wb.read_scores(lines(tmp_path / "scores.jsonl", rows), bench), required, resamples=0)
            found = {(row["language"], row["scope"], row["name"]): row["score"] for row in frame.to_dict("records")}
            present = {"all"} | {"zh" if "写" in row["query"] else "en" for row in raw}
            expected = {(language, *part): score for language in present
                        for part, score in by_the_protocol(*only(language, raw, rows, required)).items()}
            assert set(frame.language) == present and expected.keys() == {part for part in found if found[part] == found[part]}
            assert all(abs(found[part] - score) < 1e-9 for part, score in expected.items())
            compared += len(expected)
    assert compared > 10_000


def test_counts_leaderboard_and_intervals(tmp_path):
    draw = random.Random(5)
    raw = random_benchmark(draw, 200, ["Write"])
    bench = wb.read_benchmark(lines(tmp_path / "bench.jsonl", raw))
    judgments = {i: {name: [wb.Judgment(score=draw.randint(4, 9), reason="")] for name in "ABCDE"} for i in bench}
    frame = score_table(bench, judgments)
    assert (frame.leaderboard == 10 * frame.score).all()
    assert (frame.low < frame.score).all() and (frame.score < frame.high).all()
    assert frame.equals(score_table(bench, judgments))
    means = [np.mean([j[0].score for j in criteria.values()]) for criteria in judgments.values()]
    assert frame.high[0] - frame.low[0] == pytest.approx(2 * 1.96 * np.std(means) / 200**0.5, rel=0.1)

    first, *others = bench
    del judgments[first]["A"]
    for index in others:
        judgments.pop(index)
    frame = score_table(bench, judgments)
    overall = frame.iloc[0]
    assert (overall["of"], overall.queries, overall.missing) == (200, 1, 1 + 199 * 5)
    assert np.isnan(overall.low) and frame.score.isna().sum() == (frame.queries == 0).sum() > 0
    assert score_table(bench, {}).score.isna().all()


def test_interval_covers_at_the_stated_rate():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(300):
        counts = rng.integers(3, 6, size=60)
        _, low, high = intervals.bootstrap_ratio([rng.normal(7 * n, 2) for n in counts], counts, 1000)
        covered += low < 7 < high
    assert 0.90 <= covered / 300 <= 0.98


def test_score_file_round_trip_in_the_order_of_the_benchmark(tmp_path):
    bench = wb.read_benchmark(lines(tmp_path / "bench.jsonl", [item(7, "写诗"), item(2), item(5)]))
    judgments = {5: {"E": [wb.Judgment(score=3, reason="“三”"), wb.Judgment(score=4, reason="")],
                     "A": [wb.Judgment(score=10, reason="x")]},
                 2: {}, 7: {"B": [wb.Judgment(score=1, reason="y")]}}
    wb.write_scores(tmp_path / "scores.jsonl", bench, judgments)
    assert [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()] == [
        {"index": 7, "scores": {"B": [{"score": 1, "reason": "y"}]}},
        {"index": 5, "scores": {"A": [{"score": 10, "reason": "x"}],
                                "E": [{"score": 3, "reason": "“三”"}, {"score": 4, "reason": ""}]}}]
    del judgments[2]
    assert wb.read_scores(tmp_path / "scores.jsonl", bench) == judgments


@pytest.mark.parametrize(("row", "wrong"), [
    ({"index": 9, "scores": {"A": [{"score": 3, "reason": ""}]}}, "line 2: index 9 is not in the benchmark"),
    ({"index": 1, "scores": {"A": [{"score": 3, "reason": ""}]}}, "line 2: index 1 was already used at .* line 1; each comes"),
    ({"index": 2, "scores": {"Z": [{"score": 3, "reason": ""}]}}, "line 2: query 2 has no criterion 'Z'; it has 'A', 'B'"),
    ({"index": 2, "scores": {"A": [{"score": 11, "reason": ""}]}}, r"line 2: scores\.A\.0\.score = 11"),
    ({"index": 2, "scores": {"A": [{"score": 0, "reason": ""}]}}, r"line 2: scores\.A\.0\.score = 0"),
    ({"index": 2, "scores": {"A": [{"score": 7.5, "reason": ""}]}}, r"line 2: scores\.A\.0\.score = 7\.5"),
    ({"index": 2, "scores": {"A": [{"score": "7", "reason": ""}]}}, r"line 2: scores\.A\.0\.score = '7'"),
    ({"index": 2, "scores": {"A": [{"score": True, "reason": ""}]}}, r"line 2: scores\.A\.0\.score = True"),
    ({"index": 2, "scores": {"A": [{"reason": ""}]}}, r"line 2: scores\.A\.0\.score: Field required"),
    ({"index": 2, "scores": {"A": []}}, r"line 2: scores\.A"), ({"index": 2, "scores": {}}, "line 2: scores"),
    ({"index": "2", "scores": {}}, "line 2: index = '2'"), ({"index": 2}, "line 2: scores: Field required"),
    (["index"], "line 2: ")])
def test_scores_that_cannot_be_used_are_named(tmp_path, row, wrong):
    bench = wb.read_benchmark(lines(tmp_path / "bench.jsonl", [item(1), item(2)]))
    path = lines(tmp_path / "scores.jsonl", [{"index": 1, "scores": {"A": [{"score": 3, "reason": ""}]}}, row])
    with pytest.raises(DataError, match=rf"scores\.jsonl, {wrong}"):
        wb.read_scores(path, bench)


def test_other_files_that_cannot_be_used_are_named(tmp_path):
    def refused(wrong, read, rows, name="file.jsonl"):
        with pytest.raises(DataError, match=wrong):
            read(lines(tmp_path / name, rows))

    without = item(2)
    del without["checklist"][1]["7-8"]
    refused(r"line 2: checklist\.1\.7-8: Field required", wb.read_benchmark, [item(1), without])
    refused("line 2: query: Field required", wb.read_benchmark, [item(1), {"index": 2, "checklist": []}])
    refused("line 1: checklist = .*at least 1 item", wb.read_benchmark, [item(1, names="")])
    refused("line 1: checklist = .*same name", wb.read_benchmark, [item(1, names="AA")])
    refused("line 2: index 1 was already used", wb.read_benchmark, [item(1), item(1)])
    refused("has no row", wb.read_benchmark, [])
    refused("line 1: response = None", lambda path: common.read_responses(path, {1}), [{"index": 1, "response": None}])
    refused("line 1: index 3 is not in the benchmark", lambda path: common.read_responses(path, {1}),
            [{"index": 3, "response": ""}])
    with pytest.raises(DataError, match="no file"):
        wb.read_benchmark(tmp_path / "none.jsonl")

    bench = wb.read_benchmark(lines(tmp_path / "bench.jsonl", [item(1), item(2)]))
    random_requirements(random.Random(0), [item(1), item(2)], tmp_path)
    folder = tmp_path / "format"
    lines(folder / "format_subset.jsonl", [{"index": 1}, {"index": 800}])
    lines(folder / "format_subset_C.jsonl", [{"index": 1, "checklist": [{"name": "B"}]}, {"index": 800, "checklist": []}])
    assert wb.read_requirements(tmp_path, bench)["format"] == {1: ["B"]}, "the benchmark may be a part of the public one"
    lines(folder / "format_subset_C.jsonl", [{"index": 1, "checklist": [{"name": "Q"}]}])
    with pytest.raises(DataError, match=r"_C\.jsonl, line 1: query 1 has no criterion 'Q'"):
        wb.read_requirements(tmp_path, bench)
    lines(folder / "format_subset_C.jsonl", [{"index": 2, "checklist": []}])
    with pytest.raises(DataError, match=r"format_subset\.jsonl, line 1: index 1 is not in format_subset_C"):
        wb.read_requirements(tmp_path, bench)


@pytest.mark.parametrize(("response", "judged"), [
    ("A text.", "A text."), ("", ""), ("<think>Plan.</think>\n\nText </think> here.", "Text </think> here."),
    ("Plan.</think>Text", "Text"), ("<think>A plan that never", ""),
    ("<think>Plan.</think><answer>\nText.\n</answer>", "Text."), ("<answer>Cut", "Cut"), ("<think>a</think>", "")])
def test_what_is_judged(response, judged):
    assert common.judged_text(response) == judged


def test_language_is_that_of_the_file_or_of_the_query(tmp_path):
    raw = [item(1, "Translate 春天."), item(2, "Translate 春天.", lang="en"), item(3, "Rain", lang="klingon")]
    assert [i.language for i in wb.read_benchmark(lines(tmp_path / "bench.jsonl", raw)).values()] == ["zh", "en", "en"]


def test_prompts_hold_the_criterion_and_a_brace_in_a_text_stays():
    query = wb.Item.model_validate(item(1))
    for template in wb.JUDGE.values():
        text = common.filled(template, query=query.query, response="{criterion} {query}", criterion=str(query.checklist[0]))
        assert text.count("ode to {response}.") == 1 and text.count("{criterion} {query}") == 1
        assert "A: about A\n1-2: bad\n3-4: weak\n5-6: fair\n7-8: good\n9-10: superb\n" in text
        assert '{"score": ' in text and '"reason": ' in text
    assert len({template.partition("<request>")[0] for template in wb.JUDGE.values()}) == 2


RAW = [item(3, "写一首诗", names=["意境", "missing"]), item(1, names=["tone", "shape"], domain1="Politics & Law"), item(2)]
SCRIPT = {"missing: ": [{"text": '{"score": 11, "reason": "too high"}'}],
          "tone: ": [{"text": '{"score": "8"}'}, {"text": '```json\n{"score": 8, "reason": "warm"}\n```'}],
          "shape: ": [{"text": '{"score": 5, "reason": "loose"}'}],
          "意境: ": [{"text": '{"score": 9, "reason": "远"}'}]}


def judge(server, tmp_path, **options):
    bench = wb.read_benchmark(lines(tmp_path / "bench.jsonl", RAW))
    answers = common.read_responses(lines(tmp_path / "answers.jsonl", [
        {"index": 1, "response": "<think>Secret.</think>\n\nO {criterion}!"}, {"index": 3, "response": "春"}]), bench)
    samples = options.pop("samples", 1)
    settings = llm.configure(base_url=server.url, model="m", api_key_env="LWZ_NO_KEY", patience_s=5.0, concurrency=1, **options)
    return bench, asyncio.run(judge_responses(settings, bench, answers, tmp_path / "scores" / "m.jsonl", samples))


def test_judging_from_responses_to_the_table(llm_server, tmp_path):
    llm_server.script(SCRIPT)
    bench, (judgments, missing) = judge(llm_server, tmp_path, sampling={"max_tokens": 99})
    out = tmp_path / "scores" / "m.jsonl"
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"index": 3, "scores": {"意境": [{"score": 9, "reason": "远"}]}},
        {"index": 1, "scores": {"tone": [{"score": 8, "reason": "warm"}], "shape": [{"score": 5, "reason": "loose"}]}}]
    assert wb.read_scores(out, bench) == judgments
    assert [row["asked"] for row in missing] == [[3, "missing", 0]] and "score = 11" in missing[0]["why"]
    assert [json.loads(line) for line in out.with_suffix(".missing.jsonl").read_text().splitlines()] == missing
    overall = score_table(bench, judgments).iloc[0]
    assert (overall.score, overall.queries, overall.missing, overall["of"]) == (22 / 3, 2, 1 + 5, 3)

    asked = llm_server.requests
    assert len(asked) == 1 + 3 + 2 + 1  # missing is asked thrice, tone twice
    assert {r["body"]["temperature"] for r in asked} == {1.0} and {r["body"]["top_p"] for r in asked} == {0.95}
    assert {r["body"]["max_tokens"] for r in asked} == {99}, "what the user sets outranks the protocol"
    assert not any("Secret" in r["asked"] for r in asked) and sum("O {criterion}!" in r["asked"] for r in asked) == 3
    assert [r["asked"].startswith("请") for r in asked] == [True] * 4 + [False] * 3

    before = out.read_bytes()
    llm_server.script({})
    assert judge(llm_server, tmp_path, sampling={"max_tokens": 99})[1] == (judgments, missing)
    assert not llm_server.requests and out.read_bytes() == before


def test_judging_goes_on_after_its_budget_and_asks_for_several_judgments(llm_server, tmp_path):
    llm_server.script(SCRIPT | {"tone: ": [{"text": json.dumps({"score": n, "reason": ""})} for n in (2, 4, 6)]})
    for _ in range(3):
        with pytest.raises(llm.LLMError, match="budget of 4 requests"):
            judge(llm_server, tmp_path, samples=3, budget_requests=4)
        assert not (tmp_path / "scores" / "m.jsonl").exists()
    _, (judgments, missing) = judge(llm_server, tmp_path, samples=3, budget_requests=10)
    assert [judgment.score for judgment in judgments[1]["tone"]] == [2, 4, 6] and len(judgments[3]["意境"]) == 3
    assert [row["asked"] for row in missing] == [[3, "missing", n] for n in range(3)]
    assert len(llm_server.requests) == 3 + 3 * 3 + 3 + 3, "none was paid for twice"


def test_a_score_file_of_another_making_is_not_overwritten(llm_server, tmp_path):
    path = lines(tmp_path / "scores" / "m.jsonl", [{"mine": 1}])
    with pytest.raises(DataError, match="was not made by this judge"):
        judge(llm_server, tmp_path)
    assert path.read_text() == '{"mine": 1}\n'


def test_what_the_authors_scripts_write_is_read(tmp_path):
    """A run that was resumed, whole floats, rows of the first release; what was done is said."""
    first = {key: value for key, value in item(1).items() if key != "checklist"} | {"criteria": item(1)["checklist"]}
    bench = wb.read_benchmark(lines(tmp_path / "bench.jsonl", [first, item(2, lang="en")]))
    path = lines(tmp_path / "scores.jsonl", [
        {"index": 1, "scores": {"A": [{"score": 3, "reason": "first"}]}},
        {"index": 1, "scores": {"A": [{"score": 8.0, "reason": "later"}], "B": [{"score": 7, "reason": ""}]}}])
    notes = []
    scores = wb.read_scores(path, bench, notes)
    assert [judgment.score for judgment in scores[1]["A"]] == [8] and isinstance(scores[1]["A"][0].score, int)
    assert re.fullmatch(r".*scores.jsonl, line 2: index 1 was already used at .*line 1; the later row holds", notes[0])
    total = sum(len(row.checklist) for row in bench.values())
    assert wb.notes_on(bench, scores) == [
        f"{total - 2} of {total} criteria have no judgment: they are left out of every sum and mean",
        "no language is stated for 1 of 2 queries: that of most of the text counts"]
