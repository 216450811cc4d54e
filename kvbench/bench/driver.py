"""`kvbench bench`: which cases, in which order, and what is printed and kept of each."""
from __future__ import annotations

import dataclasses
import datetime
import inspect
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvbench import loaders, registry
from kvbench.bench import axes as axis_values
from kvbench.bench import baselines as baseline_records
from kvbench.bench import machine, timing, yardsticks
from kvbench.bench.check import Check, Verdict
from kvbench.bench.cpu import Cpu
from kvbench.bench.gpu import Gpu
from kvbench.bench.results import SCHEMA_VERSION, Results

PLACES = {"reference": Cpu, "cpu": Cpu, "cuda": Gpu, "native": Gpu}
CHECK_SECONDS, QUICK_CHECK_SECONDS = 3.0, 1.0


def run(kernels: Sequence[str] = (), backend: str | None = None, axes: Mapping[str, Sequence] | None = None,
        baselines: Sequence[str] = (), quick: bool = False, json_path: str | Path | None = None,
        progress: Callable[[str], None] | None = None, *, report: Callable[[str], None] = print,
        seed: int = 0) -> Results:
    """Time kernels on one backend, each case only after its result agreed with the reference.

    kernels   names or stems from the registry; none: all that have the backend
    backend   cuda where there is a GPU, else cpu; `simt` is never timed
    axes      axis -> values, typed or as text ("32K"); `heads` takes pairs such as "32:8".  Their product is run
    baselines names, or "all": timed in the same run by the same timer
    quick     few samples: a look, not a result
    json_path written after every case, in one step each time, so that Ctrl-C loses at most the case that runs
    progress  called with one line of text before each step, "" to clear it
    report    called with the lines of the table as they come

    Wrong names raise ValueError, a missing backend BackendUnavailable, before anything runs.  Ctrl-C returns what was
    finished; see Results.exit_status.
    """
    chosen, backend, skipped = _select(kernels, backend)
    axes = dict(axes or {})
    axis_values.check(chosen, axes)
    plan = [(kernel, problem) for kernel in chosen for problem in axis_values.problems(kernel, axes)]
    wanted = baseline_records.choose(list(baselines), [kernel.name for kernel in chosen], PLACES[backend].kind)
    if json_path is not None and not Path(json_path).parent.is_dir():
        raise ValueError(f"json_path: expected a file in an existing folder, got {str(json_path)!r}")
    baseline_records.load(wanted)
    place = PLACES[backend]()

    options = _options(backend, wanted, quick)
    command = shlex.join(["kvbench", "bench", *kernels, *options, *_axis_options(axes)])
    driver = _Driver(place, backend, wanted, quick, seed, options, progress or (lambda text: None))
    results = Results({
        "schema": SCHEMA_VERSION, "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "complete": False, "command": command, "backend": backend, "quick": quick, "seed": seed,
        "stop_rule": dataclasses.asdict(driver.rule), "machine": {**machine.describe(), **place.describe()},
        "versions": machine.versions(), "source": machine.source(), "yardsticks": {}, "skipped": skipped, "cases": []})
    document, table = results.document, _Table(plan, report)
    try:
        driver.progress("yardsticks")
        document["yardsticks"] = driver.yardsticks = yardsticks.measure(place, driver.rule)
        table.head(document)
        for number, (kernel, problem) in enumerate(plan, 1):
            driver.step = f"{number}/{len(plan)} {kernel.name} {_text(problem)}"
            case = driver.case(kernel, problem)
            document["cases"].append(case)
            driver.progress("")
            table.case(case)
            if json_path is not None:
                results.write(json_path)
        document["complete"] = True
    except KeyboardInterrupt:
        results.interrupted = True
        driver.progress("")
        report(f"\ninterrupted: {len(document['cases'])} of {len(plan)} cases are finished")
    document["machine"].update(threads=machine.threads(), state_after=place.state())
    table.foot(document)
    if json_path is not None:
        results.write(json_path)
    return results


