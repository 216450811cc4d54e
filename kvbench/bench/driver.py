"""`kvbench bench`: which cases, in which order, and what is kept of each."""
from __future__ import annotations

import dataclasses
import datetime
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvbench import loaders, registry
from kvbench.bench import axes as axis_values
from kvbench.bench import baselines as baseline_records
from kvbench.bench import calls, machine, suites, tables, timing, yardsticks
from kvbench.bench.calls import OperatorCall
from kvbench.bench.check import Check, Verdict
from kvbench.bench.cpu import Cpu
from kvbench.bench.gpu import Gpu
from kvbench.bench.results import SCHEMA_VERSION, Results

PLACES = {"reference": Cpu, "cpu": Cpu, "cuda": Gpu, "native": Gpu}
CHECK_SECONDS, QUICK_CHECK_SECONDS = 3.0, 1.0
MOST_INPUT_SETS = 32
THROTTLED_BELOW = 0.95     # of the clock at the start: a GPU's clock moves by 1 or 2 % with its temperature


def run(kernels: Sequence[str] = (), backend: str | None = None, axes: Mapping[str, Sequence] | None = None,
        baselines: Sequence[str] = (), quick: bool = False, json_path: str | Path | None = None,
        progress: Callable[[str], None] | None = None, *, suite: str | None = None,
        flush: str = "write", report: Callable[[str], None] = print, seed: int = 0) -> Results:
    """Time kernels on one backend, each case only after its result agreed with the reference.

    kernels   names or stems from the registry; none: all that have the backend
    backend   cuda where there is a GPU, else cpu; `simt` is never timed
    axes      axis -> values, typed or as text ("32K"); `heads` takes pairs such as "32:8".  Their product is run
    baselines names, or "all": timed in the same run by the same timer
    quick     few samples: a look, not a result
    json_path written after every case, in one step each time, so that Ctrl-C loses at most the case that runs
    progress  called with one line of text before each step, "" to clear it
    suite     a name from suites.SUITES: of `kernels` those that belong to it, on its axes
    flush     what a cold sample finds in the caches: lines that were written ("write"), which somebody has to bring to
              memory meanwhile, or that were read ("read")
    report    called with the lines of the table as they come

    Wrong names raise ValueError, a missing backend BackendUnavailable, before anything runs.  Ctrl-C returns what was
    finished; see Results.exit_status.
    """
    chosen, backend, axes, skipped = plan_of(kernels, backend, axes, suite)
    quick = quick or (suite is not None and suites.get(suite).quick)
    plan = [(kernel, problem) for kernel in chosen for problem in axis_values.problems(kernel, axes)]
    wanted = baseline_records.choose(list(baselines), chosen, PLACES[backend].kind)
    if json_path is not None and not Path(json_path).parent.is_dir():
        raise ValueError(f"json_path: expected a file in an existing folder, got {str(json_path)!r}")
    if flush not in timing.FLUSHES:
        raise ValueError(f"flush: expected one of {', '.join(timing.FLUSHES)}, got {flush!r}")
    baseline_records.load(wanted)
    place = PLACES[backend](flush=flush)

    options = _options(backend, wanted, quick, flush)
    command = shlex.join(["kvbench", "bench", *kernels, *(["--suite", suite] if suite else []), *options,
                          *_axis_options(axes)])
    driver = _Driver(place, backend, wanted, quick, seed, options, progress or (lambda text: None))
    results = Results({
        "schema": SCHEMA_VERSION, "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "complete": False, "command": command, "backend": backend, "quick": quick, "seed": seed, "flush": flush,
        "stop_rule": dataclasses.asdict(driver.rule), "machine": {**machine.describe(), **place.describe()},
        "versions": machine.versions(), "source": machine.source(), "yardsticks": {}, "skipped": skipped, "cases": []})
    document, table = results.document, tables.Live(plan, report)
    try:
        driver.progress("yardsticks")
        document["yardsticks"] = driver.yardsticks = yardsticks.measure(place, driver.rule)
        driver.first_clock_mhz = place.clock_mhz()
        table.head(document)
        for number, (kernel, problem) in enumerate(plan, 1):
            driver.step = f"{number}/{len(plan)} {kernel.name} {tables.problem_text(problem)}"
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


def profile(kernels: Sequence[str] = (), backend: str | None = None, axes: Mapping[str, Sequence] | None = None, *,
            suite: str | None = None, seed: int = 0) -> str:
    """Run one case once, untimed and unchecked, for a profiler; on a GPU between cudaProfilerStart and Stop.

    A first call, outside of that, compiles and allocates.  Returns what was run; ValueError if the names and axes
    choose more than one case.
    """
    chosen, backend, axes, _ = plan_of(kernels, backend, axes, suite)
    plan = [(kernel, problem) for kernel in chosen for problem in axis_values.problems(kernel, axes)]
    if len(plan) != 1:
        raise ValueError(f"--profile: expected one case, got {len(plan)}: name one kernel, and one value for each axis")
    (kernel, problem), = plan
    place = PLACES[backend]()
    inputs, _ = place.inputs(kernel, problem, seed)
    call = OperatorCall(kernel.operator, backend, inputs, problem, place)
    with place.current(place.framework):
        call()
        place.profiled(call)
    return f"{kernel.name} on {backend}, {tables.problem_text(problem)}"


