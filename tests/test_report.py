"""The report on a made-up storage: right numbers, valid and self-contained page, missing pieces."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bar_ray import config, pipeline, report, storage
from bar_ray.graph import Step, topological
from bar_ray.pipeline import Pipeline
from bar_ray.recipe import Recipe
from bar_ray.report import history, scores, svg

RECIPE = """
storage: {storage}
datasets:
  text: tiny:text.parquet
  general_sft: tiny:general.jsonl
  math_sft: tiny:math.jsonl
  math_rlvr: tiny:rlvr.jsonl
  safety_sft: tiny:safety.jsonl
tiny:
  pretrain: {{data: {{text: 1}}, steps: 4}}
  post_train: {{data: {{general_sft: 1}}, steps: 4}}
stages: {{sft: {{data: {{general_sft: 0.5}}}}}}
experts:
  math: {{midtrain: {{data: {{text: 1}}}}, sft: {{data: {{math_sft: 1}}}}, {rlvr}}}
  safety: {{sft: {{data: {{safety_sft: 1}}}}}}
router: {{steps: 4}}
evaluate:
  categories: {{general: tiny:g.jsonl, math: tiny:m.jsonl, safety: tiny:s.jsonl}}
"""
RLVR = "rlvr: {data: {math_rlvr: 1}, batch_size: 8, steps: 6}"
SCORES = {
    "base": (90.0, 10.0, 20.0),
    "math midtrain": (88.0, 40.0, 20.0),
    "math sft": (89.0, 60.0, 25.0),
    "math rlvr": (87.0, 80.0, 22.0),
    "safety sft": (90.0, 9.0, 100.0),
    "merged": (30.0, 5.0, 1.0),
    "bar": (91.0, 72.0, 95.0),
}
RUN, EARLIER = "20260102-000000-bbbb", "20260101-000000-aaaa"
VOID = ("meta", "link", "br")


def made_up(folder: Path, rlvr: str = RLVR) -> tuple[Pipeline, Recipe]:
    """A pipeline on a storage where every evaluation is finished."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(storage=folder / "store", rlvr=rlvr))
    recipe = config.load(str(path))
    graph = pipeline.build(recipe)
    for name, step in graph.scores.items():
        rows = dict(zip(("general", "math", "safety"), SCORES[name], strict=True))
        rows["overall"] = sum(rows.values()) / 3
        commit(folder, step, {"scores.json": {"scores": rows, "outcomes": {}, "items": {}}})
    return graph, recipe


def commit(folder: Path, step: Step, files: dict, info: dict | None = None) -> None:
    work = folder / "work"
    work.mkdir()
    for name, content in files.items():
        (work / name).write_text(json.dumps(content))
    storage.commit(str(work), step.artifact.uri, info or {})


def commit_router(folder: Path, graph: Pipeline) -> None:
    commit(folder, graph.merged, {}, {"slots": ["anchor", "math", "safety"]})
    load = {
        "general_sft": [[0.8, 0.1, 0.1], [0.6, 0.2, 0.2]],
        "math_sft": [[0.2, 0.7, 0.1], [0.1, 0.9, 0.0]],
    }
    commit(folder, graph.bar, {"router_load.json": load})