class _Driver:
    """Runs single cases on one place with one set of options."""

    def __init__(self, place, backend, wanted, quick, seed, options, progress):
        self.place, self.backend, self.wanted, self.seed, self.options = place, backend, wanted, seed, options
        self.rule = timing.QUICK if quick else timing.FULL
        self.check_seconds = QUICK_CHECK_SECONDS if quick else CHECK_SECONDS
        self.progress, self.step, self.yardsticks = progress, "", {}

    def case(self, kernel, problem: dict) -> dict:
        traffic = kernel.traffic(problem)
        case = {"kernel": kernel.name, "backend": self.backend, "problem": problem, "inputs": None,
                "command": shlex.join(["kvbench", "bench", kernel.name, *self.options,
                                       *_axis_options({axis: [value] for axis, value in problem.items()})]),
                "traffic": {"bytes_read": traffic.bytes_read, "bytes_written": traffic.bytes_written},
                **_untimed(), "best_baseline": None, "speedup": None, "state": {}, "baselines": []}
        try:
            self.progress(f"{self.step}: inputs and reference")
            inputs, case["inputs"] = self.place.inputs(kernel, problem, self.seed)
            check = Check(kernel, problem, inputs, self.seed, self.check_seconds)
            call = OperatorCall(kernel.operator, self.backend, inputs, problem, self.place)
            case |= self._time(kernel.name, call, self.place.framework, check.agreement, traffic)
            case["state"] = self.place.state()
            if case["cold"] is not None:
                case["baselines"] = [self._baseline(record, inputs, check, traffic)
                                     for record in baseline_records.of(kernel.name, self.place.kind, self.wanted)]
        except Exception as error:     # one case that cannot run must not cost the others: it is a failure of its own
            case |= _untimed(checked=Verdict(False, _one_line(error), None, (), 0).summary())
        finally:
            self.place.release()
        timed = [entry for entry in case["baselines"] if entry["cold"] is not None]
        if timed:
            best = min(timed, key=lambda entry: entry["cold"]["median_us"])
            case["best_baseline"] = best["name"]
            case["speedup"] = round(best["cold"]["median_us"] / case["cold"]["median_us"], 4)
        return case

    def _baseline(self, record, inputs, check, traffic) -> dict:
        entry = {"name": record.name, "missing": None, **_untimed()}
        limit = baseline_records.allowed_error(inputs)
        try:
            with self.place.current(record.framework):
                call = record.prepare(inputs)
            entry |= self._time(record.name, call, record.framework, lambda result: check.closeness(result, limit),
                                traffic)
        except baseline_records.Missing as reason:
            entry["missing"] = str(reason)
        except Exception as error:     # a library that refuses this case: a dtype, a head size, a part it lacks
            entry["missing"] = f"refuses this case: {_one_line(error)}"
        return entry

    def _time(self, name: str, call: Callable, framework: str, agree: Callable, traffic) -> dict:
        """Check, time cold and hot, check again; no time is kept unless both checks hold."""
        self.progress(f"{self.step}: {name}, check")
        stopwatch = self.place.stopwatch(call, framework)
        verdict = self._judge(stopwatch, agree)
        timed = _untimed(checked=verdict.summary(), error=verdict.error, timer=stopwatch.timer, note=stopwatch.note)
        if not verdict.agrees:
            return timed
        self.progress(f"{self.step}: {name}, cold")
        cold = timing.measure(stopwatch.cold, self.rule).summary()
        self.progress(f"{self.step}: {name}, hot")
        hot = timing.measure(stopwatch.hot, self.rule).summary()
        # Once more: a kernel that leaves a counter or a workspace behind is right the first time only.
        verdict = self._judge(stopwatch, agree)
        if not verdict.agrees:
            failure = {**verdict.summary(), "failure": f"after many calls: {verdict.failure}"}
            return {**timed, "checked": failure, "error": verdict.error}
        speed = yardsticks.gbps(traffic.bytes_moved, cold["median_us"])
        return {**timed, "cold": cold, "hot": hot, "gbps": speed, "percent_of_copy": self._percent(speed, "copy"),
                "percent_of_read": self._percent(speed, "read")}

    def _judge(self, stopwatch, agree) -> Verdict:
        stopwatch.poison()
        stopwatch.once()
        return agree(stopwatch.result)

    def _percent(self, speed: float | None, yardstick: str) -> float | None:
        reached = self.yardsticks.get(yardstick, {}).get("gbps")
        return round(100 * speed / reached, 2) if speed is not None and reached else None


class OperatorCall:
    """An operator with the memory that it would otherwise allocate: workspace and, after the first call, outputs.

    The outputs of an operator stand together in its signature, from `out` on, in the order in which they are returned;
    a module whose operators take a `workspace` has a function of that name, whose parameters are axes of the problem.
    """

    def __init__(self, operator: Callable, backend: str, inputs: dict, problem: dict, place):
        self._operator, self._arguments = operator, {**inputs, "backend": backend}
        parameters = list(inspect.signature(operator).parameters)
        after = parameters[parameters.index("out"):] if "out" in parameters else []
        ends = [i for i, name in enumerate(after) if name in ("workspace", "backend", "stream")]
        self._outputs = after[:min(ends, default=len(after))]
        if "workspace" in parameters:
            with place.current(place.framework):
                self._arguments["workspace"] = _workspace(operator, problem, place)

    def __call__(self):
        result = self._operator(**self._arguments)
        if self._outputs:
            self._arguments |= zip(self._outputs, result if isinstance(result, tuple) else (result,))
            self._outputs = []
        return result


def _workspace(operator: Callable, problem: dict, place):
    make = sys.modules[inspect.unwrap(operator).__module__].workspace
    known = {**problem, "device": place.device, "framework": place.framework}
    if "kv_heads" in problem and "group" in problem:
        known["q_heads"] = problem["kv_heads"] * problem["group"]
    return make(**{name: known[name] for name in inspect.signature(make).parameters if name in known})