def plan_of(names: Sequence[str], backend: str | None, axes: Mapping[str, Sequence] | None,
            suite: str | None) -> tuple[list, str, dict, list[dict]]:
    """(kernels, backend, axes, kernels left out with the reason), every name checked."""
    chosen, backend, skipped = _select(names, backend)
    axes = dict(axes or {})
    if suite is not None:
        chosen = suites.kernels_of(suite, chosen)
        skipped = [entry for entry in skipped if suites.get(suite).belongs(registry.get(entry["kernel"]))]
    axis_values.check(chosen, axes)
    return chosen, backend, {**(suites.axes_of(suite, chosen, axes) if suite else {}), **axes}, skipped


class _Driver:
    """Runs single cases on one place with one set of options."""

    def __init__(self, place, backend, wanted, quick, seed, options, progress):
        self.place, self.backend, self.wanted, self.seed, self.options = place, backend, wanted, seed, options
        self.rule = timing.QUICK if quick else timing.FULL
        self.check_seconds = QUICK_CHECK_SECONDS if quick else CHECK_SECONDS
        self.progress, self.step, self.yardsticks, self.first_clock_mhz = progress, "", {}, None

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
            case |= self._time(
                kernel.name, lambda given: OperatorCall(kernel.operator, self.backend, given, problem, self.place),
                inputs, self.place.framework, check.agreement, traffic.bytes_moved)
            case["state"] = self.place.state()
            if case["cold"] is not None:
                made = {}
                case["baselines"] = [self._baseline(record, kernel, problem, inputs, made, check)
                                     for record in baseline_records.of(kernel, self.place.kind, self.wanted)]
        except Exception as error:     # one case that cannot run must not cost the others: it is a failure of its own
            case |= _untimed(checked=Verdict(False, _one_line(error), None, (), 0).summary())
        finally:
            self.place.release()
        # A cache in a smaller type gives up accuracy for its time: shown, but no yardstick for one that does so, too.
        timed = [entry for entry in case["baselines"] if entry["cold"] is not None and entry["storage"] is None]
        if timed:
            best = min(timed, key=lambda entry: entry["cold"]["median_us"])
            case["best_baseline"] = best["name"]
            case["speedup"] = round(best["cold"]["median_us"] / case["cold"]["median_us"], 4)
        return case

    def _baseline(self, record, kernel, problem, inputs, made, check) -> dict:
        """made : what baselines of this case got, by the kernel whose work they do: codes are decoded once."""
        moved = baseline_records.bytes_moved(record, kernel, problem, self.place.kind)
        entry = {"name": record.name, "storage": record.storage, "bytes_moved": moved, "missing": None, **_untimed()}
        try:
            with self.place.current(record.framework):     # decoding is ordered before what reads it
                if record.kernel not in made:
                    made[record.kernel] = baseline_records.inputs_of(record, kernel, inputs, self.place.kind)
                given = made[record.kernel]
            limit = baseline_records.allowed_error(given, record.storage)
            entry |= self._time(record.name, record.prepare, given, record.framework,
                                lambda result: check.closeness(result, limit), moved)
        except baseline_records.Missing as reason:
            entry["missing"] = str(reason)
        except Exception as error:     # a library that refuses this case: a dtype, a head size, a part it lacks
            entry["missing"] = f"refuses this case: {_one_line(error)}"
        return entry

    def _time(self, name: str, prepare: Callable, inputs: dict, framework: str, agree: Callable,
              moved: int | None) -> dict:
        """Check, time cold and hot, check again; no time is kept unless both checks hold.

        prepare(inputs) -> a call without arguments: the contender.
        """
        self.progress(f"{self.step}: {name}, check")
        with self.place.current(framework):
            prepare(inputs)()                          # compiles, which takes memory of its own
            call = prepare(inputs)
            with self.place.memory(framework) as memory:
                call()
        stopwatch = self.place.stopwatch(call, framework)
        verdict = self._judge(stopwatch, agree)
        timed = _untimed(checked=verdict.summary(), error=verdict.error, timer=stopwatch.timer, note=stopwatch.note,
                         memory_peak_bytes=memory["peak"])
        if not verdict.agrees:
            return timed
        self.progress(f"{self.step}: {name}, cold")
        cold = timing.measure(stopwatch.cold, self.rule).summary()
        clocks = [self.place.clock_mhz()]
        self.progress(f"{self.step}: {name}, hot")
        hot = timing.measure(stopwatch.hot, self.rule).summary()
        clocks.append(self.place.clock_mhz())
        # Once more: a kernel that leaves a counter or a workspace behind is right the first time only.
        when, verdict = "after many calls", self._judge(stopwatch, agree)
        sets = calls.input_sets(calls.input_bytes(inputs), self.place.cache_bytes, MOST_INPUT_SETS)
        if verdict.agrees and sets is not None:
            self.progress(f"{self.step}: {name}, {sets} sets of inputs")
            try:
                timed["rotating"], verdict = self._rotating(prepare, call, inputs, sets, framework, agree)
                timed["input_sets"], when = sets, "on another set of inputs"
            except Exception as error:     # memory for so many sets, most likely: the other times stand
                timed["note"] = "; ".join(filter(None, [timed["note"], f"not rotated: {_one_line(error)}"]))
        if not verdict.agrees:
            failure = {**verdict.summary(), "failure": f"{when}: {verdict.failure}"}
            return {**timed, "rotating": None, "input_sets": None, "checked": failure, "error": verdict.error}
        speed = None if moved is None else yardsticks.gbps(moved, cold["median_us"])
        attainable = None if moved is None else yardsticks.attainable_us(self.yardsticks, moved)
        return {**timed, "cold": cold, "hot": hot, "gbps": speed, "percent_of_copy": self._percent(speed, "copy"),
                "percent_of_read": self._percent(speed, "read"), "clock": self._clock(clocks),
                "percent_of_attainable": round(100 * attainable / cold["median_us"], 2)
                if attainable and cold["median_us"] else None}

    def _rotating(self, prepare, call, inputs, sets, framework, agree) -> tuple[dict, Verdict]:
        """Back-to-back calls on `sets` sets of inputs: the time per call, and whether all results are right."""
        with self.place.current(framework):
            others = [prepare(calls.duplicate(inputs, self.place.device)) for _ in range(sets - 1)]
        stopwatch = self.place.stopwatch(calls.Rotating([call, *others]), framework)
        samples = timing.measure(lambda count: [seconds / sets for seconds in stopwatch.hot(count)], self.rule)
        verdicts = self._judge(stopwatch, lambda results: [agree(result) for result in results])
        return samples.summary(), next((verdict for verdict in verdicts if not verdict.agrees), verdicts[0])

    def _judge(self, stopwatch, agree):
        """What `agree` says of a result of which every byte was written just now."""
        stopwatch.poison()
        stopwatch.once()
        return agree(stopwatch.result)

    def _percent(self, speed: float | None, yardstick: str) -> float | None:
        reached = self.yardsticks.get(yardstick, {}).get("gbps")
        return round(100 * speed / reached, 2) if speed is not None and reached else None

    def _clock(self, seen: list[float | None]) -> dict | None:
        """The lowest clock behind the samples, against that at the start of the run."""
        if None in seen or not self.first_clock_mhz:
            return None
        share = min(seen) / self.first_clock_mhz
        return {"sm_mhz": round(min(seen), 1), "of_start": round(share, 4), "throttled": share < THROTTLED_BELOW}


