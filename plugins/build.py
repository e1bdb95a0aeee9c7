"""Compiles the ops' kernels for chosen SMs and dtypes with no GPU; see `scripts/make_plugin_library.py`.

Kernels are cached by a hash of everything they are compiled from. If nothing changed, neither Triton nor torch is
imported.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemotrt.plugins.compile_workers import Workers
from nemotrt.plugins.contract import DType
from nemotrt.plugins.kernel_index import Kernel, KernelError, KernelIndex
from nemotrt.plugins.kernel_store import KernelStore, cache_folder, digest
from nemotrt.plugins.spec import FLOATS, ops
from nemotrt.plugins.variant import SMS, Variant, supports_fp8

DTYPES = {dtype.label.lower(): dtype.triton for dtype in (*FLOATS, DType.FLOAT8_E4M3)}
"""The dtypes that can be chosen, and their names in Triton."""

Report = Callable[[int, int, str], None]
"""Called with the number of compiled kernels, their total, and the title of the latest."""


def packages() -> dict[str, str]:
    """The package of each op, by the op's folder name."""
    return {spec.torch_name: spec.package for spec in ops()}


def check_selection(sms: Sequence[int], dtypes: Sequence[str], op_names: Sequence[str]) -> None:
    """Raise KernelError if there are no kernels for one of these SMs, dtypes or ops."""
    check_known("SM", sms, SMS)
    check_known("dtype", dtypes, tuple(DTYPES))
    check_known("op", op_names, tuple(packages()))
    if not sms or not op_names:
        raise KernelError("nothing to compile: choose at least one SM and one op")
    if "fp8" not in dtypes:
        return
    for sm in sms:
        if not supports_fp8(sm):
            supported = ", ".join(str(sm) for sm in SMS if supports_fp8(sm))
            raise KernelError(f"SM {sm} has no FP8 tensor cores: omit fp8, or choose from SM {supported}")
    if set(dtypes) == {"fp8"}:
        raise KernelError("fp8 is for weights and caches only: add fp16 or bf16 for the activations")


def check_known(name: str, chosen: Sequence[object], known: Sequence[object]) -> None:
    """Raise KernelError if one of the chosen values is not known."""
    for value in chosen:
        if value not in known:
            raise KernelError(
                f"there are no kernels for {name} {value}: choose from {', '.join(map(str, known))}"
            )


def selected(variants: Sequence[Variant], dtypes: Iterable[str]) -> list[Variant]:
    """The variants that a model in these dtypes launches; all variants if `dtypes` is empty.

    A variant is selected if every narrow dtype of its pointers and constants is chosen. A variant in FP32 only is
    selected if FP32 is chosen, or if its kernel has no other variants.
    """
    chosen = {DTYPES[dtype] for dtype in dtypes}
    if not chosen:
        return list(variants)
    narrow_kernels = {variant.kernel for variant in variants if _narrow_dtypes(variant)}
    return [
        variant
        for variant in variants
        if (types := _narrow_dtypes(variant)) <= chosen
        and (types or "fp32" in chosen or variant.kernel not in narrow_kernels)
    ]


def _narrow_dtypes(variant: Variant) -> set[str]:
    pointers = {kind.removeprefix("*") for kind in variant.signature.values() if kind.startswith("*")}
    named = {value for value in variant.constants.values() if isinstance(value, str)}
    return (pointers - {"fp32"} | named) & set(DTYPES.values())


def triton_version() -> str:
    """The version of the installed Triton, which is not imported; raises KernelError if there is none."""
    for name in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise KernelError("compiling kernels needs Triton: pip install 'nemo-export[kernels]'")


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise KernelError(f"module {module} is missing: install nemo-export again")
    return Path(spec.origin)


def _source_digest(package: str) -> str:
    """A hash of every file that decides an op's variants and how they are compiled."""
    shared = [_path(f"nemotrt.plugins.{module}") for module in ("contract", "spec", "variant", "cubin")]
    files = [*sorted(_path(package).parent.glob("*.py")), *shared]
    return digest([digest(path.read_bytes()) for path in files])


@dataclass(frozen=True)
class _Job:
    """One variant for one SM, and the key of its cubin in the store."""

    op: str
    sm: int
    variant: Variant
    key: str

    @property
    def title(self) -> str:
        return f"{self.op}, SM {self.sm}, {self.variant.name}"

    def request(self) -> dict[str, Any]:
        variant = asdict(self.variant)
        return {"package": packages()[self.op], "sm": self.sm, "variant": variant, "key": self.key}

    def kernel(self, facts: dict[str, Any]) -> Kernel:
        """The index entry, with the facts from the store."""
        file = f"sm{self.sm}/{self.op}/{self.variant.name}.cubin"
        return Kernel(op=self.op, sm=self.sm, variant=self.variant, file=file, key=self.key, **facts)


Plans = dict[tuple[int, str], list[dict[str, Any]]]
"""The variants for each SM and op, as `cubin.list_variants` returns them."""