def _select(names: Sequence[str], backend: str | None) -> tuple[list, str, list[dict]]:
    """(kernels, backend, kernels left out with the reason)."""
    kernels = registry.select(names or None)
    if backend is None:
        backend = "cpu" if loaders.availability("cuda") else "cuda"
    if backend == "simt":
        raise ValueError("backend 'simt' is never timed: it emulates the CUDA source thread by thread; "
                         "use cuda, native or cpu")
    if backend not in PLACES:
        raise ValueError(f"unknown backend {backend!r}{registry.nearest(backend, PLACES)}")
    loaders.require(backend)
    lacking = [kernel for kernel in kernels if backend not in kernel.backends]
    if lacking and (names or len(lacking) == len(kernels)):
        raise ValueError(f"{lacking[0].name} has no backend {backend!r}; it has {', '.join(lacking[0].backends)}")
    return ([kernel for kernel in kernels if kernel not in lacking], backend,
            [{"kernel": kernel.name, "reason": f"has no backend {backend!r}"} for kernel in lacking])


def _untimed(**known) -> dict:
    """The fields of a contender that was not timed."""
    return {**dict.fromkeys(("checked", "error", "timer", "note", "cold", "hot", "gbps", "percent_of_copy",
                             "percent_of_read")), **known}


def _options(backend: str, wanted: Sequence[str], quick: bool) -> list[str]:
    return ["--backend", backend, *(["--baseline", ",".join(wanted)] if wanted else []),
            *(["--quick"] if quick else [])]


def _axis_options(axes: Mapping[str, Sequence]) -> list[str]:
    return [part for axis, values in axes.items() for part in ("--axis", f"{axis}={','.join(map(str, values))}")]


def _text(problem: dict) -> str:
    return " ".join(f"{axis}={value}" for axis, value in problem.items())


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class _Table:
    """Markdown rows, printed as the results come: widths are fixed from the plan."""

    def __init__(self, plan, report):
        self._report = report
        names = [kernel.name for kernel, _ in plan] + [f"  {record.name}" for record in baseline_records.BASELINES]
        self._columns = [("kernel", max(map(len, names)), str.ljust),
                         ("problem", max([7, *(len(_text(problem)) for _, problem in plan)]), str.ljust),
                         ("cold us", 10, str.rjust), ("+-%", 5, str.rjust), ("hot us", 10, str.rjust),
                         ("GB/s", 7, str.rjust), ("% copy", 6, str.rjust), ("error", 7, str.rjust),
                         ("note", 4, str.ljust)]

    def head(self, document: dict) -> None:
        measured = document["yardsticks"]
        gpu = document["machine"].get("gpu")
        self._report(f"{gpu['name'] if gpu else document['machine']['processor']}: "
                     + ", ".join(f"{name} {entry['gbps']:.0f} GB/s" if entry["gbps"] else
                                 f"{name} {(entry['cold'] or entry['hot'])['median_us']:.2f} us"
                                 for name, entry in measured.items()))
        self._report("cold: caches flushed before each sample; GB/s, % of the copy above and +-% belong to it; "
                     "hot: back to back\n")
        self._line([title for title, _, _ in self._columns])
        self._report("|" + "|".join("-" * (width + 2) for _, width, _ in self._columns) + "|")

    def case(self, case: dict) -> None:
        notes = [f"{case['speedup']:.2f}x the speed of {case['best_baseline']}"] if case["speedup"] else []
        self._row(case["kernel"], _text(case["problem"]), case, notes)
        for entry in case["baselines"]:
            self._row(f"  {entry['name']}", "", entry, [f"missing: {entry['missing']}"] if entry["missing"] else [])

    def foot(self, document: dict) -> None:
        for skipped in document["skipped"]:
            self._report(f"{skipped['kernel']} is left out: {skipped['reason']}")

    def _row(self, name: str, problem: str, entry: dict, notes: list[str]) -> None:
        checked, cold, hot = entry["checked"], entry["cold"], entry["hot"]
        if checked and not checked["agrees"]:
            notes.append(f"WRONG, not timed: {checked['failure']}")
        elif checked and len(checked["parts"]) < checked["of"]:
            notes.append(f"checked in {len(checked['parts'])} of {checked['of']} parts")
        notes += [f"{which} did not converge" for which, found in (("cold", cold), ("hot", hot))
                  if found and not found["converged"]]
        if entry["note"]:
            notes.append(f"timed by {entry['timer']}: {entry['note']}")
        spread = cold["relative_error"] if cold else None
        self._line([name, problem, _number(cold and cold["median_us"], ".2f"),
                    _number(None if spread is None else 100 * spread, ".1f"), _number(hot and hot["median_us"], ".2f"),
                    _number(entry["gbps"], ".4g"), _number(entry["percent_of_copy"], ".1f"),
                    _number(entry["error"], ".1e"), "; ".join(notes)])

    def _line(self, cells: list[str]) -> None:
        self._report("| " + " | ".join(pad(cell, width) for cell, (_, width, pad) in zip(cells, self._columns)) + " |")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)