def write_run(recipe: Recipe, run_id: str, events: list, metrics: list, plan: list) -> None:
    place = storage.join(recipe.storage, "runs", run_id)
    started = min(e["time"] for e in events)
    storage.write_json(f"{place}/run.json", {"run_id": run_id, "started": started, "plan": plan})
    for name, rows in (("events.jsonl", events), ("metrics.jsonl", metrics)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        storage.write_bytes(f"{place}/{name}", text.encode() + b'{"cut off')


def record(made: Step, time: float, **fields: object) -> dict:
    who = {"verb": made.verb, "name": made.name, "fingerprint": made.fingerprint}
    return {"time": time, **who, **fields}


def write_history(graph: Pipeline, recipe: Recipe) -> None:
    """An earlier run trained everything; the run of the report reran the router, with a fault."""
    steps, metrics, events, now = topological(graph.targets), [], [], 1000.0
    for step in steps:
        events.append(record(step, now, event="waiting"))
        events.append(record(step, now + 1, event="started", resources={"CPU": 2.0, "GPU": 0}))
        events.append(record(step, now + 9, event="finished", seconds=9.0))
        if step.verb in ("train", "midtrain", "sft", "rlvr"):
            rows = [{"step": i, "steps": 6, "eta_s": 1.0, "loss": 2 - i / 6} for i in range(1, 7)]
            for row in rows:
                extra = {"reward": 0.1 * row["step"], "outcome/right": 3, "sync_s": 0.5}
                row |= extra if step.verb == "rlvr" else {"lr": 1e-3, "grad_norm": math.nan}
            metrics += [record(step, now, **row) for row in rows]
        if step.verb == "rlvr":
            events.append(record(step, now + 2, event="engine_ready", engine=0, version=0))
            scored = [(3, 0.5), (6, 0.25), (3, 0.75)]  # one again, after a kill
            events += [record(step, now + 3, event="held_out", at=a, held_out=h) for a, h in scored]
        now += 10
    write_run(recipe, EARLIER, events, metrics, [])
    later = [
        record(graph.merged, 5000.0, event="started", resources={}),
        record(graph.merged, 5010.0, event="finished", seconds=10.0),
        record(graph.bar, 5010.0, event="waiting"),
        record(graph.bar, 5020.0, event="started", resources={"CPU": 3.0}),
        record(graph.bar, 5030.0, event="resumed", at=2),
        {"time": 5031.0, "event": "worker_lost", "node": "<b>n1</b>"},
        record(graph.bar, 5032.0, event="weights_differ", version=1, gap=0.1, tensors=["t"]),
        record(graph.bar, 5033.0, event="weights_repaired", version=1, gap=0.0),
        record(graph.bar, 5080.0, event="finished", seconds=70.0),
    ]
    of = {"steps": 4, "seconds": 6.0}  # one step again, after the fault
    rows = [record(graph.bar, 5021.0 + i, step=i, loss=1.0 / i, **of) for i in (1, 2, 2, 3, 4)]
    ran = (graph.merged, graph.bar)
    plan = [record(s, 0, reused=s not in ran, reason="why") for s in steps]
    write_run(recipe, RUN, later, rows, plan)


class Checker(HTMLParser):
    """Every element is closed in order, ids are unique, nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.ids, self.tags = [], [], []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        loads = [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        assert all(value == "data:," for value in loads), loads
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked_page(recipe: Recipe) -> str:
    html = storage.read_bytes(storage.join(recipe.storage, "report", "report.html")).decode()
    checker = Checker()
    checker.feed(html)
    assert not checker.open and len(set(checker.ids)) == len(checker.ids)
    assert not {"script", "img", "iframe", "object"} & set(checker.tags)
    assert not re.search(r"url\(|@import|\bnan\b|Undefined", html)
    return html


def text_of(html: str) -> str:
    plain = html.translate(str.maketrans("\u2013\u2019", "-'"))
    return " ".join(re.sub("<[^>]*>", " ", plain).split())


def test_scores_and_page_of_a_whole_run(tmp_path: Path) -> None:
    graph, recipe = made_up(tmp_path)
    commit_router(tmp_path, graph)
    write_history(graph, recipe)
    found = report.write(graph, recipe, RUN)
    assert found == storage.read_json(storage.join(recipe.storage, "report", "scores.json"))
    assert list(found["models"]) == list(SCORES)
    assert found["models"]["bar"] == {
        **{"general": 91.0, "math": 72.0, "safety": 95.0, "overall": 86.0}
    }
    html = checked_page(recipe)
    text = text_of(html)
    assert "86.0 % overall, against 40.0 % of the base" in text
    assert "it keeps 92 % of the experts' own scores" in text  # (90 + 95) / 2
    assert "retention bar / own expert - 90 % 95 %" in text
    assert "gain, points bar - base +1.0 +62.0 +75.0 +46.0" in text
    assert "1m20s in all, 0.05 CPU-hours leased" in text  # 3 CPUs for the 60 s after the lease
    assert "interruptions survived 3" in text
    assert "&lt;b&gt;n1&lt;/b&gt;" in html and "<b>n1" not in html
    steps = topological(graph.targets)
    assert f"2 ran, {len(steps) - 2} reused, of {len(steps)}." in text
    assert all(step.fingerprint in text for step in steps)
    for words in (
        "mean reward, 0 to 1",
        "held-out score, 0 to 1",
        "outcome/right",
        "time of a weight push, s",
    ):
        assert words in html
    assert 'title="0.800">0.80' in html and "heat own" in html


def test_curves_come_from_the_runs_that_trained(tmp_path: Path) -> None:
    graph, recipe = made_up(tmp_path)
    write_history(graph, recipe)
    found = history.read(recipe.storage, topological(graph.targets), RUN)
    math_rlvr = graph.stages["math"]["rlvr"]
    assert [row["step"] for row in found.metrics[history.identity(math_rlvr)]] == [1, 2, 3, 4, 5, 6]
    routed = found.metrics[history.identity(graph.bar)]
    assert [row["time"] for row in routed] == [5022.0, 5023.0, 5024.0, 5025.0]
    assert found.made_by()[history.identity(math_rlvr)]["run"] == EARLIER
    assert found.goodput() == 24.0 / (8.0 + 60.0)  # both runs held resources for the router
    incidents = ["resumed", "worker_lost", "weights_differ", "weights_repaired"]
    assert [e["event"] for e in found.incidents()] == incidents
    assert found.held_out(math_rlvr) == [(3.0, 0.75), (6.0, 0.25)]
    lanes = history.spans(found.of_run(RUN))
    assert [(s.ready, s.started, s.ended, s.outcome) for s in lanes] == [
        (5000.0, 5000.0, 5010.0, "finished"),
        (5010.0, 5020.0, 5080.0, "finished"),
    ]


def test_a_run_that_only_reused_still_has_curves(tmp_path: Path) -> None:
    graph, recipe = made_up(tmp_path)
    write_history(graph, recipe)
    plan = [record(s, 0, reused=True, reason="finished") for s in topological(graph.targets)]
    run = storage.join(recipe.storage, "runs", "20260103-000000-cccc", "run.json")
    storage.write_json(run, {"started": 9000.0, "plan": plan})
    report.write(graph, recipe, "20260103-000000-cccc")
    text = text_of(checked_page(recipe))
    assert "everything was reused" in text and "policy loss" in text
    assert f"0 ran, {len(plan)} reused" in text and EARLIER in text


def test_missing_pieces_do_not_break_the_page(tmp_path: Path) -> None:
    graph, recipe = made_up(tmp_path, rlvr="rlvr: null")
    storage.delete(graph.scores["merged"].artifact.uri)
    found = report.write(graph, recipe, "20260104-000000-dddd")
    assert "merged" not in found["models"] and "math rlvr" not in found["models"]
    text = text_of(checked_page(recipe))
    assert "no measured router load" in text and "No training metrics were found" in text
    for step in graph.scores.values():
        storage.delete(step.artifact.uri)
    assert report.write(graph, recipe, "20260104-000000-dddd") == {"models": {}, "intervals": {}}
    assert "Nothing has been scored yet" in text_of(checked_page(recipe))
    assert report.table({"models": {}}) and report.markdown({"models": {}})


def test_a_failed_step_is_shown_and_not_counted_as_survived(tmp_path: Path) -> None:
    graph, recipe = made_up(tmp_path)
    events = [
        record(graph.bar, 100.0, event="started", resources={}),
        record(graph.bar, 130.0, event="failed", seconds=30.0, reason="no space left"),
    ]
    write_run(recipe, RUN, events, [], [record(graph.bar, 0, reused=False, reason="never ran")])
    report.write(graph, recipe, RUN)
    text = text_of(checked_page(recipe))
    assert "no space left" in text and "interruptions survived 0" in text
    assert f"route bar {graph.bar.fingerprint} failed never ran" in text


def test_a_damaged_score_file_is_refused(tmp_path: Path) -> None:
    graph, recipe = made_up(tmp_path)
    place = storage.join(graph.scores["bar"].artifact.uri, "scores.json")
    storage.write_bytes(place, storage.read_bytes(place).replace(b"72.0", b"99.0"))
    with pytest.raises(storage.StorageError, match="damaged"):
        report.write(graph, recipe, RUN)


def test_keys_in_uris_stay_out_of_the_page(tmp_path: Path) -> None:
    from bar_ray.log import without_keys

    assert without_keys("storage: s3://key:secret@bkt/x") == "storage: s3://bkt/x"
    assert without_keys("address: ray://a.b:1 mail@x") == "address: ray://a.b:1 mail@x"


def test_the_table_as_text() -> None:
    models = {
        n: dict(zip(("general", "math", "safety"), s, strict=True)) for n, s in SCORES.items()
    }
    shuffled = {name: {**models[name], "overall": 50.0} for name in sorted(models)}
    lines = report.table({"models": shuffled}).splitlines()
    assert [line.split("  ")[0].strip() for line in lines if line[:1].islower()] == [
        *(
            "model",
            *SCORES,
            "bar - base",
            "bar / expert",
            "percent right; * is the expert's own category",
        )
    ]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "*80.0" in lines[5] and "90%" in lines[-2] and "+62.0" in lines[-3]
    bounds = {"bar": {"math": (50.1, 64.0), "overall": (70.25, 80.0)}}
    known = report.table({"models": shuffled, "intervals": bounds}).splitlines()
    assert known == [*lines, "bar, 95 % over test items: math 50.1 to 64.0, overall 70.2 to 80.0"]
    rows = report.markdown({"models": shuffled}).splitlines()
    assert rows[0] == "| model | general | math | safety | overall |"
    assert "| math rlvr | 87.0 | **80.0** | 22.0 | 50.0 |" in rows
    assert scores.finals(shuffled) == {"math": "math rlvr", "safety": "safety sft"}


def test_ticks_are_round_and_cover_the_data() -> None:
    assert svg.ticks(0, 1) == [0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
    for low, high in ((3.0, 3.0), (-1e-6, 2e-6), (0.0, 123456.0), (-5.0, -4.9)):
        found = svg.ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7


def test_values_that_differ_by_rounding_only_are_drawn_as_equal() -> None:
    line = svg.Line("importance", "red", [(1.0, 1.0), (2.0, 1 - 2**-53)])
    assert "NaN" not in svg.line_chart([line], "optimizer step", "importance")
    assert len(set(svg.ticks(1 - 2**-53, 1.0))) > 1


def test_what_an_elastic_stage_held_over_time() -> None:
    me = {"verb": "sft", "name": "math", "fingerprint": "f"}
    told = [
        {**me, "event": "started", "time": 10.0, "resources": {"GPU": 1.0}},
        {**me, "event": "resized", "time": 20.0, "resources": {"GPU": 4.0}},
        {**me, "event": "resized", "time": 50.0, "resources": {"GPU": 2.0}},
        {**me, "event": "finished", "time": 60.0},
    ]
    [span] = history.spans(told)
    assert span.held("GPU") == [(10.0, 20.0, 1.0), (20.0, 50.0, 4.0), (50.0, 60.0, 2.0)]
    assert history.resource_hours([span]) == {"GPU": (10 + 120 + 20) / 3600}
    blocks = [svg.Block(*held) for held in span.held("GPU")]
    other = [svg.Block(0.0, 60.0, 2.0)]
    drawn = svg.stacked([("math", "red", blocks), ("code", "blue", other)], 60.0, "GPUs held")
    assert drawn.count("<title>math: 4 GPUs held</title>") == 1
    assert drawn.count("<title>code: 2 GPUs held</title>") == 4, "it lies on top of every step"
    bars = [
        svg.Bar(n, n, "red", 0.0, work, work + 1)
        for n, work in (("a", 0.0), ("b", 0.5), ("c", 50.0))
    ]
    joined = [(bar.label, bar.begin, bar.end) for bar in svg.joined(bars, "steps")]
    assert joined == [("2 steps", 0.0, 1.5), ("c", 50.0, 51.0)], "waiting joins nothing"