def _plans(sms: Sequence[int], op_names: Sequence[str], store: KernelStore, workers: Workers) -> Plans:
    """Every variant for each SM and op, from the store or, after a change, from a worker."""
    plans: Plans = {}
    keys: dict[tuple[int, str], str] = {}
    requests: dict[str, dict[str, Any]] = {}
    titles = {f"{op}, its variants": op for op in op_names}
    for title, op in titles.items():
        package = packages()[op]
        source = _source_digest(package)
        keys |= {(sm, op): digest(["plan", triton_version(), package, source, sm]) for sm in sms}
        plans |= {(sm, op): plan for sm in sms if (plan := store.get_note(keys[sm, op])) is not None}
        if missing := [sm for sm in sms if (sm, op) not in plans]:
            requests[title] = {"package": package, "sms": missing}
    for title, answer in workers.ask(requests):
        op = titles[title]
        for sm, plan in answer.items():
            plans[int(sm), op] = plan
            store.put_note(keys[int(sm), op], plan)
    return plans


def _jobs(plans: Plans, dtypes: Sequence[str], triton: str) -> list[_Job]:
    """The selected variants, ordered by SM, op and name."""
    recipe = digest(_path("nemotrt.plugins.cubin").read_bytes())
    jobs = []
    for (sm, op), plan in sorted(plans.items()):
        all_variants = [Variant.from_json(entry["variant"]) for entry in plan]
        hashes = [digest([triton, recipe, packages()[op], sm, entry]) for entry in plan]
        keys = {variant.name: key for variant, key in zip(all_variants, hashes, strict=True)}
        variants = selected(all_variants, dtypes)
        if not variants:
            raise KernelError(f"{op} has no kernels for SM {sm} in {', '.join(dtypes)}: choose another dtype")
        variants.sort(key=lambda variant: variant.name)
        jobs += [_Job(op, sm, variant, keys[variant.name]) for variant in variants]
    return jobs


def _compiled(
    jobs: Sequence[_Job], store: KernelStore, workers: Workers, report: Report
) -> Iterator[tuple[Kernel, bytes]]:
    """The kernel and the cubin of each job, from the store or compiled now."""
    missing = {job.title: job for job in jobs if store.get(job.key) is None}
    answers = workers.ask({title: job.request() for title, job in missing.items()})
    for done, (title, _) in enumerate(answers, 1):
        report(done, len(missing), title)
    for job in jobs:
        entry = store.get(job.key)
        if entry is None:
            raise KernelError(f"{job.title} has disappeared from {store.folder}: try again")
        cubin, facts = entry
        yield job.kernel(facts), cubin


def build(
    output: Path,
    sms: Sequence[int] = SMS,
    dtypes: Sequence[str] = (),
    op_names: Sequence[str] | None = None,
    *,
    jobs: int = 0,
    report: Report = lambda *_: None,
) -> KernelIndex:
    """Compile the kernels for these SMs, dtypes (empty for all) and ops (None for all) into the new folder `output`.

    Cached kernels are not compiled again. `jobs` is the number of parallel compilers, 0 for one per core.
    Raises KernelError that names the op, SM and variant.
    """
    op_names = tuple(packages()) if op_names is None else op_names
    check_selection(sms, dtypes, op_names)
    triton = triton_version()
    store = KernelStore(cache_folder() / "kernels")
    kernels = []
    with Workers(store.folder, jobs or len(os.sched_getaffinity(0))) as workers:
        planned = _jobs(_plans(sorted(set(sms)), sorted(set(op_names)), store, workers), dtypes, triton)
        for kernel, cubin in _compiled(planned, store, workers, report):
            kernels.append(kernel)
            path = output / kernel.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cubin)
    return KernelIndex(output, triton, tuple(kernels))


def kernels_with_ptx(
    wanted: Collection[tuple[str, int, str]], *, jobs: int = 0, report: Report = lambda *_: None
) -> dict[tuple[str, int, str], tuple[Kernel, str]]:
    """The kernels of these ops, SMs and variants' names, with the PTX of the same compilation that gave their cubins.

    Cached kernels are not compiled again. Raises KernelError that names the op, SM and variant.
    """
    store = KernelStore(cache_folder() / "kernels")
    sms, op_names = sorted({sm for _, sm, _ in wanted}), sorted({op for op, _, _ in wanted})
    with Workers(store.folder, jobs or len(os.sched_getaffinity(0))) as workers:
        planned = {
            (job.op, job.sm, job.variant.name): job
            for job in _jobs(_plans(sms, op_names, store, workers), (), triton_version())
        }
        if unknown := sorted(set(wanted) - set(planned)):
            raise KernelError(
                f"there is no variant {unknown[0][2]} of {unknown[0][0]} for SM {unknown[0][1]}"
            )
        kernels = [
            kernel for kernel, _ in _compiled([planned[key] for key in wanted], store, workers, report)
        ]
    return {key: (kernel, store.ptx(kernel.sha256)) for key, kernel in zip(wanted, kernels, strict=True)}