def _select(names: Sequence[str], backend: str | None) -> tuple[list, str, list[dict]]:
    """(kernels, backend, kernels left out with the reason)."""
    if backend is None:
        backend = "cpu" if loaders.availability("cuda") else "cuda"
    if backend == "simt":
        raise ValueError("backend 'simt' is never timed: it emulates the CUDA source thread by thread; "
                         "use cuda, native or cpu")
    if backend not in PLACES:
        raise ValueError(f"unknown backend {backend!r}{registry.nearest(backend, PLACES)}")
    loaders.require(backend)
    kernels, lacking = registry.select_for(backend, names)
    return kernels, backend, [{"kernel": kernel.name, "reason": f"has no backend {backend!r}"} for kernel in lacking]


def _untimed(**known) -> dict:
    """The fields of a contender that was not timed."""
    return {**dict.fromkeys(("checked", "error", "timer", "note", "cold", "hot", "gbps", "percent_of_copy",
                             "percent_of_read", "percent_of_attainable", "memory_peak_bytes", "rotating", "input_sets",
                             "clock")), **known}


def _options(backend: str, wanted: Sequence[str], quick: bool, flush: str) -> list[str]:
    return ["--backend", backend, *(["--baseline", ",".join(wanted)] if wanted else []),
            *(["--quick"] if quick else []), *(["--flush", flush] if flush != "write" else [])]


def _axis_options(axes: Mapping[str, Sequence]) -> list[str]:
    return [part for axis, values in axes.items() for part in ("--axis", f"{axis}={','.join(map(str, values))}")]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
