"""The command line.

    kvbench doctor | demo | list | prove | verify | bench | report | capture | eval

Exit status: 0 all held; 1 something measured fell short; 2 wrong usage or a backend that this machine lacks; 130 after
Ctrl-C, with what was done until then printed and written.  Results go to stdout, progress and errors to stderr.
"""
from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvbench import __version__
from kvbench.errors import BackendUnavailable
from kvbench.registry import BACKENDS, nearest

HELD, FELL_SHORT, WRONG_USAGE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141


def main(arguments: list[str] | None = None) -> int:
    parser, commands = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        parser.error(f"unknown command {arguments[0]!r}{nearest(arguments[0], commands)}")
    options = parser.parse_args(arguments, argparse.Namespace(arguments=arguments))
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except (BackendUnavailable, ValueError) as error:
        print(f"kvbench {options.command}: {error}", file=sys.stderr)
        return WRONG_USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`kvbench list | head -1`).  What is buffered goes nowhere: no second error follows.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    parser = argparse.ArgumentParser(prog="kvbench", description="A workbench for KV-cache compression kernels.",
                                     epilog="Exit status: 0 all held, 1 something measured fell short, 2 wrong usage "
                                            "or missing backend.")
    parser.add_argument("--version", action="version", version=f"kvbench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run, summary):
        name = run.__name__.lstrip("_")
        added = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        added.set_defaults(run=run)
        return added

    def json_path(added):
        added.add_argument("--json", type=_output_path, metavar="PATH", help="also write the results as JSON")

    def backend(added, default):
        added.add_argument("--backend", type=_one_of("backend", BACKENDS), metavar="B",
                           help=f"one of {', '.join(BACKENDS)} (default: {default})")

    doctor = command(_doctor, "what this machine offers: backends, versions, GPU, and what is missing and why")
    doctor.add_argument("--json", action="store_true", help="print JSON")

    demo = command(_demo, "the main job on real keys and values: every preset: bytes, error, time; a page to look at")
    demo.add_argument("--html", type=_output_path, default=Path("kvbench-demo.html"), metavar="PATH",
                      help="where the page goes (default: kvbench-demo.html)")
    json_path(demo)

    listing = command(_list, "kernels x backends")
    listing.add_argument("--json", action="store_true", help="print JSON")

    prove = command(_prove, "check the claims of the algorithms on their references")
    prove.add_argument("algorithms", nargs="*", metavar="ALGORITHM", help="default: all")
    prove.add_argument("--samples", type=_positive, metavar="N", help="random draws per claim")
    prove.add_argument("--seed", type=_seed, default=0, metavar="S")
    json_path(prove)

    verify = command(_verify, "compare kernels with their references on drawn problems")
    verify.add_argument("kernels", nargs="*", metavar="KERNEL", help="a kernel or an algorithm (default: all)")
    backend(verify, "each one that this machine has")
    verify.add_argument("--examples", type=_positive, default=20, metavar="N", help="problems per kernel and backend")
    json_path(verify)

    bench = command(_bench, "time kernels against the memory roofline and against what one would use otherwise")
    bench.add_argument("kernels", nargs="*", metavar="KERNEL", help="a kernel or an algorithm (default: all)")
    backend(bench, "cuda where there is a GPU, else cpu")
    bench.add_argument("--axis", action="append", default=[], type=_axis, metavar="NAME=V1,V2",
                       help="values of one axis, such as tokens=4K,32K or heads=32:8; repeat for more axes")
    bench.add_argument("--baseline", type=lambda text: text.split(","), default=[], metavar="NAME,...",
                       help="also time these, or all")
    bench.add_argument("--suite", metavar="NAME", help="a named set of cases: --list shows them")
    bench.add_argument("--quick", action="store_true", help="few samples: a look, not a result")
    bench.add_argument("--flush", choices=("write", "read"), default="write",
                       help="what cold samples find in the caches: lines that were written (default), whose way to "
                            "memory falls into the sample, or lines that were read")
    bench.add_argument("--list", action="store_true", help="print suites, kernels with their axes, and baselines")
    bench.add_argument("--profile", action="store_true",
                       help="run one case once, untimed: for ncu --profile-from-start off kvbench bench ...")
    json_path(bench)
    bench.add_argument("--csv", type=_output_path, metavar="PATH", help="also write the results as CSV")
    bench.add_argument("--markdown", type=_output_path, metavar="PATH", help="also write the printed table")

    report = command(_report, "results as a table or a page, and compared with earlier ones")
    report.add_argument("results", nargs="+", metavar="RESULTS.json",
                        help="of kvbench bench; for errors against bytes also of kvbench demo or eval")
    report.add_argument("--html", type=_output_path, metavar="PATH", help="write one page that needs nothing else")
    report.add_argument("--csv", type=_output_path, metavar="PATH", help="write every contender and case as CSV")
    report.add_argument("--compare", nargs="+", metavar="OTHER.json",
                        help="earlier results: faster, slower, same or unclear per case; status 1 if any is slower")
    report.add_argument("--margin", type=_percent, default=0.02, metavar="PERCENT",
                        help="differences up to this are none (default: 2)")

    def model(added, required):
        added.add_argument("--model", required=required, metavar="M",
                           help="smollm2, a GGUF file, or a folder of a transformers model")
        added.add_argument("--text", metavar="T", help="a UTF-8 file to read (default: a text that kvbench ships)")
        added.add_argument("--dtype", metavar="D", help="of the weights: float32, bfloat16 or float16 (default: "
                                                        "float32 on a CPU, else bfloat16)")
        added.add_argument("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")

    capture = command(_capture, "queries, keys and values of layers of a model that reads a text, as safetensors")
    model(capture, required=True)
    capture.add_argument("--tokens", type=_positive, default=8192, metavar="N", help="tokens to read (default: 8192)")
    capture.add_argument("--layers", type=_whole_numbers, metavar="N,...", help="default: one in the middle")
    capture.add_argument("--out", type=_output_path, required=True, metavar="PATH",
                         help="the file; of several layers, each has one with its number in the name")

    evaluation = command(_eval, "what presets cost a real model: logits, perplexity, finding a needle")
    model(evaluation, required=False)
    evaluation.add_argument("--kv", nargs="+", default=[], metavar="PATH",
                            help="captures for --task logits (default: the shipped sample)")
    evaluation.add_argument("--cache", action="append", default=[], metavar="PRESET[:OPTION=VALUE,...]",
                            help="such as turboquant:key_bits=4,value_bits=2/3, or all; repeat for more (default: all)")
    evaluation.add_argument("--task", type=_tasks, metavar="NAME,...",
                            help="logits, perplexity, needle, and codecs: perplexity with every key and value "
                                 "encoded, none exact, and no prompt (default: logits, or perplexity with a model)")
    evaluation.add_argument("--queries", type=_positive, default=64, metavar="N", help="of a capture (default: 64)")
    evaluation.add_argument("--prompt", type=_positive, default=512, metavar="N",
                            help="tokens of the text before perplexity is measured (default: 512)")
    evaluation.add_argument("--tokens", type=_positive, default=2048, metavar="N",
                            help="tokens that perplexity is measured on (default: 2048)")
    evaluation.add_argument("--stepwise", action="store_true",
                            help="perplexity by the operators, token by token, also where many can be answered at once")
    evaluation.add_argument("--lengths", type=_whole_numbers, default=[1024, 2048], metavar="N,...",
                            help="tokens of the texts that hold a needle (default: 1024,2048)")
    evaluation.add_argument("--depths", type=_shares, default=[0.1, 0.5, 0.9], metavar="X,...",
                            help="where the needle is, 0 to 1 (default: 0.1,0.5,0.9)")
    evaluation.add_argument("--seed", type=_seed, default=0, metavar="S", help="of the needles")
    evaluation.add_argument("--resume", action="store_true",
                            help="keep what the file of --json holds of the same setup, and measure the rest")
    json_path(evaluation)
    return parser, list(commands.choices)


# Commands.  Each imports what it needs: `kvbench doctor` must work where half of the rest does not.

def _doctor(options) -> int:
    from kvbench import doctor

    report = doctor.examine()
    print(json.dumps(report, indent=1) if options.json else doctor.text(report))
    return HELD


def _demo(options) -> int:
    from kvbench import demo

    shown = demo.run(_progress)
    options.html.write_text(shown.page, encoding="utf-8")
    _write_json(options.json, shown.document)
    print(table(shown.head, shown.rows, "l" + "r" * (len(shown.head) - 1)))
    print("", *(f"{term:<12} {meaning}" for term, meaning in shown.legend.items()), sep="\n")
    print(f"\nA page to look at: {options.html.resolve()}")
    return HELD


def _list(options) -> int:
    from kvbench import loaders, registry

    missing = {backend: loaders.availability(backend) for backend in BACKENDS}
    kernels = registry.select()
    if options.json:
        print(json.dumps({
            "kvbench": __version__,
            "backends": {backend: {"available": reason is None, "reason": reason}
                         for backend, reason in missing.items()},
            "kernels": [{"name": kernel.name, "backends": list(kernel.backends), "source": kernel.source,
                         "axes": {axis: list(values) for axis, values in kernel.axes.items()}} for kernel in kernels],
        }, indent=1))
        return HELD
    def mark(kernel, backend):
        return "-" if backend not in kernel.backends else "absent" if missing[backend] else "yes"
    print(table(["kernel", *BACKENDS, "source"],
                [[kernel.name, *(mark(kernel, backend) for backend in BACKENDS), kernel.source] for kernel in kernels]))
    for backend, reason in missing.items():
        if reason:
            print(f"\n{backend} is absent here: {reason}")
    return HELD


def _prove(options) -> int:
    from kvbench import claims

    results, interrupted = _until_interrupted(
        claims.prove(options.algorithms, options.samples, options.seed, _progress))
    _write_json(options.json, claims.to_json(results))
    print(claims.table(results))
    if failed := claims.explain(results):
        print(f"\n{failed}")
    return INTERRUPTED if interrupted else claims.exit_status(results)


def _verify(options) -> int:
    from kvbench import loaders, registry

    if options.backend:
        kernels = registry.select_for(options.backend, options.kernels)[0]
        loaders.require(options.backend)
        backends = [options.backend]
    else:
        kernels = registry.select(options.kernels)
        backends = [backend for backend in BACKENDS if backend != "reference" and loaders.availability(backend) is None]
    pairs = [(kernel, backend) for kernel in kernels for backend in backends if backend in kernel.backends]

    from kvbench.verify import verify

    def verdicts():
        for number, (kernel, backend) in enumerate(pairs, start=1):
            _progress(f"{kernel.name} on {backend} ({number} of {len(pairs)})")
            yield verify(kernel, backend, options.examples, seed=0)

    done, interrupted = _until_interrupted(verdicts())
    _progress("")
    _write_json(options.json, {
        "schema": "kvbench.verify/1", "kvbench": __version__, "complete": not interrupted,
        "verdicts": [{"kernel": v.kernel, "backend": v.backend, "examples": v.examples, "agrees": v.held,
                      "failures": v.failures} for v in done]})
    print(table(["kernel", "backend", "examples", "verdict"],
                [[v.kernel, v.backend, v.examples, "agrees" if v.held else f"{len(v.failures)} FAILED"] for v in done],
                "llr"))
    for v in done:
        for failure in v.failures:
            print(f"\n{v.kernel} on {v.backend}:\n{failure}")
    return INTERRUPTED if interrupted else HELD if all(v.held for v in done) else FELL_SHORT


def _bench(options) -> int:
    from kvbench import bench
    from kvbench.bench import overview, results, tables

    axes: dict[str, list[str]] = {}
    for name, values in options.axis:
        axes.setdefault(name, []).extend(values)
    if options.list:
        print(overview.text(options.kernels))
        return HELD
    if options.profile:
        print(f"ran once: {bench.profile(options.kernels, options.backend, axes, suite=options.suite)}")
        return HELD
    done = bench.run(options.kernels, options.backend, axes, options.baseline, options.quick, options.json, _progress,
                     suite=options.suite, flush=options.flush)
    if options.csv:
        results.write_text(options.csv, tables.as_csv([done.document]))
    if options.markdown:
        results.write_text(options.markdown, tables.as_markdown(done.document))
    return done.exit_status


def _report(options) -> int:
    from kvbench.bench import results, tables
    from kvbench.report import compare, contents, page

    runs, accuracy = contents.load(options.results)
    comparison = None
    if options.compare:
        earlier, _ = contents.load(options.compare)
        comparison = compare.compare(runs, earlier, options.margin)
    if options.csv:
        results.write_text(options.csv, tables.as_csv(runs))
    if options.html:
        results.write_text(options.html, page.render(runs, accuracy, comparison))
    if comparison:
        print(table(*compare.lines(comparison), "llllrrr"))
        print(f"\n{comparison.count()}; a verdict needs the whole interval beyond {100 * comparison.margin:g} %")
        for name in comparison.only_before:
            print(f"only in the earlier results: {name}")
        for name in comparison.only_after:
            print(f"only in these results: {name}")
    else:
        for head, rows, align in contents.summaries(contents.contents(runs, accuracy)):
            print(table(head, rows, align), end="\n\n")
    if options.html:
        print(f"A page to look at: {options.html.resolve()}")
    return comparison.exit_status if comparison else HELD


def _capture(options) -> int:
    from kvbench.evaluate import capture, models

    text = models.read_text(options.text)
    _progress(f"loading {options.model}")
    model = models.load(options.model, options.dtype, options.device)
    layers = options.layers or [model.config.num_hidden_layers // 2]
    made_with = f"kvbench capture --model {options.model} --tokens {options.tokens} --layers " \
                f"{','.join(map(str, layers))}"
    captures = capture.capture(model, text, options.tokens, layers, made_with, _progress)
    rows = []
    for layer, captured in zip(layers, captures):
        path = options.out if len(layers) == 1 else \
            options.out.with_name(f"{options.out.stem}_layer{layer:02d}{options.out.suffix}")
        capture.write(captured, path)
        rows.append([path, layer, *("x".join(map(str, x.shape[1:])) for x in (captured.keys, captured.queries))])
    print(table(["file", "layer", "keys", "queries"], rows, "lr"))
    return HELD


def _eval(options) -> int:
    from kvbench.evaluate import driver

    if options.resume and not options.json:
        raise ValueError("--resume: expected --json PATH, whose cases are kept")
    tasks = options.task or (["perplexity"] if options.model and not options.kv else ["logits"])
    settings = driver.Settings(
        tasks, options.cache, options.kv, options.model, options.text, options.dtype, options.device, options.queries,
        options.prompt, options.tokens, options.stepwise, options.lengths, options.depths, options.seed,
        shlex.join(["kvbench", *options.arguments]), options.resume)
    done = driver.run(settings, options.json, _progress)
    for title, head, rows in driver.tables(done.document):
        print(f"{title}\n\n{table(head, rows, driver.ALIGN)}\n")
    print(*(f"{term:<12} {meaning}" for term, meaning in driver.legend(done.document).items()), sep="\n")
    return INTERRUPTED if done.interrupted else HELD


# Pieces

def table(head: list[str], rows: Iterable[list], align: str = "") -> str:
    """Markdown, padded to read well in a terminal too.  `align` has "r" for each column that holds numbers."""
    rows = [[str(cell) for cell in row] for row in rows]
    width = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    align = align.ljust(len(head), "l")

    def line(cells):
        return "| " + " | ".join(c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in zip(cells, width, align)) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if a == "r" else "-") for w, a in zip(width, align)) + "|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def _progress(text: str) -> None:
    """One changing line on stderr; nothing when stderr is not a terminal.  An empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _until_interrupted(results: Iterator) -> tuple[list, bool]:
    """What the iterator yields, and whether Ctrl-C ended it early."""
    done = []
    try:
        for result in results:
            done.append(result)
    except KeyboardInterrupt:
        return done, True
    return done, False


def _write_json(path: Path | None, document: dict) -> None:
    if path:
        path.write_text(json.dumps(document, indent=1) + "\n")


def _one_of(what: str, known: Iterable[str]):
    def convert(text):
        if text not in known:
            raise argparse.ArgumentTypeError(f"unknown {what} {text!r}{nearest(text, known)}")
        return text
    return convert


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _percent(text: str) -> float:
    try:
        share = float(text) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"expected a percentage from 0 to 100, got {text!r}")
    return share


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a non-negative integer, got {text!r}")
    return int(text)


def _tasks(text: str) -> list[str]:
    return [_one_of("task", ("logits", "perplexity", "codecs", "needle"))(task) for task in text.split(",")]


def _whole_numbers(text: str) -> list[int]:
    return [_seed(number) for number in text.split(",")]


def _shares(text: str) -> list[float]:
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"expected numbers from 0 to 1, got {text!r}")
    return shares


def _axis(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    values = [value for value in values.split(",") if value]
    if not (name and equals and values):
        raise argparse.ArgumentTypeError(f"expected NAME=V1,V2, got {text!r}")
    return name, values


def _output_path(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():   # said before the work, not after it
        raise argparse.ArgumentTypeError(f"expected a file in an existing folder, got {text!r}")
    return path


if __name__ == "__main__":
    sys.exit(main())
